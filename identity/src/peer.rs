//! What a finished handshake proved about the other side.

use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};

use crate::bundle::BundleSet;
use crate::id::SpiffeId;
use crate::leaf::{self, LeafError};
use crate::verify;

/// The other end of a mutually authenticated connection.
///
/// INVARIANT: only built from the certificate of a handshake that one of our verifiers accepted.
#[derive(Debug, Clone)]
pub struct Peer {
    id: SpiffeId,
    serial: String,
    not_after: Duration,
    /// What it presented, leaf first.
    chain: Arc<[CertificateDer<'static>]>,
}

impl Peer {
    /// The peer of a finished handshake, from the certificates its connection holds
    /// (`rustls::CommonState::peer_certificates`). `None` if it presented none.
    pub fn from_handshake(certificates: Option<&[CertificateDer<'_>]>) -> Option<Result<Self, LeafError>> {
        let chain = certificates?;
        Some(leaf::parse(chain.first()?).map(|leaf| Self {
            id: leaf.id,
            serial: leaf.serial,
            not_after: leaf.not_after,
            chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
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

    /// Whether `bundles` vouch for it at `now`, as others did at its handshake.
    pub fn is_trusted(&self, bundles: &BundleSet, now: UnixTime) -> bool {
        let Some((leaf, intermediates)) = self.chain.split_first() else { return false };
        verify::verify_chain(leaf, intermediates, bundles, now).is_ok()
    }

    /// When its certificate ends, since the Unix epoch: the connection ends no later.
    pub fn not_after(&self) -> Duration {
        self.not_after
    }
}
