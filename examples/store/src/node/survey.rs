//! Surveys of the splits that this node leads, one at a time and a step now and then: what they find to be forgotten goes
//! into the log, and how large a split is, and where its middle.

use std::collections::BTreeMap;

use super::{Node, change::Changing};
use crate::{
    group::Group,
    keys::Key,
    survey::{Step, Survey},
    truetime::{Interval, Timestamp},
    txn::{Replica, SplitId},
    wal::Disk,
};

/// Ticks between two steps.
const STEP_TICKS: u64 = 4;
/// Ticks between two surveys of a split.
const PAUSE_TICKS: u64 = 1_000;
/// The same for one that seems too large.
const LARGE_PAUSE_TICKS: u64 = 100;

/// What is known of the splits that this node leads.
#[derive(Default)]
pub(super) struct Surveys {
    under_way: Option<UnderWay>,
    done: BTreeMap<SplitId, Done>,
}

struct UnderWay {
    split: SplitId,
    term: u64,
    /// The newest commit when it began.
    newest: Timestamp,
    survey: Survey,
}

/// The last survey of a split.
pub(super) struct Done {
    term: u64,
    /// In ticks.
    at: u64,
    newest: Timestamp,
    horizon: Timestamp,
    middle: Option<Key>,
}

impl Surveys {
    /// The split is another one now.
    pub(super) fn forget(&mut self, split: SplitId) {
        self.done.remove(&split);
        self.under_way = self.under_way.take().filter(|under_way| under_way.split != split);
    }

    /// The middle of a split, by a survey of this leader's that ended at `since` or later.
    pub(super) fn middle(&self, split: SplitId, since: u64) -> Option<Option<&Key>> {
        let done = self.done.get(&split).filter(|done| done.at >= since)?;
        Some(done.middle.as_ref())
    }
}

impl<D: Disk> Node<D> {
    /// A step of the survey that is under way, or of the one that is needed most.
    pub(super) fn surveys_go_on(&mut self, now: Interval) {
        if !self.ticks.is_multiple_of(STEP_TICKS) {
            return;
        }
        let under_way = self.surveys.under_way.take().filter(|it| self.leads_in(it.split, it.term));
        let Some(mut it) = under_way.or_else(|| self.next_survey(now)) else { return };
        let Some(group) = self.groups.get(it.split) else { return };
        let replica = group.replica();
        let step = match it.survey.step(replica.rows(), replica.range(), self.config.survey_versions) {
            Ok(step) => step,
            Err(error) => {
                self.rows_failed(it.split, error);
                return;
            }
        };
        let Step { collectable, done } = step;
        let horizon = it.survey.horizon();
        if let Some(stretch) = collectable {
            let entry = self
                .led(it.split)
                .and_then(|(leader, replica)| leader.collect(replica, horizon, stretch, now).ok());
            // A lease that has just ended: the next survey finds it again.
            if let Some(entry) = entry {
                self.propose(it.split, &entry);
            }
        }
        if done {
            self.surveyed(&it, now);
        } else {
            self.surveys.under_way = Some(it);
        }
    }

    fn surveyed(&mut self, it: &UnderWay, now: Interval) {
        let size = it.survey.size();
        let entry = self.led(it.split).map(|(leader, _)| leader.surveyed(size));
        if let Some(entry) = entry {
            self.propose(it.split, &entry);
        }
        let middle = it.survey.middle().cloned();
        let done = Done {
            term: it.term,
            at: self.ticks,
            newest: it.newest,
            horizon: it.survey.horizon(),
            middle: middle.clone(),
        };
        self.surveys.done.insert(it.split, done);
        if size.1 > self.config.balance.split_bytes
            && let Some(middle) = middle
        {
            self.begin_split(None, it.split, Some(middle), now);
        }
    }

    /// Of the splits that a survey would find something new of, the one whose last is the longest ago.
    fn next_survey(&mut self, now: Interval) -> Option<UnderWay> {
        let led = self.groups.iter().filter(|(_, group)| group.led_by() == Some(self.config.me));
        let last = |split: SplitId, group: &Group| {
            self.surveys.done.get(&split).filter(|done| done.term == group.term())
        };
        let needed = led.filter(|(split, group)| {
            last(*split, group).is_none_or(|done| self.is_outdated(*split, group.replica(), done))
        });
        let mut needed: Vec<_> = needed
            .map(|(split, group)| (last(split, group).map(|done| done.at), split, group.term()))
            .collect();
        needed.sort_unstable();
        let keep = self.config.keep;
        // One that serves nobody for now, such as one that waits to be part of another, holds up no other.
        needed.into_iter().find_map(|(_, split, term)| {
            let (leader, replica) = self.led(split)?;
            leader.check_serving(replica, now).ok()?;
            let horizon = now.earliest.minus(keep).min(replica.safe_time().safe());
            Some(UnderWay { split, term, newest: replica.newest(), survey: Survey::new(horizon) })
        })
    }

    /// Whether another survey would find something else than the last: there were commits since, or versions too new to be
    /// forgotten.
    fn is_outdated(&self, split: SplitId, replica: &Replica, done: &Done) -> bool {
        let wanted = self.changing.get(&split).and_then(Changing::waits_for_middle);
        let large = replica.size().1 > self.config.balance.split_bytes;
        let pause = if large { LARGE_PAUSE_TICKS } else { PAUSE_TICKS };
        let news = replica.newest() > done.newest || done.horizon < done.newest;
        wanted.is_some_and(|since| done.at < since) || news && self.ticks >= done.at + pause
    }

    fn leads_in(&self, split: SplitId, term: u64) -> bool {
        self.groups
            .get(split)
            .is_some_and(|group| group.led_by() == Some(self.config.me) && group.term() == term)
    }
}
