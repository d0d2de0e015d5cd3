//! Decisions: a caller, an action, objects with attributes, and the verdict with its receipt.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cedar_policy::{
    Authorizer, Decision, Effect, Entities, Entity, EntityUid, Policy, PolicyId, PolicySet, Request,
};
use identity::txn::User;
use identity::{SpiffeId, TrustDomain};
use serde_json::json;

use crate::explain::{self, Scope};
use crate::map::{CONNECT_ACTION, Mapping, PORT_TYPE, Source};
use crate::object::{AttributeValue, Attributes, ObjectRef};
use crate::receipt::Receipt;
use crate::record::{
    DecisionRecord, Layer, Mode, Outcome, PolicyEffect, RecordedObject, RecordedUser, Rule, cut,
};
use crate::request::{Mapped, Refusal, RouteTable};
use crate::schema::{self, ObjectType, ServiceSchema};
use crate::version::PolicyVersion;

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
/// except `now`.
#[derive(Debug, Clone)]
pub struct Occasion {
    /// The id this decision will have.
    pub receipt: Receipt,
    /// Time since the Unix epoch.
    pub now: Duration,
    /// Who decides.
    pub layer: Layer,
    /// The request's method, or what stands for it.
    pub method: String,
    /// The request's target as it arrived.
    pub target: String,
    /// The transaction's id.
    pub transaction: Option<String>,
    /// The W3C trace id.
    pub trace_id: Option<String>,
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
/// INVARIANT: made by [`ServicePolicy::decide`], [`ServicePolicy::decide_object`] and [`ServicePolicy::decide_connect`] when a policy
/// permits, and by [`Denial::audited`] for a service in audit mode. Nothing else makes one.
#[derive(Debug, Clone)]
#[must_use]
pub struct Permit(Box<DecisionRecord>);

impl Permit {
    /// The decision's id.
    pub fn receipt(&self) -> &Receipt {
        &self.0.receipt
    }

    /// What allowed it. In audit mode this may be the rule that would have denied it.
    pub fn rule(&self) -> &Rule {
        &self.0.rule
    }

    /// What to write down.
    pub fn record(&self) -> &DecisionRecord {
        &self.0
    }
}

/// A refused or denied request.
#[derive(Debug, Clone)]
#[must_use]
pub struct Denial(Box<DecisionRecord>);

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
        if self.0.mode == Mode::Audit && self.status() == 403 { Ok(Permit(self.0)) } else { Err(self) }
    }
}

/// Refuses before any service's policy is asked: the connection, or the token on it.
pub fn refuse_connection(
    service: &str,
    rule: &'static str,
    reason: String,
    address: Option<SocketAddr>,
    occasion: &Occasion,
) -> Denial {
    let mut record = blank(service, occasion);
    record.status = Some(403);
    record.rule = Rule::Builtin(rule.into());
    record.reason = cut(&reason);
    record.peer_address = address.map(|address| address.to_string());
    Denial(Box::new(record))
}

fn blank(service: &str, occasion: &Occasion) -> DecisionRecord {
    DecisionRecord {
        receipt: occasion.receipt.clone(),
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
        method: cut(&occasion.method),
        target: cut(&occasion.target),
        route: None,
        action: None,
        objects: Vec::new(),
        policy_version: None,
        mode: Mode::Enforce,
        transaction: occasion.transaction.clone(),
        trace_id: occasion.trace_id.clone(),
        explanation: None,
    }
}

/// One policy and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct PolicyEntry {
    pub(crate) policy: Policy,
    pub(crate) id: String,
    pub(crate) file: Arc<str>,
    pub(crate) line: usize,
    pub(crate) effect: PolicyEffect,
    pub(crate) scope: Scope,
}

impl PolicyEntry {
    fn rule(&self) -> Rule {
        Rule::Policy { id: self.id.clone(), file: self.file.to_string(), line: self.line }
    }
}

/// A request is judged by the policy that mapped it, or not at all.
const POLICY_CHANGED: &str = "policy.changed";
/// A caller of another trust domain is denied.
const TRUST_DOMAIN: &str = "principal.trust_domain";
/// Denials of a decision that audit mode does not soften: they are not about what a policy lacks.
const ENFORCED_ALWAYS: [&str; 2] = [POLICY_CHANGED, TRUST_DOMAIN];

/// Everything that decides for one service; shared by all modes of it.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) schema: ServiceSchema,
    pub(crate) routes: RouteTable,
    pub(crate) mapping: Mapping,
    pub(crate) set: PolicySet,
    /// In the order of the files.
    pub(crate) entries: Vec<PolicyEntry>,
    pub(crate) by_id: HashMap<PolicyId, usize>,
    pub(crate) version: PolicyVersion,
}

/// The policy of one service: immutable, cheap to share, one version.
#[derive(Debug, Clone)]
pub struct ServicePolicy {
    shared: Arc<Shared>,
    mode: Mode,
}

/// What Cedar is asked about one object.
pub(crate) struct Question {
    pub(crate) request: Request,
    pub(crate) entities: Entities,
}

/// What Cedar answered.
enum Answer {
    Permitted(Rule),
    Denied { rule: Rule, reason: String },
}

/// What a request was understood as, for the record.
struct Understood<'a> {
    route: Option<&'a str>,
    action: &'a str,
    objects: Vec<RecordedObject>,
}

impl ServicePolicy {
    pub(crate) fn new(shared: Shared, mode: Mode) -> Self {
        Self { shared: Arc::new(shared), mode }
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The service's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether denials are enforced.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The same policy in another mode.
    pub fn with_mode(&self, mode: Mode) -> Self {
        Self { shared: Arc::clone(&self.shared), mode }
    }

    /// The version of the directory it was loaded from.
    pub fn version(&self) -> &PolicyVersion {
        &self.shared.version
    }

    /// What its callers speak.
    pub fn mapping(&self) -> Mapping {
        self.shared.mapping
    }

    /// What a request means. Looks at method, target and headers; never at a body.
    ///
    /// # Errors
    /// Anything but the one canonical spelling of a mapped request: malformed (400) or unmapped (403).
    pub fn map(&self, parts: &http::request::Parts) -> Result<Mapped, Refusal> {
        self.shared.routes.map(parts)
    }

    /// Whether any permit's scope could admit this: asked before the app is asked for attributes, so
    /// that a caller who could never be allowed reaches no code of the app at all.
    ///
    /// # Errors
    /// The denial, with the explanation of every policy's scope.
    pub fn screen(&self, caller: &Caller, mapped: &Mapped, occasion: &Occasion) -> Result<(), Denial> {
        let understood = |objects: &[ObjectRef]| Understood {
            route: Some(mapped.route()),
            action: mapped.action(),
            objects: objects.iter().map(bare_object).collect(),
        };
        let deny = |rule: Rule, reason: String| {
            self.denial(Some(caller), occasion, understood(mapped.objects()), rule, reason)
        };
        if !self.shared.routes.mapped(mapped) {
            return Err(deny(
                Rule::Builtin(POLICY_CHANGED.into()),
                "another policy mapped the request".into(),
            ));
        }
        if let Err(reason) = self.check_trust_domain(caller) {
            return Err(deny(Rule::Builtin(TRUST_DOMAIN.into()), reason));
        }
        let (Some(action), Some(kind)) = (
            self.shared.schema.actions.get(mapped.action()),
            self.shared.schema.types.get(&mapped.route.kind),
        ) else {
            return Err(deny(
                Rule::Builtin("request.unknown".into()),
                "the schema lacks action or type".into(),
            ));
        };
        let principal = self.principal_uid(&caller.principal);
        let fits = |object: Option<&EntityUid>| {
            self.shared.entries.iter().any(|entry| {
                entry.effect == PolicyEffect::Permit
                    && explain::scope_fits(&self.shared, entry, &principal, &action.uid, &kind.name, object)
            })
        };
        let uids: Vec<EntityUid> = mapped.objects().iter().map(|o| schema::uid(&kind.name, o.id())).collect();
        let refused = if uids.is_empty() {
            (!fits(None)).then_some(None)
        } else {
            uids.iter().find(|u| !fits(Some(u))).map(Some)
        };
        match refused {
            None => Ok(()),
            Some(object) => {
                let reason = "no policy is about this caller, action and kind of object".to_owned();
                let mut denial = deny(Rule::Absent, reason);
                let explanation = explain::scopes(&self.shared, &principal, &action.uid, &kind.name, object);
                denial.0.explanation = Some(explanation);
                Err(denial)
            }
        }
    }

    /// Decides about a mapped request: every object of it must be permitted.
    ///
    /// `attributes` is what [`Mapped::attributes_from`] asked for. Does no I/O. A missing attribute, an
    /// unread body and any evaluation error deny.
    pub fn decide(
        &self,
        caller: &Caller,
        mapped: &Mapped,
        attributes: &Attributes,
        occasion: &Occasion,
    ) -> Verdict {
        if !self.shared.routes.mapped(mapped) {
            let understood =
                Understood { route: Some(mapped.route()), action: mapped.action(), objects: Vec::new() };
            let rule = Rule::Builtin(POLICY_CHANGED.into());
            let reason = "another policy mapped the request".to_owned();
            return Verdict::Deny(self.denial(Some(caller), occasion, understood, rule, reason));
        }
        let known = |object: &ObjectRef, name: &str| match mapped.route.attributes.get(name) {
            Some((Source::Entities | Source::Response(_), _)) => attributes.get(object, name).cloned(),
            Some((source, kind)) => mapped.known_attribute(source, *kind, caller.user.as_deref()),
            None => None,
        };
        self.judge(caller, Some(mapped.route()), mapped.action(), mapped.objects(), &known, occasion)
    }

    /// Decides about one action on one object, for callers that have no map: the vault, the gateway.
    pub fn decide_object(
        &self,
        caller: &Caller,
        action: &str,
        object: &ObjectRef,
        attributes: &Attributes,
        occasion: &Occasion,
    ) -> Verdict {
        let known = |object: &ObjectRef, name: &str| attributes.get(object, name).cloned();
        self.judge(caller, None, action, std::slice::from_ref(object), &known, occasion)
    }

    /// Decides about a plain connection to the port of that name.
    ///
    /// Only a service whose map says `mapping = "tcp"` takes one at all, in every mode: where policies are
    /// about requests, a connection whose requests nobody reads would go round them.
    pub fn decide_connect(&self, caller: &Caller, port: &str, occasion: &Occasion) -> Verdict {
        if self.shared.mapping != Mapping::Tcp {
            let reason = "the service's map does not say mapping = \"tcp\"";
            let refusal = Refusal::denied("tcp.not_allowed_by_map", reason);
            return Verdict::Deny(self.refuse(Some(caller), refusal, occasion));
        }
        let object = ObjectRef::new(&self.shared.schema.full_kind(PORT_TYPE), port);
        self.decide_object(caller, CONNECT_ACTION, &object, &Attributes::none(), occasion)
    }

    /// Turns a refusal into a denial with a receipt, enforced in every mode.
    pub fn refuse(&self, caller: Option<&Caller>, refusal: Refusal, occasion: &Occasion) -> Denial {
        let mut record = self.record(caller, occasion);
        record.mode = Mode::Enforce;
        record.status = Some(refusal.status());
        record.rule = Rule::Builtin(refusal.rule.into());
        record.reason = refusal.reason;
        record.route = refusal.route;
        Denial(Box::new(record))
    }

    fn judge(
        &self,
        caller: &Caller,
        route: Option<&str>,
        action: &str,
        objects: &[ObjectRef],
        known: &dyn Fn(&ObjectRef, &str) -> Option<AttributeValue>,
        occasion: &Occasion,
    ) -> Verdict {
        let mut recorded: Vec<RecordedObject> = objects.iter().map(bare_object).collect();
        let understood = |objects| Understood { route, action, objects };
        let builtin = |rule: &'static str, reason: String, objects| {
            let rule = Rule::Builtin(rule.into());
            Verdict::Deny(self.denial(Some(caller), occasion, understood(objects), rule, reason))
        };
        if let Err(reason) = self.check_trust_domain(caller) {
            return builtin(TRUST_DOMAIN, reason, recorded);
        }
        let Some(action_uid) = self.shared.schema.actions.get(action).map(|action| &action.uid) else {
            return builtin(
                "request.unknown",
                format!("the schema has no action `{}`", cut(action)),
                recorded,
            );
        };
        let mut allowed_by = None;
        for (object, seen) in objects.iter().zip(0..) {
            let Some(kind) = self.shared.schema.types.get(object.kind()) else {
                return builtin(
                    "request.unknown",
                    format!("the schema has no type `{}`", object.kind()),
                    recorded,
                );
            };
            let (attributes, missing) = gather(object, kind, known);
            let mut entry = RecordedObject { attributes, ..bare_object(object) };
            if let Some(flaw) = missing {
                replace(&mut recorded, seen, entry);
                return builtin("attributes.missing", flaw, recorded);
            }
            let question =
                match self.question(caller, action_uid, object, kind, &entry.attributes, occasion.now) {
                    Ok(question) => question,
                    Err(flaw) => {
                        replace(&mut recorded, seen, entry);
                        return builtin("request.invalid", flaw, recorded);
                    }
                };
            match self.ask(&question) {
                Answer::Permitted(rule) => {
                    entry.outcome = Some(Outcome::Permit);
                    replace(&mut recorded, seen, entry);
                    allowed_by = allowed_by.or(Some(rule));
                }
                Answer::Denied { rule, reason } => {
                    entry.outcome = Some(Outcome::Deny);
                    replace(&mut recorded, seen, entry);
                    let mut denial = self.denial(Some(caller), occasion, understood(recorded), rule, reason);
                    let mut explanation = explain::question(&self.shared, &question, kind);
                    explanation.object = (objects.len() > 1).then(|| object.to_string());
                    denial.0.explanation = Some(explanation);
                    return Verdict::Deny(denial);
                }
            }
        }
        match allowed_by {
            Some(rule) => {
                let mut record = self.record(Some(caller), occasion);
                understood(recorded).write(&mut record);
                record.verdict = Outcome::Permit;
                record.reason = "permitted".into();
                record.rule = rule;
                Verdict::Permit(Permit(Box::new(record)))
            }
            None => builtin(
                "request.no_object",
                "the request names no object (is its body unread?)".into(),
                recorded,
            ),
        }
    }

    fn check_trust_domain(&self, caller: &Caller) -> Result<(), String> {
        match &caller.principal {
            Principal::Workload(id) if *id.trust_domain() != self.shared.trust_domain => {
                Err(format!("the caller belongs to the trust domain {}", id.trust_domain()))
            }
            _ => Ok(()),
        }
    }

    fn principal_uid(&self, principal: &Principal) -> EntityUid {
        let types = &self.shared.schema.principals;
        match principal {
            Principal::Workload(id) => schema::uid(&types.workload, id.as_str()),
            Principal::Client(id) => schema::uid(&types.client, id),
        }
    }

    fn question(
        &self,
        caller: &Caller,
        action: &EntityUid,
        object: &ObjectRef,
        kind: &ObjectType,
        attributes: &BTreeMap<String, AttributeValue>,
        now: Duration,
    ) -> Result<Question, String> {
        let types = &self.shared.schema.principals;
        let principal = match &caller.principal {
            Principal::Workload(id) => {
                schema::workload_entity(types, id).ok_or("the caller cannot be described")?
            }
            Principal::Client(id) => schema::client_entity(types, id),
        };
        let values = attributes.iter().map(|(name, value)| (name.clone(), value.expression())).collect();
        let resource = Entity::new(schema::uid(&kind.name, object.id()), values, HashSet::new())
            .map_err(|error| error.to_string())?;
        let user = match &caller.user {
            Some(user) => Some(schema::user_record(user).ok_or("the user cannot be described")?),
            None => None,
        };
        let now = i64::try_from(now.as_secs()).map_err(|error| error.to_string())?;
        let context = schema::context(user, caller.chain.iter().map(ToString::to_string), now)?;
        let schema = Some(&self.shared.schema.schema);
        let request = Request::new(principal.uid(), action.clone(), resource.uid(), context, schema)
            .map_err(|error| error.to_string())?;
        let actions = self.shared.schema.action_entities.clone();
        let entities =
            actions.add_entities([principal, resource], None).map_err(|error| error.to_string())?;
        Ok(Question { request, entities })
    }

    fn ask(&self, question: &Question) -> Answer {
        let response =
            Authorizer::new().is_authorized(&question.request, &self.shared.set, &question.entities);
        // Cedar skips a policy whose evaluation fails. Skipping a forbid would allow, so any failure denies.
        if let Some(error) = response.diagnostics().errors().next() {
            let cedar_policy::AuthorizationError::PolicyEvaluationError(failed) = error;
            let rule = self.entry(failed.policy_id()).map_or(Rule::Absent, PolicyEntry::rule);
            return Answer::Denied { rule, reason: cut(&format!("evaluating a policy failed: {error}")) };
        }
        // Several may agree: the first in the files is named.
        let first = response.diagnostics().reason().filter_map(|id| self.shared.by_id.get(id)).min();
        let rule = first.and_then(|index| self.shared.entries.get(*index)).map(PolicyEntry::rule);
        match (response.decision(), rule) {
            (Decision::Allow, Some(rule)) => Answer::Permitted(rule),
            (Decision::Deny, Some(rule)) => Answer::Denied { rule, reason: "a policy forbids it".into() },
            (_, None) => Answer::Denied { rule: Rule::Absent, reason: "no policy permits it".into() },
        }
    }

    fn entry(&self, id: &PolicyId) -> Option<&PolicyEntry> {
        self.shared.by_id.get(id).and_then(|index| self.shared.entries.get(*index))
    }

    fn denial(
        &self,
        caller: Option<&Caller>,
        occasion: &Occasion,
        understood: Understood<'_>,
        rule: Rule,
        reason: String,
    ) -> Denial {
        let mut record = self.record(caller, occasion);
        understood.write(&mut record);
        record.status = Some(403);
        if matches!(&rule, Rule::Builtin(name) if ENFORCED_ALWAYS.contains(&name.as_ref())) {
            record.mode = Mode::Enforce;
        }
        record.rule = rule;
        record.reason = reason;
        Denial(Box::new(record))
    }

    fn record(&self, caller: Option<&Caller>, occasion: &Occasion) -> DecisionRecord {
        let mut record = blank(&self.shared.name, occasion);
        record.mode = self.mode;
        record.policy_version = Some(self.shared.version.to_string());
        if let Some(caller) = caller {
            record.principal = Some(cut(&caller.principal.to_string()));
            record.user = caller.user.as_deref().map(RecordedUser::from);
            record.chain = caller.chain.iter().map(ToString::to_string).collect();
            record.peer_address = caller.address.map(|address| address.to_string());
        }
        record
    }
}

impl Understood<'_> {
    fn write(self, record: &mut DecisionRecord) {
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

fn bare_object(object: &ObjectRef) -> RecordedObject {
    RecordedObject { object: cut(&object.to_string()), attributes: BTreeMap::new(), outcome: None }
}

fn replace(recorded: &mut [RecordedObject], index: usize, entry: RecordedObject) {
    if let Some(slot) = recorded.get_mut(index) {
        *slot = entry;
    }
}

/// The attributes that the type declares, and what is wrong with them.
fn gather(
    object: &ObjectRef,
    kind: &ObjectType,
    known: &dyn Fn(&ObjectRef, &str) -> Option<AttributeValue>,
) -> (BTreeMap<String, AttributeValue>, Option<String>) {
    let (mut attributes, mut flaw) = (BTreeMap::new(), None);
    for (name, spec) in &kind.attributes {
        match known(object, name) {
            Some(value) if spec.kind.admits(&value) => drop(attributes.insert(name.clone(), value)),
            Some(_) => flaw = Some(format!("the attribute `{name}` of {object} is not a {}", spec.kind)),
            None if spec.required => flaw = Some(format!("the attribute `{name}` of {object} is not known")),
            None => {}
        }
    }
    (attributes, flaw)
}

impl From<Effect> for PolicyEffect {
    fn from(effect: Effect) -> Self {
        match effect {
            Effect::Permit => Self::Permit,
            Effect::Forbid => Self::Forbid,
        }
    }
}
