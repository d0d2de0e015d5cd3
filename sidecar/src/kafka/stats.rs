//! What requests of Kafka's add to `/metrics`: every label bounded.

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::metrics::histogram;

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Outcome {
    /// It was passed on, whole or in part.
    Forwarded,
    /// It was answered here: nothing of it is allowed.
    Denied,
    /// It was not understood.
    Refused,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    api: &'static str,
    outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ApiLabels {
    api: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleLabels {
    rule: String,
}

/// Counters of requests, cheap to clone.
#[derive(Debug, Clone)]
pub struct KafkaStats {
    requests: Family<RequestLabels, Counter>,
    durations: Family<ApiLabels, Histogram, fn() -> Histogram>,
    denials: Family<RuleLabels, Counter>,
}

impl Default for KafkaStats {
    fn default() -> Self {
        let durations = Family::new_with_constructor(histogram as fn() -> Histogram);
        Self { requests: Family::default(), durations, denials: Family::default() }
    }
}

impl KafkaStats {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "kafka_requests",
            "Requests of Kafka clients, by what became of them",
            self.requests.clone(),
        );
        registry.register(
            "kafka_request_duration_seconds",
            "From a request's last byte to its answer's first; waiting for records takes as long as its client says",
            self.durations.clone(),
        );
        registry.register(
            "kafka_denials",
            "Denials about what Kafka clients asked for, by rule",
            self.denials.clone(),
        );
    }

    pub(super) fn request(&self, api: &'static str, outcome: Outcome) {
        self.requests.get_or_create(&RequestLabels { api, outcome }).inc();
    }

    pub(super) fn answered(&self, api: &'static str, took: Duration) {
        self.durations.get_or_create(&ApiLabels { api }).observe(took.as_secs_f64());
    }

    /// Rules come from policy files and this code, so they are bounded.
    pub(super) fn denied(&self, rule: &str) {
        self.denials.get_or_create(&RuleLabels { rule: rule.to_owned() }).inc();
    }
}
