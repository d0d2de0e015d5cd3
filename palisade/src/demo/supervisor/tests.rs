//! The supervisor with ordinary commands as its children.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use identity::SystemClock;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::*;

fn shell(role: &str, script: &str) -> ChildSpec {
    ChildSpec {
        role: role.to_owned(),
        program: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        env: Vec::new(),
        after: Vec::new(),
        ready: Probe::Started,
        ready_within: Duration::from_secs(20),
        stop_within: Duration::from_secs(20),
        palisade: false,
    }
}

fn pid(raw: u32) -> Pid {
    Pid::from_raw(raw.cast_signed()).unwrap()
}

/// Whether the process is there and not merely waiting to be reaped.
fn runs(raw: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{raw}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().unwrap_or_default().chars().next();
    test_kill_process(pid(raw)).is_ok() && !matches!(state, None | Some('Z' | 'X'))
}

async fn until(mut condition: impl FnMut() -> bool) {
    let long = Duration::from_secs(30);
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(long, wait).await.expect("it never happened");
}

#[tokio::test]
async fn they_start_in_order_and_end_in_reverse_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let order = directory.path().join("order");
    let script = |name: &str| {
        format!(
            "echo +{name} >> {0}; trap 'echo -{name} >> {0}; exit 0' TERM; touch {1}/{name}; while :; do sleep 0.01; done",
            order.display(),
            directory.path().display()
        )
    };
    let mut first = shell("first", &script("first"));
    let mut second = shell("second", &script("second"));
    let mut third = shell("third", &script("third"));
    // A Unix socket is the probe of the first: the test opens it, so that the second waits for the test.
    let socket = directory.path().join("socket");
    first.ready = Probe::Unix(socket.clone());
    second.after = vec!["first".into()];
    third.after = vec!["second".into(), "gate".into()];

    let clock = SystemClock::shared();
    let (supervisor, _events) =
        Supervisor::start(vec![third, second, first], &["gate"], directory.path(), clock).unwrap();
    until(|| directory.path().join("first").exists()).await;
    assert_eq!(fs::read_to_string(&order).unwrap(), "+first\n");
    let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
    supervisor.ready("second").await.unwrap();
    until(|| directory.path().join("second").exists()).await;
    assert!(!directory.path().join("third").exists());
    supervisor.open("gate");
    supervisor.all_ready().await.unwrap();
    until(|| directory.path().join("third").exists()).await;

    let pids = supervisor.status().borrow().pids();
    assert_eq!(pids.len(), 3);
    supervisor.stop().await;
    assert_eq!(fs::read_to_string(&order).unwrap(), "+first\n+second\n+third\n-third\n-second\n-first\n");
    assert!(pids.values().all(|pid| !runs(*pid)), "{pids:?}");
    assert!(supervisor.status().borrow().pids().is_empty());
}

#[tokio::test]
async fn one_that_is_killed_comes_back_and_its_death_is_told_with_its_last_lines() {
    let directory = tempfile::tempdir().unwrap();
    let script = "echo out; echo err >&2; exec sleep 1000";
    let clock = SystemClock::shared();
    let (supervisor, mut events) =
        Supervisor::start(vec![shell("web", script)], &[], directory.path(), clock).unwrap();
    supervisor.all_ready().await.unwrap();
    let log = directory.path().join("web.log");
    until(|| fs::read_to_string(&log).is_ok_and(|log| log.ends_with("out\nerr\n"))).await;
    let before = supervisor.status().borrow().pids()["web"];
    kill_process(pid(before), Signal::KILL).unwrap();

    let mut status = supervisor.status();
    let back =
        status.wait_for(|s| s.children["web"].deaths == 1 && s.children["web"].ready).await.unwrap().clone();
    assert_ne!(back.pids()["web"], before);
    let mut seen = Vec::new();
    while let Ok(event) = events.try_recv() {
        seen.push(event);
    }
    let died = seen.iter().find(|event| matches!(event, Event::Died { .. })).unwrap();
    let Event::Died { role, how, tail, again_in } = died else { unreachable!() };
    assert_eq!((role.as_str(), how.as_str(), tail.as_str()), ("web", "signal 9 (SIGKILL)", "out\nerr"));
    assert_eq!(*again_in, Duration::from_millis(100));
    assert_eq!(seen.iter().filter(|event| matches!(event, Event::Ready { .. })).count(), 2);
    supervisor.stop().await;
    assert!(!runs(back.pids()["web"]));
}

#[tokio::test]
async fn one_that_does_not_end_is_killed_with_what_it_started() {
    let directory = tempfile::tempdir().unwrap();
    let script = "trap '' TERM; echo $$ > {}/pids; (trap '' TERM; sh -c 'echo $$' >> {}/pids; while :; do sleep 0.01; done) & wait; wait"
        .replace("{}", &directory.path().display().to_string());
    let mut stubborn = shell("stubborn", &script);
    stubborn.stop_within = Duration::from_millis(50);
    let clock = SystemClock::shared();
    let (supervisor, _events) = Supervisor::start(vec![stubborn], &[], directory.path(), clock).unwrap();
    let written = directory.path().join("pids");
    until(|| fs::read_to_string(&written).is_ok_and(|pids| pids.lines().count() == 2)).await;
    let group = supervisor.status().borrow().pids()["stubborn"];
    supervisor.stop().await;
    until(|| rustix::process::test_kill_process_group(pid(group)).is_err() || !group_runs(group)).await;
}

/// Whether a process of the group runs still; a container without an init leaves zombies behind.
fn group_runs(group: u32) -> bool {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).any(|one| {
        let stat = fs::read_to_string(format!("/proc/{one}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        let state = fields.next();
        let of = fields.nth(1).and_then(|of| of.parse::<u32>().ok());
        of == Some(group) && !matches!(state, None | Some("Z" | "X"))
    })
}

#[tokio::test]
async fn a_start_fails_by_name_with_the_last_lines_when_one_keeps_dying() {
    let directory = tempfile::tempdir().unwrap();
    let mut bad = shell("vault", "echo 'the disk is full' >&2; exit 1");
    bad.ready = Probe::Unix(directory.path().join("never"));
    let mut waits = shell("web", "exec sleep 1000");
    waits.after = vec!["vault".into()];
    let clock = SystemClock::shared();
    let (supervisor, _events) = Supervisor::start(vec![bad, waits], &[], directory.path(), clock).unwrap();
    let error = supervisor.all_ready().await.unwrap_err();
    let failure = crate::failure::Failure::from(error);
    assert_eq!(failure.causes, ["vault ended with exit code 1"]);
    assert_eq!(failure.hint.as_deref(), Some("its last lines:\n    the disk is full"));
    supervisor.stop().await;
    assert_eq!(supervisor.status().borrow().children["vault"].deaths, MAX_DEATHS_AT_START);
}

#[tokio::test]
async fn a_start_fails_by_name_when_one_is_not_ready_in_its_time_or_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let mut late = shell("agent", "exec sleep 1000");
    late.ready = Probe::Unix(directory.path().join("never"));
    late.ready_within = Duration::from_millis(20);
    let clock = SystemClock::shared();
    let (supervisor, _events) = Supervisor::start(vec![late], &[], directory.path(), clock.clone()).unwrap();
    let error = supervisor.ready("agent").await.unwrap_err();
    assert!(matches!(&error, StartError::Late { role, .. } if role == "agent"), "{error}");
    supervisor.stop().await;

    let mut missing = shell("idp", "");
    missing.program = directory.path().join("no-such-program");
    let (supervisor, _events) = Supervisor::start(vec![missing], &[], directory.path(), clock).unwrap();
    let error = supervisor.all_ready().await.unwrap_err();
    assert!(error.to_string().contains("no-such-program: No such file"), "{error}");
    supervisor.stop().await;
}

#[tokio::test]
async fn names_that_clash_are_missing_or_go_in_circles_start_nothing() {
    let start = |specs: Vec<ChildSpec>| {
        let directory = tempfile::tempdir().unwrap();
        Supervisor::start(specs, &["gate"], directory.path(), SystemClock::shared()).unwrap_err().to_string()
    };
    let after = |role: &str, after: &[&str]| ChildSpec {
        after: after.iter().map(ToString::to_string).collect(),
        ..shell(role, "exit 0")
    };
    assert_eq!(start(vec![after("a", &[]), after("a", &[])]), "two processes are called a");
    assert_eq!(start(vec![after("gate", &[])]), "two processes are called gate");
    assert_eq!(start(vec![after("a", &["b"])]), "a waits for b, which is neither a process nor a gate");
    assert_eq!(
        start(vec![after("a", &["b"]), after("b", &["a"]), after("c", &["gate"])]),
        "these processes wait for each other: a, b"
    );
}

/// Set for a test that is itself a process of another test.
const PART: &str = "PALISADE_TEST_PART";

/// A supervisor that is killed takes its children with it: two processes of this test binary play
/// the supervisor and its child.
#[test]
fn children_end_when_the_supervisor_is_killed() {
    let directory = tempfile::tempdir().unwrap();
    let written = directory.path().join("pid");
    let mut supervisor = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "demo::supervisor::tests::play_supervisor", "--nocapture"])
        .env(PART, directory.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let read = || fs::read_to_string(&written).ok()?.trim().parse::<u32>().ok();
    let child = loop {
        if let Some(child) = read() {
            break child;
        }
        assert!(supervisor.try_wait().unwrap().is_none(), "the supervisor ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(runs(child));
    supervisor.kill().unwrap();
    assert_eq!(supervisor.wait().unwrap().signal(), Some(9));
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while runs(child) {
        assert!(std::time::Instant::now() < deadline, "process {child} outlived its supervisor");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "is a process of children_end_when_the_supervisor_is_killed"]
fn play_supervisor() {
    let Some(directory) = std::env::var_os(PART) else { return };
    let spec = ChildSpec {
        program: std::env::current_exe().unwrap(),
        args: ["--ignored", "--exact", "demo::supervisor::tests::play_child", "--nocapture"]
            .map(Into::into)
            .into(),
        env: vec![(PART.into(), directory.clone())],
        ..shell("child", "")
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let clock = SystemClock::shared();
        let (_supervisor, _events) =
            Supervisor::start(vec![spec], &[], Path::new(&directory), clock).unwrap();
        std::future::pending::<()>().await;
    });
}

#[test]
#[ignore = "is a process of children_end_when_the_supervisor_is_killed"]
fn play_child() {
    let Some(directory) = std::env::var_os(PART) else { return };
    let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get().unsigned_abs();
    crate::supervised::end_with(parent, Signal::TERM).unwrap();
    assert!(crate::supervised::end_with(parent + 1, Signal::TERM).is_err());
    fs::write(Path::new(&directory).join("pid"), std::process::id().to_string()).unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}
