//! The root's certificate and key on disk: `authority.json`, the key sealed under a passphrase.
//!
//! AES-256-GCM (NIST SP 800-38D) under a key that argon2id (RFC 9106) makes from the passphrase and a
//! random salt. Certificate, trust domain and parameters are bound to the sealed key as associated data,
//! so none of them can be exchanged. A digest over all fields tells a torn file from a wrong passphrase.

use std::path::{Path, PathBuf};

use argon2::{Algorithm, Argon2, Params, Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls_pki_types::CertificateDer;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use identity::TrustDomain;

use crate::authority::{Authority, AuthorityError};
use crate::hex;
use crate::random::{Random, RandomError};
use crate::state::{self, StateError};

/// Name of the file in the state directory.
pub(crate) const FILE_NAME: &str = "authority.json";

/// argon2id memory. With [`PASSES`] the second recommendation of RFC 9106 §4 scaled to a machine that
/// also runs the mesh: 64 MiB, three passes.
const MEMORY_KIB: u32 = 64 * 1024;
const PASSES: u32 = 3;
const LANES: u32 = 1;
/// Most memory that a stored file may ask for, so that a changed file cannot exhaust the machine.
const MAX_MEMORY_KIB: u32 = 1024 * 1024;
const MAX_PASSES: u32 = 64;
const SALT_BYTES: usize = 16;
const KEY_BYTES: usize = 32;

/// Why the root could not be stored or opened.
#[derive(Debug, Error)]
pub enum KeyFileError {
    /// The file or its directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// Cut short or changed.
    #[error("{} is damaged (cut short or changed); restore it from a backup", .0.display())]
    Damaged(PathBuf),
    /// Written by a later version.
    #[error("{} has version {version}, which this program does not know", path.display())]
    Version {
        /// Which file.
        path: PathBuf,
        /// What it says.
        version: u32,
    },
    /// Of another trust domain.
    #[error("{} holds the root of trust domain {found}, not of {wanted}", path.display())]
    TrustDomain {
        /// Which file.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What is configured.
        wanted: TrustDomain,
    },
    /// The passphrase does not open it.
    #[error("the passphrase does not open {}", .0.display())]
    Passphrase(PathBuf),
    /// Key derivation failed: parameters out of range or no memory.
    #[error("the key derivation failed")]
    Derivation,
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The contents are no authority.
    #[error("the stored authority is unusable")]
    Authority(#[from] AuthorityError),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    bound: Bound,
    nonce: String,
    sealed: String,
    digest: String,
}

/// What is bound to the sealed key.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bound {
    version: u32,
    trust_domain: String,
    certificate: String,
    kdf: String,
    memory_kib: u32,
    passes: u32,
    lanes: u32,
    salt: String,
}

const VERSION: u32 = 1;
const KDF: &str = "argon2id";

/// Seals `authority` under `passphrase` and writes it. Costs memory and time: not for an async thread.
pub(crate) fn save(
    directory: &Path,
    authority: &Authority,
    passphrase: &SecretString,
    random: &dyn Random,
) -> Result<(), KeyFileError> {
    let (mut salt, mut nonce) = ([0u8; SALT_BYTES], [0u8; NONCE_LEN]);
    random.fill(&mut salt)?;
    random.fill(&mut nonce)?;
    let bound = Bound {
        version: VERSION,
        trust_domain: authority.trust_domain().to_string(),
        certificate: STANDARD.encode(authority.certificate()),
        kdf: KDF.to_owned(),
        memory_kib: MEMORY_KIB,
        passes: PASSES,
        lanes: LANES,
        salt: STANDARD.encode(salt),
    };
    let key = derive(&bound, &salt, passphrase)?;
    let mut sealed = authority.key_pkcs8();
    // The key above is derived anew, with a new salt, for every file: its nonce is used once.
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), associated(&bound)?, &mut *sealed)
        .map_err(|_| KeyFileError::Derivation)?;
    let (nonce, sealed) = (STANDARD.encode(nonce), STANDARD.encode(&*sealed));
    let digest = digest(&bound, &nonce, &sealed)?;
    let text = serde_json::to_vec_pretty(&File { bound, nonce, sealed, digest })
        .map_err(|_| KeyFileError::Derivation)?;
    Ok(state::write_private(&directory.join(FILE_NAME), &text)?)
}

/// Opens the stored authority; `None` if there is none. Costs memory and time: not for an async thread.
pub(crate) fn load(
    directory: &Path,
    trust_domain: &TrustDomain,
    passphrase: &SecretString,
) -> Result<Option<Authority>, KeyFileError> {
    let path = directory.join(FILE_NAME);
    let Some(text) = state::read_private(&path)? else { return Ok(None) };
    let damaged = || KeyFileError::Damaged(path.clone());
    let file: File = serde_json::from_slice(&text).map_err(|_| damaged())?;
    let File { bound, nonce, sealed, digest: stored } = file;
    if bound.version != VERSION || bound.kdf != KDF {
        return Err(KeyFileError::Version { path, version: bound.version });
    }
    if digest(&bound, &nonce, &sealed)? != stored {
        return Err(damaged());
    }
    if bound.trust_domain != trust_domain.as_str() {
        let (found, wanted) = (bound.trust_domain, trust_domain.clone());
        return Err(KeyFileError::TrustDomain { path, found, wanted });
    }
    let bytes = |text: &str| STANDARD.decode(text).map_err(|_| damaged());
    let certificate = CertificateDer::from(bytes(&bound.certificate)?);
    let nonce = Nonce::try_assume_unique_for_key(&bytes(&nonce)?).map_err(|_| damaged())?;
    let mut sealed = Zeroizing::new(bytes(&sealed)?);
    let key = derive(&bound, &bytes(&bound.salt)?, passphrase)?;
    let plain = key
        .open_in_place(nonce, associated(&bound)?, &mut sealed)
        .map_err(|_| KeyFileError::Passphrase(path.clone()))?;
    let pkcs8 = Zeroizing::new(plain.to_vec());
    Ok(Some(Authority::restore(trust_domain.clone(), certificate, &pkcs8)?))
}

fn derive(bound: &Bound, salt: &[u8], passphrase: &SecretString) -> Result<LessSafeKey, KeyFileError> {
    if bound.memory_kib > MAX_MEMORY_KIB || bound.passes > MAX_PASSES {
        return Err(KeyFileError::Derivation);
    }
    let params = Params::new(bound.memory_kib, bound.passes, bound.lanes, Some(KEY_BYTES))
        .map_err(|_| KeyFileError::Derivation)?;
    let mut key = Zeroizing::new([0u8; KEY_BYTES]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(passphrase.expose_secret().as_bytes(), salt, &mut *key)
        .map_err(|_| KeyFileError::Derivation)?;
    UnboundKey::new(&AES_256_GCM, &*key).map(LessSafeKey::new).map_err(|_| KeyFileError::Derivation)
}

fn associated(bound: &Bound) -> Result<Aad<Vec<u8>>, KeyFileError> {
    serde_json::to_vec(bound).map(Aad::from).map_err(|_| KeyFileError::Derivation)
}

fn digest(bound: &Bound, nonce: &str, sealed: &str) -> Result<String, KeyFileError> {
    let text = serde_json::to_vec(&(bound, nonce, sealed)).map_err(|_| KeyFileError::Derivation)?;
    Ok(hex::sha256(&text))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;
    use crate::authority::DEFAULT_ROOT_TTL;
    use crate::random::SystemRandom;

    #[test]
    fn the_root_survives_a_restart_and_only_the_passphrase_opens_it() {
        let directory = tempfile::tempdir().unwrap();
        let domain = TrustDomain::new("bank.example").unwrap();
        let random = SystemRandom::shared();
        let right = SecretString::from("correct horse");
        assert!(load(directory.path(), &domain, &right).unwrap().is_none());
        let now = Duration::from_secs(1_800_000_000);
        let made = Authority::generate(domain.clone(), DEFAULT_ROOT_TTL, &*random, now).unwrap();
        save(directory.path(), &made, &right, &*random).unwrap();

        let opened = load(directory.path(), &domain, &right).unwrap().unwrap();
        assert_eq!(opened.certificate(), made.certificate());
        let wrong = load(directory.path(), &domain, &SecretString::from("wrong")).unwrap_err();
        assert!(matches!(wrong, KeyFileError::Passphrase(_)), "{wrong}");
        let other = load(directory.path(), &TrustDomain::new("other.example").unwrap(), &right).unwrap_err();
        assert!(matches!(other, KeyFileError::TrustDomain { .. }), "{other}");

        let path = directory.path().join(FILE_NAME);
        let text = fs::read_to_string(&path).unwrap();
        for pkcs8_or_passphrase in [STANDARD.encode(&*made.key_pkcs8()), "correct horse".to_owned()] {
            assert!(!text.contains(&pkcs8_or_passphrase));
        }
        for torn in [&text[..text.len() / 2], "", &text.replacen("\"passes\": 3", "\"passes\": 2", 1)] {
            state::write_private(&path, torn.as_bytes()).unwrap();
            let error = load(directory.path(), &domain, &right).unwrap_err();
            assert!(matches!(error, KeyFileError::Damaged(_)), "{error}");
        }
    }
}
