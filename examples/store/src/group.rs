//! Consensus: every split's log is one group of the `raft` crate, which does no I/O. One turn of a node's loop takes
//! what all of its groups have to write, syncs it once, and only then says and applies what rests on it.

use std::collections::BTreeMap;

use raft::{
    Config, RawNode, Ready, StateRole, Storage as _,
    eraftpb::{EntryType, Message, MessageType},
    storage::MemStorage,
};

use crate::{
    lease::NodeId,
    truetime::Interval,
    txn::{Applied, Entry, Leader, Replica, ReplicaError, SplitId},
    wal::{Disk, Wal, WalError},
    wire::{self, Record, WireError},
};

/// A heartbeat each so many ticks.
pub const HEARTBEAT_TICKS: usize = 2;
/// A follower that has heard nothing for so many ticks campaigns.
pub const ELECTION_TICKS: usize = 10;
/// Nodes campaign this many ticks apart instead of at random: they do not split votes, and a seed replays exactly.
const ELECTION_APART_TICKS: usize = 3;
/// Of entries in one message, so that a follower far behind does not hold up heartbeats.
const APPEND_BYTES_MAX: u64 = 1 << 20;
/// Appends on the way to one follower.
const APPENDS_IN_FLIGHT: usize = 256;

/// Why a node cannot go on with its groups.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The log on disk fails.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The log on disk, or a log that consensus agreed on, holds what is none of ours.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A split's log contradicts itself.
    #[error("split {0:?}")]
    Replica(SplitId, #[source] ReplicaError),
    /// Consensus says no.
    #[error("consensus of split {0:?}")]
    Raft(SplitId, #[source] raft::Error),
    /// The log on disk has a hole.
    #[error("the log of split {split:?} goes on at {found} after {last}; restore this node from the others")]
    Hole {
        /// Which split.
        split: SplitId,
        /// The last entry before it.
        last: u64,
        /// The first entry after it.
        found: u64,
    },
    /// Membership does not change yet.
    #[error("split {0:?} has a change of members in its log, which this version knows nothing of")]
    Members(SplitId),
}

/// Why a message or a proposal goes nowhere. The node goes on.
#[derive(Debug, thiserror::Error)]
pub enum Dropped {
    /// No such split here.
    #[error("this node has no split {0:?}")]
    Unknown(SplitId),
    /// No message of ours.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// From or to a node that is none of the split's.
    #[error("a message from {from} to {to} is none of this split's")]
    Stranger {
        /// Who says to have sent it.
        from: u64,
        /// Whom it is for.
        to: u64,
    },
    /// The others remember this node to have more than it has.
    #[error(
        "this node has acknowledged up to {acknowledged} and has up to {last}: its disk was replaced; join it anew"
    )]
    Forgot {
        /// What the others know.
        acknowledged: u64,
        /// What is here.
        last: u64,
    },
    /// Another node leads now.
    #[error("this node does not lead the split now")]
    NotLeading,
    /// Consensus says no.
    #[error("consensus refuses")]
    Raft(#[from] raft::Error),
}

/// What a turn has to be told to others.
#[derive(Debug, Default)]
pub struct Turn {
    /// To be sent, in order, to whom. What is lost is said again.
    pub messages: Vec<(SplitId, NodeId, Vec<u8>)>,
    /// What entries came to on this node.
    pub applied: Vec<(SplitId, Applied)>,
}

/// All splits of one node, on its one log.
pub struct Groups<D> {
    wal: Wal<D>,
    groups: BTreeMap<SplitId, Group>,
}

impl<D: Disk> Groups<D> {
    /// The node `me` as its log remembers it, with `splits` and the nodes of each.
    ///
    /// # Errors
    ///
    /// When the log cannot be used.
    pub fn open(me: NodeId, splits: &BTreeMap<SplitId, Vec<NodeId>>, disk: D) -> Result<Self, NodeError> {
        let (wal, records) = Wal::open(disk)?;
        let storages: BTreeMap<_, _> = splits
            .iter()
            .map(|(split, nodes)| {
                let voters: Vec<u64> = nodes.iter().map(|node| node.0).collect();
                (*split, MemStorage::new_with_conf_state((voters, vec![])))
            })
            .collect();
        for record in records {
            let record = wire::decode_record(&record)?;
            let split = SplitId(record.split);
            // A split that has left this node leaves its records behind.
            if let Some(storage) = storages.get(&split) {
                remember(split, storage, &record)?;
            }
        }
        let groups = storages.into_iter().map(|(split, storage)| {
            let nodes = splits.get(&split).cloned().unwrap_or_default();
            Ok((split, Group::new(split, me, nodes, storage)?))
        });
        Ok(Self { wal, groups: groups.collect::<Result<_, NodeError>>()? })
    }

    /// Time goes on: elections and heartbeats.
    pub fn tick(&mut self) {
        for group in self.groups.values_mut() {
            group.raft.tick();
        }
    }

    /// Takes a message of another node's.
    ///
    /// # Errors
    ///
    /// When it is of no use here.
    pub fn step(&mut self, split: SplitId, bytes: &[u8]) -> Result<(), Dropped> {
        let message = wire::decode_message(bytes)?;
        self.groups.get_mut(&split).ok_or(Dropped::Unknown(split))?.step(message)
    }

    /// Asks the logs of led splits for leases that are wanted.
    ///
    /// # Errors
    ///
    /// When consensus refuses, which it does to no leader.
    pub fn renew(&mut self, now: Interval) -> Result<(), Dropped> {
        self.groups.values_mut().try_for_each(|group| group.renew(now))
    }

    /// One turn: writes and syncs what all groups want remembered, applies what is agreed on.
    ///
    /// # Errors
    ///
    /// When the node must stop.
    pub fn turn(&mut self) -> Result<Turn, NodeError> {
        let mut turn = Turn::default();
        let mut readies = Vec::new();
        for (split, group) in &mut self.groups {
            group.follow_role();
            if group.raft.has_ready() {
                let mut ready = group.raft.ready();
                group.say(ready.take_messages(), &mut turn);
                let record = Record {
                    split: split.0,
                    hard_state: ready.hs().cloned(),
                    entries: ready.entries().clone(),
                };
                if record.hard_state.is_some() || !record.entries.is_empty() {
                    self.wal.gather(&wire::encode_record(&record))?;
                }
                readies.push((*split, ready, record));
            }
        }
        self.wal.commit()?;
        for (split, ready, record) in readies {
            if let Some(group) = self.groups.get_mut(&split) {
                group.persisted(ready, &record, &mut turn)?;
            }
        }
        Ok(turn)
    }

    /// One of the splits.
    pub fn get(&self, split: SplitId) -> Option<&Group> {
        self.groups.get(&split)
    }

    /// One of the splits, to lead it.
    pub fn get_mut(&mut self, split: SplitId) -> Option<&mut Group> {
        self.groups.get_mut(&split)
    }

    /// The disk, to be opened again.
    pub fn into_disk(self) -> D {
        self.wal.into_disk()
    }
}

/// This node's part of one split.
pub struct Group {
    split: SplitId,
    me: NodeId,
    nodes: Vec<NodeId>,
    raft: RawNode<MemStorage>,
    replica: Replica,
    leader: Option<Leader>,
    lease_asked: bool,
}

impl Group {
    fn new(split: SplitId, me: NodeId, nodes: Vec<NodeId>, storage: MemStorage) -> Result<Self, NodeError> {
        let place = nodes.iter().position(|node| *node == me).unwrap_or_default();
        let patience = ELECTION_TICKS + place * ELECTION_APART_TICKS;
        let config = Config {
            id: me.0,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            min_election_tick: patience,
            max_election_tick: patience + 1,
            check_quorum: true,
            pre_vote: true,
            max_size_per_msg: APPEND_BYTES_MAX,
            max_inflight_msgs: APPENDS_IN_FLIGHT,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raft = RawNode::new(&config, storage, &logger).map_err(|error| NodeError::Raft(split, error))?;
        Ok(Self { split, me, nodes, raft, replica: Replica::default(), leader: None, lease_asked: false })
    }

    /// What this node knows of the split.
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// The leader's part, while this node leads. What it makes is for [`Group::propose`], at once.
    pub fn leader(&mut self) -> Option<(&mut Leader, &Replica)> {
        self.follow_role();
        self.leader.as_mut().map(|leader| (leader, &self.replica))
    }

    /// Puts an entry of this leader's into the log. What comes of it, a later turn tells, here or at another node.
    ///
    /// # Errors
    ///
    /// When this node does not lead in the entry's term.
    pub fn propose(&mut self, entry: &Entry) -> Result<(), Dropped> {
        let leads = self.raft.raft.state == StateRole::Leader && self.raft.raft.term == entry.term;
        if !leads {
            return Err(Dropped::NotLeading);
        }
        Ok(self.raft.propose(Vec::new(), wire::encode_entry(entry))?)
    }

    /// How far this node has applied the log.
    pub fn applied(&self) -> u64 {
        self.raft.raft.raft_log.applied
    }

    fn step(&mut self, message: Message) -> Result<(), Dropped> {
        let known = self.nodes.contains(&NodeId(message.from)) && message.to == self.me.0;
        if !known {
            return Err(Dropped::Stranger { from: message.from, to: message.to });
        }
        let last = self.raft.raft.raft_log.last_index();
        if message.get_msg_type() == MessageType::MsgHeartbeat && message.commit > last {
            return Err(Dropped::Forgot { acknowledged: message.commit, last });
        }
        Ok(self.raft.step(message)?)
    }

    fn renew(&mut self, now: Interval) -> Result<(), Dropped> {
        self.follow_role();
        let Some(leader) = &self.leader else { return Ok(()) };
        if self.lease_asked || self.replica.term() != leader.term() {
            return Ok(());
        }
        let Some(grant) = self.replica.lease().wanted(leader.tenure(), now) else { return Ok(()) };
        let entry = leader.lease(grant);
        self.lease_asked = true;
        self.propose(&entry)
    }

    /// Locks and memory of a leader are of one term: another term begins with none.
    fn follow_role(&mut self) {
        let term = self.raft.raft.term;
        if self.raft.raft.state != StateRole::Leader {
            self.leader = None;
        } else if self.leader.as_ref().is_none_or(|leader| leader.term() != term) {
            self.leader = Some(Leader::new(self.me, term));
            self.lease_asked = false;
        }
    }

    fn persisted(&mut self, mut ready: Ready, record: &Record, turn: &mut Turn) -> Result<(), NodeError> {
        remember(self.split, self.raft.store(), record)?;
        self.say(ready.take_persisted_messages(), turn);
        self.apply(ready.take_committed_entries(), turn)?;
        let mut light = self.raft.advance(ready);
        if let Some(commit) = light.commit_index() {
            self.raft.store().wl().mut_hard_state().commit = commit;
        }
        self.say(light.take_messages(), turn);
        self.apply(light.take_committed_entries(), turn)?;
        self.raft.advance_apply();
        Ok(())
    }

    fn say(&self, messages: Vec<Message>, turn: &mut Turn) {
        turn.messages.extend(
            messages.iter().map(|message| (self.split, NodeId(message.to), wire::encode_message(message))),
        );
    }

    fn apply(&mut self, entries: Vec<raft::eraftpb::Entry>, turn: &mut Turn) -> Result<(), NodeError> {
        for entry in entries {
            if entry.get_entry_type() != EntryType::EntryNormal {
                return Err(NodeError::Members(self.split));
            }
            if entry.data.is_empty() {
                // Each leader logs an empty entry first: what stands before it is all that leaders before it logged.
                self.replica.begin_term(entry.term);
                if let Some(leader) = self.leader.as_mut().filter(|leader| leader.term() == entry.term) {
                    leader.inherit(&self.replica);
                }
                continue;
            }
            let command = wire::decode_entry(&entry.data)?;
            let applied = self.replica.apply(command, entry.term);
            let applied = applied.map_err(|error| NodeError::Replica(self.split, error))?;
            if let Some(leader) = &mut self.leader {
                leader.applied(&applied);
            }
            if matches!(applied, Applied::Lease(_)) {
                self.lease_asked = false;
            }
            turn.applied.push((self.split, applied));
        }
        Ok(())
    }
}

fn remember(split: SplitId, storage: &MemStorage, record: &Record) -> Result<(), NodeError> {
    let on = |error| NodeError::Raft(split, error);
    if let Some(first) = record.entries.first() {
        let last = storage.last_index().map_err(on)?;
        if first.index == 0 || first.index > last + 1 {
            return Err(NodeError::Hole { split, last, found: first.index });
        }
        storage.wl().append(&record.entries).map_err(on)?;
    }
    if let Some(hard_state) = &record.hard_state {
        storage.wl().set_hardstate(hard_state.clone());
    }
    Ok(())
}
