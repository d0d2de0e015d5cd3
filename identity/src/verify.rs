//! rustls verifiers for X.509-SVIDs, both directions.
//!
//! Path building and signatures are webpki's; the rules it does not know are [`crate::leaf`]'s. A leaf is
//! verified with the bundle of its own trust domain only, whatever other bundles are at hand.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use thiserror::Error;
use webpki::{EndEntityCert, KeyUsage};

use crate::bundle::BundleSet;
use crate::id::{SpiffeId, TrustDomain};
use crate::leaf::{self, Leaf, LeafError};
use crate::source::IdentitySource;

/// Most intermediates a peer may send.
pub const MAX_INTERMEDIATES: usize = 4;

/// Why a certificate chain does not prove an identity.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// The leaf or an issuer breaks a rule of the X509-SVID standard.
    #[error("{0}")]
    Leaf(#[from] LeafError),
    /// We hold no bundle for the leaf's trust domain.
    #[error("no trust bundle for the trust domain {0}")]
    UnknownTrustDomain(TrustDomain),
    /// More than [`MAX_INTERMEDIATES`].
    #[error("more than {MAX_INTERMEDIATES} intermediates")]
    TooLong,
    /// No path to an authority, or expired, or a bad signature.
    #[error("the chain does not verify: {0}")]
    Chain(webpki::Error),
    /// A valid identity, but not the one that was expected.
    #[error("expected {expected}, the peer is {found}")]
    WrongPeer {
        /// Whom we called.
        expected: SpiffeId,
        /// Who answered.
        found: SpiffeId,
    },
    /// We have no identity ourselves yet, so no bundles.
    #[error("no trust bundle has arrived yet")]
    NotReady,
}

/// Verifies a chain (leaf and intermediates) at `now` and returns what the leaf says.
pub fn verify_chain(
    leaf_der: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundles: &BundleSet,
    now: UnixTime,
) -> Result<Leaf, VerifyError> {
    let leaf = leaf::parse(leaf_der)?;
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(VerifyError::TooLong);
    }
    let trust_domain = leaf.id.trust_domain();
    let bundle =
        bundles.get(trust_domain).ok_or_else(|| VerifyError::UnknownTrustDomain(trust_domain.clone()))?;
    let now_since_epoch = Duration::from_secs(now.as_secs());
    for intermediate in intermediates {
        leaf::check_authority(intermediate, trust_domain, now_since_epoch)?;
    }
    let end_entity = EndEntityCert::try_from(leaf_der).map_err(VerifyError::Chain)?;
    // An authority outside its validity vouches for nobody, though webpki would let its anchor do so.
    let anchors: Vec<_> = bundle
        .authorities()
        .iter()
        .zip(bundle.anchors())
        .filter(|(der, _)| leaf::check_authority(der, trust_domain, now_since_epoch).is_ok())
        .map(|(_, anchor)| anchor.clone())
        .collect();
    end_entity
        .verify_for_usage(
            algorithms().all,
            &anchors,
            intermediates,
            now,
            KeyUsage::client_auth(),
            None,
            None,
        )
        .map_err(VerifyError::Chain)?;
    Ok(leaf)
}

/// Verifies the server: it must be exactly one SPIFFE ID.
#[derive(Debug)]
pub struct ExpectServer {
    source: IdentitySource,
    expected: SpiffeId,
}

impl ExpectServer {
    /// Accepts only `expected`, by the bundles of `source` at the moment of the handshake.
    pub fn new(source: IdentitySource, expected: SpiffeId) -> Arc<Self> {
        Arc::new(Self { source, expected })
    }
}

impl ServerCertVerifier for ExpectServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let leaf = verify_with(&self.source, end_entity, intermediates, now)?;
        if leaf.id != self.expected {
            let expected = self.expected.clone();
            return Err(tls_error(VerifyError::WrongPeer { expected, found: leaf.id }));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOfferedOrEnabled))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// Verifies clients: any workload whose trust domain we hold a bundle of. *What* it may do is policy's
/// business, decided a request.
#[derive(Debug)]
pub struct AnyWorkload {
    source: IdentitySource,
    mandatory: bool,
}

impl AnyWorkload {
    /// A client must present an SVID.
    pub fn required(source: IdentitySource) -> Arc<Self> {
        Arc::new(Self { source, mandatory: true })
    }

    /// A client may come without a certificate; if it presents one, it must verify.
    pub fn optional(source: IdentitySource) -> Arc<Self> {
        Arc::new(Self { source, mandatory: false })
    }
}

impl ClientCertVerifier for AnyWorkload {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        verify_with(&self.source, end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOfferedOrEnabled))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

fn verify_with(
    source: &IdentitySource,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<Leaf, rustls::Error> {
    let identity = source.current().ok_or_else(|| tls_error(VerifyError::NotReady))?;
    verify_chain(end_entity, intermediates, &identity.bundles, now).map_err(tls_error)
}

/// Keeps the standard alerts for the standard cases and carries the rest as a readable cause.
fn tls_error(error: VerifyError) -> rustls::Error {
    let certificate_error = match &error {
        VerifyError::Chain(webpki::Error::CertExpired { .. }) | VerifyError::Leaf(LeafError::Validity) => {
            CertificateError::Expired
        }
        VerifyError::Chain(webpki::Error::CertNotValidYet { .. }) => CertificateError::NotValidYet,
        VerifyError::Chain(webpki::Error::UnknownIssuer) | VerifyError::UnknownTrustDomain(_) => {
            CertificateError::UnknownIssuer
        }
        _ => CertificateError::Other(rustls::OtherError(Arc::new(error))),
    };
    rustls::Error::InvalidCertificate(certificate_error)
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
}
