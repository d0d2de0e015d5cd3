//! The writing half of a connection: a head, then its body as it comes, in as few writes as can be.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, TRANSFER_ENCODING, UPGRADE,
};
use http::{Method, StatusCode, request, response};
use http_body::{Body as _, Frame};
use thiserror::Error;
use tokio::io::AsyncWrite;

use super::head::{asks_to_close, bodiless, content_length, is_trailer};
use super::pace::{Pace, Timer};
use crate::{Body, BoxError};

/// Frames up to this are copied behind the head or behind each other; larger ones are written from where
/// they are.
const MAX_COPIED_BYTES: usize = 16 * 1024;
/// What is gathered of frames that are ready before it is written.
const GATHER_BYTES: usize = 32 * 1024;
/// What a message's head usually takes.
const FIRST_BUFFER_BYTES: usize = 1024;

/// Why a message could not be written whole.
#[derive(Debug, Error)]
pub(super) enum SendError {
    #[error("the connection broke: {0}")]
    Io(#[source] io::Error),
    #[error("the peer takes what is sent to it too slowly")]
    Slow,
    #[error("the body failed: {0}")]
    Body(#[source] BoxError),
    #[error("the body is not as long as was announced")]
    BodyLength,
}

/// A request that cannot be put on a connection of HTTP/1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoTarget;

/// How the body on its way out is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delimiting {
    Exactly(u64),
    Chunked,
    /// As it is, after an upgrade: its end is the connection's.
    Raw,
}

/// One message on its way out, and the buffer for the next.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Written in this order: `bytes`, `frame`, `tail`. `written` counts over all three.
    bytes: Vec<u8>,
    frame: Bytes,
    tail: &'static [u8],
    written: usize,
    body: Option<Body>,
    delimiting: Delimiting,
    pace: Pace,
    timer: Timer,
    /// Bytes of this message that the connection has taken.
    sent: u64,
}

impl Default for Outgoing {
    fn default() -> Self {
        Self {
            bytes: Vec::new(),
            frame: Bytes::new(),
            tail: b"",
            written: 0,
            body: None,
            delimiting: Delimiting::Exactly(0),
            pace: Pace::default(),
            timer: Timer::default(),
            sent: 0,
        }
    }
}

impl Outgoing {
    /// Begins a request. `Content-Length`, `Transfer-Encoding`, `Connection` and `Expect` are written as the
    /// body and this connection need them, not as they stand in `parts`.
    ///
    /// Returns the body where it has to wait for the answer: to a request for an upgrade.
    pub(super) fn request(&mut self, parts: &request::Parts, body: Body) -> Result<Option<Body>, NoTarget> {
        let target = parts.uri.path_and_query().ok_or(NoTarget)?.as_str();
        if parts.method == Method::CONNECT || target.is_empty() {
            return Err(NoTarget);
        }
        self.begin();
        self.put(&[parts.method.as_str().as_bytes(), b" ", target.as_bytes(), b" HTTP/1.1\r\n"]);
        if !parts.headers.contains_key(HOST) {
            let host = parts.uri.authority().ok_or(NoTarget)?;
            self.put(&[b"host: ", host.as_str().as_bytes(), b"\r\n"]);
        }
        let upgrade = parts.headers.contains_key(UPGRADE);
        self.fields(&parts.headers, |name| *name != EXPECT);
        if upgrade {
            // What follows belongs to the other protocol, once the answer says that it is spoken.
            self.put(&[b"connection: upgrade\r\n\r\n"]);
            return Ok(Some(body));
        }
        let no_body_means_none =
            !matches!(parts.method, Method::POST | Method::PUT | Method::PATCH) && exact(&body) == Some(0);
        self.delimit(&parts.headers, &body, no_body_means_none);
        self.put(&[b"\r\n"]);
        self.body = Some(body);
        Ok(None)
    }

    /// Begins an answer; `head_only` leaves its body out, `close` ends the connection after it.
    ///
    /// Returns whether the connection can carry another one.
    pub(super) fn response(
        &mut self,
        parts: &response::Parts,
        body: Body,
        head_only: bool,
        close: bool,
    ) -> bool {
        let close = close || asks_to_close(&parts.headers);
        let switching = parts.status == StatusCode::SWITCHING_PROTOCOLS;
        self.begin();
        self.status_line(parts.status);
        self.fields(&parts.headers, |name| switching || *name != UPGRADE);
        if switching {
            self.put(&[b"connection: upgrade\r\n"]);
            self.delimiting = Delimiting::Raw;
            self.body = Some(body);
        } else if head_only || bodiless(parts.status) {
            self.announce_unsent(parts, &body);
        } else {
            self.delimit(&parts.headers, &body, false);
            self.body = Some(body);
        }
        self.put(&[if close && !switching { b"connection: close\r\n\r\n".as_slice() } else { b"\r\n" }]);
        !close && !switching
    }

    /// Begins an answer that says nothing but its status, and that the connection ends.
    pub(super) fn refusal(&mut self, status: StatusCode) {
        self.begin();
        self.status_line(status);
        self.put(&[b"content-length: 0\r\nconnection: close\r\n\r\n"]);
    }

    /// Begins `100 Continue`.
    pub(super) fn interim(&mut self) {
        self.begin();
        self.status_line(StatusCode::CONTINUE);
        self.put(&[b"\r\n"]);
    }

    /// Begins what follows an upgrade.
    pub(super) fn raw(&mut self, body: Body) {
        self.begin();
        self.delimiting = Delimiting::Raw;
        self.body = Some(body);
    }

    /// Whether everything of this message is with the connection.
    pub(super) fn is_done(&self) -> bool {
        self.body.is_none() && self.written == self.len()
    }

    /// Bytes of this message that the connection has taken.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether the whole message is in memory, so that it can be sent again.
    pub(super) fn is_whole(&self) -> bool {
        self.body.as_ref().is_none_or(|body| body.whole().is_some())
    }

    /// Goes back to the start of a message that [was whole](Self::is_whole).
    pub(super) fn rewind(&mut self) {
        self.written = 0;
        self.sent = 0;
    }

    /// Lets a sent message go; the buffer stays.
    pub(super) fn clear(&mut self) {
        self.begin();
    }

    /// Gives the buffer back.
    pub(super) fn release(&mut self) {
        self.begin();
        self.bytes = Vec::new();
    }

    /// Writes on. Ready when everything is with the connection; pending while the body or the peer makes it
    /// wait, with nothing held back that could be written.
    pub(super) fn poll_send<W: AsyncWrite + Unpin>(
        &mut self,
        writer: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SendError>> {
        loop {
            self.gather(cx)?;
            if self.written == self.len() {
                if self.body.is_some() {
                    // Nothing to send: nobody waits for the peer.
                    self.pace.pause();
                    ready!(Pin::new(writer).poll_flush(cx)).map_err(SendError::Io)?;
                    return Poll::Pending;
                }
                return Pin::new(writer).poll_flush(cx).map_err(SendError::Io);
            }
            match self.poll_write(writer, cx) {
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(SendError::Io(io::ErrorKind::WriteZero.into())));
                }
                Poll::Ready(Ok(written)) => {
                    self.written += written;
                    self.sent += written as u64;
                    self.pace.moved(written);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(SendError::Io(error))),
                Poll::Pending => {
                    ready!(self.pace.poll_too_slow(&mut self.timer, cx));
                    return Poll::Ready(Err(SendError::Slow));
                }
            }
        }
    }

    fn poll_write<W: AsyncWrite + Unpin>(
        &self,
        writer: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let bytes = self.bytes.get(self.written..).unwrap_or_default();
        if self.frame.is_empty() {
            return Pin::new(writer).poll_write(cx, bytes);
        }
        let mut slices = [IoSlice::new(&self.bytes), IoSlice::new(&self.frame), IoSlice::new(self.tail)];
        let mut slices = slices.as_mut_slice();
        IoSlice::advance_slices(&mut slices, self.written);
        Pin::new(writer).poll_write_vectored(cx, slices)
    }

    /// Takes what is ready of the body, until that is worth a write.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<(), SendError> {
        while let Some(body) = &mut self.body {
            if !self.frame.is_empty() {
                // A large frame goes out as it is, before anything follows it.
                if self.written < self.len() {
                    return Ok(());
                }
                self.drop_written();
                continue;
            }
            if self.bytes.len() - self.written >= GATHER_BYTES {
                return Ok(());
            }
            if self.written >= GATHER_BYTES {
                // A peer that always leaves something unwritten would have the buffer grow for ever.
                self.bytes.drain(..self.written);
                self.written = 0;
            }
            match Pin::new(body).poll_frame(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Some(Ok(frame))) => self.put_frame(frame)?,
                Poll::Ready(Some(Err(error))) => return Err(SendError::Body(error)),
                Poll::Ready(None) => self.put_end(None)?,
            }
        }
        Ok(())
    }

    fn put_frame(&mut self, frame: Frame<Bytes>) -> Result<(), SendError> {
        let data = match frame.into_data() {
            Ok(data) if data.is_empty() => return Ok(()),
            Ok(data) => data,
            Err(frame) => return self.put_end(frame.into_trailers().ok()),
        };
        if self.written > 0 && self.written == self.len() {
            self.drop_written();
        }
        match &mut self.delimiting {
            Delimiting::Exactly(left) => {
                *left = left.checked_sub(data.len() as u64).ok_or(SendError::BodyLength)?;
            }
            Delimiting::Chunked => {
                self.put_chunk_size(data.len());
            }
            Delimiting::Raw => {}
        }
        let tail: &[u8] = if self.delimiting == Delimiting::Chunked { b"\r\n" } else { b"" };
        if data.len() <= MAX_COPIED_BYTES {
            self.put(&[&data, tail]);
        } else {
            self.frame = data;
            self.tail = tail;
        }
        // The end of a body that says so itself goes out with its last frame.
        let at_end = self.delimiting == Delimiting::Exactly(0)
            || self.frame.is_empty() && self.body.as_ref().is_some_and(|body| body.is_end_stream());
        if at_end { self.put_end(None) } else { Ok(()) }
    }

    fn put_end(&mut self, trailers: Option<HeaderMap>) -> Result<(), SendError> {
        self.body = None;
        match self.delimiting {
            Delimiting::Exactly(0) | Delimiting::Raw => Ok(()),
            Delimiting::Exactly(_) => Err(SendError::BodyLength),
            Delimiting::Chunked => {
                if self.written > 0 && self.written == self.len() {
                    self.drop_written();
                }
                self.put(&[b"0\r\n"]);
                if let Some(trailers) = trailers {
                    self.fields(&trailers, is_trailer);
                }
                self.put(&[b"\r\n"]);
                Ok(())
            }
        }
    }

    fn begin(&mut self) {
        self.drop_written();
        self.body = None;
        self.delimiting = Delimiting::Exactly(0);
        self.pace = Pace::default();
        self.sent = 0;
        if self.bytes.capacity() == 0 {
            self.bytes.reserve(FIRST_BUFFER_BYTES);
        }
    }

    fn drop_written(&mut self) {
        self.bytes.clear();
        self.frame = Bytes::new();
        self.tail = b"";
        self.written = 0;
    }

    fn len(&self) -> usize {
        self.bytes.len() + self.frame.len() + self.tail.len()
    }

    fn put(&mut self, parts: &[&[u8]]) {
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
    }

    fn put_number(&mut self, number: u64) {
        self.bytes.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }

    fn put_chunk_size(&mut self, size: usize) {
        let digits = (usize::BITS - size.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            let digit = (size >> (4 * digit) & 0xf) as u32;
            self.bytes.push(char::from_digit(digit, 16).unwrap_or('0') as u8);
        }
        self.put(&[b"\r\n"]);
    }

    fn status_line(&mut self, status: StatusCode) {
        let reason = status.canonical_reason().unwrap_or_default();
        self.put(&[b"HTTP/1.1 ", status.as_str().as_bytes(), b" ", reason.as_bytes(), b"\r\n"]);
    }

    /// Writes the fields that `keep` keeps; never those that delimit the message or speak of the connection.
    fn fields(&mut self, headers: &HeaderMap, keep: impl Fn(&HeaderName) -> bool) {
        for (name, value) in headers {
            let ours = matches!(*name, CONNECTION | CONTENT_LENGTH | TRANSFER_ENCODING);
            if !ours && name != "keep-alive" && keep(name) {
                self.put(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
            }
        }
    }

    /// Announces the body: its exact length where that is known, chunks where it is not.
    fn delimit(&mut self, headers: &HeaderMap, body: &Body, none: bool) {
        let length = exact(body).or_else(|| single_length(headers));
        self.delimiting = length.map_or(Delimiting::Chunked, Delimiting::Exactly);
        match length {
            Some(_) if none => {}
            Some(length) => self.put_length(length),
            None => self.put(&[b"transfer-encoding: chunked\r\n"]),
        }
    }

    /// Announces a body that is not sent: to a HEAD request, and what a 304 says of what it confirms.
    fn announce_unsent(&mut self, parts: &response::Parts, body: &Body) {
        if parts.status.is_informational() || parts.status == StatusCode::NO_CONTENT {
            return;
        }
        let length = single_length(&parts.headers).or_else(|| exact(body).filter(|length| *length > 0));
        if let Some(length) = length {
            self.put_length(length);
        }
    }

    fn put_length(&mut self, length: u64) {
        self.put(&[b"content-length: "]);
        self.put_number(length);
        self.put(&[b"\r\n"]);
    }
}

fn exact(body: &Body) -> Option<u64> {
    body.size_hint().exact()
}

fn single_length(headers: &HeaderMap) -> Option<u64> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    match (lengths.next(), lengths.next()) {
        (Some(length), None) => content_length(length),
        _ => None,
    }
}
