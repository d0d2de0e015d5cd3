//! Two sidecars by themselves, as `bench/ours` runs them: a call goes through both, certificates change under
//! load without one call lost, and what is broken changes nothing.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its stage has failed")]

mod stage;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use stage::{Stage, get};

#[test]
fn the_shipped_rules_decide_between_two_that_run_alone() {
    let stage = Stage::new();
    let (server, client) = (stage.start("server"), stage.start("client"));
    assert_eq!(get(stage.client, "/"), (200, "ok".to_owned()));
    for allowed in ["/1k", "/api/1m"] {
        assert_eq!(get(stage.client, allowed).0, 200, "{allowed}");
    }
    // Mapped and not allowed, and not mapped at all.
    for denied in ["/api/2m", "/orders/17", "/nothing"] {
        assert_eq!(get(stage.client, denied).0, 403, "{denied}");
    }
    assert_eq!(get(stage.admin, "/ready").0, 200);
    // Lines are written some time after their requests, the last ones at the end.
    server.end();
    client.end();
    let log = fs::read_to_string(stage.path("server.access.log")).unwrap();
    let by_rule = log.lines().filter(|line| line.contains("\"rule\":\"policy client-reads-index ("));
    assert_eq!(by_rule.count(), 1, "{log}");
    assert_eq!(log.lines().count(), 6, "{log}");
}

#[test]
fn traffic_goes_and_is_limited_as_the_files_say() {
    let stage = Stage::new();
    stage.amend(
        "server",
        "service = \"backend\"\n",
        "service = \"backend\"\nrate_limit = { requests = 3, per = \"1h\" }\nhealth = { check = \"http:/\", every = \"100ms\" }\n",
    );
    let server = stage.start("server");
    let plain = stage.start("client");
    let answers: Vec<_> = (0..5).map(|_| get(stage.client, "/").0).collect();
    assert_eq!(answers, [200, 200, 200, 429, 429]);
    plain.end();
    stage.amend(
        "client",
        "[outbound.backend]\n",
        "[traffic.backend]\nfaults = { abort = 418, abort_share = \"100%\" }\n\n[outbound.backend]\n",
    );
    let faulty = stage.start("client");
    assert_eq!(get(stage.client, "/").0, 418);
    faulty.end();
    server.end();
}

#[test]
fn new_certificates_are_taken_under_load_without_a_call_lost() {
    const ROTATIONS: usize = 3;
    let stage = Stage::new();
    let (server, client) = (stage.start("server"), stage.start("client"));
    let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let callers: Vec<_> = (0..2)
        .map(|_| {
            let (stop, calls, address) = (Arc::clone(&stop), Arc::clone(&calls), stage.client);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(get(address, "/"), (200, "ok".to_owned()));
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for _ in 0..ROTATIONS {
        let before = calls.load(Ordering::Relaxed);
        for (who, sidecar) in [("server", &server), ("client", &client)] {
            stage.issue(who, &format!("/ns/default/sa/{who}"));
            sidecar.hears("identity read again");
        }
        // Some calls go by under the new identities before the next ones come.
        while calls.load(Ordering::Relaxed) < before + 5 && callers.iter().all(|caller| !caller.is_finished())
        {
            thread::yield_now();
        }
    }
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.join().unwrap();
    }
}

#[test]
fn what_is_broken_changes_nothing_and_policies_change_when_told() {
    let stage = Stage::new();
    let (server, client) = (stage.start("server"), stage.start("client"));
    assert_eq!(get(stage.client, "/").0, 200);

    let good = fs::read(stage.path("server.crt")).unwrap();
    fs::write(stage.path("server.crt"), "no certificate").unwrap();
    server.hears("identity not replaced");
    assert_eq!(get(stage.client, "/").0, 200);
    fs::write(stage.path("server.crt"), good).unwrap();
    server.hears("identity read again");
    // Somebody else's identity, right in itself; met between certificate and key it is refused for that first.
    stage.issue("client", "/ns/default/sa/intruder");
    client.hears("names spiffe://mesh.test/ns/default/sa/intruder, and this process is");
    assert_eq!(get(stage.client, "/").0, 200);

    let rules = stage.path("policies/services/backend/backend.cedar");
    let before = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, "permit (principal").unwrap();
    server.hang_up();
    server.hears("policies not reloaded");
    assert_eq!(get(stage.client, "/").0, 200);
    fs::write(&rules, before.replacen("Page::\"index\"", "Page::\"other\"", 1)).unwrap();
    server.hang_up();
    server.hears("policies reloaded");
    assert_eq!(get(stage.client, "/").0, 403);
}

/// An older binary meets what a newer one was written for.
#[test]
fn policy_36_38_a_part_that_is_not_known_and_a_template_change_nothing_and_are_named() {
    let stage = Stage::new();
    let (server, _client) = (stage.start("server"), stage.start("client"));
    let folder = stage.path("policies/services/backend");
    let (rules, map) = (folder.join("backend.cedar"), folder.join("map.toml"));
    let (before, mapped) = (fs::read_to_string(&rules).unwrap(), fs::read_to_string(&map).unwrap());
    // Each closes what is open, and brings something that this one does not know.
    let closed = format!("{before}\n@id(\"closed\")\nforbid (principal, action, resource);\n");
    let template =
        format!("{closed}@id(\"t\") permit (principal == ?principal, action, resource in ?resource);\n");
    let newer = format!("{mapped}\nquota = 5\n");
    for (rules_now, map_now, extra, why) in [
        (&closed, &newer, None, "unknown key `quota`"),
        (&template, &mapped, None, "a template"),
        (&closed, &mapped, Some("quotas.toml"), "quotas.toml: not a file of a service"),
    ] {
        fs::write(&rules, rules_now).unwrap();
        fs::write(&map, map_now).unwrap();
        if let Some(extra) = extra {
            fs::write(folder.join(extra), "").unwrap();
        }
        server.hang_up();
        let said = server.hears("policies not reloaded");
        assert!(said.contains(why), "{said}");
        assert_eq!(get(stage.client, "/").0, 200, "what was in force stays");
        if let Some(extra) = extra {
            fs::remove_file(folder.join(extra)).unwrap();
        }
    }
    fs::write(&map, &mapped).unwrap();
    server.hang_up();
    server.hears("policies reloaded");
    assert_eq!(get(stage.client, "/").0, 403);
}

#[test]
fn nothing_starts_without_an_identity_that_is_whole() {
    let stage = Stage::new();
    let refused = |why: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_palisade"))
            .args(["sidecar", "--config"])
            .arg(stage.path("server.toml"))
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains(why), "{said}");
    };
    fs::copy(stage.path("client.crt"), stage.path("server.crt")).unwrap();
    refused("the private key does not fit the certificate");
    fs::remove_file(stage.path("server.key")).unwrap();
    refused("there is no file `server.key`");
}

#[test]
fn a_tap_shows_denials_as_they_happen_and_ends_when_it_has_seen_enough() {
    let stage = Stage::new();
    let (server, client) = (stage.start("server"), stage.start("client"));
    let mut tap = Command::new(env!("CARGO_BIN_EXE_palisade"))
        .args(["tap", "--verdict", "deny", "--path", "/api/*", "-n", "2", "--config"])
        .arg(stage.path("server.toml"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = BufReader::new(tap.stdout.take().unwrap()).lines().map(Result::unwrap);
    let heading = shown.next().unwrap();
    assert!(heading.starts_with("time") && heading.contains("verdict"), "{heading}");
    for target in ["/api/2m", "/", "/nothing", "/api/3m"] {
        get(stage.client, target);
    }
    let shown: Vec<String> = shown.collect();
    assert!(tap.wait().unwrap().success());
    let request = |row: &'_ String| row.split("  ").find(|cell| cell.starts_with("GET ")).map(str::to_owned);
    let requests: Vec<String> = shown.iter().filter_map(request).collect();
    assert_eq!(requests, ["GET /api/2m", "GET /api/3m"], "{shown:#?}");
    assert!(shown.iter().all(|row| row.contains("deny") && !row.contains('\u{1b}')), "{shown:#?}");
    server.end();
    client.end();
}
