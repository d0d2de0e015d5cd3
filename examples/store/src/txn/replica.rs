use std::{collections::BTreeMap, sync::Arc};

use super::{Command, Entry, Outcome, SplitId, TxnId, spans_of};
use crate::{
    engine::{Batch, Engine, EngineError, Memory},
    keys::Range,
    lease::{Lease, LeaseError},
    locks::Age,
    mvcc::{Mutation, Mvcc, MvccError},
    safe_time::SafeTime,
    truetime::Timestamp,
};

/// A participant's promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The transaction's age, for the locks of a new leader.
    pub age: Age,
    /// It commits here or later, if it does.
    pub at: Timestamp,
    /// What it read. Without it a new leader would let others write what this transaction relies on.
    pub reads: Vec<Range>,
    /// What it will write.
    pub writes: Vec<Mutation>,
    /// Who decides.
    pub coordinator: SplitId,
}

/// What an entry came to. Every replica says the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Nothing that anybody waits for.
    Nothing,
    /// A lease is granted, or is not.
    Lease(Result<(), LeaseError>),
    /// The promise stands.
    Prepared(TxnId, Timestamp),
    /// The transaction has ended here, now or before, and this is how.
    Ended(TxnId, Outcome),
}

/// What a log that was kept rightly never holds: the replica must stop, since its state cannot be trusted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReplicaError {
    /// An entry of another term than the one whose locks it stands on.
    #[error("an entry made in term {made} stands in the log of term {logged}")]
    Term {
        /// Of the leader that made it.
        made: u64,
        /// Of the log.
        logged: u64,
    },
    /// A commit at or before a timestamp that was closed before it.
    #[error("a commit at {at} comes after {closed} was closed")]
    Closed {
        /// The commit.
        at: Timestamp,
        /// What snapshots may have been told.
        closed: Timestamp,
    },
    /// A commit that nothing was prepared for.
    #[error("transaction {0:?} committed without a promise here")]
    Unprepared(TxnId),
    /// The rows cannot be read.
    #[error("the split's rows")]
    Rows(#[from] MvccError),
    /// The rows cannot be written.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// The replicated state of one split: a function of its log.
#[derive(Clone, Debug)]
pub struct Replica {
    engine: Memory,
    pub(crate) rows: Mvcc,
    pub(crate) safe: SafeTime,
    pub(crate) lease: Lease,
    pub(crate) prepared: BTreeMap<TxnId, Prepared>,
    pub(crate) outcomes: BTreeMap<TxnId, Outcome>,
    /// Decisions made here that some participant may not have heard.
    pub(crate) unsettled: BTreeMap<TxnId, Vec<SplitId>>,
    /// The latest commit, of a transaction that only read here too.
    pub(crate) newest: Timestamp,
    pub(crate) term: u64,
}

impl Default for Replica {
    fn default() -> Self {
        let engine = Memory::default();
        Self {
            rows: Mvcc::new(Arc::new(engine.clone()), SplitId(0), Timestamp::ZERO),
            engine,
            safe: SafeTime::default(),
            lease: Lease::default(),
            prepared: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            unsettled: BTreeMap::new(),
            newest: Timestamp::ZERO,
            term: 0,
        }
    }
}

impl Replica {
    /// Takes the next entry of the log, which stands there with `term`.
    ///
    /// # Errors
    ///
    /// When the log contradicts itself.
    pub fn apply(&mut self, entry: Entry, term: u64) -> Result<Applied, ReplicaError> {
        if entry.term != term {
            return Err(ReplicaError::Term { made: entry.term, logged: term });
        }
        self.term = term;
        let closed = self.safe.closed();
        let applied = match entry.command {
            Command::Close => Applied::Nothing,
            Command::Lease(grant) => Applied::Lease(self.lease.grant(grant)),
            Command::Commit { txn, at, writes, participants } => {
                let applied = self.commit(txn, at, &writes, closed)?;
                if applied == Applied::Ended(txn, Outcome::Committed(at)) && !participants.is_empty() {
                    self.unsettled.insert(txn, participants);
                }
                applied
            }
            Command::Settled { txns } => {
                self.unsettled.retain(|txn, _| !txns.contains(txn));
                Applied::Nothing
            }
            Command::Prepare { txn, prepared } => self.prepare(txn, prepared, closed)?,
            Command::Resolve { txn, outcome } => self.resolve(txn, outcome)?,
            Command::Collect { horizon } => {
                let mut batch = Batch::default();
                self.rows.collect(&mut batch, horizon)?;
                self.engine.write(batch)?;
                self.outcomes.retain(|txn, _| txn.started >= horizon || self.unsettled.contains_key(txn));
                Applied::Nothing
            }
        };
        self.safe.close(entry.closed);
        Ok(applied)
    }

    /// How `txn` ended. `None` is "not yet", so far as this replica has applied the log.
    pub fn outcome(&self, txn: TxnId) -> Option<Outcome> {
        // What began before everything kept may have an outcome that is forgotten; nobody can begin it again.
        let forgotten = txn.started < self.rows.kept_since() && !self.prepared.contains_key(&txn);
        self.outcomes.get(&txn).copied().or_else(|| forgotten.then_some(Outcome::Aborted))
    }

    /// Its rows.
    pub fn rows(&self) -> &Mvcc {
        &self.rows
    }

    /// Its lease.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// What bounds its snapshots.
    pub fn safe_time(&self) -> &SafeTime {
        &self.safe
    }

    /// Promises whose coordinator has not been heard, oldest first.
    pub fn in_doubt(&self) -> impl Iterator<Item = (TxnId, &Prepared)> {
        self.prepared.iter().map(|(txn, prepared)| (*txn, prepared))
    }

    /// Decisions made here, with those who must hear of them.
    pub fn unsettled(&self) -> impl Iterator<Item = (TxnId, &[SplitId])> {
        self.unsettled.iter().map(|(txn, participants)| (*txn, participants.as_slice()))
    }

    /// A term began: the empty entry that each new leader of a consensus group logs first.
    pub fn begin_term(&mut self, term: u64) {
        self.term = term;
    }

    /// The term of the last entry applied.
    pub fn term(&self) -> u64 {
        self.term
    }

    fn commit(
        &mut self,
        txn: TxnId,
        at: Timestamp,
        writes: &[Mutation],
        closed: Timestamp,
    ) -> Result<Applied, ReplicaError> {
        if let Some(outcome) = self.outcome(txn) {
            return Ok(Applied::Ended(txn, outcome));
        }
        if at <= closed {
            return Err(ReplicaError::Closed { at, closed });
        }
        self.write(writes, at)?;
        Ok(self.end(txn, Outcome::Committed(at)))
    }

    fn prepare(
        &mut self,
        txn: TxnId,
        prepared: Prepared,
        closed: Timestamp,
    ) -> Result<Applied, ReplicaError> {
        if let Some(outcome) = self.outcome(txn) {
            return Ok(Applied::Ended(txn, outcome));
        }
        if let Some(before) = self.prepared.get(&txn) {
            return Ok(Applied::Prepared(txn, before.at));
        }
        if prepared.at <= closed {
            return Err(ReplicaError::Closed { at: prepared.at, closed });
        }
        let at = prepared.at;
        self.safe.prepare(txn, at, spans_of(&prepared.writes));
        self.prepared.insert(txn, prepared);
        Ok(Applied::Prepared(txn, at))
    }

    fn resolve(&mut self, txn: TxnId, outcome: Outcome) -> Result<Applied, ReplicaError> {
        if let Some(outcome) = self.outcome(txn) {
            return Ok(Applied::Ended(txn, outcome));
        }
        let promised = self.prepared.remove(&txn);
        if let Outcome::Committed(at) = outcome {
            let promised =
                promised.filter(|promised| promised.at <= at).ok_or(ReplicaError::Unprepared(txn))?;
            self.write(&promised.writes, at)?;
        }
        self.safe.resolve(txn);
        Ok(self.end(txn, outcome))
    }

    fn write(&self, writes: &[Mutation], at: Timestamp) -> Result<(), ReplicaError> {
        let mut batch = Batch::default();
        self.rows.apply(&mut batch, writes, at);
        Ok(self.engine.write(batch)?)
    }

    fn end(&mut self, txn: TxnId, outcome: Outcome) -> Applied {
        self.outcomes.insert(txn, outcome);
        if let Outcome::Committed(at) = outcome {
            self.newest = self.newest.max(at);
        }
        Applied::Ended(txn, outcome)
    }
}
