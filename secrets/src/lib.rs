//! The vault.
pub mod barrier;
pub mod random;
pub mod seal;
pub mod storage;
