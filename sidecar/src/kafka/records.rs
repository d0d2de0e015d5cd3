//! Records on their way: requests to write and to read them. The records themselves are not looked at, and not copied
//! where all of a request is allowed.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::fetch_response::{FetchableTopicResponse, PartitionData};
use kafka_protocol::messages::produce_response::{PartitionProduceResponse, TopicProduceResponse};
use kafka_protocol::messages::{FetchRequest, FetchResponse, ProduceRequest, ProduceResponse, TopicName};
use kafka_protocol::protocol::{Encodable, StrBytes};
use policy::{KafkaAction, KafkaObject};

use super::judge::Refused;
use super::step::{Answer, Asked, Step, Stop, parted};
use super::topics::{self, topic};
use super::wire::{Cursor, LENGTH_BYTES, Malformed, put_varint};

/// Since here the messages of Produce are flexible.
const PRODUCE_IS_FLEXIBLE: i16 = 9;
/// … and those of Fetch.
const FETCH_IS_FLEXIBLE: i16 = 12;
/// Since here Fetch has sessions.
const FETCH_HAS_SESSIONS: i16 = 7;
/// "No session, now or later" (KIP-227).
const NO_SESSION: i32 = 0;
const NO_EPOCH: i32 = -1;

/// Denied topics of a request whose answer is not decoded: they are put in front of those that the broker answers.
pub(super) struct Splice {
    /// Whether header and message are flexible; they are alike.
    pub(super) flexible: bool,
    /// What the message has before the array of topics.
    pub(super) before_bytes: usize,
    pub(super) count: usize,
    pub(super) entries: Bytes,
}

/// Bytes of an answer that [`Splice::head`] needs at most: correlation id, tags, what is before the array, its length.
pub(super) const SPLICED_HEAD_BYTES: usize = 4 + 1 + 10 + 5;

impl Splice {
    /// What the client gets in place of an answer's first bytes, its length among them, and how many those were.
    pub(super) fn head(&self, length: usize, start: &[u8]) -> Result<(Bytes, usize), Malformed> {
        let mut cursor = Cursor::new("answer", start);
        cursor.i32()?;
        cursor.no_tags(self.flexible)?;
        cursor.take(self.before_bytes)?;
        let before = start.len() - cursor.left();
        let count = cursor.count(self.flexible)? + self.count;
        let read = start.len() - cursor.left();
        let mut array = BytesMut::with_capacity(5);
        put_count(&mut array, self.flexible, count)?;
        let whole = length - read + before + array.len() + self.entries.len();
        let mut head = BytesMut::with_capacity(LENGTH_BYTES + before + array.len() + self.entries.len());
        head.put_i32(i32::try_from(whole).map_err(|error| Malformed::message("answer", error))?);
        head.put_slice(start.get(..before).unwrap_or_default());
        head.put_slice(&array);
        head.put_slice(&self.entries);
        Ok((head.freeze(), read))
    }
}

fn put_count(buffer: &mut BytesMut, flexible: bool, count: usize) -> Result<(), Malformed> {
    if flexible {
        put_varint(buffer, count + 1);
    } else {
        buffer.put_i32(i32::try_from(count).map_err(|error| Malformed::message("message", error))?);
    }
    Ok(())
}

fn encoded<M: Encodable>(messages: &[M], version: i16) -> Result<Bytes, Malformed> {
    let mut buffer = BytesMut::new();
    for message in messages {
        message.encode(&mut buffer, version).map_err(|error| Malformed::message("message", error))?;
    }
    Ok(buffer.freeze())
}

/// A request to write, as far as it is looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Produced<'a> {
    pub(super) transaction: Option<&'a str>,
    pub(super) acks: i16,
    pub(super) topics: Vec<ProducedTopic<'a>>,
    /// Where the topics begin, with their number, and where they end.
    array: Range<usize>,
}

/// Records of one topic.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ProducedTopic<'a> {
    pub(super) name: &'a str,
    pub(super) partitions: Vec<i32>,
    /// Where it stands in the message.
    place: Range<usize>,
}

impl<'a> Produced<'a> {
    pub(super) fn read(message: &'a [u8], version: i16) -> Result<Self, Malformed> {
        const WHAT: &str = "request";
        let flexible = version >= PRODUCE_IS_FLEXIBLE;
        let mut cursor = Cursor::new(WHAT, message);
        let at = |cursor: &Cursor<'_>| message.len() - cursor.left();
        let transaction = cursor.text(flexible)?;
        let acks = cursor.i16()?;
        let _timeout = cursor.i32()?;
        let begin = at(&cursor);
        let mut topics = Vec::new();
        for _ in 0..cursor.count(flexible)? {
            let start = at(&cursor);
            let nameless = || Malformed::message(WHAT, "a topic without a name");
            let name = cursor.text(flexible)?.ok_or_else(nameless)?;
            let mut partitions = Vec::new();
            for _ in 0..cursor.count(flexible)? {
                partitions.push(cursor.i32()?);
                cursor.skip_bytes(flexible)?;
                cursor.no_tags(flexible)?;
            }
            cursor.no_tags(flexible)?;
            topics.push(ProducedTopic { name, partitions, place: start..at(&cursor) });
        }
        let array = begin..at(&cursor);
        cursor.no_tags(flexible)?;
        if cursor.left() > 0 {
            return Err(Malformed::Form(WHAT));
        }
        Ok(Self { transaction, acks, topics, array })
    }
}

/// Records to be written. Without an answer to tell it in (`acks = 0`), nothing is written where anything is denied.
pub(super) fn produce(asked: &Asked<'_>) -> Result<Step, Stop> {
    let (version, judging) = (asked.head.version, asked.judging);
    let Produced { transaction, acks, topics, array } = Produced::read(asked.message, version)?;
    let answered = acks != 0;
    let mut transacts = None;
    if let Some(id) = transaction {
        transacts = Some(judging.one(KafkaAction::Transact, KafkaObject::TransactionalId(id))?);
    }
    if let Some(Err(_)) = &transacts {
        let error = ResponseError::TransactionalIdAuthorizationFailed.code();
        let denied = topics.into_iter().map(|topic| unwritten(topic, error)).collect();
        return deny_produce(asked, answered, denied);
    }
    let named: Vec<KafkaObject<'_>> = topics.iter().map(|topic| KafkaObject::Topic(topic.name)).collect();
    let leaves = judging.each(KafkaAction::Produce, &named)?;
    let (allowed, by, denied) =
        parted(topics, leaves, |topic, refused: Refused| unwritten(topic, refused.of_topic()));
    if !denied.is_empty() && (allowed.is_empty() || !answered) {
        return deny_produce(asked, answered, denied);
    }
    let by = by.or(transacts.and_then(Result::ok)).unwrap_or_else(|| asked.connected.clone());
    if denied.is_empty() {
        let answer = if answered { Answer::AsItIs } else { Answer::Nothing };
        return Ok(Step::Forward { by, frame: asked.frame.clone(), answer });
    }
    let flexible = version >= PRODUCE_IS_FLEXIBLE;
    let splice =
        Splice { flexible, before_bytes: 0, count: denied.len(), entries: encoded(&denied, version)? };
    let frame = without(asked, &array, &allowed, flexible)?;
    Ok(Step::Forward { by, frame, answer: Answer::Spliced(splice) })
}

fn unwritten(topic: ProducedTopic<'_>, error: i16) -> TopicProduceResponse {
    let partitions = topic.partitions.iter().map(|index| {
        PartitionProduceResponse::default().with_index(*index).with_error_code(error).with_base_offset(-1)
    });
    let name = TopicName(StrBytes::from_string(topic.name.to_owned()));
    TopicProduceResponse::default().with_partition_responses(partitions.collect()).with_name(name)
}

fn deny_produce(asked: &Asked<'_>, answered: bool, denied: Vec<TopicProduceResponse>) -> Result<Step, Stop> {
    if !answered {
        return Ok(Step::Close);
    }
    asked.answer::<ProduceRequest>(&ProduceResponse::default().with_responses(denied))
}

/// The frame with some of its topics only, each as it was.
fn without(
    asked: &Asked<'_>,
    array: &Range<usize>,
    allowed: &[ProducedTopic<'_>],
    flexible: bool,
) -> Result<Bytes, Malformed> {
    let message = asked.message;
    let part = |range: Range<usize>| message.get(range).unwrap_or_default();
    let header = asked.frame.len() - message.len();
    let mut frame = BytesMut::with_capacity(asked.frame.len());
    frame.put_slice(asked.frame.get(..header).unwrap_or_default());
    frame.put_slice(part(0..array.start));
    put_count(&mut frame, flexible, allowed.len())?;
    for topic in allowed {
        frame.put_slice(part(topic.place.clone()));
    }
    frame.put_slice(part(array.end..message.len()));
    let length = i32::try_from(frame.len() - LENGTH_BYTES);
    let length = length.map_err(|error| Malformed::message("request", error))?;
    if let Some(place) = frame.first_chunk_mut::<LENGTH_BYTES>() {
        *place = length.to_be_bytes();
    }
    Ok(frame.freeze())
}

/// Records to be read. Sessions are declined: what a broker remembers of one would not be judged again.
pub(super) fn fetch(asked: &Asked<'_>) -> Result<Step, Stop> {
    let version = asked.head.version;
    let mut request: FetchRequest = asked.request()?;
    if version >= FETCH_HAS_SESSIONS {
        if request.session_id != NO_SESSION {
            let error = ResponseError::FetchSessionIdNotFound.code();
            return asked.answer::<FetchRequest>(&FetchResponse::default().with_error_code(error));
        }
        request.session_epoch = NO_EPOCH;
        request.forgotten_topics_data.clear();
    }
    let follower = request.replica_id != topics::CONSUMER;
    let requested = std::mem::take(&mut request.topics);
    let (leaves, read) = if follower {
        topics::refuse_follower(asked)?;
        (requested.iter().map(|_| Err(Refused::Denied)).collect(), Vec::new())
    } else {
        let named: Vec<KafkaObject<'_>> = requested.iter().map(|item| topic(&item.topic)).collect();
        asked.judging.each_known(KafkaAction::Consume, &named)?
    };
    let (allowed, by, denied) = parted(requested, leaves, |item, refused| {
        let partitions = item.partitions.iter().map(|partition| {
            PartitionData::default()
                .with_partition_index(partition.partition)
                .with_error_code(refused.of_topic())
                .with_high_watermark(-1)
                .with_aborted_transactions(None)
        });
        FetchableTopicResponse::default().with_partitions(partitions.collect()).with_topic(item.topic)
    });
    if allowed.is_empty() && !denied.is_empty() {
        return asked.answer::<FetchRequest>(&FetchResponse::default().with_responses(denied));
    }
    let splice = if denied.is_empty() {
        None
    } else {
        Some(Splice {
            flexible: version >= FETCH_IS_FLEXIBLE,
            // Throttle time, and since there are sessions, error and session.
            before_bytes: if version >= FETCH_HAS_SESSIONS { 4 + 2 + 4 } else { 4 },
            count: denied.len(),
            entries: encoded(&denied, version)?,
        })
    };
    request.topics = allowed;
    let answer = Answer::Records { read, splice };
    asked.pass(by.unwrap_or_else(|| asked.connected.clone()), &request, answer)
}
