//! One client of the store whose every attempt is written down.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context;
use bytes::Bytes;
use serde_json::{Value, json};
use store_client::{Client, Error, Found, Options, Range, Row, Txn};

use super::{
    history::{Attempt, Kind, Outcome},
    random::Random,
    rows::{self, Span},
    transactions::list,
    workload::Shared,
};

/// All tries of a call. Longer than a split is without a leader, shorter than a run.
const CALL: Duration = Duration::from_secs(10);
/// Above what any scan here finds: none is cut short, or rows would seem to be missing.
const SCAN_ROWS: usize = 5000;
/// Snapshots of the past go back so far at most.
const PAST: [Duration; 2] = [Duration::from_millis(2), Duration::from_secs(3)];

/// Which moment a snapshot is to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// All that was acknowledged before.
    Now,
    /// This one.
    At(u64),
    /// One that is no older than this.
    Within(Duration),
}

impl Moment {
    /// One that chance decides, never before the first rows were there.
    pub(crate) fn draw(random: &mut Random, shared: &Shared) -> Self {
        let [least, most] = PAST;
        let back = random.duration(least, most);
        match random.below(10) {
            0..6 => Self::Now,
            6..8 => {
                let nanos = u64::try_from(back.as_nanos()).unwrap_or(u64::MAX);
                Self::At(shared.clock.now().saturating_sub(nanos).max(shared.first_commit()))
            }
            _ => Self::Within(back),
        }
    }

    /// What a snapshot of it promises.
    pub(crate) fn kind(self) -> Kind {
        if self == Self::Now { Kind::Strong } else { Kind::Stale }
    }

    fn ours(self) -> store_client::Moment {
        match self {
            Self::Now => store_client::Moment::Now,
            Self::At(at) => store_client::Moment::At(at),
            Self::Within(within) => store_client::Moment::Within(within),
        }
    }
}

/// Why an attempt does not get as far as its commit.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The store said so.
    Store(Error),
    /// The client goes away without a word.
    Vanish,
    /// What was read cannot be, whatever the store promises.
    Wrong(String),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

/// Whether a transaction may be attempted once more.
#[derive(Debug)]
pub(crate) enum Retry {
    /// It is over.
    Never,
    /// Again, as old as this one if it ever began.
    WithAge(Option<Box<Txn>>),
}

/// A client.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    client: Client,
}

impl Session {
    /// A client of its own, with connections of its own.
    ///
    /// # Errors
    ///
    /// When an address is none.
    pub(crate) fn connect(addresses: &[String], seed: u64) -> anyhow::Result<Self> {
        let options = Options { deadline: CALL, seed, ..Options::default() };
        let client = Client::with(addresses.to_vec(), options).context("where the nodes are")?;
        Ok(Self { client })
    }

    /// What it speaks with.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Begins an attempt, with the age of the one before.
    pub(crate) async fn begin<'a>(
        &self,
        attempt: Attempt,
        random: &'a mut Random,
        before: Option<Box<Txn>>,
    ) -> Tx<'a> {
        let txn = match &before {
            Some(aborted) => self.client.begin_again(aborted).await,
            None => self.client.begin().await,
        };
        Tx { txn: txn.map(Box::new), before, attempt, random }
    }

    /// Reads rows at one moment.
    pub(crate) async fn snapshot(
        &self,
        mut attempt: Attempt,
        names: &[String],
        moment: Moment,
    ) -> (Attempt, Outcome) {
        let rows: Vec<_> = names.iter().map(|name| row(name)).collect();
        let outcome = match self.client.snapshot_read(&rows, moment.ours()).await {
            Ok(shown) => match write_down(&mut attempt, &shown.rows) {
                Ok(_) => Outcome::Ok(shown.at),
                Err(stop) => failed(&stop),
            },
            Err(error) => Outcome::Fail(error.to_string()),
        };
        (attempt, outcome)
    }

    /// Reads a range at one moment.
    pub(crate) async fn snapshot_scan(
        &self,
        mut attempt: Attempt,
        span: &Span,
        moment: Moment,
    ) -> (Attempt, Outcome) {
        let outcome = match self.client.snapshot_scan(range(span), moment.ours(), SCAN_ROWS).await {
            Ok(shown) => match write_down_scan(&mut attempt, span, &shown.rows) {
                Ok(_) => Outcome::Ok(shown.at),
                Err(stop) => failed(&stop),
            },
            Err(error) => Outcome::Fail(error.to_string()),
        };
        (attempt, outcome)
    }
}

/// An attempt of a transaction that is under way.
#[derive(Debug)]
pub(crate) struct Tx<'a> {
    txn: Result<Box<Txn>, Error>,
    before: Option<Box<Txn>>,
    attempt: Attempt,
    random: &'a mut Random,
}

impl Tx<'_> {
    /// Its client's randomness.
    pub(crate) fn random(&mut self) -> &mut Random {
        self.random
    }

    /// Reads rows under locks: one value for each, null where there is none.
    pub(crate) async fn read(&mut self, names: &[String]) -> Result<Vec<Value>, Stop> {
        let rows: Vec<_> = names.iter().map(|name| row(name)).collect();
        let found = self.begun()?.read(&rows).await?;
        write_down(&mut self.attempt, &found)
    }

    /// Reads a range under locks: the rows that exist.
    pub(crate) async fn scan(&mut self, span: &Span) -> Result<BTreeMap<String, Value>, Stop> {
        let found = self.begun()?.scan(range(span), SCAN_ROWS).await?;
        write_down_scan(&mut self.attempt, span, &found)
    }

    /// Writes a row, or deletes it, when all is committed.
    pub(crate) fn write(&mut self, name: &str, value: Option<i64>) {
        self.attempt.write(name, value);
        // One that never began writes nothing, and says so when it ends.
        if let Ok(txn) = &mut self.txn {
            match value {
                Some(value) => txn.put(row(name), Bytes::from(value.to_string())),
                None => txn.delete(row(name)),
            }
        }
    }

    /// Writes a list with one element more.
    pub(crate) fn append(&mut self, name: &str, element: i64, elements: &[i64]) {
        self.attempt.append(name, element);
        if let Ok(txn) = &mut self.txn {
            txn.put(row(name), Bytes::from(json!(elements).to_string()));
        }
    }

    /// Commits it, or ends it as `done` says.
    pub(crate) async fn end(self, done: Result<(), Stop>) -> (Attempt, Outcome, Retry) {
        let Self { txn, before, attempt, .. } = self;
        let mut txn = match txn {
            Ok(txn) => txn,
            Err(error) => return (attempt, Outcome::Fail(error.to_string()), Retry::WithAge(before)),
        };
        let stop = match done {
            Ok(()) => match txn.commit().await {
                Ok(at) => return (attempt, Outcome::Ok(at), Retry::Never),
                Err(error) => Stop::Store(error),
            },
            Err(stop) => stop,
        };
        let outcome = failed(&stop);
        match stop {
            Stop::Store(Error::Unknown(_)) | Stop::Vanish => (attempt, outcome, Retry::Never),
            Stop::Store(_) => {
                txn.rollback().await;
                (attempt, outcome, Retry::WithAge(Some(txn)))
            }
            Stop::Wrong(_) => {
                txn.rollback().await;
                (attempt, outcome, Retry::Never)
            }
        }
    }

    fn begun(&mut self) -> Result<&mut Txn, Stop> {
        match &mut self.txn {
            Ok(txn) => Ok(txn),
            // The error itself is said when it ends.
            Err(error) => Err(Stop::Wrong(format!("it never began: {error}"))),
        }
    }
}

fn failed(stop: &Stop) -> Outcome {
    match stop {
        Stop::Store(error) if error.nothing_written() => Outcome::Fail(error.to_string()),
        Stop::Store(error) => Outcome::Unknown(error.to_string()),
        Stop::Vanish => Outcome::Fail("the client went away before its commit".into()),
        Stop::Wrong(why) => Outcome::Fail(why.clone()),
    }
}

fn row(name: &str) -> Row {
    let (table, key) = rows::table_and_key(name);
    Row::new(table, key)
}

fn name(row: &Row) -> String {
    format!("{}/{}", row.table, row.key)
}

fn range(span: &Span) -> Range {
    Range::table(span.table).from(span.from.as_str()).to(span.to.as_str())
}

/// What rows hold, which is in the history from here on.
fn write_down(attempt: &mut Attempt, found: &[Found]) -> Result<Vec<Value>, Stop> {
    let mut values = Vec::new();
    for found in found {
        let (name, value) = (name(&found.row), decode(found)?);
        if rows::is_list(&name) {
            attempt.read_list(&name, &list(&value));
        } else {
            attempt.read_register(&name, &value, found.version);
        }
        values.push(value);
    }
    Ok(values)
}

/// Rows of a range: each of them with its version, and that there are no others.
fn write_down_scan(
    attempt: &mut Attempt,
    span: &Span,
    found: &[Found],
) -> Result<BTreeMap<String, Value>, Stop> {
    let values = write_down(attempt, found)?;
    let found: BTreeMap<_, _> = found.iter().map(|found| name(&found.row)).zip(values).collect();
    attempt.scan(&span.low(), &span.high(), &found);
    Ok(found)
}

fn decode(found: &Found) -> Result<Value, Stop> {
    let Some(bytes) = &found.value else { return Ok(Value::Null) };
    serde_json::from_slice(bytes)
        .map_err(|error| Stop::Wrong(format!("nobody wrote what is in {}: {error}", name(&found.row))))
}
