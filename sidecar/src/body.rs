//! The one body type at every seam of the data plane.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Collected, Limited};
use hyper::body::Incoming;
use identity::clock::SharedClock;

/// Longest that a body which is judged, or an answer that is held, may take to arrive: both fit into a few
/// packets.
const WHOLE_BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A request's or response's body, wherever it comes from.
///
/// Most bodies of a mesh are absent or a few hundred bytes that arrived with their head: those are
/// [`Body::whole`] and cost nothing to pass on.
pub struct Body(Kind);

enum Kind {
    Whole(Option<Bytes>),
    Hyper(Incoming),
    Boxed(UnsyncBoxBody<Bytes, BoxError>),
}

impl Body {
    /// No body.
    pub const fn empty() -> Self {
        Self(Kind::Whole(None))
    }

    /// A body that streams.
    pub fn new<B>(body: B) -> Self
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        Self(Kind::Boxed(body.map_err(Into::into).boxed_unsync()))
    }

    /// The same once more, without a copy of its bytes, if it is [`Body::whole`].
    pub fn repeat(&self) -> Option<Self> {
        match &self.0 {
            Kind::Whole(bytes) => Some(Self(Kind::Whole(bytes.clone()))),
            Kind::Hyper(_) | Kind::Boxed(_) => self.whole().map(|_| Self::empty()),
        }
    }

    /// Everything that is still to come, if it is here already and no trailers can follow.
    pub fn whole(&self) -> Option<&[u8]> {
        match &self.0 {
            Kind::Whole(bytes) => Some(bytes.as_deref().unwrap_or_default()),
            Kind::Hyper(body) if http_body::Body::is_end_stream(body) => Some(&[]),
            Kind::Hyper(_) | Kind::Boxed(_) => None,
        }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self(Kind::Whole((!bytes.is_empty()).then_some(bytes)))
    }
}

impl From<Incoming> for Body {
    fn from(body: Incoming) -> Self {
        Self(Kind::Hyper(body))
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

/// A whole body, if it ends within `max_bytes` and [`WHOLE_BODY_TIMEOUT`].
pub(crate) async fn whole(body: Body, max_bytes: usize, clock: &SharedClock) -> Option<Collected<Bytes>> {
    tokio::select! {
        body = Limited::new(body, max_bytes).collect() => body.ok(),
        () = clock.sleep(WHOLE_BODY_TIMEOUT) => None,
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the bytes: bodies are the users' own.
        match self.whole() {
            Some(bytes) => write!(f, "Body({} bytes)", bytes.len()),
            None => f.write_str("Body(streams)"),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Kind::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Kind::Hyper(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Kind::Boxed(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Whole(bytes) => bytes.is_none(),
            Kind::Hyper(body) => body.is_end_stream(),
            Kind::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Kind::Hyper(body) => body.size_hint(),
            Kind::Boxed(body) => body.size_hint(),
        }
    }
}
