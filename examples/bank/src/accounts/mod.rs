//! `accounts`: who owns which account, what is on it, and what went in and out.
//!
//! The service listens at once and answers 503 until the vault has given it the key that its database
//! is sealed under.

mod key;
mod ledger;
mod reconcile;
mod seal;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::StatusCode;
use redb::Database;

use crate::call::Sidecar;
use crate::wire::{
    Account, AccountId, AccountList, EntitiesAnswer, EntitiesQuestion, History, JsonBody, Owner, Refusal,
    Transfer, TransferMade,
};
use crate::{BankError, serve, state};
use ledger::{Ledger, LedgerError, Moved};

/// The vault and `payments` answer from memory; this bounds a start against a half-dead one.
const CALL_SECONDS_MAX: u64 = 5;
const DATABASE_FILE: &str = "accounts.redb";

/// What `accounts` is given.
#[derive(Debug)]
pub struct AccountsConfig {
    /// Where it serves; only its sidecar should reach it.
    pub listener: std::net::TcpListener,
    /// Its directory, made if missing with mode 0700; holds `accounts.redb`.
    pub state: PathBuf,
    /// The outbound port of its sidecar for the vault.
    pub vault: SocketAddr,
    /// The outbound port of its sidecar for `payments`.
    pub payments: SocketAddr,
    /// How often it compares its transfers with `payments`' journal; at least 100 ms.
    pub reconcile_every: Duration,
}

/// Serves until `shutdown` completes.
///
/// A vault that is away, sealed or refuses is waited for with growing pauses, and said in the log.
///
/// # Errors
///
/// If the listener or the state directory cannot be used, or the database fails as it is opened.
pub async fn run(config: AccountsConfig, shutdown: impl Future<Output = ()>) -> Result<(), BankError> {
    let timeout = Duration::from_secs(CALL_SECONDS_MAX);
    let vault = Sidecar::new("vault", config.vault, timeout);
    let payments = Sidecar::new("payments", config.payments, timeout);
    let directory = config.state;
    let database = blocking(move || state::open(&directory, DATABASE_FILE)).await?;
    let bank = Bank::default();

    let background = async {
        let ledger = open_ledger(Arc::new(database), &vault).await?;
        let ledger = Arc::clone(bank.0.get_or_init(|| ledger));
        reconcile::run(&ledger, &payments, config.reconcile_every).await;
        Ok::<(), BankError>(())
    };
    let server = serve::run(config.listener, router(bank.clone()), shutdown);
    tokio::select! {
        biased;
        served = server => served,
        // Only an error ends it: the comparison goes on for ever.
        failed = background => failed,
    }
}

/// Asks for the key until it is there and opens the database.
async fn open_ledger(database: Arc<Database>, vault: &Sidecar) -> Result<Arc<Ledger>, BankError> {
    let mut waits = key::Waits::default();
    let mut said = String::new();
    loop {
        let problem = match key::read(vault).await {
            Ok(key) => {
                let database = Arc::clone(&database);
                match tokio::task::spawn_blocking(move || Ledger::open(database, &key)).await {
                    Ok(Ok(ledger)) => {
                        tracing::info!("the database is open under the key from the vault");
                        return Ok(Arc::new(ledger));
                    }
                    // The vault's value can be put right while we wait.
                    Ok(Err(error @ LedgerError::WrongKey)) => error.to_string(),
                    Ok(Err(LedgerError::Store(error))) => return Err(BankError::Store(error)),
                    Ok(Err(error)) => return Err(BankError::Corrupt(error.to_string())),
                    Err(panic) => return Err(BankError::Corrupt(panic.to_string())),
                }
            }
            Err(error) => error.to_string(),
        };
        let wait = waits.next();
        // Once for each reason, not once for each try.
        if problem == said {
            tracing::debug!(problem, ?wait, "still no database key");
        } else {
            tracing::warn!(problem, secret = key::KEY_PATH, "no database key yet; trying on");
            said = problem;
        }
        tokio::time::sleep(wait).await;
    }
}

/// The ledger, once it is open.
#[derive(Debug, Clone, Default)]
struct Bank(Arc<OnceLock<Arc<Ledger>>>);

impl Bank {
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Ledger) -> Result<T, LedgerError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let ledger = Arc::clone(self.0.get().ok_or_else(starting)?);
        match tokio::task::spawn_blocking(move || question(&ledger)).await {
            Ok(answer) => answer.map_err(Refusal::from),
            Err(panic) => Err(Refusal::internal(&panic)),
        }
    }
}

fn starting() -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "starting", "waiting for the database key from the vault")
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BankError> + Send + 'static,
) -> Result<T, BankError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(panic) => Err(BankError::Corrupt(panic.to_string())),
    }
}

impl From<LedgerError> for Refusal {
    fn from(error: LedgerError) -> Self {
        let (status, code) = match &error {
            LedgerError::UnknownAccount(_) => (StatusCode::NOT_FOUND, "unknown_account"),
            LedgerError::SameAccount => (StatusCode::BAD_REQUEST, "same_account"),
            LedgerError::InsufficientFunds => (StatusCode::CONFLICT, "insufficient_funds"),
            LedgerError::BalanceTooLarge => (StatusCode::CONFLICT, "balance_too_large"),
            LedgerError::IdInUse => (StatusCode::CONFLICT, "id_in_use"),
            LedgerError::WrongKey
            | LedgerError::UnknownFormat
            | LedgerError::Row { .. }
            | LedgerError::Write(_)
            | LedgerError::Store(_) => return Refusal::internal(&error),
        };
        Refusal::new(status, code, error.to_string())
    }
}

fn router(bank: Bank) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/owners/{owner}/accounts", get(list))
        .route("/accounts/{id}", get(account))
        .route("/accounts/{id}/history", get(history))
        .route("/transfers", post(transfer))
        .route("/.well-known/palisade/entities", post(entities))
        .with_state(bank)
}

async fn healthz(State(bank): State<Bank>) -> Response {
    match bank.0.get() {
        Some(_) => (StatusCode::OK, "ok\n").into_response(),
        None => starting().into_response(),
    }
}

async fn list(State(bank): State<Bank>, Path(owner): Path<String>) -> Result<Json<AccountList>, Refusal> {
    let owner = Owner::try_from(owner)?;
    bank.ask(move |ledger| ledger.accounts_of(&owner)).await.map(Json)
}

async fn account(State(bank): State<Bank>, Path(id): Path<String>) -> Result<Json<Account>, Refusal> {
    let id = AccountId::try_from(id)?;
    bank.ask(move |ledger| ledger.account(&id)).await.map(Json)
}

async fn history(State(bank): State<Bank>, Path(id): Path<String>) -> Result<Json<History>, Refusal> {
    let id = AccountId::try_from(id)?;
    bank.ask(move |ledger| ledger.history(&id)).await.map(Json)
}

/// 201 for money moved now, 200 for a repeat of a transfer made before.
async fn transfer(
    State(bank): State<Bank>,
    JsonBody(transfer): JsonBody<Transfer>,
) -> Result<Response, Refusal> {
    let id = transfer.id.clone();
    let now_s = state::now_s();
    let status = match bank.ask(move |ledger| ledger.transfer(&transfer, now_s)).await? {
        Moved::Now => StatusCode::CREATED,
        Moved::Before => StatusCode::OK,
    };
    Ok((status, Json(TransferMade { id })).into_response())
}

/// What our sidecar asks before it lets an unsafe request through.
async fn entities(
    State(bank): State<Bank>,
    JsonBody(question): JsonBody<EntitiesQuestion>,
) -> Result<Json<EntitiesAnswer>, Refusal> {
    let ids = question.accounts()?;
    bank.ask(move |ledger| {
        ids.into_iter()
            .filter_map(|id| match ledger.account(&id) {
                Ok(account) => Some(Ok((id, account.owner))),
                Err(LedgerError::UnknownAccount(_)) => None,
                Err(error) => Some(Err(error)),
            })
            .collect()
    })
    .await
    .map(Json)
}
