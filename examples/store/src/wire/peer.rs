//! What nodes say to each other.

use bytes::Bytes;
use prost::Message as _;

use super::{WireError, age, committed, each, outcome, pb, txn};
use crate::{
    keys::Range,
    lease::NodeId,
    mvcc::Mutation,
    truetime::Timestamp,
    txn::{Attempt, Outcome, SplitId, TxnId},
};

/// A split as its leader, or one who has heard of it, tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Its number.
    pub split: SplitId,
    /// What it holds.
    pub range: Range,
    /// Goes up with each change of range or nodes.
    pub generation: u64,
    /// Its nodes.
    pub nodes: Vec<NodeId>,
    /// Who leads it.
    pub leader: Option<NodeId>,
    /// In which term.
    pub term: u64,
}

/// What a participant says of a promise that it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vote {
    /// It stands, at this timestamp.
    Promised(Timestamp),
    /// It will never be.
    Refused,
}

/// What one node says to another.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerMessage {
    /// Of consensus, see [`super::encode_message`].
    Raft {
        /// Of which split.
        split: SplitId,
        /// The message.
        message: Bytes,
    },
    /// A coordinator asks for a promise.
    Prepare {
        /// Of which split.
        split: SplitId,
        /// For which transaction.
        attempt: Attempt,
        /// The term in which it got its locks there, if it has read there.
        held: Option<u64>,
        /// What it writes there.
        writes: Vec<Mutation>,
        /// Who decides.
        coordinator: SplitId,
    },
    /// The answer.
    Vote {
        /// Of which split.
        split: SplitId,
        /// For which transaction.
        txn: TxnId,
        /// Who decides.
        coordinator: SplitId,
        /// The vote.
        vote: Vote,
    },
    /// A coordinator's decision.
    Decided {
        /// To which split.
        split: SplitId,
        /// Of which transaction.
        txn: TxnId,
        /// Who decided.
        coordinator: SplitId,
        /// How.
        outcome: Outcome,
    },
    /// A participant has logged the decision.
    Heard {
        /// Which one.
        split: SplitId,
        /// Of which transaction.
        txn: TxnId,
        /// Who decided.
        coordinator: SplitId,
    },
    /// A participant in doubt asks for the decision.
    Ask {
        /// Which one.
        split: SplitId,
        /// Of which transaction.
        txn: TxnId,
        /// Who decides.
        coordinator: SplitId,
    },
    /// An older transaction waits for what a participant has promised: unless all promises are there, this one waits for
    /// an older one itself, and ends.
    Wound {
        /// Which participant.
        split: SplitId,
        /// Of which transaction.
        txn: TxnId,
        /// Who decides.
        coordinator: SplitId,
    },
    /// A replica wants to show a moment.
    Close {
        /// Of which split.
        split: SplitId,
        /// Which moment.
        at: Timestamp,
    },
    /// Splits that the node knows of.
    Routes(Vec<Route>),
    /// From a node that has a replica of a split of which it is none any more, as far as it knows.
    Leaving {
        /// Which split.
        split: SplitId,
    },
    /// From a split's leader to a node that is none of the split's.
    Gone {
        /// Which split.
        split: SplitId,
        /// The leader's term.
        term: u64,
        /// Where its log ends.
        last: u64,
    },
    /// To the leader of a split that is to be part of the one to its left.
    Retire {
        /// Which.
        split: SplitId,
        /// Of which.
        into: SplitId,
    },
}

/// The bytes of a message.
pub fn encode_peer(message: &PeerMessage) -> Vec<u8> {
    use pb::Said;
    let said = match message {
        PeerMessage::Raft { split, message } => {
            Said::Raft(pb::Raft { split: split.0, message: message.clone() })
        }
        PeerMessage::Prepare { split, attempt, held, writes, coordinator } => Said::Prepare(pb::AskPromise {
            split: split.0,
            txn: Some((&attempt.txn).into()),
            first: attempt.age.first.0,
            client: attempt.age.client,
            attempt: attempt.age.attempt.0,
            held: *held,
            writes: writes.iter().map(Into::into).collect(),
            coordinator: coordinator.0,
        }),
        PeerMessage::Vote { split, txn, coordinator, vote } => Said::Vote(pb::Vote {
            about: Some(about(*split, *txn, *coordinator)),
            promised: match vote {
                Vote::Promised(at) => Some(at.0),
                Vote::Refused => None,
            },
        }),
        PeerMessage::Decided { split, txn, coordinator, outcome } => Said::Decided(pb::Decided {
            about: Some(about(*split, *txn, *coordinator)),
            committed: committed(*outcome),
        }),
        PeerMessage::Heard { split, txn, coordinator } => Said::Heard(about(*split, *txn, *coordinator)),
        PeerMessage::Ask { split, txn, coordinator } => Said::Ask(about(*split, *txn, *coordinator)),
        PeerMessage::Wound { split, txn, coordinator } => Said::Wound(about(*split, *txn, *coordinator)),
        PeerMessage::Close { split, at } => Said::Close(pb::Pair { split: split.0, number: at.0 }),
        PeerMessage::Routes(routes) => {
            Said::Routes(pb::Routes { routes: routes.iter().map(Into::into).collect() })
        }
        PeerMessage::Leaving { split } => Said::Leaving(pb::Pair { split: split.0, number: 0 }),
        PeerMessage::Gone { split, term, last } => {
            Said::Gone(pb::Gone { split: split.0, term: *term, last: *last })
        }
        PeerMessage::Retire { split, into } => Said::Retire(pb::Pair { split: split.0, number: into.0 }),
    };
    pb::Peer { said: Some(said) }.encode_to_vec()
}

/// A message of its bytes.
///
/// # Errors
///
/// When they are none.
pub fn decode_peer(bytes: Bytes) -> Result<PeerMessage, WireError> {
    use pb::Said;
    Ok(match pb::Peer::decode(bytes)?.said.ok_or(WireError::Field("message"))? {
        Said::Raft(raft) => PeerMessage::Raft { split: SplitId(raft.split), message: raft.message },
        Said::Prepare(ask) => PeerMessage::Prepare {
            split: SplitId(ask.split),
            attempt: Attempt { txn: txn(ask.txn)?, age: age(ask.first, ask.client, ask.attempt) },
            held: ask.held,
            writes: each(ask.writes)?,
            coordinator: SplitId(ask.coordinator),
        },
        Said::Vote(vote) => {
            let (split, txn, coordinator) = of(vote.about)?;
            let vote = vote.promised.map_or(Vote::Refused, |at| Vote::Promised(Timestamp(at)));
            PeerMessage::Vote { split, txn, coordinator, vote }
        }
        Said::Decided(decided) => {
            let (split, txn, coordinator) = of(decided.about)?;
            PeerMessage::Decided { split, txn, coordinator, outcome: outcome(decided.committed) }
        }
        Said::Heard(about) => {
            let (split, txn, coordinator) = of(Some(about))?;
            PeerMessage::Heard { split, txn, coordinator }
        }
        Said::Ask(about) => {
            let (split, txn, coordinator) = of(Some(about))?;
            PeerMessage::Ask { split, txn, coordinator }
        }
        Said::Wound(about) => {
            let (split, txn, coordinator) = of(Some(about))?;
            PeerMessage::Wound { split, txn, coordinator }
        }
        Said::Close(pair) => PeerMessage::Close { split: SplitId(pair.split), at: Timestamp(pair.number) },
        Said::Routes(routes) => PeerMessage::Routes(each(routes.routes)?),
        Said::Leaving(pair) => PeerMessage::Leaving { split: SplitId(pair.split) },
        Said::Gone(gone) => {
            PeerMessage::Gone { split: SplitId(gone.split), term: gone.term, last: gone.last }
        }
        Said::Retire(pair) => PeerMessage::Retire { split: SplitId(pair.split), into: SplitId(pair.number) },
    })
}

fn about(split: SplitId, txn: TxnId, coordinator: SplitId) -> pb::About {
    pb::About { split: split.0, txn: Some((&txn).into()), coordinator: coordinator.0 }
}

fn of(about: Option<pb::About>) -> Result<(SplitId, TxnId, SplitId), WireError> {
    let about = about.ok_or(WireError::Field("transaction"))?;
    Ok((SplitId(about.split), txn(about.txn)?, SplitId(about.coordinator)))
}

impl From<&Route> for pb::Route {
    fn from(route: &Route) -> Self {
        Self {
            split: route.split.0,
            range: Some((&route.range).into()),
            generation: route.generation,
            nodes: route.nodes.iter().map(|node| node.0).collect(),
            leader: route.leader.map(|node| node.0),
            term: route.term,
        }
    }
}

impl TryFrom<pb::Route> for Route {
    type Error = WireError;

    fn try_from(wire: pb::Route) -> Result<Self, WireError> {
        Ok(Self {
            split: SplitId(wire.split),
            range: wire.range.ok_or(WireError::Field("range"))?.try_into()?,
            generation: wire.generation,
            nodes: wire.nodes.into_iter().map(NodeId).collect(),
            leader: wire.leader.map(NodeId),
            term: wire.term,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

    use proptest::prelude::*;

    use super::*;
    use crate::{keys::Key, locks::Age};

    fn said() -> impl Strategy<Value = PeerMessage> {
        let txn =
            (any::<u64>(), any::<u64>()).prop_map(|(at, random)| TxnId { started: Timestamp(at), random });
        let id = || any::<u64>().prop_map(SplitId);
        let time = || any::<u64>().prop_map(Timestamp);
        (id(), txn, id(), time(), any::<Option<u64>>(), 0..14).prop_map(
            |(split, txn, coordinator, at, number, kind)| match kind {
                0 => PeerMessage::Raft { split, message: Bytes::from_static(b"raft") },
                1 => PeerMessage::Prepare {
                    split,
                    attempt: Attempt { txn, age: Age { first: at, client: 7, attempt: Reverse(8) } },
                    held: number,
                    writes: vec![Mutation { key: Key::new("t", b"a").unwrap(), value: None }],
                    coordinator,
                },
                2 => PeerMessage::Vote { split, txn, coordinator, vote: Vote::Promised(at) },
                3 => PeerMessage::Vote { split, txn, coordinator, vote: Vote::Refused },
                4 => PeerMessage::Decided { split, txn, coordinator, outcome: Outcome::Committed(at) },
                5 => PeerMessage::Decided { split, txn, coordinator, outcome: Outcome::Aborted },
                6 => PeerMessage::Heard { split, txn, coordinator },
                7 => PeerMessage::Ask { split, txn, coordinator },
                8 => PeerMessage::Close { split, at },
                9 => PeerMessage::Routes(vec![Route {
                    split,
                    range: Range::all(),
                    generation: at.0,
                    nodes: vec![NodeId(1), NodeId(2)],
                    leader: number.map(NodeId),
                    term: 3,
                }]),
                13 => PeerMessage::Wound { split, txn, coordinator },
                10 => PeerMessage::Leaving { split },
                11 => PeerMessage::Gone { split, term: at.0, last: coordinator.0 },
                _ => PeerMessage::Retire { split, into: coordinator },
            },
        )
    }

    proptest! {
        #[test]
        fn messages_come_back_as_they_went(message in said()) {
            prop_assert_eq!(decode_peer(encode_peer(&message).into()).unwrap(), message);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            decode_peer(bytes.into()).ok();
        }
    }
}
