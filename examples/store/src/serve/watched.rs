//! A disk and an engine that say so when they take long: while they do, the node answers nobody.

use std::{
    io,
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::{
    engine::{Batch, Engine, EngineError, Visit},
    wal::Disk,
};

/// Longer than what a disk that is well takes under full load, shorter than what others take for silence.
pub(super) const LONG: Duration = Duration::from_millis(150);

/// Whatever is inside, watched.
#[derive(Debug)]
pub(super) struct Watched<T>(pub(super) T);

fn watched<T>(what: &'static str, act: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let done = act();
    let took = began.elapsed();
    if took > LONG {
        tracing::warn!(?took, "the disk was slow to {what}");
    }
    done
}

impl<T: Disk> Disk for Watched<T> {
    fn segments(&self) -> io::Result<Vec<u64>> {
        self.0.segments()
    }

    fn read(&self, segment: u64) -> io::Result<Vec<u8>> {
        self.0.read(segment)
    }

    fn truncate(&mut self, segment: u64, length: u64) -> io::Result<()> {
        self.0.truncate(segment, length)
    }

    fn remove(&mut self, segment: u64) -> io::Result<()> {
        watched("remove a segment of the log", || self.0.remove(segment))
    }

    fn open(&mut self, segment: u64) -> io::Result<()> {
        watched("begin a segment of the log", || self.0.open(segment))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        watched("write the log", || self.0.append(bytes))
    }

    fn sync(&mut self) -> io::Result<()> {
        watched("sync the log", || self.0.sync())
    }
}

impl<T: Engine> Engine for Watched<T> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.0.get(key)
    }

    fn walk(&self, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), EngineError> {
        self.0.walk(from, to, visit)
    }

    fn write(&self, batch: Batch) -> Result<(), EngineError> {
        watched("write rows", || self.0.write(batch))
    }

    fn sync(&self) -> Result<(), EngineError> {
        watched("sync rows", || self.0.sync())
    }
}
