//! Waiting, cheaply: one timer a direction, armed only where something has to be waited for.
//!
//! Time here is tokio's monotonic clock: a wall clock that jumps must not end connections, and its timer can
//! be moved without being made anew for each request.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// A peer is judged by what it moved while it was waited for this long: two of these fit into the 30 s within
/// which a peer that is too slow has to be gone, whatever it moved just before.
const WINDOW: Duration = Duration::from_secs(15);
/// What has to move in a window: 1 KiB a second, a tenth of the slowest mobile link.
const MIN_WINDOW_BYTES: u64 = 15 * 1024;

/// A timer that is made once and then moved.
#[derive(Debug, Default)]
pub(crate) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    pub(crate) fn set(&mut self, deadline: Instant) {
        match &mut self.0 {
            // Moving a deadline that has not come yet further away is one atomic operation.
            Some(sleep) => sleep.as_mut().reset(deadline),
            None => self.0 = Some(Box::pin(sleep_until(deadline))),
        }
    }

    /// Ready at the deadline; pending for ever if none was set.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Some(sleep) => sleep.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

/// Whether a peer that is being waited for moves bytes at a rate worth it.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    moved: u64,
    waited: Duration,
    since: Option<Instant>,
}

impl Pace {
    /// The peer moved something.
    pub(crate) fn moved(&mut self, bytes: usize) {
        self.moved = self.moved.saturating_add(bytes as u64);
        self.pause();
    }

    /// Nobody waits for the peer just now.
    pub(crate) fn pause(&mut self) {
        if let Some(since) = self.since.take() {
            self.waited += since.elapsed();
        }
    }

    /// Waits on; ready once the peer has proved too slow.
    pub(crate) fn poll_too_slow(&mut self, timer: &mut Timer, cx: &mut Context<'_>) -> Poll<()> {
        if self.since.is_none() {
            let now = Instant::now();
            self.since = Some(now);
            if self.waited >= WINDOW && self.judge(now) {
                return Poll::Ready(());
            }
            timer.set(now + WINDOW.saturating_sub(self.waited));
        }
        loop {
            ready!(timer.poll(cx));
            let now = Instant::now();
            if self.judge(now) {
                return Poll::Ready(());
            }
            timer.set(now + WINDOW);
        }
    }

    /// Ends a window: was it too slow?
    fn judge(&mut self, now: Instant) -> bool {
        let slow = self.moved < MIN_WINDOW_BYTES;
        *self = Self { moved: 0, waited: Duration::ZERO, since: Some(now) };
        slow
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    /// Whether a peer that moves `bytes` each `every` is dropped within `within`.
    async fn dropped(bytes: usize, every: Duration, within: Duration) -> bool {
        let (mut pace, mut timer) = (Pace::default(), Timer::default());
        let started = Instant::now();
        while started.elapsed() < within {
            let waited = poll_fn(|cx| pace.poll_too_slow(&mut timer, cx));
            if tokio::time::timeout(every, waited).await.is_ok() {
                return true;
            }
            pace.moved(bytes);
        }
        false
    }

    #[tokio::test(start_paused = true)]
    async fn security_28_a_peer_below_the_minimum_rate_is_dropped_within_30_s() {
        for (bytes, every) in [(1, 1), (900, 1), (10, 10), (100, 7), (0, 60)] {
            assert!(dropped(bytes, Duration::from_secs(every), Duration::from_secs(30)).await, "{bytes}");
        }
        for (bytes, every) in [(1_200, 1), (16_000, 10), (40_000, 14)] {
            assert!(!dropped(bytes, Duration::from_secs(every), Duration::from_secs(600)).await, "{bytes}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_nobody_waits_does_not_count() {
        let (mut pace, mut timer) = (Pace::default(), Timer::default());
        for _ in 0..10 {
            let waited = poll_fn(|cx| pace.poll_too_slow(&mut timer, cx));
            assert!(tokio::time::timeout(Duration::from_secs(1), waited).await.is_err());
            pace.moved(1);
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
    }
}
