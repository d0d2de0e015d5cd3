//! The bank's real policies: who may do what, with the rule that decides, and what a denial looks like.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, which clippy.toml allows only inside #[test]"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use identity::txn::User;
use identity::{SpiffeId, TrustDomain};
use policy::{
    AttributeSource, Attributes, BodyRule, Caller, DecisionRecord, Denial, Layer, Mapped, MemoryRecorder,
    Mode, ObjectRef, Occasion, Outcome, Policies, Principal, Receipt, Recorder, Refusal, Rule, ServicePolicy,
    Style, Verdict, refuse_connection, render, render_with,
};
use proptest::{prop_assert, prop_assert_eq, proptest};

fn trust_domain() -> TrustDomain {
    TrustDomain::new("bank.example").unwrap()
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bank/policies")
}

fn bank() -> Arc<Policies> {
    Policies::load(&directory(), &trust_domain()).unwrap_or_else(|problems| panic!("{problems}"))
}

fn service(name: &str) -> Arc<ServicePolicy> {
    bank().service(name).unwrap()
}

fn user(id: &str) -> Arc<User> {
    Arc::new(User {
        id: id.into(),
        issuer: "https://idp.bank.example".into(),
        client: "bank-web".into(),
        scopes: vec!["openid".into(), "bank".into()],
        groups: vec![],
        auth_time: 1_795_000_000,
        tenant: None,
        mfa: false,
    })
}

/// `web`, `palisade/gateway`, or `other.example/web` for another trust domain.
fn workload(name: &str) -> SpiffeId {
    let full = match name {
        "gateway" => "spiffe://bank.example/palisade/gateway".to_owned(),
        "evil web" => "spiffe://evil.example/service/web".to_owned(),
        "webx" | "web" | "accounts" | "payments" | "w.b" => format!("spiffe://bank.example/service/{name}"),
        other => panic!("{other}"),
    };
    SpiffeId::new(&full).unwrap()
}

fn caller(name: &str, person: Option<&str>) -> Caller {
    let principal = match name.strip_prefix("client ") {
        Some(client) => Principal::Client(client.into()),
        None => Principal::Workload(workload(name)),
    };
    let chain: Vec<SpiffeId> = match (&principal, person) {
        (Principal::Workload(id), Some(_)) if name != "gateway" => vec![workload("gateway"), id.clone()],
        (Principal::Workload(id), Some(_)) => vec![id.clone()],
        _ => vec![],
    };
    Caller {
        principal,
        user: person.map(user),
        chain: chain.into(),
        address: Some("127.0.0.1:40100".parse().unwrap()),
    }
}

fn occasion<'a>(method: &'a str, target: &'a str) -> Occasion<'a> {
    Occasion {
        receipt: "r-7k2m0q9xw4e8t5hz".parse().unwrap(),
        now: Duration::from_millis(1_795_305_600_250),
        layer: Layer::Sidecar,
        method,
        target,
        transaction: Some("t-1".into()),
        trace_id: Some(0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736),
    }
}

fn parts(request: http::request::Builder) -> http::request::Parts {
    request.body(()).unwrap().into_parts().0
}

fn get(target: &str) -> http::request::Parts {
    parts(http::Request::get(target))
}

fn post(target: &str, media: &str) -> http::request::Parts {
    parts(http::Request::post(target).header("content-type", media))
}

/// Owners as the accounts app knows them.
fn owner_of(account: &str) -> Option<&'static str> {
    match account {
        "17" | "18" => Some("alice"),
        "42" | "43" => Some("bob"),
        _ => None,
    }
}

/// What a sidecar does with a request, with an app that answers as the bank does.
fn serve(policy: &ServicePolicy, caller: &Caller, request: &http::request::Parts, body: &[u8]) -> Verdict {
    let target = request.uri.to_string();
    let occasion = occasion(request.method.as_str(), &target);
    let refuse = |refusal: Refusal| Verdict::Deny(policy.refuse(Some(caller), refusal, &occasion));
    let mapped = match policy.map(request) {
        Ok(mapped) => mapped,
        Err(refusal) => return refuse(refusal),
    };
    if let Err(denial) = policy.screen(caller, &mapped, &occasion) {
        return Verdict::Deny(denial);
    }
    let mapped = match mapped.with_body(body) {
        Ok(mapped) => mapped,
        Err(refusal) => return refuse(refusal),
    };
    match learn(&mapped) {
        Ok(attributes) => policy.decide(caller, &mapped, &attributes, &occasion),
        Err(refusal) => refuse(refusal),
    }
}

fn learn(mapped: &Mapped) -> Result<Attributes, Refusal> {
    match mapped.attributes_from() {
        AttributeSource::Known => Ok(Attributes::none()),
        AttributeSource::Entities => {
            let asked: serde_json::Value = serde_json::from_slice(&mapped.entities_request()).unwrap();
            let told: Vec<serde_json::Value> = asked["objects"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(|object| {
                    let id = object["id"].as_str().unwrap();
                    assert_eq!(object["type"], "Account");
                    owner_of(id).map(|owner| {
                        serde_json::json!({"type": "Account", "id": id, "attributes": {"owner": owner}})
                    })
                })
                .collect();
            mapped.attributes_from_entities(serde_json::json!({ "objects": told }).to_string().as_bytes())
        }
        AttributeSource::Response => {
            let id = mapped.objects()[0].id();
            let owner = if id == "own" { Some("alice") } else { owner_of(id) };
            let body = match owner {
                Some(owner) => format!(r#"{{"id":"{id}","owner":"{owner}","balance_cents":5}}"#),
                None => r#"{"error":"not_found"}"#.to_owned(),
            };
            mapped.attributes_from_response(body.as_bytes())
        }
    }
}

fn outcome(verdict: &Verdict) -> (Outcome, String) {
    let (outcome, rule) = match verdict {
        Verdict::Permit(permit) => (Outcome::Permit, permit.rule()),
        Verdict::Deny(denial) => (Outcome::Deny, denial.rule()),
    };
    (outcome, rule.name().to_owned())
}

fn denied(verdict: Verdict) -> Denial {
    match verdict {
        Verdict::Deny(denial) => denial,
        Verdict::Permit(permit) => panic!("permitted by {}", permit.rule()),
    }
}

const JSON: &str = "application/json";
const FORM: &str = "application/x-www-form-urlencoded";

/// Service, caller, person, request, media type, body, and the decision with its rule.
type Case = (
    &'static str,
    &'static str,
    Option<&'static str>,
    &'static str,
    &'static str,
    &'static str,
    Outcome,
    &'static str,
);

#[test]
fn the_map_of_accounts_has_what_its_description_has() {
    let accounts = service("accounts");
    assert_eq!(accounts.unmapped_operations(), []);
    assert!(accounts.undescribed_routes().is_empty(), "{:?}", accounts.undescribed_routes());
}

#[test]
fn who_may_do_what_and_which_rule_says_so() {
    use Outcome::{Deny, Permit};
    let transfer = r#"{"id":"t1","from":"17","to":"42","amount_cents":500,"memo":"rent"}"#;
    let order = r#"{"from":"17","to":"42","amount_cents":500}"#;
    #[rustfmt::skip]
    let table: &[Case] = &[
        ("accounts", "web", Some("alice"), "GET /accounts/17", "", "", Permit, "web-reads-own-accounts"),
        ("accounts", "web", Some("alice"), "GET /accounts/42", "", "", Deny, "none"),
        ("accounts", "web", Some("bob"), "GET /accounts/42", "", "", Permit, "web-reads-own-accounts"),
        ("accounts", "web", None, "GET /accounts/17", "", "", Deny, "none"),
        ("accounts", "web", Some("alice"), "GET /accounts/99", "", "", Deny, "attributes.missing"),
        ("accounts", "web", Some("alice"), "GET /accounts/17/history", "", "", Permit, "web-reads-own-accounts"),
        ("accounts", "web", Some("alice"), "GET /accounts/42/history", "", "", Deny, "none"),
        ("accounts", "web", Some("alice"), "GET /owners/alice/accounts", "", "", Permit, "web-lists-own-accounts"),
        ("accounts", "web", Some("alice"), "GET /owners/bob/accounts", "", "", Deny, "none"),
        ("accounts", "web", Some("alice"), "GET /owners/ALICE/accounts", "", "", Deny, "none"),
        ("accounts", "payments", Some("alice"), "GET /accounts/17", "", "", Permit, "payments-reads-own-accounts"),
        ("accounts", "payments", Some("alice"), "GET /accounts/42", "", "", Deny, "none"),
        ("accounts", "payments", Some("alice"), "GET /owners/alice/accounts", "", "", Deny, "none"),
        ("accounts", "gateway", Some("alice"), "GET /accounts/17", "", "", Deny, "none"),
        ("accounts", "payments", Some("alice"), "POST /transfers", JSON, transfer, Permit, "payments-transfers-from-own-accounts"),
        ("accounts", "payments", Some("bob"), "POST /transfers", JSON, transfer, Deny, "none"),
        ("accounts", "payments", None, "POST /transfers", JSON, transfer, Deny, "none"),
        ("accounts", "web", Some("alice"), "POST /transfers", JSON, transfer, Deny, "none"),
        ("accounts", "web", Some("alice"), "GET /healthz", "", "", Deny, "route.unmapped"),
        ("accounts", "web", Some("alice"), "POST /.well-known/palisade/entities", JSON, "{}", Deny, "route.unmapped"),
        ("payments", "web", Some("alice"), "POST /transfers", JSON, order, Permit, "web-transfers-from-own-accounts"),
        ("payments", "web", Some("bob"), "POST /transfers", JSON, order, Deny, "none"),
        ("payments", "accounts", None, "POST /transfers", JSON, order, Deny, "none"),
        ("payments", "accounts", None, "GET /journal/totals", "", "", Permit, "accounts-reads-journal-totals"),
        ("payments", "accounts", Some("alice"), "GET /journal/totals", "", "", Deny, "none"),
        ("payments", "web", None, "GET /journal/totals", "", "", Deny, "none"),
        ("payments", "web", Some("alice"), "GET /journal/totals", "", "", Deny, "none"),
        ("web", "gateway", Some("alice"), "GET /", "", "", Permit, "gateway-opens-pages-for-people"),
        ("web", "gateway", None, "GET /", "", "", Deny, "none"),
        ("web", "accounts", Some("alice"), "GET /", "", "", Deny, "none"),
        ("web", "gateway", Some("alice"), "GET /assets/style.css", "", "", Permit, "gateway-opens-pages-for-people"),
        ("web", "gateway", Some("alice"), "GET /assets/..", "", "", Deny, "request.path"),
        ("web", "gateway", Some("alice"), "GET /accounts/42", "", "", Permit, "gateway-opens-pages-for-people"),
        ("web", "gateway", Some("alice"), "GET /api/accounts/17", "", "", Permit, "gateway-reads-own-accounts"),
        ("web", "gateway", Some("alice"), "GET /api/accounts/42", "", "", Deny, "none"),
        ("web", "gateway", Some("alice"), "GET /api/accounts", "", "", Permit, "gateway-lists-own-accounts"),
        ("web", "gateway", Some("bob"), "GET /api/accounts", "", "", Deny, "none"),
        ("web", "gateway", Some("alice"), "POST /transfers", FORM, "from=17&key=0f&to=42&amount=5.00&memo=so+long", Permit, "gateway-opens-pages-for-people"),
        ("web", "gateway", Some("alice"), "POST /transfers", FORM, "from=17&to=42&amount=5.00&from=42", Deny, "request.body"),
        ("web", "gateway", Some("alice"), "POST /api/transfers", JSON, order, Permit, "gateway-opens-pages-for-people"),
    ];
    for (name, who, person, request, media, body, decision, rule) in table {
        let (method, target) = request.split_once(' ').unwrap();
        let mut builder = http::Request::builder().method(method).uri(target);
        if !media.is_empty() {
            builder = builder.header("content-type", *media);
        }
        let verdict = serve(&service(name), &caller(who, *person), &parts(builder), body.as_bytes());
        assert_eq!(
            outcome(&verdict),
            (*decision, (*rule).to_owned()),
            "{who} for {person:?}: {name} {request}"
        );
    }
}

#[test]
fn policy_31_look_alike_callers_are_other_callers() {
    let (accounts, request) = (service("accounts"), get("/accounts/17"));
    let ask = |who: &str| outcome(&serve(&accounts, &caller(who, Some("alice")), &request, b""));
    assert_eq!(ask("web"), (Outcome::Permit, "web-reads-own-accounts".into()));
    assert_eq!(ask("webx"), (Outcome::Deny, "none".into()), "a prefix is no match");
    assert_eq!(ask("w.b"), (Outcome::Deny, "none".into()), "a dot is no wildcard");
    assert_eq!(
        ask("evil web"),
        (Outcome::Deny, "principal.trust_domain".into()),
        "same path, other trust domain"
    );
}

#[test]
fn objects_named_without_a_map_are_decided_alike() {
    let ask = |name: &str, who: Caller, action: &str, kind: &str, id: &str| {
        let object = ObjectRef::new(kind, id);
        outcome(&service(name).decide_object(
            &who,
            action,
            &object,
            &Attributes::none(),
            &occasion("read", id),
        ))
    };
    let permit = |rule: &str| (Outcome::Permit, rule.to_owned());
    let deny = |rule: &str| (Outcome::Deny, rule.to_owned());
    let secret = |who: &str, id: &str| ask("vault", caller(who, None), "ReadSecret", "Vault::Secret", id);
    assert_eq!(secret("accounts", "accounts/db-key"), permit("accounts-reads-its-database-key"));
    assert_eq!(secret("web", "accounts/db-key"), deny("none"));
    assert_eq!(secret("accounts", "web/session-key"), deny("none"));
    assert_eq!(secret("accounts", "accounts/../accounts/db-key"), deny("none"));
    assert_eq!(secret("accounts", "accounts/db-key/"), deny("none"));
    for action in ["WriteSecret", "DeleteSecret", "ListSecrets"] {
        let asked = ask("vault", caller("accounts", None), action, "Vault::Secret", "accounts/db-key");
        assert_eq!(asked, deny("none"), "{action}");
    }
    assert_eq!(
        ask("vault", caller("accounts", None), "Delete", "Vault::Secret", "accounts/db-key"),
        deny("request.unknown")
    );
    assert_eq!(
        ask("vault", caller("accounts", None), "ReadSecret", "Secret", "accounts/db-key"),
        deny("request.unknown")
    );

    let route = |who: Caller, id: &str| ask("gateway", who, "UseRoute", "Gateway::Route", id);
    assert_eq!(
        route(caller("client bank-web", Some("alice")), "web"),
        permit("people-with-scope-bank-use-web")
    );
    assert_eq!(route(caller("client bank-web", None), "web"), deny("none"));
    assert_eq!(route(caller("client bank-web", Some("alice")), "accounts"), deny("none"));
    assert_eq!(
        route(caller("web", Some("alice")), "web"),
        deny("request.invalid"),
        "a workload is no client"
    );
    let mut unscoped = caller("client bank-web", Some("alice"));
    unscoped.user = Some(Arc::new(User { scopes: vec!["openid".into()], ..(*user("alice")).clone() }));
    assert_eq!(route(unscoped, "web"), deny("none"));
}

#[test]
fn policy_37_a_missing_attribute_denies_and_a_forbid_wins() {
    let policy = service("accounts");
    let object = ObjectRef::new("Accounts::Account", "17");
    let ask = |who: &str, action: &str, attributes: &Attributes| {
        outcome(&policy.decide_object(
            &caller(who, Some("alice")),
            action,
            &object,
            attributes,
            &occasion("x", "y"),
        ))
    };
    assert_eq!(ask("web", "ReadAccount", &Attributes::none()), (Outcome::Deny, "attributes.missing".into()));
    let mut owned = Attributes::none();
    owned.insert(object.clone(), "owner", policy::AttributeValue::Text("alice".into()));
    assert_eq!(ask("web", "ReadAccount", &owned), (Outcome::Permit, "web-reads-own-accounts".into()));
    assert_eq!(ask("web", "Transfer", &owned), (Outcome::Deny, "only-payments-moves-money".into()));
    let mut mistyped = Attributes::none();
    mistyped.insert(object.clone(), "owner", policy::AttributeValue::Long(7));
    assert_eq!(ask("web", "ReadAccount", &mistyped), (Outcome::Deny, "attributes.missing".into()));
}

#[test]
fn policy_19_a_body_that_was_not_read_is_never_decided_on() {
    let policy = service("payments");
    let mapped = policy.map(&post("/transfers", JSON)).unwrap();
    assert_eq!(mapped.body(), BodyRule::Json { max_bytes: 65536 });
    assert!(mapped.objects().is_empty());
    let who = caller("web", Some("alice"));
    let verdict = policy.decide(&who, &mapped, &Attributes::none(), &occasion("POST", "/transfers"));
    assert_eq!(outcome(&verdict), (Outcome::Deny, "request.no_object".into()));
    let long = format!(r#"{{"from":"17","to":"42","amount_cents":1,"memo":"{}"}}"#, "a".repeat(65536));
    let refusal = mapped.with_body(long.as_bytes()).unwrap_err();
    assert_eq!((refusal.rule(), refusal.status()), ("request.body_length", 400));
}

#[test]
fn policy_35_a_request_is_judged_by_the_policy_that_mapped_it() {
    let copy = tempfile::tempdir().unwrap();
    copy_directory(&directory(), copy.path());
    let policies = copy.path().join("services/accounts/accounts.cedar");
    let text = std::fs::read_to_string(&policies).unwrap();
    std::fs::write(&policies, format!("{text}\n// another version\n")).unwrap();
    let (old, new) = (service("accounts"), Policies::load(copy.path(), &trust_domain()).unwrap());
    let new = new.service("accounts").unwrap();
    let mapped = old.map(&get("/owners/alice/accounts")).unwrap();
    let (who, occasion) = (caller("web", Some("alice")), occasion("GET", "/owners/alice/accounts"));
    let decided =
        |policy: &ServicePolicy| outcome(&policy.decide(&who, &mapped, &Attributes::none(), &occasion));
    assert_eq!(decided(&old), (Outcome::Permit, "web-lists-own-accounts".into()));
    assert_eq!(decided(&new), (Outcome::Deny, "policy.changed".into()));
    assert_eq!(decided(&service("web")), (Outcome::Deny, "policy.changed".into()));
    assert_eq!(new.screen(&who, &mapped, &occasion).unwrap_err().rule().name(), "policy.changed");
    // The same directory read again, or the same policy in another mode, is the same policy.
    assert_eq!(decided(&service("accounts")).0, Outcome::Permit);
    assert_eq!(decided(&old.with_mode(Mode::Audit)).0, Outcome::Permit);
}

fn copy_directory(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            std::fs::create_dir_all(&target).unwrap();
            copy_directory(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

proptest! {
    /// What is mapped has one spelling: the template filled with the object's id is the request again.
    #[test]
    fn any_target_is_mapped_in_its_one_spelling_or_refused(
        target in "(/accounts|/Accounts|/accounts/|//accounts)(/[ -~]{0,4}|/[0-9]{1,3}(/history|/|\\.|%30|;a)?)?([?#][ -~]{0,6})?"
    ) {
        let policy = service_once();
        if let Ok(uri) = http::Uri::try_from(target.as_str())
            && let Ok(mapped) = policy.map(&parts(http::Request::get(uri.clone())))
        {
            let id = mapped.objects()[0].id();
            let spelled = mapped.route().replace("{id:int}", id);
            prop_assert_eq!(spelled, format!("GET {}", uri.path()));
            prop_assert!(uri.query().unwrap_or_default().is_empty());
            prop_assert_eq!(id.parse::<u64>().unwrap().to_string(), id);
        }
    }
}

fn service_once() -> &'static ServicePolicy {
    static ACCOUNTS: std::sync::OnceLock<Arc<ServicePolicy>> = std::sync::OnceLock::new();
    ACCOUNTS.get_or_init(|| service("accounts"))
}

/// Every disguise of `GET /accounts/42` and friends: refused, and with which status.
#[test]
fn policy_1_to_15_disguised_targets_are_refused() {
    let policy = service("accounts");
    let refused = |target: &str| match http::Uri::try_from(target) {
        Ok(uri) => policy.map(&parts(http::Request::get(uri))).unwrap_err().status(),
        // hyper answers 400 by itself for what is no URI at all.
        Err(_) => 400,
    };
    for target in [
        "//accounts/42",
        "/accounts//42",
        "/accounts/42/",
        "/accounts/42//",
        "/accounts%2F42",
        "/accounts%2f42",
        "/accounts%5C42",
        "/accounts\\42",
        "/x/../accounts/42",
        "/./accounts/42",
        "/accounts/./42",
        "/%2e%2e/accounts/42",
        "/accounts/%2e/42",
        "/accounts/%34%32",
        "/%61ccounts/42",
        "/accounts/%252e",
        "/accounts/%252f42",
        "/accounts;v=1/42",
        "/accounts/42;v=1",
        "/accounts/42%20",
        "/accounts/42%00",
        "/accounts/42\0",
        "/accounts/42\u{200b}",
        "/accounts/４２",
        "/accounts/4\u{301}2",
        "/accounts/%C0%AF42",
        "/accounts/42?id=1",
        "/accounts/42?id=1&id=2",
        "/accounts/42?_method=DELETE",
        "/accounts/42?x",
        "/accounts/42??",
        "/accounts/42?&",
        "http://accounts/accounts/42",
        "*",
    ] {
        assert_eq!(refused(target), 400, "{target}");
    }
    for target in [
        "/Accounts/42",
        "/ACCOUNTS/42",
        "/accounts/042",
        "/accounts/-42",
        "/accounts/42.",
        "/accounts/42.json",
        "/accounts/42~",
        "/accounts/0x2a",
        "/accounts/42/History",
        "/accounts",
        "/accounts./42",
        "/42",
    ] {
        assert_eq!(refused(target), 403, "{target}");
    }
    // An empty query is the same request.
    assert!(policy.map(&get("/accounts/42?")).is_ok());
    // The fragment is cut by the HTTP parser and never passed on: the canonical request is judged.
    assert!(policy.map(&get("/accounts/42#frag")).is_ok());
}

#[test]
fn policy_14_15_28_30_other_methods_and_rewriting_headers_are_refused() {
    let policy = service("accounts");
    for (method, status) in [
        ("get", 403),
        ("Get", 403),
        ("HEAD", 403),
        ("DELETE", 403),
        ("TRACE", 403),
        ("PROPFIND", 403),
        ("CONNECT", 400),
    ] {
        let request = parts(http::Request::builder().method(method).uri("/accounts/42"));
        assert_eq!(policy.map(&request).unwrap_err().status(), status, "{method}");
    }
    for header in [
        "X-HTTP-Method-Override",
        "X-Original-URL",
        "x-rewrite-url",
        "x-envoy-original-path",
        "x-forwarded-uri",
    ] {
        let request = parts(http::Request::get("/accounts/42").header(header, "/accounts/17"));
        assert_eq!(policy.map(&request).unwrap_err().rule(), "request.rewriting_header", "{header}");
    }
    let absolute = |version| parts(http::Request::get("https://accounts/accounts/42").version(version));
    assert_eq!(policy.map(&absolute(http::Version::HTTP_11)).unwrap_err().rule(), "request.target");
    // HTTP/2 always carries scheme and authority.
    assert!(policy.map(&absolute(http::Version::HTTP_2)).is_ok());
}

#[test]
fn policy_20_32_disguised_bodies_and_foreign_header_bytes_are_refused() {
    let policy = service("payments");
    assert!(policy.map(&post("/transfers", JSON)).is_ok());
    assert!(policy.map(&post("/transfers", "application/json; charset=utf-8")).is_ok());
    for media in [
        "",
        "text/plain",
        "application/json; charset=utf-7",
        "application/json,text/plain",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-8; x=y",
    ] {
        assert_eq!(policy.map(&post("/transfers", media)).unwrap_err().rule(), "request.body", "{media}");
    }
    let twice =
        parts(http::Request::post("/transfers").header("content-type", JSON).header("content-type", FORM));
    assert_eq!(policy.map(&twice).unwrap_err().rule(), "request.body");
    let packed = parts(
        http::Request::post("/transfers").header("content-type", JSON).header("content-encoding", "gzip"),
    );
    assert_eq!(policy.map(&packed).unwrap_err().rule(), "request.body");
    let smuggled = parts(http::Request::get("/journal/totals").header("content-length", "5"));
    assert_eq!(policy.map(&smuggled).unwrap_err().rule(), "request.body");
    let foreign = http::HeaderValue::from_bytes(b"caf\xe9").unwrap();
    let foreign = parts(http::Request::get("/journal/totals").header("x-note", foreign));
    assert_eq!(policy.map(&foreign).unwrap_err().rule(), "request.header_value");
}

#[test]
fn policy_13_16_17_a_transfer_with_two_meanings_is_refused() {
    let policy = service("payments");
    for body in [
        r#"{"from":"17","from":"42","to":"43","amount_cents":1}"#,
        r#"{"from":"17","\u0066rom":"42","to":"43","amount_cents":1}"#,
        r#"{"from":"17","From":"42","to":"43","amount_cents":1}"#,
        r#"{"from":"17","to":"43","amount_cents":1,"account":"42"}"#,
        r#"{"from":"17","to":"43","amount_cents":9007199254740993}"#,
        "",
    ] {
        let mapped = policy.map(&post("/transfers", JSON)).unwrap();
        let refusal = mapped.with_body(body.as_bytes()).unwrap_err();
        assert_eq!((refusal.status(), refusal.rule()), (400, "request.body"), "{body}");
    }
}

#[test]
fn answers_of_the_app_have_one_meaning() {
    let policy = service("payments");
    let body = br#"{"from":"17","to":"42","amount_cents":1}"#;
    let mapped = policy.map(&post("/transfers", JSON)).unwrap().with_body(body).unwrap();
    let asked: serde_json::Value = serde_json::from_slice(&mapped.entities_request()).unwrap();
    assert_eq!(asked, serde_json::json!({"objects": [{"type": "Account", "id": "17"}]}));
    let told = |answer: &str| mapped.attributes_from_entities(answer.as_bytes());
    let one = r#"{"type":"Account","id":"17","attributes":{"owner":"alice","more":1}}"#;
    let known = told(&format!(r#"{{"objects":[{one}]}}"#)).unwrap();
    assert_eq!(known.get(&mapped.objects()[0], "owner"), Some(&policy::AttributeValue::Text("alice".into())));
    assert_eq!(told(r#"{"objects":[]}"#).unwrap(), Attributes::none());
    for bad in [
        format!(r#"{{"objects":[{one},{one}]}}"#),
        r#"{"objects":[{"type":"Account","id":"18","attributes":{"owner":"alice"}}]}"#.into(),
        r#"{"objects":[{"type":"Account","id":"17","attributes":{"owner":"bob","owner":"alice"}}]}"#.into(),
        r#"{"objects":[{"type":"Account","id":"17","attributes":{"owner":["alice"]}}]}"#.into(),
        r#"{"objects":[{"id":"17","attributes":{"owner":"alice"}}]}"#.into(),
        r#"{"objects":{}}"#.into(),
        "[]".into(),
        "owner=alice".into(),
    ] {
        assert_eq!(told(&bad).unwrap_err().rule(), "attributes.answer", "{bad}");
    }
    let mapped = service("accounts").map(&get("/accounts/17")).unwrap();
    for (bad, rule) in [
        (r#"{"owner":"bob","owner":"alice"}"#, "attributes.answer"),
        (r#"{"id":"17"}"#, "attributes.missing"),
        (r#"{"owner":null}"#, "attributes.missing"),
        (r#"<html>alice</html>"#, "attributes.answer"),
        ("", "attributes.answer"),
    ] {
        assert_eq!(mapped.attributes_from_response(bad.as_bytes()).unwrap_err().rule(), rule, "{bad}");
    }
}

#[test]
fn a_caller_who_can_never_be_allowed_is_stopped_before_the_app_is_asked() {
    let policy = service("payments");
    let mapped = policy.map(&post("/transfers", JSON)).unwrap();
    let occasion = occasion("POST", "/transfers");
    assert!(policy.screen(&caller("web", Some("alice")), &mapped, &occasion).is_ok());
    let denial = policy.screen(&caller("accounts", None), &mapped, &occasion).unwrap_err();
    assert_eq!(denial.rule(), &Rule::Absent);
    assert!(denial.record().explanation.is_some());
}

#[test]
fn audit_mode_lets_denials_through_and_keeps_the_verdict() {
    let who = caller("web", Some("alice"));
    let enforced = service("accounts");
    assert!(denied(serve(&enforced, &who, &get("/accounts/42"), b"")).audited().is_err());
    let audited = enforced.with_mode(Mode::Audit);
    let permit = denied(serve(&audited, &who, &get("/accounts/42"), b"")).audited().unwrap();
    assert!(permit.is_audited());
    let mapped = audited.map(&get("/accounts/42")).unwrap();
    let record = permit.record(&who, &mapped, &Attributes::none(), &occasion("GET", "/accounts/42"));
    assert_eq!((record.verdict, record.mode), (Outcome::Deny, Mode::Audit));
    for (caller, target) in
        [(&who, "/accounts//42"), (&who, "/healthz"), (&caller("evil web", None), "/accounts/17")]
    {
        let refused = denied(serve(&audited, caller, &get(target), b""));
        assert_eq!(refused.record().mode, Mode::Enforce, "{target}");
        assert!(refused.audited().is_err(), "{target}");
    }
    let forged = Refusal::denied("txn.bad_signature", "forged");
    assert!(audited.refuse(Some(&who), forged, &occasion("GET", "/accounts/17")).audited().is_err());
}

#[test]
fn the_peer_learns_the_receipt_and_nothing_else() {
    let denial =
        denied(serve(&service("accounts"), &caller("web", Some("alice")), &get("/accounts/42"), b""));
    assert_eq!(denial.status(), 403);
    assert_eq!(denial.response_body(), r#"{"error":"denied","receipt":"r-7k2m0q9xw4e8t5hz"}"#);
    let refusal =
        denied(serve(&service("accounts"), &caller("web", Some("alice")), &get("/accounts//42"), b""));
    assert_eq!(refusal.status(), 400);
    assert_eq!(refusal.response_body(), r#"{"error":"refused","receipt":"r-7k2m0q9xw4e8t5hz"}"#);
}

#[test]
fn records_survive_json_and_recorders_keep_them() {
    let denial =
        denied(serve(&service("accounts"), &caller("web", Some("alice")), &get("/accounts/42"), b""));
    let text = serde_json::to_string(denial.record()).unwrap();
    let back: DecisionRecord = serde_json::from_str(&text).unwrap();
    assert_eq!(&back, denial.record());
    let recorder = MemoryRecorder::default();
    recorder.record(back.clone());
    assert_eq!(recorder.records(), [back]);
}

#[test]
fn a_layer_is_written_as_it_is_shown() {
    for layer in [Layer::Gateway, Layer::Sidecar, Layer::Vault, Layer::Agent] {
        let json = serde_json::to_value(layer).unwrap();
        assert_eq!(json, layer.to_string());
        assert_eq!(serde_json::from_value::<Layer>(json).unwrap(), layer);
    }
    assert_eq!(Layer::Agent.to_string(), "agent");
}

#[test]
fn receipts_are_random() {
    let random = ring::rand::SystemRandom::new();
    assert_ne!(Receipt::generate(&random).unwrap(), Receipt::generate(&random).unwrap());
}

/// Compares with the committed text; `UPDATE_EXPECTED=1` writes it anew for review.
fn expect(name: &str, record: &DecisionRecord) {
    let mut record = record.clone();
    // The version changes with every word of a policy file; the rest of the text should not.
    record.policy_version = record.policy_version.map(|_| "0123456789ab".to_owned());
    let actual = render(&record);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/render").join(name);
    if std::env::var_os("UPDATE_EXPECTED").is_some() {
        std::fs::write(&path, &actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(actual, expected, "tests/render/{name} differs");
}

#[test]
fn an_explanation_reads_well() {
    let accounts = service("accounts");
    let alice = caller("web", Some("alice"));
    expect("foreign_account.txt", denied(serve(&accounts, &alice, &get("/accounts/42"), b"")).record());
    expect("no_user.txt", denied(serve(&accounts, &caller("web", None), &get("/accounts/17"), b"")).record());
    expect("disguised_path.txt", denied(serve(&accounts, &alice, &get("/accounts//42"), b"")).record());
    expect("unmapped.txt", denied(serve(&accounts, &alice, &get("/account/42"), b"")).record());
    let for_alice = caller("accounts", Some("alice"));
    let person = denied(serve(&service("payments"), &for_alice, &get("/journal/totals"), b""));
    expect("unless.txt", person.record());
    let totals =
        denied(serve(&service("payments"), &caller("web", Some("alice")), &get("/journal/totals"), b""));
    expect("wrong_workload.txt", totals.record());
    let nobody = refuse_connection(
        "accounts",
        "tls.no_client_certificate",
        "the client presented no certificate".into(),
        Some("127.0.0.1:40100".parse().unwrap()),
        &Occasion { transaction: None, trace_id: None, ..occasion("connect", "accounts") },
    );
    expect("no_identity.txt", nobody.record());
    let unregistered = refuse_connection(
        "agent",
        "agent.no_matching_entry",
        "no registration matches the caller: pid=7 uid=1000 gid=100 sha256=unknown path=/tmp/web; near: \
         spiffe://bank.example/service/web wants uid=1000 path=/usr/bin/web, differs in path"
            .into(),
        None,
        &Occasion {
            layer: Layer::Agent,
            transaction: None,
            trace_id: None,
            ..occasion("FetchX509SVID", "/run/palisade/agent.sock")
        },
    );
    expect("no_registration.txt", unregistered.record());
    match serve(&accounts, &alice, &get("/accounts/17"), b"") {
        Verdict::Permit(permit) => {
            let mapped = accounts.map(&get("/accounts/17")).unwrap();
            let attributes = learn(&mapped).unwrap();
            let record = permit.record(&alice, &mapped, &attributes, &occasion("GET", "/accounts/17"));
            expect("permitted.txt", &record);
        }
        Verdict::Deny(denial) => panic!("{}", denial.reason()),
    }
    let object = ObjectRef::new("Accounts::Account", "17");
    let mut owned = Attributes::none();
    owned.insert(object.clone(), "owner", policy::AttributeValue::Text("alice".into()));
    let forbidden =
        accounts.decide_object(&alice, "Transfer", &object, &owned, &occasion("POST", "/transfers"));
    expect("forbidden.txt", denied(forbidden).record());
}

#[test]
fn an_explanation_cannot_steer_the_terminal() {
    let hostile = Occasion { target: "/x\u{1b}[2J\u{202e}\n\rverdict permitted", ..occasion("GET", "/") };
    let denial = refuse_connection("accounts", "tls.x", "a\u{1b}]0;b".into(), None, &hostile);
    let text = render(denial.record());
    assert!(text.chars().all(|c| c == '\n' || !(c.is_control() || c == '\u{202e}')), "{text:?}");
    assert_eq!(text.lines().filter(|line| line.starts_with("verdict")).count(), 1);
    let coloured = render_with(denial.record(), Style::Colour);
    assert_eq!(coloured.replace("\u{1b}[1m", "").replace("\u{1b}[0m", ""), text);
}
