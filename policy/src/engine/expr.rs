//! Conditions as small expressions over the values that every request has: Cedar's semantics for the operators that
//! ordinary policies are made of.
//!
//! Both sides of an operator are evaluated, `&&`, `||` and `if` excepted; a value of the wrong type, a missing
//! attribute and an overflow are failures. What a failure says is Cedar's business: here it has no words.

use std::cmp::Ordering;

use identity::SpiffeId;
use identity::txn::User;

use crate::object::AttributeValue;
use crate::schema::service_of;

/// Most comparisons of two sets element by element; larger ones are sorted first, so that nobody who fills a
/// set (an app, an issuer of groups) decides what a decision costs.
const MAX_COMPARISONS: usize = 1024;

/// An evaluation that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failed;

/// An entity: the number of its type, and its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entity<'a> {
    pub(crate) kind: u32,
    pub(crate) id: &'a str,
}

/// A value that is no set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scalar<'a> {
    Bool(bool),
    Long(i64),
    Text(&'a str),
    Entity(Entity<'a>),
}

/// A value, borrowed from the request or from the policy. Records are looked into and never passed around.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value<'a> {
    Scalar(Scalar<'a>),
    Set(Elements<'a>),
}

/// The elements of a set where they are; some may be there twice.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Elements<'a> {
    Texts(&'a [String]),
    Ids(&'a [SpiffeId]),
    /// INVARIANT: without sets among them; `AttributeType` admits no others.
    Attribute(&'a [AttributeValue]),
    /// INVARIANT: sorted.
    Literals(&'a [Literal]),
}

/// A scalar that a policy states.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Literal {
    Bool(bool),
    Long(i64),
    Text(Box<str>),
    Entity(u32, Box<str>),
}

/// Everything that a condition can look at.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    /// Of all policies.
    pub(crate) expressions: &'a [Expr],
    pub(crate) principal: Entity<'a>,
    /// `None` for a client, which has no attributes.
    pub(crate) workload: Option<&'a SpiffeId>,
    pub(crate) action: Entity<'a>,
    pub(crate) action_number: usize,
    pub(crate) resource: Entity<'a>,
    /// In the order of the resource's type.
    pub(crate) attributes: &'a [Option<Value<'a>>],
    /// For every attribute that policies name, its place in the resource's type.
    pub(crate) places: &'a [Option<usize>],
    pub(crate) user: Option<&'a User>,
    /// The user's, as Cedar counts.
    pub(crate) auth_time: i64,
    pub(crate) chain: &'a [SpiffeId],
    pub(crate) now: i64,
}

/// A member of `context.user`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum UserMember {
    Id,
    Issuer,
    Client,
    Scopes,
    Groups,
    AuthTime,
}

/// The place of an expression among all of a service's. Each stands there once, after its parts, whatever the
/// number of policies that say it: what they have in common stays in the cache, and what a policy has for itself
/// stands together.
pub(crate) type Node = u32;

/// A condition or a part of one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Expr {
    Literal(Literal),
    Literals(Box<[Literal]>),
    Principal,
    Action,
    Resource,
    /// `principal.service`
    Service,
    /// `principal.trust_domain`
    TrustDomain,
    /// `principal has service` and the like: workloads do, clients do not.
    IsDescribed,
    /// `resource.x`, by the number of `x` among the names that policies use.
    Attribute(usize),
    HasAttribute(usize),
    /// `context has user`
    HasUser,
    User(UserMember),
    /// `context.user has x`, which every user has or none.
    UserHas(bool),
    Chain,
    Now,
    Not(Node),
    Negate(Node),
    IsEmpty(Node),
    Like(Node, Pattern),
    Is(Node, u32),
    And(Node, Node),
    Or(Node, Node),
    Equal(Node, Node),
    Less(Node, Node),
    LessOrEqual(Node, Node),
    Add(Node, Node),
    Subtract(Node, Node),
    Multiply(Node, Node),
    Contains(Node, Node),
    ContainsAll(Node, Node),
    ContainsAny(Node, Node),
    /// Of a principal or a resource, which have no ancestors.
    In(Node, Node),
    /// `action in …`, by the number of the action.
    ActionIn(Box<[bool]>),
    If(Node, Node, Node),
}

impl<'a> Facts<'a> {
    /// Whether a condition holds.
    pub(crate) fn hold(&self, node: Node) -> Result<bool, Failed> {
        match self.expression(node)? {
            Expr::And(left, right) => Ok(self.hold(*left)? && self.hold(*right)?),
            Expr::Or(left, right) => Ok(self.hold(*left)? || self.hold(*right)?),
            Expr::Not(inner) => Ok(!self.hold(*inner)?),
            Expr::If(test, yes, no) => self.hold(if self.hold(*test)? { *yes } else { *no }),
            Expr::Equal(left, right) => Ok(self.value(*left)?.equals(self.value(*right)?)),
            Expr::Less(left, right) => Ok(self.long(*left)? < self.long(*right)?),
            Expr::LessOrEqual(left, right) => Ok(self.long(*left)? <= self.long(*right)?),
            Expr::Contains(set, value) => {
                let (set, value) = (self.set(*set)?, self.value(*value)?);
                // No set of these has sets among its elements.
                Ok(matches!(value, Value::Scalar(scalar) if set.contain(scalar)))
            }
            Expr::ContainsAll(set, others) => {
                let set = self.set(*set)?;
                Ok(self.set(*others)?.are_all_in(set))
            }
            Expr::ContainsAny(set, others) => {
                let set = self.set(*set)?;
                Ok(set.meet(self.set(*others)?))
            }
            Expr::IsEmpty(set) => Ok(self.set(*set)?.len() == 0),
            Expr::Like(text, pattern) => Ok(pattern.matches(self.text(*text)?)),
            Expr::Is(entity, kind) => Ok(self.entity(*entity)?.kind == *kind),
            Expr::In(entity, others) => self.entity(*entity)?.is_in(self.value(*others)?),
            Expr::ActionIn(actions) => actions.get(self.action_number).copied().ok_or(Failed),
            Expr::HasUser => Ok(self.user.is_some()),
            Expr::UserHas(known) => self.user.map(|_| *known).ok_or(Failed),
            Expr::IsDescribed => Ok(self.workload.is_some()),
            Expr::HasAttribute(name) => Ok(self.attribute(*name).is_some()),
            _ => match self.value(node)? {
                Value::Scalar(Scalar::Bool(holds)) => Ok(holds),
                _ => Err(Failed),
            },
        }
    }

    fn value(&self, node: Node) -> Result<Value<'a>, Failed> {
        let text = |text: &'a str| Value::Scalar(Scalar::Text(text));
        let long = |number: i64| Value::Scalar(Scalar::Long(number));
        let checked = |number: Option<i64>| number.map(long).ok_or(Failed);
        Ok(match self.expression(node)? {
            Expr::Literal(literal) => Value::Scalar(literal.scalar()),
            Expr::Literals(literals) => Value::Set(Elements::Literals(literals)),
            Expr::Principal => Value::Scalar(Scalar::Entity(self.principal)),
            Expr::Action => Value::Scalar(Scalar::Entity(self.action)),
            Expr::Resource => Value::Scalar(Scalar::Entity(self.resource)),
            Expr::Service => text(service_of(self.workload.ok_or(Failed)?)),
            Expr::TrustDomain => text(self.workload.ok_or(Failed)?.trust_domain().as_str()),
            Expr::Attribute(name) => self.attribute(*name).ok_or(Failed)?,
            Expr::User(member) => {
                let user = self.user.ok_or(Failed)?;
                match member {
                    UserMember::Id => text(&user.id),
                    UserMember::Issuer => text(&user.issuer),
                    UserMember::Client => text(&user.client),
                    UserMember::Scopes => Value::Set(Elements::Texts(&user.scopes)),
                    UserMember::Groups => Value::Set(Elements::Texts(&user.groups)),
                    UserMember::AuthTime => long(self.auth_time),
                }
            }
            Expr::Chain => Value::Set(Elements::Ids(self.chain)),
            Expr::Now => long(self.now),
            Expr::Negate(inner) => return checked(self.long(*inner)?.checked_neg()),
            Expr::Add(left, right) => return checked(self.long(*left)?.checked_add(self.long(*right)?)),
            Expr::Subtract(left, right) => return checked(self.long(*left)?.checked_sub(self.long(*right)?)),
            Expr::Multiply(left, right) => return checked(self.long(*left)?.checked_mul(self.long(*right)?)),
            Expr::If(test, yes, no) => return self.value(if self.hold(*test)? { *yes } else { *no }),
            _ => Value::Scalar(Scalar::Bool(self.hold(node)?)),
        })
    }

    fn long(&self, node: Node) -> Result<i64, Failed> {
        match self.value(node)? {
            Value::Scalar(Scalar::Long(number)) => Ok(number),
            _ => Err(Failed),
        }
    }

    fn text(&self, node: Node) -> Result<&'a str, Failed> {
        match self.value(node)? {
            Value::Scalar(Scalar::Text(text)) => Ok(text),
            _ => Err(Failed),
        }
    }

    fn set(&self, node: Node) -> Result<Elements<'a>, Failed> {
        match self.value(node)? {
            Value::Set(elements) => Ok(elements),
            Value::Scalar(_) => Err(Failed),
        }
    }

    fn entity(&self, node: Node) -> Result<Entity<'a>, Failed> {
        match self.value(node)? {
            Value::Scalar(Scalar::Entity(entity)) => Ok(entity),
            _ => Err(Failed),
        }
    }

    fn attribute(&self, name: usize) -> Option<Value<'a>> {
        *self.attributes.get((*self.places.get(name)?)?)?
    }

    fn expression(&self, node: Node) -> Result<&'a Expr, Failed> {
        self.expressions.get(node as usize).ok_or(Failed)
    }
}

impl Entity<'_> {
    fn is_in(self, value: Value<'_>) -> Result<bool, Failed> {
        match value {
            Value::Scalar(Scalar::Entity(other)) => Ok(self == other),
            Value::Scalar(_) => Err(Failed),
            // One element that is no entity fails the whole, wherever it stands.
            Value::Set(elements) => elements.iter().try_fold(false, |found, element| match element {
                Scalar::Entity(other) => Ok(found || self == other),
                _ => Err(Failed),
            }),
        }
    }
}

impl<'a> Value<'a> {
    /// An attribute of an admitted type.
    pub(crate) fn of(attribute: &'a AttributeValue) -> Self {
        match attribute {
            AttributeValue::Set(elements) => Self::Set(Elements::Attribute(elements)),
            scalar => Self::Scalar(scalar_of(scalar).unwrap_or(Scalar::Bool(false))),
        }
    }

    /// Values of different types are not equal, which is no failure.
    fn equals(self, other: Self) -> bool {
        match (self, other) {
            (Self::Scalar(a), Self::Scalar(b)) => a == b,
            (Self::Set(a), Self::Set(b)) => a.are_all_in(b) && b.are_all_in(a),
            _ => false,
        }
    }
}

fn scalar_of(attribute: &AttributeValue) -> Option<Scalar<'_>> {
    match attribute {
        AttributeValue::Bool(value) => Some(Scalar::Bool(*value)),
        AttributeValue::Long(value) => Some(Scalar::Long(*value)),
        AttributeValue::Text(value) => Some(Scalar::Text(value)),
        AttributeValue::Set(_) => None,
    }
}

impl Literal {
    pub(crate) fn scalar(&self) -> Scalar<'_> {
        match self {
            Self::Bool(value) => Scalar::Bool(*value),
            Self::Long(value) => Scalar::Long(*value),
            Self::Text(value) => Scalar::Text(value),
            Self::Entity(kind, id) => Scalar::Entity(Entity { kind: *kind, id }),
        }
    }

    pub(crate) fn order(&self, other: &Self) -> Ordering {
        self.scalar().cmp(&other.scalar())
    }
}

impl<'a> Elements<'a> {
    fn len(self) -> usize {
        match self {
            Self::Texts(texts) => texts.len(),
            Self::Ids(ids) => ids.len(),
            Self::Attribute(values) => values.len(),
            Self::Literals(literals) => literals.len(),
        }
    }

    fn get(self, index: usize) -> Option<Scalar<'a>> {
        match self {
            Self::Texts(texts) => texts.get(index).map(|text| Scalar::Text(text)),
            Self::Ids(ids) => ids.get(index).map(|id| Scalar::Text(id.as_str())),
            Self::Attribute(values) => values.get(index).and_then(scalar_of),
            Self::Literals(literals) => literals.get(index).map(Literal::scalar),
        }
    }

    fn iter(self) -> impl Iterator<Item = Scalar<'a>> {
        (0..self.len()).filter_map(move |index| self.get(index))
    }

    fn contain(self, wanted: Scalar<'_>) -> bool {
        match self {
            Self::Literals(literals) => {
                literals.binary_search_by(|literal| literal.scalar().cmp(&wanted)).is_ok()
            }
            others => others.iter().any(|element| element == wanted),
        }
    }

    fn are_all_in(self, set: Self) -> bool {
        match set.sorted_against(self) {
            Some(sorted) => self.iter().all(|element| sorted.binary_search(&element).is_ok()),
            None => self.iter().all(|element| set.contain(element)),
        }
    }

    fn meet(self, other: Self) -> bool {
        match other.sorted_against(self) {
            Some(sorted) => self.iter().any(|element| sorted.binary_search(&element).is_ok()),
            None => self.iter().any(|element| other.contain(element)),
        }
    }

    /// The elements in order, where searching them one by one for each of `others` would take too long.
    fn sorted_against(self, others: Self) -> Option<Vec<Scalar<'a>>> {
        let searched = matches!(self, Self::Literals(_));
        if searched || self.len().saturating_mul(others.len()) <= MAX_COMPARISONS {
            return None;
        }
        let mut sorted: Vec<Scalar<'a>> = self.iter().collect();
        sorted.sort_unstable();
        Some(sorted)
    }
}

/// A pattern of `like`: what stands before, between and behind its `*`s.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Pattern(Box<[Box<str>]>);

impl Pattern {
    /// INVARIANT: never empty; a pattern without `*` is one text.
    pub(crate) fn new(texts: Vec<String>) -> Self {
        Self(texts.into_iter().map(Box::from).collect())
    }

    fn matches(&self, text: &str) -> bool {
        let [first, between @ .., last] = &*self.0 else {
            return self.0.first().is_some_and(|whole| **whole == *text);
        };
        let Some(rest) = text.strip_prefix(&**first) else { return false };
        let Some(mut rest) = rest.strip_suffix(&**last) else { return false };
        // The earliest place of each leaves the most for those behind it.
        for wanted in between {
            let Some((_, behind)) = rest.split_once(&**wanted) else { return false };
            rest = behind;
        }
        true
    }
}
