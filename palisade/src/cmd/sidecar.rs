//! `palisade sidecar`: the proxy beside one service, of a mesh or alone.

mod alone;
mod captured;

use std::net::SocketAddr;
use std::sync::Arc;

use identity::Scope;
use identity::clock::SharedClock;
use policy::ServicePolicy;
use sidecar::access::{AccessLog, AccessTarget};
use sidecar::app::AppProtocol;
use sidecar::capture::CaptureConfig;
use sidecar::upstream::UpstreamConfig;
use sidecar::{Call, InboundConfig, Sidecar, SidecarConfig};
use tokio::signal::unix::{SignalKind, signal};

use crate::Global;
use crate::cmd::capture;
use crate::decisions;
use crate::failure::{Exit, Failure};
use crate::listen;
use crate::mesh::{self, Callee, Mesh, Own, Service};
use crate::printer::Printer;
use crate::serve;
use crate::workload::{self, Workload, not_started};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The service's name in mesh.toml. Without it, --config names the sidecar.toml of a sidecar that
    /// runs alone: certificates from files, no control, no agent.
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
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
    match (&args.beside, &args.service) {
        (Some(Beside::Capture(_)), Some(_)) => {
            Err(Failure::usage("capture is a host's, not one service's").hint("leave out --service"))
        }
        (Some(Beside::Capture(args)), None) => capture::run(args, printer),
        (None, Some(service)) => of_mesh(service, global),
        (None, None) => alone::run(global),
    }
}

fn of_mesh(service_name: &str, global: &Global) -> Result<Exit, Failure> {
    let workload = Workload::begin(global)?;
    let found = workload.mesh.service.iter().find(|(name, _)| name.as_str() == service_name);
    let Some((_, service)) = found else {
        let names = || workload.mesh.service.keys().map(mesh::ServiceName::as_str);
        let hint = policy::suggest(service_name, names())
            .unwrap_or_else(|| format!("its services are {}", names().collect::<Vec<_>>().join(", ")));
        return Err(Failure::usage(format!("mesh.toml has no service `{service_name}`")).hint(hint));
    };
    let policy = workload.policy(service_name)?;
    let config = configure(service_name, service, policy, &workload.mesh)?;
    serve::run("sidecar", service.drain_timeout, async |scope| {
        let source = workload.identity(&scope);
        let recorder = decisions::recorder(&workload, &scope);
        let (clock, random) = (Arc::clone(&workload.clock), Arc::clone(&workload.random));
        let target = workload.mesh.telemetry.access_log.then_some(AccessTarget::Stderr);
        let access_log = access_log(target.as_ref(), &clock, &scope)?;
        let capture = captured::listen(service.capture.as_ref(), addresses(service, &workload.mesh))?;
        let config = SidecarConfig { access_log, capture, ..config };
        let sidecar = Sidecar::start(config, source, recorder, clock, random, &scope)
            .map_err(|error| not_started("the sidecar", &error))?;
        let (mesh, service) = (workload.mesh.clone(), service_name.to_owned());
        on_hangup(&scope, move || replace_policy(&sidecar, workload::policy(&mesh, &service)))
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

/// Has `reload` run at each SIGHUP (`systemctl reload`).
fn on_hangup(scope: &Scope, mut reload: impl FnMut() + Send + 'static) -> Result<(), Failure> {
    let mut hangup = signal(SignalKind::hangup())
        .map_err(|error| Failure::new("cannot listen for signals").because(&error))?;
    let draining = scope.clone();
    scope.spawn_critical("reload", async move {
        loop {
            tokio::select! {
                _ = hangup.recv() => reload(),
                () = draining.draining() => return,
            }
        }
    });
    Ok(())
}

/// Puts the policies in force that are on disk now. Ones that are wrong change nothing: what was in force
/// stays so, and the log says what is wrong.
fn replace_policy(sidecar: &Sidecar, read: Result<Arc<ServicePolicy>, Failure>) {
    match read {
        Ok(policy) => {
            tracing::info!(version = %policy.version(), "policies reloaded");
            sidecar.replace_policy(policy);
        }
        Err(failure) => tracing::error!(
            reason = failure.message,
            problems = ?failure.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "policies not reloaded; the ones before stay in force"
        ),
    }
}

fn protocol(protocol: mesh::AppProtocol) -> AppProtocol {
    match protocol {
        mesh::AppProtocol::Http1 => AppProtocol::Http1,
        mesh::AppProtocol::H2c => AppProtocol::H2c,
    }
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

fn configure(
    name: &str,
    service: &Service,
    policy: Arc<ServicePolicy>,
    mesh: &Mesh,
) -> Result<SidecarConfig, Failure> {
    let key = |part: &str| format!("[service.{name}] {part}");
    let inbound = listen::tcp("the sidecar", &key("inbound"), service.inbound)?;
    let admin = listen::tcp("the sidecar's admin port", &key("admin"), service.admin)?;
    let mut calls = Vec::new();
    for (callee, address) in &service.calls {
        let listener = listen::tcp(&format!("the calls to {callee}"), &key("calls"), *address)?;
        let target = match callee {
            Callee::Vault => {
                mesh.vault.as_ref().and_then(|vault| Some((mesh.own_id(Own::Vault)?, vault.listen)))
            }
            Callee::Service(callee) => {
                mesh.service.get(callee).map(|callee| (callee.id.clone(), callee.inbound))
            }
        };
        let Some((id, endpoint)) = target else {
            return Err(Failure::invalid(format!("mesh.toml says nothing of {callee}, which {name} calls")));
        };
        calls.push(Call {
            listener,
            upstream: UpstreamConfig {
                service: callee.to_string(),
                id,
                endpoints: vec![endpoint],
                response_timeout: service.request_timeout,
            },
        });
    }
    Ok(SidecarConfig {
        id: service.id.clone(),
        inbound: Some(InboundConfig {
            service: name.to_owned(),
            listener: inbound,
            app: service.app,
            app_protocol: protocol(service.app_protocol),
            policy,
            gateways: mesh.own_id(Own::Gateway).into_iter().collect(),
            request_timeout: service.request_timeout,
        }),
        calls,
        capture: CaptureConfig::default(),
        admin: Some(admin),
        access_log: None,
    })
}
