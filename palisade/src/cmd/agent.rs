//! `palisade agent`: one a host; tells which process is which service, and gives it its identity.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ca::agent::{Agent, AgentConfig, Bootstrap, DEFAULT_SOCKET_MODE};
use ca::random::SystemRandom;
use secrecy::ExposeSecret as _;

use crate::Global;
use crate::credentials::{Credential, Credentials};
use crate::failure::{Exit, Failure};
use crate::mesh::HostPort;
use crate::serve;
use crate::workload::{Workload, not_started};

/// How long streams may go on once the agent is asked to end: workloads open them again by themselves.
const DRAIN: Duration = Duration::from_secs(2);

pub(crate) fn run(global: &Global) -> Result<Exit, Failure> {
    let workload = Workload::begin(global)?;
    let bootstrap = bootstrap(&workload.credentials)?;
    let agent = &workload.mesh.agent;
    serve::run("agent", DRAIN, async |scope| {
        let config = AgentConfig {
            host: agent.host.clone(),
            trust_domain: workload.mesh.mesh.trust_domain.clone(),
            socket: agent.socket.clone(),
            socket_mode: DEFAULT_SOCKET_MODE,
            state: agent.state.clone(),
            control: resolve(&agent.control).await?,
            bootstrap,
        };
        Agent::start(config, Arc::clone(&workload.clock), SystemRandom::shared(), &scope).await.map_err(
            |error| {
                not_started("the agent", &error).next(format!(
                "on control: palisade token create {} > join-token && palisade token bundle > trust-bundle",
                agent.host
            ))
            },
        )
    })
}

/// What a host joins with; needed only as long as it has no identity of its own.
fn bootstrap(credentials: &Credentials) -> Result<Option<Bootstrap>, Failure> {
    let Some(join_token) = credentials.optional_text(Credential::JoinToken)? else { return Ok(None) };
    let bundle = credentials.text(Credential::TrustBundle)?;
    Ok(Some(Bootstrap { join_token, bundle_pem: bundle.expose_secret().to_owned() }))
}

async fn resolve(control: &HostPort) -> Result<SocketAddr, Failure> {
    let unknown = |failure: Failure| failure.hint("set [agent] control to where control listens");
    let mut found =
        tokio::net::lookup_host((control.host.as_str(), control.port)).await.map_err(|error| {
            unknown(Failure::new(format!("control's address {control} is unknown")).because(&error))
        })?;
    found.next().ok_or_else(|| unknown(Failure::new(format!("control's name {control} has no address"))))
}
