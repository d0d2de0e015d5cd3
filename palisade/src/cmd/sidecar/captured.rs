//! The listeners for what `palisade sidecar capture on` brings, as the configuration has them.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;

use identity::clock::SharedClock;
use identity::tls::ALPN_HTTP11;
use sidecar::capture::{
    CaptureConfig, CapturedCalls, Egress, InboundListener, OutboundListener, OutsideNames,
};
use sidecar::traffic::egress::AllowList;

use crate::failure::Failure;
use crate::listen;
use crate::mesh::Capture;

/// Listens for what is captured; `services` are the app's calls, each with the addresses at which an app that
/// knows of no sidecar dials it. Needs a runtime.
pub(super) fn listen(
    wanted: Option<&Capture>,
    services: impl Iterator<Item = (String, Vec<SocketAddr>)>,
    clock: &SharedClock,
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
            names: outside_names(wanted, clock)?,
        })
    });
    let inbound = wanted.inbound_port.map(|port| {
        InboundListener::bind(port.get())
            .map_err(|error| refused("what others dial", "inbound_port", port, &error))
    });
    Ok(CaptureConfig { outbound: outbound.transpose()?, inbound: inbound.transpose()? })
}

fn outside_names(wanted: &Capture, clock: &SharedClock) -> Result<OutsideNames, Failure> {
    let allowed = AllowList::new(wanted.egress_names.iter().cloned());
    if !allowed.makes_tls() {
        return Ok(OutsideNames { allowed, tls: None });
    }
    let authorities = identity::pem::certificates(&wanted.egress_ca).map_err(|error| {
        Failure::invalid("the authorities of hosts outside the mesh cannot be used")
            .because(&error)
            .hint("install ca-certificates, or name a PEM file with egress_ca beside egress")
    })?;
    let tls = identity::tls::public_client_config(authorities, &[ALPN_HTTP11], clock)
        .map_err(|error| Failure::new("TLS for hosts outside the mesh cannot be set up").because(&error))?;
    Ok(OutsideNames { allowed, tls: Some(tls) })
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
