//! What the gateway is told when it starts. Parsed into domain types by whoever reads the file.

use std::fmt;
use std::net::TcpListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use identity::SpiffeId;
use secrecy::{ExposeSecret as _, SecretString};
use sidecar::otlp::TracesConfig;
use sidecar::proxy_protocol::Networks;
use sidecar::traffic::config::Traffic;
pub use sidecar::traffic::ratelimit::Rate;
use sidecar::traffic::resolve::Source;
use thiserror::Error;
use url::Url;

use crate::https::Trust;

/// The session cookie's name. The prefix makes browsers insist on Secure, Path=/ and no Domain, so a
/// neighbouring host or an http page can neither read nor plant it (RFC 6265bis §4.1.3.2).
pub const SESSION_COOKIE: &str = "__Host-palisade";
/// Shortest key that may seal sessions: 256 bits, as AES-256 and HKDF-SHA-256 expect.
pub const MIN_SEAL_KEY_BYTES: usize = 32;

/// Everything a gateway needs to start.
#[derive(Debug)]
pub struct GatewayConfig {
    /// The front door, already bound, so that a taken port is the caller's error and not ours.
    pub listen: TcpListener,
    /// The load balancers before it, which say where connections come from.
    pub proxies: Networks,
    /// What browsers call this gateway: `https://127.0.0.1:8443`. Cookies, redirects and the CSRF check
    /// are bound to its origin.
    pub public_url: Url,
    /// Who may vouch for users. The first one is where browsers are sent to log in.
    pub issuers: Vec<IssuerConfig>,
    /// Which path prefix goes to which service; the longest prefix wins, on a segment's edge.
    pub routes: Vec<Route>,
    /// The services that routes lead to, and those that get calls only because another's traffic names them.
    pub services: Vec<Service>,
    /// How long sessions live.
    pub sessions: SessionLimits,
    /// Requests of one principal.
    pub requests: Rate,
    /// Failed authentications of one address.
    pub failed_authentications: Rate,
    /// A directory of our own; the session store lives in it.
    pub state: PathBuf,
    /// Keys that seal session records: the first seals, all open. Two while a key is being replaced.
    pub seal_keys: Vec<SealKey>,
    /// Normally [`SESSION_COOKIE`]; must begin with `__Host-`.
    pub cookie: String,
    /// Where spans go, and of which requests, each of which begins a trace, the mesh records them; `None`: the gateway
    /// leaves none, and all that come after it may.
    pub traces: Option<TracesConfig>,
}

/// One OpenID provider.
#[derive(Debug, Clone)]
pub struct IssuerConfig {
    /// Its identifier, exactly as its tokens spell it.
    pub issuer: Issuer,
    /// Our client id there.
    pub client_id: String,
    /// Our client secret there.
    pub client_secret: SecretString,
    /// The `aud` that access tokens must carry.
    pub audience: String,
    /// Signature algorithms that its tokens may use; symmetric ones cannot be named.
    pub algorithms: Vec<Algorithm>,
    /// Whether access tokens must say `typ: at+jwt` (RFC 9068). Off only for issuers that never do.
    pub require_at_jwt_typ: bool,
    /// What is asked for at login, beside `openid`.
    pub scopes: Vec<String>,
    /// Whether a refresh whose answer was lost may be sent again: the issuer repeats the same successor.
    pub refresh_retry_safe: bool,
    /// By what its server certificate is verified.
    pub trust: Trust,
}

/// Requests under `prefix` go to `service`.
#[derive(Debug, Clone)]
pub struct Route {
    /// `/` or `/api`, without a trailing slash unless it is the root.
    pub prefix: String,
    /// The service's name: what policies call it.
    pub service: String,
}

/// A service behind the gateway.
#[derive(Debug, Clone)]
pub struct Service {
    /// What routes and policies call it.
    pub name: String,
    /// Who must answer there.
    pub id: SpiffeId,
    /// Where its sidecars are.
    pub endpoints: Source,
    /// How requests go there.
    pub traffic: Traffic,
}

/// How long a browser session lives.
#[derive(Debug, Clone, Copy)]
pub struct SessionLimits {
    /// Without a request. A refresh of tokens is not a request.
    pub idle: Duration,
    /// Whatever happens.
    pub absolute: Duration,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self { idle: Duration::from_secs(30 * 60), absolute: Duration::from_secs(12 * 3600) }
    }
}

/// An issuer identifier: an https URL without query, fragment or user info, compared as text
/// (OpenID Connect Discovery §3, RFC 8414 §2).
#[derive(Clone, PartialEq, Eq)]
pub struct Issuer {
    text: Arc<str>,
    url: Url,
}

/// Why a text is not an issuer identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("an issuer is an https URL with a host and without user info, query or fragment")]
pub struct IssuerError;

impl Issuer {
    /// As its tokens spell it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// As a URL.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The discovery document's address.
    pub fn discovery(&self) -> String {
        format!("{}/.well-known/openid-configuration", self.text.trim_end_matches('/'))
    }

    /// Whether a URL has the issuer's scheme, host and port.
    pub fn same_origin(&self, url: &Url) -> bool {
        self.url.origin() == url.origin()
    }
}

impl FromStr for Issuer {
    type Err = IssuerError;
    fn from_str(text: &str) -> Result<Self, IssuerError> {
        let url = Url::parse(text).map_err(|_| IssuerError)?;
        let plain = url.query().is_none()
            && url.fragment().is_none()
            && url.username().is_empty()
            && url.password().is_none();
        if url.scheme() != "https" || url.host().is_none() || !plain {
            return Err(IssuerError);
        }
        Ok(Self { text: text.into(), url })
    }
}

impl TryFrom<Url> for Issuer {
    type Error = IssuerError;
    /// `Url` writes a bare origin with a slash behind it, issuers do not: it is taken off.
    fn try_from(url: Url) -> Result<Self, IssuerError> {
        let text = if url.path() == "/" { url.as_str().trim_end_matches('/') } else { url.as_str() };
        text.parse()
    }
}

impl fmt::Display for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Signature algorithms a token may use. `none` and the HMAC family have no value here, so no
/// configuration can let them in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are RFC 7518's and RFC 8037's")]
pub enum Algorithm {
    Es256,
    Es384,
    EdDsa,
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
}

impl Algorithm {
    /// From a header's or key's `alg`, exactly as registered: case counts (RFC 7515 §4.1.1).
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "EdDSA" => Self::EdDsa,
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            _ => return None,
        })
    }
}

/// A key that seals session records.
#[derive(Clone)]
pub struct SealKey(SecretString);

/// The key is too short to be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a session seal key has at least {MIN_SEAL_KEY_BYTES} bytes")]
pub struct SealKeyTooShort;

impl SealKey {
    /// Takes a random text of at least [`MIN_SEAL_KEY_BYTES`].
    pub fn new(secret: SecretString) -> Result<Self, SealKeyTooShort> {
        if secret.expose_secret().len() < MIN_SEAL_KEY_BYTES {
            Err(SealKeyTooShort)
        } else {
            Ok(Self(secret))
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.expose_secret().as_bytes()
    }
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKey")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn issuers_keep_their_spelling_and_must_be_plain_https() {
        assert_eq!("https://a.example".parse::<Issuer>().unwrap().as_str(), "https://a.example");
        assert_eq!("https://a.example/".parse::<Issuer>().unwrap().as_str(), "https://a.example/");
        let url = Url::parse("https://127.0.0.1:8444").unwrap();
        assert_eq!(Issuer::try_from(url).unwrap().as_str(), "https://127.0.0.1:8444");
        for bad in
            ["http://a.example", "https://a.example?x", "https://a@a.example", "https://a.example#f", "a"]
        {
            assert!(bad.parse::<Issuer>().is_err(), "{bad}");
        }
    }

    #[test]
    fn gateway_1_symmetric_and_none_algorithms_have_no_value() {
        for name in ["none", "None", "NONE", "HS256", "HS384", "HS512", "es256", "ES256K", ""] {
            assert_eq!(Algorithm::from_name(name), None, "{name}");
        }
    }
}
