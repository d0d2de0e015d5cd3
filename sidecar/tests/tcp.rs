//! Plain connections through a pair of sidecars: a client, the outbound half, mTLS, the inbound half, an app.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use identity::clock::{Clock as _, ManualClock, SharedClock, SystemClock};
use identity::source::IdentityPublisher;
use identity::testing::TestAuthority;
use identity::tls::{ClientAuth, client_config, server_config, unnamed_server};
use identity::{BundleSet, IdentitySource, Peer, Scope, SpiffeId, TrustDomain};
use policy::{MemoryRecorder, Policies, ServicePolicy};
use sidecar::app::AppProtocol;
use sidecar::capture::CaptureConfig;
use sidecar::live::Registry;
use sidecar::tcp::frame::{OpenFrame, Session, SessionError, Status};
use sidecar::tcp::inbound::TcpInboundConfig;
use sidecar::tcp::{ALPN_TCP, Ports, Stream, TcpInbound, TcpOutbound, TcpStats, TcpUpstream};
use sidecar::traffic::config::{Limits, Traffic};
use sidecar::traffic::random::Dice;
use sidecar::{InboundConfig, Sidecar, SidecarConfig};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const MESH: &str = "namespace Mesh {
  entity Workload { service: String, trust_domain: String };
  entity Client;
}";
const SCHEMA: &str = "namespace Db {
  entity Port;
  type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };
  action Connect appliesTo {
    principal: [Mesh::Workload], resource: [Port], context: { user?: User, chain: Set<String>, now: Long }
  };
}";
const WEB_ONLY: &str = r#"@id("web-connects")
permit (principal == Mesh::Workload::"spiffe://bank.example/service/web", action, resource == Db::Port::"main");"#;
const NOBODY: &str = r#"@id("closed-for-repair")
forbid (principal, action, resource);"#;

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&format!("spiffe://bank.example{path}")).unwrap()
}

fn policy(map: &str, cedar: &str) -> Arc<ServicePolicy> {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("mesh.cedarschema", MESH),
        ("services/db/db.cedarschema", SCHEMA),
        ("services/db/map.toml", map),
        ("services/db/db.cedar", cedar),
    ] {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let policies = Policies::load(folder.path(), &TrustDomain::new("bank.example").unwrap());
    policies.unwrap_or_else(|problems| panic!("{problems}")).service("db").unwrap()
}

/// How many sessions web may have with db at once.
const MOST_SESSIONS: u32 = 64;

/// The inbound half of db, and what it stands before.
struct Db {
    authority: TestAuthority,
    policy: Arc<ArcSwap<ServicePolicy>>,
    registry: Arc<Registry>,
    records: Arc<MemoryRecorder>,
    inbound: Arc<TcpInbound>,
    address: SocketAddr,
    /// Connections that the app got.
    reached: Arc<AtomicUsize>,
    clock: SharedClock,
    scope: Scope,
}

/// An app that serves each connection with `serve`.
async fn app<F>(scope: &Scope, serve: fn(TcpStream) -> F) -> (SocketAddr, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (reached, inside) = (Arc::new(AtomicUsize::new(0)), scope.clone());
    let count = Arc::clone(&reached);
    scope.spawn("app", async move {
        loop {
            let (stream, _) = tokio::select! {
                accepted = listener.accept() => accepted.unwrap(),
                () = inside.draining() => return,
            };
            count.fetch_add(1, Ordering::SeqCst);
            inside.spawn("app connection", serve(stream));
        }
    });
    (address, reached)
}

async fn echo(mut stream: TcpStream) {
    let (mut read, mut write) = stream.split();
    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
        write.shutdown().await.unwrap();
    }
}

impl Db {
    async fn new<F>(serve: fn(TcpStream) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self::at(SystemClock::shared(), "mapping = \"tcp\"", serve).await
    }

    async fn at<F>(clock: SharedClock, map: &str, serve: fn(TcpStream) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let scope = Scope::new();
        let (app, reached) = app(&scope, serve).await;
        let authority = TestAuthority::new("bank.example");
        let source = authority.source("/service/db");
        let policy = Arc::new(ArcSwap::from(policy(map, WEB_ONLY)));
        let (registry, records) = (Registry::new(clock.clone()), Arc::new(MemoryRecorder::default()));
        let inbound = TcpInbound::new(TcpInboundConfig {
            service: "db".into(),
            id: id("/service/db"),
            ports: Ports::one(app),
            policy: Arc::clone(&policy),
            registry: Arc::clone(&registry),
            source: source.clone(),
            recorder: Arc::clone(&records) as Arc<dyn policy::Recorder>,
            stats: TcpStats::default(),
            clock: clock.clone(),
            random: identity::random::system(),
            access_log: false,
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = server_config(&source, ClientAuth::Required, &[ALPN_TCP], &clock).unwrap();
        let db = Self { authority, policy, registry, records, inbound, address, reached, clock, scope };
        db.listen(listener, TlsAcceptor::from(tls));
        db
    }

    fn listen(&self, listener: TcpListener, acceptor: TlsAcceptor) {
        let (scope, inbound) = (self.scope.clone(), Arc::clone(&self.inbound));
        self.scope.spawn("listener", async move {
            loop {
                let (stream, remote) = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap(),
                    () = scope.draining() => return,
                };
                let (acceptor, inbound, inside) = (acceptor.clone(), Arc::clone(&inbound), scope.clone());
                scope.spawn("connection", async move {
                    let Ok(tls) = acceptor.accept(Stream::new(stream)).await else { return };
                    let peer = Peer::from_handshake(tls.get_ref().1.peer_certificates()).unwrap().unwrap();
                    inbound.serve(tls, peer, remote, &inside).await;
                });
            }
        });
    }

    /// The outbound half of `service`, which calls whatever answers as `callee`.
    async fn called_by(&self, service: &str, callee: &str) -> Web {
        let (publisher, source) = IdentitySource::channel();
        let bundles = Arc::new(BundleSet::new([self.authority.bundle()]));
        publisher.publish(self.authority.issue(service), Arc::clone(&bundles));
        let upstream = TcpUpstream {
            service: "db".into(),
            id: id(callee),
            port: String::new(),
            endpoints: vec![self.address].into(),
            traffic: Traffic {
                limits: Limits { requests: MOST_SESSIONS, ..Limits::default() },
                ..Traffic::default()
            },
        };
        let stats = TcpStats::default();
        let outbound =
            TcpOutbound::new(upstream, source, stats.clone(), self.clock.clone(), Dice::seeded(5), true)
                .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        outbound.serve(listener, &sidecar::server::Limits::default(), &self.scope);
        Web { address, outbound, stats, publisher, bundles }
    }

    async fn web(&self) -> Web {
        self.called_by("/service/web", "/service/db").await
    }

    /// A TLS connection of web's to the inbound half, without an outbound half.
    async fn raw(&self) -> tokio_rustls::client::TlsStream<Stream> {
        let source = self.authority.source("/service/web");
        let tls = client_config(&source, id("/service/db"), &[ALPN_TCP], &self.clock).unwrap();
        let stream = Stream::new(TcpStream::connect(self.address).await.unwrap());
        TlsConnector::from(tls).connect(unnamed_server(), stream).await.unwrap()
    }

    fn denials(&self) -> Vec<(String, String)> {
        let records = self.records.records();
        records
            .iter()
            .filter(|r| r.status.is_some())
            .map(|r| (r.rule.name().to_owned(), r.receipt.to_string()))
            .collect()
    }

    fn reached(&self) -> usize {
        self.reached.load(Ordering::SeqCst)
    }

    async fn replace(&self, next: Arc<ServicePolicy>) {
        self.policy.store(Arc::clone(&next));
        self.registry.reevaluate_all(&next).await;
    }
}

struct Web {
    address: SocketAddr,
    outbound: Arc<TcpOutbound>,
    stats: TcpStats,
    publisher: IdentityPublisher,
    bundles: Arc<BundleSet>,
}

impl Web {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// One session of its own: what is sent and what comes back.
    async fn ask(&self, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await?;
        stream.shutdown().await?;
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await?;
        Ok(heard)
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

#[tokio::test]
async fn an_echo_comes_back_and_each_way_ends_by_itself() {
    let db = Db::new(echo).await;
    let web = db.web().await;
    assert_eq!(web.ask(b"hello").await.unwrap(), b"hello");

    // The app's end first, the client's later.
    let parting = Db::new(|mut stream: TcpStream| async move {
        stream.write_all(b"bye").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "one more thing");
    })
    .await;
    let web = parting.web().await;
    let mut stream = web.connect().await;
    let mut heard = String::new();
    stream.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "bye");
    stream.write_all(b"one more thing").await.unwrap();
    stream.shutdown().await.unwrap();
    until("both have finished", || web.outbound.ready_connections() == 1).await;
    assert_eq!(parting.scope.panics(), 0);
}

#[tokio::test]
async fn more_sessions_than_traffic_allows_are_reset_until_one_has_ended() {
    let db = Db::new(echo).await;
    let web = db.web().await;
    let mut open = Vec::new();
    for _ in 0..MOST_SESSIONS {
        let mut stream = web.connect().await;
        stream.write_all(b"x").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
        open.push(stream);
    }
    assert!(web.ask(b"one more").await.is_err());
    assert_eq!(db.reached(), open.len());
    drop(open.pop());
    let mut heard = web.ask(b"again").await;
    for _ in 0..1000 {
        if heard.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        heard = web.ask(b"again").await;
    }
    assert_eq!(heard.unwrap(), b"again");
}

#[tokio::test]
async fn an_app_that_speaks_first_is_heard_before_the_client_says_anything() {
    let db = Db::new(|mut stream: TcpStream| async move {
        stream.write_all(b"220 ready\r\n").await.unwrap();
        let mut line = [0; 6];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"QUIT\r\n");
    })
    .await;
    let web = db.web().await;
    let mut stream = web.connect().await;
    let mut banner = [0; 11];
    stream.read_exact(&mut banner).await.unwrap();
    assert_eq!(&banner, b"220 ready\r\n");
    stream.write_all(b"QUIT\r\n").await.unwrap();
    assert_eq!(stream.read(&mut banner).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_both_ways_arrive_as_they_were_sent() {
    const BLOCKS: usize = 1024;
    let db = Db::new(echo).await;
    let web = db.web().await;
    let (mut read, mut write) = web.connect().await.into_split();
    let block = |number: usize| -> Vec<u8> {
        (0..64 * 1024 / 8).flat_map(|i: usize| (i.wrapping_mul(0x9e37_79b9) ^ number).to_le_bytes()).collect()
    };
    db.scope.spawn("sender", async move {
        for number in 0..BLOCKS {
            write.write_all(&block(number)).await.unwrap();
        }
        write.shutdown().await.unwrap();
    });
    let (mut heard, mut sent) = (ring::digest::Context::new(&ring::digest::SHA256), None);
    let mut buffer = vec![0; 64 * 1024];
    let mut bytes = 0;
    loop {
        let count = read.read(&mut buffer).await.unwrap();
        if count == 0 {
            break;
        }
        bytes += count;
        heard.update(&buffer[..count]);
    }
    let expected = sent.insert(ring::digest::Context::new(&ring::digest::SHA256));
    (0..BLOCKS).for_each(|number| expected.update(&block(number)));
    assert_eq!(bytes, BLOCKS * 64 * 1024);
    assert_eq!(heard.finish().as_ref(), sent.unwrap().finish().as_ref());
}

#[tokio::test]
async fn one_handshake_serves_many_clients_one_after_the_other() {
    let db = Db::new(echo).await;
    let web = db.web().await;
    for number in 0..100u32 {
        assert_eq!(web.ask(&number.to_be_bytes()).await.unwrap(), number.to_be_bytes());
        until("the connection is ready again", || web.outbound.ready_connections() > 0).await;
    }
    let (_, awaited) = web.stats.handshakes();
    assert_eq!((awaited, web.stats.sessions_without_handshake()), (1, 99));
    assert_eq!(db.reached(), 100);
}

#[tokio::test]
async fn connections_are_made_ahead_of_need_once_there_was_some() {
    let clock = ManualClock::at(SystemClock.now());
    let db = Db::at(clock.clone(), "mapping = \"tcp\"", echo).await;
    let web = db.web().await;
    let mut open = Vec::new();
    for _ in 0..5 {
        let mut stream = web.connect().await;
        stream.write_all(b"x").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
        open.push(stream);
    }
    assert_eq!(web.stats.handshakes(), (0, 5));
    until("five more are ready", || {
        clock.advance(Duration::from_millis(20));
        web.outbound.ready_connections() == 5
    })
    .await;
    assert_eq!(web.stats.handshakes(), (5, 5));
    for _ in 0..5 {
        let mut stream = web.connect().await;
        stream.write_all(b"x").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
        open.push(stream);
    }
    assert_eq!(web.stats.sessions_without_handshake(), 5);
    // Unused ones go.
    drop(open);
    until("none is ready any more", || {
        clock.advance(Duration::from_secs(2));
        web.outbound.ready_connections() == 0
    })
    .await;
}

#[tokio::test]
async fn another_identity_than_the_one_meant_is_never_spoken_to() {
    let db = Db::new(echo).await;
    let web = db.called_by("/service/web", "/service/ledger").await;
    assert_eq!(web.ask(b"secret").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(db.reached(), 0);
}

#[tokio::test]
async fn a_caller_without_a_permit_reaches_no_byte_of_the_app_and_gets_a_receipt() {
    let db = Db::new(echo).await;
    let web = db.called_by("/service/other", "/service/db").await;
    assert_eq!(web.ask(b"SELECT 1").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(db.reached(), 0);
    let denials = db.denials();
    assert_eq!(denials.len(), 1);

    // The peer hears the receipt, and nothing else.
    let source = db.authority.source("/service/other");
    let tls = client_config(&source, id("/service/db"), &[ALPN_TCP], &db.clock).unwrap();
    let stream = Stream::new(TcpStream::connect(db.address).await.unwrap());
    let tls = TlsConnector::from(tls).connect(unnamed_server(), stream).await.unwrap();
    let mut session = Session::open(tls, &OpenFrame { port: "main".into(), source: None });
    session.write_all(b"SELECT 1").await.unwrap();
    session.flush().await.unwrap();
    let error = session.read_u8().await.unwrap_err();
    match SessionError::of(&error) {
        Some(SessionError::Refused { status: Status::Denied, receipt }) => {
            assert_eq!(Some(receipt), db.denials().last().map(|(_, receipt)| receipt));
        }
        other => panic!("{other:?} {error}"),
    }
}

#[tokio::test]
async fn a_service_whose_map_is_not_tcp_takes_no_plain_connection() {
    let db = Db::at(SystemClock::shared(), "mapping = \"none\"\nmode = \"audit\"", echo).await;
    let web = db.web().await;
    assert_eq!(web.ask(b"GET / HTTP/1.1\r\n\r\n").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(db.denials()[0].0, "tcp.not_allowed_by_map");
    assert_eq!(db.reached(), 0);
}

#[tokio::test]
async fn a_port_that_the_service_does_not_have_is_refused() {
    let db = Db::new(echo).await;
    let mut session = Session::open(db.raw().await, &OpenFrame { port: "admin".into(), source: None });
    session.flush().await.unwrap();
    let error = session.read_u8().await.unwrap_err();
    assert!(
        matches!(SessionError::of(&error), Some(SessionError::Refused { status: Status::Denied, .. })),
        "{error}"
    );
    assert_eq!(db.denials()[0].0, "tcp.unknown_port");
}

#[tokio::test]
async fn what_is_no_opening_is_turned_away() {
    let db = Db::new(echo).await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[1, 0, 0, 200], &[1, 0, 0, 3, 2, 0, 0], &[3, 0, 0, 1, 0]] {
        let mut tls = db.raw().await;
        tls.write_all(bytes).await.unwrap();
        let mut heard = Vec::new();
        tls.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, [2, 0, 0, 1, 4], "{bytes:?}");
    }
    assert_eq!(db.reached(), 0);
}

#[tokio::test]
async fn a_new_policy_that_denies_ends_what_is_open() {
    let db = Db::new(echo).await;
    let web = db.web().await;
    let mut stream = web.connect().await;
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    let open = db.registry.list();
    assert_eq!(
        open.iter().map(|open| (open.about.as_str(), open.bytes)).collect::<Vec<_>>(),
        [("port main", (1, 1))]
    );
    assert_eq!(open[0].facts.peer.id(), &id("/service/web"));

    // The same permission in a new version changes nothing.
    db.replace(policy("mapping = \"tcp\"", &format!("{WEB_ONLY}\n"))).await;
    stream.write_all(b"y").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'y');

    db.replace(policy("mapping = \"tcp\"", NOBODY)).await;
    assert_eq!(stream.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    until("the end is recorded", || db.denials().iter().any(|(rule, _)| rule == "closed-for-repair")).await;
    until("it is forgotten", || db.registry.is_empty()).await;
}

#[tokio::test]
async fn security_9_a_revoked_peer_s_connections_end() {
    let db = Db::new(echo).await;
    let web = db.web().await;
    let mut stream = web.connect().await;
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    let serial = db.registry.list()[0].facts.peer.serial().to_owned();
    db.registry.revoke(|peer| peer.serial() == "00").await;
    stream.write_all(b"y").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'y');
    db.registry.revoke(|peer| peer.serial() == serial).await;
    assert_eq!(stream.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    // One that waits for its next session goes too.
    assert_eq!(web.ask(b"z").await.unwrap(), b"z");
    until("a connection waits", || db.registry.list().iter().any(|open| open.about == "ready for a session"))
        .await;
    db.registry.revoke(|_| true).await;
    until("it is gone", || db.registry.is_empty()).await;
}

#[tokio::test]
async fn a_rotation_leaves_open_sessions_alone_until_the_old_certificate_ends() {
    let clock = ManualClock::at(SystemClock.now());
    let db = Db::at(clock.clone(), "mapping = \"tcp\"", echo).await;
    let web = db.web().await;
    let mut stream = web.connect().await;
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    assert_eq!(web.ask(b"1").await.unwrap(), b"1");
    until("a connection is ready", || web.outbound.ready_connections() == 1).await;

    web.publisher.publish(db.authority.issue("/service/web"), Arc::clone(&web.bundles));
    let (_, before) = web.stats.handshakes();
    // What was made under the old identity carries no new session, and the open one goes on.
    assert_eq!(web.ask(b"2").await.unwrap(), b"2");
    assert_eq!(web.stats.handshakes().1, before + 1);
    stream.write_all(b"y").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'y');

    clock.advance(Duration::from_secs(1801));
    assert_eq!(stream.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_session_that_meets_a_closing_connection_begins_over_another() {
    let db = Db::new(echo).await;
    let web = db.web().await;
    assert_eq!(web.ask(b"1").await.unwrap(), b"1");

    // A second listener that serves one session, says goodbye as the next one arrives, and is itself then.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    web.outbound.set_endpoints(vec![listener.local_addr().unwrap()]);
    let source = db.authority.source("/service/db");
    let tls = server_config(&source, ClientAuth::Required, &[ALPN_TCP], &db.clock).unwrap();
    let acceptor = TlsAcceptor::from(tls);
    let met = Arc::new(Mutex::new(Vec::new()));
    let (inside, inbound, scope) = (Arc::clone(&met), Arc::clone(&db.inbound), db.scope.clone());
    db.scope.spawn("closing listener", async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut tls = acceptor.accept(stream).await.unwrap();
        tls.fill_buf().await.unwrap();
        inside.lock().unwrap().push("an opening that nobody answers");
        tls.shutdown().await.unwrap();
        let (stream, remote) = listener.accept().await.unwrap();
        let tls = acceptor.accept(stream).await.unwrap();
        let peer = Peer::from_handshake(tls.get_ref().1.peer_certificates()).unwrap().unwrap();
        inside.lock().unwrap().push("another connection");
        inbound.serve(tls, peer, remote, &scope).await;
    });
    assert_eq!(web.ask(b"the same bytes").await.unwrap(), b"the same bytes");
    assert_eq!(*met.lock().unwrap(), ["an opening that nobody answers", "another connection"]);
}

#[tokio::test]
async fn an_app_that_is_down_is_told_apart_and_the_connection_is_reset() {
    let db = Db::new(echo).await;
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let source = db.authority.source("/service/db");
    let inbound = TcpInbound::new(TcpInboundConfig {
        service: "db".into(),
        id: id("/service/db"),
        ports: Ports::one(gone.local_addr().unwrap()),
        policy: Arc::clone(&db.policy),
        registry: Arc::clone(&db.registry),
        source: source.clone(),
        recorder: Arc::clone(&db.records) as Arc<dyn policy::Recorder>,
        stats: TcpStats::default(),
        clock: db.clock.clone(),
        random: identity::random::system(),
        access_log: false,
    });
    drop(gone);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = server_config(&source, ClientAuth::Required, &[ALPN_TCP], &db.clock).unwrap();
    let down = Db { inbound, address, ..db };
    down.listen(listener, TlsAcceptor::from(tls));
    let mut session = Session::open(down.raw().await, &OpenFrame { port: String::new(), source: None });
    session.flush().await.unwrap();
    let error = session.read_u8().await.unwrap_err();
    assert!(
        matches!(SessionError::of(&error), Some(SessionError::Refused { status: Status::AppDown, .. })),
        "{error}"
    );
    let web = down.web().await;
    assert_eq!(web.ask(b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_app_s_reset_reaches_the_client_as_one() {
    let db = Db::new(|mut stream: TcpStream| async move {
        stream.write_all(b"half of it").await.unwrap();
        let _asked = stream.read_u8().await;
        stream.set_zero_linger().unwrap();
    })
    .await;
    let web = db.web().await;
    let mut stream = web.connect().await;
    let mut heard = [0; 10];
    stream.read_exact(&mut heard).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(web.outbound.ready_connections(), 0);
}

#[tokio::test]
async fn draining_lets_sessions_finish_and_takes_no_new_ones() {
    let db = Db::new(echo).await;
    let web = db.web().await;
    let mut stream = web.connect().await;
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    db.scope.drain();
    stream.write_all(b"y").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'y');
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(db.scope.finished(Duration::from_secs(10)).await, Ok(()));
    assert!(db.registry.is_empty());
}

#[tokio::test]
async fn a_sidecar_takes_plain_connections_where_it_takes_requests_and_judges_them_again() {
    let db = Db::new(echo).await;
    let (app, _) = app(&db.scope, echo).await;
    let bind = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listener = bind();
    let address = listener.local_addr().unwrap();
    let config = SidecarConfig {
        id: id("/service/db"),
        inbound: Some(InboundConfig {
            service: "db".into(),
            listener,
            app,
            app_protocol: AppProtocol::Http1,
            policy: policy("mapping = \"tcp\"", WEB_ONLY),
            gateways: Vec::new(),
            request_timeout: Duration::from_secs(10),
            hbone: None,
            proxies: Default::default(),
            rate_limit: None,
            health: None,
        }),
        ext_authz: None,
        calls: Vec::new(),
        capture: CaptureConfig::default(),
        admin: None,
        access_log: None,
        traces: None,
        others: Vec::new(),
        budget: sidecar::overload::Budget::default(),
    };
    let source = db.authority.source("/service/db");
    let (recorder, random) =
        (Arc::clone(&db.records) as Arc<dyn policy::Recorder>, identity::random::system());
    let sidecar = Sidecar::start(config, source, recorder, db.clock.clone(), random, &db.scope).unwrap();
    let web = Db { address, ..db };
    let (db, web) = (&web, web.web().await);
    assert_eq!(web.ask(b"hello").await.unwrap(), b"hello");

    let mut stream = web.connect().await;
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    sidecar.replace_policy(policy("mapping = \"tcp\"", NOBODY));
    assert_eq!(stream.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    until("the end is recorded", || db.denials().iter().any(|(rule, _)| rule == "closed-for-repair")).await;
}

#[tokio::test]
async fn without_an_identity_of_our_own_nothing_is_dialled() {
    let db = Db::new(echo).await;
    let web = db.web().await;
    web.publisher.withdraw();
    assert_eq!(web.ask(b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(db.reached(), 0);
}
