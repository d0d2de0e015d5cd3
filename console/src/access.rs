//! Who may look: whoever holds the link, from a browser that addresses us by a loopback name.

use std::net::IpAddr;

use axum::http::header::{COOKIE, HOST};
use axum::http::{HeaderMap, Uri};
use ring::hmac;
use ring::rand::SystemRandom;
use secrecy::{ExposeSecret as _, SecretString};

/// The cookie's name. No `__Host-` prefix: browsers keep those for `Secure` cookies, and the console is
/// plain HTTP on loopback.
pub(crate) const COOKIE_NAME: &str = "palisade_console";
/// A token shorter than this could be guessed (128 bits in base64url have 22 characters), so nothing
/// opens with it, and an empty one never opens anything.
const TOKEN_BYTES_MIN: usize = 22;
/// Ours has 64 hex digits; longer cookies are not ours and are not hashed.
const PRESENTED_BYTES_MAX: usize = 512;

/// Checks what a browser presents. Prints nothing of what it holds.
pub(crate) struct Access {
    /// Random for each process: comparing under it tells nothing by its time.
    compare: Option<hmac::Key>,
    token: SecretString,
    /// What the cookie holds: made from the token, so that it outlives a restart, and not the token,
    /// so that the link cannot be read back from a browser's cookies.
    cookie: String,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Access(..)")
    }
}

impl Access {
    pub(crate) fn new(token: SecretString) -> Self {
        let usable = token.expose_secret().len() >= TOKEN_BYTES_MIN;
        if !usable {
            tracing::error!("the console's token is too short to be safe; the console stays closed");
        }
        // No randomness: no comparison, so nobody gets in.
        let compare = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new()).ok().filter(|_| usable);
        let key = hmac::Key::new(hmac::HMAC_SHA256, token.expose_secret().as_bytes());
        let tag = hmac::sign(&key, b"palisade console cookie v1");
        let cookie = identity::hex::encode(tag.as_ref());
        Self { compare, token, cookie }
    }

    /// Whether this is the link's token.
    pub(crate) fn is_token(&self, presented: &str) -> bool {
        self.same(presented, self.token.expose_secret())
    }

    /// Whether the request carries our cookie.
    pub(crate) fn has_cookie(&self, headers: &HeaderMap) -> bool {
        headers
            .get_all(COOKIE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .any(|(name, value)| name == COOKIE_NAME && self.same(value, &self.cookie))
    }

    /// The `Set-Cookie` value that opens the console in this browser until it closes.
    pub(crate) fn set_cookie(&self) -> String {
        format!("{COOKIE_NAME}={}; Path=/; HttpOnly; SameSite=Strict", self.cookie)
    }

    /// In constant time for strings of one length, by comparing MACs under a key nobody knows.
    fn same(&self, presented: &str, wanted: &str) -> bool {
        let Some(compare) = &self.compare else { return false };
        presented.len() <= PRESENTED_BYTES_MAX
            && hmac::verify(compare, presented.as_bytes(), hmac::sign(compare, wanted.as_bytes()).as_ref())
                .is_ok()
    }
}

/// Whether the request addresses us by a loopback name.
///
/// A page of another site can have its own name resolve to 127.0.0.1 and so reach us from the
/// browser as its own origin (DNS rebinding); its name is then in `Host`.
pub(crate) fn host_is_loopback(headers: &HeaderMap, uri: &Uri) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let Ok(host) = host.to_str() else { return false };
    // An absolute-form target carries a host of its own (RFC 9112, section 3.2.2).
    let target_agrees = uri.authority().is_none_or(|authority| authority.as_str() == host);
    target_agrees && is_loopback(host)
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if port.is_empty() || is_port(port) => address,
            _ => return false,
        },
        None => match host.split_once(':') {
            Some((name, port)) if is_port(&format!(":{port}")) => name,
            Some(_) => return false,
            None => host,
        },
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn only_the_token_is_the_token() {
        let access = Access::new(SecretString::from(TOKEN));
        assert!(access.is_token(TOKEN));
        for wrong in ["", "0", &TOKEN[1..], &format!("{TOKEN}0"), &TOKEN.to_uppercase()] {
            assert!(!access.is_token(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_short_or_empty_token_opens_nothing() {
        for short in ["", "secret"] {
            let access = Access::new(SecretString::from(short));
            assert!(!access.is_token(short));
            let mut headers = HeaderMap::new();
            headers.insert(COOKIE, HeaderValue::from_str(&access.set_cookie()).unwrap());
            assert!(!access.has_cookie(&headers));
        }
    }

    #[test]
    fn the_cookie_is_not_the_token_and_outlives_a_restart() {
        let (one, two) = (Access::new(SecretString::from(TOKEN)), Access::new(SecretString::from(TOKEN)));
        assert!(!one.set_cookie().contains(TOKEN));
        let pair = one.set_cookie().split(';').next().unwrap().to_owned();
        let mut headers = HeaderMap::new();
        headers.insert(COOKIE, HeaderValue::from_str(&format!("a=b; {pair}")).unwrap());
        assert!(two.has_cookie(&headers));
        let other = Access::new(SecretString::from("another token that is long enough"));
        assert!(!other.has_cookie(&headers));
        assert_eq!(format!("{one:?}"), "Access(..)");
    }

    #[test]
    fn only_loopback_names_are_ours() {
        for ours in
            ["127.0.0.1", "127.0.0.1:8080", "localhost:1", "LOCALHOST", "[::1]:8080", "[::1]", "127.9.9.9"]
        {
            assert!(is_loopback(ours), "{ours}");
        }
        for not in [
            "",
            "bank.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1:80",
            "[::2]",
            "[::1",
            "::1",
            "localhost:",
            "localhost:99999",
            "localhost:80:80",
            "0.0.0.0",
            "localhost.",
            "user@localhost",
            "[::1]x",
        ] {
            assert!(!is_loopback(not), "{not}");
        }
    }
}
