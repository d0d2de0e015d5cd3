//! Relations written by API, from a workload or an operator to the sidecar that decides by them: control, agent and
//! sidecars as a person runs them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test")]
#![allow(clippy::disallowed_methods, reason = "clients of the test are joined by it")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use support::Demo;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The demo and where its state is.
struct Mesh {
    demo: Demo,
    state: PathBuf,
}

impl Mesh {
    /// `palisade relations` as the program of a role, which attests it.
    fn run(&self, role: &str, args: &[&str]) -> Output {
        let mut command = Command::new(self.state.join("bin").join(role));
        command.arg("relations").args(args).arg("--config").arg(self.state.join("mesh.toml"));
        command.output().unwrap()
    }

    /// As the service accounts, through its agent.
    fn by_accounts(&self, args: &[&str]) -> Output {
        self.run("accounts-sidecar", &[args, &["--by-agent"]].concat())
    }

    async fn answer(&self, token: &str) -> (u16, String) {
        self.demo.get("/api/accounts/17", Some(token)).await.unwrap()
    }

    /// What the sidecar of accounts says of a refusal that web passed on.
    async fn behind(&self, body: &str) -> String {
        let receipt = body.split('"').find(|part| part.starts_with("r-")).unwrap_or_else(|| panic!("{body}"));
        let explained = self.demo.explain(receipt).await;
        if explained.contains("sidecar of accounts") && !explained.contains("sidecar of web") {
            return explained;
        }
        let behind = explained.lines().find(|line| line.contains("sidecar of accounts"));
        let behind = behind.unwrap_or_else(|| panic!("{explained}"));
        self.demo.explain(behind.split_whitespace().next().unwrap()).await
    }

    async fn until_answered(&self, token: &str, status: u16) -> String {
        let mut last = String::new();
        self.demo
            .until(&format!("{status} is answered"), async || {
                let (code, body) = self.answer(token).await;
                last = body;
                code == status
            })
            .await;
        last
    }
}

const ALICES: [&str; 4] = ["write", "accounts", "Account::\"17\"", "owner=alice"];

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_decides_what_is_deleted_denies_and_what_is_old_is_not_believed() {
    let folder = tempfile::Builder::new().prefix("palisade-relations").tempdir().unwrap();
    let state = folder.path().join("state");
    identity::files::private_directory(&state).unwrap();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bank/policies"), &state.join("policies"));
    let map = state.join("policies/services/accounts/map.toml");
    let text = std::fs::read_to_string(&map).unwrap();
    std::fs::write(&map, format!("relations = \"store\"\n{}", text.replace("response:/owner", "relations")))
        .unwrap();
    // The demo leaves alone what is not what it put there.
    std::fs::write(state.join("policies/.shipped"), "changed").unwrap();
    let demo = Demo::start_in(folder.path(), &[]).await;
    let mesh = Mesh { demo, state };
    let token = mesh.demo.token("alice");

    // Nothing is written of it: denied. The service writes by its own identity: allowed.
    let body = mesh.until_answered(&token, 403).await;
    let why = mesh.behind(&body).await;
    assert!(why.contains("is not among the relations") || why.contains("relations.stale"), "{why}");
    let written = mesh.by_accounts(&[&ALICES[..], &["--json"]].concat());
    assert!(written.status.success(), "{}", said(&written));
    let first: Value = serde_json::from_slice(&written.stdout).unwrap();
    assert!(first["token"].as_str().unwrap().starts_with("r1."), "{first}");
    mesh.until_answered(&token, 200).await;
    let read = mesh.run("agent", &["read", "accounts", "Account::\"17\"", "--json"]);
    let read: Value = serde_json::from_slice(&read.stdout).unwrap();
    assert_eq!(read["relation"]["by"], "spiffe://bank.example/service/accounts", "{read}");
    assert_eq!(read["relation"]["revision"], first["revision"]);

    // Another service may not, and that is recorded.
    let refused = mesh.run("web-sidecar", &[&ALICES[..], &["--by-agent"]].concat());
    assert_eq!(refused.status.code(), Some(3), "{}", said(&refused));
    let words = said(&refused);
    let receipt = words.split(|c: char| !c.is_alphanumeric() && c != '-').find(|part| part.starts_with("r-"));
    let recorded = mesh.demo.explain(receipt.unwrap_or_else(|| panic!("{words}"))).await;
    assert!(recorded.contains("relations.not_a_writer") && recorded.contains("service/web"), "{recorded}");

    // Two writers who have read the same revision: one is told.
    let (revision, object) = (first["revision"].to_string(), "Account::\"17\"");
    let given = ["write", "accounts", object, "owner=bob", "--must-be", &revision];
    assert!(mesh.run("agent", &given).status.success());
    assert_eq!(mesh.run("agent", &given).status.code(), Some(1));
    let body = mesh.until_answered(&token, 403).await;
    let why = mesh.behind(&body).await;
    assert!(why.contains("(relations at revision "), "{why}");
    assert!(mesh.run("agent", &ALICES).status.success());
    mesh.until_answered(&token, 200).await;
    let deleted = mesh.by_accounts(&["delete", "accounts", object, "--must-exist"]);
    assert!(deleted.status.success(), "{}", said(&deleted));
    let body = mesh.until_answered(&token, 403).await;
    assert!(mesh.behind(&body).await.contains("is not among the relations at revision"));
    assert!(mesh.run("agent", &ALICES).status.success());
    mesh.until_answered(&token, 200).await;

    // Control falls silent: what is known is believed for five seconds, and no longer.
    let control = mesh.demo.pids()["control"];
    support::signal(control, "STOP");
    let body = mesh.until_answered(&token, 403).await;
    support::signal(control, "CONT");
    let why = mesh.behind(&body).await;
    assert!(why.contains("relations.stale"), "{why}");
    mesh.until_answered(&token, 200).await;
    let status = mesh.demo.palisade(&["status", "--config", mesh.state.join("mesh.toml").to_str().unwrap()]);
    let status = said(&status);
    assert!(
        status.contains("spiffe://bank.example/service/accounts") && status.contains("relations"),
        "{status}"
    );

    // Control is killed while it writes, again and again: nothing that it acknowledged is lost.
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let control = mesh.demo.pids()["control"];
        let writes: Vec<_> = (0..4)
            .map(|n| {
                let id = format!("{round}{n}");
                let (program, config) = (mesh.state.join("bin/agent"), mesh.state.join("mesh.toml"));
                std::thread::spawn(move || {
                    let object = format!("Account::\"9{id}\"");
                    let mut all = Vec::new();
                    for number in 0..20 {
                        let owner = format!("owner={id}-{number}");
                        let mut command = Command::new(&program);
                        command.args([
                            "relations",
                            "write",
                            "accounts",
                            &object,
                            &owner,
                            "--json",
                            "--config",
                        ]);
                        let output = command.arg(&config).output().unwrap();
                        if !output.status.success() {
                            break;
                        }
                        let written: Value = serde_json::from_slice(&output.stdout).unwrap();
                        all.push((
                            object.clone(),
                            owner[6..].to_owned(),
                            written["revision"].as_u64().unwrap(),
                        ));
                    }
                    all
                })
            })
            .collect();
        mesh.demo
            .until("something has been written", async || {
                said(&mesh.run("agent", &["read", "accounts"])).contains(&format!("Account::\"9{round}0\""))
            })
            .await;
        support::signal(control, "KILL");
        for writer in writes {
            acknowledged.extend(writer.join().unwrap());
        }
        mesh.demo
            .until("control is back", async || {
                mesh.demo.pids().get("control").is_some_and(|now| *now != control && support::alive(*now))
                    && mesh.run("agent", &["read", "accounts"]).status.success()
            })
            .await;
        let read = mesh.run("agent", &["read", "accounts", "--json"]);
        let read: Value = serde_json::from_slice(&read.stdout).unwrap();
        for (object, owner, revision) in &acknowledged {
            let id = object.split('"').nth(1).unwrap();
            let kept = read["relations"].as_array().unwrap().iter().find(|kept| kept["id"] == id);
            let kept = kept.unwrap_or_else(|| panic!("{object} of {revision} is lost: {read}"));
            let at = kept["revision"].as_u64().unwrap();
            assert!(
                at > *revision || kept["attributes"]["owner"] == **owner,
                "{object}: {kept}, not {owner}"
            );
        }
    }
    assert!(acknowledged.len() >= 3, "{acknowledged:?}");
    mesh.until_answered(&token, 200).await;
    mesh.demo.stop().await;
}
