//! A vault on its listeners.

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use identity::clock::SharedClock;
use identity::tls::{self, ALPN_H2, ALPN_HTTP11, ClientAuth};
use identity::{IdentitySource, Scope};
use secrecy::SecretString;
use thiserror::Error;
use tokio_rustls::TlsAcceptor;

use crate::authorize::Authorizer;
use crate::core::{Core, CoreError, SealStatus};
use crate::http::{self, Service};
use crate::random::SharedRandom;

/// The service whose policy decides about secrets.
pub const POLICY_SERVICE: &str = "vault";
/// How often expired tokens are removed. They are dead anyway; this only frees their place.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// What a vault needs to run.
pub struct VaultConfig {
    /// Directory of `vault.redb`; made 0700 if missing, refused if others may enter it.
    pub state: PathBuf,
    /// The mesh listener, bound already: mutual TLS, for workloads.
    pub listen: TcpListener,
    /// The operator's listener, bound already: plain HTTP, so on a loopback address or refused.
    pub operator: Option<TcpListener>,
    /// The audit file; made 0600 if missing, refused if others may read it.
    pub audit: PathBuf,
    /// The one share (hexadecimal or base64) of a vault made with one share: it is unsealed at start.
    pub unseal_key: Option<SecretString>,
}

impl fmt::Debug for VaultConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VaultConfig")
            .field("state", &self.state)
            .field("audit", &self.audit)
            .field("unseals_itself", &self.unseal_key.is_some())
            .finish_non_exhaustive()
    }
}

/// Why a vault does not start. Nothing is left half started.
#[derive(Debug, Error)]
pub enum VaultError {
    /// The operator's listener is reachable from other machines.
    #[error("the operator's listener is on {0}; without TLS it must be on a loopback address such as 127.0.0.1")]
    OperatorAddress(SocketAddr),
    /// A listener cannot be used.
    #[error("a listener cannot be used")]
    Listener(#[source] std::io::Error),
    /// The TLS configuration cannot be made.
    #[error("the vault's TLS configuration cannot be made")]
    Tls(#[source] rustls::Error),
    /// There is no policy for the vault: nobody could be permitted anything.
    #[error("there is no policy for the service \"{POLICY_SERVICE}\"; add services/{POLICY_SERVICE} to the policies")]
    NoPolicy,
    /// State, audit file or seal.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// The unseal key at hand does not open this vault.
    #[error("the vault cannot be unsealed with the key it was started with")]
    Unseal(#[source] CoreError),
    /// One key at hand, several needed.
    #[error("the vault needs {needed} shares to unseal; it cannot unseal itself with one")]
    UnsealShares {
        /// How many shares are needed.
        needed: u8,
    },
}

/// A running vault. It ends with the scope that it was started in.
pub struct Vault {
    core: Arc<Core>,
    listen: SocketAddr,
    operator: Option<SocketAddr>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("listen", &self.listen).field("operator", &self.operator).finish_non_exhaustive()
    }
}

impl Vault {
    /// Opens the state, unseals if it has the key, and serves until `scope` drains; then requests under way
    /// finish and the vault seals itself. [`Vault::start`] is this with Cedar policies as the judge.
    ///
    /// # Errors
    /// A state directory or audit file that cannot be used or is open to others, an operator's listener off
    /// loopback, an unseal key that does not fit.
    pub async fn start_with(
        config: VaultConfig,
        source: IdentitySource,
        authorizer: Arc<dyn Authorizer>,
        clock: SharedClock,
        random: SharedRandom,
        scope: &Scope,
    ) -> Result<Self, VaultError> {
        if let Some(operator) = &config.operator {
            let address = operator.local_addr().map_err(VaultError::Listener)?;
            if !address.ip().is_loopback() {
                return Err(VaultError::OperatorAddress(address));
            }
        }
        let tls = tls::server_config(&source, ClientAuth::Required, &[ALPN_H2, ALPN_HTTP11], &clock)
            .map_err(VaultError::Tls)?;
        let mesh = asynchronous(config.listen)?;
        let operator = config.operator.map(asynchronous).transpose()?;
        let core = Arc::new(Core::open(&config.state, &config.audit, clock, random).await?);
        if let Some(key) = &config.unseal_key {
            unseal_at_start(&core, key).await?;
        }

        let listen = mesh.local_addr().map_err(VaultError::Listener)?;
        let operator_address =
            operator.as_ref().map(tokio::net::TcpListener::local_addr).transpose().map_err(VaultError::Listener)?;
        let service = Arc::new(Service { core: Arc::clone(&core), authorizer, scope: scope.clone() });
        let serving = {
            let service = Arc::clone(&service);
            async move {
                let mesh = http::listen(Arc::clone(&service), mesh, Some(TlsAcceptor::from(tls)));
                match operator {
                    Some(operator) => {
                        futures::future::join(mesh, http::listen(Arc::clone(&service), operator, None)).await;
                    }
                    None => mesh.await,
                }
                service.core.seal().await;
            }
        };
        scope.spawn_critical("vault listeners", serving);
        scope.spawn_critical("vault token sweep", sweep(Arc::clone(&core), scope.clone()));
        Ok(Self { core, listen, operator: operator_address })
    }

    /// The mesh listener's address.
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    /// The operator's listener's address.
    pub fn operator_address(&self) -> Option<SocketAddr> {
        self.operator
    }

    /// Whether the vault has been made, is sealed, and how far an unsealing is.
    pub async fn status(&self) -> SealStatus {
        self.core.seal_status().await
    }

    /// Seals the vault: the keys are wiped from memory, requests are refused with 503.
    pub async fn seal(&self) {
        self.core.seal().await;
    }
}

fn asynchronous(listener: TcpListener) -> Result<tokio::net::TcpListener, VaultError> {
    listener.set_nonblocking(true).map_err(VaultError::Listener)?;
    tokio::net::TcpListener::from_std(listener).map_err(VaultError::Listener)
}

async fn unseal_at_start(core: &Core, key: &SecretString) -> Result<(), VaultError> {
    let status = core.seal_status().await;
    if !status.initialized {
        tracing::warn!("the vault was given an unseal key but has not been initialised yet");
        return Ok(());
    }
    if status.threshold > 1 {
        return Err(VaultError::UnsealShares { needed: status.threshold });
    }
    core.unseal(key).await.map(drop).map_err(VaultError::Unseal)
}

async fn sweep(core: Arc<Core>, scope: Scope) {
    loop {
        let pause = core.clock.sleep(SWEEP_INTERVAL);
        if let futures::future::Either::Right(_) =
            futures::future::select(pause, std::pin::pin!(scope.draining())).await
        {
            return;
        }
        match core.sweep().await {
            Ok(0) => {}
            Ok(count) => tracing::debug!(count, "removed expired tokens"),
            Err(error) => tracing::warn!(cause = http::chain(&error), "expired tokens could not be removed"),
        }
    }
}
