//! What is written down about a decision, and who keeps it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::object::AttributeValue;
use crate::receipt::Receipt;

/// Longest method, target or reason kept in a record; the rest is cut, marked by an ellipsis.
pub(crate) const MAX_RECORDED_BYTES: usize = 2048;

/// Which of Palisade's processes decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// The front door.
    Gateway,
    /// A service's sidecar.
    Sidecar,
    /// The vault.
    Vault,
    /// A host's agent, which tells whether a process has an identity at all.
    Agent,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gateway => "gateway",
            Self::Sidecar => "sidecar",
            Self::Vault => "vault",
            Self::Agent => "agent",
        })
    }
}

/// Whether a service's denials are enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A denied request goes no further.
    #[default]
    Enforce,
    /// Decided and recorded; see [`crate::Denial::audited`].
    Audit,
}

/// The outcome of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Allowed.
    Permit,
    /// Refused (400) or denied (403).
    Deny,
}

/// What decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// A policy in a file.
    Policy {
        /// Its `@id`.
        id: Arc<str>,
        /// Its file, below the policies directory.
        file: Arc<str>,
        /// Its first line, from 1.
        line: usize,
    },
    /// A rule that is part of Palisade, such as `route.unmapped`.
    Builtin(Cow<'static, str>),
    /// No policy allows it.
    Absent,
}

impl Rule {
    /// A short name for metrics and tables: the policy's id, the built-in rule's name, or `none`.
    pub fn name(&self) -> &str {
        match self {
            Self::Policy { id, .. } => id,
            Self::Builtin(name) => name,
            Self::Absent => "none",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy { id, file, line } => write!(f, "policy {id} ({file}:{line})"),
            Self::Builtin(name) => write!(f, "built-in rule {name}"),
            Self::Absent => f.write_str("no policy allows it"),
        }
    }
}

/// One object of a request as it was judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedObject {
    /// Type and id, as Cedar writes them.
    pub object: String,
    /// Its attributes as far as they were known.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, AttributeValue>,
    /// Who told each of them, as map.toml writes it: `entities`, `path:id`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub told_by: BTreeMap<String, String>,
    /// What was decided for this one; `None` if it did not come to that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// What took it out of a batch that was passed on without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out_by: Option<Rule>,
}

/// The user of a request, as recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedUser {
    /// Subject at the issuer.
    pub id: String,
    /// The issuer.
    pub issuer: String,
    /// The OAuth client.
    pub client: String,
    /// Granted scopes.
    pub scopes: Vec<String>,
    /// Claimed groups.
    pub groups: Vec<String>,
}

/// Everything about one decision. Holds personal data (user, attributes) but no credential.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionRecord {
    /// The decision's id.
    pub receipt: Receipt,
    /// Milliseconds since the Unix epoch.
    pub time: u64,
    /// The service whose policy decided.
    pub service: String,
    /// Where it was decided.
    pub layer: Layer,
    /// The decision.
    pub verdict: Outcome,
    /// 400 or 403 for a denial, `None` for a permit.
    pub status: Option<u16>,
    /// What decided.
    pub rule: Rule,
    /// Why, for the operator.
    pub reason: String,
    /// The calling workload's SPIFFE ID, or `client NAME`; `None` if the caller proved nothing.
    pub principal: Option<String>,
    /// On whose behalf.
    pub user: Option<RecordedUser>,
    /// Through whose hands, as SPIFFE IDs.
    pub chain: Vec<String>,
    /// The caller's network address.
    pub peer_address: Option<String>,
    /// The request's method.
    pub method: String,
    /// The request's target as it arrived.
    pub target: String,
    /// The matching route's template.
    pub route: Option<String>,
    /// The action it means.
    pub action: Option<String>,
    /// The objects it touches.
    pub objects: Vec<RecordedObject>,
    /// The policies that decided; `None` if none took part.
    pub policy_version: Option<String>,
    /// Whether it is enforced: refusals are, whatever the service's mode.
    pub mode: Mode,
    /// The transaction's id, the same at every hop.
    pub transaction: Option<String>,
    /// The W3C trace id.
    pub trace_id: Option<String>,
    /// Every policy looked at; only for denials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Explanation>,
}

impl DecisionRecord {
    /// Who decided, for a person: `sidecar of accounts`, or `gateway`, `vault`, `agent`, of which there is one.
    pub fn decided_by(&self) -> String {
        let layer = self.layer.to_string();
        if layer == self.service { layer } else { format!("{layer} of {}", self.service) }
    }
}

/// Why no policy allowed a request.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Explanation {
    /// The object it explains, if there are several.
    pub object: Option<String>,
    /// Policies looked at, in the order of the files.
    pub considered: Vec<Considered>,
    /// How many more there are that were not looked at.
    pub omitted: usize,
    /// The permit that came nearest.
    pub nearest: Option<Nearest>,
}

/// One policy and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Considered {
    /// Its `@id`.
    pub policy: String,
    /// Its file, below the policies directory.
    pub file: String,
    /// Its first line.
    pub line: usize,
    /// `permit` or `forbid`.
    pub effect: PolicyEffect,
    /// What became of it.
    pub outcome: PolicyOutcome,
}

/// Cedar's two effects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyEffect {
    /// `permit`
    Permit,
    /// `forbid`
    Forbid,
}

impl fmt::Display for PolicyEffect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Permit => "permit",
            Self::Forbid => "forbid",
        })
    }
}

/// A part of a policy's scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScopePart {
    /// Who.
    Principal,
    /// Does what.
    Action,
    /// To what.
    Resource,
}

impl fmt::Display for ScopePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Principal => "principal",
            Self::Action => "action",
            Self::Resource => "resource",
        })
    }
}

/// What became of one policy for one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyOutcome {
    /// It is about other requests.
    Scope(Vec<Mismatch>),
    /// Its scope fits, a condition is false.
    Condition(FailedClause),
    /// Evaluating it failed.
    Error {
        /// The clause, if it could be told.
        clause: Option<String>,
        /// What Cedar said.
        error: String,
    },
    /// Its scope fits, but there was no need or no data to look at its conditions.
    Undecided,
    /// It applies.
    Satisfied,
}

/// One part of a scope that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// Which part.
    pub part: ScopePart,
    /// What the policy asks for, as Cedar writes it.
    pub wants: String,
    /// What the request has.
    pub has: String,
}

/// The first clause of a condition that does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedClause {
    /// Its text.
    pub clause: String,
    /// For a comparison: both sides and their values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<(String, String)>,
}

/// The permit that would have needed the least to allow a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nearest {
    /// Its `@id`.
    pub policy: String,
    /// Its file.
    pub file: String,
    /// Its first line.
    pub line: usize,
    /// What is missing, a sentence each.
    pub missing: Vec<String>,
}

/// Where records go.
pub trait Recorder: Send + Sync {
    /// Takes a record. Must not block: it is called on the path of a request.
    fn record(&self, record: DecisionRecord);
}

/// Keeps nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoRecorder;

impl Recorder for NoRecorder {
    fn record(&self, _: DecisionRecord) {}
}

/// Keeps everything in memory, without limit: for tests.
#[derive(Debug, Default)]
pub struct MemoryRecorder(Mutex<Vec<DecisionRecord>>);

impl MemoryRecorder {
    /// Everything recorded so far, oldest first.
    pub fn records(&self) -> Vec<DecisionRecord> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Recorder for MemoryRecorder {
    fn record(&self, record: DecisionRecord) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(record);
    }
}

/// At most [`MAX_RECORDED_BYTES`] of a text from outside.
pub(crate) fn cut(text: &str) -> String {
    if text.len() <= MAX_RECORDED_BYTES {
        return text.to_owned();
    }
    let end = (0..=MAX_RECORDED_BYTES).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    format!("{}…", text.get(..end).unwrap_or_default())
}
