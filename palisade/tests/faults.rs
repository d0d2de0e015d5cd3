//! Faults between and beside real sidecars, in network namespaces: what breaks ends, what does not goes on.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot prepare its hosts has failed"
)]

mod namespaces;
mod pair;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::time::Duration;

use identity::testing::skip;
use namespaces::{Host, unavailable};
use pair::{APP, CALLS, Pair, Sidecar, get, http, ok, until};

/// Bytes of an answer of which only the beginning is sent.
const ANNOUNCED: usize = 8 * 1024 * 1024;

fn calls() -> SocketAddr {
    CALLS.parse().unwrap()
}

/// The status that the left app's call gets; nothing where its connection breaks.
fn call(left: &Host, path: &str) -> Option<u16> {
    left.within(|| get(calls(), path)).ok().map(|(status, _)| status)
}

/// A pair that works, with an app that answers `ok`.
fn working() -> (Pair, Sidecar, Sidecar) {
    let pair = Pair::new();
    http(&pair.right, APP, |_, connection| ok("ok", connection));
    let (server, client) = (pair.server(""), pair.client(&pair.mesh_addresses()[..1], &[], ""));
    assert_eq!(call(&pair.left, "/"), Some(200));
    (pair, server, client)
}

fn descriptors(sidecar: &Sidecar) -> usize {
    fs::read_dir(format!("/proc/{}/fd", sidecar.pid())).unwrap().count()
}

fn resident_bytes(sidecar: &Sidecar) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", sidecar.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn an_answer_that_is_cut_short_on_its_way_never_looks_whole() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let pair = Pair::new();
    // `GET /1k` is cut by the app, `GET /` by the death of the sidecar before it.
    let (begun, has_begun) = mpsc::channel();
    let end_of_test = Arc::new(Barrier::new(2));
    let held = Arc::clone(&end_of_test);
    http(&pair.right, APP, move |head, connection| {
        write!(connection, "HTTP/1.1 200 OK\r\ncontent-length: {ANNOUNCED}\r\n\r\n")?;
        connection.write_all(&vec![b'x'; 256 * 1024])?;
        if head.starts_with("GET /1k ") {
            return connection.shutdown(Shutdown::Both);
        }
        begun.send(()).unwrap();
        held.wait();
        Ok(())
    });
    let (server, _client) = (pair.server(""), pair.client(&pair.mesh_addresses()[..1], &[], ""));
    let whole =
        |path: &str| pair.left.within(|| get(calls(), path)).is_ok_and(|(_, body)| body.len() == ANNOUNCED);
    let status_and_reading = |path: &'static str| {
        pair.left.within(move || {
            let mut connection = TcpStream::connect(calls()).unwrap();
            write!(connection, "GET {path} HTTP/1.1\r\nhost: backend\r\n\r\n").unwrap();
            connection
        })
    };
    assert!(!whole("/1k"));
    let mut connection = status_and_reading("/");
    has_begun.recv_timeout(pair::DEADLINE).unwrap();
    let mut some = vec![0; 64 * 1024];
    connection.read_exact(&mut some).unwrap();
    server.end("KILL");
    let mut rest = Vec::new();
    // A reset, or an end before what was announced: never the whole.
    let _reset = connection.read_to_end(&mut rest).is_err();
    assert!(some.len() + rest.len() < ANNOUNCED);
    end_of_test.wait();

    // The next sidecar is called as if nothing had been.
    let _server = pair.server("");
    until(&mut || (call(&pair.left, "/orders/1") == Some(403)).then_some(()));
}

#[test]
fn a_peer_that_vanishes_without_a_word_is_noticed_and_calls_go_elsewhere() {
    const CALLERS: usize = 8;
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let pair = Pair::new();
    // It takes a while to answer, so that calls overlap and both endpoints get some.
    http(&pair.right, APP, |_, connection| {
        std::thread::sleep(Duration::from_millis(20));
        ok("ok", connection)
    });
    let (_first, _second) = (pair.server(""), pair.second_server());
    let endpoints = [pair.mesh_addresses()[0], pair.second_address()];
    let _client = pair.client(&endpoints, &[], "");
    let together = |each: &(dyn Fn() + Sync)| {
        std::thread::scope(|scope| {
            for _ in 0..CALLERS {
                scope.spawn(each);
            }
        });
    };
    // Until both endpoints have a connection.
    let connected = |port: u16| {
        let filter = format!("( sport = :{port} )");
        !pair.right.run("ss", &["-Htn", "state", "established", &filter]).is_empty()
    };
    until(&mut || {
        together(&|| assert_eq!(call(&pair.left, "/"), Some(200)));
        endpoints.iter().all(|endpoint| connected(endpoint.port())).then_some(())
    });
    // Nothing to or from the first arrives any more; both ends believe in their connection.
    let port = endpoints[0].port();
    let drop = format!(
        "table inet blackhole {{\n\
         chain in {{\n type filter hook input priority 0;\n tcp dport {port} drop\n }}\n\
         chain out {{\n type filter hook output priority 0;\n tcp sport {port} drop\n }}\n}}\n"
    );
    pair.right.run("nft", &[&drop]);
    // Calls that were sent into it hear before their own timeout of 20 s; from then on all are answered.
    let failed = AtomicUsize::new(0);
    together(&|| {
        let mut answered = 0;
        until(&mut || {
            let status = call(&pair.left, "/");
            assert_ne!(status, Some(504), "the dead connection was waited on until the call's own end");
            if status == Some(200) {
                answered += 1;
            } else {
                answered = 0;
                failed.fetch_add(1, Ordering::SeqCst);
            }
            (answered >= 20).then_some(())
        });
    });
    let failed = failed.load(Ordering::SeqCst);
    assert!((1..=2 * CALLERS).contains(&failed), "{failed} calls failed");
}

#[test]
fn calls_are_answered_through_loss_and_jitter() {
    const CALLERS: usize = 8;
    const CALLS_EACH: usize = 8;
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let pair = Pair::new();
    let text = "a whole answer ".repeat(4000);
    let answer = text.clone();
    http(&pair.right, APP, move |_, connection| ok(&answer, connection));
    let _server = pair.server("");
    // One packet in twenty is lost each way, and each piece comes up to 200 ms late.
    let loss = "table inet loss {\nchain in {\n type filter hook input priority 0;\n \
                iif eth0 meta l4proto tcp numgen random mod 100 < 5 drop\n }\n}\n";
    for host in [&pair.left, &pair.right] {
        host.run("nft", &[loss]);
    }
    let late = relay(&pair.left, pair.mesh_addresses()[0]);
    let _client = pair.client(&[late], &[], "");
    let failed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                for _ in 0..CALLS_EACH {
                    let answer = pair.left.within(|| get(calls(), "/"));
                    if !answer.is_ok_and(|(status, body)| status == 200 && body == text.as_bytes()) {
                        failed.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
    });
    assert_eq!(failed.load(Ordering::SeqCst), 0, "of {}", CALLERS * CALLS_EACH);
}

/// Passes connections on to `to`, each piece after a while of its own, as a path with jitter does; where `tc` has
/// netem, that would do the same below TCP.
fn relay(host: &Host, to: SocketAddr) -> SocketAddr {
    let listener = host.within(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let (address, name) = (listener.local_addr().unwrap(), host.name().to_owned());
    std::thread::spawn(move || {
        namespaces::enter(&name);
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(to).unwrap());
            for (from, to) in [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))] {
                std::thread::spawn(move || delayed(from.ok()?, to.ok()?).err());
            }
        }
    });
    address
}

fn delayed(mut from: TcpStream, mut to: TcpStream) -> std::io::Result<()> {
    // A fixed sequence that looks like chance: steps of a full-period generator modulo 200.
    let (mut late, mut piece) = (7_u64, vec![0; 16 * 1024]);
    loop {
        let length = from.read(&mut piece)?;
        if length == 0 {
            return to.shutdown(Shutdown::Write);
        }
        late = (late * 61 + 137) % 200;
        std::thread::sleep(Duration::from_millis(late));
        to.write_all(&piece[..length])?;
    }
}

#[test]
fn slow_readers_and_slow_writers_delay_nobody_else_and_are_held_to_their_windows() {
    const SLOW: usize = 40;
    const MOST_GROWTH_BYTES: usize = 64 * 1024 * 1024;
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let pair = Pair::new();
    http(&pair.right, APP, |head, connection| {
        if head.starts_with("GET /1k ") {
            ok(&"x".repeat(ANNOUNCED), connection)
        } else {
            ok("ok", connection)
        }
    });
    let (server, client) = (pair.server(""), pair.client(&pair.mesh_addresses()[..1], &[], ""));
    assert_eq!(call(&pair.left, "/"), Some(200));
    let before = [&server, &client].map(resident_bytes);
    let slow: Vec<TcpStream> = pair.left.within(|| {
        let dial = |request: &str| {
            let mut connection = TcpStream::connect(calls()).unwrap();
            connection.write_all(request.as_bytes()).unwrap();
            connection
        };
        // Half of them ask for 8 MiB and read none; the others never end their request.
        (0..SLOW)
            .map(|n| dial(["GET /1k HTTP/1.1\r\nhost: a\r\n\r\n", "GET / HTTP/1.1\r\nhost:"][n % 2]))
            .collect()
    });
    for _ in 0..50 {
        assert_eq!(call(&pair.left, "/"), Some(200));
    }
    for (sidecar, before) in [&server, &client].into_iter().zip(before) {
        let growth = resident_bytes(sidecar).saturating_sub(before);
        assert!(growth < MOST_GROWTH_BYTES, "{growth} bytes for {SLOW} slow clients");
    }
    drop(slow);
    assert_eq!(call(&pair.left, "/"), Some(200));
}

#[test]
fn a_storm_of_resets_leaves_nothing_behind() {
    const RESETS: usize = 1000;
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (pair, server, client) = working();
    let before = [&server, &client].map(descriptors);
    let mesh = pair.mesh_addresses()[0];
    pair.left.within(|| {
        for n in 0..RESETS {
            // Of calls, before and after a request; and of handshakes.
            let to = if n % 4 == 3 { mesh } else { calls() };
            let mut connection = TcpStream::connect(to).unwrap();
            if n % 2 == 1 {
                let words =
                    if to == mesh { &b"\x16\x03\x01"[..] } else { b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" };
                connection.write_all(words).unwrap();
            }
            nix::sys::socket::setsockopt(
                &connection,
                nix::sys::socket::sockopt::Linger,
                &nix::libc::linger { l_onoff: 1, l_linger: 0 },
            )
            .unwrap();
        }
    });
    assert_eq!(call(&pair.left, "/"), Some(200));
    for (sidecar, before) in [&server, &client].into_iter().zip(before) {
        // A few for connections that are kept.
        until(&mut || (descriptors(sidecar) <= before + 8).then_some(()));
    }
}

#[test]
fn a_peer_that_is_stopped_costs_a_few_calls_and_then_none_until_it_goes_on() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let pair = Pair::new();
    http(&pair.right, APP, |_, connection| ok("ok", connection));
    let (first, _second) = (pair.server(""), pair.second_server());
    let endpoints = [pair.mesh_addresses()[0], pair.second_address()];
    let _client = pair.client_within(&endpoints, &[], "", "500ms");
    for _ in 0..20 {
        assert_eq!(call(&pair.left, "/"), Some(200));
    }
    first.signal("STOP");
    let mut answered = 0;
    let mut failed = 0;
    until(&mut || {
        match call(&pair.left, "/") {
            Some(200) => answered += 1,
            _ => (failed, answered) = (failed + 1, 0),
        }
        (answered >= 30).then_some(())
    });
    assert!(failed <= 10, "{failed} calls failed before the endpoint was left out");
    first.signal("CONT");
    for _ in 0..20 {
        assert_eq!(call(&pair.left, "/"), Some(200));
    }
}

#[test]
fn security_29_without_descriptors_it_waits_and_serves_again() {
    const LIMIT: usize = 64;
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (pair, _server, client) = working();
    let limit = format!("--nofile={LIMIT}:{LIMIT}");
    assert!(
        Command::new("prlimit")
            .args(["--pid", &client.pid().to_string(), &limit])
            .status()
            .unwrap()
            .success()
    );
    let crowd: Vec<TcpStream> =
        pair.left.within(|| (0..2 * LIMIT).map(|_| TcpStream::connect(calls()).unwrap()).collect());
    client.until_logged(&["accept failed"]);
    let open = descriptors(&client);
    assert!(open < crowd.len(), "{open}");
    drop(crowd);
    assert_eq!(call(&pair.left, "/"), Some(200));
}

#[test]
fn a_full_disk_costs_lines_of_the_access_log_and_no_request() {
    const REQUESTS: usize = 400;
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let pair = Pair::new();
    let disk = Disk::new(pair.path("disk"));
    http(&pair.right, APP, |_, connection| ok("ok", connection));
    let log = disk.0.join("access.log");
    let _server = pair.server("");
    let telemetry = format!("[telemetry]\naccess_log = {log:?}\n");
    let client = pair.client(&pair.mesh_addresses()[..1], &[], &telemetry);
    for _ in 0..REQUESTS {
        assert_eq!(call(&pair.left, "/"), Some(200));
    }
    client.until_logged(&["lines are dropped"]);
    for _ in 0..20 {
        assert_eq!(call(&pair.left, "/"), Some(200));
    }
    let lines = fs::read_to_string(&log).unwrap().lines().count();
    assert!(0 < lines && lines < REQUESTS, "{lines} lines on a disk of 16 KiB");
}

/// A file system of 16 KiB, for as long as this lives.
struct Disk(PathBuf);

impl Disk {
    fn new(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=16k", "tmpfs"]).arg(&path).status();
        assert!(mount.unwrap().success());
        Self(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _gone = Command::new("umount").arg("--lazy").arg(&self.0).status().is_err();
    }
}

#[test]
fn calls_go_on_through_restarts_of_their_server() {
    const RESTARTS: usize = 4;
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (pair, server, _client) = working();
    let (mut server, done, served) = (Some(server), AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                if call(&pair.left, "/") == Some(200) {
                    served.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        for restart in 0..RESTARTS {
            let before = served.load(Ordering::SeqCst);
            until(&mut || (served.load(Ordering::SeqCst) > before + 10).then_some(()));
            server.take().unwrap().end(if restart % 2 == 0 { "TERM" } else { "KILL" });
            server = Some(pair.server(""));
        }
        let before = served.load(Ordering::SeqCst);
        until(&mut || (served.load(Ordering::SeqCst) > before + 10).then_some(()));
        done.store(true, Ordering::SeqCst);
    });
}
