//! Requests of producers about their ids and transactions.

use kafka_protocol::ResponseError;
use kafka_protocol::messages::add_partitions_to_txn_response::{
    AddPartitionsToTxnPartitionResult, AddPartitionsToTxnTopicResult,
};
use kafka_protocol::messages::txn_offset_commit_response::{
    TxnOffsetCommitResponsePartition, TxnOffsetCommitResponseTopic,
};
use kafka_protocol::messages::{
    AddOffsetsToTxnRequest, AddOffsetsToTxnResponse, AddPartitionsToTxnRequest, AddPartitionsToTxnResponse,
    EndTxnRequest, EndTxnResponse, InitProducerIdRequest, InitProducerIdResponse, ProducerId,
    TransactionalId, TxnOffsetCommitRequest,
};
use policy::{KafkaAction, KafkaObject};

use super::groups::group;
use super::judge::Leave;
use super::step::{Answer, Asked, Each, Step, Stop};
use super::topics::topic;

const DENIED: i16 = ResponseError::TransactionalIdAuthorizationFailed.code();

fn transacts(asked: &Asked<'_>, id: &TransactionalId) -> Result<Leave, Stop> {
    Ok(asked.judging.one(KafkaAction::Transact, KafkaObject::TransactionalId(id.0.as_str()))?)
}

/// A producer id: for transactions, or only so that no record is written twice.
pub(super) fn init_producer_id(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: InitProducerIdRequest = asked.request()?;
    let (leave, error) = match &request.transactional_id {
        Some(id) => (transacts(asked, id)?, DENIED),
        None => {
            let leave = asked.judging.one(KafkaAction::IdempotentWrite, KafkaObject::Cluster)?;
            (leave, ResponseError::ClusterAuthorizationFailed.code())
        }
    };
    asked.gate(&request, leave, |_| {
        let nobody = InitProducerIdResponse::default().with_producer_id(ProducerId(-1));
        nobody.with_producer_epoch(-1).with_error_code(error)
    })
}

/// All or nothing: where one topic is denied, none is added.
pub(super) fn add_partitions(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: AddPartitionsToTxnRequest = asked.request()?;
    let answered = |errors: Vec<i16>| {
        let topics = request.v3_and_below_topics.iter().zip(errors).map(|(topic, error)| {
            let partitions = topic.partitions.iter().map(|index| {
                AddPartitionsToTxnPartitionResult::default()
                    .with_partition_index(*index)
                    .with_partition_error_code(error)
            });
            AddPartitionsToTxnTopicResult::default()
                .with_name(topic.name.clone())
                .with_results_by_partition(partitions.collect())
        });
        AddPartitionsToTxnResponse::default().with_results_by_topic_v3_and_below(topics.collect())
    };
    let by = match transacts(asked, &request.v3_and_below_transactional_id)? {
        Ok(by) => by,
        Err(_) => {
            let errors = vec![DENIED; request.v3_and_below_topics.len()];
            return asked.answer::<AddPartitionsToTxnRequest>(&answered(errors));
        }
    };
    let named: Vec<KafkaObject<'_>> =
        request.v3_and_below_topics.iter().map(|item| topic(&item.name)).collect();
    let leaves = asked.judging.each(KafkaAction::Produce, &named)?;
    if leaves.iter().all(Result::is_ok) {
        return asked.pass(by, &request, Answer::AsItIs);
    }
    let not_attempted = ResponseError::OperationNotAttempted.code();
    let error = |leave: &Leave| leave.as_ref().map_or_else(|refused| refused.of_topic(), |_| not_attempted);
    asked.answer::<AddPartitionsToTxnRequest>(&answered(leaves.iter().map(error).collect()))
}

pub(super) fn add_offsets(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: AddOffsetsToTxnRequest = asked.request()?;
    let denied = |error| AddOffsetsToTxnResponse::default().with_error_code(error);
    match transacts(asked, &request.transactional_id)? {
        Ok(_) => {
            let leave = asked.judging.one(KafkaAction::Commit, group(&request.group_id))?;
            asked.gate(&request, leave, |refused| denied(refused.of_group()))
        }
        Err(_) => asked.answer::<AddOffsetsToTxnRequest>(&denied(DENIED)),
    }
}

pub(super) fn end(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: EndTxnRequest = asked.request()?;
    let leave = transacts(asked, &request.transactional_id)?;
    asked.gate(&request, leave, |_| EndTxnResponse::default().with_error_code(DENIED))
}

pub(super) fn offset_commit(asked: &Asked<'_>) -> Result<Step, Stop> {
    let request: TxnOffsetCommitRequest = asked.request()?;
    let each = Each {
        action: KafkaAction::Consume,
        items: |request: &mut TxnOffsetCommitRequest| &mut request.topics,
        object: |item| topic(&item.name),
        denied: |item, refused| {
            let partitions = item.partitions.iter().map(|partition| {
                TxnOffsetCommitResponsePartition::default()
                    .with_partition_index(partition.partition_index)
                    .with_error_code(refused.of_topic())
            });
            TxnOffsetCommitResponseTopic::default().with_partitions(partitions.collect()).with_name(item.name)
        },
        answers: |answer| &mut answer.topics,
    };
    if let Err(refused) = transacts(asked, &request.transactional_id)? {
        return each.deny_all(asked, request, refused, |denied, _| {
            denied.partitions.iter_mut().for_each(|partition| partition.error_code = DENIED);
        });
    }
    match asked.judging.one(KafkaAction::Commit, group(&request.group_id))? {
        Ok(_) => each.step(asked, request),
        Err(refused) => each.deny_all(asked, request, refused, |denied, refused| {
            denied.partitions.iter_mut().for_each(|partition| partition.error_code = refused.of_group());
        }),
    }
}
