//! The outbound half: one loopback listener for each service that the app calls.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;

use http::request::Parts;
use http::{HeaderValue, Request, Response, StatusCode};
use identity::clock::SharedClock;
use identity::txn::{self, Chain, RequestBinding};
use identity::{IdentitySource, Scope, SpiffeId};
use thiserror::Error;

use crate::access::Finished;
use crate::app::{Bound, Relay};
use crate::callee::Callee;
use crate::correlate::{Correlator, Found};
use crate::headers::{self, TraceParent};
use crate::metrics::{Direction, Metrics, Observation};
use crate::server::{Connection, Handler};
use crate::trace::{Place, Spans};
use crate::upstream::{Upstream, UpstreamError};
use crate::watchers::Watchers;
use crate::{Body, answer, grpc};

/// Everything one outbound listener needs.
pub struct Outbound {
    pub(crate) callee: Callee,
    /// For what goes on when a call has been answered.
    pub(crate) scope: Scope,
    pub(crate) correlator: Arc<Correlator>,
    pub(crate) source: IdentitySource,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: SharedClock,
    pub(crate) spans: Arc<Spans>,
    pub(crate) watchers: Arc<Watchers>,
}

/// Why a call of the app went no further than its own sidecar.
#[derive(Debug, Error)]
enum CallError {
    #[error("the request is ambiguous: {0}")]
    Framing(&'static str),
    #[error("outbound listeners serve this machine only")]
    NotLocal,
    #[error("several requests with different users share this trace id; send the traceparent you were given")]
    AmbiguousUser,
    #[error("no valid identity yet")]
    NoIdentity,
    #[error("the transaction token cannot be extended: {0}")]
    Token(#[from] txn::TxnError),
    #[error("{0}")]
    Upstream(#[from] UpstreamError),
    #[error("a fault made on purpose: `faults` of this service's traffic")]
    Fault(StatusCode),
}

impl CallError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Framing(_) => StatusCode::BAD_REQUEST,
            Self::NotLocal | Self::AmbiguousUser => StatusCode::FORBIDDEN,
            Self::NoIdentity => StatusCode::SERVICE_UNAVAILABLE,
            Self::Token(_) => StatusCode::BAD_GATEWAY,
            Self::Upstream(error) => error.status(),
            Self::Fault(status) => *status,
        }
    }
}

impl Handler for Outbound {
    async fn handle(self: Arc<Self>, connection: Arc<Connection>, request: Request<Body>) -> Response<Body> {
        let started = self.clock.now();
        let (method, target) = (request.method().clone(), request.uri().clone());
        let is_call = grpc::is_call(request.headers());
        let mut trace = Place { parent: TraceParent::from_headers(request.headers()), span: None };
        let mut called = None;
        let outcome = self.call(connection.remote, request, &mut trace, &mut called).await;
        let upstream = called.unwrap_or(self.callee.upstream());
        let status = match &outcome {
            Ok(response) if is_call => grpc::status(response),
            Ok(response) => response.status(),
            Err(error) => error.status(),
        };
        let now = self.clock.now();
        let took = now.saturating_sub(started);
        self.metrics.observe(&Observation {
            direction: Direction::Outbound,
            peer: upstream.service(),
            route: "",
            status,
            took,
        });
        if self.watchers.listen() {
            let error = outcome.as_ref().err();
            let seen = Finished {
                direction: Direction::Outbound,
                trace,
                peer: upstream.id().as_str(),
                service: upstream.service(),
                method: &method,
                path: target.path(),
                verdict: if error.is_some() { "error" } else { "" },
                status,
                took,
                note: error.map_or(&"" as &dyn Display, |error| error),
                ..Finished::default()
            };
            self.watchers.tell(&seen, now);
        }
        outcome.unwrap_or_else(|error| {
            let service = self.callee.service();
            let failed = answer::failed(status, service, &error);
            if is_call { answer::failed_call(status, service) } else { failed }
        })
    }
}

impl Outbound {
    /// One call of the app, from its own words to the callee's answer; `called` is who that was.
    async fn call<'a>(
        &'a self,
        remote: SocketAddr,
        request: Request<Body>,
        trace: &mut Place,
        called: &mut Option<&'a Upstream>,
    ) -> Result<Response<Body>, CallError> {
        let (mut parts, body) = request.into_parts();

        // Is it one request, from this machine?
        if !remote.ip().is_loopback() {
            return Err(CallError::NotLocal);
        }
        let upgrade = headers::check_framing_of_upgrade(&parts).map_err(CallError::Framing)?;

        // On whose behalf?
        let chain = match self.correlator.find(trace.parent) {
            Found::Nobody => None,
            Found::Behalf(chain) => Some(chain),
            Found::Ambiguous => return Err(CallError::AmbiguousUser),
        };

        // Nothing that the app says about identity goes out; what we know does.
        headers::strip_hop_by_hop(&mut parts.headers);
        headers::strip_identity(&mut parts.headers);
        let span = *trace.span.insert(self.spans.child(trace.parent));
        parts.headers.insert(&headers::TRACEPARENT, span.header_value());
        headers::ask_upgrade(&mut parts.headers, upgrade.as_ref());

        // Who gets it, and who a copy? A token is for one of them.
        let user = chain.as_ref().map(|chain| chain.user().id.as_str());
        let upstream = &**called.insert(self.callee.choose(&parts.headers, remote.ip(), user));
        let key = upstream.key(&parts.headers, remote.ip(), user);
        let body = Relay::body(body, Bound::Endless, ());
        if let (None, Some(mut copy)) = (&upgrade, self.callee.copy(&parts, &body)) {
            self.vouch(&mut copy.head, chain.as_ref(), copy.upstream)?;
            copy.send(&self.scope);
        }
        self.vouch(&mut parts, chain.as_ref(), upstream)?;

        let (delay, abort) = self.callee.fault(&parts.headers);
        if let Some(delay) = delay {
            self.clock.sleep(delay).await;
        }
        if let Some(status) = abort {
            return Err(CallError::Fault(status));
        }

        // Call on, over mTLS, to exactly the identity that was meant.
        let mut response = upstream.send_keyed(Request::from_parts(parts, body), key).await?;
        headers::strip_answer(&mut response, upgrade.as_ref());
        Ok(response)
    }

    /// Says on whose behalf, to this one only.
    fn vouch(&self, head: &mut Parts, chain: Option<&Chain>, to: &Upstream) -> Result<(), CallError> {
        let Some(chain) = chain else { return Ok(()) };
        let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
        let binding = RequestBinding::new(head.method.as_str(), target);
        let token = self.extend(chain, to.id(), binding)?;
        head.headers.insert(&headers::TXN_TOKEN, token);
        Ok(())
    }

    fn extend(
        &self,
        chain: &Chain,
        to: &SpiffeId,
        binding: RequestBinding,
    ) -> Result<HeaderValue, CallError> {
        let now = self.clock.now();
        let identity = self.source.valid_at(now).ok_or(CallError::NoIdentity)?;
        let token = txn::extend(chain, &identity.svid, to, binding, now)?;
        let mut value = HeaderValue::try_from(token).map_err(|_| CallError::Token(txn::TxnError::Form))?;
        value.set_sensitive(true);
        Ok(value)
    }
}
