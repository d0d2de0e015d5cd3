//! An HTTP/1.1 server on loopback, with limits, that ends gracefully.

use std::future::Future;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use hyper::StatusCode;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio_util::task::TaskTracker;

use crate::BankError;
use crate::wire::Refusal;

/// A transfer with the longest memo is under 1 KiB; a page's form is smaller still.
const REQUEST_BODY_BYTES_MAX: usize = 16 * 1024;
/// Longer than two tries of the slowest call made for a request (see [`crate::call`]), so that the
/// caller hears what went wrong rather than a bare timeout.
const REQUEST_SECONDS_MAX: u64 = 25;
/// The only caller is a sidecar on the same host: a head that takes longer than this never comes.
const HEAD_SECONDS_MAX: u64 = 10;
/// A head with every header a sidecar adds is a few KiB.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// The sidecar keeps a pool far smaller than this; more is a leak somewhere, and waits.
const CONNECTIONS_MAX: usize = 1024;
/// How long running requests may take to finish once the service is asked to stop.
const DRAIN_SECONDS_MAX: u64 = 10;
/// After a failed accept (out of file descriptors, say), so that the loop does not spin.
const ACCEPT_PAUSE_MS: u64 = 50;

/// Serves `router` on `listener` until `shutdown` completes, then lets running requests finish.
pub(crate) async fn run(
    listener: std::net::TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()>,
) -> Result<(), BankError> {
    listener.set_nonblocking(true).map_err(BankError::Listener)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(BankError::Listener)?;
    let service = TowerToHyperService::new(
        router
            .layer(DefaultBodyLimit::max(REQUEST_BODY_BYTES_MAX))
            .layer(middleware::from_fn(bounded_in_time)),
    );
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(HEAD_SECONDS_MAX))
        .max_buf_size(HEAD_BYTES_MAX);

    let connections = TaskTracker::new();
    let graceful = GracefulShutdown::new();
    let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut shutdown => break,
            accepted = async {
                let slot = std::sync::Arc::clone(&slots).acquire_owned().await.ok();
                (slot, listener.accept().await)
            } => accepted,
        };
        let (slot, Ok((stream, _))) = accepted else {
            tracing::warn!("a connection could not be accepted");
            tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            continue;
        };
        // Small answers to a caller that waits for them: Nagle only adds delay.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service.clone()));
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(slot);
        });
    }
    drop(listener);
    connections.close();
    let drained = async {
        graceful.shutdown().await;
        connections.wait().await;
    };
    if tokio::time::timeout(Duration::from_secs(DRAIN_SECONDS_MAX), drained).await.is_err() {
        tracing::warn!(left = connections.len(), "drain bound reached; closing what is left");
    }
    Ok(())
}

async fn bounded_in_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(Duration::from_secs(REQUEST_SECONDS_MAX), next.run(request)).await {
        Ok(response) => response,
        Err(_) => Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "timeout", "the request took too long")
            .into_response(),
    }
}
