//! Identities that rotate and expire, between a real sidecar and real callers, by injected clocks and sources.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]
#![allow(clippy::disallowed_methods, reason = "callers of the test are joined by it")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use identity::clock::{Clock as _, ManualClock, SharedClock, SystemClock};
use identity::source::IdentityPublisher;
use identity::testing::{TestAuthority, ahead, offset};
use identity::tls::ALPN_HTTP11;
use identity::{BundleSet, IdentitySource, Scope, SpiffeId, TrustDomain, X509Svid};
use policy::{NoRecorder, Policies};
use sidecar::app::AppProtocol;
use sidecar::capture::CaptureConfig;
use sidecar::traffic::config::{Retries, Traffic};
use sidecar::traffic::random::Dice;
use sidecar::upstream::{Upstream, UpstreamConfig};
use sidecar::{InboundConfig, Sidecar, SidecarConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Bounds a hang.
const DEADLINE: Duration = Duration::from_secs(60);
const CLIENT: &str = "/ns/default/sa/client";
const BACKEND: &str = "/ns/default/sa/backend";

/// A sidecar before an app that answers everything, and who vouches for all.
struct World {
    authority: TestAuthority,
    backend: IdentityPublisher,
    inbound: SocketAddr,
    clock: SharedClock,
    scope: Scope,
}

impl World {
    async fn new(clock: SharedClock) -> Self {
        let authority = TestAuthority::new("mesh.test");
        let scope = Scope::new();
        let app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app_address = app.local_addr().unwrap();
        let accepting = scope.clone();
        scope.spawn("app", async move {
            loop {
                let stream = tokio::select! {
                    accepted = app.accept() => accepted.unwrap().0,
                    () = accepting.draining() => return,
                };
                tokio::spawn(answer(stream));
            }
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let inbound = listener.local_addr().unwrap();
        let (backend, source) = IdentitySource::channel();
        backend.publish(authority.issue(BACKEND), Arc::new(BundleSet::new([authority.bundle()])));
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/ours/policies");
        let policies = Policies::load(&folder, &TrustDomain::new("mesh.test").unwrap()).unwrap();
        let config = SidecarConfig {
            id: id(BACKEND),
            inbound: Some(InboundConfig {
                service: "backend".into(),
                listener,
                app: app_address,
                app_protocol: AppProtocol::Http1,
                policy: policies.service("backend").unwrap(),
                gateways: Vec::new(),
                request_timeout: DEADLINE,
                hbone: None,
                proxies: Default::default(),
                rate_limit: None,
                health: None,
            }),
            ext_authz: None,
            calls: Vec::new(),
            capture: CaptureConfig::default(),
            admin: None,
            access_log: None,
            traces: None,
            others: Vec::new(),
            budget: sidecar::overload::Budget::default(),
        };
        let (recorder, random) = (Arc::new(NoRecorder), identity::random::system());
        Sidecar::start(config, source, recorder, clock.clone(), random, &scope).unwrap();
        Self { authority, backend, inbound, clock, scope }
    }

    fn bundles(&self) -> Arc<BundleSet> {
        Arc::new(BundleSet::new([self.authority.bundle()]))
    }

    fn upstream(&self, source: IdentitySource) -> Arc<Upstream> {
        self.steered(Traffic::default(), source)
    }

    fn steered(&self, traffic: Traffic, source: IdentitySource) -> Arc<Upstream> {
        let config = UpstreamConfig {
            service: "backend".into(),
            id: id(BACKEND),
            endpoints: vec![self.inbound].into(),
            response_timeout: DEADLINE,
        };
        let dice = Dice::seeded(17);
        Upstream::steered(config, traffic, dice, source, self.clock.clone(), &self.scope).unwrap()
    }

    async fn end(self) {
        self.scope.drain();
        self.scope.finished(DEADLINE).await.unwrap();
    }
}

/// Answers `ok` to each request, none of which has a body.
async fn answer(mut stream: tokio::net::TcpStream) -> std::io::Result<()> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while stream.read(&mut byte).await? == 1 {
        head.push(byte[0]);
        if head.ends_with(b"\r\n\r\n") {
            head.clear();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await?;
        }
    }
    Ok(())
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&format!("spiffe://mesh.test{path}")).unwrap()
}

/// The status of one call, its answer read to the end.
async fn call(upstream: &Upstream) -> StatusCode {
    match upstream.send(Request::get("/").body(sidecar::empty()).unwrap()).await {
        Ok(response) => {
            let status = response.status();
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok");
            status
        }
        Err(error) => error.status(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_rotations_of_both_ends_under_load_lose_no_call() {
    const ROTATIONS: u64 = 1000;
    const CALLERS: usize = 4;
    let world = World::new(SystemClock::shared()).await;
    let svids = |path: &str| -> Vec<X509Svid> { (0..16).map(|_| world.authority.issue(path)).collect() };
    let (clients, backends) = (svids(CLIENT), svids(BACKEND));
    let (client, source) = IdentitySource::channel();
    client.publish(clients[0].clone(), world.bundles());
    let upstream = world.upstream(source);
    let (answered, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let (upstream, answered, done) =
                (Arc::clone(&upstream), Arc::clone(&answered), Arc::clone(&done));
            tokio::spawn(async move {
                while !done.load(Ordering::SeqCst) {
                    assert_eq!(call(&upstream).await, 200);
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    for rotation in 0..ROTATIONS {
        let nth = rotation as usize % clients.len();
        let (publisher, svid) =
            if rotation % 2 == 0 { (&client, &clients[nth]) } else { (&world.backend, &backends[nth]) };
        publisher.publish(svid.clone(), world.bundles());
        // Calls were answered since the last one, so that each rotation meets some under way.
        let before = answered.load(Ordering::SeqCst);
        let more = async {
            while answered.load(Ordering::SeqCst) <= before {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, more).await.expect("no call is answered any more");
    }
    done.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.await.unwrap();
    }
    drop(upstream);
    world.end().await;
}

#[tokio::test]
async fn a_peer_s_connection_closes_when_its_certificate_expires_and_not_before() {
    let clock = ManualClock::at(SystemClock.now());
    let world = World::new(clock.clone()).await;
    let (der, key) = world.authority.issue_with(CLIENT, |params| params.not_after = offset(ahead(60)));
    let source = IdentitySource::fixed(
        X509Svid::new(vec![der], key).unwrap(),
        BundleSet::new([world.authority.bundle()]),
    );
    let config = identity::tls::client_config(&source, id(BACKEND), &[ALPN_HTTP11], &world.clock).unwrap();
    let stream = tokio::net::TcpStream::connect(world.inbound).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(config);
    let mut stream = connector.connect(identity::tls::unnamed_server(), stream).await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: backend\r\n\r\n";
    let mut some = [0; 4096];
    for _ in 0..2 {
        stream.write_all(request).await.unwrap();
        let length = stream.read(&mut some).await.unwrap();
        assert!(some[..length].starts_with(b"HTTP/1.1 200 "));
        clock.advance(Duration::from_secs(25));
    }
    // Past its end by a moment of the injected clock, which then stands still: nothing else ends it.
    clock.advance(Duration::from_secs(11));
    let ended = tokio::time::timeout(DEADLINE, stream.read(&mut some)).await.expect("it stays open");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    world.end().await;
}

#[tokio::test]
async fn calls_survive_clocks_that_jump_and_what_a_wrong_time_refuses_is_well_when_it_is_right() {
    let now = SystemClock.now();
    let (earlier, later) =
        (|seconds| now - Duration::from_secs(seconds), |seconds| now + Duration::from_secs(seconds));
    let clock = ManualClock::at(now);
    let world = World::new(clock.clone()).await;
    let source =
        IdentitySource::fixed(world.authority.issue(CLIENT), BundleSet::new([world.authority.bundle()]));
    // Without retries, whose pauses would wait for a clock that stands.
    let once = Traffic { retries: Retries { max: 0, ..Retries::default() }, ..Traffic::default() };
    let fresh = || world.steered(once.clone(), source.clone());
    let kept = fresh();
    // Within what certificates allow, forth and back, over kept connections and new ones.
    for time in [now, later(1200), earlier(30), later(1500), later(3), later(1700), now] {
        clock.set(time);
        assert_eq!(call(&kept).await, 200, "{time:?}");
        assert_eq!(call(&fresh()).await, 200, "{time:?}");
    }
    // A day ahead nobody has a valid certificate any more; a day back nobody has one yet.
    const DAY: u64 = 24 * 3600;
    clock.set(later(DAY));
    assert_eq!(call(&kept).await, 503);
    assert_eq!(call(&fresh()).await, 503);
    clock.set(now);
    assert_eq!(call(&kept).await, 200);
    clock.set(earlier(DAY));
    assert_eq!(call(&fresh()).await, 503);
    clock.set(now);
    assert_eq!(call(&fresh()).await, 200);
    assert_eq!(call(&kept).await, 200);
    drop(kept);
    world.end().await;
}
