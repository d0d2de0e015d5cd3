//! Consensus: every split's log is one group of the `raft` crate, which does no I/O. One turn of a node's loop takes
//! what all of its groups have to write, syncs it once, and only then says and applies what rests on it.
//!
//! On disk a group is its records in the node's log, and a checkpoint in the engine: where in the log the replica is
//! that the engine has. What stands before a checkpoint is dropped from the log.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::ControlFlow,
    sync::Arc,
};

use bytes::Bytes;
use raft::{
    Config, ProgressState, RawNode, Ready, SnapshotStatus, StateRole,
    eraftpb::{
        ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry as RaftEntry,
        EntryType, HardState, Message, MessageType,
    },
};

use crate::{
    engine::{Batch, Engine, EngineError},
    keys::Range,
    lease::{NUMBER_MASK, NodeId},
    mvcc::{Home, Mvcc},
    raft_log::{Hole, RaftLog},
    truetime::Interval,
    txn::{
        Applied, Command, Entry, FIRST_TERM, Leader, Replica, ReplicaError, SplitId, State, looks_at_rows,
    },
    wal::{Disk, Wal, WalError},
    wire::{self, Checkpoint, Image, Record, WireError},
};

/// A heartbeat each so many ticks.
pub const HEARTBEAT_TICKS: usize = 2;
/// A follower that has heard nothing for so many ticks campaigns.
pub const ELECTION_TICKS: usize = 10;
/// Nodes campaign this many ticks apart instead of at random: they do not split votes, and a seed replays exactly.
const ELECTION_APART_TICKS: usize = 3;
/// So many different patiences: more nodes than a split has.
const ELECTION_PLACES: u64 = 7;
/// Of entries in one message, so that a follower far behind does not hold up heartbeats.
const APPEND_BYTES_MAX: u64 = 1 << 20;
/// Appends on the way to one follower.
const APPENDS_IN_FLIGHT: usize = 256;
/// Of entries in one record of the log, unless one is larger.
const RECORD_BYTES: usize = 16 << 20;
/// The split that a universe begins with.
pub const FIRST_SPLIT: SplitId = SplitId(1);
/// Where the logs of splits begin: index and term of an entry that nobody has.
const FIRST_ENTRY: (u64, u64) = (1, 1);
/// A replica that waits for the one beside it so many ticks asks for a snapshot instead.
const STALL_TICKS: u32 = 200;
/// Whoever has heard nothing for so many ticks asks whether it still is one of the split's.
const UNHEARD_TICKS: usize = 20 * ELECTION_TICKS;
/// A snapshot of which nothing is heard for so many ticks is sent again.
const SNAPSHOT_TICKS: u32 = 300;

/// In the engine, what begins with this is where a split's replica is: split.
const CHECKPOINTS: u8 = b'c';
/// In the engine, splits that are gone from here: split; [`Gone`].
const GONE: u8 = b'g';
/// In the engine, the number of the form that all of a node's directory has.
const FORM: &[u8] = b"form";
/// The form that is written here, and the only one that is read. The first had no number.
const FORM_NUMBER: u64 = 2;

/// What is left of a node's replicas of a split.
#[derive(Clone, Copy, Debug)]
struct Gone {
    /// Up to this term messages about the split are of no use any more.
    term: u64,
    /// How many replicas there were: the number of the life that begins if another comes.
    lives: u64,
}

impl Gone {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (term, lives) = bytes.split_at_checked(8)?;
        Some(Self { term: read_u64(term)?, lives: read_u64(lives)? })
    }

    fn encode(self) -> Vec<u8> {
        [self.term.to_be_bytes(), self.lives.to_be_bytes()].concat()
    }
}

/// Why a node cannot go on with its groups.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The log on disk fails.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The rows on disk fail.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The log on disk, or a log that consensus agreed on, holds what is none of ours.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The disk was written by another build of the store.
    #[error(
        "the data directory has form {found} and this build reads form {FORM_NUMBER} alone: start the build that wrote \
         it, or empty the directory, so that this node comes back as a new one, restored from the others"
    )]
    Form {
        /// What is there.
        found: u64,
    },
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
}

impl Hole {
    fn of(self, split: SplitId) -> NodeError {
        NodeError::Hole { split, last: self.last, found: self.found }
    }
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

/// Who carries messages to the other nodes of a split.
pub trait Post {
    /// To be sent, in order. What is lost is said again.
    fn post(&mut self, split: SplitId, to: NodeId, message: Vec<u8>);
}

/// All splits of one node, on its one log and one engine.
pub struct Groups<D> {
    me: NodeId,
    wal: Wal<D>,
    engine: Arc<dyn Engine>,
    groups: BTreeMap<SplitId, Group>,
    gone: BTreeMap<SplitId, Gone>,
    /// The last entry of each split in each segment of the log.
    segments: BTreeMap<u64, BTreeMap<SplitId, u64>>,
    syncs: u64,
    tail_bytes: usize,
}

impl<D: Disk> Groups<D> {
    /// The node `me` as its disk remembers it. Where it remembers nothing, and `first` are nodes, they begin a universe
    /// with one split. Of entries before a checkpoint no more than `tail_bytes` are kept at hand, all splits together:
    /// followers that are further behind get a snapshot.
    ///
    /// # Errors
    ///
    /// When the log or the engine cannot be used.
    pub fn open(
        me: NodeId,
        first: &[NodeId],
        disk: D,
        engine: Arc<dyn Engine>,
        tail_bytes: usize,
    ) -> Result<Self, NodeError> {
        let (wal, records) = Wal::open(disk)?;
        check_form(&*engine, records.is_empty())?;
        let gone =
            read_numbered(&*engine, GONE, |bytes| Gone::decode(bytes).ok_or(WireError::Field("gone split")))?;
        let mut checkpoints = read_numbered(&*engine, CHECKPOINTS, wire::decode_checkpoint)?;
        if checkpoints.is_empty() && gone.is_empty() && records.is_empty() && !first.is_empty() {
            let voters: Vec<u64> = first.iter().map(|node| node.0).collect();
            let checkpoint = Checkpoint {
                life: 0,
                home: Home(0),
                index: FIRST_ENTRY.0,
                index_term: FIRST_ENTRY.1,
                conf: ConfState::from((voters, vec![])),
                conf_index: FIRST_ENTRY.0,
                state: State { generation: 1, ..State::default() },
            };
            let mut batch = Batch::default();
            batch.put(numbered(CHECKPOINTS, FIRST_SPLIT), wire::encode_checkpoint(&checkpoint));
            engine.write(batch)?;
            engine.sync()?;
            checkpoints.insert(FIRST_SPLIT, checkpoint);
        }
        let mut logs: BTreeMap<_, _> = checkpoints
            .iter()
            .map(|(split, checkpoint)| {
                (*split, RaftLog::after(checkpoint.index, checkpoint.index_term, checkpoint.conf.clone()))
            })
            .collect();
        let mut segments: BTreeMap<u64, BTreeMap<SplitId, u64>> = BTreeMap::new();
        for (segment, record) in records {
            let record = wire::decode_record(&record)?;
            let split = SplitId(record.split);
            // A split that has left this node leaves its records behind.
            let (Some(log), Some(checkpoint)) = (logs.get_mut(&split), checkpoints.get(&split)) else {
                continue;
            };
            if record.life == checkpoint.life {
                note_segment(&mut segments, segment, &record);
                remember(split, log, record, checkpoint)?;
            } else if let Some(hard_state) = record.hard_state {
                // Of a replica that was here before, only whom it has voted for still counts.
                log.set_hard_state(HardState { commit: 0, ..hard_state });
            }
        }
        let mut groups = BTreeMap::new();
        for (split, mut log) in logs {
            log.clamp_commit();
            let checkpoint = checkpoints.remove(&split).unwrap_or_default();
            let group = Group::new(me, split, log, checkpoint, Arc::clone(&engine))?;
            groups.insert(split, group);
        }
        Ok(Self { me, wal, engine, groups, gone, segments, syncs: 0, tail_bytes })
    }

    /// Time goes on: elections and heartbeats.
    pub fn tick(&mut self) {
        for group in self.groups.values_mut() {
            group.tick();
        }
    }

    /// Takes a message of another node's.
    ///
    /// # Errors
    ///
    /// When it is of no use here.
    pub fn step(&mut self, from: NodeId, split: SplitId, bytes: Bytes) -> Result<(), Dropped> {
        let message = wire::decode_message(bytes)?;
        if message.from != from.0 {
            return Err(WireError::Field("sender").into());
        }
        if !self.groups.contains_key(&split) {
            self.admit(split, &message)?;
        }
        self.groups.get_mut(&split).ok_or(Dropped::Unknown(split))?.step(message)
    }

    /// Asks the logs of led splits for leases that are wanted.
    pub fn renew(&mut self, now: Interval) {
        self.groups.values_mut().for_each(|group| group.renew(now));
    }

    /// One turn: writes and syncs what all groups want remembered, says and applies what is agreed on. Gives what
    /// entries came to on this node.
    ///
    /// # Errors
    ///
    /// When the node must stop.
    pub fn turn(&mut self, post: &mut dyn Post) -> Result<Vec<(SplitId, Applied)>, NodeError> {
        let mut readies = Vec::new();
        let (mut restarted, mut must_write) = (false, false);
        if self.wal.begins_segment() && !self.wal.has_gathered() {
            self.say_hard_states_again()?;
        }
        let segment = self.wal.next_segment();
        let mut home = self.new_home();
        for (split, group) in &mut self.groups {
            group.follow_role();
            group.submit();
            if group.raft.has_ready() {
                let mut ready = group.raft.ready();
                // These rest on nothing that is not on disk yet: followers write while this node does.
                group.say(ready.take_messages(), post);
                let restart = group.install(&ready, &self.engine, home)?;
                if restart.is_some() {
                    restarted = true;
                    home.0 += 1;
                }
                // How far all agree is heard again, and waits for what has to be written. But who the nodes are, this one
                // must know without the others: nobody but it may be there to lead.
                let nodes = |entry: &RaftEntry| entry.get_entry_type() != EntryType::EntryNormal;
                must_write |= ready.must_sync() || ready.committed_entries().iter().any(nodes);
                let records = records(*split, group.life, &mut ready, restart);
                for record in &records {
                    note_segment(&mut self.segments, segment, record);
                    self.wal.gather(&wire::encode_record(record))?;
                }
                readies.push((*split, ready, records));
            }
        }
        if must_write {
            self.syncs += u64::from(self.wal.commit()?);
        }
        for (split, ready, records) in readies {
            if let Some(group) = self.groups.get_mut(&split) {
                group.persisted(ready, records, post)?;
            }
        }
        let mut applied = Vec::new();
        for split in self.groups.keys().copied().collect::<Vec<_>>() {
            self.apply(split, &mut applied)?;
        }
        for group in self.groups.values_mut() {
            group.serve_snapshot()?;
        }
        if restarted {
            self.drop_absorbed()?;
        }
        Ok(applied)
    }

    /// Whether another turn has something to do.
    pub fn has_ready(&self) -> bool {
        self.groups.values().any(Group::has_ready)
    }

    /// Saves where all replicas are, so that the log from before it can be dropped.
    ///
    /// # Errors
    ///
    /// When the node must stop.
    pub fn checkpoint(&mut self) -> Result<(), NodeError> {
        self.drop_absorbed()?;
        let mut batch = Batch::default();
        for group in self.groups.values_mut() {
            group.save(&mut batch);
        }
        self.engine.write(batch)?;
        self.engine.sync()?;
        let tail_bytes = self.tail_bytes / self.groups.len().max(1);
        for group in self.groups.values_mut() {
            group.saved();
            group.keep_tail(tail_bytes);
        }
        let groups = &self.groups;
        let needed = |split: &SplitId, last: &u64| {
            groups.get(split).is_some_and(|group| group.checkpoint_index < *last)
        };
        let segments = &mut self.segments;
        self.wal.drop_segments(|segment| {
            let keep = segments
                .get(&segment)
                .is_some_and(|splits| splits.iter().any(|(split, last)| needed(split, last)));
            if !keep {
                segments.remove(&segment);
            }
            keep
        })?;
        Ok(())
    }

    /// Removes this node's replica of a split, whose leader of `term` said that it is none of the split's nodes when its
    /// own log ended at `last`. What came later may be of a time when it is one again. Not heard from `from` as long as
    /// another one leads the split.
    ///
    /// # Errors
    ///
    /// When the node must stop.
    pub fn leave(&mut self, from: NodeId, split: SplitId, term: u64, last: u64) -> Result<(), NodeError> {
        let leaves = self.groups.get(&split).is_some_and(|group| {
            let heard = group.raft.raft.election_elapsed < ELECTION_TICKS;
            let led_otherwise = heard && group.led_by().is_some_and(|leader| leader != from);
            !led_otherwise && group.term() <= term && group.raft.raft.raft_log.last_index() <= last
        });
        // What is part of another by now for one node must be there for the others to take in: together they may have the
        // only copy.
        let leaves = leaves && !(term == u64::MAX && self.is_awaited(split));
        if leaves { self.destroy(split, term) } else { Ok(()) }
    }

    /// Whether a split that is here is to take this one in, and has not done so yet: the one that ends where this one
    /// begins, or one that has not even been cut there. What has more in it than this one has taken it in.
    fn is_awaited(&self, split: SplitId) -> bool {
        let Some(half) = self.groups.get(&split).filter(|half| half.is_filled()) else { return false };
        let half = &half.replica;
        let others = || self.groups.values().filter(|other| other.split != split && other.is_filled());
        let overlaps = |other: &Replica| other.range().overlaps(half.range());
        let taken = |other: &Group| {
            overlaps(&other.replica) && other.replica.generation() > half.generation()
                || other.replica.has_absorbed(split)
        };
        !others().any(taken) && others().any(|other| other.replica.touches(half) || overlaps(&other.replica))
    }

    /// Whether the split is part of another, as far as this node knows: its number is never given again.
    pub fn is_absorbed(&self, split: SplitId) -> bool {
        self.gone.get(&split).is_some_and(|gone| gone.term == u64::MAX)
    }

    /// One of the splits.
    pub fn get(&self, split: SplitId) -> Option<&Group> {
        self.groups.get(&split)
    }

    /// One of the splits, to lead it.
    pub fn get_mut(&mut self, split: SplitId) -> Option<&mut Group> {
        self.groups.get_mut(&split)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (SplitId, &Group)> {
        self.groups.iter().map(|(split, group)| (*split, group))
    }

    /// All of them, to lead them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (SplitId, &mut Group)> {
        self.groups.iter_mut().map(|(split, group)| (*split, group))
    }

    /// Synced writes of the log since it was opened.
    pub fn syncs(&self) -> u64 {
        self.syncs
    }

    /// Bytes of the log that are kept.
    pub fn log_bytes(&self) -> u64 {
        self.wal.bytes()
    }

    /// The disk, to be opened again.
    pub fn into_disk(self) -> D {
        self.wal.into_disk()
    }

    /// Hard states are in the log alone, so each segment begins with all of them.
    fn say_hard_states_again(&mut self) -> Result<(), NodeError> {
        for (split, group) in &self.groups {
            let hard_state = Some(group.raft.store().hard_state().clone());
            let record = Record { split: split.0, life: group.life, hard_state, ..Record::default() };
            self.wal.gather(&wire::encode_record(&record))?;
        }
        Ok(())
    }

    /// Somebody speaks of a split that this node does not have: it was given a replica, which a snapshot will fill, or
    /// was to cut it off from another and is not so far yet.
    fn admit(&mut self, split: SplitId, message: &Message) -> Result<(), Dropped> {
        let gone = self.gone.get(&split);
        let votes =
            matches!(message.get_msg_type(), MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
        let wanted = leads(message) || (votes && gone.is_none());
        let late = gone.is_some_and(|gone| message.term < gone.term);
        if !wanted || late || message.to != self.me.0 {
            return Err(Dropped::Unknown(split));
        }
        let nothing = Range::between(Bytes::new(), Some(Bytes::new())).ok();
        let checkpoint = Checkpoint {
            life: gone.map_or(0, |gone| gone.lives),
            home: self.new_home(),
            state: State { range: nothing, ..State::default() },
            ..Checkpoint::default()
        };
        let mut batch = Batch::default();
        batch.put(numbered(CHECKPOINTS, split), wire::encode_checkpoint(&checkpoint));
        let made = self.engine.write(batch).and_then(|()| self.engine.sync());
        let log = RaftLog::after(0, 0, ConfState::default());
        // A disk that fails here fails at the next turn too, which stops the node.
        let group = made
            .ok()
            .and_then(|()| Group::new(self.me, split, log, checkpoint, Arc::clone(&self.engine)).ok());
        self.groups.insert(split, group.ok_or(Dropped::Unknown(split))?);
        Ok(())
    }

    /// A home that no replica of this node has rows in. What replicas leave they clear, so one that is none's is empty.
    fn new_home(&self) -> Home {
        let homes = self.groups.values().map(|group| group.replica.rows().home());
        Home(homes.max().map_or(0, |last| last.0 + 1))
    }

    /// What a turn has agreed on is written to the engine at once.
    fn apply(&mut self, split: SplitId, applied: &mut Vec<(SplitId, Applied)>) -> Result<(), NodeError> {
        let mut batch = Batch::default();
        let result = self.apply_backlog(split, &mut batch, applied);
        if !batch.is_empty() {
            self.engine.write(batch)?;
        }
        result
    }

    fn apply_backlog(
        &mut self,
        split: SplitId,
        batch: &mut Batch,
        applied: &mut Vec<(SplitId, Applied)>,
    ) -> Result<(), NodeError> {
        loop {
            let Some(group) = self.groups.get_mut(&split) else { return Ok(()) };
            let Some(Agreed { entry, conf }) = group.backlog.front() else { return Ok(()) };
            if let Some(conf) = conf {
                let conf = conf.clone();
                group.change_nodes(conf);
                continue;
            }
            if entry.data.is_empty() {
                group.begin_term();
                continue;
            }
            let command = wire::decode_entry(entry.data.clone())?;
            if looks_at_rows(&command.command) && !batch.is_empty() {
                self.engine.write(std::mem::take(batch))?;
            }
            let came_to = match &command.command {
                Command::Split { right, .. } => self.divide(split, &command, *right)?,
                Command::Absorb { right, .. } => match self.absorb(split, &command, *right)? {
                    Some(came_to) => came_to,
                    None => return Ok(()),
                },
                _ => group.apply_front(batch, command)?,
            };
            if let Some(group) = self.groups.get_mut(&split) {
                group.came_to(&came_to);
            }
            applied.push((split, came_to));
        }
    }

    /// A snapshot may be of a time after a merge: what this node has of the right half is part of it already. A split
    /// never loses where it begins, so one that another covers, of a higher generation, is no more.
    fn drop_absorbed(&mut self) -> Result<(), NodeError> {
        let filled = |group: &&Group| group.is_filled();
        let absorbed: Vec<_> = self
            .groups
            .values()
            .filter(filled)
            .filter(|half| {
                self.groups.values().filter(filled).any(|into| {
                    into.split != half.split
                        && into.replica.generation() > half.replica.generation()
                        && into.replica.range().covers(half.replica.range())
                })
            })
            .map(|half| half.split)
            .collect();
        absorbed.into_iter().try_for_each(|split| self.destroy(split, u64::MAX))
    }

    fn destroy(&mut self, split: SplitId, term: u64) -> Result<(), NodeError> {
        let Some(group) = self.groups.remove(&split) else { return Ok(()) };
        let mut batch = Batch::default();
        self.note_gone(&group, term, &mut batch);
        group.replica.erase(&mut batch).map_err(|error| NodeError::Replica(split, error))?;
        self.engine.write(batch)?;
        Ok(self.engine.sync()?)
    }

    fn note_gone(&mut self, group: &Group, term: u64, batch: &mut Batch) {
        let gone = Gone { term, lives: group.life + 1 };
        self.gone.insert(group.split, gone);
        for splits in self.segments.values_mut() {
            splits.remove(&group.split);
        }
        batch.put(numbered(GONE, group.split), gone.encode());
        batch.delete(numbered(CHECKPOINTS, group.split));
    }

    fn divide(&mut self, split: SplitId, entry: &Entry, right: SplitId) -> Result<Applied, NodeError> {
        let on = |error| NodeError::Replica(split, error);
        // It is here already if its leader was faster than this log.
        let known = self.gone.contains_key(&right) || self.groups.get(&right).is_some_and(Group::is_filled);
        let met = self.groups.get(&right).map(|group| group.raft.store().hard_state().clone());
        let Some(group) = self.groups.get_mut(&split) else { return Ok(Applied::Nothing) };
        let term = group.front_term();
        let mut batch = Batch::default();
        let half = group.replica.divide(entry, term).map_err(on)?;
        group.pop();
        group.save(&mut batch);
        let Some(mut half) = half else {
            self.engine.write(batch)?;
            return Ok(Applied::Split(None));
        };
        if !known {
            let checkpoint = Checkpoint {
                life: 0,
                home: half.rows().home(),
                index: FIRST_ENTRY.0,
                index_term: FIRST_ENTRY.1,
                conf: group.conf.clone(),
                conf_index: FIRST_ENTRY.0,
                state: half.state(),
            };
            half.keep_since(&mut batch);
            half.save_outcomes(&mut batch);
            batch.put(numbered(CHECKPOINTS, right), wire::encode_checkpoint(&checkpoint));
            self.engine.write(batch)?;
            self.engine.sync()?;
            let mut log = RaftLog::after(checkpoint.index, checkpoint.index_term, checkpoint.conf.clone());
            // It may have heard of a later term already: what it said then it must not forget.
            if let Some(met) = met.filter(|met| met.term > FIRST_ENTRY.1) {
                log.set_hard_state(met);
            }
            let group = Group::new(self.me, right, log, checkpoint, Arc::clone(&self.engine))?;
            self.groups.insert(right, group);
        } else {
            // What is here has rows of its own, and what has gone again has none.
            half.rows().clear(&mut batch, half.range()).map_err(|error| on(error.into()))?;
            self.engine.write(batch)?;
            self.engine.sync()?;
        }
        if let Some(group) = self.groups.get_mut(&split) {
            group.saved();
        }
        Ok(Applied::Split(Some(right)))
    }

    /// Nothing as long as the right half is not there, or has not retired yet, on this node.
    fn absorb(
        &mut self,
        split: SplitId,
        entry: &Entry,
        right: SplitId,
    ) -> Result<Option<Applied>, NodeError> {
        let on = |error| NodeError::Replica(split, error);
        let Some(mut group) = self.groups.remove(&split) else { return Ok(None) };
        let half = self.groups.get(&right).filter(|half| half.replica.retired().is_some());
        let term = group.front_term();
        let mut batch = Batch::default();
        let absorbs = match half {
            // Two leaders may have asked for it.
            _ if group.replica.has_absorbed(right) => false,
            Some(half) => group.replica.absorb(entry, term, &half.replica, &mut batch).map_err(on)?,
            None => {
                group.stall();
                self.groups.insert(split, group);
                return Ok(None);
            }
        };
        group.pop();
        if absorbs {
            if let Some(half) = self.groups.remove(&right) {
                self.note_gone(&half, u64::MAX, &mut batch);
            }
            group.save(&mut batch);
            self.engine.write(batch)?;
            self.engine.sync()?;
            group.saved();
        }
        self.groups.insert(split, group);
        Ok(Some(if absorbs { Applied::Absorbed(right) } else { Applied::Nothing }))
    }
}

/// An entry that is agreed on, and what nodes the split has from it on, where it changes them.
struct Agreed {
    entry: RaftEntry,
    conf: Option<ConfState>,
}

/// This node's part of one split.
pub struct Group {
    split: SplitId,
    me: NodeId,
    raft: RawNode<RaftLog>,
    replica: Replica,
    leader: Option<Leader>,
    lease_asked: bool,
    /// What this turn puts into the log, and in which term.
    proposals: Vec<RaftEntry>,
    proposals_term: u64,
    /// Agreed on and not applied yet.
    backlog: VecDeque<Agreed>,
    /// Index and term of the last entry applied.
    applied: (u64, u64),
    checkpoint_index: u64,
    /// The split's nodes as of the last entry applied, and the entry that made them so. Consensus may be further on.
    conf: ConfState,
    conf_index: u64,
    stalled_ticks: u32,
    /// How often it has stalled as a leader.
    stalls: usize,
    /// How many replicas of the split this node had before this one. What they promised it has forgotten.
    life: u64,
    /// Ticks since each node was sent a snapshot that it has not answered to.
    snapshot_ticks: BTreeMap<u64, u32>,
}

impl Group {
    fn new(
        me: NodeId,
        split: SplitId,
        log: RaftLog,
        checkpoint: Checkpoint,
        engine: Arc<dyn Engine>,
    ) -> Result<Self, NodeError> {
        // By the node's number: one whose disk was replaced has its own place again.
        let place = usize::try_from((me.0 & NUMBER_MASK) % ELECTION_PLACES).unwrap_or_default();
        let patience = ELECTION_TICKS + place * ELECTION_APART_TICKS;
        let config = Config {
            id: me.0,
            applied: checkpoint.index,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            min_election_tick: patience,
            max_election_tick: patience + 1,
            check_quorum: true,
            pre_vote: true,
            max_size_per_msg: APPEND_BYTES_MAX,
            max_inflight_msgs: APPENDS_IN_FLIGHT,
            // See [`Group::tell_agreed`].
            skip_bcast_commit: true,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raft = RawNode::new(&config, log, &logger).map_err(|error| NodeError::Raft(split, error))?;
        let Checkpoint { life, home, index, index_term, conf, conf_index, state } = checkpoint;
        let replica =
            Replica::restore(engine, split, home, state).map_err(|error| NodeError::Replica(split, error))?;
        Ok(Self {
            split,
            me,
            raft,
            replica,
            leader: None,
            lease_asked: false,
            proposals: Vec::new(),
            proposals_term: 0,
            backlog: VecDeque::new(),
            applied: (index, index_term),
            checkpoint_index: index,
            conf,
            conf_index,
            stalled_ticks: 0,
            stalls: 0,
            life,
            snapshot_ticks: BTreeMap::new(),
        })
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
        // Consensus takes nothing while leadership is on its way to another node.
        if !self.leads_in(entry.term) || self.raft.raft.lead_transferee.is_some() {
            return Err(Dropped::NotLeading);
        }
        if self.proposals_term != entry.term {
            self.proposals.clear();
        }
        self.proposals_term = entry.term;
        let data = wire::encode_entry(entry).into();
        self.proposals.push(RaftEntry { data, ..RaftEntry::default() });
        Ok(())
    }

    /// Gives consensus what a turn has proposed, all at once: it goes to each follower as one message, and comes back as
    /// one answer. Lost if this node leads no longer, as it would be a moment later.
    fn submit(&mut self) {
        let entries = std::mem::take(&mut self.proposals);
        if !entries.is_empty() && self.leads_in(self.proposals_term) {
            let mut message = Message { from: self.me.0, ..Message::default() };
            message.set_msg_type(MessageType::MsgPropose);
            message.set_entries(entries.into());
            // Refused only where it leads no longer.
            self.raft.raft.step(message).ok();
        }
    }

    fn has_ready(&self) -> bool {
        !self.proposals.is_empty() || self.raft.has_ready()
    }

    /// Asks for other nodes: those added learn first, and vote when they have caught up.
    ///
    /// # Errors
    ///
    /// When this node does not lead, or another change is under way.
    pub fn propose_nodes(&mut self, changes: &[(NodeChange, NodeId)]) -> Result<(), Dropped> {
        if self.raft.raft.state != StateRole::Leader {
            return Err(Dropped::NotLeading);
        }
        self.submit();
        let mut change = ConfChangeV2::default();
        let single = |(kind, node): &(NodeChange, NodeId)| {
            let mut single = ConfChangeSingle::default();
            single.set_change_type(match kind {
                NodeChange::Learn => ConfChangeType::AddLearnerNode,
                NodeChange::Vote => ConfChangeType::AddNode,
                NodeChange::Remove => ConfChangeType::RemoveNode,
            });
            single.node_id = node.0;
            single
        };
        change.set_changes(changes.iter().map(single).collect::<Vec<_>>().into());
        if changes.len() > 1 {
            change.set_transition(ConfChangeTransition::Explicit);
        }
        Ok(self.raft.propose_conf_change(Vec::new(), change)?)
    }

    /// Asks another node of the split to lead it.
    pub fn transfer(&mut self, to: NodeId) {
        self.submit();
        self.raft.transfer_leader(to.0);
    }

    /// A change is off: this node goes on leading, and new work begins again.
    pub fn stay(&mut self) {
        self.raft.raft.abort_leader_transfer();
        if let Some(leader) = &mut self.leader {
            leader.thaw();
        }
    }

    /// The nodes of the split: those that vote, and those that learn.
    pub fn nodes(&self) -> (Vec<NodeId>, Vec<NodeId>) {
        let conf = self.raft.store().conf_state();
        let ids = |nodes: &[u64]| nodes.iter().copied().map(NodeId).collect();
        (ids(&conf.voters), ids(&conf.learners))
    }

    /// Whether its nodes are being changed.
    pub fn changes_nodes(&self) -> bool {
        self.is_joint() || self.raft.raft.has_pending_conf()
    }

    /// Whether it is between the nodes that it had and those that it will have.
    fn is_joint(&self) -> bool {
        !self.raft.store().conf_state().voters_outgoing.is_empty()
    }

    /// Whether `node` has nearly all of the log, as its leader knows.
    pub fn has_caught_up(&self, node: NodeId) -> bool {
        let last = self.raft.raft.raft_log.last_index();
        self.raft
            .raft
            .prs()
            .get(node.0)
            // Nothing matches before there has been a snapshot, however short the log is.
            .is_some_and(|progress| progress.matched > 0 && progress.matched + CAUGHT_UP_ENTRIES >= last)
    }

    /// Whether this node is one of the split's, as far as its own replica knows.
    pub fn is_member(&self) -> bool {
        let conf = self.raft.store().conf_state();
        [&conf.voters, &conf.learners, &conf.voters_outgoing, &conf.learners_next]
            .iter()
            .any(|nodes| nodes.contains(&self.me.0))
    }

    /// Whether it may be none of the split's any more and not have heard: nobody tells it anything, or it only learns, and
    /// of a split that is about to be part of another.
    pub fn is_left_over(&self) -> bool {
        let unheard = self.led_by().is_none() || self.raft.raft.election_elapsed > UNHEARD_TICKS;
        let learns = !self.nodes().0.contains(&self.me);
        unheard || learns && self.replica.retired().is_some()
    }

    /// What a node that is none of this split's is told by its leader: the term, and where the log ends.
    pub fn farewell(&self, node: NodeId) -> Option<(u64, u64)> {
        let raft = &self.raft.raft;
        let gone = raft.state == StateRole::Leader && raft.prs().get(node.0).is_none();
        gone.then(|| (raft.term, raft.raft_log.last_index()))
    }

    /// Who leads, as far as this node knows.
    pub fn led_by(&self) -> Option<NodeId> {
        Some(self.raft.raft.leader_id).filter(|leader| *leader != 0).map(NodeId)
    }

    /// The term that this node is in.
    pub fn term(&self) -> u64 {
        self.raft.raft.term
    }

    /// How far this node has applied the log.
    pub fn applied(&self) -> u64 {
        self.applied.0
    }

    /// Whether there is more than a name: a new replica is empty until a snapshot comes.
    pub fn is_filled(&self) -> bool {
        self.raft.store().conf_state() != &ConfState::default()
    }

    fn tick(&mut self) {
        self.raft.tick();
        if !self.backlog.is_empty() {
            self.stalled_ticks += 1;
        }
        let leads = self.raft.raft.state == StateRole::Leader;
        if leads && self.is_joint() && !self.raft.raft.has_pending_conf() {
            // What is refused now is asked for again at the next tick.
            self.raft.propose_conf_change(Vec::new(), ConfChangeV2::default()).ok();
        }
        self.repeat_snapshots();
        // A split that was cut off is led where the whole was led, under the lease that it brought with it.
        let inherits = self
            .replica
            .lease()
            .granted()
            .is_some_and(|grant| grant.holder.node == self.me && grant.holder.term == FIRST_TERM);
        if inherits && self.raft.raft.term < FIRST_TERM {
            // Who else has it already hears this; the others will.
            self.raft.campaign().ok();
        }
    }

    /// A snapshot that was lost is not missed by consensus, which sends nothing else until it hears of it.
    fn repeat_snapshots(&mut self) {
        let prs = self.raft.raft.prs();
        let sent: Vec<u64> = prs
            .iter()
            .filter(|(_, progress)| progress.state == ProgressState::Snapshot)
            .map(|(id, _)| *id)
            .collect();
        self.snapshot_ticks.retain(|node, _| sent.contains(node));
        for node in sent {
            let ticks = self.snapshot_ticks.entry(node).or_default();
            *ticks += 1;
            if *ticks > SNAPSHOT_TICKS {
                self.snapshot_ticks.remove(&node);
                self.raft.report_snapshot(node, SnapshotStatus::Failure);
            }
        }
    }

    fn step(&mut self, message: Message) -> Result<(), Dropped> {
        let stranger = Dropped::Stranger { from: message.from, to: message.to };
        if message.to != self.me.0 {
            return Err(stranger);
        }
        let kind = message.get_msg_type();
        if kind == MessageType::MsgSnapshot {
            // What cannot be read must not come to where it is to be installed.
            wire::decode_image(message.get_snapshot().data.clone())?;
        }
        let log = &self.raft.raft.raft_log;
        // Of entries that are gone already it says that they were of no term.
        let contradicts = |entry: &RaftEntry| {
            let known = log.term(entry.index).ok().filter(|term| *term > 0);
            entry.index <= log.committed && known.is_some_and(|term| term != entry.term)
        };
        if kind == MessageType::MsgAppend && message.entries.iter().any(contradicts) {
            return Err(WireError::Field("entry").into());
        }
        let last = log.last_index();
        if kind == MessageType::MsgHeartbeat && message.commit > last {
            return Err(Dropped::Forgot { acknowledged: message.commit, last });
        }
        if !self.is_filled() {
            // Of a replica that was here before, the promises are forgotten.
            let vote =
                self.life > 0 && matches!(kind, MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
            return if vote { Err(stranger) } else { Ok(self.raft.step(message)?) };
        }
        // Others may know of nodes that this replica has not heard of yet; its leader knows them all.
        let stray =
            self.raft.raft.state == StateRole::Leader && self.farewell(NodeId(message.from)).is_some();
        if stray && !leads(&message) {
            return Err(stranger);
        }
        Ok(self.raft.step(message)?)
    }

    fn renew(&mut self, now: Interval) {
        self.follow_role();
        let Some(leader) = &self.leader else { return };
        let waits = self.lease_asked || leader.is_frozen() || self.replica.retired().is_some();
        if waits || self.replica.term() != leader.term() {
            return;
        }
        let Some(grant) = self.replica.lease().wanted(leader.tenure(), now) else { return };
        let entry = leader.lease(grant);
        // Consensus takes nothing while leadership is on its way to another node: the next tick asks again.
        self.lease_asked = self.propose(&entry).is_ok();
    }

    /// Locks and memory of a leader are of one term: another term begins with none.
    fn follow_role(&mut self) {
        let term = self.raft.raft.term;
        if self.raft.raft.state != StateRole::Leader {
            if self.leader.take().is_some() {
                tracing::info!(split = self.split.0, term, "leads no more");
            }
        } else if self.leader.as_ref().is_none_or(|leader| leader.term() != term) {
            tracing::info!(split = self.split.0, term, "leads");
            self.leader = Some(Leader::new(self.me, term));
            self.lease_asked = false;
        }
    }

    fn leads_in(&self, term: u64) -> bool {
        self.raft.raft.state == StateRole::Leader && self.raft.raft.term == term
    }

    /// Puts a snapshot of another node's in the place of everything here, and gives its index. Its rows come to a home of
    /// their own: in the one of those that they take the place of there may be others, of what was cut off since.
    fn install(
        &mut self,
        ready: &Ready,
        engine: &Arc<dyn Engine>,
        home: Home,
    ) -> Result<Option<u64>, NodeError> {
        let on = |error| NodeError::Replica(self.split, error);
        let snapshot = ready.snapshot();
        let (index, term) = (snapshot.get_metadata().index, snapshot.get_metadata().term);
        if index == 0 {
            return Ok(None);
        }
        let Image { mut checkpoint, rows, outcomes, kept_since } = wire::decode_image(snapshot.data.clone())?;
        checkpoint.life = self.life;
        checkpoint.home = home;
        checkpoint.index = index;
        checkpoint.index_term = term;
        let mut batch = Batch::default();
        self.replica.erase(&mut batch).map_err(on)?;
        let since = checkpoint.state.outcomes_since;
        let filled = Mvcc::new(Arc::clone(engine), home, kept_since);
        Replica::fill(self.split, &filled, &mut batch, &rows, &outcomes, since);
        batch.put(numbered(CHECKPOINTS, self.split), wire::encode_checkpoint(&checkpoint));
        engine.write(batch)?;
        engine.sync()?;
        let conf = checkpoint.conf.clone();
        self.replica =
            Replica::restore(Arc::clone(engine), self.split, home, checkpoint.state).map_err(on)?;
        self.backlog.clear();
        self.stalled_ticks = 0;
        self.applied = (index, term);
        self.checkpoint_index = index;
        self.conf = conf.clone();
        self.conf_index = checkpoint.conf_index;
        self.raft.mut_store().restart(index, term, conf);
        Ok(Some(index))
    }

    fn persisted(
        &mut self,
        mut ready: Ready,
        records: Vec<Record>,
        post: &mut dyn Post,
    ) -> Result<(), NodeError> {
        let log = self.raft.mut_store();
        let mut restarted = false;
        for record in records {
            log.append(record.entries).map_err(|hole| hole.of(self.split))?;
            if let Some(hard_state) = record.hard_state {
                log.set_hard_state(hard_state);
            }
            restarted |= record.restart.is_some();
        }
        self.say(ready.take_persisted_messages(), post);
        let committed = ready.take_committed_entries();
        let mut light = self.raft.advance_append(ready);
        if let Some(commit) = light.commit_index() {
            self.raft.mut_store().set_commit(commit);
        }
        if restarted {
            self.raft.advance_apply_to(self.applied.0);
        }
        self.say(light.take_messages(), post);
        let agreed = !committed.is_empty() || light.commit_index().is_some();
        self.agree(committed)?;
        self.agree(light.take_committed_entries())?;
        if agreed {
            self.tell_agreed();
        }
        Ok(())
    }

    /// Followers hear how far all agree with the entries that come next. Where none are on their way they hear it by
    /// itself: a message and an answer each, that a busy split does without.
    fn tell_agreed(&mut self) {
        let log = &self.raft.raft.raft_log;
        if self.raft.raft.state == StateRole::Leader && log.committed == log.last_index() {
            self.raft.raft.bcast_append();
        }
    }

    fn say(&self, messages: Vec<Message>, post: &mut dyn Post) {
        for message in messages {
            post.post(self.split, NodeId(message.to), wire::encode_message(&message));
        }
    }

    fn front_term(&self) -> u64 {
        self.backlog.front().map_or(0, |agreed| agreed.entry.term)
    }

    /// The entry at the front is applied.
    fn pop(&mut self) -> Option<RaftEntry> {
        let Agreed { entry, .. } = self.backlog.pop_front()?;
        self.applied = (entry.index, entry.term);
        self.stalled_ticks = 0;
        Some(entry)
    }

    /// Each leader logs an empty entry first: what stands before it is all that leaders before it logged.
    fn begin_term(&mut self) {
        let Some(entry) = self.pop() else { return };
        self.replica.begin_term(entry.term);
        if let Some(leader) = self.leader.as_mut().filter(|leader| leader.term() == entry.term) {
            leader.inherit(&self.replica);
        }
    }

    /// Takes entries that are agreed on, to be applied in order. Consensus itself hears at once who the split's nodes are:
    /// a replica that has to wait with what comes before must be able to lead, or nobody may be there to help it.
    fn agree(&mut self, entries: Vec<RaftEntry>) -> Result<(), NodeError> {
        for entry in entries {
            let changes = entry.get_entry_type() != EntryType::EntryNormal;
            if changes {
                self.agree_on_nodes(&entry)?;
            }
            self.raft.advance_apply_to(entry.index);
            let conf = changes.then(|| self.raft.store().conf_state().clone());
            self.backlog.push_back(Agreed { entry, conf });
        }
        Ok(())
    }

    /// A node that is none of the split's any more keeps its replica until the leader says so: further on in the log it
    /// may be one again, and what it has acknowledged it must have.
    fn agree_on_nodes(&mut self, entry: &RaftEntry) -> Result<(), NodeError> {
        let change = wire::decode_conf_change(&entry.data)?;
        // Two leaders may have asked for the end of one change.
        if change.changes.is_empty() && !self.is_joint() {
            return Ok(());
        }
        let conf =
            self.raft.apply_conf_change(&change).map_err(|error| NodeError::Raft(self.split, error))?;
        self.raft.mut_store().set_conf_state(conf);
        // Consensus takes nothing from a leader that is none of the nodes, and elects no other while it is heard.
        if self.raft.raft.state == StateRole::Leader && !self.is_member() {
            let term = self.raft.raft.term;
            self.raft.raft.become_follower(term, 0);
        }
        Ok(())
    }

    fn change_nodes(&mut self, conf: ConfState) {
        let Some(entry) = self.pop() else { return };
        if self.conf != conf {
            self.conf = conf;
            self.conf_index = entry.index;
            self.replica.change_nodes();
        }
    }

    fn apply_front(&mut self, batch: &mut Batch, entry: Entry) -> Result<Applied, NodeError> {
        let term = self.front_term();
        let applied = match looks_at_rows(&entry.command) {
            true => self.replica.apply(entry, term),
            false => self.replica.apply_into(batch, entry, term),
        };
        self.pop();
        applied.map_err(|error| NodeError::Replica(self.split, error))
    }

    fn came_to(&mut self, applied: &Applied) {
        if let Some(leader) = &mut self.leader {
            leader.applied(applied);
            if matches!(applied, Applied::Split(Some(_))) {
                leader.forget_locks();
            }
            if matches!(applied, Applied::Split(_)) {
                leader.thaw();
            }
        }
        if matches!(applied, Applied::Lease(_)) {
            self.lease_asked = false;
        }
    }

    /// The split beside it may never come to where it is waited for, since the others are past that.
    fn stall(&mut self) {
        if self.stalled_ticks < STALL_TICKS {
            return;
        }
        self.stalled_ticks = 0;
        let others: Vec<_> = self.nodes().0.into_iter().filter(|node| *node != self.me).collect();
        if self.raft.raft.state != StateRole::Leader {
            // What is refused now is asked for again when it has stalled as long again.
            self.raft.request_snapshot().ok();
        } else if let Some(other) = others.get(self.stalls % others.len().max(1)) {
            // Nobody gives a leader a snapshot: one who is past this leads instead.
            self.stalls += 1;
            self.transfer(*other);
        }
    }

    fn save(&mut self, batch: &mut Batch) {
        batch.put(numbered(CHECKPOINTS, self.split), wire::encode_checkpoint(&self.as_checkpoint()));
        self.replica.save_outcomes(batch);
    }

    fn as_checkpoint(&self) -> Checkpoint {
        Checkpoint {
            life: self.life,
            home: self.replica.rows().home(),
            index: self.applied.0,
            index_term: self.applied.1,
            conf: self.conf.clone(),
            conf_index: self.conf_index,
            state: self.replica.state(),
        }
    }

    /// The checkpoint is on disk: what stands before it is needed for followers a little behind at most.
    fn saved(&mut self) {
        self.checkpoint_index = self.applied.0;
        self.raft.mut_store().drop_snapshot();
    }

    fn keep_tail(&mut self, bytes: usize) {
        self.raft.mut_store().forget_over(self.checkpoint_index, bytes);
    }

    fn serve_snapshot(&mut self) -> Result<(), NodeError> {
        if !self.raft.store().wants_snapshot() || !self.backlog.is_empty() {
            return Ok(());
        }
        let on = |error| NodeError::Replica(self.split, error);
        let checkpoint = self.as_checkpoint();
        let mut rows = Vec::new();
        self.replica
            .rows()
            .versions(self.replica.range(), &mut |key, version| rows.push((key, version)))
            .map_err(|error| on(error.into()))?;
        let conf = checkpoint.conf.clone();
        let image = Image {
            checkpoint,
            rows,
            outcomes: self.replica.outcomes().collect(),
            kept_since: self.replica.rows().kept_since(),
        };
        let (index, term) = self.applied;
        let snapshot = wire::raft_snapshot(wire::encode_image(&image).into(), index, term, conf);
        self.raft.mut_store().offer(snapshot);
        Ok(())
    }
}

/// Whether only a leader says so.
fn leads(message: &Message) -> bool {
    use MessageType::{MsgAppend, MsgHeartbeat, MsgSnapshot};
    matches!(message.get_msg_type(), MsgAppend | MsgHeartbeat | MsgSnapshot)
}

/// What a node becomes to a split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeChange {
    /// It hears everything and has no vote.
    Learn,
    /// It has a vote.
    Vote,
    /// It has no part in the split any more.
    Remove,
}

/// A learner with all but so many entries may vote.
const CAUGHT_UP_ENTRIES: u64 = 100;

/// Puts a record of the node's log back where it was.
fn remember(
    split: SplitId,
    log: &mut RaftLog,
    record: Record,
    checkpoint: &Checkpoint,
) -> Result<(), NodeError> {
    if record.restart.is_some() {
        log.restart(checkpoint.index, checkpoint.index_term, checkpoint.conf.clone());
    }
    // A snapshot that was installed, and the crash that kept the log from saying so: what it took the place of is of
    // an earlier term.
    let stale = record
        .entries
        .iter()
        .any(|entry| entry.index > checkpoint.index && entry.term < checkpoint.index_term);
    if !stale {
        log.append(record.entries).map_err(|hole| hole.of(split))?;
    }
    if let Some(hard_state) = record.hard_state {
        log.set_hard_state(hard_state);
    }
    Ok(())
}

/// What a group wants remembered, in records that are small enough: a torn end of them was never acknowledged.
fn records(split: SplitId, life: u64, ready: &mut Ready, restart: Option<u64>) -> Vec<Record> {
    let mut records = Vec::new();
    let empty = || Record { split: split.0, life, ..Record::default() };
    let mut last = Record { restart, ..empty() };
    let mut bytes = 0;
    for entry in ready.take_entries() {
        if bytes + entry.data.len() > RECORD_BYTES && !last.entries.is_empty() {
            records.push(std::mem::replace(&mut last, empty()));
            bytes = 0;
        }
        bytes += entry.data.len();
        last.entries.push(entry);
    }
    last.hard_state = ready.hs().cloned();
    if last.hard_state.is_some() || !last.entries.is_empty() || last.restart.is_some() {
        records.push(last);
    }
    records
}

fn note_segment(segments: &mut BTreeMap<u64, BTreeMap<SplitId, u64>>, segment: u64, record: &Record) {
    let last = record.entries.last().map_or(0, |entry| entry.index).max(record.restart.unwrap_or(0));
    let noted = segments.entry(segment).or_default().entry(SplitId(record.split)).or_default();
    *noted = (*noted).max(last);
}

/// Writes the form into a directory that is new, and refuses one of another form before anything of it is read.
fn check_form(engine: &dyn Engine, is_new: bool) -> Result<(), NodeError> {
    if let Some(number) = engine.get(FORM)? {
        let found = read_u64(&number).ok_or(WireError::Field("form"))?;
        return if found == FORM_NUMBER { Ok(()) } else { Err(NodeError::Form { found }) };
    }
    let mut is_empty = is_new;
    engine.walk(&[0], &[u8::MAX], &mut |_, _| {
        is_empty = false;
        ControlFlow::Break(())
    })?;
    if !is_empty {
        return Err(NodeError::Form { found: 1 });
    }
    let mut batch = Batch::default();
    batch.put(FORM, FORM_NUMBER.to_be_bytes().to_vec());
    engine.write(batch)?;
    Ok(engine.sync()?)
}

fn numbered(kind: u8, split: SplitId) -> Vec<u8> {
    let mut key = vec![kind];
    key.extend_from_slice(&split.0.to_be_bytes());
    key
}

fn read_u64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

fn read_numbered<T>(
    engine: &dyn Engine,
    kind: u8,
    read: impl Fn(&[u8]) -> Result<T, WireError>,
) -> Result<BTreeMap<SplitId, T>, NodeError> {
    let mut found = Vec::new();
    engine.walk(&[kind], &[kind + 1], &mut |key, value| {
        found.push((key.get(1..).and_then(read_u64), read(value)));
        ControlFlow::Continue(())
    })?;
    let mut numbered = BTreeMap::new();
    for (split, value) in found {
        if let Some(split) = split {
            numbered.insert(SplitId(split), value?);
        }
    }
    Ok(numbered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{engine::Memory, wal::Directory};

    fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
        let mut state = HardState::default();
        (state.term, state.vote, state.commit) = (term, vote, commit);
        state
    }

    /// A snapshot may be older than what the node had before it lost its replica.
    #[test]
    fn a_replica_takes_nothing_but_promises_from_one_that_was_here_before() {
        let home = tempfile::tempdir().unwrap();
        let engine = Arc::new(Memory::default());
        let checkpoint = Checkpoint {
            life: 1,
            home: Home(0),
            index: 18,
            index_term: 4,
            conf: ConfState::from((vec![1, 2, 3], vec![])),
            conf_index: FIRST_ENTRY.0,
            state: State { generation: 1, ..State::default() },
        };
        let mut batch = Batch::default();
        batch.put(numbered(CHECKPOINTS, FIRST_SPLIT), wire::encode_checkpoint(&checkpoint));
        batch.put(numbered(GONE, FIRST_SPLIT), Gone { term: 5, lives: 1 }.encode());
        batch.put(FORM, FORM_NUMBER.to_be_bytes().to_vec());
        engine.write(batch).unwrap();

        let (mut wal, _) = Wal::open(Directory::new(home.path()).unwrap()).unwrap();
        let mut entry = RaftEntry::default();
        (entry.index, entry.term) = (50, 5);
        let before = Record {
            split: FIRST_SPLIT.0,
            life: 0,
            hard_state: Some(hard_state(6, 2, 50)),
            entries: vec![entry],
            restart: Some(49),
        };
        wal.gather(&wire::encode_record(&before)).unwrap();
        wal.commit().unwrap();

        let groups = Groups::open(NodeId(1), &[], Directory::new(home.path()).unwrap(), engine, 1).unwrap();
        let group = groups.get(FIRST_SPLIT).unwrap();
        assert_eq!(group.raft.store().last(), 18);
        assert_eq!(group.raft.store().hard_state(), &hard_state(6, 2, 18));
        assert!(
            groups.segments.values().all(BTreeMap::is_empty),
            "nothing of it keeps the log from being dropped"
        );
    }

    #[test]
    fn a_directory_of_another_form_is_refused_before_anything_of_it_is_read() {
        let open = |engine: &Arc<Memory>, home: &tempfile::TempDir| {
            let disk = Directory::new(home.path()).unwrap();
            Groups::open(NodeId(1), &[NodeId(1)], disk, Arc::clone(engine) as _, 1).map(|_| ())
        };
        let home = tempfile::tempdir().unwrap();
        let engine = Arc::new(Memory::default());
        open(&engine, &home).unwrap();
        open(&engine, &home).unwrap();

        let mut batch = Batch::default();
        batch.put(FORM, 3u64.to_be_bytes().to_vec());
        engine.write(batch).unwrap();
        assert!(matches!(open(&engine, &home), Err(NodeError::Form { found: 3 })));

        let earlier = Arc::new(Memory::default());
        let mut batch = Batch::default();
        batch.put(numbered(GONE, FIRST_SPLIT), 7u64.to_be_bytes().to_vec());
        earlier.write(batch).unwrap();
        let error = open(&earlier, &tempfile::tempdir().unwrap()).unwrap_err();
        assert!(matches!(error, NodeError::Form { found: 1 }), "{error}");
        // A log without rows is none of a new node's either.
        let home = tempfile::tempdir().unwrap();
        let (mut wal, _) = Wal::open(Directory::new(home.path()).unwrap()).unwrap();
        wal.gather(b"of another form").unwrap();
        wal.commit().unwrap();
        let error = open(&Arc::new(Memory::default()), &home).unwrap_err();
        assert!(matches!(error, NodeError::Form { found: 1 }), "{error}");
    }
}
