//! A request's body that has not arrived whole: it takes the reading half with it, and gives it back.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::StatusCode;
use http_body::{Frame, SizeHint};
use tokio::io::AsyncRead;

use super::decode::BodyError;
use super::reader::{Incoming, Pacing, Reader};

/// What the connection and the body that borrows its reading half know of each other.
#[derive(Debug)]
pub(super) struct Loan<R>(Mutex<State<R>>);

#[derive(Debug)]
struct State<R> {
    returned: Option<Returned<R>>,
    server: Option<Waker>,
    body: Option<Waker>,
    /// The body has been asked for, so the client may be told to send it.
    wanted: bool,
    answering: bool,
    switch: Switch,
    gone: bool,
}

/// Bytes after a request for an upgrade belong to the other protocol, if there is one: nobody sees them
/// before the answer says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    NotAsked,
    Asked,
    Made,
}

/// The reading half, back home.
#[derive(Debug)]
pub(super) struct Returned<R> {
    pub(super) reader: Reader<R>,
    pub(super) end: BodyEnd,
}

/// How far the body had been read.
#[derive(Debug)]
pub(super) enum BodyEnd {
    /// To its end: what follows is the next request.
    Complete,
    /// Not to its end.
    Unread,
    /// As far as it could be; the status that says why, if there is still somebody to hear it.
    Failed(Option<StatusCode>),
}

impl<R: AsyncRead + Unpin> Loan<R> {
    /// Lends `reader` to the body that it makes.
    pub(super) fn lend(reader: Reader<R>, incoming: Incoming, upgrade: bool) -> (Arc<Self>, LentBody<R>) {
        let switch = if upgrade { Switch::Asked } else { Switch::NotAsked };
        let state = State {
            returned: None,
            server: None,
            body: None,
            wanted: false,
            answering: false,
            switch,
            gone: false,
        };
        let loan = Arc::new(Self(Mutex::new(state)));
        let body = LentBody { reader: Some(reader), incoming, loan: Arc::clone(&loan) };
        (loan, body)
    }

    /// Ready once somebody has asked for the body.
    pub(super) fn poll_wanted(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.wanted {
            return Poll::Ready(());
        }
        state.server = Some(cx.waker().clone());
        Poll::Pending
    }

    /// The reading half, when the body is done with it.
    pub(super) fn poll_returned(&self, cx: &mut Context<'_>) -> Poll<Returned<R>> {
        let mut state = self.state();
        match state.returned.take() {
            Some(returned) => Poll::Ready(returned),
            None => {
                state.server = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// The reading half, if the body is done with it.
    pub(super) fn returned(&self) -> Option<Returned<R>> {
        self.state().returned.take()
    }

    /// The answer has begun: from here on the two may be streams that wait for each other.
    pub(super) fn answering(&self) {
        self.state().answering = true;
    }

    /// The answer is the switch: the body is what the other protocol's peer sends.
    pub(super) fn switched(&self) {
        let mut state = self.state();
        state.switch = Switch::Made;
        wake(state.body.take(), state);
    }

    /// There is no connection any more.
    pub(super) fn gone(&self) {
        let mut state = self.state();
        state.gone = true;
        wake(state.body.take(), state);
    }

    fn give_back(&self, returned: Returned<R>) {
        let mut state = self.state();
        state.returned = Some(returned);
        wake(state.server.take(), state);
    }

    fn state(&self) -> MutexGuard<'_, State<R>> {
        // Nothing that runs under the lock can panic; if it did, the state would still be whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes after the lock has been let go.
fn wake<R>(waker: Option<Waker>, state: MutexGuard<'_, State<R>>) {
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// A request's body that reads from its connection.
#[derive(Debug)]
pub(super) struct LentBody<R: AsyncRead + Unpin> {
    reader: Option<Reader<R>>,
    incoming: Incoming,
    loan: Arc<Loan<R>>,
}

impl<R: AsyncRead + Unpin> LentBody<R> {
    /// What stands in the way of reading, and else how patient to be.
    fn poll_may_read(&self, cx: &mut Context<'_>) -> Poll<Result<Pacing, BodyError>> {
        let mut state = self.loan.state();
        if state.gone {
            return Poll::Ready(Err(BodyError::Gone));
        }
        if !state.wanted {
            state.wanted = true;
            if let Some(server) = state.server.take() {
                server.wake();
            }
        }
        // Woken by the connection when it ends or switches, by the reading half otherwise.
        if !state.body.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.body = Some(cx.waker().clone());
        }
        match state.switch {
            Switch::Asked => Poll::Pending,
            Switch::Made => Poll::Ready(Ok(Pacing::Never)),
            Switch::NotAsked if state.answering => Poll::Ready(Ok(Pacing::Owed)),
            Switch::NotAsked => Poll::Ready(Ok(Pacing::Always)),
        }
    }

    fn give_back(&mut self, end: BodyEnd) {
        if let Some(reader) = self.reader.take() {
            self.loan.give_back(Returned { reader, end });
        }
    }
}

impl<R: AsyncRead + Unpin> http_body::Body for LentBody<R> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let pacing = match std::task::ready!(this.poll_may_read(cx)) {
            Ok(pacing) => pacing,
            Err(error) => return Poll::Ready(Some(Err(error))),
        };
        let Some(reader) = &mut this.reader else { return Poll::Ready(None) };
        let polled = std::task::ready!(this.incoming.poll_frame(reader, pacing, cx));
        match polled {
            Some(Err(error)) => {
                this.give_back(BodyEnd::Failed(error.status()));
                Poll::Ready(Some(Err(error)))
            }
            frame => {
                if this.incoming.is_done() {
                    this.give_back(BodyEnd::Complete);
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.reader.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match self.incoming.left() {
            Some(left) => SizeHint::with_exact(left),
            None => SizeHint::default(),
        }
    }
}

impl<R: AsyncRead + Unpin> Drop for LentBody<R> {
    fn drop(&mut self) {
        let end = if self.incoming.is_done() { BodyEnd::Complete } else { BodyEnd::Unread };
        self.give_back(end);
    }
}
