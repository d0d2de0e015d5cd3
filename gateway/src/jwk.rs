//! An issuer's key set (RFC 7517), reduced to the keys that may verify a signature here.

use std::collections::HashMap;

use identity::{json, jws};
use jsonwebtoken::DecodingKey;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::config::Algorithm;

/// Most keys of one issuer: rotation needs two or three.
pub const MAX_KEYS: usize = 32;
/// Longest `kid` looked up or stored; it is an opaque name and never a path or a query.
pub const MAX_KID_BYTES: usize = 256;
/// RSA moduli outside these are refused (NIST SP 800-131A; above it only verification gets slow).
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Why a document is not a key set.
#[derive(Debug, Error)]
pub enum JwksError {
    /// Not strict JSON.
    #[error("not strict JSON: {0}")]
    Json(#[from] json::JsonError),
    /// No `keys` array.
    #[error("there is no array \"keys\"")]
    NoKeys,
    /// More than [`MAX_KEYS`].
    #[error("more than {MAX_KEYS} keys")]
    TooMany,
    /// None of them can verify a token.
    #[error("no key can verify a signature")]
    NoneUsable,
}

/// One public key and the algorithms that fit its type and its own `alg`.
#[derive(Clone)]
pub struct Key {
    algorithms: Vec<Algorithm>,
    decoding: DecodingKey,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("algorithms", &self.algorithms).finish_non_exhaustive()
    }
}

impl Key {
    /// Whether tokens signed with `algorithm` may be verified with this key.
    pub fn fits(&self, algorithm: Algorithm) -> bool {
        self.algorithms.contains(&algorithm)
    }

    /// Verifies a decoded signature. False for every kind of failure.
    pub fn verify(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        if !self.fits(algorithm) {
            return false;
        }
        // RFC 7518 §3.4: r and s side by side, never DER. The library checks too; a length is cheap.
        let raw_length = match algorithm {
            Algorithm::Es256 | Algorithm::EdDsa => Some(64),
            Algorithm::Es384 => Some(96),
            _ => None,
        };
        if raw_length.is_some_and(|length| signature.len() != length) {
            return false;
        }
        jsonwebtoken::crypto::verify(
            &jws::encode(signature),
            message,
            &self.decoding,
            library_name(algorithm),
        )
        .unwrap_or(false)
    }
}

fn library_name(algorithm: Algorithm) -> jsonwebtoken::Algorithm {
    use jsonwebtoken::Algorithm as Library;
    match algorithm {
        Algorithm::Es256 => Library::ES256,
        Algorithm::Es384 => Library::ES384,
        Algorithm::EdDsa => Library::EdDSA,
        Algorithm::Rs256 => Library::RS256,
        Algorithm::Rs384 => Library::RS384,
        Algorithm::Rs512 => Library::RS512,
        Algorithm::Ps256 => Library::PS256,
        Algorithm::Ps384 => Library::PS384,
        Algorithm::Ps512 => Library::PS512,
    }
}

/// The usable keys of one issuer.
#[derive(Debug, Clone, Default)]
pub struct KeySet {
    named: HashMap<String, Key>,
    unnamed: Vec<Key>,
}

impl KeySet {
    /// Reads a JWKS document. Keys that cannot serve here (other types, for encryption, too weak,
    /// ambiguous names) are left out; a set of which nothing is left is an error.
    pub fn parse(document: &[u8]) -> Result<Self, JwksError> {
        let document = json::parse_object(document)?;
        let keys = document.get("keys").and_then(Value::as_array).ok_or(JwksError::NoKeys)?;
        if keys.len() > MAX_KEYS {
            return Err(JwksError::TooMany);
        }
        let mut set = Self::default();
        let mut ambiguous = Vec::new();
        for jwk in keys.iter().filter_map(Value::as_object) {
            let Some(key) = usable(jwk) else { continue };
            match jwk.get("kid") {
                None => set.unnamed.push(key),
                Some(Value::String(kid)) if kid.len() <= MAX_KID_BYTES => {
                    if set.named.insert(kid.clone(), key).is_some() {
                        ambiguous.push(kid.clone());
                    }
                }
                Some(_) => {}
            }
        }
        // Two keys of one name: neither is known to be meant.
        for kid in ambiguous {
            tracing::warn!("the issuer publishes two keys under one kid; neither is used");
            set.named.remove(&kid);
        }
        if set.named.is_empty() && set.unnamed.is_empty() { Err(JwksError::NoneUsable) } else { Ok(set) }
    }

    /// The key that a token names. A token without `kid` is served only if there is no choice.
    pub fn find(&self, kid: Option<&str>) -> Option<&Key> {
        match kid {
            Some(kid) => self.named.get(kid),
            None => {
                let mut all = self.unnamed.iter().chain(self.named.values());
                let only = all.next()?;
                if all.next().is_some() { None } else { Some(only) }
            }
        }
    }
}

fn usable(jwk: &Map<String, Value>) -> Option<Key> {
    let text = |name: &str| jwk.get(name).and_then(Value::as_str);
    if jwk.contains_key("use") && text("use") != Some("sig") {
        return None;
    }
    if let Some(operations) = jwk.get("key_ops") {
        let verify = operations.as_array()?.iter().any(|operation| operation.as_str() == Some("verify"));
        if !verify {
            return None;
        }
    }
    let (mut algorithms, decoding) = match (text("kty")?, text("crv")) {
        ("EC", Some("P-256")) => (vec![Algorithm::Es256], elliptic(text("x")?, text("y")?, 32)?),
        ("EC", Some("P-384")) => (vec![Algorithm::Es384], elliptic(text("x")?, text("y")?, 48)?),
        ("OKP", Some("Ed25519")) => {
            let x = jws::decode(text("x")?).ok().filter(|x| x.len() == 32)?;
            (vec![Algorithm::EdDsa], DecodingKey::from_ed_der(&x))
        }
        ("RSA", None) => {
            let (n, e) = (jws::decode(text("n")?).ok()?, jws::decode(text("e")?).ok()?);
            if !RSA_BITS.contains(&bits(&n)) || e.is_empty() {
                return None;
            }
            use Algorithm::{Ps256, Ps384, Ps512, Rs256, Rs384, Rs512};
            (vec![Rs256, Rs384, Rs512, Ps256, Ps384, Ps512], DecodingKey::from_rsa_raw_components(&n, &e))
        }
        _ => return None,
    };
    if jwk.contains_key("alg") {
        let only = Algorithm::from_name(text("alg")?)?;
        algorithms.retain(|algorithm| *algorithm == only);
    }
    if algorithms.is_empty() { None } else { Some(Key { algorithms, decoding }) }
}

fn elliptic(x: &str, y: &str, coordinate_bytes: usize) -> Option<DecodingKey> {
    let (x, y) = (jws::decode(x).ok()?, jws::decode(y).ok()?);
    if x.len() != coordinate_bytes || y.len() != coordinate_bytes {
        return None;
    }
    let mut point = vec![4];
    point.extend_from_slice(&x);
    point.extend_from_slice(&y);
    Some(DecodingKey::from_ec_der(&point))
}

fn bits(big_endian: &[u8]) -> usize {
    let zeros = big_endian.iter().take_while(|byte| **byte == 0).count();
    match big_endian.get(zeros) {
        Some(first) => (big_endian.len() - zeros) * 8 - first.leading_zeros() as usize,
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
    const Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";

    fn ec(extra: Value) -> Value {
        let mut jwk = json!({"kty": "EC", "crv": "P-256", "x": X, "y": Y});
        jwk.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        jwk
    }

    fn parse(keys: Value) -> Result<KeySet, JwksError> {
        KeySet::parse(json!({ "keys": keys }).to_string().as_bytes())
    }

    #[test]
    fn gateway_2_keys_whose_type_does_not_fit_are_left_out() {
        assert!(parse(json!([ec(json!({}))])).is_ok());
        for bad in [
            json!({"kty": "oct", "k": "c2VjcmV0"}),
            json!({"kty": "EC", "crv": "secp256k1", "x": X, "y": Y}),
            json!({"kty": "EC", "crv": "P-384", "x": X, "y": Y}),
            json!({"kty": "EC", "x": X, "y": Y}),
            json!({"kty": "OKP", "crv": "Ed448", "x": X}),
            json!({"kty": "OKP", "crv": "X25519", "x": X}),
            ec(json!({"alg": "HS256"})),
            ec(json!({"alg": "RS256"})),
            ec(json!({"alg": "none"})),
            ec(json!({"alg": 7})),
        ] {
            assert!(matches!(parse(json!([bad])), Err(JwksError::NoneUsable)), "{bad}");
        }
        let set = parse(json!([ec(json!({}))])).unwrap();
        assert!(set.find(None).unwrap().fits(Algorithm::Es256));
        assert!(!set.find(None).unwrap().fits(Algorithm::Rs256));
    }

    #[test]
    fn gateway_3_use_and_key_ops_are_honoured() {
        for bad in [
            json!({"use": "enc"}),
            json!({"use": 1}),
            json!({"key_ops": ["sign"]}),
            json!({"key_ops": "verify"}),
        ] {
            assert!(parse(json!([ec(bad.clone())])).is_err(), "{bad}");
        }
        assert!(parse(json!([ec(json!({"use": "sig", "key_ops": ["verify"]}))])).is_ok());
    }

    #[test]
    fn gateway_6_kid_is_an_opaque_name_and_missing_only_where_there_is_no_choice() {
        let one = parse(json!([ec(json!({"kid": "../../etc/passwd"}))])).unwrap();
        assert!(one.find(Some("../../etc/passwd")).is_some());
        assert!(one.find(Some("etc/passwd")).is_none());
        assert!(one.find(None).is_some());
        let two = parse(json!([ec(json!({"kid": "a"})), ec(json!({"kid": "b"}))])).unwrap();
        assert!(two.find(None).is_none());
        let twice = parse(json!([ec(json!({"kid": "a"})), ec(json!({"kid": "a"})), ec(json!({"kid": "b"}))]))
            .unwrap();
        assert!(twice.find(Some("a")).is_none() && twice.find(Some("b")).is_some());
        assert!(parse(json!([ec(json!({"kid": "x".repeat(MAX_KID_BYTES + 1)}))])).is_err());
        assert!(parse(json!([ec(json!({"kid": ["a"]}))])).is_err());
    }

    #[test]
    fn gateway_9_the_number_of_keys_is_bounded() {
        let keys = |n: usize| (0..n).map(|n| ec(json!({"kid": n.to_string()}))).collect::<Value>();
        assert!(parse(keys(MAX_KEYS)).is_ok());
        assert!(matches!(parse(keys(MAX_KEYS + 1)), Err(JwksError::TooMany)));
        assert!(matches!(KeySet::parse(b"{}"), Err(JwksError::NoKeys)));
        assert!(matches!(KeySet::parse(br#"{"keys":[],"keys":[]}"#), Err(JwksError::Json(_))));
    }

    #[test]
    fn gateway_15_rsa_moduli_have_2048_to_8192_bits_and_okp_is_ed25519() {
        let rsa = |first: u8, bytes: usize| {
            let mut n = vec![0xff; bytes];
            n[0] = first;
            json!({"kty": "RSA", "n": jws::encode(n), "e": "AQAB"})
        };
        assert!(parse(json!([rsa(0x80, 256)])).is_ok());
        assert!(parse(json!([rsa(0xff, 1024)])).is_ok());
        assert!(parse(json!([rsa(0x7f, 256)])).is_err());
        assert!(parse(json!([rsa(0x80, 128)])).is_err());
        assert!(parse(json!([rsa(0x01, 1025)])).is_err());
        assert_eq!(bits(&[0, 0, 1]), 1);
        assert!(parse(json!([{"kty": "OKP", "crv": "Ed25519", "x": X}])).is_ok());
        assert!(parse(json!([{"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}])).is_err());
    }
}
