//! Sealing what must come back unchanged and unread: session records at rest, login state in a URL.
//!
//! AES-256-GCM under a key derived for each context (HKDF-SHA-256), so that a random 96-bit nonce never
//! comes near its bound of 2^32 messages a key, and a text sealed for one purpose opens for no other.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use ring::rand::SecureRandom;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::config::SealKey;

const KEY_ID_BYTES: usize = 4;
const SALT: &[u8] = b"palisade gateway seal 1";

/// Sealing or opening failed. Which check failed is nobody's business.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("cannot seal or open")]
pub struct SealError;

/// Seals with the first of its keys, opens with any.
pub struct Sealer(Vec<(KeyId, Prk)>);

type KeyId = [u8; KEY_ID_BYTES];

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer")
    }
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

impl Sealer {
    /// A sealer over `keys`, of which there is at least one.
    pub fn new(keys: &[SealKey]) -> Result<Self, SealError> {
        let keys = keys.iter().map(|key| Self::root(key.bytes())).collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() { Err(SealError) } else { Ok(Self(keys)) }
    }

    /// A sealer over raw key bytes that live as long as the process.
    pub fn from_bytes(key: &[u8]) -> Result<Self, SealError> {
        Ok(Self(vec![Self::root(key)?]))
    }

    fn root(key: &[u8]) -> Result<(KeyId, Prk), SealError> {
        let prk = Salt::new(HKDF_SHA256, SALT).extract(key);
        let mut id = KeyId::default();
        expand(&prk, b"id", b"", &mut id)?;
        Ok((id, prk))
    }

    /// Seals `plain` for `context` and whatever `bound` says; both must be the same to open it.
    pub fn seal(
        &self,
        random: &dyn SecureRandom,
        context: &[u8],
        bound: &[u8],
        plain: &[u8],
    ) -> Result<Vec<u8>, SealError> {
        let (id, prk) = self.0.first().ok_or(SealError)?;
        let mut nonce = [0; NONCE_LEN];
        random.fill(&mut nonce).map_err(|_| SealError)?;
        let mut sealed = Vec::with_capacity(KEY_ID_BYTES + NONCE_LEN + plain.len() + AES_256_GCM.tag_len());
        sealed.extend_from_slice(id);
        sealed.extend_from_slice(&nonce);
        let mut text = plain.to_vec();
        derive(prk, context)?
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(bound), &mut text)
            .map_err(|_| SealError)?;
        sealed.append(&mut text);
        Ok(sealed)
    }

    /// Opens what [`Sealer::seal`] made.
    pub fn open(&self, context: &[u8], bound: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (id, rest) = sealed.split_first_chunk::<KEY_ID_BYTES>().ok_or(SealError)?;
        let (nonce, text) = rest.split_first_chunk::<NONCE_LEN>().ok_or(SealError)?;
        let (_, prk) = self.0.iter().find(|(known, _)| known == id).ok_or(SealError)?;
        let mut text = Zeroizing::new(text.to_vec());
        let length = derive(prk, context)?
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(bound), &mut text)
            .map_err(|_| SealError)?
            .len();
        text.truncate(length);
        Ok(text)
    }
}

fn derive(prk: &Prk, context: &[u8]) -> Result<LessSafeKey, SealError> {
    let mut key = Zeroizing::new([0; 32]);
    expand(prk, b"key", context, key.as_mut())?;
    Ok(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_ref()).map_err(|_| SealError)?))
}

fn expand(prk: &Prk, label: &[u8], context: &[u8], out: &mut [u8]) -> Result<(), SealError> {
    let info = [label, b"\0", context];
    let okm = prk.expand(&info, Length(out.len())).map_err(|_| SealError)?;
    okm.fill(out).map_err(|_| SealError)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ring::rand::SystemRandom;

    use super::*;

    fn key(text: &str) -> SealKey {
        SealKey::new(text.repeat(32).into()).unwrap()
    }

    #[test]
    fn gateway_22_a_record_opens_only_under_its_context_binding_and_a_live_key() {
        let random = SystemRandom::new();
        let old = Sealer::new(&[key("a")]).unwrap();
        let both = Sealer::new(&[key("b"), key("a")]).unwrap();
        let new = Sealer::new(&[key("b")]).unwrap();
        let sealed = old.seal(&random, b"session 1", b"version 1", b"alice").unwrap();
        assert_eq!(both.open(b"session 1", b"version 1", &sealed).unwrap().as_slice(), b"alice");
        assert_eq!(both.open(b"session 2", b"version 1", &sealed), Err(SealError));
        assert_eq!(both.open(b"session 1", b"version 2", &sealed), Err(SealError));
        assert_eq!(new.open(b"session 1", b"version 1", &sealed), Err(SealError));
        let resealed = both.seal(&random, b"c", b"", b"x").unwrap();
        assert!(new.open(b"c", b"", &resealed).is_ok() && old.open(b"c", b"", &resealed).is_err());
        assert!(Sealer::new(&[]).is_err());
        assert!(SealKey::new("short".to_owned().into()).is_err());
    }

    proptest! {
        #[test]
        fn any_changed_bit_is_noticed(at in 0usize..37, bit in 0u8..8) {
            let sealer = Sealer::new(&[key("a")]).unwrap();
            let mut sealed = sealer.seal(&SystemRandom::new(), b"c", b"b", b"alice").unwrap();
            prop_assert_eq!(sealed.len(), 37);
            sealed[at] ^= 1 << bit;
            prop_assert_eq!(sealer.open(b"c", b"b", &sealed), Err(SealError));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..48)) {
            prop_assert!(Sealer::new(&[key("a")]).unwrap().open(b"c", b"b", &bytes).is_err());
        }
    }
}
