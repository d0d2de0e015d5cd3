//! The pages' content as JSON, for programs: what `accounts` and `payments` answer, passed on.

use axum::extract::{Path, State};
use hyper::header::{HeaderMap, HeaderValue};

use super::{Bank, Person, fresh_key};
use crate::call::{Answer, Trace};
use crate::wire::{AccountId, IDEMPOTENCY_KEY, JsonBody, Refusal, TransferOrder};

/// `GET /api/accounts`.
pub(super) async fn accounts(
    State(bank): State<Bank>,
    Person(owner): Person,
    trace: Trace,
) -> Result<Answer, Refusal> {
    Ok(bank.accounts.get(&format!("/owners/{owner}/accounts"), &trace).await?)
}

/// `GET /api/accounts/{id}`.
pub(super) async fn account(
    State(bank): State<Bank>,
    Path(id): Path<String>,
    trace: Trace,
) -> Result<Answer, Refusal> {
    let id = AccountId::try_from(id)?;
    Ok(bank.accounts.get(&format!("/accounts/{id}"), &trace).await?)
}

/// `POST /api/transfers`, with an `Idempotency-Key` if the caller wants to be able to repeat it.
pub(super) async fn transfer(
    State(bank): State<Bank>,
    trace: Trace,
    headers: HeaderMap,
    JsonBody(order): JsonBody<TransferOrder>,
) -> Result<Answer, Refusal> {
    let key = match headers.get(IDEMPOTENCY_KEY) {
        Some(key) => key.clone(),
        // Even then our own repeat of a call that broke off must not move money twice.
        None => HeaderValue::from_str(&fresh_key()?).map_err(|error| Refusal::internal(&error))?,
    };
    bank.transfer(&order, key, &trace).await
}
