//! Who may ask: this machine by a Unix socket or loopback, or named workloads by mTLS.
//!
//! Whoever asks says who the client is, so a door that strangers could open would let them try out every
//! identity and use up users' tokens.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use identity::clock::SharedClock;
use identity::served::Served;
use identity::socket::{self, SocketError};
use identity::tls::{self, ALPN_H2, ClientAuth};
use identity::{IdentitySource, Peer, Scope, SpiffeId};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use crate::accept::{Accept, Slot};
use crate::metrics::Metrics;
use crate::server::Limits;

/// Connections at once: an Envoy opens one a worker thread.
const MAX_CONNECTIONS: usize = 256;
/// Connections that wait for tonic to take them.
const ACCEPT_QUEUE: usize = 16;
/// Longest TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The socket's owner and group may ask: put Envoy's user into the group.
const SOCKET_MODE: u32 = 0o660;

/// Where the server listens, and who may ask there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Door {
    place: Place,
    /// Empty where the place itself bounds who may ask.
    callers: Vec<SpiffeId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// Why a door cannot be had.
#[derive(Debug, Error)]
pub enum DoorError {
    /// Neither form.
    #[error("`{0}` is neither unix:/PATH nor ADDRESS:PORT")]
    Form(String),
    /// An address that other machines reach, and nobody named.
    #[error("{0} can be reached from other machines: name the SPIFFE IDs that may ask, or use loopback")]
    Open(SocketAddr),
    /// Callers by mTLS named for a Unix socket.
    #[error("callers are named for TCP only: on a Unix socket its permissions say who may ask")]
    UnixCallers,
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The port.
    #[error("cannot listen on {0}")]
    Port(SocketAddr, #[source] io::Error),
}

impl Door {
    /// Parses `unix:/PATH` or `ADDRESS:PORT`. With `callers`, every connection is mTLS and from one of
    /// them; without, the address must be loopback.
    ///
    /// # Errors
    /// Another form, an address open to others, or callers named where nothing proves them.
    pub fn new(listen: &str, callers: Vec<SpiffeId>) -> Result<Self, DoorError> {
        let place = match listen.strip_prefix("unix:") {
            Some(path) if Path::new(path).is_absolute() => Place::Unix(path.into()),
            Some(_) => return Err(DoorError::Form(listen.to_owned())),
            None => Place::Tcp(listen.parse().map_err(|_| DoorError::Form(listen.to_owned()))?),
        };
        match &place {
            Place::Unix(_) if !callers.is_empty() => Err(DoorError::UnixCallers),
            Place::Tcp(address) if callers.is_empty() && !address.ip().is_loopback() => {
                Err(DoorError::Open(*address))
            }
            _ => Ok(Self { place, callers }),
        }
    }

    /// Takes the address. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// It is taken, or the system refuses.
    pub fn bind(self) -> Result<BoundDoor, DoorError> {
        let listener = match self.place {
            Place::Unix(path) => Listener::Unix(socket::bind(&path, SOCKET_MODE)?, path),
            Place::Tcp(address) => {
                let bind = || {
                    let listener = std::net::TcpListener::bind(address)?;
                    listener.set_nonblocking(true)?;
                    TcpListener::from_std(listener)
                };
                Listener::Tcp(bind().map_err(|error| DoorError::Port(address, error))?)
            }
        };
        Ok(BoundDoor { listener, callers: self.callers })
    }
}

/// A [`Door`] whose address is taken.
#[derive(Debug)]
pub struct BoundDoor {
    listener: Listener,
    callers: Vec<SpiffeId>,
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl BoundDoor {
    /// The TCP address; `None` for a Unix socket.
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.listener {
            Listener::Unix(..) => None,
            Listener::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    /// Accepts until the scope drains. What comes out has proved that it may ask.
    pub(super) fn accept(
        self,
        source: &IdentitySource,
        metrics: Arc<Metrics>,
        limits: &Limits,
        clock: SharedClock,
        scope: &Scope,
    ) -> Result<mpsc::Receiver<io::Result<Connection>>, rustls::Error> {
        let tls = if self.callers.is_empty() {
            None
        } else {
            Some(TlsAcceptor::from(tls::server_config(source, ClientAuth::Required, &[ALPN_H2], &clock)?))
        };
        let (sender, receiver) = mpsc::channel(ACCEPT_QUEUE);
        let admission = Arc::new(Admission { tls, callers: self.callers, clock, metrics });
        let (clock, scope) = (admission.clock.clone(), scope.clone());
        let limits = Limits { max_connections: MAX_CONNECTIONS, ..limits.clone() };
        let accepting = limits.accepting(&clock, &scope);
        scope.spawn_critical("ext_authz accept loop", async move {
            let serve = |stream, slot| Arc::clone(&admission).bring(stream, slot, sender.clone());
            accepting.serve_each("ext_authz connection", &self.listener, serve).await;
            if let Listener::Unix(_, path) = &self.listener {
                socket::remove(path);
            }
        });
        Ok(receiver)
    }
}

impl Accept for Listener {
    type Accepted = Box<dyn Stream>;

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Unix(listener, _) => Ok(Box::new(listener.accept().await?.0)),
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
        }
    }
}

/// Lets in whom the door is for.
struct Admission {
    tls: Option<TlsAcceptor>,
    callers: Vec<SpiffeId>,
    clock: SharedClock,
    metrics: Arc<Metrics>,
}

impl Admission {
    /// Gives one connection to the server, if it may ask.
    async fn bring(
        self: Arc<Self>,
        stream: Box<dyn Stream>,
        slot: Slot,
        server: mpsc::Sender<io::Result<Connection>>,
    ) {
        let admitted = tokio::select! {
            admitted = self.admit(stream, slot) => admitted,
            () = self.clock.sleep(HANDSHAKE_TIMEOUT) => Err(io::ErrorKind::TimedOut.into()),
        };
        match admitted {
            // A closed queue means that the server is stopping.
            Ok(connection) => {
                let _stopping = server.send(Ok(connection)).await.is_err();
            }
            Err(error) => tracing::info!(%error, "no connection to ext_authz"),
        }
    }

    async fn admit(&self, stream: Box<dyn Stream>, slot: Slot) -> io::Result<Connection> {
        let Some(tls) = &self.tls else {
            return Ok(Served::new(stream, (), slot));
        };
        let refused = |rule, error| {
            self.metrics.refused_connection(rule);
            error
        };
        let stream = tls.accept(stream).await.map_err(|error| refused("tls.handshake", error))?;
        let Some(Ok(peer)) = Peer::from_handshake(stream.get_ref().1.peer_certificates()) else {
            return Err(refused("tls.no_client_certificate", io::ErrorKind::InvalidData.into()));
        };
        if !self.callers.contains(peer.id()) {
            let error = io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("{} is not one of the callers of ext_authz", peer.id()),
            );
            return Err(refused("ext_authz.caller", error));
        }
        let over = self.clock.sleep(peer.not_after().saturating_sub(self.clock.now()));
        Ok(Served::new(Box::new(stream) as Box<dyn Stream>, (), slot).until(over))
    }
}

pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// A connection that may ask. It fails when the certificate it was let in by ends.
pub(super) type Connection = Served<Box<dyn Stream>, ()>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_door_is_on_this_machine_or_for_named_callers() {
        let envoy = || vec![SpiffeId::new("spiffe://bank.example/service/envoy").unwrap()];
        for good in ["unix:/run/palisade/authz.sock", "127.0.0.1:9191", "[::1]:9191"] {
            assert!(Door::new(good, Vec::new()).is_ok(), "{good}");
        }
        assert!(Door::new("10.0.0.5:9191", envoy()).is_ok());
        assert!(Door::new("127.0.0.1:9191", envoy()).is_ok());
        for open in ["10.0.0.5:9191", "0.0.0.0:9191", "[::]:9191", "[::ffff:10.0.0.5]:9191"] {
            assert!(matches!(Door::new(open, Vec::new()), Err(DoorError::Open(_))), "{open}");
        }
        for other in ["", "unix:authz.sock", "unix:", "localhost:9191", "127.0.0.1", "tcp://127.0.0.1:1"] {
            assert!(matches!(Door::new(other, Vec::new()), Err(DoorError::Form(_))), "{other}");
        }
        assert!(matches!(Door::new("unix:/run/a.sock", envoy()), Err(DoorError::UnixCallers)));
    }
}
