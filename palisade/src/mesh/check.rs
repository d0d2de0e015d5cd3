//! Mistakes of meaning, and the way from text to [`Mesh`]: addresses, identities, references.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use identity::{SpiffeId, TrustDomain};
use policy::{Problem, suggest};
use sidecar::traffic::resolve::Source;
use toml::Spanned;
use url::Url;

use super::file::{MeshFile, PolicySection, Text};
use super::load::Sections;
use super::read::{Check, Reach, SYSTEM_AUTHORITIES};
use super::{
    Agent, AppProtocol, Attest, BY_CONTROL, Callee, Control, Found, Gateway, Idp, Limits, Mesh, Mode, Own,
    PolicySource, Service, ServiceName, Telemetry, Vault, Whole, Workload,
};

/// The host of what runs wherever it is started.
pub(crate) const ANY_HOST: &str = "local";

/// Shortest life of an SVID: below it, rotation would be most of what the mesh does.
const MIN_SVID_TTL: Duration = Duration::from_secs(10);
/// Longest life of an SVID: what a stolen key is worth at most, with nobody noticing.
const MAX_SVID_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// Longest timeout of a request or a drain: past an hour it is no bound any more.
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(60 * 60);

/// Turns the sections into a [`Mesh`], or says everything that is wrong with them. `policies` stands in place of the
/// directory that they name.
pub(crate) fn mesh(
    sections: Sections<MeshFile>,
    text: &str,
    file: &Path,
    hostname: &str,
    policies: Option<&Path>,
) -> Result<Mesh, Vec<Problem>> {
    let mut check = Check::new(file, text, sections.declared, sections.problems);
    let mesh = sections.file.and_then(|sections| check.mesh(sections, hostname, policies));
    check.outcome(mesh)
}

/// The SPIFFE ID of one of the mesh's own processes.
pub(crate) fn own_id(trust_domain: &TrustDomain, own: Own) -> Option<SpiffeId> {
    let path = match own {
        Own::Gateway => "/palisade/gateway",
        Own::Idp => "/palisade/idp",
        Own::Vault => "/palisade/vault",
    };
    // Fails only for a trust domain so long that the whole ID is over the standard's limit.
    trust_domain.workload(path).ok()
}

impl Check<'_> {
    fn mesh(&mut self, sections: MeshFile, hostname: &str, given: Option<&Path>) -> Option<Mesh> {
        let MeshFile {
            mesh,
            control,
            agent,
            gateway,
            idp,
            vault,
            service,
            traffic,
            zones,
            workload,
            limits,
            telemetry,
            traces,
            policy,
        } = sections;

        let trust_domain = match TrustDomain::new(mesh.trust_domain.get_ref()) {
            Ok(trust_domain) => Some(trust_domain),
            Err(error) => {
                let hint = "write the bare name, such as bank.example";
                self.report(&mesh.trust_domain, format!("not a trust domain: {error}"), Some(hint.into()));
                None
            }
        };
        let policies = given.map_or_else(|| self.path(&mesh.policies), Path::to_owned);
        if given.is_none() && policy.is_none() && !policies.is_dir() {
            let message = format!("there is no directory `{}`", mesh.policies.get_ref());
            let hint = "a relative path starts at mesh.toml's own directory; without policies every request is refused";
            self.report(&mesh.policies, message, Some(hint.into()));
        }
        let mode = mesh.mode.map_or(Mode::Enforce, Spanned::into_inner);

        let control = self.control(&control);
        let agent = self.agent(&agent, control.as_ref(), hostname);
        let issuer = idp.as_ref().and_then(|idp| self.idp(idp));
        let names = self.names(&service);
        let gateway = gateway.as_ref().map(|gateway| self.gateway(gateway, issuer.as_ref(), &names));
        let vault = vault.as_ref().map(|vault| self.vault(vault));
        let mut services = BTreeMap::new();
        for (name, section) in &service {
            if let Some((name, service)) = self.service(name, section, trust_domain.as_ref(), &names) {
                // Its own are `policy check`'s to miss, as they always were.
                if let (Some(shared), None) = (&section.policies, &policy)
                    && service.policies != name
                {
                    self.has_policies(shared, &policies);
                }
                services.insert(name, service);
            }
        }
        let traffic =
            self.traffic(traffic, |name| match services.iter().find(|(known, _)| known.as_str() == name) {
                Some((_, service)) => Ok(service.app_protocol.carries()),
                None => Err(format!("unknown service `{name}`")),
            });
        let mut workloads = BTreeMap::new();
        for (name, section) in &workload {
            if let Some(workload) = self.workload(name, section, trust_domain.as_ref()) {
                workloads.insert(name.get_ref().clone(), workload);
            }
        }
        for (written, section) in &service {
            for writer in &section.relations_writers {
                let known: BTreeSet<&str> = names
                    .iter()
                    .map(ServiceName::as_str)
                    .chain(workload.keys().map(|w| w.get_ref().as_str()))
                    .collect();
                self.writer(written.get_ref(), writer, &known);
            }
        }
        let memory = self.memory(limits.memory.as_ref());
        let mesh = Mesh {
            file: self.file.to_owned(),
            mesh: Whole { trust_domain: trust_domain?, policies, mode },
            control: control?,
            agent: agent?,
            gateway: gateway.flatten(),
            idp: issuer,
            vault: vault.flatten(),
            service: services,
            traffic_written: traffic
                .keys()
                .filter_map(|name| Some((name.clone(), self.written("traffic", name.as_str(), None)?)))
                .collect(),
            traffic,
            zones: self.zones(&zones),
            workload: workloads,
            limits: Limits { memory: memory? },
            telemetry: Telemetry {
                access_log: telemetry.access_log.unwrap_or(true),
                personal: telemetry.personal,
                log: telemetry.log.map_or_else(|| "info".to_owned(), Spanned::into_inner),
            },
            traces: traces.and_then(|section| self.traces(&section)),
            policy: policy.and_then(|section| self.policy(&section)),
        };
        self.told_apart(&mesh, &service);
        Some(mesh)
    }
}

/// One section each.
impl Check<'_> {
    fn control(&mut self, section: &super::file::ControlSection) -> Option<Control> {
        let listen = self.bind(section.listen.as_ref(), "127.0.0.1:4810", "control's listen", Reach::Any);
        let console =
            self.bind(section.console.as_ref(), "127.0.0.1:4811", "control's console", Reach::Loopback);
        let svid_ttl =
            self.duration(section.svid_ttl.as_ref(), Duration::from_secs(3600), MIN_SVID_TTL..=MAX_SVID_TTL);
        let half = svid_ttl.map_or(Duration::ZERO, |ttl| ttl / 2);
        let rotate_after =
            self.duration(section.rotate_after.as_ref(), half, Duration::from_secs(1)..=MAX_SVID_TTL);
        if let (Some(ttl), Some(rotate), Some(text)) = (svid_ttl, rotate_after, section.rotate_after.as_ref())
            && rotate >= ttl
        {
            let ttl = humantime::format_duration(ttl);
            let hint = "leave it out to rotate at half of svid_ttl";
            self.report(
                text,
                format!("rotate_after is not before the SVID's end at {ttl}"),
                Some(hint.into()),
            );
        }
        Some(Control {
            listen: listen?,
            admin_socket: self.path_or(section.admin_socket.as_ref(), "/run/palisade/control.sock"),
            console: console?,
            state: self.path_or(section.state.as_ref(), "/var/lib/palisade/control"),
            svid_ttl: svid_ttl?,
            rotate_after: rotate_after?,
        })
    }

    fn policy(&mut self, section: &PolicySection) -> Option<PolicySource> {
        let text = |text: &Option<Text>, default: &str| {
            text.as_ref().map_or_else(|| default.to_owned(), |text| text.get_ref().clone())
        };
        let written = section.repository.get_ref();
        let is_url = written.contains("://") || (written.contains(':') && !written.starts_with(['/', '.']));
        let repository =
            if is_url { written.clone() } else { self.path(&section.repository).display().to_string() };
        if written.is_empty() || written.starts_with('-') {
            let hint = "write a directory, or a URL such as https://git.bank.example/policies.git";
            self.report(&section.repository, format!("`{written}` is no repository"), Some(hint.into()));
        }
        let branch = text(&section.branch, "main");
        let plain = |text: &str| {
            !text.is_empty()
                && !text.starts_with(['-', '/', '.'])
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-._".contains(&b))
                && !text.contains("..")
        };
        if let Some(at) = section.branch.as_ref().filter(|_| !plain(&branch)) {
            self.report(at, format!("`{branch}` is no branch"), Some("write its name, such as main".into()));
        }
        let directory = text(&section.directory, "policies");
        if let Some(at) = section.directory.as_ref().filter(|_| directory != "." && !plain(&directory)) {
            let hint = "write it from the repository's root, such as policies, or . for the root itself";
            self.report(at, format!("`{directory}` is no directory of a repository"), Some(hint.into()));
        }
        let every = Duration::from_secs(if is_url { 15 } else { 1 });
        let every =
            self.duration(section.every.as_ref(), every, Duration::from_secs(1)..=Duration::from_secs(3600));
        let allowed_signers = section.allowed_signers.as_ref().map(|path| self.path(path));
        Some(PolicySource { repository, branch, directory, allowed_signers, every: every? })
    }

    fn agent(
        &mut self,
        section: &super::file::AgentSection,
        control: Option<&Control>,
        hostname: &str,
    ) -> Option<Agent> {
        let reached = match &section.control {
            Some(text) => self.host_port(text),
            None => control.and_then(|control| self.same_place(control.listen)),
        };
        let host = section.host.as_ref().map_or(hostname, |text| text.get_ref());
        // The name becomes the last segment of the agent's own SPIFFE ID.
        let fits = TrustDomain::new("td").and_then(|td| td.workload(&format!("/palisade/agent/{host}")));
        if let Err(error) = fits.map_err(|error| error.to_string()).and_then(|id| {
            if id.path().split('/').count() == 4 { Ok(()) } else { Err("it holds a '/'".to_owned()) }
        }) {
            let message = format!("{host:?} cannot be part of a SPIFFE ID: {error}");
            let hint = "give the host a plain name with [agent] host".to_owned();
            match &section.host {
                Some(text) => self.report(text, message, Some(hint)),
                None => self
                    .problems
                    .push(Problem::file(self.file, format!("this machine's name {message}")).hint(hint)),
            }
        }
        Some(Agent {
            socket: self.path_or(section.socket.as_ref(), "/run/palisade/agent.sock"),
            state: self.path_or(section.state.as_ref(), "/var/lib/palisade/agent"),
            control: reached?,
            host: host.to_owned(),
        })
    }

    fn gateway(
        &mut self,
        section: &super::file::GatewaySection,
        idp: Option<&Idp>,
        names: &BTreeSet<ServiceName>,
    ) -> Option<Gateway> {
        let listen = self.bind(Some(&section.listen), "", "the gateway's listen", Reach::Any);
        let public_url = match &section.public_url {
            Some(text) => self.url(text),
            None => listen.and_then(|listen| self.own_url(listen, &section.listen, "public_url")),
        };
        let issuer = match &section.issuer {
            Some(text) => self.url(text),
            None => match idp {
                Some(idp) => Some(idp.issuer.clone()),
                None if self.declared.contains("idp") => None,
                None => {
                    let hint = "add issuer = \"https://…\", or an [idp] section for the embedded provider";
                    self.report(
                        &section.listen,
                        "the gateway has nobody to log people in with".into(),
                        Some(hint.into()),
                    );
                    None
                }
            },
        };
        let mut routes = BTreeMap::new();
        for (prefix, service) in &section.routes {
            let plain = prefix.get_ref().starts_with('/')
                && !prefix.get_ref().contains("//")
                && prefix.get_ref().bytes().all(|b| b.is_ascii_alphanumeric() || b"/-._~".contains(&b))
                && !prefix.get_ref().split('/').any(|segment| segment == "." || segment == "..");
            if !plain {
                let hint = "a route is a path prefix such as \"/\" or \"/api\"";
                self.report(prefix, format!("`{}` is no path prefix", prefix.get_ref()), Some(hint.into()));
            }
            if let Some(name) = self.known_service(service, names) {
                routes.insert(prefix.get_ref().clone(), name);
            }
        }
        if section.routes.is_empty() {
            let hint = "add routes = { \"/\" = \"SERVICE\" }";
            self.report(&section.listen, "the gateway has no routes".into(), Some(hint.into()));
        }
        let attest = self.attest(&section.attest);
        let public_url = public_url?;
        let text = |text: &Option<Text>| text.as_ref().map(|text| text.get_ref().clone());
        Some(Gateway {
            listen: listen?,
            issuer: issuer?,
            issuer_ca: self.path_or(section.issuer_ca.as_ref(), SYSTEM_AUTHORITIES),
            scopes: section.scopes.iter().map(|scope| scope.get_ref().clone()).collect(),
            client_id: text(&section.client_id).unwrap_or_else(|| "palisade-gateway".to_owned()),
            audience: text(&section.audience).unwrap_or_else(|| origin(&public_url)),
            public_url,
            routes,
            proxies: self.proxies(&section.proxy_protocol_from),
            state: self.path_or(section.state.as_ref(), "/var/lib/palisade/gateway"),
            attest: attest?,
        })
    }

    fn idp(&mut self, section: &super::file::IdpSection) -> Option<Idp> {
        let listen = self.bind(Some(&section.listen), "", "the provider's listen", Reach::Any);
        let issuer = match &section.issuer {
            Some(text) => self.url(text),
            None => listen.and_then(|listen| self.own_url(listen, &section.listen, "issuer")),
        };
        let attest = self.attest(&section.attest);
        Some(Idp {
            listen: listen?,
            issuer: issuer?,
            users: self.path(&section.users),
            state: self.path_or(section.state.as_ref(), "/var/lib/palisade/idp"),
            clients: section
                .clients
                .iter()
                .map(|(name, audience)| (name.get_ref().clone(), audience.get_ref().clone()))
                .collect(),
            attest: attest?,
        })
    }

    fn vault(&mut self, section: &super::file::VaultSection) -> Option<Vault> {
        let listen = self.bind(Some(&section.listen), "", "the vault's listen", Reach::Dialled);
        let operator =
            self.bind(section.operator.as_ref(), "127.0.0.1:8201", "the vault's operator", Reach::Loopback);
        let state = self.path_or(section.state.as_ref(), "/var/lib/palisade/vault");
        let audit = section.audit.as_ref().map_or_else(|| state.join("audit.log"), |text| self.path(text));
        Some(Vault {
            listen: listen?,
            operator: operator?,
            state,
            audit,
            attest: self.attest(&section.attest)?,
        })
    }

    fn service(
        &mut self,
        written: &Spanned<String>,
        section: &super::file::ServiceSection,
        trust_domain: Option<&TrustDomain>,
        names: &BTreeSet<ServiceName>,
    ) -> Option<(ServiceName, Service)> {
        // A bad name has been reported where the names were gathered.
        let name = ServiceName::new(written.get_ref()).ok();
        let what = |part: &str| format!("{}'s {part}", written.get_ref());
        let policies = match &section.policies {
            Some(written) => self.service_name(written),
            None => name.clone(),
        };
        let host = section.host.as_ref().map_or(ANY_HOST, |host| host.get_ref()).to_owned();
        let app = self.bind_on(&host, Some(&section.app), "", &what("app"), Reach::Loopback);
        // Where others are told where to dial, it may listen on all addresses.
        let reach = if section.endpoints.is_empty() { Reach::Dialled } else { Reach::Any };
        let inbound = self.bind_on(&host, Some(&section.inbound), "", &what("inbound"), reach);
        let (hbone, known) = (section.hbone.as_ref(), &section.hbone_destinations);
        let hbone = self.hbone(&host, &what("hbone"), hbone, known, app);
        let proxies = self.proxies(&section.proxy_protocol_from);
        let endpoints = match section.endpoints.as_slice() {
            [] => inbound.map(|inbound| Found::At(vec![inbound].into())),
            [only] if only.get_ref() == BY_CONTROL => Some(Found::ByControl),
            texts => self.endpoints(texts).map(Found::At),
        };
        let admin = self.bind_on(&host, Some(&section.admin), "", &what("admin"), Reach::Loopback);
        let id = trust_domain.and_then(|td| self.id(section.id.as_ref(), "service", written, td));
        let mut calls = BTreeMap::new();
        for (callee, address) in &section.calls {
            let at = self.bind_on(
                &host,
                Some(address),
                "",
                &what(&format!("calls.{}", callee.get_ref())),
                Reach::Loopback,
            );
            if let (Some(callee), Some(at)) = (self.callee(callee, name.as_ref(), names), at) {
                calls.insert(callee, at);
            }
        }
        let mut secrets = Vec::new();
        for secret in &section.secrets {
            let plain = secret.get_ref().split('/').all(|segment| {
                !matches!(segment, "" | "." | "..")
                    && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            });
            if !plain {
                let hint =
                    "a secret is named like accounts/db-key, without the mount and without a leading slash";
                self.report(secret, format!("`{}` names no secret", secret.get_ref()), Some(hint.into()));
            }
            secrets.push(secret.get_ref().clone());
        }
        if let Some(first) = section.secrets.first()
            && !self.declared.contains("vault")
        {
            self.report(first, "there is no [vault] to read secrets from".into(), None);
        }
        let capture = section.capture.as_ref().and_then(|capture| self.capture(capture));
        let mut addresses: Vec<SocketAddr> =
            section.addresses.iter().filter_map(|text| self.dialled(text)).collect();
        if let (true, Some(Found::At(Source::Static(list))), Some(app)) =
            (section.addresses.is_empty(), &endpoints, app)
        {
            addresses.extend(list.iter().map(|endpoint| SocketAddr::new(endpoint.address.ip(), app.port())));
        }
        let timeouts = Duration::from_millis(1)..=MAX_TIMEOUT;
        let request_timeout =
            self.duration(section.request_timeout.as_ref(), Duration::from_secs(30), timeouts.clone());
        let drain_timeout = self.duration(section.drain_timeout.as_ref(), Duration::from_secs(10), timeouts);
        let attest = self.attest(&section.attest);
        let service = Service {
            id: id?,
            policies: policies?,
            host,
            app: app?,
            inbound: inbound?,
            proxies,
            hbone,
            endpoints: endpoints?,
            admin: admin?,
            attest: attest?,
            calls,
            capture,
            addresses,
            secrets,
            relations_writers: section.relations_writers.iter().map(|name| name.get_ref().clone()).collect(),
            app_protocol: section.app_protocol.unwrap_or(AppProtocol::Http1),
            request_timeout: request_timeout?,
            rate_limit: section.rate_limit.clone(),
            rate_limit_written: self.written("service", written.get_ref(), Some("rate_limit")),
            health: section.health.clone(),
            health_written: self.written("service", written.get_ref(), Some("health")),
            drain_timeout: drain_timeout?,
        };
        Some((name?, service))
    }
}

/// Names and references.
impl Check<'_> {
    fn names(
        &mut self,
        services: &BTreeMap<Spanned<String>, super::file::ServiceSection>,
    ) -> BTreeSet<ServiceName> {
        let mut names = BTreeSet::new();
        for written in services.keys() {
            match ServiceName::new(written.get_ref()) {
                Ok(name) => {
                    names.insert(name);
                }
                Err(message) => self.report(written, message, None),
            }
        }
        names
    }

    fn service_name(&mut self, written: &Text) -> Option<ServiceName> {
        let name = ServiceName::new(written.get_ref());
        name.map_err(|message| self.report(written, message, None)).ok()
    }

    /// Who may write the relations of `of`'s objects: a service or a workload of this file.
    fn writer(&mut self, of: &str, written: &Text, known: &BTreeSet<&str>) {
        let name = written.get_ref().as_str();
        if name == of {
            let hint = "a service writes its own relations without being named";
            self.report(written, format!("`{name}` is the service itself"), Some(hint.into()));
        } else if !known.contains(name) {
            let hint = suggest(name, known.iter().copied())
                .unwrap_or_else(|| "name a [service.NAME] or a [workload.NAME]".to_owned());
            self.report(written, format!("there is no service and no workload `{name}`"), Some(hint));
        }
    }

    /// Policies that several services share are nobody's own, so nothing else would tell that they are not there.
    fn has_policies(&mut self, written: &Text, directory: &Path) {
        let services = directory.join("services");
        let name = written.get_ref();
        if services.join(name).is_dir() || !directory.is_dir() {
            return;
        }
        let there = std::fs::read_dir(&services).into_iter().flatten().flatten();
        let there: Vec<_> = there.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        let hint = suggest(name, there.iter().map(String::as_str)).unwrap_or_else(|| {
            format!("make services/{name}/ there, with a schema, map.toml and at least one policy")
        });
        let message = format!("there are no policies of `{name}` in {}", directory.display());
        self.report(written, message, Some(hint));
    }

    fn known_service(&mut self, written: &Text, names: &BTreeSet<ServiceName>) -> Option<ServiceName> {
        let known = names.iter().find(|name| name.as_str() == written.get_ref());
        if known.is_none() && !self.declared.contains(&format!("service.{}", written.get_ref())) {
            let hint = suggest(written.get_ref(), names.iter().map(ServiceName::as_str))
                .unwrap_or_else(|| format!("add a section [service.{}]", written.get_ref()));
            self.report(written, format!("unknown service `{}`", written.get_ref()), Some(hint));
        }
        known.cloned()
    }

    fn callee(
        &mut self,
        written: &Text,
        caller: Option<&ServiceName>,
        names: &BTreeSet<ServiceName>,
    ) -> Option<Callee> {
        if written.get_ref() == "vault" {
            if !self.declared.contains("vault") {
                self.report(
                    written,
                    "there is no [vault] to call".into(),
                    Some("add a [vault] section".into()),
                );
            }
            return Some(Callee::Vault);
        }
        let name = self.known_service(written, names)?;
        if caller == Some(&name) {
            self.report(
                written,
                format!("`{name}` calls itself"),
                Some("an app reaches itself without its sidecar".into()),
            );
        }
        Some(Callee::Service(name))
    }

    fn workload(
        &mut self,
        name: &Spanned<String>,
        section: &super::file::WorkloadSection,
        trust_domain: Option<&TrustDomain>,
    ) -> Option<Workload> {
        let id = trust_domain.and_then(|td| self.id(section.id.as_ref(), "workload", name, td));
        let attest = self.attest(&section.attest);
        let ttl = match &section.ttl {
            Some(text) => Some(self.duration(Some(text), MIN_SVID_TTL, MIN_SVID_TTL..=MAX_SVID_TTL)?),
            None => None,
        };
        let host = section.host.as_ref().map_or(ANY_HOST, |host| host.get_ref()).to_owned();
        Some(Workload { id: id?, host, attest: attest?, ttl })
    }

    /// The identity given, or `spiffe://TD/KIND/NAME`.
    fn id(
        &mut self,
        text: Option<&Text>,
        kind: &str,
        name: &Spanned<String>,
        td: &TrustDomain,
    ) -> Option<SpiffeId> {
        let Some(text) = text else {
            let id = td.workload(&format!("/{kind}/{}", name.get_ref()));
            return match id {
                Ok(id) => Some(id),
                Err(error) => {
                    let hint = "a name of a-z, 0-9 and '-' is part of the identity, unless id gives another";
                    self.report(
                        name,
                        format!("`{}` cannot be part of a SPIFFE ID: {error}", name.get_ref()),
                        Some(hint.into()),
                    );
                    None
                }
            };
        };
        let id = match SpiffeId::new(text.get_ref()) {
            Ok(id) => id,
            Err(error) => {
                let hint = format!("for example spiffe://{td}/{kind}/{}", name.get_ref());
                self.report(text, format!("not a SPIFFE ID: {error}"), Some(hint));
                return None;
            }
        };
        if id.trust_domain() != td {
            let hint = format!("an identity of this mesh starts with spiffe://{td}/");
            self.report(
                text,
                format!("the identity is of another trust domain, {}", id.trust_domain()),
                Some(hint),
            );
        }
        if id.path() == "/palisade" || id.path().starts_with("/palisade/") {
            let hint = "identities below /palisade/ belong to the mesh's own processes";
            self.report(text, format!("`{id}` is reserved"), Some(hint.into()));
        }
        Some(id)
    }

    /// Two processes with the same selectors would each get the other's identity too.
    fn told_apart(&mut self, mesh: &Mesh, services: &BTreeMap<Spanned<String>, super::file::ServiceSection>) {
        let all = mesh.registrations();
        for (i, one) in all.iter().enumerate() {
            for other in all.iter().take(i) {
                let place = services.get_key_value(&Spanned::new(0..0, one.name.clone()));
                let place = place.or_else(|| services.get_key_value(&Spanned::new(0..0, other.name.clone())));
                let mut complain = |message: String, hint: &str| match place {
                    Some((name, _)) => self.report(name, message, Some(hint.to_owned())),
                    None => self.problems.push(Problem::file(self.file, message).hint(hint)),
                };
                if one.id == other.id {
                    complain(
                        format!("`{}` and `{}` have the same identity {}", other.name, one.name, one.id),
                        "every service has its own",
                    );
                }
                let (a, b) = match (covers(&one.attest, &other.attest), covers(&other.attest, &one.attest)) {
                    _ if one.host != other.host => continue,
                    (false, false) => continue,
                    (true, true) => {
                        let message = format!(
                            "`{}` and `{}` attest alike: either would get both identities",
                            other.name, one.name
                        );
                        complain(message, "tell them apart by uid, gid, path or sha256");
                        continue;
                    }
                    (true, false) => (one, other),
                    (false, true) => (other, one),
                };
                complain(
                    format!(
                        "whatever attests as `{}` attests as `{}` too: it would get both identities",
                        b.name, a.name
                    ),
                    &format!("give `{}` a selector that `{}` does not have", a.name, b.name),
                );
            }
        }
    }
}

/// Whether every process that `narrow` describes is one that `wide` describes.
fn covers(wide: &Attest, narrow: &Attest) -> bool {
    fn within<T: PartialEq>(wide: Option<&T>, narrow: Option<&T>) -> bool {
        wide.is_none_or(|wide| narrow == Some(wide))
    }
    within(wide.uid.as_ref(), narrow.uid.as_ref())
        && within(wide.gid.as_ref(), narrow.gid.as_ref())
        && within(wide.path.as_ref(), narrow.path.as_ref())
        && within(wide.sha256.as_ref(), narrow.sha256.as_ref())
}

/// A URL without the slash that stands for its empty path.
pub(crate) fn origin(url: &Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}
