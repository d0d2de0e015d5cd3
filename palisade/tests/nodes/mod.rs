//! The sample store as `examples/store/mesh.toml` has it: three nodes, each behind a sidecar of its own, and the services
//! that call them. All real processes, but for the apps of accounts and ops, which the test is.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use gateway::https::Trust;
use gateway::idp::users::{self, User};
use gateway::login::{self, Person};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use secrecy::{ExposeSecret as _, SecretString};
use store_client::{Client, Error, Kind, Moment, Range, Row};

use crate::small::{Home, Process, free_addresses, until};

#[path = "../trust/mod.rs"]
mod trust;

/// How long identities live, and how old they get: what is long-lived meets the end of several.
pub(crate) const TTL: &str = "svid_ttl = \"20s\"\nrotate_after = \"6s\"\n";
/// Whose passwords are their names.
const PEOPLE: [(&str, &str); 3] = [("alice", "customers"), ("bob", "customers"), ("olga", "store-operators")];
const SIDECARS: [&str; 6] = ["store-1", "store-2", "store-3", "accounts", "ops", "reports"];

pub(crate) fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/store")
}

/// The store's own program, which another package of this workspace makes.
fn program() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_palisade")).with_file_name("palisade-store");
    assert!(program.exists(), "{} is not there: cargo build -p store makes it", program.display());
    program
}

/// A mesh with the store in it.
pub(crate) struct Stage {
    pub(crate) home: Home,
    mesh: toml::Table,
    sidecars: BTreeMap<&'static str, Process>,
    nodes: BTreeMap<u64, Process>,
    /// The gateway, the provider.
    _people: Vec<Process>,
}

impl Stage {
    /// Starts all of it; the universe forms when each node hears of the others through its sidecar.
    pub(crate) fn start() -> Self {
        let mut home = Home::new();
        let text = fs::read_to_string(example().join("mesh.toml")).unwrap();
        let text = on_free_ports(&text).replace("[control]\n", &format!("[control]\n{TTL}"));
        fs::write(home.path("mesh.toml"), &text).unwrap();
        let to = home.path("policies");
        let copied = Command::new("cp").arg("-r").arg(example().join("policies")).arg(to).status();
        assert!(copied.unwrap().success());
        fs::create_dir(home.path("bin")).unwrap();
        for name in SIDECARS.into_iter().chain(["idp", "gateway"]) {
            fs::hard_link(env!("CARGO_BIN_EXE_palisade"), home.path(&format!("bin/{name}"))).unwrap();
        }
        std::os::unix::fs::symlink(program(), home.path("bin/palisade-store")).unwrap();
        users(&home);
        home.begin();
        let people = ["idp", "gateway"].map(|name| {
            let process = home.spawn(&format!("bin/{name}"), &[name, "--credentials", "people-credentials"]);
            process.until_ready();
            process
        });
        let mut stage = Self {
            mesh: toml::from_str(&text).unwrap(),
            home,
            sidecars: BTreeMap::new(),
            nodes: BTreeMap::new(),
            _people: people.into(),
        };
        for name in SIDECARS {
            let process = stage.home.spawn(&format!("bin/{name}"), &["sidecar", "--service", name]);
            stage.sidecars.insert(name, process);
        }
        stage.sidecars.values().for_each(Process::until_ready);
        (1..=3).for_each(|number| stage.spawn_node(number));
        (1..=3).for_each(|number| stage.until_serves(number));
        stage
    }

    fn spawn_node(&mut self, number: u64) {
        let name = format!("store-{number}");
        let nodes: Vec<_> = self.called_by(&name).into_iter().collect();
        let nodes: Vec<_> = nodes.into_iter().chain([(number, self.address(&name, "app"))]).collect();
        let nodes: Vec<_> =
            nodes.into_iter().map(|(number, address)| format!("{number}={address}")).collect();
        let (state, ready) = (format!("state/{name}"), format!("{name}.ready"));
        fs::create_dir_all(self.home.path(&state)).unwrap();
        let args = ["node", "--id", &number.to_string(), "--nodes", &nodes.join(","), "--state", &state];
        let args = [&args[..], &["--epsilon", "1ms", "--ready", &ready]].concat();
        self.nodes.insert(number, self.home.spawn("bin/palisade-store", &args));
    }

    fn until_serves(&self, number: u64) {
        let node = &self.nodes[&number];
        until(&format!("node {number} serves"), || {
            assert!(node.alive(), "node {number} has ended:\n{}", node.log());
            self.home.path(&format!("store-{number}.ready")).exists().then_some(())
        });
    }

    /// Ends a node as a power cut would.
    pub(crate) fn kill_node(&mut self, number: u64) {
        fs::remove_file(self.home.path(&format!("store-{number}.ready"))).unwrap();
        let mut node = self.nodes.remove(&number).unwrap();
        node.signal("KILL");
        node.wait();
    }

    /// As if the disk of a node that does not run had been replaced.
    pub(crate) fn empty_disk(&self, number: u64) {
        fs::remove_dir_all(self.home.path(&format!("state/store-{number}"))).unwrap();
    }

    pub(crate) fn restart_node(&mut self, number: u64) {
        self.spawn_node(number);
        self.until_serves(number);
    }

    pub(crate) fn node(&self, number: u64) -> &Process {
        &self.nodes[&number]
    }

    pub(crate) fn sidecar(&self, name: &str) -> &Process {
        &self.sidecars[name]
    }

    /// An address of a service's section.
    pub(crate) fn address(&self, service: &str, key: &str) -> SocketAddr {
        self.mesh["service"][service][key].as_str().unwrap().parse().unwrap()
    }

    /// Where the apps of a service reach the nodes, by number.
    pub(crate) fn called_by(&self, service: &str) -> BTreeMap<u64, SocketAddr> {
        let calls = self.mesh["service"][service]["calls"].as_table().unwrap();
        let node = |(name, address): (&String, &toml::Value)| {
            let number = name.strip_prefix("store-").unwrap().parse().unwrap();
            (number, address.as_str().unwrap().parse().unwrap())
        };
        calls.iter().map(node).collect()
    }

    /// A client beside the sidecar of a service.
    pub(crate) fn client(&self, service: &str) -> Client {
        let nodes = self.called_by(service);
        Client::connect(nodes.iter().map(|(number, address)| format!("{number}={address}"))).unwrap()
    }

    /// A verb about this mesh: whether it went well, and what it said.
    pub(crate) fn palisade(&self, args: &[&str]) -> (bool, String) {
        let output = self.home.palisade(args).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    }

    /// What `palisade explain` says of the receipt in a refusal; the record needs a moment to travel.
    #[track_caller]
    pub(crate) fn explained(&self, refusal: &str) -> String {
        let words = refusal.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
        let receipt = words.into_iter().find(|word| word.starts_with("r-"));
        let receipt = receipt.unwrap_or_else(|| panic!("no receipt in {refusal}"));
        until(&format!("{receipt} can be explained"), || {
            let (good, said) = self.palisade(&["explain", receipt]);
            good.then_some(said)
        })
    }

    /// How many identities a sidecar has had.
    pub(crate) async fn rotations(&self, service: &str) -> u64 {
        let (_, text) = self.admin(service, "/metrics").await;
        let line = text.lines().find(|line| line.starts_with("palisade_svid_rotations_total")).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    async fn admin(&self, service: &str, path: &str) -> (u16, String) {
        let stream = tokio::net::TcpStream::connect(self.address(service, "admin")).await.unwrap();
        let request = hyper::Request::get(path).header("host", "127.0.0.1").body(Full::default()).unwrap();
        exchange(stream, request).await
    }

    /// A person who has logged in.
    pub(crate) async fn person(&self, name: &str) -> String {
        let issuer = format!("https://{}", self.mesh["idp"]["listen"].as_str().unwrap());
        let trust = Trust::pem_file(&self.home.path("agent-credentials/trust-bundle")).unwrap();
        let random: gateway::SharedRandom = Arc::new(ring::rand::SystemRandom::new());
        let password = SecretString::from(name);
        let (issuer, redirect) = (issuer.parse().unwrap(), "http://127.0.0.1/callback".parse().unwrap());
        let (clock, person) = (identity::SystemClock::shared(), Person { name, password: &password });
        let scopes = "openid groups";
        let tokens =
            login::access_token(&issuer, "palisade-cli", &redirect, scopes, person, trust, &clock, &random);
        tokens.await.unwrap().access_token.expose_secret().to_owned()
    }

    /// A request of a person, by the gateway: what is said to the app of a service, and what comes back.
    pub(crate) async fn asks(&self, token: &str, service: &str, words: &str) -> (u16, String) {
        let tls = trust::authorities_of(self.home.path("agent-credentials/trust-bundle"));
        let gateway: SocketAddr = self.mesh["gateway"]["listen"].as_str().unwrap().parse().unwrap();
        let stream = tokio::net::TcpStream::connect(gateway).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(tls);
        let stream = connector.connect(ServerName::from(gateway.ip()), stream).await.unwrap();
        let request = hyper::Request::post(format!("/{service}"))
            .header("host", gateway.to_string())
            .header("authorization", format!("Bearer {token}"))
            .header("content-type", "text/plain")
            .body(Full::from(words.to_owned()))
            .unwrap();
        exchange(stream, request).await
    }

    /// Serves what people say to accounts and ops.
    pub(crate) async fn serve_apps(&self) {
        for service in ["accounts", "ops"] {
            let client = self.client(service);
            let app = axum::Router::new().fallback(move |headers: HeaderMap, words: String| {
                // All that an app does for it: copy the header.
                let client = client.serving(headers["traceparent"].to_str().unwrap()).unwrap();
                async move {
                    match obey(client, words).await {
                        Ok(said) => (StatusCode::OK, said),
                        Err(Error::Denied(told)) => (StatusCode::FORBIDDEN, told.message),
                        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:?}")),
                    }
                }
            });
            let listener = tokio::net::TcpListener::bind(self.address(service, "app")).await.unwrap();
            tokio::spawn(axum::serve(listener, app).into_future());
        }
    }
}

/// Does what a line says: a verb, and rows or numbers.
async fn obey(client: Client, words: String) -> Result<String, Error> {
    let words: Vec<_> = words.split(' ').collect();
    let number = |at: usize| words[at].parse::<u64>().unwrap();
    match words[0] {
        "read" => {
            let rows: Vec<_> = words[1..].iter().map(|key| account(key)).collect();
            let (found, _) = client.transact(async move |txn| txn.read(&rows).await).await?;
            Ok(text(found.into_iter().map(|found| found.value)))
        }
        "show" => {
            let rows: Vec<_> = words[1..].iter().map(|key| account(key)).collect();
            let shown = client.snapshot_read(&rows, Moment::Now).await?;
            Ok(text(shown.rows.into_iter().map(|found| found.value)))
        }
        "scan" => {
            let range = Range::prefix("accounts", words.get(1).copied().unwrap_or_default());
            let shown = client.snapshot_scan(range, Moment::Now, 10).await?;
            Ok(text(shown.rows.into_iter().map(|found| found.value)))
        }
        "put" => {
            let value = Bytes::from(words[1].to_owned());
            let rows: Vec<_> = words[2..].iter().map(|key| account(key)).collect();
            let put = client.transact(async move |txn| {
                rows.iter().for_each(|row| txn.put(row.clone(), value.clone()));
                Ok(())
            });
            put.await.map(|_| String::new())
        }
        "create" => client.create_table(words[1], &KEY).await.map(|()| String::new()),
        "cut" => Ok(client.split(number(1), Some(account(words[2]))).await?.to_string()),
        "lead" => client.lead(number(1), number(2)).await.map(|()| String::new()),
        "move" => client.move_replica(number(1), number(2), number(3)).await.map(|()| String::new()),
        other => panic!("{other}"),
    }
}

/// How the table of accounts is declared.
pub(crate) const KEY: [(&str, Kind); 2] = [("owner", Kind::Text), ("number", Kind::Int)];

pub(crate) fn account(key: &str) -> Row {
    Row::new("accounts", key)
}

fn text(values: impl Iterator<Item = Option<Bytes>>) -> String {
    let text = |value: Option<Bytes>| {
        value.map_or("none".to_owned(), |value| String::from_utf8(value.into()).unwrap())
    };
    values.map(text).collect::<Vec<_>>().join(" ")
}

/// One request on a connection of its own.
async fn exchange(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    request: hyper::Request<Full<Bytes>>,
) -> (u16, String) {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let answer = sender.send_request(request).await.unwrap();
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.into()).unwrap())
}

/// The people's passwords, and what the gateway and the provider know of one another.
fn users(home: &Home) {
    let random = ring::rand::SystemRandom::new();
    let person = |(name, group): (&str, &str)| User {
        name: name.to_owned(),
        password: users::hash_password(&SecretString::from(name), &random).unwrap(),
        display_name: name.to_owned(),
        groups: vec![group.to_owned()],
    };
    home.secret("users.toml", &users::to_toml(PEOPLE.map(person).into()).unwrap());
    fs::create_dir(home.path("people-credentials")).unwrap();
    for (name, byte) in [("gateway-session-key", 1), ("oidc-client-secret", 2)] {
        home.secret(&format!("people-credentials/{name}"), &identity::jws::encode([byte; 32]));
    }
}

/// The same with ports that nobody has.
fn on_free_ports(text: &str) -> String {
    const BEFORE: &str = "127.0.0.1:";
    let mut parts = text.split(BEFORE);
    let mut changed = parts.next().unwrap().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
        let [address] = free_addresses();
        changed.push_str(&format!("{address}{rest}"));
    }
    changed
}
