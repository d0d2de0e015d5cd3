//! Nodes, their disks, clocks and network, all under one seed.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use store::{
    engine::{Batch, Engine, EngineError, Memory, Visit},
    group::NodeError,
    keys::Key,
    lease::NodeId,
    node::{Answer, Balance, Config, Node, Outlet, Refused, Request, TICK},
    truetime::{Interval, Timestamp},
    txn::SplitId,
    wal::{Disk, WalError},
};

pub(crate) const EPSILON: Duration = Duration::from_millis(4);
pub(crate) const MS: u64 = 1_000_000;
/// Those of the first split, and one more to move to.
pub(crate) const NODES: u64 = 4;
const FIRST: u64 = 3;
const TICK_MS: u64 = TICK.as_millis() as u64;
const RESTART_AFTER_MS: u64 = 400;
/// Longer than a lease.
const STOPPED_MS: u64 = 5_000;
/// A node's number is in the lower half of its id; above it is how often its disk was replaced.
const INCARNATION: u64 = 1 << 16;

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
pub(crate) struct SimDisk {
    platter: Arc<Mutex<Platter>>,
    rows: Memory,
}

impl SimDisk {
    fn platter(&self) -> MutexGuard<'_, Platter> {
        self.platter.lock().unwrap()
    }

    /// The power goes: of what was not synced some prefix stays, torn anywhere.
    fn crash(&self, rng: &mut Rng) {
        let mut platter = self.platter();
        let (open, synced) = (platter.open, platter.synced);
        if let Some(bytes) = platter.segments.get_mut(&open) {
            let unsynced = (bytes.len() - synced) as u64;
            bytes.truncate(synced + rng.below(unsynced + 1) as usize);
        }
        platter.dies_in = None;
        let batches = self.rows.unsynced() as u64;
        self.rows.crash(rng.below(batches + 1) as usize);
    }

    fn alive(&self) -> io::Result<()> {
        let mut platter = self.platter();
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
        Ok(self.platter().segments.keys().copied().collect())
    }
    fn read(&self, segment: u64) -> io::Result<Vec<u8>> {
        Ok(self.platter().segments[&segment].clone())
    }
    fn truncate(&mut self, segment: u64, length: u64) -> io::Result<()> {
        self.platter().segments.get_mut(&segment).unwrap().truncate(length as usize);
        Ok(())
    }
    fn remove(&mut self, segment: u64) -> io::Result<()> {
        self.alive()?;
        self.platter().segments.remove(&segment);
        Ok(())
    }
    fn open(&mut self, segment: u64) -> io::Result<()> {
        let mut platter = self.platter();
        platter.open = segment;
        platter.synced = platter.segments.entry(segment).or_default().len();
        Ok(())
    }
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let alive = self.alive();
        let mut platter = self.platter();
        let open = platter.open;
        platter.segments.get_mut(&open).unwrap().extend_from_slice(bytes);
        alive
    }
    fn sync(&mut self) -> io::Result<()> {
        self.alive()?;
        let mut platter = self.platter();
        let open = platter.open;
        platter.synced = platter.segments[&open].len();
        Ok(())
    }
}

impl Engine for SimDisk {
    fn get(&self, key: &[u8]) -> Result<Option<bytes::Bytes>, EngineError> {
        self.rows.get(key)
    }
    fn walk(&self, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<(), EngineError> {
        self.rows.walk(from, to, visit)
    }
    fn write(&self, batch: Batch) -> Result<(), EngineError> {
        self.alive().map_err(|error| EngineError(error.to_string().into()))?;
        self.rows.write(batch)
    }
    fn sync(&self) -> Result<(), EngineError> {
        self.alive().map_err(|error| EngineError(error.to_string().into()))?;
        self.rows.sync()
    }
}

pub(crate) struct Machine {
    pub(crate) id: NodeId,
    /// Nothing while it is down.
    pub(crate) node: Option<Node<SimDisk>>,
    disk: SimDisk,
    offset: i64,
    back_at: u64,
    /// It is stopped, as by SIGSTOP, and knows nothing of it afterwards.
    stopped_until: u64,
    busy: bool,
}

/// What goes wrong in a run.
#[derive(Clone, Copy)]
pub(crate) struct Faults {
    /// How far a clock is off at most. Within the bound if no more than [`EPSILON`].
    pub(crate) skew: Duration,
    /// Whether splits are cut, merged, moved and led by others.
    pub(crate) changes: bool,
    /// Whether a disk is lost.
    pub(crate) wipes: bool,
}

/// On its way.
enum Letter {
    Peer { from: NodeId, to: NodeId, message: Vec<u8> },
    Ask { to: usize, token: u64, request: Request },
    Tell { token: u64, answer: Result<Answer, Refused> },
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) truth: u64,
    pub(crate) machines: Vec<Machine>,
    /// Why a node stopped for good, which no node may.
    pub(crate) broken: Option<String>,
    pub(crate) counts: Counts,
    /// Answers that have arrived, by token.
    pub(crate) told: BTreeMap<u64, Result<Answer, Refused>>,
    pub(crate) calm: bool,
    faults: Faults,
    isolated: Option<usize>,
    network: BTreeMap<(u64, u64), Letter>,
    letters: u64,
    tokens: u64,
    /// What was asked for under which token.
    changes: BTreeMap<u64, Change>,
}

#[derive(Clone, Copy)]
enum Change {
    Split,
    Merge,
    Move,
    Lead,
}

/// What happened in a run, for the test to say that it tested something.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) crashes: u64,
    pub(crate) stops: u64,
    pub(crate) wipes: u64,
    pub(crate) splits: u64,
    pub(crate) merges: u64,
    pub(crate) moves: u64,
    pub(crate) leads: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.crashes += other.crashes;
        self.stops += other.stops;
        self.wipes += other.wipes;
        self.splits += other.splits;
        self.merges += other.merges;
        self.moves += other.moves;
        self.leads += other.leads;
    }
}

struct Post {
    sent: Vec<(NodeId, Vec<u8>)>,
    answers: Vec<(u64, Result<Answer, Refused>)>,
}

impl Outlet for Post {
    fn send(&mut self, to: NodeId, message: Vec<u8>) {
        self.sent.push((to, message));
    }
    fn answer(&mut self, token: u64, answer: Result<Answer, Refused>) {
        self.answers.push((token, answer));
    }
}

fn opened(id: NodeId, first: &[NodeId], disk: &SimDisk, seed: u64) -> Result<Node<SimDisk>, NodeError> {
    let mut config = Config::new(id, first.to_vec(), seed);
    // Shorter than a run, longer than a client's patience.
    config.keep = Duration::from_secs(6);
    // Steps end within rows.
    config.survey_versions = 3;
    // Who was away for a while needs a snapshot.
    config.tail_bytes = 20_000;
    config.balance = Balance { spread: false, merge_bytes: 0, ..Balance::default() };
    let mut node = Node::open(config, disk.clone(), Arc::new(disk.clone()))?;
    for other in 1..=NODES {
        node.meet(NodeId(other));
    }
    Ok(node)
}

fn first_nodes(id: u64) -> Vec<NodeId> {
    if id <= FIRST { (1..=FIRST).map(NodeId).collect() } else { vec![] }
}

impl World {
    pub(crate) fn new(seed: u64, faults: Faults) -> Self {
        let machines = (1..=NODES).map(|id| {
            let disk = SimDisk::default();
            let node = opened(NodeId(id), &first_nodes(id), &disk, seed ^ id << 32).unwrap();
            Machine {
                id: NodeId(id),
                node: Some(node),
                disk,
                offset: 0,
                back_at: 0,
                stopped_until: 0,
                busy: true,
            }
        });
        Self {
            rng: Rng(seed),
            truth: 1_000_000 * MS,
            machines: machines.collect(),
            broken: None,
            counts: Counts::default(),
            told: BTreeMap::new(),
            calm: false,
            faults,
            isolated: None,
            network: BTreeMap::new(),
            letters: 0,
            tokens: 0,
            changes: BTreeMap::new(),
        }
    }

    /// What the clock of machine `at` says.
    pub(crate) fn now(&self, at: usize) -> Interval {
        let reading = self.truth.saturating_add_signed(self.machines[at].offset);
        Interval::around(Timestamp(reading), EPSILON)
    }

    /// From here on nothing goes wrong, and what was down comes back.
    pub(crate) fn calm_down(&mut self) {
        self.calm = true;
        self.isolated = None;
        for machine in &mut self.machines {
            machine.disk.platter().dies_in = None;
            machine.back_at = machine.back_at.min(self.truth);
            machine.stopped_until = machine.stopped_until.min(self.truth);
        }
    }

    /// Asks machine `to` from outside. The answer comes, if it does, under the token.
    pub(crate) fn ask(&mut self, to: usize, request: Request) -> u64 {
        self.tokens += 1;
        let token = self.tokens;
        self.send(Letter::Ask { to, token, request });
        token
    }

    /// A machine whose node leads the split that has `key`, as far as it knows, or any.
    pub(crate) fn leader(&mut self, key: &Key) -> usize {
        let leads = |machine: &Machine| {
            let groups = machine.node.as_ref().map(Node::groups);
            groups.is_some_and(|groups| {
                groups.iter().any(|(_, group)| {
                    group.replica().range().contains(key) && group.led_by() == Some(machine.id)
                })
            })
        };
        let known = self.machines.iter().position(leads);
        let any = self.rng.below(self.machines.len() as u64) as usize;
        if self.rng.one_in(30) { any } else { known.unwrap_or(any) }
    }

    /// All splits that anybody leads, with the machine.
    pub(crate) fn led(&self) -> Vec<(usize, SplitId)> {
        let mut led = Vec::new();
        for (at, machine) in self.machines.iter().enumerate() {
            let groups = machine.node.iter().flat_map(|node| node.groups().iter());
            led.extend(
                groups.filter(|(_, group)| group.led_by() == Some(machine.id)).map(|(split, _)| (at, split)),
            );
        }
        led
    }

    /// How everything is, for a person to see what is wrong.
    pub(crate) fn tell(&self) -> String {
        let mut told = String::new();
        for machine in &self.machines {
            told += &format!("\n  {:?}", machine.id);
            for (split, group) in machine.node.iter().flat_map(|node| node.groups().iter()) {
                let replica = group.replica();
                told += &format!(
                    "\n    {split:?} term {} led by {:?}, nodes {:?}, applied {}, generation {}, {:?}, lease {:?}, retired {:?}",
                    group.term(),
                    group.led_by(),
                    group.nodes(),
                    group.applied(),
                    replica.generation(),
                    replica.range(),
                    replica.lease().granted(),
                    replica.retired(),
                );
            }
        }
        told
    }

    /// A millisecond of true time.
    pub(crate) fn step(&mut self) {
        self.truth += MS;
        if !self.calm {
            self.mischief();
        }
        self.deliver();
        for at in 0..self.machines.len() {
            if self.truth < self.machines[at].stopped_until {
                continue;
            }
            if self.machines[at].node.is_none() && self.machines[at].back_at <= self.truth {
                self.restart(at);
            }
            self.turn(at);
        }
    }

    fn mischief(&mut self) {
        let skew = self.faults.skew.as_nanos() as i64;
        for at in 0..self.machines.len() {
            if self.rng.one_in(50) {
                self.machines[at].offset = self.rng.below(2 * skew as u64 + 1) as i64 - skew;
            }
            if self.rng.one_in(8000) {
                self.machines[at].stopped_until = self.truth + self.rng.below(STOPPED_MS) * MS;
                self.counts.stops += 1;
            }
            if self.rng.one_in(2500) {
                // It dies in the middle of one of its next writes or syncs.
                self.machines[at].disk.platter().dies_in = Some(self.rng.below(6));
            }
        }
        if self.rng.one_in(800) {
            let cut = self.rng.below(NODES) as usize;
            self.isolated = if self.isolated.is_some() { None } else { Some(cut) };
        }
        if self.faults.wipes && self.counts.wipes == 0 && self.rng.one_in(9000) {
            let at = self.rng.below(FIRST) as usize;
            self.wipe(at);
        }
        if self.faults.changes && self.rng.one_in(500) {
            self.change();
        }
    }

    /// Somebody wants a split to be another.
    fn change(&mut self) {
        let led = self.led();
        if led.is_empty() {
            return;
        }
        let (at, split) = led[self.rng.below(led.len() as u64) as usize];
        let Some(group) = self.machines[at].node.as_ref().and_then(|node| node.groups().get(split)) else {
            return;
        };
        let voters = group.nodes().0;
        let request = match self.rng.below(4) {
            0 if led.len() < 6 => Request::Split { split, at: None },
            1 => Request::Merge { split },
            2 => {
                let others: Vec<_> = self
                    .machines
                    .iter()
                    .map(|machine| machine.id)
                    .filter(|id| !voters.contains(id))
                    .collect();
                let Some(to) = others.first().copied() else { return };
                Request::Move { split, from: voters[self.rng.below(voters.len() as u64) as usize], to }
            }
            _ => Request::Lead { split, node: voters[self.rng.below(voters.len() as u64) as usize] },
        };
        let counted = match &request {
            Request::Merge { .. } => Change::Merge,
            Request::Move { .. } => Change::Move,
            Request::Lead { .. } => Change::Lead,
            _ => Change::Split,
        };
        let token = self.ask(at, request);
        self.changes.insert(token, counted);
    }

    /// The disk of machine `at` is another, and so is its node.
    fn wipe(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        machine.node = None;
        machine.disk = SimDisk::default();
        machine.id = NodeId(machine.id.0 + INCARNATION);
        machine.back_at = self.truth + self.rng.below(RESTART_AFTER_MS) * MS;
        self.counts.wipes += 1;
    }

    fn restart(&mut self, at: usize) {
        let seed = self.rng.next();
        let machine = &mut self.machines[at];
        match opened(machine.id, &first_nodes(machine.id.0), &machine.disk, seed) {
            Ok(node) => machine.node = Some(node),
            Err(NodeError::Wal(WalError::Io { .. }) | NodeError::Engine(_)) => self.crash(at),
            Err(error) => self.break_with(at, &error),
        }
    }

    fn break_with(&mut self, at: usize, error: &NodeError) {
        self.broken = Some(format!("{:?}: {error:?}", self.machines[at].id));
    }

    fn crash(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        machine.node = None;
        machine.disk.crash(&mut self.rng);
        machine.back_at =
            if self.calm { self.truth } else { self.truth + self.rng.below(RESTART_AFTER_MS) * MS };
        self.counts.crashes += 1;
    }

    fn deliver(&mut self) {
        let truth = self.truth;
        while let Some(first) = self.network.first_entry().filter(|first| first.key().0 <= truth) {
            match first.remove() {
                Letter::Tell { token, answer } => {
                    self.note(token, &answer);
                    self.told.insert(token, answer);
                }
                Letter::Ask { to, token, request } => {
                    let now = self.now(to);
                    if self.truth >= self.machines[to].stopped_until
                        && let Some(node) = &mut self.machines[to].node
                    {
                        node.request(token, request, now);
                        self.machines[to].busy = true;
                    }
                }
                Letter::Peer { from, to, message } => {
                    let Some(at) = self.machines.iter().position(|machine| machine.id == to) else {
                        continue;
                    };
                    let now = self.now(at);
                    if self.truth >= self.machines[at].stopped_until
                        && let Some(node) = &mut self.machines[at].node
                    {
                        node.message(from, &message, now);
                        self.machines[at].busy = true;
                    }
                }
            }
        }
    }

    fn note(&mut self, token: u64, answer: &Result<Answer, Refused>) {
        let Some(change) = self.changes.remove(&token).filter(|_| answer.is_ok()) else { return };
        *match change {
            Change::Split => &mut self.counts.splits,
            Change::Merge => &mut self.counts.merges,
            Change::Move => &mut self.counts.moves,
            Change::Lead => &mut self.counts.leads,
        } += 1;
    }

    fn turn(&mut self, at: usize) {
        let now = self.now(at);
        let ticks = self.truth / MS % TICK_MS == at as u64;
        let machine = &mut self.machines[at];
        let Some(node) = &mut machine.node else { return };
        if ticks {
            node.tick(now);
        }
        let due = node.wake().is_some_and(|wake| now.is_after(wake));
        if !ticks && !machine.busy && !due {
            return;
        }
        machine.busy = false;
        let mut post = Post { sent: vec![], answers: vec![] };
        let result = node.turn(&|| now, &mut post);
        let from = machine.id;
        // What was said before the machine died has been said.
        for (to, message) in post.sent {
            self.send(Letter::Peer { from, to, message });
        }
        for (token, answer) in post.answers {
            self.send(Letter::Tell { token, answer });
        }
        match result {
            Ok(()) => {}
            Err(NodeError::Wal(WalError::Io { .. }) | NodeError::Engine(_)) => self.crash(at),
            Err(NodeError::Replica(_, store::txn::ReplicaError::Engine(_))) => self.crash(at),
            Err(error) => self.break_with(at, &error),
        }
    }

    fn send(&mut self, letter: Letter) {
        let cut = match &letter {
            Letter::Peer { from, to, .. } => self.isolated.is_some_and(|cut| {
                let id = self.machines[cut].id;
                id == *from || id == *to
            }),
            Letter::Ask { .. } | Letter::Tell { .. } => false,
        };
        if cut || (!self.calm && self.rng.one_in(50)) {
            return;
        }
        let twice = matches!(&letter, Letter::Peer { .. } | Letter::Ask { .. }) && self.rng.one_in(60);
        let delay = if self.rng.one_in(30) { self.rng.below(60) } else { self.rng.below(3) };
        if let (true, Letter::Peer { from, to, message }) = (twice, &letter) {
            let again = Letter::Peer { from: *from, to: *to, message: message.clone() };
            let later = self.rng.below(40);
            self.post(later, again);
        }
        self.post(delay, letter);
    }

    fn post(&mut self, delay: u64, letter: Letter) {
        self.letters += 1;
        self.network.insert((self.truth + (1 + delay) * MS, self.letters), letter);
    }
}
