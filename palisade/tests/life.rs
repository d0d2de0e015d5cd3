//! The life of a process from outside: when it says that it is ready, what signals do, how it ends.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod small;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{ChildStdout, Stdio};
use std::time::Duration;

use small::{Mesh, Process, alive, signal, until};

/// An app that nobody calls.
fn nobody() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// The status and body of a GET by hand.
fn get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer.split_once("\r\n\r\n")?.1.to_owned()))
}

#[test]
fn a_sidecar_tells_the_service_manager_how_it_is() {
    let (_app, address) = nobody();
    let mesh = Mesh::start(address);
    let mut sidecar = mesh.spawn_as("echo", &["sidecar", "--service", "echo"], |command| {
        command.env("WATCHDOG_USEC", "200000")
    });
    sidecar.until_ready();
    assert_eq!(get(mesh.echo_admin, "/ready").unwrap().0, 200, "ready when it says so");
    // Twice, because one could be a left-over of the start.
    sidecar.until_it_says("WATCHDOG=1");
    sidecar.until_it_says("WATCHDOG=1");

    sidecar.signal("HUP");
    let reloading = sidecar.until_it_says("RELOADING=1");
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    let ready = sidecar.until_it_says("READY=1");
    assert!(ready.contains("STATUS=serves; policies reloaded"), "{ready}");
    std::fs::write(mesh.path("policies/services/echo/echo.cedar"), "permit (").unwrap();
    sidecar.signal("HUP");
    let ready = sidecar.until_it_says("READY=1");
    assert!(ready.contains("policies not reloaded"), "{ready}");

    // A runtime that runs nothing any more feeds no watchdog.
    sidecar.signal("STOP");
    while sidecar.hears(Duration::from_millis(10)).is_some() {}
    assert_eq!(sidecar.hears(Duration::from_secs(1)), None);
    sidecar.signal("CONT");
    sidecar.until_it_says("WATCHDOG=1");

    sidecar.signal("TERM");
    sidecar.until_it_says("STOPPING=1");
    assert_eq!(sidecar.wait().code(), Some(0), "{}", sidecar.log());
}

#[test]
fn without_an_identity_a_sidecar_is_not_ready_and_says_what_is_missing() {
    let (_app, address) = nobody();
    let mesh = Mesh::new(address);
    let mut sidecar = mesh.spawn("echo", &["sidecar", "--service", "echo"]);
    let status = sidecar.until_it_says("no valid identity");
    assert!(status.contains("agent.sock") && !status.contains("READY"), "{status}");
    assert_eq!(get(mesh.echo_admin, "/ready").unwrap().0, 503);
    sidecar.signal("TERM");
    assert_eq!(sidecar.wait().code(), Some(0));
}

#[test]
fn a_drain_that_is_cut_short_by_a_second_signal_says_how_much_was_cut() {
    let (app, address) = nobody();
    let mesh = Mesh::start(address);
    let _echo = mesh.sidecar("echo", &[]);
    let mut caller = mesh.sidecar("caller", &[]);
    // A request that the app never answers.
    let mut request = TcpStream::connect(mesh.call).unwrap();
    write!(request, "GET /things/1 HTTP/1.1\r\nhost: echo\r\n\r\n").unwrap();
    let _unanswered = app.accept().unwrap();
    caller.signal("TERM");
    caller.until_it_says("STOPPING=1");
    caller.signal("TERM");
    assert_eq!(caller.wait().code(), Some(5), "{}", caller.log());
    let line = caller.until_logged(&["connections were cut"]);
    let cut = line.split("\"cut\":").nth(1).unwrap().split([',', '}']).next().unwrap();
    assert!(cut.parse::<u32>().unwrap() >= 1, "{line}");
}

/// The budget is smaller than what the process takes by itself: everything is too much, and says so early. What
/// tells how it is goes on telling.
#[test]
fn over_its_memory_budget_a_sidecar_refuses_requests_and_nothing_else() {
    let (_app, address) = nobody();
    let mesh = Mesh::start(address);
    let file = mesh.path("mesh.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{text}\n[limits]\nmemory = \"16MiB\"\n")).unwrap();
    let _caller = mesh.sidecar("caller", &[]);
    let refused = until("a request is refused", || {
        get(mesh.call, "/things/1").filter(|(_, body)| body.contains("overloaded"))
    });
    assert_eq!(refused, (503, r#"{"error":"overloaded"}"#.to_owned()));
    assert_eq!(get(mesh.caller_admin, "/ready").unwrap().0, 200);
    let (_, metrics) = get(mesh.caller_admin, "/metrics").unwrap();
    let count = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert!(count("palisade_shed_requests_total") >= 1, "{metrics}");
    assert!(count("palisade_resident_bytes") > 16 << 20, "{metrics}");
    assert!(count("palisade_open_descriptors") > 3, "{metrics}");
}

/// What a host has, it keeps: sidecars restart while control is away, for as long as their agent lives and the
/// identities that it holds do.
#[test]
fn a_sidecar_restarts_while_control_is_down() {
    let (_app, address) = nobody();
    let mut mesh = Mesh::start(address);
    let mut echo = mesh.sidecar("echo", &[]);
    mesh.stop_control();
    for _ in 0..2 {
        echo.signal("TERM");
        assert_eq!(echo.wait().code(), Some(0), "{}", echo.log());
        echo = mesh.sidecar("echo", &[]);
        assert_eq!(get(mesh.echo_admin, "/ready").unwrap().0, 200);
    }
}

/// `palisade run` with the standard output of its command.
struct Run {
    process: Process,
    says: BufReader<ChildStdout>,
}

impl Run {
    fn start(mesh: &Mesh, script: &str) -> Self {
        let args = ["run", "--service", "echo", "--", "sh", "-c", script];
        let mut process = mesh.spawn_as("echo", &args, |command| command.stdout(Stdio::piped()));
        let says = BufReader::new(process.stdout().unwrap());
        Self { process, says }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    #[track_caller]
    fn ends_with(&mut self, code: i32) {
        assert_eq!(self.process.wait().code(), Some(code), "{}", self.process.log());
    }
}

#[test]
fn run_starts_its_command_when_the_sidecar_is_ready_and_hands_on_its_exit_code() {
    let (_app, address) = nobody();
    let mesh = Mesh::start(address);

    // The command sees a ready sidecar, its own standard streams and nothing of the service manager's.
    let admin = mesh.echo_admin.port();
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{admin}; printf 'GET /ready HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n' >&3; \
         read -r line <&3; echo \"$line\"; echo ${{NOTIFY_SOCKET-none}}; ulimit -Sn; ulimit -Sc; exit 7"
    );
    let args = ["run", "--service", "echo", "--", "bash", "-c", &script];
    let mut command = mesh.program("echo", &args);
    let output = command.env("NOTIFY_SOCKET", "/nowhere").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = said.lines().map(str::trim_end).collect();
    assert_eq!(output.status.code(), Some(7), "{}", String::from_utf8_lossy(&output.stderr));
    let own = |limit| {
        let output =
            std::process::Command::new("sh").args(["-c", &format!("ulimit {limit}")]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(lines, ["HTTP/1.1 200 OK", "none", &own("-Sn"), &own("-Sc")]);

    // What cannot be run is told as shells tell it.
    let code = |command: &[&str]| {
        let args = [&["run", "--service", "echo", "--"], command].concat();
        mesh.program("echo", &args).output().unwrap().status.code()
    };
    assert_eq!(code(&["no-such-command-anywhere"]), Some(127));
    assert_eq!(code(&["/"]), Some(126));
    assert_eq!(code(&["sh", "-c", "kill -KILL $$"]), Some(137));

    // Signals reach the command; what it makes of them is its own affair.
    for (name, number) in [("TERM", 15), ("INT", 2), ("USR1", 10), ("USR2", 12), ("QUIT", 3)] {
        let script =
            format!("trap 'echo heard; exit {number}' {name}; echo there; while :; do sleep 0.05; done");
        let mut run = Run::start(&mesh, &script);
        assert_eq!(run.line(), "there");
        run.process.signal(name);
        assert_eq!(run.line(), "heard", "{name}");
        run.ends_with(number);
    }

    // SIGHUP is the sidecar's: it reloads, and the command hears nothing of it.
    let mut run =
        Run::start(&mesh, "trap 'exit 1' HUP; trap 'exit 0' TERM; echo there; while :; do sleep 0.05; done");
    assert_eq!(run.line(), "there");
    run.process.until_ready();
    run.process.signal("HUP");
    run.process.until_it_says("policies reloaded");
    run.process.signal("TERM");
    run.ends_with(0);

    orphans_are_ended(&mesh);
    nothing_outlives_a_run_that_is_killed(&mesh);
}

/// A job that ends ends all of it, what it left behind too: orphans are taken in and waited for.
fn orphans_are_ended(mesh: &Mesh) {
    let orphan = "(trap '' TERM; while :; do sleep 0.1; done) & echo $!";
    let mut run =
        Run::start(mesh, &format!("sh -c \"{orphan}\"; exit 4", orphan = orphan.replace('$', "\\$")));
    let orphan: u32 = run.line().parse().unwrap();
    run.ends_with(4);
    assert!(!alive(orphan), "an orphan that ignores SIGTERM is left behind");
}

fn nothing_outlives_a_run_that_is_killed(mesh: &Mesh) {
    let mut run = Run::start(mesh, "trap '' TERM; echo $$; while :; do sleep 0.1; done");
    let command: u32 = run.line().parse().unwrap();
    run.process.signal("KILL");
    run.process.wait();
    until("the command is gone", || (!alive(command)).then_some(()));
}

#[test]
fn run_says_what_is_missing_when_its_sidecar_does_not_get_ready() {
    let (_app, address) = nobody();
    let mesh = Mesh::new(address);
    let args = ["run", "--service", "echo", "--ready-timeout", "300ms", "--", "touch", "started"];
    let output = mesh.program("echo", &args).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("its sidecar was not ready within 300ms"), "{said}");
    assert!(said.contains("no valid identity has come from the agent at"), "{said}");
    assert!(!mesh.path("started").exists(), "the command ran all the same");
    // A mistake of the command line's or of a file's is no answer of the command either.
    let args = ["run", "--service", "eco", "--", "true"];
    assert_eq!(mesh.program("echo", &args).output().unwrap().status.code(), Some(125));
    // Asked to end before the command began.
    let mut waiting = mesh.spawn("echo", &["run", "--service", "echo", "--", "touch", "started"]);
    waiting.until_it_says("no valid identity");
    signal(waiting.pid(), "TERM");
    assert_eq!(waiting.wait().code(), Some(128 + 15));
    assert!(!mesh.path("started").exists());
}
