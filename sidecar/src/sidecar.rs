//! One sidecar put together: its listeners, and what they share.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use identity::clock::SharedClock;
use identity::tls::{self, ALPN_H2, ALPN_HTTP11, ClientAuth};
use identity::txn::Verifier;
use identity::{IdentitySource, Scope, SpiffeId};
use policy::{Receipts, Recorder, ServicePolicy};
use thiserror::Error;
use tokio::sync::watch;

use crate::access::AccessLog;
use crate::admin::Admin;
use crate::app::{App, AppProtocol};
use crate::app_health::AppHealth;
use crate::callee::Callee;
use crate::capture::serve::Way;
use crate::capture::{self, CaptureConfig, CapturedCalls, Destinations};
use crate::correlate::Correlator;
use crate::debug::connections::Connections;
use crate::debug::{Debug, config as shown};
use crate::ext_authz::{self, ExtAuthzConfig, Shared};
use crate::hbone::Hbone;
use crate::inbound::Inbound;
use crate::live::Registry;
use crate::metrics::Metrics;
use crate::mux;
use crate::otlp::{Traces, TracesConfig};
use crate::outbound::Outbound;
use crate::overload::{self, Budget, Overload, ProcReadings};
use crate::proxy_protocol::Networks;
use crate::relations::Relations;
use crate::sample::Sampler;
use crate::server::{self, Door, Limits, TunnelledRequests};
use crate::streams::Streams;
use crate::tcp::inbound::TcpInboundConfig;
use crate::tcp::{ALPN_TCP, Ports, TcpInbound, TcpOutbound, TcpUpstream};
use crate::trace::{Share, SharedRandom, Spans};
use crate::traffic::config::{HealthCheck, RateLimit, Traffic};
use crate::traffic::random::Dice;
use crate::traffic::ratelimit::LocalLimit;
use crate::upstream::{Upstream, UpstreamConfig, UpstreamError};
use crate::watchers::Watchers;

/// What one sidecar is told. Listeners come bound, so that a taken port is found before anything starts.
#[derive(Debug)]
pub struct SidecarConfig {
    /// The identity it must get from the agent.
    pub id: SpiffeId,
    /// The door to the app; a sidecar of a program that only calls others has none.
    pub inbound: Option<InboundConfig>,
    /// The same decisions for Envoys. Where there is an inbound half too, it is of the same service, and
    /// its policy and its memory of tokens serve both.
    pub ext_authz: Option<ExtAuthzConfig>,
    /// One loopback listener a called service.
    pub calls: Vec<Call>,
    /// Services that get calls only because another's traffic names them.
    pub others: Vec<(UpstreamConfig, Traffic)>,
    /// Connections that the kernel brings although they were meant for others.
    pub capture: CaptureConfig,
    /// `/ready`, `/live`, `/metrics`.
    pub admin: Option<TcpListener>,
    /// Where each request gets a line, if anywhere.
    pub access_log: Option<Arc<AccessLog>>,
    /// Where recorded requests leave a span, if anywhere.
    pub traces: Option<TracesConfig>,
    /// What it may use; past it, requests are refused and connections wait.
    pub budget: Budget,
}

/// Concurrent streams of an HTTP/2 connection of the app beside us, which is no stranger: more than [`Limits`] gives
/// those, since clients of gRPC let calls wait where a connection takes no more. Each whose answer is not taken holds up to
/// 90 KB, and all of a connection stay below 16 MB.
const MAX_STREAMS_OF_THE_APP: u32 = 150;

/// The app, and who may come to it.
#[derive(Debug)]
pub struct InboundConfig {
    /// The service's name, as policies know it.
    pub service: String,
    /// The mTLS listener that other sidecars reach.
    pub listener: TcpListener,
    /// Where the app listens on loopback.
    pub app: SocketAddr,
    /// What the app speaks.
    pub app_protocol: AppProtocol,
    /// What may be done.
    pub policy: Arc<ServicePolicy>,
    /// Where transaction tokens may begin.
    pub gateways: Vec<SpiffeId>,
    /// From handing a request to the app to the head of its answer.
    pub request_timeout: Duration,
    /// The proxies in front of it, which say where connections come from.
    pub proxies: Networks,
    /// The second way in, for another mesh's proxies.
    pub hbone: Option<HboneConfig>,
    /// How many requests are let through; `None`: all.
    pub rate_limit: Option<RateLimit>,
    /// How the app is asked whether it is well; `None`: not at all.
    pub health: Option<HealthCheck>,
}

/// HTTP/2 CONNECT over mTLS, as Istio's ambient ztunnel speaks it.
#[derive(Debug)]
pub struct HboneConfig {
    /// Where it comes in; port 15008 by custom.
    pub listener: TcpListener,
    /// The app's addresses as the other mesh knows them: what a CONNECT may name.
    pub destinations: Vec<SocketAddr>,
}

/// A service that the app may call through its sidecar.
#[derive(Debug)]
pub struct Call {
    /// Where the app calls.
    pub listener: TcpListener,
    /// Who is called.
    pub upstream: UpstreamConfig,
    /// What the calls are.
    pub carries: Carries,
    /// How they go.
    pub traffic: Traffic,
}

/// What goes through an outbound listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Carries {
    /// Requests, HTTP/1.1 or HTTP/2.
    #[default]
    Requests,
    /// Connections in a protocol that the sidecar does not read. The service's map must say `mapping = "tcp"`.
    Connections,
}

/// Why a sidecar did not start.
#[derive(Debug, Error)]
pub enum SidecarError {
    /// A service's traffic names another that nobody has described.
    #[error("the traffic of {service} names {other}, which nothing is known of")]
    Traffic {
        /// Whose traffic.
        service: String,
        /// Whom it names.
        other: String,
    },
    /// A listener could not be used.
    #[error("a listener cannot be used: {0}")]
    Listener(#[from] io::Error),
    /// TLS could not be configured.
    #[error("TLS cannot be configured: {0}")]
    Tls(#[from] rustls::Error),
    /// An outbound pool could not be made.
    #[error("the calls to {service} cannot be set up: {source}")]
    Upstream {
        /// The service called.
        service: String,
        /// Why.
        source: UpstreamError,
    },
    /// Captured connections have nowhere to go.
    #[error("captured connections cannot be served: {0}")]
    Capture(String),
    /// The app's address is unusable.
    #[error("the app's address is unusable: {0}")]
    App(#[from] http::uri::InvalidUri),
}

/// A running sidecar.
#[derive(Debug)]
pub struct Sidecar {
    /// What is decided by, if anything is.
    policy: Option<Arc<ArcSwap<ServicePolicy>>>,
    /// What is known of the service's objects by API.
    relations: Arc<Relations>,
    /// What is open, to be judged again by another policy.
    live: Arc<Registry>,
    app_health: Option<Arc<AppHealth>>,
    metrics: Arc<Metrics>,
    scope: Scope,
}

impl Sidecar {
    /// Starts all listeners as tasks of `scope`; they end when it drains.
    pub fn start(
        config: SidecarConfig,
        source: IdentitySource,
        recorder: Arc<dyn Recorder>,
        clock: SharedClock,
        random: SharedRandom,
        scope: &Scope,
    ) -> Result<Self, SidecarError> {
        let (correlator, connections) = (Arc::new(Correlator::default()), Arc::new(Connections::default()));
        let in_force = shown::of(&config);
        let mut metrics = Metrics::default();
        let overload = Arc::new(Overload::default());
        overload.register(metrics.registry_mut());
        if let Some(log) = &config.access_log {
            log.register(metrics.registry_mut());
        }
        let (front, calls, telling) = (scope.part(), scope.part(), scope.part());
        // The outbound half only after the inbound half's last request: until then the app may have to call on, over
        // new connections too, to answer it. What is told of both goes out last.
        drain_in_order([front.clone(), calls.clone(), telling.clone()], scope);
        let recorded = config.traces.as_ref().map_or(Share::ALL, |traces| traces.sample);
        let spans = Arc::new(Spans::new(Arc::clone(&random), recorded));
        let traces = config.traces.as_ref().map(|traces| {
            let (name, spans) = (name_of(&config), Arc::clone(&spans));
            Traces::start(traces, name, spans, clock.clone(), metrics.registry_mut(), &telling)
        });
        let watchers = Watchers {
            access_log: config.access_log.clone(),
            tap: Arc::default(),
            traces: traces.transpose()?,
        };
        let watchers = Arc::new(watchers);
        watchers.tap.register(metrics.registry_mut());
        let app_health = match &config.inbound {
            Some(InboundConfig { app, app_protocol, health: Some(check), .. }) => {
                let (registry, dice) = (metrics.registry_mut(), Dice::from_system(&random));
                let (check, clock) = (check.clone(), clock.clone());
                Some(AppHealth::watch(*app, *app_protocol, check, registry, clock, dice, scope)?)
            }
            _ => None,
        };
        let relations = Arc::new(Relations::new(clock.clone()));
        metrics.show_relations(Arc::clone(&relations));
        let metrics = Arc::new(metrics);
        overload::watch(Arc::clone(&overload), config.budget, ProcReadings, clock.clone(), scope);
        let most = config.budget.connections(Limits::default().max_connections);
        let live = Registry::new(clock.clone());
        let limits = Limits {
            max_connections: most,
            overload: Some(overload),
            live: Some(Arc::clone(&live)),
            ..Limits::default()
        };
        let receipts = Arc::new(Receipts::new(Arc::clone(&random)));
        let begun = match (&config.inbound, &config.ext_authz) {
            (Some(inbound), _) => Some((&inbound.policy, &inbound.gateways)),
            (None, Some(ext_authz)) => Some((&ext_authz.policy, &ext_authz.gateways)),
            (None, None) => None,
        };
        relations.want(begun.is_some_and(|(policy, _)| policy.relations_max_age().is_some()));
        let shared = begun.map(|(policy, gateways)| Shared {
            policy: Arc::new(ArcSwap::from(Arc::clone(policy))),
            verifier: Arc::new(Verifier::new(gateways.clone())),
            source: source.clone(),
            recorder: Arc::clone(&recorder),
            metrics: Arc::clone(&metrics),
            clock: clock.clone(),
            receipts: Arc::clone(&receipts),
            spans: Arc::clone(&spans),
            relations: Arc::clone(&relations),
        });
        let policy = shared.as_ref().map(|shared| Arc::clone(&shared.policy));
        if let (Some(asked), Some(shared)) = (config.ext_authz, &shared) {
            let (id, watchers) = (config.id.clone(), Arc::clone(&watchers));
            ext_authz::start(asked, id, shared.clone(), watchers, &limits, &front)?;
        }
        if let (Some(config_in), Some(Shared { policy, verifier, .. })) = (config.inbound, &shared) {
            let InboundConfig {
                service,
                listener,
                app,
                app_protocol,
                request_timeout,
                proxies,
                hbone,
                rate_limit,
                ..
            } = config_in;
            let tcp = TcpInbound::new(TcpInboundConfig {
                service: service.clone(),
                id: config.id.clone(),
                ports: Ports::one(app),
                policy: Arc::clone(policy),
                registry: Arc::clone(&live),
                source: source.clone(),
                recorder: Arc::clone(&recorder),
                stats: metrics.tcp().clone(),
                clock: clock.clone(),
                random: Arc::clone(&random),
                access_log: config.access_log.is_some(),
            });
            let streams = Streams {
                policy: Arc::clone(policy),
                registry: Arc::clone(&live),
                receipts: Arc::clone(&receipts),
                recorder: Arc::clone(&recorder),
                metrics: Arc::clone(&metrics),
                relations: Arc::clone(&relations),
                clock: clock.clone(),
            };
            let inbound = Inbound {
                tcp: Arc::clone(&tcp),
                streams: Arc::new(streams),
                relations: Arc::clone(&relations),
                service,
                id: config.id.clone(),
                policy: Arc::clone(policy),
                verifier: Arc::clone(verifier),
                app: App::new(app, app_protocol, request_timeout, clock.clone(), scope)?,
                correlator: Arc::clone(&correlator),
                source: source.clone(),
                recorder,
                sampler: Sampler::default(),
                metrics: Arc::clone(&metrics),
                clock: clock.clone(),
                receipts: Arc::clone(&receipts),
                spans: Arc::clone(&spans),
                watchers: Arc::clone(&watchers),
                connections: Arc::clone(&connections),
                limit: rate_limit.map(|limit| LocalLimit::new(&limit, clock.clone())),
            };
            let alpn = [mux::ALPN, ALPN_TCP, ALPN_H2, ALPN_HTTP11];
            let tls = tls::server_config(&source, ClientAuth::Required, &alpn, &clock)?;
            let (listener, limits) = (tokio_listener(listener)?, Limits { proxies, ..limits.clone() });
            let inbound = Arc::new(inbound);
            if let Some(captured) = config.capture.inbound {
                let tls = Some(Arc::clone(&tls));
                // What is captured comes from where it seems to.
                let limits = Limits { proxies: Networks::default(), ..limits.clone() };
                let door = Door::new(tls, limits.clone(), &front, clock.clone(), Arc::clone(&inbound));
                let accepting = limits.accepting(&clock, &front);
                capture::serve::serve_inbound(captured, app.port(), door, Arc::clone(&metrics), accepting);
            }
            if let Some(HboneConfig { listener, destinations }) = hbone {
                let requests = Arc::clone(&inbound);
                let requests = TunnelledRequests::new(requests, limits.clone(), &front, clock.clone());
                let named = |address: SocketAddr| (address, Ports::MAIN.to_owned());
                let destinations = destinations.into_iter().map(named).collect();
                let hbone = Hbone::new(destinations, tcp, requests, &source, clock.clone())?;
                hbone.serve(tokio_listener(listener)?, &limits, &front);
            }
            server::serve("inbound", listener, Some(tls), limits, &front, clock.clone(), inbound);
        } else if config.capture.inbound.is_some() {
            return Err(SidecarError::Capture("there is no app here for what others dial".to_owned()));
        }

        let (mut ways, mut known) = (HashMap::new(), BTreeMap::new());
        let mut client = |config: UpstreamConfig, traffic: Traffic| {
            let (service, dice) = (config.service.clone(), Dice::from_system(&random));
            match Upstream::steered(config, traffic, dice, source.clone(), clock.clone(), &calls) {
                Ok(upstream) => {
                    known.insert(service, Arc::clone(&upstream));
                    Ok(upstream)
                }
                Err(source) => Err(SidecarError::Upstream { service, source }),
            }
        };
        let mut doors = Vec::new();
        for Call { listener, upstream, carries, traffic } in config.calls {
            if carries == Carries::Requests {
                doors.push((listener, client(upstream, traffic.clone())?, traffic));
                continue;
            }
            let UpstreamConfig { service, id, endpoints, .. } = upstream;
            let upstream =
                TcpUpstream { service: service.clone(), id, port: String::new(), endpoints, traffic };
            let (source, stats) = (source.clone(), metrics.tcp().clone());
            let dice = Dice::from_system(&random);
            let plain =
                TcpOutbound::new(upstream, source, stats, clock.clone(), dice, config.access_log.is_some())?;
            plain.serve(tokio_listener(listener)?, &limits, &calls);
            ways.insert(service, Way::Connections(plain));
        }
        for (upstream, traffic) in config.others {
            client(upstream, traffic)?;
        }
        for (listener, upstream, traffic) in doors {
            let service = upstream.service().to_owned();
            let callee = Callee::new(upstream, &traffic, &known, Dice::from_system(&random))
                .map_err(|other| SidecarError::Traffic { service: service.clone(), other })?;
            let outbound = Arc::new(Outbound {
                callee,
                scope: calls.clone(),
                correlator: Arc::clone(&correlator),
                source: source.clone(),
                metrics: Arc::clone(&metrics),
                clock: clock.clone(),
                spans: Arc::clone(&spans),
                watchers: Arc::clone(&watchers),
            });
            let limits = Limits { max_streams: MAX_STREAMS_OF_THE_APP, ..limits.clone() };
            let listener = tokio_listener(listener)?;
            let door = Door::new(None, limits.clone(), &calls, clock.clone(), Arc::clone(&outbound));
            ways.insert(service, Way::Requests(door));
            server::serve("outbound", listener, None, limits, &calls, clock.clone(), outbound);
        }
        let upstreams = known.values().map(Arc::downgrade).collect();
        if let Some(CapturedCalls { listener, services, egress, names }) = config.capture.outbound {
            let mut known = HashMap::new();
            for (address, service) in services {
                let way = ways.get(&service).ok_or_else(|| {
                    SidecarError::Capture(format!("{address} is {service}, which the app does not call"))
                })?;
                if known.insert(address, way.clone()).is_some() {
                    return Err(SidecarError::Capture(format!("{address} is the address of two services")));
                }
            }
            let own = listener
                .listeners()
                .map(tokio::net::TcpListener::local_addr)
                .collect::<io::Result<Vec<_>>>()?;
            let destinations = Destinations::new(known, own, egress);
            let accepting = limits.accepting(&clock, &calls);
            capture::serve::serve_outbound(listener, destinations, names, Arc::clone(&metrics), accepting);
        }

        if let Some(policy) = &policy {
            watch_relations(&relations, Arc::clone(policy), Arc::clone(&live), scope);
        }
        watch_rotations(source.clone(), Arc::clone(&metrics), scope);
        watch_trust(source.clone(), Arc::clone(&live), clock.clone(), scope);
        if let Some(listener) = config.admin {
            let debug = Debug {
                source: source.clone(),
                clock: clock.clone(),
                connections,
                live: Arc::clone(&live),
                upstreams,
                policy: policy.clone(),
                config: in_force,
                tap: Arc::clone(&watchers.tap),
                scope: scope.clone(),
            };
            let (id, draining) = (config.id, scope.clone());
            let app_health = app_health.clone();
            let admin = Admin {
                id,
                source,
                app_health,
                metrics: Arc::clone(&metrics),
                clock: clock.clone(),
                scope: draining,
                debug,
            };
            let listener = tokio_listener(listener)?;
            server::serve("admin", listener, None, Limits::default(), scope, clock, Arc::new(admin));
        }
        Ok(Self { policy, relations, live, app_health, metrics, scope: scope.clone() })
    }

    /// Whether the app is well, now and at every change; always, if it is not asked.
    pub fn app_is_well(&self) -> watch::Receiver<bool> {
        self.app_health.as_ref().map_or_else(|| watch::channel(true).1, |health| health.follow())
    }

    /// The relations that it decides by, for whoever keeps them up to date.
    pub fn relations(&self) -> Arc<Relations> {
        Arc::clone(&self.relations)
    }

    /// Says to whoever watches the metrics whether the policy in force may be old, since control is not heard.
    pub fn policy_is_stale(&self, stale: bool) {
        self.metrics.stale_policies(stale);
    }

    /// Puts another policy in force. A request that is under way is judged by the one it began with, a plain
    /// connection again by this one.
    /// A sidecar that decides nothing drops it.
    pub fn replace_policy(&self, policy: Arc<ServicePolicy>) {
        if let Some(in_force) = &self.policy {
            self.relations.want(policy.relations_max_age().is_some());
            in_force.store(Arc::clone(&policy));
            let live = Arc::clone(&self.live);
            self.scope.spawn("policy change", async move { live.reevaluate_all(&policy).await });
        }
    }
}

/// The service's name, as traces have it; one that only calls others is known by the end of its SPIFFE ID.
fn name_of(config: &SidecarConfig) -> &str {
    let inbound = config.inbound.as_ref().map(|inbound| inbound.service.as_str());
    let service = inbound.or(config.ext_authz.as_ref().map(|asked| asked.service.as_str()));
    service.unwrap_or_else(|| config.id.as_str().rsplit('/').next().unwrap_or_default())
}

/// Drains these parts of `scope` when it drains, each once all tasks of the one before have ended. The end of a critical
/// task in any drains the whole: the process is not whole any more. Whoever joins `scope` bounds them all.
pub fn drain_in_order<const PARTS: usize>(parts: [Scope; PARTS], scope: &Scope) {
    let whole = scope.clone();
    scope.spawn_critical("drain", async move {
        let any = futures::future::select_all(parts.iter().map(|part| Box::pin(part.draining())));
        tokio::select! {
            () = whole.draining() => {}
            _ = any => whole.drain(),
        }
        for part in parts {
            part.drain();
            if let Err(reason) = part.finished(Duration::MAX).await {
                tracing::debug!(reason, "drained after a failure");
            }
        }
    });
}

fn tokio_listener(listener: TcpListener) -> io::Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

/// Has what is open judged again when what it was decided by has changed.
fn watch_relations(
    relations: &Relations,
    policy: Arc<ArcSwap<ServicePolicy>>,
    live: Arc<Registry>,
    scope: &Scope,
) {
    let (draining, mut changes) = (scope.clone(), relations.changes());
    scope.spawn_critical("relations change", async move {
        loop {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() {
                    draining.draining().await;
                    return;
                },
                () = draining.draining() => return,
            }
            let policy = policy.load_full();
            live.reevaluate_related(&policy).await;
        }
    });
}

fn watch_rotations(mut source: IdentitySource, metrics: Arc<Metrics>, scope: &Scope) {
    let draining = scope.clone();
    scope.spawn_critical("rotation metrics", async move {
        loop {
            if let Some(identity) = source.current() {
                metrics.rotated(identity.svid.not_after());
            }
            tokio::select! {
                live = source.changed() => if !live {
                    draining.draining().await;
                    return;
                },
                () = draining.draining() => return,
            }
        }
    });
}

/// Ends the connections of peers that new bundles do not vouch for: an authority or a trust domain that is gone takes
/// with it what it had let in.
fn watch_trust(mut source: IdentitySource, live: Arc<Registry>, clock: SharedClock, scope: &Scope) {
    let draining = scope.clone();
    let bundles = |source: &IdentitySource| source.current().map(|identity| Arc::clone(&identity.bundles));
    let mut before = bundles(&source);
    scope.spawn_critical("trust", async move {
        loop {
            let after = bundles(&source);
            if let Some(after) = after.filter(|after| before.as_ref() != Some(after))
                && before.replace(Arc::clone(&after)).is_some()
            {
                let now = clock.unix_time();
                live.revoke(|peer| !peer.is_trusted(&after, now)).await;
            }
            tokio::select! {
                more = source.changed() => if !more {
                    draining.draining().await;
                    return;
                },
                () = draining.draining() => return,
            }
        }
    });
}
