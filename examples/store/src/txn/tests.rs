//! What the parts promise each other, step by step. Logs here are replicated at once; the simulation is for the rest.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use bytes::Bytes;

use super::*;
use crate::{
    engine::{Batch, Engine, Memory},
    keys::Key,
    lease::NodeId,
    locks::{Age, Changes},
    mvcc::Home,
    truetime::Interval,
};

const EPSILON: Duration = Duration::from_millis(1);
const MS: u64 = 1_000_000;
const ME: NodeId = NodeId(1);
const HOME: Home = Home(0);

fn at(millis: u64) -> Interval {
    Interval::around(Timestamp(millis * MS), EPSILON)
}

fn attempt(number: u64) -> Attempt {
    let started = Timestamp(number * MS);
    let age = Age { first: started, client: number, attempt: Reverse(0) };
    Attempt { txn: TxnId { started, random: number }, age }
}

fn key(row: &str) -> Key {
    Key::new("acct", row.as_bytes()).unwrap()
}

fn write(row: &str, value: &'static str) -> Vec<Mutation> {
    vec![Mutation { key: key(row), value: Some(Bytes::from_static(value.as_bytes())) }]
}

fn replica(split: u64) -> Replica {
    Replica::restore(Arc::new(Memory::default()), SplitId(split), HOME, State::default()).unwrap()
}

/// A split with one replica that is always the leader.
struct Split {
    replica: Replica,
    leader: Leader,
}

impl Split {
    fn new() -> Self {
        let mut split = Self { replica: replica(1), leader: Leader::new(ME, 1) };
        split.lead(1, at(1_000));
        split
    }

    /// Another node takes over: nothing is left but the log.
    fn lead(&mut self, term: u64, now: Interval) {
        self.replica.begin_term(term);
        self.leader = Leader::new(ME, term);
        self.leader.inherit(&self.replica);
        self.renew(now);
    }

    fn renew(&mut self, now: Interval) {
        let grant = self.replica.lease().wanted(self.leader.tenure(), now).unwrap();
        let lease = self.leader.lease(grant);
        assert_eq!(self.log(lease), Applied::Lease(Ok(())));
    }

    fn log(&mut self, entry: Entry) -> Applied {
        let term = entry.term;
        let applied = self.replica.apply(entry, term).unwrap();
        self.leader.applied(&applied);
        applied
    }

    fn read(&mut self, number: u64, row: &str, now: Interval) -> Changes {
        let first = !self.leader.knows(attempt(number).txn);
        self.leader.read(&self.replica, attempt(number), first, vec![Range::point(&key(row))], now).unwrap()
    }

    fn lock(&mut self, number: u64, writes: &[Mutation], now: Interval) -> Changes {
        let known = self.leader.knows(attempt(number).txn);
        self.leader.lock_writes(&self.replica, attempt(number), known, writes, now).unwrap()
    }

    fn commit(&mut self, number: u64, row: &str, value: &'static str, now: Interval) -> Timestamp {
        let txn = attempt(number).txn;
        assert_eq!(self.lock(number, &write(row, value), now).granted, [txn]);
        let entry =
            self.leader.commit(&self.replica, txn, write(row, value), vec![], now.latest, now).unwrap();
        let Applied::Ended(_, Outcome::Committed(at)) = self.log(entry) else { panic!("not committed") };
        self.leader.release(txn);
        at
    }

    fn prepare(&mut self, number: u64, writes: Vec<Mutation>, now: Interval) -> Timestamp {
        let txn = attempt(number).txn;
        assert_eq!(self.lock(number, &writes, now).granted, [txn]);
        let entry = self.leader.prepare(&self.replica, attempt(number), writes, SplitId(9), now).unwrap();
        let Applied::Prepared(_, at) = self.log(entry) else { panic!("not prepared") };
        at
    }

    fn resolve(&mut self, number: u64, outcome: Outcome, now: Interval) -> Applied {
        let entry = self.leader.resolve(&self.replica, attempt(number).txn, outcome, now).unwrap();
        self.log(entry)
    }
}

#[test]
fn a_commit_is_later_than_anything_that_was_over_when_it_arrived() {
    let mut split = Split::new();
    let first = split.commit(1, "a", "1", at(1_100));
    assert!(first >= at(1_100).latest);
    // The clock went back within its bound: the order of timestamps does not.
    let second = split.commit(2, "a", "2", at(1_099));
    assert!(second > first);
}

#[test]
fn a_commit_sent_twice_is_committed_once() {
    let mut split = Split::new();
    let at_first = split.commit(1, "a", "1", at(1_100));
    let again = split.leader.lock_writes(&split.replica, attempt(1), false, &write("a", "1"), at(1_200));
    assert_eq!(again, Err(Refusal::Ended(Outcome::Committed(at_first))));
    assert_eq!(split.replica.outcome(attempt(1).txn), Some(Outcome::Committed(at_first)));
}

#[test]
fn a_commit_after_an_abort_does_not_happen() {
    let mut split = Split::new();
    split.read(1, "a", at(1_100));
    split.resolve(1, Outcome::Aborted, at(1_100));
    let late = Entry {
        term: 1,
        closed: Timestamp::ZERO,
        command: Command::Commit {
            txn: attempt(1).txn,
            at: at(1_101).latest,
            writes: write("a", "1"),
            participants: vec![],
        },
    };
    assert_eq!(split.log(late), Applied::Ended(attempt(1).txn, Outcome::Aborted));
    assert_eq!(split.replica.rows().newest(&key("a")), Ok(None));
}

#[test]
fn a_snapshot_waits_for_what_is_prepared_under_it_and_for_nothing_else() {
    let mut split = Split::new();
    let promised = split.prepare(1, write("a", "1"), at(1_100));
    let (row, other) = (Range::point(&key("a")), Range::point(&key("b")));
    let now = at(1_200);
    let Split { leader, replica } = &mut split;
    assert_eq!(leader.snapshot(replica, &row, promised.before(), now), Ok(Snapshot::Whole));
    assert_eq!(leader.snapshot(replica, &row, promised, now), Ok(Snapshot::NotYet));
    assert_eq!(leader.snapshot(replica, &other, now.earliest, now), Ok(Snapshot::Whole));
    assert_eq!(replica.safe_time().safe(), promised.before());
    assert!(matches!(leader.snapshot(replica, &row, now.latest.next(), now), Err(Refusal::Future { .. })));
    split.resolve(1, Outcome::Committed(at(1_150).latest), now);
    let Split { leader, replica } = &mut split;
    assert_eq!(leader.snapshot(replica, &row, now.earliest, now), Ok(Snapshot::Whole));
    assert!(replica.rows().get(&key("a"), now.earliest).unwrap().is_some());
}

#[test]
fn nothing_is_committed_under_a_snapshot_that_was_shown() {
    let mut split = Split::new();
    let now = at(1_200);
    let shown = now.latest;
    let Split { leader, replica } = &mut split;
    assert_eq!(leader.snapshot(replica, &Range::all(), shown, now), Ok(Snapshot::Whole));
    // Not by this leader, even for a commit that arrived long before, and not by the next.
    assert_eq!(split.lock(1, &write("a", "1"), now).granted.len(), 1);
    let Split { leader, replica } = &mut split;
    let txn = attempt(1).txn;
    let entry = leader.commit(replica, txn, write("a", "1"), vec![], at(1_100).latest, now).unwrap();
    assert!(matches!(entry.command, Command::Commit { at, .. } if at > shown));

    let mut next = Split { replica: split.replica.clone(), leader: Leader::new(ME, 2) };
    next.lead(2, at(4_000));
    assert!(next.prepare(2, write("b", "1"), at(4_010)) > shown);
}

#[test]
fn what_was_prepared_is_still_locked_after_a_change_of_leader_reads_included() {
    let mut split = Split::new();
    split.read(1, "b", at(1_100));
    split.prepare(1, write("a", "1"), at(1_100));
    split.read(2, "c", at(1_100));
    split.lead(2, at(4_000));
    let now = at(4_010);
    // An older transaction waits, for what is written and for what was only read.
    assert_eq!(split.lock(0, &write("b", "2"), now), Changes::default());
    // One that had only read is lost: its locks died with the leader.
    let late = split.leader.lock_writes(&split.replica, attempt(2), true, &write("d", "1"), now);
    assert_eq!(late, Err(Refusal::Lost));
    split.resolve(1, Outcome::Committed(at(4_005).latest), now);
    assert_eq!(split.leader.release(attempt(1).txn).granted, [attempt(0).txn]);
}

#[test]
fn what_waited_for_a_lock_commits_after_the_one_that_held_it() {
    let mut split = Split::new();
    split.prepare(1, write("a", "1"), at(1_100));
    let arrival = at(1_101);
    assert_eq!(split.lock(2, &write("a", "2"), arrival), Changes::default());
    // The coordinator's split was far ahead.
    let decided = at(1_190).latest;
    let now = at(1_200);
    split.resolve(1, Outcome::Committed(decided), now);
    assert_eq!(split.leader.release(attempt(1).txn).granted, [attempt(2).txn]);
    let Split { leader, replica } = &mut split;
    let entry = leader.commit(replica, attempt(2).txn, write("a", "2"), vec![], arrival.latest, now).unwrap();
    assert!(matches!(entry.command, Command::Commit { at, .. } if at > decided));
    split.log(entry);
}

#[test]
fn a_client_that_is_gone_holds_nobody_up_unless_it_may_have_committed() {
    let mut split = Split::new();
    split.read(1, "a", at(1_100));
    split.prepare(2, write("b", "1"), at(1_100));
    split.renew(at(2_900));
    assert_eq!(split.lock(3, &write("a", "1"), at(2_950)), Changes::default());
    assert_eq!(split.lock(4, &write("b", "1"), at(2_950)), Changes::default());
    let Split { leader, replica } = &mut split;
    let idle = u64::try_from(IDLE.as_millis()).unwrap();
    assert_eq!(leader.expire(replica, at(1_100 + idle)), Changes::default());
    assert_eq!(leader.expire(replica, at(1_103 + idle)).granted, [attempt(3).txn]);
    assert!(!leader.knows(attempt(1).txn) && leader.knows(attempt(2).txn));
}

#[test]
fn a_leader_without_a_lease_says_and_does_nothing() {
    let mut split = Split::new();
    split.read(1, "a", at(1_100));
    let late = at(5_000);
    let Split { leader, replica } = &mut split;
    let refused = Err(Refusal::NotServing);
    assert_eq!(leader.read(replica, attempt(2), true, vec![], late), refused);
    assert_eq!(leader.snapshot(replica, &Range::all(), at(1_000).earliest, late), Err(Refusal::NotServing));
    assert_eq!(leader.close_at(replica, late.earliest, late), Err(Refusal::NotServing));
    // A commit's timestamp is within the lease, or there is no commit.
    let far = Timestamp(4_000 * MS);
    let short = leader.commit(replica, attempt(1).txn, vec![], vec![], far, at(1_200));
    assert_eq!(short, Err(Refusal::LeaseTooShort));
}

#[test]
fn an_outcome_is_kept_until_every_participant_has_it() {
    let mut split = Split::new();
    let now = at(1_200);
    let txn = attempt(1).txn;
    split.lock(1, &write("a", "1"), now);
    let Split { leader, replica } = &mut split;
    let entry = leader.commit(replica, txn, write("a", "1"), vec![SplitId(2)], now.latest, now).unwrap();
    let Applied::Ended(_, outcome) = split.log(entry) else { panic!("not committed") };
    let close = split.leader.close_at(&split.replica, at(1_300).earliest, at(1_300)).unwrap();
    split.log(close);
    let forget = |split: &mut Split| {
        let entry = split.leader.forget_outcomes(&split.replica, Timestamp::MAX, at(1_300)).unwrap();
        split.log(entry);
    };
    forget(&mut split);
    assert_eq!(split.replica.outcome(txn), Some(outcome));
    assert_eq!(split.replica.unsettled().count(), 1);
    let settled = split.leader.settled(vec![txn]);
    split.log(settled);
    let close = split.leader.close_at(&split.replica, at(1_400).earliest, at(1_400)).unwrap();
    split.log(close);
    let entry = split.leader.forget_outcomes(&split.replica, Timestamp::MAX, at(1_400)).unwrap();
    split.log(entry);
    // Forgotten, and so old that nobody can begin it again.
    assert_eq!(split.replica.outcome(txn), Some(Outcome::Aborted));
}

#[test]
fn a_log_that_contradicts_itself_stops_the_replica() {
    let mut split = Split::new();
    let close = Entry { term: 1, closed: Timestamp(2_000 * MS), command: Command::Close };
    assert_eq!(split.replica.apply(close.clone(), 2), Err(ReplicaError::Term { made: 1, logged: 2 }));
    split.log(close);
    let txn = attempt(1).txn;
    let (early, closed) = (Timestamp(1_999 * MS), Timestamp(2_000 * MS));
    let commit = Command::Commit { txn, at: early, writes: vec![], participants: vec![] };
    let entry = |command| Entry { term: 1, closed, command };
    assert_eq!(split.replica.apply(entry(commit), 1), Err(ReplicaError::Closed { at: early, closed }));
    let resolve = Command::Resolve { txn, outcome: Outcome::Committed(closed.next()) };
    assert_eq!(split.replica.apply(entry(resolve), 1), Err(ReplicaError::Unprepared(txn)));
}

#[test]
fn a_coordinator_decides_at_or_after_every_promise_and_the_arrival() {
    let arrival = at(1_000);
    let mut votes = Coordinator::new([SplitId(2), SplitId(3)], arrival.latest);
    assert_eq!(votes.prepared(SplitId(2), Timestamp(5)), Verdict::Pending);
    assert_eq!(votes.prepared(SplitId(2), Timestamp::MAX), Verdict::Pending);
    assert_eq!(votes.missing().collect::<Vec<_>>(), [SplitId(3)]);
    assert_eq!(votes.clone().prepared(SplitId(3), Timestamp(7)), Verdict::Commit(arrival.latest));
    assert_eq!(votes.clone().prepared(SplitId(3), at(1_500).latest), Verdict::Commit(at(1_500).latest));
    assert_eq!(votes.refused(), Verdict::Abort);
    assert_eq!(votes.prepared(SplitId(3), Timestamp(7)), Verdict::Abort);
}

fn restored(replica: &Replica, engine: &Arc<Memory>) -> Replica {
    let engine: Arc<dyn Engine> = Arc::<Memory>::clone(engine);
    Replica::restore(engine, replica.split(), replica.rows().home(), replica.state()).unwrap()
}

/// After a crash the log is applied again from the last checkpoint on, over rows that are later already.
#[test]
fn a_log_applied_again_over_later_rows_leads_to_the_same() {
    let engine = Arc::new(Memory::default());
    let first =
        Replica::restore(Arc::<Memory>::clone(&engine) as _, SplitId(1), HOME, State::default()).unwrap();
    let before = first.state();
    let mut split = Split { replica: first, leader: Leader::new(ME, 1) };
    let mut log = vec![];
    let mut note = |split: &mut Split, entry: Entry| {
        log.push(entry.clone());
        split.log(entry)
    };
    split.replica.begin_term(1);
    let grant = split.replica.lease().wanted(split.leader.tenure(), at(1_000)).unwrap();
    let lease = split.leader.lease(grant);
    note(&mut split, lease);
    for number in [1, 2, 3] {
        let txn = attempt(number).txn;
        let writes = write("a", "v");
        split.lock(number, &writes, at(1_100));
        let Split { leader, replica } = &mut split;
        let entry = match number {
            2 => leader.prepare(replica, attempt(2), writes, SplitId(9), at(1_100)).unwrap(),
            _ => leader.commit(replica, txn, writes, vec![], at(1_100).latest, at(1_100)).unwrap(),
        };
        note(&mut split, entry);
        if number == 2 {
            let Split { leader, replica } = &mut split;
            let outcome = Outcome::Committed(at(1_150).latest);
            let entry = leader.resolve(replica, txn, outcome, at(1_160)).unwrap();
            note(&mut split, entry);
        }
        split.leader.release(txn);
    }
    let Split { leader, replica } = &mut split;
    let forget = leader.forget_outcomes(replica, at(500).earliest, at(1_170)).unwrap();
    let all = Stretch::default();
    let collect = leader.collect(replica, at(1_120).earliest, all, at(1_170)).unwrap();
    note(&mut split, forget);
    note(&mut split, collect);
    let engine_dyn: Arc<dyn Engine> = Arc::<Memory>::clone(&engine);
    let mut again = Replica::restore(engine_dyn, SplitId(1), HOME, before).unwrap();
    for entry in log {
        again.apply(entry, 1).unwrap();
    }
    assert_eq!(again.state(), split.replica.state());
    let versions = |replica: &Replica| {
        let mut all = vec![];
        replica.rows().versions(replica.range(), &mut |key, version| all.push((key, version))).unwrap();
        all
    };
    assert_eq!(versions(&again), versions(&split.replica));
    assert!(again.outcomes().eq(split.replica.outcomes()));
    assert_eq!(restored(&again, &engine).state(), again.state());
}

#[test]
fn a_split_leaves_each_half_its_rows_and_both_the_outcomes() {
    let mut split = Split::new();
    split.commit(1, "a", "1", at(1_100));
    split.commit(2, "m", "2", at(1_200));
    split.leader.freeze();
    let refused = split.leader.read(&split.replica, attempt(3), true, vec![], at(1_300));
    assert_eq!(refused, Err(Refusal::Frozen));
    let command = Command::Split { at: key("m"), right: SplitId(2), leader: ME };
    let entry = split.leader.change(&split.replica, command, at(1_300)).unwrap();
    let right = split.replica.divide(&entry, 1).unwrap().unwrap();
    assert!(!split.replica.range().contains(&key("m")) && right.range().contains(&key("m")));
    assert!(right.rows().newest(&key("m")).unwrap().is_some());
    assert_eq!(right.outcome(attempt(1).txn), split.replica.outcome(attempt(1).txn));
    assert!(right.outcome(attempt(2).txn).is_some());
    // Its lease goes on under the same node in the first term that it can lead there, and under nobody else.
    let tenure = |term| crate::lease::Tenure { node: ME, term };
    assert!(right.lease().serves(tenure(FIRST_TERM), at(1_400)));
    assert!(!right.lease().serves(tenure(3), at(1_400)));
}

#[test]
fn a_promise_is_never_divided() {
    let mut split = Split::new();
    split.prepare(1, write("a", "1"), at(1_100));
    split.leader.freeze();
    let command = Command::Split { at: key("m"), right: SplitId(2), leader: ME };
    assert_eq!(split.leader.change(&split.replica, command.clone(), at(1_200)), Err(Refusal::Committing));
    let entry = Entry { term: 1, closed: at(1_200).earliest, command };
    assert!(split.replica.divide(&entry, 1).unwrap().is_none());
}

#[test]
fn who_lets_go_of_its_lease_leaves_no_gap_and_no_overlap() {
    let mut split = Split::new();
    let last = split.commit(1, "a", "1", at(1_100));
    split.leader.freeze();
    let entry = split.leader.change(&split.replica, Command::Yield, at(1_200)).unwrap();
    split.log(entry);
    let now = at(1_210);
    assert!(!split.replica.lease().serves(split.leader.tenure(), now));
    split.lead(2, now);
    assert!(split.replica.lease().serves(split.leader.tenure(), now));
    let again = split.commit(2, "a", "2", now);
    assert!(again > last);
}

#[test]
fn a_request_that_comes_after_its_transaction_was_wounded_does_not_revive_it() {
    let mut split = Split::new();
    split.read(2, "a", at(1_100));
    let changes = split.lock(1, &write("a", "1"), at(1_101));
    assert_eq!(changes, Changes { granted: vec![attempt(1).txn], wounded: vec![attempt(2).txn] });
    let Split { leader, replica } = &mut split;
    let late = leader.read(replica, attempt(2), true, vec![Range::point(&key("a"))], at(1_110));
    assert_eq!(late, Err(Refusal::Lost));
    let idle = at(1_110 + 60_000);
    leader.expire(replica, idle);
    assert!(!leader.knows(attempt(1).txn));
}

#[test]
fn what_was_aborted_and_forgotten_does_not_happen_when_the_log_is_applied_again() {
    let engine: Arc<dyn Engine> = Arc::new(Memory::default());
    let replica = Replica::restore(Arc::clone(&engine), SplitId(1), HOME, State::default()).unwrap();
    let mut split = Split { replica, leader: Leader::new(ME, 1) };
    split.lead(1, at(1_000));
    let txn = attempt(1).txn;
    split.resolve(1, Outcome::Aborted, at(1_100));
    let saved = split.replica.state();
    let mut checkpoint = Batch::default();
    split.replica.save_outcomes(&mut checkpoint);
    engine.write(checkpoint).unwrap();
    let commit = || Entry {
        term: 1,
        closed: at(1_100).latest,
        command: Command::Commit { txn, at: at(1_101).latest, writes: write("a", "1"), participants: vec![] },
    };
    let forget = || Entry {
        term: 1,
        closed: at(1_102).latest,
        command: Command::Forget { outcomes: txn.started.next() },
    };
    split.log(commit());
    split.log(forget());
    let mut again = Replica::restore(engine, SplitId(1), HOME, saved).unwrap();
    for entry in [commit(), forget()] {
        again.apply(entry, 1).unwrap();
    }
    assert_eq!(again.rows().newest(&key("a")), Ok(None));
}

#[test]
fn a_split_takes_in_only_what_begins_where_it_ends() {
    let mut left = replica(1);
    let cut = |right, row| Entry {
        term: 1,
        closed: Timestamp::ZERO,
        command: Command::Split { at: key(row), right: SplitId(right), leader: ME },
    };
    let mut batch = Batch::default();
    let right = left.divide(&cut(2, "m"), 1).unwrap().unwrap();
    let middle = left.divide(&cut(3, "g"), 1).unwrap().unwrap();
    let absorb =
        Entry { term: 1, closed: Timestamp::ZERO, command: Command::Absorb { right: SplitId(2), end: None } };
    let before = left.range().clone();
    assert_eq!(left.absorb(&absorb, 1, &right, &mut batch), Ok(false));
    assert_eq!(left.range(), &before);
    let mut middle = middle;
    assert_eq!(middle.absorb(&absorb, 1, &right, &mut batch), Ok(true));
    assert_eq!(middle.range().end(), None);
}

/// What the right half has heard of a transaction, the left half may have promised and not heard yet.
#[test]
fn a_promise_is_kept_by_a_split_that_takes_in_one_that_kept_it_already() {
    let mut left = Split::new();
    let entry = |closed, command| Entry { term: 1, closed, command };
    let cut = Command::Split { at: key("m"), right: SplitId(2), leader: ME };
    let cut = entry(left.replica.safe_time().closed(), cut);
    let mut batch = Batch::default();
    let mut right = left.replica.divide(&cut, 1).unwrap().unwrap();

    let promised = left.prepare(1, write("a", "1"), at(1_100));
    let txn = attempt(1).txn;
    let theirs = Prepared { writes: write("z", "1"), ..left.replica.promise(txn).unwrap().clone() };
    right.apply(entry(promised, Command::Prepare { txn, prepared: theirs }), 1).unwrap();
    let resolve = entry(promised, Command::Resolve { txn, outcome: Outcome::Committed(promised) });
    right.apply(resolve.clone(), 1).unwrap();

    let absorb = entry(promised, Command::Absorb { right: SplitId(2), end: None });
    assert_eq!(left.replica.absorb(&absorb, 1, &right, &mut batch), Ok(true));
    left.log(resolve);
    assert!(left.replica.rows().newest(&key("a")).unwrap().is_some());
}
