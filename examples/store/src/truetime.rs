//! A clock that knows its own error (Spanner, OSDI 2012, section 3): [`TrueTime::now`] gives an interval in which the
//! true time lies for certain, and everything that orders transactions is built on that certainty alone.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rtime_clock::adjtime::{self, Timex};

mod clock_bound;

pub use clock_bound::{ClockBound, DEFAULT_PATH as CLOCK_BOUND_PATH};

const NANOS_PER_MICRO: u64 = 1_000;

/// `STA_UNSYNC` of `adjtimex(2)`: nobody disciplines the kernel's clock, so its error is unknown.
const STATUS_UNSYNCHRONISED: i32 = 0x0040;
/// `STA_NANO` of `adjtimex(2)`: the reading's fraction of a second is in nanoseconds.
const STATUS_NANOSECONDS: i32 = 0x2000;

/// Nanoseconds since the Unix epoch. Of a commit: its place in the one order of all transactions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Before every commit.
    pub const ZERO: Self = Self(0);
    /// After every commit.
    pub const MAX: Self = Self(u64::MAX);

    /// The next timestamp there is.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The last timestamp before this one.
    pub fn before(self) -> Self {
        Self(self.0.saturating_sub(1))
    }

    /// This timestamp and `by` more.
    pub fn plus(self, by: Duration) -> Self {
        Self(self.0.saturating_add(nanos(by)))
    }

    /// This timestamp less `by`.
    pub fn minus(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(by)))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The true time is at least `earliest` and at most `latest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// No true time before this is possible.
    pub earliest: Timestamp,
    /// No true time after this is possible.
    pub latest: Timestamp,
}

impl Interval {
    /// A reading of a clock that is wrong by at most `epsilon`.
    pub fn around(reading: Timestamp, epsilon: Duration) -> Self {
        Self { earliest: reading.minus(epsilon), latest: reading.plus(epsilon) }
    }

    /// `t` has passed for certain: TT.after of the paper.
    pub fn is_after(self, t: Timestamp) -> bool {
        t < self.earliest
    }

    /// `t` has not come for certain: TT.before of the paper.
    pub fn is_before(self, t: Timestamp) -> bool {
        self.latest < t
    }
}

/// Why there is no time to go by. Whoever hears it must not lead a split: an error that is not known is not small.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// Nothing disciplines the kernel's clock.
    #[error(
        "the kernel's clock is not synchronised, so its error is unknown; run chrony or another NTP client, \
         or state a bound that you vouch for with --epsilon"
    )]
    Unsynchronised,
    /// `adjtimex` itself failed.
    #[error("the kernel does not tell its clock's error")]
    Kernel(#[source] std::io::Error),
    /// The clock-bound daemon has no bound to tell.
    #[error("the clock-bound daemon does not vouch for this machine's clock: {0}")]
    Untold(String),
    /// The bound is wider than the store can work with.
    #[error("the machine's clock may be wrong by {0:?}, and every commit would wait twice as long")]
    TooWide(Duration),
}

/// Where intervals come from.
pub trait TrueTime: Send + Sync {
    /// An interval that contains the true time.
    ///
    /// # Errors
    ///
    /// When no bound of the clock's error is known.
    fn now(&self) -> Result<Interval, ClockError>;
}

/// The machine's clock with an error that the operator vouches for.
#[derive(Clone, Copy, Debug)]
pub struct Fixed {
    epsilon: Duration,
}

impl Fixed {
    /// The machine's clock is never wrong by more than `epsilon`.
    pub fn new(epsilon: Duration) -> Self {
        Self { epsilon }
    }
}

impl TrueTime for Fixed {
    fn now(&self) -> Result<Interval, ClockError> {
        Ok(Interval::around(reading(), self.epsilon))
    }
}

/// What the machine's clock says. Asked for through the C library and not straight of the kernel, so that a library
/// loaded before it can be wrong on purpose: that is how `torture` skews the clocks of nodes.
fn reading() -> Timestamp {
    #[expect(clippy::disallowed_methods, reason = "this is where the store's time comes from")]
    let now = SystemTime::now();
    Timestamp(nanos(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()))
}

/// The machine's clock with the error that the kernel's own discipline vouches for.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Above this every commit would wait longer than a client does.
    widest: Duration,
}

impl Kernel {
    /// Intervals up to `widest` on either side.
    pub fn new(widest: Duration) -> Self {
        Self { widest }
    }
}

impl TrueTime for Kernel {
    fn now(&self) -> Result<Interval, ClockError> {
        let mut timex = Timex::new();
        adjtime::adjtimex(&mut timex).map_err(|error| ClockError::Kernel(std::io::Error::other(error)))?;
        let timex = timex.0;
        let epsilon = kernel_error(timex.status, timex.maxerror)?;
        if epsilon > self.widest {
            return Err(ClockError::TooWide(epsilon));
        }
        Ok(Interval::around(kernel_reading(timex.status, timex.time.tv_sec, timex.time.tv_usec), epsilon))
    }
}

fn kernel_error(status: i32, max_error_micros: i64) -> Result<Duration, ClockError> {
    if status & STATUS_UNSYNCHRONISED != 0 {
        return Err(ClockError::Unsynchronised);
    }
    let micros = u64::try_from(max_error_micros).map_err(|_| ClockError::Unsynchronised)?;
    Ok(Duration::from_nanos(micros.saturating_mul(NANOS_PER_MICRO)))
}

/// What the clock read when the kernel told its error: both are of one moment.
fn kernel_reading(status: i32, seconds: i64, fraction: i64) -> Timestamp {
    let unit = if status & STATUS_NANOSECONDS != 0 { 1 } else { NANOS_PER_MICRO };
    let count = |count: i64| u64::try_from(count).unwrap_or_default();
    let fraction = Duration::from_nanos(count(fraction).saturating_mul(unit));
    Timestamp(nanos(Duration::from_secs(count(seconds)))).plus(fraction)
}

/// A clock that a test moves by hand, shared by all its clones.
#[derive(Clone, Debug)]
pub struct Manual {
    reading: Arc<Mutex<Timestamp>>,
    epsilon: Duration,
}

impl Manual {
    /// A clock that reads `start` and vouches for `epsilon`.
    pub fn new(start: Timestamp, epsilon: Duration) -> Self {
        Self { reading: Arc::new(Mutex::new(start)), epsilon }
    }

    /// Moves the reading to `to`, backwards too.
    pub fn set(&self, to: Timestamp) {
        *self.reading.lock().unwrap_or_else(PoisonError::into_inner) = to;
    }

    /// Moves the reading on.
    pub fn advance(&self, by: Duration) {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        *reading = reading.plus(by);
    }
}

impl TrueTime for Manual {
    fn now(&self) -> Result<Interval, ClockError> {
        Ok(Interval::around(*self.reading.lock().unwrap_or_else(PoisonError::into_inner), self.epsilon))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NANOS_PER_SECOND: u64 = 1_000_000_000;

    const EPSILON: Duration = Duration::from_millis(1);

    #[test]
    fn a_time_is_after_only_when_the_whole_interval_is() {
        let now = Interval::around(Timestamp(5_000_000), EPSILON);
        assert!(now.is_after(Timestamp(3_999_999)));
        assert!(!now.is_after(Timestamp(4_000_000)));
        assert!(!now.is_before(Timestamp(6_000_000)));
        assert!(now.is_before(Timestamp(6_000_001)));
    }

    #[test]
    fn the_kernel_is_believed_only_when_it_is_synchronised() {
        assert!(matches!(kernel_error(STATUS_UNSYNCHRONISED, 10), Err(ClockError::Unsynchronised)));
        assert!(matches!(kernel_error(0x2041, 16_000_000), Err(ClockError::Unsynchronised)));
        assert!(matches!(kernel_error(0x2001, -1), Err(ClockError::Unsynchronised)));
        assert_eq!(kernel_error(0x2001, 750).unwrap(), Duration::from_micros(750));
    }

    #[test]
    fn the_kernels_reading_is_in_the_unit_that_it_says() {
        assert_eq!(kernel_reading(STATUS_NANOSECONDS, 2, 5), Timestamp(2_000_000_005));
        assert_eq!(kernel_reading(0, 2, 5), Timestamp(2_000_005_000));
        assert_eq!(kernel_reading(0, -1, 0), Timestamp::ZERO);
    }

    #[test]
    fn this_kernel_answers_with_a_bound_or_a_reason() {
        match Kernel::new(EPSILON).now() {
            Ok(now) => assert!(now.latest.0 - now.earliest.0 <= 2 * nanos(EPSILON)),
            Err(why) => assert!(!matches!(why, ClockError::Untold(_))),
        }
    }

    #[test]
    fn a_fixed_bound_is_as_wide_as_said() {
        let now = Fixed::new(EPSILON).now().unwrap();
        assert_eq!(now.latest.0 - now.earliest.0, 2 * nanos(EPSILON));
        assert!(now.earliest > Timestamp(1_600_000_000 * NANOS_PER_SECOND));
    }

    #[test]
    fn clones_of_a_manual_clock_move_together() {
        let clock = Manual::new(Timestamp(10_000_000), EPSILON);
        let other = clock.clone();
        clock.advance(Duration::from_millis(2));
        assert_eq!(other.now().unwrap().latest, Timestamp(13_000_000));
        clock.set(Timestamp(1_000_000));
        assert_eq!(other.now().unwrap().earliest, Timestamp::ZERO);
    }
}
