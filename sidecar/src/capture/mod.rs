//! Connections that the kernel brought here although they were meant for somebody else.
//!
//! `palisade sidecar capture on` writes the rules; this is the side that accepts what they bring:
//!
//! | module | what it holds |
//! |---|---|
//! | [`outbound`] | what the app dials, by REDIRECT: whom it meant is asked of the kernel |
//! | [`inbound`] | what strangers dial, by TPROXY: the stranger's address and the app's stay as they were |
//! | [`destinations`] | whom a destination belongs to: a service of the mesh, the world outside, nobody |
//! | [`egress`] | which destinations outside the mesh may be dialled, and the dialling |
//! | `outside` | those that are listed by name: which one the client says, and how what it says goes on |
//! | `origin` | where a name leads, and connections to it, in clear text or in TLS made here |
//! | `serve` | the running listeners: each connection to where it belongs |
//!
//! Every refusal has a rule ([`Refused::rule`]); none is a reset without a reason.

pub mod destinations;
pub mod egress;
pub mod inbound;
mod origin;
pub mod outbound;
mod outside;
pub(crate) mod serve;
mod socket;

use std::net::SocketAddr;
use std::sync::Arc;

use thiserror::Error;
use tokio::net::TcpStream;

use crate::traffic::egress::{AllowList, Refusal};

pub use destinations::{Destinations, Route};
pub use egress::{Destination, Egress};
pub use inbound::InboundListener;
pub use outbound::OutboundListener;

/// What a sidecar is told of captured connections. By default it takes none.
#[derive(Debug, Default)]
pub struct CaptureConfig {
    /// What the app dials.
    pub outbound: Option<CapturedCalls>,
    /// What strangers dial; served as the mTLS listener's connections are, if meant for the app's port.
    pub inbound: Option<InboundListener>,
}

/// Where the app's captured connections may go.
#[derive(Debug)]
pub struct CapturedCalls {
    /// Where they come in.
    pub listener: OutboundListener,
    /// The addresses at which an app that knows of no sidecar dials a called service, by the service's name.
    pub services: Vec<(SocketAddr, String)>,
    /// Which destinations outside the mesh may be dialled, by address.
    pub egress: Egress,
    /// Which may be dialled by the names that the app says.
    pub names: OutsideNames,
}

/// The hosts outside the mesh that an app may name.
#[derive(Debug, Default)]
pub struct OutsideNames {
    /// The list.
    pub allowed: AllowList,
    /// How TLS is made where the list has the sidecar make it ([`AllowList::makes_tls`]):
    /// [`identity::tls::public_client_config`]. Without, such requests find no host.
    pub tls: Option<Arc<rustls::ClientConfig>>,
}

/// A connection, and both ends as its client sees them.
#[derive(Debug)]
pub struct Captured {
    /// The connection.
    pub stream: TcpStream,
    /// Who dialled.
    pub source: SocketAddr,
    /// Whom it was meant for.
    pub destination: SocketAddr,
}

/// Why nothing can be taken from a listener, or nothing is done with what was taken.
#[derive(Debug, Error)]
pub enum AcceptError {
    /// The listener itself failed: out of descriptors, for instance. Wait a little and accept again.
    #[error("cannot accept: {0}")]
    Accept(#[source] std::io::Error),
    /// This one connection is closed; accept the next.
    #[error("a connection from {source_address} is refused: {refused}")]
    Refused {
        /// Who dialled.
        source_address: SocketAddr,
        /// Why it goes no further.
        #[source]
        refused: Refused,
    },
}

/// Why a connection goes no further.
#[derive(Debug, Error)]
pub enum Refused {
    /// Somebody dialled the listener itself, which serves only what the kernel brings.
    #[error("it was dialled directly at {0}, not captured")]
    Direct(SocketAddr),
    /// What was meant is a listener of this sidecar: going on would come back here for ever.
    #[error("it was meant for {0}, which is this sidecar's own listener")]
    Loop(SocketAddr),
    /// The kernel does not tell whom it was meant for: nothing redirected it, or it ended meanwhile.
    #[error("the kernel does not say whom it was meant for: {0}")]
    Unknown(#[source] std::io::Error),
    /// No service of the mesh is there and the egress rules do not name it.
    #[error("{0} is no service of the mesh that the app calls, and no egress rule allows it")]
    EgressDenied(SocketAddr),
    /// The egress rules do not allow the name that the client says, or not where it leads.
    #[error("{host:?} may not be reached at port {port}: {refusal}")]
    EgressName {
        /// The name that it says.
        host: String,
        /// Where it would be reached.
        port: u16,
        /// Why it may not be reached.
        refusal: Refusal,
    },
    /// A stranger's connection is meant for a port at which there is no app of this sidecar's.
    #[error("it was meant for {0}, at which the app does not listen")]
    NoApp(SocketAddr),
    /// An address of this very host, which may not be reached by way of the sidecar's rights.
    #[error("{0} is on this host and no service of the mesh: the sidecar does not dial it for others")]
    OwnHost(SocketAddr),
}

impl Refused {
    /// The rule that refused it, as logs and metrics name it.
    pub fn rule(&self) -> &'static str {
        match self {
            Self::Direct(_) => "capture.direct",
            Self::Loop(_) => "capture.loop",
            Self::Unknown(_) => "capture.unknown_destination",
            Self::EgressDenied(_) | Self::EgressName { refusal: Refusal::Form | Refusal::NotListed, .. } => {
                "egress.denied"
            }
            Self::EgressName { refusal: Refusal::Address(_), .. } => "egress.name_leads_home",
            Self::NoApp(_) => "capture.no_app",
            Self::OwnHost(_) => "egress.own_host",
        }
    }
}

/// An IPv4 address written as IPv6 is the IPv4 address: two spellings of one destination would be two keys.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
