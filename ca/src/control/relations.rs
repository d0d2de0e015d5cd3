//! Relations at control: who may write them, what a batch does, and who is told.
//!
//! A batch is on disk before anybody hears of it, and has been handed to every open stream before it is acknowledged.
//! So the answer to a ping, which comes behind what was handed over before, says how old a copy can be at most.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures::Stream;
use thiserror::Error;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use identity::SpiffeId;

use super::policies::Schema;
use super::service::not_stored;
use super::store::relations::{Batch, Head, NotWritten};
use super::{ControlHandle, Inner, StoreError};
use crate::hex;
use crate::model::{RelationsReader, RelationsStatus};
use crate::pb::control as control_pb;
use crate::pb::mesh as pb;
use crate::relations::{
    Attributes, Change, KeptRelation, MAX_OBJECTS, Malformed, Object, RelationsPage, Written, size, token,
};

/// Batches that a stream may lag behind before it is told everything anew.
const FEED: usize = 1_024;
/// Messages that wait for a reader.
const QUEUE: usize = 4;
/// About as many bytes of relations in one message.
const CHUNK_BYTES: u64 = 256 * 1024;
/// Most objects of a page.
pub(crate) const MAX_PAGE: usize = 1_000;
/// What is to be true of an object is not what the service's schema has.
const NOT_IN_SCHEMA: &str = "relations.schema";
/// Random bytes of a store's name.
const EPOCH_BYTES: usize = 8;

/// Which services have relations.
#[derive(Debug, Clone, Default)]
pub struct RelationsConfig {
    /// By the name of their policies.
    pub services: BTreeMap<String, RelationsOf>,
}

/// One service's relations.
#[derive(Debug, Clone, Default)]
pub struct RelationsOf {
    /// Who decides by them.
    pub readers: BTreeSet<SpiffeId>,
    /// Who may write them, beside operators.
    pub writers: BTreeSet<SpiffeId>,
}

/// Why relations are not written or read.
#[derive(Debug, Error)]
pub enum RelationsError {
    /// mesh.toml knows no such service.
    #[error("no service has the relations `{0}`")]
    UnknownService(String),
    /// The caller is none of those that may.
    #[error(
        "relations.not_a_writer: {id} may not write the relations of {service}: it is neither the service nor one of its relations_writers"
    )]
    NotAWriter {
        /// Who.
        id: String,
        /// Whose.
        service: String,
    },
    /// What is to be written is none, or over a limit.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The object is not what the change says that it must be.
    #[error("{0}")]
    Precondition(String),
    /// No room.
    #[error("{0}")]
    Full(String),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No randomness for the name of a new store.
    #[error(transparent)]
    Random(#[from] crate::random::RandomError),
}

impl From<NotWritten> for RelationsError {
    fn from(error: NotWritten) -> Self {
        match error {
            NotWritten::Malformed(error) => Self::Malformed(error),
            NotWritten::Precondition { .. } => Self::Precondition(error.to_string()),
            NotWritten::Full(why) => Self::Full(why),
            NotWritten::Store(error) => Self::Store(error),
        }
    }
}

impl From<RelationsError> for Status {
    fn from(error: RelationsError) -> Self {
        let words = error.to_string();
        match error {
            RelationsError::UnknownService(_) => Self::not_found(words),
            RelationsError::NotAWriter { .. } => Self::permission_denied(words),
            RelationsError::Malformed(_) => Self::invalid_argument(words),
            RelationsError::Precondition(_) => Self::failed_precondition(words),
            RelationsError::Full(_) => Self::resource_exhausted(words),
            RelationsError::Store(error) => not_stored(error),
            RelationsError::Random(_) => Self::unavailable(words),
        }
    }
}

/// What control knows of relations beside the database.
#[derive(Debug)]
pub(super) struct Relations {
    of: BTreeMap<String, RelationsOf>,
    feeds: HashMap<String, Feed>,
    readers: Mutex<Readers>,
}

/// One service's.
#[derive(Debug)]
struct Feed {
    batches: broadcast::Sender<Arc<Batch>>,
    /// Batches are told in the order in which they were written.
    turn: Mutex<()>,
    /// What was last made for readers that begin: many begin at once when control has started.
    whole: tokio::sync::Mutex<Weak<Snapshot>>,
}

/// All there is at one revision.
#[derive(Debug)]
struct Snapshot {
    revision: u64,
    messages: Vec<pb::RelationsResponse>,
}

/// Open streams.
#[derive(Debug, Default)]
struct Readers {
    last: u64,
    open: BTreeMap<u64, RelationsReader>,
}

impl Relations {
    pub(super) fn new(config: RelationsConfig) -> Self {
        let feed = |name: &String| {
            let feed = Feed {
                batches: broadcast::Sender::new(FEED),
                turn: Mutex::default(),
                whole: tokio::sync::Mutex::default(),
            };
            (name.clone(), feed)
        };
        let feeds = config.services.keys().map(feed).collect();
        Self { of: config.services, feeds, readers: Mutex::default() }
    }

    fn feed(&self, service: &str) -> Result<&Feed, RelationsError> {
        self.feeds.get(service).ok_or_else(|| RelationsError::UnknownService(cut(service)))
    }

    /// Whose relations this workload decides by.
    fn read_by(&self, id: &SpiffeId) -> Option<&String> {
        self.of.iter().find(|(_, of)| of.readers.contains(id)).map(|(service, _)| service)
    }

    fn may_write(&self, id: &SpiffeId, service: &str) -> Result<(), RelationsError> {
        let of = self.of.get(service).ok_or_else(|| RelationsError::UnknownService(cut(service)))?;
        if of.writers.contains(id) {
            return Ok(());
        }
        Err(RelationsError::NotAWriter { id: id.to_string(), service: service.to_owned() })
    }

    fn readers(&self) -> std::sync::MutexGuard<'_, Readers> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a schema of the service has what is to be true of its objects: that in force, or one on its way, so that what
/// comes with a change of policies can be written before it is everywhere. What is deleted may be of any.
fn hold_against(schemas: &[(String, Arc<dyn Schema>)], changes: &[Change]) -> Result<(), RelationsError> {
    for change in changes {
        let Some(attributes) = &change.attributes else { continue };
        let object = change.object()?;
        let mut refusals = schemas.iter().map(|(_, schema)| schema.check(&object, attributes));
        let Some(Err(first)) = refusals.next() else { continue };
        if refusals.all(|refusal| refusal.is_err()) {
            return Err(Malformed(format!("{NOT_IN_SCHEMA}: {object}: {first}")).into());
        }
    }
    Ok(())
}

/// Of a name from outside as much as an error should hold.
fn cut(name: &str) -> String {
    name.chars().take(64).collect()
}

impl Inner {
    /// A name for a store that has none yet.
    fn fresh_epoch(&self) -> Result<String, RelationsError> {
        let mut bytes = [0; EPOCH_BYTES];
        self.random.fill(&mut bytes)?;
        Ok(hex::encode(&bytes))
    }

    async fn write_relations(
        self: &Arc<Self>,
        service: &str,
        changes: Vec<Change>,
        by: String,
    ) -> Result<Written, RelationsError> {
        self.relations.feed(service)?;
        let (inner, service) = (Arc::clone(self), service.to_owned());
        let now_ms = u64::try_from(self.clock.now().as_millis()).unwrap_or(u64::MAX);
        let fresh = self.fresh_epoch()?;
        // Once begun it is done whole, even if nobody waits for the answer: what is on disk has been told.
        let written = tokio::task::spawn_blocking(move || {
            let feed = inner.relations.feed(&service)?;
            if let Some(policies) = &inner.policies {
                hold_against(&policies.schemas_of(&inner.store, &service)?, &changes)?;
            }
            let _turn = feed.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let batch = inner.store.write_relations(&service, &changes, &by, now_ms, &fresh)?;
            let Head { epoch, revision, .. } = &batch.head;
            let written = Written { revision: *revision, token: token(epoch, *revision) };
            tracing::info!(service, by, revision, changes = changes.len(), "relations written");
            // Nobody listening is fine.
            let _readers = feed.batches.send(Arc::new(batch)).unwrap_or(0);
            Ok::<_, RelationsError>(written)
        });
        let written = written.await.unwrap_or(Err(RelationsError::Store(StoreError::Stopping)))?;
        self.changed();
        Ok(written)
    }

    /// Writes for a workload of `host`.
    pub(super) async fn write_relations_for(
        self: &Arc<Self>,
        host: &str,
        request: control_pb::WriteRelationsRequest,
    ) -> Result<pb::WriteRelationsResponse, Status> {
        let id = self.registered(host, &request.spiffe_id)?;
        let pb::WriteRelationsRequest { service, changes } = request.request.unwrap_or_default();
        if let Err(error) = self.relations.may_write(&id, &service) {
            tracing::warn!(host, %error, "relations not written");
            return Err(error.into());
        }
        let changes = changes.into_iter().map(Change::of_wire).collect::<Result<Vec<_>, _>>();
        let changes = changes.map_err(RelationsError::from)?;
        let Written { revision, token } = self.write_relations(&service, changes, id.to_string()).await?;
        Ok(pb::WriteRelationsResponse { revision, token })
    }

    /// A SPIFFE ID that an agent names: its host must have it.
    fn registered(&self, host: &str, spiffe_id: &str) -> Result<SpiffeId, Status> {
        let id = SpiffeId::new(spiffe_id).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if self.is_registered(host, &id) {
            return Ok(id);
        }
        Err(Status::permission_denied("that workload is not registered for this host"))
    }

    fn is_registered(&self, host: &str, id: &SpiffeId) -> bool {
        self.entries.borrow().by_id.values().any(|entry| entry.id == *id && entry.applies_to(host))
    }

    /// Opens a reader's stream.
    pub(super) async fn stream_relations(
        self: &Arc<Self>,
        host: String,
        mut said: Streaming<control_pb::RelationsRequest>,
    ) -> Result<impl Stream<Item = Result<pb::RelationsResponse, Status>> + Send + use<>, Status> {
        let first = said.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("the stream says nothing"))?;
        let id = self.registered(&host, &first.spiffe_id)?;
        let service = self.relations.read_by(&id).cloned();
        let service = service.ok_or_else(|| Status::not_found("that workload's service has no relations"))?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let place = Place::open(
            Arc::clone(self),
            RelationsReader {
                service: service.clone(),
                spiffe_id: id.to_string(),
                host: host.clone(),
                revision: 0,
                heard: self.clock.now_seconds(),
            },
        );
        let reader = Reader { inner: Arc::clone(self), host, id, service, said, sender, place, known: None };
        self.scope.spawn("relations of a workload", reader.serve(first.request.unwrap_or_default().ping));
        Ok(ReceiverStream::new(receiver))
    }

    /// All there is, at a revision of now or later.
    async fn snapshot(&self, service: &str) -> Result<Arc<Snapshot>, RelationsError> {
        let feed = self.relations.feed(service)?;
        let mut whole = feed.whole.lock().await;
        let fresh = self.fresh_epoch()?;
        let name = service.to_owned();
        let known = whole.upgrade();
        let made = self.store.run(move |store| {
            let head = store.relations_head(&name, &fresh)?;
            if let Some(known) = known.filter(|known| known.revision == head.revision) {
                return Ok(known);
            }
            let limit = usize::try_from(MAX_OBJECTS).unwrap_or(usize::MAX);
            let (read, relations, _) = store.read_relations(&name, None, limit)?;
            Ok(Arc::new(Snapshot::of(&read.unwrap_or(head), relations)))
        });
        let made = made.await?;
        *whole = Arc::downgrade(&made);
        Ok(made)
    }

    pub(super) fn relations_status(&self, heads: Vec<(String, Head)>) -> Vec<RelationsStatus> {
        let readers = self.relations.readers();
        let status = |(service, head): (String, Head)| RelationsStatus {
            readers: readers.open.values().filter(|reader| reader.service == service).cloned().collect(),
            service,
            revision: head.revision,
            epoch: head.epoch,
            objects: head.objects,
            bytes: head.bytes,
        };
        heads.into_iter().map(status).collect()
    }
}

impl Snapshot {
    fn of(head: &Head, relations: Vec<KeptRelation>) -> Self {
        let message = |relations| pb::RelationsResponse {
            epoch: head.epoch.clone(),
            revision: head.revision,
            after: 0,
            reset: true,
            more: true,
            relations,
            pong: 0,
        };
        let (mut messages, mut chunk, mut bytes) = (Vec::new(), Vec::new(), 0);
        for relation in relations {
            let relation = pb::Relation {
                kind: relation.kind,
                id: relation.id,
                revision: relation.revision,
                attributes: relation.attributes.as_ref().map(Attributes::text),
            };
            bytes += size(&relation);
            chunk.push(relation);
            if bytes >= CHUNK_BYTES {
                messages.push(message(std::mem::take(&mut chunk)));
                bytes = 0;
            }
        }
        messages.push(pb::RelationsResponse { more: false, ..message(chunk) });
        // The first says that what was before is to be forgotten, the others go on.
        for message in messages.iter_mut().skip(1) {
            message.reset = false;
        }
        Self { revision: head.revision, messages }
    }
}

/// An open stream as `status` shows it.
struct Place {
    inner: Arc<Inner>,
    number: u64,
}

impl Place {
    fn open(inner: Arc<Inner>, reader: RelationsReader) -> Self {
        let number = {
            let mut readers = inner.relations.readers();
            readers.last += 1;
            let number = readers.last;
            readers.open.insert(number, reader);
            number
        };
        inner.changed();
        Self { inner, number }
    }

    fn has(&self, revision: u64) {
        let heard = self.inner.clock.now_seconds();
        if let Some(reader) = self.inner.relations.readers().open.get_mut(&self.number) {
            (reader.revision, reader.heard) = (revision, heard);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.inner.relations.readers().open.remove(&self.number);
        self.inner.changed();
    }
}

/// Whoever read it is gone.
struct Gone;

/// One reader's stream.
struct Reader {
    inner: Arc<Inner>,
    host: String,
    id: SpiffeId,
    service: String,
    said: Streaming<control_pb::RelationsRequest>,
    sender: mpsc::Sender<Result<pb::RelationsResponse, Status>>,
    place: Place,
    /// The store and the revision that the reader has.
    known: Option<(String, u64)>,
}

impl Reader {
    async fn serve(mut self, first: u64) {
        let inner = Arc::clone(&self.inner);
        let outcome = tokio::select! {
            outcome = self.run(first) => outcome,
            () = inner.scope.draining() => Ok(Status::unavailable("control is stopping")),
        };
        if let Ok(status) = outcome {
            // One that takes nothing any more is gone, too.
            let _gone = self.sender.try_send(Err(status)).is_err();
        }
    }

    async fn run(&mut self, first: u64) -> Result<Status, Gone> {
        // Before anything is read: what is written meanwhile comes after it.
        let Ok(feed) = self.inner.relations.feed(&self.service) else {
            return Ok(Status::not_found("that service has no relations"));
        };
        let mut batches = feed.batches.subscribe();
        if let Err(error) = self.say_all().await? {
            return Ok(error.into());
        }
        self.pong(first).await?;
        let mut entries = self.inner.entries.subscribe();
        loop {
            let heard = tokio::select! {
                heard = batches.recv() => heard,
                said = self.said.message() => match said {
                    Ok(Some(said)) => {
                        if let Err(error) = self.catch_up(&mut batches).await? {
                            return Ok(error.into());
                        }
                        self.pong(said.request.unwrap_or_default().ping).await?;
                        continue;
                    }
                    Ok(None) | Err(_) => return Err(Gone),
                },
                changed = entries.changed() => {
                    if changed.is_err() || !self.inner.is_registered(&self.host, &self.id) {
                        return Ok(Status::permission_denied("that workload is not registered for this host"));
                    }
                    continue;
                }
                () = self.sender.closed() => return Err(Gone),
            };
            match heard {
                Ok(batch) => self.say(&batch).await?,
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    batches = batches.resubscribe();
                    if let Err(error) = self.say_all().await? {
                        return Ok(error.into());
                    }
                }
                Err(broadcast::error::RecvError::Closed) => return Err(Gone),
            }
        }
    }

    /// Says what has been written up to now.
    async fn catch_up(
        &mut self,
        batches: &mut broadcast::Receiver<Arc<Batch>>,
    ) -> Result<Result<(), RelationsError>, Gone> {
        loop {
            match batches.try_recv() {
                Ok(batch) => self.say(&batch).await?,
                Err(broadcast::error::TryRecvError::Lagged(_)) => {
                    *batches = batches.resubscribe();
                    if let Err(error) = self.say_all().await? {
                        return Ok(Err(error));
                    }
                }
                Err(broadcast::error::TryRecvError::Empty | broadcast::error::TryRecvError::Closed) => {
                    return Ok(Ok(()));
                }
            }
        }
    }

    async fn say_all(&mut self) -> Result<Result<(), RelationsError>, Gone> {
        let whole = match self.inner.snapshot(&self.service).await {
            Ok(whole) => whole,
            Err(error) => return Ok(Err(error)),
        };
        for message in &whole.messages {
            self.known = Some((message.epoch.clone(), message.revision));
            self.send(message.clone()).await?;
        }
        Ok(Ok(()))
    }

    async fn say(&mut self, batch: &Batch) -> Result<(), Gone> {
        // What was read when all was said has it.
        if self.known.as_ref().is_some_and(|(_, revision)| batch.head.revision <= *revision) {
            return Ok(());
        }
        let message = pb::RelationsResponse {
            epoch: batch.head.epoch.clone(),
            revision: batch.head.revision,
            after: batch.after,
            relations: batch.changed.clone(),
            ..Default::default()
        };
        self.known = Some((message.epoch.clone(), message.revision));
        self.send(message).await
    }

    /// The answer to a ping: everything before it has been said.
    async fn pong(&mut self, ping: u64) -> Result<(), Gone> {
        let Some((epoch, revision)) = self.known.clone() else { return Ok(()) };
        self.place.has(revision);
        self.send(pb::RelationsResponse {
            epoch,
            revision,
            after: revision,
            pong: ping,
            ..Default::default()
        })
        .await
    }

    async fn send(&self, message: pb::RelationsResponse) -> Result<(), Gone> {
        self.sender.send(Ok(message)).await.map_err(|_| Gone)
    }
}

/// Who is said to have written what came over the admin socket.
const OPERATOR: &str = "operator";

impl ControlHandle {
    /// Writes a batch for an operator, all or none.
    ///
    /// # Errors
    /// [`RelationsError`]; nothing was written then.
    pub async fn write_relations(
        &self,
        service: &str,
        changes: Vec<Change>,
    ) -> Result<Written, RelationsError> {
        self.0.write_relations(service, changes, OPERATOR.to_owned()).await
    }

    /// Up to `limit` objects behind `after`.
    ///
    /// # Errors
    /// [`RelationsError`].
    pub async fn read_relations(
        &self,
        service: &str,
        after: Option<Object>,
        limit: usize,
    ) -> Result<RelationsPage, RelationsError> {
        self.0.relations.feed(service)?;
        let (name, fresh) = (service.to_owned(), self.0.fresh_epoch()?);
        let read = self.0.store.run(move |store| {
            let head = store.relations_head(&name, &fresh)?;
            let (read, relations, more) = store.read_relations(&name, after.as_ref(), limit.min(MAX_PAGE))?;
            Ok(page(&read.unwrap_or(head), relations, more))
        });
        Ok(read.await?)
    }

    /// One object.
    ///
    /// # Errors
    /// [`RelationsError`].
    pub async fn relation(
        &self,
        service: &str,
        object: Object,
    ) -> Result<Option<KeptRelation>, RelationsError> {
        self.0.relations.feed(service)?;
        let name = service.to_owned();
        Ok(self.0.store.run(move |store| store.relation(&name, &object)).await?)
    }

    /// Every batch from now on. Whoever lags by more than [`FEED`] of them hears no more.
    ///
    /// # Errors
    /// [`RelationsError::UnknownService`].
    pub fn watch_relations(
        &self,
        service: &str,
    ) -> Result<impl Stream<Item = RelationsPage> + Send + use<>, RelationsError> {
        let batches = self.0.relations.feed(service)?.batches.subscribe();
        let scope = self.0.scope.clone();
        Ok(futures::stream::unfold((batches, scope), |(mut batches, scope)| async {
            let batch = tokio::select! {
                batch = batches.recv() => batch.ok()?,
                () = scope.draining() => return None,
            };
            let changed = batch.changed.iter().map(|relation| KeptRelation {
                kind: relation.kind.clone(),
                id: relation.id.clone(),
                revision: relation.revision,
                by: batch.by.clone(),
                attributes: relation.attributes.as_deref().and_then(|text| Attributes::parse(text).ok()),
            });
            let page = page(&batch.head, changed.collect(), false);
            Some((page, (batches, scope)))
        }))
    }
}

fn page(head: &Head, relations: Vec<KeptRelation>, more: bool) -> RelationsPage {
    RelationsPage {
        epoch: head.epoch.clone(),
        revision: head.revision,
        token: token(&head.epoch, head.revision),
        relations,
        more,
    }
}
