//! From an HTTP request to its meaning: one action on named objects, or a refusal.
//!
//! Nothing is normalised, repaired or guessed: what was judged is byte for byte what is passed on.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Version};
use identity::json;
use serde_json::{Value as Json, json};

use crate::body::{self, BodyRule, MAX_JUDGED_BODY_BYTES};
use crate::map::{Claim, Route, Source};
use crate::object::{AttributeType, AttributeValue, Attributes, ObjectRef};
use crate::problem::suggest;
use crate::record::cut;
use crate::template::{self, Place, is_plain_id};
use crate::version::PolicyVersion;

/// Where a sidecar asks its own app for the attributes of objects (`POST`, JSON both ways).
pub const ENTITIES_PATH: &str = "/.well-known/palisade/entities";
/// Longest query looked at.
const MAX_QUERY_BYTES: usize = 2048;
/// Headers by which frameworks and proxies let a request mean another method or target.
const REWRITING_HEADERS: [&str; 9] = [
    "x-http-method-override",
    "x-http-method",
    "x-method-override",
    "x-original-url",
    "x-original-uri",
    "x-original-path",
    "x-rewrite-url",
    "x-forwarded-uri",
    "x-envoy-original-path",
];

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

    fn on(mut self, route: &Route) -> Self {
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
    values: BTreeMap<Place, AttributeValue>,
    objects: Vec<ObjectRef>,
    /// Service and version of the map, shared with its table.
    origin: Arc<str>,
}

impl Mapped {
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

    /// The request with its whole body read. Does nothing for a route that does not look at bodies.
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
            BodyRule::Json { max_bytes } | BodyRule::Form { max_bytes } => {
                (max_bytes, Ok(body::Values::new()))
            }
        };
        if body.len() > max_bytes {
            let reason = format!("the body is longer than {max_bytes} bytes");
            return Err(Refusal::malformed("request.body_length", reason).on(&route));
        }
        let values = values.map_err(|reason| Refusal::malformed("request.body", reason).on(&route))?;
        self.values.extend(values.into_iter().map(|(name, value)| (Place::Body(name), value)));
        self.objects = self.name_objects()?;
        Ok(self)
    }

    /// Where attributes that the request does not tell come from.
    pub fn attributes_from(&self) -> AttributeSource {
        let has =
            |wanted: fn(&Source) -> bool| self.route.attributes.values().any(|(source, _)| wanted(source));
        if has(|s| matches!(s, Source::Response(_))) {
            AttributeSource::Response
        } else if has(|s| *s == Source::Entities) {
            AttributeSource::Entities
        } else {
            AttributeSource::Known
        }
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
    fn name_objects(&self) -> Result<Vec<ObjectRef>, Refusal> {
        let mut objects: Vec<ObjectRef> = Vec::with_capacity(self.route.objects.len());
        for template in &self.route.objects {
            let id = template.fill(|place| self.values.get(place).map(plain_text)).ok_or_else(|| {
                Refusal::malformed("request.object", "the request does not name its object").on(&self.route)
            })?;
            let object = ObjectRef::new(&self.route.kind, &id);
            if !objects.contains(&object) {
                objects.push(object);
            }
        }
        Ok(objects)
    }

    /// An attribute that the request or the user tells.
    pub(crate) fn known_attribute(
        &self,
        source: &Source,
        kind: AttributeType,
        user: Option<&identity::txn::User>,
    ) -> Option<AttributeValue> {
        match source {
            Source::Request(place) => {
                let value = self.values.get(place)?;
                match (kind, value) {
                    (AttributeType::Long, AttributeValue::Text(text)) => {
                        text.parse().ok().map(AttributeValue::Long)
                    }
                    _ => Some(value.clone()),
                }
            }
            Source::Claim(claim) => user.map(|user| {
                AttributeValue::Text(match claim {
                    Claim::Subject => user.id.clone(),
                    Claim::Issuer => user.issuer.clone(),
                    Claim::Client => user.client.clone(),
                })
            }),
            Source::Entities | Source::Response(_) => None,
        }
    }
}

fn plain_text(value: &AttributeValue) -> String {
    match value {
        AttributeValue::Text(text) => text.clone(),
        other => other.to_string(),
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

/// The routes of a service, found by method and number of segments.
#[derive(Debug)]
pub(crate) struct RouteTable {
    by_shape: HashMap<(String, usize), Vec<Arc<Route>>>,
    templates: Vec<String>,
    origin: Arc<str>,
}

impl RouteTable {
    /// INVARIANT: the routes do not overlap (checked when the map is parsed), so their order is free.
    pub(crate) fn new(service: &str, version: &PolicyVersion, routes: Vec<Route>) -> Self {
        let origin = format!("{service} {version}").into();
        let mut table = Self { by_shape: HashMap::new(), templates: Vec::new(), origin };
        for route in routes {
            table.templates.push(route.template.clone());
            let shape = (route.method.clone(), route.path.len());
            table.by_shape.entry(shape).or_default().push(Arc::new(route));
        }
        table
    }

    pub(crate) fn map(&self, parts: &http::request::Parts) -> Result<Mapped, Refusal> {
        check_headers(&parts.headers)?;
        let path = target_path(parts)?;
        let segments = template::segments_of(path)
            .map_err(|flaw| Refusal::malformed("request.path", flaw.to_string()))?;
        let (route, mut values) =
            self.find(parts.method.as_str(), &segments).ok_or_else(|| self.unmapped(&parts.method, path))?;
        check_body_headers(route.body, &parts.headers).map_err(|refusal| refusal.on(&route))?;
        read_query(&route, parts.uri.query(), &mut values).map_err(|refusal| refusal.on(&route))?;
        let mut mapped = Mapped { route, values, objects: Vec::new(), origin: Arc::clone(&self.origin) };
        if !mapped.route.needs_body() {
            mapped.objects = mapped.name_objects()?;
        }
        Ok(mapped)
    }

    /// Whether this table, or one of the same service and version, mapped the request.
    pub(crate) fn mapped(&self, mapped: &Mapped) -> bool {
        mapped.origin == self.origin
    }

    fn find(&self, method: &str, segments: &[&str]) -> Option<(Arc<Route>, BTreeMap<Place, AttributeValue>)> {
        let shape = (method.to_owned(), segments.len());
        self.by_shape.get(&shape)?.iter().find_map(|route| {
            let captured = route.path.matches(segments)?;
            let values = captured
                .into_iter()
                .map(|(name, value)| (Place::Path(name.to_owned()), AttributeValue::Text(value.to_owned())))
                .collect();
            Some((Arc::clone(route), values))
        })
    }

    fn unmapped(&self, method: &Method, path: &str) -> Refusal {
        let asked = format!("{method} {path}");
        // Attackers can ask for long paths that nothing resembles: no comparison then.
        const MAX_COMPARED_BYTES: usize = 64;
        const MAX_COMPARED_ROUTES: usize = 64;
        let near = (asked.len() <= MAX_COMPARED_BYTES)
            .then(|| suggest(&asked, self.templates.iter().take(MAX_COMPARED_ROUTES).map(String::as_str)))
            .flatten()
            .map(|hint| format!("; {hint}"))
            .unwrap_or_default();
        Refusal::denied("route.unmapped", format!("no route of the map matches `{}`{near}", cut(&asked)))
    }
}

fn check_headers(headers: &HeaderMap) -> Result<(), Refusal> {
    if let Some(name) = REWRITING_HEADERS.iter().find(|name| headers.contains_key(**name)) {
        return Err(Refusal::malformed(
            "request.rewriting_header",
            format!("the header {name} is not accepted"),
        ));
    }
    // `to_str` admits visible ASCII and tabs: what every reader behind us reads alike.
    match headers.iter().find(|(_, value)| value.to_str().is_err()) {
        Some((name, _)) => {
            Err(Refusal::malformed("request.header_value", format!("the header {name} is not visible ASCII")))
        }
        None => Ok(()),
    }
}

/// The path of an origin-form target (RFC 9112 §3.2.1).
fn target_path(parts: &http::request::Parts) -> Result<&str, Refusal> {
    let refuse = |reason: &str| Err(Refusal::malformed("request.target", reason));
    if parts.method == Method::CONNECT {
        return refuse("CONNECT is not accepted");
    }
    // HTTP/2 and later always carry scheme and authority beside the path.
    let absolute = parts.uri.scheme().is_some() || parts.uri.authority().is_some();
    if absolute && parts.version <= Version::HTTP_11 {
        return refuse("the target is in absolute form");
    }
    match parts.uri.path_and_query() {
        Some(target) if target.as_str().starts_with('/') => Ok(target.path()),
        _ => refuse("the target is not a path"),
    }
}

fn check_body_headers(rule: BodyRule, headers: &HeaderMap) -> Result<(), Refusal> {
    let refuse = |reason: &str| Err(Refusal::malformed("request.body", reason));
    let wanted = match rule {
        BodyRule::Opaque { .. } => return Ok(()),
        BodyRule::None => {
            let empty = headers.get_all(CONTENT_LENGTH).iter().all(|length| length == "0");
            if !empty || headers.contains_key(TRANSFER_ENCODING) {
                return refuse("this route takes no body");
            }
            return Ok(());
        }
        BodyRule::Json { .. } => "application/json",
        BodyRule::Form { .. } => "application/x-www-form-urlencoded",
    };
    if headers.contains_key(CONTENT_ENCODING) {
        return refuse("an encoded body is not judged");
    }
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    let given = types.next().and_then(|value| value.to_str().ok()).unwrap_or_default().to_ascii_lowercase();
    let (media, parameter) = match given.split_once(';') {
        Some((media, parameter)) => (media.trim_end(), Some(parameter.trim())),
        None => (given.as_str(), None),
    };
    let utf8 = matches!(parameter, None | Some("charset=utf-8" | "charset=\"utf-8\""));
    if media != wanted || !utf8 || types.next().is_some() {
        return refuse(&format!("the body is not declared as {wanted}"));
    }
    Ok(())
}

fn read_query(
    route: &Route,
    query: Option<&str>,
    values: &mut BTreeMap<Place, AttributeValue>,
) -> Result<(), Refusal> {
    let refuse = |reason: String| Err(Refusal::malformed("request.query", reason));
    let query = query.unwrap_or_default();
    if query.is_empty() {
        return Ok(());
    }
    if query.len() > MAX_QUERY_BYTES {
        return refuse(format!("the query is longer than {MAX_QUERY_BYTES} bytes"));
    }
    for pair in query.split('&') {
        let Some((name, value)) = pair.split_once('=') else {
            return refuse("a query parameter has no `=`".into());
        };
        if !route.query.iter().any(|listed| listed == name) {
            return refuse(format!("the query parameter {:?} is not one of this route's", cut(name)));
        }
        if !is_plain_id(value) {
            return refuse(format!(
                "the query parameter {name:?} has other characters than A-Z a-z 0-9 . _ -"
            ));
        }
        let value = AttributeValue::Text(value.to_owned());
        if values.insert(Place::Query(name.to_owned()), value).is_some() {
            return refuse(format!("the query parameter {name:?} appears twice"));
        }
    }
    Ok(())
}
