//! What a JWT must be to be believed. One verifier for access tokens and ID tokens.
//!
//! Order: form ([`Compact`]), type, algorithm by the issuer's pins, key, signature, claims. Nothing in a
//! token says where to find its key: `jku`, `x5u`, `jwk` and `x5c` are never looked at.

use std::time::Duration;

use identity::jws::{Compact, JwsError};
use ring::digest::{SHA256, SHA384, SHA512, digest};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::config::{Algorithm, Issuer};
use crate::jwk::{KeySet, MAX_KID_BYTES};

/// How far an issuer's clock may be ahead of ours, for `nbf` and `iat`. `exp` has no leeway.
pub const CLOCK_LEEWAY: Duration = Duration::from_secs(10);
/// Times after the year 9999 are mistakes or mischief.
const MAX_TIME_SECONDS: f64 = 253_402_300_800.0;
/// Most scopes, groups and audiences read from one token.
const MAX_LIST: usize = 256;

/// Why a token is not believed. For the operator's log: the caller only hears `invalid_token`.
#[derive(Debug, Error)]
pub enum JwtError {
    /// Not a strict compact JWS.
    #[error("not a strict compact JWS: {0}")]
    Form(#[from] JwsError),
    /// `typ` says that it is something else.
    #[error("the token is of another type")]
    Type,
    /// The issuer is not one of ours.
    #[error("unknown issuer")]
    Issuer,
    /// `alg` is not pinned for this issuer, or does not fit the key.
    #[error("the algorithm is not allowed for this issuer or key")]
    Algorithm,
    /// No key of that name.
    #[error("no such key")]
    Key,
    /// The issuer's keys could not be had.
    #[error("the issuer's keys are not available")]
    KeysUnavailable,
    /// The signature is wrong.
    #[error("bad signature")]
    Signature,
    /// A claim is missing, of the wrong type, or wrong.
    #[error("the claim {0} is missing or wrong")]
    Claim(&'static str),
    /// `exp` has passed.
    #[error("expired")]
    Expired,
    /// `nbf` or `iat` lies ahead.
    #[error("not yet valid")]
    NotYetValid,
    /// Bound to a key (RFC 9449) or certificate (RFC 8705), and so worthless as a bearer token.
    #[error("a sender-constrained token was presented as a bearer token")]
    SenderConstrained,
}

/// What an issuer's tokens are held against.
#[derive(Debug, Clone)]
pub struct Pins {
    /// Compared exactly with `iss`.
    pub issuer: Issuer,
    /// Must be among an access token's `aud`.
    pub audience: String,
    /// Must be among an ID token's `aud`.
    pub client_id: String,
    /// Allowed signature algorithms.
    pub algorithms: Vec<Algorithm>,
    /// See [`crate::config::IssuerConfig::require_at_jwt_typ`].
    pub require_at_jwt_typ: bool,
}

/// A believed access token (RFC 9068).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessToken {
    /// `sub`.
    pub subject: String,
    /// `client_id`, or `azp` of issuers that do not follow RFC 9068.
    pub client: String,
    /// `scope`, split.
    pub scopes: Vec<String>,
    /// `groups`.
    pub groups: Vec<String>,
    /// `auth_time`, seconds since the Unix epoch; 0 if absent.
    pub auth_time: u64,
    /// `tenant`, or `tid` where the issuer calls it so.
    pub tenant: Option<String>,
    /// Whether `mfa` is among `amr` (RFC 8176).
    pub mfa: bool,
    /// When it ends, since the Unix epoch.
    pub expires: Duration,
}

/// A believed ID token (OpenID Connect Core §2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdToken {
    /// `sub`.
    pub subject: String,
    /// `groups`, if the issuer gives them.
    pub groups: Vec<String>,
    /// `auth_time`, seconds since the Unix epoch; 0 if absent.
    pub auth_time: u64,
    /// `tenant`, or `tid` where the issuer calls it so.
    pub tenant: Option<String>,
    /// Whether `mfa` is among `amr` (RFC 8176).
    pub mfa: bool,
    /// When it ends, since the Unix epoch.
    pub expires: Duration,
}

/// The `iss` of a token that nothing has been verified of yet: only good for choosing whose pins apply.
pub fn claimed_issuer<'a>(token: &'a Compact<'_>) -> Result<&'a str, JwtError> {
    token.claims.get("iss").and_then(Value::as_str).ok_or(JwtError::Claim("iss"))
}

/// The `kid` of a token: an opaque, short name.
pub fn key_name<'a>(token: &'a Compact<'_>) -> Result<Option<&'a str>, JwtError> {
    match token.header.get("kid") {
        None => Ok(None),
        Some(Value::String(kid)) if kid.len() <= MAX_KID_BYTES => Ok(Some(kid)),
        Some(_) => Err(JwtError::Key),
    }
}

impl Pins {
    /// The token's algorithm, if this issuer may use it.
    pub fn algorithm(&self, token: &Compact<'_>) -> Result<Algorithm, JwtError> {
        Algorithm::from_name(&token.algorithm)
            .filter(|algorithm| self.algorithms.contains(algorithm))
            .ok_or(JwtError::Algorithm)
    }

    /// Everything about an access token that needs no key.
    pub fn check_access_type(&self, token: &Compact<'_>) -> Result<(), JwtError> {
        let kind = token_type(token)?;
        let at_jwt = kind.is_some_and(|kind| {
            kind.eq_ignore_ascii_case("at+jwt") || kind.eq_ignore_ascii_case("application/at+jwt")
        });
        let untyped = kind.is_none_or(|kind| kind.eq_ignore_ascii_case("jwt"));
        if !at_jwt && (self.require_at_jwt_typ || !untyped) {
            return Err(JwtError::Type);
        }
        // Members that only ID tokens, logout tokens and security events have.
        if ["nonce", "at_hash", "c_hash", "events"].iter().any(|name| token.claims.contains_key(*name)) {
            return Err(JwtError::Type);
        }
        Ok(())
    }

    /// Verifies an access token with `keys` at `now` (since the Unix epoch).
    pub fn access_token(
        &self,
        token: &Compact<'_>,
        keys: &KeySet,
        now: Duration,
    ) -> Result<AccessToken, JwtError> {
        self.check_access_type(token)?;
        self.verify_signature(token, keys)?;
        let claims = &token.claims;
        self.check_issuer(claims)?;
        if !audiences(claims)?.contains(&self.audience.as_str()) {
            return Err(JwtError::Claim("aud"));
        }
        let expires = check_times(claims, now)?;
        if claims.contains_key("cnf") {
            return Err(JwtError::SenderConstrained);
        }
        if self.require_at_jwt_typ {
            required(claims, "jti")?;
        }
        let client = match claims.get("client_id") {
            None if !self.require_at_jwt_typ => required(claims, "azp")?,
            _ => required(claims, "client_id")?,
        };
        Ok(AccessToken {
            subject: required(claims, "sub")?.to_owned(),
            client: client.to_owned(),
            scopes: match claims.get("scope") {
                None => Vec::new(),
                Some(Value::String(text)) => {
                    text.split(' ').filter(|s| !s.is_empty()).take(MAX_LIST).map(str::to_owned).collect()
                }
                Some(_) => return Err(JwtError::Claim("scope")),
            },
            groups: groups(claims)?,
            auth_time: auth_time(claims)?,
            tenant: tenant(claims)?,
            mfa: mfa(claims)?,
            expires,
        })
    }

    /// Verifies an ID token with `keys` at `now`. `nonce` is the login's, or `None` for a refresh, whose
    /// ID token need not repeat it. `access_token` is what came with it, for `at_hash`.
    pub fn id_token(
        &self,
        token: &Compact<'_>,
        keys: &KeySet,
        now: Duration,
        nonce: Option<&str>,
        access_token: &str,
    ) -> Result<IdToken, JwtError> {
        if token_type(token)?.is_some_and(|kind| !kind.eq_ignore_ascii_case("jwt")) {
            return Err(JwtError::Type);
        }
        if token.claims.contains_key("events") {
            return Err(JwtError::Type);
        }
        let algorithm = self.verify_signature(token, keys)?;
        let claims = &token.claims;
        self.check_issuer(claims)?;
        let audiences = audiences(claims)?;
        if !audiences.contains(&self.client_id.as_str()) {
            return Err(JwtError::Claim("aud"));
        }
        // OpenID Connect Core §3.1.3.7 steps 4 and 5.
        let azp = optional(claims, "azp")?;
        if azp.is_some_and(|azp| azp != self.client_id) || (audiences.len() > 1 && azp.is_none()) {
            return Err(JwtError::Claim("azp"));
        }
        let expires = check_times(claims, now)?;
        if let Some(nonce) = nonce
            && optional(claims, "nonce")? != Some(nonce)
        {
            return Err(JwtError::Claim("nonce"));
        }
        if let Some(hash) = optional(claims, "at_hash")?
            && hash != half_hash(algorithm, access_token)
        {
            return Err(JwtError::Claim("at_hash"));
        }
        Ok(IdToken {
            subject: required(claims, "sub")?.to_owned(),
            groups: groups(claims)?,
            auth_time: auth_time(claims)?,
            tenant: tenant(claims)?,
            mfa: mfa(claims)?,
            expires,
        })
    }

    fn verify_signature(&self, token: &Compact<'_>, keys: &KeySet) -> Result<Algorithm, JwtError> {
        let algorithm = self.algorithm(token)?;
        let key = keys.find(key_name(token)?).ok_or(JwtError::Key)?;
        if !key.fits(algorithm) {
            return Err(JwtError::Algorithm);
        }
        if key.verify(algorithm, token.signing_input.as_bytes(), &token.signature) {
            Ok(algorithm)
        } else {
            Err(JwtError::Signature)
        }
    }

    fn check_issuer(&self, claims: &Map<String, Value>) -> Result<(), JwtError> {
        if required(claims, "iss")? == self.issuer.as_str() { Ok(()) } else { Err(JwtError::Issuer) }
    }
}

/// The left half of the hash that fits the algorithm, base64url (OpenID Connect Core §3.1.3.6).
pub fn half_hash(algorithm: Algorithm, text: &str) -> String {
    let kind = match algorithm {
        Algorithm::Es256 | Algorithm::Rs256 | Algorithm::Ps256 => &SHA256,
        Algorithm::Es384 | Algorithm::Rs384 | Algorithm::Ps384 => &SHA384,
        // Ed25519 hashes with SHA-512 inside; issuers agree on it for at_hash too.
        Algorithm::Rs512 | Algorithm::Ps512 | Algorithm::EdDsa => &SHA512,
    };
    let hash = digest(kind, text.as_bytes());
    let half = hash.as_ref().len() / 2;
    identity::jws::encode(hash.as_ref().get(..half).unwrap_or_default())
}

fn token_type<'a>(token: &'a Compact<'_>) -> Result<Option<&'a str>, JwtError> {
    match token.header.get("typ") {
        None => Ok(None),
        Some(Value::String(kind)) => Ok(Some(kind)),
        Some(_) => Err(JwtError::Type),
    }
}

fn required<'a>(claims: &'a Map<String, Value>, name: &'static str) -> Result<&'a str, JwtError> {
    optional(claims, name)?.filter(|text| !text.is_empty()).ok_or(JwtError::Claim(name))
}

fn optional<'a>(claims: &'a Map<String, Value>, name: &'static str) -> Result<Option<&'a str>, JwtError> {
    match claims.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(JwtError::Claim(name)),
    }
}

fn audiences(claims: &Map<String, Value>) -> Result<Vec<&str>, JwtError> {
    match claims.get("aud") {
        Some(Value::String(one)) => Ok(vec![one]),
        Some(Value::Array(many)) if many.len() <= MAX_LIST => {
            many.iter().map(|one| one.as_str().ok_or(JwtError::Claim("aud"))).collect()
        }
        _ => Err(JwtError::Claim("aud")),
    }
}

fn groups(claims: &Map<String, Value>) -> Result<Vec<String>, JwtError> {
    match claims.get("groups") {
        None => Ok(Vec::new()),
        Some(Value::Array(many)) if many.len() <= MAX_LIST => {
            many.iter().map(|one| one.as_str().map(str::to_owned).ok_or(JwtError::Claim("groups"))).collect()
        }
        Some(_) => Err(JwtError::Claim("groups")),
    }
}

fn tenant(claims: &Map<String, Value>) -> Result<Option<String>, JwtError> {
    let name = if claims.contains_key("tenant") { "tenant" } else { "tid" };
    Ok(optional(claims, name)?.map(str::to_owned))
}

fn mfa(claims: &Map<String, Value>) -> Result<bool, JwtError> {
    let Some(methods) = claims.get("amr") else { return Ok(false) };
    let methods = methods.as_array().ok_or(JwtError::Claim("amr"))?;
    Ok(methods.iter().take(MAX_LIST).any(|method| method == "mfa"))
}

fn auth_time(claims: &Map<String, Value>) -> Result<u64, JwtError> {
    if !claims.contains_key("auth_time") {
        return Ok(0);
    }
    Ok(seconds(claims, "auth_time")?.as_secs())
}

/// A NumericDate (RFC 7519 §2): a finite, plausible number of seconds, maybe with a fraction.
fn seconds(claims: &Map<String, Value>, name: &'static str) -> Result<Duration, JwtError> {
    let value = claims.get(name).and_then(Value::as_f64).ok_or(JwtError::Claim(name))?;
    if !(0.0..MAX_TIME_SECONDS).contains(&value) {
        return Err(JwtError::Claim(name));
    }
    Duration::try_from_secs_f64(value).map_err(|_| JwtError::Claim(name))
}

fn check_times(claims: &Map<String, Value>, now: Duration) -> Result<Duration, JwtError> {
    let expires = seconds(claims, "exp")?;
    if expires <= now {
        return Err(JwtError::Expired);
    }
    let latest = now.saturating_add(CLOCK_LEEWAY);
    if seconds(claims, "iat")? > latest {
        return Err(JwtError::NotYetValid);
    }
    if claims.contains_key("nbf") && seconds(claims, "nbf")? > latest {
        return Err(JwtError::NotYetValid);
    }
    Ok(expires)
}

#[cfg(test)]
#[path = "jwt_tests.rs"]
mod tests;
