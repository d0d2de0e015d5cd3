//! Rate, errors and duration of requests, by direction, peer and route: every label bounded.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;
use indexmap::{Equivalent, IndexMap};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::relations::{Reading, Relations};
use crate::tcp::TcpStats;

/// Peers told apart in metrics; the rest are counted together as `other`.
const MAX_PEERS: usize = 256;
/// Series found without building their labels: more than a service's routes times its callers usually are.
const MAX_CACHED_SERIES: usize = 4096;
/// Upper bounds in seconds: from a loopback hop to a timeout.
const DURATION_BUCKETS_SECONDS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];

/// Which way a request travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Direction {
    /// From the mesh to the app.
    Inbound,
    /// From the app to the mesh.
    Outbound,
    /// Decided for another proxy, which forwards.
    ExtAuthz,
}

impl Direction {
    /// The label's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
            Self::ExtAuthz => "ext_authz",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    direction: Direction,
    peer: String,
    route: String,
    status: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    direction: Direction,
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleLabels {
    rule: String,
}

/// A request's labels as they are at hand.
#[derive(Hash)]
struct SeriesOf<'a> {
    direction: Direction,
    status: u16,
    peer: &'a str,
    route: &'a str,
}

/// The same, kept. Hashed alike, so that a finished request finds its series without an allocation.
#[derive(Debug, PartialEq, Eq, Hash)]
struct SeriesKey {
    direction: Direction,
    status: u16,
    peer: Box<str>,
    route: Box<str>,
}

impl Equivalent<SeriesKey> for SeriesOf<'_> {
    fn equivalent(&self, key: &SeriesKey) -> bool {
        self.status == key.status
            && self.direction == key.direction
            && *self.route == *key.route
            && *self.peer == *key.peer
    }
}

/// What a finished request counts in.
#[derive(Debug, Clone)]
struct Series {
    requests: Counter,
    duration: Histogram,
}

/// One finished request.
#[derive(Debug)]
pub struct Observation<'a> {
    /// Which way.
    pub direction: Direction,
    /// The other end: a SPIFFE ID inbound, a service's name outbound.
    pub peer: &'a str,
    /// The route's template; empty if unmapped.
    pub route: &'a str,
    /// What was answered.
    pub status: StatusCode,
    /// From the head of the request to the head of the answer.
    pub took: Duration,
}

/// The copy of the relations, read when metrics are: its age is of that moment.
#[derive(Debug)]
struct RelationsNow(Arc<Relations>);

impl Collector for RelationsNow {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        // Nothing where there is no copy: none of no objects is another matter.
        let Some(Reading { objects, revision, age }) = self.0.reading() else { return Ok(()) };
        let objects = ConstGauge::new(i64::try_from(objects).unwrap_or(i64::MAX));
        let revision = ConstGauge::new(i64::try_from(revision).unwrap_or(i64::MAX));
        let age = age.map(|age| ConstGauge::new(age.as_secs_f64()));
        let mut show = |name, help, gauge: &dyn EncodeMetric| {
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
        };
        show("relations_objects", "Objects in the copy of the relations", &objects)?;
        show("relations_revision", "Revision of the copy of the relations", &revision)?;
        age.map_or(Ok(()), |age| {
            show("relations_age_seconds", "Time since control was asked whether the copy is the newest", &age)
        })
    }
}

/// The sidecar's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    duration: Family<RouteLabels, Histogram, fn() -> Histogram>,
    denials: Family<RuleLabels, Counter>,
    refused_connections: Family<RuleLabels, Counter>,
    expires: Gauge<f64, AtomicU64>,
    rotations: Counter,
    stale_policies: Gauge,
    tcp: TcpStats,
    peers: Mutex<HashSet<String>>,
    /// The series of requests seen lately; the families hold them all.
    series: Mutex<IndexMap<SeriesKey, Series>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("palisade");
        let requests = Family::default();
        let duration = Family::new_with_constructor(histogram as fn() -> Histogram);
        let (denials, refused_connections) = (Family::default(), Family::default());
        let (expires, rotations) = (Gauge::default(), Counter::default());
        registry.register("requests", "Requests answered", requests.clone());
        registry.register(
            "request_duration_seconds",
            "From a request's head to its answer's",
            duration.clone(),
        );
        registry.register("denials", "Requests refused, by rule", denials.clone());
        registry.register("refused_connections", "Connections refused, by rule", refused_connections.clone());
        registry.register("svid_expiry_timestamp_seconds", "When the current SVID expires", expires.clone());
        let tcp = TcpStats::default();
        tcp.register(&mut registry);
        registry.register("svid_rotations", "SVIDs received since the start", rotations.clone());
        let stale_policies = Gauge::default();
        registry.register(
            "policies_stale",
            "1 while control, which hands policies out, has not been heard for a minute",
            stale_policies.clone(),
        );
        Self {
            registry,
            requests,
            duration,
            denials,
            refused_connections,
            expires,
            rotations,
            stale_policies,
            tcp,
            peers: Mutex::default(),
            series: Mutex::default(),
        }
    }
}

pub(crate) fn histogram() -> Histogram {
    Histogram::new(DURATION_BUCKETS_SECONDS)
}

impl Metrics {
    /// The counters of plain connections.
    pub fn tcp(&self) -> &TcpStats {
        &self.tcp
    }

    /// Where others add theirs, before it is shared.
    pub fn registry_mut(&mut self) -> &mut Registry {
        &mut self.registry
    }

    /// Counts a finished request.
    pub fn observe(&self, seen: &Observation<'_>) {
        let Observation { direction, peer, route, status, took } = *seen;
        let labels = SeriesOf { direction, status: status.as_u16(), peer, route };
        let mut cached = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = cached.get(&labels) {
            series.requests.inc();
            series.duration.observe(took.as_secs_f64());
            return;
        }
        let series = self.series_of(&labels);
        series.requests.inc();
        series.duration.observe(took.as_secs_f64());
        if cached.len() >= MAX_CACHED_SERIES {
            // Peers come and go; what is in use is back at its next request.
            cached.clear();
        }
        let (peer, route) = (peer.into(), route.into());
        cached.insert(SeriesKey { direction, status: labels.status, peer, route }, series);
    }

    fn series_of(&self, labels: &SeriesOf<'_>) -> Series {
        let (direction, route) = (labels.direction, labels.route.to_owned());
        let of_route = RouteLabels { direction, route: route.clone() };
        let peer = self.bounded_peer(labels.peer);
        let of_request = RequestLabels { direction, peer, route, status: labels.status.into() };
        Series {
            requests: self.requests.get_or_create(&of_request).clone(),
            duration: self.duration.get_or_create(&of_route).clone(),
        }
    }

    /// Counts a denial. Rules come from policy files and this code, so they are bounded.
    pub fn denied(&self, rule: String) {
        self.denials.get_or_create(&RuleLabels { rule }).inc();
    }

    /// Counts a connection that never became one.
    pub fn refused_connection(&self, rule: &str) {
        self.refused_connections.get_or_create(&RuleLabels { rule: rule.to_owned() }).inc();
    }

    /// Says of the relations how many and how old they are, where there are any.
    pub(crate) fn show_relations(&mut self, relations: Arc<Relations>) {
        self.registry.register_collector(Box::new(RelationsNow(relations)));
    }

    /// Notes whether policies may be old.
    pub fn stale_policies(&self, stale: bool) {
        self.stale_policies.set(stale.into());
    }

    /// Notes a new SVID.
    pub fn rotated(&self, not_after: Duration) {
        self.rotations.inc();
        self.expires.set(not_after.as_secs_f64());
    }

    /// The Prometheus text exposition (OpenMetrics 1.0).
    pub fn render(&self) -> String {
        let mut text = String::new();
        if text::encode(&mut text, &self.registry).is_err() {
            // Only a failing writer can end here, and a String is none; say so rather than serve half.
            text.clear();
            let _infallible = writeln!(text, "# EOF");
        }
        text
    }

    fn bounded_peer(&self, peer: &str) -> String {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.contains(peer) {
            return peer.to_owned();
        }
        if peers.len() >= MAX_PEERS {
            return "other".to_owned();
        }
        peers.insert(peer.to_owned());
        peer.to_owned()
    }
}
