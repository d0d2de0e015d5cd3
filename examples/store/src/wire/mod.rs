//! What goes into logs and between nodes, as protobuf. Consensus messages are carried field by field, so that nothing
//! from outside reaches the old protobuf library that `raft` is built with (RUSTSEC-2024-0437).

mod checkpoint;
mod pb;
mod peer;

use bytes::Bytes;
use prost::Message as _;
use raft::eraftpb;

use crate::{
    keys::{Key, KeyError, Range},
    lease::{Grant, NodeId, Tenure},
    locks::Age,
    mvcc::{Mutation, Place, Stretch},
    truetime::Timestamp,
    txn::{Command, Entry, Outcome, Prepared, SplitId, TxnId},
};

pub(crate) use checkpoint::raft_snapshot;
pub use checkpoint::{Checkpoint, Image, decode_checkpoint, decode_image, encode_checkpoint, encode_image};
pub use peer::{PeerMessage, Route, Vote, decode_peer, encode_peer};

/// Why bytes are none of ours.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Not protobuf, or not of this message.
    #[error("not a message of the store")]
    Protobuf(#[from] prost::DecodeError),
    /// A key or range that cannot be.
    #[error("a message with a key that cannot be")]
    Key(#[from] KeyError),
    /// A field that must be there, or has a value that nobody gives it.
    #[error("a message with a missing or unknown {0}")]
    Field(&'static str),
}

/// What a node writes into its log for one split: what consensus must not forget.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Whose.
    pub split: u64,
    /// Of which of the node's replicas of the split: [`Checkpoint::life`].
    pub life: u64,
    /// Term, vote and commit index, where they changed.
    pub hard_state: Option<eraftpb::HardState>,
    /// Entries, which take the place of all from the first of them on.
    pub entries: Vec<eraftpb::Entry>,
    /// A snapshot took the place of everything up to this index.
    pub restart: Option<u64>,
}

/// The bytes of a log entry.
pub fn encode_entry(entry: &Entry) -> Vec<u8> {
    let command = match &entry.command {
        Command::Close => pb::Command::Close(pb::Empty {}),
        Command::Lease(grant) => pb::Command::Lease(grant.into()),
        Command::Commit { txn, at, writes, participants } => pb::Command::Commit(pb::Commit {
            txn: Some(txn.into()),
            at: at.0,
            writes: writes.iter().map(Into::into).collect(),
            participants: participants.iter().map(|split| split.0).collect(),
        }),
        Command::Settled { txns } => {
            pb::Command::Settled(pb::Settled { txns: txns.iter().map(Into::into).collect() })
        }
        Command::Prepare { txn, prepared } => pb::Command::Prepare(promise(*txn, prepared)),
        Command::Resolve { txn, outcome } => {
            pb::Command::Resolve(pb::Resolve { txn: Some(txn.into()), committed: committed(*outcome) })
        }
        Command::Collect { horizon, stretch } => pb::Command::Collect(pb::Collect {
            horizon: horizon.0,
            from: stretch.from.as_ref().map(Into::into),
            to: stretch.to.as_ref().map(Into::into),
        }),
        Command::Forget { outcomes } => pb::Command::Forget(pb::Forget { outcomes: outcomes.0 }),
        Command::Surveyed { rows, bytes } => {
            pb::Command::Surveyed(pb::Surveyed { rows: *rows, bytes: *bytes })
        }
        Command::Yield => pb::Command::Yield(pb::Empty {}),
        Command::Split { at, right, leader } => {
            pb::Command::Split(pb::Split { at: at.as_bytes().clone(), right: right.0, leader: leader.0 })
        }
        Command::Retire { into } => pb::Command::Retire(pb::Retire { into: into.0 }),
        Command::Absorb { right, end } => {
            pb::Command::Absorb(pb::Absorb { right: right.0, end: end.clone() })
        }
    };
    pb::LogEntry { term: entry.term, closed: entry.closed.0, command: Some(command) }.encode_to_vec()
}

/// A log entry of its bytes.
///
/// # Errors
///
/// When they are none.
pub fn decode_entry(bytes: Bytes) -> Result<Entry, WireError> {
    let entry = pb::LogEntry::decode(bytes)?;
    let command = match entry.command.ok_or(WireError::Field("command"))? {
        pb::Command::Close(_) => Command::Close,
        pb::Command::Lease(grant) => Command::Lease(grant.into()),
        pb::Command::Commit(commit) => Command::Commit {
            txn: txn(commit.txn)?,
            at: Timestamp(commit.at),
            writes: each(commit.writes)?,
            participants: commit.participants.into_iter().map(SplitId).collect(),
        },
        pb::Command::Settled(settled) => {
            Command::Settled { txns: settled.txns.into_iter().map(Into::into).collect() }
        }
        pb::Command::Prepare(prepare) => {
            let (txn, prepared) = promised(prepare)?;
            Command::Prepare { txn, prepared }
        }
        pb::Command::Resolve(resolve) => {
            Command::Resolve { txn: txn(resolve.txn)?, outcome: outcome(resolve.committed) }
        }
        pb::Command::Collect(collect) => Command::Collect {
            horizon: Timestamp(collect.horizon),
            stretch: Stretch {
                from: collect.from.map(TryInto::try_into).transpose()?,
                to: collect.to.map(TryInto::try_into).transpose()?,
            },
        },
        pb::Command::Forget(forget) => Command::Forget { outcomes: Timestamp(forget.outcomes) },
        pb::Command::Surveyed(pb::Surveyed { rows, bytes }) => Command::Surveyed { rows, bytes },
        pb::Command::Yield(_) => Command::Yield,
        pb::Command::Split(split) => Command::Split {
            at: Key::decode(split.at)?,
            right: SplitId(split.right),
            leader: NodeId(split.leader),
        },
        pb::Command::Retire(retire) => Command::Retire { into: SplitId(retire.into) },
        pb::Command::Absorb(absorb) => Command::Absorb { right: SplitId(absorb.right), end: absorb.end },
    };
    Ok(Entry { term: entry.term, closed: Timestamp(entry.closed), command })
}

/// The bytes of a record.
pub fn encode_record(record: &Record) -> Vec<u8> {
    let hard_state = record.hard_state.as_ref().map(|state| pb::HardState {
        term: state.term,
        vote: state.vote,
        commit: state.commit,
    });
    let entries = record.entries.iter().map(Into::into).collect();
    pb::Record { split: record.split, life: record.life, hard_state, entries, restart: record.restart }
        .encode_to_vec()
}

/// A record of its bytes.
///
/// # Errors
///
/// When they are none.
pub fn decode_record(bytes: &[u8]) -> Result<Record, WireError> {
    let record = pb::Record::decode(bytes)?;
    let hard_state = record.hard_state.map(|state| {
        let mut hard = eraftpb::HardState::default();
        (hard.term, hard.vote, hard.commit) = (state.term, state.vote, state.commit);
        hard
    });
    let entries = each(record.entries)?;
    Ok(Record { split: record.split, life: record.life, hard_state, entries, restart: record.restart })
}

/// The bytes of a message between two nodes' halves of a split.
pub fn encode_message(message: &eraftpb::Message) -> Vec<u8> {
    pb::Message {
        kind: message.msg_type as i32,
        to: message.to,
        from: message.from,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        entries: message.entries.iter().map(Into::into).collect(),
        commit: message.commit,
        commit_term: message.commit_term,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: message.context.clone(),
        request_snapshot: message.request_snapshot,
        priority: message.priority,
        snapshot: message.snapshot.as_ref().filter(|snapshot| snapshot.get_metadata().index > 0).map(
            |snapshot| {
                let metadata = snapshot.get_metadata();
                pb::RaftSnapshot {
                    image: snapshot.data.clone(),
                    index: metadata.index,
                    term: metadata.term,
                    conf: Some(metadata.get_conf_state().into()),
                }
            },
        ),
    }
    .encode_to_vec()
}

/// A message of its bytes.
///
/// # Errors
///
/// When they are none, or one that a node says only to itself.
pub fn decode_message(bytes: Bytes) -> Result<eraftpb::Message, WireError> {
    let wire = pb::Message::decode(bytes)?;
    let kind = BETWEEN_NODES.into_iter().find(|kind| *kind as i32 == wire.kind);
    let mut message = eraftpb::Message::default();
    message.set_msg_type(kind.ok_or(WireError::Field("kind"))?);
    message.to = wire.to;
    message.from = wire.from;
    message.term = wire.term;
    message.log_term = wire.log_term;
    message.index = wire.index;
    message.set_entries(each::<_, eraftpb::Entry>(wire.entries)?.into());
    message.commit = wire.commit;
    message.commit_term = wire.commit_term;
    message.reject = wire.reject;
    message.reject_hint = wire.reject_hint;
    message.context = wire.context;
    message.request_snapshot = wire.request_snapshot;
    message.priority = wire.priority;
    check(&message)?;
    if let Some(wire) = wire.snapshot {
        if wire.conf.as_ref().is_none_or(|conf| conf.voters.is_empty()) || wire.index > NUMBER_MAX {
            return Err(WireError::Field("snapshot"));
        }
        message.set_snapshot(raft_snapshot(wire.image, wire.index, wire.term, checkpoint::conf(wire.conf)));
    }
    Ok(message)
}

/// Terms and indexes that nobody comes to: consensus counts on from what it is told.
const NUMBER_MAX: u64 = u64::MAX / 2;

/// What consensus takes for granted of a message, and stops the node without.
fn check(message: &eraftpb::Message) -> Result<(), WireError> {
    let numbers = [message.term, message.log_term, message.index, message.commit, message.reject_hint];
    if numbers.iter().any(|number| *number > NUMBER_MAX) {
        return Err(WireError::Field("number"));
    }
    let mut before = (message.index, message.log_term);
    for entry in &message.entries {
        if entry.index != before.0 + 1 || entry.term < before.1 || entry.term > message.term {
            return Err(WireError::Field("entry"));
        }
        before = (entry.index, entry.term);
    }
    Ok(())
}

/// A change of a group's nodes of its bytes in the log. Empty is the end of a change in two steps.
///
/// # Errors
///
/// When they are none.
pub(crate) fn decode_conf_change(bytes: &[u8]) -> Result<eraftpb::ConfChangeV2, WireError> {
    let wire = pb::ConfChange::decode(bytes)?;
    let mut changes = Vec::new();
    for single in wire.changes {
        let kinds = [
            eraftpb::ConfChangeType::AddNode,
            eraftpb::ConfChangeType::RemoveNode,
            eraftpb::ConfChangeType::AddLearnerNode,
        ];
        let kind = kinds.into_iter().find(|kind| *kind as i32 == single.kind);
        let mut change = eraftpb::ConfChangeSingle::default();
        change.set_change_type(kind.ok_or(WireError::Field("change of nodes"))?);
        change.node_id = single.node;
        changes.push(change);
    }
    let transitions = [
        eraftpb::ConfChangeTransition::Auto,
        eraftpb::ConfChangeTransition::Implicit,
        eraftpb::ConfChangeTransition::Explicit,
    ];
    let transition = transitions.into_iter().find(|transition| *transition as i32 == wire.transition);
    let mut change = eraftpb::ConfChangeV2::default();
    change.set_transition(transition.ok_or(WireError::Field("transition"))?);
    change.set_changes(changes.into());
    Ok(change)
}

const BETWEEN_NODES: [eraftpb::MessageType; 10] = {
    use eraftpb::MessageType as Type;
    [
        Type::MsgAppend,
        Type::MsgAppendResponse,
        Type::MsgRequestVote,
        Type::MsgRequestVoteResponse,
        Type::MsgRequestPreVote,
        Type::MsgRequestPreVoteResponse,
        Type::MsgHeartbeat,
        Type::MsgHeartbeatResponse,
        Type::MsgTimeoutNow,
        Type::MsgSnapshot,
    ]
};

const ENTRY_KINDS: [eraftpb::EntryType; 3] = [
    eraftpb::EntryType::EntryNormal,
    eraftpb::EntryType::EntryConfChange,
    eraftpb::EntryType::EntryConfChangeV2,
];

fn each<W, T>(wire: Vec<W>) -> Result<Vec<T>, WireError>
where
    T: TryFrom<W>,
    WireError: From<T::Error>,
{
    wire.into_iter().map(|item| T::try_from(item).map_err(WireError::from)).collect()
}

impl From<&Place> for pb::Place {
    fn from(place: &Place) -> Self {
        Self { row: place.row.as_bytes().clone(), behind: place.behind.map(|at| at.0) }
    }
}

impl TryFrom<pb::Place> for Place {
    type Error = WireError;

    fn try_from(place: pb::Place) -> Result<Self, WireError> {
        Ok(Self { row: Key::decode(place.row)?, behind: place.behind.map(Timestamp) })
    }
}

impl From<&Grant> for pb::Grant {
    fn from(grant: &Grant) -> Self {
        let Tenure { node, term } = grant.holder;
        Self { node: node.0, term, start: grant.start.0, end: grant.end.0 }
    }
}

impl From<pb::Grant> for Grant {
    fn from(grant: pb::Grant) -> Self {
        Self {
            holder: Tenure { node: NodeId(grant.node), term: grant.term },
            start: Timestamp(grant.start),
            end: Timestamp(grant.end),
        }
    }
}

fn promise(txn: TxnId, prepared: &Prepared) -> pb::Prepare {
    pb::Prepare {
        txn: Some((&txn).into()),
        first: prepared.age.first.0,
        client: prepared.age.client,
        attempt: prepared.age.attempt.0,
        at: prepared.at.0,
        reads: prepared.reads.iter().map(Into::into).collect(),
        writes: prepared.writes.iter().map(Into::into).collect(),
        coordinator: prepared.coordinator.0,
    }
}

fn promised(prepare: pb::Prepare) -> Result<(TxnId, Prepared), WireError> {
    let prepared = Prepared {
        age: age(prepare.first, prepare.client, prepare.attempt),
        at: Timestamp(prepare.at),
        reads: each(prepare.reads)?,
        writes: each(prepare.writes)?,
        coordinator: SplitId(prepare.coordinator),
    };
    Ok((txn(prepare.txn)?, prepared))
}

fn age(first: u64, client: u64, attempt: u32) -> Age {
    Age { first: Timestamp(first), client, attempt: std::cmp::Reverse(attempt) }
}

fn committed(outcome: Outcome) -> Option<u64> {
    match outcome {
        Outcome::Committed(at) => Some(at.0),
        Outcome::Aborted => None,
    }
}

fn outcome(committed: Option<u64>) -> Outcome {
    committed.map_or(Outcome::Aborted, |at| Outcome::Committed(Timestamp(at)))
}

fn txn(wire: Option<pb::Txn>) -> Result<TxnId, WireError> {
    wire.map(Into::into).ok_or(WireError::Field("transaction"))
}

impl From<&TxnId> for pb::Txn {
    fn from(txn: &TxnId) -> Self {
        Self { started: txn.started.0, random: txn.random }
    }
}

impl From<pb::Txn> for TxnId {
    fn from(txn: pb::Txn) -> Self {
        Self { started: Timestamp(txn.started), random: txn.random }
    }
}

impl From<&Mutation> for pb::Mutation {
    fn from(mutation: &Mutation) -> Self {
        Self { key: mutation.key.as_bytes().clone(), value: mutation.value.clone() }
    }
}

impl TryFrom<pb::Mutation> for Mutation {
    type Error = KeyError;

    fn try_from(wire: pb::Mutation) -> Result<Self, KeyError> {
        Ok(Self { key: Key::decode(wire.key)?, value: wire.value })
    }
}

impl From<&Range> for pb::Span {
    fn from(range: &Range) -> Self {
        Self { start: range.start().clone(), end: range.end().cloned() }
    }
}

impl TryFrom<pb::Span> for Range {
    type Error = KeyError;

    fn try_from(wire: pb::Span) -> Result<Self, KeyError> {
        Self::between(wire.start, wire.end)
    }
}

impl From<&eraftpb::Entry> for pb::RaftEntry {
    fn from(entry: &eraftpb::Entry) -> Self {
        Self {
            kind: entry.entry_type as i32,
            term: entry.term,
            index: entry.index,
            data: entry.data.clone(),
            context: entry.context.clone(),
        }
    }
}

impl TryFrom<pb::RaftEntry> for eraftpb::Entry {
    type Error = WireError;

    fn try_from(wire: pb::RaftEntry) -> Result<Self, WireError> {
        let kind = ENTRY_KINDS.into_iter().find(|kind| *kind as i32 == wire.kind);
        let mut entry = Self::default();
        entry.set_entry_type(kind.ok_or(WireError::Field("entry type"))?);
        (entry.term, entry.index, entry.data, entry.context) =
            (wire.term, wire.index, wire.data, wire.context);
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn txn_id() -> impl Strategy<Value = TxnId> {
        (any::<u64>(), any::<u64>()).prop_map(|(at, random)| TxnId { started: Timestamp(at), random })
    }

    fn writes() -> impl Strategy<Value = Vec<Mutation>> {
        let value = prop::option::of(prop::collection::vec(any::<u8>(), 0..9));
        let write = ("[a-z][a-z0-9_]{0,5}", prop::collection::vec(any::<u8>(), 1..9), value);
        prop::collection::vec(
            write.prop_map(|(table, row, value)| Mutation {
                key: Key::new(&table, &row).unwrap(),
                value: value.map(Bytes::from),
            }),
            0..4,
        )
    }

    fn place() -> impl Strategy<Value = Place> {
        let row = prop::collection::vec(any::<u8>(), 1..9).prop_map(|row| Key::new("t", &row).unwrap());
        let behind = prop::option::of(any::<u64>().prop_map(Timestamp));
        (row, behind).prop_map(|(row, behind)| Place { row, behind })
    }

    fn command() -> impl Strategy<Value = Command> {
        let time = || any::<u64>().prop_map(Timestamp);
        let range = ("[a-c]{0,2}", "[a-c]{0,2}")
            .prop_filter_map("backwards", |(from, to)| Range::rows("t", from.as_bytes(), to.as_bytes()).ok());
        let reads = prop::collection::vec(prop_oneof![range, Just(Range::all())], 0..3);
        let outcome = prop_oneof![Just(Outcome::Aborted), time().prop_map(Outcome::Committed)];
        prop_oneof![
            Just(Command::Close),
            (any::<u64>(), time(), time()).prop_map(|(node, start, end)| Command::Lease(Grant {
                holder: Tenure { node: NodeId(node), term: node },
                start,
                end
            })),
            (txn_id(), time(), writes(), prop::collection::vec(any::<u64>().prop_map(SplitId), 0..3))
                .prop_map(|(txn, at, writes, participants)| Command::Commit {
                    txn,
                    at,
                    writes,
                    participants
                }),
            prop::collection::vec(txn_id(), 0..3).prop_map(|txns| Command::Settled { txns }),
            (txn_id(), time(), any::<u64>(), any::<u32>(), time(), reads, writes(), any::<u64>()).prop_map(
                |(txn, first, client, attempt, at, reads, writes, split)| Command::Prepare {
                    txn,
                    prepared: Prepared {
                        age: Age { first, client, attempt: Reverse(attempt) },
                        at,
                        reads,
                        writes,
                        coordinator: SplitId(split),
                    },
                }
            ),
            (txn_id(), outcome).prop_map(|(txn, outcome)| Command::Resolve { txn, outcome }),
            (time(), prop::option::of(place()), prop::option::of(place()))
                .prop_map(|(horizon, from, to)| Command::Collect { horizon, stretch: Stretch { from, to } }),
            time().prop_map(|outcomes| Command::Forget { outcomes }),
            (any::<u64>(), any::<u64>()).prop_map(|(rows, bytes)| Command::Surveyed { rows, bytes }),
            Just(Command::Yield),
            (writes(), any::<u64>()).prop_filter_map("no key", |(writes, number)| Some(Command::Split {
                at: writes.first()?.key.clone(),
                right: SplitId(number),
                leader: NodeId(number),
            })),
            any::<u64>().prop_map(|into| Command::Retire { into: SplitId(into) }),
            (any::<u64>(), prop::option::of(Just(Bytes::from_static(b"end"))))
                .prop_map(|(right, end)| Command::Absorb { right: SplitId(right), end }),
        ]
    }

    proptest! {
        #[test]
        fn entries_come_back_as_they_went(term in any::<u64>(), closed in any::<u64>(), command in command()) {
            let entry = Entry { term, closed: Timestamp(closed), command };
            prop_assert_eq!(decode_entry(encode_entry(&entry).into()).unwrap(), entry);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let bytes = Bytes::from(bytes);
            let read = [decode_entry(bytes.clone()).is_ok(), decode_record(&bytes).is_ok(), decode_message(bytes.clone()).is_ok()];
            // A message without a kind, which no bytes at all would be, is a node's word to itself.
            prop_assert!(!bytes.is_empty() || read == [false, true, false]);
        }

        #[test]
        fn consensus_comes_back_as_it_went(
            mut numbers in prop::array::uniform8(..NUMBER_MAX), kind in 0usize..10, reject in any::<bool>(),
            data in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..3),
        ) {
            numbers[3] = numbers[3].min(numbers[2]);
            let entries: Vec<_> = data.iter().zip(numbers[4] + 1..).map(|(data, index)| {
                let mut entry = eraftpb::Entry::default();
                (entry.index, entry.term, entry.data) = (index, numbers[2], data.clone().into());
                entry
            }).collect();
            let mut message = eraftpb::Message::default();
            message.set_msg_type(BETWEEN_NODES[kind]);
            [message.to, message.from, message.term, message.log_term, message.index, message.commit,
             message.commit_term, message.reject_hint] = numbers;
            message.reject = reject;
            message.set_entries(entries.clone().into());
            prop_assert_eq!(decode_message(encode_message(&message).into()).unwrap(), message.clone());
            let mut wrong = message.clone();
            wrong.index += 1;
            prop_assert!(entries.is_empty() || decode_message(encode_message(&wrong).into()).is_err(), "a hole");
            wrong.term = u64::MAX;
            prop_assert!(decode_message(encode_message(&wrong).into()).is_err(), "a term that nobody comes to");
            let mut hard = eraftpb::HardState::default();
            [hard.term, hard.vote, hard.commit, ..] = numbers;
            let record = Record {
                split: numbers[7],
                life: numbers[5],
                hard_state: Some(hard),
                entries,
                restart: Some(numbers[6]),
            };
            prop_assert_eq!(decode_record(&encode_record(&record)).unwrap(), record);
        }
    }
}
