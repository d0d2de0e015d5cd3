//! Kafka in front of its brokers: each request is understood, and judged topic by topic, group by group.
//!
//! | module | what it holds |
//! |---|---|
//! | `connection` | one client's connection: requests in, answers back, in order. Start reading here. |
//! | `step` | what becomes of one request, and the ways to deny a part of it |
//! | `records`, `topics`, `groups`, `transactions` | the requests, one by one |
//! | `judge` | the decisions, and their records |
//! | `apis` | which requests are understood, in which versions |
//! | `wire` | frames and messages, bounded |
//! | `stats` | counters for `/metrics` |
//!
//! What a broker is asked is what was understood: a request is written anew from what was read of it, but for records,
//! which are passed as they are once everything around them has been read to the last byte. What is not understood ends
//! the connection, as brokers end it.

mod apis;
mod connection;
mod groups;
mod judge;
mod records;
mod stats;
mod step;
#[cfg(test)]
mod tests;
mod topics;
mod transactions;
mod wire;

pub use connection::{Ends, KafkaError, KafkaInbound};
pub use judge::Unjudged;
pub use stats::KafkaStats;
pub use wire::Malformed;
