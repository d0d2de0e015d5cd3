//! Trace contexts of our own making, and which of them are recorded.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use serde::{Serialize, Serializer};
use thiserror::Error;

use crate::headers::TraceParent;

pub use identity::random::SharedRandom;

/// Randomness that is drawn at once: it is a system call, and 4 KiB cost hardly more than a span id.
const DRAWN_BYTES: usize = 4096;
/// What of a trace id is random, whoever made it (W3C Trace Context Level 2 §3.2.2.5.2).
const RANDOM_BITS: u32 = 56;

/// Where new spans come from. Every byte of the system's randomness is used once.
pub struct Spans {
    random: SharedRandom,
    recorded: Share,
    drawn: Mutex<Drawn>,
}

struct Drawn {
    bytes: Box<[u8; DRAWN_BYTES]>,
    left: usize,
}

impl Spans {
    /// Spans from this source, of which traces that begin here are recorded for a `recorded` share; nothing is
    /// drawn before the first is asked for.
    pub fn new(random: SharedRandom, recorded: Share) -> Self {
        Self { random, recorded, drawn: Mutex::new(Drawn { bytes: Box::new([0; DRAWN_BYTES]), left: 0 }) }
    }

    /// A new span: in the caller's trace if it has one, which also says whether it is recorded, else in a trace of
    /// its own.
    pub fn child(&self, parent: Option<TraceParent>) -> TraceParent {
        let span_id = u64::from_be_bytes(self.draw()).max(1);
        if let Some(parent) = parent {
            return TraceParent { span_id, flags: parent.flags & TraceParent::KNOWN_FLAGS, ..parent };
        }
        let trace_id = u128::from_be_bytes(self.draw()).max(1);
        TraceParent { trace_id, span_id, flags: self.recorded.flags(trace_id) }
    }

    fn draw<const BYTES: usize>(&self) -> [u8; BYTES] {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        if drawn.left < BYTES {
            // Without randomness the ids are zero, which `correlate` treats like any other shared id: calls
            // become ambiguous and are refused. TLS would have stopped long before.
            if self.random.fill(&mut *drawn.bytes).is_err() {
                tracing::error!("no randomness");
                return [0; BYTES];
            }
            drawn.left = DRAWN_BYTES;
        }
        let end = drawn.left;
        drawn.left -= BYTES;
        let next = drawn.bytes.get_mut(end - BYTES..end).and_then(|next| next.try_into().ok());
        next.map_or([0; BYTES], |next: &mut [u8; BYTES]| std::mem::replace(next, [0; BYTES]))
    }
}

impl fmt::Debug for Spans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spans").field("recorded", &self.recorded).finish_non_exhaustive()
    }
}

/// Which share of new traces is recorded, from 0 to 1.
///
/// It is the trace id that decides, as OpenTelemetry's consistent sampling does: who records a tenth records a part
/// of what another records who records a half.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    share: f64,
    /// The least of [`RANDOM_BITS`] that is recorded.
    least: u64,
}

/// A number that is no share.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
#[error("{0} is not from 0 to 1")]
pub struct NoShare(pub f64);

impl Share {
    /// Every trace.
    pub const ALL: Self = Self { share: 1.0, least: 0 };

    /// `share` of all traces.
    ///
    /// # Errors
    /// It is not from 0 to 1.
    pub fn new(share: f64) -> Result<Self, NoShare> {
        if !(0.0..=1.0).contains(&share) {
            return Err(NoShare(share));
        }
        let all = (1_u64 << RANDOM_BITS) as f64;
        Ok(Self { share, least: ((1.0 - share) * all) as u64 })
    }

    /// The flags of a trace that begins with this id (W3C Trace Context §3.2.2.5).
    pub fn flags(&self, trace_id: u128) -> u8 {
        let random = trace_id & ((1 << RANDOM_BITS) - 1);
        if random >= u128::from(self.least) { TraceParent::SAMPLED } else { 0 }
    }
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.share)
    }
}

/// Where a request stands in its trace.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place {
    /// Whose request it is, as its `traceparent` says.
    pub parent: Option<TraceParent>,
    /// Our span, once there is one: what those behind us have as their parent.
    pub span: Option<TraceParent>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn spans_do_not_repeat_and_children_stay_in_their_trace() {
        let spans = Spans::new(identity::random::system(), Share::ALL);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..DRAWN_BYTES {
            let span = spans.child(None);
            assert!(span.is_sampled() && seen.insert((span.trace_id, span.span_id)));
            let child = spans.child(Some(span));
            assert_eq!(child.trace_id, span.trace_id);
            assert_ne!(child.span_id, span.span_id);
        }
    }

    #[test]
    fn whether_it_is_recorded_is_the_callers_to_say() {
        let parent = |flags| Some(TraceParent { trace_id: 1, span_id: 1, flags });
        let (none, all) = (Share::new(0.0).unwrap(), Share::ALL);
        let spans = |share| Spans::new(identity::random::system(), share);
        assert!(spans(none).child(parent(1)).is_sampled() && !spans(none).child(None).is_sampled());
        assert!(!spans(all).child(parent(0)).is_sampled() && spans(all).child(None).is_sampled());
    }

    #[test]
    fn about_the_share_that_was_asked_for_is_recorded() {
        let spans = Spans::new(identity::random::system(), Share::new(0.25).unwrap());
        let recorded = (0..10_000).filter(|_| spans.child(None).is_sampled()).count();
        // Twelve standard deviations.
        assert!((2000..3000).contains(&recorded), "{recorded}");
    }

    #[test]
    fn what_is_no_share_is_refused() {
        for wrong in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert!(Share::new(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Share::new(1.0), Ok(Share::ALL));
    }

    proptest! {
        #[test]
        fn who_records_less_records_a_part(less in 0.0..=1.0, more in 0.0..=1.0, trace_id: u128) {
            prop_assume!(less <= more);
            let (less, more) = (Share::new(less).unwrap(), Share::new(more).unwrap());
            prop_assert!(less.flags(trace_id) <= more.flags(trace_id));
        }
    }
}
