//! A node without I/O: what it does is a function of what it is asked, what it hears, and what time it is.

mod request;

use std::sync::Arc;

pub use request::{Answer, Found, Held, Moment, NodeStatus, Refused, Request, SplitView};

use crate::{engine::Engine, group::NodeError, lease::NodeId, truetime::Interval, wal::Disk};

/// What a node says to others. Implemented by what carries it: the network, or a simulation.
pub trait Outlet {
    /// A message for another node. May be lost; is said again if it matters.
    fn send(&mut self, to: NodeId, message: Vec<u8>);
    /// The answer to the request that came with `token`. Each request is answered once.
    fn answer(&mut self, token: u64, answer: Result<Answer, Refused>);
}

/// What a node must know to start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Itself.
    pub me: NodeId,
    /// Nodes of the first split, made when all of their disks are empty. Nothing for a node that joins a universe.
    pub first: Vec<NodeId>,
    /// All that is random comes from it.
    pub seed: u64,
}

/// A node.
pub struct Node<D> {
    disk: D,
}

impl<D: Disk> Node<D> {
    /// The node as its disk remembers it.
    ///
    /// # Errors
    ///
    /// When its log or its rows cannot be used.
    pub fn open(_config: Config, disk: D, _engine: Arc<dyn Engine>) -> Result<Self, NodeError> {
        Ok(Self { disk })
    }

    /// Takes a request, to be answered by a later [`Node::turn`].
    pub fn request(&mut self, _token: u64, _request: Request, _now: Interval) {}

    /// Takes a message of another node's.
    pub fn message(&mut self, _from: NodeId, _message: &[u8], _now: Interval) {}

    /// Time goes on: to be called every [`TICK`], unless the clock has no bound.
    pub fn tick(&mut self, _now: Interval) {}

    /// Does what can be done now: writes and syncs the log, sends, answers. To be called after any of the others, and
    /// at [`Node::wake`].
    ///
    /// # Errors
    ///
    /// When the node must stop.
    pub fn turn(&mut self, _now: &dyn Fn() -> Interval, _out: &mut dyn Outlet) -> Result<(), NodeError> {
        Ok(())
    }

    /// When `TT.earliest` is past this there is something to do.
    pub fn wake(&self) -> Option<crate::truetime::Timestamp> {
        None
    }

    /// The disk, to be opened again.
    pub fn into_disk(self) -> D {
        self.disk
    }
}

/// How often [`Node::tick`] is called.
pub const TICK: std::time::Duration = std::time::Duration::from_millis(10);
