//! HTTP/1.1 at the edges: a server for the connections of local apps, a client to the app on loopback.
//!
//! Between the sidecars requests travel in one connection; at both ends of that road each app speaks plain
//! HTTP/1.1, and what that costs is most of what a request costs. So: one task a connection, no channel, no
//! timer and no copy a request; a message with a small body is one read and one write on each side.
//! `http::HeaderMap` stays the form that is judged.
//!
//! Strict in what it takes (RFC 9112 §11.2): a message that two parsers could read differently is refused and
//! its connection closed, in both directions.

mod client;
mod decode;
mod head;
mod loan;
mod outgoing;
pub(crate) mod pace;
mod reader;
mod server;

use std::future::poll_fn;

pub use client::{Client, ClientError, Connect};
pub use decode::BodyError;
pub use head::HeadError;
pub use server::{Ended, Unread, serve};

/// A body with an announced length up to this is waited for and passed on whole.
const MAX_WHOLE_BYTES: u64 = 64 * 1024;
