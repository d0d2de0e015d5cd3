//! The rules that a certificate must keep to be an X.509-SVID (X509-SVID standard §2–§4).
//!
//! rustls-webpki builds and verifies the chain; it ignores KeyUsage, accepts a missing BasicConstraints
//! and knows nothing of SPIFFE. What it leaves out is checked here, on the same bytes.

use std::time::Duration;

use rustls_pki_types::CertificateDer;
use thiserror::Error;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::hex;
use crate::id::{IdError, SpiffeId, TrustDomain};

/// Largest certificate looked at.
pub const MAX_CERTIFICATE_BYTES: usize = 16 * 1024;

/// Which rule a certificate breaks.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LeafError {
    /// Not a DER certificate, or bytes behind it.
    #[error("not a DER certificate")]
    Der,
    /// Over [`MAX_CERTIFICATE_BYTES`].
    #[error("larger than {MAX_CERTIFICATE_BYTES} bytes")]
    TooLarge,
    /// An extension appears twice or cannot be parsed.
    #[error("an extension appears twice or cannot be parsed")]
    Extension,
    /// Not exactly one URI in the subject alternative name (X509-SVID §2).
    #[error("{0} URI names where exactly one is needed")]
    UriCount(usize),
    /// The URI is not a SPIFFE ID.
    #[error("the URI name is not a SPIFFE ID: {0}")]
    Id(IdError),
    /// The subject is empty but the subject alternative name is not critical (RFC 5280 §4.2.1.6).
    #[error("the subject is empty and the alternative name is not critical")]
    SanNotCritical,
    /// BasicConstraints missing or cA set on a leaf (X509-SVID §4.1).
    #[error("a leaf needs BasicConstraints with cA = false")]
    LeafBasicConstraints,
    /// KeyUsage missing, not critical, without digitalSignature, or with keyCertSign or cRLSign (§4.3).
    #[error("a leaf needs a critical KeyUsage with digitalSignature and without keyCertSign or cRLSign")]
    LeafKeyUsage,
    /// ExtendedKeyUsage present but without both serverAuth and clientAuth (§4.4).
    #[error("ExtendedKeyUsage needs both serverAuth and clientAuth")]
    LeafExtendedKeyUsage,
    /// An issuer without cA = true.
    #[error("an authority needs BasicConstraints with cA = true")]
    AuthorityBasicConstraints,
    /// An issuer without keyCertSign.
    #[error("an authority needs a critical KeyUsage with keyCertSign")]
    AuthorityKeyUsage,
    /// An issuer whose URI name, if it has one, is not its trust domain's ID.
    #[error("an authority's URI name must be its trust domain's ID")]
    AuthorityId,
    /// Outside its own validity.
    #[error("expired or not yet valid")]
    Validity,
    /// RSA under 2,048 or over 4,096 bits, or a key of an unknown kind.
    #[error("unsupported or weak public key")]
    WeakKey,
}

/// What a leaf says, once it keeps the rules.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// Whose certificate it is.
    pub id: SpiffeId,
    /// Serial number in lower-case hexadecimal.
    pub serial: String,
    /// Start of validity, since the Unix epoch.
    pub not_before: Duration,
    /// End of validity, since the Unix epoch.
    pub not_after: Duration,
    /// The subject public key's bits (for P-256 the uncompressed point).
    pub public_key: Vec<u8>,
}

/// Parses a leaf and holds it against every rule. Says nothing about who signed it, or when.
pub fn parse(der: &CertificateDer<'_>) -> Result<Leaf, LeafError> {
    let certificate = parse_der(der)?;
    let id = single_uri(&certificate)?;
    check_leaf_constraints(&certificate)?;
    check_key(&certificate)?;
    Ok(Leaf {
        id,
        serial: hex::encode(certificate.raw_serial()),
        not_before: since_epoch(certificate.validity().not_before.timestamp()),
        not_after: since_epoch(certificate.validity().not_after.timestamp()),
        public_key: certificate.public_key().subject_public_key.data.to_vec(),
    })
}

/// Holds an authority (intermediate or root) against the rules for issuers, validity included: webpki
/// does not look at a trust anchor's own expiry.
pub fn check_authority(
    der: &CertificateDer<'_>,
    trust_domain: &TrustDomain,
    now: Duration,
) -> Result<(), LeafError> {
    let certificate = parse_der(der)?;
    let constraints = certificate.basic_constraints().map_err(|_| LeafError::Extension)?;
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(LeafError::AuthorityBasicConstraints);
    }
    let usage = certificate.key_usage().map_err(|_| LeafError::Extension)?;
    if !usage.is_some_and(|usage| usage.critical && usage.value.key_cert_sign()) {
        return Err(LeafError::AuthorityKeyUsage);
    }
    match uris(&certificate)?.as_slice() {
        [] => {}
        [one] if *one == trust_domain.id_string() => {}
        _ => return Err(LeafError::AuthorityId),
    }
    let validity = certificate.validity();
    if now < since_epoch(validity.not_before.timestamp()) || now > since_epoch(validity.not_after.timestamp())
    {
        return Err(LeafError::Validity);
    }
    check_key(&certificate)
}

pub(crate) fn parse_der<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, LeafError> {
    if der.len() > MAX_CERTIFICATE_BYTES {
        return Err(LeafError::TooLarge);
    }
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(LeafError::Der),
    }
}

fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, LeafError> {
    let names = certificate.subject_alternative_name().map_err(|_| LeafError::Extension)?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    Ok(names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect())
}

fn single_uri(certificate: &X509Certificate<'_>) -> Result<SpiffeId, LeafError> {
    let id = match uris(certificate)?.as_slice() {
        [one] => SpiffeId::new(one).map_err(LeafError::Id)?,
        several => return Err(LeafError::UriCount(several.len())),
    };
    let critical = certificate
        .subject_alternative_name()
        .map_err(|_| LeafError::Extension)?
        .is_some_and(|names| names.critical);
    if certificate.subject().iter_rdn().next().is_none() && !critical {
        return Err(LeafError::SanNotCritical);
    }
    Ok(id)
}

fn check_leaf_constraints(certificate: &X509Certificate<'_>) -> Result<(), LeafError> {
    let constraints = certificate.basic_constraints().map_err(|_| LeafError::Extension)?;
    if constraints.is_none_or(|constraints| constraints.value.ca) {
        return Err(LeafError::LeafBasicConstraints);
    }
    let usage = certificate.key_usage().map_err(|_| LeafError::Extension)?;
    let usage_fits = usage.is_some_and(|usage| {
        usage.critical
            && usage.value.digital_signature()
            && !usage.value.key_cert_sign()
            && !usage.value.crl_sign()
    });
    if !usage_fits {
        return Err(LeafError::LeafKeyUsage);
    }
    let extended = certificate.extended_key_usage().map_err(|_| LeafError::Extension)?;
    if extended.is_some_and(|extended| !extended.value.server_auth || !extended.value.client_auth) {
        return Err(LeafError::LeafExtendedKeyUsage);
    }
    Ok(())
}

fn check_key(certificate: &X509Certificate<'_>) -> Result<(), LeafError> {
    use x509_parser::public_key::PublicKey;
    match certificate.public_key().parsed() {
        Ok(PublicKey::RSA(rsa)) if (2048..=4096).contains(&rsa.key_size()) => Ok(()),
        Ok(PublicKey::EC(point)) if (256..=384).contains(&point.key_size()) => Ok(()),
        _ => Err(LeafError::WeakKey),
    }
}

pub(crate) fn since_epoch(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
