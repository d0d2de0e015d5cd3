//! Why no policy allowed a request: only for denials, bounded, and by Cedar's own evaluator.

use std::str::FromStr;
use std::sync::OnceLock;

use cedar_policy::pst::{BinaryOp, Clause, Expr};
use cedar_policy::{
    ActionConstraint, Entities, EntityTypeName, EntityUid, EvalResult, Expression, Policy,
    PrincipalConstraint, ResourceConstraint, eval_expression,
};

use crate::decide::Shared;
use crate::engine;
use crate::oracle::Question;
use crate::record::{
    Considered, Explanation, FailedClause, Mismatch, Nearest, PolicyEffect, PolicyOutcome, ScopePart, cut,
};
use crate::schema::ObjectType;

/// Most policies looked at for one denial: those about the action first. A denial must stay cheap,
/// because those who are denied choose how many there are.
const MAX_CONSIDERED: usize = 32;
/// Most clauses of one policy evaluated one by one.
const MAX_CLAUSES: usize = 32;
/// Longest clause or value shown.
const MAX_SHOWN_BYTES: usize = 240;

/// Who asks, what for, and for what kind of object (and which, if known).
pub(crate) struct Subject<'a> {
    pub(crate) principal: &'a EntityUid,
    pub(crate) action: &'a EntityUid,
    pub(crate) kind: &'a EntityTypeName,
    pub(crate) object: Option<&'a EntityUid>,
    /// The same, as the engine counts.
    pub(crate) numbers: engine::Subject,
}

/// The explanation of a denial by scope alone, before any attribute is known.
pub(crate) fn scopes(shared: &Shared, subject: &Subject<'_>) -> Explanation {
    explain(shared, subject, None)
}

/// The explanation of a denial by what Cedar was asked.
pub(crate) fn question(
    shared: &Shared,
    question: &Question,
    kind: &ObjectType,
    numbers: engine::Subject,
) -> Explanation {
    let request = &question.request;
    let (Some(principal), Some(action)) = (request.principal(), request.action()) else {
        return Explanation::default();
    };
    let subject = Subject { principal, action, kind: &kind.name, object: request.resource(), numbers };
    explain(shared, &subject, Some(question))
}

fn explain(shared: &Shared, subject: &Subject<'_>, question: Option<&Question>) -> Explanation {
    let total = shared.entries.len();
    let distance = |entry: usize| {
        let (principal, action, object) = shared.engine.admits(entry, subject.numbers);
        let parts =
            [(principal, ScopePart::Principal), (action, ScopePart::Action), (object, ScopePart::Resource)];
        parts.iter().filter(|(fits, _)| !fits).map(|(_, part)| weight(*part)).sum::<usize>()
    };
    // The nearest ones are kept if there are too many, then shown in the order of the files.
    let mut looked_at: Vec<(usize, usize)> = (0..total).map(|entry| (distance(entry), entry)).collect();
    if total > MAX_CONSIDERED {
        looked_at.select_nth_unstable(MAX_CONSIDERED);
        looked_at.truncate(MAX_CONSIDERED);
    }
    looked_at.sort_by_key(|(_, entry)| *entry);

    let (mut considered, mut places) = (Vec::new(), Vec::new());
    for (at, entry) in looked_at.iter().filter_map(|(_, at)| Some((*at, shared.entries.get(*at)?))) {
        let mismatches = entry.scope.mismatches(shared, subject);
        let outcome = if !mismatches.is_empty() {
            PolicyOutcome::Scope(mismatches)
        } else if let Some(question) = question {
            conditions(shared, at, question)
        } else {
            PolicyOutcome::Undecided
        };
        considered.push(Considered {
            policy: entry.id.to_string(),
            file: entry.file.to_string(),
            line: entry.line,
            effect: entry.effect,
            outcome,
        });
        places.push(at);
    }
    let nearest = nearest(shared, &considered, &places, question);
    Explanation { object: None, omitted: total - considered.len(), considered, nearest }
}

/// A policy's scope, taken out of it once.
#[derive(Debug, Clone)]
pub(crate) struct Scope {
    principal: PrincipalConstraint,
    action: ActionConstraint,
    resource: ResourceConstraint,
}

/// INVARIANT: principals and objects have no parents, so `in` is equality for them; actions have those
/// of the schema. A test holds this against Cedar's own evaluation.
impl Scope {
    pub(crate) fn of(policy: &Policy) -> Self {
        Self {
            principal: policy.principal_constraint(),
            action: policy.action_constraint(),
            resource: policy.resource_constraint(),
        }
    }

    fn admits_principal(&self, principal: &EntityUid) -> bool {
        match &self.principal {
            PrincipalConstraint::Any => true,
            PrincipalConstraint::Eq(uid) | PrincipalConstraint::In(uid) => uid == principal,
            PrincipalConstraint::Is(kind) => kind == principal.type_name(),
            PrincipalConstraint::IsIn(kind, uid) => kind == principal.type_name() && uid == principal,
        }
    }

    fn admits_action(&self, action: &EntityUid, hierarchy: &Entities) -> bool {
        match &self.action {
            ActionConstraint::Any => true,
            ActionConstraint::Eq(uid) => uid == action,
            ActionConstraint::In(uids) => {
                uids.iter().any(|uid| uid == action || hierarchy.is_ancestor_of(uid, action))
            }
        }
    }

    fn admits_object(&self, kind: &EntityTypeName, object: Option<&EntityUid>) -> bool {
        let is_object = |uid: &EntityUid| object.map_or(uid.type_name() == kind, |object| uid == object);
        match &self.resource {
            ResourceConstraint::Any => true,
            ResourceConstraint::Eq(uid) | ResourceConstraint::In(uid) => is_object(uid),
            ResourceConstraint::Is(wanted) => wanted == kind,
            ResourceConstraint::IsIn(wanted, uid) => wanted == kind && is_object(uid),
        }
    }

    /// Whether it may be about what this principal does to some object of a kind.
    pub(crate) fn reaches(
        &self,
        shared: &Shared,
        principal: &EntityUid,
        action: &EntityUid,
        kind: &str,
    ) -> bool {
        let kind = shared.schema.types.get(kind);
        self.admits_principal(principal)
            && self.admits_action(action, &shared.schema.action_entities)
            && kind.is_some_and(|kind| self.admits_object(&kind.name, None))
    }

    /// The parts that do not fit, as words.
    fn mismatches(&self, shared: &Shared, subject: &Subject<'_>) -> Vec<Mismatch> {
        let mut found = Vec::new();
        if !self.admits_principal(subject.principal) {
            let wants = match &self.principal {
                PrincipalConstraint::Any => String::new(),
                PrincipalConstraint::Is(kind) => format!("any {kind}"),
                PrincipalConstraint::Eq(uid)
                | PrincipalConstraint::In(uid)
                | PrincipalConstraint::IsIn(_, uid) => uid.to_string(),
            };
            found.push(mismatch(ScopePart::Principal, &wants, &subject.principal.to_string()));
        }
        if !self.admits_action(subject.action, &shared.schema.action_entities) {
            let wants = match &self.action {
                ActionConstraint::Any => String::new(),
                ActionConstraint::Eq(uid) => uid.to_string(),
                ActionConstraint::In(uids) => {
                    uids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
                }
            };
            found.push(mismatch(ScopePart::Action, &wants, &subject.action.to_string()));
        }
        if !self.admits_object(subject.kind, subject.object) {
            let wants = match &self.resource {
                ResourceConstraint::Any => String::new(),
                ResourceConstraint::Is(kind) => format!("any {kind}"),
                ResourceConstraint::Eq(uid)
                | ResourceConstraint::In(uid)
                | ResourceConstraint::IsIn(_, uid) => uid.to_string(),
            };
            let has = subject.object.map_or_else(|| format!("any {}", subject.kind), ToString::to_string);
            found.push(mismatch(ScopePart::Resource, &wants, &has));
        }
        found
    }
}

fn mismatch(part: ScopePart, wants: &str, has: &str) -> Mismatch {
    Mismatch { part, wants: shown(wants), has: shown(has) }
}

/// What becomes of a policy whose scope fits.
fn conditions(shared: &Shared, at: usize, question: &Question) -> PolicyOutcome {
    let unread = |error: &str| PolicyOutcome::Error { clause: None, error: shown(error) };
    let form = match shared.form(at) {
        Ok(form) => form,
        Err(error) => return unread(&error),
    };
    let clauses = match form.clauses() {
        Ok(clauses) => clauses,
        Err(error) => return unread(error),
    };
    for clause in clauses {
        match holds(clause, question) {
            Ok(true) => {}
            Ok(false) => return PolicyOutcome::Condition(failed(clause, question)),
            Err(error) => return PolicyOutcome::Error { clause: Some(clause.text()), error: shown(&error) },
        }
    }
    PolicyOutcome::Satisfied
}

/// One conjunct of a policy's conditions.
#[derive(Debug, Clone)]
pub(crate) struct Conjunct {
    whole: Term,
    /// Of an `unless`: it must not hold.
    negated: bool,
    /// Both sides of a comparison, as far as a value tells something.
    sides: Vec<Term>,
}

/// An expression, written and, once it was asked for, as Cedar evaluates it.
#[derive(Debug, Clone)]
struct Term {
    text: String,
    expression: OnceLock<Result<Expression, String>>,
}

impl Conjunct {
    fn new(expression: &Expr, negated: bool) -> Self {
        let sides = match expression {
            // A literal is its own value, and both sides of `&&` or `||` are clauses, not values.
            Expr::BinaryOp { left, right, .. } => {
                let tells =
                    [left, right].into_iter().filter(|side| !matches!(side.as_ref(), Expr::Literal(_)));
                tells.map(|side| Term::new(side)).collect()
            }
            _ => Vec::new(),
        };
        Self { whole: Term::new(expression), negated, sides }
    }

    fn text(&self) -> String {
        let text = shown(&self.whole.text);
        if self.negated { format!("unless {{ {text} }}") } else { text }
    }
}

impl Term {
    fn new(expression: &Expr) -> Self {
        Self { text: expression.to_string(), expression: OnceLock::new() }
    }

    fn evaluate(&self, question: &Question) -> Result<EvalResult, String> {
        let read = || Expression::from_str(&self.text).map_err(|error| error.to_string());
        let expression = self.expression.get_or_init(read).as_ref().map_err(Clone::clone)?;
        eval_expression(&question.request, &question.entities, expression).map_err(|error| error.to_string())
    }
}

/// A policy's conditions, `&&` taken apart, in the order Cedar evaluates them. Parsing takes longer than all the
/// rest of a denial, and those who are denied choose how many there are: a policy's form keeps them.
pub(crate) fn clauses(policy: &Policy) -> Result<Vec<Conjunct>, String> {
    let syntax = policy.to_pst().map_err(|error| error.to_string())?;
    let mut conjuncts = Vec::new();
    for clause in syntax.body().clauses() {
        match clause {
            Clause::When(expression) => take_apart(expression, &mut conjuncts),
            Clause::Unless(expression) => conjuncts.push(Conjunct::new(expression, true)),
        }
    }
    Ok(conjuncts)
}

fn take_apart(expression: &Expr, into: &mut Vec<Conjunct>) {
    match expression {
        Expr::BinaryOp { op: BinaryOp::And, left, right } if into.len() < MAX_CLAUSES => {
            take_apart(left, into);
            take_apart(right, into);
        }
        whole => into.push(Conjunct::new(whole, false)),
    }
}

fn holds(conjunct: &Conjunct, question: &Question) -> Result<bool, String> {
    match conjunct.whole.evaluate(question)? {
        EvalResult::Bool(value) => Ok(value != conjunct.negated),
        other => Err(format!("it is {other}, not true or false")),
    }
}

fn failed(conjunct: &Conjunct, question: &Question) -> FailedClause {
    let mut values = Vec::new();
    for side in &conjunct.sides {
        if let Ok(value) = side.evaluate(question)
            && !matches!(value, EvalResult::Bool(_))
        {
            values.push((shown(&side.text), shown(&value.to_string())));
        }
    }
    FailedClause { clause: conjunct.text(), values }
}

/// How far a scope is from fitting: another action or kind of object is further than another caller.
fn distance(mismatches: &[Mismatch]) -> usize {
    mismatches.iter().map(|mismatch| weight(mismatch.part)).sum()
}

fn weight(part: ScopePart) -> usize {
    match part {
        ScopePart::Action => 100,
        ScopePart::Resource => 20,
        ScopePart::Principal => 10,
    }
}

/// The permit that needs the least, and what it needs.
fn nearest(
    shared: &Shared,
    considered: &[Considered],
    places: &[usize],
    question: Option<&Question>,
) -> Option<Nearest> {
    let cost = |outcome: &PolicyOutcome| match outcome {
        PolicyOutcome::Satisfied => 0,
        PolicyOutcome::Condition(_) | PolicyOutcome::Undecided => 1,
        PolicyOutcome::Error { .. } => 2,
        PolicyOutcome::Scope(mismatches) => distance(mismatches),
    };
    let permits = considered.iter().zip(places).filter(|(c, _)| c.effect == PolicyEffect::Permit);
    let (best, place) = permits.min_by_key(|(c, _)| cost(&c.outcome))?;
    // A rule about another action is no neighbour.
    if cost(&best.outcome) >= 100 {
        return None;
    }
    let mut missing = match &best.outcome {
        PolicyOutcome::Satisfied | PolicyOutcome::Undecided => Vec::new(),
        PolicyOutcome::Condition(failed) => vec![condition_missing(failed)],
        PolicyOutcome::Error { error, .. } => vec![format!("its condition can be evaluated: {error}")],
        PolicyOutcome::Scope(mismatches) => mismatches.iter().map(scope_missing).collect(),
    };
    if let (PolicyOutcome::Scope(_), Some(question)) = (&best.outcome, question) {
        // The conditions too, as far as they can be told for a request that the scope excludes.
        if let PolicyOutcome::Condition(failed) = conditions(shared, *place, question) {
            missing.push(condition_missing(&failed));
        }
    }
    for forbid in considered.iter().filter(|c| c.effect == PolicyEffect::Forbid) {
        if matches!(forbid.outcome, PolicyOutcome::Satisfied | PolicyOutcome::Error { .. }) {
            missing.push(format!("{} ({}:{}) does not forbid it", forbid.policy, forbid.file, forbid.line));
        }
    }
    Some(Nearest { policy: best.policy.clone(), file: best.file.clone(), line: best.line, missing })
}

fn scope_missing(mismatch: &Mismatch) -> String {
    format!("the {} is {}", mismatch.part, mismatch.wants)
}

fn condition_missing(failed: &FailedClause) -> String {
    let values: Vec<String> =
        failed.values.iter().map(|(side, value)| format!("{side} is {value}")).collect();
    // An `unless` shows itself in its clause: it is met when what it holds is false.
    let met = match failed.clause.strip_prefix("unless { ").and_then(|rest| rest.strip_suffix(" }")) {
        Some(inner) => format!("`{inner}` is false"),
        None => format!("`{}` holds", failed.clause),
    };
    if values.is_empty() { met } else { format!("{met} (now {})", values.join(", ")) }
}

fn shown(text: &str) -> String {
    if text.len() <= MAX_SHOWN_BYTES {
        return text.to_owned();
    }
    let end = (0..=MAX_SHOWN_BYTES).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    cut(&format!("{}…", text.get(..end).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use cedar_policy::{Authorizer, Decision, PolicySet};
    use identity::{SpiffeId, TrustDomain};

    use super::*;
    use crate::decide::{PolicyEntry, ServicePolicy};
    use crate::load::tests::load;
    use crate::object::{AttributeValue, Attributes, ObjectRef};
    use crate::record::{DecisionRecord, Layer, Rule};
    use crate::verdict::{Caller, Occasion, Principal, Verdict};

    const SCHEMA: &str = "namespace Shop {
        entity Order = { owner: String, total: Long };
        entity Page;
        action Look, Touch;
        action Read in [Look] appliesTo { principal: [Mesh::Workload, Mesh::Client], resource: [Order, Page], context: Mesh::Context };
        action Write in [Touch] appliesTo { principal: [Mesh::Workload, Mesh::Client], resource: [Order, Page], context: Mesh::Context };
    }";

    fn shop(policies: &str) -> Arc<ServicePolicy> {
        let (loaded, _dir) = load(&[
            ("services/shop/shop.cedarschema", Some(SCHEMA)),
            ("services/shop/map.toml", Some("mapping = \"none\"")),
            ("services/shop/shop.cedar", Some(policies)),
        ]);
        loaded.unwrap_or_else(|problems| panic!("{problems}")).service("shop").unwrap()
    }

    fn web() -> SpiffeId {
        TrustDomain::new("bank.example").unwrap().workload("/service/web").unwrap()
    }

    fn caller() -> Caller {
        Caller { principal: Principal::Workload(web()), user: None, chain: Arc::from([]), address: None }
    }

    fn order(id: &str, owner: &str, total: i64) -> (ObjectRef, Attributes) {
        let object = ObjectRef::new("Shop::Order", id);
        let mut attributes = Attributes::none();
        attributes.insert(object.clone(), "owner", AttributeValue::Text(owner.into()));
        attributes.insert(object.clone(), "total", AttributeValue::Long(total));
        (object, attributes)
    }

    fn occasion() -> Occasion<'static> {
        Occasion {
            receipt: "r-7k2m0q9xw4e8t5hz".parse().unwrap(),
            now: Duration::from_secs(1),
            layer: Layer::Sidecar,
            method: "GET",
            target: "/",
            transaction: None,
            trace_id: None,
        }
    }

    fn read(policy: &ServicePolicy, owner: &str, total: i64) -> DecisionRecord {
        let (object, attributes) = order("1", owner, total);
        match policy.decide_object(&caller(), "Read", &object, &attributes, &occasion()) {
            Verdict::Permit(permit) => {
                permit.record_object(&caller(), "Read", &object, &attributes, &occasion())
            }
            Verdict::Deny(denial) => denial.record().clone(),
        }
    }

    #[test]
    fn scopes_are_read_as_cedar_evaluates_them() {
        let principals = [
            "principal is Mesh::Workload",
            "principal is Mesh::Client",
            "principal == Mesh::Workload::\"spiffe://bank.example/service/web\"",
            "principal == Mesh::Workload::\"spiffe://bank.example/service/webx\"",
            "principal == Mesh::Client::\"app\"",
        ];
        let actions = [
            "action",
            "action == Shop::Action::\"Read\"",
            "action in Shop::Action::\"Look\"",
            "action in [Shop::Action::\"Touch\", Shop::Action::\"Read\"]",
            "action in [Shop::Action::\"Touch\"]",
        ];
        let resources = [
            "resource",
            "resource is Shop::Order",
            "resource == Shop::Order::\"1\"",
            "resource is Shop::Page",
        ];
        let mut text = String::new();
        for (p, principal) in principals.iter().enumerate() {
            for (a, action) in actions.iter().enumerate() {
                for (r, resource) in resources.iter().enumerate() {
                    text += &format!("@id(\"p{p}{a}{r}\") permit ({principal}, {action}, {resource});\n");
                }
            }
        }
        let policy = shop(&text);
        let shared = policy.shared();
        let workload = |id: &str| crate::schema::uid(&shared.schema.principals.workload, id);
        let client = |id: &str| crate::schema::uid(&shared.schema.principals.client, id);
        // As the explanation tells it and as the index finds it.
        let fits = |entry: &PolicyEntry,
                    principal: &EntityUid,
                    action: &EntityUid,
                    object: Option<&EntityUid>,
                    like: &EntityUid| {
            let id = principal.id().unescaped();
            let who = if *principal.type_name() == shared.schema.principals.workload {
                Principal::Workload(SpiffeId::new(id).unwrap())
            } else {
                Principal::Client(id.into())
            };
            let who = Caller { principal: who, ..caller() };
            let known = shared.schema.actions.get(action.id().unescaped()).unwrap();
            let kind = shared.schema.types.get(&like.type_name().to_string()).unwrap();
            let named =
                object.map(|object| ObjectRef::new(&object.type_name().to_string(), object.id().unescaped()));
            let numbers = shared.engine.subject(&who, known, kind, named.as_ref());
            let subject = Subject { principal, action, kind: &kind.name, object, numbers };
            let told = entry.scope.mismatches(shared, &subject).is_empty();
            let place = shared.entries.iter().position(|other| other.id == entry.id).unwrap();
            assert_eq!(
                shared.engine.admits(place, numbers),
                (
                    entry.scope.admits_principal(principal),
                    entry.scope.admits_action(action, &shared.schema.action_entities),
                    entry.scope.admits_object(&kind.name, object),
                )
            );
            assert!(object.is_none() || shared.engine.candidates(numbers).contains(&place) == told);
            assert!(!told || shared.engine.in_reach(numbers, object.is_some()));
            told
        };
        let mut compared = 0;
        for principal in
            [workload(web().as_str()), workload("spiffe://bank.example/service/a"), client("app")]
        {
            for action in ["Read", "Write"].map(|name| &shared.schema.actions.get(name).unwrap().uid) {
                for object in ["Shop::Order::\"1\"", "Shop::Order::\"2\"", "Shop::Page::\"1\""] {
                    let object: EntityUid = object.parse().unwrap();
                    let context = cedar_policy::Context::empty();
                    let request = cedar_policy::Request::new(
                        principal.clone(),
                        action.clone(),
                        object.clone(),
                        context,
                        None,
                    );
                    let request = request.unwrap();
                    for (at, entry) in shared.entries.iter().enumerate() {
                        let form = shared.form(at).unwrap();
                        let alone = PolicySet::from_policies([form.policy.clone()]).unwrap();
                        let entities = &shared.schema.action_entities;
                        let response = Authorizer::new().is_authorized(&request, &alone, entities);
                        let cedar = response.decision() == Decision::Allow;
                        let ours = fits(entry, &principal, action, Some(&object), &object);
                        assert_eq!(ours, cedar, "{} {principal} {action} {object}", form.policy);
                        // Without the object the scope can only look wider.
                        assert!(!ours || fits(entry, &principal, action, None, &object));
                        compared += 1;
                    }
                }
            }
        }
        assert_eq!(compared, 100 * 18);
    }

    #[test]
    fn policy_37_a_forbid_that_cannot_be_evaluated_denies() {
        let policy = shop(
            "@id(\"all\") permit (principal is Mesh::Workload, action, resource);
             @id(\"big\") forbid (principal, action, resource is Shop::Order) when { resource.total * 1000 > 100000 };",
        );
        assert_eq!(read(&policy, "x", 5).rule.name(), "all");
        assert_eq!(read(&policy, "x", 500).rule.name(), "big");
        let overflow = read(&policy, "x", i64::MAX);
        assert_eq!((overflow.verdict, overflow.rule.name()), (crate::record::Outcome::Deny, "big"));
        assert!(overflow.reason.contains("evaluating a policy failed"), "{}", overflow.reason);
        let explanation = overflow.explanation.unwrap();
        assert!(matches!(explanation.considered.get(1).unwrap().outcome, PolicyOutcome::Error { .. }));
        assert_eq!(explanation.nearest.unwrap().missing.len(), 1);
    }

    #[test]
    fn the_first_clause_that_does_not_hold_is_named_with_its_values() {
        let policy = shop(
            "@id(\"a\") permit (principal is Mesh::Workload, action, resource is Shop::Order)
             when { resource.total > 3 && (resource.owner == \"alice\" || resource.total == 9) && principal.service == \"web\" }
             unless { resource.total >= 100 };",
        );
        assert_eq!(read(&policy, "alice", 4).rule.name(), "a");
        let clause = |owner: &str, total: i64| match read(&policy, owner, total)
            .explanation
            .unwrap()
            .considered
            .remove(0)
            .outcome
        {
            PolicyOutcome::Condition(failed) => failed,
            other => panic!("{other:?}"),
        };
        let small = clause("alice", 2);
        assert_eq!(small.clause, "resource.total > 3");
        assert_eq!(small.values, [("resource.total".to_owned(), "2".to_owned())]);
        assert!(clause("bob", 4).clause.contains("||"));
        assert_eq!(clause("alice", 100).clause, "unless { resource.total >= 100 }");
    }

    #[test]
    fn explanations_are_bounded_and_keep_what_is_near() {
        let far: String = (0..200)
            .map(|n| format!("@id(\"far-{n}\") permit (principal is Mesh::Client, action == Shop::Action::\"Write\", resource);\n"))
            .collect();
        let policy = shop(&format!(
            "{far}@id(\"near\") permit (principal is Mesh::Workload, action, resource is Shop::Order) when {{ resource.owner == \"{}\" }};",
            "o".repeat(5000)
        ));
        let record = read(&policy, "alice", 1);
        assert_eq!(record.rule, Rule::Absent);
        let explanation = record.explanation.unwrap();
        assert_eq!(
            (explanation.considered.len(), explanation.omitted),
            (MAX_CONSIDERED, 201 - MAX_CONSIDERED)
        );
        assert_eq!(explanation.nearest.unwrap().policy, "near");
        assert!(explanation.considered.iter().any(|c| c.policy == "near"));
        assert!(serde_json::to_string(&explanation.considered).unwrap().len() < 16 * 1024);
    }
}
