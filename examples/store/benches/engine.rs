//! What a row engine costs: durable batches, and reads through `Mvcc`.
//!
//! `cargo bench -p store --bench engine`. Batches are of rows of 200 bytes under keys in no order, one thread, each batch
//! safe before the next begins. "log, then tree" is how the store writes: the log is synced and the tree is not.
//! Reads are of the newest version among 100,000 rows, under keys in no order.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use redb::TableDefinition;
use store::{
    engine::{Batch, Engine, Lsm, Memory},
    keys::{Key, Range},
    mvcc::{Home, Mutation, Mvcc},
    truetime::Timestamp,
    wal::{Directory, Wal},
};

const VALUE_BYTES: usize = 200;
const BATCHES_OF: [u64; 3] = [1, 16, 128];
const ROWS: u64 = 100_000;
const SCANNED: usize = 100;
/// Each figure is of so long.
const MEASURED: Duration = Duration::from_secs(2);
const TABLE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("rows");

fn main() {
    // On the disk that the build is on: a temporary directory may be in memory.
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| home.path().join(name);

    reads("tree", Arc::new(Lsm::open(&path("read")).unwrap()));
    println!("{:40} {:>10}", "memory at most so far, KiB", peak_kib());
    reads("memory", Arc::new(Memory::default()));

    for rows in BATCHES_OF {
        write(&format!("log, {rows} rows"), rows, log(&path(&format!("log{rows}"))));
        write(&format!("tree, synced, {rows} rows"), rows, tree(&path(&format!("tree{rows}"))));
        write(&format!("log, then tree, {rows} rows"), rows, both(&path(&format!("both{rows}"))));
        write(&format!("redb, {rows} rows"), rows, redb(&path(&format!("redb{rows}"))));
    }
}

fn reads(name: &str, engine: Arc<dyn Engine>) {
    let mvcc = Mvcc::new(Arc::clone(&engine), Home(1), Timestamp::ZERO);
    for row in 0..ROWS {
        let mut batch = Batch::default();
        mvcc.apply(&mut batch, &[mutation(row)], Timestamp(row + 1));
        engine.write(batch).unwrap();
    }
    engine.sync().unwrap();
    measure(&format!("{name}: point reads"), |number| {
        assert!(mvcc.newest(&key(scattered(number) % ROWS)).unwrap().is_some());
    });
    measure(&format!("{name}: scans of {SCANNED} rows"), |number| {
        let from = key(scattered(number) % (ROWS - SCANNED as u64));
        let range = Range::between(from.as_bytes().clone(), None).unwrap();
        assert_eq!(mvcc.scan(&range, Timestamp::MAX, SCANNED).unwrap().rows.len(), SCANNED);
    });
}

fn log(path: &Path) -> impl FnMut(&[Mutation]) {
    let (mut wal, _) = Wal::open(Directory::new(path).unwrap()).unwrap();
    move |mutations| {
        wal.gather(&record(mutations)).unwrap();
        wal.commit().unwrap();
    }
}

fn tree(path: &Path) -> impl FnMut(&[Mutation]) {
    let lsm = Arc::new(Lsm::open(path).unwrap());
    let mvcc = Mvcc::new(Arc::clone(&lsm) as Arc<dyn Engine>, Home(1), Timestamp::ZERO);
    move |mutations| {
        let mut batch = Batch::default();
        mvcc.apply(&mut batch, mutations, Timestamp(1));
        lsm.write(batch).unwrap();
        lsm.sync().unwrap();
    }
}

fn both(path: &Path) -> impl FnMut(&[Mutation]) {
    let (mut wal, _) = Wal::open(Directory::new(&path.join("log")).unwrap()).unwrap();
    let lsm = Arc::new(Lsm::open(path).unwrap());
    let mvcc = Mvcc::new(Arc::clone(&lsm) as Arc<dyn Engine>, Home(1), Timestamp::ZERO);
    move |mutations| {
        wal.gather(&record(mutations)).unwrap();
        wal.commit().unwrap();
        let mut batch = Batch::default();
        mvcc.apply(&mut batch, mutations, Timestamp(1));
        lsm.write(batch).unwrap();
    }
}

fn redb(path: &Path) -> impl FnMut(&[Mutation]) {
    let database = redb::Database::create(path).unwrap();
    move |mutations| {
        let writes = database.begin_write().unwrap();
        let mut table = writes.open_table(TABLE).unwrap();
        for Mutation { key, value } in mutations {
            table.insert(&key.as_bytes()[..], value.as_deref().unwrap()).unwrap();
        }
        drop(table);
        writes.commit().unwrap();
    }
}

fn write(name: &str, rows: u64, mut each: impl FnMut(&[Mutation])) {
    measure(name, |number| {
        let rows = (number * rows..(number + 1) * rows).map(|row| mutation(scattered(row)));
        each(&rows.collect::<Vec<_>>());
    });
}

fn measure(name: &str, mut each: impl FnMut(u64)) {
    let begun = Instant::now();
    let mut done = 0;
    while begun.elapsed() < MEASURED {
        each(done);
        done += 1;
    }
    println!("{name:40} {:>10.0} a second", done as f64 / begun.elapsed().as_secs_f64());
}

fn mutation(row: u64) -> Mutation {
    // Not to be made smaller by compression.
    let words = (0..VALUE_BYTES.div_ceil(8) as u64).map(|word| scattered(row * 31 + word).to_le_bytes());
    let value: Bytes = words.flatten().take(VALUE_BYTES).collect();
    Mutation { key: key(row), value: Some(value) }
}

fn key(row: u64) -> Key {
    Key::new("bench", &row.to_be_bytes()).unwrap()
}

fn record(mutations: &[Mutation]) -> Vec<u8> {
    let mut record = Vec::new();
    for Mutation { key, value } in mutations {
        record.extend_from_slice(key.as_bytes());
        record.extend_from_slice(value.as_deref().unwrap_or_default());
    }
    record
}

/// The same each time, and in no order (SplitMix64).
fn scattered(number: u64) -> u64 {
    let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse().unwrap()
}
