//! `palisade demo`: the whole mesh and a bank on one machine, as separate processes under one
//! supervisor.
//!
//! | module | what it holds |
//! |---|---|
//! | [`start`] | what is started, with which secrets and in which order; read this first |
//! | [`plan`], [`layout`] | the bank as a mesh.toml; where the state directory keeps what |
//! | [`people`], [`private`], [`policies`] | the users, the secrets and the policies of the demo |
//! | [`attack`] | the attacks, each beside the same call done rightly |
//! | [`app`] | one of the bank's apps as a process |
//! | [`supervisor`] | starts processes in order, restarts them, ends them |
//! | [`state`] | the state directory: its permissions, its lock, leftovers of an earlier run |
//! | [`ports`] | free ports, the same ones after a restart |
//! | [`roles`] | a name of the binary for each role, so that attestation tells them apart |
//! | [`ready`] | the file that says where everything is |
//! | [`run`] | runs processes until somebody ends it, and tells of their deaths |
//! | [`progress`] | what is shown while it starts |

mod app;
mod attack;
mod layout;
mod people;
mod plan;
mod policies;
mod ports;
mod private;
mod progress;
mod ready;
mod roles;
mod run;
mod start;
mod state;
mod supervisor;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use identity::SystemClock;
use secrecy::SecretString;

use crate::Global;
use crate::cmd::config;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use layout::Layout;
use ready::Ready;

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(flatten)]
    start: StartArgs,
    #[command(subcommand)]
    what: Option<What>,
}

/// Starting the demo.
#[derive(Debug, clap::Args)]
struct StartArgs {
    /// Where everything is kept; the same directory brings the same bank back.
    /// Default: a directory in the temporary one, removed at the end.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Write where everything is, as JSON, once all of it is ready.
    #[arg(long, value_name = "FILE")]
    ready: Option<PathBuf>,
    /// Leave out what is heavy. Nothing is, so far: the bank keeps its books in an embedded store.
    #[arg(long)]
    light: bool,
    /// How long an identity is valid; short enough to watch it rotate.
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = humantime::parse_duration)]
    svid_ttl: Duration,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Attack the running demo, and say what stopped each attack.
    Attack {
        /// The file that the demo wrote once it was ready.
        #[arg(long, value_name = "FILE")]
        ready: Option<PathBuf>,
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print an access token for a user of the demo.
    Token {
        /// alice or bob.
        user: String,
        /// The file that the demo wrote once it was ready.
        #[arg(long, value_name = "FILE")]
        ready: Option<PathBuf>,
    },
    /// Run one of the bank's apps.
    #[command(hide = true)]
    App {
        /// web, accounts or payments.
        name: String,
        /// Where it keeps its data.
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
    },
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    match &args.what {
        None => start::run(&args.start, printer),
        Some(What::Attack { ready, json }) => attack::run(&ready_file(ready.as_deref()), *json, printer),
        Some(What::Token { user, ready }) => token(user, &ready_file(ready.as_deref()), printer),
        Some(What::App { name, data }) => app::run(&config::load(&global.config)?, name, data),
    }
}

/// The state directory of a demo that was told none: one a user, so that the other verbs find it.
fn default_state() -> PathBuf {
    std::env::temp_dir().join(format!("palisade-demo-{}", rustix::process::getuid().as_raw()))
}

fn ready_file(given: Option<&Path>) -> PathBuf {
    given.map_or_else(|| Layout::new(&default_state()).ready(), Path::to_owned)
}

/// Logs a user in and prints the access token.
fn token(user: &str, ready: &Path, printer: &Printer) -> Result<Exit, Failure> {
    let ready = Ready::read(ready)?;
    let Some(known) = ready.users.get(user) else {
        let names: Vec<&str> = ready.users.keys().map(String::as_str).collect();
        return Err(Failure::usage(format!("the demo knows no `{user}`"))
            .hint(format!("it knows {}", names.join(" and "))));
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    let password = SecretString::from(known.password.clone());
    let trust = start::trust(&ready.ca_bundle)?;
    let clock = SystemClock::shared();
    let tokens =
        runtime.block_on(people::tokens(&ready.idp, people::CLI_CLIENT, user, &password, trust, &clock))?;
    printer.data(&format!("{}\n", people::exposed(&tokens)))?;
    Ok(Exit::Ok)
}
