//! Randomness for spreading load: cheap, lock-free, repeatable from a seed. Never for keys or tokens.

use std::sync::atomic::{AtomicU64, Ordering};

use identity::random::SharedRandom;

/// SplitMix64 over an atomic counter (Steele, Lea, Flood 2014): every draw is one `fetch_add` and three
/// multiplications, so that all of a sidecar's requests may share one generator.
///
/// Whoever sees enough draws can foretell the next: it decides who serves a request, nothing else.
#[derive(Debug)]
pub struct Dice {
    state: AtomicU64,
}

/// 2^64 divided by the golden ratio, odd: SplitMix64's step.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl Dice {
    /// Draws that `seed` alone decides.
    pub fn seeded(seed: u64) -> Self {
        Self { state: AtomicU64::new(seed) }
    }

    /// Draws that differ from process to process, so that sidecars do not move in step.
    pub fn from_system(random: &SharedRandom) -> Self {
        let mut seed = [0; 8];
        // Without randomness this sidecar spreads its load like any other in the same plight; TLS would
        // have stopped long before.
        if random.fill(&mut seed).is_err() {
            tracing::error!("no randomness to spread load with");
        }
        Self::seeded(u64::from_le_bytes(seed))
    }

    /// Draws of their own, decided by these.
    pub fn another(&self) -> Self {
        Self::seeded(self.bits())
    }

    /// 64 random bits.
    pub fn bits(&self) -> u64 {
        mix(self.state.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP))
    }

    /// A number below `bound`, 0 for a bound of 0. The bias is below `bound` / 2^64 (Lemire 2019).
    pub fn below(&self, bound: u64) -> u64 {
        scale(self.bits(), bound)
    }

    /// A fraction in [0, 1).
    pub fn unit(&self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Spreads whatever structure `bits` has over all 64 of them; a bijection.
pub(super) fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Maps 64 evenly spread bits onto 0..`bound`.
pub(super) fn scale(bits: u64, bound: u64) -> u64 {
    // The product's upper half is below `bound`, so it fits.
    ((u128::from(bits) * u128::from(bound)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_sequence_of_splitmix64() {
        let dice = Dice::seeded(1_234_567);
        let drawn: Vec<_> = (0..3).map(|_| dice.bits()).collect();
        assert_eq!(drawn, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn draws_stay_in_bounds_and_are_even() {
        let dice = Dice::seeded(7);
        let mut counts = [0u32; 10];
        for _ in 0..100_000 {
            counts[dice.below(10) as usize] += 1;
            assert!((0.0..1.0).contains(&dice.unit()));
        }
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
        assert_eq!(dice.below(0), 0);
        assert_eq!(dice.below(1), 0);
    }
}
