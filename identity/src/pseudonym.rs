//! Stand-ins for what names a person: the same for the same, and nothing to be read from without the key.

use ring::hmac;

use crate::hex;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes of the HMAC that are kept: among a million people two share one with a chance of one in thirty million.
const KEPT_BYTES: usize = 8;

/// Sixteen hexadecimal digits after `p-`, by HMAC-SHA256 of `value` under `key`.
pub fn of(key: &[u8], value: &str) -> String {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), value.as_bytes());
    format!("p-{}", hex::encode(tag.as_ref().get(..KEPT_BYTES).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_for_the_same_and_another_under_another_key() {
        let (one, other) = ([1; KEY_BYTES], [2; KEY_BYTES]);
        assert_eq!(of(&one, "alice"), of(&one, "alice"));
        assert!(of(&one, "alice") != of(&one, "bob") && of(&one, "alice") != of(&other, "alice"));
        assert_eq!((of(&one, "").len(), &of(&one, "")[..2]), (18, "p-"));
    }
}
