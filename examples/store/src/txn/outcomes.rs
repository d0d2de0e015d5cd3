//! How attempts ended: for clients that ask again, for participants that have not heard, and so that no entry of the log
//! makes something happen twice.
//!
//! They are of the checkpoint: written with it and only then, all that came since the last one as one value, so that a
//! commit writes its rows into the engine and nothing else. A value goes when everything in it is forgotten.

use std::{collections::BTreeMap, ops::ControlFlow};

use super::{Outcome, SplitId, TxnId};
use crate::{
    engine::{Batch, Engine, EngineError},
    truetime::Timestamp,
};

/// In the engine, what begins with this says how attempts ended: split, number of the value.
const OUTCOMES: u8 = b'o';
/// The number of the value that has those which began before everything kept and are kept nevertheless.
const OLD: u64 = 0;
/// Of one outcome in a value: when the attempt began, its random number, and when it is committed, or zero.
const ENCODED_BYTES: usize = 24;
/// In one value, so that the engine takes it: 400 KB.
const OUTCOMES_A_VALUE: usize = 1 << 14;

/// The outcomes of one replica.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcomes {
    known: BTreeMap<TxnId, Outcome>,
    /// Attempts from before this may have an outcome that is forgotten.
    since: Timestamp,
    /// What no checkpoint has yet.
    unsaved: Vec<TxnId>,
    /// The values in the engine, by number, and when the latest attempt in each began.
    saved: BTreeMap<u64, Timestamp>,
}

impl Outcomes {
    /// What the engine has of `split`, whose checkpoint says that attempts from before `since` are forgotten.
    pub(super) fn read(engine: &dyn Engine, split: SplitId, since: Timestamp) -> Result<Self, EngineError> {
        let mut outcomes = Self { since, ..Self::default() };
        engine.walk(&key(split, OLD), &key(split, u64::MAX), &mut |key, value| {
            if let Some(number) = key.last_chunk().copied().map(u64::from_be_bytes) {
                outcomes.restore(number, value);
            }
            ControlFlow::Continue(())
        })?;
        Ok(outcomes)
    }

    /// The same for a split that was cut off from this one, none of them saved yet.
    pub(super) fn copied(&self) -> Self {
        Self {
            known: self.known.clone(),
            since: self.since,
            unsaved: self.known.keys().copied().collect(),
            saved: BTreeMap::new(),
        }
    }

    fn restore(&mut self, number: u64, value: &[u8]) {
        let mut latest = Timestamp::ZERO;
        for (txn, outcome) in value.chunks(ENCODED_BYTES).filter_map(decode) {
            latest = latest.max(txn.started);
            if number == OLD || txn.started >= self.since {
                self.known.insert(txn, outcome);
            }
        }
        self.saved.insert(number, latest);
    }

    pub(super) fn get(&self, txn: TxnId) -> Option<Outcome> {
        self.known.get(&txn).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (TxnId, Outcome)> {
        self.known.iter().map(|(txn, outcome)| (*txn, *outcome))
    }

    pub(super) fn since(&self) -> Timestamp {
        self.since
    }

    pub(super) fn note(&mut self, txn: TxnId, outcome: Outcome) {
        self.known.insert(txn, outcome);
        self.unsaved.push(txn);
    }

    /// From here on attempts from before `since` may be forgotten.
    pub(super) fn keep_since(&mut self, since: Timestamp) {
        self.since = self.since.max(since);
    }

    /// Forgets attempts from before [`Outcomes::since`], but for those that `is_needed`.
    pub(super) fn forget(&mut self, is_needed: impl Fn(TxnId) -> bool) {
        let kept = self.known.split_off(&self.first());
        let old = std::mem::replace(&mut self.known, kept);
        self.known.extend(old.into_iter().filter(|(txn, _)| is_needed(*txn)));
    }

    /// Puts what came since the last time into the batch that has the checkpoint.
    pub(super) fn save(&mut self, split: SplitId, batch: &mut Batch) {
        let since = self.since;
        self.saved.retain(|number, latest| {
            let keeps = *latest >= since;
            if !keeps {
                batch.delete(key(split, *number));
            }
            keeps
        });
        let old: Vec<_> = self.known.range(..self.first()).map(|(txn, outcome)| (*txn, *outcome)).collect();
        if !old.is_empty() {
            self.put(split, batch, OLD, &old);
        }
        let is_kept = |txn: TxnId| Some((txn, self.get(txn).filter(|_| txn.started >= self.since)?));
        let new: Vec<_> = self.unsaved.iter().copied().filter_map(is_kept).collect();
        self.unsaved.clear();
        for value in new.chunks(OUTCOMES_A_VALUE) {
            let last = self.saved.last_key_value().map_or(OLD, |(number, _)| *number);
            self.put(split, batch, last + 1, value);
        }
    }

    fn put(&mut self, split: SplitId, batch: &mut Batch, number: u64, value: &[(TxnId, Outcome)]) {
        let latest = value.iter().map(|(txn, _)| txn.started).max().unwrap_or_default();
        self.saved.insert(number, latest);
        batch.put(key(split, number), value.iter().flat_map(encode).collect::<Vec<_>>());
    }

    /// Removes all that the engine has.
    pub(super) fn erase(&self, split: SplitId, batch: &mut Batch) {
        for number in self.saved.keys() {
            batch.delete(key(split, *number));
        }
    }

    /// The first attempt that is not from before all that is kept.
    fn first(&self) -> TxnId {
        TxnId { started: self.since, ..TxnId::FIRST }
    }
}

fn key(split: SplitId, number: u64) -> Vec<u8> {
    [&[OUTCOMES][..], &split.0.to_be_bytes(), &number.to_be_bytes()].concat()
}

fn encode((txn, outcome): &(TxnId, Outcome)) -> impl Iterator<Item = u8> + use<> {
    let at = match outcome {
        Outcome::Committed(at) => at.0,
        Outcome::Aborted => 0,
    };
    [txn.started.0, txn.random, at].into_iter().flat_map(u64::to_be_bytes)
}

/// Nothing of what is no outcome.
fn decode(bytes: &[u8]) -> Option<(TxnId, Outcome)> {
    let (started, rest) = bytes.split_first_chunk()?;
    let (random, rest) = rest.split_first_chunk()?;
    let (at, _) = rest.split_first_chunk()?;
    let [started, random, at] = [started, random, at].map(|number| u64::from_be_bytes(*number));
    let outcome = if at == 0 { Outcome::Aborted } else { Outcome::Committed(Timestamp(at)) };
    Some((TxnId { started: Timestamp(started), random }, outcome))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::Memory;

    const SPLIT: SplitId = SplitId(7);

    #[derive(Clone, Debug)]
    enum Op {
        Note(u64, u64),
        /// Forgets what began before, but for every so many.
        Forget(u64, u64),
        Save,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (0u64..60, 0u64..9).prop_map(|(started, at)| Op::Note(started, at)),
            1 => (0u64..60, 2u64..5).prop_map(|(since, every)| Op::Forget(since, every)),
            2 => Just(Op::Save),
        ]
    }

    proptest! {
        /// Whatever is noted and forgotten meanwhile, what is read is what was there at the last checkpoint.
        #[test]
        fn what_is_read_is_what_was_saved(ops in prop::collection::vec(op(), 0..80)) {
            let engine = Arc::new(Memory::default());
            let mut outcomes = Outcomes::default();
            let mut saved = outcomes.clone();
            for (random, op) in ops.into_iter().enumerate() {
                match op {
                    Op::Note(started, at) => {
                        let txn = TxnId { started: Timestamp(started), random: random as u64 };
                        let at = Timestamp(at);
                        let outcome = if at.0 == 0 { Outcome::Aborted } else { Outcome::Committed(at) };
                        outcomes.note(txn, outcome);
                    }
                    Op::Forget(since, every) => {
                        outcomes.keep_since(Timestamp(since));
                        outcomes.forget(|txn| txn.random.is_multiple_of(every));
                        let late = |txn: TxnId| txn.started < outcomes.since && !txn.random.is_multiple_of(every);
                        prop_assert!(!outcomes.iter().any(|(txn, _)| late(txn)));
                    }
                    Op::Save => {
                        let mut batch = Batch::default();
                        outcomes.save(SPLIT, &mut batch);
                        engine.write(batch).unwrap();
                        saved = outcomes.clone();
                    }
                }
                let read = Outcomes::read(&*engine, SPLIT, saved.since).unwrap();
                prop_assert!(read.iter().eq(saved.iter()));
                prop_assert_eq!(&read.saved, &saved.saved);
            }
            let mut batch = Batch::default();
            saved.erase(SPLIT, &mut batch);
            engine.write(batch).unwrap();
            prop_assert_eq!(engine.first(&[0], &[u8::MAX]).unwrap(), None);
        }
    }

    #[test]
    fn values_that_are_forgotten_go() {
        let mut outcomes = Outcomes::default();
        let mut batch = Batch::default();
        let attempts = OUTCOMES_A_VALUE as u64 * 2 + 1;
        for started in 0..attempts {
            outcomes.note(TxnId { started: Timestamp(started), random: 0 }, Outcome::Aborted);
        }
        outcomes.save(SPLIT, &mut batch);
        assert_eq!(outcomes.saved.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
        outcomes.keep_since(Timestamp(attempts - 1));
        outcomes.forget(|_| false);
        let mut batch = Batch::default();
        outcomes.save(SPLIT, &mut batch);
        assert_eq!(batch.writes.len(), 2);
        assert_eq!(outcomes.saved.keys().copied().collect::<Vec<_>>(), [3]);
    }
}
