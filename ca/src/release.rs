//! Releases: which files of policies a service has, signed by control.
//!
//! A release is a compact JWS (ES256, `x5c`) by `spiffe://TD/palisade/policy`, an identity that the authority issues
//! to control alone; the trust bundle that verifies mTLS peers verifies it too. It names an epoch, which only ever
//! rises, the commit, and by its digest the [`Manifest`]: a line a file, with the digest of that. So whoever holds a
//! release needs to trust nobody for its contents.
//!
//! The signer's certificate lives a day and a release is read long after, from a cache, while control is away. So the
//! certificate is verified as of the moment of signing, which the release says; how old that may be is bounded by
//! whoever puts it in force.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::{CertificateDer, UnixTime};
use serde_json::{Value, json};
use thiserror::Error;

use identity::bundle::BundleSet;
use identity::jws::{self, Compact, JwsError};
use identity::txn::CLOCK_SKEW;
use identity::verify::{self, VerifyError};
use identity::{SpiffeId, TrustDomain, X509Svid};

use crate::entry::POLICY_PATH;
use crate::hex;

const TYPE: &str = "palisade-release+jws";
/// Files of one release: a service has a few, ten thousand policies a handful.
const MAX_FILES: usize = 1_000;
/// Bytes of all its files together: ten thousand policies take three megabytes.
pub(crate) const MAX_BYTES: usize = 32 << 20;
/// Longest name of a file, below the policies directory.
const MAX_NAME_BYTES: usize = 500;
/// Hexadecimal digits of a SHA-256.
const DIGEST_DIGITS: usize = 64;

/// Files by their names below the policies directory, with `/`.
pub type Files = BTreeMap<String, Vec<u8>>;

/// What a release says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Whose policies these are.
    pub service: String,
    /// Which of all that were ever put out; a later one has a higher number.
    pub epoch: u64,
    /// No release below this epoch is to be used any more.
    pub floor: u64,
    /// The commit that the files are from.
    pub commit: String,
    /// When it was signed, since the Unix epoch.
    pub signed: Duration,
    /// The digest of its [`Manifest`].
    pub manifest: String,
}

/// Why something is no release for us. `Display` is one clause.
#[derive(Debug, Error)]
pub enum ReleaseError {
    /// Not a strict compact JWS, or the signature is wrong.
    #[error("the release is not signed as releases are: {0}")]
    Jws(#[from] JwsError),
    /// A member is missing or of the wrong type.
    #[error("the release's member {0} is missing or wrong")]
    Member(&'static str),
    /// The signer's certificate is not of this mesh, or was not valid when it signed.
    #[error("the certificate of the release's signer does not verify: {0}")]
    Signer(#[from] VerifyError),
    /// Somebody signed it who may not.
    #[error("the release is signed by {0}, which signs no policies")]
    OtherSigner(SpiffeId),
    /// From the future.
    #[error("the release was signed in the future")]
    Future,
    /// Of another service than was asked for.
    #[error("the release is for the service {0:?}")]
    OtherService(String),
    /// Below the floor.
    #[error("the release has the epoch {epoch}, and none below {floor} is to be used any more")]
    Rollback {
        /// Its epoch.
        epoch: u64,
        /// The highest floor that was ever told.
        floor: u64,
    },
    /// The manifest is malformed, or of another digest.
    #[error("the release's list of files is wrong")]
    Manifest,
    /// A file is missing, or has another digest.
    #[error("the file {0:?} is not the one that was signed")]
    File(String),
}

/// Who signs releases, `spiffe://TD/palisade/policy`.
pub fn signer_id(trust_domain: &TrustDomain) -> Option<SpiffeId> {
    trust_domain.workload(POLICY_PATH).ok()
}

impl Release {
    /// Signs it with the SVID of [`signer_id`].
    pub fn sign(&self, svid: &X509Svid) -> Result<String, ReleaseError> {
        let x5c: Vec<String> = svid.chain().iter().map(|der| STANDARD.encode(der)).collect();
        let header = json!({ "typ": TYPE, "alg": "ES256", "x5c": x5c });
        let claims = json!({
            "iss": svid.id().as_str(),
            "aud": svid.id().trust_domain().as_str(),
            "service": self.service,
            "epoch": self.epoch,
            "floor": self.floor,
            "commit": self.commit,
            "iat": self.signed.as_secs(),
            "manifest": self.manifest,
        });
        Ok(jws::sign_es256(&header, &claims, svid.key_pkcs8())?)
    }

    /// Reads one, if it was signed for this trust domain by who signs releases.
    pub fn verify(
        text: &str,
        trust_domain: &TrustDomain,
        bundles: &BundleSet,
        now: Duration,
    ) -> Result<Self, ReleaseError> {
        let token = Compact::parse_with_certificate(text)?;
        if token.header_str("typ") != Some(TYPE) {
            return Err(ReleaseError::Member("typ"));
        }
        if token.algorithm != "ES256" {
            return Err(ReleaseError::Member("alg"));
        }
        let signed = Duration::from_secs(number(&token, "iat")?);
        if signed > now + CLOCK_SKEW {
            return Err(ReleaseError::Future);
        }
        let chain = token.header.get("x5c").and_then(Value::as_array).ok_or(ReleaseError::Member("x5c"))?;
        let chain = chain
            .iter()
            .map(|der| der.as_str().and_then(|der| STANDARD.decode(der).ok()).map(CertificateDer::from))
            .collect::<Option<Vec<_>>>()
            .ok_or(ReleaseError::Member("x5c"))?;
        let (leaf, intermediates) = chain.split_first().ok_or(ReleaseError::Member("x5c"))?;
        let leaf = verify::verify_chain(leaf, intermediates, bundles, UnixTime::since_unix_epoch(signed))?;
        if Some(&leaf.id) != signer_id(trust_domain).as_ref() {
            return Err(ReleaseError::OtherSigner(leaf.id));
        }
        token.verify_es256(&leaf.public_key)?;
        if string(&token, "iss")? != leaf.id.as_str() {
            return Err(ReleaseError::Member("iss"));
        }
        if string(&token, "aud")? != trust_domain.as_str() {
            return Err(ReleaseError::Member("aud"));
        }
        let manifest = string(&token, "manifest")?;
        if !is_digest(manifest) {
            return Err(ReleaseError::Member("manifest"));
        }
        Ok(Self {
            service: string(&token, "service")?.to_owned(),
            epoch: number(&token, "epoch")?,
            floor: number(&token, "floor")?,
            commit: string(&token, "commit")?.to_owned(),
            signed,
            manifest: manifest.to_owned(),
        })
    }

    /// Whether it may be used for `service`, by whoever was told `floor`.
    pub fn may_serve(&self, service: &str, floor: u64) -> Result<(), ReleaseError> {
        if self.service != service {
            return Err(ReleaseError::OtherService(self.service.clone()));
        }
        let floor = floor.max(self.floor);
        if self.epoch < floor {
            return Err(ReleaseError::Rollback { epoch: self.epoch, floor });
        }
        Ok(())
    }

    /// Whether these are its files, all of them and no others.
    pub fn check(&self, files: &Files) -> Result<(), ReleaseError> {
        let manifest = Manifest::of(files);
        if manifest.digest() == self.manifest { Ok(()) } else { Err(ReleaseError::Manifest) }
    }
}

fn string<'a>(token: &'a Compact<'_>, name: &'static str) -> Result<&'a str, ReleaseError> {
    token.claims.get(name).and_then(Value::as_str).ok_or(ReleaseError::Member(name))
}

fn number(token: &Compact<'_>, name: &'static str) -> Result<u64, ReleaseError> {
    token.claims.get(name).and_then(Value::as_u64).ok_or(ReleaseError::Member(name))
}

/// Whether a text is a SHA-256 as we write it.
pub(crate) fn is_digest(text: &str) -> bool {
    text.len() == DIGEST_DIGITS
        && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// The names of files and the digests of their contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest(BTreeMap<String, String>);

impl Manifest {
    pub(crate) fn of(files: &Files) -> Self {
        Self(files.iter().map(|(name, content)| (name.clone(), hex::sha256(content))).collect())
    }

    /// A line a file, in the order of their names: what is hashed, stored and sent.
    pub(crate) fn text(&self) -> String {
        self.0.iter().fold(String::new(), |mut text, (name, digest)| {
            let _infallible = writeln!(text, "{digest} {name}").is_ok();
            text
        })
    }

    pub(crate) fn digest(&self) -> String {
        hex::sha256(self.text().as_bytes())
    }

    /// Reads what [`Manifest::text`] wrote, and nothing else.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, ReleaseError> {
        let text = std::str::from_utf8(text).map_err(|_| ReleaseError::Manifest)?;
        let mut files = BTreeMap::new();
        for line in text.lines() {
            let (digest, name) = line.split_once(' ').ok_or(ReleaseError::Manifest)?;
            let good = is_digest(digest) && is_name(name) && files.len() < MAX_FILES;
            if !good || files.insert(name.to_owned(), digest.to_owned()).is_some() {
                return Err(ReleaseError::Manifest);
            }
        }
        let manifest = Self(files);
        if manifest.text() == text { Ok(manifest) } else { Err(ReleaseError::Manifest) }
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, digest)| (name.as_str(), digest.as_str()))
    }
}

/// A relative path that leads nowhere else.
pub(crate) fn is_name(name: &str) -> bool {
    let part = |part: &str| !matches!(part, "" | "." | "..");
    name.len() <= MAX_NAME_BYTES && !name.contains(char::is_control) && name.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use identity::testing::TestAuthority;
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn files(texts: &[(&str, &str)]) -> Files {
        texts.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect()
    }

    fn release(files: &Files, now: Duration) -> Release {
        Release {
            service: "web".into(),
            epoch: 7,
            floor: 6,
            commit: "c".repeat(40),
            signed: now,
            manifest: Manifest::of(files).digest(),
        }
    }

    struct Mesh {
        authority: TestAuthority,
        domain: TrustDomain,
        bundles: BundleSet,
        now: Duration,
    }

    impl Mesh {
        fn new() -> Self {
            let authority = TestAuthority::new("bank.example");
            let bundles = BundleSet::new([authority.bundle()]);
            let now = Duration::from_secs(identity::SystemClock::shared().now_seconds());
            Self { authority, domain: TrustDomain::new("bank.example").unwrap(), bundles, now }
        }

        fn read(&self, text: &str) -> Result<Release, ReleaseError> {
            Release::verify(text, &self.domain, &self.bundles, self.now)
        }
    }

    #[test]
    fn what_was_signed_is_what_is_read_and_its_files_are_the_ones_it_names() {
        let mesh = Mesh::new();
        let files = files(&[("mesh.cedarschema", "a"), ("services/web/web.cedar", "b")]);
        let release = release(&files, mesh.now);
        let text = release.sign(&mesh.authority.issue("/palisade/policy")).unwrap();
        assert_eq!(mesh.read(&text).unwrap(), release);
        release.check(&files).unwrap();
        let manifest = Manifest::of(&files);
        assert_eq!(Manifest::parse(manifest.text().as_bytes()).unwrap(), manifest);
        for (name, content) in [("services/web/web.cedar", "B"), ("services/web/more.cedar", "")] {
            let mut other = files.clone();
            other.insert(name.into(), content.into());
            assert!(matches!(release.check(&other), Err(ReleaseError::Manifest)), "{name}");
        }
        let mut fewer = files.clone();
        fewer.remove("mesh.cedarschema");
        assert!(release.check(&fewer).is_err());
    }

    #[test]
    fn policy_39_by_another_key_of_another_mesh_for_another_service_or_of_a_lower_epoch() {
        let mesh = Mesh::new();
        let release = release(&Files::new(), mesh.now);
        let signer = mesh.authority.issue("/palisade/policy");
        let by = |path: &str| mesh.read(&release.sign(&mesh.authority.issue(path)).unwrap()).unwrap_err();
        assert!(matches!(by("/palisade/control"), ReleaseError::OtherSigner(_)));
        assert!(matches!(by("/service/web"), ReleaseError::OtherSigner(_)));
        let stranger = TestAuthority::new("bank.example").issue("/palisade/policy");
        assert!(matches!(mesh.read(&release.sign(&stranger).unwrap()), Err(ReleaseError::Signer(_))));
        let late = Release { signed: mesh.now + Duration::from_secs(60), ..release.clone() };
        assert!(matches!(mesh.read(&late.sign(&signer).unwrap()), Err(ReleaseError::Future)));
        // Signed before its signer was: a key that leaked later signs nothing for then.
        let early = Release { signed: mesh.now - Duration::from_secs(3600 * 24 * 365), ..release.clone() };
        assert!(matches!(mesh.read(&early.sign(&signer).unwrap()), Err(ReleaseError::Signer(_))));
        let text = release.sign(&signer).unwrap();
        let elsewhere = TrustDomain::new("other.example").unwrap();
        assert!(Release::verify(&text, &elsewhere, &mesh.bundles, mesh.now).is_err());
        let (head, signature) = text.rsplit_once('.').unwrap();
        // A signature is random: any of it that is replaced must be there.
        let first = if signature.starts_with('A') { "B" } else { "A" };
        let other_signature = format!("{first}{}", &signature[1..]);
        assert!(mesh.read(&format!("{head}.{other_signature}")).is_err());
        assert!(mesh.read("").is_err() && mesh.read("a.b.c").is_err());

        release.may_serve("web", 7).unwrap();
        assert!(matches!(release.may_serve("accounts", 0), Err(ReleaseError::OtherService(_))));
        let below = release.may_serve("web", 8).unwrap_err();
        assert!(matches!(below, ReleaseError::Rollback { epoch: 7, floor: 8 }), "{below}");
    }

    #[test]
    fn a_list_of_files_has_one_form() {
        let digest = "0".repeat(64);
        let good = format!("{digest} a\n{digest} b/c\n");
        assert!(Manifest::parse(good.as_bytes()).is_ok() && Manifest::parse(b"").is_ok());
        for bad in [
            format!("{digest} b\n{digest} a\n"),
            format!("{digest} a\n{digest} a\n"),
            format!("{digest} a"),
            format!("{digest} ../a\n"),
            format!("{digest} /a\n"),
            format!("{digest} a/./b\n"),
            format!("{} a\n", "A".repeat(64)),
            format!("{digest} a\r\n"),
            "a\n".to_owned(),
        ] {
            assert!(Manifest::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC{0,200}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let domain = TrustDomain::new("bank.example").unwrap();
            let _any = Release::verify(&text, &domain, &BundleSet::default(), NOW).is_ok();
            let _any = Manifest::parse(&bytes).is_ok();
        }
    }
}
