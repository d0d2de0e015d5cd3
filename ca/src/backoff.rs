//! Waits between attempts: doubling, bounded, spread by jitter so that many clients do not come at once.

use std::time::Duration;

use crate::random::{Random, up_to};

/// A growing wait.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts at `first`, never over `most`.
    pub(crate) fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, next: first }
    }

    /// The wait before the next attempt: the current step less up to half of it.
    pub(crate) fn wait(&mut self, random: &dyn Random) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.most);
        step.saturating_sub(up_to(random, step / 2))
    }

    /// Back to the first wait, after a success.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{SystemRandom, Zeros};

    #[test]
    fn waits_double_up_to_the_bound_and_start_again_after_success() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        let waits: Vec<_> = (0..4).map(|_| backoff.wait(&Zeros).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 5]);
        backoff.reset();
        assert_eq!(backoff.wait(&Zeros), Duration::from_secs(1));
    }

    #[test]
    fn jitter_takes_at_most_half_a_wait() {
        let random = SystemRandom::shared();
        for _ in 0..100 {
            let wait = Backoff::new(Duration::from_secs(2), Duration::from_secs(9)).wait(&*random);
            assert!(wait >= Duration::from_secs(1) && wait <= Duration::from_secs(2), "{wait:?}");
        }
    }
}
