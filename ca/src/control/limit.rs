//! A token bucket a caller: one agent that goes wild costs the others nothing.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Mutex;
use std::time::Duration;

/// Callers remembered. Above, those whose bucket is full again are forgotten first; they lose nothing.
const MAX_CALLERS: usize = 65_536;

/// Buckets by caller.
#[derive(Debug)]
pub(crate) struct Limiter<K> {
    burst: f64,
    per_second: f64,
    buckets: Mutex<HashMap<K, Bucket>>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    at: Duration,
}

impl<K: Hash + Eq> Limiter<K> {
    /// `burst` at once, `per_second` in the long run.
    pub(crate) fn new(burst: u32, per_second: u32) -> Self {
        Self { burst: f64::from(burst), per_second: f64::from(per_second), buckets: Mutex::default() }
    }

    /// Takes `amount` from the caller's bucket, if it holds as much at `now`.
    pub(crate) fn take(&self, caller: K, amount: u32, now: Duration) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let refill = |bucket: &Bucket| {
            let passed = now.saturating_sub(bucket.at).as_secs_f64();
            (bucket.left + passed * self.per_second).min(self.burst)
        };
        if buckets.len() >= MAX_CALLERS && !buckets.contains_key(&caller) {
            buckets.retain(|_, bucket| refill(bucket) < self.burst);
            if buckets.len() >= MAX_CALLERS {
                return false;
            }
        }
        let bucket = buckets.entry(caller).or_insert(Bucket { left: self.burst, at: now });
        bucket.left = refill(bucket);
        // A clock set back must not freeze the bucket until it has caught up.
        bucket.at = now;
        let amount = f64::from(amount);
        if bucket.left < amount {
            return false;
        }
        bucket.left -= amount;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_20_one_caller_runs_dry_alone_and_recovers() {
        let limiter = Limiter::new(10, 2);
        let at = Duration::from_secs;
        assert!(limiter.take("a", 10, at(100)));
        assert!(!limiter.take("a", 1, at(100)));
        assert!(limiter.take("b", 1, at(100)));
        assert!(limiter.take("a", 2, at(101)));
        assert!(!limiter.take("a", 1, at(101)));
        assert!(!limiter.take("a", 11, at(1000)), "never more than the burst");
        assert!(limiter.take("a", 10, at(1000)));
        assert!(!limiter.take("a", 1, at(50)), "a clock set back gives nothing");
        assert!(limiter.take("a", 2, at(51)), "and does not freeze the bucket");
    }
}
