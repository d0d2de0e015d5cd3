//! gRPC over our own TLS: what tonic needs to be handed, on both ends.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};

use identity::clock::{SharedClock, TlsTime};
use identity::verify::verify_chain;
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
pub(crate) struct TlsConnection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    over: BoxFuture<'static, ()>,
    _slot: OwnedSemaphorePermit,
}

impl Connected for TlsConnection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.over.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

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
    Ok(TlsConnection { stream, caller: Caller { peer, address }, over: clock.sleep(life), _slot: slot })
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
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Arc::new(PinnedServer { bundles, expected });
    let mut config =
        rustls::ClientConfig::builder_with_details(provider, Arc::new(TlsTime(Arc::clone(clock))))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
    config.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(channel(address, Arc::new(config)))
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

/// Verifies control by a bundle that we hold before we have an identity.
#[derive(Debug)]
struct PinnedServer {
    bundles: BundleSet,
    expected: SpiffeId,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let refuse = |error: String| {
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(Arc::new(
                io::Error::other(error),
            ))))
        };
        let leaf = verify_chain(end_entity, intermediates, &self.bundles, now)
            .map_err(|error| refuse(error.to_string()))?;
        if leaf.id != self.expected {
            return Err(refuse(format!("expected {}, the peer is {}", self.expected, leaf.id)));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOfferedOrEnabled))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use identity::TrustDomain;

    use super::*;
    use crate::authority::{Authority, DEFAULT_ROOT_TTL, LeafRequest};
    use crate::csr::PendingKey;
    use crate::random::SystemRandom;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn authority() -> Authority {
        let domain = TrustDomain::new("bank.example").unwrap();
        Authority::generate(domain, DEFAULT_ROOT_TTL, &*SystemRandom::shared(), NOW).unwrap()
    }

    fn certificate(authority: &Authority, id: &str) -> CertificateDer<'static> {
        let (public_key, id) =
            (PendingKey::generate().unwrap().public().unwrap(), SpiffeId::new(id).unwrap());
        let ttl = Duration::from_secs(60);
        let request = LeafRequest { public_key: &public_key, id: &id, dns: &[], ips: &[], ttl };
        authority.issue(&request, &*SystemRandom::shared(), NOW).unwrap().certificate
    }

    #[test]
    fn a_joining_node_trusts_control_by_the_pinned_bundle_only() {
        let (ours, theirs) = (authority(), authority());
        let control = "spiffe://bank.example/palisade/control";
        let pinned = PinnedServer {
            bundles: BundleSet::new([ours.bundle().clone()]),
            expected: SpiffeId::new(control).unwrap(),
        };
        let at = UnixTime::since_unix_epoch(NOW);
        let judge = |certificate: CertificateDer<'static>| {
            pinned.verify_server_cert(&certificate, &[], &tls::unnamed_server(), &[], at).map(|_| ())
        };
        assert!(judge(certificate(&ours, control)).is_ok());
        assert!(judge(certificate(&theirs, control)).is_err(), "another root");
        let workload = certificate(&ours, "spiffe://bank.example/service/web");
        assert!(judge(workload).is_err(), "a workload that listens where control should");
    }
}
