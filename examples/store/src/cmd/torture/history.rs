//! What clients saw, one JSON object a line and attempt, for a checker that knows nothing of this store.
//!
//! An attempt is `ok` only when its commit was acknowledged, `fail` only when it is certain that nothing of it was
//! written, and else `unknown`: a checker believes these words, so a wrong one hides a bug or invents one.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::{Map, Value, json};

use super::clock::ClientClock;

/// What an attempt promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Locks and a commit timestamp.
    ReadWrite,
    /// A snapshot of now: it shows everything that was acknowledged before it began.
    Strong,
    /// A snapshot of a moment that the client chose, which real time does not bind.
    Stale,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::ReadWrite => "rw",
            Self::Strong => "ro",
            Self::Stale => "stale",
        }
    }
}

/// What an attempt came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Acknowledged: the commit's timestamp, or the moment that a snapshot showed.
    Ok(u64),
    /// Nothing was written, for certain, and why.
    Fail(String),
    /// It may have been written, and why nobody knows.
    Unknown(String),
}

/// Attempts by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Acknowledged.
    pub(crate) ok: u64,
    /// Certainly nothing.
    pub(crate) fail: u64,
    /// Nobody knows.
    pub(crate) unknown: u64,
}

/// An attempt that is under way.
#[derive(Debug)]
pub(crate) struct Attempt {
    id: String,
    process: u64,
    what: &'static str,
    kind: Kind,
    start: u64,
    ops: Vec<Value>,
}

impl Attempt {
    /// A register was read from the store, with the version that it was found at.
    pub(crate) fn read_register(&mut self, key: &str, value: &Value, version: u64) {
        // A version is only said of what is there: zero is "never written", which no transaction committed at.
        let op = if value.is_null() { json!(["r", key, null]) } else { json!(["r", key, value, version]) };
        self.ops.push(op);
    }

    /// A list was read from the store. Its version is not said, because a reader of the history takes it for that of
    /// every element.
    pub(crate) fn read_list(&mut self, key: &str, elements: &[i64]) {
        self.ops.push(json!(["r", key, elements]));
    }

    /// A register was written, or deleted.
    pub(crate) fn write(&mut self, key: &str, value: Option<i64>) {
        self.ops.push(json!(["w", key, value]));
    }

    /// An element was appended to a list.
    pub(crate) fn append(&mut self, key: &str, element: i64) {
        self.ops.push(json!(["append", key, element]));
    }

    /// All rows from `low` up to and without `high` were read: these are all there are.
    pub(crate) fn scan(&mut self, low: &str, high: &str, found: &BTreeMap<String, Value>) {
        self.ops.push(json!(["scan", low, high, found]));
    }
}

/// A history that is being written.
#[derive(Debug)]
pub(crate) struct History {
    out: Mutex<BufWriter<File>>,
    clock: ClientClock,
    next: AtomicU64,
    counts: Mutex<BTreeMap<&'static str, Counts>>,
    reasons: Mutex<BTreeMap<String, u64>>,
    broken: Mutex<Option<io::Error>>,
}

impl History {
    /// A new one in `path`.
    ///
    /// # Errors
    ///
    /// When the file cannot be made.
    pub(crate) fn create(path: &Path, clock: ClientClock) -> io::Result<Self> {
        Ok(Self {
            out: Mutex::new(BufWriter::new(File::create(path)?)),
            clock,
            next: AtomicU64::new(0),
            counts: Mutex::default(),
            reasons: Mutex::default(),
            broken: Mutex::default(),
        })
    }

    /// An attempt begins, before its first request.
    pub(crate) fn begin(&self, process: u64, what: &'static str, kind: Kind) -> Attempt {
        let id = format!("t{}", self.next.fetch_add(1, Ordering::Relaxed));
        Attempt { id, process, what, kind, start: self.clock.now(), ops: Vec::new() }
    }

    /// An attempt has ended, after its last reply.
    pub(crate) fn end(&self, attempt: Attempt, outcome: &Outcome) {
        let end = self.clock.now();
        self.count(attempt.what, outcome);
        let line = line(attempt, outcome, end);
        if let Err(error) = writeln!(lock(&self.out), "{line}") {
            *lock(&self.broken) = Some(error);
        }
    }

    /// Attempts so far, by what they were.
    pub(crate) fn counts(&self) -> BTreeMap<&'static str, Counts> {
        lock(&self.counts).clone()
    }

    /// Why attempts failed or are unknown, most frequent first.
    pub(crate) fn reasons(&self) -> Vec<(String, u64)> {
        let mut reasons: Vec<_> = lock(&self.reasons).clone().into_iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        reasons
    }

    /// Everything is in the file.
    ///
    /// # Errors
    ///
    /// When something is not: then the history is not to be believed.
    pub(crate) fn finish(&self) -> io::Result<()> {
        if let Some(error) = lock(&self.broken).take() {
            return Err(error);
        }
        lock(&self.out).flush()
    }

    fn count(&self, what: &'static str, outcome: &Outcome) {
        let mut counts = lock(&self.counts);
        let counts = counts.entry(what).or_default();
        let (count, reason) = match outcome {
            Outcome::Ok(_) => (&mut counts.ok, None),
            Outcome::Fail(reason) => (&mut counts.fail, Some(format!("fail: {reason}"))),
            Outcome::Unknown(reason) => (&mut counts.unknown, Some(format!("unknown: {reason}"))),
        };
        *count += 1;
        if let Some(reason) = reason {
            *lock(&self.reasons).entry(without_numbers(&reason)).or_default() += 1;
        }
    }
}

fn line(attempt: Attempt, outcome: &Outcome, end: u64) -> Value {
    let mut line = Map::new();
    line.insert("id".into(), attempt.id.into());
    line.insert("process".into(), attempt.process.into());
    line.insert("what".into(), attempt.what.into());
    line.insert("kind".into(), attempt.kind.name().into());
    line.insert("start".into(), attempt.start.into());
    let (outcome, end, reason) = match outcome {
        Outcome::Ok(timestamp) => {
            let name = if attempt.kind == Kind::ReadWrite { "commit_ts" } else { "read_ts" };
            line.insert(name.into(), (*timestamp).into());
            ("ok", Some(end), None)
        }
        Outcome::Fail(reason) => ("fail", Some(end), Some(reason)),
        // It may still be written after the client gave up, so it has not ended.
        Outcome::Unknown(reason) => ("unknown", None, Some(reason)),
    };
    line.insert("outcome".into(), outcome.into());
    line.insert("end".into(), end.into());
    if let Some(reason) = reason {
        line.insert("why".into(), reason.as_str().into());
    }
    line.insert("ops".into(), attempt.ops.into());
    Value::Object(line)
}

/// The same reason about another row or moment is the same reason.
fn without_numbers(reason: &str) -> String {
    let mut out = String::with_capacity(reason.len());
    for char in reason.chars() {
        match char {
            '0'..='9' if out.ends_with('#') => {}
            '0'..='9' => out.push('#'),
            other => out.push(other),
        }
    }
    out
}

/// What a panicking client left is still true, line by line.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(use_it: impl FnOnce(&History)) -> Vec<Value> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("history");
        let history = History::create(&path, ClientClock::start()).unwrap();
        use_it(&history);
        history.finish().unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn an_acknowledged_attempt_has_its_timestamp_and_every_op_in_order() {
        let lines = written(|history| {
            let mut attempt = history.begin(3, "transfer", Kind::ReadWrite);
            attempt.read_register("acct/100", &json!(50), 7);
            attempt.read_register("acct/101", &Value::Null, 0);
            attempt.write("acct/100", Some(40));
            attempt.write("acct/101", None);
            attempt.read_list("list/1/0", &[1, 2]);
            attempt.append("list/1/0", 3);
            let found = BTreeMap::from([("item/105".to_owned(), json!(9))]);
            attempt.scan("item/100", "item/110", &found);
            history.end(attempt, &Outcome::Ok(99));
        });
        let line = &lines[0];
        assert_eq!(
            line["ops"],
            json!([
                ["r", "acct/100", 50, 7],
                ["r", "acct/101", null],
                ["w", "acct/100", 40],
                ["w", "acct/101", null],
                ["r", "list/1/0", [1, 2]],
                ["append", "list/1/0", 3],
                ["scan", "item/100", "item/110", {"item/105": 9}],
            ])
        );
        assert_eq!((&line["outcome"], &line["kind"]), (&json!("ok"), &json!("rw")));
        assert_eq!((&line["commit_ts"], &line["process"]), (&json!(99), &json!(3)));
        assert!(line["start"].as_u64() <= line["end"].as_u64());
        assert!(line.get("read_ts").is_none());
    }

    #[test]
    fn snapshots_have_the_moment_shown_and_no_commit_timestamp() {
        let lines = written(|history| {
            history.end(history.begin(1, "audit", Kind::Strong), &Outcome::Ok(5));
            history.end(history.begin(1, "audit", Kind::Stale), &Outcome::Ok(4));
        });
        assert_eq!((&lines[0]["kind"], &lines[0]["read_ts"]), (&json!("ro"), &json!(5)));
        assert_eq!((&lines[1]["kind"], &lines[1]["read_ts"]), (&json!("stale"), &json!(4)));
        assert!(lines.iter().all(|line| line.get("commit_ts").is_none()));
    }

    #[test]
    fn what_nobody_knows_has_not_ended_and_what_failed_has() {
        let lines = written(|history| {
            history.end(history.begin(1, "a", Kind::ReadWrite), &Outcome::Unknown("timed out".into()));
            history.end(history.begin(1, "a", Kind::ReadWrite), &Outcome::Fail("wounded".into()));
        });
        assert_eq!((&lines[0]["outcome"], &lines[0]["end"]), (&json!("unknown"), &Value::Null));
        assert_eq!(lines[1]["outcome"], json!("fail"));
        assert!(lines[1]["end"].is_u64());
        assert_ne!(lines[0]["id"], lines[1]["id"]);
    }

    #[test]
    fn counts_and_reasons_are_added_up() {
        written(|history| {
            for row in 0..3 {
                let reason = Outcome::Fail(format!("row {row} is locked"));
                history.end(history.begin(1, "a", Kind::ReadWrite), &reason);
            }
            history.end(history.begin(1, "a", Kind::ReadWrite), &Outcome::Ok(1));
            assert_eq!(history.counts()["a"], Counts { ok: 1, fail: 3, unknown: 0 });
            assert_eq!(history.reasons(), [("fail: row # is locked".to_owned(), 3)]);
        });
    }
}
