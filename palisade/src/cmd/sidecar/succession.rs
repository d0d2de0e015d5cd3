//! From the process that served before to this one, and from this one to the next.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use identity::Scope;
use identity::clock::SharedClock;

use crate::failure::Failure;
use crate::handover::{self, Predecessor};
use crate::listen::Listeners;
use crate::readiness::Readiness;

/// How long those who wait at the service manager's sockets are left to: an agent that starts too is there by
/// then, and past it an error is kinder than silence.
const QUEUE_PATIENCE: Duration = Duration::from_secs(10);

/// Where this process's sockets come from, and where they go.
pub(super) struct Succession {
    /// Where a successor comes to, if one may come.
    at: Option<PathBuf>,
    predecessor: Option<Predecessor>,
    pub(super) listeners: Listeners,
}

/// Where the sidecar `name` hands over if nothing else is said: systemd's directory for the unit's sockets.
pub(super) fn default_place(name: &str) -> Option<PathBuf> {
    // systemd separates several by colons.
    let directories = std::env::var("RUNTIME_DIRECTORY").ok()?;
    let first = directories.split(':').next().filter(|first| !first.is_empty())?;
    Some(Path::new(first).join(format!("sidecar-{name}.sock")))
}

impl Succession {
    /// Takes what the service manager passed, and what the process at `at`, if there is one, hands over.
    pub(super) fn begin(at: Option<PathBuf>) -> Result<Self, Failure> {
        let mut listeners = Listeners::from_manager()?;
        let mut predecessor = None;
        if let Some((found, theirs)) = at.as_deref().map(handover::ask).transpose()?.flatten() {
            listeners.add_predecessors(theirs);
            predecessor = Some(found);
        }
        Ok(Self { at, predecessor, listeners })
    }

    /// Waits for what this process serves with, where accepting connections any sooner would take them from
    /// a predecessor that can serve, or answer those that wait with an error.
    pub(super) async fn wait(&self, ready: &Readiness, clock: &SharedClock) -> Result<(), Failure> {
        if self.predecessor.is_some() {
            return tokio::select! {
                () = ready.reached() => Ok(()),
                () = clock.sleep(handover::READY_TIMEOUT) => Err(not_ready(ready)),
            };
        }
        if self.listeners.queued() {
            tokio::select! {
                () = ready.reached() => {}
                () = clock.sleep(QUEUE_PATIENCE) => tracing::warn!("not ready yet; those who wait are refused"),
            }
        }
        Ok(())
    }

    /// Relieves the predecessor, then waits for a successor.
    pub(super) async fn take_over(self, clock: SharedClock, scope: &Scope) -> Result<(), Failure> {
        let succeeds = self.predecessor.is_some();
        if let Some(predecessor) = self.predecessor {
            predecessor.relieve(&clock).await;
        }
        let Some(at) = self.at else { return Ok(()) };
        match handover::offer(&at, self.listeners.taken(), clock, scope) {
            // The one before has gone: better no successor than nobody now.
            Err(failure) if succeeds => {
                tracing::error!(reason = failure.message, causes = ?failure.causes, "no successor can take over");
                Ok(())
            }
            outcome => outcome,
        }
    }
}

fn not_ready(ready: &Readiness) -> Failure {
    let failure = Failure::new("not taken over: this process did not get ready; the one before serves on");
    match ready.missing() {
        Some(missing) => failure.because(&io::Error::other(missing)),
        None => failure,
    }
}
