//! Calls to other services: plain HTTP to an outbound port of the service's own sidecar.
//!
//! The only thing copied from the request being served is its `traceparent`: the sidecar finds by it
//! for whom the call is made.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::de::DeserializeOwned;

use crate::wire::Refusal;

/// The W3C trace context header (Trace Context, section 3.2).
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// A connection to a port on the same host is made at once or not at all.
const CONNECT_SECONDS_MAX: u64 = 2;
/// The longest answer is an account's newest history entries, well under this.
const ANSWER_BYTES_MAX: usize = 256 * 1024;
/// Idle connections kept to one port: what one busy service uses at a time.
const IDLE_CONNECTIONS_MAX: usize = 32;
/// Shorter than a sidecar keeps an idle connection, so that we close first and never race its close.
const IDLE_SECONDS_MAX: u64 = 15;
/// One repeat, for the kept connection that the other side closed just as we wrote on it. Every call
/// made here may be repeated: reads by nature, transfers because they carry an id.
const TRIES_MAX: u32 = 2;

/// The `traceparent` of the request being served, if it has one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace(Option<HeaderValue>);

impl Trace {
    /// For calls that nobody asked for, such as a timer's.
    pub(crate) fn none() -> Self {
        Self(None)
    }
}

impl<S: Sync> FromRequestParts<S> for Trace {
    type Rejection = Infallible;

    async fn from_request_parts(
        parts: &mut axum::http::request::Parts,
        _state: &S,
    ) -> Result<Self, Infallible> {
        Ok(Self(parts.headers.get(TRACEPARENT).cloned()))
    }
}

/// Why a call has no answer. The other side may or may not have acted on it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("{service} cannot be reached")]
    Unreachable {
        service: &'static str,
        #[source]
        source: hyper_util::client::legacy::Error,
    },
    #[error("{service} did not answer in time")]
    Timeout { service: &'static str },
    #[error("{service} answered with more than {ANSWER_BYTES_MAX} bytes")]
    TooLong { service: &'static str },
    #[error("{service} broke off its answer")]
    BrokenOff { service: &'static str },
    #[error("the call to {service} cannot be written")]
    Unwritable {
        service: &'static str,
        #[source]
        source: hyper::http::Error,
    },
    #[error("{service} answered with something that is not its JSON")]
    NotItsJson {
        service: &'static str,
        #[source]
        source: serde_json::Error,
    },
}

impl CallError {
    /// The status to answer with when the request being served cannot be served without this call.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Timeout { .. } => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::BAD_GATEWAY,
        }
    }
}

impl From<CallError> for Refusal {
    fn from(error: CallError) -> Self {
        Self::new(error.status(), "upstream", error.to_string())
    }
}

/// A whole answer, within [`ANSWER_BYTES_MAX`].
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) service: &'static str,
    pub(crate) status: StatusCode,
    content_type: Option<HeaderValue>,
    pub(crate) body: Bytes,
}

impl Answer {
    /// The body, read as JSON of this shape.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, CallError> {
        serde_json::from_slice(&self.body)
            .map_err(|source| CallError::NotItsJson { service: self.service, source })
    }
}

/// Passes the answer on as it is: status, content type and body, no other header.
impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.body).into_response();
        match self.content_type {
            Some(value) => response.headers_mut().insert(CONTENT_TYPE, value),
            None => response.headers_mut().remove(CONTENT_TYPE),
        };
        response
    }
}

/// One outbound port of the service's own sidecar.
#[derive(Debug, Clone)]
pub(crate) struct Sidecar {
    service: &'static str,
    port: SocketAddr,
    timeout: Duration,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Sidecar {
    /// Calls to `service` by way of `port`, each try bounded by `timeout`.
    pub(crate) fn new(service: &'static str, port: SocketAddr, timeout: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(Duration::from_secs(CONNECT_SECONDS_MAX)));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(IDLE_SECONDS_MAX))
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build(connector);
        Self { service, port, timeout, client }
    }

    /// `GET path`; `path` is already made of safe segments.
    pub(crate) async fn get(&self, path: &str, trace: &Trace) -> Result<Answer, CallError> {
        self.call(Method::GET, path, trace, None, None).await
    }

    /// `POST path` with a JSON body that may arrive twice, and an optional header of ours.
    pub(crate) async fn post(
        &self,
        path: &str,
        trace: &Trace,
        json: Bytes,
        header: Option<(HeaderName, HeaderValue)>,
    ) -> Result<Answer, CallError> {
        self.call(Method::POST, path, trace, Some(json), header).await
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        trace: &Trace,
        json: Option<Bytes>,
        header: Option<(HeaderName, HeaderValue)>,
    ) -> Result<Answer, CallError> {
        let service = self.service;
        let mut tried = 1;
        loop {
            let request = self
                .request(method.clone(), path, trace, json.clone(), header.clone())
                .map_err(|source| CallError::Unwritable { service, source })?;
            match tokio::time::timeout(self.timeout, self.once(request)).await {
                Err(_) => return Err(CallError::Timeout { service }),
                Ok(Err(CallError::Unreachable { source, .. })) if tried < TRIES_MAX => {
                    tracing::debug!(service, error = %source, "calling once more");
                    tried += 1;
                }
                Ok(outcome) => return outcome,
            }
        }
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        trace: &Trace,
        json: Option<Bytes>,
        header: Option<(HeaderName, HeaderValue)>,
    ) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
        let uri =
            Uri::builder().scheme("http").authority(self.port.to_string()).path_and_query(path).build()?;
        let mut request = Request::builder().method(method).uri(uri);
        if let Some(value) = &trace.0 {
            request = request.header(TRACEPARENT, value);
        }
        if json.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        request.body(Full::new(json.unwrap_or_default()))
    }

    async fn once(&self, request: Request<Full<Bytes>>) -> Result<Answer, CallError> {
        let service = self.service;
        let response = self
            .client
            .request(request)
            .await
            .map_err(|source| CallError::Unreachable { service, source })?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|error| {
            if error.is::<LengthLimitError>() {
                CallError::TooLong { service }
            } else {
                CallError::BrokenOff { service }
            }
        })?;
        Ok(Answer {
            service,
            status: parts.status,
            content_type: parts.headers.get(CONTENT_TYPE).cloned(),
            body: body.to_bytes(),
        })
    }
}
