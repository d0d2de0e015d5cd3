//! Kafka through a pair of sidecars: a client, the outbound half, mTLS, the inbound half, and a broker that records what
//! reached it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::{BufMut, Bytes, BytesMut};
use identity::clock::{SharedClock, SystemClock};
use identity::testing::TestAuthority;
use identity::tls::{ClientAuth, server_config};
use identity::{Peer, Scope, SpiffeId, TrustDomain};
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::fetch_response::{FetchableTopicResponse, PartitionData};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::metadata_response::MetadataResponseTopic;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::produce_response::{PartitionProduceResponse, TopicProduceResponse};
use kafka_protocol::messages::{
    ApiKey, ApiVersionsRequest, BrokerId, FetchRequest, FetchResponse, MetadataRequest, MetadataResponse,
    ProduceRequest, ProduceResponse, RequestHeader, ResponseHeader, TopicName,
};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes};
use policy::{DecisionRecord, MemoryRecorder, Outcome, Policies, ServicePolicy};
use sidecar::live::Registry;
use sidecar::tcp::inbound::TcpInboundConfig;
use sidecar::tcp::{ALPN_TCP, Ports, Stream, TcpInbound, TcpOutbound, TcpStats, TcpUpstream};
use sidecar::traffic::config::Traffic;
use sidecar::traffic::random::Dice;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

const MESH: &str = "namespace Mesh {
  entity Workload { service: String, trust_domain: String };
  entity Client;
  type Context = {
    user?: { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long },
    chain: Set<String>, now: Long,
  };
}";
const RULES: &str = r#"
@id("web-writes-and-reads-orders")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/web",
  action in [Kafka::Action::"Read", Kafka::Action::"Write"], resource == Kafka::Topic::"orders"
);
@id("web-reads-topics")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/web",
  action == Kafka::Action::"Describe", resource is Kafka::Topic
);
"#;
const NOTHING_MORE: &str = r#"
@id("web-describes")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/web",
  action == Kafka::Action::"Describe", resource is Kafka::Topic
);
"#;

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&format!("spiffe://bank.example{path}")).unwrap()
}

fn policy(rules: &str) -> Arc<ServicePolicy> {
    let files: BTreeMap<String, Vec<u8>> = [
        ("mesh.cedarschema", MESH),
        ("services/events/map.toml", "mapping = \"kafka\""),
        ("services/events/events.cedar", rules),
    ]
    .into_iter()
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .collect();
    let domain = TrustDomain::new("bank.example").unwrap();
    let policies = Policies::from_files(&files, Path::new("policies"), None, &domain);
    policies.unwrap_or_else(|problems| panic!("{problems}")).service("events").unwrap()
}

/// A request that reached the broker: API key, version and frame without its length.
type Reached = (i16, i16, Bytes);

/// Answers like a broker, and keeps what reached it. A Fetch waits until `records` says that there are some.
#[derive(Clone)]
struct Broker {
    reached: Arc<Mutex<Vec<Reached>>>,
    records: watch::Sender<Option<Bytes>>,
}

fn framed<H: Encodable, M: Encodable>(header: &H, header_version: i16, message: &M, version: i16) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_i32(0);
    header.encode(&mut frame, header_version).unwrap();
    message.encode(&mut frame, version).unwrap();
    let length = (frame.len() - 4) as i32;
    frame[..4].copy_from_slice(&length.to_be_bytes());
    frame.freeze()
}

fn request<R: Request>(correlation: i32, version: i16, request: &R) -> Bytes {
    let header = RequestHeader::default()
        .with_request_api_key(R::KEY)
        .with_request_api_version(version)
        .with_correlation_id(correlation)
        .with_client_id(Some(StrBytes::from_static_str("test")));
    framed(&header, R::header_version(version), request, version)
}

fn answer<R: Request>(correlation: i32, version: i16, answer: &R::Response) -> Bytes {
    let header = ResponseHeader::default().with_correlation_id(correlation);
    framed(&header, R::Response::header_version(version), answer, version)
}

/// The message of a request's frame, without its length.
fn asked<R: Request>(frame: &Bytes, version: i16) -> (i32, R) {
    let mut rest = frame.clone();
    let header = RequestHeader::decode(&mut rest, R::header_version(version)).unwrap();
    let request = R::decode(&mut rest, version).unwrap();
    assert!(rest.is_empty());
    (header.correlation_id, request)
}

fn answered<R: Request>(frame: &Bytes, version: i16) -> (i32, R::Response) {
    let mut rest = frame.clone();
    let header = ResponseHeader::decode(&mut rest, R::Response::header_version(version)).unwrap();
    let answer = R::Response::decode(&mut rest, version).unwrap();
    assert!(rest.is_empty());
    (header.correlation_id, answer)
}

async fn read_frame(stream: &mut TcpStream) -> Option<Bytes> {
    let length = stream.read_i32().await.ok()?;
    let mut frame = vec![0; length as usize];
    stream.read_exact(&mut frame).await.ok()?;
    Some(frame.into())
}

impl Broker {
    async fn serve(self, mut stream: TcpStream) {
        while let Some(frame) = read_frame(&mut stream).await {
            let key = i16::from_be_bytes(frame[..2].try_into().unwrap());
            let version = i16::from_be_bytes(frame[2..4].try_into().unwrap());
            self.reached.lock().unwrap().push((key, version, frame.clone()));
            let Some(answer) = self.answer(key, version, &frame).await else { continue };
            if stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }

    async fn answer(&self, key: i16, version: i16, frame: &Bytes) -> Option<Bytes> {
        Some(match ApiKey::try_from(key).unwrap() {
            ApiKey::Produce => {
                let (correlation, asked) = asked::<ProduceRequest>(frame, version);
                if asked.acks == 0 {
                    return None;
                }
                let topics = asked.topic_data.into_iter().map(|topic| {
                    let partitions = topic.partition_data.iter().map(|partition| {
                        PartitionProduceResponse::default().with_index(partition.index).with_base_offset(42)
                    });
                    TopicProduceResponse::default()
                        .with_partition_responses(partitions.collect())
                        .with_name(topic.name)
                });
                let told = ProduceResponse::default().with_responses(topics.collect());
                answer::<ProduceRequest>(correlation, version, &told)
            }
            ApiKey::Fetch => {
                let (correlation, asked) = asked::<FetchRequest>(frame, version);
                let mut records = self.records.subscribe();
                let records = records.wait_for(Option::is_some).await.unwrap().clone();
                let topics = asked.topics.into_iter().map(|topic| {
                    let partition = PartitionData::default().with_records(records.clone());
                    FetchableTopicResponse::default().with_partitions(vec![partition]).with_topic(topic.topic)
                });
                let told = FetchResponse::default().with_responses(topics.collect());
                answer::<FetchRequest>(correlation, version, &told)
            }
            ApiKey::Metadata => {
                let (correlation, asked) = asked::<MetadataRequest>(frame, version);
                let topics =
                    asked.topics.into_iter().flatten().map(|topic| {
                        MetadataResponseTopic::default().with_error_code(3).with_name(topic.name)
                    });
                let told = MetadataResponse::default().with_topics(topics.collect());
                answer::<MetadataRequest>(correlation, version, &told)
            }
            other => panic!("{other:?} reached the broker"),
        })
    }
}

/// Sidecars, one in front of a broker and those of whoever calls.
struct Stage {
    authority: TestAuthority,
    policy: Arc<ArcSwap<ServicePolicy>>,
    registry: Arc<Registry>,
    recorder: Arc<MemoryRecorder>,
    broker: Broker,
    address: SocketAddr,
    clock: SharedClock,
    scope: Scope,
}

impl Stage {
    async fn new() -> Self {
        let (scope, clock) = (Scope::new(), SystemClock::shared());
        let broker = Broker { reached: Arc::default(), records: watch::channel(None).0 };
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app_address = app.local_addr().unwrap();
        let (inside, serving) = (scope.clone(), broker.clone());
        scope.spawn("broker", async move {
            loop {
                let (stream, _) = tokio::select! {
                    accepted = app.accept() => accepted.unwrap(),
                    () = inside.draining() => return,
                };
                inside.spawn("broker connection", serving.clone().serve(stream));
            }
        });
        let authority = TestAuthority::new("bank.example");
        let source = authority.source("/service/events");
        let policy = Arc::new(ArcSwap::from(policy(RULES)));
        let (registry, recorder) = (Registry::new(clock.clone()), Arc::new(MemoryRecorder::default()));
        let inbound = TcpInbound::new(TcpInboundConfig {
            service: "events".into(),
            id: id("/service/events"),
            ports: Ports::one(app_address),
            policy: Arc::clone(&policy),
            registry: Arc::clone(&registry),
            source: source.clone(),
            recorder: Arc::clone(&recorder) as Arc<dyn policy::Recorder>,
            stats: TcpStats::default(),
            clock: clock.clone(),
            random: identity::random::system(),
            access_log: false,
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = server_config(&source, ClientAuth::Required, &[ALPN_TCP], &clock).unwrap();
        let (acceptor, inside) = (TlsAcceptor::from(tls), scope.clone());
        scope.spawn("listener", async move {
            loop {
                let (stream, remote) = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap(),
                    () = inside.draining() => return,
                };
                let (acceptor, inbound, within) = (acceptor.clone(), Arc::clone(&inbound), inside.clone());
                inside.spawn("connection", async move {
                    let Ok(tls) = acceptor.accept(Stream::new(stream)).await else { return };
                    let peer = Peer::from_handshake(tls.get_ref().1.peer_certificates()).unwrap().unwrap();
                    inbound.serve(tls, peer, remote, &within).await;
                });
            }
        });
        Self { authority, policy, registry, recorder, broker, address, clock, scope }
    }

    /// A connection of this service's app.
    async fn client(&self, service: &str) -> Client {
        let upstream = TcpUpstream {
            service: "events".into(),
            id: id("/service/events"),
            port: String::new(),
            endpoints: vec![self.address].into(),
            traffic: Traffic::default(),
        };
        let source = self.authority.source(service);
        let (stats, dice) = (TcpStats::default(), Dice::seeded(5));
        let outbound = TcpOutbound::new(upstream, source, stats, self.clock.clone(), dice, false).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        outbound.serve(listener, &sidecar::server::Limits::default(), &self.scope);
        // Tokio's own would hear of a refusal before it has a connection.
        let stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_nonblocking(true).unwrap();
        Client { stream: TcpStream::from_std(stream).unwrap(), _outbound: outbound }
    }

    async fn change_policy(&self, rules: &str) {
        let policy = policy(rules);
        self.policy.store(Arc::clone(&policy));
        self.registry.reevaluate_all(&policy).await;
    }

    fn reached(&self) -> Vec<Reached> {
        self.broker.reached.lock().unwrap().clone()
    }

    /// Waits until so many requests reached the broker.
    async fn until_reached(&self, count: usize) {
        while self.reached().len() < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn denials(&self) -> Vec<DecisionRecord> {
        self.recorder.records().into_iter().filter(|record| record.verdict == Outcome::Deny).collect()
    }
}

struct Client {
    stream: TcpStream,
    _outbound: Arc<TcpOutbound>,
}

impl Client {
    async fn send(&mut self, frame: &[u8]) {
        // Who is refused may hear of it before having said anything.
        let _how = self.stream.write_all(frame).await.is_ok();
    }

    async fn heard(&mut self) -> Bytes {
        read_frame(&mut self.stream).await.expect("an answer")
    }

    /// Whether the connection ended without a byte more.
    async fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        // In order or by a reset, whichever.
        let _how = self.stream.read_to_end(&mut rest).await.is_ok();
        rest.is_empty()
    }
}

fn name(name: &str) -> TopicName {
    TopicName(StrBytes::from_string(name.to_owned()))
}

fn produce(topics: &[&str], acks: i16, records: &Bytes) -> ProduceRequest {
    let data = topics.iter().map(|topic| {
        let partition = PartitionProduceData::default().with_records(Some(records.clone()));
        TopicProduceData::default().with_name(name(topic)).with_partition_data(vec![partition])
    });
    ProduceRequest::default().with_acks(acks).with_timeout_ms(1000).with_topic_data(data.collect())
}

fn fetch(topics: &[&str]) -> FetchRequest {
    let topics = topics.iter().map(|topic| {
        FetchTopic::default().with_topic(name(topic)).with_partitions(vec![FetchPartition::default()])
    });
    FetchRequest::default()
        .with_replica_id(BrokerId(-1))
        .with_max_wait_ms(i32::MAX)
        .with_topics(topics.collect())
}

fn metadata(topics: &[&str]) -> MetadataRequest {
    let topics = topics.iter().map(|topic| MetadataRequestTopic::default().with_name(Some(name(topic))));
    MetadataRequest::default().with_topics(Some(topics.collect())).with_allow_auto_topic_creation(true)
}

/// What was answered about each topic.
fn written(told: &ProduceResponse) -> Vec<(String, i16)> {
    let code = |topic: &TopicProduceResponse| topic.partition_responses[0].error_code;
    told.responses.iter().map(|topic| (topic.name.0.to_string(), code(topic))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_allowed_of_a_request_reaches_the_broker_and_answers_keep_their_order() {
    let stage = Stage::new().await;
    let mut web = stage.client("/service/web").await;
    let records = Bytes::from(vec![7; 3 << 20]);
    web.send(&request(1, 9, &produce(&["orders"], -1, &records))).await;
    let (correlation, told) = answered::<ProduceRequest>(&web.heard().await, 9);
    assert_eq!((correlation, written(&told)), (1, vec![("orders".into(), 0)]));
    let (key, version, frame) = stage.reached()[0].clone();
    assert_eq!((key, version), (0, 9));
    assert_eq!(asked::<ProduceRequest>(&frame, 9).1, produce(&["orders"], -1, &records));

    // All at once: the first waits at the broker, the second is denied here, the third in part.
    let few = Bytes::from_static(b"few");
    web.send(&request(2, 11, &fetch(&["orders"]))).await;
    web.send(&request(3, 9, &produce(&["salaries"], 1, &few))).await;
    web.send(&request(4, 8, &produce(&["orders", "salaries"], 1, &few))).await;
    stage.until_reached(2).await;
    stage.broker.records.send_replace(Some(Bytes::from_static(b"some records")));
    let (correlation, told) = answered::<FetchRequest>(&web.heard().await, 11);
    let got = told.responses[0].partitions[0].records.clone().unwrap();
    assert_eq!((correlation, &got[..]), (2, &b"some records"[..]));
    let (correlation, told) = answered::<ProduceRequest>(&web.heard().await, 9);
    assert_eq!((correlation, written(&told)), (3, vec![("salaries".into(), 29)]));
    let (correlation, told) = answered::<ProduceRequest>(&web.heard().await, 8);
    assert_eq!(correlation, 4);
    assert_eq!(written(&told), [("salaries".into(), 29), ("orders".into(), 0)]);
    let (_, _, frame) = stage.reached()[2].clone();
    assert_eq!(asked::<ProduceRequest>(&frame, 8).1, produce(&["orders"], 1, &few));

    // Some of what is to be read.
    web.send(&request(5, 12, &fetch(&["salaries", "orders"]))).await;
    let (_, told) = answered::<FetchRequest>(&web.heard().await, 12);
    let told: Vec<_> =
        told.responses.iter().map(|of| (of.topic.0.to_string(), of.partitions[0].error_code)).collect();
    assert_eq!(told, [("salaries".into(), 29), ("orders".into(), 0)]);
    assert_eq!(stage.reached().len(), 4);
    let denials = stage.denials();
    assert_eq!(denials.len(), 3);
    assert!(denials.iter().all(|record| {
        record.objects[0].object == "Kafka::Topic::\"salaries\"" && record.explanation.is_some()
    }));
    assert_eq!((denials[0].method.as_str(), denials[0].target.as_str()), ("Produce", "topic:salaries"));
}

/// Acceptance list policy, line 34: an unknown topic id. No version that has ids is understood.
#[tokio::test(flavor = "multi_thread")]
async fn policy_34_a_topic_by_its_id_reaches_no_broker() {
    let stage = Stage::new().await;
    for frame in [
        request(1, 13, &FetchRequest::default().with_topics(vec![FetchTopic::default()])),
        request(1, 13, &ProduceRequest::default()),
        request(1, 12, &metadata(&["orders"])),
    ] {
        let mut web = stage.client("/service/web").await;
        web.send(&frame).await;
        assert!(web.is_closed().await);
    }
    assert!(stage.reached().is_empty());
    let rules: Vec<String> = stage.denials().iter().map(|record| record.rule.name().to_owned()).collect();
    assert_eq!(rules, ["kafka.version"; 3]);
}

/// Acceptance list policy, line 34: `acks=0`.
#[tokio::test(flavor = "multi_thread")]
async fn policy_34_acks_0_that_is_denied_reaches_no_broker_and_is_answered_by_the_end() {
    let stage = Stage::new().await;
    let records = Bytes::from_static(b"records");
    for topics in [&["salaries"][..], &["orders", "salaries"]] {
        let mut web = stage.client("/service/web").await;
        web.send(&request(1, 9, &produce(topics, 0, &records))).await;
        assert!(web.is_closed().await);
    }
    assert!(stage.reached().is_empty());
    assert_eq!(stage.denials().len(), 2);
    // What is allowed is written, and nothing is answered; the next request is.
    let mut web = stage.client("/service/web").await;
    web.send(&request(1, 9, &produce(&["orders"], 0, &records))).await;
    web.send(&request(2, 9, &produce(&["orders"], 1, &records))).await;
    assert_eq!(answered::<ProduceRequest>(&web.heard().await, 9).0, 2);
    assert_eq!(stage.reached().len(), 2);
}

/// Acceptance list policy, line 34: auto-creation by Metadata.
#[tokio::test(flavor = "multi_thread")]
async fn policy_34_metadata_makes_no_topic_for_whom_may_not_create_it() {
    let stage = Stage::new().await;
    let mut web = stage.client("/service/web").await;
    // The older version has no word for it, and brokers make topics then.
    for version in [1, 9] {
        web.send(&request(1, version, &metadata(&["new"]).with_allow_auto_topic_creation(true))).await;
        let (_, told) = answered::<MetadataRequest>(&web.heard().await, version);
        assert_eq!(told.topics[0].error_code, 29);
        let (_, asked_in, frame) = stage.reached().pop().unwrap();
        assert!(!asked::<MetadataRequest>(&frame, asked_in).1.allow_auto_topic_creation);
    }
    assert!(stage.denials().iter().all(|record| record.action.as_deref() == Some("Create")));
}

/// Acceptance list policy, line 34: a topic named like an internal one.
#[tokio::test(flavor = "multi_thread")]
async fn policy_34_a_topic_named_like_an_internal_one_is_not_a_topic_in_general() {
    let stage = Stage::new().await;
    let mut web = stage.client("/service/web").await;
    let names =
        ["__consumer_offsets", "__transaction_state", "__Consumer_Offsets", "_.consumer_offsets", "__x"];
    for named in names {
        // Any topic may be described; these are none of those.
        web.send(&request(1, 9, &metadata(&[named]))).await;
        let (_, told) = answered::<MetadataRequest>(&web.heard().await, 9);
        assert_eq!(told.topics[0].error_code, 29, "{named}");
        web.send(&request(2, 9, &produce(&[named], 1, &Bytes::from_static(b"records")))).await;
        let (_, told) = answered::<ProduceRequest>(&web.heard().await, 9);
        assert_eq!(written(&told), [(named.to_owned(), 29)]);
    }
    // Where brokers are was asked, and nothing of these topics.
    let named = |frame: &Bytes| names.iter().any(|name| String::from_utf8_lossy(frame).contains(name));
    assert!(stage.reached().iter().all(|(key, _, frame)| *key == 3 && !named(frame)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_ends_the_connection_and_reaches_no_broker() {
    let stage = Stage::new().await;
    let mut unknown = BytesMut::new();
    unknown.put_i32(10);
    unknown.put_slice(&[0, 30, 0, 0, 0, 0, 0, 1, 0xff, 0xff]);
    let huge = [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 9, 0, 0, 0, 1];
    let metadata_of_2_mib = [0, 0x20, 0, 0, 0, 3, 0, 9, 0, 0, 0, 1];
    let negative = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 9, 0, 0, 0, 1];
    let mut behind = BytesMut::from(&request(1, 9, &produce(&["orders"], 1, &Bytes::new()))[..]);
    behind.put_u8(0);
    let length = (behind.len() - 4) as i32;
    behind[..4].copy_from_slice(&length.to_be_bytes());
    for (frame, rule) in [
        (&unknown[..], "kafka.api"),
        (&huge, "kafka.length"),
        (&metadata_of_2_mib, "kafka.length"),
        (&negative, "kafka.length"),
        (&behind, "kafka.request"),
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "kafka.api"),
    ] {
        let mut web = stage.client("/service/web").await;
        web.send(frame).await;
        assert!(web.is_closed().await, "{rule}");
        assert_eq!(stage.denials().last().map(|record| record.rule.name().to_owned()).as_deref(), Some(rule));
    }
    assert!(stage.reached().is_empty());
    // But for one: a version that is too new is answered with what is known.
    let mut web = stage.client("/service/web").await;
    web.send(&request(5, 4, &ApiVersionsRequest::default())).await;
    let (correlation, told) = answered::<ApiVersionsRequest>(&web.heard().await, 0);
    assert_eq!((correlation, told.error_code, told.api_keys[0].max_version), (5, 35, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_policy_judges_the_next_request_and_what_a_client_waits_for() {
    let stage = Stage::new().await;
    let (mut web, mut waiting) = (stage.client("/service/web").await, stage.client("/service/web").await);
    let records = Bytes::from_static(b"records");
    web.send(&request(1, 9, &produce(&["orders"], 1, &records))).await;
    assert_eq!(written(&answered::<ProduceRequest>(&web.heard().await, 9).1), [("orders".into(), 0)]);
    waiting.send(&request(1, 12, &fetch(&["orders"]))).await;
    stage.until_reached(2).await;

    stage.change_policy(NOTHING_MORE).await;
    web.send(&request(2, 9, &produce(&["orders"], 1, &records))).await;
    assert_eq!(written(&answered::<ProduceRequest>(&web.heard().await, 9).1), [("orders".into(), 29)]);
    stage.broker.records.send_replace(Some(Bytes::from_static(b"secret by now")));
    assert!(waiting.is_closed().await, "what it waited for is not its any more");

    // Whom nothing is permitted any more is not even connected.
    stage.change_policy("@id(\"closed\")\nforbid (principal, action, resource);").await;
    assert!(web.is_closed().await);
    assert!(stage.client("/service/web").await.is_closed().await);
    assert_eq!(stage.reached().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_no_policy_is_about_reaches_no_broker() {
    let stage = Stage::new().await;
    let mut stranger = stage.client("/service/stranger").await;
    stranger.send(&request(1, 3, &ApiVersionsRequest::default())).await;
    assert!(stranger.is_closed().await);
    assert!(stage.reached().is_empty());
    assert_eq!(stage.denials()[0].principal.as_deref(), Some("spiffe://bank.example/service/stranger"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_holds_up_nobody_else() {
    let stage = Stage::new().await;
    stage.broker.records.send_replace(Some(Bytes::from(vec![1; 32 << 20])));
    let mut slow = stage.client("/service/web").await;
    for correlation in 0..300 {
        slow.send(&request(correlation, 12, &fetch(&["orders"]))).await;
    }
    let mut quick = stage.client("/service/web").await;
    for correlation in 0..20 {
        quick.send(&request(correlation, 9, &produce(&["orders"], 1, &Bytes::from(vec![2; 1 << 20])))).await;
        assert_eq!(answered::<ProduceRequest>(&quick.heard().await, 9).0, correlation);
    }
    // Its own answers come when it takes them, whole and in order.
    for correlation in 0..3 {
        let (heard, told) = answered::<FetchRequest>(&slow.heard().await, 12);
        assert_eq!(heard, correlation);
        assert_eq!(told.responses[0].partitions[0].records.as_ref().map(Bytes::len), Some(32 << 20));
    }
}
