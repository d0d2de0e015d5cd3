//! Two ends of a connection over an in-memory pipe, and one end against bytes that no client of ours sends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use identity::Scope;
use identity::clock::{Clock as _, ManualClock, SharedClock, SystemClock};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::frame::{self, Kind};
use super::*;
use crate::{Body, BoxError, empty, full};

fn clock() -> SharedClock {
    SystemClock::shared()
}

/// A server that answers with `answer`, and a client of it.
fn pair<F>(
    scope: &Scope,
    answer: impl Fn(Request<Body>) -> F + Clone + Send + Sync + Unpin + 'static,
) -> Handle
where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    pair_on(scope, &clock(), answer)
}

fn pair_on<F>(
    scope: &Scope,
    clock: &SharedClock,
    answer: impl Fn(Request<Body>) -> F + Clone + Send + Sync + Unpin + 'static,
) -> Handle
where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    serve_pipe(scope, clock, theirs, answer);
    connect(ours, "test".into(), Arc::clone(clock), scope)
}

fn serve_pipe<F>(
    scope: &Scope,
    clock: &SharedClock,
    stream: DuplexStream,
    answer: impl Fn(Request<Body>) -> F + Clone + Send + Sync + Unpin + 'static,
) where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let (inner, outer, clock) = (scope.clone(), scope.clone(), Arc::clone(clock));
    outer.spawn("server", async move {
        let leaving = {
            let scope = inner.clone();
            async move {
                scope.draining().await;
                None
            }
        };
        let _ended = serve(stream, &clock, &inner, leaving, answer).await;
    });
}

fn get(target: &str) -> http::request::Parts {
    Request::get(target).header("host", "test").body(()).unwrap().into_parts().0
}

fn post(target: &str) -> http::request::Parts {
    Request::post(target).header("host", "test").body(()).unwrap().into_parts().0
}

async fn text(response: Response<Body>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

async fn end(scope: Scope) {
    scope.drain();
    scope.finished(Duration::from_secs(5)).await.unwrap();
}

/// A body in pieces of one size, then trailers if there are any.
fn pieces(size: usize, count: usize, trailers: Option<HeaderMap>) -> Body {
    let data = (0..count).map(move |i| http_body::Frame::data(Bytes::from(vec![i as u8; size])));
    let frames = data.chain(trailers.map(http_body::Frame::trailers)).map(Ok::<_, BoxError>);
    Body::new(StreamBody::new(futures::stream::iter(frames)))
}

#[tokio::test]
async fn many_requests_at_once_get_their_own_answers() {
    let scope = Scope::new();
    let client = pair(&scope, async |request: Request<Body>| {
        let path = request.uri().path().to_owned();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::builder().status(201).header("x-path", &path).body(full(body)).unwrap()
    });
    let asked = (0..100).map(async |i| {
        let response = client.send(&post(&format!("/{i}")), full(format!("body {i}"))).await.unwrap();
        assert_eq!(response.status(), StatusCode::CREATED);
        assert_eq!(response.headers()["x-path"], format!("/{i}"));
        assert_eq!(text(response).await, format!("body {i}"));
    });
    futures::future::join_all(asked).await;
    assert_eq!(client.load(), Some(0));
    end(scope).await;
}

#[tokio::test]
async fn workers_take_one_request_after_the_other_and_leave_when_there_are_none() {
    let scope = Scope::new();
    let manual = ManualClock::at(Duration::from_secs(1));
    let clock: SharedClock = Arc::clone(&manual) as _;
    let ask = async |client: &Handle| text(client.send(&get("/"), empty()).await.unwrap()).await;
    let client = pair_on(&scope, &clock, async |_request| {
        tokio::task::yield_now().await;
        Response::new(full("done"))
    });
    for _ in 0..200 {
        assert_eq!(ask(&client).await, "done");
    }
    let connection = 2;
    assert_eq!(scope.unfinished(), connection + 1, "one worker for requests that come one by one");
    let answers = futures::future::join_all((0..MAX_EXCHANGES).map(|_| ask(&client))).await;
    assert!(answers.iter().all(|answer| answer == "done"));
    while scope.unfinished() > connection + MAX_IDLE_WORKERS {
        tokio::task::yield_now().await;
    }
    // A tick in which something was read, and one in which nothing was.
    while scope.unfinished() > connection {
        manual.advance(Duration::from_secs(10));
        for _ in 0..1_000 {
            tokio::task::yield_now().await;
        }
        assert!(manual.now() < Duration::from_secs(60), "workers stay: {}", scope.unfinished());
    }
    assert_eq!(ask(&client).await, "done", "and the next request finds a new one");
    end(scope).await;
}

#[tokio::test]
async fn bodies_of_many_windows_and_trailers_travel_both_ways_at_once() {
    let scope = Scope::new();
    let client = pair(&scope, async |request: Request<Body>| Response::new(request.into_body()));
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let response = client.send(&post("/"), pieces(10_000, 300, Some(trailers.clone()))).await.unwrap();
    let collected = response.into_body().collect().await.unwrap();
    assert_eq!(collected.trailers(), Some(&trailers));
    assert_eq!(collected.to_bytes().len(), 3_000_000);
    assert_eq!(client.load(), Some(0));
    end(scope).await;
}

#[tokio::test]
async fn security_27_a_stalled_reader_stalls_nobody_else_and_is_held_to_its_window() {
    let scope = Scope::new();
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    let client = pair(&scope, move |request: Request<Body>| {
        let counted = Arc::clone(&counted);
        async move {
            if request.uri().path() == "/small" {
                return Response::new(full("small"));
            }
            let frames = futures::stream::repeat_with(move || {
                counted.fetch_add(1000, Ordering::Relaxed);
                Ok::<_, BoxError>(http_body::Frame::data(Bytes::from_static(&[7; 1000])))
            });
            Response::new(Body::new(StreamBody::new(frames)))
        }
    });
    let mut stalled = Vec::new();
    for _ in 0..100 {
        stalled.push(client.send(&get("/endless"), empty()).await.unwrap());
    }
    for _ in 0..20 {
        assert_eq!(text(client.send(&get("/small"), empty()).await.unwrap()).await, "small");
    }
    // Nobody reads: each sender was let go on for its first window, and took one more piece from its source.
    assert!(sent.load(Ordering::Relaxed) <= 100 * (INITIAL_WINDOW_BYTES as usize + 2000));
    drop(stalled);
    assert_eq!(text(client.send(&get("/small"), empty()).await.unwrap()).await, "small");
    end(scope).await;
}

#[tokio::test]
async fn a_client_that_loses_interest_stops_the_handler() {
    let scope = Scope::new();
    let (started, stopped) = (Arc::new(tokio::sync::Notify::new()), Arc::new(tokio::sync::Notify::new()));
    struct Stopped(Arc<tokio::sync::Notify>);
    impl Drop for Stopped {
        fn drop(&mut self) {
            self.0.notify_one();
        }
    }
    let (start, stop) = (Arc::clone(&started), Arc::clone(&stopped));
    let client = pair(&scope, move |_request: Request<Body>| {
        let (start, stop) = (Arc::clone(&start), Stopped(Arc::clone(&stop)));
        async move {
            let _stop = stop;
            start.notify_one();
            std::future::pending().await
        }
    });
    let head = get("/");
    {
        let asked = client.send(&head, empty());
        tokio::select! {
            _ = asked => unreachable!(),
            () = started.notified() => {}
        }
    }
    stopped.notified().await;
    assert_eq!(client.load(), Some(0));
    end(scope).await;
}

#[tokio::test]
async fn a_server_that_answers_early_stops_the_upload() {
    let scope = Scope::new();
    let client = pair(&scope, async |_request: Request<Body>| {
        Response::builder().status(413).body(full("too much")).unwrap()
    });
    let endless = futures::stream::repeat_with(|| {
        Ok::<_, BoxError>(http_body::Frame::data(Bytes::from_static(&[7; 1000])))
    });
    let response = client.send(&post("/"), Body::new(StreamBody::new(endless))).await.unwrap();
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(text(response).await, "too much");
    while client.load() != Some(0) {
        tokio::task::yield_now().await;
    }
    end(scope).await;
}

#[tokio::test]
async fn a_handler_that_panics_and_a_body_that_fails_reset_their_exchange_only() {
    let scope = Scope::new();
    let client = pair(&scope, async |request: Request<Body>| match request.uri().path() {
        "/panic" => panic!("on purpose"),
        "/cut" => {
            let frames =
                [Ok(http_body::Frame::data(Bytes::from_static(b"half"))), Err(BoxError::from("cut"))];
            Response::new(Body::new(StreamBody::new(futures::stream::iter(frames))))
        }
        _ => Response::new(full("fine")),
    });
    assert!(matches!(client.send(&get("/panic"), empty()).await, Err(SendError::Ended(_))));
    let cut = client.send(&get("/cut"), empty()).await.unwrap().into_body().collect().await;
    assert!(cut.is_err());
    assert_eq!(text(client.send(&get("/"), empty()).await.unwrap()).await, "fine");
    assert_eq!(client.load(), Some(0));
    end(scope).await;
}

#[tokio::test]
async fn going_away_loses_nothing() {
    for server_goes in [true, false] {
        let scope = Scope::new();
        let (release, held) = tokio::sync::watch::channel(false);
        let answer = move |_request: Request<Body>| {
            let mut held = held.clone();
            async move {
                held.wait_for(|free| *free).await.unwrap();
                Response::new(full("late"))
            }
        };
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let server = scope.part();
        serve_pipe(&server, &clock(), theirs, answer);
        let client = connect(ours, "test".into(), clock(), &scope);
        let head = get("/");
        let mut asked = std::pin::pin!(client.send(&head, empty()));
        assert!(futures::poll!(asked.as_mut()).is_pending());
        if server_goes {
            server.drain()
        } else {
            client.go_away()
        }
        while client.load().is_some() {
            tokio::task::yield_now().await;
        }
        assert!(matches!(client.send(&get("/2"), empty()).await, Err(SendError::NotSent(_))));
        release.send(true).unwrap();
        assert_eq!(text(asked.await.unwrap()).await, "late");
        server.drain();
        server.finished(Duration::from_secs(5)).await.unwrap();
        end(scope).await;
    }
}

/// Puts `bytes` to a server, which then hears that no more will come; returns all that it says until it hangs up.
async fn answer_to(bytes: &[u8], how: Leave) -> Vec<u8> {
    let scope = Scope::new();
    let (mut ours, theirs) = tokio::io::duplex(1024 * 1024);
    serve_pipe(&scope, &clock(), theirs, async |_request: Request<Body>| Response::new(full("answer")));
    ours.write_all(bytes).await.unwrap();
    match how {
        Leave::InOrder => ours.write_all(&raw(6, 0, &[])).await.unwrap(),
        Leave::Abruptly => ours.shutdown().await.unwrap(),
    }
    let mut said = Vec::new();
    ours.read_to_end(&mut said).await.unwrap();
    end(scope).await;
    said
}

#[derive(Clone, Copy)]
enum Leave {
    InOrder,
    Abruptly,
}

fn raw(kind: u8, exchange: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    out.put_uint(payload.len() as u64, 3);
    out.put_u8(kind);
    out.put_u32(exchange);
    out.put_slice(payload);
    out.to_vec()
}

fn request_frame(id: u32, ends: bool) -> Vec<u8> {
    let mut out = BytesMut::new();
    frame::put_request(&mut out, id, &get("/"), ends).unwrap();
    out.to_vec()
}

#[tokio::test]
async fn gateway_31_a_peer_that_breaks_the_protocol_is_hung_up_on() {
    let whole = |parts: &[Vec<u8>]| parts.concat();
    for (what, bytes) in [
        ("unknown kind", raw(0x7f, 1, &[])),
        ("too long for its kind", raw(Kind::Ping as u8, 0, &[0])),
        ("longer than any frame", [0xff, 0xff, 0xff, 2, 0, 0, 0, 1].to_vec()),
        ("exchange zero", raw(2, 0, b"x")),
        ("data of an exchange that never was", raw(2, 5, b"x")),
        ("numbers that jump", request_frame(2, true)),
        ("numbers again", whole(&[request_frame(1, true), request_frame(1, true)])),
        ("a response to a server", raw(1, 1, &[0, 200, 0])),
        (
            "data beyond the window",
            whole(&[request_frame(1, false), raw(2, 1, &[0; 16 * 1024]), raw(2, 1, &[0])]),
        ),
        ("more credit than can be", whole(&[request_frame(1, false), raw(5, 1, &[0xff; 4])])),
        ("a request after going away", whole(&[raw(6, 0, &[]), request_frame(1, true)])),
        ("an unknown reset", whole(&[request_frame(1, false), raw(0x84, 1, &[9])])),
        ("too many at once", (1..=129).flat_map(|id| request_frame(id, false)).collect()),
    ] {
        // What it had asked before may be answered or not; what matters is that nothing more is read.
        let again = whole(&[bytes, request_frame(1, true)]);
        let said = answer_to(&again, Leave::InOrder).await;
        let answers = said.windows(6).filter(|window| *window == b"answer").count();
        assert!(answers <= 1, "{what}: {answers} answers");
    }
    let said = answer_to(&request_frame(1, true), Leave::InOrder).await;
    assert!(said.windows(6).any(|window| window == b"answer"));
}

#[tokio::test]
async fn security_26_a_flood_of_resets_and_pings_is_not_held() {
    let mut flood = Vec::new();
    for id in 1..=5000 {
        flood.extend(request_frame(id, true));
        flood.extend(raw(0x84, id, &[0]));
        flood.extend(raw(7, 0, &[]));
    }
    flood.extend(request_frame(5001, true));
    let said = answer_to(&flood, Leave::InOrder).await;
    assert!(said.windows(6).any(|window| window == b"answer"));
    // One pong at most for each write, and no answer to what was given up in the same breath.
    assert!(said.len() < 5000 * 8, "{} bytes", said.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_of_a_peer_panic_or_hang(bytes in proptest::collection::vec(any::<u8>(), 0..400), valid in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut all = if valid { request_frame(1, false) } else { Vec::new() };
        all.extend(bytes);
        runtime.block_on(answer_to(&all, Leave::Abruptly));
    }
}
