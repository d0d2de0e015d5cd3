//! A network of its own for each node: namespaces on a bridge, whose ends drop what a partition is to lose.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::Command,
};

use anyhow::{Context, bail};

/// The last number of the bridge's address, where the clients are.
const BRIDGE_HOST: u8 = 1;
/// The last number of the first node's address.
const NODE_HOST_FIRST: u8 = 10;
/// Runs beside each other take networks apart by process: 10.213.0.0/16 holds 256 of them.
const NETWORK: [u8; 2] = [10, 213];
/// The table of rules in each namespace.
const TABLE: &str = "palisade_torture";

/// Namespaces that go with this.
#[derive(Debug)]
pub(crate) struct Network {
    bridge: String,
    third: u8,
    namespaces: Vec<(u64, String)>,
}

/// Packets that are lost: those of one node to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Whose.
    pub(crate) from: u64,
    /// On their way to.
    pub(crate) to: u64,
}

impl Network {
    /// One for these nodes. What was made before a failure is taken down again.
    ///
    /// # Errors
    ///
    /// When something of it cannot be made, or the caller is not root.
    pub(crate) fn create(nodes: &[u64]) -> anyhow::Result<Self> {
        let process = std::process::id();
        let third = u8::try_from(process % 256).unwrap_or(0);
        // Names of interfaces have at most 15 characters.
        let bridge = format!("pst{process}");
        let mut network = Self { bridge, third, namespaces: Vec::new() };
        network.build(nodes)?;
        Ok(network)
    }

    fn build(&mut self, nodes: &[u64]) -> anyhow::Result<()> {
        let bridge = self.bridge.clone();
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}/24", self.host(BRIDGE_HOST)), "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        for (index, node) in nodes.iter().enumerate() {
            self.join(*node, u8::try_from(index).context("too many nodes")?)?;
        }
        Ok(())
    }

    fn join(&mut self, node: u64, index: u8) -> anyhow::Result<()> {
        let namespace = format!("{}n{node}", self.bridge);
        let outer = format!("{}v{index}", self.bridge);
        ip(&["netns", "add", &namespace])?;
        self.namespaces.push((node, namespace.clone()));
        ip(&["link", "add", &outer, "type", "veth", "peer", "name", "eth0", "netns", &namespace])?;
        ip(&["link", "set", &outer, "master", &self.bridge, "up"])?;
        let address = format!("{}/24", self.host(NODE_HOST_FIRST + index));
        ip(&["-n", &namespace, "addr", "add", &address, "dev", "eth0"])?;
        ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
        ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        inside(&namespace, &["nft", "add", "table", "ip", TABLE])?;
        let hook = "{ type filter hook input priority 0 ; }";
        inside(&namespace, &["nft", "add", "chain", "ip", TABLE, "input", hook])
    }

    /// The namespace of a node.
    pub(crate) fn namespace(&self, node: u64) -> Option<&str> {
        self.namespaces.iter().find(|(id, _)| *id == node).map(|(_, namespace)| namespace.as_str())
    }

    /// The address of a node.
    pub(crate) fn address(&self, node: u64) -> Option<IpAddr> {
        let index = self.namespaces.iter().position(|(id, _)| *id == node)?;
        Some(IpAddr::V4(self.host(NODE_HOST_FIRST.checked_add(u8::try_from(index).ok()?)?)))
    }

    /// Loses exactly these packets from now on, and no others.
    ///
    /// # Errors
    ///
    /// When a rule cannot be made.
    pub(crate) fn cut(&self, cuts: &[Cut]) -> anyhow::Result<()> {
        for (node, namespace) in &self.namespaces {
            let mut rules = format!("flush chain ip {TABLE} input\n");
            for cut in cuts.iter().filter(|cut| cut.to == *node) {
                let from = self.address(cut.from).context("a cut from no node")?;
                rules.push_str(&format!("add rule ip {TABLE} input ip saddr {from} drop\n"));
            }
            // One line of rules takes effect at once, so that no packet slips through between two.
            inside(namespace, &["nft", &rules])?;
        }
        Ok(())
    }

    fn host(&self, host: u8) -> Ipv4Addr {
        let [first, second] = NETWORK;
        Ipv4Addr::new(first, second, self.third, host)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The ends of a namespace's cables go with it, and a bridge that was never made cannot be removed.
        for (_, namespace) in &self.namespaces {
            report(ip(&["netns", "del", namespace]));
        }
        report(ip(&["link", "del", &self.bridge]));
    }
}

fn report(result: anyhow::Result<()>) {
    if let Err(error) = result {
        eprintln!("{error:#}");
    }
}

fn inside(namespace: &str, command: &[&str]) -> anyhow::Result<()> {
    let mut words = vec!["netns", "exec", namespace];
    words.extend(command);
    ip(&words)
}

fn ip(words: &[&str]) -> anyhow::Result<()> {
    run(Command::new("ip").args(words))
}

/// Runs a command to its end.
///
/// # Errors
///
/// When it cannot be run or fails, with what it said.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("{command:?} cannot be run"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Everything that parts nodes from each other, by these groups.
pub(crate) fn parted(one: &[u64], other: &[u64]) -> Vec<Cut> {
    one.iter()
        .flat_map(|a| other.iter().flat_map(move |b| [Cut { from: *a, to: *b }, Cut { from: *b, to: *a }]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parted_groups_hear_nothing_of_each_other() {
        let cuts = parted(&[1], &[2, 3]);
        assert_eq!(cuts.len(), 4);
        assert!(cuts.contains(&Cut { from: 1, to: 3 }) && cuts.contains(&Cut { from: 3, to: 1 }));
        assert!(!cuts.iter().any(|cut| cut.from == 2 && cut.to == 3));
    }
}
