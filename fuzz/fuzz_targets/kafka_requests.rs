//! Whatever a client of Kafka's sends, a broker gets whole requests that are understood, and nothing of what is not
//! allowed.
#![no_main]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use identity::{SystemClock, TrustDomain};
use libfuzzer_sys::fuzz_target;
use policy::{Caller, Layer, NoRecorder, Occasion, Permit, Policies, Principal, Verdict};
use sidecar::kafka::{Ends, KafkaInbound, KafkaStats};
use sidecar::live::Traffic;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::runtime::Runtime;

const FILES: [(&str, &str); 3] = [
    (
        "mesh.cedarschema",
        "namespace Mesh { entity Workload = { service: String, trust_domain: String }; entity Client;\n\
         type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };\n\
         type Context = { user?: User, chain: Set<String>, now: Long }; }",
    ),
    ("services/events/map.toml", "mapping = \"kafka\""),
    (
        "services/events/events.cedar",
        "@id(\"all\") permit (principal is Mesh::Workload, action, resource == Kafka::Topic::\"a\");",
    ),
];

struct Stage {
    runtime: Runtime,
    kafka: KafkaInbound,
    caller: Caller,
    connected: Permit,
}

fn stage() -> &'static Stage {
    static STAGE: OnceLock<Stage> = OnceLock::new();
    STAGE.get_or_init(|| {
        let files: BTreeMap<String, Vec<u8>> =
            FILES.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect();
        let domain = TrustDomain::new("mesh.test").unwrap();
        let policies = Policies::from_files(&files, Path::new("policies"), None, &domain);
        let policy = policies.unwrap_or_else(|problems| panic!("{problems}")).service("events").unwrap();
        let caller = Caller {
            principal: Principal::Workload(domain.workload("/service/web").unwrap()),
            user: None,
            chain: Arc::new([]),
            address: None,
        };
        let occasion = Occasion {
            receipt: "r-7k2m0q9xw4e8t5hz".parse().unwrap(),
            now: Duration::from_secs(1_700_000_000),
            layer: Layer::Sidecar,
            method: "CONNECT",
            target: "",
            transaction: None,
            trace_id: None,
        };
        let Verdict::Permit(connected) = policy.decide_kafka_connection(&caller, &occasion) else {
            panic!("a permit is about everybody")
        };
        let kafka = KafkaInbound::new(
            Arc::new(ArcSwap::from(policy)),
            Arc::new(NoRecorder),
            KafkaStats::default(),
            SystemClock::shared(),
            identity::random::system(),
            false,
        );
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Stage { runtime, kafka, caller, connected }
    })
}

/// Frames whose lengths are true: API key, version, how much of what follows is theirs.
fn frames(mut input: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let [key, version, length, rest @ ..] = input {
        let (message, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        let head = [0, *key % 70, 0, *version % 14, 0, 0, 0, 1, 0xff, 0xff];
        bytes.extend(((head.len() + message.len()) as i32).to_be_bytes());
        bytes.extend(head);
        bytes.extend(message);
        input = rest;
    }
    bytes.extend(input);
    bytes
}

fuzz_target!(|input: &[u8]| {
    let Stage { runtime, kafka, caller, connected } = stage();
    let reached = runtime.block_on(async {
        let (mut client, near) = duplex(1 << 20);
        let (mut broker, far) = duplex(1 << 20);
        let sent = frames(input);
        let traffic = Traffic::default();
        let serving = kafka.serve(Ends { client: near, broker: far }, caller.clone(), connected, &traffic);
        let talking = async {
            let _sent = client.write_all(&sent).await;
            let _ended = client.shutdown().await;
            let mut reached = Vec::new();
            // Nothing is answered: the broker has gone once it has heard all there is.
            let read = tokio::time::timeout(Duration::from_millis(20), broker.read_to_end(&mut reached));
            let _late = read.await;
            drop(broker);
            reached
        };
        let (_ended, reached) = tokio::join!(tokio::time::timeout(Duration::from_secs(10), serving), talking);
        assert!(_ended.is_ok(), "the connection outlives its client");
        reached
    });
    let mut left = &reached[..];
    while let Some((length, rest)) = left.split_first_chunk::<4>() {
        let length = i32::from_be_bytes(*length) as usize;
        assert!((8..=rest.len()).contains(&length), "half a request");
        left = &rest[length..];
    }
    assert!(left.is_empty());
});
