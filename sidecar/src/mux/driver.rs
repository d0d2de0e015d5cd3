//! The task that does a connection's I/O: everything that waits goes out in one write, everything that came
//! in is understood before anybody is asked to go on.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use futures::future::BoxFuture;
use identity::clock::SharedClock;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;

use super::MAX_WAITING_BYTES;
use super::exchange::{Role, Shared, Worker};
use super::frame::{self, Kind, Malformed};
use crate::pieces;

/// What one read may bring at first, so that an idle connection holds little, and where it grows to: several TLS
/// records of a body, or dozens of small requests.
const MIN_READ_BYTES: usize = 2 * 1024;
const MAX_READ_BYTES: usize = 32 * 1024;
/// Reads before others get their turn.
const MAX_READS_PER_TURN: usize = 16;
/// How often a connection is looked at by the clock.
const TICK: Duration = Duration::from_secs(10);
/// Ticks without a byte while something is open, after the second of which the peer was asked for a sign of
/// life: then it is gone.
const MAX_SILENT_TICKS: u32 = 3;
/// Least that a peer must take, on average over a tick, of what waits for it.
const MIN_WRITE_BYTES_PER_TICK: usize = 10 * 1024;
/// How long a client keeps a connection that nobody uses.
const MAX_IDLE_TICKS: u32 = 9;

/// Why a connection ended out of order.
#[derive(Debug, Error)]
pub(crate) enum ConnectionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the peer closed the connection in the middle of something")]
    Eof,
    #[error("the peer gave no sign of life for {} s", MAX_SILENT_TICKS * TICK.as_secs() as u32)]
    Silent,
    #[error("its last requests took too long")]
    TooLong,
    #[error("the peer takes less than {} bytes/s", MIN_WRITE_BYTES_PER_TICK / TICK.as_secs() as usize)]
    Slow,
}

/// A connection's I/O. As a future it completes when the connection has ended.
pub(super) struct Driver<S, F> {
    stream: S,
    shared: Arc<Shared>,
    role: Role,
    /// Sets a worker to work.
    hire: F,
    clock: SharedClock,
    tick: BoxFuture<'static, ()>,
    input: BytesMut,
    read_bytes: usize,
    output: BytesMut,
    flushing: bool,
    seen: Seen,
}

/// What happened since the clock was last looked at.
#[derive(Debug, Default)]
struct Seen {
    read_bytes: usize,
    written_bytes: usize,
    silent_ticks: u32,
    idle_ticks: u32,
}

impl<S, F> Driver<S, F>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(Worker),
{
    pub(super) fn new(stream: S, shared: Arc<Shared>, role: Role, clock: SharedClock, hire: F) -> Self {
        let tick = clock.sleep(TICK);
        let (input, output) = (BytesMut::new(), BytesMut::new());
        let seen = Seen::default();
        Self {
            stream,
            shared,
            role,
            hire,
            clock,
            tick,
            input,
            read_bytes: MIN_READ_BYTES,
            output,
            flushing: false,
            seen,
        }
    }

    fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        self.shared.lock().register_driver(cx.waker());
        self.poll_clock(cx)?;
        let ended = self.poll_input(cx)?;
        self.poll_output(cx)?;
        if ended {
            let clean = self.input.is_empty() && self.shared.lock().is_idle();
            return Poll::Ready(if clean { Ok(()) } else { Err(ConnectionError::Eof) });
        }
        let finished = self.output.is_empty() && self.shared.lock().is_finished();
        if finished && !self.flushing {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx)?);
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    /// Reads what is there and understands it. Returns whether the peer has closed its side.
    fn poll_input(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        for _ in 0..MAX_READS_PER_TURN {
            // A server whose answers are not taken takes no more questions. Clients always read, so the two
            // cannot wait for each other.
            if self.role == Role::Server
                && self.output.len() + self.shared.lock().out.len() > 4 * MAX_WAITING_BYTES
            {
                return Ok(false);
            }
            self.input.reserve(self.read_bytes);
            let room = self.input.capacity() - self.input.len();
            match poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input)? {
                Poll::Pending => return Ok(false),
                Poll::Ready(0) => return Ok(true),
                Poll::Ready(bytes) => {
                    self.seen.read_bytes += bytes;
                    if bytes == room {
                        self.read_bytes = (2 * self.read_bytes).min(MAX_READ_BYTES);
                    }
                }
            }
            self.understand()?;
        }
        cx.waker().wake_by_ref();
        Ok(false)
    }

    fn understand(&mut self) -> Result<(), ConnectionError> {
        while let Some(frame) = frame::take(&mut self.input)? {
            let goes_away = frame.kind == Kind::GoAway;
            if let Some(worker) = self.shared.received(frame)? {
                (self.hire)(worker);
            }
            if goes_away {
                self.shared.go_away();
            }
        }
        Ok(())
    }

    /// Writes everything that waits.
    fn poll_output(&mut self, cx: &mut Context<'_>) -> Result<(), ConnectionError> {
        loop {
            if self.output.is_empty() {
                let mut state = self.shared.lock();
                if std::mem::take(&mut state.pong_due) {
                    frame::put_plain(&mut state.out, Kind::Pong);
                }
                if state.out.is_empty() {
                    break;
                }
                std::mem::swap(&mut self.output, &mut state.out);
                state.unblock();
            }
            while !self.output.is_empty() {
                match pieces::poll_write(Pin::new(&mut self.stream), cx, &[], &self.output)? {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                    Poll::Ready(bytes) => {
                        self.output.advance(bytes);
                        self.seen.written_bytes += bytes;
                        self.flushing = true;
                    }
                }
            }
        }
        if self.flushing && Pin::new(&mut self.stream).poll_flush(cx)?.is_ready() {
            self.flushing = false;
        }
        Ok(())
    }

    /// Looks at what happened since the last tick. One timer a connection, not one a request.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Result<(), ConnectionError> {
        while self.tick.as_mut().poll(cx).is_ready() {
            self.tick = self.clock.sleep(TICK);
            let seen = std::mem::take(&mut self.seen);
            let idle = self.shared.lock().is_idle();
            if seen.read_bytes == 0 && self.input.is_empty() {
                // An idle connection holds no buffers, and nobody who would work on what is in them.
                self.shared.dismiss_idle();
                self.input = BytesMut::new();
                self.read_bytes = MIN_READ_BYTES;
                if self.output.is_empty() {
                    self.output = BytesMut::new();
                }
            }
            if !self.output.is_empty() && seen.written_bytes < MIN_WRITE_BYTES_PER_TICK {
                return Err(ConnectionError::Slow);
            }
            if seen.read_bytes == 0 && !idle {
                self.seen.silent_ticks = seen.silent_ticks + 1;
                if self.seen.silent_ticks >= MAX_SILENT_TICKS {
                    return Err(ConnectionError::Silent);
                }
                frame::put_plain(&mut self.shared.lock().out, Kind::Ping);
            }
            if seen.read_bytes == 0 && idle && self.role == Role::Client {
                self.seen.idle_ticks = seen.idle_ticks + 1;
                if self.seen.idle_ticks >= MAX_IDLE_TICKS {
                    self.shared.go_away();
                }
            }
        }
        Ok(())
    }
}

impl<S, F> std::future::Future for Driver<S, F>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(Worker) + Unpin,
{
    type Output = Result<(), ConnectionError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = self.poll_drive(cx);
        if outcome.is_ready() {
            self.shared.close();
        }
        outcome
    }
}

impl<S, F> Drop for Driver<S, F> {
    fn drop(&mut self) {
        self.shared.close();
    }
}
