//! TLS connections to one peer that are ready for a session: made ahead of need, used again after one.
//!
//! A full handshake on both sides costs what some hundred sessions do, so a connection serves many clients, one
//! after the other: all of them are this sidecar's own app. It belongs to the identity it was made under and goes
//! no further than either side's certificate.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use identity::clock::SharedClock;
use identity::verify::handshake_failure;
use identity::{Identity, IdentitySource, Peer, Scope, SpiffeId};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::frame::ALPN_TCP;
use super::stats::TcpStats;
use super::stream::Stream;
use crate::accept::keep_alive;
use crate::dial;

/// Connections kept ready for one endpoint: what comes at once beyond them waits for a handshake.
pub const MAX_READY: usize = 64;
/// A connection unused for so long is closed. The server's side waits longer, so that it is we who let go.
pub const MAX_IDLE: Duration = Duration::from_secs(60);
/// How often the pool is looked after.
const TICK: Duration = Duration::from_secs(1);
/// Demand is the most sessions begun within one tick of the last so many.
const REMEMBERED_TICKS: usize = 5;
/// For TCP and TLS together, per endpoint.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For saying goodbye to a connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection is let go this long before either certificate ends: a session that begins lives a little.
const EXPIRY_MARGIN: Duration = Duration::from_secs(5);

/// The client's end of a TLS connection.
pub(crate) type Tls = TlsStream<Stream>;

/// Why no connection could be had.
#[derive(Debug, Error)]
pub enum PoolError {
    /// This process has no valid identity to call with.
    #[error("no valid identity of our own yet")]
    NoIdentity,
    /// The endpoint was not reached, or another identity answered.
    #[error("{endpoint} cannot be reached as {id}: {cause}")]
    Connect {
        /// Where we tried.
        endpoint: SocketAddr,
        /// Who should have answered.
        id: SpiffeId,
        /// What happened.
        cause: io::Error,
    },
}

/// A connection that is ready for a session.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) tls: Tls,
    pub(crate) lease: Lease,
}

/// Where a connection leads and how long it may be used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lease {
    endpoint: SocketAddr,
    generation: u64,
    used_at: Duration,
    /// When the earlier of both certificates ends.
    pub(crate) expires: Duration,
}

/// The pool of one peer.
pub(crate) struct Pool {
    id: SpiffeId,
    tls: TlsConnector,
    source: IdentitySource,
    clock: SharedClock,
    stats: TcpStats,
    endpoints: Mutex<HashMap<SocketAddr, Endpoint>>,
    /// Wakes the keeper when there is something to look after.
    wake: Notify,
}

/// What is known of one endpoint.
#[derive(Debug, Default)]
struct Endpoint {
    /// The one used last at the end: it is taken first, so those at the front grow old and go.
    ready: Vec<Ready>,
    begun_this_tick: usize,
    begun: [usize; REMEMBERED_TICKS],
}

impl Pool {
    pub(crate) fn new(
        id: SpiffeId,
        source: IdentitySource,
        clock: SharedClock,
        stats: TcpStats,
    ) -> Result<Arc<Self>, rustls::Error> {
        let tls = identity::tls::client_config(&source, id.clone(), &[ALPN_TCP], &clock)?;
        Ok(Arc::new(Self {
            id,
            tls: TlsConnector::from(tls),
            source,
            clock,
            stats,
            endpoints: Mutex::default(),
            wake: Notify::new(),
        }))
    }

    /// A connection to `endpoint`: one that is ready, else a new one.
    pub(crate) async fn get(&self, endpoint: SocketAddr) -> Result<Ready, PoolError> {
        let identity = self.source.valid_at(self.clock.now()).ok_or(PoolError::NoIdentity)?;
        match self.take(endpoint, &identity) {
            Some(ready) => {
                self.stats.reused();
                Ok(ready)
            }
            None => self.connect(endpoint).await,
        }
    }

    /// A new connection, whatever is ready: for a session that one of those did not begin.
    pub(crate) async fn connect(&self, endpoint: SocketAddr) -> Result<Ready, PoolError> {
        let identity = self.source.valid_at(self.clock.now()).ok_or(PoolError::NoIdentity)?;
        let ready = self.dial(endpoint, &identity).await?;
        self.stats.handshake(true);
        Ok(ready)
    }

    /// Takes back a connection whose session has ended in order.
    pub(crate) fn put(&self, mut ready: Ready) {
        let now = self.clock.now();
        ready.lease.used_at = now;
        let current = self.source.current();
        if !current.is_some_and(|identity| ready.lease.serves(&identity, now)) {
            return;
        }
        let mut endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = &mut endpoints.entry(ready.lease.endpoint).or_default().ready;
        if kept.len() < MAX_READY {
            kept.push(ready);
        }
    }

    /// Connections that are ready, for whoever looks.
    pub(crate) fn ready(&self) -> usize {
        let endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        endpoints.values().map(|endpoint| endpoint.ready.len()).sum()
    }

    fn take(&self, endpoint: SocketAddr, identity: &Identity) -> Option<Ready> {
        let now = self.clock.now();
        let mut endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        let endpoint = endpoints.entry(endpoint).or_default();
        endpoint.begun_this_tick += 1;
        self.wake.notify_one();
        while let Some(mut ready) = endpoint.ready.pop() {
            if ready.lease.serves(identity, now) && ready.is_open() {
                return Some(ready);
            }
        }
        None
    }

    async fn dial(&self, endpoint: SocketAddr, identity: &Identity) -> Result<Ready, PoolError> {
        let attempt = tokio::select! {
            attempt = self.handshake(endpoint) => attempt,
            () = self.clock.sleep(CONNECT_TIMEOUT) => Err(io::ErrorKind::TimedOut.into()),
        };
        let (tls, peer) =
            attempt.map_err(|cause| PoolError::Connect { endpoint, id: self.id.clone(), cause })?;
        let lease = Lease {
            endpoint,
            // Should the identity have changed meanwhile, the connection counts as the older one's and goes early.
            generation: identity.generation,
            used_at: self.clock.now(),
            expires: identity.svid.not_after().min(peer.not_after()),
        };
        Ok(Ready { tls, lease })
    }

    async fn handshake(&self, endpoint: SocketAddr) -> io::Result<(Tls, Peer)> {
        let stream = dial::connect(endpoint).await?;
        keep_alive(&stream);
        let tls = self.tls.connect(identity::tls::unnamed_server(), Stream::new(stream)).await;
        let tls = tls.map_err(|error| io::Error::new(error.kind(), handshake_failure(&error)))?;
        let (_, session) = tls.get_ref();
        if session.alpn_protocol() != Some(ALPN_TCP) {
            return Err(io::Error::other("the peer takes no plain connections"));
        }
        let peer = match Peer::from_handshake(session.peer_certificates()) {
            Some(Ok(peer)) => peer,
            Some(Err(error)) => return Err(io::Error::other(error)),
            None => return Err(io::Error::other("the peer presented no certificate")),
        };
        Ok((tls, peer))
    }

    /// Keeps as many connections ready as were needed at once lately, and lets old ones go. Ends with `scope`.
    pub(crate) async fn keep(self: Arc<Self>, scope: Scope) {
        loop {
            let quiet = self.quiet();
            tokio::select! {
                () = self.clock.sleep(TICK), if !quiet => {}
                () = self.wake.notified(), if quiet => continue,
                () = scope.draining() => break,
            }
            let (leaving, wanted) = self.tick();
            self.close(leaving).await;
            for (endpoint, count) in wanted {
                self.fill(endpoint, count, &scope).await;
            }
        }
        let all = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner).drain().collect::<Vec<_>>();
        self.close(all.into_iter().flat_map(|(_, endpoint)| endpoint.ready).collect()).await;
    }

    fn quiet(&self) -> bool {
        let endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        endpoints.values().all(Endpoint::is_quiet)
    }

    /// One look at the pool: what has to leave, and how many each endpoint lacks.
    fn tick(&self) -> (Vec<Ready>, Vec<(SocketAddr, usize)>) {
        let (now, identity) = (self.clock.now(), self.source.current());
        let (mut leaving, mut wanted) = (Vec::new(), Vec::new());
        let mut endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        for (address, endpoint) in endpoints.iter_mut() {
            let (stay, leave) = std::mem::take(&mut endpoint.ready).into_iter().partition(|ready| {
                identity.as_deref().is_some_and(|identity| ready.lease.serves(identity, now))
            });
            endpoint.ready = stay;
            leaving.extend::<Vec<Ready>>(leave);
            let lacking = endpoint.demand().saturating_sub(endpoint.ready.len());
            if lacking > 0 && identity.is_some() {
                wanted.push((*address, lacking));
            }
        }
        endpoints.retain(|_, endpoint| !endpoint.is_quiet());
        (leaving, wanted)
    }

    async fn fill(&self, endpoint: SocketAddr, count: usize, scope: &Scope) {
        for _ in 0..count {
            let Some(identity) = self.source.valid_at(self.clock.now()) else { return };
            let attempt = tokio::select! {
                attempt = self.dial(endpoint, &identity) => attempt,
                () = scope.draining() => return,
            };
            match attempt {
                Ok(ready) => {
                    self.stats.handshake(false);
                    self.put(ready);
                }
                Err(error) => {
                    tracing::debug!(%error, "no connection ahead of need");
                    return;
                }
            }
        }
    }

    async fn close(&self, leaving: Vec<Ready>) {
        let goodbye = futures::future::join_all(leaving.into_iter().map(|mut ready| async move {
            if let Err(error) = ready.tls.shutdown().await {
                tracing::debug!(%error, "closing");
            }
        }));
        tokio::select! {
            _all = goodbye => {}
            () = self.clock.sleep(CLOSE_TIMEOUT) => {}
        }
    }
}

impl Lease {
    /// Whether the connection may carry a session of `identity`.
    fn serves(&self, identity: &Identity, now: Duration) -> bool {
        self.generation == identity.generation
            && now < self.used_at + MAX_IDLE
            && now + EXPIRY_MARGIN < self.expires
    }
}

impl Ready {
    /// Whether the other side has neither closed it nor sent what nobody asked for.
    fn is_open(&mut self) -> bool {
        self.tls.fill_buf().now_or_never().is_none()
    }
}

impl Endpoint {
    /// Connections that should be ready; moves on by one tick.
    fn demand(&mut self) -> usize {
        self.begun.rotate_right(1);
        if let Some(newest) = self.begun.first_mut() {
            *newest = std::mem::take(&mut self.begun_this_tick);
        }
        self.begun.iter().copied().max().unwrap_or_default().min(MAX_READY)
    }

    fn is_quiet(&self) -> bool {
        self.ready.is_empty() && self.begun_this_tick == 0 && self.begun.iter().all(|count| *count == 0)
    }
}
