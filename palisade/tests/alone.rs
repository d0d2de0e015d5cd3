//! Two sidecars by themselves, as `bench/ours` runs them: a call goes through both, certificates change under
//! load without one call lost, and what is broken changes nothing.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its stage has failed")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use identity::files::write_private;
use identity::testing::TestAuthority;
use tempfile::TempDir;

/// A busy machine and a debug build: generous, because it only bounds a hang.
const DEADLINE: Duration = Duration::from_secs(60);

/// One process, and what it says on standard error.
struct Alone {
    child: Child,
    said: Receiver<String>,
}

impl Alone {
    fn start(file: &Path) -> Self {
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
    fn hears(&self, words: &str) -> String {
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

    fn hang_up(&self) {
        self.signal(rustix::process::Signal::HUP);
    }

    /// Asks it to end and waits until it has.
    fn end(mut self) {
        self.signal(rustix::process::Signal::TERM);
        assert!(self.child.wait().unwrap().success());
    }

    fn signal(&self, signal: rustix::process::Signal) {
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
struct Stage {
    directory: TempDir,
    authority: TestAuthority,
    client: SocketAddr,
    admin: SocketAddr,
}

impl Stage {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [client, door, admin] = free_addresses();
        let stage = Self { directory, authority: TestAuthority::new("mesh.test"), client, admin };
        let app = app();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/ours/policies");
        copy(&shipped, &stage.path("policies"));
        for who in ["client", "server"] {
            stage.issue(who, &format!("/ns/default/sa/{who}"));
        }
        let identity = |who: &str| {
            format!("[identity]\ncertificate = \"{who}.crt\"\nkey = \"{who}.key\"\nbundle = \"ca.crt\"\n")
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

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn start(&self, who: &str) -> Alone {
        Alone::start(&self.path(&format!("{who}.toml")))
    }

    /// A new certificate and key, put in place one after the other.
    fn issue(&self, who: &str, path: &str) {
        let svid = self.authority.issue(path);
        let armour = |label: &str, der: &[u8]| {
            format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
        };
        fs::write(self.path("ca.crt"), self.authority.bundle().pem()).unwrap();
        fs::write(self.path(&format!("{who}.crt")), armour("CERTIFICATE", svid.leaf_der())).unwrap();
        let key = armour("PRIVATE KEY", svid.key_pkcs8());
        write_private(&self.path(&format!("{who}.key")), key.as_bytes()).unwrap();
    }
}

/// Ports that were free a moment ago: the file has to name them.
fn free_addresses<const N: usize>() -> [SocketAddr; N] {
    let held = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|listener| listener.local_addr().unwrap())
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
fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    (status.unwrap_or_else(|| panic!("{answer}")), body)
}

#[test]
fn the_shipped_rules_decide_between_two_that_run_alone() {
    let stage = Stage::new();
    let (server, client) = (stage.start("server"), stage.start("client"));
    assert_eq!(get(stage.client, "/"), (200, "ok".to_owned()));
    for allowed in ["/1k", "/api/1m"] {
        assert_eq!(get(stage.client, allowed).0, 200, "{allowed}");
    }
    // Mapped and not allowed, and not mapped at all.
    for denied in ["/api/2m", "/orders/17", "/nothing"] {
        assert_eq!(get(stage.client, denied).0, 403, "{denied}");
    }
    assert_eq!(get(stage.admin, "/ready").0, 200);
    // Lines are written some time after their requests, the last ones at the end.
    server.end();
    client.end();
    let log = fs::read_to_string(stage.path("server.access.log")).unwrap();
    let by_rule = log.lines().filter(|line| line.contains("\"rule\":\"policy client-reads-index ("));
    assert_eq!(by_rule.count(), 1, "{log}");
    assert_eq!(log.lines().count(), 6, "{log}");
}

#[test]
fn new_certificates_are_taken_under_load_without_a_call_lost() {
    const ROTATIONS: usize = 3;
    let stage = Stage::new();
    let (server, client) = (stage.start("server"), stage.start("client"));
    let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let callers: Vec<_> = (0..2)
        .map(|_| {
            let (stop, calls, address) = (Arc::clone(&stop), Arc::clone(&calls), stage.client);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(get(address, "/"), (200, "ok".to_owned()));
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for _ in 0..ROTATIONS {
        let before = calls.load(Ordering::Relaxed);
        for (who, sidecar) in [("server", &server), ("client", &client)] {
            stage.issue(who, &format!("/ns/default/sa/{who}"));
            sidecar.hears("identity read again");
        }
        // Some calls go by under the new identities before the next ones come.
        while calls.load(Ordering::Relaxed) < before + 5 && callers.iter().all(|caller| !caller.is_finished())
        {
            thread::yield_now();
        }
    }
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.join().unwrap();
    }
}

#[test]
fn what_is_broken_changes_nothing_and_policies_change_when_told() {
    let stage = Stage::new();
    let (server, client) = (stage.start("server"), stage.start("client"));
    assert_eq!(get(stage.client, "/").0, 200);

    let good = fs::read(stage.path("server.crt")).unwrap();
    fs::write(stage.path("server.crt"), "no certificate").unwrap();
    server.hears("identity not replaced");
    assert_eq!(get(stage.client, "/").0, 200);
    fs::write(stage.path("server.crt"), good).unwrap();
    server.hears("identity read again");
    // Somebody else's identity, right in itself; met between certificate and key it is refused for that first.
    stage.issue("client", "/ns/default/sa/intruder");
    client.hears("names spiffe://mesh.test/ns/default/sa/intruder, and this process is");
    assert_eq!(get(stage.client, "/").0, 200);

    let rules = stage.path("policies/services/backend/backend.cedar");
    let before = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, "permit (principal").unwrap();
    server.hang_up();
    server.hears("policies not reloaded");
    assert_eq!(get(stage.client, "/").0, 200);
    fs::write(&rules, before.replacen("Page::\"index\"", "Page::\"other\"", 1)).unwrap();
    server.hang_up();
    server.hears("policies reloaded");
    assert_eq!(get(stage.client, "/").0, 403);
}

#[test]
fn nothing_starts_without_an_identity_that_is_whole() {
    let stage = Stage::new();
    let refused = |why: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_palisade"))
            .args(["sidecar", "--config"])
            .arg(stage.path("server.toml"))
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains(why), "{said}");
    };
    fs::copy(stage.path("client.crt"), stage.path("server.crt")).unwrap();
    refused("the private key does not fit the certificate");
    fs::remove_file(stage.path("server.key")).unwrap();
    refused("there is no file `server.key`");
}
