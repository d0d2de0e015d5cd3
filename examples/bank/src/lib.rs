//! The sample bank: three plain HTTP services, [`web`], [`accounts`] and [`payments`].
//!
//! They hold no TLS, no token and no line of authentication or authorization: each is heard only by
//! its own sidecar on loopback and calls the others only through that sidecar's outbound ports. What
//! they do for the mesh is two small things that any service can do:
//!
//! * copy `traceparent` from the request they serve onto the calls they make for it, which is how the
//!   person asking travels along ([`call`]);
//! * answer `POST /.well-known/palisade/entities`, so that their sidecar can learn who owns an account
//!   before it lets an unsafe request through.
//!
//! The crate depends on none of the mesh's crates: it is a customer, and could live in another
//! repository.

mod call;
mod error;
mod policies;
mod serve;
mod state;
mod wire;

pub mod accounts;
pub mod payments;
pub mod web;

pub use error::BankError;
pub use policies::POLICIES;
