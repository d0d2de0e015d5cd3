//! The client's side of plain connections: a loopback listener, each of whose connections becomes a session with
//! exactly one SPIFFE ID.

use std::net::SocketAddr;
use std::sync::Arc;

use http::StatusCode;
use identity::clock::SharedClock;
use identity::{IdentitySource, Scope, SpiffeId};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};

use super::copy::{CopyError, End, Side as _, both_ways};
use super::frame::{OpenFrame, Session, SessionError, Status};
use super::pool::{Pool, PoolError, Ready};
use super::stats::{SessionEnd, TcpStats};
use super::stream::Stream;
use crate::accept::Slot;
use crate::live::Traffic;
use crate::metrics::Direction;
use crate::server::Limits;
use crate::traffic::breaker::{Overload, Permit, Resource};
use crate::traffic::config;
use crate::traffic::endpoint::{Endpoint, InFlight};
use crate::traffic::random::Dice;
use crate::traffic::resolve::{self, Source};
use crate::traffic::steer::Steering;

/// How often a session that a connection did not begin is sent over another: the second one is new.
const MAX_ATTEMPTS: usize = 3;
/// Endpoints that are tried for one session before it fails.
const MAX_ENDPOINTS_TRIED: usize = 8;

/// Whom plain connections go to, and where they may be found.
#[derive(Debug, Clone)]
pub struct TcpUpstream {
    /// The service's name, for logs and metrics.
    pub service: String,
    /// Who must answer.
    pub id: SpiffeId,
    /// The port's name in the service's policies; empty: its only one.
    pub port: String,
    /// Where.
    pub endpoints: Source,
    /// How they go there, as far as that holds for connections ([`config::Traffic::of_connections`]).
    pub traffic: config::Traffic,
}

/// Plain connections of the app to one service.
pub struct TcpOutbound {
    upstream: TcpUpstream,
    pool: Arc<Pool>,
    steering: Steering<()>,
    clock: SharedClock,
    stats: TcpStats,
    access_log: bool,
}

/// Why a connection of the app went no further.
#[derive(Debug, Error)]
enum ConnectError {
    #[error("outbound listeners serve this machine only")]
    NotLocal,
    #[error("no endpoint is configured")]
    NoEndpoint,
    #[error(transparent)]
    Overload(#[from] Overload),
    #[error("{0}")]
    Pool(#[from] PoolError),
}

impl TcpOutbound {
    /// Plain connections to `upstream`; nothing is dialled until the first one.
    pub fn new(
        upstream: TcpUpstream,
        source: IdentitySource,
        stats: TcpStats,
        clock: SharedClock,
        dice: Dice,
        access_log: bool,
    ) -> Result<Arc<Self>, rustls::Error> {
        let pool = Pool::new(upstream.id.clone(), source, clock.clone(), stats.clone())?;
        let steering = Steering::new(upstream.traffic.clone(), &[], dice);
        Ok(Arc::new(Self { upstream, pool, steering, clock, stats, access_log }))
    }

    /// Accepts within `limits` until `scope` drains; sessions that are open go on. Returns at once.
    pub fn serve(self: &Arc<Self>, listener: TcpListener, limits: &Limits, scope: &Scope) {
        let this = Arc::clone(self);
        let accepting = limits.accepting(&self.clock, scope);
        scope.spawn_critical("outbound tcp", async move {
            let serve = |(stream, remote), slot| {
                let this = Arc::clone(&this);
                async move {
                    let _slot: Slot = slot;
                    this.carry(stream, remote).await;
                }
            };
            accepting.serve_each("outbound tcp connection", &listener, serve).await;
        });
        scope.spawn_critical("tcp pool", Arc::clone(&self.pool).keep(scope.clone()));
        let dice = self.steering.dice.another();
        resolve::keep(&self.upstream.endpoints, &self.steering.endpoints, &self.clock, dice, scope);
    }

    /// Puts other endpoints in place of those so far. Sessions that are open stay where they are.
    pub fn set_endpoints(&self, endpoints: Vec<SocketAddr>) {
        self.steering.endpoints.replace(endpoints.into_iter().map(Endpoint::from));
    }

    /// TLS connections that are ready for a session.
    pub fn ready_connections(&self) -> usize {
        self.pool.ready()
    }

    /// One connection of the app, from its first byte to its last.
    pub async fn carry(&self, stream: TcpStream, remote: SocketAddr) {
        let started = self.clock.now();
        let _active = self.stats.session();
        let traffic = Traffic::default();
        let mut near = Stream::new(stream);
        let outcome = self.session(&mut near, remote, &traffic).await;
        if outcome.is_err() {
            // A reset, not an orderly end: what the app has got is not the whole.
            near.abort();
        }
        let end = outcome.as_ref().map_or_else(Failed::end, |()| SessionEnd::Finished);
        let note = outcome.as_ref().err().map(tracing::field::display);
        let bytes = traffic.bytes();
        self.stats.ended(Direction::Outbound, end, bytes);
        if self.access_log {
            tracing::info!(
                target: "access", direction = "outbound", kind = "tcp", service = self.upstream.service,
                peer = %self.upstream.id, port = self.upstream.port, source = %remote, end = end.as_str(),
                sent_bytes = bytes.0, received_bytes = bytes.1,
                took_us = self.clock.now().saturating_sub(started).as_micros() as u64, note,
            );
        }
    }

    async fn session(&self, near: &mut Stream, remote: SocketAddr, traffic: &Traffic) -> Result<(), Failed> {
        if !remote.ip().is_loopback() {
            return Err(ConnectError::NotLocal.into());
        }
        let _permit: Permit = self.steering.breaker.take(Resource::Request).map_err(ConnectError::from)?;
        let open = OpenFrame { port: self.upstream.port.clone(), source: Some(remote) };
        let (Ready { tls, mut lease }, mut _counted) = self.connection(false).await?;
        let mut session = Session::open(tls, &open);
        let mut attempt = 1;
        loop {
            let left = lease.expires.saturating_sub(self.clock.now());
            let outcome = tokio::select! {
                outcome = both_ways(near, &mut session, &self.clock, traffic) => outcome,
                () = self.clock.sleep(left) => return Err(Failed::Expired),
            };
            let error = match outcome {
                Ok(()) => {
                    if let Some(tls) = session.into_finished() {
                        self.pool.put(Ready { tls, lease });
                    }
                    return Ok(());
                }
                Err(error) => error,
            };
            match error.of_session(End::Far) {
                Some(SessionError::Refused { status, receipt }) => {
                    return Err(Failed::Refused { status: *status, receipt: receipt.clone() });
                }
                // Closed as we took it: nothing of the session was begun, so it begins elsewhere.
                Some(SessionError::NotBegun) if attempt < MAX_ATTEMPTS => {
                    let Some(unbegun) = session.into_unbegun() else { return Err(Failed::Copy(error)) };
                    attempt += 1;
                    let (again, elsewhere) = self.connection(true).await?;
                    (session, lease) = (Session::again(again.tls, unbegun), again.lease);
                    _counted = elsewhere;
                }
                _ => return Err(Failed::Copy(error)),
            }
        }
    }

    /// A connection to an endpoint, which counts the session while it is held; a `new` one, if one that was ready
    /// has failed. One that cannot be reached is left for another, and left out for a while when that happens often.
    async fn connection(&self, new: bool) -> Result<(Ready, InFlight<()>), ConnectError> {
        let (mut failure, mut avoid) = (ConnectError::NoEndpoint, None);
        for _ in 0..self.steering.endpoints.now().len().min(MAX_ENDPOINTS_TRIED) {
            let began = self.clock.now();
            let Some(endpoint) = self.steering.pick(None, avoid.as_ref(), began) else { break };
            let address = endpoint.address;
            let attempt = if new { self.pool.connect(address).await } else { self.pool.get(address).await };
            let now = self.clock.now();
            let took = now.saturating_sub(began);
            match attempt {
                Ok(ready) => {
                    self.steering.answered(endpoint.member(), StatusCode::OK, took, now);
                    return Ok((ready, endpoint));
                }
                Err(PoolError::NoIdentity) => return Err(PoolError::NoIdentity.into()),
                Err(error) => {
                    self.steering.failed(endpoint.member(), took, now);
                    avoid = Some(Arc::clone(endpoint.member()));
                    failure = error.into();
                }
            }
        }
        Err(failure)
    }
}

/// How a session failed.
enum Failed {
    Connect(ConnectError),
    Copy(CopyError),
    Refused { status: Status, receipt: String },
    Expired,
}

impl From<ConnectError> for Failed {
    fn from(error: ConnectError) -> Self {
        Self::Connect(error)
    }
}

impl Failed {
    fn end(&self) -> SessionEnd {
        match self {
            Self::Connect(_) => SessionEnd::Unreachable,
            Self::Copy(CopyError::Io(..)) => SessionEnd::Broken,
            Self::Copy(_) => SessionEnd::TimedOut,
            Self::Refused { status: Status::Denied, .. } => SessionEnd::Denied,
            Self::Refused { .. } => SessionEnd::Unreachable,
            Self::Expired => SessionEnd::Expired,
        }
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect(error) => error.fmt(f),
            Self::Copy(error) => error.fmt(f),
            Self::Refused { status, receipt } if receipt.is_empty() => f.write_str(status.as_str()),
            Self::Refused { status, receipt } => write!(f, "{}, receipt {receipt}", status.as_str()),
            Self::Expired => f.write_str("a certificate has ended"),
        }
    }
}
