//! Randomness as a parameter, so that serials, tokens and jitter can be simulated.
//!
//! Private keys and signatures always use the machine's generator, whatever is passed here: a
//! simulation must never be one mistake away from predictable keys.
//!
//! This is a trait of its own beside `identity::random::SharedRandom`, because ring seals its trait: no
//! generator but ring's can implement that one, and the tests of rotation and backoff need one that gives
//! the same bytes at every run.

use std::sync::Arc;
use std::time::Duration;

use ring::rand::SecureRandom as _;
use thiserror::Error;

/// The generator gave nothing; whoever needed it must not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the random generator failed")]
pub struct RandomError;

/// Where a component gets its random bytes from.
pub trait Random: Send + Sync + std::fmt::Debug {
    /// Fills `bytes`.
    ///
    /// # Errors
    /// [`RandomError`] if the generator failed; `bytes` is then not to be used.
    fn fill(&self, bytes: &mut [u8]) -> Result<(), RandomError>;
}

/// A shared generator.
pub type SharedRandom = Arc<dyn Random>;

/// The machine's generator.
#[derive(Debug, Clone)]
pub struct SystemRandom(ring::rand::SystemRandom);

impl SystemRandom {
    /// The machine's generator, shared.
    pub fn shared() -> SharedRandom {
        Arc::new(Self(ring::rand::SystemRandom::new()))
    }
}

impl Random for SystemRandom {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), RandomError> {
        self.0.fill(bytes).map_err(|_| RandomError)
    }
}

/// A random share of `most`, for jitter. Without randomness there is no jitter, which harms nobody.
pub(crate) fn up_to(random: &dyn Random, most: Duration) -> Duration {
    let mut bytes = [0u8; 4];
    match random.fill(&mut bytes) {
        Ok(()) => most.mul_f64(f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX)),
        Err(RandomError) => Duration::ZERO,
    }
}

/// A generator that gives zeros: no jitter, and predictable everything else. Tests only.
#[cfg(test)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Zeros;

#[cfg(test)]
impl Random for Zeros {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), RandomError> {
        bytes.fill(0);
        Ok(())
    }
}
