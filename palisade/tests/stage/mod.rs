//! Two sidecars by themselves on this machine, as `bench/ours` runs them.

#![allow(dead_code, reason = "not every test program that shares this file needs all of it")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use identity::files::write_private;
use identity::testing::TestAuthority;
use tempfile::TempDir;

#[path = "../ports/mod.rs"]
mod ports;

pub(crate) use ports::free_addresses;

/// A busy machine and a debug build: generous, because it only bounds a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// One process, and what it says on standard error.
pub(crate) struct Alone {
    child: Child,
    said: Receiver<String>,
}

impl Alone {
    pub(crate) fn start(file: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_palisade"))
            .args(["sidecar", "--config"])
            .arg(file)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, said) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let alone = Self { child, said };
        alone.hears("sidecar started");
        alone
    }

    /// Waits until the log has a line with `words`.
    #[track_caller]
    pub(crate) fn hears(&self, words: &str) -> String {
        let mut before = Vec::new();
        loop {
            let line = self.said.recv_timeout(DEADLINE);
            let line = line.unwrap_or_else(|_| panic!("nothing said of `{words}`; before: {before:#?}"));
            if line.contains(words) {
                return line;
            }
            before.push(line);
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn hang_up(&self) {
        self.signal(rustix::process::Signal::HUP);
    }

    /// Asks it to end and waits until it has.
    pub(crate) fn end(mut self) {
        self.signal(rustix::process::Signal::TERM);
        assert!(self.child.wait().unwrap().success());
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        // One that has ended already is fine.
        let _gone = self.child.kill().is_err();
        let _reaped = self.child.wait().is_ok();
    }
}

/// The stage: an app, certificates, and a sidecar on either side.
pub(crate) struct Stage {
    directory: TempDir,
    pub(crate) authority: TestAuthority,
    /// Where the client's app calls.
    pub(crate) client: SocketAddr,
    /// The server's mTLS port.
    pub(crate) door: SocketAddr,
    /// The server's.
    pub(crate) admin: SocketAddr,
}

impl Stage {
    /// With the rules that are shipped for measuring, before an app that answers `ok`.
    pub(crate) fn new() -> Self {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/ours/policies");
        Self::before(app(), &shipped)
    }

    /// With these rules, before this app.
    pub(crate) fn before(app: SocketAddr, policies: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [client, door, admin] = free_addresses();
        let stage = Self { directory, authority: TestAuthority::new("mesh.test"), client, door, admin };
        copy(policies, &stage.path("policies"));
        for who in ["client", "server"] {
            stage.issue(who, &format!("/ns/default/sa/{who}"));
        }
        let identity = |who: &str| {
            format!(
                "[identity]\ncertificate = \"{who}.crt\"\nkey = \"{who}.key\"\nbundle = \"{who}.ca.crt\"\n"
            )
        };
        let rest =
            |who: &str| format!("[telemetry]\naccess_log = \"{who}.access.log\"\n[limits]\nworkers = 1\n");
        let server = format!(
            "{}[inbound]\nlisten = \"{door}\"\napp = \"{app}\"\nservice = \"backend\"\npolicies = \"policies\"\n\
             [admin]\nlisten = \"{admin}\"\n{}",
            identity("server"),
            rest("server")
        );
        let calls = format!(
            "{}[outbound.backend]\nlisten = \"{client}\"\nendpoints = [\"{door}\"]\n\
             id = \"spiffe://mesh.test/ns/default/sa/server\"\n{}",
            identity("client"),
            rest("client")
        );
        fs::write(stage.path("server.toml"), server).unwrap();
        fs::write(stage.path("client.toml"), calls).unwrap();
        stage
    }

    /// Changes what a sidecar is told, before it starts.
    pub(crate) fn amend(&self, who: &str, from: &str, to: &str) {
        let file = self.path(&format!("{who}.toml"));
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(file, text.replacen(from, to, 1)).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn start(&self, who: &str) -> Alone {
        Alone::start(&self.path(&format!("{who}.toml")))
    }

    /// The bundle, a new certificate and its key, put in place one after the other.
    pub(crate) fn issue(&self, who: &str, path: &str) {
        self.issue_by(who, path, &self.authority, &[&self.authority]);
    }

    /// The same by an authority of its own, and whom they are to trust.
    pub(crate) fn issue_by(&self, who: &str, path: &str, by: &TestAuthority, trusted: &[&TestAuthority]) {
        let svid = by.issue(path);
        let armour = |label: &str, der: &[u8]| {
            format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
        };
        self.trust(who, trusted);
        fs::write(self.path(&format!("{who}.crt")), armour("CERTIFICATE", svid.leaf_der())).unwrap();
        let key = armour("PRIVATE KEY", svid.key_pkcs8());
        write_private(&self.path(&format!("{who}.key")), key.as_bytes()).unwrap();
    }

    /// Puts another bundle in place.
    pub(crate) fn trust(&self, who: &str, trusted: &[&TestAuthority]) {
        let bundle: String = trusted.iter().map(|authority| authority.bundle().pem()).collect();
        fs::write(self.path(&format!("{who}.ca.crt")), bundle).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Answers `ok` to whatever is asked, for as long as the test runs.
fn app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut writer = stream.try_clone().unwrap();
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    if line.is_empty()
                        && writer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").is_err()
                    {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// The status and body of one request on a connection of its own.
pub(crate) fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    (status.unwrap_or_else(|| panic!("{answer}")), body)
}
