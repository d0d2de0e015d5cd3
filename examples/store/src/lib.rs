//! A small Spanner: rows in sorted splits, one consensus group a split, strict two-phase locking at its leader,
//! two-phase commit across splits, versions by commit timestamp, and timestamps from a clock that knows its own error.
//!
//! All but [`serve`] does no I/O but through [`wal::Disk`] and [`engine::Engine`] and reads no clock but what it is told:
//! what a [`node::Node`] decides is a function of that, so that a seeded simulation owns time, network and disk.
//! `README.md` has the design.

#![forbid(unsafe_code)]

pub mod engine;
pub mod group;
pub mod keys;
pub mod lease;
pub mod locks;
pub mod mvcc;
pub mod node;
mod raft_log;
pub mod safe_time;
pub mod schema;
pub mod serve;
pub mod survey;
pub mod truetime;
pub mod txn;
pub mod wal;
pub mod wire;
