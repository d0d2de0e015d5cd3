//! Which endpoint gets the next request.
//!
//! Choosing takes no lock and no memory: one look at the current [`EndpointSet`], a few draws, one atomic
//! increment. Only consistent hashing looks at every endpoint, at a few nanoseconds each.

use std::net::IpAddr;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::HeaderMap;
use http::header::COOKIE;
use siphasher::sip::SipHasher13;

use super::config::{Balance, HashBy};
use super::endpoint::{Candidate, EndpointSet, InFlight, Member, Tier};
use super::random::{Dice, mix, scale};

/// With consistent hashing no endpoint gets more than this times its part of what is in flight: one hot
/// key must not drown its endpoint (Mirrokni, Thorup, Zadimoghaddam 2016) …
const HASH_BOUND: f64 = 1.25;
/// … but so many it may always have, lest a few requests at a time wander from endpoint to endpoint.
const HASH_BOUND_FLOOR: f64 = 16.0;
/// How often round robin and random look for another endpoint when the one found will not do.
const REDRAWS: usize = 4;
/// So that the part of the traffic a key belongs to says nothing of its endpoint there.
const TIER_SALT: u64 = 0x7469_6572;

/// Chooses endpoints for one service.
#[derive(Debug)]
pub struct Balancer {
    how: Balance,
    dice: Dice,
    turn: AtomicU64,
}

impl Balancer {
    /// Chooses by `how`; `dice` decides all that chance decides.
    pub fn new(how: Balance, dice: Dice) -> Self {
        // Sidecars that start together do not begin with the same endpoint.
        let turn = AtomicU64::new(dice.bits() >> 32);
        Self { how, dice, turn }
    }

    /// The key by which a request is kept together with others, if this balancer does that and the request
    /// has one. `user` is the verified one.
    pub fn key(&self, headers: &HeaderMap, source: IpAddr, user: Option<&str>) -> Option<u64> {
        match &self.how {
            Balance::Hash(by) => by.key(headers, source, user),
            _ => None,
        }
    }

    /// The endpoint for a request, counted as in flight until the answer is dropped; `None` if there is
    /// no endpoint. `avoid` is one that just failed: another is chosen if there is another.
    pub fn pick<C>(
        &self,
        set: &EndpointSet<C>,
        key: Option<u64>,
        avoid: Option<&Arc<Member<C>>>,
        now: Duration,
    ) -> Option<InFlight<C>> {
        let tier = set.tier(key.map_or_else(|| self.dice.bits(), |key| mix(key ^ TIER_SALT)))?;
        let unfit =
            |member: &Member<C>| member.is_taken() || avoid.is_some_and(|avoid| ptr::eq(&**avoid, member));
        let chosen = match (&self.how, key) {
            (Balance::Hash(_), Some(key)) => tier.by_hash(key, unfit),
            (Balance::P2cEwma | Balance::Hash(_), _) => {
                self.lesser_of_two(tier, unfit, |member| member.load.cost(now))
            }
            (Balance::LeastRequest, _) => {
                self.lesser_of_two(tier, unfit, |member| member.load.in_flight() as f32 + 1.0)
            }
            (Balance::RoundRobin, _) => first_fit(|| self.next_in_turn(tier), unfit),
            (Balance::Random, _) => first_fit(|| tier.at(self.dice.below(tier.total)), unfit),
        };
        chosen.map(|candidate| InFlight::new(&candidate.member))
    }

    /// The power of two choices (Mitzenmacher 2001): of two different ones drawn by weight, that with the
    /// smaller cost for its weight.
    fn lesser_of_two<'a, C>(
        &self,
        tier: &'a Tier<C>,
        unfit: impl Fn(&Member<C>) -> bool,
        cost: impl Fn(&Member<C>) -> f32,
    ) -> Option<&'a Candidate<C>> {
        let first = tier.at(self.dice.below(tier.total))?;
        let Some(rest) = tier.total.checked_sub(u64::from(first.weight)).filter(|rest| *rest > 0) else {
            return Some(first);
        };
        // Without the first one's stretch nothing can be drawn twice.
        let draw = self.dice.below(rest);
        let skipped = if draw < first.start() { draw } else { draw + u64::from(first.weight) };
        let second = tier.at(skipped)?;
        let cost = |candidate: &Candidate<C>| {
            let member = &*candidate.member;
            if unfit(member) { f32::INFINITY } else { cost(member) / candidate.weight as f32 }
        };
        Some(if cost(second) < cost(first) { second } else { first })
    }

    fn next_in_turn<'a, C>(&self, tier: &'a Tier<C>) -> Option<&'a Candidate<C>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        if tier.uniform {
            return tier.candidates.get(usize::try_from(turn % tier.candidates.len().max(1) as u64).ok()?);
        }
        // Steps of the golden ratio visit each stretch as often as it is long, never long in a row.
        tier.at(scale(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15), tier.total))
    }
}

fn first_fit<'a, C: 'a>(
    mut draw: impl FnMut() -> Option<&'a Candidate<C>>,
    unfit: impl Fn(&Member<C>) -> bool,
) -> Option<&'a Candidate<C>> {
    let mut chosen = draw()?;
    for _ in 0..REDRAWS {
        if !unfit(&chosen.member) {
            break;
        }
        chosen = draw()?;
    }
    Some(chosen)
}

impl<C> Candidate<C> {
    fn start(&self) -> u64 {
        self.end - u64::from(self.weight)
    }
}

impl<C> Tier<C> {
    /// The candidate on whose stretch of 0..total the position lies.
    fn at(&self, position: u64) -> Option<&Candidate<C>> {
        let index = match self.candidates.first() {
            Some(first) if self.uniform => usize::try_from(position / u64::from(first.weight)).ok()?,
            _ => self.candidates.partition_point(|candidate| candidate.end <= position),
        };
        self.candidates.get(index)
    }

    /// Rendezvous hashing (Thaler, Ravishankar 1998) with bounded loads: the highest score wins, so a key
    /// moves only when its own endpoint goes, or a better one for it comes.
    fn by_hash(&self, key: u64, unfit: impl Fn(&Member<C>) -> bool) -> Option<&Candidate<C>> {
        let in_flight: u64 = self.candidates.iter().map(|c| u64::from(c.member.load.in_flight())).sum();
        let bound_per_weight = HASH_BOUND * (in_flight + 1) as f64 / self.total as f64;
        let fits = |candidate: &&Candidate<C>| {
            let bound = (bound_per_weight * f64::from(candidate.weight)).ceil().max(HASH_BOUND_FLOOR);
            f64::from(candidate.member.load.in_flight()) < bound && !unfit(&candidate.member)
        };
        let bits = |candidate: &&Candidate<C>| mix(key ^ candidate.hash);
        if self.uniform {
            let best = self.candidates.iter().filter(fits).max_by_key(bits);
            return best.or_else(|| self.candidates.iter().max_by_key(bits));
        }
        // The same order, with each one's chance in proportion to its weight.
        let score = |candidate: &&Candidate<C>| {
            let unit = (bits(candidate) as f64 + 1.0) / 2f64.powi(64);
            -f64::from(candidate.weight) / unit.ln().min(-f64::MIN_POSITIVE)
        };
        let higher = |a: &&Candidate<C>, b: &&Candidate<C>| score(a).total_cmp(&score(b));
        let best = self.candidates.iter().filter(fits).max_by(higher);
        best.or_else(|| self.candidates.iter().max_by(higher))
    }
}

impl HashBy {
    /// The key of a request; `None` if it lacks what it goes by. Equal in every sidecar.
    pub fn key(&self, headers: &HeaderMap, source: IpAddr, user: Option<&str>) -> Option<u64> {
        match self {
            Self::Source => Some(match source.to_canonical() {
                IpAddr::V4(ip) => hash(&ip.octets()),
                IpAddr::V6(ip) => hash(&ip.octets()),
            }),
            Self::User => user.map(|user| hash(user.as_bytes())),
            Self::Header(name) => headers.get(name).map(|value| hash(value.as_bytes())),
            Self::Cookie(name) => headers
                .get_all(COOKIE)
                .iter()
                .flat_map(|value| value.as_bytes().split(|byte| *byte == b';'))
                .find_map(|pair| pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"="))
                .map(hash),
        }
    }
}

/// The keys are fixed because all sidecars must agree. Callers can thus aim at an endpoint; that is what
/// the bound on its load is for.
fn hash(bytes: &[u8]) -> u64 {
    SipHasher13::new_with_keys(0, 0).hash(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::traffic::config::Prefer;
    use crate::traffic::endpoint::tests::{address, endpoints, members, placement};
    use crate::traffic::endpoint::{Endpoint, Endpoints, Unavailable};

    const NOW: Duration = Duration::from_secs(1_700_000_000);
    const ALL: [fn() -> Balance; 5] = [
        || Balance::P2cEwma,
        || Balance::LeastRequest,
        || Balance::Hash(HashBy::Source),
        || Balance::RoundRobin,
        || Balance::Random,
    ];

    fn weighted(weights: &[u32]) -> Endpoints<()> {
        let endpoints = Endpoints::new(placement(Prefer::Any));
        endpoints.replace(
            weights.iter().enumerate().map(|(n, weight)| Endpoint { weight: *weight, ..address(n).into() }),
        );
        endpoints
    }

    /// How many of `count` requests, one after the other, each endpoint gets; keys are 0, 1, 2, …
    fn spread(how: Balance, endpoints: &Endpoints<()>, count: u64) -> Vec<u64> {
        let balancer = Balancer::new(how, Dice::seeded(42));
        let mut counts = BTreeMap::new();
        for key in 0..count {
            let picked = balancer.pick(&endpoints.now(), Some(mix(key)), None, NOW).unwrap();
            picked.load.answered(Duration::from_millis(10), NOW);
            *counts.entry(picked.address).or_default() += 1;
        }
        endpoints.now().iter().map(|(e, _)| counts.get(&e.address).copied().unwrap_or(0)).collect()
    }

    #[test]
    fn every_way_is_fair_to_equals() {
        for how in ALL {
            let counts = spread(how(), &endpoints(10), 100_000);
            assert!(counts.iter().all(|count| (9_400..10_600).contains(count)), "{:?}: {counts:?}", how());
        }
    }

    #[test]
    fn weights_are_shares() {
        for how in [Balance::Hash(HashBy::Source), Balance::RoundRobin, Balance::Random] {
            let counts = spread(how.clone(), &weighted(&[1, 2, 7]), 100_000);
            for (count, expected) in counts.iter().zip([10_000u64, 20_000, 70_000]) {
                assert!(count.abs_diff(expected) < 1_000, "{how:?}: {counts:?}");
            }
        }
    }

    /// Requests arrive evenly and take as long as their endpoint takes; returns what each got and the
    /// mean time in milliseconds.
    fn simulate(how: Balance, endpoints: &Endpoints<()>, took: impl Fn(usize) -> u64) -> (Vec<u64>, f64) {
        let balancer = Balancer::new(how, Dice::seeded(1));
        let order: Vec<_> = endpoints.now().iter().map(|(endpoint, _)| endpoint.address).collect();
        let mut running: BTreeMap<(u64, u64), InFlight<()>> = BTreeMap::new();
        let (mut counts, mut total) = (vec![0; order.len()], 0);
        for request in 0..20_000u64 {
            let at = request / 2;
            while let Some(((end, begun), picked)) = running.pop_first() {
                if end > at {
                    running.insert((end, begun), picked);
                    break;
                }
                let begun = begun / 2;
                picked.load.answered(Duration::from_millis(end - begun), NOW + Duration::from_millis(end));
            }
            let now = NOW + Duration::from_millis(at);
            let picked = balancer.pick(&endpoints.now(), Some(mix(request)), None, now).unwrap();
            let index = order.iter().position(|address| *address == picked.address).unwrap();
            counts[index] += 1;
            total += took(index);
            running.insert((at + took(index), request), picked);
        }
        (counts, total as f64 / 20_000.0)
    }

    #[test]
    fn load_moves_away_from_a_slow_endpoint() {
        let took = |index| if index == 0 { 500 } else { 10 };
        let (ewma, ewma_mean) = simulate(Balance::P2cEwma, &endpoints(5), took);
        assert!(ewma[0] < 100, "of 20,000 the slow one gets next to nothing: {ewma:?}");
        let (least, least_mean) = simulate(Balance::LeastRequest, &endpoints(5), took);
        assert!(least[0] < 1_000, "{least:?}");
        let (_, turn_mean) = simulate(Balance::RoundRobin, &endpoints(5), took);
        assert!(
            ewma_mean < least_mean && least_mean < turn_mean,
            "{ewma_mean} < {least_mean} < {turn_mean} milliseconds"
        );
        for counts in [&ewma, &least] {
            let (min, max) = (counts[1..].iter().min().unwrap(), counts[1..].iter().max().unwrap());
            assert!(*max as f64 / (*min as f64) < 1.3, "the fast ones share evenly: {counts:?}");
        }
    }

    #[test]
    fn an_endpoint_that_was_slow_is_tried_again() {
        let endpoints = endpoints(2);
        let balancer = Balancer::new(Balance::P2cEwma, Dice::seeded(3));
        let all = members(&endpoints);
        all[0].load.answered(Duration::from_secs(2), NOW);
        let first_slow_at = (0..200).find(|second| {
            let now = NOW + Duration::from_secs(*second);
            all[1].load.answered(Duration::from_millis(20), now);
            balancer.pick(&endpoints.now(), None, None, now).unwrap().address == all[0].address
        });
        assert!(first_slow_at.is_some_and(|second| (30..70).contains(&second)), "{first_slow_at:?}");
    }

    #[test]
    fn weights_hold_under_load_for_least_request() {
        let (counts, _) = simulate(Balance::LeastRequest, &weighted(&[1, 1, 4]), |_| 60);
        let share = counts[2] as f64 / 20_000.0;
        assert!((0.6..0.73).contains(&share), "{counts:?}");
    }

    #[test]
    fn hashing_moves_only_what_it_must() {
        const KEYS: u64 = 10_000;
        let homes = |endpoints: &Endpoints<()>| -> Vec<_> {
            let balancer = Balancer::new(Balance::Hash(HashBy::User), Dice::seeded(9));
            let home = |key| balancer.pick(&endpoints.now(), Some(mix(key)), None, NOW).unwrap().address;
            (0..KEYS).map(home).collect()
        };
        let before = homes(&endpoints(10));
        let after = homes(&endpoints(11));
        let moved: Vec<_> = before.iter().zip(&after).filter(|(a, b)| a != b).map(|(_, b)| *b).collect();
        assert!((moved.len() as u64) < KEYS / 11 + 150, "{} of {KEYS} moved", moved.len());
        assert!(moved.iter().all(|to| *to == address(10)), "only to the new one");
        let smaller = endpoints(10);
        smaller.set_unavailable(&members(&smaller)[4], Unavailable::Ejected, true);
        for (was, is) in before.iter().zip(homes(&smaller)) {
            assert!(*was == address(4) || *was == is, "one goes: only its own keys move");
        }
    }

    #[test]
    fn a_hot_key_does_not_drown_its_endpoint() {
        let endpoints = endpoints(10);
        let balancer = Balancer::new(Balance::Hash(HashBy::User), Dice::seeded(9));
        let held: Vec<_> =
            (0..1000).map(|_| balancer.pick(&endpoints.now(), Some(4711), None, NOW).unwrap()).collect();
        let most = members(&endpoints).iter().map(|member| member.load.in_flight()).max().unwrap();
        assert!(most <= 126, "{most} of 1000 on one of ten");
        assert!(held[..16].iter().all(|picked| picked.address == held[0].address), "a few stay together");
        drop(held);
        assert!(members(&endpoints).iter().all(|member| member.load.in_flight() == 0));
    }

    #[test]
    fn parts_of_the_traffic_follow_healthy_shares() {
        let endpoints = Endpoints::new(placement(Prefer::Zone));
        endpoints.replace((0..34).map(|n| address(n).into()));
        for member in &members(&endpoints)[..12] {
            endpoints.set_unavailable(member, Unavailable::Unhealthy, true);
        }
        for how in ALL {
            let counts = spread(how(), &endpoints, 50_000);
            assert_eq!(counts[..12], [0; 12]);
            let near: u64 = counts[12..24].iter().sum();
            assert!(near.abs_diff(35_000) < 500, "{:?}: half healthy × 1.4 stays near: {counts:?}", how());
        }
    }

    #[test]
    fn what_just_failed_is_avoided_while_there_is_another() {
        for how in ALL {
            let two = endpoints(2);
            let balancer = Balancer::new(how(), Dice::seeded(5));
            let failed = Arc::clone(&members(&two)[0]);
            let pick = |set: &Endpoints<()>, key| balancer.pick(&set.now(), Some(key), Some(&failed), NOW);
            let again = (0..1000).filter(|key| pick(&two, *key).unwrap().address == failed.address).count();
            // A random draw looks a bounded number of times: 2^-5 of them find no other.
            assert!(again < if how() == Balance::Random { 60 } else { 1 }, "{:?}: {again}", how());
            let one = endpoints(1);
            assert!(balancer.pick(&one.now(), None, members(&one).first(), NOW).is_some());
        }
    }

    #[test]
    fn keys_of_requests() {
        let mut headers = HeaderMap::new();
        headers.append(COOKIE, "a=1; tenant=acme; b=2".parse().unwrap());
        headers.append(COOKIE, "xtenant=evil".parse().unwrap());
        headers.insert("x-tenant", "acme".parse().unwrap());
        let source: IpAddr = "10.0.0.1".parse().unwrap();
        let key = |by: &str, user| by.parse::<HashBy>().unwrap().key(&headers, source, user);
        assert_eq!(key("cookie:tenant", None), Some(hash(b"acme")));
        assert_eq!(key("header:x-tenant", None), Some(hash(b"acme")));
        assert_eq!(key("user", Some("acme")), Some(hash(b"acme")));
        assert_eq!(key("user", None), None);
        assert_eq!(key("cookie:evil", None), None);
        assert_eq!(
            key("source", None),
            HashBy::Source.key(&headers, "::ffff:10.0.0.1".parse().unwrap(), None)
        );
        // PYTHONHASHSEED=0 python3 -c 'print(hash(b"acme"))': CPython's is SipHash-1-3 too.
        assert_eq!(hash(b"acme"), 4_455_170_195_598_274_452, "the same in every version");
    }

    proptest! {
        #[test]
        fn whatever_the_set_a_pick_is_one_of_it(
            weights in prop::collection::vec(0u32..2000, 0..20),
            unavailable in prop::collection::vec(any::<prop::sample::Index>(), 0..10),
            how in 0usize..5,
            keys in prop::collection::vec(prop::option::of(any::<u64>()), 1..20),
            seed: u64,
        ) {
            let endpoints = weighted(&weights);
            let all = members(&endpoints);
            for index in unavailable {
                if !all.is_empty() {
                    endpoints.set_unavailable(&all[index.index(all.len())], Unavailable::Unhealthy, true);
                }
            }
            let panics = all.iter().filter(|m| m.is_available()).count() == 0;
            let balancer = Balancer::new(ALL[how](), Dice::seeded(seed));
            let mut held = Vec::new();
            for key in keys {
                let picked = balancer.pick(&endpoints.now(), key, held.last().map(InFlight::member), NOW);
                prop_assert_eq!(picked.is_some(), !all.is_empty());
                held.extend(picked);
            }
            let total: u32 = all.iter().map(|member| member.load.in_flight()).sum();
            prop_assert_eq!(total as usize, held.len());
            let weight = |m: &Arc<Member<()>>| weights[all.iter().position(|a| Arc::ptr_eq(a, m)).unwrap()].clamp(1, 1000);
            let healthy: u32 = all.iter().filter(|m| m.is_available()).map(weight).sum();
            let whole: u32 = all.iter().map(weight).sum();
            if !panics && f64::from(healthy) >= f64::from(whole) / 2.0 {
                prop_assert!(held.iter().all(|picked| picked.is_available()));
            }
        }
    }
}
