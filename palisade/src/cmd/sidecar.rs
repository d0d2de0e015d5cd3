//! `palisade sidecar`: the proxy beside one service.

use std::sync::Arc;

use identity::Scope;
use sidecar::app::AppProtocol;
use sidecar::upstream::UpstreamConfig;
use sidecar::{Call, Sidecar, SidecarConfig};
use tokio::signal::unix::{SignalKind, signal};

use crate::Global;
use crate::decisions;
use crate::failure::{Exit, Failure};
use crate::listen;
use crate::mesh::{self, Callee, Mesh, Own, Service};
use crate::serve;
use crate::workload::{self, Workload, not_started};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The service's name in mesh.toml.
    #[arg(long, value_name = "NAME")]
    service: String,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Exit, Failure> {
    let workload = Workload::begin(global)?;
    let found = workload.mesh.service.iter().find(|(name, _)| name.as_str() == args.service);
    let Some((_, service)) = found else {
        let names = || workload.mesh.service.keys().map(mesh::ServiceName::as_str);
        let hint = policy::suggest(&args.service, names())
            .unwrap_or_else(|| format!("its services are {}", names().collect::<Vec<_>>().join(", ")));
        return Err(Failure::usage(format!("mesh.toml has no service `{}`", args.service)).hint(hint));
    };
    let policy = workload.policy(&args.service)?;
    let config = configure(&args.service, service, &workload.mesh)?;
    serve::run("sidecar", service.drain_timeout, async |scope| {
        let source = workload.identity(&scope);
        let recorder = decisions::recorder(&workload, &scope);
        let (clock, random) = (Arc::clone(&workload.clock), Arc::clone(&workload.random));
        let sidecar = Sidecar::start(config, source, policy, recorder, clock, random, &scope)
            .map_err(|error| not_started("the sidecar", &error))?;
        reload_on_hangup(sidecar, args.service.clone(), &workload, &scope)
    })
}

/// Puts the policies in force that are there when SIGHUP arrives (`systemctl reload`). Ones that are wrong
/// change nothing: what was in force stays so, and the log says what is wrong.
fn reload_on_hangup(
    sidecar: Sidecar,
    service: String,
    workload: &Workload,
    scope: &Scope,
) -> Result<(), Failure> {
    let mut hangup = signal(SignalKind::hangup())
        .map_err(|error| Failure::new("cannot listen for signals").because(&error))?;
    let (mesh, draining) = (workload.mesh.clone(), scope.clone());
    scope.spawn_critical("policy reload", async move {
        loop {
            tokio::select! {
                _ = hangup.recv() => {}
                () = draining.draining() => return,
            }
            match workload::policy(&mesh, &service) {
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
    });
    Ok(())
}

fn configure(name: &str, service: &Service, mesh: &Mesh) -> Result<SidecarConfig, Failure> {
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
        service: name.to_owned(),
        id: service.id.clone(),
        app: service.app,
        app_protocol: match service.app_protocol {
            mesh::AppProtocol::Http1 => AppProtocol::Http1,
            mesh::AppProtocol::H2c => AppProtocol::H2c,
        },
        inbound,
        admin,
        calls,
        gateways: mesh.own_id(Own::Gateway).into_iter().collect(),
        request_timeout: service.request_timeout,
        access_log: mesh.telemetry.access_log,
    })
}
