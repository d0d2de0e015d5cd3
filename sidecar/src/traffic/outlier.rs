//! Outlier ejection: an endpoint that keeps failing, or fails far more often than its siblings, is left
//! out for a while, then tried again with one request.
//!
//! Nothing runs in the background: the answers themselves move it on. Ejecting is bounded by a share of
//! all endpoints, so that a bad caller, or a bad network of our own, cannot take a whole service away.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;

use super::config::Eject;
use super::endpoint::{Endpoints, Member, Unavailable};

/// A rate of success of fewer requests says little …
const MIN_REQUESTS: u32 = 100;
/// … and so does a deviation among fewer endpoints. Envoy's figures.
const MIN_ENDPOINTS: usize = 5;
/// Siblings that never fail have no deviation at all: below this difference one is no outlier.
const MIN_DIFFERENCE: f64 = 0.05;
/// An ejection lasts at most so many times the first.
const MAX_TIMES: u32 = 10;

/// How a request to an endpoint went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It answered, and not with a failure of its own.
    Good,
    /// 5xx, by the application.
    Server,
    /// 502, 503 or 504: something on the way to the application, or its overload.
    Gateway,
    /// No answer: no connection, a broken one, or too late.
    Connect,
}

impl From<StatusCode> for Outcome {
    fn from(status: StatusCode) -> Self {
        match status.as_u16() {
            502..=504 => Self::Gateway,
            500..=599 => Self::Server,
            _ => Self::Good,
        }
    }
}

/// What was seen of one endpoint.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// Failures in a row, of each kind with the graver ones.
    connect: AtomicU32,
    gateway: AtomicU32,
    server: AtomicU32,
    /// Since the last comparison.
    good: AtomicU32,
    bad: AtomicU32,
    sentence: Mutex<Sentence>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Sentence {
    since: Duration,
    until: Duration,
    /// How often it was ejected, less the comparisons that it has passed since.
    times: u32,
}

impl Record {
    /// When the last ejection ends, or ended.
    pub(super) fn ejected_until(&self) -> Duration {
        self.sentence.lock().unwrap_or_else(PoisonError::into_inner).until
    }

    fn end_streaks(&self) {
        for streak in [&self.connect, &self.gateway, &self.server] {
            // A store makes the line this core's own; most answers find nothing to end.
            if streak.load(Ordering::Relaxed) != 0 {
                streak.store(0, Ordering::Relaxed);
            }
        }
    }
}

/// Ejects outliers among the endpoints of one service.
#[derive(Debug)]
pub struct Ejector {
    config: Eject,
    /// When [`Ejector::sweep`] has something to do, in milliseconds.
    due: AtomicU64,
    /// When rates of success were last compared. Held by whoever ejects or readmits.
    compared: Mutex<Duration>,
}

impl Ejector {
    /// Ejects by these rules.
    pub fn new(config: Eject) -> Self {
        Self { config, due: AtomicU64::new(0), compared: Mutex::default() }
    }

    /// Takes note of how a request went; this may eject its endpoint, or readmit others whose time is over.
    pub fn record<C>(
        &self,
        endpoints: &Endpoints<C>,
        member: &Arc<Member<C>>,
        outcome: Outcome,
        now: Duration,
    ) {
        let record = &member.record;
        if outcome == Outcome::Good {
            record.good.fetch_add(1, Ordering::Relaxed);
            record.end_streaks();
            if member.is_on_probation() {
                member.set_probation(false);
            }
        } else {
            record.bad.fetch_add(1, Ordering::Relaxed);
            if !member.is(Unavailable::Ejected)
                && (self.is_over_the_limit(record, outcome) || member.is_on_probation())
            {
                let _compared = self.compared.lock().unwrap_or_else(PoisonError::into_inner);
                self.eject(endpoints, member, "failures in a row", now);
            }
        }
        if self.is_due(now) {
            self.sweep(endpoints, now);
        }
    }

    /// Readmits those whose time is over and compares rates of success, as far as it is time for either.
    pub fn sweep<C>(&self, endpoints: &Endpoints<C>, now: Duration) {
        let mut compared = self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        let set = endpoints.now();
        for (_, member) in set.iter().filter(|(_, member)| member.is(Unavailable::Ejected)) {
            let sentence = *member.record.sentence.lock().unwrap_or_else(PoisonError::into_inner);
            // Before it began: the clock was set back.
            if now >= sentence.until || now < sentence.since {
                member.load.forget();
                member.record.end_streaks();
                member.set_probation(true);
                endpoints.set_unavailable(member, Unavailable::Ejected, false);
                tracing::info!(endpoint = %member.address, "an ejected endpoint is tried again");
            }
        }
        let next = compared.saturating_add(self.config.every);
        if now >= next || now < *compared {
            *compared = now;
            self.compare(endpoints, now);
        }
        drop(compared);
        self.schedule(endpoints, now);
    }

    fn is_over_the_limit(&self, record: &Record, outcome: Outcome) -> bool {
        let longer = |streak: &AtomicU32, limit: u32| {
            let length = streak.fetch_add(1, Ordering::Relaxed).saturating_add(1);
            // Each further multiple tries again, should the share have stood in the way; none is one of 0.
            length.is_multiple_of(limit)
        };
        let over_server = longer(&record.server, self.config.server);
        if outcome == Outcome::Server {
            record.gateway.store(0, Ordering::Relaxed);
            record.connect.store(0, Ordering::Relaxed);
            return over_server;
        }
        let over_gateway = longer(&record.gateway, self.config.gateway);
        if outcome == Outcome::Gateway {
            record.connect.store(0, Ordering::Relaxed);
            return over_server || over_gateway;
        }
        longer(&record.connect, self.config.connect) || over_server || over_gateway
    }

    /// Ejects one, if the share of those ejected allows. The caller holds the lock.
    fn eject<C>(&self, endpoints: &Endpoints<C>, member: &Arc<Member<C>>, reason: &str, now: Duration) {
        let (mut ejected, mut all) = (0, 0);
        for (_, other) in endpoints.now().iter() {
            all += 1;
            ejected += usize::from(other.is(Unavailable::Ejected));
        }
        if member.is(Unavailable::Ejected) || ejected >= self.config.max.of(all) {
            return;
        }
        let lasts = {
            let mut sentence = member.record.sentence.lock().unwrap_or_else(PoisonError::into_inner);
            let times = sentence.times.saturating_add(1).min(MAX_TIMES);
            let lasts = self.config.base.saturating_mul(times);
            *sentence = Sentence { since: now, until: now.saturating_add(lasts), times };
            lasts
        };
        member.set_probation(false);
        endpoints.set_unavailable(member, Unavailable::Ejected, true);
        self.schedule(endpoints, now);
        tracing::warn!(endpoint = %member.address, reason, ?lasts, "an endpoint is ejected");
    }

    /// Ejects those whose rate of success is far below the others', and forgets old ejections of the rest.
    fn compare<C>(&self, endpoints: &Endpoints<C>, now: Duration) {
        let set = endpoints.now();
        let mut rated = Vec::new();
        for (_, member) in set.iter() {
            let record = &member.record;
            let good = record.good.swap(0, Ordering::Relaxed);
            let all = good.saturating_add(record.bad.swap(0, Ordering::Relaxed));
            if member.is(Unavailable::Ejected) || member.is_on_probation() {
                continue;
            }
            let mut sentence = record.sentence.lock().unwrap_or_else(PoisonError::into_inner);
            sentence.times = sentence.times.saturating_sub(1);
            if all >= MIN_REQUESTS {
                rated.push((member, f64::from(good) / f64::from(all)));
            }
        }
        if rated.len() < MIN_ENDPOINTS || self.config.deviations <= 0.0 {
            return;
        }
        let count = rated.len() as f64;
        let mean = rated.iter().map(|(_, rate)| rate).sum::<f64>() / count;
        let variance = rated.iter().map(|(_, rate)| (rate - mean).powi(2)).sum::<f64>() / count;
        let distance = (variance.sqrt() * self.config.deviations).max(MIN_DIFFERENCE);
        for (member, rate) in rated {
            if mean - rate > distance {
                self.eject(endpoints, member, "a rate of success far below the others'", now);
            }
        }
    }

    fn schedule<C>(&self, endpoints: &Endpoints<C>, now: Duration) {
        let set = endpoints.now();
        let sentences = set
            .iter()
            .filter(|(_, member)| member.is(Unavailable::Ejected))
            .map(|(_, member)| member.record.sentence.lock().unwrap_or_else(PoisonError::into_inner).until);
        let next = sentences.fold(now.saturating_add(self.config.every), Duration::min);
        self.due.store(next.as_millis() as u64, Ordering::Relaxed);
    }

    /// It is never due later than one `every` from the last time: a clock further back was set back.
    fn is_due(&self, now: Duration) -> bool {
        let (due, now) = (self.due.load(Ordering::Relaxed), now.as_millis() as u64);
        now >= due || now < due.saturating_sub(self.config.every.as_millis() as u64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::traffic::balance::Balancer;
    use crate::traffic::config::{Balance, Share};
    use crate::traffic::endpoint::tests::{endpoints, members};
    use crate::traffic::random::Dice;

    const START: Duration = Duration::from_secs(1_700_000_000);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn ejected(endpoints: &Endpoints<()>) -> Vec<usize> {
        let all = members(endpoints);
        (0..all.len()).filter(|n| all[*n].is(Unavailable::Ejected)).collect()
    }

    #[test]
    fn failures_in_a_row_eject_and_one_good_answer_ends_the_row() {
        let (endpoints, ejector) = (endpoints(4), Ejector::new(Eject::default()));
        let all = members(&endpoints);
        let record = |n: usize, outcome| ejector.record(&endpoints, &all[n], outcome, START);
        for outcome in [Outcome::Gateway, Outcome::Connect] {
            for _ in 0..4 {
                record(0, outcome);
            }
            record(0, Outcome::Good);
        }
        assert_eq!(ejected(&endpoints), [0; 0]);
        for outcome in [Outcome::Gateway, Outcome::Connect, Outcome::Gateway, Outcome::Connect] {
            record(1, outcome);
        }
        assert_eq!(ejected(&endpoints), [0; 0]);
        record(1, Outcome::Connect);
        assert_eq!(ejected(&endpoints), [1], "failures of connections count as gateway failures too");
        for _ in 0..100 {
            record(2, Outcome::Server);
        }
        assert_eq!(ejected(&endpoints), [1], "errors of the application alone do not, unless configured");
    }

    #[test]
    fn an_ejection_ends_with_one_request_and_grows_with_each_time() {
        let (endpoints, ejector) =
            (endpoints(4), Ejector::new(Eject { deviations: 0.0, ..Eject::default() }));
        let all = members(&endpoints);
        let balancer = Balancer::new(Balance::P2cEwma, Dice::seeded(1));
        let mut now = START;
        for times in 1..=12u64 {
            let failures = if times == 1 { 5 } else { 1 };
            for _ in 0..failures {
                ejector.record(&endpoints, &all[0], Outcome::Connect, now);
            }
            assert_eq!(ejected(&endpoints), [0], "time {times}");
            let lasts = seconds(30 * times.min(10));
            ejector.record(&endpoints, &all[1], Outcome::Good, now + lasts - seconds(1));
            assert_eq!(ejected(&endpoints), [0], "time {times}");
            now += lasts;
            ejector.record(&endpoints, &all[1], Outcome::Good, now);
            assert_eq!(ejected(&endpoints), [0; 0], "time {times}");
        }
        let picks: Vec<_> =
            (0..100).map(|_| balancer.pick(&endpoints.now(), None, None, now).unwrap()).collect();
        let tried = picks.iter().filter(|picked| picked.address == all[0].address).count();
        assert_eq!(tried, 1, "one request finds out");
        drop(picks);
        ejector.record(&endpoints, &all[0], Outcome::Good, now);
        ejector.record(&endpoints, &all[0], Outcome::Connect, now);
        assert_eq!(ejected(&endpoints), [0; 0], "it is one of them again");
    }

    #[test]
    fn one_far_worse_than_its_siblings_goes() {
        let (endpoints, ejector) = (endpoints(10), Ejector::new(Eject::default()));
        let all = members(&endpoints);
        let interval = |bad: &dyn Fn(usize) -> u32, now| {
            for (n, member) in all.iter().enumerate() {
                for request in 0..200 {
                    let outcome = if request % 100 < bad(n) { Outcome::Server } else { Outcome::Good };
                    ejector.record(&endpoints, member, outcome, now);
                }
            }
        };
        ejector.record(&endpoints, &all[0], Outcome::Good, START);
        interval(&|n| if n == 3 { 4 } else { 0 }, START);
        ejector.sweep(&endpoints, START + seconds(10));
        assert_eq!(ejected(&endpoints), [0; 0], "4 % apart is no outlier, however even the others are");
        interval(&|n| if n == 3 { 30 } else { 1 }, START + seconds(11));
        ejector.sweep(&endpoints, START + seconds(20));
        assert_eq!(ejected(&endpoints), [3]);
        interval(&|_| 50, START + seconds(21));
        ejector.sweep(&endpoints, START + seconds(30));
        assert_eq!(ejected(&endpoints), [3], "all equally bad: nobody stands out");
    }

    #[test]
    fn a_clock_set_back_holds_nobody_for_ever() {
        let (endpoints, ejector) = (endpoints(4), Ejector::new(Eject::default()));
        let all = members(&endpoints);
        for _ in 0..5 {
            ejector.record(&endpoints, &all[0], Outcome::Connect, START);
        }
        assert_eq!(ejected(&endpoints), [0]);
        ejector.record(&endpoints, &all[1], Outcome::Good, START - seconds(86_400));
        assert_eq!(ejected(&endpoints), [0; 0]);
    }

    proptest! {
        /// Whatever happens, no more are ejected than the share allows, and with time all return.
        #[test]
        fn never_more_than_the_share(
            count in 1usize..30,
            percent in 0u32..=100,
            events in prop::collection::vec((any::<prop::sample::Index>(), 0u8..6, 0u64..8_000), 1..400),
        ) {
            let config = Eject { server: 3, max: Share::percent(percent), ..Eject::default() };
            let limit = config.max.of(count);
            let (endpoints, ejector) = (endpoints(count), Ejector::new(config));
            let all = members(&endpoints);
            let mut now = START;
            for (index, outcome, passed) in events {
                now += Duration::from_millis(passed);
                let outcome = match outcome {
                    0 => Outcome::Good,
                    1 | 2 => Outcome::Server,
                    3 | 4 => Outcome::Gateway,
                    _ => Outcome::Connect,
                };
                // Few endpoints get most of it, so that rows do form.
                ejector.record(&endpoints, &all[index.index(count) / 3], outcome, now);
                prop_assert!(ejected(&endpoints).len() <= limit);
            }
            ejector.sweep(&endpoints, now + seconds(301));
            prop_assert_eq!(ejected(&endpoints).len(), 0);
        }
    }
}
