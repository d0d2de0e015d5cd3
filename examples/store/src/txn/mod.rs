//! A transaction's life: what the log of a split records of it ([`Entry`]), what every replica makes of that
//! ([`Replica`]), what only the leader knows ([`Leader`]), and how splits come to one decision ([`Coordinator`]).
//!
//! The order of things, of which the proofs in the comments speak:
//!
//! 1. Reads take shared locks at each split's leader. The client keeps its writes to itself.
//! 2. Commit: each participant takes exclusive locks on what is written and logs [`Command::Prepare`] with a timestamp
//!    above anything it ever assigned, its reads beside its writes, so that a new leader takes both locks again.
//! 3. The coordinator, itself a split, picks `s` at or after every prepare timestamp, at or after `TT.latest` of the
//!    commit's arrival and after its own last, and logs [`Command::Commit`]. That entry *is* the decision.
//! 4. It waits for `TT.after(s)` while the log replicates, then tells client and participants. Locks go then.
//!
//! With one split there is no second step. Whoever has waited long for a decision asks the coordinator's split, which
//! logs an abort if it has none: the first of the two entries in that log wins.

mod coordinator;
mod leader;
mod outcomes;
mod replica;

use bytes::Bytes;

use crate::{
    keys::{Key, Range},
    lease::{Grant, NodeId},
    locks::Age,
    mvcc::{Mutation, Stretch},
    truetime::Timestamp,
};

pub use coordinator::{Coordinator, Verdict};
pub use leader::{IDLE, Leader, Refusal, Snapshot};
pub use replica::{Applied, Prepared, Replica, ReplicaError, State};
pub(crate) use replica::{FIRST_TERM, looks_at_rows};

/// One attempt of a transaction. The client makes it, so that it can ask how a commit ended whose answer was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TxnId {
    /// When the attempt began: outcomes older than what is kept are told apart from those that never were.
    pub started: Timestamp,
    /// Tells attempts apart that began together.
    pub random: u64,
}

impl TxnId {
    /// The least there is.
    pub const FIRST: Self = Self { started: Timestamp::ZERO, random: 0 };
}

/// One split of the sorted space, and the consensus group that keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SplitId(pub u64);

/// How a transaction ended. Never changes once a log has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All its writes are at this timestamp.
    Committed(Timestamp),
    /// None of them is anywhere.
    Aborted,
}

/// One entry of a split's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The term whose leader's locks it stands on. In a log of another term it would stand on nothing.
    pub term: u64,
    /// No transaction whose prepare or commit comes later in the log has a timestamp at or before this.
    pub closed: Timestamp,
    /// What happened.
    pub command: Command,
}

/// What a split's log records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing but the closed timestamp, which goes on without writes too.
    Close,
    /// A lease, begun or renewed.
    Lease(Grant),
    /// A commit of this split alone, or a coordinator's decision for all participants.
    Commit {
        /// The transaction.
        txn: TxnId,
        /// Its commit timestamp.
        at: Timestamp,
        /// What it writes in this split.
        writes: Vec<Mutation>,
        /// Who else has promised and must hear of it. Until they have, the outcome is not forgotten.
        participants: Vec<SplitId>,
    },
    /// Every participant of these has logged its outcome.
    Settled {
        /// Transactions decided here.
        txns: Vec<TxnId>,
    },
    /// A participant's promise to commit or abort as its coordinator says.
    Prepare {
        /// The transaction.
        txn: TxnId,
        /// What is promised.
        prepared: Prepared,
    },
    /// What a participant heard from the coordinator, or a coordinator's decision to abort.
    Resolve {
        /// The transaction.
        txn: TxnId,
        /// How it ended.
        outcome: Outcome,
    },
    /// Versions of long ago are forgotten.
    Collect {
        /// The earliest snapshot that stays.
        horizon: Timestamp,
        /// Which are looked at.
        stretch: Stretch,
    },
    /// Outcomes of long ago are forgotten.
    Forget {
        /// Those of attempts that began before this.
        outcomes: Timestamp,
    },
    /// How large the split is, as its leader has counted.
    Surveyed {
        /// Rows that exist.
        rows: u64,
        /// What their keys and values take.
        bytes: u64,
    },
    /// The holder of the lease lets go of it, as of the entry's closed timestamp: so that another need not wait for it
    /// to run out.
    Yield,
    /// The rows from `at` on are a split of their own from here on. Nothing is prepared then.
    Split {
        /// Where it begins.
        at: Key,
        /// Its number.
        right: SplitId,
        /// Who leads this one, and so that one at first.
        leader: NodeId,
    },
    /// This split serves nobody any more and waits to be absorbed. Nothing is prepared or unsettled then.
    Retire {
        /// The split to its left.
        into: SplitId,
    },
    /// Takes in the split to the right, which has retired and whose last lease is over.
    Absorb {
        /// Which.
        right: SplitId,
        /// Where it ended.
        end: Option<Bytes>,
    },
}

/// What a transaction asks of the locks of one split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// This attempt.
    pub txn: TxnId,
    /// The age of the work that it attempts.
    pub age: Age,
}

fn spans_of(writes: &[Mutation]) -> Vec<Range> {
    writes.iter().map(|write| Range::point(&write.key)).collect()
}

#[cfg(test)]
mod tests;
