//! Upgrades under load, with real processes: every request of every client is answered.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod small;

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use small::{Mesh, until};

/// Of each kind: those that keep their connection, and those that open one for every request.
const CLIENTS: usize = 3;
/// What has to be answered between two upgrades, so that each meets real load.
const REQUESTS_BETWEEN: u64 = 150;

/// Answers `ok` to whatever is asked, on connections that are kept.
fn app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            std::thread::spawn(move || answer(connection.unwrap()));
        }
    });
    address
}

fn answer(mut connection: TcpStream) -> Option<()> {
    let mut requests = BufReader::new(connection.try_clone().ok()?);
    loop {
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            if requests.read_line(&mut line).ok()? == 0 {
                return None;
            }
        }
        connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").ok()?;
    }
}

/// A client that takes the protocol at its word: a connection is used again until an answer says that it was
/// the last one, and nothing is tried twice.
struct Client {
    address: SocketAddr,
    keeps: bool,
    connection: Option<BufReader<TcpStream>>,
}

impl Client {
    fn get(&mut self) -> io::Result<()> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => BufReader::new(TcpStream::connect(self.address)?),
        };
        connection.get_ref().set_read_timeout(Some(small::DEADLINE))?;
        connection.get_mut().write_all(b"GET /things/17 HTTP/1.1\r\nhost: echo\r\n\r\n")?;
        let (mut status, mut line) = (String::new(), String::new());
        connection.read_line(&mut status)?;
        let (mut length, mut last) = (0, false);
        while line != "\r\n" {
            line.clear();
            if connection.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let header = line.trim().to_ascii_lowercase();
            last |= header == "connection: close";
            if let Some(value) = header.strip_prefix("content-length: ") {
                length = value.parse().map_err(io::Error::other)?;
            }
        }
        let mut body = vec![0; length];
        connection.read_exact(&mut body)?;
        if !status.starts_with("HTTP/1.1 200 ") || body != b"ok" {
            return Err(io::Error::other(format!("{status}: {}", String::from_utf8_lossy(&body))));
        }
        if self.keeps && !last {
            self.connection = Some(connection);
        }
        Ok(())
    }
}

struct Load {
    answered: Arc<AtomicU64>,
    failed: Arc<Mutex<Vec<String>>>,
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let mut load = Self {
            answered: Arc::default(),
            failed: Arc::default(),
            over: Arc::default(),
            clients: Vec::new(),
        };
        for number in 0..2 * CLIENTS {
            let (answered, failed, over) =
                (Arc::clone(&load.answered), Arc::clone(&load.failed), Arc::clone(&load.over));
            let mut client = Client { address, keeps: number % 2 == 0, connection: None };
            load.clients.push(std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    match client.get() {
                        Ok(()) => {
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => failed.lock().unwrap().push(format!("keeps {}: {error}", client.keeps)),
                    }
                    // A pace that leaves a small machine room for the upgrade.
                    std::thread::sleep(Duration::from_millis(2));
                }
            }));
        }
        load
    }

    /// Waits until some more has been answered.
    fn goes_on(&self) {
        let goal = self.answered.load(Ordering::Relaxed) + REQUESTS_BETWEEN;
        until("requests are answered", || (self.answered.load(Ordering::Relaxed) >= goal).then_some(()));
        self.nothing_failed();
    }

    fn nothing_failed(&self) {
        let failed = std::mem::take(&mut *self.failed.lock().unwrap());
        assert_eq!(failed, Vec::<String>::new());
    }

    fn end(mut self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            client.join().unwrap();
        }
        self.nothing_failed();
        self.answered.load(Ordering::Relaxed)
    }
}

#[test]
fn three_upgrades_under_load_lose_no_request() {
    let mesh = Mesh::start(app());
    let socket = |service: &str| mesh.path(&format!("{service}.sock")).display().to_string();
    let sidecar = |service: &str| mesh.sidecar(service, &["--handover", &socket(service)]);
    let mut echo = sidecar("echo");
    let mut caller = sidecar("caller");
    let load = Load::start(mesh.call);
    load.goes_on();
    for service in ["caller", "echo", "caller"] {
        let old = if service == "echo" { &mut echo } else { &mut caller };
        let new = sidecar(service);
        let code = old.wait().code();
        assert_eq!(code, Some(0), "{service} drained:\n{}", old.log());
        *old = new;
        load.goes_on();
    }
    let answered = load.end();
    println!("{answered} requests answered through three upgrades, none failed");
    caller.signal("TERM");
    assert_eq!(caller.wait().code(), Some(0), "{}", caller.log());
    assert!(!mesh.path("caller.sock").exists(), "the hand-over socket is left behind");
}

#[test]
fn a_successor_that_dies_before_it_is_ready_changes_nothing() {
    let mesh = Mesh::start(app());
    let socket = mesh.path("caller.sock").display().to_string();
    let _echo = mesh.sidecar("echo", &[]);
    let mut caller = mesh.sidecar("caller", &["--handover", &socket]);
    let load = Load::start(mesh.call);
    load.goes_on();

    // Not the executable that the registration names: it gets the listeners, and never an identity.
    let args = ["sidecar", "--service", "caller", "--handover", &socket];
    let mut stillborn = mesh.spawn("palisade", &args);
    caller.until_logged(&["a successor has the listeners"]);
    load.goes_on();
    stillborn.signal("KILL");
    stillborn.wait();
    caller.until_logged(&["a successor did not take over"]);
    load.goes_on();

    // One that does not even get that far: what it reads is wrong.
    let args = ["sidecar", "--service", "nobody", "--handover", &socket];
    assert_eq!(mesh.program("caller", &args).output().unwrap().status.code(), Some(2));
    load.goes_on();

    // And then one that is as it should be.
    let _successor = mesh.sidecar("caller", &["--handover", &socket]);
    assert_eq!(caller.wait().code(), Some(0), "{}", caller.log());
    load.goes_on();
    load.end();
}

/// Sockets of the service manager: they stay open while the process is replaced, so that whoever connects
/// meanwhile waits and is not refused.
#[test]
fn sockets_of_the_service_manager_outlive_the_process() {
    let mesh = Mesh::start(app());
    let _echo = mesh.sidecar("echo", &[]);
    let sockets =
        [mesh.caller_inbound, mesh.caller_admin, mesh.call].map(|at| TcpListener::bind(at).unwrap());
    let start = |names: &str| {
        // A shell can move descriptors to where systemd puts them, and knows its own process id.
        let script = "exec 3<&0 4<&1 5<&2 0</dev/null 1>/dev/null 2>\"$LOG\"; \
                      LISTEN_PID=$$ LISTEN_FDS=3 exec ./caller sidecar --service caller";
        let mut command = Command::new("sh");
        let [inbound, admin, call] =
            [0, 1, 2].map(|index| Stdio::from(OwnedFd::from(sockets[index].try_clone().unwrap())));
        command.args(["-c", script]).env("LISTEN_FDNAMES", names).env("LOG", mesh.path("activated.log"));
        command.current_dir(mesh.path("")).stdin(inbound).stdout(admin).stderr(call).spawn().unwrap()
    };
    let names = "inbound:admin:outbound.echo";
    let load = Load::start(mesh.call);
    let mut first = start(names);
    load.goes_on();
    small::signal(first.id(), "TERM");
    let ended = until("the first ends", || first.try_wait().unwrap());
    assert_eq!(ended.code(), Some(0));
    let mut second = start(names);
    load.goes_on();
    load.end();
    small::signal(second.id(), "TERM");
    assert_eq!(second.wait().unwrap().code(), Some(0));

    let mut wrong = start("inbound:outbound.echo:admin");
    let ended = until("the wrong one ends", || wrong.try_wait().unwrap());
    let mut said = String::new();
    File::open(mesh.path("activated.log")).unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(ended.code(), Some(4), "{said}");
    assert!(said.contains("is to listen on") && said.contains("its socket `"), "{said}");
}
