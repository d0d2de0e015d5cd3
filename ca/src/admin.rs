//! The client of control's admin socket, for the command line.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;

use identity::clock::SharedClock;

use crate::control::Entry;
use crate::control::{ErrorBody, JoinTokenRequest, RollBackRequest, RolledBack};
use crate::model::{ControlStatus, DecisionQuery, JoinToken, StoredDecision};

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer taken: a full page of decisions.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// Why a request to the admin socket failed.
#[derive(Debug, Error)]
pub enum AdminError {
    /// Nobody listens, or we may not connect.
    #[error("control does not answer on {}; is it running, and may this user enter its directory?", path.display())]
    Connect {
        /// Which socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("control did not answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// The connection broke.
    #[error("the connection to control broke")]
    Http(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Control said no.
    #[error("control refused ({status}): {message}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// Control's words.
        message: String,
    },
    /// An answer that is not what this version knows.
    #[error("control's answer is malformed")]
    Answer(#[source] serde_json::Error),
}

/// A client of one admin socket. Each call is a connection of its own.
#[derive(Debug, Clone)]
pub struct AdminClient {
    socket: PathBuf,
    clock: SharedClock,
}

impl AdminClient {
    /// A client of the socket at this path.
    pub fn new(socket: PathBuf, clock: SharedClock) -> Self {
        Self { socket, clock }
    }

    /// Makes a single-use token with which `host` may join within `ttl` (whole seconds).
    pub async fn create_join_token(&self, host: &str, ttl: Duration) -> Result<JoinToken, AdminError> {
        let request = JoinTokenRequest { host: host.to_owned(), ttl_seconds: ttl.as_secs() };
        parse(&self.call(Method::POST, "/v1/join-tokens", &json(&request)?).await?)
    }

    /// Everything control knows.
    pub async fn status(&self) -> Result<ControlStatus, AdminError> {
        parse(&self.get("/v1/status").await?)
    }

    /// Decisions that match, newest first.
    pub async fn decisions(&self, query: &DecisionQuery) -> Result<Vec<StoredDecision>, AdminError> {
        let mut pairs = url::form_urlencoded::Serializer::new(String::new());
        if let Some(limit) = query.limit {
            pairs.append_pair("limit", &limit.to_string());
        }
        if let Some(since) = query.since {
            pairs.append_pair("since", &since.to_string());
        }
        if let Some(address) = &query.address {
            pairs.append_pair("address", address);
        }
        if let Some(verdict) = &query.verdict {
            pairs.append_pair("verdict", verdict);
        }
        parse(&self.get(&format!("/v1/decisions?{}", pairs.finish())).await?)
    }

    /// The decision of a receipt, if control has it.
    pub async fn decision(&self, receipt: &str) -> Result<Option<StoredDecision>, AdminError> {
        let segment: String = url::form_urlencoded::byte_serialize(receipt.as_bytes())
            .collect::<String>()
            // A form writes a space as `+`, a path does not.
            .replace('+', "%20");
        match self.get(&format!("/v1/decisions/{segment}")).await {
            Ok(answer) => parse(&answer).map(Some),
            Err(AdminError::Refused { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The trust bundle, PEM.
    pub async fn bundle(&self) -> Result<String, AdminError> {
        let answer = self.get("/v1/bundle").await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Replaces all registrations.
    pub async fn replace_entries(&self, entries: &[Entry]) -> Result<(), AdminError> {
        self.call(Method::POST, "/v1/entries", &json(&entries)?).await.map(|_| ())
    }

    /// Puts the policies of an earlier commit out again, those before the ones of now without a commit; returns their
    /// epoch.
    pub async fn roll_back_policies(&self, commit: Option<&str>) -> Result<u64, AdminError> {
        let request = RollBackRequest { commit: commit.map(str::to_owned) };
        let answer = self.call(Method::POST, "/v1/policies/roll-back", &json(&request)?).await?;
        parse::<RolledBack>(&answer).map(|rolled_back| rolled_back.epoch)
    }

    /// By which pseudonym a person stands in decisions.
    pub async fn pseudonym(&self, of: &str) -> Result<String, AdminError> {
        let query = url::form_urlencoded::Serializer::new(String::new()).append_pair("of", of).finish();
        parse(&self.get(&format!("/v1/pseudonym?{query}")).await?)
    }

    async fn get(&self, target: &str) -> Result<Bytes, AdminError> {
        self.call(Method::GET, target, &[]).await
    }

    async fn call(&self, method: Method, target: &str, body: &[u8]) -> Result<Bytes, AdminError> {
        tokio::select! {
            outcome = self.exchange(method, target, body) => outcome,
            () = self.clock.sleep(TIMEOUT) => Err(AdminError::Timeout),
        }
    }

    async fn exchange(&self, method: Method, target: &str, body: &[u8]) -> Result<Bytes, AdminError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| AdminError::Connect { path: self.socket.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(http::header::HOST, "control")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::copy_from_slice(body)))
            .map_err(broken)?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(broken)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
                .collect()
                .await
                .map_err(AdminError::Http)?
                .to_bytes();
            Ok::<_, AdminError>((status, body))
        };
        // The connection ends by itself once the sender inside the exchange is dropped.
        let (outcome, _connection) = futures::future::join(exchange, connection).await;
        let (status, body) = outcome?;
        if status.is_success() {
            return Ok(body);
        }
        let message = serde_json::from_slice::<ErrorBody>(&body)
            .map_or_else(|_| String::from_utf8_lossy(&body).into_owned(), |body| body.error);
        Err(AdminError::Refused { status, message })
    }
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> AdminError {
    AdminError::Http(Box::new(error))
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>, AdminError> {
    serde_json::to_vec(value).map_err(AdminError::Answer)
}

fn parse<T: DeserializeOwned>(answer: &[u8]) -> Result<T, AdminError> {
    serde_json::from_slice(answer).map_err(AdminError::Answer)
}
