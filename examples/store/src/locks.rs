//! Locks on rows and ranges at a split's leader, held until a transaction has ended. Who waits for whom is decided by
//! age (wound-wait, Rosenkrantz et al. 1978): an older transaction ends a younger holder, a younger one waits.
//!
//! So a wait goes from younger to older, or to a prepared transaction. That one may still wait at another split, which
//! could close a circle: [`LockTable::prepared_in_the_way`] says which are older's hindrance, for their coordinators to
//! end them unless the decision stands. A retry keeps its age, so every transaction becomes the oldest in the end, and
//! nobody starves.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use crate::{keys::Range, truetime::Timestamp, txn::TxnId};

/// Locks of one transaction at one split: enough for 10,000 rows, and a bound of what one client can hold in memory.
pub const LOCKS_PER_TXN_MAX: usize = 10_000;
/// Transactions waiting at one split. Beyond it a wait is longer than any client's patience.
pub const WAITING_MAX: usize = 10_000;

/// How old a transaction is: smaller is older. Kept over the retries of one piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Age {
    /// When its first attempt began.
    pub first: Timestamp,
    /// Tells those that began together apart.
    pub client: u64,
    /// The later attempt counts as older: it must not wait for what its forerunner left behind.
    pub attempt: Reverse<u32>,
}

/// What a lock allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Others may read too.
    Shared,
    /// Nobody else may read or write.
    Exclusive,
}

/// A lock wanted or held: of a row, or of everything in a range, rows that do not exist yet included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// What it covers.
    pub span: Range,
    /// What it allows.
    pub mode: Mode,
}

impl Lock {
    fn conflicts(&self, other: &Self) -> bool {
        (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive) && self.span.overlaps(&other.span)
    }
}

/// Why a lock was not even waited for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LockError {
    /// The transaction waits already: one step at a time.
    #[error("the transaction waits for other locks already")]
    Waiting,
    /// It is prepared, and so asks for nothing more.
    #[error("the transaction is prepared")]
    Prepared,
    /// Over [`LOCKS_PER_TXN_MAX`].
    #[error("the transaction would hold more than {LOCKS_PER_TXN_MAX} locks")]
    TooMany,
    /// Over [`WAITING_MAX`].
    #[error("{WAITING_MAX} transactions wait at this split already")]
    Overloaded,
}

/// What a step changed, for the transactions that wait to hear of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Got all that they waited for.
    pub granted: Vec<TxnId>,
    /// Were ended by an older one and hold nothing any more.
    pub wounded: Vec<TxnId>,
}

#[derive(Debug)]
struct Holder {
    age: Age,
    held: Vec<Lock>,
    waits_for: Option<Vec<Lock>>,
    prepared: bool,
}

/// The locks of one split. They live and die with its leader's term.
#[derive(Debug, Default)]
pub struct LockTable {
    holders: BTreeMap<TxnId, Holder>,
    /// Held locks of one row each. A lookup walks those within what is asked for.
    rows: BTreeMap<Spot, Mode>,
    /// Held locks of more than a row. A lookup walks them all: scans within a transaction are few.
    wide: BTreeMap<Spot, Mode>,
    waiting: BTreeSet<(Age, TxnId)>,
}

type Spot = (Range, TxnId);

impl LockTable {
    /// Asks for `wanted`, all of them at once. The transaction is among the `granted` if it has them now; else it
    /// waits, and a later step tells.
    ///
    /// # Errors
    ///
    /// When the transaction may not ask; then nothing changed.
    pub fn acquire(&mut self, txn: TxnId, age: Age, wanted: Vec<Lock>) -> Result<Changes, LockError> {
        if self.waiting.len() >= WAITING_MAX {
            return Err(LockError::Overloaded);
        }
        let known = self.holders.get(&txn);
        if known.is_some_and(|holder| holder.prepared) {
            return Err(LockError::Prepared);
        }
        if known.is_some_and(|holder| holder.waits_for.is_some()) {
            return Err(LockError::Waiting);
        }
        if known.map_or(0, |holder| holder.held.len()) + wanted.len() > LOCKS_PER_TXN_MAX {
            return Err(LockError::TooMany);
        }
        let holder = self.holders.entry(txn).or_insert_with(|| Holder {
            age,
            held: Vec::new(),
            waits_for: None,
            prepared: false,
        });
        holder.waits_for = Some(wanted);
        self.waiting.insert((holder.age, txn));
        Ok(self.settle())
    }

    /// Nobody wounds this transaction from here on: it may be committed already. False when it holds nothing here or
    /// still waits, and so cannot be prepared.
    pub fn prepare(&mut self, txn: TxnId) -> bool {
        match self.holders.get_mut(&txn) {
            Some(holder) if holder.waits_for.is_none() => {
                holder.prepared = true;
                true
            }
            _ => false,
        }
    }

    /// Locks of a transaction that the log says is prepared, for a new leader. Nobody else holds any that conflict.
    pub fn reinstate(&mut self, txn: TxnId, age: Age, held: Vec<Lock>) {
        for lock in &held {
            self.note(txn, lock);
        }
        self.holders.insert(txn, Holder { age, held, waits_for: None, prepared: true });
    }

    /// Prepared transactions that older ones wait for. Each may wait for such an older one at another split, where it is
    /// not prepared yet.
    pub fn prepared_in_the_way(&self) -> BTreeSet<TxnId> {
        let mut found = BTreeSet::new();
        for (age, txn) in &self.waiting {
            let wanted = self.holders.get(txn).and_then(|holder| holder.waits_for.as_ref());
            for other in wanted.map(|wanted| self.holders_against(*txn, wanted)).unwrap_or_default() {
                let younger = |holder: &Holder| holder.prepared && holder.age > *age;
                if self.holders.get(&other).is_some_and(younger) {
                    found.insert(other);
                }
            }
        }
        found
    }

    /// The transaction has ended, either way: its locks go to those who wait.
    pub fn release(&mut self, txn: TxnId) -> Changes {
        if self.remove(txn) { self.settle() } else { Changes::default() }
    }

    /// Whether the transaction is known here, as a holder or waiting.
    pub fn knows(&self, txn: TxnId) -> bool {
        self.holders.contains_key(&txn)
    }

    /// Transactions that hold or wait.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Whether nobody holds or waits.
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }

    /// Gives every waiting transaction what it can have, oldest first, which makes one pass enough: a pass wounds only
    /// transactions younger than the one it is at, and those are not what an older one was left waiting for.
    fn settle(&mut self) -> Changes {
        let mut changes = Changes::default();
        let mut ahead: Vec<TxnId> = Vec::new();
        for (age, txn) in self.waiting.clone() {
            let Some(wanted) = self.holders.get(&txn).and_then(|holder| holder.waits_for.clone()) else {
                continue;
            };
            // What an older transaction waits for is not given to a younger one, or readers could pass a writer for ever.
            let behind = ahead.iter().any(|older| self.wants_conflicting(*older, &wanted));
            let mut free = !behind;
            for other in self.holders_against(txn, &wanted) {
                let younger =
                    self.holders.get(&other).is_some_and(|holder| !holder.prepared && holder.age > age);
                if younger {
                    self.remove(other);
                    changes.wounded.push(other);
                } else {
                    free = false;
                }
            }
            if free {
                self.grant(txn, age, wanted);
                changes.granted.push(txn);
            } else {
                ahead.push(txn);
            }
        }
        changes
    }

    fn grant(&mut self, txn: TxnId, age: Age, wanted: Vec<Lock>) {
        self.waiting.remove(&(age, txn));
        for lock in &wanted {
            self.note(txn, lock);
        }
        if let Some(holder) = self.holders.get_mut(&txn) {
            holder.waits_for = None;
            holder.held.extend(wanted);
        }
    }

    fn note(&mut self, txn: TxnId, lock: &Lock) {
        let spot = (lock.span.clone(), txn);
        let index = if is_row(&lock.span) { &mut self.rows } else { &mut self.wide };
        let mode = index.entry(spot).or_insert(lock.mode);
        if lock.mode == Mode::Exclusive {
            *mode = Mode::Exclusive;
        }
    }

    fn remove(&mut self, txn: TxnId) -> bool {
        let Some(holder) = self.holders.remove(&txn) else { return false };
        self.waiting.remove(&(holder.age, txn));
        for lock in holder.held {
            let spot = (lock.span, txn);
            self.rows.remove(&spot);
            self.wide.remove(&spot);
        }
        true
    }

    fn wants_conflicting(&self, txn: TxnId, wanted: &[Lock]) -> bool {
        self.holders
            .get(&txn)
            .and_then(|holder| holder.waits_for.as_ref())
            .is_some_and(|theirs| theirs.iter().any(|lock| wanted.iter().any(|mine| mine.conflicts(lock))))
    }

    fn holders_against(&self, txn: TxnId, wanted: &[Lock]) -> BTreeSet<TxnId> {
        let mut against = BTreeSet::new();
        for lock in wanted {
            let conflicts = |((span, other), mode): &(&Spot, &Mode)| {
                *other != txn && lock.conflicts(&Lock { span: span.clone(), mode: **mode })
            };
            // A row's lock that overlaps begins within what is wanted; a range's may begin anywhere before its end.
            let rows = self.rows.range((lock.span.least_from(), TxnId::FIRST)..);
            let rows = rows.take_while(|((span, _), _)| lock.span.end().is_none_or(|end| span.start() < end));
            against.extend(rows.chain(&self.wide).filter(conflicts).map(|((_, other), _)| *other));
        }
        against
    }
}

/// A range of one key has the least end that its beginning can have.
fn is_row(span: &Range) -> bool {
    span.end().and_then(|end| end.strip_suffix(&[0])).is_some_and(|start| start == &span.start()[..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::keys::Key;

    fn row(row: &str) -> Range {
        Range::point(&Key::new("t", row.as_bytes()).unwrap())
    }

    fn rows(from: &str, to: &str) -> Range {
        Range::rows("t", from.as_bytes(), to.as_bytes()).unwrap()
    }

    fn txn(number: u64) -> TxnId {
        TxnId { started: Timestamp(number), random: number }
    }

    fn age(number: u64) -> Age {
        Age { first: Timestamp(number), client: number, attempt: Reverse(0) }
    }

    fn shared(span: Range) -> Vec<Lock> {
        vec![Lock { span, mode: Mode::Shared }]
    }

    fn exclusive(span: Range) -> Vec<Lock> {
        vec![Lock { span, mode: Mode::Exclusive }]
    }

    fn granted(number: u64) -> Changes {
        Changes { granted: vec![txn(number)], wounded: vec![] }
    }

    #[test]
    fn the_older_wounds_and_the_younger_waits() {
        let mut locks = LockTable::default();
        assert_eq!(locks.acquire(txn(2), age(2), exclusive(row("a"))), Ok(granted(2)));
        assert_eq!(locks.acquire(txn(3), age(3), shared(row("a"))), Ok(Changes::default()));
        let step = locks.acquire(txn(1), age(1), shared(row("a"))).unwrap();
        assert_eq!(step, Changes { granted: vec![txn(1), txn(3)], wounded: vec![txn(2)] });
        assert!(!locks.knows(txn(2)) && !locks.prepare(txn(2)));
    }

    #[test]
    fn a_prepared_transaction_is_never_wounded() {
        let mut locks = LockTable::default();
        locks.acquire(txn(2), age(2), exclusive(row("a"))).unwrap();
        assert!(locks.prepare(txn(2)));
        assert_eq!(locks.acquire(txn(1), age(1), exclusive(row("a"))), Ok(Changes::default()));
        assert_eq!(locks.acquire(txn(2), age(2), shared(row("b"))), Err(LockError::Prepared));
        assert_eq!(locks.release(txn(2)), granted(1));
    }

    #[test]
    fn a_prepared_transaction_in_the_way_of_an_older_one_is_named() {
        let mut locks = LockTable::default();
        locks.acquire(txn(2), age(2), exclusive(row("a"))).unwrap();
        locks.prepare(txn(2));
        locks.acquire(txn(3), age(3), exclusive(row("a"))).unwrap();
        assert!(locks.prepared_in_the_way().is_empty(), "a younger one has time");
        locks.acquire(txn(1), age(1), exclusive(row("a"))).unwrap();
        assert_eq!(locks.prepared_in_the_way(), [txn(2)].into());
    }

    #[test]
    fn a_range_keeps_rows_out_that_do_not_exist_yet() {
        let mut locks = LockTable::default();
        locks.acquire(txn(1), age(1), shared(rows("a", "c"))).unwrap();
        assert_eq!(locks.acquire(txn(2), age(2), exclusive(row("bbb"))), Ok(Changes::default()));
        assert_eq!(locks.acquire(txn(3), age(3), exclusive(row("c"))), Ok(granted(3)));
        assert_eq!(locks.acquire(txn(4), age(4), exclusive(rows("", ""))), Ok(Changes::default()));
        assert_eq!(locks.release(txn(1)), granted(2));
    }

    #[test]
    fn a_range_sees_a_row_held_at_its_very_beginning() {
        let mut locks = LockTable::default();
        locks.acquire(txn(1), age(1), exclusive(row("a"))).unwrap();
        assert_eq!(locks.acquire(txn(2), age(2), shared(rows("a", "c"))), Ok(Changes::default()));
    }

    #[test]
    fn readers_do_not_pass_a_writer_that_is_older() {
        let mut locks = LockTable::default();
        locks.acquire(txn(1), age(1), shared(row("a"))).unwrap();
        assert_eq!(locks.acquire(txn(2), age(2), exclusive(row("a"))), Ok(Changes::default()));
        assert_eq!(locks.acquire(txn(3), age(3), shared(row("a"))), Ok(Changes::default()));
        assert_eq!(locks.release(txn(1)), granted(2));
        assert_eq!(locks.release(txn(2)), granted(3));
    }

    #[test]
    fn of_two_readers_that_both_want_to_write_the_older_does() {
        let mut locks = LockTable::default();
        locks.acquire(txn(1), age(1), shared(row("a"))).unwrap();
        locks.acquire(txn(2), age(2), shared(row("a"))).unwrap();
        assert_eq!(locks.acquire(txn(2), age(2), exclusive(row("a"))), Ok(Changes::default()));
        let step = locks.acquire(txn(1), age(1), exclusive(row("a"))).unwrap();
        assert_eq!(step, Changes { granted: vec![txn(1)], wounded: vec![txn(2)] });
    }

    #[test]
    fn a_retry_does_not_wait_for_its_forerunner() {
        let mut locks = LockTable::default();
        locks.acquire(txn(1), age(1), exclusive(row("a"))).unwrap();
        let retry = Age { attempt: Reverse(1), ..age(1) };
        let step = locks.acquire(txn(2), retry, exclusive(row("a"))).unwrap();
        assert_eq!(step, Changes { granted: vec![txn(2)], wounded: vec![txn(1)] });
    }

    #[test]
    fn there_is_an_end_to_what_one_transaction_holds() {
        let mut locks = LockTable::default();
        let many = vec![Lock { span: row("a"), mode: Mode::Shared }; LOCKS_PER_TXN_MAX + 1];
        assert_eq!(locks.acquire(txn(1), age(1), many), Err(LockError::TooMany));
        assert!(locks.is_empty());
    }

    /// One piece of work: locks to take in turn, in as many attempts as it needs.
    #[derive(Debug)]
    struct Worker {
        steps: Vec<Lock>,
        done: usize,
        attempt: u32,
        id: TxnId,
        waits: bool,
        prepared: bool,
    }

    /// No two hold what excludes the other, and every wait goes to an older or a prepared transaction.
    fn check(locks: &LockTable) {
        for (txn, holder) in &locks.holders {
            for (other, its) in &locks.holders {
                let conflict =
                    |mine: &[Lock]| mine.iter().any(|lock| its.held.iter().any(|held| lock.conflicts(held)));
                if txn == other {
                    continue;
                }
                assert!(!conflict(&holder.held), "{txn:?} and {other:?} exclude each other");
                let waits = holder.waits_for.as_deref().is_some_and(conflict);
                assert!(
                    !waits || its.prepared || its.age < holder.age,
                    "{txn:?} waits for {other:?}, a younger one"
                );
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn nothing_deadlocks_and_the_oldest_is_never_ended(
            scripts in prop::collection::vec(
                prop::collection::vec((0u8..6, 0u8..3, any::<bool>()), 1..5), 2..7),
            choices in prop::collection::vec(any::<prop::sample::Index>(), 1..64),
        ) {
            let lock = |(at, width, writes): &(u8, u8, bool)| {
                let name = |offset: u8| char::from(b'a' + at + offset).to_string();
                let span = if *width == 0 { row(&name(0)) } else { rows(&name(0), &name(*width)) };
                Lock { span, mode: if *writes { Mode::Exclusive } else { Mode::Shared } }
            };
            let mut workers: Vec<_> = scripts.iter().enumerate().map(|(number, script)| Worker {
                steps: script.iter().map(lock).collect(),
                done: 0, attempt: 0, id: txn(number as u64), waits: false, prepared: false,
            }).collect();
            let mut ended = vec![false; workers.len()];
            let mut locks = LockTable::default();
            let mut fresh = 1000;
            for turn in 0.. {
                let able: Vec<_> = (0..workers.len()).filter(|w| !ended[*w] && !workers[*w].waits).collect();
                if ended.iter().all(|ended| *ended) {
                    break;
                }
                prop_assert!(!able.is_empty(), "deadlock");
                prop_assert!(turn < 10_000, "nobody gets anywhere");
                let at = able[choices[turn % choices.len()].index(able.len())];
                let oldest = (0..ended.len()).find(|w| !ended[*w]).unwrap();
                let worker = &mut workers[at];
                let changes = if worker.prepared {
                    ended[at] = true;
                    locks.release(worker.id)
                } else if let Some(lock) = worker.steps.get(worker.done) {
                    let age = Age { attempt: Reverse(worker.attempt), ..age(at as u64) };
                    worker.waits = true;
                    locks.acquire(worker.id, age, vec![lock.clone()]).unwrap()
                } else {
                    worker.prepared = locks.prepare(worker.id);
                    prop_assert!(worker.prepared);
                    Changes::default()
                };
                for (number, worker) in workers.iter_mut().enumerate() {
                    if changes.granted.contains(&worker.id) {
                        worker.waits = false;
                        worker.done += 1;
                    }
                    if changes.wounded.contains(&worker.id) {
                        prop_assert!(number != oldest, "the oldest was ended");
                        prop_assert!(!worker.prepared);
                        fresh += 1;
                        *worker = Worker {
                            steps: std::mem::take(&mut worker.steps),
                            done: 0, attempt: worker.attempt + 1, id: txn(fresh), waits: false, prepared: false,
                        };
                    }
                }
                check(&locks);
            }
            prop_assert!(locks.is_empty() && locks.rows.is_empty() && locks.wide.is_empty());
        }
    }
}
