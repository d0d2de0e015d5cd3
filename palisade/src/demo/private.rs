//! The demo's secrets: made at random once for a state directory, each in a file that only its owner
//! reads, laid out as systemd would hand them to each role (`$CREDENTIALS_DIRECTORY/NAME`).
//!
//! A real deployment keeps them in `LoadCredentialEncrypted=`, a TPM or a KMS; the demo's owner holds
//! them all, and the ready file says so.

use std::error::Error;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use identity::files::write_private;
use identity::jws;
use ring::rand::SecureRandom;
use secrecy::{ExposeSecret as _, SecretString};

use crate::failure::Failure;

/// Entropy of keys and passphrases.
const KEY_BYTES: usize = 32;
/// Letters of a password that a person may type: no two that look alike.
const PASSWORD_LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// Letters in it, in groups of four: 80 bits.
const PASSWORD_LENGTH: usize = 16;

/// Reads the secret at `path`, or makes and writes it.
pub(crate) fn keep(
    path: &Path,
    make: impl FnOnce() -> Result<SecretString, Failure>,
) -> Result<SecretString, Failure> {
    match std::fs::read_to_string(path) {
        Ok(text) if !text.trim().is_empty() => Ok(text.trim().to_owned().into()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::new(format!("{} cannot be read", path.display())).because(&error))
        }
        _ => {
            let secret = make()?;
            write(path, secret.expose_secret().as_bytes())?;
            Ok(secret)
        }
    }
}

/// Writes a file that only its owner reads, whole or not at all; makes its directory.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let failed =
        |cause: &dyn Error| Failure::new(format!("{} cannot be written", path.display())).because(cause);
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|error| failed(&error))?;
    }
    write_private(path, content).map_err(|error| failed(&error))
}

/// A random key, as text.
pub(crate) fn key(random: &dyn SecureRandom) -> Result<SecretString, Failure> {
    let mut bytes = zeroize::Zeroizing::new([0; KEY_BYTES]);
    fill(random, &mut *bytes)?;
    Ok(jws::encode(*bytes).into())
}

/// A random password that a person can type: `k3mp-x7ad-…`.
pub(crate) fn password(random: &dyn SecureRandom) -> Result<SecretString, Failure> {
    let mut bytes = zeroize::Zeroizing::new([0; PASSWORD_LENGTH]);
    fill(random, &mut *bytes)?;
    let mut text = String::new();
    for (at, byte) in bytes.iter().enumerate() {
        if at > 0 && at % 4 == 0 {
            text.push('-');
        }
        // 32 letters: every byte picks one evenly.
        text.extend(PASSWORD_LETTERS.get(usize::from(byte % 32)).copied().map(char::from));
    }
    Ok(text.into())
}

fn fill(random: &dyn SecureRandom, bytes: &mut [u8]) -> Result<(), Failure> {
    random.fill(bytes).map_err(|_| Failure::new("the machine gives no randomness"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_secret_is_made_once_and_is_its_owners_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("credentials/gateway/session-key");
        let random = ring::rand::SystemRandom::new();
        let first = keep(&path, || key(&random)).unwrap();
        let second = keep(&path, || panic!("made twice")).unwrap();
        assert_eq!(first.expose_secret(), second.expose_secret());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn passwords_differ_and_can_be_typed() {
        let random = ring::rand::SystemRandom::new();
        let (one, two) = (password(&random).unwrap(), password(&random).unwrap());
        assert_ne!(one.expose_secret(), two.expose_secret());
        let text = one.expose_secret();
        assert_eq!(text.len(), 19);
        assert!(text.bytes().all(|b| b == b'-' || PASSWORD_LETTERS.contains(&b)));
    }
}
