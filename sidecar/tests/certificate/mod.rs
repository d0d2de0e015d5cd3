//! X.509 certificates (RFC 5280 §4.1) written field by field, so that any field can be wrong.

use std::time::Duration;

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use time::macros::format_description;

const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OID: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const UTC_TIME: u8 = 0x17;
pub(crate) const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// `[n]` of a GeneralName (RFC 5280 §4.2.1.6).
const OTHER_NAME: u8 = 0xa0;
const EMAIL: u8 = 0x81;
const DNS: u8 = 0x82;
const URI: u8 = 0x86;

pub(crate) const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
pub(crate) const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
pub(crate) const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
pub(crate) const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];
pub(crate) const NAME_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x1e];
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const PRIME256V1: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const ECDSA_WITH_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
const ECDSA_WITH_SHA384: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03];
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
const ED25519: &[u8] = &[0x2b, 0x65, 0x70];
const SECP521R1: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x23];

/// Purposes of a key (RFC 5280 §4.2.1.12).
pub(crate) const SERVER_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01];
pub(crate) const CLIENT_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02];
pub(crate) const CODE_SIGNING: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x03];
pub(crate) const ANY_PURPOSE: &[u8] = &[0x55, 0x1d, 0x25, 0x00];

/// Bits of a KeyUsage (RFC 5280 §4.2.1.3), as its first byte has them.
pub(crate) const DIGITAL_SIGNATURE: u8 = 0x80;
pub(crate) const KEY_ENCIPHERMENT: u8 = 0x20;
pub(crate) const KEY_CERT_SIGN: u8 = 0x04;
pub(crate) const CRL_SIGN: u8 = 0x02;

/// A tag, a length and the contents.
pub(crate) fn tlv(tag: u8, contents: &[u8]) -> Vec<u8> {
    let length = contents.len();
    let mut der = vec![tag];
    match length {
        0..0x80 => der.push(length as u8),
        0x80..0x100 => der.extend([0x81, length as u8]),
        _ => der.extend([0x82, (length >> 8) as u8, length as u8]),
    }
    assert!(length < 0x1_0000);
    der.extend_from_slice(contents);
    der
}

pub(crate) fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    tlv(SEQUENCE, &parts.concat())
}

fn bit_string(bytes: &[u8]) -> Vec<u8> {
    tlv(BIT_STRING, &[&[0], bytes].concat())
}

/// A name of one part, or of none.
pub(crate) fn name(common: &str) -> Vec<u8> {
    if common.is_empty() {
        return sequence(&[]);
    }
    let part = sequence(&[&tlv(OID, COMMON_NAME), &tlv(UTF8_STRING, common.as_bytes())]);
    sequence(&[&tlv(SET, &part)])
}

pub(crate) fn moment(since_epoch: Duration) -> Vec<u8> {
    let moment = OffsetDateTime::UNIX_EPOCH + since_epoch;
    let format = format_description!("[year repr:last_two][month][day][hour][minute][second]Z");
    utc_time(&moment.format(format).unwrap())
}

pub(crate) fn utc_time(text: &str) -> Vec<u8> {
    tlv(UTC_TIME, text.as_bytes())
}

pub(crate) fn uri(text: impl AsRef<[u8]>) -> Vec<u8> {
    tlv(URI, text.as_ref())
}

pub(crate) fn dns(text: &str) -> Vec<u8> {
    tlv(DNS, text.as_bytes())
}

pub(crate) fn email(text: &str) -> Vec<u8> {
    tlv(EMAIL, text.as_bytes())
}

/// A user principal name that reads like a URI name.
pub(crate) fn principal_name(text: &str) -> Vec<u8> {
    let kind = tlv(OID, &[0x2b, 0x06, 0x01, 0x04, 0x01, 0x82, 0x37, 0x14, 0x02, 0x03]);
    tlv(OTHER_NAME, &[kind, tlv(0xa0, &tlv(UTF8_STRING, text.as_bytes()))].concat())
}

pub(crate) fn constraints(ca: bool, depth: Option<u8>) -> Vec<u8> {
    let ca = if ca { tlv(BOOLEAN, &[0xff]) } else { Vec::new() };
    let depth = depth.map_or_else(Vec::new, |depth| tlv(INTEGER, &[depth]));
    sequence(&[&ca, &depth])
}

pub(crate) fn usage(bits: u8) -> Vec<u8> {
    let unused = if bits == 0 { 0 } else { bits.trailing_zeros() as u8 };
    tlv(BIT_STRING, &[unused, bits])
}

pub(crate) fn purposes(oids: &[&[u8]]) -> Vec<u8> {
    let oids: Vec<_> = oids.iter().map(|oid| tlv(OID, oid)).collect();
    tlv(SEQUENCE, &oids.concat())
}

/// Only URIs of this host (RFC 5280 §4.2.1.10).
pub(crate) fn only_uris_of(host: &str) -> Vec<u8> {
    sequence(&[&tlv(0xa0, &sequence(&[&uri(host)]))])
}

pub(crate) fn ecdsa_sha256() -> Vec<u8> {
    sequence(&[&tlv(OID, ECDSA_WITH_SHA256)])
}

pub(crate) fn ecdsa_sha384() -> Vec<u8> {
    sequence(&[&tlv(OID, ECDSA_WITH_SHA384)])
}

fn curve_key(curve: &[u8], point: &[u8]) -> Vec<u8> {
    sequence(&[&sequence(&[&tlv(OID, EC_PUBLIC_KEY), &tlv(OID, curve)]), &bit_string(point)])
}

pub(crate) fn p256_key(point: &[u8]) -> Vec<u8> {
    curve_key(PRIME256V1, point)
}

pub(crate) fn p521_key() -> Vec<u8> {
    curve_key(SECP521R1, &[&[4], [7; 132].as_slice()].concat())
}

pub(crate) fn ed25519_key() -> Vec<u8> {
    sequence(&[&sequence(&[&tlv(OID, ED25519)]), &bit_string(&[7; 32])])
}

pub(crate) fn rsa_key(bits: usize) -> Vec<u8> {
    let modulus = [[0].as_slice(), &vec![0xc1; bits / 8]].concat();
    let key = sequence(&[&tlv(INTEGER, &modulus), &tlv(INTEGER, &[1, 0, 1])]);
    sequence(&[&sequence(&[&tlv(OID, RSA), &[0x05, 0x00]]), &bit_string(&key)])
}

pub(crate) fn unknown_key() -> Vec<u8> {
    sequence(&[&sequence(&[&tlv(OID, &[0x2a, 0x03, 0x04])]), &bit_string(&[7; 32])])
}

pub(crate) struct Extension {
    pub(crate) oid: &'static [u8],
    pub(crate) critical: bool,
    pub(crate) value: Vec<u8>,
}

/// A certificate that nobody has signed yet.
pub(crate) struct Draft {
    /// As the field's contents; none for version 1, which says nothing.
    pub(crate) version: Option<u8>,
    pub(crate) serial: Vec<u8>,
    /// What the signed part says that it is signed by.
    pub(crate) algorithm: Vec<u8>,
    pub(crate) issuer: Vec<u8>,
    pub(crate) not_before: Vec<u8>,
    pub(crate) not_after: Vec<u8>,
    pub(crate) subject: Vec<u8>,
    pub(crate) key: Vec<u8>,
    pub(crate) extensions: Vec<Extension>,
}

impl Draft {
    pub(crate) fn extension(&mut self, oid: &[u8]) -> &mut Extension {
        self.extensions.iter_mut().find(|extension| extension.oid == oid).unwrap()
    }

    pub(crate) fn without(&mut self, oid: &[u8]) {
        self.extensions.retain(|extension| extension.oid != oid);
    }

    pub(crate) fn twice(&mut self, oid: &[u8]) {
        let Extension { oid, critical, value } = self.extension(oid);
        let again = Extension { oid, critical: *critical, value: value.clone() };
        self.extensions.push(again);
    }

    /// The subject alternative name holds these, in the order given.
    pub(crate) fn names(&mut self, names: &[Vec<u8>]) {
        self.extension(SUBJECT_ALT_NAME).value = tlv(SEQUENCE, &names.concat());
    }

    fn to_be_signed(&self) -> Vec<u8> {
        let version = self.version.map_or_else(Vec::new, |version| tlv(0xa0, &tlv(INTEGER, &[version])));
        let extensions: Vec<_> = self.extensions.iter().map(Extension::der).collect();
        let extensions = match extensions.is_empty() {
            true => Vec::new(),
            false => tlv(0xa3, &tlv(SEQUENCE, &extensions.concat())),
        };
        sequence(&[
            &version,
            &tlv(INTEGER, &self.serial),
            &self.algorithm,
            &self.issuer,
            &sequence(&[&self.not_before, &self.not_after]),
            &self.subject,
            &self.key,
            &extensions,
        ])
    }
}

impl Extension {
    fn der(&self) -> Vec<u8> {
        let critical = if self.critical { tlv(BOOLEAN, &[0xff]) } else { Vec::new() };
        sequence(&[&tlv(OID, self.oid), &critical, &tlv(OCTET_STRING, &self.value)])
    }
}

/// A P-256 key and whose it is.
pub(crate) struct Holder {
    pub(crate) name: Vec<u8>,
    pub(crate) pkcs8: Vec<u8>,
    key: EcdsaKeyPair,
}

impl Holder {
    pub(crate) fn new(common: &str) -> Self {
        let (algorithm, random) = (&ECDSA_P256_SHA256_ASN1_SIGNING, SystemRandom::new());
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap().as_ref().to_vec();
        let key = EcdsaKeyPair::from_pkcs8(algorithm, &pkcs8, &random).unwrap();
        Self { name: name(common), pkcs8, key }
    }

    pub(crate) fn public_key(&self) -> Vec<u8> {
        p256_key(self.key.public_key().as_ref())
    }

    pub(crate) fn sign(&self, draft: &Draft) -> CertificateDer<'static> {
        let signed = draft.to_be_signed();
        let signature = self.key.sign(&SystemRandom::new(), &signed).unwrap();
        sequence(&[&signed, &ecdsa_sha256(), &bit_string(signature.as_ref())]).into()
    }
}
