//! Compact JWS (RFC 7515 §7.1), parsed strictly before any key is looked at.
//!
//! [`Compact::parse`] is the one parser for everything that is a JWT here: user tokens at the gateway
//! and transaction tokens between sidecars. It decides nothing about signatures; whoever verifies
//! passes [`Compact::signing_input`] and [`Compact::signature`] to a primitive with a key that it chose.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::json;

/// Longest compact token looked at, before decoding.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// Longest decoded header of a token from outside the mesh.
pub const MAX_HEADER_BYTES: usize = 1024;
/// Longest decoded header of a token that carries its signer's certificate (`x5c`).
pub const MAX_X5C_HEADER_BYTES: usize = 4 * 1024;

/// Why a text is not a compact JWS that we would look at.
#[derive(Debug, Error)]
pub enum JwsError {
    /// Over [`MAX_TOKEN_BYTES`] or its header over the limit.
    #[error("token or header too large")]
    TooLarge,
    /// Not three non-empty base64url segments in canonical form.
    #[error("not three canonical base64url segments")]
    Form,
    /// Header or claims are not a JSON object with one meaning.
    #[error("header or claims are not strict JSON")]
    Json(#[source] json::JsonError),
    /// A header member that changes how the token must be read (`crit`, `b64`, `zip`, `enc`, nested `cty`).
    #[error("unsupported header member")]
    Unsupported,
    /// `alg` is missing or not a string.
    #[error("no algorithm")]
    NoAlgorithm,
    /// The signature does not fit the key.
    #[error("bad signature")]
    Signature,
    /// The key cannot sign.
    #[error("unusable signing key")]
    Key,
}

/// A compact JWS taken apart: nothing verified yet.
#[derive(Debug)]
pub struct Compact<'a> {
    /// The protected header.
    pub header: Map<String, Value>,
    /// The claims.
    pub claims: Map<String, Value>,
    /// `alg`, exactly as written.
    pub algorithm: String,
    /// `BASE64URL(header).BASE64URL(payload)`, the bytes that are signed.
    pub signing_input: &'a str,
    /// The decoded signature.
    pub signature: Vec<u8>,
}

impl<'a> Compact<'a> {
    /// Takes a token from outside the mesh apart.
    pub fn parse(token: &'a str) -> Result<Self, JwsError> {
        Self::parse_bounded(token, MAX_HEADER_BYTES)
    }

    /// Takes a token apart whose header may carry a certificate.
    pub fn parse_with_certificate(token: &'a str) -> Result<Self, JwsError> {
        Self::parse_bounded(token, MAX_X5C_HEADER_BYTES)
    }

    fn parse_bounded(token: &'a str, max_header_bytes: usize) -> Result<Self, JwsError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(JwsError::TooLarge);
        }
        let (signing_input, signature) = token.rsplit_once('.').ok_or(JwsError::Form)?;
        let (header, payload) = signing_input.split_once('.').ok_or(JwsError::Form)?;
        if header.is_empty() || payload.is_empty() || payload.contains('.') {
            return Err(JwsError::Form);
        }
        let header = decode(header)?;
        if header.len() > max_header_bytes {
            return Err(JwsError::TooLarge);
        }
        let header = json::parse_object(&header).map_err(JwsError::Json)?;
        let claims = json::parse_object(&decode(payload)?).map_err(JwsError::Json)?;
        refuse_special_members(&header)?;
        let algorithm = header.get("alg").and_then(Value::as_str).ok_or(JwsError::NoAlgorithm)?.to_owned();
        Ok(Self { header, claims, algorithm, signing_input, signature: decode(signature)? })
    }

    /// A header member that is a string.
    pub fn header_str(&self, name: &str) -> Option<&str> {
        self.header.get(name).and_then(Value::as_str)
    }

    /// Checks an ES256 signature (RFC 7518 §3.4: 64 raw bytes, never DER) against an uncompressed
    /// P-256 point.
    pub fn verify_es256(&self, public_key: &[u8]) -> Result<(), JwsError> {
        ring::signature::UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, public_key)
            .verify(self.signing_input.as_bytes(), &self.signature)
            .map_err(|_| JwsError::Signature)
    }
}

/// Members that would change what the token means, and that no verifier here understands.
fn refuse_special_members(header: &Map<String, Value>) -> Result<(), JwsError> {
    let special = ["crit", "b64", "zip", "enc"];
    if special.iter().any(|name| header.contains_key(*name)) {
        return Err(JwsError::Unsupported);
    }
    match header.get("cty").and_then(Value::as_str) {
        Some(cty) if cty.eq_ignore_ascii_case("JWT") => Err(JwsError::Unsupported),
        _ => Ok(()),
    }
}

/// base64url without padding, in its one canonical form.
pub fn decode(segment: &str) -> Result<Vec<u8>, JwsError> {
    URL_SAFE_NO_PAD.decode(segment).map_err(|_| JwsError::Form)
}

/// base64url without padding.
pub fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Signs header and claims with ES256 and returns the compact form.
///
/// `pkcs8` is a P-256 key as an SVID carries it.
pub fn sign_es256(header: &Value, claims: &Value, pkcs8: &[u8]) -> Result<String, JwsError> {
    let random = SystemRandom::new();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8, &random)
        .map_err(|_| JwsError::Key)?;
    let mut token = format!("{}.{}", encode(header.to_string()), encode(claims.to_string()));
    let signature = key.sign(&random, token.as_bytes()).map_err(|_| JwsError::Key)?;
    token.push('.');
    token.push_str(&encode(signature));
    Ok(token)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn token(header: &str, claims: &str) -> String {
        format!("{}.{}.{}", encode(header), encode(claims), encode("signature"))
    }

    #[test]
    fn gateway_3_critical_and_unencoded_payload_headers_are_refused() {
        for header in [
            r#"{"alg":"ES256","crit":["exp"]}"#,
            r#"{"alg":"ES256","b64":false}"#,
            r#"{"alg":"ES256","zip":"DEF"}"#,
        ] {
            assert!(matches!(Compact::parse(&token(header, "{}")), Err(JwsError::Unsupported)), "{header}");
        }
    }

    #[test]
    fn gateway_4_duplicate_header_names_and_claims_are_refused() {
        assert!(matches!(
            Compact::parse(&token(r#"{"alg":"ES256","alg":"none"}"#, "{}")),
            Err(JwsError::Json(_))
        ));
        assert!(matches!(
            Compact::parse(&token(r#"{"alg":"ES256"}"#, r#"{"sub":"a","sub":"b"}"#)),
            Err(JwsError::Json(_))
        ));
    }

    #[test]
    fn gateway_14_size_segments_nesting_and_canonical_base64() {
        let good = token(r#"{"alg":"ES256"}"#, r#"{"sub":"alice"}"#);
        assert!(Compact::parse(&good).is_ok());
        assert!(matches!(Compact::parse(&"a".repeat(MAX_TOKEN_BYTES + 1)), Err(JwsError::TooLarge)));
        let wide = format!(r#"{{"alg":"ES256","pad":"{}"}}"#, "x".repeat(MAX_HEADER_BYTES));
        assert!(matches!(Compact::parse(&token(&wide, "{}")), Err(JwsError::TooLarge)));
        for bad in
            [format!("{good}.x"), format!("{good}="), good.replace('.', ".."), "a.b".into(), "..".into()]
        {
            assert!(Compact::parse(&bad).is_err(), "{bad}");
        }
        // 'QQ' and 'QR' decode to the same byte in a lenient decoder; only the first is canonical.
        assert!(decode("QQ").is_ok());
        assert!(decode("QR").is_err());
        assert!(matches!(
            Compact::parse(&token(r#"{"alg":"ES256","cty":"jwt"}"#, "{}")),
            Err(JwsError::Unsupported)
        ));
    }

    #[test]
    fn what_is_signed_verifies_and_nothing_else_does() {
        let pkcs8 =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
        let key =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &SystemRandom::new())
                .unwrap();
        let public = ring::signature::KeyPair::public_key(&key).as_ref().to_vec();
        let signed = sign_es256(&json!({"alg":"ES256"}), &json!({"sub":"alice"}), pkcs8.as_ref()).unwrap();
        assert!(Compact::parse(&signed).unwrap().verify_es256(&public).is_ok());
        let forged = signed.replacen(&encode(r#"{"sub":"alice"}"#), &encode(r#"{"sub":"bobby"}"#), 1);
        assert_ne!(forged, signed);
        assert!(Compact::parse(&forged).unwrap().verify_es256(&public).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[A-Za-z0-9._=-]{0,80}") {
            let _outcome = Compact::parse(&text);
        }
    }
}
