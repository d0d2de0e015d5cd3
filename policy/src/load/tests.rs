use std::fs;

use proptest::prelude::*;

use super::*;

const MESH: &str = include_str!("../../../examples/bank/policies/mesh.cedarschema");
const SCHEMA: &str = "namespace Shop {\n  entity Order = { owner: String, total?: Long, tags: Set<String> };\n  entity Page;\n  \
    action Group;\n  action Read in [Group] appliesTo { principal: [Mesh::Workload], resource: [Order], context: Mesh::Context };\n  \
    action View appliesTo { principal: [Mesh::Workload], resource: [Page], context: Mesh::Context };\n}\n";
const MAP: &str = "[[route]]\nmatch = \"GET /orders/{id:int}\"\naction = \"Read\"\nobject = 'Order::\"{id}\"'\n\
    attributes = { owner = \"entities\", tags = \"entities\" }\n";
const POLICY: &str = "@id(\"read\")\npermit (principal is Mesh::Workload, action in Shop::Action::\"Group\", resource)\n\
    when { resource.owner == \"x\" };\n";

/// A directory with one service `shop`, its files replaced as given; `None` leaves a file out.
pub(crate) fn load(changes: &[(&str, Option<&str>)]) -> (Result<Arc<Policies>, Problems>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut files = BTreeMap::from([
        ("mesh.cedarschema", MESH),
        ("services/shop/shop.cedarschema", SCHEMA),
        ("services/shop/map.toml", MAP),
        ("services/shop/shop.cedar", POLICY),
    ]);
    for (name, content) in changes {
        match content {
            Some(content) => drop(files.insert(name, content)),
            None => drop(files.remove(name)),
        }
    }
    for (name, content) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let loaded = Policies::load(dir.path(), &TrustDomain::new("bank.example").unwrap());
    (loaded, dir)
}

/// A service with policies as they are, not validated, so that their evaluation can fail.
pub(crate) fn unvalidated(schema: &str, policies: &str) -> Shared {
    let (path, trust_domain) = (Path::new("shop"), TrustDomain::new("bank.example").unwrap());
    let mut problems = Problems::default();
    let mesh = SchemaFile::parse(path, MESH, &mut problems).unwrap();
    let own = SchemaFile::parse(path, schema, &mut problems).unwrap();
    let schema = schema::link(&mesh, &own, &trust_domain).unwrap();
    let file = TextFile { path: path.into(), name: "shop.cedar".into(), text: policies.into() };
    let entries = parse_policies(&file, &trust_domain, &mut problems);
    assert_eq!(entries.len(), policies.matches("@id(").count(), "{problems}\n{policies}");
    let version = PolicyVersion::of([("", policies)]);
    assemble("shop", &trust_domain, &version, schema, Map::default(), entries)
}

/// The problems as text, file names below the directory.
fn problems(changes: &[(&str, Option<&str>)]) -> String {
    let (loaded, dir) = load(changes);
    let text = loaded.expect_err("it should not load").to_string();
    text.replace(&format!("{}/", dir.path().display()), "")
}

fn map_problem(map: &str) -> String {
    problems(&[("services/shop/map.toml", Some(map))])
}

fn policy_problem(policy: &str) -> String {
    problems(&[("services/shop/shop.cedar", Some(policy))])
}

#[test]
fn the_directory_of_these_tests_loads() {
    let (loaded, _dir) = load(&[]);
    let policies = loaded.unwrap();
    assert_eq!(policies.services().map(|s| s.name()).collect::<Vec<_>>(), ["shop"]);
    assert!(policies.service("other").is_none());
    assert_eq!(policies.version().as_str().len(), 12);
}

#[test]
fn the_trust_domain_is_that_of_most_workloads_that_are_named() {
    let of = |policies: &str| {
        let (_any, dir) = load(&[("services/shop/shop.cedar", Some(policies))]);
        Policies::trust_domain_of(dir.path()).map(|named| named.to_string())
    };
    let permit = |domain: &str| {
        format!("permit (principal == Mesh::Workload::\"spiffe://{domain}/service/web\", action, resource);")
    };
    assert_eq!(
        of(&[permit("a.example"), permit("b.example"), permit("b.example")].concat()).unwrap(),
        "b.example"
    );
    assert_eq!(of(POLICY), None);
    assert_eq!(of("permit"), None);
    assert_eq!(Policies::trust_domain_of(Path::new("nowhere")), None);
}

#[test]
fn every_byte_counts_for_the_version() {
    let version = |changes: &[(&str, Option<&str>)]| load(changes).0.unwrap().version().clone();
    assert_eq!(version(&[]), version(&[]));
    assert_ne!(version(&[]), version(&[("services/shop/map.toml", Some(&format!("{MAP}\n")))]));
    // Files that are not read do not count.
    assert_eq!(version(&[]), version(&[("services/shop/README.md", Some("x"))]));
}

#[test]
fn what_is_missing_is_named() {
    assert!(problems(&[("mesh.cedarschema", None)]).contains("mesh.cedarschema: cannot be read"));
    let all = problems(&[
        ("services/shop/shop.cedarschema", None),
        ("services/shop/map.toml", None),
        ("services/shop/shop.cedar", None),
        ("services/shop/README.md", Some("")),
    ]);
    assert_eq!(
        all,
        "services/shop: the service shop has no schema (shop.cedarschema)\n\
         services/shop: the service shop has no map.toml\n\
         services/shop: the service shop has no policies (shop.cedar)"
    );
    let empty = tempfile::tempdir().unwrap();
    let trust_domain = TrustDomain::new("bank.example").unwrap();
    let text = Policies::load(empty.path(), &trust_domain).unwrap_err().to_string();
    assert!(
        text.contains("mesh.cedarschema: cannot be read") && text.contains("services: cannot be read"),
        "{text}"
    );
    let gone = Policies::load(&empty.path().join("gone"), &trust_domain).unwrap_err().to_string();
    assert_eq!(gone.lines().count(), 1, "{gone}");
}

#[test]
fn what_is_to_be_true_of_an_object_is_held_against_the_schema() {
    let (loaded, _dir) = load(&[]);
    let shop = loaded.unwrap_or_else(|problems| panic!("{problems}")).service("shop").unwrap();
    let check = |kind: &str, json: serde_json::Value| shop.check_relation(kind, json.as_object().unwrap());
    assert_eq!(check("Order", serde_json::json!({ "owner": "x", "tags": ["a"] })), Ok(()));
    // What is missing may come from elsewhere.
    assert_eq!(check("Order", serde_json::json!({})), Ok(()));
    for (kind, attributes, why) in [
        ("Ordr", serde_json::json!({}), "the schema has no type `Ordr`; did you mean `Order`?"),
        ("Order", serde_json::json!({ "ownr": "x" }), "Order has no attribute `ownr`; did you mean `owner`?"),
        ("Order", serde_json::json!({ "owner": 3 }), "the attribute `owner` is a String, which 3 is none of"),
        (
            "Order",
            serde_json::json!({ "owner": ["x"] }),
            "the attribute `owner` is a String, which [\"x\"] is none of",
        ),
        (
            "Order",
            serde_json::json!({ "tags": "a" }),
            "the attribute `tags` is a Set<String>, which \"a\" is none of",
        ),
        (
            "Order",
            serde_json::json!({ "tags": [1] }),
            "the attribute `tags` is a Set<String>, which [1] is none of",
        ),
    ] {
        assert_eq!(check(kind, attributes).unwrap_err(), why);
    }
    assert!(check("Order", serde_json::json!({ "owner": ["x".repeat(500)] })).unwrap_err().len() < 200);
}

#[test]
fn policy_36_a_part_that_is_not_known_is_not_ignored() {
    assert!(
        problems(&[("gaurd/x.cedar", Some(""))]).starts_with("gaurd: not a part of a policies directory")
    );
    assert!(problems(&[("guard/x.toml", Some(""))]).starts_with("guard/x.toml: not a file of policies"));
    assert!(
        problems(&[("guard/invariants/more/x.cedar", Some(""))])
            .starts_with("guard/invariants/more: not a file of policies")
    );
    assert!(
        problems(&[("services/shop/map.tml", Some(""))])
            .starts_with("services/shop/map.tml: not a file of a service")
    );
    assert!(
        problems(&[("services/Shop/x.cedar", Some(""))]).contains("services/Shop: not a service's directory")
    );
}

#[test]
fn guards_forbid_at_every_service_and_permit_at_none() {
    let guard = "@id(\"no-strangers\")\nforbid (principal is Mesh::Workload, action, resource) unless { context has user };";
    let (loaded, _dir) = load(&[("guard/all.cedar", Some(guard))]);
    let loaded = loaded.unwrap();
    let policies: Vec<_> = loaded
        .service("shop")
        .unwrap()
        .policies()
        .map(|(id, file, line)| (id.to_owned(), file.to_owned(), line))
        .collect();
    assert!(policies.contains(&("no-strangers".to_owned(), "guard/all.cedar".to_owned(), 1)), "{policies:?}");
    let (without, _dir) = load(&[]);
    assert_ne!(loaded.version(), without.unwrap().version(), "guards decide");
    let (proved, _dir) = load(&[("guard/invariants/all.cedar", Some(guard))]);
    let proved = proved.unwrap();
    assert_eq!(
        (proved.invariants().len(), proved.service("shop").unwrap().policies().count()),
        (1, policies.len() - 1)
    );
    for place in ["guard/all.cedar", "guard/invariants/all.cedar"] {
        let permit = guard.replace("forbid", "permit");
        assert!(problems(&[(place, Some(&permit))]).contains("is a permit in guard/"), "{place}");
        let nameless = guard.replace("@id(\"no-strangers\")\n", "");
        assert!(problems(&[(place, Some(&nameless))]).contains("the policy has no `@id`"), "{place}");
    }
    let read = "@id(\"read\")\nforbid (principal, action, resource);";
    assert!(
        problems(&[("guard/all.cedar", Some(read))])
            .contains("the id `read` is taken by services/shop/shop.cedar")
    );
    assert!(
        problems(&[("guard/all.cedar", Some(&guard.replace("context has user", "context.usr.id == \"x\"")))])
            .starts_with("guard/all.cedar:")
    );
}

#[test]
fn a_route_to_an_unknown_action_says_where_and_offers_the_nearest() {
    assert_eq!(
        map_problem(&MAP.replace("\"Read\"", "\"Raed\"")),
        "services/shop/map.toml:3:10: the schema of Shop has no action `Raed`\n  hint: did you mean `Read`?"
    );
    assert_eq!(
        map_problem(&MAP.replace("action =", "acton =")),
        "services/shop/map.toml:3:1: unknown key `acton`\n  hint: did you mean `action`?\n\
         services/shop/map.toml:1:1: the route has no `action`"
    );
    assert!(
        map_problem(&MAP.replace("Order::", "Page::"))
            .contains("the action `Read` does not apply to Shop::Page")
    );
    assert!(
        map_problem(&MAP.replace("\"Read\"", "\"Group\"")).contains("is a group and applies to no object")
    );
}

#[test]
fn maps_with_mistakes_are_problems_with_a_place() {
    let route = |extra: &str| format!("{MAP}{extra}\n");
    for (map, at, message) in [
        ("x = ".to_owned(), "1:", "string"),
        (String::new(), "1:1", "no [[route]]"),
        ("mode = \"warn\"\nmapping = \"none\"".into(), "1:8", "`mode` is"),
        ("mapping = \"some\"".into(), "1:11", "is \"kafka\", \"store\", \"vault\", \"tcp\" or \"none\""),
        ("mapping = \"tcp\"".into(), "1:11", "no action `Connect` on Shop::Port"),
        (format!("mapping = \"tcp\"\n{MAP}"), "1:11", "has routes or is \"tcp\""),
        ("route = 3".into(), "1:9", "list of tables"),
        (MAP.replace("{id:int}", "{id:integer}"), "2:22", "not a capture type"),
        (MAP.replace("GET /orders", "GET orders"), "2:14", "begins with `/`"),
        (MAP.replace("GET", "Get"), "2:9", "not a method"),
        (MAP.replace("GET", "FETCH"), "2:9", "not a method"),
        (
            MAP.replace("GET /orders/{id:int}", "GET /.well-known/palisade/{id:int}"),
            "2:9",
            "cannot be mapped",
        ),
        (MAP.replace("\"{id}\"", "\"{body:/id}\""), "4:10", "`body` does not list `id`"),
        (MAP.replace("\"{id}\"", "\"{nr}\""), "4:10", "captures no `{nr}`"),
        (MAP.replace("Order::\"{id}\"", "Order"), "4:10", "is written"),
        (MAP.replace(", tags = \"entities\"", ""), "1:1", "nothing tells the attribute `tags`"),
        (MAP.replace("owner = \"entities\"", "ownr = \"entities\""), "5:16", "has no attribute `ownr`"),
        (MAP.replace("owner = \"entities\"", "owner = \"entity\""), "5:24", "not a source"),
        (MAP.replace("owner = \"entities\"", "owner = \"path:nr\""), "5:24", "captures no `{nr}`"),
        (MAP.replace("owner = \"entities\"", "owner = \"claim:email\""), "5:24", "not a claim"),
        (MAP.replace("owner = \"entities\"", "owner = \"response:owner\""), "5:24", "JSON pointer"),
        (MAP.replace("owner = \"entities\"", "owner = \"response:/owner\""), "1:1", "not from both"),
        (
            MAP.replace("owner = \"entities\"", "owner = \"entities\", total = \"claim:sub\""),
            "5:44",
            "a claim is a String",
        ),
        (
            MAP.replace("\"entities\"", "\"response:/x\"").replace("GET", "DELETE"),
            "5:24",
            "before its response is seen",
        ),
        (route("query = [\"a\", \"a\"]"), "6:15", "listed twice"),
        (route("query = \"a\""), "6:9", "list of strings"),
        (route("body = { a = \"id\" }"), "1:1", "GET request has no body"),
        (route("body_max_bytes = 0").replace("GET", "POST"), "6:18", "at least 1"),
        (route("body_max_bytes = 9").replace("GET", "POST"), "6:18", "without a body"),
        (
            route("body = { a = \"id\" }\nbody_max_bytes = 9_000_000").replace("GET", "POST"),
            "7:18",
            "at most",
        ),
        (route("body = { a = \"float\" }").replace("GET", "POST"), "6:14", "not a member type"),
        (route("body_type = \"xml\"").replace("GET", "POST"), "6:13", "does not fit"),
        (route("upgrade = \"WebSocket\""), "6:11", "not the name of a protocol"),
        (route("upgrade = \"h2c\""), "6:11", "nobody judges"),
        (route("upgrade = \"websocket\"").replace("GET", "POST"), "6:11", "begins with GET"),
        (
            route("upgrade = \"websocket\"").replace("\"entities\"", "\"response:/x\""),
            "6:11",
            "holds no attributes",
        ),
        (
            format!("{MAP}{}", MAP.replace("{id:int}", "{nr:slug}").replace("{id}", "{nr}")),
            "6:1",
            "matches too",
        ),
        (MAP.replace("'Order::\"{id}\"'", "['Order::\"{id}\"', 'Page::\"{id}\"']"), "4:28", "have one type"),
    ] {
        let found = map_problem(&map);
        let place = format!("services/shop/map.toml:{at}");
        assert!(
            found.contains(message) && found.contains(&place),
            "wanted {place} {message}, found\n{found}\nin\n{map}"
        );
    }
}

#[test]
fn maps_with_several_mistakes_name_them_all() {
    let found = map_problem(&MAP.replace("\"Read\"", "\"Raed\"").replace("{id:int}", "{id:integer}"));
    assert!(found.contains("not a capture type"), "{found}");
    let found = problems(&[
        ("services/shop/map.toml", Some(&MAP.replace("\"Read\"", "\"Raed\""))),
        ("services/shop/shop.cedar", Some("permit (principal, action, resource);")),
    ]);
    assert!(found.contains("no action `Raed`") && found.contains("no `@id`"), "{found}");
}

#[test]
fn policies_with_mistakes_are_problems_with_a_place() {
    for (policy, at, message) in [
        (POLICY.replace("resource.owner", "resource.ownr"), "3:8", "ownr"),
        (POLICY.replace("\"x\"", "7"), "3:8", "not compatible"),
        (POLICY.replace("resource.owner ==", "resource.total =="), "3:8", ""),
        (POLICY.replace("Group\"", "Grup\""), "2:48", "Grup"),
        (POLICY.replace("when {", "when"), "3:6", "unexpected token"),
        (POLICY.replace("@id(\"read\")\n", ""), "1:1", "no `@id`"),
        (POLICY.replace("@id(\"read\")", "@id(\"read it\")"), "1:1", "no `@id`"),
        (format!("{POLICY}{POLICY}"), "4:1", "the id `read` is taken by services/shop/shop.cedar:1"),
        (POLICY.replace("principal is Mesh::Workload", "principal"), "1:1", "a permit for any principal"),
        (POLICY.replace("principal is Mesh::Workload", "principal == ?principal"), "1:1", "a template"),
        (POLICY.replace("is Mesh::Workload", "== Mesh::Workload::\"web\""), "1:1", "names no workload"),
        (
            POLICY
                .replace("is Mesh::Workload", "== Mesh::Workload::\"spiffe://bank.example.org/service/web\""),
            "1:1",
            "not of the trust domain",
        ),
        (POLICY.replace("owner == \"x\"", "owner == \"x\" && false"), "1:1", ""),
    ] {
        let found = policy_problem(&policy);
        let place = format!("services/shop/shop.cedar:{at}");
        assert!(
            found.contains(message) && found.contains(&place),
            "wanted {place} {message}, found\n{found}\nin\n{policy}"
        );
    }
    assert!(policy_problem("// nothing\n").contains("has no policy, so every request would be denied"));
}

#[test]
fn policy_38_templates_are_refused_and_never_silently_outside() {
    let found = policy_problem(&format!(
        "{POLICY}@id(\"t\") permit (principal == ?principal, action, resource in ?resource);"
    ));
    assert!(found.contains("shop.cedar:4:1: a template"), "{found}");
    assert!(found.contains("hint: write out the policy"), "{found}");
}

#[test]
fn policy_31_a_policy_for_a_look_alike_trust_domain_does_not_load() {
    for id in [
        "spiffe://bank.example.org/service/web",
        "spiffe://evil-bank.example/service/web",
        "spiffe://bank.example",
    ] {
        let named = format!("== Mesh::Workload::\"{id}\"");
        let found = policy_problem(&POLICY.replace("is Mesh::Workload", &named));
        assert!(found.contains(id), "{found}");
    }
}

#[test]
fn schemas_with_mistakes_are_problems() {
    let schema = |text: &str| problems(&[("services/shop/shop.cedarschema", Some(text))]);
    assert!(
        schema(&SCHEMA.replace("entity Page;", "entity Page"))
            .starts_with("services/shop/shop.cedarschema:4:")
    );
    assert!(
        schema(&SCHEMA.replace("namespace Shop", "namespace Mesh"))
            .contains("cannot declare the namespace Mesh")
    );
    assert!(schema("entity Order;").contains("exactly one namespace"));
    assert!(
        schema(&SCHEMA.replace("total?: Long", "total?: { x: Long }"))
            .contains("the attribute total of Shop::Order")
    );
    assert!(schema(&SCHEMA.replace("[Mesh::Workload]", "[Page]")).contains("which no request carries"));
    assert!(schema(&SCHEMA.replace("Mesh::Context", "{}")).contains("is not what requests carry"));
    let mesh = problems(&[("mesh.cedarschema", Some(&MESH.replace("    service: String,\n", "")))]);
    assert!(mesh.contains("the mesh's types are not as requests carry them"), "{mesh}");
    let twice = problems(&[
        ("services/two/two.cedarschema", Some(SCHEMA)),
        ("services/two/map.toml", Some(MAP)),
        ("services/two/two.cedar", Some(POLICY)),
    ]);
    assert!(twice.contains("the namespace Shop is declared by the service shop too"), "{twice}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_change_to_a_map_is_read_or_explained(at in 0..MAP.len(), with in "[ -~\\n\u{e9}]{0,3}", cut in 0usize..8) {
        let mut map = MAP.to_owned();
        map.replace_range(at..(at + cut).min(MAP.len()), &with);
        let (loaded, _dir) = load(&[("services/shop/map.toml", Some(&map))]);
        if let Err(problems) = loaded {
            prop_assert!(!problems.0.is_empty());
            prop_assert!(problems.0.iter().all(|p| p.file.ends_with("map.toml") && p.line > 0), "{problems}");
        }
    }
}

const PORTS: &str = "namespace Shop {\n  entity Port;\n  action Connect appliesTo { principal: [Mesh::Workload], \
    resource: [Port], context: Mesh::Context };\n}\n";
const CONNECT: &str = "@id(\"web-connects\")\npermit (principal == Mesh::Workload::\"spiffe://bank.example/service/web\", \
    action == Shop::Action::\"Connect\", resource == Shop::Port::\"main\");\n";

#[test]
fn a_connection_is_an_action_on_a_port_and_only_where_the_map_says_so() {
    let tcp = |map: &str| {
        let files = [
            ("services/shop/map.toml", Some(map)),
            ("services/shop/shop.cedarschema", Some(PORTS)),
            ("services/shop/shop.cedar", Some(CONNECT)),
        ];
        load(&files).0.unwrap().service("shop").unwrap()
    };
    let decide = |policy: &ServicePolicy, service: &str, port: &str| {
        let id = SpiffeId::new(&format!("spiffe://bank.example/service/{service}")).unwrap();
        let caller = crate::Caller {
            principal: crate::Principal::Workload(id),
            user: None,
            chain: Arc::new([]),
            address: None,
        };
        let occasion = crate::Occasion {
            receipt: crate::Receipt::generate(&ring::rand::SystemRandom::new()).unwrap(),
            now: std::time::Duration::from_secs(1),
            layer: crate::Layer::Sidecar,
            method: "CONNECT",
            target: port,
            transaction: None,
            trace_id: None,
        };
        match policy.decide_connect(&caller, port, &occasion) {
            crate::Verdict::Permit(permit) => permit.rule().name().to_owned(),
            crate::Verdict::Deny(denial) => format!("not by {}", denial.rule().name()),
        }
    };
    let policy = tcp("mapping = \"tcp\"");
    assert_eq!(policy.mapping(), crate::Mapping::Tcp);
    assert_eq!(decide(&policy, "web", "main"), "web-connects");
    assert_eq!(decide(&policy, "web", "admin"), "not by none");
    assert_eq!(decide(&policy, "other", "main"), "not by none");

    // The same policies over another map: what a connection carries would go round them.
    assert_eq!(decide(&tcp("mapping = \"none\""), "web", "main"), "not by tcp.not_allowed_by_map");
    let audit = tcp("mapping = \"none\"\nmode = \"audit\"");
    assert_eq!(decide(&audit, "web", "main"), "not by tcp.not_allowed_by_map");
    assert_eq!(audit.mode(std::time::Duration::MAX), crate::Mode::Audit);
    let routes = load(&[]).0.unwrap().service("shop").unwrap();
    assert_eq!(decide(&routes, "web", "main"), "not by tcp.not_allowed_by_map");
}

#[test]
fn audit_mode_ends_by_itself_on_its_day() {
    let audit = |until: &str| {
        load(&[("services/shop/map.toml", Some(&format!("mode = \"audit\"\n{until}\n{MAP}")))]).0
    };
    let policy = audit("audit_until = 2027-01-31").unwrap().service("shop").unwrap();
    // 2027-01-31T00:00:00Z
    let end = std::time::Duration::from_secs(1_801_353_600);
    assert_eq!(policy.audit_until(), Some(end));
    let just_before = end - std::time::Duration::from_nanos(1);
    assert_eq!((policy.mode(just_before), policy.mode(end)), (crate::Mode::Audit, crate::Mode::Enforce));
    assert_eq!(
        policy.with_mode(crate::Mode::Audit).mode(end),
        crate::Mode::Audit,
        "what the mesh says stays"
    );
    let wrong = |map: &str| map_problem(&format!("{map}\n{MAP}"));
    for not_a_date in ["\"2027-01-31\"", "2027-01-31T00:00:00Z", "2027-02-30", "1801353600"] {
        let problem = wrong(&format!("mode = \"audit\"\naudit_until = {not_a_date}"));
        assert!(problem.starts_with("services/shop/map.toml:2:"), "{problem}");
    }
    assert!(wrong("audit_until = 2027-01-31").contains("`audit_until` without `mode = \"audit\"`"));
    assert!(wrong("mode = \"enforce\"\naudit_until = 2027-01-31").contains("without `mode"));
}

#[test]
fn an_attribute_of_a_port_that_nothing_tells_is_a_problem() {
    let schema = PORTS.replace("entity Port;", "entity Port = { owner: String };");
    let text = problems(&[
        ("services/shop/map.toml", Some("mapping = \"tcp\"")),
        ("services/shop/shop.cedarschema", Some(&schema)),
        ("services/shop/shop.cedar", Some(CONNECT)),
    ]);
    assert!(text.contains("map.toml:1:11: nothing tells the attribute `owner` of Shop::Port"), "{text}");
}

const PROTO: &str = r#"
syntax = "proto3";
package bank;
message Ask { string id = 1; }
service Shop { rpc Look(Ask) returns (Ask); rpc Follow(stream Ask) returns (stream Ask); }
"#;

fn grpc_map(path: &str, member: &str) -> String {
    format!(
        "[[route]]\nmatch = \"POST {path}\"\naction = \"View\"\nobject = 'Page::\"{{body:/{member}}}\"'\n\
         body_type = \"grpc\"\nbody = {{ {member} = \"id\" }}\n"
    )
}

#[test]
fn messages_are_read_by_the_service_s_own_proto_files() {
    let map = grpc_map("/bank.Shop/Follow", "id");
    let (loaded, _dir) =
        load(&[("services/shop/map.toml", Some(&map)), ("services/shop/shop.proto", Some(PROTO))]);
    let policy = loaded.unwrap_or_else(|problems| panic!("{problems}")).service("shop").unwrap();
    let ask = |kind: &str| {
        let request = http::Request::post("/bank.Shop/Follow").header("content-type", kind).body(());
        policy.map(&request.unwrap().into_parts().0)
    };
    assert_eq!(policy.unmapped_methods(), ["/bank.Shop/Look"]);
    let mapped = ask("application/grpc").unwrap();
    assert_eq!(mapped.body(), crate::BodyRule::Grpc { max_bytes: 65_536, streams: true });
    assert!(mapped.objects().is_empty());
    let judged = mapped.clone().with_body(b"\x0a\x0217").unwrap();
    assert_eq!(judged.objects().iter().map(ToString::to_string).collect::<Vec<_>>(), ["Shop::Page::\"17\""]);
    assert!(mapped.with_body(b"\x0a\x0217\x0a\x0242").is_err());
    for kind in ["application/grpc+json", "application/json", "application/grpc-web"] {
        assert!(ask(kind).is_err(), "{kind}");
    }
}

#[test]
fn a_description_is_held_against_the_map() {
    let map = "[[route]]\nmatch = \"GET /v1/pages/{page:int}\"\naction = \"View\"\nobject = 'Page::\"{page}\"'\n\
               [[route]]\nmatch = \"GET /v1/pages/{page:int}/notes\"\naction = \"View\"\nobject = 'Page::\"{page}\"'\n\
               [[route]]\nmatch = \"GET /v1/files/{file}\"\naction = \"View\"\nobject = 'Page::\"{file}\"'\n";
    let description = "openapi: 3.1.0
servers: [{ url: https://shop.example/v1 }]
paths:
  /pages/{id}: { get: {}, delete: {} }
  /pages/first: { get: {} }
  /files/{name}.{ending}: { get: {} }
  /files/index.html: { get: {} }
  /files/: { get: {} }
";
    let (loaded, _dir) =
        load(&[("services/shop/map.toml", Some(map)), ("services/shop/openapi.yaml", Some(description))]);
    let policies = loaded.unwrap_or_else(|problems| panic!("{problems}"));
    let policy = policies.service("shop").unwrap();
    let unmapped = policy.unmapped_operations().iter().map(|it| {
        assert_eq!(it.file, "services/shop/openapi.yaml");
        format!("{} {} {}", it.operation, it.line, it.taken_by.as_deref().unwrap_or("-"))
    });
    assert_eq!(
        unmapped.collect::<Vec<_>>(),
        [
            "DELETE /v1/pages/{id} 4 -",
            "GET /v1/pages/first 5 -",
            "GET /v1/files/index.html 7 GET /v1/files/{file}",
            "GET /v1/files/ 8 -",
        ]
    );
    assert_eq!(policy.undescribed_routes(), ["GET /v1/pages/{page:int}/notes"]);
    // It decides nothing: it is no part of a version, and no sidecar is sent it.
    let (without, _dir) = load(&[("services/shop/map.toml", Some(map))]);
    assert_eq!(policies.version(), without.unwrap().version());
    let named = |name: &str| (format!("services/shop/{name}"), Vec::new());
    let files = ["openapi.yaml", "openapi.yml", "openapi.json", "map.toml"].map(named).into();
    let slice = super::slices(&files).remove("shop").unwrap();
    assert_eq!(slice.into_keys().collect::<Vec<_>>(), ["services/shop/map.toml"]);
}

#[test]
fn what_is_wrong_with_a_description_stops_the_loading() {
    let text = problems(&[("services/shop/openapi.json", Some("{\n  \"openapi\": \"2.0\"\n}"))]);
    assert!(
        text.contains("services/shop/openapi.json:2:14: the version `2.0` of OpenAPI is not known"),
        "{text}"
    );
    let good = Some("openapi: 3.0.0\npaths: {}");
    let text = problems(&[("services/shop/openapi.json", good), ("services/shop/openapi.yml", good)]);
    assert!(text.contains("openapi.yml: the service has another OpenAPI description beside it"), "{text}");
    let none = ("services/shop/map.toml", Some("mapping = \"none\""));
    let text = problems(&[("services/shop/openapi.yaml", good), none]);
    assert!(text.contains("openapi.yaml: the service's map has no routes"), "{text}");
}

#[test]
fn what_is_wrong_with_messages_is_said_where_it_stands() {
    let with = |map: &str, proto: Option<&str>| {
        problems(&[("services/shop/map.toml", Some(map)), ("services/shop/shop.proto", proto)])
    };
    let good = grpc_map("/bank.Shop/Look", "id");
    assert!(with(&good, None).contains("map.toml:5:13: there is no .proto file to read messages by"));
    let told = with(&grpc_map("/bank.Shop/Lok", "id"), Some(PROTO));
    assert!(
        told.contains("map.toml:2:9: the service `bank.Shop` has no method `Lok`; did you mean `Look`?"),
        "{told}"
    );
    let told = with(&grpc_map("/bank.Shop/{name}", "id"), Some(PROTO));
    assert!(told.contains("messages are those of one method"), "{told}");
    let told = with(&grpc_map("/bank.Shop/Look", "uid"), Some(PROTO));
    assert!(told.contains("map.toml:6:10: the message bank.Ask has no field `uid`"), "{told}");
    let told = with(&good, Some("syntax = \"proto3\";\nmesage X {}"));
    assert!(told.starts_with("services/shop/shop.proto:2:1: "), "{told}");
}

const ROWS: &str = r#"
syntax = "proto3";
package bank;
message Row { string table = 1; string key = 2; int64 part = 3; }
message Ask { repeated Row rows = 1; repeated Row others = 2; Row range = 3; string table = 4; }
service Shop { rpc Look(Ask) returns (Ask); }
"#;
const ROWS_SCHEMA: &str = "namespace Shop {\n  entity Row = { table?: String, owner?: String, part?: Long };\n  \
    entity Strict = { owner: String };\n  \
    action Look appliesTo { principal: [Mesh::Workload], resource: [Row, Strict], context: Mesh::Context };\n}\n";
const ROWS_POLICY: &str = "@id(\"own\")\npermit (principal is Mesh::Workload, action == Shop::Action::\"Look\", resource is Shop::Row)\n\
    when { resource has owner && resource.owner == \"a\" };\n\
    @id(\"whole\")\npermit (principal is Mesh::Workload, action == Shop::Action::\"Look\", resource == Shop::Row::\"whole\");\n";

fn rows(route: &str) -> Result<Arc<crate::ServicePolicy>, String> {
    let map = format!(
        "[[route]]\nmatch = \"POST /bank.Shop/Look\"\naction = \"Look\"\nbody_type = \"grpc\"\n{route}\n"
    );
    let (loaded, _dir) = load(&[
        ("services/shop/map.toml", Some(&map)),
        ("services/shop/shop.proto", Some(ROWS)),
        ("services/shop/shop.cedarschema", Some(ROWS_SCHEMA)),
        ("services/shop/shop.cedar", Some(ROWS_POLICY)),
    ]);
    loaded.map(|policies| policies.service("shop").unwrap()).map_err(|problems| problems.to_string())
}

/// A message by its fields, mapped.
fn asked(policy: &crate::ServicePolicy, fields: serde_json::Value) -> Result<crate::Mapped, crate::Refusal> {
    let request = http::Request::post("/bank.Shop/Look").header("content-type", "application/grpc").body(());
    let mapped = policy.map(&request.unwrap().into_parts().0).unwrap();
    mapped.with_body(&policy.message("/bank.Shop/Look", fields).unwrap())
}

fn named(mapped: &crate::Mapped) -> Vec<&str> {
    mapped.objects().iter().map(crate::ObjectRef::id).collect()
}

const EACH: &str = "object = 'Row::\"{body:/rows.table}/{body:/rows.key}\"'\n\
    body = { \"rows.table\" = \"[id]\", \"rows.key\" = \"[key]\", \"rows.part\" = \"[int]\" }\n\
    attributes = { table = \"body:/rows.table\", owner = \"body:/rows.key/0\" }";

#[test]
fn a_list_of_rows_is_an_object_each_and_every_one_must_be_permitted() {
    let policy = rows(EACH).unwrap();
    let row = |table: &str, key: &str| serde_json::json!({ "table": table, "key": key });
    let decide = |rows: Vec<serde_json::Value>| {
        let mapped = asked(&policy, serde_json::json!({ "rows": rows })).unwrap();
        policy.decide(&web(), &mapped, &crate::Attributes::none(), &occasion())
    };
    let mapped =
        asked(&policy, serde_json::json!({ "rows": [row("t", "a/1"), row("u", "b/1"), row("t", "a/1")] }));
    assert_eq!(named(&mapped.unwrap()), ["t/a/1", "u/b/1"]);
    let many: Vec<_> = (0..256).map(|n| row("t", &format!("a/{n}"))).collect();
    assert!(matches!(decide(many.clone()), crate::Verdict::Permit(_)));
    for at in [0, 17, 255] {
        let mut rows = many.clone();
        rows[at] = row("t", "b/1");
        let crate::Verdict::Deny(denial) = decide(rows) else { panic!("{at}") };
        let record = denial.record();
        assert_eq!(record.explanation.as_ref().unwrap().object.as_deref(), Some("Shop::Row::\"t/b/1\""));
        assert_eq!(record.objects[at].attributes["owner"], crate::AttributeValue::Text("b".into()));
        assert_eq!(record.objects[at].told_by["owner"], "body:/rows.key/0");
        let outcomes = record.objects.iter().filter(|object| object.outcome == Some(crate::Outcome::Permit));
        assert_eq!(outcomes.count(), at, "those before it were");
    }
    let too_many = [many, vec![row("t", "a/257")]].concat();
    for (rows, why) in [(too_many, "1 to 256"), (vec![], "1 to 256"), (vec![row("", "a")], "not an id")] {
        let refusal = asked(&policy, serde_json::json!({ "rows": rows })).unwrap_err();
        assert!(refusal.status() == 400 && refusal.to_string().contains(why), "{refusal}");
    }
}

#[test]
fn an_empty_list_is_fine_where_another_object_is_named() {
    let whole = EACH.replace("object = ", "object = ['Row::\"whole\"', ").replace("\"'\nbody", "\"']\nbody");
    let policy = rows(&whole.replace("]\"", "]?\"")).unwrap();
    let mapped = asked(&policy, serde_json::json!({})).unwrap();
    assert_eq!(named(&mapped), ["whole"]);
    let mapped = asked(&policy, serde_json::json!({ "rows": [{ "table": "t", "key": "b" }] })).unwrap();
    assert_eq!(named(&mapped), ["whole", "t/b"]);
    let verdict = policy.decide(&web(), &mapped, &crate::Attributes::none(), &occasion());
    let crate::Verdict::Deny(denial) = verdict else { panic!() };
    assert_eq!(denial.record().objects[1].attributes.len(), 2);
    assert!(denial.record().objects[0].attributes.is_empty(), "the list tells nothing of it");

    // A row that has the other object's name is judged as the row that it is.
    let same = whole.replace("Row::\"whole\"", "Row::\"t/b\"");
    let policy = rows(&same).unwrap();
    let mapped = asked(&policy, serde_json::json!({ "rows": [{ "table": "t", "key": "b" }] })).unwrap();
    assert_eq!(named(&mapped), ["t/b", "t/b"]);
}

#[test]
fn without_a_key_nothing_stands_at_its_place() {
    let route = "object = 'Row::\"{body:/range.table}/{body:/range.key}\"'\n\
        body = { \"range.table\" = \"id\", \"range.key\" = \"key?\" }\n\
        attributes = { table = \"body:/range.table\", owner = \"body:/range.key/0\" }";
    let policy = rows(route).unwrap();
    for (key, id, allowed) in [("a/1", "t/a/1", true), ("b", "t/b", false), ("", "t/", false)] {
        let mapped = asked(&policy, serde_json::json!({ "range": { "table": "t", "key": key } })).unwrap();
        assert_eq!(named(&mapped), [id]);
        let verdict = policy.decide(&web(), &mapped, &crate::Attributes::none(), &occasion());
        assert_eq!(matches!(verdict, crate::Verdict::Permit(_)), allowed, "{id}");
    }
    let policy = rows(&route.replace("key?", "key")).unwrap();
    assert!(asked(&policy, serde_json::json!({ "range": { "table": "t" } })).is_err());
}

#[test]
fn lists_that_name_nothing_or_too_much_are_said_when_the_map_is_read() {
    for (from, to, why) in [
        ("{body:/rows.key}", "{body:/others.key}", "one object is named by one list"),
        (
            "\"'\nbody",
            "\"', 'Row::\"{body:/others.key}\"']\nbody",
            "by one repeated field, not by `others` and `rows`",
        ),
        ("[key]", "key", "bank.Ask.rows is repeated"),
        ("[key]\"", "[key]?\"", "all may be missing, or none"),
        ("]\"", "]?\"", "{body:/rows.table} may be empty, and then nothing names an object"),
        ("table}/{", "key}/{", "does not keep the key {body:/rows.key} and {body:/rows.key} apart"),
        ("table = \"body:/rows.table\"", "table = \"body:/rows.key/1\"", "nor the first part of a key"),
        (
            "table = \"body:/rows.table\"",
            "table = \"body:/rows.table/0\"",
            "is a part of a key, and `rows.table` is none",
        ),
        (
            "table = \"body:/rows.table\"",
            "part = \"body:/rows.table\"",
            "is a Set<String>, the attribute a Long",
        ),
        (
            "table = \"body:/rows.table\"",
            "part = \"body:/rows.part\"",
            "is a list that does not name the object",
        ),
        ("table = \"body:/rows.table\"", "table = \"body:/table\"", "or from the list that names them"),
        ("object = ", "object = ['Row::\"whole\"', ", "required too"),
        (
            "Row::\"{body:/rows.table}/{body:/rows.key}",
            "Row::\"{body:/table}",
            "is a list that does not name the object",
        ),
    ] {
        let mut route = EACH.replace("body = {", "body = { \"others.key\" = \"[key]\", table = \"id\",");
        route = route.replace(from, to);
        if from == "object = " {
            route = route.replace("Row::", "Strict::").replace("table = \"body:/rows.table\", ", "");
        }
        if route.contains("object = [") || route.contains("']\n") {
            route = route.replace("object = '", "object = ['").replace("\"'\nbody", "\"']\nbody");
        }
        let told = rows(&route).err().unwrap_or_else(|| panic!("taken: {route}"));
        assert!(told.contains(why), "{told}, not {why}");
    }
    let nothing =
        rows("object = 'Row::\"{body:/range.key}\"'\nbody = { \"range.key\" = \"key?\" }").unwrap_err();
    assert!(nothing.contains("may be missing, and the id is nothing else"), "{nothing}");
}

/// All files below a directory.
fn in_memory(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let (mut files, mut folders) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
                files.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    files
}

#[test]
fn files_in_memory_are_read_as_on_disk() {
    let domain = TrustDomain::new("bank.example").unwrap();
    let bank = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/bank/policies"));
    let on_disk = Policies::load(bank, &domain).unwrap();
    let mut files = in_memory(bank);
    let read = |files: &BTreeMap<String, Vec<u8>>, commit| {
        Policies::from_files(files, Path::new("3fb2"), commit, &domain)
    };
    let same = read(&files, None).unwrap();
    assert_eq!((same.version(), same.rings()), (on_disk.version(), &Rings::default()));
    assert!(
        same.services().map(|service| service.name()).eq(on_disk.services().map(|service| service.name()))
    );
    let commit = "3fb2a90c11d4e0a7".repeat(2);
    assert_eq!(read(&files, Some(&commit)).unwrap().version().as_str(), "3fb2a90c11d4");

    // What one service needs of it, and no more.
    let slices = slices(&files);
    assert_eq!(slices.len(), on_disk.services().count());
    for (service, slice) in &slices {
        let alone = read(slice, None).unwrap();
        assert_eq!(alone.services().map(|service| service.name()).collect::<Vec<_>>(), [service]);
        let ids = |policies: &Policies| {
            let service = policies.service(service).unwrap();
            service.policies().map(|(id, ..)| id.to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(ids(&alone), ids(&on_disk), "{service}");
    }

    files.insert("rings.toml".into(), b"rings = [\"1%\", \"100%\"]\nhold = \"1m\"\n".to_vec());
    assert_eq!(read(&files, None).unwrap().rings().rings.len(), 2);
    assert_eq!(read(&files, None).unwrap().version(), on_disk.version(), "they decide nothing");
    files.insert("services/web/web.cedar".into(), vec![0xff]);
    files.insert("surprise".into(), Vec::new());
    let told = read(&files, None).unwrap_err().0;
    assert!(told.iter().any(|problem| problem.to_string().contains("3fb2/surprise")), "{told:?}");
    assert!(read(&BTreeMap::new(), None).is_err());
}

#[test]
fn what_a_list_lacks_is_said_where_it_stands() {
    let problem = |list: &str| {
        let map = format!(
            "[[route]]\nmatch = \"GET /orders\"\naction = \"View\"\nobject = 'Page::\"all\"'\n[route.list]\n{list}\n"
        );
        load(&[("services/shop/map.toml", Some(&map))]).0.err().map(|problems| problems.0[0].to_string())
    };
    let good = "items = \"orders\"\naction = \"Read\"\nobject = 'Order::\"{/id}\"'\nattributes = { owner = \"/owner\", tags = \"/tags\" }";
    assert_eq!(problem(good), None);
    assert_eq!(problem(&good.replace("items = \"orders\"\n", "")), None);
    for (change, why) in [
        (good.replace("Read\"", "Raed\""), "has no action `Raed`"),
        (good.replace("Order::", "Page::"), "does not apply to Shop::Page"),
        (good.replace("{/id}", "{id}"), "'Type::\"{/pointer}\"'"),
        (good.replace("{/id}", "x{/id}"), "'Type::\"{/pointer}\"'"),
        (good.replace(", tags = \"/tags\"", ""), "nothing tells the attribute `tags`"),
        (good.replace("\"/owner\"", "\"owner\""), "stands at a pointer"),
        (good.replace("owner = ", "holder = "), "no attribute `holder`"),
        (good.replace("action = \"Read\"\n", ""), "a list has `action` and `object`"),
        (format!("{good}\ncounts = [\"orders\"]"), "named twice"),
        (format!("{good}\ncursors = [\"next\", \"next\"]"), "named twice"),
        (format!("{good}\ncounts = [\"n\"]").replace("items = \"orders\"\n", ""), "has no members"),
        (format!("{good}\ntotal = \"n\""), "total"),
    ] {
        let told = problem(&change).unwrap_or_else(|| panic!("taken: {change}"));
        assert!(told.contains(why), "{change}: {told}");
    }
    for method in ["POST", "HEAD"] {
        let map = format!(
            "[[route]]\nmatch = \"{method} /orders\"\naction = \"View\"\nobject = 'Page::\"all\"'\n[route.list]\n{good}\n"
        );
        let told = load(&[("services/shop/map.toml", Some(&map))]).0.unwrap_err();
        assert!(told.0[0].to_string().contains("is not filtered; only that of a GET is"), "{method}");
    }
    for (body, why) in [
        ("object = ['Page::\"{body:/a}/{body:/b}\"']\nbody = { a = \"[id]\", b = \"[id]\" }", "by one list"),
        ("object = 'Page::\"{body:/a}\"'\nbody = { a = \"[id]?\" }", "not optional"),
        ("object = 'Page::\"{body:/a}\"'\nbody = { a = \"[text]\" }", "not a member type"),
        ("object = 'Page::\"{body:/a}\"'\nbody_type = \"form\"\nbody = { a = \"[id]\" }", "has no lists"),
    ] {
        let map = format!("[[route]]\nmatch = \"POST /orders\"\naction = \"View\"\n{body}\n");
        let told = load(&[("services/shop/map.toml", Some(&map))]).0.unwrap_err().0;
        assert!(told.iter().any(|problem| problem.to_string().contains(why)), "{body}: {told:?}");
    }
}

pub(crate) fn web() -> crate::Caller {
    crate::Caller {
        principal: crate::Principal::Workload(SpiffeId::new("spiffe://bank.example/service/web").unwrap()),
        user: None,
        chain: Arc::from([]),
        address: None,
    }
}

pub(crate) fn occasion() -> crate::Occasion<'static> {
    crate::Occasion {
        receipt: crate::Receipt::generate(&*identity::random::system()).unwrap(),
        now: std::time::Duration::from_secs(1),
        layer: crate::Layer::Sidecar,
        method: "GET",
        target: "/",
        transaction: None,
        trace_id: None,
    }
}

#[test]
fn a_list_keeps_what_would_be_permitted_alone_however_much_of_it_is_denied() {
    let list = "[route.list]\naction = \"Read\"\nobject = 'Order::\"{/id}\"'\nattributes = { owner = \"/owner\", tags = \"/tags\" }";
    let map =
        format!("[[route]]\nmatch = \"GET /orders\"\naction = \"View\"\nobject = 'Page::\"all\"'\n{list}\n");
    let (loaded, _dir) = load(&[("services/shop/map.toml", Some(&map))]);
    let shop = loaded.unwrap().service("shop").unwrap();
    let (parts, ()) = http::Request::get("/orders").body(()).unwrap().into_parts();
    let mapped = shop.map(&parts).unwrap();
    let order = |id: usize| match id % 5 {
        0 => serde_json::json!({ "id": id, "owner": "x", "tags": ["a"] }),
        1 => serde_json::json!({ "id": id, "tags": ["a"] }),
        _ => serde_json::json!({ "id": id, "owner": "y", "tags": ["a"] }),
    };
    let body = serde_json::to_vec(&(0..500).map(order).collect::<Vec<_>>()).unwrap();
    let ids = |policy: &ServicePolicy| {
        let filtered = policy.filter(&web(), &mapped, &body, &occasion()).unwrap();
        let left: Vec<serde_json::Value> = serde_json::from_slice(&filtered.body).unwrap();
        left.iter().map(|order| usize::try_from(order["id"].as_u64().unwrap()).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&shop), (0..500).step_by(5).collect::<Vec<_>>());
    assert_eq!(ids(&shop.with_mode(crate::Mode::Audit)), (0..500).collect::<Vec<_>>());
    assert!(ids(&shop.withhold(crate::Withheld::Expired)).is_empty());
}

#[test]
fn relations_tell_attributes_from_the_policies_own_directory() {
    let map = MAP.replace("\"entities\"", "\"relations\"");
    let relations = "[Order.\"17\"]\nowner = \"x\"\ntags = [\"a\", \"b\"]\ntotal = 5\n";
    let (loaded, _dir) =
        load(&[("services/shop/map.toml", Some(&map)), ("services/shop/relations.toml", Some(relations))]);
    let shop = loaded.unwrap().service("shop").unwrap();
    let asked = |id: &str| {
        let (parts, ()) = http::Request::get(format!("/orders/{id}")).body(()).unwrap().into_parts();
        let mapped = shop.map(&parts).unwrap();
        assert_eq!(mapped.attributes_from(), crate::AttributeSource::Known);
        match shop.decide(&web(), &mapped, &crate::Attributes::none(), &occasion()) {
            crate::Verdict::Permit(permit) => permit.rule().name().to_owned(),
            crate::Verdict::Deny(denial) => denial.rule().name().to_owned(),
        }
    };
    assert_eq!((asked("17").as_str(), asked("18").as_str()), ("read", "attributes.missing"));
    let problem = |relations: Option<&str>| {
        problems(&[("services/shop/map.toml", Some(&map)), ("services/shop/relations.toml", relations)])
    };
    for (bad, why) in [
        (None, "there is no relations.toml"),
        (Some("[Ordre.\"17\"]\nowner = \"x\""), "relations.toml:1:2: the schema has no type `Ordre`"),
        (Some("[Order.\"a b\"]\nowner = \"x\""), "`a b` is no id of an object"),
        (Some("[Order.\"17\"]\nholder = \"x\""), "has no attribute `holder`"),
        (Some("[Order.\"17\"]\nowner = 5"), "the attribute `owner` is a String"),
        (Some("[Order.\"17\"]\ntags = [[\"a\"]]"), "the attribute `tags` is a Set"),
        (Some("[Order.\"17\"]\ntotal = 9007199254740993"), "the attribute `total` is a Long"),
        (Some("Order = 5"), "expected a table of objects"),
        (Some("[Order]\n17 = 5"), "expected a table of attributes"),
        (Some("[Order.\"17\"\n"), "relations.toml:1:"),
    ] {
        let told = problem(bad);
        assert!(told.contains(why), "{bad:?}: {told}");
    }
}

#[test]
fn relations_by_api_are_asked_for_where_the_map_says_so_and_one_source_speaks() {
    let map = format!("relations = \"store\"\n{}", MAP.replace("\"entities\"", "\"relations\""));
    let (loaded, _dir) = load(&[("services/shop/map.toml", Some(&map))]);
    let shop = loaded.unwrap().service("shop").unwrap();
    assert_eq!(shop.relations_max_age(), Some(std::time::Duration::from_secs(5)));
    let (parts, ()) = http::Request::get("/orders/17").body(()).unwrap().into_parts();
    let mapped = shop.map(&parts).unwrap();
    assert!(mapped.asks_relations());
    assert_eq!(mapped.attributes_from(), crate::AttributeSource::Known);
    let rule = |told: &crate::Attributes| match shop.decide(&web(), &mapped, told, &occasion()) {
        crate::Verdict::Permit(permit) => permit.rule().name().to_owned(),
        crate::Verdict::Deny(denial) => denial.rule().name().to_owned(),
    };
    let order = |text: &str| vec![("Order".to_owned(), "17".to_owned(), Some(text.to_owned()))];
    let mut copy = crate::RelationsCopy::default();
    assert_eq!(rule(&crate::Attributes::none()), "attributes.missing", "nobody asked");
    assert_eq!(rule(&copy.tell(&mapped)), "attributes.missing", "nothing has come");
    for (text, decided) in [
        ("{\"owner\":\"x\",\"tags\":[]}", "read"),
        ("{\"owner\":\"y\",\"tags\":[\"a\"]}", "none"),
        ("{\"owner\":\"x\"}", "attributes.missing"),
        ("{\"owner\":5,\"tags\":[]}", "attributes.missing"),
    ] {
        copy.take("e1", 7, None, order(text)).unwrap();
        assert_eq!(rule(&copy.tell(&mapped)), decided, "{text}");
    }
    assert_eq!(rule(&crate::Attributes::unusable_relations("relations.stale", "old")), "relations.stale");
    // Of an object that is not there nothing is decided, also where nothing of it would have to be known.
    let schema = SCHEMA.replace("owner: String, total?: Long, tags: Set<String>", "owner?: String");
    let policy = "@id(\"open\")\npermit (principal is Mesh::Workload, action == Shop::Action::\"Read\", resource)\nunless { resource has owner };\n";
    let optional = map.replace(", tags = \"relations\"", "");
    let (loaded, _dir) = load(&[
        ("services/shop/shop.cedarschema", Some(&schema)),
        ("services/shop/map.toml", Some(&optional)),
        ("services/shop/shop.cedar", Some(policy)),
    ]);
    let shop = loaded.unwrap().service("shop").unwrap();
    let (parts, ()) = http::Request::get("/orders/17").body(()).unwrap().into_parts();
    let mapped = shop.map(&parts).unwrap();
    let rule = |told: &crate::Attributes| match shop.decide(&web(), &mapped, told, &occasion()) {
        crate::Verdict::Permit(permit) => permit.rule().name().to_owned(),
        crate::Verdict::Deny(denial) => denial.rule().name().to_owned(),
    };
    copy.take("e1", 8, None, order("{}")).unwrap();
    assert_eq!(rule(&copy.tell(&mapped)), "open");
    copy.take("e1", 9, None, Vec::new()).unwrap();
    assert_eq!(rule(&copy.tell(&mapped)), "attributes.missing");
    assert_eq!(rule(&crate::Attributes::none()), "attributes.missing");

    let problem = |map: &str, file: Option<&str>| {
        problems(&[("services/shop/map.toml", Some(map)), ("services/shop/relations.toml", file)])
    };
    let aged = |age: &str| format!("relations_max_age = {age}\n{map}");
    for (map, file, why) in [
        (map.clone(), Some("[Order.\"17\"]\nowner = \"x\""), "map.toml:1:13: there is a relations.toml"),
        (map.replace("\"store\"", "\"both\""), None, "`relations` is \"file\" (relations.toml) or \"store\""),
        (map.replace("\"store\"", "\"file\""), None, "there is no relations.toml"),
        (aged("\"1s\""), None, "`relations_max_age` is a time from 2s to 1h"),
        (aged("5"), None, "`relations_max_age` is a time from 2s to 1h"),
        (format!("relations_max_age = \"5s\"\n{MAP}"), None, "without `relations = \"store\"`"),
    ] {
        let told = problem(&map, file);
        assert!(told.contains(why), "{map}: {told}");
    }
    let (loaded, _dir) = load(&[("services/shop/map.toml", Some(&aged("\"1m\"")))]);
    assert_eq!(
        loaded.unwrap().service("shop").unwrap().relations_max_age(),
        Some(std::time::Duration::from_secs(60))
    );
}
