//! Starts the demo as a person would, and talks to it from outside.

#![allow(dead_code, reason = "not every test program that shares this file needs all of it")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::Value;

#[path = "../trust/mod.rs"]
mod trust;

/// A busy machine and a debug build: generous, because it only bounds a hang.
const DEADLINE: Duration = Duration::from_secs(120);

/// A running demo and its state directory.
pub(crate) struct Demo {
    child: Child,
    log: PathBuf,
    _folder: Option<tempfile::TempDir>,
    ready_path: String,
    tls: Arc<rustls::ClientConfig>,
    tokens: Mutex<BTreeMap<String, String>>,
}

impl Demo {
    /// Starts a demo with fresh state and waits until it says that all is healthy.
    pub(crate) async fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("palisade-demo-test").tempdir().unwrap();
        let demo = Self::start_in(folder.path(), arguments).await;
        let mut demo = demo;
        demo._folder = Some(folder);
        demo
    }

    /// Starts a demo whose state is `folder`/state, and waits until it says that all is healthy.
    pub(crate) async fn start_in(folder: &Path, arguments: &[&str]) -> Self {
        let ready_path = folder.join("ready.json");
        let log = std::fs::File::create(folder.join("demo.log")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_palisade"))
            .arg("demo")
            .arg("--state")
            .arg(folder.join("state"))
            .arg("--ready")
            .arg(&ready_path)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let started = Instant::now();
        while !ready_path.exists() {
            let ended = child.try_wait().unwrap();
            if ended.is_some() || started.elapsed() > DEADLINE {
                let said = std::fs::read_to_string(folder.join("demo.log")).unwrap_or_default();
                panic!("the demo did not get ready ({ended:?}):\n{said}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let ready: Value = serde_json::from_slice(&std::fs::read(&ready_path).unwrap()).unwrap();
        let tls = trust::authorities_of(ready["ca_bundle"].as_str().unwrap());
        let ready_path = ready_path.display().to_string();
        Self { child, log: folder.join("demo.log"), _folder: None, ready_path, tls, tokens: Mutex::default() }
    }

    pub(crate) fn ready_path(&self) -> &str {
        &self.ready_path
    }

    /// The ready file as it is now.
    pub(crate) fn ready(&self) -> Value {
        serde_json::from_slice(&std::fs::read(&self.ready_path).unwrap()).unwrap()
    }

    /// Process ids by role, as they are now.
    pub(crate) fn pids(&self) -> BTreeMap<String, u32> {
        serde_json::from_value(self.ready()["pids"].clone()).unwrap()
    }

    /// The directory of the sockets.
    pub(crate) fn sockets(&self) -> PathBuf {
        PathBuf::from(self.ready()["agent_socket"].as_str().unwrap()).parent().unwrap().to_owned()
    }

    /// Runs another verb of the binary.
    pub(crate) fn palisade(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_palisade")).args(arguments).output().unwrap()
    }

    /// Logs a user in and returns the access token.
    pub(crate) fn token(&self, user: &str) -> String {
        let output = self.palisade(&["demo", "token", user, "--ready", &self.ready_path]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let token = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        self.tokens.lock().unwrap().insert(user.to_owned(), token.clone());
        token
    }

    /// The last token of a user, without asking anybody.
    pub(crate) fn cached_token(&self, user: &str) -> String {
        self.tokens.lock().unwrap()[user].clone()
    }

    /// What `palisade explain` says; the record needs a moment to travel.
    pub(crate) async fn explain(&self, receipt: &str) -> String {
        let mesh = format!("{}/mesh.toml", self.ready()["state"].as_str().unwrap());
        let mut said = String::new();
        self.until("the receipt can be explained", async || {
            let output = self.palisade(&["explain", receipt, "--config", &mesh]);
            said = String::from_utf8(output.stdout).unwrap();
            output.status.success()
        })
        .await;
        said
    }

    /// SVIDs received by each sidecar, from its metrics.
    pub(crate) async fn rotations(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for (name, service) in self.ready()["services"].as_object().unwrap() {
            let admin: SocketAddr = service["admin"].as_str().unwrap().parse().unwrap();
            let stream = tokio::net::TcpStream::connect(admin).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            let connection = tokio::spawn(connection);
            let request =
                hyper::Request::get("/metrics").header("host", "x").body(Empty::<Bytes>::new()).unwrap();
            let response = sender.send_request(request).await.unwrap();
            let text = response.into_body().collect().await.unwrap().to_bytes();
            connection.abort();
            let text = String::from_utf8_lossy(&text);
            let line = text.lines().find(|line| line.starts_with("palisade_svid_rotations_total")).unwrap();
            counts.insert(name.clone(), line.rsplit(' ').next().unwrap().parse().unwrap());
        }
        counts
    }

    /// A kept-alive connection to the gateway.
    pub(crate) fn connection(&self) -> Connection {
        let gateway = self.ready()["gateway"].as_str().unwrap().to_owned();
        let address = gateway.strip_prefix("https://").unwrap().trim_end_matches('/').parse().unwrap();
        Connection { address, tls: Arc::clone(&self.tls), sender: None }
    }

    /// One request on a connection of its own.
    pub(crate) async fn get(&self, path: &str, token: Option<&str>) -> Result<(u16, String), String> {
        self.connection().get(path, token).await
    }

    /// Whether a request that needs everything works: a login, and a read through three sidecars.
    pub(crate) async fn healthy(&self) -> bool {
        let output = self.palisade(&["demo", "token", "alice", "--ready", &self.ready_path]);
        if !output.status.success() {
            return false;
        }
        let token = String::from_utf8(output.stdout).unwrap();
        matches!(self.get("/api/accounts/17", Some(token.trim())).await, Ok((200, _)))
    }

    /// Waits until something holds.
    pub(crate) async fn until(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let started = Instant::now();
        while !holds().await {
            if started.elapsed() > DEADLINE {
                let said = std::fs::read_to_string(&self.log).unwrap_or_default();
                panic!("not within {DEADLINE:?}: {what}\n{said}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Ends it as Ctrl-C would, and expects a clean end.
    pub(crate) async fn stop(mut self) {
        signal(self.child.id(), "INT");
        let started = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if started.elapsed() > DEADLINE => panic!("the demo does not end"),
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        let said = std::fs::read_to_string(&self.log).unwrap_or_default();
        assert!(status.success(), "{status}:\n{said}");
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // Only after a failed assertion: the supervisor takes its children with it.
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(self.child.id(), "TERM");
            let _status = self.child.wait();
        }
    }
}

/// A client's connection to the gateway, opened again when the server has closed it.
pub(crate) struct Connection {
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    sender: Option<SendRequest<Empty<Bytes>>>,
}

impl Connection {
    pub(crate) async fn get(&mut self, path: &str, token: Option<&str>) -> Result<(u16, String), String> {
        let answer = tokio::time::timeout(Duration::from_secs(30), self.exchange(path, token)).await;
        answer.map_err(|_| "timed out".to_owned())?
    }

    async fn exchange(&mut self, path: &str, token: Option<&str>) -> Result<(u16, String), String> {
        let say = |error: &dyn std::fmt::Display| error.to_string();
        let mut sender = self.open_or_kept().await?;
        let mut request = hyper::Request::get(path).header("host", self.address.to_string());
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.header("accept", "application/json").body(Empty::new()).map_err(|e| say(&e))?;
        let response = sender.send_request(request).await.map_err(|e| say(&e))?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.map_err(|e| say(&e))?.to_bytes();
        self.sender = Some(sender);
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    async fn open_or_kept(&mut self) -> Result<SendRequest<Empty<Bytes>>, String> {
        if let Some(mut kept) = self.sender.take()
            && kept.ready().await.is_ok()
        {
            return Ok(kept);
        }
        self.open().await
    }

    async fn open(&self) -> Result<SendRequest<Empty<Bytes>>, String> {
        let say = |error: &dyn std::fmt::Display| error.to_string();
        let stream = tokio::net::TcpStream::connect(self.address).await.map_err(|e| say(&e))?;
        let connector = tokio_rustls::TlsConnector::from(Arc::clone(&self.tls));
        let stream =
            connector.connect(ServerName::from(self.address.ip()), stream).await.map_err(|e| say(&e))?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| say(&e))?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

/// Sends a signal by name.
pub(crate) fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

/// Whether a process lives (a zombie does not).
pub(crate) fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}
