//! Values sealed at rest: AES-256-GCM under the database key from the vault.
//!
//! A sealed value is `format (1) ‖ salt (16) ‖ nonce (12) ‖ ciphertext and tag`. The key that seals it
//! is HKDF-SHA-256(database key, salt) (RFC 5869), fresh for every value: with random 96-bit nonces
//! under one key, AES-GCM must stop after 2^32 values (NIST SP 800-38D, section 8.3), which a busy
//! ledger reaches within weeks. The table and the row's key are the associated data, so that a value
//! copied to another row does not open.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Prk, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

/// An AES-256 key's worth, as the vault holds it.
pub(super) const DATABASE_KEY_BYTES: usize = 32;
const FORMAT: u8 = 1;
const SALT_BYTES: usize = 16;
const HEADER_BYTES: usize = 1 + SALT_BYTES + NONCE_LEN;
const PURPOSE: &[u8] = b"bank accounts row v1";

/// The database key, as it comes from the vault; wiped when dropped.
pub(super) type DatabaseKey = Zeroizing<[u8; DATABASE_KEY_BYTES]>;

/// Why a value cannot be sealed or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum SealError {
    #[error("no randomness from the operating system")]
    Randomness,
    #[error("the value cannot be sealed")]
    Seal,
    #[error("the value is not one sealed under this key for this row")]
    Open,
}

/// Seals and opens values.
pub(super) struct Sealer {
    root: Prk,
    random: SystemRandom,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(..)")
    }
}

impl Sealer {
    pub(super) fn new(key: &DatabaseKey) -> Self {
        Self { root: Salt::new(HKDF_SHA256, PURPOSE).extract(key.as_slice()), random: SystemRandom::new() }
    }

    /// Seals `value` for `row` of `table`.
    pub(super) fn seal(&self, table: &str, row: &str, value: &[u8]) -> Result<Vec<u8>, SealError> {
        let mut salt = [0; SALT_BYTES];
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut salt).map_err(|_| SealError::Randomness)?;
        self.random.fill(&mut nonce).map_err(|_| SealError::Randomness)?;

        let mut body = value.to_vec();
        self.key(&salt)
            .and_then(|key| {
                let aad = Aad::from(associated(table, row));
                key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut body).ok()
            })
            .ok_or(SealError::Seal)?;

        let mut sealed = Vec::with_capacity(HEADER_BYTES + body.len());
        sealed.push(FORMAT);
        sealed.extend_from_slice(&salt);
        sealed.extend_from_slice(&nonce);
        sealed.append(&mut body);
        Ok(sealed)
    }

    /// Opens what [`Sealer::seal`] made for the same `row` of the same `table`.
    pub(super) fn open(
        &self,
        table: &str,
        row: &str,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (&format, rest) = sealed.split_first().ok_or(SealError::Open)?;
        let (salt, rest) = rest.split_first_chunk::<SALT_BYTES>().ok_or(SealError::Open)?;
        let (nonce, body) = rest.split_first_chunk::<NONCE_LEN>().ok_or(SealError::Open)?;
        if format != FORMAT {
            return Err(SealError::Open);
        }
        let key = self.key(salt).ok_or(SealError::Open)?;
        let mut body = Zeroizing::new(body.to_vec());
        let aad = Aad::from(associated(table, row));
        let length = key
            .open_in_place(Nonce::assume_unique_for_key(*nonce), aad, &mut body)
            .map_err(|_| SealError::Open)?
            .len();
        body.truncate(length);
        Ok(body)
    }

    fn key(&self, salt: &[u8; SALT_BYTES]) -> Option<LessSafeKey> {
        let key = UnboundKey::from(self.root.expand(&[salt], &AES_256_GCM).ok()?);
        Some(LessSafeKey::new(key))
    }
}

/// No table's name holds a zero byte, so the pair is unambiguous.
fn associated(table: &str, row: &str) -> Vec<u8> {
    [table.as_bytes(), &[0], row.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer(byte: u8) -> Sealer {
        Sealer::new(&Zeroizing::new([byte; DATABASE_KEY_BYTES]))
    }

    #[test]
    fn a_value_opens_in_its_own_row_only() {
        let sealed = sealer(1).seal("accounts", "17", b"250000").unwrap();
        assert_eq!(sealer(1).open("accounts", "17", &sealed).unwrap().as_slice(), b"250000");
        assert_eq!(sealer(1).open("accounts", "42", &sealed), Err(SealError::Open));
        assert_eq!(sealer(1).open("transfers", "17", &sealed), Err(SealError::Open));
        assert_eq!(sealer(2).open("accounts", "17", &sealed), Err(SealError::Open));
    }

    #[test]
    fn any_changed_or_missing_byte_is_noticed() {
        let sealed = sealer(1).seal("accounts", "17", b"250000").unwrap();
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(sealer(1).open("accounts", "17", &changed), Err(SealError::Open), "byte {at}");
            assert_eq!(sealer(1).open("accounts", "17", &sealed[..at]), Err(SealError::Open), "cut at {at}");
        }
    }

    #[test]
    fn the_same_value_never_looks_the_same_and_never_shows() {
        let one = sealer(1).seal("accounts", "17", b"a balance in plain").unwrap();
        let two = sealer(1).seal("accounts", "17", b"a balance in plain").unwrap();
        assert_ne!(one[1..], two[1..]);
        assert!(!one.windows(7).any(|window| window == b"balance"));
        assert_eq!(format!("{:?}", sealer(1)), "Sealer(..)");
    }
}
