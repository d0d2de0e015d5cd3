//! Rate limits by the generic cell rate algorithm: one timestamp a key, no background work.
//!
//! Each key has a *theoretical arrival time*: when its bucket would be empty again. An event is allowed
//! if that time is at most one burst ahead of now.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{HeaderName, HeaderValue, StatusCode};
use identity::clock::SharedClock;

use super::config::{CountBy, RateLimit};

/// Keys remembered by one limiter: 24 bytes each, so about 25 MiB at the very most.
const MAX_KEYS: usize = 1 << 20;
/// A slow clock may not hand out more than this of waiting: a `Retry-After` beyond it helps nobody.
const MAX_WAIT: Duration = Duration::from_secs(3600);
/// The slowest rate there is: one a day.
const MAX_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// A sweep looks at every key, so a flood of new ones may cause no more than one in this time.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// A rate: `burst` at once, then `per_second` steadily.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Steady rate, events a second.
    pub per_second: f64,
    /// Events that may come at once.
    pub burst: u32,
}

/// A limiter over one kind of key.
#[derive(Debug)]
pub struct Limiter {
    rate: Rate,
    interval: Duration,
    tolerance: Duration,
    clock: SharedClock,
    hasher: RandomState,
    arrivals: Mutex<Arrivals>,
    max_keys: usize,
}

#[derive(Debug, Default)]
struct Arrivals {
    by_key: HashMap<u64, Duration>,
    swept: Duration,
}

/// What a limiter says of one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Whether the event is within the limit.
    pub allowed: bool,
    /// Events still allowed at once.
    pub remaining: u32,
    /// Until one more event is allowed (refused ones) or the bucket is full again (allowed ones).
    pub reset: Duration,
}

impl Limiter {
    /// A limiter at `rate`. A rate of zero or less is read as one an hour: no limiter means "never".
    pub fn new(rate: Rate, clock: SharedClock) -> Self {
        Self::with_capacity(rate, clock, MAX_KEYS)
    }

    fn with_capacity(rate: Rate, clock: SharedClock, max_keys: usize) -> Self {
        let interval = if rate.per_second > 0.0 {
            Duration::try_from_secs_f64(1.0 / rate.per_second)
                .unwrap_or(MAX_INTERVAL)
                .clamp(Duration::from_nanos(1), MAX_INTERVAL)
        } else {
            MAX_WAIT
        };
        let tolerance = interval.saturating_mul(rate.burst.max(1));
        Self {
            rate,
            interval,
            tolerance,
            clock,
            hasher: RandomState::new(),
            arrivals: Mutex::default(),
            max_keys,
        }
    }

    /// Counts one event of `key`.
    pub fn take(&self, key: &(impl Hash + ?Sized)) -> Quota {
        let now = self.clock.now();
        // Keys are hashed under a secret of this process: nobody can aim for a neighbour's bucket.
        let hash = self.hasher.hash_one(key);
        let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = self.slot(&mut arrivals, hash, now);
        let arrival = arrivals.by_key.get(&slot).copied().unwrap_or(now).max(now);
        let after = arrival.saturating_add(self.interval);
        let latest = now.saturating_add(self.tolerance);
        if after > latest {
            return Quota { allowed: false, remaining: 0, reset: after.saturating_sub(latest).min(MAX_WAIT) };
        }
        arrivals.by_key.insert(slot, after);
        let room = latest.saturating_sub(after).as_nanos() / self.interval.as_nanos().max(1);
        Quota {
            allowed: true,
            remaining: u32::try_from(room).unwrap_or(u32::MAX),
            reset: after.saturating_sub(now),
        }
    }

    /// Where a key is counted. When memory is full of live keys, new ones share one bucket: a flood of
    /// made-up keys then limits itself, and costs no memory.
    fn slot(&self, arrivals: &mut Arrivals, hash: u64, now: Duration) -> u64 {
        const OVERFLOW: u64 = 0;
        if arrivals.by_key.len() < self.max_keys || arrivals.by_key.contains_key(&hash) {
            return hash;
        }
        if now >= arrivals.swept.saturating_add(SWEEP_INTERVAL) {
            arrivals.swept = now;
            arrivals.by_key.retain(|_, arrival| *arrival > now);
        }
        if arrivals.by_key.len() < self.max_keys { hash } else { OVERFLOW }
    }

    /// The configured rate.
    pub fn rate(&self) -> Rate {
        self.rate
    }
}

impl Rate {
    /// What the policy named `name` is and what is left of it (draft-ietf-httpapi-ratelimit-headers): the
    /// headers `RateLimit-Policy` and `RateLimit`. `name` is a plain word of ours.
    pub fn headers(self, name: &str, quota: Quota) -> [(HeaderName, HeaderValue); 2] {
        let window =
            (f64::from(self.burst) / self.per_second.max(MAX_INTERVAL.as_secs_f64().recip())).ceil().max(1.0);
        let reset = quota.reset.as_secs_f64().ceil();
        let policy = format!("\"{name}\";q={};w={window:.0}", self.burst);
        let left = format!("\"{name}\";r={};t={reset:.0}", quota.remaining);
        [("ratelimit-policy", policy), ("ratelimit", left)].map(|(header, value)| {
            let value = HeaderValue::try_from(value).unwrap_or(HeaderValue::from_static("\"\""));
            (HeaderName::from_static(header), value)
        })
    }
}

impl Quota {
    /// 429 (RFC 6585 §4).
    pub const STATUS: StatusCode = StatusCode::TOO_MANY_REQUESTS;

    /// `Retry-After` for a refused event: whole seconds, at least one (RFC 9110 §10.2.3).
    pub fn retry_after(self) -> (HeaderName, HeaderValue) {
        let seconds = self.reset.as_secs_f64().ceil().max(1.0);
        (RETRY_AFTER, HeaderValue::from(seconds as u64))
    }
}

/// The requests to one service, counted as its configuration says.
#[derive(Debug)]
pub struct LocalLimit {
    by: CountBy,
    limiter: Limiter,
}

impl LocalLimit {
    /// A limit by this configuration.
    pub fn new(config: &RateLimit, clock: SharedClock) -> Self {
        let per_second = f64::from(config.requests) / config.per.as_secs_f64();
        let burst = config.burst.unwrap_or(config.requests);
        Self { by: config.by, limiter: Limiter::new(Rate { per_second, burst }, clock) }
    }

    /// Counts one request. All of a route, a peer or a user share a count; requests without a user share
    /// one too.
    pub fn take(&self, route: &str, peer: &str, user: Option<&str>) -> Quota {
        match self.by {
            CountBy::Route => self.limiter.take(route),
            CountBy::Peer => self.limiter.take(peer),
            CountBy::User => self.limiter.take(&user),
        }
    }

    /// The headers that tell a caller how it stands; a refused one gets [`Quota::retry_after`] as well.
    pub fn headers(&self, quota: Quota) -> [(HeaderName, HeaderValue); 2] {
        let name = match self.by {
            CountBy::Route => "route",
            CountBy::Peer => "peer",
            CountBy::User => "user",
        };
        self.limiter.rate().headers(name, quota)
    }
}

/// The key of an address: an IPv6 customer has a whole /64 and would otherwise have 2^64 buckets.
pub fn address_key(address: IpAddr) -> [u8; 8] {
    let mut key = [0; 8];
    match address.to_canonical() {
        IpAddr::V4(v4) => key.iter_mut().zip(v4.octets()).for_each(|(to, from)| *to = from),
        IpAddr::V6(v6) => key.iter_mut().zip(v6.octets()).for_each(|(to, from)| *to = from),
    }
    key
}

#[cfg(test)]
mod tests {
    use identity::clock::ManualClock;

    use super::*;

    fn limiter(per_second: f64, burst: u32, max_keys: usize) -> (std::sync::Arc<ManualClock>, Limiter) {
        let clock = ManualClock::at(Duration::from_secs(1_000_000));
        let limiter = Limiter::with_capacity(Rate { per_second, burst }, clock.clone(), max_keys);
        (clock, limiter)
    }

    #[test]
    fn a_rate_of_a_few_a_day_is_one() {
        let clock = ManualClock::at(Duration::from_secs(1_000_000));
        let config =
            RateLimit { requests: 2, per: Duration::from_secs(24 * 3600), by: CountBy::Route, burst: None };
        let limit = LocalLimit::new(&config, clock.clone());
        let take = || limit.take("a", "", None);
        assert!(take().allowed && take().allowed && !take().allowed);
        clock.advance(Duration::from_secs(11 * 3600));
        let refused = take();
        assert!(!refused.allowed);
        assert_eq!(limit.headers(refused)[0].1, "\"route\";q=2;w=86400");
        clock.advance(Duration::from_secs(3600 + 1));
        assert!(take().allowed);
    }

    #[test]
    fn a_burst_passes_then_the_steady_rate_and_keys_do_not_share() {
        let (clock, limiter) = limiter(2.0, 3, 100);
        let remaining: Vec<_> = (0..3).map(|_| limiter.take("alice").remaining).collect();
        assert_eq!(remaining, [2, 1, 0]);
        let refused = limiter.take("alice");
        assert_eq!(refused, Quota { allowed: false, remaining: 0, reset: Duration::from_millis(500) });
        assert!(limiter.take("bob").allowed);
        clock.advance(Duration::from_millis(499));
        assert!(!limiter.take("alice").allowed);
        clock.advance(Duration::from_millis(1));
        assert!(limiter.take("alice").allowed);
        assert!(!limiter.take("alice").allowed);
        clock.advance(Duration::from_secs(60));
        assert_eq!((0..10).filter(|_| limiter.take("alice").allowed).count(), 3);
    }

    #[test]
    fn memory_is_bounded_and_a_flood_of_keys_limits_itself() {
        let (clock, limiter) = limiter(1.0, 1, 10);
        let allowed = (0..1000).filter(|n| limiter.take(n).allowed).count();
        assert_eq!(allowed, 11, "ten keys and one shared bucket");
        assert!(limiter.arrivals.lock().unwrap().by_key.len() <= 11);
        clock.advance(Duration::from_secs(2));
        assert!(limiter.take(&99_999).allowed, "room again once the old ones have run out");
    }

    #[test]
    fn a_rate_of_nothing_still_limits() {
        let (_clock, limiter) = limiter(0.0, 0, 10);
        assert!(limiter.take("a").allowed);
        assert!(!limiter.take("a").allowed);
    }

    #[test]
    fn a_service_s_requests_are_counted_as_configured_and_told() {
        let clock = ManualClock::at(Duration::from_secs(1_000_000));
        let limit = |by| {
            let config = RateLimit { requests: 60, per: Duration::from_secs(60), by, burst: Some(2) };
            LocalLimit::new(&config, clock.clone())
        };
        let refused = |limit: &LocalLimit, requests: [(&str, &str, Option<&str>); 4]| {
            requests.map(|(route, peer, user)| !limit.take(route, peer, user).allowed)
        };
        let same_route = [
            ("/a", "web", Some("alice")),
            ("/a", "jobs", None),
            ("/a", "web", Some("bob")),
            ("/b", "web", None),
        ];
        assert_eq!(refused(&limit(CountBy::Route), same_route), [false, false, true, false]);
        assert_eq!(refused(&limit(CountBy::Peer), same_route), [false, false, false, true]);
        assert_eq!(refused(&limit(CountBy::User), same_route), [false; 4]);
        let limit = limit(CountBy::User);
        let quotas: Vec<_> = (0..3).map(|_| limit.take("/a", "web", Some("alice"))).collect();
        let [policy, left] = limit.headers(quotas[0]);
        assert_eq!((policy.0.as_str(), policy.1.as_bytes()), ("ratelimit-policy", &b"\"user\";q=2;w=2"[..]));
        assert_eq!((left.0.as_str(), left.1.as_bytes()), ("ratelimit", &b"\"user\";r=1;t=1"[..]));
        assert_eq!(quotas[2].retry_after(), (RETRY_AFTER, HeaderValue::from_static("1")));
        assert_eq!(Quota::STATUS.as_u16(), 429);
    }

    #[test]
    fn an_ipv6_network_is_one_key() {
        let key = |text: &str| address_key(text.parse().unwrap());
        assert_eq!(key("2001:db8::1"), key("2001:db8::ffff:1"));
        assert_ne!(key("2001:db8::1"), key("2001:db8:0:1::1"));
        assert_eq!(key("::ffff:192.0.2.1"), key("192.0.2.1"));
    }
}
