//! What travels between two sidecars: many HTTP exchanges on one mTLS connection.
//!
//! Chosen by measurement over HTTP/1.1 kept alive (no system calls shared between requests) and HTTP/2
//! (HPACK, priorities and two levels of windows that two neighbours do not need). ALPN
//! [`ALPN`]; peers that do not offer it speak HTTP/2 or HTTP/1.1.
//!
//! # The protocol
//!
//! A connection is a sequence of frames: three bytes of payload length, one of kind (its top bit: the
//! sender's half of the exchange ends here), four of exchange number; all integers big-endian.
//!
//! | kind | payload | sent by |
//! |---|---|---|
//! | 0 request | method, target, fields; opens the exchange | client |
//! | 1 response | status, fields | server |
//! | 2 data | at most 16 KiB of body | both |
//! | 3 trailers | fields; ends the sender's half | both |
//! | 4 reset | one byte: why; ends both halves | both |
//! | 5 credit | u32: so many more bytes of data may be sent in this exchange | both |
//! | 6 go away | nothing: the sender opens (client) or wants (server) no more exchanges | both |
//! | 7 ping, 8 pong | nothing | both |
//!
//! A head is `u8` length and method, `u16` length and target (request), or `u16` status (response); then one
//! `u8` for the number of fields and each field as `u8` and `u16` lengths, name in lower case, value. Lengths
//! instead of delimiters: there is nothing to split, fold or smuggle. Exchange numbers rise by one from 1.
//!
//! Each half of an exchange begins with [`INITIAL_WINDOW_BYTES`] of credit. A receiver whose consumer keeps up
//! grants more, up to [`MAX_WINDOW_BYTES`], out of a budget that all exchanges of the connection share: the
//! smallest window is everybody's own, so a stalled exchange stalls nobody else, and what a peer can make us
//! hold is bounded by `MAX_EXCHANGES × INITIAL_WINDOW_BYTES + EXTRA_WINDOW_BYTES`.
//!
//! An orderly end loses nothing: either side says "go away", the client answers in kind when it opens no
//! more, and what is open runs to its end. Anything else that is wrong ends the connection: the peer is an
//! authenticated sidecar, not a browser to be humoured.

mod client;
mod driver;
mod exchange;
mod frame;
mod server;

pub(crate) use client::{Handle, SendError, connect};
pub(crate) use server::serve;

/// Names the protocol in the TLS handshake (RFC 7301).
pub(crate) const ALPN: &[u8] = b"palisade-mux/1";

/// Exchanges open at once on one connection. Clients open another connection earlier than that.
const MAX_EXCHANGES: usize = 128;
/// Workers that wait for the next request of a connection.
const MAX_IDLE_WORKERS: usize = 64;
/// What a sender may send before the receiver has said anything.
const INITIAL_WINDOW_BYTES: u32 = 16 * 1024;
/// Where a window stops growing: enough for 2 Gbit/s over a round trip of 1 ms.
const MAX_WINDOW_BYTES: u32 = 256 * 1024;
/// What all windows of a connection may grow by together.
const EXTRA_WINDOW_BYTES: u32 = 1024 * 1024;
/// Frames waiting for the socket before senders wait too.
const MAX_WAITING_BYTES: usize = 256 * 1024;
/// Largest data frame: one TLS record (RFC 8446 §5.1).
const MAX_DATA_BYTES: usize = 16 * 1024;
/// Largest head: room for a transaction token of eight links beside ordinary fields.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Fields of a head, as on the other listeners.
const MAX_FIELDS: usize = 100;

#[cfg(test)]
mod tests;
