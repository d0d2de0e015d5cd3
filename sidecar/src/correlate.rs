//! Which transaction a call of the app belongs to.
//!
//! The app never holds a token. The inbound half remembers the verified chain of each request under the
//! request's trace id, for as long as the request lives; an app that copies `traceparent` from the
//! request it serves onto the calls it makes lets the outbound half find it again. Apps that trace
//! already do so.
//!
//! Trace ids come from the gateway, at random. Should two requests with different holders or users share
//! one all the same, a call must name the very span it answers; if it does not, it is refused: a
//! guess would let one user act as another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use identity::txn::Chain;
use smallvec::SmallVec;

use crate::headers::TraceParent;

/// The requests that the app is working on.
#[derive(Debug, Default)]
pub struct Correlator {
    live: Mutex<HashMap<u128, SmallVec<[Live; 1]>>>,
}

#[derive(Debug)]
struct Live {
    span_id: u64,
    /// `None`: a request without a user, which must not borrow one from its neighbour.
    chain: Option<Chain>,
}

/// What is known of the transaction that a call names.
#[derive(Debug)]
pub enum Found {
    /// Nothing: the app calls on its own account.
    Nobody,
    /// On behalf of this chain's user.
    Behalf(Chain),
    /// Several requests fit and they differ.
    Ambiguous,
}

/// Forgets the request when dropped.
#[derive(Debug)]
pub struct Remembered {
    correlator: Arc<Correlator>,
    trace: TraceParent,
}

impl Correlator {
    /// Remembers a request that is about to be handed to the app with `trace` as its trace context.
    pub fn remember(self: &Arc<Self>, trace: TraceParent, chain: Option<Chain>) -> Remembered {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.entry(trace.trace_id).or_default().push(Live { span_id: trace.span_id, chain });
        Remembered { correlator: Arc::clone(self), trace }
    }

    /// Finds on whose behalf a call with this trace context is made.
    pub fn find(&self, trace: Option<TraceParent>) -> Found {
        let Some(trace) = trace else { return Found::Nobody };
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(requests) = live.get(&trace.trace_id) else { return Found::Nobody };
        let exact = requests.iter().find(|request| request.span_id == trace.span_id);
        let chosen = match (exact, requests.as_slice()) {
            (Some(request), _) => request,
            (None, [first, rest @ ..]) if rest.iter().all(|other| same_holder(first, other)) => first,
            _ => return Found::Ambiguous,
        };
        match &chosen.chain {
            Some(chain) => Found::Behalf(chain.clone()),
            None => Found::Nobody,
        }
    }
}

/// Whether it makes no difference to a callee which of two requests a call belongs to.
fn same_holder(one: &Live, other: &Live) -> bool {
    match (&one.chain, &other.chain) {
        (None, None) => true,
        (Some(one), Some(other)) => one.user() == other.user() && one.hops() == other.hops(),
        _ => false,
    }
}

impl Drop for Remembered {
    fn drop(&mut self) {
        let mut live = self.correlator.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(requests) = live.get_mut(&self.trace.trace_id) {
            requests.retain(|request| request.span_id != self.trace.span_id);
            if requests.is_empty() {
                live.remove(&self.trace.trace_id);
            }
        }
    }
}
