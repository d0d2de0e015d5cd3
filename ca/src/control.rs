//! Control: the authority as a process.
//!
//! Agents come over gRPC and mTLS ([`service`]); people come over a Unix socket ([`crate::admin`]) or,
//! in the same process, through [`ControlHandle`]. State changes are pushed, never polled.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use secrecy::SecretString;
use thiserror::Error;
use tokio::sync::{broadcast, watch};

use identity::clock::SharedClock;
use identity::id::IdError;
use identity::pseudonym;
use identity::socket::SocketError;
use identity::source::IdentityPublisher;
use identity::svid::SvidError;
use identity::tls::{self, ClientAuth};
use identity::{BundleSet, IdentitySource, Scope, SpiffeId, TrustBundle, TrustDomain, X509Svid};

use crate::authority::{Authority, AuthorityError, IssueError, LeafRequest};
use crate::backoff::Backoff;
use crate::csr::{CsrError, PendingKey};
use crate::entry::{self, EntryError, EntrySet, MIN_SVID_TTL};
use crate::hex;
use crate::keyfile::{self, KeyFileError};
use crate::model::{
    AuthorityStatus, ControlStatus, Counts, DecisionQuery, EntryStatus, IssuedSvid, JoinToken,
    MAX_SVIDS_LISTED, NodeStatus, StoredDecision,
};
use crate::random::{RandomError, SharedRandom};
use crate::state::{self, StateError};
use crate::transport;

mod admin_api;
mod endpoints;
mod limit;
mod policies;
mod relations;
mod rollout;
mod service;
mod store;

pub use crate::entry::{Entry, Selectors};
pub(crate) use admin_api::{ErrorBody, JoinTokenRequest, RollBackRequest, RolledBack, WriteRelations};
pub(crate) use limit::Limiter;
pub use policies::{OfferError, PoliciesConfig, PolicyOffer, Replayed, Replayer, Schema, Schemas};
pub use relations::{RelationsConfig, RelationsError, RelationsOf};
pub use rollout::{Ring, Rings};
pub(crate) use service::{
    MAX_DECISION_FIELD_BYTES, MAX_DECISION_JSON_BYTES, MAX_REPORT_BATCH, MAX_SIGN_BATCH,
};
pub use store::StoreError;

use endpoints::Registry;
use store::{NodeRecord, Store, TokenRecord};

/// Longest life of a join token: it is a bearer secret, so a day is generous.
pub const MAX_JOIN_TOKEN_TTL: Duration = Duration::from_secs(24 * 3600);
/// Life of a node identity. Longer than a workload's, so that a host whose control was away for hours
/// comes back without a new join token.
pub const NODE_SVID_TTL: Duration = Duration::from_secs(24 * 3600);
/// Changes that a subscriber may lag behind before it is told that it missed some.
const CHANGES_KEPT: usize = 256;
/// Random bytes of a join token.
const JOIN_TOKEN_BYTES: usize = 32;
/// Waits between attempts to renew control's own identity.
const OWN_BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Longest sleep by the clock before it is looked at again.
const MAX_NAP: Duration = Duration::from_secs(30);
/// How far the clock may stand before the moment of an issuance without having been set back.
const CLOCK_SLACK: Duration = Duration::from_secs(5);

/// Attempts to join, an address: a burst for a rack that starts at once behind one address.
const JOIN_LIMIT: (u32, u32) = (100, 5);
/// Certificates, an agent: a burst for all workloads of a host, then more than any rotation needs.
const SIGN_LIMIT: (u32, u32) = (2_000, 200);
/// Decisions, an agent.
const REPORT_LIMIT: (u32, u32) = (50_000, 5_000);
/// Batches of relations, an agent: each is a write to the disk.
const RELATIONS_LIMIT: (u32, u32) = (1_000, 200);

/// What control needs to run.
#[derive(Debug)]
pub struct ControlConfig {
    /// The trust domain it is the authority of.
    pub trust_domain: TrustDomain,
    /// Where agents connect; see [`listen`].
    pub listener: TcpListener,
    /// Where the command line connects. Its directory is made 0700, or must be.
    pub admin_socket: PathBuf,
    /// Directory of the root key and the database. It is made 0700, or must be.
    pub state: PathBuf,
    /// Lifetime of workloads' SVIDs where the entry says nothing else.
    pub svid_ttl: Duration,
    /// Age at which an SVID is replaced; less than `svid_ttl`.
    pub rotate_after: Duration,
    /// Lifetime of a new root; an existing one keeps its own.
    pub root_ttl: Duration,
    /// Registrations. They come from here at each start; those of an earlier run are forgotten.
    pub entries: Vec<Entry>,
    /// Opens, or at the first start seals, the root key.
    pub passphrase: SecretString,
    /// Decisions stored; above, the oldest are dropped.
    pub decisions_kept: usize,
    /// Whom it hands policies out to, if it does.
    pub policies: Option<PoliciesConfig>,
    /// Whose relations it keeps.
    pub relations: RelationsConfig,
}

/// Why control did not start.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The address is in use.
    #[error("{0} is taken by another process; stop it or configure another address for control")]
    PortTaken(SocketAddr),
    /// The address cannot be used.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The listener given cannot be used.
    #[error("the listener cannot be used")]
    Listener(#[source] io::Error),
    /// Lifetimes that contradict each other.
    #[error("{0}")]
    Lifetimes(&'static str),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The root key.
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    /// The root could not be made.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The database remembers a root whose key is not there. A new root would be trusted by nobody.
    #[error(
        "{} is missing, but this state directory has issued under it: restore it from a backup, \
         or move the whole directory away to begin a new trust domain", .0.display()
    )]
    RootMissing(PathBuf),
    /// The key file holds another root than the database was made with.
    #[error("{} is not the root that this state directory was made with", .0.display())]
    RootChanged(PathBuf),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A registration.
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// The admin socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The admin socket's path has no directory.
    #[error("{} has no directory to be in", .0.display())]
    SocketPath(PathBuf),
    /// Control's own identity.
    #[error("control could not issue its own identity")]
    Own(#[from] OwnIdentityError),
    /// TLS.
    #[error("TLS could not be configured")]
    Tls(#[source] rustls::Error),
    /// The process is stopping.
    #[error("the process is stopping")]
    Stopping,
}

/// Why control could not issue its own identity.
#[derive(Debug, Error)]
pub enum OwnIdentityError {
    /// The trust domain is so long that no ID fits.
    #[error(transparent)]
    Id(#[from] IdError),
    /// No key.
    #[error("no key could be made")]
    Key(#[source] rcgen::Error),
    /// The key is not what was asked for.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// Not issued.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// Issued, but unusable.
    #[error(transparent)]
    Svid(#[from] SvidError),
    /// Issued, but not logged, so thrown away.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why no join token was made.
#[derive(Debug, Error)]
pub enum JoinTokenError {
    /// Not a name that an agent's ID can end in.
    #[error("{0:?} is not a host name: letters, digits, '.', '-' and '_' only")]
    Host(String),
    /// Longer than [`MAX_JOIN_TOKEN_TTL`], or nothing.
    #[error("a join token lives between one second and {} s", MAX_JOIN_TOKEN_TTL.as_secs())]
    Ttl,
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// Not stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Binds the address on which agents are served, and says clearly if it is taken.
pub fn listen(address: SocketAddr) -> Result<TcpListener, ControlError> {
    TcpListener::bind(address).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ControlError::PortTaken(address),
        _ => ControlError::Listen { address, source },
    })
}

/// A running control. Its tasks belong to the scope it was started in and end with it.
#[derive(Debug)]
pub struct Control {
    handle: ControlHandle,
}

/// A handle on a running control, cheap to clone: the read model and what may be changed in process.
#[derive(Debug, Clone)]
pub struct ControlHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    trust_domain: TrustDomain,
    address: SocketAddr,
    authority: Authority,
    store: Store,
    clock: SharedClock,
    random: SharedRandom,
    scope: Scope,
    svid_ttl: Duration,
    rotate_after: Duration,
    decisions_kept: u64,
    entries: watch::Sender<Arc<EntrySet>>,
    endpoints: Registry,
    policies: Option<policies::Policies>,
    relations: relations::Relations,
    nodes: Mutex<HashMap<String, Node>>,
    active: Mutex<HashMap<String, IssuedSvid>>,
    sequence: AtomicU64,
    changes: broadcast::Sender<u64>,
    own: IdentitySource,
    pseudonym_key: zeroize::Zeroizing<Vec<u8>>,
    join_limit: Limiter<IpAddr>,
    sign_limit: Limiter<SpiffeId>,
    report_limit: Limiter<SpiffeId>,
    relations_limit: Limiter<SpiffeId>,
}

#[derive(Debug)]
struct Node {
    record: NodeRecord,
    last_seen: Option<u64>,
    streams: usize,
}

impl Control {
    /// Opens or makes the root, serves agents and the admin socket. Returns once both accept.
    ///
    /// # Errors
    /// [`ControlError`]; nothing is left running then but tasks of `scope`, which the caller drains.
    pub async fn start(
        mut config: ControlConfig,
        clock: SharedClock,
        random: SharedRandom,
        scope: &Scope,
    ) -> Result<Self, ControlError> {
        check_lifetimes(&config)?;
        state::private_directory(&config.state)?;
        let started = clock.now();
        let first_sequence = u64::try_from(started.as_millis()).unwrap_or(u64::MAX / 2);
        let entries = EntrySet::new(first_sequence, &config.trust_domain, config.entries.clone())?;
        config.listener.set_nonblocking(true).map_err(ControlError::Listener)?;
        let listener =
            tokio::net::TcpListener::from_std(config.listener.try_clone().map_err(ControlError::Listener)?)
                .map_err(ControlError::Listener)?;
        let address = listener.local_addr().map_err(ControlError::Listener)?;
        let admin_socket = config.admin_socket.clone();
        let admin = admin_api::bind(&admin_socket)?;

        let (svid_ttl, rotate_after) = (config.svid_ttl, config.rotate_after);
        let (decisions_kept, trust_domain) = (config.decisions_kept as u64, config.trust_domain.clone());
        let generator = Arc::clone(&random);
        let policies = config.policies.take();
        let relations = relations::Relations::new(std::mem::take(&mut config.relations));
        // argon2id takes its time and memory; so does a database that was not closed in order.
        let (authority, store) =
            tokio::task::spawn_blocking(move || open_state(&config, &generator, started))
                .await
                .unwrap_or(Err(ControlError::Stopping))?;
        let nodes = store.nodes()?;
        let epochs = store.epochs()?;
        let pseudonym_key = pseudonym_key(&store, &random)?;
        let policies = policies.map(|config| policies::Policies::new(config, epochs, started));
        let active = store.active_issuances(started.as_secs())?;
        let (publisher, own) = IdentitySource::channel();
        let inner = Arc::new(Inner {
            trust_domain,
            address,
            authority,
            store,
            clock: Arc::clone(&clock),
            random,
            scope: scope.clone(),
            svid_ttl,
            rotate_after,
            decisions_kept,
            entries: watch::Sender::new(Arc::new(entries)),
            endpoints: Registry::new(started),
            policies,
            relations,
            nodes: Mutex::new(
                nodes
                    .into_iter()
                    .map(|(host, record)| (host, Node { record, last_seen: None, streams: 0 }))
                    .collect(),
            ),
            active: Mutex::new(active.into_iter().map(|issued| (issued.serial.clone(), issued)).collect()),
            sequence: AtomicU64::new(first_sequence),
            changes: broadcast::Sender::new(CHANGES_KEPT),
            own,
            pseudonym_key,
            join_limit: Limiter::new(JOIN_LIMIT.0, JOIN_LIMIT.1),
            sign_limit: Limiter::new(SIGN_LIMIT.0, SIGN_LIMIT.1),
            report_limit: Limiter::new(REPORT_LIMIT.0, REPORT_LIMIT.1),
            relations_limit: Limiter::new(RELATIONS_LIMIT.0, RELATIONS_LIMIT.1),
        });
        inner.renew_own(&publisher).await?;
        let tls_config = tls::server_config(&inner.own, ClientAuth::Optional, &[tls::ALPN_H2], &clock)
            .map_err(ControlError::Tls)?;
        scope.spawn_critical("endpoints", endpoints::publish(Arc::clone(&inner)));
        if inner.policies.is_some() {
            scope.spawn_critical("policies", policies::keep(Arc::clone(&inner)));
        }
        scope.spawn_critical("control identity", keep_own_identity(Arc::clone(&inner), publisher));
        let connections = transport::accept_tls(listener, tls_config, clock, scope);
        scope.spawn_critical("control service", service::serve(Arc::clone(&inner), connections));
        let handle = ControlHandle(inner);
        scope.spawn_critical("control admin socket", admin_api::serve(handle.clone(), admin, admin_socket));
        tracing::info!(%address, trust_domain = %handle.0.trust_domain, root = handle.0.authority.serial(), "control serves");
        Ok(Self { handle })
    }

    /// A handle on it.
    pub fn handle(&self) -> ControlHandle {
        self.handle.clone()
    }

    /// Where agents connect.
    pub fn local_addr(&self) -> SocketAddr {
        self.handle.0.address
    }
}

impl ControlHandle {
    /// Everything at this moment.
    pub async fn status(&self) -> Result<ControlStatus, StoreError> {
        let now = self.0.clock.now_seconds();
        let (counts, relations) =
            self.0.store.run(move |store| Ok((store.counts(now)?, store.relation_heads()?))).await?;
        let (svids, active) = self.0.active_svids(now);
        let set = self.0.entries.borrow().clone();
        Ok(ControlStatus {
            trust_domain: self.0.trust_domain.to_string(),
            listen: self.0.address.to_string(),
            authority: AuthorityStatus {
                serial: self.0.authority.serial().to_owned(),
                fingerprint: hex::sha256(self.0.authority.certificate()),
                not_after: self.0.authority.not_after().as_secs(),
            },
            entries: set
                .by_id
                .iter()
                .map(|(entry_id, entry)| EntryStatus {
                    entry_id: entry_id.clone(),
                    entry: entry.as_ref().clone(),
                })
                .collect(),
            nodes: self.0.node_statuses(),
            endpoints: self.0.endpoints.statuses(),
            policies: self.0.policies.as_ref().map(policies::Policies::status),
            relations: self.0.relations_status(relations),
            svids,
            counts: Counts {
                svids_issued: counts.issued,
                svids_active: active,
                join_tokens_open: counts.tokens_open,
                decisions_stored: counts.decisions,
                decisions_expired: counts.decisions_expired,
                decisions_lost: counts.decisions_lost,
            },
            sequence: self.0.sequence.load(Ordering::Relaxed),
        })
    }

    /// Decisions that match, newest first.
    pub async fn decisions(&self, query: DecisionQuery) -> Result<Vec<StoredDecision>, StoreError> {
        self.0.store.run(move |store| store.decisions(&query)).await
    }

    /// The decision of a receipt.
    pub async fn decision(&self, receipt: &str) -> Result<Option<StoredDecision>, StoreError> {
        let receipt = receipt.to_owned();
        self.0.store.run(move |store| store.decision(&receipt)).await
    }

    /// Hears the new sequence number at every change of status or decisions. A receiver that lags is
    /// told so by the channel and reads the state anew.
    pub fn subscribe(&self) -> broadcast::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// By which pseudonym a person stands in decisions, where those are recorded so.
    pub fn pseudonym(&self, of: &str) -> String {
        pseudonym::of(&self.0.pseudonym_key, of)
    }

    /// Control's own identity, `spiffe://TD/palisade/control`, rotated by itself.
    pub fn identity(&self) -> IdentitySource {
        self.0.own.clone()
    }

    /// The trust bundle.
    pub fn bundle(&self) -> TrustBundle {
        self.0.authority.bundle().clone()
    }

    /// Replaces all registrations; agents hear of it at once.
    ///
    /// # Errors
    /// [`EntryError`] for the first bad one; nothing has changed then.
    pub fn replace_entries(&self, entries: Vec<Entry>) -> Result<(), EntryError> {
        let sequence = self.0.entries.borrow().sequence + 1;
        let set = Arc::new(EntrySet::new(sequence, &self.0.trust_domain, entries)?);
        tracing::info!(entries = set.by_id.len(), sequence, "registrations replaced");
        self.0.entries.send_replace(set);
        self.0.changed();
        Ok(())
    }

    /// Makes a single-use token with which `host` may join. Only its hash is kept.
    pub async fn create_join_token(&self, host: &str, ttl: Duration) -> Result<JoinToken, JoinTokenError> {
        if !entry::is_host(&self.0.trust_domain, host) {
            return Err(JoinTokenError::Host(host.to_owned()));
        }
        if ttl < Duration::from_secs(1) || ttl > MAX_JOIN_TOKEN_TTL {
            return Err(JoinTokenError::Ttl);
        }
        let mut bytes = zeroize::Zeroizing::new([0u8; JOIN_TOKEN_BYTES]);
        self.0.random.fill(&mut *bytes)?;
        let token = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes.as_slice());
        let now = self.0.clock.now_seconds();
        let record = TokenRecord { host: host.to_owned(), expires: now + ttl.as_secs() };
        let (hash, expires) = (hex::sha256(token.as_bytes()), record.expires);
        self.0.store.run(move |store| store.add_token(&hash, &record, now)).await?;
        tracing::info!(host, expires, "join token made");
        self.0.changed();
        Ok(JoinToken { token, host: host.to_owned(), expires })
    }
}

impl Inner {
    /// Tells subscribers that something changed.
    fn changed(&self) {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        // Nobody listening is fine.
        let _listeners = self.changes.send(sequence).unwrap_or(0);
    }

    fn nodes(&self) -> MutexGuard<'_, HashMap<String, Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node_statuses(&self) -> Vec<NodeStatus> {
        let mut statuses: Vec<_> = self
            .nodes()
            .iter()
            .filter_map(|(host, node)| {
                Some(NodeStatus {
                    host: host.clone(),
                    spiffe_id: entry::agent_id(&self.trust_domain, host)?.to_string(),
                    joined: node.record.joined,
                    last_seen: node.last_seen,
                    connected: node.streams > 0,
                    serial: node.record.serial.clone(),
                    not_after: node.record.not_after,
                })
            })
            .collect();
        statuses.sort_by(|one, other| one.host.cmp(&other.host));
        statuses
    }

    /// Remembers what was issued (and logged) until it expires.
    fn remember(&self, issued: impl IntoIterator<Item = IssuedSvid>) {
        let now = self.clock.now_seconds();
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        active.retain(|_, issued| issued.not_after > now);
        active.extend(issued.into_iter().map(|issued| (issued.serial.clone(), issued)));
        drop(active);
        self.changed();
    }

    /// The newest unexpired SVIDs, and how many there are.
    fn active_svids(&self, now: u64) -> (Vec<IssuedSvid>, u64) {
        let active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        let mut svids: Vec<_> = active.values().filter(|issued| issued.not_after > now).cloned().collect();
        drop(active);
        let count = svids.len() as u64;
        svids.sort_by(|one, other| (other.issued, &other.serial).cmp(&(one.issued, &one.serial)));
        svids.truncate(MAX_SVIDS_LISTED);
        (svids, count)
    }

    /// Issues and publishes control's own identity.
    async fn renew_own(&self, publisher: &IdentityPublisher) -> Result<(), OwnIdentityError> {
        let id = entry::control_id(&self.trust_domain).ok_or(IdError::TooLong)?;
        let svid = self.issue_own(&id, self.svid_ttl, "control").await?;
        publisher.publish(svid, Arc::new(BundleSet::new([self.authority.bundle().clone()])));
        Ok(())
    }

    /// Issues an identity that control itself uses.
    async fn issue_own(&self, id: &SpiffeId, ttl: Duration, why: &str) -> Result<X509Svid, OwnIdentityError> {
        let key = PendingKey::generate().map_err(OwnIdentityError::Key)?;
        let public_key = key.public()?;
        let request = LeafRequest { public_key: &public_key, id, dns: &[], ips: &[], ttl };
        let now = self.clock.now();
        let issued = self.authority.issue(&request, &*self.random, now)?;
        let svid = key.with_certificates(vec![issued.certificate])?;
        let line = IssuedSvid {
            serial: issued.serial,
            spiffe_id: id.to_string(),
            host: String::new(),
            why: why.into(),
            entry_id: String::new(),
            issued: now.as_secs(),
            not_after: issued.not_after.as_secs(),
        };
        let logged = line.clone();
        self.store.run(move |store| store.log_issuances(&[logged])).await?;
        self.remember([line]);
        Ok(svid)
    }
}

/// Replaces control's own identity at its time, for as long as the scope lives. The clock is looked at
/// again after every nap: a machine that was asleep, or whose clock was set, must not present an
/// identity that is over, or not valid yet.
async fn keep_own_identity(inner: Arc<Inner>, publisher: IdentityPublisher) {
    let mut backoff = Backoff::new(OWN_BACKOFF.0, OWN_BACKOFF.1);
    let regular = inner.rotate_after.min(inner.svid_ttl / 2);
    let mut issued = inner.clock.now();
    let mut due = issued + regular;
    loop {
        let nap = due.saturating_sub(inner.clock.now()).min(MAX_NAP);
        tokio::select! {
            () = inner.clock.sleep(nap) => {}
            () = inner.scope.draining() => return,
        }
        let now = inner.clock.now();
        let set_back = now + CLOCK_SLACK < issued;
        if now < due && !set_back {
            continue;
        }
        match inner.renew_own(&publisher).await {
            Ok(()) => {
                backoff.reset();
                issued = now;
                due = now + regular;
            }
            Err(error) => {
                let wait = backoff.wait(&*inner.random);
                // Also after a set-back: otherwise this would spin until the clock has caught up.
                issued = now;
                due = now + wait;
                tracing::error!(%error, retry_in = ?wait, "control could not renew its own identity");
            }
        }
    }
}

fn check_lifetimes(config: &ControlConfig) -> Result<(), ControlError> {
    if config.svid_ttl < MIN_SVID_TTL {
        return Err(ControlError::Lifetimes("svid_ttl must be at least 5 s"));
    }
    if config.rotate_after < Duration::from_secs(1) || config.rotate_after >= config.svid_ttl {
        return Err(ControlError::Lifetimes("rotate_after must be at least 1 s and less than svid_ttl"));
    }
    if config.root_ttl < config.svid_ttl {
        return Err(ControlError::Lifetimes("root_ttl must not be less than svid_ttl"));
    }
    Ok(())
}

/// The key by which people in decisions are given pseudonyms, made at the first start.
fn pseudonym_key(store: &Store, random: &SharedRandom) -> Result<zeroize::Zeroizing<Vec<u8>>, ControlError> {
    let mut fresh = zeroize::Zeroizing::new([0; pseudonym::KEY_BYTES]);
    random.fill(&mut *fresh).map_err(AuthorityError::from)?;
    let key = store.pseudonym_key(&hex::encode(&*fresh))?;
    hex::decode(&key).ok_or(ControlError::Store(StoreError::Damaged))
}

/// Opens the root and the database, and makes sure that they belong together. Blocks.
fn open_state(
    config: &ControlConfig,
    random: &SharedRandom,
    now: Duration,
) -> Result<(Authority, Store), ControlError> {
    let store = Store::open(&config.state)?;
    let path = config.state.join(keyfile::FILE_NAME);
    let known = store.root_fingerprint()?;
    let authority = match keyfile::load(&config.state, &config.trust_domain, &config.passphrase)? {
        Some(authority) => authority,
        None if known.is_some() => return Err(ControlError::RootMissing(path)),
        None => {
            let authority =
                Authority::generate(config.trust_domain.clone(), config.root_ttl, &**random, now)?;
            keyfile::save(&config.state, &authority, &config.passphrase, &**random)?;
            tracing::info!(path = %path.display(), root = authority.serial(), "new root made");
            authority
        }
    };
    let fingerprint = hex::sha256(authority.certificate());
    match known {
        // A crash between the two writes of a first start leaves the key alone: it is taken up here.
        None => store.set_root_fingerprint(&fingerprint)?,
        Some(known) if known == fingerprint => {}
        Some(_) => return Err(ControlError::RootChanged(path)),
    }
    Ok((authority, store))
}
