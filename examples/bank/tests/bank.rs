//! The three services wired straight to each other, without a mesh: everybody may do everything, which
//! is what the mesh is for. What the bank itself owes is tested here: money is neither made nor lost.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test's helpers fail as its tests do"
)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::StatusCode;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
/// How often a condition is looked at again while waiting for it, and how many times at most.
const LOOK_EVERY_MS: u64 = 20;
const LOOKS_MAX: usize = 1500;

fn loopback() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn serve(tasks: &TaskTracker, listener: TcpListener, router: Router) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    tasks.spawn(async move { axum::serve(listener, router).await });
}

#[derive(Clone)]
struct Http(Client<HttpConnector, Full<Bytes>>);

struct Reply {
    status: StatusCode,
    location: String,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }
}

impl Http {
    fn new() -> Self {
        Self(Client::builder(TokioExecutor::new()).build_http())
    }

    async fn send(
        &self,
        method: &str,
        at: SocketAddr,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Reply, String> {
        let mut request = hyper::Request::builder().method(method).uri(format!("http://{at}{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        let response = self.0.request(request).await.map_err(|error| format!("{error:?}"))?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
        Ok(Reply {
            status: parts.status,
            location: parts
                .headers
                .get("location")
                .map(|v| v.to_str().unwrap().to_owned())
                .unwrap_or_default(),
            text: String::from_utf8_lossy(&body).into_owned(),
        })
    }

    async fn get(&self, at: SocketAddr, path: &str) -> Reply {
        self.send("GET", at, path, &[("x-forwarded-user", "alice"), ("traceparent", TRACE)], "")
            .await
            .unwrap()
    }

    async fn post(&self, at: SocketAddr, path: &str, body: impl ToString) -> Reply {
        let headers =
            [("content-type", "application/json"), ("x-forwarded-user", "alice"), ("traceparent", TRACE)];
        self.send("POST", at, path, &headers, body.to_string()).await.unwrap()
    }

    async fn balance(&self, accounts: SocketAddr, id: &str) -> i64 {
        self.get(accounts, &format!("/accounts/{id}")).await.json()["balance_cents"].as_i64().unwrap()
    }

    async fn sum(&self, accounts: SocketAddr) -> i64 {
        let mut sum = 0;
        for id in ["17", "18", "42", "43"] {
            sum += self.balance(accounts, id).await;
        }
        sum
    }

    async fn ready(&self, at: SocketAddr) {
        for _ in 0..LOOKS_MAX {
            if self
                .send("GET", at, "/healthz", &[], "")
                .await
                .is_ok_and(|reply| reply.status == StatusCode::OK)
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(LOOK_EVERY_MS)).await;
        }
        panic!("{at} never became ready");
    }
}

const ALL: i64 = 1_930_000;

/// The vault as its sidecar's outbound port shows it: one KV v2 secret, once it is there.
#[derive(Clone, Default)]
struct FakeVault {
    open: Arc<AtomicBool>,
}

impl FakeVault {
    fn start(&self, tasks: &TaskTracker) -> SocketAddr {
        let (listener, address) = loopback();
        serve(tasks, listener, Router::new().fallback(Self::answer).with_state(self.clone()));
        address
    }

    async fn answer(State(vault): State<Self>, request: Request) -> Response {
        if request.uri().path() != "/v1/secret/data/accounts/db-key" {
            return StatusCode::NOT_FOUND.into_response();
        }
        assert!(request.headers().get("x-vault-token").is_none(), "the sidecar's identity is the login");
        if !vault.open.load(Ordering::SeqCst) {
            let denied = json!({"error": "denied", "receipt": "r-0"});
            return (StatusCode::FORBIDDEN, axum::Json(denied)).into_response();
        }
        axum::Json(json!({"data": {
            "data": {"key": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="},
            "metadata": {"version": 1},
        }}))
        .into_response()
    }
}

/// `METHOD PATH`, and its `traceparent`.
type Call = (String, Option<String>);

/// Stands where a sidecar's outbound port would: forwards, and notes what was called with which trace.
#[derive(Clone)]
struct Tap {
    to: Arc<Mutex<SocketAddr>>,
    calls: Arc<Mutex<Vec<Call>>>,
    /// Answers this path with a sidecar's denial instead.
    deny: Arc<Mutex<Option<&'static str>>>,
    /// Forwards a POST but never passes its answer on; told once it has been forwarded.
    swallow: Arc<AtomicBool>,
    swallowed: Arc<Notify>,
    http: Http,
}

impl Tap {
    fn start(tasks: &TaskTracker, to: SocketAddr) -> (Self, SocketAddr) {
        let tap = Self {
            to: Arc::new(Mutex::new(to)),
            calls: Arc::default(),
            deny: Arc::default(),
            swallow: Arc::default(),
            swallowed: Arc::default(),
            http: Http::new(),
        };
        let (listener, address) = loopback();
        serve(tasks, listener, Router::new().fallback(Self::forward).with_state(tap.clone()));
        (tap, address)
    }

    async fn forward(State(tap): State<Self>, request: Request) -> Response {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        let trace = parts.headers.get("traceparent").map(|value| value.to_str().unwrap().to_owned());
        tap.calls.lock().unwrap().push((format!("{} {path}", parts.method), trace));
        if *tap.deny.lock().unwrap() == Some(path.as_str()) {
            let denied = json!({"error": "denied", "receipt": "r-42"});
            return (StatusCode::FORBIDDEN, axum::Json(denied)).into_response();
        }
        let body = body.collect().await.unwrap().to_bytes();
        let to = *tap.to.lock().unwrap();
        let headers: Vec<(String, String)> = parts
            .headers
            .iter()
            .filter(|(name, _)| !matches!(name.as_str(), "host" | "content-length"))
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        let reply = tap.http.send(parts.method.as_str(), to, &path, &headers, body).await;
        if tap.swallow.load(Ordering::SeqCst) && parts.method == "POST" {
            tap.swallowed.notify_one();
            std::future::pending::<()>().await;
        }
        match reply {
            Ok(reply) => Response::builder()
                .status(reply.status)
                .header("content-type", "application/json")
                .body(Body::from(reply.text))
                .unwrap(),
            Err(_) => StatusCode::BAD_GATEWAY.into_response(),
        }
    }

    fn calls(&self) -> BTreeMap<String, Option<String>> {
        self.calls.lock().unwrap().drain(..).collect()
    }
}

/// One service as a process of its own, killed when dropped.
struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_bank"))
            .args(arguments)
            .args(["--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap().parse().unwrap();
        Self { child, address }
    }

    fn kill_9(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop and returns whether it ended well.
    fn terminate(mut self) -> bool {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.child.wait().unwrap().success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already where a test ended it.
        if self.child.kill().is_ok() {
            self.child.wait().unwrap();
        }
    }
}

/// The whole bank in this process, with a tap on every wire.
struct Bank {
    _state: tempfile::TempDir,
    http: Http,
    web: SocketAddr,
    accounts: SocketAddr,
    payments: SocketAddr,
    web_to_accounts: Tap,
    web_to_payments: Tap,
    payments_to_accounts: Tap,
    accounts_to_payments: Tap,
    stop: tokio_util::sync::CancellationToken,
    services: TaskTracker,
}

impl Bank {
    async fn start(reconcile_every: Duration) -> Self {
        let state = tempfile::tempdir().unwrap();
        let tasks = TaskTracker::new();
        let services = TaskTracker::new();
        let stop = tokio_util::sync::CancellationToken::new();
        let vault = FakeVault::default();
        vault.open.store(true, Ordering::SeqCst);
        let vault = vault.start(&tasks);
        let ((web_l, web), (accounts_l, accounts), (payments_l, payments)) =
            (loopback(), loopback(), loopback());
        let (web_to_accounts, web_accounts) = Tap::start(&tasks, accounts);
        let (web_to_payments, web_payments) = Tap::start(&tasks, payments);
        let (payments_to_accounts, payments_accounts) = Tap::start(&tasks, accounts);
        let (accounts_to_payments, accounts_payments) = Tap::start(&tasks, payments);
        let config = bank::accounts::AccountsConfig {
            listener: accounts_l,
            state: state.path().join("accounts"),
            vault,
            payments: accounts_payments,
            reconcile_every,
        };
        services.spawn(bank::accounts::run(config, stop.clone().cancelled_owned()));
        let config = bank::payments::PaymentsConfig {
            listener: payments_l,
            state: state.path().join("payments"),
            accounts: payments_accounts,
        };
        services.spawn(bank::payments::run(config, stop.clone().cancelled_owned()));
        let config = bank::web::WebConfig { listener: web_l, accounts: web_accounts, payments: web_payments };
        services.spawn(bank::web::run(config, stop.clone().cancelled_owned()));
        let http = Http::new();
        for service in [web, accounts, payments] {
            http.ready(service).await;
        }
        Self {
            _state: state,
            http,
            web,
            accounts,
            payments,
            web_to_accounts,
            web_to_payments,
            payments_to_accounts,
            accounts_to_payments,
            stop,
            services,
        }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.services.close();
        self.services.wait().await;
    }
}

fn order(from: &str, to: &str, cents: i64) -> Value {
    json!({"from": from, "to": to, "amount_cents": cents, "memo": "rent"})
}

#[tokio::test]
async fn a_person_sees_their_accounts_and_moves_money_and_the_trace_goes_along() {
    let bank = Bank::start(Duration::from_secs(3600)).await;
    let http = &bank.http;

    let page = http.get(bank.web, "/").await;
    assert_eq!(page.status, StatusCode::OK);
    assert!(page.text.contains("Everyday") && page.text.contains("€2,500.00"), "{}", page.text);
    let list = http.get(bank.web, "/api/accounts").await.json();
    assert_eq!(list["owner"], "alice");
    assert_eq!(list["accounts"][1]["id"], "18");
    assert_eq!(http.get(bank.web, "/accounts/17").await.status, StatusCode::OK);
    let trace = Some(TRACE.to_owned());
    let want: BTreeMap<String, Option<String>> =
        ["GET /owners/alice/accounts", "GET /accounts/17", "GET /accounts/17/history"]
            .into_iter()
            .map(|call| (call.to_owned(), trace.clone()))
            .collect();
    assert_eq!(bank.web_to_accounts.calls(), want);

    let form = "from=17&to=42&amount=12%2C50&memo=rent+%3Cb%3E&key=k1";
    let headers = [
        ("content-type", "application/x-www-form-urlencoded"),
        ("x-forwarded-user", "alice"),
        ("traceparent", TRACE),
    ];
    for _ in 0..2 {
        // Sent twice, made once: the form carries its key.
        let sent = http.send("POST", bank.web, "/transfers", &headers, form).await.unwrap();
        assert_eq!((sent.status, sent.location.as_str()), (StatusCode::SEE_OTHER, "/accounts/17"));
    }
    assert_eq!(bank.web_to_payments.calls(), [("POST /transfers".to_owned(), trace.clone())].into());
    assert_eq!(bank.payments_to_accounts.calls(), [("POST /transfers".to_owned(), trace)].into());
    assert_eq!(http.balance(bank.accounts, "17").await, 248_750);
    let page = http.get(bank.web, "/accounts/17").await.text;
    assert!(page.contains("−€12.50") && page.contains("rent &lt;b&gt;"), "{page}");

    let made = http.post(bank.web, "/api/transfers", order("17", "42", 50)).await;
    assert_eq!(made.status, StatusCode::CREATED);
    assert_eq!(http.get(bank.payments, "/journal/totals").await.json()["total_cents"], 1300);
    bank.stop().await;
}

#[tokio::test]
async fn a_refusal_of_the_mesh_is_passed_on_with_its_receipt() {
    let bank = Bank::start(Duration::from_secs(3600)).await;
    let http = &bank.http;
    *bank.web_to_accounts.deny.lock().unwrap() = Some("/accounts/42");
    *bank.payments_to_accounts.deny.lock().unwrap() = Some("/transfers");

    let json = http.get(bank.web, "/api/accounts/42").await;
    assert_eq!(
        (json.status, json.json()),
        (StatusCode::FORBIDDEN, json!({"error": "denied", "receipt": "r-42"}))
    );
    let page = http.get(bank.web, "/accounts/42").await;
    assert_eq!(page.status, StatusCode::FORBIDDEN);
    assert!(page.text.contains("palisade explain <span class=\"whole\">r-42"), "{}", page.text);

    let json = http.post(bank.web, "/api/transfers", order("17", "42", 50)).await;
    assert_eq!((json.status, json.json()["receipt"].as_str()), (StatusCode::FORBIDDEN, Some("r-42")));
    let totals = http.get(bank.payments, "/journal/totals").await.json();
    assert_eq!((totals["refused"].as_u64(), totals["unresolved"].as_u64()), (Some(1), Some(0)));
    assert_eq!(http.sum(bank.accounts).await, ALL);
    bank.stop().await;
}

#[tokio::test]
async fn bad_input_is_refused_by_every_service_and_moves_nothing() {
    let bank = Bank::start(Duration::from_secs(3600)).await;
    let http = &bank.http;
    let huge = "x".repeat(64 * 1024);
    let long = "x".repeat(141);
    let cases: [(String, &[u16]); 16] = [
        (order("17", "42", 0).to_string(), &[400]),
        (order("17", "42", -500).to_string(), &[400]),
        (order("17", "42", i64::MAX).to_string(), &[409]),
        (r#"{"from":"17","to":"42","amount_cents":9223372036854775808}"#.to_owned(), &[400]),
        (r#"{"from":"17","to":"42","amount_cents":1e30}"#.to_owned(), &[400]),
        (r#"{"from":"17","to":"42","amount_cents":"1"}"#.to_owned(), &[400]),
        (order("17", "17", 1).to_string(), &[400]),
        (order("17", "99", 1).to_string(), &[404]),
        (order("99", "17", 1).to_string(), &[404]),
        (order("17", "4/2", 1).to_string(), &[400]),
        (r#"{"from":"17","to":"42","to":"43","amount_cents":1}"#.to_owned(), &[400]),
        (r#"{"from":"17","to":"42","amount_cents":1,"id":"mine"}"#.to_owned(), &[400]),
        (json!({"from": "17", "to": "42", "amount_cents": 1, "memo": long}).to_string(), &[400]),
        (json!({"from": "17", "to": "42", "amount_cents": 1, "memo": huge}).to_string(), &[413]),
        ("{".to_owned(), &[400]),
        (String::new(), &[400]),
    ];
    for (body, want) in &cases {
        for (service, path) in [(bank.web, "/api/transfers"), (bank.payments, "/transfers")] {
            let reply = http.post(service, path, body).await;
            assert!(
                want.contains(&reply.status.as_u16()),
                "{path} {body:.80}: {} {}",
                reply.status,
                reply.text
            );
            assert!(reply.json()["error"].is_string(), "{}", reply.text);
        }
    }
    let text = [("content-type", "text/plain")];
    let reply = http.send("POST", bank.payments, "/transfers", &text, order("17", "42", 1).to_string()).await;
    assert_eq!(reply.unwrap().status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let unknown = http.get(bank.web, "/accounts/99").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    for path in ["/accounts/a%2F..%2F17", "/nowhere", "/api/accounts/%2e%2e"] {
        let status = http.get(bank.web, path).await.status;
        assert!(status.is_client_error(), "{path}: {status}");
    }
    let nobody = http.send("GET", bank.web, "/", &[], "").await.unwrap();
    assert_eq!(nobody.status, StatusCode::BAD_REQUEST);
    let form = [("content-type", "application/x-www-form-urlencoded"), ("x-forwarded-user", "alice")];
    for body in ["from=17&to=42&amount=-1", "from=17&to=42&amount=1&amount=2", "from=17", "amount=%ff"] {
        let reply = http.send("POST", bank.web, "/transfers", &form, body).await.unwrap();
        assert!(reply.status.is_client_error(), "{body}: {}", reply.status);
    }
    assert_eq!(http.sum(bank.accounts).await, ALL);
    assert_eq!(http.get(bank.payments, "/journal/totals").await.json()["count"], 0);
    bank.stop().await;
}

#[tokio::test]
async fn the_sidecars_question_is_answered_by_both_services() {
    let bank = Bank::start(Duration::from_secs(3600)).await;
    let http = &bank.http;
    let path = "/.well-known/palisade/entities";
    let question = json!({"objects": [
        {"type": "Account", "id": "17"}, {"type": "Account", "id": "42"},
        {"type": "Account", "id": "99"}, {"type": "Safe", "id": "17"},
    ]});
    let both = json!({"objects": [
        {"type": "Account", "id": "17", "attributes": {"owner": "alice"}},
        {"type": "Account", "id": "42", "attributes": {"owner": "bob"}},
    ]});
    assert_eq!(http.post(bank.accounts, path, &question).await.json(), both);
    assert_eq!(http.post(bank.payments, path, &question).await.json(), both);
    let asked = bank.payments_to_accounts.calls();
    assert_eq!(asked.get("GET /accounts/17"), Some(&Some(TRACE.to_owned())));

    // What the person may not see is left out.
    *bank.payments_to_accounts.deny.lock().unwrap() = Some("/accounts/42");
    let own = json!({"objects": [{"type": "Account", "id": "17", "attributes": {"owner": "alice"}}]});
    assert_eq!(http.post(bank.payments, path, &question).await.json(), own);
    assert_eq!(http.post(bank.accounts, path, json!({"objects": 1})).await.status, StatusCode::BAD_REQUEST);
    bank.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_transfers_conserve_money_and_the_journal_agrees() {
    let bank = Bank::start(Duration::from_millis(100)).await;
    let ids = ["17", "18", "42", "43"];
    let tasks = TaskTracker::new();
    for worker in 0..8_usize {
        let (http, web) = (bank.http.clone(), bank.web);
        tasks.spawn(async move {
            for n in 0..10_usize {
                let (from, to) = (ids[(worker + n) % 4], ids[(worker + 3 * n + 1) % 4]);
                let cents = i64::try_from(1 + worker * 37_000 + n).unwrap();
                let reply = http.post(web, "/api/transfers", order(from, to, cents)).await;
                assert!(matches!(reply.status.as_u16(), 201 | 400 | 409), "{} {}", reply.status, reply.text);
            }
        });
    }
    tasks.close();
    tasks.wait().await;
    assert_eq!(bank.http.sum(bank.accounts).await, ALL);
    let totals = bank.http.get(bank.payments, "/journal/totals").await.json();
    assert!(totals["count"].as_u64().unwrap() > 20, "{totals}");
    assert_eq!((&totals["in_flight"], &totals["unresolved"]), (&json!(0), &json!(0)));
    // The timer's call is on nobody's behalf.
    for _ in 0..LOOKS_MAX {
        if let Some(trace) = bank.accounts_to_payments.calls().get("GET /journal/totals") {
            assert_eq!(*trace, None);
            return bank.stop().await;
        }
        tokio::time::sleep(Duration::from_millis(LOOK_EVERY_MS)).await;
    }
    panic!("accounts never asked for the journal's totals");
}

fn accounts_process(state: &Path, vault: SocketAddr) -> Process {
    let state = state.join("accounts");
    let (vault, nowhere) = (vault.to_string(), "127.0.0.1:1");
    Process::start(&[
        "accounts",
        "--state",
        state.to_str().unwrap(),
        "--vault",
        &vault,
        "--payments",
        nowhere,
    ])
}

fn payments_process(state: &Path, accounts: SocketAddr) -> Process {
    let state: PathBuf = state.join("payments");
    let accounts = accounts.to_string();
    Process::start(&["payments", "--state", state.to_str().unwrap(), "--accounts", &accounts])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_accounts_loses_no_acknowledged_transfer_and_doubles_none() {
    let state = tempfile::tempdir().unwrap();
    let tasks = TaskTracker::new();
    let vault = FakeVault::default();
    vault.open.store(true, Ordering::SeqCst);
    let vault = vault.start(&tasks);
    let http = Http::new();
    let accounts = accounts_process(state.path(), vault);
    http.ready(accounts.address).await;

    let acknowledged: Arc<Mutex<Vec<Value>>> = Arc::default();
    let enough = Arc::new(Notify::new());
    let workers = TaskTracker::new();
    for worker in 0..4 {
        let (http, at) = (http.clone(), accounts.address);
        let (acknowledged, enough) = (Arc::clone(&acknowledged), Arc::clone(&enough));
        workers.spawn(async move {
            for n in 0..u32::MAX {
                let mut transfer = order("18", "42", 1);
                transfer["id"] = json!(format!("w{worker}-{n}"));
                let headers = [("content-type", "application/json")];
                match http.send("POST", at, "/transfers", &headers, transfer.to_string()).await {
                    Ok(reply) => assert_eq!(reply.status, StatusCode::CREATED),
                    Err(_) => return,
                }
                let mut acknowledged = acknowledged.lock().unwrap();
                acknowledged.push(transfer);
                if acknowledged.len() == 40 {
                    enough.notify_one();
                }
            }
        });
    }
    enough.notified().await;
    accounts.kill_9();
    workers.close();
    workers.wait().await;

    let accounts = accounts_process(state.path(), vault);
    http.ready(accounts.address).await;
    assert_eq!(http.sum(accounts.address).await, ALL);
    let moved = http.balance(accounts.address, "42").await - 180_000;
    let acknowledged = acknowledged.lock().unwrap().clone();
    // At most one transfer for each worker was on disk but not yet acknowledged.
    let count = i64::try_from(acknowledged.len()).unwrap();
    assert!((count..=count + 4).contains(&moved), "{moved} moved, {count} acknowledged");
    for transfer in acknowledged {
        // Known, so not made again.
        assert_eq!(http.post(accounts.address, "/transfers", transfer).await.status, StatusCode::OK);
    }
    assert_eq!(http.balance(accounts.address, "42").await - 180_000, moved);
    assert!(accounts.terminate(), "ends well when asked to");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_payments_after_accounts_acted_leaves_it_unresolved_and_a_repeat_settles_it() {
    let state = tempfile::tempdir().unwrap();
    let tasks = TaskTracker::new();
    let vault = FakeVault::default();
    vault.open.store(true, Ordering::SeqCst);
    let vault = vault.start(&tasks);
    let http = Http::new();
    let accounts = accounts_process(state.path(), vault);
    http.ready(accounts.address).await;
    let (tap, tapped) = Tap::start(&tasks, accounts.address);
    let payments = payments_process(state.path(), tapped);
    http.ready(payments.address).await;

    let headers =
        [("content-type", "application/json"), ("x-forwarded-user", "alice"), ("idempotency-key", "k1")];
    let body = order("17", "42", 500).to_string();
    tap.swallow.store(true, Ordering::SeqCst);
    let asking = {
        let (http, at, body) = (http.clone(), payments.address, body.clone());
        tasks.spawn(async move { http.send("POST", at, "/transfers", &headers, body).await.is_err() })
    };
    tap.swallowed.notified().await;
    let totals = http.get(payments.address, "/journal/totals").await.json();
    assert_eq!(totals["in_flight"], 1);
    payments.kill_9();
    assert!(asking.await.unwrap(), "the person got no answer");
    assert_eq!(http.balance(accounts.address, "17").await, 249_500, "the money had moved");

    tap.swallow.store(false, Ordering::SeqCst);
    let payments = payments_process(state.path(), tapped);
    http.ready(payments.address).await;
    let totals = http.get(payments.address, "/journal/totals").await.json();
    assert_eq!(
        (&totals["unresolved"], &totals["in_flight"], &totals["count"]),
        (&json!(1), &json!(0), &json!(0))
    );

    let reply = http.send("POST", payments.address, "/transfers", &headers, body).await.unwrap();
    assert_eq!(reply.status, StatusCode::CREATED, "{}", reply.text);
    assert_eq!(http.balance(accounts.address, "17").await, 249_500, "and did not move again");
    let totals = http.get(payments.address, "/journal/totals").await.json();
    assert_eq!((&totals["unresolved"], &totals["count"]), (&json!(0), &json!(1)));
    // The same key for another order is a mistake, and said.
    let other =
        http.send("POST", payments.address, "/transfers", &headers, order("17", "42", 1).to_string()).await;
    assert_eq!(other.unwrap().status, StatusCode::CONFLICT);
}

#[tokio::test]
async fn accounts_waits_for_its_key_and_serves_nothing_before() {
    let state = tempfile::tempdir().unwrap();
    let tasks = TaskTracker::new();
    let vault = FakeVault::default();
    let address = vault.start(&tasks);
    let http = Http::new();
    let accounts = accounts_process(state.path(), address);
    for path in ["/healthz", "/accounts/17", "/owners/alice/accounts"] {
        let reply = http.get(accounts.address, path).await;
        assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE, "{path}");
        assert_eq!(reply.json()["error"], "starting");
    }
    vault.open.store(true, Ordering::SeqCst);
    http.ready(accounts.address).await;
    assert_eq!(http.balance(accounts.address, "17").await, 250_000);

    // Two processes never share one database.
    let state = state.path().join("accounts");
    let second = Command::new(env!("CARGO_BIN_EXE_bank"))
        .args(["accounts", "--state", state.to_str().unwrap(), "--listen", "127.0.0.1:0"])
        .args(["--vault", &address.to_string(), "--payments", "127.0.0.1:1"])
        .output()
        .unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("accounts.redb cannot be opened"), "{said}");
}
