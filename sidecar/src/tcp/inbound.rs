//! The server's side of plain connections: one TLS connection, one session after the other.
//!
//! [`TcpInbound::serve`] is the story: who is it, where to, may they, dial the app, copy. Nothing reaches the app
//! but through [`TcpInbound::dial`], which takes a [`Permit`].

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use identity::clock::SharedClock;
use identity::{IdentitySource, Peer, Scope, SpiffeId};
use policy::{
    Caller, DecisionRecord, Denial, Layer, Mapping, Occasion, Permit, Principal, Receipt, Recorder, Refusal,
    ServicePolicy, Verdict,
};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Semaphore;

use super::copy::{CopyError, Side, both_ways};
use super::frame::{self, OpenFrame, Session, SessionError, Status};
use super::stats::{SessionEnd, TcpStats};
use super::stream::Stream;
use crate::dial;
use crate::kafka::{Ends, KafkaError, KafkaInbound};
use crate::live::{Closed, Facts, Judge, Kind, Live, Registry};
use crate::metrics::Direction;
use crate::sample::Sampler;
use crate::server::RefusedConnection;
use crate::trace::SharedRandom;

/// How long a connection may wait for its next session: longer than the client's side keeps one
/// ([`super::pool::MAX_IDLE`]), so that it is the client's side that lets go.
const WAIT_FOR_SESSION: Duration = Duration::from_secs(90);
/// The same where too many wait already: they still serve whoever uses them at once.
const SHORT_WAIT_FOR_SESSION: Duration = Duration::from_secs(5);
/// Connections that may wait long. Each takes a place among the listener's connections
/// (`server::Limits::max_connections`, 10,000) without doing anything.
const MAX_WAITING: usize = 2_000;
/// The app is on this machine: if it does not accept within this, it is down.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// After a refusal, what the client had sent already is read and dropped for so long, so that the answer is not
/// overtaken by a reset.
const LINGER: Duration = Duration::from_secs(1);
/// See [`LINGER`].
const MAX_LINGER_BYTES: u64 = 1024 * 1024;

/// The app's ports by the names that policies call them.
#[derive(Debug, Clone)]
pub struct Ports(Vec<(String, SocketAddr)>);

impl Ports {
    /// The name of the port of a service that has only one.
    pub const MAIN: &'static str = "main";

    /// One port, called [`Ports::MAIN`].
    pub fn one(address: SocketAddr) -> Self {
        Self(vec![(Self::MAIN.to_owned(), address)])
    }

    /// Several, each with its own name of `[a-z0-9._-]`, at most 63 bytes. `None` if there are none, or a name is
    /// malformed or there twice.
    pub fn named(ports: Vec<(String, SocketAddr)>) -> Option<Self> {
        let good = |name: &str| {
            !name.is_empty()
                && name.len() <= frame::MAX_PORT_NAME_BYTES
                && name.bytes().all(frame::is_name_byte)
        };
        let unique = |name: &str| ports.iter().filter(|(other, _)| other == name).count() == 1;
        (!ports.is_empty() && ports.iter().all(|(name, _)| good(name) && unique(name))).then_some(Self(ports))
    }

    /// The port of that name; the only one, if the name is empty.
    fn find(&self, name: &str) -> Option<&(String, SocketAddr)> {
        match (name, self.0.as_slice()) {
            ("", [only]) => Some(only),
            _ => self.0.iter().find(|(own, _)| own == name),
        }
    }
}

/// Everything that plain connections to one app need.
pub struct TcpInboundConfig {
    /// The service's name in mesh.toml.
    pub service: String,
    /// The identity that it must have itself.
    pub id: SpiffeId,
    /// Where the app listens.
    pub ports: Ports,
    /// In force.
    pub policy: Arc<ArcSwap<ServicePolicy>>,
    /// What is open, so that it can be judged again.
    pub registry: Arc<Registry>,
    /// Our own identity.
    pub source: IdentitySource,
    /// Where decisions go.
    pub recorder: Arc<dyn Recorder>,
    /// Counters.
    pub stats: TcpStats,
    /// Time.
    pub clock: SharedClock,
    /// For receipts.
    pub random: SharedRandom,
    /// Whether each session gets a line in the log.
    pub access_log: bool,
}

/// Plain connections to one app.
pub struct TcpInbound {
    config: TcpInboundConfig,
    waiting: Semaphore,
    sampler: Sampler,
    kafka: KafkaInbound,
}

/// A session that is permitted and has reached the app.
pub(crate) struct Connected {
    pub(crate) app: Stream,
    live: Live,
    port: String,
    rule: String,
    receipt: Receipt,
    /// Whose requests are to be judged, by which leave it is connected.
    kafka: Option<(Caller, Permit)>,
}

/// Why a session did not reach the app.
pub(crate) enum Stop {
    Denied(Box<Denial>),
    AppDown(io::Error),
    NotReady,
}

impl Stop {
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Denied(_) => Status::Denied,
            Self::AppDown(_) => Status::AppDown,
            Self::NotReady => Status::NotReady,
        }
    }

    /// What the peer may ask its operator about.
    pub(crate) fn receipt(&self) -> &str {
        match self {
            Self::Denied(denial) => denial.receipt().as_str(),
            _ => "",
        }
    }
}

/// Where a session comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) kind: Kind,
    pub(crate) peer: &'a Peer,
    pub(crate) remote: SocketAddr,
    /// What the peer says of its own client.
    pub(crate) source: Option<SocketAddr>,
}

impl TcpInbound {
    /// Plain connections to the app of `config`.
    pub fn new(config: TcpInboundConfig) -> Arc<Self> {
        let kafka = KafkaInbound::new(
            Arc::clone(&config.policy),
            Arc::clone(&config.recorder),
            config.stats.kafka().clone(),
            config.clock.clone(),
            Arc::clone(&config.random),
            config.access_log,
        );
        Arc::new(Self { config, waiting: Semaphore::new(MAX_WAITING), sampler: Sampler::default(), kafka })
    }

    /// Serves the sessions of one connection, whose handshake has proved `peer`, until it ends, its peer's
    /// certificate does, or `scope` drains between two sessions.
    pub async fn serve<T: Side>(&self, mut tls: T, peer: Peer, remote: SocketAddr, scope: &Scope) {
        let mut origin = Origin { kind: Kind::Tcp, peer: &peer, remote, source: None };
        loop {
            match self.next_session(&mut tls, origin, scope).await {
                Ok(Some(open)) => {
                    origin.source = open.source;
                    match self.session(tls, &open.port, origin).await {
                        Some(ready) => tls = ready,
                        None => return,
                    }
                }
                Ok(None) => return self.close(&mut tls).await,
                Err(error) => {
                    tracing::debug!(peer = %peer.id(), %remote, %error, "connection ended between sessions");
                    if SessionError::of(&error).is_some() {
                        self.turn_away(&mut tls, Status::Malformed, "").await;
                    }
                    return;
                }
            }
        }
    }

    /// One session. The connection, if it is ready for another.
    async fn session<T: Side>(&self, mut tls: T, port: &str, origin: Origin<'_>) -> Option<T> {
        let started = self.config.clock.now();
        match self.connect(port, origin).await {
            Ok(mut connected) => {
                let mut session = Session::accepted(tls);
                let end = self.carry(&mut session, &mut connected, origin, started).await;
                if end == SessionEnd::Finished { session.into_finished() } else { None }
            }
            Err(stop) => {
                self.stopped(&stop, port, origin, started);
                self.turn_away(&mut tls, stop.status(), stop.receipt()).await;
                None
            }
        }
    }

    /// Waits for the client to open a session. `None` if the connection is to be closed in order.
    async fn next_session<T: Side>(
        &self,
        tls: &mut T,
        origin: Origin<'_>,
        scope: &Scope,
    ) -> io::Result<Option<OpenFrame>> {
        let live = self.config.registry.register(self.facts(origin), Arc::new(Waiting));
        let place = self.waiting.try_acquire();
        let wait = if place.is_ok() { WAIT_FOR_SESSION } else { SHORT_WAIT_FOR_SESSION };
        tokio::select! {
            some = tls.fill_buf() => if some?.is_empty() { return Ok(None) },
            () = self.config.clock.sleep(wait) => return Ok(None),
            _closed = live.closed() => return Ok(None),
            () = scope.draining() => return Ok(None),
        }
        tokio::select! {
            open = frame::next_open(tls) => open,
            () = self.config.clock.sleep(SHORT_WAIT_FOR_SESSION) => Ok(None),
        }
    }

    /// What the service's map says in the policy in force.
    pub(crate) fn mapping(&self) -> Mapping {
        self.config.policy.load().mapping()
    }

    /// The refusal of a tunnel to somewhere else than the app.
    pub(crate) fn not_ours(&self, authority: &str, origin: Origin<'_>) -> Stop {
        let asking = self.asking(authority, origin);
        let Some(occasion) = asking.occasion() else { return Stop::NotReady };
        let refusal =
            Refusal::denied("hbone.not_our_app", "the tunnel leads to no address of this service's app");
        Stop::Denied(Box::new(self.config.policy.load().refuse(Some(&asking.caller), refusal, &occasion)))
    }

    /// Records a connection that was refused before it could ask for anything.
    pub(crate) fn refused(&self, remote: SocketAddr, refused: &RefusedConnection) {
        let config = &self.config;
        let Ok(receipt) = Receipt::generate(&*config.random) else { return };
        let occasion = Occasion {
            receipt,
            now: config.clock.now(),
            layer: Layer::Sidecar,
            method: "",
            target: "",
            transaction: None,
            trace_id: None,
        };
        let (rule, reason) = (refused.rule(), refused.reason());
        tracing::info!(%remote, rule, reason, receipt = %occasion.receipt, "connection refused");
        let denial = policy::refuse_connection(&config.service, rule, reason, Some(remote), &occasion);
        config.recorder.record(denial.record().clone());
    }

    /// Who wants to go where, may they, is the app there?
    pub(crate) async fn connect(&self, port: &str, origin: Origin<'_>) -> Result<Connected, Stop> {
        let config = &self.config;
        // An agent that gave us somebody else's identity is misconfigured: serve nothing in that name.
        let identity = config.source.valid_at(config.clock.now());
        identity.filter(|identity| *identity.svid.id() == config.id).ok_or(Stop::NotReady)?;

        let known = config.ports.find(port);
        let asking = Arc::new(self.asking(known.map_or(port, |(name, _)| name), origin));
        let occasion = asking.occasion().ok_or(Stop::NotReady)?;
        let Some((name, address)) = known else {
            let refusal = Refusal::denied("tcp.unknown_port", "the service has no port of that name");
            let denial = config.policy.load().refuse(Some(&asking.caller), refusal, &occasion);
            return Err(Stop::Denied(Box::new(denial)));
        };

        // Registered first, then judged: a policy that comes in between finds it.
        let live = config.registry.register(self.facts(origin), Arc::clone(&asking) as Arc<dyn Judge>);
        let policy = config.policy.load_full();
        let permit = asking.decide(&policy, &occasion).map_err(|denial| Stop::Denied(Box::new(denial)))?;
        if permit.is_audited() || self.sampler.take(config.clock.now()) {
            config.recorder.record(asking.record(&permit, &occasion));
        }
        let app = self.dial(&permit, *address).await.map_err(Stop::AppDown)?;
        Ok(Connected {
            app,
            live,
            port: name.clone(),
            rule: permit.rule().to_string(),
            receipt: *permit.receipt(),
            kafka: asking.kafka.then(|| (asking.caller.clone(), permit)),
        })
    }

    /// Connects a permitted session to the app.
    async fn dial(&self, _permit: &Permit, address: SocketAddr) -> io::Result<Stream> {
        tokio::select! {
            stream = dial::connect(address) => stream.map(Stream::new),
            () = self.config.clock.sleep(DIAL_TIMEOUT) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Copies until both ways end, or until the connection must.
    pub(crate) async fn carry<T: Side>(
        &self,
        mesh: &mut T,
        connected: &mut Connected,
        origin: Origin<'_>,
        started: Duration,
    ) -> SessionEnd {
        let config = &self.config;
        let _active = config.stats.session();
        let Connected { app, live, port, rule, receipt, kafka } = connected;
        let carried = async {
            match kafka {
                Some((caller, permit)) => {
                    let ends = Ends { client: &mut *mesh, broker: &mut *app };
                    self.kafka.serve(ends, caller.clone(), permit, live.traffic()).await.map_err(Cut::Kafka)
                }
                None => both_ways(mesh, app, &config.clock, live.traffic()).await.map_err(Cut::Copy),
            }
        };
        let outcome = tokio::select! {
            outcome = carried => Ok(outcome),
            closed = live.closed() => Err(closed),
        };
        if !matches!(outcome, Ok(Ok(()))) {
            // A stream that was cut short must not pass for a whole one.
            mesh.abort();
            app.abort();
        }
        let (end, note) = match &outcome {
            Ok(Ok(())) => (SessionEnd::Finished, None),
            Ok(Err(cut)) => (cut.end(), Some(cut.to_string())),
            Err(Closed::Denied(denial)) => {
                config.recorder.record(denial.record().clone());
                let note = format!("closed by {}, receipt {}", denial.rule(), denial.receipt());
                (SessionEnd::Denied, Some(note))
            }
            Err(closed) => (SessionEnd::Expired, Some(format!("closed by {}", closed.rule()))),
        };
        let bytes = live.traffic().bytes();
        config.stats.ended(Direction::Inbound, end, bytes);
        if config.access_log {
            tracing::info!(
                target: "access", direction = "inbound", kind = origin.kind.as_str(), peer = %origin.peer.id(),
                remote = %origin.remote, source = origin.source.map(tracing::field::display), port = port.as_str(),
                verdict = "allow", rule = rule.as_str(), %receipt, end = end.as_str(), received_bytes = bytes.0,
                sent_bytes = bytes.1, took_us = (config.clock.now().saturating_sub(started)).as_micros() as u64, note,
            );
        }
        end
    }

    /// Counts, records and logs a session that did not reach the app.
    pub(crate) fn stopped(&self, stop: &Stop, port: &str, origin: Origin<'_>, started: Duration) {
        let config = &self.config;
        let (end, verdict, rule, note) = match stop {
            Stop::Denied(denial) => {
                config.recorder.record(denial.record().clone());
                (SessionEnd::Denied, "deny", denial.rule().to_string(), denial.reason().to_owned())
            }
            Stop::AppDown(error) => {
                (SessionEnd::Unreachable, "error", String::new(), format!("the app: {error}"))
            }
            Stop::NotReady => {
                (SessionEnd::Unreachable, "error", String::new(), "no valid identity of our own".to_owned())
            }
        };
        config.stats.ended(Direction::Inbound, end, (0, 0));
        if config.access_log {
            tracing::info!(
                target: "access", direction = "inbound", kind = origin.kind.as_str(), peer = %origin.peer.id(),
                remote = %origin.remote, source = origin.source.map(tracing::field::display), port, verdict, rule,
                receipt = stop.receipt(), end = end.as_str(),
                took_us = (config.clock.now().saturating_sub(started)).as_micros() as u64, note,
            );
        }
    }

    fn asking(&self, port: &str, origin: Origin<'_>) -> Asking {
        let caller = Caller {
            principal: Principal::Workload(origin.peer.id().clone()),
            user: None,
            chain: Arc::new([]),
            address: Some(origin.remote),
        };
        let (clock, random) = (self.config.clock.clone(), Arc::clone(&self.config.random));
        let kafka = self.mapping() == Mapping::Kafka;
        Asking { caller, port: port.to_owned(), kafka, clock, random }
    }

    fn facts(&self, origin: Origin<'_>) -> Facts {
        Facts {
            kind: origin.kind,
            peer: origin.peer.clone(),
            remote: origin.remote,
            since: self.config.clock.now(),
        }
    }

    /// Answers an opening with a refusal and reads what was sent already, so that the answer arrives.
    async fn turn_away<T: Side>(&self, tls: &mut T, status: Status, receipt: &str) {
        let answered = async {
            frame::refuse(tls, status, receipt).await?;
            tokio::io::copy_buf(&mut tls.take(MAX_LINGER_BYTES), &mut tokio::io::sink()).await
        };
        tokio::select! {
            outcome = answered => if let Err(error) = outcome {
                tracing::debug!(%error, "a refused connection was gone before its answer");
            },
            () = self.config.clock.sleep(LINGER) => {}
        }
    }

    async fn close<T: Side>(&self, tls: &mut T) {
        tokio::select! {
            outcome = tls.shutdown() => if let Err(error) = outcome {
                tracing::debug!(%error, "closing");
            },
            () = self.config.clock.sleep(LINGER) => {}
        }
    }
}

/// Why a session ended that should have gone on.
#[derive(Debug, thiserror::Error)]
enum Cut {
    #[error(transparent)]
    Copy(CopyError),
    #[error(transparent)]
    Kafka(KafkaError),
}

impl Cut {
    fn end(&self) -> SessionEnd {
        match self {
            Self::Copy(CopyError::Io(..)) => SessionEnd::Broken,
            Self::Copy(_) | Self::Kafka(KafkaError::TimedOut | KafkaError::Stalled) => SessionEnd::TimedOut,
            Self::Kafka(KafkaError::Denied | KafkaError::Overtaken | KafkaError::Request(_)) => {
                SessionEnd::Denied
            }
            Self::Kafka(_) => SessionEnd::Broken,
        }
    }
}

/// A connection without a session: nothing that a policy could deny.
struct Waiting;

impl Judge for Waiting {
    fn judge(&self, _policy: &ServicePolicy) -> Result<(), Closed> {
        Ok(())
    }

    fn about(&self) -> String {
        "ready for a session".to_owned()
    }
}

/// Somebody wants to connect to a port.
struct Asking {
    caller: Caller,
    port: String,
    /// Whether its requests are judged, as the map said when it began: another map ends it.
    kafka: bool,
    clock: SharedClock,
    random: SharedRandom,
}

impl Asking {
    fn decide(&self, policy: &ServicePolicy, occasion: &Occasion<'_>) -> Result<Permit, Denial> {
        let verdict = if self.kafka {
            policy.decide_kafka_connection(&self.caller, occasion)
        } else {
            policy.decide_connect(&self.caller, &self.port, occasion)
        };
        match verdict {
            Verdict::Permit(permit) => Ok(permit),
            Verdict::Deny(denial) => denial.audited(),
        }
    }

    fn record(&self, permit: &Permit, occasion: &Occasion<'_>) -> DecisionRecord {
        if self.kafka {
            permit.record_kafka_connection(&self.caller, occasion)
        } else {
            permit.record_connect(&self.caller, &self.port, occasion)
        }
    }

    /// `None` without randomness: nothing could be recorded so that it is found again.
    fn occasion(&self) -> Option<Occasion<'_>> {
        Some(Occasion {
            receipt: Receipt::generate(&*self.random).ok()?,
            now: self.clock.now(),
            layer: Layer::Sidecar,
            method: "CONNECT",
            target: &self.port,
            transaction: None,
            trace_id: None,
        })
    }
}

impl Judge for Asking {
    fn judge(&self, policy: &ServicePolicy) -> Result<(), Closed> {
        let Some(occasion) = self.occasion() else { return Err(Closed::Unjudged) };
        match self.decide(policy, &occasion) {
            Ok(_permit) => Ok(()),
            Err(denial) => Err(Closed::Denied(Box::new(denial))),
        }
    }

    fn about(&self) -> String {
        format!("port {}", self.port)
    }
}
