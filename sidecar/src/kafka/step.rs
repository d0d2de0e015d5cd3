//! What becomes of one request: how its parts are judged, and what is done about those that are denied.

use bytes::Bytes;
use kafka_protocol::messages::ApiKey;
use kafka_protocol::protocol::Request;
use policy::{KafkaAction, KafkaObject, ObjectRef, Permit};
use thiserror::Error;

use super::judge::{Judging, Leave, Refused, Unjudged};
use super::records::{self, Splice};
use super::wire::{Head, Malformed};
use super::{apis, groups, topics, transactions};

/// What is to be done with a request.
pub(super) enum Step {
    /// To be passed on, by this leave.
    Forward { by: Permit, frame: Bytes, answer: Answer },
    /// Not to be passed on: this is the answer.
    Answered(Bytes),
    /// Neither passed on nor answered: the connection ends, which is how a broker says so to `acks = 0`.
    Close,
}

/// What an answer of the broker's is to become.
pub(super) enum Answer {
    /// There is none.
    Nothing,
    /// What it is.
    AsItIs,
    /// What it is, if a policy that came meanwhile still permits these to be read.
    Records { read: Vec<ObjectRef>, splice: Option<Splice> },
    /// With what was denied put in front.
    Spliced(Splice),
    /// Something that needs to be decoded.
    Changed(Change),
}

/// Makes of an answer's frame, without its length, one that goes to the client.
pub(super) type Change = Box<dyn FnOnce(&Judging<'_>, &Bytes) -> Result<Bytes, Stop> + Send>;

/// Why a connection cannot go on.
#[derive(Debug, Error)]
pub(super) enum Stop {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Unjudged(#[from] Unjudged),
}

/// A request that is to be judged.
pub(super) struct Asked<'a> {
    pub(super) judging: &'a Judging<'a>,
    pub(super) head: &'a Head,
    /// The whole frame, with its length.
    pub(super) frame: &'a Bytes,
    /// What stands behind its header.
    pub(super) message: &'a Bytes,
    /// The leave to be connected, by which what names no object is passed on.
    pub(super) connected: &'a Permit,
}

impl Asked<'_> {
    pub(super) fn request<R: Request>(&self) -> Result<R, Malformed> {
        self.head.request::<R>(self.message)
    }

    /// Passes a request on as it was understood.
    pub(super) fn pass<R: Request>(&self, by: Permit, request: &R, answer: Answer) -> Result<Step, Stop> {
        let frame = self.head.frame(self.head.version, request)?;
        Ok(Step::Forward { by, frame, answer })
    }

    pub(super) fn answer<R: Request>(&self, answer: &R::Response) -> Result<Step, Stop> {
        Ok(Step::Answered(self.head.answer::<R>(answer)?))
    }

    /// A request about one object.
    pub(super) fn gate<R: Request>(
        &self,
        request: &R,
        leave: Leave,
        denied: impl FnOnce(Refused) -> R::Response,
    ) -> Result<Step, Stop> {
        match leave {
            Ok(by) => self.pass(by, request, Answer::AsItIs),
            Err(refused) => self.answer::<R>(&denied(refused)),
        }
    }

    /// The answer's messages, changed.
    pub(super) fn changed<R: Request>(
        &self,
        change: impl FnOnce(&Judging<'_>, &mut R::Response) -> Result<(), Stop> + Send + 'static,
    ) -> Answer {
        let head = self.head.clone();
        Answer::Changed(Box::new(move |judging, frame| {
            let mut answer = head.answered::<R>(head.version, frame)?;
            change(judging, &mut answer)?;
            Ok(head.answer::<R>(&answer)?)
        }))
    }
}

/// A request with a list, of which each item is about one object and is answered by itself.
pub(super) struct Each<R: Request, T, D> {
    pub(super) action: KafkaAction,
    pub(super) items: fn(&mut R) -> &mut Vec<T>,
    pub(super) object: fn(&T) -> KafkaObject<'_>,
    pub(super) denied: fn(T, Refused) -> D,
    pub(super) answers: fn(&mut R::Response) -> &mut Vec<D>,
}

impl<R, T, D> Each<R, T, D>
where
    R: Request + 'static,
    R::Response: Default,
    D: Send + 'static,
{
    /// The allowed items are passed on, the denied ones are answered beside theirs.
    pub(super) fn step(&self, asked: &Asked<'_>, mut request: R) -> Result<Step, Stop> {
        let items = std::mem::take((self.items)(&mut request));
        let named: Vec<KafkaObject<'_>> = items.iter().map(self.object).collect();
        let leaves = asked.judging.each(self.action, &named)?;
        let (allowed, by, denied) = parted(items, leaves, self.denied);
        if allowed.is_empty() && !denied.is_empty() {
            let mut answer = R::Response::default();
            *(self.answers)(&mut answer) = denied;
            return asked.answer::<R>(&answer);
        }
        *(self.items)(&mut request) = allowed;
        let answers = self.answers;
        let answer = if denied.is_empty() {
            Answer::AsItIs
        } else {
            asked.changed::<R>(move |_, answer| {
                answers(answer).extend(denied);
                Ok(())
            })
        };
        asked.pass(by.unwrap_or_else(|| asked.connected.clone()), &request, answer)
    }

    /// All items are denied alike.
    pub(super) fn deny_all(
        &self,
        asked: &Asked<'_>,
        mut request: R,
        refused: Refused,
        error: fn(&mut D, Refused),
    ) -> Result<Step, Stop> {
        let mut answer = R::Response::default();
        let denied = std::mem::take((self.items)(&mut request)).into_iter().map(|item| {
            let mut denied = (self.denied)(item, refused);
            error(&mut denied, refused);
            denied
        });
        *(self.answers)(&mut answer) = denied.collect();
        asked.answer::<R>(&answer)
    }
}

/// What is allowed, by which leave, and answers to the rest.
pub(super) fn parted<T, D>(
    items: Vec<T>,
    leaves: Vec<Leave>,
    deny: impl Fn(T, Refused) -> D,
) -> (Vec<T>, Option<Permit>, Vec<D>) {
    let (mut allowed, mut by, mut denied) = (Vec::with_capacity(items.len()), None, Vec::new());
    for (item, leave) in items.into_iter().zip(leaves) {
        match leave {
            Ok(permit) => {
                by.get_or_insert(permit);
                allowed.push(item);
            }
            Err(refused) => denied.push(deny(item, refused)),
        }
    }
    (allowed, by, denied)
}

/// Judges a request. Its API and version are understood.
pub(super) fn judged(asked: &Asked<'_>) -> Result<Step, Stop> {
    match asked.head.api {
        ApiKey::ApiVersions => {
            let request: kafka_protocol::messages::ApiVersionsRequest = asked.request()?;
            let head = asked.head.clone();
            let capped = Answer::Changed(Box::new(move |_, frame| Ok(apis::capped(&head, frame)?)));
            asked.pass(asked.connected.clone(), &request, capped)
        }
        ApiKey::Produce => records::produce(asked),
        ApiKey::Fetch => records::fetch(asked),
        ApiKey::Metadata => topics::metadata(asked),
        ApiKey::ListOffsets => topics::list_offsets(asked),
        ApiKey::OffsetForLeaderEpoch => topics::offset_for_leader_epoch(asked),
        ApiKey::CreateTopics => topics::create(asked),
        ApiKey::DeleteTopics => topics::delete(asked),
        ApiKey::CreatePartitions => topics::create_partitions(asked),
        ApiKey::DeleteRecords => topics::delete_records(asked),
        ApiKey::DescribeConfigs => topics::describe_configs(asked),
        ApiKey::AlterConfigs => topics::alter_configs(asked),
        ApiKey::IncrementalAlterConfigs => topics::incremental_alter_configs(asked),
        ApiKey::DescribeCluster => topics::describe_cluster(asked),
        ApiKey::FindCoordinator => groups::find_coordinator(asked),
        ApiKey::JoinGroup => groups::join(asked),
        ApiKey::SyncGroup => groups::sync(asked),
        ApiKey::Heartbeat => groups::heartbeat(asked),
        ApiKey::LeaveGroup => groups::leave(asked),
        ApiKey::OffsetCommit => groups::offset_commit(asked),
        ApiKey::OffsetFetch => groups::offset_fetch(asked),
        ApiKey::DescribeGroups => groups::describe(asked),
        ApiKey::ListGroups => groups::list(asked),
        ApiKey::DeleteGroups => groups::delete(asked),
        ApiKey::InitProducerId => transactions::init_producer_id(asked),
        ApiKey::AddPartitionsToTxn => transactions::add_partitions(asked),
        ApiKey::AddOffsetsToTxn => transactions::add_offsets(asked),
        ApiKey::EndTxn => transactions::end(asked),
        ApiKey::TxnOffsetCommit => transactions::offset_commit(asked),
        other => Err(Malformed::Api(other as i16).into()),
    }
}
