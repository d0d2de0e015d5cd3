//! What comes into a decision besides the request, and what comes out of one.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use identity::SpiffeId;
use identity::txn::User;
use serde_json::json;

use crate::decide::ServicePolicy;
use crate::map::CONNECT_ACTION;
use crate::object::{Attributes, ObjectRef};
use crate::receipt::Receipt;
use crate::record::{DecisionRecord, Layer, Mode, Outcome, RecordedObject, RecordedUser, Rule, cut};
use crate::request::Mapped;

/// Who a request comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// A workload, proved by the mTLS handshake and nothing else.
    Workload(SpiffeId),
    /// At the gateway: the OAuth client.
    Client(String),
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(id) => write!(f, "{id}"),
            Self::Client(id) => write!(f, "client {id}"),
        }
    }
}

/// A caller, the user it acts for, and the hands the request went through.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Who calls.
    pub principal: Principal,
    /// For whom, from a verified transaction token.
    pub user: Option<Arc<User>>,
    /// Through whom: the gateway first, the caller last. Empty without a user.
    pub chain: Arc<[SpiffeId]>,
    /// From where.
    pub address: Option<SocketAddr>,
}

/// What is written down about a request besides its meaning. None of it takes part in the decision
/// except `now`. Made without an allocation: most permits are never written down.
#[derive(Debug, Clone)]
pub struct Occasion<'a> {
    /// The id this decision will have.
    pub receipt: Receipt,
    /// Time since the Unix epoch.
    pub now: Duration,
    /// Who decides.
    pub layer: Layer,
    /// The request's method, or what stands for it.
    pub method: &'a str,
    /// The request's target as it arrived.
    pub target: &'a str,
    /// The transaction's id.
    pub transaction: Option<Arc<str>>,
    /// The W3C trace id.
    pub trace_id: Option<u128>,
}

/// Permitted or denied.
#[derive(Debug, Clone)]
#[must_use]
pub enum Verdict {
    /// Go on, with this in hand.
    Permit(Permit),
    /// Stop.
    Deny(Denial),
}

/// Leave to pass a request on.
///
/// INVARIANT: made by [`ServicePolicy::decide`], [`ServicePolicy::decide_object`], [`ServicePolicy::decide_connect`]
/// and [`ServicePolicy::decide_kafka_connection`] when a policy permits, by [`ServicePolicy::keep`] from one of them, and by
/// [`Denial::audited`] for a service in audit mode. Nothing else makes one.
#[derive(Debug, Clone)]
#[must_use]
pub struct Permit(Leave);

#[derive(Debug, Clone)]
enum Leave {
    /// By a policy: which is an index into the policies that decided, so nothing is copied.
    Granted { by: ServicePolicy, entry: usize, receipt: Receipt },
    /// By audit mode, in spite of this.
    Audited(Box<DecisionRecord>),
    /// Without what was left out, as this says.
    Filtered(Box<DecisionRecord>),
}

impl Permit {
    /// INVARIANT: for decisions only, with an entry of the policies that permitted.
    pub(crate) fn granted(by: &ServicePolicy, entry: usize, receipt: Receipt) -> Self {
        Self(Leave::Granted { by: by.clone(), entry, receipt })
    }

    /// INVARIANT: for what is left of a batch, once it was permitted.
    pub(crate) fn filtered(record: DecisionRecord) -> Self {
        Self(Leave::Filtered(Box::new(record)))
    }

    /// The decision's id.
    pub fn receipt(&self) -> &Receipt {
        match &self.0 {
            Leave::Granted { receipt, .. } => receipt,
            Leave::Audited(record) | Leave::Filtered(record) => &record.receipt,
        }
    }

    /// What allowed it. In audit mode this may be the rule that would have denied it.
    pub fn rule(&self) -> &Rule {
        match &self.0 {
            Leave::Granted { by, entry, .. } => by.rule(*entry),
            Leave::Audited(record) | Leave::Filtered(record) => &record.rule,
        }
    }

    /// Whether the policy denied and its audit mode lets the request pass all the same. Such a permit is
    /// to be recorded always: that is what the mode is for.
    pub fn is_audited(&self) -> bool {
        matches!(self.0, Leave::Audited(_))
    }

    /// How many objects were left out, in words, if any were. Such a permit is to be recorded always too.
    pub fn left_out(&self) -> Option<&str> {
        match &self.0 {
            Leave::Filtered(record) => Some(&record.reason),
            Leave::Granted { .. } | Leave::Audited(_) => None,
        }
    }

    /// What to write down, for those permits that are: the arguments are those of
    /// [`ServicePolicy::decide`], and the record is made only now.
    pub fn record(
        &self,
        caller: &Caller,
        mapped: &Mapped,
        attributes: &Attributes,
        occasion: &Occasion<'_>,
    ) -> DecisionRecord {
        match &self.0 {
            Leave::Granted { by, .. } => {
                self.complete(by.record_mapped(caller, mapped, attributes, occasion))
            }
            Leave::Audited(record) | Leave::Filtered(record) => record.as_ref().clone(),
        }
    }

    /// Likewise, for [`ServicePolicy::decide_object`].
    pub fn record_object(
        &self,
        caller: &Caller,
        action: &str,
        object: &ObjectRef,
        attributes: &Attributes,
        occasion: &Occasion<'_>,
    ) -> DecisionRecord {
        match &self.0 {
            Leave::Granted { by, .. } => {
                self.complete(by.record_named(caller, action, object, attributes, occasion))
            }
            Leave::Audited(record) | Leave::Filtered(record) => record.as_ref().clone(),
        }
    }

    /// Likewise, for [`ServicePolicy::decide_connect`].
    pub fn record_connect(&self, caller: &Caller, port: &str, occasion: &Occasion<'_>) -> DecisionRecord {
        match &self.0 {
            Leave::Granted { by, .. } => {
                self.record_object(caller, CONNECT_ACTION, &by.port(port), &Attributes::none(), occasion)
            }
            Leave::Audited(record) | Leave::Filtered(record) => record.as_ref().clone(),
        }
    }

    /// Likewise, for [`ServicePolicy::decide_kafka_connection`].
    pub fn record_kafka_connection(&self, caller: &Caller, occasion: &Occasion<'_>) -> DecisionRecord {
        match &self.0 {
            Leave::Granted { by, .. } => {
                let mut record = by.record(Some(caller), occasion);
                record.action = Some(CONNECT_ACTION.to_owned());
                self.complete(record)
            }
            Leave::Audited(record) | Leave::Filtered(record) => record.as_ref().clone(),
        }
    }

    /// The parts of a record that are the decision's own, whatever else it is made of.
    fn complete(&self, mut record: DecisionRecord) -> DecisionRecord {
        record.receipt = *self.receipt();
        record.rule = self.rule().clone();
        record.verdict = Outcome::Permit;
        record.reason = "permitted".into();
        for object in &mut record.objects {
            object.outcome = Some(Outcome::Permit);
        }
        record
    }
}

/// A refused or denied request.
#[derive(Debug, Clone)]
#[must_use]
pub struct Denial(pub(crate) Box<DecisionRecord>);

impl Denial {
    /// 400 (not understood) or 403 (not allowed).
    pub fn status(&self) -> u16 {
        self.0.status.unwrap_or(403)
    }

    /// The decision's id.
    pub fn receipt(&self) -> &Receipt {
        &self.0.receipt
    }

    /// What denied it.
    pub fn rule(&self) -> &Rule {
        &self.0.rule
    }

    /// Why, for the operator; never for the peer.
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// What to write down.
    pub fn record(&self) -> &DecisionRecord {
        &self.0
    }

    /// What the peer is told, as `application/json`: the receipt and no reason.
    pub fn response_body(&self) -> String {
        let error = if self.status() == 400 { "refused" } else { "denied" };
        json!({ "error": error, "receipt": self.0.receipt.as_str() }).to_string()
    }

    /// Leave to pass the request on all the same, if a policy in audit mode denied it: the record
    /// keeps the verdict `deny` with mode `audit`. Refusals are enforced in every mode: what a request
    /// that was not understood would do cannot be told, and a caller who proved nothing stays outside.
    ///
    /// # Errors
    /// The denial itself, unchanged, if it is to be enforced.
    pub fn audited(self) -> Result<Permit, Denial> {
        if self.0.mode == Mode::Audit && self.status() == 403 {
            Ok(Permit(Leave::Audited(self.0)))
        } else {
            Err(self)
        }
    }
}

/// Refuses before any service's policy is asked: the connection, or the token on it.
pub fn refuse_connection(
    service: &str,
    rule: &'static str,
    reason: String,
    address: Option<SocketAddr>,
    occasion: &Occasion<'_>,
) -> Denial {
    let mut record = blank(service, occasion);
    record.status = Some(403);
    record.rule = Rule::Builtin(rule.into());
    record.reason = cut(&reason);
    record.peer_address = address.map(|address| address.to_string());
    Denial(Box::new(record))
}

/// A record of which only the occasion is known.
pub(crate) fn blank(service: &str, occasion: &Occasion<'_>) -> DecisionRecord {
    DecisionRecord {
        receipt: occasion.receipt,
        time: u64::try_from(occasion.now.as_millis()).unwrap_or(u64::MAX),
        service: service.to_owned(),
        layer: occasion.layer,
        verdict: Outcome::Deny,
        status: None,
        rule: Rule::Absent,
        reason: String::new(),
        principal: None,
        user: None,
        chain: Vec::new(),
        peer_address: None,
        method: cut(occasion.method),
        target: cut(occasion.target),
        route: None,
        action: None,
        objects: Vec::new(),
        policy_version: None,
        mode: Mode::Enforce,
        transaction: occasion.transaction.as_deref().map(str::to_owned),
        trace_id: occasion.trace_id.map(|id| format!("{id:032x}")),
        explanation: None,
    }
}

/// What a request was understood as, for the record.
pub(crate) struct Understood<'a> {
    pub(crate) route: Option<&'a str>,
    pub(crate) action: &'a str,
    pub(crate) objects: Vec<RecordedObject>,
}

impl Understood<'_> {
    pub(crate) fn write(self, record: &mut DecisionRecord) {
        record.route = self.route.map(str::to_owned);
        record.action = Some(cut(self.action));
        record.objects = self.objects;
    }
}

impl From<&User> for RecordedUser {
    fn from(user: &User) -> Self {
        Self {
            id: user.id.clone(),
            issuer: user.issuer.clone(),
            client: user.client.clone(),
            scopes: user.scopes.clone(),
            groups: user.groups.clone(),
        }
    }
}
