//! Serving what the kernel brings: to whom each connection goes is decided when it arrives.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use super::outside::{NotCarried, Outside};
use super::{
    AcceptError, Captured, Destinations, InboundListener, OutboundListener, OutsideNames, Refused, Route,
};
use crate::accept::{Accept, Accepting, Slot, keep_alive};
use crate::metrics::Metrics;
use crate::server::{Door, Handler};
use crate::tcp::{Side as _, Stream, TcpOutbound};

/// Serves what the app dials: its calls by `destinations`, everything else by the egress rules there and by
/// `names`. Runs as a critical task of the scope, until that drains.
pub(crate) fn serve_outbound<H: Handler>(
    listener: OutboundListener,
    destinations: Destinations<Way<H>>,
    names: OutsideNames,
    metrics: Arc<Metrics>,
    accepting: Accepting,
) {
    let scope = accepting.scope.clone();
    let outside = Outside::new(names, accepting.clock.clone(), scope.clone());
    let outbound = Arc::new(Dialled { destinations, outside, metrics });
    scope.spawn_critical("captured outbound", async move {
        let serve = |taken: Taken, slot| {
            let outbound = Arc::clone(&outbound);
            async move {
                let _slot: Slot = slot;
                match taken {
                    Ok(captured) => outbound.serve(captured).await,
                    Err((source, refused)) => refuse(&outbound.metrics, source, &refused),
                }
            }
        };
        accepting.serve_each("captured connection", &listener, serve).await;
    });
}

/// Serves what strangers dial: as a connection to the mTLS listener, if it is meant for the app's `port`. Runs as
/// a critical task of the scope, until that drains.
pub(crate) fn serve_inbound<H: Handler>(
    listener: InboundListener,
    port: u16,
    door: Arc<Door<H>>,
    metrics: Arc<Metrics>,
    accepting: Accepting,
) {
    accepting.scope.clone().spawn_critical("captured inbound", async move {
        let serve = |taken: Taken, slot| {
            let (door, metrics) = (Arc::clone(&door), Arc::clone(&metrics));
            async move {
                let _slot: Slot = slot;
                match taken {
                    Ok(Captured { stream, source, destination }) if destination.port() == port => {
                        door.serve(stream, source).await;
                    }
                    Ok(Captured { stream, source, destination }) => {
                        refuse(&metrics, source, &Refused::NoApp(destination));
                        Stream::new(stream).abort();
                    }
                    Err((source, refused)) => refuse(&metrics, source, &refused),
                }
            }
        };
        accepting.serve_each("captured connection", &listener, serve).await;
    });
}

/// The way to a service that the app calls.
pub(crate) enum Way<H> {
    /// Whose requests are read.
    Requests(Arc<Door<H>>),
    /// Whose app speaks a protocol of its own.
    Connections(Arc<TcpOutbound>),
}

impl<H> Clone for Way<H> {
    fn clone(&self) -> Self {
        match self {
            Self::Requests(door) => Self::Requests(Arc::clone(door)),
            Self::Connections(plain) => Self::Connections(Arc::clone(plain)),
        }
    }
}

/// What the app dialled, and where that goes.
struct Dialled<H> {
    destinations: Destinations<Way<H>>,
    outside: Arc<Outside>,
    metrics: Arc<Metrics>,
}

impl<H: Handler> Dialled<H> {
    async fn serve(&self, captured: Captured) {
        let (source, destination) = (captured.source, captured.destination);
        let outcome = match self.destinations.route(destination) {
            Ok(Route::Mesh(way)) => {
                // Only what this host itself dials is redirected to loopback, from whichever address of its own.
                let local = SocketAddr::from((Ipv4Addr::LOCALHOST, source.port()));
                return match way {
                    Way::Requests(door) => door.serve(captured.stream, local).await,
                    Way::Connections(plain) => plain.carry(captured.stream, local).await,
                };
            }
            Ok(Route::Outside(_)) => self.outside.pass(captured).await,
            Err(Refused::EgressDenied(_)) => self.outside.by_name(captured).await,
            Err(refused) => {
                Stream::new(captured.stream).abort();
                Err(refused.into())
            }
        };
        match outcome {
            Ok(()) => {}
            Err(NotCarried::Refused(refused)) => refuse(&self.metrics, source, &refused),
            Err(NotCarried::Failed(reason)) => {
                tracing::info!(%source, %destination, reason, "a connection out of the mesh ended");
            }
        }
    }
}

fn refuse(metrics: &Metrics, source: SocketAddr, refused: &Refused) {
    metrics.refused_connection(refused.rule());
    tracing::info!(%source, rule = refused.rule(), reason = %refused, "captured connection refused");
}

/// A captured connection, or why it goes no further.
type Taken = Result<Captured, (SocketAddr, Refused)>;

fn taken(accepted: Result<Captured, AcceptError>) -> io::Result<Taken> {
    match accepted {
        Ok(captured) => {
            keep_alive(&captured.stream);
            Ok(Ok(captured))
        }
        Err(AcceptError::Refused { source_address, refused }) => Ok(Err((source_address, refused))),
        Err(AcceptError::Accept(error)) => Err(error),
    }
}

impl Accept for OutboundListener {
    type Accepted = Taken;

    async fn accept(&self) -> io::Result<Taken> {
        taken(Self::accept(self).await)
    }
}

impl Accept for InboundListener {
    type Accepted = Taken;

    async fn accept(&self) -> io::Result<Taken> {
        taken(Self::accept(self).await)
    }
}
