use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;

use super::{Command, Entry, Outcome, SplitId, TxnId, outcomes::Outcomes, spans_of};
use crate::{
    engine::{Batch, Engine, EngineError},
    keys::{Key, Range},
    lease::{Lease, LeaseError, Tenure},
    locks::Age,
    mvcc::{Home, Mutation, Mvcc, MvccError, Version},
    safe_time::SafeTime,
    truetime::Timestamp,
};

/// In the engine, the earliest snapshot that is whole: split.
const KEPT: u8 = b'k';
/// The first term that a split which was cut off can be led in.
pub(crate) const FIRST_TERM: u64 = 2;

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
    /// The split was cut in two; without a number it was not, since a promise stood in the way.
    Split(Option<SplitId>),
    /// The split serves nobody any more.
    Retired,
    /// The split to the right is part of this one.
    Absorbed(SplitId),
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
    /// A write of a row that is not in this split.
    #[error("a write of a row that another split has")]
    Elsewhere,
    /// A promise or decision after the split had retired.
    #[error("a transaction in a split that has retired")]
    Retired,
    /// The rows cannot be written.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The rows cannot be read.
    #[error(transparent)]
    Rows(#[from] MvccError),
}

/// All of a replica but its rows and outcomes: what a checkpoint holds beside these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// What the split holds.
    pub range: Option<Range>,
    /// Goes up with each change of range or nodes.
    pub generation: u64,
    /// What the log has closed.
    pub closed: Timestamp,
    /// The lease.
    pub lease: Lease,
    /// Promises whose coordinator has not been heard.
    pub prepared: BTreeMap<TxnId, Prepared>,
    /// Decisions made here that some participant may not have heard.
    pub unsettled: BTreeMap<TxnId, Vec<SplitId>>,
    /// The latest commit, of a transaction that only read here too.
    pub newest: Timestamp,
    /// The term of the last entry applied.
    pub term: u64,
    /// Attempts from before this may have an outcome that is forgotten.
    pub outcomes_since: Timestamp,
    /// Whom it waits to be part of.
    pub retired: Option<SplitId>,
    /// Splits that have become part of it: it speaks for them as a coordinator.
    pub absorbed: BTreeSet<SplitId>,
    /// Rows and bytes, about.
    pub size: (u64, u64),
}

/// The replicated state of one split: a function of its log.
///
/// Rows are in the engine as soon as an entry is applied; all else is when a checkpoint is made. After a crash the log is
/// applied again from the checkpoint on, over rows that may be later already: writing a version again changes nothing.
#[derive(Clone)]
pub struct Replica {
    split: SplitId,
    engine: Arc<dyn Engine>,
    range: Range,
    generation: u64,
    pub(crate) rows: Mvcc,
    pub(crate) safe: SafeTime,
    pub(crate) lease: Lease,
    pub(crate) prepared: BTreeMap<TxnId, Prepared>,
    outcomes: Outcomes,
    unsettled: BTreeMap<TxnId, Vec<SplitId>>,
    pub(crate) newest: Timestamp,
    pub(crate) term: u64,
    retired: Option<SplitId>,
    absorbed: BTreeSet<SplitId>,
    /// Rows and bytes, about: what is written counts as new until the next survey.
    size: (u64, u64),
}

impl Replica {
    /// The replica that `state` was saved of, with the rows that the engine has in its home.
    ///
    /// # Errors
    ///
    /// When the engine fails.
    pub fn restore(
        engine: Arc<dyn Engine>,
        split: SplitId,
        home: Home,
        state: State,
    ) -> Result<Self, ReplicaError> {
        let mut safe = SafeTime::default();
        safe.close(state.closed);
        for (txn, prepared) in &state.prepared {
            safe.prepare(*txn, prepared.at, spans_of(&prepared.writes));
        }
        let kept = engine.get(&kept_key(split))?.as_deref().and_then(read_u64).map(Timestamp);
        let rows = Mvcc::new(Arc::clone(&engine), home, kept.unwrap_or_default());
        Ok(Self {
            split,
            range: state.range.unwrap_or_else(Range::all),
            generation: state.generation,
            rows,
            safe,
            lease: state.lease,
            prepared: state.prepared,
            outcomes: Outcomes::read(&*engine, split, state.outcomes_since)?,
            unsettled: state.unsettled,
            newest: state.newest,
            term: state.term,
            retired: state.retired,
            absorbed: state.absorbed,
            size: state.size,
            engine,
        })
    }

    /// What a checkpoint holds of it.
    pub fn state(&self) -> State {
        State {
            range: Some(self.range.clone()),
            generation: self.generation,
            closed: self.safe.closed(),
            lease: self.lease,
            prepared: self.prepared.clone(),
            unsettled: self.unsettled.clone(),
            newest: self.newest,
            term: self.term,
            outcomes_since: self.outcomes.since(),
            retired: self.retired,
            absorbed: self.absorbed.clone(),
            size: self.size,
        }
    }

    /// Takes the next entry of the log, which stands there with `term`. [`Command::Split`] and [`Command::Absorb`] are
    /// for [`Replica::divide`] and [`Replica::absorb`].
    ///
    /// # Errors
    ///
    /// When the log contradicts itself, or the engine fails.
    pub fn apply(&mut self, entry: Entry, term: u64) -> Result<Applied, ReplicaError> {
        let mut batch = Batch::default();
        let applied = self.apply_into(&mut batch, entry, term)?;
        self.engine.write(batch)?;
        Ok(applied)
    }

    /// What [`Replica::apply`] is, of an entry that does not look at rows ([`looks_at_rows`]): what it writes is left in
    /// `batch`, for the caller to write together with that of other entries.
    ///
    /// # Errors
    ///
    /// When the log contradicts itself.
    pub fn apply_into(
        &mut self,
        batch: &mut Batch,
        entry: Entry,
        term: u64,
    ) -> Result<Applied, ReplicaError> {
        let closed = self.begin(&entry, term)?;
        let applied = match entry.command {
            Command::Close | Command::Split { .. } | Command::Absorb { .. } => Applied::Nothing,
            Command::Lease(_) if self.retired.is_some() => Applied::Nothing,
            Command::Lease(grant) => Applied::Lease(self.lease.grant(grant)),
            Command::Yield => {
                self.lease.yield_at(entry.closed);
                Applied::Nothing
            }
            Command::Commit { txn, at, writes, participants } => {
                let applied = self.commit(batch, txn, at, &writes, closed)?;
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
            // Which of its entries the split that takes it in has seen by then, differs between nodes.
            Command::Resolve { .. } if self.retired.is_some() => Applied::Nothing,
            Command::Resolve { txn, outcome } => self.resolve(batch, txn, outcome)?,
            Command::Collect { horizon, stretch } => {
                self.rows.collect(batch, &self.range, horizon, &stretch)?;
                self.keep_since(batch);
                Applied::Nothing
            }
            Command::Forget { outcomes } => {
                self.outcomes.keep_since(outcomes);
                self.outcomes.forget(|txn| self.unsettled.contains_key(&txn));
                Applied::Nothing
            }
            Command::Surveyed { rows, bytes } => {
                self.size = (rows, bytes);
                Applied::Nothing
            }
            Command::Retire { into } => {
                self.retired = Some(into);
                // Its leader made the entry under its own lease, and serves no more.
                self.lease.yield_at(entry.closed);
                Applied::Retired
            }
        };
        self.safe.close(entry.closed);
        Ok(applied)
    }

    /// What [`Replica::apply`] is for other commands, for [`Command::Split`]. Rows stay where they are, and are the other's
    /// from here on.
    ///
    /// # Errors
    ///
    /// When the log contradicts itself.
    pub fn divide(&mut self, entry: &Entry, term: u64) -> Result<Option<Self>, ReplicaError> {
        self.begin(entry, term)?;
        self.safe.close(entry.closed);
        let Command::Split { at, right, leader } = &entry.command else { return Ok(None) };
        let halves = (
            Range::between(self.range.start().clone(), Some(at.as_bytes().clone())),
            Range::between(at.as_bytes().clone(), self.range.end().cloned()),
        );
        let (Ok(left_range), Ok(right_range)) = halves else { return Ok(None) };
        let open = !self.prepared.is_empty() || self.retired.is_some();
        if open || left_range.is_empty() || right_range.is_empty() {
            return Ok(None);
        }
        self.generation += 1;
        // About: the next survey of each counts them.
        self.size = (self.size.0 / 2, self.size.1 / 2);
        let half = Self {
            split: *right,
            engine: Arc::clone(&self.engine),
            range: right_range,
            generation: self.generation,
            rows: self.rows.clone(),
            safe: self.safe.clone(),
            lease: self.lease.inherited(Tenure { node: *leader, term }, FIRST_TERM),
            prepared: BTreeMap::new(),
            outcomes: self.outcomes.copied(),
            unsettled: BTreeMap::new(),
            newest: self.newest,
            term: 0,
            retired: None,
            absorbed: BTreeSet::new(),
            size: self.size,
        };
        self.range = left_range;
        Ok(Some(half))
    }

    /// What [`Replica::apply`] is for other commands, for [`Command::Absorb`], with the replica of the right half on
    /// this node, which has retired. All that is written goes into `batch`, for the caller to write together with the
    /// checkpoint of this one and the end of that. False when nothing came of it: this one was cut after the entry was
    /// asked for, and ends elsewhere.
    ///
    /// # Errors
    ///
    /// When the log contradicts itself, or the engine fails.
    pub fn absorb(
        &mut self,
        entry: &Entry,
        term: u64,
        right: &Self,
        batch: &mut Batch,
    ) -> Result<bool, ReplicaError> {
        self.begin(entry, term)?;
        self.safe.close(entry.closed);
        if !self.touches(right) {
            return Ok(false);
        }
        self.take_from(right, batch)?;
        self.range = Range::between(self.range.start().clone(), right.range.end().cloned())
            .map_err(|_| ReplicaError::Elsewhere)?;
        self.absorbed.insert(right.split);
        self.absorbed.extend(&right.absorbed);
        self.generation = self.generation.max(right.generation) + 1;
        self.size = (self.size.0 + right.size.0, self.size.1 + right.size.1);
        // Its rows are this one's where they are, or copies of them are.
        if right.rows.home() != self.rows.home() {
            right.rows.clear(batch, &right.range)?;
        }
        right.erase_beside_rows(batch);
        Ok(true)
    }

    /// Whether `right` begins where this one ends.
    pub fn touches(&self, right: &Self) -> bool {
        self.range.end() == Some(right.range.start())
    }

    /// Whether `split` has become part of it.
    pub fn has_absorbed(&self, split: SplitId) -> bool {
        self.absorbed.contains(&split)
    }

    /// Puts rows and outcomes of a split into the engine, for [`Replica::restore`] with the checkpoint that is written
    /// together with them.
    pub(crate) fn fill(
        split: SplitId,
        rows: &Mvcc,
        batch: &mut Batch,
        versions: &[(Key, Version)],
        outcomes: &[(TxnId, Outcome)],
        outcomes_since: Timestamp,
    ) {
        for (key, version) in versions {
            rows.put_version(batch, key, version);
        }
        let mut kept = Outcomes::default();
        outcomes.iter().for_each(|(txn, outcome)| kept.note(*txn, *outcome));
        kept.keep_since(outcomes_since);
        kept.save(split, batch);
        batch.put(kept_key(split), rows.kept_since().0.to_be_bytes().to_vec());
    }

    /// Removes everything that the engine has of this split.
    ///
    /// # Errors
    ///
    /// When the engine fails.
    pub fn erase(&self, batch: &mut Batch) -> Result<(), ReplicaError> {
        self.rows.clear(batch, &self.range)?;
        self.erase_beside_rows(batch);
        Ok(())
    }

    fn erase_beside_rows(&self, batch: &mut Batch) {
        self.outcomes.erase(self.split, batch);
        batch.delete(kept_key(self.split));
    }

    /// Puts into `batch` what there is beside rows since the last checkpoint, for the one that is written together with it.
    pub(crate) fn save_outcomes(&mut self, batch: &mut Batch) {
        self.outcomes.save(self.split, batch);
    }

    /// Puts into `batch` from when on its snapshots are whole.
    pub(crate) fn keep_since(&self, batch: &mut Batch) {
        batch.put(kept_key(self.split), self.rows.kept_since().0.to_be_bytes().to_vec());
    }

    /// How `txn` ended. `None` is "not yet", so far as this replica has applied the log.
    pub fn outcome(&self, txn: TxnId) -> Option<Outcome> {
        // What began before everything kept may have an outcome that is forgotten; nobody can begin it again.
        let forgotten = txn.started < self.outcomes.since() && !self.prepared.contains_key(&txn);
        self.outcomes.get(txn).or_else(|| forgotten.then_some(Outcome::Aborted))
    }

    /// All outcomes that are kept.
    pub fn outcomes(&self) -> impl Iterator<Item = (TxnId, Outcome)> {
        self.outcomes.iter()
    }

    /// Its number.
    pub fn split(&self) -> SplitId {
        self.split
    }

    /// What it holds.
    pub fn range(&self) -> &Range {
        &self.range
    }

    /// Goes up with each change of range or nodes.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The nodes of the split are others now.
    pub fn change_nodes(&mut self) {
        self.generation += 1;
    }

    /// Its rows.
    pub fn rows(&self) -> &Mvcc {
        &self.rows
    }

    /// Rows and bytes, about.
    pub fn size(&self) -> (u64, u64) {
        self.size
    }

    /// The latest commit.
    pub fn newest(&self) -> Timestamp {
        self.newest
    }

    /// Its lease.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// What bounds its snapshots.
    pub fn safe_time(&self) -> &SafeTime {
        &self.safe
    }

    /// What was promised of `txn`, if its coordinator has not been heard.
    pub fn promise(&self, txn: TxnId) -> Option<&Prepared> {
        self.prepared.get(&txn)
    }

    /// Whether nobody else decides about `txn`: it has promised it to no other coordinator.
    pub fn decides(&self, txn: TxnId) -> bool {
        self.promise(txn).is_none_or(|promise| self.speaks_for(promise.coordinator))
    }

    /// Promises whose coordinator has not been heard, oldest first.
    pub fn in_doubt(&self) -> impl Iterator<Item = (TxnId, &Prepared)> {
        self.prepared.iter().map(|(txn, prepared)| (*txn, prepared))
    }

    /// Decisions made here, with those who must hear of them.
    pub fn unsettled(&self) -> impl Iterator<Item = (TxnId, &[SplitId])> {
        self.unsettled.iter().map(|(txn, participants)| (*txn, participants.as_slice()))
    }

    /// Whether it speaks for `split` as a coordinator: it is that one, or that one has become part of it.
    pub fn speaks_for(&self, split: SplitId) -> bool {
        self.split == split || self.absorbed.contains(&split)
    }

    /// Whom it waits to be part of, if it serves nobody any more.
    pub fn retired(&self) -> Option<SplitId> {
        self.retired
    }

    /// A term began: the empty entry that each new leader of a consensus group logs first.
    pub fn begin_term(&mut self, term: u64) {
        self.term = term;
    }

    /// The term of the last entry applied.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Checks an entry and gives what was closed before it.
    fn begin(&mut self, entry: &Entry, term: u64) -> Result<Timestamp, ReplicaError> {
        if entry.term != term {
            return Err(ReplicaError::Term { made: entry.term, logged: term });
        }
        self.term = term;
        Ok(self.safe.closed())
    }

    fn commit(
        &mut self,
        batch: &mut Batch,
        txn: TxnId,
        at: Timestamp,
        writes: &[Mutation],
        closed: Timestamp,
    ) -> Result<Applied, ReplicaError> {
        if let Some(outcome) = self.outcome(txn) {
            return Ok(self.again(txn, outcome));
        }
        self.check_open(writes)?;
        if at <= closed {
            return Err(ReplicaError::Closed { at, closed });
        }
        self.write(batch, writes, at);
        Ok(self.end(txn, Outcome::Committed(at)))
    }

    fn prepare(
        &mut self,
        txn: TxnId,
        prepared: Prepared,
        closed: Timestamp,
    ) -> Result<Applied, ReplicaError> {
        if let Some(outcome) = self.outcome(txn) {
            return Ok(self.again(txn, outcome));
        }
        if let Some(before) = self.prepared.get(&txn) {
            return Ok(Applied::Prepared(txn, before.at));
        }
        self.check_open(&prepared.writes)?;
        if prepared.at <= closed {
            return Err(ReplicaError::Closed { at: prepared.at, closed });
        }
        let at = prepared.at;
        self.safe.prepare(txn, at, spans_of(&prepared.writes));
        self.prepared.insert(txn, prepared);
        Ok(Applied::Prepared(txn, at))
    }

    fn resolve(&mut self, batch: &mut Batch, txn: TxnId, outcome: Outcome) -> Result<Applied, ReplicaError> {
        if let Some(outcome) = self.outcome(txn) {
            return Ok(self.again(txn, outcome));
        }
        let promised = self.prepared.remove(&txn);
        if let Outcome::Committed(at) = outcome {
            let promised =
                promised.filter(|promised| promised.at <= at).ok_or(ReplicaError::Unprepared(txn))?;
            self.write(batch, &promised.writes, at);
        }
        self.safe.resolve(txn);
        Ok(self.end(txn, outcome))
    }

    fn check_open(&self, writes: &[Mutation]) -> Result<(), ReplicaError> {
        if self.retired.is_some() {
            return Err(ReplicaError::Retired);
        }
        match writes.iter().all(|write| self.range.contains(&write.key)) {
            true => Ok(()),
            false => Err(ReplicaError::Elsewhere),
        }
    }

    fn write(&mut self, batch: &mut Batch, writes: &[Mutation], at: Timestamp) {
        self.rows.apply(batch, writes, at);
        for write in writes {
            let value = write.value.as_ref().map_or(0, Bytes::len);
            self.size.0 += 1;
            self.size.1 += (write.key.as_bytes().len() + value) as u64;
        }
    }

    fn end(&mut self, txn: TxnId, outcome: Outcome) -> Applied {
        self.outcomes.note(txn, outcome);
        self.again(txn, outcome)
    }

    fn again(&mut self, txn: TxnId, outcome: Outcome) -> Applied {
        if let Outcome::Committed(at) = outcome {
            self.newest = self.newest.max(at);
        }
        Applied::Ended(txn, outcome)
    }

    /// Copies `other`'s rows, unless they are in this one's home, and its outcomes.
    fn take_from(&mut self, other: &Self, batch: &mut Batch) -> Result<(), ReplicaError> {
        if other.rows.home() != self.rows.home() {
            let rows = self.rows.clone();
            other.rows.versions(&other.range, &mut |key, version| rows.put_version(batch, &key, &version))?;
        }
        for (txn, outcome) in other.outcomes() {
            // What is promised here has not happened here: the entry that says how it ended is still to come.
            if self.outcome(txn).is_none() && !self.prepared.contains_key(&txn) {
                self.outcomes.note(txn, outcome);
            }
        }
        self.rows.keep_since(other.rows.kept_since());
        self.keep_since(batch);
        self.outcomes.keep_since(other.outcomes.since());
        self.newest = self.newest.max(other.newest);
        Ok(())
    }
}

/// Whether applying `command` reads rows, which must be written by then.
pub(crate) fn looks_at_rows(command: &Command) -> bool {
    matches!(command, Command::Collect { .. } | Command::Split { .. } | Command::Absorb { .. })
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replica")
            .field("split", &self.split)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

fn prefix(kind: u8, split: SplitId) -> Vec<u8> {
    let mut key = vec![kind];
    key.extend_from_slice(&split.0.to_be_bytes());
    key
}

fn kept_key(split: SplitId) -> Vec<u8> {
    prefix(KEPT, split)
}

fn read_u64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}
