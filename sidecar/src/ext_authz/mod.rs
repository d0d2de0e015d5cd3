//! Envoy's external authorization (`envoy.service.auth.v3.Authorization`) as a server: whoever keeps Envoy
//! asks here, and hears our per-object decisions.
//!
//! [`ExtAuthz::decide`] is the same straight line as the inbound half's: one request or several? who is it,
//! for whom, what do they want, may they. The difference is who forwards. So everything rests on deciding
//! about exactly what Envoy will forward ([`request`]), and on telling it what to take off and put on
//! ([`response`]). What only the app's answer would tell cannot be decided here, and is denied.

mod listen;
mod request;
mod response;
mod service;
#[cfg(test)]
mod tests;

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{HeaderName, HeaderValue, Method, StatusCode};
use identity::clock::SharedClock;
use identity::txn::{Chain, Verifier};
use identity::{IdentitySource, Scope, SpiffeId};
use policy::{
    AttributeSource, Attributes, Caller, Denial, Layer, Mapped, Mode, Occasion, Permit, Principal, Receipts,
    Recorder, Refusal, ServicePolicy,
};

use crate::access::Finished;
use crate::app::{App, AppProtocol};
use crate::entities::{self, Unanswered};
use crate::headers::{self, TraceParent};
use crate::inbound::{Listed, permitted};
use crate::metrics::{Direction, Metrics, Observation};
use crate::relations::Relations;
use crate::sample::Sampler;
use crate::server::Limits;
use crate::trace::{Place, Spans};
use crate::watchers::Watchers;
use crate::{SidecarError, answer, transaction};

pub use listen::{BoundDoor, Door, DoorError};
use request::Described;
use response::Dress;

/// Types generated from `proto/`.
#[expect(unreachable_pub, reason = "generated code")]
mod generated {
    tonic::include_proto!("envoy.service.auth.v3");
}

/// The messages, without the names of the ones they stand in.
mod pb {
    pub(super) use super::generated::attribute_context::{HttpRequest, Peer};
    pub(super) use super::generated::{
        CheckRequest, CheckResponse, DeniedHttpResponse, HeaderValue, HeaderValueOption, HttpStatus,
        OkHttpResponse, Status, authorization_server, check_response, header_value_option,
    };
}

/// What the server is told.
#[derive(Debug)]
pub struct ExtAuthzConfig {
    /// The service before which Envoy stands: its policies decide.
    pub service: String,
    /// What may be done.
    pub policy: Arc<ServicePolicy>,
    /// Where transaction tokens may begin.
    pub gateways: Vec<SpiffeId>,
    /// Where Envoy asks.
    pub door: BoundDoor,
    /// Where the app tells its objects' attributes; without it, routes that need them are denied.
    pub entities: Option<EntitiesConfig>,
}

/// The app's entities endpoint.
#[derive(Debug, Clone)]
pub struct EntitiesConfig {
    /// Where the app listens on loopback.
    pub app: SocketAddr,
    /// What it speaks.
    pub protocol: AppProtocol,
    /// Longest wait for its answer's head.
    pub timeout: Duration,
}

/// What decides, shared with the inbound half where there is one.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) policy: Arc<ArcSwap<ServicePolicy>>,
    pub(crate) verifier: Arc<Verifier>,
    pub(crate) source: IdentitySource,
    pub(crate) recorder: Arc<dyn Recorder>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: SharedClock,
    pub(crate) receipts: Arc<Receipts>,
    pub(crate) spans: Arc<Spans>,
    pub(crate) relations: Arc<Relations>,
}

/// Decides for Envoys.
struct ExtAuthz {
    service: String,
    /// The service's identity: whom transaction tokens must be meant for.
    id: SpiffeId,
    app: Option<App>,
    shared: Shared,
    sampler: Sampler,
    watchers: Arc<Watchers>,
}

/// Starts the server as tasks of `scope`; it ends when that drains.
pub(crate) fn start(
    config: ExtAuthzConfig,
    id: SpiffeId,
    shared: Shared,
    watchers: Arc<Watchers>,
    limits: &Limits,
    scope: &Scope,
) -> Result<(), SidecarError> {
    let (source, metrics, clock) = (shared.source.clone(), Arc::clone(&shared.metrics), shared.clock.clone());
    let app = match config.entities {
        Some(EntitiesConfig { app, protocol, timeout }) => {
            Some(App::new(app, protocol, timeout, clock.clone(), scope)?)
        }
        None => None,
    };
    let connections = config.door.accept(&source, metrics, limits, clock.clone(), scope)?;
    let ext_authz =
        ExtAuthz { service: config.service, id, app, shared, sampler: Sampler::default(), watchers };
    service::serve(Arc::new(ext_authz), connections, scope);
    Ok(())
}

/// What of a policy cannot be decided for Envoy, a sentence each; all of it is denied.
pub fn undecidable(policy: &ServicePolicy, entities: bool) -> Vec<String> {
    let routes = policy.routes();
    let of = |wanted: AttributeSource| {
        let routes: Vec<&str> =
            routes.iter().filter(|(_, source)| *source == wanted).map(|(route, _)| route.as_str()).collect();
        (!routes.is_empty()).then(|| routes.join(", "))
    };
    let response = of(AttributeSource::Response).map(|routes| {
        format!("ext_authz denies {routes}: their objects' attributes stand in the app's answer, which Envoy does not show (ext_authz.response_attributes)")
    });
    let asked = of(AttributeSource::Entities).filter(|_| !entities).map(|routes| {
        format!("ext_authz denies {routes}: their objects' attributes are the app's to tell, and no address of it is configured (ext_authz.entities_address)")
    });
    let lists = policy.listing_routes();
    let lists = (!lists.is_empty()).then(|| {
        format!("ext_authz denies {}: what their answers list is judged object by object, and Envoy does not show it (ext_authz.list)", lists.join(", "))
    });
    response.into_iter().chain(asked).chain(lists).collect()
}

/// Why a request does not pass.
enum Stop {
    Denied(Box<Denial>),
    Failed(StatusCode, &'static str),
}

impl From<Denial> for Stop {
    fn from(denial: Denial) -> Self {
        Self::Denied(Box::new(denial))
    }
}

impl From<Unanswered> for Stop {
    fn from(unanswered: Unanswered) -> Self {
        match unanswered {
            Unanswered::App(error) => Self::Failed(error.status(), "the app tells no attributes"),
            Unanswered::Unusable => {
                Self::Failed(StatusCode::BAD_GATEWAY, "the app's attributes could not be used")
            }
        }
    }
}

/// What is understood of a request so far; filled in as the phases pass.
struct Understood<'a> {
    occasion: Occasion<'a>,
    trace: Place,
    caller: Option<Caller>,
    mapped: Option<Mapped>,
    attributes: Attributes,
}

impl ExtAuthz {
    /// Answers, counts and records one question.
    async fn check(&self, request: pb::CheckRequest) -> pb::CheckResponse {
        let started = self.shared.clock.now();
        let Ok(receipt) = self.shared.receipts.draw() else {
            // Without randomness nothing can be recorded so that it is found again: let nobody pass.
            return self.failed(StatusCode::SERVICE_UNAVAILABLE, "no randomness", "");
        };
        let described = Described::read(request);
        let occasion = Occasion {
            receipt,
            now: started,
            layer: Layer::Sidecar,
            method: described.as_ref().map_or("", |described| &described.http.method),
            target: described.as_ref().map_or("", |described| &described.http.path),
            transaction: None,
            trace_id: None,
        };
        let mut understood = Understood {
            occasion,
            trace: Place::default(),
            caller: None,
            mapped: None,
            attributes: Attributes::none(),
        };
        let outcome = self.decide(described.as_ref(), &mut understood).await;
        self.ended(outcome, &understood)
    }

    /// The path of one request.
    async fn decide(
        &self,
        described: Option<&Described>,
        understood: &mut Understood<'_>,
    ) -> Result<(Permit, Dress), Stop> {
        let Shared { verifier, source, clock, spans, relations, .. } = &self.shared;
        // One policy version judges the whole request, whatever is loaded meanwhile.
        let policy = self.shared.policy.load_full();
        let identity = source.valid_at(clock.now()).filter(|identity| *identity.svid.id() == self.id);
        let not_ready =
            || Stop::Failed(StatusCode::SERVICE_UNAVAILABLE, "no valid identity of this service's own");
        let identity = identity.ok_or_else(not_ready)?;

        // One request or several, and is it the one that will be forwarded?
        let unread =
            |refusal: Refusal, occasion: &Occasion<'_>| Stop::from(policy.refuse(None, refusal, occasion));
        let Some(described) = described else {
            let refusal =
                Refusal::malformed("ext_authz.attributes", "this is no question about an HTTP request");
            return Err(unread(refusal, &understood.occasion));
        };
        let parts = described.head().map_err(|refusal| unread(refusal, &understood.occasion))?;
        let parent = TraceParent::from_headers(&parts.headers);
        understood.trace.parent = parent;
        understood.occasion.trace_id = parent.map(|trace| trace.trace_id);
        if let Err(rule) = headers::check_framing(&parts) {
            let refusal = Refusal::malformed(rule, "two parsers could read this request differently");
            return Err(unread(refusal, &understood.occasion));
        }

        // Who is it, and for whom?
        let peer = described.peer(clock.now()).map_err(|refusal| unread(refusal, &understood.occasion))?;
        let caller = |chain: Option<&Chain>| Caller {
            principal: Principal::Workload(peer.clone()),
            user: chain.map(|chain| Arc::clone(chain.user())),
            chain: chain.map(|chain| Arc::clone(chain.hops())).unwrap_or_default(),
            address: described.address(),
        };
        let chain = match transaction::verify(verifier, &parts, &peer, &identity, clock.now()) {
            Ok(chain) => chain,
            Err(error) => {
                let caller = understood.caller.insert(caller(None));
                let refusal = Refusal::denied(transaction::rule(&error), error.to_string());
                return Err(policy.refuse(Some(caller), refusal, &understood.occasion).into());
            }
        };
        understood.occasion.transaction = chain.as_ref().map(|chain| Arc::clone(chain.transaction()));
        let caller = &*understood.caller.insert(caller(chain.as_ref()));
        let occasion = &understood.occasion;
        let refuse = |refusal: Refusal| Stop::from(policy.refuse(Some(caller), refusal, occasion));

        // What do they want?
        let mapped = policy.map(&parts).map_err(refuse)?;
        if policy.mode(occasion.now) == Mode::Enforce {
            policy.screen(caller, &mapped, occasion)?;
        }
        let mapped = described.body(mapped, &parts.headers).map_err(refuse)?;
        let mapped = &*understood.mapped.insert(mapped);

        // May they?
        let span = *understood.trace.span.insert(spans.child(parent));
        let mut attributes = match policy.relations_max_age().filter(|_| mapped.asks_relations()) {
            Some(max_age) => relations.tell(max_age, mapped, &parts.headers).await.map_err(refuse)?,
            None => Attributes::none(),
        };
        match (mapped.attributes_from(), &self.app) {
            (AttributeSource::Known, _) => {}
            (AttributeSource::Entities, Some(app)) => {
                let told = entities::ask(app, &self.service, mapped, span, clock).await?;
                attributes.extend(told.map_err(refuse)?);
            }
            (AttributeSource::Entities, None) => {
                let reason = "the app's attributes are needed, and no address of it is configured";
                return Err(refuse(Refusal::denied("ext_authz.entities_address", reason)));
            }
            (AttributeSource::Response, _) => {
                let reason = "the object's attributes stand in the app's answer, which Envoy does not show";
                return Err(refuse(Refusal::denied("ext_authz.response_attributes", reason)));
            }
        }
        if mapped.lists() {
            let reason = "the app's answer is to be filtered, and Envoy does not show it";
            return Err(refuse(Refusal::denied("ext_authz.list", reason)));
        }
        let permit = permitted(policy.decide(caller, mapped, &attributes, occasion))?;
        understood.attributes = attributes;
        let proved = proved(identity.svid.id(), &peer, chain.as_ref(), span);
        Ok((permit, Dress::new(proved, &parts.headers)))
    }

    fn ended(
        &self,
        outcome: Result<(Permit, Dress), Stop>,
        understood: &Understood<'_>,
    ) -> pb::CheckResponse {
        let Understood { occasion, trace, caller, mapped, attributes } = understood;
        let Shared { recorder, metrics, clock, .. } = &self.shared;
        let (verdict, rule, status, note, response) = match outcome {
            Ok((permit, dress)) => {
                let sampled = permit.is_audited() || self.sampler.take(clock.now());
                if let (true, Some(caller), Some(mapped)) = (sampled, caller, mapped) {
                    recorder.record(permit.record(caller, mapped, attributes, occasion));
                }
                ("allow", permit.rule().to_string(), StatusCode::OK, None, response::passed(&permit, dress))
            }
            Err(Stop::Denied(denial)) => {
                metrics.denied(denial.rule().name().to_owned());
                recorder.record(denial.record().clone());
                let status = StatusCode::from_u16(denial.status()).unwrap_or(StatusCode::FORBIDDEN);
                let note = Some(denial.reason().to_owned());
                ("deny", denial.rule().to_string(), status, note, response::denied(&denial))
            }
            Err(Stop::Failed(status, cause)) => {
                let response = self.failed(status, cause, occasion.receipt.as_str());
                ("error", String::new(), status, Some(cause.to_owned()), response)
            }
        };
        let now = clock.now();
        let took = now.saturating_sub(occasion.now);
        let principal = caller.as_ref().map(|caller| caller.principal.to_string()).unwrap_or_default();
        let (peer, mapped) = (principal.as_str(), mapped.as_ref());
        let route = mapped.map_or("", Mapped::route);
        metrics.observe(&Observation { direction: Direction::ExtAuthz, peer, route, status, took });
        if self.watchers.listen() {
            let user = caller.as_ref().and_then(|caller| caller.user.as_ref());
            let seen = Finished {
                direction: Direction::ExtAuthz,
                trace: *trace,
                peer,
                service: "",
                user: user.map_or("", |user| &user.id),
                method: &Method::from_bytes(occasion.method.as_bytes()).unwrap_or_default(),
                path: occasion.target.split_once('?').map_or(occasion.target, |(path, _)| path),
                route,
                action: mapped.map_or("", Mapped::action),
                objects: &Listed(mapped.map_or(&[][..], Mapped::objects)),
                verdict,
                rule: &rule,
                receipt: occasion.receipt.as_str(),
                status,
                took,
                note: note.as_ref().map_or(&"" as &dyn Display, |note| note),
            };
            self.watchers.tell(&seen, now);
        }
        response
    }

    fn failed(&self, status: StatusCode, cause: &str, receipt: &str) -> pb::CheckResponse {
        tracing::info!(service = self.service, cause, status = status.as_u16(), "nothing decided");
        response::failed(status, answer::failure(status, &self.service), receipt)
    }

    /// Whether questions can be decided now.
    fn is_ready(&self) -> bool {
        let Shared { source, clock, .. } = &self.shared;
        source.valid_at(clock.now()).is_some_and(|identity| *identity.svid.id() == self.id)
    }
}

/// What the app hears of who calls.
fn proved(
    me: &SpiffeId,
    peer: &SpiffeId,
    chain: Option<&Chain>,
    span: TraceParent,
) -> Vec<(HeaderName, HeaderValue)> {
    let mut proved = vec![(headers::TRACEPARENT.clone(), span.header_value())];
    // Both are restricted alphabets or were header values before; what is not one is left out.
    if let Ok(client) = HeaderValue::try_from(format!("By={me};URI={peer}")) {
        proved.push((headers::FORWARDED_CLIENT_CERT.clone(), client));
    }
    if let Some(user) = chain.and_then(|chain| HeaderValue::try_from(chain.user().id.as_str()).ok()) {
        proved.push((headers::FORWARDED_USER.clone(), user));
    }
    proved
}
