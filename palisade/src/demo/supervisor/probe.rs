//! How a process is seen to be ready.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::Request;
use hyper_util::rt::TokioIo;
use identity::clock::SharedClock;
use tokio::net::{TcpStream, UnixStream};

/// How often a process is asked: often enough that asking is no part of the wait.
const ASK_EVERY: Duration = Duration::from_millis(25);
/// Longest that one answer is waited for.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// The sign by which a process is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Probe {
    /// `GET http://address/path` is answered with 2xx.
    Http { address: SocketAddr, path: String },
    /// The address accepts connections.
    Tcp(SocketAddr),
    /// The socket accepts connections.
    Unix(PathBuf),
    /// It runs: for commands that answer nothing.
    #[cfg(test)]
    Started,
}

impl Probe {
    /// Completes when the process is ready.
    pub(super) async fn until_ready(&self, clock: &SharedClock) {
        loop {
            if let Ok(true) = tokio::time::timeout(ANSWER_WITHIN, self.ask()).await {
                return;
            }
            clock.sleep(ASK_EVERY).await;
        }
    }

    /// What has not happened, for a message.
    pub(super) fn unmet(&self) -> String {
        match self {
            Self::Http { address, path } => format!("http://{address}{path} does not answer with success"),
            Self::Tcp(address) => format!("nothing accepts connections at {address}"),
            Self::Unix(path) => format!("nothing accepts connections at {}", path.display()),
            #[cfg(test)]
            Self::Started => "it does not run".to_owned(),
        }
    }

    async fn ask(&self) -> bool {
        match self {
            Self::Http { address, path } => {
                get(*address, path).await.is_some_and(|status| status.is_success())
            }
            Self::Tcp(address) => TcpStream::connect(address).await.is_ok(),
            Self::Unix(path) => UnixStream::connect(path).await.is_ok(),
            #[cfg(test)]
            Self::Started => true,
        }
    }
}

async fn get(address: SocketAddr, path: &str) -> Option<hyper::StatusCode> {
    let stream = TcpStream::connect(address).await.ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    let request = Request::get(path).header("host", address.to_string()).body(Empty::<Bytes>::new()).ok()?;
    // The connection does its work only while it is polled; it ends with the answer.
    let answer = async {
        let answer = sender.send_request(request).await.ok()?;
        Some(answer.status())
    };
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        _ = connection => answer.await,
    }
}
