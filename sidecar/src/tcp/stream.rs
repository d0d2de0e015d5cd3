//! A TCP stream with a buffer that is there only while bytes are.
//!
//! As one side of a copy it is read through [`AsyncBufRead`], by buffers that grow with what has been carried; a
//! connection that is idle holds none. Under TLS it is read through [`AsyncRead`]: rustls asks for 4 KiB at a
//! time, so once the peer sends more than that, one system call fetches many such pieces.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::copy::Side;
use super::frame::HEAD_BYTES;
use crate::pieces;

/// One page: a request or an answer of an ordinary protocol.
const FIRST_BUFFER_BYTES: usize = 4 * 1024;
/// What fills a TLS record (RFC 8446 §5.1) together with the head of its frame, after this many bytes.
const MIDDLE_BUFFER_BYTES: usize = 16 * 1024 - HEAD_BYTES;
const MIDDLE_AFTER_BYTES: u64 = 128 * 1024;
/// What rustls takes in one go with a head, so that several records leave with one system call, after this many bytes.
const LARGE_BUFFER_BYTES: usize = 64 * 1024 - HEAD_BYTES;
const LARGE_AFTER_BYTES: u64 = 1024 * 1024;
/// A buffer up to this size is given back when nothing more is there to read, a larger one after a pause:
/// allocating it means new pages each time.
const CHEAP_BUFFER_BYTES: usize = MIDDLE_BUFFER_BYTES;
/// Writes of this size and more are gathered until they are as much as below, or flushed: a TLS record each, they
/// would be a system call each.
const GATHERED_FROM_BYTES: usize = 8 * 1024;
const GATHERED_BYTES: usize = 64 * 1024;
/// Bytes that the kernel takes from us beyond what it can send. Above all it lets us see a slow reader's
/// progress; by default megabytes would lie between us and it.
const UNSENT_BYTES: u32 = 128 * 1024;

/// A TCP stream, its delays off, with what was read ahead of it.
#[derive(Debug)]
pub struct Stream {
    io: TcpStream,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were taken already.
    taken: usize,
    /// Read since the last pause.
    read_bytes: u64,
    /// The last read filled what it was given, so there is more.
    more: bool,
    /// Written, and not sent but for the first `sent` bytes.
    gathered: Vec<u8>,
    sent: usize,
}

impl Stream {
    /// Takes over a stream; sets TCP_NODELAY on it.
    pub fn new(io: TcpStream) -> Self {
        if let Err(error) = io.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        if let Err(error) = socket2::SockRef::from(&io).set_tcp_notsent_lowat(UNSENT_BYTES) {
            tracing::debug!(%error, "no TCP_NOTSENT_LOWAT");
        }
        Self { io, buffer: Vec::new(), taken: 0, read_bytes: 0, more: false, gathered: Vec::new(), sent: 0 }
    }

    /// The other end's address.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.io.peer_addr()
    }

    /// The socket.
    pub fn socket(&self) -> &TcpStream {
        &self.io
    }

    /// The socket itself, and what was read of it and not taken yet.
    pub(crate) fn into_parts(mut self) -> (TcpStream, Vec<u8>) {
        self.buffer.drain(..self.taken);
        (self.io, self.buffer)
    }

    /// What was read and not taken yet.
    pub fn unread(&self) -> &[u8] {
        self.buffer.get(self.taken..).unwrap_or_default()
    }

    /// Reads once more behind what is unread, at most until `most_bytes` are. `false` at the end of the stream
    /// or if they are there already. Nothing is lost if the future is dropped.
    pub async fn read_more(&mut self, most_bytes: usize) -> io::Result<bool> {
        if self.unread().len() >= most_bytes {
            return Ok(false);
        }
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let room = most_bytes - self.buffer.len();
        self.buffer.reserve_exact(room);
        let mut some = (&mut self.io).take(room as u64);
        Ok(some.read_buf(&mut self.buffer).await? > 0)
    }

    /// Takes `count` bytes of what is unread.
    pub fn take(&mut self, count: usize) {
        self.taken = (self.taken + count).min(self.buffer.len());
    }

    /// Fills the buffer, which must have been taken whole. Holds none while nothing is there to read.
    fn poll_refill(&mut self, cx: &mut Context<'_>, least_bytes: usize) -> Poll<io::Result<()>> {
        if self.io.poll_read_ready(cx)?.is_pending() {
            self.release();
            return Poll::Pending;
        }
        self.buffer.clear();
        self.taken = 0;
        let size = self.size().max(least_bytes);
        if self.buffer.capacity() < size {
            self.buffer = Vec::with_capacity(size);
        }
        let outcome = pin!(self.io.read_buf(&mut self.buffer)).poll(cx);
        let read = match outcome {
            Poll::Ready(outcome) => outcome?,
            Poll::Pending => {
                self.release();
                return Poll::Pending;
            }
        };
        self.read_bytes += read as u64;
        self.more = read > 0 && read == self.buffer.capacity();
        Poll::Ready(Ok(()))
    }

    fn size(&self) -> usize {
        match self.read_bytes {
            LARGE_AFTER_BYTES.. => LARGE_BUFFER_BYTES,
            MIDDLE_AFTER_BYTES.. => MIDDLE_BUFFER_BYTES,
            _ => FIRST_BUFFER_BYTES,
        }
    }

    /// Sends what was gathered.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(unsent) = self.gathered.get(self.sent..).filter(|unsent| !unsent.is_empty()) {
            match ready!(Pin::new(&mut self.io).poll_write(cx, unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.sent += count,
            }
        }
        self.gathered.clear();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    fn release(&mut self) {
        self.more = false;
        if self.buffer.capacity() <= CHEAP_BUFFER_BYTES {
            self.buffer = Vec::new();
            self.taken = 0;
        }
    }
}

impl Side for Stream {
    fn pause(&mut self) {
        self.read_bytes = 0;
        self.more = false;
        if self.unread().is_empty() {
            self.buffer = Vec::new();
            self.taken = 0;
        }
        if self.gathered.is_empty() {
            self.gathered = Vec::new();
        }
    }

    /// Ends with a reset: a stream that was cut short must not pass for a whole one.
    fn abort(&mut self) {
        if let Err(error) = self.io.set_zero_linger() {
            tracing::debug!(%error, "no SO_LINGER");
        }
    }
}

impl AsyncBufRead for Stream {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.unread().is_empty() {
            ready!(this.poll_refill(cx, 0))?;
        }
        Poll::Ready(Ok(this.unread()))
    }

    fn consume(self: Pin<&mut Self>, count: usize) {
        self.get_mut().take(count);
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.unread().is_empty() {
            if !this.more && this.buffer.capacity() == 0 {
                let before = buf.remaining();
                ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
                this.read_bytes += (before - buf.remaining()) as u64;
                this.more = buf.remaining() == 0 && before > 0;
                return Poll::Ready(Ok(()));
            }
            ready!(this.poll_refill(cx, MIDDLE_BUFFER_BYTES))?;
        }
        let unread = this.unread();
        let count = unread.len().min(buf.remaining());
        buf.put_slice(unread.get(..count).unwrap_or_default());
        this.take(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.gathered.len() + data.len() > GATHERED_BYTES {
            ready!(this.poll_send(cx))?;
        }
        if this.gathered.is_empty() && !(GATHERED_FROM_BYTES..GATHERED_BYTES).contains(&data.len()) {
            return Pin::new(&mut this.io).poll_write(cx, data);
        }
        if this.gathered.capacity() == 0 {
            this.gathered.reserve_exact(GATHERED_BYTES);
        }
        pieces::append(&mut this.gathered, data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
