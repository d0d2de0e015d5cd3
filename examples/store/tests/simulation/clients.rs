//! Clients that move money between rows of both splits, and readers of snapshots that must always see all of it.

use std::cmp::Reverse;

use bytes::Bytes;
use store::{
    keys::{Key, Range},
    locks::Age,
    mvcc::{Mutation, Version},
    truetime::{Interval, Timestamp},
    txn::{Attempt, Coordinator, Outcome, Refusal, Snapshot, SplitId, TxnId, Verdict},
};

use crate::world::{MS, SPLITS, World};

pub(crate) const ROWS: u64 = 4;
/// A client that has got nowhere for so long gives up the attempt.
const PATIENCE_MS: u64 = 4_000;
const DAWDLE_MS: u64 = 2_000;

/// Row `row` of a split, which is the table of that name.
pub(crate) fn key(split: SplitId, row: u64) -> Key {
    Key::new(table(split), &[b'a' + row as u8]).unwrap()
}

fn table(split: SplitId) -> &'static str {
    if split == SPLITS[0] { "left" } else { "right" }
}

fn amount(value: &Option<Bytes>) -> i64 {
    value.as_ref().map_or(0, |bytes| text(bytes).split(':').next().unwrap().parse().unwrap())
}

fn text(bytes: &Bytes) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// A version that somebody saw. Values carry the transaction that wrote them, so that no two are alike.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) key: Key,
    pub(crate) at: Timestamp,
    pub(crate) value: Option<String>,
}

impl Seen {
    fn new(key: &Key, version: Option<&Version>) -> Self {
        let value = version.and_then(|version| version.value.as_ref()).map(|bytes| text(bytes).to_owned());
        Self { key: key.clone(), at: version.map_or(Timestamp::ZERO, |version| version.at), value }
    }

    pub(crate) fn amount(&self) -> i64 {
        amount(&self.value.clone().map(Bytes::from))
    }
}

/// An attempt as its client saw it.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) client: u64,
    pub(crate) txn: TxnId,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) committed: Option<Timestamp>,
    pub(crate) reads: Vec<Seen>,
    pub(crate) writes: Vec<(Key, String)>,
}

/// A snapshot as its reader saw it.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) client: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) at: Timestamp,
    pub(crate) rows: Vec<Seen>,
}

struct Part {
    split: SplitId,
    row: u64,
    /// Where it holds locks: node, life, term.
    lead: Option<(usize, u64, u64)>,
}

enum Stage {
    Read(usize),
    Lock(usize),
    Prepare(usize),
    Vote(usize),
    Decide,
    Answer,
}

struct Transfer {
    attempt: Attempt,
    start: u64,
    parts: Vec<Part>,
    stage: Stage,
    waits: bool,
    /// Its coordinator takes its time, so that participants change their leaders between promise and decision.
    dawdles: bool,
    votes: Option<Coordinator>,
    reads: Vec<Seen>,
    written: Vec<(Key, String)>,
}

struct Reading {
    start: u64,
    at: Timestamp,
    done: usize,
    newest: Timestamp,
    rows: Vec<Seen>,
}

enum Doing {
    Nothing,
    Transfer(Box<Transfer>),
    Reading(Reading),
}

pub(crate) struct Client {
    number: u64,
    age: Option<Age>,
    made: u64,
    doing: Doing,
    /// Ends what it is at and begins nothing.
    pub(crate) rests: bool,
    pub(crate) records: Vec<Record>,
    pub(crate) shown: Vec<Shown>,
}

impl Client {
    pub(crate) fn new(number: u64) -> Self {
        Self {
            number,
            age: None,
            made: 0,
            doing: Doing::Nothing,
            rests: false,
            records: vec![],
            shown: vec![],
        }
    }

    pub(crate) fn step(&mut self, world: &mut World) {
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing if !self.rests && world.rng.one_in(8) => self.begin(world),
            Doing::Nothing => {}
            Doing::Reading(reading) => self.read_on(world, reading),
            Doing::Transfer(transfer) => self.transfer_on(world, transfer),
        }
    }

    fn begin(&mut self, world: &mut World) {
        let at = world.rng.below(3) as usize;
        let now = world.now(at);
        if world.rng.one_in(3) {
            let reading = Reading {
                start: world.truth,
                at: now.latest,
                done: 0,
                newest: Timestamp::ZERO,
                rows: vec![],
            };
            self.doing = Doing::Reading(reading);
            return;
        }
        self.made += 1;
        let txn = TxnId { started: now.latest, random: self.number << 32 | self.made };
        let age = *self.age.insert(match self.age {
            Some(Age { first, client, attempt }) => Age { first, client, attempt: Reverse(attempt.0 + 1) },
            None => Age { first: now.latest, client: self.number, attempt: Reverse(0) },
        });
        let part = |world: &mut World, split| Part { split, row: world.rng.below(ROWS), lead: None };
        let first = SPLITS[world.rng.below(2) as usize];
        let mut parts = vec![part(world, first)];
        if !world.rng.one_in(3) {
            let other = if first == SPLITS[0] { SPLITS[1] } else { SPLITS[0] };
            parts.push(part(world, other));
        }
        self.doing = Doing::Transfer(Box::new(Transfer {
            attempt: Attempt { txn, age },
            start: world.truth,
            parts,
            stage: Stage::Read(0),
            waits: false,
            dawdles: world.rng.one_in(30),
            votes: None,
            reads: vec![],
            written: vec![],
        }));
    }

    fn transfer_on(&mut self, world: &mut World, mut transfer: Box<Transfer>) {
        let patience = world.truth - transfer.start < PATIENCE_MS * MS;
        match transfer.on(world).filter(|_| patience) {
            Some(None) => self.doing = Doing::Transfer(transfer),
            end => {
                let committed = end.flatten();
                transfer.let_go(world);
                if committed.is_some() {
                    self.age = None;
                }
                self.records.push(Record {
                    client: self.number,
                    txn: transfer.attempt.txn,
                    start: transfer.start,
                    end: world.truth,
                    committed,
                    writes: transfer.written,
                    reads: transfer.reads,
                });
            }
        }
    }

    fn read_on(&mut self, world: &mut World, mut reading: Reading) {
        let Some(split) = SPLITS.get(reading.done) else {
            if world.now(0).is_after(reading.newest) && world.now(1).is_after(reading.newest) {
                let Reading { start, at, rows, .. } = reading;
                self.shown.push(Shown { client: self.number, start, end: world.truth, at, rows });
            } else {
                self.doing = Doing::Reading(reading);
            }
            return;
        };
        if world.truth - reading.start > PATIENCE_MS * MS {
            return;
        }
        let range = Range::table(table(*split)).unwrap();
        let any = world.rng.below(3) as usize;
        let now = world.now(any);
        let whole = world.group(any, *split).is_some_and(|group| {
            let followed = group.replica().safe_time().safe_within(&range) >= reading.at;
            let led = group.leader().is_some_and(|(leader, replica)| {
                leader.snapshot(replica, &range, reading.at, now) == Ok(Snapshot::Whole)
            });
            followed || led
        });
        if whole {
            let rows = world.group(any, *split).unwrap().replica().rows();
            let found = rows.scan(&range, reading.at, usize::MAX).unwrap();
            reading.newest = reading.newest.max(found.newest);
            reading.rows.extend(found.rows.iter().map(|(key, version)| Seen::new(key, Some(version))));
            reading.done += 1;
        }
        self.doing = Doing::Reading(reading);
    }
}

impl Part {
    /// Within one split money moves from a row to the next; across two it leaves the one row for the other's.
    fn keys(&self) -> Vec<Key> {
        vec![key(self.split, self.row), key(self.split, (self.row + 1) % ROWS)]
    }
}

impl Transfer {
    /// `Some(Some(at))` is committed, `Some(None)` goes on, `None` is over without an answer.
    fn on(&mut self, world: &mut World) -> Option<Option<Timestamp>> {
        match self.stage {
            Stage::Read(at) => self.read(world, at)?,
            Stage::Lock(at) => self.lock(world, at)?,
            Stage::Prepare(at) => self.prepare(world, at)?,
            Stage::Vote(at) => self.vote(world, at)?,
            Stage::Decide => self.decide(world)?,
            Stage::Answer => return self.answer(world),
        }
        Some(None)
    }

    fn read(&mut self, world: &mut World, at: usize) -> Option<()> {
        let split = self.parts[at].split;
        if self.parts[at].lead.is_none() {
            let Some(node) = world.leading(split) else { return Some(()) };
            let (now, life) = (world.now(node), world.nodes[node].life);
            let spans = self.parts[at].keys().iter().map(Range::point).collect();
            let (leader, replica) = world.group(node, split)?.leader()?;
            let term = leader.term();
            let changes = leader.read(replica, self.attempt, true, spans, now).ok()?;
            self.parts[at].lead = Some((node, life, term));
            world.absorb(node, split, changes);
        }
        if !self.has_locks(world, at)? {
            return Some(());
        }
        let (node, ..) = self.parts[at].lead?;
        let keys = self.parts[at].keys();
        let rows = world.group(node, split)?.replica().rows();
        self.reads.extend(keys.iter().map(|key| Seen::new(key, rows.newest(key))));
        self.stage = if at + 1 < self.parts.len() { Stage::Read(at + 1) } else { Stage::Lock(0) };
        Some(())
    }

    fn lock(&mut self, world: &mut World, at: usize) -> Option<()> {
        let (node, now) = self.at_leader(world, at)?;
        let split = self.parts[at].split;
        if at == 0 && self.votes.is_none() {
            let others = self.parts.iter().skip(1).map(|part| part.split);
            self.votes = Some(Coordinator::new(others, now));
        }
        if !self.waits {
            let writes = self.writes(world, at)?;
            let (leader, replica) = world.group(node, split)?.leader()?;
            let changes = leader.lock_writes(replica, self.attempt, true, &writes, now).ok()?;
            self.waits = true;
            world.absorb(node, split, changes);
        }
        if self.has_locks(world, at)? {
            self.waits = false;
            self.stage = match at {
                0 if self.parts.len() > 1 => Stage::Lock(1),
                0 => Stage::Decide,
                _ => Stage::Prepare(at),
            };
        }
        Some(())
    }

    fn prepare(&mut self, world: &mut World, at: usize) -> Option<()> {
        let (node, now) = self.at_leader(world, at)?;
        let split = self.parts[at].split;
        let writes = self.writes(world, at)?;
        let coordinator = self.parts[0].split;
        let (leader, replica) = world.group(node, split)?.leader()?;
        let entry = leader.prepare(replica, self.attempt, writes.clone(), coordinator, now).ok()?;
        self.note(&writes);
        world.propose(node, split, &entry);
        self.stage = Stage::Vote(at);
        Some(())
    }

    fn vote(&mut self, world: &mut World, at: usize) -> Option<()> {
        let (node, _) = self.at_leader(world, at)?;
        let (txn, split) = (self.attempt.txn, self.parts[at].split);
        let replica = world.group(node, split)?.replica();
        if replica.outcome(txn).is_some() {
            return None;
        }
        let promise =
            replica.in_doubt().find(|(promised, _)| *promised == txn).map(|(_, promise)| promise.at);
        if let Some(promise) = promise {
            self.votes.as_mut()?.prepared(split, promise);
            self.stage = Stage::Decide;
        }
        Some(())
    }

    fn decide(&mut self, world: &mut World) -> Option<()> {
        let (node, now) = self.at_leader(world, 0)?;
        if self.dawdles && !world.calm && !world.rng.one_in(DAWDLE_MS) {
            return Some(());
        }
        let Verdict::Commit(floor) = self.votes.as_ref()?.verdict() else { return None };
        let (txn, split) = (self.attempt.txn, self.parts[0].split);
        let writes = self.writes(world, 0)?;
        let others = self.parts.iter().skip(1).map(|part| part.split).collect();
        let (leader, replica) = world.group(node, split)?.leader()?;
        match leader.commit(replica, txn, writes.clone(), others, floor, now) {
            Ok(entry) => {
                self.note(&writes);
                world.propose(node, split, &entry);
                self.stage = Stage::Answer;
                Some(())
            }
            Err(Refusal::LeaseTooShort) => Some(()),
            Err(_) => None,
        }
    }

    fn answer(&mut self, world: &mut World) -> Option<Option<Timestamp>> {
        let (node, now) = self.at_leader(world, 0)?;
        match world.group(node, self.parts[0].split)?.replica().outcome(self.attempt.txn) {
            None => Some(None),
            Some(Outcome::Aborted) => None,
            Some(Outcome::Committed(at)) => Some(now.is_after(at).then_some(at)),
        }
    }

    fn let_go(&mut self, world: &mut World) {
        for at in 0..self.parts.len() {
            let Some((node, _)) = self.at_leader(world, at) else { continue };
            let split = self.parts[at].split;
            let left = world.group(node, split).and_then(|group| group.leader());
            let changes = left.map(|(leader, replica)| leader.abandon(replica, self.attempt.txn));
            // A commit that is applied keeps its locks until its timestamp has passed: the node sees to that.
            world.absorb(node, split, changes.unwrap_or_default());
        }
    }

    /// Where part `at` has its locks, if that leader still leads.
    fn at_leader(&self, world: &mut World, at: usize) -> Option<(usize, Interval)> {
        let (node, life, term) = self.parts[at].lead?;
        let same = world.nodes[node].life == life;
        let (leader, _) = world.group(node, self.parts[at].split)?.leader()?;
        (same && leader.term() == term).then(|| (node, world.now(node)))
    }

    /// Whether what was asked for last is granted. Nothing when the transaction was wounded.
    fn has_locks(&self, world: &mut World, at: usize) -> Option<bool> {
        let (node, _) = self.at_leader(world, at)?;
        let split = self.parts[at].split;
        if world.nodes[node].granted.remove(&(split, self.attempt.txn)) {
            return Some(true);
        }
        let (leader, _) = world.group(node, split)?.leader()?;
        leader.knows(self.attempt.txn).then_some(false)
    }

    fn note(&mut self, writes: &[Mutation]) {
        let written = writes.iter().filter_map(|write| Some((write.key.clone(), write.value.as_ref()?)));
        self.written.extend(written.map(|(key, value)| (key, text(value).to_owned())));
    }

    fn writes(&self, world: &mut World, at: usize) -> Option<Vec<Mutation>> {
        let (node, _) = self.at_leader(world, at)?;
        let part = &self.parts[at];
        let keys = part.keys();
        let rows = world.group(node, part.split)?.replica().rows();
        let held = |key| rows.newest(key).map_or(0, |row| amount(&row.value));
        // Alone: from the first row to the second. With another split: this row loses what that one gets, and the
        // second row is only read.
        let change = match (self.parts.len(), at) {
            (1, _) => [-1, 1],
            (_, 0) => [-1, 0],
            _ => [1, 0],
        };
        let changed = keys.iter().zip(change).filter(|(_, change)| *change != 0);
        let new = changed.map(|(key, change)| (key.clone(), held(key) + change));
        let value = |amount| Some(Bytes::from(format!("{amount}:{}", self.attempt.txn.random)));
        Some(new.map(|(key, amount)| Mutation { key, value: value(amount) }).collect())
    }
}
