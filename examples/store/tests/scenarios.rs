//! What broke real systems, each once, with whole nodes on real logs and a network that does as it is told.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests"
)]

use std::{cmp::Reverse, collections::BTreeMap, ops::ControlFlow, sync::Arc, time::Duration};

use bytes::Bytes;
use store::{
    engine::{Engine as _, Memory},
    keys::{Key, Range},
    lease::{LEASE, NodeId},
    locks::Age,
    mvcc::Mutation,
    node::{Answer, Balance, Config, Found, Held, Moment, Node, Outlet, Refused, Request},
    truetime::{Interval, Manual, Timestamp, TrueTime as _},
    txn::{Attempt, Outcome, SplitId, TxnId},
    wal::Directory,
    wire::{PeerMessage, decode_peer},
};
use tempfile::TempDir;

const EPSILON: Duration = Duration::from_millis(2);
const STEP: Duration = Duration::from_millis(1);
const TICK_STEPS: u64 = 10;
/// Many times what an election and a lease that runs out take.
const STEPS_MAX: u64 = 30_000;
const NODES: usize = 4;

type Heard = Result<Answer, Refused>;
type Loss = Box<dyn Fn(usize, usize, &PeerMessage) -> bool>;

struct Machine {
    id: NodeId,
    node: Option<Node<Directory>>,
    rows: Memory,
    clock: Manual,
    paused: bool,
}

struct Cluster {
    home: TempDir,
    machines: Vec<Machine>,
    steps: u64,
    tokens: u64,
    answers: BTreeMap<u64, Heard>,
    /// From, to, message: whether it is lost.
    loses: Loss,
    balance: Balance,
}

struct Post {
    sent: Vec<(NodeId, Vec<u8>)>,
    answers: Vec<(u64, Heard)>,
}

impl Outlet for Post {
    fn send(&mut self, to: NodeId, message: Vec<u8>) {
        self.sent.push((to, message));
    }
    fn answer(&mut self, token: u64, answer: Heard) {
        self.answers.push((token, answer));
    }
}

impl Cluster {
    fn start() -> Self {
        Self::start_with(Balance::OFF)
    }

    fn start_with(balance: Balance) -> Self {
        let home = tempfile::tempdir().unwrap();
        let machine = |at: usize| Machine {
            id: NodeId(at as u64 + 1),
            node: None,
            rows: Memory::default(),
            clock: Manual::new(Timestamp(1_000_000_000_000), EPSILON),
            paused: false,
        };
        let mut cluster = Self {
            home,
            machines: (0..NODES).map(machine).collect(),
            steps: 0,
            tokens: 0,
            answers: BTreeMap::new(),
            loses: Box::new(|_, _, _| false),
            balance,
        };
        (0..NODES).for_each(|at| cluster.open(at));
        cluster.until("somebody leads", |cluster| cluster.leading("a").is_some());
        // Until all have heard of each other.
        cluster.run(Duration::from_secs(1));
        cluster
    }

    fn open(&mut self, at: usize) {
        let id = self.machines[at].id;
        self.reopen_as(at, id);
    }

    fn reopen_as(&mut self, at: usize, id: NodeId) {
        let me = at as u64 + 1;
        let first = if id.0 <= 3 { (1..=3).map(NodeId).collect() } else { vec![] };
        self.machines[at].id = id;
        let mut config = Config::new(id, first, me);
        config.tail_bytes = 10_000;
        config.balance = self.balance;
        let disk = Directory::new(&self.home.path().join(me.to_string())).unwrap();
        let mut node = Node::open(config, disk, Arc::new(self.machines[at].rows.clone())).unwrap();
        (1..=NODES as u64).for_each(|other| node.meet(NodeId(other)));
        self.machines[at].node = Some(node);
    }

    /// `kill -9`: what was written is there, what the engine was not asked to sync may not be.
    fn kill(&mut self, at: usize) {
        self.machines[at].node = None;
        self.machines[at].rows.crash(0);
    }

    fn now(&self, at: usize) -> Interval {
        self.machines[at].clock.now().unwrap()
    }

    fn step(&mut self) {
        self.steps += 1;
        for at in 0..NODES {
            self.machines[at].clock.advance(STEP);
            let now = self.now(at);
            let machine = &mut self.machines[at];
            let ticks = !machine.paused && self.steps % TICK_STEPS == at as u64;
            if let Some(node) = machine.node.as_mut().filter(|_| ticks) {
                node.tick(now);
            }
        }
        while self.exchange() {}
    }

    /// One turn of every node, and what they said. False when nobody said anything.
    fn exchange(&mut self) -> bool {
        let mut said = vec![];
        for at in 0..NODES {
            let now = self.now(at);
            let machine = &mut self.machines[at];
            let Some(node) = machine.node.as_mut().filter(|_| !machine.paused) else { continue };
            let mut post = Post { sent: vec![], answers: vec![] };
            node.turn(&|| now, &mut post).unwrap();
            said.extend(post.sent.into_iter().map(|(to, message)| (at, to, message)));
            self.answers.extend(post.answers);
        }
        let quiet = said.is_empty();
        for (from, to, message) in said {
            // Nobody listens under the id of a disk that is gone.
            let Some(to) = self.machines.iter().position(|machine| machine.id == to) else { continue };
            let read = decode_peer(Bytes::from(message.clone())).unwrap();
            if (self.loses)(from, to, &read) {
                continue;
            }
            let (now, sender) = (self.now(to), self.machines[from].id);
            let machine = &mut self.machines[to];
            if let Some(node) = machine.node.as_mut().filter(|_| !machine.paused) {
                node.message(sender, &message, now);
            }
        }
        !quiet
    }

    #[track_caller]
    fn until(&mut self, what: &str, mut reached: impl FnMut(&mut Self) -> bool) {
        for _ in 0..STEPS_MAX {
            self.step();
            if reached(self) {
                return;
            }
        }
        panic!("it never came to that {what}:{}", self.tell());
    }

    /// How everything is, for a person to see what is wrong.
    fn tell(&self) -> String {
        let mut told = String::new();
        for machine in &self.machines {
            told += &format!("\n  {:?}", machine.id);
            for (split, group) in machine.node.iter().flat_map(|node| node.groups().iter()) {
                let (nodes, leader) = (group.nodes(), group.led_by());
                let (size, range) = (group.replica().size(), group.replica().range());
                told += &format!("\n    {split:?} led by {leader:?}, {nodes:?}, {size:?}, {range:?}");
            }
        }
        told
    }

    fn run(&mut self, time: Duration) {
        (0..time.as_millis()).for_each(|_| self.step());
    }

    /// The machine that leads and serves the split of `row`.
    fn leading(&self, row: &str) -> Option<usize> {
        let key = key(row);
        (0..NODES).find(|at| {
            let now = self.now(*at);
            let groups = self.machines[*at].node.as_ref().filter(|_| !self.machines[*at].paused);
            groups.is_some_and(|node| {
                node.groups().iter().any(|(_, group)| {
                    let me = store::lease::Tenure { node: self.machines[*at].id, term: group.term() };
                    let replica = group.replica();
                    replica.range().contains(&key)
                        && replica.retired().is_none()
                        && replica.lease().serves(me, now)
                })
            })
        })
    }

    fn split_of(&self, row: &str) -> SplitId {
        let at = self.leading(row).unwrap();
        let groups = self.machines[at].node.as_ref().unwrap().groups();
        groups.iter().find(|(_, group)| group.replica().range().contains(&key(row))).unwrap().0
    }

    /// The split of `row` as anybody knows it, led or not.
    fn split_of_any(&self, row: &str) -> SplitId {
        let nodes = self.machines.iter().filter_map(|machine| machine.node.as_ref());
        let mut groups = nodes.flat_map(|node| node.groups().iter());
        groups.find(|(_, group)| group.replica().range().contains(&key(row))).unwrap().0
    }

    fn ask(&mut self, at: usize, request: Request) -> u64 {
        self.tokens += 1;
        let now = self.now(at);
        self.machines[at].node.as_mut().unwrap().request(self.tokens, request, now);
        self.tokens
    }

    #[track_caller]
    fn hear(&mut self, token: u64) -> Heard {
        self.until("an answer comes", |cluster| cluster.answers.contains_key(&token));
        self.answers.remove(&token).unwrap()
    }

    fn asked(&mut self, at: usize, request: Request) -> Heard {
        let token = self.ask(at, request);
        self.hear(token)
    }

    /// To whoever leads the split of `row`, again as long as that is all that is wrong.
    #[track_caller]
    fn led(&mut self, row: &str, request: Request) -> Heard {
        for _ in 0..100 {
            self.until("somebody leads", |cluster| cluster.leading(row).is_some());
            let at = self.leading(row).unwrap();
            match self.asked(at, request.clone()) {
                Err(Refused::NotLeader { .. } | Refused::NotHere { .. } | Refused::Busy(_)) => {
                    self.run(Duration::from_millis(50));
                }
                heard => return heard,
            }
        }
        panic!("never an answer to {request:?}");
    }

    fn attempt(&self, number: u64) -> Attempt {
        let started = self.now(0).latest;
        let age = Age { first: Timestamp(number), client: number, attempt: Reverse(0) };
        Attempt { txn: TxnId { started, random: number }, age }
    }

    #[track_caller]
    fn read(&mut self, attempt: Attempt, held: &mut Vec<Held>, row: &str) -> Option<String> {
        let request = Request::Read { attempt, held: held.clone(), keys: vec![key(row)] };
        match self.led(row, request) {
            Ok(Answer::Rows { rows, held: now, .. }) => {
                *held = now;
                value(&rows[0])
            }
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn commit(
        &mut self,
        attempt: Attempt,
        held: &[Held],
        writes: &[(&str, &str)],
    ) -> Result<Timestamp, Refused> {
        match self.led(writes[0].0, commit(attempt, held, writes))? {
            Answer::Committed { at } => Ok(at),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn write(&mut self, number: u64, row: &str, value: &str) -> Timestamp {
        let attempt = self.attempt(number);
        self.commit(attempt, &[], &[(row, value)]).unwrap()
    }

    #[track_caller]
    fn snapshot(&mut self, at: usize, row: &str, moment: Moment) -> Result<Option<String>, Refused> {
        match self.asked(at, Request::SnapshotRead { keys: vec![key(row)], moment })? {
            Answer::Rows { rows, .. } => Ok(value(&rows[0])),
            other => panic!("{other:?}"),
        }
    }

    /// Cuts the split of `row` there, and waits until the right half is led.
    #[track_caller]
    fn cut(&mut self, row: &str) -> SplitId {
        let split = self.split_of(row);
        let request = Request::Split { split, at: Some(key(row)) };
        let Ok(Answer::Split { right }) = self.led(row, request) else { panic!("not split") };
        self.until("the right half is led", |cluster| {
            cluster.leading(row).is_some() && cluster.split_of(row) == right
        });
        self.run(Duration::from_millis(500));
        right
    }

    fn in_doubt(&self) -> usize {
        let nodes = self.machines.iter().filter_map(|machine| machine.node.as_ref());
        nodes.flat_map(|node| node.groups().iter()).map(|(_, group)| group.replica().in_doubt().count()).sum()
    }
}

fn key(row: &str) -> Key {
    Key::new("acct", row.as_bytes()).unwrap()
}

fn value(found: &Found) -> Option<String> {
    found.value.as_ref().map(|value| String::from_utf8(value.to_vec()).unwrap())
}

fn commit(attempt: Attempt, held: &[Held], writes: &[(&str, &str)]) -> Request {
    let write = |(row, value): &(&str, &str)| Mutation {
        key: key(row),
        value: Some(Bytes::copy_from_slice(value.as_bytes())),
    };
    let (held, writes) = (held.to_vec(), writes.iter().map(write).collect());
    Request::Commit { attempt, held, writes, arrived: Timestamp::MAX }
}

fn cut_off(at: usize) -> Loss {
    Box::new(move |from, to, _| from == at || to == at)
}

#[test]
fn what_was_committed_is_there_after_all_nodes_were_killed() {
    let mut cluster = Cluster::start();
    let at = cluster.write(1, "a", "one");
    (0..NODES).for_each(|at| cluster.kill(at));
    (0..NODES).for_each(|at| cluster.open(at));
    cluster.until("somebody leads", |cluster| cluster.leading("a").is_some());
    let leader = cluster.leading("a").unwrap();
    assert_eq!(cluster.snapshot(leader, "a", Moment::Now), Ok(Some("one".into())));
    assert_eq!(cluster.snapshot(leader, "a", Moment::Exactly(at.before())), Ok(None));
    assert!(cluster.write(2, "a", "two") > at);
}

#[test]
fn a_stale_read_after_a_change_of_leader_does_not_happen() {
    let mut cluster = Cluster::start();
    cluster.write(1, "a", "one");
    let old = cluster.leading("a").unwrap();
    // It is cut off, and does not know it yet.
    cluster.loses = cut_off(old);
    cluster.until("another one leads", |cluster| cluster.leading("a").is_some_and(|at| at != old));
    cluster.write(2, "a", "two");
    // Asked after that, it must not show what it has.
    let heard = cluster.snapshot(old, "a", Moment::Now);
    assert!(matches!(heard, Err(Refused::TooStale { .. })), "{heard:?}");
    let attempt = cluster.attempt(3);
    let read = cluster.asked(old, Request::Read { attempt, held: vec![], keys: vec![key("a")] });
    assert!(matches!(read, Err(Refused::NotLeader { .. })), "{read:?}");
    cluster.loses = Box::new(|_, _, _| false);
    cluster
        .until("it has heard", |cluster| cluster.snapshot(old, "a", Moment::Now) == Ok(Some("two".into())));
}

#[test]
fn a_leader_that_was_paused_for_longer_than_its_lease_says_nothing() {
    let mut cluster = Cluster::start();
    cluster.write(1, "a", "one");
    let old = cluster.leading("a").unwrap();
    let attempt = cluster.attempt(2);
    cluster.machines[old].paused = true;
    // It was asked in the moment that it stopped.
    let read = cluster.ask(old, Request::Read { attempt, held: vec![], keys: vec![key("a")] });
    cluster.run(2 * LEASE);
    cluster.until("another one leads", |cluster| cluster.leading("a").is_some());
    cluster.write(3, "a", "two");
    let write = cluster.ask(old, commit(cluster.attempt(4), &[], &[("a", "three")]));
    cluster.machines[old].paused = false;
    // What it had locked before is no answer to a client that asks again.
    if let Ok(Answer::Rows { rows, held, .. }) = cluster.hear(read) {
        assert_eq!(value(&rows[0]).as_deref(), Some("one"), "it answered in its own time");
        let ended = cluster.commit(attempt, &held, &[("a", "of what it read")]);
        assert_eq!(ended, Err(Refused::Aborted));
    }
    assert!(cluster.hear(write).is_err());
    let leader = cluster.leading("a").unwrap();
    assert_eq!(cluster.snapshot(leader, "a", Moment::Now), Ok(Some("two".into())));
}

#[test]
fn write_skew_through_a_range_does_not_happen() {
    let mut cluster = Cluster::start();
    cluster.write(1, "on/alice", "yes");
    cluster.write(2, "on/bob", "yes");
    let range = Range::rows("acct", b"on/", b"on0").unwrap();
    let scan = |attempt, held: &[Held]| Request::Scan {
        attempt,
        held: held.to_vec(),
        range: range.clone(),
        limit: 10,
    };
    // Each sees two on call, and wants to go.
    let (one, two) = (cluster.attempt(10), cluster.attempt(11));
    let mut held = vec![];
    for attempt in [one, two] {
        let Ok(Answer::Scanned { rows, held: now, .. }) = cluster.led("on/", scan(attempt, &[])) else {
            panic!("not scanned")
        };
        assert_eq!(rows.len(), 2);
        held.push(now);
    }
    let leader = cluster.leading("on/").unwrap();
    // The younger one waits for the older one's range, the older one ends the younger one.
    let younger = cluster.ask(leader, commit(two, &held[1], &[("on/bob", "no")]));
    let older = cluster.commit(one, &held[0], &[("on/alice", "no")]);
    assert!(older.is_ok(), "{older:?}");
    assert_eq!(cluster.hear(younger).unwrap_err(), Refused::Aborted);
}

#[test]
fn a_commit_that_is_sent_again_happens_once() {
    let mut cluster = Cluster::start();
    cluster.write(1, "a", "1");
    let attempt = cluster.attempt(2);
    let first = cluster.commit(attempt, &[], &[("a", "2")]).unwrap();
    cluster.write(3, "a", "3");
    // To the same leader, and to the next.
    assert_eq!(cluster.commit(attempt, &[], &[("a", "2")]), Ok(first));
    let leader = cluster.leading("a").unwrap();
    cluster.kill(leader);
    cluster.until("another one leads", |cluster| cluster.leading("a").is_some());
    assert_eq!(cluster.commit(attempt, &[], &[("a", "2")]), Ok(first));
    let leader = cluster.leading("a").unwrap();
    assert_eq!(cluster.snapshot(leader, "a", Moment::Now), Ok(Some("3".into())));
}

#[test]
fn a_transaction_in_doubt_ends_when_its_coordinator_is_lost() {
    for logged in [false, true] {
        let mut cluster = Cluster::start();
        cluster.cut("m");
        // The left half coordinates: it hears no vote, or nobody hears what it decided.
        cluster.loses = Box::new(move |from, to, message| match message {
            PeerMessage::Vote { .. } => !logged && from != to,
            PeerMessage::Decided { .. } | PeerMessage::Ask { .. } => logged,
            _ => false,
        });
        // Votes within a machine are not sent: the halves are led by two.
        let left = cluster.leading("a").unwrap();
        let other = (0..3).find(|at| *at != left).unwrap();
        let (right, node) = (cluster.split_of("m"), NodeId(other as u64 + 1));
        assert!(cluster.led("m", Request::Lead { split: right, node }).is_ok());
        cluster.until("another one leads the right half", |cluster| cluster.leading("m") == Some(other));
        cluster.run(Duration::from_millis(500));
        let attempt = cluster.attempt(1);
        let token = cluster.ask(left, commit(attempt, &[], &[("a", "1"), ("m", "1")]));
        cluster.until("it is promised", |cluster| cluster.in_doubt() > 0);
        if logged {
            assert!(cluster.hear(token).is_ok());
            assert!(cluster.in_doubt() > 0, "nobody has heard");
        }
        cluster.kill(left);
        cluster.loses = Box::new(|_, _, _| false);
        cluster.until("nothing is in doubt", |cluster| {
            cluster.leading("a").is_some() && cluster.leading("m").is_some() && cluster.in_doubt() == 0
        });
        let expected = logged.then(|| "1".to_owned());
        for row in ["a", "m"] {
            let leader = cluster.leading(row).unwrap();
            assert_eq!(cluster.snapshot(leader, row, Moment::Now), Ok(expected.clone()), "{row}");
        }
    }
}

#[test]
fn a_snapshot_at_a_moment_that_is_still_being_prepared_waits() {
    let mut cluster = Cluster::start();
    cluster.cut("m");
    let left = cluster.leading("a").unwrap();
    let other = (0..3).find(|at| *at != left).unwrap();
    let (right, node) = (cluster.split_of("m"), NodeId(other as u64 + 1));
    assert!(cluster.led("m", Request::Lead { split: right, node }).is_ok());
    cluster.until("another one leads the right half", |cluster| cluster.leading("m") == Some(other));
    cluster.run(Duration::from_millis(500));
    cluster.loses = Box::new(|_, _, message| matches!(message, PeerMessage::Vote { .. }));
    let attempt = cluster.attempt(1);
    let token = cluster.ask(left, commit(attempt, &[], &[("a", "1"), ("m", "1")]));
    cluster.until("it is promised", |cluster| cluster.in_doubt() > 0);
    let moment = Moment::Exactly(cluster.now(other).latest);
    let early = cluster.ask(other, Request::SnapshotRead { keys: vec![key("m")], moment });
    let elsewhere = cluster.ask(other, Request::SnapshotRead { keys: vec![key("n")], moment });
    assert!(cluster.hear(elsewhere).is_ok(), "what is not promised is not waited for");
    assert!(!cluster.answers.contains_key(&early));
    cluster.loses = Box::new(|_, _, _| false);
    let Ok(Answer::Committed { at }) = cluster.hear(token) else { panic!("not committed") };
    let Ok(Answer::Rows { rows, .. }) = cluster.hear(early) else { panic!("not shown") };
    let Moment::Exactly(asked) = moment else { panic!() };
    assert_eq!(value(&rows[0]).is_some(), at <= asked);
}

#[test]
fn a_clock_that_jumps_on_the_leader_within_its_bound_changes_nothing() {
    let mut cluster = Cluster::start();
    let leader = cluster.leading("a").unwrap();
    let mut last = cluster.write(1, "a", "0");
    for number in 2..20 {
        // As far as it vouches for, this way and that.
        let clock = &cluster.machines[leader].clock;
        let now = clock.now().unwrap().earliest.plus(EPSILON);
        clock.set(if number % 2 == 0 { now.plus(EPSILON) } else { now.minus(EPSILON) });
        let at = cluster.write(number, "a", &number.to_string());
        assert!(at > last, "{at} after {last}");
        let other = (leader + 1) % 3;
        let now = cluster.machines[other].clock.now().unwrap().latest;
        assert_eq!(cluster.snapshot(other, "a", Moment::Exactly(now)), Ok(Some(number.to_string())));
        last = at;
    }
}

/// Whoever went on asking another node cost a write of each log for each read.
#[test]
fn what_is_committed_up_to_now_is_the_leaders_to_show() {
    let mut cluster = Cluster::start();
    cluster.write(1, "a", "1");
    let leader = cluster.leading("a").unwrap();
    let others = (0..3).filter(|other| *other != leader).collect::<Vec<_>>();
    for other in others {
        let refused = Refused::NotLeader { leader: Some(NodeId(leader as u64 + 1)) };
        assert_eq!(cluster.snapshot(other, "a", Moment::Now), Err(refused));
    }
    assert_eq!(cluster.snapshot(leader, "a", Moment::Now), Ok(Some("1".into())));
    // Who leads one of the splits shows all of them.
    cluster.cut("m");
    let shown = |cluster: &mut Cluster, at: usize| {
        let keys = vec![key("a"), key("z")];
        cluster.asked(at, Request::SnapshotRead { keys, moment: Moment::Now }).is_ok()
    };
    let (left, right) = (cluster.leading("a").unwrap(), cluster.leading("z").unwrap());
    assert!(shown(&mut cluster, left) && shown(&mut cluster, right));
}

#[test]
fn a_torn_last_record_is_what_was_never_acknowledged() {
    let mut cluster = Cluster::start();
    cluster.write(1, "a", "one");
    let follower = (cluster.leading("a").unwrap() + 1) % 3;
    cluster.kill(follower);
    let directory = cluster.home.path().join((follower + 1).to_string());
    let log = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let mut bytes = std::fs::read(&log).unwrap();
    // The first half of what it was about to write.
    bytes.extend((bytes.len() as u64).to_le_bytes());
    bytes.extend([200, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]);
    std::fs::write(&log, &bytes).unwrap();
    cluster.write(2, "a", "two");
    cluster.open(follower);
    cluster.until("it has caught up", |cluster| {
        cluster.snapshot(follower, "a", Moment::Now) == Ok(Some("two".into()))
    });
}

#[test]
fn a_split_during_a_prepared_transaction_waits_for_its_end() {
    let mut cluster = Cluster::start();
    cluster.cut("m");
    let left = cluster.leading("a").unwrap();
    let other = (0..3).find(|at| *at != left).unwrap();
    let (right, node) = (cluster.split_of("m"), NodeId(other as u64 + 1));
    assert!(cluster.led("m", Request::Lead { split: right, node }).is_ok());
    cluster.until("another one leads the right half", |cluster| cluster.leading("m") == Some(other));
    cluster.run(Duration::from_millis(500));
    cluster.loses = Box::new(|_, _, message| matches!(message, PeerMessage::Vote { .. }));
    let attempt = cluster.attempt(1);
    let token = cluster.ask(left, commit(attempt, &[], &[("a", "1"), ("m", "1"), ("z", "1")]));
    cluster.until("it is promised", |cluster| cluster.in_doubt() > 0);
    let split = cluster.ask(other, Request::Split { split: right, at: Some(key("p")) });
    cluster.run(Duration::from_millis(200));
    assert!(!cluster.answers.contains_key(&split), "a promise was divided");
    cluster.loses = Box::new(|_, _, _| false);
    assert!(cluster.hear(token).is_ok());
    assert!(matches!(cluster.hear(split), Ok(Answer::Split { .. })));
    for row in ["a", "m", "z"] {
        cluster.until("it is led", |cluster| cluster.leading(row).is_some());
        let leader = cluster.leading(row).unwrap();
        assert_eq!(cluster.snapshot(leader, row, Moment::Now), Ok(Some("1".into())), "{row}");
    }
    assert_ne!(cluster.split_of("m"), cluster.split_of("z"));
}

#[test]
fn a_change_of_members_during_a_partition_loses_nothing() {
    let mut cluster = Cluster::start();
    cluster.write(1, "a", "one");
    let leader = cluster.leading("a").unwrap();
    let away = (0..3).find(|at| *at != leader).unwrap();
    // The one to leave is cut off, and hears nothing of it.
    cluster.loses = cut_off(away);
    let split = cluster.split_of("a");
    let moved = Request::Move { split, from: NodeId(away as u64 + 1), to: NodeId(4) };
    let moved = cluster.led("a", moved);
    assert!(moved.is_ok(), "{moved:?}");
    cluster.write(2, "a", "two");
    cluster.loses = Box::new(|_, _, _| false);
    cluster.until("it has left", |cluster| {
        cluster.machines[away].node.as_ref().unwrap().groups().get(split).is_none()
    });
    // The one that came has a vote: without the other one there is still a majority.
    let leader = cluster.leading("a").unwrap();
    let third = (0..3).find(|at| *at != leader && *at != away);
    if let Some(third) = third {
        cluster.kill(third);
    }
    assert!(cluster.write(3, "a", "three") > Timestamp::ZERO);
}

#[test]
fn halves_become_one_again_and_remember_how_commits_ended() {
    let mut cluster = Cluster::start();
    let right = cluster.cut("m");
    cluster.write(1, "a", "left");
    let attempt = cluster.attempt(2);
    let at = cluster.commit(attempt, &[], &[("z", "right")]).unwrap();
    let left = cluster.split_of("a");
    assert!(cluster.led("a", Request::Merge { split: left }).is_ok());
    assert_eq!(cluster.split_of("z"), left);
    assert_eq!(cluster.commit(attempt, &[], &[("z", "again")]), Ok(at));
    let leader = cluster.leading("z").unwrap();
    assert_eq!(cluster.snapshot(leader, "z", Moment::Now), Ok(Some("right".into())));
    cluster.until("nobody has the right half", |cluster| {
        let nodes = cluster.machines.iter().filter_map(|machine| machine.node.as_ref());
        nodes.into_iter().all(|node| node.groups().get(right).is_none())
    });
}

/// An older transaction waits for what a younger one has promised here, and that one waits for it there.
#[test]
fn promises_close_no_circle_of_waits() {
    let mut cluster = Cluster::start();
    cluster.cut("m");
    let (older, younger) = (cluster.attempt(1), cluster.attempt(2));
    let mut held = vec![];
    assert_eq!(cluster.read(older, &mut held, "a"), None);
    // The younger one has its promise in the right half, and waits for the older one in the left.
    let left = cluster.leading("a").unwrap();
    let waits = cluster.ask(left, commit(younger, &[], &[("a", "2"), ("z", "2")]));
    cluster.until("it is promised", |cluster| cluster.in_doubt() > 0);
    let older = cluster.commit(older, &held, &[("a", "1"), ("z", "1")]);
    assert!(older.is_ok(), "{older:?}");
    assert_eq!(cluster.hear(waits).unwrap_err(), Refused::Aborted);
}

#[test]
fn a_node_that_was_gone_for_long_comes_back_by_a_snapshot() {
    let mut cluster = Cluster::start();
    let away = (cluster.leading("a").unwrap() + 1) % 3;
    cluster.kill(away);
    for number in 1..1_500 {
        cluster.write(number, "a", &number.to_string());
    }
    // Checkpoints: what it lacks is not in the others' logs any more.
    cluster.run(Duration::from_secs(12));
    cluster.open(away);
    cluster.until("it has caught up", |cluster| {
        cluster.snapshot(away, "a", Moment::Within(Duration::from_secs(1))) == Ok(Some("1499".into()))
    });
}

#[test]
fn a_split_that_grows_is_cut_and_what_is_idle_becomes_one_again() {
    let balance = Balance {
        split_bytes: 4_000,
        merge_bytes: 100_000,
        merge_after: Duration::from_secs(20),
        ..Balance::OFF
    };
    let mut cluster = Cluster::start_with(balance);
    let value = "v".repeat(100);
    for number in 0..60 {
        cluster.write(number, &format!("{number:02}"), &value);
    }
    cluster.until("it is cut", |cluster| cluster.split_of_any("00") != cluster.split_of_any("59"));
    // Nobody asks for anything: not even for how the splits are.
    let splits = |cluster: &Cluster| cluster.machines[0].node.as_ref().unwrap().groups().iter().count();
    let cut = splits(&cluster);
    assert!(cut >= 2);
    cluster.machines.iter_mut().for_each(|machine| machine.paused = false);
    cluster.balance.split_bytes = u64::MAX;
    (0..NODES).for_each(|at| cluster.kill(at));
    (0..NODES).for_each(|at| cluster.open(at));
    cluster.until("it is one again", |cluster| splits(cluster) == 1);
    let leader = (0..NODES).find(|at| cluster.leading("33") == Some(*at));
    if let Some(leader) = leader {
        assert_eq!(cluster.snapshot(leader, "33", Moment::Now), Ok(Some(value)));
    }
}

#[test]
fn a_split_that_is_asked_for_too_much_is_cut_where_half_of_it_is_asked_for() {
    let balance = Balance { split_load: 50, ..Balance::OFF };
    let mut cluster = Cluster::start_with(balance);
    let leader = cluster.leading("00").unwrap();
    let mut number = 0;
    cluster.until("it is cut", |cluster| {
        if cluster.steps.is_multiple_of(10) {
            number += 1;
            let row = format!("{:02}", number % 50);
            let attempt = cluster.attempt(number);
            cluster.ask(leader, commit(attempt, &[], &[(&row, "v")]));
        }
        cluster.answers.clear();
        cluster.machines[leader].node.as_ref().unwrap().groups().iter().count() == 2
    });
    cluster.until("both halves are led", |cluster| {
        cluster.leading("00").is_some() && cluster.leading("49").is_some()
    });
    assert_ne!(cluster.split_of("00"), cluster.split_of("49"));
}

#[test]
fn a_node_that_joins_is_given_replicas_and_splits_to_lead() {
    let mut cluster = Cluster::start_with(Balance { spread: true, ..Balance::OFF });
    for row in ["c", "f", "j", "m", "p", "s"] {
        cluster.until("it is led", |cluster| cluster.leading(row).is_some());
        cluster.cut(row);
    }
    let groups = |cluster: &Cluster, at: usize| {
        let node = cluster.machines[at].node.as_ref().unwrap();
        let member = |(_, group): &(SplitId, &store::group::Group)| group.is_filled() && group.is_member();
        node.groups().iter().filter(member).count()
    };
    let leads = |cluster: &Cluster, at: usize| {
        let node = cluster.machines[at].node.as_ref().unwrap();
        let me = NodeId(at as u64 + 1);
        node.groups().iter().filter(|(_, group)| group.led_by() == Some(me)).count()
    };
    // One every some seconds, so that what was moved counts before the next is.
    cluster
        .until("the one that joined has some", |cluster| groups(cluster, 3) >= 2 && leads(cluster, 3) >= 1);
}

#[test]
fn a_node_whose_disk_was_replaced_is_given_its_replicas_again() {
    let mut cluster = Cluster::start();
    cluster.write(1, "a", "one");
    let lost = (cluster.leading("a").unwrap() + 1) % 3;
    cluster.machines[lost].node = None;
    cluster.machines[lost].rows = Memory::default();
    std::fs::remove_dir_all(cluster.home.path().join((lost + 1).to_string())).unwrap();
    // Its number is the same, its id is not: what it promised under the old one it does not know.
    cluster.reopen_as(lost, NodeId((1 << 16) | (lost as u64 + 1)));
    cluster.until("it has a vote again", |cluster| {
        let node = cluster.machines[lost].node.as_ref().unwrap();
        let groups = node.groups().get(cluster.split_of_any("a"));
        groups.is_some_and(|group| group.is_filled() && group.nodes().0.contains(&cluster.machines[lost].id))
    });
    let old = NodeId(lost as u64 + 1);
    cluster.until("its old self has none", |cluster| {
        let split = cluster.split_of_any("a");
        let nodes = cluster.machines[lost].node.as_ref().unwrap().groups();
        nodes.get(split).is_some_and(|group| !group.nodes().0.contains(&old))
    });
}

/// The first row of a commit comes to another split while a promise to the one that coordinated it stands: when the same
/// commit is sent again, what the first coordinator aborts must not be what the second commits.
#[test]
fn a_commit_that_is_sent_again_after_a_cut_is_decided_once() {
    let mut cluster = Cluster::start();
    cluster.cut("m");
    let other = (0..3).find(|at| Some(*at) != cluster.leading("a")).unwrap();
    let (right, node) = (cluster.split_of("m"), NodeId(other as u64 + 1));
    assert!(cluster.led("m", Request::Lead { split: right, node }).is_ok());
    cluster.until("another one leads what promises", |cluster| cluster.leading("m") == Some(other));
    cluster.run(Duration::from_millis(500));
    cluster.loses = Box::new(|_, _, message| matches!(message, PeerMessage::Vote { .. }));
    let attempt = cluster.attempt(1);
    let writes = [("b", "1"), ("z", "1")];
    let left = cluster.leading("b").unwrap();
    let first = cluster.ask(left, commit(attempt, &[], &writes));
    cluster.until("it is promised", |cluster| cluster.in_doubt() > 0);
    // What commits is heard late.
    cluster.loses = Box::new(|_, _, message| {
        matches!(message, PeerMessage::Decided { outcome: Outcome::Committed(_), .. })
    });
    let split = cluster.split_of("b");
    let cut = cluster.ask(left, Request::Split { split, at: Some(key("b")) });
    assert!(matches!(cluster.hear(cut), Ok(Answer::Split { .. })));
    assert!(cluster.hear(first).is_err());
    let again = cluster.commit(attempt, &[], &writes);
    cluster.run(Duration::from_secs(2));
    cluster.loses = Box::new(|_, _, _| false);
    cluster.until("nothing is in doubt", |cluster| cluster.in_doubt() == 0);
    cluster.run(Duration::from_secs(1));
    for row in ["b", "z"] {
        let leader = cluster.leading(row).unwrap();
        let written = cluster.snapshot(leader, row, Moment::Now).unwrap();
        assert_eq!(written.is_some(), again.is_ok(), "{row} after {again:?}");
    }
}

#[test]
fn a_turn_with_more_than_a_record_takes_is_written_as_several() {
    let mut cluster = Cluster::start();
    let leader = cluster.leading("a").unwrap();
    let value = Bytes::from(vec![7; 1 << 20]);
    let asked: Vec<_> = (0..9)
        .map(|number| {
            let attempt = cluster.attempt(number);
            let write =
                |row: u64| Mutation { key: key(&format!("{number}-{row}")), value: Some(value.clone()) };
            let writes = (0..8).map(write).collect();
            let arrived = Timestamp::MAX;
            cluster.ask(leader, Request::Commit { attempt, held: vec![], writes, arrived })
        })
        .collect();
    for token in asked {
        assert!(matches!(cluster.hear(token), Ok(Answer::Committed { .. })));
    }
    for at in 0..3 {
        cluster.kill(at);
        cluster.open(at);
    }
    cluster.until("somebody leads", |cluster| cluster.leading("8-7").is_some());
    let leader = cluster.leading("8-7").unwrap();
    let keys = vec![key("8-7")];
    let Ok(Answer::Rows { rows, .. }) =
        cluster.asked(leader, Request::SnapshotRead { keys, moment: Moment::Now })
    else {
        panic!("no answer");
    };
    assert_eq!(rows[0].value, Some(value));
}

#[test]
fn leadership_that_is_not_taken_stays_and_serves() {
    let mut cluster = Cluster::start();
    let leader = cluster.leading("a").unwrap();
    let dead = (leader + 1) % 3;
    cluster.kill(dead);
    let split = cluster.split_of("a");
    for number in 0..10 {
        // Heard a moment ago, and gone.
        cluster.open(dead);
        cluster.run(Duration::from_millis(200 + number * 7));
        cluster.kill(dead);
        let led = cluster.ask(leader, Request::Lead { split, node: NodeId(dead as u64 + 1) });
        let heard = cluster.hear(led);
        assert!(matches!(heard, Err(Refused::Unknown | Refused::Busy(_) | Refused::Invalid(_))), "{heard:?}");
        cluster.write(number, "a", "still here");
    }
}

/// A split with millions of versions is cut while others wait for it.
#[test]
fn a_cut_moves_no_row_and_a_merge_of_its_halves_neither() {
    let mut cluster = Cluster::start();
    cluster.write(1, "a", "left");
    cluster.write(2, "z", "right");
    cluster.run(Duration::from_secs(1));
    let kept = |cluster: &Cluster, at: usize| {
        let mut rows = vec![];
        let mut note = |key: &[u8], _: &[u8]| {
            rows.push(key.to_vec());
            ControlFlow::Continue(())
        };
        cluster.machines[at].rows.walk(b"r", b"s", &mut note).unwrap();
        rows
    };
    let before: Vec<_> = (0..3).map(|at| kept(&cluster, at)).collect();
    assert!(before.iter().all(|rows| rows.len() >= 2));
    let left = cluster.split_of("a");
    let right = cluster.cut("m");
    let after = |cluster: &Cluster| (0..3).map(|at| kept(cluster, at)).collect::<Vec<_>>();
    assert_eq!(after(&cluster), before);
    cluster.until("the halves are led by one node", |cluster| {
        cluster.leading("a").is_some() && cluster.leading("z").is_some()
    });
    assert!(cluster.led("a", Request::Merge { split: left }).is_ok());
    cluster.until("nobody has the right half", |cluster| {
        let nodes = cluster.machines.iter().filter_map(|machine| machine.node.as_ref());
        nodes.into_iter().all(|node| node.groups().get(right).is_none())
    });
    assert_eq!(after(&cluster), before);
    let leader = cluster.leading("z").unwrap();
    assert_eq!(cluster.snapshot(leader, "z", Moment::Now), Ok(Some("right".into())));

    // A replica that comes to a node again has nothing beside it that is not its own.
    let right = cluster.cut("m");
    let leader = cluster.leading("z").unwrap();
    let (from, to) = (cluster.machines[(leader + 1) % 3].id, cluster.machines[3].id);
    assert!(cluster.led("z", Request::Move { split: right, from, to }).is_ok());
    let away = (leader + 1) % 3;
    cluster.until("it has left", |cluster| {
        cluster.machines[away].node.as_ref().unwrap().groups().get(right).is_none()
    });
    assert_eq!(kept(&cluster, away).len() + kept(&cluster, 3).len(), before[away].len());
    assert!(cluster.led("z", Request::Move { split: right, from: to, to: from }).is_ok());
    cluster.until("it is back", |cluster| {
        let group = cluster.machines[away].node.as_ref().unwrap().groups().get(right);
        group.is_some_and(|group| group.is_filled())
    });
    cluster.until("the other has nothing", |cluster| kept(cluster, 3).is_empty());
    assert_eq!(kept(&cluster, away).len(), before[away].len());
}
