//! Whom a captured connection was meant for, in the mesh's terms.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::{Egress, Refused, canonical};

/// Where a captured connection goes.
#[derive(Debug, PartialEq, Eq)]
pub enum Route<'a, T> {
    /// To this service of the mesh, over mTLS.
    Mesh(&'a T),
    /// Out of the mesh, as it is, to this address: by [`Egress::connect`].
    Outside(SocketAddr),
}

/// Which addresses are whose. `T` is what leads to a service: an upstream, a name.
#[derive(Debug)]
pub struct Destinations<T> {
    services: HashMap<SocketAddr, T>,
    own: Vec<SocketAddr>,
    egress: Egress,
}

impl<T> Destinations<T> {
    /// Of `services` by every address at which an app may dial them, the sidecar's `own` listeners, and the
    /// rules for everything else. The last of two services at one address would win: the caller refuses
    /// such a configuration.
    pub fn new(
        services: impl IntoIterator<Item = (SocketAddr, T)>,
        own: impl IntoIterator<Item = SocketAddr>,
        egress: Egress,
    ) -> Self {
        Self {
            services: services.into_iter().map(|(address, service)| (canonical(address), service)).collect(),
            own: own.into_iter().map(canonical).collect(),
            egress,
        }
    }

    /// Where a connection meant for `destination` goes, or why it goes nowhere.
    pub fn route(&self, destination: SocketAddr) -> Result<Route<'_, T>, Refused> {
        let destination = canonical(destination);
        if self.own.contains(&destination) {
            return Err(Refused::Loop(destination));
        }
        if let Some(service) = self.services.get(&destination) {
            return Ok(Route::Mesh(service));
        }
        if self.egress.allows(destination) {
            Ok(Route::Outside(destination))
        } else {
            Err(Refused::EgressDenied(destination))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn destinations(egress: Egress) -> Destinations<&'static str> {
        Destinations::new(
            [
                (address("10.0.0.2:8080"), "accounts"),
                (address("[2001:db8::2]:8080"), "accounts"),
                (address("127.0.0.1:15001"), "a service at our own address"),
            ],
            [address("127.0.0.1:15001")],
            egress,
        )
    }

    #[test]
    fn a_service_is_found_by_address_and_port_however_the_address_is_written() {
        let table = destinations(Egress::Deny);
        for written in ["10.0.0.2:8080", "[::ffff:10.0.0.2]:8080", "[2001:db8::2]:8080"] {
            assert_eq!(table.route(address(written)).unwrap(), Route::Mesh(&"accounts"), "{written}");
        }
    }

    #[test]
    fn unknown_destinations_are_refused_unless_egress_names_them() {
        let other_port = address("10.0.0.2:8081");
        assert_eq!(destinations(Egress::Deny).route(other_port).unwrap_err().rule(), "egress.denied");
        assert_eq!(destinations(Egress::Allow).route(other_port).unwrap(), Route::Outside(other_port));
        let listed = Egress::List(vec!["10.0.0.0/24:8081".parse().unwrap()]);
        assert_eq!(destinations(listed.clone()).route(other_port).unwrap(), Route::Outside(other_port));
        let refused = destinations(listed).route(address("10.0.0.2:8082")).unwrap_err();
        assert_eq!(refused.rule(), "egress.denied");
    }

    #[test]
    fn the_sidecars_own_listener_is_no_destination_whatever_the_rules_say() {
        let refused = destinations(Egress::Allow).route(address("127.0.0.1:15001")).unwrap_err();
        assert_eq!(refused.rule(), "capture.loop");
    }
}
