//! The loopback connection to the app this sidecar stands before, and the body that relays to and from it.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, UPGRADE};
use http::uri::{Authority, Scheme};
use http::{Request, Response, StatusCode, Uri, Version};
use http_body::{Frame, SizeHint};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioTimer;
use identity::Scope;
use identity::clock::SharedClock;
use thiserror::Error;

use crate::dial::Dial;
use crate::http1;
use crate::messages::{Faults, MessageBound};
use crate::server::ScopeExecutor;
use crate::traffic::config::Timeouts;
use crate::traffic::timeouts::{Bounds, Deadline, MalformedTimeout};
use crate::{Body, BoxError, bounded, grpc, headers};

/// The app is on this machine: if it does not accept within this, it is down.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Shorter than any server's keep-alive that we know of, so that we close first.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Nothing but the time to the head of the answer is bounded here: the callers' sidecars have their own.
const NO_TIMEOUTS: Timeouts =
    Timeouts { connect: CONNECT_TIMEOUT, tls: CONNECT_TIMEOUT, idle: None, whole: None };

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
    /// The request's own deadline is none.
    #[error(transparent)]
    Deadline(#[from] MalformedTimeout),
}

impl AppError {
    /// The status that the caller gets.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Http1(_) | Self::H2c(_) if OverLimit::caused(self) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Http1(error) if error.is_connect() => StatusCode::SERVICE_UNAVAILABLE,
            Self::H2c(error) if error.is_connect() => StatusCode::SERVICE_UNAVAILABLE,
            Self::Http1(http1::ClientError::Target) | Self::Target | Self::Deadline(_) => {
                StatusCode::BAD_REQUEST
            }
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
    client: Client<Dial, Body>,
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
                let client = Client::builder(ScopeExecutor(scope.clone()))
                    .pool_timer(TokioTimer::new())
                    .pool_idle_timeout(IDLE_TIMEOUT)
                    .http2_only(true)
                    .build(Dial(address));
                Transport::H2c(Box::new(H2c { authority: address.to_string().parse()?, client }))
            }
        };
        Ok(Self { transport, clock, response_timeout })
    }

    /// Whether it speaks HTTP/2, as gRPC servers do.
    pub(crate) fn speaks_http2(&self) -> bool {
        matches!(self.transport, Transport::H2c(_))
    }

    /// Sends one request in origin form. `Host` stays what the caller asked for. A gRPC call has the time that its
    /// caller gives it, and what is left of that is passed on.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Body>, AppError> {
        let (headers, now) = (request.headers_mut(), self.clock.now());
        let call = grpc::is_call(headers);
        let mut bounds = Bounds::of(headers, self.response_timeout, &NO_TIMEOUTS, now)?;
        if !self.speaks_http2() {
            // It serves no calls: a content type alone must not take the bound off that holds for its requests.
            bounds.head = bounds.head.earlier(Deadline::within(self.response_timeout, now));
        }
        bounds.whole.pass_on(headers, now);
        // Pinned where it is made: what `select!` is given by value is moved, and it is large.
        let mut answer = pin!(self.send_unbounded(request));
        let answer = match bounds.head.left(now) {
            None => answer.await,
            Some(left) => tokio::select! {
                biased;
                answer = &mut answer => answer,
                () = self.clock.sleep(left) => Err(AppError::Timeout),
            },
        };
        Ok(answer?.map(|body| bounded::body(body, &bounds, call, &self.clock)))
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

/// What a body that is passed on may hold.
#[derive(Debug)]
pub enum Bound {
    /// Whatever comes.
    Endless,
    /// So many more bytes.
    Bytes(u64),
    /// gRPC messages, each of so many bytes (gRPC over HTTP/2, "Length-Prefixed-Message").
    Messages(MessageBound),
}

impl Bound {
    /// Messages of at most `max_bytes` each: a stream of them may go on for ever.
    pub(crate) fn messages(max_bytes: u64, faults: Faults) -> Self {
        Self::Messages(MessageBound::new(max_bytes, faults))
    }

    fn admits(&self, whole: &[u8]) -> bool {
        match self {
            Self::Endless => true,
            Self::Bytes(max) => whole.len() as u64 <= *max,
            Self::Messages(messages) => messages.admits(whole),
        }
    }

    fn take(&mut self, data: &[u8]) -> Result<(), OverLimit> {
        match self {
            Self::Endless => Ok(()),
            Self::Bytes(left) => {
                *left = left.checked_sub(data.len() as u64).ok_or(OverLimit)?;
                Ok(())
            }
            Self::Messages(messages) => messages.take(data),
        }
    }
}

/// A body, or a message in it, holds more than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the body is over its limit")]
pub struct OverLimit;

impl OverLimit {
    /// Whether it is why `error` happened.
    fn caused(error: &(dyn std::error::Error + 'static)) -> bool {
        std::iter::successors(Some(error), |error| error.source()).any(|error| error.is::<Self>())
    }
}

/// A body passed on frame by frame: bounded, its trailers cleaned, something kept alive meanwhile.
pub struct Relay<G> {
    body: Body,
    bound: Bound,
    _guard: G,
}

impl<G: Unpin + Send + 'static> Relay<G> {
    /// Passes `body` on within `bound`; `guard` is dropped with it.
    pub fn body(body: Body, bound: Bound, guard: G) -> Body {
        match body.whole() {
            Some(bytes) if bound.admits(bytes) => body,
            _ => Body::new(Self { body, bound, _guard: guard }),
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
                if let Err(over) = this.bound.take(&data) {
                    return Poll::Ready(Some(Err(over.into())));
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(bytes: usize) -> Vec<u8> {
        let mut message = vec![0];
        message.extend_from_slice(&(bytes as u32).to_be_bytes());
        message.resize(5 + bytes, 7);
        message
    }

    proptest! {
        #[test]
        fn messages_are_bounded_one_by_one_however_they_are_cut(
            sizes in prop::collection::vec(0usize..300, 0..20), cut in 1usize..50,
        ) {
            let stream: Vec<u8> = sizes.iter().flat_map(|size| message(*size)).collect();
            let largest = sizes.iter().copied().max().unwrap_or(0);
            let passes = |max: usize| {
                let mut bound = Bound::messages(max as u64, Faults::default());
                stream.chunks(cut).all(|piece| bound.take(piece).is_ok())
            };
            prop_assert!(passes(largest));
            prop_assert!(largest == 0 || !passes(largest - 1));
        }
    }

    #[test]
    fn whatever_wraps_it_an_overrun_is_the_callers_fault() {
        let error = AppError::Http1(http1::ClientError::Request(OverLimit.into()));
        assert_eq!(error.status(), StatusCode::PAYLOAD_TOO_LARGE);
        let error = AppError::Http1(http1::ClientError::Request("cut".into()));
        assert_eq!(error.status(), StatusCode::BAD_GATEWAY);
    }
}
