//! Randomness as a parameter.

use std::sync::Arc;

use ring::rand::{SecureRandom, SystemRandom};

/// A shared source of random bytes: [`system`] in a running process.
///
/// It is handed in like [`crate::clock::SharedClock`], so that what a component takes from its surroundings
/// stands in its constructor. ring alone can implement the trait: nobody can hand a predictable generator
/// to what makes keys and tokens, and what is to be seeded has a trait of its own.
pub type SharedRandom = Arc<dyn SecureRandom + Send + Sync>;

/// The operating system's generator.
pub fn system() -> SharedRandom {
    Arc::new(SystemRandom::new())
}
