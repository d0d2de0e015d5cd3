//! Nodes as processes of their own, to be killed, stopped and started again.

use std::{
    fs::{File, OpenOptions},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, anyhow};
use rustix::process::{Pid, Signal, kill_process};

/// So many bytes from the end of a node's log are shown when it dies.
const LOG_SHOWN_BYTES: usize = 2000;

/// A node that is to be.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Its number.
    pub(crate) id: u64,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// The network namespace that it lives in, or the machine's own.
    pub(crate) namespace: Option<String>,
    /// Its directory.
    pub(crate) state: PathBuf,
    /// What its process finds in the environment.
    pub(crate) environment: Vec<(String, String)>,
    /// Whether it is in the first split, or only joins.
    pub(crate) first: bool,
}

/// What a node's process is doing, as far as its cluster made it do so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    /// It runs.
    Running,
    /// It was killed, and not started since.
    Killed,
    /// It stands still.
    Stopped,
    /// It went by itself.
    Died,
}

#[derive(Debug)]
struct Node {
    place: Place,
    log: PathBuf,
    child: Option<Child>,
    doing: Doing,
}

/// Nodes that end with this.
#[derive(Debug)]
pub(crate) struct Cluster {
    program: PathBuf,
    epsilon: Duration,
    /// Whether nodes that were not there at first are.
    joined: AtomicBool,
    nodes: Vec<Mutex<Node>>,
}

/// A node that ended by itself.
#[derive(Clone, Debug)]
pub(crate) struct Death {
    /// Which.
    pub(crate) node: u64,
    /// How, and what it said last.
    pub(crate) why: String,
}

impl Cluster {
    /// Nodes at `places`, none of which runs yet. What they say goes to a file beside each one's directory.
    ///
    /// # Errors
    ///
    /// When it is not known which program this is.
    pub(crate) fn new(places: Vec<Place>, epsilon: Duration) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("which program this is")?;
        let node = |place: Place| {
            let log = place.state.with_extension("log");
            Mutex::new(Node { place, log, child: None, doing: Doing::Killed })
        };
        let nodes = places.into_iter().map(node).collect();
        Ok(Self { program, epsilon, joined: AtomicBool::new(false), nodes })
    }

    /// Starts those that are there at first.
    ///
    /// # Errors
    ///
    /// When one cannot be started.
    pub(crate) fn start_first(&self) -> anyhow::Result<()> {
        let first = self.places().into_iter().filter(|place| place.first);
        first.map(|place| place.id).try_for_each(|id| self.start(id))
    }

    /// Starts the others, once those that are there know each other: they hear of the others as they start again.
    ///
    /// # Errors
    ///
    /// When one cannot be started.
    pub(crate) fn start_others(&self) -> anyhow::Result<()> {
        self.joined.store(true, Ordering::Relaxed);
        for place in self.places() {
            if place.first {
                self.kill(place.id)?;
            }
            self.start(place.id)?;
        }
        Ok(())
    }

    /// Whether some are not there at first.
    pub(crate) fn has_others(&self) -> bool {
        self.places().iter().any(|place| !place.first)
    }

    fn places(&self) -> Vec<Place> {
        self.nodes.iter().map(|node| lock(node).place.clone()).collect()
    }

    /// The nodes that each is told of.
    fn members(&self) -> String {
        let joined = self.joined.load(Ordering::Relaxed);
        let told = self.places().into_iter().filter(|place| place.first || joined);
        told.map(|place| format!("{}={}", place.id, place.address)).collect::<Vec<_>>().join(",")
    }

    /// Starts a node that does not run.
    ///
    /// # Errors
    ///
    /// When its process cannot be started.
    pub(crate) fn start(&self, id: u64) -> anyhow::Result<()> {
        let members = self.members();
        let mut node = self.node(id)?;
        if node.child.is_some() {
            return Ok(());
        }
        let child =
            self.command(&node, &members)?.spawn().with_context(|| format!("node {id} cannot be started"))?;
        node.child = Some(child);
        node.doing = Doing::Running;
        Ok(())
    }

    fn command(&self, node: &Node, members: &str) -> anyhow::Result<Command> {
        let place = &node.place;
        let mut command = match &place.namespace {
            None => Command::new(&self.program),
            Some(namespace) => {
                let mut inside = Command::new("ip");
                inside.args(["netns", "exec", namespace]).arg(&self.program);
                inside
            }
        };
        command
            .arg("node")
            .args(["--id", &place.id.to_string(), "--nodes", members])
            .args(["--listen", &place.address.to_string()])
            .args(["--epsilon", &format!("{}us", self.epsilon.as_micros())])
            .args(["--supervised-by", &std::process::id().to_string()])
            .arg("--state")
            .arg(&place.state)
            .env("NO_COLOR", "1")
            .envs(place.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(append_to(&node.log)?)
            .stderr(append_to(&node.log)?);
        Ok(command)
    }

    /// Kills a node at once, and waits until it is gone.
    ///
    /// # Errors
    ///
    /// When it cannot be.
    pub(crate) fn kill(&self, id: u64) -> anyhow::Result<()> {
        let mut node = self.node(id)?;
        node.doing = Doing::Killed;
        if let Some(mut child) = node.child.take() {
            child
                .kill()
                .and_then(|()| child.wait())
                .with_context(|| format!("node {id} cannot be killed"))?;
        }
        Ok(())
    }

    /// Makes a node stand still.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub(crate) fn stop(&self, id: u64) -> anyhow::Result<()> {
        self.signal(id, Signal::STOP, Doing::Stopped)
    }

    /// Lets a node go on that stands still.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub(crate) fn go_on(&self, id: u64) -> anyhow::Result<()> {
        self.signal(id, Signal::CONT, Doing::Running)
    }

    fn signal(&self, id: u64, signal: Signal, doing: Doing) -> anyhow::Result<()> {
        let mut node = self.node(id)?;
        let pid = node.child.as_ref().and_then(|child| Pid::from_raw(child.id().cast_signed()));
        let pid = pid.ok_or_else(|| anyhow!("node {id} does not run"))?;
        kill_process(pid, signal).with_context(|| format!("node {id} does not take a signal"))?;
        node.doing = doing;
        Ok(())
    }

    /// Nodes that ended by themselves since this was asked last.
    pub(crate) fn deaths(&self) -> Vec<Death> {
        self.nodes.iter().filter_map(|node| death(&mut lock(node))).collect()
    }

    /// What a node is doing.
    pub(crate) fn doing(&self, id: u64) -> Doing {
        self.node(id).map_or(Doing::Killed, |node| node.doing)
    }

    /// Where what each says goes to.
    pub(crate) fn logs(&self) -> Vec<PathBuf> {
        self.nodes.iter().map(|node| lock(node).log.clone()).collect()
    }

    /// All numbers.
    pub(crate) fn ids(&self) -> Vec<u64> {
        self.places().into_iter().map(|place| place.id).collect()
    }

    /// Where each can be asked.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.places().into_iter().map(|place| place.address.to_string()).collect()
    }

    /// Where those can be asked that are there by now, dead or alive.
    pub(crate) fn present(&self) -> Vec<String> {
        let joined = self.joined.load(Ordering::Relaxed);
        let present = self.places().into_iter().filter(|place| place.first || joined);
        present.map(|place| place.address.to_string()).collect()
    }

    fn node(&self, id: u64) -> anyhow::Result<MutexGuard<'_, Node>> {
        let found = self.nodes.iter().map(lock).find(|node| node.place.id == id);
        found.ok_or_else(|| anyhow!("there is no node {id}"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for id in self.ids() {
            if let Err(error) = self.kill(id) {
                eprintln!("{error:#}");
            }
        }
    }
}

fn death(node: &mut Node) -> Option<Death> {
    let status = node.child.as_mut()?.try_wait().ok().flatten()?;
    node.child = None;
    node.doing = Doing::Died;
    let log = std::fs::read(&node.log).unwrap_or_default();
    let last = log.get(log.len().saturating_sub(LOG_SHOWN_BYTES)..).unwrap_or_default();
    let why = format!("{status}; it said last:\n{}", String::from_utf8_lossy(last).trim_end());
    Some(Death { node: node.place.id, why })
}

fn append_to(log: &Path) -> anyhow::Result<File> {
    let opened = OpenOptions::new().create(true).append(true).open(log);
    opened.with_context(|| format!("{} cannot be written", log.display()))
}

fn lock(node: &Mutex<Node>) -> MutexGuard<'_, Node> {
    node.lock().unwrap_or_else(PoisonError::into_inner)
}
