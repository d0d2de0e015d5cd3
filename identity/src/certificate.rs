//! What a certificate says of itself, for people who look. Nothing here is verified.

use std::time::Duration;

use rustls_pki_types::CertificateDer;

use crate::hex;
use crate::leaf::{LeafError, parse_der, since_epoch};

/// A certificate's own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// Whose it is (RFC 4514 form); empty for many SVIDs, whose name is a URI.
    pub subject: String,
    /// Who signed it, by the same form.
    pub issuer: String,
    /// Serial number in lower-case hexadecimal.
    pub serial: String,
    /// Start of validity, since the Unix epoch.
    pub not_before: Duration,
    /// End of validity, since the Unix epoch.
    pub not_after: Duration,
}

impl Described {
    /// Reads one certificate.
    ///
    /// # Errors
    /// It is larger than [`crate::leaf::MAX_CERTIFICATE_BYTES`] or not DER.
    pub fn read(der: &CertificateDer<'_>) -> Result<Self, LeafError> {
        let certificate = parse_der(der)?;
        let validity = certificate.validity();
        Ok(Self {
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            serial: hex::encode(certificate.raw_serial()),
            not_before: since_epoch(validity.not_before.timestamp()),
            not_after: since_epoch(validity.not_after.timestamp()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestAuthority;

    #[test]
    fn a_leaf_names_the_authority_that_signed_it() {
        let authority = TestAuthority::new("bank.example");
        let svid = authority.issue("/service/web");
        let leaf = Described::read(&svid.chain()[0]).unwrap();
        assert_eq!((leaf.serial.as_str(), leaf.not_after), (svid.serial(), svid.not_after()));
        let root = Described::read(&authority.bundle().authorities()[0]).unwrap();
        assert_eq!(leaf.issuer, root.subject);
        assert_eq!(Described::read(&CertificateDer::from(vec![0x30, 0])), Err(LeafError::Der));
    }
}
