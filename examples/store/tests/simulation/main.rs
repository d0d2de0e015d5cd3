//! The whole of what is there, in one process under a seed: consensus on real logs of simulated disks, transactions
//! within and across splits, snapshots at leaders and followers; nodes die in the middle of writes, messages are lost,
//! late or said twice, a node is cut off, clocks are off. A seed that fails replays exactly.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests"
)]

mod clients;
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use clients::{Client, Record, Seen, Shown, key};
use serde_json::json;
use store::{
    keys::Key,
    mvcc::Mvcc,
    truetime::Timestamp,
    txn::{Outcome, TxnId},
};
use world::{EPSILON, Faults, MS, SPLITS, World};

const CLIENTS: u64 = 5;
const TROUBLE_MS: u64 = 10_000;
/// Twice what an election, a lease that runs out and locks of lost clients take.
const CALM_MS: u64 = 16_000;
/// Enough for the last attempts to end.
const REST_MS: u64 = 4_000;

struct Run {
    records: Vec<Record>,
    shown: Vec<Shown>,
    rows: Vec<Mvcc>,
    outcomes: BTreeMap<TxnId, Outcome>,
    crashes: u64,
}

/// Runs `seed` and says what is wrong with it.
fn run(seed: u64, faults: Faults) -> Result<Run, String> {
    let mut world = World::new(seed, faults);
    let mut clients: Vec<_> = (0..CLIENTS).map(Client::new).collect();
    for step in 0..TROUBLE_MS + CALM_MS {
        if step == TROUBLE_MS {
            world.calm_down();
        }
        world.step();
        if let Some(error) = world.broken.take() {
            return Err(format!("a node stopped: {error:?}"));
        }
        for client in &mut clients {
            client.step(&mut world);
        }
    }
    finish(world, clients)
}

fn finish(mut world: World, mut clients: Vec<Client>) -> Result<Run, String> {
    let mut run = Run {
        records: vec![],
        shown: vec![],
        rows: vec![],
        outcomes: BTreeMap::new(),
        crashes: world.crashes,
    };
    let calm_since = world.truth - CALM_MS / 2 * MS;
    // Nobody asks for anything any more: what is under way ends, and all replicas come to the same.
    for _ in 0..REST_MS {
        world.step();
        for client in &mut clients {
            client.rests = true;
            client.step(&mut world);
        }
    }
    for client in clients {
        let late =
            client.records.iter().any(|record| record.start > calm_since && record.committed.is_some());
        if !late {
            return Err("a client gets nowhere though nothing is wrong".into());
        }
        run.records.extend(client.records);
        run.shown.extend(client.shown);
    }
    for split in SPLITS {
        let at = world.leading(split).ok_or("nobody leads in the end")?;
        let replica = world.group(at, split).unwrap().replica().clone();
        if replica.in_doubt().next().is_some() || replica.unsettled().next().is_some() {
            return Err("a transaction stays in doubt".into());
        }
        for other in 0..3 {
            let its = world.group(other, split).ok_or("a node is down in the end")?.replica();
            if its.rows() != replica.rows() {
                return Err(format!("replicas of {split:?} differ"));
            }
        }
        for record in &run.records {
            if let Some(outcome) = replica.outcome(record.txn) {
                let known = *run.outcomes.entry(record.txn).or_insert(outcome);
                if known != outcome {
                    return Err(format!("{record:?} ended as {known:?} and as {outcome:?}"));
                }
            }
        }
        run.rows.push(replica.rows().clone());
    }
    Ok(run)
}

impl Run {
    fn version(&self, key: &Key, before: Timestamp) -> Timestamp {
        let newest =
            self.rows.iter().filter_map(|rows| rows.get(key, before).unwrap()).map(|row| row.at).max();
        newest.unwrap_or_default()
    }

    /// Strict serializability, by the timestamps that the store gave: replaying them shows what everybody saw, and
    /// their order is the order of real time.
    fn check(&self) -> Result<(), String> {
        let mut written = BTreeSet::new();
        for record in &self.records {
            let outcome = self.outcomes.get(&record.txn);
            if let Some(at) = record.committed
                && outcome != Some(&Outcome::Committed(at))
            {
                return Err(format!("{record:?} was acknowledged and ended as {outcome:?}"));
            }
            let Some(Outcome::Committed(at)) = outcome else { continue };
            written.extend(record.writes.iter().map(|(key, _)| (key.clone(), *at)));
            for seen in &record.reads {
                let there = self.version(&seen.key, at.before());
                if there != seen.at {
                    return Err(format!("{record:?} read {seen:?}; before {at} it was of {there}"));
                }
            }
            if let Some((key, _)) = record.writes.iter().find(|(key, _)| self.version(key, *at) != *at) {
                return Err(format!("{record:?} did not write {key:?} at {at}"));
            }
        }
        for (key, version) in self.rows.iter().flat_map(Mvcc::versions) {
            if !written.contains(&(key.clone(), version.at)) {
                return Err(format!("{key:?} has a version of {} that no commit wrote", version.at));
            }
        }
        self.check_snapshots()?;
        self.check_real_time()
    }

    /// The history as JSON lines, one attempt each, for a checker that knows nothing of this store.
    fn history(&self) -> String {
        let name = |key: &Key| format!("{}/{}", key.table(), String::from_utf8_lossy(key.row()));
        let mut lines = String::new();
        for record in &self.records {
            let reads = record.reads.iter().map(|seen| match &seen.value {
                Some(value) => json!(["r", name(&seen.key), value, seen.at.0]),
                None => json!(["r", name(&seen.key), null]),
            });
            let writes = record.writes.iter().map(|(key, value)| json!(["w", name(key), value]));
            let line = json!({
                "id": record.txn.random.to_string(),
                "process": record.client,
                "start": record.start,
                "end": record.end,
                "outcome": if record.committed.is_some() { "ok" } else { "unknown" },
                "kind": "rw",
                "commit_ts": record.committed.map(|at| at.0),
                "ops": reads.chain(writes).collect::<Vec<_>>(),
            });
            lines.push_str(&format!("{line}\n"));
        }
        for (number, shown) in self.shown.iter().enumerate() {
            let read = |key: Key| {
                let seen = shown.rows.iter().find(|seen| seen.key == key);
                let value = seen.and_then(|seen| seen.value.clone());
                json!(["r", name(&key), value])
            };
            let rows =
                SPLITS.into_iter().flat_map(|split| (0..clients::ROWS).map(move |row| key(split, row)));
            let line = json!({
                "id": format!("snapshot-{number}"),
                "process": shown.client,
                "start": shown.start,
                "end": shown.end,
                "outcome": "ok",
                "kind": "ro",
                "read_ts": shown.at.0,
                "ops": rows.map(read).collect::<Vec<_>>(),
            });
            lines.push_str(&format!("{line}\n"));
        }
        lines
    }

    fn check_snapshots(&self) -> Result<(), String> {
        for shown in &self.shown {
            let total: i64 = shown.rows.iter().map(Seen::amount).sum();
            if total != 0 {
                return Err(format!("{shown:?} shows money made or lost"));
            }
            for split in SPLITS {
                for row in 0..clients::ROWS {
                    let key = key(split, row);
                    let there = self.version(&key, shown.at);
                    let seen = shown
                        .rows
                        .iter()
                        .find(|seen| seen.key == key)
                        .map_or(Timestamp::ZERO, |seen| seen.at);
                    if there != seen {
                        return Err(format!("{shown:?} shows {key:?} of {seen}, it was {there}"));
                    }
                }
            }
        }
        Ok(())
    }

    fn check_real_time(&self) -> Result<(), String> {
        let committed: Vec<_> = self
            .records
            .iter()
            .filter_map(|record| record.committed.map(|at| (record.start, record.end, at)))
            .collect();
        for (_, end, at) in &committed {
            for (start, _, later) in &committed {
                if end < start && at >= later {
                    return Err(format!("over at {end} with {at}, begun at {start} with {later}"));
                }
            }
            if let Some(shown) = self.shown.iter().find(|shown| *end < shown.start && shown.at < *at) {
                return Err(format!("{shown:?} does not show what was over with {at} at {end}"));
            }
        }
        for shown in &self.shown {
            if committed.iter().any(|(start, _, at)| shown.end < *start && *at <= shown.at) {
                return Err(format!("{shown:?} was changed afterwards"));
            }
        }
        Ok(())
    }
}

fn seeds(default: u64) -> u64 {
    std::env::var("STORE_SIMULATION_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(default)
}

#[test]
fn every_seed_is_strictly_serializable() {
    let (mut committed, mut lost, mut shown, mut crashes) = (0, 0, 0, 0);
    for seed in 1..=seeds(150) {
        let run = run(seed, Faults { skew: EPSILON }).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        if let Ok(directory) = std::env::var("STORE_SIMULATION_HISTORIES") {
            std::fs::write(format!("{directory}/{seed}.jsonl"), run.history()).unwrap();
        }
        run.check().unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        committed += run.records.iter().filter(|record| record.committed.is_some()).count();
        lost += run.records.iter().filter(|record| record.committed.is_none()).count();
        shown += run.shown.len();
        crashes += run.crashes;
    }
    println!(
        "{committed} commits, {lost} attempts that ended otherwise, {shown} snapshots, {crashes} crashes"
    );
    assert!(committed > 1_000 && lost > 100 && shown > 500 && crashes > 20, "the runs test nothing");
}

#[test]
fn a_seed_replays_exactly() {
    let story =
        |seed| run(seed, Faults { skew: EPSILON }).map(|run| format!("{:?}{:?}", run.records, run.shown));
    assert_eq!(story(7), story(7));
    assert_ne!(story(7), story(8));
}

/// What proves the checker: with clocks further off than they vouch for, timestamps contradict real time, and it says so.
#[test]
fn clocks_beyond_their_bound_are_noticed() {
    let faults = Faults { skew: Duration::from_millis(80) };
    let noticed = (1..=12).filter(|seed| run(*seed, faults).and_then(|run| run.check()).is_err()).count();
    assert!(noticed > 0, "nobody noticed clocks that were off by far more than their bound");
}
