//! The engine against Cedar, on policies and requests made up at random: type-directed, so that most of them mean
//! something, with a wrong type here and there, so that evaluations fail as well.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use identity::SpiffeId;
use identity::txn::User;
use ring::rand::SecureRandom as _;

use super::Ruling;
use crate::decide::{PolicyEntry, ServicePolicy, Shared};
use crate::forms::Form;
use crate::judge::Asked;
use crate::load::tests::unvalidated;
use crate::object::{AttributeValue, Attributes, ObjectRef};
use crate::oracle::{Answer, Panel};
use crate::record::{Layer, Mode, Rule};
use crate::shadow::shadow_counts;
use crate::verdict::{Caller, Occasion, Principal, Verdict};

const SCHEMA: &str = "namespace Shop {
    entity Order = { owner: String, total: Long, paid: Bool, tags: Set<String>, amounts: Set<Long>, note?: String, limit?: Long };
    entity Page = { owner: String, limit?: Long };
    entity Colour enum [\"red\", \"1\"];
    action Look;
    action Touch in [Look];
    action Read in [Look] appliesTo { principal: [Mesh::Workload, Mesh::Client], resource: [Order, Page, Colour], context: Mesh::Context };
    action Write in [Touch] appliesTo { principal: [Mesh::Workload, Mesh::Client], resource: [Order, Page], context: Mesh::Context };
    action Sweep appliesTo { principal: [Mesh::Workload], resource: [Order], context: Mesh::Context };
}";
const SETS: usize = 800;
const REQUESTS: usize = 260;
const MOST_POLICIES: u64 = 9;

const TEXTS: [&str; 10] = ["", "a", "alice", "bob", "al*ce", "aaé", "😀b", WEB, "bank.example", "web"];
const WEB: &str = "spiffe://bank.example/service/web";
const WORKLOADS: [&str; 3] =
    [WEB, "spiffe://bank.example/service/accounts", "spiffe://bank.example/palisade/gateway"];
const CLIENTS: [&str; 2] = ["web", "1"];
const IDS: [&str; 4] = ["1", "2", "red", "alice"];
const LONGS: [i64; 9] = [0, 1, 2, 7, -1, 100, i64::MAX, i64::MIN, i64::MAX / 2 + 1];

/// SplitMix64: reproducible from its seed, which a failure prints.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Type {
    Bool,
    Long,
    Text,
    Texts,
    Longs,
    Entity,
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn policy(dice: &mut Dice, id: usize) -> String {
    let effect = if dice.one_in(3) { "forbid" } else { "permit" };
    let workload = format!("Mesh::Workload::{}", quoted(dice.pick(&WORKLOADS)));
    let client = format!("Mesh::Client::{}", quoted(dice.pick(&CLIENTS)));
    let principal = match dice.below(10) {
        0..=2 => "principal".to_owned(),
        3 => format!("principal == {client}"),
        4 => format!("principal in {workload}"),
        5 => "principal is Mesh::Workload".to_owned(),
        6 => "principal is Mesh::Client".to_owned(),
        7 => format!("principal is Mesh::Client in {}", if dice.one_in(3) { &workload } else { &client }),
        _ => format!("principal == {workload}"),
    };
    let action = dice.pick(&[
        "action",
        "action",
        "action == Shop::Action::\"Read\"",
        "action == Shop::Action::\"Look\"",
        "action in Shop::Action::\"Look\"",
        "action in [Shop::Action::\"Touch\", Shop::Action::\"Read\"]",
        "action in [Shop::Action::\"Sweep\", Shop::Action::\"Write\"]",
    ]);
    let object = quoted(dice.pick(&IDS));
    let resource = match dice.below(8) {
        0..=2 => "resource".to_owned(),
        3 => "resource is Shop::Order".to_owned(),
        4 => "resource is Shop::Page".to_owned(),
        5 => format!("resource == Shop::Order::{object}"),
        6 => format!("resource in Shop::Page::{object}"),
        _ => format!("resource is Shop::Order in Shop::Order::{object}"),
    };
    let mut text = format!("@id(\"p{id}\") {effect} ({principal}, {action}, {resource})");
    for _ in 0..dice.below(3) {
        let word = if dice.one_in(3) { "unless" } else { "when" };
        let condition = expression(dice, Type::Bool, 0);
        write!(text, " {word} {{ {condition} }}").unwrap();
    }
    text + ";\n"
}

fn expression(dice: &mut Dice, wanted: Type, depth: u64) -> String {
    let kinds = [Type::Bool, Type::Long, Type::Text, Type::Texts, Type::Longs, Type::Entity];
    // A wrong type now and then: an evaluation that fails, if it comes to it.
    let kind = if dice.one_in(60) { dice.pick(&kinds) } else { wanted };
    let deeper = |dice: &mut Dice, kind: Type| expression(dice, kind, depth + 1);
    if depth < 5 && dice.one_in(14) {
        let (test, yes, no) = (deeper(dice, Type::Bool), deeper(dice, kind), deeper(dice, kind));
        return format!("(if {test} then {yes} else {no})");
    }
    let leaf = depth >= 5 || dice.one_in(3);
    match kind {
        Type::Bool if leaf => flag(dice),
        Type::Bool => operator(dice, depth),
        Type::Long if leaf || dice.one_in(2) => dice
            .pick(&[
                "resource.total",
                "resource.limit",
                "context.now",
                "context.user.auth_time",
                "0",
                "1",
                "2",
                "7",
                "100",
                "-1",
                "9223372036854775807",
                "resource.total",
            ])
            .to_string(),
        Type::Long => match dice.below(4) {
            0 => format!("(-{})", deeper(dice, Type::Long)),
            _ => {
                let sign = dice.pick(&["+", "-", "*"]);
                format!("({} {sign} {})", deeper(dice, Type::Long), deeper(dice, Type::Long))
            }
        },
        Type::Text => match dice.below(9) {
            0 | 1 => quoted(dice.pick(&TEXTS)),
            2 => "resource.owner".into(),
            3 => "resource.note".into(),
            4 => "context.user.issuer".into(),
            5 => "context.user.client".into(),
            6 => "principal.service".into(),
            7 => "principal.trust_domain".into(),
            _ => "context.user.id".into(),
        },
        Type::Texts => match dice.below(6) {
            0 => "context.user.groups".into(),
            1 => "context.user.scopes".into(),
            2 => "context.chain".into(),
            3 => "resource.tags".into(),
            // What no request has made before: left to Cedar.
            4 if dice.one_in(4) => format!("[{}, {}]", deeper(dice, Type::Text), deeper(dice, Type::Text)),
            _ => set(dice, |dice| quoted(dice.pick(&TEXTS))),
        },
        Type::Longs if dice.one_in(2) => "resource.amounts".into(),
        Type::Longs => set(dice, |dice| dice.pick(&["0", "1", "2", "7", "100"]).to_string()),
        Type::Entity => match dice.below(7) {
            0 => "principal".into(),
            1 => "action".into(),
            2 => "resource".into(),
            _ => entity(dice),
        },
    }
}

fn set(dice: &mut Dice, element: impl Fn(&mut Dice) -> String) -> String {
    let elements: Vec<String> = (0..dice.below(4)).map(|_| element(dice)).collect();
    format!("[{}]", elements.join(", "))
}

fn entity(dice: &mut Dice) -> String {
    let id = quoted(dice.pick(&IDS));
    match dice.below(6) {
        0 => format!("Mesh::Workload::{}", quoted(dice.pick(&WORKLOADS))),
        1 => format!("Mesh::Client::{}", quoted(dice.pick(&CLIENTS))),
        2 => format!("Shop::Action::\"{}\"", dice.pick(&["Read", "Write", "Look", "Touch"])),
        3 => format!("Shop::Page::{id}"),
        4 => format!("Shop::Colour::{id}"),
        _ => format!("Shop::Order::{id}"),
    }
}

fn flag(dice: &mut Dice) -> String {
    let flag = dice.pick(&[
        "true",
        "false",
        "resource.paid",
        "context has user",
        "context has user",
        "context has user.id",
        "context has user.age",
        "context has now",
        "context has nothing",
        "(context has user && context.user has groups)",
        "context.user has age",
        "principal has service",
        "principal has nothing",
        "resource has note",
        "resource has limit",
        "resource has owner",
        "resource has nothing",
        "resource.nothing",
        "principal is Mesh::Workload",
        "principal is Mesh::Client",
        "resource is Shop::Order",
        "action is Shop::Action",
        // What is left to Cedar.
        "ip(\"127.0.0.1\").isLoopback()",
        "{ a: resource.owner }.a == \"alice\"",
        "resource.hasTag(\"x\")",
        "context.user == context.user",
        "Mesh::Client::\"web\" has service",
        "decimal(\"1.0\").lessThan(decimal(\"2.0\"))",
    ]);
    format!("({flag})")
}

fn operator(dice: &mut Dice, depth: u64) -> String {
    let mut side = |kind: Type| expression(dice, kind, depth + 1);
    let (bools, longs) = ((side(Type::Bool), side(Type::Bool)), (side(Type::Long), side(Type::Long)));
    let texts = (side(Type::Text), side(Type::Text));
    let sets = (side(Type::Texts), side(Type::Texts));
    let numbers = (side(Type::Longs), side(Type::Longs));
    let entities = (side(Type::Entity), side(Type::Entity));
    let compare = dice.pick(&["==", "!="]);
    match dice.below(22) {
        0..=2 => format!("({} && {})", bools.0, bools.1),
        3 | 4 => format!("({} || {})", bools.0, bools.1),
        5 => format!("(!({}))", bools.0), // Cedar reads no `!-1`
        6 => format!("({} {compare} {})", bools.0, bools.1),
        7..=9 => format!("({} {} {})", longs.0, dice.pick(&["<", "<=", ">", ">=", "==", "!="]), longs.1),
        10 | 11 => format!("({} {compare} {})", texts.0, texts.1),
        12 => format!("({} {compare} {})", sets.0, sets.1),
        13 => format!("({} {compare} {})", entities.0, entities.1),
        14 => {
            let pattern = dice.pick(&[
                "*",
                "a*",
                "*a",
                "al*ce",
                "al\\*ce",
                "*l*i*",
                "",
                "**",
                "a*a",
                "*é",
                "😀*",
                "spiffe://*/web",
            ]);
            format!("({} like \"{pattern}\")", texts.0)
        }
        15 | 16 => format!("{}.contains({})", sets.0, texts.0),
        17 => format!("{}.contains({})", numbers.0, longs.0),
        18 => format!("{}.{}({})", sets.0, dice.pick(&["containsAll", "containsAny"]), sets.1),
        19 => format!("{}.{}({})", numbers.0, dice.pick(&["containsAll", "containsAny"]), numbers.1),
        20 if dice.one_in(2) => format!("{}.isEmpty()", sets.0),
        20 => format!(
            "({} is {})",
            entities.0,
            dice.pick(&[
                "Mesh::Workload",
                "Shop::Order",
                "Shop::Action",
                "Shop::Order in Shop::Order::\"1\""
            ])
        ),
        _ if dice.one_in(2) => format!("({} in {})", entities.0, entities.1),
        _ => format!("({} in {})", entities.0, set(dice, entity)),
    }
}

struct Asking {
    caller: Caller,
    action: &'static str,
    object: ObjectRef,
    attributes: Attributes,
    now: Duration,
}

fn request(dice: &mut Dice) -> Asking {
    let text = |dice: &mut Dice| dice.pick(&TEXTS).to_string();
    let texts = |dice: &mut Dice| -> Vec<String> { (0..dice.below(4)).map(|_| text(dice)).collect() };
    let long = |dice: &mut Dice| AttributeValue::Long(dice.pick(&LONGS));
    let principal = if dice.one_in(4) {
        Principal::Client(dice.pick(&CLIENTS).to_string())
    } else {
        Principal::Workload(SpiffeId::new(dice.pick(&WORKLOADS)).unwrap())
    };
    let user = (!dice.one_in(4)).then(|| {
        Arc::new(User {
            id: text(dice),
            issuer: text(dice),
            client: text(dice),
            scopes: texts(dice),
            groups: texts(dice),
            auth_time: if dice.one_in(40) { u64::MAX } else { dice.below(10) },
            tenant: None,
            mfa: false,
        })
    });
    let chain = (0..dice.below(4)).map(|_| SpiffeId::new(dice.pick(&WORKLOADS)).unwrap()).collect();
    let kind = dice.pick(&["Shop::Order", "Shop::Order", "Shop::Page", "Shop::Colour"]);
    let object = ObjectRef::new(kind, dice.pick(&IDS));
    let mut attributes = Attributes::none();
    if kind != "Shop::Colour" {
        attributes.insert(object.clone(), "owner", AttributeValue::Text(text(dice).into()));
        if dice.one_in(2) {
            attributes.insert(object.clone(), "limit", long(dice));
        }
    }
    if kind == "Shop::Order" {
        let tags = texts(dice).into_iter().map(|tag| AttributeValue::Text(tag.into())).collect();
        let amounts = (0..dice.below(4)).map(|_| long(dice)).collect();
        attributes.insert(object.clone(), "total", long(dice));
        attributes.insert(object.clone(), "paid", AttributeValue::Bool(dice.one_in(2)));
        attributes.insert(object.clone(), "tags", AttributeValue::Set(tags));
        attributes.insert(object.clone(), "amounts", AttributeValue::Set(amounts));
        if dice.one_in(2) {
            attributes.insert(object.clone(), "note", AttributeValue::Text(text(dice).into()));
        }
    }
    Asking {
        caller: Caller { principal, user, chain, address: None },
        action: dice.pick(&["Read", "Write", "Sweep"]),
        object,
        attributes,
        now: Duration::from_secs(if dice.one_in(40) { u64::MAX } else { dice.below(200) }),
    }
}

/// What Cedar says about all policies, as `all` has them, what it says about the candidates, what the engine says, and
/// what it says once Cedar has said the rest.
fn answers(policy: &ServicePolicy, all: &Panel, asking: &Asking) -> Option<Answers> {
    let shared = policy.shared();
    let action = shared.schema.actions.get(asking.action).unwrap();
    let kind = shared.schema.types.get(asking.object.kind()).unwrap();
    let asked = Asked {
        caller: &asking.caller,
        action: asking.action,
        objects: std::slice::from_ref(&asking.object),
        attributes: &asking.attributes,
        mapped: None,
    };
    let swift = policy.rule_swiftly(&asked, action, (0, &asking.object), kind, asking.now);
    let heard = policy.hear(&asked, action, (0, &asking.object), kind, asking.now);
    let (gathered, flaw) = asked.gather(0, &asking.object, kind);
    assert_eq!(flaw, None);
    let question = shared.question(&asking.caller, &action.uid, &asking.object, kind, &gathered, asking.now);
    let Ok(question) = question else {
        assert_eq!(swift, None, "a request that Cedar does not take");
        return None;
    };
    let subject = shared.engine.subject(&asking.caller, action, kind, Some(&asking.object));
    let candidates = shared.panel(shared.engine.candidates(subject));
    let completed = heard.map(|heard| {
        let unheard = shared.panel(heard.unheard.iter().copied());
        heard.with(shared.ask(&question, &unheard).ruling).unwrap()
    });
    let (all, candidates) = (shared.ask(&question, all), shared.ask(&question, &candidates));
    Some(Answers { all, candidates, swift, completed })
}

struct Answers {
    all: Answer,
    candidates: Answer,
    swift: Option<Ruling>,
    completed: Option<Ruling>,
}

/// The verdict as callers get it, as Cedar's answer should make it.
fn check_verdict(policy: &ServicePolicy, asking: &Asking, expected: Ruling, about: &str) {
    let occasion = occasion(asking.now);
    let verdict =
        policy.decide_object(&asking.caller, asking.action, &asking.object, &asking.attributes, &occasion);
    let place = |rule: &Rule| match rule {
        Rule::Policy { id, .. } => Some(id[1..].parse::<usize>().unwrap()),
        _ => None,
    };
    let (permitted, by) = match &verdict {
        Verdict::Permit(permit) => (true, place(permit.rule())),
        Verdict::Deny(denial) => (false, place(denial.rule())),
    };
    let wanted = match expected {
        Ruling::Permitted(by) => (true, Some(by)),
        Ruling::Forbidden(by) | Ruling::Failed(by) => (false, Some(by)),
        Ruling::Unpermitted => (false, None),
    };
    assert_eq!((permitted, by), wanted, "{about}");
}

fn occasion(now: Duration) -> Occasion<'static> {
    Occasion {
        receipt: "r-7k2m0q9xw4e8t5hz".parse().unwrap(),
        now,
        layer: Layer::Sidecar,
        method: "GET",
        target: "/",
        transaction: None,
        trace_id: None,
    }
}

/// All policies read from their texts again, as the first of many are not.
fn as_written(shared: &Shared) -> Panel {
    let read = |(at, entry): (usize, &PolicyEntry)| (at, Form::read(entry).map(Arc::new));
    shared.entries.iter().enumerate().map(read).collect()
}

#[test]
fn where_engine_and_cedar_differ_nobody_gets_through() {
    let permit = "@id(\"p0\") permit (principal is Mesh::Workload, action, resource is Shop::Page);";
    let forbid = "@id(\"p0\") forbid (principal, action, resource);";
    for (engine, cedar) in [(permit, forbid), (forbid, permit)] {
        let broken = Shared { engine: unvalidated(SCHEMA, engine).engine, ..unvalidated(SCHEMA, cedar) };
        let policy = ServicePolicy::new(broken, Mode::Audit, None, Duration::MAX);
        let caller = Caller {
            principal: Principal::Workload(SpiffeId::new(WEB).unwrap()),
            user: None,
            chain: Arc::new([]),
            address: None,
        };
        let page = ObjectRef::new("Shop::Page", "1");
        let mut attributes = Attributes::none();
        attributes.insert(page.clone(), "owner", AttributeValue::Text("alice".into()));
        let before = shadow_counts();
        let verdict =
            policy.decide_object(&caller, "Read", &page, &attributes, &occasion(Duration::from_secs(9)));
        let Verdict::Deny(denial) = verdict else { panic!("a permit: engine {engine}, cedar {cedar}") };
        assert_eq!(denial.rule().name(), "policy.disagreement");
        assert!(shadow_counts().mismatched > before.mismatched);
        assert!(denial.audited().is_err(), "audit mode does not let it through");
    }
}

#[test]
fn the_engine_decides_as_cedar_does() {
    let mut seed = [0; 8];
    ring::rand::SystemRandom::new().fill(&mut seed).unwrap();
    let seed =
        std::env::var("PALISADE_ORACLE_SEED").map_or(u64::from_be_bytes(seed), |set| set.parse().unwrap());
    let mut dice = Dice(seed);
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for _ in 0..SETS {
        let policies: String =
            (0..=dice.below(MOST_POLICIES) as usize).map(|id| policy(&mut dice, id)).collect();
        let service = ServicePolicy::new(unvalidated(SCHEMA, &policies), Mode::Enforce, None, Duration::MAX);
        let all = as_written(service.shared());
        for number in 0..REQUESTS {
            let asking = request(&mut dice);
            let Some(answers) = answers(&service, &all, &asking) else { continue };
            let Answers { all, candidates, swift, completed } = answers;
            let about = || {
                format!(
                    "PALISADE_ORACLE_SEED={seed}: {:?} {} {} {:?} {:?}\n{policies}",
                    asking.caller, asking.action, asking.object, asking.attributes, asking.now
                )
            };
            assert_eq!(candidates, all, "{}", about());
            if let Some(swift) = swift {
                assert_eq!(swift, all.ruling, "{}", about());
            }
            if let Some(completed) = completed {
                assert_eq!(completed, all.ruling, "{}", about());
            }
            if number % 16 == 0 {
                check_verdict(&service, &asking, all.ruling, &about());
            }
            let ruling = match all.ruling {
                Ruling::Permitted(_) => "permitted",
                Ruling::Forbidden(_) => "forbidden",
                Ruling::Failed(_) => "failed",
                Ruling::Unpermitted => "unpermitted",
            };
            let by = match (swift, completed) {
                (Some(_), _) => "by the engine",
                (None, Some(_)) => "by both",
                (None, None) => "by Cedar",
            };
            for what in [ruling, by, "compared"] {
                *seen.entry(what).or_default() += 1;
            }
        }
    }
    println!("{seen:?}");
    // Otherwise the test would show nothing.
    assert!(seen["compared"] >= 100_000, "{seen:?}");
    assert!(seen["by the engine"] >= 30_000 && seen["by both"] >= 1000, "{seen:?}");
    assert!(seen["by Cedar"] >= 1000, "{seen:?}");
    for ruling in ["permitted", "forbidden", "failed", "unpermitted"] {
        assert!(seen[ruling] >= 3000, "{seen:?}");
    }
}
