//! Frames as bytes, and heads inside them.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode, Uri, Version, request, response};
use thiserror::Error;

use super::{MAX_DATA_BYTES, MAX_FIELDS, MAX_HEAD_BYTES};
use crate::pieces;

/// Bytes before each payload.
pub(super) const HEADER_BYTES: usize = 8;
const ENDS: u8 = 0x80;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Request,
    Response,
    Data,
    Trailers,
    Reset,
    Credit,
    GoAway,
    Ping,
    Pong,
}

impl Kind {
    fn read(byte: u8) -> Option<Self> {
        Some(match byte & !ENDS {
            0 => Self::Request,
            1 => Self::Response,
            2 => Self::Data,
            3 => Self::Trailers,
            4 => Self::Reset,
            5 => Self::Credit,
            6 => Self::GoAway,
            7 => Self::Ping,
            8 => Self::Pong,
            _ => return None,
        })
    }

    fn max_payload_bytes(self) -> usize {
        match self {
            Self::Request | Self::Response | Self::Trailers => MAX_HEAD_BYTES,
            Self::Data => MAX_DATA_BYTES,
            Self::Reset => 1,
            Self::Credit => 4,
            Self::GoAway | Self::Ping | Self::Pong => 0,
        }
    }
}

/// Why an exchange was cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum Reset {
    /// Nobody waits for the rest any more, and nothing is wrong.
    #[error("the peer needs no more of it")]
    Enough,
    /// The sender's own source of the body failed.
    #[error("the peer's body was cut short")]
    Cut,
    /// The server accepted no more exchanges: nothing of this one happened.
    #[error("the peer did not take the request")]
    Refused,
}

impl Reset {
    fn code(self) -> u8 {
        match self {
            Self::Enough => 0,
            Self::Cut => 1,
            Self::Refused => 2,
        }
    }

    fn read(code: u8) -> Result<Self, Malformed> {
        match code {
            0 => Ok(Self::Enough),
            1 => Ok(Self::Cut),
            2 => Ok(Self::Refused),
            _ => Err(Malformed("reset code")),
        }
    }
}

/// The peer broke the protocol; the part it broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the peer broke the protocol: {0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

/// A head over its limits of size or number of fields; nothing was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the head has more than {MAX_HEAD_BYTES} bytes or {MAX_FIELDS} fields")]
pub(crate) struct TooLarge;

/// One frame that has wholly arrived.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) ends: bool,
    pub(super) exchange: u32,
    pub(super) payload: Bytes,
}

/// Takes the next whole frame off `input`.
pub(super) fn take(input: &mut BytesMut) -> Result<Option<Frame>, Malformed> {
    let Some(mut header) = input.get(..HEADER_BYTES) else { return Ok(None) };
    let length = usize::try_from(header.get_uint(3)).map_err(|_| Malformed("frame length"))?;
    let byte = header.get_u8();
    let exchange = header.get_u32();
    let kind = Kind::read(byte).ok_or(Malformed("frame kind"))?;
    if length > kind.max_payload_bytes() {
        return Err(Malformed("frame length"));
    }
    let Some(payload) = input.get(HEADER_BYTES..HEADER_BYTES + length) else { return Ok(None) };
    // Copied rather than split off, so that one small frame does not keep the whole read buffer.
    let payload = if payload.is_empty() { Bytes::new() } else { Bytes::copy_from_slice(payload) };
    input.advance(HEADER_BYTES + length);
    Ok(Some(Frame { kind, ends: byte & ENDS != 0, exchange, payload }))
}

fn put(out: &mut BytesMut, kind: Kind, ends: bool, exchange: u32, length: usize) {
    let kind = kind as u8 | if ends { ENDS } else { 0 };
    // Callers keep lengths within 64 KiB, so the top byte of the low 32 bits is free for the kind.
    out.put_u32((length as u32) << 8 | u32::from(kind));
    out.put_u32(exchange);
}

pub(super) fn put_data(out: &mut BytesMut, exchange: u32, data: &[u8], ends: bool) {
    put(out, Kind::Data, ends, exchange, data.len());
    pieces::put(out, data);
}

pub(super) fn put_reset(out: &mut BytesMut, exchange: u32, why: Reset) {
    put(out, Kind::Reset, true, exchange, 1);
    out.put_u8(why.code());
}

pub(super) fn put_credit(out: &mut BytesMut, exchange: u32, bytes: u32) {
    put(out, Kind::Credit, false, exchange, 4);
    out.put_u32(bytes);
}

pub(super) fn put_plain(out: &mut BytesMut, kind: Kind) {
    put(out, kind, false, 0, 0);
}

pub(super) fn put_request(
    out: &mut BytesMut,
    exchange: u32,
    head: &request::Parts,
    ends: bool,
) -> Result<(), TooLarge> {
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    head_frame(out, Kind::Request, exchange, ends, &head.headers, |out| {
        put_short(out, head.method.as_str().as_bytes())?;
        put_long(out, target.as_bytes())
    })
}

pub(super) fn put_response(
    out: &mut BytesMut,
    exchange: u32,
    head: &response::Parts,
    ends: bool,
) -> Result<(), TooLarge> {
    head_frame(out, Kind::Response, exchange, ends, &head.headers, |out| {
        out.put_u16(head.status.as_u16());
        Ok(())
    })
}

pub(super) fn put_trailers(out: &mut BytesMut, exchange: u32, fields: &HeaderMap) -> Result<(), TooLarge> {
    head_frame(out, Kind::Trailers, exchange, true, fields, |_| Ok(()))
}

fn head_frame(
    out: &mut BytesMut,
    kind: Kind,
    exchange: u32,
    ends: bool,
    fields: &HeaderMap,
    start: impl FnOnce(&mut BytesMut) -> Result<(), TooLarge>,
) -> Result<(), TooLarge> {
    let begin = out.len();
    put(out, kind, ends, exchange, 0);
    let written = start(out).and_then(|()| put_fields(out, fields));
    let length = out.len() - begin - HEADER_BYTES;
    if written.is_err() || length > MAX_HEAD_BYTES {
        out.truncate(begin);
        return Err(TooLarge);
    }
    if let Some(bytes) = out.get_mut(begin..begin + 3) {
        bytes.copy_from_slice((length as u32).to_be_bytes().get(1..).unwrap_or_default());
    }
    Ok(())
}

fn put_fields(out: &mut BytesMut, fields: &HeaderMap) -> Result<(), TooLarge> {
    if fields.len() > MAX_FIELDS {
        return Err(TooLarge);
    }
    out.put_u8(fields.len() as u8);
    for (name, value) in fields {
        let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
        out.put_u8(u8::try_from(name.len()).map_err(|_| TooLarge)?);
        out.put_u16(u16::try_from(value.len()).map_err(|_| TooLarge)?);
        out.put_slice(name);
        out.put_slice(value);
    }
    Ok(())
}

fn put_short(out: &mut BytesMut, bytes: &[u8]) -> Result<(), TooLarge> {
    out.put_u8(u8::try_from(bytes.len()).map_err(|_| TooLarge)?);
    out.put_slice(bytes);
    Ok(())
}

fn put_long(out: &mut BytesMut, bytes: &[u8]) -> Result<(), TooLarge> {
    out.put_u16(u16::try_from(bytes.len()).map_err(|_| TooLarge)?);
    out.put_slice(bytes);
    Ok(())
}

/// A request's head. Its target is in origin form; what its fields say of framing is the caller's to judge.
pub(super) fn read_request(payload: Bytes) -> Result<request::Parts, Malformed> {
    let mut reader = Reader(payload);
    let method = reader.u8().and_then(|length| reader.bytes(length.into()));
    let method = method.and_then(|method| Method::from_bytes(&method).ok()).ok_or(Malformed("method"))?;
    let target = reader.u16().and_then(|length| reader.bytes(length.into())).ok_or(Malformed("target"))?;
    if target.first() != Some(&b'/') {
        return Err(Malformed("target"));
    }
    let (mut head, ()) = http::Request::new(()).into_parts();
    head.method = method;
    head.uri = Uri::from_maybe_shared(target).map_err(|_| Malformed("target"))?;
    head.version = Version::HTTP_11;
    head.headers = reader.fields()?;
    Ok(head)
}

/// A response's head. Interim responses do not travel, and neither does a switch of protocols unasked.
pub(super) fn read_response(payload: Bytes) -> Result<response::Parts, Malformed> {
    let mut reader = Reader(payload);
    let status = reader.u16().and_then(|status| StatusCode::from_u16(status).ok());
    let status = status.filter(|status| *status == StatusCode::SWITCHING_PROTOCOLS || status.as_u16() >= 200);
    let (mut head, ()) = http::Response::new(()).into_parts();
    head.status = status.ok_or(Malformed("status"))?;
    head.headers = reader.fields()?;
    Ok(head)
}

/// Trailers.
pub(super) fn read_trailers(payload: Bytes) -> Result<HeaderMap, Malformed> {
    Reader(payload).fields()
}

pub(super) fn read_reset(payload: &[u8]) -> Result<Reset, Malformed> {
    payload.first().ok_or(Malformed("reset")).and_then(|code| Reset::read(*code))
}

pub(super) fn read_credit(mut payload: &[u8]) -> Result<u32, Malformed> {
    payload.try_get_u32().map_err(|_| Malformed("credit"))
}

struct Reader(Bytes);

impl Reader {
    fn u8(&mut self) -> Option<u8> {
        self.0.try_get_u8().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.0.try_get_u16().ok()
    }

    fn bytes(&mut self, length: usize) -> Option<Bytes> {
        (length <= self.0.len()).then(|| self.0.split_to(length))
    }

    /// The fields, which are all that is left.
    fn fields(mut self) -> Result<HeaderMap, Malformed> {
        let count = usize::from(self.u8().ok_or(Malformed("fields"))?);
        if count > MAX_FIELDS {
            return Err(Malformed("fields"));
        }
        let mut fields = HeaderMap::with_capacity(count);
        for _ in 0..count {
            let (Some(name), Some(value)) = (self.u8(), self.u16()) else { return Err(Malformed("fields")) };
            let name = self.bytes(name.into()).ok_or(Malformed("field name"))?;
            if name.iter().any(u8::is_ascii_uppercase) {
                return Err(Malformed("field name"));
            }
            let name = HeaderName::from_bytes(&name).map_err(|_| Malformed("field name"))?;
            let value = self.bytes(value.into()).ok_or(Malformed("field value"))?;
            let value = HeaderValue::from_maybe_shared(value).map_err(|_| Malformed("field value"))?;
            fields.append(name, value);
        }
        if self.0.is_empty() { Ok(fields) } else { Err(Malformed("fields")) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request_head() -> impl Strategy<Value = request::Parts> {
        let fields = proptest::collection::vec(("[a-z][a-z0-9-]{0,20}", "[ -~]{0,40}"), 0..12);
        ("[A-Z]{1,8}", "/[a-z0-9/._~?=&-]{0,60}", fields).prop_map(|(method, target, fields)| {
            let (mut head, ()) = http::Request::new(()).into_parts();
            head.method = Method::from_bytes(method.as_bytes()).unwrap();
            head.uri = target.parse().unwrap();
            for (name, value) in fields {
                head.headers.append(
                    HeaderName::from_bytes(name.as_bytes()).unwrap(),
                    HeaderValue::from_str(value.trim()).unwrap(),
                );
            }
            head
        })
    }

    proptest! {
        #[test]
        fn a_request_reads_back_whatever_the_reads_it_arrives_in(head in request_head(), cut in any::<prop::sample::Index>()) {
            let mut wire = BytesMut::new();
            put_request(&mut wire, 7, &head, true).unwrap();
            put_data(&mut wire, 9, b"more", false);
            let mut input = BytesMut::new();
            let cut = cut.index(wire.len());
            let mut frames = Vec::new();
            for part in [&wire[..cut], &wire[cut..]] {
                input.extend_from_slice(part);
                while let Some(frame) = take(&mut input).unwrap() {
                    frames.push(frame);
                }
            }
            prop_assert_eq!(frames.len(), 2);
            prop_assert_eq!((frames[0].kind, frames[0].ends, frames[0].exchange), (Kind::Request, true, 7));
            prop_assert_eq!(&frames[1].payload[..], b"more");
            let read = read_request(frames[0].payload.clone()).unwrap();
            prop_assert_eq!(read.method, head.method);
            prop_assert_eq!(read.uri, head.uri);
            prop_assert_eq!(read.headers, head.headers);
        }

        #[test]
        fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut input = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = take(&mut input) {}
            let bytes = Bytes::from(bytes);
            let _outcome = (read_request(bytes.clone()), read_response(bytes.clone()), read_trailers(bytes));
        }
    }

    #[test]
    fn gateway_30_what_a_head_must_not_hold_is_refused() {
        let head = |method: &[u8], target: &[u8], fields: &[(&[u8], &[u8])]| {
            let mut out = BytesMut::new();
            put_short(&mut out, method).unwrap();
            put_long(&mut out, target).unwrap();
            out.put_u8(fields.len() as u8);
            for (name, value) in fields {
                out.put_u8(name.len() as u8);
                out.put_u16(value.len() as u16);
                out.put_slice(name);
                out.put_slice(value);
            }
            out.freeze()
        };
        assert!(read_request(head(b"GET", b"/a", &[(b"host", b"x")])).is_ok());
        for bad in [
            head(b"GE T", b"/a", &[]),
            head(b"", b"/a", &[]),
            head(b"GET", b"a", &[]),
            head(b"GET", b"http://b/a", &[]),
            head(b"GET", b"/a b", &[]),
            head(b"GET", b"/a\r\n", &[]),
            head(b"GET", b"/a", &[(b"ho st", b"x")]),
            head(b"GET", b"/a", &[(b"Host", b"x")]),
            head(b"GET", b"/a", &[(b"", b"x")]),
            head(b"GET", b"/a", &[(b":path", b"x")]),
            head(b"GET", b"/a", &[(b"x", b"a\r\nb: c")]),
            head(b"GET", b"/a", &[(b"x", b"a\0")]),
        ] {
            assert!(read_request(bad.clone()).is_err(), "{bad:?}");
        }
        let mut longer = BytesMut::from(&head(b"GET", b"/a", &[])[..]);
        longer.put_u8(0);
        assert!(read_request(longer.freeze()).is_err());
    }

    #[test]
    fn an_oversized_head_writes_nothing() {
        let (mut head, ()) = http::Request::new(()).into_parts();
        head.headers.insert("x", HeaderValue::try_from("y".repeat(MAX_HEAD_BYTES)).unwrap());
        let mut out = BytesMut::from(&b"before"[..]);
        assert_eq!(put_request(&mut out, 1, &head, true), Err(TooLarge));
        assert_eq!(&out[..], b"before");
    }
}
