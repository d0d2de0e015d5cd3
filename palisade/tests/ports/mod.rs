//! Ports for processes whose files have to name them.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::atomic::{AtomicU32, Ordering},
};

/// Below what the kernel gives to outgoing connections, of which some tests make thousands, and above what servers have.
const FIRST: u32 = 10_000;
const COUNT: u32 = 22_000;
/// Tests of several processes begin so far apart.
const APART: u32 = 97;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Addresses on loopback that nobody has, and that no other test of this process is given.
pub(crate) fn free_addresses<const N: usize>() -> [SocketAddr; N] {
    [(); N].map(|()| free_address())
}

fn free_address() -> SocketAddr {
    let start = std::process::id().wrapping_mul(APART);
    (0..COUNT)
        .map(|_| FIRST + start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT)
        .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, u16::try_from(port).unwrap())))
        .find(|address| TcpListener::bind(address).is_ok())
        .unwrap()
}
