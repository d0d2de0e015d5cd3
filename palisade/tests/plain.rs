//! A service whose app speaks a protocol of its own, through two sidecars that their files tell so; and the way in for
//! another mesh's proxies.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its stage has failed")]

mod stage;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use stage::{DEADLINE, Stage, free_addresses};

const GREETING: &[u8] = b"220 at your service\r\n";
const LARGE_BYTES: usize = 4 << 20;

fn policies() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plain/policies")
}

/// Speaks first, as mail and database servers do, then says everything back.
fn app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                stream.write_all(GREETING)?;
                std::io::copy(&mut stream.try_clone()?, &mut stream)?;
                stream.shutdown(Shutdown::Write)
            });
        }
    });
    address
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// What is heard until the other side ends, in order or not.
fn heard(mut stream: TcpStream) -> Vec<u8> {
    let mut heard = Vec::new();
    let _how_it_ended = stream.read_to_end(&mut heard).is_ok();
    heard
}

fn plain_stage() -> Stage {
    let stage = Stage::before(app(), &policies());
    stage.amend("server", "[inbound]\n", "[inbound]\napp_protocol = \"tcp\"\n");
    stage.amend("client", "listen = ", "protocol = \"tcp\"\nlisten = ");
    stage
}

#[test]
fn an_app_of_its_own_protocol_is_reached_until_a_policy_denies_it() {
    let stage = plain_stage();
    let (server, _client) = (stage.start("server"), stage.start("client"));
    let large: Vec<u8> = (0..LARGE_BYTES).map(|n| (n % 251) as u8).collect();
    for _ in 0..3 {
        let stream = connect(stage.client);
        let (mut writer, sent) = (stream.try_clone().unwrap(), large.clone());
        let writing = thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let heard = heard(stream);
        writing.join().unwrap();
        assert!(heard.strip_prefix(GREETING) == Some(&large[..]), "{} bytes", heard.len());
    }

    let mut open = connect(stage.client);
    let mut greeting = vec![0; GREETING.len()];
    open.read_exact(&mut greeting).unwrap();
    let rules = stage.path("policies/services/backend/backend.cedar");
    let text = fs::read_to_string(&rules).unwrap();
    fs::write(&rules, text.replace("sa/client", "sa/other")).unwrap();
    server.hang_up();
    assert_eq!(heard(open), b"", "it is ended");
    assert_eq!(heard(connect(stage.client)), b"", "and the next one never begins");
}

/// Passes connections on to `door`, and says first that they come from somewhere else.
fn balancer(door: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut near in listener.incoming().map_while(Result::ok) {
            let mut far = TcpStream::connect(door).unwrap();
            write!(far, "PROXY TCP4 203.0.113.7 192.0.2.1 40123 443\r\n").unwrap();
            let (mut from_far, mut to_near) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            // Either way ends as its connection does.
            thread::spawn(move || std::io::copy(&mut from_far, &mut to_near).is_ok());
            thread::spawn(move || std::io::copy(&mut near, &mut far).is_ok());
        }
    });
    address
}

#[test]
fn a_balancer_says_where_a_connection_comes_from_and_must() {
    let stage = plain_stage();
    stage.amend("server", "[inbound]\n", "[inbound]\nproxy_protocol_from = [\"127.0.0.0/8\"]\n");
    let text = fs::read_to_string(stage.path("client.toml")).unwrap();
    let door = text.split_once("endpoints = [\"").unwrap().1.split_once('"').unwrap().0;
    stage.amend("client", door, &balancer(door.parse().unwrap()).to_string());
    let (server, _client) = (stage.start("server"), stage.start("client"));
    let stream = connect(stage.client);
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(heard(stream), GREETING);
    server.hears("203.0.113.7:40123");
    // Without its header, nobody is let in.
    let mut bare = connect(door.parse().unwrap());
    bare.write_all(&[0x16, 3, 1, 0, 5]).unwrap();
    assert_eq!(heard(bare), b"");
    server.hears("proxy_protocol.header");
}

#[test]
fn file_and_map_must_agree_on_what_the_app_speaks() {
    let said = |stage: &Stage| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_palisade"));
        let output = command.args(["sidecar", "--config"]).arg(stage.path("server.toml")).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let stage = Stage::before(app(), &policies());
    let untold = said(&stage);
    assert!(
        untold.contains("mapping = \"tcp\"") && untold.contains("add app_protocol = \"tcp\""),
        "{untold}"
    );
    let stage = Stage::new();
    stage.amend("server", "[inbound]\n", "[inbound]\napp_protocol = \"tcp\"\n");
    assert!(said(&stage).contains("map.toml maps requests"));
    stage.amend("server", "[inbound]\n", "[inbound]\nhbone = \"0.0.0.0:9\"\n");
    assert!(said(&stage).contains("hbone_destinations"));
}

#[test]
fn another_meshs_proxy_comes_in_by_hbone() {
    let Ok(found) = Command::new("python3").args(["-c", "import h2.connection"]).status() else {
        return identity::testing::skip("python3 cannot be run");
    };
    if !found.success() {
        return identity::testing::skip("python3 cannot import h2 (pip install h2)");
    }
    let stage = plain_stage();
    let [hbone] = free_addresses();
    stage.amend("server", "[inbound]\n", &format!("[inbound]\nhbone = \"{hbone}\"\n"));
    let text = fs::read_to_string(stage.path("server.toml")).unwrap();
    let app: SocketAddr = text
        .lines()
        .find_map(|line| line.strip_prefix("app = \""))
        .and_then(|address| address.trim_end_matches('"').parse().ok())
        .unwrap();
    let server = stage.start("server");

    let svid = stage.authority.issue("/ns/default/sa/client");
    let folder = stage.path("proxy");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("certificate.der"), svid.leaf_der()).unwrap();
    fs::write(folder.join("key.der"), svid.key_pkcs8()).unwrap();
    fs::write(folder.join("authority.der"), &stage.authority.bundle().authorities()[0]).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sidecar/tests/hbone_client.py");
    let mut command = Command::new("python3");
    let command = command.arg(script).arg(hbone.port().to_string()).arg(&folder);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let connect = |authority: &str| {
        format!(r#"{{"method": "CONNECT", "authority": "{authority}", "send": "hello", "finish": true}}"#)
    };
    let elsewhere = "127.0.0.1:1";
    let streams = format!("[{}, {}]", connect(&app.to_string()), connect(elsewhere));
    child.stdin.take().unwrap().write_all(streams.as_bytes()).unwrap();
    let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let answers: serde_json::Value = serde_json::from_str(&output).unwrap();
    assert_eq!(answers[0]["status"], 200, "{answers}");
    assert_eq!(answers[0]["received"], "220 at your service\r\nhello", "{answers}");
    assert_eq!(answers[1]["status"], 404, "{answers}");
    server.end();
}
