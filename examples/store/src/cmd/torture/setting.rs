//! What nodes stand on: addresses, a network, disks and clocks, as far as the faults asked for need them.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use rustix::process::geteuid;

use super::{
    Args,
    admin::Admin,
    cluster::{Cluster, Place},
    disk::SmallDisk,
    nemesis::{Fault, Targets},
    network::Network,
    random::Random,
    skew::{WrongClock, library},
};

/// Where each node listens in its own network.
const PORT: u16 = 7000;

/// All that is there before the nodes are.
#[derive(Debug)]
pub(crate) struct Setting {
    faults: Vec<Fault>,
    nodes: Vec<u64>,
    /// Nodes from here on only join.
    first: u64,
    addresses: Vec<SocketAddr>,
    network: Option<Network>,
    clocks: Vec<WrongClock>,
    skew: Duration,
    disk: Option<(u64, SmallDisk)>,
    state: State,
}

/// A directory, which may be there for this run only.
#[derive(Debug)]
pub(crate) enum State {
    /// Somebody's own.
    Given(PathBuf),
    /// Gone with this.
    Temporary(tempfile::TempDir),
}

impl State {
    /// What is in it is to be looked at: it stays.
    pub(crate) fn keep(self) -> PathBuf {
        match self {
            Self::Given(path) => path,
            Self::Temporary(directory) => directory.keep(),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Temporary(directory) => directory.path(),
        }
    }
}

impl Setting {
    /// Makes what the faults need, and says which of them cannot be.
    ///
    /// # Errors
    ///
    /// When something cannot be made that should be possible here.
    pub(crate) fn prepare(args: &Args) -> anyhow::Result<Self> {
        let faults = possible(&args.faults);
        let spare = u64::from(faults.contains(&Fault::Move));
        let nodes: Vec<_> = (1..=args.nodes + spare).collect();
        let state = state(args.state.as_deref())?;
        let network = faults.contains(&Fault::Partition).then(|| Network::create(&nodes)).transpose()?;
        let addresses = addresses(&nodes, network.as_ref())?;
        let disk = faults.contains(&Fault::Disk).then(|| small_disk(args, state.path())).transpose()?;
        let clocks = if faults.contains(&Fault::Clock) { clocks(&nodes, state.path())? } else { Vec::new() };
        let skew = args.skew.bound(args.epsilon);
        Ok(Self { faults, nodes, first: args.nodes, addresses, network, clocks, skew, disk, state })
    }

    /// The nodes that are to be.
    pub(crate) fn places(&self) -> Vec<Place> {
        let place = |(index, (id, address)): (usize, (&u64, &SocketAddr))| Place {
            id: *id,
            address: *address,
            namespace: self.network.as_ref().and_then(|network| network.namespace(*id)).map(str::to_owned),
            state: directory(self.state.path(), *id),
            environment: self.clocks.get(index).map(WrongClock::environment).unwrap_or_default(),
            first: *id <= self.first,
        };
        self.nodes.iter().zip(&self.addresses).enumerate().map(place).collect()
    }

    /// Everything for whoever spoils it, the faults that can be, and the directory.
    pub(crate) fn into_targets(self, cluster: Arc<Cluster>, admin: Admin) -> (Vec<Fault>, Targets, State) {
        let Self { faults, network, clocks, skew, disk, state, .. } = self;
        (faults, Targets { cluster, network, clocks, skew, disk, admin }, state)
    }
}

/// Faults that can be brought about here. The others are said, with what they need.
fn possible(asked: &[Fault]) -> Vec<Fault> {
    let root = geteuid().is_root();
    let needs = |fault: Fault| match fault {
        Fault::Partition if !root => Some("network namespaces, which only root makes"),
        Fault::Disk if !root => Some("a filesystem of its own, which only root mounts"),
        Fault::Clock if library().is_none() => Some("libfaketime: apt-get install libfaketime"),
        _ => None,
    };
    let mut faults = Vec::new();
    for fault in asked {
        match needs(*fault) {
            Some(need) => eprintln!("{fault} is left out: it needs {need}"),
            None if faults.contains(fault) => {}
            None => faults.push(*fault),
        }
    }
    faults
}

fn state(given: Option<&Path>) -> anyhow::Result<State> {
    match given {
        Some(path) => {
            std::fs::create_dir_all(path).with_context(|| format!("{} cannot be made", path.display()))?;
            Ok(State::Given(path.to_owned()))
        }
        None => Ok(State::Temporary(tempfile::tempdir().context("no temporary directory")?)),
    }
}

fn addresses(nodes: &[u64], network: Option<&Network>) -> anyhow::Result<Vec<SocketAddr>> {
    let Some(network) = network else { return crate::cmd::free_addresses(nodes.len()) };
    let address = |node: &u64| network.address(*node).map(|address| SocketAddr::new(address, PORT));
    nodes.iter().map(address).collect::<Option<_>>().context("a node without an address")
}

fn small_disk(args: &Args, state: &Path) -> anyhow::Result<(u64, SmallDisk)> {
    let node = 1 + Random::new(args.seed, 30).below(args.nodes);
    Ok((node, SmallDisk::create(&directory(state, node))?))
}

fn clocks(nodes: &[u64], state: &Path) -> anyhow::Result<Vec<WrongClock>> {
    let library = library().context("libfaketime is gone")?;
    let clock = |node: &u64| WrongClock::create(state.join(format!("node-{node}.clock")), library.clone());
    nodes.iter().map(clock).collect()
}

fn directory(state: &Path, node: u64) -> PathBuf {
    state.join(format!("node-{node}"))
}
