//! The side that answers.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::{Request, Response};
use identity::Scope;
use identity::clock::SharedClock;
use tokio::io::{AsyncRead, AsyncWrite};

use super::driver::{ConnectionError, Driver};
use super::exchange::{Role, Sending, Shared, Worker};
use crate::Body;

/// Serves one connection until it ends. When `leaving` completes, the peer is asked to open no more
/// exchanges, and those that are open may run on for as long as it says.
pub(crate) async fn serve<S, F>(
    stream: S,
    clock: &SharedClock,
    scope: &Scope,
    leaving: impl Future<Output = Option<Duration>>,
    answer: impl Fn(Request<Body>) -> F + Clone + Send + Unpin + 'static,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let shared = Shared::new(Role::Server);
    let (tasks, requests) = (scope.clone(), Arc::clone(&shared));
    let hire = move |worker| tasks.spawn("requests", work(Arc::clone(&requests), worker, answer.clone()));
    let driver = Driver::new(stream, Arc::clone(&shared), Role::Server, clock.clone(), hire);
    let (mut driver, leaving) = (pin!(driver), pin!(leaving));
    let bound = tokio::select! {
        ended = driver.as_mut() => return ended,
        bound = leaving => bound,
    };
    shared.go_away();
    tokio::select! {
        ended = driver => ended,
        () = clock.sleep(bound.unwrap_or(Duration::MAX)) => Err(ConnectionError::TooLong),
    }
}

/// Answers one request after the other.
async fn work<F>(shared: Arc<Shared>, mut worker: Worker, answer: impl Fn(Request<Body>) -> F)
where
    F: Future<Output = Response<Body>>,
{
    while let Some((request, mut sending)) = shared.next_request(&mut worker).await {
        let Some(response) = unless_abandoned(&sending, pin!(answer(request))).await else { continue };
        let (head, body) = response.into_parts();
        match sending.response(&head, &body) {
            Ok(true) => {}
            Ok(false) => sending.body(body).await,
            // Dropping `sending` resets the exchange: the caller hears that it failed.
            Err(error) => tracing::info!(%error, "an answer could not be sent"),
        }
    }
}

/// Stops working on what nobody waits for any more.
///
/// The work stays where it is: an async function holds room twice for what it is given by value.
async fn unless_abandoned<T>(sending: &Sending, mut work: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    std::future::poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => sending.poll_abandoned(cx).map(|()| None),
    })
    .await
}
