//! HBONE: a second way in for meshes that tunnel, such as Istio's ambient ztunnel.
//!
//! A connection is mTLS between SPIFFE IDs, its ALPN `h2`; each stream of it is a CONNECT (RFC 9113 §8.5) whose
//! `:authority` is the address of an app, and then a byte stream to it. It leads to this sidecar's own app and
//! nowhere else, and round nothing: where the service's policies are about requests, the bytes are read as requests by the
//! same handler as those of the mTLS listener; where they are about connections, the tunnel is one.
//! Source: <https://istio.io/latest/docs/ambient/architecture/hbone/>.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures::future::BoxFuture;
use h2::server::SendResponse;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::{Method, Request, Response, StatusCode};
use identity::clock::SharedClock;
use identity::tls::{ALPN_H2, ClientAuth, server_config};
use identity::{IdentitySource, Peer, Scope};
use policy::Mapping;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::BoxError;
use crate::accept::Slot;
use crate::http2::{Greeting, Guarded};
use crate::live::Kind;
use crate::server::{Limits, RefusedConnection};
use crate::tcp::inbound::{Origin, Stop};
use crate::tcp::{Side, Stream, TcpInbound};

/// Where other meshes' proxies expect it.
pub const DEFAULT_PORT: u16 = 15008;
/// From accept to the end of the HTTP/2 preface.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Tunnels of one connection at once: ztunnel opens 100 before it takes another. What they hold for peers that take
/// nothing stays below 16 MB.
const MAX_STREAMS: u32 = 100;
/// A CONNECT has hardly any headers.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Flow control of a tunnel and of a connection. The connection's window is several times a tunnel's, so that one
/// stalled tunnel cannot starve the others.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Bytes of one tunnel that wait to be sent.
const MAX_SEND_BUFFER_BYTES: usize = 16 * 1024;
/// Bytes put into HTTP/2 at a time: one DATA frame of the default size.
const CHUNK_BYTES: usize = 16 * 1024;
/// Streams that a peer may reset before they were looked at (rapid reset, CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 20;
/// Ping interval.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// A peer that does not answer within this time is gone, or keeps a header block from its end.
const PONG_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection's tunnels.
type Streams = h2::server::Connection<Guarded<tokio_rustls::server::TlsStream<Stream>>, Bytes>;

/// Serves requests that arrive through a tunnel as it serves those of the mTLS listener.
pub trait HttpTunnels: Send + Sync + 'static {
    /// Reads `stream` as HTTP from `peer`, until it ends.
    fn serve(self: Arc<Self>, stream: Tunnel, peer: Peer, remote: SocketAddr) -> BoxFuture<'static, ()>;
}

/// The second way in.
pub struct Hbone {
    /// Addresses that CONNECT may name, each one of the app's, with the names of their ports in policies.
    destinations: Vec<(SocketAddr, String)>,
    tcp: Arc<TcpInbound>,
    http: Arc<dyn HttpTunnels>,
    tls: TlsAcceptor,
    clock: SharedClock,
}

impl Hbone {
    /// A way in to the app at `destinations`: its addresses as other meshes know them, and its ports' names in policies.
    /// Requests go to `http`, connections to `tcp`; which it is, is the service's map to say.
    pub fn new(
        destinations: Vec<(SocketAddr, String)>,
        tcp: Arc<TcpInbound>,
        http: Arc<dyn HttpTunnels>,
        source: &IdentitySource,
        clock: SharedClock,
    ) -> Result<Arc<Self>, rustls::Error> {
        let tls = server_config(source, ClientAuth::Required, &[ALPN_H2], &clock)?;
        Ok(Arc::new(Self { destinations, tcp, http, tls: TlsAcceptor::from(tls), clock }))
    }

    /// Accepts within `limits` until `scope` drains; tunnels that are open go on. Returns at once.
    pub fn serve(self: &Arc<Self>, listener: TcpListener, limits: &Limits, scope: &Scope) {
        let (this, inside) = (Arc::clone(self), scope.clone());
        let accepting = limits.accepting(&self.clock, scope);
        scope.spawn_critical("hbone", async move {
            let serve = |(stream, remote), slot| {
                let (this, scope) = (Arc::clone(&this), inside.clone());
                async move {
                    let _slot: Slot = slot;
                    this.connection(stream, remote, &scope).await;
                }
            };
            accepting.serve_each("hbone connection", &listener, serve).await;
        });
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, remote: SocketAddr, scope: &Scope) {
        let handshake = tokio::select! {
            handshake = self.handshake(stream) => handshake,
            () = self.clock.sleep(HANDSHAKE_TIMEOUT) => Err(RefusedConnection::Timeout),
            () = scope.draining() => return,
        };
        let (connection, peer, greeting) = match handshake {
            Ok(done) => done,
            Err(refused) => return self.tcp.refused(remote, &refused),
        };
        let silent = async {
            self.clock.sleep(HANDSHAKE_TIMEOUT).await;
            if greeting.is_over() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.streams(connection, &peer, remote, scope) => {}
            () = silent => tracing::debug!(%remote, "HBONE connection ended: it does not begin"),
        }
    }

    async fn handshake(&self, stream: TcpStream) -> Result<(Streams, Peer, Greeting), RefusedConnection> {
        let tls = self.tls.accept(Stream::new(stream)).await.map_err(RefusedConnection::Handshake)?;
        let failed = |error: BoxError| RefusedConnection::Handshake(io::Error::other(error));
        let peer = match Peer::from_handshake(tls.get_ref().1.peer_certificates()) {
            Some(Ok(peer)) => peer,
            Some(Err(error)) => return Err(failed(error.into())),
            None => return Err(failed("no certificate".into())),
        };
        let (tls, greeting) = Guarded::new(tls);
        let connection = h2::server::Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADER_BYTES)
            .max_send_buffer_size(MAX_SEND_BUFFER_BYTES)
            .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
            .handshake(tls)
            .await
            .map_err(|error| failed(error.into()))?;
        Ok((connection, peer, greeting))
    }

    /// Serves a connection's tunnels until it ends, its peer's certificate does, or `scope` drains and the last
    /// tunnel has ended.
    async fn streams<T: AsyncRead + AsyncWrite + Unpin>(
        self: &Arc<Self>,
        mut connection: h2::server::Connection<T, Bytes>,
        peer: &Peer,
        remote: SocketAddr,
        scope: &Scope,
    ) {
        let mut gone = pin!(no_answer(connection.ping_pong(), self.clock.clone()));
        let mut expired = self.clock.sleep(peer.not_after().saturating_sub(self.clock.now()));
        let mut leaving = false;
        loop {
            tokio::select! {
                accepted = connection.accept() => match accepted {
                    Some(Ok((request, respond))) => {
                        let (this, peer) = (Arc::clone(self), peer.clone());
                        scope.spawn("hbone stream", async move { this.stream(request, respond, peer, remote).await });
                    }
                    Some(Err(error)) => {
                        tracing::debug!(peer = %peer.id(), %remote, %error, "HBONE connection ended");
                        return;
                    }
                    None => return,
                },
                () = scope.draining(), if !leaving => {
                    leaving = true;
                    connection.graceful_shutdown();
                }
                () = &mut expired => {
                    tracing::info!(peer = %peer.id(), %remote, "closed: the peer's certificate has expired");
                    return;
                }
                () = &mut gone => {
                    tracing::info!(peer = %peer.id(), %remote, "closed: the peer answers no ping");
                    return;
                }
            }
        }
    }

    async fn stream(
        self: Arc<Self>,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        peer: Peer,
        remote: SocketAddr,
    ) {
        let started = self.clock.now();
        let origin = Origin { kind: Kind::Hbone, peer: &peer, remote, source: None };
        if request.method() != Method::CONNECT {
            return answer(&mut respond, StatusCode::METHOD_NOT_ALLOWED, "");
        }
        // An address, spelt as we know it: a name would have to be looked up, and might lead elsewhere.
        let authority = request.uri().authority().map(|authority| authority.as_str()).unwrap_or_default();
        let destination = authority.parse::<SocketAddr>().ok();
        let known = self.destinations.iter().find(|(address, _)| Some(*address) == destination);
        let Some((_, port)) = known else {
            let stop = self.tcp.not_ours(authority, origin);
            self.tcp.stopped(&stop, authority, origin, started);
            return answer(&mut respond, StatusCode::NOT_FOUND, stop.receipt());
        };
        if self.tcp.mapping() == Mapping::Routes {
            if let Some(tunnel) = Tunnel::open(&mut respond, request.into_body()) {
                self.http.clone().serve(tunnel, peer, remote).await;
            }
            return;
        }
        match self.tcp.connect(port, origin).await {
            Ok(mut connected) => {
                if let Some(mut tunnel) = Tunnel::open(&mut respond, request.into_body()) {
                    self.tcp.carry(&mut tunnel, &mut connected, origin, started).await;
                }
            }
            Err(stop) => {
                self.tcp.stopped(&stop, port, origin, started);
                let status = match stop {
                    Stop::Denied(_) => StatusCode::FORBIDDEN,
                    Stop::AppDown(_) | Stop::NotReady => StatusCode::SERVICE_UNAVAILABLE,
                };
                answer(&mut respond, status, stop.receipt());
            }
        }
    }
}

/// Completes when the peer does not answer a ping in time.
async fn no_answer(pings: Option<PingPong>, clock: SharedClock) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        clock.sleep(PING_INTERVAL).await;
        tokio::select! {
            pong = pings.ping(Ping::opaque()) => if pong.is_err() { return },
            () = clock.sleep(PONG_TIMEOUT) => return,
        }
    }
}

/// Ends a stream with a status and, where a decision stands behind it, its receipt.
fn answer(respond: &mut SendResponse<Bytes>, status: StatusCode, receipt: &str) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    let body = if receipt.is_empty() {
        Bytes::new()
    } else {
        serde_json::json!({ "error": "denied", "receipt": receipt }).to_string().into()
    };
    let sent = respond
        .send_response(response, body.is_empty())
        .and_then(|mut stream| if body.is_empty() { Ok(()) } else { stream.send_data(body, true) });
    if let Err(error) = sent {
        tracing::debug!(%error, "a stream was gone before its answer");
    }
}

/// A tunnel's bytes.
#[derive(Debug)]
pub struct Tunnel {
    receive: RecvStream,
    /// Received and not taken yet.
    unread: Bytes,
    send: SendStream<Bytes>,
    finished: bool,
}

impl Tunnel {
    /// Says 200; from here on the stream's DATA is the tunnel's.
    fn open(respond: &mut SendResponse<Bytes>, receive: RecvStream) -> Option<Self> {
        match respond.send_response(Response::new(()), false) {
            Ok(send) => Some(Self { receive, unread: Bytes::new(), send, finished: false }),
            Err(error) => {
                tracing::debug!(%error, "a stream was gone before its answer");
                None
            }
        }
    }
}

impl Side for Tunnel {
    fn pause(&mut self) {}

    fn abort(&mut self) {
        self.send.send_reset(Reason::CANCEL);
    }
}

impl AsyncBufRead for Tunnel {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        while this.unread.is_empty() {
            match ready!(this.receive.poll_data(cx)) {
                Some(data) => this.unread = data.map_err(io::Error::other)?,
                None => break,
            }
        }
        Poll::Ready(Ok(&this.unread))
    }

    fn consume(self: Pin<&mut Self>, count: usize) {
        let this = self.get_mut();
        this.unread.advance(count.min(this.unread.len()));
        if let Err(error) = this.receive.flow_control().release_capacity(count) {
            tracing::debug!(%error, "a stream was gone before its bytes were taken");
        }
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let data = ready!(self.as_mut().poll_fill_buf(cx))?;
        let count = data.len().min(buf.remaining());
        buf.put_slice(data.get(..count).unwrap_or_default());
        self.consume(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        this.send.reserve_capacity(data.len().min(CHUNK_BYTES));
        while this.send.capacity() == 0 {
            match ready!(this.send.poll_capacity(cx)) {
                Some(granted) => drop(granted.map_err(io::Error::other)?),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let some = data.get(..data.len().min(this.send.capacity())).unwrap_or(data);
        this.send.send_data(Bytes::copy_from_slice(some), false).map_err(io::Error::other)?;
        Poll::Ready(Ok(some.len()))
    }

    /// The connection's own task sends; there is nothing to wait for.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.finished {
            this.send.send_data(Bytes::new(), true).map_err(io::Error::other)?;
            this.finished = true;
        }
        Poll::Ready(Ok(()))
    }
}
