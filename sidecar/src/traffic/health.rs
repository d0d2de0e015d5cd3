//! Active health checks: endpoints, or the app, are asked at intervals whether they are well. How they are
//! asked is the [`Prober`]'s part; here is when, and what follows from the answers.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::stream::{self, StreamExt as _};
use identity::clock::SharedClock;

use super::config::HealthCheck;
use super::endpoint::{Endpoints, Unavailable};
use super::random::Dice;
use super::resolve::jittered;
use crate::BoxError;

/// Questions under way at once: a service with thousands of endpoints is not asked in one burst.
const MAX_AT_ONCE: usize = 32;

/// Asks one endpoint.
pub trait Prober: Send + Sync {
    /// An error says why it is not well.
    fn probe(&self, address: SocketAddr) -> BoxFuture<'static, Result<(), BoxError>>;
}

/// What answers in a row say: it takes `rise` good ones to become well, `fall` bad ones to become ill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    rise: u32,
    fall: u32,
    well: bool,
    /// How many answers in a row spoke against the present state.
    against: u32,
}

impl Health {
    /// Well or ill until answers say otherwise.
    pub fn new(check: &HealthCheck, well: bool) -> Self {
        Self { rise: check.rise, fall: check.fall, well, against: 0 }
    }

    /// Takes note of an answer; returns the new state if that changed it.
    pub fn answered(&mut self, good: bool) -> Option<bool> {
        if good == self.well {
            self.against = 0;
            return None;
        }
        self.against += 1;
        if self.against < if good { self.rise } else { self.fall } {
            return None;
        }
        self.well = good;
        self.against = 0;
        Some(good)
    }

    /// Whether it is well.
    pub fn is_well(&self) -> bool {
        self.well
    }
}

/// Asks all endpoints of a service for ever, and makes those unavailable that are ill.
///
/// A new endpoint counts as well: requests find out faster than questions, and a service whose check is
/// misconfigured is not gone from the start.
pub async fn watch<C>(
    endpoints: Arc<Endpoints<C>>,
    check: HealthCheck,
    prober: Arc<dyn Prober>,
    clock: SharedClock,
    dice: Dice,
) {
    let mut known: HashMap<SocketAddr, Health> = HashMap::new();
    loop {
        let members: Vec<_> = endpoints.now().iter().map(|(_, member)| Arc::clone(member)).collect();
        let mut before = std::mem::take(&mut known);
        let questions = members.into_iter().map(|member| {
            let answer = ask(&*prober, member.address, &check, &clock);
            async move { (member, answer.await) }
        });
        let mut answers = stream::iter(questions).buffer_unordered(MAX_AT_ONCE);
        while let Some((member, answer)) = answers.next().await {
            let address = member.address;
            let mut health = before.remove(&address).unwrap_or(Health::new(&check, true));
            if let Some(well) = health.answered(answer.is_ok()) {
                endpoints.set_unavailable(&member, Unavailable::Unhealthy, !well);
                match &answer {
                    Ok(()) => tracing::info!(endpoint = %address, "an endpoint is well again"),
                    Err(error) => tracing::warn!(endpoint = %address, %error, "an endpoint is ill"),
                }
            }
            known.insert(address, health);
        }
        clock.sleep(jittered(check.every, &dice)).await;
    }
}

/// Asks the one app for ever and tells each change; it counts as ill until it first answers well.
pub async fn watch_app(
    address: SocketAddr,
    check: HealthCheck,
    prober: Arc<dyn Prober>,
    clock: SharedClock,
    dice: Dice,
    changed: impl Fn(bool),
) {
    let mut health = Health::new(&check, false);
    loop {
        let answer = ask(&*prober, address, &check, &clock).await;
        if let Some(well) = health.answered(answer.is_ok()) {
            match &answer {
                Ok(()) => tracing::info!(app = %address, "the app is well"),
                Err(error) => tracing::warn!(app = %address, %error, "the app is ill"),
            }
            changed(well);
        }
        clock.sleep(jittered(check.every, &dice)).await;
    }
}

fn ask(
    prober: &dyn Prober,
    address: SocketAddr,
    check: &HealthCheck,
    clock: &SharedClock,
) -> impl Future<Output = Result<(), BoxError>> + 'static {
    let (probe, late) = (prober.probe(address), clock.sleep(check.timeout));
    async move {
        tokio::select! {
            answer = probe => answer,
            () = late => Err("no answer in time".into()),
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.well { "well" } else { "ill" })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;
    use std::time::Duration;

    use futures::FutureExt as _;
    use identity::clock::ManualClock;
    use proptest::prelude::*;

    use super::*;
    use crate::traffic::config::Check;
    use crate::traffic::endpoint::tests::{address, endpoints, members};

    fn check(rise: u32, fall: u32) -> HealthCheck {
        let seconds = Duration::from_secs;
        HealthCheck { check: Check::Connect, every: seconds(5), timeout: seconds(1), rise, fall }
    }

    /// Some are ill; some do not answer at all.
    #[derive(Default)]
    struct Ward {
        ill: Mutex<BTreeSet<SocketAddr>>,
        silent: Mutex<BTreeSet<SocketAddr>>,
    }

    impl Prober for Ward {
        fn probe(&self, address: SocketAddr) -> BoxFuture<'static, Result<(), BoxError>> {
            if self.silent.lock().unwrap().contains(&address) {
                return Box::pin(std::future::pending());
            }
            let ill = self.ill.lock().unwrap().contains(&address);
            Box::pin(async move { if ill { Err("ill".into()) } else { Ok(()) } })
        }
    }

    #[test]
    fn it_takes_several_answers_in_a_row() {
        let mut health = Health::new(&check(2, 3), true);
        let answers = [false, false, true, false, false, false, true, false, true, true];
        let changes: Vec<_> = answers.iter().map(|good| health.answered(*good)).collect();
        let expected = [None, None, None, None, None, Some(false), None, None, None, Some(true)];
        assert_eq!(changes, expected);
        assert!(health.is_well());
    }

    #[test]
    fn ill_and_silent_endpoints_are_left_out_until_they_are_well() {
        let clock = ManualClock::at(Duration::from_secs(1000));
        let (endpoints, ward) = (Arc::new(endpoints(4)), Arc::new(Ward::default()));
        let shared: SharedClock = clock.clone();
        let prober: Arc<dyn Prober> = ward.clone();
        let mut task = Box::pin(watch(Arc::clone(&endpoints), check(1, 2), prober, shared, Dice::seeded(1)));
        let mut round = || {
            assert!(task.as_mut().now_or_never().is_none());
            clock.advance(Duration::from_secs(1));
            assert!(task.as_mut().now_or_never().is_none());
            clock.advance(Duration::from_millis(5_500));
            let all = members(&endpoints);
            all.iter().map(|member| member.is_available()).collect::<Vec<_>>()
        };
        assert_eq!(round(), [true; 4]);
        ward.ill.lock().unwrap().insert(address(1));
        ward.silent.lock().unwrap().insert(address(2));
        assert_eq!(round(), [true; 4]);
        assert_eq!(round(), [true, false, false, true]);
        ward.ill.lock().unwrap().clear();
        assert_eq!(round(), [true, true, false, true]);
    }

    #[test]
    fn the_app_is_ill_until_it_answers() {
        let clock = ManualClock::at(Duration::from_secs(1000));
        let ward = Arc::new(Ward::default());
        let changes = Mutex::new(Vec::new());
        ward.ill.lock().unwrap().insert(address(0));
        let prober: Arc<dyn Prober> = ward.clone();
        let shared: SharedClock = clock.clone();
        let told = |well| changes.lock().unwrap().push(well);
        let mut task = Box::pin(watch_app(address(0), check(1, 1), prober, shared, Dice::seeded(1), told));
        assert!(task.as_mut().now_or_never().is_none());
        assert!(changes.lock().unwrap().is_empty());
        ward.ill.lock().unwrap().clear();
        clock.advance(Duration::from_secs(6));
        assert!(task.as_mut().now_or_never().is_none());
        assert_eq!(*changes.lock().unwrap(), [true]);
    }

    proptest! {
        #[test]
        fn a_change_follows_exactly_as_many_answers_against(
            rise in 1u32..5, fall in 1u32..5, start: bool, answers in prop::collection::vec(any::<bool>(), 0..100),
        ) {
            let mut health = Health::new(&check(rise, fall), start);
            let (mut state, mut against) = (start, 0);
            for good in answers {
                against = if good == state { 0 } else { against + 1 };
                let needed = if state { fall } else { rise };
                let changes = against == needed;
                prop_assert_eq!(health.answered(good), changes.then_some(good));
                if changes {
                    state = good;
                    against = 0;
                }
                prop_assert_eq!(health.is_well(), state);
            }
        }
    }
}
