//! Trace contexts of our own making.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::headers::TraceParent;

pub use identity::random::SharedRandom;

/// Randomness that is drawn at once: it is a system call, and 4 KiB cost hardly more than a span id.
const DRAWN_BYTES: usize = 4096;

/// Where new spans come from. Every byte of the system's randomness is used once.
pub struct Spans {
    random: SharedRandom,
    drawn: Mutex<Drawn>,
}

struct Drawn {
    bytes: Box<[u8; DRAWN_BYTES]>,
    left: usize,
}

impl Spans {
    /// Spans from this source; nothing is drawn before the first is asked for.
    pub fn new(random: SharedRandom) -> Self {
        Self { random, drawn: Mutex::new(Drawn { bytes: Box::new([0; DRAWN_BYTES]), left: 0 }) }
    }

    /// A new span: in the caller's trace if it has one, else in a trace of its own.
    pub fn child(&self, parent: Option<TraceParent>) -> TraceParent {
        let span_id = u64::from_be_bytes(self.draw()).max(1);
        match parent {
            Some(parent) => TraceParent { span_id, ..parent },
            None => TraceParent { trace_id: u128::from_be_bytes(self.draw()).max(1), span_id, flags: 1 },
        }
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
        for _ in 0..DRAWN_BYTES {
            let span = spans.child(None);
            assert!(seen.insert((span.trace_id, span.span_id)));
            let child = spans.child(Some(span));
            assert_eq!(child.trace_id, span.trace_id);
            assert_ne!(child.span_id, span.span_id);
        }
    }
}
