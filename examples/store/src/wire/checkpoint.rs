//! A replica as it is saved, and as it goes to a node that cannot have it from the log.

use bytes::Bytes;
use prost::Message as _;
use raft::eraftpb;

use super::{WireError, committed, outcome, pb, promise, promised, txn};
use crate::{
    keys::Key,
    lease::Lease,
    mvcc::{Home, Version},
    truetime::Timestamp,
    txn::{Outcome, SplitId, State, TxnId},
};

/// Where a replica is in its log, and all of it that is not in the engine anyway.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoint {
    /// How many replicas of the split the node had before this one, and lost. Not told to other nodes.
    pub life: u64,
    /// Where its rows are. Not told to other nodes.
    pub home: Home,
    /// The last entry that is applied.
    pub index: u64,
    /// Of which term that entry is.
    pub index_term: u64,
    /// The nodes of the split.
    pub conf: eraftpb::ConfState,
    /// The entry that made them so.
    pub conf_index: u64,
    /// The replica.
    pub state: State,
}

/// A split as it goes to a node that cannot have it from the log.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Image {
    /// All but rows and outcomes.
    pub checkpoint: Checkpoint,
    /// Every version of every row, in order.
    pub rows: Vec<(Key, Version)>,
    /// How attempts ended.
    pub outcomes: Vec<(TxnId, Outcome)>,
    /// The earliest snapshot that is whole.
    pub kept_since: Timestamp,
}

/// The bytes of a checkpoint.
pub fn encode_checkpoint(checkpoint: &Checkpoint) -> Vec<u8> {
    pb::Checkpoint::from(checkpoint).encode_to_vec()
}

/// A checkpoint of its bytes.
///
/// # Errors
///
/// When they are none.
pub fn decode_checkpoint(bytes: &[u8]) -> Result<Checkpoint, WireError> {
    pb::Checkpoint::decode(bytes)?.try_into()
}

/// The bytes of an image.
pub fn encode_image(image: &Image) -> Vec<u8> {
    let row = |(key, version): &(Key, Version)| pb::Row {
        key: key.as_bytes().clone(),
        at: version.at.0,
        value: version.value.clone(),
    };
    let ended = |(txn, outcome): &(TxnId, Outcome)| pb::Resolve {
        txn: Some(txn.into()),
        committed: committed(*outcome),
    };
    pb::Image {
        checkpoint: Some((&image.checkpoint).into()),
        rows: image.rows.iter().map(row).collect(),
        outcomes: image.outcomes.iter().map(ended).collect(),
        kept_since: image.kept_since.0,
    }
    .encode_to_vec()
}

/// An image of its bytes.
///
/// # Errors
///
/// When they are none.
pub fn decode_image(bytes: Bytes) -> Result<Image, WireError> {
    let wire = pb::Image::decode(bytes)?;
    let row = |row: pb::Row| {
        let version = Version { at: Timestamp(row.at), value: row.value };
        Ok((Key::decode(row.key)?, version))
    };
    let ended = |ended: pb::Resolve| Ok((txn(ended.txn)?, outcome(ended.committed)));
    Ok(Image {
        checkpoint: wire.checkpoint.ok_or(WireError::Field("checkpoint"))?.try_into()?,
        rows: wire.rows.into_iter().map(row).collect::<Result<_, WireError>>()?,
        outcomes: wire.outcomes.into_iter().map(ended).collect::<Result<_, WireError>>()?,
        kept_since: Timestamp(wire.kept_since),
    })
}

/// A snapshot as consensus hands it around.
pub(crate) fn raft_snapshot(
    image: Bytes,
    index: u64,
    term: u64,
    conf: eraftpb::ConfState,
) -> eraftpb::Snapshot {
    let mut snapshot = eraftpb::Snapshot { data: image, ..Default::default() };
    let metadata = snapshot.mut_metadata();
    (metadata.index, metadata.term) = (index, term);
    metadata.set_conf_state(conf);
    snapshot
}

impl From<&Checkpoint> for pb::Checkpoint {
    fn from(checkpoint: &Checkpoint) -> Self {
        let state = &checkpoint.state;
        let decision = |(txn, splits): (&TxnId, &Vec<SplitId>)| pb::Decision {
            txn: Some(txn.into()),
            participants: splits.iter().map(|split| split.0).collect(),
        };
        Self {
            life: checkpoint.life,
            home: checkpoint.home.0,
            index: checkpoint.index,
            index_term: checkpoint.index_term,
            conf: Some((&checkpoint.conf).into()),
            conf_index: checkpoint.conf_index,
            range: state.range.as_ref().map(Into::into),
            generation: state.generation,
            closed: state.closed.0,
            lease: state.lease.granted().as_ref().map(Into::into),
            prepared: state.prepared.iter().map(|(txn, prepared)| promise(*txn, prepared)).collect(),
            unsettled: state.unsettled.iter().map(decision).collect(),
            newest: state.newest.0,
            term: state.term,
            outcomes_since: state.outcomes_since.0,
            retired: state.retired.map(|split| split.0),
            absorbed: state.absorbed.iter().map(|split| split.0).collect(),
            rows: state.size.0,
            bytes: state.size.1,
        }
    }
}

impl TryFrom<pb::Checkpoint> for Checkpoint {
    type Error = WireError;

    fn try_from(wire: pb::Checkpoint) -> Result<Self, WireError> {
        let decision = |decision: pb::Decision| {
            let splits = decision.participants.into_iter().map(SplitId).collect();
            Ok((txn(decision.txn)?, splits))
        };
        Ok(Self {
            life: wire.life,
            home: Home(wire.home),
            index: wire.index,
            index_term: wire.index_term,
            conf: conf(wire.conf),
            conf_index: wire.conf_index,
            state: State {
                range: wire.range.map(TryInto::try_into).transpose()?,
                generation: wire.generation,
                closed: Timestamp(wire.closed),
                lease: Lease::restore(wire.lease.map(Into::into)),
                prepared: wire.prepared.into_iter().map(promised).collect::<Result<_, WireError>>()?,
                unsettled: wire.unsettled.into_iter().map(decision).collect::<Result<_, WireError>>()?,
                newest: Timestamp(wire.newest),
                term: wire.term,
                outcomes_since: Timestamp(wire.outcomes_since),
                retired: wire.retired.map(SplitId),
                absorbed: wire.absorbed.into_iter().map(SplitId).collect(),
                size: (wire.rows, wire.bytes),
            },
        })
    }
}

impl From<&eraftpb::ConfState> for pb::Conf {
    fn from(conf: &eraftpb::ConfState) -> Self {
        Self {
            voters: conf.voters.clone(),
            learners: conf.learners.clone(),
            voters_outgoing: conf.voters_outgoing.clone(),
            learners_next: conf.learners_next.clone(),
            auto_leave: conf.auto_leave,
        }
    }
}

pub(super) fn conf(wire: Option<pb::Conf>) -> eraftpb::ConfState {
    let wire = wire.unwrap_or_default();
    eraftpb::ConfState {
        voters: wire.voters,
        learners: wire.learners,
        voters_outgoing: wire.voters_outgoing,
        learners_next: wire.learners_next,
        auto_leave: wire.auto_leave,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

    use super::*;
    use crate::{
        keys::Range,
        lease::{Grant, NodeId, Tenure},
        locks::Age,
        mvcc::Mutation,
        txn::Prepared,
    };

    #[test]
    fn an_image_comes_back_as_it_went() {
        let key = Key::new("t", b"a").unwrap();
        let txn = |number| TxnId { started: Timestamp(number), random: number };
        let prepared = Prepared {
            age: Age { first: Timestamp(1), client: 2, attempt: Reverse(3) },
            at: Timestamp(4),
            reads: vec![Range::all()],
            writes: vec![Mutation { key: key.clone(), value: None }],
            coordinator: SplitId(5),
        };
        let holder = Tenure { node: NodeId(1), term: 2 };
        let grant = Grant { holder, start: Timestamp(3), end: Timestamp(4) };
        let image = Image {
            checkpoint: Checkpoint {
                life: 19,
                home: Home(20),
                index: 1,
                index_term: 2,
                conf: eraftpb::ConfState::from((vec![1, 2], vec![3])),
                conf_index: 3,
                state: State {
                    range: Some(Range::table("t").unwrap()),
                    generation: 4,
                    closed: Timestamp(5),
                    lease: Lease::restore(Some(grant)),
                    prepared: [(txn(6), prepared)].into(),
                    unsettled: [(txn(7), vec![SplitId(8)])].into(),
                    newest: Timestamp(9),
                    term: 10,
                    outcomes_since: Timestamp(11),
                    retired: Some(SplitId(12)),
                    absorbed: [SplitId(18)].into(),
                    size: (21, 22),
                },
            },
            rows: vec![(key, Version { at: Timestamp(13), value: Some(Bytes::from_static(b"v")) })],
            outcomes: vec![(txn(14), Outcome::Aborted), (txn(15), Outcome::Committed(Timestamp(16)))],
            kept_since: Timestamp(17),
        };
        assert_eq!(decode_image(encode_image(&image).into()).unwrap(), image);
        let checkpoint = image.checkpoint;
        assert_eq!(decode_checkpoint(&encode_checkpoint(&checkpoint)).unwrap(), checkpoint);
    }
}
