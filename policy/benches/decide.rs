//! What a decision costs, from a request as it was parsed to the permit, beside plain Cedar in the same run.
//!
//! `cargo bench -p policy`; prints a table, compares nothing. See bench/RESULTS.md.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    missing_docs,
    reason = "a program for people who measure"
)]

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cedar_policy::{
    Authorizer, Context, Decision, Entities, Entity, EntityUid, PolicySet, Request, RestrictedExpression,
};
use identity::txn::User;
use identity::{Clock as _, SpiffeId, SystemClock, TrustDomain};
use policy::{
    Attributes, Caller, Layer, Occasion, Policies, Principal, Receipts, ServicePolicy, Verdict, shadow_counts,
};

const MESH: &str = include_str!("../../examples/bank/policies/mesh.cedarschema");
const SCHEMA: &str = "namespace Shop {
    entity Order = { owner: String };
    action Read, List, Write appliesTo { principal: [Mesh::Workload], resource: [Order], context: Mesh::Context };
}";
/// Decisions measured one by one in a round.
const DECISIONS: usize = 20_000;
/// The round with the best median is printed: the others say what else the machine was doing.
const ROUNDS: usize = 15;
/// Different requests, each by its own caller: so few that all they need stays in the nearest cache, and so many
/// that little does.
const REQUESTS: [usize; 2] = [64, 4096];
/// Plain Cedar is measured for so long.
const CEDAR_TIME: Duration = Duration::from_millis(1500);

fn main() {
    println!("clock: two readings are {} apart, which every figure below holds once", clock_cost().median());
    println!();
    println!(
        "| policies | routes | requests | map: p50 | p99 | screen and decide: p50 | p99 | all three: p50 | p99 | allocations | denial: p50 |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for policies in [10, 1000, 10_000] {
        for routes in [1, 1000] {
            for requests in REQUESTS {
                decisions(policies, routes, requests);
            }
        }
    }
    println!();
    println!(
        "| policies | plain Cedar, Authorizer alone: p50 | with request and entities: p50 | load | parsing and validating by Cedar alone | bytes a policy | of Cedar alone |"
    );
    println!("|---|---|---|---|---|---|---|");
    for policies in [10, 1000, 10_000] {
        cedar(policies);
    }
    println!();
    println!("| policies | Cedar evaluates one of them, permit: p50 | p99 |");
    println!("|---|---|---|");
    for policies in [10, 1000, 10_000] {
        with_cedar(policies);
    }
    println!();
    println!("| policies | regorus on its RVM, data-driven: p50 | p99 | with its input built: p50 |");
    println!("|---|---|---|---|");
    for policies in [10, 1000, 10_000] {
        rego(policies);
    }
    println!();
    println!("a receipt: {}", receipts().median());
    let counts = shadow_counts();
    println!("compared with Cedar meanwhile: {}, different: {}", counts.compared, counts.mismatched);
}

/// Policies of the kinds that a mesh has: most name a caller and compare the owner with the user, some forbid,
/// some are about one object, one is about everybody.
fn policies_text(count: usize) -> String {
    let mut text = String::new();
    for n in 0..count {
        let who = format!("principal == Mesh::Workload::\"spiffe://bank.example/service/s{n}\"");
        let line = match n % 10 {
            9 => format!("forbid ({who}, action == Shop::Action::\"Write\", resource is Shop::Order) unless {{ context has user && context.user.groups.contains(\"writers\") && context.now - context.user.auth_time < 3600 }};"),
            8 => format!("permit ({who}, action == Shop::Action::\"Read\", resource == Shop::Order::\"o-{n}\") when {{ context has user && [\"alice\", \"bob\"].contains(context.user.id) }};"),
            7 if n < 10 => "forbid (principal, action, resource is Shop::Order) when { context has user && context.user.groups.contains(\"suspended\") };".into(),
            // Every other one has a condition of its own.
            1 | 3 | 5 => permit(&who, &format!(" && context.user.client != \"c{n}\"")),
            _ => permit(&who, ""),
        };
        writeln!(text, "@id(\"p{n}\")\n{line}").unwrap();
    }
    text
}

fn permit(who: &str, more: &str) -> String {
    format!(
        "permit ({who}, action in [Shop::Action::\"Read\", Shop::Action::\"List\"], resource is Shop::Order) when {{ \
         context has user && resource.owner == context.user.id && context.user.scopes.contains(\"orders\"){more} }};"
    )
}

fn directory(policies: usize, routes: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut map = String::new();
    for n in 0..routes {
        write!(
            map,
            "[[route]]\nmatch = \"GET /area-{n}/owners/{{owner}}/orders/{{id:int}}\"\naction = \"Read\"\n\
             object = 'Order::\"{{id}}\"'\nattributes = {{ owner = \"path:owner\" }}\n"
        )
        .unwrap();
    }
    let service = dir.path().join("services/shop");
    std::fs::create_dir_all(&service).unwrap();
    std::fs::write(dir.path().join("mesh.cedarschema"), MESH).unwrap();
    std::fs::write(service.join("shop.cedarschema"), SCHEMA).unwrap();
    std::fs::write(service.join("map.toml"), map).unwrap();
    std::fs::write(service.join("shop.cedar"), policies_text(policies)).unwrap();
    dir
}

fn load(dir: &Path) -> Arc<ServicePolicy> {
    let loaded = Policies::load(dir, &TrustDomain::new("bank.example").unwrap());
    loaded.unwrap_or_else(|problems| panic!("{problems}")).service("shop").unwrap()
}

fn alice() -> Arc<User> {
    Arc::new(User {
        id: "alice".into(),
        issuer: "https://idp.bank.example".into(),
        client: "bank-web".into(),
        scopes: ["openid", "profile", "orders"].map(str::to_owned).into(),
        groups: ["staff", "writers"].map(str::to_owned).into(),
        auth_time: 1_795_000_000,
        tenant: None,
        mfa: false,
    })
}

fn workload(n: usize) -> SpiffeId {
    SpiffeId::new(&format!("spiffe://bank.example/service/s{n}")).unwrap()
}

/// Callers whom a policy of the seven ordinary ones in ten is about.
fn caller(n: usize, policies: usize) -> Caller {
    let n = n * 7919 % policies;
    let id = workload(n - n % 10 + n % 7);
    let gateway = SpiffeId::new("spiffe://bank.example/palisade/gateway").unwrap();
    let chain = Arc::new([gateway, id.clone()]);
    Caller { principal: Principal::Workload(id), user: Some(alice()), chain, address: None }
}

fn parts(area: usize, owner: &str, order: usize) -> http::request::Parts {
    http::Request::get(format!("/area-{area}/owners/{owner}/orders/{order}"))
        .header("host", "shop")
        .header("accept", "application/json")
        .header("user-agent", "python-requests/2.32.3")
        .header("accept-encoding", "gzip, deflate, br")
        .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
        .header("x-request-id", "0b0c4a0e-93c5-4a0e-8a33-0f6f2a3c1d9e")
        .body(())
        .unwrap()
        .into_parts()
        .0
}

fn decisions(policies: usize, routes: usize, requests: usize) {
    let dir = directory(policies, routes);
    let policy = load(dir.path());
    let asked: Vec<_> = (0..requests)
        .map(|n| (caller(n, policies), parts(n * 31 % routes, "alice", n), parts(n * 31 % routes, "bob", n)))
        .collect();
    let receipts = Receipts::new(identity::random::system());
    let attributes = Attributes::none();
    let clock = SystemClock;
    let mapped_before: Vec<_> = asked.iter().map(|(_, parts, _)| policy.map(parts).unwrap()).collect();

    let map = best(requests, |n| {
        let (_, parts, _) = &asked[n];
        let before = Instant::now();
        black_box(policy.map(black_box(parts)).unwrap());
        before.elapsed()
    });
    let decide = best(requests, |n| {
        let ((caller, parts, _), mapped) = (&asked[n], &mapped_before[n]);
        let occasion = occasion(parts, &receipts, &clock);
        let before = Instant::now();
        policy.screen(caller, mapped, &occasion).unwrap();
        let verdict = policy.decide(caller, mapped, &attributes, &occasion);
        let took = before.elapsed();
        assert!(matches!(black_box(verdict), Verdict::Permit(_)));
        took
    });
    let whole = best(requests, |n| {
        let (caller, parts, _) = &asked[n];
        let occasion = occasion(parts, &receipts, &clock);
        let before = Instant::now();
        let mapped = policy.map(black_box(parts)).unwrap();
        policy.screen(caller, &mapped, &occasion).unwrap();
        let verdict = policy.decide(caller, &mapped, &attributes, &occasion);
        let took = before.elapsed();
        assert!(matches!(black_box(verdict), Verdict::Permit(_)));
        took
    });
    let denial = best_of(3, requests, requests, |n| {
        let (caller, _, parts) = &asked[n];
        let occasion = occasion(parts, &receipts, &clock);
        let before = Instant::now();
        let mapped = policy.map(black_box(parts)).unwrap();
        let verdict = policy.decide(caller, &mapped, &attributes, &occasion);
        let took = before.elapsed();
        assert!(matches!(black_box(verdict), Verdict::Deny(_)));
        took
    });
    let (caller, parts, _) = &asked[1];
    let once = || {
        let occasion = occasion(parts, &receipts, &clock);
        allocation_counter::measure(|| {
            let mapped = policy.map(black_box(parts)).unwrap();
            policy.screen(caller, &mapped, &occasion).unwrap();
            drop(black_box(policy.decide(caller, &mapped, &attributes, &occasion)));
        })
    };
    // One of the two may be the one in a second that is put to Cedar as well.
    let allocated = once().count_total.min(once().count_total);
    println!(
        "| {policies} | {routes} | {requests} | {} | {} | {} | {} | **{}** | **{}** | {allocated} | {} |",
        map.at(50),
        map.at(99),
        decide.at(50),
        decide.at(99),
        whole.at(50),
        whole.at(99),
        denial.at(50),
    );
}

/// The cost of a policy that is not compiled and holds for everybody.
fn with_cedar(policies: usize) {
    let dir = directory(policies, 1);
    let more = "@id(\"not-compiled\")\nforbid (principal, action, resource is Shop::Order) when { \
                ip(\"10.0.0.1\").isLoopback() };";
    std::fs::write(dir.path().join("services/shop/more.cedar"), more).unwrap();
    let policy = load(dir.path());
    let requests = REQUESTS[1];
    let asked: Vec<_> = (0..requests).map(|n| (caller(n, policies), parts(0, "alice", n))).collect();
    let receipts = Receipts::new(identity::random::system());
    let times = best_of(3, requests, requests, |n| {
        let (caller, parts) = &asked[n];
        let occasion = occasion(parts, &receipts, &SystemClock);
        let before = Instant::now();
        let mapped = policy.map(black_box(parts)).unwrap();
        let verdict = policy.decide(caller, &mapped, &Attributes::none(), &occasion);
        let took = before.elapsed();
        assert!(matches!(black_box(verdict), Verdict::Permit(_)));
        took
    });
    println!("| {policies} | {} | {} |", times.at(50), times.at(99));
}

fn occasion<'a>(parts: &'a http::request::Parts, receipts: &Receipts, clock: &SystemClock) -> Occasion<'a> {
    Occasion {
        receipt: receipts.draw().unwrap(),
        now: clock.now(),
        layer: Layer::Sidecar,
        method: parts.method.as_str(),
        target: parts.uri.path(),
        transaction: None,
        trace_id: Some(0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736),
    }
}

fn cedar(policies: usize) {
    let text = policies_text(policies);
    let dir = directory(policies, 1);
    let before = Instant::now();
    let mut loaded = None;
    let memory = allocation_counter::measure(|| loaded = Some(load(dir.path())));
    let load_time = before.elapsed();
    drop(loaded);
    let before = Instant::now();
    let schema = cedar_policy::Schema::from_cedarschema_str(&format!("{MESH}\n{SCHEMA}")).unwrap().0;
    let mut set = PolicySet::new();
    let plain_memory = allocation_counter::measure(|| set = text.parse().unwrap());
    let result =
        cedar_policy::Validator::new(schema.clone()).validate(&set, cedar_policy::ValidationMode::Strict);
    assert!(result.validation_passed());
    let parse_time = before.elapsed();
    let (mut alone, mut whole) = (Times::default(), Times::default());
    let start = Instant::now();
    let mut n = 0;
    while start.elapsed() < CEDAR_TIME {
        let caller = caller(n, policies);
        let before = Instant::now();
        let (request, entities) = question(&caller, &schema);
        let inner = Instant::now();
        let response = Authorizer::new().is_authorized(&request, &set, &entities);
        alone.0.push(inner.elapsed());
        whole.0.push(before.elapsed());
        assert_eq!(black_box(response).decision(), Decision::Allow);
        n += 1;
    }
    println!(
        "| {policies} | {} | {} | {:.2} s | {:.2} s | {} | {} |",
        alone.at(50),
        whole.at(50),
        load_time.as_secs_f64(),
        parse_time.as_secs_f64(),
        memory.bytes_current / i64::try_from(policies).unwrap(),
        plain_memory.bytes_current / i64::try_from(policies).unwrap(),
    );
}

/// What the ordinary policies say, as one rule over data that has a row for each: what Rego is quickest with.
const REGO: &str = r#"
package shop
default allow := false
allow if {
  some rule in data.permits[input.principal][input.action]
  input.resource.owner == input.user.id
  rule.scope in input.user.scopes
  not input.user.client in rule.clients_not
  not forbidden
}
forbidden if "suspended" in input.user.groups
"#;

fn rego(policies: usize) {
    let mut permits = serde_json::Map::new();
    for n in 0..policies {
        let clients_not = if n % 2 == 1 { vec![format!("c{n}")] } else { vec![] };
        let rule = serde_json::json!([{"scope": "orders", "clients_not": clients_not}]);
        permits.insert(workload(n).to_string(), serde_json::json!({"Read": rule, "List": rule}));
    }
    let data = serde_json::json!({"permits": permits}).to_string();
    let data = regorus::Value::from_json_str(&data).unwrap();
    let mut engine = regorus::Engine::new();
    engine.add_policy("shop.rego".to_owned(), REGO.to_owned()).unwrap();
    engine.add_data(data.clone()).unwrap();
    let entry: regorus::Rc<str> = "data.shop.allow".into();
    let compiled = engine.compile_with_entrypoint(&entry).unwrap();
    let program =
        regorus::languages::rego::compiler::Compiler::compile_from_policy(&compiled, &["data.shop.allow"]);
    let mut machine = regorus::rvm::vm::RegoVM::new();
    machine.load_program(program.unwrap());
    machine.set_data(data).unwrap();
    let (mut alone, mut whole) = (Times::default(), Times::default());
    let start = Instant::now();
    let mut n = 0;
    while start.elapsed() < CEDAR_TIME {
        let caller = caller(n, policies);
        let Principal::Workload(id) = &caller.principal else { panic!("a client") };
        let user = caller.user.as_ref().unwrap();
        let before = Instant::now();
        let input = serde_json::json!({
            "principal": id.as_str(),
            "action": "Read",
            "resource": {"owner": "alice"},
            "user": {"id": user.id, "client": user.client, "scopes": user.scopes, "groups": user.groups},
        });
        let input: regorus::Value = serde_json::from_value(input).unwrap();
        let inner = Instant::now();
        machine.set_input(input);
        let answer = machine.execute().unwrap();
        alone.0.push(inner.elapsed());
        whole.0.push(before.elapsed());
        assert_eq!(black_box(answer), regorus::Value::Bool(true));
        n += 1;
    }
    println!("| {policies} | {} | {} | {} |", alone.at(50), alone.at(99), whole.at(50));
}

fn question(caller: &Caller, schema: &cedar_policy::Schema) -> (Request, Entities) {
    let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
    let texts = |list: &[String]| RestrictedExpression::new_set(list.iter().map(|item| text(item)));
    let Principal::Workload(id) = &caller.principal else { panic!("a client") };
    let user = caller.user.as_ref().unwrap();
    let principal: EntityUid = format!("Mesh::Workload::\"{id}\"").parse().unwrap();
    let order: EntityUid = "Shop::Order::\"17\"".parse().unwrap();
    let user = RestrictedExpression::new_record([
        ("id".to_owned(), text(&user.id)),
        ("issuer".to_owned(), text(&user.issuer)),
        ("client".to_owned(), text(&user.client)),
        ("scopes".to_owned(), texts(&user.scopes)),
        ("groups".to_owned(), texts(&user.groups)),
        ("auth_time".to_owned(), RestrictedExpression::new_long(1_795_000_000)),
    ])
    .unwrap();
    let chain = RestrictedExpression::new_set(caller.chain.iter().map(|id| text(id.as_str())));
    let context = Context::from_pairs([
        ("user".to_owned(), user),
        ("chain".to_owned(), chain),
        ("now".to_owned(), RestrictedExpression::new_long(1_795_305_600)),
    ])
    .unwrap();
    let attributes =
        HashMap::from([("service".to_owned(), text("s")), ("trust_domain".to_owned(), text("bank.example"))]);
    let entities = [
        Entity::new(principal.clone(), attributes, HashSet::new()).unwrap(),
        Entity::new(order.clone(), HashMap::from([("owner".to_owned(), text("alice"))]), HashSet::new())
            .unwrap(),
    ];
    let entities = schema.action_entities().unwrap().add_entities(entities, None).unwrap();
    let action: EntityUid = "Shop::Action::\"Read\"".parse().unwrap();
    (Request::new(principal, action, order, context, Some(schema)).unwrap(), entities)
}

fn receipts() -> Times {
    let receipts = Receipts::new(identity::random::system());
    best(1, |_| {
        let before = Instant::now();
        black_box(receipts.draw().unwrap());
        before.elapsed()
    })
}

fn clock_cost() -> Times {
    best(1, |_| Instant::now().elapsed())
}

fn best(requests: usize, measure: impl FnMut(usize) -> Duration) -> Times {
    best_of(ROUNDS, DECISIONS, requests, measure)
}

/// The round with the best median, after one that is not counted.
fn best_of(
    rounds: usize,
    decisions: usize,
    requests: usize,
    mut measure: impl FnMut(usize) -> Duration,
) -> Times {
    let mut round = || Times((0..decisions).map(|n| measure(n % requests)).collect());
    round();
    (0..rounds).map(|_| round()).min_by_key(Times::median_time).unwrap()
}

#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn sorted(&self) -> Vec<Duration> {
        let mut times = self.0.clone();
        times.sort_unstable();
        times
    }

    fn median_time(&self) -> Duration {
        self.sorted()[self.0.len() / 2]
    }

    fn median(&self) -> String {
        nanoseconds(self.median_time())
    }

    fn at(&self, percent: usize) -> String {
        nanoseconds(self.sorted()[self.0.len() * percent / 100])
    }
}

fn nanoseconds(time: Duration) -> String {
    let nanos = time.as_nanos();
    match nanos {
        0..1000 => format!("{nanos} ns"),
        1000..1_000_000 => format!("{:.2} µs", nanos as f64 / 1e3),
        _ => format!("{:.2} ms", nanos as f64 / 1e6),
    }
}
