//! A protocol is told by its first bytes, and what follows changes nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidecar::detect::{Detected, MAX_BYTES, detect};

fuzz_target!(|bytes: &[u8]| {
    let mut before = Detected::NeedMore;
    for length in 0..=bytes.len().min(2 * MAX_BYTES) {
        let now = detect(&bytes[..length]);
        assert!(before == Detected::NeedMore || now == before);
        assert!(length < MAX_BYTES || now != Detected::NeedMore);
        before = now;
    }
});
