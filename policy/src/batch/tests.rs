use std::collections::BTreeSet;
use std::sync::Arc;

use identity::txn::User;
use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;
use crate::load::tests::{load, occasion, web};
use crate::{AttributeValue, RelationsCopy, render};

const SCHEMA: &str = "namespace Shop {\n  entity Order = { owner?: String };\n  \
    action Read appliesTo { principal: [Mesh::Workload], resource: [Order], context: Mesh::Context };\n}\n";
const POLICY: &str = "@id(\"own\")\npermit (principal is Mesh::Workload, action, resource is Shop::Order)\n\
    when { resource has owner && context has user && resource.owner == context.user.id };\n\
    @id(\"sealed\")\nforbid (principal, action, resource == Shop::Order::\"66\");\n";
const PROTO: &str = "syntax = \"proto3\";\npackage shop;\n\
    message Row { string key = 1; string note = 2; }\nmessage Inner { repeated Row rows = 1; }\n\
    message Ask { string table = 1; repeated Row rows = 2; bytes rest = 3; repeated int32 numbers = 4; Inner inner = 5; }\n\
    service Rows { rpc Get(Ask) returns (Ask); rpc Stream(stream Ask) returns (Ask); }\n";
const JSON: &str = "match = \"POST /orders/get\"\naction = \"Read\"\nobject = 'Order::\"{body:/orders}\"'\n\
    body = { orders = \"[id]\", note = \"text?\", limit = \"int?\" }\nattributes = { owner = \"entities\" }\n";
const GRPC: &str = "match = \"POST /shop.Rows/Get\"\naction = \"Read\"\nobject = 'Order::\"{body:/rows.key}\"'\n\
    body_type = \"grpc\"\nbody = { \"rows.key\" = \"[key]\", table = \"id\" }\nattributes = { owner = \"body:/rows.key/0\" }\n";
const BATCH: &str = "batch = \"filter\"";

fn shop(route: &str, top: &str) -> Result<Arc<ServicePolicy>, String> {
    let map = format!("{top}\n[[route]]\n{route}\n{BATCH}\n");
    let (loaded, _dir) = load(&[
        ("services/shop/map.toml", Some(&map)),
        ("services/shop/shop.proto", Some(PROTO)),
        ("services/shop/shop.cedarschema", Some(SCHEMA)),
        ("services/shop/shop.cedar", Some(POLICY)),
    ]);
    loaded.map(|policies| policies.service("shop").unwrap()).map_err(|problems| problems.to_string())
}

fn for_alice() -> Caller {
    let user = User {
        id: "alice".into(),
        issuer: "https://id.example".into(),
        client: "web".into(),
        scopes: vec![],
        groups: vec![],
        auth_time: 0,
        tenant: None,
        mfa: false,
    };
    Caller { user: Some(Arc::new(user)), ..web() }
}

fn mapped(policy: &ServicePolicy, path: &str, body: &[u8]) -> Mapped {
    let kind = if path.starts_with("/shop.") { "application/grpc" } else { "application/json" };
    let request = http::Request::post(path).header("content-type", kind).body(()).unwrap();
    policy.map(&request.into_parts().0).unwrap().with_body(body).unwrap()
}

/// What the app tells of orders: those below a hundred are alice's, those below two hundred bob's, and of others nothing.
fn told(mapped: &Mapped) -> Attributes {
    let mut attributes = Attributes::none();
    for object in mapped.objects() {
        let owner = match object.id().parse::<u32>().unwrap() {
            0..100 => "alice",
            100..200 => "bob",
            _ => continue,
        };
        attributes.insert(object.clone(), "owner", AttributeValue::Text(owner.into()));
    }
    attributes
}

fn asked(
    policy: &ServicePolicy,
    mapped: &Mapped,
    attributes: &Attributes,
    body: &[u8],
) -> Result<Option<Kept>, Denial> {
    let (caller, occasion) = (for_alice(), occasion());
    match policy.decide(&caller, mapped, attributes, &occasion) {
        Verdict::Permit(_) => Ok(None),
        Verdict::Deny(denial) => policy.keep(denial, body, &caller, mapped, attributes, &occasion).map(Some),
    }
}

fn ask_json(policy: &ServicePolicy, orders: &[u32]) -> Result<Option<Kept>, Denial> {
    let ids: Vec<String> = orders.iter().map(ToString::to_string).collect();
    let body = json!({ "orders": ids, "note": "é\u{1}\"", "limit": 50 }).to_string().into_bytes();
    let mapped = mapped(policy, "/orders/get", &body);
    asked(policy, &mapped, &told(&mapped), &body)
}

fn left(kept: &Kept) -> Json {
    serde_json::from_slice(&kept.body).unwrap()
}

#[test]
fn policy_33_of_a_filtered_batch_what_is_denied_is_taken_out_and_said() {
    let policy = shop(JSON, "").unwrap();
    assert!(ask_json(&policy, &[17, 18]).unwrap().is_none(), "nothing is asked of what is permitted");
    // One foreign among fifty, at any place, and named twice.
    let own: Vec<u32> = (0..49).collect();
    for at in [0, 25, 49] {
        let mut ids = own.clone();
        ids.splice(at..at, [142]);
        ids.push(142);
        let kept = ask_json(&policy, &ids).unwrap().unwrap();
        let expected: Vec<String> = own.iter().map(ToString::to_string).collect();
        assert_eq!(left(&kept), json!({ "orders": expected, "note": "é\u{1}\"", "limit": 50 }));
        assert_eq!(kept.mapped.objects().len(), 49);
        assert_eq!(kept.permit.left_out(), Some("permitted, but for 1 of 50 objects"));
        assert!(!kept.permit.is_audited());
    }
    // Forbidden, not permitted, unknown: each by its rule.
    let kept = ask_json(&policy, &[17, 66, 142, 999, 17]).unwrap().unwrap();
    assert_eq!(left(&kept)["orders"], json!(["17", "17"]));
    let record = kept.permit.record(&for_alice(), &kept.mapped, &Attributes::none(), &occasion());
    let rules: Vec<_> =
        record.objects.iter().map(|object| object.left_out_by.as_ref().map(Rule::name)).collect();
    assert_eq!(rules, [None, Some("sealed"), Some("none"), Some("none")]);
    let outcomes: Vec<_> = record.objects.iter().map(|object| object.outcome.unwrap()).collect();
    assert_eq!(outcomes, [Outcome::Permit, Outcome::Deny, Outcome::Deny, Outcome::Deny]);
    assert_eq!((record.verdict, record.rule.name()), (Outcome::Permit, "own"));
    let shown = render(&record);
    assert!(
        shown.contains("Shop::Order::\"66\"")
            && shown.contains("(left out: policy sealed (services/shop/shop.cedar:"),
        "{shown}"
    );
    assert!(shown.contains("reason         permitted, but for 3 of 4 objects"), "{shown}");
    // Made again, it is what was passed on.
    assert_eq!(policy.replay(&record).unwrap().outcome, Outcome::Permit);
    // None left: the denial, with its rule.
    let denial = ask_json(&policy, &[66, 142]).unwrap_err();
    assert_eq!((denial.status(), denial.rule().name()), (403, "sealed"));
    let denial = ask_json(&policy, &[142]).unwrap_err();
    assert_eq!((denial.status(), denial.rule().name()), (403, "none"));
}

#[test]
fn policy_33_a_batch_is_filtered_where_the_map_says_so_and_nowhere_else() {
    let (loaded, _dir) = load(&[
        ("services/shop/map.toml", Some(&format!("[[route]]\n{JSON}batch = \"all\"\n"))),
        ("services/shop/shop.cedarschema", Some(SCHEMA)),
        ("services/shop/shop.cedar", Some(POLICY)),
    ]);
    let all = loaded.unwrap().service("shop").unwrap();
    assert_eq!(ask_json(&all, &[17, 142]).unwrap_err().rule().name(), "none");
    // Audit mode takes nothing out.
    let audit = shop(JSON, "mode = \"audit\"").unwrap();
    let denial = ask_json(&audit, &[17, 142]).unwrap_err();
    assert!(denial.audited().unwrap().is_audited());
    // Nor is a caller of elsewhere, or a policy that is none, about objects.
    let policy = shop(JSON, "").unwrap();
    let body = br#"{"orders":["17","142"]}"#;
    let mapped = mapped(&policy, "/orders/get", body);
    let stranger = Caller {
        principal: crate::Principal::Workload(identity::SpiffeId::new("spiffe://other.example/a").unwrap()),
        ..for_alice()
    };
    let (attributes, occasion) = (told(&mapped), occasion());
    let Verdict::Deny(denial) = policy.decide(&stranger, &mapped, &attributes, &occasion) else { panic!() };
    let denial = policy.keep(denial, body, &stranger, &mapped, &attributes, &occasion).unwrap_err();
    assert_eq!(denial.rule().name(), "principal.trust_domain");
}

#[test]
fn what_the_relations_do_not_have_is_left_out_and_what_is_too_old_is_not() {
    let policy = shop(&JSON.replace("entities", "relations"), "relations = \"store\"").unwrap();
    let mut copy = RelationsCopy::default();
    let alice = |id: &str| ("Order".to_owned(), id.to_owned(), Some("{\"owner\":\"alice\"}".to_owned()));
    copy.take("e", 7, None, [alice("17"), alice("18"), ("Order".into(), "5".into(), Some("{}".into()))])
        .unwrap();
    let body = br#"{"orders":["17","5","999","18"]}"#;
    let mapped = mapped(&policy, "/orders/get", body);
    let kept = asked(&policy, &mapped, &copy.tell(&mapped), body).unwrap().unwrap();
    assert_eq!(left(&kept)["orders"], json!(["17", "18"]));
    let record = kept.permit.record(&for_alice(), &mapped, &Attributes::none(), &occasion());
    let rules: Vec<_> =
        record.objects.iter().map(|object| object.left_out_by.as_ref().map(Rule::name)).collect();
    assert_eq!(rules, [None, Some("none"), Some(MISSING), None]);
    assert!(record.objects[0].told_by["owner"].contains("revision 7"));
    for unusable in [Attributes::unusable_relations("relations.stale", "old"), Attributes::none()] {
        assert!(asked(&policy, &mapped, &unusable, body).is_err());
    }
}

#[test]
fn of_messages_only_the_elements_go() {
    let policy = shop(GRPC, "").unwrap();
    let row = |key: &str| json!({ "key": key, "note": "n" });
    let fields = |rows: Vec<Json>| json!({ "table": "t", "rest": "AAEC", "numbers": [1, 2], "rows": rows });
    let body = |keys: &[&str]| {
        policy.message("/shop.Rows/Get", fields(keys.iter().map(|key| row(key)).collect())).unwrap()
    };
    let all = body(&["bob/1", "alice/1", "carol/2", "alice/2"]);
    let mapped = mapped(&policy, "/shop.Rows/Get", &all);
    let kept = asked(&policy, &mapped, &Attributes::none(), &all).unwrap().unwrap();
    assert_eq!(kept.body, body(&["alice/1", "alice/2"]));
    assert!(shop(&GRPC.replace("rows.key/0", "rows.key"), "").is_ok());
}

#[test]
fn a_filter_that_cannot_be_faithful_is_refused_when_the_map_is_read() {
    let said = |route: &str| shop(route, "").map(drop).unwrap_err();
    for (from, to, why) in [
        ("POST /orders", "PUT /orders", "a PUT changes something"),
        ("POST /orders", "DELETE /orders", "a DELETE changes something"),
        ("[id]", "id", "`batch` where no list names the objects"),
        ("note = \"text?\"", "note = \"[id]\"", "what goes together in `note` and `orders` is not known"),
        (
            "object = 'Order::\"{body:/orders}\"'",
            "object = ['Order::\"{body:/orders}\"', 'Order::\"all\"']",
            "the route has objects that its list does not name",
        ),
    ] {
        let route = JSON.replace(from, to);
        assert!(route != JSON && said(&route).contains(why), "{}", said(&route));
    }
    for (from, to, why) in [
        ("rows.key", "inner.rows.key", "the list is not one of the message itself"),
        ("Rows/Get", "Rows/Stream", "of a stream of messages nothing is left out"),
        ("table = \"id\"", "numbers = \"[int]\"", "what goes together in `numbers` and `rows`"),
    ] {
        let route = GRPC.replace(from, to);
        assert!(route != GRPC && said(&route).contains(why), "{}", said(&route));
    }
    let (loaded, dir) = load(&[
        ("services/shop/map.toml", Some(&format!("[[route]]\n{JSON}batch = \"some\"\n"))),
        ("services/shop/shop.cedarschema", Some(SCHEMA)),
        ("services/shop/shop.cedar", Some(POLICY)),
    ]);
    let told = loaded.map(drop).unwrap_err().to_string().replace(&format!("{}/", dir.path().display()), "");
    assert!(told.starts_with("services/shop/map.toml:7:9: `batch` is \"all\" or \"filter\""), "{told}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What is forwarded is what is alice's, in order, however often it is named; and nothing else changes.
    #[test]
    fn policy_33_what_is_left_of_json_is_exactly_what_is_permitted(orders in proptest::collection::vec(0u32..300, 1..30)) {
        let policy = shop(JSON, "").unwrap();
        let allowed: Vec<String> =
            orders.iter().filter(|id| **id < 100 && **id != 66).map(ToString::to_string).collect();
        match ask_json(&policy, &orders) {
            Ok(None) => prop_assert_eq!(allowed.len(), orders.len()),
            Ok(Some(kept)) => {
                prop_assert!(!allowed.is_empty() && allowed.len() < orders.len());
                let objects: BTreeSet<String> = kept.mapped.objects().iter().map(|o| o.id().to_owned()).collect();
                prop_assert_eq!(objects, allowed.iter().cloned().collect());
                prop_assert_eq!(left(&kept), json!({ "orders": allowed, "note": "é\u{1}\"", "limit": 50 }));
            }
            Err(_) => prop_assert!(allowed.is_empty()),
        }
    }
}
