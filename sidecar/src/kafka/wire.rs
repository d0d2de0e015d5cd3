//! Kafka's frames: a length of four bytes, a header, a message. Bounded before anything is made of them.

use std::ops::Range;

use bytes::{Buf, BufMut, Bytes, BytesMut, TryGetError};
use kafka_protocol::messages::{ApiKey, RequestHeader, ResponseHeader};
use kafka_protocol::protocol::buf::ByteBuf;
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes};
use thiserror::Error;

/// The length in front of a frame.
pub(super) const LENGTH_BYTES: usize = 4;
/// API key, version and correlation id.
pub(super) const HEAD_BYTES: usize = 8;
/// Longest request whose parts are taken from one another. One of Produce is read without being decoded.
pub(super) const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Longest request of Produce: a client's own limit is 1 MiB by default, and brokers' 100 MiB.
pub(super) const MAX_PRODUCE_BYTES: usize = 16 << 20;
/// Longest answer that is decoded, to be changed or filtered: the metadata of 100,000 partitions.
pub(super) const MAX_DECODED_ANSWER_BYTES: usize = 8 << 20;

/// Why bytes are no message.
#[derive(Debug, Error)]
pub enum Malformed {
    /// The length in front is negative, too small or too large.
    #[error("a frame of {0} bytes")]
    Length(i32),
    /// No broker knows it, or no sidecar may judge it.
    #[error("the API key {0} is not one that is understood")]
    Api(i16),
    /// Topics may have ids there instead of names, for one.
    #[error("version {version} of {api:?} is not one that is understood")]
    Version {
        /// Which API.
        api: ApiKey,
        /// The version that was asked in.
        version: i16,
    },
    /// It ends too early, or holds what it may not.
    #[error("a {what} that cannot be read: {why}")]
    Message {
        /// What it was to be.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Something stands behind it, or it is written in more bytes than it needs.
    #[error("a {0} that is not in its one form")]
    Form(&'static str),
    /// The answer belongs to another request.
    #[error("an answer to {found} where one to {wanted} is due")]
    Correlation {
        /// Whose answer is due.
        wanted: i32,
        /// Whose came.
        found: i32,
    },
}

impl Malformed {
    pub(super) fn message(what: &'static str, why: impl ToString) -> Self {
        Self::Message { what, why: why.to_string() }
    }
}

/// The head of a request.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) api: ApiKey,
    pub(super) version: i16,
    pub(super) correlation: i32,
    client: Option<StrBytes>,
}

impl Head {
    /// The head of a request of nobody in particular.
    pub(super) fn of(api: ApiKey, version: i16, correlation: i32) -> Self {
        Self { api, version, correlation, client: None }
    }

    /// The head of a frame without its length, and the message behind it. Whether the version is understood is known
    /// before.
    pub(super) fn decode(api: ApiKey, version: i16, frame: &Bytes) -> Result<(Self, Bytes), Malformed> {
        let header_version = api.request_header_version(version);
        let (header, rest) = part::<RequestHeader>("header", frame, header_version)?;
        let head = Self { api, version, correlation: header.correlation_id, client: header.client_id };
        Ok((head, rest))
    }

    /// API key, version and correlation id of a frame that may not be understood.
    pub(super) fn peek(frame: &[u8]) -> Result<(i16, i16, i32), Malformed> {
        let mut head = frame;
        let mut read =
            || Ok::<_, TryGetError>((head.try_get_i16()?, head.try_get_i16()?, head.try_get_i32()?));
        read().map_err(|error| Malformed::message("header", error))
    }

    /// The frame of a request like this one.
    pub(super) fn frame<R: Request>(&self, version: i16, request: &R) -> Result<Bytes, Malformed> {
        let header = RequestHeader::default()
            .with_request_api_key(R::KEY)
            .with_request_api_version(version)
            .with_correlation_id(self.correlation)
            .with_client_id(self.client.clone());
        framed(&header, R::header_version(version), request, version)
    }

    /// The frame of an answer to it.
    pub(super) fn answer<R: Request>(&self, answer: &R::Response) -> Result<Bytes, Malformed> {
        self.answer_in::<R>(self.version, answer)
    }

    /// … in another version.
    pub(super) fn answer_in<R: Request>(
        &self,
        version: i16,
        answer: &R::Response,
    ) -> Result<Bytes, Malformed> {
        let header = ResponseHeader::default().with_correlation_id(self.correlation);
        framed(&header, R::Response::header_version(version), answer, version)
    }

    /// The message of a request, whole.
    pub(super) fn request<R: Request>(&self, message: &Bytes) -> Result<R, Malformed> {
        whole("request", message, self.version)
    }

    /// The message of an answer, whole, from its frame without the length.
    pub(super) fn answered<R: Request>(&self, version: i16, frame: &Bytes) -> Result<R::Response, Malformed> {
        let (header, message) =
            part::<ResponseHeader>("header of an answer", frame, R::Response::header_version(version))?;
        if header.correlation_id != self.correlation {
            return Err(Malformed::Correlation { wanted: self.correlation, found: header.correlation_id });
        }
        // Brokers may spell out what they need not: nothing is judged by it, and it goes on in its one form.
        let (answer, rest) = part("answer", &message, version)?;
        if rest.is_empty() { Ok(answer) } else { Err(Malformed::Form("answer")) }
    }
}

fn framed<H: Encodable, M: Encodable>(
    header: &H,
    header_version: i16,
    message: &M,
    version: i16,
) -> Result<Bytes, Malformed> {
    let wrong = |why: &dyn std::fmt::Display| Malformed::message("message", why);
    let length = header.compute_size(header_version).map_err(|error| wrong(&error))?
        + message.compute_size(version).map_err(|error| wrong(&error))?;
    let mut frame = BytesMut::with_capacity(LENGTH_BYTES + length);
    frame.put_i32(i32::try_from(length).map_err(|error| wrong(&error))?);
    header.encode(&mut frame, header_version).map_err(|error| wrong(&error))?;
    message.encode(&mut frame, version).map_err(|error| wrong(&error))?;
    Ok(frame.freeze())
}

/// A message in its one form, and nothing behind it.
pub(super) fn whole<M: Encodable + Decodable>(
    what: &'static str,
    bytes: &Bytes,
    version: i16,
) -> Result<M, Malformed> {
    let (message, rest) = part::<M>(what, bytes, version)?;
    let length = message.compute_size(version).map_err(|error| Malformed::message(what, error))?;
    // Tagged fields that appear twice, and numbers in more bytes than they need, are gone in what was read.
    if !rest.is_empty() || length != bytes.len() { Err(Malformed::Form(what)) } else { Ok(message) }
}

/// A message, and what stands behind it.
fn part<M: Decodable>(what: &'static str, bytes: &Bytes, version: i16) -> Result<(M, Bytes), Malformed> {
    let measured = M::decode(&mut Measured(bytes.clone()), version);
    measured.map_err(|error| Malformed::message(what, error))?;
    let mut rest = bytes.clone();
    let message = M::decode(&mut rest, version).map_err(|error| Malformed::message(what, error))?;
    Ok((message, rest))
}

/// Bytes that give no length which leads beyond their end.
///
/// The decoder makes room for as many elements as an array says it has, before it reads one: two billion of a frame
/// of twenty bytes. So everything is decoded from these first, where each number that may be a length is no more than
/// the bytes that are left; a number that is none is of no consequence in this pass. What is decoded so has as many
/// elements as it says.
struct Measured(Bytes);

impl Measured {
    /// Five bytes at most, as lengths are in flexible versions.
    fn peek_varint(&self) -> u64 {
        let bytes = self.0.iter().take(5).enumerate();
        let mut value = 0;
        for (place, byte) in bytes {
            value |= u64::from(byte & 0x7f) << (7 * place);
            if *byte < 0x80 {
                break;
            }
        }
        value
    }
}

impl Buf for Measured {
    fn remaining(&self) -> usize {
        self.0.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.0.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.0.advance(count);
    }

    /// The first byte of a length, or a later one, whose value is smaller. Numbers of tags look alike: those that are in
    /// use are small.
    fn try_get_u8(&mut self) -> Result<u8, TryGetError> {
        let length = self.peek_varint();
        let byte = self.0.try_get_u8()?;
        // A compact length is one more than what it is of.
        if length > self.0.len() as u64 + 1 {
            let requested = usize::try_from(length).unwrap_or(usize::MAX);
            return Err(TryGetError { requested, available: self.0.len() });
        }
        Ok(byte)
    }

    fn try_get_i32(&mut self) -> Result<i32, TryGetError> {
        let value = self.0.try_get_i32()?;
        let fits = usize::try_from(value).map_or(true, |length| length <= self.0.len());
        // No array and no bytes have this length.
        Ok(if fits { value } else { i32::MIN })
    }
}

impl ByteBuf for Measured {
    fn peek_bytes(&mut self, range: Range<usize>) -> Bytes {
        self.0.peek_bytes(range)
    }

    fn get_bytes(&mut self, size: usize) -> Bytes {
        self.0.get_bytes(size)
    }
}

/// A place in bytes, for what is read without being decoded.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    left: &'a [u8],
    what: &'static str,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { left: bytes, what }
    }

    pub(super) fn left(&self) -> usize {
        self.left.len()
    }

    pub(super) fn i16(&mut self) -> Result<i16, Malformed> {
        self.left.try_get_i16().map_err(|error| Malformed::message(self.what, error))
    }

    pub(super) fn i32(&mut self) -> Result<i32, Malformed> {
        self.left.try_get_i32().map_err(|error| Malformed::message(self.what, error))
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, left) = self
            .left
            .split_at_checked(count)
            .ok_or_else(|| Malformed::message(self.what, "it ends too early"))?;
        self.left = left;
        Ok(taken)
    }

    /// A number in as few bytes as it needs.
    pub(super) fn varint(&mut self) -> Result<usize, Malformed> {
        let mut value = 0_u64;
        for place in 0..5 {
            let byte = *self.take(1)?.first().unwrap_or(&0);
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte < 0x80 {
                let canonical = place == 0 || byte != 0;
                let value = u32::try_from(value).ok().filter(|_| canonical);
                return value.map(|value| value as usize).ok_or(Malformed::Form(self.what));
            }
        }
        Err(Malformed::Form(self.what))
    }

    /// The number of elements of an array that may not be null.
    pub(super) fn count(&mut self, flexible: bool) -> Result<usize, Malformed> {
        let count = if flexible { self.varint()?.checked_sub(1) } else { usize::try_from(self.i32()?).ok() };
        count.ok_or_else(|| Malformed::message(self.what, "an array without a length"))
    }

    /// Text, or null.
    pub(super) fn text(&mut self, flexible: bool) -> Result<Option<&'a str>, Malformed> {
        let length = if flexible {
            self.varint()?.checked_sub(1)
        } else {
            match self.i16()? {
                -1 => None,
                length => Some(
                    usize::try_from(length)
                        .map_err(|_| Malformed::message(self.what, "text of a negative length"))?,
                ),
            }
        };
        let Some(length) = length else { return Ok(None) };
        let text = std::str::from_utf8(self.take(length)?);
        text.map(Some).map_err(|error| Malformed::message(self.what, error))
    }

    /// Bytes, or null; they are passed over.
    pub(super) fn skip_bytes(&mut self, flexible: bool) -> Result<(), Malformed> {
        let length = if flexible {
            self.varint()?.checked_sub(1)
        } else {
            match self.i32()? {
                -1 => None,
                length => Some(
                    usize::try_from(length)
                        .map_err(|_| Malformed::message(self.what, "bytes of a negative length"))?,
                ),
            }
        };
        self.take(length.unwrap_or(0)).map(drop)
    }

    /// The fields that later versions may add, of which none is known: a request with some is not in its one form.
    pub(super) fn no_tags(&mut self, flexible: bool) -> Result<(), Malformed> {
        if flexible && self.varint()? != 0 { Err(Malformed::Form(self.what)) } else { Ok(()) }
    }
}

/// Writes a number as [`Cursor::varint`] reads it.
pub(super) fn put_varint(buffer: &mut BytesMut, mut value: usize) {
    while value >= 0x80 {
        buffer.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    buffer.put_u8((value & 0x7f) as u8);
}
