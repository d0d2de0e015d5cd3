//! Lets clients in whose `:authority` is a socket path.
//!
//! On a Unix socket there is no host to name, and gRPC implementations differ in what they send as
//! `:authority`: grpc-go `localhost`, but the C core (Python, Ruby, C++) the percent-encoded path of the
//! socket, and Java the path itself. RFC 9113 §8.3.1 allows neither, and the HTTP/2 library below tonic
//! answers with PROTOCOL_ERROR, so half of the SPIFFE clients there are could not be served.
//!
//! The name is used for nothing on this socket. So this filter replaces the characters that cannot be in
//! a host name, in place and without changing a length: framing and HPACK state (RFC 7541) stay as the
//! client made them, and nothing else in the stream is touched.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The client's connection preface (RFC 9113 §3.4).
const PREFACE_BYTES: usize = 24;
/// Length of a frame's header (§4.1).
const FRAME_HEADER_BYTES: usize = 9;
/// Largest frame that a server which announces nothing else takes (§4.2). Larger ones are passed on
/// untouched; the library refuses them.
const MAX_FRAME_BYTES: usize = 16 * 1024;
/// How much is read from the socket at once.
const READ_BYTES: usize = 8 * 1024;

const HEADERS: u8 = 0x1;
const FLAG_PADDED: u8 = 0x8;
const FLAG_PRIORITY: u8 = 0x20;
/// Index of `:authority` in HPACK's static table.
const STATIC_AUTHORITY: u64 = 1;

/// A server's end of a Unix connection whose client may name a path.
#[derive(Debug)]
pub(super) struct AnyAuthority<S> {
    inner: S,
    rewriter: Rewriter,
    finished: bool,
}

impl<S> AnyAuthority<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner, rewriter: Rewriter::default(), finished: false }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if self.rewriter.give(buffer) || self.finished || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let mut space = [0u8; READ_BYTES];
            let mut read = ReadBuf::new(&mut space);
            ready!(Pin::new(&mut self.inner).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                self.finished = true;
                self.rewriter.finish();
            } else {
                self.rewriter.take(read.filled());
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// Bytes on their way in. The first `ready` of them may go on; the rest waits for the end of its frame.
#[derive(Debug)]
struct Rewriter {
    bytes: Vec<u8>,
    ready: usize,
    /// Bytes after `ready` that need no look: the preface at first, then payloads of other frames.
    pass: usize,
}

impl Default for Rewriter {
    fn default() -> Self {
        Self { bytes: Vec::new(), ready: 0, pass: PREFACE_BYTES }
    }
}

impl Rewriter {
    /// Moves what may go on into `buffer`; whether there was any.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let count = self.ready.min(buffer.remaining());
        let Some(given) = self.bytes.get(..count) else { return false };
        buffer.put_slice(given);
        self.bytes.drain(..count);
        self.ready -= count;
        count > 0
    }

    fn take(&mut self, more: &[u8]) {
        self.bytes.extend_from_slice(more);
        while self.step() {}
    }

    /// No more will come: an unfinished frame goes on as it is.
    fn finish(&mut self) {
        self.ready = self.bytes.len();
    }

    /// Looks at what follows the ready part; whether that grew.
    fn step(&mut self) -> bool {
        let waiting = self.bytes.len().saturating_sub(self.ready);
        if self.pass > 0 {
            let passed = self.pass.min(waiting);
            self.pass -= passed;
            self.ready += passed;
            return passed > 0;
        }
        let Some(waiting) = self.bytes.get_mut(self.ready..) else { return false };
        let Some(&[high, middle, low, kind, flags]) = waiting.first_chunk::<5>() else { return false };
        let payload = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        let whole = FRAME_HEADER_BYTES + payload;
        if kind != HEADERS || payload > MAX_FRAME_BYTES {
            self.pass = whole;
            return true;
        }
        let Some(frame) = waiting.get_mut(FRAME_HEADER_BYTES..whole) else { return false };
        if let Some(block) = header_block(frame, flags) {
            mend(block);
        }
        self.ready += whole;
        true
    }
}

/// The part of a HEADERS frame's payload that holds HPACK (RFC 9113 §6.2).
fn header_block(payload: &mut [u8], flags: u8) -> Option<&mut [u8]> {
    let mut start = 0;
    let mut padding = 0;
    if flags & FLAG_PADDED != 0 {
        padding = usize::from(*payload.first()?);
        start += 1;
    }
    if flags & FLAG_PRIORITY != 0 {
        start += 5;
    }
    let end = payload.len().checked_sub(padding)?;
    payload.get_mut(start..end)
}

/// Walks the representations of a header block (RFC 7541 §6) and mends the value of `:authority`. Needs
/// no dynamic table: a value is only ever written out behind its name, and a repetition by index means
/// what was mended when it was first written.
fn mend(block: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while let Some(&first) = block.get(at) {
        let prefix_bits = match first {
            0x80.. => 7,      // indexed: no string follows
            0x40..=0x7f => 6, // literal, remembered
            0x20..=0x3f => 5, // size update: no string follows
            0x00..=0x1f => 4, // literal, not remembered
        };
        let index = integer(block, &mut at, prefix_bits)?;
        if first >= 0x80 || (0x20..=0x3f).contains(&first) {
            continue;
        }
        let is_authority = if index == 0 {
            let (name, huffman) = string(block, &mut at)?;
            let name = block.get(name)?;
            if huffman {
                symbols(name).map(|(_, symbol, _)| symbol).eq(*b":authority")
            } else {
                name == b":authority"
            }
        } else {
            index == STATIC_AUTHORITY
        };
        let (value, huffman) = string(block, &mut at)?;
        if is_authority {
            let value = block.get_mut(value)?;
            if huffman { mend_huffman(value) } else { mend_plain(value) }
        }
    }
    Some(())
}

/// An integer with a prefix of so many bits (§5.1).
fn integer(block: &[u8], at: &mut usize, prefix_bits: u32) -> Option<u64> {
    let most = (1u64 << prefix_bits) - 1;
    let mut value = u64::from(*block.get(*at)?) & most;
    *at += 1;
    if value < most {
        return Some(value);
    }
    // Four more bytes are far above any index or length here.
    for shift in [0, 7, 14, 21] {
        let byte = *block.get(*at)?;
        *at += 1;
        value += u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Where a string is (§5.2), and whether it is Huffman-coded. `None` if it goes beyond this frame.
fn string(block: &[u8], at: &mut usize) -> Option<(std::ops::Range<usize>, bool)> {
    let huffman = *block.get(*at)? & 0x80 != 0;
    let length = usize::try_from(integer(block, at, 7)?).ok()?;
    let end = at.checked_add(length).filter(|end| *end <= block.len())?;
    let range = *at..end;
    *at = end;
    Some((range, huffman))
}

/// Whether a host name can hold this byte.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')
}

/// Only a path is mended; any other value is the client's business and the library's to judge.
fn is_pathlike(byte: u8) -> bool {
    matches!(byte, b'%' | b'/')
}

fn mend_plain(value: &mut [u8]) {
    if value.iter().copied().any(is_pathlike) {
        for byte in value.iter_mut().filter(|byte| !is_plain(**byte)) {
            *byte = b'-';
        }
    }
}

fn mend_huffman(value: &mut [u8]) {
    if !symbols(value).any(|(_, symbol, _)| is_pathlike(symbol)) {
        return;
    }
    let odd: Vec<_> = symbols(value).filter(|(_, symbol, _)| !is_plain(*symbol)).collect();
    for (at, _, bits) in odd {
        // A plain character whose code has the same length.
        let code: u32 = match bits {
            5 => 0x00, // 0
            6 => 0x16, // -
            7 => 0x79, // x
            _ => 0xfc, // X
        };
        for bit in 0..bits {
            let (byte, mask) = ((at + bit) / 8, 0x80u8 >> ((at + bit) % 8));
            if let Some(byte) = value.get_mut(byte) {
                if code >> (bits - 1 - bit) & 1 == 1 { *byte |= mask } else { *byte &= !mask }
            }
        }
    }
}

/// Symbols with codes of five to eight bits, each length in the order of its codes (RFC 7541 Appendix B).
/// They are all that occur in paths; at a longer code, or the padding, the walk ends.
const CODES: [(usize, u32, &[u8]); 4] = [
    (5, 0x00, b"012aceiost"),
    (6, 0x14, b" %-./3456789=A_bdfghlmnpru"),
    (7, 0x5c, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, 0xf8, b"&*,;XZ"),
];

/// The symbols of a Huffman-coded string: bit position, symbol, length of its code.
fn symbols(coded: &[u8]) -> impl Iterator<Item = (usize, u8, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        for (bits, first, symbols) in CODES {
            let mut code = 0;
            for bit in at..at + bits {
                let byte = *coded.get(bit / 8)?;
                code = code << 1 | u32::from(byte >> (7 - bit % 8) & 1);
            }
            let symbol =
                code.checked_sub(first).and_then(|offset| symbols.get(usize::try_from(offset).ok()?));
            if let Some(symbol) = symbol {
                let found = (at, *symbol, bits);
                at += bits;
                return Some(found);
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PATH: &[u8] = b"%2Frun%2Fpalisade%2Fagent.sock";
    const MENDED: &[u8] = b"-2Frun-2Fpalisade-2Fagent.sock";

    fn huffman(text: &[u8]) -> Vec<u8> {
        let mut bits = Vec::new();
        for byte in text {
            let (length, first, offset) = CODES
                .iter()
                .find_map(|(length, first, all)| {
                    Some((*length, *first, all.iter().position(|one| one == byte)?))
                })
                .unwrap();
            let code = first + offset as u32;
            bits.extend((0..length).rev().map(|bit| code >> bit & 1 == 1));
        }
        // Padded with ones.
        bits.chunks(8)
            .map(|chunk| (0..8).fold(0, |byte, n| byte << 1 | u8::from(*chunk.get(n).unwrap_or(&true))))
            .collect()
    }

    fn literal(text: &[u8], coded: bool) -> Vec<u8> {
        let bytes = if coded { huffman(text) } else { text.to_vec() };
        assert!(bytes.len() < 127);
        [vec![bytes.len() as u8 | if coded { 0x80 } else { 0 }], bytes].concat()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let [_, high, middle, low] = (payload.len() as u32).to_be_bytes();
        [&[high, middle, low, kind, flags, 0, 0, 0, 1][..], payload].concat()
    }

    fn stream(frames: &[Vec<u8>]) -> Vec<u8> {
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frames.concat()].concat()
    }

    fn through(bytes: &[u8], chunk: usize) -> Vec<u8> {
        let mut rewriter = Rewriter::default();
        let mut out = Vec::new();
        let mut drain = |rewriter: &mut Rewriter| {
            let mut space = [0u8; 7];
            loop {
                let mut buffer = ReadBuf::new(&mut space);
                if !rewriter.give(&mut buffer) {
                    break;
                }
                out.extend_from_slice(buffer.filled());
            }
        };
        for part in bytes.chunks(chunk) {
            rewriter.take(part);
            drain(&mut rewriter);
        }
        rewriter.finish();
        drain(&mut rewriter);
        out
    }

    /// A request as a gRPC client sends it: method, scheme, path, authority, one more header.
    fn request(name: &[u8], value: &[u8], coded: bool) -> Vec<u8> {
        let path = [vec![0x44], literal(b"/SpiffeWorkloadAPI/FetchX509SVID", coded)].concat();
        let other = [vec![0x40], literal(b"te", coded), literal(b"/trailers%", coded)].concat();
        let authority = [name.to_vec(), literal(value, coded)].concat();
        [vec![0x83, 0x86], path, authority, vec![0x3f, 0xe1, 0x1f], other].concat()
    }

    #[test]
    fn a_path_becomes_a_host_name_however_it_is_written() {
        for coded in [false, true] {
            let new_name = [vec![0x40], literal(b":authority", coded)].concat();
            let unremembered = [vec![0x00], literal(b":authority", coded)].concat();
            for name in [vec![0x41], vec![0x01], vec![0x11], new_name, unremembered] {
                for (value, mended) in
                    [(PATH, MENDED), (b"/run/a.sock", b"-run-a.sock"), (b"localhost", b"localhost")]
                {
                    let settings = frame(0x4, 0, &[0, 3, 0, 0, 0, 100]);
                    let data = frame(0x0, 0x1, PATH);
                    let build = |value| {
                        let headers = frame(HEADERS, 0x4, &request(&name, value, coded));
                        stream(&[settings.clone(), headers, data.clone()])
                    };
                    for chunk in [1, 5, 1000] {
                        assert_eq!(through(&build(value), chunk), build(mended), "{name:02x?} {coded}");
                    }
                }
            }
        }
    }

    #[test]
    fn padding_and_priority_are_stepped_over() {
        let block = |value| request(&[0x41], value, false);
        let padded = |value| {
            let payload = [vec![3, 0, 0, 0, 0, 7], block(value), vec![0; 3]].concat();
            stream(&[frame(HEADERS, FLAG_PADDED | FLAG_PRIORITY, &payload)])
        };
        assert_eq!(through(&padded(PATH), 9), padded(MENDED));
    }

    #[test]
    fn odd_characters_beside_a_path_go_too_and_a_port_alone_stays() {
        for coded in [false, true] {
            let build = |value: &[u8]| stream(&[frame(HEADERS, 4, &request(&[0x41], value, coded))]);
            assert_eq!(through(&build(b"localhost:8080"), 3), build(b"localhost:8080"));
            let mended = through(&build(b"/a b:c&d=e"), 3);
            let expected = if coded { build(b"-a-bxcXd-e") } else { build(b"-a-b-c-d-e") };
            assert_eq!(mended, expected);
        }
    }

    proptest! {
        #[test]
        fn bytes_are_neither_added_nor_lost_whatever_comes(
            bytes in proptest::collection::vec(any::<u8>(), 0..600),
            chunk in 1usize..50,
        ) {
            let out = through(&bytes, chunk);
            prop_assert_eq!(out.len(), bytes.len());
            prop_assert_eq!(out, through(&bytes, 1000));
        }

        #[test]
        fn any_header_block_is_walked_without_harm(block in proptest::collection::vec(any::<u8>(), 0..300)) {
            let framed = stream(&[frame(HEADERS, 0x4, &block), frame(0x0, 0, b"%/")]);
            let out = through(&framed, 10);
            prop_assert_eq!(out.len(), framed.len());
            let tail = frame(0x0, 0, b"%/");
            prop_assert!(out.ends_with(&tail), "the next frame is untouched");
        }
    }
}
