//! Where a process gets its own identity from, and how it hears of a rotation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use crate::bundle::BundleSet;
use crate::svid::X509Svid;

/// A process's identity at one moment: replaced whole when anything in it changes.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Who we are.
    pub svid: X509Svid,
    /// Whom we can verify.
    pub bundles: Arc<BundleSet>,
    /// Counts up by one a replacement; connections remember the one they were made under.
    pub generation: u64,
}

/// A handle on the current [`Identity`], cheap to clone; empty until the first one arrives.
#[derive(Debug, Clone)]
pub struct IdentitySource(watch::Receiver<Option<Arc<Identity>>>);

/// The writing end of an [`IdentitySource`].
#[derive(Debug)]
pub struct IdentityPublisher {
    sender: watch::Sender<Option<Arc<Identity>>>,
    /// Outlives a withdrawal: a generation that came back would make connections and verified signers of
    /// the withdrawn identity pass for the new one's.
    generation: AtomicU64,
}

impl IdentitySource {
    /// A source and the publisher that feeds it.
    pub fn channel() -> (IdentityPublisher, Self) {
        let (sender, receiver) = watch::channel(None);
        (IdentityPublisher { sender, generation: AtomicU64::new(0) }, Self(receiver))
    }

    /// A source that never changes.
    pub fn fixed(svid: X509Svid, bundles: BundleSet) -> Self {
        let (publisher, source) = Self::channel();
        publisher.publish(svid, Arc::new(bundles));
        source
    }

    /// The current identity, if one has arrived.
    pub fn current(&self) -> Option<Arc<Identity>> {
        self.0.borrow().clone()
    }

    /// The current identity, if it is there and valid at `now` (since the Unix epoch).
    pub fn valid_at(&self, now: Duration) -> Option<Arc<Identity>> {
        self.current().filter(|identity| now < identity.svid.not_after())
    }

    /// Waits for the first identity. `None` if the publisher is gone without one.
    pub async fn ready(&self) -> Option<Arc<Identity>> {
        let mut receiver = self.0.clone();
        let identity = receiver.wait_for(Option::is_some).await.ok()?;
        identity.clone()
    }

    /// Waits for the next replacement or withdrawal. `false` if the publisher is gone: nothing will
    /// change any more.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}

impl IdentityPublisher {
    /// Replaces the identity.
    pub fn publish(&self, svid: X509Svid, bundles: Arc<BundleSet>) {
        self.sender.send_modify(|current| {
            let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
            *current = Some(Arc::new(Identity { svid, bundles, generation }));
        });
    }

    /// Takes the identity away: handshakes fail from now on.
    pub fn withdraw(&self) {
        self.sender.send_replace(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestAuthority;

    #[test]
    fn generations_go_on_counting_after_a_withdrawal() {
        let authority = TestAuthority::new("bank.example");
        let bundles = Arc::new(BundleSet::new([authority.bundle()]));
        let (publisher, source) = IdentitySource::channel();
        publisher.publish(authority.issue("/service/web"), Arc::clone(&bundles));
        let first = source.current().unwrap().generation;
        publisher.withdraw();
        publisher.publish(authority.issue("/service/web"), bundles);
        assert!(source.current().unwrap().generation > first);
    }
}
