//! The side that calls: a pool of connections to one address, each used by one request at a time.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::{Frame, SizeHint};
use identity::Scope;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::decode::BodyError;
use super::head::{HeadError, HeadLimits, HeadScan, Length, ResponseHead};
use super::outgoing::{NoTarget, Outgoing, SendError};
use super::reader::{Arrived, Incoming, Pacing, Reader};
use super::{MAX_WHOLE_BYTES, poll_fn};
use crate::{Body, BoxError, dial};

/// The app is on this machine: if it does not accept within this, it is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Idle connections kept.
const MAX_IDLE: usize = 64;
/// Shorter than any server's keep-alive that we know of, so that we close first.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// An answer's head.
const HEAD_LIMITS: HeadLimits = HeadLimits { bytes: 64 * 1024, headers: 100 };
/// Interim answers before the final one. Early hints are one or two.
const MAX_INTERIM: usize = 8;
/// An answer's head and the body that usually comes with it.
const FIRST_READ_BYTES: usize = 16 * 1024;

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The request has no target in origin form, or no host.
    #[error("the request's target is not in origin form")]
    Target,
    /// Nobody listens there, or accepts in time.
    #[error("no connection: {0}")]
    Connect(#[source] io::Error),
    /// The connection ended before the first byte of an answer.
    #[error("the connection was closed before an answer; {0}")]
    Closed(Repeat),
    /// The connection ended within the answer.
    #[error("the answer was cut short")]
    Cut,
    /// The answer's head is refused.
    #[error("the answer is malformed: {0}")]
    Head(#[source] HeadError),
    /// The answer's body is refused.
    #[error("the answer is malformed: {0}")]
    Body(#[source] BodyError),
    /// More interim answers than anybody needs.
    #[error("too many interim answers")]
    Interim,
    /// 101 to a request that asked for no upgrade.
    #[error("the answer switches protocols without having been asked to")]
    Switch,
    /// The request's own body failed.
    #[error("the request ended early: {0}")]
    Request(#[source] BoxError),
    /// The request is not taken at a rate worth waiting for.
    #[error("the request is taken too slowly")]
    Slow,
}

/// What became of repeating a request whose connection was closed (RFC 9110 §9.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Repeat {
    /// A fresh connection: closing it was no accident of keep-alive.
    #[error("the connection was a fresh one")]
    Fresh,
    /// It was, once, on a fresh connection, which was closed too.
    #[error("it was repeated once")]
    Repeated,
    /// The request may have had its effect.
    #[error("its method is not idempotent, so it was not repeated")]
    NotIdempotent,
    /// Part of the body had been passed on and is not here any more.
    #[error("its body streams, so it was not repeated")]
    BodyGone,
}

impl ClientError {
    /// Whether nobody accepted the connection.
    pub fn is_connect(&self) -> bool {
        matches!(self, Self::Connect(_))
    }
}

impl From<NoTarget> for ClientError {
    fn from(NoTarget: NoTarget) -> Self {
        Self::Target
    }
}

/// Where a client's connections come from.
pub trait Connect: std::fmt::Debug + Send + Sync + 'static {
    /// What arrives.
    type Reader: AsyncRead + std::fmt::Debug + Unpin + Send + 'static;
    /// What leaves.
    type Writer: AsyncWrite + std::fmt::Debug + Unpin + Send + 'static;

    /// A new connection, or why there is none, within a bound of its own.
    fn connect(&self) -> impl Future<Output = io::Result<(Self::Reader, Self::Writer)>> + Send;
}

/// The app, in clear text.
impl Connect for SocketAddr {
    type Reader = OwnedReadHalf;
    type Writer = OwnedWriteHalf;

    async fn connect(&self) -> io::Result<(OwnedReadHalf, OwnedWriteHalf)> {
        let stream = timeout(CONNECT_TIMEOUT, dial::connect(*self)).await.map_err(|_| {
            let why = format!("nobody accepts within {CONNECT_TIMEOUT:?}");
            io::Error::new(io::ErrorKind::TimedOut, why)
        })??;
        stream.set_nodelay(true)?;
        Ok(stream.into_split())
    }
}

/// A client of one server.
#[derive(Debug)]
pub struct Client<C: Connect = SocketAddr> {
    server: C,
    pool: Arc<Pool<C>>,
}

impl<C: Connect> Client<C> {
    /// A client of `server`; what it leaves to other tasks belongs to `scope`.
    pub fn new(server: C, scope: &Scope) -> Self {
        Self { server, pool: Arc::new(Pool { idle: Mutex::default(), scope: scope.clone() }) }
    }

    /// Sends one request and waits for the head of its answer, without a bound of its own on the time.
    ///
    /// `Content-Length`, `Transfer-Encoding`, `Connection` and `Expect` are this connection's own and are
    /// written anew; all other headers go out as they are, and hop-by-hop ones are the caller's to strip. A
    /// request with `Upgrade` asks for one; if the answer is 101, its body and the request's are what the two
    /// sides of the other protocol say.
    ///
    /// If a kept connection turns out to be closed before a byte of the answer, the request is repeated once
    /// on a fresh one, provided its body is whole, and its method is idempotent or nothing of it was sent.
    ///
    /// Interim answers are read and dropped. An answer with an announced length of up to 64 KiB is waited for
    /// and whole. Where an answer comes before its request has been sent, the rest of the request is sent
    /// while the answer is read, and no longer.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Body>, ClientError> {
        let (parts, body) = request.into_parts();
        let (mut connection, kept) = match self.pool.take().await {
            Some(connection) => (connection, true),
            None => (self.connect().await?, false),
        };
        let held = connection.out.request(&parts, body)?;
        let whole = connection.out.is_whole();
        let mut repeat = Repeat::Fresh;
        let mut outcome = connection.exchange(&parts.method, held.is_some()).await;
        if matches!(outcome, Err(Failure::Unanswered)) && kept {
            repeat = match whole {
                false => Repeat::BodyGone,
                true if connection.out.sent() > 0 && !parts.method.is_idempotent() => Repeat::NotIdempotent,
                true => Repeat::Repeated,
            };
            if repeat == Repeat::Repeated {
                let mut out = std::mem::take(&mut connection.out);
                out.rewind();
                connection = self.connect().await?;
                connection.out = out;
                outcome = connection.exchange(&parts.method, held.is_some()).await;
            }
        }
        let head = match outcome {
            Ok(head) => head,
            Err(Failure::Unanswered) => return Err(ClientError::Closed(repeat)),
            Err(Failure::Other(error)) => return Err(error),
        };
        let body = match held {
            Some(held) if head.status == StatusCode::SWITCHING_PROTOCOLS => {
                connection.tunnel(held, &self.pool)
            }
            _ => connection.body(&head, &self.pool).await?,
        };
        let mut response = Response::new(body);
        *response.status_mut() = head.status;
        *response.version_mut() = Version::HTTP_11;
        *response.headers_mut() = head.headers;
        Ok(response)
    }

    async fn connect(&self) -> Result<Box<Connection<C>>, ClientError> {
        let (reader, writer) = self.server.connect().await.map_err(ClientError::Connect)?;
        let reader = Reader::new(reader, FIRST_READ_BYTES);
        Ok(Box::new(Connection { reader, writer, out: Outgoing::default(), broken: false }))
    }
}

/// One connection, wholly its holder's. Boxed, since it passes from hand to hand with each request.
#[derive(Debug)]
struct Connection<C: Connect> {
    reader: Reader<C::Reader>,
    writer: C::Writer,
    out: Outgoing,
    /// The server takes no more of the request.
    broken: bool,
}

/// Why an exchange gave no answer.
#[derive(Debug)]
enum Failure {
    /// Closed before the first byte of it.
    Unanswered,
    Other(ClientError),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Other(error)
    }
}

impl<C: Connect> Connection<C> {
    /// Sends what has been begun and reads the head of the answer, each as far as the other lets it.
    async fn exchange(&mut self, method: &Method, upgrade: bool) -> Result<ResponseHead, Failure> {
        self.reader.rewind();
        let mut scan = HeadScan::default();
        let mut interim = 0;
        loop {
            let answered = interim > 0;
            let end = poll_fn(|cx| self.poll_head(&mut scan, answered, cx)).await?;
            let head = self.reader.bytes.split_to(end).freeze();
            let head = ResponseHead::parse(&head, method).map_err(ClientError::Head)?;
            match head.status {
                StatusCode::SWITCHING_PROTOCOLS if upgrade => return Ok(head),
                StatusCode::SWITCHING_PROTOCOLS => return Err(ClientError::Switch.into()),
                status if !status.is_informational() => return Ok(head),
                _ if interim == MAX_INTERIM => return Err(ClientError::Interim.into()),
                _ => interim += 1,
            }
            scan = HeadScan::default();
        }
    }

    fn poll_head(
        &mut self,
        scan: &mut HeadScan,
        answered: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Result<usize, Failure>> {
        if !self.broken && !self.out.is_done() {
            match self.out.poll_send(&mut self.writer, cx) {
                Poll::Ready(Ok(())) | Poll::Pending => {}
                // It may have said why before it stopped listening.
                Poll::Ready(Err(SendError::Io(_))) => self.broken = true,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(ClientError::from(error).into())),
            }
        }
        loop {
            if let Some(end) = scan.advance(&self.reader.bytes, HEAD_LIMITS).map_err(ClientError::Head)? {
                return Poll::Ready(Ok(end));
            }
            match std::task::ready!(self.reader.poll_fill(cx)) {
                Ok(read) if read > 0 => {}
                _ if answered || !self.reader.bytes.is_empty() => {
                    return Poll::Ready(Err(ClientError::Cut.into()));
                }
                _ => return Poll::Ready(Err(Failure::Unanswered)),
            }
        }
    }

    /// The body of the answer: whole, with the connection back in the pool, or one that owns the connection.
    async fn body(
        mut self: Box<Self>,
        head: &ResponseHead,
        pool: &Arc<Pool<C>>,
    ) -> Result<Body, ClientError> {
        if let Length::Exactly(small @ 1..=MAX_WHOLE_BYTES) = head.length {
            let small = usize::try_from(small).unwrap_or(usize::MAX);
            self.reader.fill(small, Pacing::Never).await.map_err(ClientError::Body)?;
        }
        let arrived = Incoming::begin(head.length, &mut self.reader.bytes).map_err(ClientError::Body)?;
        let keep = head.keep_alive && !self.broken && head.version == Version::HTTP_11;
        match arrived {
            Arrived::Whole(bytes) => {
                if keep && self.out.is_done() {
                    pool.put(self);
                }
                Ok(Body::from(bytes))
            }
            Arrived::Partly(incoming) => Ok(Body::new(self.answer(incoming, keep, pool))),
        }
    }

    /// Both directions of another protocol.
    fn tunnel(mut self, body: Body, pool: &Arc<Pool<C>>) -> Body {
        self.out.raw(body);
        Body::new(self.answer(Incoming::raw(), false, pool))
    }

    fn answer(self, incoming: Incoming, keep: bool, pool: &Arc<Pool<C>>) -> Answer<C> {
        let Self { reader, writer, out, broken } = self;
        let writing = match out.is_done() || broken {
            true => Writing::Done(writer, out),
            // The answer came first. Sending must not depend on somebody reading it, nor outlive it.
            false => Writing::Elsewhere(send_on(out, writer, !keep, &pool.scope)),
        };
        Answer {
            incoming,
            reader: Some(reader),
            writing: Some(writing),
            keep,
            ended: false,
            pool: Arc::clone(pool),
        }
    }
}

impl From<SendError> for ClientError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Io(error) => Self::Request(error.into()),
            SendError::Slow => Self::Slow,
            SendError::Body(error) => Self::Request(error),
            SendError::BodyLength => Self::Request(error.into()),
        }
    }
}

type Sent<W> = (W, Outgoing);

/// Sends the rest of a request in a task of its own, until it is sent or nobody waits for it any more.
fn send_on<W: AsyncWrite + Unpin + Send + 'static>(
    mut out: Outgoing,
    mut writer: W,
    last: bool,
    scope: &Scope,
) -> oneshot::Receiver<Sent<W>> {
    let (mut back, receiver) = oneshot::channel();
    scope.spawn("request body", async move {
        let sent = tokio::select! {
            sent = poll_fn(|cx| out.poll_send(&mut writer, cx)) => sent.is_ok(),
            () = back.closed() => false,
        };
        if !sent {
            return;
        }
        if last && writer.shutdown().await.is_err() {
            return;
        }
        // If the answer has ended meanwhile, so does the connection.
        drop(back.send((writer, out)));
    });
    receiver
}

#[derive(Debug)]
enum Writing<W> {
    Done(W, Outgoing),
    Elsewhere(oneshot::Receiver<Sent<W>>),
}

/// An answer's body that reads from its connection, and gives that back to the pool after it.
#[derive(Debug)]
struct Answer<C: Connect> {
    incoming: Incoming,
    reader: Option<Reader<C::Reader>>,
    writing: Option<Writing<C::Writer>>,
    keep: bool,
    ended: bool,
    pool: Arc<Pool<C>>,
}

impl<C: Connect> Answer<C> {
    fn end(&mut self) {
        self.ended = true;
        let (Some(reader), Some(writing)) = (self.reader.take(), self.writing.take()) else { return };
        let sent = match writing {
            Writing::Done(writer, out) => Some((writer, out)),
            Writing::Elsewhere(mut sent) => sent.try_recv().ok(),
        };
        if let Some((writer, out)) = sent
            && self.keep
        {
            self.pool.put(Box::new(Connection { reader, writer, out, broken: false }));
        }
    }
}

impl<C: Connect> http_body::Body for Answer<C> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let Some(reader) = &mut this.reader else { return Poll::Ready(None) };
        let frame = std::task::ready!(this.incoming.poll_frame(reader, Pacing::Never, cx));
        match &frame {
            Some(Err(_)) => {
                this.keep = false;
                this.end();
            }
            _ if this.incoming.is_done() => this.end(),
            _ => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        match self.incoming.left() {
            Some(left) => SizeHint::with_exact(left),
            None => SizeHint::default(),
        }
    }
}

/// Connections that wait for a request, the longest idle in front.
#[derive(Debug)]
struct Pool<C: Connect> {
    idle: Mutex<Idle<C>>,
    scope: Scope,
}

#[derive(Debug)]
struct Idle<C: Connect> {
    connections: VecDeque<(Instant, Box<Connection<C>>)>,
    /// Whether a task looks after connections that nobody asks for.
    tended: bool,
}

impl<C: Connect> Default for Idle<C> {
    fn default() -> Self {
        Self { connections: VecDeque::new(), tended: false }
    }
}

impl<C: Connect> Pool<C> {
    /// The connection that was used last, if the server has not closed it.
    async fn take(&self) -> Option<Box<Connection<C>>> {
        loop {
            let (since, mut connection) = self.idle().connections.pop_back()?;
            if since.elapsed() >= IDLE_TIMEOUT {
                // The others have been idle for longer.
                let old = std::mem::take(&mut self.idle().connections);
                drop(old);
                return None;
            }
            // Whatever there is to read on an idle connection, it is no answer to what has not been asked.
            // Where nothing is, the runtime knows that without asking the kernel.
            if poll_fn(|cx| Poll::Ready(connection.reader.poll_fill(cx).is_pending())).await {
                return Some(connection);
            }
        }
    }

    /// Keeps a connection whose last answer has been read to its end.
    fn put(self: &Arc<Self>, mut connection: Box<Connection<C>>) {
        if !connection.reader.bytes.is_empty() {
            // More than was asked for: an answer too long, or one to a question that nobody put.
            tracing::debug!("bytes after the end of an answer; the connection is closed");
            return;
        }
        connection.out.clear();
        let mut idle = self.idle();
        idle.connections.push_back((Instant::now(), connection));
        let surplus = (idle.connections.len() > MAX_IDLE).then(|| idle.connections.pop_front());
        let tended = std::mem::replace(&mut idle.tended, true);
        drop(idle);
        drop(surplus);
        if !tended {
            self.scope.spawn("idle connections", tend(Arc::downgrade(self), self.scope.clone()));
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle<C>> {
        // Nothing that runs under the lock can panic; if it did, the state would still be whole.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes what has been idle too long, until there is nothing left.
async fn tend<C: Connect>(pool: Weak<Pool<C>>, scope: Scope) {
    loop {
        tokio::select! {
            () = sleep(IDLE_TIMEOUT) => {}
            () = scope.draining() => return,
        }
        let Some(pool) = pool.upgrade() else { return };
        let mut idle = pool.idle();
        let old = idle.connections.partition_point(|(since, _)| since.elapsed() >= IDLE_TIMEOUT);
        let old: Vec<_> = idle.connections.drain(..old).collect();
        let done = idle.connections.is_empty();
        idle.tended = !done;
        drop(idle);
        drop(old);
        if done {
            return;
        }
    }
}
