//! Clocks that are wrong by as much as is allowed, or by more.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;

/// Where Debian's `libfaketime` is.
const LIBRARIES: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
];

/// Of the bound, clocks within it use so much: the readings of two clocks are not taken at the same time.
const WITHIN_PERCENT: u64 = 80;
/// Clocks beyond the bound are off by up to so many bounds.
const BEYOND_BOUNDS: u64 = 200;

/// How wrong clocks may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Skew {
    /// By less than the nodes are told: all must be well.
    Within,
    /// By far more: the history must be wrong, or nothing is tested.
    Beyond,
}

impl Skew {
    /// The most that a clock is wrong by.
    pub(crate) fn bound(self, epsilon: Duration) -> Duration {
        let percent = match self {
            Self::Within => WITHIN_PERCENT,
            Self::Beyond => BEYOND_BOUNDS * 100,
        };
        let nanos = u64::try_from(epsilon.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(nanos.saturating_mul(percent) / 100)
    }
}

/// The library that lies to a process about the time.
pub(crate) fn library() -> Option<PathBuf> {
    LIBRARIES.iter().map(PathBuf::from).find(|path| path.exists())
}

/// One node's clock: a file that the library reads its error from, again every second.
#[derive(Clone, Debug)]
pub(crate) struct WrongClock {
    file: PathBuf,
    library: PathBuf,
}

impl WrongClock {
    /// A clock that is right so far.
    ///
    /// # Errors
    ///
    /// When its file cannot be written.
    pub(crate) fn create(file: PathBuf, library: PathBuf) -> anyhow::Result<Self> {
        let clock = Self { file, library };
        clock.set(0)?;
        Ok(clock)
    }

    /// What the node's process needs to go by it.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        [
            ("LD_PRELOAD", text(&self.library)),
            ("FAKETIME_TIMESTAMP_FILE", text(&self.file)),
            ("FAKETIME_CACHE_DURATION", "1".into()),
            // Timers go by the monotonic clock, which nobody says is wrong.
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }

    /// It is wrong by so much from now on, within a second.
    ///
    /// # Errors
    ///
    /// When its file cannot be written.
    pub(crate) fn set(&self, nanos: i64) -> anyhow::Result<()> {
        let new = self.file.with_extension("new");
        let written = std::fs::write(&new, offset(nanos)).and_then(|()| std::fs::rename(&new, &self.file));
        written.with_context(|| format!("{} cannot be written", self.file.display()))
    }
}

/// The way in which the library reads it: seconds with a sign.
fn offset(nanos: i64) -> String {
    let sign = if nanos < 0 { '-' } else { '+' };
    let nanos = nanos.unsigned_abs();
    format!("{sign}{}.{:09}\n", nanos / 1_000_000_000, nanos % 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_seconds_with_a_sign() {
        assert_eq!(offset(800_000), "+0.000800000\n");
        assert_eq!(offset(-1_500_000_000), "-1.500000000\n");
    }

    #[test]
    fn a_clock_within_its_bound_stays_within_it() {
        let epsilon = Duration::from_millis(1);
        assert!(Skew::Within.bound(epsilon) < epsilon);
        assert!(Skew::Beyond.bound(epsilon) > epsilon * 10);
    }
}
