//! The version of a policies directory: a hash of every file read.

use std::fmt;

use identity::hex;
use ring::digest::{Context, SHA256};

/// Bytes of the hash that are kept: 48 bits tell a mesh's policies apart; it is no proof of content.
const VERSION_BYTES: usize = 6;

/// Twelve hexadecimal digits over names and contents of all files, such as `3fb2a90c11d4`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PolicyVersion(String);

impl PolicyVersion {
    /// Over files given in a fixed order. Lengths keep names and contents apart.
    pub(crate) fn of<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut hash = Context::new(&SHA256);
        for part in files.into_iter().flat_map(|(name, content)| [name, content]) {
            hash.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
            hash.update(part.as_bytes());
        }
        Self(hex::encode(hash.finish().as_ref().get(..VERSION_BYTES).unwrap_or_default()))
    }

    /// That of a commit, by its hash.
    pub(crate) fn of_commit(hash: &str) -> Self {
        Self(hash.chars().take(2 * VERSION_BYTES).collect())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PolicyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
