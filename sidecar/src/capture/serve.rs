//! Serving what the kernel brings: to whom each connection goes is decided when it arrives.

use std::net::Ipv4Addr;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use identity::Scope;
use identity::clock::SharedClock;
use tokio::sync::Semaphore;

use super::outside::{NotCarried, Outside};
use super::{AcceptError, Captured, Destinations, InboundListener, OutboundListener, Refused, Route};
use crate::metrics::Metrics;
use crate::server::{Door, Handler};
use crate::tcp::{Side as _, Stream};
use crate::traffic::egress::AllowList;

/// Connections of one listener; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 10_000;
/// How long to wait before accepting again when the process is out of file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Serves what the app dials: its calls by `destinations`, everything else by the egress rules there and by
/// `names`. Runs as a critical task of `scope`, until that drains.
pub(crate) fn serve_outbound<H: Handler>(
    listener: OutboundListener,
    destinations: Destinations<Arc<Door<H>>>,
    names: AllowList,
    metrics: Arc<Metrics>,
    clock: SharedClock,
    scope: &Scope,
) {
    let outside = Outside::new(names, clock.clone(), scope.clone());
    let outbound = Arc::new(Dialled { destinations, outside, metrics: Arc::clone(&metrics) });
    let accepting =
        accept_all(Listener::Outbound(listener), metrics, clock, scope.clone(), move |captured| {
            let outbound = Arc::clone(&outbound);
            async move { outbound.serve(captured).await }
        });
    scope.spawn_critical("captured outbound", accepting);
}

/// Serves what strangers dial: as a connection to the mTLS listener, if it is meant for the app's `port`. Runs as
/// a critical task of `scope`, until that drains.
pub(crate) fn serve_inbound<H: Handler>(
    listener: InboundListener,
    port: u16,
    door: Arc<Door<H>>,
    metrics: Arc<Metrics>,
    clock: SharedClock,
    scope: &Scope,
) {
    let counted = Arc::clone(&metrics);
    let accepting = accept_all(Listener::Inbound(listener), metrics, clock, scope.clone(), move |captured| {
        let (door, metrics) = (Arc::clone(&door), Arc::clone(&counted));
        async move {
            let Captured { stream, source, destination } = captured;
            if destination.port() == port {
                door.serve(stream, source).await;
            } else {
                refuse(&metrics, source, &Refused::NoApp(destination));
                Stream::new(stream).abort();
            }
        }
    });
    scope.spawn_critical("captured inbound", accepting);
}

/// What the app dialled, and where that goes.
struct Dialled<H> {
    destinations: Destinations<Arc<Door<H>>>,
    outside: Arc<Outside>,
    metrics: Arc<Metrics>,
}

impl<H: Handler> Dialled<H> {
    async fn serve(&self, captured: Captured) {
        let (source, destination) = (captured.source, captured.destination);
        let outcome = match self.destinations.route(destination) {
            Ok(Route::Mesh(door)) => {
                // Only what this host itself dials is redirected to loopback, from whichever address of its own.
                let local = SocketAddr::from((Ipv4Addr::LOCALHOST, source.port()));
                return door.serve(captured.stream, local).await;
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

enum Listener {
    Outbound(OutboundListener),
    Inbound(InboundListener),
}

impl Listener {
    async fn accept(&self) -> Result<Captured, AcceptError> {
        match self {
            Self::Outbound(listener) => listener.accept().await,
            Self::Inbound(listener) => listener.accept().await,
        }
    }
}

async fn accept_all<F>(
    listener: Listener,
    metrics: Arc<Metrics>,
    clock: SharedClock,
    scope: Scope,
    serve: impl Fn(Captured) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let slot = tokio::select! {
            slot = Arc::clone(&slots).acquire_owned() => slot,
            () = scope.draining() => return,
        };
        // The semaphore is never closed; if it were, nothing could be accepted any more.
        let Ok(slot) = slot else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = scope.draining() => return,
        };
        match accepted {
            Ok(captured) => {
                let serving = serve(captured);
                scope.spawn("captured connection", async move {
                    let _slot = slot;
                    serving.await;
                });
            }
            Err(AcceptError::Refused { source_address, refused }) => {
                refuse(&metrics, source_address, &refused)
            }
            Err(AcceptError::Accept(error)) => {
                tracing::warn!(%error, "accept failed");
                clock.sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}
