//! A question that nobody has asked yet, as a sidecar would be asked it: for tests of policies, and for people who want
//! to know before they try.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::header::CONTENT_TYPE;
use identity::SpiffeId;
use identity::txn::User;
use serde_json::Value as Json;

use crate::batch::Kept;
use crate::body::BodyRule;
use crate::decide::ServicePolicy;
use crate::kafka::{self, KafkaAction, KafkaObject};
use crate::map::{Mapping, Source};
use crate::object::{AttributeValue, Attributes, Relations};
use crate::receipt::Receipt;
use crate::record::{DecisionRecord, Layer};
use crate::request::{AttributeSource, Mapped};
use crate::verdict::{Caller, Occasion, Principal, Verdict};

/// One request, and what the app would tell of its objects.
#[derive(Debug, Clone)]
pub struct Question {
    /// The workload that asks.
    pub caller: SpiffeId,
    /// For whom; `None`: for nobody.
    pub user: Option<User>,
    /// The request's method; of a service that serves Kafka, the action.
    pub method: String,
    /// Its path and query; of a service that serves Kafka, the object as [`crate::KafkaObject`] writes it.
    pub target: String,
    /// Its headers.
    pub headers: BTreeMap<String, String>,
    /// Its body.
    pub body: Option<AskedBody>,
    /// What the app tells of every object, where the route asks it.
    pub attributes: BTreeMap<String, Json>,
    /// … and of single ones, by id.
    pub objects: BTreeMap<String, BTreeMap<String, Json>>,
    /// When, since the Unix epoch.
    pub now: Duration,
}

/// The body of a request, and by that its type where no header says it.
#[derive(Debug, Clone)]
pub enum AskedBody {
    /// JSON, if it begins like it, or a form.
    Text(String),
    /// A gRPC message, without the five bytes before it.
    Message(Vec<u8>),
}

impl AskedBody {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Message(bytes) => bytes,
        }
    }

    fn content_type(&self) -> &'static str {
        match self {
            Self::Message(_) => "application/grpc",
            Self::Text(text) if text.starts_with(['{', '[']) => "application/json",
            Self::Text(_) => "application/x-www-form-urlencoded",
        }
    }
}

impl Question {
    /// What these policies decide, in full.
    ///
    /// # Errors
    /// It is no question: the request is none, or what is told of objects is not what the route asks.
    pub fn ask(&self, policy: &ServicePolicy) -> Result<DecisionRecord, String> {
        let user = self.user.clone().map(Arc::new);
        let caller = Caller {
            principal: Principal::Workload(self.caller.clone()),
            chain: if user.is_some() { [self.caller.clone()].into() } else { [].into() },
            user,
            address: None,
        };
        let receipt = Receipt::generate(&ring::rand::SystemRandom::new())
            .map_err(|_| "the system's random generator failed".to_owned())?;
        let occasion = Occasion {
            receipt,
            now: self.now,
            layer: Layer::Sidecar,
            method: &self.method,
            target: &self.target,
            transaction: None,
            trace_id: None,
        };
        let refuse = |refusal| policy.refuse(Some(&caller), refusal, &occasion).record().clone();

        if policy.mapping() == Mapping::Kafka {
            return self.ask_kafka(policy, &occasion);
        }
        let mapped = match policy.map(&self.parts()?) {
            Ok(mapped) => mapped,
            Err(refusal) => return Ok(refuse(refusal)),
        };
        if let Err(denial) = policy.screen(&caller, &mapped, &occasion) {
            return Ok(denial.record().clone());
        }
        let body = match mapped.body() {
            BodyRule::Opaque { .. } => &[],
            _ => self.body.as_ref().map_or(&[] as &[u8], AskedBody::bytes),
        };
        let mapped = match mapped.with_body(body) {
            Ok(mapped) => mapped,
            Err(refusal) => return Ok(refuse(refusal)),
        };
        let attributes = self.told(&mapped)?;
        Ok(match policy.decide(&caller, &mapped, &attributes, &occasion) {
            Verdict::Permit(permit) => permit.record(&caller, &mapped, &attributes, &occasion),
            Verdict::Deny(denial) => {
                match policy.keep(denial, body, &caller, &mapped, &attributes, &occasion) {
                    Ok(Kept { permit, .. }) => permit.record(&caller, &mapped, &attributes, &occasion),
                    Err(denial) => denial.record().clone(),
                }
            }
        })
    }

    /// An action on an object: `Produce topic:payments`.
    fn ask_kafka(&self, policy: &ServicePolicy, occasion: &Occasion<'_>) -> Result<DecisionRecord, String> {
        const WANTED: &str = "such as Produce topic:payments, Join group:billing, Transact transactional-id:billing-1 or Describe cluster";
        let action = KafkaAction::named(&self.method).ok_or_else(|| {
            format!("the service serves Kafka, and `{}` is no action there; {WANTED}", self.method)
        })?;
        let object = KafkaObject::written(&self.target).ok_or_else(|| {
            format!("the service serves Kafka, and `{}` is no object there; {WANTED}", self.target)
        })?;
        let said = self.headers.len() + self.attributes.len() + self.objects.len();
        if self.user.is_some() || self.body.is_some() || said > 0 {
            return Err("a request of Kafka's has no user, headers, body or attributes".to_owned());
        }
        let caller = kafka::caller(&self.caller);
        let object = match object.object() {
            Ok(object) => object,
            Err(refusal) => return Ok(policy.refuse(Some(&caller), refusal, occasion).record().clone()),
        };
        Ok(match policy.decide_kafka(&caller, action, &object, occasion) {
            Verdict::Permit(permit) => {
                permit.record_object(&caller, action.name(), &object, &Attributes::none(), occasion)
            }
            Verdict::Deny(denial) => denial.record().clone(),
        })
    }

    fn parts(&self) -> Result<http::request::Parts, String> {
        let mut request = http::Request::builder().method(self.method.as_str()).uri(&self.target);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let typed = self.headers.keys().any(|name| name.eq_ignore_ascii_case(CONTENT_TYPE.as_str()));
        if let (Some(body), false) = (&self.body, typed) {
            request = request.header(CONTENT_TYPE, body.content_type());
        }
        let request = request.body(()).map_err(|error| format!("the request is none: {error}"))?;
        Ok(request.into_parts().0)
    }

    /// What the app tells of the objects, as far as the route asks it.
    fn told(&self, mapped: &Mapped) -> Result<Attributes, String> {
        let (mut attributes, mut absent) = (Attributes::none(), Vec::new());
        let by_app = mapped.attributes_from() != AttributeSource::Known;
        for id in self.objects.keys() {
            if !mapped.objects().iter().any(|object| object.id() == id) {
                let objects: Vec<String> = mapped.objects().iter().map(ToString::to_string).collect();
                return Err(format!(
                    "`objects` tells of {id:?}, and the request is about {}",
                    objects.join(", ")
                ));
            }
        }
        for object in mapped.objects() {
            let own = self.objects.get(object.id());
            for (name, json) in self.attributes.iter().chain(own.into_iter().flatten()) {
                let value = told_by_app(mapped, name, json).map_err(|why| {
                    if by_app { why } else { format!("{why}; on this route the app is not asked") }
                })?;
                attributes.insert(object.clone(), name.clone(), value);
            }
            if !attributes.knows(object) {
                absent.push(object.clone());
            }
        }
        if mapped.asks_relations() {
            attributes.relations = Relations::told(None, absent);
        }
        Ok(attributes)
    }
}

fn told_by_app(mapped: &Mapped, name: &str, json: &Json) -> Result<AttributeValue, String> {
    match mapped.route.attributes.get(name) {
        Some((Source::Entities | Source::Response(_) | Source::Stored, kind)) => {
            kind.read(json).ok_or_else(|| format!("the attribute `{name}` is a {kind}"))
        }
        Some(_) => Err(format!("the request or the user tells `{name}`")),
        None => Err(format!("nothing tells the attribute `{name}`")),
    }
}
