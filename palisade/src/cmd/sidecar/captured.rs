//! The listeners for what `palisade sidecar capture on` brings, as the configuration has them.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;

use sidecar::capture::{CaptureConfig, CapturedCalls, Egress, InboundListener, OutboundListener};
use sidecar::traffic::egress::AllowList;

use crate::failure::Failure;
use crate::listen;
use crate::mesh::Capture;

/// Listens for what is captured; `services` are the app's calls, each with the addresses at which an app that
/// knows of no sidecar dials it. Needs a runtime.
pub(super) fn listen(
    wanted: Option<&Capture>,
    services: impl Iterator<Item = (String, Vec<SocketAddr>)>,
) -> Result<CaptureConfig, Failure> {
    let Some(wanted) = wanted else { return Ok(CaptureConfig::default()) };
    let outbound = wanted.outbound_port.map(|port| -> Result<CapturedCalls, Failure> {
        let listener = OutboundListener::bind(port.get())
            .map_err(|error| refused("what the app dials", "outbound_port", port, &error))?;
        let services = services.flat_map(|(name, at)| at.into_iter().map(move |at| (at, name.clone())));
        Ok(CapturedCalls {
            listener,
            services: services.collect(),
            egress: Egress::List(wanted.egress.clone()),
            names: AllowList::new(wanted.egress_names.iter().cloned()),
        })
    });
    let inbound = wanted.inbound_port.map(|port| {
        InboundListener::bind(port.get())
            .map_err(|error| refused("what others dial", "inbound_port", port, &error))
    });
    Ok(CaptureConfig { outbound: outbound.transpose()?, inbound: inbound.transpose()? })
}

fn refused(what: &str, key: &str, port: NonZeroU16, error: &io::Error) -> Failure {
    let what = format!("the listener for {what}");
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Failure::new(format!("{what} cannot be made"))
            .because(error)
            .hint("give the sidecar AmbientCapabilities=CAP_NET_RAW, or leave out inbound_port");
    }
    listen::refused(&what, &format!("capture's {key}"), SocketAddr::from(([127, 0, 0, 1], port.get())), error)
}
