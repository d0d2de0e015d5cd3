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

use cedar_policy::{EntityUid, Request};
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
    rules: Vec<(PolicyEffect, Condition)>,
    expressions: Vec<Expr>,
    /// The number of the type of workloads, of clients, of actions, and of each type of objects.
    workload: u32,
    client: u32,
    action: u32,
    kinds: Vec<u32>,
    /// For each type of objects and each attribute that conditions name: its place in the type.
    places: Vec<Box<[Option<usize>]>>,
    /// The requests that Cedar takes by their shape, see [`Engine::takes`].
    taken: Vec<bool>,
}

impl Engine {
    pub(crate) fn new(schema: &ServiceSchema, entries: &[PolicyEntry]) -> Self {
        let mut names = Names::new(schema);
        let workload = names.kind(&schema.principals.workload.to_string());
        let client = names.kind(&schema.principals.client.to_string());
        let action = schema.actions.values().next().map(|action| action.uid.type_name().to_string());
        let action = names.kind(&action.unwrap_or_default());
        let types = sorted(schema);
        let kinds = types.iter().map(|kind| names.kind(&kind.name.to_string())).collect();
        let rules = entries.iter().map(|entry| (entry.effect, names.compile(&entry.policy))).collect();
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
        let index = Index::new(schema, entries);
        let expressions = names.expressions;
        Self { index, rules, expressions, workload, client, action, kinds, places, taken }
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

    /// What the policies say of one object, or `None` if that is for Cedar to say.
    pub(crate) fn rule(
        &self,
        caller: &Caller,
        action: &Action,
        object: &ObjectRef,
        kind: &ObjectType,
        attributes: &Values<'_>,
        now: i64,
    ) -> Option<Ruling> {
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
        let (mut failed, mut forbidden, mut permitted) = (None, None, None);
        let first =
            |known: &mut Option<usize>, entry| *known = Some(known.map_or(entry, |k: usize| k.min(entry)));
        for entry in self.index.candidates(self.subject(caller, action, kind, Some(object))) {
            let (effect, condition) = self.rules.get(entry)?;
            let holds = match condition {
                Condition::Always => Ok(true),
                Condition::If(condition) => facts.hold(*condition),
                Condition::Cedar => return None,
            };
            match (holds, effect) {
                (Err(_), _) => first(&mut failed, entry),
                (Ok(true), PolicyEffect::Forbid) => first(&mut forbidden, entry),
                (Ok(true), PolicyEffect::Permit) => first(&mut permitted, entry),
                (Ok(false), _) => {}
            }
        }
        Some(match (failed, forbidden, permitted) {
            (Some(entry), _, _) => Ruling::Failed(entry),
            (_, Some(entry), _) => Ruling::Forbidden(entry),
            (_, _, Some(entry)) => Ruling::Permitted(entry),
            _ => Ruling::Unpermitted,
        })
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
