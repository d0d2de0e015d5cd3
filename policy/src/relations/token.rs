//! The token of a write: which store, and which revision of it at least.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Longest name of a store.
const MAX_EPOCH_BYTES: usize = 64;

/// What a writer got for a write. Whoever passes it on with a request is decided about by what was true after the write,
/// or not at all (the "new enemy" of Zanzibar's zookies, Pang et al. 2019). It is no secret, and grants nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationsToken {
    epoch: String,
    revision: u64,
}

/// The text is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a token is written r1.STORE.REVISION, as the write has answered it")]
pub struct TokenError;

impl RelationsToken {
    /// The store.
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// The revision.
    pub fn revision(&self) -> u64 {
        self.revision
    }
}

impl FromStr for RelationsToken {
    type Err = TokenError;

    /// Takes the one spelling of each token.
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let (epoch, digits) =
            text.strip_prefix("r1.").and_then(|rest| rest.split_once('.')).ok_or(TokenError)?;
        let named = (1..=MAX_EPOCH_BYTES).contains(&epoch.len());
        let hexadecimal = epoch.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let revision: u64 = digits.parse().map_err(|_| TokenError)?;
        if !named || !hexadecimal || revision.to_string() != digits {
            return Err(TokenError);
        }
        Ok(Self { epoch: epoch.to_owned(), revision })
    }
}

impl fmt::Display for RelationsToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r1.{}.{}", self.epoch, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_token_has_one_spelling() {
        let token: RelationsToken = "r1.00ff.42".parse().unwrap();
        assert_eq!((token.epoch(), token.revision()), ("00ff", 42));
        for wrong in [
            "",
            "r1",
            "r1.",
            "r1.00ff",
            "r1.00ff.",
            "r1..42",
            "r2.00ff.42",
            "r1.00FF.42",
            "r1.00ff.042",
            "r1.00ff.+42",
            "r1.00ff.42 ",
            "r1.00ff.42.1",
            "r1.00ff.18446744073709551616",
            " r1.00ff.42",
            "r1.zz.1",
        ] {
            assert_eq!(wrong.parse::<RelationsToken>(), Err(TokenError), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_again(text in "(r1)?\\.?[0-9a-g]{0,4}\\.?[0-9]{0,21}|\\PC{0,40}") {
            if let Ok(token) = text.parse::<RelationsToken>() {
                prop_assert_eq!(token.to_string(), text);
            }
        }
    }
}
