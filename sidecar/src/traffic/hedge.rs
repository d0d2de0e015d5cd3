//! Hedging: a request slower than nearly all others gets a second copy; the first answer counts and the
//! other request is cancelled (Dean, Barroso: The Tail at Scale, 2013). Off unless configured.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::config::Hedge;

/// Answer times from 1 µs to 2^36 µs (19 hours), four classes an octave: a class is a fifth wide.
const OCTAVES: usize = 36;
const CLASSES: usize = OCTAVES * 4;
/// Fewer answers say little of the slowest twentieth: nothing is hedged before.
const MIN_ANSWERS: u32 = 100;
/// So many answers, then all counts are halved: the quantile follows the present.
const MAX_ANSWERS: u32 = 10_000;

/// When the second copy of a request goes out.
#[derive(Debug)]
pub struct Hedging {
    config: Hedge,
    counts: Box<[AtomicU32]>,
    total: AtomicU32,
}

impl Hedging {
    /// Hedging by these rules; it learns from the answers it is told of.
    pub fn new(config: Hedge) -> Self {
        Self { config, counts: (0..CLASSES).map(|_| AtomicU32::new(0)).collect(), total: AtomicU32::new(0) }
    }

    /// An answer's head came after so long, hedged or not.
    pub fn answered(&self, took: Duration) {
        if let Some(count) = self.counts.get(class(took)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        if self.total.fetch_add(1, Ordering::Relaxed) + 1 == MAX_ANSWERS {
            let mut total = 0;
            for count in &self.counts {
                let half = count.load(Ordering::Relaxed) / 2;
                count.store(half, Ordering::Relaxed);
                total += half;
            }
            self.total.store(total, Ordering::Relaxed);
        }
    }

    /// After what time a second copy goes out; `None` while too little is known.
    pub fn delay(&self) -> Option<Duration> {
        let total = self.total.load(Ordering::Relaxed);
        if total < MIN_ANSWERS {
            return None;
        }
        let below = (f64::from(total) * self.config.after.fraction()) as u32;
        let mut seen = 0;
        let reached = |count: &AtomicU32| {
            seen += count.load(Ordering::Relaxed);
            seen >= below
        };
        let class = self.counts.iter().position(reached).unwrap_or(CLASSES);
        Some(upper_bound(class).max(self.config.min))
    }
}

/// Two bits below the leading one: log2 in quarters.
fn class(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    let octave = micros.ilog2();
    let quarter = if octave >= 2 { (micros >> (octave - 2)) & 3 } else { (micros << (2 - octave)) & 3 };
    (octave as usize * 4 + quarter as usize).min(CLASSES - 1)
}

fn upper_bound(class: usize) -> Duration {
    let (octave, quarter) = (class / 4, class % 4 + 1);
    let base = 2f64.powi(i32::try_from(octave).unwrap_or(i32::MAX));
    Duration::from_nanos((base * (1.0 + quarter as f64 / 4.0) * 1000.0) as u64)
}

/// The first good answer of a request and, if `late` comes first, of its second copy; the other request is
/// dropped, which cancels it. If both fail the first one's error counts.
///
/// `second` makes the copy, or declines (the budget is spent, there is no other endpoint).
pub async fn first_of<T, E, S: Future<Output = Result<T, E>>>(
    first: impl Future<Output = Result<T, E>>,
    late: impl Future<Output = ()>,
    second: impl FnOnce() -> Option<S>,
) -> Result<T, E> {
    let mut first = pin!(first);
    tokio::select! {
        biased;
        answer = &mut first => return answer,
        () = late => {}
    }
    let Some(second) = second() else { return first.await };
    let mut second = pin!(second);
    tokio::select! {
        biased;
        answer = &mut first => match answer {
            Ok(answer) => Ok(answer),
            Err(error) => second.await.map_err(|_| error),
        },
        answer = &mut second => match answer {
            Ok(answer) => Ok(answer),
            Err(_) => first.await,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::traffic::config::Share;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn the_delay_is_the_share_of_what_was_seen_and_follows_it() {
        let hedging = Hedging::new(Hedge { after: Share::percent(95), min: ms(1) });
        for n in 0..99 {
            hedging.answered(ms(1 + n));
        }
        assert_eq!(hedging.delay(), None);
        hedging.answered(ms(100));
        let delay = hedging.delay().unwrap();
        assert!((ms(95)..=ms(95) * 5 / 4).contains(&delay), "{delay:?}");
        for _ in 0..50_000 {
            hedging.answered(ms(2));
        }
        assert!(hedging.delay().unwrap() <= ms(3));
        let patient = Hedging::new(Hedge { after: Share::percent(95), min: ms(500) });
        (0..200).for_each(|_| patient.answered(ms(1)));
        assert_eq!(patient.delay(), Some(ms(500)));
    }

    proptest! {
        #[test]
        fn a_class_is_a_fifth_wide(micros in 1u64..1 << 36) {
            let bound = upper_bound(class(Duration::from_micros(micros)));
            prop_assert!(bound.as_nanos() > u128::from(micros) * 999);
            prop_assert!(bound.as_nanos() <= u128::from(micros) * 1250 + 1000);
        }
    }

    type Answer = Result<&'static str, &'static str>;

    /// Says, when dropped, that it was.
    struct Dropped(Arc<AtomicU32>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn the_first_good_answer_counts_and_the_other_request_is_cancelled() {
        let none = || None::<std::future::Ready<Answer>>;
        assert_eq!(first_of(ready(Ok("first")), pending(), none).await as Answer, Ok("first"));
        let cancelled = Arc::new(AtomicU32::new(0));
        let slow = |guard: Dropped| async move {
            pending::<()>().await;
            drop(guard);
            Ok("slow")
        };
        let first = slow(Dropped(Arc::clone(&cancelled)));
        let answer: Answer = first_of(first, ready(()), || Some(ready(Ok("second")))).await;
        assert_eq!((answer, cancelled.load(Ordering::Relaxed)), (Ok("second"), 1));
    }

    #[tokio::test]
    async fn one_failure_is_not_the_end() {
        let yielding = |answer: Answer| async move {
            tokio::task::yield_now().await;
            answer
        };
        for (first, second, expected) in [
            (Err("first"), Ok("second"), Ok("second")),
            (Ok("first"), Err("second"), Ok("first")),
            (Err("first"), Err("second"), Err("first")),
        ] {
            assert_eq!(first_of(yielding(first), ready(()), || Some(ready(second))).await, expected);
        }
        let declined = first_of(yielding(Ok("first")), ready(()), || None::<std::future::Ready<Answer>>);
        assert_eq!(declined.await, Ok("first"));
    }
}
