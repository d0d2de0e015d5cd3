//! What is open: connections and long streams, kept so that a decision that let one in can be taken again.
//!
//! A connection is registered *before* its policy is asked. Whoever puts another policy in force stores it first
//! and calls [`Registry::reevaluate_all`] then, so each connection is either judged by the new policy at its
//! start or found here: none slips between. The holder of a [`Live`] ends the connection when
//! [`Live::closed`] completes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use identity::Peer;
use identity::clock::SharedClock;
use policy::{Denial, ServicePolicy};
use tokio::sync::SetOnce;

/// Connections judged before others may run: a decision takes some ten microseconds, so the pause that a new
/// policy makes for established traffic stays below a millisecond.
const JUDGED_AT_ONCE: usize = 32;

/// Peers verified before others may run: two or three signatures each, some hundred microseconds.
const VERIFIED_AT_ONCE: usize = 4;

/// What kind of thing is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A plain connection between sidecars.
    Tcp,
    /// A tunnel of another mesh's proxy.
    Hbone,
    /// A connection that carries requests.
    Http,
    /// The answer to one of them, which streams, or what it was upgraded to.
    Stream,
}

impl Kind {
    /// Its name in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Hbone => "hbone",
            Self::Http => "http",
            Self::Stream => "stream",
        }
    }
}

/// What is known of a connection when it begins.
#[derive(Debug, Clone)]
pub struct Facts {
    /// What it is.
    pub kind: Kind,
    /// Who is at the other end.
    pub peer: Peer,
    /// From where.
    pub remote: SocketAddr,
    /// Since when, in time since the Unix epoch.
    pub since: Duration,
}

/// Takes the decision about an open connection again.
pub trait Judge: Send + Sync {
    /// Whether it may go on. Does no I/O.
    fn judge(&self, policy: &ServicePolicy) -> Result<(), Closed>;

    /// What the connection is for, in a few words; shown to the operator.
    fn about(&self) -> String;

    /// Whether what it is decided by is among the relations that are written by API.
    fn asks_relations(&self) -> bool {
        false
    }
}

/// Why a connection must end.
#[derive(Debug)]
pub enum Closed {
    /// The policy in force now denies it.
    Denied(Box<Denial>),
    /// The peer's certificate has ended.
    Expired,
    /// The peer's identity was taken away before its end.
    Revoked,
    /// It could not be judged.
    Unjudged,
}

impl Closed {
    /// The rule that ended it.
    pub fn rule(&self) -> &str {
        match self {
            Self::Denied(denial) => denial.rule().name(),
            Self::Expired => "tls.expired_svid",
            Self::Revoked => "tls.revoked_svid",
            Self::Unjudged => "policy.unavailable",
        }
    }
}

/// Bytes that a connection has carried.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Towards the app, or from it to the mesh: the way the connection was opened.
    pub forward_bytes: AtomicU64,
    /// Back.
    pub back_bytes: AtomicU64,
}

impl Traffic {
    /// Both ways, as they are now: forward and back.
    pub fn bytes(&self) -> (u64, u64) {
        (self.forward_bytes.load(Ordering::Relaxed), self.back_bytes.load(Ordering::Relaxed))
    }
}

/// Everything that is open in this process.
pub struct Registry {
    open: Mutex<HashMap<u64, Arc<Entry>>>,
    next: AtomicU64,
    clock: SharedClock,
}

struct Entry {
    facts: Facts,
    judge: Arc<dyn Judge>,
    traffic: Traffic,
    closed: SetOnce<Closed>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("open", &self.len()).finish_non_exhaustive()
    }
}

/// One open connection; forgotten when dropped.
pub struct Live {
    registry: Arc<Registry>,
    id: u64,
    entry: Arc<Entry>,
}

/// One open connection, for the operator.
#[derive(Debug, Clone)]
pub struct Open {
    /// Counts up from 1; never used twice.
    pub id: u64,
    /// What it is, who has it and since when.
    pub facts: Facts,
    /// What it is for.
    pub about: String,
    /// Carried forward and back so far.
    pub bytes: (u64, u64),
}

impl Registry {
    /// An empty one.
    pub fn new(clock: SharedClock) -> Arc<Self> {
        Arc::new(Self { open: Mutex::default(), next: AtomicU64::new(1), clock })
    }

    /// Notes a connection. Call this before its policy is asked.
    pub fn register(self: &Arc<Self>, facts: Facts, judge: Arc<dyn Judge>) -> Live {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Entry { facts, judge, traffic: Traffic::default(), closed: SetOnce::new() });
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::clone(&entry));
        Live { registry: Arc::clone(self), id, entry }
    }

    /// Judges all that is open by `policy`, which must be the one in force already, and closes what it denies.
    /// Lets other tasks run in between.
    pub async fn reevaluate_all(&self, policy: &ServicePolicy) {
        Self::reevaluate(&self.entries(), policy).await;
    }

    /// The same of what asks the relations, which must have changed already.
    pub async fn reevaluate_related(&self, policy: &ServicePolicy) {
        let mut related = self.entries();
        related.retain(|(_, entry)| entry.judge.asks_relations());
        Self::reevaluate(&related, policy).await;
    }

    async fn reevaluate(entries: &[(u64, Arc<Entry>)], policy: &ServicePolicy) {
        for some in entries.chunks(JUDGED_AT_ONCE) {
            for (_, entry) in some {
                if let Err(closed) = entry.judge.judge(policy) {
                    entry.close(closed);
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Closes the connections of peers that are not trusted any more. Lets other tasks run in between.
    pub async fn revoke(&self, revoked: impl Fn(&Peer) -> bool) {
        for some in self.entries().chunks(VERIFIED_AT_ONCE) {
            for (_, entry) in some {
                if revoked(&entry.facts.peer) {
                    entry.close(Closed::Revoked);
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// All that is open, oldest first.
    pub fn list(&self) -> Vec<Open> {
        let mut open: Vec<Open> = self
            .entries()
            .into_iter()
            .map(|(id, entry)| Open {
                id,
                facts: entry.facts.clone(),
                about: entry.judge.about(),
                bytes: entry.traffic.bytes(),
            })
            .collect();
        open.sort_unstable_by_key(|open| open.id);
        open
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn entries(&self) -> Vec<(u64, Arc<Entry>)> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter().map(|(id, entry)| (*id, Arc::clone(entry))).collect()
    }
}

impl Entry {
    fn close(&self, why: Closed) {
        // The first reason stands; a second one closes nothing more.
        let _closed_already = self.closed.set(why).is_err();
    }
}

impl Live {
    /// Completes when the connection must end: denied by a new policy, revoked, or past its peer's
    /// certificate.
    pub async fn closed(&self) -> &Closed {
        let clock = &self.registry.clock;
        loop {
            let left = self.entry.facts.peer.not_after().saturating_sub(clock.now());
            tokio::select! {
                closed = self.entry.closed.wait() => return closed,
                // Asked again: the clock may have been set back meanwhile.
                () = clock.sleep(left) => if clock.now() >= self.entry.facts.peer.not_after() {
                    self.entry.close(Closed::Expired);
                },
            }
        }
    }

    /// What the connection carries is counted here.
    pub fn traffic(&self) -> &Traffic {
        &self.entry.traffic
    }

    /// What was known at its start.
    pub fn facts(&self) -> &Facts {
        &self.entry.facts
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.registry.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}
