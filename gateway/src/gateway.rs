//! The front door put together: what it owns, how it starts.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use identity::clock::SharedClock;
use identity::tls::{ALPN_H2, ALPN_HTTP11, ClientAuth};
use identity::{IdentitySource, Scope};
use policy::{InForce, Recorder};
use prometheus_client::registry::Registry;
use sidecar::Body;
use sidecar::callee::Callee;
use sidecar::otlp::Traces;
use sidecar::server::{Connection, Handler, Limits};
use sidecar::trace::{Share, Spans};
use sidecar::traffic::random::Dice;
use sidecar::traffic::ratelimit::Limiter;
use sidecar::upstream::{Upstream, UpstreamConfig, UpstreamError};
use thiserror::Error;
use url::{Host, Url};

use crate::coarse::Coarse;
use crate::config::{GatewayConfig, Route, Service};
use crate::https::HttpsClient;
use crate::issuer::{IssuerClient, Issuers};
use crate::seal::{SealError, Sealer};
use crate::session::Sessions;
use crate::store::{RedbStore, StoreError};
use crate::{SharedRandom, request};

/// The name under which policies know the gateway.
pub const SERVICE: &str = "gateway";
/// From passing a request on to the head of its answer.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a gateway does not start.
#[derive(Debug, Error)]
pub enum GatewayError {
    /// The listener cannot be used.
    #[error("the gateway's listener cannot be used: {0}")]
    Listen(#[source] io::Error),
    /// TLS cannot be configured.
    #[error("the gateway's TLS cannot be configured: {0}")]
    Tls(#[from] rustls::Error),
    /// The public URL is not one that browsers could use.
    #[error("the gateway's public URL must be https with a host and nothing behind it: {0}")]
    PublicUrl(Url),
    /// The session cookie's name does not protect it.
    #[error("the session cookie's name must begin with __Host-: {0}")]
    Cookie(String),
    /// No issuer, or one of them twice.
    #[error("the gateway needs at least one issuer, and none of them twice")]
    Issuers,
    /// A route's prefix is malformed or there twice.
    #[error("the route prefix {0:?} must begin with /, not end with one, and be there once")]
    Route(String),
    /// A service cannot be called.
    #[error("calls to {service} cannot be set up: {cause}")]
    Upstream {
        /// Which.
        service: String,
        /// Why.
        cause: UpstreamError,
    },
    /// A route leads to, or a service's traffic names, one that nothing is known of.
    #[error("{place} names the service {service:?}, which nothing is known of")]
    Unknown {
        /// What names it.
        place: String,
        /// Which.
        service: String,
    },
    /// The collector of traces cannot be reached by such an address.
    #[error("spans cannot be sent: {0}")]
    Traces(#[from] http::uri::InvalidUri),
    /// The session store cannot be used.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// No seal key.
    #[error("the gateway needs a key to seal sessions with")]
    Seal(#[from] SealError),
}

/// A running gateway. It ends with the scope that it was started in.
#[derive(Debug)]
pub struct Gateway {
    address: SocketAddr,
    issuers: Arc<Issuers>,
}

impl Gateway {
    /// Starts the front door: returns once it accepts. It needs neither its issuer nor its services to be
    /// up; requests that need one which is down are answered 503.
    ///
    /// Fails if the configuration cannot be used; nothing is left running then.
    pub async fn start(
        config: GatewayConfig,
        source: IdentitySource,
        policy: InForce,
        recorder: Arc<dyn Recorder>,
        clock: SharedClock,
        random: SharedRandom,
        scope: &Scope,
    ) -> Result<Self, GatewayError> {
        let (public_origin, public_authority) = origin(&config.public_url)?;
        if !config.cookie.starts_with("__Host-") {
            return Err(GatewayError::Cookie(config.cookie));
        }
        let routes = destinations(&config.routes, &config.services, &source, &clock, scope)?;
        let clients = config
            .issuers
            .iter()
            .map(|issuer| {
                let http = HttpsClient::new(issuer.trust.clone(), &clock)?;
                Ok(IssuerClient::new(issuer, http, Arc::clone(&clock), scope.clone()))
            })
            .collect::<Result<Vec<_>, rustls::Error>>()?;
        let issuers = Arc::new(Issuers::new(clients.clone()).ok_or(GatewayError::Issuers)?);
        let sessions = Sessions::new(
            Arc::new(RedbStore::open(&config.state)?),
            Sealer::new(&config.seal_keys)?,
            config.sessions,
            Arc::clone(&issuers),
            Arc::clone(&clock),
            Arc::clone(&random),
            scope.clone(),
        );
        let coarse = Coarse {
            policy,
            recorder: Arc::clone(&recorder),
            random: Arc::clone(&random),
            clock: Arc::clone(&clock),
        };
        let tls = identity::tls::server_config(&source, ClientAuth::None, &[ALPN_H2, ALPN_HTTP11], &clock)?;
        config.listen.set_nonblocking(true).map_err(GatewayError::Listen)?;
        let listener = tokio::net::TcpListener::from_std(config.listen).map_err(GatewayError::Listen)?;
        let address = listener.local_addr().map_err(GatewayError::Listen)?;
        let (front, telling) = (scope.part(), scope.part());
        sidecar::drain_in_order([front.clone(), telling.clone()], scope);
        let traced = config.traces.as_ref().map_or(Share::ALL, |traces| traces.sample);
        let traces = config.traces.as_ref().map(|traces| {
            let spans = Arc::new(Spans::new(Arc::clone(&random), traced));
            // Its counts go nowhere: the gateway has no port for metrics.
            Traces::start(traces, SERVICE, spans, Arc::clone(&clock), &mut Registry::default(), &telling)
        });
        let shared = Arc::new(Shared {
            traces: traces.transpose()?,
            strict_transport: matches!(config.public_url.host(), Some(Host::Domain(name)) if name != "localhost"),
            public_url: config.public_url,
            public_origin,
            public_authority,
            flow_cookie: format!("{}-login-", config.cookie),
            cookie: config.cookie,
            flow_sealer: Sealer::new(&config.seal_keys)?,
            issuers: Arc::clone(&issuers),
            sessions: Arc::clone(&sessions),
            routes,
            policy: coarse,
            requests: Limiter::new(config.requests, Arc::clone(&clock)),
            failures: Limiter::new(config.failed_authentications, Arc::clone(&clock)),
            recorder,
            source,
            clock: Arc::clone(&clock),
            random,
            scope: scope.clone(),
            traced,
        });
        for client in clients {
            scope.spawn_critical("issuer refresh", client.keep_fresh());
        }
        scope.spawn_critical("session sweep", sessions.sweep());
        sidecar::server::serve(
            "gateway",
            listener,
            Some(tls),
            Limits { proxies: config.proxies, ..Limits::default() },
            &front,
            clock,
            Arc::new(FrontDoor(shared)),
        );
        tracing::info!(%address, "the gateway listens");
        Ok(Self { address, issuers })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its issuers.
    pub fn issuers(&self) -> &Arc<Issuers> {
        &self.issuers
    }
}

struct FrontDoor(Arc<Shared>);

impl Handler for FrontDoor {
    async fn handle(self: Arc<Self>, connection: Arc<Connection>, request: Request<Body>) -> Response<Body> {
        request::handle(Arc::clone(&self.0), connection, request).await
    }
}

/// What every request needs.
pub(crate) struct Shared {
    pub public_url: Url,
    /// `https://host:port`, as browsers write it in `Origin`.
    pub public_origin: String,
    /// `host:port`, as clients write it in `Host`.
    pub public_authority: String,
    /// Whether browsers may be told to never come without TLS again. Not for `localhost` and addresses,
    /// which other programs of the same person share.
    pub strict_transport: bool,
    pub cookie: String,
    pub flow_cookie: String,
    pub flow_sealer: Sealer,
    pub issuers: Arc<Issuers>,
    pub sessions: Arc<Sessions>,
    /// Longest prefix first.
    pub routes: Vec<Destination>,
    pub policy: Coarse,
    pub requests: Limiter,
    pub failures: Limiter,
    pub recorder: Arc<dyn Recorder>,
    pub source: IdentitySource,
    pub clock: SharedClock,
    pub random: SharedRandom,
    pub scope: Scope,
    pub traced: Share,
    pub traces: Option<Traces>,
}

/// Where a route leads.
pub(crate) struct Destination {
    prefix: String,
    pub service: String,
    pub callee: Callee,
}

impl Destination {
    /// `/api` serves `/api` and `/api/x`, never `/apix`.
    fn serves(&self, path: &str) -> bool {
        if self.prefix == "/" {
            return true;
        }
        path.strip_prefix(self.prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl Shared {
    /// A URL of our own.
    pub(crate) fn url(&self, path: &str) -> Url {
        let mut url = self.public_url.clone();
        url.set_path(path);
        url
    }

    pub(crate) fn route(&self, path: &str) -> Option<&Destination> {
        self.routes.iter().find(|route| route.serves(path))
    }
}

fn origin(url: &Url) -> Result<(String, String), GatewayError> {
    let bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    let plain = url.username().is_empty() && url.password().is_none();
    if url.scheme() != "https" || !bare || !plain {
        return Err(GatewayError::PublicUrl(url.clone()));
    }
    let origin = url.origin().ascii_serialization();
    match origin.strip_prefix("https://") {
        Some(authority) => Ok((origin.clone(), authority.to_owned())),
        None => Err(GatewayError::PublicUrl(url.clone())),
    }
}

fn destinations(
    routes: &[Route],
    services: &[Service],
    source: &IdentitySource,
    clock: &SharedClock,
    scope: &Scope,
) -> Result<Vec<Destination>, GatewayError> {
    let dice = || Dice::from_system(&identity::random::system());
    let mut upstreams = BTreeMap::new();
    for Service { name, id, endpoints, traffic } in services {
        let config = UpstreamConfig {
            service: name.clone(),
            id: id.clone(),
            endpoints: endpoints.clone(),
            response_timeout: RESPONSE_TIMEOUT,
        };
        let upstream =
            Upstream::steered(config, traffic.clone(), dice(), source.clone(), Arc::clone(clock), scope)
                .map_err(|cause| GatewayError::Upstream { service: name.clone(), cause })?;
        upstreams.insert(name.clone(), upstream);
    }
    let mut destinations: Vec<Destination> = Vec::with_capacity(routes.len());
    for Route { prefix, service } in routes {
        let form =
            prefix == "/" || (prefix.starts_with('/') && !prefix.ends_with('/') && !prefix.contains("//"));
        if !form || destinations.iter().any(|other| other.prefix == *prefix) {
            return Err(GatewayError::Route(prefix.clone()));
        }
        let known = services.iter().find(|known| known.name == *service).zip(upstreams.get(service));
        let (described, upstream) = known.ok_or_else(|| GatewayError::Unknown {
            place: format!("the route {prefix}"),
            service: service.clone(),
        })?;
        let callee = Callee::new(Arc::clone(upstream), &described.traffic, &upstreams, dice());
        let callee = callee.map_err(|other| GatewayError::Unknown {
            place: format!("the traffic of {service}"),
            service: other,
        })?;
        destinations.push(Destination { prefix: prefix.clone(), service: service.clone(), callee });
    }
    destinations.sort_by_key(|route| std::cmp::Reverse(route.prefix.len()));
    Ok(destinations)
}
