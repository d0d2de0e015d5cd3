//! `map.toml`: which requests mean which action on which object. What is not in it is denied.

mod list;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prost_reflect::DescriptorPool;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::body::{
    BodyRule, DEFAULT_BODY_BYTES, MAX_JUDGED_BODY_BYTES, MAX_OPAQUE_BODY_BYTES, Member, MemberType, Members,
};
use crate::object::{AttributeType, Attributes};
use crate::plan::{Plan, Told};
use crate::problem::{Problem, Problems, suggest};
use crate::proto::{Call, Shape};
use crate::record::Mode;
use crate::request::AttributeSource;
use crate::schema::{AttributeSpec, ObjectType, ServiceSchema};
use crate::shipped::{Routes, Shipped};
use list::DraftList;
pub(crate) use list::List;

use crate::template::{CaptureType, ObjectTemplate, PathTemplate, Piece, Place, is_field_path, is_name};

/// The `body_type` of gRPC messages.
const GRPC: &str = "grpc";
/// Most routes of one service: overlap is checked between every two.
const MAX_ROUTES: usize = 2000;
/// Paths that are the mesh's own conversation with an app and never a route of it.
pub(crate) const RESERVED_PREFIX: &str = "/.well-known/palisade/";
const METHODS: [&str; 6] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"];

/// A claim of the user's that can be an attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    Subject,
    Issuer,
    Client,
}

/// Where an attribute of a route's object comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// The request itself.
    Request(Place),
    /// The verified user.
    Claim(Claim),
    /// The service's `relations.toml`.
    Relations,
    /// The relations that are written by API, where the map says `relations = "store"`.
    Stored,
    /// The app's entities endpoint, asked before the request is passed on.
    Entities,
    /// The app's response, before a byte of it is released.
    Response(String),
}

/// As maps write it.
impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Request(Place::Path(name)) => write!(f, "path:{name}"),
            Self::Request(Place::Query(name)) => write!(f, "query:{name}"),
            Self::Request(Place::Body(name)) => write!(f, "body:/{name}"),
            Self::Request(Place::First(name)) => write!(f, "body:/{name}/0"),
            Self::Claim(Claim::Subject) => f.write_str("claim:sub"),
            Self::Claim(Claim::Issuer) => f.write_str("claim:iss"),
            Self::Claim(Claim::Client) => f.write_str("claim:client_id"),
            Self::Relations | Self::Stored => f.write_str("relations"),
            Self::Entities => f.write_str("entities"),
            Self::Response(pointer) => write!(f, "response:{pointer}"),
        }
    }
}

/// One resolved route.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    /// `GET /accounts/{id:int}`: the label in metrics.
    pub(crate) template: String,
    pub(crate) method: String,
    pub(crate) path: PathTemplate,
    pub(crate) action: String,
    /// Full name of the objects' type.
    pub(crate) kind: Arc<str>,
    pub(crate) attributes: BTreeMap<String, (Source, AttributeType)>,
    pub(crate) query: Vec<String>,
    pub(crate) body: BodyRule,
    /// The one protocol that a connection may be upgraded to.
    pub(crate) upgrade: Option<String>,
    pub(crate) members: Members,
    /// What the messages of a gRPC method are, if they are judged.
    pub(crate) message: Option<Arc<Shape>>,
    pub(crate) plan: Plan,
    /// What the service's relations say of objects.
    pub(crate) relations: Arc<Attributes>,
    /// What its answer lists, if each of that is judged.
    pub(crate) list: Option<Box<List>>,
    /// Whether objects of its list that are denied are taken out, and the rest passed on.
    pub(crate) filters: bool,
}

impl Route {
    /// Where attributes that the request does not tell come from.
    pub(crate) fn attributes_from(&self) -> AttributeSource {
        attributes_from(&self.attributes)
    }

    /// Whether anything of its objects is told by the pushed relations.
    pub(crate) fn asks_relations(&self) -> bool {
        self.plan.attributes.contains(&Told::Stored)
    }

    /// Whether it is a request with this method and path that it means.
    pub(crate) fn takes(&self, method: &str, path: &str) -> bool {
        self.method == method && PathTemplate::parse(path).is_ok_and(|path| self.path.overlaps(&path))
    }

    pub(crate) fn needs_body(&self) -> bool {
        matches!(self.body, BodyRule::Json { .. } | BodyRule::Form { .. } | BodyRule::Grpc { .. })
    }
}

fn attributes_from(attributes: &BTreeMap<String, (Source, AttributeType)>) -> AttributeSource {
    let has = |wanted: fn(&Source) -> bool| attributes.values().any(|(source, _)| wanted(source));
    if has(|s| matches!(s, Source::Response(_))) {
        AttributeSource::Response
    } else if has(|s| *s == Source::Entities) {
        AttributeSource::Entities
    } else {
        AttributeSource::Known
    }
}

/// What a service's map says its callers speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mapping {
    /// HTTP: every request is mapped by a `[[route]]`.
    #[default]
    Routes,
    /// The app's own protocol over plain connections: each is the action [`CONNECT_ACTION`] on a [`PORT_TYPE`].
    Tcp,
    /// Kafka's protocol: what a request does to each topic, group and transactional id is judged by itself.
    Kafka,
    /// None that a sidecar could judge: the service names its objects itself, as the vault does.
    None,
}

/// What a map says by `mapping`.
#[derive(Debug, Clone, Copy)]
enum Named {
    None,
    Tcp,
    Shipped(&'static Shipped),
}

/// The action that opening a connection is, where a map says `mapping = "tcp"`.
pub const CONNECT_ACTION: &str = "Connect";
/// The type of the object that a connection is opened to; its id is the port's name.
pub const PORT_TYPE: &str = "Port";

/// Control signs anew every hour; after a day without it no identity is valid any more either.
const DEFAULT_MAX_AGE: Duration = Duration::from_secs(24 * 3600);
const MAX_AGES: RangeInclusive<Duration> =
    Duration::from_secs(2 * 3600)..=Duration::from_secs(30 * 24 * 3600);

/// A copy asks every second whether it is the newest.
const DEFAULT_RELATIONS_MAX_AGE: Duration = Duration::from_secs(5);
const RELATIONS_MAX_AGES: RangeInclusive<Duration> = Duration::from_secs(2)..=Duration::from_secs(3600);

/// A parsed map.
#[derive(Debug)]
pub(crate) struct Map {
    pub(crate) mode: Mode,
    /// When audit mode ends, since the Unix epoch.
    pub(crate) audit_until: Option<Duration>,
    /// For how long it may be in force without being signed anew.
    pub(crate) max_age: Duration,
    /// How old a copy of the relations may be that are written by API, if they are.
    pub(crate) relations_max_age: Option<Duration>,
    pub(crate) mapping: Mapping,
    pub(crate) routes: Vec<Route>,
}

impl Default for Map {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            audit_until: None,
            max_age: DEFAULT_MAX_AGE,
            relations_max_age: None,
            mapping: Mapping::default(),
            routes: Vec::new(),
        }
    }
}

/// A value of the file and where it stands.
#[derive(Debug, Clone)]
struct At<T> {
    value: T,
    span: Range<usize>,
}

/// What a `[[route]]` says, before it is held against the schema.
#[derive(Debug, Default)]
struct Draft {
    span: Range<usize>,
    matching: Option<At<String>>,
    action: Option<At<String>>,
    objects: Vec<At<String>>,
    attributes: Vec<(At<String>, At<String>)>,
    query: Vec<At<String>>,
    body: Option<Vec<(At<String>, At<String>)>>,
    body_type: Option<At<String>>,
    body_max_bytes: Option<At<usize>>,
    upgrade: Option<At<String>>,
    list: Option<DraftList>,
    batch: Option<At<String>>,
}

/// What stands beside a map.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Beside<'a> {
    /// What gRPC messages are.
    pub(crate) protos: Option<&'a DescriptorPool>,
    /// What is true of objects.
    pub(crate) relations: Option<&'a Arc<Attributes>>,
}

/// Parses and resolves a map. `None` and at least one problem more if something is wrong.
pub(crate) fn parse(
    file: &Path,
    text: &str,
    schema: &ServiceSchema,
    beside: Beside<'_>,
    problems: &mut Problems,
) -> Option<Map> {
    let before = problems.0.len();
    let mut reader = Reader { file, text, beside, stored: false, problems };
    let map = reader.map(schema);
    (problems.0.len() == before).then_some(map)
}

struct Reader<'a> {
    file: &'a Path,
    text: &'a str,
    beside: Beside<'a>,
    /// Whether the map says `relations = "store"`.
    stored: bool,
    problems: &'a mut Problems,
}

impl Reader<'_> {
    fn map(&mut self, schema: &ServiceSchema) -> Map {
        let mut map = Map::default();
        let document = match DeTable::parse(self.text) {
            Ok(document) => document,
            Err(error) => {
                self.problems.push(Problem::toml(self.file, self.text, &error));
                return map;
            }
        };
        let (mut mapping, mut until, mut relations_max_age) = (None, None, None);
        let mut drafts = Vec::new();
        for (key, value) in document.get_ref() {
            match key.get_ref().as_ref() {
                "mode" => map.mode = self.mode(value),
                "audit_until" => {
                    map.audit_until = self.date(value);
                    until = Some(value.span());
                }
                "max_age" => map.max_age = self.max_age(value),
                "relations" => self.stored = self.relations(value),
                "relations_max_age" => {
                    relations_max_age = Some((self.relations_max_age(value), value.span()))
                }
                "mapping" => mapping = Some((self.mapping(value), value.span())),
                "route" => drafts = self.drafts(value),
                other => self.unknown_key(
                    other,
                    key.span(),
                    &["mode", "audit_until", "max_age", "relations", "relations_max_age", "mapping", "route"],
                ),
            }
        }
        if let (Some(span), Mode::Enforce) = (until, map.mode) {
            self.say(span, "`audit_until` without `mode = \"audit\"`").hint("add it, or leave both out");
        }
        match relations_max_age {
            Some((_, span)) if !self.stored => {
                self.say(span, "`relations_max_age` without `relations = \"store\"`")
                    .hint("add it, or leave both out: relations.toml is as old as the policies");
            }
            given => {
                let age = given.map_or(DEFAULT_RELATIONS_MAX_AGE, |(age, _)| age);
                map.relations_max_age = self.stored.then_some(age);
            }
        }
        match mapping {
            Some((Named::Tcp, span)) if !drafts.is_empty() => {
                self.say(
                    span,
                    "a service has routes or is \"tcp\": what a connection carries could not be judged",
                )
                .hint("give the plain port a service, and a policy, of its own");
            }
            Some((Named::Tcp, span)) => {
                self.connections(span, schema);
                map.mapping = Mapping::Tcp;
            }
            Some((Named::Shipped(shipped), span)) if !drafts.is_empty() => {
                let message = format!(
                    "a service has routes or is \"{}\": what its requests mean is known",
                    shipped.mapping
                );
                self.say(span, message).hint("leave the routes out");
            }
            Some((Named::Shipped(shipped), _)) => {
                map.mapping = shipped.speaks;
                map.routes = self.shipped(shipped.routes.as_ref(), schema);
            }
            Some((Named::None, _)) if drafts.is_empty() => map.mapping = Mapping::None,
            Some((Named::None, _)) => {}
            None if drafts.is_empty() && self.problems.0.is_empty() => {
                self.say(0..0, "the map has no [[route]], so every request would be denied").hint(
                    "write `mapping = \"none\"` if this service has no HTTP of its own and names its objects itself, \
                     `mapping = \"kafka\"` if it speaks Kafka (\"vault\" and \"store\" for Palisade's own vault and store), \
                     `mapping = \"tcp\"` if it speaks another protocol",
                );
            }
            None => {}
        }
        if drafts.len() > MAX_ROUTES {
            self.say(0..0, format!("more than {MAX_ROUTES} routes"));
            return map;
        }
        for draft in drafts {
            let span = draft.span.clone();
            if let Some(route) = self.resolve(draft, schema) {
                self.check_overlap(&map.routes, &route, span);
                map.routes.push(route);
            }
        }
        map
    }

    fn say(&mut self, span: Range<usize>, message: impl Into<String>) -> Said<'_> {
        self.problems.push(Problem::at(self.file, self.text, span, message));
        Said(self.problems.0.last_mut())
    }

    fn unknown_key(&mut self, key: &str, span: Range<usize>, known: &[&str]) {
        let hint = suggest(key, known.iter().copied()).unwrap_or(format!("known keys: {}", known.join(", ")));
        self.say(span, format!("unknown key `{key}`")).hint(hint);
    }

    fn mode(&mut self, value: &Spanned<DeValue<'_>>) -> Mode {
        match value.get_ref().as_str() {
            Some("enforce") => Mode::Enforce,
            Some("audit") => Mode::Audit,
            _ => {
                self.say(value.span(), "`mode` is \"enforce\" or \"audit\"");
                Mode::Enforce
            }
        }
    }

    /// Whether relations are written by API: one source speaks, or an object could have two owners.
    fn relations(&mut self, value: &Spanned<DeValue<'_>>) -> bool {
        match value.get_ref().as_str() {
            Some("file") => false,
            Some("store") => {
                if self.beside.relations.is_some() {
                    self.say(value.span(), "there is a relations.toml, which nobody would look at")
                        .hint("write its objects with `palisade relations write`, and remove the file");
                }
                true
            }
            _ => {
                self.say(
                    value.span(),
                    "`relations` is \"file\" (relations.toml) or \"store\" (written by API)",
                );
                false
            }
        }
    }

    fn relations_max_age(&mut self, value: &Spanned<DeValue<'_>>) -> Duration {
        let read = value.get_ref().as_str().and_then(|text| humantime::parse_duration(text).ok());
        read.filter(|age| RELATIONS_MAX_AGES.contains(age)).unwrap_or_else(|| {
            self.say(value.span(), "`relations_max_age` is a time from 2s to 1h")
                .hint("relations_max_age = \"5s\": so long may what was taken away still count");
            DEFAULT_RELATIONS_MAX_AGE
        })
    }

    /// A time that control is sure to sign within, and not so long that nobody would notice.
    fn max_age(&mut self, value: &Spanned<DeValue<'_>>) -> Duration {
        let read = value
            .get_ref()
            .as_str()
            .and_then(|text| humantime::parse_duration(text).ok())
            .filter(|age| MAX_AGES.contains(age));
        read.unwrap_or_else(|| {
            self.say(value.span(), "`max_age` is a time from 2h to 30d").hint("max_age = \"24h\"");
            DEFAULT_MAX_AGE
        })
    }

    /// Midnight UTC at the beginning of a day.
    fn date(&mut self, value: &Spanned<DeValue<'_>>) -> Option<Duration> {
        let written = value.get_ref().as_datetime().filter(|at| at.time.is_none() && at.offset.is_none());
        let date = written.and_then(|at| at.date).and_then(|date| {
            let month = time::Month::try_from(date.month).ok()?;
            time::Date::from_calendar_date(i32::from(date.year), month, date.day).ok()
        });
        let seconds = date.and_then(|date| u64::try_from(date.midnight().assume_utc().unix_timestamp()).ok());
        if seconds.is_none() {
            self.say(value.span(), "`audit_until` is a date")
                .hint("audit_until = 2027-01-31, without quotes");
        }
        seconds.map(Duration::from_secs)
    }

    fn mapping(&mut self, value: &Spanned<DeValue<'_>>) -> Named {
        match value.get_ref().as_str() {
            Some("none") => Named::None,
            Some("tcp") => Named::Tcp,
            named => named.and_then(Shipped::named).map_or_else(
                || {
                    self.say(
                        value.span(),
                        "`mapping` is \"kafka\", \"store\", \"vault\", \"tcp\" or \"none\"",
                    )
                    .hint("leave it out where there are routes");
                    Named::None
                },
                Named::Shipped,
            ),
        }
    }

    /// The routes that come with a service that Palisade knows.
    fn shipped(&mut self, routes: Option<&Routes>, schema: &ServiceSchema) -> Vec<Route> {
        let Some(Routes { map, .. }) = routes else { return Vec::new() };
        let parsed = parse(Path::new(map.name), map.text, schema, self.beside, self.problems);
        parsed.map(|map| map.routes).unwrap_or_default()
    }

    /// A service of plain connections has something to connect to, of which nothing needs to be known.
    fn connections(&mut self, span: Range<usize>, schema: &ServiceSchema) {
        let port = schema.full_kind(PORT_TYPE);
        let applies = schema.actions.get(CONNECT_ACTION).is_some_and(|action| action.objects.contains(&port));
        if !applies {
            let message =
                format!("the schema of {} has no action `{CONNECT_ACTION}` on {port}", schema.namespace);
            self.say(span, message).hint(format!(
                "entity {PORT_TYPE}; action {CONNECT_ACTION} appliesTo {{ principal: [Mesh::Workload], resource: [{PORT_TYPE}], \
                 context: Mesh::Context }};"
            ));
            return;
        }
        let required = schema.types.get(&port).and_then(|kind| {
            kind.attributes.iter().find(|(_, spec)| spec.required).map(|(name, _)| name.clone())
        });
        if let Some(name) = required {
            self.say(span, format!("nothing tells the attribute `{name}` of {port}"))
                .hint("the object of a connection is the port's name alone");
        }
    }

    fn drafts(&mut self, value: &Spanned<DeValue<'_>>) -> Vec<Draft> {
        let Some(items) = value.get_ref().as_array() else {
            self.say(value.span(), "`route` is a list of tables").hint("write [[route]]");
            return Vec::new();
        };
        items.iter().filter_map(|item| self.draft(item)).collect()
    }

    fn draft(&mut self, item: &Spanned<DeValue<'_>>) -> Option<Draft> {
        const KNOWN: [&str; 11] = [
            "match",
            "action",
            "object",
            "attributes",
            "query",
            "body",
            "body_type",
            "body_max_bytes",
            "upgrade",
            "list",
            "batch",
        ];
        let Some(table) = item.get_ref().as_table() else {
            self.say(item.span(), "a route is a table").hint("write [[route]]");
            return None;
        };
        let mut draft = Draft { span: item.span(), ..Draft::default() };
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "match" => draft.matching = self.string(value),
                "action" => draft.action = self.string(value),
                "object" => draft.objects = self.one_or_more(value),
                "attributes" => draft.attributes = self.string_table(value),
                "query" => draft.query = self.list(value),
                "body" => draft.body = Some(self.string_table(value)),
                "body_type" => draft.body_type = self.string(value),
                "body_max_bytes" => draft.body_max_bytes = self.size(value),
                "upgrade" => draft.upgrade = self.string(value),
                "list" => draft.list = self.draft_list(value),
                "batch" => draft.batch = self.string(value),
                other => self.unknown_key(other, key.span(), &KNOWN),
            }
        }
        Some(draft)
    }

    fn string(&mut self, value: &Spanned<DeValue<'_>>) -> Option<At<String>> {
        let text = value.get_ref().as_str();
        if text.is_none() {
            self.say(value.span(), format!("expected a string, found {}", value.get_ref().type_str()));
        }
        text.map(|text| At { value: text.to_owned(), span: value.span() })
    }

    fn size(&mut self, value: &Spanned<DeValue<'_>>) -> Option<At<usize>> {
        let number = value.get_ref().as_integer().filter(|n| n.radix() == 10);
        let number = number.and_then(|n| n.as_str().replace('_', "").parse().ok()).filter(|n| *n > 0);
        if number.is_none() {
            self.say(value.span(), "expected a number of bytes, at least 1");
        }
        number.map(|value_| At { value: value_, span: value.span() })
    }

    fn one_or_more(&mut self, value: &Spanned<DeValue<'_>>) -> Vec<At<String>> {
        if value.get_ref().is_array() { self.list(value) } else { self.string(value).into_iter().collect() }
    }

    fn list(&mut self, value: &Spanned<DeValue<'_>>) -> Vec<At<String>> {
        let items: Option<&DeArray<'_>> = value.get_ref().as_array();
        if items.is_none() {
            self.say(value.span(), "expected a list of strings");
        }
        items.into_iter().flat_map(|items| items.iter()).filter_map(|item| self.string(item)).collect()
    }

    fn string_table(&mut self, value: &Spanned<DeValue<'_>>) -> Vec<(At<String>, At<String>)> {
        let table = value.get_ref().as_table();
        if table.is_none() {
            self.say(value.span(), "expected a table of strings");
        }
        let mut entries = Vec::new();
        for (key, value) in table.into_iter().flatten() {
            if let Some(text) = self.string(value) {
                entries.push((At { value: key.get_ref().to_string(), span: key.span() }, text));
            }
        }
        entries
    }

    fn resolve(&mut self, draft: Draft, schema: &ServiceSchema) -> Option<Route> {
        let before = self.problems.0.len();
        let (method, path, template) = self.matching(&draft)?;
        let action = self.action(&draft, schema);
        let (body, members) = self.body(&draft, &method);
        let (body, message) = self.message(&draft, &method, &path, body, &members);
        self.check_upgrade(&draft, &method);
        let query = self.query(&draft);
        // A list of JSON is a member of its own; those of a message go with their repeated field.
        let lists = message.as_ref().map(|message| message.lists());
        let places = Places { path: &path, query: &query, members: &members, lists: lists.as_ref() };
        let (objects, kind) = self.objects(&draft, schema, action.as_deref(), &places)?;
        let object_type = schema.types.get(&kind)?;
        let filters = self.filters(&draft, &method, body, &places, &objects);
        let attributes = self.attributes(&draft, &method, object_type, &places, &objects);
        let source = attributes_from(&attributes);
        let list = self.list_of(&draft, &method, schema, source).map(Box::new);
        let action = action?;
        (self.problems.0.len() == before).then_some(())?;
        let plan = Plan::new(&path, &query, &members, &objects, object_type, &attributes);
        let kind = kind.into();
        let upgrade = draft.upgrade.map(|protocol| protocol.value);
        Some(Route {
            template,
            method,
            path,
            action,
            kind,
            attributes,
            query,
            body,
            upgrade,
            members,
            message,
            plan,
            relations: self.beside.relations.cloned().unwrap_or_default(),
            list,
            filters,
        })
    }

    fn matching(&mut self, draft: &Draft) -> Option<(String, PathTemplate, String)> {
        let Some(At { value, span }) = &draft.matching else {
            self.say(draft.span.clone(), "the route has no `match`").hint("match = \"GET /path/{id:int}\"");
            return None;
        };
        let Some((method, path)) = value.split_once(' ') else {
            self.say(span.clone(), "`match` is a method, one space and a path");
            return None;
        };
        if !METHODS.contains(&method) {
            let hint = suggest(method, METHODS).unwrap_or(format!("methods: {}", METHODS.join(", ")));
            self.say(span.clone(), format!("`{method}` is not a method that can be mapped")).hint(hint);
        }
        if path.starts_with(RESERVED_PREFIX) {
            self.say(span.clone(), format!("{RESERVED_PREFIX} is the mesh's own and cannot be mapped"));
        }
        match PathTemplate::parse(path) {
            Ok(template) => Some((method.to_owned(), template, value.clone())),
            Err(error) => {
                // One for the quotation mark; escapes in the string would shift it, but paths have none.
                let offset = span.start + 1 + method.len() + 1;
                let at = offset + error.span.start..offset + error.span.end.max(error.span.start + 1);
                self.say(at, error.message);
                None
            }
        }
    }

    fn action(&mut self, draft: &Draft, schema: &ServiceSchema) -> Option<String> {
        let Some(At { value, span }) = &draft.action else {
            self.say(draft.span.clone(), "the route has no `action`");
            return None;
        };
        match schema.actions.get(value) {
            Some(action) if action.objects.is_empty() => {
                self.say(span.clone(), format!("the action `{value}` is a group and applies to no object"));
                None
            }
            Some(_) => Some(value.clone()),
            None => {
                let known = schema.actions.keys().map(String::as_str);
                let list = schema.actions.keys().cloned().collect::<Vec<_>>().join(", ");
                let hint = suggest(value, known).unwrap_or(format!("the schema's actions: {list}"));
                let message = format!("the schema of {} has no action `{value}`", schema.namespace);
                self.say(span.clone(), message).hint(hint);
                None
            }
        }
    }

    fn query(&mut self, draft: &Draft) -> Vec<String> {
        for (i, name) in draft.query.iter().enumerate() {
            if !is_name(&name.value) {
                self.say(name.span.clone(), format!("`{}` is not a parameter name", name.value));
            } else if draft.query.iter().take(i).any(|other| other.value == name.value) {
                self.say(name.span.clone(), format!("`{}` is listed twice", name.value));
            }
        }
        draft.query.iter().map(|name| name.value.clone()).collect()
    }

    fn body(&mut self, draft: &Draft, method: &str) -> (BodyRule, Members) {
        let mut members = Members::new();
        for (name, kind) in draft.body.iter().flatten() {
            let of_grpc = draft.body_type.as_ref().is_some_and(|kind| kind.value == GRPC);
            if !(is_name(&name.value) || of_grpc && is_field_path(&name.value)) {
                self.say(name.span.clone(), format!("`{}` is not a member name", name.value));
            }
            match Member::parse(&kind.value) {
                Some(member) => drop(members.insert(name.value.clone(), member)),
                None => {
                    self.say(kind.span.clone(), format!("`{}` is not a member type", kind.value)).hint(
                        format!("{}; with `?` behind it where it may be missing", Member::NAMES.join(", ")),
                    );
                }
            }
        }
        let kind = draft.body_type.as_ref().map(|kind| kind.value.as_str());
        if let (true, Some(kind)) =
            (members.values().any(|member| member.many), kind.filter(|kind| !matches!(*kind, "json" | GRPC)))
        {
            self.say(draft.span.clone(), format!("a body of type {kind:?} has no lists"))
                .hint("a list names objects in JSON and in gRPC messages only");
        }
        let stated = draft.body.is_some() || draft.body_type.is_some() || draft.body_max_bytes.is_some();
        if stated && matches!(method, "GET" | "HEAD") {
            self.say(draft.span.clone(), format!("a {method} request has no body"));
        }
        let limit = |most| draft.body_max_bytes.as_ref().map_or(DEFAULT_BODY_BYTES, |n| n.value.min(most));
        let judged = limit(MAX_JUDGED_BODY_BYTES);
        let (rule, most) = match (draft.body.is_some(), kind) {
            (true, None | Some("json")) => (BodyRule::Json { max_bytes: judged }, MAX_JUDGED_BODY_BYTES),
            (true, Some("form")) => (BodyRule::Form { max_bytes: judged }, MAX_JUDGED_BODY_BYTES),
            (true, Some(GRPC)) => {
                (BodyRule::Grpc { max_bytes: judged, streams: false }, MAX_JUDGED_BODY_BYTES)
            }
            (false, Some("opaque")) => {
                (BodyRule::Opaque { max_bytes: limit(MAX_OPAQUE_BODY_BYTES) }, MAX_OPAQUE_BODY_BYTES)
            }
            (false, None) => (BodyRule::None, usize::MAX),
            _ => {
                let span = draft.body_type.as_ref().map_or(draft.span.clone(), |kind| kind.span.clone());
                self.say(span, "`body_type` does not fit").hint(
                    "\"json\", \"form\" or \"grpc\" with `body = { member = \"type\" }`, or \"opaque\" without `body`",
                );
                (BodyRule::None, usize::MAX)
            }
        };
        if let Some(size) = &draft.body_max_bytes {
            if rule == BodyRule::None {
                self.say(size.span.clone(), "`body_max_bytes` without a body");
            } else if size.value > most {
                self.say(size.span.clone(), format!("at most {most} bytes"));
            }
        }
        (rule, members)
    }

    /// What the messages of a gRPC method are, held against the service's `.proto` files.
    fn message(
        &mut self,
        draft: &Draft,
        method: &str,
        path: &PathTemplate,
        rule: BodyRule,
        members: &Members,
    ) -> (BodyRule, Option<Arc<Shape>>) {
        let BodyRule::Grpc { max_bytes, .. } = rule else { return (rule, None) };
        let place = draft.matching.as_ref().map_or(draft.span.clone(), |matching| matching.span.clone());
        let Some(protos) = self.beside.protos else {
            let span = draft.body_type.as_ref().map_or(place, |kind| kind.span.clone());
            self.say(span, "there is no .proto file to read messages by")
                .hint("put the service's .proto files beside map.toml");
            return (rule, None);
        };
        let Some(path) = path.literal().filter(|_| method == "POST") else {
            self.say(place, "messages are those of one method: POST /package.Service/Method");
            return (rule, None);
        };
        match Call::new(protos, &path, members) {
            Ok(Call { message, streams }) => (BodyRule::Grpc { max_bytes, streams }, Some(message)),
            Err((member, message)) => {
                let at = |name: &str| {
                    let mut stated = draft.body.iter().flatten();
                    stated.find(|(stated, _)| stated.value == name).map(|(stated, _)| stated.span.clone())
                };
                let span = member.as_deref().and_then(at).unwrap_or(place);
                self.say(span, message);
                (rule, None)
            }
        }
    }

    /// What follows an upgrade is judged no further: the route must say so, and its object must be known before.
    fn check_upgrade(&mut self, draft: &Draft, method: &str) {
        let Some(At { value, span }) = &draft.upgrade else { return };
        let is_token =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_' | b'/');
        if value.is_empty() || !value.bytes().all(is_token) {
            self.say(span.clone(), format!("`{value}` is not the name of a protocol"))
                .hint("one name in lower case, such as \"websocket\"");
        } else if value.starts_with("h2") || value.starts_with("http") || value.starts_with("tls") {
            // Requests within the upgraded connection would meet no policy.
            self.say(span.clone(), format!("`{value}` would carry requests that nobody judges"))
                .hint("HTTP/2 is spoken without an upgrade");
        }
        if method != "GET" {
            self.say(span.clone(), format!("an upgrade begins with GET, not with {method}"));
        }
        if draft.attributes.iter().any(|(_, source)| source.value.starts_with("response:")) {
            self.say(span.clone(), "an answer that upgrades holds no attributes")
                .hint("take them from the path or from \"entities\"");
        }
    }

    fn objects(
        &mut self,
        draft: &Draft,
        schema: &ServiceSchema,
        action: Option<&str>,
        places: &Places<'_>,
    ) -> Option<(Vec<ObjectTemplate>, String)> {
        if draft.objects.is_empty() {
            self.say(draft.span.clone(), "the route has no `object`").hint("object = 'Type::\"{id}\"'");
        }
        let mut objects = Vec::new();
        let mut kind: Option<String> = None;
        for At { value, span } in &draft.objects {
            let template = match ObjectTemplate::parse(value) {
                Ok(template) => template,
                Err(message) => {
                    self.say(span.clone(), message);
                    continue;
                }
            };
            let full = schema.full_kind(&template.kind);
            if kind.as_ref().is_some_and(|first| *first != full) {
                self.say(span.clone(), "all objects of a route have one type");
            }
            self.check_kind(&full, span, schema, action);
            for place in template.places() {
                if let Err(message) = places.can_name_an_object(place) {
                    self.say(span.clone(), message);
                }
            }
            if places.lists_of(&template).len() > 1 {
                self.say(span.clone(), "one object is named by one list")
                    .hint("lists of one repeated field of a message are one, taken element by element");
            }
            if let [Piece::Value(place)] = template.pieces()
                && places.member(place).is_some_and(|member| member.optional && !member.many)
            {
                self.say(span.clone(), format!("{place} may be missing, and the id is nothing else"));
            }
            if let Err(message) = template.check_keys(|place| places.is_key(place)) {
                self.say(span.clone(), message);
            }
            kind = kind.or(Some(full));
            objects.push(template);
        }
        self.check_lists(draft, places, &objects);
        Some((objects, kind?))
    }

    /// Of a message one repeated field names objects; and a list that may be empty never leaves a request without any.
    fn check_lists(&mut self, draft: &Draft, places: &Places<'_>, objects: &[ObjectTemplate]) {
        let span = draft.objects.first().map_or(draft.span.clone(), |first| first.span.clone());
        let named: BTreeSet<&str> = objects.iter().flat_map(|object| places.lists_of(object)).collect();
        if places.lists.is_some() && named.len() > 1 {
            let named = named.into_iter().collect::<Vec<_>>().join("` and `");
            self.say(
                span.clone(),
                format!("the objects of a message are named by one repeated field, not by `{named}`"),
            );
        }
        let optional =
            |object: &ObjectTemplate| object.places().find(|place| places.is_optional_list(place)).cloned();
        if let Some(Some(place)) = objects.iter().map(optional).reduce(Option::and) {
            self.say(span, format!("{place} may be empty, and then nothing names an object"))
                .hint("make it not optional, or name an object besides that is there in any case");
        }
    }

    /// Whether a route's batches are filtered, which is not what everybody wants of every request: half of a change is
    /// none that was asked for, and what is taken out must leave the rest as it was.
    fn filters(
        &mut self,
        draft: &Draft,
        method: &str,
        body: BodyRule,
        places: &Places<'_>,
        objects: &[ObjectTemplate],
    ) -> bool {
        let Some(At { value, span }) = &draft.batch else { return false };
        if !matches!(value.as_str(), "all" | "filter") {
            self.say(span.clone(), "`batch` is \"all\" or \"filter\"")
                .hint("\"all\": every object must be permitted; \"filter\": those that are not are left out");
            return false;
        }
        if !objects.iter().any(|object| places.is_list(object)) {
            self.say(span.clone(), "`batch` where no list names the objects")
                .hint("body = { accounts = \"[id]\" }, object = 'Account::\"{body:/accounts}\"'");
            return false;
        }
        if value == "all" {
            return false;
        }
        let lists = places.lists();
        let (message, hint) = if method != "POST" {
            (
                format!("a {method} changes something, and half of it is not what was asked for"),
                "batch = \"all\"; \"filter\" is for reads that are a POST",
            )
        } else if matches!(body, BodyRule::Grpc { streams: true, .. }) {
            ("of a stream of messages nothing is left out".to_owned(), "batch = \"all\"")
        } else if objects.len() > 1 {
            ("the route has objects that its list does not name".to_owned(), "batch = \"all\", or one object")
        } else if lists.len() > 1 {
            let named = lists.iter().copied().collect::<Vec<_>>().join("` and `");
            (format!("what goes together in `{named}` is not known"), "batch = \"all\", or one list")
        } else if lists.iter().any(|list| list.contains('.')) {
            (
                "the list is not one of the message itself".to_owned(),
                "batch = \"all\"; \"filter\" leaves out elements of a repeated field at the top",
            )
        } else {
            return true;
        };
        self.say(span.clone(), message).hint(hint);
        false
    }

    fn check_kind(&mut self, full: &str, span: &Range<usize>, schema: &ServiceSchema, action: Option<&str>) {
        let Some(action) = action.and_then(|name| schema.actions.get(name).map(|action| (name, action)))
        else {
            return;
        };
        let (name, action) = action;
        if !action.objects.contains(full) {
            let mut known: Vec<&str> = action.objects.iter().map(String::as_str).collect();
            known.sort_unstable();
            self.say(span.clone(), format!("the action `{name}` does not apply to {full}"))
                .hint(format!("it applies to {}", known.join(", ")));
        }
    }

    fn attributes(
        &mut self,
        draft: &Draft,
        method: &str,
        object: &ObjectType,
        places: &Places<'_>,
        objects: &[ObjectTemplate],
    ) -> BTreeMap<String, (Source, AttributeType)> {
        let mut sources = BTreeMap::new();
        // Of a list in the body nobody knows how many there are.
        let several = objects.len() > 1 || objects.iter().any(|object| places.is_list(object));
        for (name, source) in &draft.attributes {
            let Some(spec) = object.attributes.get(&name.value) else {
                let known: Vec<&str> = object.attributes.keys().map(String::as_str).collect();
                let hint = suggest(&name.value, known.iter().copied())
                    .or((!known.is_empty()).then(|| format!("it has {}", known.join(", "))));
                let message = format!("{} has no attribute `{}`", object.name, name.value);
                self.say(name.span.clone(), message).maybe_hint(hint);
                continue;
            };
            match parse_source(&source.value).and_then(|parsed| {
                places.gives(&parsed, *spec, method)?;
                Ok(if self.stored && parsed == Source::Relations { Source::Stored } else { parsed })
            }) {
                Ok(Source::Request(place)) if places.tells_each(&place, spec.kind) => {
                    match places.check_each(&place, *spec, objects) {
                        Ok(()) => {
                            drop(sources.insert(name.value.clone(), (Source::Request(place), spec.kind)))
                        }
                        Err(message) => drop(self.say(source.span.clone(), message)),
                    }
                }
                Ok(Source::Request(_) | Source::Claim(_) | Source::Response(_)) if several => {
                    self.say(
                        source.span.clone(),
                        "several objects take their attributes from `entities` or `relations` only, or from the list that names them",
                    );
                }
                Ok(parsed) => drop(sources.insert(name.value.clone(), (parsed, spec.kind))),
                Err(message) => {
                    self.say(source.span.clone(), message);
                }
            }
        }
        for (name, spec) in &object.attributes {
            if spec.required && !draft.attributes.iter().any(|(stated, _)| stated.value == *name) {
                let message = format!("nothing tells the attribute `{name}` of {}", object.name);
                self.say(draft.span.clone(), message).hint(format!(
                    "attributes = {{ {name} = \"…\" }}: path:NAME, body:/NAME, claim:sub, relations, entities or response:/POINTER"
                ));
            }
        }
        let has = |wanted: fn(&Source) -> bool| sources.values().any(|(source, _)| wanted(source));
        if has(|s| *s == Source::Relations) && self.beside.relations.is_none() {
            self.say(draft.span.clone(), "there is no relations.toml to tell attributes")
                .hint(
                    "put it beside map.toml: [Account.\"17\"] owner = \"alice\"; or write relations = \"store\" there",
                );
        }
        if has(|s| *s == Source::Entities) && has(|s| matches!(s, Source::Response(_))) {
            self.say(
                draft.span.clone(),
                "attributes come from `entities` or from the response, not from both",
            );
        }
        sources
    }

    fn check_overlap(&mut self, routes: &[Route], new: &Route, span: Range<usize>) {
        let clash = routes.iter().find(|old| old.method == new.method && old.path.overlaps(&new.path));
        if let Some(old) = clash {
            let message = format!("`{}` matches requests that `{}` matches too", new.template, old.template);
            self.say(span, message)
                .hint("give the captures types ({id:int}) so that a request has one meaning");
        }
    }
}

/// The problem just pushed, so that a hint can be added to it.
struct Said<'a>(Option<&'a mut Problem>);

impl Said<'_> {
    fn hint(self, hint: impl Into<String>) {
        self.maybe_hint(Some(hint.into()));
    }

    fn maybe_hint(self, hint: Option<String>) {
        if let Some(problem) = self.0 {
            problem.hint = hint;
        }
    }
}

/// What a route takes from a request.
struct Places<'a> {
    path: &'a PathTemplate,
    query: &'a [String],
    members: &'a Members,
    /// Where the body is a message: the way to the repeated field of each list.
    lists: Option<&'a BTreeMap<String, String>>,
}

impl Places<'_> {
    /// The type of the value at a place; the error says that there is no such place.
    fn kind(&self, place: &Place) -> Result<(AttributeType, bool), String> {
        match place {
            Place::Path(name) => {
                let capture = self.path.captures().find(|(captured, _)| captured == name);
                let (_, kind) = capture.ok_or_else(|| format!("the path captures no `{{{name}}}`"))?;
                Ok((if kind == CaptureType::Int { AttributeType::Long } else { AttributeType::Text }, false))
            }
            Place::Query(name) if self.query.contains(name) => Ok((AttributeType::Text, true)),
            Place::Query(name) => Err(format!("`query` does not list `{name}`")),
            Place::Body(name) => {
                let member =
                    self.members.get(name).ok_or_else(|| format!("`body` does not list `{name}`"))?;
                let kind = match (member.kind, member.many) {
                    (MemberType::Id | MemberType::Key | MemberType::Text, false) => AttributeType::Text,
                    (MemberType::Int, false) => AttributeType::Long,
                    (MemberType::Bool, _) => AttributeType::Bool,
                    (MemberType::Id | MemberType::Key | MemberType::Text, true) => AttributeType::SetOfText,
                    (MemberType::Int, true) => AttributeType::SetOfLong,
                };
                Ok((kind, member.optional))
            }
            Place::First(name) => {
                let whole = Place::Body(name.clone());
                if self.is_key(&whole) || !self.members.contains_key(name) {
                    self.kind(&whole)
                } else {
                    Err(format!("{place} is a part of a key, and `{name}` is none"))
                }
            }
        }
    }

    fn can_name_an_object(&self, place: &Place) -> Result<(), String> {
        self.kind(place)?;
        match place {
            Place::Path(_) | Place::Query(_) => Ok(()),
            Place::Body(name) | Place::First(name) => match self.members.get(name) {
                Some(Member { kind: MemberType::Id | MemberType::Int, optional, many })
                    if *many || !optional =>
                {
                    Ok(())
                }
                // Without a key, all that have one are meant: nothing stands at its place.
                Some(Member { kind: MemberType::Key, .. }) => Ok(()),
                _ => Err(format!(
                    "the member `{name}` names an object, so it is an \"id\", \"int\" or \"key\", and not optional \
                     unless it is a \"key\" or a list"
                )),
            },
        }
    }

    fn member(&self, place: &Place) -> Option<Member> {
        self.members.get(place.member()?).copied()
    }

    fn is_key(&self, place: &Place) -> bool {
        self.member(place).is_some_and(|member| member.kind == MemberType::Key)
    }

    fn is_optional_list(&self, place: &Place) -> bool {
        self.member(place).is_some_and(|member| member.many && member.optional)
    }

    /// Whether an object is one for each value of a list.
    fn is_list(&self, object: &ObjectTemplate) -> bool {
        !self.lists_of(object).is_empty()
    }

    /// The lists that an object is named by; what leads through one repeated field of a message is one.
    fn lists_of<'t>(&'t self, object: &'t ObjectTemplate) -> BTreeSet<&'t str> {
        let places = object.places().filter(|place| self.member(place).is_some_and(|member| member.many));
        let way = |name| self.lists.and_then(|lists| lists.get(name)).map_or(name, String::as_str);
        places.filter_map(Place::member).map(way).collect()
    }

    /// All lists of the body; what leads through one repeated field of a message is one.
    fn lists(&self) -> BTreeSet<&str> {
        let many = self.members.iter().filter(|(_, member)| member.many).map(|(name, _)| name.as_str());
        many.map(|name| self.lists.and_then(|lists| lists.get(name)).map_or(name, String::as_str)).collect()
    }

    /// Whether a place tells an attribute of each object by itself: a list does that tells one value and not many.
    fn tells_each(&self, place: &Place, wanted: AttributeType) -> bool {
        let scalar = !matches!(wanted, AttributeType::SetOfText | AttributeType::SetOfLong);
        scalar && self.member(place).is_some_and(|member| member.many)
    }

    /// INVARIANT: what is told of an object so depends on its name alone, or of two elements that name one object only
    /// the first would be judged.
    fn check_each(
        &self,
        place: &Place,
        spec: AttributeSpec,
        objects: &[ObjectTemplate],
    ) -> Result<(), String> {
        let mut listed = objects.iter().filter(|object| self.is_list(object));
        let names = |object: &ObjectTemplate| object.places().any(|named| named.member() == place.member());
        match (listed.next().is_some_and(names), listed.next()) {
            (true, None) if spec.required && objects.len() > 1 => Err(format!(
                "{place} tells nothing of the other object of this route, of which the attribute is required too"
            )),
            (true, None) => Ok(()),
            (true, Some(_)) => Err(format!("{place} tells of one object what another list names")),
            (false, _) => Err(format!("{place} is a list that does not name the object")),
        }
    }

    /// Whether a source can give an attribute.
    fn gives(&self, source: &Source, spec: AttributeSpec, method: &str) -> Result<(), String> {
        let wanted = spec.kind;
        match source {
            Source::Request(place) if self.tells_each(place, wanted) => match (self.kind(place)?.0, wanted) {
                (AttributeType::SetOfText, AttributeType::Text)
                | (AttributeType::SetOfLong, AttributeType::Long) => Ok(()),
                (kind, _) => Err(format!("{place} is a {kind}, the attribute a {wanted}")),
            },
            Source::Request(place) => {
                let (kind, optional) = self.kind(place)?;
                if optional && spec.required {
                    return Err(format!("{place} may be missing; an attribute needs a value"));
                }
                // A path's integer is also its one spelling as text.
                let also_text = wanted == AttributeType::Text && matches!(place, Place::Path(_));
                let fits = kind == wanted || also_text;
                if fits { Ok(()) } else { Err(format!("{place} is a {kind}, the attribute a {wanted}")) }
            }
            Source::Claim(_) if wanted == AttributeType::Text => Ok(()),
            Source::Claim(_) => Err(format!("a claim is a String, the attribute a {wanted}")),
            Source::Entities | Source::Relations | Source::Stored => Ok(()),
            // The sidecar asks the app with GET for a HEAD, so there is a body to judge.
            Source::Response(_) if matches!(method, "GET" | "HEAD") => Ok(()),
            Source::Response(_) => Err(format!(
                "a {method} is done before its response is seen; only GET and HEAD take attributes from the response"
            )),
        }
    }
}

fn parse_source(text: &str) -> Result<Source, String> {
    let name =
        |name: &str| if is_name(name) { Ok(name.to_owned()) } else { Err(format!("`{name}` is not a name")) };
    match text.split_once(':') {
        None if text == "entities" => Ok(Source::Entities),
        None if text == "relations" => Ok(Source::Relations),
        Some(("path", capture)) => Ok(Source::Request(Place::Path(name(capture)?))),
        Some(("body", pointer)) => match pointer.strip_prefix('/') {
            Some(member) => match (member.strip_suffix("/0"), is_field_path(member)) {
                (_, true) => Ok(Source::Request(Place::Body(member.to_owned()))),
                (Some(key), _) if is_field_path(key) => Ok(Source::Request(Place::First(key.to_owned()))),
                _ => Err(format!("`{member}` is not a name, nor the first part of a key (NAME/0)")),
            },
            None => Err("a body member is written body:/name".into()),
        },
        Some(("claim", claim)) => match claim {
            "sub" => Ok(Source::Claim(Claim::Subject)),
            "iss" => Ok(Source::Claim(Claim::Issuer)),
            "client_id" => Ok(Source::Claim(Claim::Client)),
            _ => Err(format!("`{claim}` is not a claim that can be an attribute: sub, iss, client_id")),
        },
        Some(("response", pointer)) if is_pointer(pointer) => Ok(Source::Response(pointer.to_owned())),
        Some(("response", _)) => Err("a place in the response is a JSON pointer: response:/owner".into()),
        _ => Err(format!(
            "`{text}` is not a source: path:NAME, body:/NAME, claim:sub, relations, entities or response:/POINTER"
        )),
    }
}

/// A JSON pointer (RFC 6901) of at least one token.
fn is_pointer(text: &str) -> bool {
    let escapes_are_whole = text.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
    text.starts_with('/') && text.len() > 1 && escapes_are_whole
}
