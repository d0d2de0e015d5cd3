//! Where services are found whose sidecars say so themselves, by agent and control.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use ca::discovery::{Found as Place, Wanted};
use identity::Scope;
use sidecar::traffic::endpoint::Endpoint;
use sidecar::traffic::resolve::Source;
use tokio::sync::watch;

use crate::failure::Failure;
use crate::mesh::{Found, HostPort, Service};
use crate::workload::Workload;

/// The services that control is asked for.
#[derive(Debug, Default)]
pub(crate) struct Discovery {
    wanted: Vec<Wanted>,
}

impl Discovery {
    /// Where `service` is found; nowhere until control has told, if that is who tells.
    pub(crate) fn source(&mut self, service: &Service) -> Source {
        let Found::At(source) = &service.endpoints else {
            let (sender, receiver) = watch::channel(Arc::from([]));
            let tell = move |places: Vec<Place>| {
                sender.send_replace(places.into_iter().map(endpoint).collect());
            };
            self.wanted.push(Wanted { id: service.id.clone(), tell: Box::new(tell) });
            return Source::Pushed(receiver);
        };
        source.clone()
    }

    /// Asks the agent, until `scope` drains.
    pub(crate) fn follow(self, workload: &Workload, scope: &Scope) {
        if !self.wanted.is_empty() {
            let socket = workload.mesh.agent.socket.clone();
            ca::discovery::follow(socket, self.wanted, Arc::clone(&workload.clock), scope);
        }
    }
}

fn endpoint(Place { address, serving }: Place) -> Endpoint {
    Endpoint { serving, ..address.into() }
}

/// Says to the agent where this sidecar of `service` serves, while its app is well and until `scope` drains, if it is
/// found that way.
pub(crate) fn announce(
    service: &Service,
    workload: &Workload,
    app_is_well: watch::Receiver<bool>,
    scope: &Scope,
) -> Result<(), Failure> {
    if matches!(service.endpoints, Found::At(_)) {
        return Ok(());
    }
    let mut address = service.inbound;
    if address.ip().is_unspecified() {
        let control = &workload.mesh.agent.control;
        let own = route_to(control).map_err(|error| {
            Failure::new(format!(
                "which of this machine's addresses others reach cannot be told: no way to {control}"
            ))
            .because(&error)
            .hint("write the address into the service's inbound")
        })?;
        address = SocketAddr::new(own, address.port());
    }
    tracing::info!(%address, "announced to control");
    let socket = workload.mesh.agent.socket.clone();
    ca::discovery::announce(socket, address, app_is_well, Arc::clone(&workload.clock), scope);
    Ok(())
}

/// The own address that packets to `there` leave from. None is sent.
fn route_to(there: &HostPort) -> std::io::Result<IpAddr> {
    let socket = UdpSocket::bind((IpAddr::from([0; 16]), 0)).or_else(|_| UdpSocket::bind("0.0.0.0:0"))?;
    socket.connect((there.host.as_str(), there.port))?;
    Ok(socket.local_addr()?.ip().to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_loopback_begins_at_loopback() {
        let there = HostPort { host: "127.0.0.1".into(), port: 4810 };
        assert_eq!(route_to(&there).unwrap(), IpAddr::from([127, 0, 0, 1]));
    }
}
