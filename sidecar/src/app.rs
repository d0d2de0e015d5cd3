//! The loopback connection to the app this sidecar stands before, and the body that relays to and from it.

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, UPGRADE};
use http::uri::{Authority, Scheme};
use http::{Request, Response, StatusCode, Uri, Version};
use http_body::{Frame, SizeHint};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioTimer;
use identity::Scope;
use identity::clock::SharedClock;
use thiserror::Error;

use crate::headers;
use crate::http1;
use crate::server::ScopeExecutor;
use crate::{Body, BoxError};

/// The app is on this machine: if it does not accept within this, it is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Shorter than any server's keep-alive that we know of, so that we close first.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// What the app speaks on loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AppProtocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 without TLS, by prior knowledge: what gRPC servers speak.
    H2c,
}

/// Why the app gave no answer.
#[derive(Debug, Error)]
pub enum AppError {
    /// Not listening, or its answer over HTTP/1.1 is none.
    #[error("the app cannot be reached: {0}")]
    Http1(#[source] http1::ClientError),
    /// Not listening, or it broke the connection, over HTTP/2.
    #[error("the app cannot be reached: {0}")]
    H2c(#[source] hyper_util::client::legacy::Error),
    /// No answer in time.
    #[error("the app did not answer in time")]
    Timeout,
    /// The request's target is not in origin form.
    #[error("the request's target is not in origin form")]
    Target,
}

impl AppError {
    /// The status that the caller gets.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Http1(error) if error.is_connect() => StatusCode::SERVICE_UNAVAILABLE,
            Self::H2c(error) if error.is_connect() => StatusCode::SERVICE_UNAVAILABLE,
            Self::Http1(http1::ClientError::Target) | Self::Target => StatusCode::BAD_REQUEST,
            Self::Http1(_) | Self::H2c(_) => StatusCode::BAD_GATEWAY,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }
}

/// A client to one app.
#[derive(Debug)]
pub struct App {
    transport: Transport,
    clock: SharedClock,
    response_timeout: Duration,
}

#[derive(Debug)]
enum Transport {
    Http1(http1::Client),
    H2c(Box<H2c>),
}

#[derive(Debug)]
struct H2c {
    authority: Authority,
    client: Client<HttpConnector, Body>,
}

impl App {
    /// A client to the app at `address`.
    pub fn new(
        address: SocketAddr,
        protocol: AppProtocol,
        response_timeout: Duration,
        clock: SharedClock,
        scope: &Scope,
    ) -> Result<Self, http::uri::InvalidUri> {
        let transport = match protocol {
            AppProtocol::Http1 => Transport::Http1(http1::Client::new(address, scope)),
            AppProtocol::H2c => {
                let mut connector = HttpConnector::new();
                connector.set_nodelay(true);
                connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
                let client = Client::builder(ScopeExecutor(scope.clone()))
                    .pool_timer(TokioTimer::new())
                    .pool_idle_timeout(IDLE_TIMEOUT)
                    .http2_only(true)
                    .build(connector);
                Transport::H2c(Box::new(H2c { authority: address.to_string().parse()?, client }))
            }
        };
        Ok(Self { transport, clock, response_timeout })
    }

    /// Sends one request in origin form. `Host` stays what the caller asked for.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Body>, AppError> {
        tokio::select! {
            biased;
            answer = self.send_unbounded(request) => answer,
            () = self.clock.sleep(self.response_timeout) => Err(AppError::Timeout),
        }
    }

    async fn send_unbounded(&self, request: Request<Body>) -> Result<Response<Body>, AppError> {
        match &self.transport {
            Transport::Http1(client) => client.send(request).await.map_err(AppError::Http1),
            Transport::H2c(h2c) => {
                let request = absolute(request, &h2c.authority)?;
                let answer = Box::pin(h2c.client.request(request)).await;
                answer.map(|response| response.map(Body::from)).map_err(AppError::H2c)
            }
        }
    }
}

/// The request as hyper's client takes it, for HTTP/2.
fn absolute(mut request: Request<Body>, authority: &Authority) -> Result<Request<Body>, AppError> {
    let mut uri = http::uri::Parts::default();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = Some(authority.clone());
    uri.path_and_query = Some(request.uri().path_and_query().cloned().ok_or(AppError::Target)?);
    *request.uri_mut() = Uri::from_parts(uri).map_err(|_| AppError::Target)?;
    // An offer to upgrade may be left aside; HTTP/2 has none (RFC 9113 §8.6).
    request.headers_mut().remove(UPGRADE);
    request.headers_mut().remove(CONNECTION);
    *request.version_mut() = Version::HTTP_2;
    Ok(request)
}

/// A body passed on frame by frame: bounded, its trailers cleaned, something kept alive meanwhile.
pub struct Relay<G> {
    body: Body,
    left_bytes: Option<u64>,
    _guard: G,
}

impl<G: Unpin + Send + 'static> Relay<G> {
    /// Passes `body` on; `max_bytes` bounds it, `guard` is dropped with it.
    pub fn body(body: Body, max_bytes: Option<u64>, guard: G) -> Body {
        match body.whole() {
            Some(bytes) if max_bytes.is_none_or(|max| bytes.len() as u64 <= max) => body,
            _ => Body::new(Self { body, left_bytes: max_bytes, _guard: guard }),
        }
    }
}

impl<G: Unpin> http_body::Body for Relay<G> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let frame = match std::task::ready!(Pin::new(&mut this.body).poll_frame(cx)) {
            None => return Poll::Ready(None),
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            Some(Ok(frame)) => frame,
        };
        let frame = match frame.into_data() {
            Ok(data) => {
                if let Some(left) = &mut this.left_bytes {
                    match left.checked_sub(data.len() as u64) {
                        Some(rest) => *left = rest,
                        None => return Poll::Ready(Some(Err("the body is over its limit".into()))),
                    }
                }
                Frame::data(data)
            }
            Err(frame) => {
                let mut trailers = frame.into_trailers().unwrap_or_default();
                headers::strip_hop_by_hop(&mut trailers);
                headers::strip_identity(&mut trailers);
                Frame::trailers(trailers)
            }
        };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
