//! rustls verifiers for X.509-SVIDs, both directions.
//!
//! Path building and signatures are webpki's; the rules it does not know are [`crate::leaf`]'s. A leaf is
//! verified with the bundle of its own trust domain only, whatever other bundles are at hand.

use std::io;
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
        .verify_for_usage(algorithms().all, &anchors, intermediates, now, KeyUsage::client_auth(), None, None)
        .map_err(VerifyError::Chain)?;
    Ok(leaf)
}

/// Verifies the server: it must be exactly one SPIFFE ID.
#[derive(Debug)]
pub struct ExpectServer {
    bundles: Bundles,
    expected: SpiffeId,
}

/// Whom a verifier trusts.
#[derive(Debug)]
enum Bundles {
    /// The authorities of the moment.
    Current(IdentitySource),
    /// Those that came with a join token, for a node that has no identity yet.
    Pinned(BundleSet),
}

impl ExpectServer {
    /// Accepts only `expected`, by the bundles of `source` at the moment of the handshake.
    pub fn new(source: IdentitySource, expected: SpiffeId) -> Arc<Self> {
        Arc::new(Self { bundles: Bundles::Current(source), expected })
    }

    /// Accepts only `expected`, by `bundles` and no others.
    pub fn pinned(bundles: BundleSet, expected: SpiffeId) -> Arc<Self> {
        Arc::new(Self { bundles: Bundles::Pinned(bundles), expected })
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
        let leaf = match &self.bundles {
            Bundles::Current(source) => verify_with(source, end_entity, intermediates, now)?,
            Bundles::Pinned(bundles) => {
                verify_chain(end_entity, intermediates, bundles, now).map_err(tls_error)?
            }
        };
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
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        signature_schemes()
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
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        signature_schemes()
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
        VerifyError::Chain(webpki::Error::UnknownIssuer) => CertificateError::UnknownIssuer,
        _ => CertificateError::Other(rustls::OtherError(Arc::new(error))),
    };
    rustls::Error::InvalidCertificate(certificate_error)
}

/// Why a handshake failed, in words for the operator: rustls shows what our verifiers say as code.
pub fn handshake_failure(error: &io::Error) -> String {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    let Some(rustls::Error::InvalidCertificate(refused)) = cause else { return error.to_string() };
    let why = match refused {
        CertificateError::Other(rustls::OtherError(cause)) => cause.to_string(),
        CertificateError::UnknownIssuer => "no authority of its trust domain vouches for it".to_owned(),
        CertificateError::Expired => "it, or an authority it came with, is outside its validity".to_owned(),
        CertificateError::NotValidYet => "it is not valid yet".to_owned(),
        other => other.to_string(),
    };
    format!("the peer's certificate is refused: {why}")
}

/// What every verifier answers to a signature of TLS 1.2, which no configuration of ours offers.
///
/// # Errors
/// Always.
pub fn refuse_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOfferedOrEnabled))
}

/// What every verifier does with the signature of a TLS 1.3 handshake (RFC 8446 §4.4.3).
///
/// # Errors
/// The signature is not the certificate's, or of a scheme outside [`signature_schemes`].
pub fn verify_tls13(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms())
}

/// The signature schemes that every verifier offers.
pub fn signature_schemes() -> Vec<SignatureScheme> {
    algorithms().supported_schemes()
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};

    use super::*;
    use crate::TrustBundle;
    use crate::clock::{Clock as _, SystemClock};
    use crate::testing::{TestAuthority, ago, ahead, offset, uri};

    fn verify(
        authority: &TestAuthority,
        change: impl FnOnce(&mut rcgen::CertificateParams),
    ) -> Result<Leaf, VerifyError> {
        let (der, _key) = authority.issue_with("/service/web", change);
        verify_chain(&der, &[], &BundleSet::new([authority.bundle()]), SystemClock.unix_time())
    }

    fn leaf_error(outcome: Result<Leaf, VerifyError>) -> LeafError {
        match outcome {
            Err(VerifyError::Leaf(error)) => error,
            other => panic!("expected a broken rule, got {other:?}"),
        }
    }

    #[test]
    fn a_good_leaf_verifies_and_says_who_it_is() {
        let leaf = verify(&TestAuthority::new("bank.example"), |_| {}).unwrap();
        assert_eq!(leaf.id.as_str(), "spiffe://bank.example/service/web");
    }

    #[test]
    fn identity_20_security_1_exactly_one_uri_name() {
        let authority = TestAuthority::new("bank.example");
        let two = verify(&authority, |params| params.subject_alt_names.push(uri("https://bank.example/x")));
        assert_eq!(leaf_error(two), LeafError::UriCount(2));
        let none = verify(&authority, |params| params.subject_alt_names.clear());
        assert_eq!(leaf_error(none), LeafError::UriCount(0));
        let with_dns = verify(&authority, |params| {
            params.subject_alt_names.push(rcgen::SanType::DnsName("localhost".try_into().unwrap()));
        });
        assert!(with_dns.is_ok());
    }

    #[test]
    fn identity_21_a_leaf_has_a_path() {
        let authority = TestAuthority::new("bank.example");
        let bare = verify(&authority, |params| params.subject_alt_names = vec![uri("spiffe://bank.example")]);
        assert_eq!(leaf_error(bare), LeafError::Id(crate::id::IdError::NoPath));
    }

    #[test]
    fn identity_22_23_security_4_constraints_and_usages_are_enforced() {
        type Change = Box<dyn FnOnce(&mut rcgen::CertificateParams)>;
        let authority = TestAuthority::new("bank.example");
        let cases: Vec<(Change, LeafError)> = vec![
            (Box::new(|p| p.is_ca = IsCa::NoCa), LeafError::LeafBasicConstraints),
            (
                Box::new(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
                LeafError::LeafBasicConstraints,
            ),
            (Box::new(|p| p.key_usages.clear()), LeafError::LeafKeyUsage),
            (Box::new(|p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement]), LeafError::LeafKeyUsage),
            (Box::new(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)), LeafError::LeafKeyUsage),
            (Box::new(|p| p.key_usages.push(KeyUsagePurpose::CrlSign)), LeafError::LeafKeyUsage),
            (
                Box::new(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
                LeafError::LeafExtendedKeyUsage,
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(leaf_error(verify(&authority, change)), expected);
        }
        assert!(verify(&authority, |params| params.extended_key_usages.clear()).is_ok());
    }

    #[test]
    fn identity_24_an_authority_is_never_a_peer() {
        let authority = TestAuthority::new("bank.example");
        let bundle = authority.bundle();
        let der = bundle.authorities()[0].clone();
        let outcome = verify_chain(&der, &[], &BundleSet::new([bundle]), SystemClock.unix_time());
        assert!(matches!(outcome, Err(VerifyError::Leaf(_))), "{outcome:?}");
    }

    #[test]
    fn identity_25_bundles_are_never_pooled() {
        let (ours, theirs) = (TestAuthority::new("bank.example"), TestAuthority::new("evil.example"));
        let set = BundleSet::new([ours.bundle(), theirs.bundle()]);
        // Signed by the authority of evil.example, claiming a name in bank.example.
        let (der, _key) = theirs.issue_with("/x", |params| {
            params.subject_alt_names = vec![uri("spiffe://bank.example/service/web")];
        });
        let outcome = verify_chain(&der, &[], &set, SystemClock.unix_time());
        assert!(matches!(outcome, Err(VerifyError::Chain(_))), "{outcome:?}");
        let only_ours = BundleSet::new([ours.bundle()]);
        let (der, _key) = theirs.issue_with("/service/web", |_| {});
        let outcome = verify_chain(&der, &[], &only_ours, SystemClock.unix_time());
        assert!(matches!(outcome, Err(VerifyError::UnknownTrustDomain(_))), "{outcome:?}");
    }

    #[test]
    fn security_5_expired_future_and_expired_root_are_refused() {
        let authority = TestAuthority::new("bank.example");
        let expired = verify(&authority, |params| params.not_after = offset(ago(10)));
        assert!(matches!(expired, Err(VerifyError::Chain(webpki::Error::CertExpired { .. }))), "{expired:?}");
        let future = verify(&authority, |params| params.not_before = offset(ahead(10)));
        assert!(
            matches!(future, Err(VerifyError::Chain(webpki::Error::CertNotValidYet { .. }))),
            "{future:?}"
        );
        let old_root = TestAuthority::valid_between("bank.example", ago(100), ago(10));
        assert!(matches!(verify(&old_root, |_| {}), Err(VerifyError::Chain(webpki::Error::UnknownIssuer))));
    }

    #[test]
    fn security_6_huge_certificates_and_long_chains_are_refused() {
        let authority = TestAuthority::new("bank.example");
        let fat = verify(&authority, |params| {
            params.custom_extensions =
                vec![CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![0; leaf::MAX_CERTIFICATE_BYTES])];
        });
        assert_eq!(leaf_error(fat), LeafError::TooLarge);
        let (der, _key) = authority.issue_with("/service/web", |_| {});
        let root = authority.bundle().authorities()[0].clone();
        let long = vec![root; MAX_INTERMEDIATES + 1];
        let outcome =
            verify_chain(&der, &long, &BundleSet::new([authority.bundle()]), SystemClock.unix_time());
        assert!(matches!(outcome, Err(VerifyError::TooLong)));
    }

    #[test]
    fn a_joining_node_trusts_control_by_the_pinned_bundle_only() {
        let (ours, theirs) = (TestAuthority::new("bank.example"), TestAuthority::new("bank.example"));
        let control = SpiffeId::new("spiffe://bank.example/palisade/control").unwrap();
        let pinned = ExpectServer::pinned(BundleSet::new([ours.bundle()]), control);
        let judge = |authority: &TestAuthority, path: &str| {
            let (der, _key) = authority.issue_with(path, |_| {});
            let (name, now) = (crate::tls::unnamed_server(), SystemClock.unix_time());
            pinned.verify_server_cert(&der, &[], &name, &[], now).map(|_| ())
        };
        assert!(judge(&ours, "/palisade/control").is_ok());
        assert!(judge(&theirs, "/palisade/control").is_err(), "another root");
        assert!(judge(&ours, "/service/web").is_err(), "a workload that listens where control should");
    }

    #[test]
    fn an_empty_bundle_trusts_nobody() {
        let authority = TestAuthority::new("bank.example");
        let (der, _key) = authority.issue_with("/service/web", |_| {});
        let empty = TrustBundle::new("bank.example".parse().unwrap(), vec![]).unwrap();
        assert!(verify_chain(&der, &[], &BundleSet::new([empty]), SystemClock.unix_time()).is_err());
    }
}
