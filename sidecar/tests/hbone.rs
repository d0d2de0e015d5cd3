//! HBONE: an independent client's tunnels (Python's ssl and h2), and one of our own where a test must hold still.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Method, Request, Response};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use identity::clock::SystemClock;
use identity::testing::TestAuthority;
use identity::tls::{ALPN_H2, client_config, unnamed_server};
use identity::{Peer, Scope, SpiffeId, TrustDomain};
use policy::{MemoryRecorder, Policies, ServicePolicy};
use serde_json::{Value, json};
use sidecar::hbone::{Hbone, HttpTunnels, Tunnel};
use sidecar::live::Registry;
use sidecar::tcp::inbound::TcpInboundConfig;
use sidecar::tcp::{Ports, TcpInbound, TcpStats};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

const MESH: &str = "namespace Mesh {
  entity Workload { service: String, trust_domain: String };
  entity Client;
}";
const SCHEMA: &str = "namespace Db {
  entity Port;
  type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };
  action Connect, Look appliesTo {
    principal: [Mesh::Workload], resource: [Port], context: { user?: User, chain: Set<String>, now: Long }
  };
}";
const WEB_ONLY: &str = r#"@id("web-connects")
permit (principal == Mesh::Workload::"spiffe://bank.example/service/web", action, resource == Db::Port::"main");"#;
const NOBODY: &str = "@id(\"closed-for-repair\")\nforbid (principal, action, resource);";
const ROUTES: &str =
    "[[route]]\nmatch = \"GET /{port:slug}\"\naction = \"Look\"\nobject = 'Port::\"{port}\"'\n";
/// How the other mesh knows the app: not where it listens.
const APP: &str = "10.4.0.7:5432";

fn policy(map: &str, cedar: &str) -> Arc<ServicePolicy> {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("mesh.cedarschema", MESH),
        ("services/db/db.cedarschema", SCHEMA),
        ("services/db/map.toml", map),
        ("services/db/db.cedar", cedar),
    ] {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let policies = Policies::load(folder.path(), &TrustDomain::new("bank.example").unwrap());
    policies.unwrap_or_else(|problems| panic!("{problems}")).service("db").unwrap()
}

struct Db {
    authority: TestAuthority,
    address: SocketAddr,
    policy: Arc<ArcSwap<ServicePolicy>>,
    registry: Arc<Registry>,
    records: Arc<MemoryRecorder>,
    /// Connections that the app got.
    reached: Arc<AtomicUsize>,
    scope: Scope,
}

/// Says who asks, as the handler of the mTLS listener would know it.
struct WhoAsks;

impl HttpTunnels for WhoAsks {
    fn serve(self: Arc<Self>, stream: Tunnel, peer: Peer, _remote: SocketAddr) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let body = format!("{} asks {}", peer.id(), request.uri());
                async move { Ok::<_, std::convert::Infallible>(Response::new(Full::<Bytes>::from(body))) }
            });
            let served =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            served.await.unwrap();
        })
    }
}

impl Db {
    async fn new(map: &str) -> Self {
        let (scope, clock) = (Scope::new(), SystemClock::shared());
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ports = Ports::one(app.local_addr().unwrap());
        let (reached, inside) = (Arc::new(AtomicUsize::new(0)), scope.clone());
        let count = Arc::clone(&reached);
        scope.spawn("echo", async move {
            loop {
                let (mut stream, _) = tokio::select! {
                    accepted = app.accept() => accepted.unwrap(),
                    () = inside.draining() => return,
                };
                count.fetch_add(1, Ordering::SeqCst);
                inside.spawn("echo connection", async move {
                    let (mut read, mut write) = stream.split();
                    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                        write.shutdown().await.unwrap();
                    }
                });
            }
        });
        let authority = TestAuthority::new("bank.example");
        let source = authority.source("/service/db");
        let policy = Arc::new(ArcSwap::from(policy(map, WEB_ONLY)));
        let (registry, records) = (Registry::new(clock.clone()), Arc::new(MemoryRecorder::default()));
        let tcp = TcpInbound::new(TcpInboundConfig {
            service: "db".into(),
            id: SpiffeId::new("spiffe://bank.example/service/db").unwrap(),
            ports,
            policy: Arc::clone(&policy),
            registry: Arc::clone(&registry),
            source: source.clone(),
            recorder: Arc::clone(&records) as Arc<dyn policy::Recorder>,
            stats: TcpStats::default(),
            clock: clock.clone(),
            random: identity::random::system(),
            access_log: true,
        });
        let destinations = vec![(APP.parse().unwrap(), Ports::MAIN.to_owned())];
        let hbone = Hbone::new(destinations, tcp, Arc::new(WhoAsks), &source, clock).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        hbone.serve(listener, &sidecar::server::Limits::default(), &scope);
        Self { authority, address, policy, registry, records, reached, scope }
    }

    /// What the independent client gets as `service`; `None` if it cannot run here.
    async fn python(&self, service: &str, streams: Value, extra: &[&str]) -> Option<Result<Value, String>> {
        let folder = tempfile::tempdir().unwrap();
        let svid = self.authority.issue(service);
        std::fs::write(folder.path().join("certificate.der"), svid.leaf_der()).unwrap();
        std::fs::write(folder.path().join("key.der"), svid.key_pkcs8()).unwrap();
        std::fs::write(folder.path().join("authority.der"), &self.authority.bundle().authorities()[0])
            .unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hbone_client.py");
        let python = |args: Vec<std::ffi::OsString>| {
            let mut command = tokio::process::Command::new("python3");
            command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.kill_on_drop(true).spawn()
        };
        let probe = match python(vec!["-c".into(), "import h2.connection".into()]) {
            Ok(child) => child.wait_with_output().await.unwrap(),
            Err(error) => {
                identity::testing::skip(&format!("python3 cannot be run: {error}"));
                return None;
            }
        };
        if !probe.status.success() {
            identity::testing::skip("python3 cannot import h2 (pip install h2)");
            return None;
        }
        let mut args = vec![script.into(), self.address.port().to_string().into(), folder.path().into()];
        args.extend(extra.iter().map(Into::into));
        let mut child = python(args).unwrap();
        child.stdin.take().unwrap().write_all(streams.to_string().as_bytes()).await.unwrap();
        let output = child.wait_with_output().await.unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        Some(if output.status.success() {
            Ok(serde_json::from_slice(&output.stdout).unwrap())
        } else {
            Err(complaint)
        })
    }

    fn denials(&self) -> Vec<(String, String)> {
        let records = self.records.records();
        let denials = records.iter().filter(|record| record.status.is_some());
        denials.map(|record| (record.rule.name().to_owned(), record.receipt.to_string())).collect()
    }

    fn reached(&self) -> usize {
        self.reached.load(Ordering::SeqCst)
    }
}

fn connect(authority: &str, send: &str) -> Value {
    json!({ "method": "CONNECT", "authority": authority, "send": send, "finish": true })
}

#[tokio::test]
async fn an_independent_client_s_tunnels_reach_the_app_and_nothing_else() {
    let db = Db::new("mapping = \"tcp\"").await;
    // More than either window.
    let long: String = (0..1_500_000u32).map(|number| char::from((number % 251) as u8)).collect();
    let listening = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let elsewhere = listening.local_addr().unwrap().to_string();
    let streams = json!([
        connect(APP, &long),
        connect(APP, "second tunnel"),
        connect(&elsewhere, "x"),
        connect("localhost:5432", "x"),
        connect("10.4.0.7", "x"),
        { "method": "GET", "authority": APP, "send": "", "finish": true },
    ]);
    let Some(outcome) = db.python("/service/web", streams, &[]).await else { return };
    let outcome = outcome.unwrap_or_else(|complaint| panic!("{complaint}"));
    assert!(outcome[0] == json!({ "status": 200, "received": long, "end": "end" }));
    assert_eq!(outcome[1], json!({ "status": 200, "received": "second tunnel", "end": "end" }));
    assert_eq!(db.reached(), 2);
    let denials = db.denials();
    assert_eq!(denials.len(), 3);
    for stranger in &outcome.as_array().unwrap()[2..5] {
        assert_eq!(stranger["status"], 404);
        let body: Value = serde_json::from_str(stranger["received"].as_str().unwrap()).unwrap();
        assert!(
            denials.iter().any(|(rule, receipt)| rule == "hbone.not_our_app" && body["receipt"] == *receipt)
        );
    }
    assert_eq!(outcome[5]["status"], 405);
    assert!(futures::FutureExt::now_or_never(listening.accept()).is_none());
}

#[tokio::test]
async fn a_caller_without_a_permit_gets_a_receipt_and_no_tunnel() {
    let db = Db::new("mapping = \"tcp\"").await;
    let Some(outcome) = db.python("/service/other", json!([connect(APP, "x")]), &[]).await else { return };
    let outcome = outcome.unwrap_or_else(|complaint| panic!("{complaint}"));
    assert_eq!(outcome[0]["status"], 403);
    let denials = db.denials();
    assert_eq!(denials.len(), 1);
    let body: Value = serde_json::from_str(outcome[0]["received"].as_str().unwrap()).unwrap();
    assert_eq!(body["receipt"], denials[0].1);
    assert_eq!(db.reached(), 0);
}

#[tokio::test]
async fn without_a_certificate_there_is_no_connection() {
    let db = Db::new("mapping = \"tcp\"").await;
    let Some(outcome) = db.python("/service/web", json!([connect(APP, "x")]), &["--no-certificate"]).await
    else {
        return;
    };
    assert!(outcome.is_err());
    assert_eq!(db.denials()[0].0, "tls.no_client_certificate");
}

#[tokio::test]
async fn a_tunnel_to_a_service_of_requests_is_read_as_requests() {
    let db = Db::new(ROUTES).await;
    let request = "GET /main HTTP/1.1\r\nhost: db\r\nconnection: close\r\n\r\n";
    // A client that ends its side of a request's connection has gone.
    let talk = json!({ "method": "CONNECT", "authority": APP, "send": request, "finish": false });
    let Some(outcome) = db.python("/service/web", json!([talk]), &[]).await else { return };
    let outcome = outcome.unwrap_or_else(|complaint| panic!("{complaint}"));
    let received = outcome[0]["received"].as_str().unwrap();
    assert!(received.ends_with("spiffe://bank.example/service/web asks /main"), "{received}");
    // Not a byte went to the app beside the handler.
    assert_eq!(db.reached(), 0);
}

#[tokio::test]
async fn a_service_that_judges_for_itself_has_no_tunnels() {
    let db = Db::new("mapping = \"none\"").await;
    let Some(outcome) = db.python("/service/web", json!([connect(APP, "x")]), &[]).await else { return };
    assert_eq!(outcome.unwrap()[0]["status"], 403);
    assert_eq!(db.denials()[0].0, "tcp.not_allowed_by_map");
}

#[tokio::test]
async fn a_new_policy_that_denies_resets_what_is_open() {
    let db = Db::new("mapping = \"tcp\"").await;
    let clock = SystemClock::shared();
    let source = db.authority.source("/service/web");
    let expected = SpiffeId::new("spiffe://bank.example/service/db").unwrap();
    let tls = client_config(&source, expected, &[ALPN_H2], &clock).unwrap();
    let stream = TcpStream::connect(db.address).await.unwrap();
    let tls = TlsConnector::from(tls).connect(unnamed_server(), stream).await.unwrap();
    let (mut client, connection) = h2::client::handshake(tls).await.unwrap();
    db.scope.spawn("h2 client", async move {
        let _ended = connection.await;
    });
    let request = Request::builder().method(Method::CONNECT).uri(APP).body(()).unwrap();
    let (response, mut send) = client.send_request(request, false).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    send.send_data(Bytes::from_static(b"x"), false).unwrap();
    assert_eq!(body.data().await.unwrap().unwrap(), "x");
    assert_eq!(db.registry.list()[0].facts.kind, sidecar::live::Kind::Hbone);

    let next = policy("mapping = \"tcp\"", NOBODY);
    db.policy.store(Arc::clone(&next));
    db.registry.reevaluate_all(&next).await;
    let error = body.data().await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::CANCEL));
    assert_eq!(db.denials().last().unwrap().0, "closed-for-repair");
}
