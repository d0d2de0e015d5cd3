//! Heads of messages: where one ends, what it says, how its body is delimited. Strict: what two parsers could
//! read differently is an error, never repaired (RFC 9112 §11.2).

use std::mem::MaybeUninit;

use bytes::Bytes;
use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, COOKIE, EXPECT,
    HOST, HeaderMap, HeaderName, HeaderValue, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{Method, StatusCode, Uri, Version};
use thiserror::Error;

/// Headers that a head can ever have: the room on the stack that they are parsed into.
pub(super) const MAX_HEADERS: usize = 128;
/// Bytes of a request line: twice what RFC 9112 §3 asks every recipient to take.
const MAX_REQUEST_LINE_BYTES: usize = 16 * 1024;
/// Digits of a `Content-Length`: as many as fit a u64 whatever they are.
const MAX_LENGTH_DIGITS: usize = 19;

/// Why a head is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HeadError {
    /// A line that does not end in CR LF.
    #[error("a line ends in a bare LF")]
    BareLf,
    /// Not the grammar of RFC 9112: the name says what it stumbled over.
    #[error("the head is malformed: {0}")]
    Malformed(&'static str),
    /// The target has a fragment, a control byte or a byte over 0x7e.
    #[error("the request's target has bytes that no target has")]
    Target,
    /// The request line is over its limit.
    #[error("the request line is too long")]
    TargetTooLong,
    /// The head is over its limit of bytes or of headers.
    #[error("the head is too large")]
    TooLarge,
    /// Not HTTP/1.1, or for an answer not 1.0 either.
    #[error("not a version of HTTP that is spoken here")]
    Version,
    /// Two lengths, a length and an encoding, two encodings, a length that is no plain number.
    #[error("the length of the body is ambiguous")]
    AmbiguousLength,
    /// Another transfer coding than `chunked`.
    #[error("a transfer coding other than chunked")]
    TransferCoding,
    /// `Expect` with something else than `100-continue`.
    #[error("an expectation that cannot be met")]
    Expectation,
}

impl HeadError {
    /// The status that a client gets for it.
    pub fn status(self) -> StatusCode {
        match self {
            Self::TargetTooLong => StatusCode::URI_TOO_LONG,
            Self::TooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Version => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            Self::Expectation => StatusCode::EXPECTATION_FAILED,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

/// Bounds of a head.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadLimits {
    pub(super) bytes: usize,
    pub(super) headers: usize,
}

/// Looks for the empty line that ends a head, each byte once however slowly they arrive.
#[derive(Debug, Default)]
pub(super) struct HeadScan {
    seen: usize,
    line: usize,
    lines: usize,
}

impl HeadScan {
    /// The length of the head at the start of `bytes`, if it is all there. `bytes` begins where it began at
    /// the last call.
    pub(super) fn advance(&mut self, bytes: &[u8], limits: HeadLimits) -> Result<Option<usize>, HeadError> {
        for lf in memchr::memchr_iter(b'\n', bytes.get(self.seen..).unwrap_or_default()) {
            let lf = self.seen + lf;
            if lf.checked_sub(1).and_then(|cr| bytes.get(cr)) != Some(&b'\r') {
                return Err(HeadError::BareLf);
            }
            self.within(lf, limits)?;
            if lf - self.line == 1 {
                return Ok(Some(lf + 1));
            }
            self.lines += 1;
            self.line = lf + 1;
        }
        self.seen = bytes.len();
        self.within(self.seen, limits)?;
        Ok(None)
    }

    fn within(&self, len: usize, limits: HeadLimits) -> Result<(), HeadError> {
        match self.lines {
            0 if len > MAX_REQUEST_LINE_BYTES => Err(HeadError::TargetTooLong),
            lines if len >= limits.bytes || lines > limits.headers + 1 => Err(HeadError::TooLarge),
            _ => Ok(()),
        }
    }
}

/// How a message's body is delimited (RFC 9112 §6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Length {
    /// There is none, or exactly so many bytes.
    Exactly(u64),
    /// Chunks, then perhaps trailers.
    Chunked,
    /// Whatever comes until the connection ends.
    UntilClose,
}

impl Length {
    pub(super) const NONE: Self = Self::Exactly(0);
}

/// A request's head, understood.
#[derive(Debug)]
pub(super) struct RequestHead {
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
    pub(super) length: Length,
    /// `Connection: close`.
    pub(super) close: bool,
    /// `Expect: 100-continue`.
    pub(super) expects_continue: bool,
    /// Asks to go on in another protocol than HTTP, and has no body of its own.
    pub(super) upgrade: bool,
}

impl RequestHead {
    /// Reads a head that [`HeadScan`] found whole.
    pub(super) fn parse(head: &Bytes) -> Result<Self, HeadError> {
        not_empty(head)?;
        let mut room = [const { MaybeUninit::uninit() }; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut []);
        match request.parse_with_uninit_headers(head, &mut room) {
            Ok(httparse::Status::Complete(len)) if len == head.len() => {}
            Ok(_) => return Err(HeadError::Malformed("more than one head")),
            Err(error) => return Err(malformed(error)),
        }
        let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version)
        else {
            return Err(HeadError::Malformed("no request line"));
        };
        if version != 1 {
            return Err(HeadError::Version);
        }
        // `http::Uri` would cut a fragment off; what was judged has to be what was sent.
        if !target.bytes().all(|byte| matches!(byte, 0x21..=0x7e) && byte != b'#') {
            return Err(HeadError::Target);
        }
        let method = Method::from_bytes(method.as_bytes()).map_err(|_| HeadError::Malformed("method"))?;
        let uri = Uri::from_maybe_shared(head.slice_ref(target.as_bytes())).map_err(|_| HeadError::Target)?;
        let (headers, said) = fields(head, request.headers)?;
        let length = said.length()?.unwrap_or(Length::NONE);
        // With a body, whose bytes follow would depend on the answer: such an `Upgrade` is not offered on
        // (RFC 9110 §7.8 lets a server ignore it).
        let upgrade = said.upgrade && said.connection.upgrade && length == Length::NONE;
        let expects_continue = match headers.get(EXPECT) {
            None => false,
            Some(value) if value.as_bytes().eq_ignore_ascii_case(b"100-continue") => length != Length::NONE,
            Some(_) => return Err(HeadError::Expectation),
        };
        Ok(Self { method, uri, headers, length, close: said.connection.close, expects_continue, upgrade })
    }
}

/// An answer's head, understood.
#[derive(Debug)]
pub(super) struct ResponseHead {
    pub(super) status: StatusCode,
    pub(super) version: Version,
    pub(super) headers: HeaderMap,
    pub(super) length: Length,
    /// Whether another request may follow on the connection, as far as the head says.
    pub(super) keep_alive: bool,
}

impl ResponseHead {
    /// Reads the head of the answer to a `method` request.
    pub(super) fn parse(head: &Bytes, method: &Method) -> Result<Self, HeadError> {
        not_empty(head)?;
        let mut room = [const { MaybeUninit::uninit() }; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut []);
        let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(
            &mut response,
            head,
            &mut room,
        );
        match parsed {
            Ok(httparse::Status::Complete(len)) if len == head.len() => {}
            Ok(_) => return Err(HeadError::Malformed("more than one head")),
            Err(error) => return Err(malformed(error)),
        }
        let version = match response.version {
            Some(0) => Version::HTTP_10,
            Some(1) => Version::HTTP_11,
            _ => return Err(HeadError::Version),
        };
        let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
        let status = status.ok_or(HeadError::Malformed("status"))?;
        let (headers, said) = fields(head, response.headers)?;
        let announced = said.length()?;
        if version == Version::HTTP_10 && announced == Some(Length::Chunked) {
            return Err(HeadError::AmbiguousLength);
        }
        let keep_alive = version == Version::HTTP_11 && !said.connection.close;
        let length = match announced {
            _ if *method == Method::HEAD || bodiless(status) => Length::NONE,
            Some(length) => length,
            None => Length::UntilClose,
        };
        Ok(Self { status, version, headers, length, keep_alive })
    }
}

/// Statuses whose messages end with their head (RFC 9110 §6.4.1).
pub(super) fn bodiless(status: StatusCode) -> bool {
    status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// Whether a field may follow its body: none may that would change how the message is delimited, routed or
/// understood after it has been (RFC 9110 §6.5.1).
pub(super) fn is_trailer(name: &HeaderName) -> bool {
    !matches!(
        *name,
        AUTHORIZATION
            | CONNECTION
            | CONTENT_ENCODING
            | CONTENT_LENGTH
            | CONTENT_RANGE
            | CONTENT_TYPE
            | COOKIE
            | EXPECT
            | HOST
            | SET_COOKIE
            | TE
            | TRAILER
            | TRANSFER_ENCODING
            | UPGRADE
    )
}

/// Reads the fields after the last chunk, up to and with the empty line.
pub(super) fn parse_trailers(bytes: &Bytes) -> Result<HeaderMap, HeadError> {
    let mut room = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let (len, parsed) = match httparse::parse_headers(bytes, &mut room) {
        Ok(httparse::Status::Complete(parsed)) => parsed,
        Ok(httparse::Status::Partial) => return Err(HeadError::Malformed("trailers")),
        Err(error) => return Err(malformed(error)),
    };
    if len != bytes.len() {
        return Err(HeadError::Malformed("trailers"));
    }
    let (trailers, _) = fields(bytes, parsed)?;
    if !trailers.keys().all(is_trailer) {
        return Err(HeadError::Malformed("a trailer that would change how the message is read"));
    }
    Ok(trailers)
}

/// What the fields that delimit a message say.
#[derive(Debug, Default)]
struct Said {
    content_length: Option<u64>,
    lengths: usize,
    chunked: bool,
    codings: usize,
    connection: ConnectionOptions,
    upgrade: bool,
}

#[derive(Debug, Default)]
struct ConnectionOptions {
    close: bool,
    upgrade: bool,
}

impl Said {
    fn length(&self) -> Result<Option<Length>, HeadError> {
        match (self.lengths, self.codings) {
            (0, 0) => Ok(None),
            (1, 0) => Ok(Some(Length::Exactly(self.content_length.ok_or(HeadError::AmbiguousLength)?))),
            (0, 1) if self.chunked => Ok(Some(Length::Chunked)),
            (0, 1) => Err(HeadError::TransferCoding),
            _ => Err(HeadError::AmbiguousLength),
        }
    }
}

fn fields(head: &Bytes, parsed: &[httparse::Header<'_>]) -> Result<(HeaderMap, Said), HeadError> {
    let mut headers = HeaderMap::with_capacity(parsed.len());
    let mut said = Said::default();
    for field in parsed {
        let name =
            HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| HeadError::Malformed("header name"))?;
        // Values share the head's memory instead of being copied one by one.
        let value = HeaderValue::from_maybe_shared(head.slice_ref(field.value))
            .map_err(|_| HeadError::Malformed("header value"))?;
        match name {
            CONTENT_LENGTH => {
                said.lengths += 1;
                said.content_length = content_length(&value);
            }
            TRANSFER_ENCODING => {
                said.codings += 1;
                said.chunked = value.as_bytes().eq_ignore_ascii_case(b"chunked");
            }
            CONNECTION => said.connection.read(&value),
            // HTTP/2 comes by its preface, never by an upgrade (RFC 9113 §3.1 gave that up).
            UPGRADE => said.upgrade = !value.as_bytes().eq_ignore_ascii_case(b"h2c"),
            _ => {}
        }
        headers.append(name, value);
    }
    Ok((headers, said))
}

impl ConnectionOptions {
    fn read(&mut self, value: &HeaderValue) {
        for option in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            self.close |= option.eq_ignore_ascii_case(b"close");
            self.upgrade |= option.eq_ignore_ascii_case(b"upgrade");
        }
    }
}

/// Whether `Connection` asks for this connection's end.
pub(super) fn asks_to_close(headers: &HeaderMap) -> bool {
    let mut options = ConnectionOptions::default();
    headers.get_all(CONNECTION).iter().for_each(|value| options.read(value));
    options.close
}

/// A plain decimal number: no sign, no space, no list, no leading zero that somebody reads as octal.
pub(super) fn content_length(value: &HeaderValue) -> Option<u64> {
    let digits = value.as_bytes();
    let plain = !digits.is_empty()
        && digits.len() <= MAX_LENGTH_DIGITS
        && digits.iter().all(u8::is_ascii_digit)
        && (digits.len() == 1 || digits.first() != Some(&b'0'));
    if !plain {
        return None;
    }
    Some(digits.iter().fold(0, |length: u64, digit| length * 10 + u64::from(digit - b'0')))
}

/// httparse skips empty lines before a head; to another parser they are the head.
fn not_empty(head: &[u8]) -> Result<(), HeadError> {
    match head.first() {
        None | Some(b'\r' | b'\n') => Err(HeadError::Malformed("an empty line before the head")),
        Some(_) => Ok(()),
    }
}

fn malformed(error: httparse::Error) -> HeadError {
    match error {
        httparse::Error::Version => HeadError::Version,
        httparse::Error::TooManyHeaders => HeadError::TooLarge,
        httparse::Error::HeaderName => HeadError::Malformed("header name"),
        httparse::Error::HeaderValue => HeadError::Malformed("header value"),
        httparse::Error::NewLine => HeadError::Malformed("line end"),
        httparse::Error::Status => HeadError::Malformed("status"),
        httparse::Error::Token => HeadError::Malformed("token"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: HeadLimits = HeadLimits { bytes: 64 * 1024, headers: 100 };

    /// The first head of `bytes`, as a connection reads it that gets `step` bytes at a time.
    fn request(bytes: &[u8], step: usize) -> Result<Option<RequestHead>, HeadError> {
        let mut scan = HeadScan::default();
        for end in (0..bytes.len()).step_by(step.max(1)).skip(1).chain([bytes.len()]) {
            if let Some(len) = scan.advance(&bytes[..end], LIMITS)? {
                return RequestHead::parse(&Bytes::copy_from_slice(&bytes[..len])).map(Some);
            }
        }
        Ok(None)
    }

    fn response(bytes: &str, method: &Method) -> Result<ResponseHead, HeadError> {
        let len = HeadScan::default().advance(bytes.as_bytes(), LIMITS)?.unwrap();
        ResponseHead::parse(&Bytes::copy_from_slice(&bytes.as_bytes()[..len]), method)
    }

    #[test]
    fn gateway_30_security_21_smuggled_requests_are_refused() {
        use HeadError::*;
        let cases: &[(&str, HeadError)] = &[
            ("GET / HTTP/1.1\nhost: a\r\n\r\n", BareLf),
            ("GET / HTTP/1.1\r\nhost: a\n\r\n", BareLf),
            ("GET / HTTP/1.1\r\nhost: a\r\n\n", BareLf),
            ("\nGET / HTTP/1.1\r\nhost: a\r\n\r\n", BareLf),
            ("\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n", Malformed("an empty line before the head")),
            ("GET / HTTP/1.1\r\nhost: a\r\n b: c\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\nhost: a\r\n\tb: c\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\n host: a\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\nhost : a\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\nhost\t: a\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\n: a\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\nhost\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\nh(st: a\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\nh\u{e9}st: a\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\nho\0st: a\r\n\r\n", Malformed("header name")),
            ("GET / HTTP/1.1\r\nhost: a\rb: c\r\n\r\n", Malformed("header value")),
            ("GET / HTTP/1.1\r\nhost: a\r\r\n\r\n", Malformed("header value")),
            ("GET / HTTP/1.1\r\nhost: a\0\r\n\r\n", Malformed("header value")),
            ("GET / HTTP/1.1\r\nhost: a\x0bb\r\n\r\n", Malformed("header value")),
            ("GET / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: 3, 3\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: +3\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: -3\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: 3 3\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: 0x3\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: 010\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length:\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: 18446744073709551617\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ncontent-length: 3;\r\n\r\n", AmbiguousLength),
            ("GET / HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n\r\n", TransferCoding),
            ("GET / HTTP/1.1\r\ntransfer-encoding: chunked, identity\r\n\r\n", TransferCoding),
            ("GET / HTTP/1.1\r\ntransfer-encoding: identity\r\n\r\n", TransferCoding),
            ("GET / HTTP/1.1\r\ntransfer-encoding: xchunked\r\n\r\n", TransferCoding),
            ("GET / HTTP/1.1\r\ntransfer-encoding: \"chunked\"\r\n\r\n", TransferCoding),
            ("GET / HTTP/1.1\r\ntransfer-encoding:\r\n\r\n", TransferCoding),
            ("GET / HTTP/1.1\r\ntransfer-encoding: x\r\ntransfer-encoding: chunked\r\n\r\n", AmbiguousLength),
            (
                "GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
                AmbiguousLength,
            ),
            ("GET / HTTP/1.1\r\ntransfer-encoding: \x0bchunked\r\n\r\n", Malformed("header value")),
            ("GET /\r\n\r\n", Malformed("token")),
            ("GET / HTTP/0.9\r\nhost: a\r\n\r\n", Version),
            ("GET / HTTP/1.0\r\nhost: a\r\n\r\n", Version),
            ("GET / HTTP/1.2\r\nhost: a\r\n\r\n", Version),
            ("GET / HTTP/2.0\r\nhost: a\r\n\r\n", Version),
            ("GET / http/1.1\r\nhost: a\r\n\r\n", Version),
            ("GET  / HTTP/1.1\r\nhost: a\r\n\r\n", Malformed("token")),
            ("GET /  HTTP/1.1\r\nhost: a\r\n\r\n", Version),
            ("GET / HTTP/1.1 \r\nhost: a\r\n\r\n", Malformed("line end")),
            ("GET\t/ HTTP/1.1\r\nhost: a\r\n\r\n", Malformed("token")),
            ("G=T / HTTP/1.1\r\nhost: a\r\n\r\n", Malformed("token")),
            ("GET /a#b HTTP/1.1\r\nhost: a\r\n\r\n", Target),
            ("GET /\u{e9} HTTP/1.1\r\nhost: a\r\n\r\n", Target),
            ("GET /\x7f HTTP/1.1\r\nhost: a\r\n\r\n", Malformed("token")),
            ("POST / HTTP/1.1\r\nexpect: 200-ok\r\ncontent-length: 3\r\n\r\n", Expectation),
        ];
        for (bytes, expected) in cases {
            for step in [1, 2, 7, bytes.len()] {
                assert_eq!(request(bytes.as_bytes(), step).unwrap_err(), *expected, "{bytes:?}");
            }
        }
    }

    #[test]
    fn security_21_smuggled_answers_are_refused() {
        use HeadError::*;
        let cases: &[(&str, HeadError)] = &[
            ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", AmbiguousLength),
            ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\n", AmbiguousLength),
            ("HTTP/1.1 200 OK\r\ncontent-length: 3,3\r\n\r\n", AmbiguousLength),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n", TransferCoding),
            ("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", AmbiguousLength),
            ("HTTP/1.1 200 OK\nserver: a\r\n\r\n", BareLf),
            ("HTTP/1.1 200 OK\r\nserver: a\r\n b\r\n\r\n", Malformed("header name")),
            ("HTTP/1.1 200 OK\r\nserver : a\r\n\r\n", Malformed("header name")),
            ("HTTP/1.1 200 O\rK\r\n\r\n", Malformed("status")),
            ("HTTP/1.1 2000 OK\r\n\r\n", Malformed("status")),
            ("HTTP/1.1 099 OK\r\n\r\n", Malformed("status")),
            ("HTTP/1.1  200 OK\r\n\r\n", Malformed("status")),
            ("HTTP/2 200\r\n\r\n", Version),
            ("ICY 200 OK\r\n\r\n", Version),
            ("\r\nHTTP/1.1 200 OK\r\n\r\n", Malformed("an empty line before the head")),
        ];
        for (bytes, expected) in cases {
            assert_eq!(response(bytes, &Method::GET).unwrap_err(), *expected, "{bytes:?}");
        }
    }

    #[test]
    fn a_body_is_delimited_as_the_rfc_says() {
        let length = |head: &str, method: &Method| response(head, method).unwrap().length;
        let (get, head) = (Method::GET, Method::HEAD);
        assert_eq!(length("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", &get), Length::Exactly(3));
        assert_eq!(length("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", &head), Length::NONE);
        assert_eq!(length("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n", &get), Length::Chunked);
        assert_eq!(length("HTTP/1.1 200\r\n\r\n", &get), Length::UntilClose);
        assert_eq!(length("HTTP/1.0 200 \r\n\r\n", &get), Length::UntilClose);
        for status in [100, 103, 204, 304] {
            let head = format!("HTTP/1.1 {status} X\r\ncontent-length: 3\r\n\r\n");
            assert_eq!(length(&head, &get), Length::NONE);
        }
        assert!(!response("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n\r\n", &get).unwrap().keep_alive);
        assert!(!response("HTTP/1.1 200 OK\r\nconnection: x, Close\r\n\r\n", &get).unwrap().keep_alive);
        assert!(response("HTTP/1.1 200 OK\r\n\r\n", &get).unwrap().keep_alive);
    }

    #[test]
    fn a_head_is_bounded_before_it_is_whole() {
        let refused = |bytes: String| request(bytes.as_bytes(), 1000).unwrap_err();
        assert_eq!(refused(format!("GET /{}", "a".repeat(MAX_REQUEST_LINE_BYTES))), HeadError::TargetTooLong);
        let head = "GET / HTTP/1.1\r\nhost: a\r\n";
        assert_eq!(refused(format!("{head}x: {}", "a".repeat(LIMITS.bytes))), HeadError::TooLarge);
        assert_eq!(refused(format!("{head}{}", "x: a\r\n".repeat(LIMITS.headers))), HeadError::TooLarge);
        let most = format!("{head}{}\r\n", "x: a\r\n".repeat(LIMITS.headers - 1));
        assert_eq!(request(most.as_bytes(), 1000).unwrap().unwrap().headers.len(), LIMITS.headers);
    }

    #[test]
    fn an_upgrade_is_offered_on_only_where_it_is_one() {
        let upgrade = |fields: &str| {
            let head = format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
            request(head.as_bytes(), 1000).unwrap().unwrap().upgrade
        };
        assert!(upgrade("connection: keep-alive, Upgrade\r\nupgrade: websocket\r\n"));
        assert!(!upgrade("upgrade: websocket\r\n"));
        assert!(!upgrade("connection: upgrade\r\n"));
        assert!(!upgrade("connection: upgrade, http2-settings\r\nupgrade: h2c\r\n"));
        assert!(!upgrade("connection: upgrade\r\nupgrade: websocket\r\ncontent-length: 3\r\n"));
    }

    fn valid_head() -> impl Strategy<Value = String> {
        let field = ("[a-zA-Z][a-zA-Z0-9-]{0,20}", "[!-~]([ -~]{0,30}[!-~])?");
        ("GET|POST|PURGE|[A-Z]{1,8}", "/[a-z0-9/%.?=&-]{0,40}", proptest::collection::vec(field, 0..20))
            .prop_map(|(method, target, fields)| {
                let mut head = format!("{method} {target} HTTP/1.1\r\nhost: a\r\n");
                for (name, value) in fields {
                    // A prefix keeps the names clear of those that delimit the message.
                    head.push_str(&format!("x-{name}: {value}\r\n"));
                }
                head.push_str("\r\n");
                head
            })
    }

    proptest! {
        #[test]
        fn a_valid_head_reads_the_same_however_it_is_split(head in valid_head(), rest in any::<Vec<u8>>()) {
            let whole = request(head.as_bytes(), head.len()).unwrap().unwrap();
            let shown = format!("{whole:?}");
            let mut bytes = head.clone().into_bytes();
            bytes.extend_from_slice(&rest);
            for step in 1..head.len() {
                let split = request(&bytes, step).unwrap().unwrap();
                prop_assert_eq!(format!("{split:?}"), shown.clone());
            }
            let mut lines = head.split("\r\n");
            let said = format!("{} {} HTTP/1.1", whole.method, whole.uri);
            prop_assert_eq!(lines.next(), Some(said.as_str()));
            prop_assert_eq!(whole.headers.len(), head.matches("\r\n").count() - 2);
        }

        #[test]
        fn no_bytes_panic(bytes in any::<Vec<u8>>(), step in 1_usize..64) {
            let _outcome = request(&bytes, step).is_ok();
            let _outcome = ResponseHead::parse(&Bytes::from(bytes.clone()), &Method::GET).is_ok();
            let _outcome = RequestHead::parse(&Bytes::from(bytes.clone())).is_ok();
            let _outcome = parse_trailers(&Bytes::from(bytes)).is_ok();
        }

        #[test]
        fn a_valid_head_with_a_byte_replaced_is_refused_or_whole(
            head in valid_head(), at in any::<prop::sample::Index>(), byte in any::<u8>()
        ) {
            let mut bytes = head.into_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(Some(head)) = request(&bytes, 1) {
                let bare = |value: &HeaderValue| value.as_bytes().iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0));
                prop_assert!(!head.headers.values().any(bare));
            }
        }
    }
}
