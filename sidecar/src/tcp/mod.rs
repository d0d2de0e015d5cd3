//! Plain TCP through the mesh: whose connection it is and where it may go is decided, its bytes are not read.
//!
//! | module | what it holds |
//! |---|---|
//! | [`inbound`] | the server's side: who, where to, may they, dial the app, copy. Start reading here. |
//! | [`outbound`] | one loopback listener a called service; each connection becomes a session |
//! | [`pool`] | TLS connections that are ready: handshaken ahead of need, and used again after a session |
//! | [`frame`] | `palisade-tcp/1`: sessions on a TLS connection |
//! | [`copy`] | bytes both ways: half-close, idle and stalled ends |
//! | [`stream`] | a TCP stream whose buffer exists only while bytes are in it |
//! | [`stats`] | counters for `/metrics` |

pub mod copy;
pub mod frame;
pub mod inbound;
pub mod outbound;
pub mod pool;
pub mod stats;
pub mod stream;

use tokio::io::{AsyncRead, AsyncWrite};

pub use copy::{CopyError, Side, both_ways};
pub use frame::ALPN_TCP;
pub use inbound::{Ports, TcpInbound};
pub use outbound::{TcpOutbound, TcpUpstream};
pub use stats::TcpStats;
pub use stream::Stream;

/// What lies under TLS.
pub trait Wire: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Nothing has moved for a while: give memory back.
    fn pause(&mut self) {}
}

impl Wire for Stream {
    fn pause(&mut self) {
        Side::pause(self);
    }
}

impl Wire for crate::Buffered {}

impl Wire for tokio::net::TcpStream {}

/// TLS needs nothing to be cut short visibly: without a close_notify its peer sees an error.
macro_rules! tls_side {
    ($type:ty) => {
        impl<IO: Wire> Side for $type {
            fn pause(&mut self) {
                self.get_mut().0.pause();
            }

            fn abort(&mut self) {}
        }
    };
}

tls_side!(tokio_rustls::server::TlsStream<IO>);
tls_side!(tokio_rustls::client::TlsStream<IO>);
tls_side!(tokio_rustls::TlsStream<IO>);
