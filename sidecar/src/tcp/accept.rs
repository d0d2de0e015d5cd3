//! Accepting connections that are not requests.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use identity::Scope;
use identity::clock::SharedClock;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Connections of one listener; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 10_000;
/// How long to wait before accepting again when the process is out of file descriptors: long enough for some
/// connection to end, short enough that nobody notices.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Serves each connection of `listener` as a task of `scope`, until that drains.
pub(crate) async fn accept_all<F>(
    name: &'static str,
    listener: TcpListener,
    clock: SharedClock,
    scope: Scope,
    serve: impl Fn(TcpStream, SocketAddr) -> F,
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
            Ok((stream, remote)) => {
                let serving = serve(stream, remote);
                scope.spawn(name, async move {
                    let _slot = slot;
                    serving.await;
                });
            }
            Err(error) => {
                // Out of descriptors, or a connection that was gone before we took it: go on.
                tracing::warn!(%error, "accept failed");
                clock.sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}
