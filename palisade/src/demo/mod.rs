//! `palisade demo`: the whole mesh and a bank on one machine, as separate processes under one
//! supervisor.
//!
//! | module | what it holds |
//! |---|---|
//! | [`supervisor`] | starts processes in order, restarts them, ends them |
//! | [`state`] | the state directory: its permissions, its lock, leftovers of an earlier run |
//! | [`ports`] | free ports, the same ones after a restart |
//! | [`roles`] | a name of the binary for each role, so that attestation tells them apart |
//! | [`ready`] | the file that says where everything is |
//! | [`run`] | runs processes until somebody ends it, and tells of their deaths |
//! | [`progress`] | what is shown while it starts |

mod ports;
mod progress;
mod ready;
mod roles;
mod run;
mod state;
mod supervisor;

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

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
    /// Default: a fresh directory, removed at the end.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Write where everything is, as JSON, once all of it is ready.
    #[arg(long, value_name = "FILE")]
    ready: Option<PathBuf>,
    /// Leave out what is heavy.
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
}
