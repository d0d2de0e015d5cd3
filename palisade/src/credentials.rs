//! Secrets that a process is started with: one file each, in a directory that only it can read.
//!
//! The convention is systemd's (`LoadCredential=`): `$CREDENTIALS_DIRECTORY/NAME`. Nothing secret is
//! in mesh.toml, on the command line or in an environment variable.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use secrecy::SecretString;
use thiserror::Error;
use zeroize::Zeroizing;

/// Largest credential: a key or a passphrase is far smaller, a file named by mistake is not read whole.
const MAX_CREDENTIAL_BYTES: u64 = 64 * 1024;

/// Permissions that let others than the owner at a file.
const OTHERS: u32 = 0o077;

/// A credential that some verb reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Credential {
    /// Decrypts the authority's key.
    CaPassphrase,
    /// Unseals the vault.
    VaultUnsealKey,
    /// Seals the gateway's sessions.
    GatewaySessionKey,
    /// The gateway's password at the OpenID Connect provider.
    OidcClientSecret,
    /// Admits a new agent, once.
    JoinToken,
    /// The authorities that a new agent trusts, PEM. Not secret, but whoever changes it is trusted.
    TrustBundle,
    /// Opens the console.
    ConsoleToken,
}

impl Credential {
    /// The name of its file.
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            Self::CaPassphrase => "ca-passphrase",
            Self::VaultUnsealKey => "vault-unseal-key",
            Self::GatewaySessionKey => "gateway-session-key",
            Self::OidcClientSecret => "oidc-client-secret",
            Self::JoinToken => "join-token",
            Self::TrustBundle => "trust-bundle",
            Self::ConsoleToken => "console-token",
        }
    }
}

/// Why a credential cannot be had. No variant holds any of its bytes.
#[derive(Debug, Error)]
pub(crate) enum CredentialError {
    #[error("the credential {0} is needed, and no directory of credentials is given")]
    NoDirectory(&'static str),
    #[error("there is no credential {}", .0.display())]
    Missing(PathBuf),
    #[error("{} cannot be read", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    #[error("{} can be read by others (mode {mode:04o})", path.display())]
    Open { path: PathBuf, mode: u32 },
    #[error("{} belongs to user {owner}, neither to this process's user nor to root", path.display())]
    Owner { path: PathBuf, owner: u32 },
    #[error("{} is empty", .0.display())]
    Empty(PathBuf),
    #[error("{} is not text", .0.display())]
    NotText(PathBuf),
    #[error("{} is larger than {MAX_CREDENTIAL_BYTES} bytes", .0.display())]
    TooLarge(PathBuf),
}

impl CredentialError {
    /// What mends it.
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::NoDirectory(_) => {
                "name it with --credentials DIR, or LoadCredential= in the systemd unit".to_owned()
            }
            Self::Missing(path) => format!("put the secret there: (umask 077; cat > {})", path.display()),
            Self::Read { path, .. } => format!(
                "it must be readable for this process's user: chown it, then chmod 0600 {}",
                path.display()
            ),
            Self::NotAFile(path) => format!("{} is expected to be a plain file", path.display()),
            Self::Open { path, .. } => format!("chmod 0600 {}", path.display()),
            Self::Owner { path, .. } => {
                format!("chown {} {}", rustix::process::getuid().as_raw(), path.display())
            }
            Self::Empty(path) | Self::TooLarge(path) | Self::NotText(path) => {
                format!("write the secret itself into {}", path.display())
            }
        }
    }
}

impl From<CredentialError> for crate::failure::Failure {
    fn from(error: CredentialError) -> Self {
        Self::invalid("a credential is not usable").because(&error).hint(error.hint())
    }
}

/// The directory of credentials.
#[derive(Debug, Clone)]
pub(crate) struct Credentials {
    directory: Option<PathBuf>,
}

impl Credentials {
    /// The directory given on the command line, else the one systemd gives in the environment.
    pub(crate) fn new(given: Option<&Path>, environment: Option<OsString>) -> Self {
        Self { directory: given.map(Path::to_owned).or_else(|| environment.map(PathBuf::from)) }
    }

    /// Reads one; a last newline, which editors add, is not part of it.
    fn read(&self, credential: Credential) -> Result<Zeroizing<Vec<u8>>, CredentialError> {
        let directory =
            self.directory.as_ref().ok_or(CredentialError::NoDirectory(credential.file_name()))?;
        read(directory.join(credential.file_name()))
    }

    /// Reads one that is text.
    pub(crate) fn text(&self, credential: Credential) -> Result<SecretString, CredentialError> {
        let bytes = self.read(credential)?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Ok(SecretString::from(text)),
            Err(_) => Err(CredentialError::NotText(self.path(credential))),
        }
    }

    /// Reads one that is text and need not be there.
    pub(crate) fn optional_text(
        &self,
        credential: Credential,
    ) -> Result<Option<SecretString>, CredentialError> {
        match self.text(credential) {
            Ok(secret) => Ok(Some(secret)),
            Err(CredentialError::NoDirectory(_) | CredentialError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn path(&self, credential: Credential) -> PathBuf {
        self.directory.clone().unwrap_or_default().join(credential.file_name())
    }
}

fn read(path: PathBuf) -> Result<Zeroizing<Vec<u8>>, CredentialError> {
    // What is checked is what is read: the open file, not its name.
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(CredentialError::Missing(path));
        }
        Err(source) => return Err(CredentialError::Read { path, source }),
    };
    let meta = match file.metadata() {
        Ok(meta) => meta,
        Err(source) => return Err(CredentialError::Read { path, source }),
    };
    if !meta.is_file() {
        return Err(CredentialError::NotAFile(path));
    }
    if meta.mode() & OTHERS != 0 {
        return Err(CredentialError::Open { path, mode: meta.mode() & 0o7777 });
    }
    if meta.uid() != 0 && meta.uid() != rustix::process::getuid().as_raw() {
        return Err(CredentialError::Owner { path, owner: meta.uid() });
    }
    if meta.len() > MAX_CREDENTIAL_BYTES {
        return Err(CredentialError::TooLarge(path));
    }
    // Room for all of it at once: a vector that grows leaves copies behind that nobody wipes.
    let mut secret =
        Zeroizing::new(Vec::with_capacity(usize::try_from(MAX_CREDENTIAL_BYTES).unwrap_or(65536) + 1));
    if let Err(source) = file.by_ref().take(MAX_CREDENTIAL_BYTES).read_to_end(&mut secret) {
        return Err(CredentialError::Read { path, source });
    }
    if secret.last() == Some(&b'\n') {
        secret.pop();
    }
    if secret.is_empty() { Err(CredentialError::Empty(path)) } else { Ok(secret) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn write(directory: &Path, text: &str, mode: u32) -> PathBuf {
        let path = directory.join("ca-passphrase");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_secret_is_read_without_its_last_newline() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "open sesame\n", 0o600);
        let credentials = Credentials::new(None, Some(directory.path().into()));
        assert_eq!(credentials.read(Credential::CaPassphrase).unwrap().as_slice(), b"open sesame");
        assert!(credentials.optional_text(Credential::JoinToken).unwrap().is_none());
        assert!(matches!(credentials.read(Credential::JoinToken), Err(CredentialError::Missing(_))));
    }

    #[test]
    fn security_19_a_secret_that_others_can_read_is_refused_with_the_command_that_mends_it() {
        let directory = tempfile::tempdir().unwrap();
        let credentials = Credentials::new(Some(directory.path()), None);
        for mode in [0o644, 0o640, 0o601] {
            let path = write(directory.path(), "x", mode);
            let error = credentials.optional_text(Credential::CaPassphrase).unwrap_err();
            assert_eq!(error.hint(), format!("chmod 0600 {}", path.display()));
            assert!(error.to_string().contains(&format!("{mode:04o}")));
        }
    }

    #[test]
    fn nothing_too_much_and_no_directory_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let credentials = Credentials::new(Some(directory.path()), None);
        write(directory.path(), "\n", 0o600);
        assert!(matches!(credentials.read(Credential::CaPassphrase), Err(CredentialError::Empty(_))));
        write(directory.path(), &"x".repeat(70_000), 0o600);
        assert!(matches!(credentials.read(Credential::CaPassphrase), Err(CredentialError::TooLarge(_))));
        let none = Credentials::new(None, None);
        assert!(matches!(
            none.read(Credential::CaPassphrase),
            Err(CredentialError::NoDirectory("ca-passphrase"))
        ));
    }
}
