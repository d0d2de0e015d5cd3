//! Two hosts in network namespaces, joined by a cable, and what talks in them.

#![allow(dead_code, reason = "not every test program that shares this file needs all of it")]

use std::fs::File;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use sidecar::capture::{AcceptError, InboundListener, OutboundListener};
use tokio::io::AsyncWriteExt as _;

/// Bounds a hang: everything here is on one machine.
const DEADLINE: Duration = Duration::from_secs(60);
const DEADLINE_SECONDS: &str = "60";

/// Why there can be no namespaces here.
pub(crate) fn unavailable() -> Option<&'static str> {
    let has = |program: &str| Command::new(program).arg("-V").output().is_ok();
    match () {
        () if !rustix::process::geteuid().is_root() => Some("network namespaces take root"),
        () if !has("ip") => Some("`ip` is not installed (iproute2)"),
        () if !has("nft") => Some("`nft` is not installed (nftables)"),
        () => None,
    }
}

/// A host with an address of each family, and the cable to the other one.
pub(crate) struct Host {
    name: String,
    pub(crate) v4: &'static str,
    pub(crate) v6: &'static str,
}

/// Two of them.
pub(crate) fn hosts() -> (Host, Host) {
    let left = Host::new("l", "10.99.0.1", "fd99::1");
    let right = Host::new("r", "10.99.0.2", "fd99::2");
    ip(&[
        "link",
        "add",
        "eth0",
        "netns",
        &left.name,
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        &right.name,
    ]);
    for host in [&left, &right] {
        ip(&["-n", &host.name, "address", "add", &format!("{}/24", host.v4), "dev", "eth0"]);
        // Without duplicate address detection the address is there at once.
        ip(&["-n", &host.name, "address", "add", &format!("{}/64", host.v6), "dev", "eth0", "nodad"]);
        for device in ["lo", "eth0"] {
            ip(&["-n", &host.name, "link", "set", device, "up"]);
        }
    }
    (left, right)
}

#[track_caller]
pub(crate) fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Host {
    fn new(side: &str, v4: &'static str, v6: &'static str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let host = Self { name: format!("palisade-{}-{count}{side}", std::process::id()), v4, v6 };
        ip(&["netns", "add", &host.name]);
        host
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// This host's address of each family, with `port`.
    pub(crate) fn at(&self, port: u16) -> [SocketAddr; 2] {
        [self.v4, self.v6].map(|address| SocketAddr::new(address.parse().unwrap(), port))
    }

    /// Runs `work` on this host. Sockets that it makes stay on this host.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let working = scope.spawn(|| {
                enter(&self.name);
                work()
            });
            working.join().unwrap()
        })
    }

    /// What is answered at `to` when this user dials it: `refused` where nobody answers.
    pub(crate) fn dial(&self, uid: u32, to: SocketAddr) -> String {
        let script = "exec 3<>/dev/tcp/$0/$1 && timeout $2 cat <&3";
        let (address, port) = (to.ip().to_string(), to.port().to_string());
        let output = self
            .command("setpriv", &["--reuid", &uid.to_string(), "--clear-groups"])
            .args(["bash", "-c", script, &address, &port, DEADLINE_SECONDS])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        if said.is_empty() {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success() || why.is_empty(), "{why}");
            // Reset after it was accepted, or before.
            let reset = why.is_empty() || why.contains("refused") || why.contains("reset");
            assert!(reset, "{to}: {why}");
            return "refused".to_owned();
        }
        said
    }

    /// A program to be run on this host.
    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name)).arg(program).args(args);
        command
    }

    /// Runs a program on this host and gives its standard output.
    #[track_caller]
    pub(crate) fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.command(program, args).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// All that `on` can change.
    pub(crate) fn state(&self) -> String {
        let rules = self.run("nft", &["list", "ruleset"]);
        rules + &self.run("ip", &["-4", "rule"]) + &self.run("ip", &["-6", "rule"])
    }

    /// Listens at `address` and says `direct` and who dialled, to everybody.
    pub(crate) fn serve(&self, address: &str) -> Served {
        let listener = self.within(|| TcpListener::bind(address).unwrap());
        let count = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&count);
        std::thread::spawn(move || {
            while let Ok((mut stream, peer)) = listener.accept() {
                counted.fetch_add(1, Ordering::SeqCst);
                let _gone = write!(stream, "direct from {}", peer.ip().to_canonical()).is_err();
            }
        });
        Served(count)
    }

    /// `palisade sidecar capture …` for this host.
    pub(crate) fn capture(&self, args: &[&str]) -> Output {
        palisade(&self.name, args).output().unwrap()
    }

    /// The same, which has to work; gives what it says.
    #[track_caller]
    pub(crate) fn captured(&self, args: &[&str]) -> String {
        let output = self.capture(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        String::from_utf8(output.stdout).unwrap() + &said
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _gone = Command::new("ip").args(["netns", "delete", &self.name]).status().is_err();
    }
}

/// The command line, for the host of this name.
pub(crate) fn palisade(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palisade"));
    command.args(["sidecar", "capture"]).args(args).args(["--netns", name]);
    command
}

/// A listener of nobody's sidecar, and how many reached it.
pub(crate) struct Served(Arc<AtomicU32>);

impl Served {
    pub(crate) fn count(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

pub(crate) fn enter(name: &str) {
    let namespace = File::open(Path::new("/run/netns").join(name)).unwrap();
    setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
}

/// Which listener a stand-in has.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Way {
    Out,
    In,
}

/// The capture half of a sidecar alone: it says whom each connection was meant for and where it comes from.
pub(crate) struct StandIn {
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    refused: Arc<Mutex<Vec<&'static str>>>,
}

impl StandIn {
    /// Listens on `host` when this returns.
    pub(crate) fn start(host: &Host, way: Way, port: u16) -> Self {
        let (stop, mut stopped) = tokio::sync::oneshot::channel();
        let (ready, is_ready) = mpsc::channel();
        let refused = Arc::new(Mutex::new(Vec::new()));
        let (name, refusals) = (host.name.clone(), Arc::clone(&refused));
        let serve = async move {
            let (mut out, mut inward) = (None, None);
            match way {
                Way::Out => out = Some(OutboundListener::bind(port).unwrap()),
                Way::In => inward = Some(InboundListener::bind(port).unwrap()),
            }
            ready.send(()).unwrap();
            loop {
                let accepted = tokio::select! {
                    _ = &mut stopped => return,
                    accepted = async {
                        match (&out, &inward) {
                            (Some(out), _) => out.accept().await,
                            (_, Some(inward)) => inward.accept().await,
                            (None, None) => unreachable!(),
                        }
                    } => accepted,
                };
                match accepted {
                    Ok(mut captured) => {
                        let said = format!("{way:?} {} from {}", captured.destination, captured.source.ip());
                        let _gone = captured.stream.write_all(said.as_bytes()).await.is_err();
                    }
                    Err(AcceptError::Refused { refused, .. }) => {
                        refusals.lock().unwrap().push(refused.rule())
                    }
                    Err(AcceptError::Accept(error)) => panic!("{error}"),
                }
            }
        };
        let thread = std::thread::spawn(move || {
            enter(&name);
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(serve);
        });
        is_ready.recv_timeout(DEADLINE).unwrap();
        Self { stop: Some(stop), thread: Some(thread), refused }
    }

    /// The rules by which connections were refused so far.
    pub(crate) fn refused(&self) -> Vec<&'static str> {
        self.refused.lock().unwrap().clone()
    }
}

impl Drop for StandIn {
    /// Its listeners are closed when this returns.
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join().is_err();
        }
    }
}
