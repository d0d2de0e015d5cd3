//! The two listeners: one for workloads, over mutual TLS, and one for people and their tools, on loopback.
//!
//! Both speak HTTP through hyper directly. A router would bring nothing here: the method `LIST` is not one
//! it knows, targets are judged undecoded, and every request passes the same steps ([`handle`]).

mod body;
mod handle;
mod intake;
mod reply;
mod route;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, select};
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use identity::{Peer, Scope};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::authorize::Authorizer;
use crate::core::Core;

pub(crate) use reply::chain;

/// Most connections to each listener; beyond it the kernel's queue holds them back.
pub const MAX_CONNECTIONS: usize = 1024;
/// Largest request body, as a Vault behind its usual proxy; a secret is small.
pub const MAX_BODY_BYTES: usize = 1024 * 1024;
/// Most headers of a request: clients of Vault send about ten.
pub const MAX_HEADERS: usize = 64;
/// Largest request head.
pub const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Most requests at once on one HTTP/2 connection.
pub const MAX_STREAMS: u32 = 64;
/// Time for a handshake: a round trip or two and a signature.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for a request's head.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a request's body.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(15);
/// Time for carrying a request out, fsync included.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Time that requests under way have when their connection is told to end.
pub const CLOSE_GRACE: Duration = Duration::from_secs(5);
/// Pause after the kernel could not give us a connection (no descriptors): long enough not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Which listener a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Front {
    /// People and tools, with a token.
    Operator,
    /// Workloads, by their SVID.
    Mesh,
}

/// What all requests share.
pub(crate) struct Service {
    pub(crate) core: Arc<Core>,
    pub(crate) authorizer: Arc<dyn Authorizer>,
    pub(crate) scope: Scope,
}

/// What is known of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    pub(crate) address: SocketAddr,
    /// Whom the handshake proved; `None` on the operator's listener, and only there.
    pub(crate) peer: Option<Peer>,
}

impl Connection {
    pub(crate) fn front(&self) -> Front {
        if self.peer.is_some() { Front::Mesh } else { Front::Operator }
    }
}

/// Accepts until the scope drains; then waits for the connections to end.
pub(crate) async fn listen(service: Arc<Service>, listener: TcpListener, tls: Option<TlsAcceptor>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let scope = service.scope.clone();
    let mut draining = pin!(scope.draining());
    loop {
        // INVARIANT: the semaphore is never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { break };
        let (stream, address) = match select(pin!(listener.accept()), draining.as_mut()).await {
            Either::Left((Ok(accepted), _)) => accepted,
            Either::Left((Err(error), _)) => {
                tracing::warn!(%error, "the vault could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
            Either::Right(_) => break,
        };
        let service = Arc::clone(&service);
        let tls = tls.clone();
        scope.spawn("vault connection", async move {
            match tls {
                Some(tls) => serve_mesh(service, stream, address, tls).await,
                None => {
                    serve_connection(service, TokioIo::new(stream), Connection { address, peer: None }).await
                }
            }
            drop(slot);
        });
    }
    drop(listener);
    // All slots free: every connection has ended.
    let _ended = slots.acquire_many(u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX)).await.is_ok();
}

async fn serve_mesh(service: Arc<Service>, stream: TcpStream, address: SocketAddr, tls: TlsAcceptor) {
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::info!(%address, %error, "a handshake with the vault failed");
            return;
        }
        Err(_) => {
            tracing::info!(%address, "a handshake with the vault took too long");
            return;
        }
    };
    let peer = match Peer::from_handshake(stream.get_ref().1.peer_certificates()) {
        Some(Ok(peer)) => peer,
        // The verifier demands a certificate and has checked it: this cannot be, so nothing is served.
        Some(Err(_)) | None => {
            tracing::error!(%address, "a finished handshake proved no peer");
            return;
        }
    };
    serve_connection(service, TokioIo::new(stream), Connection { address, peer: Some(peer) }).await;
}

/// Serves one connection until it ends, stays silent from the start, the scope drains, or the peer's SVID
/// expires.
async fn serve_connection<I>(service: Arc<Service>, io: TokioIo<I>, connection: Connection)
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let address = connection.address;
    let over = until_over(&service, &connection);
    let scope = service.scope.clone();
    let connection = Arc::new(connection);
    let asked = Arc::new(AtomicBool::new(false));
    let has_asked = Arc::clone(&asked);
    let answer = service_fn(move |request: Request<Incoming>| {
        has_asked.store(true, Ordering::Relaxed);
        let answered = handle::answer(Arc::clone(&service), Arc::clone(&connection), request);
        async move { Ok::<Response<Full<Bytes>>, Infallible>(answered.await) }
    });
    let builder = builder(&scope);
    let mut serving = pin!(builder.serve_connection(io, answer));
    // hyper limits the time of a request's head, not of the bytes that tell HTTP/1 from HTTP/2.
    let silent = async {
        tokio::time::sleep(HEAD_TIMEOUT).await;
        if asked.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    let (over, silent) = (pin!(over), pin!(silent));
    let outcome = match select(serving.as_mut(), select(over, silent)).await {
        Either::Left((outcome, _)) => outcome,
        Either::Right((Either::Right(_), _)) => return,
        Either::Right((Either::Left(_), _)) => {
            serving.as_mut().graceful_shutdown();
            match tokio::time::timeout(CLOSE_GRACE, serving).await {
                Ok(outcome) => outcome,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%address, %error, "a connection to the vault ended badly");
    }
}

/// Completes when a connection has to end: at the drain, or with its peer's SVID.
fn until_over(service: &Service, connection: &Connection) -> impl Future<Output = ()> + Send + use<> {
    let clock = Arc::clone(&service.core.clock);
    let scope = service.scope.clone();
    let not_after = connection.peer.as_ref().map(Peer::not_after);
    async move {
        match not_after {
            Some(end) => {
                let left = clock.sleep(end.saturating_sub(clock.now()));
                select(pin!(scope.draining()), left).await;
            }
            None => scope.draining().await,
        }
    }
}

fn builder(scope: &Scope) -> auto::Builder<InScope> {
    let mut builder = auto::Builder::new(InScope(scope.clone()));
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(MAX_HEAD_BYTES).unwrap_or(u32::MAX))
        .keep_alive_interval(HEAD_TIMEOUT)
        .keep_alive_timeout(HEAD_TIMEOUT);
    builder
}

/// hyper's tasks (one an HTTP/2 stream) belong to the scope like every other.
#[derive(Clone)]
struct InScope(Scope);

impl<F> hyper::rt::Executor<F> for InScope
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn("vault stream", task);
    }
}
