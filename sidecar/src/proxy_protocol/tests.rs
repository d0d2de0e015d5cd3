use identity::clock::ManualClock;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;

fn v2(version_and_command: u8, family: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    [&V2_SIGNATURE[..], &[version_and_command, family], &length, body].concat()
}

fn whole(bytes: &[u8]) -> Header {
    match parse(&[bytes, b"GET / HTTP/1.1"].concat()).unwrap() {
        Parsed::Whole(header, length) => {
            assert_eq!(length, bytes.len());
            header
        }
        Parsed::NeedMore => panic!("{}", bytes.escape_ascii()),
    }
}

fn tcp_of(source: &str, destination: &str) -> Header {
    Header::Tcp { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
}

#[test]
fn both_versions_say_where_a_connection_came_from() {
    assert_eq!(
        whole(b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n"),
        tcp_of("192.0.2.1:56324", "198.51.100.2:443")
    );
    assert_eq!(
        whole(b"PROXY TCP6 2001:db8::1 2001:db8::2 0 65535\r\n"),
        tcp_of("[2001:db8::1]:0", "[2001:db8::2]:65535")
    );
    assert_eq!(whole(b"PROXY UNKNOWN\r\n"), Header::Local);
    assert_eq!(whole(b"PROXY UNKNOWN ffff::1 whatever\r\n"), Header::Local);

    let four = [192, 0, 2, 1, 198, 51, 100, 2, 0xdc, 0x04, 1, 0xbb];
    assert_eq!(whole(&v2(0x21, 0x11, &four)), tcp_of("192.0.2.1:56324", "198.51.100.2:443"));
    let with_alpn = [&four[..], &[1, 0, 2, b'h', b'2'], &[4, 0, 0]].concat();
    assert_eq!(whole(&v2(0x21, 0x11, &with_alpn)), tcp_of("192.0.2.1:56324", "198.51.100.2:443"));
    let six = [[0x20; 16], [0x30; 16]].concat();
    let six = [&six[..], &[0, 1, 0, 2]].concat();
    let mapped = whole(&v2(0x21, 0x21, &six));
    assert_eq!(
        mapped,
        tcp_of(
            &format!("[{}]:1", Ipv6Addr::from([0x20; 16])),
            &format!("[{}]:2", Ipv6Addr::from([0x30; 16]))
        )
    );
    assert_eq!(whole(&v2(0x21, 0x31, &[b'/'; 216])), Header::Unix);
    assert_eq!(whole(&v2(0x21, 0x00, &[])), Header::Local);
    assert_eq!(whole(&v2(0x20, 0x11, b"anything")), Header::Local);
}

#[test]
fn a_checksum_that_is_there_is_right() {
    // CRC-32C's check value.
    assert_eq!(crc32c(b"123456789".iter().copied()), 0xe306_9283);
    let addresses = [192, 0, 2, 1, 198, 51, 100, 2, 0, 1, 0, 2];
    let zeros = v2(0x21, 0x11, &[&addresses[..], &[3, 0, 4, 0, 0, 0, 0]].concat());
    let sum = crc32c(zeros.iter().copied()).to_be_bytes();
    let good = v2(0x21, 0x11, &[&addresses[..], &[3, 0, 4], &sum].concat());
    assert_eq!(whole(&good), tcp_of("192.0.2.1:1", "198.51.100.2:2"));
    // All but the byte that says it is a checksum.
    for at in (12..good.len()).filter(|at| *at != 28) {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        assert_ne!(
            parse(&bad).ok(),
            Some(Parsed::Whole(tcp_of("192.0.2.1:1", "198.51.100.2:2"), good.len())),
            "{at}"
        );
    }
}

#[test]
fn what_is_not_exactly_a_header_is_refused() {
    let four = [192, 0, 2, 1, 198, 51, 100, 2, 0xdc, 0x04, 1, 0xbb];
    let lines: [&[u8]; 15] = [
        b"GET / HTTP/1.1\r\n",
        b"proxy TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n",
        b"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n",
        b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
        b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n\r\n",
        b"PROXY\r\n",
    ];
    let binary = [
        v2(0x11, 0x11, &four),
        v2(0x31, 0x11, &four),
        v2(0x22, 0x11, &four),
        v2(0x21, 0x12, &four),
        v2(0x21, 0x41, &four),
        v2(0x21, 0x11, &four[..11]),
        v2(0x21, 0x21, &four),
        v2(0x21, 0x11, &[&four[..], &[1, 0]].concat()),
        v2(0x21, 0x11, &[&four[..], &[1, 0, 2, b'h']].concat()),
        v2(0x21, 0x11, &[&four[..], &[3, 0, 1, 0]].concat()),
        v2(0x21, 0x11, &[0; 5000]),
    ];
    for bytes in lines.into_iter().chain(binary.iter().map(Vec::as_slice)) {
        assert!(matches!(parse(bytes), Err(ProxyError::Malformed(_))), "{}", bytes.escape_ascii());
    }
    let endless = [b"PROXY UNKNOWN ".to_vec(), vec![b'x'; 200]].concat();
    assert!(matches!(parse(&endless), Err(ProxyError::Malformed("the line is too long"))));
}

#[test]
fn networks_contain_their_addresses_in_every_spelling() {
    let networks: Networks =
        ["10.0.0.0/8", "192.0.2.7", "2001:db8::/32"].iter().map(|text| text.parse().unwrap()).collect();
    for inside in ["10.0.0.0", "10.255.255.255", "192.0.2.7", "::ffff:10.1.2.3", "2001:db8:ffff::1"] {
        assert!(networks.contain(inside.parse().unwrap()), "{inside}");
    }
    for outside in ["11.0.0.0", "192.0.2.8", "2001:db9::", "::10.0.0.1", "::ffff:11.0.0.1"] {
        assert!(!networks.contain(outside.parse().unwrap()), "{outside}");
    }
    assert!("0.0.0.0/0".parse::<Network>().unwrap().contains("203.0.113.9".parse().unwrap()));
    assert!("::/0".parse::<Network>().unwrap().contains("2001:db8::1".parse().unwrap()));
    assert!(!"::/0".parse::<Network>().unwrap().contains("203.0.113.9".parse().unwrap()));
    for bad in
        ["10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/08", "10.0.0.0/+8", "10.0.0.0/", "10/8", "::1/64", "", "/8"]
    {
        assert!(bad.parse::<Network>().is_err(), "{bad}");
    }
    assert!(!Networks::default().contain("127.0.0.1".parse().unwrap()));
}

proptest! {
    #[test]
    fn an_answer_does_not_change_with_more_bytes(
        start in 0usize..3, bytes in proptest::collection::vec(any::<u8>(), 0..80)
    ) {
        let start: &[u8] = [&b""[..], b"PROXY TCP4 ", V2_SIGNATURE][start];
        let bytes = [start, &bytes].concat();
        let mut before: Option<Result<Parsed, String>> = None;
        for length in 0..=bytes.len() {
            let now = parse(&bytes[..length]).map_err(|error| error.to_string());
            if let Some(before) = &before {
                prop_assert_eq!(before, &now);
            }
            if now != Ok(Parsed::NeedMore) {
                before = Some(now);
            }
        }
    }

    #[test]
    fn addresses_read_back_in_both_versions(source: u32, destination: u32, from: u16, to: u16) {
        let (source, destination) = (Ipv4Addr::from(source), Ipv4Addr::from(destination));
        let expected = Header::Tcp {
            source: SocketAddr::new(source.into(), from),
            destination: SocketAddr::new(destination.into(), to),
        };
        let line = format!("PROXY TCP4 {source} {destination} {from} {to}\r\n");
        prop_assert_eq!(whole(line.as_bytes()), expected.clone());
        let body = [&source.octets()[..], &destination.octets(), &from.to_be_bytes(), &to.to_be_bytes()].concat();
        prop_assert_eq!(whole(&v2(0x21, 0x11, &body)), expected);
    }
}

async fn pair() -> (TcpStream, Stream, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (client, accepted) =
        tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (stream, remote) = accepted.unwrap();
    (client.unwrap(), Stream::new(stream), remote)
}

#[tokio::test]
async fn the_header_comes_off_and_the_rest_stays() {
    let clock: SharedClock = ManualClock::at(Duration::from_secs(1));
    let trusted: Networks = ["127.0.0.0/8".parse().unwrap()].into_iter().collect();
    for (header, source) in [
        (b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n".to_vec(), Some("192.0.2.1:56324")),
        (v2(0x20, 0, &[]), None),
    ] {
        let (mut client, mut stream, remote) = pair().await;
        client.write_all(&[&header[..], b"hello"].concat()).await.unwrap();
        client.shutdown().await.unwrap();
        let from = accept(&mut stream, remote, &trusted, &clock).await.unwrap();
        assert_eq!(from, source.map_or(remote, |source| source.parse().unwrap()));
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }
}

#[tokio::test]
async fn a_stranger_s_header_is_not_read_and_silence_is_no_header() {
    let clock = ManualClock::at(Duration::from_secs(1));
    let shared: SharedClock = clock.clone();
    let elsewhere: Networks = ["10.0.0.0/8".parse().unwrap()].into_iter().collect();
    let (mut client, mut stream, remote) = pair().await;
    client.write_all(b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2\r\n").await.unwrap();
    assert!(matches!(accept(&mut stream, remote, &elsewhere, &shared).await, Err(ProxyError::Untrusted(_))));
    assert!(stream.unread().is_empty());

    let here: Networks = ["127.0.0.1".parse().unwrap()].into_iter().collect();
    let (mut client, mut stream, remote) = pair().await;
    client.write_all(b"PROXY TC").await.unwrap();
    let mut accepting = std::pin::pin!(accept(&mut stream, remote, &here, &shared));
    assert!(futures::poll!(accepting.as_mut()).is_pending());
    clock.advance(HEADER_TIMEOUT);
    assert!(matches!(accepting.await, Err(ProxyError::Timeout)));

    let (client, mut stream, remote) = pair().await;
    drop(client);
    assert!(matches!(accept(&mut stream, remote, &here, &shared).await, Err(ProxyError::Io(_))));
}
