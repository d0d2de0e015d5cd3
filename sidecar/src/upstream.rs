//! The client half: requests to exactly one SPIFFE ID over pooled mTLS connections.
//!
//! Which endpoint a request goes to, and what is tried again, is decided by [`crate::traffic`]; here are the
//! connections, a pool an endpoint. A connection belongs to the identity it was made
//! under: after a rotation new requests go over new connections, and old ones end with their last
//! request, so no request meets a closed door.

mod health;
mod look;

use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, UPGRADE};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Request, Response, Uri, Version};
use http_body::{Frame, SizeHint};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use identity::clock::SharedClock;
use identity::tls::ALPN_H2;
use identity::verify::handshake_failure;
use identity::{IdentitySource, Scope, SpiffeId};
use thiserror::Error;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::mux::{self, SendError};
use crate::server::ScopeExecutor;
use crate::traffic::breaker::{Overload, Permit, Resource};
use crate::traffic::config::{RetryOn, Traffic};
use crate::traffic::endpoint::{self, InFlight, Member};
use crate::traffic::hedge;
use crate::traffic::random::Dice;
use crate::traffic::resolve::{self, Source};
use crate::traffic::retry::Tries;
use crate::traffic::steer::Steering;
use crate::traffic::timeouts::{Bounds, MalformedTimeout};
use crate::{Body, BoxError, Buffered, bounded, dial, grpc, headers};

/// Streams on one connection before another is opened: more only queue behind one socket.
const MAX_STREAMS_PER_CONNECTION: usize = 100;
/// Connections an endpoint; beyond it requests share the least loaded one.
const MAX_CONNECTIONS: usize = 16;
/// How often a request that never left may be given to another connection of its endpoint.
const MAX_CLOSING: usize = 3;
/// A connection whose peer does not answer a ping within this is dead.
const PING: Duration = Duration::from_secs(10);
/// A connection on which bytes stay unacknowledged so long leads to nobody (TCP_USER_TIMEOUT): requests must not
/// wait on it until their own timeouts, nor new ones be sent into it.
const UNACKNOWLEDGED: Duration = Duration::from_secs(10);
/// See [`crate::server`]: the connection's window is several times a stream's.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;

/// Whom to call, and where they may be found.
#[derive(Debug, Clone)]
pub struct UpstreamConfig {
    /// The service's name, for logs and metrics.
    pub service: String,
    /// Who must answer.
    pub id: SpiffeId,
    /// Where.
    pub endpoints: Source,
    /// From sending a request to the head of its answer.
    pub response_timeout: Duration,
}

/// Why a request got no answer.
#[derive(Debug, Error)]
pub enum UpstreamError {
    /// This process has no valid identity to call with.
    #[error("no valid identity of our own yet")]
    NoIdentity,
    /// TLS could not be configured.
    #[error("TLS cannot be configured: {0}")]
    Tls(#[from] rustls::Error),
    /// No endpoint answered as the expected identity.
    #[error("no endpoint of {service} could be reached as {id}: {cause}")]
    Connect {
        /// Whom we called.
        service: String,
        /// Who should have answered.
        id: SpiffeId,
        /// What the last endpoint said.
        cause: BoxError,
    },
    /// The request left, and the connection broke before the answer's head.
    #[error("the connection to {service} broke: {cause}")]
    Broken {
        /// Whom we called.
        service: String,
        /// What is known of it.
        cause: BoxError,
    },
    /// No answer within [`UpstreamConfig::response_timeout`].
    #[error("{0} did not answer in time")]
    Timeout(String),
    /// The request's target is not in origin form.
    #[error("the request's target is not in origin form")]
    Target,
    /// The request's own deadline is none.
    #[error(transparent)]
    Deadline(#[from] MalformedTimeout),
    /// Too much is under way to the service already.
    #[error("{service}: {overload}")]
    Overload {
        /// Whom we called.
        service: String,
        /// What there is too much of.
        overload: Overload,
    },
}

impl UpstreamError {
    /// The status that a proxy answers with (RFC 9110 §15.6).
    pub fn status(&self) -> http::StatusCode {
        match self {
            Self::NoIdentity | Self::Connect { .. } => http::StatusCode::SERVICE_UNAVAILABLE,
            Self::Tls(_) | Self::Broken { .. } => http::StatusCode::BAD_GATEWAY,
            Self::Timeout(_) => http::StatusCode::GATEWAY_TIMEOUT,
            Self::Target | Self::Deadline(_) => http::StatusCode::BAD_REQUEST,
            Self::Overload { .. } => Overload::STATUS,
        }
    }
}

/// A client to one service.
pub struct Upstream {
    config: UpstreamConfig,
    authority: Authority,
    host: HeaderValue,
    tls: TlsConnector,
    source: IdentitySource,
    clock: SharedClock,
    scope: Scope,
    steering: Steering<Pool>,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The connections to one endpoint; they end with their last request once the endpoint is gone.
#[derive(Default)]
struct Pool {
    links: Mutex<Vec<Pooled>>,
    /// Held while dialling, so that a burst on an empty pool opens one connection and not a hundred.
    dialling: tokio::sync::Mutex<()>,
}

struct Pooled {
    link: Link,
    generation: u64,
    /// In time since the Unix epoch.
    since: Duration,
    _permit: Permit,
}

/// What the handshake chose.
#[derive(Clone)]
enum Link {
    /// Another sidecar.
    Mux(mux::Handle),
    /// Anything else that has an identity: a vault, a server with a SPIFFE library.
    Http2 { sender: SendRequest<Body>, in_flight: Arc<AtomicUsize> },
}

impl Link {
    /// How many requests are under way, or `None` if it takes no more.
    fn load(&self) -> Option<usize> {
        match self {
            Self::Mux(handle) => handle.load(),
            Self::Http2 { sender, in_flight } => {
                (!sender.is_closed()).then(|| in_flight.load(Ordering::Relaxed))
            }
        }
    }

    /// Lets what is under way end, and then the connection.
    fn go_away(&self) {
        match self {
            Self::Mux(handle) => handle.go_away(),
            // Dropping its sender does that.
            Self::Http2 { .. } => {}
        }
    }
}

impl Upstream {
    /// A client whose traffic goes as it does where nothing is said; see [`Upstream::steered`].
    pub fn new(
        config: UpstreamConfig,
        source: IdentitySource,
        clock: SharedClock,
        scope: &Scope,
    ) -> Result<Arc<Self>, UpstreamError> {
        let dice = Dice::from_system(&identity::random::system());
        Self::steered(config, Traffic::default(), dice, source, clock, scope)
    }

    /// A client whose traffic goes as `traffic` says; nothing is dialled until the first request, or the first
    /// question after its endpoints' health. Its connections are tasks of `scope` and end when it is dropped.
    pub fn steered(
        config: UpstreamConfig,
        mut traffic: Traffic,
        dice: Dice,
        source: IdentitySource,
        clock: SharedClock,
        scope: &Scope,
    ) -> Result<Arc<Self>, UpstreamError> {
        let tls = identity::tls::client_config(&source, config.id.clone(), &[mux::ALPN, ALPN_H2], &clock)?;
        let authority = Authority::try_from(config.service.as_str()).map_err(|_| UpstreamError::Target)?;
        let host = HeaderValue::try_from(config.service.as_str()).map_err(|_| UpstreamError::Target)?;
        let health = traffic.health.take();
        let upstream = Arc::new(Self {
            authority,
            host,
            tls: TlsConnector::from(tls),
            source,
            clock,
            scope: scope.clone(),
            steering: Steering::new(traffic, &[], dice),
            config,
        });
        let Self { config, steering, clock, .. } = &*upstream;
        resolve::keep(&config.endpoints, &steering.endpoints, clock, steering.dice.another(), scope);
        if let Some(check) = health {
            upstream.watch_health(check);
        }
        Ok(upstream)
    }

    /// Puts these endpoints in place of those before; connections to those that stay are kept.
    pub fn replace_endpoints(&self, endpoints: impl IntoIterator<Item = endpoint::Endpoint>) {
        self.steering.endpoints.replace(endpoints);
    }

    /// Whom it calls.
    pub fn id(&self) -> &SpiffeId {
        &self.config.id
    }

    /// Their name.
    pub fn service(&self) -> &str {
        &self.config.service
    }

    /// Sends one request, in origin form, and returns the head of the answer; its body streams.
    ///
    /// What is sent again, and how often, is the configuration's to say; a single-use transaction token
    /// never is once it may have arrived.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Body>, UpstreamError> {
        self.send_keyed(request, None).await
    }

    /// The key by which a request is kept together with others, if the configuration says so.
    pub fn key(&self, headers: &HeaderMap, source: IpAddr, user: Option<&str>) -> Option<u64> {
        self.steering.key(headers, source, user)
    }

    /// Sends one request as [`Upstream::send`] does, to where others with the same key go.
    pub async fn send_keyed(
        &self,
        request: Request<Body>,
        key: Option<u64>,
    ) -> Result<Response<Body>, UpstreamError> {
        let steering = &self.steering;
        let permit = steering.breaker.take(Resource::Request).map_err(|overload| self.overload(overload))?;
        let (mut head, mut body) = request.into_parts();
        head.headers.insert(HOST, self.host.clone());
        let call = grpc::is_call(&head.headers);
        let started = self.clock.now();
        let bounds = Bounds::of(&head.headers, self.config.response_timeout, &steering.timeouts, started)?;
        let mut tries = steering.retrier.begin(&head.method, started);
        let mut avoid = None;
        let mut began = started;
        loop {
            bounds.whole.pass_on(&mut head.headers, began);
            let generation = self.source.valid_at(began).ok_or(UpstreamError::NoIdentity)?.generation;
            let endpoint = steering
                .pick(key, avoid.as_ref(), began)
                .ok_or_else(|| self.unreachable("no endpoint is available"))?;
            let member = Arc::clone(endpoint.member());
            let copy = self.copy(&body);
            let left = bounds.head.left(began);
            let limit = match steering.retrier.config().per_try {
                Some(per_try) => Some(left.map_or(per_try, |left| per_try.min(left))),
                None => left,
            };
            let to = Aim { head: &head, generation, key, tries };
            // Pinned where it is made: what is given to a future by value is moved, and it is large.
            let attempt = pin!(self.attempt(endpoint, &to, body));
            let second = copy.as_ref().and_then(Body::repeat);
            let outcome = match self.hedged_after(&to).zip(second) {
                Some((late, copy)) => {
                    let hedged = self.hedged(attempt, late, &member, &to, copy);
                    self.within(limit, pin!(Box::pin(hedged))).await
                }
                None => self.within(limit, attempt).await,
            };
            let now = self.clock.now();
            let (after, unsent, outcome) = match outcome {
                Ok(Answered { endpoint, began, response }) => {
                    let took = now.saturating_sub(began);
                    let status = if call { grpc::status(&response) } else { response.status() };
                    steering.answered(endpoint.member(), status, took, now);
                    if let Some(hedging) = &steering.hedging {
                        hedging.answered(took);
                    }
                    (RetryOn::Status(status), None, Ok((endpoint, response)))
                }
                Err(Failure { after: None, error, .. }) => return Err(error),
                Err(Failure { after: Some(after), unsent, error }) => {
                    steering.failed(&member, now.saturating_sub(began), now);
                    (after, unsent, Err(error))
                }
            };
            let left = bounds.head.left(now);
            let again =
                unsent.or_else(|| copy.filter(|_| after == RetryOn::Refused || !is_single_use(&head)));
            let whole = again.is_some();
            match tries.again(&steering.retrier, after, whole, left, &steering.dice, now).zip(again) {
                None => {
                    let (endpoint, response) = outcome?;
                    let response = response.map(|body| bounded::body(body, &bounds, call, &self.clock));
                    return Ok(hold(response, (endpoint, permit)));
                }
                Some((wait, again)) => {
                    let (service, try_again) = (&self.config.service, tries.done());
                    tracing::debug!(service, endpoint = %member.address, ?after, ?wait, try_again, "trying again");
                    body = again;
                    avoid = Some(member);
                    drop(outcome);
                    self.clock.sleep(wait).await;
                    began = self.clock.now();
                }
            }
        }
    }

    /// The body for another try, if it is here and worth keeping.
    fn copy(&self, body: &Body) -> Option<Body> {
        let bytes = body.whole()?.len() as u64;
        let kept = self.steering.hedging.is_some() || self.steering.retrier.keeps(bytes);
        if kept { body.repeat() } else { None }
    }

    /// The outcome of a try, or of its pair, within `limit`.
    async fn within(
        &self,
        limit: Option<Duration>,
        mut attempt: Pin<&mut impl Future<Output = Result<Answered, Failure>>>,
    ) -> Result<Answered, Failure> {
        let Some(limit) = limit else { return attempt.await };
        tokio::select! {
            biased;
            outcome = &mut attempt => outcome,
            () = self.clock.sleep(limit) => Err(Failure::late(self.config.service.clone())),
        }
    }

    /// After what time a second copy of this request goes out; `None`: never.
    fn hedged_after(&self, to: &Aim<'_>) -> Option<Duration> {
        let hedging = self.steering.hedging.as_ref()?;
        (to.tries.is_repeatable() && !is_single_use(to.head)).then(|| hedging.delay()).flatten()
    }

    /// A try, and if it is late a second one, to another endpoint than `first`.
    async fn hedged(
        &self,
        attempt: Pin<&mut impl Future<Output = Result<Answered, Failure>>>,
        late: Duration,
        first: &Arc<Member<Pool>>,
        to: &Aim<'_>,
        copy: Body,
    ) -> Result<Answered, Failure> {
        let steering = &self.steering;
        let second = || {
            let now = self.clock.now();
            let endpoint = steering.pick(to.key, Some(first), now)?;
            // A second one to the same would wait behind the first.
            if Arc::ptr_eq(endpoint.member(), first) || !steering.retrier.may_hedge(&to.tries, now) {
                return None;
            }
            tracing::debug!(service = self.config.service, endpoint = %endpoint.address, "sending a second copy");
            let member = Arc::clone(endpoint.member());
            Some(async move {
                let outcome = self.attempt(endpoint, to, copy).await;
                if let Err(Failure { after: Some(_), .. }) = &outcome {
                    let failed = self.clock.now();
                    steering.failed(&member, failed.saturating_sub(now), failed);
                }
                outcome
            })
        };
        hedge::first_of(attempt, self.clock.sleep(late), second).await
    }

    /// One try, over whatever connections the endpoint's pool has or makes.
    async fn attempt(
        &self,
        endpoint: InFlight<Pool>,
        to: &Aim<'_>,
        mut body: Body,
    ) -> Result<Answered, Failure> {
        let began = self.clock.now();
        for _ in 0..MAX_CLOSING {
            let link = match self.link(&endpoint, to.generation).await {
                Ok(link) => link,
                Err(Unlinked::Overload(overload)) => return Err(Failure::ours(self.overload(overload))),
                Err(Unlinked::Dial(cause)) => {
                    tracing::info!(service = self.config.service, endpoint = %endpoint.address, error = %cause, "cannot connect");
                    let error = self.unreachable(cause);
                    return Err(Failure { after: Some(RetryOn::Connect), unsent: Some(body), error });
                }
            };
            match self.over(link, to.head, body).await? {
                Sent::Answered(response) => return Ok(Answered { endpoint, began, response }),
                Sent::NotSent(unsent) => body = unsent,
            }
        }
        let error = self.broken("every connection was closing");
        Err(Failure { after: Some(RetryOn::Connect), unsent: Some(body), error })
    }

    /// One try over one connection.
    async fn over(&self, link: Link, head: &Parts, body: Body) -> Result<Sent, Failure> {
        match link {
            Link::Mux(handle) => match handle.send(head, body).await {
                Ok(response) => Ok(Sent::Answered(response)),
                Err(SendError::NotSent(unsent)) => Ok(Sent::NotSent(unsent)),
                Err(error) => Err(self.unanswered(&error)),
            },
            Link::Http2 { sender, in_flight } => {
                Box::pin(self.send_http2(sender, &in_flight, head, body)).await
            }
        }
    }

    fn unanswered(&self, error: &SendError) -> Failure {
        let after = match error {
            // A head over the limits is over them at every endpoint.
            SendError::TooLarge(_) => None,
            SendError::Refused => Some(RetryOn::Refused),
            SendError::NotSent(_) => Some(RetryOn::Connect),
            SendError::Ended(_) => Some(RetryOn::Broken),
        };
        Failure { after, unsent: None, error: self.broken(error.to_string()) }
    }

    fn overload(&self, overload: Overload) -> UpstreamError {
        UpstreamError::Overload { service: self.config.service.clone(), overload }
    }

    fn unreachable(&self, cause: impl Into<BoxError>) -> UpstreamError {
        let UpstreamConfig { service, id, .. } = &self.config;
        UpstreamError::Connect { service: service.clone(), id: id.clone(), cause: cause.into() }
    }

    fn broken(&self, cause: impl Into<BoxError>) -> UpstreamError {
        UpstreamError::Broken { service: self.config.service.clone(), cause: cause.into() }
    }

    async fn send_http2(
        &self,
        mut sender: SendRequest<Body>,
        in_flight: &Arc<AtomicUsize>,
        head: &Parts,
        body: Body,
    ) -> Result<Sent, Failure> {
        let guard = Streaming::new(in_flight);
        let request = Request::from_parts(self.pseudo_headers(head).map_err(Failure::ours)?, body);
        match sender.try_send_request(request).await {
            Ok(response) => {
                Ok(Sent::Answered(response.map(|body| Body::new(Guarded { body, _guard: guard }))))
            }
            Err(mut refused) => match refused.take_message() {
                Some(unsent) => Ok(Sent::NotSent(unsent.into_body())),
                None => {
                    let error = self.broken(refused.into_error());
                    Err(Failure { after: Some(RetryOn::Broken), unsent: None, error })
                }
            },
        }
    }

    /// The request with the pseudo-headers of HTTP/2. `:authority` is the service's name.
    fn pseudo_headers(&self, head: &Parts) -> Result<Parts, UpstreamError> {
        let target: PathAndQuery = head.uri.path_and_query().cloned().ok_or(UpstreamError::Target)?;
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(Scheme::HTTPS);
        uri.authority = Some(self.authority.clone());
        uri.path_and_query = Some(target);
        let mut head = head.clone();
        head.uri = Uri::from_parts(uri).map_err(|_| UpstreamError::Target)?;
        head.version = Version::HTTP_2;
        head.headers.remove(HOST);
        // An offer to upgrade may be left aside; HTTP/2 has none (RFC 9113 §8.6).
        head.headers.remove(UPGRADE);
        head.headers.remove(CONNECTION);
        Ok(head)
    }

    async fn link(&self, endpoint: &Member<Pool>, generation: u64) -> Result<Link, Unlinked> {
        let pool = &endpoint.own;
        if let Some(link) = pool.link(generation) {
            return Ok(link);
        }
        let breaker = &self.steering.breaker;
        let _pending = breaker.take(Resource::Pending).map_err(Unlinked::Overload)?;
        let _dialling = pool.dialling.lock().await;
        // Somebody else may have dialled while we waited.
        if let Some(link) = pool.link(generation) {
            return Ok(link);
        }
        let permit = breaker.take(Resource::Connection).map_err(Unlinked::Overload)?;
        // Boxed, as all that happens seldom: a handshake's future is thousands of bytes, and what holds a
        // request's future is moved about with it.
        let link = Box::pin(self.dial(endpoint.address)).await.map_err(Unlinked::Dial)?;
        let since = self.clock.now();
        pool.lock().push(Pooled { link: link.clone(), generation, since, _permit: permit });
        Ok(link)
    }

    async fn dial(&self, address: SocketAddr) -> Result<Link, BoxError> {
        let timeouts = &self.steering.timeouts;
        let stream = tokio::select! {
            stream = dial::connect(address) => stream?,
            () = self.clock.sleep(timeouts.connect) => return Err("connecting took too long".into()),
        };
        stream.set_nodelay(true)?;
        socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
        let stream = tokio::select! {
            stream = self.tls.connect(identity::tls::unnamed_server(), Buffered::new(stream)) => {
                stream.map_err(|error| handshake_failure(&error))?
            }
            () = self.clock.sleep(timeouts.tls) => return Err("the TLS handshake took too long".into()),
        };
        match stream.get_ref().1.alpn_protocol() {
            Some(mux::ALPN) => {
                let service = self.config.service.as_str().into();
                Ok(Link::Mux(mux::connect(stream, service, self.clock.clone(), &self.scope)))
            }
            Some(ALPN_H2) => self.http2(stream).await,
            _ => Err("the peer speaks neither our protocol nor HTTP/2".into()),
        }
    }

    async fn http2(&self, stream: TlsStream<Buffered>) -> Result<Link, BoxError> {
        let (sender, connection) = http2::Builder::new(ScopeExecutor(self.scope.clone()))
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .handshake(TokioIo::new(stream))
            .await?;
        let service = self.config.service.clone();
        self.scope.spawn("upstream connection", async move {
            if let Err(error) = connection.await {
                tracing::debug!(service, %error, "upstream connection ended");
            }
        });
        Ok(Link::Http2 { sender, in_flight: Arc::default() })
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Vec<Pooled>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The least loaded live connection of this identity, unless another should be opened.
    fn link(&self, generation: u64) -> Option<Link> {
        let mut links = self.lock();
        links.retain(|pooled| {
            let stays = pooled.generation >= generation && pooled.link.load().is_some();
            if !stays {
                pooled.link.go_away();
            }
            stays
        });
        let loads = links.iter().filter_map(|pooled| Some((pooled.link.load()?, pooled)));
        let (load, least) = loads.min_by_key(|(load, _)| *load)?;
        let busy = load >= MAX_STREAMS_PER_CONNECTION;
        if busy && links.len() < MAX_CONNECTIONS { None } else { Some(least.link.clone()) }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for pooled in self.links.get_mut().unwrap_or_else(PoisonError::into_inner) {
            pooled.link.go_away();
        }
    }
}

/// Why there is no connection.
enum Unlinked {
    /// There may be no more.
    Overload(Overload),
    /// The endpoint gave none.
    Dial(BoxError),
}

/// A request as it goes to an endpoint, and what is known of its tries.
struct Aim<'a> {
    head: &'a Parts,
    generation: u64,
    key: Option<u64>,
    tries: Tries,
}

/// An answer, from where, and when that was asked.
struct Answered {
    endpoint: InFlight<Pool>,
    began: Duration,
    response: Response<Body>,
}

/// Why an attempt got no answer.
struct Failure {
    /// As the endpoint's failure; `None` if it is not the endpoint's.
    after: Option<RetryOn>,
    /// The body, if nothing of it has left.
    unsent: Option<Body>,
    error: UpstreamError,
}

impl Failure {
    fn ours(error: UpstreamError) -> Self {
        Self { after: None, unsent: None, error }
    }

    fn late(service: String) -> Self {
        Self { after: Some(RetryOn::Timeout), unsent: None, error: UpstreamError::Timeout(service) }
    }
}

/// The callee remembers the tokens of unsafe requests, and refuses the second of a kind.
fn is_single_use(head: &Parts) -> bool {
    !head.method.is_safe() && head.headers.contains_key(&headers::TXN_TOKEN)
}

/// Keeps what a request holds until its answer has ended; one that is here as a whole has.
fn hold<G: Unpin + Send + 'static>(response: Response<Body>, guard: G) -> Response<Body> {
    response.map(|body| match body.whole() {
        Some(_) => body,
        None => Body::new(Guarded { body, _guard: guard }),
    })
}

/// What became of a request on an HTTP/2 connection.
enum Sent {
    Answered(Response<Body>),
    NotSent(Body),
}

/// Counts a request on its connection until its answer's body has ended.
struct Streaming(Arc<AtomicUsize>);

impl Streaming {
    fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counter))
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body, and what is held until it has ended.
struct Guarded<B, G> {
    body: B,
    _guard: G,
}

impl<B, G> http_body::Body for Guarded<B, G>
where
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
    G: Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.body).poll_frame(cx).map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_unsafe_requests_are_used_once() {
        let head = |method: &str, token: bool| {
            let mut request = Request::builder().method(method).uri("/");
            if token {
                request = request.header(identity::txn::HEADER, "chain");
            }
            request.body(()).unwrap().into_parts().0
        };
        assert!(is_single_use(&head("PUT", true)) && is_single_use(&head("POST", true)));
        assert!(!is_single_use(&head("GET", true)) && !is_single_use(&head("PUT", false)));
    }
}
