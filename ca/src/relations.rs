//! Relations: what is true of a service's objects (owner, members, parent), written by API instead of committed.
//!
//! Control keeps them ([`crate::control`]) and tells each service's sidecars of every change at once. Here is what a
//! relation may be, and the two clients of the agent: [`Writer`] writes, [`follow`] keeps a copy that knows how old it is.

use std::collections::VecDeque;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use identity::clock::SharedClock;
use identity::{Scope, json, workload_api};

use crate::backoff::Backoff;
use crate::pb::mesh as pb;
use crate::pb::mesh::mesh_client::MeshClient;
use crate::pb::mesh::relation_change::What;
use crate::random::SystemRandom;

/// Most objects of one service: its sidecars hold all of them in memory, some 200 bytes each.
pub const MAX_OBJECTS: u64 = 250_000;
/// Most bytes of one service's relations, as they are stored.
pub const MAX_STORE_BYTES: u64 = 64 * 1024 * 1024;
/// Most changes in one batch.
pub const MAX_BATCH: usize = 256;
/// Most bytes in one batch, below the size of a request that agent and control take.
pub const MAX_BATCH_BYTES: usize = 512 * 1024;
/// Most bytes of one object's attributes, as JSON.
pub const MAX_OBJECT_BYTES: usize = 16 * 1024;
/// Longest id.
pub const MAX_ID_BYTES: usize = 1024;
/// Longest name of a type or an attribute.
const MAX_NAME_BYTES: usize = 64;
/// Most attributes of an object.
const MAX_ATTRIBUTES: usize = 64;
/// Longest text, and most elements of a set: what policies take.
const MAX_TEXT_BYTES: usize = 1024;
const MAX_SET_ELEMENTS: usize = 256;
/// Largest integer that every JSON reader keeps exact: 2^53 - 1 (RFC 8259 §6).
const MAX_EXACT_INTEGER: i64 = (1 << 53) - 1;

/// How often a copy asks how old it is.
const PING_EVERY: Duration = Duration::from_secs(1);
/// A stream that answers no ping for so long is opened anew.
const SILENCE: Duration = Duration::from_secs(10);
/// Pings that may be under way.
const MAX_PINGS: usize = 16;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Largest message: a batch, or as much of all there is.
const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// What relations cannot be, in words for whoever wrote them.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Malformed(pub(crate) String);

fn malformed<T>(reason: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(reason.into()))
}

/// An object: its type as the service's schema names it, without the namespace, and its id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Object {
    kind: String,
    id: String,
}

impl Object {
    /// # Errors
    /// A type that is no name, or an id that is empty, too long or not of printable ASCII without `"` and `\`.
    pub fn new(kind: &str, id: &str) -> Result<Self, Malformed> {
        if !is_name(kind) {
            return malformed(format!("`{}` is no name of a type", cut(kind)));
        }
        let printable = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\');
        if id.is_empty() || id.len() > MAX_ID_BYTES || !id.bytes().all(printable) {
            return malformed(format!(
                "`{}` is no id of an object: 1 to {MAX_ID_BYTES} printable ASCII characters without space, \" and \\",
                cut(id)
            ));
        }
        Ok(Self { kind: kind.to_owned(), id: id.to_owned() })
    }

    /// As [`fmt::Display`] writes it: `Account::"17"`.
    ///
    /// # Errors
    /// Other text.
    pub fn written(text: &str) -> Result<Self, Malformed> {
        let parts = text.split_once("::\"").and_then(|(kind, id)| Some((kind, id.strip_suffix('"')?)));
        let Some((kind, id)) = parts else {
            return malformed(format!("`{}` is no object: write it like Account::\"17\"", cut(text)));
        };
        Self::new(kind, id)
    }

    /// The type.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The id.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::\"{}\"", self.kind, self.id)
    }
}

fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    let first = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    first && text.len() <= MAX_NAME_BYTES && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Of a text from outside as much as an error should hold.
fn cut(text: &str) -> String {
    text.chars().take(MAX_NAME_BYTES).collect()
}

/// What is true of an object: bounded, of the types that a schema's attributes may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Attributes(Map<String, Json>);

impl Attributes {
    /// Of a JSON object.
    ///
    /// # Errors
    /// Which attribute is none, or which limit is passed.
    pub fn new(map: Map<String, Json>) -> Result<Self, Malformed> {
        if map.len() > MAX_ATTRIBUTES {
            return malformed(format!("more than {MAX_ATTRIBUTES} attributes"));
        }
        for (name, value) in &map {
            if !is_name(name) {
                return malformed(format!("`{}` is no name of an attribute", cut(name)));
            }
            check_value(value).map_err(|why| Malformed(format!("the attribute `{name}` {why}")))?;
        }
        let attributes = Self(map);
        if attributes.text().len() > MAX_OBJECT_BYTES {
            return malformed(format!(
                "the attributes of one object take more than {MAX_OBJECT_BYTES} bytes"
            ));
        }
        Ok(attributes)
    }

    /// Of its text, which has one meaning.
    ///
    /// # Errors
    /// Text that is no JSON object, names a member twice, or is over a limit.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        // More than that is over the limit however it is written.
        if text.len() > 2 * MAX_OBJECT_BYTES {
            return malformed(format!(
                "the attributes of one object take more than {MAX_OBJECT_BYTES} bytes"
            ));
        }
        let map = json::parse_object(text.as_bytes());
        Self::new(map.map_err(|error| Malformed(format!("the attributes are no JSON object: {error}")))?)
    }

    /// As it is stored and sent.
    pub fn text(&self) -> String {
        Json::Object(self.0.clone()).to_string()
    }

    /// The attributes by name.
    pub fn as_map(&self) -> &Map<String, Json> {
        &self.0
    }
}

/// What is stored is checked as what is written is.
impl<'de> Deserialize<'de> for Attributes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(Map::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

fn check_value(value: &Json) -> Result<(), String> {
    match value {
        Json::Bool(_) => Ok(()),
        Json::Number(number) if is_exact(number) => Ok(()),
        Json::Number(_) => Err("is no integer of up to 53 bits".into()),
        Json::String(text) if text.len() <= MAX_TEXT_BYTES => Ok(()),
        Json::String(_) => Err(format!("is longer than {MAX_TEXT_BYTES} bytes")),
        Json::Array(values) if values.len() > MAX_SET_ELEMENTS => {
            Err(format!("has more than {MAX_SET_ELEMENTS} elements"))
        }
        Json::Array(values) => {
            let texts = values.iter().all(Json::is_string);
            let numbers = values.iter().all(Json::is_number);
            if !texts && !numbers {
                return Err("is a list of other than texts or integers".into());
            }
            values.iter().try_for_each(check_value)
        }
        Json::Null | Json::Object(_) => {
            Err("is no truth value, integer, text or list of texts or integers".into())
        }
    }
}

fn is_exact(number: &serde_json::Number) -> bool {
    number.as_i64().is_some_and(|n| (-MAX_EXACT_INTEGER..=MAX_EXACT_INTEGER).contains(&n))
}

/// One change of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// The object's type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its id.
    pub id: String,
    /// All that is true of it from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attributes: Option<Attributes>,
    /// Nothing is true of it from now on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub delete: bool,
    /// The revision that it must have, or nothing is written; 0: it must not be there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub must_be: Option<u64>,
    /// Whether it must be there, or nothing is written.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub must_exist: bool,
}

impl Change {
    /// The object, if the change is one.
    ///
    /// # Errors
    /// An object that is none, or a change that neither writes nor deletes, or both.
    pub fn object(&self) -> Result<Object, Malformed> {
        let object = Object::new(&self.kind, &self.id)?;
        if self.attributes.is_some() == self.delete {
            return malformed(format!("{object} is to be given attributes or deleted, one of the two"));
        }
        if self.must_exist && self.must_be == Some(0) {
            return malformed(format!("{object} cannot both be there and not be there"));
        }
        Ok(object)
    }

    pub(crate) fn to_wire(&self) -> pb::RelationChange {
        pb::RelationChange {
            kind: self.kind.clone(),
            id: self.id.clone(),
            what: Some(match &self.attributes {
                Some(attributes) => What::Attributes(attributes.text()),
                None => What::Delete(self.delete),
            }),
            must_be: self.must_be,
            must_exist: self.must_exist,
        }
    }

    pub(crate) fn of_wire(change: pb::RelationChange) -> Result<Self, Malformed> {
        let (attributes, delete) = match change.what {
            Some(What::Attributes(text)) => (Some(Attributes::parse(&text)?), false),
            Some(What::Delete(delete)) => (None, delete),
            None => (None, false),
        };
        let pb::RelationChange { kind, id, must_be, must_exist, .. } = change;
        Ok(Self { kind, id, attributes, delete, must_be, must_exist })
    }
}

/// The answer to a write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// The store's revision with it.
    pub revision: u64,
    /// Names store and revision, for whoever must not read what was before.
    pub token: String,
}

/// The token of a revision. No secret, and it grants nothing.
pub(crate) fn token(epoch: &str, revision: u64) -> String {
    format!("r1.{epoch}.{revision}")
}

/// One object as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptRelation {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its id.
    pub id: String,
    /// The revision that wrote it last.
    pub revision: u64,
    /// Who did: a SPIFFE ID, or `operator`.
    pub by: String,
    /// What is true of it; `None` once it was deleted, where changes are watched.
    pub attributes: Option<Attributes>,
}

/// A page of a service's relations, in the order of types and ids; or some that changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelationsPage {
    /// The store's name.
    pub epoch: String,
    /// Its revision.
    pub revision: u64,
    /// The token of that.
    pub token: String,
    /// The objects.
    pub relations: Vec<KeptRelation>,
    /// Whether there are more behind the last.
    pub more: bool,
}

/// Why nothing was written by an agent.
#[derive(Debug, Error)]
pub enum WriteError {
    /// It will not be, however often it is tried.
    #[error("{0}")]
    Malformed(#[from] Malformed),
    /// A precondition does not hold.
    #[error("{0}")]
    Precondition(String),
    /// The caller may not.
    #[error("{0}")]
    Denied(String),
    /// Whether it was written is not known.
    #[error("{0}")]
    Unavailable(String),
}

impl From<tonic::Status> for WriteError {
    fn from(status: tonic::Status) -> Self {
        let words = status.message().to_owned();
        match status.code() {
            tonic::Code::InvalidArgument | tonic::Code::NotFound => Self::Malformed(Malformed(words)),
            tonic::Code::FailedPrecondition => Self::Precondition(words),
            tonic::Code::PermissionDenied => Self::Denied(words),
            _ => Self::Unavailable(words),
        }
    }
}

/// Writes relations by the caller's own identity, through its agent.
#[derive(Debug, Clone)]
pub struct Writer {
    client: MeshClient<Channel>,
    clock: SharedClock,
}

impl Writer {
    /// By the agent at `socket`, a file system path.
    pub fn new(socket: &std::path::Path, clock: SharedClock) -> Self {
        Self { client: MeshClient::new(workload_api::channel(socket)), clock }
    }

    /// Writes a batch, all or none; once this returns it is on control's disk, and on its way to the sidecars.
    ///
    /// # Errors
    /// [`WriteError`]; after [`WriteError::Unavailable`] it may have been written all the same.
    pub async fn write(&self, service: &str, changes: &[Change]) -> Result<Written, WriteError> {
        let request = pb::WriteRelationsRequest {
            service: service.to_owned(),
            changes: changes.iter().map(Change::to_wire).collect(),
        };
        let mut client = self.client.clone();
        let outcome = tokio::select! {
            outcome = client.write_relations(workload_api::request(request)) => outcome,
            () = self.clock.sleep(CALL_TIMEOUT) => Err(tonic::Status::deadline_exceeded("no answer in time")),
        };
        let pb::WriteRelationsResponse { revision, token } = outcome?.into_inner();
        Ok(Written { revision, token })
    }
}

/// What a copy is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// The store's name.
    pub epoch: String,
    /// What holds with it.
    pub revision: u64,
    /// What must have held before; `None`: this is all there is.
    pub after: Option<u64>,
    /// What changed, or all there is.
    pub changed: Vec<Changed>,
}

/// One object that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Its type.
    pub kind: String,
    /// Its id.
    pub id: String,
    /// The revision that it has.
    pub revision: u64,
    /// A JSON object, or `None` where nothing is true of it any more.
    pub attributes: Option<String>,
}

/// Who keeps a copy of a service's relations.
pub trait Replica: Send + Sync + 'static {
    /// Takes an update whole, or not at all.
    ///
    /// # Errors
    /// Why not, in words: all is asked for anew.
    fn take(&self, update: Update) -> Result<(), String>;

    /// What it has is all that was acknowledged to writers before this time.
    fn as_of(&self, time: Duration);
}

/// Keeps a copy of the caller's service's relations while they are `wanted`, by the agent at `socket`, until `scope`
/// drains.
pub fn follow<R: Replica>(
    socket: PathBuf,
    replica: R,
    mut wanted: watch::Receiver<bool>,
    clock: SharedClock,
    scope: &Scope,
) {
    let draining = scope.clone();
    scope.spawn_critical("relations", async move {
        let random = SystemRandom::shared();
        let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
        let mut client =
            MeshClient::new(workload_api::channel(&socket)).max_decoding_message_size(MAX_MESSAGE_BYTES);
        loop {
            tokio::select! {
                // Nobody is left to want them: the process ends.
                wanted = wanted.wait_for(|wanted| *wanted) => if wanted.is_err() { break },
                () = draining.draining() => return,
            }
            let ended = tokio::select! {
                ended = listen(&mut client, &replica, &clock, &mut backoff) => ended,
                _ = wanted.wait_for(|wanted| !*wanted) => continue,
                () = draining.draining() => return,
            };
            let wait = backoff.wait(&*random);
            tracing::debug!(reason = ended, retry_in = ?wait, "no relations from the agent");
            tokio::select! {
                () = clock.sleep(wait) => {}
                () = draining.draining() => return,
            }
        }
        draining.draining().await;
    });
}

/// One stream, to its end; returns why it ended.
async fn listen<R: Replica>(
    client: &mut MeshClient<Channel>,
    replica: &R,
    clock: &SharedClock,
    backoff: &mut Backoff,
) -> String {
    let (pings, said) = mpsc::channel(MAX_PINGS);
    // A stream is answered once its first message has come.
    let mut sent = Pings::default();
    if pings.try_send(sent.next(clock.now())).is_err() {
        return "no ping could be sent".to_owned();
    }
    let opened = tokio::select! {
        opened = client.relations(workload_api::request(ReceiverStream::new(said))) => opened,
        () = clock.sleep(CALL_TIMEOUT) => return "no answer in time".to_owned(),
    };
    let mut stream = match opened {
        Ok(stream) => stream.into_inner(),
        Err(status) => return status.message().to_owned(),
    };
    let mut whole = Whole::default();
    let mut heard = clock.now();
    let mut due = clock.sleep(PING_EVERY);
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            () = &mut due => {
                due = clock.sleep(PING_EVERY);
                if clock.now().saturating_sub(heard) >= SILENCE {
                    return "no ping was answered".to_owned();
                }
                // One that finds no room is one that nobody would answer either.
                if let Ok(room) = pings.try_reserve() {
                    room.send(sent.next(clock.now()));
                }
                continue;
            }
        };
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => return "the agent closed the stream".to_owned(),
            Err(status) => return status.message().to_owned(),
        };
        let pong = message.pong;
        match whole.add(message) {
            Ok(Some(update)) => match replica.take(update) {
                Ok(()) => backoff.reset(),
                Err(why) => return why,
            },
            Ok(None) => {}
            Err(why) => return why,
        }
        if let Some(time) = sent.answered(pong) {
            heard = clock.now();
            replica.as_of(time);
        }
    }
}

/// Pings under way, and when each was sent: what comes with an answer is no older than that, however long it travelled.
#[derive(Debug, Default)]
struct Pings {
    last: u64,
    sent: VecDeque<(u64, Duration)>,
}

impl Pings {
    fn next(&mut self, now: Duration) -> pb::RelationsRequest {
        self.last += 1;
        self.sent.push_back((self.last, now));
        if self.sent.len() > MAX_PINGS {
            self.sent.pop_front();
        }
        pb::RelationsRequest { ping: self.last }
    }

    fn answered(&mut self, pong: u64) -> Option<Duration> {
        let (_, time) = *self.sent.iter().find(|(ping, _)| *ping == pong)?;
        self.sent.retain(|(ping, _)| *ping > pong);
        Some(time)
    }
}

/// Messages that belong together.
#[derive(Debug, Default)]
struct Whole {
    reset: bool,
    pending: bool,
    bytes: u64,
    changed: Vec<Changed>,
}

impl Whole {
    /// What is to be done once nothing is missing of it.
    fn add(&mut self, message: pb::RelationsResponse) -> Result<Option<Update>, String> {
        let pb::RelationsResponse { epoch, revision, after, reset, more, relations, .. } = message;
        if !reset && !more && !self.pending && relations.is_empty() && revision == after {
            // A ping's answer.
            return Ok(None);
        }
        if reset && self.pending {
            *self = Self::default();
        }
        self.reset |= reset;
        self.pending = true;
        self.bytes += relations.iter().map(size).sum::<u64>();
        self.changed.extend(relations.into_iter().map(|relation| Changed {
            kind: relation.kind,
            id: relation.id,
            revision: relation.revision,
            attributes: relation.attributes,
        }));
        if self.bytes > 2 * MAX_STORE_BYTES || self.changed.len() as u64 > 2 * MAX_OBJECTS {
            return Err("more relations were sent than a service may have".to_owned());
        }
        if more {
            return Ok(None);
        }
        let Self { reset, changed, .. } = std::mem::take(self);
        Ok(Some(Update { epoch, revision, after: (!reset).then_some(after), changed }))
    }
}

/// What an object takes, near enough.
pub(crate) fn size(relation: &pb::Relation) -> u64 {
    (relation.kind.len() + relation.id.len() + relation.attributes.as_ref().map_or(0, String::len)) as u64
}
