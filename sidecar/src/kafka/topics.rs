//! Requests about topics, their configuration, and the cluster.

use kafka_protocol::ResponseError;
use kafka_protocol::messages::alter_configs_response::AlterConfigsResourceResponse as Altered;
use kafka_protocol::messages::create_partitions_response::CreatePartitionsTopicResult;
use kafka_protocol::messages::create_topics_response::CreatableTopicResult;
use kafka_protocol::messages::delete_records_response::{
    DeleteRecordsPartitionResult, DeleteRecordsTopicResult,
};
use kafka_protocol::messages::delete_topics_response::DeletableTopicResult;
use kafka_protocol::messages::describe_configs_response::DescribeConfigsResult;
use kafka_protocol::messages::incremental_alter_configs_response::AlterConfigsResourceResponse;
use kafka_protocol::messages::list_offsets_response::{
    ListOffsetsPartitionResponse, ListOffsetsTopicResponse,
};
use kafka_protocol::messages::metadata_response::MetadataResponseTopic;
use kafka_protocol::messages::offset_for_leader_epoch_response::{
    EpochEndOffset, OffsetForLeaderTopicResult,
};
use kafka_protocol::messages::{
    AlterConfigsRequest, BrokerId, CreatePartitionsRequest, CreateTopicsRequest, DeleteRecordsRequest,
    DeleteTopicsRequest, DescribeClusterRequest, DescribeClusterResponse, DescribeConfigsRequest,
    IncrementalAlterConfigsRequest, ListOffsetsRequest, MetadataRequest, MetadataResponse,
    OffsetForLeaderEpochRequest, TopicName,
};
use policy::{KafkaAction, KafkaObject};

use super::judge::{Judging, Refused};
use super::step::{Answer, Asked, Each, Step, Stop, parted};
use super::wire::Malformed;

/// Since here a request says whether topics may be made that are not there. Older ones are asked in this version.
const AUTO_CREATION_IS_SAID: i16 = 4;
/// Kafka's numbers for what a configuration is of.
const RESOURCE_TOPIC: i8 = 2;
/// A request of a consumer. Other brokers name themselves.
pub(super) const CONSUMER: BrokerId = BrokerId(-1);

pub(super) fn topic(name: &TopicName) -> KafkaObject<'_> {
    KafkaObject::Topic(name.0.as_str())
}

/// Which topics there are, and where. Those that are named are answered one by one; of all, only those are shown that
/// may be described. A topic is made only where all that are named may be created.
pub(super) fn metadata(asked: &Asked<'_>) -> Result<Step, Stop> {
    let head = asked.head;
    let mut request: MetadataRequest = asked.request()?;
    let version = head.version.max(AUTO_CREATION_IS_SAID);
    if head.version < AUTO_CREATION_IS_SAID {
        // It goes without saying there.
        request.allow_auto_topic_creation = true;
    }
    if head.version == 0 && request.topics.as_ref().is_some_and(Vec::is_empty) {
        request.topics = None;
    }
    let operations = Operations {
        cluster: std::mem::take(&mut request.include_cluster_authorized_operations),
        topics: std::mem::take(&mut request.include_topic_authorized_operations),
    };
    let Some(named) = request.topics.take() else {
        request.allow_auto_topic_creation = false;
        let frame = head.frame(version, &request)?;
        let answer = described(asked, version, move |judging, answer| {
            let mut shown = Vec::with_capacity(answer.topics.len());
            for topic in std::mem::take(&mut answer.topics) {
                let name = topic.name.as_ref().map_or("", |name| name.0.as_str());
                if judging.shows(KafkaObject::Topic(name))? {
                    shown.push(topic);
                }
            }
            answer.topics = shown;
            operations.tell(judging, answer)
        });
        return Ok(Step::Forward { by: asked.connected.clone(), frame, answer });
    };
    let names = named.into_iter().map(|topic| topic.name);
    let names: Option<Vec<TopicName>> = names.collect();
    let names = names.ok_or_else(|| Malformed::message("request", "a topic without a name"))?;
    let objects: Vec<KafkaObject<'_>> = names.iter().map(topic).collect();
    let leaves = asked.judging.each(KafkaAction::Describe, &objects)?;
    let (allowed, by, denied) = parted(names, leaves, |name, refused| {
        let mut denied = MetadataResponseTopic::default();
        denied.name = Some(name);
        denied.error_code = refused.of_topic();
        denied
    });
    let mut uncreatable = Vec::new();
    if request.allow_auto_topic_creation {
        for name in &allowed {
            if !asked.judging.allows(KafkaAction::Create, topic(name))? {
                uncreatable.push(name.clone());
            }
        }
    }
    request.allow_auto_topic_creation &= uncreatable.is_empty();
    let topics = allowed.into_iter().map(|name| {
        let mut topic = kafka_protocol::messages::metadata_request::MetadataRequestTopic::default();
        topic.name = Some(name);
        topic
    });
    request.topics = Some(topics.collect());
    let frame = head.frame(version, &request)?;
    let asked_more = operations.cluster || operations.topics;
    let plain = denied.is_empty() && uncreatable.is_empty() && version == head.version && !asked_more;
    let answer = if plain {
        Answer::AsItIs
    } else {
        described(asked, version, move |judging, answer| {
            // Of those that may not be created it matters only if they are not there.
            let missing = |topic: &&mut MetadataResponseTopic| {
                topic.error_code == ResponseError::UnknownTopicOrPartition.code()
                    && topic.name.as_ref().is_some_and(|name| uncreatable.contains(name))
            };
            for missing in answer.topics.iter_mut().filter(missing) {
                let name = missing.name.clone().unwrap_or_default();
                if let Err(refused) = judging.one(KafkaAction::Create, topic(&name))? {
                    missing.error_code = refused.of_topic();
                }
            }
            operations.tell(judging, answer)?;
            answer.topics.extend(denied);
            Ok(())
        })
    };
    Ok(Step::Forward { by: by.unwrap_or_else(|| asked.connected.clone()), frame, answer })
}

/// Whether a client asks what it may do. The broker would say that it may do all.
#[derive(Debug, Clone, Copy)]
struct Operations {
    cluster: bool,
    topics: bool,
}

impl Operations {
    fn tell(self, judging: &Judging<'_>, answer: &mut MetadataResponse) -> Result<(), Stop> {
        if self.cluster {
            answer.cluster_authorized_operations = judging.operations(KafkaObject::Cluster)?;
        }
        for topic in answer.topics.iter_mut().filter(|topic| self.topics && topic.error_code == 0) {
            let name = topic.name.as_ref().map_or("", |name| name.0.as_str());
            topic.topic_authorized_operations = judging.operations(KafkaObject::Topic(name))?;
        }
        Ok(())
    }
}

/// An answer to Metadata, which may have been asked in a later version than the client knows.
fn described(
    asked: &Asked<'_>,
    version: i16,
    change: impl FnOnce(&Judging<'_>, &mut MetadataResponse) -> Result<(), Stop> + Send + 'static,
) -> Answer {
    let head = asked.head.clone();
    Answer::Changed(Box::new(move |judging, frame| {
        let mut answer = head.answered::<MetadataRequest>(version, frame)?;
        change(judging, &mut answer)?;
        let unknown = MetadataResponse::default();
        if head.version < 3 {
            answer.throttle_time_ms = unknown.throttle_time_ms;
        }
        if head.version < 2 {
            answer.cluster_id = unknown.cluster_id;
        }
        if head.version < 1 {
            answer.controller_id = unknown.controller_id;
            answer.brokers.iter_mut().for_each(|broker| broker.rack = None);
            answer.topics.iter_mut().for_each(|topic| topic.is_internal = false);
        }
        Ok(head.answer::<MetadataRequest>(&answer)?)
    }))
}

pub(super) fn list_offsets(asked: &Asked<'_>) -> Result<Step, Stop> {
    let each = Each {
        action: KafkaAction::Describe,
        items: |request: &mut ListOffsetsRequest| &mut request.topics,
        object: |item| topic(&item.name),
        denied: |item, refused| {
            let partitions = item.partitions.iter().map(|partition| {
                let mut denied = ListOffsetsPartitionResponse::default();
                denied.partition_index = partition.partition_index;
                denied.error_code = refused.of_topic();
                denied
            });
            ListOffsetsTopicResponse::default().with_partitions(partitions.collect()).with_name(item.name)
        },
        answers: |answer| &mut answer.topics,
    };
    let request: ListOffsetsRequest = asked.request()?;
    if request.replica_id != CONSUMER {
        refuse_follower(asked)?;
        return each.deny_all(asked, request, Refused::Denied, |_, _| {});
    }
    each.step(asked, request)
}

/// Brokers ask each other past the sidecars of their clients.
pub(super) fn refuse_follower(asked: &Asked<'_>) -> Result<(), Stop> {
    let reason = "a request in the name of a broker".to_owned();
    Ok(asked.judging.refuse("kafka.follower", reason, "cluster")?)
}

pub(super) fn offset_for_leader_epoch(asked: &Asked<'_>) -> Result<Step, Stop> {
    let each = Each {
        action: KafkaAction::Describe,
        items: |request: &mut OffsetForLeaderEpochRequest| &mut request.topics,
        object: |item| topic(&item.topic),
        denied: |item, refused| {
            let partitions = item.partitions.iter().map(|partition| {
                let mut denied = EpochEndOffset::default();
                denied.partition = partition.partition;
                denied.error_code = refused.of_topic();
                denied
            });
            OffsetForLeaderTopicResult::default().with_partitions(partitions.collect()).with_topic(item.topic)
        },
        answers: |answer| &mut answer.topics,
    };
    let request: OffsetForLeaderEpochRequest = asked.request()?;
    // Before version 3 it says nothing of who asks; -2, "debugging", is what is read there then.
    if request.replica_id.0 >= 0 {
        refuse_follower(asked)?;
        return each.deny_all(asked, request, Refused::Denied, |_, _| {});
    }
    each.step(asked, request)
}

pub(super) fn create(asked: &Asked<'_>) -> Result<Step, Stop> {
    let each = Each {
        action: KafkaAction::Create,
        items: |request: &mut CreateTopicsRequest| &mut request.topics,
        object: |item| topic(&item.name),
        denied: |item, refused| {
            let denied = CreatableTopicResult::default().with_error_message(None).with_name(item.name);
            denied.with_error_code(refused.of_topic())
        },
        answers: |answer| &mut answer.topics,
    };
    each.step(asked, asked.request()?)
}

pub(super) fn delete(asked: &Asked<'_>) -> Result<Step, Stop> {
    let each = Each {
        action: KafkaAction::Delete,
        items: |request: &mut DeleteTopicsRequest| &mut request.topic_names,
        object: topic,
        denied: |name, refused| {
            DeletableTopicResult::default().with_name(Some(name)).with_error_code(refused.of_topic())
        },
        answers: |answer| &mut answer.responses,
    };
    each.step(asked, asked.request()?)
}

pub(super) fn create_partitions(asked: &Asked<'_>) -> Result<Step, Stop> {
    let each = Each {
        action: KafkaAction::Alter,
        items: |request: &mut CreatePartitionsRequest| &mut request.topics,
        object: |item| topic(&item.name),
        denied: |item, refused| {
            CreatePartitionsTopicResult::default().with_name(item.name).with_error_code(refused.of_topic())
        },
        answers: |answer| &mut answer.results,
    };
    each.step(asked, asked.request()?)
}

pub(super) fn delete_records(asked: &Asked<'_>) -> Result<Step, Stop> {
    let each = Each {
        action: KafkaAction::Delete,
        items: |request: &mut DeleteRecordsRequest| &mut request.topics,
        object: |item| topic(&item.name),
        denied: |item, refused| {
            let partitions = item.partitions.iter().map(|partition| {
                let mut denied = DeleteRecordsPartitionResult::default();
                denied.partition_index = partition.partition_index;
                denied.low_watermark = -1;
                denied.error_code = refused.of_topic();
                denied
            });
            DeleteRecordsTopicResult::default().with_partitions(partitions.collect()).with_name(item.name)
        },
        answers: |answer| &mut answer.topics,
    };
    each.step(asked, asked.request()?)
}

/// What a configuration is of. What is neither a topic's nor a broker's is the cluster's to give, too.
fn configured(kind: i8, name: &str) -> KafkaObject<'_> {
    if kind == RESOURCE_TOPIC { KafkaObject::Topic(name) } else { KafkaObject::Cluster }
}

fn unconfigured(kind: i8, refused: Refused) -> i16 {
    if kind == RESOURCE_TOPIC { refused.of_topic() } else { ResponseError::ClusterAuthorizationFailed.code() }
}

/// What is asked of configurations has one form in three APIs, and a type of its own in each.
macro_rules! of_configurations {
    ($name:ident: $action:ident, $request:ty, $answers:ident: $answer:ty) => {
        pub(super) fn $name(asked: &Asked<'_>) -> Result<Step, Stop> {
            let each = Each {
                action: KafkaAction::$action,
                items: |request: &mut $request| &mut request.resources,
                object: |item| configured(item.resource_type, item.resource_name.as_str()),
                denied: |item, refused| {
                    let mut denied = <$answer>::default();
                    denied.error_code = unconfigured(item.resource_type, refused);
                    denied.error_message = None;
                    denied.resource_type = item.resource_type;
                    denied.resource_name = item.resource_name;
                    denied
                },
                answers: |answer| &mut answer.$answers,
            };
            each.step(asked, asked.request()?)
        }
    };
}

of_configurations!(describe_configs: DescribeConfigs, DescribeConfigsRequest, results: DescribeConfigsResult);
of_configurations!(alter_configs: AlterConfigs, AlterConfigsRequest, responses: Altered);
of_configurations!(
    incremental_alter_configs: AlterConfigs,
    IncrementalAlterConfigsRequest,
    responses: AlterConfigsResourceResponse
);

pub(super) fn describe_cluster(asked: &Asked<'_>) -> Result<Step, Stop> {
    let mut request: DescribeClusterRequest = asked.request()?;
    let operations = std::mem::take(&mut request.include_cluster_authorized_operations);
    match asked.judging.one(KafkaAction::Describe, KafkaObject::Cluster)? {
        Ok(by) if operations => {
            let told = asked.changed::<DescribeClusterRequest>(|judging, answer| {
                answer.cluster_authorized_operations = judging.operations(KafkaObject::Cluster)?;
                Ok(())
            });
            asked.pass(by, &request, told)
        }
        leave => asked.gate(&request, leave, |_| {
            let denied = ResponseError::ClusterAuthorizationFailed.code();
            DescribeClusterResponse::default().with_error_code(denied)
        }),
    }
}
