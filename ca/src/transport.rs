//! gRPC over our own TLS: what tonic needs to be handed, on both ends.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tonic::transport::{Channel, Endpoint};

use identity::clock::SharedClock;
use identity::served::Served;
use identity::{BundleSet, IdentitySource, Peer, Scope, SpiffeId, tls};

/// Longest TLS handshake; a client that needs longer is stuck or means no good.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at once. Each costs about a millisecond of CPU; more would only queue.
const MAX_HANDSHAKES: usize = 256;
/// Life of a connection without a client certificate: enough to join, too short to hoard connections.
const JOINING_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections at once; an agent needs one, and each costs some 50 KB.
const MAX_CONNECTIONS: usize = 20_000;
/// Connections that wait for tonic to take them.
const ACCEPT_QUEUE: usize = 64;
/// Wait after a failed accept (out of file descriptors, mostly), so that the loop neither dies nor spins.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Longest attempt to open a connection to control.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle connection is probed, and how long an answer may take: a control that is gone
/// without a word is noticed within their sum.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// Who is at the other end of a connection to control.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// What the handshake proved; `None` for a node that has no identity yet.
    pub(crate) peer: Option<Peer>,
    pub(crate) address: SocketAddr,
}

/// A TLS connection whose handshake is done. It fails when its time is over: that of the peer's
/// certificate, or [`JOINING_TIMEOUT`] for a peer without one.
pub(crate) type TlsConnection = Served<TlsStream<TcpStream>, Caller>;

/// Accepts TLS connections until the scope drains. Each handshake is a task of its own, so that a slow
/// client holds up nobody.
pub(crate) fn accept_tls(
    listener: TcpListener,
    config: Arc<rustls::ServerConfig>,
    clock: SharedClock,
    scope: &Scope,
) -> mpsc::Receiver<io::Result<TlsConnection>> {
    let (sender, receiver) = mpsc::channel(ACCEPT_QUEUE);
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let tasks = scope.clone();
    scope.spawn_critical("control accept loop", async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = tasks.draining() => return,
            };
            let (tcp, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    clock.sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&connections).try_acquire_owned() else {
                tracing::warn!(%address, "too many connections; refused");
                continue;
            };
            let Ok(permit) = Arc::clone(&handshakes).acquire_owned().await else { return };
            let (acceptor, sender, clock) = (acceptor.clone(), sender.clone(), Arc::clone(&clock));
            tasks.spawn("handshake with an agent", async move {
                let _permit = permit;
                tokio::select! {
                    outcome = handshake(acceptor, tcp, address, slot, &clock) => match outcome {
                        // A closed queue means that the server is stopping.
                        Ok(connection) => { let _stopping = sender.send(Ok(connection)).await.is_err(); }
                        Err(error) => tracing::info!(%address, %error, "handshake refused"),
                    },
                    () = clock.sleep(HANDSHAKE_TIMEOUT) => tracing::info!(%address, "handshake too slow"),
                }
            });
        }
    });
    receiver
}

async fn handshake(
    acceptor: tokio_rustls::TlsAcceptor,
    tcp: TcpStream,
    address: SocketAddr,
    slot: OwnedSemaphorePermit,
    clock: &SharedClock,
) -> io::Result<TlsConnection> {
    tcp.set_nodelay(true)?;
    let stream = acceptor.accept(tcp).await?;
    let peer = match Peer::from_handshake(stream.get_ref().1.peer_certificates()) {
        None => None,
        Some(Ok(peer)) => Some(peer),
        Some(Err(error)) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
    };
    let life = peer.as_ref().map_or(JOINING_TIMEOUT, |peer| peer.not_after().saturating_sub(clock.now()));
    Ok(Served::new(stream, Caller { peer, address }, slot).until(clock.sleep(life)))
}

/// A channel to control that presents the node's identity of the moment and accepts only `expected`.
/// It connects at the first call and again after a loss.
pub(crate) fn mutual_channel(
    address: SocketAddr,
    source: &IdentitySource,
    expected: SpiffeId,
    clock: &SharedClock,
) -> Result<Channel, rustls::Error> {
    Ok(channel(address, tls::client_config(source, expected, &[tls::ALPN_H2], clock)?))
}

/// A channel for a node that has no identity yet: it accepts only `expected`, by the bundle that came
/// with the join token, and presents nothing.
pub(crate) fn joining_channel(
    address: SocketAddr,
    bundles: BundleSet,
    expected: SpiffeId,
    clock: &SharedClock,
) -> Result<Channel, rustls::Error> {
    Ok(channel(address, tls::joining_client_config(bundles, expected, &[tls::ALPN_H2], clock)?))
}

fn channel(address: SocketAddr, config: Arc<rustls::ClientConfig>) -> Channel {
    let connector = tokio_rustls::TlsConnector::from(config);
    // The URI is required by the API and never used: the connector below decides.
    Endpoint::from_static("http://control.invalid")
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .keep_alive_while_idle(true)
        .connect_with_connector_lazy(tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                connector.connect(tls::unnamed_server(), tcp).await.map(TokioIo::new)
            }
        }))
}
