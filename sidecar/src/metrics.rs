//! Rate, errors and duration of requests, by direction, peer and route: every label bounded.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Peers told apart in metrics; the rest are counted together as `other`.
const MAX_PEERS: usize = 256;
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
    peers: Mutex<HashSet<String>>,
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
        registry.register("svid_rotations", "SVIDs received since the start", rotations.clone());
        Self {
            registry,
            requests,
            duration,
            denials,
            refused_connections,
            expires,
            rotations,
            peers: Mutex::default(),
        }
    }
}

fn histogram() -> Histogram {
    Histogram::new(DURATION_BUCKETS_SECONDS)
}

impl Metrics {
    /// Counts a finished request.
    pub fn observe(&self, seen: &Observation<'_>) {
        let Observation { direction, peer, route, status, took } = *seen;
        let peer = self.bounded_peer(peer);
        let labels =
            RequestLabels { direction, peer, route: route.to_owned(), status: status.as_u16().into() };
        self.requests.get_or_create(&labels).inc();
        let labels = RouteLabels { direction, route: route.to_owned() };
        self.duration.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Counts a denial. Rules come from policy files and this code, so they are bounded.
    pub fn denied(&self, rule: String) {
        self.denials.get_or_create(&RuleLabels { rule }).inc();
    }

    /// Counts a connection that never became one.
    pub fn refused_connection(&self, rule: &str) {
        self.refused_connections.get_or_create(&RuleLabels { rule: rule.to_owned() }).inc();
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
