//! What a process waits for before it says that it is ready.

use identity::clock::SharedClock;
use identity::{IdentitySource, SpiffeId};

/// What is still to come once a verb has been started.
#[derive(Debug)]
pub(crate) enum Readiness {
    /// Nothing: what it needs was there, or it would not have started.
    Started,
    /// Its own identity. Without one no peer gets past the handshake.
    Identity(Awaited),
}

/// The identity that a process is to get.
#[derive(Debug)]
pub(crate) struct Awaited {
    pub(crate) source: IdentitySource,
    /// Which one, where the configuration says so.
    pub(crate) id: Option<SpiffeId>,
    /// Who gives it, for people: an agent's socket, files.
    pub(crate) giver: String,
    pub(crate) clock: SharedClock,
}

impl Readiness {
    /// Completes when nothing is missing.
    pub(crate) async fn reached(&self) {
        let Self::Identity(awaited) = self else { return };
        let mut source = awaited.source.clone();
        while self.missing().is_some() {
            if !source.changed().await {
                // The watch is a critical task: its end ends the process, which is not ours to do.
                std::future::pending::<()>().await;
            }
        }
    }

    /// What is missing, in words.
    pub(crate) fn missing(&self) -> Option<String> {
        let Self::Identity(Awaited { source, id, giver, clock }) = self else { return None };
        let Some(identity) = source.valid_at(clock.now()) else {
            return Some(format!("no valid identity has come from {giver}"));
        };
        let got = identity.svid.id();
        let other = id.as_ref().filter(|wanted| *wanted != got)?;
        Some(format!("{giver} gave {got}, expected {other}"))
    }
}
