//! What travels on a `palisade-tcp/1` connection: sessions, one after the other, each one client's connection.
//!
//! TLS 1.3 with client certificates proves who is at both ends, once. Then the client side opens a session, both
//! sides send, each says when it has finished, and the same TLS connection is ready for the next session:
//! a handshake costs both ends a hundred times what a session does. A frame is four bytes of head and a body:
//!
//! ```text
//! byte 0     kind
//! byte 1-3   length of the body, big endian
//!
//! kind 1  OPEN    version (1), port's name length (1), name, source family (0, 4 or 6), [address, port]
//! kind 2  ANSWER  status (0 open, 1 denied, 2 app down, 3 not ready, 4 malformed), the receipt's text
//! kind 3  DATA    1 to 16,777,215 bytes
//! kind 4  FIN     empty: this side sends no more in this session
//! ```
//!
//! - The client sends OPEN and its data at once, without waiting; it opens no second session before FIN was sent
//!   and received. The port's name is what policies call it; empty means the service's only one. The source is
//!   where the client's client came from: for the log, never for a decision.
//! - The server dials the app when OPEN is permitted, whether or not data has come: in many protocols it speaks
//!   first. ANSWER precedes all else it sends; if all is well it may be held until the app's first byte, so that both
//!   leave as one. Any status but 0 ends the connection.
//! - A session that cannot go on (the app's or the client's connection was reset) ends the TCP connection without
//!   a TLS close_notify, which its peer takes for a reset too: a stream that was cut short is never
//!   passed off as a whole one.
//! - A close_notify comes between sessions only. If one crosses an OPEN, that session was not begun: the client
//!   sends what it has sent again, over another connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use thiserror::Error;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::copy::Side;
use crate::pieces;

/// ALPN of plain connections between sidecars.
pub const ALPN_TCP: &[u8] = b"palisade-tcp/1";
/// Version of OPEN.
const VERSION: u8 = 1;
/// A port's name is a name of a policy's object, not a document.
pub const MAX_PORT_NAME_BYTES: usize = 63;
/// Version, name and source.
const MAX_OPEN_BYTES: usize = 2 + MAX_PORT_NAME_BYTES + 1 + 16 + 2;
/// Status and receipt.
const MAX_ANSWER_BYTES: usize = 1 + 128;
pub(super) const HEAD_BYTES: usize = 4;
/// Longest body that a head can announce.
const MAX_DATA_BYTES: usize = (1 << 24) - 1;
/// Sent bytes that are kept until the other side has answered, so that a session which it never began can be
/// begun elsewhere: a request of most protocols.
const MAX_KEPT_BYTES: usize = 16 * 1024;

const OPEN: u8 = 1;
const ANSWER: u8 = 2;
const DATA: u8 = 3;
const FIN: u8 = 4;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenFrame {
    /// The port's name in policies; empty: the service's only one.
    pub port: String,
    /// Where the client's own client came from.
    pub source: Option<SocketAddr>,
}

/// How a server answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Bytes flow.
    Open,
    /// A policy, or the map, denies it.
    Denied,
    /// The app does not accept connections.
    AppDown,
    /// The sidecar has no identity of its own or is ending.
    NotReady,
    /// The opening was not understood, or names no port of this service.
    Malformed,
}

impl Status {
    fn byte(self) -> u8 {
        match self {
            Self::Open => 0,
            Self::Denied => 1,
            Self::AppDown => 2,
            Self::NotReady => 3,
            Self::Malformed => 4,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Open, Self::Denied, Self::AppDown, Self::NotReady, Self::Malformed]
            .into_iter()
            .find(|status| status.byte() == byte)
    }

    /// Its name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Denied => "denied",
            Self::AppDown => "app_down",
            Self::NotReady => "not_ready",
            Self::Malformed => "malformed",
        }
    }
}

/// Why a session ended that should have gone on. Carried by an [`io::Error`].
#[derive(Debug, Error)]
pub enum SessionError {
    /// The server will not have it.
    #[error("the other sidecar answered {}", .status.as_str())]
    Refused {
        /// Why, as far as the peer is told.
        status: Status,
        /// What the operator may ask about.
        receipt: String,
    },
    /// The connection was closed before the session began: it may be begun elsewhere.
    #[error("the connection was closed before the session began")]
    NotBegun,
    /// The other side does not speak this protocol.
    #[error("the other sidecar broke the protocol: {0}")]
    Protocol(&'static str),
}

impl From<SessionError> for io::Error {
    fn from(error: SessionError) -> Self {
        io::Error::other(error)
    }
}

impl SessionError {
    /// The session's own account in an error of a stream, if it has one.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl OpenFrame {
    /// The frame, head included.
    pub fn encode(&self) -> Vec<u8> {
        let name = self.port.as_bytes();
        let name = name.get(..name.len().min(MAX_PORT_NAME_BYTES)).unwrap_or_default();
        let mut body = vec![VERSION, u8::try_from(name.len()).unwrap_or_default()];
        body.extend_from_slice(name);
        match self.source {
            None => body.push(0),
            Some(source) => {
                match source.ip() {
                    IpAddr::V4(ip) => {
                        body.push(4);
                        body.extend_from_slice(&ip.octets());
                    }
                    IpAddr::V6(ip) => {
                        body.push(6);
                        body.extend_from_slice(&ip.octets());
                    }
                }
                body.extend_from_slice(&source.port().to_be_bytes());
            }
        }
        let mut frame = head(OPEN, body.len()).to_vec();
        frame.append(&mut body);
        frame
    }

    /// The body of an OPEN.
    pub fn decode(body: &[u8]) -> Result<Self, SessionError> {
        let malformed = || SessionError::Protocol("the opening is malformed");
        let (&[version, length], rest) = body.split_first_chunk::<2>().ok_or_else(malformed)?;
        if version != VERSION {
            return Err(SessionError::Protocol("the opening has another version"));
        }
        let (name, rest) = rest.split_at_checked(length.into()).ok_or_else(malformed)?;
        if name.len() > MAX_PORT_NAME_BYTES || !name.iter().copied().all(is_name_byte) {
            return Err(SessionError::Protocol("the port's name is malformed"));
        }
        let port = String::from_utf8(name.to_vec()).map_err(|_| malformed())?;
        let (&family, rest) = rest.split_first().ok_or_else(malformed)?;
        let with_port = |ip: IpAddr, port: &[u8]| {
            let port =
                port.first_chunk::<2>().filter(|chunk| chunk.len() == port.len()).ok_or_else(malformed)?;
            Ok(SocketAddr::new(ip, u16::from_be_bytes(*port)))
        };
        let source = match family {
            0 if rest.is_empty() => None,
            4 => {
                let (ip, port) = rest.split_first_chunk::<4>().ok_or_else(malformed)?;
                Some(with_port(Ipv4Addr::from(*ip).into(), port)?)
            }
            6 => {
                let (ip, port) = rest.split_first_chunk::<16>().ok_or_else(malformed)?;
                Some(with_port(Ipv6Addr::from(*ip).into(), port)?)
            }
            _ => return Err(malformed()),
        };
        Ok(Self { port, source })
    }
}

/// Whether a byte may stand in a port's name.
pub fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_' | b'.')
}

fn head(kind: u8, length: usize) -> [u8; HEAD_BYTES] {
    let [_, a, b, c] = u32::try_from(length).unwrap_or_default().to_be_bytes();
    [kind, a, b, c]
}

fn parse_head([kind, a, b, c]: [u8; HEAD_BYTES]) -> (u8, usize) {
    (kind, u32::from_be_bytes([0, a, b, c]) as usize)
}

/// Waits for the next session on a connection. `None` if the client closed it in order instead.
pub async fn next_open<T: AsyncBufRead + Unpin>(tls: &mut T) -> io::Result<Option<OpenFrame>> {
    if tls.fill_buf().await?.is_empty() {
        return Ok(None);
    }
    let mut frame_head = [0; HEAD_BYTES];
    tls.read_exact(&mut frame_head).await?;
    match parse_head(frame_head) {
        (OPEN, length) if length <= MAX_OPEN_BYTES => {
            let mut body = vec![0; length];
            tls.read_exact(&mut body).await?;
            Ok(Some(OpenFrame::decode(&body)?))
        }
        _ => Err(SessionError::Protocol("a session begins with OPEN").into()),
    }
}

/// Answers an opening with anything but [`Status::Open`], and ends the connection in order.
pub async fn refuse<T: AsyncWrite + Unpin>(tls: &mut T, status: Status, receipt: &str) -> io::Result<()> {
    tls.write_all(&answer(status, receipt)).await?;
    tls.shutdown().await
}

fn answer(status: Status, receipt: &str) -> Vec<u8> {
    let receipt = receipt.as_bytes();
    let receipt = receipt.get(..receipt.len().min(MAX_ANSWER_BYTES - 1)).unwrap_or_default();
    let mut frame = head(ANSWER, 1 + receipt.len()).to_vec();
    frame.push(status.byte());
    frame.extend_from_slice(receipt);
    frame
}

/// A session's two byte streams over a TLS connection.
#[derive(Debug)]
pub struct Session<T> {
    tls: T,
    incoming: Incoming,
    outgoing: Outgoing,
}

#[derive(Debug)]
struct Incoming {
    /// The client's side hears an ANSWER before anything else.
    answered: bool,
    /// A head, and an ANSWER's body, as far as they have come.
    partial: Vec<u8>,
    /// Left of the DATA frame that is being read.
    left_bytes: usize,
    finished: bool,
}

#[derive(Debug)]
struct Outgoing {
    /// Heads (and OPEN or ANSWER) that go out before the rest of the body.
    pending: Vec<u8>,
    sent_of_pending: usize,
    /// Left of the DATA frame that was announced.
    left_bytes: usize,
    finished: bool,
    /// Everything that was sent, until the other side has answered or it is too much.
    kept: Option<Vec<u8>>,
}

impl<T: AsyncBufRead + AsyncWrite + Unpin> Session<T> {
    /// The client's side of a new session: OPEN leaves with the first data or flush.
    pub fn open(tls: T, open: &OpenFrame) -> Self {
        Self::client(tls, open.encode(), false)
    }

    /// The client's side of a session that another connection did not begin.
    pub fn again(tls: T, unbegun: Unbegun) -> Self {
        let mut session = Self::client(tls, unbegun.sent, unbegun.finished);
        session.outgoing.left_bytes = unbegun.left_bytes;
        session
    }

    fn client(tls: T, pending: Vec<u8>, finished: bool) -> Self {
        Self::new(tls, false, pending, finished, Some(Vec::new()))
    }

    /// The server's side of a session that is permitted: ANSWER leaves with the first data or flush.
    pub fn accepted(tls: T) -> Self {
        Self::new(tls, true, answer(Status::Open, ""), false, None)
    }

    fn new(tls: T, answered: bool, pending: Vec<u8>, finished: bool, kept: Option<Vec<u8>>) -> Self {
        Self {
            tls,
            incoming: Incoming { answered, partial: Vec::new(), left_bytes: 0, finished: false },
            outgoing: Outgoing { pending, sent_of_pending: 0, left_bytes: 0, finished, kept },
        }
    }

    /// The TLS connection, if both sides have finished and it is ready for another session.
    pub fn into_finished(self) -> Option<T> {
        let sent = self.outgoing.finished && self.outgoing.sent_of_pending == self.outgoing.pending.len();
        (sent && self.incoming.finished).then_some(self.tls)
    }

    /// What was sent of a session that the other side has not begun, if it was kept.
    pub fn into_unbegun(self) -> Option<Unbegun> {
        let mut sent = self.outgoing.kept?;
        sent.extend_from_slice(self.outgoing.pending.get(self.outgoing.sent_of_pending..)?);
        Some(Unbegun { sent, left_bytes: self.outgoing.left_bytes, finished: self.outgoing.finished })
    }

    /// Reads up to the next byte of data, or the end.
    fn poll_heads(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { tls, incoming, outgoing } = self;
        while incoming.left_bytes == 0 && !incoming.finished {
            let chunk = ready!(Pin::new(&mut *tls).poll_fill_buf(cx))?;
            if chunk.is_empty() {
                let unbegun = !incoming.answered && incoming.partial.is_empty();
                return Poll::Ready(Err(if unbegun {
                    SessionError::NotBegun.into()
                } else {
                    io::ErrorKind::UnexpectedEof.into()
                }));
            }
            let count = incoming.wanted()?.min(chunk.len());
            incoming.partial.extend_from_slice(chunk.get(..count).unwrap_or_default());
            Pin::new(&mut *tls).consume(count);
            if incoming.wanted()? == 0 {
                incoming.take_head()?;
                if incoming.answered {
                    outgoing.kept = None;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// A session that a connection did not begin, to be sent over another one.
#[derive(Debug)]
pub struct Unbegun {
    sent: Vec<u8>,
    left_bytes: usize,
    finished: bool,
}

impl Incoming {
    /// Bytes that `partial` still lacks.
    fn wanted(&self) -> Result<usize, SessionError> {
        let Some((frame_head, body)) = self.partial.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(HEAD_BYTES - self.partial.len());
        };
        match parse_head(*frame_head) {
            (ANSWER, 1..=MAX_ANSWER_BYTES) if self.answered => Err(SessionError::Protocol("a second answer")),
            (ANSWER, length @ 1..=MAX_ANSWER_BYTES) => Ok(length - body.len()),
            (DATA | FIN, _) if !self.answered => Err(SessionError::Protocol("no answer")),
            (DATA, 1..) | (FIN, 0) => Ok(0),
            _ => Err(SessionError::Protocol("an unknown frame")),
        }
    }

    /// Acts on a whole head.
    fn take_head(&mut self) -> Result<(), SessionError> {
        let Some((frame_head, body)) = self.partial.split_first_chunk::<HEAD_BYTES>() else { return Ok(()) };
        match parse_head(*frame_head) {
            (ANSWER, _) => {
                let (&status, receipt) =
                    body.split_first().ok_or(SessionError::Protocol("an empty answer"))?;
                let status = Status::from_byte(status).ok_or(SessionError::Protocol("an unknown status"))?;
                if status != Status::Open {
                    let printable = receipt.iter().all(u8::is_ascii_graphic);
                    let receipt =
                        if printable { String::from_utf8_lossy(receipt).into_owned() } else { String::new() };
                    return Err(SessionError::Refused { status, receipt });
                }
                self.answered = true;
            }
            (DATA, length) => self.left_bytes = length,
            _ => self.finished = true,
        }
        self.partial.clear();
        Ok(())
    }
}

impl Outgoing {
    fn announce(&mut self, kind: u8, length: usize) {
        self.pending.extend_from_slice(&head(kind, length));
        self.left_bytes = length;
    }

    /// Notes that `count` bytes of `pending` and `body` have gone; returns how many of `body`.
    fn sent(&mut self, count: usize, body: &[u8]) -> usize {
        let of_pending = count.min(self.pending.len() - self.sent_of_pending);
        let of_body = count - of_pending;
        if let Some(kept) = &mut self.kept {
            if kept.len() + count > MAX_KEPT_BYTES {
                self.kept = None;
            } else {
                let pending = self.pending.get(self.sent_of_pending..self.sent_of_pending + of_pending);
                kept.extend_from_slice(pending.unwrap_or_default());
                kept.extend_from_slice(body.get(..of_body).unwrap_or_default());
            }
        }
        self.sent_of_pending += of_pending;
        if self.sent_of_pending == self.pending.len() {
            self.pending.clear();
            self.sent_of_pending = 0;
        }
        self.left_bytes -= of_body;
        of_body
    }

    fn unsent(&self) -> &[u8] {
        self.pending.get(self.sent_of_pending..).unwrap_or_default()
    }
}

impl<T: AsyncBufRead + AsyncWrite + Unpin> AsyncBufRead for Session<T> {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        ready!(this.poll_heads(cx))?;
        if this.incoming.finished {
            return Poll::Ready(Ok(&[]));
        }
        let chunk = ready!(Pin::new(&mut this.tls).poll_fill_buf(cx))?;
        let count = chunk.len().min(this.incoming.left_bytes);
        match chunk.get(..count) {
            Some(data) if count > 0 => Poll::Ready(Ok(data)),
            _ => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    fn consume(self: Pin<&mut Self>, count: usize) {
        let this = self.get_mut();
        this.incoming.left_bytes = this.incoming.left_bytes.saturating_sub(count);
        Pin::new(&mut this.tls).consume(count);
    }
}

impl<T: AsyncBufRead + AsyncWrite + Unpin> tokio::io::AsyncRead for Session<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let data = ready!(self.as_mut().poll_fill_buf(cx))?;
        let count = data.len().min(buf.remaining());
        buf.put_slice(data.get(..count).unwrap_or_default());
        self.consume(count);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncBufRead + AsyncWrite + Unpin> AsyncWrite for Session<T> {
    /// INVARIANT: after `Pending` or a partial write the caller offers the same bytes again, as every writer does
    /// that loses none: their number was announced.
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let Self { tls, outgoing, .. } = self.get_mut();
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if outgoing.left_bytes == 0 {
            outgoing.announce(DATA, data.len().min(MAX_DATA_BYTES));
        }
        let body = data.get(..data.len().min(outgoing.left_bytes)).unwrap_or_default();
        loop {
            // Head and body in one record.
            let count = ready!(pieces::poll_write(Pin::new(&mut *tls), cx, outgoing.unsent(), body))?;
            if count == 0 {
                return Poll::Ready(Ok(0));
            }
            match outgoing.sent(count, body) {
                0 => {}
                of_body => return Poll::Ready(Ok(of_body)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { tls, outgoing, .. } = self.get_mut();
        while !outgoing.unsent().is_empty() {
            let count = ready!(Pin::new(&mut *tls).poll_write(cx, outgoing.unsent()))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            outgoing.sent(count, &[]);
        }
        Pin::new(tls).poll_flush(cx)
    }

    /// Says FIN. The TLS connection stays.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outgoing = &mut self.outgoing;
        if !outgoing.finished {
            if outgoing.left_bytes > 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            outgoing.announce(FIN, 0);
            outgoing.finished = true;
        }
        self.poll_flush(cx)
    }
}

impl<T: Side> Side for Session<T> {
    fn pause(&mut self) {
        self.tls.pause();
    }

    fn abort(&mut self) {
        self.tls.abort();
    }
}

#[cfg(test)]
mod tests;
