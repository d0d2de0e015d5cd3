//! From an HTTP request to its meaning: one action on named objects, or a refusal.
//!
//! Nothing is normalised, repaired or guessed: what was judged is byte for byte what is passed on.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use identity::json;
use serde_json::{Value as Json, json};
use smallvec::SmallVec;
use smol_str::{SmolStr, ToSmolStr as _};

use crate::body::{self, BodyRule, MAX_JUDGED_BODY_BYTES};
use crate::filter::each;
use crate::map::{Claim, Route, Source};
use crate::object::{AttributeType, AttributeValue, Attributes, ObjectRef};
use crate::plan::Id;
use crate::record::cut;
use crate::template::{Place, first_part};

/// Where a sidecar asks its own app for the attributes of objects (`POST`, JSON both ways).
pub const ENTITIES_PATH: &str = "/.well-known/palisade/entities";
/// Why a request gets no further before any policy is asked.
///
/// `Display` is for the operator; the peer gets [`crate::Denial::response_body`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub(crate) malformed: bool,
    pub(crate) rule: &'static str,
    pub(crate) reason: String,
    pub(crate) route: Option<String>,
}

impl Refusal {
    /// The request is malformed or has more than one meaning: 400.
    pub fn malformed(rule: &'static str, reason: impl Into<String>) -> Self {
        Self { malformed: true, rule, reason: cut(&reason.into()), route: None }
    }

    /// The request is understood and not allowed: 403.
    pub fn denied(rule: &'static str, reason: impl Into<String>) -> Self {
        Self { malformed: false, rule, reason: cut(&reason.into()), route: None }
    }

    /// The built-in rule that refused.
    pub fn rule(&self) -> &'static str {
        self.rule
    }

    /// 400 or 403.
    pub fn status(&self) -> u16 {
        if self.malformed { 400 } else { 403 }
    }

    pub(crate) fn on(mut self, route: &Route) -> Self {
        self.route = Some(route.template.clone());
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.reason)
    }
}

impl std::error::Error for Refusal {}

/// Where the attributes of a request's objects are learnt from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttributeSource {
    /// Nowhere else: the request and the user tell all there is. Decide at once, with
    /// [`Attributes::none`].
    Known,
    /// The app's entities endpoint, before the request is passed on.
    Entities,
    /// The app's response: pass the (safe) request on, decide before a byte of the body is released.
    Response,
}

/// A request with its meaning.
#[derive(Debug, Clone)]
pub struct Mapped {
    pub(crate) route: Arc<Route>,
    /// Of the places that the route's [`Plan`](crate::plan::Plan) looks at, in its order.
    values: Values,
    objects: SmallVec<[ObjectRef; 1]>,
    /// For each of the objects, which element of a list named it.
    elements: SmallVec<[Option<usize>; 1]>,
    /// Service and version of the map, shared with its table.
    pub(crate) origin: Arc<str>,
}

/// What a request says at each place that its route looks at. Most routes look at one or two.
pub(crate) type Values = SmallVec<[Option<AttributeValue>; 2]>;

impl Mapped {
    /// # Errors
    /// The request does not name its object.
    pub(crate) fn new(route: Arc<Route>, values: Values, origin: Arc<str>) -> Result<Self, Refusal> {
        let (objects, elements) = (SmallVec::new(), SmallVec::new());
        let mut mapped = Self { route, values, objects, elements, origin };
        if !mapped.route.needs_body() {
            mapped.name_objects()?;
        }
        Ok(mapped)
    }

    /// The action's name in the service's namespace.
    pub fn action(&self) -> &str {
        &self.route.action
    }

    /// The objects, without repetition. Empty until [`Mapped::with_body`] if the route reads the body.
    pub fn objects(&self) -> &[ObjectRef] {
        &self.objects
    }

    /// The route's template, such as `GET /accounts/{id:int}`: one of a bounded set, fit for metrics.
    pub fn route(&self) -> &str {
        &self.route.template
    }

    /// What the request's body must be.
    pub fn body(&self) -> BodyRule {
        self.route.body
    }

    /// The protocol that the route lets a connection be upgraded to, in lower case. What is said in it is
    /// judged no further.
    pub fn upgrade(&self) -> Option<&str> {
        self.route.upgrade.as_deref()
    }

    /// The request with its whole body read, or with one message of a gRPC call, without the five bytes before it.
    /// Does nothing for a route that does not look at bodies.
    ///
    /// # Errors
    /// A body that is too long, has more than one reading, or is not the route's closed list of typed
    /// members.
    pub fn with_body(mut self, body: &[u8]) -> Result<Self, Refusal> {
        let route = Arc::clone(&self.route);
        let (max_bytes, values) = match route.body {
            BodyRule::None if body.is_empty() => return Ok(self),
            BodyRule::None => {
                return Err(Refusal::malformed("request.body", "this route takes no body").on(&route));
            }
            BodyRule::Opaque { max_bytes } if body.len() <= max_bytes => return Ok(self),
            BodyRule::Opaque { max_bytes } => (max_bytes, Ok(body::Values::new())),
            BodyRule::Json { max_bytes } if body.len() <= max_bytes => {
                (max_bytes, body::read_json(&route.members, body))
            }
            BodyRule::Form { max_bytes } if body.len() <= max_bytes => {
                (max_bytes, body::read_form(&route.members, body))
            }
            BodyRule::Grpc { max_bytes, .. } if body.len() <= max_bytes => match &route.message {
                Some(message) => (max_bytes, message.read(body)),
                None => (max_bytes, Err("nothing says what the message is".to_owned())),
            },
            BodyRule::Json { max_bytes }
            | BodyRule::Form { max_bytes }
            | BodyRule::Grpc { max_bytes, .. } => (max_bytes, Ok(body::Values::new())),
        };
        if body.len() > max_bytes {
            let reason = format!("the body is longer than {max_bytes} bytes");
            return Err(Refusal::malformed("request.body_length", reason).on(&route));
        }
        let values = values.map_err(|reason| Refusal::malformed("request.body", reason).on(&route))?;
        for (value, place) in self.values.iter_mut().zip(route.plan.places()) {
            if let Some(told) = place.member().and_then(|name| values.get(name)) {
                *value = Some(match place {
                    Place::First(_) => first_parts(told),
                    _ => told.clone(),
                });
            }
        }
        self.name_objects()?;
        Ok(self)
    }

    /// Where attributes that the request does not tell come from.
    pub fn attributes_from(&self) -> AttributeSource {
        self.route.attributes_from()
    }

    /// Whether attributes come from the relations that are written by API, beside [`Mapped::attributes_from`]: add what
    /// [`crate::RelationsCopy::tell`] says.
    pub fn asks_relations(&self) -> bool {
        self.route.asks_relations()
    }

    /// The attributes that the route takes from the response, from its whole JSON body.
    ///
    /// # Errors
    /// The body is not JSON with one meaning, or a required place in it is missing or of another type.
    pub fn attributes_from_response(&self, body: &[u8]) -> Result<Attributes, Refusal> {
        let document = read_answer(body).map_err(|refusal| refusal.on(&self.route))?;
        let mut attributes = Attributes::none();
        for (name, (source, kind)) in &self.route.attributes {
            let Source::Response(pointer) = source else { continue };
            let value = document.pointer(pointer).and_then(|value| kind.read(value)).ok_or_else(|| {
                let reason = format!("the response has no {kind} at {pointer} to tell `{name}` from");
                Refusal::denied("attributes.missing", reason).on(&self.route)
            })?;
            for object in &self.objects {
                attributes.insert(object.clone(), name.clone(), value.clone());
            }
        }
        Ok(attributes)
    }

    /// The body to `POST` to the app's [`ENTITIES_PATH`].
    pub fn entities_request(&self) -> Vec<u8> {
        let objects: Vec<Json> =
            self.objects.iter().map(|o| json!({ "type": o.base_kind(), "id": o.id() })).collect();
        json!({ "objects": objects }).to_string().into_bytes()
    }

    /// The attributes from the app's answer to [`Mapped::entities_request`]. Objects it leaves out stay
    /// unknown, and are denied when decided.
    ///
    /// # Errors
    /// The answer is not JSON with one meaning or not of the agreed form, repeats an object or tells of
    /// one that was not asked for, or an attribute has another type than the schema says.
    pub fn attributes_from_entities(&self, body: &[u8]) -> Result<Attributes, Refusal> {
        self.read_entities(body).map_err(|refusal| refusal.on(&self.route))
    }

    fn read_entities(&self, body: &[u8]) -> Result<Attributes, Refusal> {
        let wrong =
            |reason: &str| Refusal::denied("attributes.answer", format!("the entities endpoint {reason}"));
        let document = read_answer(body)?;
        let items =
            document.get("objects").and_then(Json::as_array).ok_or_else(|| wrong("lists no objects"))?;
        let asked: HashMap<(&str, &str), &ObjectRef> =
            self.objects.iter().map(|o| ((o.base_kind(), o.id()), o)).collect();
        let mut attributes = Attributes::none();
        for item in items {
            let text = |name: &str| item.get(name).and_then(Json::as_str);
            let (Some(kind), Some(id)) = (text("type"), text("id")) else {
                return Err(wrong("lists an object without type and id"));
            };
            let object =
                *asked.get(&(kind, id)).ok_or_else(|| wrong("tells of an object it was not asked for"))?;
            if attributes.knows(object) {
                return Err(wrong("tells of one object twice"));
            }
            for (name, (source, kind)) in &self.route.attributes {
                let told = item.get("attributes").and_then(|told| told.get(name));
                let (Source::Entities, Some(told)) = (source, told) else { continue };
                let value =
                    kind.read(told).ok_or_else(|| wrong(&format!("tells a `{name}` that is no {kind}")))?;
                attributes.insert(object.clone(), name.clone(), value);
            }
        }
        Ok(attributes)
    }

    /// INVARIANT: empty exactly as long as a body that names objects has not been read.
    fn name_objects(&mut self) -> Result<(), Refusal> {
        let route = Arc::clone(&self.route);
        let nameless =
            || Refusal::malformed("request.object", "the request does not name its object").on(&route);
        let mut named = Named::default();
        for id in &route.plan.ids {
            // Lists are taken element by element, with the values that are no list beside each.
            let count = match id.list {
                None => 1,
                Some(list) => match self.value(list.place) {
                    Some(value) => each(value).len(),
                    None if list.optional => 0,
                    None => return Err(nameless()),
                },
            };
            for at in 0..count {
                let id_of_object = self.id_of(id, at).ok_or_else(nameless)?;
                let object = ObjectRef::shared(Arc::clone(&route.kind), id_of_object);
                named.add(object, id.list.map(|_| at));
            }
        }
        (self.objects, self.elements) = (named.objects, named.elements);
        Ok(())
    }

    /// The id of the object that the `at`-th elements name.
    fn id_of(&self, id: &Id, at: usize) -> Option<SmolStr> {
        id.fill(|place| match self.value(place)? {
            AttributeValue::Set(values) => values.get(at).map(plain_text),
            one => Some(plain_text(one)),
        })
    }

    /// The id that each element of the request's list names, one after the other.
    pub(crate) fn listed(&self) -> impl Iterator<Item = Option<SmolStr>> {
        let listed = self.route.plan.ids.iter().find_map(|id| Some((id, self.value(id.list?.place)?)));
        listed.into_iter().flat_map(move |(id, list)| (0..each(list).len()).map(move |at| self.id_of(id, at)))
    }

    /// The request as if it were about its `at`-th object alone.
    pub(crate) fn only(&self, at: usize) -> Self {
        let object = self.objects.get(at).cloned().into_iter().collect();
        let element = self.elements.get(at).copied().into_iter().collect();
        Self { objects: object, elements: element, ..self.clone() }
    }

    /// What the request says at one of the places that its route looks at.
    pub(crate) fn value(&self, place: usize) -> Option<&AttributeValue> {
        self.values.get(place)?.as_ref()
    }

    /// What the request says at a place of the `at`-th object, for an attribute of this type: of a list the value of the
    /// element that named the object, unless the list is the attribute.
    pub(crate) fn told(&self, place: usize, kind: AttributeType, at: usize) -> Option<&AttributeValue> {
        match (self.value(place)?, kind) {
            (
                AttributeValue::Set(values),
                AttributeType::Bool | AttributeType::Long | AttributeType::Text,
            ) => values.get((*self.elements.get(at)?)?),
            (value, _) => Some(value),
        }
    }

    /// An attribute of the `at`-th object that the request or the user tells.
    pub(crate) fn known_attribute(
        &self,
        at: usize,
        source: &Source,
        kind: AttributeType,
        user: Option<&identity::txn::User>,
    ) -> Option<AttributeValue> {
        match source {
            Source::Request(place) => {
                let value = self.told(self.route.plan.position(place)?, kind, at)?;
                match (kind, value) {
                    (AttributeType::Long, AttributeValue::Text(text)) => {
                        text.parse().ok().map(AttributeValue::Long)
                    }
                    _ => Some(value.clone()),
                }
            }
            Source::Claim(claim) => user.map(|user| {
                AttributeValue::Text(match claim {
                    Claim::Subject => user.id.as_str().into(),
                    Claim::Issuer => user.issuer.as_str().into(),
                    Claim::Client => user.client.as_str().into(),
                })
            }),
            Source::Relations | Source::Stored | Source::Entities | Source::Response(_) => None,
        }
    }
}

/// Up to here every object named so far is looked at; above it a table knows them.
const FEW: usize = 16;

/// The objects of a request, each once, and the elements of lists that named them.
#[derive(Default)]
struct Named {
    objects: SmallVec<[ObjectRef; 1]>,
    elements: SmallVec<[Option<usize>; 1]>,
    /// All of them, and whether a list named each, once there are more than [`FEW`].
    known: HashSet<(ObjectRef, bool)>,
}

impl Named {
    fn add(&mut self, object: ObjectRef, element: Option<usize>) {
        // What a list tells of an object, it tells of no other that only has the same name.
        let listed = element.is_some();
        let all = || self.objects.iter().zip(self.elements.iter().map(Option::is_some));
        let known = if self.objects.len() < FEW {
            all().any(|known| known == (&object, listed))
        } else {
            if self.known.is_empty() {
                self.known = all().map(|(object, listed)| (object.clone(), listed)).collect();
            }
            !self.known.insert((object.clone(), listed))
        };
        if !known {
            self.objects.push(object);
            self.elements.push(element);
        }
    }
}

fn plain_text(value: &AttributeValue) -> SmolStr {
    match value {
        AttributeValue::Text(text) => text.clone(),
        other => other.to_smolstr(),
    }
}

/// Of each key its first part.
fn first_parts(value: &AttributeValue) -> AttributeValue {
    match value {
        AttributeValue::Text(key) => AttributeValue::Text(first_part(key).into()),
        AttributeValue::Set(keys) => AttributeValue::Set(keys.iter().map(first_parts).collect()),
        other => other.clone(),
    }
}

fn read_answer(body: &[u8]) -> Result<Json, Refusal> {
    if body.len() > MAX_JUDGED_BODY_BYTES {
        let reason = format!("the app's answer is longer than {MAX_JUDGED_BODY_BYTES} bytes");
        return Err(Refusal::denied("attributes.answer", reason));
    }
    json::parse(body).map_err(|error| {
        Refusal::denied(
            "attributes.answer",
            format!("the app's answer is not JSON with one meaning: {error}"),
        )
    })
}
