//! Bytes both ways between two streams, by one task that owns both: no lock, no split.
//!
//! Each way ends by itself (half-close); an error of either stream ends both at once, and what was cut short is
//! reset, never closed as if it were whole. A connection on which nothing moves ends after [`IDLE_TIMEOUT`]; one
//! whose reader does not take what waits for it ends after [`STALL_WINDOW`].

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use identity::clock::SharedClock;
use thiserror::Error;
use tokio::io::{AsyncBufRead, AsyncWrite};

use super::frame::SessionError;
use crate::live::Traffic;

/// A connection on which nothing moves for so long is gone: shorter than most, longer than any
/// database's own keep-alive.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// A reader must have taken [`STALL_LEAST_BYTES`] within this time while something waited for it, 1 KiB a second.
pub const STALL_WINDOW: Duration = Duration::from_secs(30);
/// See [`STALL_WINDOW`].
pub const STALL_LEAST_BYTES: u64 = 30 * 1024;
/// After this long without a byte, large buffers are given back.
const PAUSE: Duration = Duration::from_secs(5);

/// One of the two streams of a copy.
pub trait Side: AsyncBufRead + AsyncWrite + Unpin {
    /// Nothing has moved for a while: give memory back.
    fn pause(&mut self);

    /// Whatever happens to this stream from now on, it must not look like an orderly end.
    fn abort(&mut self);
}

/// The stream that opened the connection, or the one that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where it came from.
    Near,
    /// Where it goes.
    Far,
}

/// Why a copy ended before both ways had.
#[derive(Debug, Error)]
pub enum CopyError {
    /// A stream failed.
    #[error("{1}")]
    Io(End, #[source] io::Error),
    /// Nothing moved for [`IDLE_TIMEOUT`].
    #[error("nothing was sent for too long")]
    Idle,
    /// This end did not take what waited for it.
    #[error("the reader takes less than 1 KiB a second")]
    Stalled(End),
}

/// Copies until both ways have ended. After an error the caller aborts what must not pass for whole.
pub async fn both_ways<A: Side, B: Side>(
    near: &mut A,
    far: &mut B,
    clock: &SharedClock,
    traffic: &Traffic,
) -> Result<(), CopyError> {
    let mut forward = Way::new(End::Near, End::Far, &traffic.forward_bytes);
    let mut back = Way::new(End::Far, End::Near, &traffic.back_bytes);
    let mut watch = Watch::new(clock);
    poll_fn(|cx| {
        let there = forward.poll(near, far, cx)?;
        let again = back.poll(far, near, cx)?;
        if there.is_ready() && again.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if watch.poll(&mut [&mut forward, &mut back], cx)? {
            near.pause();
            far.pause();
        }
        Poll::Pending
    })
    .await
}

impl CopyError {
    /// The session's own account of a failure at that end, if it has one.
    pub(crate) fn of_session(&self, end: End) -> Option<&SessionError> {
        match self {
            Self::Io(at, error) if *at == end => SessionError::of(error),
            _ => None,
        }
    }
}

enum Phase {
    Copying,
    Ending,
    Ended,
}

/// One direction.
struct Way<'a> {
    from: End,
    to: End,
    phase: Phase,
    /// Something was written, or has waited in the writer since before, and was not flushed.
    unflushed: bool,
    /// The writer has not taken what is there for it.
    blocked: bool,
    /// Since when, and what had moved by then.
    blocked_since: Option<(Duration, u64)>,
    moved_bytes: u64,
    counter: &'a AtomicU64,
}

impl<'a> Way<'a> {
    fn new(from: End, to: End, counter: &'a AtomicU64) -> Self {
        Self {
            from,
            to,
            phase: Phase::Copying,
            // The far side's opening goes out even if the near one has nothing to say: its app may speak first.
            unflushed: to == End::Far,
            blocked: false,
            blocked_since: None,
            moved_bytes: 0,
            counter,
        }
    }

    fn poll<R: Side, W: Side>(
        &mut self,
        reader: &mut R,
        writer: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), CopyError>> {
        loop {
            match self.phase {
                Phase::Copying => {
                    let data = match Pin::new(&mut *reader).poll_fill_buf(cx) {
                        Poll::Ready(data) => data.map_err(|error| CopyError::Io(self.from, error))?,
                        Poll::Pending => {
                            ready!(self.poll_flush(writer, cx))?;
                            return Poll::Pending;
                        }
                    };
                    if data.is_empty() {
                        self.phase = Phase::Ending;
                        continue;
                    }
                    self.blocked = true;
                    let count = ready!(Pin::new(&mut *writer).poll_write(cx, data))
                        .map_err(|error| CopyError::Io(self.to, error))?;
                    if count == 0 {
                        return Poll::Ready(Err(CopyError::Io(self.to, io::ErrorKind::WriteZero.into())));
                    }
                    Pin::new(&mut *reader).consume(count);
                    self.unflushed = true;
                    self.moved_bytes += count as u64;
                    self.counter.fetch_add(count as u64, Ordering::Relaxed);
                }
                Phase::Ending => {
                    self.blocked = true;
                    ready!(Pin::new(&mut *writer).poll_shutdown(cx))
                        .map_err(|error| CopyError::Io(self.to, error))?;
                    self.blocked = false;
                    self.phase = Phase::Ended;
                }
                Phase::Ended => return Poll::Ready(Ok(())),
            }
        }
    }

    fn poll_flush<W: Side>(&mut self, writer: &mut W, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        if self.unflushed {
            self.blocked = true;
            ready!(Pin::new(writer).poll_flush(cx)).map_err(|error| CopyError::Io(self.to, error))?;
            self.unflushed = false;
        }
        self.blocked = false;
        Poll::Ready(Ok(()))
    }

    /// When this way's reader has to have made progress; an error if it had to before `now` and has not.
    fn due(&mut self, now: Duration) -> Result<Option<Duration>, CopyError> {
        if !self.blocked {
            self.blocked_since = None;
            return Ok(None);
        }
        let (since, moved_bytes) = *self.blocked_since.get_or_insert((now, self.moved_bytes));
        if now < since + STALL_WINDOW {
            return Ok(Some(since + STALL_WINDOW));
        }
        if self.moved_bytes - moved_bytes < STALL_LEAST_BYTES {
            return Err(CopyError::Stalled(self.to));
        }
        self.blocked_since = Some((now, self.moved_bytes));
        Ok(Some(now + STALL_WINDOW))
    }
}

/// The clock of one copy: a single timer, set anew only if it would ring too late.
struct Watch<'a> {
    clock: &'a SharedClock,
    moved_bytes: u64,
    moved_at: Duration,
    paused: bool,
    timer: Option<(Duration, BoxFuture<'static, ()>)>,
}

impl<'a> Watch<'a> {
    fn new(clock: &'a SharedClock) -> Self {
        Self { clock, moved_bytes: 0, moved_at: clock.now(), paused: false, timer: None }
    }

    /// `true` when a pause has begun.
    fn poll(&mut self, ways: &mut [&mut Way<'_>; 2], cx: &mut Context<'_>) -> Result<bool, CopyError> {
        let now = self.clock.now();
        let moved_bytes = ways.iter().map(|way| way.moved_bytes).sum();
        if moved_bytes != self.moved_bytes {
            (self.moved_bytes, self.moved_at, self.paused) = (moved_bytes, now, false);
        }
        let mut pause_begins = false;
        loop {
            let now = self.clock.now();
            if now >= self.moved_at + IDLE_TIMEOUT {
                return Err(CopyError::Idle);
            }
            if !self.paused && now >= self.moved_at + PAUSE {
                (self.paused, pause_begins) = (true, true);
            }
            let mut due = self.moved_at + if self.paused { IDLE_TIMEOUT } else { PAUSE };
            for way in ways.iter_mut() {
                due = way.due(now)?.map_or(due, |at| at.min(due));
            }
            let (_, ring) = match &mut self.timer {
                Some(timer) if timer.0 <= due => timer,
                timer => timer.insert((due, self.clock.sleep(due.saturating_sub(now)))),
            };
            match ring.as_mut().poll(cx) {
                Poll::Pending => return Ok(pause_begins),
                Poll::Ready(()) => self.timer = None,
            }
        }
    }
}

#[cfg(test)]
mod tests;
