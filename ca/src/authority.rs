//! The signing authority of a trust domain: one self-signed P-256 root that issues leaves.
//!
//! Every leaf keeps the rules of the X509-SVID standard (§2–§4), and what was just signed is parsed
//! again by [`identity::leaf`] before it leaves: a certificate that our own verifiers would refuse is
//! never handed out.

use std::net::IpAddr;
use std::time::Duration;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use thiserror::Error;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use identity::bundle::{BundleError, TrustBundle};
use identity::leaf::{self, LeafError};
use identity::{SpiffeId, TrustDomain};

use crate::csr::P256PublicKey;
use crate::hex;
use crate::random::{Random, RandomError};

/// How far before its making a certificate's validity starts: hosts' clocks differ a little, and a leaf
/// that is "not yet valid" at its first use would fail a call for nothing.
pub const BACKDATE_SECONDS: u64 = 30;

/// Lifetime of a new root when nothing else is configured: long enough that no first installation has
/// to rotate it, short enough that it is not forgotten.
pub const DEFAULT_ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Most DNS names and addresses together in one leaf, so that it stays far below 16 KiB.
pub const MAX_NAMES: usize = 32;

/// Length of a serial number; 16 bytes are unguessable and within RFC 5280's 20.
const SERIAL_BYTES: usize = 16;

/// Why a root could not be made or used.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// The certificate library refused.
    #[error("the root certificate could not be made")]
    Certificate(#[source] rcgen::Error),
    /// The stored key is not usable.
    #[error("the root key is unusable")]
    Key(#[source] rcgen::Error),
    /// The stored key is not the stored certificate's.
    #[error("the root key and the root certificate do not belong together")]
    Mismatch,
    /// The certificate breaks a rule for authorities.
    #[error("the root certificate breaks a rule for authorities")]
    Rules(#[source] LeafError),
    /// The certificate cannot be a trust anchor.
    #[error("the root certificate cannot be a trust anchor")]
    Bundle(#[source] BundleError),
    /// No randomness, no serial.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// A date outside what X.509 can say.
    #[error("a date outside the range of X.509")]
    Date,
}

/// Why a leaf was not issued.
#[derive(Debug, Error)]
pub enum IssueError {
    /// The ID is of another trust domain.
    #[error("{0} is not in this authority's trust domain")]
    TrustDomain(SpiffeId),
    /// The root has ended, or the clock stands before its start.
    #[error("the authority's certificate is not valid now")]
    AuthorityNotValid,
    /// A lifetime of less than a second.
    #[error("a lifetime of less than a second")]
    Lifetime,
    /// A DNS name that is not one, or too many names.
    #[error("a DNS name is malformed or there are more than {MAX_NAMES} names")]
    Names,
    /// The certificate library refused.
    #[error("the certificate could not be made")]
    Certificate(#[source] rcgen::Error),
    /// What was made breaks the standard, so it was thrown away.
    #[error("the certificate would break a rule of the X509-SVID standard")]
    Rules(#[source] LeafError),
    /// No randomness, no serial.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// A date outside what X.509 can say.
    #[error("a date outside the range of X.509")]
    Date,
}

/// What a leaf shall say. None of it comes from the certificate request but the key.
#[derive(Debug, Clone, Copy)]
pub struct LeafRequest<'a> {
    /// The key to certify.
    pub public_key: &'a P256PublicKey,
    /// Whose key it is.
    pub id: &'a SpiffeId,
    /// DNS names, beside the SPIFFE ID, for clients that know nothing of SPIFFE.
    pub dns: &'a [String],
    /// Addresses, likewise.
    pub ips: &'a [IpAddr],
    /// Wished lifetime; what the authority has left caps it.
    pub ttl: Duration,
}

/// A leaf just issued.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its serial, lower-case hexadecimal.
    pub serial: String,
    /// Its end, since the Unix epoch.
    pub not_after: Duration,
}

/// The root of one trust domain, key included.
pub struct Authority {
    trust_domain: TrustDomain,
    certificate: CertificateDer<'static>,
    bundle: TrustBundle,
    issuer: Issuer<'static, KeyPair>,
    serial: String,
    not_before: Duration,
    not_after: Duration,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the key.
        f.debug_struct("Authority")
            .field("trust_domain", &self.trust_domain)
            .field("serial", &self.serial)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new root for `trust_domain` that is valid for `ttl` from `now` (since the Unix epoch).
    pub fn generate(
        trust_domain: TrustDomain,
        ttl: Duration,
        random: &dyn Random,
        now: Duration,
    ) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(AuthorityError::Key)?;
        let serial = serial(random)?;
        let mut params = CertificateParams::default();
        params.not_before =
            date(now.as_secs().saturating_sub(BACKDATE_SECONDS)).ok_or(AuthorityError::Date)?;
        params.not_after = date((now + ttl).as_secs()).ok_or(AuthorityError::Date)?;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Palisade");
        // The name tells roots of one trust domain apart. It is short because a common name ends at 64
        // characters while a trust domain may have 255; the URI below says which domain it is.
        let label: String = hex::encode(&serial).chars().take(12).collect();
        params.distinguished_name.push(DnType::CommonName, format!("Palisade root {label}"));
        params.subject_alt_names = vec![uri(&trust_domain.id_string()).map_err(AuthorityError::Certificate)?];
        // No intermediate below this root: it signs leaves itself.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(AuthorityError::Certificate)?.der().clone();
        Self::assemble(trust_domain, certificate, key, Some(now))
    }

    /// The root of an earlier run.
    pub fn restore(
        trust_domain: TrustDomain,
        certificate: CertificateDer<'static>,
        pkcs8: &Zeroizing<Vec<u8>>,
    ) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pkcs8_der_and_sign_algo(
            &PrivatePkcs8KeyDer::from(pkcs8.as_slice()),
            &PKCS_ECDSA_P256_SHA256,
        )
        .map_err(AuthorityError::Key)?;
        // An expired root still starts, so that it can be seen and replaced; it only issues no more.
        Self::assemble(trust_domain, certificate, key, None)
    }

    fn assemble(
        trust_domain: TrustDomain,
        certificate: CertificateDer<'static>,
        key: KeyPair,
        now: Option<Duration>,
    ) -> Result<Self, AuthorityError> {
        use x509_parser::prelude::{FromDer as _, X509Certificate};
        let broken = || AuthorityError::Rules(LeafError::Der);
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|_| broken())?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(AuthorityError::Mismatch);
        }
        let seconds = |timestamp: i64| Duration::from_secs(u64::try_from(timestamp).unwrap_or(0));
        let not_before = seconds(parsed.validity().not_before.timestamp());
        let not_after = seconds(parsed.validity().not_after.timestamp());
        let serial = hex::encode(parsed.raw_serial());
        leaf::check_authority(&certificate, &trust_domain, now.unwrap_or(not_before))
            .map_err(AuthorityError::Rules)?;
        let bundle = TrustBundle::new(trust_domain.clone(), vec![certificate.clone()])
            .map_err(AuthorityError::Bundle)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(AuthorityError::Certificate)?;
        Ok(Self { trust_domain, certificate, bundle, issuer, serial, not_before, not_after })
    }

    /// Whose authority this is.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The root certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What verifiers need.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// The root's serial, lower-case hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// The root's end, since the Unix epoch.
    pub fn not_after(&self) -> Duration {
        self.not_after
    }

    /// The private key, PKCS#8, for sealing it to disk.
    pub(crate) fn key_pkcs8(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.issuer.key().serialize_der())
    }

    /// Issues a leaf at `now` (since the Unix epoch). It never outlives the root.
    pub fn issue(
        &self,
        request: &LeafRequest<'_>,
        random: &dyn Random,
        now: Duration,
    ) -> Result<Issued, IssueError> {
        if request.id.trust_domain() != &self.trust_domain {
            return Err(IssueError::TrustDomain(request.id.clone()));
        }
        if now < self.not_before || now >= self.not_after {
            return Err(IssueError::AuthorityNotValid);
        }
        if request.ttl < Duration::from_secs(1) {
            return Err(IssueError::Lifetime);
        }
        let start = now.as_secs().saturating_sub(BACKDATE_SECONDS).max(self.not_before.as_secs());
        let end = now.saturating_add(request.ttl).min(self.not_after).as_secs();
        let mut params = CertificateParams::default();
        params.not_before = date(start).ok_or(IssueError::Date)?;
        params.not_after = date(end).ok_or(IssueError::Date)?;
        params.serial_number = Some(SerialNumber::from_slice(&serial(random)?));
        // No subject: the SPIFFE ID is the name, and the alternative name is critical therefore.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names(request)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params
            .signed_by(request.public_key, &self.issuer)
            .map_err(IssueError::Certificate)?
            .der()
            .clone();
        let leaf = leaf::parse(&certificate).map_err(IssueError::Rules)?;
        Ok(Issued { certificate, serial: leaf.serial, not_after: leaf.not_after })
    }
}

/// Whether `name` is a DNS name in its canonical form: lower-case letters, digits and hyphens.
pub(crate) fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn names(request: &LeafRequest<'_>) -> Result<Vec<SanType>, IssueError> {
    if request.dns.len() + request.ips.len() > MAX_NAMES || !request.dns.iter().all(|name| is_dns_name(name))
    {
        return Err(IssueError::Names);
    }
    let mut names = vec![uri(request.id.as_str()).map_err(IssueError::Certificate)?];
    for name in request.dns {
        names.push(SanType::DnsName(Ia5String::try_from(name.as_str()).map_err(IssueError::Certificate)?));
    }
    names.extend(request.ips.iter().copied().map(SanType::IpAddress));
    Ok(names)
}

fn uri(text: &str) -> Result<SanType, rcgen::Error> {
    Ok(SanType::URI(Ia5String::try_from(text)?))
}

/// Random, positive, and always of one length: the first two bits are 01.
fn serial(random: &dyn Random) -> Result<[u8; SERIAL_BYTES], RandomError> {
    let mut serial = [0u8; SERIAL_BYTES];
    random.fill(&mut serial)?;
    if let Some(first) = serial.first_mut() {
        *first = (*first & 0x3f) | 0x40;
    }
    Ok(serial)
}

fn date(seconds: u64) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use identity::BundleSet;
    use identity::verify::verify_chain;
    use rustls_pki_types::UnixTime;

    use super::*;
    use crate::csr::PendingKey;
    use crate::random::SystemRandom;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn authority(ttl: Duration) -> Authority {
        let domain = TrustDomain::new("bank.example").unwrap();
        Authority::generate(domain, ttl, &*SystemRandom::shared(), NOW).unwrap()
    }

    fn request<'a>(key: &'a P256PublicKey, id: &'a SpiffeId, ttl: u64) -> LeafRequest<'a> {
        LeafRequest { public_key: key, id, dns: &[], ips: &[], ttl: Duration::from_secs(ttl) }
    }

    fn key() -> P256PublicKey {
        PendingKey::generate().unwrap().public().unwrap()
    }

    #[test]
    fn identity_20_to_24_leaf_and_root_keep_the_standard() {
        use x509_parser::prelude::{FromDer as _, X509Certificate};
        let authority = authority(DEFAULT_ROOT_TTL);
        let id = SpiffeId::new("spiffe://bank.example/service/web").unwrap();
        let key = key();
        let dns = ["web.bank.example".to_owned()];
        let ips = ["127.0.0.1".parse().unwrap()];
        let request = LeafRequest { dns: &dns, ips: &ips, ..request(&key, &id, 60) };
        let issued = authority.issue(&request, &*SystemRandom::shared(), NOW).unwrap();

        let (_, leaf) = X509Certificate::from_der(&issued.certificate).unwrap();
        let san = leaf.subject_alternative_name().unwrap().unwrap();
        assert!(san.critical, "the subject is empty");
        assert_eq!(san.value.general_names.len(), 3);
        assert!(!leaf.basic_constraints().unwrap().unwrap().value.ca);
        let usage = leaf.key_usage().unwrap().unwrap();
        assert!(usage.critical && usage.value.digital_signature() && !usage.value.key_cert_sign());
        let extended = leaf.extended_key_usage().unwrap().unwrap();
        assert!(extended.value.server_auth && extended.value.client_auth);
        assert_eq!(leaf.raw_serial().len(), 16);
        assert_eq!(leaf.validity().not_before.timestamp(), NOW.as_secs() as i64 - BACKDATE_SECONDS as i64);
        assert_eq!(issued.not_after, NOW + Duration::from_secs(60));

        let (_, root) = X509Certificate::from_der(authority.certificate()).unwrap();
        assert!(root.basic_constraints().unwrap().unwrap().value.ca);
        assert!(root.key_usage().unwrap().unwrap().value.key_cert_sign());
        // A root is never taken for a peer.
        assert!(leaf::parse(authority.certificate()).is_err());
    }

    #[test]
    fn identity_26_and_security_16_a_leaf_never_outlives_its_issuer() {
        let authority = authority(Duration::from_secs(100));
        let id = SpiffeId::new("spiffe://bank.example/service/web").unwrap();
        let key = key();
        let random = SystemRandom::shared();
        let issued =
            authority.issue(&request(&key, &id, 3600), &*random, NOW + Duration::from_secs(40)).unwrap();
        assert_eq!(issued.not_after, authority.not_after());
        let late = authority.issue(&request(&key, &id, 3600), &*random, NOW + Duration::from_secs(100));
        assert!(matches!(late, Err(IssueError::AuthorityNotValid)));
        let early = authority.issue(&request(&key, &id, 3600), &*random, NOW - Duration::from_secs(100));
        assert!(matches!(early, Err(IssueError::AuthorityNotValid)));
    }

    #[test]
    fn only_ids_of_the_own_trust_domain_and_well_formed_names_are_issued() {
        let authority = authority(DEFAULT_ROOT_TTL);
        let random = SystemRandom::shared();
        let key = key();
        let other = SpiffeId::new("spiffe://other.example/service/web").unwrap();
        assert!(matches!(
            authority.issue(&request(&key, &other, 60), &*random, NOW),
            Err(IssueError::TrustDomain(_))
        ));
        let id = SpiffeId::new("spiffe://bank.example/service/web").unwrap();
        for bad in ["", "UPPER.example", "a..b", "-a.example", "a b", "*.example", "spiffe://x"] {
            let dns = [bad.to_owned()];
            let request = LeafRequest { dns: &dns, ..request(&key, &id, 60) };
            assert!(matches!(authority.issue(&request, &*random, NOW), Err(IssueError::Names)), "{bad}");
        }
    }

    #[test]
    fn what_is_issued_verifies_under_its_own_root_and_no_other() {
        let (ours, theirs) = (authority(DEFAULT_ROOT_TTL), authority(DEFAULT_ROOT_TTL));
        let id = SpiffeId::new("spiffe://bank.example/service/web").unwrap();
        let issued = ours.issue(&request(&key(), &id, 60), &*SystemRandom::shared(), NOW).unwrap();
        let at = |seconds| UnixTime::since_unix_epoch(NOW + Duration::from_secs(seconds));
        let bundles = |authority: &Authority| BundleSet::new([authority.bundle().clone()]);
        assert_eq!(verify_chain(&issued.certificate, &[], &bundles(&ours), at(1)).unwrap().id, id);
        assert!(verify_chain(&issued.certificate, &[], &bundles(&theirs), at(1)).is_err());
        assert!(verify_chain(&issued.certificate, &[], &bundles(&ours), at(61)).is_err());
    }

    #[test]
    fn a_restored_root_is_the_same_root_and_a_foreign_key_is_noticed() {
        let made = authority(DEFAULT_ROOT_TTL);
        let domain = made.trust_domain().clone();
        let again =
            Authority::restore(domain.clone(), made.certificate().clone(), &made.key_pkcs8()).unwrap();
        assert_eq!(again.serial(), made.serial());
        let foreign = authority(DEFAULT_ROOT_TTL).key_pkcs8();
        assert!(matches!(
            Authority::restore(domain, made.certificate().clone(), &foreign),
            Err(AuthorityError::Mismatch)
        ));
    }
}
