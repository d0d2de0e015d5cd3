//! Requests about consumer groups.

use std::collections::HashMap;

use kafka_protocol::ResponseError;
use kafka_protocol::messages::delete_groups_response::DeletableGroupResult;
use kafka_protocol::messages::describe_groups_response::DescribedGroup;
use kafka_protocol::messages::find_coordinator_response::Coordinator;
use kafka_protocol::messages::offset_commit_response::{
    OffsetCommitResponsePartition, OffsetCommitResponseTopic,
};
use kafka_protocol::messages::offset_fetch_request::{OffsetFetchRequestGroup, OffsetFetchRequestTopics};
use kafka_protocol::messages::offset_fetch_response::{
    OffsetFetchResponseGroup, OffsetFetchResponsePartition, OffsetFetchResponsePartitions,
    OffsetFetchResponseTopic, OffsetFetchResponseTopics,
};
use kafka_protocol::messages::{
    BrokerId, DeleteGroupsRequest, DescribeGroupsRequest, FindCoordinatorRequest, FindCoordinatorResponse,
    GroupId, HeartbeatRequest, HeartbeatResponse, JoinGroupRequest, JoinGroupResponse, LeaveGroupRequest,
    LeaveGroupResponse, ListGroupsRequest, OffsetCommitRequest, OffsetFetchRequest, OffsetFetchResponse,
    SyncGroupRequest, SyncGroupResponse,
};
use kafka_protocol::protocol::StrBytes;
use policy::{KafkaAction, KafkaObject};

use super::judge::{Judging, Leave, Refused};
use super::step::{Answer, Asked, Each, Step, Stop, parted};
use super::topics::topic;
use super::wire::{LENGTH_BYTES, Malformed};

/// Since here several coordinators are asked for at once.
const KEYS_ARE_LISTED: i16 = 4;
/// Since here offsets of several groups are asked for at once.
const GROUPS_ARE_LISTED: i16 = 8;
/// Kafka's numbers for what a coordinator is of.
const KEY_GROUP: i8 = 0;
const KEY_TRANSACTION: i8 = 1;

pub(super) fn group(id: &GroupId) -> KafkaObject<'_> {
    KafkaObject::Group(id.0.as_str())
}

fn member(asked: &Asked<'_>, id: &GroupId) -> Result<Leave, Stop> {
    Ok(asked.judging.one(KafkaAction::Join, group(id))?)
}

/// Which broker keeps a group, or the transactions of an id.
pub(super) fn find_coordinator(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: FindCoordinatorRequest = asked.request()?;
    let version = asked.head.version;
    let object: fn(&StrBytes) -> KafkaObject<'_> = match request.key_type {
        KEY_GROUP => |key| KafkaObject::Group(key.as_str()),
        KEY_TRANSACTION => |key| KafkaObject::TransactionalId(key.as_str()),
        _ => {
            let error = ResponseError::InvalidRequest.code();
            let keys = request.coordinator_keys.into_iter().map(|key| without_coordinator(key, error));
            let coordinators = keys.collect();
            return asked.answer::<FindCoordinatorRequest>(&found_none(version, error, coordinators));
        }
    };
    let is_group = request.key_type == KEY_GROUP;
    let error = move |refused: Refused| {
        if is_group { refused.of_group() } else { ResponseError::TransactionalIdAuthorizationFailed.code() }
    };
    if version < KEYS_ARE_LISTED {
        let leave = asked.judging.one(KafkaAction::Describe, object(&request.key))?;
        return asked.gate(&request, leave, |refused| found_none(version, error(refused), Vec::new()));
    }
    let mut request = request;
    let keys = std::mem::take(&mut request.coordinator_keys);
    let named: Vec<KafkaObject<'_>> = keys.iter().map(object).collect();
    let leaves = asked.judging.each(KafkaAction::Describe, &named)?;
    let (allowed, by, denied) = parted(keys, leaves, |key, refused| without_coordinator(key, error(refused)));
    if allowed.is_empty() && !denied.is_empty() {
        return asked.answer::<FindCoordinatorRequest>(&found_none(version, 0, denied));
    }
    request.coordinator_keys = allowed;
    let answer = if denied.is_empty() {
        Answer::AsItIs
    } else {
        asked.changed::<FindCoordinatorRequest>(move |_, answer| {
            answer.coordinators.extend(denied);
            Ok(())
        })
    };
    asked.pass(by.unwrap_or_else(|| asked.connected.clone()), &request, answer)
}

fn without_coordinator(key: StrBytes, error: i16) -> Coordinator {
    let nowhere = Coordinator::default().with_node_id(BrokerId(-1)).with_port(-1).with_error_message(None);
    nowhere.with_key(key).with_error_code(error)
}

fn found_none(version: i16, error: i16, coordinators: Vec<Coordinator>) -> FindCoordinatorResponse {
    let mut answer = FindCoordinatorResponse::default();
    if version >= KEYS_ARE_LISTED {
        answer.coordinators = coordinators;
    } else {
        answer.error_code = error;
        answer.node_id = BrokerId(-1);
        answer.port = -1;
    }
    answer
}

pub(super) fn join(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: JoinGroupRequest = asked.request()?;
    let leave = member(asked, &request.group_id)?;
    asked.gate(&request, leave, |refused| {
        let mut denied = JoinGroupResponse::default();
        denied.error_code = refused.of_group();
        denied.protocol_name = Some(StrBytes::new());
        denied
    })
}

pub(super) fn sync(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: SyncGroupRequest = asked.request()?;
    let leave = member(asked, &request.group_id)?;
    asked.gate(&request, leave, |refused| SyncGroupResponse::default().with_error_code(refused.of_group()))
}

pub(super) fn heartbeat(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: HeartbeatRequest = asked.request()?;
    let leave = member(asked, &request.group_id)?;
    asked.gate(&request, leave, |refused| HeartbeatResponse::default().with_error_code(refused.of_group()))
}

pub(super) fn leave(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: LeaveGroupRequest = asked.request()?;
    let leave = member(asked, &request.group_id)?;
    asked.gate(&request, leave, |refused| LeaveGroupResponse::default().with_error_code(refused.of_group()))
}

pub(super) fn offset_commit(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: OffsetCommitRequest = asked.request()?;
    let each = Each {
        action: KafkaAction::Consume,
        items: |request: &mut OffsetCommitRequest| &mut request.topics,
        object: |item| topic(&item.name),
        denied: |item, refused| {
            let partitions = item.partitions.iter().map(|partition| {
                OffsetCommitResponsePartition::default()
                    .with_partition_index(partition.partition_index)
                    .with_error_code(refused.of_topic())
            });
            OffsetCommitResponseTopic::default().with_partitions(partitions.collect()).with_name(item.name)
        },
        answers: |answer| &mut answer.topics,
    };
    match asked.judging.one(KafkaAction::Commit, group(&request.group_id))? {
        Ok(_) => each.step(asked, request),
        Err(refused) => each.deny_all(asked, request, refused, |denied, refused| {
            denied.partitions.iter_mut().for_each(|partition| partition.error_code = refused.of_group());
        }),
    }
}

/// What a group has committed; of all topics, only those are shown that may be described.
pub(super) fn offset_fetch(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: OffsetFetchRequest = asked.request()?;
    if asked.head.version >= GROUPS_ARE_LISTED {
        return offsets_of_groups(asked, request);
    }
    let each = Each {
        action: KafkaAction::Describe,
        items: |request: &mut OffsetFetchRequest| request.topics.get_or_insert_default(),
        object: |item| topic(&item.name),
        denied: |item, refused| {
            let partitions = item.partition_indexes.iter().map(|index| no_offset(*index, refused.of_topic()));
            OffsetFetchResponseTopic::default().with_partitions(partitions.collect()).with_name(item.name)
        },
        answers: |answer: &mut OffsetFetchResponse| &mut answer.topics,
    };
    match asked.judging.one(KafkaAction::Describe, group(&request.group_id))? {
        Ok(_) if request.topics.is_some() => each.step(asked, request),
        Ok(by) => {
            let shown = asked.changed::<OffsetFetchRequest>(|judging, answer| {
                shown(judging, &mut answer.topics, |listed| &listed.name.0)
            });
            asked.pass(by, &request, shown)
        }
        Err(refused) if asked.head.version < 2 => {
            each.deny_all(asked, request, refused, |denied, refused| {
                denied.partitions.iter_mut().for_each(|partition| partition.error_code = refused.of_group());
            })
        }
        Err(refused) => {
            let denied = OffsetFetchResponse::default().with_error_code(refused.of_group());
            asked.answer::<OffsetFetchRequest>(&denied)
        }
    }
}

fn no_offset(index: i32, error: i16) -> OffsetFetchResponsePartition {
    OffsetFetchResponsePartition::default()
        .with_partition_index(index)
        .with_committed_offset(-1)
        .with_error_code(error)
}

/// Leaves out what may not be described.
fn shown<T>(judging: &Judging<'_>, listed: &mut Vec<T>, name: impl Fn(&T) -> &StrBytes) -> Result<(), Stop> {
    let mut kept = Vec::with_capacity(listed.len());
    for item in std::mem::take(listed) {
        if judging.shows(KafkaObject::Topic(name(&item).as_str()))? {
            kept.push(item);
        }
    }
    *listed = kept;
    Ok(())
}

fn offsets_of_groups(asked: &Asked<'_>, mut request: OffsetFetchRequest) -> Result<Step, Stop> {
    let groups = std::mem::take(&mut request.groups);
    let named: Vec<KafkaObject<'_>> = groups.iter().map(|item| group(&item.group_id)).collect();
    let leaves = asked.judging.each(KafkaAction::Describe, &named)?;
    let (mut allowed, by, denied) = parted(groups, leaves, |item, refused| {
        OffsetFetchResponseGroup::default().with_group_id(item.group_id).with_error_code(refused.of_group())
    });
    if allowed.is_empty() && !denied.is_empty() {
        let answer = OffsetFetchResponse::default().with_groups(denied);
        return asked.answer::<OffsetFetchRequest>(&answer);
    }
    // What was denied of each group's topics; `None` where all are asked for.
    let mut of_groups: HashMap<GroupId, Option<Vec<OffsetFetchResponseTopics>>> = HashMap::new();
    for item in &mut allowed {
        let denied = topics_of_group(asked, item)?;
        if of_groups.insert(item.group_id.clone(), denied).is_some() {
            let twice = Malformed::message("request", "it names a group twice");
            return Err(twice.into());
        }
    }
    request.groups = allowed;
    let answer = asked.changed::<OffsetFetchRequest>(move |judging, answer| {
        for item in &mut answer.groups {
            match of_groups.remove(&item.group_id) {
                Some(Some(denied)) => item.topics.extend(denied),
                _ => shown(judging, &mut item.topics, |listed| &listed.name.0)?,
            }
        }
        let unanswered = of_groups.into_iter().map(|(id, denied)| {
            OffsetFetchResponseGroup::default().with_group_id(id).with_topics(denied.unwrap_or_default())
        });
        answer.groups.extend(unanswered.filter(|group| !group.topics.is_empty()));
        answer.groups.extend(denied);
        Ok(())
    });
    asked.pass(by.unwrap_or_else(|| asked.connected.clone()), &request, answer)
}

fn topics_of_group(
    asked: &Asked<'_>,
    item: &mut OffsetFetchRequestGroup,
) -> Result<Option<Vec<OffsetFetchResponseTopics>>, Stop> {
    let Some(topics) = item.topics.take() else { return Ok(None) };
    let named: Vec<KafkaObject<'_>> = topics.iter().map(|item| topic(&item.name)).collect();
    let leaves = asked.judging.each(KafkaAction::Describe, &named)?;
    let deny = |item: OffsetFetchRequestTopics, refused: Refused| {
        let partitions = item.partition_indexes.iter().map(|index| {
            OffsetFetchResponsePartitions::default()
                .with_partition_index(*index)
                .with_committed_offset(-1)
                .with_error_code(refused.of_topic())
        });
        OffsetFetchResponseTopics::default().with_partitions(partitions.collect()).with_name(item.name)
    };
    let (allowed, _, denied) = parted(topics, leaves, deny);
    item.topics = Some(allowed);
    Ok(Some(denied))
}

pub(super) fn describe(asked: &Asked<'_>) -> Result<Step, Stop> {
    let mut request: DescribeGroupsRequest = asked.request()?;
    let operations = std::mem::take(&mut request.include_authorized_operations);
    let each = Each {
        action: KafkaAction::Describe,
        items: |request: &mut DescribeGroupsRequest| &mut request.groups,
        object: group,
        denied: |id, refused| DescribedGroup::default().with_group_id(id).with_error_code(refused.of_group()),
        answers: |answer| &mut answer.groups,
    };
    let mut step = each.step(asked, request)?;
    if let (Step::Forward { answer, .. }, true) = (&mut step, operations) {
        let before = std::mem::replace(answer, Answer::AsItIs);
        let head = asked.head.clone();
        *answer = Answer::Changed(Box::new(move |judging, frame| {
            let whole = match before {
                Answer::Changed(change) => change(judging, frame)?.slice(LENGTH_BYTES..),
                _ => frame.clone(),
            };
            let mut answer = head.answered::<DescribeGroupsRequest>(head.version, &whole)?;
            for described in answer.groups.iter_mut().filter(|described| described.error_code == 0) {
                described.authorized_operations = judging.operations(group(&described.group_id))?;
            }
            Ok(head.answer::<DescribeGroupsRequest>(&answer)?)
        }));
    }
    Ok(step)
}

/// Only those groups are listed that may be described.
pub(super) fn list(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: ListGroupsRequest = asked.request()?;
    let shown = asked.changed::<ListGroupsRequest>(|judging, answer| {
        let mut shown = Vec::with_capacity(answer.groups.len());
        for listed in std::mem::take(&mut answer.groups) {
            if judging.shows(group(&listed.group_id))? {
                shown.push(listed);
            }
        }
        answer.groups = shown;
        Ok(())
    });
    asked.pass(asked.connected.clone(), &request, shown)
}

pub(super) fn delete(asked: &Asked<'_>) -> Result<Step, Stop> {
    let each = Each {
        action: KafkaAction::Delete,
        items: |request: &mut DeleteGroupsRequest| &mut request.groups_names,
        object: group,
        denied: |id, refused| {
            DeletableGroupResult::default().with_group_id(id).with_error_code(refused.of_group())
        },
        answers: |answer| &mut answer.results,
    };
    each.step(asked, asked.request()?)
}
