//! Calls of gRPC to a sidecar before an app that records each message that reached it: what names their objects stands in
//! their paths and messages. Lines of the acceptance list are named by list and number.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]
#![allow(clippy::disallowed_methods, reason = "clients of the test are joined by it")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Request, Uri};
use identity::tls::ALPN_H2;
use identity::{Scope, txn};
use sidecar::app::AppProtocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

mod world;

use world::raw::{Told, http2};
use world::*;

const PROTO: &str = r#"
syntax = "proto3";
package bank;
message Account { string id = 1; string kind = 2; }
message Ask { Account account = 1; string note = 2; oneof by { string card = 3; string iban = 4; } Any more = 5; }
message Any { string type_url = 1; bytes value = 2; }
service Accounts {
  rpc Read(Ask) returns (Ask);
  rpc Pay(Ask) returns (Ask);
  rpc Follow(stream Ask) returns (stream Ask);
}
"#;

const MAP: &str = r#"
[[route]]
match = "POST /bank.Accounts/Read"
action = "ReadAccount"
object = 'Account::"{body:/account.id}"'
body_type = "grpc"
body = { "account.id" = "id" }
attributes = { owner = "body:/account.id" }

[[route]]
match = "POST /bank.Accounts/Pay"
action = "ReadAccount"
object = 'Account::"{body:/card}"'
body_type = "grpc"
body = { "card" = "id" }
attributes = { owner = "body:/card" }

[[route]]
match = "POST /bank.Accounts/Follow"
action = "ReadAccount"
object = 'Account::"{body:/account.id}"'
body_type = "grpc"
body = { "account.id" = "id" }
attributes = { owner = "body:/account.id" }
"#;

/// Bounds a hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// A message of these fields, each `(number, bytes)`.
fn message(fields: &[(u8, &[u8])]) -> Vec<u8> {
    let field = |(number, value): &(u8, &[u8])| [&[number << 3 | 2, value.len() as u8], *value].concat();
    fields.iter().flat_map(field).collect()
}

/// What asks about an account. Its owner is who it is called after.
fn about(account: &str) -> Vec<u8> {
    message(&[(1, &message(&[(1, account.as_bytes())]))])
}

fn framed(message: &[u8]) -> Bytes {
    [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), message].concat().into()
}

/// The app: gives back every message as it comes, and records it.
async fn echo(listener: tokio::net::TcpListener, seen: Arc<Mutex<Vec<Seen>>>, scope: Scope) {
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => accepted.unwrap(),
            () = scope.draining() => return,
        };
        let (seen, calls) = (Arc::clone(&seen), scope.clone());
        scope.spawn("app connection", async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, respond))) = connection.accept().await {
                calls.spawn("app call", answer(request, respond, Arc::clone(&seen)));
            }
        });
    }
}

async fn answer(
    request: Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    seen: Arc<Mutex<Vec<Seen>>>,
) {
    let (parts, mut body) = request.into_parts();
    let target = parts.uri.path().to_owned();
    let record = |body: String| {
        let (method, target) = (parts.method.clone(), target.clone());
        seen.lock().unwrap().push(Seen { method, target, headers: Default::default(), body });
    };
    record("asked".to_owned());
    let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
    let mut answer = respond.send_response(head, false).unwrap();
    // The peer may have reset the call by now.
    while let Some(Ok(data)) = body.data().await {
        let _credit = body.flow_control().release_capacity(data.len());
        record(String::from_utf8_lossy(&data).into_owned());
        let _gone = answer.send_data(data, false);
    }
    let trailers =
        [("grpc-status", "0")].map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
    let _gone =
        answer.send_trailers(HeaderMap::from_iter::<[(http::HeaderName, http::HeaderValue); 1]>(trailers));
}

async fn world() -> World {
    with_map(MAP).await
}

async fn with_map(map: &str) -> World {
    let (scope, seen) = (Scope::new(), Arc::new(Mutex::new(Vec::new())));
    let app = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = app.local_addr().unwrap();
    scope.spawn("app", echo(app, Arc::clone(&seen), scope.clone()));
    World::before((address, AppProtocol::H2c), &files_with(map), seen, scope)
}

fn files_with(map: &str) -> [(&str, &str); 5] {
    [
        ACCOUNTS[0],
        ACCOUNTS[1],
        ("services/accounts/map.toml", map),
        ("services/accounts/accounts.proto", PROTO),
        ACCOUNTS[3],
    ]
}

/// How a call ended.
#[derive(Debug)]
enum Ended {
    /// By its status and what it says.
    Status(String, String),
    /// The peer takes it for no request.
    Reset,
}

impl Ended {
    #[track_caller]
    fn refused(&self, code: &str) {
        let Self::Status(status, words) = self else { panic!("reset") };
        assert_eq!(status, code, "{words}");
        assert!(words.starts_with("denied, receipt r-"), "{words}");
    }
}

/// One call of web's for alice, on a connection of its own.
struct Call {
    send: h2::SendStream<Bytes>,
    answer: h2::client::ResponseFuture,
}

impl Call {
    async fn to(world: &World, path: &str) -> Self {
        let web = world.authority.issue("/service/web");
        let stream = world.connect(&web, ALPN_H2).await;
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        world.scope.spawn("test connection", async move {
            let _ended = connection.await;
        });
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some("https".parse().unwrap());
        parts.authority = Some("accounts".parse().unwrap());
        parts.path_and_query = Some(path.parse::<PathAndQuery>().unwrap());
        let request = Request::post(Uri::from_parts(parts).unwrap())
            .header(txn::HEADER, world.chain(&web, "alice", "POST", path))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        let request = request.body(()).unwrap();
        let (answer, send) = client.ready().await.unwrap().send_request(request, false).unwrap();
        Self { send, answer }
    }

    fn say(&mut self, message: &[u8]) {
        // One that was refused already hears no more.
        let _gone = self.send.send_data(framed(message), false);
    }
}

/// How the call ends; what the app says until then goes to `heard`.
async fn hears(answer: h2::client::ResponseFuture, heard: mpsc::UnboundedSender<Vec<u8>>) -> Ended {
    let hears = async {
        let Ok(response) = answer.await else { return Ended::Reset };
        let (parts, mut body) = response.into_parts();
        while let Some(data) = body.data().await {
            let Ok(data) = data else { return Ended::Reset };
            let _credit = body.flow_control().release_capacity(data.len());
            let _nobody = heard.send(data[5..].to_vec());
        }
        let trailers = body.trailers().await.ok().flatten().unwrap_or_default();
        let fields = if parts.headers.contains_key("grpc-status") { &parts.headers } else { &trailers };
        let of = |name| fields.get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
        Ended::Status(of("grpc-status"), of("grpc-message"))
    };
    tokio::time::timeout(PATIENCE, hears).await.expect("the call does not end")
}

/// A call of these bytes and no more.
async fn call(world: &World, path: &str, bytes: Bytes) -> Ended {
    let Call { mut send, answer } = Call::to(world, path).await;
    let _gone = send.send_data(bytes, true);
    hears(answer, mpsc::unbounded_channel().0).await
}

async fn read(world: &World, path: &str, message: &[u8]) -> Ended {
    call(world, path, framed(message)).await
}

const MALFORMED: &str = "3";
const DENIED: &str = "7";

#[tokio::test]
async fn policy_22_a_path_without_its_slash_or_its_service_reaches_no_method() {
    let world = world().await;
    assert!(
        matches!(read(&world, "/bank.Accounts/Read", &about("alice")).await, Ended::Status(code, _) if code == "0")
    );
    let before = world.seen().len();
    assert_eq!(before, 2, "the call and its message");
    let mut refused = world.records.records().len();
    // HTTP/2 knows of no such paths (RFC 9113 §8.3.1): who reads a call of one ends it before anybody could judge it.
    for path in
        ["bank.Accounts/Read", "Read", "bank.Accounts", "", "?/bank.Accounts/Read", "%2Fbank.Accounts/Read"]
    {
        let token = world.chain(&world.authority.issue("/service/web"), "alice", "POST", path);
        let fields: [(&[u8], &[u8]); 7] = [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":authority", b"accounts"),
            (b":path", path.as_bytes()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            (txn::HEADER.as_bytes(), token.as_bytes()),
        ];
        let told = http2(&world, &fields, &framed(&about("alice"))).await;
        // One that its reader does take for a path is refused in words.
        let denied = world.records.records().len() - refused;
        refused += denied;
        assert_eq!(
            (told == Told::Ended, denied),
            (!path.starts_with('?'), usize::from(path.starts_with('?'))),
            "{path}"
        );
    }
    for (path, code) in [
        ("//Read", MALFORMED),
        ("/Read", DENIED),
        ("/", DENIED),
        ("//", MALFORMED),
        ("/./Read", MALFORMED),
        ("/../Read", MALFORMED),
        ("/%20/Read", MALFORMED),
        ("/bank.Accounts/", MALFORMED),
        ("/bank.Accounts", DENIED),
        ("/bank.Accounts//Read", MALFORMED),
        ("/bank.Accounts/Read/", MALFORMED),
        ("//bank.Accounts/Read", MALFORMED),
        ("/bank.accounts/Read", DENIED),
        ("/bank.Accounts/read", DENIED),
        ("/bank%2EAccounts/Read", MALFORMED),
        ("/.bank.Accounts/Read", DENIED),
        ("/bank..Accounts/Read", DENIED),
        ("/Accounts/Read", DENIED),
        ("/bank.Accounts/Read?x=1", MALFORMED),
        ("/bank.Accounts/Read;x", MALFORMED),
        ("*", MALFORMED),
    ] {
        let told = read(&world, path, &about("alice")).await;
        assert!(matches!(told, Ended::Status(..)), "{path}: {told:?}");
        told.refused(code);
        assert_eq!(world.last().target, path);
    }
    assert_eq!(world.seen().len(), before, "{:?}", world.seen().last());
    world.end().await;
}

/// The same by what sidecars speak among themselves, and by HTTP/1.1.
#[tokio::test]
async fn policy_22_no_protocol_has_a_path_without_its_slash() {
    let world = world().await;
    let web = world.authority.issue("/service/web");
    let short = |bytes: &[u8]| [&[u8::try_from(bytes.len()).unwrap()], bytes].concat();
    let long = |bytes: &[u8]| [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
    for path in ["bank.Accounts/Read", "", "*", "https://accounts/bank.Accounts/Read"] {
        let token = world.chain(&web, "alice", "POST", path);
        let fields = [("host", "accounts"), ("content-type", "application/grpc"), ("txn-token", &token)];
        let mut head = [short(b"POST"), long(path.as_bytes()), vec![fields.len() as u8]].concat();
        for (name, value) in fields {
            head.push(name.len() as u8);
            head.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
            head.extend([name.as_bytes(), value.as_bytes()].concat());
        }
        let frame = |kind: u8, payload: &[u8]| {
            let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
            [&length[..], &[kind, 0, 0, 0, 1], payload].concat()
        };
        let request = [frame(0, &head), frame(0x82, &framed(&about("alice")))].concat();
        let line = format!(
            "POST {path} HTTP/1.1\r\nhost: accounts\r\ncontent-type: application/grpc\r\nconnection: close\r\n\
             transfer-encoding: chunked\r\ntxn-token: {token}\r\n\r\n0\r\n\r\n"
        );
        for (alpn, bytes) in [(&b"palisade-mux/1"[..], request), (b"http/1.1", line.into_bytes())] {
            let mut stream = world.connect(&web, alpn).await;
            stream.write_all(&bytes).await.unwrap();
            let mut heard = Vec::new();
            let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut heard));
            let _reset = read.await.expect("neither an answer nor an end");
            // A refusal of a call is in its head's `grpc-status`, one of no request has a status of its own, or none.
            let heard = String::from_utf8_lossy(&heard);
            assert!(!heard.contains("grpc-status: 0"), "{path:?}: {heard}");
        }
    }
    assert!(world.seen().is_empty(), "{:?}", world.seen());
    world.end().await;
}

#[tokio::test]
async fn policy_23_24_a_message_that_can_be_read_in_two_ways_reaches_no_app() {
    let world = world().await;
    let account = |id: &[u8]| message(&[(1, id)]);
    let (alice, bob) = (account(b"alice"), account(b"bob"));
    let any = message(&[(1, b"type.googleapis.com/bank.Account"), (2, &alice)]);
    for (method, bytes, code) in [
        // The singular field twice, in either order; inside it as well.
        ("Read", message(&[(1, &alice), (1, &bob)]), MALFORMED),
        ("Read", message(&[(1, &bob), (1, &alice)]), MALFORMED),
        ("Read", message(&[(1, &message(&[(1, b"alice"), (1, b"bob")]))]), MALFORMED),
        ("Read", message(&[(1, &alice), (1, &message(&[(2, b"x")]))]), MALFORMED),
        // Two of a oneof, or one of it twice.
        ("Pay", message(&[(3, b"alice"), (4, b"bob")]), MALFORMED),
        ("Pay", message(&[(4, b"bob"), (3, b"alice")]), MALFORMED),
        ("Pay", message(&[(3, b"alice"), (3, b"bob")]), MALFORMED),
        ("Pay", message(&[(4, b"alice")]), MALFORMED),
        // A field that the files do not have; an object in what says for itself what it is.
        ("Read", message(&[(1, &alice), (9, b"bob")]), MALFORMED),
        ("Read", message(&[(1, &message(&[(1, b"alice"), (7, b"bob")]))]), MALFORMED),
        ("Read", message(&[(5, &any)]), MALFORMED),
        ("Read", about("bob"), DENIED),
        ("Pay", message(&[(3, b"bob")]), DENIED),
        ("Read", about("alice")[..3].to_vec(), MALFORMED),
        ("Read", Vec::new(), MALFORMED),
    ] {
        read(&world, &format!("/bank.Accounts/{method}"), &bytes).await.refused(code);
    }
    // One that is compressed.
    let packed = [&[1][..], &framed(&about("alice"))[1..]].concat();
    call(&world, "/bank.Accounts/Read", packed.into()).await.refused(MALFORMED);
    assert!(world.seen().is_empty(), "{:?}", world.seen());
    // What else is in a message passes unread.
    let good = message(&[(1, &alice), (2, b"a note"), (5, &any)]);
    assert!(
        matches!(read(&world, "/bank.Accounts/Read", &good).await, Ended::Status(code, _) if code == "0")
    );
    assert!(
        matches!(read(&world, "/bank.Accounts/Pay", &message(&[(3, b"alice")])).await, Ended::Status(code, _) if code == "0")
    );
    world.end().await;
}

#[tokio::test]
async fn policy_25_an_object_that_changes_in_a_later_message_never_reaches_the_app() {
    let world = world().await;
    // An answer has begun by then, or none has.
    for waits in [true, false] {
        let mut call = Call::to(&world, "/bank.Accounts/Follow").await;
        call.say(&about("alice"));
        let (sender, mut heard) = mpsc::unbounded_channel();
        let hears = hears(call.answer, sender);
        let says = async {
            if waits {
                assert_eq!(heard.recv().await.unwrap(), about("alice"));
            }
            for account in ["bob", "alice"] {
                let _gone = call.send.send_data(framed(&about(account)), false);
            }
            // Open from this side: the call does not end by itself.
            call.send
        };
        let (ended, _open) = futures::future::join(hears, says).await;
        ended.refused(DENIED);
        let denial = world.last();
        assert_eq!((denial.rule.name(), denial.target.as_str()), ("none", "/bank.Accounts/Follow"));
        assert_eq!(denial.objects[0].object, "Accounts::Account::\"bob\"");
        let Ended::Status(_, words) = ended else { unreachable!() };
        assert!(words.ends_with(denial.receipt.as_str()), "{words}");
    }
    let seen = world.seen();
    assert!(seen.iter().filter(|seen| seen.body == "asked").count() <= 2);
    for seen in seen {
        assert!(seen.body == "asked" || seen.body.ends_with("alice"), "{seen:?}");
    }
    world.end().await;
}

/// The owner of an account, as it is written to the relations.
fn owned(id: &str, owner: &str) -> (String, String, Option<String>) {
    ("Account".to_owned(), id.to_owned(), Some(format!("{{\"owner\":\"{owner}\"}}")))
}

#[tokio::test]
async fn a_stream_is_judged_again_when_relations_change() {
    let map = MAP.replace("owner = \"body:/account.id\"", "owner = \"relations\"");
    let map =
        format!("relations = \"store\"\n{}", map.replace("owner = \"body:/card\"", "owner = \"relations\""));
    let world = with_map(&map).await;
    let relations = world.sidecar.relations();
    relations.take("e1", 1, None, [owned("17", "alice"), owned("18", "alice")]).unwrap();
    relations.as_of(world.clock.now());

    let begin = async |account: &str| {
        let mut call = Call::to(&world, "/bank.Accounts/Follow").await;
        call.say(&about(account));
        let (sender, mut heard) = mpsc::unbounded_channel();
        let ended = tokio::spawn(hears(call.answer, sender));
        assert_eq!(heard.recv().await, Some(about(account)));
        (call.send, heard, ended)
    };
    let (_silent, _, mut of_17) = begin("17").await;
    let (mut talking, mut heard, _goes_on) = begin("18").await;

    // What does not matter to a stream ends none, and what is said on is judged by what is true then.
    relations.take("e1", 2, Some(1), [owned("42", "bob")]).unwrap();
    talking.send_data(framed(&about("18")), false).unwrap();
    assert_eq!(heard.recv().await, Some(about("18")));
    assert!(!of_17.is_finished());

    // Nobody says anything, and the policy stays the same.
    relations.take("e1", 3, Some(2), [owned("17", "bob")]).unwrap();
    match (&mut of_17).await.unwrap() {
        Ended::Reset => {}
        told => told.refused(DENIED),
    }
    let denial = world.last();
    assert_eq!(
        (denial.rule.name(), denial.objects[0].object.as_str()),
        ("none", "Accounts::Account::\"17\"")
    );
    assert_eq!(denial.objects[0].told_by["owner"], "relations at revision 3");
    talking.send_data(framed(&about("18")), false).unwrap();
    assert_eq!(heard.recv().await, Some(about("18")));

    // The message behind the change is not sent.
    let before = world.seen().len();
    relations.take("e1", 4, Some(3), [("Account".to_owned(), "18".to_owned(), None)]).unwrap();
    let _gone = talking.send_data(framed(&about("18")), false);
    assert_eq!(heard.recv().await, None);
    assert_eq!(world.seen().len(), before, "{:?}", world.seen().last());
    world.end().await;
}

#[tokio::test]
async fn a_stream_goes_on_under_a_policy_that_asks_no_relations() {
    let map = MAP.replace("owner = \"body:/account.id\"", "owner = \"relations\"");
    let world = with_map(&format!("relations = \"store\"\n{map}")).await;
    let relations = world.sidecar.relations();
    relations.take("e1", 1, None, [owned("alice", "alice"), owned("17", "alice")]).unwrap();
    relations.as_of(world.clock.now());
    let begin = async |account: &str| {
        let mut call = Call::to(&world, "/bank.Accounts/Follow").await;
        call.say(&about(account));
        let (sender, mut heard) = mpsc::unbounded_channel();
        let ended = tokio::spawn(hears(call.answer, sender));
        assert_eq!(heard.recv().await, Some(about(account)));
        (call.send, heard, ended)
    };
    let (mut named, mut heard, _goes_on) = begin("alice").await;
    let (_silent, _, other) = begin("17").await;
    // Now an account is whose it is called after, and nobody keeps relations any more.
    let (_folder, after) = policies(&files_with(MAP));
    world.sidecar.replace_policy(after.service("accounts").unwrap());
    match other.await.unwrap() {
        Ended::Reset => {}
        told => told.refused(DENIED),
    }
    named.send_data(framed(&about("alice")), true).unwrap();
    assert_eq!(heard.recv().await, Some(about("alice")));
    assert_eq!(heard.recv().await, None);
    world.end().await;
}

#[tokio::test]
async fn metrics_say_how_many_and_how_old_the_relations_are() {
    let map = format!(
        "relations = \"store\"\n{}",
        MAP.replacen("owner = \"body:/account.id\"", "owner = \"relations\"", 1)
    );
    let world = with_map(&map).await;
    let metrics = async || {
        let mut stream = tokio::net::TcpStream::connect(world.admin).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut told = String::new();
        stream.read_to_string(&mut told).await.unwrap();
        told.lines()
            .filter(|line| line.starts_with("palisade_relations_"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(metrics().await, Vec::<String>::new(), "none is not nothing");
    let relations = world.sidecar.relations();
    relations.take("e1", 1796131234567, None, [owned("17", "alice"), owned("18", "alice")]).unwrap();
    let known = ["palisade_relations_objects 2", "palisade_relations_revision 1796131234567"];
    assert_eq!(metrics().await, known, "of no known age");
    relations.as_of(world.clock.now() - Duration::from_secs(3));
    let told = metrics().await;
    assert_eq!(told[..2], known);
    let age: f64 = told[2].strip_prefix("palisade_relations_age_seconds ").unwrap().parse().unwrap();
    assert!((3.0..30.0).contains(&age), "{age}");
    world.end().await;
}
