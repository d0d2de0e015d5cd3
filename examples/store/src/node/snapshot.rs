//! Snapshots: rows at one moment, without locks, at a leader or at any replica that has caught up.

use std::time::Duration;

use super::{
    Answer, Due, Found, Moment, Node, Refused,
    locked::{Room, scan_rows},
};
use crate::{
    group::Group,
    keys::{Key, Range},
    truetime::{Interval, Timestamp},
    txn::{Refusal, Snapshot, SplitId},
    wal::Disk,
    wire::PeerMessage,
};

/// A moment this far ahead of this node's clock is waited for: another node's may be so much faster.
const AHEAD: Duration = Duration::from_millis(250);
/// After so long somebody else may have the moment sooner.
const PATIENCE: Duration = Duration::from_secs(3);
/// Ticks between asking a leader to close a moment.
const CLOSE_ASK_TICKS: u64 = 5;

/// A snapshot that cannot be shown yet.
pub(super) struct Pending {
    token: u64,
    what: What,
    at: Timestamp,
    until: Timestamp,
    /// When the splits' leaders were asked last to close the moment.
    asked: Option<u64>,
}

enum What {
    Rows(Vec<Key>),
    Range { asked: Range, limit: usize },
}

/// Whether a snapshot can be shown, and if not, who has to close it.
enum Ready {
    Now,
    Later(Option<SplitId>),
}

impl<D: Disk> Node<D> {
    pub(super) fn snapshot_read(&mut self, token: u64, keys: Vec<Key>, moment: Moment, now: Interval) {
        let spans: Vec<_> = keys.iter().map(Range::point).collect();
        self.begin_snapshot(token, What::Rows(keys), &spans, moment, now);
    }

    pub(super) fn snapshot_scan(
        &mut self,
        token: u64,
        range: &Range,
        moment: Moment,
        limit: usize,
        now: Interval,
    ) {
        let asked = range.clone();
        self.begin_snapshot(token, What::Range { asked, limit }, std::slice::from_ref(range), moment, now);
    }

    fn begin_snapshot(&mut self, token: u64, what: What, spans: &[Range], moment: Moment, now: Interval) {
        let at = match moment {
            Moment::Now => now.latest,
            Moment::Exactly(at) => at,
            Moment::Within(staleness) => self.freshest(spans, now).max(now.latest.minus(staleness)),
        };
        if at > now.latest.plus(AHEAD) {
            return self.answer(token, Err(Refused::Future { asked: at, latest: now.latest }));
        }
        if matches!(moment, Moment::Now)
            && let Some(split) = self.led_elsewhere(spans)
        {
            let refused = self.not_leader(split);
            return self.answer(token, Err(refused));
        }
        for span in spans {
            if let Some(split) = self.routes.at(span.start()).map(|route| route.split) {
                self.count(split, Some(span));
            }
        }
        let mut pending = Pending { token, what, at, until: now.latest.plus(PATIENCE), asked: None };
        if !self.try_snapshot(&mut pending, now) {
            self.snapshots.push(pending);
        }
    }

    /// One of the splits of `spans`, where others lead all of them, as far as is known. Here what was committed up to now
    /// could be shown too, but only after their logs have closed this very moment: a write of three logs for each read of
    /// somebody who would not hear that there is a better node to ask.
    fn led_elsewhere(&self, spans: &[Range]) -> Option<SplitId> {
        let mut elsewhere = None;
        for span in spans {
            let split = self.routes.at(span.start())?.split;
            if self.leader_of(split)? == self.config.me {
                return None;
            }
            elsewhere.get_or_insert(split);
        }
        elsewhere
    }

    /// The latest moment that the replicas here can show of all `spans`.
    fn freshest(&self, spans: &[Range], now: Interval) -> Timestamp {
        let safe = |span: &Range| {
            let group = self.routes.at(span.start()).and_then(|route| self.groups.get(route.split));
            group.map_or(Timestamp::ZERO, |group| group.replica().safe_time().safe_within(span))
        };
        spans.iter().map(safe).min().unwrap_or_default().min(now.latest)
    }

    pub(super) fn retry_snapshots(&mut self, now: Interval) {
        let mut pending = std::mem::take(&mut self.snapshots);
        pending.retain_mut(|pending| !self.try_snapshot(pending, now));
        self.snapshots.append(&mut pending);
    }

    /// Answers if it can. False as long as it must wait.
    fn try_snapshot(&mut self, pending: &mut Pending, now: Interval) -> bool {
        match self.snapshot_now(pending, now) {
            Ok(Some((answer, newest))) => {
                self.status.snapshot_reads += 1;
                // Nobody hears of a commit before its time has passed.
                if now.is_after(newest) {
                    self.answer(pending.token, Ok(answer));
                } else {
                    self.after(newest, Due::Answer(pending.token, Ok(answer)));
                }
                true
            }
            Ok(None) if now.is_after(pending.until) => {
                let safe = self.freshest(&spans_of(&pending.what), now);
                self.answer(pending.token, Err(Refused::TooStale { safe, leader: None }));
                true
            }
            Ok(None) => false,
            Err(refused) => {
                self.answer(pending.token, Err(refused));
                true
            }
        }
    }

    fn snapshot_now(
        &mut self,
        pending: &mut Pending,
        now: Interval,
    ) -> Result<Option<(Answer, Timestamp)>, Refused> {
        let at = pending.at;
        let mut parts = Vec::new();
        for span in spans_of(&pending.what) {
            parts.push(self.here(&span)?);
        }
        for (split, span) in &parts {
            if let Ready::Later(closer) = self.ready(*split, span, at, now)? {
                self.ask_to_close(closer, pending);
                return Ok(None);
            }
        }
        match &pending.what {
            What::Rows(keys) => self.rows_at(keys, &parts, at).map(Some),
            What::Range { asked, limit } => {
                let Some((split, within)) = parts.first() else {
                    return Err(Refused::NotHere { leader: None });
                };
                let Some(group) = self.groups.get(*split) else { return Err(self.not_here(*split)) };
                match scan_rows(group, within, asked, at, *limit) {
                    Ok((rows, rest, newest)) => {
                        Ok(Some((Answer::Scanned { rows, at, held: vec![], rest }, newest)))
                    }
                    Err(error) => Err(self.rows_failed(*split, error)),
                }
            }
        }
    }

    fn rows_at(
        &mut self,
        keys: &[Key],
        parts: &[(SplitId, Range)],
        at: Timestamp,
    ) -> Result<(Answer, Timestamp), Refused> {
        let mut rows = Vec::with_capacity(keys.len());
        let mut newest = Timestamp::ZERO;
        let mut room = Room::beside(std::iter::empty());
        for (key, (split, _)) in keys.iter().zip(parts) {
            let Some(group) = self.groups.get(*split) else { return Err(self.not_here(*split)) };
            match group.replica().rows().get(key, at) {
                Ok(version) => {
                    let version_at = version.as_ref().map_or(Timestamp::ZERO, |version| version.at);
                    newest = newest.max(version_at);
                    let value = version.and_then(|version| version.value);
                    let found = Found { key: key.clone(), value, version: version_at };
                    room.take(&found)?;
                    rows.push(found);
                }
                Err(error) => return Err(self.rows_failed(*split, error)),
            }
        }
        Ok((Answer::Rows { rows, at, held: vec![] }, newest))
    }

    /// The split here that has the beginning of `span`, and as much of the span as it has.
    fn here(&self, span: &Range) -> Result<(SplitId, Range), Refused> {
        let route = self.routes.at(span.start()).ok_or(Refused::NotHere { leader: None })?;
        let group = self.groups.get(route.split).filter(|group| group.is_filled());
        let group = group.ok_or_else(|| self.not_here(route.split))?;
        let starts_here = span.start() >= group.replica().range().start();
        let within = group.replica().range().intersection(span).filter(|_| starts_here);
        within.map(|within| (route.split, within)).ok_or_else(|| self.not_here(route.split))
    }

    fn ready(
        &mut self,
        split: SplitId,
        span: &Range,
        at: Timestamp,
        now: Interval,
    ) -> Result<Ready, Refused> {
        let Some(group) = self.groups.get_mut(split) else { return Ok(Ready::Later(None)) };
        let kept_since = group.replica().rows().kept_since();
        if at < kept_since {
            return Err(Refused::Collected { asked: at, kept_since });
        }
        if group.replica().safe_time().safe_within(span) >= at {
            return Ok(Ready::Now);
        }
        let led = group.leader().map(|(leader, replica)| leader.snapshot(replica, span, at, now));
        Ok(match led {
            Some(Ok(Snapshot::Whole)) => Ready::Now,
            Some(Ok(Snapshot::NotYet) | Err(Refusal::Future { .. })) => Ready::Later(None),
            _ => Ready::Later(Some(split)),
        })
    }

    /// A follower shows a moment only when its log has closed it: its leader is asked to.
    fn ask_to_close(&mut self, closer: Option<SplitId>, pending: &mut Pending) {
        let Some(split) = closer else { return };
        let waits = pending.asked.is_some_and(|asked| self.ticks < asked + CLOSE_ASK_TICKS);
        let leader = self.groups.get(split).and_then(Group::led_by);
        if let Some(leader) = leader.filter(|leader| !waits && *leader != self.config.me) {
            pending.asked = Some(self.ticks);
            self.say(leader, PeerMessage::Close { split, at: pending.at });
        }
    }
}

fn spans_of(what: &What) -> Vec<Range> {
    match what {
        What::Rows(keys) => keys.iter().map(Range::point).collect(),
        What::Range { asked, .. } => vec![asked.clone()],
    }
}
