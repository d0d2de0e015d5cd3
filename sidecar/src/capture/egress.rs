//! Destinations outside the mesh: refused unless somebody wrote that they are wanted.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use thiserror::Error;
use tokio::net::{TcpStream, UdpSocket};

use super::Refused;

use crate::dial;

/// Which destinations outside the mesh an app may dial.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Egress {
    /// None.
    #[default]
    Deny,
    /// These.
    List(Vec<Destination>),
    /// All: the mesh's own services keep their rules, everything else is as without a sidecar.
    Allow,
}

impl Egress {
    /// Whether an app may dial `destination`, which is no service of the mesh.
    pub fn allows(&self, destination: SocketAddr) -> bool {
        match self {
            Self::Deny => false,
            Self::List(list) => list.iter().any(|listed| listed.covers(destination)),
            Self::Allow => true,
        }
    }

    /// Dials an allowed `destination` for the app.
    ///
    /// An address of this host is refused: what listens there is a neighbour of the app, and the rules let
    /// the sidecar's user pass where they would stop the app.
    pub async fn connect(destination: SocketAddr) -> Result<TcpStream, EgressError> {
        if is_own_address(destination).await.map_err(EgressError::Connect)? {
            return Err(EgressError::Refused(Refused::OwnHost(destination)));
        }
        dial::connect(destination).await.map_err(EgressError::Connect)
    }
}

/// Why an allowed destination was not reached.
#[derive(Debug, Error)]
pub enum EgressError {
    /// It may not be.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It does not answer.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
}

/// Whether the kernel would deliver to this host itself. Connecting a datagram socket asks the routing table
/// and sends nothing; to an address of its own a host speaks from that address.
pub(super) async fn is_own_address(destination: SocketAddr) -> io::Result<bool> {
    if destination.ip().is_loopback() || destination.ip().is_unspecified() {
        return Ok(true);
    }
    let any: IpAddr =
        if destination.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let asking = UdpSocket::bind((any, 0)).await?;
    asking.connect(destination).await?;
    Ok(asking.local_addr()?.ip() == destination.ip())
}

/// Addresses and a port: `10.0.0.0/8:5432`, `192.0.2.7:443`, `[2001:db8::/32]:443`; `*` is every port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    network: IpNet,
    port: Option<u16>,
}

impl Destination {
    /// Whether `address` is one of them.
    pub fn covers(&self, address: SocketAddr) -> bool {
        self.network.contains(&address.ip()) && self.port.is_none_or(|port| port == address.port())
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.network {
            IpNet::V4(network) => write!(f, "{network}:")?,
            IpNet::V6(network) => write!(f, "[{network}]:")?,
        }
        match self.port {
            Some(port) => write!(f, "{port}"),
            None => f.write_str("*"),
        }
    }
}

/// Why a text names no destination.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DestinationError {
    /// No port, or one that is none.
    #[error("a destination ends with a port from 1 to 65535, or with :* for every port")]
    Port,
    /// No address, or one that is none.
    #[error("`{0}` is no address and no CIDR; IPv6 is written [2001:db8::/32]:443")]
    Network(String),
    /// Bits below the prefix: was one address meant, or the network?
    #[error("{written} has bits set below its prefix; the network is {network}")]
    HostBits {
        /// What was written.
        written: IpNet,
        /// The network it lies in.
        network: IpNet,
    },
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, DestinationError> {
        let (network, port) = text.rsplit_once(':').ok_or(DestinationError::Port)?;
        let port = match port {
            "*" => None,
            port => match port.parse() {
                Ok(0) | Err(_) => return Err(DestinationError::Port),
                Ok(port) => Some(port),
            },
        };
        let none = || DestinationError::Network(network.to_owned());
        let bracketed = network.strip_prefix('[').and_then(|network| network.strip_suffix(']'));
        let written = bracketed.unwrap_or(network);
        let written = match written.parse::<IpAddr>() {
            Ok(address) => IpNet::from(address),
            Err(_) => written.parse::<IpNet>().map_err(|_| none())?,
        };
        // Without brackets the last group of an IPv6 address would pass for a port.
        if bracketed.is_some() != written.addr().is_ipv6() {
            return Err(none());
        }
        let network = written.trunc();
        if network != written {
            return Err(DestinationError::HostBits { written, network });
        }
        Ok(Self { network, port })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn destinations_cover_their_network_and_port_and_nothing_else() {
        let covers = |listed: &str, address: &str| {
            listed.parse::<Destination>().unwrap().covers(address.parse().unwrap())
        };
        assert!(covers("10.0.0.0/8:5432", "10.255.0.1:5432"));
        assert!(!covers("10.0.0.0/8:5432", "10.255.0.1:5433"));
        assert!(!covers("10.0.0.0/8:5432", "11.0.0.1:5432"));
        assert!(covers("192.0.2.7:443", "192.0.2.7:443"));
        assert!(!covers("192.0.2.7:443", "192.0.2.8:443"));
        assert!(covers("[2001:db8::/32]:*", "[2001:db8::1]:1"));
        assert!(!covers("[2001:db8::/32]:*", "[2001:db9::1]:1"));
        assert!(!covers("0.0.0.0/0:*", "[2001:db8::1]:1"));
    }

    #[test]
    fn what_could_mean_two_things_is_refused() {
        let refused = |text: &str| text.parse::<Destination>().unwrap_err();
        for text in ["", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:http"] {
            assert_eq!(refused(text), DestinationError::Port, "{text}");
        }
        for text in ["2001:db8::1:443", "[10.0.0.1]:443", "db.example:443", ":443", "10.0.0.0/33:1"] {
            assert!(matches!(refused(text), DestinationError::Network(_)), "{text}");
        }
        let host_bits = refused("10.1.2.3/8:443").to_string();
        assert_eq!(host_bits, "10.1.2.3/8 has bits set below its prefix; the network is 10.0.0.0/8");
    }

    #[tokio::test]
    async fn the_sidecar_dials_nothing_on_its_own_host_for_an_app() {
        let neighbour = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = neighbour.local_addr().unwrap();
        let mut dialled = vec![address, SocketAddr::from(([0, 0, 0, 0], address.port()))];
        dialled.push(SocketAddr::from(([127, 1, 2, 3], address.port())));
        for address in dialled {
            let Err(EgressError::Refused(refused)) = Egress::connect(address).await else {
                panic!("{address} was dialled")
            };
            assert_eq!(refused.rule(), "egress.own_host");
        }
    }

    proptest! {
        #[test]
        fn a_destination_reads_back_as_it_is_written(
            address: u128, v6: bool, prefix in 0u8..=128, port in proptest::option::of(1u16..),
        ) {
            let address = if v6 { IpAddr::from(Ipv6Addr::from(address)) } else {
                IpAddr::from(Ipv4Addr::from(address as u32))
            };
            let prefix = if v6 { prefix } else { prefix % 33 };
            let network = IpNet::new(address, prefix).unwrap().trunc();
            let destination = Destination { network, port };
            prop_assert_eq!(destination.to_string().parse::<Destination>(), Ok(destination));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _read = text.parse::<Destination>().is_ok();
        }
    }
}
