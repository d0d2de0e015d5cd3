//! Certificates for tests: a small authority that makes good SVIDs, and bad ones on demand.
#![expect(clippy::unwrap_used, reason = "only compiled for tests")]

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use zeroize::Zeroizing;

use crate::bundle::{BundleSet, TrustBundle};
use crate::clock::{Clock as _, SystemClock};
use crate::id::TrustDomain;
use crate::source::IdentitySource;
use crate::svid::X509Svid;

/// Says why a test checks nothing here, past libtest's capture of output, so that it is read.
///
/// # Panics
/// Where `PALISADE_TESTS_MUST_NOT_SKIP` is set: there, everything a test needs was to be installed.
#[expect(clippy::panic, reason = "only compiled for tests")]
pub fn skip(why: &str) {
    use std::io::Write as _;
    let _closed = writeln!(std::io::stderr(), "skipped: {why}").is_err();
    if std::env::var_os("PALISADE_TESTS_MUST_NOT_SKIP").is_some() {
        panic!("a test may not skip here: {why}");
    }
}

/// An authority of one trust domain, valid for an hour around now.
#[derive(Debug)]
pub struct TestAuthority {
    trust_domain: TrustDomain,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl TestAuthority {
    /// A fresh authority for `trust_domain`.
    pub fn new(trust_domain: &str) -> Self {
        Self::valid_between(trust_domain, ago(3600), ahead(3600))
    }

    /// A fresh authority with this validity.
    pub fn valid_between(trust_domain: &str, not_before: Duration, not_after: Duration) -> Self {
        let trust_domain = TrustDomain::new(trust_domain).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "test authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&trust_domain.id_string())];
        params.not_before = offset(not_before);
        params.not_after = offset(not_after);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        Self { trust_domain, issuer: CertifiedIssuer::self_signed(params, key).unwrap() }
    }

    /// The bundle that trusts this authority.
    pub fn bundle(&self) -> TrustBundle {
        TrustBundle::new(self.trust_domain.clone(), vec![self.issuer.der().clone()]).unwrap()
    }

    /// A good SVID at `path`, valid for half an hour.
    pub fn issue(&self, path: &str) -> X509Svid {
        let (chain, key) = self.issue_with(path, |_| {});
        X509Svid::new(vec![chain], key).unwrap()
    }

    /// A leaf at `path`, changed as the test wishes before it is signed.
    pub fn issue_with(
        &self,
        path: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (rustls_pki_types::CertificateDer<'static>, Zeroizing<Vec<u8>>) {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "test workload");
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![uri(&format!("{}{path}", self.trust_domain.id_string()))];
        params.not_before = offset(ago(60));
        params.not_after = offset(ahead(1800));
        change(&mut params);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), Zeroizing::new(key.serialize_der()))
    }

    /// A source that always gives a good SVID at `path` and this authority's bundle.
    pub fn source(&self, path: &str) -> IdentitySource {
        IdentitySource::fixed(self.issue(path), BundleSet::new([self.bundle()]))
    }
}

/// A URI name.
pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// A moment before now, since the Unix epoch.
pub fn ago(seconds: u64) -> Duration {
    SystemClock.now() - Duration::from_secs(seconds)
}

/// A moment after now, since the Unix epoch.
pub fn ahead(seconds: u64) -> Duration {
    SystemClock.now() + Duration::from_secs(seconds)
}

/// A moment as rcgen takes it.
pub fn offset(since_epoch: Duration) -> time::OffsetDateTime {
    rcgen::date_time_ymd(1970, 1, 1) + since_epoch
}
