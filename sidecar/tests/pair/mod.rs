//! Two sidecars in one process: web's app calls stock through both.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use identity::clock::SystemClock;
use identity::testing::TestAuthority;
use identity::{Scope, SpiffeId, TrustDomain};
use policy::{NoRecorder, Policies, ServicePolicy};
use sidecar::app::AppProtocol;
use sidecar::capture::CaptureConfig;
use sidecar::proxy_protocol::Networks;
use sidecar::traffic::config::Traffic;
use sidecar::upstream::UpstreamConfig;
use sidecar::{Call, Carries, InboundConfig, Sidecar, SidecarConfig};

const FILES: [(&str, &str); 4] = [
    (
        "mesh.cedarschema",
        "namespace Mesh {\n  entity Workload { service: String, trust_domain: String };\n  entity Client;\n}\n",
    ),
    (
        "services/stock/stock.cedarschema",
        r#"
namespace Stock {
  entity Item { owner: String };
  action ReadItem appliesTo {
    principal: [Mesh::Workload], resource: [Item],
    context: { user?: { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long }, chain: Set<String>, now: Long }
  };
}
"#,
    ),
    (
        "services/stock/map.toml",
        r#"
[[route]]
match = "GET /items/{id:slug}"
action = "ReadItem"
object = 'Item::"{id}"'
attributes = { owner = "path:id" }
"#,
    ),
    (
        "services/stock/stock.cedar",
        r#"
@id("web-reads")
permit (
  principal == Mesh::Workload::"spiffe://shop.example/service/web",
  action == Stock::Action::"ReadItem",
  resource
) unless { resource.owner == "secret" };
"#,
    ),
];

/// web → stock, and what a test reaches of it.
pub(crate) struct Pair {
    pub(crate) authority: TestAuthority,
    /// Where web's app calls stock.
    pub(crate) calls: SocketAddr,
    pub(crate) stock: SocketAddr,
    pub(crate) web_admin: SocketAddr,
    pub(crate) stock_admin: SocketAddr,
    pub(crate) scope: Scope,
    _policies: tempfile::TempDir,
}

pub(crate) fn id(path: &str) -> SpiffeId {
    TrustDomain::new("shop.example").unwrap().workload(path).unwrap()
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn policy() -> (tempfile::TempDir, Arc<ServicePolicy>) {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in FILES {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let policies = Policies::load(folder.path(), &TrustDomain::new("shop.example").unwrap());
    let policies = policies.unwrap_or_else(|problems| panic!("{problems}"));
    (folder, policies.service("stock").unwrap())
}

fn config(id: SpiffeId, admin: TcpListener) -> SidecarConfig {
    SidecarConfig {
        id,
        inbound: None,
        ext_authz: None,
        calls: Vec::new(),
        capture: CaptureConfig::default(),
        admin: Some(admin),
        access_log: None,
        traces: None,
        others: Vec::new(),
        budget: sidecar::overload::Budget::default(),
    }
}

impl Pair {
    pub(crate) async fn new() -> Self {
        Self::changed(|config| config).await
    }

    /// Both sidecars with their configurations changed by `change`.
    pub(crate) async fn changed(change: impl Fn(SidecarConfig) -> SidecarConfig) -> Self {
        let (authority, scope) = (TestAuthority::new("shop.example"), Scope::new());
        let (folder, policy) = policy();
        let app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app_address = app.local_addr().unwrap();
        scope.spawn("app", serve_app(app, scope.clone()));

        let ((inbound, stock), (admin, stock_admin)) = (listener(), listener());
        let inbound = InboundConfig {
            service: "stock".into(),
            listener: inbound,
            app: app_address,
            app_protocol: AppProtocol::Http1,
            policy,
            gateways: Vec::new(),
            request_timeout: Duration::from_secs(10),
            hbone: None,
            proxies: Networks::default(),
            rate_limit: None,
            health: None,
        };
        let of_stock = SidecarConfig { inbound: Some(inbound), ..config(id("/service/stock"), admin) };
        let ((listening, calls), (admin, web_admin)) = (listener(), listener());
        let upstream = UpstreamConfig {
            service: "stock".into(),
            id: id("/service/stock"),
            endpoints: vec![stock].into(),
            response_timeout: Duration::from_secs(10),
        };
        let call =
            Call { listener: listening, upstream, carries: Carries::Requests, traffic: Traffic::default() };
        let of_web = SidecarConfig { calls: vec![call], ..config(id("/service/web"), admin) };
        for (config, path) in [(of_stock, "/service/stock"), (of_web, "/service/web")] {
            let (source, random) = (authority.source(path), identity::random::system());
            let recorder = Arc::new(NoRecorder);
            Sidecar::start(change(config), source, recorder, SystemClock::shared(), random, &scope).unwrap();
        }
        Self { authority, calls, stock, web_admin, stock_admin, scope, _policies: folder }
    }

    /// As web's app does.
    pub(crate) async fn call(&self, target: &str, headers: &[(&str, &str)]) -> (StatusCode, String) {
        self.get(self.calls, target, headers).await
    }

    /// A page of an admin port, parsed.
    pub(crate) async fn page(&self, admin: SocketAddr, target: &str) -> serde_json::Value {
        let (status, body) = self.get(admin, target, &[]).await;
        assert_eq!(status, 200, "{target}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    pub(crate) async fn get(
        &self,
        to: SocketAddr,
        target: &str,
        headers: &[(&str, &str)],
    ) -> (StatusCode, String) {
        let response = self.open(to, target, headers).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// The head of the answer; its body still comes.
    pub(crate) async fn open(
        &self,
        to: SocketAddr,
        target: &str,
        headers: &[(&str, &str)],
    ) -> Response<Incoming> {
        let stream = tokio::net::TcpStream::connect(to).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        self.scope.spawn("test client", async move {
            let _ended = connection.await;
        });
        let mut request = Request::get(target);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", to.to_string());
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        sender.send_request(request.body(Full::<Bytes>::default()).unwrap()).await.unwrap()
    }

    pub(crate) async fn end(self) {
        self.scope.drain();
        self.scope.finished(Duration::from_secs(10)).await.unwrap();
    }
}

/// Answers each request with the `traceparent` that came with it.
async fn serve_app(listener: tokio::net::TcpListener, scope: Scope) {
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => accepted.unwrap(),
            () = scope.draining() => return,
        };
        scope.spawn("app connection", async move {
            let service = service_fn(async |request: Request<Incoming>| {
                let trace = request.headers().get("traceparent").cloned();
                let body = trace.map_or(Bytes::new(), |trace| Bytes::copy_from_slice(trace.as_bytes()));
                Ok::<_, hyper::Error>(Response::new(Full::<Bytes>::new(body)))
            });
            let _ended = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}
