//! A node on the network: the node itself on a thread ([`core`]), streams to the others (`peers`), the contract's
//! services (`api`).

mod api;
pub mod core;
pub mod identity;
mod peers;
mod status;
mod tables;
mod watched;

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use store_client::proto::{admin_server::AdminServer, peers_server::PeersServer, store_server::StoreServer};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, server::TcpIncoming};

use api::Api;
use core::{Core, Crash, Handle};
use identity::{Addresses, Chosen, Identity, IdentityError, Standing};
use tables::Tables;
use watched::Watched;

use crate::{
    engine::{EngineError, Lsm},
    lease::NodeId,
    node::Config,
    truetime::{ClockError, Timestamp, TrueTime},
    wal::{Directory, Disk as _},
};

/// A commit's 8 MiB, or the names of as many rows as fit into a request.
const REQUEST_BYTES_MAX: usize = 32 << 20;
/// A client's requests on one connection: each waits for a lock or a disk, and costs little.
const STREAMS_MAX: u32 = 8192;
/// What may be under way on one stream and on one connection: a snapshot's pieces are large.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Who says nothing for so long is asked whether it is there, and has as long to answer: the connections of a host that
/// vanished would stay for ever.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// So long a reading of the clock is gone on from where seconds do not matter.
const READING_USED: Duration = Duration::from_millis(100);
/// Requests under way may end in this time when the node is told to stop.
const DRAIN: Duration = Duration::from_secs(3);
/// Between two tries to hear from all others who a new node is to be.
const HELLO_PAUSE: Duration = Duration::from_millis(100);
/// The longest between two tries of a node to say who it is.
const HELLO_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Who has not been heard is said so often.
const HELLO_SAID: Duration = Duration::from_secs(5);

/// What a node is told to be.
pub struct Options {
    /// Its number, one of those in `nodes`.
    pub number: u64,
    /// Where all nodes can be asked, itself included, by number.
    pub nodes: BTreeMap<u64, String>,
    /// Its data directory. Made if it is not there; empty for a new node.
    pub state: PathBuf,
    /// What time it is.
    pub clock: Arc<dyn TrueTime>,
    /// How long versions of rows are kept.
    pub keep: Duration,
    /// All that is random comes from it.
    pub seed: u64,
}

/// Why a node does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its data directory cannot be used.
    #[error("the data directory cannot be used")]
    Identity(#[from] IdentityError),
    /// What was told is none.
    #[error("{0}")]
    Options(String),
    /// What the node kept is gone.
    #[error(
        "the log or the rows of this node are gone, and with them what it promised: empty the data directory, \
         so that it comes back as a new node"
    )]
    Gone,
    /// The disk says no.
    #[error("the log's directory cannot be used")]
    Log(#[source] io::Error),
    /// The row engine says no.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// There is no thread or socket to be had.
    #[error("the node cannot be started")]
    Start(#[source] io::Error),
    /// The network fails.
    #[error("the network fails")]
    Network(#[from] tonic::transport::Error),
    /// The node must not go on.
    #[error(transparent)]
    Crash(#[from] Crash),
}

/// The node, once it is there.
struct Running {
    id: NodeId,
    handle: Handle,
}

/// What all calls have of the node.
struct Shared {
    number: u64,
    addresses: Addresses,
    identity: Identity,
    clock: Arc<dyn TrueTime>,
    tables: Tables,
    rng: Mutex<fastrand::Rng>,
    /// What time it was at most, and when: see [`Shared::about_now`].
    reading: Mutex<Option<(Timestamp, Instant)>>,
    running: OnceLock<Running>,
    stopping: CancellationToken,
}

impl Shared {
    fn running(&self) -> Option<&Running> {
        self.running.get()
    }

    /// Whether another node may be heard. The node hears of one that is new.
    fn standing(&self, other: NodeId) -> Result<Standing, IdentityError> {
        let standing = self.identity.standing(other)?;
        if standing == Standing::New
            && let Some(running) = self.running()
        {
            running.handle.meet(other);
        }
        Ok(standing)
    }

    /// What time it is at most, to the microsecond or so: to ask the kernel costs more than some requests do.
    fn about_now(&self) -> Result<Timestamp, ClockError> {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((latest, at)) = *reading
            && at.elapsed() <= READING_USED
        {
            return Ok(latest.plus(at.elapsed()));
        }
        let latest = self.clock.now()?.latest;
        *reading = Some((latest, Instant::now()));
        Ok(latest)
    }

    fn random(&self) -> u64 {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).u64(..)
    }
}

/// Serves until `stop`, or until the node must not go on. `ready` hears its id when it does.
///
/// # Errors
///
/// When it cannot serve, or must stop.
pub async fn serve(
    listener: std::net::TcpListener,
    options: Options,
    ready: impl FnOnce(NodeId, SocketAddr),
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let Options { number, nodes, state, clock, keep, seed } = options;
    check(number, &nodes)?;
    let address = listener.local_addr().map_err(ServeError::Start)?;
    let addresses = Addresses::new(nodes);
    let mut rng = fastrand::Rng::with_seed(seed);
    let tables =
        Tables::new(&addresses, rng.u64(..)).map_err(|error| ServeError::Options(error.to_string()))?;
    let node_seed = rng.u64(..);
    let shared = Arc::new(Shared {
        number,
        identity: Identity::open(&state, number)?,
        addresses,
        clock,
        tables,
        rng: Mutex::new(rng),
        reading: Mutex::default(),
        running: OnceLock::new(),
        stopping: CancellationToken::new(),
    });

    // Others must be able to say hello before this node knows who it is.
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_not_serving::<StoreServer<Api>>().await;
    let mut tasks = JoinSet::new();
    let listener = tokio_listener(listener).map_err(ServeError::Start)?;
    // Answers are small, and whoever asked waits: gathering them only adds delay.
    let incoming_connections = TcpIncoming::from(listener).with_nodelay(Some(true));
    let stopping = shared.stopping.clone();
    let api = Api { shared: Arc::clone(&shared) };
    let incoming = peers::Incoming { shared: Arc::clone(&shared) };
    let mut server = std::pin::pin!(
        Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE))
            .add_service(StoreServer::new(api.clone()).max_decoding_message_size(REQUEST_BYTES_MAX))
            .add_service(AdminServer::new(api))
            .add_service(PeersServer::new(incoming).max_decoding_message_size(peers::PARCEL_BYTES_MAX),)
            .add_service(health_service)
            .serve_with_incoming_shutdown(incoming_connections, async move {
                stopping.cancelled().await;
            })
    );
    let mut stop = std::pin::pin!(stop);

    let chosen = tokio::select! {
        chosen = choose(&shared) => chosen?,
        served = &mut server => return Ok(served?),
        () = &mut stop => return Ok(()),
    };
    let mut core = tokio::select! {
        core = start(&shared, &state, &chosen, keep, node_seed, &mut tasks) => core?,
        served = &mut server => return Ok(served?),
        () = &mut stop => return Ok(()),
    };
    tracing::info!(node = chosen.id.0, %address, "serves");
    health.set_serving::<StoreServer<Api>>().await;
    ready(chosen.id, address);

    tokio::select! {
        served = &mut server => served?,
        crashed = core.ended() => crashed?,
        () = &mut stop => {
            tracing::info!("stops");
            health.set_not_serving::<StoreServer<Api>>().await;
            shared.stopping.cancel();
            // What takes longer is cut off, as it would be by a crash.
            let _cut_off = tokio::time::timeout(DRAIN, &mut server).await;
        }
    }
    tasks.abort_all();
    core.stop();
    Ok(())
}

fn check(number: u64, nodes: &BTreeMap<u64, String>) -> Result<(), ServeError> {
    let wrong = |message: String| Err(ServeError::Options(message));
    if !nodes.contains_key(&number) {
        return wrong(format!("node {number} is not among the nodes"));
    }
    match nodes.keys().find(|number| !(1..=identity::NUMBER_MAX).contains(number)) {
        Some(number) => wrong(format!("node {number}: numbers are 1 to {}", identity::NUMBER_MAX)),
        None => Ok(()),
    }
}

fn tokio_listener(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Who this node is: what its disk says, or what all the others make of one whose disk is empty.
async fn choose(shared: &Shared) -> Result<Chosen, ServeError> {
    if let Some(chosen) = shared.identity.chosen() {
        return Ok(chosen);
    }
    let others: Vec<_> = shared.addresses.iter().filter(|(number, _)| *number != shared.number).collect();
    let mut said = None;
    loop {
        let asked = others.iter().map(|(_, address)| peers::hello(address, None));
        let answers = futures::future::join_all(asked).await;
        let mut silent = Vec::new();
        let mut heard = Vec::new();
        for ((number, address), answer) in others.iter().zip(answers) {
            match answer {
                Ok(answer) => heard.push(answer),
                Err(error) => {
                    let why = peers::chain(error.as_ref());
                    silent.push(format!("node {number} at {address} ({why})"));
                }
            }
        }
        if silent.is_empty() {
            let numbers = shared.addresses.iter().map(|(number, _)| number);
            let chosen = shared.identity.choose(&heard, numbers)?;
            match chosen.first.as_slice() {
                [] => tracing::info!(node = chosen.id.0, "joins the universe that the others are"),
                first => tracing::info!(
                    node = chosen.id.0,
                    nodes = first.len(),
                    "makes a universe with the others"
                ),
            }
            return Ok(chosen);
        }
        if said.is_none_or(|said: tokio::time::Instant| said.elapsed() >= HELLO_SAID) {
            said = Some(tokio::time::Instant::now());
            let silent = silent.join(", ");
            tracing::warn!(%silent, "this node's disk is empty, and it must hear from all others who it is to be");
        }
        tokio::time::sleep(HELLO_PAUSE).await;
    }
}

/// Opens the node and starts its streams.
async fn start(
    shared: &Arc<Shared>,
    state: &std::path::Path,
    chosen: &Chosen,
    keep: Duration,
    seed: u64,
    tasks: &mut JoinSet<()>,
) -> Result<Core, ServeError> {
    let (log, rows) = (state.join("log"), state.join("rows"));
    let gone = chosen.begun && !rows.exists();
    let disk = Watched(Directory::new(&log).map_err(ServeError::Log)?);
    if gone || chosen.begun && disk.segments().map_err(ServeError::Log)?.is_empty() {
        return Err(ServeError::Gone);
    }
    let engine = Arc::new(Watched(Lsm::open(&rows)?));
    let (outgoing, streams) = peers::outgoing(chosen.id, &shared.addresses);
    let config = Config { keep, ..Config::new(chosen.id, chosen.first.clone(), seed) };
    let (opened, is_open) = oneshot::channel();
    let clock = Arc::clone(&shared.clock);
    let mut core = Core::start(config, disk, engine, clock, outgoing, opened).map_err(ServeError::Start)?;
    if is_open.await.is_err() {
        // It ends without an error only when it is told to, which nobody has.
        core.ended().await?;
        return Err(Crash::Panic.into());
    }
    shared.identity.begun()?;
    for stream in streams {
        tasks.spawn(stream);
    }
    let handle = core.handle.clone();
    for other in shared.identity.newest().into_values().filter(|other| *other != chosen.id) {
        handle.meet(other);
    }
    // Set once: there is one start.
    let _unset = shared.running.set(Running { id: chosen.id, handle });
    for (number, address) in shared.addresses.iter().filter(|(number, _)| *number != shared.number) {
        tasks.spawn(introduce(Arc::clone(shared), chosen.id, number, address.to_owned()));
    }
    Ok(core)
}

/// Says to another node that this one is there, until it hears: a node that joins leads nothing and is asked nothing, so
/// that nobody would speak to it.
async fn introduce(shared: Arc<Shared>, me: NodeId, number: u64, address: String) {
    let mut pause = HELLO_PAUSE;
    loop {
        match peers::hello(&address, Some(me)).await {
            Ok(other) if other.node != 0 => {
                if let Err(error) = shared.standing(NodeId(other.node)) {
                    tracing::error!(%error, "who is heard of cannot be kept");
                }
                return;
            }
            // It is there, and will say who it is when it speaks.
            Ok(_) => return,
            Err(error) => {
                tracing::debug!(number, %address, %error, "another node does not hear who this one is")
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(HELLO_PAUSE_MAX);
    }
}
