//! What every long-running verb begins with: the file, the log, the policies, an identity.

use std::path::Path;
use std::sync::Arc;

use identity::clock::SharedClock;
pub(crate) use identity::random::SharedRandom;
use identity::{IdentitySource, Scope, SpiffeId, SystemClock};
use policy::{Mode, Policies, ServicePolicy};
use sidecar::traffic::config::Traffic;
use sidecar::traffic::topology::{Topology, own_addresses};

use crate::Global;
use crate::cmd::config;
use crate::credentials::Credentials;
use crate::failure::Failure;
use crate::logging;
use crate::mesh::{self, Mesh, Zone};
use crate::policies::Current;
use crate::readiness::{Awaited, Readiness};

/// What a verb works with.
pub(crate) struct Workload {
    pub(crate) mesh: Mesh,
    pub(crate) credentials: Credentials,
    pub(crate) clock: SharedClock,
    pub(crate) random: SharedRandom,
}

impl Workload {
    /// Reads mesh.toml and starts the log.
    pub(crate) fn begin(global: &Global) -> Result<Self, Failure> {
        let mut mesh = config::load(&global.config)?;
        logging::start(global.log.as_deref().unwrap_or(&mesh.telemetry.log))?;
        place(mesh.traffic.values_mut(), &mesh.zones);
        Ok(Self {
            mesh,
            credentials: Credentials::new(
                global.credentials.as_deref(),
                std::env::var_os("CREDENTIALS_DIRECTORY"),
            ),
            clock: SystemClock::shared(),
            random: identity::random::system(),
        })
    }

    /// The policy of `service`, in the mode that holds for the mesh.
    pub(crate) fn policy(&self, service: &str) -> Result<Arc<ServicePolicy>, Failure> {
        policy(&self.mesh, service)
    }

    /// Our identity, as the agent gives and renews it.
    pub(crate) fn identity(&self, scope: &Scope) -> IdentitySource {
        identity::workload_api::watch(self.mesh.agent.socket.clone(), Arc::clone(&self.clock), scope)
    }

    /// Ready once the agent has given us `id`, or any identity where the configuration names none, and policies where
    /// they come from it.
    pub(crate) fn identified(
        &self,
        source: IdentitySource,
        id: Option<SpiffeId>,
        policies: Option<Current>,
    ) -> Readiness {
        let giver = format!("the agent at {}", self.mesh.agent.socket.display());
        let clock = Arc::clone(&self.clock);
        Readiness::Identity(Awaited { source, id, giver, clock, policies })
    }

    /// The failure of a verb whose section mesh.toml does not have.
    pub(crate) fn no_section(&self, section: &str) -> Failure {
        Failure::invalid(format!("{} has no [{section}]", self.mesh.file.display()))
            .hint("add the section; `palisade config example` shows it with every key")
    }
}

/// Tells traffic what is near this machine.
pub(crate) fn place<'a>(traffic: impl Iterator<Item = &'a mut Traffic>, zones: &[Zone]) {
    let own = own_addresses().unwrap_or_else(|error| {
        tracing::warn!(%error, "this machine's addresses are not known: nothing is near");
        Vec::new()
    });
    let networks = zones.iter().flat_map(|zone| zone.networks.iter().map(|network| (&*zone.name, *network)));
    let topology = Arc::new(Topology::new(networks, own));
    if !zones.is_empty() {
        tracing::info!(zone = topology.zone(), "this machine's zone, by its addresses");
    }
    for traffic in traffic {
        traffic.topology = Arc::clone(&topology);
    }
}

/// The policies that `mesh` names.
pub(crate) fn policies(mesh: &Mesh) -> Result<Arc<Policies>, Failure> {
    let directory = &mesh.mesh.policies;
    Policies::load(directory, &mesh.mesh.trust_domain).map_err(|problems| {
        Failure::problems(&directory.display().to_string(), problems.0)
            .next(format!("mend it, then run `palisade --config {} policy check`", mesh.file.display()))
    })
}

/// The policy of `service` as it is on disk now, in the mode that holds for the mesh.
pub(crate) fn policy(mesh: &Mesh, service: &str) -> Result<Arc<ServicePolicy>, Failure> {
    let policies = policies(mesh)?;
    let policy = policies.service(service).ok_or_else(|| no_policy(&mesh.mesh.policies, service))?;
    Ok(match mesh.mesh.mode {
        // What a service says of itself holds.
        mesh::Mode::Enforce => policy,
        mesh::Mode::Audit => Arc::new(policy.with_mode(Mode::Audit)),
    })
}

/// The failure of a service that no policy speaks of: nobody could be allowed anything.
pub(crate) fn no_policy(directory: &Path, service: &str) -> Failure {
    Failure::invalid(format!("{} has no policy for {service}", directory.display()))
        .hint(format!("make services/{service}/ there, with a schema, map.toml and at least one policy"))
}

/// Why a process could not be started.
pub(crate) fn not_started(what: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(format!("{what} cannot be started")).because(error)
}
