//! Which policies can be about a request at all: found by caller, action and object, whatever their number.
//!
//! Every policy stands under one key a listed action, made of what its scope asks for. A request has few keys:
//! one for each shape that a scope can have (*this caller or any, this action or any, this object, this type or
//! any*), and only the shapes that some policy has are looked up.
//!
//! The tables are filled when policies are loaded and never after: what callers send is looked up in them and never
//! put there, so a fast hash does.

use std::collections::BTreeSet;

use cedar_policy::{
    ActionConstraint, EntityTypeName, EntityUid, Policy, PrincipalConstraint, ResourceConstraint,
};
use foldhash::{HashMap, HashMapExt as _, HashSet, HashSetExt as _};

use crate::decide::PolicyEntry;
use crate::record::PolicyEffect;
use crate::schema::ServiceSchema;

/// Any value of a key's part.
const ANY: u32 = u32::MAX;
/// Any caller of one of the two types.
const WORKLOADS: u32 = u32::MAX - 1;
const CLIENTS: u32 = u32::MAX - 2;
/// A caller or an object that no policy names.
const UNNAMED: u32 = u32::MAX - 3;

/// What a scope asks for, and what a request has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    principal: u32,
    action: u32,
    kind: u32,
    object: u32,
}

/// Which parts of a key a scope leaves open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Shape {
    principal: Caller,
    action: bool,
    object: Object,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Caller {
    Named,
    OfType,
    Any,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Object {
    Named,
    OfType,
    Any,
}

/// A policy's scope in numbers; `None` in a part that no request of this service can have.
#[derive(Debug, Clone, Copy)]
struct Scope {
    principal: Option<u32>,
    /// An index into the sets of actions, or [`ANY`].
    actions: u32,
    object: Option<(u32, u32)>,
}

/// Who asks, what for, and for which object, in numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject {
    principal: u32,
    of_type: u32,
    action: u32,
    kind: u32,
    /// `None` while the object is not known yet.
    object: Option<u32>,
}

/// The policies of a service by their scopes.
#[derive(Debug)]
pub(crate) struct Index {
    workloads: HashMap<Box<str>, u32>,
    clients: HashMap<Box<str>, u32>,
    /// By type, then by id.
    objects: Vec<HashMap<Box<str>, u32>>,
    shapes: Vec<Shape>,
    /// Where in `entries` the policies of a key stand.
    keys: HashMap<Key, (u32, u32)>,
    entries: Vec<u32>,
    /// Keys of permits for single objects, the object left open: what a request whose object is not known yet
    /// may come to.
    reachable: HashSet<Key>,
    scopes: Vec<Scope>,
    action_sets: Vec<Box<[bool]>>,
}

impl Index {
    pub(crate) fn new(schema: &ServiceSchema, entries: &[(PolicyEntry, Policy)]) -> Self {
        let mut building = Building {
            schema,
            sets: HashMap::new(),
            found: HashMap::new(),
            index: Self {
                workloads: HashMap::new(),
                clients: HashMap::new(),
                objects: vec![HashMap::new(); schema.types.len()],
                shapes: Vec::new(),
                keys: HashMap::new(),
                entries: Vec::new(),
                reachable: HashSet::new(),
                scopes: Vec::with_capacity(entries.len()),
                action_sets: Vec::new(),
            },
        };
        for (number, (entry, policy)) in (0u32..).zip(entries) {
            building.add(number, entry.effect, policy);
        }
        building.finish()
    }

    /// A request in numbers.
    pub(crate) fn subject(
        &self,
        principal: Result<&str, &str>,
        action: usize,
        kind: usize,
        object: Option<&str>,
    ) -> Subject {
        let (known, of_type, id) = match principal {
            Ok(workload) => (&self.workloads, WORKLOADS, workload),
            Err(client) => (&self.clients, CLIENTS, client),
        };
        let named = self.objects.get(kind).filter(|named| !named.is_empty());
        let number = |id: &str| named.and_then(|named| named.get(id)).copied().unwrap_or(UNNAMED);
        Subject {
            principal: known.get(id).copied().unwrap_or(UNNAMED),
            of_type,
            action: small(action),
            kind: small(kind),
            object: object.map(number),
        }
    }

    /// The policies whose scope admits a request, each once, in no order.
    pub(crate) fn candidates(&self, subject: Subject) -> impl Iterator<Item = usize> {
        self.shapes
            .iter()
            .filter_map(move |shape| self.keys.get(&shape.key(subject)?))
            .flat_map(|(from, to)| self.entries.get(*from as usize..*to as usize).unwrap_or_default())
            .map(|entry| *entry as usize)
    }

    /// Whether a permit for some single object is in reach of a request whose object is not known yet.
    pub(crate) fn may_reach(&self, subject: Subject) -> bool {
        let principals = [subject.principal, subject.of_type, ANY];
        let mut keys = principals.iter().flat_map(|principal| {
            [subject.action, ANY].map(|action| Key {
                principal: *principal,
                action,
                kind: subject.kind,
                object: ANY,
            })
        });
        keys.any(|key| self.reachable.contains(&key))
    }

    /// Whether a policy's scope admits objects of a type.
    pub(crate) fn is_about(&self, entry: usize, kind: usize) -> bool {
        let object = self.scopes.get(entry).and_then(|scope| scope.object);
        object.is_some_and(|(wanted, _)| wanted == ANY || wanted == small(kind))
    }

    /// Which of caller, action and object a policy's scope admits.
    pub(crate) fn admits(&self, entry: usize, subject: Subject) -> (bool, bool, bool) {
        let Some(scope) = self.scopes.get(entry) else { return (false, false, false) };
        let principal = scope
            .principal
            .is_some_and(|wanted| wanted == ANY || wanted == subject.of_type || wanted == subject.principal);
        let action = scope.actions == ANY
            || self
                .action_sets
                .get(scope.actions as usize)
                .and_then(|set| set.get(subject.action as usize))
                .copied()
                .unwrap_or_default();
        let object = scope.object.is_some_and(|(kind, object)| {
            let same = object == ANY || subject.object.is_none_or(|asked| asked == object);
            kind == ANY || kind == subject.kind && same
        });
        (principal, action, object)
    }
}

impl Shape {
    /// The key under which policies of this shape stand that are about the request.
    fn key(self, subject: Subject) -> Option<Key> {
        let principal = match self.principal {
            // No policy stands under a name that none has.
            Caller::Named if subject.principal == UNNAMED => return None,
            Caller::Named => subject.principal,
            Caller::OfType => subject.of_type,
            Caller::Any => ANY,
        };
        let (kind, object) = match (self.object, subject.object) {
            (Object::Named, None | Some(UNNAMED)) => return None,
            (Object::Named, Some(object)) => (subject.kind, object),
            (Object::OfType, _) => (subject.kind, ANY),
            (Object::Any, _) => (ANY, ANY),
        };
        let action = if self.action { subject.action } else { ANY };
        Some(Key { principal, action, kind, object })
    }

    fn of(key: &Key) -> Self {
        Self {
            principal: match key.principal {
                ANY => Caller::Any,
                WORKLOADS | CLIENTS => Caller::OfType,
                _ => Caller::Named,
            },
            action: key.action != ANY,
            object: match (key.kind, key.object) {
                (ANY, _) => Object::Any,
                (_, ANY) => Object::OfType,
                _ => Object::Named,
            },
        }
    }
}

struct Building<'a> {
    schema: &'a ServiceSchema,
    sets: HashMap<Box<[bool]>, u32>,
    found: HashMap<Key, Vec<u32>>,
    index: Index,
}

impl Building<'_> {
    fn add(&mut self, number: u32, effect: PolicyEffect, policy: &Policy) {
        let principal = self.principal(&policy.principal_constraint());
        let object = self.object(&policy.resource_constraint());
        let (actions, listed) = self.actions(&policy.action_constraint());
        self.index.scopes.push(Scope { principal, actions, object });
        let (Some(principal), Some((kind, object))) = (principal, object) else { return };
        for action in listed {
            let key = Key { principal, action, kind, object };
            self.found.entry(key).or_default().push(number);
            if effect == PolicyEffect::Permit && object != ANY {
                self.index.reachable.insert(Key { object: ANY, ..key });
            }
        }
    }

    fn principal(&mut self, constraint: &PrincipalConstraint) -> Option<u32> {
        match constraint {
            PrincipalConstraint::Any => Some(ANY),
            PrincipalConstraint::Eq(uid) | PrincipalConstraint::In(uid) => self.caller(uid),
            PrincipalConstraint::Is(kind) => self.callers(kind),
            PrincipalConstraint::IsIn(kind, uid) if kind == uid.type_name() => self.caller(uid),
            PrincipalConstraint::IsIn(..) => None,
        }
    }

    fn callers(&self, kind: &EntityTypeName) -> Option<u32> {
        let types = &self.schema.principals;
        if *kind == types.workload {
            Some(WORKLOADS)
        } else if *kind == types.client {
            Some(CLIENTS)
        } else {
            None
        }
    }

    fn caller(&mut self, uid: &EntityUid) -> Option<u32> {
        // One count for both: the type is no part of a key.
        let next = self.index.workloads.len() + self.index.clients.len();
        let named = match self.callers(uid.type_name())? {
            WORKLOADS => &mut self.index.workloads,
            _ => &mut self.index.clients,
        };
        Some(number(named, uid, next))
    }

    fn object(&mut self, constraint: &ResourceConstraint) -> Option<(u32, u32)> {
        match constraint {
            ResourceConstraint::Any => Some((ANY, ANY)),
            ResourceConstraint::Is(kind) => self.kind(kind).map(|kind| (kind, ANY)),
            ResourceConstraint::Eq(uid) | ResourceConstraint::In(uid) => self.named(uid),
            ResourceConstraint::IsIn(kind, uid) if kind == uid.type_name() => self.named(uid),
            ResourceConstraint::IsIn(..) => None,
        }
    }

    fn kind(&self, name: &EntityTypeName) -> Option<u32> {
        self.schema.types.get(&name.to_string()).map(|kind| small(kind.number))
    }

    fn named(&mut self, uid: &EntityUid) -> Option<(u32, u32)> {
        let kind = self.kind(uid.type_name())?;
        let named = self.index.objects.get_mut(kind as usize)?;
        let next = named.len();
        Some((kind, number(named, uid, next)))
    }

    /// The set of actions, and each of them for itself.
    fn actions(&mut self, constraint: &ActionConstraint) -> (u32, BTreeSet<u32>) {
        let schema = self.schema;
        let within = |group: &EntityUid, action: &EntityUid| schema.is_within(action, group);
        let set: Box<[bool]> = match constraint {
            ActionConstraint::Any => return (ANY, BTreeSet::from([ANY])),
            ActionConstraint::Eq(uid) => schema.actions.values().map(|action| action.uid == *uid).collect(),
            ActionConstraint::In(uids) => {
                let fits = |action: &EntityUid| uids.iter().any(|group| within(group, action));
                schema.actions.values().map(|action| fits(&action.uid)).collect()
            }
        };
        let listed = (0u32..).zip(&set).filter(|(_, fits)| **fits).map(|(action, _)| action).collect();
        let known = self.index.action_sets.len();
        let number = *self.sets.entry(set.clone()).or_insert(small(known));
        if number as usize == known {
            self.index.action_sets.push(set);
        }
        (number, listed)
    }

    fn finish(self) -> Index {
        let mut index = self.index;
        let mut shapes = BTreeSet::new();
        for (key, entries) in self.found {
            shapes.insert(Shape::of(&key));
            let from = small(index.entries.len());
            index.entries.extend(entries);
            index.keys.insert(key, (from, small(index.entries.len())));
        }
        index.shapes = shapes.into_iter().collect();
        index.keys.shrink_to_fit();
        index.entries.shrink_to_fit();
        index
    }
}

fn number(named: &mut HashMap<Box<str>, u32>, uid: &EntityUid, next: usize) -> u32 {
    *named.entry(uid.id().unescaped().into()).or_insert(small(next))
}

/// Counts here are of what files of 16 MiB hold; one that does not fit would name nothing.
fn small(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(UNNAMED).min(UNNAMED)
}
