//! `sidecar.toml` as it is written: one struct a section. The doc comments here are its reference.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use sidecar::traffic::config::{HealthCheck, RateLimit, Traffic};
use toml::Spanned;

use crate::mesh::file::{AppProtocol, CaptureSection, Text, TracesSection};
use crate::mesh::schema::Reference;

/// One sidecar by itself: certificates from files, policies from a directory, no control, no agent.
/// Run it with `palisade sidecar --config FILE`. Paths are relative to this file. Durations are written
/// like 90s, 2m or 1h30m. Certificates are read again when they change; SIGHUP has them and the policies
/// read again at once.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "sidecar.toml")]
pub(crate) struct SidecarFile {
    pub(crate) identity: IdentitySection,
    /// Other trust domains, and the roots that vouch for them, PEM. Leave the section out to know only
    /// your own.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, String>", example = serde_json::json!({"partner.example": "certs/partner.crt"}))]
    pub(crate) trust: BTreeMap<Text, Text>,
    pub(crate) inbound: Option<InboundSection>,
    pub(crate) ext_authz: Option<ExtAuthzSection>,
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, OutboundSection>")]
    pub(crate) outbound: BTreeMap<Spanned<String>, OutboundSection>,
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, Traffic>")]
    pub(crate) traffic: BTreeMap<Spanned<String>, Traffic>,
    /// The zones that hosts are in, such as data centres, each by its networks: what `prefer` goes by. A host is in the
    /// zone that its own addresses are in. Leave the section out where nothing is far.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, Vec<String>>", example = serde_json::json!({"north": ["10.1.0.0/16"], "south": ["10.2.0.0/16"]}))]
    pub(crate) zones: BTreeMap<Text, Vec<Text>>,
    pub(crate) capture: Option<CaptureSection>,
    pub(crate) admin: Option<AdminSection>,
    #[serde(default)]
    pub(crate) telemetry: TelemetrySection,
    pub(crate) traces: Option<TracesSection>,
    #[serde(default)]
    pub(crate) limits: LimitsSection,
}

impl Reference for SidecarFile {
    const NAME: &'static str = "sidecar.toml";
    const SAMPLE: &'static str = "palisade config example --sidecar";
    const SECTIONS: &'static [(&'static str, &'static str)] = &[
        ("identity", ""),
        ("trust", ""),
        ("inbound", ""),
        ("ext_authz", ""),
        ("outbound", "backend"),
        ("traffic", "backend"),
        ("zones", ""),
        ("capture", ""),
        ("admin", ""),
        ("telemetry", ""),
        ("traces", ""),
        ("limits", ""),
    ];
}

/// Whose sidecar this is.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct IdentitySection {
    /// The certificate chain, PEM, leaf first. The SPIFFE ID is the leaf's URI SAN.
    #[schemars(with = "String", example = &"certs/server.crt")]
    pub(crate) certificate: Text,
    /// The leaf's private key, PEM: PKCS#8, or SEC1 on P-256 or P-384. Mode 0600.
    #[schemars(with = "String", example = &"certs/server.key")]
    pub(crate) key: Text,
    /// The roots of the own trust domain, PEM.
    #[schemars(with = "String", example = &"certs/ca.crt")]
    pub(crate) bundle: Text,
}

/// The mTLS door of the app. Leave the section out where nobody calls it.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct InboundSection {
    /// Where other sidecars connect, mTLS.
    #[schemars(with = "String", example = "127.0.0.1:15606")]
    pub(crate) listen: Text,
    /// Where the app listens, loopback only, without TLS.
    #[schemars(with = "String", example = "127.0.0.1:18080")]
    pub(crate) app: Text,
    /// The directory of policies.
    #[schemars(with = "String", example = &"policies")]
    pub(crate) policies: Text,
    /// The service's name: its policies are services/NAME in that directory.
    #[schemars(with = "String", example = &"backend")]
    pub(crate) service: Text,
    /// What the app speaks: http1, h2c (HTTP/2 without TLS), kafka, whose requests its map judges by mapping = "kafka",
    /// or tcp: a protocol of its own, whose connections it judges by mapping = "tcp". Default: http1.
    #[schemars(example = &"http1")]
    pub(crate) app_protocol: Option<AppProtocol>,
    /// The SPIFFE IDs at which transaction tokens may begin. Default: none, no request carries a user.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["spiffe://mesh.test/ns/default/sa/gateway"])]
    pub(crate) gateways: Vec<Text>,
    /// The longest that the app may take to answer. A gRPC call has its own deadline instead. Default: 30s.
    #[schemars(with = "Option<String>", example = &"30s")]
    pub(crate) request_timeout: Option<Text>,
    /// How many requests are let through; more are answered 429. Default: all.
    #[schemars(example = serde_json::json!({"requests": 100, "per": "1s", "by": "peer"}))]
    pub(crate) rate_limit: Option<RateLimit>,
    /// How the app is asked whether it is well, for /ready and /metrics. Default: not at all.
    #[schemars(example = serde_json::json!({"check": "http:/healthz"}))]
    pub(crate) health: Option<HealthCheck>,
    /// The load balancers in front of `listen`, which must begin each connection with a PROXY protocol header,
    /// version 1 or 2; nobody else may. Default: none.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["10.1.0.0/16"])]
    pub(crate) proxy_protocol_from: Vec<Text>,
    /// A second way in, for the proxies of an Istio ambient mesh: HBONE, port 15008 by custom. Default: none.
    #[schemars(with = "Option<String>", example = "127.0.0.1:15608")]
    pub(crate) hbone: Option<Text>,
    /// The app's addresses as that mesh knows them. Default: hbone's address with the app's port.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["10.0.0.2:18080"])]
    pub(crate) hbone_destinations: Vec<Text>,
}

/// The same decisions for an Envoy that stays before the app: its ext_authz filter asks here, by gRPC. The
/// README of the sidecar has the Envoy configuration that this rests on. Beside [inbound] it is of the same
/// service and policies. Leave the section out where no Envoy asks.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExtAuthzSection {
    /// Where Envoy asks: unix:/PATH (its owner and group may), or an address, loopback unless callers are
    /// named.
    #[schemars(with = "String", example = &"127.0.0.1:15609")]
    pub(crate) listen: Text,
    /// The SPIFFE IDs that may ask, by mTLS. Default: none named, whoever reaches the address may.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["spiffe://mesh.test/ns/default/sa/envoy"])]
    pub(crate) callers: Vec<Text>,
    /// The directory of policies.
    #[schemars(with = "String", example = &"policies")]
    pub(crate) policies: Text,
    /// The service's name: its policies are services/NAME in that directory.
    #[schemars(with = "String", example = &"backend")]
    pub(crate) service: Text,
    /// The SPIFFE IDs at which transaction tokens may begin. Default: none, no request carries a user.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["spiffe://mesh.test/ns/default/sa/gateway"])]
    pub(crate) gateways: Vec<Text>,
    /// Where the app tells its objects' attributes, loopback only. Default: nowhere, routes whose
    /// attributes come from "entities" are denied.
    #[schemars(with = "Option<String>", example = "127.0.0.1:18080")]
    pub(crate) entities_address: Option<Text>,
    /// What the app speaks there: http1, or h2c (HTTP/2 without TLS). Default: http1.
    #[schemars(example = &"http1")]
    pub(crate) app_protocol: Option<AppProtocol>,
    /// The longest that the app may take to tell them. Default: 1s.
    #[schemars(with = "Option<String>", example = &"1s")]
    pub(crate) entities_timeout: Option<Text>,
}

/// A service that the app calls.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct OutboundSection {
    /// Where the app calls it, loopback only.
    #[schemars(with = "String", example = "127.0.0.1:15601")]
    pub(crate) listen: Text,
    /// The SPIFFE ID that must answer.
    #[schemars(with = "String", example = "spiffe://mesh.test/ns/default/sa/backend")]
    pub(crate) id: Text,
    /// What the calls are: http, or tcp for a service whose app speaks a protocol of its own. Default: http.
    #[schemars(example = &"http")]
    pub(crate) protocol: Option<CallProtocol>,
    /// Where its sidecars are: addresses, or one name and port, whose addresses are looked up every five seconds.
    #[schemars(with = "Vec<String>", example = ["127.0.0.1:15606"])]
    pub(crate) endpoints: Vec<Text>,
    /// Where an app dials it that knows of no sidecar, for [capture]. Default: the endpoints.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["10.0.0.2:80"])]
    pub(crate) addresses: Vec<Text>,
    /// The longest that it may take to answer. A gRPC call has its own deadline instead. Default: 30s.
    #[schemars(with = "Option<String>", example = &"30s")]
    pub(crate) request_timeout: Option<Text>,
}

/// What calls are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, serde::Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(crate) enum CallProtocol {
    /// Requests, HTTP/1.1 or HTTP/2.
    Http,
    /// Connections that the sidecar does not read.
    Tcp,
}

/// /ready, /live and /metrics. Leave the section out to have none.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AdminSection {
    /// Where it listens, loopback only.
    #[schemars(with = "String", example = "127.0.0.1:15690")]
    pub(crate) listen: Text,
}

/// Logs.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TelemetrySection {
    /// Where one JSON line a request goes, without bodies or secrets: stdout, a file to append to, or off.
    /// SIGHUP opens the file anew. Default: stdout.
    #[schemars(with = "Option<String>", example = &"stdout")]
    pub(crate) access_log: Option<Text>,
    /// Which other log lines are written to standard error, in the manner of RUST_LOG. Default: info.
    #[schemars(with = "Option<String>", example = &"info")]
    pub(crate) log: Option<Text>,
}

/// Bounds of the process.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LimitsSection {
    /// How long requests under way may go on when the sidecar is asked to end. Default: 10s.
    #[schemars(with = "Option<String>", example = &"10s")]
    pub(crate) drain_timeout: Option<Text>,
    /// Resident memory past which new requests are answered 503, as a number with KiB, MiB or GiB; or
    /// none. Default: 80 % of the memory limit of the process's control group, if there is one.
    #[schemars(with = "Option<String>", example = &"256MiB")]
    pub(crate) memory: Option<Text>,
    /// Threads that carry requests. Default: one a processor.
    #[schemars(with = "Option<u32>", example = 2)]
    pub(crate) workers: Option<Spanned<u32>>,
}
