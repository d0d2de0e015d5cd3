//! The path of a secret, spelt in exactly one way.

use std::fmt;

use thiserror::Error;

/// Longest path, as Vault's storage allows within its 2 KiB URLs.
pub const MAX_PATH_BYTES: usize = 512;
/// Most segments.
pub const MAX_SEGMENTS: usize = 32;

/// Why a text is not the path of a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PathError {
    /// No path at all.
    #[error("the path of a secret is missing")]
    Empty,
    /// Longer than [`MAX_PATH_BYTES`] or deeper than [`MAX_SEGMENTS`].
    #[error("a path has at most {MAX_PATH_BYTES} bytes and {MAX_SEGMENTS} segments")]
    TooLong,
    /// `//`, a leading or a trailing slash.
    #[error("a path has no empty segment")]
    EmptySegment,
    /// `.` or `..`.
    #[error("a path has no '.' or '..' segment")]
    DotSegment,
    /// Anything outside the alphabet: percent-encoding, wildcards, control and non-ASCII characters.
    #[error("a path holds only A-Z, a-z, 0-9 and . _ - ~ @ : = ,")]
    Character,
}

/// Where a secret is, below its mount: `accounts/db-key`.
///
/// INVARIANT: 1 to 32 non-empty segments of `[A-Za-z0-9._~@:=,-]`, none `.` or `..`. Nothing in it has a
/// second spelling (no encoding, no folding) and nothing in it means anything to a policy's patterns, so
/// the path that is judged is the path that is read.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecretPath(String);

impl SecretPath {
    /// Parses a path as it stands in a request target, undecoded.
    pub fn new(text: &str) -> Result<Self, PathError> {
        check(text)?;
        Ok(Self(text.to_owned()))
    }

    /// The path.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SecretPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check(text: &str) -> Result<(), PathError> {
    if text.is_empty() {
        return Err(PathError::Empty);
    }
    if text.len() > MAX_PATH_BYTES || text.split('/').count() > MAX_SEGMENTS {
        return Err(PathError::TooLong);
    }
    for segment in text.split('/') {
        match segment {
            "" => return Err(PathError::EmptySegment),
            "." | ".." => return Err(PathError::DotSegment),
            _ if segment.bytes().all(allowed) => {}
            _ => return Err(PathError::Character),
        }
    }
    Ok(())
}

fn allowed(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._~@:=,-".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn vault_1_security_31_tricks_in_paths_are_refused() {
        for (bad, why) in [
            ("", PathError::Empty),
            ("a//b", PathError::EmptySegment),
            ("/a", PathError::EmptySegment),
            ("a/", PathError::EmptySegment),
            ("a/./b", PathError::DotSegment),
            ("a/../b", PathError::DotSegment),
            ("..", PathError::DotSegment),
            ("a/%2e%2e/b", PathError::Character),
            ("a%2fb", PathError::Character),
            ("a\\..\\b", PathError::Character),
            ("a\0b", PathError::Character),
            ("a;x=y", PathError::Character),
            ("a b", PathError::Character),
        ] {
            assert_eq!(SecretPath::new(bad), Err(why), "{bad:?}");
        }
        assert!(SecretPath::new("accounts/db-key").is_ok());
        assert!(SecretPath::new(&"a".repeat(MAX_PATH_BYTES + 1)).is_err());
        assert!(SecretPath::new(&vec!["a"; MAX_SEGMENTS + 1].join("/")).is_err());
    }

    #[test]
    fn vault_3_4_security_32_names_have_no_second_spelling_and_no_wildcard() {
        assert_ne!(SecretPath::new("Accounts/db-key"), SecretPath::new("accounts/db-key"));
        for bad in
            ["a*", "a+b", "+/db-key", "\u{212a}ey", "acc\u{f6}unts", "a\u{200b}", "{{x}}", "a?b", "a#b"]
        {
            assert_eq!(SecretPath::new(bad), Err(PathError::Character), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_its_own_path_or_none(text in "\\PC{0,40}") {
            if let Ok(path) = SecretPath::new(&text) {
                prop_assert_eq!(path.as_str(), text.as_str());
                prop_assert!(text.is_ascii() && !text.contains("//") && !text.contains(['%', '\\', '*', '+']));
            }
        }
    }
}
