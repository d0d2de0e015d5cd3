//! The client of control's admin socket, for the command line.

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;

use identity::clock::SharedClock;

use crate::control::Entry;
use crate::control::{ErrorBody, JoinTokenRequest, RollBackRequest, RolledBack, WriteRelations};
use crate::model::{ControlStatus, DecisionQuery, JoinToken, StoredDecision};
use crate::relations::{Change, KeptRelation, Object, RelationsPage, Written};

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
        match self.get(&format!("/v1/decisions/{}", segment(receipt))).await {
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

    /// Writes a batch of relations of a service's objects, all or none.
    pub async fn write_relations(&self, service: &str, changes: Vec<Change>) -> Result<Written, AdminError> {
        let request = json(&WriteRelations { changes })?;
        parse(&self.call(Method::POST, &format!("/v1/relations/{}", segment(service)), &request).await?)
    }

    /// Up to `limit` of a service's objects behind `after`, as many as a page has without it.
    pub async fn read_relations(
        &self,
        service: &str,
        after: Option<&Object>,
        limit: Option<usize>,
    ) -> Result<RelationsPage, AdminError> {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        if let Some(after) = after {
            query.append_pair("after", &after.to_string());
        }
        if let Some(limit) = limit {
            query.append_pair("limit", &limit.to_string());
        }
        parse(&self.get(&format!("/v1/relations/{}?{}", segment(service), query.finish())).await?)
    }

    /// What is written of one object, if anything is.
    pub async fn relation(&self, service: &str, object: &Object) -> Result<Option<KeptRelation>, AdminError> {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        let query = query.append_pair("of", &object.to_string()).finish();
        parse(&self.get(&format!("/v1/relations/{}/object?{query}", segment(service))).await?)
    }

    /// Tells of every batch that is written from now on, until control ends or `each` fails.
    pub async fn watch_relations<E>(
        &self,
        service: &str,
        mut each: impl FnMut(RelationsPage) -> Result<(), E>,
    ) -> Result<Result<(), E>, AdminError> {
        let target = format!("/v1/relations/{}/watch", segment(service));
        let (response, connection) = self.begin(Method::GET, &target, &[]).await?;
        let read = async move {
            let mut body = response.into_body();
            let mut line = Vec::new();
            while let Some(frame) = body.frame().await {
                let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
                line.extend_from_slice(&data);
                while let Some(end) = line.iter().position(|byte| *byte == b'\n') {
                    let rest = line.split_off(end + 1);
                    if let Err(error) = each(parse(&std::mem::replace(&mut line, rest))?) {
                        return Ok(Err(error));
                    }
                }
                if line.len() > MAX_ANSWER_BYTES {
                    return Err(AdminError::Http("a line without an end".into()));
                }
            }
            Ok(Ok(()))
        };
        let read = std::pin::pin!(read);
        match futures::future::select(read, connection).await {
            futures::future::Either::Left((outcome, _)) => outcome,
            // What came before the end is still to be read.
            futures::future::Either::Right((_, read)) => read.await,
        }
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
        let (response, connection) = self.begin(method, target, body).await?;
        // The connection ends by itself once the answer has been read.
        let (body, _connection) = futures::future::join(whole(response), connection).await;
        body
    }

    /// Sends a request, and drives its connection until there is an answer; an answer that is no success is an error.
    async fn begin(
        &self,
        method: Method,
        target: &str,
        body: &[u8],
    ) -> Result<(Response<Incoming>, Driven), AdminError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| AdminError::Connect { path: self.socket.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let mut connection: Driven = Box::pin(connection);
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(http::header::HOST, "control")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::copy_from_slice(body)))
            .map_err(broken)?;
        // The sender goes with this: no other request follows.
        let sent = Box::pin(async move { sender.send_request(request).await });
        let response = match futures::future::select(sent, &mut connection).await {
            futures::future::Either::Left((response, _)) => response,
            futures::future::Either::Right((_, sent)) => sent.await,
        };
        let response = response.map_err(broken)?;
        let status = response.status();
        if status.is_success() {
            return Ok((response, connection));
        }
        let (body, _connection) = futures::future::join(whole(response), connection).await;
        let body = body?;
        let message = serde_json::from_slice::<ErrorBody>(&body)
            .map_or_else(|_| String::from_utf8_lossy(&body).into_owned(), |body| body.error);
        Err(AdminError::Refused { status, message })
    }
}

/// A connection, which moves only while it is polled.
type Driven = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

async fn whole(response: Response<Incoming>) -> Result<Bytes, AdminError> {
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
    Ok(body.map_err(AdminError::Http)?.to_bytes())
}

/// A text as a segment of a path.
fn segment(text: &str) -> String {
    // A form writes a space as `+`, a path does not.
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>().replace('+', "%20")
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
