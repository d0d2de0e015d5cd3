//! One place where a workload serves, as workloads, agents and control pass it on.

use std::net::SocketAddr;

use identity::SpiffeId;

use crate::pb;

/// Most places that one host may announce, and that one workload may ask for identities of.
pub(crate) const MAX_PER_HOST: usize = 4_096;

/// Who, where, and whether they take requests.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Endpoint {
    pub(crate) id: SpiffeId,
    pub(crate) address: SocketAddr,
    pub(crate) serving: bool,
}

/// An address that can be connected to; `None` for anything else.
pub(crate) fn address(text: &str) -> Option<SocketAddr> {
    let address: SocketAddr = text.parse().ok()?;
    (address.port() != 0 && !address.ip().is_unspecified()).then_some(address)
}

impl Endpoint {
    /// As it came over the wire; `None` if it is malformed.
    fn read(spiffe_id: &str, at: &str, serving: bool) -> Option<Self> {
        Some(Self { id: SpiffeId::new(spiffe_id).ok()?, address: address(at)?, serving })
    }

    /// From or to control.
    pub(crate) fn of_control(wire: &pb::control::Endpoint) -> Option<Self> {
        Self::read(&wire.spiffe_id, &wire.address, wire.serving)
    }

    /// From the agent.
    pub(crate) fn of_mesh(wire: &pb::mesh::Endpoint) -> Option<Self> {
        Self::read(&wire.spiffe_id, &wire.address, wire.serving)
    }

    pub(crate) fn to_control(&self) -> pb::control::Endpoint {
        pb::control::Endpoint {
            spiffe_id: self.id.to_string(),
            address: self.address.to_string(),
            serving: self.serving,
        }
    }

    pub(crate) fn to_mesh(&self) -> pb::mesh::Endpoint {
        pb::mesh::Endpoint {
            spiffe_id: self.id.to_string(),
            address: self.address.to_string(),
            serving: self.serving,
        }
    }
}
