//! Accepting connections: limits, handshakes, draining. Shared by the sidecar's listeners, its admin
//! port and the gateway's front door.

use std::convert::Infallible;
use std::fmt::{Debug, Display};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::BoxFuture;
use http::HeaderValue;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use identity::clock::SharedClock;
use identity::tls::ALPN_H2;
use identity::verify::{VerifyError, handshake_failure};
use identity::{Peer, Scope};
use policy::ServicePolicy;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::accept::{Accepting, MAX_CONNECTIONS, Slot};
use crate::debug::connections::{Connections, Noted};
use crate::hbone::{HttpTunnels, Tunnel};
use crate::http2::{Guarded, Streams, paced_request};
use crate::live::{Closed, Facts, Judge, Kind, Live, Registry};
use crate::overload::Overload;
use crate::proxy_protocol::{self, Networks, ProxyError};
use crate::tcp::{ALPN_TCP, Stream};
use crate::{Body, Buffered, answer, http1, mux};

/// First byte of a TLS handshake record (RFC 8446 §5.1).
const TLS_HANDSHAKE: u8 = 0x16;
/// How long a connection whose peer's certificate has expired may take to finish its last requests: the peer has had
/// half of the certificate's life to make another connection, with another one.
const EXPIRY_GRACE: Duration = Duration::from_millis(500);

/// What a connection that seems idle, or is shaking hands, gets when a drain begins: its client may be sending
/// a request right now, which closing at once would lose.
pub(crate) const LAST_REQUEST_GRACE: Duration = Duration::from_secs(1);

/// Bounds of one listener. Defaults are for a listener that strangers can reach.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at once; more wait in the kernel's backlog.
    pub max_connections: usize,
    /// From accept to the end of the TLS handshake, and from there to what an HTTP/2 client begins with.
    pub handshake_timeout: Duration,
    /// For a request's head on HTTP/1.1; also how long a kept-alive connection may idle.
    pub header_timeout: Duration,
    /// Bytes of a request's head.
    pub max_header_bytes: usize,
    /// Headers of a request.
    pub max_headers: usize,
    /// Concurrent streams of an HTTP/2 connection.
    pub max_streams: u32,
    /// HTTP/2 keep-alive ping interval; a peer that does not answer within half as long again is gone.
    pub ping_interval: Duration,
    /// Where to ask whether there is too much to do already; `None` never refuses for that.
    pub overload: Option<Arc<Overload>>,
    /// Who must say first, by a PROXY protocol header, where a connection comes from; others may not. Heeded
    /// where TLS is spoken.
    pub proxies: Networks,
    /// Where connections of peers with an identity are kept while they are open; `None` is a place of its own.
    pub live: Option<Arc<Registry>>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: MAX_CONNECTIONS,
            handshake_timeout: Duration::from_secs(5),
            header_timeout: Duration::from_secs(30),
            // Room for a transaction token of eight links beside ordinary headers.
            max_header_bytes: 64 * 1024,
            max_headers: 100,
            // No fewer, says RFC 9113 §6.5.2. What they hold of answers that nobody takes stays below 16 MB.
            max_streams: 100,
            ping_interval: Duration::from_secs(20),
            overload: None,
            proxies: Networks::default(),
            live: None,
        }
    }
}

impl Limits {
    /// Accepting within them, until `scope` drains.
    pub(crate) fn accepting(&self, clock: &SharedClock, scope: &Scope) -> Accepting {
        let (max_connections, overload) = (self.max_connections, self.overload.clone());
        Accepting { max_connections, overload, clock: clock.clone(), scope: scope.clone() }
    }
}

/// Bytes of flow control a stream and a connection may have outstanding. The connection's window is
/// several times a stream's, so that one stalled stream cannot starve the others.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Bytes of one answer that wait for a peer that does not read, however large a window it gives: a DATA frame of the
/// default size.
const MAX_SEND_BUFFER_BYTES: usize = 16 * 1024;

/// What is known of a connection before its first request.
#[derive(Debug)]
pub struct Connection {
    /// Who the other end proved to be; `None` on listeners that do not ask.
    pub peer: Option<Peer>,
    /// Where it comes from.
    pub remote: SocketAddr,
    /// What the app is told of the peer, made for the connection's first request.
    pub(crate) forwarded: OnceLock<Option<HeaderValue>>,
    /// Where the handler's connections are noted.
    pub(crate) noted: Option<Noted>,
}

impl Connection {
    pub(crate) fn new(peer: Option<Peer>, remote: SocketAddr) -> Self {
        Self { peer, remote, forwarded: OnceLock::new(), noted: None }
    }

    /// The same, noted where `handler` wants it to be.
    fn noted(self, protocol: &'static str, listen: &Listen, handler: &Arc<impl Handler>) -> Self {
        let Some(peer) = &self.peer else { return self };
        let note = |open: &Arc<Connections>| open.note(peer, self.remote, protocol, listen.clock.now());
        Self { noted: handler.connections().map(note), ..self }
    }
}

/// Why a connection never became one.
#[derive(Debug)]
pub enum RefusedConnection {
    /// The first bytes are not TLS.
    PlainText,
    /// The handshake failed: no certificate, a bad one, an unknown authority, an old protocol.
    Handshake(io::Error),
    /// It took longer than [`Limits::handshake_timeout`].
    Timeout,
    /// A proxy did not say where it comes from.
    Proxy(ProxyError),
}

impl RefusedConnection {
    /// The rule that refused it.
    pub fn rule(&self) -> &'static str {
        match self {
            Self::PlainText => "tls.plain_text",
            Self::Timeout => "tls.handshake_timeout",
            Self::Proxy(_) => "proxy_protocol.header",
            Self::Handshake(error) => handshake_rule(error),
        }
    }

    /// The operator's explanation.
    pub fn reason(&self) -> String {
        match self {
            Self::PlainText => "the connection does not speak TLS".to_owned(),
            Self::Timeout => "the TLS handshake took too long".to_owned(),
            Self::Handshake(error) => format!("the TLS handshake failed: {}", handshake_failure(error)),
            Self::Proxy(error) => error.to_string(),
        }
    }
}

fn handshake_rule(error: &io::Error) -> &'static str {
    use rustls::{CertificateError, Error};
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
    match cause {
        Some(Error::NoCertificatesPresented) => "tls.no_client_certificate",
        Some(Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        )) => "tls.expired_svid",
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer)) => "tls.unknown_authority",
        Some(Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(cause)))) => {
            match cause.downcast_ref() {
                Some(VerifyError::UnknownTrustDomain(_)) => "tls.unknown_trust_domain",
                _ => "tls.invalid_svid",
            }
        }
        Some(Error::InvalidCertificate(_)) => "tls.invalid_svid",
        Some(Error::PeerIncompatible(_)) => "tls.protocol_version",
        _ => "tls.handshake",
    }
}

/// What a listener does with what arrives.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request.
    fn handle(
        self: Arc<Self>,
        connection: Arc<Connection>,
        request: Request<Body>,
    ) -> impl Future<Output = Response<Body>> + Send;

    /// Serves a plain connection of another sidecar, which comes only where [`ALPN_TCP`] is offered.
    fn plain(
        &self,
        stream: TlsStream<Buffered>,
        peer: Peer,
        remote: SocketAddr,
        scope: &Scope,
    ) -> impl Future<Output = ()> + Send {
        let _nothing_to_serve_it = (stream, peer, remote, scope);
        std::future::ready(())
    }

    /// Where its connections are to be noted, if anywhere.
    fn connections(&self) -> Option<&Arc<Connections>> {
        None
    }

    /// Hears of a connection that was refused before any request.
    fn refused(&self, remote: SocketAddr, refused: &RefusedConnection) {
        tracing::info!(%remote, rule = refused.rule(), reason = refused.reason(), "connection refused");
    }
}

/// Accepts until `scope` drains, then lets every connection finish its requests.
///
/// With `tls`, a connection that does not begin with a TLS handshake is refused. Runs as a critical task
/// of `scope`; returns at once.
pub fn serve(
    name: &'static str,
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    limits: Limits,
    scope: &Scope,
    clock: SharedClock,
    handler: Arc<impl Handler>,
) {
    let listen = Listen::new(tls, limits, scope, clock);
    let accepting = listen.limits.accepting(&listen.clock, scope);
    scope.spawn_critical(name, async move {
        let serve = |(stream, remote), slot| {
            let (listen, handler) = (listen.clone(), Arc::clone(&handler));
            async move {
                let _slot: Slot = slot;
                if let Err(refused) = connection(stream, remote, &listen, &handler).await {
                    handler.refused(remote, &refused);
                }
            }
        };
        accepting.serve_each("connection", &listener, serve).await;
    });
}

/// Serves connections that are accepted elsewhere as those of a listener are.
pub(crate) struct Door<H> {
    listen: Listen,
    handler: Arc<H>,
}

impl<H: Handler> Door<H> {
    /// As [`serve`], of which it lacks the listener and the bound on connections.
    pub(crate) fn new(
        tls: Option<Arc<ServerConfig>>,
        limits: Limits,
        scope: &Scope,
        clock: SharedClock,
        handler: Arc<H>,
    ) -> Arc<Self> {
        Arc::new(Self { listen: Listen::new(tls, limits, scope, clock), handler })
    }

    /// Serves one connection, which counts as one from `remote`, to its end.
    pub(crate) async fn serve(&self, stream: TcpStream, remote: SocketAddr) {
        if let Err(refused) = connection(stream, remote, &self.listen, &self.handler).await {
            self.handler.refused(remote, &refused);
        }
    }
}

#[derive(Clone)]
struct Listen {
    tls: Option<TlsAcceptor>,
    limits: Arc<Limits>,
    live: Arc<Registry>,
    clock: SharedClock,
    scope: Scope,
}

impl Listen {
    fn new(tls: Option<Arc<ServerConfig>>, limits: Limits, scope: &Scope, clock: SharedClock) -> Self {
        let live = limits.live.clone().unwrap_or_else(|| Registry::new(clock.clone()));
        let (tls, limits) = (tls.map(TlsAcceptor::from), Arc::new(limits));
        Self { tls, limits, live, clock, scope: scope.clone() }
    }

    /// Notes a connection whose peer has an identity.
    fn register(&self, connection: &Connection) -> Option<Live> {
        let Connection { peer, remote, .. } = connection;
        let peer = peer.clone()?;
        let facts = Facts { kind: Kind::Http, peer, remote: *remote, since: self.clock.now() };
        Some(self.live.register(facts, Arc::new(Requests)))
    }
}

/// A connection that carries requests: policies judge those.
struct Requests;

impl Judge for Requests {
    fn judge(&self, _policy: &ServicePolicy) -> Result<(), Closed> {
        Ok(())
    }

    fn about(&self) -> String {
        "requests".to_owned()
    }
}

/// The handler's answer, or the refusal of a request that there is no memory for. The handler's future is made where it
/// stays: it is large, and given by value it would be moved.
async fn answer_within(
    limits: &Limits,
    handler: Arc<impl Handler>,
    connection: Arc<Connection>,
    request: Request<Body>,
) -> Response<Body> {
    if limits.overload.as_ref().is_some_and(|overload| overload.shed()) {
        return answer::unavailable("overloaded");
    }
    handler.handle(connection, request).await
}

async fn connection(
    stream: TcpStream,
    remote: SocketAddr,
    listen: &Listen,
    handler: &Arc<impl Handler>,
) -> Result<(), RefusedConnection> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let Some(acceptor) = &listen.tls else {
        Box::pin(plain(stream, remote, listen, handler)).await;
        return Ok(());
    };
    let handshake = async {
        let (stream, remote, unread) = match Box::pin(beyond_proxy(stream, remote, listen)).await? {
            Some(beyond) => beyond,
            None => return Ok(None),
        };
        let mut first = [0];
        let peeked = match unread.first() {
            Some(byte) => {
                first = [*byte];
                Ok(1)
            }
            None => stream.peek(&mut first).await,
        };
        match peeked {
            Ok(1) if first == [TLS_HANDSHAKE] => {}
            // Connected and gone, as a port check does: nothing was asked, nothing is refused.
            Ok(0) => return Ok(None),
            Ok(_) => return Err(RefusedConnection::PlainText),
            Err(error) => return Err(RefusedConnection::Handshake(error)),
        }
        let accepted = acceptor.accept(Buffered::after(stream, unread)).await;
        // Boxed, since it is passed on and is as large as a session is.
        accepted.map(|stream| Some((Box::new(stream), remote))).map_err(RefusedConnection::Handshake)
    };
    // Boxed, since a connection need not hold room for its beginning.
    let handshake = Box::pin(handshake);
    let stream = tokio::select! {
        stream = handshake => stream?,
        () = listen.clock.sleep(listen.limits.handshake_timeout) => return Err(RefusedConnection::Timeout),
        () = last_moment(listen) => return Ok(()),
    };
    let Some((stream, remote)) = stream else { return Ok(()) };
    let (_, session) = stream.get_ref();
    let peer = match Peer::from_handshake(session.peer_certificates()) {
        None => None,
        Some(Ok(peer)) => Some(peer),
        Some(Err(error)) => {
            return Err(RefusedConnection::Handshake(io::Error::other(error)));
        }
    };
    let protocol = session.alpn_protocol();
    let (multiplexed, http2) = (protocol == Some(mux::ALPN), protocol == Some(ALPN_H2));
    if protocol == Some(ALPN_TCP) {
        if let Some(peer) = peer {
            // Boxed: connections that carry requests need not hold room for it.
            Box::pin(handler.plain(*stream, peer, remote, &listen.scope)).await;
        }
        return Ok(());
    }
    let spoken = if multiplexed {
        "mux"
    } else if http2 {
        "http/2"
    } else {
        "http/1.1"
    };
    let connection = Connection::new(peer, remote).noted(spoken, listen, handler);
    if multiplexed {
        exchanges(stream, connection, listen, handler).await;
    } else if http2 {
        Box::pin(streams(stream, Arc::new(connection), listen, handler)).await;
    } else {
        let (reader, writer) = tokio::io::split(stream);
        Box::pin(requests(reader, writer, connection, listen, handler)).await;
    }
    Ok(())
}

/// The connection, where it comes from by what a trusted proxy says, and what was read beyond that. `None` if it is
/// over already.
async fn beyond_proxy(
    stream: TcpStream,
    remote: SocketAddr,
    listen: &Listen,
) -> Result<Option<(TcpStream, SocketAddr, Vec<u8>)>, RefusedConnection> {
    let proxies = &listen.limits.proxies;
    if !proxies.contain(remote.ip()) {
        return Ok(Some((stream, remote, Vec::new())));
    }
    let mut stream = Stream::new(stream);
    match proxy_protocol::accept(&mut stream, remote, proxies, &listen.clock).await {
        Ok(source) => {
            let (stream, unread) = stream.into_parts();
            Ok(Some((stream, source, unread)))
        }
        Err(ProxyError::Io(_)) if stream.unread().is_empty() => Ok(None),
        Err(error) => Err(RefusedConnection::Proxy(error)),
    }
}

/// Requests that come through another mesh's tunnels, for the handler of the mTLS listener.
pub struct TunnelledRequests<H> {
    listen: Listen,
    handler: Arc<H>,
}

impl<H: Handler> TunnelledRequests<H> {
    /// Hands them to `handler`, within `limits`, until `scope` drains.
    pub fn new(handler: Arc<H>, limits: Limits, scope: &Scope, clock: SharedClock) -> Arc<Self> {
        Arc::new(Self { listen: Listen::new(None, limits, scope, clock), handler })
    }
}

impl<H: Handler> HttpTunnels for TunnelledRequests<H> {
    fn serve(self: Arc<Self>, stream: Tunnel, peer: Peer, remote: SocketAddr) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let connection = Connection::new(Some(peer), remote).noted("hbone", &self.listen, &self.handler);
            let (reader, writer) = tokio::io::split(stream);
            requests(reader, writer, connection, &self.listen, &self.handler).await;
        })
    }
}

/// Serves an app or a person on this machine: HTTP/1.1, or HTTP/2 by prior knowledge, as gRPC clients speak it.
async fn plain(stream: TcpStream, remote: SocketAddr, listen: &Listen, handler: &Arc<impl Handler>) {
    let (reader, writer) = stream.into_split();
    requests(reader, writer, Connection::new(None, remote), listen, handler).await;
}

/// Serves requests over HTTP/1.1, or over HTTP/2 where that is what the connection begins with, until the connection
/// ends, the scope drains, or the peer's certificate expires.
async fn requests<R, W>(
    reader: R,
    writer: W,
    connection: Connection,
    listen: &Listen,
    handler: &Arc<impl Handler>,
) where
    R: AsyncRead + Debug + Unpin + Send + 'static,
    W: AsyncWrite + Debug + Unpin + Send + 'static,
{
    let live = listen.register(&connection);
    let over = async {
        lost(live.as_ref()).await;
    };
    let cut = async {
        let grace = lost(live.as_ref()).await;
        listen.clock.sleep(grace).await;
    };
    let connection = Arc::new(connection);
    let answer =
        |request| answer_within(&listen.limits, Arc::clone(handler), Arc::clone(&connection), request);
    let serving = http1::serve(reader, writer, &listen.limits, &listen.scope, over, answer);
    let ended = tokio::select! {
        ended = serving => ended,
        () = cut => return,
    };
    match ended {
        http1::Ended::Closed => {}
        http1::Ended::Http2(unread) => Box::pin(streams(unread, connection, listen, handler)).await,
        ended => tracing::debug!(remote = %connection.remote, ?ended, "connection ended"),
    }
}

/// Serves another sidecar until the connection ends, the scope drains, or the peer's certificate expires.
async fn exchanges(
    stream: Box<TlsStream<Buffered>>,
    connection: Connection,
    listen: &Listen,
    handler: &Arc<impl Handler>,
) {
    let leaving = leaving(&connection, listen);
    let connection = Arc::new(connection);
    let handler = Arc::clone(handler);
    let limits = Arc::clone(&listen.limits);
    let answer = move |request| {
        let (limits, handler, connection) =
            (Arc::clone(&limits), Arc::clone(&handler), Arc::clone(&connection));
        async move { answer_within(&limits, handler, connection, request).await }
    };
    log_end(mux::serve(stream, &listen.clock, &listen.scope, leaving, answer).await);
}

/// Completes when a connection may take no more requests: with the bound for those under way where the peer is
/// trusted no longer, without one while draining, where whoever joins the scope holds the bound, and for want of
/// descriptors.
fn leaving(connection: &Connection, listen: &Listen) -> impl Future<Output = Option<Duration>> + use<> {
    let (live, scope) = (listen.register(connection), listen.scope.clone());
    let limits = Arc::clone(&listen.limits);
    async move {
        tokio::select! {
            grace = lost(live.as_ref()) => Some(grace),
            () = scope.draining() => None,
            () = relief(&limits) => None,
        }
    }
}

/// Completes when the peer is trusted no longer, with what requests under way still get; never for a peer without an
/// identity.
async fn lost(live: Option<&Live>) -> Duration {
    let Some(live) = live else { return std::future::pending().await };
    let closed = live.closed().await;
    let Facts { peer, remote, .. } = live.facts();
    tracing::info!(peer = %peer.id(), %remote, rule = closed.rule(), "no more requests on this connection");
    if matches!(closed, Closed::Expired) { EXPIRY_GRACE } else { Duration::ZERO }
}

/// Serves HTTP/2 until the connection ends, the scope drains, or the peer's certificate expires.
async fn streams<S>(stream: S, connection: Arc<Connection>, listen: &Listen, handler: &Arc<impl Handler>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let leaving = leaving(&connection, listen);
    let (stream, greeting) = Guarded::new(stream);
    let service = service_fn(|request: Request<Incoming>| {
        let (request, answering) = paced_request(request);
        let (limits, handler) = (Arc::clone(&listen.limits), Arc::clone(handler));
        let connection = Arc::clone(&connection);
        async move {
            let response = answer_within(&limits, handler, connection, request).await;
            Ok::<_, Infallible>(answering.begun(response))
        }
    });
    let serving = http2(&listen.limits, &listen.scope).serve_connection(TokioIo::new(stream), service);
    let mut serving = pin!(serving);
    let silent = async {
        listen.clock.sleep(listen.limits.handshake_timeout).await;
        if greeting.is_over() {
            std::future::pending::<()>().await;
        }
    };
    let bound = tokio::select! {
        outcome = serving.as_mut() => return log_end(outcome),
        bound = leaving => bound,
        () = silent => return tracing::debug!(remote = %connection.remote, "connection ended: it does not begin"),
    };
    serving.as_mut().graceful_shutdown();
    tokio::select! {
        outcome = serving => log_end(outcome),
        () = listen.clock.sleep(bound.unwrap_or(Duration::MAX)) => {}
    }
}

/// Completes for a connection that is to end for want of descriptors.
pub(crate) async fn relief(limits: &Limits) {
    match &limits.overload {
        Some(overload) => overload.relief().await,
        None => std::future::pending().await,
    }
}

/// Completes a moment after the drain has begun.
async fn last_moment(listen: &Listen) {
    listen.scope.draining().await;
    listen.clock.sleep(LAST_REQUEST_GRACE).await;
}

fn log_end(outcome: Result<(), impl Display>) {
    if let Err(error) = outcome {
        tracing::debug!(%error, "connection ended");
    }
}

fn http2(limits: &Limits, scope: &Scope) -> http2::Builder<Streams> {
    let mut builder = http2::Builder::new(Streams(scope.clone()));
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.max_streams)
        .max_header_list_size(u32::try_from(limits.max_header_bytes).unwrap_or(u32::MAX))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(MAX_SEND_BUFFER_BYTES)
        .keep_alive_interval(limits.ping_interval)
        .keep_alive_timeout(limits.ping_interval / 2);
    builder
}

/// Runs hyper's helper tasks inside a scope.
#[derive(Clone)]
pub struct ScopeExecutor(pub Scope);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for ScopeExecutor {
    fn execute(&self, task: F) {
        self.0.spawn("http", task);
    }
}
