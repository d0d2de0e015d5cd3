//! `palisade-store node`.

use std::{
    collections::BTreeMap, net::TcpListener, num::NonZeroUsize, path::PathBuf, process::ExitCode, sync::Arc,
    thread, time::Duration,
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use store::{
    serve,
    truetime::{CLOCK_BOUND_PATH, ClockBound, Fixed, Kernel, TrueTime},
};
use tokio::runtime::{Builder, Runtime};

/// Above this every commit waits longer than anybody would call a store quick.
const EPSILON_MAX: Duration = Duration::from_millis(250);

/// What `palisade-store node` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// This node's number, one of those in --nodes.
    #[arg(long, value_name = "NUMBER")]
    id: u64,
    /// Where all nodes can be asked, this one included: 1=127.0.0.1:7001,2=127.0.0.1:7002,…
    #[arg(long, value_name = "NUMBER=HOST:PORT,…", value_delimiter = ',', required = true, value_parser = address)]
    nodes: Vec<(u64, String)>,
    /// Where to listen, if not where the others ask.
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// The data directory; empty for a new node.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// By how much this machine's clock can be wrong, for which you vouch. Default: what the clock-bound daemon vouches
    /// for, where there is one, or else the kernel, which an NTP client must tell it.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    epsilon: Option<Duration>,
    /// Memory that the clock-bound daemon shares, to be asked and nothing else. Default: where the daemon has it, if it is
    /// there when the node starts.
    #[arg(long, value_name = "FILE", conflicts_with = "epsilon")]
    clock_bound: Option<PathBuf>,
    /// How long old versions of rows are kept after they were overwritten or deleted: so far back snapshots can be asked
    /// for.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = humantime::parse_duration)]
    keep: Duration,
    /// Threads that take requests and send answers, beside the one that is the node. Default: one for each other processor.
    #[arg(long, value_name = "COUNT")]
    workers: Option<NonZeroUsize>,
    /// A file to write when the node serves.
    #[arg(long, value_name = "FILE")]
    ready: Option<PathBuf>,
    /// End when this parent process ends.
    #[arg(long, hide = true, value_name = "PID")]
    supervised_by: Option<u32>,
}

fn address(text: &str) -> Result<(u64, String), String> {
    let parsed =
        text.split_once('=').and_then(|(number, address)| Some((number.parse().ok()?, address.to_owned())));
    parsed.ok_or_else(|| "it is NUMBER=HOST:PORT".to_owned())
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    if let Some(parent) = args.supervised_by {
        end_with(parent)?;
    }
    super::log("info");
    let mut nodes = BTreeMap::new();
    for (number, address) in args.nodes {
        anyhow::ensure!(nodes.insert(number, address).is_none(), "--nodes: node {number} is there twice");
    }
    let own = nodes.get(&args.id).with_context(|| format!("--nodes: there is no node {}", args.id))?;
    let listen = args.listen.unwrap_or_else(|| own.clone());
    let listener = TcpListener::bind(&listen).with_context(|| format!("cannot listen at {listen}"))?;
    if let Some(epsilon) = args.epsilon.filter(|epsilon| *epsilon > EPSILON_MAX) {
        anyhow::bail!(
            "--epsilon {epsilon:?}: every commit would wait twice as long; {EPSILON_MAX:?} is the most"
        );
    }
    let shared = PathBuf::from(CLOCK_BOUND_PATH);
    let daemon = args.clock_bound.or_else(|| shared.exists().then_some(shared));
    let clock: Arc<dyn TrueTime> = match (args.epsilon, daemon) {
        (Some(epsilon), _) => Arc::new(Fixed::new(epsilon)),
        (None, Some(path)) => Arc::new(ClockBound::new(path, EPSILON_MAX)),
        (None, None) => Arc::new(Kernel::new(EPSILON_MAX)),
    };
    let options = serve::Options {
        number: args.id,
        nodes,
        state: args.state,
        clock,
        keep: args.keep,
        seed: fastrand::u64(..),
    };

    let runtime = runtime(args.workers).context("no runtime")?;
    let result = runtime.block_on(async {
        let mut unwritten = Ok(());
        let ready = |node: store::lease::NodeId, address: std::net::SocketAddr| {
            if let Some(path) = &args.ready {
                let told = serde_json::json!({ "node": node.0, "addr": address.to_string() });
                unwritten = super::write_whole(path, told.to_string().as_bytes());
            }
        };
        let stop = async {
            if let Err(error) = super::told_to_stop().await {
                tracing::error!(%error, "signals cannot be heard");
            }
        };
        serve::serve(listener, options, ready, stop).await?;
        unwritten
    });
    // What is still under way would have been cut off by a crash as well.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// A single thread wakes nobody else, and takes all that it can before it sends: a tenth less processor time a commit than
/// with two (bench/RESULTS.md).
fn runtime(workers: Option<NonZeroUsize>) -> std::io::Result<Runtime> {
    let others = || thread::available_parallelism().map_or(1, |processors| processors.get() - 1);
    match workers.map_or_else(others, NonZeroUsize::get) {
        0 | 1 => Builder::new_current_thread().enable_all().build(),
        workers => Builder::new_multi_thread().worker_threads(workers).enable_all().build(),
    }
}

/// Has the kernel stop this process when the one that started it ends.
fn end_with(parent: u32) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM)).context("the parent's end cannot be heard of")?;
    // A parent that died before the line above sends no signal any more.
    let now = getppid().map(Pid::as_raw_nonzero).map(|pid| pid.get().unsigned_abs());
    anyhow::ensure!(now == Some(parent), "the parent is gone");
    Ok(())
}
