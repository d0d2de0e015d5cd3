//! A node without I/O: what it does is a function of what it is asked, what it hears, and what time it is.
//!
//! The path of a commit: [`Node::request`] → `commit.rs` locks what is written here and asks the other splits' leaders
//! for promises → the decision goes into the log → [`Node::turn`] hears that it is agreed on → `wait.rs` lets its
//! timestamp pass → client and participants hear of it.

mod change;
mod commit;
mod locked;
mod request;
mod routes;
mod snapshot;
mod survey;
mod wait;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

pub use request::{Answer, Found, Held, Moment, NodeStatus, Refused, Request, SplitView};

use crate::{
    engine::Engine,
    group::{Dropped, Group, Groups, NodeError, Post},
    keys::Key,
    lease::NodeId,
    locks::{Changes, LockError},
    mvcc::MvccError,
    truetime::{Interval, Timestamp},
    txn::{Applied, Entry, Leader, Outcome, Refusal, Replica, SplitId, TxnId},
    wal::Disk,
    wire::{self, PeerMessage, Route},
};
use change::Changing;
use commit::{Asked, Committing};
use locked::LockWait;
use routes::Routes;
use snapshot::Pending;
use survey::Surveys;
use wait::Due;

/// How often [`Node::tick`] is called.
pub const TICK: Duration = Duration::from_millis(10);

/// Ticks between what nodes tell each other of their splits.
const ROUTES_TICKS: u64 = 20;
/// Ticks between telling everything that is known, for splits of which a node has no replica.
const ALL_ROUTES_TICKS: u64 = 100;
/// Ticks after which a moment is closed without anybody asking.
const CLOSE_TICKS: u64 = 100;
/// Ticks between looks at transactions that nobody asks for any more, and at locks waited for too long.
const EXPIRE_TICKS: u64 = 25;
/// Ticks between checkpoints.
const CHECKPOINT_TICKS: u64 = 500;
/// Ticks between forgetting outcomes that are too old.
const FORGET_TICKS: u64 = 1_000;
/// A turn does not go on for ever while others wait.
const ROUNDS_PER_TURN: usize = 8;

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
    /// How long versions of rows are kept.
    pub keep: Duration,
    /// How long the outcomes of attempts are kept: how long a client may ask how its commit ended.
    pub keep_outcomes: Duration,
    /// When splits are cut, merged and moved without anybody asking.
    pub balance: Balance,
    /// Versions of rows that are looked at in one step of a survey, and forgotten in one entry of the log. By default a
    /// millisecond or two of work, and in all steps more than are written meanwhile.
    pub survey_versions: usize,
    /// Of entries before a checkpoint that are kept at hand, all splits together. A node that was away and missed more of a
    /// split than its share gets all of the split's rows instead.
    pub tail_bytes: usize,
}

/// When splits are cut, merged and moved without anybody asking.
#[derive(Clone, Copy, Debug)]
pub struct Balance {
    /// A split with more bytes than this is cut.
    pub split_bytes: u64,
    /// A split with more requests a second than this is cut.
    pub split_load: u64,
    /// Neighbours with fewer bytes than this together are merged, when they are idle.
    pub merge_bytes: u64,
    /// How long neighbours must have been idle.
    pub merge_after: Duration,
    /// Whether replicas and leaders are spread over the nodes.
    pub spread: bool,
}

impl Balance {
    /// Nothing happens unless somebody asks for it.
    pub const OFF: Self = Self {
        split_bytes: u64::MAX,
        split_load: u64::MAX,
        merge_bytes: 0,
        merge_after: Duration::MAX,
        spread: false,
    };
}

impl Default for Balance {
    fn default() -> Self {
        Self {
            split_bytes: 16 << 20,
            split_load: 4_000,
            merge_bytes: 4 << 20,
            merge_after: Duration::from_secs(600),
            spread: true,
        }
    }
}

impl Config {
    /// A node with the defaults of everything else.
    pub fn new(me: NodeId, first: Vec<NodeId>, seed: u64) -> Self {
        Self {
            me,
            first,
            seed,
            keep: Duration::from_secs(300),
            keep_outcomes: Duration::from_secs(60),
            balance: Balance::default(),
            survey_versions: 1024,
            tail_bytes: 64 << 20,
        }
    }
}

/// A node.
pub struct Node<D> {
    config: Config,
    groups: Groups<D>,
    routes: Routes,
    random: Random,
    ticks: u64,
    /// When the last checkpoint was made, in ticks.
    checkpointed: u64,
    /// When each node was heard last, in ticks.
    heard: BTreeMap<NodeId, u64>,
    answers: Vec<(u64, Result<Answer, Refused>)>,
    outbox: Vec<(NodeId, PeerMessage)>,
    /// What this node says to itself.
    inbox: VecDeque<PeerMessage>,
    /// Transactions that wait for locks, and what they do with them.
    lock_waits: BTreeMap<(SplitId, TxnId), LockWait>,
    /// Locks granted and not yet used.
    granted: VecDeque<(SplitId, TxnId)>,
    /// Commits that this node coordinates.
    commits: BTreeMap<TxnId, Committing>,
    /// Aborts on their way into a coordinator's log, with those who must hear of them.
    aborts: BTreeMap<(SplitId, TxnId), BTreeSet<SplitId>>,
    /// Who asked a split for a promise.
    askers: BTreeMap<(SplitId, TxnId), (SplitId, NodeId)>,
    /// Participants that have logged a decision.
    heard_of: BTreeMap<(SplitId, TxnId), BTreeSet<SplitId>>,
    /// Attempts that their clients rolled back here, and when.
    rolled_back: BTreeMap<TxnId, Timestamp>,
    due: BTreeMap<(Timestamp, u64), Due>,
    dues: u64,
    snapshots: Vec<Pending>,
    changing: BTreeMap<SplitId, Changing>,
    loads: BTreeMap<SplitId, change::Load>,
    surveys: Surveys,
    status: NodeStatus,
    failed: Option<NodeError>,
}

impl<D: Disk> Node<D> {
    /// The node as its disk remembers it.
    ///
    /// # Errors
    ///
    /// When its log or its rows cannot be used.
    pub fn open(config: Config, disk: D, engine: Arc<dyn Engine>) -> Result<Self, NodeError> {
        let groups = Groups::open(config.me, &config.first, disk, engine, config.tail_bytes)?;
        let heard = config.first.iter().map(|node| (*node, 0)).collect();
        let mut node = Self {
            random: Random(config.seed),
            config,
            groups,
            routes: Routes::default(),
            ticks: 0,
            checkpointed: 0,
            heard,
            answers: Vec::new(),
            outbox: Vec::new(),
            inbox: VecDeque::new(),
            lock_waits: BTreeMap::new(),
            granted: VecDeque::new(),
            commits: BTreeMap::new(),
            aborts: BTreeMap::new(),
            askers: BTreeMap::new(),
            heard_of: BTreeMap::new(),
            rolled_back: BTreeMap::new(),
            due: BTreeMap::new(),
            dues: 0,
            snapshots: Vec::new(),
            changing: BTreeMap::new(),
            loads: BTreeMap::new(),
            surveys: Surveys::default(),
            status: NodeStatus::default(),
            failed: None,
        };
        node.look_at_own();
        Ok(node)
    }

    /// Another node that there is. Who speaks to this one is known without it.
    pub fn meet(&mut self, node: NodeId) {
        self.heard.entry(node).or_insert(0);
    }

    /// Takes a request, to be answered by a later [`Node::turn`].
    pub fn request(&mut self, token: u64, request: Request, now: Interval) {
        match request {
            Request::Read { attempt, held, keys } => self.read(token, attempt, held, keys, now),
            Request::Scan { attempt, held, range, limit } => {
                self.scan(token, attempt, held, range, limit, now);
            }
            Request::Commit { attempt, held, writes, arrived } => {
                let asked = Asked { token, attempt, arrived: arrived.min(now.latest) };
                self.commit(asked, &held, writes, now);
            }
            Request::Rollback { txn } => self.rollback(token, txn, now),
            Request::SnapshotRead { keys, moment } => self.snapshot_read(token, keys, moment, now),
            Request::SnapshotScan { range, moment, limit } => {
                self.snapshot_scan(token, &range, moment, limit, now);
            }
            Request::Splits => self.answer(token, Ok(Answer::Splits(self.views()))),
            Request::Status => self.answer(token, Ok(Answer::Status(Box::new(self.status(now))))),
            Request::Split { split, at } => self.begin_split(Some(token), split, at, now),
            Request::Merge { split } => self.begin_merge(Some(token), split, now),
            Request::Move { split, from, to } => self.begin_move(Some(token), split, from, to, now),
            Request::Lead { split, node } => self.begin_lead(Some(token), split, node, now),
        }
        self.use_locks(now);
    }

    /// Takes a message of another node's.
    pub fn message(&mut self, from: NodeId, message: &[u8], now: Interval) {
        self.heard.insert(from, self.ticks);
        // Copied once, since entries of it are kept, and would keep all that it came with. What does not read is nobody's:
        // messages are lost anyway.
        if let Ok(message) = wire::decode_peer(Bytes::copy_from_slice(message)) {
            self.hear(from, message, now);
            self.use_locks(now);
        }
    }

    /// Time goes on: to be called every [`TICK`], unless the clock has no bound.
    pub fn tick(&mut self, now: Interval) {
        self.ticks += 1;
        self.groups.tick();
        self.groups.renew(now);
        if self.ticks.is_multiple_of(ROUTES_TICKS) {
            self.look_at_own();
            self.tell_routes();
        }
        if self.ticks.is_multiple_of(EXPIRE_TICKS) {
            self.expire(now);
        }
        if self.ticks.is_multiple_of(CLOSE_TICKS) {
            self.close_all(now);
            self.ask_to_leave();
        }
        if self.ticks.is_multiple_of(FORGET_TICKS) {
            self.forget_all(now);
        }
        self.surveys_go_on(now);
        self.commits_go_on(now);
        self.changes_go_on(now);
        self.use_locks(now);
    }

    /// Does what can be done now: writes and syncs the log, sends, answers. To be called after any of the others, and
    /// at [`Node::wake`].
    ///
    /// # Errors
    ///
    /// When the node must stop.
    pub fn turn(&mut self, now: &dyn Fn() -> Interval, out: &mut dyn Outlet) -> Result<(), NodeError> {
        for _ in 0..ROUNDS_PER_TURN {
            self.go_on(now());
            self.flush(out);
            let applied = self.groups.turn(&mut Mail { out })?;
            let then = now();
            for (split, applied) in applied {
                self.applied(split, applied, then);
            }
            self.go_on(then);
            self.flush(out);
            if !self.groups.has_ready() {
                break;
            }
        }
        if self.ticks >= self.checkpointed + CHECKPOINT_TICKS {
            self.checkpointed = self.ticks;
            self.groups.checkpoint()?;
        }
        self.failed.take().map_or(Ok(()), Err)
    }

    /// When `TT.earliest` is past this there is something to do.
    pub fn wake(&self) -> Option<Timestamp> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    /// Its splits.
    pub fn groups(&self) -> &Groups<D> {
        &self.groups
    }

    /// The disk, to be opened again.
    pub fn into_disk(self) -> D {
        self.groups.into_disk()
    }

    fn go_on(&mut self, now: Interval) {
        self.pass(now);
        self.use_locks(now);
        while let Some(message) = self.inbox.pop_front() {
            self.hear(self.config.me, message, now);
            self.use_locks(now);
        }
        self.retry_snapshots(now);
    }

    fn flush(&mut self, out: &mut dyn Outlet) {
        for (to, message) in self.outbox.drain(..) {
            out.send(to, wire::encode_peer(&message));
        }
        for (token, answer) in self.answers.drain(..) {
            out.answer(token, answer);
        }
    }

    fn hear(&mut self, from: NodeId, message: PeerMessage, now: Interval) {
        match message {
            PeerMessage::Raft { split, message } => {
                if let Err(Dropped::Stranger { .. } | Dropped::Unknown(_)) =
                    self.groups.step(from, split, message)
                {
                    self.bid_farewell(from, split);
                }
            }
            PeerMessage::Prepare { split, attempt, held, writes, coordinator } => {
                self.asked_to_promise(from, split, attempt, held, writes, coordinator, now);
            }
            PeerMessage::Vote { split, txn, vote, .. } => self.voted(split, txn, vote, now),
            PeerMessage::Decided { split, txn, coordinator, outcome } => {
                self.decided(from, split, txn, coordinator, outcome, now);
            }
            PeerMessage::Heard { split, txn, coordinator } => {
                self.heard_of.entry((coordinator, txn)).or_default().insert(split);
            }
            PeerMessage::Ask { split, txn, coordinator } => {
                self.asked_for_decision(from, split, txn, coordinator, now);
            }
            PeerMessage::Wound { txn, .. } => self.wounded(txn),
            PeerMessage::Close { split, at } => self.close(split, at, now),
            PeerMessage::Routes(routes) => {
                for route in routes {
                    self.learn(route);
                }
            }
            PeerMessage::Leaving { split } => self.bid_farewell(from, split),
            PeerMessage::Gone { split, term, last } => {
                let left = self.groups.leave(from, split, term, last);
                self.note_failure(left);
            }
            PeerMessage::Retire { split, into } => self.begin_retire(split, into, now),
        }
    }

    fn applied(&mut self, split: SplitId, applied: Applied, now: Interval) {
        match applied {
            Applied::Prepared(txn, at) => self.promised(split, txn, at),
            Applied::Ended(txn, outcome) => self.ended(split, txn, outcome, now),
            Applied::Split(right) => self.was_split(split, right),
            Applied::Absorbed(right) => self.was_merged(split, right),
            Applied::Retired | Applied::Lease(_) => self.look_at_own(),
            Applied::Nothing => {}
        }
    }

    /// The leader's part of a split that this node leads.
    fn led(&mut self, split: SplitId) -> Option<(&mut Leader, &Replica)> {
        self.groups.get_mut(split).and_then(Group::leader)
    }

    /// Puts what a leader made into its log at once: nothing came between.
    fn propose(&mut self, split: SplitId, entry: &Entry) -> bool {
        self.groups.get_mut(split).is_some_and(|group| group.propose(entry).is_ok())
    }

    /// The split that has `key`, by number.
    fn split_of(&self, key: &Key) -> Result<SplitId, Refused> {
        self.routes.of(key).map(|route| route.split).ok_or(Refused::NotHere { leader: None })
    }

    fn leader_of(&self, split: SplitId) -> Option<NodeId> {
        let local = self.groups.get(split).and_then(Group::led_by);
        local.or_else(|| self.routes.leader(split))
    }

    fn not_leader(&self, split: SplitId) -> Refused {
        let leader = self.leader_of(split).filter(|leader| *leader != self.config.me);
        Refused::NotLeader { leader }
    }

    fn refused(&self, split: SplitId, refusal: Refusal) -> Refused {
        match refusal {
            Refusal::NotServing => self.not_leader(split),
            Refusal::Frozen => Refused::Busy("it is about to be changed"),
            Refusal::Lost | Refusal::Lock(LockError::Prepared) => Refused::Aborted,
            Refusal::Ended(_) => Refused::Ended,
            Refusal::Committing => Refused::Busy("the transaction's commit is under way"),
            Refusal::LeaseTooShort => Refused::Busy("its leader's lease is about to end"),
            Refusal::Future { asked, latest } => Refused::Future { asked, latest },
            // What it asked for before may still be waiting after its client has given that up.
            Refusal::Lock(LockError::Waiting) => {
                Refused::Busy("the transaction waits for other locks here: one step at a time")
            }
            Refusal::Lock(error @ LockError::TooMany) => Refused::TooMuch(error.to_string()),
            Refusal::Lock(LockError::Overloaded) => Refused::Busy("too many transactions wait"),
        }
    }

    fn answer(&mut self, token: u64, answer: Result<Answer, Refused>) {
        self.answers.push((token, answer));
    }

    fn refuse(&mut self, tokens: impl IntoIterator<Item = u64>, refused: &Refused) {
        self.answers.extend(tokens.into_iter().map(|token| (token, Err(refused.clone()))));
    }

    fn say(&mut self, to: NodeId, message: PeerMessage) {
        if to == self.config.me {
            self.inbox.push_back(message);
        } else {
            self.outbox.push((to, message));
        }
    }

    /// To whoever leads `split`. Nobody known: it is said again later.
    fn say_to_leader(&mut self, split: SplitId, message: PeerMessage) {
        if let Some(leader) = self.leader_of(split) {
            self.say(leader, message);
        }
    }

    fn say_to_all(&mut self, message: &PeerMessage) {
        for node in self.heard.keys().copied().chain([self.config.me]).collect::<BTreeSet<_>>() {
            self.say(node, message.clone());
        }
    }

    /// What locks have come free for, and who has lost theirs.
    fn absorb(&mut self, split: SplitId, changes: Changes) {
        self.status.wounded += changes.wounded.len() as u64;
        for txn in changes.wounded {
            match self.lock_waits.remove(&(split, txn)) {
                Some(wait) => self.give_up(split, wait, &Refused::Aborted),
                None => self.wounded_here(split, txn),
            }
        }
        self.granted.extend(changes.granted.into_iter().map(|txn| (split, txn)));
    }

    fn rows_failed(&mut self, split: SplitId, error: MvccError) -> Refused {
        match error {
            MvccError::Collected { asked, kept_since } => Refused::Collected { asked, kept_since },
            MvccError::Engine(error) => {
                self.failed.get_or_insert(NodeError::Engine(error));
                self.not_leader(split)
            }
        }
    }

    fn note_failure<T>(&mut self, result: Result<T, NodeError>) {
        if let Err(error) = result {
            self.failed.get_or_insert(error);
        }
    }

    /// Transactions that nobody asks for any more, and splits that this node leads no longer.
    fn expire(&mut self, now: Interval) {
        let led: Vec<_> = self.groups.iter().map(|(split, _)| split).collect();
        for split in led {
            let changes = self.led(split).map(|(leader, replica)| leader.expire(replica, now));
            self.absorb(split, changes.unwrap_or_default());
        }
        for (split, txn) in self.lock_waits.keys().copied().collect::<Vec<_>>() {
            self.drop_stale_wait(split, txn);
        }
        let over: Vec<_> =
            self.lock_waits.iter().filter(|(_, wait)| now.is_after(wait.until)).map(|(at, _)| *at).collect();
        for (split, txn) in over {
            if let Some(wait) = self.lock_waits.remove(&(split, txn)) {
                self.give_up(split, wait, &Refused::Busy("a lock was waited for too long"));
                let changes = self.led(split).map(|(leader, replica)| leader.abandon(replica, txn));
                self.absorb(split, changes.unwrap_or_default());
            }
        }
        let kept = self.config.keep_outcomes;
        self.rolled_back.retain(|_, at| !now.is_after(at.plus(kept)));
        self.askers.retain(|(split, txn), _| {
            self.groups.get(*split).is_some_and(|group| group.replica().outcome(*txn).is_none())
        });
        self.heard_of.retain(|(split, txn), _| {
            self.groups
                .get(*split)
                .is_some_and(|group| group.replica().unsettled().any(|(open, _)| open == *txn))
        });
        self.aborts.retain(|(split, txn), _| {
            self.groups.get(*split).is_some_and(|group| group.replica().outcome(*txn).is_none())
        });
    }

    fn close_all(&mut self, now: Interval) {
        let splits: Vec<_> = self.groups.iter().map(|(split, _)| split).collect();
        for split in splits {
            self.close(split, now.earliest, now);
        }
    }

    /// Closes a moment of a split that this node leads, if it may: whoever wants it asks again.
    fn close(&mut self, split: SplitId, at: Timestamp, now: Interval) {
        let entry = self.led(split).and_then(|(leader, replica)| {
            let asked = replica.safe_time().closed() < at;
            asked.then(|| leader.close_at(replica, at, now).ok()).flatten()
        });
        if let Some(entry) = entry {
            self.propose(split, &entry);
        }
    }

    fn forget_all(&mut self, now: Interval) {
        let outcomes = now.earliest.minus(self.config.keep_outcomes);
        let splits: Vec<_> = self.groups.iter().map(|(split, _)| split).collect();
        for split in splits {
            let entry = self
                .led(split)
                .and_then(|(leader, replica)| leader.forget_outcomes(replica, outcomes, now).ok());
            if let Some(entry) = entry {
                self.propose(split, &entry);
            }
        }
    }

    /// What this node's own replicas say of their splits.
    fn look_at_own(&mut self) {
        let routes: Vec<_> = self
            .groups
            .iter()
            .filter(|(_, group)| group.is_filled())
            .map(|(_, group)| route(group))
            .collect();
        for route in routes {
            self.routes.learn(route);
        }
    }

    fn learn(&mut self, route: Route) {
        for node in &route.nodes {
            self.meet(*node);
        }
        self.routes.learn(route);
    }

    fn tell_routes(&mut self) {
        let all = self.ticks.is_multiple_of(ALL_ROUTES_TICKS);
        let me = self.config.me;
        let told: Vec<_> =
            self.routes.iter().filter(|route| all || route.leader == Some(me)).cloned().collect();
        // Who has nothing to tell is there all the same.
        let others: Vec<_> = self.heard.keys().copied().filter(|node| *node != me).collect();
        for node in others {
            self.say(node, PeerMessage::Routes(told.clone()));
        }
    }

    /// Tells a node that is none of the split's so, if this one leads it, or knows that it is part of another.
    fn bid_farewell(&mut self, to: NodeId, split: SplitId) {
        let led = self.groups.get(split).and_then(|group| group.farewell(to));
        let told = if self.groups.is_absorbed(split) { Some((u64::MAX, u64::MAX)) } else { led };
        if let Some((term, last)) = told {
            self.say(to, PeerMessage::Gone { split, term, last });
        }
    }

    /// Asks about replicas that this node should not have, as far as it knows, and about those that nobody fills.
    fn ask_to_leave(&mut self) {
        let leaving: Vec<_> = self
            .groups
            .iter()
            .filter(|(_, group)| !group.is_filled() || !group.is_member() || group.is_left_over())
            .map(|(split, _)| split)
            .collect();
        for split in leaving {
            self.say_to_all(&PeerMessage::Leaving { split });
        }
    }

    fn views(&self) -> Vec<SplitView> {
        let view = |route: &Route| {
            let group = self.groups.get(route.split).filter(|group| group.is_filled());
            SplitView {
                id: route.split,
                range: route.range.clone(),
                generation: route.generation,
                nodes: route.nodes.clone(),
                leader: group.and_then(Group::led_by).or(route.leader),
                size: group.map(|group| group.replica().size()),
                load: self.loads.get(&route.split).map(change::Load::of_late),
            }
        };
        self.routes.iter().map(view).collect()
    }

    fn status(&self, now: Interval) -> NodeStatus {
        let me = self.config.me;
        let led = self.groups.iter().filter(|(_, group)| group.led_by() == Some(me)).count();
        NodeStatus {
            epsilon: Duration::from_nanos((now.latest.0 - now.earliest.0) / 2),
            splits: self.groups.iter().count(),
            leads: led,
            in_doubt: self.groups.iter().map(|(_, group)| group.replica().in_doubt().count()).sum(),
            log_syncs: self.groups.syncs(),
            log_bytes: self.groups.log_bytes(),
            ..self.status.clone()
        }
    }
}

fn route(group: &Group) -> Route {
    let replica = group.replica();
    let (voters, learners) = group.nodes();
    Route {
        split: replica.split(),
        range: replica.range().clone(),
        generation: replica.generation(),
        nodes: voters.into_iter().chain(learners).collect(),
        leader: group.led_by(),
        term: group.term(),
    }
}

/// Carries consensus to the other nodes while the log is being written.
struct Mail<'a> {
    out: &'a mut dyn Outlet,
}

impl Post for Mail<'_> {
    fn post(&mut self, split: SplitId, to: NodeId, message: Vec<u8>) {
        let message = PeerMessage::Raft { split, message: message.into() };
        self.out.send(to, wire::encode_peer(&message));
    }
}

/// SplitMix64 (Steele et al. 2014): numbers of splits need to differ, and no more than that.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// How an attempt that a log knows ended, for a client that asks again.
fn told(outcome: Outcome) -> Option<Timestamp> {
    match outcome {
        Outcome::Committed(at) => Some(at),
        Outcome::Aborted => None,
    }
}
