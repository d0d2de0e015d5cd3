//! `palisade agent`: one a host; tells which process is which service, and gives it its identity.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ca::agent::{
    Agent, AgentConfig, Bootstrap, DEFAULT_SOCKET_MODE, Redactor, RefusalReason, RefusalRecorder,
    RefusedCaller,
};
use ca::mesh::ReportedDecision;
use ca::random::SystemRandom;
use policy::{Layer, Occasion, Personal, Receipt};
use secrecy::ExposeSecret as _;

use crate::Global;
use crate::credentials::{Credential, Credentials};
use crate::decisions;
use crate::failure::{Exit, Failure};
use crate::mesh::HostPort;
use crate::serve::{self, Started};
use crate::workload::{SharedRandom, Workload, not_started};

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
            refusals: Some(Arc::new(Refusals {
                socket: agent.socket.clone(),
                random: Arc::clone(&workload.random),
            })),
            redactor: workload
                .mesh
                .telemetry
                .personal
                .clone()
                .map(|attributes| Arc::new(Redaction(Personal::new(attributes))) as Arc<dyn Redactor>),
        };
        let clock = Arc::clone(&workload.clock);
        let agent = Agent::start(config, clock, SystemRandom::shared(), &scope).await.map_err(|error| {
            not_started("the agent", &error).next(format!(
                "on control: palisade token create {} > join-token && palisade token bundle > trust-bundle",
                agent.host
            ))
        })?;
        Ok(Started::new(agent))
    })
}

/// People in decisions get pseudonyms.
#[derive(Debug)]
struct Redaction(Personal);

impl Redactor for Redaction {
    fn redact(&self, key: &[u8], json: &str) -> Option<String> {
        self.0.hide(key, json)
    }
}

/// Writes refused callers down as decisions, so that `palisade explain` finds them like any other.
struct Refusals {
    socket: PathBuf,
    random: SharedRandom,
}

impl fmt::Debug for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refusals").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl RefusalRecorder for Refusals {
    fn refused(&self, caller: &RefusedCaller) -> Option<ReportedDecision> {
        let Ok(receipt) = Receipt::generate(&*self.random) else {
            tracing::error!("no random bytes: a caller is refused without a receipt");
            return None;
        };
        let socket = self.socket.display().to_string();
        let occasion = Occasion {
            receipt,
            now: caller.now,
            layer: Layer::Agent,
            method: caller.method,
            target: &socket,
            transaction: None,
            trace_id: None,
        };
        let rule = match caller.reason {
            RefusalReason::NotAttested(_) => "agent.not_attested",
            RefusalReason::NoMatchingEntry => "agent.no_matching_entry",
            RefusalReason::NotAWriter { .. } => "relations.not_a_writer",
        };
        let mut reason = format!("{}: {caller}", caller.reason);
        if !caller.near_misses.is_empty() {
            reason = format!("{reason}; near: {}", caller.near_misses.join("; "));
        }
        let denial = policy::refuse_connection("agent", rule, reason, None, &occasion);
        decisions::reported(denial.record().clone())
    }
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

#[cfg(test)]
mod tests {
    use policy::{DecisionRecord, Rule};

    use super::*;

    fn refused(reason: RefusalReason, near: &[&str]) -> (ReportedDecision, DecisionRecord) {
        let refusals = Refusals {
            socket: "/run/palisade/agent.sock".into(),
            random: Arc::new(ring::rand::SystemRandom::new()),
        };
        let caller = RefusedCaller {
            pid: Some(7),
            uid: Some(1000),
            gid: Some(100),
            path: Some("/bin/web".into()),
            sha256: None,
            method: "FetchX509SVID",
            reason,
            near_misses: near.iter().map(|text| (*text).to_owned()).collect(),
            now: Duration::from_millis(1_795_305_600_250),
        };
        let decision = refusals.refused(&caller).unwrap();
        let record = serde_json::from_str(&decision.json).unwrap();
        (decision, record)
    }

    #[test]
    fn a_refused_caller_is_a_decision_that_can_be_explained() {
        let (decision, record) = refused(RefusalReason::NoMatchingEntry, &["a differs in gid", "b in uid"]);
        assert_eq!(decision.receipt, record.receipt.to_string());
        assert_eq!((decision.verdict.as_str(), decision.address.as_str()), (decisions::DENIED, ""));
        assert_eq!(decision.time_ms, 1_795_305_600_250);
        assert_eq!((decision.service.as_str(), record.layer), ("agent", Layer::Agent));
        assert_eq!(record.rule, Rule::Builtin("agent.no_matching_entry".into()));
        assert_eq!(
            (record.method.as_str(), record.target.as_str()),
            ("FetchX509SVID", "/run/palisade/agent.sock")
        );
        assert_eq!(
            record.reason,
            "no registration matches the caller: pid=7 uid=1000 gid=100 sha256=unknown path=/bin/web; \
             near: a differs in gid; b in uid"
        );
        assert!(record.principal.is_none(), "it proved nothing");
    }

    #[test]
    fn a_caller_who_could_not_be_attested_is_told_apart() {
        let (_, record) = refused(RefusalReason::NotAttested("it is gone".into()), &[]);
        assert_eq!(record.rule, Rule::Builtin("agent.not_attested".into()));
        assert!(record.reason.starts_with("the caller could not be attested: it is gone: pid=7 "));
        assert!(!record.reason.contains("near"));
    }
}
