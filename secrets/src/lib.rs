//! The vault: secrets that a workload gets by being who it is, over the HTTP API of HashiCorp Vault and
//! OpenBao.
//!
//! Two listeners. The *mesh* listener speaks mutual TLS: the caller's SVID is its login, Cedar policies
//! decide about each secret, and no token exists. The *operator* listener is plain HTTP on loopback for
//! people and tools with a token; on it the vault is made, unsealed and filled.
//!
//! | module | what it holds |
//! |---|---|
//! | [`storage`] | durable records in one redb file, one fsync for many writers |
//! | [`barrier`], [`seal`] | AES-256-GCM under a keyring of numbered terms; Shamir's shares around its root key |
//! | [`kv`] | the KV engine, version 2: versions, check-and-set, delete, undelete, destroy |
//! | [`path`] | the path of a secret, spelt in exactly one way |
//! | [`authorize`] | who may: a [`authorize::Permit`] names the secret that it permits |
//! | [`token`] | root and default tokens, stored as their HMAC |
//! | [`audit`] | the hash-chained audit file |
//! | [`client`] | a small client of the operator's listener |

pub mod audit;
mod auth;
pub mod authorize;
pub mod barrier;
mod cedar;
pub mod client;
mod core;
mod http;
pub mod kv;
pub mod path;
pub mod random;
pub mod seal;
pub mod stamp;
pub mod storage;
pub mod token;
mod vault;

pub use crate::core::{CoreError, SealStatus};
pub use crate::http::{
    BODY_TIMEOUT, CLOSE_GRACE, HANDSHAKE_TIMEOUT, HEAD_TIMEOUT, MAX_BODY_BYTES, MAX_CONNECTIONS,
    MAX_HEAD_BYTES, MAX_HEADERS, MAX_STREAMS, REQUEST_TIMEOUT,
};
pub use crate::random::SharedRandom;
pub use crate::vault::{POLICY_SERVICE, Vault, VaultConfig, VaultError};
