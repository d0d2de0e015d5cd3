//! `payments`: takes orders to move money, journals each, and has `accounts` move it.

mod journal;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::HeaderMap;
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use tokio_util::task::TaskTracker;

use crate::call::{Answer, CallError, Sidecar, Trace};
use crate::wire::{
    Account, EntitiesAnswer, EntitiesQuestion, IDEMPOTENCY_KEY, JournalTotals, JsonBody, Refusal, Transfer,
    TransferId, TransferMade, TransferOrder, USER,
};
use crate::{BankError, serve, state};
use journal::{Begun, Journal, JournalError, Outcome};

/// `accounts` commits to disk within milliseconds; two tries of this stay under what `web` waits.
const CALL_SECONDS_MAX: u64 = 4;
const DATABASE_FILE: &str = "payments.redb";
/// A UUID has 36; the bound keeps what is hashed and logged small.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 128;
/// 128 bits: nobody meets another's id by chance.
const TRANSFER_ID_BYTES: usize = 16;

/// What `payments` is given.
#[derive(Debug)]
pub struct PaymentsConfig {
    /// Where it serves; only its sidecar should reach it.
    pub listener: std::net::TcpListener,
    /// Its directory, made if missing with mode 0700; holds `payments.redb`.
    pub state: PathBuf,
    /// The outbound port of its sidecar for `accounts`.
    pub accounts: SocketAddr,
}

/// Serves until `shutdown` completes, then finishes the transfers under way.
///
/// # Errors
///
/// If the listener, the state directory or the journal in it cannot be used.
pub async fn run(config: PaymentsConfig, shutdown: impl Future<Output = ()>) -> Result<(), BankError> {
    let directory = config.state;
    let opened = tokio::task::spawn_blocking(move || {
        let database = state::open(&directory, DATABASE_FILE)?;
        let journal = Journal::open(database).map_err(|error| match error {
            JournalError::Store(error) => BankError::Store(error),
            error => BankError::Corrupt(error.to_string()),
        })?;
        let unresolved = journal.totals().map(|totals| totals.unresolved).unwrap_or_default();
        if unresolved > 0 {
            tracing::warn!(unresolved, "the journal holds transfers whose outcome is not known");
        }
        Ok(journal)
    });
    let journal = opened.await.map_err(|panic| BankError::Corrupt(panic.to_string()))??;
    let desk = Desk {
        journal: Arc::new(journal),
        accounts: Sidecar::new("accounts", config.accounts, Duration::from_secs(CALL_SECONDS_MAX)),
        under_way: TaskTracker::new(),
    };
    let under_way = desk.under_way.clone();
    serve::run(config.listener, router(desk), shutdown).await?;
    under_way.close();
    // Bounded: each asks `accounts` at most twice, for CALL_SECONDS_MAX each.
    under_way.wait().await;
    Ok(())
}

#[derive(Debug, Clone)]
struct Desk {
    journal: Arc<Journal>,
    accounts: Sidecar,
    under_way: TaskTracker,
}

fn router(desk: Desk) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/transfers", post(transfer))
        .route("/journal/totals", get(totals))
        .route("/.well-known/palisade/entities", post(entities))
        .with_state(desk)
}

/// Makes a transfer for the person asking: 201, or 200 if it was made before under the same
/// `Idempotency-Key`. A refusal of `accounts`, or of a sidecar on the way, is passed on as it came.
async fn transfer(
    State(desk): State<Desk>,
    trace: Trace,
    headers: HeaderMap,
    JsonBody(order): JsonBody<TransferOrder>,
) -> Result<Response, Refusal> {
    let id = transfer_id(&headers)?;
    // In a task of its own: whoever asked may hang up, and an attempt that has begun must be ended.
    let made = desk.under_way.clone().spawn(async move { desk.make(id, order, trace).await });
    match made.await {
        Ok(answer) => answer,
        Err(panic) => Err(Refusal::internal(&panic)),
    }
}

/// For the backend: what the journal adds up to.
async fn totals(State(desk): State<Desk>) -> Result<Json<JournalTotals>, Refusal> {
    desk.journal(|journal| journal.totals()).await.map(Json)
}

/// What our sidecar asks before it lets an unsafe request through. Accounts are not ours: the person
/// asking is asked for along the way, so what they may not see is left out.
async fn entities(
    State(desk): State<Desk>,
    trace: Trace,
    JsonBody(question): JsonBody<EntitiesQuestion>,
) -> Result<Json<EntitiesAnswer>, Refusal> {
    let mut found = Vec::new();
    for id in question.accounts()? {
        let answer = desk.accounts.get(&format!("/accounts/{id}"), &trace).await?;
        match answer.status {
            StatusCode::OK => found.push((id, answer.json::<Account>()?.owner)),
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => {}
            status => {
                return Err(Refusal::new(
                    StatusCode::BAD_GATEWAY,
                    "upstream",
                    format!("accounts answered with status {status}"),
                ));
            }
        }
    }
    Ok(Json(found.into_iter().collect()))
}

impl Desk {
    async fn make(&self, id: TransferId, order: TransferOrder, trace: Trace) -> Result<Response, Refusal> {
        let body = Transfer {
            id: id.clone(),
            from: order.from.clone(),
            to: order.to.clone(),
            amount_cents: order.amount_cents,
            memo: order.memo.clone(),
        };
        let body = serde_json::to_vec(&body).map_err(|error| Refusal::internal(&error))?;

        let begun = {
            let id = id.clone();
            self.journal(move |journal| journal.begin(&id, &order, state::now_s())).await?
        };
        match begun {
            Begun::MadeBefore => return Ok((StatusCode::OK, Json(TransferMade { id })).into_response()),
            Begun::Ask => {}
        }

        let answer = self.accounts.post("/transfers", &trace, Bytes::from(body), None).await;
        let outcome = outcome(&answer);
        {
            let id = id.clone();
            self.journal(move |journal| journal.end(&id, outcome)).await?;
        }
        match (outcome, answer) {
            (Outcome::Made, _) => Ok((StatusCode::CREATED, Json(TransferMade { id })).into_response()),
            (Outcome::Refused, Ok(answer)) => Ok(answer.into_response()),
            (_, answer) => {
                let (status, why) = match answer {
                    Ok(answer) => {
                        (StatusCode::BAD_GATEWAY, format!("accounts answered with status {}", answer.status))
                    }
                    Err(error) => (error.status(), error.to_string()),
                };
                tracing::warn!(transfer = %id, why, "the outcome of a transfer is not known");
                Err(Refusal::new(
                    status,
                    "unresolved",
                    format!("{why}; the transfer was made once or not at all: repeat it under the same key"),
                ))
            }
        }
    }

    async fn journal<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Journal) -> Result<T, JournalError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let journal = Arc::clone(&self.journal);
        match tokio::task::spawn_blocking(move || work(&journal)).await {
            Ok(outcome) => outcome.map_err(Refusal::from),
            Err(panic) => Err(Refusal::internal(&panic)),
        }
    }
}

impl From<JournalError> for Refusal {
    fn from(error: JournalError) -> Self {
        let code = match &error {
            JournalError::KeyInUse => "key_in_use",
            JournalError::InFlight => "in_flight",
            JournalError::Unknown(_) | JournalError::Row(_) | JournalError::Store(_) => {
                return Refusal::internal(&error);
            }
        };
        Refusal::new(StatusCode::CONFLICT, code, error.to_string())
    }
}

/// What an answer says about the money. Only a status that says "I did not do this" counts as a
/// refusal; a 5xx or a timeout may come after the money moved.
fn outcome(answer: &Result<Answer, CallError>) -> Outcome {
    match answer {
        Ok(answer) if answer.status.is_success() => Outcome::Made,
        Ok(answer) if answer.status == StatusCode::REQUEST_TIMEOUT => Outcome::Unresolved,
        Ok(answer) if answer.status.is_client_error() => Outcome::Refused,
        Ok(_) | Err(_) => Outcome::Unresolved,
    }
}

/// The id that `accounts` will move money under, at most once: made from the person and their
/// `Idempotency-Key`, so that a repeat of the order has the same one and nobody meets another's; or
/// random where no key is given.
fn transfer_id(headers: &HeaderMap) -> Result<TransferId, Refusal> {
    let mut id = [0; TRANSFER_ID_BYTES];
    match headers.get(IDEMPOTENCY_KEY) {
        Some(key) if key.is_empty() || key.len() > IDEMPOTENCY_KEY_BYTES_MAX => {
            return Err(Refusal::malformed(format!(
                "an Idempotency-Key is 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes"
            )));
        }
        Some(key) => {
            let user = headers.get(USER).map(|user| user.as_bytes()).unwrap_or_default();
            let mut hash = digest::Context::new(&digest::SHA256);
            hash.update(b"bank payments transfer id v1\0");
            hash.update(digest::digest(&digest::SHA256, user).as_ref());
            hash.update(key.as_bytes());
            for (to, from) in id.iter_mut().zip(hash.finish().as_ref()) {
                *to = *from;
            }
        }
        None => SystemRandom::new().fill(&mut id).map_err(|_| Refusal::internal(&BankError::Randomness))?,
    }
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    TransferId::try_from(hex).map_err(Refusal::from)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn headers(user: Option<&'static str>, key: Option<&'static str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(user) = user {
            headers.insert(USER, HeaderValue::from_static(user));
        }
        if let Some(key) = key {
            headers.insert(IDEMPOTENCY_KEY, HeaderValue::from_static(key));
        }
        headers
    }

    #[test]
    fn a_key_gives_one_id_for_one_person() {
        let id = |user, key| transfer_id(&headers(user, key)).unwrap();
        assert_eq!(id(Some("alice"), Some("k1")), id(Some("alice"), Some("k1")));
        assert_ne!(id(Some("alice"), Some("k1")), id(Some("alice"), Some("k2")));
        assert_ne!(id(Some("alice"), Some("k1")), id(Some("bob"), Some("k1")));
        assert_ne!(id(Some("alicek"), Some("1")), id(Some("alice"), Some("k1")));
        assert_ne!(id(Some("alice"), None), id(Some("alice"), None));
        assert!(transfer_id(&headers(None, Some(""))).is_err());
    }
}
