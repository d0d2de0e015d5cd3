//! What is known of one endpoint's load: requests in flight, and a moving average of answer times that
//! rises at once and falls slowly ("peak EWMA", as Finagle and linkerd have it).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// How fast an old answer time loses weight: after this its share is 1/e. Linkerd's figure.
pub const DECAY: Duration = Duration::from_secs(10);
/// An endpoint that fails at once would look like the fastest of all and draw every request; a failure
/// counts as an answer at least this slow.
pub const FAILURE_PENALTY: Duration = Duration::from_secs(1);

/// Load of one endpoint.
#[derive(Debug, Default)]
pub struct Load {
    in_flight: AtomicU32,
    /// The average in seconds (an `f32`) in the upper half, when it was measured in the lower: wall-clock
    /// milliseconds modulo 2^32. Zero as a whole: nothing measured yet.
    average: AtomicU64,
}

impl Load {
    /// Requests given to the endpoint whose answers have not ended.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn begin(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// The average answer time as of `now`, which falls towards zero while nothing is heard so that an
    /// endpoint once slow is tried again. `None` before the first answer.
    pub fn average(&self, now: Duration) -> Option<Duration> {
        let packed = self.average.load(Ordering::Relaxed);
        (packed != 0).then(|| Duration::from_secs_f32(decayed(packed, millis(now))))
    }

    /// What one more request would cost here: average × (in flight + 1), in seconds.
    ///
    /// An endpoint of which nothing is known costs nothing while it is idle, and much once it has a
    /// request: one goes ahead to measure, the rest wait for what it finds.
    pub(super) fn cost(&self, now: Duration) -> f32 {
        let in_flight = self.in_flight() as f32;
        let average = match self.average.load(Ordering::Relaxed) {
            0 if in_flight == 0.0 => 0.0,
            0 => FAILURE_PENALTY.as_secs_f32(),
            packed => decayed(packed, millis(now)),
        };
        average * (in_flight + 1.0)
    }

    /// An answer's head came `took` after its request was sent.
    pub fn answered(&self, took: Duration, now: Duration) {
        let (took, at) = (took.as_secs_f32().max(f32::MIN_POSITIVE), millis(now));
        let step = |packed: u64| {
            let peak = if packed == 0 { took } else { blend(packed, took, at) };
            Some(pack(peak, at))
        };
        // The closure never declines.
        let _always = self.average.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).is_ok();
    }

    /// The request failed after `took`.
    pub fn failed(&self, took: Duration, now: Duration) {
        self.answered(took.max(FAILURE_PENALTY), now);
    }

    /// Forgets what was measured: the endpoint is tried like a new one.
    pub(super) fn forget(&self) {
        self.average.store(0, Ordering::Relaxed);
    }
}

fn millis(now: Duration) -> u32 {
    // The low 32 bits: differences are right as long as they are below 24 days.
    now.as_millis() as u32
}

fn pack(average: f32, at: u32) -> u64 {
    (u64::from(average.to_bits()) << 32) | u64::from(at)
}

fn unpack(packed: u64) -> (f32, u32) {
    (f32::from_bits((packed >> 32) as u32), packed as u32)
}

/// How much of the old average is left: e^(-elapsed / DECAY). A clock set back counts as no time passed.
fn kept(since: u32, now: u32) -> f32 {
    let elapsed = i32::try_from(now.wrapping_sub(since)).unwrap_or(0);
    (-(elapsed as f32) / DECAY.as_millis() as f32).exp()
}

fn decayed(packed: u64, now: u32) -> f32 {
    let (average, at) = unpack(packed);
    average * kept(at, now)
}

fn blend(packed: u64, took: f32, now: u32) -> f32 {
    let (average, at) = unpack(packed);
    let kept = kept(at, now);
    if took > average * kept { took } else { average * kept + took * (1.0 - kept) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_700_000_000);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_peak_counts_at_once_and_fades_slowly() {
        let load = Load::default();
        assert_eq!(load.average(NOW), None);
        load.answered(ms(10), NOW);
        load.answered(ms(500), NOW);
        let average = |at| load.average(at).unwrap().as_secs_f64();
        assert!((average(NOW) - 0.5).abs() < 1e-6);
        assert!((average(NOW + DECAY) - 0.5 / std::f64::consts::E).abs() < 1e-4);
        load.answered(ms(10), NOW + DECAY);
        let expected = 0.5 / std::f64::consts::E + 0.01 * (1.0 - 1.0 / std::f64::consts::E);
        assert!((average(NOW + DECAY) - expected).abs() < 1e-4);
    }

    #[test]
    fn a_clock_set_back_neither_grows_nor_erases_the_average() {
        let load = Load::default();
        load.answered(ms(10), NOW);
        let before = load.average(NOW - ms(3_600_000)).unwrap();
        assert!((before.as_secs_f64() - 0.01).abs() < 1e-6);
    }

    #[test]
    fn an_unknown_endpoint_gets_one_request_ahead_of_the_rest() {
        let (unknown, known) = (Load::default(), Load::default());
        known.answered(ms(5), NOW);
        assert!(unknown.cost(NOW) < known.cost(NOW));
        unknown.begin();
        assert!(unknown.cost(NOW) > known.cost(NOW));
        unknown.answered(ms(1), NOW);
        unknown.end();
        assert!(unknown.cost(NOW) < known.cost(NOW));
    }

    #[test]
    fn failing_at_once_is_not_being_fast() {
        let (broken, sound) = (Load::default(), Load::default());
        broken.failed(ms(0), NOW);
        sound.answered(ms(200), NOW);
        assert!(broken.cost(NOW) > sound.cost(NOW));
        broken.forget();
        assert!(broken.cost(NOW) < sound.cost(NOW));
    }

    #[test]
    fn an_answer_in_no_time_is_still_an_answer() {
        let load = Load::default();
        load.answered(Duration::ZERO, Duration::ZERO);
        assert!(load.average(Duration::ZERO).is_some());
    }
}
