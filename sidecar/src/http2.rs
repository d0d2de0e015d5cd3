//! What an HTTP/2 server here asks of its peers beyond what hyper does: to begin, and to keep to a minimum rate.
//!
//! A stream whose peer takes too little of its answer is reset; the connection's other streams go on. An answer is
//! given to hyper in pieces of [`PIECE_BYTES`], so that how fast they go is how fast the peer takes them: hyper asks for
//! the next one when the windows have room for it. At most the last piece is out of sight.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use identity::Scope;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::http1::pace::{Pace, Timer};
use crate::{Body, BoxError, answer, grpc};

/// Bytes of an answer that hyper gets at a time. What a peer takes is counted in these, and one is too little for a window of
/// [`Pace`]: who takes less than half of the minimum is dropped in time, and who takes a little less a window or two later.
const PIECE_BYTES: usize = 8 * 1024;
/// Of the connection preface and the head of the frame that has to follow it (RFC 9113 §3.4), which is one of SETTINGS:
/// its type is there.
const TYPE_AT: usize = 24 + 3;
const SETTINGS: u8 = 4;

tokio::task_local! {
    /// How the peer of the stream that this task serves takes its answer.
    static TAKING: RefCell<Taking>;
}

#[derive(Debug, Default)]
struct Taking {
    pace: Pace,
    /// A piece is given, and the next was not asked for.
    waiting: bool,
}

/// Runs hyper's streams, each until its peer proves too slow at the latest.
#[derive(Clone)]
pub(crate) struct Streams(pub(crate) Scope);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let served = async move {
            let (mut stream, mut timer) = (pin!(stream), Timer::default());
            std::future::poll_fn(|cx| {
                if stream.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                ready!(TAKING.with(|taking| {
                    let mut taking = taking.borrow_mut();
                    if taking.waiting { taking.pace.poll_too_slow(&mut timer, cx) } else { Poll::Pending }
                }));
                // What hyper held of the stream goes, which resets it.
                tracing::debug!("stream ended: its peer takes less than 1 KiB a second");
                Poll::Ready(())
            })
            .await;
        };
        self.0.spawn("http/2 stream", TAKING.scope(RefCell::default(), served));
    }
}

/// A request whose body has to come at the minimum rate, and what to tell once its answer has begun: from then on only
/// bytes that were announced are owed, as over HTTP/1.1. Where the body is gRPC's that is so from the beginning.
pub(crate) fn paced_request(request: Request<Incoming>) -> (Request<Body>, Answering) {
    let (parts, body) = request.into_parts();
    if body.is_end_stream() {
        return (Request::from_parts(parts, Body::from(body)), Answering(None));
    }
    let told = Arc::new(Told {
        answering: AtomicBool::new(grpc::is_call(&parts.headers)),
        slow: AtomicBool::default(),
    });
    let upload = Upload { body, told: Arc::clone(&told), pace: Pace::default(), timer: Timer::default() };
    (Request::from_parts(parts, Body::new(upload)), Answering(Some(told)))
}

/// What a request's body and its answer tell each other.
#[derive(Debug)]
struct Told {
    answering: AtomicBool,
    slow: AtomicBool,
}

/// Tells a request's body that its answer has begun.
#[derive(Debug)]
pub(crate) struct Answering(Option<Arc<Told>>);

impl Answering {
    /// The answer, which its peer has to take at the minimum rate. To a body that came too slowly it is 408, whatever was
    /// made of what arrived of it.
    pub(crate) fn begun(self, mut response: Response<Body>) -> Response<Answer> {
        if let Some(told) = self.0 {
            told.answering.store(true, Ordering::Relaxed);
            if told.slow.load(Ordering::Relaxed) {
                response = answer::json(StatusCode::REQUEST_TIMEOUT, r#"{"error":"timeout"}"#);
            }
        }
        response.map(|body| Answer { body, rest: Bytes::new(), given: 0 })
    }
}

/// The request's body came too slowly.
#[derive(Debug, Error)]
#[error("the body comes at less than 1 KiB a second")]
struct Slow;

struct Upload {
    body: Incoming,
    told: Arc<Told>,
    pace: Pace,
    timer: Timer,
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
            this.pace.moved(data.map_or(0, Bytes::len));
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let owed = this.body.size_hint().exact().is_some_and(|left| left > 0);
        if this.told.answering.load(Ordering::Relaxed) && !owed {
            this.pace.pause();
            return Poll::Pending;
        }
        ready!(this.pace.poll_too_slow(&mut this.timer, cx));
        this.told.slow.store(true, Ordering::Relaxed);
        Poll::Ready(Some(Err(Slow.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// See [`Answering::begun`].
pub(crate) struct Answer {
    body: Body,
    /// What is left of the body's last frame.
    rest: Bytes,
    given: usize,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        taking(|taking| {
            taking.pace.moved(std::mem::take(&mut this.given));
            taking.waiting = false;
        });
        if this.rest.is_empty() {
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return Poll::Ready(end),
            }
        }
        let piece = this.rest.split_to(this.rest.len().min(PIECE_BYTES));
        this.given = piece.len();
        taking(|taking| taking.waiting = true);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (inner, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + rest);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

/// Nothing outside a stream's own task, where no answer is read.
fn taking(tell: impl FnOnce(&mut Taking)) {
    let _elsewhere = TAKING.try_with(|taking| tell(&mut taking.borrow_mut())).is_err();
}

/// A stream that sees to what an HTTP/2 client has to begin with, for which hyper waits without bound and of which it takes
/// any frame; and that fails once its peer takes nothing out of the socket, which neither pings nor a GOAWAY get past.
#[derive(Debug)]
pub(crate) struct Guarded<S> {
    stream: S,
    heard: Arc<AtomicUsize>,
    pace: Pace,
    timer: Timer,
}

/// What a [`Guarded`] has noted.
#[derive(Debug)]
pub(crate) struct Greeting(Arc<AtomicUsize>);

impl Greeting {
    pub(crate) fn is_over(&self) -> bool {
        self.0.load(Ordering::Relaxed) > TYPE_AT
    }
}

impl<S> Guarded<S> {
    pub(crate) fn new(stream: S) -> (Self, Greeting) {
        let heard = Arc::new(AtomicUsize::new(0));
        let (noted, pace, timer) = (Arc::clone(&heard), Pace::default(), Timer::default());
        (Self { stream, heard: noted, pace, timer }, Greeting(heard))
    }

    /// `written`, or the end of patience with a peer that does not let it be.
    fn paced<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        bytes: impl FnOnce(&T) -> usize,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        match &written {
            Poll::Ready(done) => self.pace.moved(done.as_ref().map_or(0, bytes)),
            Poll::Pending => {
                ready!(self.pace.poll_too_slow(&mut self.timer, cx));
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read")));
            }
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, into))?;
        let now = into.filled().get(before..).unwrap_or_default();
        let heard = self.heard.load(Ordering::Relaxed);
        if let Some(kind) = TYPE_AT.checked_sub(heard).and_then(|at| now.get(at))
            && *kind != SETTINGS
        {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "no SETTINGS after the preface",
            )));
        }
        self.heard.store(heard.saturating_add(now.len()), Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, data);
        self.paced(written, |bytes| *bytes, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.paced(flushed, |()| 0, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.paced(shut, |()| 0, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        self.paced(written, |bytes| *bytes, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use h2::client::SendRequest;
    use h2::{Reason, RecvStream};
    use http_body_util::BodyExt as _;
    use hyper::server::conn::http2;
    use hyper::service::service_fn;
    use hyper_util::rt::{TokioIo, TokioTimer};
    use tokio::time::{Instant, sleep, timeout};

    use super::*;

    /// By when a peer that is too slow has to be gone.
    const DROPPED_BY: Duration = Duration::from_secs(30);
    const LONG: Duration = Duration::from_secs(600);

    /// A client of a server that reads each body whole, and answers with as many bytes as the path says.
    async fn client(scope: &Scope) -> SendRequest<Bytes> {
        let (near, far) = tokio::io::duplex(1024 * 1024);
        let service = service_fn(async |request: Request<Incoming>| {
            let (request, answering) = paced_request(request);
            let bytes = request.uri().path().trim_start_matches('/').parse().unwrap();
            let early = request.headers().contains_key("early");
            let answer = if early {
                // The two talk at once: the answer begins, and goes on for as long as the request does.
                Body::new(request.into_body())
            } else {
                let _given_up = request.into_body().collect().await.is_err();
                Body::from(Bytes::from(vec![b'x'; bytes]))
            };
            Ok::<_, Infallible>(answering.begun(Response::new(answer)))
        });
        let serving = http2::Builder::new(Streams(scope.clone()))
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(far), service);
        scope.spawn("server", async move {
            let _ended = serving.await;
        });
        let (client, connection) =
            h2::client::Builder::new().initial_window_size(16 * 1024).handshake(near).await.unwrap();
        scope.spawn("client", async move {
            let _ended = connection.await;
        });
        client
    }

    fn get(bytes: usize) -> Request<()> {
        Request::get(format!("https://app/{bytes}")).body(()).unwrap()
    }

    /// Takes `bytes` a second, and says after how long the stream ended, and how.
    async fn take(body: &mut RecvStream, bytes: usize) -> (Duration, Option<Reason>) {
        let started = Instant::now();
        let mut unread = 0;
        loop {
            match timeout(Duration::from_secs(1), body.data()).await {
                Ok(Some(Ok(data))) => unread += data.len(),
                Ok(Some(Err(error))) => return (started.elapsed(), error.reason()),
                Ok(None) => return (started.elapsed(), None),
                Err(_) => {
                    let taken = bytes.min(unread);
                    body.flow_control().release_capacity(taken).unwrap();
                    unread -= taken;
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn security_28_a_stream_whose_peer_takes_too_little_is_reset_and_others_go_on() {
        let scope = Scope::new();
        let mut client = client(&scope).await;
        for rate in [0, 1, 500] {
            let (answer, _) = client.send_request(get(1_000_000), true).unwrap();
            let (took, reason) = take(answer.await.unwrap().body_mut(), rate).await;
            assert_eq!(reason, Some(Reason::CANCEL), "{rate}");
            assert!(took <= DROPPED_BY, "{rate}: {took:?}");
        }
        let (answer, _) = client.send_request(get(300_000), true).unwrap();
        let (took, reason) = take(answer.await.unwrap().body_mut(), 2_048).await;
        assert_eq!(reason, None);
        assert!(took > DROPPED_BY, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn security_28_a_body_that_comes_too_slowly_is_given_up() {
        let scope = Scope::new();
        let mut client = client(&scope).await;
        let (answer, mut send) = client.send_request(get(0), false).unwrap();
        send.send_data(Bytes::from_static(b"x"), false).unwrap();
        let answer = timeout(DROPPED_BY, answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), StatusCode::REQUEST_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_may_pause_once_its_answer_has_begun_or_if_it_is_grpc() {
        let scope = Scope::new();
        let mut client = client(&scope).await;
        for (name, value) in [("early", "1"), ("content-type", "application/grpc+proto")] {
            let request = Request::post("https://app/0").header(name, value).body(()).unwrap();
            let (answer, mut send) = client.send_request(request, false).unwrap();
            sleep(LONG).await;
            send.send_data(Bytes::from_static(b"late"), true).unwrap();
            let body = answer.await.unwrap().into_body();
            let mut said = Vec::new();
            let mut body = body;
            while let Some(data) = body.data().await {
                said.extend_from_slice(&data.unwrap());
            }
            assert_eq!(said, if name == "early" { b"late".as_slice() } else { b"" }, "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_has_nothing_to_say_for_long_goes_on() {
        let scope = Scope::new();
        let mut client = client(&scope).await;
        let request = Request::post("https://app/0").header("early", "1").body(()).unwrap();
        let (answer, mut send) = client.send_request(request, false).unwrap();
        let mut body = answer.await.unwrap().into_body();
        for _ in 0..10 {
            send.send_data(Bytes::from_static(b"x"), false).unwrap();
            assert_eq!(body.data().await.unwrap().unwrap(), "x");
            sleep(LONG).await;
        }
    }

    #[tokio::test]
    async fn a_client_begins_with_settings() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        for (kind, begun) in [(SETTINGS, true), (6, false)] {
            for split in 1..33 {
                let mut greeting = [b'x'; 33];
                greeting[TYPE_AT] = kind;
                let (mut near, far) = tokio::io::duplex(64);
                let (mut guarded, noted) = Guarded::new(far);
                assert!(!noted.is_over());
                let mut heard = [0; 33];
                near.write_all(&greeting[..split]).await.unwrap();
                let first = guarded.read_exact(&mut heard[..split]).await;
                near.write_all(&greeting[split..]).await.unwrap();
                let second = guarded.read_exact(&mut heard[split..]).await;
                assert_eq!(first.is_ok() && second.is_ok(), begun, "{split}");
                assert_eq!(noted.is_over(), begun, "{split}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn security_28_a_socket_out_of_which_nothing_is_taken_fails() {
        use tokio::io::AsyncWriteExt as _;
        let (_near, far) = tokio::io::duplex(64);
        let (mut guarded, _) = Guarded::new(far);
        let failed = timeout(DROPPED_BY, guarded.write_all(&[0; 65])).await.unwrap().unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
    }
}
