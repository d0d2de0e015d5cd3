//! Reads under locks, and what waits for locks.

use std::{collections::VecDeque, time::Duration};

use super::{Answer, Found, Held, Node, Refused, commit::Promise};
use crate::{
    group::Group,
    keys::{Key, Range},
    locks::Changes,
    mvcc::MvccError,
    truetime::{Interval, Timestamp},
    txn::{Attempt, SplitId, TxnId},
    wal::Disk,
    wire::{PeerMessage, Vote},
};

/// An answer has to fit into memory and into a message. A row may be asked for more than once.
const READ_BYTES_MAX: usize = 48 << 20;
/// Longer than any transaction should hold a lock.
const LOCK_WAIT: Duration = Duration::from_secs(3);

/// A transaction that waits for locks at one split.
pub(super) struct LockWait {
    /// Of the leader whose locks they are.
    pub(super) term: u64,
    pub(super) until: Timestamp,
    pub(super) then: Then,
}

/// What it does when it has them.
pub(super) enum Then {
    Read(Reading),
    Scan(Scanning),
    /// Commits here, see [`super::commit`].
    Commit(TxnId),
    Promise(Promise),
}

/// Rows to be read, split by split.
pub(super) struct Reading {
    token: u64,
    attempt: Attempt,
    held: Vec<Held>,
    keys: Vec<Key>,
    /// The places in `keys` of those that are not read yet.
    todo: VecDeque<(SplitId, Vec<usize>)>,
    rows: Vec<Option<Found>>,
}

/// A range to be read.
pub(super) struct Scanning {
    token: u64,
    held: Vec<Held>,
    asked: Range,
    /// What of it is locked: all that will be told.
    locked: Range,
    limit: usize,
}

impl<D: Disk> Node<D> {
    pub(super) fn read(
        &mut self,
        token: u64,
        attempt: Attempt,
        held: Vec<Held>,
        keys: Vec<Key>,
        now: Interval,
    ) {
        let mut todo: VecDeque<(SplitId, Vec<usize>)> = VecDeque::new();
        for (place, key) in keys.iter().enumerate() {
            match self.split_of(key) {
                Ok(split) => match todo.iter_mut().find(|(other, _)| *other == split) {
                    Some((_, places)) => places.push(place),
                    None => todo.push_back((split, vec![place])),
                },
                Err(refused) => return self.answer(token, Err(refused)),
            }
        }
        let rows = vec![None; keys.len()];
        self.read_on(Reading { token, attempt, held, keys, todo, rows }, now);
    }

    /// Locks the rows of the next split, or answers.
    fn read_on(&mut self, reading: Reading, now: Interval) {
        let Some((split, places)) = reading.todo.front() else {
            let Reading { token, held, rows, .. } = reading;
            let rows = rows.into_iter().flatten().collect();
            return self.answer(token, Ok(Answer::Rows { rows, at: Timestamp::ZERO, held }));
        };
        let split = *split;
        let spans: Vec<_> =
            places.iter().filter_map(|place| reading.keys.get(*place)).map(Range::point).collect();
        self.count(split, spans.first());
        let (attempt, token) = (reading.attempt, reading.token);
        self.drop_stale_wait(split, attempt.txn);
        if let Some(LockWait { then: Then::Read(before), .. }) =
            self.lock_waits.get_mut(&(split, attempt.txn))
            && before.todo.front() == reading.todo.front()
            && before.keys == reading.keys
        {
            // Its client has asked again: one answer is enough, and the later token has it.
            let before = std::mem::replace(before, reading);
            return self.answer(before.token, Err(Refused::Busy("the transaction has asked again")));
        }
        match self.lock_shared(split, attempt, &reading.held, spans, now) {
            Ok(changes) => self.wait(split, attempt.txn, Then::Read(reading), changes, now),
            Err(refused) => self.answer(token, Err(refused)),
        }
    }

    pub(super) fn scan(
        &mut self,
        token: u64,
        attempt: Attempt,
        held: Vec<Held>,
        range: Range,
        limit: usize,
        now: Interval,
    ) {
        let Some(split) = self.routes.at(range.start()).map(|route| route.split) else {
            return self.answer(token, Err(Refused::NotHere { leader: None }));
        };
        let Some(group) = self.groups.get(split) else {
            return self.answer(token, Err(self.not_here(split)));
        };
        let here = group.replica().range();
        let Some(within) = here.intersection(&range).filter(|_| here.start() <= range.start()) else {
            return self.answer(token, Err(self.not_here(split)));
        };
        // What lies behind the last row that will be told needs no lock.
        let ahead = group.replica().rows().scan(&within, Timestamp::MAX, limit);
        let wanted = match ahead {
            Ok(found) => match found.more_from {
                Some(more) => {
                    Range::between(within.start().clone(), Some(more.as_bytes().clone())).unwrap_or(within)
                }
                None => within,
            },
            Err(error) => {
                let refused = self.rows_failed(split, error);
                return self.answer(token, Err(refused));
            }
        };
        self.count(split, Some(&wanted));
        self.drop_stale_wait(split, attempt.txn);
        if let Some(LockWait { then: Then::Scan(before), .. }) =
            self.lock_waits.get_mut(&(split, attempt.txn))
            && before.asked == range
            && before.limit == limit
        {
            let before = std::mem::replace(&mut before.token, token);
            return self.answer(before, Err(Refused::Busy("the transaction has asked again")));
        }
        match self.lock_shared(split, attempt, &held, vec![wanted.clone()], now) {
            Ok(changes) => {
                let scanning = Scanning { token, held, asked: range, locked: wanted, limit };
                self.wait(split, attempt.txn, Then::Scan(scanning), changes, now);
            }
            Err(refused) => self.answer(token, Err(refused)),
        }
    }

    pub(super) fn rollback(&mut self, token: u64, txn: TxnId, now: Interval) {
        self.rolled_back.insert(txn, now.latest);
        let splits: Vec<_> = self.groups.iter().map(|(split, _)| split).collect();
        for split in splits {
            if let Some(wait) = self.lock_waits.remove(&(split, txn)) {
                self.give_up(split, wait, &Refused::Ended);
            }
            let changes = self.led(split).map(|(leader, replica)| leader.abandon(replica, txn));
            self.absorb(split, changes.unwrap_or_default());
        }
        self.answer(token, Ok(Answer::Done));
    }

    /// Waits for the locks that were asked for with `changes`.
    pub(super) fn wait(&mut self, split: SplitId, txn: TxnId, then: Then, changes: Changes, now: Interval) {
        let term = self.led(split).map_or(0, |(leader, _)| leader.term());
        let wait = LockWait { term, until: now.latest.plus(LOCK_WAIT), then };
        if let Some(before) = self.lock_waits.insert((split, txn), wait) {
            self.give_up(split, before, &Refused::Busy("the transaction has asked for something else"));
        }
        self.absorb(split, changes);
    }

    /// Whoever waits for locks of a leader of another term waits in vain.
    pub(super) fn drop_stale_wait(&mut self, split: SplitId, txn: TxnId) {
        let term = self.led(split).map(|(leader, _)| leader.term());
        if self.lock_waits.get(&(split, txn)).is_some_and(|wait| Some(wait.term) != term)
            && let Some(wait) = self.lock_waits.remove(&(split, txn))
        {
            let refused = self.not_leader(split);
            self.give_up(split, wait, &refused);
        }
    }

    /// Does what was waited for with the locks that have been granted.
    pub(super) fn use_locks(&mut self, now: Interval) {
        while let Some((split, txn)) = self.granted.pop_front() {
            match self.lock_waits.remove(&(split, txn)).map(|wait| wait.then) {
                Some(Then::Read(reading)) => self.read_locked(split, reading, now),
                Some(Then::Scan(scanning)) => self.scan_locked(split, scanning),
                Some(Then::Commit(txn)) => self.locked(txn, now),
                Some(Then::Promise(promise)) => self.promise(split, promise, now),
                None => {}
            }
        }
    }

    /// The locks will not come.
    pub(super) fn give_up(&mut self, split: SplitId, wait: LockWait, refused: &Refused) {
        match wait.then {
            Then::Read(Reading { token, .. }) | Then::Scan(Scanning { token, .. }) => {
                self.answer(token, Err(refused.clone()));
            }
            Then::Commit(txn) => self.abort(txn, refused),
            Then::Promise(Promise { attempt, coordinator, from, .. }) => {
                let (txn, vote) = (attempt.txn, Vote::Refused);
                self.say(from, PeerMessage::Vote { split, txn, coordinator, vote });
            }
        }
    }

    fn read_locked(&mut self, split: SplitId, mut reading: Reading, now: Interval) {
        let Some((_, places)) = reading.todo.pop_front() else { return };
        let Some(term) = self.groups.get_mut(split).and_then(Group::leader).map(|(leader, _)| leader.term())
        else {
            return self.answer(reading.token, Err(Refused::Aborted));
        };
        let mut room = Room::beside(reading.rows.iter().flatten());
        for place in places {
            let (Some(key), Some(group)) = (reading.keys.get(place), self.groups.get(split)) else {
                continue;
            };
            match group.replica().rows().newest(key) {
                Ok(version) => {
                    let version_at = version.as_ref().map_or(Timestamp::ZERO, |version| version.at);
                    let value = version.and_then(|version| version.value);
                    let found = Found { key: key.clone(), value, version: version_at };
                    if let Err(refused) = room.take(&found) {
                        return self.answer(reading.token, Err(refused));
                    }
                    if let Some(row) = reading.rows.get_mut(place) {
                        *row = Some(found);
                    }
                }
                Err(error) => {
                    let refused = self.rows_failed(split, error);
                    return self.answer(reading.token, Err(refused));
                }
            }
        }
        note_held(&mut reading.held, split, term);
        self.read_on(reading, now);
    }

    fn scan_locked(&mut self, split: SplitId, scanning: Scanning) {
        let Scanning { token, mut held, asked, locked, limit } = scanning;
        let term = self.led(split).map(|(leader, _)| leader.term());
        let (Some(term), Some(group)) = (term, self.groups.get(split)) else {
            return self.answer(token, Err(Refused::Aborted));
        };
        match scan_rows(group, &locked, &asked, Timestamp::MAX, limit) {
            Ok((rows, rest, _)) => {
                note_held(&mut held, split, term);
                self.answer(token, Ok(Answer::Scanned { rows, at: Timestamp::ZERO, held, rest }));
            }
            Err(error) => {
                let refused = self.rows_failed(split, error);
                self.answer(token, Err(refused));
            }
        }
    }

    /// Asks for shared locks at a split that this node leads.
    fn lock_shared(
        &mut self,
        split: SplitId,
        attempt: Attempt,
        held: &[Held],
        spans: Vec<Range>,
        now: Interval,
    ) -> Result<Changes, Refused> {
        if self.rolled_back.contains_key(&attempt.txn) {
            return Err(Refused::Ended);
        }
        let group = self.groups.get(split).ok_or_else(|| self.not_here(split))?;
        if spans.iter().any(|span| !group.replica().range().covers(span)) {
            return Err(self.not_here(split));
        }
        let before = held.iter().find(|held| held.split == split).map(|held| held.term);
        let Some((leader, replica)) = self.led(split) else { return Err(self.not_leader(split)) };
        if before.is_some_and(|term| term != leader.term()) {
            return Err(Refused::Aborted);
        }
        let locked = leader.read(replica, attempt, before.is_none(), spans, now);
        locked.map_err(|refusal| self.refused(split, refusal))
    }

    pub(super) fn not_here(&self, split: SplitId) -> Refused {
        Refused::NotHere { leader: self.leader_of(split) }
    }
}

/// What is left of [`READ_BYTES_MAX`] for the rows of one answer.
pub(super) struct Room(usize);

impl Room {
    /// What these rows leave.
    pub(super) fn beside<'a>(rows: impl Iterator<Item = &'a Found>) -> Self {
        Self(READ_BYTES_MAX.saturating_sub(rows.map(Found::bytes).sum()))
    }

    /// Makes room for one more row.
    pub(super) fn take(&mut self, row: &Found) -> Result<(), Refused> {
        let left = self.0.checked_sub(row.bytes());
        self.0 = left.ok_or_else(|| {
            Refused::TooMuch(format!("the rows are over the limit of {READ_BYTES_MAX} bytes: ask for fewer"))
        })?;
        Ok(())
    }
}

fn note_held(held: &mut Vec<Held>, split: SplitId, term: u64) {
    if !held.iter().any(|held| held.split == split) {
        held.push(Held { split, term });
    }
}

/// What was found of a range, what of it is left to ask for, and the newest version that was looked at.
pub(super) type RowsOfRange = (Vec<Found>, Option<Range>, Timestamp);

/// Rows of `within`, a part of what was `asked` for, as `at` shows them.
pub(super) fn scan_rows(
    group: &Group,
    within: &Range,
    asked: &Range,
    at: Timestamp,
    limit: usize,
) -> Result<RowsOfRange, MvccError> {
    let found = group.replica().rows().scan(within, at, limit)?;
    let next = found.more_from.map(|more| more.as_bytes().clone()).or_else(|| within.end().cloned());
    let rest = next.and_then(|next| Range::between(next, asked.end().cloned()).ok());
    let rest = rest.filter(|rest| !rest.is_empty());
    let rows = found
        .rows
        .into_iter()
        .map(|(key, version)| Found { key, value: version.value, version: version.at })
        .collect();
    Ok((rows, rest, found.newest))
}
