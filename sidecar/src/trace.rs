//! Trace contexts of our own making.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::headers::TraceParent;

pub use identity::random::SharedRandom;

/// Ids that one reading of the random source is good for: it is a system call, and 4 KiB cost hardly more than 24
/// bytes.
const DRAWN_AT_ONCE: usize = 170;
const ID_BYTES: usize = 24;

/// Where new spans come from. Every byte of the system's randomness is used once.
pub struct Spans {
    random: SharedRandom,
    drawn: Mutex<Drawn>,
}

struct Drawn {
    bytes: [[u8; ID_BYTES]; DRAWN_AT_ONCE],
    left: usize,
}

impl Spans {
    /// Spans from this source; nothing is drawn before the first is asked for.
    pub fn new(random: SharedRandom) -> Self {
        Self { random, drawn: Mutex::new(Drawn { bytes: [[0; ID_BYTES]; DRAWN_AT_ONCE], left: 0 }) }
    }

    /// A new span: in the caller's trace if it has one, else in a trace of its own.
    pub fn child(&self, parent: Option<TraceParent>) -> TraceParent {
        let [trace @ .., b0, b1, b2, b3, b4, b5, b6, b7] = self.draw();
        let span_id = u64::from_be_bytes([b0, b1, b2, b3, b4, b5, b6, b7]).max(1);
        match parent {
            Some(parent) => TraceParent { span_id, ..parent },
            None => TraceParent { trace_id: u128::from_be_bytes(trace).max(1), span_id, flags: 1 },
        }
    }

    fn draw(&self) -> [u8; ID_BYTES] {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        if drawn.left == 0 {
            // Without randomness the ids are zero, which `correlate` treats like any other shared id: calls
            // become ambiguous and are refused. TLS would have stopped long before.
            if self.random.fill(drawn.bytes.as_flattened_mut()).is_err() {
                tracing::error!("no randomness");
                return [0; ID_BYTES];
            }
            drawn.left = DRAWN_AT_ONCE;
        }
        drawn.left -= 1;
        let next = drawn.left;
        drawn.bytes.get_mut(next).map(std::mem::take).unwrap_or_default()
    }
}

impl fmt::Debug for Spans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spans").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_do_not_repeat_and_children_stay_in_their_trace() {
        let spans = Spans::new(identity::random::system());
        let mut seen = std::collections::HashSet::new();
        for _ in 0..3 * DRAWN_AT_ONCE {
            let span = spans.child(None);
            assert!(seen.insert((span.trace_id, span.span_id)));
            let child = spans.child(Some(span));
            assert_eq!(child.trace_id, span.trace_id);
            assert_ne!(child.span_id, span.span_id);
        }
    }
}
