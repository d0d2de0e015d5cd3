//! HTTP/1.1 at the edges, against hyper as the independent other side and against bytes that no client sends.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "this whole file is a test: clippy knows test functions, not the helpers around them"
)]

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use identity::Scope;
use identity::clock::{ManualClock, SharedClock};
use sidecar::http1::{Client, ClientError, Ended, HeadError, serve};
use sidecar::overload::{self, Budget, Overload, Readings};
use sidecar::server::Limits;
use sidecar::{Body, BoxError, full};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Sizes around every threshold: none, small, copied, gathered, whole, streamed.
const SIZES: [usize; 12] =
    [0, 1, 100, 4_000, 5_000, 16_384, 16_385, 65_535, 65_536, 65_537, 200_000, 3_000_000];

fn pattern(len: usize) -> Bytes {
    (0..len).map(|at| (at % 251) as u8).collect::<Vec<_>>().into()
}

/// A body that streams: `pieces` frames, then `trailers`.
fn streamed(bytes: Bytes, pieces: usize, trailers: Option<HeaderMap>) -> Body {
    let piece = bytes.len().div_ceil(pieces.max(1)).max(1);
    let mut frames: Vec<Result<Frame<Bytes>, BoxError>> =
        bytes.chunks(piece).map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
    frames.extend(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
    let frames = stream::iter(frames).then(|frame| async {
        tokio::task::yield_now().await;
        frame
    });
    Body::new(StreamBody::new(frames))
}

fn trailers() -> HeaderMap {
    HeaderMap::from_iter([("x-sum".parse().unwrap(), HeaderValue::from_static("1"))])
}

/// Our server.
struct Server {
    address: SocketAddr,
    scope: Scope,
    ended: Arc<Mutex<Vec<String>>>,
}

impl Server {
    async fn start<F, A>(service: F) -> Self
    where
        F: Fn(Request<Body>) -> A + Clone + Send + 'static,
        A: Future<Output = Response<Body>> + Send + 'static,
    {
        Self::within(Limits::default(), service).await
    }

    async fn within<F, A>(limits: Limits, service: F) -> Self
    where
        F: Fn(Request<Body>) -> A + Clone + Send + 'static,
        A: Future<Output = Response<Body>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (scope, ended) = (Scope::new(), Arc::new(Mutex::new(Vec::new())));
        let server = Self { address, scope: scope.clone(), ended: Arc::clone(&ended) };
        scope.clone().spawn("listener", async move {
            loop {
                let (stream, _) = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap(),
                    () = scope.draining() => return,
                };
                let (service, connections, ended) = (service.clone(), scope.clone(), Arc::clone(&ended));
                let limits = limits.clone();
                scope.spawn("connection", async move {
                    let (reader, writer) = stream.into_split();
                    let how = serve(reader, writer, &limits, &connections, pending(), service).await;
                    ended.lock().unwrap().push(match how {
                        Ended::Closed => "closed".to_owned(),
                        Ended::Refused(error) => format!("{error:?}"),
                        Ended::BadBody => "bad body".to_owned(),
                        Ended::TooSlow => "too slow".to_owned(),
                        Ended::Http2(_) => "http2".to_owned(),
                    });
                });
            }
        });
        server
    }

    /// Everything that is answered to `bytes`, until we end the connection.
    async fn says(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut said = Vec::new();
        // A reset after the answer is as good an end as any.
        let _read = stream.read_to_end(&mut said).await;
        String::from_utf8_lossy(&said).into_owned()
    }
}

async fn echo(request: Request<Body>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    match body.collect().await {
        Ok(body) => {
            let trailers = body.trailers().cloned();
            let mut response = Response::new(Body::from(body.to_bytes()));
            let headers = response.headers_mut();
            headers.insert("x-method", parts.method.as_str().parse().unwrap());
            headers.insert("x-target", parts.uri.to_string().parse().unwrap());
            if let Some(trailers) = trailers {
                headers.insert("x-trailer", trailers["x-sum"].clone());
            }
            response
        }
        Err(_) => status(StatusCode::BAD_GATEWAY),
    }
}

fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

type HyperClient = hyper::client::conn::http1::SendRequest<Body>;

async fn hyper_client(address: SocketAddr, scope: &Scope) -> HyperClient {
    let stream = TcpStream::connect(address).await.unwrap();
    let (client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    scope.spawn("hyper", async move {
        let _ended = connection.with_upgrades().await;
    });
    client
}

fn request(method: &str, body: Body) -> Request<Body> {
    Request::builder().method(method).uri("/a?b=c").header(HOST, "app").body(body).unwrap()
}

/// A hyper server; counts its connections.
async fn hyper_server<F, A>(scope: &Scope, service: F) -> (SocketAddr, Arc<AtomicUsize>)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Body>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let (counted, scope) = (Arc::clone(&connections), scope.clone());
    scope.clone().spawn("hyper", async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            let service = service.clone();
            let service = hyper::service::service_fn(move |request| {
                let answer = service(request);
                async { Ok::<_, Infallible>(answer.await) }
            });
            scope.spawn("hyper connection", async move {
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades();
                let _ended = connection.await;
            });
        }
    });
    (address, connections)
}

/// An app that says `answers` to one connection each, whatever it is asked, and then closes it.
async fn scripted(scope: &Scope, answers: Vec<&'static str>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    scope.spawn("app", async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 4096];
            let _asked = stream.read(&mut asked).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn hyper_gets_its_bodies_back_from_our_server() {
    let server = Server::start(echo).await;
    let mut client = hyper_client(server.address, &server.scope).await;
    for size in SIZES {
        for pieces in [0, 1, 5] {
            client.ready().await.unwrap();
            let body = match pieces {
                0 => Body::from(pattern(size)),
                _ => streamed(pattern(size), pieces, (pieces == 5).then(trailers)),
            };
            let mut asked = request("POST", body);
            asked.headers_mut().insert("trailer", HeaderValue::from_static("x-sum"));
            let response = client.send_request(asked).await.unwrap();
            assert_eq!(response.headers()["x-method"], "POST");
            assert_eq!(response.headers()["x-target"], "/a?b=c");
            assert_eq!(response.headers()[CONTENT_LENGTH], size.to_string());
            assert_eq!(response.headers().contains_key("x-trailer"), pieces == 5);
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), pattern(size));
        }
    }
    server.scope.drain();
}

#[tokio::test]
async fn hyper_reads_the_streams_of_our_server() {
    let server = Server::start(|asked: Request<Body>| async move {
        let size: usize = asked.uri().path()[1..].parse().unwrap();
        Response::new(streamed(pattern(size), 7, Some(trailers())))
    })
    .await;
    let mut client = hyper_client(server.address, &server.scope).await;
    for size in SIZES {
        client.ready().await.unwrap();
        let asked = Request::get(format!("/{size}")).header(HOST, "app").header("te", "trailers");
        let response = client.send_request(asked.body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(response.headers()[TRANSFER_ENCODING], "chunked");
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["x-sum"], "1");
        assert_eq!(body.to_bytes(), pattern(size));
    }
}

#[tokio::test]
async fn our_client_gets_its_bodies_back_from_hyper() {
    let scope = Scope::new();
    let (address, connections) = hyper_server(&scope, |asked| async move {
        let trailers = asked.headers().get("x-pieces").is_some_and(|pieces| pieces == "5");
        let body = asked.into_body().collect().await.unwrap();
        let mut response = match trailers {
            true => {
                let trailers = body.trailers().cloned();
                Response::new(streamed(body.to_bytes(), 3, trailers))
            }
            false => Response::new(Body::from(body.to_bytes())),
        };
        response.headers_mut().insert("trailer", HeaderValue::from_static("x-sum"));
        response
    })
    .await;
    let client = Client::new(address, &scope);
    for size in SIZES {
        for pieces in [0, 1, 5] {
            let body = match pieces {
                0 => Body::from(pattern(size)),
                _ => streamed(pattern(size), pieces, (pieces == 5).then(trailers)),
            };
            let mut asked = request("POST", body);
            asked.headers_mut().insert("x-pieces", HeaderValue::from(pieces));
            asked.headers_mut().insert("te", HeaderValue::from_static("trailers"));
            let response = client.send(asked).await.unwrap();
            let body = response.into_body().collect().await.unwrap();
            assert_eq!(body.trailers().is_some(), pieces == 5, "{size} {pieces}");
            assert_eq!(body.to_bytes(), pattern(size), "{size} {pieces}");
        }
    }
    assert_eq!(connections.load(Ordering::Relaxed), 1, "one connection carried all of it");
}

#[tokio::test]
async fn our_client_gets_its_bodies_back_from_our_server() {
    let server = Server::start(echo).await;
    let client = Client::new(server.address, &server.scope);
    for size in SIZES {
        for pieces in [0, 1, 9] {
            let body = match pieces {
                0 => Body::from(pattern(size)),
                _ => streamed(pattern(size), pieces, Some(trailers())),
            };
            let response = client.send(request("PUT", body)).await.unwrap();
            assert_eq!(response.headers().contains_key("x-trailer"), pieces > 0);
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), pattern(size));
        }
    }
}

#[tokio::test]
async fn trailers_that_came_with_their_body_go_on_and_so_does_the_connection() {
    let scope = Scope::new();
    let (app, _) = hyper_server(&scope, |asked| async move {
        let body = asked.into_body().collect().await.unwrap();
        let mut answer = status(StatusCode::OK);
        if let Some(trailers) = body.trailers() {
            answer.headers_mut().insert("x-trailer", trailers["x-sum"].clone());
        }
        answer
    })
    .await;
    let client = Arc::new(Client::new(app, &scope));
    let server = Server::start(move |asked| {
        let client = Arc::clone(&client);
        async move { client.send(asked).await.unwrap() }
    })
    .await;
    let said = server
        .says(
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx-sum: 7\r\n\r\n\
              GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        )
        .await;
    assert_eq!(said.matches("HTTP/1.1 200 ").count(), 2, "{said}");
    assert_eq!(said.matches("x-trailer: 7").count(), 1, "{said}");
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let server = Server::start(echo).await;
    let mut bytes = Vec::new();
    for at in 0..200 {
        let body = "x".repeat(at);
        bytes.extend_from_slice(
            format!("POST /{at} HTTP/1.1\r\nhost: a\r\ncontent-length: {at}\r\n\r\n{body}").as_bytes(),
        );
        bytes.extend_from_slice(
            format!(
                "POST /c{at} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
            )
            .as_bytes(),
        );
    }
    bytes.extend_from_slice(b"GET /last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    let said = server.says(&bytes).await;
    let targets: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("x-target: ")).collect();
    let expected: Vec<String> =
        (0..200).flat_map(|at| [format!("/{at}"), format!("/c{at}")]).chain(["/last".to_owned()]).collect();
    assert_eq!(targets, expected);
    assert!(said.ends_with("connection: close\r\n\r\n"), "{said}");
}

#[tokio::test]
async fn gateway_30_security_21_ambiguous_requests_get_one_refusal_and_the_end() {
    let server = Server::start(echo).await;
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    for (head, expected) in [
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\ncontent-length: 0\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0 \r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\nhost: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost : a\r\n\r\n", 400),
        ("GET /\r\n\r\n", 400),
        ("GET / HTTP/1.0\r\nhost: a\r\n\r\n", 505),
        ("\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01\n", 400),
    ] {
        let said = server.says(format!("{head}{smuggled}").as_bytes()).await;
        assert!(said.starts_with(&format!("HTTP/1.1 {expected} ")), "{head:?}: {said}");
        assert!(said.contains("\r\nconnection: close\r\n"), "{head:?}: {said}");
        assert_eq!(said.matches("HTTP/1.1 ").count(), 1, "{head:?}: {said}");
    }
    // What follows a body has to begin a request.
    let said = server.says(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nab\r\n\r\n").await;
    assert!(said.starts_with("HTTP/1.1 200 OK") && said.contains("HTTP/1.1 400 "), "{said}");
    let said = server
        .says(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n\r\n\r\n")
        .await;
    assert!(said.starts_with("HTTP/1.1 200 OK") && said.contains("HTTP/1.1 400 "), "{said}");
}

#[tokio::test]
async fn over_long_heads_are_refused_by_their_own_status() {
    let server = Server::start(echo).await;
    let line = format!("GET /{} HTTP/1.1\r\n", "a".repeat(20_000));
    assert!(server.says(line.as_bytes()).await.starts_with("HTTP/1.1 414 "));
    let large = format!("GET / HTTP/1.1\r\nx: {}\r\n", "a".repeat(70_000));
    assert!(server.says(large.as_bytes()).await.starts_with("HTTP/1.1 431 "));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "x: a\r\n".repeat(101));
    assert!(server.says(many.as_bytes()).await.starts_with("HTTP/1.1 431 "));
    assert!(server.ended.lock().unwrap().contains(&format!("{:?}", HeadError::TargetTooLong)));
}

#[tokio::test]
async fn a_client_that_expects_to_be_told_is_told_when_its_body_is_wanted() {
    let server = Server::start(|asked: Request<Body>| async move {
        match asked.uri().path() {
            "/refused" => status(StatusCode::FORBIDDEN),
            _ => echo(asked).await,
        }
    })
    .await;
    let head = |path| {
        format!("POST {path} HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n")
    };
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(head("/").as_bytes()).await.unwrap();
    let mut interim = [0; 25];
    stream.read_exact(&mut interim).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"abc").await.unwrap();
    stream.write_all(head("/refused").as_bytes()).await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert!(said.starts_with("HTTP/1.1 200 OK\r\n") && said.contains("\r\n\r\nabcHTTP/1.1 403 "), "{said}");
    // The body may or may not come now: only a new connection is clear.
    assert!(said.ends_with("connection: close\r\n\r\n"), "{said}");
}

#[tokio::test]
async fn answers_without_bodies_have_none_and_keep_their_length() {
    let server = Server::start(|asked: Request<Body>| async move {
        let code: u16 = asked.uri().path()[1..].parse().unwrap();
        let mut response = Response::new(full("body that must not be sent"));
        *response.status_mut() = StatusCode::from_u16(code).unwrap();
        if asked.method() == Method::HEAD {
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(77));
        }
        response
    })
    .await;
    let said = server
        .says(
            b"HEAD /200 HTTP/1.1\r\nhost: a\r\n\r\nGET /204 HTTP/1.1\r\nhost: a\r\n\r\n\
              GET /304 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        )
        .await;
    assert_eq!(
        said,
        "HTTP/1.1 200 OK\r\ncontent-length: 77\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n\
         HTTP/1.1 304 Not Modified\r\ncontent-length: 26\r\nconnection: close\r\n\r\n"
    );
}

#[tokio::test]
async fn a_body_that_nobody_reads_ends_the_connection_after_the_answer() {
    let server = Server::start(|_| async { status(StatusCode::FORBIDDEN) }).await;
    let mut bytes = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n".to_vec();
    bytes.extend_from_slice(&pattern(200_000));
    bytes.extend_from_slice(b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n");
    let said = server.says(&bytes).await;
    assert_eq!(said, "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
}

#[tokio::test]
async fn an_answer_cannot_be_longer_or_shorter_than_it_says() {
    let server = Server::start(|asked: Request<Body>| async move {
        let mut response = Response::new(streamed(pattern(100), 4, None));
        let length = asked.uri().path()[1..].parse::<u64>().unwrap();
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
        response
    })
    .await;
    let mut client = hyper_client(server.address, &server.scope).await;
    let exact = client.send_request(Request::get("/100").body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!(exact.into_body().collect().await.unwrap().to_bytes(), pattern(100));
    for wrong in ["/99", "/101"] {
        let mut client = hyper_client(server.address, &server.scope).await;
        let answer = client.send_request(Request::get(wrong).body(Body::empty()).unwrap()).await;
        let whole = match answer {
            Ok(answer) => answer.into_body().collect().await.is_ok(),
            Err(_) => false,
        };
        assert!(!whole, "{wrong}");
    }
}

#[tokio::test]
async fn frames_of_a_stream_go_out_one_by_one_and_its_end_is_seen_when_the_client_goes() {
    let (events, source) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
    let source = Arc::new(Mutex::new(Some(source)));
    let server = Server::start(move |_| {
        let source = source.lock().unwrap().take().unwrap();
        let source = stream::unfold(source, |mut source| async { Some((source.recv().await?, source)) });
        async { Response::new(Body::new(StreamBody::new(source))) }
    })
    .await;
    let mut client = hyper_client(server.address, &server.scope).await;
    let asked = Request::get("/").header(HOST, "a").body(Body::empty()).unwrap();
    let mut heard = client.send_request(asked).await.unwrap().into_body();
    for at in 0..3 {
        // The next event exists only after this one has been heard.
        let event = Bytes::from(format!("event {at}\n"));
        events.send(Ok(Frame::data(event.clone()))).await.unwrap();
        assert_eq!(heard.frame().await.unwrap().unwrap().into_data().unwrap(), event);
    }
    drop((heard, client));
    events.closed().await;
}

#[tokio::test]
async fn work_for_a_client_that_has_gone_is_dropped() {
    let (working, mut started) = mpsc::channel::<mpsc::Sender<()>>(1);
    let server = Server::start(move |_| {
        let working = working.clone();
        async move {
            let (alive, mut dead) = mpsc::channel::<()>(1);
            working.send(alive).await.unwrap();
            // Ends never: it can only be dropped.
            let _never = dead.recv().await;
            std::future::pending().await
        }
    })
    .await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let alive = started.recv().await.unwrap();
    drop(stream);
    alive.closed().await;
}

#[tokio::test]
async fn draining_ends_idle_connections_at_once_and_busy_ones_after_their_answer() {
    let (working, mut started) = mpsc::channel::<tokio::sync::oneshot::Sender<()>>(1);
    let server = Server::start(move |asked: Request<Body>| {
        let working = working.clone();
        async move {
            if asked.uri().path() == "/slow" {
                let (release, released) = tokio::sync::oneshot::channel();
                working.send(release).await.unwrap();
                released.await.unwrap();
            }
            status(StatusCode::OK)
        }
    })
    .await;
    let mut idle = TcpStream::connect(server.address).await.unwrap();
    idle.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut answer = [0; 38];
    idle.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    let mut busy = TcpStream::connect(server.address).await.unwrap();
    busy.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let release = started.recv().await.unwrap();
    server.scope.drain();
    let mut said = String::new();
    idle.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "");
    release.send(()).unwrap();
    busy.read_to_string(&mut said).await.unwrap();
    assert!(said.contains("connection: close"), "{said}");
    server.scope.finished(Duration::from_secs(5)).await.unwrap();
}

/// A process with no descriptors left.
struct Full;

impl Readings for Full {
    fn resident_bytes(&mut self) -> io::Result<u64> {
        Ok(0)
    }

    fn descriptors(&mut self) -> io::Result<u64> {
        Ok(1024)
    }
}

#[tokio::test]
async fn a_connection_that_ends_for_want_of_descriptors_says_which_answer_is_its_last() {
    let overload = Arc::new(Overload::default());
    let limits = Limits { overload: Some(Arc::clone(&overload)), ..Limits::default() };
    let server = Server::within(limits, async |_| status(StatusCode::OK)).await;
    let mut kept = TcpStream::connect(server.address).await.unwrap();
    let mut ask = async || {
        kept.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            assert_ne!(kept.read_buf(&mut answer).await.unwrap(), 0, "closed without a word");
        }
        String::from_utf8(answer).unwrap()
    };
    assert!(!ask().await.contains("connection: close"));
    let clock = ManualClock::at(Duration::from_secs(1));
    let budget = Budget { memory_bytes: None, descriptors: Some(1024) };
    overload::watch(overload, budget, Full, Arc::clone(&clock) as SharedClock, &server.scope);
    for _ in 0..1000 {
        clock.advance(Duration::from_secs(1));
        if ask().await.contains("connection: close") {
            server.scope.drain();
            return server.scope.finished(Duration::from_secs(5)).await.unwrap();
        }
    }
    panic!("the connection was never relieved");
}

#[tokio::test]
async fn http2_by_prior_knowledge_is_handed_on_unread() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let scope = Scope::new();
    let serving = scope.clone();
    scope.spawn("server", async move {
        let (reader, writer) = listener.accept().await.unwrap().0.into_split();
        let Ended::Http2(stream) = serve(reader, writer, &Limits::default(), &serving, pending(), echo).await
        else {
            panic!("not HTTP/2");
        };
        let service = hyper::service::service_fn(|_: Request<Incoming>| async {
            Ok::<_, Infallible>(status(StatusCode::IM_A_TEAPOT))
        });
        hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service)
            .await
            .unwrap();
    });
    let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut client, connection) = hyper::client::conn::http2::handshake(executor, stream).await.unwrap();
    scope.spawn("client", async move { connection.await.unwrap() });
    let asked = Request::get("http://a/").body(Body::empty()).unwrap();
    assert_eq!(client.send_request(asked).await.unwrap().status(), StatusCode::IM_A_TEAPOT);
}

/// What the app on the other side of a tunnel does: says who it is, then everything back in capitals.
async fn shout(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin) {
    stream.write_all(b"hello,").await.unwrap();
    let mut said = [0; 1024];
    while let Ok(read @ 1..) = stream.read(&mut said).await {
        stream.write_all(&said[..read].to_ascii_uppercase()).await.unwrap();
    }
    stream.shutdown().await.unwrap();
}

#[tokio::test]
async fn an_upgrade_passes_through_both_edges() {
    let scope = Scope::new();
    let app_scope = scope.clone();
    let (app, _) = hyper_server(&scope, move |mut asked: Request<Incoming>| {
        let scope = app_scope.clone();
        async move {
            if asked.headers().get(UPGRADE).is_none_or(|protocol| protocol != "shout") {
                return status(StatusCode::BAD_REQUEST);
            }
            let upgraded = hyper::upgrade::on(&mut asked);
            scope.spawn("app", async move { shout(TokioIo::new(upgraded.await.unwrap())).await });
            Response::builder()
                .status(StatusCode::SWITCHING_PROTOCOLS)
                .header(CONNECTION, "upgrade")
                .header(UPGRADE, "shout")
                .body(Body::empty())
                .unwrap()
        }
    })
    .await;
    let client = Arc::new(Client::new(app, &scope));
    let server = Server::start(move |asked| {
        let client = Arc::clone(&client);
        async move { client.send(asked).await.unwrap() }
    })
    .await;

    let mut client = hyper_client(server.address, &server.scope).await;
    let asked = Request::get("/").header(HOST, "a").header(CONNECTION, "upgrade").header(UPGRADE, "shout");
    let mut answer = client.send_request(asked.body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(answer.headers()[UPGRADE], "shout");
    let mut tunnel = TokioIo::new(hyper::upgrade::on(&mut answer).await.unwrap());
    tunnel.write_all(b"one two").await.unwrap();
    let mut heard = [0; 13];
    tunnel.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"hello,ONE TWO");
    // Our end is heard, and what is still said after it arrives.
    tunnel.write_all(b" three").await.unwrap();
    tunnel.shutdown().await.unwrap();
    let mut rest = String::new();
    tunnel.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, " THREE");

    // Without the switch it is a request like any other, and so is the next.
    let mut client = hyper_client(server.address, &server.scope).await;
    for _ in 0..2 {
        client.ready().await.unwrap();
        let asked =
            Request::get("/").header(HOST, "a").header(CONNECTION, "upgrade").header(UPGRADE, "other");
        let answer = client.send_request(asked.body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    }
}

#[tokio::test]
async fn security_25_early_data_of_an_upgrade_that_is_refused_is_no_request() {
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&seen);
    let server = Server::start(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
        async { status(StatusCode::FORBIDDEN) }
    })
    .await;
    let said = server
        .says(
            b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n\
              GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n",
        )
        .await;
    assert_eq!(said.matches("HTTP/1.1 403 ").count(), 1, "{said}");
    assert!(said.contains("connection: close"), "{said}");
    assert_eq!(seen.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_switch_that_nobody_asked_for_is_no_answer() {
    let server = Server::start(|_| async { status(StatusCode::SWITCHING_PROTOCOLS) }).await;
    let said = server.says(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(said.starts_with("HTTP/1.1 502 "), "{said}");
    let scope = Scope::new();
    let app = scripted(&scope, vec!["HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"]).await;
    let answer = Client::new(app, &scope).send(request("GET", Body::empty())).await;
    assert!(matches!(answer, Err(ClientError::Switch)), "{answer:?}");
}

#[tokio::test]
async fn security_21_answers_that_are_ambiguous_are_none() {
    let scope = Scope::new();
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nabc",
        "HTTP/1.1 200 OK\ncontent-length: 3\n\nabc",
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nx: a",
        "<html>",
    ] {
        let app = scripted(&scope, vec![answer]).await;
        let got = Client::new(app, &scope).send(request("GET", Body::empty())).await;
        let whole = match got {
            Ok(got) => got.into_body().collect().await.is_ok(),
            Err(_) => false,
        };
        assert!(!whole, "{answer:?}");
    }
    let flood: &'static str = "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(50).leak();
    let app = scripted(&scope, vec![flood]).await;
    let got = Client::new(app, &scope).send(request("GET", Body::empty())).await;
    assert!(matches!(got, Err(ClientError::Interim)), "{got:?}");
}

#[tokio::test]
async fn answers_end_where_they_say_and_what_follows_is_never_the_next_one() {
    let scope = Scope::new();
    let evil = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
    for first in [
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\nabc",
    ] {
        let both: &'static str = format!("{first}{evil}").leak();
        let app = scripted(&scope, vec![both, "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ngood"]).await;
        let client = Client::new(app, &scope);
        let answer = client.send(request("GET", Body::empty())).await.unwrap();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(body.is_empty() || body == "abc", "{first:?}");
        let answer = client.send(request("GET", Body::empty())).await.unwrap();
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "good", "{first:?}");
    }
    // The body of an answer to HEAD is one that nobody asked for.
    let app = scripted(&scope, vec![evil, "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"]).await;
    let client = Client::new(app, &scope);
    for length in ["4", "9"] {
        let answer = client.send(request("HEAD", Body::empty())).await.unwrap();
        assert_eq!(answer.headers()[CONTENT_LENGTH], length);
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "");
    }
}

#[tokio::test]
async fn old_and_closing_apps_are_understood() {
    let scope = Scope::new();
    for answer in [
        "HTTP/1.0 200 OK\r\n\r\nwhole",
        "HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nwhole",
        "HTTP/1.1 200\r\nconnection: close\r\n\r\nwhole",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 200 OK\r\n\r\nwhole",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nwh\r\n3;x=y\r\nole\r\n0\r\n\r\n",
    ] {
        let app = scripted(&scope, vec![answer, answer]).await;
        let client = Client::new(app, &scope);
        for _ in 0..2 {
            let got = client.send(request("GET", Body::empty())).await.unwrap();
            assert_eq!(got.status(), StatusCode::OK);
            assert_eq!(got.into_body().collect().await.unwrap().to_bytes(), "whole", "{answer:?}");
        }
    }
}

/// An app that answers the first request of a connection, and reads the second before it closes.
async fn app_that_closes_on_the_second(scope: &Scope) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    scope.spawn("app", async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 4096];
            let _first = stream.read(&mut asked).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            let _second = stream.read(&mut asked).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn a_request_that_met_a_closed_connection_is_repeated_only_if_that_does_no_harm() {
    let scope = Scope::new();
    for (method, body, outcome) in [
        ("GET", Body::empty(), Ok(())),
        ("PUT", full("whole"), Ok(())),
        ("DELETE", Body::empty(), Ok(())),
        ("POST", full("whole"), Err("not idempotent")),
        ("PATCH", full("whole"), Err("not idempotent")),
        ("PUT", streamed(pattern(10), 2, None), Err("its body streams")),
    ] {
        let app = app_that_closes_on_the_second(&scope).await;
        let client = Client::new(app, &scope);
        client.send(request("GET", Body::empty())).await.unwrap();
        match (client.send(request(method, body)).await, outcome) {
            (Ok(answer), Ok(())) => assert_eq!(answer.status(), StatusCode::OK),
            (Err(error @ ClientError::Closed(_)), Err(why)) => {
                assert!(error.to_string().contains(why), "{method}: {error}");
            }
            (got, _) => panic!("{method}: {got:?}"),
        }
    }
    // A fresh connection that is closed has not been idle: that is no accident.
    let app = scripted(&scope, vec![""]).await;
    let got = Client::new(app, &scope).send(request("GET", Body::empty())).await;
    assert!(got.unwrap_err().to_string().contains("fresh"));
}

#[tokio::test]
async fn an_app_that_is_not_there_is_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = Client::new(address, &Scope::new()).send(request("GET", Body::empty())).await.unwrap_err();
    assert!(error.is_connect(), "{error}");
}

#[tokio::test]
async fn an_answer_that_comes_before_its_request_is_sent_is_seen() {
    let scope = Scope::new();
    let (address, _) = hyper_server(&scope, |asked| async move {
        match asked.uri().path() {
            // Answers at once, and goes on with what it is sent.
            "/echo" => Response::new(Body::from(asked.into_body())),
            _ => status(StatusCode::PAYLOAD_TOO_LARGE),
        }
    })
    .await;
    let client = Client::new(address, &scope);
    let (frames, source) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(1);
    let source = stream::unfold(source, |mut source| async { Some((source.recv().await?, source)) });
    let body = Body::new(StreamBody::new(source));
    let asked = Request::post("/echo").header(HOST, "a").body(body).unwrap();
    let mut answer = client.send(asked).await.unwrap().into_body();
    for word in ["one", "two", "three"] {
        frames.send(Ok(Frame::data(Bytes::from(word)))).await.unwrap();
        assert_eq!(answer.frame().await.unwrap().unwrap().into_data().unwrap(), word);
    }
    drop(frames);
    assert!(answer.frame().await.is_none());

    let endless = stream::repeat_with(|| Ok::<_, BoxError>(Frame::data(pattern(10_000))));
    let answer = client.send(request("POST", Body::new(StreamBody::new(endless)))).await.unwrap();
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn a_request_whose_body_fails_is_not_finished_by_us() {
    let scope = Scope::new();
    let (address, _) = hyper_server(&scope, |asked| async move {
        let whole = asked.into_body().collect().await.is_ok();
        status(if whole { StatusCode::OK } else { StatusCode::BAD_REQUEST })
    })
    .await;
    let client = Client::new(address, &scope);
    let frames = stream::iter([Ok(Frame::data(pattern(10))), Err(BoxError::from("cut"))]);
    let got = client.send(request("POST", Body::new(StreamBody::new(frames)))).await;
    assert!(matches!(got, Err(ClientError::Request(_))), "{got:?}");
    // Nor is one that is longer or shorter than it says.
    for (length, size) in [(5, 10), (15, 10)] {
        let mut asked = request("POST", streamed(pattern(size), 3, None));
        asked.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
        let got = client.send(asked).await;
        assert!(matches!(got, Err(ClientError::Request(_))), "{got:?}");
    }
}

#[tokio::test]
async fn what_frames_a_request_is_written_by_the_client_alone() {
    let scope = Scope::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::new(listener.local_addr().unwrap(), &scope);
    let mut asked = request("POST", full("abc"));
    for (name, value) in [
        ("content-length", "7"),
        ("transfer-encoding", "chunked"),
        ("connection", "close"),
        ("expect", "100-continue"),
        ("keep-alive", "timeout=5"),
        ("x-kept", "kept"),
    ] {
        asked.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    let app = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = vec![0; 4096];
        let read = stream.read(&mut asked).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        String::from_utf8(asked[..read].to_vec()).unwrap()
    };
    let (answer, wire) = tokio::join!(client.send(asked), app);
    answer.unwrap();
    assert_eq!(wire, "POST /a?b=c HTTP/1.1\r\nhost: app\r\nx-kept: kept\r\ncontent-length: 3\r\n\r\nabc");
}
