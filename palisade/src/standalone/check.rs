//! Mistakes of meaning in `sidecar.toml`, and the way from text to [`Standalone`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use identity::pem::IdentityFiles;
use identity::{SpiffeId, TrustDomain};
use policy::Problem;
use sidecar::Carries;
use sidecar::access::AccessTarget;
use sidecar::ext_authz::{Door, EntitiesConfig};
use sidecar::traffic::resolve::Source;
use toml::Spanned;

use super::file::{
    CallProtocol, ExtAuthzSection, InboundSection, OutboundSection, SidecarFile, TelemetrySection,
};
use super::{Decided, ExtAuthz, Inbound, Outbound, Standalone};
use crate::mesh::check::{ANY_HOST, MAX_TIMEOUT};
use crate::mesh::file::Text;
use crate::mesh::load::Sections;
use crate::mesh::read::{Check, Reach};
use crate::mesh::{AppProtocol, ServiceName};

/// Most threads that carry requests: far above any machine's processors.
const MAX_WORKERS: u32 = 1024;
/// How long an answer may take where nothing is said.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the app may take to tell attributes where nothing is said: Envoy waits for the decision meanwhile.
const ENTITIES_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a drain may take where nothing is said.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Turns the sections into a [`Standalone`], or says everything that is wrong with them.
pub(super) fn standalone(
    sections: Sections<SidecarFile>,
    text: &str,
    file: &Path,
) -> Result<Standalone, Vec<Problem>> {
    let mut check = Check::new(file, text, sections.declared, sections.problems);
    let standalone = sections.file.and_then(|sections| check.standalone(sections));
    check.outcome(standalone)
}

impl Check<'_> {
    fn standalone(&mut self, sections: SidecarFile) -> Option<Standalone> {
        let SidecarFile {
            identity,
            trust,
            inbound,
            ext_authz,
            outbound,
            traffic,
            zones,
            capture,
            admin,
            telemetry,
            traces,
            limits,
        } = sections;
        let mut domains = Vec::new();
        for (domain, roots) in &trust {
            let roots = self.existing(roots);
            match TrustDomain::new(domain.get_ref()) {
                Ok(domain) => domains.push((domain, roots)),
                Err(error) => {
                    let hint = "write the bare name, such as partner.example";
                    self.report(domain, format!("not a trust domain: {error}"), Some(hint.into()));
                }
            }
        }
        let identity = IdentityFiles {
            certificate: self.existing(&identity.certificate),
            key: self.existing(&identity.key),
            bundle: self.existing(&identity.bundle),
            trust: domains,
        };
        if !["inbound", "ext_authz", "outbound"].iter().any(|section| self.declared.contains(*section)) {
            let message = "there is neither [inbound], [ext_authz] nor [outbound.NAME] to serve";
            let problem = Problem::file(self.file, message);
            self.problems.push(problem.hint("add one; `palisade config example --sidecar` shows them"));
        }
        let inbound = inbound.as_ref().map(|section| self.inbound(section));
        let asked = ext_authz.as_ref().map(|section| self.ext_authz(section));
        if let (Some(Some(inbound)), Some(Some(asked)), Some(section)) = (&inbound, &asked, &ext_authz)
            && inbound.decided != asked.decided
        {
            let message =
                "[inbound] and [ext_authz] decide for one service, by the same policies and gateways";
            self.report(&section.service, message.to_owned(), None);
        }
        let mut calls = BTreeMap::new();
        for (name, section) in &outbound {
            let call = self.outbound(name.get_ref(), section);
            match (ServiceName::new(name.get_ref()), call) {
                (Ok(name), Some(call)) => {
                    calls.insert(name, call);
                }
                (Ok(_), None) => {}
                (Err(message), _) => self.report(name, message, None),
            }
        }
        let traffic =
            self.traffic(traffic, |name| match calls.iter().find(|(known, _)| known.as_str() == name) {
                Some((_, call)) => Ok(call.carries),
                None => Err(format!("there is no [outbound.{name}]")),
            });
        let admin = admin
            .as_ref()
            .map(|section| self.bind(Some(&section.listen), "", "admin's listen", Reach::Loopback));
        let timeouts = Duration::from_millis(1)..=MAX_TIMEOUT;
        let drain_timeout = self.duration(limits.drain_timeout.as_ref(), DRAIN_TIMEOUT, timeouts);
        let memory = self.memory(limits.memory.as_ref());
        let workers = limits.workers.as_ref().map(|workers| self.workers(workers));
        // A part that is broken has said so, and what has a problem is not handed out.
        Some(Standalone {
            file: self.file.to_owned(),
            identity,
            inbound: inbound.flatten(),
            ext_authz: asked.flatten(),
            outbound: calls,
            traffic,
            zones: self.zones(&zones),
            capture: capture.and_then(|section| self.capture(&section)),
            admin: admin.flatten(),
            access_log: self.access_log(&telemetry),
            traces: traces.and_then(|section| self.traces(&section)),
            log: telemetry.log.map_or_else(|| "info".to_owned(), Spanned::into_inner),
            drain_timeout: drain_timeout?,
            memory: memory?,
            workers: workers.flatten(),
        })
    }

    fn inbound(&mut self, section: &InboundSection) -> Option<Inbound> {
        let listen = self.bind(Some(&section.listen), "", "inbound's listen", Reach::Any);
        let app = self.bind(Some(&section.app), "", "the app", Reach::Loopback);
        let decided = self.decided(&section.service, &section.policies, &section.gateways);
        let (hbone, known) = (section.hbone.as_ref(), &section.hbone_destinations);
        let hbone = self.hbone(ANY_HOST, "inbound's hbone", hbone, known, app);
        let proxies = self.proxies(&section.proxy_protocol_from);
        Some(Inbound {
            hbone,
            proxies,
            listen: listen?,
            app: app?,
            app_protocol: section.app_protocol.unwrap_or(AppProtocol::Http1),
            decided: decided?,
            request_timeout: self.request_timeout(section.request_timeout.as_ref())?,
            rate_limit: section.rate_limit.clone(),
            health: section.health.clone(),
        })
    }

    fn ext_authz(&mut self, section: &ExtAuthzSection) -> Option<ExtAuthz> {
        let callers = section.callers.iter().filter_map(|text| self.spiffe_id(text)).collect();
        let door = match Door::new(section.listen.get_ref(), callers) {
            Ok(door) => Some(door),
            Err(error) => {
                let hint = "for example unix:/run/palisade/authz.sock";
                self.report(&section.listen, error.to_string(), Some(hint.into()));
                None
            }
        };
        let decided = self.decided(&section.service, &section.policies, &section.gateways);
        let app = section.entities_address.as_ref();
        let app = app.map(|app| self.bind(Some(app), "", "the app", Reach::Loopback));
        let timeouts = Duration::from_millis(1)..=MAX_TIMEOUT;
        let timeout = self.duration(section.entities_timeout.as_ref(), ENTITIES_TIMEOUT, timeouts)?;
        let protocol = section.app_protocol.unwrap_or(AppProtocol::Http1).into();
        let entities = app.flatten().map(|app| EntitiesConfig { app, protocol, timeout });
        Some(ExtAuthz { door: door?, decided: decided?, entities })
    }

    fn decided(&mut self, service: &Text, policies: &Text, gateways: &[Text]) -> Option<Decided> {
        let name = match ServiceName::new(service.get_ref()) {
            Ok(name) => Some(name),
            Err(message) => {
                self.report(service, message, None);
                None
            }
        };
        let directory = self.path(policies);
        if !directory.is_dir() {
            let message = format!("there is no directory `{}`", policies.get_ref());
            let hint = "a relative path starts at this file's own directory; without policies every request is refused";
            self.report(policies, message, Some(hint.into()));
        }
        let gateways = gateways.iter().filter_map(|text| self.spiffe_id(text)).collect();
        Some(Decided { service: name?, policies: directory, gateways })
    }

    fn outbound(&mut self, name: &str, section: &OutboundSection) -> Option<Outbound> {
        let what = format!("outbound.{name}'s listen");
        let listen = self.bind(Some(&section.listen), "", &what, Reach::Loopback);
        let id = self.spiffe_id(&section.id);
        if section.endpoints.is_empty() {
            let hint = "add endpoints = [\"ADDRESS:PORT\"]";
            self.report(&section.id, format!("{name} is to be found nowhere"), Some(hint.into()));
        }
        let endpoints = self.endpoints(&section.endpoints);
        let mut addresses: Vec<SocketAddr> =
            section.addresses.iter().filter_map(|text| self.dialled(text)).collect();
        if let (true, Some(Source::Static(list))) = (section.addresses.is_empty(), &endpoints) {
            addresses = list.iter().map(|endpoint| endpoint.address).collect();
        }
        Some(Outbound {
            listen: listen?,
            id: id?,
            carries: match section.protocol.unwrap_or(CallProtocol::Http) {
                CallProtocol::Http => Carries::Requests,
                CallProtocol::Tcp => Carries::Connections,
            },
            endpoints: endpoints?,
            addresses,
            request_timeout: self.request_timeout(section.request_timeout.as_ref())?,
        })
    }

    fn access_log(&self, section: &TelemetrySection) -> Option<AccessTarget> {
        match &section.access_log {
            None => Some(AccessTarget::Stdout),
            Some(text) => match text.get_ref().as_str() {
                "off" => None,
                "stdout" => Some(AccessTarget::Stdout),
                _ => Some(AccessTarget::File(self.path(text))),
            },
        }
    }

    fn request_timeout(&mut self, text: Option<&Text>) -> Option<Duration> {
        self.duration(text, REQUEST_TIMEOUT, Duration::from_millis(1)..=MAX_TIMEOUT)
    }

    fn workers(&mut self, workers: &Spanned<u32>) -> Option<NonZeroUsize> {
        let count = *workers.get_ref();
        if !(1..=MAX_WORKERS).contains(&count) {
            self.report(workers, format!("workers is a number from 1 to {MAX_WORKERS}"), None);
            return None;
        }
        NonZeroUsize::new(usize::try_from(count).ok()?)
    }

    fn spiffe_id(&mut self, text: &Text) -> Option<SpiffeId> {
        match SpiffeId::new(text.get_ref()) {
            Ok(id) => Some(id),
            Err(error) => {
                let hint = "for example spiffe://mesh.test/ns/default/sa/backend";
                self.report(text, format!("not a SPIFFE ID: {error}"), Some(hint.into()));
                None
            }
        }
    }

    /// The path of a file that must be there; its contents are read later.
    fn existing(&mut self, text: &Text) -> PathBuf {
        let path = self.path(text);
        if !path.is_file() {
            let message = format!("there is no file `{}`", text.get_ref());
            self.report(text, message, Some(format!("it would be {}", path.display())));
        }
        path
    }
}
