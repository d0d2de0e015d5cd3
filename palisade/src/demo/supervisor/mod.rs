//! A supervisor of processes: starts them in the order of their needs, restarts those that die, and
//! ends them in the reverse order.
//!
//! It knows nothing of a mesh. It runs on one thread, the process's main one: the kernel ends a
//! supervised child when the *thread* that started it ends (see [`crate::supervised`]).

mod child;
mod log;
mod probe;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use identity::Scope;
use identity::clock::SharedClock;
use thiserror::Error;
use tokio::sync::{mpsc, watch};

pub(crate) use probe::Probe;

/// Events not read yet, after which more are dropped: they only tell a person what the status says too.
const MAX_EVENTS_WAITING: usize = 1024;

/// Longest that all processes together may take to end, whatever each one's own bound: then they are killed.
const STOP_WITHIN: Duration = Duration::from_secs(60);

/// Most deaths before a process was ready for the first time: then the start as a whole has failed.
/// Later deaths are never too many.
const MAX_DEATHS_AT_START: u32 = 3;

/// A process to be kept running.
#[derive(Debug, Clone)]
pub(crate) struct ChildSpec {
    /// Its name in logs, status and in others' `after`.
    pub(crate) role: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// All of its environment but for a few harmless variables of ours.
    pub(crate) env: Vec<(OsString, OsString)>,
    /// Roles and gates that must be ready before it is started for the first time.
    pub(crate) after: Vec<String>,
    /// How it is seen to be ready.
    pub(crate) ready: Probe,
    /// How long it may take to become ready.
    pub(crate) ready_within: Duration,
    /// How long it may take to end when it is asked to; then it is killed.
    pub(crate) stop_within: Duration,
    /// Whether it is a `palisade`, which is told by whom it is supervised and ends with us however we end.
    pub(crate) palisade: bool,
}

/// What happened, for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// It is being started, for the first time or again.
    Starting { role: String },
    /// It is ready.
    Ready { role: String, after: Duration },
    /// It has not become ready in its time, and is waited for on.
    Late { role: String, tail: String },
    /// It ended without having been asked to.
    Died { role: String, how: String, tail: String, again_in: Duration },
    /// Its log could not be written; it runs on.
    LogLost { role: String, why: String },
}

/// How one process is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ChildStatus {
    pub(crate) pid: Option<u32>,
    pub(crate) ready: bool,
    /// It has ended and will not be started again.
    pub(crate) gone: bool,
    /// How often it has died.
    pub(crate) deaths: u32,
}

/// How everything is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Status {
    pub(crate) children: BTreeMap<String, ChildStatus>,
    open_gates: BTreeSet<String>,
    failure: Option<StartError>,
}

impl Status {
    /// Process ids by role.
    pub(crate) fn pids(&self) -> BTreeMap<String, u32> {
        self.children.iter().filter_map(|(role, child)| Some((role.clone(), child.pid?))).collect()
    }

    fn is_ready(&self, name: &str) -> bool {
        self.open_gates.contains(name) || self.children.get(name).is_some_and(|child| child.ready)
    }

    fn is_gone(&self, role: &str) -> bool {
        self.children.get(role).is_none_or(|child| child.gone)
    }
}

/// Why a set of processes could not be brought up.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub(crate) enum StartError {
    /// Two processes under one name.
    #[error("two processes are called {0}")]
    Twice(String),
    /// A process waits for something that is not there.
    #[error("{role} waits for {missing}, which is neither a process nor a gate")]
    Unknown { role: String, missing: String },
    /// Processes wait for each other.
    #[error("these processes wait for each other: {}", .0.join(", "))]
    Circle(Vec<String>),
    /// It said that it cannot work.
    #[error("{role} ended with {how}")]
    Died { role: String, how: String, tail: String, log: PathBuf },
    /// It did not become ready.
    #[error("{role} was not ready within {} s: {unready}", within.as_secs())]
    Late { role: String, within: Duration, unready: String, tail: String, log: PathBuf },
    /// It could not be started at all.
    #[error("{role} cannot be started from {}: {why}", program.display())]
    Spawn { role: String, program: PathBuf, why: String },
    /// The supervisor was asked to end first.
    #[error("it was asked to end")]
    Stopped,
}

impl From<StartError> for crate::failure::Failure {
    fn from(error: StartError) -> Self {
        let failure = Self::new("not everything could be started").because(&error);
        match &error {
            StartError::Died { tail, log, .. } | StartError::Late { tail, log, .. } => {
                let last = tail.lines().map(|line| format!("\n    {line}")).collect::<String>();
                failure.hint(format!("its last lines:{last}")).next(format!("less {}", log.display()))
            }
            _ => failure,
        }
    }
}

/// The running processes. Dropping it kills them; [`Supervisor::stop`] ends them in order.
#[derive(Debug)]
pub(crate) struct Supervisor {
    scope: Scope,
    shared: Arc<Shared>,
}

/// What the processes' tasks have in common.
#[derive(Debug)]
struct Shared {
    status: watch::Sender<Status>,
    /// True once there is no more time to end in order.
    kill: watch::Sender<bool>,
    events: mpsc::Sender<Event>,
    clock: SharedClock,
    logs: PathBuf,
}

impl Supervisor {
    /// Starts everything, each as soon as what it waits for is ready. `gates` are further names to
    /// wait for, which [`Supervisor::open`] opens. Logs go to `logs/ROLE.log`.
    pub(crate) fn start(
        specs: Vec<ChildSpec>,
        gates: &[&str],
        logs: &Path,
        clock: SharedClock,
    ) -> Result<(Self, mpsc::Receiver<Event>), StartError> {
        check_order(&specs, gates)?;
        let children = specs.iter().map(|spec| (spec.role.clone(), ChildStatus::default())).collect();
        let (events, received) = mpsc::channel(MAX_EVENTS_WAITING);
        let shared = Arc::new(Shared {
            status: watch::Sender::new(Status { children, ..Status::default() }),
            kill: watch::Sender::new(false),
            events,
            clock,
            logs: logs.to_owned(),
        });
        let scope = Scope::new();
        for spec in &specs {
            let waiting_for_it: Vec<String> = specs
                .iter()
                .filter(|other| other.after.contains(&spec.role))
                .map(|other| other.role.clone())
                .collect();
            let life = child::live(spec.clone(), waiting_for_it, Arc::clone(&shared), scope.clone());
            scope.spawn("supervised process", life);
        }
        Ok((Self { scope, shared }, received))
    }

    /// Opens a gate, for whoever waits for it.
    pub(crate) fn open(&self, gate: &str) {
        self.shared.status.send_modify(|status| {
            status.open_gates.insert(gate.to_owned());
        });
    }

    /// The status, and word of every change.
    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// Waits until `role` is ready for the first time.
    pub(crate) async fn ready(&self, role: &str) -> Result<(), StartError> {
        self.until(|status| status.is_ready(role)).await
    }

    /// Waits until all are ready at once.
    pub(crate) async fn all_ready(&self) -> Result<(), StartError> {
        self.until(|status| status.children.values().all(|child| child.ready)).await
    }

    async fn until(&self, reached: impl Fn(&Status) -> bool) -> Result<(), StartError> {
        let mut status = self.shared.status.subscribe();
        let settled = |status: &Status| reached(status) || status.failure.is_some();
        tokio::select! {
            status = status.wait_for(settled) => match status.map(|status| status.failure.clone()) {
                Ok(None) => Ok(()),
                Ok(Some(failure)) => Err(failure),
                // The sender lives in `self`.
                Err(_closed) => Err(StartError::Stopped),
            },
            () = self.scope.draining() => Err(StartError::Stopped),
        }
    }

    /// Ends everything: each is asked to end once nobody that waited for it is left, and killed if it
    /// does not within its time.
    pub(crate) async fn stop(&self) {
        self.scope.drain();
        let all = self.scope.finished(STOP_WITHIN);
        // Only a critical task can fail a scope, and none here is.
        let _none = all.await.is_err();
        self.kill();
        let mut status = self.shared.status.subscribe();
        // After SIGKILL nothing is left to wait for but the kernel.
        let _closed =
            status.wait_for(|status| status.children.values().all(|child| child.gone)).await.is_err();
    }

    /// Kills everything now; [`Supervisor::stop`] then returns soon.
    pub(crate) fn kill(&self) {
        self.shared.kill.send_replace(true);
    }
}

impl Shared {
    fn update(&self, role: &str, change: impl FnOnce(&mut ChildStatus)) {
        self.status.send_modify(|status| {
            if let Some(child) = status.children.get_mut(role) {
                change(child);
            }
        });
    }

    fn tell(&self, event: Event) {
        if let Err(lost) = self.events.try_send(event) {
            tracing::debug!(%lost, "nobody reads the supervisor's events");
        }
    }

    fn fail(&self, failure: StartError) {
        self.status.send_modify(|status| {
            // The first failure is the cause, later ones are its consequences.
            status.failure.get_or_insert(failure);
        });
    }

    fn log_path(&self, role: &str) -> PathBuf {
        self.logs.join(format!("{role}.log"))
    }
}

/// Refuses names that clash or are missing, and circles, before anything is started.
fn check_order(specs: &[ChildSpec], gates: &[&str]) -> Result<(), StartError> {
    let mut left: BTreeMap<&str, &[String]> = BTreeMap::new();
    for spec in specs {
        if left.insert(&spec.role, &spec.after).is_some() || gates.contains(&spec.role.as_str()) {
            return Err(StartError::Twice(spec.role.clone()));
        }
    }
    for spec in specs {
        let known = |name: &&String| !left.contains_key(name.as_str()) && !gates.contains(&name.as_str());
        if let Some(missing) = spec.after.iter().find(known) {
            return Err(StartError::Unknown { role: spec.role.clone(), missing: missing.clone() });
        }
    }
    loop {
        let free: Vec<&str> = left
            .iter()
            .filter(|(_, after)| !after.iter().any(|name| left.contains_key(name.as_str())))
            .map(|(role, _)| *role)
            .collect();
        if free.is_empty() {
            break;
        }
        for role in free {
            left.remove(role);
        }
    }
    if left.is_empty() {
        return Ok(());
    }
    Err(StartError::Circle(left.keys().map(ToString::to_string).collect()))
}

#[cfg(test)]
mod tests;
