use std::{collections::BTreeMap, time::Duration};

use super::{Applied, Attempt, Command, Entry, Outcome, Prepared, Replica, SplitId, TxnId, spans_of};
use crate::{
    keys::Range,
    lease::{Grant, NodeId, Tenure},
    locks::{Changes, Lock, LockError, LockTable, Mode},
    mvcc::{Mutation, Stretch},
    truetime::{Interval, Timestamp},
};

/// A transaction that has asked for nothing for so long has lost its client, or will not hear of it in time.
pub const IDLE: Duration = Duration::from_secs(5);
/// Longer than any request is on its way.
const LATE: Duration = Duration::from_secs(30);

/// Why a leader does not do as asked. Nothing was changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// It has no lease now, or has not yet applied what the leader before it logged.
    #[error("this node does not serve the split now")]
    NotServing,
    /// The split is about to be changed, and nothing new begins.
    #[error("the split is about to be changed")]
    Frozen,
    /// The transaction holds no locks here: an older one ended it, or the leader has changed.
    #[error(
        "the transaction was ended by an older one or by a change of leader; begin again with the same age"
    )]
    Lost,
    /// The transaction has ended, and this is how.
    #[error("the transaction has ended already")]
    Ended(Outcome),
    /// The transaction's commit is under way.
    #[error("the transaction's commit is under way")]
    Committing,
    /// The timestamp would lie outside the lease: soon there is another.
    #[error("the lease ends before the commit would")]
    LeaseTooShort,
    /// A snapshot that has not come yet.
    #[error("the snapshot at {asked} is in the future: it is {latest} at the latest")]
    Future {
        /// The snapshot asked for.
        asked: Timestamp,
        /// What time it can be at most.
        latest: Timestamp,
    },
    /// The lock table says no.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// Whether a snapshot can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Snapshot {
    /// Nothing will change it any more.
    Whole,
    /// Something at or before it may still be committed: ask again when the log has gone on.
    NotYet,
}

/// What a split's leader knows and no log: locks, and the last timestamp that it gave away. One for each term led.
#[derive(Debug)]
pub struct Leader {
    me: Tenure,
    locks: LockTable,
    reads: BTreeMap<TxnId, Vec<Range>>,
    /// When each transaction last asked for something.
    heard: BTreeMap<TxnId, Timestamp>,
    /// Transactions that lost their locks here, and when they last asked for something. What they have read is not so any
    /// more, and a request of theirs that comes late must not make it look as if it were.
    lost: BTreeMap<TxnId, Timestamp>,
    /// Everything assigned from now on is later, whether or not it gets into the log.
    last: Timestamp,
    /// Commits proposed and not applied, with what they write.
    proposed: BTreeMap<TxnId, (Timestamp, Vec<Range>)>,
    /// Nothing is assigned or shown any more until the split, or its leader, is another.
    frozen: bool,
}

impl Leader {
    /// The leader of `term`, which serves once `replica` has applied an entry of that term: then it has applied all
    /// that any leader before it logged.
    pub fn new(node: NodeId, term: u64) -> Self {
        Self {
            me: Tenure { node, term },
            locks: LockTable::default(),
            reads: BTreeMap::new(),
            heard: BTreeMap::new(),
            lost: BTreeMap::new(),
            last: Timestamp::ZERO,
            proposed: BTreeMap::new(),
            frozen: false,
        }
    }

    /// Takes over the promises of leaders before, as soon as all of their entries are applied.
    pub fn inherit(&mut self, replica: &Replica) {
        for (txn, prepared) in replica.in_doubt() {
            let reads = prepared.reads.iter().map(|span| Lock { span: span.clone(), mode: Mode::Shared });
            let writes = exclusive(&prepared.writes);
            self.locks.reinstate(txn, prepared.age, reads.chain(writes).collect());
        }
        self.last = self.last.max(replica.safe.closed());
    }

    /// Locks `spans` for reading. What is there may be told once the transaction is among the granted.
    ///
    /// # Errors
    ///
    /// See [`Refusal`].
    pub fn read(
        &mut self,
        replica: &Replica,
        attempt: Attempt,
        first: bool,
        spans: Vec<Range>,
        now: Interval,
    ) -> Result<Changes, Refusal> {
        self.check_open(replica, attempt.txn, !first, now)?;
        let wanted = spans.iter().map(|span| Lock { span: span.clone(), mode: Mode::Shared }).collect();
        let changes = self.locks.acquire(attempt.txn, attempt.age, wanted)?;
        self.heard.insert(attempt.txn, now.latest);
        self.forget(&changes.wounded);
        self.reads.entry(attempt.txn).or_default().extend(spans);
        Ok(changes)
    }

    /// Locks what is written. `read_here` says that the transaction has read at this split, in this term.
    ///
    /// # Errors
    ///
    /// See [`Refusal`].
    pub fn lock_writes(
        &mut self,
        replica: &Replica,
        attempt: Attempt,
        read_here: bool,
        writes: &[Mutation],
        now: Interval,
    ) -> Result<Changes, Refusal> {
        self.check_open(replica, attempt.txn, read_here, now)?;
        let changes = self.locks.acquire(attempt.txn, attempt.age, exclusive(writes).collect())?;
        self.heard.insert(attempt.txn, now.latest);
        self.forget(&changes.wounded);
        Ok(changes)
    }

    /// Commits at `floor` or later what [`Leader::lock_writes`] has locked. `floor` is at least `TT.latest` of the
    /// commit's arrival, and at least the promise of each of `participants`, of which this split is none.
    ///
    /// # Errors
    ///
    /// See [`Refusal`].
    pub fn commit(
        &mut self,
        replica: &Replica,
        txn: TxnId,
        writes: Vec<Mutation>,
        participants: Vec<SplitId>,
        floor: Timestamp,
        now: Interval,
    ) -> Result<Entry, Refusal> {
        self.check_open(replica, txn, true, now)?;
        let at = self.next(replica).max(floor);
        // Within the lease, whoever leads next has waited until `at` has passed, though this leader may not live to.
        if !replica.lease.covers(self.me, at) {
            return Err(Refusal::LeaseTooShort);
        }
        if !self.locks.prepare(txn) {
            return Err(Refusal::Lost);
        }
        self.proposed.insert(txn, (at, spans_of(&writes)));
        self.last = at;
        Ok(self.entry(at, Command::Commit { txn, at, writes, participants }))
    }

    /// Promises to commit what [`Leader::lock_writes`] has locked, if `coordinator` says so.
    ///
    /// # Errors
    ///
    /// See [`Refusal`].
    pub fn prepare(
        &mut self,
        replica: &Replica,
        attempt: Attempt,
        writes: Vec<Mutation>,
        coordinator: SplitId,
        now: Interval,
    ) -> Result<Entry, Refusal> {
        let txn = attempt.txn;
        self.check_open(replica, txn, true, now)?;
        if !self.locks.prepare(txn) {
            return Err(Refusal::Lost);
        }
        let at = self.next(replica);
        self.proposed.insert(txn, (at, spans_of(&writes)));
        let reads = self.reads.get(&txn).cloned().unwrap_or_default();
        let prepared = Prepared { age: attempt.age, at, reads, writes, coordinator };
        self.last = at;
        Ok(self.entry(at, Command::Prepare { txn, prepared }))
    }

    /// Logs how a transaction ended: at a participant what the coordinator said, at a coordinator that it is aborted.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotServing`], and [`Refusal::Committing`] for an abort that the commit under way comes before.
    pub fn resolve(
        &mut self,
        replica: &Replica,
        txn: TxnId,
        outcome: Outcome,
        now: Interval,
    ) -> Result<Entry, Refusal> {
        self.check_lease(replica, now)?;
        if let Some(ended) = replica.outcome(txn) {
            return Err(Refusal::Ended(ended));
        }
        if self.proposed.contains_key(&txn) {
            return Err(Refusal::Committing);
        }
        Ok(self.entry(self.last, Command::Resolve { txn, outcome }))
    }

    /// An entry that closes `at`: for a replica that was asked for that moment, or so that replicas without writes show
    /// snapshots too.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotServing`], and [`Refusal::Future`].
    pub fn close_at(&mut self, replica: &Replica, at: Timestamp, now: Interval) -> Result<Entry, Refusal> {
        self.check_serving(replica, now)?;
        if at > now.latest {
            return Err(Refusal::Future { asked: at, latest: now.latest });
        }
        if at > self.last && !replica.lease.covers(self.me, at) {
            return Err(Refusal::NotServing);
        }
        self.last = self.last.max(at);
        Ok(self.entry(self.last, Command::Close))
    }

    /// From here on nothing new begins: what is under way ends, and then the split can be changed.
    pub fn freeze(&mut self) {
        self.frozen = true;
    }

    /// The change is off.
    pub fn thaw(&mut self) {
        self.frozen = false;
    }

    /// Whether nothing new begins.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Whether nothing that it began is under way any more.
    pub fn is_drained(&self, replica: &Replica) -> bool {
        self.proposed.is_empty() && replica.prepared.is_empty()
    }

    /// An entry that changes the split: of what was frozen and is drained.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotServing`], and [`Refusal::Committing`] while something is under way.
    pub fn change(&self, replica: &Replica, command: Command, now: Interval) -> Result<Entry, Refusal> {
        self.check_lease(replica, now)?;
        if !self.frozen || !self.is_drained(replica) {
            return Err(Refusal::Committing);
        }
        Ok(self.entry(self.last, command))
    }

    /// An entry that takes in a split whose leaders assigned and showed nothing after `over`, which has passed.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotServing`].
    pub fn absorb(
        &mut self,
        replica: &Replica,
        command: Command,
        over: Timestamp,
        now: Interval,
    ) -> Result<Entry, Refusal> {
        self.check_serving(replica, now)?;
        if !now.is_after(over) {
            return Err(Refusal::NotServing);
        }
        self.last = self.last.max(over);
        Ok(self.entry(self.last, command))
    }

    /// The split is another: whoever held locks begins again. Only what is prepared must not, and nothing was.
    pub fn forget_locks(&mut self) {
        self.locks = LockTable::default();
        self.reads.clear();
        self.lost.append(&mut self.heard);
    }

    /// An entry that says of `txns`, decided here, that every participant has logged the decision.
    pub fn settled(&self, txns: Vec<TxnId>) -> Entry {
        self.entry(self.last, Command::Settled { txns })
    }

    /// An entry that asks for a lease, served or not: it is how serving begins.
    pub fn lease(&self, grant: Grant) -> Entry {
        self.entry(self.last, Command::Lease(grant))
    }

    /// An entry that forgets versions in `stretch` that are older than `horizon`, or than what somebody may still be
    /// reading.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotServing`].
    pub fn collect(
        &self,
        replica: &Replica,
        horizon: Timestamp,
        stretch: Stretch,
        now: Interval,
    ) -> Result<Entry, Refusal> {
        self.check_serving(replica, now)?;
        let horizon = horizon.min(replica.safe.safe());
        Ok(self.entry(self.last, Command::Collect { horizon, stretch }))
    }

    /// An entry that forgets outcomes of attempts that began before `outcomes`, and that nobody has to hear of.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotServing`].
    pub fn forget_outcomes(
        &self,
        replica: &Replica,
        outcomes: Timestamp,
        now: Interval,
    ) -> Result<Entry, Refusal> {
        self.check_serving(replica, now)?;
        let outcomes = outcomes.min(replica.safe.safe());
        Ok(self.entry(self.last, Command::Forget { outcomes }))
    }

    /// An entry that says how many rows exist, and what they take.
    pub fn surveyed(&self, (rows, bytes): (u64, u64)) -> Entry {
        self.entry(self.last, Command::Surveyed { rows, bytes })
    }

    /// Whether the snapshot of `range` at `at` can be shown. If so, nothing is committed at or before `at` any more:
    /// not by this leader, which remembers, and not by the next, whose lease begins after this one's end.
    ///
    /// # Errors
    ///
    /// See [`Refusal`].
    pub fn snapshot(
        &mut self,
        replica: &Replica,
        range: &Range,
        at: Timestamp,
        now: Interval,
    ) -> Result<Snapshot, Refusal> {
        self.check_serving(replica, now)?;
        if at > now.latest {
            return Err(Refusal::Future { asked: at, latest: now.latest });
        }
        if at > self.last && !replica.lease.covers(self.me, at) {
            return Err(Refusal::NotServing);
        }
        let mut under_way = self.proposed.values().filter(|(from, _)| *from <= at);
        if under_way.any(|(_, spans)| spans.iter().any(|span| span.overlaps(range))) {
            return Ok(Snapshot::NotYet);
        }
        let mut promised = replica.prepared.values().filter(|prepared| prepared.at <= at);
        if promised.any(|prepared| prepared.writes.iter().any(|write| range.contains(&write.key))) {
            return Ok(Snapshot::NotYet);
        }
        self.last = self.last.max(at);
        Ok(Snapshot::Whole)
    }

    /// Hears what an entry came to. Locks stay until [`Leader::release`]: the commit may have to be waited for.
    pub fn applied(&mut self, applied: &Applied) {
        if let Applied::Prepared(txn, _) | Applied::Ended(txn, _) = applied {
            self.proposed.remove(txn);
        }
    }

    /// What [`Leader::commit`] or [`Leader::prepare`] made did not get into the log: nothing came of it.
    pub fn retract(&mut self, txn: TxnId) {
        self.proposed.remove(&txn);
    }

    /// Lets go of a transaction that has ended: applied, and its timestamp past.
    pub fn release(&mut self, txn: TxnId) -> Changes {
        self.reads.remove(&txn);
        self.heard.remove(&txn);
        let changes = self.locks.release(txn);
        self.forget(&changes.wounded);
        changes
    }

    /// Lets go of a transaction whose client gave up. One that may be committed already stays.
    pub fn abandon(&mut self, replica: &Replica, txn: TxnId) -> Changes {
        if self.proposed.contains_key(&txn) || replica.prepared.contains_key(&txn) {
            return Changes::default();
        }
        self.lost.extend(self.heard.remove_entry(&txn));
        self.release(txn)
    }

    /// Lets go of transactions that have asked for nothing for [`IDLE`], as if their clients had given up: without
    /// that, one lost client would hold up all who come after it.
    pub fn expire(&mut self, replica: &Replica, now: Interval) -> Changes {
        let idle: Vec<_> =
            self.heard.iter().filter(|(_, at)| now.is_after(at.plus(IDLE))).map(|(txn, _)| *txn).collect();
        self.lost.retain(|_, at| !now.is_after(at.plus(LATE)));
        let mut changes = Changes::default();
        for txn in idle {
            let Changes { granted, wounded } = self.abandon(replica, txn);
            changes.granted.extend(granted);
            changes.wounded.extend(wounded);
            // It may wait for something: it has to hear that it does so in vain.
            if !self.locks.knows(txn) {
                changes.wounded.push(txn);
            }
        }
        changes
    }

    /// Promises that older transactions wait for, with who decides about them.
    pub fn promises_in_the_way(&self, replica: &Replica) -> Vec<(TxnId, SplitId)> {
        let promised = |txn: TxnId| Some((txn, replica.prepared.get(&txn)?.coordinator));
        self.locks.prepared_in_the_way().into_iter().filter_map(promised).collect()
    }

    /// Whether the transaction holds locks here or waits for some.
    pub fn knows(&self, txn: TxnId) -> bool {
        self.locks.knows(txn)
    }

    /// Itself, as leases know it.
    pub fn tenure(&self) -> Tenure {
        self.me
    }

    /// The term it leads.
    pub fn term(&self) -> u64 {
        self.me.term
    }

    fn entry(&self, closed: Timestamp, command: Command) -> Entry {
        Entry { term: self.me.term, closed, command }
    }

    /// After everything this leader assigned or showed, and after everything that leaders before it did: those stayed
    /// within leases that ended before this one's start.
    fn next(&self, replica: &Replica) -> Timestamp {
        let start = replica.lease.granted().map_or(Timestamp::ZERO, |held| held.start);
        self.last.max(start).max(replica.safe.closed()).max(replica.newest).next()
    }

    /// Whether it may answer now.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotServing`] and [`Refusal::Frozen`].
    pub fn check_serving(&self, replica: &Replica, now: Interval) -> Result<(), Refusal> {
        self.check_lease(replica, now)?;
        if self.frozen { Err(Refusal::Frozen) } else { Ok(()) }
    }

    /// Whether it has the lease.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotServing`].
    pub fn check_lease(&self, replica: &Replica, now: Interval) -> Result<(), Refusal> {
        let serves =
            replica.term == self.me.term && replica.retired().is_none() && replica.lease.serves(self.me, now);
        if serves { Ok(()) } else { Err(Refusal::NotServing) }
    }

    fn check_open(&self, replica: &Replica, txn: TxnId, known: bool, now: Interval) -> Result<(), Refusal> {
        self.check_serving(replica, now)?;
        if let Some(outcome) = replica.outcome(txn) {
            return Err(Refusal::Ended(outcome));
        }
        if self.proposed.contains_key(&txn) || replica.prepared.contains_key(&txn) {
            return Err(Refusal::Committing);
        }
        if self.lost.contains_key(&txn) || known && !self.locks.knows(txn) {
            return Err(Refusal::Lost);
        }
        Ok(())
    }

    fn forget(&mut self, wounded: &[TxnId]) {
        for txn in wounded {
            self.reads.remove(txn);
            self.lost.extend(self.heard.remove_entry(txn));
        }
    }
}

fn exclusive(writes: &[Mutation]) -> impl Iterator<Item = Lock> {
    writes.iter().map(|write| Lock { span: Range::point(&write.key), mode: Mode::Exclusive })
}
