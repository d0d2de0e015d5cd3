//! What a process waits for before it says that it is ready.

use identity::clock::SharedClock;
use identity::{IdentitySource, SpiffeId};
use policy::Withheld;

use crate::policies::Current;

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
    /// The policies that are to come, where control hands them out.
    pub(crate) policies: Option<Current>,
}

impl Readiness {
    /// Completes when nothing is missing.
    pub(crate) async fn reached(&self) {
        let Self::Identity(awaited) = self else { return };
        let mut source = awaited.source.clone();
        let mut policies = awaited.policies.clone();
        while self.missing().is_some() {
            let policy = async {
                match &mut policies {
                    Some(policies) => policies.changed().await.is_ok(),
                    None => std::future::pending().await,
                }
            };
            let goes_on = tokio::select! {
                goes_on = source.changed() => goes_on,
                goes_on = policy => goes_on,
            };
            if !goes_on {
                // The watch is a critical task: its end ends the process, which is not ours to do.
                std::future::pending::<()>().await;
            }
        }
    }

    /// What is missing, in words.
    pub(crate) fn missing(&self) -> Option<String> {
        let Self::Identity(Awaited { source, id, giver, clock, policies }) = self else { return None };
        let Some(identity) = source.valid_at(clock.now()) else {
            return Some(format!("no valid identity has come from {giver}"));
        };
        let got = identity.svid.id();
        if let Some(other) = id.as_ref().filter(|wanted| *wanted != got) {
            return Some(format!("{giver} gave {got}, expected {other}"));
        }
        let withheld = policies.as_ref().and_then(|policies| policies.borrow().withheld());
        (withheld == Some(Withheld::NotReceived)).then(|| format!("no policies have come from {giver}"))
    }
}
