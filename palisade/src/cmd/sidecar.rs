//! `palisade sidecar`: the proxy beside one service, of a mesh or alone.

mod alone;
mod captured;
mod succession;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use identity::Scope;
use identity::clock::SharedClock;
use policy::{Mapping, ServicePolicy};
use sidecar::access::{AccessLog, AccessTarget};
use sidecar::capture::CaptureConfig;
use sidecar::overload::Budget;
use sidecar::traffic::config::Traffic;
use sidecar::upstream::UpstreamConfig;
use sidecar::{Call, Carries, HboneConfig, InboundConfig, Sidecar, SidecarConfig};

use crate::Global;
use crate::cmd::capture;
use crate::decisions;
use crate::discovery::{self, Discovery};
use crate::failure::{Exit, Failure};
use crate::listen::Listeners;
use crate::mesh::{self, AppProtocol, Callee, Hbone, Mesh, Own, Service, ServiceName};
use crate::policies;
use crate::printer::Printer;
use crate::relations;
use crate::rlimits;
use crate::serve::{self, Started};
use crate::workload::{Workload, not_started};
use alone::Alone;
use succession::Succession;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The service's name in mesh.toml. Without it, --config names the sidecar.toml of a sidecar that
    /// runs alone: certificates from files, no control, no agent.
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// Where it takes over from the sidecar that serves now, and later hands over to its successor: a Unix
    /// socket. Default: sidecar-NAME.sock in $RUNTIME_DIRECTORY, if that is set; NAME is the service's, or
    /// that of sidecar.toml.
    #[arg(long, value_name = "SOCKET")]
    handover: Option<PathBuf>,
    #[command(subcommand)]
    beside: Option<Beside>,
}

/// What there is to do beside running it.
#[derive(Debug, clap::Subcommand)]
enum Beside {
    /// Have the kernel bring connections here that were meant for others: on, off, show.
    Capture(capture::Args),
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    if let Some(Beside::Capture(wanted)) = &args.beside {
        if args.service.is_some() {
            let failure = Failure::usage("capture is a host's, not one service's");
            return Err(failure.hint("leave out --service"));
        }
        return capture::run(wanted, printer);
    }
    let name = args.service.as_deref().or_else(|| global.config.file_stem()?.to_str());
    let place = args.handover.clone().or_else(|| succession::default_place(name?));
    let prepared = Prepared::read(args.service.as_deref(), place, global)?;
    let (workers, drain_timeout) = (prepared.workers(), prepared.drain_timeout());
    serve::run_on(workers, "sidecar", drain_timeout, async |scope| prepared.start(scope).await)
}

/// A sidecar before it starts: what it reads has been read, its predecessor has been asked.
pub(crate) struct Prepared {
    kind: Kind,
    succession: Succession,
}

enum Kind {
    OfMesh(Box<OfMesh>),
    Alone(Box<Alone>),
}

impl Prepared {
    /// The sidecar of `service` in mesh.toml, or the one of the sidecar.toml that --config names. Takes over
    /// from the process that waits at `handover`, if there is one.
    pub(crate) fn read(
        service: Option<&str>,
        handover: Option<PathBuf>,
        global: &Global,
    ) -> Result<Self, Failure> {
        let Some(service) = service else {
            let alone = Alone::read(global)?;
            return Ok(Self { kind: Kind::Alone(Box::new(alone)), succession: Succession::begin(handover)? });
        };
        let (workload, policy) = OfMesh::read(service, global)?;
        let mut succession = Succession::begin(handover)?;
        let of_mesh = OfMesh::bind(workload, service, policy, &mut succession.listeners)?;
        Ok(Self { kind: Kind::OfMesh(Box::new(of_mesh)), succession })
    }

    /// How many threads carry requests; `None` for one a processor.
    pub(crate) fn workers(&self) -> Option<NonZeroUsize> {
        match &self.kind {
            Kind::OfMesh(_) => None,
            Kind::Alone(alone) => alone.workers(),
        }
    }

    /// How long requests under way may go on at the end.
    pub(crate) fn drain_timeout(&self) -> Duration {
        match &self.kind {
            Kind::OfMesh(of_mesh) => of_mesh.drain_timeout,
            Kind::Alone(alone) => alone.drain_timeout(),
        }
    }

    /// Starts it in `scope`. It is ready once it has its identity.
    pub(crate) async fn start(self, scope: Scope) -> Result<Started<Arc<Sidecar>>, Failure> {
        match self.kind {
            Kind::OfMesh(of_mesh) => of_mesh.start(self.succession, scope).await,
            Kind::Alone(alone) => alone.start(self.succession, scope).await,
        }
    }
}

/// The sidecar of a service in mesh.toml, its ports bound.
struct OfMesh {
    workload: Workload,
    service: String,
    drain_timeout: Duration,
    config: SidecarConfig,
    discovery: Discovery,
}

impl OfMesh {
    fn read(name: &str, global: &Global) -> Result<(Workload, Arc<ServicePolicy>), Failure> {
        let workload = Workload::begin(global)?;
        let service = service(&workload.mesh, name)?;
        let policy = policies::at_start(&workload, service.policies.as_str())?;
        Ok((workload, policy))
    }

    fn bind(
        workload: Workload,
        name: &str,
        policy: Arc<ServicePolicy>,
        listeners: &mut Listeners,
    ) -> Result<Self, Failure> {
        let service = service(&workload.mesh, name)?;
        let (config, discovery) = configure(name, service, policy, &workload.mesh, listeners)?;
        listeners.all_wanted()?;
        let drain_timeout = service.drain_timeout;
        Ok(Self { service: name.to_owned(), drain_timeout, config, discovery, workload })
    }

    async fn start(self, succession: Succession, scope: Scope) -> Result<Started<Arc<Sidecar>>, Failure> {
        let Self { workload, service, config, discovery, .. } = self;
        let source = workload.identity(&scope);
        let recorder = decisions::recorder(&workload, &scope);
        let (clock, random) = (Arc::clone(&workload.clock), Arc::clone(&workload.random));
        let target = workload.mesh.telemetry.access_log.then_some(AccessTarget::Stderr);
        let access_log = access_log(target.as_ref(), &clock, &scope)?;
        let own = self::service(&workload.mesh, &service)?;
        let decided = own.policies.to_string();
        let capture = captured::listen(own.capture.as_ref(), addresses(own, &workload.mesh), &clock)?;
        let traces = workload.mesh.traces.clone();
        let config = SidecarConfig { access_log, traces, capture, ..config };
        let at_start = config.inbound.as_ref().map(|inbound| Arc::clone(&inbound.policy));
        let followed = at_start.and_then(|policy| {
            policies::follow(&workload, &decided, &source, policy, Some(own.app_protocol), &scope)
        });
        let ready =
            workload.identified(source.clone(), Some(config.id.clone()), policies::awaited(&followed));
        discovery.follow(&workload, &scope);
        succession.wait(&ready, &clock).await?;
        let sidecar = Sidecar::start(config, source, recorder, clock.clone(), random, &scope)
            .map_err(|error| not_started("the sidecar", &error))?;
        succession.take_over(clock, &scope).await?;
        let sidecar = Arc::new(sidecar);
        discovery::announce(own, &workload, sidecar.app_is_well(), &scope)?;
        relations::follow(&workload, &sidecar, &scope);
        let (in_force, told) = (Arc::clone(&sidecar), Arc::clone(&sidecar));
        let put = move |policy| in_force.replace_policy(policy);
        policies::apply(followed, put, move |stale| told.policy_is_stale(stale), &scope);
        let (reloaded, mesh) = (Arc::clone(&sidecar), workload.mesh);
        let reload = move || policies::reload(&mesh, &decided, |policy| reloaded.replace_policy(policy));
        Ok(Started::new(sidecar).ready_when(ready).reloaded_by(reload))
    }
}

fn service<'a>(mesh: &'a Mesh, wanted: &str) -> Result<&'a Service, Failure> {
    let found = mesh.service.iter().find(|(name, _)| name.as_str() == wanted);
    found.map(|(_, service)| service).ok_or_else(|| {
        let names = || mesh.service.keys().map(mesh::ServiceName::as_str);
        let hint = policy::suggest(wanted, names())
            .unwrap_or_else(|| format!("its services are {}", names().collect::<Vec<_>>().join(", ")));
        Failure::usage(format!("mesh.toml has no service `{wanted}`")).hint(hint)
    })
}

/// The access log, if one is wanted.
fn access_log(
    target: Option<&AccessTarget>,
    clock: &SharedClock,
    scope: &Scope,
) -> Result<Option<Arc<AccessLog>>, Failure> {
    let Some(target) = target else { return Ok(None) };
    AccessLog::open(target.clone(), Arc::clone(clock), scope).map(Some).map_err(|error| {
        Failure::new(format!("the access log cannot be written to {target}"))
            .because(&error)
            .hint("set another file, stdout or off with [telemetry] access_log")
    })
}

/// What an app speaks and what its map says belong together.
fn fits(app: AppProtocol, policy: &ServicePolicy, section: &str) -> Result<(), Failure> {
    if app.fits(policy.mapping()) {
        return Ok(());
    }
    let mapping = match policy.mapping() {
        Mapping::Tcp => "tcp",
        Mapping::Kafka => "kafka",
        Mapping::Routes | Mapping::None => {
            let app = app.name();
            let message =
                format!("{section} says app_protocol = \"{app}\", and the service's map.toml maps requests");
            return Err(Failure::invalid(message)
                .hint(format!("write mapping = \"{app}\" in map.toml, or leave app_protocol out")));
        }
    };
    let message = format!("the service's map.toml says mapping = \"{mapping}\", and {section} does not");
    Err(Failure::invalid(message).hint(format!("add app_protocol = \"{mapping}\"")))
}

/// Where apps that know of no sidecar dial those whom `service` calls.
fn addresses(service: &Service, mesh: &Mesh) -> impl Iterator<Item = (String, Vec<SocketAddr>)> {
    service.calls.keys().map(|callee| {
        let addresses = match callee {
            Callee::Vault => mesh.vault.iter().map(|vault| vault.listen).collect(),
            Callee::Service(name) => {
                mesh.service.get(name).into_iter().flat_map(Service::dialled_at).collect()
            }
        };
        (callee.to_string(), addresses)
    })
}

/// Whom the service calls only because the traffic of those that it does call names them.
fn others(service: &Service, mesh: &Mesh, discovery: &mut Discovery) -> Vec<(UpstreamConfig, Traffic)> {
    let called = service.calls.keys().filter_map(|callee| match callee {
        Callee::Service(name) => Some(name),
        Callee::Vault => None,
    });
    let called: BTreeSet<&str> = called.map(ServiceName::as_str).collect();
    let traffic = mesh.traffic.iter().filter(|(name, _)| called.contains(name.as_str()));
    let named: BTreeSet<&str> = traffic.flat_map(|(_, traffic)| traffic.named()).collect();
    let others = mesh
        .service
        .iter()
        .filter(|(name, _)| named.contains(name.as_str()) && !called.contains(name.as_str()));
    let others = others.map(|(name, other)| {
        let upstream = UpstreamConfig {
            service: name.to_string(),
            id: other.id.clone(),
            endpoints: discovery.source(other),
            response_timeout: service.request_timeout,
        };
        (upstream, mesh.traffic.get(name).cloned().unwrap_or_default())
    });
    others.collect()
}

/// Where another mesh's proxies come in, if they may.
fn second_way(
    hbone: Option<&Hbone>,
    key: &str,
    listeners: &mut Listeners,
) -> Result<Option<HboneConfig>, Failure> {
    let Some(Hbone { listen, destinations }) = hbone else { return Ok(None) };
    let listener = listeners.tcp("hbone", "the sidecar's second way in", key, *listen)?;
    Ok(Some(HboneConfig { listener, destinations: destinations.clone() }))
}

fn configure(
    name: &str,
    service: &Service,
    policy: Arc<ServicePolicy>,
    mesh: &Mesh,
    listeners: &mut Listeners,
) -> Result<(SidecarConfig, Discovery), Failure> {
    let key = |part: &str| format!("[service.{name}] {part}");
    if policy.withheld().is_none() {
        fits(service.app_protocol, &policy, &format!("mesh.toml: [service.{name}]"))?;
    }
    let inbound = listeners.tcp("inbound", "the sidecar", &key("inbound"), service.inbound)?;
    let admin = listeners.tcp("admin", "the sidecar's admin port", &key("admin"), service.admin)?;
    let hbone = second_way(service.hbone.as_ref(), &key("hbone"), listeners)?;
    let of = |callee: &Callee| match callee {
        Callee::Service(name) => mesh.traffic.get(name).cloned().unwrap_or_default(),
        Callee::Vault => Traffic::default(),
    };
    let (mut calls, mut discovery) = (Vec::new(), Discovery::default());
    for (callee, address) in &service.calls {
        let (socket, what) = (format!("outbound.{callee}"), format!("the calls to {callee}"));
        let listener = listeners.tcp(&socket, &what, &key("calls"), *address)?;
        let target = match callee {
            Callee::Vault => mesh.vault.as_ref().and_then(|vault| {
                Some((mesh.own_id(Own::Vault)?, vec![vault.listen].into(), Carries::Requests))
            }),
            Callee::Service(callee) => mesh
                .service
                .get(callee)
                .map(|callee| (callee.id.clone(), discovery.source(callee), callee.app_protocol.carries())),
        };
        let Some((id, endpoints, carries)) = target else {
            return Err(Failure::invalid(format!("mesh.toml says nothing of {callee}, which {name} calls")));
        };
        calls.push(Call {
            listener,
            upstream: UpstreamConfig {
                service: callee.to_string(),
                id,
                endpoints,
                response_timeout: service.request_timeout,
            },
            carries,
            traffic: of(callee),
        });
    }
    let others = others(service, mesh, &mut discovery);
    let config = SidecarConfig {
        id: service.id.clone(),
        inbound: Some(InboundConfig {
            service: name.to_owned(),
            listener: inbound,
            app: service.app,
            app_protocol: service.app_protocol.into(),
            policy,
            gateways: mesh.own_id(Own::Gateway).into_iter().collect(),
            request_timeout: service.request_timeout,
            proxies: service.proxies.clone(),
            hbone,
            rate_limit: service.rate_limit.clone(),
            health: service.health.clone(),
        }),
        ext_authz: None,
        calls,
        others,
        capture: CaptureConfig::default(),
        admin: Some(admin),
        access_log: None,
        traces: None,
        budget: Budget {
            memory_bytes: mesh.limits.memory.budget_bytes(),
            descriptors: rlimits::most_descriptors(),
        },
    };
    Ok((config, discovery))
}
