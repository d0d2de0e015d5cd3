//! A PROXY protocol header is whole or not, and what follows it changes nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidecar::proxy_protocol::{Parsed, parse};

fuzz_target!(|bytes: &[u8]| match parse(bytes) {
    Ok(Parsed::Whole(header, length)) => {
        assert!(length > 0 && length <= bytes.len());
        assert_eq!(parse(&bytes[..length]).ok(), Some(Parsed::Whole(header, length)));
        assert_eq!(parse(&bytes[..length - 1]).ok(), Some(Parsed::NeedMore));
    }
    Ok(Parsed::NeedMore) => assert!(bytes.len() < 5000),
    Err(_) => assert!(parse(&[bytes, b"more"].concat()).is_err()),
});
