//! Protocols through two sidecars by independent clients and apps: gRPC, server-sent events, and requests that hide
//! others.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its stage has failed")]

mod script;
mod stage;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use script::Script;
use serde_json::Value;
use stage::Stage;

fn policies() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wire/policies")
}

/// Two sidecars before an app at the port that a script says.
fn before(app: &Script) -> Stage {
    Stage::before(format!("127.0.0.1:{}", app.says()).parse().unwrap(), &policies())
}

/// The records of an access log that are of requests.
fn requests(stage: &Stage, who: &str) -> Vec<Value> {
    let log = fs::read_to_string(stage.path(&format!("{who}.access.log"))).unwrap();
    let records = log.lines().map(|line| serde_json::from_str(line).unwrap());
    records.filter(|record: &Value| !record["path"].is_null()).collect()
}

#[test]
fn grpc_calls_of_every_kind_pass_and_each_is_decided() {
    let Some(app) = Script::start("wire/ledger.py", "grpc", &["app"]) else { return };
    let stage = before(&app);
    stage.amend("server", "service = \"backend\"\n", "service = \"backend\"\napp_protocol = \"h2c\"\n");
    let (server, _client) = (stage.start("server"), stage.start("client"));
    let mut calls =
        Script::start("wire/ledger.py", "grpc", &["call", &stage.client.port().to_string()]).unwrap();
    for part in ["unary", "streams", "conversation", "failures", "cancelled a stream"] {
        assert_eq!(calls.says(), part);
    }
    assert_eq!(app.says(), "cancelled");
    assert_eq!(calls.says(), "asks");
    assert_eq!(app.says(), "asked");
    calls.tell("asked");
    assert_eq!(calls.says(), "cancelled a call");
    assert_eq!(app.says(), "cancelled");
    for part in ["cancellations", "crowd", "refusals", "asks with a deadline"] {
        assert_eq!(calls.says(), part);
    }
    assert_eq!(app.says(), "asked");
    assert_eq!(app.says(), "cancelled");
    calls.tell("asked");
    for part in ["deadlines", "large_messages", "objects", "change"] {
        assert_eq!(calls.says(), part);
    }
    let policies = stage.path("policies/services/backend/backend.cedar");
    let text = fs::read_to_string(&policies).unwrap();
    let less = text.replace(" || resource == Backend::Account::\"42\"", "");
    assert_ne!(less, text);
    fs::write(&policies, less).unwrap();
    server.hang_up();
    server.hears("policies reloaded");
    calls.tell("changed");
    assert_eq!(calls.ends(), ["policies_that_change"]);
    server.end();
    let records = requests(&stage, "server");
    let of = |verdict: &'static str| records.iter().filter(move |record| record["verdict"] == verdict);
    let is_of = |record: &Value, service: &str| record["path"].as_str().unwrap().starts_with(service);
    let ledger = |verdict| of(verdict).filter(|record| is_of(record, "/bank.Ledger/"));
    assert!(
        ledger("allow").all(|record| record["rule"].as_str().unwrap().contains("client-calls-all-but-drop"))
    );
    let accounts: Vec<_> = of("allow").filter(|record| is_of(record, "/bank.Accounts/")).collect();
    assert!(accounts.len() >= 4, "{accounts:?}");
    assert!(
        accounts.iter().all(|record| record["rule"].as_str().unwrap().contains("client-reads-two-accounts"))
    );
    assert!(accounts.iter().any(|record| record["objects"] == "Backend::Account::\"42\""), "{accounts:?}");
    assert!(
        of("allow").any(|record| record["objects"].as_str().unwrap().contains("Procedure::\"Converse\""))
    );
    assert!(of("deny").any(|record| record["objects"].as_str().unwrap().contains("Procedure::\"Drop\"")));
    // Not a word of what was refused.
    assert_eq!(app.ends_now(), Vec::<String>::new());
}

#[test]
fn server_sent_events_arrive_one_by_one_and_a_reader_that_leaves_ends_its_stream() {
    let Some(mut both) = Script::start("wire/events.py", "http.client", &[]) else { return };
    let stage = before(&both);
    let (_server, _client) = (stage.start("server"), stage.start("client"));
    both.tell(&stage.client.port().to_string());
    assert_eq!(both.ends(), ["one_by_one", "many", "long", "leaving", "refusal"]);
}

#[test]
fn gateway_30_security_21_what_the_app_sees_was_authorized_whatever_hides_in_what() {
    let Some(mut smuggler) = Script::start("wire/smuggler.py", "h2.connection", &[]) else { return };
    let stage = before(&smuggler);
    let (server, client) = (stage.start("server"), stage.start("client"));
    let folder = stage.path("");
    smuggler.tell(&format!("{} {} {}", stage.client.port(), stage.door.port(), folder.display()));
    let told = smuggler.ends();
    server.end();
    client.end();
    let told: Value = serde_json::from_str(&told.concat()).unwrap();
    assert_eq!(told["wrong"], Value::Array(Vec::new()), "{:#}", told["wrong"]);
    assert!(told["tried"].as_u64().unwrap() > 200);
    // Neither sidecar took what was hidden for a request, not even for one to refuse.
    for who in ["client", "server"] {
        let hidden = requests(&stage, who).into_iter().find(|record| record["path"] == "/pages/smuggled");
        assert_eq!(hidden, None);
    }
    // What the app saw is what was allowed, one for one.
    let count = |paths: Vec<&str>| {
        let mut counts = BTreeMap::<String, usize>::new();
        paths.into_iter().for_each(|path| *counts.entry(path.to_owned()).or_default() += 1);
        counts
    };
    let records = requests(&stage, "server");
    let allowed = records.iter().filter(|record| record["verdict"] == "allow");
    let allowed = count(allowed.map(|record| record["path"].as_str().unwrap()).collect());
    let seen = count(told["seen"].as_array().unwrap().iter().map(|path| path.as_str().unwrap()).collect());
    assert_eq!(seen, allowed);
    assert!(allowed["/pages/own"] > 50, "{allowed:?}");
}
