//! What the vault makes of randomness.

pub use identity::random::SharedRandom;
use ring::rand::SecureRandom;
use thiserror::Error;
use zeroize::Zeroizing;

/// The system gave no randomness: nothing is made rather than made guessable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the system's random generator failed")]
pub struct RandomError;

/// Fresh bytes that must stay secret.
pub(crate) fn secret<const N: usize>(random: &dyn SecureRandom) -> Result<Zeroizing<[u8; N]>, RandomError> {
    let mut bytes = Zeroizing::new([0; N]);
    random.fill(bytes.as_mut_slice()).map_err(|_| RandomError)?;
    Ok(bytes)
}

/// Fresh bytes that may be seen.
pub(crate) fn public<const N: usize>(random: &dyn SecureRandom) -> Result<[u8; N], RandomError> {
    let mut bytes = [0; N];
    random.fill(&mut bytes).map_err(|_| RandomError)?;
    Ok(bytes)
}

/// A random UUID (RFC 9562 §5.4), the form in which Vault names requests and nonces.
pub(crate) fn uuid(random: &dyn SecureRandom) -> Result<String, RandomError> {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = public::<16>(random)?;
    let time_high = u16::from_be_bytes([(g & 0x0f) | 0x40, h]);
    let variant = u16::from_be_bytes([(i & 0x3f) | 0x80, j]);
    let first = u32::from_be_bytes([a, b, c, d]);
    let second = u16::from_be_bytes([e, f]);
    let last = u64::from_be_bytes([0, 0, k, l, m, n, o, p]);
    Ok(format!("{first:08x}-{second:04x}-{time_high:04x}-{variant:04x}-{last:012x}"))
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;

    use super::*;

    #[test]
    fn a_uuid_carries_its_version_and_variant() {
        let text = uuid(&SystemRandom::new()).unwrap();
        let marks: Vec<_> = text.bytes().enumerate().filter(|(_, b)| *b == b'-').map(|(at, _)| at).collect();
        assert_eq!((text.len(), marks), (36, vec![8, 13, 18, 23]));
        assert_eq!(text.as_bytes()[14], b'4');
        assert!(b"89ab".contains(&text.as_bytes()[19]));
    }
}
