//! Nodes as processes that die, stop and hand over their splits, and whether what clients saw can be: a short run of
//! what `palisade-store torture` does for as long as one likes, with a check that needs nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may panic")]

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    process::Command,
};

use serde_json::Value;

/// What all accounts hold together: see `rows.rs` of the torture.
const TOTAL: i64 = 1 << 52;
const ACCOUNTS: usize = 16;

#[test]
fn nothing_is_lost_or_made_while_nodes_die_and_splits_change() {
    run(1);
}

#[test]
fn nor_with_another_seed() {
    run(2);
}

fn run(seed: u64) {
    let directory = tempfile::tempdir().unwrap();
    let history = directory.path().join("history");
    let output = Command::new(env!("CARGO_BIN_EXE_palisade-store"))
        .args(["torture", "--seconds", "5", "--clients", "6", "--min-ok", "50"])
        .args(["--faults", "kill,stop,lead,split", "--seed", &seed.to_string()])
        .arg("--history")
        .arg(&history)
        .output()
        .unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "seed {seed}: {said}");
    let history = History::read(&history);
    history.sums_are_right();
    history.lists_are_right();
    history.timestamps_go_with_real_time();
}

/// Attempts, as they were written down.
struct History(Vec<Value>);

impl History {
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        Self(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn of<'a>(&'a self, outcome: &'a str) -> impl DoubleEndedIterator<Item = &'a Value> {
        self.0.iter().filter(move |attempt| attempt["outcome"] == outcome)
    }

    /// Whoever saw all accounts at once saw all of the money.
    fn sums_are_right(&self) {
        let mut audits = 0;
        for attempt in self.of("ok") {
            let balances: BTreeMap<_, _> = reads(attempt)
                .filter(|(row, _)| row.starts_with("acct/"))
                .map(|(row, value)| (row, value.as_i64().unwrap_or(0)))
                .collect();
            if balances.len() == ACCOUNTS {
                assert_eq!(balances.values().sum::<i64>(), TOTAL, "{attempt}");
                audits += 1;
            }
        }
        assert!(audits > 1, "only {audits} attempts saw all accounts");
    }

    /// The lists at the end hold what was acknowledged, nothing that failed, and are what everybody saw the beginning
    /// of.
    fn lists_are_right(&self) {
        let end = self.of("ok").rfind(|attempt| attempt["process"] == 0 && attempt["what"] == "snapshot");
        let lists: BTreeMap<_, _> = reads(end.unwrap())
            .filter(|(row, _)| row.starts_with("list/"))
            .map(|(row, value)| (row, elements(value)))
            .collect();
        let all: HashSet<_> = lists.values().flatten().copied().collect();
        assert_eq!(all.len(), lists.values().map(Vec::len).sum::<usize>(), "an element is there twice");
        for attempt in self.of("ok") {
            for element in appended(attempt) {
                assert!(all.contains(&element), "{element} was acknowledged and is lost: {attempt}");
            }
            for (row, value) in reads(attempt).filter(|(row, _)| row.starts_with("list/")) {
                assert!(lists[row].starts_with(&elements(value)), "{row} is {:?}: {attempt}", lists[row]);
            }
        }
        for attempt in self.of("fail") {
            assert!(
                !appended(attempt).any(|element| all.contains(&element)),
                "it is said to have failed: {attempt}"
            );
        }
    }

    /// What began after a write was acknowledged has a later timestamp.
    fn timestamps_go_with_real_time(&self) {
        let writes =
            |attempt: &&Value| ops(attempt, "w").next().is_some() || appended(attempt).next().is_some();
        let mut ended: Vec<_> = self
            .of("ok")
            .filter(writes)
            .map(|attempt| (attempt["end"].as_u64().unwrap(), attempt["commit_ts"].as_u64().unwrap()))
            .collect();
        ended.sort_unstable();
        let latest: Vec<_> = ended
            .iter()
            .scan(0, |latest, (_, timestamp)| {
                *latest = *timestamp.max(latest);
                Some(*latest)
            })
            .collect();
        for attempt in self.of("ok").filter(|attempt| attempt["kind"] != "stale") {
            let start = attempt["start"].as_u64().unwrap();
            let before = ended.partition_point(|(end, _)| *end < start);
            let floor = before.checked_sub(1).map_or(0, |last| latest[last]);
            let timestamp = attempt["commit_ts"].as_u64().or(attempt["read_ts"].as_u64()).unwrap();
            assert!(timestamp >= floor, "{floor} was acknowledged before: {attempt}");
        }
    }
}

fn ops<'a>(attempt: &'a Value, name: &'static str) -> impl Iterator<Item = &'a Value> {
    attempt["ops"].as_array().unwrap().iter().filter(move |op| op[0] == name)
}

fn reads(attempt: &Value) -> impl Iterator<Item = (&str, &Value)> {
    ops(attempt, "r").map(|op| (op[1].as_str().unwrap(), &op[2]))
}

fn appended(attempt: &Value) -> impl Iterator<Item = i64> {
    ops(attempt, "append").map(|op| op[2].as_i64().unwrap())
}

fn elements(list: &Value) -> Vec<i64> {
    list.as_array().map(|list| list.iter().filter_map(Value::as_i64).collect()).unwrap_or_default()
}
