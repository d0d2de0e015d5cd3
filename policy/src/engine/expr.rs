//! Conditions as small trees over the values that every request has: Cedar's semantics for the operators that
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Literal {
    Bool(bool),
    Long(i64),
    Text(Box<str>),
    Entity(u32, Box<str>),
}

/// Everything that a condition can look at.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UserMember {
    Id,
    Issuer,
    Client,
    Scopes,
    Groups,
    AuthTime,
}

/// A condition or a part of one.
#[derive(Debug, Clone)]
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
    Not(Box<Expr>),
    Negate(Box<Expr>),
    IsEmpty(Box<Expr>),
    Like(Box<(Expr, Pattern)>),
    Is(Box<Expr>, u32),
    And(Box<(Expr, Expr)>),
    Or(Box<(Expr, Expr)>),
    Equal(Box<(Expr, Expr)>),
    Less(Box<(Expr, Expr)>),
    LessOrEqual(Box<(Expr, Expr)>),
    Add(Box<(Expr, Expr)>),
    Subtract(Box<(Expr, Expr)>),
    Multiply(Box<(Expr, Expr)>),
    Contains(Box<(Expr, Expr)>),
    ContainsAll(Box<(Expr, Expr)>),
    ContainsAny(Box<(Expr, Expr)>),
    /// Of a principal or a resource, which have no ancestors.
    In(Box<(Expr, Expr)>),
    /// `action in …`, by the number of the action.
    ActionIn(Box<[bool]>),
    If(Box<(Expr, Expr, Expr)>),
}

impl Expr {
    /// Whether a condition holds.
    pub(crate) fn holds<'a>(&'a self, facts: &Facts<'a>) -> Result<bool, Failed> {
        match self {
            Self::And(sides) => Ok(sides.0.holds(facts)? && sides.1.holds(facts)?),
            Self::Or(sides) => Ok(sides.0.holds(facts)? || sides.1.holds(facts)?),
            Self::Not(inner) => Ok(!inner.holds(facts)?),
            Self::If(parts) => {
                if parts.0.holds(facts)? {
                    parts.1.holds(facts)
                } else {
                    parts.2.holds(facts)
                }
            }
            Self::Equal(sides) => Ok(sides.0.value(facts)?.equals(sides.1.value(facts)?)),
            Self::Less(sides) => Ok(sides.0.long(facts)? < sides.1.long(facts)?),
            Self::LessOrEqual(sides) => Ok(sides.0.long(facts)? <= sides.1.long(facts)?),
            Self::Contains(sides) => {
                let (set, value) = (sides.0.set(facts)?, sides.1.value(facts)?);
                // No set of these has sets among its elements.
                Ok(matches!(value, Value::Scalar(scalar) if set.contain(scalar)))
            }
            Self::ContainsAll(sides) => Ok(sides.1.set(facts)?.are_all_in(sides.0.set(facts)?)),
            Self::ContainsAny(sides) => Ok(sides.0.set(facts)?.meet(sides.1.set(facts)?)),
            Self::IsEmpty(set) => Ok(set.set(facts)?.len() == 0),
            Self::Like(like) => Ok(like.1.matches(like.0.text(facts)?)),
            Self::Is(entity, kind) => Ok(entity.entity(facts)?.kind == *kind),
            Self::In(sides) => sides.0.entity(facts)?.is_in(sides.1.value(facts)?),
            Self::ActionIn(actions) => actions.get(facts.action_number).copied().ok_or(Failed),
            Self::HasUser => Ok(facts.user.is_some()),
            Self::UserHas(known) => facts.user.map(|_| *known).ok_or(Failed),
            Self::IsDescribed => Ok(facts.workload.is_some()),
            Self::HasAttribute(name) => Ok(facts.attribute(*name).is_some()),
            other => match other.value(facts)? {
                Value::Scalar(Scalar::Bool(holds)) => Ok(holds),
                _ => Err(Failed),
            },
        }
    }

    fn value<'a>(&'a self, facts: &Facts<'a>) -> Result<Value<'a>, Failed> {
        let text = |text: &'a str| Value::Scalar(Scalar::Text(text));
        let long = |number: i64| Value::Scalar(Scalar::Long(number));
        let checked = |number: Option<i64>| number.map(long).ok_or(Failed);
        Ok(match self {
            Self::Literal(literal) => Value::Scalar(literal.scalar()),
            Self::Literals(literals) => Value::Set(Elements::Literals(literals)),
            Self::Principal => Value::Scalar(Scalar::Entity(facts.principal)),
            Self::Action => Value::Scalar(Scalar::Entity(facts.action)),
            Self::Resource => Value::Scalar(Scalar::Entity(facts.resource)),
            Self::Service => text(service_of(facts.workload.ok_or(Failed)?)),
            Self::TrustDomain => text(facts.workload.ok_or(Failed)?.trust_domain().as_str()),
            Self::Attribute(name) => facts.attribute(*name).ok_or(Failed)?,
            Self::User(member) => {
                let user = facts.user.ok_or(Failed)?;
                match member {
                    UserMember::Id => text(&user.id),
                    UserMember::Issuer => text(&user.issuer),
                    UserMember::Client => text(&user.client),
                    UserMember::Scopes => Value::Set(Elements::Texts(&user.scopes)),
                    UserMember::Groups => Value::Set(Elements::Texts(&user.groups)),
                    UserMember::AuthTime => long(facts.auth_time),
                }
            }
            Self::Chain => Value::Set(Elements::Ids(facts.chain)),
            Self::Now => long(facts.now),
            Self::Negate(inner) => return checked(inner.long(facts)?.checked_neg()),
            Self::Add(sides) => return checked(sides.0.long(facts)?.checked_add(sides.1.long(facts)?)),
            Self::Subtract(sides) => return checked(sides.0.long(facts)?.checked_sub(sides.1.long(facts)?)),
            Self::Multiply(sides) => return checked(sides.0.long(facts)?.checked_mul(sides.1.long(facts)?)),
            Self::If(parts) => {
                return if parts.0.holds(facts)? { parts.1.value(facts) } else { parts.2.value(facts) };
            }
            other => Value::Scalar(Scalar::Bool(other.holds(facts)?)),
        })
    }

    fn long(&self, facts: &Facts<'_>) -> Result<i64, Failed> {
        match self.value(facts)? {
            Value::Scalar(Scalar::Long(number)) => Ok(number),
            _ => Err(Failed),
        }
    }

    fn text<'a>(&'a self, facts: &Facts<'a>) -> Result<&'a str, Failed> {
        match self.value(facts)? {
            Value::Scalar(Scalar::Text(text)) => Ok(text),
            _ => Err(Failed),
        }
    }

    fn set<'a>(&'a self, facts: &Facts<'a>) -> Result<Elements<'a>, Failed> {
        match self.value(facts)? {
            Value::Set(elements) => Ok(elements),
            Value::Scalar(_) => Err(Failed),
        }
    }

    fn entity<'a>(&'a self, facts: &Facts<'a>) -> Result<Entity<'a>, Failed> {
        match self.value(facts)? {
            Value::Scalar(Scalar::Entity(entity)) => Ok(entity),
            _ => Err(Failed),
        }
    }
}

impl<'a> Facts<'a> {
    fn attribute(&self, name: usize) -> Option<Value<'a>> {
        *self.attributes.get((*self.places.get(name)?)?)?
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
#[derive(Debug, Clone)]
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
