//! `/debug` on the admin port: what this sidecar holds right now, as JSON, read only.
//!
//! | page | what it shows |
//! |---|---|
//! | `/debug/connections` | what is open: from peers, to peers, and what streams on by itself |
//! | `/debug/endpoints` | each called service: its endpoints, their load, who is ejected, how much is under way |
//! | `/debug/certificates` | the own SVID and the roots that are trusted; never a key |
//! | `/debug/config` | the configuration and the policy in force |
//! | `/debug/tap` | requests as they end, a line each, without an end ([`crate::tap`]) |
//!
//! It tells who talks to whom, so it is for people on this machine alone: a request must come over loopback, and
//! must have been meant for it. A page of somebody else's in a browser on this machine comes over loopback too,
//! but names another host (DNS rebinding).

mod certificates;
pub(crate) mod config;
pub(crate) mod connections;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HOST};
use http::uri::Authority;
use http::{HeaderValue, Request, Response, StatusCode};
use identity::clock::SharedClock;
use identity::{IdentitySource, Scope};
use policy::ServicePolicy;
use serde_json::{Value, json};

use crate::live::{Kind, Registry};
use crate::tap::{Tap, TapError};
use crate::upstream::Upstream;
use crate::{Body, answer};
use connections::Connections;

/// Items of one list on a page: what is longer is cut, and the page says by how many.
const MAX_LISTED: usize = 1000;

/// What the pages are made from.
pub(crate) struct Debug {
    pub(crate) source: IdentitySource,
    pub(crate) clock: SharedClock,
    pub(crate) connections: Arc<Connections>,
    pub(crate) live: Arc<Registry>,
    /// Not kept alive from here: their connections end with them when the sidecar drains.
    pub(crate) upstreams: Vec<Weak<Upstream>>,
    pub(crate) policy: Option<Arc<ArcSwap<ServicePolicy>>>,
    pub(crate) config: Value,
    pub(crate) tap: Arc<Tap>,
    pub(crate) scope: Scope,
}

/// Whether a path of the admin port belongs here.
pub(crate) fn is_page(path: &str) -> bool {
    path == "/debug" || path.starts_with("/debug/")
}

impl Debug {
    /// Answers a GET of a page.
    pub(crate) fn answer(&self, remote: SocketAddr, request: &Request<Body>) -> Response<Body> {
        if !remote.ip().to_canonical().is_loopback() || !names_this_machine(request) {
            tracing::info!(%remote, path = request.uri().path(), "/debug is for this machine only");
            return answer::json(StatusCode::FORBIDDEN, r#"{"error":"for this machine only"}"#);
        }
        let page = match request.uri().path() {
            "/debug" | "/debug/" => {
                json!({ "pages": ["/debug/certificates", "/debug/config", "/debug/connections", "/debug/endpoints", "/debug/tap"] })
            }
            "/debug/certificates" => certificates::page(self.source.current().as_deref()),
            "/debug/config" => config::page(
                &self.config,
                self.policy.as_ref().map(|policy| policy.load_full()),
                self.clock.now(),
            ),
            "/debug/connections" => self.connections(),
            "/debug/endpoints" => self.endpoints(),
            "/debug/tap" => return self.tap(request.uri().query().unwrap_or_default()),
            _ => return answer::json(StatusCode::NOT_FOUND, r#"{"error":"not_found"}"#),
        };
        answer::json(StatusCode::OK, format!("{page:#}\n"))
    }

    fn tap(&self, query: &str) -> Response<Body> {
        let body = match self.tap.open(query, self.clock.clone(), self.scope.clone()) {
            Ok(body) => body,
            Err(error) => {
                let status = match error {
                    TapError::TooMany => StatusCode::SERVICE_UNAVAILABLE,
                    TapError::Filter(_) => StatusCode::BAD_REQUEST,
                };
                return answer::json(status, json!({ "error": error.to_string() }).to_string());
            }
        };
        let mut response = Response::new(body);
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }

    fn connections(&self) -> Value {
        let now = self.clock.now();
        let open = self.live.list();
        // What carries requests is counted by request, in `inbound`.
        let streams = open.iter().filter(|open| open.facts.kind != Kind::Http).map(|open| {
            let (forward, back) = open.bytes;
            json!({
                "peer": open.facts.peer.id(),
                "remote": open.facts.remote,
                "protocol": open.facts.kind.as_str(),
                "age_seconds": seconds(now.saturating_sub(open.facts.since)),
                "about": open.about,
                "bytes_forward": forward,
                "bytes_back": back,
            })
        });
        let outbound = self.upstreams().flat_map(|upstream| upstream.show_connections(now));
        json!({ "inbound": self.connections.show(now), "outbound": listed(outbound), "streams": listed(streams) })
    }

    fn endpoints(&self) -> Value {
        let now = self.clock.now();
        json!({ "services": listed(self.upstreams().map(|upstream| upstream.show_endpoints(now))) })
    }

    fn upstreams(&self) -> impl Iterator<Item = Arc<Upstream>> {
        self.upstreams.iter().filter_map(Weak::upgrade)
    }
}

/// The first of them, and how many are not shown.
pub(crate) fn listed(mut all: impl Iterator<Item = Value>) -> Value {
    let shown: Vec<Value> = all.by_ref().take(MAX_LISTED).collect();
    json!({ "shown": shown, "left_out": all.count() })
}

/// A span of time for people.
pub(crate) fn seconds(span: Duration) -> f64 {
    span.as_millis() as f64 / 1000.0
}

/// A moment in time, RFC 3339; the Unix epoch for one that no calendar has.
pub(crate) fn moment(since_epoch: Duration) -> String {
    let at = std::time::UNIX_EPOCH.checked_add(since_epoch).unwrap_or(std::time::UNIX_EPOCH);
    humantime::format_rfc3339_seconds(at).to_string()
}

/// Whether the request names the host by loopback's address or name, and no other host beside it.
fn names_this_machine<B>(request: &Request<B>) -> bool {
    let hosts = request.headers().get_all(HOST).iter().map(|host| Authority::try_from(host.as_bytes()).ok());
    let mut named = hosts.chain(request.uri().authority().cloned().map(Some)).peekable();
    named.peek().is_some() && named.all(|named| named.is_some_and(|named| is_loopback(named.host())))
}

fn is_loopback(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let address = address.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    address || host.eq_ignore_ascii_case("localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn debug() -> Debug {
        let (_publisher, source) = IdentitySource::channel();
        let clock: SharedClock = identity::SystemClock::shared();
        Debug {
            source,
            live: Registry::new(clock.clone()),
            clock,
            connections: Arc::default(),
            upstreams: Vec::new(),
            policy: None,
            config: json!({}),
            tap: Arc::default(),
            scope: Scope::new(),
        }
    }

    fn status(remote: &str, target: &str, hosts: &[&str]) -> u16 {
        let mut request = Request::get(target);
        for host in hosts {
            request = request.header(HOST, *host);
        }
        debug().answer(remote.parse().unwrap(), &request.body(Body::empty()).unwrap()).status().as_u16()
    }

    #[test]
    fn only_this_machine_asks() {
        for remote in ["127.0.0.1:5", "127.8.8.8:5", "[::1]:5", "[::ffff:127.0.0.1]:5"] {
            assert_eq!(status(remote, "/debug/", &["127.0.0.1:9901"]), 200, "{remote}");
        }
        for remote in ["10.0.0.5:5", "192.168.1.7:5", "[fe80::1]:5", "[::ffff:10.0.0.5]:5"] {
            for page in ["/debug", "/debug/connections", "/debug/config", "/debug/nothing"] {
                assert_eq!(status(remote, page, &["127.0.0.1:9901"]), 403, "{remote} {page}");
            }
        }
    }

    #[test]
    fn a_name_that_was_rebound_to_this_machine_opens_nothing() {
        for host in ["localhost", "LocalHost:9901", "127.0.0.1", "[::1]:9901"] {
            assert_eq!(status("127.0.0.1:5", "/debug/connections", &[host]), 200, "{host}");
        }
        let foreign = [
            "evil.example",
            "evil.example:9901",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.5:9901",
            "evil.example@127.0.0.1x",
            "",
        ];
        for host in foreign {
            assert_eq!(status("127.0.0.1:5", "/debug/connections", &[host]), 403, "{host}");
        }
        assert_eq!(status("127.0.0.1:5", "/debug/", &[]), 403, "no host at all");
        assert_eq!(status("127.0.0.1:5", "/debug/", &["localhost", "evil.example"]), 403);
        assert_eq!(status("127.0.0.1:5", "http://evil.example/debug/", &["localhost"]), 403);
    }

    #[test]
    fn what_is_long_is_cut_and_says_so() {
        let long = listed((0..MAX_LISTED + 7).map(|number| json!(number)));
        assert_eq!(long["shown"].as_array().unwrap().len(), MAX_LISTED);
        assert_eq!(long["left_out"], 7);
    }
}
