//! Now and then a decision is put to plain Cedar over all policies as well: what tests show of generated
//! policies, production shows of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A comparison takes about a millisecond for a thousand policies: with one a second for each thousand (and at
/// most one a second) it takes a thousandth of one core, and one request in very many a few milliseconds.
const POLICIES_PER_SECOND: u64 = 1000;

static COMPARED: AtomicU64 = AtomicU64::new(0);
static MISMATCHED: AtomicU64 = AtomicU64::new(0);

/// How often this process compared the engine with Cedar since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShadowCounts {
    /// Comparisons: of permits now and then, of denials always (over the policies in question).
    pub compared: u64,
    /// Of these, how many differed. Each was denied and logged as an error; any is a defect of Palisade's.
    pub mismatched: u64,
}

/// For metrics.
pub fn shadow_counts() -> ShadowCounts {
    ShadowCounts {
        compared: COMPARED.load(Ordering::Relaxed),
        mismatched: MISMATCHED.load(Ordering::Relaxed),
    }
}

pub(crate) fn compared(agree: bool) {
    COMPARED.fetch_add(1, Ordering::Relaxed);
    if !agree {
        MISMATCHED.fetch_add(1, Ordering::Relaxed);
    }
}

/// When a policy's next decision is to be compared.
#[derive(Debug)]
pub(crate) struct Shadow {
    interval_s: u64,
    next_s: AtomicU64,
}

impl Shadow {
    pub(crate) fn new(policies: usize) -> Self {
        let policies = u64::try_from(policies).unwrap_or(u64::MAX);
        Self { interval_s: 1 + policies / POLICIES_PER_SECOND, next_s: AtomicU64::new(0) }
    }

    /// Whether this decision is one. The first is, and the first after the clock was set back.
    pub(crate) fn is_due(&self, now: Duration) -> bool {
        let (now, next) = (now.as_secs(), self.next_s.load(Ordering::Relaxed));
        let then = now.saturating_add(self.interval_s);
        let waiting = now < next && next - now <= self.interval_s;
        !waiting && self.next_s.compare_exchange(next, then, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparisons_are_bounded_in_rate() {
        let due = |policies: usize| {
            let shadow = Shadow::new(policies);
            (0..100_000u64).filter(|ms| shadow.is_due(Duration::from_millis(1_000_000 + ms))).count()
        };
        assert_eq!(due(10), 100);
        assert_eq!(due(10_000), 10);
    }
}
