//! Decisions: a caller, an action, objects with attributes, and the verdict with its receipt.

use std::sync::Arc;
use std::time::Duration;

use cedar_policy::{Effect, EntityUid, PolicySet};
use identity::{SpiffeId, TrustDomain};

use crate::engine::Engine;
use crate::explain::{self, Scope};
use crate::forms::{Form, Forms, PolicyText};
use crate::in_force::{self, Withheld};
use crate::judge::{Asked, DISAGREEMENT, bare_object};
use crate::map::{CONNECT_ACTION, Mapping, PORT_TYPE};
use crate::object::{Attributes, ObjectRef};
use crate::openapi::{Compared, UnmappedOperation};
use crate::record::{DecisionRecord, Mode, PolicyEffect, RecordedObject, RecordedUser, Rule, cut};
use crate::request::{AttributeSource, Mapped, Refusal};
use crate::routes::RouteTable;
use crate::schema::{self, ServiceSchema};
use crate::shadow::Shadow;
use crate::verdict::{Caller, Denial, Occasion, Principal, Understood, Verdict, blank};
use crate::version::PolicyVersion;

/// One policy and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct PolicyEntry {
    pub(crate) id: Arc<str>,
    pub(crate) file: Arc<str>,
    pub(crate) line: usize,
    /// The three above, as a decision names them.
    pub(crate) rule: Rule,
    pub(crate) effect: PolicyEffect,
    pub(crate) scope: Scope,
    pub(crate) text: PolicyText,
}

/// What the scopes of policies open to a workload, for one action on one kind of object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    /// The action's name in the service's namespace.
    pub action: String,
    /// The full name of the objects' type.
    pub object: String,
    /// The ids of permits, with `?` behind one that has conditions.
    pub permits: String,
    /// The ids of forbids that may take it away again.
    pub forbids: String,
}

static NO_RULE: Rule = Rule::Absent;

/// A request is judged by the policy that mapped it, or not at all.
const POLICY_CHANGED: &str = "policy.changed";
/// A caller of another trust domain is denied.
pub(crate) const TRUST_DOMAIN: &str = "principal.trust_domain";
/// Denials of a decision that audit mode does not soften: they are not about what a policy lacks.
const ENFORCED_ALWAYS: [&str; 3] = [POLICY_CHANGED, TRUST_DOMAIN, DISAGREEMENT];

/// Everything that decides for one service; shared by all modes of it.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) schema: ServiceSchema,
    pub(crate) routes: RouteTable,
    pub(crate) mapping: Mapping,
    /// Methods of the service's `.proto` files that no route means.
    pub(crate) unmapped: Vec<String>,
    /// The mapping that brings what its schema is a copy of.
    pub(crate) shipped_as: Option<&'static str>,
    /// Its OpenAPI description beside its map.
    pub(crate) described: Compared,
    /// In the order of the files.
    pub(crate) entries: Box<[PolicyEntry]>,
    pub(crate) forms: Forms,
    pub(crate) engine: Engine,
    pub(crate) shadow: Shadow,
    pub(crate) version: PolicyVersion,
    /// How old a copy of the relations may be that are written by API, if its map asks them.
    pub(crate) relations_max_age: Option<Duration>,
}

/// The policy of one service: immutable, cheap to share, one version.
#[derive(Debug, Clone)]
pub struct ServicePolicy {
    shared: Arc<Shared>,
    mode: Mode,
    /// When audit mode ends by itself, since the Unix epoch.
    audit_until: Option<Duration>,
    /// For how long it may be in force without being signed anew.
    max_age: Duration,
    /// Why it allows nothing, if it does not.
    withheld: Option<Withheld>,
}

impl ServicePolicy {
    pub(crate) fn new(shared: Shared, mode: Mode, audit_until: Option<Duration>, max_age: Duration) -> Self {
        Self { shared: Arc::new(shared), mode, audit_until, max_age, withheld: None }
    }

    /// For how long it may be in force, from when it was signed, where control hands it out.
    pub fn max_age(&self) -> Duration {
        self.max_age
    }

    /// How old a copy of the relations may be that are written by API; `None` if nobody asks them here.
    pub fn relations_max_age(&self) -> Option<Duration> {
        self.shared.relations_max_age
    }

    /// The same, allowing nothing, in no mode.
    pub fn withhold(&self, why: Withheld) -> Self {
        Self { withheld: Some(why), ..self.clone() }
    }

    /// Why it allows nothing, if it does not.
    pub fn withheld(&self) -> Option<Withheld> {
        self.withheld
    }

    /// What is said instead of a decision, while it is withheld.
    pub(crate) fn check_withheld(&self) -> Result<(), Refusal> {
        self.withheld.map_or(Ok(()), |why| Err(Refusal::denied(why.rule(), why.reason())))
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The service's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether denials are enforced at this time since the Unix epoch.
    pub fn mode(&self, now: Duration) -> Mode {
        match self.audit_until {
            Some(end) if now >= end => Mode::Enforce,
            _ => self.mode,
        }
    }

    /// When its audit mode ends by itself, since the Unix epoch; `None` if it is in none, or in one without an end.
    pub fn audit_until(&self) -> Option<Duration> {
        self.audit_until
    }

    /// The same policy in another mode, for good.
    pub fn with_mode(&self, mode: Mode) -> Self {
        Self { mode, audit_until: None, ..self.clone() }
    }

    /// The version of the directory it was loaded from.
    pub fn version(&self) -> &PolicyVersion {
        &self.shared.version
    }

    /// The schema and the policies as Cedar has them, for those who reason about all requests there can be: made from
    /// their texts, whenever it is asked for.
    ///
    /// # Errors
    /// Never, but for a defect of Palisade's: the texts were read before.
    pub fn cedar(&self) -> Result<(&cedar_policy::Schema, PolicySet), String> {
        let forms = self.shared.entries.iter().map(|entry| Form::read(entry).map(|form| form.policy));
        let set = PolicySet::from_policies(forms.collect::<Result<Vec<_>, _>>()?);
        Ok((&self.shared.schema.schema, set.map_err(|error| error.to_string())?))
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
        self.check_withheld()?;
        self.shared.routes.map(parts)
    }

    /// Every route's template and where the attributes of its objects come from, by template.
    pub fn routes(&self) -> Vec<(String, AttributeSource)> {
        let routes = self.shared.routes.routes();
        let mut routes: Vec<_> =
            routes.map(|route| (route.template.clone(), route.attributes_from())).collect();
        routes.sort_unstable_by(|one, other| one.0.cmp(&other.0));
        routes
    }

    /// The gRPC message of these fields (ProtoJSON) that a call of `path` takes, for tests.
    pub(crate) fn message(&self, path: &str, fields: serde_json::Value) -> Result<Vec<u8>, String> {
        let called = self.shared.routes.routes().find(|route| route.takes("POST", path));
        let shape = called.and_then(|route| route.message.as_ref());
        shape.ok_or_else(|| format!("{path} is no method whose messages are judged"))?.write(fields)
    }

    /// The templates of the routes whose answers are judged object by object.
    pub fn listing_routes(&self) -> Vec<String> {
        let routes = self.shared.routes.routes().filter(|route| route.list.is_some());
        let mut routes: Vec<_> = routes.map(|route| route.template.clone()).collect();
        routes.sort_unstable();
        routes
    }

    /// The gRPC methods that the service's `.proto` files have and its map does not, which are denied to everybody.
    pub fn unmapped_methods(&self) -> &[String] {
        &self.shared.unmapped
    }

    /// The `mapping` that would bring the service's schema, where it has a copy of one that comes with Palisade.
    pub fn shipped_as(&self) -> Option<&'static str> {
        self.shared.shipped_as
    }

    /// The operations that the service's OpenAPI description has and its map does not.
    pub fn unmapped_operations(&self) -> &[UnmappedOperation] {
        &self.shared.described.unmapped
    }

    /// The templates of the routes that the service's OpenAPI description, if it has one, lacks.
    pub fn undescribed_routes(&self) -> &[String] {
        &self.shared.described.undescribed
    }

    /// What a workload may do, by the policies' scopes: a line for each action and kind of object that a permit
    /// opens to it. Conditions are not weighed; a policy that has some is marked with `?`.
    pub fn reach(&self, workload: &SpiffeId) -> Vec<Reach> {
        let shared = &*self.shared;
        let principal = schema::uid(&shared.schema.principals.workload, workload.as_str());
        let mut reach = Vec::new();
        for (name, action) in &shared.schema.actions {
            for kind in &action.objects {
                let of = |effect: PolicyEffect| {
                    let entries = shared.entries.iter().enumerate().filter(|(_, entry)| {
                        entry.effect == effect && entry.scope.reaches(shared, &principal, &action.uid, kind)
                    });
                    let named = entries.map(|(at, entry)| {
                        let mark = if shared.engine.has_condition(at) { "?" } else { "" };
                        format!("{}{mark}", entry.id)
                    });
                    named.collect::<Vec<_>>().join(", ")
                };
                let permits = of(PolicyEffect::Permit);
                if !permits.is_empty() {
                    let forbids = of(PolicyEffect::Forbid);
                    reach.push(Reach { action: name.clone(), object: kind.clone(), permits, forbids });
                }
            }
        }
        reach.sort_by(|one, other| (&one.action, &one.object).cmp(&(&other.action, &other.object)));
        reach
    }

    /// Every policy's id, file and text, in the order of the files.
    pub fn texts(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        self.shared.entries.iter().map(|entry| (&*entry.id, &*entry.file, entry.text.as_str()))
    }

    /// Every policy: its id, its file and the line where it begins there, in the order of the files.
    pub fn policies(&self) -> impl Iterator<Item = (&str, &str, usize)> {
        self.shared.entries.iter().map(|entry| (&*entry.id, &*entry.file, entry.line))
    }

    /// Whether any permit's scope could admit this: asked before the app is asked for attributes, so
    /// that a caller who could never be allowed reaches no code of the app at all.
    ///
    /// # Errors
    /// The denial, with the explanation of every policy's scope.
    pub fn screen(&self, caller: &Caller, mapped: &Mapped, occasion: &Occasion<'_>) -> Result<(), Denial> {
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
            self.shared.schema.types.get(&*mapped.route.kind),
        ) else {
            return Err(deny(
                Rule::Builtin("request.unknown".into()),
                "the schema lacks action or type".into(),
            ));
        };
        let engine = &self.shared.engine;
        let subject = |object: Option<&ObjectRef>| engine.subject(caller, action, kind, object);
        let refused = if mapped.objects().is_empty() {
            (!engine.in_reach(subject(None), false)).then_some(None)
        } else {
            mapped.objects().iter().find(|object| !engine.in_reach(subject(Some(object)), true)).map(Some)
        };
        let Some(object) = refused else { return Ok(()) };
        let reason = "no policy is about this caller, action and kind of object".to_owned();
        let mut denial = deny(Rule::Absent, reason);
        let principal = self.principal_uid(&caller.principal);
        let uid = object.map(|object| schema::uid(&kind.name, object.id()));
        let about = explain::Subject {
            principal: &principal,
            action: &action.uid,
            kind: &kind.name,
            object: uid.as_ref(),
            numbers: subject(object),
        };
        denial.0.explanation = Some(explain::scopes(&self.shared, &about));
        Err(denial)
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
        occasion: &Occasion<'_>,
    ) -> Verdict {
        let asked = Asked {
            caller,
            action: mapped.action(),
            objects: mapped.objects(),
            attributes,
            mapped: Some(mapped),
        };
        if let Err(refusal) = self.check_withheld() {
            return Verdict::Deny(self.refuse(Some(caller), refusal, occasion));
        }
        if !self.shared.routes.mapped(mapped) {
            let understood = asked.understood(Vec::new());
            let rule = Rule::Builtin(POLICY_CHANGED.into());
            let reason = "another policy mapped the request".to_owned();
            return Verdict::Deny(self.denial(Some(caller), occasion, understood, rule, reason));
        }
        if let Some((rule, reason)) = asked.unusable() {
            let understood = asked.understood(mapped.objects().iter().map(bare_object).collect());
            in_force::decided(true);
            let rule = Rule::Builtin(rule.into());
            return Verdict::Deny(self.denial(Some(caller), occasion, understood, rule, reason));
        }
        self.judge(&asked, occasion)
    }

    /// Decides about one action on one object, for callers that have no map: the vault, the gateway.
    pub fn decide_object(
        &self,
        caller: &Caller,
        action: &str,
        object: &ObjectRef,
        attributes: &Attributes,
        occasion: &Occasion<'_>,
    ) -> Verdict {
        if let Err(refusal) = self.check_withheld() {
            return Verdict::Deny(self.refuse(Some(caller), refusal, occasion));
        }
        let objects = std::slice::from_ref(object);
        self.judge(&Asked { caller, action, objects, attributes, mapped: None }, occasion)
    }

    /// Decides about a plain connection to the port of that name.
    ///
    /// Only a service whose map says `mapping = "tcp"` takes one at all, in every mode: where policies are
    /// about requests, a connection whose requests nobody reads would go round them.
    pub fn decide_connect(&self, caller: &Caller, port: &str, occasion: &Occasion<'_>) -> Verdict {
        if self.withheld.is_none() && self.shared.mapping != Mapping::Tcp {
            let reason = "the service's map does not say mapping = \"tcp\"";
            let refusal = Refusal::denied("tcp.not_allowed_by_map", reason);
            return Verdict::Deny(self.refuse(Some(caller), refusal, occasion));
        }
        self.decide_object(caller, CONNECT_ACTION, &self.port(port), &Attributes::none(), occasion)
    }

    /// The object that a plain connection to the port of that name is opened to.
    pub(crate) fn port(&self, name: &str) -> ObjectRef {
        ObjectRef::new(&self.shared.schema.full_kind(PORT_TYPE), name)
    }

    /// Turns a refusal into a denial with a receipt, enforced in every mode.
    pub fn refuse(&self, caller: Option<&Caller>, refusal: Refusal, occasion: &Occasion<'_>) -> Denial {
        let mut record = self.record(caller, occasion);
        record.mode = Mode::Enforce;
        record.status = Some(refusal.status());
        record.rule = Rule::Builtin(refusal.rule.into());
        record.reason = refusal.reason;
        record.route = refusal.route;
        Denial(Box::new(record))
    }

    pub(crate) fn check_trust_domain(&self, caller: &Caller) -> Result<(), String> {
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

    /// A policy as a decision names it.
    pub(crate) fn rule(&self, entry: usize) -> &Rule {
        self.shared.entries.get(entry).map_or(&NO_RULE, |entry| &entry.rule)
    }

    /// The record of a decided request but for what was decided.
    pub(crate) fn record_mapped(
        &self,
        caller: &Caller,
        mapped: &Mapped,
        attributes: &Attributes,
        occasion: &Occasion<'_>,
    ) -> DecisionRecord {
        let (action, objects) = (mapped.action(), mapped.objects());
        self.record_asked(&Asked { caller, action, objects, attributes, mapped: Some(mapped) }, occasion)
    }

    /// Likewise.
    pub(crate) fn record_named(
        &self,
        caller: &Caller,
        action: &str,
        object: &ObjectRef,
        attributes: &Attributes,
        occasion: &Occasion<'_>,
    ) -> DecisionRecord {
        let objects = std::slice::from_ref(object);
        self.record_asked(&Asked { caller, action, objects, attributes, mapped: None }, occasion)
    }

    fn record_asked(&self, asked: &Asked<'_>, occasion: &Occasion<'_>) -> DecisionRecord {
        let mut record = self.record(Some(asked.caller), occasion);
        let types = &self.shared.schema.types;
        let objects = asked.objects.iter().enumerate().map(|(at, object)| {
            let attributes =
                types.get(object.kind()).map(|kind| asked.gather(at, object, kind).0).unwrap_or_default();
            RecordedObject { told_by: asked.told_by(&attributes), attributes, ..bare_object(object) }
        });
        asked.understood(objects.collect()).write(&mut record);
        record
    }

    pub(crate) fn denial(
        &self,
        caller: Option<&Caller>,
        occasion: &Occasion<'_>,
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

    pub(crate) fn record(&self, caller: Option<&Caller>, occasion: &Occasion<'_>) -> DecisionRecord {
        let mut record = blank(&self.shared.name, occasion);
        record.mode = self.mode(occasion.now);
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

impl From<Effect> for PolicyEffect {
    fn from(effect: Effect) -> Self {
        match effect {
            Effect::Permit => Self::Permit,
            Effect::Forbid => Self::Forbid,
        }
    }
}
