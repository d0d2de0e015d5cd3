//! Workload identity: what a SPIFFE ID is, what an X.509-SVID proves, and how a TLS handshake turns
//! one into a [`Peer`].
//!
//! Nothing here knows of policy, proxies or storage. Everything above verifies identity through this
//! crate and in no other way.
//!
//! | module | what it holds |
//! |---|---|
//! | [`id`] | [`TrustDomain`] and [`SpiffeId`], valid by construction |
//! | [`svid`], [`bundle`] | a workload's certificate and key; the authorities of a trust domain |
//! | [`leaf`] | the X509-SVID rules that a certificate must keep |
//! | [`certificate`] | what a certificate says of itself, for people who look |
//! | [`verify`], [`tls`] | rustls verifiers and configurations that follow a rotating identity |
//! | [`source`] | where a process gets its own identity from, and hears of rotations |
//! | [`workload_api`] | the SPIFFE Workload API: generated types and the client |
//! | [`pem`] | an identity from PEM files, followed as they change |
//! | [`jws`], [`json`] | compact JWS and JSON, parsed so that a document has one meaning |
//! | [`txn`] | transaction tokens: on whose behalf a request travels, and through whom |
//! | [`clock`], [`random`], [`scope`] | time, randomness and task lifetimes, passed in so that they can be simulated |
//! | [`files`], [`socket`], [`hex`] | secret files and state directories; Unix sockets; hexadecimal |

pub mod bundle;
pub mod certificate;
pub mod clock;
pub mod files;
pub mod hex;
pub mod id;
pub mod json;
pub mod jws;
pub mod leaf;
pub mod peer;
pub mod pem;
pub mod pseudonym;
pub mod random;
pub mod scope;
pub mod served;
pub mod socket;
pub mod source;
pub mod svid;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tls;
pub mod txn;
pub mod verify;
pub mod workload_api;

pub use bundle::{BundleSet, TrustBundle};
pub use clock::{Clock, SystemClock};
pub use id::{SpiffeId, TrustDomain};
pub use peer::Peer;
pub use scope::Scope;
pub use source::{Identity, IdentitySource};
pub use svid::X509Svid;
