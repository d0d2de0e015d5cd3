//! The whole store in one process under a seed: nodes with consensus on real logs of simulated disks, transactions
//! within and across splits, snapshots at leaders and followers; splits are cut, merged, moved and led by others while
//! that goes on; nodes die in the middle of writes, lose their disks, are stopped and cut off, messages are lost, late
//! or said twice, clocks are off. A seed that fails replays exactly.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests"
)]

mod check;
mod clients;
mod world;

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    panic,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use check::Run;
use clients::{Client, Seen};
use store::node::Node;
use world::{EPSILON, Faults, MS, World};

const CLIENTS: u64 = 5;
const TROUBLE_MS: u64 = 10_000;
/// Twice what an election, a lease that runs out, locks of lost clients and a change that is off take.
const CALM_MS: u64 = 16_000;
/// Enough for the last attempts to end.
const REST_MS: u64 = 10_000;

const WITHIN: Faults = Faults { skew: EPSILON, changes: true, wipes: true };

/// Runs `seed` and says what is wrong with it.
fn run(seed: u64, faults: Faults) -> Result<Run, String> {
    let mut world = World::new(seed, faults);
    let mut clients: Vec<_> = (0..CLIENTS).map(Client::new).collect();
    for step in 0..TROUBLE_MS + CALM_MS + REST_MS {
        if step == TROUBLE_MS {
            world.calm_down();
        }
        world.step();
        if let Some(error) = world.broken.take() {
            return Err(format!("a node stopped after {step} ms: {error}"));
        }
        for client in &mut clients {
            // Nobody asks for anything any more: what is under way ends, and all replicas come to the same.
            client.rests = step >= TROUBLE_MS + CALM_MS;
            client.step(&mut world);
        }
    }
    finish(&world, clients)
}

fn finish(world: &World, clients: Vec<Client>) -> Result<Run, String> {
    let calm_since = world.truth - (CALM_MS / 2 + REST_MS) * MS;
    let mut run = Run {
        records: vec![],
        shown: vec![],
        outcomes: BTreeMap::new(),
        rows: BTreeMap::new(),
        counts: world.counts,
    };
    for client in clients {
        let late =
            client.records.iter().any(|record| record.start > calm_since && record.committed.is_some());
        if !late {
            let late: Vec<_> = client.records.iter().filter(|record| record.start > calm_since).collect();
            let late = late.iter().map(|record| {
                let took = (record.end - record.start) / MS;
                format!("\n  {took} ms: {:?} {:?}", record.committed, record.writes)
            });
            let late: String = late.collect();
            let (tell, client) = (world.tell(), client.tell() + &late);
            return Err(format!("a client gets nowhere though nothing is wrong: {client}{tell}"));
        }
        run.records.extend(client.records);
        run.shown.extend(client.shown);
    }
    let led = world.led();
    let mut end = Some(bytes::Bytes::new());
    let mut splits: Vec<_> = led
        .iter()
        .map(|(at, split)| world.machines[*at].node.as_ref().unwrap().groups().get(*split).unwrap())
        .collect();
    splits.sort_by_key(|group| group.replica().range().start().clone());
    for group in splits {
        let replica = group.replica();
        if Some(replica.range().start()) != end.as_ref() {
            return Err(format!("nobody leads what begins at {end:?}: {led:?}"));
        }
        end = replica.range().end().cloned();
        if replica.in_doubt().next().is_some() || replica.unsettled().next().is_some() {
            let doubts: Vec<_> = replica.in_doubt().collect();
            let unsettled: Vec<_> = replica.unsettled().collect();
            let (split, tell) = (replica.split(), world.tell());
            return Err(format!("a transaction stays in doubt in {split:?}: {doubts:?} {unsettled:?}{tell}"));
        }
        let found =
            replica.rows().scan(replica.range(), store::truetime::Timestamp::MAX, usize::MAX).unwrap();
        let versions = |replica: &store::txn::Replica| {
            let mut all = vec![];
            replica.rows().versions(replica.range(), &mut |key, version| all.push((key, version))).unwrap();
            all
        };
        for machine in &world.machines {
            let node: &Node<_> = machine.node.as_ref().ok_or("a node is down in the end")?;
            let Some(its) = node.groups().get(replica.split()).filter(|its| its.is_filled()) else {
                continue;
            };
            // What is forgotten may be on its way still.
            let as_far = its.applied() == group.applied();
            if group.nodes().0.contains(&machine.id) && as_far && versions(its.replica()) != versions(replica)
            {
                let split = replica.split();
                return Err(format!("replicas of {split:?} differ at {:?}: {}", machine.id, world.tell()));
            }
        }
        run.rows.extend(found.rows.into_iter().map(|(key, version)| {
            let value = version.value.map(|value| String::from_utf8(value.to_vec()).unwrap());
            (key.clone(), Seen { key, at: version.at, value })
        }));
        for (txn, outcome) in replica.outcomes() {
            let known = *run.outcomes.entry(txn).or_insert(outcome);
            // An abort may be in the log of a split that its transaction never came to write in.
            if known != outcome {
                return Err(format!("{txn:?} ended as {known:?} and as {outcome:?}"));
            }
        }
    }
    for machine in &world.machines {
        let groups = machine.node.iter().flat_map(|node| node.groups().iter());
        for (split, group) in groups {
            if !led.iter().any(|(_, led)| *led == split) || !group.is_filled() || !group.is_member() {
                return Err(format!("{:?} keeps what is left of {split:?}: {}", machine.id, world.tell()));
            }
        }
    }
    if end.is_some() {
        return Err(format!("nobody leads what begins at {end:?}: {led:?}"));
    }
    Ok(run)
}

fn seeds(default: u64) -> u64 {
    std::env::var("STORE_SIMULATION_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(default)
}

fn first_seed() -> u64 {
    std::env::var("STORE_SIMULATION_FIRST").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// What runs came to, all together.
#[derive(Debug, Default)]
struct Totals {
    committed: usize,
    ended_otherwise: usize,
    snapshots: usize,
    counts: world::Counts,
    wrong: BTreeMap<u64, String>,
}

impl Totals {
    fn add(&mut self, seed: u64, run: Result<Run, String>) {
        let run = match run {
            Ok(run) => run,
            Err(why) => {
                self.wrong.insert(seed, why);
                return;
            }
        };
        let committed = run.records.iter().filter(|record| record.committed.is_some()).count();
        self.committed += committed;
        self.ended_otherwise += run.records.len() - committed;
        self.snapshots += run.shown.len();
        self.counts += run.counts;
    }
}

/// Runs `seed` and checks what it shows.
fn run_and_check(seed: u64) -> Result<Run, String> {
    let run = run(seed, WITHIN)?;
    if let Ok(directory) = std::env::var("STORE_SIMULATION_HISTORIES") {
        std::fs::write(format!("{directory}/{seed}.jsonl"), run.history()).unwrap();
    }
    run.check().map(|()| run)
}

#[test]
fn every_seed_is_strictly_serializable() {
    let next = AtomicU64::new(first_seed());
    let end = first_seed() + seeds(60);
    let totals = Mutex::new(Totals::default());
    let one_after_another = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            // A node that panics is wrong of the seed too.
            let run = panic::catch_unwind(|| run_and_check(seed)).unwrap_or_else(|_| Err("it panics".into()));
            totals.lock().unwrap().add(seed, run);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, NonZeroUsize::get) {
            scope.spawn(one_after_another);
        }
    });
    let totals = totals.into_inner().unwrap();
    let Totals { committed, ended_otherwise, snapshots, counts, .. } = totals;
    println!(
        "{committed} commits, {ended_otherwise} attempts that ended otherwise, {snapshots} snapshots, {counts:?}"
    );
    let wrong: Vec<_> = totals.wrong.iter().map(|(seed, why)| format!("seed {seed}: {why}")).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    if end - first_seed() < 60 {
        println!("these are too few seeds to say whether they test enough");
        return;
    }
    let much = committed > 1_000 && ended_otherwise > 100 && snapshots > 500 && counts.crashes > 20;
    assert!(much, "the runs test nothing");
    let changes = [counts.splits, counts.merges, counts.moves, counts.leads, counts.wipes];
    assert!(changes.iter().all(|count| *count > 0), "the runs change nothing");
}

#[test]
fn a_seed_replays_exactly() {
    let story = |seed| run(seed, WITHIN).map(|run| format!("{:?}{:?}", run.records, run.shown));
    assert_eq!(story(7), story(7));
    assert_ne!(story(7), story(8));
}

/// What proves the checker: with clocks further off than they vouch for, timestamps contradict real time, and it says so.
#[test]
fn clocks_beyond_their_bound_are_noticed() {
    let faults = Faults { skew: Duration::from_millis(80), changes: false, wipes: false };
    let noticed = (1..=12).filter(|seed| run(*seed, faults).and_then(|run| run.check()).is_err()).count();
    assert!(noticed > 0, "nobody noticed clocks that were off by far more than their bound");
}
