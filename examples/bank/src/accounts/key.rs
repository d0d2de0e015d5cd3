//! The database key: read from the vault through the sidecar, at every start, from nowhere else.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::StatusCode;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::seal::{DATABASE_KEY_BYTES, DatabaseKey};
use crate::call::{Answer, CallError, Sidecar, Trace};

/// KV version 2 of the vault's HTTP API. The sidecar's own identity is the login.
pub(super) const KEY_PATH: &str = "/v1/secret/data/accounts/db-key";
/// The vault is often up within this of us.
const FIRST_WAIT_MS: u64 = 100;
/// Soon enough after an operator has put things right.
const LONGEST_WAIT_MS: u64 = 5_000;

/// Why there is no key yet.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeyError {
    #[error("the vault has no secret at accounts/db-key")]
    Missing,
    #[error("this service may not read accounts/db-key: {0}")]
    Denied(String),
    #[error("the vault is sealed or not ready (status {0})")]
    NotReady(StatusCode),
    #[error("the vault answered with status {0}")]
    Status(StatusCode),
    #[error("the secret's field \"key\" must be {DATABASE_KEY_BYTES} bytes in base64")]
    NotAKey,
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Waits between tries: growing, with an end.
#[derive(Debug)]
pub(super) struct Waits {
    next_ms: u64,
}

impl Default for Waits {
    fn default() -> Self {
        Self { next_ms: FIRST_WAIT_MS }
    }
}

impl Waits {
    pub(super) fn next(&mut self) -> Duration {
        let wait = Duration::from_millis(self.next_ms);
        self.next_ms = (self.next_ms * 2).min(LONGEST_WAIT_MS);
        wait
    }
}

/// Asks the vault once.
pub(super) async fn read(vault: &Sidecar) -> Result<DatabaseKey, KeyError> {
    let answer = vault.get(KEY_PATH, &Trace::none()).await?;
    match answer.status {
        StatusCode::OK => parse(&answer),
        StatusCode::NOT_FOUND => Err(KeyError::Missing),
        StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => Err(KeyError::Denied(receipt(&answer))),
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => {
            Err(KeyError::NotReady(answer.status))
        }
        status => Err(KeyError::Status(status)),
    }
}

/// No `Debug`: it holds the key.
#[derive(Deserialize)]
struct KvAnswer {
    data: KvVersion,
}

#[derive(Deserialize)]
struct KvVersion {
    data: KvData,
}

#[derive(Deserialize)]
struct KvData {
    key: String,
}

fn parse(answer: &Answer) -> Result<DatabaseKey, KeyError> {
    // The parser's own error could quote the secret: it stops here.
    let parsed: KvAnswer = serde_json::from_slice(&answer.body).map_err(|_| KeyError::NotAKey)?;
    let text = Zeroizing::new(parsed.data.data.key);
    let bytes = Zeroizing::new(STANDARD.decode(text.as_bytes()).map_err(|_| KeyError::NotAKey)?);
    let mut key: DatabaseKey = Zeroizing::new([0; DATABASE_KEY_BYTES]);
    if bytes.len() != key.len() {
        return Err(KeyError::NotAKey);
    }
    key.copy_from_slice(&bytes);
    Ok(key)
}

/// The receipt of a denial, for the operator to look up.
fn receipt(answer: &Answer) -> String {
    #[derive(Deserialize)]
    struct Denied {
        receipt: String,
    }
    match answer.json::<Denied>() {
        Ok(Denied { receipt }) => format!("receipt {receipt}"),
        Err(_) => format!("status {}, no receipt", answer.status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_stay_bounded() {
        let mut waits = Waits::default();
        let taken: Vec<u64> = (0..9).map(|_| u64::try_from(waits.next().as_millis()).unwrap()).collect();
        assert_eq!(taken, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    }
}
