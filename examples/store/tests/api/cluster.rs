//! Nodes as processes of their own.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use store_client::{Client, proto};
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_palisade-store");
/// Bounds a hang, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// Below those that the kernel gives to outgoing connections.
const PORT_FIRST: u32 = 10_000;
const PORTS: u32 = 22_000;
/// Tests of several processes begin so far apart.
const PORTS_APART: u32 = 97;

/// A universe, each of whose nodes can be stopped, killed and robbed.
pub(crate) struct Cluster {
    home: TempDir,
    addresses: Vec<String>,
    epsilon: bool,
    nodes: Vec<Option<Child>>,
}

impl Cluster {
    /// `count` nodes that serve, the first split led by one of them.
    pub(crate) async fn start(count: usize) -> Self {
        let mut cluster = Self::stopped(count, true);
        for number in 1..=count {
            cluster.start_node(number);
        }
        for number in 1..=count {
            let address = cluster.address(number).to_owned();
            cluster.until(async |client| client.status(&address).await.ok()).await;
        }
        cluster.led().await;
        cluster
    }

    /// Nodes that are not there yet.
    pub(crate) fn stopped(count: usize, epsilon: bool) -> Self {
        let addresses = (0..count).map(|_| free_address()).collect();
        let nodes = (0..count).map(|_| None).collect();
        Self { home: tempfile::tempdir().unwrap(), addresses, epsilon, nodes }
    }

    pub(crate) fn start_node(&mut self, number: usize) {
        let all: Vec<_> = self
            .addresses
            .iter()
            .enumerate()
            .map(|(index, address)| format!("{}={address}", index + 1))
            .collect();
        let log = fs::File::options().create(true).append(true).open(self.log(number)).unwrap();
        let mut command = Command::new(PROGRAM);
        command
            .args(["node", "--id", &number.to_string(), "--nodes", &all.join(",")])
            .arg("--state")
            .arg(self.state(number))
            // They end with the thread that runs the test, however that ends.
            .args(["--supervised-by", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stderr(log);
        if self.epsilon {
            command.args(["--epsilon", "1ms", "--keep", "2s"]);
        }
        self.nodes[number - 1] = Some(command.spawn().unwrap());
    }

    pub(crate) fn state(&self, number: usize) -> std::path::PathBuf {
        self.home.path().join(format!("node-{number}"))
    }

    fn log(&self, number: usize) -> std::path::PathBuf {
        self.home.path().join(format!("node-{number}.log"))
    }

    pub(crate) fn said(&self, number: usize) -> String {
        fs::read_to_string(self.log(number)).unwrap_or_default()
    }

    pub(crate) fn address(&self, number: usize) -> &str {
        &self.addresses[number - 1]
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.addresses.iter().cloned()).unwrap()
    }

    /// Ends a node without a word.
    pub(crate) fn kill(&mut self, number: usize) {
        let mut child = self.nodes[number - 1].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Asks a node to end, and gives how it did.
    pub(crate) fn stop(&mut self, number: usize) -> std::process::ExitStatus {
        let mut child = self.nodes[number - 1].take().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        child.wait().unwrap()
    }

    /// How a node that must not go on ends.
    pub(crate) fn ends(&mut self, number: usize) -> std::process::ExitStatus {
        let mut child = self.nodes[number - 1].take().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match child.try_wait().unwrap() {
                Some(status) => return status,
                None if Instant::now() < deadline => std::thread::sleep(POLL),
                None => {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    panic!("node {number} goes on");
                }
            }
        }
    }

    /// When every split has a leader.
    pub(crate) async fn led(&self) -> Vec<proto::SplitInfo> {
        self.until(async |client| {
            let splits = client.splits().await.ok()?.splits;
            let led = !splits.is_empty() && splits.iter().all(|split| split.leader != 0);
            led.then_some(splits)
        })
        .await
    }

    /// When `found` finds something.
    pub(crate) async fn until<T>(&self, mut found: impl AsyncFnMut(&Client) -> Option<T>) -> T {
        let client = self.client();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = found(&client).await {
                return found;
            }
            assert!(Instant::now() < deadline, "{}", self.all_said());
            tokio::time::sleep(POLL).await;
        }
    }

    fn all_said(&self) -> String {
        (1..=self.nodes.len()).map(|number| format!("node {number}:\n{}", self.said(number))).collect()
    }

    /// A shell that is told `lines`.
    pub(crate) fn shell(&self, lines: &str) -> Output {
        piped(Command::new(PROGRAM).args(["shell", "--nodes", &self.addresses.join(",")]), lines)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.all_said());
        }
        for child in self.nodes.iter_mut().flatten() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// An address that nobody has, and that no outgoing connection takes while a node is away.
fn free_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id().wrapping_mul(PORTS_APART);
    let ports = std::iter::repeat_with(|| {
        PORT_FIRST + begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS
    });
    let mut addresses = ports.map(|port| format!("127.0.0.1:{port}"));
    addresses.find(|address| TcpListener::bind(address).is_ok()).unwrap()
}

/// What a command says that is told `input`.
pub(crate) fn piped(command: &mut Command, input: &str) -> Output {
    use std::io::Write as _;
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// When `path` is there.
pub(crate) fn await_file(path: &Path) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match fs::read_to_string(path) {
            Ok(text) => return text,
            Err(_) => assert!(Instant::now() < deadline, "{} never came", path.display()),
        }
        std::thread::sleep(POLL);
    }
}

/// Says why a test checks nothing here, past libtest's capture of output, so that it is read.
pub(crate) fn skip(why: &str) {
    use std::io::Write as _;
    writeln!(std::io::stderr(), "skipped: {why}").ok();
    assert!(std::env::var_os("PALISADE_TESTS_MUST_NOT_SKIP").is_none(), "a test may not skip here: {why}");
}
