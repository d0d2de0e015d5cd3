//! `palisade`: a zero-trust service mesh in one binary. This file is its table of contents.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cmd;
mod credentials;
mod decisions;
mod demo;
mod discovery;
mod failure;
mod handover;
mod listen;
mod logging;
mod mesh;
mod notify;
mod policies;
mod printer;
mod readiness;
mod relations;
mod repository;
mod rlimits;
mod serve;
mod standalone;
mod supervised;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rustix::process::Signal;

use crate::failure::{Exit, Failure};
use crate::printer::Printer;

/// A proxy makes and frees a few dozen small things a request.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Zero-trust service mesh: identity, mTLS and policy beside every service.
#[derive(Debug, Parser)]
#[command(name = "palisade", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// The file that describes the mesh where the command line names no other.
const MESH_TOML: &str = "mesh.toml";

/// What every verb takes.
#[derive(Debug, clap::Args)]
struct Global {
    /// The file that describes the mesh.
    #[arg(long, global = true, value_name = "FILE", default_value = MESH_TOML)]
    config: PathBuf,
    /// The directory of secrets, one file each. Default: $CREDENTIALS_DIRECTORY.
    #[arg(long, global = true, value_name = "DIR")]
    credentials: Option<PathBuf>,
    /// Which log lines are written, in the manner of RUST_LOG. Default: [telemetry] log.
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    /// End when this parent process ends.
    #[arg(long, global = true, hide = true, value_name = "PID")]
    supervised_by: Option<u32>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the certificate authority: registrations, decisions, the console.
    Control,
    /// Run the agent of this host, which gives its services their identities.
    Agent,
    /// Run the proxy beside one service.
    Sidecar(cmd::sidecar::Args),
    /// Run a command beside its sidecar: ready before it starts, gone after it ends.
    Run(cmd::run::Args),
    /// Run the front door for browsers and API clients.
    Gateway,
    /// Run the vault.
    Vault,
    /// Run the embedded OpenID Connect provider.
    Idp,
    /// Check or show mesh.toml, or print its schema.
    Config(cmd::config::Args),
    /// Check, test, format and show the policies.
    Policy(cmd::policy::Args),
    /// Write, delete, show and watch what is true of a service's objects.
    Relations(cmd::relations::Args),
    /// Explain a decision by its receipt, or what would be decided about a request.
    Explain(cmd::explain::Args),
    /// Make what a new host joins with.
    Token(cmd::token::Args),
    /// Bring up the whole mesh with a bank behind it, or attack it.
    Demo(demo::Args),
    /// Watch the requests of one sidecar as they end.
    Tap(cmd::tap::Args),
    /// Fetch this process's own identity from the agent.
    Id(cmd::id::Args),
    /// Show hosts, identities and the authority.
    Status(cmd::status::Args),
    /// Become a command, bound to the life of the `palisade run` that started it.
    #[command(hide = true)]
    StartCommand(cmd::run::StartArgs),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return printer::usage(&error),
    };
    if let Some(parent) = cli.global.supervised_by
        && supervised::end_with(parent, Signal::TERM).is_err()
    {
        // Whoever started this process is gone already: there is nobody left to tell.
        return Exit::Failed.into();
    }
    let printer = Printer::new();
    match run(&cli, &printer) {
        Ok(exit) => exit.into(),
        Err(failure) => printer.failure(&failure).into(),
    }
}

fn run(cli: &Cli, printer: &Printer) -> Result<Exit, Failure> {
    let global = &cli.global;
    match &cli.verb {
        Verb::Control => cmd::control::run(global),
        Verb::Agent => cmd::agent::run(global),
        Verb::Sidecar(args) => cmd::sidecar::run(args, global, printer),
        Verb::Run(args) => cmd::run::run(args, global),
        Verb::Gateway => cmd::gateway::run(global),
        Verb::Vault => cmd::vault::run(global),
        Verb::Idp => cmd::idp::run(global),
        Verb::Config(args) => cmd::config::run(args, global, printer),
        Verb::Relations(args) => cmd::relations::run(args, global, printer),
        Verb::Policy(args) => cmd::policy::run(args, global, printer),
        Verb::Explain(args) => cmd::explain::run(args, global, printer),
        Verb::Token(args) => cmd::token::run(args, global, printer),
        Verb::Demo(args) => demo::run(args, global, printer),
        Verb::Tap(args) => cmd::tap::run(args, global, printer),
        Verb::Id(args) => cmd::id::run(args, global, printer),
        Verb::Status(args) => cmd::status::run(args, global, printer),
        Verb::StartCommand(args) => Ok(cmd::run::start_command(args, printer)),
    }
}
