//! The one clock that all clients of a run go by.

use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since the Unix epoch that never jump: the machine's clock read once, and what passed since.
///
/// So moments of clients compare with each other, and with commit timestamps up to the error of the nodes' clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClientClock {
    wall: u64,
    started: Instant,
}

impl ClientClock {
    /// A clock that starts now.
    pub(crate) fn start() -> Self {
        let now = clock_gettime(ClockId::Realtime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
        Self { wall: seconds.saturating_mul(1_000_000_000).saturating_add(nanos), started: Instant::now() }
    }

    /// Now.
    pub(crate) fn now(&self) -> u64 {
        self.wall.saturating_add(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Seconds since the run began, for people.
    pub(crate) fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}
