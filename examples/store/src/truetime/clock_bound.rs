//! The bound that the clock-bound daemon keeps in memory that it shares: tighter than the kernel's, since it knows what
//! the time server said of its own error, and for how long that may be believed.

use std::{cell::RefCell, path::PathBuf, time::Duration};

use clock_bound_client::{ClockBoundClient, ClockBoundNowResult, ClockStatus};

use super::{ClockError, Interval, Timestamp, TrueTime};

/// Where the daemon shares its memory, unless it was told otherwise.
pub const DEFAULT_PATH: &str = clock_bound_client::CLOCKBOUND_SHM_DEFAULT_PATH;

thread_local! {
    /// The daemon's memory as it is mapped for this thread, and where it was found: a mapping is one thread's.
    static MAPPED: RefCell<Option<(PathBuf, ClockBoundClient)>> = const { RefCell::new(None) };
}

/// The machine's clock with the error that the clock-bound daemon vouches for (clock-bound's shared memory, version 1).
#[derive(Clone, Debug)]
pub struct ClockBound {
    path: PathBuf,
    /// Above this every commit would wait longer than a client does.
    widest: Duration,
}

impl ClockBound {
    /// What a daemon shares at `path`, for intervals up to `widest` on either side.
    pub fn new(path: PathBuf, widest: Duration) -> Self {
        Self { path, widest }
    }

    fn read(&self, mapped: &mut Option<(PathBuf, ClockBoundClient)>) -> Result<Interval, ClockError> {
        let client = match mapped {
            Some((path, client)) if *path == self.path => client,
            _ => &mut mapped.insert((self.path.clone(), self.map()?)).1,
        };
        let ClockBoundNowResult { earliest, latest, clock_status } = client.now().map_err(untold)?;
        match clock_status {
            ClockStatus::Synchronized | ClockStatus::FreeRunning => {}
            ClockStatus::Unknown => return Err(ClockError::Untold("it is not synchronised".to_owned())),
            ClockStatus::Disrupted => return Err(ClockError::Untold("the machine was disrupted".to_owned())),
        }
        let timestamp = |seconds: i64, nanos: i64| {
            let since = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
            Timestamp(u64::try_from(since.max(0)).unwrap_or(u64::MAX))
        };
        let interval = Interval {
            earliest: timestamp(earliest.tv_sec(), earliest.tv_nsec()),
            latest: timestamp(latest.tv_sec(), latest.tv_nsec()),
        };
        let epsilon = Duration::from_nanos(interval.latest.0.saturating_sub(interval.earliest.0) / 2);
        if epsilon > self.widest { Err(ClockError::TooWide(epsilon)) } else { Ok(interval) }
    }

    fn map(&self) -> Result<ClockBoundClient, ClockError> {
        let path = self.path.to_str().ok_or_else(|| ClockError::Untold("its path is not text".to_owned()))?;
        ClockBoundClient::new_with_path(path).map_err(untold)
    }
}

impl TrueTime for ClockBound {
    fn now(&self) -> Result<Interval, ClockError> {
        MAPPED.with_borrow_mut(|mapped| {
            let result = self.read(mapped);
            // A daemon that was started anew may share other memory.
            if result.is_err() {
                *mapped = None;
            }
            result
        })
    }
}

fn untold(error: clock_bound_client::ClockBoundError) -> ClockError {
    let detail = if error.detail.is_empty() { String::new() } else { format!(": {}", error.detail) };
    ClockError::Untold(format!("{:?}{detail}", error.kind))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clock_bound_shm::{
        ClockErrorBound, ClockStatus, ShmWrite as _, ShmWriter,
        common::{CLOCK_MONOTONIC, clock_gettime_safe},
    };

    use super::*;
    use crate::truetime::Fixed;

    const WIDEST: Duration = Duration::from_millis(250);
    const BOUND: Duration = Duration::from_micros(300);
    /// No less than the clock's resolution while a test reads it twice.
    const WHILE_IT_RUNS: Duration = Duration::from_secs(60);

    /// What a daemon writes that has asked a time server `ago`, and believes it for a second.
    fn share(path: &Path, ago: Duration, status: ClockStatus, bound: Duration) {
        let as_of = clock_gettime_safe(CLOCK_MONOTONIC).unwrap() - ago.into();
        let void_after = as_of + Duration::from_secs(1).into();
        let told = ClockErrorBound::new(as_of, void_after, bound.as_nanos() as i64, 0, 1_000, status, false);
        ShmWriter::new(path).unwrap().write(&told);
    }

    fn clock(home: &tempfile::TempDir) -> (ClockBound, PathBuf) {
        let path = home.path().join("shm0");
        (ClockBound::new(path.clone(), WIDEST), path)
    }

    fn why(clock: &ClockBound) -> String {
        clock.now().unwrap_err().to_string()
    }

    #[test]
    fn the_daemons_bound_is_the_intervals() {
        let home = tempfile::tempdir().unwrap();
        let (clock, path) = clock(&home);
        share(&path, Duration::ZERO, ClockStatus::Synchronized, BOUND);
        let by_kernel = Fixed::new(WHILE_IT_RUNS).now().unwrap();
        let now = clock.now().unwrap();
        let width = now.latest.0 - now.earliest.0;
        assert!(width >= 2 * BOUND.as_nanos() as u64, "{width}");
        assert!(by_kernel.earliest < now.earliest && now.latest < by_kernel.latest);
    }

    #[test]
    fn the_bound_grows_with_what_the_clock_may_have_drifted() {
        let home = tempfile::tempdir().unwrap();
        let (clock, path) = clock(&home);
        let width = || clock.now().map(|now| now.latest.0 - now.earliest.0).unwrap();
        share(&path, Duration::ZERO, ClockStatus::Synchronized, BOUND);
        let fresh = width();
        // Within the time that a daemon may take to be started anew.
        share(&path, Duration::from_secs(2), ClockStatus::Synchronized, BOUND);
        assert!(width() >= fresh + 2 * 1_000);
    }

    #[test]
    fn without_a_daemon_that_knows_there_is_no_time() {
        let home = tempfile::tempdir().unwrap();
        let (clock, path) = clock(&home);
        assert!(why(&clock).contains("SegmentNotInitialized"), "{}", why(&clock));
        for (ago, status) in [
            (Duration::from_secs(600), ClockStatus::Synchronized),
            (Duration::ZERO, ClockStatus::Unknown),
            (Duration::ZERO, ClockStatus::Disrupted),
        ] {
            share(&path, ago, status, BOUND);
            assert!(matches!(clock.now(), Err(ClockError::Untold(_))), "{status:?}");
        }
        share(&path, Duration::ZERO, ClockStatus::Synchronized, 2 * WIDEST);
        assert!(matches!(clock.now(), Err(ClockError::TooWide(_))));
        std::fs::write(&path, b"none of a daemon's").unwrap();
        assert!(matches!(clock.now(), Err(ClockError::Untold(_))));
    }

    #[test]
    fn a_daemon_that_comes_back_is_believed_again() {
        let home = tempfile::tempdir().unwrap();
        let (clock, path) = clock(&home);
        share(&path, Duration::ZERO, ClockStatus::Unknown, BOUND);
        assert!(clock.now().is_err());
        std::fs::remove_file(&path).unwrap();
        share(&path, Duration::ZERO, ClockStatus::FreeRunning, BOUND);
        assert!(clock.now().is_ok());
    }
}
