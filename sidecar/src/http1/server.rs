//! The side that listens: requests of one connection, one after the other, in one task.

use std::io::{self, Cursor};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use identity::Scope;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Chain, Join};
use tokio::time::{Instant, sleep, timeout};

use super::decode::BodyError;
use super::head::{HeadError, HeadLimits, HeadScan, Length, MAX_HEADERS, RequestHead};
use super::loan::{BodyEnd, LentBody, Loan, Returned};
use super::outgoing::{Outgoing, SendError};
use super::reader::{Arrived, Incoming, Pacing, Reader};
use super::{MAX_WHOLE_BYTES, poll_fn};
use crate::Body;
use crate::server::{LAST_REQUEST_GRACE, Limits, relief};

/// A request's head and the body that usually comes with it.
const FIRST_READ_BYTES: usize = 4 * 1024;
/// A connection that has been idle for this long is given no more buffers than it needs to wake up.
const LEAN_AFTER: Duration = Duration::from_secs(5);
/// How long whoever still reads a request may do so after it has been answered.
const BODY_AFTER_ANSWER: Duration = Duration::from_secs(30);
/// What a client may still send after its connection's last answer, and how long: closing while something
/// is unread would take the answer away from it (RFC 9112 §9.6).
const LINGER_BYTES: usize = 256 * 1024;
const LINGER: Duration = Duration::from_secs(2);
/// What a client says that speaks HTTP/2 without being asked (RFC 9113 §3.4), as far as it looks like a head.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// A connection whose first bytes were read already.
pub type Unread<R, W> = Join<Chain<Cursor<Bytes>, R>, W>;

/// How a connection ended.
#[derive(Debug)]
pub enum Ended<R, W> {
    /// As connections do: by either side, between requests or for want of the other side.
    Closed,
    /// By us, because of what the client sent.
    Refused(HeadError),
    /// By us, because of a body that could not be read to its end.
    BadBody,
    /// By us, because the client was too slow.
    TooSlow,
    /// Not at all: it begins as HTTP/2 does. Nothing of it has been consumed.
    Http2(Unread<R, W>),
}

/// Serves requests on a connection until it ends; after `scope` drains or `over` completes, until it has been
/// idle for a moment.
///
/// The answers of that time say `Connection: close`, so that no request is lost to a connection that ends.
/// `service` is called with one request at a time, and its answer is written before the next is looked at.
/// What is dropped when the client goes away is the future that `service` returned. A body of up to 64 KiB
/// with a `Content-Length` has arrived whole before `service` hears of it; another one is read from the
/// connection as it is asked for, by whatever task. `Host`, `Upgrade`, hop-by-hop headers and the method are
/// `service`'s to judge; framing and grammar have been.
///
/// An upgrade is a request with `Upgrade`, whose body is what the client sends after the switch, answered
/// by 101, whose body is what the client gets after it. Neither body yields anything unless the answer is 101.
pub async fn serve<R, W, F, A>(
    reader: R,
    writer: W,
    limits: &Limits,
    scope: &Scope,
    over: impl Future<Output = ()>,
    mut service: F,
) -> Ended<R, W>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin,
    F: FnMut(Request<Body>) -> A,
    A: Future<Output = Response<Body>>,
{
    let leaves = AtomicBool::new(false);
    let mut leaving = pin!(leaving(limits, scope, over, &leaves));
    let mut reader = Reader::new(reader, FIRST_READ_BYTES);
    let mut client = Client { writer, out: Outgoing::default(), limits, scope, leaves: &leaves };
    let mut fresh = true;
    loop {
        let head = match client.head(&mut reader, leaving.as_mut(), fresh).await {
            Ok(Next::Request(head)) => head,
            Ok(Next::Http2) => {
                let unread = Cursor::new(reader.bytes.freeze()).chain(reader.io);
                return Ended::Http2(tokio::io::join(unread, client.writer));
            }
            Ok(Next::Closed) => return Ended::Closed,
            Ok(Next::Late) => {
                client.refuse(reader, StatusCode::REQUEST_TIMEOUT).await;
                return Ended::TooSlow;
            }
            Err(error) => {
                client.refuse(reader, error.status()).await;
                return Ended::Refused(error);
            }
        };
        fresh = false;
        reader = match client.exchange(reader, *head, &mut service).await {
            Ok(reader) => reader,
            Err(ended) => return ended,
        };
    }
}

/// Completes when a connection that is idle has to end. `leaves` is set a moment before, so that the answer to
/// a request that was on its way says that it is the last.
async fn leaving(limits: &Limits, scope: &Scope, over: impl Future<Output = ()>, leaves: &AtomicBool) {
    tokio::select! {
        () = scope.draining() => {}
        () = relief(limits) => {}
        () = over => {}
    }
    leaves.store(true, Ordering::Relaxed);
    // Boxed: connections that stay need not hold room for it.
    Box::pin(sleep(LAST_REQUEST_GRACE)).await;
}

/// The client's end of a connection.
struct Client<'a, W> {
    writer: W,
    out: Outgoing,
    limits: &'a Limits,
    scope: &'a Scope,
    leaves: &'a AtomicBool,
}

/// What comes next on a connection.
enum Next {
    Request(Box<RequestHead>),
    Http2,
    Closed,
    Late,
}

/// What a connection waits for between two requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// It has not had to wait yet.
    NotYet,
    Idle,
    /// Idle for so long that its buffers were given back.
    Lean,
    /// Part of a head is here.
    Head,
}

enum Event {
    Read(io::Result<usize>),
    Time,
    Leaving,
}

impl<W: AsyncWrite + Unpin> Client<'_, W> {
    /// The next request's head.
    async fn head<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut Reader<R>,
        mut leaving: Pin<&mut impl Future<Output = ()>>,
        fresh: bool,
    ) -> Result<Next, HeadError> {
        let limits = HeadLimits {
            bytes: self.limits.max_header_bytes,
            headers: self.limits.max_headers.min(MAX_HEADERS),
        };
        let mut scan = HeadScan::default();
        let mut waiting = Waiting::NotYet;
        reader.rewind();
        loop {
            if let Some(end) = scan.advance(&reader.bytes, limits)? {
                if fresh && reader.bytes.starts_with(HTTP2_PREFACE) {
                    return Ok(Next::Http2);
                }
                let head = reader.bytes.split_to(end).freeze();
                return Ok(Next::Request(Box::new(RequestHead::parse(&head)?)));
            }
            let event = poll_fn(|cx| {
                if let Poll::Ready(read) = reader.poll_fill(cx) {
                    return Poll::Ready(Event::Read(read));
                }
                if !reader.bytes.is_empty() && waiting != Waiting::Head {
                    waiting = Waiting::Head;
                    reader.timer.set(Instant::now() + self.limits.header_timeout);
                }
                if reader.bytes.is_empty() {
                    if leaving.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(Event::Leaving);
                    }
                    if waiting == Waiting::NotYet {
                        waiting = Waiting::Idle;
                        reader.timer.set(Instant::now() + LEAN_AFTER.min(self.limits.header_timeout));
                    }
                }
                reader.timer.poll(cx).map(|()| Event::Time)
            });
            match event.await {
                Event::Read(Ok(0) | Err(_)) | Event::Leaving => return Ok(Next::Closed),
                Event::Read(Ok(_)) => {}
                Event::Time => match waiting {
                    Waiting::Head => return Ok(Next::Late),
                    Waiting::Lean | Waiting::NotYet => return Ok(Next::Closed),
                    Waiting::Idle => {
                        waiting = Waiting::Lean;
                        reader.release();
                        self.out.release();
                        let left = self.limits.header_timeout.saturating_sub(LEAN_AFTER);
                        reader.timer.set(Instant::now() + left);
                    }
                },
            }
        }
    }

    /// One request and its answer. Gives the reading half back if another request may follow.
    async fn exchange<R, F, A>(
        &mut self,
        mut reader: Reader<R>,
        head: RequestHead,
        service: &mut F,
    ) -> Result<Reader<R>, Ended<R, W>>
    where
        R: AsyncRead + Unpin + Send + 'static,
        F: FnMut(Request<Body>) -> A,
        A: Future<Output = Response<Body>>,
    {
        // A small body that is announced is on its way: whole, it costs nobody anything from here on.
        if let Some(small) = head.small_body() {
            match reader.fill(small, Pacing::Always).await {
                Ok(()) => {}
                Err(error) => return Err(self.bad_body(reader, error.status()).await),
            }
        }
        let (body, mut reading) = match admit(reader, &head) {
            Ok(admitted) => admitted,
            Err((reader, error)) => return Err(self.bad_body(reader, error.status()).await),
        };
        let (head_only, upgrade, close) = (head.method == Method::HEAD, head.upgrade, head.close);
        let expects_continue = head.expects_continue;
        let response = {
            let answer = pin!(service(head.with_body(body)));
            self.answer(answer, &mut reading, expects_continue).await.ok_or(Ended::Closed)?
        };

        // The body may have been given back by now, read or not.
        let switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if switching && upgrade {
            self.tunnel(reading, response).await;
            return Err(Ended::Closed);
        }
        let (mut reader, unread) = match reading {
            Reading::Home(reader) => (Ok(reader), false),
            Reading::Lent(lent) => match lent.0.returned() {
                None => (Err(lent), false),
                Some(Returned { reader, end: BodyEnd::Complete }) => (Ok(reader), false),
                // Nothing of it was ever a body. What came after it belongs to a protocol that is not spoken.
                Some(Returned { reader, .. }) if upgrade => {
                    let early = !reader.bytes.is_empty();
                    (Ok(reader), early)
                }
                Some(Returned { reader, end: BodyEnd::Unread }) => (Ok(reader), true),
                Some(Returned { reader, end: BodyEnd::Failed(status) }) => {
                    return Err(self.bad_body(reader, status).await);
                }
            },
        };
        if switching {
            // An answer to an upgrade that nobody asked for.
            tracing::warn!("an answer switches protocols without having been asked to");
            if let Ok(reader) = reader {
                self.refuse(reader, StatusCode::BAD_GATEWAY).await;
            }
            return Err(Ended::Closed);
        }

        if let Err(lent) = &reader {
            lent.0.answering();
        }
        let (parts, body) = response.into_parts();
        let leaves = self.leaves.load(Ordering::Relaxed) || self.scope.is_draining();
        let close = close || unread || leaves;
        let more = self.out.response(&parts, body, head_only, close);
        drop(parts);
        if !self.flush(reader.as_mut().ok()).await {
            return Err(Ended::Closed);
        }
        self.out.clear();
        let reader = match reader {
            Ok(reader) => reader,
            Err(lent) => self.wait_for_body(lent).await.ok_or(Ended::Closed)?,
        };
        if more {
            return Ok(reader);
        }
        if unread {
            self.linger(reader).await;
        }
        Err(Ended::Closed)
    }

    /// Waits for the service's answer; none if the client is gone.
    async fn answer<R: AsyncRead + Unpin>(
        &mut self,
        mut answer: Pin<&mut impl Future<Output = Response<Body>>>,
        reading: &mut Reading<R>,
        mut expects_continue: bool,
    ) -> Option<Response<Body>> {
        let response = poll_fn(|cx| {
            if let Poll::Ready(response) = answer.as_mut().poll(cx) {
                return Poll::Ready(Some(response));
            }
            match reading {
                Reading::Home(reader) => poll_gone(reader, cx).map(|()| None),
                Reading::Lent(lent) => {
                    if expects_continue && lent.0.poll_wanted(cx).is_ready() {
                        expects_continue = false;
                        self.out.interim();
                    }
                    match self.out.is_done() {
                        true => Poll::Pending,
                        false => match self.out.poll_send(&mut self.writer, cx) {
                            Poll::Ready(Err(_)) => Poll::Ready(None),
                            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
                        },
                    }
                }
            }
        });
        let response = response.await?;
        // An interim answer that is half written has to be written whole before the final one.
        self.flush(None::<&mut Reader<R>>).await.then_some(response)
    }

    /// Writes what has been begun; false if that cannot be done to its end.
    async fn flush<R: AsyncRead + Unpin>(&mut self, mut reader: Option<&mut Reader<R>>) -> bool {
        let sent = poll_fn(|cx| {
            if let Poll::Ready(sent) = self.out.poll_send(&mut self.writer, cx) {
                return Poll::Ready(Some(sent));
            }
            match &mut reader {
                Some(reader) => poll_gone(reader, cx).map(|()| None),
                None => Poll::Pending,
            }
        });
        match sent.await {
            Some(Ok(())) => true,
            // The client is gone.
            None | Some(Err(SendError::Io(_))) => false,
            Some(Err(error)) => {
                tracing::debug!(%error, "an answer ended early");
                false
            }
        }
    }

    /// Passes bytes in both directions until both have ended.
    async fn tunnel<R: AsyncRead + Unpin>(&mut self, reading: Reading<R>, response: Response<Body>) {
        let (parts, body) = response.into_parts();
        if let Reading::Lent(lent) = &reading {
            lent.0.switched();
        }
        self.out.response(&parts, body, false, false);
        if !self.flush(None::<&mut Reader<R>>).await || self.writer.shutdown().await.is_err() {
            return;
        }
        if let Reading::Lent(lent) = reading {
            self.wait_for_body(lent).await;
        }
    }

    /// Waits until whoever reads the request is done; the reading half only if it did so to the end.
    async fn wait_for_body<R: AsyncRead + Unpin>(&mut self, lent: Lent<R>) -> Option<Reader<R>> {
        let returned = timeout(BODY_AFTER_ANSWER, poll_fn(|cx| lent.0.poll_returned(cx)));
        match returned.await {
            Ok(Returned { reader, end: BodyEnd::Complete }) => Some(reader),
            Ok(Returned { reader, end: BodyEnd::Unread }) => {
                self.linger(reader).await;
                None
            }
            Ok(Returned { end: BodyEnd::Failed(_), .. }) | Err(_) => None,
        }
    }

    async fn bad_body<R: AsyncRead + Unpin>(
        &mut self,
        reader: Reader<R>,
        status: Option<StatusCode>,
    ) -> Ended<R, W> {
        let Some(status) = status else { return Ended::Closed };
        self.refuse(reader, status).await;
        if status == StatusCode::REQUEST_TIMEOUT { Ended::TooSlow } else { Ended::BadBody }
    }

    /// Answers what is not answered by the service, as the last thing on this connection.
    async fn refuse<R: AsyncRead + Unpin>(&mut self, reader: Reader<R>, status: StatusCode) {
        self.out.refusal(status);
        if self.flush(None::<&mut Reader<R>>).await {
            self.linger(reader).await;
        }
    }

    /// Reads on for a while without looking, so that the last answer arrives before the connection ends.
    async fn linger<R: AsyncRead + Unpin>(&mut self, mut reader: Reader<R>) {
        reader.bytes.clear();
        let mut left = LINGER_BYTES;
        let listen = async {
            self.writer.shutdown().await?;
            while left > 0 {
                match poll_fn(|cx| reader.poll_fill(cx)).await? {
                    0 => break,
                    read => left = left.saturating_sub(read),
                }
                reader.bytes.clear();
            }
            io::Result::Ok(())
        };
        // However it ends, the connection does.
        let _ended = timeout(LINGER, listen).await;
    }
}

/// Where the reading half is.
enum Reading<R: AsyncRead + Unpin> {
    Home(Reader<R>),
    Lent(Lent<R>),
}

/// A reading half that a body has; told when the connection ends before the body does.
struct Lent<R: AsyncRead + Unpin>(Arc<Loan<R>>);

impl<R: AsyncRead + Unpin> Drop for Lent<R> {
    fn drop(&mut self) {
        self.0.gone();
    }
}

/// Makes the request's body: whole if it has arrived, else one that reads on.
fn admit<R: AsyncRead + Unpin + Send + 'static>(
    mut reader: Reader<R>,
    head: &RequestHead,
) -> Result<(Body, Reading<R>), (Reader<R>, BodyError)> {
    if head.length == Length::NONE && !head.upgrade {
        return Ok((Body::empty(), Reading::Home(reader)));
    }
    let incoming = if head.upgrade {
        Incoming::raw()
    } else {
        match Incoming::begin(head.length, &mut reader.bytes) {
            Ok(Arrived::Whole(bytes)) => return Ok((Body::from(bytes), Reading::Home(reader))),
            Ok(Arrived::Partly(incoming)) => incoming,
            Err(error) => return Err((reader, error)),
        }
    };
    let (loan, body): (_, LentBody<R>) = Loan::lend(reader, incoming, head.upgrade);
    Ok((Body::new(body), Reading::Lent(Lent(loan))))
}

/// Ready when the client has gone away. What it sends meanwhile is its next request, and waits.
fn poll_gone<R: AsyncRead + Unpin>(reader: &mut Reader<R>, cx: &mut Context<'_>) -> Poll<()> {
    if !reader.bytes.is_empty() {
        return Poll::Pending;
    }
    match reader.poll_fill(cx) {
        Poll::Ready(Ok(0) | Err(_)) => Poll::Ready(()),
        Poll::Ready(Ok(_)) | Poll::Pending => Poll::Pending,
    }
}

impl RequestHead {
    /// The length of a body that is worth waiting for before anything is done.
    fn small_body(&self) -> Option<usize> {
        match self.length {
            Length::Exactly(length @ 1..=MAX_WHOLE_BYTES) if !self.expects_continue => {
                usize::try_from(length).ok()
            }
            _ => None,
        }
    }

    fn with_body(self, body: Body) -> Request<Body> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        request
    }
}
