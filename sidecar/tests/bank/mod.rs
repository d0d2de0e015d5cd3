//! A bank's accounts behind ext_authz: policies, users' tokens, and an app that records what reached it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use identity::clock::{SharedClock, SystemClock};
use identity::testing::TestAuthority;
use identity::txn::{self, RequestBinding, User};
use identity::{BundleSet, Scope, SpiffeId, TrustDomain, X509Svid};
use policy::{MemoryRecorder, Policies};
use sidecar::app::AppProtocol;
use sidecar::ext_authz::{self, Door, EntitiesConfig, ExtAuthzConfig};
use sidecar::{Sidecar, SidecarConfig};

const MESH_SCHEMA: &str = r#"
namespace Mesh {
  entity Workload { service: String, trust_domain: String };
  entity Client;
}
"#;

const SCHEMA: &str = r#"
namespace Accounts {
  entity Account { owner: String };
  type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };
  action ReadAccount, MoveMoney appliesTo {
    principal: [Mesh::Workload], resource: [Account],
    context: { user?: User, chain: Set<String>, now: Long }
  };
}
"#;

const MAP: &str = r#"
[[route]]
match = "GET /accounts/{id:int}"
action = "ReadAccount"
object = 'Account::"{id}"'
attributes = { owner = "entities" }

[[route]]
match = "GET /statements/{id:int}"
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
action = "ReadAccount"
object = 'Account::"{owner}"'
attributes = { owner = "path:owner" }
"#;

const POLICIES: &str = r#"
@id("web-for-owner")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/web",
  action in [Accounts::Action::"ReadAccount", Accounts::Action::"MoveMoney"],
  resource
) when { context has user && resource.owner == context.user.id };
"#;

/// What the app saw of one request.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: BTreeMap<String, Vec<String>>,
    pub(crate) body: String,
}

pub(crate) struct Bank {
    pub(crate) authority: TestAuthority,
    pub(crate) records: Arc<MemoryRecorder>,
    pub(crate) app: SocketAddr,
    pub(crate) clock: SharedClock,
    /// The app's.
    pub(crate) scope: Scope,
    /// The server's.
    pub(crate) palisade: Scope,
    pub(crate) directory: tempfile::TempDir,
    seen: Arc<Mutex<Vec<Seen>>>,
}

pub(crate) fn id(path: &str) -> SpiffeId {
    TrustDomain::new("bank.example").unwrap().workload(path).unwrap()
}

impl Bank {
    /// The app, and ext_authz listening on `accounts.sock` in the bank's directory.
    pub(crate) async fn new() -> Self {
        let authority = TestAuthority::new("bank.example");
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("policies/mesh.cedarschema", MESH_SCHEMA),
            ("policies/services/accounts/accounts.cedarschema", SCHEMA),
            ("policies/services/accounts/map.toml", MAP),
            ("policies/services/accounts/accounts.cedar", POLICIES),
        ] {
            let path = directory.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let trust_domain = TrustDomain::new("bank.example").unwrap();
        let policies = Policies::load(&directory.path().join("policies"), &trust_domain);
        let policies = policies.unwrap_or_else(|problems| panic!("{problems}"));
        let policy = policies.service("accounts").unwrap();
        assert_eq!(ext_authz::undecidable(&policy, true).len(), 1);
        assert!(ext_authz::undecidable(&policy, true)[0].contains("GET /statements/{id:int}"));
        assert!(
            ext_authz::undecidable(&policy, false)[1].contains("GET /accounts/{id:int}, POST /transfers")
        );

        let (scope, palisade, clock) = (Scope::new(), Scope::new(), SystemClock::shared());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        scope.spawn("app", serve_app(listener, Arc::clone(&seen), scope.clone()));
        let records = Arc::new(MemoryRecorder::default());
        let socket = format!("unix:{}", directory.path().join("accounts.sock").display());
        let ext_authz = ExtAuthzConfig {
            service: "accounts".into(),
            policy,
            gateways: vec![id("/palisade/gateway")],
            door: Door::new(&socket, Vec::new()).unwrap().bind().unwrap(),
            entities: Some(EntitiesConfig {
                app,
                protocol: AppProtocol::Http1,
                timeout: Duration::from_secs(5),
            }),
        };
        let config = SidecarConfig {
            id: id("/service/accounts"),
            inbound: None,
            ext_authz: Some(ext_authz),
            calls: Vec::new(),
            capture: sidecar::capture::CaptureConfig::default(),
            admin: None,
            access_log: None,
            traces: None,
            others: Vec::new(),
            budget: sidecar::overload::Budget::default(),
        };
        let (source, random) = (authority.source("/service/accounts"), identity::random::system());
        Sidecar::start(config, source, Arc::clone(&records) as _, clock.clone(), random, &palisade).unwrap();
        Self { authority, records, app, clock, scope, palisade, directory, seen }
    }

    /// The chain gateway → web → accounts for one request of `user`.
    pub(crate) fn token(&self, web: &X509Svid, user: &str, method: &str, target: &str) -> String {
        let (gateway, now) = (self.authority.issue("/palisade/gateway"), self.clock.now());
        let user = User {
            id: user.into(),
            issuer: "https://idp.example".into(),
            client: "bank-web".into(),
            scopes: vec!["bank".into()],
            groups: vec![],
            auth_time: 0,
            tenant: None,
            mfa: false,
        };
        let binding = RequestBinding::new(method, target);
        let token = txn::mint(&gateway, &user, web.id(), binding, txn::MAX_LIFETIME, now).unwrap();
        let bundles = BundleSet::new([self.authority.bundle()]);
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

    /// What reached the app, its own conversation with Palisade left out.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap().clone();
        seen.into_iter().filter(|seen| seen.target != policy::ENTITIES_PATH).collect()
    }

    /// The rule of the last denial.
    pub(crate) fn last_rule(&self) -> String {
        let denied = |record: &policy::DecisionRecord| record.verdict == policy::Outcome::Deny;
        self.records.records().into_iter().rfind(denied).expect("a denial").rule.name().to_owned()
    }
}

/// 17 is alice's, 42 is bob's; every other answer is 201.
async fn serve_app(listener: tokio::net::TcpListener, seen: Arc<Mutex<Vec<Seen>>>, scope: Scope) {
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => accepted.unwrap(),
            () = scope.draining() => return,
        };
        let seen = Arc::clone(&seen);
        scope.spawn("app connection", async move {
            let service = service_fn(move |request| answer(Arc::clone(&seen), request));
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
    let mut headers = BTreeMap::<String, Vec<String>>::new();
    for (name, value) in &parts.headers {
        headers.entry(name.to_string()).or_default().push(value.to_str().unwrap().to_owned());
    }
    let target = parts.uri.to_string();
    let status = if target == policy::ENTITIES_PATH { 200 } else { 201 };
    seen.lock().unwrap().push(Seen { method: parts.method.to_string(), target, headers, body });
    let entities = r#"{"objects":[]}"#.to_owned();
    let seen = seen.lock().unwrap();
    let asked = &seen.last().unwrap().body;
    let owned =
        [("17", "alice"), ("42", "bob")].into_iter().find(|(id, _)| asked.contains(&format!("\"{id}\"")));
    let body = match (status, owned) {
        (200, Some((id, owner))) => {
            format!(r#"{{"objects":[{{"type":"Account","id":"{id}","attributes":{{"owner":"{owner}"}}}}]}}"#)
        }
        (200, None) => entities,
        _ => r#"{"from":"app"}"#.to_owned(),
    };
    let response = Response::builder().status(status).header("content-type", "application/json");
    Ok(response.body(Full::from(body)).unwrap())
}
