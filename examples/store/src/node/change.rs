//! Changes of splits while they serve: cut in two, merged, moved to other nodes, led by others. Each waits until nothing
//! of the split is under way, so that no promise and no lock is ever divided; new work waits meanwhile, for as long as
//! a round of consensus takes.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{Answer, Node, Refused};
use crate::{
    group::{Group, NodeChange},
    keys::{Key, Range},
    lease::{NUMBER_MASK, NodeId},
    truetime::Interval,
    txn::{Command, Entry, SplitId},
    wal::Disk,
    wire::PeerMessage,
};

/// A change that is not done by then is off, and the split goes on as it was.
const CHANGE_TICKS: u64 = 500;
/// A replica may be large, and the way to its node slow.
const MOVE_TICKS: u64 = 12_000;
/// Ticks between steps of a move, and between asking a split to retire.
const STEP_TICKS: u64 = 10;
/// Ticks between looks at what should be changed without anybody asking.
const BALANCE_TICKS: u64 = 100;
/// Looks in a row that must find too many requests.
const BUSY_LOOKS: u32 = 10;
/// Leadership that is not handed over by then stays: the split serves nobody meanwhile.
const LEAD_TICKS: u64 = 100;
/// Who is to lead was heard within so many ticks: a follower answers heartbeats much more often.
const NEAR_TICKS: u64 = 30;
/// A node that was heard within so many ticks is there.
const HEARD_TICKS: u64 = 300;
/// Places of requests that are kept, to cut where half of them are on either side.
const SAMPLES_MAX: usize = 64;
/// One request in so many is such a place.
const SAMPLE_ONE_IN: u64 = 16;
/// Fewer requests a second than this are none.
const IDLE_LOAD: u64 = 5;

/// What is asked of a split.
#[derive(Default)]
pub(super) struct Load {
    now: u64,
    before: u64,
    busy: u32,
    idle: u64,
    places: Vec<Bytes>,
}

impl Load {
    /// Requests in the last whole second.
    pub(super) fn of_late(&self) -> u64 {
        self.before
    }

    fn roll(&mut self, busy: u64) {
        self.before = std::mem::take(&mut self.now);
        self.busy = if self.before > busy { self.busy + 1 } else { 0 };
        self.idle = if self.before < IDLE_LOAD { self.idle + 1 } else { 0 };
    }

    /// Where half of the requests of late are on either side.
    fn middle(&self) -> Option<Bytes> {
        let mut places = self.places.clone();
        places.sort_unstable();
        places.get(places.len() / 2).cloned()
    }
}

/// A change of a split that this node leads, or has handed over.
pub(super) struct Changing {
    token: Option<u64>,
    /// In ticks.
    until: u64,
    what: What,
}

impl Changing {
    /// The tick that a survey of the split must not end before, where it waits for one.
    pub(super) fn waits_for_middle(&self) -> Option<u64> {
        match self.what {
            What::Middle { since } => Some(since),
            _ => None,
        }
    }

    fn is_proposed(&self) -> bool {
        match &self.what {
            What::Split { proposed, .. }
            | What::Merge { proposed, .. }
            | What::Retire { proposed, .. }
            | What::Lead { proposed, .. } => *proposed,
            What::Middle { .. } | What::Move { .. } => false,
        }
    }
}

enum What {
    /// Looks for where to split, by a survey that ends at this tick or later.
    Middle {
        since: u64,
    },
    Split {
        at: Key,
        proposed: bool,
    },
    Merge {
        right: SplitId,
        proposed: bool,
    },
    Retire {
        into: SplitId,
        proposed: bool,
    },
    Move {
        from: NodeId,
        to: NodeId,
    },
    Lead {
        to: NodeId,
        proposed: bool,
    },
}

impl<D: Disk> Node<D> {
    /// A request for `split` came.
    pub(super) fn count(&mut self, split: SplitId, span: Option<&Range>) {
        let sampled = self.random.next().is_multiple_of(SAMPLE_ONE_IN);
        let slot = usize::try_from(self.random.next() % SAMPLES_MAX as u64).unwrap_or_default();
        let load = self.loads.entry(split).or_default();
        load.now += 1;
        if let Some(span) = span.filter(|_| sampled) {
            match load.places.get_mut(slot) {
                Some(place) => *place = span.start().clone(),
                None => load.places.push(span.start().clone()),
            }
        }
    }

    pub(super) fn begin_split(&mut self, token: Option<u64>, split: SplitId, at: Option<Key>, now: Interval) {
        if let Err(refused) = self.changeable(split, now) {
            return self.refuse(token, &refused);
        }
        let Some(at) = at else {
            let since = self.ticks + 1;
            return self.begin(token, split, What::Middle { since }, MOVE_TICKS);
        };
        let range = self.groups.get(split).map(|group| group.replica().range().clone());
        if range.is_some_and(|range| range.contains(&at) && range.start() < at.as_bytes()) {
            self.begin(token, split, What::Split { at, proposed: false }, CHANGE_TICKS);
        } else {
            self.refuse(token, &invalid("the key is not inside the split"));
        }
    }

    pub(super) fn begin_merge(&mut self, token: Option<u64>, split: SplitId, now: Interval) {
        let right = self.changeable(split, now).and_then(|()| self.mergeable(split));
        match right {
            Ok(right) => self.begin(token, split, What::Merge { right, proposed: false }, CHANGE_TICKS),
            Err(refused) => self.refuse(token, &refused),
        }
    }

    /// The split to its left wants this one to be part of it.
    pub(super) fn begin_retire(&mut self, split: SplitId, into: SplitId, now: Interval) {
        let left = self.groups.get(into).map(Group::replica);
        let beside =
            left.zip(self.groups.get(split)).is_some_and(|(left, right)| left.touches(right.replica()));
        let learns = self.groups.get(split).is_some_and(|group| !group.nodes().1.is_empty());
        if beside && !learns && self.changeable(split, now).is_ok() {
            self.begin(None, split, What::Retire { into, proposed: false }, CHANGE_TICKS);
        }
    }

    pub(super) fn begin_move(
        &mut self,
        token: Option<u64>,
        split: SplitId,
        from: NodeId,
        to: NodeId,
        now: Interval,
    ) {
        let Some(group) = self.groups.get(split) else {
            let refused = self.not_here(split);
            return self.refuse(token, &refused);
        };
        let (voters, learners) = group.nodes();
        let refused = if group.led_by() != Some(self.config.me) {
            Some(self.not_leader(split))
        } else if group.replica().retired().is_some() {
            Some(Refused::Busy("it is about to be part of the split to its left"))
        } else if self.changing.contains_key(&split) || self.is_joined(split) {
            Some(Refused::Busy("it is being changed already"))
        } else if !voters.contains(&from) {
            Some(invalid("the node to leave does not have the split"))
        } else if voters.contains(&to) || learners.iter().any(|node| *node != to) {
            Some(invalid("the node to come to has the split already, or another one is coming"))
        } else if !self.is_heard(to) {
            Some(invalid("the node to come to is not to be heard"))
        } else {
            None
        };
        match refused {
            Some(refused) => self.refuse(token, &refused),
            None if from == self.config.me => {
                self.refuse(token, &Refused::Busy("another node comes to lead it first"));
                if let Some(other) = voters.into_iter().find(|node| *node != from && self.is_near(*node)) {
                    self.begin_lead(None, split, other, now);
                }
            }
            None => {
                tracing::info!(split = split.0, from = from.0, to = to.0, "moves");
                self.begin(token, split, What::Move { from, to }, MOVE_TICKS);
            }
        }
    }

    pub(super) fn begin_lead(&mut self, token: Option<u64>, split: SplitId, node: NodeId, now: Interval) {
        let refused = self.changeable(split, now).err().or_else(|| {
            let voters = self.groups.get(split).map(|group| group.nodes().0).unwrap_or_default();
            if !voters.contains(&node) {
                return Some(invalid("the node does not have the split"));
            }
            (!self.is_near(node)).then(|| invalid("the node to lead is not to be heard"))
        });
        match refused {
            Some(refused) => self.refuse(token, &refused),
            None if node == self.config.me => {
                self.answers.extend(token.map(|token| (token, Ok(Answer::Done))));
            }
            None => {
                tracing::info!(split = split.0, to = node.0, "is handed over");
                self.begin(token, split, What::Lead { to: node, proposed: false }, LEAD_TICKS);
            }
        }
    }

    /// One step of everything that is being changed.
    pub(super) fn changes_go_on(&mut self, now: Interval) {
        for split in self.changing.keys().copied().collect::<Vec<_>>() {
            let Some(changing) = self.changing.remove(&split) else { continue };
            if let Some(changing) = self.change_goes_on(split, changing, now) {
                self.changing.insert(split, changing);
            }
        }
        if self.ticks.is_multiple_of(BALANCE_TICKS) {
            for load in self.loads.values_mut() {
                load.roll(self.config.balance.split_load);
            }
            self.resume_merges();
            self.balance(now);
        }
    }

    pub(super) fn was_split(&mut self, split: SplitId, right: Option<SplitId>) {
        self.look_at_own();
        if let Some(right) = right {
            tracing::info!(split = split.0, right = right.0, "was cut in two");
            self.forget_waits(split);
        }
        if let Some(Changing { token: Some(token), .. }) = self.changing.remove(&split) {
            let answer = right.map(|right| Answer::Split { right });
            self.answer(token, answer.ok_or(Refused::Busy("a promise stood in the way")));
        }
        self.loads.remove(&split);
        self.surveys.forget(split);
    }

    pub(super) fn was_merged(&mut self, split: SplitId, right: SplitId) {
        tracing::info!(split = split.0, right = right.0, "took in the split to its right");
        self.look_at_own();
        self.forget_waits(right);
        if let Some(Changing { token: Some(token), .. }) = self.changing.remove(&split) {
            self.answer(token, Ok(Answer::Done));
        }
        self.changing.remove(&right);
        self.loads.remove(&right);
        self.surveys.forget(split);
        self.surveys.forget(right);
    }

    /// Locks of a split that is another now are gone, and whoever waited for some begins again.
    fn forget_waits(&mut self, split: SplitId) {
        let waiting: Vec<_> = self.lock_waits.keys().filter(|(at, _)| *at == split).copied().collect();
        for at in waiting {
            if let Some(wait) = self.lock_waits.remove(&at) {
                self.give_up(split, wait, &Refused::Aborted);
            }
        }
        self.abort_undecided(split);
    }

    fn begin(&mut self, token: Option<u64>, split: SplitId, what: What, ticks: u64) {
        if !matches!(what, What::Middle { .. } | What::Move { .. } | What::Merge { .. })
            && let Some((leader, _)) = self.led(split)
        {
            leader.freeze();
        }
        self.changing.insert(split, Changing { token, until: self.ticks + ticks, what });
    }

    fn change_goes_on(&mut self, split: SplitId, mut changing: Changing, now: Interval) -> Option<Changing> {
        let over = self.ticks > changing.until;
        if self.led(split).is_none() {
            return self.handed_over(split, changing, over);
        }
        if over {
            // What is on its way into the log may come true under this lease: nothing else does until that has ended.
            let serves =
                self.led(split).is_some_and(|(leader, replica)| leader.check_lease(replica, now).is_ok());
            if changing.is_proposed() && serves {
                return Some(changing);
            }
            let refused = match changing.is_proposed() {
                true => Refused::Unknown,
                false => Refused::Busy("the change took too long and is off"),
            };
            if let Some(group) = self.groups.get_mut(split) {
                group.stay();
            }
            self.refuse(changing.token, &refused);
            return None;
        }
        match &mut changing.what {
            What::Middle { since } => {
                let Some(middle) = self.surveys.middle(split, *since) else { return Some(changing) };
                match middle.cloned() {
                    Some(at) => self.begin_split(changing.token, split, Some(at), now),
                    None => {
                        let refused = invalid("a split of fewer than two rows has no middle");
                        self.refuse(changing.token, &refused);
                    }
                }
                return None;
            }
            What::Split { at, proposed } => {
                let right = SplitId(self.random.next().max(2));
                let command = Command::Split { at: at.clone(), right, leader: self.config.me };
                *proposed = *proposed || self.change(split, command, now);
            }
            What::Retire { into, proposed } => {
                let settled =
                    self.groups.get(split).is_some_and(|group| group.replica().unsettled().next().is_none());
                *proposed = *proposed || settled && self.change(split, Command::Retire { into: *into }, now);
            }
            What::Lead { to, proposed } => {
                *proposed = *proposed || self.change(split, Command::Yield, now);
                if let Some(group) = self.groups.get_mut(split).filter(|_| *proposed) {
                    group.transfer(*to);
                }
            }
            What::Merge { right, proposed } => {
                *proposed = *proposed || self.absorb_right(split, *right, now);
            }
            What::Move { from, to } => {
                if self.ticks.is_multiple_of(STEP_TICKS) && self.moved(split, *from, *to) {
                    self.answers.extend(changing.token.map(|token| (token, Ok(Answer::Done))));
                    return None;
                }
            }
        }
        Some(changing)
    }

    /// Another node leads the split now.
    fn handed_over(&mut self, split: SplitId, changing: Changing, over: bool) -> Option<Changing> {
        let leader = self.leader_of(split).filter(|leader| *leader != self.config.me);
        let answer = match changing.what {
            What::Lead { to, proposed: true } if leader == Some(to) => Ok(Answer::Done),
            What::Lead { proposed: true, .. } if leader.is_none() && !over => return Some(changing),
            _ if changing.is_proposed() => Err(Refused::Unknown),
            _ => Err(self.not_leader(split)),
        };
        self.answers.extend(changing.token.map(|token| (token, answer)));
        None
    }

    /// Proposes a change as soon as nothing is under way. True when it is on its way.
    fn change(&mut self, split: SplitId, command: Command, now: Interval) -> bool {
        let entry: Option<Entry> =
            self.led(split).and_then(|(leader, replica)| leader.change(replica, command, now).ok());
        entry.is_some_and(|entry| self.propose(split, &entry))
    }

    fn absorb_right(&mut self, split: SplitId, right: SplitId, now: Interval) -> bool {
        let Some(half) = self.groups.get(right) else { return false };
        let replica = half.replica();
        if replica.retired().is_none() {
            if self.ticks.is_multiple_of(STEP_TICKS) {
                self.say_to_leader(right, PeerMessage::Retire { split: right, into: split });
            }
            return false;
        }
        // Its last leader let go of the lease when it retired, and assigned and showed nothing after that.
        let over = replica.lease().granted().map_or(replica.newest, |grant| grant.end.max(replica.newest));
        let begins = replica.range().start().clone();
        let command = Command::Absorb { right, end: replica.range().end().cloned() };
        let entry = self.led(split).and_then(|(leader, replica)| {
            let beside = replica.range().end() == Some(&begins);
            beside.then(|| leader.absorb(replica, command, over, now).ok()).flatten()
        });
        entry.is_some_and(|entry| self.propose(split, &entry))
    }

    /// The next step of a move. True when it is done.
    fn moved(&mut self, split: SplitId, from: NodeId, to: NodeId) -> bool {
        let Some(group) = self.groups.get_mut(split) else { return false };
        if group.changes_nodes() {
            return false;
        }
        let (voters, learners) = group.nodes();
        if voters.contains(&to) && !voters.contains(&from) {
            return true;
        }
        // What consensus refuses now is asked for again at the next step.
        if !learners.contains(&to) && !voters.contains(&to) {
            group.propose_nodes(&[(NodeChange::Learn, to)]).ok();
        } else if group.has_caught_up(to) {
            group.propose_nodes(&[(NodeChange::Vote, to), (NodeChange::Remove, from)]).ok();
        }
        false
    }

    /// Whether a change of `split` can begin here.
    fn changeable(&mut self, split: SplitId, now: Interval) -> Result<(), Refused> {
        if self.groups.get(split).is_none() {
            return Err(self.not_here(split));
        }
        if self.changing.contains_key(&split) || self.is_joined(split) {
            return Err(Refused::Busy("it is being changed already"));
        }
        if self.groups.get(split).is_some_and(|group| group.changes_nodes()) {
            return Err(Refused::Busy("its nodes are being changed"));
        }
        let serves = self.led(split).map(|(leader, replica)| leader.check_serving(replica, now));
        match serves {
            Some(Ok(())) => Ok(()),
            Some(Err(refusal)) => Err(self.refused(split, refusal)),
            None => Err(self.not_leader(split)),
        }
    }

    /// Whether the split beside `split` has retired to be part of it.
    fn is_joined(&self, split: SplitId) -> bool {
        let left = self.groups.get(split).map(Group::replica);
        self.groups.iter().any(|(_, right)| {
            right.replica().retired().is_some() && left.is_some_and(|left| left.touches(right.replica()))
        })
    }

    /// The split to the right, if it is on the same nodes.
    fn mergeable(&self, split: SplitId) -> Result<SplitId, Refused> {
        let Some(left) = self.groups.get(split) else { return Err(self.not_here(split)) };
        let end = left.replica().range().end().ok_or_else(|| invalid("there is nothing to its right"))?;
        let right = self.routes.at(end).map(|route| route.split).and_then(|right| self.groups.get(right));
        let right =
            right.ok_or_else(|| invalid("the split to its right is on other nodes: move it first"))?;
        let sorted = |mut nodes: Vec<NodeId>| {
            nodes.sort_unstable();
            nodes
        };
        let ((voters, learners), (others, other_learners)) = (left.nodes(), right.nodes());
        let alike = sorted(voters) == sorted(others) && learners.is_empty() && other_learners.is_empty();
        if !alike || right.changes_nodes() {
            return Err(invalid("the split to its right is on other nodes: move it first"));
        }
        Ok(right.replica().split())
    }

    /// A leader that died in the middle of a merge left it to the next. Whoever is beside a split that has retired takes
    /// it: the one that asked may have been cut since.
    fn resume_merges(&mut self) {
        let retired = self.groups.iter().filter(|(_, group)| group.replica().retired().is_some());
        let waiting: Vec<_> = retired
            .filter_map(|(right, half)| {
                let left = self.groups.iter().find(|(_, left)| left.replica().touches(half.replica()));
                Some((left?.0, right))
            })
            .filter(|(left, _)| !self.changing.contains_key(left))
            .collect();
        for (left, right) in waiting {
            if self.led(left).is_some() {
                self.begin(None, left, What::Merge { right, proposed: false }, CHANGE_TICKS);
            }
        }
    }

    /// Changes that nobody asked for.
    fn balance(&mut self, now: Interval) {
        let me = self.config.me;
        let led: Vec<_> = self
            .groups
            .iter()
            .filter(|(split, group)| group.led_by() == Some(me) && !self.changing.contains_key(split))
            .map(|(split, _)| split)
            .collect();
        for split in led {
            self.replace_lost(split, now);
            self.cut_where_busy(split, now);
            self.join(split, now);
        }
        if self.config.balance.spread && self.ticks.is_multiple_of(BALANCE_TICKS * 5) {
            self.spread(now);
        }
    }

    /// A node whose disk was replaced has another id: its replicas move there, and a learner that was left is let go.
    fn replace_lost(&mut self, split: SplitId, now: Interval) {
        let Some((voters, learners)) = self.groups.get(split).map(|group| group.nodes()) else { return };
        let came = |old: &NodeId| {
            let new = self.heard.keys().rev().find(|new| {
                new.0 & NUMBER_MASK == old.0 & NUMBER_MASK && new.0 > old.0 && self.is_heard(**new)
            });
            new.filter(|new| !voters.contains(new)).map(|new| (*old, *new))
        };
        if let Some((from, to)) = voters.iter().find_map(came) {
            self.begin_move(None, split, from, to, now);
        } else if let (Some(learner), Some(group)) = (learners.first(), self.groups.get_mut(split)) {
            group.propose_nodes(&[(NodeChange::Remove, *learner)]).ok();
        }
    }

    /// One that is too large is cut where a survey has found its middle.
    fn cut_where_busy(&mut self, split: SplitId, now: Interval) {
        let busy = self.loads.get(&split).filter(|load| load.busy >= BUSY_LOOKS);
        if let Some(place) = busy.and_then(Load::middle).and_then(|place| Key::decode(place).ok()) {
            self.begin_split(None, split, Some(place), now);
        }
    }

    fn join(&mut self, split: SplitId, now: Interval) {
        let balance = self.config.balance;
        if self.changing.contains_key(&split) {
            return;
        }
        let Ok(right) = self.mergeable(split) else { return };
        let both = [split, right];
        let bytes: u64 = both
            .iter()
            .filter_map(|split| self.groups.get(*split))
            .map(|group| group.replica().size().1)
            .sum();
        let led_here = self.groups.get(right).is_some_and(|group| group.led_by() == Some(self.config.me));
        let idle = both.iter().all(|split| {
            self.loads.get(split).is_some_and(|load| load.idle >= balance.merge_after.as_secs())
        });
        for split in both {
            self.loads.entry(split).or_default();
        }
        if bytes < balance.merge_bytes && idle && led_here {
            self.begin_merge(None, split, now);
        }
    }

    /// Hands one split to a node that has, or leads, at least two fewer than another.
    fn spread(&mut self, now: Interval) {
        let me = self.config.me;
        let mut replicas: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut leads: BTreeMap<NodeId, usize> = BTreeMap::new();
        for node in self.heard.keys().filter(|node| self.is_heard(**node)) {
            replicas.insert(*node, 0);
        }
        for route in self.routes.iter() {
            for node in &route.nodes {
                *replicas.entry(*node).or_default() += 1;
            }
            if let Some(leader) = route.leader {
                *leads.entry(leader).or_default() += 1;
            }
        }
        let of = |counts: &BTreeMap<NodeId, usize>, node: &NodeId| counts.get(node).copied().unwrap_or(0);
        let led: Vec<_> = self
            .groups
            .iter()
            .filter(|(split, group)| group.led_by() == Some(me) && !self.changing.contains_key(split))
            .map(|(split, group)| (split, group.nodes().0))
            .collect();
        for (split, voters) in led {
            let idlest = replicas
                .iter()
                .filter(|(node, _)| self.is_heard(**node) && !voters.contains(node))
                .min_by_key(|(_, count)| **count)
                .map(|(node, count)| (*node, *count));
            let fullest = voters.iter().max_by_key(|node| of(&replicas, node)).copied();
            if let (Some((to, few)), Some(from)) = (idlest, fullest)
                && few + 2 <= of(&replicas, &from)
            {
                return self.begin_move(None, split, from, to, now);
            }
            let other = voters
                .iter()
                .filter(|node| **node != me && self.is_near(**node))
                .min_by_key(|node| of(&leads, node))
                .copied();
            if let Some(other) = other
                && of(&leads, &other) + 2 <= of(&leads, &me)
            {
                return self.begin_lead(None, split, other, now);
            }
        }
    }

    fn is_heard(&self, node: NodeId) -> bool {
        self.is_heard_within(node, HEARD_TICKS)
    }

    /// A node that died a moment ago is not: a split that is handed to it serves nobody until that is off.
    fn is_near(&self, node: NodeId) -> bool {
        self.is_heard_within(node, NEAR_TICKS)
    }

    fn is_heard_within(&self, node: NodeId, ticks: u64) -> bool {
        node == self.config.me || self.heard.get(&node).is_some_and(|at| *at > 0 && at + ticks >= self.ticks)
    }
}

fn invalid(why: &str) -> Refused {
    Refused::Invalid(why.into())
}
