//! What control tells people: the read model behind the console and the command line. Times are whole
//! seconds since the Unix epoch unless the name says otherwise.

use serde::{Deserialize, Serialize};

use crate::entry::Entry;

/// Everything about control at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ControlStatus {
    /// The trust domain.
    pub trust_domain: String,
    /// Address on which agents are served.
    pub listen: String,
    /// The root.
    pub authority: AuthorityStatus,
    /// Registrations in force.
    pub entries: Vec<EntryStatus>,
    /// Hosts that have joined.
    pub nodes: Vec<NodeStatus>,
    /// Where workloads serve, as their hosts' agents say.
    pub endpoints: Vec<EndpointStatus>,
    /// Which policies are in force, where control hands them out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policies: Option<PoliciesStatus>,
    /// What services' relations are at, where any were written or are read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub relations: Vec<RelationsStatus>,
    /// SVIDs that have not expired, newest first, at most [`MAX_SVIDS_LISTED`].
    pub svids: Vec<IssuedSvid>,
    /// Totals.
    pub counts: Counts,
    /// Rises at every change.
    pub sequence: u64,
}

/// Most SVIDs listed in a status; [`Counts::svids_active`] says how many there are.
pub const MAX_SVIDS_LISTED: usize = 1_000;

/// The root certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityStatus {
    /// Serial, lower-case hexadecimal.
    pub serial: String,
    /// SHA-256 of the certificate, lower-case hexadecimal.
    pub fingerprint: String,
    /// Its end.
    pub not_after: u64,
}

/// A registration and its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryStatus {
    /// Names the entry in this very form.
    pub entry_id: String,
    /// The registration.
    pub entry: Entry,
}

/// A host that has joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub host: String,
    /// Its agent's SPIFFE ID.
    pub spiffe_id: String,
    /// When it joined with a token.
    pub joined: u64,
    /// When its agent last called; `None` if not since control started.
    pub last_seen: Option<u64>,
    /// Whether its agent's stream is open now.
    pub connected: bool,
    /// Serial of its last node identity.
    pub serial: String,
    /// End of its last node identity.
    pub not_after: u64,
}

/// One place where a workload serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointStatus {
    /// Who.
    pub spiffe_id: String,
    /// `IP:PORT`.
    pub address: String,
    /// Whether it takes requests and its host is heard of.
    pub serving: bool,
}

/// Which policies are in force, and which are on their way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoliciesStatus {
    /// What everybody has, or is to have.
    pub in_force: Option<EpochStatus>,
    /// What is on its way to everybody.
    pub rolling: Option<RollingStatus>,
    /// What was taken back last, until something else is offered.
    pub stopped: Option<StoppedStatus>,
    /// What is wrong with the repository, or with its newest commit.
    pub source_problem: Option<String>,
    /// Who decides by them.
    pub holders: Vec<HolderStatus>,
}

/// One service's relations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelationsStatus {
    /// The name of the service's policies.
    pub service: String,
    /// The store's name.
    pub epoch: String,
    /// Its revision.
    pub revision: u64,
    /// Objects with relations.
    pub objects: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// Who decides by them, of those that are connected.
    pub readers: Vec<RelationsReader>,
}

/// A workload that has a copy of a service's relations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelationsReader {
    /// Whose relations.
    pub service: String,
    /// Who.
    pub spiffe_id: String,
    /// On which host.
    pub host: String,
    /// The revision that it was told.
    pub revision: u64,
    /// When it asked last whether that is the newest.
    pub heard: u64,
}

/// One version of everybody's policies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochStatus {
    /// Its number, which only rises.
    pub epoch: u64,
    /// The commit that it is from.
    pub commit: String,
    /// When it was put out.
    pub offered: u64,
}

/// One that is on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollingStatus {
    /// Which.
    pub epoch: EpochStatus,
    /// The ring that it has come to: `shadow`, or a share in percent.
    pub ring: String,
    /// All of its rings.
    pub rings: Vec<String>,
    /// Since when it is in that one.
    pub since: u64,
}

/// One that was taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoppedStatus {
    /// Which.
    pub epoch: EpochStatus,
    /// Why.
    pub reason: String,
}

/// A workload that decides by policies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HolderStatus {
    /// Its host.
    pub host: String,
    /// Its name there.
    pub name: String,
    /// Its identity.
    pub spiffe_id: String,
    /// Whose policies it has.
    pub service: String,
    /// Which are in force there; 0 for none.
    pub epoch: u64,
    /// The commit that those are from, if it is known here.
    pub commit: Option<String>,
    /// Which are to be.
    pub wanted: u64,
    /// Which it did not take, and why.
    pub refused: Option<String>,
}

/// One line of the issuance log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuedSvid {
    /// Serial, lower-case hexadecimal.
    pub serial: String,
    /// The identity.
    pub spiffe_id: String,
    /// The host whose agent asked; empty for control's own.
    pub host: String,
    /// Why it was issued: `join token`, `renewal`, `control`, or the selectors of the entry.
    pub why: String,
    /// The entry it was issued under; empty for nodes and control.
    pub entry_id: String,
    /// When.
    pub issued: u64,
    /// Its end.
    pub not_after: u64,
}

/// Totals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// SVIDs issued since the trust domain began.
    pub svids_issued: u64,
    /// SVIDs that have not expired.
    pub svids_active: u64,
    /// Join tokens that can still be used.
    pub join_tokens_open: u64,
    /// Decisions in the store.
    pub decisions_stored: u64,
    /// Decisions that the store dropped because it was full.
    pub decisions_expired: u64,
    /// Decisions that agents and workloads had to drop on the way.
    pub decisions_lost: u64,
}

/// An authorization decision as a workload made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportedDecision {
    /// Its id, as the denied caller sees it.
    pub receipt: String,
    /// When it was made, milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Name of the service that decided.
    pub service: String,
    /// `allow`, `deny`, or another word of the policy layer.
    pub verdict: String,
    /// The caller's network address, `IP:PORT`; empty if it had none.
    pub address: String,
    /// The whole record, a JSON document that nothing here interprets.
    pub json: String,
}

/// A decision as control stored it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredDecision {
    /// Its id.
    pub receipt: String,
    /// When it was made, milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Name of the service that decided.
    pub service: String,
    /// `allow`, `deny`, or another word of the policy layer.
    pub verdict: String,
    /// The caller's network address, `IP:PORT`; empty if it had none.
    pub address: String,
    /// The whole record.
    pub json: serde_json::Value,
    /// SPIFFE ID of the workload that reported it, as its agent attested it.
    pub reporter: String,
    /// The host it came from, as its agent's certificate proves.
    pub host: String,
    /// When control stored it, milliseconds since the Unix epoch.
    pub stored_ms: u64,
}

/// Which decisions are wanted; newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecisionQuery {
    /// At most so many; absent, [`DEFAULT_DECISIONS`]; never over [`MAX_DECISIONS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Made at or after this time, milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// From exactly this caller's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// With exactly this verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
}

/// Decisions answered when a query names no limit: one screen and more.
pub const DEFAULT_DECISIONS: usize = 100;
/// Most decisions in one answer, which is built in memory.
pub const MAX_DECISIONS: usize = 1_000;

impl DecisionQuery {
    pub(crate) fn effective_limit(&self) -> usize {
        self.limit.unwrap_or(DEFAULT_DECISIONS).min(MAX_DECISIONS)
    }

    pub(crate) fn wants(&self, decision: &StoredDecision) -> bool {
        self.since.is_none_or(|since| decision.time_ms >= since)
            && self.address.as_ref().is_none_or(|address| *address == decision.address)
            && self.verdict.as_ref().is_none_or(|verdict| *verdict == decision.verdict)
    }
}

/// A new join token. Shown once: control keeps only its hash.
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinToken {
    /// The secret to give to the agent.
    pub token: String,
    /// The host it is for.
    pub host: String,
    /// When it ends.
    pub expires: u64,
}

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the token.
        f.debug_struct("JoinToken")
            .field("host", &self.host)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}
