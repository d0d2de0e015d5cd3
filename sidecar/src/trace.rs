//! Trace contexts of our own making.

use crate::headers::TraceParent;

pub use identity::random::SharedRandom;

/// A new span: in the caller's trace if it has one, else in a trace of its own.
pub fn child(parent: Option<TraceParent>, random: &SharedRandom) -> TraceParent {
    let mut bytes = [0; 24];
    // Without randomness the ids are zero, which `correlate` treats like any other shared id: calls
    // become ambiguous and are refused. TLS would have stopped long before.
    if random.fill(&mut bytes).is_err() {
        tracing::error!("no randomness");
    }
    let (trace, span) = bytes.split_at(16);
    let number = |bytes: &[u8]| bytes.iter().fold(0u128, |number, byte| (number << 8) | u128::from(*byte));
    let span_id = u64::try_from(number(span)).unwrap_or(1).max(1);
    match parent {
        Some(parent) => TraceParent { span_id, ..parent },
        None => TraceParent { trace_id: number(trace).max(1), span_id, flags: 1 },
    }
}
