//! Two hosts with a real sidecar each, of one trust domain, and an app behind the right one.

#![allow(dead_code, reason = "not every test program that shares this file needs all of it")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use identity::testing::TestAuthority;

use crate::namespaces::{Host, hosts};

/// A busy machine and a debug build: generous, because it only bounds a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Where the right app listens, and where its sidecar does.
pub(crate) const APP: &str = "127.0.0.1:18080";
const MESH_PORT: u16 = 15606;
const SECOND_MESH_PORT: u16 = 15607;
const SECOND_ADMIN: &str = "127.0.0.1:15691";
/// `/ready` and `/metrics` of either sidecar.
pub(crate) const ADMIN: &str = "127.0.0.1:15690";
/// Where the left app calls the right one explicitly.
pub(crate) const CALLS: &str = "127.0.0.1:15601";

/// The hosts, and what their sidecars read.
pub(crate) struct Pair {
    pub(crate) left: Host,
    pub(crate) right: Host,
    directory: tempfile::TempDir,
}

impl Pair {
    /// Two hosts with identities and policies; nothing runs yet. The left one may `GET /`, `GET /1k` and nothing
    /// else.
    pub(crate) fn new() -> Self {
        let (left, right) = hosts();
        let directory = tempfile::tempdir().unwrap();
        let authority = TestAuthority::new("mesh.test");
        fs::write(directory.path().join("ca.crt"), authority.bundle().pem()).unwrap();
        for name in ["client", "backend"] {
            let (certificate, key) = authority.issue_with(&format!("/ns/default/sa/{name}"), |_| {});
            fs::write(directory.path().join(format!("{name}.crt")), pem("CERTIFICATE", &certificate))
                .unwrap();
            let path = directory.path().join(format!("{name}.key"));
            fs::write(&path, pem("PRIVATE KEY", &key)).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        Self { left, right, directory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts the left sidecar, whose calls go to `endpoints`, with `more` in its sidecar.toml.
    pub(crate) fn client(&self, endpoints: &[SocketAddr], addresses: &[SocketAddr], more: &str) -> Sidecar {
        self.client_within(endpoints, addresses, more, "20s")
    }

    /// The same, with a bound on the time that a call may take.
    pub(crate) fn client_within(
        &self,
        endpoints: &[SocketAddr],
        addresses: &[SocketAddr],
        more: &str,
        timeout: &str,
    ) -> Sidecar {
        let list = |addresses: &[SocketAddr]| {
            addresses.iter().map(|address| format!("\"{address}\"")).collect::<Vec<_>>().join(", ")
        };
        let (endpoints, addresses) = (list(endpoints), list(addresses));
        let text = format!(
            "[outbound.backend]\nlisten = \"{CALLS}\"\nid = \"spiffe://mesh.test/ns/default/sa/backend\"\n\
             endpoints = [{endpoints}]\naddresses = [{addresses}]\nrequest_timeout = \"{timeout}\"\n{more}"
        );
        Sidecar::start(self, &self.left, "client", &text)
    }

    /// Starts the right sidecar, with `more` in its sidecar.toml.
    pub(crate) fn server(&self, more: &str) -> Sidecar {
        Sidecar::start(self, &self.right, "backend", &Self::door(MESH_PORT, more))
    }

    /// The same before an app that speaks a protocol of its own.
    pub(crate) fn plain_server(&self) -> Sidecar {
        let text = Self::door(MESH_PORT, "app_protocol = \"tcp\"\n").replace(
            &format!("{:?}", Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/ours/policies")),
            &format!("{:?}", Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plain/policies")),
        );
        Sidecar::start(self, &self.right, "backend", &text)
    }

    /// Starts another one before the same app.
    pub(crate) fn second_server(&self) -> Sidecar {
        let text = Self::door(SECOND_MESH_PORT, "");
        Sidecar::start_at(self, &self.right, "backend", &text, SECOND_ADMIN)
    }

    fn door(port: u16, more: &str) -> String {
        let policies = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/ours/policies");
        format!(
            "[inbound]\nlisten = \"[::]:{port}\"\napp = \"{APP}\"\npolicies = {policies:?}\n\
             service = \"backend\"\nrequest_timeout = \"20s\"\n{more}"
        )
    }

    pub(crate) fn second_address(&self) -> SocketAddr {
        self.right.at(SECOND_MESH_PORT)[0]
    }

    /// Where the right sidecar is reached by others, by either family.
    pub(crate) fn mesh_addresses(&self) -> [SocketAddr; 2] {
        self.right.at(MESH_PORT)
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// A running `palisade sidecar`.
pub(crate) struct Sidecar {
    child: Child,
    log: PathBuf,
}

impl Sidecar {
    /// Starts one that is ready when this returns.
    fn start(pair: &Pair, host: &Host, name: &str, text: &str) -> Self {
        Self::start_at(pair, host, name, text, ADMIN)
    }

    fn start_at(pair: &Pair, host: &Host, name: &str, text: &str, admin: &str) -> Self {
        let access_log =
            if text.contains("[telemetry]") { "" } else { "[telemetry]\naccess_log = \"off\"\n" };
        let text = format!(
            "[identity]\ncertificate = \"{name}.crt\"\nkey = \"{name}.key\"\nbundle = \"ca.crt\"\n{text}\n\
             [admin]\nlisten = \"{admin}\"\n{access_log}"
        );
        let [config, log] = ["toml", "log"]
            .map(|ending| pair.path(&format!("{name}-{}.{ending}", &admin[admin.len() - 5..])));
        fs::write(&config, text).unwrap();
        // The log goes on where a sidecar before ended.
        let stderr = fs::File::options().create(true).append(true).open(&log).unwrap();
        // Unlike nsenter, `ip netns exec` gives each host an /etc/hosts of its own.
        let mut command = Command::new("ip");
        command.args(["netns", "exec", host.name(), env!("CARGO_BIN_EXE_palisade"), "--config"]);
        command.arg(config).arg("sidecar").env_remove("RUST_LOG").env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let mut sidecar = Self { child: command.spawn().unwrap(), log };
        sidecar.until_ready(host, admin);
        sidecar
    }

    fn until_ready(&mut self, host: &Host, admin: &str) {
        let log = self.log.clone();
        until(&mut || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended ({ended:?}):\n{}", fs::read_to_string(&log).unwrap());
            (host.within(|| get(admin.parse().unwrap(), "/ready")).ok()?.0 == 200).then_some(())
        });
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard error.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits for a line of the log that holds all of `words`.
    pub(crate) fn until_logged(&self, words: &[&str]) -> String {
        until(&mut || {
            let log = self.log();
            log.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
        })
    }

    /// Ends it: in order, or at once. Its listeners are closed when this returns.
    pub(crate) fn end(mut self, signal: &str) {
        self.signal(signal);
        self.child.wait().unwrap();
    }

    pub(crate) fn signal(&self, name: &str) {
        let status =
            Command::new("kill").args([&format!("-{name}"), &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _gone = self.child.kill().is_err();
            let _status = self.child.wait().is_err();
        }
    }
}

/// Waits until there is something.
#[track_caller]
pub(crate) fn until<T>(there: &mut dyn FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = there() {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "it did not come to be");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// One `GET` on a connection of its own: status and body. To be called within a host.
pub(crate) fn get(to: SocketAddr, path: &str) -> std::io::Result<(u16, Vec<u8>)> {
    let mut connection = TcpStream::connect(to)?;
    connection.set_read_timeout(Some(DEADLINE))?;
    write!(connection, "GET {path} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer)?;
    let head_end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let head_end = head_end.ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let head = String::from_utf8_lossy(&answer[..head_end]);
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or(std::io::ErrorKind::InvalidData)?, answer[head_end + 4..].to_vec()))
}

/// Serves HTTP/1.1 at `address` of `host`: `answer` writes what comes after each request's head.
pub(crate) fn http(
    host: &Host,
    address: &str,
    answer: impl Fn(&str, &mut TcpStream) -> std::io::Result<()> + Clone + Send + 'static,
) {
    let listener = host.within(|| TcpListener::bind(address).unwrap());
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let answer = answer.clone();
            std::thread::spawn(move || serve(connection.ok()?, &answer).err());
        }
    });
}

fn serve(
    mut connection: TcpStream,
    answer: &impl Fn(&str, &mut TcpStream) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut requests = BufReader::new(connection.try_clone()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if requests.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        answer(&head, &mut connection)?;
    }
}

/// A small answer.
pub(crate) fn ok(text: &str, connection: &mut TcpStream) -> std::io::Result<()> {
    write!(
        connection,
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    )
}
