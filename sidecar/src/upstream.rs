//! The client half: requests to exactly one SPIFFE ID over pooled mTLS connections.
//!
//! HTTP/2 between sidecars, many requests a connection. A connection belongs to the identity it was made
//! under: after a rotation new requests go over new connections, and old ones end with their last
//! request, so no request meets a closed door.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Request, Response, Uri, Version};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use identity::clock::SharedClock;
use identity::tls::ALPN_H2;
use identity::{IdentitySource, Scope, SpiffeId};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::mux::{self, SendError};
use crate::server::ScopeExecutor;
use crate::{Body, BoxError, Buffered};

/// Streams on one connection before another is opened: more only queue behind one socket.
const MAX_STREAMS_PER_CONNECTION: usize = 100;
/// Connections a peer; beyond it requests share the least loaded one.
const MAX_CONNECTIONS: usize = 16;
/// For TCP and TLS together, per endpoint.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a request that never left may be given to another connection.
const MAX_ATTEMPTS: usize = 3;
/// A connection whose peer does not answer a ping within this is dead.
const PING: Duration = Duration::from_secs(10);
/// See [`crate::server`]: the connection's window is several times a stream's.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;

/// Whom to call, and where they may be found.
#[derive(Debug, Clone)]
pub struct UpstreamConfig {
    /// The service's name, for logs and metrics.
    pub service: String,
    /// Who must answer.
    pub id: SpiffeId,
    /// Where, tried in turn.
    pub endpoints: Vec<SocketAddr>,
    /// From sending a request to the head of its answer.
    pub response_timeout: Duration,
}

/// Why a request got no answer.
#[derive(Debug, Error)]
pub enum UpstreamError {
    /// This process has no valid identity to call with.
    #[error("no valid identity of our own yet")]
    NoIdentity,
    /// TLS could not be configured.
    #[error("TLS cannot be configured: {0}")]
    Tls(#[from] rustls::Error),
    /// No endpoint answered as the expected identity.
    #[error("no endpoint of {service} could be reached as {id}: {cause}")]
    Connect {
        /// Whom we called.
        service: String,
        /// Who should have answered.
        id: SpiffeId,
        /// What the last endpoint said.
        cause: BoxError,
    },
    /// The request left, and the connection broke before the answer's head.
    #[error("the connection to {service} broke: {cause}")]
    Broken {
        /// Whom we called.
        service: String,
        /// What is known of it.
        cause: BoxError,
    },
    /// No answer within [`UpstreamConfig::response_timeout`].
    #[error("{0} did not answer in time")]
    Timeout(String),
    /// The request's target is not in origin form.
    #[error("the request's target is not in origin form")]
    Target,
}

impl UpstreamError {
    /// The status that a proxy answers with (RFC 9110 §15.6).
    pub fn status(&self) -> http::StatusCode {
        match self {
            Self::NoIdentity | Self::Connect { .. } => http::StatusCode::SERVICE_UNAVAILABLE,
            Self::Tls(_) | Self::Broken { .. } => http::StatusCode::BAD_GATEWAY,
            Self::Timeout(_) => http::StatusCode::GATEWAY_TIMEOUT,
            Self::Target => http::StatusCode::BAD_REQUEST,
        }
    }
}

/// A pool of connections to one peer.
pub struct Upstream {
    config: UpstreamConfig,
    authority: Authority,
    host: HeaderValue,
    tls: TlsConnector,
    source: IdentitySource,
    clock: SharedClock,
    scope: Scope,
    pool: Mutex<Vec<Pooled>>,
    /// Held while dialling, so that a burst on an empty pool opens one connection and not a hundred.
    dialling: tokio::sync::Mutex<()>,
    next_endpoint: AtomicUsize,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream").field("config", &self.config).finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Pooled {
    link: Link,
    generation: u64,
}

/// What the handshake chose.
#[derive(Clone)]
enum Link {
    /// Another sidecar.
    Mux(mux::Handle),
    /// Anything else that has an identity: a vault, a server with a SPIFFE library.
    Http2 { sender: SendRequest<Body>, in_flight: Arc<AtomicUsize> },
}

impl Link {
    /// How many requests are under way, or `None` if it takes no more.
    fn load(&self) -> Option<usize> {
        match self {
            Self::Mux(handle) => handle.load(),
            Self::Http2 { sender, in_flight } => {
                (!sender.is_closed()).then(|| in_flight.load(Ordering::Relaxed))
            }
        }
    }
}

impl Upstream {
    /// A pool; nothing is dialled until the first request. Its connections are tasks of `scope` and end
    /// when the pool is dropped.
    pub fn new(
        config: UpstreamConfig,
        source: IdentitySource,
        clock: SharedClock,
        scope: &Scope,
    ) -> Result<Arc<Self>, UpstreamError> {
        let tls = identity::tls::client_config(&source, config.id.clone(), &[mux::ALPN, ALPN_H2], &clock)?;
        let authority = Authority::try_from(config.service.as_str()).map_err(|_| UpstreamError::Target)?;
        let host = HeaderValue::try_from(config.service.as_str()).map_err(|_| UpstreamError::Target)?;
        Ok(Arc::new(Self {
            authority,
            host,
            tls: TlsConnector::from(tls),
            source,
            clock,
            scope: scope.clone(),
            pool: Mutex::default(),
            dialling: tokio::sync::Mutex::default(),
            next_endpoint: AtomicUsize::new(0),
            config,
        }))
    }

    /// Whom this pool calls.
    pub fn id(&self) -> &SpiffeId {
        &self.config.id
    }

    /// Their name.
    pub fn service(&self) -> &str {
        &self.config.service
    }

    /// Sends one request, in origin form, and returns the head of the answer; its body streams.
    ///
    /// A request that never left (its connection was already closing) goes over another connection; one
    /// that left is never sent again.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Body>, UpstreamError> {
        tokio::select! {
            // Dials go one after the other: without a bound the hundredth request to a silent peer would
            // wait for the ninety-nine before it.
            answer = self.send_unbounded(request) => answer,
            () = self.clock.sleep(self.config.response_timeout) => {
                Err(UpstreamError::Timeout(self.config.service.clone()))
            }
        }
    }

    async fn send_unbounded(&self, request: Request<Body>) -> Result<Response<Body>, UpstreamError> {
        let (mut head, mut body) = request.into_parts();
        head.headers.insert(HOST, self.host.clone());
        for _ in 0..MAX_ATTEMPTS {
            match self.connection().await?.link {
                Link::Mux(handle) => match handle.send(&head, body).await {
                    Ok(response) => return Ok(response),
                    Err(SendError::NotSent(unsent)) => body = unsent,
                    Err(error) => return Err(self.broken(error.to_string())),
                },
                Link::Http2 { sender, in_flight } => {
                    match self.send_http2(sender, &in_flight, &head, body).await? {
                        Sent::Answered(response) => return Ok(response),
                        Sent::NotSent(unsent) => body = unsent,
                    }
                }
            }
        }
        Err(self.broken("every connection was closing"))
    }

    fn broken(&self, cause: impl Into<BoxError>) -> UpstreamError {
        UpstreamError::Broken { service: self.config.service.clone(), cause: cause.into() }
    }

    async fn send_http2(
        &self,
        mut sender: SendRequest<Body>,
        in_flight: &Arc<AtomicUsize>,
        head: &Parts,
        body: Body,
    ) -> Result<Sent, UpstreamError> {
        let guard = InFlight::new(in_flight);
        let request = Request::from_parts(self.pseudo_headers(head)?, body);
        match sender.try_send_request(request).await {
            Ok(response) => {
                Ok(Sent::Answered(response.map(|body| Body::new(Guarded { body, _guard: guard }))))
            }
            Err(mut refused) => match refused.take_message() {
                Some(unsent) => Ok(Sent::NotSent(unsent.into_body())),
                None => Err(self.broken(refused.into_error())),
            },
        }
    }

    /// The request with the pseudo-headers of HTTP/2. `:authority` is the service's name.
    fn pseudo_headers(&self, head: &Parts) -> Result<Parts, UpstreamError> {
        let target: PathAndQuery = head.uri.path_and_query().cloned().ok_or(UpstreamError::Target)?;
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(Scheme::HTTPS);
        uri.authority = Some(self.authority.clone());
        uri.path_and_query = Some(target);
        let mut head = head.clone();
        head.uri = Uri::from_parts(uri).map_err(|_| UpstreamError::Target)?;
        head.version = Version::HTTP_2;
        head.headers.remove(HOST);
        Ok(head)
    }

    async fn connection(&self) -> Result<Pooled, UpstreamError> {
        let identity = self.source.valid_at(self.clock.now()).ok_or(UpstreamError::NoIdentity)?;
        if let Some(pooled) = self.pooled(identity.generation) {
            return Ok(pooled);
        }
        let _dialling = self.dialling.lock().await;
        // Somebody else may have dialled while we waited.
        if let Some(pooled) = self.pooled(identity.generation) {
            return Ok(pooled);
        }
        let pooled = Pooled { link: self.dial().await?, generation: identity.generation };
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).push(pooled.clone());
        Ok(pooled)
    }

    /// The least loaded live connection of this identity, unless another should be opened.
    fn pooled(&self, generation: u64) -> Option<Pooled> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.retain(|pooled| {
            let current = pooled.generation >= generation;
            if let (false, Link::Mux(handle)) = (current, &pooled.link) {
                handle.go_away();
            }
            // Dropping an HTTP/2 sender lets its connection end after the requests in flight.
            current
        });
        let loads = pool.iter().filter_map(|pooled| Some((pooled.link.load()?, pooled)));
        let (load, least) = loads.min_by_key(|(load, _)| *load)?;
        let busy = load >= MAX_STREAMS_PER_CONNECTION;
        if busy && pool.len() < MAX_CONNECTIONS { None } else { Some(least.clone()) }
    }

    async fn dial(&self) -> Result<Link, UpstreamError> {
        let count = self.config.endpoints.len();
        let first = self.next_endpoint.fetch_add(1, Ordering::Relaxed);
        let mut cause: BoxError = "no endpoint is configured".into();
        for turn in 0..count {
            let Some(endpoint) = self.config.endpoints.get((first + turn) % count) else { break };
            let attempt = tokio::select! {
                attempt = self.dial_endpoint(*endpoint) => attempt,
                () = self.clock.sleep(CONNECT_TIMEOUT) => Err("timed out".into()),
            };
            match attempt {
                Ok(link) => return Ok(link),
                Err(error) => {
                    tracing::info!(service = self.config.service, %endpoint, %error, "cannot connect");
                    cause = error;
                }
            }
        }
        Err(UpstreamError::Connect {
            service: self.config.service.clone(),
            id: self.config.id.clone(),
            cause,
        })
    }

    async fn dial_endpoint(&self, endpoint: SocketAddr) -> Result<Link, BoxError> {
        let stream = TcpStream::connect(endpoint).await?;
        stream.set_nodelay(true)?;
        let stream = self.tls.connect(identity::tls::unnamed_server(), Buffered::new(stream)).await?;
        match stream.get_ref().1.alpn_protocol() {
            Some(mux::ALPN) => {
                let service = self.config.service.as_str().into();
                Ok(Link::Mux(mux::connect(stream, service, self.clock.clone(), &self.scope)))
            }
            Some(ALPN_H2) => self.http2(stream).await,
            _ => Err("the peer speaks neither our protocol nor HTTP/2".into()),
        }
    }

    async fn http2(&self, stream: TlsStream<Buffered>) -> Result<Link, BoxError> {
        let (sender, connection) = http2::Builder::new(ScopeExecutor(self.scope.clone()))
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .handshake(TokioIo::new(stream))
            .await?;
        let service = self.config.service.clone();
        self.scope.spawn("upstream connection", async move {
            if let Err(error) = connection.await {
                tracing::debug!(service, %error, "upstream connection ended");
            }
        });
        Ok(Link::Http2 { sender, in_flight: Arc::default() })
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        for pooled in self.pool.get_mut().unwrap_or_else(PoisonError::into_inner) {
            if let Link::Mux(handle) = &pooled.link {
                handle.go_away();
            }
        }
    }
}

/// What became of a request on an HTTP/2 connection.
enum Sent {
    Answered(Response<Body>),
    NotSent(Body),
}

/// Counts a request on its connection until its answer's body has ended.
struct InFlight(Arc<AtomicUsize>);

impl InFlight {
    fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counter))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Guarded {
    body: Incoming,
    _guard: InFlight,
}

impl http_body::Body for Guarded {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.body).poll_frame(cx).map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
