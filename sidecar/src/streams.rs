//! What goes on after its decision: answers that stream, calls that say more, and upgraded connections.
//!
//! The decision was about a moment. [`Streams::watch`] keeps what it was taken from beside the stream, so that a policy or
//! a relation that comes later has it judged again, and ends the stream of whoever may have it no longer.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request};
use http_body::{Frame, SizeHint};
use identity::clock::SharedClock;
use policy::{
    Attributes, Caller, Denial, Layer, Mapped, Occasion, Receipts, Recorder, Refusal, ServicePolicy,
};

use crate::inbound::permitted;
use crate::live::{Closed, Facts, Judge, Registry};
use crate::messages::{Fault, Faults};
use crate::metrics::Metrics;
use crate::relations::Relations;
use crate::{Body, BoxError};

/// What the streams of one listener need.
pub(crate) struct Streams {
    pub(crate) policy: Arc<ArcSwap<ServicePolicy>>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) receipts: Arc<Receipts>,
    pub(crate) recorder: Arc<dyn Recorder>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) relations: Arc<Relations>,
    pub(crate) clock: SharedClock,
}

/// What is known of a request's objects beside what the request says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    /// All of it.
    pub(crate) all: Attributes,
    /// What others than the relations told, where the relations were asked: they are asked again.
    pub(crate) told: Option<Attributes>,
}

impl Known {
    /// What the relations said, if they were asked, and what the app told.
    pub(crate) fn of(relations: Option<Attributes>, told: Attributes) -> Self {
        match relations {
            None => Self { all: told, told: None },
            Some(relations) => Self { all: together(relations, told.clone()), told: Some(told) },
        }
    }

    /// The same for a policy that may be another: with what the relations say now, by `ask`, which hears how old that may
    /// be. Where it asks none, all is as it was.
    pub(crate) fn under(
        &self,
        policy: &ServicePolicy,
        mapped: &Mapped,
        ask: impl FnOnce(Duration) -> Attributes,
    ) -> Attributes {
        let max_age = policy.relations_max_age().filter(|_| mapped.asks_relations());
        match (max_age, &self.told) {
            (Some(max_age), Some(told)) => together(ask(max_age), told.clone()),
            _ => self.all.clone(),
        }
    }
}

fn together(mut relations: Attributes, told: Attributes) -> Attributes {
    relations.extend(told);
    relations
}

/// A decision, as it was asked for.
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) transaction: Option<Arc<str>>,
    pub(crate) trace_id: Option<u128>,
    pub(crate) caller: Caller,
    /// The body that named the objects, or the first message of a call, and its type.
    pub(crate) said: Said,
    pub(crate) mapped: Mapped,
    /// What the app told stays as it was: it is not asked again whether an object has changed hands.
    pub(crate) known: Known,
}

/// What of a request's body had a part in its meaning.
#[derive(Debug, Clone, Default)]
pub(crate) struct Said {
    pub(crate) bytes: Bytes,
    pub(crate) kind: Option<HeaderValue>,
}

/// What a request that was read already means to another policy, without its body.
pub(crate) fn map_again(
    policy: &ServicePolicy,
    method: &str,
    target: &str,
    kind: Option<&HeaderValue>,
) -> Result<Mapped, Refusal> {
    let mut request = Request::builder().method(method).uri(target);
    if let Some(kind) = kind {
        request = request.header(CONTENT_TYPE, kind);
    }
    let unreadable = |_| Refusal::malformed("request.target", "the target cannot be read again");
    let (parts, ()) = request.body(()).map_err(unreadable)?.into_parts();
    policy.map(&parts)
}

impl Streams {
    /// The body, which `decided` let pass: it ends when another policy does not, and leaves word of why in `faults`.
    pub(crate) fn watch(
        self: &Arc<Self>,
        body: Body,
        facts: Facts,
        decided: &Arc<ServicePolicy>,
        asked: Asked,
        faults: Option<Faults>,
    ) -> Body {
        let question = Arc::new(Question {
            asked,
            receipts: Arc::clone(&self.receipts),
            relations: Arc::clone(&self.relations),
            clock: self.clock.clone(),
        });
        let live = self.registry.register(facts, Arc::clone(&question) as Arc<dyn Judge>);
        // What came in between has not found it.
        let now = self.policy.load_full();
        let as_decided = Arc::ptr_eq(&now, decided) && !question.asks_relations();
        let overtaken = if as_decided { Ok(()) } else { question.judge(&now) };
        let streams = Arc::clone(self);
        let ended = Box::pin(async move {
            let closed = match &overtaken {
                Err(closed) => closed,
                Ok(()) => live.closed().await,
            };
            if let (Closed::Denied(denial), Some(faults)) = (closed, faults) {
                // The first word counts.
                let _known = faults.set(Fault::Denied(denial.clone()));
            }
            streams.ended(closed, &question)
        });
        Body::new(Watched { body, ended })
    }

    fn ended(&self, closed: &Closed, question: &Question) -> &'static str {
        let Asked { method, target, caller, .. } = &question.asked;
        let peer = &caller.principal;
        tracing::info!(%peer, method, target, rule = closed.rule(), "a stream was ended");
        if let Closed::Denied(denial) = closed {
            self.metrics.denied(denial.rule().name().to_owned());
            self.recorder.record(denial.record().clone());
        }
        "the stream may not go on"
    }
}

/// A decision that can be asked for again.
struct Question {
    asked: Asked,
    receipts: Arc<Receipts>,
    relations: Arc<Relations>,
    clock: SharedClock,
}

impl Question {
    fn decide(&self, policy: &ServicePolicy, occasion: &Occasion<'_>) -> Result<(), Denial> {
        let Asked { method, target, caller, said, known, .. } = &self.asked;
        let refuse = |refusal| policy.refuse(Some(caller), refusal, occasion);
        // The new policy's own map says what it means.
        let mapped = map_again(policy, method, target, said.kind.as_ref()).map_err(refuse)?;
        let mapped = mapped.with_body(&said.bytes).map_err(refuse)?;
        let attributes = known.under(policy, &mapped, |_| self.relations.last_heard(&mapped));
        permitted(policy.decide(caller, &mapped, &attributes, occasion)).map(drop)
    }
}

impl Judge for Question {
    fn judge(&self, policy: &ServicePolicy) -> Result<(), Closed> {
        // Without randomness nothing can be recorded so that it is found again.
        let Ok(receipt) = self.receipts.draw() else { return Err(Closed::Unjudged) };
        let occasion = Occasion {
            receipt,
            now: self.clock.now(),
            layer: Layer::Sidecar,
            method: &self.asked.method,
            target: &self.asked.target,
            transaction: self.asked.transaction.clone(),
            trace_id: self.asked.trace_id,
        };
        self.decide(policy, &occasion).map_err(|denial| Closed::Denied(Box::new(denial)))
    }

    fn about(&self) -> String {
        self.asked.mapped.route().to_owned()
    }

    fn asks_relations(&self) -> bool {
        self.asked.known.told.is_some()
    }
}

/// A body that ends with an error when `ended` completes.
struct Watched {
    body: Body,
    ended: BoxFuture<'static, &'static str>,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(why) = self.ended.as_mut().poll(cx) {
            self.ended = Box::pin(std::future::pending());
            self.body = Body::empty();
            return Poll::Ready(Some(Err(why.into())));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
