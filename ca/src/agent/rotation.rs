//! An SVID for every entry of this host, replaced in time.
//!
//! Time comes from the injected clock alone. An SVID that could not be replaced is kept for as long as
//! it is valid; one that has expired is handed out no more.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use thiserror::Error;
use tokio::sync::watch;

use identity::clock::SharedClock;
use identity::{Scope, X509Svid};

use super::MAX_NAP;
use super::upstream::{HostView, LocalEntry};
use crate::backoff::Backoff;
use crate::control::MAX_SIGN_BATCH;
use crate::csr::PendingKey;
use crate::random::{Random, SharedRandom, up_to};

/// Waits between attempts after one that failed.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Largest share of the interval by which a rotation comes early, so that hosts that started together do
/// not ask together.
const JITTER_SHARE: u32 = 10;
/// How far the clock may stand before the moment at which an SVID was received: more means that it was
/// set back, and the SVID may not be valid yet for others.
const CLOCK_SLACK: Duration = Duration::from_secs(5);

/// Entry names and the requests (DER) to sign for them.
pub(super) type Keys = Vec<(String, Vec<u8>)>;
/// One outcome a key, in order: the chain (concatenated DER), or why not.
pub(super) type Answers = Vec<Result<Vec<u8>, String>>;
/// What is handed out, by entry name.
pub(super) type Svids = HashMap<String, Arc<X509Svid>>;

/// Why a batch was not signed.
#[derive(Debug, Error)]
#[error("{0}")]
pub(super) struct SignError(pub(super) String);

/// Who signs: control, or a test.
pub(super) trait Signer: Send + Sync {
    /// Signs a batch.
    fn sign(&self, keys: Keys) -> BoxFuture<'_, Result<Answers, SignError>>;
}

struct Held {
    svid: Arc<X509Svid>,
    received: Duration,
    early: Duration,
}

impl Held {
    /// When it is to be replaced.
    fn due(&self, rotate_after: Duration) -> Duration {
        let life = self.svid.not_after().saturating_sub(self.received);
        let interval = rotate_after.min(life / 2);
        self.received + interval.saturating_sub(self.early.min(interval / JITTER_SHARE))
    }

    fn is_due(&self, rotate_after: Duration, now: Duration) -> bool {
        now >= self.due(rotate_after) || now + CLOCK_SLACK < self.received
    }
}

/// Keeps the SVIDs of the host's entries current for as long as the scope lives.
pub(super) async fn keep(
    signer: Arc<dyn Signer>,
    mut view: watch::Receiver<Option<Arc<HostView>>>,
    publisher: watch::Sender<Arc<Svids>>,
    clock: SharedClock,
    random: SharedRandom,
    scope: Scope,
) {
    let mut held: HashMap<String, Held> = HashMap::new();
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let mut not_before = Duration::ZERO;
    loop {
        let Some(current) = view.borrow_and_update().clone() else {
            tokio::select! {
                changed = view.changed() => match changed { Ok(()) => continue, Err(_) => return },
                () = scope.draining() => return,
            }
        };
        let now = clock.now();
        held.retain(|entry_id, svid| {
            now < svid.svid.not_after() && current.entries.iter().any(|entry| entry.entry_id == *entry_id)
        });
        publish(&publisher, &held);
        let due: Vec<&LocalEntry> = current
            .entries
            .iter()
            .filter(|entry| {
                held.get(&entry.entry_id).is_none_or(|svid| svid.is_due(current.rotate_after, now))
            })
            .take(MAX_SIGN_BATCH)
            .collect();
        if !due.is_empty() && now >= not_before {
            // A change of entries interrupts a call that hangs: new entries do not wait for its timeout.
            let outcome = tokio::select! {
                outcome = rotate(&*signer, &due, &mut held, &clock, &*random) => outcome,
                changed = view.changed() => match changed {
                    Ok(()) => { not_before = Duration::ZERO; continue }
                    Err(_) => return,
                },
                () = scope.draining() => return,
            };
            match outcome {
                Ok(()) => backoff.reset(),
                Err(error) => {
                    let wait = backoff.wait(&*random);
                    not_before = clock.now() + wait;
                    tracing::warn!(%error, retry_in = ?wait, "SVIDs could not be replaced; those in force are kept");
                }
            }
            continue;
        }
        let wait = next_event(&current, &held, not_before, now).min(MAX_NAP);
        tokio::select! {
            () = clock.sleep(wait) => {}
            changed = view.changed() => match changed {
                // News may be what the failure was about: try at once.
                Ok(()) => not_before = Duration::ZERO,
                Err(_) => return,
            },
            () = scope.draining() => return,
        }
    }
}

/// Time until something is to be done: a rotation or a retry, or an expiry.
fn next_event(
    view: &HostView,
    held: &HashMap<String, Held>,
    not_before: Duration,
    now: Duration,
) -> Duration {
    let rotation = view.entries.iter().map(|entry| {
        held.get(&entry.entry_id).map_or(Duration::ZERO, |svid| svid.due(view.rotate_after)).max(not_before)
    });
    let expiry = held.values().map(|svid| svid.svid.not_after());
    rotation.chain(expiry).min().map_or(MAX_NAP, |at| at.saturating_sub(now))
}

/// Makes a key for each entry, has them signed, and takes over what fits.
async fn rotate(
    signer: &dyn Signer,
    due: &[&LocalEntry],
    held: &mut HashMap<String, Held>,
    clock: &SharedClock,
    random: &dyn Random,
) -> Result<(), SignError> {
    let failed = |error: rcgen::Error| SignError(format!("no key could be made: {error}"));
    let mut keys = Vec::with_capacity(due.len());
    let mut requests = Vec::with_capacity(due.len());
    for entry in due {
        let key = PendingKey::generate().map_err(failed)?;
        requests.push((entry.entry_id.clone(), key.request().map_err(failed)?));
        keys.push(key);
    }
    let answers = signer.sign(requests).await?;
    let mut refused = Vec::new();
    for ((entry, key), answer) in due.iter().zip(keys).zip(answers) {
        let svid = answer.and_then(|chain| key.with_chain(&chain).map_err(|error| error.to_string()));
        match svid {
            Ok(svid) if *svid.id() == entry.id => {
                tracing::info!(id = %svid.id(), serial = svid.serial(), "SVID replaced");
                let received = clock.now();
                let early = up_to(random, svid.not_after().saturating_sub(received) / JITTER_SHARE);
                held.insert(entry.entry_id.clone(), Held { svid: Arc::new(svid), received, early });
            }
            Ok(svid) => refused.push(format!("{}: got {} instead", entry.id, svid.id())),
            Err(why) => refused.push(format!("{}: {why}", entry.id)),
        }
    }
    if refused.is_empty() { Ok(()) } else { Err(SignError(refused.join("; "))) }
}

fn publish(publisher: &watch::Sender<Arc<Svids>>, held: &HashMap<String, Held>) {
    publisher.send_if_modified(|published| {
        let same = published.len() == held.len()
            && held.iter().all(|(entry_id, svid)| {
                published.get(entry_id).is_some_and(|old| old.serial() == svid.svid.serial())
            });
        if !same {
            *published = Arc::new(
                held.iter().map(|(entry_id, svid)| (entry_id.clone(), Arc::clone(&svid.svid))).collect(),
            );
        }
        !same
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures::FutureExt as _;
    use identity::clock::{Clock as _, ManualClock};
    use identity::{SpiffeId, TrustDomain};

    use super::*;
    use crate::authority::{Authority, DEFAULT_ROOT_TTL, LeafRequest};
    use crate::csr::P256PublicKey;
    use crate::entry::Selectors;
    use crate::random::{SystemRandom, Zeros};

    const NOW: Duration = Duration::from_secs(1_800_000_000);
    const TTL: Duration = Duration::from_secs(120);

    /// Signs at once, unless told not to, and writes down when it was asked.
    struct Test {
        authority: Authority,
        clock: Arc<ManualClock>,
        away: AtomicBool,
        asked: Mutex<Vec<u64>>,
    }

    impl Signer for Test {
        fn sign(&self, keys: Keys) -> BoxFuture<'_, Result<Answers, SignError>> {
            async move {
                self.asked.lock().unwrap().push((self.clock.now() - NOW).as_secs());
                if self.away.load(Ordering::SeqCst) {
                    return Err(SignError("away".into()));
                }
                let id = SpiffeId::new("spiffe://bank.example/service/web").unwrap();
                let sign = |(_, csr): (String, Vec<u8>)| {
                    let public_key = P256PublicKey::from_csr(&csr).unwrap();
                    let request =
                        LeafRequest { public_key: &public_key, id: &id, dns: &[], ips: &[], ttl: TTL };
                    let issued =
                        self.authority.issue(&request, &*SystemRandom::shared(), self.clock.now()).unwrap();
                    Ok(issued.certificate.to_vec())
                };
                Ok(keys.into_iter().map(sign).collect())
            }
            .boxed()
        }
    }

    struct Rig {
        signer: Arc<Test>,
        clock: Arc<ManualClock>,
        view: watch::Sender<Option<Arc<HostView>>>,
        svids: watch::Receiver<Arc<Svids>>,
        scope: Scope,
    }

    fn entry(name: &str) -> LocalEntry {
        LocalEntry {
            entry_id: name.into(),
            id: SpiffeId::new("spiffe://bank.example/service/web").unwrap(),
            selectors: Selectors { uid: Some(1), ..Selectors::default() },
        }
    }

    impl Rig {
        fn start() -> Self {
            let clock = ManualClock::at(NOW);
            let domain = TrustDomain::new("bank.example").unwrap();
            let authority =
                Authority::generate(domain, DEFAULT_ROOT_TTL, &*SystemRandom::shared(), NOW).unwrap();
            let signer = Arc::new(Test {
                authority,
                clock: Arc::clone(&clock),
                away: AtomicBool::new(false),
                asked: Mutex::default(),
            });
            let (view, view_receiver) = watch::channel(None);
            let (publisher, svids) = watch::channel(Arc::default());
            let scope = Scope::new();
            scope.spawn_critical(
                "rotation",
                keep(
                    Arc::clone(&signer) as Arc<dyn Signer>,
                    view_receiver,
                    publisher,
                    Arc::clone(&clock) as SharedClock,
                    Arc::new(Zeros),
                    scope.clone(),
                ),
            );
            Self { signer, clock, view, svids, scope }
        }

        fn tell(&self, entries: Vec<LocalEntry>) {
            let bundle = self.signer.authority.bundle().clone();
            let rotate_after = Duration::from_secs(20);
            self.view.send_replace(Some(Arc::new(HostView {
                bundle,
                entries,
                rotate_after,
                pseudonym_key: Default::default(),
            })));
        }

        /// Lets the task run until it waits for the clock or for news.
        async fn settle(&self) {
            for _ in 0..50 {
                tokio::task::yield_now().await;
            }
        }

        /// Moves time on second by second, as a real clock would.
        async fn pass(&self, seconds: u64) {
            for _ in 0..seconds {
                self.clock.advance(Duration::from_secs(1));
                self.settle().await;
            }
        }

        fn asked(&self) -> Vec<u64> {
            self.signer.asked.lock().unwrap().clone()
        }

        async fn stop(self) {
            self.scope.drain();
            assert_eq!(self.scope.finished(Duration::from_secs(5)).await, Ok(()));
        }
    }

    #[tokio::test]
    async fn identity_9_an_svid_of_120_s_rotates_every_20_s() {
        let rig = Rig::start();
        rig.tell(vec![entry("a")]);
        rig.settle().await;
        rig.pass(65).await;
        assert_eq!(rig.asked(), [0, 20, 40, 60]);
        rig.stop().await;
    }

    #[tokio::test]
    async fn identity_42_failed_renewals_are_retried_and_never_drop_a_valid_svid() {
        let rig = Rig::start();
        rig.tell(vec![entry("a")]);
        rig.settle().await;
        let serial = rig.svids.borrow()["a"].serial().to_owned();
        rig.signer.away.store(true, Ordering::SeqCst);
        rig.pass(60).await;
        assert!(rig.asked().len() > 3, "it tries again: {:?}", rig.asked());
        assert!(rig.asked().len() < 40, "and backs off: {:?}", rig.asked());
        assert_eq!(rig.svids.borrow()["a"].serial(), serial, "the valid one is kept");
        rig.signer.away.store(false, Ordering::SeqCst);
        rig.pass(11).await;
        assert_ne!(rig.svids.borrow()["a"].serial(), serial);
        rig.stop().await;
    }

    #[tokio::test]
    async fn an_expired_svid_is_handed_out_no_more_and_comes_back_with_control() {
        let rig = Rig::start();
        rig.tell(vec![entry("a")]);
        rig.settle().await;
        rig.signer.away.store(true, Ordering::SeqCst);
        rig.pass(119).await;
        assert!(rig.svids.borrow().contains_key("a"));
        rig.pass(1).await;
        assert!(!rig.svids.borrow().contains_key("a"));
        rig.signer.away.store(false, Ordering::SeqCst);
        rig.pass(11).await;
        assert!(rig.svids.borrow().contains_key("a"));
        rig.stop().await;
    }

    #[tokio::test]
    async fn new_entries_are_signed_at_once_and_removed_ones_withdrawn() {
        let rig = Rig::start();
        rig.tell(vec![entry("a")]);
        rig.settle().await;
        rig.pass(3).await;
        rig.tell(vec![entry("a"), entry("b")]);
        rig.settle().await;
        assert_eq!(rig.asked(), [0, 3]);
        assert_eq!(rig.svids.borrow().len(), 2);
        rig.tell(vec![entry("b")]);
        rig.settle().await;
        assert!(!rig.svids.borrow().contains_key("a"));
        assert_eq!(rig.asked(), [0, 3], "the one that stays is not signed again");
        rig.stop().await;
    }

    #[tokio::test]
    async fn identity_43_clock_jumps_heal_without_a_restart() {
        let rig = Rig::start();
        rig.tell(vec![entry("a")]);
        rig.settle().await;
        let mut serial = rig.svids.borrow()["a"].serial().to_owned();
        for jump in [NOW + Duration::from_secs(7_200), NOW + Duration::from_secs(60)] {
            rig.clock.set(jump);
            rig.settle().await;
            // Set back, the sleeper wakes at its old time only on a clock that stands; a real one naps.
            rig.view.send_modify(|_| {});
            rig.settle().await;
            let next = rig.svids.borrow()["a"].serial().to_owned();
            assert_ne!(next, serial, "at {jump:?}");
            let valid = rig.svids.borrow()["a"].not_before() <= jump;
            assert!(valid);
            serial = next;
        }
        rig.stop().await;
    }
}
