//! Floods, stalls, bad bytes and the rules of the protocols, by independent clients (Python's `hyperframe`, `hpack`
//! and `ssl`) against two real sidecars: the port of the app's calls, the mTLS port and the HBONE port.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its stage has failed")]

mod stage;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use identity::testing::skip;
use serde_json::{Value, json};
use stage::{Alone, Stage, free_addresses};

/// Bytes of the answer to `GET /api/1m`.
const BIG: usize = 1024 * 1024;

/// A client's sidecar, a server's with a second way in, and an app with small and large answers.
struct Floods {
    stage: Stage,
    server: Alone,
    client: Alone,
    hbone: SocketAddr,
    app: SocketAddr,
}

impl Floods {
    fn new() -> Self {
        let app = app();
        let stage = Stage::before(app, &folder().join("policies"));
        let [hbone] = free_addresses();
        let second = format!("[inbound]\nhbone = \"{hbone}\"\nhbone_destinations = [\"{app}\"]\n");
        stage.amend("server", "[inbound]\n", &second);
        let (server, client) = (stage.start("server"), stage.start("client"));
        Self { stage, server, client, hbone, app }
    }

    /// What a script is told of them.
    fn described(&self) -> Value {
        let target = |name: &str, port: u16, tls: bool, tunnel: Option<String>, of: &Alone| json!({ "name": name, "port": port, "tls": tls, "tunnel": tunnel, "pid": of.pid() });
        json!({
            "folder": self.stage.path(""),
            "calls": self.stage.client.port(),
            "targets": [
                target("outbound", self.stage.client.port(), false, None, &self.client),
                target("mtls", self.stage.door.port(), true, None, &self.server),
                target("hbone", self.hbone.port(), true, Some(self.app.to_string()), &self.server),
            ],
        })
    }

    /// Runs a script to its end; skips, with the reason printed, where it cannot run.
    #[track_caller]
    fn passes(&self, script: &str, needs: &str) {
        let found = Command::new("python3").args(["-c", &format!("import {needs}")]).output();
        if !found.is_ok_and(|output| output.status.success()) {
            skip(&format!("python3 cannot import {needs} (pip install -r .ci/requirements.txt)"));
            return;
        }
        let mut child = Command::new("python3")
            .arg(folder().join(script))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(self.described().to_string().as_bytes()).unwrap();
        for row in BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok) {
            println!("{row}");
        }
        assert!(child.wait().unwrap().success(), "{script} found something wrong");
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/floods")
}

/// Reads what it is sent, and answers `ok`, or much of nothing.
fn app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                // Whoever floods hangs up whenever it likes.
                let _hung_up = answers(&stream).is_err();
            });
        }
    });
    address
}

fn answers(mut stream: &TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut first, mut line, mut length, mut chunked) = (String::new(), String::new(), 0, false);
        if reader.read_line(&mut first)? == 0 {
            return Ok(());
        }
        while line != "\r\n" {
            line.clear();
            reader.read_line(&mut line)?;
            let lower = line.to_ascii_lowercase();
            match lower.strip_prefix("content-length:") {
                Some(value) => length = value.trim().parse().unwrap(),
                None => chunked |= lower.starts_with("transfer-encoding:"),
            }
        }
        std::io::copy(&mut (&mut reader).take(length), &mut std::io::sink())?;
        while chunked && !line.starts_with("0\r") {
            line.clear();
            reader.read_line(&mut line)?;
            // Cut short, as floods are.
            let Ok(size) = u64::from_str_radix(line.trim(), 16) else { return Ok(()) };
            // With the line end after it; after the last chunk that ends the trailers, of which there are none.
            std::io::copy(&mut (&mut reader).take(size + 2), &mut std::io::sink())?;
        }
        let size = if first.contains("/api/1m") { BIG } else { 2 };
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n")?;
        stream.write_all(if size == 2 { b"ok" } else { &[b'x'; BIG] })?;
    }
}

#[test]
fn security_26_27_gateway_31_floods_and_stalls_are_bounded_and_others_served() {
    let floods = Floods::new();
    floods.passes("attack.py", "hyperframe, hpack");
}

#[test]
fn gateway_31_the_rules_of_http_2_are_kept() {
    let floods = Floods::new();
    floods.passes("conformance.py", "hyperframe, hpack");
}

#[test]
fn security_28_peers_that_are_too_slow_are_dropped_over_http_2() {
    let floods = Floods::new();
    floods.passes("slow.py", "hyperframe, hpack");
}
