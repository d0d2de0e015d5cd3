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
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
            .verify(info.raw, &request.signature_value.data)
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

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            prop_assert!(P256PublicKey::from_csr(&bytes).is_err());
        }

        #[test]
        fn no_single_changed_byte_is_accepted(at in 0usize..180, flip in 1u8..=255) {
            let mut csr = PendingKey::generate().unwrap().request().unwrap();
            let at = at % csr.len();
            csr[at] ^= flip;
            prop_assert!(P256PublicKey::from_csr(&csr).is_err());
        }
    }

    const RSA_CSR: &[u8] = include_bytes!("../tests/rsa2048.csr.der");
}
