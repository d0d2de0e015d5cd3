//! The client: whom to ask, and when to ask again.

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream::FuturesUnordered};
use prost::Message as _;
use tokio::{
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use crate::{
    ANSWER_BYTES_MAX, Error, Found, Kind, Moment, Part, Row, TABLES, Told, Txn,
    book::Book,
    error::{Fault, Reason, fault},
    key,
    proto::{self, admin_client::AdminClient, store_client::StoreClient},
    routes::{Routes, merged},
    schema::{Table, place, sorted},
};

/// Of one call, all its tries included: a split is without a leader for a few seconds after its leader died.
const DEADLINE: Duration = Duration::from_secs(10);
/// Of one try. A node waits for less than this before it says that another may know sooner.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Of one try of what any node answers at once.
const ATTEMPT_QUICK: Duration = Duration::from_secs(1);
/// A node that did not answer is passed over for so long by what another can answer as well.
const SUSPECT: Duration = Duration::from_secs(2);
/// Of a transaction with all its attempts.
const TRANSACTION_DEADLINE: Duration = Duration::from_secs(30);
/// Attempts of a transaction: the age that it keeps makes it the oldest well before that.
const TRANSACTION_ATTEMPTS: u32 = 100;
/// The first pause between two tries.
const PAUSE_MIN: Duration = Duration::from_millis(4);
/// The longest: of the time that a split is without a leader, a client wastes at most this much.
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// How old a declaration may be that is read at any replica.
const DECLARED_WITHIN: Duration = Duration::from_secs(60);
/// A change of a split waits until nothing of it is under way.
const CHANGE: Duration = Duration::from_secs(15);
/// A replica is moved row by row.
const MOVE: Duration = Duration::from_secs(150);
/// So many hints are followed at once; nodes that send a client in circles make it pause.
const HINTS_MAX: u32 = 3;
/// For so long after a node has said what time it is, attempts begin without asking: two clocks that go on by themselves
/// are microseconds apart after it.
const TIME_TOLD: Duration = Duration::from_secs(1);
/// How long to wait for the other nodes once one has answered.
const SPLITS_OTHERS: Duration = Duration::from_millis(50);
/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(1);
/// A connection is asked whether it is alive so often, and given up when it says nothing for as long: whoever waits for
/// a lock at a node that has stopped is to ask the next leader, who is there by then.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// The header by which a sidecar knows which request a call belongs to, and so for whom it is made.
const TRACEPARENT: &str = "traceparent";

/// How long to try.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Of one call, all its tries included. A commit is tried no longer than for 40 seconds after its attempt began,
    /// whatever this is: nodes remember for a minute how an attempt ended.
    pub deadline: Duration,
    /// Of one try.
    pub attempt: Duration,
    /// Of a transaction with all its attempts: [`Client::transact`].
    pub transaction_deadline: Duration,
    /// Attempts of a transaction.
    pub transaction_attempts: u32,
    /// Pauses between tries are drawn from it, so that clients do not come back together.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: DEADLINE,
            attempt: ATTEMPT,
            transaction_deadline: TRANSACTION_DEADLINE,
            transaction_attempts: TRANSACTION_ATTEMPTS,
            seed: fastrand::u64(..),
        }
    }
}

/// A client of the store. Clones share connections and what is known.
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
    /// Of the request that its calls are made for.
    traceparent: Option<MetadataValue<Ascii>>,
}

#[derive(Debug)]
struct Inner {
    options: Options,
    book: Book,
    channels: Mutex<HashMap<String, Channel>>,
    routes: Mutex<Arc<Routes>>,
    /// One asks what splits there are, and the others wait for what it hears.
    asking: tokio::sync::Mutex<()>,
    /// Tables are never dropped and never change.
    tables: Mutex<HashMap<String, Arc<Table>>>,
    rng: Mutex<fastrand::Rng>,
    turn: AtomicUsize,
    /// Nodes that did not answer, until when.
    suspects: Mutex<HashMap<String, Instant>>,
    /// What time a node has said it is, nanoseconds since the Unix epoch, and when.
    time: Mutex<Option<(u64, Instant)>>,
}

/// How far one call has come with its tries.
#[derive(Debug)]
pub(crate) struct Pace {
    pub(crate) deadline: Instant,
    /// Of one try.
    attempt: Duration,
    pause: Duration,
    hinted: u32,
}

impl Pace {
    /// One try, at what is answered at once.
    pub(crate) fn quick(&self) -> Self {
        Self { attempt: self.attempt.min(ATTEMPT_QUICK), ..*self }
    }

    /// Not longer than until `end`, but for one try.
    pub(crate) fn until(self, end: Instant) -> Self {
        let one = Instant::now().checked_add(self.attempt).unwrap_or(end);
        Self { deadline: self.deadline.min(end.max(one)), ..self }
    }

    /// One try, at what waits for locks: a second one would find the first still waiting.
    pub(crate) fn patient(&self) -> Self {
        Self { attempt: Duration::MAX, ..*self }
    }
}

/// Finds where rows are.
pub(crate) struct Places<'a> {
    client: &'a Client,
    last: Option<Arc<Table>>,
}

impl Places<'_> {
    /// The place of a row among all rows.
    pub(crate) async fn of(&mut self, row: &Row) -> Result<Vec<u8>, Error> {
        let table = match self.last.take().filter(|last| last.name() == row.table) {
            Some(last) => last,
            None => self.client.table(&row.table).await?,
        };
        Ok(self.last.insert(table).place(&row.key)?)
    }
}

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Target {
    /// For which splits; none where anybody knows.
    pub(crate) splits: Vec<u64>,
    pub(crate) address: String,
}

/// Rows that one node is asked for, by where each is among all that are asked for.
#[derive(Debug, Default)]
pub(crate) struct Group<'a> {
    pub(crate) splits: Vec<u64>,
    pub(crate) rows: Vec<(usize, &'a Row)>,
}

impl Group<'_> {
    /// What a node found of them.
    pub(crate) fn found(&self, found: Vec<proto::Found>) -> Result<Vec<(usize, Found)>, Fault> {
        if found.len() != self.rows.len() {
            let message = format!("{} rows were asked for, and {} came", self.rows.len(), found.len());
            return Err(Error::Other(Told { message, reason: None }).into());
        }
        let named = |((index, row), found): (&(usize, &Row), proto::Found)| {
            let proto::Found { value, version, .. } = found;
            (*index, Found { row: (*row).clone(), value, version })
        };
        Ok(self.rows.iter().zip(found).map(named).collect())
    }
}

/// A try that failed, and who was asked, if anybody.
pub(crate) type Failed = (Fault, Option<Target>);

impl Client {
    /// A client that begins with these nodes, `HOST:PORT` each, and asks the others where nodes say that they are. Or,
    /// with all nodes by number, `NUMBER=HOST:PORT` each, one that asks them there and nowhere else: through a sidecar
    /// the addresses are this host's own, and what nodes say of theirs is not for it.
    ///
    /// Connects when it is first used.
    ///
    /// # Errors
    ///
    /// When there is no address, one is none, or some have a number and some have not.
    pub fn connect(addresses: impl IntoIterator<Item = String>) -> Result<Self, Error> {
        Self::with(addresses, Options::default())
    }

    /// The same, with other limits.
    ///
    /// # Errors
    ///
    /// As [`Client::connect`].
    pub fn with(addresses: impl IntoIterator<Item = String>, options: Options) -> Result<Self, Error> {
        let book = Book::parse(addresses)?;
        for address in book.written() {
            endpoint(address).map_err(|_| {
                let message = format!("{address:?} is not HOST:PORT");
                Error::InvalidArgument(Told { message, reason: None })
            })?;
        }
        let tables = [(TABLES.to_owned(), Arc::new(Table::of_tables()))].into();
        Ok(Self {
            inner: Arc::new(Inner {
                options,
                book,
                channels: Mutex::default(),
                routes: Mutex::default(),
                asking: tokio::sync::Mutex::default(),
                tables: Mutex::new(tables),
                rng: Mutex::new(fastrand::Rng::with_seed(options.seed)),
                turn: AtomicUsize::new(0),
                suspects: Mutex::default(),
                time: Mutex::default(),
            }),
            traceparent: None,
        })
    }

    /// The same client for what is done while a request is served: give it the `traceparent` that came with that
    /// request. A sidecar beside this program finds by it for whom the calls are made, and lets them touch what that
    /// person's rows are. Without a mesh it is a trace's, and nothing else.
    ///
    /// # Errors
    ///
    /// When it is no header's value.
    pub fn serving(&self, traceparent: &str) -> Result<Self, Error> {
        let traceparent = traceparent.parse().map_err(|_| {
            let message = format!("{traceparent:?} is no traceparent");
            Error::InvalidArgument(Told { message, reason: None })
        })?;
        Ok(Self { inner: Arc::clone(&self.inner), traceparent: Some(traceparent) })
    }

    /// Declares a table. Doing it again is fine as long as it is declared the same.
    ///
    /// # Errors
    ///
    /// When it is no declaration, is declared otherwise, or nobody can be asked.
    pub async fn create_table(&self, name: &str, key: &[(&str, Kind)]) -> Result<(), Error> {
        let table = Table::new(name, key)?;
        let place = declared_at(name);
        let mut pace = self.pace();
        let mut lost = false;
        loop {
            let tried = async {
                let target = self.leader_at(&place, &pace).await?;
                let send = |mut node: Store, request| async move { node.create_table(request).await };
                self.ask(&pace, &target.address, table.to_proto(), send)
                    .await
                    .map_err(|fault| (fault, Some(target)))
            };
            match tried.await {
                Ok(proto::CreateTableResponse {}) => break,
                Err(failed) => {
                    lost |= failed.0.lost;
                    self.pause(&mut pace, failed).await.map_err(|error| match error {
                        // Whoever declared it otherwise came before all of the tries.
                        error @ Error::AlreadyExists(_) => error,
                        error if lost => error.unknown(),
                        error => error,
                    })?;
                }
            }
        }
        lock(&self.inner.tables).insert(name.to_owned(), Arc::new(table));
        Ok(())
    }

    /// A table's declaration.
    ///
    /// # Errors
    ///
    /// When there is none, or nobody can be asked.
    pub async fn table(&self, name: &str) -> Result<Arc<Table>, Error> {
        if let Some(table) = lock(&self.inner.tables).get(name) {
            return Ok(Arc::clone(table));
        }
        Table::check_name(name)?;
        let row = Row::new(TABLES, key(&[Part::from(name)]));
        let Some(declaration) = self.declaration(row).await? else {
            let message = format!("there is no table {name:?}");
            return Err(Error::NotFound(Told { message, reason: Some(Reason::UnknownTable) }));
        };
        let table = proto::CreateTableRequest::decode(declaration).map_err(|error| {
            Error::Other(Told { message: format!("table {name:?}: {error}"), reason: None })
        })?;
        let table = Arc::new(Table::from_proto(table)?);
        lock(&self.inner.tables).insert(name.to_owned(), Arc::clone(&table));
        Ok(table)
    }

    /// What declares a table. Declarations never change: what any replica has is right, and the leader is asked for what is
    /// not there.
    async fn declaration(&self, row: Row) -> Result<Option<Bytes>, Error> {
        for moment in [Moment::Within(DECLARED_WITHIN), Moment::Now] {
            // Boxed, since to read any row the declaration of its table is looked up here.
            match Box::pin(self.snapshot_read(std::slice::from_ref(&row), moment)).await {
                Ok(snapshot) => {
                    if let Some(value) = snapshot.rows.into_iter().next().and_then(|found| found.value) {
                        return Ok(Some(value));
                    }
                }
                // A replica that is as far behind as it keeps versions.
                Err(Error::OutOfRange(_)) if moment != Moment::Now => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Begins a transaction.
    ///
    /// # Errors
    ///
    /// When no node has a clock to begin it with.
    pub async fn begin(&self) -> Result<Txn, Error> {
        self.begin_with(None, self.pace()).await
    }

    /// Begins another attempt of what was aborted: it keeps its age, and so becomes the oldest in the end.
    ///
    /// # Errors
    ///
    /// As [`Client::begin`].
    pub async fn begin_again(&self, aborted: &Txn) -> Result<Txn, Error> {
        self.begin_with(Some(aborted.to_proto().clone()), self.pace()).await
    }

    async fn begin_with(&self, retry_of: Option<proto::Transaction>, mut pace: Pace) -> Result<Txn, Error> {
        if let Some(transaction) = self.begin_here(retry_of.as_ref()) {
            return Ok(Txn::new(self.clone(), transaction));
        }
        loop {
            let target = Target { splits: Vec::new(), address: self.anybody() };
            let request = proto::BeginRequest { retry_of: retry_of.clone() };
            let send = |mut node: Store, request| async move { node.begin(request).await };
            let begun = self.ask(&pace.quick(), &target.address, request, send).await;
            match begun {
                Ok(begun) => {
                    let transaction = begun.transaction.unwrap_or_default();
                    *lock(&self.inner.time) = Some((transaction.started, Instant::now()));
                    return Ok(Txn::new(self.clone(), transaction));
                }
                Err(fault) => self.pause(&mut pace, (fault, Some(target))).await?,
            }
        }
    }

    /// An attempt as Begin makes it, by the time that a node told a moment ago.
    fn begin_here(&self, retry_of: Option<&proto::Transaction>) -> Option<proto::Transaction> {
        let (told, at) = (*lock(&self.inner.time))?;
        let passed = at.elapsed();
        if passed > TIME_TOLD {
            return None;
        }
        let now = told.saturating_add(u64::try_from(passed.as_nanos()).ok()?);
        // Not of the seed: two clients with one seed are two clients.
        let random = fastrand::u64(..);
        let before = retry_of.map(|before| (before.first, before.client, before.attempt.saturating_add(1)));
        let (first, client, attempt) = before.unwrap_or((now, random, 0));
        // Another node told the time of its first attempt, by a clock that is a little ahead.
        let started = now.max(first);
        Some(proto::Transaction { started, random, first, client, attempt, held: Vec::new() })
    }

    /// Runs `work` in a transaction and commits it, again from the start and with its age whenever it is aborted.
    /// Gives what `work` gave, and the commit timestamp. `work` must do nothing that must not be done twice. In a task
    /// of its own it has to own what it uses: `async move`.
    ///
    /// ```no_run
    /// # async fn example(client: store_client::Client) -> Result<(), store_client::Error> {
    /// # let row = store_client::Row::new("accounts", "alice/17");
    /// let (was, at) = client
    ///     .transact(async |txn| {
    ///         let was = txn.get(&row).await?;
    ///         txn.delete(row.clone());
    ///         Ok(was)
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// What `work` failed with, after a rollback; [`Error::Aborted`] when no attempt came through; whatever the commit
    /// failed with, [`Error::Unknown`] in particular.
    pub async fn transact<T>(
        &self,
        work: impl AsyncFnMut(&mut Txn) -> Result<T, Error>,
    ) -> Result<(T, u64), Error> {
        let mut ended = JoinSet::new();
        let outcome = self.attempts(work, &mut ended).await;
        // Mostly long since done, and none takes long.
        while ended.join_next().await.is_some() {}
        outcome
    }

    async fn attempts<T>(
        &self,
        mut work: impl AsyncFnMut(&mut Txn) -> Result<T, Error>,
        ended: &mut JoinSet<()>,
    ) -> Result<(T, u64), Error> {
        let deadline = Instant::now() + self.inner.options.transaction_deadline;
        let mut retry_of = None;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let mut txn = self.begin_with(retry_of.take(), self.pace_until(deadline)).await?;
            txn.end_by(deadline);
            let error = match work(&mut txn).await {
                Ok(value) => match txn.commit().await {
                    Ok(at) => return Ok((value, at)),
                    // To roll back what may be written would be a lie.
                    Err(error @ Error::Unknown(_)) => return Err(error),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            let spent = attempts >= self.inner.options.transaction_attempts || Instant::now() >= deadline;
            if !txn.is_aborted() || spent {
                txn.rollback().await;
                return Err(error);
            }
            // The next attempt is older than this one, and does not wait until all have heard.
            ended.spawn(txn.let_go());
            retry_of = Some(txn.to_proto().clone());
            // Its age decides who comes through, so that a longer pause each time would only waste it.
            self.sleep(&mut self.pace_until(deadline)).await;
        }
    }

    /// The splits and nodes, as all nodes that answer know them now.
    ///
    /// # Errors
    ///
    /// When no node can be asked.
    pub async fn splits(&self) -> Result<proto::ListSplitsResponse, Error> {
        let mut pace = self.pace();
        loop {
            match self.ask_splits(&pace).await {
                Ok(answers) => return Ok(merged(answers)),
                Err(fault) => self.pause(&mut pace, (fault, None)).await?,
            }
        }
    }

    /// Where each node can be asked that is known so far, those that the client began with included.
    pub fn addresses(&self) -> Vec<String> {
        let mut all: Vec<_> = self.inner.book.written().cloned().collect();
        all.extend(self.routes().nodes().cloned());
        all.sort();
        all.dedup();
        all
    }

    /// How the node at `address` is. Asked once.
    ///
    /// # Errors
    ///
    /// When it cannot be asked.
    pub async fn status(&self, address: &str) -> Result<proto::StatusResponse, Error> {
        let send = |mut node: Store, request| async move { node.status(request).await };
        self.ask(&self.pace(), address, proto::StatusRequest {}, send).await.map_err(|fault| fault.error)
    }

    /// Cuts `split` in two, at a row or in the middle of its rows. Gives the number of the right half.
    ///
    /// # Errors
    ///
    /// [`Error::Unknown`] when the answer was lost: look at the splits before asking again.
    pub async fn split(&self, split: u64, at: Option<Row>) -> Result<u64, Error> {
        let request = proto::SplitRequest { split, at: at.map(Into::into) };
        let send = |mut node: Admin, request| async move { node.split(request).await };
        Ok(self.administer(split, CHANGE, request, send).await?.right)
    }

    /// Takes the split to the right of `split` into it.
    ///
    /// # Errors
    ///
    /// As [`Client::split`].
    pub async fn merge(&self, split: u64) -> Result<(), Error> {
        let send = |mut node: Admin, request| async move { node.merge(request).await };
        self.administer(split, CHANGE, proto::MergeRequest { split }, send).await.map(drop)
    }

    /// Moves a replica of `split` from one node to another, while it serves.
    ///
    /// # Errors
    ///
    /// As [`Client::split`].
    pub async fn move_replica(&self, split: u64, from: u64, to: u64) -> Result<(), Error> {
        let send = |mut node: Admin, request| async move { node.r#move(request).await };
        self.administer(split, MOVE, proto::MoveRequest { split, from, to }, send).await.map(drop)
    }

    /// Hands the leadership of `split` to another of its nodes.
    ///
    /// # Errors
    ///
    /// As [`Client::split`].
    pub async fn lead(&self, split: u64, node: u64) -> Result<(), Error> {
        let send = |mut node: Admin, request| async move { node.lead(request).await };
        self.administer(split, CHANGE, proto::LeadRequest { split, node }, send).await.map(drop)
    }

    /// Asks the split's leader until somebody does it, refuses it for good, or may have done it.
    async fn administer<Q: Clone, A, F>(
        &self,
        split: u64,
        within: Duration,
        request: Q,
        send: impl Fn(Admin, Request<Q>) -> F,
    ) -> Result<A, Error>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let mut pace = Pace { deadline: Instant::now() + within, ..self.pace().patient() };
        loop {
            let tried = async {
                let target = self.leader_of(split, &pace).await?;
                let send = |channel, request| send(admin(channel), request);
                let tried = self.ask_channel(&pace, &target.address, request.clone(), send).await;
                tried.map_err(|fault| (fault, Some(target)))
            };
            match tried.await {
                Ok(answer) => return Ok(answer),
                Err((fault, asked)) if fault.lost => {
                    self.forget(asked.as_ref());
                    return Err(fault.error.unknown());
                }
                Err(failed) => self.pause(&mut pace, failed).await?,
            }
        }
    }
}

/// What the calls are made of.
impl Client {
    pub(crate) fn pace(&self) -> Pace {
        self.pace_until(Instant::now() + self.inner.options.deadline)
    }

    pub(crate) fn pace_until(&self, deadline: Instant) -> Pace {
        let deadline = deadline.min(Instant::now() + self.inner.options.deadline);
        Pace { deadline, attempt: self.inner.options.attempt, pause: PAUSE_MIN, hinted: 0 }
    }

    pub(crate) fn routes(&self) -> Arc<Routes> {
        Arc::clone(&lock(&self.inner.routes))
    }

    pub(crate) fn turn(&self) -> usize {
        self.inner.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Nodes take turns, those that answered of late before those that did not.
    fn anybody(&self) -> String {
        let routes = self.routes();
        let known: Vec<_> = routes.nodes().collect();
        let all = if known.is_empty() { self.inner.book.written().collect() } else { known };
        let turn = self.turn() % all.len().max(1);
        let order = || all.iter().cycle().skip(turn).take(all.len());
        let next = order().find(|address| !self.is_suspect(address)).or_else(|| order().next());
        next.map(|address| (*address).clone()).unwrap_or_default()
    }

    /// Whether the node there did not answer a moment ago. When that is some time ago, whoever asks this first is to try it
    /// for all others.
    pub(crate) fn is_suspect(&self, address: &str) -> bool {
        let now = Instant::now();
        match lock(&self.inner.suspects).get_mut(address) {
            Some(until) if now < *until => true,
            Some(until) => {
                *until = now + SUSPECT;
                false
            }
            None => false,
        }
    }

    fn suspect(&self, address: &str, fault: Fault) -> Fault {
        if fault.error.reason().is_none() && fault.again {
            lock(&self.inner.suspects).insert(address.to_owned(), Instant::now() + SUSPECT);
        } else {
            self.trust(address);
        }
        fault
    }

    fn trust(&self, address: &str) {
        lock(&self.inner.suspects).remove(address);
    }

    /// The place of a row among all rows.
    pub(crate) async fn place(&self, row: &Row) -> Result<Vec<u8>, Error> {
        Ok(self.table(&row.table).await?.place(&row.key)?)
    }

    /// Places of rows, most of which are of one table.
    pub(crate) fn places(&self) -> Places<'_> {
        Places { client: self, last: None }
    }

    /// Whom to ask for rows at `place`.
    pub(crate) async fn leader_at(&self, place: &[u8], pace: &Pace) -> Result<Target, Failed> {
        self.target(pace, |routes, turn| led_at(routes, place, turn)).await
    }

    /// The same for one of many rows, by routes that were looked at for all of them.
    pub(crate) async fn leader_by(
        &self,
        routes: &Routes,
        turn: usize,
        place: &[u8],
        pace: &Pace,
    ) -> Result<Target, Failed> {
        match led_at(routes, place, turn) {
            Some(target) => Ok(target),
            None => self.leader_at(place, pace).await,
        }
    }

    /// Whom to ask for a split.
    pub(crate) async fn leader_of(&self, split: u64, pace: &Pace) -> Result<Target, Failed> {
        self.target(pace, |routes, turn| {
            let route = routes.split(split)?;
            Some(Target { splits: vec![split], address: routes.leader(route, turn)?.to_owned() })
        })
        .await
    }

    async fn target(
        &self,
        pace: &Pace,
        find: impl Fn(&Routes, usize) -> Option<Target>,
    ) -> Result<Target, Failed> {
        let turn = self.turn();
        let routes = self.routes();
        if let Some(target) = find(&routes, turn) {
            return Ok(target);
        }
        let routes = self.refresh(&routes, pace).await.map_err(|fault| (fault, None))?;
        find(&routes, turn)
            .ok_or_else(|| (Fault::unreachable("no node says who has the split".to_owned()), None))
    }

    /// Asks what splits there are, unless somebody has since `seen`.
    async fn refresh(&self, seen: &Arc<Routes>, pace: &Pace) -> Result<Arc<Routes>, Fault> {
        let _one = timeout_at(pace.deadline, self.inner.asking.lock())
            .await
            .map_err(|_| Fault::unreachable("no node has said yet what splits there are".to_owned()))?;
        let now = self.routes();
        if !Arc::ptr_eq(&now, seen) {
            return Ok(now);
        }
        let answers = self.ask_splits(pace).await?;
        let routes = Arc::new(Routes::of(answers));
        *lock(&self.inner.routes) = Arc::clone(&routes);
        Ok(routes)
    }

    /// What all nodes say that answer soon, by the address of each.
    async fn ask_splits(&self, pace: &Pace) -> Result<Vec<(String, proto::ListSplitsResponse)>, Fault> {
        let mut asked: FuturesUnordered<_> = self
            .addresses()
            .into_iter()
            .map(|address| async {
                let send = |mut node: Store, request| async move { node.list_splits(request).await };
                let answer = self.ask(&pace.quick(), &address, proto::ListSplitsRequest {}, send).await;
                answer.map(|answer| (address, self.inner.book.translated(answer)))
            })
            .collect();
        let mut answers = Vec::new();
        let mut failed = None;
        let mut until = pace.deadline;
        while let Ok(Some(answer)) = timeout_at(until, asked.next()).await {
            match answer {
                Ok(answer) => {
                    answers.push(answer);
                    until = until.min(Instant::now() + SPLITS_OTHERS);
                }
                Err(fault) => failed = Some(fault),
            }
        }
        if answers.is_empty() {
            let silent = || Fault::unreachable("no node says what splits there are".to_owned());
            return Err(Fault { lost: false, ..failed.unwrap_or_else(silent) });
        }
        Ok(answers)
    }

    /// One try at one node of [`proto::store_client`].
    pub(crate) async fn ask<Q, A, F>(
        &self,
        pace: &Pace,
        address: &str,
        request: Q,
        send: impl FnOnce(Store, Request<Q>) -> F,
    ) -> Result<A, Fault>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        self.ask_channel(pace, address, request, |channel, request| send(store(channel), request)).await
    }

    async fn ask_channel<Q, A, F>(
        &self,
        pace: &Pace,
        address: &str,
        request: Q,
        send: impl FnOnce(Channel, Request<Q>) -> F,
    ) -> Result<A, Fault>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let channel = self.channel(address)?;
        let left = pace.deadline.saturating_duration_since(Instant::now()).min(pace.attempt);
        let mut request = Request::new(request);
        if let Some(traceparent) = &self.traceparent {
            request.metadata_mut().insert(TRACEPARENT, traceparent.clone());
        }
        match timeout(left, send(channel, request)).await {
            Ok(Ok(answer)) => {
                self.trust(address);
                Ok(answer.into_inner())
            }
            Ok(Err(status)) => Err(self.suspect(address, fault(address, &status, &self.inner.book))),
            Err(_) => Err(self.suspect(address, Fault::late(address))),
        }
    }

    /// After a try that failed: an error if no other can help, else a pause, or a hint to follow without one.
    pub(crate) async fn pause(&self, pace: &mut Pace, (fault, asked): Failed) -> Result<(), Error> {
        if fault.again && Instant::now() >= pace.deadline {
            self.forget(asked.as_ref());
        }
        if !fault.again || Instant::now() >= pace.deadline {
            return Err(fault.error);
        }
        if let (Some(leader), Some(Target { splits, address })) = (fault.leader, &asked)
            && let [split] = splits.as_slice()
            && leader != *address
            && pace.hinted < HINTS_MAX
        {
            pace.hinted += 1;
            // Of the newest routes, which another task may have heard meanwhile.
            let mut routes = lock(&self.inner.routes);
            *routes = Arc::new(routes.led(*split, &leader));
            return Ok(());
        }
        pace.hinted = 0;
        let seen = self.routes();
        self.sleep(pace).await;
        if asked.is_some_and(|asked| !asked.splits.is_empty()) {
            // Whoever cannot say it now is asked again with the next try.
            let _stale = self.refresh(&seen, pace).await;
        }
        if Instant::now() >= pace.deadline { Err(fault.error) } else { Ok(()) }
    }

    /// Whoever asks for these splits next finds out anew who leads them: a node that took all the time there was may
    /// hang, and no connection says so where a sidecar is between.
    fn forget(&self, asked: Option<&Target>) {
        if let Some(Target { splits, .. }) = asked {
            let mut routes = lock(&self.inner.routes);
            *routes = Arc::new(routes.without(splits));
        }
    }

    async fn sleep(&self, pace: &mut Pace) {
        let most = u64::try_from(pace.pause.as_micros()).unwrap_or(u64::MAX);
        let pause = Duration::from_micros(lock(&self.inner.rng).u64(most / 2..=most));
        pace.pause = (pace.pause * 2).min(PAUSE_MAX);
        tokio::time::sleep_until(pace.deadline.min(Instant::now() + pause)).await;
    }

    fn channel(&self, address: &str) -> Result<Channel, Fault> {
        let mut channels = lock(&self.inner.channels);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let endpoint =
            endpoint(address).map_err(|error| Fault::unreachable(format!("{address:?}: {error}")))?;
        let channel = endpoint.connect_lazy();
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}

pub(crate) type Store = StoreClient<Channel>;
type Admin = AdminClient<Channel>;

fn store(channel: Channel) -> Store {
    StoreClient::new(channel)
        .max_decoding_message_size(ANSWER_BYTES_MAX)
        .max_encoding_message_size(ANSWER_BYTES_MAX)
}

fn admin(channel: Channel) -> Admin {
    AdminClient::new(channel)
}

fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE))
}

fn led_at(routes: &Routes, place: &[u8], turn: usize) -> Option<Target> {
    let route = routes.at(place)?;
    Some(Target { splits: vec![route.split], address: routes.leader(route, turn)?.to_owned() })
}

/// Where the declaration of a table is among all rows.
fn declared_at(table: &str) -> Vec<u8> {
    place(TABLES, &sorted(&[Part::from(table)]))
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rows found, in the order asked for.
pub(crate) fn in_order(found: Vec<Option<Found>>) -> Result<Vec<Found>, Error> {
    found
        .into_iter()
        .collect::<Option<_>>()
        .ok_or_else(|| Error::Other(Told { message: "a node left out a row".to_owned(), reason: None }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs run transactions in tasks, which move between threads.
    fn is_send<T: Send>(future: T) -> T {
        future
    }

    #[tokio::test]
    async fn nobody_to_ask_is_said_in_time_and_certain() {
        let options = Options { deadline: Duration::from_millis(50), ..Options::default() };
        let client = Client::with(["127.0.0.1:1".to_owned()], options).unwrap();
        let row = Row::new("accounts", "alice/17");
        let outcome = is_send(client.transact(async move |txn| {
            let was = txn.get(&row).await?;
            txn.put(row.clone(), "1".into());
            Ok(was)
        }));
        let error = outcome.await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
        assert!(error.nothing_written());
    }

    #[test]
    fn one_asks_a_node_that_did_not_answer_whether_it_is_back() {
        let client = Client::connect(["a:1".to_owned()]).unwrap();
        client.suspect("a:1", Fault::late("a:1"));
        assert!(client.is_suspect("a:1") && !client.is_suspect("b:1"));
        lock(&client.inner.suspects).insert("a:1".to_owned(), Instant::now());
        assert!(!client.is_suspect("a:1"), "somebody tries it");
        assert!(client.is_suspect("a:1"), "and the others wait for what becomes of it");
        client.trust("a:1");
        assert!(!client.is_suspect("a:1") && !client.is_suspect("a:1"));
    }

    #[test]
    fn tries_end_when_they_must_but_for_one() {
        let options = Options { deadline: Duration::from_secs(120), ..Options::default() };
        let client = Client::with(["a:1".to_owned()], options).unwrap();
        let now = Instant::now();
        let end = now + Duration::from_secs(40);
        assert_eq!(client.pace().until(end).deadline, end);
        let one = client.pace().until(now).deadline;
        assert!(one >= now + ATTEMPT && one < end);
    }

    #[test]
    fn what_is_no_address_is_refused() {
        assert!(Client::connect([]).is_err());
        assert!(Client::connect(["not an address".to_owned()]).is_err());
        assert!(Client::connect(["1=not an address".to_owned()]).is_err());
        assert!(Client::connect(["127.0.0.1:7001".to_owned()]).is_ok());
        assert!(Client::connect(["1=127.0.0.1:7001".to_owned()]).is_ok());
    }

    #[test]
    fn what_is_no_header_is_no_traceparent() {
        let client = Client::connect(["127.0.0.1:7001".to_owned()]).unwrap();
        assert!(client.serving("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").is_ok());
        assert!(client.serving("00\n").is_err());
    }
}
