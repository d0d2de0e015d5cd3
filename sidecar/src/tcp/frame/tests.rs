use proptest::prelude::*;
use tokio::io::BufReader;

use super::*;

type Pipe = BufReader<tokio::io::DuplexStream>;

impl Side for Pipe {
    fn pause(&mut self) {}
    fn abort(&mut self) {}
}

fn pipe(bytes: usize) -> (Pipe, Pipe) {
    let (one, other) = tokio::io::duplex(bytes);
    (BufReader::with_capacity(bytes, one), BufReader::with_capacity(bytes, other))
}

fn open(port: &str) -> OpenFrame {
    OpenFrame { port: port.into(), source: Some("192.0.2.7:4242".parse().unwrap()) }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// The server's side after an opening that it takes.
async fn accept(mut tls: Pipe) -> (OpenFrame, Session<Pipe>) {
    let open = next_open(&mut tls).await.unwrap().unwrap();
    (open, Session::accepted(tls))
}

#[test]
fn two_sessions_one_after_the_other_keep_their_bytes_apart() {
    run(async {
        let (mut near, mut far) = pipe(64);
        for (port, there, back) in [("main", "hello", "world"), ("", "", "server speaks first")] {
            let client = async {
                let mut session = Session::open(near, &open(port));
                session.write_all(there.as_bytes()).await.unwrap();
                session.shutdown().await.unwrap();
                let mut heard = String::new();
                session.read_to_string(&mut heard).await.unwrap();
                assert_eq!(heard, back);
                session.into_finished().unwrap()
            };
            let server = async {
                let (asked, mut session) = accept(far).await;
                assert_eq!(asked, open(port));
                session.write_all(back.as_bytes()).await.unwrap();
                let mut heard = String::new();
                session.read_to_string(&mut heard).await.unwrap();
                assert_eq!(heard, there);
                session.shutdown().await.unwrap();
                session.into_finished().unwrap()
            };
            (near, far) = tokio::join!(client, server);
        }
        near.shutdown().await.unwrap();
        assert_eq!(next_open(&mut far).await.unwrap(), None);
    });
}

#[test]
fn a_refusal_carries_its_receipt_and_nothing_more() {
    run(async {
        let (near, mut far) = pipe(256);
        let mut session = Session::open(near, &open("main"));
        session.write_all(b"a request").await.unwrap();
        assert!(next_open(&mut far).await.unwrap().is_some());
        refuse(&mut far, Status::Denied, "rc_1").await.unwrap();
        let error = session.read_u8().await.unwrap_err();
        match SessionError::of(&error) {
            Some(SessionError::Refused { status: Status::Denied, receipt }) => assert_eq!(receipt, "rc_1"),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_session_that_was_not_begun_is_sent_again_byte_for_byte() {
    run(async {
        // Small enough that the writer stops in the middle of a frame.
        let (near, far) = pipe(40);
        let mut session = Session::open(near, &open("main"));
        let body = b"0123456789012345678901234567890123456789";
        let mut written = 0;
        while let Some(Ok(count)) = futures::FutureExt::now_or_never(session.write(&body[written..])) {
            written += count;
        }
        assert!(written > 0 && written < body.len(), "{written}");
        drop(far);
        let error = session.read_u8().await.unwrap_err();
        assert!(matches!(SessionError::of(&error), Some(SessionError::NotBegun)));

        let (near, far) = pipe(40);
        let mut session = Session::again(near, session.into_unbegun().unwrap());
        let client = async {
            session.write_all(&body[written..]).await.unwrap();
            session.shutdown().await.unwrap();
            assert_eq!(session.read_u8().await.unwrap(), b'!');
        };
        let server = async {
            let (asked, mut session) = accept(far).await;
            assert_eq!(asked, open("main"));
            let mut heard = Vec::new();
            session.read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, body);
            session.write_all(b"!").await.unwrap();
        };
        tokio::join!(client, server);
    });
}

#[test]
fn what_was_answered_or_is_too_much_is_not_sent_again() {
    run(async {
        let (near, far) = pipe(64 * 1024);
        let mut session = Session::open(near, &open("main"));
        session.write_all(&[0; MAX_KEPT_BYTES]).await.unwrap();
        assert!(session.into_unbegun().is_none());
        drop(far);

        let (near, far) = pipe(1024);
        let mut session = Session::open(near, &open("main"));
        session.flush().await.unwrap();
        let (_, mut server) = accept(far).await;
        server.flush().await.unwrap();
        drop(server);
        let error = session.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(session.into_unbegun().is_none());
    });
}

#[test]
fn an_end_in_the_middle_is_an_error_on_both_sides() {
    run(async {
        for cut in [1, 3, 4, 6] {
            let (mut near, far) = pipe(256);
            near.write_all(&open("main").encode()).await.unwrap();
            let (_, mut server) = accept(far).await;
            near.write_all(&[DATA, 0, 0, 9, b'x', b'y', b'z'][..cut]).await.unwrap();
            drop(near);
            let mut heard = Vec::new();
            let error = server.read_to_end(&mut heard).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{cut}");
        }
    });
}

#[test]
fn frames_out_of_place_are_refused() {
    let heard_by_client = |bytes: Vec<u8>| {
        run(async move {
            let (near, mut far) = pipe(1024);
            let mut session = Session::open(near, &open("main"));
            far.write_all(&bytes).await.unwrap();
            far.shutdown().await.unwrap();
            session.read_to_end(&mut Vec::new()).await.unwrap_err()
        })
    };
    let ok = answer(Status::Open, "");
    for bytes in [
        vec![DATA, 0, 0, 1, 0],
        vec![FIN, 0, 0, 0],
        [ok.clone(), ok.clone()].concat(),
        [ok.clone(), vec![DATA, 0, 0, 0]].concat(),
        [ok.clone(), vec![FIN, 0, 0, 1]].concat(),
        [ok.clone(), vec![OPEN, 0, 0, 3]].concat(),
        [ok, vec![9, 0, 0, 0]].concat(),
        vec![ANSWER, 0, 0, 1, 77],
        vec![ANSWER, 0, 0, 0],
        vec![ANSWER, 1, 0, 0],
    ] {
        let error = heard_by_client(bytes.clone());
        assert!(matches!(SessionError::of(&error), Some(SessionError::Protocol(_))), "{bytes:?} {error:?}");
    }
}

proptest! {
    #[test]
    fn an_opening_reads_back(port in "[a-z0-9._-]{0,63}", v6: bool, known: bool, ip: u128, number: u16) {
        let ip = if v6 { Ipv6Addr::from(ip).into() } else { IpAddr::from(Ipv4Addr::from(ip as u32)) };
        let open = OpenFrame { port, source: known.then_some(SocketAddr::new(ip, number)) };
        let frame = open.encode();
        let (kind, length) = parse_head(*frame.first_chunk().unwrap());
        prop_assert_eq!((kind, length), (OPEN, frame.len() - HEAD_BYTES));
        prop_assert!(length <= MAX_OPEN_BYTES);
        prop_assert_eq!(OpenFrame::decode(&frame[HEAD_BYTES..]).unwrap(), open);
    }

    #[test]
    fn an_opening_has_one_spelling(body in proptest::collection::vec(0u8..8, 0..24)) {
        if let Ok(open) = OpenFrame::decode(&body) {
            prop_assert_eq!(&open.encode()[HEAD_BYTES..], &body[..]);
        }
    }

    #[test]
    fn no_bytes_make_a_session_panic_or_go_on_for_ever(bytes in proptest::collection::vec(0u8..6, 0..64)) {
        run(async {
            let (near, mut far) = pipe(1024);
            let mut session = Session::open(near, &open("main"));
            far.write_all(&bytes).await.unwrap();
            drop(far);
            // Nothing that is not a whole session passes for one.
            let outcome = session.read_to_end(&mut Vec::new()).await;
            let whole = bytes.starts_with(&answer(Status::Open, "")) && bytes.windows(4).any(|w| w == [FIN, 0, 0, 0]);
            assert!(whole || outcome.is_err());
        });
    }

    #[test]
    fn however_it_is_cut_a_session_carries_the_same_bytes(
        bytes in proptest::collection::vec(any::<u8>(), 0..2000), cuts in proptest::collection::vec(1usize..300, 1..20), room in 1usize..100
    ) {
        run(async {
            let (near, far) = pipe(room);
            let mut session = Session::open(near, &open(""));
            let client = async {
                let mut rest = &bytes[..];
                for cut in cuts.iter().cycle() {
                    let (now, later) = rest.split_at((*cut).min(rest.len()));
                    session.write_all(now).await.unwrap();
                    rest = later;
                    if rest.is_empty() { break; }
                }
                session.shutdown().await.unwrap();
                let mut heard = Vec::new();
                session.read_to_end(&mut heard).await.unwrap();
                heard
            };
            let server = async {
                let (_, mut session) = accept(far).await;
                let mut heard = Vec::new();
                session.read_to_end(&mut heard).await.unwrap();
                session.write_all(&heard).await.unwrap();
                session.shutdown().await.unwrap();
                heard
            };
            let (back, there) = tokio::join!(client, server);
            assert!(back == bytes && there == bytes);
        });
    }
}
