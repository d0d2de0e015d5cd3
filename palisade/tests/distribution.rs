//! Policies from a git repository to every process that decides by them: control, agent, sidecars, gateway and vault
//! as a person runs them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test")]
#![allow(clippy::disallowed_methods, reason = "clients of the test are joined by it")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use identity::testing::skip;
use support::Demo;

/// The bank's policies as a repository of their own.
struct Repository(PathBuf);

impl Repository {
    fn new(directory: PathBuf) -> Self {
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bank/policies"), &directory);
        let repository = Self(directory);
        repository.git(&["init", "--quiet", "--initial-branch", "main"]);
        repository.commit("the bank's policies");
        repository
    }

    fn git(&self, args: &[&str]) -> String {
        let who = ["-c", "user.name=alice", "-c", "user.email=alice@bank.example"];
        let output = Command::new("git").arg("-C").arg(&self.0).args(who).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn commit(&self, message: &str) -> String {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--message", message]);
        self.git(&["rev-parse", "HEAD"])
    }

    fn append(&self, file: &str, text: &str) {
        let path = self.0.join(file);
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(path, before + text).unwrap();
    }
}

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

/// A verb about the running demo.
fn about(demo: &Demo, args: &[&str]) -> Output {
    let mesh = format!("{}/mesh.toml", demo.ready()["state"].as_str().unwrap());
    demo.palisade(&[args, &["--config", &mesh]].concat())
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_is_in_force_everywhere_and_what_is_wrong_nowhere() {
    if Command::new("git").arg("--version").output().is_err() {
        return skip("`git` is not installed");
    }
    let folder = tempfile::Builder::new().prefix("palisade-distribution").tempdir().unwrap();
    let state = folder.path().join("state");
    identity::files::private_directory(&state).unwrap();
    let repository = Repository::new(state.join("policies"));
    let first = repository.git(&["rev-parse", "HEAD"]);
    let demo = Demo::start_in(folder.path(), &[]).await;
    let wait = |commit: &str| about(&demo, &["policy", "wait", commit, "--timeout", "60s"]);
    let answer = async |token: &str| demo.get("/api/accounts/17", Some(token)).await.unwrap();

    // The demo is healthy with them: gateway, vault and three sidecars have what was committed.
    let waited = wait(&first);
    assert!(waited.status.success(), "{}", said(&waited));
    assert_eq!(String::from_utf8_lossy(&waited.stdout), format!("{first} is in force in 5 of 5\n"));
    let status = said(&about(&demo, &["status"]));
    let line = |status: &str, service: &str| {
        let line = status.lines().find(|line| line.trim_start().starts_with(service) && line.contains('#'));
        line.unwrap_or_else(|| panic!("{service} in {status}")).to_owned()
    };
    for service in ["accounts", "gateway", "payments", "vault", "web"] {
        let line = line(&status, service);
        assert!(line.contains(&first[..12]) && line.contains("as it should be"), "{line}");
    }
    let token = demo.token("alice");
    assert_eq!(answer(&token).await.0, 200);

    // A commit that closes something: no signal, no restart; the receipt names the commit.
    let file = "services/accounts/accounts.cedar";
    repository.append(file, "\n@id(\"closed\")\nforbid (principal, action, resource);\n");
    let closed = repository.commit("closed");
    let waited = wait(&closed[..9]);
    assert!(waited.status.success(), "{}", said(&waited));
    let (denied, body) = answer(&token).await;
    assert_eq!(denied, 403, "{body}");
    let receipt = body.split('"').find(|part| part.starts_with("r-")).unwrap_or_else(|| panic!("{body}"));
    let explained = demo.explain(receipt).await;
    // Nothing changed for web: what it decides by is from the commit that did.
    assert!(explained.contains(&first[..12]), "{explained}");
    let behind = explained.lines().find(|line| line.contains("sidecar of accounts")).unwrap();
    let explained = demo.explain(behind.split_whitespace().next().unwrap()).await;
    assert!(explained.contains("policy closed") && explained.contains(&closed[..12]), "{explained}");

    // One that cannot be read goes nowhere, and says where it is wrong.
    repository.append(file, "permit (principal, action,\n");
    let broken = repository.commit("broken");
    demo.until("the broken commit is known", async || {
        said(&about(&demo, &["status"])).contains("not taken from the repository")
    })
    .await;
    let waited = about(&demo, &["policy", "wait", &broken, "--timeout", "1s"]);
    assert_eq!(waited.status.code(), Some(1));
    let waited = about(&demo, &["policy", "wait", &closed, "--json"]);
    let told: serde_json::Value = serde_json::from_slice(&waited.stdout).unwrap();
    assert_eq!((&told["state"], &told["holders"]), (&"in_force".into(), &5.into()), "{told}");
    let waited = about(&demo, &["policy", "wait", &broken, "--json"]);
    let told: serde_json::Value = serde_json::from_slice(&waited.stdout).unwrap();
    assert_eq!((waited.status.code(), &told["state"]), (Some(1), &"refused".into()), "{told}");
    let status = said(&about(&demo, &["status"]));
    assert!(status.contains("services/accounts/accounts.cedar:"), "{status}");
    assert_eq!(answer(&token).await.0, 403, "what was in force stays");

    // Back, without the repository.
    let back = about(&demo, &["policy", "roll-back", &first[..12], "--json"]);
    assert!(back.status.success(), "{}", said(&back));
    let told: serde_json::Value = serde_json::from_slice(&back.stdout).unwrap();
    assert!(told["epoch"].as_u64().is_some(), "{told}");
    assert!(wait(&first).status.success());
    assert_eq!(answer(&token).await.0, 200);

    // The gateway and the vault hear of commits as sidecars do.
    repository.git(&["revert", "--no-edit", "HEAD", "HEAD~1"]);
    repository
        .append("services/gateway/gateway.cedar", "\n@id(\"shut\")\nforbid (principal, action, resource);\n");
    let shut = repository.commit("the front door is shut");
    assert!(wait(&shut).status.success());
    assert_eq!(answer(&token).await.0, 403);

    // A sidecar that starts while control is away has what was in force.
    let control = demo.pids()["control"];
    support::signal(control, "STOP");
    let sidecar = demo.pids()["accounts-sidecar"];
    support::signal(sidecar, "KILL");
    demo.until("the sidecar is back", async || {
        demo.pids().get("accounts-sidecar").is_some_and(|now| *now != sidecar && support::alive(*now))
    })
    .await;
    let log = PathBuf::from(demo.ready()["state"].as_str().unwrap()).join("logs/accounts-sidecar.log");
    let commit = format!("\"commit\":\"{shut}\"");
    let times = || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.lines().filter(|line| line.contains("policies in force") && line.contains(&shut)).count()
    };
    demo.until(&format!("{commit} is in force again"), async || times() == 2).await;
    support::signal(control, "CONT");
    demo.stop().await;
}
