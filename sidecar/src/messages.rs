//! The messages of a gRPC call, one by one: each is judged before a byte of it is passed on.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::StatusCode;
use http_body::{Body as _, Frame};
use policy::{Denial, Refusal};
use thiserror::Error;

use crate::app::OverLimit;
use crate::{Body, BoxError, answer, grpc};

/// One byte of flags and four of length (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX_BYTES: usize = 5;

/// Why a call was ended on its way to the app; told to its caller in place of what the app says to that.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// A message is over its limit.
    TooLarge,
    /// A message may not be sent.
    Denied(Box<Denial>),
    /// It cannot be recorded that a message may not be sent.
    Unrecorded,
}

/// Where the way to the app leaves word for the way back.
pub(crate) type Faults = Arc<OnceLock<Fault>>;

/// The bytes are of no call, or of one that is not judged.
#[derive(Debug, Error)]
pub(crate) enum MessageError {
    #[error("a message of {bytes} bytes is over the limit of {max_bytes}")]
    TooLarge { bytes: usize, max_bytes: usize },
    #[error("a compressed message is not judged")]
    Compressed,
    #[error("the flags of a message are unknown")]
    Flags,
    #[error("the call ends within a message")]
    Cut,
    #[error("trailers cannot belong to a call's request")]
    Trailers,
    #[error("{0}")]
    Body(#[source] BoxError),
}

impl MessageError {
    /// As a refusal of the request.
    pub(crate) fn refusal(&self) -> Refusal {
        let rule = match self {
            Self::TooLarge { .. } => "request.body_size",
            Self::Compressed => "request.content_encoding",
            Self::Trailers => "request.trailers",
            Self::Flags | Self::Cut | Self::Body(_) => "request.body",
        };
        Refusal::malformed(rule, self.to_string())
    }
}

/// Where the messages of a call begin and end that pass unread, each of so many bytes at most.
#[derive(Debug)]
pub struct MessageBound {
    max_bytes: u64,
    prefix: [u8; PREFIX_BYTES],
    /// Bytes of `prefix` that have come.
    have: usize,
    /// Left of the message that is under way.
    left_bytes: u64,
    /// hyper tells nobody why a request's body ended.
    faults: Faults,
}

impl MessageBound {
    pub(crate) fn new(max_bytes: u64, faults: Faults) -> Self {
        Self { max_bytes, prefix: [0; PREFIX_BYTES], have: 0, left_bytes: 0, faults }
    }

    /// Whether no message can be too large in a body that is here as a whole.
    pub(crate) fn admits(&self, whole: &[u8]) -> bool {
        whole.len() as u64 <= self.max_bytes
    }

    /// Looks at what passes.
    pub(crate) fn take(&mut self, mut data: &[u8]) -> Result<(), OverLimit> {
        while let Some((first, rest)) = data.split_first() {
            if self.left_bytes > 0 {
                let skipped = data.len().min(usize::try_from(self.left_bytes).unwrap_or(usize::MAX));
                self.left_bytes -= skipped as u64;
                data = data.get(skipped..).unwrap_or_default();
                continue;
            }
            if let Some(slot) = self.prefix.get_mut(self.have) {
                *slot = *first;
            }
            self.have += 1;
            data = rest;
            if self.have == PREFIX_BYTES {
                let [_, length @ ..] = self.prefix;
                self.left_bytes = u32::from_be_bytes(length).into();
                self.have = 0;
                if self.left_bytes > self.max_bytes {
                    let _known = self.faults.set(Fault::TooLarge);
                    return Err(OverLimit);
                }
            }
        }
        Ok(())
    }
}

/// One message with what stands before it.
#[derive(Debug)]
pub(crate) struct Message(Bytes);

impl Message {
    /// A message of this payload, which is within the bound of one that was read.
    pub(crate) fn of(payload: &[u8]) -> Self {
        let mut bytes = BytesMut::with_capacity(PREFIX_BYTES + payload.len());
        bytes.put_u8(0);
        bytes.put_u32(u32::try_from(payload.len()).unwrap_or(u32::MAX));
        bytes.extend_from_slice(payload);
        Self(bytes.freeze())
    }

    /// With what stands before it.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Without what stands before it.
    pub(crate) fn payload(&self) -> Bytes {
        self.0.slice(PREFIX_BYTES.min(self.0.len())..)
    }
}

/// A call's request, of which whole messages are taken.
pub(crate) struct Messages {
    body: Body,
    arrived: BytesMut,
    max_bytes: usize,
    ended: bool,
}

impl Messages {
    /// Those of `body`, of at most so many bytes each.
    pub(crate) fn new(body: Body, max_bytes: usize) -> Self {
        Self { body, arrived: BytesMut::new(), max_bytes, ended: false }
    }

    /// The next one; `None` when the caller has sent all.
    pub(crate) async fn next(&mut self) -> Option<Result<Message, MessageError>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, MessageError>>> {
        loop {
            match self.take() {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(message))),
                Ok(None) if self.ended && self.arrived.is_empty() => return Poll::Ready(None),
                Ok(None) if self.ended => return Poll::Ready(Some(Err(MessageError::Cut))),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => self.ended = true,
                Some(Err(error)) => return Poll::Ready(Some(Err(MessageError::Body(error)))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.arrived.extend_from_slice(&data),
                    Err(_) => return Poll::Ready(Some(Err(MessageError::Trailers))),
                },
            }
        }
    }

    /// A message that has wholly arrived.
    fn take(&mut self) -> Result<Option<Message>, MessageError> {
        let Some([flags, length @ ..]) = self.arrived.first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
        match flags {
            0 => {}
            1 => return Err(MessageError::Compressed),
            _ => return Err(MessageError::Flags),
        }
        let bytes = u32::from_be_bytes(*length) as usize;
        if bytes > self.max_bytes {
            return Err(MessageError::TooLarge { bytes, max_bytes: self.max_bytes });
        }
        let whole = PREFIX_BYTES + bytes;
        Ok((self.arrived.len() >= whole).then(|| Message(self.arrived.split_to(whole).freeze())))
    }

    fn is_over(&self) -> bool {
        self.arrived.is_empty() && (self.ended || self.body.is_end_stream())
    }
}

/// Says whether a message that follows the first may be sent; a refusal is recorded by then.
pub(crate) type Judge = Box<dyn FnMut(Result<&[u8], &MessageError>) -> Result<(), Fault> + Send>;

/// The messages on their way to the app: the first, which was judged, and those after it.
pub(crate) struct Judged {
    ready: VecDeque<Message>,
    rest: Messages,
    judge: Judge,
    faults: Faults,
    over: bool,
}

impl Judged {
    /// The body of a request that is permitted by its first message.
    pub(crate) fn body(first: Message, rest: Messages, judge: Judge, faults: Faults) -> Body {
        Body::new(Self { ready: VecDeque::from([first]), rest, judge, faults, over: false })
    }
}

impl http_body::Body for Judged {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Some(Message(bytes)) = this.ready.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        if this.over {
            return Poll::Ready(None);
        }
        let judged = match ready!(this.rest.poll_next(cx)) {
            None => {
                this.over = true;
                return Poll::Ready(None);
            }
            Some(Ok(message)) => (this.judge)(Ok(&message.payload())).map(|()| message),
            Some(Err(error @ MessageError::Body(_))) => {
                this.over = true;
                return Poll::Ready(Some(Err(error.into())));
            }
            Some(Err(error)) => (this.judge)(Err(&error)).and(Err(Fault::TooLarge)),
        };
        match judged {
            Ok(Message(bytes)) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            Err(fault) => {
                this.over = true;
                // The first word counts.
                let _known = this.faults.set(fault);
                Poll::Ready(Some(Err("a message of the call was refused".into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_empty() && (self.over || self.rest.is_over())
    }
}

/// The app's answer, which ends with the reason if the call was ended on its way to it.
pub(crate) fn answer_to(body: Body, faults: Faults) -> Body {
    if body.whole().is_some() { body } else { Body::new(Answer { body, faults, over: false }) }
}

struct Answer {
    body: Body,
    faults: Faults,
    over: bool,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if this.over {
            return Poll::Ready(None);
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        let ended = !matches!(&frame, Some(Ok(frame)) if frame.is_data());
        let Some(fault) = this.faults.get().filter(|_| ended) else { return Poll::Ready(frame) };
        this.over = true;
        let (status, message) = match fault {
            Fault::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "a message is too large".to_owned()),
            Fault::Unrecorded => (StatusCode::SERVICE_UNAVAILABLE, "unavailable".to_owned()),
            Fault::Denied(denial) => (answer::status_of(denial), answer::denied_words(denial)),
        };
        Poll::Ready(Some(Ok(Frame::trailers(grpc::trailers(grpc::code(status), &message)))))
    }

    fn is_end_stream(&self) -> bool {
        self.over || (self.faults.get().is_none() && self.body.is_end_stream())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use http_body_util::{BodyExt as _, StreamBody};
    use proptest::prelude::*;

    use super::*;

    fn message(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    fn cut(stream: &[u8], size: usize) -> Body {
        let pieces: Vec<_> = stream
            .chunks(size)
            .map(|piece| Ok::<_, BoxError>(Frame::data(Bytes::copy_from_slice(piece))))
            .collect();
        Body::new(StreamBody::new(futures::stream::iter(pieces)))
    }

    async fn all(body: Body, max_bytes: usize) -> Result<Vec<Vec<u8>>, String> {
        let (mut messages, mut found) = (Messages::new(body, max_bytes), Vec::new());
        while let Some(next) = messages.next().await {
            found.push(next.map_err(|error| error.to_string())?.payload().to_vec());
        }
        Ok(found)
    }

    /// What waits for nothing.
    fn at_once<T>(future: impl Future<Output = T>) -> T {
        future.now_or_never().unwrap()
    }

    proptest! {
        #[test]
        fn messages_are_found_however_they_are_cut(
            sent in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..10), size in 1usize..30,
        ) {
            let stream: Vec<u8> = sent.iter().flat_map(|payload| message(payload)).collect();
            prop_assert_eq!(at_once(all(cut(&stream, size), 40)).unwrap(), sent);
        }

        #[test]
        fn no_bytes_panic(stream in prop::collection::vec(any::<u8>(), 0..60), size in 1usize..30) {
            let _any = at_once(all(cut(&stream, size), 40));
        }
    }

    #[tokio::test]
    async fn what_is_no_message_is_said() {
        let mut compressed = message(b"x");
        compressed[0] = 1;
        let mut flags = message(b"x");
        flags[0] = 2;
        for (stream, why) in [
            (compressed, "a compressed message is not judged"),
            (flags, "the flags of a message are unknown"),
            (message(&[0; 41]), "a message of 41 bytes is over the limit of 40"),
            (message(b"xyz")[..7].to_vec(), "the call ends within a message"),
        ] {
            assert_eq!(all(cut(&stream, 3), 40).await.unwrap_err(), why);
        }
    }

    #[tokio::test]
    async fn policy_25_a_message_that_is_refused_is_not_sent_and_the_answer_says_so() {
        let stream: Vec<u8> =
            [&b"one"[..], b"two", b"bad", b"four"].iter().flat_map(|p| message(p)).collect();
        let mut messages = Messages::new(cut(&stream, 4), 40);
        let first = messages.next().await.unwrap().unwrap();
        let judge: Judge =
            Box::new(
                |message| if message.is_ok_and(|m| m != b"bad") { Ok(()) } else { Err(Fault::TooLarge) },
            );
        let faults = Faults::default();
        let mut body = Judged::body(first, messages, judge, Arc::clone(&faults));
        let mut sent = Vec::new();
        let error = loop {
            match body.frame().await.unwrap() {
                Ok(frame) => sent.extend_from_slice(&frame.into_data().unwrap()),
                Err(error) => break error.to_string(),
            }
        };
        assert_eq!(sent, [message(b"one"), message(b"two")].concat());
        assert_eq!(error, "a message of the call was refused");
        assert!(body.frame().await.is_none());
        let told = answer_to(cut(b"answer", 6), faults).collect().await.unwrap();
        assert_eq!(told.trailers().unwrap()["grpc-status"], "8");
    }
}
