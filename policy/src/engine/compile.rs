//! From a policy's conditions to [`Expr`]s; what has no place in one is left to Cedar.

use std::collections::HashMap;
use std::sync::Arc;

use cedar_policy::pst::{self, BinaryOp, Clause, PatternElem, UnaryOp, Var};
use cedar_policy::{EntityUid, Policy};

use super::expr::{Expr, Literal, Node, Pattern, UserMember};
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

/// Members that a user may lack, or a mesh's schema: for Cedar to look at.
const OPTIONAL_MEMBERS: [&str; 2] = ["tenant", "mfa"];

/// How a policy's conditions are evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// There are none.
    Always,
    If(Node),
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
    pub(crate) expressions: Vec<Expr>,
    known: HashMap<Expr, Node>,
}

impl<'a> Names<'a> {
    pub(crate) fn new(schema: &'a ServiceSchema) -> Self {
        Self {
            schema,
            kinds: HashMap::new(),
            attributes: Vec::new(),
            expressions: Vec::new(),
            known: HashMap::new(),
        }
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
        // From the tree that Cedar evaluates; `to_pst` would parse the text again.
        let Ok(syntax) = pst::Policy::try_from(policy.as_ref().clone()) else { return Condition::Cedar };
        let mut whole: Option<Node> = None;
        for clause in syntax.body().clauses() {
            let compiled = match clause {
                Clause::When(condition) => self.expression(condition, 0),
                Clause::Unless(condition) => self.negated(condition, 0),
            };
            let Some(compiled) = compiled else { return Condition::Cedar };
            whole = Some(whole.map_or(compiled, |before| self.node(Expr::And(before, compiled))));
        }
        whole.map_or(Condition::Always, Condition::If)
    }

    fn node(&mut self, expression: Expr) -> Node {
        if let Some(known) = self.known.get(&expression) {
            return *known;
        }
        // Files of 16 MiB do not hold so many.
        let node = Node::try_from(self.expressions.len()).unwrap_or(Node::MAX);
        self.known.insert(expression.clone(), node);
        self.expressions.push(expression);
        node
    }

    fn negated(&mut self, expression: &pst::Expr, depth: usize) -> Option<Node> {
        let inner = self.expression(expression, depth)?;
        Some(self.node(Expr::Not(inner)))
    }

    /// `None` for what is left to Cedar.
    fn expression(&mut self, expression: &pst::Expr, depth: usize) -> Option<Node> {
        if depth > MAX_DEPTH {
            return None;
        }
        let depth = depth + 1;
        let compiled = match expression {
            pst::Expr::Literal(literal) => Expr::Literal(self.literal(literal)?),
            pst::Expr::Set(elements) => Expr::Literals(self.literals(elements)?),
            pst::Expr::Var(Var::Principal) => Expr::Principal,
            pst::Expr::Var(Var::Action) => Expr::Action,
            pst::Expr::Var(Var::Resource) => Expr::Resource,
            pst::Expr::GetAttr { expr, attr } => self.member(expr, attr)?,
            pst::Expr::HasAttr { expr, attrs } => {
                let attrs: Vec<&str> = attrs.iter().map(|attr| attr.as_str()).collect();
                self.has(expr, &attrs)?
            }
            pst::Expr::UnaryOp { op, expr } => {
                let inner = self.expression(expr, depth)?;
                match op {
                    UnaryOp::Not => Expr::Not(inner),
                    UnaryOp::Neg => Expr::Negate(inner),
                    UnaryOp::IsEmpty => Expr::IsEmpty(inner),
                    _ => return None,
                }
            }
            pst::Expr::BinaryOp { op: BinaryOp::In, left, right } => self.membership(left, right, depth)?,
            pst::Expr::BinaryOp { op, left, right } => {
                let (left, right) = (self.expression(left, depth)?, self.expression(right, depth)?);
                self.binary(*op, left, right)?
            }
            pst::Expr::Like { expr, pattern } => {
                Expr::Like(self.expression(expr, depth)?, pattern_of(pattern))
            }
            pst::Expr::Is { expr, entity_type, in_expr } => {
                let is = Expr::Is(self.expression(expr, depth)?, self.kind(&entity_type.to_string()));
                match in_expr {
                    None => is,
                    Some(other) => {
                        let within = self.membership(expr, other, depth)?;
                        Expr::And(self.node(is), self.node(within))
                    }
                }
            }
            pst::Expr::IfThenElse { cond, then_expr, else_expr } => Expr::If(
                self.expression(cond, depth)?,
                self.expression(then_expr, depth)?,
                self.expression(else_expr, depth)?,
            ),
            _ => return None,
        };
        Some(self.node(compiled))
    }

    fn binary(&mut self, op: BinaryOp, left: Node, right: Node) -> Option<Expr> {
        match op {
            BinaryOp::And => Some(Expr::And(left, right)),
            BinaryOp::Or => Some(Expr::Or(left, right)),
            BinaryOp::Eq => Some(Expr::Equal(left, right)),
            BinaryOp::NotEq => Some(Expr::Not(self.node(Expr::Equal(left, right)))),
            BinaryOp::Less => Some(Expr::Less(left, right)),
            BinaryOp::LessEq => Some(Expr::LessOrEqual(left, right)),
            BinaryOp::Greater => Some(Expr::Not(self.node(Expr::LessOrEqual(left, right)))),
            BinaryOp::GreaterEq => Some(Expr::Not(self.node(Expr::Less(left, right)))),
            BinaryOp::Add => Some(Expr::Add(left, right)),
            BinaryOp::Sub => Some(Expr::Subtract(left, right)),
            BinaryOp::Mul => Some(Expr::Multiply(left, right)),
            BinaryOp::Contains => Some(Expr::Contains(left, right)),
            BinaryOp::ContainsAll => Some(Expr::ContainsAll(left, right)),
            BinaryOp::ContainsAny => Some(Expr::ContainsAny(left, right)),
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
            // Whether the user has one is not known before the request.
            (pst::Expr::Var(Var::Context), ["user", name]) if OPTIONAL_MEMBERS.contains(name) => None,
            (of, [name]) if is_user(of) && OPTIONAL_MEMBERS.contains(name) => None,
            (pst::Expr::Var(Var::Context), ["user", name]) => {
                let (user, known) = (self.node(Expr::HasUser), Expr::UserHas(user_member(name).is_some()));
                Some(Expr::And(user, self.node(known)))
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
                Some(Expr::In(self.expression(left, depth)?, self.expression(right, depth)?))
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
