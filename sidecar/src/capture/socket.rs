//! Sockets as the listeners need them, by the options that only the kernel has names for.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Connections that wait to be accepted: a burst of a busy app's, no more, so that what cannot be served is
/// refused by the kernel early.
const BACKLOG: u32 = 1024;

/// A listener on the loopback address of each family that this host has.
#[derive(Debug)]
pub(super) struct Pair {
    v4: TcpListener,
    v6: Option<TcpListener>,
}

impl Pair {
    /// Binds `port` on 127.0.0.1 and, where there is IPv6, on ::1. Port 0 takes a free one for both.
    pub(super) fn bind(port: u16, transparent: bool) -> io::Result<Self> {
        let v4 = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), transparent)?;
        let port = v4.local_addr()?.port();
        let v6 = match listen(SocketAddr::from((Ipv6Addr::LOCALHOST, port)), transparent) {
            Ok(v6) => Some(v6),
            Err(error) if has_no_ipv6(&error) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { v4, v6 })
    }

    /// Takes over sockets that are listening already.
    pub(super) fn adopt(v4: StdListener, v6: Option<StdListener>) -> io::Result<Self> {
        let adopt = |listener: StdListener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        Ok(Self { v4: adopt(v4)?, v6: v6.map(adopt).transpose()? })
    }

    /// The sockets themselves, IPv4 first, to be handed over.
    pub(super) fn listeners(&self) -> impl Iterator<Item = &TcpListener> {
        std::iter::once(&self.v4).chain(self.v6.as_ref())
    }

    pub(super) fn port(&self) -> io::Result<u16> {
        Ok(self.v4.local_addr()?.port())
    }

    /// The next connection of either family, both served in turn.
    pub(super) async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let Some(v6) = &self.v6 else { return self.v4.accept().await };
        tokio::select! {
            accepted = self.v4.accept() => accepted,
            accepted = v6.accept() => accepted,
        }
    }
}

fn listen(address: SocketAddr, transparent: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }?;
    // Connections of the process before may linger: that must not keep this one from starting.
    socket.set_reuseaddr(true)?;
    if transparent {
        set_transparent(&socket)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Sets IP_TRANSPARENT, which is one flag for both families whatever family sets it.
fn set_transparent(socket: &TcpSocket) -> io::Result<()> {
    setsockopt(socket, sockopt::IpTransparent, &true).map_err(|error| match error {
        nix::Error::EPERM => io::Error::new(
            io::ErrorKind::PermissionDenied,
            "a transparent listener (IP_TRANSPARENT) needs CAP_NET_ADMIN or CAP_NET_RAW in this network namespace",
        ),
        error => error.into(),
    })
}

/// Whether the host runs without IPv6, which is a way to run a host and no failure.
fn has_no_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}
