//! The barrier: everything that the vault stores passes through it and is sealed.
//!
//! A record is `term (4 bytes) ‖ format (1) ‖ nonce (12) ‖ AES-256-GCM ciphertext and tag (16)`. Its key is
//! HKDF-SHA256 of the term's key and the record's storage path, so each path has a key of its own: the
//! bound of 2^32 random nonces a key (NIST SP 800-38D §8.3) counts the writes to one path under one term,
//! and a path is written once a durable commit. The associated data is format, term and path: a record
//! that is moved, cut or relabelled does not open.
//!
//! What it does not stop: someone who can write the database file putting back an *older* record of the
//! same path. Versions of a secret live at paths of their own, so a version cannot pose as another.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::random::{self, RandomError, SharedRandom};
use crate::storage::{Op, Storage, StorageError};

/// Bytes of every symmetric key.
pub const KEY_BYTES: usize = 32;
/// Largest record sealed: a body of the largest size plus what wraps it. GCM's own limit is 64 GiB.
pub const MAX_RECORD_BYTES: usize = 4 * 1024 * 1024;
/// Most terms a keyring holds: at one rotation a week, twenty years.
pub const MAX_TERMS: usize = 1024;
/// Where the wrapped keyring is stored.
pub const KEYRING_PATH: &str = "core/keyring";

const FORMAT: u8 = 1;
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
const HEADER_BYTES: usize = 4 + 1 + NONCE_BYTES;
const KEYRING_TERM: u32 = 0;

/// A symmetric key, wiped when dropped.
pub type Key = Zeroizing<[u8; KEY_BYTES]>;

/// Why the barrier gives or takes nothing.
#[derive(Debug, Error)]
pub enum BarrierError {
    /// No keyring in memory.
    #[error("the vault is sealed")]
    Sealed,
    /// A record is not one of ours, was altered or moved, or its term is unknown.
    #[error("the record {path} does not open: altered, moved, or of another vault")]
    Corrupt {
        /// Where it is stored.
        path: String,
    },
    /// Larger than [`MAX_RECORD_BYTES`].
    #[error("a record is larger than {MAX_RECORD_BYTES} bytes")]
    TooLarge,
    /// [`MAX_TERMS`] reached.
    #[error("the keyring holds {MAX_TERMS} terms already")]
    TooManyTerms,
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The store failed.
    #[error("the vault's storage failed")]
    Storage(#[from] StorageError),
}

/// What keys are derived for, apart from records. Each has its own HKDF label, and none changes when a
/// term is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// HMAC of tokens at rest.
    TokenHmac,
    /// HMAC of values in the audit file.
    AuditHmac,
}

impl Purpose {
    fn label(self) -> &'static [u8] {
        match self {
            Self::TokenHmac => b"palisade vault token hmac",
            Self::AuditHmac => b"palisade vault audit hmac",
        }
    }
}

/// Numbered keys: the newest seals, all open.
pub struct Keyring {
    terms: BTreeMap<u32, Key>,
    purposes: Key,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").field("terms", &self.terms.len()).finish_non_exhaustive()
    }
}

impl Keyring {
    /// A keyring of one fresh term.
    pub fn generate(random: &SharedRandom) -> Result<Self, RandomError> {
        let terms = BTreeMap::from([(1, random::secret(random.as_ref())?)]);
        Ok(Self { terms, purposes: random::secret(random.as_ref())? })
    }

    /// The number of the term that seals.
    pub fn term(&self) -> u32 {
        self.terms.last_key_value().map_or(KEYRING_TERM, |(term, _)| *term)
    }

    /// A key for one purpose.
    pub fn derive(&self, purpose: Purpose) -> Key {
        hkdf(&self.purposes, &[purpose.label()])
    }

    /// Seals `plaintext` as the record at `path` under the newest term.
    pub fn seal(&self, path: &str, plaintext: &[u8], random: &SharedRandom) -> Result<Vec<u8>, BarrierError> {
        let (term, key) = self.terms.last_key_value().ok_or(BarrierError::Sealed)?;
        seal_record(key, *term, path, plaintext, random)
    }

    /// Opens the record that is stored at `path`.
    pub fn open(&self, path: &str, record: &[u8]) -> Result<Zeroizing<Vec<u8>>, BarrierError> {
        let corrupt = || BarrierError::Corrupt { path: path.to_owned() };
        let term = record.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes)).ok_or_else(corrupt)?;
        let key = self.terms.get(&term).ok_or_else(corrupt)?;
        open_record(key, path, record)
    }

    /// The keyring as the record at [`KEYRING_PATH`], wrapped by `root_key`.
    pub fn wrap(&self, root_key: &Key, random: &SharedRandom) -> Result<Vec<u8>, BarrierError> {
        // Sized exactly, so that no half-written copy of the keys is left behind by a reallocation.
        let mut plain = Zeroizing::new(Vec::with_capacity(KEY_BYTES + self.terms.len() * (4 + KEY_BYTES)));
        plain.extend_from_slice(self.purposes.as_slice());
        for (term, key) in &self.terms {
            plain.extend_from_slice(&term.to_be_bytes());
            plain.extend_from_slice(key.as_slice());
        }
        seal_record(root_key, KEYRING_TERM, KEYRING_PATH, &plain, random)
    }

    /// The keyring out of its record.
    pub fn unwrap_with(root_key: &Key, record: &[u8]) -> Result<Self, BarrierError> {
        let corrupt = || BarrierError::Corrupt { path: KEYRING_PATH.to_owned() };
        let plain = open_record(root_key, KEYRING_PATH, record)?;
        let (purposes, mut rest) = plain.split_first_chunk::<KEY_BYTES>().ok_or_else(corrupt)?;
        let mut terms = BTreeMap::new();
        while let Some((term, after)) = rest.split_first_chunk::<4>() {
            let (key, after) = after.split_first_chunk::<KEY_BYTES>().ok_or_else(corrupt)?;
            terms.insert(u32::from_be_bytes(*term), Zeroizing::new(*key));
            rest = after;
        }
        if !rest.is_empty() || terms.is_empty() || terms.contains_key(&KEYRING_TERM) {
            return Err(corrupt());
        }
        Ok(Self { terms, purposes: Zeroizing::new(*purposes) })
    }

    fn with_new_term(&self, random: &SharedRandom) -> Result<Self, BarrierError> {
        if self.terms.len() >= MAX_TERMS {
            return Err(BarrierError::TooManyTerms);
        }
        let mut terms = self.terms.clone();
        terms.insert(self.term() + 1, random::secret(random.as_ref())?);
        Ok(Self { terms, purposes: self.purposes.clone() })
    }
}

/// One change, before it is sealed.
pub enum Change {
    /// Seal and write.
    Put {
        /// The record's path.
        path: String,
        /// What to seal.
        plaintext: Zeroizing<Vec<u8>>,
    },
    /// Remove.
    Delete {
        /// The record's path.
        path: String,
    },
}

/// A store seen through the keyring; without a keyring it is sealed and gives nothing.
#[derive(Debug)]
pub struct Barrier {
    storage: Arc<dyn Storage>,
    random: SharedRandom,
    keyring: RwLock<Option<Arc<Keyring>>>,
}

impl Barrier {
    /// A sealed barrier in front of `storage`.
    pub fn new(storage: Arc<dyn Storage>, random: SharedRandom) -> Self {
        Self { storage, random, keyring: RwLock::new(None) }
    }

    /// The store behind it, for the records that are not sealed by the keyring.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Opens the barrier with the keyring that `root_key` unwraps.
    pub async fn unseal(&self, root_key: &Key) -> Result<(), BarrierError> {
        let corrupt = || BarrierError::Corrupt { path: KEYRING_PATH.to_owned() };
        let record = self.storage.get(KEYRING_PATH).await?.ok_or_else(corrupt)?;
        let keyring = Keyring::unwrap_with(root_key, &record)?;
        *self.keyring.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(keyring));
        Ok(())
    }

    /// Forgets the keyring; its keys are wiped as soon as the last operation under way lets go of it.
    pub fn seal(&self) {
        *self.keyring.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether there is no keyring in memory.
    pub fn is_sealed(&self) -> bool {
        self.keyring.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// The keyring, if unsealed.
    pub fn keyring(&self) -> Result<Arc<Keyring>, BarrierError> {
        let keyring = self.keyring.read().unwrap_or_else(PoisonError::into_inner);
        keyring.clone().ok_or(BarrierError::Sealed)
    }

    /// Adds a term that seals from now on; records of earlier terms stay readable. Returns its number.
    /// The new keyring is durable before the first record is sealed with it.
    pub async fn rotate(&self, root_key: &Key) -> Result<u32, BarrierError> {
        let next = self.keyring()?.with_new_term(&self.random)?;
        let term = next.term();
        self.storage.put(KEYRING_PATH.to_owned(), next.wrap(root_key, &self.random)?).await?;
        *self.keyring.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(next));
        Ok(term)
    }

    /// Reads and opens the record at `path`.
    pub async fn get(&self, path: &str) -> Result<Option<Zeroizing<Vec<u8>>>, BarrierError> {
        let keyring = self.keyring()?;
        match self.storage.get(path).await? {
            Some(record) => keyring.open(path, &record).map(Some),
            None => Ok(None),
        }
    }

    /// What stands directly below `prefix`; sealed, it shows nothing.
    pub async fn list(&self, prefix: &str) -> Result<Vec<String>, BarrierError> {
        let _unsealed = self.keyring()?;
        Ok(self.storage.list(prefix).await?)
    }

    /// Seals and writes all the changes, or none.
    pub async fn transaction(&self, changes: Vec<Change>) -> Result<(), BarrierError> {
        let keyring = self.keyring()?;
        let ops = changes
            .into_iter()
            .map(|change| match change {
                Change::Put { path, plaintext } => {
                    let record = keyring.seal(&path, &plaintext, &self.random)?;
                    Ok(Op::Put { path, record })
                }
                Change::Delete { path } => Ok(Op::Delete { path }),
            })
            .collect::<Result<Vec<_>, BarrierError>>()?;
        Ok(self.storage.transaction(ops).await?)
    }
}

/// Seals `plaintext` under the key of `path`, labelled with `term`.
pub(crate) fn seal_record(
    key: &Key,
    term: u32,
    path: &str,
    plaintext: &[u8],
    random: &SharedRandom,
) -> Result<Vec<u8>, BarrierError> {
    if plaintext.len() > MAX_RECORD_BYTES {
        return Err(BarrierError::TooLarge);
    }
    let nonce: [u8; NONCE_BYTES] = random::public(random.as_ref())?;
    // Sealed in place behind the header, in a buffer that never grows: no stray copy of the plaintext.
    let mut record = Vec::with_capacity(HEADER_BYTES + plaintext.len() + TAG_BYTES);
    record.extend_from_slice(&term.to_be_bytes());
    record.push(FORMAT);
    record.extend_from_slice(&nonce);
    record.extend_from_slice(plaintext);
    let body = record.get_mut(HEADER_BYTES..).ok_or(BarrierError::TooLarge)?;
    let tag = record_key(key, path)?
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(associated_data(term, path)),
            body,
        )
        .map_err(|_| BarrierError::TooLarge)?;
    record.extend_from_slice(tag.as_ref());
    Ok(record)
}

/// Opens a record under the key of `path`.
pub(crate) fn open_record(key: &Key, path: &str, record: &[u8]) -> Result<Zeroizing<Vec<u8>>, BarrierError> {
    let corrupt = || BarrierError::Corrupt { path: path.to_owned() };
    let (term, rest) = record.split_first_chunk::<4>().ok_or_else(corrupt)?;
    let (format, rest) = rest.split_first().ok_or_else(corrupt)?;
    let (nonce, sealed) = rest.split_first_chunk::<NONCE_BYTES>().ok_or_else(corrupt)?;
    if *format != FORMAT {
        return Err(corrupt());
    }
    let mut buffer = Zeroizing::new(sealed.to_vec());
    let aad = Aad::from(associated_data(u32::from_be_bytes(*term), path));
    let length = record_key(key, path)?
        .open_in_place(Nonce::assume_unique_for_key(*nonce), aad, buffer.as_mut_slice())
        .map_err(|_| corrupt())?
        .len();
    buffer.truncate(length);
    Ok(buffer)
}

fn associated_data(term: u32, path: &str) -> Vec<u8> {
    [&[FORMAT][..], &term.to_be_bytes(), path.as_bytes()].concat()
}

/// ring does not wipe its keys: this one lives for one record.
fn record_key(key: &Key, path: &str) -> Result<LessSafeKey, BarrierError> {
    let derived = hkdf(key, &[b"palisade vault record", path.as_bytes()]);
    let unbound = UnboundKey::new(&AES_256_GCM, derived.as_slice()).map_err(|_| BarrierError::TooLarge)?;
    Ok(LessSafeKey::new(unbound))
}

/// HKDF-SHA256 (RFC 5869) without salt: the input is uniformly random already.
pub(crate) fn hkdf(key: &Key, info: &[&[u8]]) -> Key {
    struct KeyLength;
    impl KeyType for KeyLength {
        fn len(&self) -> usize {
            KEY_BYTES
        }
    }
    let secret: Prk = Salt::new(HKDF_SHA256, &[]).extract(key.as_slice());
    // Length-prefixed parts: no two lists of labels spell the same text.
    let lengths: Vec<[u8; 4]> =
        info.iter().map(|part| u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes()).collect();
    let parts: Vec<&[u8]> =
        lengths.iter().zip(info).flat_map(|(length, part)| [length.as_slice(), part]).collect();
    let mut derived = Zeroizing::new([0; KEY_BYTES]);
    let filled = secret.expand(&parts, KeyLength).and_then(|okm| okm.fill(derived.as_mut_slice()));
    // INVARIANT: HKDF-SHA256 fails only above 255 × 32 bytes of output; 32 are asked for.
    debug_assert!(filled.is_ok(), "HKDF of 32 bytes cannot fail");
    derived
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use ring::rand::SystemRandom;

    use super::*;
    use crate::storage::tests::scratch;

    pub(crate) fn random() -> SharedRandom {
        Arc::new(SystemRandom::new())
    }

    /// An unsealed barrier over a store of its own, and its root key.
    pub(crate) async fn unsealed() -> (tempfile::TempDir, Barrier, Key) {
        let (directory, storage) = scratch();
        let root_key: Key = random::secret(random().as_ref()).unwrap();
        let keyring = Keyring::generate(&random()).unwrap();
        storage.put(KEYRING_PATH.into(), keyring.wrap(&root_key, &random()).unwrap()).await.unwrap();
        let barrier = Barrier::new(storage, random());
        barrier.unseal(&root_key).await.unwrap();
        (directory, barrier, root_key)
    }

    fn put(path: &str, text: &str) -> Change {
        Change::Put { path: path.into(), plaintext: Zeroizing::new(text.as_bytes().to_vec()) }
    }

    #[tokio::test]
    async fn a_record_moved_to_another_path_does_not_open() {
        let (_directory, barrier, _) = unsealed().await;
        barrier.transaction(vec![put("kv/a", "of a"), put("kv/b", "of b")]).await.unwrap();
        let stolen = barrier.storage().get("kv/a").await.unwrap().unwrap();
        barrier.storage().put("kv/b".into(), stolen).await.unwrap();
        assert_eq!(barrier.get("kv/a").await.unwrap().unwrap().as_slice(), b"of a");
        assert!(matches!(barrier.get("kv/b").await, Err(BarrierError::Corrupt { path }) if path == "kv/b"));
    }

    #[test]
    fn a_bit_flipped_in_any_byte_and_any_cut_are_found() {
        let keyring = Keyring::generate(&random()).unwrap();
        let record = keyring.seal("p", b"some secret", &random()).unwrap();
        assert_eq!(keyring.open("p", &record).unwrap().as_slice(), b"some secret");
        for at in 0..record.len() {
            for bit in 0..8 {
                let mut altered = record.clone();
                altered[at] ^= 1 << bit;
                assert!(keyring.open("p", &altered).is_err(), "byte {at} bit {bit}");
            }
            assert!(keyring.open("p", &record[..at]).is_err(), "cut at {at}");
        }
        assert!(keyring.open("p", &[&record[..], &[0]].concat()).is_err());
    }

    #[test]
    fn security_39_nonces_are_unique_across_restarts_and_keys_differ_by_path() {
        let root_key: Key = random::secret(random().as_ref()).unwrap();
        let wrapped = Keyring::generate(&random()).unwrap().wrap(&root_key, &random()).unwrap();
        let mut nonces = HashSet::new();
        for _restart in 0..20 {
            let keyring = Keyring::unwrap_with(&root_key, &wrapped).unwrap();
            for _ in 0..200 {
                let record = keyring.seal("p", b"same", &random()).unwrap();
                assert!(nonces.insert(record[5..17].to_vec()), "a nonce repeats under one key");
            }
        }
        let key: Key = random::secret(random().as_ref()).unwrap();
        assert_ne!(hkdf(&key, &[b"l", b"a"]), hkdf(&key, &[b"l", b"b"]));
        assert_ne!(hkdf(&key, &[b"l", b"a"]), hkdf(&key, &[b"la", b""]));
    }

    #[tokio::test]
    async fn after_a_rotation_old_records_open_and_new_ones_carry_the_new_term() {
        let (_directory, barrier, root_key) = unsealed().await;
        barrier.transaction(vec![put("kv/old", "before")]).await.unwrap();
        assert_eq!(barrier.rotate(&root_key).await.unwrap(), 2);
        barrier.transaction(vec![put("kv/new", "after")]).await.unwrap();
        let record = barrier.storage().get("kv/new").await.unwrap().unwrap();
        assert_eq!(record[..4], 2u32.to_be_bytes());
        // A restart reads the same keyring.
        barrier.seal();
        assert!(matches!(barrier.get("kv/old").await, Err(BarrierError::Sealed)));
        barrier.unseal(&root_key).await.unwrap();
        assert_eq!(barrier.get("kv/old").await.unwrap().unwrap().as_slice(), b"before");
        assert_eq!(barrier.get("kv/new").await.unwrap().unwrap().as_slice(), b"after");
    }

    #[tokio::test]
    async fn sealed_nothing_is_read_written_or_listed() {
        let (_directory, barrier, root_key) = unsealed().await;
        barrier.transaction(vec![put("kv/a", "x")]).await.unwrap();
        barrier.seal();
        assert!(barrier.is_sealed());
        assert!(matches!(barrier.get("kv/a").await, Err(BarrierError::Sealed)));
        assert!(matches!(barrier.list("kv/").await, Err(BarrierError::Sealed)));
        assert!(matches!(barrier.transaction(vec![put("kv/b", "y")]).await, Err(BarrierError::Sealed)));
        let wrong: Key = random::secret(random().as_ref()).unwrap();
        assert!(barrier.unseal(&wrong).await.is_err());
        assert!(barrier.is_sealed());
        barrier.unseal(&root_key).await.unwrap();
    }

    #[tokio::test]
    async fn nothing_stored_shows_the_plaintext() {
        let (directory, barrier, _) = unsealed().await;
        barrier.transaction(vec![put("kv/a", "a very recognisable secret")]).await.unwrap();
        drop(barrier);
        let file = std::fs::read(directory.path().join("state/vault.redb")).unwrap();
        assert!(!file.windows(17).any(|window| window == b"very recognisable"));
    }

    #[test]
    fn debug_output_holds_no_key() {
        let keyring = Keyring::generate(&random()).unwrap();
        assert_eq!(format!("{keyring:?}"), "Keyring { terms: 1, .. }");
    }

    proptest! {
        #[test]
        fn no_bytes_open_or_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let keyring = Keyring::generate(&random()).unwrap();
            prop_assert!(keyring.open("p", &bytes).is_err());
            let root_key: Key = Zeroizing::new([7; 32]);
            prop_assert!(Keyring::unwrap_with(&root_key, &bytes).is_err());
        }
    }
}
