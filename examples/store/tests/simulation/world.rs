//! Three nodes, their disks, clocks and network, all under one seed.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io,
    rc::Rc,
    time::Duration,
};

use store::{
    group::{Groups, NodeError},
    lease::NodeId,
    locks::Changes,
    truetime::{Interval, Timestamp},
    txn::{Applied, Entry, Outcome, SplitId, TxnId},
    wal::{Disk, WalError},
};

pub(crate) const EPSILON: Duration = Duration::from_millis(4);
pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SPLITS: [SplitId; 2] = [SplitId(1), SplitId(2)];
const NODES: u64 = 3;
const TICK_MS: u64 = 10;
const RESTART_AFTER_MS: u64 = 400;
/// Longer than a lease.
const STOPPED_MS: u64 = 5_000;

/// SplitMix64: all that a seed has to give.
#[derive(Clone)]
pub(crate) struct Rng(pub u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn one_in(&mut self, odds: u64) -> bool {
        self.below(odds) == 0
    }
}

/// What is on a disk, and what a crash may still take.
#[derive(Default)]
struct Platter {
    segments: BTreeMap<u64, Vec<u8>>,
    open: u64,
    synced: usize,
    /// Writes and syncs until the machine dies in the middle of one.
    dies_in: Option<u64>,
}

#[derive(Clone, Default)]
pub(crate) struct SimDisk(Rc<RefCell<Platter>>);

impl SimDisk {
    /// The power goes: of what was not synced some prefix stays, torn anywhere.
    fn crash(&self, rng: &mut Rng) {
        let mut platter = self.0.borrow_mut();
        let (open, synced) = (platter.open, platter.synced);
        if let Some(bytes) = platter.segments.get_mut(&open) {
            let unsynced = (bytes.len() - synced) as u64;
            bytes.truncate(synced + rng.below(unsynced + 1) as usize);
        }
        platter.dies_in = None;
    }

    fn alive(&self) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        match platter.dies_in {
            Some(0) => Err(io::Error::other("the machine died")),
            Some(left) => {
                platter.dies_in = Some(left - 1);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Disk for SimDisk {
    fn segments(&self) -> io::Result<Vec<u64>> {
        Ok(self.0.borrow().segments.keys().copied().collect())
    }
    fn read(&self, segment: u64) -> io::Result<Vec<u8>> {
        Ok(self.0.borrow().segments[&segment].clone())
    }
    fn truncate(&mut self, segment: u64, length: u64) -> io::Result<()> {
        self.0.borrow_mut().segments.get_mut(&segment).unwrap().truncate(length as usize);
        Ok(())
    }
    fn open(&mut self, segment: u64) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        platter.open = segment;
        platter.synced = platter.segments.entry(segment).or_default().len();
        Ok(())
    }
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let alive = self.alive();
        let mut platter = self.0.borrow_mut();
        let open = platter.open;
        platter.segments.get_mut(&open).unwrap().extend_from_slice(bytes);
        alive
    }
    fn sync(&mut self) -> io::Result<()> {
        self.alive()?;
        let mut platter = self.0.borrow_mut();
        let open = platter.open;
        platter.synced = platter.segments[&open].len();
        Ok(())
    }
}

pub(crate) struct Node {
    pub(crate) id: NodeId,
    /// Nothing while it is down.
    pub(crate) groups: Option<Groups<SimDisk>>,
    /// Counts restarts: what a client remembers of a node is of one life.
    pub(crate) life: u64,
    /// Got the locks that they waited for, by split.
    pub(crate) granted: BTreeSet<(SplitId, TxnId)>,
    /// Ended here, locks kept until their timestamp has passed.
    ending: Vec<(SplitId, TxnId, Timestamp)>,
    disk: SimDisk,
    offset: i64,
    back_at: u64,
    /// It is stopped, as by SIGSTOP, and knows nothing of it afterwards.
    stopped_until: u64,
}

/// What goes wrong in a run.
#[derive(Clone, Copy)]
pub(crate) struct Faults {
    /// How far a clock is off at most. Within the bound if no more than [`EPSILON`].
    pub(crate) skew: Duration,
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) truth: u64,
    pub(crate) nodes: Vec<Node>,
    /// Why a node stopped for good, which no node may.
    pub(crate) broken: Option<NodeError>,
    pub(crate) crashes: u64,
    faults: Faults,
    pub(crate) calm: bool,
    isolated: Option<NodeId>,
    network: Vec<(u64, NodeId, SplitId, Vec<u8>)>,
}

impl World {
    pub(crate) fn new(seed: u64, faults: Faults) -> Self {
        let nodes = (1..=NODES).map(|id| {
            let disk = SimDisk::default();
            let groups = Some(opened(NodeId(id), &disk).unwrap());
            let id = NodeId(id);
            Node {
                id,
                groups,
                life: 0,
                granted: BTreeSet::new(),
                ending: vec![],
                disk,
                offset: 0,
                back_at: 0,
                stopped_until: 0,
            }
        });
        Self {
            rng: Rng(seed),
            truth: 1_000_000 * MS,
            nodes: nodes.collect(),
            broken: None,
            crashes: 0,
            faults,
            calm: false,
            isolated: None,
            network: vec![],
        }
    }

    pub(crate) fn now(&self, node: usize) -> Interval {
        let reading = self.truth.saturating_add_signed(self.nodes[node].offset);
        Interval::around(Timestamp(reading), EPSILON)
    }

    /// From here on nothing goes wrong, and what was down comes back.
    pub(crate) fn calm_down(&mut self) {
        self.calm = true;
        self.isolated = None;
        for node in &mut self.nodes {
            node.disk.0.borrow_mut().dies_in = None;
            node.back_at = node.back_at.min(self.truth);
            node.stopped_until = node.stopped_until.min(self.truth);
        }
    }

    /// A node that leads `split` and may serve, if there is one.
    pub(crate) fn leading(&mut self, split: SplitId) -> Option<usize> {
        (0..self.nodes.len()).find(|at| {
            let now = self.now(*at);
            self.group(*at, split).and_then(|group| group.leader()).is_some_and(|(leader, replica)| {
                replica.term() == leader.term() && replica.lease().serves(leader.tenure(), now)
            })
        })
    }

    pub(crate) fn group(&mut self, node: usize, split: SplitId) -> Option<&mut store::group::Group> {
        if self.is_stopped(node) {
            return None;
        }
        self.nodes[node].groups.as_mut().and_then(|groups| groups.get_mut(split))
    }

    fn is_stopped(&self, node: usize) -> bool {
        self.truth < self.nodes[node].stopped_until
    }

    pub(crate) fn propose(&mut self, node: usize, split: SplitId, entry: &Entry) {
        self.group(node, split).unwrap().propose(entry).expect("it led a moment ago");
    }

    pub(crate) fn absorb(&mut self, node: usize, split: SplitId, changes: Changes) {
        self.nodes[node].granted.extend(changes.granted.into_iter().map(|txn| (split, txn)));
    }

    /// A millisecond of true time.
    pub(crate) fn step(&mut self) {
        self.truth += MS;
        if !self.calm {
            self.mischief();
        }
        for at in 0..self.nodes.len() {
            if self.is_stopped(at) {
                continue;
            }
            if self.nodes[at].groups.is_none() && self.nodes[at].back_at <= self.truth {
                self.restart(at);
            }
            self.deliver(at);
            self.end_waits(at);
            self.turn(at);
            self.hear_coordinators(at);
        }
    }

    fn mischief(&mut self) {
        let skew = self.faults.skew.as_nanos() as i64;
        for node in &mut self.nodes {
            if self.rng.one_in(50) {
                node.offset = self.rng.below(2 * skew as u64 + 1) as i64 - skew;
            }
            if self.rng.one_in(6000) {
                node.stopped_until = self.truth + self.rng.below(STOPPED_MS) * MS;
            }
            if self.rng.one_in(1500) {
                // It dies in the middle of one of its next writes or syncs.
                node.disk.0.borrow_mut().dies_in = Some(self.rng.below(4));
            }
        }
        if self.rng.one_in(600) {
            let cut = NodeId(1 + self.rng.below(NODES));
            self.isolated = if self.isolated.is_some() { None } else { Some(cut) };
        }
    }

    fn restart(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        match opened(node.id, &node.disk) {
            Ok(groups) => node.groups = Some(groups),
            Err(error) => self.broken = Some(error),
        }
    }

    fn crash(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        node.groups = None;
        node.disk.crash(&mut self.rng);
        node.granted.clear();
        node.ending.clear();
        node.life += 1;
        node.back_at =
            if self.calm { self.truth } else { self.truth + self.rng.below(RESTART_AFTER_MS) * MS };
        self.crashes += 1;
    }

    fn deliver(&mut self, at: usize) {
        let (id, truth) = (self.nodes[at].id, self.truth);
        let due: Vec<_> = self.network.extract_if(.., |(when, to, ..)| *to == id && *when <= truth).collect();
        if let Some(groups) = &mut self.nodes[at].groups {
            for (_, _, split, bytes) in due {
                // What is of no use any more, an old vote say, is dropped with a reason.
                groups.step(split, &bytes).ok();
            }
        }
    }

    fn turn(&mut self, at: usize) {
        let now = self.now(at);
        let ticks = self.truth / MS % TICK_MS == at as u64;
        let closes = self.rng.one_in(60);
        let Some(groups) = &mut self.nodes[at].groups else { return };
        if ticks {
            groups.tick();
        }
        groups.renew(now).unwrap();
        for split in SPLITS.into_iter().filter(|_| closes) {
            let group = groups.get_mut(split).unwrap();
            let entry = group.leader().and_then(|(leader, replica)| leader.close(replica, now).ok());
            if let Some(entry) = entry {
                group.propose(&entry).unwrap();
            }
        }
        match groups.turn() {
            Ok(turn) => {
                for (split, applied) in turn.applied {
                    if let Applied::Ended(txn, outcome) = applied {
                        let until = if let Outcome::Committed(at) = outcome { at } else { Timestamp::ZERO };
                        self.nodes[at].ending.push((split, txn, until));
                    }
                }
                self.send(at, turn.messages);
            }
            Err(NodeError::Wal(WalError::Io { .. })) => self.crash(at),
            Err(error) => self.broken = Some(error),
        }
    }

    fn send(&mut self, from: usize, messages: Vec<(SplitId, NodeId, Vec<u8>)>) {
        let from = self.nodes[from].id;
        for (split, to, bytes) in messages {
            let cut = self.isolated.is_some_and(|cut| cut == from || cut == to);
            if cut || (!self.calm && self.rng.one_in(50)) {
                continue;
            }
            for _ in 0..if self.rng.one_in(50) { 2 } else { 1 } {
                let delay = if self.rng.one_in(30) { self.rng.below(60) } else { self.rng.below(3) };
                self.network.push((self.truth + (1 + delay) * MS, to, split, bytes.clone()));
            }
        }
    }

    /// Locks go when the timestamp has passed, not before; and when nobody has asked for anything for long.
    fn end_waits(&mut self, at: usize) {
        let now = self.now(at);
        for split in SPLITS {
            let led = self.group(at, split).and_then(|group| group.leader());
            let changes = led.map(|(leader, replica)| leader.expire(replica, now));
            self.absorb(at, split, changes.unwrap_or_default());
        }
        let over: Vec<_> =
            self.nodes[at].ending.extract_if(.., |(_, _, until)| now.is_after(*until)).collect();
        for (split, txn, _) in over {
            let changes =
                self.group(at, split).and_then(|group| group.leader()).map(|(leader, _)| leader.release(txn));
            self.absorb(at, split, changes.unwrap_or_default());
        }
    }

    /// Participants in doubt ask the coordinator's split; a coordinator forgets what all have heard.
    fn hear_coordinators(&mut self, at: usize) {
        for split in SPLITS {
            let now = self.now(at);
            let Some((leader, replica)) = self.group(at, split).and_then(|group| group.leader()) else {
                continue;
            };
            let term = leader.term();
            let doubts: Vec<_> =
                replica.in_doubt().map(|(txn, prepared)| (txn, prepared.coordinator)).collect();
            let unsettled: Vec<_> = replica.unsettled().map(|(txn, to)| (txn, to.to_vec())).collect();
            for (txn, coordinator) in doubts {
                if !self.rng.one_in(10) {
                    continue;
                }
                if let Some(outcome) = self.ask(coordinator, txn) {
                    let resolved = self.group(at, split).and_then(|group| {
                        let (leader, replica) = group.leader()?;
                        (leader.term() == term)
                            .then(|| leader.resolve(replica, txn, outcome, now).ok())
                            .flatten()
                    });
                    if let Some(entry) = resolved {
                        self.propose(at, split, &entry);
                    }
                }
            }
            let heard = |(txn, to): &(TxnId, Vec<SplitId>)| {
                let all = to.iter().all(|split| {
                    let leading = self.leading(*split);
                    let replica = leading.and_then(|at| self.group(at, *split)).map(|group| group.replica());
                    replica.is_some_and(|replica| replica.outcome(*txn).is_some())
                });
                all.then_some(*txn)
            };
            let settled: Vec<_> = unsettled.iter().filter_map(heard).collect();
            if !settled.is_empty() && self.rng.one_in(10) {
                let group = self.group(at, split).unwrap();
                let entry = group.leader().map(|(leader, _)| leader.settled(settled)).unwrap();
                group.propose(&entry).unwrap();
            }
        }
    }

    /// The coordinator's word on `txn`, which it gives when the timestamp has passed. If it has none and nobody there
    /// works on it, it decides now.
    fn ask(&mut self, coordinator: SplitId, txn: TxnId) -> Option<Outcome> {
        let at = self.leading(coordinator)?;
        let now = self.now(at);
        let group = self.group(at, coordinator)?;
        let (leader, replica) = group.leader()?;
        match replica.outcome(txn) {
            Some(Outcome::Committed(when)) if !now.is_after(when) => None,
            Some(outcome) => Some(outcome),
            None => {
                if !leader.knows(txn) {
                    let entry = leader.resolve(replica, txn, Outcome::Aborted, now).ok()?;
                    group.propose(&entry).unwrap();
                }
                None
            }
        }
    }
}

fn opened(id: NodeId, disk: &SimDisk) -> Result<Groups<SimDisk>, NodeError> {
    let nodes: Vec<_> = (1..=NODES).map(NodeId).collect();
    let splits = SPLITS.into_iter().map(|split| (split, nodes.clone())).collect();
    Groups::open(id, &splits, disk.clone())
}
