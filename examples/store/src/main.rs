//! `palisade-store`: the sample store in one binary. This file is its table of contents.

#![forbid(unsafe_code)]

mod cmd;

use std::process::ExitCode;

use clap::Parser;

/// A request makes and frees a few dozen small things.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The sample store: a small Spanner.
#[derive(Debug, Parser)]
#[command(name = "palisade-store", version, max_term_width = 100)]
enum Command {
    /// Run one node.
    Node(cmd::node::Args),
    /// Run some nodes on this machine, and a shell.
    Demo(cmd::demo::Args),
    /// Ask nodes by hand: tables, rows, transactions, splits.
    Shell(cmd::shell::Args),
    /// Have everything go wrong that can, and write down what clients saw.
    Torture(cmd::torture::Args),
    /// Measure it on this machine, beside others.
    Bench(cmd::bench::Args),
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Node(args) => cmd::node::run(args),
        Command::Demo(args) => cmd::demo::run(args),
        Command::Shell(args) => cmd::shell::run(args),
        Command::Torture(args) => cmd::torture::run(args),
        Command::Bench(args) => cmd::bench::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("palisade-store: {error}");
            for cause in error.chain().skip(1) {
                eprintln!("  because {cause}");
            }
            ExitCode::FAILURE
        }
    }
}
