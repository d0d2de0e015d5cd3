//! What goes wrong while clients work: drawn from the seed, held for a while, healed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{task::JoinSet, time::sleep};

use super::{
    admin::Admin,
    clock::ClientClock,
    cluster::{Cluster, Doing},
    disk::SmallDisk,
    network::{Cut, Network, parted},
    random::Random,
    skew::WrongClock,
};

/// Between two faults of one hand.
const REST: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(4)];
/// How long most faults are held.
const HOLD: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(5)];
/// How long a node stands still: from less than a lease of two seconds to well past it.
const STILL: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(6)];
/// Between two changes that need no healing.
const LIGHT_REST: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(2500)];
/// Of a hundred kills, so many are of all nodes at once.
const KILL_ALL_PERCENT: u64 = 12;
/// How often it is looked for nodes that died by themselves.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// A node that died by itself is started again after that.
const DEAD_FOR: Duration = Duration::from_secs(1);

/// Ways to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Fault {
    /// A node's process is killed and started again; now and then all of them.
    Kill,
    /// A node's process stands still, also for longer than a lease, and goes on.
    Stop,
    /// Nodes do not hear each other, in both directions or in one.
    Partition,
    /// Clocks change by as much as they may be wrong.
    Clock,
    /// A node's disk is full.
    Disk,
    /// Leadership is handed over.
    Lead,
    /// Splits are cut in two.
    Split,
    /// Splits are taken together.
    Merge,
    /// Replicas move to other nodes.
    Move,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Partition => "partition",
            Self::Clock => "clock",
            Self::Disk => "disk",
            Self::Lead => "lead",
            Self::Split => "split",
            Self::Merge => "merge",
            Self::Move => "move",
        };
        f.write_str(name)
    }
}

impl Fault {
    /// It lasts, and has to be healed.
    fn is_held(self) -> bool {
        matches!(self, Self::Kill | Self::Stop | Self::Partition | Self::Disk)
    }
}

/// What was done to the nodes, and what came of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Deeds {
    /// How often each.
    pub(crate) done: BTreeMap<String, u64>,
    /// What was asked for and refused, by its reason.
    pub(crate) refused: BTreeMap<String, u64>,
    /// Nodes that ended by themselves where nothing of the kind was to be expected.
    pub(crate) deaths: Vec<String>,
    /// Nodes that ended because their disk was full.
    pub(crate) full: u64,
}

/// What of the nodes can be spoilt.
#[derive(Debug)]
pub(crate) struct Targets {
    /// Their processes.
    pub(crate) cluster: Arc<Cluster>,
    /// Their network, if it is not loopback.
    pub(crate) network: Option<Network>,
    /// Their clocks, if they are to be wrong, and by how much.
    pub(crate) clocks: Vec<WrongClock>,
    /// By how much, at most.
    pub(crate) skew: Duration,
    /// The small disk of one, if it is to be full.
    pub(crate) disk: Option<(u64, SmallDisk)>,
    /// Who asks for changes of splits.
    pub(crate) admin: Admin,
}

/// The hands that do it.
#[derive(Debug)]
pub(crate) struct Nemesis {
    targets: Targets,
    faults: Vec<Fault>,
    clock: ClientClock,
    busy: Mutex<BTreeSet<Part>>,
    deeds: Mutex<Deeds>,
    stop: AtomicBool,
}

/// What only one hand may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Process(u64),
    Network,
    Disk,
}

impl Nemesis {
    /// One that has done nothing yet.
    pub(crate) fn new(targets: Targets, faults: Vec<Fault>, clock: ClientClock) -> Self {
        Self {
            targets,
            faults,
            clock,
            busy: Mutex::default(),
            deeds: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    /// Begins: two hands for what is held, so that faults come together too, and one for what passes at once.
    pub(crate) fn run(self: &Arc<Self>, seed: u64) -> JoinSet<()> {
        let mut hands = JoinSet::new();
        for hand in 0..2 {
            let (this, random) = (Arc::clone(self), Random::new(seed, 10 + hand));
            hands.spawn(async move { this.hand(random, REST, Fault::is_held).await });
        }
        let (this, random) = (Arc::clone(self), Random::new(seed, 20));
        hands.spawn(async move { this.hand(random, LIGHT_REST, |fault| !fault.is_held()).await });
        hands
    }

    /// Starts nodes that die by themselves, for as long as the task lives: a disk that was full is one until it is freed.
    pub(crate) fn keep_watch(self: &Arc<Self>) -> JoinSet<()> {
        let mut watch = JoinSet::new();
        let this = Arc::clone(self);
        watch.spawn(async move { this.watch().await });
        watch
    }

    /// The hands are to heal what they hold and to stop.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// All is well again, as far as that is in these hands.
    pub(crate) fn heal(&self) {
        if let Some(network) = &self.targets.network {
            self.note(network.cut(&[]));
        }
        if let Some((_, disk)) = &self.targets.disk {
            self.note(disk.free());
        }
        for clock in &self.targets.clocks {
            self.note(clock.set(0));
        }
        for id in self.targets.cluster.ids() {
            if self.targets.cluster.doing(id) == Doing::Stopped {
                self.note(self.targets.cluster.go_on(id));
            }
            self.note(self.targets.cluster.start(id));
        }
    }

    /// Counts the nodes that died by themselves when nobody watched any more.
    pub(crate) fn bury_all(&self) {
        for death in self.targets.cluster.deaths() {
            self.bury(death.node, &death.why);
        }
    }

    /// What was done so far.
    pub(crate) fn deeds(&self) -> Deeds {
        lock(&self.deeds).clone()
    }

    async fn hand(&self, mut random: Random, rest: [Duration; 2], mine: impl Fn(Fault) -> bool) {
        let [rest_least, rest_most] = rest;
        let faults: Vec<_> = self.faults.iter().copied().filter(|fault| mine(*fault)).collect();
        while !self.stopped() && !faults.is_empty() {
            self.pause(random.duration(rest_least, rest_most)).await;
            if let Some(fault) = random.pick(&faults).filter(|_| !self.stopped()) {
                self.strike(*fault, &mut random).await;
            }
        }
    }

    async fn strike(&self, fault: Fault, random: &mut Random) {
        match fault {
            Fault::Kill => self.kill(random).await,
            Fault::Stop => self.stand_still(random).await,
            Fault::Partition => self.partition(random).await,
            Fault::Disk => self.fill_disk(random).await,
            Fault::Clock => self.turn_clocks(random),
            Fault::Lead | Fault::Split | Fault::Merge | Fault::Move => {
                self.change_splits(fault, random).await
            }
        }
    }

    async fn kill(&self, random: &mut Random) {
        let cluster = &self.targets.cluster;
        let ids = cluster.ids();
        let all = random.chance(KILL_ALL_PERCENT);
        let victims = if all { ids } else { random.pick(&ids).copied().into_iter().collect() };
        let parts: Vec<_> = victims.iter().map(|id| Part::Process(*id)).collect();
        let Some(_held) = self.hold(&parts) else { return };
        self.done(if all { "kill all" } else { "kill" }, &format!("nodes {victims:?} are killed"));
        for id in &victims {
            self.note(cluster.kill(*id));
        }
        self.hold_for(HOLD, random).await;
        for id in &victims {
            self.note(cluster.start(*id));
        }
        self.say(&format!("nodes {victims:?} are started again"));
    }

    async fn stand_still(&self, random: &mut Random) {
        let cluster = &self.targets.cluster;
        let Some(id) = random.pick(&cluster.ids()).copied() else { return };
        let Some(_held) = self.hold(&[Part::Process(id)]) else { return };
        if cluster.stop(id).is_err() {
            return;
        }
        self.done("stop", &format!("node {id} stands still"));
        self.hold_for(STILL, random).await;
        self.note(cluster.go_on(id));
        self.say(&format!("node {id} goes on"));
    }

    async fn partition(&self, random: &mut Random) {
        let Some(network) = &self.targets.network else { return };
        let Some(_held) = self.hold(&[Part::Network]) else { return };
        let (what, cuts) = draw_cuts(&self.targets.cluster.ids(), random);
        self.done("partition", &what);
        self.note(network.cut(&cuts));
        self.hold_for(HOLD, random).await;
        self.note(network.cut(&[]));
        self.say("the network is whole again");
    }

    async fn fill_disk(&self, random: &mut Random) {
        let Some((id, disk)) = &self.targets.disk else { return };
        let Some(_held) = self.hold(&[Part::Disk]) else { return };
        self.done("disk", &format!("node {id} has no room on its disk"));
        self.note(disk.fill());
        self.hold_for(HOLD, random).await;
        self.note(disk.free());
        self.say(&format!("node {id} has room again"));
    }

    fn turn_clocks(&self, random: &mut Random) {
        let most = u64::try_from(self.targets.skew.as_nanos()).unwrap_or(u64::MAX);
        let mut offsets = Vec::new();
        for clock in &self.targets.clocks {
            // The ends of what is allowed are where a mistake shows.
            let size = if random.chance(50) { most } else { random.below(most) };
            let size = i64::try_from(size).unwrap_or(i64::MAX);
            let offset = if random.chance(50) { -size } else { size };
            self.note(clock.set(offset));
            offsets.push(format!(
                "{}{:.1?}",
                if offset < 0 { "-" } else { "+" },
                Duration::from_nanos(offset.unsigned_abs())
            ));
        }
        self.done("clock", &format!("clocks are off by {}", offsets.join(", ")));
    }

    async fn change_splits(&self, fault: Fault, random: &mut Random) {
        match self.targets.admin.change(fault, random).await {
            Ok(Some(what)) => self.done(&fault.to_string(), &what),
            Ok(None) => {}
            Err(error) => {
                *lock(&self.deeds).refused.entry(format!("{fault}: {error:#}")).or_default() += 1;
            }
        }
    }

    /// Starts nodes that died by themselves.
    async fn watch(&self) {
        loop {
            for death in self.targets.cluster.deaths() {
                self.bury(death.node, &death.why);
                sleep(DEAD_FOR).await;
                self.note(self.targets.cluster.start(death.node));
            }
            sleep(WATCH_EVERY).await;
        }
    }

    fn bury(&self, node: u64, why: &str) {
        let full = self.targets.disk.as_ref().is_some_and(|(id, _)| *id == node);
        if full && why.contains("No space left") {
            lock(&self.deeds).full += 1;
            self.say(&format!("node {node} ended with its disk full"));
        } else {
            self.say(&format!("node {node} died by itself: {why}"));
            lock(&self.deeds).deaths.push(format!("node {node}: {why}"));
        }
    }

    fn hold(&self, parts: &[Part]) -> Option<Held<'_>> {
        let mut busy = lock(&self.busy);
        if parts.iter().any(|part| busy.contains(part)) {
            return None;
        }
        busy.extend(parts);
        Some(Held { busy: &self.busy, parts: parts.to_vec() })
    }

    async fn hold_for(&self, [least, most]: [Duration; 2], random: &mut Random) {
        self.pause(random.duration(least, most)).await;
    }

    /// Sleeps, but no longer than the run goes on.
    async fn pause(&self, duration: Duration) {
        let mut left = duration;
        while !self.stopped() && !left.is_zero() {
            let step = left.min(WATCH_EVERY);
            sleep(step).await;
            left = left.saturating_sub(step);
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn done(&self, name: &str, what: &str) {
        *lock(&self.deeds).done.entry(name.to_owned()).or_default() += 1;
        self.say(what);
    }

    fn note(&self, result: anyhow::Result<()>) {
        if let Err(error) = result {
            self.say(&format!("{error:#}"));
        }
    }

    fn say(&self, what: &str) {
        eprintln!("{:8.3} s  {what}", self.clock.seconds());
    }
}

/// Parts that no other hand touches while this lives.
struct Held<'a> {
    busy: &'a Mutex<BTreeSet<Part>>,
    parts: Vec<Part>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut busy = lock(self.busy);
        for part in &self.parts {
            busy.remove(part);
        }
    }
}

fn draw_cuts(ids: &[u64], random: &mut Random) -> (String, Vec<Cut>) {
    let one = random.pick(ids).copied().unwrap_or(0);
    let others: Vec<_> = ids.iter().copied().filter(|id| *id != one).collect();
    let other = random.pick(&others).copied().unwrap_or(0);
    match random.below(5) {
        0 => (format!("node {one} is alone"), parted(&[one], &others)),
        1 => {
            let (near, far): (Vec<_>, Vec<_>) =
                ids.iter().copied().partition(|id| *id == one || random.chance(50));
            (format!("nodes {near:?} and {far:?} are apart"), parted(&near, &far))
        }
        2 => {
            let cuts = others.iter().map(|to| Cut { from: one, to: *to }).collect();
            (format!("nobody hears node {one}"), cuts)
        }
        3 => {
            let cuts = others.iter().map(|from| Cut { from: *from, to: one }).collect();
            (format!("node {one} hears nobody"), cuts)
        }
        _ => (format!("nodes {one} and {other} do not hear each other"), parted(&[one], &[other])),
    }
}

/// What a hand that panicked left is still true.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_are_between_nodes_that_there_are_and_never_of_one_to_itself() {
        let mut random = Random::new(3, 1);
        for _ in 0..200 {
            let (_, cuts) = draw_cuts(&[1, 2, 3], &mut random);
            assert!(cuts.iter().all(|cut| (1..=3).contains(&cut.from) && (1..=3).contains(&cut.to)));
            assert!(cuts.iter().all(|cut| cut.from != cut.to));
        }
    }
}
