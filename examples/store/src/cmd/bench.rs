//! `palisade-store bench`: how much it does and how fast, beside others on the same machine at the same time.

mod etcd;
mod load;
mod ours;
mod peer;
mod postgres;
mod table;

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;

use self::{
    etcd::Etcd,
    load::{Work, measure},
    ours::{Ours, Rows, Waited},
    postgres::Postgres,
    table::Report,
};

/// What the figures of this store are under.
const OURS: &str = "store";
/// What those of another one are under.
const OTHER: &str = "store, elsewhere";

/// Measures the store on this machine: three nodes of its own on loopback, rows of 200 bytes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seconds for each kind of work with each number of clients, all rounds together.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    seconds: u64,
    /// How many clients ask at the same time. Everything is measured once for each number given.
    #[arg(long, value_name = "COUNT,…", value_delimiter = ',', default_value = "1,16,64")]
    clients: Vec<usize>,
    /// Other databases to measure on this machine for comparison. Each must be installed.
    #[arg(long, value_name = "NAME,…", value_enum, value_delimiter = ',')]
    beside: Vec<Peer>,
    /// Another store of ours that runs already and is empty, measured in the same turns: by number, 1=HOST:PORT,…, where
    /// it is behind a sidecar.
    #[arg(long, value_name = "[NUMBER=]HOST:PORT,…", value_delimiter = ',')]
    nodes: Vec<String>,
    /// Only these kinds of work, by parts of their names.
    #[arg(long, value_name = "PART,…", value_delimiter = ',')]
    only: Vec<String>,
    /// How often the databases take turns: in each round each is measured for its share of --seconds, so that what else
    /// the machine does meanwhile is the same for all.
    #[arg(long, value_name = "COUNT", default_value_t = 2)]
    rounds: u64,
    /// How often a leader is killed, to measure how long it takes until writes go on.
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    deaths: u32,
    /// By how much clocks can be wrong, as nodes are told: commits wait for up to twice as long.
    #[arg(long, value_name = "DURATION", default_value = "1ms", value_parser = humantime::parse_duration)]
    epsilon: Duration,
    /// Where everybody keeps what is theirs: the disk that is measured. Default: a temporary directory.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Where to leave what this store's nodes say: who led which split, what was cut, and what they were slow at.
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Write the figures as JSON too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is measured beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Peer {
    /// Three members.
    Etcd,
    /// One server, unreplicated, SERIALIZABLE.
    Postgres,
}

/// Everything that runs.
struct Systems {
    ours: Ours,
    other: Option<Arc<Rows>>,
    etcd: Option<Arc<Etcd>>,
    postgres: Option<Postgres>,
}

/// Runs it.
///
/// # Errors
///
/// When the store does not start or does not answer.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    tokio::runtime::Runtime::new().context("no runtime")?.block_on(bench(args))
}

async fn bench(args: Args) -> anyhow::Result<ExitCode> {
    let temporary = directory(args.state.as_deref())?;
    let mut report = Report::default();
    let systems = start(&args, temporary.path(), &mut report).await?;
    let wanted =
        |work: &Work| args.only.is_empty() || args.only.iter().any(|part| work.name().contains(part));
    for work in Work::ALL.into_iter().filter(wanted) {
        let before = systems.ours.waited().await?;
        for clients in &args.clients {
            eprintln!("{}, {clients} clients", work.name());
            for round in 0..args.rounds.max(1) {
                turn(&args, &systems, work, *clients, round, &mut report).await?;
            }
        }
        note_wait(&mut report, work, systems.ours.waited().await?.since(before));
    }
    recover(&args, &systems, &mut report).await?;
    report.print();
    if let Some(to) = &args.logs {
        systems.ours.leave_logs(to)?;
    }
    if let Some(file) = &args.json {
        let text = format!("{:#}\n", report.to_json());
        std::fs::write(file, text).with_context(|| format!("{} cannot be written", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A directory for this run, which others than its owner can go through: PostgreSQL does not run as root.
fn directory(given: Option<&Path>) -> anyhow::Result<tempfile::TempDir> {
    let made = match given {
        Some(path) => tempfile::tempdir_in(path),
        None => tempfile::tempdir(),
    };
    let made = made.context("no directory for what is measured")?;
    let through = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(made.path(), through).context("a directory's permissions")?;
    Ok(made)
}

async fn start(args: &Args, directory: &Path, report: &mut Report) -> anyhow::Result<Systems> {
    let most = args.clients.iter().copied().max().unwrap_or(1);
    let ours = Ours::start(directory, args.epsilon, most).await?;
    let other = match args.nodes.as_slice() {
        [] => None,
        nodes => Some(Arc::new(Rows::make(nodes, most).await.context("the store at --nodes")?)),
    };
    let mut systems = Systems { ours, other, etcd: None, postgres: None };
    for peer in &args.beside {
        let started = match peer {
            Peer::Etcd => Etcd::start(directory, most).await.map(|etcd| systems.etcd = Some(Arc::new(etcd))),
            Peer::Postgres => Postgres::start(directory).map(|postgres| systems.postgres = Some(postgres)),
        };
        if let Err(error) = started {
            report.left_out.push(format!("{error:#}"));
        }
    }
    Ok(systems)
}

/// One round of each.
async fn turn(
    args: &Args,
    systems: &Systems,
    work: Work,
    clients: usize,
    round: u64,
    report: &mut Report,
) -> anyhow::Result<()> {
    let time = Duration::from_secs(args.seconds) / u32::try_from(args.rounds.max(1)).unwrap_or(1);
    let ours = measure(&systems.ours.rows, work, clients, time, round).await?;
    report.add(work, clients, OURS, ours);
    if let Some(other) = &systems.other {
        let measured = measure(other, work, clients, time, round).await?;
        report.add(work, clients, OTHER, measured);
    }
    if let Some(etcd) = &systems.etcd {
        let measured = measure(etcd, work, clients, time, round).await?;
        report.add(work, clients, &format!("etcd {}", etcd.version), measured);
    }
    if let Some(postgres) = &systems.postgres
        && let Some(measured) = tokio::task::block_in_place(|| postgres.measure(work, clients, time))?
    {
        report.add(work, clients, &format!("PostgreSQL {}", postgres.version), measured);
    }
    Ok(())
}

fn note_wait(report: &mut Report, work: Work, waited: Waited) {
    if let Some(percent) = waited.hidden_percent() {
        report.hidden_percent.push((work.name(), percent));
    }
}

async fn recover(args: &Args, systems: &Systems, report: &mut Report) -> anyhow::Result<()> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for death in 1..=args.deaths {
        eprintln!("death of a leader, {death} of {}", args.deaths);
        ours.push(systems.ours.recover().await?.as_secs_f64());
        if let Some(etcd) = &systems.etcd {
            theirs.push(etcd.recover().await?.as_secs_f64());
        }
    }
    if !ours.is_empty() {
        report.recoveries.push((OURS.to_owned(), ours));
    }
    if let Some(etcd) = systems.etcd.as_ref().filter(|_| !theirs.is_empty()) {
        report.recoveries.push((format!("etcd {}", etcd.version), theirs));
    }
    Ok(())
}
