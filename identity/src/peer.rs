//! What a finished handshake proved about the other side.

use std::time::Duration;

use rustls_pki_types::CertificateDer;

use crate::id::SpiffeId;
use crate::leaf::{self, LeafError};

/// The other end of a mutually authenticated connection.
///
/// INVARIANT: only built from the certificate of a handshake that one of our verifiers accepted.
#[derive(Debug, Clone)]
pub struct Peer {
    id: SpiffeId,
    serial: String,
    not_after: Duration,
}

impl Peer {
    /// The peer of a finished handshake, from the certificates its connection holds
    /// (`rustls::CommonState::peer_certificates`). `None` if it presented none.
    pub fn from_handshake(certificates: Option<&[CertificateDer<'_>]>) -> Option<Result<Self, LeafError>> {
        let leaf = certificates?.first()?;
        Some(leaf::parse(leaf).map(|leaf| Self {
            id: leaf.id,
            serial: leaf.serial,
            not_after: leaf.not_after,
        }))
    }

    /// The SPIFFE ID it proved.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Its certificate's serial, lower-case hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// When its certificate ends, since the Unix epoch: the connection ends no later.
    pub fn not_after(&self) -> Duration {
        self.not_after
    }
}
