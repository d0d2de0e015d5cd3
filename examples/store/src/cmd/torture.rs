//! `palisade-store torture`: nodes as processes, clients that write down what they see, and everything that goes wrong
//! with processes, networks, clocks and disks meanwhile.

mod admin;
mod clock;
pub(crate) mod cluster;
mod disk;
mod healing;
mod history;
mod nemesis;
mod network;
pub(crate) mod random;
pub(crate) mod rows;
mod session;
mod setting;
mod skew;
mod summary;
mod transactions;
mod workload;

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::time::{Instant, sleep};

use self::{
    admin::Admin,
    clock::ClientClock,
    cluster::Cluster,
    healing::{end, heal, wait_until_all_serve},
    history::History,
    nemesis::{Fault, Nemesis},
    session::Session,
    setting::Setting,
    skew::Skew,
    summary::Summary,
    workload::Shared,
};

/// How long nodes have to serve: at the start, and again when all is healed.
const SERVE: Duration = Duration::from_secs(60);
/// Acknowledged transactions a second that are the least: under every fault at once, a run with fewer tests nothing.
const OK_A_SECOND: u64 = 10;

/// Starts nodes, lets clients work and things go wrong, and writes down what the clients saw.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Decides everything that chance decides, but not what the machine does meanwhile.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long things go wrong.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where what clients saw is written, one JSON object a line and attempt.
    #[arg(long, value_name = "FILE")]
    history: PathBuf,
    /// Nodes. With `move` there is one more, for replicas to move to.
    #[arg(long, default_value_t = 3)]
    nodes: u64,
    /// Clients, each with one transaction at a time.
    #[arg(long, default_value_t = 12)]
    clients: u64,
    /// What goes wrong. Partitions and full disks take root.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "kill,stop,partition,clock,disk,lead,split,merge,move"
    )]
    faults: Vec<Fault>,
    /// By how much clocks are wrong at most, as nodes are told.
    #[arg(long, default_value = "1ms", value_parser = humantime::parse_duration)]
    epsilon: Duration,
    /// By how much `clock` makes them wrong: beyond what nodes are told, a checker must find fault with the history.
    #[arg(long, value_enum, default_value_t = Skew::Within)]
    skew: Skew,
    /// Where nodes keep what is theirs, and what they say. Default: a temporary directory, removed if all is well.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Acknowledged transactions below which nothing was tested. Default: 10 a second.
    #[arg(long)]
    min_ok: Option<u64>,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs it.
///
/// # Errors
///
/// When nodes do not start, or do not serve again once all is healed.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    tokio::runtime::Runtime::new().context("no runtime")?.block_on(async {
        tokio::select! {
            ended = torture(args) => ended,
            told = super::told_to_stop() => told.and(Err(anyhow::anyhow!("stopped in the middle"))),
        }
    })
}

async fn torture(args: Args) -> anyhow::Result<ExitCode> {
    let clock = ClientClock::start();
    let history = History::create(&args.history, clock)
        .with_context(|| format!("{} cannot be written", args.history.display()))?;
    let setting = Setting::prepare(&args)?;
    let cluster = Arc::new(Cluster::new(setting.places(), args.epsilon)?);
    cluster.start_first()?;
    let shared = Arc::new(Shared::new(history, clock));
    let session = Session::connect(&cluster.addresses(), args.seed)?;
    begin(&session, &shared, &cluster).await?;

    let (faults, targets, state) =
        setting.into_targets(Arc::clone(&cluster), Admin::new(session.client().clone()));
    let nemesis = Arc::new(Nemesis::new(targets, faults, clock));
    let mut clients = workload::run(&cluster.addresses(), &shared, args.clients, args.seed)?;
    let mut hands = nemesis.run(args.seed);
    let mut watch = nemesis.keep_watch();
    sleep(Duration::from_secs(args.seconds)).await;
    nemesis.stop();
    let ended = end(&mut hands, "a fault").await;
    nemesis.heal();
    let healed = heal(&session, &shared, &cluster, &mut clients).await;
    watch.shutdown().await;
    nemesis.bury_all();
    shared.history.finish().context("the history is not whole")?;
    let summary = Summary::gather(&args, &shared, &nemesis, session.client(), &cluster).await;
    summary.print(args.json);
    let well = judge(&args, &summary, ended.and(healed));
    // Nodes go first: what they stand on cannot be taken away from under them.
    for id in cluster.ids() {
        cluster.kill(id)?;
    }
    if !well {
        summary.print_splits();
        eprintln!("what the nodes said and kept is in {}", state.keep().display());
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits for the nodes, declares the tables, writes the first rows, and cuts them apart.
async fn begin(session: &Session, shared: &Shared, cluster: &Cluster) -> anyhow::Result<()> {
    wait_until_all_serve(session, cluster, false).await?;
    let began = Instant::now();
    for (table, parts) in rows::TABLES {
        let kind = |number: &bool| if *number { store_client::Kind::Int } else { store_client::Kind::Text };
        let names = ["n", "m"];
        let key: Vec<_> = names.into_iter().zip(parts.iter().map(kind)).collect();
        while let Err(error) = session.client().create_table(table, &key).await {
            if began.elapsed() > SERVE {
                return Err(error).with_context(|| format!("table {table} is not declared"));
            }
            sleep(Duration::from_millis(200)).await;
        }
    }
    if cluster.has_others() {
        cluster.start_others()?;
        wait_until_all_serve(session, cluster, false).await?;
    }
    workload::set_up(session, shared).await?;
    let cuts = [rows::account(rows::ACCOUNTS / 2), rows::list(0, 0), rows::pair(0, 'b'), rows::register(0)];
    if let Err(error) = Admin::new(session.client().clone()).cut_at(&cuts).await {
        eprintln!("all rows are in one split: {error:#}");
    }
    Ok(())
}

/// Says what is not well, and whether nothing is.
fn judge(args: &Args, summary: &Summary, healed: anyhow::Result<()>) -> bool {
    let least = args.min_ok.unwrap_or(args.seconds.saturating_mul(OK_A_SECOND));
    let mut ills = summary.deaths.clone();
    if let Err(error) = healed {
        ills.push(format!("{error:#}"));
    }
    if summary.ok() < least {
        ills.push(format!("{} acknowledged transactions are fewer than {least}", summary.ok()));
    }
    for ill in &ills {
        eprintln!("not well: {ill}");
    }
    ills.is_empty()
}
