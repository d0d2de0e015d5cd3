//! Control and agent as they run: real TLS over loopback, a real Unix socket, real /proc. This test
//! process is the workload.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests fail by panicking too"
)]

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use ca::admin::{AdminClient, AdminError};
use ca::agent::{
    Agent, AgentConfig, AgentError, Bootstrap, DEFAULT_SOCKET_MODE, Redactor, RefusalRecorder, RefusedCaller,
};
use ca::authority::DEFAULT_ROOT_TTL;
use ca::control::{Control, ControlConfig, ControlError, Entry, Selectors, listen};
use ca::discovery::{self, Found, Wanted};
use ca::mesh::{DecisionReporter, ReportedDecision};
use ca::model::DecisionQuery;
use ca::random::SystemRandom;
use futures::StreamExt as _;
use identity::clock::{Clock as _, ManualClock, SharedClock};
use identity::verify::verify_chain;
use identity::workload_api::proto::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use identity::workload_api::{self, WorkloadApiError, proto};
use identity::{Scope, SpiffeId, SystemClock, TrustDomain, X509Svid};
use secrecy::SecretString;
use tokio::sync::watch;
use tonic::Code;
use tonic::transport::Channel;

#[path = "control_and_agent/policies.rs"]
mod policies;
#[path = "control_and_agent/relations.rs"]
mod relations;

/// Far longer than anything here takes: a test that waits this long has failed, and says so.
const PATIENCE: Duration = Duration::from_secs(60);
const WEB: &str = "spiffe://bank.example/service/web";

fn clock() -> SharedClock {
    SystemClock::shared()
}

fn own_path() -> PathBuf {
    std::env::current_exe().unwrap().canonicalize().unwrap()
}

fn entry(id: &str, selectors: Selectors) -> Entry {
    Entry { id: SpiffeId::new(id).unwrap(), selectors, dns: vec![], ips: vec![], ttl: None, hosts: None }
}

/// The entry that this process matches.
fn web() -> Entry {
    entry(WEB, Selectors { path: Some(own_path()), ..Selectors::default() })
}

struct World {
    directory: tempfile::TempDir,
}

struct Running<T> {
    it: T,
    scope: Scope,
}

impl<T> Running<T> {
    async fn stop(self) {
        self.scope.drain();
        assert_eq!(self.scope.finished(PATIENCE).await, Ok(()));
    }
}

impl World {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn control_config(&self, address: SocketAddr, entries: Vec<Entry>) -> ControlConfig {
        ControlConfig {
            policies: None,
            relations: Default::default(),
            trust_domain: TrustDomain::new("bank.example").unwrap(),
            listener: listen(address).unwrap(),
            admin_socket: self.path("admin/control.sock"),
            state: self.path("control"),
            svid_ttl: Duration::from_secs(120),
            rotate_after: Duration::from_secs(20),
            root_ttl: DEFAULT_ROOT_TTL,
            entries,
            passphrase: SecretString::from("correct horse"),
            decisions_kept: 1_000,
        }
    }

    async fn start(&self, config: ControlConfig) -> Running<Control> {
        let scope = Scope::new();
        let it = Control::start(config, clock(), SystemRandom::shared(), &scope).await.unwrap();
        Running { it, scope }
    }

    async fn control(&self, entries: Vec<Entry>) -> Running<Control> {
        self.start(self.control_config("127.0.0.1:0".parse().unwrap(), entries)).await
    }

    fn agent_config(&self, control: SocketAddr, bootstrap: Option<Bootstrap>) -> AgentConfig {
        AgentConfig {
            host: "host-1".into(),
            trust_domain: TrustDomain::new("bank.example").unwrap(),
            socket: self.socket(),
            socket_mode: DEFAULT_SOCKET_MODE,
            state: self.path("agent"),
            control,
            bootstrap,
            refusals: None,
            redactor: None,
        }
    }

    fn socket(&self) -> PathBuf {
        self.path("run/agent.sock")
    }

    async fn try_agent(&self, config: AgentConfig) -> Result<Running<Agent>, AgentError> {
        let scope = Scope::new();
        match Agent::start(config, clock(), SystemRandom::shared(), &scope).await {
            Ok(it) => Ok(Running { it, scope }),
            Err(error) => {
                scope.drain();
                assert_eq!(scope.finished(PATIENCE).await, Ok(()));
                Err(error)
            }
        }
    }

    async fn agent(&self, control: &Running<Control>) -> Running<Agent> {
        let bootstrap = bootstrap(control).await;
        self.try_agent(self.agent_config(control.it.local_addr(), Some(bootstrap))).await.unwrap()
    }

    fn admin(&self) -> AdminClient {
        AdminClient::new(self.path("admin/control.sock"), clock())
    }

    /// Waits until control sees (or no longer sees) the agent's stream.
    async fn connected(&self, control: &Running<Control>, wanted: bool) {
        let handle = control.it.handle();
        let mut changes = handle.subscribe();
        while handle.status().await.unwrap().nodes.iter().any(|node| node.connected) != wanted {
            within(changes.recv()).await.unwrap();
        }
    }
}

async fn bootstrap(control: &Running<Control>) -> Bootstrap {
    let handle = control.it.handle();
    let token = handle.create_join_token("host-1", Duration::from_secs(60)).await.unwrap();
    Bootstrap { join_token: SecretString::from(token.token), bundle_pem: handle.bundle().pem() }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("nothing happened for a minute")
}

fn client(socket: &Path) -> SpiffeWorkloadApiClient<Channel> {
    SpiffeWorkloadApiClient::new(workload_api::channel(socket))
}

type Svids = tonic::Streaming<proto::X509svidResponse>;

async fn open(socket: &Path) -> Svids {
    let request = workload_api::request(proto::X509svidRequest {});
    within(client(socket).fetch_x509svid(request)).await.unwrap().into_inner()
}

async fn next(stream: &mut Svids) -> Result<proto::X509svidResponse, Code> {
    within(stream.next()).await.expect("the stream ended without a status").map_err(|status| status.code())
}

fn serial(response: &proto::X509svidResponse) -> String {
    let svid = &response.svids[0];
    let key = zeroize::Zeroizing::new(svid.x509_svid_key.clone());
    X509Svid::from_concatenated(&svid.x509_svid, key).unwrap().serial().to_owned()
}

/// The code with which a single fetch is refused.
async fn refused(socket: &Path) -> Code {
    match within(workload_api::fetch_once(socket)).await {
        Err(WorkloadApiError::Status(status)) => status.code(),
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn identity_11_from_join_token_to_a_verified_svid() {
    let world = World::new();
    let mut registered = web();
    registered.dns = vec!["web.bank.example".into()];
    let control = world.control(vec![registered]).await;
    let agent = world.agent(&control).await;
    assert_eq!(agent.it.id().as_str(), "spiffe://bank.example/palisade/agent/host-1");

    let (svid, bundles) = within(workload_api::fetch_once(&world.socket())).await.unwrap();
    assert_eq!(svid.id().as_str(), WEB);
    let leaf = verify_chain(&svid.chain()[0], &svid.chain()[1..], &bundles, clock().unix_time()).unwrap();
    assert_eq!(leaf.id, *svid.id());
    assert!(svid.not_after() <= clock().now() + Duration::from_secs(120));

    let request = workload_api::request(proto::X509BundlesRequest {});
    let mut stream = within(client(&world.socket()).fetch_x509_bundles(request)).await.unwrap().into_inner();
    let message = within(stream.next()).await.unwrap().unwrap();
    let keys: Vec<_> = message.bundles.keys().map(String::as_str).collect();
    assert_eq!(keys, ["spiffe://bank.example"], "identity 12");
    assert_eq!(message.bundles["spiffe://bank.example"], control.it.handle().bundle().concatenated());

    let status = within(world.admin().status()).await.unwrap();
    let issued = status.svids.iter().find(|issued| issued.serial == svid.serial()).unwrap();
    assert_eq!((issued.spiffe_id.as_str(), issued.host.as_str()), (WEB, "host-1"));
    openssl_verifies(&world, &svid, &control.it.handle().bundle().pem());
    drop(stream);
    agent.stop().await;
    assert!(!world.socket().exists(), "nothing is left behind");
    control.stop().await;
}

/// What a workload is told of where web serves.
fn heard(world: &World, scope: &Scope) -> watch::Receiver<Vec<Found>> {
    let (sender, receiver) = watch::channel(Vec::new());
    let tell = Box::new(move |found| {
        sender.send_if_modified(|told| std::mem::replace(told, found) != *told);
    });
    discovery::follow(world.socket(), vec![Wanted { id: SpiffeId::new(WEB).unwrap(), tell }], clock(), scope);
    receiver
}

async fn until_heard(heard: &mut watch::Receiver<Vec<Found>>, wanted: &[(&str, bool)]) {
    let wanted: Vec<Found> = wanted
        .iter()
        .map(|(address, serving)| Found { address: address.parse().unwrap(), serving: *serving })
        .collect();
    within(heard.wait_for(|found| *found == wanted)).await.unwrap();
}

#[tokio::test]
async fn where_a_workload_serves_is_heard_of_and_outlives_restarts_but_not_the_workload() {
    let world = World::new();
    let control = world.control(vec![web()]).await;
    let agent = world.agent(&control).await;
    let (listening, serving_here, once) = (Scope::new(), Scope::new(), Scope::new());
    let mut heard = heard(&world, &listening);
    let (serving, told) = watch::channel(true);
    // One that ends is gone at once.
    discovery::announce(world.socket(), "10.0.0.2:5001".parse().unwrap(), told.clone(), clock(), &once);
    until_heard(&mut heard, &[("10.0.0.2:5001", true)]).await;
    once.drain();
    assert_eq!(once.finished(PATIENCE).await, Ok(()));
    discovery::announce(world.socket(), "10.0.0.1:5001".parse().unwrap(), told, clock(), &serving_here);
    until_heard(&mut heard, &[("10.0.0.1:5001", true)]).await;
    serving.send_replace(false);
    until_heard(&mut heard, &[("10.0.0.1:5001", false)]).await;
    serving.send_replace(true);
    until_heard(&mut heard, &[("10.0.0.1:5001", true)]).await;
    let status = control.it.handle().status().await.unwrap();
    let found: Vec<_> =
        status.endpoints.iter().map(|found| (&*found.spiffe_id, &*found.address, found.serving)).collect();
    assert_eq!(found, [(WEB, "10.0.0.1:5001", true)]);

    // Neither a new agent nor a new control takes anything away, and both hear of it again.
    heard.mark_unchanged();
    agent.stop().await;
    let address = control.it.local_addr();
    let again = world.try_agent(world.agent_config(address, None)).await.unwrap();
    world.connected(&control, true).await;
    control.stop().await;
    let control = world.start(world.control_config(address, vec![web()])).await;
    let handle = control.it.handle();
    let mut changes = handle.subscribe();
    while handle.status().await.unwrap().endpoints.is_empty() {
        within(changes.recv()).await.unwrap();
    }
    assert!(!heard.has_changed().unwrap(), "never withdrawn");
    for scope in [serving_here, listening] {
        scope.drain();
        assert_eq!(scope.finished(PATIENCE).await, Ok(()));
    }
    again.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn nobody_announces_nor_asks_without_an_identity() {
    let world = World::new();
    let nobody = entry(WEB, Selectors { path: Some("/bin/somebody-else".into()), ..Selectors::default() });
    let control = world.control(vec![nobody]).await;
    let agent = world.agent(&control).await;
    let scope = Scope::new();
    let mut heard = heard(&world, &scope);
    let told = watch::channel(true).1;
    discovery::announce(world.socket(), "10.0.0.1:5001".parse().unwrap(), told, clock(), &scope);
    // Registered only now: what came before was refused, and nothing of it was kept.
    let handle = control.it.handle();
    assert_eq!(handle.status().await.unwrap().endpoints, []);
    assert_eq!(*heard.borrow_and_update(), []);
    handle.replace_entries(vec![web()]).unwrap();
    until_heard(&mut heard, &[("10.0.0.1:5001", true)]).await;
    scope.drain();
    assert_eq!(scope.finished(PATIENCE).await, Ok(()));
    agent.stop().await;
    control.stop().await;
}

/// identity 26: the chain verifies with OpenSSL.
fn openssl_verifies(world: &World, svid: &X509Svid, bundle_pem: &str) {
    if Command::new("openssl").arg("version").output().is_err() {
        identity::testing::skip("no openssl here (Debian package openssl)");
        return;
    }
    let (root, leaf) = (world.path("root.pem"), world.path("leaf.der"));
    std::fs::write(&root, bundle_pem).unwrap();
    std::fs::write(&leaf, svid.leaf_der()).unwrap();
    for purpose in ["sslserver", "sslclient"] {
        let outcome = Command::new("openssl")
            .args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"])
            .arg(&root)
            .arg(&leaf)
            .output()
            .unwrap();
        assert!(outcome.status.success(), "{outcome:?}");
    }
}

#[tokio::test]
async fn identity_35_and_security_12_two_hosts_with_one_join_token() {
    let world = World::new();
    let control = world.control(vec![web()]).await;
    let bootstrap = bootstrap(&control).await;
    let config = |name: &str| AgentConfig {
        socket: world.path(&format!("{name}/agent.sock")),
        state: world.path(&format!("{name}-state")),
        ..world.agent_config(control.it.local_addr(), Some(bootstrap.clone()))
    };
    let (one, two) = tokio::join!(world.try_agent(config("one")), world.try_agent(config("two")));
    let (winner, loser) = match (one, two) {
        (Ok(winner), Err(loser)) | (Err(loser), Ok(winner)) => (winner, loser),
        (Ok(_), Ok(_)) => panic!("both joined"),
        (Err(one), Err(two)) => panic!("neither joined: {one}, {two}"),
    };
    assert!(matches!(loser, AgentError::Refused(_)), "{loser}");
    winner.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn identity_9_rotation_is_pushed_on_an_open_stream() {
    let world = World::new();
    let mut config = world.control_config("127.0.0.1:0".parse().unwrap(), vec![web()]);
    config.svid_ttl = Duration::from_secs(8);
    config.rotate_after = Duration::from_secs(1);
    let control = world.start(config).await;
    let agent = world.agent(&control).await;
    let mut stream = open(&world.socket()).await;
    let mut serials = Vec::new();
    for _ in 0..3 {
        serials.push(serial(&next(&mut stream).await.unwrap()));
    }
    serials.sort();
    serials.dedup();
    assert_eq!(serials.len(), 3, "three messages, three SVIDs");
    drop(stream);
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn identity_8_an_entry_removed_ends_the_stream_and_added_again_serves() {
    let world = World::new();
    let control = world.control(vec![web()]).await;
    let agent = world.agent(&control).await;
    let mut stream = open(&world.socket()).await;
    assert_eq!(next(&mut stream).await.unwrap().svids[0].spiffe_id, WEB);
    within(world.admin().replace_entries(&[])).await.unwrap();
    assert_eq!(next(&mut stream).await.unwrap_err(), Code::PermissionDenied);
    assert_eq!(refused(&world.socket()).await, Code::PermissionDenied, "identity 6");

    // The identity comes back over the watch that sidecars use, which tries again by itself.
    let scope = Scope::new();
    let source = workload_api::watch(world.socket(), clock(), &scope);
    within(world.admin().replace_entries(&[web()])).await.unwrap();
    assert_eq!(within(source.ready()).await.unwrap().svid.id().as_str(), WEB);
    scope.drain();
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn another_executable_user_or_digest_is_refused_and_its_twin_served() {
    let world = World::new();
    let uid = rustix::process::geteuid().as_raw();
    let wrong = [
        Selectors { path: Some("/usr/bin/another".into()), ..Selectors::default() },
        Selectors { path: Some(own_path()), uid: Some(uid + 1), ..Selectors::default() },
        Selectors { path: Some(own_path()), sha256: Some("0".repeat(64)), ..Selectors::default() },
    ];
    let control = world.control(wrong.into_iter().map(|selectors| entry(WEB, selectors)).collect()).await;
    let agent = world.agent(&control).await;
    world.connected(&control, true).await;
    // Until the agent has heard from control it says Unavailable.
    let code = loop {
        match refused(&world.socket()).await {
            Code::Unavailable => tokio::task::yield_now().await,
            code => break code,
        }
    };
    assert_eq!(code, Code::PermissionDenied);
    let contents = std::fs::read(own_path()).unwrap();
    let sha256 = ring_sha256(&contents);
    let right = Selectors { path: Some(own_path()), uid: Some(uid), gid: None, sha256: Some(sha256) };
    control.it.handle().replace_entries(vec![entry(WEB, right)]).unwrap();
    let scope = Scope::new();
    let source = workload_api::watch(world.socket(), clock(), &scope);
    assert_eq!(within(source.ready()).await.unwrap().svid.id().as_str(), WEB);
    scope.drain();
    agent.stop().await;
    control.stop().await;
}

/// Gives each refusal a receipt, and says what it was in the record.
#[derive(Debug, Default)]
struct Receipts(std::sync::atomic::AtomicUsize);

impl RefusalRecorder for Receipts {
    fn refused(&self, caller: &RefusedCaller) -> Option<ReportedDecision> {
        let number = self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let json = serde_json::json!({
            "method": caller.method,
            "reason": caller.reason.to_string(),
            "caller": caller.to_string(),
            "near": caller.near_misses,
        });
        Some(ReportedDecision {
            receipt: format!("r-{}-{number}", caller.method),
            time_ms: u64::try_from(caller.now.as_millis()).unwrap(),
            service: "agent".into(),
            verdict: "deny".into(),
            address: String::new(),
            json: json.to_string(),
        })
    }
}

/// The receipt in a refusal's status.
fn receipt(status: &tonic::Status) -> String {
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let text = status.message().strip_prefix("no identity is registered for this workload (receipt ");
    text.and_then(|text| text.strip_suffix(')')).expect("no receipt").to_owned()
}

#[tokio::test]
async fn identity_39_a_refused_caller_has_a_receipt_under_which_control_knows_why() {
    let world = World::new();
    let uid = rustix::process::geteuid().as_raw();
    let near = Selectors { path: Some(own_path()), uid: Some(uid + 1), ..Selectors::default() };
    let control = world.control(vec![entry(WEB, near)]).await;
    let config = AgentConfig {
        refusals: Some(Arc::new(Receipts::default())),
        ..world.agent_config(control.it.local_addr(), Some(bootstrap(&control).await))
    };
    let agent = world.try_agent(config).await.unwrap();
    let mut client = client(&world.socket());
    let request = || workload_api::request(proto::X509BundlesRequest {});
    let bundles = loop {
        let mut stream = within(client.fetch_x509_bundles(request())).await.unwrap().into_inner();
        match within(stream.next()).await.expect("a status").unwrap_err() {
            // Until the agent has heard from control; nobody is refused, and nothing recorded.
            status if status.code() == Code::Unavailable => tokio::task::yield_now().await,
            status => break receipt(&status),
        }
    };
    assert_eq!(bundles, "r-FetchX509Bundles-0");
    let svid = match within(workload_api::fetch_once(&world.socket())).await {
        Err(WorkloadApiError::Status(status)) => receipt(&status),
        other => panic!("not refused: {other:?}"),
    };
    assert_eq!(svid, "r-FetchX509SVID-1");
    let scope = Scope::new();
    let reporter = DecisionReporter::start(world.socket(), clock(), &scope);
    reporter.report(ReportedDecision {
        receipt: "r-own".into(),
        time_ms: 1,
        service: "web".into(),
        verdict: "allow".into(),
        address: String::new(),
        json: "{}".into(),
    });

    let admin = world.admin();
    let mut changes = control.it.handle().subscribe();
    for (receipt, method) in [
        (bundles.as_str(), "FetchX509Bundles"),
        (svid.as_str(), "FetchX509SVID"),
        ("r-Mesh.Report-2", "Mesh.Report"),
    ] {
        let found = loop {
            match within(admin.decision(receipt)).await.unwrap() {
                Some(found) => break found,
                None => drop(within(changes.recv()).await.unwrap()),
            }
        };
        assert_eq!(found.reporter, "spiffe://bank.example/palisade/agent/host-1");
        assert_eq!((found.host.as_str(), found.verdict.as_str()), ("host-1", "deny"));
        assert_eq!(found.json["method"], method);
        assert_eq!(found.json["reason"], "no registration matches the caller");
        let caller = found.json["caller"].as_str().unwrap();
        assert!(caller.starts_with(&format!("pid={} uid={uid} ", std::process::id())), "{caller}");
        let near = found.json["near"][0].as_str().unwrap();
        assert!(near.starts_with(WEB) && near.ends_with("differs in uid"), "{near}");
    }
    assert!(within(admin.decision("r-own")).await.unwrap().is_none(), "it had no right to report");
    scope.drain();
    agent.stop().await;
    control.stop().await;
}

fn ring_sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn control_gone_identities_work_on_and_the_agent_finds_it_again() {
    let world = World::new();
    let control = world.control(vec![web()]).await;
    let (address, root) = (control.it.local_addr(), control.it.handle().bundle().pem());
    let agent = world.agent(&control).await;
    let mut stream = open(&world.socket()).await;
    let first = serial(&next(&mut stream).await.unwrap());
    let (before, _) = within(workload_api::fetch_once(&world.socket())).await.unwrap();
    assert_eq!(before.serial(), first);
    control.stop().await;

    // New connections are served from memory while control is gone.
    let (meanwhile, bundles) = within(workload_api::fetch_once(&world.socket())).await.unwrap();
    assert!(verify_chain(&meanwhile.chain()[0], &[], &bundles, clock().unix_time()).is_ok());

    let second = entry("spiffe://bank.example/service/second", web().selectors);
    let control = world.start(world.control_config(address, vec![web(), second])).await;
    assert_eq!(control.it.handle().bundle().pem(), root, "the same root after a restart");
    world.connected(&control, true).await;
    // The new entry arrives on the stream that was open all the time.
    while next(&mut stream).await.unwrap().svids.len() < 2 {}
    let status = control.it.handle().status().await.unwrap();
    assert!(status.svids.iter().any(|issued| issued.serial == first), "the log survives too");
    drop(stream);
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn an_agent_restarts_without_a_token_and_says_what_it_needs_when_it_cannot() {
    let world = World::new();
    let control = world.control(vec![web()]).await;
    let without = || world.agent_config(control.it.local_addr(), None);
    let error = world.try_agent(without()).await.err().unwrap();
    assert!(matches!(&error, AgentError::NotJoined(_)), "{error}");
    assert!(error.to_string().contains("join token"), "{error}");
    world.agent(&control).await.stop().await;
    let node = world.path("agent/node.json");
    assert_eq!(std::fs::metadata(&node).unwrap().permissions().mode() & 0o777, 0o600, "security 19");

    let agent = world.try_agent(without()).await.unwrap();
    assert_eq!(within(workload_api::fetch_once(&world.socket())).await.unwrap().0.id().as_str(), WEB);
    // A second agent on the same socket is told so.
    let mut second = without();
    second.state = world.path("agent-2");
    let error = world.try_agent(second).await.err().unwrap();
    assert!(matches!(error, AgentError::Socket(_)), "{error}");
    agent.stop().await;

    let mut other = without();
    other.host = "host-2".into();
    assert!(matches!(world.try_agent(other).await.err().unwrap(), AgentError::OtherIdentity { .. }));
    std::fs::set_permissions(world.path("agent"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = world.try_agent(without()).await.err().unwrap().to_string();
    assert!(error.contains("chmod 700"), "{error}");
    control.stop().await;
}

/// The machine slept past half of the node identity's life, and past the whole of everybody else's.
#[tokio::test]
async fn identity_43_after_a_long_sleep_everything_is_renewed_without_a_restart() {
    let world = World::new();
    let clock = ManualClock::at(SystemClock.now());
    let shared = || Arc::clone(&clock) as SharedClock;
    let scope = Scope::new();
    let config = world.control_config("127.0.0.1:0".parse().unwrap(), vec![web()]);
    let control = Control::start(config, shared(), SystemRandom::shared(), &scope).await.unwrap();
    let handle = control.handle();
    let token = handle.create_join_token("host-1", Duration::from_secs(60)).await.unwrap();
    let bootstrap =
        Bootstrap { join_token: SecretString::from(token.token), bundle_pem: handle.bundle().pem() };
    let config = world.agent_config(control.local_addr(), Some(bootstrap));
    let agent = Agent::start(config, shared(), SystemRandom::shared(), &scope).await.unwrap();
    let mut stream = open(&world.socket()).await;
    let workload = serial(&next(&mut stream).await.unwrap());
    let node = agent.identity().current().unwrap().svid.serial().to_owned();
    let own = handle.identity().current().unwrap().svid.serial().to_owned();

    clock.advance(Duration::from_secs(13 * 3600));
    let healed = async {
        loop {
            let renewed = agent.identity().current().unwrap().svid.serial() != node
                && handle.identity().current().unwrap().svid.serial() != own;
            if renewed && handle.status().await.unwrap().nodes[0].connected {
                break;
            }
            // Time goes on while they work; waits between attempts end so.
            clock.advance(Duration::from_millis(50));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(healed).await;
    let stored = handle.status().await.unwrap().nodes[0].serial.clone();
    assert_eq!(stored, agent.identity().current().unwrap().svid.serial());
    // The stream was told too, if it lived; a new one is served in any case.
    drop(stream);
    let fresh = async {
        loop {
            match workload_api::fetch_once(&world.socket()).await {
                Ok((svid, _)) if svid.serial() != workload => break svid,
                _ => clock.advance(Duration::from_millis(50)),
            }
        }
    };
    assert!(within(fresh).await.not_after() > clock.now());
    scope.drain();
    assert_eq!(scope.finished(PATIENCE).await, Ok(()));
}

#[tokio::test]
async fn control_refuses_what_it_cannot_start_with_and_says_why() {
    let world = World::new();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let control = world.control(vec![web()]).await;
    let taken = listen(control.it.local_addr()).unwrap_err();
    assert!(matches!(taken, ControlError::PortTaken(address) if address == control.it.local_addr()));
    control.stop().await;

    let refused = async |config: ControlConfig| {
        let scope = Scope::new();
        let error = Control::start(config, clock(), SystemRandom::shared(), &scope).await.err().unwrap();
        scope.drain();
        error.to_string()
    };
    let mut wrong = world.control_config(any, vec![web()]);
    wrong.passphrase = SecretString::from("wrong");
    assert!(refused(wrong).await.contains("passphrase does not open"));

    let mut foreign = world.control_config(any, vec![entry("spiffe://other.example/a", web().selectors)]);
    assert!(refused(foreign).await.contains("outside the trust domain"));
    foreign = world.control_config(any, vec![]);
    foreign.rotate_after = foreign.svid_ttl;
    assert!(refused(foreign).await.contains("rotate_after"));

    let state = world.path("control");
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(refused(world.control_config(any, vec![])).await.contains("chmod 700"));
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700)).unwrap();

    let key = state.join("authority.json");
    let whole = std::fs::read(&key).unwrap();
    std::fs::write(&key, &whole[..whole.len() / 2]).unwrap();
    assert!(refused(world.control_config(any, vec![])).await.contains("damaged"));
    std::fs::remove_file(&key).unwrap();
    assert!(
        refused(world.control_config(any, vec![])).await.contains("is missing"),
        "never a new root by accident"
    );
    std::fs::write(&key, &whole).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(refused(world.control_config(any, vec![])).await.contains("chmod 600"));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    world.start(world.control_config(any, vec![])).await.stop().await;
}

#[tokio::test]
async fn identity_2_and_16_security_10_calls_without_the_header_or_not_offered() {
    let world = World::new();
    let control = world.control(vec![web()]).await;
    let agent = world.agent(&control).await;
    let mut bare = client(&world.socket());
    let request = tonic::Request::new(proto::X509svidRequest {});
    let status = within(bare.fetch_x509svid(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let request = workload_api::request(proto::JwtsvidRequest::default());
    let status = within(bare.fetch_jwtsvid(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("FetchX509SVID"), "{}", status.message());
    // A JWT-SVID is never good here, one without `exp` no more than another.
    let request = workload_api::request(proto::ValidateJwtsvidRequest::default());
    let status = within(bare.validate_jwtsvid(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);

    let mut health =
        tonic_health::pb::health_client::HealthClient::new(workload_api::channel(&world.socket()));
    let answer = within(health.check(tonic_health::pb::HealthCheckRequest::default())).await.unwrap();
    assert_eq!(answer.into_inner().status(), tonic_health::pb::health_check_response::ServingStatus::Serving);
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn decisions_travel_to_control_and_are_found_by_receipt() {
    let world = World::new();
    let control = world.control(vec![web()]).await;
    let agent = world.agent(&control).await;
    within(workload_api::fetch_once(&world.socket())).await.unwrap();
    let address = control.it.local_addr();
    control.stop().await;

    // Reported while control is away: the agent keeps them.
    let scope = Scope::new();
    let reporter = DecisionReporter::start(world.socket(), clock(), &scope);
    for n in 0..300 {
        reporter.report(ReportedDecision {
            receipt: format!("receipt {n}/x"),
            time_ms: n,
            service: "web".into(),
            verdict: if n == 7 { "deny" } else { "allow" }.into(),
            address: "127.0.0.1:40100".into(),
            json: format!(r#"{{"n":{n}}}"#),
        });
    }
    let control = world.start(world.control_config(address, vec![web()])).await;
    let mut changes = control.it.handle().subscribe();
    let admin = world.admin();
    while within(admin.status()).await.unwrap().counts.decisions_stored < 300 {
        within(changes.recv()).await.unwrap();
    }
    assert_eq!(reporter.dropped(), 0);
    let found = within(admin.decision("receipt 7/x")).await.unwrap().unwrap();
    assert_eq!((found.reporter.as_str(), found.host.as_str()), (WEB, "host-1"), "stamped, not claimed");
    assert_eq!(found.json, serde_json::json!({"n": 7}));
    assert!(within(admin.decision("receipt 301/x")).await.unwrap().is_none());
    let denied = DecisionQuery { verdict: Some("deny".into()), ..DecisionQuery::default() };
    assert_eq!(within(admin.decisions(&denied)).await.unwrap(), [found]);
    let query = DecisionQuery {
        limit: Some(2),
        since: Some(298),
        address: Some("127.0.0.1:40100".into()),
        verdict: None,
    };
    assert_eq!(within(admin.decisions(&query)).await.unwrap().len(), 2);
    scope.drain();
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn the_admin_socket_is_for_its_owner_and_answers_in_words() {
    let world = World::new();
    let admin = world.admin();
    assert!(matches!(within(admin.status()).await, Err(AdminError::Connect { .. })));
    let control = world.control(vec![web()]).await;
    let mode = |name: &str| std::fs::metadata(world.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("admin"), mode("admin/control.sock")), (0o700, 0o600));
    let token = within(admin.create_join_token("host-1", Duration::from_secs(60))).await.unwrap();
    assert_eq!(token.host, "host-1");
    let error = within(admin.create_join_token("a/b", Duration::from_secs(60))).await.unwrap_err();
    assert!(error.to_string().contains("not a host name"), "{error}");
    assert_eq!(within(admin.bundle()).await.unwrap(), control.it.handle().bundle().pem());
    let bad = entry("spiffe://bank.example/service/x", Selectors::default());
    let error = within(admin.replace_entries(&[bad])).await.unwrap_err();
    assert!(error.to_string().contains("no selector"), "{error}");
    let status = within(admin.status()).await.unwrap();
    assert_eq!((status.entries.len(), status.counts.join_tokens_open), (1, 1));
    assert_eq!(status.entries[0].entry, web());
    control.stop().await;
    assert!(!world.path("admin/control.sock").exists());
}

const CHILD_SOCKET: &str = "CA_TEST_CHILD_SOCKET";

/// Not a test of its own: what [`security_14_the_socket_used_by_another_user`] runs as that user.
#[tokio::test]
async fn child_that_asks_for_an_identity() {
    let Some(socket) = std::env::var_os(CHILD_SOCKET) else { return };
    match within(workload_api::fetch_once(Path::new(&socket))).await {
        Ok((svid, _)) => println!("OUTCOME {}", svid.id()),
        Err(WorkloadApiError::Status(status)) => println!("OUTCOME {:?}", status.code()),
        Err(error) => println!("OUTCOME {error}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn security_14_the_socket_used_by_another_user() {
    if !rustix::process::geteuid().is_root() {
        identity::testing::skip("only root can start a process of another user");
        return;
    }
    const NOBODY: u32 = 65_534;
    let world = World::new();
    std::fs::set_permissions(world.directory.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    // A copy that another user can execute, wherever the build directory is.
    let program = world.path("program");
    std::fs::copy(own_path(), &program).unwrap();
    let entry_of =
        |uid| entry(WEB, Selectors { uid: Some(uid), path: Some(program.clone()), ..Selectors::default() });
    let control = world.control(vec![entry_of(0)]).await;
    let agent = world.agent(&control).await;
    let ask = |uid: u32| {
        let mut command = Command::new(&program);
        command.args(["--exact", "child_that_asks_for_an_identity", "--nocapture"]);
        command.env(CHILD_SOCKET, world.socket()).current_dir("/").uid(uid).gid(uid);
        let outcome = tokio::task::spawn_blocking(move || command.output().unwrap());
        async move { String::from_utf8_lossy(&within(outcome).await.unwrap().stdout).into_owned() }
    };
    let own = ask(0).await;
    assert!(own.contains(&format!("OUTCOME {WEB}")), "{own}");
    let foreign = ask(NOBODY).await;
    assert!(foreign.contains("OUTCOME PermissionDenied"), "{foreign}");
    control.it.handle().replace_entries(vec![entry_of(NOBODY)]).unwrap();
    let (mut granted, mut tries) = (ask(NOBODY).await, 0);
    // The push may be on its way.
    while !granted.contains(&format!("OUTCOME {WEB}")) && tries < 20 {
        granted = ask(NOBODY).await;
        tries += 1;
    }
    assert!(granted.contains(&format!("OUTCOME {WEB}")), "{granted}");
    agent.stop().await;
    control.stop().await;
}

/// An independent client: the `spiffe` package for Python.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identity_5_the_python_spiffe_client_is_served() {
    let probe = "import os, sys, spiffe; print(os.path.realpath('/proc/self/exe'))";
    let python = match Command::new("python3").args(["-c", probe]).output() {
        Ok(outcome) if outcome.status.success() => {
            PathBuf::from(String::from_utf8_lossy(&outcome.stdout).trim().to_owned())
        }
        Ok(_) => {
            identity::testing::skip("python3 has no package spiffe (pip install spiffe)");
            return;
        }
        Err(error) => {
            identity::testing::skip(&format!("no python3 here ({error})"));
            return;
        }
    };
    let world = World::new();
    let mut config = world.control_config(
        "127.0.0.1:0".parse().unwrap(),
        vec![entry(WEB, Selectors { path: Some(python), ..Selectors::default() })],
    );
    config.svid_ttl = Duration::from_secs(10);
    config.rotate_after = Duration::from_secs(1);
    let control = world.start(config).await;
    let agent = world.agent(&control).await;
    world.connected(&control, true).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/workload_api_client.py");
    let mut command = Command::new("python3");
    command.arg(script).env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", world.socket().display()));
    let outcome = within(tokio::task::spawn_blocking(move || command.output().unwrap())).await.unwrap();
    let (out, err) = (String::from_utf8_lossy(&outcome.stdout), String::from_utf8_lossy(&outcome.stderr));
    assert!(outcome.status.success(), "{out}\n{err}");
    assert!(
        out.contains(&format!("svid {WEB}")) && out.contains("rotated") && out.contains("refused"),
        "{out}"
    );
    agent.stop().await;
    control.stop().await;
}

/// Puts the pseudonym of `alice` in her place.
#[derive(Debug)]
struct Alice;

impl Redactor for Alice {
    fn redact(&self, key: &[u8], json: &str) -> Option<String> {
        (json != "[]").then(|| json.replace("alice", &identity::pseudonym::of(key, "alice")))
    }
}

#[tokio::test]
async fn people_do_not_leave_their_host_where_they_are_to_be_kept_out_of_decisions() {
    let world = World::new();
    let control = world.control(vec![web()]).await;
    let config = AgentConfig {
        redactor: Some(Arc::new(Alice)),
        ..world.agent_config(control.it.local_addr(), Some(bootstrap(&control).await))
    };
    let agent = world.try_agent(config).await.unwrap();
    within(workload_api::fetch_once(&world.socket())).await.unwrap();
    let scope = Scope::new();
    let reporter = DecisionReporter::start(world.socket(), clock(), &scope);
    for (receipt, json) in [("unread", "[]"), ("hers", r#"{"user":"alice"}"#)] {
        reporter.report(ReportedDecision {
            receipt: receipt.into(),
            time_ms: 1,
            service: "web".into(),
            verdict: "deny".into(),
            address: String::new(),
            json: json.into(),
        });
    }
    let (admin, mut changes) = (world.admin(), control.it.handle().subscribe());
    while within(admin.status()).await.unwrap().counts.decisions_stored < 1 {
        within(changes.recv()).await.unwrap();
    }
    let alice = within(admin.pseudonym("alice")).await.unwrap();
    let found = within(admin.decision("hers")).await.unwrap().unwrap();
    assert_eq!(found.json, serde_json::json!({"user": alice}));
    assert!(
        within(admin.decision("unread")).await.unwrap().is_none(),
        "what cannot be read is not passed on"
    );
    scope.drain();
    agent.stop().await;
    control.stop().await;
    let written = std::fs::read_to_string(world.path("agent/decisions.jsonl")).unwrap();
    assert!(written.contains(&alice) && !written.contains("alice"), "{written}");
}
