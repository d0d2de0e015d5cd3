//! The vault without its network: made once, sealed and unsealed many times.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use identity::clock::SharedClock;
use secrecy::SecretString;
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use crate::audit::{Audit, AuditError, CHECKPOINT_INTERVAL_ENTRIES, Head, Redactor};
use crate::barrier::{Barrier, BarrierError, Change, KEYRING_PATH, Key, Keyring};
use crate::kv::Kv;
use crate::random::{self, RandomError, SharedRandom};
use crate::seal::{self, Progress, SEAL_PATH, SealConfig, SealError, Share};
use crate::stamp::Stamp;
use crate::storage::{Op, RedbStorage, Storage, StorageError};
use crate::token::{self, Issued, NewToken, Token, TokenError};

const AUDIT_HEAD_PATH: &str = "core/audit-head";

/// Why the vault cannot be opened, made, sealed or unsealed.
#[derive(Debug, Error)]
pub enum CoreError {
    /// `init` on a vault that has been made already.
    #[error("Vault is already initialized")]
    AlreadyInitialized,
    /// `unseal` on a vault that has not been made.
    #[error("Vault is not initialized")]
    NotInitialized,
    /// The seal says no.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The barrier says no.
    #[error(transparent)]
    Barrier(#[from] BarrierError),
    /// A token cannot be made or read.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The audit file cannot be used.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The store cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
}

/// What `init` gives out, once.
pub(crate) struct Init {
    /// The shares of the unseal key.
    pub(crate) shares: Vec<Share>,
    /// The first root token.
    pub(crate) root_token: SecretString,
}

impl fmt::Debug for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Init").field("shares", &self.shares.len()).finish_non_exhaustive()
    }
}

/// What `seal-status` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealStatus {
    /// Whether the vault has been made.
    pub initialized: bool,
    /// Whether it has no keys in memory.
    pub sealed: bool,
    /// Shares needed; 0 if not initialised.
    pub threshold: u8,
    /// Shares given out; 0 if not initialised.
    pub shares: u8,
    /// Shares given so far in this attempt.
    pub progress: usize,
    /// Names this attempt.
    pub nonce: String,
    /// Names the vault.
    pub cluster_id: Option<String>,
}

#[derive(Default)]
struct Seal {
    config: Option<SealConfig>,
    progress: Progress,
}

/// Storage, barrier, engine, tokens and audit of one vault.
pub(crate) struct Core {
    pub(crate) barrier: Arc<Barrier>,
    pub(crate) kv: Kv,
    pub(crate) audit: Audit,
    pub(crate) clock: SharedClock,
    pub(crate) random: SharedRandom,
    seal: Mutex<Seal>,
    initialized: AtomicBool,
    /// One at a time, so that a token is never made by a maker that is just being revoked.
    token_changes: Mutex<()>,
}

impl Core {
    /// Opens the state directory and the audit file. The vault is sealed.
    pub(crate) async fn open(
        state: &Path,
        audit: &Path,
        clock: SharedClock,
        random: SharedRandom,
    ) -> Result<Self, CoreError> {
        let storage: Arc<dyn Storage> = Arc::new(RedbStorage::open(state)?);
        let audit = Audit::open(audit)?;
        let config = storage.get(SEAL_PATH).await?;
        let config = config.map(|bytes| SealConfig::from_bytes(&bytes)).transpose()?;
        let barrier = Arc::new(Barrier::new(storage, random.clone()));
        Ok(Self {
            kv: Kv::new(Arc::clone(&barrier)),
            barrier,
            audit,
            clock,
            random,
            initialized: AtomicBool::new(config.is_some()),
            seal: Mutex::new(Seal { config, progress: Progress::default() }),
            token_changes: Mutex::new(()),
        })
    }

    pub(crate) fn now(&self) -> Duration {
        self.clock.now()
    }

    pub(crate) fn is_initialized(&self) -> bool {
        self.initialized.load(Ordering::Acquire)
    }

    pub(crate) fn is_sealed(&self) -> bool {
        self.barrier.is_sealed()
    }

    /// Makes the vault: root key, keyring and first token, in one transaction. It stays sealed.
    pub(crate) async fn init(&self, shares: u8, threshold: u8) -> Result<Init, CoreError> {
        let mut seal = self.seal.lock().await;
        if seal.config.is_some() {
            return Err(CoreError::AlreadyInitialized);
        }
        let root_key: Key = random::secret(self.random.as_ref())?;
        let (config, shares) = SealConfig::create(shares, threshold, &root_key, &self.random)?;
        let keyring = Keyring::generate(&self.random)?;
        let (issued, change) = token::issue(&keyring, NewToken::first_root(), self.now(), &self.random)?;
        let mut ops = vec![
            Op::Put { path: SEAL_PATH.to_owned(), record: config.to_bytes()? },
            Op::Put { path: KEYRING_PATH.to_owned(), record: keyring.wrap(&root_key, &self.random)? },
        ];
        if let Change::Put { path, plaintext } = change {
            let record = keyring.seal(&path, &plaintext, &self.random)?;
            ops.push(Op::Put { path, record });
        }
        self.barrier.storage().transaction(ops).await?;
        seal.config = Some(config);
        self.initialized.store(true, Ordering::Release);
        Ok(Init { shares, root_token: issued.secret })
    }

    /// Takes one share; unseals once there are enough. Wrong sets of shares are forgotten.
    pub(crate) async fn unseal(&self, share: &SecretString) -> Result<SealStatus, CoreError> {
        let mut seal = self.seal.lock().await;
        let seal = &mut *seal;
        let config = seal.config.as_ref().ok_or(CoreError::NotInitialized)?;
        if self.is_sealed() {
            let share = seal::parse_share(share, config)?;
            if let Some(shares) = seal.progress.add(share, config, &self.random)? {
                let root_key = config.root_key(&shares)?;
                self.open_barrier(&root_key).await?;
            }
        }
        Ok(self.status_of(seal))
    }

    /// Forgets the shares given so far.
    pub(crate) async fn reset_unseal(&self) -> Result<SealStatus, CoreError> {
        let mut seal = self.seal.lock().await;
        if seal.config.is_none() {
            return Err(CoreError::NotInitialized);
        }
        seal.progress = Progress::default();
        Ok(self.status_of(&seal))
    }

    /// Forgets the keys. What is under way finishes, nothing new begins.
    pub(crate) async fn seal(&self) {
        let _turn = self.seal.lock().await;
        if self.is_sealed() {
            return;
        }
        self.note_audit_head().await;
        self.barrier.seal();
        self.audit.set_redactor(None);
    }

    pub(crate) async fn seal_status(&self) -> SealStatus {
        self.status_of(&*self.seal.lock().await)
    }

    /// Writes one audit line and, every so many, notes the head behind the barrier.
    pub(crate) async fn audit(&self, entry: &Map<String, Value>) -> Result<(), AuditError> {
        let head = self.audit.write(entry)?;
        if head.seq.is_multiple_of(CHECKPOINT_INTERVAL_ENTRIES) {
            self.note_audit_head().await;
        }
        Ok(())
    }

    /// Looks up the token that a request carries.
    pub(crate) async fn token(&self, secret: &SecretString) -> Result<Token, TokenError> {
        token::lookup(&self.barrier, secret, self.now()).await
    }

    /// Makes and stores a token. Its maker, if it has one, is still good when it is stored.
    pub(crate) async fn issue(
        &self,
        new: NewToken<'_>,
        maker: Option<&SecretString>,
    ) -> Result<Issued, TokenError> {
        let _turn = self.token_changes.lock().await;
        if let Some(maker) = maker {
            self.token(maker).await?;
        }
        let (issued, change) = token::issue(self.barrier.keyring()?.as_ref(), new, self.now(), &self.random)?;
        self.barrier.transaction(vec![change]).await?;
        Ok(issued)
    }

    pub(crate) async fn revoke(&self, token: &Token) -> Result<(), TokenError> {
        let _turn = self.token_changes.lock().await;
        token::revoke(&self.barrier, token).await
    }

    /// Removes expired tokens; does nothing while sealed.
    pub(crate) async fn sweep(&self) -> Result<usize, TokenError> {
        if self.is_sealed() {
            return Ok(0);
        }
        let _turn = self.token_changes.lock().await;
        token::sweep(&self.barrier, self.now()).await
    }

    fn status_of(&self, seal: &Seal) -> SealStatus {
        let config = seal.config.as_ref();
        SealStatus {
            initialized: config.is_some(),
            sealed: self.is_sealed(),
            threshold: config.map_or(0, |config| config.threshold),
            shares: config.map_or(0, |config| config.shares),
            progress: seal.progress.count(),
            nonce: seal.progress.nonce().to_owned(),
            cluster_id: config.map(|config| config.cluster_id.clone()),
        }
    }

    /// The caller holds the seal's lock.
    async fn open_barrier(&self, root_key: &Key) -> Result<(), CoreError> {
        self.barrier.unseal(root_key).await?;
        self.audit.set_redactor(Some(Redactor::new(self.barrier.keyring()?.as_ref())));
        if let Err(error) = self.check_audit_head().await {
            // Half open is not open.
            self.barrier.seal();
            self.audit.set_redactor(None);
            return Err(error);
        }
        Ok(())
    }

    /// Compares the audit file with the head noted behind the barrier. A file that ends before it was cut
    /// off, replaced, or moved away by a log rotation: that is said in the new file and the log, and the
    /// vault serves on, since only a person can tell which it was.
    async fn check_audit_head(&self) -> Result<(), CoreError> {
        let Some(noted) = self.barrier.get(AUDIT_HEAD_PATH).await? else { return Ok(()) };
        let Ok(noted) = serde_json::from_slice::<Head>(&noted) else {
            return Err(BarrierError::Corrupt { path: AUDIT_HEAD_PATH.to_owned() }.into());
        };
        let head = self.audit.head();
        if head.seq > noted.seq || head == noted {
            return Ok(());
        }
        tracing::error!(
            noted = noted.seq,
            found = head.seq,
            "the audit file was cut off, replaced or moved away"
        );
        let entry = Map::from_iter([
            ("time".to_owned(), Value::String(Stamp::new(self.now()).text())),
            ("type".to_owned(), json!("chain-break")),
            ("noted".to_owned(), json!(noted)),
        ]);
        self.audit.write(&entry)?;
        Ok(())
    }

    async fn note_audit_head(&self) {
        let head = self.audit.head();
        tracing::info!(seq = head.seq, hash = head.hash, "audit head");
        let Ok(plaintext) = serde_json::to_vec(&head) else { return };
        let change = Change::Put { path: AUDIT_HEAD_PATH.to_owned(), plaintext: Zeroizing::new(plaintext) };
        // Sealed meanwhile, or the store fails: the lines themselves are written, so requests go on.
        if let Err(error) = self.barrier.transaction(vec![change]).await
            && !matches!(error, BarrierError::Sealed)
        {
            tracing::error!(%error, "the audit head could not be noted");
        }
    }
}
