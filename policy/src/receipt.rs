//! The number on a decision: what a refused caller is given, and what `explain` is asked with.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use identity::random::SharedRandom;
use ring::error::Unspecified;
use ring::rand::SecureRandom;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

const PREFIX: &str = "r-";
/// 16 symbols of 5 bits: 80 bits, so that a receipt cannot be guessed and does not repeat.
const SYMBOLS: usize = 16;
const LENGTH: usize = PREFIX.len() + SYMBOLS;
/// Crockford's base 32 in lower case: no i, l, o, u, so that it survives being read aloud.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Receipts that one reading of the random source is good for: a system call costs as much as a decision,
/// and 4 KiB cost it hardly more than 16 bytes.
const DRAWN_AT_ONCE: usize = 256;

/// The id of one decision, such as `r-7k2m0q9xw4e8t5hz`. It tells nothing about the decision.
///
/// INVARIANT: the prefix and symbols of the alphabet, so ASCII.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Receipt([u8; LENGTH]);

/// The text is not a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a receipt is r- and {SYMBOLS} of 0-9 a-z without i, l, o, u")]
pub struct ReceiptError;

impl Receipt {
    /// A new receipt. Who needs many of them takes them from [`Receipts`].
    ///
    /// # Errors
    /// The random source failed; the request must then be refused.
    pub fn generate(random: &dyn SecureRandom) -> Result<Self, Unspecified> {
        let mut bytes = [0u8; SYMBOLS];
        random.fill(&mut bytes)?;
        Ok(Self::of(&bytes))
    }

    fn of(random: &[u8; SYMBOLS]) -> Self {
        let mut text = [0; LENGTH];
        let (prefix, symbols) = text.split_at_mut(PREFIX.len());
        prefix.copy_from_slice(PREFIX.as_bytes());
        for (symbol, byte) in symbols.iter_mut().zip(random) {
            // Five of eight bits of each byte are used: 256 is a multiple of 32, so every symbol is as likely.
            *symbol = ALPHABET.get(usize::from(byte % 32)).copied().unwrap_or_default();
        }
        Self(text)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// Receipts for a process that decides often, out of the process's own random source.
///
/// The source is asked for many receipts' bytes at a time, and no generator of our own stands in between: what
/// is given out is the system's randomness, each byte once. One lock, held for a copy of 16 bytes.
pub struct Receipts {
    random: SharedRandom,
    drawn: Mutex<Drawn>,
}

struct Drawn {
    bytes: [[u8; SYMBOLS]; DRAWN_AT_ONCE],
    left: usize,
}

impl Receipts {
    /// Receipts from this source. Nothing is drawn before the first is asked for.
    pub fn new(random: SharedRandom) -> Self {
        Self { random, drawn: Mutex::new(Drawn { bytes: [[0; SYMBOLS]; DRAWN_AT_ONCE], left: 0 }) }
    }

    /// A new receipt.
    ///
    /// # Errors
    /// The random source failed; the request must then be refused.
    pub fn draw(&self) -> Result<Receipt, Unspecified> {
        // Poisoned or not: `left` falls before bytes are used and rises after they are drawn.
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        if drawn.left == 0 {
            self.random.fill(drawn.bytes.as_flattened_mut())?;
            drawn.left = DRAWN_AT_ONCE;
        }
        drawn.left -= 1;
        let bytes = drawn.bytes.get(drawn.left).ok_or(Unspecified)?;
        Ok(Receipt::of(bytes))
    }
}

impl fmt::Debug for Receipts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receipts").finish_non_exhaustive()
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Receipt({})", self.as_str())
    }
}

impl Serialize for Receipt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl fmt::Display for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Receipt {
    type Err = ReceiptError;

    fn from_str(text: &str) -> Result<Self, ReceiptError> {
        let symbols = text.strip_prefix(PREFIX).ok_or(ReceiptError)?;
        if !symbols.bytes().all(|b| ALPHABET.contains(&b)) {
            return Err(ReceiptError);
        }
        text.as_bytes().try_into().map(Self).map_err(|_| ReceiptError)
    }
}

impl<'de> Deserialize<'de> for Receipt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_receipt_parses_to_itself_and_does_not_repeat() {
        let random = ring::rand::SystemRandom::new();
        let many = Receipts::new(identity::random::system());
        let mut seen = std::collections::HashSet::new();
        for _ in 0..4 * DRAWN_AT_ONCE {
            for receipt in [Receipt::generate(&random).unwrap(), many.draw().unwrap()] {
                assert_eq!(receipt.to_string().parse(), Ok(receipt));
                assert!(seen.insert(receipt));
            }
        }
    }

    #[test]
    fn a_receipt_is_text_in_json() {
        let receipt: Receipt = "r-7k2m0q9xw4e8t5hz".parse().unwrap();
        let json = serde_json::to_string(&receipt).unwrap();
        assert_eq!(json, "\"r-7k2m0q9xw4e8t5hz\"");
        assert_eq!(serde_json::from_str::<Receipt>(&json).unwrap(), receipt);
    }

    #[test]
    fn other_texts_are_not_receipts() {
        for bad in
            ["", "r-", "r-7k2m0q9xw4e8t5h", "r-7K2M0Q9XW4E8T5HZ", "r-7k2m0q9xw4e8t5hi", "x-7k2m0q9xw4e8t5hz"]
        {
            assert_eq!(bad.parse::<Receipt>(), Err(ReceiptError), "{bad}");
        }
    }
}
