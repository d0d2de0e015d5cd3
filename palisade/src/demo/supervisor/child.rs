//! The life of one supervised process: wait, start, be ready, die, again; or end when asked.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use identity::Scope;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::process::{Child, Command};

use super::log::{Capture, RoleLog};
use super::{ChildSpec, Event, MAX_DEATHS_AT_START, Shared, StartError};

/// The pause after a first death.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause: a person who mends something sees it come back at once.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A process that lived this long was well: its next death is a first one again.
const WELL_AFTER: Duration = Duration::from_secs(10);

/// Variables that a child gets from us: nothing that is private, and nothing that changes what it does.
const INHERITED: [&str; 6] = ["PATH", "LANG", "LC_ALL", "TZ", "RUST_BACKTRACE", "LLVM_PROFILE_FILE"];

/// Exit codes by which a `palisade` says that starting it again is of no use: usage, invalid input.
const HOPELESS: [i32; 2] = [2, 4];

/// How one run of a process ended.
enum Ended {
    /// It was asked to.
    Stopped,
    /// It was not.
    Died { how: String, hopeless: bool, alive: Duration, tail: String },
    /// It never began.
    NotStarted(io::Error),
}

/// Keeps the process of `spec` running until `scope` drains, then ends it after those `waiting_for_it`.
pub(super) async fn live(spec: ChildSpec, waiting_for_it: Vec<String>, shared: Arc<Shared>, scope: Scope) {
    keep(&spec, &waiting_for_it, &shared, &scope).await;
    shared.update(&spec.role, |child| {
        child.pid = None;
        child.ready = false;
        child.gone = true;
    });
}

async fn keep(spec: &ChildSpec, waiting_for_it: &[String], shared: &Arc<Shared>, scope: &Scope) {
    let mut status = shared.status.subscribe();
    tokio::select! {
        ready = status.wait_for(|status| spec.after.iter().all(|name| status.is_ready(name))) => {
            if ready.is_err() {
                return;
            }
        }
        () = scope.draining() => return,
    }
    let mut pause = FIRST_PAUSE;
    let mut has_been_ready = false;
    let mut deaths = 0;
    while !scope.is_draining() {
        match run(spec, waiting_for_it, shared, scope, &mut has_been_ready).await {
            Ended::Stopped => return,
            Ended::NotStarted(error) => {
                shared.fail(StartError::Spawn {
                    role: spec.role.clone(),
                    program: spec.program.clone(),
                    why: error.to_string(),
                });
                if !has_been_ready {
                    return;
                }
                let how = format!("an error at its start, {error}");
                shared.tell(Event::Died {
                    role: spec.role.clone(),
                    how,
                    tail: String::new(),
                    again_in: pause,
                });
            }
            Ended::Died { how, hopeless, alive, tail } => {
                deaths += 1;
                pause = next_pause(pause, alive);
                let log = shared.log_path(&spec.role);
                let role = spec.role.clone();
                if !has_been_ready && (hopeless || deaths >= MAX_DEATHS_AT_START) {
                    shared.fail(StartError::Died { role, how, tail, log });
                    return;
                }
                shared.tell(Event::Died { role, how, tail, again_in: pause });
            }
        }
        tokio::select! {
            () = shared.clock.sleep(pause) => {}
            () = scope.draining() => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn next_pause(pause: Duration, alive: Duration) -> Duration {
    if alive >= WELL_AFTER { FIRST_PAUSE } else { pause }
}

/// One run, from start to end.
async fn run(
    spec: &ChildSpec,
    waiting_for_it: &[String],
    shared: &Arc<Shared>,
    scope: &Scope,
    has_been_ready: &mut bool,
) -> Ended {
    shared.tell(Event::Starting { role: spec.role.clone() });
    let (mut child, output) = match spawn(spec) {
        Ok(started) => started,
        Err(error) => return Ended::NotStarted(error),
    };
    let pid = child.id();
    shared.update(&spec.role, |child| child.pid = pid);
    let log = RoleLog::open(shared.log_path(&spec.role), pid);
    if let Some(why) = log.trouble() {
        shared.tell(Event::LogLost { role: spec.role.clone(), why });
    }
    let capture = Capture::start(output, log, scope);
    let started = shared.clock.now();

    let exit = tokio::select! {
        exit = child.wait() => Some(exit),
        () = become_ready(spec, shared, *has_been_ready, &capture) => {
            *has_been_ready = true;
            let after = shared.clock.now().saturating_sub(started);
            shared.update(&spec.role, |child| child.ready = true);
            shared.tell(Event::Ready { role: spec.role.clone(), after });
            tokio::select! {
                exit = child.wait() => Some(exit),
                () = scope.draining() => None,
            }
        }
        () = scope.draining() => None,
    };
    let Some(exit) = exit else {
        end(spec, waiting_for_it, shared, &mut child).await;
        capture.finish().await;
        return Ended::Stopped;
    };
    shared.update(&spec.role, |child| {
        child.pid = None;
        child.ready = false;
        child.deaths = child.deaths.saturating_add(1);
    });
    let tail = capture.finish().await;
    let alive = shared.clock.now().saturating_sub(started);
    let (how, hopeless) = match exit {
        Ok(exit) => {
            (describe(exit), spec.palisade && exit.code().is_some_and(|code| HOPELESS.contains(&code)))
        }
        Err(error) => (format!("nobody knows what, {error}"), false),
    };
    Ended::Died { how, hopeless, alive, tail }
}

fn spawn(spec: &ChildSpec) -> io::Result<(Child, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new(&spec.program);
    if spec.palisade {
        command.arg("--supervised-by").arg(std::process::id().to_string());
    }
    command
        .args(&spec.args)
        .env_clear()
        .envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        // Ctrl-C goes to the terminal's whole group: the children end in our order, not all at once.
        .process_group(0)
        .kill_on_drop(true);
    let child = command.spawn()?;
    // `command` holds the writing end; with it gone the reader sees when the child's are closed.
    drop(command);
    Ok((child, reader.into()))
}

/// Completes when the process answers its probe. Says so once if that takes longer than it may; at
/// the first start that is a failure.
async fn become_ready(spec: &ChildSpec, shared: &Shared, has_been_ready: bool, capture: &Capture) {
    let probing = spec.ready.until_ready(&shared.clock);
    tokio::pin!(probing);
    tokio::select! {
        () = &mut probing => return,
        () = shared.clock.sleep(spec.ready_within) => {}
    }
    let role = spec.role.clone();
    let tail = capture.tail();
    if has_been_ready {
        shared.tell(Event::Late { role, tail });
    } else {
        shared.fail(StartError::Late {
            log: shared.log_path(&role),
            role,
            within: spec.ready_within,
            unready: spec.ready.unmet(),
            tail,
        });
    }
    probing.await;
}

/// Asks the process to end once those that waited for it have; kills it when its time is over.
async fn end(spec: &ChildSpec, waiting_for_it: &[String], shared: &Shared, child: &mut Child) {
    let mut kill = shared.kill.subscribe();
    let mut status = shared.status.subscribe();
    let others_gone = status.wait_for(|status| waiting_for_it.iter().all(|role| status.is_gone(role)));
    tokio::select! {
        _ = others_gone => {}
        _ = kill.wait_for(|kill| *kill) => {}
        // It ended by itself meanwhile.
        _ = child.wait() => return,
    }
    let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) else { return };
    // A process that is gone cannot be told to go.
    let _gone = kill_process(pid, Signal::TERM).is_err();
    tokio::select! {
        _ = child.wait() => return,
        () = shared.clock.sleep(spec.stop_within) => {}
        _ = kill.wait_for(|kill| *kill) => {}
    }
    tracing::debug!(role = spec.role, "killing a process that did not end in its time");
    // It has not been waited for, so the number is still its own; the group takes what it started along.
    let _gone = kill_process_group(pid, Signal::KILL).is_err();
    let _reaped = child.wait().await.is_err();
}

fn describe(exit: ExitStatus) -> String {
    match (exit.code(), exit.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => {
            let name = match signal {
                6 => " (SIGABRT)",
                9 => " (SIGKILL)",
                11 => " (SIGSEGV)",
                15 => " (SIGTERM)",
                _ => "",
            };
            format!("signal {signal}{name}")
        }
        (None, None) => "neither code nor signal".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_a_bound_and_start_anew_after_a_good_life() {
        let mut pause = FIRST_PAUSE;
        let mut seen = Vec::new();
        for _ in 0..8 {
            pause = next_pause(pause, Duration::from_secs(1));
            seen.push(pause.as_millis());
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        assert_eq!(seen, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(next_pause(pause, WELL_AFTER), FIRST_PAUSE);
    }

    #[test]
    fn an_end_is_told_by_code_or_signal() {
        assert_eq!(describe(ExitStatus::from_raw(4 << 8)), "exit code 4");
        assert_eq!(describe(ExitStatus::from_raw(9)), "signal 9 (SIGKILL)");
    }
}
