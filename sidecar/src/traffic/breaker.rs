//! Circuit breaking by concurrency: what is under way to one service is bounded, and beyond the bound a
//! request is refused at once instead of queueing behind a service that does not keep up.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use http::StatusCode;
use thiserror::Error;

use super::config::Limits;

/// Counts what is under way to one service.
#[derive(Debug)]
pub struct Breaker {
    limits: Limits,
    requests: AtomicU32,
    pending: AtomicU32,
    connections: AtomicU32,
}

/// What a breaker counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// A request whose answer has not ended.
    Request,
    /// A request that waits for a connection.
    Pending,
    /// A connection.
    Connection,
}

/// The bound is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("too many {what} are under way: {limit}", what = match resource {
    Resource::Request => "requests",
    Resource::Pending => "requests waiting for a connection",
    Resource::Connection => "connections",
})]
pub struct Overload {
    /// Of what.
    pub resource: Resource,
    /// The bound.
    pub limit: u32,
}

impl Overload {
    /// 503 (RFC 9110 §15.6.4).
    pub const STATUS: StatusCode = StatusCode::SERVICE_UNAVAILABLE;

    /// The reason, as a label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self.resource {
            Resource::Request => "max_requests",
            Resource::Pending => "max_pending",
            Resource::Connection => "max_connections",
        }
    }
}

impl Breaker {
    /// A breaker with nothing under way.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            requests: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            connections: AtomicU32::new(0),
        })
    }

    /// Takes one, given back when the permit is dropped.
    pub fn take(self: &Arc<Self>, resource: Resource) -> Result<Permit, Overload> {
        let (count, limit) = self.of(resource);
        let step = |taken: u32| (taken < limit).then_some(taken + 1);
        match count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step) {
            Ok(_) => Ok(Permit { breaker: Arc::clone(self), resource }),
            Err(_) => Err(Overload { resource, limit }),
        }
    }

    /// How many are taken.
    pub fn taken(&self, resource: Resource) -> u32 {
        self.of(resource).0.load(Ordering::Relaxed)
    }

    /// How many may be.
    pub fn limit(&self, resource: Resource) -> u32 {
        self.of(resource).1
    }

    fn of(&self, resource: Resource) -> (&AtomicU32, u32) {
        match resource {
            Resource::Request => (&self.requests, self.limits.requests),
            Resource::Pending => (&self.pending, self.limits.pending),
            Resource::Connection => (&self.connections, self.limits.connections),
        }
    }
}

/// The right to one of what a [`Breaker`] counts, until dropped.
#[must_use = "dropped at once, it permits nothing"]
pub struct Permit {
    breaker: Arc<Breaker>,
    resource: Resource,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.breaker.of(self.resource).0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Permit").field(&self.resource).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [Resource; 3] = [Resource::Request, Resource::Pending, Resource::Connection];

    #[test]
    fn beyond_the_bound_there_is_a_named_refusal() {
        let breaker = Breaker::new(Limits { requests: 2, pending: 1, connections: 0 });
        let held: Vec<_> = (0..2).map(|_| breaker.take(Resource::Request).unwrap()).collect();
        let refused = breaker.take(Resource::Request).unwrap_err();
        assert_eq!(refused.to_string(), "too many requests are under way: 2");
        assert_eq!((refused.reason(), Overload::STATUS.as_u16()), ("max_requests", 503));
        assert!(breaker.take(Resource::Pending).is_ok());
        assert_eq!(breaker.take(Resource::Connection).unwrap_err().reason(), "max_connections");
        drop(held);
        assert!(breaker.take(Resource::Request).is_ok());
    }

    proptest! {
        /// Taken and given back in any order, by two threads: never over a bound, nothing left behind.
        #[test]
        fn it_never_leaks(
            limits in (0u32..5, 0u32..5, 0u32..5),
            steps in prop::collection::vec((0usize..3, prop::option::of(any::<prop::sample::Index>())), 0..200),
        ) {
            let limits = Limits { requests: limits.0, pending: limits.1, connections: limits.2 };
            let breaker = Breaker::new(limits);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        let mut held = Vec::new();
                        for (resource, given_back) in &steps {
                            match given_back {
                                Some(index) if !held.is_empty() => {
                                    let index = index.index(held.len());
                                    drop(held.swap_remove(index));
                                }
                                _ => held.extend(breaker.take(ALL[*resource]).ok()),
                            }
                            for resource in ALL {
                                assert!(breaker.taken(resource) <= breaker.of(resource).1);
                            }
                        }
                    });
                }
            });
            for resource in ALL {
                prop_assert_eq!(breaker.taken(resource), 0);
            }
        }
    }
}
