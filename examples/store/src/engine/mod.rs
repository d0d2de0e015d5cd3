//! Where rows are kept: a sorted map of bytes on disk, made by others ([`Lsm`]), or in memory for the simulation
//! ([`Memory`]).
//!
//! What is written is not safe before [`Engine::sync`]: until then a crash leaves some prefix of the batches, each whole
//! or not at all. That is enough, since the write-ahead log has everything from the last sync on, and writing a version
//! of a row again changes nothing.

mod lsm;
mod memory;

use std::{ops::ControlFlow, sync::Arc};

use bytes::Bytes;

pub use lsm::Lsm;
pub use memory::Memory;

/// The disk, or what the engine makes of it, fails. The node must stop.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the row engine fails: {0}")]
pub struct EngineError(pub Arc<str>);

/// Equal where they say the same, for the answers of a deterministic replica to be compared.
impl PartialEq for EngineError {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for EngineError {}

/// Writes that become visible together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Key and value, or nothing where the key goes. Of two for one key the last counts.
    pub writes: Vec<(Bytes, Option<Bytes>)>,
}

impl Batch {
    /// Sets `key`.
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.writes.push((key.into(), Some(value.into())));
    }

    /// Removes `key`.
    pub fn delete(&mut self, key: impl Into<Bytes>) {
        self.writes.push((key.into(), None));
    }

    /// Whether nothing is written.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }
}

/// What to do with each key and value of a walk.
pub type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>;

/// A sorted map of bytes. Keys are of 1 to 65,535.
pub trait Engine: Send + Sync {
    /// What `key` holds.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// Walks the keys from `from` up to and without `to`, in order, until `visit` breaks.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn walk(&self, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), EngineError>;

    /// Writes all of `batch` or nothing; visible at once.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn write(&self, batch: Batch) -> Result<(), EngineError>;

    /// Makes all that was written safe.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn sync(&self) -> Result<(), EngineError>;

    /// The first key from `from` up to and without `to`, with its value.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn first(&self, from: &[u8], to: &[u8]) -> Result<Option<(Bytes, Bytes)>, EngineError> {
        let mut found = None;
        self.walk(from, to, &mut |key, value| {
            found = Some((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
            ControlFlow::Break(())
        })?;
        Ok(found)
    }
}
