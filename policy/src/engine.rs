//! Decisions without Cedar, for the policies and requests that are ordinary: an [`Index`] finds the policies that
//! can be about a request, and their conditions were compiled to [`Expr`]s when they were loaded.
//!
//! `Shared::ask` says what every answer given here must be; `tests/` compares them, and so does production now
//! and then.

mod compile;
pub(crate) mod expr;
mod index;

#[cfg(test)]
mod tests;

use cedar_policy::{EntityUid, Policy, Request};
use identity::txn::User;
use smallvec::SmallVec;

use self::compile::{Condition, Names};
use self::expr::{Entity, Expr, Facts, Value};
use self::index::Index;
pub(crate) use self::index::Subject;
use crate::decide::PolicyEntry;
use crate::object::ObjectRef;
use crate::record::PolicyEffect;
use crate::schema::{self, Action, ObjectType, ServiceSchema};
use crate::verdict::{Caller, Principal};

/// What policies say about one object; the policy by its place in the order of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ruling {
    /// The first of those that permit it, and nothing is against it.
    Permitted(usize),
    /// The first of those that forbid it.
    Forbidden(usize),
    /// The first of those whose evaluation failed: a skipped forbid would allow, so this denies.
    Failed(usize),
    /// None permits it.
    Unpermitted,
}

/// The values of an object's attributes, in the order of its type.
pub(crate) type Values<'a> = SmallVec<[Option<Value<'a>>; 8]>;

/// A service's policies, ready to be asked.
#[derive(Debug)]
pub(crate) struct Engine {
    index: Index,
    rules: Box<[(PolicyEffect, Condition)]>,
    expressions: Box<[Expr]>,
    /// The number of the type of workloads, of clients, of actions, and of each type of objects.
    workload: u32,
    client: u32,
    action: u32,
    kinds: Vec<u32>,
    /// For each type of objects and each attribute that conditions name: its place in the type.
    places: Vec<Box<[Option<usize>]>>,
    /// The requests that Cedar takes by their shape, see [`Engine::takes`].
    taken: Box<[bool]>,
    /// The numbers of the types of objects all of whose requests are put to Cedar.
    untaken: Box<[usize]>,
}

/// What the policies about an object say, as far as the engine can tell: the first of those that failed, forbid and
/// permit it, and those that are for Cedar to evaluate.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    failed: Option<usize>,
    forbidden: Option<usize>,
    permitted: Option<usize>,
    pub(crate) unheard: SmallVec<[usize; 4]>,
}

impl Heard {
    /// Adds what one policy says, or the first of several that say the same.
    fn add(&mut self, ruling: Ruling) {
        let (known, entry) = match ruling {
            Ruling::Failed(entry) => (&mut self.failed, entry),
            Ruling::Forbidden(entry) => (&mut self.forbidden, entry),
            Ruling::Permitted(entry) => (&mut self.permitted, entry),
            Ruling::Unpermitted => return,
        };
        *known = Some(known.map_or(entry, |known| known.min(entry)));
    }

    /// What it comes to, if nothing is left to Cedar.
    pub(crate) fn settled(&self) -> Option<Ruling> {
        let ruling = match (self.failed, self.forbidden, self.permitted) {
            (Some(entry), _, _) => Ruling::Failed(entry),
            (_, Some(entry), _) => Ruling::Forbidden(entry),
            (_, _, Some(entry)) => Ruling::Permitted(entry),
            _ => Ruling::Unpermitted,
        };
        self.unheard.is_empty().then_some(ruling)
    }

    /// What it comes to once Cedar has said this of the rest.
    pub(crate) fn with(mut self, others: Ruling) -> Option<Ruling> {
        self.add(others);
        self.unheard.clear();
        self.settled()
    }
}

impl Engine {
    pub(crate) fn new(schema: &ServiceSchema, policies: &[(PolicyEntry, Policy)]) -> Self {
        let mut names = Names::new(schema);
        let workload = names.kind(&schema.principals.workload.to_string());
        let client = names.kind(&schema.principals.client.to_string());
        let action = schema.actions.values().next().map(|action| action.uid.type_name().to_string());
        let action = names.kind(&action.unwrap_or_default());
        let types = sorted(schema);
        let kinds = types.iter().map(|kind| names.kind(&kind.name.to_string())).collect();
        let rules = policies.iter().map(|(entry, policy)| (entry.effect, names.compile(policy))).collect();
        let place = |kind: &ObjectType, name: &String| kind.attributes.keys().position(|known| known == name);
        let places = types
            .iter()
            .map(|kind| names.attributes.iter().map(|name| place(kind, name)).collect())
            .collect();
        let mut taken = Vec::with_capacity(schema.actions.len() * 2 * types.len());
        for action in schema.actions.values() {
            for principal in [&schema.principals.workload, &schema.principals.client] {
                taken.extend(types.iter().map(|kind| is_taken(schema, principal, action, kind)));
            }
        }
        let takes = |action: &Action, kind: &ObjectType| {
            let at = |of_type: usize| (action.number * 2 + of_type) * types.len() + kind.number;
            [0, 1].iter().any(|of_type| taken.get(at(*of_type)).copied().unwrap_or_default())
        };
        let is_untaken = |kind: &ObjectType| {
            let mut about =
                schema.actions.values().filter(|action| action.objects.contains(&kind.name.to_string()));
            about.any(|action| !takes(action, kind))
        };
        let untaken = types.iter().filter(|kind| is_untaken(kind)).map(|kind| kind.number).collect();
        let index = Index::new(schema, policies);
        let expressions = names.expressions.into();
        Self {
            index,
            rules,
            expressions,
            workload,
            client,
            action,
            kinds,
            places,
            taken: taken.into(),
            untaken,
        }
    }

    /// Whether a policy says more than its scope does.
    pub(crate) fn has_condition(&self, entry: usize) -> bool {
        self.rules.get(entry).is_none_or(|rule| rule.1 != Condition::Always)
    }

    /// Whether Cedar has to be asked about a policy whenever a request is about it.
    pub(crate) fn is_for_cedar(&self, entry: usize) -> bool {
        self.rules.get(entry).is_none_or(|rule| rule.1 == Condition::Cedar)
            || self.untaken.iter().any(|kind| self.index.is_about(entry, *kind))
    }

    /// A request in numbers. Without an object: whatever it may turn out to be.
    pub(crate) fn subject(
        &self,
        caller: &Caller,
        action: &Action,
        kind: &ObjectType,
        object: Option<&ObjectRef>,
    ) -> Subject {
        let principal = match &caller.principal {
            Principal::Workload(id) => Ok(id.as_str()),
            Principal::Client(id) => Err(id.as_str()),
        };
        self.index.subject(principal, action.number, kind.number, object.map(ObjectRef::id))
    }

    /// Whether any permit's scope admits it.
    pub(crate) fn in_reach(&self, subject: Subject, object_known: bool) -> bool {
        let permits = |entry: usize| self.rules.get(entry).is_some_and(|rule| rule.0 == PolicyEffect::Permit);
        self.index.candidates(subject).any(permits) || !object_known && self.index.may_reach(subject)
    }

    /// Which of caller, action and object a policy's scope admits.
    pub(crate) fn admits(&self, entry: usize, subject: Subject) -> (bool, bool, bool) {
        self.index.admits(entry, subject)
    }

    /// The policies whose scope admits it, in the order of the files.
    pub(crate) fn candidates(&self, subject: Subject) -> Vec<usize> {
        let mut candidates: Vec<usize> = self.index.candidates(subject).collect();
        candidates.sort_unstable();
        candidates
    }

    /// What the policies say of one object, or `None` if all of that is for Cedar to say.
    pub(crate) fn hear(
        &self,
        caller: &Caller,
        action: &Action,
        object: &ObjectRef,
        kind: &ObjectType,
        attributes: &Values<'_>,
        now: i64,
    ) -> Option<Heard> {
        let (of_type, principal, workload) = match &caller.principal {
            Principal::Workload(id) => (0, Entity { kind: self.workload, id: id.as_str() }, Some(id)),
            Principal::Client(id) => (1, Entity { kind: self.client, id }, None),
        };
        let user: Option<&User> = caller.user.as_deref();
        let facts = Facts {
            expressions: &self.expressions,
            principal,
            workload,
            action: Entity { kind: self.action, id: action.uid.id().unescaped() },
            action_number: action.number,
            resource: Entity { kind: *self.kinds.get(kind.number)?, id: object.id() },
            attributes,
            places: self.places.get(kind.number)?,
            user,
            auth_time: user.map_or(Ok(0), |user| i64::try_from(user.auth_time)).ok()?,
            chain: &caller.chain,
            now,
        };
        self.takes(action, of_type, kind).then_some(())?;
        let mut heard = Heard::default();
        for entry in self.index.candidates(self.subject(caller, action, kind, Some(object))) {
            let (effect, condition) = self.rules.get(entry)?;
            let holds = match condition {
                Condition::Always => Ok(true),
                Condition::If(condition) => facts.hold(*condition),
                Condition::Cedar => {
                    heard.unheard.push(entry);
                    continue;
                }
            };
            heard.add(match (holds, effect) {
                (Err(_), _) => Ruling::Failed(entry),
                (Ok(true), PolicyEffect::Forbid) => Ruling::Forbidden(entry),
                (Ok(true), PolicyEffect::Permit) => Ruling::Permitted(entry),
                (Ok(false), _) => Ruling::Unpermitted,
            });
        }
        Some(heard)
    }

    /// Whether a request of this shape is one that Cedar takes, and none of which it looks at more than the
    /// shape. Every other is put to it.
    fn takes(&self, action: &Action, of_type: usize, kind: &ObjectType) -> bool {
        let at = (action.number * 2 + of_type) * self.kinds.len() + kind.number;
        self.taken.get(at).copied().unwrap_or_default()
    }
}

/// The types by number.
fn sorted(schema: &ServiceSchema) -> Vec<&ObjectType> {
    let mut types: Vec<&ObjectType> = schema.types.values().collect();
    types.sort_by_key(|kind| kind.number);
    types
}

/// Asks Cedar itself, with ids that no schema lists: so a type whose ids are listed is not taken either.
fn is_taken(
    schema: &ServiceSchema,
    principal: &cedar_policy::EntityTypeName,
    action: &Action,
    kind: &ObjectType,
) -> bool {
    let principals = &schema.principals;
    // A caller that is also the object would be described twice.
    if kind.name == principals.workload || kind.name == principals.client {
        return false;
    }
    let nobody = |kind: &cedar_policy::EntityTypeName| -> EntityUid { schema::uid(kind, "\0") };
    [None, Some(schema::sample_user(schema.user))].into_iter().all(|user| {
        schema::context(user, ["spiffe://example/service/example".to_owned()], 0).is_ok_and(|context| {
            let (principal, object) = (nobody(principal), nobody(&kind.name));
            Request::new(principal, action.uid.clone(), object, context, Some(&schema.schema)).is_ok()
        })
    })
}
