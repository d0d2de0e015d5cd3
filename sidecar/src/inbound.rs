//! The inbound half: the mTLS listener in front of the app.
//!
//! [`Inbound::request`] is the whole story of a request, top to bottom: one request or several? who is
//! it, for whom, what do they want, may they, forward. Nothing reaches the app but through
//! [`Inbound::forward`], which takes a [`Permit`], and the lookups that gather an object's attributes for
//! the decision, whose answers go nowhere without one.

use std::fmt::{self, Display, Formatter};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, IF_MATCH, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, RANGE,
};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use identity::clock::SharedClock;
use identity::txn::{Chain, Verifier};
use identity::{IdentitySource, Peer, Scope, SpiffeId};
use policy::{
    AttributeSource, Attributes, BodyRule, Caller, Denial, Kept, Layer, Mapped, Mode, ObjectRef, Occasion,
    Permit, Principal, Receipts, Recorder, Refusal, ServicePolicy, Verdict,
};

use tokio_rustls::server::TlsStream;

use crate::access::Finished;
use crate::app::{App, AppError, Bound, Relay};
use crate::correlate::{Correlator, Remembered};
use crate::debug::connections::Connections;
use crate::entities::Unanswered;
use crate::headers::{self, TraceParent};
use crate::live::{Facts, Kind};
use crate::messages::{self, Fault, Faults, Judge, Judged, Message, Messages};
use crate::metrics::{Direction, Metrics, Observation};
use crate::relations::Relations;
use crate::sample::Sampler;
use crate::server::{Connection, Handler, RefusedConnection};
use crate::streams::{Asked, Known, Said, Streams, map_again};
use crate::tcp::TcpInbound;
use crate::trace::{Place, Spans};
use crate::traffic::ratelimit::{LocalLimit, Quota};
use crate::watchers::Watchers;
use crate::{Body, Buffered, answer, body, empty, entities, full, grpc, transaction};

/// Largest answer that is held back while its object's attributes are judged.
const MAX_HELD_RESPONSE_BYTES: usize = 1024 * 1024;

/// How long the first message of a call that is judged may take: nothing is known of the call before.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Everything the inbound listener needs.
pub struct Inbound {
    pub(crate) service: String,
    pub(crate) id: SpiffeId,
    pub(crate) policy: Arc<ArcSwap<ServicePolicy>>,
    pub(crate) verifier: Arc<Verifier>,
    pub(crate) app: App,
    pub(crate) correlator: Arc<Correlator>,
    pub(crate) source: IdentitySource,
    pub(crate) recorder: Arc<dyn Recorder>,
    pub(crate) sampler: Sampler,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: SharedClock,
    pub(crate) receipts: Arc<Receipts>,
    pub(crate) spans: Arc<Spans>,
    pub(crate) watchers: Arc<Watchers>,
    pub(crate) connections: Arc<Connections>,
    pub(crate) tcp: Arc<TcpInbound>,
    pub(crate) streams: Arc<Streams>,
    pub(crate) relations: Arc<Relations>,
    /// How many requests are let through.
    pub(crate) limit: Option<LocalLimit>,
}

/// How a request ended, for the log and the metrics.
struct Ended {
    response: Response<Body>,
    verdict: &'static str,
    by: By,
    note: Option<String>,
}

/// What decided, if anything did.
enum By {
    Permit(Permit),
    Denial(Box<Denial>),
    Nothing,
}

impl Display for By {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Permit(permit) => permit.rule().fmt(f),
            Self::Denial(denial) => denial.rule().fmt(f),
            Self::Nothing => Ok(()),
        }
    }
}

/// A request's body on its way to the app.
enum Carried {
    Body(Body),
    /// A call whose messages are bounded and not judged.
    Call {
        body: Body,
        faults: Faults,
    },
    /// A call whose first message was read.
    Begun(Box<Begun>),
}

impl Carried {
    /// The same request with another body, or another first message.
    fn shortened(self, said: &Bytes) -> Self {
        match self {
            Self::Begun(begun) => Self::Begun(Box::new(Begun { first: Message::of(said), ..*begun })),
            Self::Body(_) | Self::Call { .. } => Self::Body(full(said.clone())),
        }
    }

    /// The length of what is here.
    fn len(&self) -> usize {
        match self {
            Self::Begun(begun) => begun.first.len(),
            Self::Body(body) | Self::Call { body, .. } => body.whole().map_or(0, <[u8]>::len),
        }
    }
}

/// A call as far as it is known before it is decided about.
struct Begun {
    first: Message,
    rest: Messages,
    /// The request without any message.
    unjudged: Mapped,
}

/// Why a request was not answered by the app.
enum Stop {
    Denied(Box<Denial>),
    App(AppError),
    /// The app answered, but not with something whose owner can be told.
    Upstream(StatusCode),
    NotReady,
    /// A message of a call that had begun was denied, which has been recorded.
    Ended(Box<Denial>),
    /// A message of a call that had begun is too large.
    TooLarge,
    /// Too many came.
    Limited(Box<[(HeaderName, HeaderValue); 3]>),
}

impl From<Denial> for Stop {
    fn from(denial: Denial) -> Self {
        Self::Denied(Box::new(denial))
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Denied(denial) => Self::Ended(denial),
            Fault::TooLarge => Self::TooLarge,
            Fault::Unrecorded => Self::NotReady,
        }
    }
}

impl From<AppError> for Stop {
    fn from(error: AppError) -> Self {
        Self::App(error)
    }
}

impl From<Unanswered> for Stop {
    fn from(unanswered: Unanswered) -> Self {
        match unanswered {
            Unanswered::App(error) => Self::App(error),
            Unanswered::Unusable => Self::Upstream(StatusCode::BAD_GATEWAY),
        }
    }
}

/// What is understood of a request so far; filled in as the phases pass.
struct Understood<'a> {
    occasion: Occasion<'a>,
    trace: Place,
    caller: Option<Caller>,
    mapped: Option<Mapped>,
    said: Said,
    known: Known,
}

impl Handler for Inbound {
    async fn plain(&self, stream: TlsStream<Buffered>, peer: Peer, remote: SocketAddr, scope: &Scope) {
        self.tcp.serve(stream, peer, remote, scope).await;
    }

    async fn handle(self: Arc<Self>, connection: Arc<Connection>, request: Request<Body>) -> Response<Body> {
        let started = self.clock.now();
        if let Some(noted) = &connection.noted {
            noted.count_request();
        }
        let (method, target) = (request.method().clone(), request.uri().clone());
        let is_call = grpc::is_call(request.headers());
        let Ok(receipt) = self.receipts.draw() else {
            // Without randomness nothing can be recorded so that it is found again: answer nobody.
            return answer::failed(StatusCode::SERVICE_UNAVAILABLE, &self.service, &"no randomness");
        };
        let trace = Place { parent: TraceParent::from_headers(request.headers()), span: None };
        let occasion = Occasion {
            receipt,
            now: started,
            layer: Layer::Sidecar,
            method: method.as_str(),
            target: target.path_and_query().map_or("", |target| target.as_str()),
            transaction: None,
            trace_id: trace.parent.map(|parent| parent.trace_id),
        };
        let mut understood = Understood {
            occasion,
            trace,
            caller: None,
            mapped: None,
            said: Said::default(),
            known: Known::default(),
        };
        let outcome = self.request(&connection, request, &mut understood).await;
        let ended = self.ended(outcome, &understood);
        let now = self.clock.now();
        let took = now.saturating_sub(started);
        let status = if is_call { grpc::status(&ended.response) } else { ended.response.status() };
        let peer = connection.peer.as_ref().map_or("", |peer| peer.id().as_str());
        let mapped = understood.mapped.as_ref();
        let route = mapped.map_or("", Mapped::route);
        self.metrics.observe(&Observation { direction: Direction::Inbound, peer, route, status, took });
        if self.watchers.listen() {
            let user = understood.caller.as_ref().and_then(|caller| caller.user.as_ref());
            let seen = Finished {
                direction: Direction::Inbound,
                trace: understood.trace,
                peer,
                service: "",
                user: user.map_or("", |user| &user.id),
                method: &method,
                path: target.path(),
                route,
                action: mapped.map_or("", Mapped::action),
                objects: &Listed(mapped.map_or(&[], Mapped::objects)),
                verdict: ended.verdict,
                rule: &ended.by,
                receipt: understood.occasion.receipt.as_str(),
                status,
                took,
                note: ended.note.as_ref().map_or(&"" as &dyn Display, |note| note),
            };
            self.watchers.tell(&seen, now);
        }
        match ended.by {
            By::Denial(denial) if is_call => answer::denied_call(&denial),
            By::Nothing if is_call => answer::failed_call(status, &self.service),
            _ => ended.response,
        }
    }

    fn connections(&self) -> Option<&Arc<Connections>> {
        Some(&self.connections)
    }

    fn refused(&self, remote: SocketAddr, refused: &RefusedConnection) {
        self.metrics.refused_connection(refused.rule());
        let Ok(receipt) = self.receipts.draw() else { return };
        let occasion = Occasion {
            receipt,
            now: self.clock.now(),
            layer: Layer::Sidecar,
            method: "",
            target: "",
            transaction: None,
            trace_id: None,
        };
        let denial = policy::refuse_connection(
            &self.service,
            refused.rule(),
            refused.reason(),
            Some(remote),
            &occasion,
        );
        tracing::info!(%remote, rule = refused.rule(), reason = refused.reason(), receipt = %occasion.receipt, "connection refused");
        self.recorder.record(denial.record().clone());
    }
}

impl Inbound {
    /// The path of one request.
    async fn request(
        &self,
        connection: &Connection,
        request: Request<Body>,
        understood: &mut Understood<'_>,
    ) -> Result<(Response<Body>, Permit), Stop> {
        let (mut parts, body) = request.into_parts();
        // One policy version judges the whole request, whatever is loaded meanwhile.
        let policy = self.policy.load_full();
        // An agent that gave us somebody else's identity is misconfigured: serve nothing in that name.
        let now = understood.occasion.now;
        let identity = self.source.valid_at(now).filter(|identity| *identity.svid.id() == self.id);
        let identity = identity.ok_or(Stop::NotReady)?;

        // One request or several? What two parsers could read differently is refused unread.
        let upgrade = match headers::check_framing_of_upgrade(&parts) {
            Ok(upgrade) => upgrade,
            Err(rule) => {
                let refusal = Refusal::malformed(rule, "two parsers could read this request differently");
                return Err(policy.refuse(None, refusal, &understood.occasion).into());
            }
        };

        // Who is it, and for whom?
        let Some(peer) = &connection.peer else {
            let refusal = Refusal::denied("tls.no_client_certificate", "the peer proved no identity");
            return Err(policy.refuse(None, refusal, &understood.occasion).into());
        };
        let chain = match transaction::verify(&self.verifier, &parts, peer.id(), &identity, now) {
            Ok(chain) => chain,
            Err(error) => {
                let caller = caller(peer, None, connection.remote);
                let refusal = Refusal::denied(transaction::rule(&error), error.to_string());
                let denial = policy.refuse(Some(&caller), refusal, &understood.occasion);
                understood.caller = Some(caller);
                return Err(denial.into());
            }
        };
        understood.occasion.transaction = chain.as_ref().map(|chain| Arc::clone(chain.transaction()));
        let caller = &*understood.caller.insert(caller(peer, chain.as_ref(), connection.remote));
        let occasion = &understood.occasion;
        let refuse = |refusal: Refusal| Stop::from(policy.refuse(Some(caller), refusal, occasion));

        // What do they want?
        let mapped = policy.map(&parts).map_err(refuse)?;
        if policy.mode(occasion.now) == Mode::Enforce {
            policy.screen(caller, &mapped, occasion)?;
        }
        if let Some(limit) = &self.limit {
            limit_to(limit, mapped.route(), peer, caller)?;
        }
        let (mapped, body) = match &upgrade {
            // What the client says in the other protocol, once it is spoken.
            Some(protocol) => {
                let body = Relay::body(body, Bound::Endless, ());
                (upgraded(mapped, protocol).map_err(refuse)?, Carried::Body(body))
            }
            None => self.body(mapped, &parts, body, &mut understood.said).await.map_err(refuse)?,
        };
        let mapped = &*understood.mapped.insert(mapped);

        // From here on the app may be asked something, and its calls travel on the user's behalf.
        let span = *understood.trace.span.insert(self.spans.child(understood.trace.parent));
        self.dress(&mut parts, connection, peer, chain.as_ref(), span);
        headers::ask_upgrade(&mut parts.headers, upgrade.as_ref());
        let remembered = self.correlator.remember(span, chain);
        let relations = match policy.relations_max_age().filter(|_| mapped.asks_relations()) {
            Some(max_age) => {
                let told = Box::pin(self.relations.tell(max_age, mapped, &parts.headers));
                Some(told.await.map_err(refuse)?)
            }
            None => None,
        };

        // May they? Then forward. What few requests need is boxed: each holds room for the largest of all.
        if mapped.lists() {
            let mut told = Attributes::none();
            if mapped.attributes_from() == AttributeSource::Entities {
                let asked = entities::ask(&self.app, &self.service, mapped, span, &self.clock);
                told = Box::pin(asked).await?.map_err(refuse)?;
            }
            let known = Known::of(relations, told);
            let permit = permitted(policy.decide(caller, mapped, &known.all, occasion))?;
            let (body, _faults) = self.judged(body, connection, &policy, mapped, caller, &known, occasion);
            let held = Box::pin(self.ask(Request::from_parts(parts, body), remembered)).await?;
            let held = held.filtered(&policy, caller, mapped, occasion).map_err(refuse)?;
            understood.known = known;
            return Ok((held.release(&permit), permit));
        }
        match mapped.attributes_from() {
            from @ (AttributeSource::Known | AttributeSource::Entities) => {
                let mut told = Attributes::none();
                if from == AttributeSource::Entities {
                    let asked = entities::ask(&self.app, &self.service, mapped, span, &self.clock);
                    told = Box::pin(asked).await?.map_err(refuse)?;
                }
                let known = Known::of(relations, told);
                let (permit, mapped, body) =
                    match permitted(policy.decide(caller, mapped, &known.all, occasion)) {
                        Ok(permit) => (permit, mapped, body),
                        // Of a batch, what they may have.
                        Err(denial) => {
                            let said = &mut understood.said;
                            let Kept { permit, mapped, body: left } =
                                policy.keep(denial, &said.bytes, caller, mapped, &known.all, occasion)?;
                            said.bytes = left.into();
                            let body = body.shortened(&said.bytes);
                            headers::body_changed(&mut parts.headers, body.len());
                            (permit, &*understood.mapped.insert(mapped), body)
                        }
                    };
                let (body, faults) = self.judged(body, connection, &policy, mapped, caller, &known, occasion);
                understood.known = known;
                let request = Request::from_parts(parts, body);
                let response = self.forward(&permit, request, upgrade.as_ref(), faults).await?;
                let response = self.released(response, remembered, connection, &policy, understood);
                Ok((response, permit))
            }
            AttributeSource::Response => {
                // What is safe to ask takes no body of messages.
                let (body, _faults) =
                    self.judged(body, connection, &policy, mapped, caller, &Known::default(), occasion);
                let held = Box::pin(self.ask(Request::from_parts(parts, body), remembered)).await?;
                let known = Known::of(relations, held.attributes(mapped).map_err(refuse)?);
                let permit = permitted(policy.decide(caller, mapped, &known.all, occasion))?;
                understood.known = known;
                Ok((held.release(&permit), permit))
            }
        }
    }

    /// Reads the body where the mapping needs it, bounds it where it does not, refuses it where none belongs.
    /// What of it has a part in what the request means is `said`.
    async fn body(
        &self,
        mapped: Mapped,
        parts: &Parts,
        body: Body,
        said: &mut Said,
    ) -> Result<(Mapped, Carried), Refusal> {
        let has_body = body.whole() != Some(&[]);
        match mapped.body() {
            // An empty body may still be announced as one that streams.
            BodyRule::None if has_body => match Box::pin(self.collect(body, 0)).await {
                Ok(_nothing) => Ok((mapped, Carried::Body(empty()))),
                Err(_some) => Err(Refusal::malformed("request.body", "this route takes no body")),
            },
            BodyRule::None => Ok((mapped, Carried::Body(empty()))),
            BodyRule::Opaque { max_bytes } => {
                // A stream of messages may go on for ever, if its app reads it as one.
                let messages = self.app.speaks_http2() && grpc::is_call(&parts.headers);
                let max_bytes = max_bytes as u64;
                if messages {
                    let faults = Faults::default();
                    let bound = Bound::messages(max_bytes, Arc::clone(&faults));
                    return Ok((mapped, Carried::Call { body: Relay::body(body, bound, ()), faults }));
                }
                Ok((mapped, Carried::Body(Relay::body(body, Bound::Bytes(max_bytes), ()))))
            }
            BodyRule::Json { max_bytes } => {
                plain_type(parts, "application/json")?;
                let bytes = Box::pin(self.collect(body, max_bytes)).await?;
                *said = Said { bytes: bytes.clone(), kind: parts.headers.get(CONTENT_TYPE).cloned() };
                Ok((mapped.with_body(&bytes)?, Carried::Body(full(bytes))))
            }
            BodyRule::Grpc { max_bytes, .. } => {
                said.kind = parts.headers.get(CONTENT_TYPE).cloned();
                Box::pin(self.first_message(mapped, body, max_bytes, said)).await
            }
            BodyRule::Form { max_bytes } => {
                plain_type(parts, "application/x-www-form-urlencoded")?;
                let bytes = Box::pin(self.collect(body, max_bytes)).await?;
                *said = Said { bytes: bytes.clone(), kind: parts.headers.get(CONTENT_TYPE).cloned() };
                Ok((mapped.with_body(&bytes)?, Carried::Body(full(bytes))))
            }
        }
    }

    /// The first message of a call, which says what is asked; those that follow are judged as they come.
    async fn first_message(
        &self,
        mapped: Mapped,
        body: Body,
        max_bytes: usize,
        said: &mut Said,
    ) -> Result<(Mapped, Carried), Refusal> {
        let mut rest = Messages::new(body, max_bytes);
        let first = tokio::select! {
            first = rest.next() => first,
            () = self.clock.sleep(FIRST_MESSAGE_TIMEOUT) => {
                return Err(Refusal::malformed("request.body", "the call's first message took too long"));
            }
        };
        let first = match first {
            Some(first) => first.map_err(|error| error.refusal())?,
            None => return Err(Refusal::malformed("request.body", "the call has no message")),
        };
        let unjudged = mapped.clone();
        said.bytes = first.payload();
        Ok((mapped.with_body(&said.bytes)?, Carried::Begun(Box::new(Begun { first, rest, unjudged }))))
    }

    /// What is passed on, and where it leaves word should it have to be ended.
    #[expect(clippy::too_many_arguments, reason = "what a decision is made of, to be asked for again")]
    fn judged(
        &self,
        carried: Carried,
        connection: &Connection,
        policy: &Arc<ServicePolicy>,
        mapped: &Mapped,
        caller: &Caller,
        known: &Known,
        occasion: &Occasion<'_>,
    ) -> (Body, Option<Faults>) {
        match carried {
            Carried::Body(body) => (body, None),
            Carried::Call { body, faults } if body.whole().is_some() => (body, Some(faults)),
            Carried::Call { body, faults } => {
                // It may go on for long before there is an answer, and nothing that it says is judged.
                let Some(peer) = &connection.peer else { return (body, Some(faults)) };
                let facts = facts(peer, connection, occasion);
                let asked = asked(occasion, caller, mapped, &Said::default(), known);
                let word = Some(Arc::clone(&faults));
                (self.streams.watch(body, facts, policy, asked, word), Some(faults))
            }
            Carried::Begun(begun) => {
                let Begun { first, rest, unjudged } = *begun;
                let faults = Faults::default();
                let judge =
                    self.judge_of_messages((Arc::clone(policy), unjudged), mapped, caller, known, occasion);
                (Judged::body(first, rest, judge, Arc::clone(&faults)), Some(faults))
            }
        }
    }

    /// Decides about each message of a call after its first, by the policy that is in force then and what the relations
    /// say then; the call has `begun` under one, which mapped it.
    fn judge_of_messages(
        &self,
        mut begun: (Arc<ServicePolicy>, Mapped),
        first: &Mapped,
        caller: &Caller,
        known: &Known,
        occasion: &Occasion<'_>,
    ) -> Judge {
        let (policy, receipts, clock) =
            (Arc::clone(&self.policy), Arc::clone(&self.receipts), self.clock.clone());
        let (recorder, metrics) = (Arc::clone(&self.recorder), Arc::clone(&self.metrics));
        let (caller, known, trace_id) = (caller.clone(), known.clone(), occasion.trace_id);
        let relations = Arc::clone(&self.relations);
        let (method, target) = (occasion.method.to_owned(), occasion.target.to_owned());
        let transaction = occasion.transaction.clone();
        let kind = HeaderValue::from_static("application/grpc");
        // The app, or the relations, have told of these objects and of no other.
        let told_of = match first.attributes_from() {
            AttributeSource::Entities => Some(first.objects().to_vec()),
            _ if first.asks_relations() => Some(first.objects().to_vec()),
            AttributeSource::Known | AttributeSource::Response => None,
        };
        Box::new(move |message| {
            let policy = policy.load_full();
            // Without randomness nothing can be recorded so that it is found again: nothing more is let through.
            let receipt = receipts.draw().map_err(|_| Fault::Unrecorded)?;
            let occasion = Occasion {
                receipt,
                now: clock.now(),
                layer: Layer::Sidecar,
                method: &method,
                target: &target,
                transaction: transaction.clone(),
                trace_id,
            };
            let refuse = |refusal| policy.refuse(Some(&caller), refusal, &occasion);
            let denied = |denial: Denial| {
                metrics.denied(denial.rule().name().to_owned());
                recorder.record(denial.record().clone());
                Fault::Denied(Box::new(denial))
            };
            let decide = |mapped: &Mapped| {
                if told_of.as_ref().is_some_and(|objects| objects != mapped.objects()) {
                    let reason = "a later message is about another object than the first";
                    return Err(refuse(Refusal::denied("request.stream_object", reason)));
                }
                let attributes = known.under(&policy, mapped, |max_age| relations.tell_now(max_age, mapped));
                permitted(policy.decide(&caller, mapped, &attributes, &occasion)).map(drop)
            };
            if !Arc::ptr_eq(&begun.0, &policy) {
                // A request is judged by the policy that mapped it.
                let again = map_again(&policy, &method, &target, Some(&kind)).map_err(refuse);
                begun = (Arc::clone(&policy), again.map_err(&denied)?);
            }
            let unjudged = &begun.1;
            let verdict = match message {
                Err(error) => Err(refuse(error.refusal())),
                Ok(_) if matches!(unjudged.body(), BodyRule::Grpc { streams: false, .. }) => {
                    Err(refuse(Refusal::malformed("request.body", "the method takes one message")))
                }
                Ok(payload) => {
                    unjudged.clone().with_body(payload).map_err(refuse).and_then(|mapped| decide(&mapped))
                }
            };
            verdict.map_err(denied)
        })
    }

    async fn collect(&self, body: Body, max_bytes: usize) -> Result<Bytes, Refusal> {
        match body::whole(body, max_bytes, &self.clock).await {
            Some(body) if body.trailers().is_none() => Ok(body.to_bytes()),
            Some(_) => Err(Refusal::malformed("request.trailers", "trailers cannot belong to a mapped body")),
            None => Err(Refusal::malformed(
                "request.body_size",
                "the body is over its limit, was cut short or took too long",
            )),
        }
    }

    /// Takes off what the caller claims, puts on what was proved.
    fn dress(
        &self,
        parts: &mut Parts,
        connection: &Connection,
        peer: &Peer,
        chain: Option<&Chain>,
        span: TraceParent,
    ) {
        let authority = parts.uri.authority().map(|authority| authority.as_str().to_owned());
        let headers = &mut parts.headers;
        headers::strip_hop_by_hop(headers);
        headers::strip_identity(headers);
        headers.insert(&headers::TRACEPARENT, span.header_value());
        if let Some(host) = authority.and_then(|authority| HeaderValue::try_from(authority).ok()) {
            headers.insert(HOST, host);
        }
        // SPIFFE IDs are of a restricted alphabet, users were header values before; what is not one is left out.
        let client = connection
            .forwarded
            .get_or_init(|| HeaderValue::try_from(format!("By={};URI={}", self.id, peer.id())).ok());
        if let Some(client) = client {
            headers.insert(&headers::FORWARDED_CLIENT_CERT, client.clone());
        }
        if let Some(user) = chain.and_then(|chain| HeaderValue::try_from(chain.user().id.as_str()).ok()) {
            headers.insert(&headers::FORWARDED_USER, user);
        }
    }

    /// Hands a permitted request to the app.
    async fn forward(
        &self,
        _permit: &Permit,
        request: Request<Body>,
        upgrade: Option<&HeaderValue>,
        faults: Option<Faults>,
    ) -> Result<Response<Body>, Stop> {
        let outcome = self.app.send(request).await;
        // What became of a call that was ended on its way is for its caller to hear, not what the app made of it.
        let fault = faults.as_ref().and_then(|faults| faults.get());
        let mut response = match (outcome, fault) {
            (Ok(response), Some(_)) if response.body().whole().is_none() => response,
            (_, Some(fault)) => return Err(fault.clone().into()),
            (outcome, None) => outcome?,
        };
        headers::strip_answer(&mut response, upgrade);
        Ok(match faults {
            Some(faults) => response.map(|body| messages::answer_to(body, faults)),
            None => response,
        })
    }

    /// An answer on its way to who may have it, for as long as they may.
    fn released(
        &self,
        response: Response<Body>,
        remembered: Remembered,
        connection: &Connection,
        policy: &Arc<ServicePolicy>,
        understood: &Understood<'_>,
    ) -> Response<Body> {
        let Understood { occasion, caller: Some(caller), mapped: Some(mapped), said, known, .. } = understood
        else {
            return response;
        };
        let Some(peer) = connection.peer.as_ref().filter(|_| response.body().whole().is_none()) else {
            return response;
        };
        let asked = asked(occasion, caller, mapped, said, known);
        let facts = facts(peer, connection, occasion);
        response.map(|body| {
            let body = Relay::body(body, Bound::Endless, remembered);
            self.streams.watch(body, facts, policy, asked, None)
        })
    }

    /// Asks the app for a safe request's answer and holds it: whose object it is stands inside.
    async fn ask(&self, mut request: Request<Body>, remembered: Remembered) -> Result<Held, Stop> {
        let conditions = [IF_MATCH, IF_NONE_MATCH, IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE, IF_RANGE];
        for name in [ACCEPT_ENCODING, RANGE].into_iter().chain(conditions) {
            // A compressed, partial or absent body could not be judged, and the owner would be denied.
            request.headers_mut().remove(name);
        }
        let head_only = request.method() == Method::HEAD;
        if head_only {
            *request.method_mut() = Method::GET;
        }
        let response = self.app.send(request).await?;
        let (mut parts, body) = response.into_parts();
        headers::strip_hop_by_hop(&mut parts.headers);
        if parts.status.is_server_error() {
            return Err(Stop::Upstream(parts.status));
        }
        let Some(body) = body::whole(body, MAX_HELD_RESPONSE_BYTES, &self.clock).await else {
            return Err(Stop::Upstream(StatusCode::BAD_GATEWAY));
        };
        let body = body.to_bytes();
        Ok(Held { parts, body, head_only, _remembered: remembered })
    }

    /// Answers, counts and records however the request ended.
    fn ended(&self, outcome: Result<(Response<Body>, Permit), Stop>, understood: &Understood<'_>) -> Ended {
        let failed = |status, cause: &dyn Display| Ended {
            response: answer::failed(status, &self.service, cause),
            verdict: "error",
            by: By::Nothing,
            note: Some(cause.to_string()),
        };
        match outcome {
            Ok((response, permit)) => {
                let note = permit.left_out().map(str::to_owned);
                let sampled =
                    permit.is_audited() || note.is_some() || self.sampler.take(understood.occasion.now);
                if let (true, Some(caller), Some(mapped)) = (sampled, &understood.caller, &understood.mapped)
                {
                    let (attributes, occasion) = (&understood.known.all, &understood.occasion);
                    self.recorder.record(permit.record(caller, mapped, attributes, occasion));
                }
                Ended { response, verdict: "allow", by: By::Permit(permit), note }
            }
            Err(Stop::Denied(denial)) => {
                self.metrics.denied(denial.rule().name().to_owned());
                self.recorder.record(denial.record().clone());
                let note = Some(denial.reason().to_owned());
                Ended { response: answer::denied(&denial), verdict: "deny", by: By::Denial(denial), note }
            }
            Err(Stop::Ended(denial)) => {
                let note = Some(denial.reason().to_owned());
                Ended { response: answer::denied(&denial), verdict: "deny", by: By::Denial(denial), note }
            }
            Err(Stop::TooLarge) => failed(StatusCode::PAYLOAD_TOO_LARGE, &"a message is over its limit"),
            Err(Stop::App(error)) => failed(error.status(), &error),
            Err(Stop::Upstream(status)) => failed(status, &"the app's answer could not be judged"),
            Err(Stop::Limited(headers)) => {
                let mut ended = failed(Quota::STATUS, &"more requests than the rate limit lets through");
                ended.response.headers_mut().extend(*headers);
                ended
            }
            Err(Stop::NotReady) => {
                failed(StatusCode::SERVICE_UNAVAILABLE, &"no valid identity of this service's own")
            }
        }
    }
}

/// Counts a request of somebody who is known, whatever becomes of it.
fn limit_to(limit: &LocalLimit, route: &str, peer: &Peer, caller: &Caller) -> Result<(), Stop> {
    let user = caller.user.as_ref().map(|user| user.id.as_str());
    let quota = limit.take(route, peer.id().as_str(), user);
    if quota.allowed {
        return Ok(());
    }
    let [policy, left] = limit.headers(quota);
    Err(Stop::Limited(Box::new([policy, left, quota.retry_after()])))
}

/// What an app says in headers of the answer as it was: how many there are, where the next page is, what it hashes to.
const OF_THE_WHOLE_LIST: [&str; 9] = [
    "etag",
    "last-modified",
    "content-md5",
    "digest",
    "content-digest",
    "repr-digest",
    "content-range",
    "link",
    "x-total-count",
];

/// An answer of the app that nobody has been permitted to see yet.
struct Held {
    parts: http::response::Parts,
    body: Bytes,
    head_only: bool,
    _remembered: Remembered,
}

impl Held {
    /// What the answer says of its object. An answer that is no success says nothing, and a missing
    /// attribute denies: so a stranger cannot tell an object that is not theirs from one that is not there.
    fn attributes(&self, mapped: &Mapped) -> Result<Attributes, Refusal> {
        let compressed = self.parts.headers.contains_key(CONTENT_ENCODING);
        if !self.parts.status.is_success() || compressed {
            return Ok(Attributes::default());
        }
        mapped.attributes_from_response(&self.body)
    }

    /// The answer without the objects that the caller may not see, nor what is said of them elsewhere in it. An answer
    /// that is no success lists nothing.
    fn filtered(
        mut self,
        policy: &ServicePolicy,
        caller: &Caller,
        mapped: &Mapped,
        occasion: &Occasion<'_>,
    ) -> Result<Self, Refusal> {
        if !self.parts.status.is_success() {
            return Ok(self);
        }
        if self.parts.headers.contains_key(CONTENT_ENCODING) {
            return Err(Refusal::denied(
                "list.answer",
                "the app's answer is compressed and cannot be judged",
            ));
        }
        let filtered = policy.filter(caller, mapped, &self.body, occasion)?;
        for name in OF_THE_WHOLE_LIST {
            self.parts.headers.remove(name);
        }
        if filtered.withheld > 0 {
            tracing::debug!(kept = filtered.kept, withheld = filtered.withheld, "an answer was filtered");
        }
        self.body = filtered.body.into();
        Ok(self)
    }

    fn release(self, _permit: &Permit) -> Response<Body> {
        let mut parts = self.parts;
        parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(self.body.len()));
        let body = if self.head_only { empty() } else { full(self.body) };
        Response::from_parts(parts, body)
    }
}

pub(crate) fn permitted(verdict: Verdict) -> Result<Permit, Denial> {
    match verdict {
        Verdict::Permit(permit) => Ok(permit),
        Verdict::Deny(denial) => denial.audited(),
    }
}

/// A decision, to be asked for again.
fn asked(occasion: &Occasion<'_>, caller: &Caller, mapped: &Mapped, said: &Said, known: &Known) -> Asked {
    Asked {
        method: occasion.method.to_owned(),
        target: occasion.target.to_owned(),
        transaction: occasion.transaction.clone(),
        trace_id: occasion.trace_id,
        caller: caller.clone(),
        said: said.clone(),
        mapped: mapped.clone(),
        known: known.clone(),
    }
}

/// What is known of a stream when it begins.
fn facts(peer: &Peer, connection: &Connection, occasion: &Occasion<'_>) -> Facts {
    Facts { kind: Kind::Stream, peer: peer.clone(), remote: connection.remote, since: occasion.now }
}

fn caller(peer: &Peer, chain: Option<&Chain>, remote: SocketAddr) -> Caller {
    Caller {
        principal: Principal::Workload(peer.id().clone()),
        user: chain.map(|chain| Arc::clone(chain.user())),
        chain: chain.map(|chain| Arc::clone(chain.hops())).unwrap_or_default(),
        address: Some(remote),
    }
}

/// An upgrade is to what the route lets it be to: nobody judges what is said afterwards.
pub(crate) fn upgraded(mapped: Mapped, protocol: &HeaderValue) -> Result<Mapped, Refusal> {
    let named =
        mapped.upgrade().is_some_and(|named| protocol.as_bytes().eq_ignore_ascii_case(named.as_bytes()));
    let refusal = || Refusal::malformed("request.upgrade", "the map names no such `upgrade` for this route");
    if named { Ok(mapped) } else { Err(refusal()) }
}

/// Objects, joined by commas.
pub(crate) struct Listed<'a>(pub(crate) &'a [ObjectRef]);

impl Display for Listed<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (place, object) in self.0.iter().enumerate() {
            let comma = if place > 0 { "," } else { "" };
            write!(f, "{comma}{object}")?;
        }
        Ok(())
    }
}

/// A body is judged in one encoding only: its plain type, UTF-8, uncompressed (acceptance policy 20).
fn plain_type(parts: &Parts, expected: &str) -> Result<(), Refusal> {
    let refuse = |why| Err(Refusal::malformed("request.content_type", why));
    if parts.headers.contains_key(CONTENT_ENCODING) {
        return refuse("a compressed body cannot be judged");
    }
    let mut types = parts.headers.get_all(CONTENT_TYPE).iter();
    let (Some(value), None) = (types.next().and_then(|value| value.to_str().ok()), types.next()) else {
        return refuse("exactly one content type is needed");
    };
    let (essence, parameters) = value.split_once(';').unwrap_or((value, ""));
    let parameters = parameters.trim();
    if !essence.trim().eq_ignore_ascii_case(expected) {
        return refuse("the route takes another content type");
    }
    if !(parameters.is_empty() || parameters.eq_ignore_ascii_case("charset=utf-8")) {
        return refuse("only charset=utf-8 is taken");
    }
    Ok(())
}
