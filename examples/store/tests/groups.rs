//! Three nodes on real files.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests"
)]

use std::{cmp::Reverse, collections::BTreeMap, fs, path::Path, time::Duration};

use bytes::Bytes;
use store::{
    group::{Dropped, Groups},
    keys::Key,
    lease::NodeId,
    locks::Age,
    mvcc::Mutation,
    truetime::{Interval, Manual, Timestamp, TrueTime as _},
    txn::{Attempt, SplitId, TxnId},
    wal::Directory,
};

const SPLIT: SplitId = SplitId(1);
const TICK: Duration = Duration::from_millis(10);
/// Many times what an election and a lease that runs out take.
const TURNS_MAX: usize = 2_000;

struct Cluster {
    clock: Manual,
    nodes: Vec<Groups<Directory>>,
    /// Why messages were of no use.
    dropped: Vec<Dropped>,
}

fn opened(home: &Path, node: u64) -> Groups<Directory> {
    let splits = BTreeMap::from([(SPLIT, vec![NodeId(1), NodeId(2), NodeId(3)])]);
    let disk = Directory::new(&home.join(node.to_string())).unwrap();
    Groups::open(NodeId(node), &splits, disk).unwrap()
}

impl Cluster {
    fn start(home: &Path, clock: &Manual) -> Self {
        let nodes = (1..=3).map(|node| opened(home, node)).collect();
        Self { clock: clock.clone(), nodes, dropped: vec![] }
    }

    fn now(&self) -> Interval {
        self.clock.now().unwrap()
    }

    /// A tick of every node, and all messages that come of it.
    fn turn(&mut self) {
        self.clock.advance(TICK);
        let now = self.now();
        let mut messages = vec![];
        for node in &mut self.nodes {
            node.tick();
            node.renew(now).unwrap();
            messages.extend(node.turn().unwrap().messages);
        }
        while !messages.is_empty() {
            for (split, to, bytes) in std::mem::take(&mut messages) {
                let node = &mut self.nodes[to.0 as usize - 1];
                self.dropped.extend(node.step(split, &bytes).err());
                messages.extend(node.turn().unwrap().messages);
            }
        }
    }

    fn until(&mut self, mut reached: impl FnMut(&mut Self) -> bool) {
        assert!(
            (0..TURNS_MAX).any(|_| {
                self.turn();
                reached(self)
            }),
            "it never came to that"
        );
    }

    fn serving(&mut self) -> Option<usize> {
        let now = self.now();
        self.nodes.iter_mut().position(|node| {
            let led = node.get_mut(SPLIT).unwrap().leader();
            led.is_some_and(|(leader, replica)| replica.lease().serves(leader.tenure(), now))
        })
    }

    fn write(&mut self, number: u64, value: &'static str) {
        self.until(|cluster| cluster.serving().is_some());
        let (at, now) = (self.serving().unwrap(), self.now());
        let group = self.nodes[at].get_mut(SPLIT).unwrap();
        let (leader, replica) = group.leader().unwrap();
        let txn = TxnId { started: now.latest, random: number };
        let age = Age { first: now.latest, client: number, attempt: Reverse(0) };
        let writes = vec![Mutation { key: key(), value: Some(Bytes::from_static(value.as_bytes())) }];
        leader.lock_writes(replica, Attempt { txn, age }, false, &writes, now).unwrap();
        let entry = leader.commit(replica, txn, writes, vec![], now.latest, now).unwrap();
        group.propose(&entry).unwrap();
        self.until(|cluster| cluster.values() == vec![Some(value.to_owned()); 3]);
        let (leader, _) = self.nodes[at].get_mut(SPLIT).unwrap().leader().unwrap();
        leader.release(txn);
    }

    fn values(&self) -> Vec<Option<String>> {
        let value = |node: &Groups<Directory>| {
            let version = node.get(SPLIT).unwrap().replica().rows().newest(&key())?;
            Some(String::from_utf8(version.value.clone()?.to_vec()).unwrap())
        };
        self.nodes.iter().map(value).collect()
    }
}

fn key() -> Key {
    Key::new("acct", b"17").unwrap()
}

fn clock() -> Manual {
    Manual::new(Timestamp(1_000_000_000_000), Duration::from_millis(1))
}

#[test]
fn what_was_committed_is_there_after_all_nodes_were_down() {
    let (home, clock) = (tempfile::tempdir().unwrap(), clock());
    let mut cluster = Cluster::start(home.path(), &clock);
    cluster.write(1, "one");
    cluster.write(2, "two");
    drop(cluster);
    let mut cluster = Cluster::start(home.path(), &clock);
    cluster.until(|cluster| cluster.values() == vec![Some("two".to_owned()); 3]);
    cluster.write(3, "three");
}

#[test]
fn a_node_that_lost_its_disk_is_noticed_and_does_no_harm() {
    let (home, clock) = (tempfile::tempdir().unwrap(), clock());
    let mut cluster = Cluster::start(home.path(), &clock);
    cluster.write(1, "one");
    let lost = (cluster.serving().unwrap() + 1) % 3;
    fs::remove_dir_all(home.path().join((lost + 1).to_string())).unwrap();
    cluster.nodes[lost] = opened(home.path(), lost as u64 + 1);
    cluster.until(|cluster| cluster.dropped.iter().any(|why| matches!(why, Dropped::Forgot { last: 0, .. })));
    let kept = (0..3).filter(|at| *at != lost);
    assert!(kept.into_iter().all(|at| cluster.values()[at].as_deref() == Some("one")));
}
