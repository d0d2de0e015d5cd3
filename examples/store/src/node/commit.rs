//! Commits: within one split a round of consensus, across splits in two phases with the first row's split as the
//! coordinator. What is said here may be lost or said twice; what counts is in the logs.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{Answer, Due, Held, Node, Refused, locked::Then, told};
use crate::{
    group::Group,
    keys::Range,
    lease::NodeId,
    mvcc::Mutation,
    truetime::{Interval, Timestamp},
    txn::{Attempt, Coordinator, Outcome, Refusal, SplitId, TxnId, Verdict},
    wal::Disk,
    wire::{PeerMessage, Vote},
};

/// A commit that is not decided by then is aborted.
const DECIDE_WITHIN: Duration = Duration::from_secs(4);
/// Ticks between asking again for promises that have not come.
const ASK_TICKS: u64 = 5;
/// Ticks between telling participants again what was decided.
const TELL_TICKS: u64 = 20;
/// Ticks between asking what became of a promise.
const DOUBT_TICKS: u64 = 20;
/// A promise this old has a coordinator that died, or a decision that was lost.
const DOUBT_AFTER: Duration = Duration::from_millis(500);

/// Who asks for a commit, and `TT.latest` of when it came.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) token: u64,
    pub(super) attempt: Attempt,
    pub(super) arrived: Timestamp,
}

/// A commit that this node coordinates. What it knows is lost with it; what counts is in the logs.
pub(super) struct Committing {
    /// Who waits for the end: a client may ask twice.
    tokens: Vec<u64>,
    attempt: Attempt,
    /// The split that decides, and the term in which it is led here.
    split: SplitId,
    term: u64,
    writes: Vec<Mutation>,
    parts: BTreeMap<SplitId, Part>,
    votes: Coordinator,
    stage: Stage,
    until: Timestamp,
    /// When the decision was proposed.
    proposed: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It waits for locks here, and for promises.
    Locking,
    /// It has its locks, and waits for promises.
    Locked,
    /// The decision is on its way into the log.
    Logged,
    /// The decision stands, and waits for its time to pass.
    Decided(Outcome),
}

struct Part {
    writes: Vec<Mutation>,
    held: Option<u64>,
}

/// A promise that this node's split was asked for.
pub(super) struct Promise {
    pub(super) attempt: Attempt,
    pub(super) writes: Vec<Mutation>,
    pub(super) coordinator: SplitId,
    pub(super) from: NodeId,
}

impl<D: Disk> Node<D> {
    pub(super) fn commit(&mut self, asked: Asked, held: &[Held], writes: Vec<Mutation>, now: Interval) {
        let Asked { token, arrived, .. } = asked;
        let first = match writes.first() {
            Some(write) => self.split_of(&write.key),
            None => held.first().map(|held| held.split).ok_or(Refused::Ended),
        };
        match first {
            Ok(split) => {
                if let Err(refused) = self.begin_commit(asked, split, held, writes, now) {
                    self.answer(token, Err(refused));
                }
            }
            // A transaction that neither read nor wrote is over as soon as its time has passed.
            Err(Refused::Ended) => {
                self.after(arrived, Due::Answer(token, Ok(Answer::Committed { at: arrived })));
            }
            Err(refused) => self.answer(token, Err(refused)),
        }
    }

    fn begin_commit(
        &mut self,
        asked: Asked,
        split: SplitId,
        held: &[Held],
        writes: Vec<Mutation>,
        now: Interval,
    ) -> Result<(), Refused> {
        let Asked { token, attempt, arrived } = asked;
        let txn = attempt.txn;
        if let Some(under_way) = self.commits.get_mut(&txn) {
            under_way.tokens.push(token);
            return Ok(());
        }
        if self.rolled_back.contains_key(&txn) {
            return Err(Refused::Ended);
        }
        // Its end is on its way into the log.
        if self.aborts.contains_key(&(split, txn)) {
            return Err(Refused::Aborted);
        }
        let group = self.groups.get(split).ok_or_else(|| self.not_here(split))?;
        let range = group.replica().range().clone();
        let known = group.replica().outcome(txn);
        let Some((leader, replica)) = self.led(split) else { return Err(self.not_leader(split)) };
        let term = leader.term();
        if let Err(refusal) = leader.check_serving(replica, now) {
            return Err(self.refused(split, refusal));
        }
        if let Some(outcome) = known {
            let at = told(outcome).ok_or(Refused::Aborted)?;
            self.after(at, Due::Answer(token, Ok(Answer::Committed { at })));
            return Ok(());
        }
        // A split that has become part of another took its locks with it.
        if held.iter().any(|held| !self.is_known(held.split)) {
            return Err(Refused::Aborted);
        }
        let (own, parts) = self.divide_writes(split, &range, held, writes)?;
        let read_here = held.iter().find(|held| held.split == split).map(|held| held.term);
        if read_here.is_some_and(|held| held != term) {
            return Err(Refused::Aborted);
        }
        self.count(split, own.first().map(|write| Range::point(&write.key)).as_ref());
        let Some((leader, replica)) = self.led(split) else { return Err(self.not_leader(split)) };
        let locked = leader.lock_writes(replica, attempt, read_here.is_some(), &own, now);
        let changes = locked.map_err(|refusal| match refusal {
            // The entry is in the log already, of an attempt to commit whose answer was lost.
            Refusal::Committing => Refused::Unknown,
            refusal => self.refused(split, refusal),
        })?;
        let commit = Committing {
            tokens: vec![token],
            attempt,
            split,
            term,
            writes: own,
            votes: Coordinator::new(parts.keys().copied(), arrived),
            parts,
            stage: Stage::Locking,
            until: now.latest.plus(DECIDE_WITHIN),
            proposed: now.earliest,
        };
        self.ask_for_promises(&commit);
        self.commits.insert(txn, commit);
        self.wait(split, txn, Then::Commit(txn), changes, now);
        Ok(())
    }

    /// What is written at `split`, whose range is `range`, and what the others must promise.
    fn divide_writes(
        &self,
        split: SplitId,
        range: &Range,
        held: &[Held],
        writes: Vec<Mutation>,
    ) -> Result<(Vec<Mutation>, BTreeMap<SplitId, Part>), Refused> {
        let part = |held: Option<u64>| Part { writes: vec![], held };
        let mut parts: BTreeMap<_, _> = held
            .iter()
            .filter(|held| held.split != split)
            .map(|held| (held.split, part(Some(held.term))))
            .collect();
        let mut own = Vec::new();
        for write in writes {
            if range.contains(&write.key) {
                own.push(write);
            } else {
                let other = self.split_of(&write.key)?;
                if other == split {
                    return Err(self.not_here(split));
                }
                parts.entry(other).or_insert_with(|| part(None)).writes.push(write);
            }
        }
        Ok((own, parts))
    }

    fn ask_for_promises(&mut self, commit: &Committing) {
        let asked: Vec<_> = commit
            .votes
            .missing()
            .filter_map(|split| {
                let part = commit.parts.get(&split)?;
                let (held, writes) = (part.held, part.writes.clone());
                let (attempt, coordinator) = (commit.attempt, commit.split);
                Some((split, PeerMessage::Prepare { split, attempt, held, writes, coordinator }))
            })
            .collect();
        for (split, message) in asked {
            self.say_to_leader(split, message);
        }
    }

    /// The coordinator's own locks are there.
    pub(super) fn locked(&mut self, txn: TxnId, now: Interval) {
        if let Some(commit) = self.commits.get_mut(&txn) {
            commit.stage = Stage::Locked;
            self.decide(txn, now);
        }
    }

    pub(super) fn voted(&mut self, split: SplitId, txn: TxnId, vote: Vote, now: Interval) {
        let Some(commit) = self.commits.get_mut(&txn) else { return };
        match vote {
            Vote::Promised(at) => commit.votes.prepared(split, at),
            Vote::Refused => commit.votes.refused(),
        };
        self.decide(txn, now);
    }

    /// Logs the decision if everything for it is there.
    fn decide(&mut self, txn: TxnId, now: Interval) {
        let Some(commit) = self.commits.get_mut(&txn) else { return };
        let floor = match (commit.votes.verdict(), commit.stage) {
            (Verdict::Abort, Stage::Locking | Stage::Locked) => return self.abort(txn, &Refused::Aborted),
            (Verdict::Commit(floor), Stage::Locked) => floor,
            _ => return,
        };
        let (split, writes) = (commit.split, commit.writes.clone());
        let others = commit.parts.keys().copied().collect();
        let Some((leader, replica)) = self.led(split) else {
            return self.abort(txn, &self.not_leader(split));
        };
        let entry = match leader.commit(replica, txn, writes, others, floor, now) {
            Ok(entry) => entry,
            // It is being renewed: the next tick tries again.
            Err(Refusal::LeaseTooShort) => return,
            Err(Refusal::Lost) => return self.abort(txn, &Refused::Aborted),
            Err(refusal) => return self.abort(txn, &self.refused(split, refusal)),
        };
        if !self.propose(split, &entry) {
            if let Some((leader, _)) = self.led(split) {
                leader.retract(txn);
            }
            return self.abort(txn, &self.not_leader(split));
        }
        if let Some(commit) = self.commits.get_mut(&txn) {
            commit.stage = Stage::Logged;
            commit.proposed = now.earliest;
        }
    }

    /// Ends a commit that is not in the log. Whoever may have promised hears of it once the abort is: until then the
    /// same commit, sent again, could still happen.
    pub(super) fn abort(&mut self, txn: TxnId, refused: &Refused) {
        let Some(commit) = self.commits.remove(&txn) else { return };
        let split = commit.split;
        self.refuse(commit.tokens, refused);
        self.lock_waits.remove(&(split, txn));
        let changes = self.led(split).map(|(leader, replica)| leader.abandon(replica, txn));
        self.absorb(split, changes.unwrap_or_default());
        if !commit.parts.is_empty() {
            self.aborts.entry((split, txn)).or_default().extend(commit.parts.into_keys());
        }
    }

    /// Ends commits that `split` coordinates and that are not in its log: their locks are gone.
    pub(super) fn abort_undecided(&mut self, split: SplitId) {
        let undecided: Vec<_> = self
            .commits
            .iter()
            .filter(|(_, commit)| commit.split == split)
            .filter(|(_, commit)| matches!(commit.stage, Stage::Locking | Stage::Locked))
            .map(|(txn, _)| *txn)
            .collect();
        for txn in undecided {
            self.abort(txn, &Refused::Aborted);
        }
    }

    /// A split's log has said how a transaction ended.
    pub(super) fn ended(&mut self, split: SplitId, txn: TxnId, outcome: Outcome, now: Interval) {
        if let Some((coordinator, from)) = self.askers.remove(&(split, txn)) {
            let to = self.leader_of(coordinator).unwrap_or(from);
            self.say(to, PeerMessage::Heard { split, txn, coordinator });
        }
        if let Some(parts) = self.aborts.remove(&(split, txn)) {
            for part in parts {
                let decided = PeerMessage::Decided { split: part, txn, coordinator: split, outcome };
                self.say_to_leader(part, decided);
            }
        }
        // Those who follow have no locks to let go of, and nobody to tell.
        if self.led(split).is_none() && !self.commits.contains_key(&txn) {
            return;
        }
        let at = told(outcome).unwrap_or_default();
        match self.commits.get_mut(&txn).filter(|commit| commit.split == split) {
            Some(commit) => {
                commit.stage = Stage::Decided(outcome);
                let all = Duration::from_nanos(at.0.saturating_sub(commit.proposed.0));
                let passed = Duration::from_nanos(now.earliest.0.saturating_sub(commit.proposed.0));
                self.status.commit_wait += all;
                self.status.commit_wait_hidden += all.min(passed);
                self.after(at, Due::Commit(split, txn));
            }
            None => self.after(at, Due::Release(split, txn)),
        }
    }

    /// A decision's time has passed: everybody may hear of it.
    pub(super) fn tell(&mut self, split: SplitId, txn: TxnId) {
        self.release(split, txn);
        let Some(commit) = self.commits.remove(&txn) else { return };
        let Stage::Decided(outcome) = commit.stage else { return };
        match told(outcome) {
            Some(at) => {
                self.status.commits += 1;
                self.status.commits_across += u64::from(!commit.parts.is_empty());
                for token in commit.tokens {
                    self.answer(token, Ok(Answer::Committed { at }));
                }
            }
            None => self.refuse(commit.tokens, &Refused::Aborted),
        }
        for part in commit.parts.into_keys() {
            let decided = PeerMessage::Decided { split: part, txn, coordinator: split, outcome };
            self.say_to_leader(part, decided);
        }
    }

    /// A coordinator wants this node's split to promise.
    #[expect(clippy::too_many_arguments, reason = "the message's own fields")]
    pub(super) fn asked_to_promise(
        &mut self,
        from: NodeId,
        split: SplitId,
        attempt: Attempt,
        held: Option<u64>,
        writes: Vec<Mutation>,
        coordinator: SplitId,
        now: Interval,
    ) {
        let txn = attempt.txn;
        // It is asked again: nothing is lost by silence.
        if self.lock_waits.contains_key(&(split, txn)) {
            return;
        }
        let Some(group) = self.groups.get(split) else { return };
        let replica = group.replica();
        let range = replica.range().clone();
        // INVARIANT: a promise is to one coordinator. To two, the one could commit what the other aborts: a commit that
        // is sent again has another coordinator when its first row has come to another split meanwhile.
        let stands = replica.promise(txn).map(|promise| match promise.coordinator == coordinator {
            true => Vote::Promised(promise.at),
            false => Vote::Refused,
        });
        let ended = replica.outcome(txn);
        let aborts = self.aborts.contains_key(&(split, txn));
        let Some((leader, replica)) = self.led(split) else { return };
        let serving = leader.check_serving(replica, now);
        if serving == Err(Refusal::NotServing) {
            return;
        }
        let lost = held.is_some_and(|term| term != leader.term() || !leader.knows(txn));
        let vote = match (stands, ended) {
            (Some(stands), _) => Some(stands),
            (None, Some(Outcome::Committed(_))) => return,
            (None, Some(Outcome::Aborted)) => Some(Vote::Refused),
            (None, None) if aborts || lost || !writes.iter().all(|write| range.contains(&write.key)) => {
                Some(Vote::Refused)
            }
            (None, None) => None,
        };
        if let Some(vote) = vote {
            return self.say(from, PeerMessage::Vote { split, txn, coordinator, vote });
        }
        // A split that is about to change takes nothing new. What it has promised before it still says.
        match leader.lock_writes(replica, attempt, held.is_some(), &writes, now) {
            Ok(changes) => {
                let promise = Promise { attempt, writes, coordinator, from };
                self.count(split, None);
                self.wait(split, txn, Then::Promise(promise), changes, now);
            }
            Err(Refusal::NotServing | Refusal::Frozen | Refusal::Committing) => {}
            Err(_) => {
                self.say(from, PeerMessage::Vote { split, txn, coordinator, vote: Vote::Refused });
            }
        }
    }

    /// The locks for a promise are there: it goes into the log.
    pub(super) fn promise(&mut self, split: SplitId, promise: Promise, now: Interval) {
        let Promise { attempt, writes, coordinator, from } = promise;
        let txn = attempt.txn;
        let made = self
            .led(split)
            .map(|(leader, replica)| leader.prepare(replica, attempt, writes, coordinator, now));
        match made {
            Some(Ok(entry)) => {
                self.askers.insert((split, txn), (coordinator, from));
                if !self.propose(split, &entry) {
                    if let Some((leader, _)) = self.led(split) {
                        leader.retract(txn);
                    }
                    self.release(split, txn);
                }
            }
            Some(Err(Refusal::Lost)) => {
                self.say(from, PeerMessage::Vote { split, txn, coordinator, vote: Vote::Refused });
            }
            // The split is about to change, or another leads it: its locks go, and the coordinator asks again.
            Some(Err(_)) => self.release(split, txn),
            None => {}
        }
    }

    /// A promise stands.
    pub(super) fn promised(&mut self, split: SplitId, txn: TxnId, at: Timestamp) {
        let Some((coordinator, from)) = self.askers.get(&(split, txn)).copied() else { return };
        self.say(from, PeerMessage::Vote { split, txn, coordinator, vote: Vote::Promised(at) });
    }

    /// A coordinator has decided.
    pub(super) fn decided(
        &mut self,
        from: NodeId,
        split: SplitId,
        txn: TxnId,
        coordinator: SplitId,
        outcome: Outcome,
        now: Interval,
    ) {
        // A participant that has become part of another had logged the decision before.
        let Some(here) = self.speaker(split) else { return };
        let Some((leader, replica)) = self.led(here) else { return };
        if let Some(known) = replica.outcome(txn) {
            if known == outcome {
                self.say(from, PeerMessage::Heard { split, txn, coordinator });
            }
            return;
        }
        let heard = match (replica.promise(txn), outcome) {
            // Whoever commits had all promises, and nobody says so before its time has passed.
            (Some(promise), Outcome::Committed(at)) => promise.at <= at && at <= now.latest,
            (Some(promise), Outcome::Aborted) => promise.coordinator == coordinator,
            (None, outcome) => outcome == Outcome::Aborted && here == split,
        };
        if !heard {
            return;
        }
        let Ok(entry) = leader.resolve(replica, txn, outcome, now) else { return };
        self.askers.insert((split, txn), (coordinator, from));
        self.propose(split, &entry);
    }

    /// A participant in doubt wants to know. If nobody here knows of a commit, there is none from now on.
    pub(super) fn asked_for_decision(
        &mut self,
        from: NodeId,
        split: SplitId,
        txn: TxnId,
        coordinator: SplitId,
        now: Interval,
    ) {
        if self.commits.contains_key(&txn) {
            return;
        }
        let Some(speaker) = self.speaker(coordinator) else { return };
        let Some((leader, replica)) = self.led(speaker) else { return };
        if !replica.decides(txn) {
            return;
        }
        match replica.outcome(txn) {
            Some(outcome) => {
                let passed = told(outcome).is_none_or(|at| now.is_after(at));
                if passed && leader.check_serving(replica, now) != Err(Refusal::NotServing) {
                    self.say(from, PeerMessage::Decided { split, txn, coordinator, outcome });
                }
            }
            None => {
                let Ok(entry) = leader.resolve(replica, txn, Outcome::Aborted, now) else { return };
                if self.propose(speaker, &entry) {
                    self.aborts.entry((speaker, txn)).or_default().insert(split);
                }
            }
        }
    }

    /// Says again what may have been lost, and gives up what cannot be.
    pub(super) fn commits_go_on(&mut self, now: Interval) {
        for txn in self.commits.keys().copied().collect::<Vec<_>>() {
            self.commit_goes_on(txn, now);
        }
        if self.ticks.is_multiple_of(ASK_TICKS) {
            self.log_aborts(now);
            self.settle();
            self.wound_promises();
        }
        if self.ticks.is_multiple_of(TELL_TICKS) {
            self.tell_again(now);
        }
        if self.ticks.is_multiple_of(DOUBT_TICKS) {
            self.doubt(now);
        }
    }

    fn commit_goes_on(&mut self, txn: TxnId, now: Interval) {
        let Some(commit) = self.commits.get(&txn) else { return };
        let (split, term, stage) = (commit.split, commit.term, commit.stage);
        let over = now.is_after(commit.until);
        let leads = self.led(split).is_some_and(|(leader, _)| leader.term() == term);
        match stage {
            Stage::Decided(_) => {}
            Stage::Logged if leads => {}
            // It is in a log that another node leads: how it ends, that one will know.
            Stage::Logged => {
                if let Some(commit) = self.commits.remove(&txn) {
                    self.refuse(commit.tokens, &Refused::Unknown);
                }
            }
            _ if !leads => self.abort(txn, &self.not_leader(split)),
            _ if over => self.abort(txn, &Refused::Busy("the commit took too long")),
            _ => {
                if self.ticks.is_multiple_of(ASK_TICKS)
                    && let Some(commit) = self.commits.remove(&txn)
                {
                    self.ask_for_promises(&commit);
                    self.commits.insert(txn, commit);
                }
                self.decide(txn, now);
            }
        }
    }

    /// Puts aborts into the logs that this node leads. Those it leads no longer are asked for by whoever has promised.
    fn log_aborts(&mut self, now: Interval) {
        for (split, txn) in self.aborts.keys().copied().collect::<Vec<_>>() {
            let entry = self.led(split).and_then(|(leader, replica)| {
                let decides = replica.decides(txn);
                decides.then(|| leader.resolve(replica, txn, Outcome::Aborted, now).ok()).flatten()
            });
            if let Some(entry) = entry {
                self.propose(split, &entry);
            }
        }
    }

    /// The split here that is `split`, or that it has become part of.
    fn speaker(&self, split: SplitId) -> Option<SplitId> {
        let speaks = |(_, group): &(SplitId, &Group)| group.replica().speaks_for(split);
        self.groups.get(split).map(|_| split).or_else(|| Some(self.groups.iter().find(speaks)?.0))
    }

    /// Whether there is such a split, as far as this node has heard.
    fn is_known(&self, split: SplitId) -> bool {
        self.groups.get(split).is_some() || self.routes.get(split).is_some()
    }

    /// Forgets decisions that every participant has logged.
    fn settle(&mut self) {
        for split in self.groups.iter().map(|(split, _)| split).collect::<Vec<_>>() {
            let heard_of = &self.heard_of;
            let Some((leader, replica)) = self.groups.get_mut(split).and_then(|group| group.leader()) else {
                continue;
            };
            let all = |txn: TxnId, parts: &[SplitId]| {
                heard_of.get(&(split, txn)).is_some_and(|heard| parts.iter().all(|part| heard.contains(part)))
            };
            let settled: Vec<_> =
                replica.unsettled().filter(|(txn, parts)| all(*txn, parts)).map(|(txn, _)| txn).collect();
            if !settled.is_empty() {
                let entry = leader.settled(settled.clone());
                if self.propose(split, &entry) {
                    for txn in settled {
                        self.heard_of.remove(&(split, txn));
                    }
                }
            }
        }
    }

    fn tell_again(&mut self, now: Interval) {
        let mut untold = Vec::new();
        for (split, group) in self.groups.iter_mut() {
            let Some((_, replica)) = group.leader() else { continue };
            for (txn, parts) in replica.unsettled() {
                let Some(outcome) = replica.outcome(txn) else { continue };
                if told(outcome).is_some_and(|at| now.is_after(at)) {
                    untold.extend(parts.iter().map(|part| (*part, txn, split, outcome)));
                }
            }
        }
        for (part, txn, coordinator, outcome) in untold {
            let heard: Option<&BTreeSet<_>> = self.heard_of.get(&(coordinator, txn));
            if heard.is_none_or(|heard| !heard.contains(&part)) {
                let decided = PeerMessage::Decided { split: part, txn, coordinator, outcome };
                match self.leader_of(part) {
                    Some(leader) => self.say(leader, decided),
                    // It has become part of another: somebody leads that.
                    None => self.say_to_all(&decided),
                }
            }
        }
    }

    /// An older transaction waits for a promise of this one at another split: if it waits itself, it ends.
    pub(super) fn wounded(&mut self, txn: TxnId) {
        let Some(commit) = self.commits.get(&txn) else { return };
        let undecided = matches!(commit.stage, Stage::Locking | Stage::Locked);
        let waits = commit.stage == Stage::Locking || commit.votes.missing().next().is_some();
        if undecided && waits {
            self.status.wounded += 1;
            self.abort(txn, &Refused::Aborted);
        }
    }

    /// An older transaction took the locks that it had at its coordinator, while it waited for promises.
    pub(super) fn wounded_here(&mut self, split: SplitId, txn: TxnId) {
        let locked = |commit: &&Committing| commit.split == split && commit.stage == Stage::Locked;
        if self.commits.get(&txn).filter(locked).is_some() {
            self.abort(txn, &Refused::Aborted);
        }
    }

    /// What is promised is nobody's to end but its coordinator's.
    fn wound_promises(&mut self) {
        let mut wounds = Vec::new();
        for (split, group) in self.groups.iter_mut() {
            let Some((leader, replica)) = group.leader() else { continue };
            let promises = leader.promises_in_the_way(replica);
            wounds.extend(promises.into_iter().map(|(txn, coordinator)| (split, txn, coordinator)));
        }
        for (split, txn, coordinator) in wounds {
            self.say_to_leader(coordinator, PeerMessage::Wound { split, txn, coordinator });
        }
    }

    fn doubt(&mut self, now: Interval) {
        let mut asked = Vec::new();
        for (split, group) in self.groups.iter_mut() {
            let Some((_, replica)) = group.leader() else { continue };
            asked.extend(
                replica
                    .in_doubt()
                    .filter(|(_, promise)| now.is_after(promise.at.plus(DOUBT_AFTER)))
                    .map(|(txn, promise)| (split, txn, promise.coordinator)),
            );
        }
        for (split, txn, coordinator) in asked {
            let ask = PeerMessage::Ask { split, txn, coordinator };
            match self.leader_of(coordinator) {
                Some(leader) => self.say(leader, ask),
                // It has become part of another: somebody leads that.
                None => self.say_to_all(&ask),
            }
        }
    }
}
