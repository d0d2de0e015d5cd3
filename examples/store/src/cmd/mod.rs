//! One file a subcommand.

pub(crate) mod bench;
pub(crate) mod demo;
pub(crate) mod node;
pub(crate) mod shell;
pub(crate) mod torture;

use std::{
    fs,
    io::{self, IsTerminal as _},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Below those that the kernel gives to outgoing connections, one of which could take a node's while it is away.
const PORT_FIRST: u16 = 10_000;
const PORTS: u16 = 22_000;
const PORTS_APART: u32 = 64;

/// Addresses on loopback that nobody has now. Somebody else may take one before whoever it is for does.
fn free_addresses(count: usize) -> anyhow::Result<Vec<SocketAddr>> {
    // Processes that are started together have numbers beside each other: each begins far from where others take some.
    let begin = std::process::id().wrapping_mul(PORTS_APART) % u32::from(PORTS);
    let begin = u16::try_from(begin).unwrap_or_default();
    let ports = (0..PORTS).map(|step| PORT_FIRST + (begin + step) % PORTS);
    let addresses = ports.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let free: Vec<_> = addresses.filter(|address| TcpListener::bind(address).is_ok()).take(count).collect();
    anyhow::ensure!(free.len() == count, "too few ports on loopback are free");
    Ok(free)
}

/// Log lines go to standard error, as many as RUST_LOG says.
fn log(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let ansi = io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).init();
}

/// Completes when somebody wants the process to end.
async fn told_to_stop() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Writes a file that is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, bytes)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("{} cannot be written", path.display()))
}
