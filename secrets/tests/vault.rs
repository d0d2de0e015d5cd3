//! A real vault on loopback: made, unsealed, filled and restarted by an operator, read by workloads over
//! mutual TLS, and attacked on both listeners.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests may panic as tests may")]

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use identity::clock::{ManualClock, SharedClock};
use identity::testing::{TestAuthority, ago, ahead, offset};
use identity::{
    BundleSet, Clock as _, IdentitySource, Scope, SpiffeId, SystemClock, TrustDomain, X509Svid, tls,
};
use policy::{MemoryRecorder, Outcome, Policies};
use secrecy::{ExposeSecret as _, SecretString};
use secrets::audit;
use secrets::client::{Client, Keys};
use secrets::path::SecretPath;
use secrets::storage::{RedbStorage, Storage as _};
use secrets::{MAX_BODY_BYTES, Vault, VaultConfig, VaultError};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const BOUND: Duration = Duration::from_secs(20);

struct World {
    directory: tempfile::TempDir,
    authority: TestAuthority,
    policies: Arc<Policies>,
    clock: SharedClock,
}

struct Running {
    vault: Vault,
    scope: Scope,
    recorder: Arc<MemoryRecorder>,
}

impl World {
    fn new() -> Self {
        Self::at(SystemClock::shared())
    }

    fn at(clock: SharedClock) -> Self {
        let policies = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policies");
        Self {
            directory: tempfile::tempdir().unwrap(),
            authority: TestAuthority::new("bank.example"),
            policies: Policies::load(&policies, &TrustDomain::new("bank.example").unwrap()).unwrap(),
            clock,
        }
    }

    fn audit_file(&self) -> PathBuf {
        self.directory.path().join("audit.jsonl")
    }

    async fn try_start(&self, unseal_key: Option<SecretString>) -> Result<Running, VaultError> {
        let (scope, recorder) = (Scope::new(), Arc::new(MemoryRecorder::default()));
        let config = VaultConfig {
            state: self.directory.path().join("state"),
            listen: TcpListener::bind("127.0.0.1:0").unwrap(),
            operator: Some(TcpListener::bind("127.0.0.1:0").unwrap()),
            audit: self.audit_file(),
            unseal_key,
        };
        let vault = Vault::start(
            config,
            self.authority.source("/palisade/vault"),
            self.policies.service("vault").unwrap().into(),
            recorder.clone(),
            Arc::clone(&self.clock),
            Arc::new(ring::rand::SystemRandom::new()),
            &scope,
        )
        .await?;
        Ok(Running { vault, scope, recorder })
    }

    async fn start(&self) -> Running {
        self.try_start(None).await.unwrap()
    }

    /// A vault with one share, unsealed, and a client with its root token.
    async fn ready(&self) -> (Running, Client, Keys) {
        let running = self.start().await;
        let client = running.client();
        let keys = client.init(1, 1).await.unwrap();
        assert!(!client.unseal(&keys.shares[0]).await.unwrap().sealed);
        (running, client.with_token(keys.root_token.clone()), keys)
    }

    fn workload(&self, path: &str) -> IdentitySource {
        self.authority.source(path)
    }
}

impl Running {
    fn operator(&self) -> SocketAddr {
        self.vault.operator_address().unwrap()
    }

    fn client(&self) -> Client {
        Client::new(self.operator()).unwrap()
    }

    async fn stop(self) {
        self.scope.drain();
        self.scope.finished(BOUND).await.unwrap();
    }
}

fn path(text: &str) -> SecretPath {
    SecretPath::new(text).unwrap()
}

/// A workload's connection to the vault.
struct Mesh {
    sender: Sender,
}

enum Sender {
    One(hyper::client::conn::http1::SendRequest<Full<Bytes>>),
    Two(hyper::client::conn::http2::SendRequest<Full<Bytes>>),
}

#[derive(Clone)]
struct Executor(Scope);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Executor {
    fn execute(&self, task: F) {
        self.0.spawn("client stream", task);
    }
}

impl Mesh {
    async fn connect(source: &IdentitySource, running: &Running, alpn: &[u8]) -> std::io::Result<Self> {
        let expected = SpiffeId::new("spiffe://bank.example/palisade/vault").unwrap();
        let config = tls::client_config(source, expected, &[alpn], &SystemClock::shared()).unwrap();
        let stream = TcpStream::connect(running.vault.address()).await?;
        let stream = tokio_rustls::TlsConnector::from(config).connect(tls::unnamed_server(), stream).await?;
        let io = TokioIo::new(stream);
        let scope = running.scope.clone();
        let sender = if alpn == tls::ALPN_H2 {
            let executor = Executor(scope.clone());
            let (sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
            scope.spawn("client", async move { drop(connection.await) });
            Sender::Two(sender)
        } else {
            let (sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
            scope.spawn("client", async move { drop(connection.await) });
            Sender::One(sender)
        };
        Ok(Self { sender })
    }

    async fn service(world: &World, running: &Running, name: &str) -> Self {
        let source = world.workload(&format!("/service/{name}"));
        Self::connect(&source, running, tls::ALPN_HTTP11).await.unwrap()
    }

    async fn send(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> hyper::Result<(StatusCode, Value)> {
        let uri = match self.sender {
            Sender::One(_) => target.to_owned(),
            Sender::Two(_) => format!("https://vault{target}"),
        };
        let mut request = Request::builder().method(method.parse::<Method>().unwrap()).uri(uri);
        if matches!(self.sender, Sender::One(_)) {
            request = request.header("host", "vault");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body.to_owned()))).unwrap();
        let answer = match &mut self.sender {
            Sender::One(sender) => sender.send_request(request).await?,
            Sender::Two(sender) => sender.send_request(request).await?,
        };
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        Ok((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
    }

    async fn get(&mut self, target: &str) -> (u16, Value) {
        let (status, body) = self.send("GET", target, &[], "").await.unwrap();
        (status.as_u16(), body)
    }
}

/// Sends bytes as they are to the operator's listener and reads the answer to its end.
async fn raw(running: &Running, text: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(running.operator()).await.unwrap();
    // A refusal may come, and the connection end, before all is written.
    let _written = stream.write_all(text.as_bytes()).await.is_ok();
    let mut answer = Vec::new();
    let _read = stream.read_to_end(&mut answer).await.is_ok();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, answer)
}

async fn raw_request(
    running: &Running,
    method: &str,
    target: &str,
    headers: &str,
    body: &str,
) -> (u16, String) {
    let length = body.len();
    let head = format!("{method} {target} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n");
    raw(running, &format!("{head}content-length: {length}\r\n{headers}\r\n{body}")).await
}

#[tokio::test]
async fn a_vault_is_made_filled_restarted_and_unsealed_again() {
    let world = World::new();
    let running = world.start().await;
    let client = running.client();
    let health = |status: u16, outcome: Result<(), secrets::client::ClientError>| {
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains(&status.to_string()), "{text}");
    };
    health(501, client.health().await);
    let status = client.seal_status().await.unwrap();
    assert!(!status.initialized && status.sealed);
    assert!(client.init(5, 1).await.is_err());

    let keys = client.init(5, 3).await.unwrap();
    assert_eq!(keys.shares.len(), 5);
    assert!(client.init(1, 1).await.unwrap_err().to_string().contains("already initialized"));
    health(503, client.health().await);
    let rooted = client.clone().with_token(keys.root_token.clone());
    assert!(rooted.kv_get(&path("a")).await.unwrap_err().to_string().contains("sealed"));

    // A forged share makes the whole set fail, cleanly, and the next set starts afresh.
    for share in &keys.shares[..2] {
        client.unseal(share).await.unwrap();
    }
    let forged = SecretString::from(format!("AQ{}", &keys.shares[2].expose_secret()[2..]));
    let error = client.unseal(&forged).await.unwrap_err().to_string();
    assert!(error.contains("400") && error.contains("invalid key"), "{error}");
    assert_eq!(client.seal_status().await.unwrap().progress, 0);
    for (at, share) in [&keys.shares[4], &keys.shares[4], &keys.shares[0]].iter().enumerate() {
        let status = client.unseal(share).await.unwrap();
        assert!(status.sealed && status.progress == [1, 1, 2][at]);
    }
    assert!(!client.unseal(&keys.shares[1]).await.unwrap().sealed);
    client.health().await.unwrap();

    let text = r#"{"n":9007199254740993,"huge":123456789012345678901234567890,"f":1.10}"#;
    let body = format!(r#"{{"data":{text}}}"#);
    let token = format!("x-vault-token: {}\r\n", keys.root_token.expose_secret());
    let (status, answer) = raw_request(&running, "POST", "/v1/secret/data/big", &token, &body).await;
    assert_eq!(status, 200, "{answer}");
    let secret = rooted.kv_get(&path("big")).await.unwrap().unwrap();
    assert_eq!((secret.data.get(), secret.version), (text, 1));
    assert_eq!(
        rooted.kv_put(&path("accounts/db-key"), &json!({"key": "c2VjcmV0"}), Some(0)).await.unwrap(),
        1
    );
    assert!(rooted.kv_put(&path("accounts/db-key"), &json!({}), Some(0)).await.is_err());
    running.stop().await;

    let running = world.start().await;
    let client = running.client();
    assert!(client.seal_status().await.unwrap().sealed);
    for share in &keys.shares[2..] {
        client.unseal(share).await.unwrap();
    }
    let rooted = client.with_token(keys.root_token.clone());
    assert_eq!(rooted.kv_get(&path("big")).await.unwrap().unwrap().data.get(), text);
    let (status, _) = raw_request(&running, "PUT", "/v1/sys/seal", "", "").await;
    assert_eq!(status, 403, "only root seals");
    let (status, _) = raw_request(&running, "PUT", "/v1/sys/seal", &token, "").await;
    assert_eq!(status, 204);
    assert!(rooted.kv_get(&path("big")).await.unwrap_err().to_string().contains("sealed"));
    running.stop().await;

    // Nothing that was secret stands in the audit file, and its chain holds over the restart.
    let file = std::fs::read_to_string(world.audit_file()).unwrap();
    assert!(audit::verify_file(&world.audit_file(), None).unwrap().seq > 20);
    for secret in ["c2VjcmV0", "9007199254740993", keys.root_token.expose_secret()] {
        assert!(!file.contains(secret), "{secret} in the audit file");
    }
    for share in &keys.shares {
        assert!(!file.contains(share.expose_secret()));
    }
    assert!(file.contains("hmac-sha256:") && file.contains("secret/data/accounts/db-key"));
}

#[tokio::test]
async fn a_vault_with_one_share_unseals_itself_and_a_wrong_key_stops_the_start() {
    let world = World::new();
    let (running, client, keys) = world.ready().await;
    client.kv_put(&path("a"), &json!({"x": 1}), None).await.unwrap();
    running.stop().await;
    let wrong = SecretString::from("0".repeat(64));
    assert!(matches!(world.try_start(Some(wrong)).await, Err(VaultError::Unseal(_))));
    let running = world.try_start(Some(keys.shares[0].clone())).await.unwrap();
    let client = running.client().with_token(keys.root_token);
    assert!(client.kv_get(&path("a")).await.unwrap().is_some());
    running.stop().await;
}

#[tokio::test]
async fn vault_13_security_38_a_workload_reads_its_own_secret_by_being_who_it_is_and_no_other() {
    let world = World::new();
    let (running, client, keys) = world.ready().await;
    client.kv_put(&path("accounts/db-key"), &json!({"key": "c2VjcmV0"}), None).await.unwrap();

    for alpn in [tls::ALPN_HTTP11, tls::ALPN_H2] {
        let mut accounts = Mesh::connect(&world.workload("/service/accounts"), &running, alpn).await.unwrap();
        let (status, body) = accounts.get("/v1/secret/data/accounts/db-key").await;
        assert_eq!((status, &body["data"]["data"]["key"]), (200, &json!("c2VjcmV0")));
        assert_eq!(body["data"]["metadata"]["version"], 1);
        assert_eq!(accounts.get("/v1/secret/metadata/accounts/db-key").await.0, 200);
        assert_eq!(accounts.get("/v1/sys/health").await.0, 200);
        // Reading is not writing, deleting or listing.
        for (method, target, body) in [
            ("PUT", "/v1/secret/data/accounts/db-key", r#"{"data":{}}"#),
            ("DELETE", "/v1/secret/data/accounts/db-key", ""),
            ("POST", "/v1/secret/destroy/accounts/db-key", r#"{"versions":[1]}"#),
            ("DELETE", "/v1/secret/metadata/accounts/db-key", ""),
            ("LIST", "/v1/secret/metadata/accounts", ""),
        ] {
            assert_eq!(accounts.send(method, target, &[], body).await.unwrap().0, 403, "{method} {target}");
        }
        for target in ["/v1/sys/seal", "/v1/sys/init", "/v1/sys/unseal", "/v1/auth/token/create"] {
            assert_eq!(accounts.send("PUT", target, &[], "{}").await.unwrap().0, 404, "{target}");
        }
    }

    let mut web = Mesh::service(&world, &running, "web").await;
    let (status, body) = web.get("/v1/secret/data/accounts/db-key").await;
    assert_eq!(
        (status, &body["errors"], &body["error"]),
        (403, &json!(["permission denied"]), &json!("denied"))
    );
    assert!(!body.to_string().contains("c2VjcmV0"));
    let receipt = body["receipt"].as_str().unwrap();
    let records = running.recorder.records();
    let record = records.iter().find(|record| record.receipt.as_str() == receipt).unwrap();
    assert_eq!(record.verdict, Outcome::Deny);
    assert_eq!(record.principal.as_deref(), Some("spiffe://bank.example/service/web"));
    assert_eq!(record.objects[0].object, "Vault::Secret::\"accounts/db-key\"");
    assert!(records.iter().any(|record| record.verdict == Outcome::Permit));
    // What is not there is denied alike: names cannot be felt out.
    assert_eq!(web.get("/v1/secret/data/accounts/no-such").await.0, 403);

    // The root token of an operator is worth nothing on the mesh, nor is a certificate in a header.
    let root = keys.root_token.expose_secret();
    let stolen =
        web.send("GET", "/v1/secret/data/accounts/db-key", &[("x-vault-token", root)], "").await.unwrap();
    assert_eq!(stolen.0, 403);
    // Nor does it take the place of the login of somebody who has a right.
    let root_header = [("x-vault-token", root)];
    let mut accounts = Mesh::service(&world, &running, "accounts").await;
    for target in ["/v1/secret/data/accounts/db-key", "/v1/auth/token/lookup-self"] {
        assert_eq!(accounts.send("GET", target, &root_header, "").await.unwrap().0, 403, "{target}");
    }
    let forwarded = "By=spiffe://bank.example/palisade/vault;URI=spiffe://bank.example/service/accounts";
    for name in ["x-forwarded-client-cert", "x-ssl-client-cert", "x-forwarded-user"] {
        let headers = [(name, forwarded)];
        let answer = web.send("GET", "/v1/secret/data/accounts/db-key", &headers, "").await.unwrap();
        assert_eq!(answer.0, 403, "vault_13: {name}");
    }
    let audited = std::fs::read_to_string(world.audit_file()).unwrap();
    assert!(audited.contains(receipt) && audited.contains("spiffe://bank.example/service/web"));
    running.stop().await;
    assert!(audit::verify_file(&world.audit_file(), None).is_ok());
}

#[tokio::test]
async fn a_workload_with_the_right_keeps_its_own_secret() {
    let world = World::new();
    let (running, _, _) = world.ready().await;
    let mut payments = Mesh::service(&world, &running, "payments").await;
    let target = "/v1/secret/data/payments/signing-key";
    for (method, body, status) in [
        ("PUT", r#"{"data":{"k":"1"},"options":{"cas":0}}"#, 200),
        ("PUT", r#"{"data":{"k":"2"},"options":{"cas":0}}"#, 400),
        ("GET", "", 200),
        ("DELETE", "", 204),
        ("GET", "", 404),
    ] {
        assert_eq!(payments.send(method, target, &[], body).await.unwrap().0, status, "{method}");
    }
    let (_, body) = payments.send("LIST", "/v1/secret/metadata/payments", &[], "").await.unwrap();
    assert_eq!(body["data"]["keys"], json!(["signing-key"]));
    // The right on a secret is no right on the folder above, or on one beside it.
    for folder in ["", "/accounts", "/payments/signing-key"] {
        let target = format!("/v1/secret/metadata{folder}");
        assert_eq!(payments.send("LIST", &target, &[], "").await.unwrap().0, 403, "{folder}");
    }
    running.stop().await;
}

#[tokio::test]
async fn security_34_40_a_login_token_belongs_to_its_svid_and_ends_with_it() {
    let clock = ManualClock::at(SystemClock.now());
    let world = World::at(clock.clone());
    let (running, client, _) = world.ready().await;
    client.kv_put(&path("accounts/db-key"), &json!({"key": "x"}), None).await.unwrap();
    let mut accounts = Mesh::service(&world, &running, "accounts").await;
    let (status, body) =
        accounts.send("POST", "/v1/auth/cert/login", &[], r#"{"name":"any"}"#).await.unwrap();
    assert_eq!(status, 200, "{body}");
    let token = body["auth"]["client_token"].as_str().unwrap().to_owned();
    assert!(body["auth"]["lease_duration"].as_u64().unwrap() <= 1800, "no longer than the SVID");
    assert_eq!(body["auth"]["metadata"]["spiffe_id"], "spiffe://bank.example/service/accounts");
    let with_token = [("x-vault-token", token.as_str())];
    let own = accounts.send("GET", "/v1/auth/token/lookup-self", &with_token, "").await.unwrap();
    assert_eq!((own.0, &own.1["data"]["path"]), (StatusCode::OK, &json!("auth/cert/login")));
    let read = accounts.send("GET", "/v1/secret/data/accounts/db-key", &with_token, "").await.unwrap();
    assert_eq!(read.0, 200);

    // Another certificate of the same workload is the same workload; another workload is not.
    let mut again = Mesh::service(&world, &running, "accounts").await;
    assert_eq!(again.send("GET", "/v1/auth/token/lookup-self", &with_token, "").await.unwrap().0, 200);
    let mut payments = Mesh::service(&world, &running, "payments").await;
    for (method, target) in [
        ("GET", "/v1/auth/token/lookup-self"),
        ("POST", "/v1/auth/token/revoke-self"),
        ("GET", "/v1/secret/data/payments/signing-key"),
    ] {
        assert_eq!(payments.send(method, target, &with_token, "").await.unwrap().0, 403, "{target}");
    }
    let header = format!("x-vault-token: {token}\r\n");
    assert_eq!(raw_request(&running, "GET", "/v1/auth/token/lookup-self", &header, "").await.0, 403);
    assert_eq!(raw_request(&running, "GET", "/v1/secret/data/accounts/db-key", &header, "").await.0, 403);
    assert_eq!(raw_request(&running, "POST", "/v1/auth/cert/login", "", "{}").await.0, 400);

    // Its owner revokes it; the SVID is still a login of its own.
    assert_eq!(accounts.send("POST", "/v1/auth/token/revoke-self", &with_token, "").await.unwrap().0, 204);
    assert_eq!(accounts.send("GET", "/v1/auth/token/lookup-self", &with_token, "").await.unwrap().0, 403);
    assert_eq!(accounts.get("/v1/secret/data/accounts/db-key").await.0, 200);

    // The SVID's end is the end of its rights at once, and of the connection.
    clock.advance(Duration::from_secs(1801));
    let until_closed = async {
        while let Ok((status, _)) = accounts.send("GET", "/v1/secret/data/accounts/db-key", &[], "").await {
            assert_eq!(status, 403, "served after the SVID's end");
        }
    };
    tokio::time::timeout(BOUND, until_closed).await.unwrap();
    running.stop().await;
}

#[tokio::test]
async fn vault_12_only_a_good_svid_of_this_trust_domain_gets_through_the_handshake() {
    let world = World::new();
    let (running, _, _) = world.ready().await;
    let bundles = || BundleSet::new([world.authority.bundle()]);
    let leaf = |change: &dyn Fn(&mut rcgen::CertificateParams)| {
        let (der, key) = world.authority.issue_with("/service/accounts", |params| change(params));
        IdentitySource::fixed(X509Svid::new(vec![der], key).unwrap(), bundles())
    };
    let expired = leaf(&|params| params.not_after = offset(ago(1)));
    let early = leaf(&|params| params.not_before = offset(ahead(600)));
    let foreign = TestAuthority::new("evil.example");
    let foreign = IdentitySource::fixed(foreign.issue("/service/accounts"), bundles());
    // Same name, same trust domain, another authority.
    let impostor = TestAuthority::new("bank.example");
    let impostor = IdentitySource::fixed(impostor.issue("/service/accounts"), bundles());
    for (name, source) in
        [("expired", expired), ("early", early), ("foreign", foreign), ("impostor", impostor)]
    {
        // In TLS 1.3 the client learns of its refusal with the first answer.
        let answered = match Mesh::connect(&source, &running, tls::ALPN_HTTP11).await {
            Ok(mut mesh) => mesh.send("GET", "/v1/secret/data/accounts/db-key", &[], "").await.is_ok(),
            Err(_) => false,
        };
        assert!(!answered, "{name}");
    }
    // No certificate at all, and no TLS at all.
    let mut plain = TcpStream::connect(running.vault.address()).await.unwrap();
    plain.write_all(b"GET /v1/sys/health HTTP/1.1\r\nhost: vault\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ended = plain.read_to_end(&mut answer).await.is_ok();
    assert!(!answer.starts_with(b"HTTP"), "plain text was answered");
    assert_eq!(Mesh::service(&world, &running, "accounts").await.get("/v1/sys/health").await.0, 200);
    running.stop().await;
}

#[tokio::test]
async fn vault_1_5_21_bad_requests_are_refused_on_the_operators_listener() {
    let world = World::new();
    let (running, client, keys) = world.ready().await;
    client.kv_put(&path("a/b"), &json!({"x": "hunter2"}), None).await.unwrap();
    let token = format!("x-vault-token: {}\r\n", keys.root_token.expose_secret());
    let get = async |target: &str, headers: &str| raw_request(&running, "GET", target, headers, "").await.0;
    assert_eq!(get("/v1/secret/data/a/b", &token).await, 200);
    for target in [
        "/v1/secret/data/a//b",
        "/v1/secret/data/./a/b",
        "/v1/secret/data/x/../a/b",
        "/v1/secret/data/%61/b",
        "/v1/secret/data/a%2fb",
        "/v1/secret/data/a/b%00",
        "/v1/secret/data/a/b;x=y",
        "/v1/secret/data/a\\b",
        "/v1/secret/data/a/b\0",
        "/v1/secret/data/a/b/",
        "/v1/secret/data/a/b?token=x",
        "/v1/secret/data/a/b?version=1&version=1",
    ] {
        assert_eq!(get(target, &token).await, 400, "{target:?}");
    }
    for target in
        ["/v1/secret/data/A/b", "/v1/secret/data/a/B", "/v1/sys/raw/core/keyring", "/v2/secret/data/a/b"]
    {
        assert_eq!(get(target, &token).await, 404, "{target}");
    }
    assert_eq!(get("/v1/secret/data/a/b", "").await, 403);
    assert_eq!(get("/v1/secret/data/a/b", "x-vault-token: hvs.wrong\r\n").await, 403);
    assert_eq!(get("/v1/secret/data/a/b", &format!("{token}{token}")).await, 400);
    assert_eq!(get("/v1/secret/data/a/b", &format!("{token}x-vault-wrap-ttl: 60\r\n")).await, 400);
    assert_eq!(get("/v1/secret/data/a/b", &format!("{token}x-vault-namespace: other\r\n")).await, 400);
    assert_eq!(get("/v1/secret/data/a/b", &format!("{token}origin: http://evil.example\r\n")).await, 403);
    let many: String = (0..100).map(|n| format!("x-h{n}: 1\r\n")).collect();
    assert_eq!(get("/v1/secret/data/a/b", &format!("{token}{many}")).await, 431);
    let long = format!("x-long: {}\r\n", "a".repeat(64 * 1024));
    assert_eq!(get("/v1/secret/data/a/b", &format!("{token}{long}")).await, 431);

    let put = async |body: &str| raw_request(&running, "PUT", "/v1/secret/data/a/b", &token, body).await;
    let deep = format!(r#"{{"data":{{"x":{}{}}}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    for bad in [deep.as_str(), r#"{"data":{"to":"a","to":"b"}}"#, r#"{"data":{"x":"hunter2""#, "hunter2"] {
        let (status, answer) = put(bad).await;
        assert_eq!(status, 400);
        assert!(!answer.contains("hunter2"), "vault_6: {answer}");
    }
    let large = format!(r#"{{"data":{{"x":"{}"}}}}"#, "a".repeat(MAX_BODY_BYTES));
    assert_eq!(put(&large).await.0, 413);
    let fits = format!(r#"{{"data":{{"x":"{}"}}}}"#, "a".repeat(MAX_BODY_BYTES - 100));
    assert_eq!(put(&fits).await.0, 200);
    // A million keys do not fit; a hundred thousand do, and are audited as one value.
    let keys: Vec<String> = (0..100_000).map(|n| format!(r#""{n:x}":1"#)).collect();
    assert_eq!(put(&format!(r#"{{"data":{{{}}}}}"#, keys.join(","))).await.0, 200);
    running.stop().await;
    assert!(audit::verify_file(&world.audit_file(), None).is_ok());
}

#[tokio::test]
async fn tokens_of_people_do_what_their_policy_says_and_no_more() {
    let world = World::new();
    let (running, client, keys) = world.ready().await;
    client.kv_put(&path("a"), &json!({"x": 1}), None).await.unwrap();
    let call = async |method: &str, target: &str, token: &str, body: &str| {
        let header = format!("authorization: Bearer {token}\r\n");
        let (status, answer) = raw_request(&running, method, target, &header, body).await;
        let json = answer.split("\r\n\r\n").nth(1).and_then(|body| serde_json::from_str::<Value>(body).ok());
        (status, json.unwrap_or(Value::Null))
    };
    let root = keys.root_token.expose_secret();
    let create = async |token: &str, body: &str| call("POST", "/v1/auth/token/create", token, body).await;
    let (status, made) = create(root, r#"{"policies":["default"],"ttl":"1h","display_name":"ci"}"#).await;
    assert_eq!(status, 200, "{made}");
    assert_eq!(made["auth"]["lease_duration"], 3600);
    let limited = made["auth"]["client_token"].as_str().unwrap();
    let (status, about) = call("GET", "/v1/auth/token/lookup-self", limited, "").await;
    assert_eq!((status, &about["data"]["display_name"]), (200, &json!("token-ci")));
    for (method, target, body) in [
        ("GET", "/v1/secret/data/a", ""),
        ("PUT", "/v1/secret/data/a", r#"{"data":{}}"#),
        ("LIST", "/v1/secret/metadata", ""),
        ("PUT", "/v1/sys/seal", ""),
        ("GET", "/v1/sys/mounts", ""),
        ("POST", "/v1/auth/token/create", ""),
    ] {
        assert_eq!(call(method, target, limited, body).await.0, 403, "{method} {target}");
    }
    // A second root token dies with its maker only; revoked, it is nobody's.
    let (_, made) = create(root, "").await;
    let second = made["auth"]["client_token"].as_str().unwrap().to_owned();
    assert_eq!(call("GET", "/v1/secret/data/a", &second, "").await.0, 200);
    let (_, made) = create(&second, "").await;
    let third = made["auth"]["client_token"].as_str().unwrap().to_owned();
    assert_eq!(call("POST", "/v1/auth/token/revoke-self", &second, "").await.0, 204);
    for dead in [&second, &third] {
        assert_eq!(call("GET", "/v1/secret/data/a", dead, "").await.0, 403);
    }
    assert_eq!(call("GET", "/v1/secret/data/a", root, "").await.0, 200);
    assert_eq!(create(root, r#"{"policies":["Root"]}"#).await.0, 400);
    assert_eq!(create(root, r#"{"ttl":"10000h"}"#).await.0, 400);
    running.stop().await;
}

/// The child of the test below: writes one record after another and says so once each is acknowledged.
#[tokio::test]
async fn child_that_writes_until_it_is_killed() {
    let Ok(directory) = std::env::var("SECRETS_TEST_KILLED_STATE") else { return };
    let storage = RedbStorage::open(Path::new(&directory)).unwrap();
    for n in 0u64.. {
        let round = std::process::id();
        storage.put(format!("r/{round}/{n}"), n.to_be_bytes().repeat(64)).await.unwrap();
        println!("\nacknowledged {round}/{n}");
    }
}

#[tokio::test]
async fn kill_9_loses_no_acknowledged_write() {
    use std::io::BufRead as _;
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let mut acknowledged = Vec::new();
    for round in 0..8 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_writes_until_it_is_killed", "--nocapture", "--test-threads=1"])
            .env("SECRETS_TEST_KILLED_STATE", &state)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        for line in lines.map_while(Result::ok) {
            let Some(name) = line.strip_prefix("acknowledged ") else { continue };
            acknowledged.push(name.to_owned());
            seen += 1;
            // Once: what the pipe still holds was acknowledged before the kill and counts.
            if seen == 5 + round * 7 {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen >= 5 + round * 7);
        let storage = RedbStorage::open(&state).unwrap();
        for name in &acknowledged {
            let n: u64 = name.split('/').nth(1).unwrap().parse().unwrap();
            let record = storage.get(&format!("r/{name}")).await.unwrap();
            assert_eq!(record, Some(n.to_be_bytes().repeat(64)), "{name} after round {round}");
        }
    }
}

#[tokio::test]
async fn pypi_hvac_drives_the_operators_listener() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hvac_client.py");
    let python = |args: &[&std::ffi::OsStr]| std::process::Command::new("python3").args(args).output();
    match python(&["-c".as_ref(), "import hvac".as_ref()]) {
        Ok(output) if output.status.success() => {}
        Ok(_) => {
            identity::testing::skip("python3 cannot import hvac (pip install hvac)");
            return;
        }
        Err(error) => {
            identity::testing::skip(&format!("python3 cannot be run: {error}"));
            return;
        }
    }
    let world = World::new();
    let running = world.start().await;
    let address = format!("http://{}", running.operator());
    let output = tokio::task::spawn_blocking(move || {
        std::process::Command::new("python3").arg(script).arg(address).output().unwrap()
    })
    .await
    .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("hvac: all passed"));
    running.stop().await;
    assert!(audit::verify_file(&world.audit_file(), None).is_ok());
}
