//! From a policy's conditions to an [`Expr`]; what has no place in one is left to Cedar.

use std::collections::HashMap;
use std::sync::Arc;

use cedar_policy::pst::{self, BinaryOp, Clause, PatternElem, UnaryOp, Var};
use cedar_policy::{EntityUid, Policy};

use super::expr::{Expr, Literal, Pattern, UserMember};
use crate::schema::ServiceSchema;

/// Deepest nesting that is compiled: evaluation recurses, and Cedar watches its own stack.
const MAX_DEPTH: usize = 64;
/// What Cedar is told of a workload besides its id; see `schema::workload_entity`.
const WORKLOAD_ATTRIBUTES: [&str; 2] = ["service", "trust_domain"];
/// Of `context.user`; see `schema::user_record`.
const USER_MEMBERS: [(&str, UserMember); 6] = [
    ("id", UserMember::Id),
    ("issuer", UserMember::Issuer),
    ("client", UserMember::Client),
    ("scopes", UserMember::Scopes),
    ("groups", UserMember::Groups),
    ("auth_time", UserMember::AuthTime),
];

/// How a policy's conditions are evaluated.
#[derive(Debug, Clone)]
pub(crate) enum Condition {
    /// There are none.
    Always,
    If(Box<Expr>),
    /// By Cedar.
    Cedar,
}

/// Names as numbers, so that nothing is looked up by name while a request waits.
#[derive(Debug)]
pub(crate) struct Names<'a> {
    schema: &'a ServiceSchema,
    kinds: HashMap<String, u32>,
    /// The attributes of objects that conditions name.
    pub(crate) attributes: Vec<String>,
}

impl<'a> Names<'a> {
    pub(crate) fn new(schema: &'a ServiceSchema) -> Self {
        Self { schema, kinds: HashMap::new(), attributes: Vec::new() }
    }

    /// The number of an entity type.
    pub(crate) fn kind(&mut self, name: &str) -> u32 {
        if let Some(known) = self.kinds.get(name) {
            return *known;
        }
        let number = u32::try_from(self.kinds.len()).unwrap_or(u32::MAX);
        self.kinds.insert(name.to_owned(), number);
        number
    }

    fn attribute(&mut self, name: &str) -> usize {
        self.attributes.iter().position(|known| known == name).unwrap_or_else(|| {
            self.attributes.push(name.to_owned());
            self.attributes.len() - 1
        })
    }

    /// Conditions in the order in which Cedar evaluates them; all must hold.
    pub(crate) fn compile(&mut self, policy: &Policy) -> Condition {
        let Ok(syntax) = policy.to_pst() else { return Condition::Cedar };
        let mut whole: Option<Expr> = None;
        // From the last to the first, so that the first is evaluated first and the nesting stays flat.
        for clause in syntax.body().clauses().iter().rev() {
            let compiled = match clause {
                Clause::When(condition) => self.expression(condition, 0),
                Clause::Unless(condition) => {
                    self.expression(condition, 0).map(|inner| Expr::Not(Box::new(inner)))
                }
            };
            let Some(compiled) = compiled else { return Condition::Cedar };
            whole = Some(match whole {
                None => compiled,
                Some(rest) => Expr::And(Box::new((compiled, rest))),
            });
        }
        whole.map_or(Condition::Always, |whole| Condition::If(Box::new(whole)))
    }

    /// `None` for what is left to Cedar.
    fn expression(&mut self, expression: &pst::Expr, depth: usize) -> Option<Expr> {
        if depth > MAX_DEPTH {
            return None;
        }
        let depth = depth + 1;
        match expression {
            pst::Expr::Literal(literal) => Some(Expr::Literal(self.literal(literal)?)),
            pst::Expr::Set(elements) => self.literals(elements).map(Expr::Literals),
            pst::Expr::Var(Var::Principal) => Some(Expr::Principal),
            pst::Expr::Var(Var::Action) => Some(Expr::Action),
            pst::Expr::Var(Var::Resource) => Some(Expr::Resource),
            pst::Expr::GetAttr { expr, attr } => self.member(expr, attr),
            pst::Expr::HasAttr { expr, attrs } => {
                let attrs: Vec<&str> = attrs.iter().map(|attr| attr.as_str()).collect();
                self.has(expr, &attrs)
            }
            pst::Expr::UnaryOp { op, expr } => {
                let inner = Box::new(self.expression(expr, depth)?);
                match op {
                    UnaryOp::Not => Some(Expr::Not(inner)),
                    UnaryOp::Neg => Some(Expr::Negate(inner)),
                    UnaryOp::IsEmpty => Some(Expr::IsEmpty(inner)),
                    _ => None,
                }
            }
            pst::Expr::BinaryOp { op: BinaryOp::In, left, right } => self.membership(left, right, depth),
            pst::Expr::BinaryOp { op, left, right } => {
                let sides = Box::new((self.expression(left, depth)?, self.expression(right, depth)?));
                binary(*op, sides)
            }
            pst::Expr::Like { expr, pattern } => {
                let text = self.expression(expr, depth)?;
                Some(Expr::Like(Box::new((text, pattern_of(pattern)))))
            }
            pst::Expr::Is { expr, entity_type, in_expr } => {
                let entity = Box::new(self.expression(expr, depth)?);
                let is = Expr::Is(entity, self.kind(&entity_type.to_string()));
                match in_expr {
                    None => Some(is),
                    Some(other) => Some(Expr::And(Box::new((is, self.membership(expr, other, depth)?)))),
                }
            }
            pst::Expr::IfThenElse { cond, then_expr, else_expr } => Some(Expr::If(Box::new((
                self.expression(cond, depth)?,
                self.expression(then_expr, depth)?,
                self.expression(else_expr, depth)?,
            )))),
            _ => None,
        }
    }

    fn literal(&mut self, literal: &pst::Literal) -> Option<Literal> {
        match literal {
            pst::Literal::Bool(value) => Some(Literal::Bool(*value)),
            pst::Literal::Long(value) => Some(Literal::Long(*value)),
            pst::Literal::String(text) => Some(Literal::Text(text.as_str().into())),
            pst::Literal::EntityUID(uid) => {
                Some(Literal::Entity(self.kind(&uid.ty.to_string()), uid.eid.as_str().into()))
            }
            _ => None,
        }
    }

    /// A set of literals. One with anything else in it would have to be made anew for every request.
    fn literals(&mut self, elements: &[Arc<pst::Expr>]) -> Option<Box<[Literal]>> {
        let mut literals = Vec::with_capacity(elements.len());
        for element in elements {
            let pst::Expr::Literal(literal) = element.as_ref() else { return None };
            literals.push(self.literal(literal)?);
        }
        literals.sort_by(Literal::order);
        literals.dedup();
        Some(literals.into())
    }

    /// `expr.attr`
    fn member(&mut self, of: &pst::Expr, name: &str) -> Option<Expr> {
        match (of, name) {
            (pst::Expr::Var(Var::Principal), "service") => Some(Expr::Service),
            (pst::Expr::Var(Var::Principal), "trust_domain") => Some(Expr::TrustDomain),
            (pst::Expr::Var(Var::Resource), name) => Some(Expr::Attribute(self.attribute(name))),
            (pst::Expr::Var(Var::Context), "chain") => Some(Expr::Chain),
            (pst::Expr::Var(Var::Context), "now") => Some(Expr::Now),
            (of, name) if is_user(of) => user_member(name).map(Expr::User),
            _ => None,
        }
    }

    /// `expr has attr` and `expr has attr.attr`
    fn has(&mut self, of: &pst::Expr, attrs: &[&str]) -> Option<Expr> {
        match (of, attrs) {
            (pst::Expr::Var(Var::Principal), [name]) if WORKLOAD_ATTRIBUTES.contains(name) => {
                Some(Expr::IsDescribed)
            }
            (pst::Expr::Var(Var::Resource), [name]) => Some(Expr::HasAttribute(self.attribute(name))),
            (pst::Expr::Var(Var::Context), ["user"]) => Some(Expr::HasUser),
            (pst::Expr::Var(Var::Context), ["user", name]) => {
                let known = Expr::UserHas(user_member(name).is_some());
                Some(Expr::And(Box::new((Expr::HasUser, known))))
            }
            (pst::Expr::Var(Var::Context), ["chain" | "now"]) => Some(Expr::Literal(Literal::Bool(true))),
            (of, [name]) if is_user(of) => Some(Expr::UserHas(user_member(name).is_some())),
            _ => None,
        }
    }

    /// `left in right`. INVARIANT: principals and objects have no ancestors; actions have those of the schema.
    fn membership(&mut self, left: &pst::Expr, right: &pst::Expr, depth: usize) -> Option<Expr> {
        match left {
            pst::Expr::Var(Var::Principal | Var::Resource) => {
                let sides = (self.expression(left, depth)?, self.expression(right, depth)?);
                Some(Expr::In(Box::new(sides)))
            }
            pst::Expr::Var(Var::Action) => {
                let groups: Vec<EntityUid> = match right {
                    pst::Expr::Literal(pst::Literal::EntityUID(uid)) => vec![uid_of(uid)?],
                    pst::Expr::Set(elements) => elements
                        .iter()
                        .map(|element| match element.as_ref() {
                            pst::Expr::Literal(pst::Literal::EntityUID(uid)) => uid_of(uid),
                            _ => None,
                        })
                        .collect::<Option<_>>()?,
                    _ => return None,
                };
                let schema = self.schema;
                let within = |action: &EntityUid| groups.iter().any(|group| schema.is_within(action, group));
                Some(Expr::ActionIn(schema.actions.values().map(|action| within(&action.uid)).collect()))
            }
            _ => None,
        }
    }
}

fn binary(op: BinaryOp, sides: Box<(Expr, Expr)>) -> Option<Expr> {
    let not = |inner: Expr| Expr::Not(Box::new(inner));
    match op {
        BinaryOp::And => Some(Expr::And(sides)),
        BinaryOp::Or => Some(Expr::Or(sides)),
        BinaryOp::Eq => Some(Expr::Equal(sides)),
        BinaryOp::NotEq => Some(not(Expr::Equal(sides))),
        BinaryOp::Less => Some(Expr::Less(sides)),
        BinaryOp::LessEq => Some(Expr::LessOrEqual(sides)),
        BinaryOp::Greater => Some(not(Expr::LessOrEqual(sides))),
        BinaryOp::GreaterEq => Some(not(Expr::Less(sides))),
        BinaryOp::Add => Some(Expr::Add(sides)),
        BinaryOp::Sub => Some(Expr::Subtract(sides)),
        BinaryOp::Mul => Some(Expr::Multiply(sides)),
        BinaryOp::Contains => Some(Expr::Contains(sides)),
        BinaryOp::ContainsAll => Some(Expr::ContainsAll(sides)),
        BinaryOp::ContainsAny => Some(Expr::ContainsAny(sides)),
        _ => None,
    }
}

fn is_user(expression: &pst::Expr) -> bool {
    matches!(expression, pst::Expr::GetAttr { expr, attr }
        if attr == "user" && matches!(expr.as_ref(), pst::Expr::Var(Var::Context)))
}

fn user_member(name: &str) -> Option<UserMember> {
    USER_MEMBERS.iter().find(|(known, _)| *known == name).map(|(_, member)| *member)
}

fn uid_of(uid: &pst::EntityUID) -> Option<EntityUid> {
    let kind = uid.ty.to_string().parse().ok()?;
    Some(crate::schema::uid(&kind, &uid.eid))
}

fn pattern_of(elements: &[PatternElem]) -> Pattern {
    let mut texts = vec![String::new()];
    for element in elements {
        match (element, texts.last_mut()) {
            (PatternElem::Char(letter), Some(text)) => text.push(*letter),
            _ => texts.push(String::new()),
        }
    }
    Pattern::new(texts)
}
