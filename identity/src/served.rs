//! A connection as tonic serves it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// A stream, with what its requests are told of it and what is held until it ends.
pub struct Served<S, I> {
    stream: S,
    info: I,
    over: Option<BoxFuture<'static, ()>>,
    _held: Box<dyn Send>,
}

impl<S, I> Served<S, I> {
    /// `info` becomes an extension of every request; `held` is dropped with the connection.
    pub fn new(stream: S, info: I, held: impl Send + 'static) -> Self {
        Self { stream, info, over: None, _held: Box::new(held) }
    }

    /// Its reads fail once `over` completes, such as when the peer's certificate has expired.
    pub fn until(self, over: BoxFuture<'static, ()>) -> Self {
        Self { over: Some(over), ..self }
    }
}

impl<S, I: Clone + Send + Sync + 'static> Connected for Served<S, I> {
    type ConnectInfo = I;

    fn connect_info(&self) -> I {
        self.info.clone()
    }
}

impl<S: AsyncRead + Unpin, I: Unpin> AsyncRead for Served<S, I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.over.as_mut().is_some_and(|over| over.as_mut().poll(context).is_ready()) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin, I: Unpin> AsyncWrite for Served<S, I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
