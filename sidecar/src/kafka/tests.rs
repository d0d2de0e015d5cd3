//! Every request that is understood, in every version: what is passed on is what was judged, and what is denied is
//! answered in a form that its client reads.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::{BufMut, Bytes, BytesMut};
use identity::TrustDomain;
use identity::clock::SystemClock;
use kafka_protocol::messages::*;
use kafka_protocol::protocol::{Encodable, Request, StrBytes};
use policy::{
    Caller, MemoryRecorder, Occasion, Permit, Policies, Principal, Receipt, ServicePolicy, Verdict,
};
use proptest::prelude::*;

use super::apis::{APIS, Api};
use super::judge::Guard;
use super::records::{Produced, SPLICED_HEAD_BYTES, Splice};
use super::stats::KafkaStats;
use super::step::{self, Answer, Asked, Step, Stop};
use super::wire::{Head, LENGTH_BYTES, Malformed, whole};

const MESH: &str = "namespace Mesh {
  entity Workload { service: String, trust_domain: String };
  entity Client;
  type Context = {
    user?: { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long },
    chain: Set<String>, now: Long,
  };
}";
const POLICY: &str = r#"
@id("web-names-what-is-allowed")
permit (principal == Mesh::Workload::"spiffe://bank.example/service/web", action, resource is Kafka::Topic)
when { resource in [Kafka::Topic::"allowed-1", Kafka::Topic::"allowed-2"] };
@id("web-groups")
permit (principal == Mesh::Workload::"spiffe://bank.example/service/web", action, resource is Kafka::Group)
when { resource in [Kafka::Group::"allowed-1", Kafka::Group::"allowed-2"] };
@id("web-transactions")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/web", action,
  resource == Kafka::TransactionalId::"allowed-1"
);
@id("ops-has-the-cluster")
permit (principal == Mesh::Workload::"spiffe://bank.example/service/ops", action, resource is Kafka::Cluster);
"#;

fn policy(text: &str) -> Arc<ServicePolicy> {
    let files: BTreeMap<String, Vec<u8>> = [
        ("mesh.cedarschema", MESH),
        ("services/events/map.toml", "mapping = \"kafka\""),
        ("services/events/events.cedar", text),
    ]
    .into_iter()
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .collect();
    let domain = TrustDomain::new("bank.example").unwrap();
    let policies = Policies::from_files(&files, Path::new("policies"), None, &domain);
    policies.unwrap_or_else(|problems| panic!("{problems}")).service("events").unwrap()
}

struct Stage {
    guard: Guard,
    records: Arc<MemoryRecorder>,
    connected: Permit,
}

impl Stage {
    fn of(service: &str) -> Self {
        let id = TrustDomain::new("bank.example").unwrap().workload(&format!("/service/{service}")).unwrap();
        let caller =
            Caller { principal: Principal::Workload(id), user: None, chain: Arc::new([]), address: None };
        let (policy, records) = (policy(POLICY), Arc::new(MemoryRecorder::default()));
        let random = identity::random::system();
        let occasion = Occasion {
            receipt: Receipt::generate(&*random).unwrap(),
            now: SystemClock::shared().now(),
            layer: policy::Layer::Sidecar,
            method: "CONNECT",
            target: "",
            transaction: None,
            trace_id: None,
        };
        let Verdict::Permit(connected) = policy.decide_kafka_connection(&caller, &occasion) else {
            panic!("{service} may not connect")
        };
        let guard = Guard {
            caller,
            policy: Arc::new(ArcSwap::from(policy)),
            recorder: Arc::clone(&records) as Arc<dyn policy::Recorder>,
            sampler: Arc::default(),
            stats: KafkaStats::default(),
            clock: SystemClock::shared(),
            random,
            access_log: true,
        };
        Self { guard, records, connected }
    }

    /// A frame with its length.
    fn judge(&self, frame: &Bytes) -> Result<(Head, Step), Stop> {
        let inner = frame.slice(LENGTH_BYTES..);
        let (key, version, _) = Head::peek(&inner)?;
        let api = Api::of(key).ok_or(Malformed::Api(key))?;
        if !api.takes(version) {
            return Err(Malformed::Version { api: api.key, version }.into());
        }
        let (head, message) = Head::decode(api.key, version, &inner)?;
        let judging = self.guard.judging(api.name);
        let asked =
            Asked { judging: &judging, head: &head, frame, message: &message, connected: &self.connected };
        step::judged(&asked).map(|step| (head, step))
    }

    /// What the client gets when the broker answers so.
    fn answered(&self, head: &Head, answer: Answer, frame: &Bytes) -> Bytes {
        let inner = frame.slice(LENGTH_BYTES..);
        match answer {
            Answer::Nothing => Bytes::new(),
            Answer::AsItIs | Answer::Records { splice: None, .. } => frame.clone(),
            Answer::Changed(change) => {
                change(&self.guard.judging("test"), &inner).unwrap_or_else(|stop| panic!("{head:?}: {stop}"))
            }
            Answer::Spliced(splice) | Answer::Records { splice: Some(splice), .. } => {
                spliced(&splice, &inner)
            }
        }
    }
}

fn spliced(splice: &Splice, inner: &Bytes) -> Bytes {
    let start = inner.slice(..inner.len().min(SPLICED_HEAD_BYTES));
    let (head, read) = splice.head(inner.len(), &start).unwrap();
    [&head[..], &inner[read..]].concat().into()
}

fn text(text: &str) -> StrBytes {
    StrBytes::from_string(text.to_owned())
}

fn name(name: &str) -> TopicName {
    TopicName(text(name))
}

/// A request in this version, about things of these names.
type Make = dyn Fn(i16, &[&str]) -> Bytes;

/// A kind of request.
struct Sample {
    key: ApiKey,
    frame: Box<Make>,
    /// An answer of the broker's that has nothing in it.
    empty: fn(&Head, i16) -> Bytes,
    /// Whether it is an answer that the client reads.
    reads: fn(&Head, &Bytes) -> Result<String, String>,
}

fn sample<R: Request + 'static>(make: impl Fn(i16, &[&str]) -> R + 'static) -> Sample
where
    R::Response: Default + std::fmt::Debug,
{
    let key = ApiKey::try_from(R::KEY).unwrap();
    Sample {
        key,
        frame: Box::new(move |version, names| {
            let request = make(version, names);
            Head::of(key, version, 7)
                .frame(version, &request)
                .unwrap_or_else(|e| panic!("{key:?} {version}: {e}"))
        }),
        empty: |head, version| head.answer_in::<R>(version, &R::Response::default()).unwrap(),
        reads: |head, frame| {
            let read = head.answered::<R>(head.version, &frame.slice(LENGTH_BYTES..));
            read.map(|answer| format!("{answer:?}")).map_err(|error| error.to_string())
        },
    }
}

macro_rules! list {
    ($names:expr, $type:path, $set:expr) => {
        $names
            .iter()
            .map(|name| {
                let mut item = <$type>::default();
                let set: fn(&mut $type, &str) = $set;
                set(&mut item, name);
                item
            })
            .collect()
    };
}

#[expect(clippy::too_many_lines, reason = "one of each")]
fn samples() -> Vec<Sample> {
    let groups = |names: &[&str]| names.iter().map(|name| GroupId(text(name))).collect::<Vec<_>>();
    let group = |names: &[&str]| GroupId(text(names[0]));
    let transaction = |names: &[&str]| TransactionalId(text(names[0]));
    vec![
        sample(|_, names| {
            ProduceRequest::default().with_acks(-1).with_timeout_ms(1000).with_topic_data(list!(
                names,
                produce_request::TopicProduceData,
                |item, named| {
                    item.name = name(named);
                    let records = Some(Bytes::from_static(b"records"));
                    let of = |index| {
                        produce_request::PartitionProduceData::default()
                            .with_index(index)
                            .with_records(records.clone())
                    };
                    item.partition_data = vec![of(0), of(3)];
                }
            ))
        }),
        sample(|_, names| {
            FetchRequest::default()
                .with_replica_id(BrokerId(-1))
                .with_session_epoch(-1)
                .with_max_wait_ms(500)
                .with_topics(list!(names, fetch_request::FetchTopic, |item, named| {
                    item.topic = name(named);
                    item.partitions = vec![fetch_request::FetchPartition::default().with_partition(3)];
                }))
        }),
        sample(|_, names| {
            ListOffsetsRequest::default().with_replica_id(BrokerId(-1)).with_topics(list!(
                names,
                list_offsets_request::ListOffsetsTopic,
                |item, named| {
                    item.name = name(named);
                    item.partitions = vec![list_offsets_request::ListOffsetsPartition::default()];
                }
            ))
        }),
        sample(|version, names| {
            MetadataRequest::default().with_allow_auto_topic_creation(version < 4).with_topics(Some(list!(
                names,
                metadata_request::MetadataRequestTopic,
                |item, named| item.name = Some(name(named))
            )))
        }),
        sample(move |_, names| {
            let mut request = OffsetCommitRequest::default().with_group_id(GroupId(text("allowed-1")));
            request.retention_time_ms = -1;
            request.with_topics(list!(
                names,
                offset_commit_request::OffsetCommitRequestTopic,
                |item, named| {
                    item.name = name(named);
                    item.partitions = vec![offset_commit_request::OffsetCommitRequestPartition::default()];
                }
            ))
        }),
        sample(|version, names| {
            let id = GroupId(text("allowed-1"));
            if version >= 8 {
                let topics = list!(names, offset_fetch_request::OffsetFetchRequestTopics, |item, named| {
                    item.name = name(named);
                    item.partition_indexes = vec![1, 2];
                });
                let group = offset_fetch_request::OffsetFetchRequestGroup::default();
                let group = group.with_group_id(id).with_topics(Some(topics));
                return OffsetFetchRequest::default().with_groups(vec![group]);
            }
            let topics = list!(names, offset_fetch_request::OffsetFetchRequestTopic, |item, named| {
                item.name = name(named);
                item.partition_indexes = vec![1, 2];
            });
            OffsetFetchRequest::default().with_group_id(id).with_topics(Some(topics))
        }),
        sample(|version, names| {
            let request = FindCoordinatorRequest::default();
            if version >= 4 {
                request.with_coordinator_keys(names.iter().map(|name| text(name)).collect())
            } else {
                request.with_key(text(names[0]))
            }
        }),
        sample(move |_, names| JoinGroupRequest::default().with_group_id(group(names))),
        sample(move |_, names| HeartbeatRequest::default().with_group_id(group(names))),
        sample(move |_, names| LeaveGroupRequest::default().with_group_id(group(names))),
        sample(move |_, names| SyncGroupRequest::default().with_group_id(group(names))),
        sample(move |_, names| DescribeGroupsRequest::default().with_groups(groups(names))),
        sample(|_, _| ListGroupsRequest::default()),
        sample(|_, _| ApiVersionsRequest::default()),
        sample(|_, names| {
            CreateTopicsRequest::default().with_topics(list!(
                names,
                create_topics_request::CreatableTopic,
                |item, named| item.name = name(named)
            ))
        }),
        sample(|_, names| {
            DeleteTopicsRequest::default().with_topic_names(names.iter().map(|named| name(named)).collect())
        }),
        sample(|_, names| {
            DeleteRecordsRequest::default().with_topics(list!(
                names,
                delete_records_request::DeleteRecordsTopic,
                |item, named| {
                    item.name = name(named);
                    item.partitions = vec![delete_records_request::DeleteRecordsPartition::default()];
                }
            ))
        }),
        sample(move |_, names| {
            InitProducerIdRequest::default().with_transactional_id(Some(transaction(names)))
        }),
        sample(|version, names| {
            OffsetForLeaderEpochRequest::default()
                .with_replica_id(BrokerId(if version < 3 { -2 } else { -1 }))
                .with_topics(list!(
                    names,
                    offset_for_leader_epoch_request::OffsetForLeaderTopic,
                    |item, named| {
                        item.topic = name(named);
                        item.partitions =
                            vec![offset_for_leader_epoch_request::OffsetForLeaderPartition::default()];
                    }
                ))
        }),
        sample(|_, names| {
            AddPartitionsToTxnRequest::default()
                .with_v3_and_below_transactional_id(TransactionalId(text("allowed-1")))
                .with_v3_and_below_topics(list!(
                    names,
                    add_partitions_to_txn_request::AddPartitionsToTxnTopic,
                    |item, named| {
                        item.name = name(named);
                        item.partitions = vec![0, 1];
                    }
                ))
        }),
        sample(move |_, names| {
            AddOffsetsToTxnRequest::default()
                .with_transactional_id(TransactionalId(text("allowed-1")))
                .with_group_id(group(names))
        }),
        sample(move |_, names| EndTxnRequest::default().with_transactional_id(transaction(names))),
        sample(|_, names| {
            TxnOffsetCommitRequest::default()
                .with_transactional_id(TransactionalId(text("allowed-1")))
                .with_group_id(GroupId(text("allowed-1")))
                .with_topics(list!(
                    names,
                    txn_offset_commit_request::TxnOffsetCommitRequestTopic,
                    |item, named| {
                        item.name = name(named);
                        item.partitions =
                            vec![txn_offset_commit_request::TxnOffsetCommitRequestPartition::default()];
                    }
                ))
        }),
        sample(|_, names| {
            DescribeConfigsRequest::default().with_resources(list!(
                names,
                describe_configs_request::DescribeConfigsResource,
                |item, named| {
                    item.resource_type = 2;
                    item.resource_name = text(named);
                }
            ))
        }),
        sample(|_, names| {
            AlterConfigsRequest::default().with_resources(list!(
                names,
                alter_configs_request::AlterConfigsResource,
                |item, named| {
                    item.resource_type = 2;
                    item.resource_name = text(named);
                }
            ))
        }),
        sample(|_, names| {
            IncrementalAlterConfigsRequest::default().with_resources(list!(
                names,
                incremental_alter_configs_request::AlterConfigsResource,
                |item, named| {
                    item.resource_type = 2;
                    item.resource_name = text(named);
                }
            ))
        }),
        sample(|_, names| {
            CreatePartitionsRequest::default().with_topics(list!(
                names,
                create_partitions_request::CreatePartitionsTopic,
                |item, named| item.name = name(named)
            ))
        }),
        sample(move |_, names| DeleteGroupsRequest::default().with_groups_names(groups(names))),
        sample(|_, _| DescribeClusterRequest::default()),
    ]
}

fn holds(bytes: &Bytes, words: &str) -> bool {
    bytes.windows(words.len()).any(|window| window == words.as_bytes())
}

/// Each sample in each of its versions.
fn each(mut check: impl FnMut(&Sample, &'static Api, i16)) {
    let samples = samples();
    let sampled: BTreeSet<i16> = samples.iter().map(|sample| sample.key as i16).collect();
    assert_eq!(sampled, APIS.iter().map(|api| api.key as i16).collect(), "one of each");
    for sample in &samples {
        let api = Api::of(sample.key as i16).unwrap();
        for version in api.versions.min..=api.versions.max {
            check(sample, api, version);
        }
    }
}

/// Kinds of requests that name nothing, or something that is no topic and no group.
const NAMELESS: [ApiKey; 3] = [ApiKey::ListGroups, ApiKey::ApiVersions, ApiKey::DescribeCluster];

#[test]
fn what_is_allowed_is_passed_on_as_it_was() {
    let stage = Stage::of("web");
    each(|sample, api, version| {
        if api.key == ApiKey::DescribeCluster {
            return;
        }
        let frame = (sample.frame)(version, &["allowed-1"]);
        let (head, step) =
            stage.judge(&frame).unwrap_or_else(|stop| panic!("{} {version}: {stop}", api.name));
        let Step::Forward { frame: passed, answer, .. } = step else {
            panic!("{} {version} is not passed on", api.name)
        };
        if api.key != ApiKey::Metadata || version >= 4 {
            assert_eq!(passed, frame, "{} {version}", api.name);
        }
        let (_, asked, _) = Head::peek(&passed[LENGTH_BYTES..]).unwrap();
        let empty = (sample.empty)(&head, asked);
        let told = stage.answered(&head, answer, &empty);
        (sample.reads)(&head, &told).unwrap_or_else(|why| panic!("{} {version}: {why}", api.name));
    });
    assert!(stage.records.records().iter().all(|record| record.verdict == policy::Outcome::Permit));
}

#[test]
fn what_is_denied_is_not_passed_on_and_answered_so_that_its_client_reads_it() {
    let stage = Stage::of("web");
    each(|sample, api, version| {
        if NAMELESS.contains(&api.key) {
            return;
        }
        for names in [&["denied-1"][..], &["allowed-1", "denied-1", "allowed-2"], &["denied-1", "allowed-1"]]
        {
            let frame = (sample.frame)(version, names);
            let before = stage.records.records().len();
            let (head, step) =
                stage.judge(&frame).unwrap_or_else(|stop| panic!("{} {version}: {stop}", api.name));
            let about = format!("{} {version} {names:?}", api.name);
            let denied = holds(&frame, "denied-1");
            let told = match step {
                Step::Answered(told) => told,
                Step::Forward { frame: passed, answer, .. } => {
                    assert!(!holds(&passed, "denied-1"), "{about}: passed on");
                    let (_, asked, _) = Head::peek(&passed[LENGTH_BYTES..]).unwrap();
                    stage.answered(&head, answer, &(sample.empty)(&head, asked))
                }
                Step::Close => panic!("{about}: closed"),
            };
            let answer = (sample.reads)(&head, &told).unwrap_or_else(|why| panic!("{about}: {why}"));
            let codes = ["error_code: 29", "error_code: 30", "error_code: 53"];
            let told_so = codes.iter().any(|code| answer.contains(code));
            assert_eq!(told_so, denied, "{about}: {answer}");
            let records = stage.records.records();
            let recorded = records[before..].iter().any(|record| record.verdict == policy::Outcome::Deny);
            assert_eq!(recorded, denied, "{about}: recorded");
        }
    });
}

#[test]
fn the_cluster_is_for_whom_it_is() {
    let frame = |version| {
        Head::of(ApiKey::DescribeCluster, version, 1).frame(version, &DescribeClusterRequest::default())
    };
    for version in 0..=1 {
        let frame = frame(version).unwrap();
        assert!(matches!(Stage::of("ops").judge(&frame), Ok((_, Step::Forward { .. }))));
        let Ok((head, Step::Answered(told))) = Stage::of("web").judge(&frame) else { panic!("passed on") };
        let told = head.answered::<DescribeClusterRequest>(version, &told.slice(LENGTH_BYTES..)).unwrap();
        assert_eq!(told.error_code, 31);
    }
    // A broker's configuration is the cluster's; so is a producer id without transactions.
    let broker = describe_configs_request::DescribeConfigsResource::default()
        .with_resource_type(4)
        .with_resource_name(text("1"));
    let request = DescribeConfigsRequest::default().with_resources(vec![broker]);
    let frame = Head::of(ApiKey::DescribeConfigs, 4, 1).frame(4, &request).unwrap();
    let Ok((head, Step::Answered(told))) = Stage::of("web").judge(&frame) else { panic!("passed on") };
    let told = head.answered::<DescribeConfigsRequest>(4, &told.slice(LENGTH_BYTES..)).unwrap();
    assert_eq!(told.results[0].error_code, 31);
    assert!(matches!(Stage::of("ops").judge(&frame), Ok((_, Step::Forward { .. }))));
    let frame = Head::of(ApiKey::InitProducerId, 4, 1)
        .frame(4, &InitProducerIdRequest::default().with_transactional_id(None))
        .unwrap();
    let Ok((head, Step::Answered(told))) = Stage::of("web").judge(&frame) else { panic!("passed on") };
    let told = head.answered::<InitProducerIdRequest>(4, &told.slice(LENGTH_BYTES..)).unwrap();
    assert_eq!((told.error_code, told.producer_id.0), (31, -1));
}

#[test]
fn of_all_topics_and_groups_only_those_are_shown_that_may_be_described() {
    let stage = Stage::of("web");
    let topic =
        |named: &str| metadata_response::MetadataResponseTopic::default().with_name(Some(name(named)));
    for version in 0..=9 {
        let topics = if version == 0 { Some(Vec::new()) } else { None };
        let request = MetadataRequest::default().with_topics(topics).with_allow_auto_topic_creation(true);
        let frame = Head::of(ApiKey::Metadata, version, 7).frame(version, &request).unwrap();
        let Ok((head, Step::Forward { frame, answer, .. })) = stage.judge(&frame) else {
            panic!("{version}")
        };
        let (_, asked, _) = Head::peek(&frame[LENGTH_BYTES..]).unwrap();
        let (_, message) = Head::decode(ApiKey::Metadata, asked, &frame.slice(LENGTH_BYTES..)).unwrap();
        let passed: MetadataRequest = whole("request", &message, asked).unwrap();
        assert_eq!((passed.topics, passed.allow_auto_topic_creation), (None, false));
        let all = ["allowed-1", "secret", "__consumer_offsets", "allowed-2"].map(topic).to_vec();
        let broker = MetadataResponse::default().with_topics(all).with_controller_id(BrokerId(1));
        let broker = head.answer_in::<MetadataRequest>(asked, &broker).unwrap();
        let told = stage.answered(&head, answer, &broker);
        let told = head.answered::<MetadataRequest>(version, &told.slice(LENGTH_BYTES..)).unwrap();
        let names: Vec<String> =
            told.topics.iter().map(|topic| topic.name.as_ref().unwrap().0.to_string()).collect();
        assert_eq!(names, ["allowed-1", "allowed-2"], "{version}");
    }
    let listed = |id: &str| list_groups_response::ListedGroup::default().with_group_id(GroupId(text(id)));
    for version in 0..=4 {
        let frame =
            Head::of(ApiKey::ListGroups, version, 7).frame(version, &ListGroupsRequest::default()).unwrap();
        let Ok((head, Step::Forward { answer, .. })) = stage.judge(&frame) else { panic!("{version}") };
        let broker = ListGroupsResponse::default().with_groups(["allowed-1", "secret"].map(listed).to_vec());
        let told = stage.answered(&head, answer, &head.answer::<ListGroupsRequest>(&broker).unwrap());
        let told = head.answered::<ListGroupsRequest>(version, &told.slice(LENGTH_BYTES..)).unwrap();
        assert_eq!(told.groups.len(), 1);
    }
    // Nobody has asked for the others by their names.
    assert!(stage.records.records().is_empty());
}

#[test]
fn versions_are_capped_to_what_is_understood() {
    let stage = Stage::of("web");
    let told_of = |key: ApiKey, min, max| {
        api_versions_response::ApiVersion::default()
            .with_api_key(key as i16)
            .with_min_version(min)
            .with_max_version(max)
    };
    for version in 0..=3 {
        let frame =
            Head::of(ApiKey::ApiVersions, version, 7).frame(version, &ApiVersionsRequest::default()).unwrap();
        let Ok((head, Step::Forward { answer, .. })) = stage.judge(&frame) else { panic!("{version}") };
        let broker = ApiVersionsResponse::default().with_api_keys(vec![
            told_of(ApiKey::Produce, 0, 13),
            told_of(ApiKey::Fetch, 6, 18),
            told_of(ApiKey::CreateAcls, 0, 3),
            told_of(ApiKey::Metadata, 10, 13),
        ]);
        let told = stage.answered(&head, answer, &head.answer::<ApiVersionsRequest>(&broker).unwrap());
        let told = head.answered::<ApiVersionsRequest>(version, &told.slice(LENGTH_BYTES..)).unwrap();
        let seen: Vec<_> =
            told.api_keys.iter().map(|api| (api.api_key, api.min_version, api.max_version)).collect();
        assert_eq!(seen, [(0, 3, 9), (1, 6, 12)]);
    }
    // One that spells out its defaults, as some do: four tagged fields, each with what it would be without.
    let frame = Head::of(ApiKey::ApiVersions, 3, 7).frame(3, &ApiVersionsRequest::default()).unwrap();
    let Ok((head, Step::Forward { answer, .. })) = stage.judge(&frame) else { panic!("not passed on") };
    let told = [0, 0, 2, 0, 0, 0, 3, 0, 13, 0, 0, 0, 0, 0, 2, 0, 1, 1, 3, 1, 0];
    let told: Bytes = [&[0, 0, 0, 25, 0, 0, 0, 7][..], &told].concat().into();
    let told = stage.answered(&head, answer, &told);
    let told = head.answered::<ApiVersionsRequest>(3, &told.slice(LENGTH_BYTES..)).unwrap();
    assert_eq!((told.api_keys.len(), told.api_keys[0].max_version), (1, 9));
    // An old broker answers a new question in its own form.
    let frame = Head::of(ApiKey::ApiVersions, 3, 7).frame(3, &ApiVersionsRequest::default()).unwrap();
    let Ok((head, Step::Forward { answer, .. })) = stage.judge(&frame) else { panic!("not passed on") };
    let broker = ApiVersionsResponse::default().with_error_code(35);
    let told = stage.answered(&head, answer, &head.answer_in::<ApiVersionsRequest>(0, &broker).unwrap());
    let told = head.answered::<ApiVersionsRequest>(0, &told.slice(LENGTH_BYTES..)).unwrap();
    assert_eq!(told.error_code, 35);
}

#[test]
fn what_a_client_may_do_is_what_policies_say() {
    let stage = Stage::of("web");
    for version in 8..=9 {
        let topics =
            list!(["allowed-1", "denied-1"], metadata_request::MetadataRequestTopic, |item, named| {
                item.name = Some(name(named));
            });
        let request = MetadataRequest::default()
            .with_topics(Some(topics))
            .with_include_cluster_authorized_operations(true)
            .with_include_topic_authorized_operations(true);
        let frame = Head::of(ApiKey::Metadata, version, 7).frame(version, &request).unwrap();
        let Ok((head, Step::Forward { answer, .. })) = stage.judge(&frame) else { panic!("{version}") };
        let found = metadata_response::MetadataResponseTopic::default().with_name(Some(name("allowed-1")));
        let broker = MetadataResponse::default().with_topics(vec![found]);
        let told = stage.answered(&head, answer, &head.answer::<MetadataRequest>(&broker).unwrap());
        let told = head.answered::<MetadataRequest>(version, &told.slice(LENGTH_BYTES..)).unwrap();
        let all = [3, 4, 5, 6, 7, 8, 10, 11].iter().map(|bit| 1 << bit).sum::<i32>();
        assert_eq!(
            (told.cluster_authorized_operations, told.topics[0].topic_authorized_operations),
            (0, all)
        );
        assert_eq!((told.topics[1].error_code, told.topics[1].topic_authorized_operations), (29, i32::MIN));
    }
    let groups = vec![GroupId(text("allowed-1")), GroupId(text("denied-1"))];
    let request =
        DescribeGroupsRequest::default().with_groups(groups).with_include_authorized_operations(true);
    let frame = Head::of(ApiKey::DescribeGroups, 5, 7).frame(5, &request).unwrap();
    let Ok((head, Step::Forward { answer, .. })) = stage.judge(&frame) else { panic!("not passed on") };
    let found = describe_groups_response::DescribedGroup::default().with_group_id(GroupId(text("allowed-1")));
    let broker = DescribeGroupsResponse::default().with_groups(vec![found]);
    let told = stage.answered(&head, answer, &head.answer::<DescribeGroupsRequest>(&broker).unwrap());
    let told = head.answered::<DescribeGroupsRequest>(5, &told.slice(LENGTH_BYTES..)).unwrap();
    assert_eq!(told.groups[0].authorized_operations, 1 << 3 | 1 << 6 | 1 << 8);
    assert_eq!((told.groups[1].error_code, told.groups[1].authorized_operations), (30, i32::MIN));
}

/// Acceptance list policy, line 34: auto-creation by Metadata.
#[test]
fn policy_34_a_topic_is_made_by_metadata_only_for_whom_may_create_it() {
    let rules = r#"
@id("web-reads")
permit (principal == Mesh::Workload::"spiffe://bank.example/service/web", action in Kafka::Action::"Read", resource is Kafka::Topic);
@id("web-makes")
permit (principal == Mesh::Workload::"spiffe://bank.example/service/web", action == Kafka::Action::"Create", resource == Kafka::Topic::"own");
"#;
    let stage = Stage::of("web");
    stage.guard.policy.store(policy(rules));
    for version in 0..=9 {
        for (names, kept, error) in
            [(&["own"][..], true, 3), (&["other"], false, 29), (&["own", "other"], false, 29)]
        {
            let topics = list!(names, metadata_request::MetadataRequestTopic, |item, named| {
                item.name = Some(name(named));
            });
            let request =
                MetadataRequest::default().with_topics(Some(topics)).with_allow_auto_topic_creation(true);
            let frame = Head::of(ApiKey::Metadata, version, 7).frame(version, &request).unwrap();
            let before = stage.records.records().len();
            let Ok((head, Step::Forward { frame, answer, .. })) = stage.judge(&frame) else {
                panic!("{version}")
            };
            let (_, asked, _) = Head::peek(&frame[LENGTH_BYTES..]).unwrap();
            assert!(asked >= 4, "an older one makes topics without saying so");
            let (_, message) = Head::decode(ApiKey::Metadata, asked, &frame.slice(LENGTH_BYTES..)).unwrap();
            let passed: MetadataRequest = whole("request", &message, asked).unwrap();
            assert_eq!(passed.allow_auto_topic_creation, kept, "{version} {names:?}");
            let missing = |named: &&str| {
                metadata_response::MetadataResponseTopic::default()
                    .with_name(Some(name(named)))
                    .with_error_code(3)
            };
            let broker = MetadataResponse::default().with_topics(names.iter().map(missing).collect());
            let broker = head.answer_in::<MetadataRequest>(asked, &broker).unwrap();
            let told = stage.answered(&head, answer, &broker);
            let told = head.answered::<MetadataRequest>(version, &told.slice(LENGTH_BYTES..)).unwrap();
            assert_eq!(told.topics.last().unwrap().error_code, error, "{version} {names:?}");
            let denied = |record: &policy::DecisionRecord| {
                record.verdict == policy::Outcome::Deny && record.action.as_deref() == Some("Create")
            };
            assert_eq!(stage.records.records()[before..].iter().any(denied), error == 29);
        }
    }
}

/// Acceptance list policy, line 34: a topic by an unknown id.
#[test]
fn policy_34_versions_that_name_topics_by_ids_are_not_understood() {
    let stage = Stage::of("web");
    for (key, version) in
        [(ApiKey::Fetch, 13_i16), (ApiKey::Produce, 13), (ApiKey::Metadata, 12), (ApiKey::DeleteTopics, 6)]
    {
        let frame: Bytes =
            [&14_i32.to_be_bytes()[..], &(key as i16).to_be_bytes(), &version.to_be_bytes(), &[0; 10]]
                .concat()
                .into();
        assert!(matches!(stage.judge(&frame), Err(Stop::Malformed(Malformed::Version { .. }))), "{key:?}");
    }
    for key in [ApiKey::CreateAcls, ApiKey::AlterPartition, ApiKey::Envelope, ApiKey::Vote] {
        assert!(Api::of(key as i16).is_none());
    }
}

/// Acceptance list policy, line 34: `acks=0`.
#[test]
fn policy_34_acks_0_that_is_denied_anywhere_writes_nothing_and_ends_the_connection() {
    let stage = Stage::of("web");
    let produce = samples().swap_remove(0);
    for version in 3..=9 {
        for names in [&["denied-1"][..], &["allowed-1", "denied-1"], &["__consumer_offsets"]] {
            let frame = (produce.frame)(version, names);
            let (_, message) = Head::decode(ApiKey::Produce, version, &frame.slice(LENGTH_BYTES..)).unwrap();
            let request: ProduceRequest = whole("request", &message, version).unwrap();
            let frame = Head::of(ApiKey::Produce, version, 7).frame(version, &request.with_acks(0)).unwrap();
            assert!(matches!(stage.judge(&frame), Ok((_, Step::Close))), "{version} {names:?}");
        }
    }
}

#[test]
fn a_fetch_is_none_of_a_session_and_none_of_a_follower() {
    let stage = Stage::of("web");
    let fetch = |change: fn(&mut FetchRequest)| {
        let mut request = FetchRequest::default().with_replica_id(BrokerId(-1));
        request.topics = list!(["allowed-1"], fetch_request::FetchTopic, |item, named| {
            item.topic = name(named);
            item.partitions = vec![fetch_request::FetchPartition::default()];
        });
        change(&mut request);
        Head::of(ApiKey::Fetch, 11, 7).frame(11, &request).unwrap()
    };
    let Ok((_, Step::Forward { frame, .. })) = stage.judge(&fetch(|request| request.session_epoch = 0))
    else {
        panic!("not passed on")
    };
    let (_, message) = Head::decode(ApiKey::Fetch, 11, &frame.slice(LENGTH_BYTES..)).unwrap();
    let passed: FetchRequest = whole("request", &message, 11).unwrap();
    assert_eq!((passed.session_id, passed.session_epoch), (0, -1));
    for (frame, words) in [
        (fetch(|request| request.session_id = 5), "error_code: 70"),
        (fetch(|request| request.replica_id = BrokerId(2)), "error_code: 29"),
    ] {
        let Ok((head, Step::Answered(told))) = stage.judge(&frame) else { panic!("passed on: {words}") };
        let told = head.answered::<FetchRequest>(11, &told.slice(LENGTH_BYTES..)).unwrap();
        assert!(format!("{told:?}").contains(words), "{told:?}");
    }
}

#[test]
fn lengths_that_lead_beyond_the_end_make_no_room() {
    // Two billion topics in a frame of thirty bytes: room for them would be two hundred gigabytes.
    for (key, version, message) in [
        (ApiKey::Metadata, 1, &[0x7f, 0xff, 0xff, 0xff, 0, 0][..]),
        (ApiKey::Metadata, 9, &[0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0]),
        (ApiKey::Produce, 3, &[0xff, 0xff, 0, 1, 0, 0, 0, 1, 0x7f, 0xff, 0xff, 0xff]),
        (ApiKey::DescribeGroups, 0, &[0x7f, 0xff, 0xff, 0xff]),
        (ApiKey::OffsetCommit, 8, &[2, b'g', 0, 0, 0, 0, 1, 0, 0xff, 0xff, 0xff, 0xff, 0x0f]),
    ] {
        let mut inner = BytesMut::new();
        inner.put_i16(key as i16);
        inner.put_i16(version);
        inner.put_i32(7);
        inner.put_i16(-1);
        if version >= 8 {
            inner.put_u8(0);
        }
        inner.put_slice(message);
        let mut frame = BytesMut::new();
        frame.put_i32(inner.len() as i32);
        frame.put_slice(&inner);
        let judged = Stage::of("web").judge(&frame.freeze());
        assert!(matches!(judged, Err(Stop::Malformed(_))), "{key:?}");
    }
}

#[test]
fn what_stands_behind_a_message_or_twice_in_it_is_refused() {
    let stage = Stage::of("web");
    each(|sample, api, version| {
        let frame = (sample.frame)(version, &["allowed-1"]);
        let mut longer = BytesMut::from(&frame[..]);
        longer.put_u8(0);
        let judged = stage.judge(&longer.freeze());
        assert!(matches!(judged, Err(Stop::Malformed(_))), "{} {version}", api.name);
        for end in LENGTH_BYTES + 8..frame.len() {
            let judged = stage.judge(&frame.slice(..end));
            assert!(matches!(judged, Err(Stop::Malformed(_))), "{} {version} cut at {end}", api.name);
        }
    });
    // The same tag twice: of one reader the first counts, of another the last.
    let mut tagged = BytesMut::from(
        &Head::of(ApiKey::Heartbeat, 4, 7)
            .frame(4, &HeartbeatRequest::default().with_group_id(GroupId(text("allowed-1"))))
            .unwrap()[..],
    );
    tagged.truncate(tagged.len() - 1);
    tagged.put_slice(&[2, 1, 1, b'a', 1, 1, b'b']);
    assert!(matches!(stage.judge(&tagged.freeze()), Err(Stop::Malformed(Malformed::Form(_)))));
}

/// A partition and what is to be written to it.
type Written = (i32, Option<Vec<u8>>);

fn topic_data() -> impl Strategy<Value = Vec<(String, Vec<Written>)>> {
    let records = prop::option::of(prop::collection::vec(any::<u8>(), 0..40));
    let partitions = prop::collection::vec((any::<i32>(), records), 0..4);
    prop::collection::vec(("[a-z_.]{1,12}", partitions), 0..5)
}

proptest! {
    #[test]
    fn a_request_to_write_is_read_as_the_library_reads_it(
        topics in topic_data(), version in 3_i16..=9, acks in -1_i16..=1, transaction in prop::option::of("[a-z]{1,8}"),
    ) {
        let data = topics.iter().map(|(named, partitions)| {
            let partitions = partitions.iter().map(|(index, records)| {
                produce_request::PartitionProduceData::default()
                    .with_index(*index)
                    .with_records(records.clone().map(Bytes::from))
            });
            produce_request::TopicProduceData::default().with_name(name(named)).with_partition_data(partitions.collect())
        });
        let request = ProduceRequest::default()
            .with_transactional_id(transaction.as_deref().map(|id| TransactionalId(text(id))))
            .with_acks(acks)
            .with_topic_data(data.collect());
        let mut message = BytesMut::new();
        request.encode(&mut message, version).unwrap();
        let read = Produced::read(&message, version).unwrap();
        prop_assert_eq!((read.acks, read.transaction), (acks, transaction.as_deref()));
        let found: Vec<(&str, &[i32])> = read.topics.iter().map(|topic| (topic.name, &topic.partitions[..])).collect();
        let wanted: Vec<(&str, Vec<i32>)> =
            topics.iter().map(|(name, of)| (name.as_str(), of.iter().map(|(index, _)| *index).collect())).collect();
        prop_assert_eq!(found, wanted.iter().map(|(name, of)| (*name, &of[..])).collect::<Vec<_>>());
        for end in 0..message.len() {
            prop_assert!(Produced::read(&message[..end], version).is_err());
        }
    }

    #[test]
    fn no_bytes_panic_and_what_is_passed_on_names_what_is_allowed(
        key in 0_i16..70, version in 0_i16..14, rest in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let inner = [&key.to_be_bytes()[..], &version.to_be_bytes(), &7_i32.to_be_bytes(), &(-1_i16).to_be_bytes(), &rest].concat();
        let frame: Bytes = [&(inner.len() as i32).to_be_bytes()[..], &inner].concat().into();
        if let Ok((_, Step::Forward { frame, .. })) = Stage::of("web").judge(&frame) {
            prop_assert!(frame.len() <= inner.len() + 64);
        }
    }

    #[test]
    fn denied_topics_are_put_before_those_that_the_broker_answers(
        version in 4_i16..=12, answered in prop::collection::vec("[a-z]{1,12}", 0..200), denied in prop::collection::vec("[a-z]{1,12}", 1..200),
    ) {
        let topic = |named: &String| {
            let partition = fetch_response::PartitionData::default().with_records(Some(Bytes::from_static(b"records")));
            fetch_response::FetchableTopicResponse::default().with_topic(name(named)).with_partitions(vec![partition])
        };
        let head = Head::of(ApiKey::Fetch, version, 7);
        let broker = FetchResponse::default().with_throttle_time_ms(5).with_responses(answered.iter().map(topic).collect());
        let frame = head.answer::<FetchRequest>(&broker).unwrap();
        let mut entries = BytesMut::new();
        for entry in denied.iter().map(topic) {
            entry.encode(&mut entries, version).unwrap();
        }
        let before_bytes = if version >= 7 { 10 } else { 4 };
        let splice = Splice { flexible: version >= 12, before_bytes, count: denied.len(), entries: entries.freeze() };
        let told = spliced(&splice, &frame.slice(LENGTH_BYTES..));
        prop_assert_eq!(i32::from_be_bytes(told[..LENGTH_BYTES].try_into().unwrap()) as usize, told.len() - LENGTH_BYTES);
        let told = head.answered::<FetchRequest>(version, &told.slice(LENGTH_BYTES..)).unwrap();
        let names: Vec<String> = told.responses.iter().map(|topic| topic.topic.0.to_string()).collect();
        prop_assert_eq!(names, [denied, answered].concat());
        prop_assert_eq!(told.throttle_time_ms, 5);
    }
}
