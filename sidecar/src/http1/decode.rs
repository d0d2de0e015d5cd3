//! Bodies as they arrive: by length, in chunks, or until the connection ends.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use thiserror::Error;

use super::head::{HeadError, HeadLimits, HeadScan, Length, parse_trailers};

/// Bytes of a chunk's size line with its extensions, which say nothing that anybody uses.
const MAX_CHUNK_LINE_BYTES: usize = 256;
/// Hexadecimal digits of a chunk's size: 64 bits.
const MAX_CHUNK_DIGITS: usize = 16;
/// The end of a chunk, then the end of the body.
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";
/// Trailers are a checksum or a status: a tenth of what a head may be.
const TRAILER_LIMITS: HeadLimits = HeadLimits { bytes: 8 * 1024, headers: 32 };

/// Why a body is not what it should be.
#[derive(Debug, Error)]
pub enum BodyError {
    /// Not the grammar of RFC 9112 §7.1.
    #[error("the chunked body is malformed: {0}")]
    Chunk(&'static str),
    /// Fields after the body that are malformed or may not stand there.
    #[error("the trailers are refused: {0}")]
    Trailers(#[source] HeadError),
    /// The connection ended before the body did.
    #[error("the body was cut short")]
    Cut,
    /// The peer owes bytes and does not send them at a rate worth waiting for.
    #[error("the body comes too slowly")]
    Slow,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[source] std::io::Error),
    /// The connection that the body belongs to has ended.
    #[error("the connection has ended")]
    Gone,
}

impl BodyError {
    /// The status that a client gets for its body, if it is still there to hear it.
    pub(super) fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Chunk(_) | Self::Trailers(_) => Some(StatusCode::BAD_REQUEST),
            Self::Slow => Some(StatusCode::REQUEST_TIMEOUT),
            Self::Cut | Self::Io(_) | Self::Gone => None,
        }
    }
}

/// What is next in a body.
#[derive(Debug)]
pub(super) enum Part {
    Data(Bytes),
    /// The last part of a body that has any.
    Trailers(HeaderMap),
    End,
    /// More bytes have to arrive first.
    Wanting,
}

/// Takes one body out of the bytes of a connection.
#[derive(Debug)]
pub(super) struct Decoder(State);

#[derive(Debug)]
enum State {
    Exactly(u64),
    UntilClose,
    ChunkSize,
    ChunkData(u64),
    ChunkEnd,
    Trailers(HeadScan),
    Done,
}

impl Decoder {
    pub(super) fn new(length: Length) -> Self {
        Self(match length {
            Length::Exactly(0) => State::Done,
            Length::Exactly(length) => State::Exactly(length),
            Length::Chunked => State::ChunkSize,
            Length::UntilClose => State::UntilClose,
        })
    }

    /// Takes the next part out of `bytes`.
    pub(super) fn next(&mut self, bytes: &mut BytesMut) -> Result<Part, BodyError> {
        loop {
            match &mut self.0 {
                State::Done => return Ok(Part::End),
                State::UntilClose if bytes.is_empty() => return Ok(Part::Wanting),
                State::UntilClose => return Ok(Part::Data(bytes.split().freeze())),
                State::Exactly(left) => {
                    let Some(data) = take(bytes, left) else { return Ok(Part::Wanting) };
                    if *left == 0 {
                        self.0 = State::Done;
                    }
                    return Ok(Part::Data(data));
                }
                State::ChunkSize => match chunk_size(bytes)? {
                    None => return Ok(Part::Wanting),
                    Some(0) => self.0 = State::Trailers(HeadScan::default()),
                    Some(size) => self.0 = State::ChunkData(size),
                },
                State::ChunkData(left) => {
                    let Some(data) = take(bytes, left) else { return Ok(Part::Wanting) };
                    if *left == 0 {
                        self.0 = State::ChunkEnd;
                    }
                    return Ok(Part::Data(data));
                }
                State::ChunkEnd => match bytes.get(..2) {
                    Some(b"\r\n") => {
                        let _crlf = bytes.split_to(2);
                        self.0 = State::ChunkSize;
                    }
                    None if matches!(bytes.first(), None | Some(b'\r')) => return Ok(Part::Wanting),
                    _ => return Err(BodyError::Chunk("its data does not end where it should")),
                },
                State::Trailers(scan) => {
                    let end = scan.advance(bytes, TRAILER_LIMITS).map_err(BodyError::Trailers)?;
                    let Some(end) = end else { return Ok(Part::Wanting) };
                    let trailers = bytes.split_to(end).freeze();
                    self.0 = State::Done;
                    if trailers.len() > 2 {
                        return parse_trailers(&trailers).map(Part::Trailers).map_err(BodyError::Trailers);
                    }
                }
            }
        }
    }

    /// Ends the body with its last data where the last chunk is here already, so that the end does not have to
    /// be asked for.
    pub(super) fn settle(&mut self, bytes: &mut BytesMut) {
        if matches!(self.0, State::ChunkEnd) && bytes.starts_with(LAST_CHUNK) {
            let _end = bytes.split_to(LAST_CHUNK.len());
            self.0 = State::Done;
        }
    }

    /// What the end of the connection means for the body.
    pub(super) fn closed(&mut self) -> Result<(), BodyError> {
        match self.0 {
            State::Done | State::UntilClose => {
                self.0 = State::Done;
                Ok(())
            }
            _ => Err(BodyError::Cut),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.0, State::Done)
    }

    /// Whether the peer has announced bytes that it has not sent. Between chunks it may have nothing to say.
    pub(super) fn is_owed(&self) -> bool {
        !matches!(self.0, State::Done | State::UntilClose | State::ChunkSize)
    }

    /// Bytes still to come, where that is known.
    pub(super) fn left(&self) -> Option<u64> {
        match self.0 {
            State::Exactly(left) => Some(left),
            State::Done => Some(0),
            _ => None,
        }
    }
}

/// Up to `left` of `bytes`; none if there are none.
fn take(bytes: &mut BytesMut, left: &mut u64) -> Option<Bytes> {
    let here = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
    if here == 0 {
        return None;
    }
    *left -= here as u64;
    Some(bytes.split_to(here).freeze())
}

/// The size line of a chunk, if it is all here.
fn chunk_size(bytes: &mut BytesMut) -> Result<Option<u64>, BodyError> {
    let window = bytes.get(..bytes.len().min(MAX_CHUNK_LINE_BYTES)).unwrap_or_default();
    let Some(lf) = memchr::memchr(b'\n', window) else {
        // What is wrong already need not be waited for.
        let digits = window.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let malformed = window.get(digits).is_some_and(|byte| !matches!(byte, b';' | b'\r'));
        return match window.len() {
            MAX_CHUNK_LINE_BYTES.. => Err(BodyError::Chunk("its size line is too long")),
            _ if malformed || digits > MAX_CHUNK_DIGITS => Err(BodyError::Chunk("size")),
            _ => Ok(None),
        };
    };
    let line = bytes.split_to(lf + 1);
    let Some(line) = line.strip_suffix(b"\r\n") else { return Err(BodyError::Chunk("a bare LF")) };
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (size, extensions) = line.split_at_checked(digits).unwrap_or_default();
    if size.is_empty() || size.len() > MAX_CHUNK_DIGITS {
        return Err(BodyError::Chunk("size"));
    }
    let text = |byte: &u8| matches!(byte, b'\t' | 0x20..=0x7e);
    if !(extensions.is_empty() || extensions.first() == Some(&b';') && extensions.iter().all(text)) {
        return Err(BodyError::Chunk("size"));
    }
    let digit = |digit: &u8| char::from(*digit).to_digit(16).unwrap_or_default();
    Ok(Some(size.iter().map(digit).fold(0, |size: u64, digit| size << 4 | u64::from(digit))))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything that a body says when it arrives `step` bytes at a time, and what is left after it.
    fn decode(length: Length, wire: &[u8], step: usize) -> Result<(Vec<u8>, HeaderMap, usize), BodyError> {
        let mut decoder = Decoder::new(length);
        let (mut bytes, mut said, mut trailers) = (BytesMut::new(), Vec::new(), HeaderMap::new());
        let mut pieces = wire.chunks(step.max(1));
        loop {
            match decoder.next(&mut bytes)? {
                Part::Data(data) => {
                    assert!(!data.is_empty());
                    said.extend_from_slice(&data);
                    decoder.settle(&mut bytes);
                }
                Part::Trailers(fields) => trailers = fields,
                Part::End => {
                    return Ok((said, trailers, bytes.len() + pieces.map(<[u8]>::len).sum::<usize>()));
                }
                Part::Wanting => match pieces.next() {
                    Some(piece) => bytes.extend_from_slice(piece),
                    None => {
                        decoder.closed()?;
                    }
                },
            }
        }
    }

    #[test]
    fn gateway_30_security_21_ambiguous_chunks_are_refused() {
        for wire in [
            "+3\r\nabc\r\n0\r\n\r\n",
            "-3\r\nabc\r\n0\r\n\r\n",
            " 3\r\nabc\r\n0\r\n\r\n",
            "3 \r\nabc\r\n0\r\n\r\n",
            "3 ;a\r\nabc\r\n0\r\n\r\n",
            "0x3\r\nabc\r\n0\r\n\r\n",
            "3\nabc\r\n0\r\n\r\n",
            "3\r\nabc\n0\r\n\r\n",
            "3\r\nabcd\r\n0\r\n\r\n",
            "3\r\nabc\r\r\n0\r\n\r\n",
            "3\r\nabc\r\n0\n\r\n",
            "3\r\nabc\r\n0\r\n\n",
            "3\r\nabc\r\n0\r\nx: a\n\r\n",
            "3\r\nabc\r\n\r\n",
            "3;a\rb\r\nabc\r\n0\r\n\r\n",
            "3;a\nb\r\nabc\r\n0\r\n\r\n",
            "3;\0\r\nabc\r\n0\r\n\r\n",
            "3\r\r\nabc\r\n0\r\n\r\n",
            "\r\n3\r\nabc\r\n0\r\n\r\n",
            ";\r\n",
            "g\r\n",
            "10000000000000003\r\nabc\r\n0\r\n\r\n",
            "00000000000000003\r\nabc\r\n0\r\n\r\n",
            "3\r\nabc\r\n0\r\nx y: a\r\n\r\n",
            "3\r\nabc\r\n0\r\nx : a\r\n\r\n",
            "3\r\nabc\r\n0\r\nx: a\r\n b\r\n\r\n",
            "3\r\nabc\r\n0\r\ncontent-length: 7\r\n\r\n",
            "3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
            "3\r\nabc\r\n0\r\nhost: b\r\n\r\n",
            "3\r\nabc\r\n0\r\nGET / HTTP/1.1\r\n\r\n",
            "3\r\nabc\r\n0\r\n",
            "3\r\nabc\r\n0",
            "3\r\nab",
        ] {
            for step in [1, 2, 3, wire.len()] {
                assert!(decode(Length::Chunked, wire.as_bytes(), step).is_err(), "{wire:?}");
            }
        }
        let extension = format!("3;{}\r\nabc\r\n0\r\n\r\n", "a".repeat(MAX_CHUNK_LINE_BYTES));
        assert!(decode(Length::Chunked, extension.as_bytes(), 1).is_err());
        let trailers = format!("0\r\n{}\r\n", "x: a\r\n".repeat(TRAILER_LIMITS.headers + 2));
        assert!(decode(Length::Chunked, trailers.as_bytes(), 1000).is_err());
    }

    #[test]
    fn chunks_and_trailers_are_read_and_what_follows_is_left() {
        let wire = b"3;x=\"y\"\r\nabc\r\n0A\r\n0123456789\r\n000\r\nx-sum: 1\r\n\r\nGET /";
        for step in 1..wire.len() {
            let (said, trailers, left) = decode(Length::Chunked, wire, step).unwrap();
            assert_eq!(said, b"abc0123456789");
            assert_eq!(trailers["x-sum"], "1");
            assert_eq!(left, 5);
        }
    }

    #[test]
    fn a_length_is_kept_exactly() {
        assert_eq!(decode(Length::Exactly(3), b"abcGET", 2).unwrap().0, b"abc");
        assert_eq!(decode(Length::Exactly(3), b"abcGET", 6).unwrap().2, 3);
        assert!(matches!(decode(Length::Exactly(4), b"abc", 1), Err(BodyError::Cut)));
        assert_eq!(decode(Length::UntilClose, b"abc", 2).unwrap().0, b"abc");
    }

    #[test]
    fn a_last_chunk_that_is_here_ends_the_body_with_its_data() {
        let mut bytes = BytesMut::from(&b"3\r\nabc\r\n0\r\n\r\nGET"[..]);
        let mut decoder = Decoder::new(Length::Chunked);
        assert!(matches!(decoder.next(&mut bytes), Ok(Part::Data(_))));
        assert!(!decoder.is_done());
        decoder.settle(&mut bytes);
        assert!(decoder.is_done());
        assert_eq!(bytes, "GET");
    }

    proptest! {
        #[test]
        fn any_chunks_read_the_same_at_every_split(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..8)
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            for step in 1..=wire.len() {
                prop_assert_eq!(decode(Length::Chunked, &wire, step).unwrap().0, chunks.concat());
            }
        }

        #[test]
        fn any_bytes_mean_the_same_at_every_split(wire in "([0-9a-f;x:\r\n]|\r\n|0\r\n\r\n){0,40}") {
            let whole = decode(Length::Chunked, wire.as_bytes(), wire.len()).ok();
            for step in 1..wire.len() {
                prop_assert_eq!(decode(Length::Chunked, wire.as_bytes(), step).ok(), whole.clone());
            }
        }

        #[test]
        fn no_bytes_panic(wire in any::<Vec<u8>>(), step in 1_usize..16) {
            let _outcome = decode(Length::Chunked, &wire, step).is_ok();
        }
    }
}
