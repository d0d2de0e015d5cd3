//! The part of a group's log that is kept at hand: what consensus asks of a storage. On disk it is in the log of the
//! node and in the checkpoints of the split.

use std::{cell::Cell, collections::VecDeque};

use raft::{
    Error, GetEntriesContext, RaftState, Storage, StorageError,
    eraftpb::{ConfState, Entry, HardState, Snapshot},
};

/// Entries that do not follow what there is.
#[derive(Debug)]
pub(crate) struct Hole {
    pub(crate) last: u64,
    pub(crate) found: u64,
}

/// The log of one group from some index on.
#[derive(Debug, Default)]
pub(crate) struct RaftLog {
    hard_state: HardState,
    conf_state: ConfState,
    /// Index and term of the entry before the first that is kept.
    before: (u64, u64),
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Somebody is so far behind that only a snapshot helps.
    snapshot_wanted: Cell<bool>,
    snapshot: Option<Snapshot>,
}

impl RaftLog {
    /// A log whose entries up to `index`, which was of `term`, are applied and gone.
    pub(crate) fn after(index: u64, term: u64, conf_state: ConfState) -> Self {
        let mut log = Self { conf_state, before: (index, term), ..Self::default() };
        log.hard_state.commit = index;
        log.hard_state.term = term;
        log
    }

    pub(crate) fn set_hard_state(&mut self, hard_state: HardState) {
        let commit = hard_state.commit.max(self.before.0);
        self.hard_state = hard_state;
        self.hard_state.commit = commit;
    }

    pub(crate) fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    pub(crate) fn set_commit(&mut self, commit: u64) {
        self.hard_state.commit = self.hard_state.commit.max(commit);
    }

    /// What is on disk is no longer than this after a crash that a commit index outlived.
    pub(crate) fn clamp_commit(&mut self) {
        self.hard_state.commit = self.hard_state.commit.min(self.last());
    }

    pub(crate) fn set_conf_state(&mut self, conf_state: ConfState) {
        self.conf_state = conf_state;
    }

    pub(crate) fn conf_state(&self) -> &ConfState {
        &self.conf_state
    }

    pub(crate) fn last(&self) -> u64 {
        self.before.0 + self.entries.len() as u64
    }

    /// Puts `entries` in the place of all from the first of them on.
    ///
    /// # Errors
    ///
    /// When they would leave a hole.
    pub(crate) fn append(&mut self, entries: Vec<Entry>) -> Result<(), Hole> {
        for entry in entries {
            if entry.index <= self.before.0 {
                continue;
            }
            if entry.index > self.last() + 1 {
                return Err(Hole { last: self.last(), found: entry.index });
            }
            while self.last() >= entry.index {
                self.bytes -= self.entries.pop_back().map_or(0, |gone| gone.data.len());
            }
            self.bytes += entry.data.len();
            self.entries.push_back(entry);
        }
        Ok(())
    }

    /// Forgets entries up to `index` at most, as long as there are more than `bytes`.
    pub(crate) fn forget_over(&mut self, index: u64, bytes: usize) {
        while self.bytes > bytes && self.before.0 < index {
            self.forget(self.before.0 + 1);
        }
    }

    /// Forgets entries up to `index`.
    pub(crate) fn forget(&mut self, index: u64) {
        while self.before.0 < index {
            let Some(gone) = self.entries.pop_front() else { break };
            self.before = (gone.index, gone.term);
            self.bytes -= gone.data.len();
        }
    }

    /// Begins anew after a snapshot.
    pub(crate) fn restart(&mut self, index: u64, term: u64, conf_state: ConfState) {
        self.entries.clear();
        self.bytes = 0;
        self.before = (index, term);
        self.conf_state = conf_state;
        self.hard_state.commit = self.hard_state.commit.max(index);
        self.hard_state.term = self.hard_state.term.max(term);
        self.snapshot = None;
    }

    pub(crate) fn wants_snapshot(&self) -> bool {
        self.snapshot_wanted.get()
    }

    pub(crate) fn offer(&mut self, snapshot: Snapshot) {
        self.snapshot_wanted.set(false);
        self.snapshot = Some(snapshot);
    }

    /// Snapshots are large: none is kept longer than somebody needs it.
    pub(crate) fn drop_snapshot(&mut self) {
        self.snapshot = None;
    }
}

impl Storage for RaftLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard_state.clone(), conf_state: self.conf_state.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.before.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let from = usize::try_from(low - self.before.0 - 1).unwrap_or(usize::MAX);
        let count = usize::try_from(high.saturating_sub(low)).unwrap_or(0);
        let mut budget = max_size.into().unwrap_or(u64::MAX);
        let mut found = Vec::new();
        for entry in self.entries.iter().skip(from).take(count) {
            let bytes = entry.data.len() as u64;
            if !found.is_empty() && bytes > budget {
                break;
            }
            budget = budget.saturating_sub(bytes);
            found.push(entry.clone());
        }
        Ok(found)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.before.0 {
            return Ok(self.before.1);
        }
        let at = index.checked_sub(self.before.0 + 1).ok_or(Error::Store(StorageError::Compacted))?;
        let entry = usize::try_from(at).ok().and_then(|at| self.entries.get(at));
        entry.map(|entry| entry.term).ok_or(Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.before.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        match &self.snapshot {
            Some(made) if made.get_metadata().index >= request_index.max(self.before.0) => Ok(made.clone()),
            _ => {
                self.snapshot_wanted.set(true);
                Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        let mut entry = Entry::default();
        (entry.index, entry.term, entry.data) = (index, term, vec![7; 10].into());
        entry
    }

    fn terms(log: &RaftLog) -> Vec<u64> {
        (log.first_index().unwrap()..=log.last()).map(|index| log.term(index).unwrap()).collect()
    }

    #[test]
    fn later_entries_take_the_place_of_earlier_ones() {
        let mut log = RaftLog::after(4, 1, ConfState::default());
        log.append(vec![entry(5, 1), entry(6, 1), entry(7, 1)]).unwrap();
        log.append(vec![entry(6, 2)]).unwrap();
        assert_eq!((terms(&log), log.bytes), (vec![1, 2], 20));
        assert!(log.append(vec![entry(8, 2)]).is_err(), "a hole");
        log.append(vec![entry(3, 1), entry(4, 1), entry(5, 3)]).expect("what is gone already is skipped");
        assert_eq!(terms(&log), [3]);
    }

    #[test]
    fn what_is_forgotten_leaves_its_term() {
        let mut log = RaftLog::after(0, 0, ConfState::default());
        log.append(vec![entry(1, 1), entry(2, 2), entry(3, 2)]).unwrap();
        log.forget(2);
        assert_eq!((log.term(2).unwrap(), log.first_index().unwrap(), log.bytes), (2, 3, 10));
        assert!(matches!(log.term(1), Err(Error::Store(StorageError::Compacted))));
        log.forget(9);
        assert_eq!((log.last(), log.bytes), (3, 0));
    }

    #[test]
    fn a_snapshot_is_asked_for_and_then_there() {
        let mut log = RaftLog::after(4, 1, ConfState::default());
        assert!(log.snapshot(0, 2).is_err() && log.wants_snapshot());
        let mut made = Snapshot::default();
        made.mut_metadata().index = 4;
        log.offer(made);
        assert!(log.snapshot(0, 2).is_ok() && !log.wants_snapshot());
        log.restart(9, 2, ConfState::default());
        assert!(log.snapshot(0, 2).is_err(), "one from before is of no use");
    }
}
