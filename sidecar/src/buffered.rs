//! A socket under TLS, read in large pieces.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Where reads begin: a batch of small requests.
const MIN_READ_BYTES: usize = 8 * 1024;
/// Where they grow to while the peer fills them: four TLS records of a large body.
const MAX_READ_BYTES: usize = 64 * 1024;

/// A TCP stream whose reads are larger than whoever reads from it asks for.
///
/// rustls asks for 4 KiB at a time, which is four system calls a record of a large body. The buffer lives
/// only while it holds something, so an idle connection has none.
#[derive(Debug)]
pub struct Buffered {
    stream: TcpStream,
    buffer: Vec<u8>,
    taken: usize,
    read_bytes: usize,
}

impl Buffered {
    /// Reads `stream` in large pieces.
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, buffer: Vec::new(), taken: 0, read_bytes: MIN_READ_BYTES }
    }

    /// Reads `stream`, of which `unread` was read already.
    pub(crate) fn after(stream: TcpStream, unread: Vec<u8>) -> Self {
        Self { buffer: unread, ..Self::new(stream) }
    }

    /// The other end's address.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            self.buffer.reserve_exact(self.read_bytes);
            match self.stream.try_read_buf(&mut self.buffer) {
                Ok(bytes) => {
                    if bytes == self.read_bytes {
                        self.read_bytes = (2 * self.read_bytes).min(MAX_READ_BYTES);
                    } else if bytes < self.read_bytes / 4 {
                        self.read_bytes = (self.read_bytes / 2).max(MIN_READ_BYTES);
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.buffer = Vec::new(),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncRead for Buffered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.buffer.is_empty() {
            ready!(this.poll_fill(cx))?;
        }
        let left = this.buffer.get(this.taken..).unwrap_or_default();
        let (now, later) = left.split_at(left.len().min(into.remaining()));
        into.put_slice(now);
        if later.is_empty() {
            (this.buffer, this.taken) = (Vec::new(), 0);
        } else {
            this.taken += now.len();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Buffered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn bytes_arrive_in_order_whatever_the_reader_asks_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (ours, theirs) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let mut theirs = theirs.unwrap().0;
        let sent: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let mut reader = Buffered::new(ours.unwrap());
        let (received, written) = tokio::join!(
            async {
                let (mut received, mut piece) = (Vec::new(), 1);
                let mut buffer = vec![0; 8192];
                loop {
                    let read = reader.read(&mut buffer[..piece]).await.unwrap();
                    if read == 0 {
                        return received;
                    }
                    received.extend_from_slice(&buffer[..read]);
                    piece = piece % 8192 + 1;
                }
            },
            async {
                theirs.write_all(&sent).await.unwrap();
                theirs.shutdown().await.unwrap();
            }
        );
        let () = written;
        assert!(received == sent);
        assert_eq!(reader.buffer.capacity(), 0);
    }
}
