//! Time as a parameter, so that rotation, leases and expiry can be simulated.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use rustls_pki_types::UnixTime;

/// Where a component gets its time from.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Wall-clock time since the Unix epoch.
    fn now(&self) -> Duration;

    /// Completes once `duration` has passed on this clock.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Wall-clock time in whole seconds, as JWT and X.509 count it.
    fn now_seconds(&self) -> u64 {
        self.now().as_secs()
    }

    /// Wall-clock time as rustls and webpki take it.
    fn unix_time(&self) -> UnixTime {
        UnixTime::since_unix_epoch(self.now())
    }
}

/// A shared clock.
pub type SharedClock = Arc<dyn Clock>;

/// The machine's clock; sleeps on tokio's timer.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl SystemClock {
    /// The machine's clock, shared.
    pub fn shared() -> SharedClock {
        Arc::new(Self)
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
    fn now(&self) -> Duration {
        // A clock set before 1970 makes every certificate not yet valid: refused, never trusted.
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// A [`Clock`] seen as rustls's time provider.
#[derive(Debug)]
pub struct TlsTime(pub SharedClock);

impl rustls::time_provider::TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.0.unix_time())
    }
}

/// A clock that a test sets by hand; sleepers wake when it is advanced past their time.
#[derive(Debug)]
pub struct ManualClock {
    now: tokio::sync::watch::Sender<Duration>,
}

impl ManualClock {
    /// A clock that stands at `now` until it is advanced.
    pub fn at(now: Duration) -> Arc<Self> {
        Arc::new(Self { now: tokio::sync::watch::Sender::new(now) })
    }

    /// Moves time forward and wakes whoever slept until then.
    pub fn advance(&self, by: Duration) {
        self.now.send_modify(|now| *now += by);
    }

    /// Sets time, backwards too.
    pub fn set(&self, to: Duration) {
        self.now.send_replace(to);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        *self.now.borrow()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let mut now = self.now.subscribe();
        let until = now.borrow().saturating_add(duration);
        Box::pin(async move {
            // The sender lives in the clock; if the clock is gone nobody will ever wake us, so end.
            let _gone = now.wait_for(|now| *now >= until).await.is_err();
        })
    }
}
