//! The data plane: one proxy beside each service.
//!
//! | module | what it holds |
//! |---|---|
//! | [`inbound`] | the mTLS listener: who, for whom, what, may they, forward. Start reading here. |
//! | [`outbound`] | one loopback listener a called service: finds on whose behalf, calls on over mTLS |
//! | [`upstream`] | the client half: pooled mTLS connections to exactly one SPIFFE ID |
//! | [`app`] | the loopback connection to the app this sidecar stands before |
//! | [`capture`] | connections that the kernel brought here: whom they were meant for, and where they go |
//! | [`relations`] | what is true of objects by API: a copy that knows how old it is |
//! | [`correlate`] | which transaction a call of the app belongs to |
//! | `mux` | what travels between two sidecars: many exchanges on one connection |
//! | [`tcp`] | plain connections both ways: what the app speaks is not HTTP |
//! | [`detect`], [`proxy_protocol`] | what a connection speaks by its first bytes; where it came from before a proxy |
//! | [`hbone`] | a second way in for meshes that tunnel |
//! | [`kafka`] | connections of Kafka's clients: each request judged object by object |
//! | [`live`] | what is open, so that a decision can be taken again |
//! | [`server`] | accept loops, handshakes, limits and draining, shared with the gateway |
//! | [`http1`] | plain HTTP/1.1 at both ends: the server that local apps talk to, the client to the app |
//! | [`ext_authz`] | the same decisions for whoever keeps Envoy: its external authorization as a server |
//! | [`headers`] | what must never pass from one hop to the next |
//! | [`traffic`] | which endpoint, how often, how long: balancing, ejection, breaking, retries, timeouts |
//! | [`access`] | a line of JSON a request |
//! | [`overload`] | refusing early what memory and descriptors do not suffice for |
//! | [`admin`], [`metrics`] | `/ready`, `/live` and `/metrics` |
//! | [`tap`] | requests as they end, for whoever looks on |
//! | [`trace`], [`otlp`] | trace contexts; recorded requests as spans, to a collector |
//! | [`debug`] | `/debug`: what is open, where calls go, whose certificates, what is in force |

mod accept;
pub mod access;
pub mod admin;
mod answer;
pub mod app;
mod app_health;
mod body;
pub mod bounded;
mod buffered;
pub mod callee;
pub mod capture;
pub mod correlate;
pub mod debug;
pub mod detect;
mod dial;
mod entities;
pub mod ext_authz;
pub mod grpc;
pub mod hbone;
pub mod headers;
pub mod http1;
mod http2;
pub mod inbound;
pub mod kafka;
pub mod live;
mod messages;
pub mod metrics;
mod mux;
pub mod otlp;
pub mod outbound;
pub mod overload;
mod pieces;
pub mod proxy_protocol;
pub mod relations;
mod sample;
pub mod server;
mod sidecar;
mod streams;
pub mod tap;
pub mod tcp;
pub mod trace;
pub mod traffic;
mod transaction;
pub mod upstream;
mod watchers;

use bytes::Bytes;

pub use body::{Body, BoxError};
pub use buffered::Buffered;
pub use dial::unpaced;
pub use sidecar::{
    Call, Carries, HboneConfig, InboundConfig, Sidecar, SidecarConfig, SidecarError, drain_in_order,
};

/// A body that is already here.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Body::from(bytes.into())
}

/// No body.
pub fn empty() -> Body {
    Body::empty()
}
