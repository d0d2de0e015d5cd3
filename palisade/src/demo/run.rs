//! Running a set of processes until somebody ends it: shows the start, tells of deaths, keeps the word
//! on where everything is up to date.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;

use identity::clock::SharedClock;
use tokio::sync::mpsc;

use super::progress::Progress;
use super::supervisor::{ChildSpec, Event, Supervisor};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::serve;

/// How many of a process's last lines are shown with its death; its log has the rest.
const TROUBLE_LINES: usize = 3;

/// Process ids by role.
pub(crate) type Pids = BTreeMap<String, u32>;

/// Starts `specs` and keeps them running until SIGINT or SIGTERM; a second signal ends them at once.
///
/// `prepare` runs beside the start: it waits for roles, does what needs them, and opens the `gates`.
/// `tell` is given the process ids when all is ready, and again whenever one has changed.
pub(crate) async fn supervise(
    specs: Vec<ChildSpec>,
    gates: &[&str],
    logs: &Path,
    clock: SharedClock,
    printer: &Printer,
    prepare: impl AsyncFnOnce(&Supervisor) -> Result<(), Failure>,
    mut tell: impl FnMut(&Pids, bool) -> Result<(), Failure>,
) -> Result<Exit, Failure> {
    // Before anything is started, so that no signal finds children and nobody to end them.
    let stop = serve::stop_signal()?;
    tokio::pin!(stop);
    let (supervisor, mut events) = Supervisor::start(specs, gates, logs, clock).map_err(Failure::from)?;
    let mut progress = Progress::new(printer);

    let outcome = {
        let start = async {
            prepare(&supervisor).await?;
            supervisor.all_ready().await.map_err(Failure::from)
        };
        tokio::pin!(start);
        loop {
            tokio::select! {
                // What has happened is shown before what comes of it.
                biased;
                Some(event) = events.recv() => show_start(&mut progress, event),
                started = &mut start => break started.map(|()| true),
                () = &mut stop => break Ok(false),
            }
        }
    };
    while let Ok(event) = events.try_recv() {
        show_start(&mut progress, event);
    }
    progress.end();
    let outcome = match outcome {
        Ok(true) => watch(&supervisor, &mut events, printer, &mut tell, &mut stop).await,
        Ok(false) => Ok(()),
        Err(failure) => Err(failure),
    };

    // After a Ctrl-C the terminal stands behind its ^C.
    printer.progress("\nending everything");
    let again = serve::stop_signal()?;
    tokio::pin!(again);
    let ended = supervisor.stop();
    tokio::pin!(ended);
    tokio::select! {
        () = &mut ended => {}
        () = &mut again => {
            supervisor.kill();
            ended.await;
        }
    }
    printer.progress("ended; no process is left");
    outcome.map(|()| Exit::Ok)
}

/// All is ready: tells so, then of every change, until asked to end.
async fn watch(
    supervisor: &Supervisor,
    events: &mut mpsc::Receiver<Event>,
    printer: &Printer,
    tell: &mut impl FnMut(&Pids, bool) -> Result<(), Failure>,
    stop: &mut (impl Future<Output = ()> + Unpin),
) -> Result<(), Failure> {
    let mut status = supervisor.status();
    let mut told = status.borrow_and_update().pids();
    tell(&told, true)?;
    loop {
        tokio::select! {
            () = &mut *stop => return Ok(()),
            Some(event) = events.recv() => show(printer, event),
            changed = status.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let now = status.borrow_and_update().pids();
                // One that is between two lives keeps its old number here: it has no other.
                let merged: Pids = told.iter().chain(&now).map(|(role, pid)| (role.clone(), *pid)).collect();
                if merged != told {
                    told = merged;
                    // A full disk must not end a mesh that serves.
                    if let Err(failure) = tell(&told, false) {
                        printer.failure(&failure);
                    }
                }
            }
        }
    }
}

fn show_start(progress: &mut Progress, event: Event) {
    match event {
        Event::Starting { role } => progress.starting(&role),
        Event::Ready { role, after } => progress.ready(&role, after),
        other => {
            if let Some(line) = trouble(&other) {
                progress.say(&line);
            }
        }
    }
}

fn show(printer: &Printer, event: Event) {
    match event {
        Event::Starting { .. } => {}
        Event::Ready { role, after } => {
            printer.progress(&format!("{role}: back after {} ms", after.as_millis()));
        }
        other => {
            if let Some(line) = trouble(&other) {
                printer.warning(&line);
            }
        }
    }
}

fn trouble(event: &Event) -> Option<String> {
    let indented = |tail: &str| {
        let from = tail.lines().count().saturating_sub(TROUBLE_LINES);
        tail.lines().skip(from).map(|line| format!("\n    {line}")).collect::<String>()
    };
    match event {
        Event::Starting { .. } | Event::Ready { .. } => None,
        Event::Late { role, tail } => Some(format!("{role}: not ready yet{}", indented(tail))),
        Event::Died { role, how, tail, again_in } => Some(format!(
            "{role}: ended with {how}, started again in {} ms{}",
            again_in.as_millis(),
            indented(tail)
        )),
        Event::LogLost { role, why } => Some(format!("{role}: its log is lost, {why}")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use identity::SystemClock;
    use rustix::process::{Pid, Signal, getpid, kill_process};

    use super::*;
    use crate::demo::supervisor::Probe;

    #[tokio::test]
    async fn a_death_is_told_with_the_new_number_and_a_signal_ends_everything() {
        let directory = tempfile::tempdir().unwrap();
        let child = |role: &str, after: &[&str]| ChildSpec {
            role: role.to_owned(),
            program: "/bin/sleep".into(),
            args: vec!["1000".into()],
            env: Vec::new(),
            after: after.iter().map(ToString::to_string).collect(),
            ready: Probe::Started,
            ready_within: Duration::from_secs(20),
            stop_within: Duration::from_secs(20),
            palisade: false,
        };
        let mut told: Vec<Pids> = Vec::new();
        let mut opened = false;
        let outcome = supervise(
            vec![child("vault", &[]), child("web", &["unsealed"])],
            &["unsealed"],
            directory.path(),
            SystemClock::shared(),
            &Printer::plain(),
            async |supervisor: &Supervisor| {
                supervisor.ready("vault").await?;
                opened = true;
                supervisor.open("unsealed");
                Ok(())
            },
            |pids, first| {
                assert_eq!(first, told.is_empty());
                told.push(pids.clone());
                let target = if first { Pid::from_raw(pids["web"].cast_signed()).unwrap() } else { getpid() };
                let signal = if first { Signal::KILL } else { Signal::TERM };
                kill_process(target, signal).unwrap();
                Ok(())
            },
        )
        .await;
        assert_eq!(outcome.unwrap(), Exit::Ok);
        assert!(opened);
        let [first, second, ..] = told.as_slice() else { panic!("{told:?}") };
        assert_eq!(first["vault"], second["vault"]);
        assert_ne!(first["web"], second["web"]);
        for pid in second.values() {
            assert!(rustix::process::test_kill_process(Pid::from_raw(pid.cast_signed()).unwrap()).is_err());
        }
    }
}
