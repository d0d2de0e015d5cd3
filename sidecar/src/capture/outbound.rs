//! What the app dials: REDIRECT brings it to loopback, the kernel remembers whom it was meant for.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};

use rustix::io::Errno;
use rustix::net::sockopt::{ip_original_dst, ipv6_original_dst};
use tokio::net::{TcpListener, TcpStream};

use super::socket::Pair;
use super::{AcceptError, Captured, Refused, canonical};

/// Takes the connections that the app meant for others.
///
/// On loopback only: nothing outside this network namespace reaches it.
#[derive(Debug)]
pub struct OutboundListener(Pair);

impl OutboundListener {
    /// Listens on `port` of 127.0.0.1 and, where there is IPv6, of ::1. Needs a tokio runtime.
    pub fn bind(port: u16) -> io::Result<Self> {
        Pair::bind(port, false).map(Self)
    }

    /// Takes over listening sockets: of a process before this one, or of a service manager.
    pub fn adopt(v4: StdListener, v6: Option<StdListener>) -> io::Result<Self> {
        Pair::adopt(v4, v6).map(Self)
    }

    /// The sockets themselves, IPv4 first, to be handed over.
    pub fn listeners(&self) -> impl Iterator<Item = &TcpListener> {
        self.0.listeners()
    }

    /// The port, for the rules.
    pub fn port(&self) -> io::Result<u16> {
        self.0.port()
    }

    /// The next connection. Cancel-safe; after [`AcceptError::Refused`] accept again at once.
    pub async fn accept(&self) -> Result<Captured, AcceptError> {
        let (stream, source) = self.0.accept().await.map_err(AcceptError::Accept)?;
        match meant_for(&stream) {
            Ok(destination) => Ok(Captured { stream, source: canonical(source), destination }),
            Err(refused) => Err(AcceptError::Refused { source_address: source, refused }),
        }
    }
}

/// Whom a redirected connection was meant for (SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST).
fn meant_for(stream: &TcpStream) -> Result<SocketAddr, Refused> {
    let here = stream.local_addr().map_err(Refused::Unknown)?;
    let meant = match here {
        SocketAddr::V4(_) => ip_original_dst(stream).map(SocketAddr::from),
        SocketAddr::V6(_) => ipv6_original_dst(stream).map(SocketAddr::from),
    };
    let meant = match meant {
        Ok(meant) => meant,
        // Nothing has an entry for the connection, or has ever tracked one: nothing redirected it.
        Err(Errno::NOENT | Errno::NOPROTOOPT) => return Err(Refused::Direct(here)),
        Err(error) => return Err(Refused::Unknown(error.into())),
    };
    // Where something tracks connections, one that was not redirected says that it was meant for us.
    if canonical(meant) == canonical(here) { Err(Refused::Direct(here)) } else { Ok(canonical(meant)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_nobody_redirected_is_refused_by_name() {
        let listener = OutboundListener::bind(0).unwrap();
        let port = listener.port().unwrap();
        for listening in listener.listeners().map(|listening| listening.local_addr().unwrap()) {
            assert!(listening.ip().is_loopback() && listening.port() == port, "{listening}");
            let _client = TcpStream::connect(listening).await.unwrap();
            let Err(AcceptError::Refused { refused, .. }) = listener.accept().await else {
                panic!("a direct connection was taken for a captured one")
            };
            assert_eq!(refused.rule(), "capture.direct");
        }
    }
}
