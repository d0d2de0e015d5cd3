//! What strangers dial: TPROXY brings it to a transparent listener with both addresses as they were.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};

use tokio::net::{TcpListener, TcpStream};

use super::socket::Pair;
use super::{AcceptError, Captured, Refused, canonical};

/// Takes the connections that strangers meant for the app.
///
/// It listens on loopback, where no stranger reaches it but by the rules. What it accepts has the address
/// that was dialled as its local one, and answers from there.
#[derive(Debug)]
pub struct InboundListener {
    pair: Pair,
    port: u16,
}

impl InboundListener {
    /// Listens transparently on `port` of 127.0.0.1 and, where there is IPv6, of ::1. Needs a tokio runtime
    /// and CAP_NET_ADMIN or CAP_NET_RAW.
    pub fn bind(port: u16) -> io::Result<Self> {
        let pair = Pair::bind(port, true)?;
        Ok(Self { port: pair.port()?, pair })
    }

    /// Takes over listening sockets, which stay transparent: it needs no capability.
    pub fn adopt(v4: StdListener, v6: Option<StdListener>) -> io::Result<Self> {
        let pair = Pair::adopt(v4, v6)?;
        Ok(Self { port: pair.port()?, pair })
    }

    /// The sockets themselves, IPv4 first, to be handed over.
    pub fn listeners(&self) -> impl Iterator<Item = &TcpListener> {
        self.pair.listeners()
    }

    /// The port, for the rules.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The next connection. Cancel-safe; after [`AcceptError::Refused`] accept again at once.
    pub async fn accept(&self) -> Result<Captured, AcceptError> {
        let (stream, source) = self.pair.accept().await.map_err(AcceptError::Accept)?;
        match self.meant_for(&stream) {
            Ok(destination) => Ok(Captured { stream, source: canonical(source), destination }),
            Err(refused) => Err(AcceptError::Refused { source_address: source, refused }),
        }
    }

    fn meant_for(&self, stream: &TcpStream) -> Result<SocketAddr, Refused> {
        let meant = canonical(stream.local_addr().map_err(Refused::Unknown)?);
        match (meant.port() == self.port, meant.ip().is_loopback()) {
            (true, true) => Err(Refused::Direct(meant)),
            // Whatever address it was: handing it on by its destination would bring it back here.
            (true, false) => Err(Refused::Loop(meant)),
            (false, _) => Ok(meant),
        }
    }
}
