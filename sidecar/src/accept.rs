//! Accepting connections, for every listener alike: as many as there is room for, each a task of its own.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use identity::Scope;
use identity::clock::SharedClock;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::overload::Overload;

/// Connections of one listener, where nothing else is said; more wait in the kernel's backlog.
pub(crate) const MAX_CONNECTIONS: usize = 10_000;
/// How long to wait before accepting again when the process is out of file descriptors: long enough for
/// some connection to end, short enough that nobody notices.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// A peer that vanished without a word is noticed within a minute and a half, also where nothing has to be said for
/// hours, as on a WebSocket or a stream of events: nothing else ends those.
const KEEP_ALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(10))
    .with_retries(3);

/// Where connections come from.
pub(crate) trait Accept {
    /// A connection, and what is known of it.
    type Accepted;

    /// The next one. Dropping the future loses none.
    fn accept(&self) -> impl Future<Output = io::Result<Self::Accepted>> + Send;
}

impl Accept for TcpListener {
    type Accepted = (TcpStream, SocketAddr);

    async fn accept(&self) -> io::Result<Self::Accepted> {
        let (stream, remote) = Self::accept(self).await?;
        keep_alive(&stream);
        Ok((stream, remote))
    }
}

/// Has the kernel ask whether the other end is still there.
pub(crate) fn keep_alive(stream: &TcpStream) {
    if let Err(error) = SockRef::from(stream).set_tcp_keepalive(&KEEP_ALIVE) {
        tracing::debug!(%error, "no keep-alive");
    }
}

/// Held for as long as a connection counts.
#[derive(Debug)]
pub(crate) struct Slot {
    _permit: OwnedSemaphorePermit,
}

/// What bounds one listener.
pub(crate) struct Accepting {
    pub(crate) max_connections: usize,
    pub(crate) overload: Option<Arc<Overload>>,
    pub(crate) clock: SharedClock,
    pub(crate) scope: Scope,
}

impl Accepting {
    /// Serves each connection of `listener` as a task, named `name`, until the scope drains.
    pub(crate) async fn serve_each<L: Accept, F>(
        self,
        name: &'static str,
        listener: &L,
        serve: impl Fn(L::Accepted, Slot) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let slots = Arc::new(Semaphore::new(self.max_connections));
        let next = async || {
            let slot = Arc::clone(&slots).acquire_owned().await.map_err(io::Error::other)?;
            if let Some(overload) = &self.overload {
                // While descriptors are scarce, connections wait in the kernel's backlog.
                overload.room().await;
            }
            Ok::<_, io::Error>((listener.accept().await?, Slot { _permit: slot }))
        };
        loop {
            let accepted = tokio::select! {
                accepted = next() => accepted,
                () = self.scope.draining() => return,
            };
            match accepted {
                Ok((accepted, slot)) => self.scope.spawn(name, serve(accepted, slot)),
                Err(error) => {
                    // Out of descriptors, or a connection that was gone before we took it: go on.
                    tracing::warn!(%error, "accept failed");
                    self.clock.sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }
}
