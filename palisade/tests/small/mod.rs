//! The smallest mesh there is: control, an agent, and sidecars of `caller` and `echo`, real processes all.
//! `caller` may read things of `echo`; nobody stands behind the requests.

#![allow(dead_code, reason = "not every test program that shares this file needs all of it")]

use std::fs;
use std::io::Read as _;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

#[path = "../ports/mod.rs"]
mod ports;

pub(crate) use ports::free_addresses;

/// A busy machine and a debug build: generous, because it only bounds a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

const POLICIES: [(&str, &str); 6] = [
    (
        "echo/map.toml",
        "[[route]]\nmatch = \"GET /things/{id:int}\"\naction = \"Read\"\nobject = 'Thing::\"{id}\"'\n",
    ),
    (
        "echo/echo.cedarschema",
        "namespace Echo {\n  entity Thing;\n  action Read appliesTo {\n    principal: [Mesh::Workload],\n    \
         resource: [Thing],\n    context: Mesh::Context,\n  };\n}\n",
    ),
    (
        "echo/echo.cedar",
        "@id(\"caller-reads\")\npermit (\n  principal == Mesh::Workload::\"spiffe://small.example/service/caller\",\n  \
         action == Echo::Action::\"Read\",\n  resource is Echo::Thing\n);\n",
    ),
    ("caller/map.toml", "[[route]]\nmatch = \"GET /\"\naction = \"Look\"\nobject = 'Page::\"home\"'\n"),
    (
        "caller/caller.cedarschema",
        "namespace Caller {\n  entity Page;\n  action Look appliesTo {\n    principal: [Mesh::Workload],\n    \
         resource: [Page],\n    context: Mesh::Context,\n  };\n}\n",
    ),
    (
        "caller/caller.cedar",
        "@id(\"echo-looks\")\npermit (\n  principal == Mesh::Workload::\"spiffe://small.example/service/echo\",\n  \
         action == Caller::Action::\"Look\",\n  resource is Caller::Page\n);\n",
    ),
];

/// A mesh in a directory of its own.
pub(crate) struct Mesh {
    home: Home,
    pub(crate) app: SocketAddr,
    /// Where an app of `caller` calls `echo`.
    pub(crate) call: SocketAddr,
    pub(crate) echo_admin: SocketAddr,
    pub(crate) caller_admin: SocketAddr,
    pub(crate) caller_inbound: SocketAddr,
}

impl Deref for Mesh {
    type Target = Home;

    fn deref(&self) -> &Home {
        &self.home
    }
}

impl DerefMut for Mesh {
    fn deref_mut(&mut self) -> &mut Home {
        &mut self.home
    }
}

impl Mesh {
    /// Writes the files; nothing runs yet. `app` is where echo's app listens.
    pub(crate) fn new(app: SocketAddr) -> Self {
        let [control, console, echo, echo_admin, caller_app, caller, caller_admin, call] = free_addresses();
        let mesh = Self { home: Home::new(), app, call, echo_admin, caller_admin, caller_inbound: caller };
        let policies = mesh.path("policies");
        let write = |name: &str, text: &str| {
            let path = policies.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bank/policies/mesh.cedarschema");
        write("mesh.cedarschema", &fs::read_to_string(schema).unwrap());
        for (name, text) in POLICIES {
            write(&format!("services/{name}"), text);
        }
        for name in ["echo", "caller"] {
            fs::hard_link(env!("CARGO_BIN_EXE_palisade"), mesh.path(name)).unwrap();
        }
        let text = format!(
            r#"[mesh]
trust_domain = "small.example"
policies = "policies"

[control]
listen = "{control}"
console = "{console}"
admin_socket = "run/control.sock"
state = "control"

[agent]
socket = "agent.sock"
state = "agent"
host = "here"

[service.echo]
app = "{app}"
inbound = "{echo}"
admin = "{echo_admin}"
attest = {{ path = "echo" }}

[service.caller]
app = "{caller_app}"
inbound = "{caller}"
admin = "{caller_admin}"
calls = {{ echo = "{call}" }}
attest = {{ path = "caller" }}
"#
        );
        fs::write(mesh.path("mesh.toml"), text).unwrap();
        mesh
    }

    /// A mesh whose control and agent run.
    pub(crate) fn start(app: SocketAddr) -> Self {
        let mut mesh = Self::new(app);
        mesh.begin();
        mesh
    }
}

/// A directory with a mesh.toml, and the control and agent that run by it.
pub(crate) struct Home {
    directory: tempfile::TempDir,
    control: Option<Process>,
    agent: Option<Process>,
}

impl Home {
    /// A directory; nothing runs yet, and mesh.toml is yet to be written.
    pub(crate) fn new() -> Self {
        // On the binary's own file system, for the hard links.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let home = Self { directory, control: None, agent: None };
        for directory in ["control-credentials", "agent-credentials"] {
            fs::create_dir(home.path(directory)).unwrap();
        }
        home.secret("control-credentials/ca-passphrase", "forty-three characters, and not one to spare");
        home
    }

    /// Starts control, and the agent of the host `here`.
    pub(crate) fn begin(&mut self) {
        self.start_control();
        let ask = |args: &[&str]| {
            let output = self.palisade(args).stderr(Stdio::inherit()).output().unwrap();
            assert!(output.status.success(), "{args:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let (token, bundle) = (ask(&["token", "create", "here"]), ask(&["token", "bundle"]));
        self.secret("agent-credentials/join-token", token.trim());
        self.secret("agent-credentials/trust-bundle", &bundle);
        self.start_agent();
    }

    pub(crate) fn start_control(&mut self) {
        let process = self.spawn("palisade", &["control", "--credentials", "control-credentials"]);
        process.until_ready();
        self.control = Some(process);
    }

    pub(crate) fn stop_control(&mut self) {
        let mut control = self.control.take().unwrap();
        control.signal("TERM");
        assert_eq!(control.wait().code(), Some(0), "{}", control.log());
    }

    pub(crate) fn start_agent(&mut self) {
        let process = self.spawn("palisade", &["agent", "--credentials", "agent-credentials"]);
        process.until_ready();
        self.agent = Some(process);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn secret(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// A verb that is not supervised, run here.
    pub(crate) fn palisade(&self, args: &[&str]) -> Command {
        self.program("palisade", args)
    }

    /// The binary under the name of a service, which is how the agent tells one from the other.
    pub(crate) fn program(&self, name: &str, args: &[&str]) -> Command {
        let program = match name {
            "palisade" => PathBuf::from(env!("CARGO_BIN_EXE_palisade")),
            name => self.path(name),
        };
        let mut command = Command::new(program);
        command.args(args).current_dir(self.directory.path()).env("NO_COLOR", "1").env_remove("RUST_LOG");
        command
    }

    /// Starts a verb as a service manager does: with a socket that it tells how it is.
    pub(crate) fn spawn(&self, name: &str, args: &[&str]) -> Process {
        self.spawn_as(name, args, |command| command)
    }

    pub(crate) fn spawn_as(
        &self,
        name: &str,
        args: &[&str],
        change: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Process {
        let id = format!("{name}-{}", NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let socket = self.path(&format!("{id}.notify"));
        let heard = UnixDatagram::bind(&socket).unwrap();
        let log = self.path(&format!("{id}.log"));
        let mut command = self.program(name, args);
        command
            .env("NOTIFY_SOCKET", &socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap());
        let child = change(&mut command).spawn().unwrap();
        Process { child, heard, log }
    }

    /// Starts the sidecar of a service and waits until it says that it is ready.
    pub(crate) fn sidecar(&self, service: &str, more: &[&str]) -> Process {
        let process = self.spawn(service, &[&["sidecar", "--service", service], more].concat());
        process.until_ready();
        process
    }
}

static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// A process and what it says.
pub(crate) struct Process {
    child: Child,
    heard: UnixDatagram,
    log: PathBuf,
}

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output, if it was piped.
    pub(crate) fn stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// What it wrote to standard error.
    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        fs::File::open(&self.log).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// The next message to the service manager.
    pub(crate) fn hears(&self, within: Duration) -> Option<String> {
        self.heard.set_read_timeout(Some(within)).unwrap();
        let mut bytes = [0; 1024];
        let length = self.heard.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..length].to_vec()).unwrap())
    }

    /// The first message that holds `wanted`.
    #[track_caller]
    pub(crate) fn until_it_says(&self, wanted: &str) -> String {
        let started = Instant::now();
        loop {
            let left = DEADLINE.checked_sub(started.elapsed()).filter(|left| !left.is_zero());
            let Some(left) = left else { panic!("never said {wanted}:\n{}", self.log()) };
            if let Some(message) = self.hears(left.min(Duration::from_millis(200)))
                && message.contains(wanted)
            {
                return message;
            }
            assert!(self.alive(), "ended before it said {wanted}:\n{}", self.log());
        }
    }

    pub(crate) fn until_ready(&self) {
        self.until_it_says("READY=1");
    }

    /// Waits for a line of the log that holds all of `words`.
    #[track_caller]
    pub(crate) fn until_logged(&self, words: &[&str]) -> String {
        until(&format!("a log line with {words:?}"), || {
            let log = self.log();
            log.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
        })
    }

    pub(crate) fn alive(&self) -> bool {
        alive(self.pid())
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        until("the process ends", || self.child.try_wait().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(self.child.id(), "KILL");
            let _status = self.child.wait();
        }
    }
}

/// Waits until there is something.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut there: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = there() {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a signal by name.
pub(crate) fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

/// Whether a process lives (a zombie does not).
pub(crate) fn alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}
