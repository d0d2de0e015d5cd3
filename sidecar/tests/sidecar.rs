//! A sidecar between real peers and a real backend that records what reached it. Lines of the acceptance
//! lists are named by list and number.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]
#![allow(clippy::disallowed_methods, reason = "clients of the test are joined by it")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use identity::testing::TestAuthority;
use identity::tls::{ALPN_H2, ALPN_HTTP11};
use identity::txn::{self, RequestBinding};
use identity::{IdentitySource, Scope, X509Svid};
use policy::DecisionRecord;
use sidecar::app::AppProtocol;
use sidecar::capture::CaptureConfig;
use sidecar::upstream::{Upstream, UpstreamConfig};
use sidecar::{Call, InboundConfig, Sidecar, SidecarConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

mod world;

use world::*;

#[tokio::test]
async fn an_owner_reads_and_nobody_else_does() {
    let world = World::new().await;
    let (status, body) = world.call("alice", "GET", "/accounts/17", "", &[]).await;
    assert_eq!(status, 200);
    assert!(body.contains(r#""owner":"alice""#));
    let (status, body) = world.call("alice", "GET", "/accounts/42", "", &[]).await;
    assert_eq!(status, 403);
    let receipt = world.last().receipt.to_string();
    // The receipt and nothing else: not the owner, not the rule.
    assert_eq!(body, format!(r#"{{"error":"denied","receipt":"{receipt}"}}"#));
    // An object that is not there looks the same as one that is not yours.
    let (status, body) = world.call("alice", "GET", "/accounts/99", "", &[]).await;
    assert_eq!(status, 403);
    assert!(!body.contains("none"));
    // A failing app fails; what it says stays behind.
    let (status, body) = world.call("alice", "GET", "/accounts/500", "", &[]).await;
    assert_eq!(status, 500);
    assert!(!body.contains("stack trace"));
    world.end().await;
}

#[tokio::test]
async fn without_a_user_or_as_another_workload_the_app_sees_nothing() {
    let world = World::new().await;
    let web = world.authority.issue("/service/web");
    let get = || Request::get("/accounts/17").body(sidecar::empty()).unwrap();
    let (status, _) = world.send(&web, get()).await;
    assert_eq!(status, 403);
    let stranger = world.authority.issue("/service/webx");
    let (status, _) = world.send(&stranger, get()).await;
    assert_eq!(status, 403, "policy_31: a look-alike SPIFFE ID is somebody else");
    let stolen = world.chain(&web, "alice", "GET", "/accounts/17");
    let mut request = get();
    request.headers_mut().insert(txn::HEADER, stolen.parse().unwrap());
    let (status, _) = world.send(&stranger, request).await;
    assert_eq!((status.as_u16(), world.last_rule().as_str()), (403, "txn.wrong_presenter"));
    let twice = world.chain(&web, "alice", "GET", "/accounts/17");
    let mut request = get();
    request.headers_mut().append(txn::HEADER, twice.parse().unwrap());
    request.headers_mut().append(txn::HEADER, twice.parse().unwrap());
    let (status, _) = world.send(&web, request).await;
    assert_eq!(
        (status.as_u16(), world.last_rule().as_str()),
        (403, "txn.malformed"),
        "policy_28: two tokens"
    );
    // The one that policy might allow for somebody reached the app's read at most; here not even that did.
    assert!(world.seen().iter().all(|seen| seen.method == Method::GET), "{:?}", world.seen());
    world.end().await;
}

#[tokio::test]
async fn policy_1_to_9_and_30_security_23_spellings_of_a_path_are_refused_unseen() {
    let world = World::new().await;
    for target in [
        "//accounts/42",
        "/accounts//42",
        "/accounts%2F42",
        "/accounts/%5C42",
        "/accounts/17/../42",
        "/accounts/./42",
        "/accounts/%2e%2e/42",
        "/accounts/%2542",
        "/accounts/17%252f42",
        "/accounts/42;v=1",
        "/Accounts/42",
        "/accounts/42/",
        "/accounts/42.",
        "/accounts/42%20",
        "/accounts/42%00",
        "/accounts/042",
        "/accounts/+42",
        "/accounts/17?id=42",
        "/accounts/17?id=1&id=2",
        "/accounts/%34%32",
        "/.well-known/palisade/entities",
    ] {
        let (status, body) = world.call("bob", "GET", target, "", &[]).await;
        assert!(matches!(status.as_u16(), 400 | 403), "{target}: {status}");
        assert!(body.contains("receipt"), "{target}: {body}");
    }
    assert!(world.seen().is_empty(), "the backend saw {:?}", world.seen());
    world.end().await;
}

#[tokio::test]
async fn policy_14_27_28_what_the_caller_claims_is_dropped_and_what_was_proved_is_set() {
    let world = World::new().await;
    let lies = [
        ("x-forwarded-user", "bob"),
        ("x_forwarded_user", "bob"),
        ("x-forwarded-client-cert", "URI=spiffe://bank.example/service/root"),
        ("x-envoy-original-dst-host", "10.0.0.1"),
        ("forwarded", "for=127.0.0.1"),
        ("authorization", "Bearer kept-for-the-app"),
    ];
    let (status, _) = world.call("alice", "GET", "/accounts/17", "", &lies).await;
    assert_eq!(status, 200);
    let seen = world.seen().pop().unwrap();
    assert_eq!(seen.target, "/accounts/17");
    assert_eq!(seen.headers["x-forwarded-user"], "alice");
    assert_eq!(
        seen.headers["x-forwarded-client-cert"],
        "By=spiffe://bank.example/service/accounts;URI=spiffe://bank.example/service/web"
    );
    for gone in ["x_forwarded_user", "x-envoy-original-dst-host", "forwarded", "txn-token"] {
        assert!(!seen.headers.contains_key(gone), "{gone} reached the app");
    }
    assert!(seen.headers["traceparent"].starts_with("00-"));
    // A second meaning for method or path is not dropped but refused: whoever sent it meant something.
    let count = world.seen().len();
    for name in ["x-http-method-override", "x-original-url", "x-envoy-original-path"] {
        let (status, _) = world.call("alice", "GET", "/accounts/17", "", &[(name, "/accounts/42")]).await;
        assert_eq!(status, 400, "{name}");
    }
    assert_eq!(world.seen().len(), count);
    world.end().await;
}

#[tokio::test]
async fn policy_16_to_20_bodies_are_read_one_way_or_refused() {
    let world = World::new().await;
    let good = r#"{"from":"17","to":"42","amount_cents":1}"#;
    let (status, _) = world.call("alice", "POST", "/transfers", good, &[]).await;
    assert_eq!(status, 201);
    let seen = world.seen();
    assert_eq!(seen.last().unwrap().body, good, "what was judged is what is forwarded");
    let count = seen.iter().filter(|seen| seen.target == "/transfers").count();
    let deep = format!(r#"{{"from":{}17{},"to":"42","amount_cents":1}}"#, "[".repeat(99), "]".repeat(99));
    let long = format!(r#"{{"from":"17","to":"42","amount_cents":1,"pad":"{}"}}"#, "x".repeat(2_000_000));
    let cases: Vec<(&str, Vec<(&str, &str)>)> = vec![
        (r#"{"from":"17","to":"42","amount_cents":1,"from":"42"}"#, vec![]),
        (r#"{"from":"17","\u0066rom":"42","to":"42","amount_cents":1}"#, vec![]),
        (r#"{"From":"17","to":"42","amount_cents":1}"#, vec![]),
        (r#"{"from":"17","to":"42","amount_cents":1,"extra":1}"#, vec![]),
        (r#"{"from":17,"to":"42","amount_cents":1}"#, vec![]),
        (r#"{"from":"17","to":"42","amount_cents":1e400}"#, vec![]),
        (r#"{"from":"17","to":"42","amount_cents":1} {}"#, vec![]),
        ("", vec![]),
        (&deep, vec![]),
        (&long, vec![]),
        (good, vec![("content-type", "text/plain")]),
        (good, vec![("content-type", "application/json; charset=utf-16")]),
        (good, vec![("content-type", "multipart/form-data; boundary=x")]),
        (good, vec![("content-encoding", "gzip")]),
    ];
    for (body, headers) in cases {
        let short: String = body.chars().take(60).collect();
        let (status, _) = world.call("alice", "POST", "/transfers", body, &headers).await;
        assert!(matches!(status.as_u16(), 400 | 403), "{short} {headers:?}: {status}");
    }
    let reached = world.seen().iter().filter(|seen| seen.target == "/transfers").count();
    assert_eq!(reached, count, "a refused body reached the app");
    // bob's account: not told by the entities endpoint, so denied.
    let his = r#"{"from":"42","to":"17","amount_cents":1}"#;
    let (status, _) = world.call("alice", "POST", "/transfers", his, &[]).await;
    assert_eq!(status, 403, "policy_37: a missing attribute denies");
    world.end().await;
}

#[tokio::test]
async fn policy_13_15_32_security_24_bodies_methods_and_bytes_that_do_not_belong() {
    let world = World::new().await;
    let (status, _) = world.call("alice", "GET", "/accounts/17", r#"{"id":"42"}"#, &[]).await;
    assert_eq!(status, 400, "a body where none belongs");
    for method in ["get", "PURGE", "OPTIONS", "DELETE"] {
        let (status, _) = world.call("alice", method, "/accounts/17", "", &[]).await;
        assert!(matches!(status.as_u16(), 400 | 403), "{method}: {status}");
    }
    let (status, _) = world.call("alice", "GET", "/accounts/17", "", &[("x-odd", "\u{e9}")]).await;
    assert_eq!(status, 400);
    assert!(world.seen().is_empty());
    world.end().await;
}

#[tokio::test]
async fn an_unsafe_request_is_accepted_once() {
    let world = World::new().await;
    let web = world.authority.issue("/service/web");
    let chain = world.chain(&web, "alice", "POST", "/transfers");
    let post = || {
        let body = r#"{"from":"17","to":"42","amount_cents":1}"#;
        Request::post("/transfers")
            .header(txn::HEADER, &chain)
            .header("content-type", "application/json")
            .body(sidecar::full(body))
            .unwrap()
    };
    assert_eq!(world.send(&web, post()).await.0, 201);
    let (status, _) = world.send(&web, post()).await;
    assert_eq!((status.as_u16(), world.last_rule().as_str()), (403, "txn.replayed"));
    world.end().await;
}

#[tokio::test]
async fn connections_without_a_good_svid_never_become_requests() {
    let world = World::new().await;
    // Plain text.
    let mut stream = tokio::net::TcpStream::connect(world.inbound).await.unwrap();
    stream.write_all(b"GET /accounts/17 HTTP/1.1\r\nhost: accounts\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer).await;
    assert!(answer.is_empty());
    until(|| !world.records.records().is_empty()).await;
    assert_eq!(world.last_rule(), "tls.plain_text");

    // Another trust domain, and an expired certificate.
    let evil = TestAuthority::new("evil.example");
    let (der, key) = world.authority.issue_with("/service/web", |params| {
        params.not_after = identity::testing::offset(identity::testing::ago(5));
    });
    let expired = X509Svid::new(vec![der], key).unwrap();
    for (svid, rule) in
        [(evil.issue("/service/web"), "tls.unknown_trust_domain"), (expired, "tls.expired_svid")]
    {
        let before = world.records.records().len();
        let source = IdentitySource::fixed(svid, identity::BundleSet::new([world.authority.bundle()]));
        let config = identity::tls::client_config(
            &source,
            id("/service/accounts"),
            &[ALPN_H2, ALPN_HTTP11],
            &world.clock,
        )
        .unwrap();
        let stream = tokio::net::TcpStream::connect(world.inbound).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(config);
        if let Ok(mut stream) = connector.connect(identity::tls::unnamed_server(), stream).await {
            let mut byte = [0; 1];
            assert!(!matches!(stream.read(&mut byte).await, Ok(1)), "{rule}: answered");
        }
        until(|| world.records.records().len() > before).await;
        assert_eq!(world.last_rule(), rule);
    }
    assert!(world.seen().is_empty());
    world.end().await;
}

#[tokio::test]
async fn a_wrong_server_is_not_called() {
    let world = World::new().await;
    let source = world.authority.source("/service/web");
    let config = UpstreamConfig {
        service: "payments".into(),
        // accounts answers there, not payments.
        id: id("/service/payments"),
        endpoints: vec![world.inbound].into(),
        response_timeout: Duration::from_secs(10),
    };
    let upstream = Upstream::new(config, source, world.clock.clone(), &world.scope).unwrap();
    let request = Request::get("/accounts/17").body(sidecar::empty()).unwrap();
    let error = upstream.send(request).await.map(|_| ()).unwrap_err();
    assert_eq!(error.status(), 503);
    assert!(world.seen().is_empty());
    drop(upstream);
    world.end().await;
}

#[tokio::test]
async fn handshakes_are_tls_1_3_with_the_hybrid_post_quantum_exchange() {
    let world = World::new().await;
    let source = world.authority.source("/service/web");
    let config =
        identity::tls::client_config(&source, id("/service/accounts"), &[ALPN_H2], &world.clock).unwrap();
    let stream = tokio::net::TcpStream::connect(world.inbound).await.unwrap();
    let stream = tokio_rustls::TlsConnector::from(config)
        .connect(identity::tls::unnamed_server(), stream)
        .await
        .unwrap();
    let session = stream.get_ref().1;
    assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let group = session.negotiated_key_exchange_group().map(|group| group.name());
    assert_eq!(group, Some(rustls::NamedGroup::X25519MLKEM768));
    drop(stream);
    world.end().await;
}

/// A peer that trickles a mapped body holds nothing for long, and others are served meanwhile.
#[tokio::test(start_paused = true)]
async fn security_28_a_body_that_trickles_is_refused() {
    let world = World::new().await;
    let web = world.authority.issue("/service/web");
    let chain = world.chain(&web, "alice", "POST", "/transfers");
    let never = futures::stream::pending::<Result<http_body::Frame<Bytes>, sidecar::BoxError>>();
    let body = sidecar::Body::new(http_body_util::StreamBody::new(never));
    let request = Request::post("/transfers")
        .header(txn::HEADER, chain)
        .header("content-type", "application/json")
        .body(body)
        .unwrap();
    let (status, _) = world.send(&web, request).await;
    assert_eq!((status.as_u16(), world.last_rule().as_str()), (400, "request.body_size"));
    assert!(world.seen().iter().all(|seen| seen.target != "/transfers"));
    world.end().await;
}

#[tokio::test]
async fn requests_go_on_while_identities_rotate() {
    let world = World::new().await;
    let (publisher, source) = IdentitySource::channel();
    let bundles = Arc::new(identity::BundleSet::new([world.authority.bundle()]));
    publisher.publish(world.authority.issue("/service/web"), Arc::clone(&bundles));
    let config = UpstreamConfig {
        service: "accounts".into(),
        id: id("/service/accounts"),
        endpoints: vec![world.inbound].into(),
        response_timeout: Duration::from_secs(10),
    };
    let upstream = Upstream::new(config, source.clone(), world.clock.clone(), &world.scope).unwrap();
    for round in 0..5 {
        let web = source.current().unwrap().svid.clone();
        let mut waiting = Vec::new();
        for _ in 0..20 {
            let chain = world.chain(&web, "alice", "GET", "/accounts/17");
            let request =
                Request::get("/accounts/17").header(txn::HEADER, chain).body(sidecar::empty()).unwrap();
            waiting.push(upstream.send(request));
        }
        // The rotation happens while twenty requests are on their way.
        publisher.publish(world.authority.issue("/service/web"), Arc::clone(&bundles));
        for response in futures::future::join_all(waiting).await {
            assert_eq!(response.unwrap().status(), 200, "round {round}");
        }
    }
    drop(upstream);
    world.end().await;
}

#[tokio::test]
async fn a_drain_lets_the_request_in_flight_finish_and_takes_no_new_connection() {
    let world = World::new().await;
    let (status, _) = world.call("alice", "GET", "/accounts/17", "", &[]).await;
    assert_eq!(status, 200);
    let inbound = world.inbound;
    world.end().await;
    assert!(tokio::net::TcpStream::connect(inbound).await.is_err());
}

#[tokio::test]
async fn the_admin_port_says_ready_and_counts() {
    let world = World::new().await;
    world.call("alice", "GET", "/accounts/17", "", &[]).await;
    world.call("alice", "GET", "/accounts/42", "", &[]).await;
    let get = async |path: &str| {
        let stream = tokio::net::TcpStream::connect(world.admin).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        world.scope.spawn("test client", async move {
            let _ended = connection.await;
        });
        let request = Request::get(path).header("host", "x").body(Full::<Bytes>::default()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        (
            status,
            String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap(),
        )
    };
    assert_eq!(get("/ready").await.0, 200);
    assert_eq!(get("/live").await.0, 200);
    assert_eq!(get("/other").await.0, 404);
    let (_, metrics) = get("/metrics").await;
    let wanted = r#"palisade_requests_total{direction="Inbound",peer="spiffe://bank.example/service/web",route="GET /accounts/{id:int}",status="200"} 1"#;
    assert!(metrics.contains(wanted), "{metrics}");
    assert!(metrics.contains("palisade_svid_expiry_timestamp_seconds"));
    assert!(metrics.contains("palisade_denials_total"));
    world.end().await;
}

#[tokio::test]
async fn a_condition_on_a_read_is_not_put_to_the_app() {
    let world = World::new().await;
    let date = "Thu, 01 Jan 2026 00:00:00 GMT";
    let conditions = [
        ("if-modified-since", date),
        ("if-unmodified-since", date),
        ("if-match", "\"a\""),
        ("if-none-match", "\"a\""),
        ("if-range", date),
    ];
    // The backend knows no conditions; one that does would answer 304, which shows no owner.
    let (status, _) = world.call("alice", "GET", "/accounts/17", "", &conditions).await;
    assert_eq!(status, 200);
    let seen = world.seen().pop().unwrap();
    for (name, _) in conditions {
        assert!(!seen.headers.contains_key(name), "{name} reached the app");
    }
    world.end().await;
}

#[tokio::test]
async fn a_request_to_a_silent_peer_waits_no_longer_than_its_own_timeout() {
    let world = World::new().await;
    // The kernel accepts, nobody ever shakes hands.
    let (_silent, address) = listener();
    let config = UpstreamConfig {
        service: "accounts".into(),
        id: id("/service/accounts"),
        endpoints: vec![address].into(),
        response_timeout: Duration::from_millis(100),
    };
    let source = world.authority.source("/service/web");
    let upstream = Upstream::new(config, source, world.clock.clone(), &world.scope).unwrap();
    let request = || Request::get("/accounts/17").body(sidecar::empty()).unwrap();
    for outcome in futures::future::join_all([upstream.send(request()), upstream.send(request())]).await {
        let error = outcome.map(|_| ()).unwrap_err();
        assert!(matches!(error, sidecar::upstream::UpstreamError::Timeout(_)), "{error}");
    }
    drop(upstream);
    world.end().await;
}

/// Two sidecars: the app behind the first calls through its outbound half, for whoever asked it.
#[tokio::test]
async fn the_user_travels_by_traceparent_and_by_nothing_else() {
    let world = World::new().await;
    let (app, app_address) = listener();
    drop(app);
    let ((inbound, web_inbound), (admin, _), (calls, calls_address)) = (listener(), listener(), listener());
    let (_folder, web_policies) = policies(&[
        ("mesh.cedarschema", SCHEMA),
        ("services/web/web.cedarschema", &ACCOUNTS_SCHEMA.replace("namespace Accounts", "namespace Web")),
        (
            "services/web/map.toml",
            "[[route]]\nmatch = \"GET /pages/{owner:slug}\"\naction = \"CountAccounts\"\nobject = 'Account::\"{owner}\"'\nattributes = { owner = \"path:owner\" }\n",
        ),
        (
            "services/web/web.cedar",
            "@id(\"pages\")\npermit (principal == Mesh::Workload::\"spiffe://bank.example/palisade/gateway\", action == Web::Action::\"CountAccounts\", resource) when { context has user && resource.owner == context.user.id };\n",
        ),
    ]);
    // The app: calls accounts with the traceparent it was given, or with none, and hands the answer on.
    let web_app = tokio::net::TcpListener::bind(app_address).await.unwrap();
    let scope = world.scope.clone();
    let web_scope = Scope::new();
    let web_drain = web_scope.clone();
    scope.clone().spawn("web app", async move {
        loop {
            let stream = tokio::select! {
                accepted = web_app.accept() => accepted.unwrap().0,
                () = scope.draining() => return,
            };
            let web_drain = web_drain.clone();
            scope.spawn("web app connection", async move {
                let service = service_fn(async |request: Request<Incoming>| {
                    if request.uri().path() == "/pages/drained" {
                        web_drain.drain();
                        until(|| std::net::TcpStream::connect(web_inbound).is_err()).await;
                    }
                    let stream = tokio::net::TcpStream::connect(calls_address).await.unwrap();
                    let (mut sender, connection) =
                        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
                    let connection = std::pin::pin!(connection);
                    let mut call = Request::get("/accounts/17").header("host", "accounts");
                    if request.uri().path() != "/pages/forgetful" {
                        call = call.header("traceparent", request.headers()["traceparent"].clone());
                    }
                    // A token of the app's own making is dropped by its sidecar.
                    let call = call.header("txn-token", "forged").body(Full::<Bytes>::default()).unwrap();
                    let exchange = async {
                        let response = sender.send_request(call).await.unwrap();
                        let status = response.status();
                        let body = response.into_body().collect().await.unwrap().to_bytes();
                        Response::builder().status(status).body(Full::<Bytes>::from(body)).unwrap()
                    };
                    let response = tokio::select! {
                        response = exchange => response,
                        _ = connection => unreachable!("the sidecar closed"),
                    };
                    Ok::<_, std::convert::Infallible>(response)
                });
                let _ended = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    let config = SidecarConfig {
        id: id("/service/web"),
        inbound: Some(InboundConfig {
            service: "web".into(),
            listener: inbound,
            app: app_address,
            app_protocol: AppProtocol::Http1,
            policy: web_policies.service("web").unwrap(),
            gateways: vec![id("/palisade/gateway")],
            request_timeout: Duration::from_secs(10),
            hbone: None,
            proxies: Default::default(),
            rate_limit: None,
            health: None,
        }),
        ext_authz: None,
        calls: vec![Call {
            listener: calls,
            upstream: UpstreamConfig {
                service: "accounts".into(),
                id: id("/service/accounts"),
                endpoints: vec![world.inbound].into(),
                response_timeout: Duration::from_secs(10),
            },
            carries: sidecar::Carries::Requests,
            traffic: sidecar::traffic::config::Traffic::default(),
        }],
        capture: CaptureConfig::default(),
        admin: Some(admin),
        access_log: None,
        traces: None,
        others: Vec::new(),
        budget: sidecar::overload::Budget::default(),
    };
    let source = world.authority.source("/service/web");
    let recorder = world.records.clone();
    Sidecar::start(config, source, recorder, world.clock.clone(), random(), &web_scope).unwrap();

    let gateway = world.authority.issue("/palisade/gateway");
    let gateway_source =
        IdentitySource::fixed(gateway.clone(), identity::BundleSet::new([world.authority.bundle()]));
    let config = UpstreamConfig {
        service: "web".into(),
        id: id("/service/web"),
        endpoints: vec![web_inbound].into(),
        response_timeout: Duration::from_secs(10),
    };
    let upstream = Upstream::new(config, gateway_source, world.clock.clone(), &world.scope).unwrap();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let ask = async |user: &str, target: &str| {
        let binding = RequestBinding::new("GET", target);
        let web = id("/service/web");
        let token =
            txn::mint(&gateway, &world.user(user), &web, binding, txn::MAX_LIFETIME, world.clock.now())
                .unwrap();
        let request = Request::get(target).header(txn::HEADER, token).header("traceparent", trace);
        let response = upstream.send(request.body(sidecar::empty()).unwrap()).await.unwrap();
        response.status().as_u16()
    };
    assert_eq!(ask("alice", "/pages/alice").await, 200, "alice reads her account through web");
    assert_eq!(ask("bob", "/pages/bob").await, 403, "bob does not read alice's");
    assert_eq!(
        world.last().chain,
        ["spiffe://bank.example/palisade/gateway", "spiffe://bank.example/service/web"]
    );
    assert_eq!(
        ask("forgetful", "/pages/forgetful").await,
        403,
        "an app that drops traceparent calls for nobody"
    );
    assert_eq!(world.last().user, None);
    // Its sidecar drains meanwhile: the request in flight still calls on, and accounts says no to it.
    let before = world.records.records().len();
    assert_eq!(ask("drained", "/pages/drained").await, 403);
    assert!(world.records.records().len() > before, "accounts was not asked");
    drop(upstream);
    web_scope.finished(Duration::from_secs(10)).await.unwrap();
    world.end().await;
}

fn to_accounts(endpoints: Vec<SocketAddr>) -> UpstreamConfig {
    let response_timeout = Duration::from_secs(10);
    UpstreamConfig {
        service: "accounts".into(),
        id: id("/service/accounts"),
        endpoints: endpoints.into(),
        response_timeout,
    }
}

#[tokio::test]
async fn a_dead_endpoint_costs_no_call_and_calls_follow_when_endpoints_change() {
    let world = World::new().await;
    let web = world.authority.issue("/service/web");
    let (closed, dead) = listener();
    drop(closed);
    let source = world.authority.source("/service/web");
    let config = to_accounts(vec![dead, world.inbound]);
    let upstream = Upstream::new(config, source, world.clock.clone(), &world.scope).unwrap();
    let request = |method: &str, target: &str| {
        let chain = world.chain(&web, "alice", method, target);
        Request::builder().method(method).uri(target).header(txn::HEADER, chain)
    };
    for _ in 0..20 {
        let request = request("GET", "/accounts/17").body(sidecar::empty()).unwrap();
        assert_eq!(upstream.send(request).await.unwrap().status(), 200);
    }
    // Nothing of these has left when a connection fails, so unsafe ones are tried again as well.
    let body = r#"{"from":"17","to":"42","amount_cents":1}"#;
    for _ in 0..20 {
        let request = request("POST", "/transfers").header("content-type", "application/json");
        let answer = upstream.send(request.body(sidecar::full(body)).unwrap()).await.unwrap();
        assert_eq!(answer.status(), 201);
    }
    upstream.replace_endpoints([dead.into()]);
    let error = upstream.send(request("GET", "/accounts/17").body(sidecar::empty()).unwrap()).await;
    assert_eq!(error.map(|_| ()).unwrap_err().status(), 503);
    upstream.replace_endpoints([world.inbound.into()]);
    let answer = upstream.send(request("GET", "/accounts/17").body(sidecar::empty()).unwrap()).await;
    assert_eq!(answer.unwrap().status(), 200);
    drop(upstream);
    world.end().await;
}

#[tokio::test]
async fn what_is_over_the_breaker_s_bound_is_refused_at_once() {
    let world = World::new().await;
    let (_silent, address) = listener();
    let mut traffic = sidecar::traffic::config::Traffic::default();
    traffic.limits.requests = 2;
    let upstream = Upstream::steered(
        UpstreamConfig { response_timeout: Duration::from_millis(200), ..to_accounts(vec![address]) },
        traffic,
        sidecar::traffic::random::Dice::seeded(1),
        world.authority.source("/service/web"),
        world.clock.clone(),
        &world.scope,
    )
    .unwrap();
    let call = || upstream.send(Request::get("/accounts/17").body(sidecar::empty()).unwrap());
    let outcomes = futures::future::join_all([call(), call(), call()]).await;
    let said: Vec<_> = outcomes.into_iter().map(|outcome| outcome.map(|_| ()).unwrap_err()).collect();
    assert_eq!(said.iter().map(|error| error.status().as_u16()).collect::<Vec<_>>(), [504, 504, 503]);
    assert_eq!(said[2].to_string(), "accounts: too many requests are under way: 2");
    // What was under way has ended: there is room again.
    assert_eq!(call().await.map(|_| ()).unwrap_err().status(), 504);
    drop(upstream);
    world.end().await;
}

#[tokio::test]
async fn a_configured_status_is_tried_again_within_its_bounds() {
    let world = World::new().await;
    let mut traffic = sidecar::traffic::config::Traffic::default();
    traffic.retries.on.insert("500".parse().unwrap());
    let upstream = Upstream::steered(
        to_accounts(vec![world.inbound]),
        traffic,
        sidecar::traffic::random::Dice::seeded(1),
        world.authority.source("/service/web"),
        world.clock.clone(),
        &world.scope,
    )
    .unwrap();
    let chain = world.chain(&world.authority.issue("/service/web"), "alice", "GET", "/accounts/500");
    let request = Request::get("/accounts/500").header(txn::HEADER, chain).body(sidecar::empty()).unwrap();
    assert_eq!(upstream.send(request).await.unwrap().status(), 500);
    let reached = world.seen().iter().filter(|seen| seen.target == "/accounts/500").count();
    assert_eq!(reached, 3, "one call and two retries");
    drop(upstream);
    world.end().await;
}

#[tokio::test]
async fn policy_33_of_a_batch_every_object_is_judged_and_one_foreign_one_refuses_all() {
    let world = World::new().await;
    let own: Vec<String> = (1000..1049).map(|id| format!("\"{id}\"")).collect();
    let post = async |ids: &[String]| {
        world
            .call("alice", "POST", "/statements", &format!("{{\"accounts\":[{}]}}", ids.join(",")), &[])
            .await
    };
    assert_eq!(post(&own).await.0, StatusCode::CREATED);
    let asked = world.seen();
    assert_eq!(
        asked.iter().map(|seen| seen.target.as_str()).collect::<Vec<_>>(),
        ["/.well-known/palisade/entities", "/statements"]
    );
    // One foreign id among fifty, at any place; one that nobody knows; alone.
    for (place, foreign) in [(0, "42"), (25, "42"), (49, "42"), (10, "77")] {
        let mut ids = own.clone();
        ids.insert(place, format!("\"{foreign}\""));
        assert_eq!(post(&ids).await.0, StatusCode::FORBIDDEN, "{foreign} at {place}");
    }
    assert_eq!(post(&["\"42\"".to_owned()]).await.0, StatusCode::FORBIDDEN);
    // Empty, nested, of other types, too long: no list.
    let many: Vec<String> = (0..257).map(|_| "\"17\"".to_owned()).collect();
    for bad in [
        &[][..],
        &["[\"17\"]".to_owned()],
        &["17".to_owned()],
        &["null".to_owned()],
        &["\"..\"".to_owned()],
        &many,
    ] {
        assert_eq!(post(bad).await.0, StatusCode::BAD_REQUEST, "{bad:?}");
    }
    let (status, _) = world.call("alice", "POST", "/statements", r#"{"accounts":"17"}"#, &[]).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    // The same id twice is one object.
    assert_eq!(post(&["\"17\"".to_owned(), "\"17\"".to_owned()]).await.0, StatusCode::CREATED);
    assert_eq!(
        world.seen().iter().filter(|seen| seen.target == "/statements").count(),
        2,
        "nothing else passed"
    );
    world.end().await;
}

#[tokio::test]
async fn policy_33_of_a_filtered_batch_the_app_sees_what_is_permitted_and_nothing_else() {
    let world = World::new().await;
    let post = async |body: &str, headers: &[(&str, &str)]| {
        world.call("alice", "POST", "/batches/get", body, headers).await
    };
    let reached = || {
        let seen = world.seen();
        let batches = seen.into_iter().filter(|seen| seen.target == "/batches/get");
        batches.collect::<Vec<_>>()
    };
    // What is wholly theirs is not touched, byte for byte.
    let own = "{ \"view\": \"full\",  \"ids\": [\"17\", \"18\"] }";
    assert_eq!(post(own, &[]).await.0, StatusCode::CREATED);
    assert_eq!(reached().last().unwrap().body, own);
    // One foreign id among fifty, at any place; one that the app does not know.
    let ids: Vec<String> = (1000..1049).map(|id| id.to_string()).collect();
    for (place, foreign) in [(0, "42"), (25, "42"), (49, "42"), (10, "77")] {
        let mut asked = ids.clone();
        asked.insert(place, foreign.to_owned());
        let body = serde_json::json!({ "ids": asked, "view": "full" }).to_string();
        let digest = [("content-digest", "sha-256=:AAAA:"), ("x-other", "stays")];
        assert_eq!(post(&body, &digest).await.0, StatusCode::CREATED, "{foreign} at {place}");
        let seen = reached().pop().unwrap();
        let left: serde_json::Value = serde_json::from_str(&seen.body).unwrap();
        assert_eq!(left, serde_json::json!({ "ids": ids, "view": "full" }));
        assert_eq!(seen.headers["content-length"], seen.body.len().to_string());
        assert!(!seen.headers.contains_key("content-digest"), "it is not true of what is left");
        assert_eq!(seen.headers["x-other"], "stays");
        let filtered = |record: &DecisionRecord| record.objects.iter().any(|o| o.left_out_by.is_some());
        let record = world.records.records().into_iter().rfind(filtered).unwrap();
        assert_eq!(record.rule.name(), "web-for-owner");
        assert_eq!(record.reason, "permitted, but for 1 of 50 objects");
        let left_out: Vec<_> = record.objects.iter().filter(|object| object.left_out_by.is_some()).collect();
        assert_eq!(left_out.len(), 1);
        assert_eq!(left_out[0].object, format!("Accounts::Account::\"{foreign}\""));
        let by = if foreign == "42" { "none" } else { "attributes.missing" };
        assert_eq!(left_out[0].left_out_by.as_ref().unwrap().name(), by);
    }
    let before = reached().len();
    // None is left: the denial, with its receipt.
    let (status, answer) = post(r#"{"ids":["42","42"]}"#, &[]).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(answer.contains(world.last().receipt.as_str()), "{answer}");
    assert_eq!(world.last_rule(), "none");
    // Empty, nested, of another type: no list, and nothing is repaired.
    for bad in ["[]", "[[\"17\"]]", "[17]", "[null]", "[\"17\",[\"42\"]]", "\"17\""] {
        assert_eq!(post(&format!("{{\"ids\":{bad}}}"), &[]).await.0, StatusCode::BAD_REQUEST, "{bad}");
    }
    assert_eq!(reached().len(), before, "nothing else passed");
    world.end().await;
}

#[tokio::test]
async fn policy_33_of_a_filtered_message_the_elements_go_and_every_other_byte_stays() {
    let world = World::new().await;
    let grpc = [("content-type", "application/grpc")];
    // Each shorter than 128 bytes, so that lengths are one byte.
    let field = |number: u8, text: &str| {
        format!("{}{}{text}", char::from(number << 3 | 2), char::from(text.len() as u8))
    };
    let call = |fields: &[String]| {
        let message = fields.concat();
        format!("\0\0\0\0{}{message}", char::from(message.len() as u8))
    };
    let asked = [field(2, "42"), field(2, "17"), field(1, "full"), field(2, "77"), field(2, "18")];
    let target = "/bank.Accounts/BatchGet";
    world.call("alice", "POST", target, &call(&asked), &grpc).await;
    let seen = world.seen().pop().unwrap();
    assert_eq!(
        (seen.target.as_str(), seen.body),
        (target, call(&[field(2, "17"), field(1, "full"), field(2, "18")]))
    );
    let left = |record: &DecisionRecord| record.reason == "permitted, but for 2 of 4 objects";
    assert!(world.records.records().iter().any(left));
    // None is left; none was asked for; a second message.
    let before = world.seen().iter().filter(|seen| seen.target == target).count();
    for bad in [call(&[field(2, "42")]), call(&[field(1, "full")]), call(&asked) + &call(&asked)] {
        let answer = world.call("alice", "POST", target, &bad, &grpc).await;
        let whole = |seen: &Seen| seen.target == target && seen.body.contains("42");
        assert!(!world.seen().iter().any(whole), "{answer:?}");
    }
    let after = world.seen().iter().filter(|seen| seen.target == target).count();
    assert!(after <= before + 1, "the first of two messages may have begun a request");
    world.end().await;
}

#[tokio::test]
async fn policy_40_what_a_caller_may_not_see_is_in_no_item_count_or_cursor() {
    let world = World::new().await;
    let get = async |user: &str, target: &str| world.call(user, "GET", target, "", &[]).await;
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let (status, body) = get("alice", "/accounts").await;
    assert_eq!(status, StatusCode::OK);
    let alices = serde_json::json!({
        "accounts": [{"id": "17", "owner": "alice"}, {"id": "18", "owner": "alice"}],
        "total": 2, "next": null, "currency": "EUR",
    });
    assert_eq!(json(&body), alices);
    let (_, body) = get("bob", "/accounts").await;
    assert_eq!(
        (json(&body)["total"].clone(), json(&body)["accounts"][0]["id"].clone()),
        (1.into(), "42".into())
    );
    let (_, body) = get("carol", "/accounts").await;
    assert_eq!(json(&body), serde_json::json!({"accounts": [], "total": 0, "next": null, "currency": "EUR"}));
    // Nothing was withheld, so nothing that was said is about anything else.
    let (_, body) = get("alice", "/accounts?page=2").await;
    assert_eq!(json(&body)["next"], "after-17");
    // An answer that is no such list is none at all; one that is no success says nothing of objects.
    for page in [3, 4, 5] {
        let (status, _) = get("alice", &format!("/accounts?page={page}")).await;
        assert_eq!((status, world.last_rule().as_str()), (StatusCode::FORBIDDEN, "list.answer"), "{page}");
    }
    assert_eq!(get("alice", "/accounts?page=9").await.0, StatusCode::NOT_FOUND);
    // Who may not list at all does not reach the app.
    let before = world.seen().len();
    let payments = world.authority.issue("/service/payments");
    let request = Request::get("/accounts").body(sidecar::empty()).unwrap();
    assert_eq!(world.send(&payments, request).await.0, StatusCode::FORBIDDEN);
    assert_eq!(world.seen().len(), before);
    // What headers say of the whole is gone; no partial or cached answer is asked for.
    let response =
        world.response("alice", "/accounts", &[("range", "bytes=0-5"), ("if-none-match", "\"four\"")]).await;
    for name in ["etag", "link", "x-total-count"] {
        assert!(!response.headers().contains_key(name), "{name}");
    }
    assert!(
        !world.seen().last().unwrap().headers.keys().any(|name| name == "range" || name == "if-none-match")
    );
    world.end().await;
}
