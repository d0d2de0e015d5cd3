//! The exchanges of one connection, shared by the task that does its I/O and everybody who has one open.
//!
//! All state is behind one lock, held for a few instructions at a time and never across a wait.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, request, response};
use http_body::{Body as _, Frame as BodyFrame};

use super::frame::{self, Kind, Malformed, Reset, TooLarge};
use super::{
    EXTRA_WINDOW_BYTES, INITIAL_WINDOW_BYTES, MAX_DATA_BYTES, MAX_EXCHANGES, MAX_IDLE_WORKERS,
    MAX_WAITING_BYTES, MAX_WINDOW_BYTES,
};
use crate::{Body, BoxError};

/// Why an exchange ended before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Ended {
    /// The peer cut it short.
    #[error("{0}")]
    Reset(#[from] Reset),
    /// The connection is gone.
    #[error("the connection ended")]
    Connection,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Server,
}

/// The shared half of a connection.
#[derive(Debug)]
pub(super) struct Shared {
    role: Role,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    /// Frames that wait for the socket.
    pub(super) out: BytesMut,
    exchanges: HashMap<u32, Exchange, BuildHasherDefault<IdHasher>>,
    /// The last number that a request came or went with.
    last: u32,
    /// What windows may still grow by.
    spare_window_bytes: u32,
    /// The connection's own task, woken when there is something to write.
    driver: Option<Waker>,
    /// Those who wait for room in `out`.
    blocked: Vec<Waker>,
    pub(super) we_go_away: bool,
    pub(super) peer_goes_away: bool,
    pub(super) pong_due: bool,
    closed: bool,
    requests: Requests,
}

/// Server: requests that nobody works on yet, and workers that have nothing to do.
///
/// A task of its own for each request would be allocated and freed with it, and its future, which is large, written
/// anew; workers stay and take the next.
#[derive(Debug, Default)]
struct Requests {
    waiting: VecDeque<u32>,
    /// The last to wait is the first to be woken: its memory is still in the processor's cache.
    idle: Vec<(u32, Waker)>,
    workers: u32,
    /// How often those that were idle were let go.
    dismissals: u32,
}

impl Requests {
    /// Notes a request and wakes a worker for it. `Some` is a worker that has yet to be set to work, for want of an
    /// idle one.
    fn push(&mut self, exchange: u32) -> Option<Worker> {
        self.waiting.push_back(exchange);
        if let Some((_, idle)) = self.idle.pop() {
            idle.wake();
            return None;
        }
        self.workers = self.workers.wrapping_add(1);
        Some(Worker { number: self.workers, listed_at: None })
    }

    /// Takes a worker off the list of those that wait, if it is still there: it may have been woken for something else.
    fn unlist(&mut self, worker: u32) {
        if let Some(place) = self.idle.iter().rposition(|(number, _)| *number == worker) {
            self.idle.remove(place);
        }
    }

    fn dismiss_idle(&mut self) {
        self.dismissals = self.dismissals.wrapping_add(1);
        self.idle.drain(..).for_each(|(_, idle)| idle.wake());
    }
}

/// Whoever answers requests of one connection, one after the other.
#[derive(Debug)]
pub(super) struct Worker {
    number: u32,
    /// Since when it waits, in [`Requests::dismissals`].
    listed_at: Option<u32>,
}

#[derive(Debug)]
struct Exchange {
    head: Head,
    received: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
    /// The peer's half has ended: nothing more can arrive.
    ended: bool,
    /// The peer cut it short.
    reset: Option<Reset>,
    /// Nobody will take what still arrives: all was taken, or the reader lost interest.
    unread: bool,
    window: Window,
    /// What we may still send.
    credit: u32,
    /// Our half has ended.
    sent: bool,
    /// Whoever takes what is received.
    reader: Option<Waker>,
    /// Whoever sends, waiting for credit.
    writer: Option<Waker>,
    /// The handler of a request, told when the peer gives up.
    handler: Option<Waker>,
}

#[derive(Debug)]
enum Head {
    /// On a server: what was asked. On a client: what was answered.
    Request(Box<request::Parts>),
    Response(Box<response::Parts>),
    Awaited {
        upgrade: bool,
    },
    Taken,
}

#[derive(Debug)]
struct Window {
    /// What the peer may still send.
    left: u32,
    /// What was taken since the peer was last told.
    untold: u32,
    size: u32,
}

impl Exchange {
    fn new(head: Head, ended: bool, sent: bool) -> Self {
        Self {
            head,
            received: VecDeque::new(),
            trailers: None,
            ended,
            reset: None,
            unread: false,
            window: Window { left: INITIAL_WINDOW_BYTES, untold: 0, size: INITIAL_WINDOW_BYTES },
            credit: INITIAL_WINDOW_BYTES,
            sent,
            reader: None,
            writer: None,
            handler: None,
        }
    }

    /// The whole body, if it is all here.
    fn take_whole(&mut self) -> Option<Body> {
        if !self.ended || self.reset.is_some() || self.trailers.is_some() || self.received.len() > 1 {
            return None;
        }
        self.unread = true;
        Some(self.received.pop_front().map_or_else(Body::empty, Body::from))
    }

    fn wake_all(&mut self) {
        for waker in [&mut self.reader, &mut self.writer, &mut self.handler] {
            if let Some(waker) = waker.take() {
                waker.wake();
            }
        }
    }
}

impl Shared {
    pub(super) fn new(role: Role) -> Arc<Self> {
        let state = State {
            out: BytesMut::new(),
            exchanges: HashMap::default(),
            last: 0,
            spare_window_bytes: EXTRA_WINDOW_BYTES,
            driver: None,
            blocked: Vec::new(),
            we_go_away: false,
            peer_goes_away: false,
            pong_due: false,
            closed: false,
            requests: Requests::default(),
        };
        Arc::new(Self { role, state: Mutex::new(state) })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many exchanges are open, or `None` if no more may be opened.
    pub(super) fn load(&self) -> Option<usize> {
        let state = self.lock();
        state.takes_more().then_some(state.exchanges.len())
    }

    /// Says that we open or want no more.
    pub(super) fn go_away(&self) {
        let mut state = self.lock();
        if !state.we_go_away {
            state.we_go_away = true;
            frame::put_plain(&mut state.out, Kind::GoAway);
            state.wake_driver();
        }
    }

    /// Ends everything that is open.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for exchange in state.exchanges.values_mut() {
            exchange.wake_all();
        }
        state.blocked.drain(..).for_each(Waker::wake);
        state.requests.dismiss_idle();
    }

    /// Lets workers go that have nothing to do.
    pub(super) fn dismiss_idle(&self) {
        self.lock().requests.dismiss_idle();
    }

    /// Server: waits for the next request and the half that answers it. `None` when the worker is not needed any
    /// more.
    pub(super) async fn next_request(
        self: &Arc<Self>,
        worker: &mut Worker,
    ) -> Option<(http::Request<Body>, Sending)> {
        std::future::poll_fn(|cx| self.poll_request(worker, cx)).await
    }

    fn poll_request(
        self: &Arc<Self>,
        worker: &mut Worker,
        cx: &Context<'_>,
    ) -> Poll<Option<(http::Request<Body>, Sending)>> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let dismissed = worker.listed_at.take().is_some_and(|then| {
            state.requests.unlist(worker.number);
            then != state.requests.dismissals
        });
        while let Some(id) = state.requests.waiting.pop_front() {
            // Its client may have given it up already.
            let Some(exchange) = state.exchanges.get_mut(&id) else { continue };
            let Head::Request(head) = std::mem::replace(&mut exchange.head, Head::Taken) else { continue };
            let whole = exchange.take_whole();
            let sending = Sending { shared: Arc::clone(self), id, over: false };
            let body = whole.unwrap_or_else(|| {
                Body::new(Receiver { open: Open { shared: Arc::clone(self), id, over: false }, done: false })
            });
            return Poll::Ready(Some((http::Request::from_parts(*head, body), sending)));
        }
        if state.closed || dismissed || state.requests.idle.len() >= MAX_IDLE_WORKERS {
            return Poll::Ready(None);
        }
        worker.listed_at = Some(state.requests.dismissals);
        state.requests.idle.push((worker.number, cx.waker().clone()));
        Poll::Pending
    }

    /// Client: opens an exchange with its request. With it comes the half that still has to be sent, if the request
    /// did not go out whole. `None` if the connection takes no more.
    pub(super) fn request(
        self: &Arc<Self>,
        head: &request::Parts,
        body: &Body,
    ) -> Result<Option<(Open, Option<Sending>)>, TooLarge> {
        let mut state = self.lock();
        if !state.takes_more() {
            return Ok(None);
        }
        let id = state.last + 1;
        let sent = state.put_head_and_whole(id, body, |out, ends| frame::put_request(out, id, head, ends))?;
        state.last = id;
        let awaited = Head::Awaited { upgrade: head.headers.contains_key(http::header::UPGRADE) };
        state.exchanges.insert(id, Exchange::new(awaited, false, sent));
        state.wake_driver();
        let sending = (!sent).then(|| Sending { shared: Arc::clone(self), id, over: false });
        Ok(Some((Open { shared: Arc::clone(self), id, over: false }, sending)))
    }

    /// Understands one frame. `Some` is a worker that has to be set to work, since a request came and none is idle.
    pub(super) fn received(&self, frame: frame::Frame) -> Result<Option<Worker>, Malformed> {
        let mut state = self.lock();
        let id = frame.exchange;
        match (frame.kind, self.role) {
            (Kind::Request, Role::Server) => {
                if state.last.checked_add(1) != Some(id) {
                    return Err(Malformed("exchange number"));
                }
                state.last = id;
                if state.exchanges.len() >= MAX_EXCHANGES {
                    return Err(Malformed("too many exchanges"));
                }
                if state.peer_goes_away {
                    return Err(Malformed("a request after going away"));
                }
                let head = frame::read_request(frame.payload)?;
                state.exchanges.insert(id, Exchange::new(Head::Request(Box::new(head)), frame.ends, false));
                return Ok(state.requests.push(id));
            }
            (Kind::Response, Role::Client) => {
                let head = frame::read_response(frame.payload)?;
                state.exchange(id, |exchange| {
                    let Head::Awaited { upgrade } = exchange.head else {
                        return Err(Malformed("a second response"));
                    };
                    if head.status == http::StatusCode::SWITCHING_PROTOCOLS && !upgrade {
                        return Err(Malformed("status"));
                    }
                    exchange.head = Head::Response(Box::new(head));
                    exchange.ends(frame.ends)
                })?;
            }
            (Kind::Data, _) => state.exchange(id, |exchange| {
                let bytes = frame.payload.len() as u32;
                if matches!(exchange.head, Head::Awaited { .. }) {
                    return Err(Malformed("data before the response"));
                }
                exchange.window.left =
                    exchange.window.left.checked_sub(bytes).ok_or(Malformed("data beyond the window"))?;
                if exchange.ended {
                    return Err(Malformed("data after the end"));
                }
                if bytes > 0 && !exchange.unread {
                    exchange.received.push_back(frame.payload);
                }
                exchange.ends(frame.ends)
            })?,
            (Kind::Trailers, _) => {
                let trailers = frame::read_trailers(frame.payload)?;
                state.exchange(id, |exchange| {
                    if matches!(exchange.head, Head::Awaited { .. }) {
                        return Err(Malformed("trailers before the response"));
                    }
                    exchange.trailers = Some(trailers);
                    exchange.ends(true)
                })?;
            }
            (Kind::Reset, role) => {
                let why = frame::read_reset(&frame.payload)?;
                state.exchange(id, |exchange| {
                    // After its whole answer, a server's reset says only that it needs no more of the request.
                    if role == Role::Server || !exchange.ended {
                        exchange.reset = Some(why);
                    }
                    exchange.ended = true;
                    exchange.sent = true;
                    exchange.wake_all();
                    Ok(())
                })?;
                if role == Role::Server {
                    // Whatever works on it finds it gone. It counts no longer, so a client that gives up
                    // often, or only seems to, can hold no more than one that does not.
                    state.forget(id);
                } else {
                    state.forget_if_done(id);
                }
            }
            (Kind::Credit, _) => {
                let more = frame::read_credit(&frame.payload)?;
                state.exchange(id, |exchange| {
                    exchange.credit =
                        exchange.credit.checked_add(more).ok_or(Malformed("more credit than can be"))?;
                    if let Some(writer) = exchange.writer.take() {
                        writer.wake();
                    }
                    Ok(())
                })?;
            }
            (Kind::GoAway, _) => state.peer_goes_away = true,
            // One answer for all pings since the last write: a flood of them costs nothing to hold.
            (Kind::Ping, _) => state.pong_due = true,
            (Kind::Pong, _) => {}
            (Kind::Request, Role::Client) | (Kind::Response, Role::Server) => {
                return Err(Malformed("a frame from the wrong side"));
            }
        }
        Ok(None)
    }
}

impl State {
    fn takes_more(&self) -> bool {
        !self.closed
            && !self.we_go_away
            && !self.peer_goes_away
            && self.exchanges.len() < MAX_EXCHANGES
            && self.last < u32::MAX / 2
    }

    /// Whether nothing is open and nothing more will be.
    pub(super) fn is_finished(&self) -> bool {
        self.we_go_away && self.peer_goes_away && self.exchanges.is_empty() && self.out.is_empty()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.exchanges.is_empty()
    }

    pub(super) fn register_driver(&mut self, waker: &Waker) {
        match &mut self.driver {
            Some(driver) => driver.clone_from(waker),
            None => self.driver = Some(waker.clone()),
        }
    }

    /// Lets those go on who waited for room.
    pub(super) fn unblock(&mut self) {
        self.blocked.drain(..).for_each(Waker::wake);
    }

    fn wake_driver(&self) {
        if let Some(driver) = &self.driver {
            driver.wake_by_ref();
        }
    }

    /// Writes a head, and the body with it if it is here and small enough to be sent at once. Returns whether
    /// that was all.
    fn put_head_and_whole(
        &mut self,
        id: u32,
        body: &Body,
        put_head: impl FnOnce(&mut BytesMut, bool) -> Result<(), TooLarge>,
    ) -> Result<bool, TooLarge> {
        match body.whole() {
            Some([]) => put_head(&mut self.out, true).map(|()| true),
            Some(bytes) if bytes.len() <= MAX_DATA_BYTES.min(INITIAL_WINDOW_BYTES as usize) => {
                put_head(&mut self.out, false)?;
                frame::put_data(&mut self.out, id, bytes, true);
                Ok(true)
            }
            _ => put_head(&mut self.out, false).map(|()| false),
        }
    }

    /// Does something with an exchange, if it is still there: frames that crossed its end are late, not wrong.
    fn exchange(
        &mut self,
        id: u32,
        then: impl FnOnce(&mut Exchange) -> Result<(), Malformed>,
    ) -> Result<(), Malformed> {
        if id == 0 || id > self.last {
            return Err(Malformed("exchange number"));
        }
        self.exchanges.get_mut(&id).map_or(Ok(()), then)
    }

    fn forget_if_done(&mut self, id: u32) {
        let done = |exchange: &Exchange| exchange.sent && exchange.ended && exchange.unread;
        if self.exchanges.get(&id).is_some_and(done) {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: u32) {
        if let Some(exchange) = self.exchanges.remove(&id) {
            self.spare_window_bytes += exchange.window.size - INITIAL_WINDOW_BYTES;
        }
        if self.exchanges.is_empty() && (self.we_go_away || self.peer_goes_away) {
            self.wake_driver();
        }
    }
}

impl Exchange {
    fn ends(&mut self, ends: bool) -> Result<(), Malformed> {
        if ends {
            if self.ended {
                return Err(Malformed("a second end"));
            }
            self.ended = true;
        }
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        Ok(())
    }
}

/// A response's head, and its body if that is all here.
type Answer = (Box<response::Parts>, Option<Body>);

/// One open exchange, held by whoever has to do with it. What is left of it when this is dropped is reset.
#[derive(Debug)]
pub(super) struct Open {
    shared: Arc<Shared>,
    id: u32,
    /// Nothing is left of it that would have to be reset.
    over: bool,
}

impl Open {
    /// Client: waits for the response.
    pub(super) async fn response(mut self) -> Result<http::Response<Body>, Ended> {
        let (head, whole) = std::future::poll_fn(|cx| self.poll_response(cx)).await?;
        let body = whole.unwrap_or_else(|| Body::new(Receiver { open: self, done: false }));
        Ok(http::Response::from_parts(*head, body))
    }

    fn poll_response(&mut self, cx: &Context<'_>) -> Poll<Result<Answer, Ended>> {
        let mut state = self.shared.lock();
        let closed = state.closed;
        let Some(exchange) = state.exchanges.get_mut(&self.id) else {
            return Poll::Ready(Err(Ended::Connection));
        };
        if matches!(exchange.head, Head::Response(_))
            && let Head::Response(head) = std::mem::replace(&mut exchange.head, Head::Taken)
        {
            let whole = exchange.take_whole();
            self.over = whole.is_some();
            if self.over {
                state.forget_if_done(self.id);
            }
            return Poll::Ready(Ok((head, whole)));
        }
        match exchange.reset {
            Some(why) => Poll::Ready(Err(why.into())),
            None if closed => Poll::Ready(Err(Ended::Connection)),
            None => {
                register(&mut exchange.reader, cx.waker());
                Poll::Pending
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let Some(exchange) = state.exchanges.get_mut(&self.id) else { return };
        exchange.unread = true;
        exchange.received.clear();
        // A server that did not read its whole request says so when it has answered, not before.
        if !exchange.ended && self.shared.role == Role::Client {
            exchange.ended = true;
            exchange.sent = true;
            exchange.wake_all();
            frame::put_reset(&mut state.out, self.id, Reset::Enough);
            state.wake_driver();
        }
        state.forget_if_done(self.id);
    }
}

/// The received half of an exchange as a body.
struct Receiver {
    open: Open,
    done: bool,
}

impl http_body::Body for Receiver {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, BoxError>>> {
        let Self { open: Open { shared, id, .. }, done } = self.get_mut();
        if *done {
            return Poll::Ready(None);
        }
        let mut guard = shared.lock();
        let state = &mut *guard;
        let closed = state.closed;
        let Some(exchange) = state.exchanges.get_mut(id) else {
            // Given up by the peer. Never to be taken for an orderly end.
            return Poll::Ready(Some(Err(Ended::Connection.into())));
        };
        if let Some(data) = exchange.received.pop_front() {
            let more = exchange.window.taken(data.len() as u32, &mut state.spare_window_bytes);
            if more > 0 && !exchange.ended {
                frame::put_credit(&mut state.out, *id, more);
                state.wake_driver();
            }
            return Poll::Ready(Some(Ok(BodyFrame::data(data))));
        }
        if let Some(why) = exchange.reset {
            return Poll::Ready(Some(Err(Ended::Reset(why).into())));
        }
        if exchange.ended {
            if let Some(trailers) = exchange.trailers.take() {
                return Poll::Ready(Some(Ok(BodyFrame::trailers(trailers))));
            }
            *done = true;
            exchange.unread = true;
            state.forget_if_done(*id);
            return Poll::Ready(None);
        }
        if closed {
            return Poll::Ready(Some(Err(Ended::Connection.into())));
        }
        register(&mut exchange.reader, cx.waker());
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let state = self.open.shared.lock();
        let ended = |exchange: &Exchange| {
            exchange.ended
                && exchange.reset.is_none()
                && exchange.received.is_empty()
                && exchange.trailers.is_none()
        };
        self.done || state.exchanges.get(&self.open.id).is_some_and(ended)
    }
}

impl Window {
    /// Notes that `bytes` were taken. Returns what the peer is told it may send beyond what it knows.
    fn taken(&mut self, bytes: u32, spare: &mut u32) -> u32 {
        self.untold += bytes;
        if self.untold < self.size / 2 {
            return 0;
        }
        // The consumer keeps up: half a window was taken since the last word, so the next may be larger.
        let growth = self.size.min(MAX_WINDOW_BYTES - self.size).min(*spare);
        *spare -= growth;
        self.size += growth;
        let more = self.untold + growth;
        self.untold = 0;
        self.left += more;
        more
    }
}

/// The sending half of an exchange.
#[derive(Debug)]
pub(super) struct Sending {
    shared: Arc<Shared>,
    id: u32,
    /// All was sent.
    over: bool,
}

impl Sending {
    /// Server: sends the response's head, and its body if that is here. Returns whether that was all.
    pub(super) fn response(&mut self, head: &response::Parts, body: &Body) -> Result<bool, TooLarge> {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let Some(exchange) = state.exchanges.get(&self.id) else { return Ok(true) };
        if exchange.sent || state.closed {
            return Ok(true);
        }
        let put = |out: &mut BytesMut, ends| frame::put_response(out, self.id, head, ends);
        let sent = state.put_head_and_whole(self.id, body, put)?;
        if sent {
            state.finish_sending(self.id, self.shared.role);
        }
        state.wake_driver();
        self.over = sent;
        Ok(sent)
    }

    /// Sends the rest of a body. Ends early, without an error, when the peer wants no more of it.
    pub(super) async fn body(&self, mut body: Body) {
        let mut body = Pin::new(&mut body);
        loop {
            let frame = std::future::poll_fn(|cx| {
                if self.poll_unwanted(cx).is_ready() {
                    return Poll::Ready(None);
                }
                body.as_mut().poll_frame(cx).map(Some)
            });
            match frame.await {
                None => return,
                Some(Some(Err(error))) => {
                    tracing::debug!(%error, "a body was cut short");
                    return self.reset(Reset::Cut);
                }
                Some(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        let last = body.is_end_stream();
                        if !self.data(data, last).await {
                            return;
                        }
                    }
                    Err(frame) => {
                        return self.finish(frame.into_trailers().ok().as_ref());
                    }
                },
                Some(None) => return self.finish(None),
            }
        }
    }

    /// Sends data as credit and room allow. Returns whether more may follow.
    async fn data(&self, mut data: Bytes, last: bool) -> bool {
        while !data.is_empty() {
            let allowed = std::future::poll_fn(|cx| self.poll_allowance(cx)).await;
            let Some(allowed) = allowed else { return false };
            let part = data.split_to(data.len().min(allowed));
            let ends = data.is_empty() && last;
            let mut state = self.shared.lock();
            let Some(exchange) = state.exchanges.get_mut(&self.id) else { return false };
            exchange.credit -= part.len() as u32;
            frame::put_data(&mut state.out, self.id, &part, ends);
            if ends {
                state.finish_sending(self.id, self.shared.role);
            }
            state.wake_driver();
            if ends {
                return false;
            }
        }
        true
    }

    /// How many bytes may go now; `None` if nobody wants any.
    fn poll_allowance(&self, cx: &Context<'_>) -> Poll<Option<usize>> {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let Some(exchange) = state.exchanges.get_mut(&self.id) else { return Poll::Ready(None) };
        if exchange.sent || state.closed {
            return Poll::Ready(None);
        }
        if exchange.credit == 0 {
            register(&mut exchange.writer, cx.waker());
            return Poll::Pending;
        }
        if state.out.len() >= MAX_WAITING_BYTES {
            state.blocked.push(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Some((exchange.credit as usize).min(MAX_DATA_BYTES)))
    }

    /// Ready when the peer wants nothing more.
    fn poll_unwanted(&self, cx: &Context<'_>) -> Poll<()> {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        match state.exchanges.get_mut(&self.id) {
            Some(exchange) if !exchange.sent && !state.closed => {
                register(&mut exchange.writer, cx.waker());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }

    /// Ready when the peer has given the whole exchange up, or the connection is gone: a handler need not go on.
    pub(super) fn poll_abandoned(&self, cx: &Context<'_>) -> Poll<()> {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        match state.exchanges.get_mut(&self.id) {
            Some(exchange) if !exchange.sent && !state.closed => {
                register(&mut exchange.handler, cx.waker());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }

    fn finish(&self, trailers: Option<&HeaderMap>) {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        if state.exchanges.get(&self.id).is_none_or(|exchange| exchange.sent) {
            return;
        }
        let written = match trailers {
            Some(trailers) => frame::put_trailers(&mut state.out, self.id, trailers),
            None => Err(TooLarge),
        };
        if written.is_err() {
            // No trailers, or ones too large to be any that a client waits for.
            frame::put_data(&mut state.out, self.id, &[], true);
        }
        state.finish_sending(self.id, self.shared.role);
        state.wake_driver();
    }

    pub(super) fn reset(&self, why: Reset) {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let Some(exchange) = state.exchanges.get_mut(&self.id) else { return };
        if !exchange.sent {
            exchange.sent = true;
            if !exchange.ended {
                exchange.ended = true;
                exchange.reset = Some(why);
            }
            exchange.wake_all();
            frame::put_reset(&mut state.out, self.id, why);
            state.wake_driver();
        }
        state.forget_if_done(self.id);
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        // A handler that ended without an answer, or a body whose source was given up.
        if !self.over {
            self.reset(Reset::Cut);
        }
    }
}

impl State {
    fn finish_sending(&mut self, id: u32, role: Role) {
        if let Some(exchange) = self.exchanges.get_mut(&id) {
            exchange.sent = true;
            if role == Role::Server && !exchange.ended {
                // Answered before the whole request was here: the rest of it is not needed.
                exchange.ended = true;
                exchange.reset = Some(Reset::Enough);
                frame::put_reset(&mut self.out, id, Reset::Enough);
            }
        }
        self.forget_if_done(id);
    }
}

fn register(slot: &mut Option<Waker>, waker: &Waker) {
    match slot {
        Some(known) => known.clone_from(waker),
        None => *slot = Some(waker.clone()),
    }
}

/// Exchange numbers rise by one: they are their own hash, spread over the high bits that the table looks at.
#[derive(Debug, Default, Clone, Copy)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0 << 8 | u64::from(*byte);
        }
    }

    fn write_u32(&mut self, id: u32) {
        self.0 = u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
