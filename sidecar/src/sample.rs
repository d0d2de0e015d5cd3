//! Which of the permitted requests are recorded: a few a second, so that replaying recorded decisions
//! against a new policy has something to say, at a cost that does not grow with traffic.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Permits recorded a second and sidecar. Denials are always recorded.
const PERMITS_PER_SECOND: u64 = 5;

/// Lets a few through each second.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// The second in the upper bits, how many were taken in it in the lower [`COUNT_BITS`].
    state: AtomicU64,
}

const COUNT_BITS: u32 = 8;

impl Sampler {
    /// Whether this one is recorded.
    pub(crate) fn take(&self, now: Duration) -> bool {
        let second = now.as_secs() << COUNT_BITS;
        let step = |state: u64| {
            let in_this_second = state & !0xff == second;
            let taken = if in_this_second { state & 0xff } else { 0 };
            (taken < PERMITS_PER_SECOND).then_some(second | (taken + 1))
        };
        self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_each_second_and_no_more() {
        let sampler = Sampler::default();
        for second in [100, 101, 500] {
            let taken = (0..1000).filter(|_| sampler.take(Duration::from_secs(second))).count();
            assert_eq!(taken as u64, PERMITS_PER_SECOND);
        }
    }
}
