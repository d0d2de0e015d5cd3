//! SPIFFE IDs and trust domains (SPIFFE-ID standard §2).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// Longest trust domain accepted (SPIFFE-ID §2.1).
pub const MAX_TRUST_DOMAIN_BYTES: usize = 255;
/// Longest SPIFFE ID accepted or made, scheme included (SPIFFE-ID §2.3).
pub const MAX_ID_BYTES: usize = 2048;

const SCHEME: &str = "spiffe://";

/// Why a text is not a SPIFFE ID or a trust domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum IdError {
    /// The text does not start with `spiffe://`, in lower case.
    #[error("a SPIFFE ID starts with spiffe://")]
    Scheme,
    /// No trust domain.
    #[error("the trust domain is empty")]
    EmptyTrustDomain,
    /// A byte outside `[a-z0-9._-]`: this also rules out ports, user info, percent-encoding, queries.
    #[error("a trust domain holds only a-z, 0-9, '.', '-' and '_'")]
    TrustDomainCharacter,
    /// A path segment is empty, so also a trailing slash.
    #[error("a path segment is empty (no '//' and no trailing '/')")]
    EmptySegment,
    /// A path segment is `.` or `..`.
    #[error("a path segment is '.' or '..'")]
    DotSegment,
    /// A byte outside `[A-Za-z0-9._-]` in the path.
    #[error("a path segment holds only A-Z, a-z, 0-9, '.', '-' and '_'")]
    PathCharacter,
    /// Longer than the standard allows.
    #[error("longer than the SPIFFE ID standard allows (255 bytes a trust domain, 2048 an ID)")]
    TooLong,
    /// A workload's ID needs a path; a trust domain's own ID has none.
    #[error("a workload's SPIFFE ID has a path")]
    NoPath,
}

/// The name of one root of trust, such as `bank.example`.
///
/// INVARIANT: 1 to 255 bytes of `[a-z0-9._-]`; compared whole, never by prefix or suffix.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Parses a bare name (`bank.example`), not a `spiffe://` URI.
    pub fn new(name: &str) -> Result<Self, IdError> {
        if name.is_empty() {
            return Err(IdError::EmptyTrustDomain);
        }
        if name.len() > MAX_TRUST_DOMAIN_BYTES {
            return Err(IdError::TooLong);
        }
        let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if !name.bytes().all(allowed) {
            return Err(IdError::TrustDomainCharacter);
        }
        Ok(Self(name.into()))
    }

    /// The bare name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The trust domain's own ID, `spiffe://name`, as its authorities carry it.
    pub fn id_string(&self) -> String {
        format!("{SCHEME}{}", self.0)
    }

    /// The ID of the workload at `path`, which starts with a slash: `/service/web`.
    pub fn workload(&self, path: &str) -> Result<SpiffeId, IdError> {
        SpiffeId::new(&format!("{SCHEME}{}{path}", self.0))
    }
}

/// One workload's name: `spiffe://bank.example/service/accounts`.
///
/// INVARIANT: canonical, at most 2,048 bytes, always with a path. The ID of an authority, which has
/// none, is [`TrustDomain::id_string`] and never a `SpiffeId`, so it cannot be taken for a peer.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Arc<str>,
    trust_domain: TrustDomain,
}

impl SpiffeId {
    /// Parses a full `spiffe://` URI.
    pub fn new(text: &str) -> Result<Self, IdError> {
        if text.len() > MAX_ID_BYTES {
            return Err(IdError::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(IdError::Scheme)?;
        let (domain, path) = match rest.split_once('/') {
            Some((domain, path)) => (domain, path),
            None => {
                TrustDomain::new(rest)?;
                return Err(IdError::NoPath);
            }
        };
        let trust_domain = TrustDomain::new(domain)?;
        for segment in path.split('/') {
            check_segment(segment)?;
        }
        Ok(Self { text: text.into(), trust_domain })
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain it belongs to.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path, with its leading slash.
    pub fn path(&self) -> &str {
        self.text.get(SCHEME.len() + self.trust_domain.0.len()..).unwrap_or_default()
    }
}

fn check_segment(segment: &str) -> Result<(), IdError> {
    match segment {
        "" => return Err(IdError::EmptySegment),
        "." | ".." => return Err(IdError::DotSegment),
        _ => {}
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if segment.bytes().all(allowed) { Ok(()) } else { Err(IdError::PathCharacter) }
}

macro_rules! text_type {
    ($type:ty, $parse:expr, $text:expr) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($text(self))
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($text(self))
            }
        }
        impl FromStr for $type {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                $parse(text)
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str($text(self))
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                $parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

text_type!(TrustDomain, TrustDomain::new, TrustDomain::as_str);
text_type!(SpiffeId, SpiffeId::new, SpiffeId::as_str);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn identity_17_trust_domain_is_lower_case_letters_digits_and_three_marks() {
        for good in ["a", "bank.example", "a_b-c.9", &"x".repeat(255)] {
            assert!(TrustDomain::new(good).is_ok(), "{good}");
        }
        for bad in ["Bank", "bank:80", "u@bank", "b%61nk", "bank?", "bank#", "b nk", "bank/", "bänk", "b\0"]
        {
            assert_eq!(TrustDomain::new(bad), Err(IdError::TrustDomainCharacter), "{bad}");
        }
        assert_eq!(TrustDomain::new(""), Err(IdError::EmptyTrustDomain));
        assert_eq!(TrustDomain::new(&"x".repeat(256)), Err(IdError::TooLong));
    }

    #[test]
    fn identity_18_path_segments_are_plain_and_never_empty_or_dots() {
        assert!(SpiffeId::new("spiffe://td/.../a").is_ok());
        for (bad, why) in [
            ("spiffe://td/", IdError::EmptySegment),
            ("spiffe://td/a/", IdError::EmptySegment),
            ("spiffe://td//a", IdError::EmptySegment),
            ("spiffe://td/a/./b", IdError::DotSegment),
            ("spiffe://td/..", IdError::DotSegment),
            ("spiffe://td/a%2fb", IdError::PathCharacter),
            ("spiffe://td/a?b", IdError::PathCharacter),
            ("spiffe://td/a\0", IdError::PathCharacter),
            ("spiffe://td/é", IdError::PathCharacter),
            ("spiffe://td", IdError::NoPath),
            ("spiffe:///a", IdError::EmptyTrustDomain),
            ("Spiffe://td/a", IdError::Scheme),
            ("https://td/a", IdError::Scheme),
        ] {
            assert_eq!(SpiffeId::new(bad), Err(why), "{bad}");
        }
    }

    #[test]
    fn identity_19_two_thousand_and_forty_eight_bytes_in_all() {
        let longest = format!("spiffe://td/{}", "a".repeat(2048 - 12));
        assert!(SpiffeId::new(&longest).is_ok());
        assert_eq!(SpiffeId::new(&format!("{longest}a")), Err(IdError::TooLong));
    }

    #[test]
    fn security_2_trust_domains_are_compared_whole() {
        let td = |s| TrustDomain::new(s).unwrap();
        assert_ne!(td("bank.example"), td("bank.example.org"));
        assert_ne!(td("bank.example"), td("evil-bank.example"));
    }

    proptest! {
        #[test]
        fn any_text_parses_to_itself_or_not_at_all(text in "(spiffe://)?[ -~]{0,40}") {
            if let Ok(id) = SpiffeId::new(&text) {
                prop_assert_eq!(id.as_str(), text.as_str());
                prop_assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
            }
        }
    }
}
