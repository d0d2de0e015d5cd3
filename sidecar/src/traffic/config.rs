//! How traffic to one service is told to go: the keys of an outbound section, two levels at most.
//!
//! Everything is optional, and what is left out is safe: calls are spread by load, nothing is sent twice
//! that may have arrived once, nothing is delayed, aborted or mirrored.
//!
//! Durations are written like `250ms`, `2s` or `1h30m`, shares like `20%`.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, Method, StatusCode};
use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::egress::Rule;
use super::topology::Topology;
pub use super::value::Share;
use super::value::{
    at_most, between, failure, header, maybe_between, maybe_within, methods, read_from_text, within,
};

/// How traffic to one service goes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Traffic {
    /// Which endpoint a request goes to: p2c-ewma (of two drawn at random the one with the shorter answer
    /// time × requests in flight), least-request (… with fewer requests in flight), round-robin, random,
    /// or the same for all with the same key: hash:header:NAME, hash:cookie:NAME, hash:source (the
    /// caller's address) or hash:user (the verified one), those without it by p2c-ewma.
    /// Default: p2c-ewma.
    #[schemars(with = "String", example = &"hash:header:x-tenant")]
    pub balance: Balance,
    /// Which endpoints get all of it while 71 % of them are healthy: zone (those of [zones] that this host is in),
    /// host (those on this host, then the zone's), or any. With fewer, what they cannot carry goes farther.
    /// Default: any.
    #[schemars(example = &"zone")]
    pub prefer: Prefer,
    /// What is near, for whoever reads the file to fill in.
    #[serde(skip)]
    pub topology: Arc<Topology>,
    /// When fewer of the endpoints than this are healthy, all are tried; 0%: never. Default: 50%.
    #[schemars(with = "String", example = &"50%")]
    pub panic_below: Panic,
    /// When an endpoint that answers badly is left out for a while.
    #[schemars(example = serde_json::json!({"gateway": 3, "for": "30s"}))]
    pub eject: Eject,
    /// How much may be under way at once.
    #[schemars(example = serde_json::json!({"requests": 10000}))]
    pub limits: Limits,
    /// What is tried again.
    #[schemars(example = serde_json::json!({"on": ["connect", "refused", "502", "503"], "max": 2}))]
    pub retries: Retries,
    /// Whether a slow request is sent a second time, and the first answer taken. Default: never.
    #[schemars(example = serde_json::json!({"after": "95%"}))]
    pub hedge: Option<Hedge>,
    /// How long connecting, and the whole of a request, may take.
    #[schemars(example = serde_json::json!({"connect": "3s"}))]
    pub timeouts: Timeouts,
    /// Other names of services that share these calls, each with its weight, 0 to 1000; at most 16.
    /// Default: all calls go to the service called.
    #[serde(deserialize_with = "split")]
    #[schemars(example = serde_json::json!({"accounts": 95, "accounts-next": 5}))]
    pub split: BTreeMap<String, u32>,
    /// What decides which of them a call goes to, so that the same goes to the same: header:NAME,
    /// cookie:NAME, source or user; calls without it are drawn at random. Default: all are.
    #[schemars(with = "Option<String>", example = &"header:x-tenant")]
    pub split_by: Option<HashBy>,
    /// A service that is sent a copy of some calls; its answers are dropped. Default: none.
    #[schemars(example = serde_json::json!({"to": "accounts-next", "share": "5%"}))]
    pub mirror: Option<Mirror>,
    /// Faults made on purpose, to see how callers bear them. Default: none.
    #[schemars(example = serde_json::json!({"abort": 503, "abort_share": "1%", "only_with": "x-fault"}))]
    pub faults: Option<Faults>,
    /// How endpoints are asked whether they are well, beside watching their answers: through their sidecars, whose
    /// policies must allow it. Default: not at all.
    #[schemars(example = serde_json::json!({"check": "http:/healthz", "every": "5s"}))]
    pub health: Option<HealthCheck>,
}

impl Traffic {
    /// What of it holds for connections, which are no requests; the error says what does not.
    pub fn of_connections(&self) -> Result<(), &'static str> {
        let Self { balance, prefer, topology, panic_below, eject, limits, .. } = self.clone();
        let steered = Self { balance, prefer, topology, panic_below, eject, limits, ..Self::default() };
        if *self != steered {
            return Err(
                "takes connections: only balance, prefer, panic_below, eject and limits hold for those",
            );
        }
        match self.balance {
            Balance::Hash(_) => Err("takes connections, which have no key to balance by"),
            _ => Ok(()),
        }
    }

    /// The other services that it names, which must be known too.
    pub fn named(&self) -> impl Iterator<Item = &str> {
        let mirror = self.mirror.iter().map(|mirror| mirror.to.as_str());
        self.split.keys().map(String::as_str).chain(mirror)
    }
}

/// Which hosts outside the mesh the app may call through its sidecar.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Egress {
    /// SCHEME://HOST[:PORT] each, all else is refused. The scheme says what the app speaks: https (HTTP,
    /// which its sidecar makes HTTPS), tls (TLS of its own, by the name in its ClientHello), http (clear
    /// text) or tcp. *.NAME is all names below NAME. At most 10000. Default: none.
    #[serde(deserialize_with = "egress_rules")]
    #[schemars(with = "Vec<String>", example = ["https://api.example.org", "tls://*.example.org"])]
    pub allow: Vec<Rule>,
}

/// Lines of an allow-list: what is longer is no list of what an app needs.
const MAX_EGRESS_RULES: usize = 10_000;

/// Which endpoint a request goes to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Balance {
    /// Two at random, the one with less answer time × requests in flight.
    #[default]
    P2cEwma,
    /// Two at random, the one with fewer requests in flight.
    LeastRequest,
    /// The same key, the same endpoint, as far as loads allow.
    Hash(HashBy),
    /// One after the other.
    RoundRobin,
    /// Whichever.
    Random,
}

impl FromStr for Balance {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "p2c-ewma" => Ok(Self::P2cEwma),
            "least-request" => Ok(Self::LeastRequest),
            "round-robin" => Ok(Self::RoundRobin),
            "random" => Ok(Self::Random),
            _ => match text.strip_prefix("hash:") {
                Some(by) => by.parse().map(Self::Hash),
                None => Err("is none of p2c-ewma, least-request, round-robin, random, hash:KEY"),
            },
        }
    }
}

/// How near endpoints are preferred.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Prefer {
    /// Wherever they are.
    #[default]
    Any,
    /// The own zone, then all.
    Zone,
    /// The own host, then the own zone, then all.
    Host,
}

/// What requests are told apart by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashBy {
    /// The address of the caller.
    Source,
    /// The verified user.
    User,
    /// A header's value.
    Header(HeaderName),
    /// A cookie's value.
    Cookie(String),
}

impl FromStr for HashBy {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "source" => Ok(Self::Source),
            None if text == "user" => Ok(Self::User),
            Some(("header", name)) => {
                name.parse().map(Self::Header).map_err(|_| "is not the name of a header")
            }
            // A cookie's name is a token (RFC 6265 §4.1.1), as methods are.
            Some(("cookie", name)) if Method::from_bytes(name.as_bytes()).is_ok() => {
                Ok(Self::Cookie(name.to_owned()))
            }
            _ => Err("is none of header:NAME, cookie:NAME, source, user"),
        }
    }
}

/// When an endpoint that answers badly is left out for a while.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(inline)]
pub struct Eject {
    /// After so many failed connections, broken requests or timeouts in a row; 0: never. Default: 5.
    pub connect: u32,
    /// After so many answers 502, 503 or 504 in a row, failures of connections counted too; 0: never.
    /// Default: 5.
    pub gateway: u32,
    /// After so many answers 500 to 599 in a row, the former counted too; 0: never. Default: 0, for one
    /// caller's poisonous request must not take a service down endpoint by endpoint.
    pub server: u32,
    /// When its rate of success in `every` is so many standard deviations below the others', if there are
    /// five with a hundred requests each; 0: never. Default: 1.9.
    pub deviations: f64,
    /// How often rates of success are compared, 1s to 1h. Default: 10s.
    #[serde(deserialize_with = "within::<1_000, 3_600_000, _>")]
    #[schemars(with = "String", example = &"10s")]
    pub every: Duration,
    /// How long the first time; the second twice that, and so on up to ten times. 1s to 1h. Default: 30s.
    #[serde(rename = "for", deserialize_with = "within::<1_000, 3_600_000, _>")]
    #[schemars(with = "String", example = &"30s")]
    pub base: Duration,
    /// The most endpoints left out at once, as a share of all by number, rounded down. Default: 50%.
    #[schemars(with = "String", example = &"50%")]
    pub max: Share,
}

impl Default for Eject {
    fn default() -> Self {
        Self {
            connect: 5,
            gateway: 5,
            server: 0,
            deviations: 1.9,
            every: Duration::from_secs(10),
            base: Duration::from_secs(30),
            max: Share::percent(50),
        }
    }
}

/// How much may be under way at once to one service; more is answered 503.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(inline)]
pub struct Limits {
    /// Requests whose answers have not ended. Default: 10000, the most connections of a listener.
    pub requests: u32,
    /// Requests that wait for a connection. Default: 1000.
    pub pending: u32,
    /// Connections to all endpoints together. Default: 1024.
    pub connections: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests: 10_000, pending: 1000, connections: 1024 }
    }
}

/// What is tried again, and how much of it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(inline)]
pub struct Retries {
    /// After what: connect (nothing was sent), refused (the peer says it did nothing: HTTP/2
    /// REFUSED_STREAM, RFC 9113 §8.7), broken (the connection broke before the answer), timeout
    /// (per_try), or a status from 500 to 599. All but the first two only for the methods below.
    /// Default: connect and refused. An empty list: never.
    #[schemars(with = "Vec<String>", example = ["connect", "refused", "502", "503"])]
    pub on: BTreeSet<RetryOn>,
    /// The methods that may arrive twice. Default: the idempotent ones of RFC 9110 §9.2.2.
    #[serde(deserialize_with = "methods")]
    #[schemars(with = "Vec<String>", example = ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"])]
    pub methods: Vec<Method>,
    /// Tries of one request beyond the first, at most 10. Default: 2.
    #[serde(deserialize_with = "at_most::<10, _>")]
    pub max: u32,
    /// Retries and hedges of all requests together, as a share of the requests, at most 100%.
    /// Default: 20%.
    #[schemars(with = "String", example = &"20%")]
    pub budget: Share,
    /// Retries a second that are allowed beside the budget, at most 1000, so that a quiet service is
    /// retried at all. Default: 10.
    #[serde(deserialize_with = "at_most::<1000, _>")]
    pub min_per_second: u32,
    /// How long one try may take to its answer's head, 1ms to 1h. Default: as long as the request may.
    #[serde(deserialize_with = "maybe_within::<1, 3_600_000, _>")]
    #[schemars(with = "Option<String>", example = &"2s")]
    pub per_try: Option<Duration>,
    /// The longest wait before the first retry; it doubles for each further one, and each wait is drawn
    /// between nothing and that. 1ms to 1m. Default: 25ms.
    #[serde(deserialize_with = "within::<1, 60_000, _>")]
    #[schemars(with = "String", example = &"25ms")]
    pub backoff: Duration,
    /// The longest wait of all, 1ms to 1m. Default: 1s.
    #[serde(deserialize_with = "within::<1, 60_000, _>")]
    #[schemars(with = "String", example = &"1s")]
    pub backoff_max: Duration,
    /// The largest body that is kept for another try, in bytes, at most 1 MiB. Default: 65536.
    #[serde(deserialize_with = "at_most::<1_048_576, _>")]
    pub max_body: u32,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            on: [RetryOn::Connect, RetryOn::Refused].into(),
            methods: vec![
                Method::GET,
                Method::HEAD,
                Method::OPTIONS,
                Method::PUT,
                Method::DELETE,
                Method::TRACE,
            ],
            max: 2,
            budget: Share::percent(20),
            min_per_second: 10,
            per_try: None,
            backoff: Duration::from_millis(25),
            backoff_max: Duration::from_secs(1),
            max_body: 64 * 1024,
        }
    }
}

/// After what a request may be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RetryOn {
    /// Nothing was sent.
    Connect,
    /// The peer says that it did nothing.
    Refused,
    /// The connection broke before the answer.
    Broken,
    /// The try took too long.
    Timeout,
    /// The answer had this status.
    Status(StatusCode),
}

impl FromStr for RetryOn {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "connect" => Ok(Self::Connect),
            "refused" => Ok(Self::Refused),
            "broken" => Ok(Self::Broken),
            "timeout" => Ok(Self::Timeout),
            status => status
                .parse::<StatusCode>()
                .ok()
                .filter(StatusCode::is_server_error)
                .map(Self::Status)
                .ok_or("is none of connect, refused, broken, timeout, 500 to 599"),
        }
    }
}

/// A second copy of a slow request, the first answer counting. Only for the methods, bodies and budget of
/// `retries`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(inline)]
pub struct Hedge {
    /// The second copy goes out when the first has taken longer than this share of the last requests.
    /// Default: 95%.
    #[schemars(with = "String", example = &"95%")]
    pub after: Share,
    /// … and never sooner than this, 1ms to 1m. Default: 10ms.
    #[serde(deserialize_with = "within::<1, 60_000, _>")]
    #[schemars(with = "String", example = &"10ms")]
    pub min: Duration,
}

impl Default for Hedge {
    fn default() -> Self {
        Self { after: Share::percent(95), min: Duration::from_millis(10) }
    }
}

/// How long a request may take beside the time to its answer's head, which is the service's request_timeout.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(inline)]
pub struct Timeouts {
    /// TCP to one endpoint, 1ms to 1m. Default: 3s, in which one lost SYN is sent again.
    #[serde(deserialize_with = "within::<1, 60_000, _>")]
    #[schemars(with = "String", example = &"3s")]
    pub connect: Duration,
    /// TLS after it, 1ms to 1m. Default: 3s.
    #[serde(deserialize_with = "within::<1, 60_000, _>")]
    #[schemars(with = "String", example = &"3s")]
    pub tls: Duration,
    /// Without a byte of the answer's body, 1ms to 24h. Default: no bound, for a stream on which nobody speaks
    /// is not broken; a peer that is gone is noticed within half a minute.
    #[serde(deserialize_with = "maybe_within::<1, 86_400_000, _>")]
    #[schemars(with = "Option<String>", example = &"5m")]
    pub idle: Option<Duration>,
    /// The whole request to its answer's last byte, 1ms to 24h. A gRPC call's own deadline holds beside it.
    /// Default: no bound, for streams have none.
    #[serde(deserialize_with = "maybe_within::<1, 86_400_000, _>")]
    #[schemars(with = "Option<String>", example = &"1m")]
    pub whole: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: Duration::from_secs(3), tls: Duration::from_secs(3), idle: None, whole: None }
    }
}

/// A service that is sent a copy of some calls.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct Mirror {
    /// Its name.
    #[schemars(example = &"accounts-next")]
    pub to: String,
    /// How many of the calls. Default: 100%.
    #[serde(default = "Share::whole")]
    #[schemars(with = "String", example = &"5%")]
    pub share: Share,
    /// The largest body that is copied, in bytes, at most 1 MiB; calls with a longer one, or one of
    /// unknown length, are not. Default: 65536.
    #[serde(default = "default_mirror_body", deserialize_with = "at_most::<1_048_576, _>")]
    pub max_body: u32,
}

fn default_mirror_body() -> u32 {
    64 * 1024
}

/// Faults made on purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(inline)]
pub struct Faults {
    /// How long delayed requests wait, 1ms to 1m. Default: none is delayed.
    #[serde(deserialize_with = "maybe_within::<1, 60_000, _>")]
    #[schemars(with = "Option<String>", example = &"100ms")]
    pub delay: Option<Duration>,
    /// How many are delayed. Default: 0%.
    #[schemars(with = "String", example = &"10%")]
    pub delay_share: Share,
    /// The status that aborted requests get instead of an answer, 400 to 599. Default: none is aborted.
    #[serde(deserialize_with = "failure")]
    #[schemars(with = "Option<u16>", example = 503)]
    pub abort: Option<StatusCode>,
    /// How many are aborted. Default: 0%.
    #[schemars(with = "String", example = &"1%")]
    pub abort_share: Share,
    /// Only requests that carry this header. Default: all.
    #[serde(deserialize_with = "header")]
    #[schemars(with = "Option<String>", example = &"x-fault")]
    pub only_with: Option<HeaderName>,
}

/// How many requests are let through; more are answered 429.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct RateLimit {
    /// So many requests, 1 to 1000000 …
    #[serde(deserialize_with = "between::<1, 1_000_000, _>")]
    #[schemars(example = 100)]
    pub requests: u32,
    /// … in this time, 1s to 24h. Default: 1s.
    #[serde(default = "one_second", deserialize_with = "within::<1_000, 86_400_000, _>")]
    #[schemars(with = "String", example = &"1s")]
    pub per: Duration,
    /// Whose requests are counted together: route, peer or user. Default: peer.
    #[serde(default)]
    pub by: CountBy,
    /// How many may come at once, up to 1000000. Default: as many as `requests`.
    #[serde(default, deserialize_with = "maybe_between::<1, 1_000_000, _>")]
    #[schemars(example = 200)]
    pub burst: Option<u32>,
}

fn one_second() -> Duration {
    Duration::from_secs(1)
}

/// Whose requests are counted together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum CountBy {
    /// All of one route.
    Route,
    /// All of one calling service.
    #[default]
    Peer,
    /// All of one verified user; those without count as one.
    User,
}

/// How endpoints are asked whether they are well.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct HealthCheck {
    /// What is asked: connect (does it take a connection), http:/PATH (does it answer 200 to 299) or
    /// grpc, grpc:SERVICE (grpc.health.v1).
    #[schemars(with = "String", example = &"http:/healthz")]
    pub check: Check,
    /// How often, 100ms to 1h; each wait is up to a tenth shorter or longer. Default: 5s.
    #[serde(default = "five_seconds", deserialize_with = "within::<100, 3_600_000, _>")]
    #[schemars(with = "String", example = &"5s")]
    pub every: Duration,
    /// How long an answer may take, 1ms to 1m. Default: 1s.
    #[serde(default = "one_second", deserialize_with = "within::<1, 60_000, _>")]
    #[schemars(with = "String", example = &"1s")]
    pub timeout: Duration,
    /// Good answers in a row until it is well, 1 to 100. Default: 2.
    #[serde(default = "two", deserialize_with = "between::<1, 100, _>")]
    pub rise: u32,
    /// Bad ones in a row until it is ill, 1 to 100. Default: 3.
    #[serde(default = "three", deserialize_with = "between::<1, 100, _>")]
    pub fall: u32,
}

fn five_seconds() -> Duration {
    Duration::from_secs(5)
}

fn two() -> u32 {
    2
}

fn three() -> u32 {
    3
}

/// What an endpoint is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// To take a connection.
    Connect,
    /// To answer a GET of this path with 200 to 299.
    Http(String),
    /// To say SERVING for this service; empty is the server as a whole (grpc.health.v1).
    Grpc(String),
}

impl FromStr for Check {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
        match text.split_once(':') {
            None if text == "connect" => Ok(Self::Connect),
            None if text == "grpc" => Ok(Self::Grpc(String::new())),
            Some(("grpc", service)) if printable && !service.is_empty() => Ok(Self::Grpc(service.to_owned())),
            Some(("http", path))
                if printable && path.starts_with('/') && path.parse::<http::Uri>().is_ok() =>
            {
                Ok(Self::Http(path.to_owned()))
            }
            _ => Err("is none of connect, http:/PATH, grpc, grpc:SERVICE"),
        }
    }
}

/// [`Traffic::panic_below`], 50 % where nothing is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Panic(pub Share);

impl Default for Panic {
    fn default() -> Self {
        Self(Share::percent(50))
    }
}

impl FromStr for Panic {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

read_from_text!(Balance, HashBy, RetryOn, Check, Share, Panic, Rule);

fn egress_rules<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Rule>, D::Error> {
    let rules = Vec::<Rule>::deserialize(from)?;
    if rules.len() > MAX_EGRESS_RULES {
        return Err(D::Error::custom(format!("{} rules, at most {MAX_EGRESS_RULES} may be", rules.len())));
    }
    Ok(rules)
}

fn split<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, u32>, D::Error> {
    let split = BTreeMap::<String, u32>::deserialize(from)?;
    super::split::check(&split).map_err(D::Error::custom)?;
    Ok(split)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Traffic, String> {
        toml::from_str(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn nothing_said_is_safe() {
        let traffic = read("").unwrap();
        assert_eq!(traffic, Traffic::default());
        assert_eq!(traffic.retries.on, [RetryOn::Connect, RetryOn::Refused].into());
        assert!(traffic.hedge.is_none() && traffic.mirror.is_none() && traffic.faults.is_none());
    }

    #[test]
    fn every_key_is_read() {
        let traffic = read(
            r#"
            balance = "hash:cookie:tenant"
            split_by = "header:x-tenant"
            panic_below = "30%"
            eject = { connect = 3, gateway = 4, server = 5, deviations = 2.5, every = "5s", for = "1m", max = "10%" }
            limits = { requests = 1, pending = 2, connections = 3 }
            retries = { on = ["connect", "502", "503"], methods = ["GET", "POST"], budget = "12.5%", per_try = "2s", max = 2, min_per_second = 3, backoff = "5ms", backoff_max = "50ms", max_body = 10 }
            hedge = { after = "99%", min = "20ms" }
            timeouts = { connect = "1s", tls = "2s", idle = "4s", whole = "5s" }
            split = { accounts = 95, accounts-next = 5 }
            mirror = { to = "accounts-next", share = "5%", max_body = 1000 }
            health = { check = "connect" }
            faults = { delay = "100ms", delay_share = "10%", abort = 503, abort_share = "0.5%", only_with = "X-Fault" }
            "#,
        )
        .unwrap();
        assert_eq!(traffic.balance, Balance::Hash(HashBy::Cookie("tenant".into())));
        assert_eq!(traffic.retries.budget.millionths(), 125_000);
        assert_eq!(traffic.eject.base, Duration::from_secs(60));
        assert_eq!(traffic.faults.unwrap().only_with.unwrap(), "x-fault");
        let limit: RateLimit =
            toml::from_str("requests = 100\nper = \"1m\"\nby = \"user\"\nburst = 10").unwrap();
        assert_eq!((limit.by, limit.burst), (CountBy::User, Some(10)));
        let health: HealthCheck = toml::from_str(
            "check = \"grpc:bank.Accounts\"\nevery = \"10s\"\ntimeout = \"500ms\"\nrise = 1\nfall = 2",
        )
        .unwrap();
        assert_eq!(health.check, Check::Grpc("bank.Accounts".into()));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, message) in [
            ("balanse = 'random'", "unknown field `balanse`, expected one of"),
            ("retries = { max = 11 }", "11 is not between 0 and 10"),
            ("retries = { on = ['404'] }", "`404` is none of connect, refused, broken, timeout, 500 to 599"),
            ("retries = { methods = ['get'] }", "`get` is not a method like GET"),
            ("retries = { budget = '101%' }", "`101%` is not a share like 20% or 0.5%, at most 100%"),
            ("retries = { budget = 20 }", "invalid type: integer `20`, expected a string"),
            ("timeouts = { connect = '2m' }", "2m is not between 1ms and 1m"),
            ("timeouts = { idle = 'soon' }", "`soon` is not a duration"),
            ("balance = 'hash'", "`hash` is none of p2c-ewma, least-request, round-robin, random, hash:KEY"),
            ("split_by = 'header:a b'", "`header:a b` is not the name of a header"),
            ("balance = 'hash:cookie:'", "`hash:cookie:` is none of"),
            ("split = { a = 0 }", "no weight is above zero"),
            ("faults = { abort = 200 }", "200 is not a status from 400 to 599"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with(message), "{text}: {error}");
        }
        let error = toml::from_str::<HealthCheck>("check = 'http:healthz'").unwrap_err();
        assert!(error.message().starts_with("`http:healthz` is none of"), "{error}");
        let error = toml::from_str::<RateLimit>("requests = 0").unwrap_err();
        assert!(error.message().starts_with("0 is not between 1 and 1000000"), "{error}");
    }

    #[test]
    fn egress_is_a_list_of_rules() {
        let read = |text: &str| toml::from_str::<Egress>(text).map_err(|error| error.message().to_owned());
        let egress = read("allow = ['https://api.example.org', 'tcp://10.0.0.7:5432']").unwrap();
        assert_eq!(egress.allow.len(), 2);
        assert_eq!(egress.allow[0].to_string(), "https://api.example.org");
        let error = read("allow = ['api.example.org']").unwrap_err();
        assert!(error.starts_with("`api.example.org` is not SCHEME://HOST"), "{error}");
        assert!(read("").unwrap().allow.is_empty());
    }

    #[test]
    fn the_schema_describes_every_key() {
        let settings =
            schemars::generate::SchemaSettings::draft2020_12().with(|s| s.inline_subschemas = true);
        let schema = settings.into_generator().into_root_schema_for::<Traffic>().to_value();
        fn undescribed(schema: &serde_json::Value, at: &str, found: &mut Vec<String>) {
            for (key, value) in schema["properties"].as_object().into_iter().flatten() {
                let at = format!("{at}.{key}");
                if value.get("description").is_none() {
                    found.push(at.clone());
                }
                undescribed(value, &at, found);
            }
        }
        let mut found = Vec::new();
        undescribed(&schema, "", &mut found);
        assert_eq!(found, [] as [String; 0]);
        assert_eq!(schema["properties"].as_object().unwrap().len(), 13);
    }
}
