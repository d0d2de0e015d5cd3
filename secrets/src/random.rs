//! Randomness as a parameter: ring's generator in earnest, a fixed one in a simulation.

use std::sync::Arc;

use ring::rand::SecureRandom;
use thiserror::Error;
use zeroize::Zeroizing;

/// A shared source of randomness, `ring::rand::SystemRandom` outside tests.
pub type SharedRandom = Arc<dyn SecureRandom + Send + Sync>;

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

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Bytes of hexadecimal text of either case; `None` if it is anything else.
pub(crate) fn unhex(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len() / 2));
    for pair in text.as_bytes().chunks_exact(2) {
        let [high, low] = pair else { return None };
        bytes.push((digit(*high)? << 4) | digit(*low)?);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;

    use super::*;

    #[test]
    fn hexadecimal_round_trips_and_refuses_the_rest() {
        assert_eq!(hex(&[0, 1, 0xab, 0xff]), "0001abff");
        assert_eq!(unhex("0001ABff").unwrap().as_slice(), [0, 1, 0xab, 0xff]);
        assert!(unhex("0").is_none() && unhex("0g").is_none() && unhex("+1").is_none());
    }

    #[test]
    fn a_uuid_carries_its_version_and_variant() {
        let text = uuid(&SystemRandom::new()).unwrap();
        let marks: Vec<_> = text.bytes().enumerate().filter(|(_, b)| *b == b'-').map(|(at, _)| at).collect();
        assert_eq!((text.len(), marks), (36, vec![8, 13, 18, 23]));
        assert_eq!(text.as_bytes()[14], b'4');
        assert!(b"89ab".contains(&text.as_bytes()[19]));
    }
}
