//! X.509-SVIDs: a workload's certificate chain and the key that goes with it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::id::SpiffeId;
use crate::leaf::{self, Leaf, LeafError};

/// Why a chain and key do not make an SVID.
#[derive(Debug, Error)]
pub enum SvidError {
    /// The chain is empty.
    #[error("the certificate chain is empty")]
    Empty,
    /// The leaf breaks a rule of the X509-SVID standard.
    #[error("the leaf is not an X.509-SVID")]
    Leaf(#[source] LeafError),
    /// The key is not one rustls can sign with, or is not the leaf's.
    #[error("the private key does not fit the certificate")]
    Key(#[source] rustls::Error),
    /// The concatenated DER could not be taken apart.
    #[error("the certificate chain is not concatenated DER")]
    Der,
}

/// A workload's identity document and its private key.
#[derive(Clone)]
pub struct X509Svid {
    leaf: Leaf,
    key: Arc<Zeroizing<Vec<u8>>>,
    certified: Arc<CertifiedKey>,
}

impl X509Svid {
    /// Checks that `chain` (leaf first) and `pkcs8` (unencrypted DER) belong together and keep the
    /// standard's rules. The chain is *not* verified against a bundle: one's own SVID is believed.
    pub fn new(chain: Vec<CertificateDer<'static>>, pkcs8: Zeroizing<Vec<u8>>) -> Result<Self, SvidError> {
        let leaf = leaf::parse(chain.first().ok_or(SvidError::Empty)?).map_err(SvidError::Leaf)?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8.as_slice()));
        let signer =
            rustls::crypto::aws_lc_rs::sign::any_supported_type(&der.clone_key()).map_err(SvidError::Key)?;
        let certified = CertifiedKey::new(chain, signer);
        certified.keys_match().map_err(SvidError::Key)?;
        Ok(Self { leaf, key: Arc::new(pkcs8), certified: Arc::new(certified) })
    }

    /// From the Workload API's form: concatenated DER and a PKCS#8 key.
    pub fn from_concatenated(chain: &[u8], pkcs8: Zeroizing<Vec<u8>>) -> Result<Self, SvidError> {
        Self::new(split_der(chain).ok_or(SvidError::Der)?, pkcs8)
    }

    /// Whose identity this is.
    pub fn id(&self) -> &SpiffeId {
        &self.leaf.id
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The leaf alone, DER.
    pub fn leaf_der(&self) -> &[u8] {
        self.certified.cert.first().map(AsRef::as_ref).unwrap_or_default()
    }

    /// The private key, PKCS#8 DER.
    pub fn key_pkcs8(&self) -> &[u8] {
        &self.key
    }

    /// Start of validity, since the Unix epoch.
    pub fn not_before(&self) -> Duration {
        self.leaf.not_before
    }

    /// End of validity, since the Unix epoch.
    pub fn not_after(&self) -> Duration {
        self.leaf.not_after
    }

    /// Serial number in lower-case hexadecimal.
    pub fn serial(&self) -> &str {
        &self.leaf.serial
    }

    /// Chain and signing key as rustls takes them.
    pub fn certified_key(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

impl fmt::Debug for X509Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("X509Svid")
            .field("id", self.id())
            .field("serial", &self.leaf.serial)
            .finish_non_exhaustive()
    }
}

/// Splits concatenated DER certificates. `None` if the bytes are not a whole number of them.
pub fn split_der(mut bytes: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let mut certificates = Vec::new();
    while !bytes.is_empty() {
        let length = der_element_length(bytes)?;
        let (certificate, rest) = bytes.split_at_checked(length)?;
        certificates.push(CertificateDer::from(certificate.to_vec()));
        bytes = rest;
    }
    Some(certificates)
}

/// Length of the DER SEQUENCE at the start of `bytes`, header included.
fn der_element_length(bytes: &[u8]) -> Option<usize> {
    if *bytes.first()? != 0x30 {
        return None;
    }
    let short = usize::from(*bytes.get(1)?);
    if short < 0x80 {
        return Some(2 + short);
    }
    let octets = short & 0x7f;
    // A certificate of 16 MiB or more is no certificate of ours.
    if octets == 0 || octets > 3 {
        return None;
    }
    let length = bytes.get(2..2 + octets)?.iter().fold(0usize, |n, octet| (n << 8) | usize::from(*octet));
    Some(2 + octets + length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn concatenated_der_splits_at_its_own_lengths() {
        let one = [0x30, 1, 9];
        let long = [&[0x30, 0x81, 200][..], &[7; 200]].concat();
        let both = [&one[..], &long].concat();
        assert_eq!(split_der(&both).unwrap().len(), 2);
        assert!(split_der(&both[..both.len() - 1]).is_none());
        assert!(split_der(&[0x31, 0]).is_none());
        assert!(split_der(&[0x30, 0x80]).is_none());
        assert!(split_der(&[]).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_splitter_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _outcome = split_der(&bytes);
        }
    }
}
