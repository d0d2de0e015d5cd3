//! Where a service is found: endpoints, what is known of each, and which of them may be chosen now.
//!
//! [`Endpoints`] holds one immutable [`EndpointSet`], replaced as a whole whenever an endpoint comes, goes
//! or changes its health; choosing reads it without a lock. A [`Member`] outlives the sets it is in, with
//! its statistics and whatever its owner keeps with it (connections), for as long as its address stays.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};

use super::config::{Prefer, Share};
use super::load::Load;
use super::outlier::Record;
use super::random::mix;
use super::topology::{Nearness, Topology};

/// Endpoints of one service; more are a mistake of whoever announced them. Choosing by hash looks at each.
pub const MAX_ENDPOINTS: usize = 4096;
/// The most that one endpoint may weigh: the ratio of two weights is then at most this.
pub const MAX_WEIGHT: u32 = 1000;
/// A preferred locality keeps all of its traffic while this times its healthy share is at least one: down
/// to 71 % healthy. Envoy's figure.
const OVERPROVISIONING: f64 = 1.4;

/// One place where a service answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where.
    pub address: SocketAddr,
    /// Its share of the traffic relative to the others', 1 to [`MAX_WEIGHT`]; 0 counts as 1.
    pub weight: u32,
    /// False if whoever announced it asks for no more requests (it drains, or its host is ill).
    pub serving: bool,
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self { address, weight: 1, serving: true }
    }
}

/// Whom this sidecar prefers, and when it stops believing that so many can be ill.
#[derive(Debug, Clone)]
pub struct Placement {
    /// How near an endpoint is.
    pub topology: Arc<Topology>,
    /// How near an endpoint must be to be preferred.
    pub prefer: Prefer,
    /// Below this share of healthy endpoints all are tried: more likely the judgement is wrong than they.
    pub panic_below: Share,
}

impl Placement {
    /// Near ones first. Of two levels that hold the same endpoints only the nearer exists.
    fn tier(&self, endpoint: &Endpoint) -> u8 {
        match (self.prefer, self.topology.nearness(endpoint.address.ip())) {
            (Prefer::Any, _) | (Prefer::Host, Nearness::Host) => 0,
            (Prefer::Host, Nearness::Zone) | (Prefer::Zone, Nearness::Host | Nearness::Zone) => 1,
            (Prefer::Host | Prefer::Zone, Nearness::Elsewhere) => 2,
        }
    }
}

/// Why an endpoint gets no requests; one that no reason holds back is available.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Unavailable {
    /// Its active health check fails.
    Unhealthy = 1,
    /// It is ejected as an outlier.
    Ejected = 2,
    /// Whoever announced it asks for no more requests.
    NotServing = 4,
}

const ANY_REASON: u8 = 7;
/// Not a reason: it was ejected, and until its first good answer it gets one request at a time.
const ON_PROBATION: u8 = 8;

/// One endpoint as long as its address stays, `C` being what its owner keeps with it.
#[derive(Debug)]
pub struct Member<C> {
    /// Where it answers.
    pub address: SocketAddr,
    /// What the owner keeps with it.
    pub own: C,
    /// Requests in flight and answer times.
    pub load: Load,
    pub(super) record: Record,
    health: AtomicU8,
}

impl<C> Member<C> {
    /// Whether it may be chosen.
    pub fn is_available(&self) -> bool {
        self.health.load(Ordering::Relaxed) & ANY_REASON == 0
    }

    /// Whether this reason holds it back.
    pub fn is(&self, reason: Unavailable) -> bool {
        self.health.load(Ordering::Relaxed) & reason as u8 != 0
    }

    /// Until when it is ejected as an outlier, in time since the Unix epoch, if it is.
    pub fn ejected_until(&self) -> Option<Duration> {
        self.is(Unavailable::Ejected).then(|| self.record.ejected_until())
    }

    pub(super) fn is_on_probation(&self) -> bool {
        self.health.load(Ordering::Relaxed) & ON_PROBATION != 0
    }

    pub(super) fn set_probation(&self, on: bool) {
        self.mark(ON_PROBATION, on);
    }

    /// On probation and already being tried.
    pub(super) fn is_taken(&self) -> bool {
        self.is_on_probation() && self.load.in_flight() > 0
    }

    /// Returns whether that was news.
    fn mark(&self, bit: u8, on: bool) -> bool {
        let before = if on {
            self.health.fetch_or(bit, Ordering::Relaxed)
        } else {
            self.health.fetch_and(!bit, Ordering::Relaxed)
        };
        (before & bit != 0) != on
    }
}

/// A request's hold on its endpoint: counted as in flight until dropped.
pub struct InFlight<C>(Arc<Member<C>>);

impl<C> InFlight<C> {
    pub(super) fn new(member: &Arc<Member<C>>) -> Self {
        member.load.begin();
        Self(Arc::clone(member))
    }

    /// The endpoint, without the hold.
    pub fn member(&self) -> &Arc<Member<C>> {
        &self.0
    }
}

impl<C> Drop for InFlight<C> {
    fn drop(&mut self) {
        self.0.load.end();
    }
}

impl<C> Deref for InFlight<C> {
    type Target = Member<C>;
    fn deref(&self) -> &Member<C> {
        &self.0
    }
}

impl<C> fmt::Debug for InFlight<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InFlight").field(&self.0.address).finish()
    }
}

/// The endpoints of one service at one moment.
#[derive(Debug)]
pub struct EndpointSet<C> {
    entries: Box<[Entry<C>]>,
    tiers: Box<[Tier<C>]>,
}

#[derive(Debug)]
struct Entry<C> {
    endpoint: Endpoint,
    member: Arc<Member<C>>,
}

/// Endpoints equally near, and their part of the traffic.
#[derive(Debug)]
pub(super) struct Tier<C> {
    /// Where this tier's part ends when all traffic is the unit interval scaled to 2^32.
    until: u64,
    pub(super) candidates: Box<[Candidate<C>]>,
    /// The sum of weights.
    pub(super) total: u64,
    pub(super) uniform: bool,
}

#[derive(Debug)]
pub(super) struct Candidate<C> {
    pub(super) member: Arc<Member<C>>,
    pub(super) weight: u32,
    /// The sum of weights up to and with this one.
    pub(super) end: u64,
    /// The endpoint's own value for consistent hashing, the same in every sidecar.
    pub(super) hash: u64,
}

const WHOLE: u64 = 1 << 32;

impl<C> EndpointSet<C> {
    /// The tier in which a request with these random or hashed bits is served; none if there is no endpoint.
    pub(super) fn tier(&self, bits: u64) -> Option<&Tier<C>> {
        match &*self.tiers {
            [] => None,
            [only] => Some(only),
            tiers => tiers.iter().find(|tier| bits >> 32 < tier.until).or(tiers.last()),
        }
    }

    /// All endpoints, available or not.
    pub fn iter(&self) -> impl Iterator<Item = (&Endpoint, &Arc<Member<C>>)> {
        self.entries.iter().map(|entry| (&entry.endpoint, &entry.member))
    }

    /// How many endpoints there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn build(entries: Vec<Entry<C>>, placement: &Placement) -> Self {
        let groups: Vec<Vec<&Entry<C>>> = (0..3)
            .map(|tier| entries.iter().filter(|entry| placement.tier(&entry.endpoint) == tier).collect())
            .filter(|group: &Vec<_>| !group.is_empty())
            .collect();
        let healthy: Vec<f64> = groups.iter().map(|group| healthy_share(group)).collect();
        let (parts, sound) = parts(&healthy);
        let mut until = 0.0;
        let mut tiers = Vec::with_capacity(groups.len());
        for ((group, part), healthy) in groups.iter().zip(parts).zip(healthy) {
            if part <= 0.0 {
                continue;
            }
            until += part;
            let all = !sound && healthy < placement.panic_below.fraction();
            let chosen = group.iter().filter(|entry| all || entry.member.is_available());
            tiers.push(Tier::build(chosen.copied(), (until * WHOLE as f64) as u64));
        }
        Self { entries: entries.into(), tiers: tiers.into() }
    }
}

impl<C> Tier<C> {
    fn build<'a>(entries: impl Iterator<Item = &'a Entry<C>>, until: u64) -> Self
    where
        C: 'a,
    {
        let mut total = 0;
        let candidates: Box<[_]> = entries
            .map(|Entry { endpoint, member }| {
                let weight = endpoint.weight.clamp(1, MAX_WEIGHT);
                total += u64::from(weight);
                let hash = address_hash(&endpoint.address);
                Candidate { member: Arc::clone(member), weight, end: total, hash }
            })
            .collect();
        let uniform = candidates.windows(2).all(|pair| matches!(pair, [a, b] if a.weight == b.weight));
        Self { until, candidates, total, uniform }
    }
}

/// By weight, of the endpoints equally near.
fn healthy_share<C>(group: &[&Entry<C>]) -> f64 {
    let weight = |entry: &&&Entry<C>| u64::from(entry.endpoint.weight.clamp(1, MAX_WEIGHT));
    let all: u64 = group.iter().map(|entry| weight(&entry)).sum();
    let available: u64 = group.iter().filter(|entry| entry.member.is_available()).map(|e| weight(&e)).sum();
    available as f64 / all as f64
}

/// The part of the traffic that each tier gets, nearest first, and whether the healthy ones together can
/// carry all of it: each takes what it can, the next what is left (Envoy's priority levels).
fn parts(healthy: &[f64]) -> (Vec<f64>, bool) {
    let capacity: Vec<f64> = healthy.iter().map(|share| (share * OVERPROVISIONING).min(1.0)).collect();
    let whole: f64 = capacity.iter().sum();
    if whole == 0.0 {
        // Nobody is healthy: all are tried, the near ones no more than the far ones.
        return (vec![1.0 / healthy.len() as f64; healthy.len()], false);
    }
    let scale = whole.min(1.0);
    let mut left = 1.0;
    let parts = capacity.iter().map(|capacity| {
        let part = (capacity / scale).min(left);
        left -= part;
        part
    });
    (parts.collect(), whole >= 1.0)
}

/// Equal in every sidecar of every version: hashing is only consistent if all agree.
fn address_hash(address: &SocketAddr) -> u64 {
    let ip = address.ip().to_canonical();
    let number = match ip {
        std::net::IpAddr::V4(ip) => u128::from(ip.to_bits()),
        std::net::IpAddr::V6(ip) => ip.to_bits(),
    };
    let halves = ((number >> 64) as u64, number as u64);
    mix(mix(mix(halves.0).wrapping_add(halves.1)).wrapping_add(u64::from(address.port())))
}

/// The endpoints of one service, as they change.
#[derive(Debug)]
pub struct Endpoints<C> {
    set: ArcSwap<EndpointSet<C>>,
    placement: Placement,
    /// Held while a new set is made, so that no change is lost to another made at the same time.
    changing: Mutex<()>,
}

impl<C: Default> Endpoints<C> {
    /// A service without endpoints yet.
    pub fn new(placement: Placement) -> Self {
        let set = EndpointSet::build(Vec::new(), &placement);
        Self { set: ArcSwap::from_pointee(set), placement, changing: Mutex::default() }
    }

    /// Puts these in place of those before; what is known of addresses that stay is kept. Of two with one
    /// address the first counts, of more than [`MAX_ENDPOINTS`] those.
    pub fn replace(&self, endpoints: impl IntoIterator<Item = Endpoint>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.set.load();
        let known: HashMap<SocketAddr, &Arc<Member<C>>> =
            before.entries.iter().map(|entry| (entry.endpoint.address, &entry.member)).collect();
        let mut entries: Vec<Entry<C>> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for endpoint in endpoints {
            if !seen.insert(endpoint.address) {
                continue;
            }
            if entries.len() == MAX_ENDPOINTS {
                tracing::warn!(
                    max = MAX_ENDPOINTS,
                    "a service has too many endpoints; the rest are left out"
                );
                break;
            }
            let member = known.get(&endpoint.address).map_or_else(
                || {
                    Arc::new(Member {
                        address: endpoint.address,
                        own: C::default(),
                        load: Load::default(),
                        record: Record::default(),
                        health: AtomicU8::new(0),
                    })
                },
                |member| Arc::clone(member),
            );
            member.mark(Unavailable::NotServing as u8, !endpoint.serving);
            entries.push(Entry { endpoint, member });
        }
        self.set.store(Arc::new(EndpointSet::build(entries, &self.placement)));
    }
}

impl<C> Endpoints<C> {
    /// The endpoints now; cheap, and not to be kept.
    pub fn now(&self) -> Guard<Arc<EndpointSet<C>>> {
        self.set.load()
    }

    /// Says that `reason` holds for a member, or no longer does. Returns whether that was news.
    pub fn set_unavailable(&self, member: &Member<C>, reason: Unavailable, on: bool) -> bool {
        let news = member.mark(reason as u8, on);
        if news {
            self.rebuild();
        }
        news
    }

    fn rebuild(&self) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.set.load();
        let entries = before
            .iter()
            .map(|(endpoint, member)| Entry { endpoint: endpoint.clone(), member: Arc::clone(member) });
        self.set.store(Arc::new(EndpointSet::build(entries.collect(), &self.placement)));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::traffic) fn address(number: usize) -> SocketAddr {
        SocketAddr::from(([10, 0, (number >> 8) as u8, number as u8], 8443))
    }

    pub(in crate::traffic) fn placement(prefer: Prefer) -> Placement {
        // Eight endpoints here, sixteen in this zone beside them.
        let own = (0..8).map(|number| address(number).ip()).collect();
        let zones = ["10.0.0.0/28", "10.0.0.16/29"].map(|network| ("here", network.parse().unwrap()));
        let topology = Arc::new(Topology::new(zones, own));
        Placement { topology, prefer, panic_below: Share::percent(50) }
    }

    pub(in crate::traffic) fn endpoints(count: usize) -> Endpoints<()> {
        let endpoints = Endpoints::new(placement(Prefer::Any));
        endpoints.replace((0..count).map(|number| address(number).into()));
        endpoints
    }

    pub(in crate::traffic) fn members<C>(endpoints: &Endpoints<C>) -> Vec<Arc<Member<C>>> {
        endpoints.now().iter().map(|(_, member)| Arc::clone(member)).collect()
    }

    /// Each tier's part of the traffic and its number of candidates.
    fn shape(endpoints: &Endpoints<()>) -> Vec<(f64, usize)> {
        let set = endpoints.now();
        let mut from = 0;
        let mut shape = Vec::new();
        for tier in &set.tiers {
            shape.push(((tier.until - from) as f64 / WHOLE as f64, tier.candidates.len()));
            from = tier.until;
        }
        shape
    }

    #[test]
    fn what_is_known_of_an_address_outlives_the_set() {
        let endpoints = Endpoints::<AtomicU8>::new(placement(Prefer::Any));
        endpoints.replace([address(1).into(), address(2).into(), address(1).into()]);
        assert_eq!(endpoints.now().len(), 2);
        let before = members(&endpoints);
        before[1].own.store(7, Ordering::Relaxed);
        let hold = InFlight::new(&before[0]);
        endpoints.replace([Endpoint { weight: 5, ..address(2).into() }, address(3).into()]);
        let after = members(&endpoints);
        assert!(Arc::ptr_eq(&before[1], &after[0]));
        assert_eq!(after[0].own.load(Ordering::Relaxed), 7);
        assert_eq!(after[1].own.load(Ordering::Relaxed), 0);
        assert_eq!(hold.load.in_flight(), 1, "one that left lives until its last request has ended");
        drop(hold);
        assert_eq!(before[0].load.in_flight(), 0);
    }

    #[test]
    fn own_host_then_own_zone_then_all() {
        let endpoints = Endpoints::new(placement(Prefer::Host));
        endpoints.replace((0..32).map(|n| address(n).into()));
        let all = members(&endpoints);
        let fail = |range: std::ops::Range<usize>| {
            for member in &all[range] {
                endpoints.set_unavailable(member, Unavailable::Unhealthy, true);
            }
        };
        assert_eq!(shape(&endpoints), [(1.0, 8)], "all of it stays on this host");
        fail(0..2);
        assert_eq!(shape(&endpoints), [(1.0, 6)], "75 % healthy carries all");
        fail(2..4);
        let [(host, 4), (zone, 16)] = shape(&endpoints)[..] else { panic!("{:?}", shape(&endpoints)) };
        assert!((host - 0.7).abs() < 1e-6 && (zone - 0.3).abs() < 1e-6);
        fail(4..8);
        assert_eq!(shape(&endpoints), [(1.0, 16)]);
        fail(8..24);
        assert_eq!(shape(&endpoints), [(1.0, 8)], "another zone is better than nobody");
        fail(24..32);
        assert_eq!(shape(&endpoints).iter().map(|tier| tier.1).sum::<usize>(), 32, "all ill: all tried");
    }

    #[test]
    fn below_the_panic_threshold_all_are_tried_again() {
        let endpoints = endpoints(10);
        let all = members(&endpoints);
        for (failed, expected) in [(5, 5), (6, 10), (10, 10)] {
            for member in &all[..failed] {
                endpoints.set_unavailable(member, Unavailable::Unhealthy, true);
            }
            assert_eq!(shape(&endpoints), [(1.0, expected)], "{failed} of ten failed");
        }
    }

    #[test]
    fn reasons_add_up_and_end_one_by_one() {
        let endpoints = endpoints(4);
        let member = Arc::clone(&members(&endpoints)[0]);
        assert!(endpoints.set_unavailable(&member, Unavailable::Unhealthy, true));
        assert!(!endpoints.set_unavailable(&member, Unavailable::Unhealthy, true));
        endpoints.replace((0..4).map(|n| Endpoint { serving: n != 0, ..address(n).into() }));
        endpoints.set_unavailable(&member, Unavailable::Unhealthy, false);
        assert!(!member.is_available() && member.is(Unavailable::NotServing));
        endpoints.replace((0..4).map(|n| address(n).into()));
        assert!(member.is_available());
    }

    proptest! {
        #[test]
        fn parts_are_a_whole_and_only_the_able_carry(healthy in prop::collection::vec(0.0f64..=1.0, 1..4)) {
            let (parts, sound) = parts(&healthy);
            prop_assert!((parts.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            prop_assert!(parts.iter().all(|part| (0.0..=1.0).contains(part)));
            if healthy.iter().any(|share| *share > 0.0) {
                prop_assert!(healthy.iter().zip(&parts).all(|(share, part)| *share > 0.0 || *part == 0.0));
            }
            prop_assert_eq!(sound, healthy.iter().map(|share| (share * 1.4).min(1.0)).sum::<f64>() >= 1.0);
        }
    }
}
