//! Free ports on loopback: all found together, and the same ones again after a restart.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::ready::{WriteError, write_json};

/// Lowest port chosen: below lie the well-known ones that people's own programs like.
const LOWEST_PORT: u16 = 20_000;
/// Where connections get their near ends from if the kernel does not say (its own default).
const EPHEMERAL_DEFAULT: u16 = 32_768;
/// How many ports are tried for one name before the kernel is asked for any.
const TRIES: u32 = 200;

/// Why no ports were found.
#[derive(Debug, Error)]
pub(crate) enum PortsError {
    #[error("no free port on 127.0.0.1 for {name}")]
    NoneFree { name: String, source: io::Error },
    #[error("{} is not the list of ports that a demo wrote", path.display())]
    Unreadable { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the ports cannot be written down")]
    Write(#[from] WriteError),
}

/// A port by its name, such as `gateway` or `web.inbound`.
pub(crate) type Ports = BTreeMap<String, u16>;

/// What was chosen.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) ports: Ports,
    /// Names whose port of last time is taken by somebody else now, with that port.
    pub(crate) moved: Ports,
}

/// Chooses a port for every name, all held at once so that they differ, and writes them to `file`.
///
/// Ports that `file` names are taken again if they are free. New ones lie below the range from which
/// the kernel gives connections their near ends: there, a process that was killed would find its port
/// taken by some connection when it comes back. `seed` spreads the choice of two demos started at once.
pub(crate) fn choose(file: &Path, names: &[&str], seed: u64) -> Result<Chosen, PortsError> {
    let range = LOWEST_PORT..ephemeral_start(Path::new("/proc"));
    let before = read(file)?;
    let mut held = Vec::new();
    let mut ports = Ports::new();
    let mut moved = Ports::new();
    // Those of last time first, so that no new one takes the place of an old one.
    for (name, port) in before.iter().filter(|(name, _)| names.contains(&name.as_str())) {
        match bind(*port) {
            Ok(listener) => {
                held.push(listener);
                ports.insert(name.clone(), *port);
            }
            Err(_taken) => {
                moved.insert(name.clone(), *port);
            }
        }
    }
    let mut next = seed;
    for name in names {
        if ports.contains_key(*name) {
            continue;
        }
        let (listener, port) = fresh(&range, &mut next)
            .map_err(|source| PortsError::NoneFree { name: (*name).to_owned(), source })?;
        held.push(listener);
        ports.insert((*name).to_owned(), port);
    }
    write_json(file, &ports)?;
    Ok(Chosen { ports, moved })
}

fn fresh(range: &Range<u16>, next: &mut u64) -> io::Result<(TcpListener, u16)> {
    for _ in 0..TRIES {
        // Knuth's MMIX constants; it need only spread, nobody is to be surprised.
        *next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let width = u64::from(range.end.saturating_sub(range.start));
        let Some(offset) = (*next >> 33).checked_rem(width) else { break };
        let Ok(port) = u16::try_from(u64::from(range.start) + offset) else { break };
        if let Ok(listener) = bind(port) {
            return Ok((listener, port));
        }
    }
    let listener = bind(0)?;
    let port = listener.local_addr()?.port();
    Ok((listener, port))
}

fn bind(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

fn read(file: &Path) -> Result<Ports, PortsError> {
    let unreadable = |source| PortsError::Unreadable { path: file.to_owned(), source };
    match std::fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| unreadable(error.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Ports::new()),
        Err(error) => Err(unreadable(error.into())),
    }
}

fn ephemeral_start(proc: &Path) -> u16 {
    let text = std::fs::read_to_string(proc.join("sys/net/ipv4/ip_local_port_range")).unwrap_or_default();
    text.split_whitespace().next().and_then(|start| start.parse().ok()).unwrap_or(EPHEMERAL_DEFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = ["gateway", "vault", "web.app", "web.inbound"];

    #[test]
    fn a_restart_gets_the_same_ports_and_they_all_differ() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ports.json");
        let first = choose(&file, &NAMES, 7).unwrap();
        let mut different: Vec<u16> = first.ports.values().copied().collect();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), NAMES.len());
        let again = choose(&file, &NAMES, 8).unwrap();
        assert_eq!(again.ports, first.ports);
        assert!(again.moved.is_empty());
    }

    #[test]
    fn a_port_that_is_taken_meanwhile_is_chosen_anew_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ports.json");
        let first = choose(&file, &NAMES, 9).unwrap();
        let _thief = bind(first.ports["vault"]).unwrap();
        let again = choose(&file, &NAMES, 9).unwrap();
        assert_eq!(again.moved, Ports::from([("vault".to_owned(), first.ports["vault"])]));
        assert_ne!(again.ports["vault"], first.ports["vault"]);
        assert_eq!(again.ports["gateway"], first.ports["gateway"]);
    }

    #[test]
    fn ports_lie_below_those_that_connections_use() {
        let directory = tempfile::tempdir().unwrap();
        let chosen = choose(&directory.path().join("p"), &NAMES, 11).unwrap();
        let end = ephemeral_start(Path::new("/proc"));
        if end > LOWEST_PORT + 1000 {
            assert!(
                chosen.ports.values().all(|port| (LOWEST_PORT..end).contains(port)),
                "{:?}",
                chosen.ports
            );
        }
        // Where the range is empty, the kernel chooses.
        assert!(fresh(&(5..5), &mut 1).unwrap().1 > 0);
    }

    #[test]
    fn a_list_that_is_none_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ports.json");
        std::fs::write(&file, "[]").unwrap();
        assert!(matches!(choose(&file, &NAMES, 1), Err(PortsError::Unreadable { .. })));
    }
}
