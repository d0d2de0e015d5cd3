//! How near an address is: on this host by the host's own addresses, in this zone by the networks that the zones are
//! made of. So that it holds of every endpoint, whoever told where it is: a list, a name, control.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use crate::proxy_protocol::Network;

/// Zones by their networks, and where this process runs among them. By default nothing is known, and everything is
/// equally far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// Narrow networks first.
    networks: Vec<(Network, Arc<str>)>,
    own: Vec<IpAddr>,
    zone: Option<Arc<str>>,
}

/// How near, nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nearness {
    /// This machine.
    Host,
    /// The same failure domain of many hosts, such as a data centre.
    Zone,
    /// Anywhere else.
    Elsewhere,
}

impl Topology {
    /// Of `zones`, each with its networks: of several that contain an address the narrowest counts. `own` are this
    /// host's addresses; the first that is in a zone says which is the own one.
    pub fn new<'a>(zones: impl IntoIterator<Item = (&'a str, Network)>, own: Vec<IpAddr>) -> Self {
        let mut networks: Vec<(Network, Arc<str>)> =
            zones.into_iter().map(|(zone, network)| (network, zone.into())).collect();
        networks.sort_by_key(|(network, _)| std::cmp::Reverse(network.prefix_bits()));
        let zone = own.iter().find_map(|address| zone_of(&networks, *address)).cloned();
        Self { networks, own, zone }
    }

    /// The zone that this process runs in, if it is one of those known.
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// How near `address` is.
    pub fn nearness(&self, address: IpAddr) -> Nearness {
        let address = address.to_canonical();
        if address.is_loopback() || self.own.contains(&address) {
            return Nearness::Host;
        }
        match (&self.zone, zone_of(&self.networks, address)) {
            (Some(own), Some(zone)) if own == zone => Nearness::Zone,
            _ => Nearness::Elsewhere,
        }
    }
}

fn zone_of(networks: &[(Network, Arc<str>)], address: IpAddr) -> Option<&Arc<str>> {
    networks.iter().find(|(network, _)| network.contains(address)).map(|(_, zone)| zone)
}

/// This machine's own addresses, loopback left out.
///
/// # Errors
/// The kernel does not list them.
pub fn own_addresses() -> io::Result<Vec<IpAddr>> {
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
    };
    let addresses = nix::ifaddrs::getifaddrs()?.filter_map(address);
    Ok(addresses.filter(|address| !address.is_loopback()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(own: &[&str]) -> Topology {
        let zones =
            [("a", "10.1.0.0/16"), ("b", "10.2.0.0/16"), ("a", "2001:db8:a::/48"), ("c", "10.1.7.0/24")];
        let zones = zones.into_iter().map(|(zone, network)| (zone, network.parse().unwrap()));
        Topology::new(zones, own.iter().map(|address| address.parse().unwrap()).collect())
    }

    #[test]
    fn near_is_what_is_here_and_then_what_is_in_the_same_zone() {
        let topology = topology(&["192.168.0.9", "10.1.0.4"]);
        assert_eq!(topology.zone(), Some("a"));
        for (address, expected) in [
            ("10.1.0.4", Nearness::Host),
            ("192.168.0.9", Nearness::Host),
            ("127.0.0.1", Nearness::Host),
            ("::ffff:10.1.0.4", Nearness::Host),
            ("10.1.0.5", Nearness::Zone),
            ("2001:db8:a::7", Nearness::Zone),
            ("10.1.7.5", Nearness::Elsewhere),
            ("10.2.0.5", Nearness::Elsewhere),
            ("192.0.2.1", Nearness::Elsewhere),
        ] {
            assert_eq!(topology.nearness(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn outside_of_all_zones_nothing_is_in_the_own() {
        let topology = topology(&["192.168.0.9"]);
        assert_eq!(topology.zone(), None);
        assert_eq!(topology.nearness("10.1.0.5".parse().unwrap()), Nearness::Elsewhere);
        assert_eq!(Topology::default().nearness("10.1.0.5".parse().unwrap()), Nearness::Elsewhere);
    }

    #[test]
    fn a_machine_has_addresses_and_none_of_them_is_loopback() {
        assert!(own_addresses().unwrap().iter().all(|address| !address.is_loopback()));
    }
}
