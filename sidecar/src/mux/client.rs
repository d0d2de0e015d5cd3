//! The side that asks.

use std::sync::Arc;

use http::{Response, request};
use identity::Scope;
use identity::clock::SharedClock;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};

use super::driver::Driver;
use super::exchange::{Ended, Role, Shared};
use super::frame::{Reset, TooLarge};
use crate::Body;

/// One connection on which requests may be sent.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    shared: Arc<Shared>,
    scope: Scope,
}

/// Why a request got no response.
#[derive(Debug, Error)]
pub(crate) enum SendError {
    /// The connection took no more requests; nothing of this one left, and here is its body.
    #[error("the connection takes no more requests")]
    NotSent(Body),
    /// The peer says that it did nothing with it.
    #[error("the peer did not take the request")]
    Refused,
    /// The request's head is over the limits.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// It left, and no response came.
    #[error(transparent)]
    Ended(Ended),
}

/// Begins to speak on a connection whose handshake chose [`super::ALPN`]. Its I/O is a task of `scope`, which
/// ends in order when the last handle has said [`Handle::go_away`].
pub(crate) fn connect<S>(stream: S, service: Arc<str>, clock: SharedClock, scope: &Scope) -> Handle
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let shared = Shared::new(Role::Client);
    // A client has nobody to give a request to; `received` refuses them.
    let driver = Driver::new(stream, Arc::clone(&shared), Role::Client, clock, drop);
    scope.spawn("upstream connection", async move {
        if let Err(error) = driver.await {
            tracing::debug!(%service, %error, "upstream connection ended");
        }
    });
    Handle { shared, scope: scope.clone() }
}

impl Handle {
    /// How many requests are under way, or `None` if the connection takes no more.
    pub(crate) fn load(&self) -> Option<usize> {
        self.shared.load()
    }

    /// Lets what is under way end, and then the connection.
    pub(crate) fn go_away(&self) {
        self.shared.go_away();
    }

    /// Sends a request and waits for the head of its response, whose body then streams.
    pub(crate) async fn send(&self, head: &request::Parts, body: Body) -> Result<Response<Body>, SendError> {
        let Some((exchange, unsent)) = self.shared.request(head, &body)? else {
            return Err(SendError::NotSent(body));
        };
        if let Some(sending) = unsent {
            self.scope.spawn("request body", async move { sending.body(body).await });
        }
        exchange.response().await.map_err(|ended| match ended {
            Ended::Reset(Reset::Refused) => SendError::Refused,
            ended => SendError::Ended(ended),
        })
    }
}
