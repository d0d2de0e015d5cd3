//! Certificate requests (PKCS#10, RFC 2986), read for one thing only: a public key whose private half
//! the sender holds.
//!
//! Names, extensions and lifetimes that a request asks for are never looked at: they come from the
//! registration. So a request cannot talk the authority into anything.

use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm,
};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls_pki_types::CertificateDer;
use thiserror::Error;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256};
use x509_parser::prelude::FromDer as _;
use zeroize::Zeroizing;

use identity::svid::{SvidError, X509Svid, split_der};

/// Largest request looked at. A P-256 request with no names is about 200 bytes; the rest is room for
/// other software's habits, not for chains or attributes that cost time to parse.
pub const MAX_CSR_BYTES: usize = 4 * 1024;

/// Length of an uncompressed P-256 point: 0x04, x, y.
const P256_POINT_BYTES: usize = 65;

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CsrError {
    /// Over [`MAX_CSR_BYTES`].
    #[error("the request is larger than {MAX_CSR_BYTES} bytes")]
    TooLarge,
    /// Not a PKCS#10 request, or bytes behind it.
    #[error("not a DER certificate request")]
    Der,
    /// A key other than P-256 in uncompressed form.
    #[error("only P-256 keys are signed")]
    KeyKind,
    /// Signed with something else than ECDSA with SHA-256.
    #[error("the request must be signed with ECDSA and SHA-256")]
    SignatureKind,
    /// The request is not signed by the key it carries.
    #[error("the request's signature does not verify")]
    Signature,
}

/// A P-256 public key whose holder has proved possession of the private one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct P256PublicKey([u8; P256_POINT_BYTES]);

impl P256PublicKey {
    /// Takes the public key out of a request, after checking the request's own signature over the very
    /// bytes that were parsed.
    ///
    /// # Errors
    /// [`CsrError`], by what is wrong first.
    pub fn from_csr(der: &[u8]) -> Result<Self, CsrError> {
        if der.len() > MAX_CSR_BYTES {
            return Err(CsrError::TooLarge);
        }
        let Ok(([], request)) = X509CertificationRequest::from_der(der) else {
            return Err(CsrError::Der);
        };
        let info = &request.certification_request_info;
        let key = &info.subject_pki;
        let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
        if key.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
            return Err(CsrError::KeyKind);
        }
        let point: [u8; P256_POINT_BYTES] =
            key.subject_public_key.data.as_ref().try_into().map_err(|_| CsrError::KeyKind)?;
        if point.first() != Some(&4) {
            return Err(CsrError::KeyKind);
        }
        if request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
            return Err(CsrError::SignatureKind);
        }
        // The wrapping of the signed part is covered by no signature, and the parser takes some of it
        // laxly. Only its one canonical form is accepted, so that a request has one encoding.
        let signature = request.signature_value.data.as_ref();
        if wrap(info.raw, signature).as_deref() != Some(der) {
            return Err(CsrError::Der);
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
            .verify(info.raw, signature)
            .map_err(|_| CsrError::Signature)?;
        Ok(Self(point))
    }

    /// Of a key pair of our own.
    pub(crate) fn of(pair: &KeyPair) -> Result<Self, CsrError> {
        pair.public_key_raw().try_into().map(Self).map_err(|_| CsrError::KeyKind)
    }
}

impl PublicKeyData for P256PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// DER of a request (RFC 2986 §4.2) around its signed part, for ECDSA with SHA-256 (RFC 5758 §3.2).
fn wrap(info: &[u8], signature: &[u8]) -> Option<Vec<u8>> {
    const ECDSA_WITH_SHA256: [u8; 12] =
        [0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    const NO_UNUSED_BITS: [u8; 1] = [0];
    let bits = element(0x03, &[&NO_UNUSED_BITS, signature])?;
    element(0x30, &[info, &ECDSA_WITH_SHA256, &bits])
}

/// A DER element (X.690 §8.1, §10.1) of up to 65,535 bytes of contents.
fn element(tag: u8, parts: &[&[u8]]) -> Option<Vec<u8>> {
    let contents = parts.concat();
    let length = u16::try_from(contents.len()).ok()?;
    let [high, low] = length.to_be_bytes();
    let header = match length {
        0..=0x7f => vec![tag, low],
        0x80..=0xff => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    Some([header, contents].concat())
}

/// A fresh P-256 key that waits for its certificate.
pub(crate) struct PendingKey {
    pair: KeyPair,
}

impl PendingKey {
    /// Makes a key.
    pub(crate) fn generate() -> Result<Self, rcgen::Error> {
        Ok(Self { pair: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)? })
    }

    /// The request to send: the public key and the proof of possession, no names.
    pub(crate) fn request(&self) -> Result<Vec<u8>, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&self.pair)?.der().to_vec())
    }

    /// The public half.
    pub(crate) fn public(&self) -> Result<P256PublicKey, CsrError> {
        P256PublicKey::of(&self.pair)
    }

    /// Joins the key with the chain (concatenated DER) that was issued for it.
    pub(crate) fn with_chain(self, chain: &[u8]) -> Result<X509Svid, SvidError> {
        self.with_certificates(split_der(chain).ok_or(SvidError::Der)?)
    }

    /// Joins the key with the chain that was issued for it.
    pub(crate) fn with_certificates(
        self,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<X509Svid, SvidError> {
        X509Svid::new(chain, Zeroizing::new(self.pair.serialize_der()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{PKCS_ECDSA_P384_SHA384, PKCS_ED25519};

    use super::*;

    fn csr_of(algorithm: &'static SignatureAlgorithm) -> Vec<u8> {
        let pair = KeyPair::generate_for(algorithm).unwrap();
        CertificateParams::default().serialize_request(&pair).unwrap().der().to_vec()
    }

    #[test]
    fn identity_41_a_request_gives_its_public_key_and_nothing_else() {
        let key = PendingKey::generate().unwrap();
        let taken = P256PublicKey::from_csr(&key.request().unwrap()).unwrap();
        assert_eq!(taken, key.public().unwrap());
    }

    #[test]
    fn identity_41_a_bad_signature_is_refused() {
        let mut csr = PendingKey::generate().unwrap().request().unwrap();
        let last = csr.len() - 1;
        csr[last] ^= 1;
        assert_eq!(P256PublicKey::from_csr(&csr), Err(CsrError::Signature));
    }

    #[test]
    fn security_11_bytes_changed_after_signing_are_refused() {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let params = CertificateParams::new(vec!["aaaa.example".to_owned()]).unwrap();
        let csr = params.serialize_request(&pair).unwrap().der().to_vec();
        assert!(P256PublicKey::from_csr(&csr).is_ok());
        let at = csr.windows(4).position(|window| window == b"aaaa").unwrap();
        let mut changed = csr.clone();
        changed[at] = b'b';
        assert_eq!(P256PublicKey::from_csr(&changed), Err(CsrError::Signature));
    }

    #[test]
    fn keys_other_than_p256_are_refused() {
        for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            assert_eq!(P256PublicKey::from_csr(&csr_of(algorithm)), Err(CsrError::KeyKind));
        }
        // An RSA-2048 request made with openssl; the project itself has no RSA key generation.
        assert_eq!(P256PublicKey::from_csr(RSA_CSR), Err(CsrError::KeyKind));
    }

    #[test]
    fn size_and_trailing_bytes_are_bounded() {
        let mut csr = PendingKey::generate().unwrap().request().unwrap();
        csr.push(0);
        assert_eq!(P256PublicKey::from_csr(&csr), Err(CsrError::Der));
        assert_eq!(P256PublicKey::from_csr(&vec![0; MAX_CSR_BYTES + 1]), Err(CsrError::TooLarge));
    }

    #[test]
    fn no_single_changed_bit_is_accepted() {
        let csr = PendingKey::generate().unwrap().request().unwrap();
        for at in 0..csr.len() {
            for bit in 0..8 {
                let mut changed = csr.clone();
                changed[at] ^= 1 << bit;
                assert!(P256PublicKey::from_csr(&changed).is_err(), "byte {at}, bit {bit} of {csr:02x?}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            prop_assert!(P256PublicKey::from_csr(&bytes).is_err());
        }
    }

    const RSA_CSR: &[u8] = include_bytes!("../tests/rsa2048.csr.der");
}
