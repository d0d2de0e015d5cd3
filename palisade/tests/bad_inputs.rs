//! What is wrong is refused with its place or its name and a next step, and nothing is half-started:
//! after each refusal the directory holds what it held before, byte for byte but for the inside of databases,
//! and no process lives in it.
//!
//! The whole of what is printed is compared with `tests/expected/bad_inputs/NAME.txt`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its stage has failed")]

mod shown;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use shown::Place;

/// Every key that these tests change is on a line of its own. Nothing binds these ports: where a refusal
/// comes after the first is bound, [`Mesh::any_ports`] puts free ones in their place.
const MESH: &str = r#"[mesh]
trust_domain = "bank.example"
policies = "policies"

[control]
listen = "127.0.0.1:4810"
console = "127.0.0.1:4811"
admin_socket = "run/control.sock"
state = "control"

[agent]
socket = "run/agent.sock"
state = "agent"

[gateway]
listen = "127.0.0.1:4812"
routes = { "/" = "web" }
state = "gateway"
attest = { path = "/usr/bin/palisade-gateway" }

[idp]
listen = "127.0.0.1:4813"
users = "users.toml"
state = "idp"
attest = { path = "/usr/bin/palisade-idp" }

[vault]
listen = "127.0.0.1:4814"
operator = "127.0.0.1:4815"
state = "vault"
attest = { path = "/usr/bin/palisade-vault" }

[service.web]
app = "127.0.0.1:4820"
inbound = "127.0.0.1:4821"
admin = "127.0.0.1:4822"
attest = { path = "/usr/bin/web-sidecar" }

[service.accounts]
app = "127.0.0.1:4830"
inbound = "127.0.0.1:4831"
admin = "127.0.0.1:4832"
attest = { path = "/usr/bin/accounts-sidecar" }

[service.payments]
app = "127.0.0.1:4840"
inbound = "127.0.0.1:4841"
admin = "127.0.0.1:4842"
attest = { path = "/usr/bin/payments-sidecar" }
"#;

/// Every verb that serves, as it is started.
const SERVING: [&[&str]; 6] = [
    &["control", "--credentials", "credentials"],
    &["agent", "--credentials", "credentials"],
    &["sidecar", "--service", "accounts"],
    &["gateway", "--credentials", "credentials"],
    &["vault", "--credentials", "credentials"],
    &["idp", "--credentials", "credentials"],
];

/// A mesh in a directory of its own, all of it good until a test spoils a part.
struct Mesh {
    directory: tempfile::TempDir,
}

/// Each path below a directory, with its mode and, for a file that is no database, its bytes.
type Tree = BTreeMap<PathBuf, (u32, Vec<u8>)>;

impl Mesh {
    fn new() -> Self {
        let mesh = Self { directory: tempfile::tempdir().unwrap() };
        mesh.write("mesh.toml", MESH, 0o644);
        copy(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bank/policies"),
            &mesh.path("policies"),
        );
        mesh.folder("credentials", 0o700);
        for name in ["ca-passphrase", "oidc-client-secret", "gateway-session-key"] {
            mesh.write(&format!("credentials/{name}"), "forty-three characters, and not one to spare", 0o600);
        }
        mesh
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    fn folder(&self, name: &str, mode: u32) {
        fs::create_dir_all(self.path(name)).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Spoils a file: `from`, which must be there, becomes `to`.
    fn replace(&self, name: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.path(name)).unwrap();
        assert!(text.contains(from), "{name} has no `{from}`");
        fs::write(self.path(name), text.replacen(from, to, 1)).unwrap();
    }

    fn place(&self) -> Place {
        Place::new(self.directory.path())
    }

    /// The command refuses in the expected words and leaves nothing behind.
    #[track_caller]
    fn refuses(&self, name: &str, args: &[&str]) {
        self.refuses_at(&self.place(), name, args);
    }

    #[track_caller]
    fn refuses_at(&self, place: &Place, name: &str, args: &[&str]) {
        let before = tree(self.directory.path());
        place.expect(&format!("bad_inputs/{name}"), args);
        let after = tree(self.directory.path());
        let paths = before.keys().chain(after.keys());
        let changed: Vec<_> = paths.filter(|path| before.get(*path) != after.get(*path)).collect();
        assert!(changed.is_empty(), "left behind: {changed:?}");
        assert_eq!(living_in(self.directory.path()), Vec::<String>::new(), "still running");
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn tree(directory: &Path) -> Tree {
    let mut found = Tree::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        // A database writes its own header when it is opened, to say that it is in use.
        let database = path.extension().is_some_and(|extension| extension == "redb");
        let bytes = if kind.is_file() && !database { fs::read(&path).unwrap() } else { Vec::new() };
        if kind.is_dir() {
            found.extend(tree(&path));
        }
        found.insert(path, (mode, bytes));
    }
    found
}

/// Processes whose working directory is `directory`: all that a test starts begin there.
fn living_in(directory: &Path) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    processes
        .filter(|process| {
            fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(directory))
        })
        .map(|process| process.file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn a_malformed_mesh_toml_stops_every_verb_in_the_same_words() {
    let mesh = Mesh::new();
    mesh.replace("mesh.toml", "[control]", "[control");
    mesh.refuses("malformed", &["control", "--credentials", "credentials"]);
    let said = |args: &[&str]| mesh.place().shown(args).split_once('\n').unwrap().1.to_owned();
    let first = said(&["control"]);
    for args in SERVING {
        assert_eq!(said(args), first, "{args:?}");
    }
}

#[test]
fn an_unknown_key_stops_a_service_and_comes_with_what_was_meant() {
    let mesh = Mesh::new();
    mesh.replace("mesh.toml", "admin = \"127.0.0.1:4832\"", "admni = \"127.0.0.1:4832\"");
    mesh.refuses("unknown-key", &["sidecar", "--service", "accounts"]);
}

#[test]
fn a_policy_with_a_type_error_is_shown_where_it_is() {
    let mesh = Mesh::new();
    let file = "policies/services/accounts/accounts.cedar";
    mesh.replace(file, "resource.owner == context.user.id", "resource.owner < 3");
    mesh.refuses("type-error", &["policy", "check"]);
    mesh.refuses("type-error-sidecar", &["sidecar", "--service", "accounts"]);
}

#[test]
fn a_policy_that_is_no_cedar_is_shown_where_it_stops_being_cedar() {
    let mesh = Mesh::new();
    mesh.replace("policies/services/web/web.cedar", "permit (", "permit ((");
    mesh.refuses("no-cedar", &["sidecar", "--service", "web"]);
}

#[test]
fn a_route_to_an_unknown_action_comes_with_the_one_that_was_meant() {
    let mesh = Mesh::new();
    mesh.replace("policies/services/accounts/map.toml", "\"ReadAccount\"", "\"ReadAcount\"");
    mesh.refuses("unknown-action", &["sidecar", "--service", "accounts"]);
}

#[test]
fn a_description_of_another_version_is_shown_where_it_says_so() {
    let mesh = Mesh::new();
    mesh.replace("policies/services/accounts/openapi.yaml", "openapi: 3.1.0", "openapi: 3.2.0");
    mesh.refuses("unknown-openapi", &["policy", "check"]);
}

#[test]
fn a_missing_mesh_toml_is_named_with_the_way_to_get_one() {
    let mesh = Mesh::new();
    fs::remove_file(mesh.path("mesh.toml")).unwrap();
    mesh.refuses("no-mesh", &["agent"]);
}

#[test]
fn a_missing_policies_directory_is_shown_where_it_is_named() {
    let mesh = Mesh::new();
    fs::rename(mesh.path("policies"), mesh.path("elsewhere")).unwrap();
    mesh.refuses("no-policies", &["gateway", "--credentials", "credentials"]);
}

#[test]
fn missing_files_are_named() {
    let mesh = Mesh::new();
    mesh.any_ports();
    mesh.refuses("no-users", &["idp", "--credentials", "credentials"]);
    fs::remove_file(mesh.path("policies/services/accounts/map.toml")).unwrap();
    mesh.refuses("no-map", &["sidecar", "--service", "accounts"]);
    for service in ["accounts", "gateway", "vault"] {
        fs::remove_dir_all(mesh.path(&format!("policies/services/{service}"))).unwrap();
    }
    mesh.refuses("no-policy-of-service", &["sidecar", "--service", "accounts"]);
    mesh.refuses("no-policy-of-vault", &["vault"]);
    mesh.refuses("no-policy-of-gateway", &["gateway", "--credentials", "credentials"]);
}

#[test]
fn a_taken_port_is_named_with_who_has_it_and_the_key_that_moves_it() {
    let mesh = Mesh::new();
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port().to_string();
    let comm = fs::read_to_string(format!("/proc/{}/comm", std::process::id())).unwrap();
    let place = mesh
        .place()
        .hiding(format!("process {} ({})", std::process::id(), comm.trim_end()), "process PID (NAME)")
        .hiding(&port, "PORT");
    // Each is the first that its verb binds, so that nothing else of the machine's plays a part.
    let first: [(&str, &str, &[&str]); 5] = [
        ("4811", "taken-console", &["control", "--credentials", "credentials"]),
        ("4812", "taken-gateway", &["gateway", "--credentials", "credentials"]),
        ("4813", "taken-idp", &["idp", "--credentials", "credentials"]),
        ("4814", "taken-vault", &["vault"]),
        ("4831", "taken-sidecar", &["sidecar", "--service", "accounts"]),
    ];
    for (listen, name, args) in first {
        mesh.write("mesh.toml", &MESH.replace(&format!(":{listen}\""), &format!(":{port}\"")), 0o644);
        mesh.refuses_at(&place, name, args);
    }
}

#[test]
fn a_state_directory_that_others_can_enter_is_refused_with_the_command_that_mends_it() {
    let mesh = Mesh::new();
    mesh.any_ports();
    for name in ["demo", "control", "vault"] {
        mesh.folder(name, 0o755);
    }
    mesh.refuses("open-state-of-demo", &["demo", "--state", "demo", "--ready", "ready.json"]);
    mesh.refuses("open-state-of-control", &["control", "--credentials", "credentials"]);
    mesh.refuses("open-state-of-vault", &["vault"]);
}

#[test]
fn a_state_directory_that_is_a_file_is_refused() {
    let mesh = Mesh::new();
    mesh.write("demo", "", 0o600);
    mesh.refuses("state-is-a-file", &["demo", "--state", "demo"]);
}

#[test]
fn a_credential_that_is_missing_or_open_is_refused_with_the_command_that_mends_it() {
    let mesh = Mesh::new();
    mesh.any_ports();
    mesh.refuses("no-credentials", &["control"]);
    mesh.write("credentials/console-token", "a token that others can read", 0o640);
    mesh.refuses("open-console-token", &["control", "--credentials", "credentials"]);
    mesh.write("credentials/ca-passphrase", "a passphrase that others can read", 0o644);
    mesh.refuses("open-passphrase", &["control", "--credentials", "credentials"]);
    fs::remove_file(mesh.path("credentials/gateway-session-key")).unwrap();
    mesh.refuses("no-session-key", &["gateway", "--credentials", "credentials"]);
    mesh.write("credentials/gateway-session-key", "short", 0o600);
    mesh.refuses("short-session-key", &["gateway", "--credentials", "credentials"]);
    mesh.write("credentials/vault-unseal-key", "a key that others can read", 0o604);
    mesh.refuses("open-unseal-key", &["vault", "--credentials", "credentials"]);
}

#[test]
fn an_authority_is_not_opened_with_another_passphrase() {
    let mesh = Mesh::new();
    mesh.any_ports();
    mesh.serve(&["control", "--credentials", "credentials"], |mesh| mesh.path("run/control.sock").exists());
    mesh.write("credentials/ca-passphrase", "not the passphrase of before, but as long", 0o600);
    mesh.refuses("wrong-passphrase", &["control", "--credentials", "credentials"]);
}

#[test]
fn a_vault_is_not_unsealed_with_another_key() {
    let mesh = Mesh::new();
    mesh.any_ports();
    mesh.serve(&["vault"], Mesh::initialized);
    mesh.write("credentials/vault-unseal-key", &"5a".repeat(32), 0o600);
    mesh.refuses("wrong-unseal-key", &["vault", "--credentials", "credentials"]);
    mesh.write("credentials/vault-unseal-key", "no key at all", 0o600);
    mesh.refuses("no-unseal-key", &["vault", "--credentials", "credentials"]);
}

impl Mesh {
    /// Gives what these tests may bind ports that are free now.
    fn any_ports(&self) {
        // Held until all are chosen, so that no two are the same.
        let free: Vec<TcpListener> = (0..6).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let mut text = MESH.to_owned();
        for (n, listener) in free.iter().enumerate() {
            let address = listener.local_addr().unwrap().to_string();
            text = text.replace(&format!("127.0.0.1:481{n}"), &address);
        }
        self.write("mesh.toml", &text, 0o644);
    }

    /// Runs a verb that serves until `done`, then ends it as systemd would.
    fn serve(&self, args: &[&str], done: impl Fn(&Self) -> bool) {
        let log = fs::File::create(self.path("served.log")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_palisade"))
            .args(args)
            .current_dir(self.directory.path())
            .env_remove("CREDENTIALS_DIRECTORY")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.until(&mut child, |_| done(self));
        let asked = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
        assert!(asked.success());
        self.until(&mut child, |child| child.try_wait().unwrap().is_some());
        assert!(child.wait().unwrap().success(), "{}", self.log());
    }

    fn until(&self, child: &mut Child, holds: impl Fn(&mut Child) -> bool) {
        let started = Instant::now();
        while !holds(child) {
            if started.elapsed() > Duration::from_secs(60) {
                let _killed = child.kill();
                panic!("it takes too long: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("served.log")).unwrap_or_default()
    }

    /// Asks the vault's operator to initialize it; not yet, if nobody listens yet.
    fn initialized(&self) -> bool {
        let text = fs::read_to_string(self.path("mesh.toml")).unwrap();
        let operator = text.lines().find_map(|line| line.strip_prefix("operator = ")).unwrap();
        let body = r#"{"secret_shares":1,"secret_threshold":1}"#;
        let Ok(mut stream) = TcpStream::connect(operator.trim_matches('"')) else { return false };
        let request = format!(
            "PUT /v1/sys/init HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        true
    }
}
