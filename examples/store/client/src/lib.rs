//! Client of the sample store: transactions, snapshots and tables over all of its splits.
//!
//! A [`Client`] knows which node leads which split, asks that one, and asks again where another try can help.
//!
//! ```no_run
//! # async fn example() -> Result<(), store_client::Error> {
//! use store_client::{Client, Kind, Row};
//!
//! let client = Client::connect(["127.0.0.1:7001".to_owned()])?;
//! client.create_table("accounts", &[("owner", Kind::Text), ("number", Kind::Int)]).await?;
//! let (_, at) = client
//!     .transact(async |txn| {
//!         let row = Row::new("accounts", "alice/17");
//!         if txn.get(&row).await?.is_none() {
//!             txn.put(row, "100".into());
//!         }
//!         Ok(())
//!     })
//!     .await?;
//! println!("written at {at}");
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod book;
mod client;
mod error;
mod names;
mod routes;
mod schema;
mod snapshot;
mod txn;

pub use client::{Client, Options};
pub use error::{Error, Reason, Told};
pub use names::{Found, Moment, Range, Row};
pub use schema::{Column, Kind, NameError, Part, Table, key, sorted};
pub use snapshot::Snapshot;
pub use txn::{Txn, TxnId};

/// The table that holds the declarations of all others: its rows are named by table, and what is in them is an encoded
/// [`proto::CreateTableRequest`].
pub const TABLES: &str = "tables";
/// The largest answer that a node gives: above it, a request asks for too much.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;
/// The trailer that names the [`Reason`] of a refusal.
pub const REASON_TRAILER: &str = "store-reason";
/// The trailer that says where to ask instead: at the address at which the node that says it asks that one.
pub const LEADER_TRAILER: &str = "store-leader";
/// The trailer that says whom to ask instead: the id of that node.
pub const LEADER_NODE_TRAILER: &str = "store-leader-node";

/// Bits of a node's id that are its number.
pub const NODE_NUMBER_BITS: u32 = 16;

/// The number in a node's id, with which it was started. The rest of the id says which disk it has.
pub fn node_number(id: u64) -> u64 {
    id & ((1 << NODE_NUMBER_BITS) - 1)
}

/// The contract as generated from `proto/store.proto`.
pub mod proto {
    #![allow(missing_docs, reason = "the contract has them")]
    tonic::include_proto!("palisade.store.v1");
}
