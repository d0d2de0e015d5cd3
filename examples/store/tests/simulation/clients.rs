//! Clients that move money, count it, and watch each other, and what they saw.

use std::{cmp::Reverse, collections::BTreeMap};

use bytes::Bytes;
use store::{
    keys::{Key, Range},
    locks::Age,
    mvcc::Mutation,
    node::{Answer, Found, Held, Moment, Refused, Request},
    truetime::Timestamp,
    txn::{Attempt, TxnId},
};

use crate::world::{MS, World};

pub(crate) const ROWS: u64 = 6;
/// In the last one there is no money: its rows are written without being read.
pub(crate) const TABLES: [&str; 3] = ["a", "b", BLIND];
const BLIND: &str = "c";
const MONEY: u64 = 2;
const PATIENCE_MS: u64 = 4_000;
/// A request without an answer is sent again after so long.
const RESEND_MS: u64 = 600;

pub(crate) fn key(table: &str, row: u64) -> Key {
    Key::new(table, format!("r{row}").as_bytes()).unwrap()
}

pub(crate) fn all_keys() -> impl Iterator<Item = Key> {
    TABLES.into_iter().flat_map(|table| (0..ROWS).map(move |row| key(table, row)))
}

fn text(bytes: &Bytes) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The money in a value, which the transaction's number follows so that no two are alike.
fn amount(value: Option<&str>) -> i64 {
    value.and_then(|value| value.split(':').next()).map_or(0, |amount| amount.parse().unwrap())
}

/// A row as somebody saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) key: Key,
    pub(crate) at: Timestamp,
    pub(crate) value: Option<String>,
}

impl Seen {
    pub(crate) fn amount(&self) -> i64 {
        amount(self.value.as_deref())
    }
}

impl From<&Found> for Seen {
    fn from(found: &Found) -> Self {
        Self { key: found.key.clone(), at: found.version, value: found.value.as_ref().map(text) }
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
    pub(crate) writes: Vec<(Key, Option<String>)>,
}

/// A snapshot as its reader saw it.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) client: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) at: Timestamp,
    /// It was to show everything that was over before it began.
    pub(crate) fresh: bool,
    pub(crate) rows: BTreeMap<Key, Seen>,
}

/// What a transaction does.
#[derive(Clone, Copy, Debug)]
enum Work {
    /// One row loses what another gets.
    Transfer,
    /// Reads a whole table under a lock, and writes how much it found into a row of the other one, or takes a row away.
    Count,
    /// Writes a row or two without reading, and so without holding anything before it commits.
    Blind,
}

struct Transaction {
    attempt: Attempt,
    work: Work,
    start: u64,
    held: Vec<Held>,
    /// Rows or the range still to be read.
    keys: Vec<Key>,
    range: Option<Range>,
    reads: Vec<Seen>,
    writes: Vec<Mutation>,
    committing: bool,
}

struct Snapshot {
    start: u64,
    fresh: bool,
    moment: Moment,
    todo: Vec<Range>,
    rows: BTreeMap<Key, Seen>,
}

enum Doing {
    Nothing,
    Transaction(Box<Transaction>),
    Snapshot(Snapshot),
}

pub(crate) struct Client {
    number: u64,
    age: Option<Age>,
    made: u64,
    doing: Doing,
    /// Token of what was asked last, and when.
    asked: Option<(u64, u64)>,
    /// The last refusals.
    heard: Vec<Refused>,
    not_before: u64,
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
            asked: None,
            heard: vec![],
            not_before: 0,
            rests: false,
            records: vec![],
            shown: vec![],
        }
    }

    pub(crate) fn tell(&self) -> String {
        let doing = match &self.doing {
            Doing::Nothing => "nothing".to_owned(),
            Doing::Snapshot(snapshot) => format!("a snapshot of {:?}", snapshot.todo),
            Doing::Transaction(txn) => {
                format!("{:?} {:?} {:?} {:?} since {}", txn.attempt, txn.work, txn.keys, txn.range, txn.start)
            }
        };
        format!("client {} is at {doing}, heard {:?}", self.number, self.heard)
    }

    pub(crate) fn step(&mut self, world: &mut World) {
        if world.truth < self.not_before {
            return;
        }
        if let Some((token, when)) = self.asked {
            match world.told.remove(&token) {
                Some(answer) => {
                    self.asked = None;
                    return self.hear(world, answer);
                }
                None if world.truth - when < RESEND_MS * MS => return,
                None => self.asked = None,
            }
        }
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing if !self.rests && world.rng.one_in(8) => self.begin(world),
            Doing::Nothing => {}
            Doing::Snapshot(snapshot) if world.truth - snapshot.start > PATIENCE_MS * MS => {}
            Doing::Snapshot(snapshot) => self.ask_snapshot(world, snapshot),
            Doing::Transaction(txn) if world.truth - txn.start > PATIENCE_MS * MS => {
                self.end(world, *txn, None);
            }
            Doing::Transaction(txn) => self.ask_transaction(world, txn),
        }
    }

    fn begin(&mut self, world: &mut World) {
        let any = world.rng.below(3) as usize;
        let now = world.now(any);
        if world.rng.one_in(4) {
            let (fresh, moment) = match world.rng.below(3) {
                0 => (false, Moment::Within(std::time::Duration::from_millis(300))),
                _ => (true, Moment::Now),
            };
            let todo = TABLES.iter().map(|table| Range::table(table).unwrap()).collect();
            let snapshot = Snapshot { start: world.truth, fresh, moment, todo, rows: BTreeMap::new() };
            self.doing = Doing::Snapshot(snapshot);
            return;
        }
        self.made += 1;
        let txn = TxnId { started: now.latest, random: self.number << 32 | self.made };
        let age = *self.age.insert(match self.age {
            Some(Age { first, client, attempt }) => Age { first, client, attempt: Reverse(attempt.0 + 1) },
            None => Age { first: now.latest, client: self.number, attempt: Reverse(0) },
        });
        let mut transaction = Transaction {
            attempt: Attempt { txn, age },
            work: Work::Transfer,
            start: world.truth,
            held: vec![],
            keys: vec![],
            range: None,
            reads: vec![],
            writes: vec![],
            committing: false,
        };
        let some = |world: &mut World| key(TABLES[world.rng.below(MONEY) as usize], world.rng.below(ROWS));
        match world.rng.below(8) {
            0 => {
                transaction.work = Work::Count;
                let table = TABLES[world.rng.below(MONEY) as usize];
                transaction.range = Some(Range::table(table).unwrap());
            }
            1 | 2 => {
                transaction.work = Work::Blind;
                // In any order, since the first one's split decides: and of as many splits as there are in the table.
                let mut rows = Vec::new();
                for _ in 0..2 + world.rng.below(3) {
                    let row = world.rng.below(ROWS);
                    if !rows.contains(&row) {
                        rows.push(row);
                    }
                }
                let value = Some(Bytes::from(format!("0:{}", txn.random)));
                let write = |row| Mutation { key: key(BLIND, row), value: value.clone() };
                transaction.writes.extend(rows.into_iter().map(write));
                transaction.committing = true;
            }
            _ => {
                let (from, to) = (some(world), some(world));
                transaction.keys = if from == to { vec![from] } else { vec![from, to] };
            }
        }
        self.doing = Doing::Transaction(Box::new(transaction));
    }

    fn ask_snapshot(&mut self, world: &mut World, snapshot: Snapshot) {
        let range = snapshot.todo[0].clone();
        let to = world.rng.below(world.machines.len() as u64) as usize;
        let limit = 1 + world.rng.below(9) as usize;
        let token = world.ask(to, Request::SnapshotScan { range, moment: snapshot.moment, limit });
        self.asked = Some((token, world.truth));
        self.doing = Doing::Snapshot(snapshot);
    }

    fn ask_transaction(&mut self, world: &mut World, txn: Box<Transaction>) {
        let (attempt, held) = (txn.attempt, txn.held.clone());
        let (to, request) = if let Some(range) = &txn.range {
            let first = Key::decode(range.start().clone()).unwrap_or_else(|_| {
                Key::new(std::str::from_utf8(&range.start()[..1]).unwrap(), b"\0").unwrap()
            });
            (world.leader(&first), Request::Scan { attempt, held, range: range.clone(), limit: 4 })
        } else if let Some(key) = txn.keys.first().filter(|_| !txn.committing) {
            (world.leader(key), Request::Read { attempt, held, keys: vec![key.clone()] })
        } else {
            let writes = txn.writes.clone();
            let to = world.leader(&writes[0].key);
            // What the request waits for on its way, it could be waiting for at the node as well.
            let arrived = world.now(to).latest;
            (to, Request::Commit { attempt, held, writes, arrived })
        };
        let token = world.ask(to, request);
        self.asked = Some((token, world.truth));
        self.doing = Doing::Transaction(txn);
    }

    fn hear(&mut self, world: &mut World, answer: Result<Answer, Refused>) {
        if let Err(refused) = &answer {
            self.heard.truncate(8);
            self.heard.insert(0, refused.clone());
        }
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Nothing => {}
            Doing::Snapshot(snapshot) => self.hear_snapshot(world, snapshot, answer),
            Doing::Transaction(txn) => self.hear_transaction(world, txn, answer),
        }
    }

    fn hear_snapshot(&mut self, world: &mut World, mut snapshot: Snapshot, answer: Result<Answer, Refused>) {
        match answer {
            Ok(Answer::Scanned { rows, at, rest, .. }) => {
                snapshot.rows.extend(rows.iter().map(|found| (found.key.clone(), Seen::from(found))));
                snapshot.moment = Moment::Exactly(at);
                match rest {
                    Some(rest) => snapshot.todo[0] = rest,
                    None => {
                        snapshot.todo.remove(0);
                    }
                }
                if snapshot.todo.is_empty() {
                    let Snapshot { start, fresh, rows, .. } = snapshot;
                    let (client, end) = (self.number, world.truth);
                    self.shown.push(Shown { client, start, end, at, fresh, rows });
                } else {
                    self.doing = Doing::Snapshot(snapshot);
                }
            }
            Err(Refused::Collected { .. }) => {}
            _ => {
                self.not_before = world.truth + 5 * MS;
                self.doing = Doing::Snapshot(snapshot);
            }
        }
    }

    fn hear_transaction(
        &mut self,
        world: &mut World,
        mut txn: Box<Transaction>,
        answer: Result<Answer, Refused>,
    ) {
        match answer {
            Ok(Answer::Rows { rows, held, .. }) => {
                txn.held = held;
                txn.reads.extend(rows.iter().map(Seen::from));
                txn.keys.remove(0);
                if txn.keys.is_empty() {
                    txn.plan_transfer();
                }
                self.doing = Doing::Transaction(txn);
            }
            Ok(Answer::Scanned { rows, held, rest, .. }) => {
                txn.held = held;
                txn.reads.extend(rows.iter().map(Seen::from));
                txn.range = rest;
                if txn.range.is_none() {
                    txn.plan_count(world);
                }
                self.doing = Doing::Transaction(txn);
            }
            Ok(Answer::Committed { at }) => self.end(world, *txn, Some(at)),
            Err(Refused::Aborted | Refused::Ended) => self.end(world, *txn, None),
            Ok(_) => panic!("{answer:?}"),
            Err(_) => {
                // Not now, or not here.
                self.not_before = world.truth + 5 * MS;
                self.doing = Doing::Transaction(txn);
            }
        }
    }

    fn end(&mut self, world: &mut World, txn: Transaction, committed: Option<Timestamp>) {
        if committed.is_some() {
            self.age = None;
        } else if !txn.committing {
            let all = world.machines.len();
            for at in 0..all {
                world.ask(at, Request::Rollback { txn: txn.attempt.txn });
            }
        }
        let writes = txn.writes.iter().map(|write| (write.key.clone(), write.value.as_ref().map(text)));
        self.records.push(Record {
            client: self.number,
            txn: txn.attempt.txn,
            start: txn.start,
            end: world.truth,
            committed,
            writes: if txn.committing { writes.collect() } else { vec![] },
            reads: txn.reads,
        });
    }
}

impl Transaction {
    fn plan_transfer(&mut self) {
        let reads = self.reads.clone();
        let changes: &[i64] = if reads.len() == 2 { &[-1, 1] } else { &[0] };
        for (seen, change) in reads.iter().zip(changes) {
            self.write(&seen.key, seen.amount() + change);
        }
        self.committing = true;
    }

    /// A row that nobody knew of, or one that is no more, changes what others have counted: money goes from one of the
    /// rows found to another row of the same table.
    fn plan_count(&mut self, world: &mut World) {
        let all = self.reads.len() as u64;
        let table = match self.reads.first() {
            Some(seen) => seen.key.table().to_owned(),
            None => TABLES[0].to_owned(),
        };
        // What a scan does not show is not there.
        for row in 0..ROWS {
            let key = key(&table, row);
            if !self.reads.iter().any(|seen| seen.key == key) && all > 0 {
                self.reads.push(Seen { key, at: Timestamp::ZERO, value: None });
            }
        }
        if all < 2 {
            let key = Key::new(BLIND, b"count").unwrap();
            self.write(&key, 0);
            self.committing = true;
            return;
        }
        let rich: Vec<Seen> = self.reads.iter().filter(|seen| seen.value.is_some()).cloned().collect();
        let gone = &rich[world.rng.below(all) as usize];
        let other = rich.iter().find(|seen| seen.key != gone.key).unwrap();
        self.writes.push(Mutation { key: gone.key.clone(), value: None });
        let (other_key, sum) = (other.key.clone(), other.amount() + gone.amount());
        self.write(&other_key, sum);
        self.committing = true;
    }

    fn write(&mut self, key: &Key, amount: i64) {
        let value = format!("{amount}:{}", self.attempt.txn.random);
        self.writes.push(Mutation { key: key.clone(), value: Some(Bytes::from(value)) });
    }
}
