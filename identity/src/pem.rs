//! An identity from PEM files: for a process that no agent serves.
//!
//! The files are looked at each [`POLL`]; when one has changed all are read again, and the identity is
//! replaced as a whole or not at all. A rotation that writes certificate and key one after the other is
//! met between the two, told in the log, and taken once they fit.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm,
};
use rustls_pki_types::pem::{self, PemObject as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;
use tokio::sync::Notify;
use zeroize::Zeroizing;

use crate::bundle::{BundleError, BundleSet, TrustBundle};
use crate::clock::SharedClock;
use crate::files::{self, StateError};
use crate::id::{SpiffeId, TrustDomain};
use crate::scope::Scope;
use crate::source::{IdentityPublisher, IdentitySource};
use crate::svid::{SvidError, X509Svid};

/// How often the files are looked at: a rotation is in force a second later, and looking costs a few
/// system calls.
pub const POLL: Duration = Duration::from_secs(1);

/// Largest file of certificates: far above any chain or bundle, and no danger to the memory.
pub const MAX_CERTIFICATE_FILE_BYTES: u64 = 1024 * 1024;

/// Why files are not an identity.
#[derive(Debug, Error)]
pub enum PemError {
    /// A certificate file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A certificate file over [`MAX_CERTIFICATE_FILE_BYTES`].
    #[error("{} is larger than {MAX_CERTIFICATE_FILE_BYTES} bytes", .0.display())]
    TooLarge(PathBuf),
    /// The key file is absent.
    #[error("there is no private key {}", .0.display())]
    NoKeyFile(PathBuf),
    /// The key file cannot be read, or others may read it.
    #[error("the private key cannot be used")]
    KeyFile(#[source] StateError),
    /// A file is not PEM.
    #[error("{} is not PEM", path.display())]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What was wrong.
        #[source]
        source: pem::Error,
    },
    /// A file without a certificate.
    #[error("{} holds no certificate", .0.display())]
    NoCertificate(PathBuf),
    /// A file without a usable private key.
    #[error("{} holds no private key as PKCS#8, or as SEC1 on P-256 or P-384", .0.display())]
    NoKey(PathBuf),
    /// Certificate and key are no SVID.
    #[error("{} is not this process's identity", path.display())]
    Svid {
        /// The certificate file.
        path: PathBuf,
        /// Why.
        #[source]
        source: SvidError,
    },
    /// A bundle is none.
    #[error("{} is no trust bundle", path.display())]
    Bundle {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: BundleError,
    },
    /// The own trust domain is listed among the others.
    #[error("{0} is the own trust domain: its roots are the bundle")]
    OwnTrustDomain(TrustDomain),
    /// The certificate is past its end.
    #[error("{} has expired", .0.display())]
    Expired(PathBuf),
    /// A rotation gave somebody else's identity.
    #[error("{} names {is}, and this process is {was}", path.display())]
    Another {
        /// The certificate file.
        path: PathBuf,
        /// Who we are.
        was: SpiffeId,
        /// Whom the file names.
        is: SpiffeId,
    },
}

/// The files that hold an identity.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    /// The chain, leaf first.
    pub certificate: PathBuf,
    /// The leaf's private key, unencrypted: PKCS#8, or SEC1 on P-256 or P-384.
    pub key: PathBuf,
    /// The authorities of the own trust domain.
    pub bundle: PathBuf,
    /// The authorities of other trust domains.
    pub trust: Vec<(TrustDomain, PathBuf)>,
}

/// An identity that follows its files.
#[derive(Debug)]
pub struct Followed {
    /// The identity in force.
    pub source: IdentitySource,
    /// Has the files read again now, changed or not.
    pub again: Arc<Notify>,
}

impl IdentityFiles {
    /// Reads the files as they are, valid at `now` (since the Unix epoch). Waits for the disk.
    ///
    /// # Errors
    /// The first file that is missing, malformed, readable for others (the key), or does not fit the rest.
    pub fn read(&self, now: Duration) -> Result<(X509Svid, BundleSet), PemError> {
        let svid = X509Svid::new(certificates(&self.certificate)?, private_key(&self.key)?)
            .map_err(|source| PemError::Svid { path: self.certificate.clone(), source })?;
        if svid.not_after() <= now {
            return Err(PemError::Expired(self.certificate.clone()));
        }
        let own = svid.id().trust_domain().clone();
        if self.trust.iter().any(|(domain, _)| *domain == own) {
            return Err(PemError::OwnTrustDomain(own));
        }
        let others = self.trust.iter().map(|(domain, path)| (domain.clone(), path));
        let bundles = others.chain([(own, &self.bundle)]).map(|(domain, path)| {
            TrustBundle::new(domain, certificates(path)?)
                .map_err(|source| PemError::Bundle { path: path.clone(), source })
        });
        Ok((svid, BundleSet::new(bundles.collect::<Result<Vec<_>, _>>()?)))
    }

    /// Reads the files and follows them for as long as `scope` lives. What they cannot give later is told
    /// in the log, and what was in force stays so.
    ///
    /// # Errors
    /// Those of [`read`](Self::read): a process does not start without an identity.
    pub fn follow(self, clock: SharedClock, scope: &Scope) -> Result<Followed, PemError> {
        let seen = self.fingerprint();
        let (svid, bundles) = self.read(clock.now())?;
        let id = svid.id().clone();
        let (publisher, source) = IdentitySource::channel();
        publisher.publish(svid, Arc::new(bundles));
        let again = Arc::new(Notify::new());
        let follower = Follower { files: Arc::new(self), id, seen, publisher, clock };
        let (asked, draining) = (Arc::clone(&again), scope.clone());
        scope.spawn_critical("identity files", async move {
            tokio::select! {
                () = follower.run(&asked) => {}
                () = draining.draining() => {}
            }
        });
        Ok(Followed { source, again })
    }

    /// What tells a changed file from the one that was read: all that a write or a rename moves.
    fn fingerprint(&self) -> Fingerprint {
        let paths = [&self.certificate, &self.key, &self.bundle].into_iter();
        let paths = paths.chain(self.trust.iter().map(|(_, path)| path));
        let of = |path: &PathBuf| {
            // Links are followed: the file that is read is the one that counts.
            let file = fs::metadata(path).ok()?;
            Some([
                file.dev(),
                file.ino(),
                file.size(),
                file.mtime().unsigned_abs(),
                file.mtime_nsec().unsigned_abs(),
                file.ctime().unsigned_abs(),
                file.ctime_nsec().unsigned_abs(),
            ])
        };
        paths.map(of).collect()
    }
}

/// One entry a file; `None` for a file that is not there.
type Fingerprint = Vec<Option<[u64; 7]>>;

struct Follower {
    files: Arc<IdentityFiles>,
    id: SpiffeId,
    seen: Fingerprint,
    publisher: IdentityPublisher,
    clock: SharedClock,
}

impl Follower {
    async fn run(mut self, asked: &Notify) {
        loop {
            let forced = tokio::select! {
                () = self.clock.sleep(POLL) => false,
                () = asked.notified() => true,
            };
            let (files, seen, now) = (Arc::clone(&self.files), self.seen.clone(), self.clock.now());
            let looked = tokio::task::spawn_blocking(move || {
                // Taken before reading, so that a write meanwhile is seen the next time.
                let fingerprint = files.fingerprint();
                (forced || fingerprint != seen).then(|| (fingerprint, files.read(now)))
            });
            // An error is the runtime ending, or a panic that has been reported.
            let Ok(Some((fingerprint, read))) = looked.await else { continue };
            self.seen = fingerprint;
            match read.and_then(|identity| self.same(identity)) {
                Ok((svid, bundles)) => {
                    tracing::info!(id = %svid.id(), serial = svid.serial(), "identity read again");
                    self.publisher.publish(svid, Arc::new(bundles));
                }
                Err(error) => tracing::error!(
                    cause = std::error::Error::source(&error).map(tracing::field::display),
                    %error,
                    "identity not replaced; the one before stays in force"
                ),
            }
        }
    }

    fn same(&self, identity: (X509Svid, BundleSet)) -> Result<(X509Svid, BundleSet), PemError> {
        if *identity.0.id() == self.id {
            return Ok(identity);
        }
        Err(PemError::Another {
            path: self.files.certificate.clone(),
            was: self.id.clone(),
            is: identity.0.id().clone(),
        })
    }
}

/// All certificates of a PEM file, at least one: such as the authorities of the system in
/// `/etc/ssl/certs/ca-certificates.crt`.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let read = |source| PemError::Read { path: path.to_owned(), source };
    let mut text = Vec::new();
    let file = File::open(path).map_err(read)?;
    file.take(MAX_CERTIFICATE_FILE_BYTES + 1).read_to_end(&mut text).map_err(read)?;
    if text.len() as u64 > MAX_CERTIFICATE_FILE_BYTES {
        return Err(PemError::TooLarge(path.to_owned()));
    }
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|source| PemError::Pem { path: path.to_owned(), source })?;
    if certificates.is_empty() { Err(PemError::NoCertificate(path.to_owned())) } else { Ok(certificates) }
}

/// The key as PKCS#8, which is what an SVID holds.
fn private_key(path: &Path) -> Result<Zeroizing<Vec<u8>>, PemError> {
    let text = files::read_private(path).map_err(PemError::KeyFile)?;
    let text = text.ok_or_else(|| PemError::NoKeyFile(path.to_owned()))?;
    let none = || PemError::NoKey(path.to_owned());
    match PrivateKeyDer::from_pem_slice(&text) {
        Ok(PrivateKeyDer::Pkcs8(key)) => Ok(Zeroizing::new(key.secret_pkcs8_der().to_vec())),
        Ok(PrivateKeyDer::Sec1(key)) => pkcs8_of_sec1(key.secret_sec1_der()).ok_or_else(none),
        Ok(_) | Err(pem::Error::NoItemsFound) => Err(none()),
        Err(source) => Err(PemError::Pem { path: path.to_owned(), source }),
    }
}

/// RFC 5915 → RFC 5958, on the curves that TLS certificates use.
fn pkcs8_of_sec1(der: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    const CURVES: [&EcdsaSigningAlgorithm; 2] =
        [&ECDSA_P256_SHA256_ASN1_SIGNING, &ECDSA_P384_SHA384_ASN1_SIGNING];
    let key = CURVES.iter().find_map(|curve| EcdsaKeyPair::from_private_key_der(curve, der).ok())?;
    Some(Zeroizing::new(key.to_pkcs8v1().ok()?.as_ref().to_vec()))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use tempfile::TempDir;

    use super::*;
    use crate::clock::{Clock as _, SystemClock};
    use crate::testing::TestAuthority;

    const ID: &str = "/service/web";

    fn armour(label: &str, der: &[u8]) -> String {
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
    }

    fn files(directory: &TempDir) -> IdentityFiles {
        let path = |name: &str| directory.path().join(name);
        IdentityFiles {
            certificate: path("leaf.crt"),
            key: path("leaf.key"),
            bundle: path("ca.crt"),
            trust: Vec::new(),
        }
    }

    /// Writes what `authority` issues for `path`; returns the serial.
    fn issue(authority: &TestAuthority, path: &str, files: &IdentityFiles) -> String {
        let svid = authority.issue(path);
        fs::write(&files.certificate, armour("CERTIFICATE", svid.leaf_der())).unwrap();
        files::write_private(&files.key, armour("PRIVATE KEY", svid.key_pkcs8()).as_bytes()).unwrap();
        fs::write(&files.bundle, authority.bundle().pem()).unwrap();
        svid.serial().to_owned()
    }

    fn cause(files: &IdentityFiles) -> PemError {
        files.read(SystemClock.now()).unwrap_err()
    }

    #[test]
    fn what_openssl_writes_is_an_identity_that_signs() {
        let directory = tempfile::tempdir().unwrap();
        let script = "
            openssl ecparam -name prime256v1 -genkey -noout -out ca.key
            openssl req -x509 -new -key ca.key -days 2 -subj '/CN=root' -out ca.crt \
              -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
            openssl ecparam -name prime256v1 -genkey -noout -out leaf.key
            openssl req -new -key leaf.key -subj '/CN=leaf' -out leaf.csr
            printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=URI:spiffe://mesh.test/ns/default/sa/server,DNS:server.mesh.test\n' > leaf.ext
            openssl x509 -req -in leaf.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile leaf.ext -out leaf.crt";
        let ran = Command::new("sh").args(["-ec", script]).current_dir(directory.path()).output();
        let Ok(ran) = ran.map_err(|error| crate::testing::skip(&format!("no shell: {error}"))) else {
            return;
        };
        if !ran.status.success() {
            return crate::testing::skip(&format!("no openssl: {}", String::from_utf8_lossy(&ran.stderr)));
        }
        let files = files(&directory);
        let key = fs::read_to_string(&files.key).unwrap();
        assert!(key.contains("BEGIN EC PRIVATE KEY"), "{key}");
        let (svid, bundles) = files.read(SystemClock.now()).unwrap();
        assert_eq!(svid.id().to_string(), "spiffe://mesh.test/ns/default/sa/server");
        assert_eq!(bundles.get(svid.id().trust_domain()).unwrap().authorities().len(), 1);
        // ring, which signs transaction tokens, reads the key that aws-lc wrapped.
        let claims = serde_json::json!({});
        assert!(crate::jws::sign_es256(&claims, &claims, svid.key_pkcs8()).is_ok());
    }

    #[test]
    fn each_broken_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let authority = TestAuthority::new("bank.example");
        let mut files = files(&directory);
        issue(&authority, ID, &files);
        let good = fs::read(&files.certificate).unwrap();

        fs::remove_file(&files.certificate).unwrap();
        assert!(matches!(cause(&files), PemError::Read { path, .. } if path == files.certificate));
        fs::write(&files.certificate, "").unwrap();
        assert!(matches!(cause(&files), PemError::NoCertificate(_)));
        fs::write(&files.certificate, "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n").unwrap();
        assert!(matches!(cause(&files), PemError::Pem { .. }));
        File::create(&files.certificate).unwrap().set_len(MAX_CERTIFICATE_FILE_BYTES + 1).unwrap();
        assert!(matches!(cause(&files), PemError::TooLarge(_)));

        let other = authority.issue(ID);
        fs::write(&files.certificate, armour("CERTIFICATE", other.leaf_der())).unwrap();
        assert!(matches!(cause(&files), PemError::Svid { source: SvidError::Key(_), .. }));

        fs::write(&files.certificate, &good).unwrap();
        files.read(SystemClock.now()).unwrap();
        fs::write(&files.bundle, "no PEM").unwrap();
        assert!(matches!(cause(&files), PemError::NoCertificate(path) if path == files.bundle));
        fs::write(&files.bundle, authority.bundle().pem()).unwrap();

        files::write_private(&files.key, &good).unwrap();
        assert!(matches!(cause(&files), PemError::NoKey(_)));
        fs::remove_file(&files.key).unwrap();
        assert!(matches!(cause(&files), PemError::NoKeyFile(_)));

        issue(&authority, ID, &files);
        let late = files.read(SystemClock.now() + Duration::from_secs(7200)).unwrap_err();
        assert!(matches!(late, PemError::Expired(_)));
        files.trust.push((TrustDomain::new("bank.example").unwrap(), files.bundle.clone()));
        assert!(matches!(cause(&files), PemError::OwnTrustDomain(_)));
    }

    #[test]
    fn security_19_a_key_that_others_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let files = files(&directory);
        issue(&TestAuthority::new("bank.example"), ID, &files);
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(cause(&files), PemError::KeyFile(StateError::FileMode { .. })));
    }

    #[tokio::test]
    async fn a_rotation_is_taken_whole_and_a_broken_one_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let authority = TestAuthority::new("bank.example");
        let files = files(&directory);
        let first = issue(&authority, ID, &files);
        let scope = Scope::new();
        let Followed { mut source, again } = files.clone().follow(SystemClock::shared(), &scope).unwrap();
        let serial = |source: &IdentitySource| source.current().unwrap().svid.serial().to_owned();
        assert_eq!(serial(&source), first);
        assert!(source.changed().await);

        let second = issue(&authority, ID, &files);
        assert!(source.changed().await);
        assert_eq!(serial(&source), second);

        // Somebody else's certificate, and half a rotation: neither is taken, the next good one is.
        issue(&authority, "/service/other", &files);
        again.notify_one();
        fs::write(&files.certificate, "").unwrap();
        again.notify_one();
        let third = issue(&authority, ID, &files);
        again.notify_one();
        while serial(&source) != third {
            assert_eq!(serial(&source), second);
            assert!(source.changed().await);
        }
        assert_eq!(source.current().unwrap().svid.id().path(), ID);
    }
}
