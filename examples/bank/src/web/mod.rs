//! `web`: the bank's pages, and the same as JSON under `/api`.
//!
//! It keeps nothing and decides nothing: every page is made of answers from `accounts` and `payments`
//! on behalf of the person asking, and a refusal from either is shown as it came.

mod api;
mod form;
mod money;
mod pages;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::FromRequestParts;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::X_CONTENT_TYPE_OPTIONS;
use hyper::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY};
use ring::rand::{SecureRandom, SystemRandom};

use crate::call::{Answer, CallError, Sidecar, Trace};
use crate::wire::{IDEMPOTENCY_KEY, Owner, Refusal, TransferOrder, USER};
use crate::{BankError, serve};

/// Longer than `payments` waits for `accounts`, twice, so that its answer is heard.
const CALL_SECONDS_MAX: u64 = 10;
/// 128 bits: no two forms share a key by chance.
const KEY_BYTES: usize = 16;

/// One stylesheet from our own origin, no script at all.
const CONTENT_SECURITY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; \
    base-uri 'none'; frame-ancestors 'none'";

const STYLE: &str = include_str!("style.css");
const ICON: &str = include_str!("icon.svg");

/// What `web` is given.
#[derive(Debug)]
pub struct WebConfig {
    /// Where it serves; only its sidecar should reach it.
    pub listener: std::net::TcpListener,
    /// The outbound port of its sidecar for `accounts`.
    pub accounts: SocketAddr,
    /// The outbound port of its sidecar for `payments`.
    pub payments: SocketAddr,
}

/// Serves until `shutdown` completes.
///
/// # Errors
///
/// If the listener cannot be used.
pub async fn run(config: WebConfig, shutdown: impl Future<Output = ()>) -> Result<(), BankError> {
    let timeout = Duration::from_secs(CALL_SECONDS_MAX);
    let bank = Bank {
        accounts: Sidecar::new("accounts", config.accounts, timeout),
        payments: Sidecar::new("payments", config.payments, timeout),
    };
    serve::run(config.listener, router(bank), shutdown).await
}

/// The two services that the pages are made of.
#[derive(Debug, Clone)]
struct Bank {
    accounts: Sidecar,
    payments: Sidecar,
}

impl Bank {
    /// Orders a transfer under a key, so that repeating it moves nothing twice.
    async fn transfer(
        &self,
        order: &TransferOrder,
        key: HeaderValue,
        trace: &Trace,
    ) -> Result<Answer, Refusal> {
        let body = serde_json::to_vec(order).map_err(|error| Refusal::internal(&error))?;
        let header = Some((IDEMPOTENCY_KEY, key));
        self.payments.post("/transfers", trace, Bytes::from(body), header).await.map_err(
            |error| match error {
                CallError::Timeout { .. } | CallError::BrokenOff { .. } => Refusal::new(
                    error.status(),
                    "unresolved",
                    format!("{error}; the transfer was made once or not at all"),
                ),
                error => Refusal::from(error),
            },
        )
    }
}

fn router(bank: Bank) -> Router {
    Router::new()
        .route("/", get(pages::accounts))
        .route("/accounts/{id}", get(pages::account))
        .route("/transfers", post(form::transfer))
        .route("/api/accounts", get(api::accounts))
        .route("/api/accounts/{id}", get(api::account))
        .route("/api/transfers", post(api::transfer))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/assets/style.css", get(|| async { asset("text/css; charset=utf-8", STYLE) }))
        .route("/assets/icon.svg", get(|| async { asset("image/svg+xml", ICON) }))
        .fallback(pages::not_found)
        .layer(middleware::from_fn(browser_rules))
        .with_state(bank)
}

/// What a browser may do with what it gets from here.
async fn browser_rules(request: axum::extract::Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, CONTENT_SECURITY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    // Balances are nobody else's business, a shared cache's included.
    response.headers_mut().entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn asset(
    kind: &'static str,
    text: &'static str,
) -> ([(hyper::header::HeaderName, &'static str); 2], &'static str) {
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "max-age=300")], text)
}

/// The person whose accounts to show, as the sidecar names them. Data, not permission: whether the
/// caller may see those accounts is decided at `accounts`, not here.
#[derive(Debug, Clone)]
struct Person(Owner);

impl<S: Sync> FromRequestParts<S> for Person {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, _state: &S) -> Result<Self, Refusal> {
        let name = parts.headers.get(USER).and_then(|value| value.to_str().ok());
        let Some(name) = name else {
            return Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "no_person",
                "this is about a person's accounts, and the request comes for no person",
            ));
        };
        Ok(Self(Owner::try_from(name.to_owned())?))
    }
}

/// A key for one transfer that is yet to be ordered.
fn fresh_key() -> Result<String, Refusal> {
    let mut key = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut key).map_err(|_| Refusal::internal(&BankError::Randomness))?;
    Ok(key.iter().map(|byte| format!("{byte:02x}")).collect())
}
