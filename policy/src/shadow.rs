//! Now and then a decision is put to plain Cedar over more policies than those whose scope fits: what tests show of
//! generated policies, production shows of its own.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::forms::MAX_FORMS;

/// From one comparison to the next.
const INTERVAL_S: u64 = 1;
/// So many policies besides those whose scope fits, where there are more than are kept in Cedar's form: to read so many
/// again takes less than two milliseconds, a five-hundredth of one core.
const BESIDE: usize = 32;

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

/// When a service's next decision is to be compared, and with which policies.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    next_s: AtomicU64,
    /// How many have been taken.
    taken: AtomicUsize,
}

impl Shadow {
    /// The places of those that Cedar is to be asked about in any case, of this many: all, or the next of them, so that
    /// each has its turn.
    pub(crate) fn beside(&self, policies: usize) -> impl Iterator<Item = usize> {
        let number = if policies > MAX_FORMS { BESIDE } else { policies };
        let from = self.taken.fetch_add(number, Ordering::Relaxed);
        (0..number).map(move |at| from.wrapping_add(at) % policies)
    }

    /// Whether this decision is one. The first is, and the first after the clock was set back.
    pub(crate) fn is_due(&self, now: Duration) -> bool {
        let (now, next) = (now.as_secs(), self.next_s.load(Ordering::Relaxed));
        let then = now.saturating_add(INTERVAL_S);
        let waiting = now < next && next - now <= INTERVAL_S;
        !waiting && self.next_s.compare_exchange(next, then, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn comparisons_are_bounded_in_rate() {
        let shadow = Shadow::default();
        let due = (0..100_000u64).filter(|ms| shadow.is_due(Duration::from_millis(1_000_000 + ms)));
        assert_eq!(due.count(), 100);
    }

    #[test]
    fn every_policy_has_its_turn() {
        for policies in [1, 7, MAX_FORMS, MAX_FORMS + 1, 1000] {
            let shadow = Shadow::default();
            let turns = if policies > MAX_FORMS { policies.div_ceil(BESIDE) } else { 1 };
            let seen: BTreeSet<usize> = (0..turns).flat_map(|_| shadow.beside(policies)).collect();
            assert_eq!(seen, (0..policies).collect());
        }
    }
}
