//! A sidecar of a bank's accounts between real peers and a real app that records what reached it.

#![allow(dead_code, reason = "not every test program that shares this file needs all of it")]

pub(crate) mod raw;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use identity::clock::{SharedClock, SystemClock};
use identity::testing::TestAuthority;
use identity::txn::{self, RequestBinding, User};
use identity::{IdentitySource, Scope, SpiffeId, TrustDomain, X509Svid};
use policy::{DecisionRecord, MemoryRecorder, Policies};
use sidecar::app::AppProtocol;
use sidecar::capture::CaptureConfig;
use sidecar::upstream::{Upstream, UpstreamConfig};
use sidecar::{InboundConfig, Sidecar, SidecarConfig};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

pub(crate) const SCHEMA: &str = r#"
namespace Mesh {
  entity Workload { service: String, trust_domain: String };
  entity Client;
}
"#;

pub(crate) const ACCOUNTS_SCHEMA: &str = r#"
namespace Accounts {
  entity Account { owner: String };
  entity Book;
  type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };
  action ReadAccount, MoveMoney appliesTo {
    principal: [Mesh::Workload], resource: [Account],
    context: { user?: User, chain: Set<String>, now: Long }
  };
  action CountAccounts appliesTo {
    principal: [Mesh::Workload], resource: [Account],
    context: { user?: User, chain: Set<String>, now: Long }
  };
  action ListAccounts appliesTo {
    principal: [Mesh::Workload], resource: [Book],
    context: { user?: User, chain: Set<String>, now: Long }
  };
}
"#;

pub(crate) const ACCOUNTS_MAP: &str = r#"
[[route]]
match = "GET /accounts/{id:int}"
action = "ReadAccount"
object = 'Account::"{id}"'
attributes = { owner = "response:/owner" }

[[route]]
match = "POST /transfers"
action = "MoveMoney"
object = 'Account::"{body:/from}"'
body = { from = "id", to = "id", amount_cents = "int" }
attributes = { owner = "entities" }

[[route]]
match = "GET /owners/{owner:slug}/accounts"
action = "CountAccounts"
object = 'Account::"{owner}"'
attributes = { owner = "path:owner" }

[[route]]
match = "POST /statements"
action = "ReadAccount"
object = 'Account::"{body:/accounts}"'
body = { accounts = "[id]" }
attributes = { owner = "entities" }

[[route]]
match = "POST /batches/get"
action = "ReadAccount"
object = 'Account::"{body:/ids}"'
body = { ids = "[id]", view = "text?" }
attributes = { owner = "entities" }
batch = "filter"

[[route]]
match = "POST /bank.Accounts/BatchGet"
action = "ReadAccount"
object = 'Account::"{body:/ids}"'
body_type = "grpc"
body = { ids = "[id]" }
attributes = { owner = "entities" }
batch = "filter"

[[route]]
match = "GET /accounts"
action = "ListAccounts"
object = 'Book::"all"'
query = ["page"]
[route.list]
items = "accounts"
action = "ReadAccount"
object = 'Account::"{/id}"'
attributes = { owner = "/owner" }
counts = ["total"]
cursors = ["next"]
keeps = ["currency"]
"#;

pub(crate) const ACCOUNTS_PROTO: &str = r#"
syntax = "proto3";
package bank;
message Ask { string view = 1; repeated string ids = 2; }
service Accounts { rpc BatchGet(Ask) returns (Ask); }
"#;

pub(crate) const ACCOUNTS_POLICIES: &str = r#"
@id("web-for-owner")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/web",
  action in [Accounts::Action::"ReadAccount", Accounts::Action::"MoveMoney", Accounts::Action::"CountAccounts"],
  resource
) when { context has user && resource.owner == context.user.id };

@id("web-lists")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/web",
  action == Accounts::Action::"ListAccounts",
  resource
) when { context has user };
"#;

/// The files of the bank's accounts.
pub(crate) const ACCOUNTS: [(&str, &str); 5] = [
    ("mesh.cedarschema", SCHEMA),
    ("services/accounts/accounts.cedarschema", ACCOUNTS_SCHEMA),
    ("services/accounts/map.toml", ACCOUNTS_MAP),
    ("services/accounts/accounts.cedar", ACCOUNTS_POLICIES),
    ("services/accounts/accounts.proto", ACCOUNTS_PROTO),
];

/// What the backend saw.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    pub(crate) target: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

pub(crate) struct World {
    pub(crate) authority: TestAuthority,
    /// Of another trust domain, which this one trusts.
    pub(crate) neighbour: TestAuthority,
    pub(crate) sidecar: Sidecar,
    pub(crate) inbound: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) seen: Arc<Mutex<Vec<Seen>>>,
    pub(crate) records: Arc<MemoryRecorder>,
    pub(crate) clock: SharedClock,
    pub(crate) scope: Scope,
    _policies: tempfile::TempDir,
}

pub(crate) fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

pub(crate) fn random() -> sidecar::trace::SharedRandom {
    Arc::new(ring::rand::SystemRandom::new())
}

pub(crate) fn policies(files: &[(&str, &str)]) -> (tempfile::TempDir, Arc<Policies>) {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let policies = Policies::load(folder.path(), &TrustDomain::new("bank.example").unwrap());
    let policies = policies.unwrap_or_else(|problems| panic!("{problems}"));
    (folder, policies)
}

/// Accounts: 17 is alice's, 42 is bob's. Slow on request, so that drains can be seen.
async fn backend(seen: Arc<Mutex<Vec<Seen>>>, listener: tokio::net::TcpListener, scope: Scope) {
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => accepted.unwrap(),
            () = scope.draining() => return,
        };
        let seen = Arc::clone(&seen);
        scope.spawn("backend connection", async move {
            let service = service_fn(move |request: Request<Incoming>| answer(Arc::clone(&seen), request));
            let _ended = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(
    seen: Arc<Mutex<Vec<Seen>>>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (parts, body) = request.into_parts();
    let body = String::from_utf8(body.collect().await?.to_bytes().to_vec()).unwrap();
    let headers = parts
        .headers
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();
    let target = parts.uri.to_string();
    let seen_body = body.clone();
    seen.lock().unwrap().push(Seen { method: parts.method.clone(), target: target.clone(), headers, body });
    let owner = |id: &str| match id {
        "17" | "18" => Some("alice"),
        id if id.starts_with("10") => Some("alice"),
        "42" => Some("bob"),
        _ => None,
    };
    let json = |status: u16, body: String| {
        let response = Response::builder().status(status).header("content-type", "application/json");
        Ok(response.body(Full::from(body)).unwrap())
    };
    if let Some(id) = target.strip_prefix("/accounts/") {
        return match owner(id) {
            Some(owner) => json(200, format!(r#"{{"id":"{id}","owner":"{owner}","balance_cents":1}}"#)),
            None if id == "500" => json(500, r#"{"secret":"stack trace"}"#.into()),
            None => json(404, r#"{"error":"none"}"#.into()),
        };
    }
    if target == "/.well-known/palisade/entities" {
        let asked: serde_json::Value = serde_json::from_str(&seen_body).unwrap();
        let ids = asked["objects"].as_array().unwrap().iter().map(|object| object["id"].as_str().unwrap());
        let told = ids.filter_map(|id| {
            let owner = owner(id)?;
            Some(serde_json::json!({"type": "Account", "id": id, "attributes": {"owner": owner}}))
        });
        return json(200, serde_json::json!({"objects": told.collect::<Vec<_>>()}).to_string());
    }
    if let Some(page) = target.strip_prefix("/accounts") {
        let list = match page {
            "" => {
                r#"{"accounts":[{"id":"17","owner":"alice"},{"id":"42","owner":"bob"},{"id":"18","owner":"alice"},{"id":"43"}],"total":4,"next":"after-43","currency":"EUR","hint":"bob has 42"}"#
            }
            "?page=2" => r#"{"accounts":[{"id":"17","owner":"alice"}],"total":1,"next":"after-17"}"#,
            "?page=3" => r#"{"accounts":{"id":"17"}}"#,
            "?page=4" => r#"{"accounts":[{"owner":"alice"}]}"#,
            "?page=5" => r#"{"accounts":[{"id":"17","owner":"alice","owner":"bob"}]}"#,
            _ => return json(404, r#"{"error":"no such page"}"#.into()),
        };
        let response = Response::builder().header("content-type", "application/json");
        let response = response.header("x-total-count", "4").header("etag", "\"four\"");
        return Ok(response.header("link", "</accounts?page=43>; rel=next").body(Full::from(list)).unwrap());
    }
    json(201, "{}".into())
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(&ACCOUNTS).await
    }

    /// By these files.
    pub(crate) async fn with(files: &[(&str, &str)]) -> Self {
        let (scope, seen) = (Scope::new(), Arc::new(Mutex::new(Vec::new())));
        let app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = app.local_addr().unwrap();
        scope.spawn("backend", backend(Arc::clone(&seen), app, scope.clone()));
        Self::before((address, AppProtocol::Http1), files, seen, scope)
    }

    /// Before an app of the test's own.
    pub(crate) fn before(
        (app_address, app_protocol): (SocketAddr, AppProtocol),
        files: &[(&str, &str)],
        seen: Arc<Mutex<Vec<Seen>>>,
        scope: Scope,
    ) -> Self {
        let (authority, neighbour) = (TestAuthority::new("bank.example"), TestAuthority::new("bankxexample"));
        let (folder, policies) = policies(files);
        let clock = SystemClock::shared();
        let ((inbound, inbound_address), (admin, admin_address)) = (listener(), listener());
        let records = Arc::new(MemoryRecorder::default());
        let config = SidecarConfig {
            id: id("/service/accounts"),
            inbound: Some(InboundConfig {
                service: "accounts".into(),
                listener: inbound,
                app: app_address,
                app_protocol,
                policy: policies.service("accounts").unwrap(),
                gateways: vec![id("/palisade/gateway")],
                request_timeout: Duration::from_secs(10),
                hbone: None,
                proxies: Default::default(),
                rate_limit: None,
                health: None,
            }),
            ext_authz: None,
            calls: Vec::new(),
            capture: CaptureConfig::default(),
            admin: Some(admin),
            access_log: None,
            traces: None,
            others: Vec::new(),
            budget: sidecar::overload::Budget::default(),
        };
        let trusted = identity::BundleSet::new([authority.bundle(), neighbour.bundle()]);
        let source = IdentitySource::fixed(authority.issue("/service/accounts"), trusted);
        let recorder = records.clone();
        let sidecar = Sidecar::start(config, source, recorder, clock.clone(), random(), &scope).unwrap();
        Self {
            authority,
            neighbour,
            sidecar,
            inbound: inbound_address,
            admin: admin_address,
            seen,
            records,
            clock,
            scope,
            _policies: folder,
        }
    }

    pub(crate) fn user(&self, name: &str) -> User {
        User {
            id: name.into(),
            issuer: "https://idp.example".into(),
            client: "bank-web".into(),
            scopes: vec!["bank".into()],
            groups: vec![],
            auth_time: 0,
            tenant: None,
            mfa: false,
        }
    }

    /// The chain gateway → web → accounts for one request.
    pub(crate) fn chain(&self, web: &X509Svid, user: &str, method: &str, target: &str) -> String {
        let (gateway, now) = (self.authority.issue("/palisade/gateway"), self.clock.now());
        let binding = RequestBinding::new(method, target);
        let token = txn::mint(&gateway, &self.user(user), web.id(), binding, txn::MAX_LIFETIME, now).unwrap();
        let bundles = identity::BundleSet::new([self.authority.bundle()]);
        let arrival = txn::Arrival {
            me: web.id(),
            presenter: gateway.id(),
            bundles: &bundles,
            generation: 1,
            binding,
            now,
        };
        let chain = txn::Verifier::new(vec![gateway.id().clone()]).verify(&token, arrival).unwrap();
        txn::extend(&chain, web, &id("/service/accounts"), binding, now).unwrap()
    }

    pub(crate) async fn send(
        &self,
        svid: &X509Svid,
        request: Request<sidecar::Body>,
    ) -> (StatusCode, String) {
        let response = self.answer(svid, request).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    pub(crate) async fn answer(
        &self,
        svid: &X509Svid,
        request: Request<sidecar::Body>,
    ) -> Response<sidecar::Body> {
        let source = IdentitySource::fixed(svid.clone(), identity::BundleSet::new([self.authority.bundle()]));
        let config = UpstreamConfig {
            service: "accounts".into(),
            id: id("/service/accounts"),
            endpoints: vec![self.inbound].into(),
            response_timeout: Duration::from_secs(30),
        };
        let upstream = Upstream::new(config, source, self.clock.clone(), &self.scope).unwrap();
        upstream.send(request).await.unwrap()
    }

    /// What web gets for `user`, with its headers.
    pub(crate) async fn response(
        &self,
        user: &str,
        target: &str,
        headers: &[(&str, &str)],
    ) -> Response<sidecar::Body> {
        let web = self.authority.issue("/service/web");
        let chain = self.chain(&web, user, "GET", target);
        let mut request = Request::get(target).header(txn::HEADER, chain);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.answer(&web, request.body(sidecar::empty()).unwrap()).await
    }

    /// As web, for `user`.
    pub(crate) async fn call(
        &self,
        user: &str,
        method: &str,
        target: &str,
        body: &str,
        headers: &[(&str, &str)],
    ) -> (StatusCode, String) {
        let web = self.authority.issue("/service/web");
        let chain = self.chain(&web, user, method, target);
        let mut request = Request::builder().method(method).uri(target).header(txn::HEADER, chain);
        for (name, value) in headers {
            request = request.header(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        if !body.is_empty() && !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header("content-type", "application/json");
        }
        let body = if body.is_empty() { sidecar::empty() } else { sidecar::full(body.to_owned()) };
        self.send(&web, request.body(body).unwrap()).await
    }

    /// A connection of this peer's, with nothing said on it yet.
    pub(crate) async fn connect(&self, svid: &X509Svid, alpn: &[u8]) -> TlsStream<TcpStream> {
        let source = IdentitySource::fixed(svid.clone(), identity::BundleSet::new([self.authority.bundle()]));
        let config =
            identity::tls::client_config(&source, id("/service/accounts"), &[alpn], &self.clock).unwrap();
        let stream = TcpStream::connect(self.inbound).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let connector = tokio_rustls::TlsConnector::from(config);
        let stream = connector.connect(identity::tls::unnamed_server(), stream).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(alpn));
        stream
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn last_rule(&self) -> String {
        self.last().rule.name().to_owned()
    }

    /// The last denial; permits are sampled and come when their answer does.
    pub(crate) fn last(&self) -> DecisionRecord {
        let denied = |record: &DecisionRecord| record.verdict == policy::Outcome::Deny;
        self.records.records().into_iter().rfind(denied).expect("a denial")
    }

    pub(crate) async fn end(self) {
        self.scope.drain();
        self.scope.finished(Duration::from_secs(10)).await.unwrap();
    }
}

pub(crate) fn id(path: &str) -> SpiffeId {
    TrustDomain::new("bank.example").unwrap().workload(path).unwrap()
}

pub(crate) async fn until(holds: impl Fn() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never held");
}
