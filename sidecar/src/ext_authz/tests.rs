//! The server as a gRPC client sees it that is no Envoy: everything left out, doubled, overlong or late.

use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use identity::clock::{Clock as _, SystemClock};
use identity::testing::{TestAuthority, ahead};
use identity::{Scope, TrustDomain, tls};
use policy::{MemoryRecorder, Policies};
use proptest::prelude::*;
use prost::Message as _;
use prost_types::value::Kind;
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::generated::authorization_client::AuthorizationClient;
use super::generated::{Address, AttributeContext, HeaderMap, SocketAddress, attribute_context};
use super::*;
use crate::{Sidecar, SidecarConfig};

const SCHEMA: &str = r#"
namespace Files {
  entity File { owner: String };
  action Read, Write appliesTo { principal: [Mesh::Workload], resource: [File], context: Mesh::Context };
}
"#;

const MAP: &str = r#"
[[route]]
match = "GET /files/{owner:slug}"
action = "Read"
object = 'File::"{owner}"'
attributes = { owner = "path:owner" }

[[route]]
match = "PUT /files/{owner:slug}"
action = "Write"
object = 'File::"{owner}"'
attributes = { owner = "path:owner" }
body_type = "opaque"
body_max_bytes = 100

[[route]]
match = "POST /files"
action = "Write"
object = 'File::"{body:/owner}"'
attributes = { owner = "body:/owner" }
body = { owner = "id" }

[[route]]
match = "GET /owned/{id:slug}"
action = "Read"
object = 'File::"{id}"'
attributes = { owner = "entities" }
"#;

const POLICIES: &str = r#"
@id("web-for-alice")
permit (principal == Mesh::Workload::"spiffe://bank.example/service/web", action, resource is Files::File)
when { resource.owner == "alice" };
"#;

struct World {
    authority: TestAuthority,
    client: AuthorizationClient<Channel>,
    health: HealthClient<Channel>,
    records: Arc<MemoryRecorder>,
    scope: Scope,
    _directory: tempfile::TempDir,
}

fn sidecar(
    authority: &TestAuthority,
    directory: &std::path::Path,
    door: Door,
    scope: &Scope,
) -> (Arc<MemoryRecorder>, Option<SocketAddr>) {
    for (path, text) in [
        ("mesh.cedarschema", include_str!("../../../examples/bank/policies/mesh.cedarschema")),
        ("services/files/files.cedarschema", SCHEMA),
        ("services/files/map.toml", MAP),
        ("services/files/files.cedar", POLICIES),
    ] {
        let path = directory.join("policies").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let trust_domain = TrustDomain::new("bank.example").unwrap();
    let policies = Policies::load(&directory.join("policies"), &trust_domain);
    let policies = policies.unwrap_or_else(|problems| panic!("{problems}"));
    let door = door.bind().unwrap();
    let address = door.address();
    // Accepts and never answers: what is asked there is late for ever.
    let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let app = deaf.local_addr().unwrap();
    let waits = scope.clone();
    scope.spawn("deaf app", async move {
        waits.draining().await;
        drop(deaf);
    });
    let entities = EntitiesConfig { app, protocol: AppProtocol::Http1, timeout: Duration::from_secs(60) };
    let ext_authz = ExtAuthzConfig {
        service: "files".into(),
        policy: policies.service("files").unwrap(),
        gateways: Vec::new(),
        door,
        entities: Some(entities),
    };
    let config = SidecarConfig {
        id: trust_domain.workload("/service/files").unwrap(),
        inbound: None,
        ext_authz: Some(ext_authz),
        calls: Vec::new(),
        capture: crate::capture::CaptureConfig::default(),
        admin: None,
        access_log: None,
        traces: None,
        others: Vec::new(),
        budget: crate::overload::Budget::default(),
    };
    let records = Arc::new(MemoryRecorder::default());
    let (clock, random) = (SystemClock::shared(), identity::random::system());
    let source = authority.source("/service/files");
    Sidecar::start(config, source, Arc::clone(&records) as _, clock, random, scope).unwrap();
    (records, address)
}

impl World {
    fn new() -> Self {
        let (authority, scope) = (TestAuthority::new("bank.example"), Scope::new());
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("authz.sock");
        let door = Door::new(&format!("unix:{}", socket.display()), Vec::new()).unwrap();
        let (records, _) = sidecar(&authority, directory.path(), door, &scope);
        let channel = Endpoint::from_static("http://authz.invalid").connect_with_connector_lazy(
            tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }),
        );
        let client = AuthorizationClient::new(channel.clone());
        Self { authority, client, health: HealthClient::new(channel), records, scope, _directory: directory }
    }

    /// The status, rule and message of one answer.
    async fn ask(&self, request: impl Into<pb::CheckRequest>) -> (i32, String, pb::CheckResponse) {
        let response = self.client.clone().check(request.into()).await.unwrap().into_inner();
        let status = match response.http_response.as_ref().unwrap() {
            pb::check_response::HttpResponse::OkResponse(_) => {
                assert_eq!(response.status.as_ref().unwrap().code, 0);
                200
            }
            pb::check_response::HttpResponse::DeniedResponse(denied) => {
                assert_ne!(response.status.as_ref().unwrap().code, 0);
                assert!(denied.body.contains(&text(&response, "receipt")));
                denied.status.as_ref().unwrap().code
            }
        };
        (status, text(&response, "rule"), response)
    }

    async fn refused(&self, why: &str, request: Question) {
        let (status, rule, _) = self.ask(request).await;
        assert_eq!(rule, why);
        assert!(matches!(status, 400 | 403), "{why}: {status}");
    }

    async fn end(self) {
        self.scope.drain();
        self.scope.finished(Duration::from_secs(10)).await.unwrap();
    }
}

fn text(response: &pb::CheckResponse, name: &str) -> String {
    match &response.dynamic_metadata.as_ref().unwrap().fields[name].kind {
        Some(Kind::StringValue(text)) => text.clone(),
        other => panic!("{other:?}"),
    }
}

/// What a right Envoy would ask, to be made wrong.
#[derive(Clone)]
struct Question {
    http: pb::HttpRequest,
    source: pb::Peer,
}

fn raw(name: &str, value: &[u8]) -> pb::HeaderValue {
    pb::HeaderValue { key: name.into(), value: String::new(), raw_value: value.into() }
}

impl Question {
    fn new(method: &str, path: &str) -> Self {
        let pseudo = [(":method", method), (":path", path), (":authority", "files"), (":scheme", "https")];
        let headers = pseudo.map(|(name, value)| raw(name, value.as_bytes())).into();
        let http = pb::HttpRequest {
            method: method.into(),
            path: path.into(),
            host: "files".into(),
            protocol: "HTTP/2".into(),
            header_map: Some(HeaderMap { headers }),
            ..pb::HttpRequest::default()
        };
        let address = SocketAddress { address: "10.0.0.7".into(), port_value: 4000 };
        let source = pb::Peer {
            address: Some(Address { socket_address: Some(address) }),
            principal: "spiffe://bank.example/service/web".into(),
            certificate: String::new(),
        };
        Self { http, source }
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.http.header_map.as_mut().unwrap().headers.push(raw(name, value.as_bytes()));
        self
    }

    fn with_body(mut self, body: &str) -> Self {
        self.http.raw_body = body.into();
        self.with("content-type", "application/json")
    }

    fn changed(mut self, change: impl FnOnce(&mut pb::HttpRequest)) -> Self {
        change(&mut self.http);
        self
    }

    fn from(mut self, principal: &str, certificate: &str) -> Self {
        (self.source.principal, self.source.certificate) = (principal.into(), certificate.into());
        self
    }

    /// The same with headers as older Envoys tell them.
    fn merged(self) -> Self {
        self.changed(|http| {
            let list = http.header_map.take().unwrap().headers;
            for header in list {
                let value = String::from_utf8(header.raw_value).unwrap();
                let told = http.headers.entry(header.key).or_default();
                *told = if told.is_empty() { value } else { format!("{told},{value}") };
            }
        })
    }
}

impl From<Question> for pb::CheckRequest {
    fn from(question: Question) -> Self {
        let request = attribute_context::Request { http: Some(question.http) };
        let attributes = AttributeContext { source: Some(question.source), request: Some(request) };
        Self { attributes: Some(attributes) }
    }
}

#[tokio::test]
async fn a_whole_question_is_answered_and_written_down() {
    let world = World::new();
    let question = Question::new("GET", "/files/alice")
        .with("x-forwarded-user", "mallory")
        .with("x_palisade_user", "mallory")
        .with("accept", "*/*");
    let (status, rule, response) = world.ask(question).await;
    assert_eq!((status, rule.as_str(), text(&response, "verdict").as_str()), (200, "web-for-alice", "allow"));
    let Some(pb::check_response::HttpResponse::OkResponse(ok)) = &response.http_response else { panic!() };
    let set: Vec<&str> = ok.headers.iter().map(|set| set.header.as_ref().unwrap().key.as_str()).collect();
    assert_eq!(set, ["traceparent", "x-forwarded-client-cert"]);
    assert!(ok.headers.iter().all(|set| set.append_action == 2), "in place of what is there");
    // Nobody is behind it: what the app would read for somebody goes, seen or not.
    assert_eq!(ok.headers_to_remove, ["txn-token", "x-forwarded-user", "x_palisade_user"]);
    let record = world.records.records().pop().unwrap();
    assert_eq!(record.peer_address.as_deref(), Some("10.0.0.7:4000"));
    assert_eq!(record.principal.as_deref(), Some("spiffe://bank.example/service/web"));
    assert_eq!(record.receipt.to_string(), text(&response, "receipt"));
    world.ask(Question::new("GET", "/files/alice").merged()).await;

    let (status, rule, _) = world.ask(Question::new("GET", "/files/bob")).await;
    assert_eq!((status, rule.as_str()), (403, "none"));
    world.end().await;
}

#[tokio::test]
async fn what_is_left_out_doubled_or_contradicts_itself_is_refused() {
    let world = World::new();
    let get = || Question::new("GET", "/files/alice");
    let (status, rule, _) = world.ask(pb::CheckRequest { attributes: None }).await;
    assert_eq!((status, rule.as_str()), (400, "ext_authz.attributes"));
    let (status, rule, _) =
        world.ask(pb::CheckRequest { attributes: Some(AttributeContext::default()) }).await;
    assert_eq!((status, rule.as_str()), (400, "ext_authz.attributes"));

    let drop_header = |name: &'static str| {
        get().changed(|http| http.header_map.as_mut().unwrap().headers.retain(|header| header.key != name))
    };
    for name in [":path", ":method", ":authority"] {
        world.refused("ext_authz.hidden_headers", drop_header(name)).await;
    }
    world.refused("ext_authz.hidden_headers", get().changed(|http| http.header_map = None)).await;
    world.refused("request.pseudo_header", get().with(":path", "/files/alice")).await;
    world.refused("request.pseudo_header", get().with(":protocol", "websocket")).await;
    world.refused("request.pseudo_header", get().changed(|http| http.path = "/files/bob".into())).await;
    world.refused("request.pseudo_header", get().changed(|http| http.method = "PUT".into())).await;
    world.refused("request.pseudo_header", get().changed(|http| http.host = "other".into())).await;
    let both = get().changed(|http| drop(http.headers.insert("a".into(), "b".into())));
    world.refused("ext_authz.headers", both).await;
    world.refused("request.host", get().with("host", "other")).await;
    assert_eq!(world.ask(get().with("host", "files")).await.0, 200);

    for protocol in ["", "HTTP/1.0", "HTTP/2.0", "http/1.1"] {
        world.refused("request.http_version", get().changed(|http| http.protocol = protocol.into())).await;
    }
    for path in ["", "*", "files/alice", "http://files/files/alice", "/files/alice#x", "/files/al ice"] {
        world.refused("request.target", Question::new("GET", path)).await;
    }
    for path in [
        "//files/alice",
        "/files/%61lice",
        "/files/../files/alice",
        "/files/alice/",
        "/files;x/alice",
        "/files/é",
    ] {
        world.refused("request.path", Question::new("GET", path)).await;
    }
    world.refused("request.method", Question::new("G T", "/files/alice")).await;
    world.refused("request.method", Question::new("CONNECT", "/files/alice")).await;
    world.refused("route.unmapped", Question::new("get", "/files/alice")).await;
    world.refused("request.upgrade", get().with("upgrade", "websocket")).await;
    world.refused("request.rewriting_header", get().with("x-http-method-override", "PUT")).await;
    world.refused("request.header_name", get().with("a b", "x")).await;
    world.refused("request.header_bytes", get().with("x", "a\r\nb: c")).await;
    world.refused("request.header_bytes", get().with("x", "caf\u{e9}")).await;
    world.refused("txn.malformed", get().with("txn-token", "a").with("txn-token", "b")).await;
    world
        .refused("ext_authz.merged_header", get().with("txn-token", "a").with("txn-token", "b").merged())
        .await;
    world.end().await;
}

#[tokio::test]
async fn a_body_is_judged_whole_as_it_is_or_not_at_all() {
    let world = World::new();
    let post = || Question::new("POST", "/files");
    let alice = r#"{"owner":"alice"}"#;
    assert_eq!(world.ask(post().with_body(alice)).await.0, 200);
    assert_eq!(world.ask(post().with_body(alice).with("content-length", "17")).await.0, 200);
    let partial = |value: &str| post().with_body(alice).with("x-envoy-auth-partial-body", value);
    assert_eq!(world.ask(partial("false")).await.0, 200);
    world.refused("request.body_size", partial("true")).await;
    // A client that says it of itself does not hide what Envoy says.
    world.refused("request.body_size", partial("false").with("x-envoy-auth-partial-body", "true")).await;
    world.refused("request.body_size", post().with_body(alice).with("content-length", "18")).await;
    world.refused("request.ambiguous_length", post().with_body(alice).with("content-length", "+17")).await;
    let hidden = || post().with("content-type", "application/json");
    world.refused("ext_authz.hidden_body", hidden()).await;
    world.refused("ext_authz.hidden_body", hidden().with("content-length", "17")).await;
    world.refused("ext_authz.text_body", hidden().changed(|http| http.body = alice.into())).await;
    world.refused("request.body", post().with_body(r#"{"owner":"alice","owner":"bob"}"#)).await;
    let types = post().with_body(alice).with("content-type", "text/plain");
    world.refused("request.body", types.clone()).await;
    world.refused("ext_authz.merged_header", types.merged()).await;
    world.refused("none", post().with_body(r#"{"owner":"bob"}"#)).await;

    let get = || Question::new("GET", "/files/alice");
    world.refused("request.body", get().changed(|http| http.raw_body = b"x".into())).await;
    world.refused("request.body", get().changed(|http| http.body = "x".into())).await;
    world.refused("request.body", get().with("x-envoy-auth-partial-body", "true")).await;
    world.refused("request.body", get().with("content-length", "1")).await;
    world.refused("request.body", get().with("transfer-encoding", "chunked")).await;

    let put = || Question::new("PUT", "/files/alice");
    assert_eq!(world.ask(put().with("content-length", "100")).await.0, 200);
    world.refused("request.body_size", put().with("content-length", "101")).await;
    world.refused("request.body_size", put().with("transfer-encoding", "chunked")).await;
    let streamed = || put().with("transfer-encoding", "chunked").changed(|http| http.raw_body = vec![0; 100]);
    assert_eq!(world.ask(streamed()).await.0, 200);
    world.refused("request.body_size", streamed().changed(|http| http.raw_body.push(0))).await;
    world.refused("request.body_size", streamed().with("x-envoy-auth-partial-body", "true")).await;
    world.end().await;
}

#[tokio::test]
async fn policy_31_security_1_3_4_5_who_it_is_must_be_certain() {
    let world = World::new();
    let from = |principal: &str, certificate: &str| {
        Question::new("GET", "/files/alice").from(principal, certificate)
    };
    let web = "spiffe://bank.example/service/web";
    world.refused("tls.no_client_certificate", from("", "")).await;
    for name in [
        "web.bank.example",
        "CN=web,O=bank",
        "spiffe://bank.example",
        "spiffe://bank.example/service/web/",
        "spiffe://bank.example/service/%77eb",
        "spiffe://bank.example/service/web?x",
        "SPIFFE://bank.example/service/web",
        "spiffe://bank.example/service/web\0",
    ] {
        world.refused("tls.invalid_svid", from(name, "")).await;
    }
    world.refused("none", from("spiffe://bank.example/service/webx", "")).await;
    world.refused("principal.trust_domain", from("spiffe://other.example/service/web", "")).await;

    let encoded = |der: &[u8]| {
        use base64::Engine as _;
        let body = base64::engine::general_purpose::STANDARD.encode(der);
        let pem = format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
        percent_encoding::utf8_percent_encode(&pem, percent_encoding::NON_ALPHANUMERIC).to_string()
    };
    let leaf = |change: &dyn Fn(&mut rcgen::CertificateParams)| {
        encoded(&world.authority.issue_with("/service/web", |params| change(params)).0)
    };
    let good = leaf(&|_| {});
    assert_eq!(world.ask(from(web, &good)).await.0, 200);
    world
        .refused("ext_authz.principal_mismatch", from("spiffe://bank.example/service/payments", &good))
        .await;
    let second = identity::testing::uri("spiffe://bank.example/service/payments");
    let two = leaf(&|params| params.subject_alt_names.push(second.clone()));
    world.refused("tls.invalid_svid", from(web, &two)).await;
    let authority = leaf(&|params| params.key_usages.push(rcgen::KeyUsagePurpose::KeyCertSign));
    world.refused("tls.invalid_svid", from(web, &authority)).await;
    let expired = leaf(&|params| params.not_after = identity::testing::offset(identity::testing::ago(1)));
    world.refused("tls.expired_svid", from(web, &expired)).await;
    let future = leaf(&|params| params.not_before = identity::testing::offset(ahead(60)));
    world.refused("tls.expired_svid", from(web, &future)).await;
    for broken in [
        "x",
        "%",
        "-----BEGIN CERTIFICATE-----",
        &good.repeat(2),
        &good[..good.len() / 2],
        &"A".repeat(200_000),
    ] {
        world.refused("tls.invalid_svid", from(web, broken)).await;
    }
    world.end().await;
}

#[tokio::test]
async fn what_is_too_large_or_not_protobuf_is_refused_and_the_server_lives() {
    let world = World::new();
    let get = || Question::new("GET", "/files/alice");
    let many = (0..200).fold(get(), |question, n| question.with(&format!("x-{n}"), "y"));
    world.refused("request.header_count", many).await;
    let crumbs = (0..200).fold(get(), |question, _| question.with("cookie", "a=b"));
    world.refused("request.header_count", crumbs).await;
    world.refused("request.header_size", get().with("x", &"y".repeat(70_000))).await;
    let huge = get().changed(|http| http.raw_body = vec![0; 5 << 20]);
    let status = world.client.clone().check(pb::CheckRequest::from(huge)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::OutOfRange);
    assert_eq!(world.ask(get()).await.0, 200);
    world.end().await;
}

#[tokio::test]
async fn a_decision_that_would_come_too_late_is_not_made() {
    let world = World::new();
    let mut request = tonic::Request::new(pb::CheckRequest::from(Question::new("GET", "/owned/1")));
    request.set_timeout(Duration::from_millis(50));
    let status = world.client.clone().check(request).await.unwrap_err();
    assert!(matches!(status.code(), tonic::Code::Cancelled | tonic::Code::DeadlineExceeded), "{status}");
    assert_eq!(world.ask(Question::new("GET", "/files/alice")).await.0, 200);
    let targets: Vec<String> = world.records.records().into_iter().map(|record| record.target).collect();
    assert_eq!(targets, ["/files/alice"]);
    world.end().await;
}

#[tokio::test]
async fn health_says_whether_questions_can_be_decided() {
    let mut world = World::new();
    let service = "envoy.service.auth.v3.Authorization".to_owned();
    let mut watch = world.health.watch(HealthCheckRequest { service }).await.unwrap().into_inner();
    while watch.message().await.unwrap().unwrap().status() != ServingStatus::Serving {}
    world.end().await;
}

#[tokio::test]
async fn over_mtls_named_callers_may_ask_and_nobody_else() {
    let (authority, scope) = (TestAuthority::new("bank.example"), Scope::new());
    let directory = tempfile::tempdir().unwrap();
    let callers = vec![SpiffeId::new("spiffe://bank.example/service/envoy").unwrap()];
    let door = Door::new("127.0.0.1:0", callers).unwrap();
    let (_, address) = sidecar(&authority, directory.path(), door, &scope);
    let address = address.unwrap();
    let client = |path: &str| {
        let server = SpiffeId::new("spiffe://bank.example/service/files").unwrap();
        let config =
            tls::client_config(&authority.source(path), server, &[tls::ALPN_H2], &SystemClock::shared())
                .unwrap();
        let connector = tokio_rustls::TlsConnector::from(config);
        let channel = Endpoint::from_static("http://authz.invalid").connect_with_connector_lazy(
            tower::service_fn(move |_| {
                let connector = connector.clone();
                async move {
                    let tcp = TcpStream::connect(address).await?;
                    connector.connect(tls::unnamed_server(), tcp).await.map(TokioIo::new)
                }
            }),
        );
        AuthorizationClient::new(channel)
    };
    let question = || pb::CheckRequest::from(Question::new("GET", "/files/alice"));
    assert!(client("/service/envoy").check(question()).await.is_ok());
    assert!(client("/service/envoyx").check(question()).await.is_err());
    let plain = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    assert!(AuthorizationClient::new(plain).check(question()).await.is_err());
    scope.drain();
    scope.finished(Duration::from_secs(10)).await.unwrap();
}

proptest! {
    /// Whatever bytes arrive, reading them ends in a request or a refusal; and what is read is what was told.
    #[test]
    fn any_description_is_a_request_or_a_refusal(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        method in "[ -~]{0,8}", path in "\\PC{0,40}", host in "\\PC{0,12}", value in proptest::collection::vec(any::<u8>(), 0..12),
    ) {
        if let Some(described) = pb::CheckRequest::decode(bytes.as_slice()).ok().and_then(Described::read) {
            let _read = described.head().is_ok() && described.peer(SystemClock.now()).is_ok();
        }
        let mut question = Question::new(&method, &path).changed(|http| http.host = host.clone());
        let list = &mut question.http.header_map.as_mut().unwrap().headers;
        list[2] = raw(":authority", host.as_bytes());
        list.push(raw("x", &value));
        let described = Described { http: question.http, source: question.source };
        if let Ok(head) = described.head() {
            prop_assert_eq!(head.uri.to_string(), path);
            prop_assert_eq!(head.method.as_str(), method);
            prop_assert_eq!(head.headers["host"].as_bytes(), host.as_bytes());
            prop_assert_eq!(head.headers["x"].as_bytes(), value);
        }
    }
}
