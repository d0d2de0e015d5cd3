//! Trust bundles: the authorities that may vouch for a trust domain's workloads.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustls_pki_types::{CertificateDer, TrustAnchor};
use thiserror::Error;

use crate::id::TrustDomain;
use crate::svid::split_der;

/// Most authorities a bundle may hold: rotation needs two or three; more only cost verifiers time.
pub const MAX_AUTHORITIES: usize = 16;

/// Why bytes are not a trust bundle.
#[derive(Debug, Error)]
pub enum BundleError {
    /// Not concatenated DER.
    #[error("not concatenated DER certificates")]
    Der,
    /// More than [`MAX_AUTHORITIES`].
    #[error("more than {MAX_AUTHORITIES} authorities")]
    TooMany,
    /// A certificate cannot serve as a trust anchor.
    #[error("a certificate cannot serve as a trust anchor")]
    Anchor(#[source] webpki::Error),
}

/// The X.509 authorities of one trust domain. An empty bundle trusts nobody.
#[derive(Debug, Clone)]
pub struct TrustBundle {
    trust_domain: TrustDomain,
    authorities: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
}

impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        // All else is made of these.
        (&self.trust_domain, &self.authorities) == (&other.trust_domain, &other.authorities)
    }
}

impl Eq for TrustBundle {}

impl TrustBundle {
    /// A bundle of these authorities.
    pub fn new(
        trust_domain: TrustDomain,
        authorities: Vec<CertificateDer<'static>>,
    ) -> Result<Self, BundleError> {
        if authorities.len() > MAX_AUTHORITIES {
            return Err(BundleError::TooMany);
        }
        let anchors = authorities
            .iter()
            .map(|der| webpki::anchor_from_trusted_cert(der).map(|anchor| anchor.to_owned()))
            .collect::<Result<_, _>>()
            .map_err(BundleError::Anchor)?;
        Ok(Self { trust_domain, authorities, anchors })
    }

    /// From the Workload API's form: concatenated DER.
    pub fn from_concatenated(trust_domain: TrustDomain, der: &[u8]) -> Result<Self, BundleError> {
        Self::new(trust_domain, split_der(der).ok_or(BundleError::Der)?)
    }

    /// Whose authorities these are.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The authorities, DER.
    pub fn authorities(&self) -> &[CertificateDer<'static>] {
        &self.authorities
    }

    /// The authorities as webpki takes them.
    pub fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    /// The authorities in the Workload API's form.
    pub fn concatenated(&self) -> Vec<u8> {
        self.authorities.iter().flat_map(|der| der.iter().copied()).collect()
    }

    /// The authorities as PEM, for tools that want a CA file.
    pub fn pem(&self) -> String {
        use base64::Engine as _;
        let mut text = String::new();
        for der in &self.authorities {
            text.push_str("-----BEGIN CERTIFICATE-----\n");
            let body = base64::engine::general_purpose::STANDARD.encode(der);
            for line in body.as_bytes().chunks(64) {
                text.push_str(&String::from_utf8_lossy(line));
                text.push('\n');
            }
            text.push_str("-----END CERTIFICATE-----\n");
        }
        text
    }
}

/// One bundle a trust domain, never pooled: a leaf is verified with its own domain's bundle only
/// (SPIFFE Federation §7.3).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BundleSet(BTreeMap<TrustDomain, Arc<TrustBundle>>);

impl BundleSet {
    /// A set of these bundles; a later one of the same trust domain replaces an earlier.
    pub fn new(bundles: impl IntoIterator<Item = TrustBundle>) -> Self {
        Self(bundles.into_iter().map(|bundle| (bundle.trust_domain.clone(), Arc::new(bundle))).collect())
    }

    /// The bundle of one trust domain.
    pub fn get(&self, trust_domain: &TrustDomain) -> Option<&Arc<TrustBundle>> {
        self.0.get(trust_domain)
    }

    /// All bundles, by trust domain.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<TrustBundle>> {
        self.0.values()
    }
}
