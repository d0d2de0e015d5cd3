//! All of it for one service together: whom a request goes to, what its outcome means, what is tried again.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, StatusCode};

use super::balance::Balancer;
use super::breaker::Breaker;
use super::config::{Timeouts, Traffic};
use super::endpoint::{Endpoint, Endpoints, InFlight, Member, Placement};
use super::hedge::Hedging;
use super::outlier::{Ejector, Outcome};
use super::random::Dice;
use super::retry::Retrier;

/// Decides for the requests to one service; `C` is what its client keeps with each endpoint.
#[derive(Debug)]
pub struct Steering<C> {
    /// Where the service is found.
    pub endpoints: Arc<Endpoints<C>>,
    /// What may be under way.
    pub breaker: Arc<Breaker>,
    /// What is tried again.
    pub retrier: Retrier,
    /// When a request is sent twice.
    pub hedging: Option<Hedging>,
    /// How long each stage may take.
    pub timeouts: Timeouts,
    /// What decides all that chance decides.
    pub dice: Dice,
    balancer: Balancer,
    ejector: Ejector,
}

impl<C: Default> Steering<C> {
    /// Steers to `endpoints` until they are replaced.
    pub fn new(traffic: Traffic, endpoints: &[SocketAddr], dice: Dice) -> Self {
        let Traffic { topology, prefer, panic_below, .. } = &traffic;
        let placement =
            Placement { topology: Arc::clone(topology), prefer: *prefer, panic_below: panic_below.0 };
        let known = Endpoints::new(placement);
        known.replace(endpoints.iter().copied().map(Endpoint::from));
        Self {
            endpoints: Arc::new(known),
            breaker: Breaker::new(traffic.limits),
            retrier: Retrier::new(traffic.retries),
            hedging: traffic.hedge.map(Hedging::new),
            timeouts: traffic.timeouts,
            balancer: Balancer::new(traffic.balance, dice.another()),
            ejector: Ejector::new(traffic.eject),
            dice,
        }
    }
}

impl<C> Steering<C> {
    /// The key of a request, as [`Balancer::key`] has it.
    pub fn key(&self, headers: &HeaderMap, source: IpAddr, user: Option<&str>) -> Option<u64> {
        self.balancer.key(headers, source, user)
    }

    /// The endpoint for a request, as [`Balancer::pick`] has it.
    pub fn pick(
        &self,
        key: Option<u64>,
        avoid: Option<&Arc<Member<C>>>,
        now: Duration,
    ) -> Option<InFlight<C>> {
        self.balancer.pick(&self.endpoints.now(), key, avoid, now)
    }

    /// The endpoint answered, with this status, `took` after the request was given to it.
    pub fn answered(&self, endpoint: &Arc<Member<C>>, status: StatusCode, took: Duration, now: Duration) {
        let outcome = Outcome::from(status);
        match outcome {
            // Whoever answers for an app that is not there answers fast.
            Outcome::Gateway => endpoint.load.failed(took, now),
            _ => endpoint.load.answered(took, now),
        }
        self.ejector.record(&self.endpoints, endpoint, outcome, now);
    }

    /// The endpoint gave no answer.
    pub fn failed(&self, endpoint: &Arc<Member<C>>, took: Duration, now: Duration) {
        endpoint.load.failed(took, now);
        self.ejector.record(&self.endpoints, endpoint, Outcome::Connect, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::config::RetryOn;
    use crate::traffic::endpoint::Unavailable;
    use crate::traffic::endpoint::tests::address;

    const START: Duration = Duration::from_secs(1_700_000_000);

    /// Sends one request a millisecond; `answers` says whether an endpoint answers, after 5 ms, or refuses
    /// the connection. Returns how many requests failed and how many attempts there were.
    fn run(
        steering: &Steering<()>,
        millis: std::ops::Range<u64>,
        answers: impl Fn(SocketAddr) -> bool,
    ) -> (u64, u64) {
        let (mut failed, mut attempts) = (0, 0);
        for millisecond in millis {
            let now = START + Duration::from_millis(millisecond);
            let mut tries = steering.retrier.begin(&http::Method::POST, now);
            let mut avoid = None;
            loop {
                attempts += 1;
                let endpoint = steering.pick(None, avoid.as_ref(), now).unwrap();
                if answers(endpoint.address) {
                    steering.answered(endpoint.member(), StatusCode::OK, Duration::from_millis(5), now);
                    break;
                }
                steering.failed(endpoint.member(), Duration::ZERO, now);
                avoid = Some(Arc::clone(endpoint.member()));
                if tries.again(&steering.retrier, RetryOn::Connect, true, None, &steering.dice, now).is_none()
                {
                    failed += 1;
                    break;
                }
            }
        }
        (failed, attempts)
    }

    fn steering(count: usize) -> Steering<()> {
        let addresses: Vec<_> = (0..count).map(address).collect();
        Steering::new(Traffic::default(), &addresses, Dice::seeded(8))
    }

    #[test]
    fn a_dead_endpoint_costs_no_request() {
        let steering = steering(4);
        assert_eq!(run(&steering, 0..1_000, |_| true).0, 0);
        let (failed, attempts) = run(&steering, 1_000..121_000, |to| to != address(2));
        assert_eq!(failed, 0);
        assert!(attempts < 120_000 + 50, "it is asked now and then: {attempts} attempts");
    }

    #[test]
    fn a_cold_start_beside_a_dead_endpoint_fails_nothing() {
        let steering = steering(2);
        assert_eq!(run(&steering, 0..1_000, |to| to == address(1)).0, 0);
    }

    #[test]
    fn a_total_outage_multiplies_nothing_and_ends_when_it_ends() {
        let steering = steering(4);
        run(&steering, 0..1_000, |_| true);
        let (failed, attempts) = run(&steering, 1_000..61_000, |_| false);
        assert_eq!(failed, 60_000);
        assert!(attempts <= 60_000 * 12 / 10 + 10 * 60 + 200, "{attempts}");
        let ejected = steering.endpoints.now().iter().filter(|(_, m)| m.is(Unavailable::Ejected)).count();
        assert!(ejected <= 2, "{ejected}");
        let (failed, _) = run(&steering, 61_000..62_000, |_| true);
        assert_eq!(failed, 0);
    }
}
