//! TCP connections that are opened here.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::app::CONNECT_TIMEOUT;

/// Congestion control where there is none to control. A host's default may pace what it sends by timers, as BBR
/// does, which costs a fifth of the throughput of a connection within the machine.
const WITHIN_THE_MACHINE: &[u8] = b"reno";

/// Connects to `address`.
///
/// # Errors
/// As the kernel's connect.
pub(crate) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }?;
    if address.ip().is_loopback() {
        unpaced(&socket);
    }
    socket.connect(address).await
}

/// Takes the pacing of loopback connections off a socket that connects, or listens, there.
pub fn unpaced<'a, S>(socket: &'a S)
where
    socket2::SockRef<'a>: From<&'a S>,
{
    // Every kernel has it; if not, things work as they would have without.
    if let Err(error) = socket2::SockRef::from(socket).set_tcp_congestion(WITHIN_THE_MACHINE) {
        tracing::debug!(%error, "no TCP_CONGESTION");
    }
}

/// Connects hyper's client to one address, whatever its requests say.
#[derive(Debug, Clone)]
pub(crate) struct Dial(pub(crate) SocketAddr);

impl tower::Service<Uri> for Dial {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let address = self.0;
        Box::pin(async move {
            let stream = match timeout(CONNECT_TIMEOUT, connect(address)).await {
                Ok(stream) => stream?,
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            };
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(stream))
        })
    }
}
