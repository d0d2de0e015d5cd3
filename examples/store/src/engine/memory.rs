use std::{
    collections::BTreeMap,
    ops::{Bound, ControlFlow},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use super::{Batch, Engine, EngineError, Visit};

/// A map in memory, shared by its clones, with the failures of a disk.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    map: BTreeMap<Bytes, Bytes>,
    /// What undoes each batch since the last sync, oldest first.
    unsynced: Vec<Batch>,
}

impl Memory {
    /// The power goes: of the batches since the last sync the first `keep` stay.
    pub fn crash(&self, keep: usize) {
        let mut state = self.state();
        while state.unsynced.len() > keep {
            let undo = state.unsynced.pop().unwrap_or_default();
            state.apply(undo);
        }
        state.unsynced.clear();
    }

    /// Batches since the last sync.
    pub fn unsynced(&self) -> usize {
        self.state().unsynced.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Writes `batch` and gives what undoes it.
    fn apply(&mut self, batch: Batch) -> Batch {
        let mut undo = Batch::default();
        for (key, value) in batch.writes {
            let before = match value {
                Some(value) => self.map.insert(key.clone(), value),
                None => self.map.remove(&key),
            };
            undo.writes.push((key, before));
        }
        undo.writes.reverse();
        undo
    }
}

impl Engine for Memory {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.state().map.get(key).cloned())
    }

    fn walk(&self, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), EngineError> {
        if from >= to {
            return Ok(());
        }
        let state = self.state();
        for (key, value) in state.map.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to))) {
            if let ControlFlow::Break(()) = visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn write(&self, batch: Batch) -> Result<(), EngineError> {
        let mut state = self.state();
        let undo = state.apply(batch);
        state.unsynced.push(undo);
        Ok(())
    }

    fn sync(&self) -> Result<(), EngineError> {
        self.state().unsynced.clear();
        Ok(())
    }
}
