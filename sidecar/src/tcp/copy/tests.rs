use std::sync::Arc;

use identity::Scope;
use identity::clock::{Clock as _, ManualClock};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::super::stream::Stream;
use super::*;

/// Two clients with a copy between them.
struct Between {
    near: TcpStream,
    far: TcpStream,
    clock: Arc<ManualClock>,
    traffic: Arc<Traffic>,
    outcome: tokio::sync::oneshot::Receiver<Result<(), CopyError>>,
    _scope: Scope,
}

async fn pair() -> (TcpStream, Stream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), Stream::new(accepted.unwrap().0))
}

async fn between() -> Between {
    let ((near, mut near_side), (far, mut far_side)) = (pair().await, pair().await);
    let clock = ManualClock::at(Duration::from_secs(1_000_000));
    let (scope, traffic) = (Scope::new(), Arc::new(Traffic::default()));
    let (tell, outcome) = tokio::sync::oneshot::channel();
    let (shared, counted) = (Arc::clone(&clock) as SharedClock, Arc::clone(&traffic));
    scope.spawn("copy", async move {
        let outcome = both_ways(&mut near_side, &mut far_side, &shared, &counted).await;
        if outcome.is_err() {
            near_side.abort();
            far_side.abort();
        }
        drop((near_side, far_side));
        tell.send(outcome).unwrap();
    });
    Between { near, far, clock, traffic, outcome, _scope: scope }
}

/// Lets the copy run until nothing is left for it to do at this moment of the clock.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn each_way_ends_by_itself() {
    let mut between = between().await;
    between.near.write_all(b"question").await.unwrap();
    between.near.shutdown().await.unwrap();
    let mut heard = String::new();
    between.far.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "question");
    between.far.write_all(b"late answer").await.unwrap();
    between.far.shutdown().await.unwrap();
    heard.clear();
    between.near.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "late answer");
    assert!(between.outcome.await.unwrap().is_ok());
    assert_eq!(between.traffic.bytes(), (8, 11));
}

#[tokio::test]
async fn a_reset_of_one_side_is_a_reset_of_the_other_at_once() {
    let mut between = between().await;
    between.far.write_all(b"half of it").await.unwrap();
    let mut heard = [0; 10];
    between.near.read_exact(&mut heard).await.unwrap();
    between.far.set_zero_linger().unwrap();
    drop(between.far);
    let error = between.near.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(matches!(between.outcome.await.unwrap(), Err(CopyError::Io(End::Far, _))));
}

#[tokio::test]
async fn security_28_a_reader_that_takes_nothing_is_dropped_and_one_that_does_is_not() {
    let Between { mut near, mut far, clock, outcome, traffic, .. } = between().await;
    let mut outcome = outcome;
    let scope = Scope::new();
    scope.spawn("writer", async move {
        let block = [7; 64 * 1024];
        while near.write_all(&block).await.is_ok() {}
    });
    // More than 30 KiB in each quarter of a minute, so in any half: slow, and welcome.
    let mut some = vec![0; 256 * 1024];
    for _ in 0..6 {
        let (before, _) = traffic.bytes();
        while traffic.bytes().0 < before + STALL_LEAST_BYTES {
            tokio::select! {
                read = far.read(&mut some) => assert!(read.unwrap() > 0),
                () = settle() => {}
            }
        }
        clock.advance(STALL_WINDOW / 2);
        settle().await;
        assert!(outcome.try_recv().is_err());
    }
    // Then nothing: the buffers on the way fill, and half a minute later it is over.
    let mut ended = None;
    for _ in 0..100 {
        clock.advance(STALL_WINDOW);
        settle().await;
        ended = outcome.try_recv().ok();
        if ended.is_some() {
            break;
        }
    }
    assert!(matches!(ended, Some(Err(CopyError::Stalled(End::Far)))), "{ended:?}");
}

#[tokio::test]
async fn silence_is_no_stall_and_ends_after_an_hour() {
    let mut between = between().await;
    between.near.write_all(b"x").await.unwrap();
    assert_eq!(between.far.read_u8().await.unwrap(), b'x');
    let start = between.clock.now();
    while between.clock.now() < start + IDLE_TIMEOUT - Duration::from_secs(60) {
        between.clock.advance(Duration::from_secs(60));
        settle().await;
        assert!(between.outcome.try_recv().is_err());
    }
    // A byte in time is life for another hour.
    between.far.write_all(b"y").await.unwrap();
    assert_eq!(between.near.read_u8().await.unwrap(), b'y');
    settle().await;
    between.clock.advance(IDLE_TIMEOUT - Duration::from_secs(1));
    settle().await;
    assert!(between.outcome.try_recv().is_err());
    between.clock.advance(Duration::from_secs(1));
    assert!(matches!(between.outcome.await.unwrap(), Err(CopyError::Idle)));
    assert_eq!(between.near.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}
