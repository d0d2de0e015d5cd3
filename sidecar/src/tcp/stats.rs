//! What plain connections add to `/metrics`: every label bounded.

use std::sync::atomic::AtomicI64;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::kafka::KafkaStats;
use crate::metrics::Direction;

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum SessionEnd {
    /// Both sides finished.
    Finished,
    /// A stream failed or was reset.
    Broken,
    /// Nothing moved, or a reader did not take what waited.
    TimedOut,
    /// Refused or ended by policy.
    Denied,
    /// The peer's certificate ended or was revoked.
    Expired,
    /// The app, or every endpoint, was out of reach.
    Unreachable,
}

impl SessionEnd {
    /// Its name in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Broken => "broken",
            Self::TimedOut => "timed_out",
            Self::Denied => "denied",
            Self::Expired => "expired",
            Self::Unreachable => "unreachable",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SessionLabels {
    direction: Direction,
    end: SessionEnd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Flow {
    Forward,
    Back,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByteLabels {
    direction: Direction,
    flow: Flow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Handshake {
    /// Before anybody needed it.
    Ahead,
    /// While a client waited.
    Awaited,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandshakeLabels {
    when: Handshake,
}

/// Counters of plain connections, cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct TcpStats {
    sessions: Family<SessionLabels, Counter>,
    bytes: Family<ByteLabels, Counter>,
    handshakes: Family<HandshakeLabels, Counter>,
    reused: Counter,
    active: Gauge<i64, AtomicI64>,
    kafka: KafkaStats,
}

impl TcpStats {
    /// Adds them to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("tcp_sessions", "Plain connections that ended, by how", self.sessions.clone());
        registry.register("tcp_bytes", "Bytes carried for plain connections that ended", self.bytes.clone());
        registry.register("tcp_handshakes", "TLS handshakes for plain connections", self.handshakes.clone());
        registry.register("tcp_reused", "Plain connections that needed no handshake", self.reused.clone());
        registry.register("tcp_active", "Plain connections that are open", self.active.clone());
        self.kafka.register(registry);
    }

    /// The counters of what Kafka's clients ask for on such connections.
    pub(crate) fn kafka(&self) -> &KafkaStats {
        &self.kafka
    }

    /// Counts a session until the guard is dropped.
    pub(crate) fn session(&self) -> Active {
        self.active.inc();
        Active(self.active.clone())
    }

    /// Counts a session that has ended and what it carried, forward and back.
    pub(crate) fn ended(&self, direction: Direction, end: SessionEnd, (forward, back): (u64, u64)) {
        self.sessions.get_or_create(&SessionLabels { direction, end }).inc();
        self.bytes.get_or_create(&ByteLabels { direction, flow: Flow::Forward }).inc_by(forward);
        self.bytes.get_or_create(&ByteLabels { direction, flow: Flow::Back }).inc_by(back);
    }

    pub(crate) fn handshake(&self, awaited: bool) {
        let when = if awaited { Handshake::Awaited } else { Handshake::Ahead };
        self.handshakes.get_or_create(&HandshakeLabels { when }).inc();
    }

    pub(crate) fn reused(&self) {
        self.reused.inc();
    }

    /// Handshakes so far: those made ahead of need and those a client waited for.
    pub fn handshakes(&self) -> (u64, u64) {
        let count = |when| self.handshakes.get_or_create(&HandshakeLabels { when }).get();
        (count(Handshake::Ahead), count(Handshake::Awaited))
    }

    /// Sessions so far that went over a connection that was ready.
    pub fn sessions_without_handshake(&self) -> u64 {
        self.reused.get()
    }
}

/// A session that is open.
pub(crate) struct Active(Gauge<i64, AtomicI64>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.dec();
    }
}
