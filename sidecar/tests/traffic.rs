//! How calls go, through real sidecars: shared between services, copied, failed on purpose, limited, sent twice, and
//! ended at their deadline.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test")]
#![allow(clippy::disallowed_methods, reason = "apps of the test end with it")]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use identity::testing::TestAuthority;
use identity::{Scope, SpiffeId, SystemClock, TrustDomain};
use policy::{NoRecorder, Policies};
use sidecar::app::AppProtocol;
use sidecar::capture::CaptureConfig;
use sidecar::traffic::config::Traffic;
use sidecar::traffic::random::Dice;
use sidecar::traffic::resolve::Source;
use sidecar::upstream::{Upstream, UpstreamConfig};
use sidecar::{Call, Carries, InboundConfig, Sidecar, SidecarConfig};
use tokio::sync::Notify;

const CLIENT: &str = "/ns/default/sa/client";
/// Bounds a hang.
const DEADLINE: Duration = Duration::from_secs(30);

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&format!("spiffe://mesh.test{path}")).unwrap()
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn traffic(text: &str) -> Traffic {
    toml::from_str(text).unwrap()
}

fn settings(id: SpiffeId) -> SidecarConfig {
    SidecarConfig {
        id,
        inbound: None,
        ext_authz: None,
        calls: Vec::new(),
        others: Vec::new(),
        capture: CaptureConfig::default(),
        admin: None,
        access_log: None,
        traces: None,
        budget: sidecar::overload::Budget::default(),
    }
}

/// An app that answers with its name.
struct App {
    name: &'static str,
    seen: Mutex<Vec<HeaderMap>>,
    came: Notify,
    how: Mutex<How>,
}

/// What an app does with a request.
#[derive(Clone, Copy)]
enum How {
    Answer,
    /// It waits for ever.
    Stall,
    /// It says 503.
    Fail,
}

impl App {
    fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    fn stall(&self) {
        self.does(How::Stall);
    }

    fn does(&self, how: How) {
        *self.how.lock().unwrap() = how;
    }

    /// Waits until so many requests have come.
    async fn has_seen(&self, count: usize) {
        let seen = async {
            loop {
                let came = self.came.notified();
                if self.count() >= count {
                    return;
                }
                came.await;
            }
        };
        tokio::time::timeout(DEADLINE, seen).await.unwrap();
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<String>, Infallible> {
        self.seen.lock().unwrap().push(request.headers().clone());
        self.came.notify_waiters();
        let how = *self.how.lock().unwrap();
        let mut response = Response::new(self.name.to_owned());
        match how {
            How::Answer => {}
            How::Stall => std::future::pending().await,
            How::Fail => *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE,
        }
        Ok(response)
    }
}

struct Stage {
    authority: TestAuthority,
    scope: Scope,
}

impl Stage {
    fn new() -> Self {
        Self { authority: TestAuthority::new("mesh.test"), scope: Scope::new() }
    }

    fn start(&self, config: SidecarConfig) {
        let source = self.authority.source(config.id.path());
        let (recorder, random) = (Arc::new(NoRecorder), identity::random::system());
        Sidecar::start(config, source, recorder, SystemClock::shared(), random, &self.scope).unwrap();
    }

    /// An app and its sidecar, which is `name`.
    fn service(&self, name: &'static str) -> (Arc<App>, SocketAddr) {
        self.service_with(name, |inbound| inbound)
    }

    fn service_with(
        &self,
        name: &'static str,
        change: impl FnOnce(InboundConfig) -> InboundConfig,
    ) -> (Arc<App>, SocketAddr) {
        self.service_of(name, None, change)
    }

    fn service_of(
        &self,
        name: &'static str,
        admin: Option<TcpListener>,
        change: impl FnOnce(InboundConfig) -> InboundConfig,
    ) -> (Arc<App>, SocketAddr) {
        let ((app_door, app_address), (inbound, address)) = (listener(), listener());
        let app =
            Arc::new(App { name, seen: Mutex::default(), came: Notify::new(), how: Mutex::new(How::Answer) });
        let (serving, tasks) = (Arc::clone(&app), self.scope.clone());
        app_door.set_nonblocking(true).unwrap();
        let app_door = tokio::net::TcpListener::from_std(app_door).unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = app_door.accept().await.unwrap();
                let app = Arc::clone(&serving);
                tasks.spawn("app", async move {
                    let service = service_fn(move |request| {
                        let app = Arc::clone(&app);
                        async move { app.answer(request).await }
                    });
                    let connection = hyper::server::conn::http1::Builder::new();
                    let _ended = connection.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/ours/policies");
        let policies = Policies::load(&folder, &TrustDomain::new("mesh.test").unwrap()).unwrap();
        let inbound = InboundConfig {
            service: "backend".into(),
            listener: inbound,
            app: app_address,
            app_protocol: AppProtocol::Http1,
            policy: policies.service("backend").unwrap(),
            gateways: Vec::new(),
            request_timeout: DEADLINE,
            hbone: None,
            proxies: Default::default(),
            rate_limit: None,
            health: None,
        };
        let id = id(&format!("/ns/default/sa/{name}"));
        self.start(SidecarConfig { inbound: Some(change(inbound)), admin, ..settings(id) });
        (app, address)
    }

    fn upstream_config(name: &str, endpoints: Vec<SocketAddr>) -> UpstreamConfig {
        let id = id(&format!("/ns/default/sa/{name}"));
        UpstreamConfig { service: name.into(), id, endpoints: endpoints.into(), response_timeout: DEADLINE }
    }

    /// A client's sidecar whose app calls `services[0]`; the others are known to it.
    fn client(&self, services: &[(&'static str, SocketAddr)], how: Traffic) -> Client<'_> {
        let (door, address) = listener();
        let mut known = services.iter().map(|(name, address)| Self::upstream_config(name, vec![*address]));
        let upstream = known.next().unwrap();
        let call = Call { listener: door, upstream, carries: Carries::Requests, traffic: how };
        let others = known.map(|other| (other, Traffic::default())).collect();
        self.start(SidecarConfig { calls: vec![call], others, ..settings(id(CLIENT)) });
        Client { stage: self, address }
    }

    async fn end(self) {
        self.scope.drain();
        // Requests that are stalled on purpose stay so.
        let _cut = self.scope.finished(Duration::from_millis(100)).await;
    }
}

/// The app beside the client's sidecar.
struct Client<'a> {
    stage: &'a Stage,
    address: SocketAddr,
}

impl Client<'_> {
    async fn ask(&self, headers: &[(&str, &str)]) -> Response<String> {
        self.get("/", headers).await
    }

    async fn get(&self, target: &str, headers: &[(&str, &str)]) -> Response<String> {
        let stream = tokio::net::TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        self.stage.scope.spawn("client", async move {
            let _ended = connection.await;
        });
        let mut request = Request::get(target).header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(String::new()).unwrap();
        let response = tokio::time::timeout(DEADLINE, sender.send_request(request)).await.unwrap().unwrap();
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Response::from_parts(head, String::from_utf8(body.to_vec()).unwrap())
    }
}

#[tokio::test]
async fn calls_are_shared_by_weight_and_the_same_key_goes_to_the_same() {
    let stage = Stage::new();
    let ((_, backend), (_, next)) = (stage.service("backend"), stage.service("next"));
    let how = traffic("split = { backend = 50, next = 50 }\nsplit_by = \"header:x-tenant\"");
    let client = stage.client(&[("backend", backend), ("next", next)], how);
    let mut of = BTreeMap::new();
    for tenant in 0..20 {
        let tenant = tenant.to_string();
        let first = client.ask(&[("x-tenant", &tenant)]).await.into_body();
        assert_eq!(client.ask(&[("x-tenant", &tenant)]).await.into_body(), first);
        *of.entry(first).or_insert(0) += 1;
    }
    assert_eq!(of.len(), 2, "both get calls: {of:?}");
    stage.end().await;
}

#[tokio::test]
async fn a_split_can_move_everything_and_a_name_that_nobody_knows_is_refused_at_the_start() {
    let stage = Stage::new();
    let ((old, backend), (_, next)) = (stage.service("backend"), stage.service("next"));
    let how = traffic("split = { backend = 0, next = 1 }");
    let client = stage.client(&[("backend", backend), ("next", next)], how.clone());
    for _ in 0..10 {
        assert_eq!(client.ask(&[]).await.into_body(), "next");
    }
    assert_eq!(old.count(), 0);
    let upstream = Stage::upstream_config("backend", vec![backend]);
    let call = Call { listener: listener().0, upstream, carries: Carries::Requests, traffic: how };
    let config = SidecarConfig { calls: vec![call], ..settings(id(CLIENT)) };
    let (source, random) = (stage.authority.source(CLIENT), identity::random::system());
    let outcome =
        Sidecar::start(config, source, Arc::new(NoRecorder), SystemClock::shared(), random, &stage.scope);
    let error = outcome.map(drop).unwrap_err().to_string();
    assert_eq!(error, "the traffic of backend names next, which nothing is known of");
    stage.end().await;
}

#[tokio::test]
async fn copies_are_marked_and_nobody_waits_for_them() {
    let stage = Stage::new();
    let ((original, backend), (shadow, copies)) = (stage.service("backend"), stage.service("shadow"));
    shadow.stall();
    let client =
        stage.client(&[("backend", backend), ("shadow", copies)], traffic("mirror = { to = \"shadow\" }"));
    for _ in 0..5 {
        assert_eq!(client.ask(&[("x-mirrored-from", "me")]).await.into_body(), "backend");
    }
    shadow.has_seen(5).await;
    let marks: Vec<_> =
        shadow.seen.lock().unwrap().iter().map(|headers| headers["x-mirrored-from"].clone()).collect();
    assert_eq!(marks, ["backend"; 5]);
    assert_eq!(original.count(), 5);
    stage.end().await;
}

#[tokio::test]
async fn a_copy_that_cannot_be_delivered_harms_nobody() {
    let stage = Stage::new();
    let (_, backend) = stage.service("backend");
    let (closed, nobody) = listener();
    drop(closed);
    let client =
        stage.client(&[("backend", backend), ("shadow", nobody)], traffic("mirror = { to = \"shadow\" }"));
    for _ in 0..5 {
        assert_eq!(client.ask(&[]).await.into_body(), "backend");
    }
    stage.end().await;
}

#[tokio::test]
async fn faults_are_made_where_they_are_asked_for_and_say_so() {
    let stage = Stage::new();
    let (app, backend) = stage.service("backend");
    let how = traffic(
        "faults = { abort = 418, abort_share = \"100%\", delay = \"1ms\", delay_share = \"100%\", only_with = \"x-fault\" }",
    );
    let client = stage.client(&[("backend", backend)], how);
    assert_eq!(client.ask(&[]).await.status(), 200);
    assert_eq!(client.ask(&[("x-fault", "1")]).await.status(), 418);
    let call = client.ask(&[("x-fault", "1"), ("content-type", "application/grpc")]).await;
    assert_eq!(call.headers()["grpc-status"], "2");
    assert_eq!(app.count(), 1, "what is aborted goes nowhere");
    stage.end().await;
}

#[tokio::test]
async fn requests_over_the_limit_are_told_when_to_come_again() {
    let stage = Stage::new();
    let limit = toml::from_str("requests = 2\nper = \"1h\"").unwrap();
    let (app, backend) =
        stage.service_with("backend", |inbound| InboundConfig { rate_limit: Some(limit), ..inbound });
    let client = stage.client(&[("backend", backend)], Traffic::default());
    for _ in 0..2 {
        assert_eq!(client.ask(&[]).await.status(), 200);
    }
    let refused = client.ask(&[]).await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let seconds: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1_790..=1_800).contains(&seconds), "{seconds}");
    assert_eq!(refused.headers()["ratelimit-policy"], "\"peer\";q=2;w=3600");
    assert_eq!(refused.body(), r#"{"error":"rate_limited","service":"backend"}"#);
    let call = client.ask(&[("content-type", "application/grpc")]).await;
    assert_eq!(call.headers()["grpc-status"], "8");
    assert_eq!(app.count(), 2);
    stage.end().await;
}

#[tokio::test]
async fn a_slow_request_is_sent_a_second_time_and_the_first_answer_counts() {
    let stage = Stage::new();
    let ((one, first), (other, second)) = (stage.service("backend"), stage.service("backend"));
    let how = traffic(
        "balance = \"round-robin\"\nhedge = { after = \"90%\", min = \"20ms\" }\nretries = { budget = \"100%\" }",
    );
    let upstream = Upstream::steered(
        Stage::upstream_config("backend", vec![first, second]),
        how,
        Dice::seeded(3),
        stage.authority.source(CLIENT),
        SystemClock::shared(),
        &stage.scope,
    )
    .unwrap();
    let ask = async || {
        let request = Request::get("/").body(sidecar::empty()).unwrap();
        tokio::time::timeout(DEADLINE, upstream.send(request)).await.unwrap().unwrap().status()
    };
    // Nothing is sent twice before it is known what slow means.
    for _ in 0..120 {
        assert_eq!(ask().await, 200);
    }
    let before = one.count() + other.count();
    one.stall();
    let stalled = one.count();
    for _ in 0..20 {
        assert_eq!(ask().await, 200, "whichever of the two has it");
    }
    assert!(one.count() > stalled, "it was asked");
    assert!(one.count() + other.count() > before + 20, "and then the other");
    drop(upstream);
    stage.end().await;
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_and_what_is_left_goes_along() {
    let stage = Stage::new();
    let (app, backend) = stage.service("backend");
    let client = stage.client(&[("backend", backend)], Traffic::default());
    let grpc = ("content-type", "application/grpc");
    assert_eq!(client.ask(&[grpc, ("grpc-timeout", "30S")]).await.status(), 200);
    let given = app.seen.lock().unwrap()[0]["grpc-timeout"].to_str().unwrap().to_owned();
    let micros: u64 = given.strip_suffix('u').unwrap().parse().unwrap();
    assert!((1_000_000..=30_000_000).contains(&micros), "{given}");
    app.stall();
    let late = client.ask(&[grpc, ("grpc-timeout", "50m")]).await;
    assert_eq!((late.status(), &late.headers()["grpc-status"]), (StatusCode::OK, &"4".parse().unwrap()));
    let malformed = client.ask(&[grpc, ("grpc-timeout", "soon")]).await;
    assert_eq!(malformed.headers()["grpc-status"], "3");
    stage.end().await;
}

impl Stage {
    fn upstream(&self, endpoints: Source, how: &str) -> Arc<Upstream> {
        let config = UpstreamConfig { endpoints, ..Self::upstream_config("backend", Vec::new()) };
        let (source, clock) = (self.authority.source(CLIENT), SystemClock::shared());
        Upstream::steered(config, traffic(how), Dice::seeded(5), source, clock, &self.scope).unwrap()
    }
}

async fn ask(upstream: &Upstream) -> u16 {
    let request = Request::get("/").body(sidecar::empty()).unwrap();
    match tokio::time::timeout(DEADLINE, upstream.send(request)).await.unwrap() {
        Ok(response) => response.status().as_u16(),
        Err(error) => error.status().as_u16(),
    }
}

/// Waits until it holds.
async fn until(holds: impl AsyncFn() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.unwrap();
}

#[tokio::test]
async fn an_endpoint_that_is_ill_gets_no_requests_until_it_is_well() {
    let stage = Stage::new();
    let ((one, first), (_, second)) = (stage.service("backend"), stage.service("backend"));
    let how = "balance = \"round-robin\"\neject = { connect = 0, gateway = 0 }\n\
               health = { check = \"http:/\", every = \"100ms\", rise = 1, fall = 2 }";
    let upstream = stage.upstream(vec![first, second].into(), how);
    let all_answer = async || {
        for _ in 0..10 {
            if ask(&upstream).await != 200 {
                return false;
            }
        }
        true
    };
    assert!(all_answer().await);
    one.does(How::Fail);
    assert!(!all_answer().await, "it is asked in turn, and nobody knows yet");
    until(all_answer).await;
    one.does(How::Answer);
    // Questions and requests look alike to the app: more than questions can be says that requests come.
    until(async || {
        let before = one.count();
        for _ in 0..50 {
            assert_eq!(ask(&upstream).await, 200);
        }
        one.count() >= before + 25
    })
    .await;
    drop(upstream);
    stage.end().await;
}

#[tokio::test]
async fn a_check_that_the_policy_denies_or_nobody_serves_leaves_the_last_endpoints_in() {
    let stage = Stage::new();
    let (app, address) = stage.service("backend");
    let how = "health = { check = \"grpc\", every = \"100ms\", fall = 1 }";
    let upstream = stage.upstream(vec![address].into(), how);
    for _ in 0..30 {
        assert_eq!(ask(&upstream).await, 200);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(app.count(), 30, "the question goes no further than the policy lets it");
    drop(upstream);
    stage.end().await;
}

#[tokio::test]
async fn a_name_is_looked_up_and_its_addresses_are_the_endpoints() {
    let stage = Stage::new();
    let (_, address) = stage.service("backend");
    let name = Source::Dns { name: "localhost".into(), port: address.port() };
    let upstream = stage.upstream(name, "");
    until(async || ask(&upstream).await == 200).await;
    // IPv6's loopback, if the name has it, costs no request.
    for _ in 0..20 {
        assert_eq!(ask(&upstream).await, 200);
    }
    let nobody = Source::Dns { name: "nobody.invalid".into(), port: 1 };
    assert_eq!(ask(&stage.upstream(nobody, "")).await, 503);
    drop(upstream);
    stage.end().await;
}

#[tokio::test]
async fn a_sidecar_is_ready_when_its_app_is_well() {
    let stage = Stage::new();
    let (admin, at) = listener();
    let check = toml::from_str("check = \"http:/\"\nevery = \"100ms\"\nrise = 1\nfall = 1").unwrap();
    let (app, _) =
        stage.service_of("backend", Some(admin), |inbound| InboundConfig { health: Some(check), ..inbound });
    let page = async |target: &str| {
        let client = Client { stage: &stage, address: at };
        client.get(target, &[]).await
    };
    let says = async |status: u16| until(async || page("/ready").await.status() == status).await;
    says(200).await;
    assert!(page("/metrics").await.body().contains("palisade_app_healthy 1"));
    app.does(How::Fail);
    says(503).await;
    let told = page("/ready").await;
    assert!(told.body().contains("the app is not well"), "{}", told.body());
    assert!(page("/metrics").await.body().contains("palisade_app_healthy 0"));
    app.does(How::Answer);
    says(200).await;
    stage.end().await;
}

#[tokio::test]
async fn a_content_type_takes_no_bound_off_an_app_that_serves_no_calls() {
    let stage = Stage::new();
    let (app, backend) = stage.service_with("backend", |inbound| InboundConfig {
        request_timeout: Duration::from_millis(100),
        ..inbound
    });
    let client = stage.client(&[("backend", backend)], Traffic::default());
    app.stall();
    let late = client.ask(&[("content-type", "application/grpc")]).await;
    assert_eq!(late.headers()["grpc-status"], "4");
    stage.end().await;
}
