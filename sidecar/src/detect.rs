//! What a connection speaks, told from its first bytes.
//!
//! Opt-in: a declared protocol needs no guessing. The answer depends on at most [`MAX_BYTES`], never changes once it
//! is there, and an app that speaks first is not kept waiting: after a short time without enough bytes a
//! connection counts as [`Protocol::Opaque`]. Nothing is decided by it but who reads the connection: what is
//! taken for opaque meets the policy for plain connections, which a service with routes refuses.

use std::io;
use std::time::Duration;

use identity::clock::SharedClock;

use crate::tcp::Stream;

/// Bytes that are looked at: the longest thing to recognise, HTTP/2's preface.
pub const MAX_BYTES: usize = 24;
/// How long to wait for them: a client that speaks first sends them with its first packet.
pub const DEFAULT_WAIT: Duration = Duration::from_millis(50);

/// HTTP/2's connection preface (RFC 9113 §3.4).
const HTTP2_PREFACE: &[u8; MAX_BYTES] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// PROXY protocol v1's first word.
const PROXY_V1: &[u8] = b"PROXY ";
/// PROXY protocol v2's signature.
const PROXY_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Longest method that is looked for: the longest registered one has 17 letters, of which any 16 tell enough.
const MAX_METHOD_BYTES: usize = 17;

/// What a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// A TLS ClientHello (RFC 8446 §4.1.2).
    Tls,
    /// HTTP/2 by prior knowledge.
    Http2,
    /// A request line of HTTP/1.
    Http1,
    /// A PROXY protocol header in text.
    ProxyV1,
    /// A PROXY protocol header in binary.
    ProxyV2,
    /// Something else.
    Opaque,
}

/// What the bytes so far tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detected {
    /// Not enough yet.
    NeedMore,
    /// This, whatever follows.
    Is(Protocol),
}

/// Looks at the first bytes of a connection.
pub fn detect(bytes: &[u8]) -> Detected {
    let matches = [
        (tls(bytes), Protocol::Tls),
        (literal(bytes, HTTP2_PREFACE), Protocol::Http2),
        (literal(bytes, PROXY_V1), Protocol::ProxyV1),
        (literal(bytes, PROXY_V2), Protocol::ProxyV2),
        (http1(bytes), Protocol::Http1),
    ];
    if let Some((_, protocol)) = matches.iter().find(|(found, _)| *found == Match::Yes) {
        return Detected::Is(*protocol);
    }
    if matches.iter().any(|(found, _)| *found == Match::Perhaps) {
        return Detected::NeedMore;
    }
    Detected::Is(Protocol::Opaque)
}

/// Reads no more than it takes to tell, and waits at most `wait`. What was read stays unread in `stream`.
pub async fn detect_on(stream: &mut Stream, clock: &SharedClock, wait: Duration) -> io::Result<Protocol> {
    let mut enough = clock.sleep(wait);
    loop {
        if let Detected::Is(protocol) = detect(stream.unread()) {
            return Ok(protocol);
        }
        tokio::select! {
            // What is there is looked at before the time is.
            biased;
            more = stream.read_more(MAX_BYTES) => if !more? { return Ok(Protocol::Opaque) },
            () = &mut enough => return Ok(Protocol::Opaque),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Match {
    No,
    Perhaps,
    Yes,
}

fn literal(bytes: &[u8], wanted: &[u8]) -> Match {
    if bytes.starts_with(wanted) {
        Match::Yes
    } else if wanted.starts_with(bytes) {
        Match::Perhaps
    } else {
        Match::No
    }
}

/// Each byte of a record head and of the handshake in it that a ClientHello fixes.
fn tls(bytes: &[u8]) -> Match {
    let fits: [fn(u8) -> bool; 6] = [
        |content_type| content_type == 0x16,
        |major| major == 3,
        |minor| minor <= 4,
        // A record is at most 2^14 bytes long.
        |length| length <= 0x40,
        |_length| true,
        |message| message == 1,
    ];
    match bytes.iter().zip(fits).all(|(byte, fits)| fits(*byte)) {
        false => Match::No,
        true if bytes.len() >= fits.len() => Match::Yes,
        true => Match::Perhaps,
    }
}

/// A method in capitals, a space and what may begin a target (RFC 9112 §3).
fn http1(bytes: &[u8]) -> Match {
    let of_method = |byte: &u8| byte.is_ascii_uppercase() || *byte == b'-';
    let length = bytes.iter().take_while(|byte| of_method(byte)).count();
    if length > MAX_METHOD_BYTES {
        return Match::No;
    }
    let (method, rest) = bytes.split_at_checked(length).unwrap_or((bytes, &[]));
    match (method, rest) {
        (_, []) => Match::Perhaps,
        ([], _) => Match::No,
        (_, [b' ']) => Match::Perhaps,
        (_, [b' ', b'/', ..]) | (b"OPTIONS", [b' ', b'*', ..]) => Match::Yes,
        (b"CONNECT", [b' ', first, ..]) if first.is_ascii_alphanumeric() || *first == b'[' => Match::Yes,
        (_, [b' ', target @ ..]) => literal(target, b"http"),
        _ => Match::No,
    }
}

#[cfg(test)]
mod tests {
    use identity::clock::{Clock as _, ManualClock};
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const KNOWN: [(&[u8], Protocol); 14] = [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", Protocol::Tls),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0", Protocol::Http2),
        (b"GET / HTTP/1.1\r\n", Protocol::Http1),
        (b"PROPFIND /x HTTP/1.1\r\n", Protocol::Http1),
        (b"VERSION-CONTROL /x HTTP/1.1\r\n", Protocol::Http1),
        (b"OPTIONS * HTTP/1.1\r\n", Protocol::Http1),
        (b"CONNECT [::1]:80 HTTP/1.1\r\n", Protocol::Http1),
        (b"GET http://a/ HTTP/1.1\r\n", Protocol::Http1),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", Protocol::ProxyV1),
        (b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", Protocol::ProxyV2),
        (b"*1\r\n$4\r\nPING\r\n", Protocol::Opaque),
        (b"EHLO mail.example\r\n", Protocol::Opaque),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", Protocol::Opaque),
        (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", Protocol::Opaque),
    ];

    #[test]
    fn known_protocols_are_told_by_their_first_bytes_and_no_others() {
        for (bytes, protocol) in KNOWN {
            assert_eq!(detect(bytes), Detected::Is(protocol), "{}", bytes.escape_ascii());
        }
        for bytes in
            [&b"\x16\x03\x01\x02\x00\x02"[..], b"\x16\x03\x01\x41\x00\x01", b"get / HTTP/1.1", b"GET key"]
        {
            assert_eq!(detect(bytes), Detected::Is(Protocol::Opaque), "{}", bytes.escape_ascii());
        }
        assert_eq!(detect(b""), Detected::NeedMore);
    }

    fn monotone(bytes: &[u8]) {
        let mut before = Detected::NeedMore;
        for length in 0..=bytes.len() {
            let now = detect(&bytes[..length]);
            assert!(before == Detected::NeedMore || now == before, "{before:?} became {now:?} at {length}");
            before = now;
        }
        assert!(bytes.len() < MAX_BYTES || before != Detected::NeedMore, "undecided after {}", bytes.len());
    }

    proptest! {
        #[test]
        fn more_bytes_never_change_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            monotone(&bytes);
        }

        #[test]
        fn nor_after_a_beginning_that_looks_like_something(
            which in 0..KNOWN.len(), kept in 0usize..30, rest in proptest::collection::vec(any::<u8>(), 0..30)
        ) {
            let known = KNOWN[which].0;
            let mut bytes = known[..kept.min(known.len())].to_vec();
            bytes.extend(rest);
            monotone(&bytes);
        }

        #[test]
        fn nor_in_words(text in "[A-Z-]{0,20}[ /*h\r\n]{0,3}[a-z/]{0,10}") {
            monotone(text.as_bytes());
        }
    }

    async fn pair() -> (TcpStream, Stream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (client, accepted) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (client.unwrap(), Stream::new(accepted.unwrap().0))
    }

    #[tokio::test]
    async fn bytes_that_come_one_by_one_are_looked_at_and_none_is_lost() {
        let clock: SharedClock = ManualClock::at(Duration::from_secs(1));
        for (bytes, protocol) in KNOWN {
            let (mut client, mut stream) = pair().await;
            client.set_nodelay(true).unwrap();
            let told = async {
                let told = detect_on(&mut stream, &clock, DEFAULT_WAIT).await.unwrap();
                (told, stream)
            };
            let sent = async {
                for byte in bytes {
                    client.write_all(&[*byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
                client.shutdown().await.unwrap();
            };
            let ((told, mut stream), ()) = tokio::join!(told, sent);
            assert_eq!(told, protocol);
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            assert_eq!(all, bytes);
        }
    }

    #[tokio::test]
    async fn a_client_that_waits_for_the_app_is_opaque_after_the_bound() {
        let clock = ManualClock::at(Duration::from_secs(1));
        let shared: SharedClock = clock.clone();
        let (_client, mut stream) = pair().await;
        let told = detect_on(&mut stream, &shared, DEFAULT_WAIT);
        let mut told = std::pin::pin!(told);
        for _ in 0..10 {
            assert!(futures::poll!(told.as_mut()).is_pending());
            tokio::task::yield_now().await;
        }
        clock.advance(DEFAULT_WAIT);
        assert_eq!(told.await.unwrap(), Protocol::Opaque);
        assert_eq!(clock.now(), Duration::from_secs(1) + DEFAULT_WAIT);
    }

    #[tokio::test]
    async fn a_client_that_ends_before_it_has_said_enough_is_opaque() {
        let clock: SharedClock = ManualClock::at(Duration::from_secs(1));
        for bytes in [&b""[..], b"GE", b"PRI * "] {
            let (mut client, mut stream) = pair().await;
            client.write_all(bytes).await.unwrap();
            drop(client);
            assert_eq!(detect_on(&mut stream, &clock, DEFAULT_WAIT).await.unwrap(), Protocol::Opaque);
            assert_eq!(stream.unread(), bytes);
        }
    }
}
