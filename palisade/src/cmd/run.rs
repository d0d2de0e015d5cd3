//! `palisade run -- CMD`: a service's command and its sidecar as one process tree.
//!
//! The sidecar lives in this process and the command is its child. One process id stands for both, so that
//! whoever waits, signals or limits (a shell, systemd, a container's runtime) does so once, and the process
//! that the agent attests is the one that was started.
//!
//! 1. The sidecar becomes ready: its identity is there, its ports are bound, its policies are in force.
//! 2. The command is started, with this process's standard streams, environment and limits.
//! 3. Signals go to the command, except SIGHUP, which reloads the sidecar's policies.
//! 4. The command ends; the sidecar drains; what the command left behind is ended; its exit code is ours.
//!
//! If this process dies, the kernel kills the command; if the sidecar fails, the command is asked to end.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, getpgrp, getpid, kill_process, set_child_subreaper, wait,
};
use tokio::signal::unix::SignalKind;

use super::sidecar::Prepared;
use crate::Global;
use crate::failure::{Exit, Failure};
use crate::notify;
use crate::printer::Printer;
use crate::rlimits::{self, Original};
use crate::serve::{self, Ended, Ending, Life, Met, Reload};
use crate::supervised;

/// What the command may take to end after SIGTERM once its sidecar has failed.
const COMMAND_GRACE: Duration = Duration::from_secs(10);
/// What processes that the command left behind may take to end after SIGTERM.
const LEFTOVER_GRACE: Duration = Duration::from_secs(2);

/// The command is there and cannot be run, as shells say it (POSIX, Shell Command Language, 2.8.2).
const CANNOT_RUN: u8 = 126;
/// There is no such command.
const NOT_FOUND: u8 = 127;
/// Added to the number of the signal that ended a command.
const SIGNALLED: i32 = 128;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The service's name in mesh.toml. Without it, --config names the sidecar.toml of a sidecar that
    /// runs alone.
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// How long the sidecar may take to become ready.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    ready_timeout: Duration,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Exit, Failure> {
    // Every failure of our own has a code that says it is no answer of the command.
    supervise(args, global).map_err(|failure| Failure { exit: Exit::NotCommand, ..failure })
}

fn supervise(args: &Args, global: &Global) -> Result<Exit, Failure> {
    let prepared = Prepared::read(args.service.as_deref(), None, global)?;
    set_child_subreaper(Some(getpid()))
        .map_err(|error| Failure::new("orphans of the command cannot be taken in").because(&error))?;
    let limits = rlimits::adjust()?;
    serve::on_runtime(prepared.workers(), async {
        let mut life = Life::begin("run", prepared.drain_timeout())?;
        let mut started = match life.start(async |scope| prepared.start(scope).await).await? {
            Met::Yes(started) => started,
            Met::Asked(signal) => return Ok(Ending { exit: signalled(signal), ended: Ended::Clean }),
            Met::Broken => return Err(broken(&mut life).await),
        };
        let ready = life.ready(&mut started);
        match tokio::time::timeout(args.ready_timeout, ready).await {
            Ok(Met::Yes(())) => {}
            Ok(Met::Asked(signal)) => {
                return Ok(Ending { ended: life.end().await?, exit: signalled(signal) });
            }
            Ok(Met::Broken) => return Err(broken(&mut life).await),
            Err(_elapsed) => {
                let failure = not_ready(args.ready_timeout, started.missing());
                life.end().await?;
                return Err(failure);
            }
        }
        let mut command = Running::start(&args.command, limits)?;
        life.announce("serves; the command runs");
        let status = command.live(&mut life, &mut started.reload).await?;
        let drained = life.end().await;
        command.end_leftovers().await;
        Ok(Ending { ended: drained?, exit: Exit::Command(exit_code(status)) })
    })
}

fn not_ready(within: Duration, missing: Option<String>) -> Failure {
    let within = humantime::format_duration(within);
    let failure =
        Failure::new(format!("the command was not started: its sidecar was not ready within {within}"));
    match missing {
        Some(missing) => failure
            .because(&io::Error::other(missing))
            .hint("`palisade id` shows what the agent gives this user; --ready-timeout waits longer"),
        None => failure,
    }
}

/// Why the sidecar is gone.
async fn broken(life: &mut Life) -> Failure {
    match life.end().await {
        Err(failure) => failure,
        Ok(_) => Failure::new("the sidecar ended by itself"),
    }
}

fn signalled(signal: Signal) -> Exit {
    Exit::Command(u8::try_from(SIGNALLED + signal.as_raw()).unwrap_or(u8::MAX))
}

fn exit_code(status: WaitStatus) -> u8 {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| SIGNALLED + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

/// The command while it runs.
struct Running {
    pid: Pid,
    /// Set once it has been waited for, after which its number may be another's.
    status: Option<WaitStatus>,
    ended: tokio::signal::unix::Signal,
    passed_on: Vec<(Signal, tokio::signal::unix::Signal)>,
}

impl Running {
    /// INVARIANT: called by the main thread, whose end the kernel takes for the end of this process when it
    /// looks after the command ([`start_command`]).
    fn start(command: &[OsString], limits: Original) -> Result<Self, Failure> {
        let ended = serve::listen(SignalKind::child())?;
        let passed_on = [
            (Signal::QUIT, SignalKind::quit()),
            (Signal::USR1, SignalKind::user_defined1()),
            (Signal::USR2, SignalKind::user_defined2()),
            (Signal::WINCH, SignalKind::window_change()),
        ];
        let passed_on = passed_on
            .into_iter()
            .map(|(signal, kind)| Ok((signal, serve::listen(kind)?)))
            .collect::<Result<_, Failure>>()?;
        let mut starter = Command::new("/proc/self/exe");
        starter
            .arg0("palisade")
            .args(["start-command", "--parent", &std::process::id().to_string()])
            .args(["--descriptors", &limit(limits.descriptors), "--core", &limit(limits.core), "--"])
            .args(command);
        for variable in notify::VARIABLES {
            starter.env_remove(variable);
        }
        let child =
            starter.spawn().map_err(|error| Failure::new("the command cannot be started").because(&error))?;
        let pid = Pid::from_raw(child.id().cast_signed())
            .ok_or_else(|| Failure::new("the command has no process id"))?;
        tracing::info!(pid = child.id(), "command started");
        Ok(Self { pid, status: None, ended, passed_on })
    }

    /// Passes signals on until the command has ended; ends it if the sidecar is gone.
    async fn live(&mut self, life: &mut Life, reload: &mut Option<Reload>) -> Result<WaitStatus, Failure> {
        loop {
            let signal = tokio::select! {
                status = ended(&mut self.ended, self.pid, &mut self.status) => return Ok(status),
                met = life.until(reload, std::future::pending::<()>()) => match met {
                    Met::Asked(signal) => signal,
                    Met::Yes(()) | Met::Broken => return Err(self.outlived(life).await),
                },
                signal = next(&mut self.passed_on) => signal,
            };
            self.pass_on(signal);
        }
    }

    fn pass_on(&self, signal: Signal) {
        // The terminal has sent these to its whole foreground group, the command included.
        let by_terminal = matches!(signal, Signal::INT | Signal::QUIT | Signal::WINCH) && in_foreground();
        if !by_terminal {
            self.signal(signal);
        }
    }

    fn signal(&self, signal: Signal) {
        if self.status.is_none()
            && let Err(error) = kill_process(self.pid, signal)
        {
            tracing::warn!(%error, signal = signal.as_raw(), "the command could not be signalled");
        }
    }

    /// The sidecar is gone: so is the command's way into the mesh and out of it.
    async fn outlived(&mut self, life: &mut Life) -> Failure {
        tracing::error!("the sidecar has failed; ending the command");
        self.signal(Signal::TERM);
        let mut how = "SIGTERM";
        tokio::select! {
            _ = ended(&mut self.ended, self.pid, &mut self.status) => {}
            () = tokio::time::sleep(COMMAND_GRACE) => {
                how = "SIGKILL";
                self.signal(Signal::KILL);
                ended(&mut self.ended, self.pid, &mut self.status).await;
            }
        }
        let failure = broken(life).await;
        self.end_leftovers().await;
        failure.hint(format!("the command was ended with {how}, because nothing protects it any more"))
    }

    /// Ends the descendants that the command left behind: they are our children now.
    async fn end_leftovers(&mut self) {
        for (signal, patience) in [(Signal::TERM, LEFTOVER_GRACE), (Signal::KILL, LEFTOVER_GRACE)] {
            let gone = async {
                loop {
                    reap(self.pid, &mut self.status);
                    let left = children();
                    if left.is_empty() {
                        return;
                    }
                    tracing::info!(?left, signal = signal.as_raw(), "ending what the command left behind");
                    for child in left {
                        // One that is gone meanwhile has not been waited for: its number is nobody else's.
                        let _gone = kill_process(child, signal).is_err();
                    }
                    // The children of one that ends become ours, and are seen then.
                    self.ended.recv().await;
                }
            };
            if tokio::time::timeout(patience, gone).await.is_ok() {
                return;
            }
        }
    }
}

/// Completes when the command has ended, having waited for whatever else ended meanwhile.
async fn ended(
    children: &mut tokio::signal::unix::Signal,
    pid: Pid,
    status: &mut Option<WaitStatus>,
) -> WaitStatus {
    loop {
        reap(pid, status);
        if let Some(status) = *status {
            return status;
        }
        children.recv().await;
    }
}

/// Waits for every child that has ended: the command, and orphans that became ours.
fn reap(pid: Pid, status: &mut Option<WaitStatus>) {
    while let Ok(Some((child, how))) = wait(WaitOptions::NOHANG) {
        if child == pid {
            *status = Some(how);
        }
    }
}

async fn next(signals: &mut [(Signal, tokio::signal::unix::Signal)]) -> Signal {
    let each = signals.iter_mut().map(|(signal, listener)| {
        Box::pin(async move {
            listener.recv().await;
            *signal
        })
    });
    futures::future::select_all(each).await.0
}

/// Whether this process is in the foreground group of a terminal.
fn in_foreground() -> bool {
    std::fs::File::open("/dev/tty")
        .is_ok_and(|terminal| rustix::termios::tcgetpgrp(&terminal).is_ok_and(|group| group == getpgrp()))
}

/// The processes whose parent is this one.
fn children() -> Vec<Pid> {
    let own = getpid().as_raw_nonzero().to_string();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name may hold anything, parentheses too: state and parent come after the last one.
            let parent = stat.rsplit(')').next()?.split_whitespace().nth(1)?;
            (parent == own).then_some(pid)
        })
        .collect()
}

fn limit(soft: Option<u64>) -> String {
    soft.map_or_else(|| UNLIMITED.to_owned(), |soft| soft.to_string())
}

const UNLIMITED: &str = "unlimited";

fn parse_limit(text: &str) -> Result<Limit, String> {
    if text == UNLIMITED {
        return Ok(Limit(None));
    }
    text.parse().map(|soft| Limit(Some(soft))).map_err(|_| format!("neither a number nor {UNLIMITED}"))
}

/// A soft limit of the kernel's; `None` is none.
#[derive(Debug, Clone, Copy)]
struct Limit(Option<u64>);

/// The last step before the command, in its own process.
#[derive(Debug, clap::Args)]
pub(crate) struct StartArgs {
    #[arg(long)]
    parent: u32,
    #[arg(long, value_parser = parse_limit)]
    descriptors: Limit,
    #[arg(long, value_parser = parse_limit)]
    core: Limit,
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Becomes the command, bound to its parent's life. What has to happen between fork and exec happens here,
/// in a program of its own, because only there is it safe.
pub(crate) fn start_command(args: &StartArgs, printer: &Printer) -> Exit {
    // Not SIGTERM, which may be ignored: nothing outside the mesh's protection is to live on.
    if supervised::end_with(args.parent, Signal::KILL).is_err() {
        return signalled(Signal::KILL);
    }
    let limits = Original { descriptors: args.descriptors.0, core: args.core.0 };
    if let Err(error) = limits.restore() {
        printer.failure(&Failure::new("the command's limits cannot be set").because(&error));
        return Exit::Command(CANNOT_RUN);
    }
    let [program, arguments @ ..] = args.command.as_slice() else { return Exit::Usage };
    let error = Command::new(program).args(arguments).exec();
    printer.failure(&Failure::new(format!("{} cannot be run", program.display())).because(&error));
    Exit::Command(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_RUN })
}
