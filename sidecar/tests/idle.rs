//! Connections on which nobody says anything: those that may go on do, and those that lead to nobody are asked after.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use identity::clock::{Clock as _, ManualClock, SharedClock, SystemClock};
use identity::testing::TestAuthority;
use identity::tls::{ALPN_HTTP11, client_config, unnamed_server};
use identity::{Scope, SpiffeId, TrustDomain};
use policy::{NoRecorder, Policies};
use sidecar::app::AppProtocol;
use sidecar::capture::CaptureConfig;
use sidecar::overload::Budget;
use sidecar::traffic::config::Traffic;
use sidecar::upstream::UpstreamConfig;
use sidecar::{Call, Carries, InboundConfig, Sidecar, SidecarConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Bounds a hang.
const DEADLINE: Duration = Duration::from_secs(60);
const CLIENT: &str = "/ns/default/sa/client";
const SERVER: &str = "/ns/default/sa/server";
const UPGRADE: &[u8] =
    b"GET /rooms/lobby HTTP/1.1\r\nhost: backend\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&format!("spiffe://mesh.test{path}")).unwrap()
}

/// Two sidecars that share a clock, an app that echoes after an upgrade, and a wire between that counts.
struct World {
    authority: TestAuthority,
    /// Where the client's app calls, and the server's mTLS port.
    calls: SocketAddr,
    door: SocketAddr,
    wire: Arc<Wire>,
    clock: SharedClock,
    scope: Scope,
}

/// Bytes to the server and from it.
#[derive(Default)]
struct Wire {
    there: AtomicUsize,
    back: AtomicUsize,
}

impl Wire {
    fn carried(&self) -> (usize, usize) {
        (self.there.load(Ordering::SeqCst), self.back.load(Ordering::SeqCst))
    }

    /// Waits until something went either way since `before`.
    async fn moves(&self, before: (usize, usize)) {
        let moved = async {
            while self.carried().0 == before.0 || self.carried().1 == before.1 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, moved).await.expect("nobody asks whether the other is there");
    }
}

impl World {
    async fn new(clock: SharedClock) -> Self {
        let (authority, scope) = (TestAuthority::new("mesh.test"), Scope::new());
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app_address = app.local_addr().unwrap();
        scope.spawn("app", accept(app, scope.clone(), echo));
        let listener = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            (listener, address)
        };
        let ((listen, door), (calling, calls)) = (listener(), listener());
        let between = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = between.local_addr().unwrap();
        let wire = Arc::new(Wire::default());
        let counts = Arc::clone(&wire);
        scope.spawn(
            "wire",
            accept(between, scope.clone(), move |stream| relay(stream, door, Arc::clone(&counts))),
        );
        let policies = Path::new(env!("CARGO_MANIFEST_DIR")).join("../palisade/tests/streams/policies");
        let policies = Policies::load(&policies, &TrustDomain::new("mesh.test").unwrap()).unwrap();
        let start = |path: &str, inbound, calls| {
            let config = SidecarConfig {
                id: id(path),
                inbound,
                ext_authz: None,
                calls,
                capture: CaptureConfig::default(),
                admin: None,
                access_log: None,
                budget: Budget::default(),
                traces: None,
                others: Vec::new(),
            };
            let (recorder, random) = (Arc::new(NoRecorder), identity::random::system());
            Sidecar::start(config, authority.source(path), recorder, clock.clone(), random, &scope).unwrap();
        };
        let inbound = InboundConfig {
            service: "backend".into(),
            listener: listen,
            app: app_address,
            app_protocol: AppProtocol::Http1,
            policy: policies.service("backend").unwrap(),
            gateways: Vec::new(),
            request_timeout: DEADLINE,
            hbone: None,
            proxies: Default::default(),
            rate_limit: None,
            health: None,
        };
        start(SERVER, Some(inbound), Vec::new());
        let upstream = UpstreamConfig {
            service: "backend".into(),
            id: id(SERVER),
            endpoints: vec![endpoint].into(),
            response_timeout: DEADLINE,
        };
        let call =
            Call { listener: calling, upstream, carries: Carries::Requests, traffic: Traffic::default() };
        start(CLIENT, None, vec![call]);
        Self { authority, calls, door, wire, clock, scope }
    }

    async fn end(self) {
        self.scope.drain();
        self.scope.finished(DEADLINE).await.unwrap();
    }
}

async fn accept<F>(listener: TcpListener, scope: Scope, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted.unwrap().0,
            () = scope.draining() => return,
        };
        let served = serve(stream);
        scope.spawn("connection", async move {
            // A reset is an end.
            let _ended = served.await.is_ok();
        });
    }
}

/// Switches protocols, and from then on says what it hears.
async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let switch = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(switch).await?;
    let (mut reader, mut writer) = stream.split();
    tokio::io::copy(&mut reader, &mut writer).await.map(drop)
}

async fn relay(stream: TcpStream, to: SocketAddr, wire: Arc<Wire>) -> std::io::Result<()> {
    let (mut from_client, mut to_client) = stream.into_split();
    let (mut from_server, mut to_server) = TcpStream::connect(to).await?.into_split();
    tokio::try_join!(
        count(&mut from_client, &mut to_server, &wire.there),
        count(&mut from_server, &mut to_client, &wire.back)
    )?;
    Ok(())
}

async fn count(
    from: &mut tokio::net::tcp::OwnedReadHalf,
    to: &mut tokio::net::tcp::OwnedWriteHalf,
    count: &AtomicUsize,
) -> std::io::Result<()> {
    let mut some = [0; 16 * 1024];
    loop {
        let length = from.read(&mut some).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&some[..length]).await?;
        count.fetch_add(length, Ordering::SeqCst);
    }
}

/// Asks for the switch, and waits for it.
async fn upgrade(stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin)) {
    stream.write_all(UPGRADE).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
}

/// Both ends still hear each other.
async fn talks(stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin), word: &[u8; 4]) {
    stream.write_all(word).await.unwrap();
    let mut heard = [0; 4];
    stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, word);
}

#[tokio::test]
async fn a_websocket_on_which_nobody_speaks_for_ten_minutes_goes_on() {
    /// How often the sidecars look at a connection between them, and so much and twice again without a sign of life
    /// ends it.
    const TICK: Duration = Duration::from_secs(10);
    let clock = ManualClock::at(SystemClock.now());
    let world = World::new(clock.clone()).await;
    let mut socket = TcpStream::connect(world.calls).await.unwrap();
    upgrade(&mut socket).await;
    talks(&mut socket, b"ping").await;
    for _ in 0..30 {
        // Each end asks for a sign of life at one of two looks at least, and gets it.
        let before = world.wire.carried();
        clock.advance(TICK);
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        clock.advance(TICK);
        world.wire.moves(before).await;
    }
    // The edges go by the monotonic clock.
    tokio::time::pause();
    for _ in 0..60 {
        tokio::time::advance(TICK).await;
    }
    tokio::time::resume();
    talks(&mut socket, b"pong").await;
    drop(socket);
    world.end().await;
}

/// What the kernel waits for on a connection between these ports (`/proc/net/tcp`, `tr`).
fn kernel_timer(local: u16, remote: u16) -> String {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let port = |address: &str| u16::from_str_radix(address.split(':').nth(1).unwrap(), 16).unwrap();
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut found = lines.filter(|fields| port(fields[1]) == local && port(fields[2]) == remote);
    found.next().expect("no such connection")[5].split(':').next().unwrap().to_owned()
}

#[tokio::test]
async fn the_kernel_asks_after_a_silent_peer_on_both_listeners() {
    const KEEP_ALIVE: &str = "02";
    let world = World::new(SystemClock::shared()).await;
    // A peer that has none of our own protocol, which asks by itself.
    let tls =
        client_config(&world.authority.source(CLIENT), id(SERVER), &[ALPN_HTTP11], &world.clock).unwrap();
    let stream = TcpStream::connect(world.door).await.unwrap();
    let port = stream.local_addr().unwrap().port();
    let mut peer = tokio_rustls::TlsConnector::from(tls).connect(unnamed_server(), stream).await.unwrap();
    upgrade(&mut peer).await;
    talks(&mut peer, b"ping").await;
    let mut app = TcpStream::connect(world.calls).await.unwrap();
    upgrade(&mut app).await;
    talks(&mut app, b"ping").await;
    // A word that is not acknowledged yet is another reason to wait.
    let asks = |local: u16, remote: u16| async move {
        while kernel_timer(local, remote) != KEEP_ALIVE {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, asks(world.door.port(), port)).await.expect("nobody asks after the peer");
    let port = app.local_addr().unwrap().port();
    tokio::time::timeout(DEADLINE, asks(world.calls.port(), port)).await.expect("nobody asks after the app");
    drop((peer, app));
    world.end().await;
}
