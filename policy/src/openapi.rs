//! What a service's OpenAPI description (3.0 and 3.1, <https://spec.openapis.org/oas/>) says its routes are, held against
//! its map: for whoever checks policies. It decides nothing.

mod yaml;

use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

use serde::Serialize;

use self::yaml::{Flaw, Member, Node, Place};
use crate::map::Route;
use crate::problem::Problem;
use crate::template::Segment;

/// What the file of a service may be called.
pub(crate) const NAMES: [&str; 3] = ["openapi.yaml", "openapi.yml", "openapi.json"];
/// The members of a path item that are operations.
const METHODS: [&str; 8] = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];
/// Most paths, and most operations, each once for every server whose paths begin otherwise.
const MAX_OPERATIONS: usize = 10_000;
/// Most servers of an operation, and most values of the variables in the URL of one.
const MAX_SERVERS: usize = 64;
/// Longest path, and longest URL of a server; no request has a longer one.
const MAX_PATH_BYTES: usize = 2048;
/// Most references that lead from one path item to the next.
const MAX_REFERENCES: usize = 8;

/// An operation of a description that no route of the map means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnmappedOperation {
    /// Method and path, as `GET /accounts/{id}`.
    pub operation: String,
    /// The description, below the policies directory.
    pub file: String,
    /// Where the operation begins there, from 1.
    pub line: usize,
    /// The route that takes its requests all the same, as ones for an object of that name; without one they are denied.
    pub taken_by: Option<String>,
}

/// A description held against a map.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    pub(crate) unmapped: Vec<UnmappedOperation>,
    /// The templates of routes that the description lacks.
    pub(crate) undescribed: Vec<String>,
}

/// Something that the service can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Operation {
    method: String,
    path: String,
    line: usize,
}

/// Every operation of a description, in the order of the file. Webhooks and callbacks are requests that the service makes.
pub(crate) fn operations(path: &Path, text: &str) -> Result<Vec<Operation>, Problem> {
    read(text).map_err(|flaw| {
        let start = flaw.at.offset(text);
        Problem::at(path, text, start..start, flaw.message).maybe_hint(flaw.hint.map(str::to_owned))
    })
}

/// What a map lacks of a description, and the other way round. `file` is the description's name.
pub(crate) fn compare(operations: &[Operation], routes: &[Route], file: &str) -> Compared {
    let described: Vec<Described<'_>> = operations.iter().map(Described::from).collect();
    let missing = described.iter().filter(|it| !routes.iter().any(|route| it.fits(route, is_same)));
    let unmapped = missing.map(|it| UnmappedOperation {
        operation: format!("{} {}", it.operation.method, it.operation.path),
        file: file.to_owned(),
        line: it.operation.line,
        taken_by: routes.iter().find(|route| it.fits(route, takes)).map(|route| route.template.clone()),
    });
    // What a gRPC method is stands in `.proto` files.
    let of_http = routes.iter().filter(|route| route.message.is_none());
    let undescribed = of_http.filter(|route| !described.iter().any(|it| it.fits(route, is_same)));
    Compared {
        unmapped: unmapped.collect(),
        undescribed: undescribed.map(|route| route.template.clone()).collect(),
    }
}

/// An operation with its path taken apart.
struct Described<'a> {
    operation: &'a Operation,
    segments: Vec<&'a str>,
}

impl<'a> From<&'a Operation> for Described<'a> {
    fn from(operation: &'a Operation) -> Self {
        let path = operation.path.strip_prefix('/').unwrap_or(&operation.path);
        let segments = if path.is_empty() { Vec::new() } else { path.split('/').collect() };
        Self { operation, segments }
    }
}

impl Described<'_> {
    fn fits(&self, route: &Route, how: fn(&str, &Segment) -> bool) -> bool {
        let segments = route.path.segments();
        self.operation.method == route.method
            && self.segments.len() == segments.len()
            && self.segments.iter().zip(segments).all(|(described, segment)| how(described, segment))
    }
}

/// Whether a segment of a described path says what one of a route says: `{x}` is a capture, whatever its name and kind,
/// and so is a segment with a part of that form, which no route tells apart.
fn is_same(described: &str, segment: &Segment) -> bool {
    match segment {
        Segment::Literal(text) => described == text,
        Segment::Capture { .. } => described.contains('{'),
    }
}

/// Whether requests with a segment of a described path are such with one of a route.
fn takes(described: &str, segment: &Segment) -> bool {
    match segment {
        Segment::Capture { kind, .. } if !described.contains('{') => kind.admits(described),
        segment => is_same(described, segment),
    }
}

fn read(text: &str) -> Result<Vec<Operation>, Flaw> {
    let document = yaml::parse(text)?;
    document.members("the description")?;
    check_version(&document)?;
    let servers = document.get("servers");
    let Some(paths) = document.get("paths") else {
        let has_others = ["components", "webhooks"].iter().any(|name| document.get(name).is_some());
        return if has_others { Ok(Vec::new()) } else { Err(Flaw::new(document.at, "there are no `paths`")) };
    };
    let paths = paths.members("`paths`")?;
    if paths.len() > MAX_OPERATIONS {
        return Err(Flaw::new(document.at, format!("more than {MAX_OPERATIONS} paths")));
    }
    let mut operations = Vec::new();
    for Member { key: path, at, value: item } in paths {
        if path.starts_with("x-") {
            continue;
        }
        if !path.starts_with('/') {
            return Err(Flaw::new(*at, format!("the path `{path}` does not begin with `/`")));
        }
        if path.len() > MAX_PATH_BYTES {
            return Err(Flaw::new(*at, format!("a path of more than {MAX_PATH_BYTES} bytes")));
        }
        let items = with_references(&document, item)?;
        for method in METHODS {
            let Some((item, member)) = items.iter().find_map(|item| Some((item, item.member(method)?)))
            else {
                continue;
            };
            member.value.members("an operation")?;
            let servers = member.value.get("servers").or_else(|| item.get("servers")).or(servers);
            let named = |base: String| Operation {
                method: method.to_ascii_uppercase(),
                path: format!("{base}{path}"),
                line: member.at.line,
            };
            operations.extend(bases(servers)?.into_iter().map(named));
        }
        if operations.len() > MAX_OPERATIONS {
            return Err(Flaw::new(*at, format!("more than {MAX_OPERATIONS} operations")));
        }
    }
    Ok(operations)
}

/// 3.0 and 3.1, whatever the third number.
fn check_version(document: &Node) -> Result<(), Flaw> {
    const HINT: &str = "known are openapi: 3.0.x and 3.1.x";
    let Some(version) = document.get("openapi") else {
        let flaw = Flaw::new(document.at, "it does not say `openapi: 3.1.0` or the like");
        return Err(match document.get("swagger") {
            Some(swagger) => Flaw::new(swagger.at, "it is Swagger, OpenAPI's predecessor").hint(HINT),
            None => flaw.hint(HINT),
        });
    };
    let written = version.text("the version")?;
    let is_known = |known: &str| {
        written.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    if ["3.0", "3.1"].into_iter().any(is_known) {
        return Ok(());
    }
    Err(Flaw::new(version.at, format!("the version `{written}` of OpenAPI is not known")).hint(HINT))
}

/// A path item, and those that it refers to.
fn with_references(document: &Rc<Node>, item: &Rc<Node>) -> Result<Vec<Rc<Node>>, Flaw> {
    item.members("a path item")?;
    let mut items = vec![Rc::clone(item)];
    let mut item = Rc::clone(item);
    while let Some(reference) = item.get("$ref") {
        let written = reference.text("a reference")?;
        if items.len() > MAX_REFERENCES {
            return Err(Flaw::new(
                reference.at,
                format!("more than {MAX_REFERENCES} references one after the other"),
            ));
        }
        let Some(pointer) = written.strip_prefix('#') else {
            return Err(Flaw::new(reference.at, format!("`{written}` is in another file"))
                .hint("put all of the description into one file"));
        };
        let unknown = || Flaw::new(reference.at, format!("`{written}` is not in this file"));
        item = pointed_at(document, pointer).ok_or_else(unknown)?;
        item.members("a path item")?;
        items.push(Rc::clone(&item));
    }
    Ok(items)
}

/// What a JSON pointer in the fragment of a URI leads to (RFC 6901).
fn pointed_at(document: &Rc<Node>, pointer: &str) -> Option<Rc<Node>> {
    let mut node = Rc::clone(document);
    for part in pointer.strip_prefix('/')?.split('/') {
        let part = percent_decoded(part)?.replace("~1", "/").replace("~0", "~");
        let next = Rc::clone(node.get(&part)?);
        node = next;
    }
    Some(node)
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        bytes.push(if byte == b'%' { digit(rest.next()?)? * 16 + digit(rest.next()?)? } else { byte });
    }
    String::from_utf8(bytes).ok()
}

/// What the paths of these servers begin with, each once: usually nothing.
fn bases(servers: Option<&Rc<Node>>) -> Result<BTreeSet<String>, Flaw> {
    let servers = servers.map_or(Ok([].as_slice()), |servers| few(servers, "`servers`"))?;
    let mut bases = BTreeSet::new();
    for server in servers {
        server.members("a server")?;
        let url = server.get("url").ok_or_else(|| Flaw::new(server.at, "the server has no `url`"))?;
        for written in spelled_out(url, server.get("variables"))? {
            bases.insert(path_of(&written, url.at)?);
        }
    }
    // Without servers it is `/`.
    if bases.is_empty() {
        bases.insert(String::new());
    }
    Ok(bases)
}

/// A server's URL with each of the values that its variables may have.
fn spelled_out(url: &Node, variables: Option<&Rc<Node>>) -> Result<Vec<String>, Flaw> {
    let flaw = |message: String| Flaw::new(url.at, message);
    let mut written = vec![String::new()];
    let mut rest = url.text("a URL")?;
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) =
            after.split_once('}').ok_or_else(|| flaw("the URL has a `{` without `}`".into()))?;
        let variable = variables.and_then(|variables| variables.get(name));
        let variable =
            variable.ok_or_else(|| flaw(format!("the variable `{name}` is not among `variables`")))?;
        let default = variable.get("default");
        let default = default.ok_or_else(|| flaw(format!("the variable `{name}` has no `default`")))?;
        let listed = variable.get("enum").map_or(Ok([].as_slice()), |listed| few(listed, "`enum`"))?;
        let values = listed.iter().chain([default]).map(|value| value.text("a value"));
        let values: BTreeSet<&str> = values.collect::<Result<_, _>>()?;
        let with =
            |value: &&str| written.iter().map(|start| format!("{start}{before}{value}")).collect::<Vec<_>>();
        written = values.iter().flat_map(with).collect();
        if written.len() > MAX_SERVERS || written.iter().any(|written| written.len() > MAX_PATH_BYTES) {
            return Err(flaw(format!(
                "the URL is more than {MAX_SERVERS} URLs, or one of more than {MAX_PATH_BYTES} bytes"
            )));
        }
        rest = after;
    }
    if rest.len() > MAX_PATH_BYTES {
        return Err(flaw(format!("a URL of more than {MAX_PATH_BYTES} bytes")));
    }
    Ok(written.into_iter().map(|start| start + rest).collect())
}

/// A list that stands for what each operation has again.
fn few<'a>(list: &'a Node, what: &str) -> Result<&'a [Rc<Node>], Flaw> {
    let items = list.items(what)?;
    if items.len() > MAX_SERVERS {
        return Err(Flaw::new(list.at, format!("{what} has more than {MAX_SERVERS} elements")));
    }
    Ok(items)
}

/// The path of a server's URL without a `/` at its end. One that is relative stands below the root, since where the
/// description is served from is not known.
fn path_of(url: &str, at: Place) -> Result<String, Flaw> {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let path = match url.split_once("//") {
        Some((scheme, rest)) if scheme.is_empty() || scheme.ends_with(':') => {
            rest.split_once('/').map_or("", |(_, path)| path)
        }
        _ => url.strip_prefix("./").or(url.strip_prefix('/')).unwrap_or(url),
    };
    let path = path.trim_end_matches('/');
    if path.split('/').any(|segment| segment == "..") {
        return Err(Flaw::new(at, format!("where `{url}` leads depends on where the description is served"))
            .hint("write the path of the server out, as url: /v1"));
    }
    Ok(if path.is_empty() || path == "." { String::new() } else { format!("/{path}") })
}

#[cfg(test)]
mod tests;
