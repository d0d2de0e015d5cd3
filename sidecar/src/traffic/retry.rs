//! Whether a request that failed is sent again, and when.
//!
//! Three rules keep a retry from making things worse: what may have arrived once is only repeated if its
//! method allows (RFC 9110 §9.2.2); after the first byte of an answer nothing is; and all retries together
//! are bounded by a budget (as in Finagle and linkerd), so that a service in trouble sees a fifth more
//! requests and not three times as many.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::Method;

use super::config::{Retries, RetryOn, Share};
use super::random::Dice;

/// A budget saved up in good times is worth at most this many seconds of [`Retries::min_per_second`] …
const MAX_SAVED_SECONDS: u64 = 10;
/// … but so many retries at least, lest a low minimum keep the share from counting.
const MIN_SAVED: u64 = 100;
/// Backoff stops doubling here; the configured maximum is reached long before.
const MAX_DOUBLINGS: u32 = 16;

/// Decides about the retries of one service.
#[derive(Debug)]
pub struct Retrier {
    config: Retries,
    budget: Budget,
}

impl Retrier {
    /// Decides by these rules.
    pub fn new(config: Retries) -> Self {
        let budget = Budget::new(config.budget, config.min_per_second);
        Self { config, budget }
    }

    /// The rules.
    pub fn config(&self) -> &Retries {
        &self.config
    }

    /// Begins a request, which pays into the budget.
    pub fn begin(&self, method: &Method, now: Duration) -> Tries {
        self.budget.deposit(now);
        Tries { repeatable: self.config.methods.contains(method), done: 0 }
    }

    /// Whether a body of so many bytes is worth keeping for another try.
    pub fn keeps(&self, body_bytes: u64) -> bool {
        self.config.max > 0 && body_bytes <= u64::from(self.config.max_body)
    }

    /// Whether a second copy of a slow request may go out now; it is paid for like a retry.
    pub fn may_hedge(&self, tries: &Tries, now: Duration) -> bool {
        tries.is_repeatable() && self.budget.withdraw(now)
    }
}

/// The tries of one request.
#[derive(Debug, Clone, Copy)]
pub struct Tries {
    repeatable: bool,
    done: u32,
}

impl Tries {
    /// Whether to try again after such a failure, and after what wait.
    ///
    /// `whole` says that the request can still be sent as it was: nothing of its body is gone, or all of
    /// it is kept. `left` is what remains of the request's time. Never to be asked once a byte of an
    /// answer was passed on.
    pub fn again(
        &mut self,
        retrier: &Retrier,
        after: RetryOn,
        whole: bool,
        left: Option<Duration>,
        dice: &Dice,
        now: Duration,
    ) -> Option<Duration> {
        let Retrier { config, budget } = retrier;
        let did_nothing = matches!(after, RetryOn::Connect | RetryOn::Refused);
        let allowed =
            whole && self.done < config.max && config.on.contains(&after) && (did_nothing || self.repeatable);
        if !allowed {
            return None;
        }
        let wait = backoff(config, self.done, dice);
        // The budget comes last: what is not tried again for another reason costs nothing.
        if left.is_some_and(|left| wait >= left) || !budget.withdraw(now) {
            return None;
        }
        self.done += 1;
        Some(wait)
    }

    /// Whether the request may arrive twice.
    pub fn is_repeatable(&self) -> bool {
        self.repeatable
    }

    /// How many retries there were.
    pub fn done(&self) -> u32 {
        self.done
    }
}

/// Exponential with full jitter (Brooker, AWS Architecture Blog 2015): callers that failed together do not
/// come back together.
fn backoff(config: &Retries, done: u32, dice: &Dice) -> Duration {
    let longest = config.backoff.saturating_mul(1 << done.min(MAX_DOUBLINGS)).min(config.backoff_max);
    longest.mul_f64(dice.unit())
}

/// A token bucket: each request pays in a share of a retry, each second the minimum.
#[derive(Debug)]
struct Budget {
    /// Thousandths of a retry in the upper half; when they were counted in the lower, in wall-clock
    /// milliseconds modulo 2^32.
    state: AtomicU64,
    per_request: u64,
    per_second: u64,
    max: u64,
}

const RETRY: u64 = 1000;

impl Budget {
    fn new(share: Share, min_per_second: u32) -> Self {
        let per_second = u64::from(min_per_second) * RETRY;
        let max = (per_second * MAX_SAVED_SECONDS).max(MIN_SAVED * RETRY);
        let per_request = u64::from(share.millionths()) * RETRY / 1_000_000;
        Self { state: AtomicU64::new(0), per_request, per_second, max }
    }

    fn deposit(&self, now: Duration) {
        let _always = self.change(now, |saved| Some((saved + self.per_request).min(self.max)));
    }

    fn withdraw(&self, now: Duration) -> bool {
        self.change(now, |saved| saved.checked_sub(RETRY))
    }

    fn change(&self, now: Duration, step: impl Fn(u64) -> Option<u64>) -> bool {
        let now = now.as_millis() as u32;
        let change = |state: u64| {
            // A fresh budget has a second's minimum: the first request may meet a dead endpoint.
            let (saved, at) = if state == 0 { (self.per_second, now) } else { (state >> 32, state as u32) };
            // A clock set back counts as no time passed.
            let passed = i32::try_from(now.wrapping_sub(at)).unwrap_or(0);
            let grown = u64::try_from(passed).unwrap_or(0).saturating_mul(self.per_second) / 1000;
            let saved = step(saved.saturating_add(grown).min(self.max))?;
            // Growth of less than a thousandth is not lost: its time is left to count again.
            let at = if grown == 0 && passed > 0 { at } else { now };
            Some(saved << 32 | u64::from(at))
        };
        self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use http::StatusCode;
    use proptest::prelude::*;

    use super::*;

    const START: Duration = Duration::from_secs(1_700_000_000);

    fn on(reasons: &[RetryOn]) -> Retries {
        Retries { on: reasons.iter().copied().collect::<BTreeSet<_>>(), ..Retries::default() }
    }

    fn all() -> Retries {
        let status = RetryOn::Status(StatusCode::SERVICE_UNAVAILABLE);
        on(&[RetryOn::Connect, RetryOn::Refused, RetryOn::Broken, RetryOn::Timeout, status])
    }

    /// Whether a request with this method, failing so, would get a second try from a full budget.
    fn tried(config: Retries, method: Method, after: RetryOn, whole: bool) -> bool {
        let retrier = Retrier::new(Retries { budget: Share::whole(), ..config });
        let mut tries = retrier.begin(&method, START);
        tries.again(&retrier, after, whole, None, &Dice::seeded(1), START).is_some()
    }

    #[test]
    fn by_default_only_what_did_nothing_is_repeated() {
        let status = RetryOn::Status(StatusCode::SERVICE_UNAVAILABLE);
        for (after, expected) in [
            (RetryOn::Connect, true),
            (RetryOn::Refused, true),
            (RetryOn::Broken, false),
            (RetryOn::Timeout, false),
            (status, false),
        ] {
            assert_eq!(tried(Retries::default(), Method::GET, after, true), expected, "{after:?}");
        }
    }

    #[test]
    fn what_may_have_arrived_is_repeated_for_idempotent_methods_alone() {
        let status = RetryOn::Status(StatusCode::SERVICE_UNAVAILABLE);
        for after in [RetryOn::Broken, RetryOn::Timeout, status] {
            assert!(tried(all(), Method::PUT, after, true));
            assert!(!tried(all(), Method::POST, after, true));
            assert!(!tried(all(), Method::PATCH, after, true));
            assert!(tried(Retries { methods: vec![Method::POST], ..all() }, Method::POST, after, true));
        }
        assert!(tried(all(), Method::POST, RetryOn::Connect, true), "it never left");
        let other = RetryOn::Status(StatusCode::BAD_GATEWAY);
        assert!(!tried(all(), Method::GET, other, true), "a status that is not named");
    }

    #[test]
    fn a_body_that_is_gone_is_not_made_up() {
        assert!(!tried(all(), Method::GET, RetryOn::Connect, false));
        let retrier = Retrier::new(Retries { max_body: 10, ..all() });
        assert!(retrier.keeps(10) && !retrier.keeps(11));
        assert!(!Retrier::new(Retries { max: 0, ..all() }).keeps(0));
    }

    #[test]
    fn tries_are_counted_and_end_before_the_deadline() {
        let retrier = Retrier::new(Retries { budget: Share::whole(), min_per_second: 1000, ..all() });
        let dice = Dice::seeded(7);
        let mut tries = retrier.begin(&Method::GET, START);
        let now = START + Duration::from_secs(1);
        let mut again = |left| tries.again(&retrier, RetryOn::Connect, true, left, &dice, now);
        assert_eq!(again(Some(Duration::ZERO)), None, "no time left");
        assert!(again(None).is_some() && again(None).is_some());
        assert_eq!(again(None), None, "two retries and no more");
        assert_eq!(tries.done(), 2);
    }

    #[test]
    fn waits_double_up_to_the_longest_and_are_spread_over_all_of_it() {
        let (config, dice) = (Retries::default(), Dice::seeded(2));
        for (done, longest) in [(0, 25), (1, 50), (3, 200), (6, 1000), (40, 1000)] {
            let waits: Vec<_> = (0..1000).map(|_| backoff(&config, done, &dice).as_millis()).collect();
            assert!(waits.iter().all(|wait| *wait < longest), "{done}");
            assert!(waits.iter().any(|wait| *wait >= longest * 9 / 10));
            assert!(waits.iter().any(|wait| *wait <= longest / 10));
        }
    }

    #[test]
    fn in_a_total_outage_a_fifth_more_and_the_minimum() {
        const SECONDS: u64 = 60;
        for per_second in [0u64, 1, 20, 1000] {
            let retrier = Retrier::new(Retries { max: 10, ..all() });
            let dice = Dice::seeded(per_second);
            let (mut requests, mut attempts) = (0u64, 0u64);
            for millisecond in 0..SECONDS * 1000 {
                let now = START + Duration::from_millis(millisecond);
                if per_second == 0 || millisecond % (1000 / per_second) != 0 {
                    continue;
                }
                requests += 1;
                attempts += 1;
                let mut tries = retrier.begin(&Method::GET, now);
                while tries.again(&retrier, RetryOn::Connect, true, None, &dice, now).is_some() {
                    attempts += 1;
                }
            }
            let (max, retries) = (requests * 12 / 10 + 10 * (SECONDS + 1), attempts - requests);
            assert!(attempts <= max, "{attempts} attempts for {requests} requests: over {max}");
            let wanted = (requests * 10).min(requests / 5 + 9 * SECONDS);
            assert!(
                retries >= wanted,
                "{retries} retries for {requests} requests: the budget is there to be used"
            );
        }
    }

    proptest! {
        #[test]
        fn the_budget_is_never_overdrawn(
            events in prop::collection::vec((any::<bool>(), -2_000i64..10_000), 1..500),
            percent in 0u32..=100, per_second in 0u32..50,
        ) {
            let budget = Budget::new(Share::percent(percent), per_second);
            let (mut now, mut latest, mut passed) = (START, START, Duration::ZERO);
            let (mut requests, mut retries) = (0u64, 0u64);
            for (request, step) in events {
                let before = now;
                now = if step < 0 { now - Duration::from_millis(step.unsigned_abs()) } else { now + Duration::from_millis(step as u64) };
                passed += now.saturating_sub(before);
                latest = latest.max(now);
                if request {
                    budget.deposit(now);
                    requests += 1;
                } else if budget.withdraw(now) {
                    retries += 1;
                }
                let minimum = passed.as_secs_f64() + 1.0;
                let allowed = requests as f64 * f64::from(percent) / 100.0 + minimum * f64::from(per_second);
                prop_assert!(retries as f64 <= allowed + 1e-6, "{retries} > {allowed}");
            }
        }
    }
}
