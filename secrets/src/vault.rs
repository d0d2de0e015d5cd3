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
use crate::cedar::CedarAuthorizer;
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
    #[error(
        "the operator's listener is on {0}; without TLS it must be on a loopback address such as 127.0.0.1"
    )]
    OperatorAddress(SocketAddr),
    /// A listener cannot be used.
    #[error("a listener cannot be used")]
    Listener(#[source] std::io::Error),
    /// The TLS configuration cannot be made.
    #[error("the vault's TLS configuration cannot be made")]
    Tls(#[source] rustls::Error),
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
        f.debug_struct("Vault")
            .field("listen", &self.listen)
            .field("operator", &self.operator)
            .finish_non_exhaustive()
    }
}

impl Vault {
    /// [`Vault::start_with`] with the Cedar policies of the service [`POLICY_SERVICE`] as the judge; every
    /// decision goes to `recorder`.
    ///
    /// # Errors
    /// What [`Vault::start_with`] says.
    pub async fn start(
        config: VaultConfig,
        source: IdentitySource,
        policy: policy::InForce,
        recorder: Arc<dyn policy::Recorder>,
        clock: SharedClock,
        random: SharedRandom,
        scope: &Scope,
    ) -> Result<Self, VaultError> {
        let authorizer = Arc::new(CedarAuthorizer::new(policy, recorder, random.clone()));
        Self::start_with(config, source, authorizer, clock, random, scope).await
    }

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
        let operator_address = operator
            .as_ref()
            .map(tokio::net::TcpListener::local_addr)
            .transpose()
            .map_err(VaultError::Listener)?;
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

#[cfg(test)]
mod tests {
    use identity::testing::TestAuthority;
    use serde_json::json;

    use super::*;
    use crate::audit;
    use crate::authorize::{AccessRequest, Denial, Grant};
    use crate::barrier::tests::random;
    use crate::client::{Client, ClientError};
    use crate::path::SecretPath;

    struct Nobody;

    impl Authorizer for Nobody {
        fn may(&self, _request: &AccessRequest<'_>) -> Result<Grant, Denial> {
            Err(Denial { receipt: None })
        }
    }

    fn listener(address: &str) -> TcpListener {
        TcpListener::bind(address).unwrap()
    }

    async fn start(directory: &std::path::Path, operator: TcpListener) -> Result<(Vault, Scope), VaultError> {
        let scope = Scope::new();
        let config = VaultConfig {
            state: directory.join("state"),
            listen: listener("127.0.0.1:0"),
            operator: Some(operator),
            audit: directory.join("audit.jsonl"),
            unseal_key: None,
        };
        let source = TestAuthority::new("bank.example").source("/palisade/vault");
        let clock = identity::SystemClock::shared();
        let vault = Vault::start_with(config, source, Arc::new(Nobody), clock, random(), &scope).await?;
        Ok((vault, scope))
    }

    #[tokio::test]
    async fn an_operators_listener_off_loopback_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let error = start(directory.path(), listener("0.0.0.0:0")).await.unwrap_err();
        assert!(matches!(error, VaultError::OperatorAddress(_)), "{error}");
        assert!(!directory.path().join("state").exists(), "nothing is half started");
    }

    /// Time stands still and jumps as soon as everybody waits: who says nothing is waited for no longer.
    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_is_closed() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let directory = tempfile::tempdir().unwrap();
        let (vault, scope) = start(directory.path(), listener("127.0.0.1:0")).await.unwrap();
        for begun in ["", "PRI * HT", "GET /v1/sys/health HTTP/1.1\r\nhost: 127.0.0.1\r\n"] {
            let mut stream = tokio::net::TcpStream::connect(vault.operator_address().unwrap()).await.unwrap();
            stream.write_all(begun.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            assert!(!answer.starts_with(b"HTTP/1.1 200"), "{begun:?}");
        }
        // Not even a handshake.
        let mut stream = tokio::net::TcpStream::connect(vault.address()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.is_empty());
        scope.drain();
        scope.finished(Duration::from_secs(10)).await.unwrap();
    }

    #[tokio::test]
    async fn security_37_no_audit_no_answer_and_health_says_so_until_it_heals() {
        let directory = tempfile::tempdir().unwrap();
        let (vault, scope) = start(directory.path(), listener("127.0.0.1:0")).await.unwrap();
        let client = Client::new(vault.operator_address().unwrap()).unwrap();
        let keys = client.init(1, 1).await.unwrap();
        client.unseal(&keys.shares[0]).await.unwrap();
        let client = client.with_token(keys.root_token);
        let path = SecretPath::new("a").unwrap();
        client.kv_put(&path, &json!({"v": 1}), None).await.unwrap();
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let good = vault.core.audit.swap_file(full);
        let refused = |outcome: Result<(), ClientError>| match outcome {
            Err(ClientError::Refused { status, .. }) => status.as_u16(),
            other => panic!("not refused: {other:?}"),
        };
        assert_eq!(refused(client.kv_get(&path).await.map(drop)), 503);
        assert_eq!(refused(client.kv_put(&path, &json!({"v": 2}), None).await.map(drop)), 503);
        assert_eq!(refused(client.health().await.map(drop)), 503);
        vault.core.audit.swap_file(good);
        assert!(client.health().await.is_ok());
        assert_eq!(client.kv_get(&path).await.unwrap().unwrap().version, 1, "the refused write did nothing");
        scope.drain();
        scope.finished(Duration::from_secs(10)).await.unwrap();
        let file = directory.path().join("audit.jsonl");
        assert_eq!(audit::verify_file(&file, None).unwrap(), vault.core.audit.head());
    }

    #[tokio::test]
    async fn an_audit_file_that_was_cut_is_noticed_at_the_next_unsealing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("audit.jsonl");
        let (vault, scope) = start(directory.path(), listener("127.0.0.1:0")).await.unwrap();
        let client = Client::new(vault.operator_address().unwrap()).unwrap();
        let keys = client.init(1, 1).await.unwrap();
        client.unseal(&keys.shares[0]).await.unwrap();
        for n in 0..3 {
            let path = SecretPath::new(&format!("s/{n}")).unwrap();
            client.clone().with_token(keys.root_token.clone()).kv_put(&path, &json!({}), None).await.unwrap();
        }
        scope.drain();
        scope.finished(Duration::from_secs(10)).await.unwrap();
        assert!(vault.core.is_sealed(), "a drained vault has wiped its keys");
        drop(vault);
        let text = std::fs::read_to_string(&file).unwrap();
        let kept: String = text.lines().take(2).map(|line| format!("{line}\n")).collect();
        std::fs::write(&file, kept).unwrap();
        let (vault, scope) = start(directory.path(), listener("127.0.0.1:0")).await.unwrap();
        let client = Client::new(vault.operator_address().unwrap()).unwrap();
        assert!(!client.unseal(&keys.shares[0]).await.unwrap().sealed);
        assert!(std::fs::read_to_string(&file).unwrap().contains("chain-break"));
        assert!(audit::verify_file(&file, None).is_ok());
        scope.drain();
        scope.finished(Duration::from_secs(10)).await.unwrap();
    }
}
