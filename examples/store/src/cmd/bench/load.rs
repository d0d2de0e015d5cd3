//! Clients that do the same thing over and over, and how long it took each time.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::{task::JoinSet, time::sleep};

use crate::cmd::torture::random::Random;

/// Before anything counts: connections, caches, leaders.
const WARM_UP: Duration = Duration::from_millis(400);
/// Clients that share a connection to each server, whoever is measured.
pub(crate) const CLIENTS_A_CONNECTION: usize = 8;
/// How many rows there are to choose from.
pub(crate) const ROWS: u64 = 10_000;
/// What is in each, everywhere.
pub(crate) const VALUE_BYTES: usize = 200;

/// Things to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// One row written without being read.
    BlindWrite,
    /// One row read and written.
    ReadModifyWrite,
    /// Two rows read and written, of different splits where there are any.
    Transfer,
    /// One row, as it is now.
    StrongRead,
    /// One row, as it was of late.
    StaleRead,
    /// Nine strong reads, one transaction that writes a row.
    Mix,
}

impl Work {
    /// All there are.
    pub(crate) const ALL: [Self; 6] = [
        Self::BlindWrite,
        Self::ReadModifyWrite,
        Self::Transfer,
        Self::StrongRead,
        Self::StaleRead,
        Self::Mix,
    ];

    /// What a table calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::BlindWrite => "blind writes, one split",
            Self::ReadModifyWrite => "read-modify-writes, one split",
            Self::Transfer => "transfers across two splits",
            Self::StrongRead => "strong point reads",
            Self::StaleRead => "stale point reads",
            Self::Mix => "90% strong reads, 10% writes",
        }
    }

    /// What one of a mix is.
    pub(crate) fn draw(self, random: &mut Random) -> Self {
        match self {
            Self::Mix if random.chance(10) => Self::BlindWrite,
            Self::Mix => Self::StrongRead,
            other => other,
        }
    }
}

/// Something that can be asked to do things.
pub(crate) trait System: Send + Sync + 'static {
    /// Does one thing to its end, retries and all.
    fn once(
        &self,
        work: Work,
        client: usize,
        random: &mut Random,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// How it went.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Measured {
    /// How long each took that ended well, in microseconds.
    pub(crate) micros: Vec<u64>,
    /// How long all of it took.
    pub(crate) seconds: f64,
    /// What ended otherwise.
    pub(crate) failures: u64,
    /// Why the last of those did.
    pub(crate) failure: Option<String>,
}

impl Measured {
    /// Another round of the same.
    pub(crate) fn add(&mut self, other: Self) {
        self.micros.extend(other.micros);
        self.seconds += other.seconds;
        self.failures += other.failures;
        self.failure = other.failure.or(self.failure.take());
    }

    /// How many a second.
    pub(crate) fn rate(&self) -> f64 {
        let count = u32::try_from(self.micros.len()).unwrap_or(u32::MAX);
        if self.seconds > 0.0 { f64::from(count) / self.seconds } else { 0.0 }
    }

    /// So many of a hundred took no longer, in milliseconds.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.micros.clone();
        sorted.sort_unstable();
        let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
        let micros = sorted.get(index).copied().unwrap_or(0);
        f64::from(u32::try_from(micros).unwrap_or(u32::MAX)) / 1000.0
    }
}

/// Lets so many clients do it for so long.
///
/// # Errors
///
/// When a client does not come to its end.
pub(crate) async fn measure<S: System>(
    system: &Arc<S>,
    work: Work,
    clients: usize,
    time: Duration,
    seed: u64,
) -> anyhow::Result<Measured> {
    let (counting, stopped) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let (system, counting, stopped) = (Arc::clone(system), Arc::clone(&counting), Arc::clone(&stopped));
        let random = Random::new(seed, u64::try_from(client).unwrap_or(0));
        tasks.spawn(async move { one(&*system, work, client, random, &counting, &stopped).await });
    }
    sleep(WARM_UP).await;
    counting.store(true, Ordering::Relaxed);
    let began = Instant::now();
    sleep(time).await;
    let seconds = began.elapsed().as_secs_f64();
    stopped.store(true, Ordering::Relaxed);
    let mut all = Measured::default();
    while let Some(one) = tasks.join_next().await {
        all.add(one.context("a client did not end")?);
    }
    all.seconds = seconds;
    Ok(all)
}

async fn one<S: System>(
    system: &S,
    work: Work,
    client: usize,
    mut random: Random,
    counting: &AtomicBool,
    stopped: &AtomicBool,
) -> Measured {
    let mut mine = Measured::default();
    while !stopped.load(Ordering::Relaxed) {
        let counted = counting.load(Ordering::Relaxed);
        let began = Instant::now();
        let done = system.once(work.draw(&mut random), client, &mut random).await;
        let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        match done {
            // What ends after the end does not count: it was not done within the time.
            Ok(()) if counted && !stopped.load(Ordering::Relaxed) => mine.micros.push(micros),
            Ok(()) => {}
            Err(error) => {
                mine.failures += 1;
                mine.failure = Some(format!("{error:#}"));
            }
        }
    }
    mine
}

/// A value of the usual size, which says who wrote it.
pub(crate) fn value(random: &mut Random) -> Vec<u8> {
    let mut value = format!("{:016x}", random.next()).into_bytes();
    value.resize(VALUE_BYTES, b'.');
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_ended_well() {
        let measured = Measured {
            micros: (1..=100).rev().map(|n| n * 1000).collect(),
            seconds: 2.0,
            ..Measured::default()
        };
        assert_eq!((measured.percentile(50), measured.percentile(99)), (51.0, 100.0));
        assert_eq!(measured.rate(), 50.0);
        assert_eq!(Measured::default().percentile(50), 0.0);
    }

    #[test]
    fn a_mix_is_mostly_reads() {
        let mut random = Random::new(1, 1);
        let reads = (0..1000).filter(|_| Work::Mix.draw(&mut random) == Work::StrongRead).count();
        assert!((850..950).contains(&reads));
    }
}
