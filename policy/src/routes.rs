//! Which route a request belongs to: the same few steps for one route or two thousand.

use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Version};
use smallvec::SmallVec;
use smol_str::SmolStr;

use crate::body::BodyRule;
use crate::map::Route;
use crate::object::AttributeValue;
use crate::plan::Taken;
use crate::problem::suggest;
use crate::record::cut;
use crate::request::{Mapped, Refusal, Values};
use crate::template::{self, CaptureType, Segment, Segments, is_plain_id};
use crate::version::PolicyVersion;

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

/// The routes of a service: a tree of path segments for each method.
#[derive(Debug)]
pub(crate) struct RouteTable {
    /// The root for each method; there are six at most.
    roots: Vec<(String, usize)>,
    nodes: Vec<Node>,
    templates: Vec<String>,
    origin: Arc<str>,
}

/// What may follow after the segments that lead here.
#[derive(Debug, Default)]
struct Node {
    literals: Literals,
    /// One a type at most.
    captures: SmallVec<[(CaptureType, usize); 1]>,
    /// The route that ends here.
    route: Option<Arc<Route>>,
}

/// Nodes by the literal that leads to them. Most nodes have one, which then needs no table.
#[derive(Debug, Default)]
enum Literals {
    #[default]
    None,
    One(SmolStr, usize),
    /// Filled when the map is loaded: what is asked for is never put there, so a fast hash does.
    Many(HashMap<SmolStr, usize>),
}

impl Literals {
    fn get(&self, segment: &str) -> Option<usize> {
        match self {
            Self::None => None,
            Self::One(known, child) => (known == segment).then_some(*child),
            Self::Many(children) => children.get(segment).copied(),
        }
    }

    fn insert(&mut self, segment: &str, child: usize) {
        match self {
            Self::None => *self = Self::One(segment.into(), child),
            Self::One(known, first) => {
                let mut children = HashMap::new();
                children.insert(std::mem::take(known), *first);
                children.insert(segment.into(), child);
                *self = Self::Many(children);
            }
            Self::Many(children) => drop(children.insert(segment.into(), child)),
        }
    }
}

impl RouteTable {
    /// INVARIANT: the routes do not overlap (checked when the map is parsed), so a path has one route at
    /// most, whatever is tried first.
    pub(crate) fn new(service: &str, version: &PolicyVersion, routes: Vec<Route>) -> Self {
        let origin = format!("{service} {version}").into();
        let mut table = Self { roots: Vec::new(), nodes: Vec::new(), templates: Vec::new(), origin };
        for route in routes {
            table.templates.push(route.template.clone());
            let mut at = table.root(&route.method);
            for segment in route.path.segments() {
                at = table.child(at, segment);
            }
            if let Some(node) = table.nodes.get_mut(at) {
                node.route = Some(Arc::new(route));
            }
        }
        table
    }

    /// All routes, in no order.
    pub(crate) fn routes(&self) -> impl Iterator<Item = &Route> {
        self.nodes.iter().filter_map(|node| node.route.as_deref())
    }

    fn root(&mut self, method: &str) -> usize {
        if let Some((_, root)) = self.roots.iter().find(|(known, _)| known == method) {
            return *root;
        }
        let root = self.grow();
        self.roots.push((method.to_owned(), root));
        root
    }

    fn child(&mut self, at: usize, segment: &Segment) -> usize {
        let known = self.nodes.get(at).and_then(|node| match segment {
            Segment::Literal(text) => node.literals.get(text),
            Segment::Capture { kind, .. } => {
                node.captures.iter().find(|(known, _)| known == kind).map(|(_, child)| *child)
            }
        });
        if let Some(known) = known {
            return known;
        }
        let child = self.grow();
        if let Some(node) = self.nodes.get_mut(at) {
            match segment {
                Segment::Literal(text) => node.literals.insert(text, child),
                Segment::Capture { kind, .. } => node.captures.push((*kind, child)),
            }
        }
        child
    }

    fn grow(&mut self) -> usize {
        self.nodes.push(Node::default());
        self.nodes.len() - 1
    }

    pub(crate) fn map(&self, parts: &http::request::Parts) -> Result<Mapped, Refusal> {
        check_headers(&parts.headers)?;
        let path = target_path(parts)?;
        let segments = template::segments_of(path)
            .map_err(|flaw| Refusal::malformed("request.path", flaw.to_string()))?;
        let (route, captured) =
            self.find(parts.method.as_str(), &segments).ok_or_else(|| self.unmapped(&parts.method, path))?;
        check_body_headers(route.body, &parts.headers).map_err(|refusal| refusal.on(route))?;
        let query = read_query(route, parts.uri.query()).map_err(|refusal| refusal.on(route))?;
        let values: Values = route
            .plan
            .taken
            .iter()
            .map(|taken| match taken {
                Taken::Capture(n) => captured.get(*n).copied(),
                Taken::Query(n) => query.get(*n).copied().flatten(),
                Taken::Body => None,
            })
            .map(|text| text.map(|text| AttributeValue::Text(text.into())))
            .collect();
        Mapped::new(Arc::clone(route), values, Arc::clone(&self.origin))
    }

    /// Whether this table, or one of the same service and version, mapped the request.
    pub(crate) fn mapped(&self, mapped: &Mapped) -> bool {
        Arc::ptr_eq(&mapped.origin, &self.origin) || mapped.origin == self.origin
    }

    /// The route of a path and what it captures of it.
    fn find<'p>(&self, method: &str, path: &Segments<'p>) -> Option<(&Arc<Route>, Segments<'p>)> {
        let (_, root) = self.roots.iter().find(|(known, _)| known == method)?;
        let mut captured = Segments::new();
        let route = self.descend(*root, path, &mut captured)?;
        Some((route, captured))
    }

    /// Literals first, because most routes begin with one; a node is visited once at most.
    fn descend<'p>(&self, at: usize, path: &[&'p str], captured: &mut Segments<'p>) -> Option<&Arc<Route>> {
        let node = self.nodes.get(at)?;
        let Some((segment, rest)) = path.split_first() else { return node.route.as_ref() };
        if let Some(child) = node.literals.get(segment)
            && let Some(route) = self.descend(child, rest, captured)
        {
            return Some(route);
        }
        for (kind, child) in &node.captures {
            if kind.admits(segment) {
                captured.push(segment);
                if let Some(route) = self.descend(*child, rest, captured) {
                    return Some(route);
                }
                captured.pop();
            }
        }
        None
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
    let (mut rewriting, mut unreadable) = (None, None);
    for (name, value) in headers {
        if let Some(known) = REWRITING_HEADERS.iter().position(|known| *known == name.as_str()) {
            rewriting = rewriting.min(Some(known)).or(Some(known));
        }
        if unreadable.is_none() && !is_plain_text(value.as_bytes()) {
            unreadable = Some(name);
        }
    }
    if let Some(name) = rewriting.and_then(|known| REWRITING_HEADERS.get(known)) {
        return Err(Refusal::malformed(
            "request.rewriting_header",
            format!("the header {name} is not accepted"),
        ));
    }
    match unreadable {
        Some(name) => {
            Err(Refusal::malformed("request.header_value", format!("the header {name} is not visible ASCII")))
        }
        None => Ok(()),
    }
}

/// Visible ASCII, spaces and tabs: what every reader behind us reads alike. Every byte is looked at, so that
/// the compiler can look at many at once.
fn is_plain_text(value: &[u8]) -> bool {
    value.iter().fold(true, |plain, byte| plain & (matches!(byte, 0x20..=0x7e) | (*byte == b'\t')))
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
        BodyRule::Grpc { .. } => return check_grpc_type(headers),
    };
    if headers.contains_key(CONTENT_ENCODING) {
        return refuse("an encoded body is not judged");
    }
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    let given = types.next().and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (media, parameter) = match given.split_once(';') {
        Some((media, parameter)) => (media.trim_end(), Some(parameter.trim())),
        None => (given, None),
    };
    let utf8 = parameter.is_none_or(|parameter| {
        ["charset=utf-8", "charset=\"utf-8\""].iter().any(|known| parameter.eq_ignore_ascii_case(known))
    });
    if !media.eq_ignore_ascii_case(wanted) || !utf8 || types.next().is_some() {
        return refuse(&format!("the body is not declared as {wanted}"));
    }
    Ok(())
}

/// Messages are protobuf, whose one encoding the type may name; each says itself whether it is compressed.
fn check_grpc_type(headers: &HeaderMap) -> Result<(), Refusal> {
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    let given = types.next().map(http::HeaderValue::as_bytes);
    let known = matches!(given, Some(b"application/grpc" | b"application/grpc+proto"));
    if !known || types.next().is_some() || headers.contains_key(CONTENT_ENCODING) {
        return Err(Refusal::malformed("request.body", "the body is not declared as application/grpc"));
    }
    Ok(())
}

/// The values of the route's query parameters, in the order in which it lists them.
type Query<'q> = SmallVec<[Option<&'q str>; 4]>;

fn read_query<'q>(route: &Route, query: Option<&'q str>) -> Result<Query<'q>, Refusal> {
    let refuse = |reason: String| Err(Refusal::malformed("request.query", reason));
    let query = query.unwrap_or_default();
    let mut values = Query::new();
    if query.is_empty() {
        return Ok(values);
    }
    if query.len() > MAX_QUERY_BYTES {
        return refuse(format!("the query is longer than {MAX_QUERY_BYTES} bytes"));
    }
    values.resize(route.query.len(), None);
    for pair in query.split('&') {
        let Some((name, value)) = pair.split_once('=') else {
            return refuse("a query parameter has no `=`".into());
        };
        let listed = route.query.iter().position(|listed| listed == name);
        let Some(slot) = listed.and_then(|listed| values.get_mut(listed)) else {
            return refuse(format!("the query parameter {:?} is not one of this route's", cut(name)));
        };
        if !is_plain_id(value) {
            return refuse(format!(
                "the query parameter {name:?} has other characters than A-Z a-z 0-9 . _ -"
            ));
        }
        if slot.replace(value).is_some() {
            return refuse(format!("the query parameter {name:?} appears twice"));
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::plan::Plan;
    use crate::schema::ObjectType;
    use crate::template::PathTemplate;

    fn route(method: &str, path: &str) -> Route {
        let template = PathTemplate::parse(path).unwrap();
        let kind = ObjectType { name: "T".parse().unwrap(), number: 0, attributes: BTreeMap::new() };
        Route {
            template: format!("{method} {path}"),
            method: method.into(),
            plan: Plan::new(&template, &[], &BTreeMap::new(), &[], &kind, &BTreeMap::new()),
            path: template,
            action: "Read".into(),
            kind: "T".into(),
            attributes: BTreeMap::new(),
            query: Vec::new(),
            body: BodyRule::None,
            message: None,
            upgrade: None,
            members: BTreeMap::new(),
            relations: Default::default(),
            list: None,
            filters: false,
        }
    }

    fn table(routes: Vec<Route>) -> RouteTable {
        RouteTable::new("shop", &PolicyVersion::of([("", "")]), routes)
    }

    /// Words that literals and requests share, so that they meet.
    fn segment() -> impl Strategy<Value = String> {
        prop_oneof![
            "[ab7]",
            Just("12".to_owned()),
            Just("a-b".to_owned()),
            Just("A_b".to_owned()),
            Just("0b0c4a0e-93c5-4a0e-8a33-0f6f2a3c1d9e".to_owned()),
        ]
    }

    fn path_of(
        part: impl Strategy<Value = String>,
        parts: std::ops::Range<usize>,
    ) -> impl Strategy<Value = String> {
        proptest::collection::vec(part, parts).prop_map(|parts| format!("/{}", parts.join("/")))
    }

    fn template() -> impl Strategy<Value = (&'static str, String)> {
        let capture = prop_oneof![Just(""), Just(":int"), Just(":uuid"), Just(":slug")];
        let part = prop_oneof![segment(), capture.prop_map(|kind| format!("{{x{kind}}}"))];
        let numbered = path_of(part, 0..4).prop_map(|path| {
            let parts = path.split("{x").enumerate();
            parts.map(|(n, part)| if n == 0 { part.to_owned() } else { format!("{{x{n}{part}") }).collect()
        });
        (prop_oneof![Just("GET"), Just("POST")], numbered)
    }

    proptest! {
        #[test]
        fn the_tree_finds_what_a_look_at_every_route_finds(
            templates in proptest::collection::vec(template(), 1..40),
            asked in proptest::collection::vec((prop_oneof![Just("GET"), Just("POST"), Just("PUT")], path_of(segment(), 0..4)), 1..40),
        ) {
            let mut routes: Vec<Route> = Vec::new();
            for (method, path) in templates {
                let new = route(method, &path);
                if !routes.iter().any(|old| old.method == new.method && old.path.overlaps(&new.path)) {
                    routes.push(new);
                }
            }
            let all = routes.clone();
            let table = table(routes);
            for (method, path) in &asked {
                let segments = template::segments_of(path).unwrap();
                let expected = all.iter().filter(|route| route.method == *method).find_map(|route| {
                    let captured = route.path.matches(&segments)?;
                    Some((route.template.clone(), captured.into_iter().map(|(_, value)| value).collect::<Vec<_>>()))
                });
                let found = table.find(method, &segments);
                let found = found.map(|(route, captured)| (route.template.clone(), captured.to_vec()));
                prop_assert_eq!(found, expected, "{} {}", method, path);
            }
        }

        #[test]
        fn plain_text_is_what_http_reads_as_text(value in proptest::collection::vec(any::<u8>(), 0..12)) {
            if let Ok(header) = http::HeaderValue::from_bytes(&value) {
                prop_assert_eq!(is_plain_text(&value), header.to_str().is_ok());
            }
        }
    }

    #[test]
    fn of_two_flaws_in_headers_the_rewriting_one_is_named() {
        let mut headers = HeaderMap::new();
        headers.insert("a", http::HeaderValue::from_bytes(b"caf\xe9").unwrap());
        headers.insert("x-rewrite-url", "/".parse().unwrap());
        headers.insert("x-original-url", "/".parse().unwrap());
        let refusal = check_headers(&headers).unwrap_err();
        assert_eq!(refusal.rule(), "request.rewriting_header");
        assert!(refusal.to_string().contains("x-original-url"), "{refusal}");
    }
}
