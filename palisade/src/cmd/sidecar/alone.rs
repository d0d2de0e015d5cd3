//! `palisade sidecar --config FILE`: one sidecar by itself.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use identity::clock::SharedClock;
use identity::pem::Followed;
use identity::{Scope, SpiffeId, SystemClock, TrustDomain};
use policy::{NoRecorder, Policies, ServicePolicy};
use sidecar::ext_authz::{self, ExtAuthzConfig};
use sidecar::overload::Budget;
use sidecar::upstream::UpstreamConfig;
use sidecar::{Call, InboundConfig, Sidecar, SidecarConfig};

use super::succession::Succession;
use super::{access_log, captured, fits};
use crate::Global;
use crate::cmd::config;
use crate::failure::Failure;
use crate::listen::Listeners;
use crate::logging;
use crate::mesh::ServiceName;
use crate::policies;
use crate::readiness::{Awaited, Readiness};
use crate::rlimits;
use crate::serve::Started;
use crate::standalone::{Decided, Outbound, Standalone};
use crate::workload::{no_policy, not_started, place};

/// The sidecar of a sidecar.toml, read. Its identity is in files, which are followed once it starts.
pub(super) struct Alone {
    standalone: Standalone,
}

impl Alone {
    pub(super) fn read(global: &Global) -> Result<Self, Failure> {
        if global.config == Path::new("mesh.toml") {
            let hint = "name a service of mesh.toml with --service NAME, or with --config FILE the sidecar.toml of \
                        one that runs alone; `palisade config example --sidecar` prints one";
            return Err(Failure::usage("the sidecar of which service?").hint(hint));
        }
        let mut standalone = config::load_standalone(&global.config)?;
        logging::start(global.log.as_deref().unwrap_or(&standalone.log))?;
        place(standalone.traffic.values_mut(), &standalone.zones);
        Ok(Self { standalone })
    }

    pub(super) fn workers(&self) -> Option<NonZeroUsize> {
        self.standalone.workers
    }

    pub(super) fn drain_timeout(&self) -> Duration {
        self.standalone.drain_timeout
    }

    pub(super) async fn start(
        self,
        mut succession: Succession,
        scope: Scope,
    ) -> Result<Started<Arc<Sidecar>>, Failure> {
        let Self { standalone } = self;
        let (clock, random) = (SystemClock::shared(), identity::random::system());
        let files = standalone.identity.clone();
        let Followed { source, again } = files.follow(Arc::clone(&clock), &scope).map_err(|error| {
            Failure::invalid(format!("{}: [identity] cannot be used", standalone.file.display()))
                .because(&error)
        })?;
        let Some(identity) = source.current() else { return Err(Failure::new("there is no identity")) };
        let id = identity.svid.id().clone();
        let trust_domain = id.trust_domain().clone();
        let access = access_log(standalone.access_log.as_ref(), &clock, &scope)?;
        let config = configure(&standalone, id, &clock, &mut succession.listeners)?;
        let config = SidecarConfig { access_log: access.clone(), ..config };
        succession.listeners.all_wanted()?;
        let ready = Readiness::Identity(Awaited {
            source: source.clone(),
            id: None,
            giver: format!("the files of [identity] in {}", standalone.file.display()),
            clock: Arc::clone(&clock),
            policies: None,
        });
        succession.wait(&ready, &clock).await?;
        let sidecar =
            Sidecar::start(config, source, Arc::new(NoRecorder), Arc::clone(&clock), random, &scope)
                .map_err(|error| not_started("the sidecar", &error))?;
        succession.take_over(clock, &scope).await?;
        tracing::info!(id = %identity.svid.id(), serves = %standalone, "sidecar started");
        let sidecar = Arc::new(sidecar);
        let reloaded = Arc::clone(&sidecar);
        Ok(Started::new(sidecar).ready_when(ready).reloaded_by(move || {
            again.notify_one();
            if let Some(access) = &access {
                access.reopen();
            }
            match standalone.decided() {
                Some(decided) => policies::replace(policy(decided, &trust_domain), |policy| {
                    reloaded.replace_policy(policy);
                }),
                None => "serves; files read again".to_owned(),
            }
        }))
    }
}

fn configure(
    standalone: &Standalone,
    id: SpiffeId,
    clock: &SharedClock,
    listeners: &mut Listeners,
) -> Result<SidecarConfig, Failure> {
    let mut calls = Vec::new();
    for (name, outbound) in &standalone.outbound {
        let (socket, what) = (format!("outbound.{name}"), format!("the calls to {name}"));
        calls.push(Call {
            listener: listeners.tcp(&socket, &what, &format!("[outbound.{name}] listen"), outbound.listen)?,
            upstream: UpstreamConfig {
                service: name.to_string(),
                id: outbound.id.clone(),
                endpoints: outbound.endpoints.clone(),
                response_timeout: outbound.request_timeout,
            },
            carries: outbound.carries,
            traffic: standalone.traffic.get(name).cloned().unwrap_or_default(),
        });
    }
    let inbound = match &standalone.inbound {
        None => None,
        Some(inbound) => {
            let policy = policy(&inbound.decided, id.trust_domain())?;
            fits(inbound.app_protocol, &policy, &format!("{}: [inbound]", standalone.file.display()))?;
            Some(InboundConfig {
                service: inbound.decided.service.to_string(),
                listener: listeners.tcp("inbound", "the sidecar", "[inbound] listen", inbound.listen)?,
                app: inbound.app,
                app_protocol: inbound.app_protocol.into(),
                policy,
                gateways: inbound.decided.gateways.clone(),
                request_timeout: inbound.request_timeout,
                proxies: inbound.proxies.clone(),
                hbone: super::second_way(inbound.hbone.as_ref(), "[inbound] hbone", listeners)?,
                rate_limit: inbound.rate_limit.clone(),
                health: inbound.health.clone(),
            })
        }
    };
    let ext_authz = match &standalone.ext_authz {
        None => None,
        Some(asked) => {
            let policy = policy(&asked.decided, id.trust_domain())?;
            for sentence in ext_authz::undecidable(&policy, asked.entities.is_some()) {
                tracing::warn!("{sentence}");
            }
            let door = asked.door.clone().bind().map_err(|error| {
                Failure::new(format!("{}: [ext_authz] cannot listen", standalone.file.display()))
                    .because(&error)
            })?;
            Some(ExtAuthzConfig {
                service: asked.decided.service.to_string(),
                policy,
                gateways: asked.decided.gateways.clone(),
                door,
                entities: asked.entities.clone(),
            })
        }
    };
    let admin = match standalone.admin {
        None => None,
        Some(address) => {
            Some(listeners.tcp("admin", "the sidecar's admin port", "[admin] listen", address)?)
        }
    };
    let named = |(name, call): (&ServiceName, &Outbound)| (name.to_string(), call.addresses.clone());
    let capture =
        captured::listen(standalone.capture.as_ref(), standalone.outbound.iter().map(named), clock)?;
    Ok(SidecarConfig {
        id,
        inbound,
        ext_authz,
        calls,
        others: Vec::new(),
        capture,
        admin,
        access_log: None,
        traces: standalone.traces.clone(),
        budget: Budget {
            memory_bytes: standalone.memory.budget_bytes(),
            descriptors: rlimits::most_descriptors(),
        },
    })
}

/// The policy as it is on disk now.
fn policy(decided: &Decided, trust_domain: &TrustDomain) -> Result<Arc<ServicePolicy>, Failure> {
    let policies = Policies::load(&decided.policies, trust_domain)
        .map_err(|problems| Failure::problems(&decided.policies.display().to_string(), problems.0))?;
    let service = decided.service.as_str();
    let policy = policies.service(service).ok_or_else(|| no_policy(&decided.policies, service))?;
    if policy.relations_max_age().is_some() {
        let failure = Failure::invalid(format!("the map of `{service}` says relations = \"store\""));
        return Err(
            failure.hint("a sidecar that runs alone has no control to tell it relations: use relations.toml")
        );
    }
    Ok(policy)
}
