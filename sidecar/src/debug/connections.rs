//! Which connections of peers are open.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use identity::{Peer, SpiffeId};
use serde_json::{Value, json};

use super::{listed, seconds};

/// What is open of one listener. As many as the listener takes connections.
#[derive(Debug, Default)]
pub struct Connections {
    open: Mutex<BTreeMap<u64, Arc<Open>>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Open {
    peer: SpiffeId,
    remote: SocketAddr,
    protocol: &'static str,
    since: Duration,
    requests: AtomicU64,
}

/// A connection's entry; struck off when dropped.
#[derive(Debug)]
pub(crate) struct Noted {
    connections: Arc<Connections>,
    number: u64,
    open: Arc<Open>,
}

impl Connections {
    /// Notes a connection that began at `since`.
    pub(crate) fn note(
        self: &Arc<Self>,
        peer: &Peer,
        remote: SocketAddr,
        protocol: &'static str,
        since: Duration,
    ) -> Noted {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let open =
            Arc::new(Open { peer: peer.id().clone(), remote, protocol, since, requests: AtomicU64::new(0) });
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::clone(&open));
        Noted { connections: Arc::clone(self), number, open }
    }

    /// What is open, oldest first.
    pub(super) fn show(&self, now: Duration) -> Value {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        listed(open.values().map(|open| {
            json!({
                "peer": open.peer,
                "remote": open.remote,
                "protocol": open.protocol,
                "age_seconds": seconds(now.saturating_sub(open.since)),
                "requests": open.requests.load(Ordering::Relaxed),
            })
        }))
    }
}

impl Noted {
    /// A request has come over it.
    pub(crate) fn count_request(&self) {
        self.open.requests.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        self.connections.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}
