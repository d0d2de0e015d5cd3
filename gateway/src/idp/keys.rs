//! The provider's keys on disk: one to sign with, one that never leaves.

use std::path::Path;

use identity::files::{self, StateError};
use identity::jws::{self, Compact};
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::{Value, json};
use thiserror::Error;
use zeroize::Zeroizing;

const SIGNING_KEY: &str = "signing-key.der";
const SECRET: &str = "secret.bin";
const SECRET_BYTES: usize = 64;

/// Why keys cannot be made, read or used.
#[derive(Debug, Error)]
pub enum KeysError {
    /// A file cannot be read or written, or others can read it: then its key is no secret any more.
    #[error(transparent)]
    File(#[from] StateError),
    /// Its contents are not a key of ours.
    #[error("the key file {0} does not hold the key it should")]
    Malformed(String),
    /// A key cannot be made.
    #[error("a key cannot be made: no randomness")]
    Generate,
}

/// The provider's keys.
pub(super) struct Keys {
    pkcs8: Zeroizing<Vec<u8>>,
    public: Vec<u8>,
    kid: String,
    secret: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("kid", &self.kid).finish_non_exhaustive()
    }
}

impl Keys {
    /// Reads the keys in `directory`, or makes them at the first start. They stay the same across
    /// restarts, so tokens and sessions do too.
    pub(super) fn open(directory: &Path, random: &dyn SecureRandom) -> Result<Self, KeysError> {
        let path = directory.join(SIGNING_KEY);
        let pkcs8 = read_or_make(&path, || {
            let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, random);
            made.map(|document| Zeroizing::new(document.as_ref().to_vec())).map_err(|_| KeysError::Generate)
        })?;
        let malformed = |path: &Path| KeysError::Malformed(path.display().to_string());
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pkcs8, &SystemRandom::new())
            .map_err(|_| malformed(&path))?;
        let public = pair.public_key().as_ref().to_vec();
        let kid = thumbprint(&public).ok_or_else(|| malformed(&path))?;
        let path = directory.join(SECRET);
        let secret = read_or_make(&path, || {
            let mut secret = Zeroizing::new(vec![0; SECRET_BYTES]);
            random.fill(&mut secret).map_err(|_| KeysError::Generate)?;
            Ok(secret)
        })?;
        if secret.len() != SECRET_BYTES {
            return Err(malformed(&path));
        }
        Ok(Self { pkcs8, public, kid, secret })
    }

    /// The key that proves refresh tokens.
    pub(super) fn refresh_key(&self) -> &[u8] {
        self.secret.get(..SECRET_BYTES / 2).unwrap_or_default()
    }

    /// The key that seals login state.
    pub(super) fn seal_key(&self) -> &[u8] {
        self.secret.get(SECRET_BYTES / 2..).unwrap_or_default()
    }

    /// Signs claims as a token of a type.
    pub(super) fn sign(&self, kind: &str, claims: &Value) -> Result<String, jws::JwsError> {
        jws::sign_es256(&json!({ "typ": kind, "alg": "ES256", "kid": self.kid }), claims, &self.pkcs8)
    }

    /// Takes a token of ours apart, if it is of this type and its signature is ours. Says nothing of times.
    pub(super) fn verify<'a>(&self, kind: &str, token: &'a str) -> Option<Compact<'a>> {
        let token = Compact::parse(token).ok()?;
        let ours = token.algorithm == "ES256"
            && token.header_str("typ") == Some(kind)
            && token.header_str("kid") == Some(self.kid.as_str());
        (ours && token.verify_es256(&self.public).is_ok()).then_some(token)
    }

    /// The public half as a JWKS document (RFC 7517 §5).
    pub(super) fn jwks(&self) -> Value {
        let (x, y) = coordinates(&self.public).unwrap_or_default();
        json!({ "keys": [{ "kty": "EC", "crv": "P-256", "x": x, "y": y, "use": "sig", "alg": "ES256", "kid": self.kid }] })
    }
}

fn coordinates(point: &[u8]) -> Option<(String, String)> {
    let (x, y) = point.strip_prefix(&[4])?.split_at_checked(32)?;
    Some((jws::encode(x), jws::encode(y)))
}

/// RFC 7638: the members in order, without white space.
fn thumbprint(point: &[u8]) -> Option<String> {
    let (x, y) = coordinates(point)?;
    let text = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
    Some(jws::encode(digest(&SHA256, text.as_bytes())))
}

fn read_or_make(
    path: &Path,
    make: impl FnOnce() -> Result<Zeroizing<Vec<u8>>, KeysError>,
) -> Result<Zeroizing<Vec<u8>>, KeysError> {
    if let Some(kept) = files::read_private(path)? {
        return Ok(kept);
    }
    let made = make()?;
    files::write_private(path, &made)?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    #[test]
    fn keys_stay_the_same_are_private_and_verify_only_their_own_type() {
        let directory = tempfile::tempdir().unwrap();
        let random = SystemRandom::new();
        let first = Keys::open(directory.path(), &random).unwrap();
        let again = Keys::open(directory.path(), &random).unwrap();
        assert_eq!((&first.kid, &first.secret), (&again.kid, &again.secret));
        let token = first.sign("at+jwt", &json!({"sub": "alice"})).unwrap();
        assert_eq!(again.verify("at+jwt", &token).unwrap().claims["sub"], "alice");
        assert!(again.verify("JWT", &token).is_none());
        let other = tempfile::tempdir().unwrap();
        assert!(Keys::open(other.path(), &random).unwrap().verify("at+jwt", &token).is_none());
        let key = directory.path().join(SIGNING_KEY);
        assert_eq!(std::fs::metadata(&key).unwrap().mode() & 0o777, 0o600);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            Keys::open(directory.path(), &random),
            Err(KeysError::File(StateError::FileMode { .. }))
        ));
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&key, b"not a key").unwrap();
        assert!(matches!(Keys::open(directory.path(), &random), Err(KeysError::Malformed(_))));
    }
}
