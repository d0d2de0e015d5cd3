//! The certificate authority of the mesh and the agent that hands its identities out.
//!
//! [`control`] holds the root key, knows which workload may have which SPIFFE ID, and signs for agents.
//! [`agent`] runs once a host, proves the host to control, attests local processes and serves them the
//! SPIFFE Workload API. Everything else reads what these two know.
//!
//! | module | what it holds |
//! |---|---|
//! | [`authority`], [`csr`] | issuing X.509-SVIDs for public keys taken from certificate requests |
//! | [`entry`] | which process gets which SPIFFE ID |
//! | [`control`] | the authority as a process: gRPC for agents, storage, the read model |
//! | [`admin`] | the client of control's admin socket, for the command line |
//! | [`agent`] | node identity, workload attestation, rotation, the Workload API |
//! | [`mesh`] | the client with which a workload hands in its decisions |
//! | [`discovery`] | the client with which a workload says where it serves, and hears where others do |
//! | [`relations`] | what is true of objects, written by API: what it may be, and a workload's clients |
//! | [`policies`], [`release`] | the client with which a workload gets its policies, and how they are signed |
//! | [`model`] | what control tells people and the console |
//! | [`random`] | randomness as a parameter |

pub mod admin;
pub mod agent;
pub mod authority;
mod backoff;
pub mod control;
pub mod csr;
pub mod discovery;
mod endpoint;
pub mod entry;
mod keyfile;
pub mod mesh;
pub mod model;
mod pb;
pub mod policies;
pub mod random;
pub mod relations;
pub mod release;
mod transport;

use identity::{files as state, hex};

pub use identity::files::StateError;
pub use identity::socket::SocketError;
pub use keyfile::KeyFileError;
