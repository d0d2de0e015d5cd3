//! The agent: one a host. It proves its host to control, attests the host's processes, and serves them
//! the SPIFFE Workload API on a Unix socket.
//!
//! What it may hand out it learns from control's stream ([`upstream`]); the keys it hands out are made
//! here, live in memory only, and are replaced in time ([`rotation`]). If control is gone, everything
//! goes on with what is known until it expires.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use thiserror::Error;
use tokio::sync::watch;

use identity::bundle::BundleError;
use identity::clock::SharedClock;
use identity::socket::{self, SocketError};
use identity::svid::SvidError;
use identity::{IdentitySource, Scope, SpiffeId, TrustDomain};

use crate::entry;
use crate::random::SharedRandom;
use crate::state::{self, StateError};

mod attest;
mod authority_header;
mod decisions;
mod endpoints;
mod log;
mod node;
mod policies;
mod refusal;
mod relations;
mod rotation;
mod upstream;
mod workload;

use attest::{Attestor, LinuxProcesses};
use decisions::Queue;
use endpoints::Endpoints;
use log::DecisionLog;
use node::Node;
use policies::Policies;
use refusal::Refusals;
use relations::Relations;
use upstream::Upstream;

pub use refusal::{RefusalReason, RefusalRecorder, RefusedCaller};

/// Permissions of the agent's socket when nothing else is configured: any local process may ask; what it
/// gets is decided by attestation.
pub const DEFAULT_SOCKET_MODE: u32 = 0o666;

/// Longest sleep by the clock before it is looked at again: a machine that was asleep, or whose clock was
/// set, notices within this time.
const MAX_NAP: Duration = Duration::from_secs(30);

/// What an agent needs to run.
#[derive(Debug)]
pub struct AgentConfig {
    /// This host's name: the last part of the agent's SPIFFE ID.
    pub host: String,
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// Where workloads connect. Its directory is made 0755, or must not be writable for others.
    pub socket: PathBuf,
    /// Permissions of the socket; see [`DEFAULT_SOCKET_MODE`].
    pub socket_mode: u32,
    /// Directory of the node identity. It is made 0700, or must be.
    pub state: PathBuf,
    /// Where control listens for agents.
    pub control: SocketAddr,
    /// How to join, if there is no valid node identity in `state`.
    pub bootstrap: Option<Bootstrap>,
    /// Writes down who was refused an identity, for control. Without it callers are refused all the same,
    /// the log says why, and they get no receipt.
    pub refusals: Option<Arc<dyn RefusalRecorder>>,
    /// Takes people out of decisions before they leave the host, or are written down on it.
    pub redactor: Option<Arc<dyn Redactor>>,
}

/// Takes people out of decisions.
pub trait Redactor: std::fmt::Debug + Send + Sync {
    /// The record with pseudonyms by this key; `None` if it cannot be read, and so is not passed on.
    fn redact(&self, key: &[u8], json: &str) -> Option<String>;
}

/// How a host joins.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// A token that control made for this host.
    pub join_token: SecretString,
    /// The trust domain's authorities, PEM. Control is verified by them from the first connection on;
    /// nothing is ever trusted because it answered first.
    pub bundle_pem: String,
}

/// Why an agent did not start.
#[derive(Debug, Error)]
pub enum AgentError {
    /// Not a name that an agent's ID can end in.
    #[error("{0:?} is not a host name: letters, digits, '.', '-' and '_' only")]
    Host(String),
    /// The state directory or the socket's.
    #[error(transparent)]
    State(#[from] StateError),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The socket's path has no directory.
    #[error("{} has no directory to be in", .0.display())]
    SocketPath(PathBuf),
    /// No node identity and no way to get one.
    #[error("this host has no node identity in {}: make a join token for it on control and start the agent with it", .0.display())]
    NotJoined(PathBuf),
    /// The node identity ended while the agent was away.
    #[error("the node identity in {} has expired: make a new join token on control and start the agent with it", .0.display())]
    Expired(PathBuf),
    /// The stored node identity cannot be read.
    #[error("{} is damaged: remove it, make a new join token on control and start the agent with it", .0.display())]
    Damaged(PathBuf),
    /// The stored node identity is of another host or trust domain.
    #[error("{} holds the identity {found}, not {wanted}", path.display())]
    OtherIdentity {
        /// Which file.
        path: PathBuf,
        /// What it holds.
        found: SpiffeId,
        /// What is configured.
        wanted: SpiffeId,
    },
    /// The bundle given for joining is not one.
    #[error("the bundle given for joining holds no certificate authority")]
    BootstrapBundle(#[source] Option<BundleError>),
    /// Control did not answer in time.
    #[error("control at {address} could not be reached: {reason}")]
    Unreachable {
        /// Where.
        address: SocketAddr,
        /// The last attempt's reason.
        reason: String,
    },
    /// Control refused the join token.
    #[error("control refused to let this host join: {0}")]
    Refused(String),
    /// Control's answer is no identity.
    #[error("control gave an unusable node identity")]
    Svid(#[from] SvidError),
    /// No key.
    #[error("no key could be made")]
    Key(#[source] rcgen::Error),
    /// TLS.
    #[error("TLS could not be configured")]
    Tls(#[source] rustls::Error),
    /// The process is stopping.
    #[error("the process is stopping")]
    Stopping,
}

/// A running agent. Its tasks belong to the scope it was started in and end with it.
#[derive(Debug)]
pub struct Agent {
    id: SpiffeId,
    socket: PathBuf,
    node: IdentitySource,
}

impl Agent {
    /// Binds the socket (which answers `Unavailable` from then on), gets the node identity, from disk or
    /// by joining, and starts serving.
    ///
    /// # Errors
    /// [`AgentError`]. After an error the caller drains `scope`, in which the socket may be served already.
    pub async fn start(
        config: AgentConfig,
        clock: SharedClock,
        random: SharedRandom,
        scope: &Scope,
    ) -> Result<Self, AgentError> {
        let id = entry::agent_id(&config.trust_domain, &config.host)
            .filter(|_| entry::is_host(&config.trust_domain, &config.host))
            .ok_or_else(|| AgentError::Host(config.host.clone()))?;
        let control =
            entry::control_id(&config.trust_domain).ok_or_else(|| AgentError::Host(config.host.clone()))?;
        state::private_directory(&config.state)?;
        let directory = config
            .socket
            .parent()
            .filter(|directory| !directory.as_os_str().is_empty())
            .ok_or_else(|| AgentError::SocketPath(config.socket.clone()))?;
        state::public_directory(directory)?;
        let listener = socket::bind(&config.socket, config.socket_mode)?;

        let (view_sender, view) = watch::channel(None);
        let (svid_sender, svids) = watch::channel(Arc::default());
        let log = DecisionLog::start(&config.state, scope);
        let (queue, endpoints) = (Arc::new(Queue::new(Some(log))), Endpoints::default());
        let (policies, relations) = (Policies::default(), Relations::new(Arc::clone(&clock)));
        let attestor = Attestor::new(Arc::new(LinuxProcesses));
        let local = workload::Local {
            trust_domain: config.trust_domain.clone(),
            view: view.clone(),
            svids,
            queue: Arc::clone(&queue),
            endpoints: endpoints.clone(),
            policies: policies.clone(),
            relations: relations.clone(),
            redactor: config.redactor.clone(),
            refusals: Arc::new(Refusals::new(
                config.refusals.clone(),
                id.clone(),
                Arc::clone(&queue),
                Arc::clone(&clock),
            )),
            clock: Arc::clone(&clock),
            scope: scope.clone(),
        };
        let connections = workload::accept(listener, attestor, Arc::clone(&clock), scope);
        scope.spawn_critical("workload API", workload::serve(local, connections, config.socket.clone()));

        let node = Arc::new(Node::open(&config, &id, &control, &clock, &random, scope).await?);
        let upstream = Arc::new(
            Upstream::new(config.control, node.source(), control, Arc::clone(&clock))
                .map_err(AgentError::Tls)?,
        );
        relations.reach(Arc::clone(&upstream));
        scope.spawn_critical(
            "node identity",
            node::keep(Arc::clone(&node), Arc::clone(&upstream), Arc::clone(&random), scope.clone()),
        );
        scope.spawn_critical(
            "stream from control",
            upstream::follow(
                Arc::clone(&upstream),
                Arc::clone(&node),
                view_sender,
                config.trust_domain.clone(),
                Arc::clone(&random),
                scope.clone(),
            ),
        );
        scope.spawn_critical(
            "SVID rotation",
            rotation::keep(
                Arc::clone(&upstream) as Arc<dyn rotation::Signer>,
                view,
                svid_sender,
                Arc::clone(&clock),
                Arc::clone(&random),
                scope.clone(),
            ),
        );
        scope.spawn_critical(
            "endpoints",
            endpoints::exchange(endpoints, Arc::clone(&upstream), Arc::clone(&random), scope.clone()),
        );
        scope.spawn_critical(
            "policies",
            policies::exchange(policies::Exchange {
                policies,
                upstream: Arc::clone(&upstream),
                source: node.source(),
                trust_domain: config.trust_domain.clone(),
                state: config.state.clone(),
                random: Arc::clone(&random),
                scope: scope.clone(),
            }),
        );
        scope.spawn_critical("decisions", decisions::forward(queue, upstream, clock, random, scope.clone()));
        tracing::info!(%id, socket = %config.socket.display(), "agent serves");
        Ok(Self { id, socket: config.socket, node: node.source() })
    }

    /// The agent's own SPIFFE ID.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Where workloads connect.
    pub fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// The node identity, renewed by itself.
    pub fn identity(&self) -> IdentitySource {
        self.node.clone()
    }
}
