//! The number on a decision: what a refused caller is given, and what `explain` is asked with.

use std::fmt;
use std::str::FromStr;

use ring::error::Unspecified;
use ring::rand::SecureRandom;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

const PREFIX: &str = "r-";
/// 16 symbols of 5 bits: 80 bits, so that a receipt cannot be guessed and does not repeat.
const SYMBOLS: usize = 16;
/// Crockford's base 32 in lower case: no i, l, o, u, so that it survives being read aloud.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// The id of one decision, such as `r-7k2m0q9xw4e8t5hz`. It tells nothing about the decision.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Receipt(String);

/// The text is not a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a receipt is r- and {SYMBOLS} of 0-9 a-z without i, l, o, u")]
pub struct ReceiptError;

impl Receipt {
    /// A new receipt.
    ///
    /// # Errors
    /// The random source failed; the request must then be refused.
    pub fn generate(random: &dyn SecureRandom) -> Result<Self, Unspecified> {
        let mut bytes = [0u8; SYMBOLS];
        random.fill(&mut bytes)?;
        // Five of eight bits of each byte are used: 256 is a multiple of 32, so every symbol is as likely.
        let symbol = |byte: &u8| ALPHABET.get(usize::from(byte % 32)).copied().map(char::from);
        Ok(Self(PREFIX.chars().chain(bytes.iter().filter_map(symbol)).collect()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Receipt {
    type Err = ReceiptError;

    fn from_str(text: &str) -> Result<Self, ReceiptError> {
        let symbols = text.strip_prefix(PREFIX).ok_or(ReceiptError)?;
        if symbols.len() == SYMBOLS && symbols.bytes().all(|b| ALPHABET.contains(&b)) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ReceiptError)
        }
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
        let mut seen = std::collections::HashSet::new();
        for _ in 0..1000 {
            let receipt = Receipt::generate(&random).unwrap();
            assert_eq!(receipt.to_string().parse(), Ok(receipt.clone()));
            assert!(seen.insert(receipt));
        }
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
