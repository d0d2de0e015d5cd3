//! Knowing that there is too much to do before the kernel says so by killing the process.
//!
//! [`watch`] reads memory and descriptors a few times a second; the data plane asks [`Overload::shed`] before a
//! request, [`Overload::room`] before it accepts, and [`Overload::relief`] where a connection may end.
//!
//! Memory that an allocator keeps after a burst is no sign of load: if shedding for a while brings nothing,
//! the line moves up to what is there, but never beyond a ceiling a little over the budget.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use identity::Scope;
use identity::clock::SharedClock;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::{Semaphore, watch};

/// How often is looked: a burst that outgrows a fifth of a memory limit within it is beyond help.
const INTERVAL: Duration = Duration::from_millis(250);
/// Readings for which shedding may bring nothing (10 s: requests under way have ended by then) before the line
/// moves up.
const PLATEAU_READINGS: u32 = 40;
/// Part of the budget by which memory has to fall below the line before requests are taken again, so that it
/// does not flutter.
const HYSTERESIS_SHARE: u64 = 32;
/// Part of the budget by which the line moves up at a time.
const STEP_SHARE: u64 = 16;
/// Part of the budget by which the line may be over it at most: 80 % of a limit become 90 %.
const CEILING_SHARE: u64 = 8;
/// Descriptors that are kept free: for the log, the policies, the agent, and answering that it is full.
const MIN_RESERVE: u64 = 32;
/// And as a part of all of them.
const RESERVE_SHARE: u64 = 16;
/// Connections that are asked to end at each reading while descriptors are scarce.
const RELIEVED_AT_ONCE: usize = 32;

/// What a process may use; by default, all there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of resident memory; `None` is no bound.
    pub memory_bytes: Option<u64>,
    /// Open descriptors: the soft limit of the process; `None` is no bound.
    pub descriptors: Option<u64>,
}

impl Budget {
    /// How many connections a listener may have at once, at most `most`: each may need a second descriptor, for
    /// where its requests go.
    pub fn connections(&self, most: usize) -> usize {
        let Some(descriptors) = self.descriptors else { return most };
        let usable = descriptors.saturating_sub(reserve(descriptors)) / 2;
        usize::try_from(usable).map_or(most, |usable| usable.clamp(1, most))
    }
}

fn reserve(descriptors: u64) -> u64 {
    (descriptors / RESERVE_SHARE).max(MIN_RESERVE)
}

/// Where readings come from.
pub trait Readings: Send + 'static {
    /// Bytes of resident memory.
    fn resident_bytes(&mut self) -> io::Result<u64>;
    /// Open descriptors.
    fn descriptors(&mut self) -> io::Result<u64>;
}

/// The kernel's.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProcReadings;

impl Readings for ProcReadings {
    fn resident_bytes(&mut self) -> io::Result<u64> {
        let status = fs::read_to_string("/proc/self/status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kibibytes.map(|kibibytes| kibibytes * 1024).ok_or_else(|| io::Error::other("no VmRSS"))
    }

    fn descriptors(&mut self) -> io::Result<u64> {
        // Their number since Linux 6.2; before, the directory has to be counted.
        match fs::metadata("/proc/self/fd")?.len() {
            0 => Ok(fs::read_dir("/proc/self/fd")?.count() as u64),
            open => Ok(open),
        }
    }
}

/// Whether there is too much to do. Cheap to ask.
#[derive(Debug)]
pub struct Overload {
    shedding: AtomicBool,
    scarce: watch::Sender<bool>,
    /// One permit a connection that is to end.
    relief: Semaphore,
    shed: Counter,
    relieved: Counter,
    resident: Gauge<u64, AtomicU64>,
    open: Gauge<u64, AtomicU64>,
}

impl Default for Overload {
    fn default() -> Self {
        Self {
            shedding: AtomicBool::new(false),
            scarce: watch::Sender::new(false),
            relief: Semaphore::new(0),
            shed: Counter::default(),
            relieved: Counter::default(),
            resident: Gauge::default(),
            open: Gauge::default(),
        }
    }
}

impl Overload {
    /// Whether a new request is to be refused (503, `Retry-After`). True is counted as a refusal.
    pub fn shed(&self) -> bool {
        let shed = self.shedding.load(Ordering::Relaxed);
        if shed {
            self.shed.inc();
        }
        shed
    }

    /// Completes when there are descriptors for another connection.
    pub async fn room(&self) {
        if *self.scarce.borrow() {
            let mut scarce = self.scarce.subscribe();
            // The sender is ours, so that waiting ends when scarcity does.
            let _gone = scarce.wait_for(|scarce| !*scarce).await.is_err();
        }
    }

    /// Completes for some of those that wait, the longest-waiting first, while descriptors are scarce: the
    /// connection is to end after its current request.
    pub async fn relief(&self) {
        match self.relief.acquire().await {
            Ok(permit) => permit.forget(),
            // It is never closed; if it were, nobody would have to end for it.
            Err(_) => std::future::pending().await,
        }
        self.relieved.inc();
    }

    /// Adds what is known here to the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("shed_requests", "Requests refused for want of memory", self.shed.clone());
        registry.register(
            "relieved_connections",
            "Connections ended for want of descriptors",
            self.relieved.clone(),
        );
        registry.register("resident_bytes", "Resident memory", self.resident.clone());
        registry.register("open_descriptors", "Open file descriptors", self.open.clone());
    }

    fn see_memory(&self, line: &mut Line, resident: u64) {
        self.resident.set(resident);
        let shedding = line.observe(resident);
        if self.shedding.swap(shedding, Ordering::Relaxed) != shedding {
            let (budget, line) = (line.budget, line.at);
            if shedding {
                tracing::warn!(resident, budget, line, "too much memory in use; new requests are refused");
            } else {
                tracing::info!(resident, budget, line, "requests are taken again");
            }
        }
    }

    fn see_descriptors(&self, limit: u64, open: u64) {
        self.open.set(open);
        let was = *self.scarce.borrow();
        let kept = if was { 2 * reserve(limit) } else { reserve(limit) };
        let scarce = open > limit.saturating_sub(kept);
        if was != scarce {
            self.scarce.send_replace(scarce);
            if scarce {
                tracing::warn!(open, limit, "descriptors are scarce; no connection is accepted");
            } else {
                tracing::info!(open, limit, "connections are accepted again");
            }
        }
        // What nobody waited for is not for connections to come.
        self.relief.forget_permits(self.relief.available_permits());
        if scarce {
            self.relief.add_permits(RELIEVED_AT_ONCE);
        }
    }
}

/// Reads until the scope drains, as a critical task of it.
pub fn watch(
    overload: Arc<Overload>,
    budget: Budget,
    mut readings: impl Readings,
    clock: SharedClock,
    scope: &Scope,
) {
    let draining = scope.clone();
    scope.spawn_critical("overload watch", async move {
        let mut line = budget.memory_bytes.map(Line::new);
        loop {
            match readings.resident_bytes() {
                Ok(resident) => match &mut line {
                    Some(line) => overload.see_memory(line, resident),
                    None => {
                        overload.resident.set(resident);
                    }
                },
                Err(error) => tracing::debug!(%error, "memory cannot be read"),
            }
            match readings.descriptors() {
                Ok(open) => overload.see_descriptors(budget.descriptors.unwrap_or(u64::MAX), open),
                Err(error) => tracing::debug!(%error, "descriptors cannot be counted"),
            }
            tokio::select! {
                () = clock.sleep(INTERVAL) => {}
                () = draining.draining() => return,
            }
        }
    });
}

/// The line over which memory is too much.
#[derive(Debug)]
struct Line {
    budget: u64,
    at: u64,
    /// Readings since requests are refused.
    over: Option<u32>,
}

impl Line {
    fn new(budget: u64) -> Self {
        Self { budget, at: budget, over: None }
    }

    /// Whether requests are to be refused after this reading.
    fn observe(&mut self, resident: u64) -> bool {
        let below = |line: u64| resident < line.saturating_sub(self.budget / HYSTERESIS_SHARE);
        self.over = match self.over {
            None if resident > self.at => Some(0),
            None => None,
            Some(_) if below(self.at) => None,
            Some(readings) if readings < PLATEAU_READINGS => Some(readings + 1),
            Some(_) => {
                let ceiling = self.budget.saturating_add(self.budget / CEILING_SHARE);
                self.at = resident.saturating_add(self.budget / STEP_SHARE).min(ceiling).max(self.at);
                if below(self.at) { None } else { Some(0) }
            }
        };
        if self.over.is_none() && below(self.budget) {
            self.at = self.budget;
        }
        self.over.is_some()
    }
}

/// The memory limit of the control group that this process is in, version 1 or 2, the smallest of its
/// ancestors' included; `root` is `/`.
pub fn memory_limit_bytes(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let mount = root.join(mount);
        let group = mount.join(path.trim_start_matches('/'));
        // In a container the path may be the host's, and the mount the group's own.
        let ancestors = group.ancestors().take_while(|at| at.starts_with(&mount)).map(|at| at.join(file));
        ancestors.filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok()).min()
    });
    // Version 1 says "none" by a number that no machine has.
    limits.min().filter(|limit| *limit < NO_LIMIT_BYTES)
}

const NO_LIMIT_BYTES: u64 = 1 << 60;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use identity::clock::ManualClock;

    use super::*;

    const MIB: u64 = 1024 * 1024;
    const BUDGET: u64 = 64 * MIB;

    #[test]
    fn requests_are_refused_over_the_budget_and_taken_again_well_below_it() {
        let mut line = Line::new(BUDGET);
        assert!(!line.observe(BUDGET));
        assert!(line.observe(BUDGET + 1));
        assert!(line.observe(BUDGET - MIB), "not yet well below");
        assert!(!line.observe(BUDGET - 3 * MIB));
        assert!(!line.observe(BUDGET));
    }

    #[test]
    fn memory_that_shedding_does_not_free_is_not_load_up_to_the_ceiling() {
        let mut line = Line::new(BUDGET);
        let kept = BUDGET + MIB;
        let refused = (0..1000).take_while(|_| line.observe(kept)).count();
        assert_eq!(refused as u32, PLATEAU_READINGS + 1);
        assert!((0..1000).all(|_| !line.observe(kept)), "it is served with what the allocator keeps");
        assert!(line.observe(kept + 5 * MIB), "and more than that is load again");
        // The ceiling is an eighth over: there it is refused for as long as it lasts.
        let ceiling = BUDGET + 8 * MIB;
        assert!((0..1000).all(|_| line.observe(ceiling)));
        assert!(!line.observe(BUDGET - 8 * MIB));
        assert!(line.observe(BUDGET + 1), "the line is where it was");
    }

    /// Readings that a test sets.
    #[derive(Clone)]
    struct Set(Arc<Mutex<(u64, u64)>>);

    impl Readings for Set {
        fn resident_bytes(&mut self) -> io::Result<u64> {
            Ok(self.0.lock().unwrap().0)
        }

        fn descriptors(&mut self) -> io::Result<u64> {
            Ok(self.0.lock().unwrap().1)
        }
    }

    struct Rig {
        overload: Arc<Overload>,
        readings: Set,
        clock: Arc<ManualClock>,
        scope: Scope,
    }

    impl Rig {
        fn start() -> Self {
            let readings = Set(Arc::new(Mutex::new((MIB, 10))));
            let (overload, scope) = (Arc::new(Overload::default()), Scope::new());
            let clock = ManualClock::at(Duration::from_secs(1));
            let budget = Budget { memory_bytes: Some(BUDGET), descriptors: Some(1024) };
            watch(Arc::clone(&overload), budget, readings.clone(), Arc::clone(&clock) as SharedClock, &scope);
            Self { overload, readings, clock, scope }
        }

        async fn reads(&self, resident: u64, open: u64) {
            *self.readings.0.lock().unwrap() = (resident, open);
            for _ in 0..2 {
                settle().await;
                self.clock.advance(INTERVAL);
            }
            settle().await;
        }

        fn metrics(&self) -> String {
            let mut registry = Registry::default();
            self.overload.register(&mut registry);
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        }
    }

    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_is_read_decides_and_is_counted() {
        let rig = Rig::start();
        rig.reads(MIB, 10).await;
        assert!(!rig.overload.shed());
        rig.reads(BUDGET + MIB, 10).await;
        assert!(rig.overload.shed() && rig.overload.shed());
        rig.reads(BUDGET / 2, 10).await;
        assert!(!rig.overload.shed());
        let metrics = rig.metrics();
        for line in ["shed_requests_total 2", "resident_bytes 33554432", "open_descriptors 10"] {
            assert!(metrics.contains(line), "{line} is missing in:\n{metrics}");
        }
        rig.scope.drain();
        assert_eq!(rig.scope.finished(Duration::from_secs(5)).await, Ok(()));
    }

    #[tokio::test]
    async fn scarce_descriptors_stop_accepting_and_end_those_who_wait_longest() {
        let rig = Rig::start();
        rig.reads(MIB, 10).await;
        rig.overload.room().await;
        let ended = Arc::new(Mutex::new(Vec::new()));
        for number in 0..RELIEVED_AT_ONCE * 4 {
            let (overload, ended) = (Arc::clone(&rig.overload), Arc::clone(&ended));
            rig.scope.spawn("connection", async move {
                overload.relief().await;
                ended.lock().unwrap().push(number);
            });
        }
        settle().await;
        assert!(ended.lock().unwrap().is_empty());
        rig.reads(MIB, 1024 - reserve(1024) + 1).await;
        let first = ended.lock().unwrap().clone();
        assert!(first.len() >= RELIEVED_AT_ONCE && first.len() < RELIEVED_AT_ONCE * 4, "{}", first.len());
        assert!(first.iter().copied().eq(0..first.len()), "{first:?}");

        let overload = Arc::clone(&rig.overload);
        let mut room = Box::pin(overload.room());
        assert!(futures::FutureExt::now_or_never(&mut room).is_none());
        // Free again only with twice the reserve.
        rig.reads(MIB, 1024 - reserve(1024)).await;
        assert!(futures::FutureExt::now_or_never(&mut room).is_none());
        rig.reads(MIB, 100).await;
        room.await;
        // What was notified while nobody waited does not end connections to come.
        let late = futures::FutureExt::now_or_never(rig.overload.relief());
        assert!(late.is_none());
    }

    #[test]
    fn connections_leave_descriptors_for_where_their_requests_go() {
        let connections = |descriptors| Budget { memory_bytes: None, descriptors }.connections(10_000);
        assert_eq!(connections(None), 10_000);
        assert_eq!(connections(Some(1024)), 480);
        assert_eq!(connections(Some(1_048_576)), 10_000);
        assert_eq!(connections(Some(8)), 1);
    }

    #[test]
    fn the_kernels_readings_are_there() {
        assert!(ProcReadings.resident_bytes().unwrap() > MIB);
        let before = ProcReadings.descriptors().unwrap();
        let _open: Vec<_> = (0..10).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        assert!(ProcReadings.descriptors().unwrap() >= before.max(10));
    }

    #[test]
    fn the_memory_limit_is_the_smallest_of_the_groups_above() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(memory_limit_bytes(root.path()), None);
        write("proc/self/cgroup", "0::/system.slice/orders.service\n");
        write("sys/fs/cgroup/system.slice/orders.service/memory.max", "max\n");
        assert_eq!(memory_limit_bytes(root.path()), None);
        write("sys/fs/cgroup/system.slice/memory.max", "268435456\n");
        assert_eq!(memory_limit_bytes(root.path()), Some(268_435_456));
        write("sys/fs/cgroup/system.slice/orders.service/memory.max", "67108864\n");
        assert_eq!(memory_limit_bytes(root.path()), Some(67_108_864));

        write("proc/self/cgroup", "12:cpu,cpuacct:/x\n5:memory:/docker/abc\n0::/\n");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(memory_limit_bytes(root.path()), None);
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "1048576\n");
        assert_eq!(memory_limit_bytes(root.path()), Some(1_048_576));
    }
}
