//! The opening of a session between sidecars has one spelling.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidecar::tcp::frame::OpenFrame;

fuzz_target!(|body: &[u8]| {
    if let Ok(open) = OpenFrame::decode(body) {
        assert_eq!(&open.encode()[4..], body);
    }
});
