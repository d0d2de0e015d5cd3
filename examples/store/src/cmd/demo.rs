//! `palisade-store demo`: some nodes on this machine, each a process of its own.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, IsTerminal as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use store_client::{Client, proto};

use super::shell::{self, Ran};

/// The bound of the demo's clock: all of its nodes read the same one.
const EPSILON: Duration = Duration::from_millis(1);
/// More on one machine show nothing more.
const NODES_MAX: u64 = 9;
/// Until every node serves and every split has a leader.
const START: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// Until a node that was told to stop is killed.
const STOP: Duration = Duration::from_secs(8);

/// What `palisade-store demo` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=NODES_MAX))]
    nodes: u64,
    /// Where the nodes keep what they have. Default: a directory that goes with the demo.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// A file to write when all nodes serve: their addresses and processes, as JSON.
    #[arg(long, value_name = "FILE")]
    ready: Option<PathBuf>,
}

struct Node {
    number: u64,
    address: String,
    child: Child,
    log: PathBuf,
}

/// The nodes, which end with it.
struct Nodes(Vec<Node>);

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let temporary = match args.state {
        Some(_) => None,
        None => Some(tempfile::tempdir().context("no directory for the nodes")?),
    };
    let state = match (&args.state, &temporary) {
        (Some(state), _) => state.as_path(),
        (None, Some(temporary)) => temporary.path(),
        (None, None) => anyhow::bail!("no directory for the nodes"),
    };
    // The kernel ends children with the thread that started them, and this one lives as long as the demo.
    let mut nodes = Nodes::start(args.nodes, state)?;
    let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
    let code = runtime.block_on(async {
        tokio::select! {
            ran = attend(&mut nodes, args.ready.as_deref()) => ran,
            stopped = super::told_to_stop() => stopped.map(|()| ExitCode::SUCCESS),
        }
    });
    // A shell may still wait for a line.
    runtime.shutdown_background();
    nodes.stop();
    code
}

/// Waits until the nodes serve, then for the shell or for ever.
async fn attend(nodes: &mut Nodes, ready: Option<&Path>) -> anyhow::Result<ExitCode> {
    let client = Client::connect(nodes.0.iter().map(|node| node.address.clone()))?;
    let splits = nodes.serve(&client).await?;
    nodes.describe(&splits);
    if let Some(ready) = ready {
        nodes.write(ready)?;
    }
    if is_attended() {
        return shell::attend(client).await;
    }
    if !io::stdin().is_terminal() {
        match shell::run_commands(client).await? {
            Ran::Nothing => {}
            Ran::All => return Ok(ExitCode::SUCCESS),
            Ran::Failed => return Ok(ExitCode::FAILURE),
        }
    }
    // Nobody says anything: until a signal does.
    std::future::pending().await
}

/// Whether somebody sits before the terminal: a job in the background must not ask it.
fn is_attended() -> bool {
    let stdin = io::stdin();
    stdin.is_terminal()
        && rustix::termios::tcgetpgrp(&stdin).is_ok_and(|group| group == rustix::process::getpgrp())
}

impl Nodes {
    fn start(count: u64, state: &Path) -> anyhow::Result<Self> {
        let free = super::free_addresses(usize::try_from(count)?)?;
        let addresses: BTreeMap<_, _> = (1..=count).zip(free.iter().map(ToString::to_string)).collect();
        let all: Vec<_> = addresses.iter().map(|(number, address)| format!("{number}={address}")).collect();
        let program = std::env::current_exe().context("this program is not to be found")?;
        let mut nodes = Self(Vec::new());
        for (number, address) in addresses {
            let home = state.join(format!("node-{number}"));
            std::fs::create_dir_all(&home).with_context(|| format!("{} cannot be made", home.display()))?;
            let log = state.join(format!("node-{number}.log"));
            let output = File::create(&log).with_context(|| format!("{} cannot be made", log.display()))?;
            let ready = state.join(format!("node-{number}.ready"));
            remove_old(&ready)?;
            let child = Command::new(&program)
                .arg("node")
                .args(["--id", &number.to_string(), "--nodes", &all.join(",")])
                .arg("--epsilon")
                .arg(humantime::format_duration(EPSILON).to_string())
                .arg("--state")
                .arg(&home)
                .arg("--ready")
                .arg(&ready)
                .args(["--supervised-by", &std::process::id().to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(output)
                // What is typed to stop the shell's command is not for the nodes.
                .process_group(0)
                .spawn()
                .context("a node cannot be started")?;
            nodes.0.push(Node { number, address, child, log });
        }
        Ok(nodes)
    }

    /// When every node serves and every split has a leader.
    async fn serve(&mut self, client: &Client) -> anyhow::Result<proto::ListSplitsResponse> {
        let deadline = Instant::now() + START;
        loop {
            for node in &mut self.0 {
                if let Some(status) = node.child.try_wait().context("a node cannot be waited for")? {
                    anyhow::bail!("node {} has ended, {status}: see {}", node.number, node.log.display());
                }
            }
            if let Some(splits) = self.whole(client).await {
                return Ok(splits);
            }
            anyhow::ensure!(Instant::now() < deadline, "the nodes do not serve yet; see {}", self.logs());
            tokio::time::sleep(POLL).await;
        }
    }

    async fn whole(&self, client: &Client) -> Option<proto::ListSplitsResponse> {
        for node in &self.0 {
            client.status(&node.address).await.ok()?;
        }
        let splits = client.splits().await.ok()?;
        let led = !splits.splits.is_empty() && splits.splits.iter().all(|split| split.leader != 0);
        led.then_some(splits)
    }

    fn describe(&self, splits: &proto::ListSplitsResponse) {
        for node in &self.0 {
            println!("node {} at {}, process {}", node.number, node.address, node.child.id());
        }
        println!("their logs: {}", self.logs());
        for split in &splits.splits {
            println!("split {} is led by node {}", split.id, split.leader);
        }
        println!(
            "their clocks are taken to be wrong by at most {EPSILON:?}: they all read this machine's, \
             and nobody vouches for more"
        );
    }

    fn logs(&self) -> String {
        self.0.iter().map(|node| node.log.display().to_string()).collect::<Vec<_>>().join(" ")
    }

    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let node = |node: &Node| serde_json::json!({ "addr": node.address, "pid": node.child.id() });
        let nodes: Vec<_> = self.0.iter().map(node).collect();
        let told = serde_json::json!({ "nodes": nodes, "epsilon_ns": EPSILON.as_nanos() as u64 });
        super::write_whole(path, told.to_string().as_bytes())
    }

    /// Tells all to stop, then waits for each.
    fn stop(&mut self) {
        for node in &mut self.0 {
            // One that has ended is not there to be told, and its number may be somebody else's by now.
            if matches!(node.child.try_wait(), Ok(None))
                && let Some(pid) = i32::try_from(node.child.id()).ok().and_then(Pid::from_raw)
            {
                let _ended = kill_process(pid, Signal::TERM);
            }
        }
        let deadline = Instant::now() + STOP;
        for node in &mut self.0 {
            while let Ok(None) = node.child.try_wait() {
                if Instant::now() >= deadline {
                    let _ended = node.child.kill();
                    let _reaped = node.child.wait();
                    break;
                }
                std::thread::sleep(POLL);
            }
        }
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.stop();
    }
}

fn remove_old(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", path.display()))
        }
        _ => Ok(()),
    }
}
