//! `palisade`: a zero-trust service mesh in one binary. This file is its table of contents.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cmd;
mod credentials;
#[expect(dead_code, reason = "the demo's own verb, which uses all of it, is composed on top")]
mod demo;
mod failure;
mod listen;
mod logging;
mod mesh;
mod printer;
mod serve;
mod supervised;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::{Exit, Failure};
use crate::printer::Printer;

/// Zero-trust service mesh: identity, mTLS and policy beside every service.
#[derive(Debug, Parser)]
#[command(name = "palisade", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// What every verb takes.
#[derive(Debug, clap::Args)]
struct Global {
    /// The file that describes the mesh.
    #[arg(long, global = true, value_name = "FILE", default_value = "mesh.toml")]
    mesh: PathBuf,
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
    /// Check or show mesh.toml, or print its schema.
    Config(cmd::config::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return printer::usage(&error),
    };
    if let Some(parent) = cli.global.supervised_by
        && supervised::end_with(parent).is_err()
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
    match &cli.verb {
        Verb::Config(args) => cmd::config::run(args, &cli.global, printer),
    }
}
