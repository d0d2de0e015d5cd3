//! Lines of the acceptance list for policy that need bytes which no decent client sends, or another policy on the way:
//! a sidecar before an app that records what reached it. Each line is named by its number.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]
#![allow(clippy::disallowed_methods, reason = "clients of the test are joined by it")]

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use identity::Scope;
use policy::Policies;
use sidecar::app::AppProtocol;
use tokio::sync::Notify;

mod world;

use world::raw::{Told, http1, http2};
use world::*;

/// A request of web's for `user`, with a transaction token for just that method and target.
fn written(world: &World, user: &str, method: &str, target: &[u8], fields: &[u8], body: &[u8]) -> Vec<u8> {
    let web = world.authority.issue("/service/web");
    let chain = world.chain(&web, user, method, &String::from_utf8_lossy(target));
    [
        method.as_bytes(),
        b" ",
        target,
        b" HTTP/1.1\r\nconnection: close\r\ntxn-token: ",
        chain.as_bytes(),
        b"\r\n",
        fields,
        b"\r\n",
        body,
    ]
    .concat()
}

const HOST: &[u8] = b"host: accounts\r\n";

async fn get1(world: &World, user: &str, target: &[u8]) -> Told {
    http1(world, &written(world, user, "GET", target, HOST, b"")).await
}

/// The fields of a good GET for `user`.
async fn get2(world: &World, user: &str, target: &[u8], change: impl Fn(&mut Fields)) -> Told {
    let web = world.authority.issue("/service/web");
    let chain = world.chain(&web, user, "GET", &String::from_utf8_lossy(target));
    let mut fields: Fields = [
        (&b":method"[..], &b"GET"[..]),
        (b":scheme", b"https"),
        (b":authority", b"accounts"),
        (b":path", target),
        (b"txn-token", chain.as_bytes()),
    ]
    .map(|(name, value)| (name.to_vec(), value.to_vec()))
    .into();
    change(&mut fields);
    let fields: Vec<_> = fields.iter().map(|(name, value)| (&name[..], &value[..])).collect();
    http2(world, &fields, b"").await
}

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

fn as_it_is(_: &mut Fields) {}

/// What one character or one byte makes of `/accounts/42`: each is a request by HTTP's own rules.
const SPELLINGS: [&[u8]; 35] = [
    b"//accounts/42",
    b"/accounts//42",
    b"/accounts%2F42",
    b"/accounts%5C42",
    b"/accounts/17/../42",
    b"/accounts/../accounts/42",
    b"/./accounts/42",
    b"/accounts/%2e%2e/accounts/42",
    b"/accounts/%252e%252e/42",
    b"/accounts%252f42",
    b"/accounts/42;v=1",
    b"/accounts;v=1/42",
    b"/Accounts/42",
    b"/ACCOUNTS/42",
    b"/accounts/42/",
    b"/accounts/42.",
    b"/accounts/42%20",
    b"/accounts/42%00",
    b"/accounts/42%23frag",
    // Overlong UTF-8 of "4" and of "/"; what NFKC makes 42; a character that nobody sees.
    b"/accounts/%c0%b42",
    b"/accounts%c0%af42",
    b"/accounts/%EF%BC%94%EF%BC%92",
    b"/accounts/4%E2%80%8B2",
    b"/accounts/%34%32",
    b"/accounts/042",
    b"/accounts/+42",
    b"/accounts/-42",
    b"/accounts/%2042",
    b"/accounts/42.0",
    b"/accounts/0x2a",
    b"/accounts/42?id=42",
    b"/accounts?page=2&page=2",
    b"/accounts?page=2&PAGE=2",
    b"/accounts?page=2&p%61ge=2",
    b"*",
];

/// What HTTP itself has no room for: a parser may end the connection, or say so without anything to record.
const NO_TARGETS: [&[u8]; 17] = [
    b"/accounts\\42",
    b"\\accounts\\42",
    b"/accounts/42 ",
    b"/accounts/ 42",
    b"/accounts/42\t",
    b"/accounts/42\0",
    b"/accounts/42\r",
    b"/accounts/\xc0\xb42",
    b"/accounts\xc0\xaf42",
    "/accounts/４２".as_bytes(),
    "/accounts/4²".as_bytes(),
    "/accounts/42\u{301}".as_bytes(),
    "/accounts/4\u{200b}2".as_bytes(),
    "/accounts/42\u{feff}".as_bytes(),
    b"http://accounts/accounts/42",
    b"https://accounts/accounts/42",
    b"accounts/42",
];

#[tokio::test]
async fn policy_1_to_12_and_30_no_other_spelling_of_a_target_reaches_the_app() {
    let world = World::new().await;
    assert_eq!(get1(&world, "bob", b"/accounts/42").await, Told::Status(200, false));
    assert_eq!(get2(&world, "bob", b"/accounts/42", as_it_is).await, Told::Status(200, false));
    let before = world.seen().len();
    for target in SPELLINGS {
        let shown = String::from_utf8_lossy(target);
        let told = get1(&world, "bob", target).await;
        assert!(matches!(told, Told::Status(400 | 403, true)), "HTTP/1.1: {shown}: {told:?}");
        let told = get2(&world, "bob", target, as_it_is).await;
        assert!(matches!(told, Told::Status(400 | 403, _)), "HTTP/2: {shown}: {told:?}");
    }
    for target in NO_TARGETS {
        let shown = String::from_utf8_lossy(target);
        let told = get1(&world, "bob", target).await;
        assert!(told.is_refusal(), "HTTP/1.1: {shown}: {told:?}");
        let told = get2(&world, "bob", target, as_it_is).await;
        assert!(told.is_refusal(), "HTTP/2: {shown}: {told:?}");
    }
    assert_eq!(world.seen().len(), before, "{:?}", world.seen().last());
    world.end().await;
}

#[tokio::test]
async fn policy_9_a_fragment_is_refused_or_gone_before_anybody_judges() {
    let world = World::new().await;
    for (target, user) in [(&b"/accounts/42#frag"[..], "alice"), (b"/accounts/17#/accounts/42", "bob")] {
        let told = get1(&world, user, target).await;
        assert!(told.is_refusal(), "{told:?}");
    }
    assert!(world.seen().is_empty(), "{:?}", world.seen());
    // The parser of HTTP/2 takes it away: what is decided about and forwarded is what is left.
    let chain = world.chain(&world.authority.issue("/service/web"), "bob", "GET", "/accounts/17");
    let retold = |fields: &mut Fields| fields[4].1 = chain.clone().into_bytes();
    let told = get2(&world, "bob", b"/accounts/17#/accounts/42", retold).await;
    assert_eq!(told, Told::Status(403, false));
    assert_eq!(world.last().target, "/accounts/17");
    assert!(world.seen().iter().all(|seen| seen.target == "/accounts/17"), "{:?}", world.seen());
    world.end().await;
}

#[tokio::test]
async fn policy_11_a_uuid_has_one_spelling() {
    let map = "[[route]]\nmatch = \"GET /cards/{id:uuid}\"\naction = \"CountAccounts\"\nobject = 'Account::\"{id}\"'\n\
               attributes = { owner = \"path:id\" }\n";
    let mut files = ACCOUNTS;
    files[2].1 = map;
    let world = World::with(&files).await;
    let id = "0f8fad5b-d9cb-469f-a165-70867728950e";
    let get = async |spelt: &str| world.call(id, "GET", &format!("/cards/{spelt}"), "", &[]).await;
    assert_eq!(get(id).await.0, StatusCode::CREATED);
    for spelt in [
        id.to_uppercase(),
        id.replace('f', "F"),
        id.replace('-', ""),
        format!("{{{id}}}"),
        format!("urn:uuid:{id}"),
    ] {
        let (status, body) = get(&spelt).await;
        assert!(matches!(status.as_u16(), 400 | 403) && body.contains("receipt"), "{spelt}: {status} {body}");
    }
    assert_eq!(world.seen().len(), 1);
    world.end().await;
}

#[tokio::test]
async fn policy_14_18_a_method_in_a_parameter_or_a_member_and_numbers_that_readers_round_are_refused() {
    let world = World::new().await;
    let body = |rest: &str| format!("{{\"from\":\"17\",\"to\":\"42\",{rest}}}");
    let post = async |target: &str, body: &str| world.call("alice", "POST", target, body, &[]).await;
    assert_eq!(post("/transfers", &body("\"amount_cents\":9007199254740991")).await.0, StatusCode::CREATED);
    let before = world.seen().len();
    for (target, rest) in [
        ("/transfers?_method=DELETE", "\"amount_cents\":1"),
        ("/transfers", "\"amount_cents\":1,\"_method\":\"DELETE\""),
        ("/transfers", "\"amount_cents\":9007199254740993"),
        ("/transfers", "\"amount_cents\":1e400"),
        ("/transfers", "\"amount_cents\":1.0"),
        ("/transfers", "\"amount_cents\":1e2"),
        ("/transfers", "\"amount_cents\":-0"),
    ] {
        let (status, told) = post(target, &body(rest)).await;
        assert!(
            matches!(status.as_u16(), 400 | 403) && told.contains("receipt"),
            "{target} {rest}: {status}"
        );
    }
    let (status, _) = world.call("alice", "GET", "/accounts/17?_method=DELETE", "", &[]).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(world.seen().len(), before, "{:?}", world.seen().last());
    world.end().await;
}

#[tokio::test]
async fn policy_21_two_lengths_and_trailers_that_name_what_is_mapped_are_refused() {
    let world = World::new().await;
    let body: &[u8] = br#"{"from":"17","to":"42","amount_cents":1}"#;
    let chunked = [format!("{:x}\r\n", body.len()).as_bytes(), body, b"\r\n0\r\n"].concat();
    let send = async |fields: &str, body: &[u8]| {
        let fields = format!("host: accounts\r\ncontent-type: application/json\r\n{fields}");
        http1(&world, &written(&world, "alice", "POST", b"/transfers", fields.as_bytes(), body)).await
    };
    let whole = [&chunked[..], b"\r\n"].concat();
    assert_eq!(send("transfer-encoding: chunked\r\n", &whole).await, Told::Status(201, false));
    let before = world.seen().len();
    for (fields, body) in [
        ("content-length: 40\r\ntransfer-encoding: chunked\r\n", &whole[..]),
        ("transfer-encoding: chunked\r\ncontent-length: 40\r\n", &whole),
        ("content-length: 40\r\ncontent-length: 41\r\n", body),
        ("content-length: 40\r\ncontent-length: 40\r\n", body),
        ("transfer-encoding: chunked\r\n", &[&chunked[..], b"from: 42\r\n\r\n"].concat()),
        ("transfer-encoding: chunked\r\ntrailer: from\r\n", &[&chunked[..], b"from: 42\r\n\r\n"].concat()),
        ("transfer-encoding: chunked\r\n", &[&chunked[..], b"x-original-url: /accounts/42\r\n\r\n"].concat()),
    ] {
        let told = send(fields, body).await;
        assert!(matches!(told, Told::Status(400 | 403, _)), "{fields}: {told:?}");
    }
    assert_eq!(world.seen().len(), before, "{:?}", world.seen().last());
    world.end().await;
}

#[tokio::test]
async fn policy_26_a_request_that_says_something_twice_is_refused() {
    let world = World::new().await;
    let field = |name: &str, value: &str| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
    let changes: [(&str, &str); 12] = [
        (":path", "/accounts/17"),
        (":path", "/accounts/42"),
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "evil"),
        ("host", "evil"),
        ("host", "ACCOUNTS"),
        ("x", "a\r\nx-original-url: /accounts/42"),
        ("x", "a\nb"),
        ("x", "a\rb"),
        ("x", "a\0b"),
        ("x\r\ny", "z"),
    ];
    for (name, value) in changes {
        let told = get2(&world, "alice", b"/accounts/17", |fields| {
            // A pseudo-header behind a field is refused for that alone.
            let place = if name.starts_with(':') { 4 } else { 5 };
            fields.insert(place, field(name, value));
        });
        let told = told.await;
        assert!(told.is_refusal(), "HTTP/2: {name} {value:?}: {told:?}");
    }
    let extra: [&[u8]; 6] = [
        b"host: accounts\r\nhost: evil\r\n",
        b"host: accounts\r\nHost: accounts\r\n",
        b"host: accounts\r\nx: a\rb\r\n",
        b"host: accounts\r\nx: a\nb\r\n",
        b"host: accounts\r\nx: a\0b\r\n",
        b"host: accounts\r\nx : a\r\n",
    ];
    for fields in extra {
        let told = http1(&world, &written(&world, "alice", "GET", b"/accounts/17", fields, b"")).await;
        assert!(told.is_refusal(), "HTTP/1.1: {}: {told:?}", String::from_utf8_lossy(fields));
    }
    assert!(world.seen().is_empty(), "{:?}", world.seen());
    world.end().await;
}

#[tokio::test]
async fn policy_27_28_identity_headers_of_several_values_are_dropped_and_tokens_are_one() {
    let world = World::new().await;
    let lies: &[u8] = b"host: accounts\r\nx-forwarded-user: root\r\nx-forwarded-user: bob\r\nX-Forwarded-User: bob, root\r\n\
        x-forwarded-client-cert: URI=spiffe://bank.example/service/root\r\nx-forwarded-client-cert: URI=x\r\n\
        x-forwarded-for: 127.0.0.1\r\nx-forwarded-for: 10.0.0.1\r\n";
    let told = http1(&world, &written(&world, "alice", "GET", b"/accounts/17", lies, b"")).await;
    assert_eq!(told, Told::Status(200, false));
    let seen = world.seen().pop().unwrap();
    assert_eq!(seen.target, "/accounts/17");
    assert_eq!(seen.headers["x-forwarded-user"], "alice");
    assert!(!seen.headers.contains_key("x-forwarded-for"));
    let proved = &seen.headers["x-forwarded-client-cert"];
    assert!(proved.ends_with(";URI=spiffe://bank.example/service/web"), "{proved}");
    let count = world.seen().len();
    for name in [
        "x-envoy-original-path",
        "x-forwarded-uri",
        "x-original-url",
        "x-rewrite-url",
        "x-http-method-override",
    ] {
        let fields = format!("host: accounts\r\n{name}: /accounts/42\r\n");
        let bytes = written(&world, "alice", "GET", b"/accounts/17", fields.as_bytes(), b"");
        assert_eq!(http1(&world, &bytes).await, Told::Status(400, true), "{name}");
    }
    // Two tokens of two users, in either order.
    let web = world.authority.issue("/service/web");
    for (first, second) in [("alice", "bob"), ("bob", "alice")] {
        let token = world.chain(&web, second, "GET", "/accounts/17");
        let fields = format!("host: accounts\r\ntxn-token: {token}\r\n");
        let bytes = written(&world, first, "GET", b"/accounts/17", fields.as_bytes(), b"");
        assert_eq!(http1(&world, &bytes).await, Told::Status(403, true));
        assert_eq!(world.last_rule(), "txn.malformed");
    }
    assert_eq!(world.seen().len(), count);
    world.end().await;
}

#[tokio::test]
async fn policy_29_30_what_a_host_is_called_decides_nothing_and_other_forms_of_target_are_refused() {
    let world = World::new().await;
    for host in ["accounts", "ACCOUNTS", "accounts.", "accounts:8443", "Accounts.:8443", "127.0.0.1", "evil"]
    {
        let fields = format!("host: {host}\r\n");
        let get = async |user| {
            http1(&world, &written(&world, user, "GET", b"/accounts/17", fields.as_bytes(), b"")).await
        };
        assert_eq!(get("alice").await, Told::Status(200, false), "{host}");
        assert_eq!(get("bob").await, Told::Status(403, true), "{host}");
        let named = |fields: &mut Fields| fields[2].1 = host.as_bytes().to_vec();
        assert_eq!(get2(&world, "alice", b"/accounts/17", named).await, Told::Status(200, false), "{host}");
        assert_eq!(get2(&world, "bob", b"/accounts/17", named).await, Told::Status(403, false), "{host}");
    }
    let before = world.seen().len();
    let lines: [(&str, &[u8]); 8] = [
        ("GET", b"http://accounts/accounts/17"),
        ("GET", b"http://evil/accounts/17"),
        ("GET", b"//accounts/accounts/17"),
        ("CONNECT", b"accounts:443"),
        ("CONNECT", b"/accounts/17"),
        ("OPTIONS", b"*"),
        ("OPTIONS", b"/accounts/17"),
        ("TRACE", b"/accounts/17"),
    ];
    for (method, target) in lines {
        let told = http1(&world, &written(&world, "alice", method, target, HOST, b"")).await;
        let shown = String::from_utf8_lossy(target);
        assert!(told.is_refusal(), "{method} {shown}: {told:?}");
        let told = get2(&world, "alice", target, |fields| fields[0].1 = method.as_bytes().to_vec()).await;
        assert!(told.is_refusal(), "HTTP/2: {method} {shown}: {told:?}");
    }
    assert_eq!(world.seen().len(), before, "{:?}", world.seen().last());
    world.end().await;
}

#[tokio::test]
async fn policy_31_callers_whose_names_look_like_another_s_are_others() {
    let world = World::new().await;
    // The policy names `/service/web` of `bank.example`; a dot of it is a dot.
    let domain = |authority: &identity::testing::TestAuthority, path: &str| authority.issue(path);
    for caller in [
        domain(&world.authority, "/service/webx"),
        domain(&world.authority, "/service/we"),
        domain(&world.authority, "/service/web/x"),
        domain(&world.authority, "/service/web."),
        domain(&world.authority, "/service/Web"),
        domain(&world.authority, "/x/service/web"),
        domain(&world.neighbour, "/service/web"),
    ] {
        let request = Request::get("/owners/alice/accounts").body(sidecar::empty()).unwrap();
        let (status, body) = world.send(&caller, request).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{}", caller.id());
        assert!(body.contains("receipt"));
        assert_eq!(world.last().principal.as_deref(), Some(caller.id().as_str()));
    }
    assert_eq!(world.last_rule(), "principal.trust_domain");
    assert!(world.seen().is_empty(), "{:?}", world.seen());
    world.end().await;
}

#[tokio::test]
async fn policy_32_a_header_that_is_no_text_is_refused() {
    let world = World::new().await;
    for value in [&b"\xe9"[..], b"\xff\xfe", b"a\x80b", b"\xc3\xa9"] {
        let fields = [b"host: accounts\r\nx: ", value, b"\r\n"].concat();
        let told = http1(&world, &written(&world, "alice", "GET", b"/accounts/17", &fields, b"")).await;
        assert_eq!(told, Told::Status(400, true), "{value:?}");
        let odd = |fields: &mut Fields| fields.push((b"x".to_vec(), value.to_vec()));
        assert_eq!(get2(&world, "alice", b"/accounts/17", odd).await, Told::Status(400, false), "{value:?}");
    }
    assert!(world.seen().is_empty(), "{:?}", world.seen());
    world.end().await;
}

/// An app that has been asked for a transfer's objects answers when it is told to.
async fn slow_entities(
    listener: tokio::net::TcpListener,
    seen: Arc<Mutex<Vec<Seen>>>,
    asked: Arc<Gate>,
    scope: Scope,
) {
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => accepted.unwrap(),
            () = scope.draining() => return,
        };
        let (seen, asked) = (Arc::clone(&seen), Arc::clone(&asked));
        scope.spawn("slow app connection", async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let (seen, asked) = (Arc::clone(&seen), Arc::clone(&asked));
                async move {
                    let target = request.uri().path().to_owned();
                    let told = target == policy::ENTITIES_PATH;
                    if told {
                        asked.asked.notify_one();
                        asked.answer.notified().await;
                    } else {
                        let (method, headers) = (request.method().clone(), Default::default());
                        seen.lock().unwrap().push(Seen { method, target, headers, body: String::new() });
                    }
                    let objects =
                        r#"{"objects":[{"type":"Account","id":"17","attributes":{"owner":"alice"}}]}"#;
                    let body = Full::<Bytes>::from(if told { objects } else { "{}" });
                    Ok::<_, hyper::Error>(
                        Response::builder().header("content-type", "application/json").body(body).unwrap(),
                    )
                }
            });
            let connection = hyper::server::conn::http1::Builder::new();
            let _ended = connection.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

#[derive(Default)]
struct Gate {
    asked: Notify,
    answer: Notify,
}

#[tokio::test]
async fn policy_35_a_request_is_decided_by_the_policy_it_began_with_whatever_comes_meanwhile() {
    let (scope, seen, gate) = (Scope::new(), Arc::new(Mutex::new(Vec::new())), Arc::new(Gate::default()));
    let app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = app.local_addr().unwrap();
    scope.spawn("slow app", slow_entities(app, Arc::clone(&seen), Arc::clone(&gate), scope.clone()));
    let world = World::before((address, AppProtocol::Http1), &ACCOUNTS, seen, scope);
    // The same, but nobody owns anything: what is asked of the app is denied when it has answered.
    let narrow =
        ACCOUNTS_POLICIES.replace("resource.owner == context.user.id", "resource.owner == \"nobody\"");
    let mut files = ACCOUNTS;
    files[3].1 = &narrow;
    let ((_opened, open), (_narrowed, narrow)) = (policies(&ACCOUNTS), policies(&files));
    let body = r#"{"from":"17","to":"42","amount_cents":1}"#;
    let transfer = async |meanwhile: &Arc<Policies>| {
        let change = async {
            gate.asked.notified().await;
            world.sidecar.replace_policy(meanwhile.service("accounts").unwrap());
            gate.answer.notify_one();
        };
        let call = world.call("alice", "POST", "/transfers", body, &[]);
        futures::future::join(call, change).await.0.0
    };
    // Allowed when it began and denied when it is forwarded, and the other way round.
    assert_eq!(transfer(&narrow).await, StatusCode::OK);
    assert_eq!(world.seen().len(), 1);
    assert_eq!(transfer(&open).await, StatusCode::FORBIDDEN);
    assert_eq!((world.seen().len(), world.last_rule().as_str()), (1, "none"));
    assert_eq!(transfer(&open).await, StatusCode::OK);
    let records = world.records.records();
    let versions: Vec<_> = records.iter().map(|record| (record.verdict, &record.policy_version)).collect();
    let of = |policies: &Arc<Policies>| policies.service("accounts").unwrap().version().to_string();
    for (verdict, version) in versions {
        let decided_by = if verdict == policy::Outcome::Permit { of(&open) } else { of(&narrow) };
        assert_eq!(version.as_ref(), Some(&decided_by));
    }
    world.end().await;
}

#[tokio::test]
async fn policy_37_a_missing_object_or_attribute_and_a_forbid_that_fails_deny() {
    let world = World::new().await;
    let transfer = async |world: &World, from: &str| {
        let body = format!("{{\"from\":\"{from}\",\"to\":\"42\",\"amount_cents\":1}}");
        world.call("alice", "POST", "/transfers", &body, &[]).await.0
    };
    // The app knows no 77.
    assert_eq!(
        (transfer(&world, "77").await, world.last_rule().as_str()),
        (StatusCode::FORBIDDEN, "attributes.missing")
    );
    assert!(world.seen().iter().all(|seen| seen.target == policy::ENTITIES_PATH), "{:?}", world.seen());
    world.end().await;
    // Cedar skips a forbid that cannot be evaluated; here it denies.
    let failing = format!(
        "{ACCOUNTS_POLICIES}\n@id(\"fails\")\nforbid (principal, action == Accounts::Action::\"CountAccounts\", resource)\n\
         when {{ context.now + 9223372036854775807 < 0 }};\n"
    );
    let mut files = ACCOUNTS;
    files[3].1 = &failing;
    let world = World::with(&files).await;
    let (status, body) = world.call("alice", "GET", "/owners/alice/accounts", "", &[]).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{body}");
    assert!(body.contains("receipt") && world.last().reason.contains("fails"), "{}", world.last().reason);
    assert!(world.seen().is_empty(), "{:?}", world.seen());
    assert_eq!(transfer(&world, "17").await, StatusCode::CREATED, "another action is not touched");
    world.end().await;
}

#[tokio::test]
async fn policy_39_without_policies_or_with_old_ones_everything_is_denied_and_told_apart() {
    let world = World::new().await;
    let get = async || world.call("alice", "GET", "/owners/alice/accounts", "", &[]).await;
    assert_eq!(get().await.0, StatusCode::CREATED);
    let domain = identity::TrustDomain::new("bank.example").unwrap();
    let (_folder, good) = policies(&ACCOUNTS);
    let good = good.service("accounts").unwrap();
    for (policy, rule) in [
        (policy::ServicePolicy::not_received("accounts", &domain).unwrap(), "policy.not_received"),
        (Arc::new(good.withhold(policy::Withheld::Expired)), "policy.expired"),
    ] {
        world.sidecar.replace_policy(policy);
        let (status, body) = get().await;
        assert_eq!((status, world.last_rule().as_str()), (StatusCode::FORBIDDEN, rule));
        assert!(body.contains(world.last().receipt.as_str()), "{body}");
    }
    assert_eq!(world.seen().len(), 1, "{:?}", world.seen());
    world.sidecar.replace_policy(good);
    assert_eq!(get().await.0, StatusCode::CREATED);
    world.end().await;
}
