//! The seal: what stands between a stopped vault and its root key.
//!
//! A random unseal key wraps the root key, the root key wraps the keyring. The unseal key is split by
//! Shamir's scheme over GF(2^8) into `n` shares of which any `k` make it again; with one share, the share
//! *is* the unseal key. It is never stored. A check value tells a wrong set of shares from a damaged store.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use identity::hex;
use ring::hmac;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::{Zeroize as _, Zeroizing};

use crate::barrier::{self, BarrierError, KEY_BYTES, Key};
use crate::random::{self, RandomError, SharedRandom};

/// Most shares: identifiers are the non-zero elements of GF(2^8).
pub const MAX_SHARES: u8 = 255;
/// Where the seal configuration is stored: in the clear, it holds nothing that opens anything.
pub const SEAL_PATH: &str = "core/seal";

const ROOT_KEY_PATH: &str = "core/root-key";
const UNSEAL_TERM: u32 = 0;
const CHECK_LABEL: &[u8] = b"palisade vault unseal key check";
const FORMAT: u32 = 1;

/// A share of the unseal key, wiped when dropped.
pub type Share = Zeroizing<Vec<u8>>;

/// Why keys cannot be made, or do not open the seal.
#[derive(Debug, Error)]
pub enum SealError {
    /// `secret_shares` or `secret_threshold` out of range.
    #[error("{0}")]
    Parameters(&'static str),
    /// The text is neither hexadecimal nor base64, or of an impossible length.
    #[error("'key' must be a valid hex or base64 string")]
    Encoding,
    /// The shares do not make this vault's unseal key.
    #[error("invalid key: the shares given do not make this vault's unseal key")]
    WrongKey,
    /// The stored configuration cannot be read.
    #[error("the stored seal configuration is damaged")]
    Config,
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The wrapped root key does not open although the unseal key is right, or the store failed.
    #[error(transparent)]
    Barrier(#[from] BarrierError),
}

/// The stored seal configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealConfig {
    format: u32,
    /// How many shares there are.
    pub shares: u8,
    /// How many of them are needed.
    pub threshold: u8,
    /// Names this vault: shown as `cluster_id`.
    pub cluster_id: String,
    check: String,
    wrapped_root_key: String,
}

impl SealConfig {
    /// A fresh unseal key around `root_key`: the configuration to store and the shares to give out.
    pub fn create(
        shares: u8,
        threshold: u8,
        root_key: &Key,
        random: &SharedRandom,
    ) -> Result<(Self, Vec<Share>), SealError> {
        check_parameters(shares, threshold)?;
        let unseal_key: Key = random::secret(random.as_ref())?;
        let wrapped =
            barrier::seal_record(&unseal_key, UNSEAL_TERM, ROOT_KEY_PATH, root_key.as_slice(), random)?;
        let config = Self {
            format: FORMAT,
            shares,
            threshold,
            cluster_id: random::uuid(random.as_ref())?,
            check: STANDARD.encode(hmac::sign(&check_key(&unseal_key), CHECK_LABEL)),
            wrapped_root_key: STANDARD.encode(wrapped),
        };
        Ok((config, split(&unseal_key, shares, threshold, random)?))
    }

    /// The stored form.
    pub fn to_bytes(&self) -> Result<Vec<u8>, SealError> {
        serde_json::to_vec(self).map_err(|_| SealError::Config)
    }

    /// From the stored form.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SealError> {
        let config: Self = serde_json::from_slice(bytes).map_err(|_| SealError::Config)?;
        if config.format != FORMAT || check_parameters(config.shares, config.threshold).is_err() {
            return Err(SealError::Config);
        }
        Ok(config)
    }

    /// The root key, from as many shares as the threshold says.
    pub fn root_key(&self, shares: &[Share]) -> Result<Key, SealError> {
        let unseal_key = self.combine(shares)?;
        let check = STANDARD.decode(&self.check).map_err(|_| SealError::Config)?;
        // ring compares in constant time.
        hmac::verify(&check_key(&unseal_key), CHECK_LABEL, &check).map_err(|_| SealError::WrongKey)?;
        let wrapped = STANDARD.decode(&self.wrapped_root_key).map_err(|_| SealError::Config)?;
        let root_key = barrier::open_record(&unseal_key, ROOT_KEY_PATH, &wrapped)?;
        key_from(&root_key).ok_or(SealError::Config)
    }

    fn combine(&self, shares: &[Share]) -> Result<Key, SealError> {
        if shares.len() != usize::from(self.threshold) {
            return Err(SealError::WrongKey);
        }
        if let [only] = shares {
            return key_from(only).ok_or(SealError::WrongKey);
        }
        let mut plain: Vec<Vec<u8>> = shares.iter().map(|share| share.to_vec()).collect();
        let combined = vsss_rs::Gf256::combine_bytes(&plain);
        plain.zeroize();
        // Two shares of one number, or of unequal length: not a set that this vault gave out.
        let combined = Zeroizing::new(combined.map_err(|_| SealError::WrongKey)?);
        key_from(&combined).ok_or(SealError::WrongKey)
    }

    /// Bytes of one share: a number in front unless the share is the key itself.
    pub fn share_bytes(&self) -> usize {
        if self.threshold == 1 { KEY_BYTES } else { KEY_BYTES + 1 }
    }
}

/// A share as a person or a file gives it: hexadecimal or base64, whichever has the length of a share.
pub fn parse_share(text: &SecretString, config: &SealConfig) -> Result<Share, SealError> {
    let text = text.expose_secret().trim();
    let base64 = || STANDARD.decode(text).ok().map(Zeroizing::new);
    // 64 or 66 hexadecimal digits are base64 too; the length tells which was meant.
    [hex::decode(text), base64()]
        .into_iter()
        .flatten()
        .find(|share| share.len() == config.share_bytes())
        .ok_or(SealError::Encoding)
}

/// Shares given so far. Forgotten (and wiped) when enough are there, right or wrong.
#[derive(Default)]
pub struct Progress {
    shares: Vec<Share>,
    nonce: String,
}

impl Progress {
    /// Adds a share; the same share again changes nothing. Returns the full set once `threshold` is met.
    pub fn add(
        &mut self,
        share: Share,
        config: &SealConfig,
        random: &SharedRandom,
    ) -> Result<Option<Vec<Share>>, SealError> {
        if self.shares.is_empty() {
            self.nonce = random::uuid(random.as_ref())?;
        }
        let digest = |share: &[u8]| ring::digest::digest(&ring::digest::SHA256, share);
        // By digest: what time tells of the comparison says nothing about the shares.
        if !self.shares.iter().any(|known| digest(known).as_ref() == digest(&share).as_ref()) {
            self.shares.push(share);
        }
        if self.shares.len() < usize::from(config.threshold) {
            return Ok(None);
        }
        Ok(Some(std::mem::take(self).shares))
    }

    /// How many shares are there.
    pub fn count(&self) -> usize {
        self.shares.len()
    }

    /// Names this attempt; empty when none is under way.
    pub fn nonce(&self) -> &str {
        if self.shares.is_empty() { "" } else { &self.nonce }
    }
}

fn check_parameters(shares: u8, threshold: u8) -> Result<(), SealError> {
    match (shares, threshold) {
        (0, _) => Err(SealError::Parameters("secret_shares must be at least 1")),
        (_, 0) => Err(SealError::Parameters("secret_threshold must be at least 1")),
        (shares, threshold) if threshold > shares => {
            Err(SealError::Parameters("secret_threshold cannot be larger than secret_shares"))
        }
        (2.., 1) => {
            Err(SealError::Parameters("secret_threshold must be greater than one for multiple shares"))
        }
        _ => Ok(()),
    }
}

fn check_key(unseal_key: &Key) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, barrier::hkdf(unseal_key, &[CHECK_LABEL]).as_slice())
}

fn key_from(bytes: &[u8]) -> Option<Key> {
    <[u8; KEY_BYTES]>::try_from(bytes).ok().map(Zeroizing::new)
}

fn split(
    unseal_key: &Key,
    shares: u8,
    threshold: u8,
    random: &SharedRandom,
) -> Result<Vec<Share>, SealError> {
    if shares == 1 {
        return Ok(vec![Zeroizing::new(unseal_key.to_vec())]);
    }
    let mut source = Coefficients { random: random.clone(), failed: false };
    let split = vsss_rs::Gf256::split_bytes(
        usize::from(threshold),
        usize::from(shares),
        unseal_key.as_slice(),
        &mut source,
    );
    let split = split.map(|shares| shares.into_iter().map(Zeroizing::new).collect());
    if source.failed {
        return Err(RandomError.into());
    }
    split.map_err(|_| SealError::Parameters("the unseal key cannot be split that way"))
}

/// ring's generator as vsss-rs takes one. Its interface cannot fail, so a failure is remembered and
/// whatever was made from it thrown away.
struct Coefficients {
    random: SharedRandom,
    failed: bool,
}

impl rand_core::TryRng for Coefficients {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, destination: &mut [u8]) -> Result<(), Self::Error> {
        self.failed |= self.random.fill(destination).is_err();
        Ok(())
    }
}

impl rand_core::TryCryptoRng for Coefficients {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::barrier::tests::random;

    fn root() -> Key {
        Zeroizing::new([9; 32])
    }

    fn pick(shares: &[Share], which: &[usize]) -> Vec<Share> {
        which.iter().map(|at| shares[*at].clone()).collect()
    }

    #[test]
    fn any_k_of_n_shares_open_the_seal_and_fewer_or_others_do_not() {
        let (config, shares) = SealConfig::create(5, 3, &root(), &random()).unwrap();
        let config = SealConfig::from_bytes(&config.to_bytes().unwrap()).unwrap();
        for a in 0..5 {
            for b in (0..5).filter(|b| *b != a) {
                for c in (0..5).filter(|c| *c != a && *c != b) {
                    assert_eq!(config.root_key(&pick(&shares, &[a, b, c])).unwrap(), root());
                }
            }
        }
        assert!(matches!(config.root_key(&pick(&shares, &[0, 1])), Err(SealError::WrongKey)));
        assert!(matches!(config.root_key(&pick(&shares, &[0, 1, 1])), Err(SealError::WrongKey)));
        let (_, others) = SealConfig::create(5, 3, &root(), &random()).unwrap();
        let mixed = vec![shares[0].clone(), shares[1].clone(), others[2].clone()];
        assert!(matches!(config.root_key(&mixed), Err(SealError::WrongKey)));
    }

    #[test]
    fn a_forged_share_fails_at_every_byte() {
        let (config, shares) = SealConfig::create(3, 2, &root(), &random()).unwrap();
        for at in 0..shares[0].len() {
            let mut forged = pick(&shares, &[0, 1]);
            forged[0][at] ^= 1;
            assert!(config.root_key(&forged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn one_share_of_one_is_the_unseal_key_itself() {
        let (config, shares) = SealConfig::create(1, 1, &root(), &random()).unwrap();
        assert_eq!(shares[0].len(), KEY_BYTES);
        assert_eq!(config.root_key(&shares).unwrap(), root());
        assert!(matches!(config.root_key(&[Zeroizing::new(vec![0; 32])]), Err(SealError::WrongKey)));
    }

    #[test]
    fn impossible_numbers_of_shares_are_refused() {
        for (shares, threshold) in [(0, 0), (0, 1), (1, 0), (2, 3), (5, 1)] {
            assert!(
                SealConfig::create(shares, threshold, &root(), &random()).is_err(),
                "{shares} {threshold}"
            );
        }
        assert!(SealConfig::create(255, 255, &root(), &random()).is_ok());
    }

    #[test]
    fn shares_read_in_hexadecimal_and_base64_and_in_nothing_else() {
        for (n, k) in [(1, 1), (3, 2)] {
            let (config, shares) = SealConfig::create(n, k, &root(), &random()).unwrap();
            for text in [hex::encode(&shares[0]), STANDARD.encode(&shares[0])] {
                assert_eq!(parse_share(&text.into(), &config).unwrap(), shares[0]);
            }
            for bad in ["", "zz", "abcd", &"0".repeat(62)] {
                assert!(
                    matches!(parse_share(&bad.to_owned().into(), &config), Err(SealError::Encoding)),
                    "{bad}"
                );
            }
        }
    }

    #[test]
    fn a_share_given_twice_counts_once() {
        let (config, shares) = SealConfig::create(3, 2, &root(), &random()).unwrap();
        let mut progress = Progress::default();
        assert_eq!(progress.nonce(), "");
        assert!(progress.add(shares[0].clone(), &config, &random()).unwrap().is_none());
        let nonce = progress.nonce().to_owned();
        assert!(progress.add(shares[0].clone(), &config, &random()).unwrap().is_none());
        assert_eq!((progress.count(), progress.nonce()), (1, nonce.as_str()));
        let all = progress.add(shares[2].clone(), &config, &random()).unwrap().unwrap();
        assert_eq!(config.root_key(&all).unwrap(), root());
        assert_eq!(progress.count(), 0);
    }
}
