//! What a node can be asked, and what it says.

use std::time::Duration;

use bytes::Bytes;

use crate::{
    keys::{Key, Range},
    lease::NodeId,
    mvcc::Mutation,
    truetime::Timestamp,
    txn::{Attempt, SplitId, TxnId},
};

/// Locks that a transaction holds at one split, by the term of the leader that gave them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// The split.
    pub split: SplitId,
    /// The term.
    pub term: u64,
}

/// Which moment a snapshot shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Everything that was committed before the request.
    Now,
    /// This one.
    Exactly(Timestamp),
    /// The newest that the replica has, if it is no older than that.
    Within(Duration),
}

/// What a node can be asked.
#[derive(Clone, Debug)]
pub enum Request {
    /// Rows under shared locks. Answered by [`Answer::Rows`].
    Read {
        /// Whose.
        attempt: Attempt,
        /// Where it holds locks so far.
        held: Vec<Held>,
        /// Which, all of splits led here.
        keys: Vec<Key>,
    },
    /// A range under a shared lock, up to the end of the split that it begins in. Answered by [`Answer::Scanned`].
    Scan {
        /// Whose.
        attempt: Attempt,
        /// Where it holds locks so far.
        held: Vec<Held>,
        /// Which.
        range: Range,
        /// At most so many rows.
        limit: usize,
    },
    /// The end of a transaction: all writes or none. Answered by [`Answer::Committed`].
    Commit {
        /// Whose.
        attempt: Attempt,
        /// Where it holds locks.
        held: Vec<Held>,
        /// What is written. The first row's split coordinates.
        writes: Vec<Mutation>,
        /// `TT.latest` at this node when the request came: its timestamp must not be before that, and while it waits to
        /// be taken, this time passes already. [`Timestamp::MAX`]: it has not waited.
        arrived: Timestamp,
    },
    /// The end of a transaction without a trace. Answered by [`Answer::Done`].
    Rollback {
        /// Whose.
        txn: TxnId,
    },
    /// Rows at one moment. Answered by [`Answer::Rows`].
    SnapshotRead {
        /// Which, all of splits that this node has.
        keys: Vec<Key>,
        /// As they were when.
        moment: Moment,
    },
    /// A range at one moment, up to the end of the split that it begins in. Answered by [`Answer::Scanned`].
    SnapshotScan {
        /// Which.
        range: Range,
        /// As it was when.
        moment: Moment,
        /// At most so many rows.
        limit: usize,
    },
    /// The splits that this node knows of. Answered by [`Answer::Splits`].
    Splits,
    /// How this node is. Answered by [`Answer::Status`].
    Status,
    /// Cuts a split in two. Answered by [`Answer::Split`].
    Split {
        /// Which.
        split: SplitId,
        /// Where the right half begins, or in the middle.
        at: Option<Key>,
    },
    /// Takes the split to the right of `split` into it. Answered by [`Answer::Done`].
    Merge {
        /// The left one.
        split: SplitId,
    },
    /// Moves a replica. Answered by [`Answer::Done`].
    Move {
        /// Of which split.
        split: SplitId,
        /// Away from.
        from: NodeId,
        /// To.
        to: NodeId,
    },
    /// Hands over leadership. Answered by [`Answer::Done`].
    Lead {
        /// Of which split.
        split: SplitId,
        /// To whom.
        node: NodeId,
    },
}

impl Request {
    /// What it brings to be written.
    pub fn bytes(&self) -> usize {
        let Self::Commit { writes, .. } = self else { return 0 };
        let bytes =
            |write: &Mutation| write.key.as_bytes().len() + write.value.as_ref().map_or(0, Bytes::len);
        writes.iter().map(bytes).sum()
    }
}

/// A row that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which.
    pub key: Key,
    /// What is in it.
    pub value: Option<Bytes>,
    /// Since when, or zero where nobody ever wrote it.
    pub version: Timestamp,
}

impl Found {
    /// What it holds, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.value.as_ref().map_or(0, Bytes::len)
    }
}

/// What a node says.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Rows, one for each asked for.
    Rows {
        /// The rows.
        rows: Vec<Found>,
        /// The moment shown; of a locked read nothing.
        at: Timestamp,
        /// The locks that the transaction has now, of a locked read.
        held: Vec<Held>,
    },
    /// Rows of a range.
    Scanned {
        /// The rows.
        rows: Vec<Found>,
        /// The moment shown; of a locked scan nothing.
        at: Timestamp,
        /// The locks that the transaction has now, of a locked scan.
        held: Vec<Held>,
        /// What of the range is left to ask for: after the limit, or from the next split on.
        rest: Option<Range>,
    },
    /// All is written.
    Committed {
        /// When.
        at: Timestamp,
    },
    /// The splits that this node knows of, in order.
    Splits(Vec<SplitView>),
    /// How this node is.
    Status(Box<NodeStatus>),
    /// The right half of a split.
    Split {
        /// Its number.
        right: SplitId,
    },
    /// It is done.
    Done,
}

/// A split as a node knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitView {
    /// Its number.
    pub id: SplitId,
    /// What it holds.
    pub range: Range,
    /// Goes up with each change of its range or nodes.
    pub generation: u64,
    /// The nodes that have it.
    pub nodes: Vec<NodeId>,
    /// The node that leads it, as far as is known.
    pub leader: Option<NodeId>,
    /// Rows and bytes, where this node has it.
    pub size: Option<(u64, u64)>,
    /// Requests in the last second, where this node leads it.
    pub load: Option<u64>,
}

/// How a node is. Counters count since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeStatus {
    /// Half the width of its clock's interval.
    pub epsilon: Duration,
    /// Splits here.
    pub splits: usize,
    /// Splits led here.
    pub leads: usize,
    /// Transactions committed here as the coordinator.
    pub commits: u64,
    /// Of those, across splits.
    pub commits_across: u64,
    /// Attempts ended by an older transaction.
    pub wounded: u64,
    /// How long commits had to wait for their timestamps to pass, in all.
    pub commit_wait: Duration,
    /// How much of that passed while the log replicated.
    pub commit_wait_hidden: Duration,
    /// Promises whose coordinator has not been heard.
    pub in_doubt: usize,
    /// Snapshots answered.
    pub snapshot_reads: u64,
    /// Synced writes of the log.
    pub log_syncs: u64,
    /// Bytes of the log that are kept.
    pub log_bytes: u64,
}

/// Why a node does not do as asked. Nothing was changed, unless it says that it may have been.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    /// Ask the leader. Temporary.
    #[error("this node does not lead the split now{}", hint(*.leader))]
    NotLeader {
        /// Who does, as far as is known.
        leader: Option<NodeId>,
    },
    /// Keys of splits that are elsewhere, or of more than one. Temporary: ask for the splits again.
    #[error("this node does not have that split{}", hint(*.leader))]
    NotHere {
        /// Who leads it, as far as is known.
        leader: Option<NodeId>,
    },
    /// A wait took too long, or a change of the split is under way. Temporary.
    #[error("the split is busy: {0}")]
    Busy(&'static str),
    /// The transaction's locks are lost. Begin again with the same age.
    #[error("the transaction was ended by an older one or by a change of leader; begin again with its age")]
    Aborted,
    /// The transaction was rolled back, or ended otherwise, before.
    #[error("the transaction has ended already, without a commit")]
    Ended,
    /// A commit or a change whose end is not known. A commit that is sent again has an answer.
    #[error("it may or may not have happened; of a commit, send it again to hear")]
    Unknown,
    /// A moment that has not come.
    #[error("the snapshot at {asked} is in the future: it is {latest} at the latest")]
    Future {
        /// Asked for.
        asked: Timestamp,
        /// What time it can be at most.
        latest: Timestamp,
    },
    /// A moment whose versions are forgotten.
    #[error("the snapshot at {asked} is gone: versions are kept since {kept_since}")]
    Collected {
        /// Asked for.
        asked: Timestamp,
        /// The earliest there is.
        kept_since: Timestamp,
    },
    /// No replica here is as fresh as asked for. Temporary.
    #[error("this replica is at {safe} and so too old; ask the leader{}", hint(*.leader))]
    TooStale {
        /// How fresh it is.
        safe: Timestamp,
        /// Who leads, as far as is known.
        leader: Option<NodeId>,
    },
    /// Over a limit.
    #[error("{0}")]
    TooMuch(String),
    /// What an operator asked for cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The clock has no bound, so that this node cannot lead. Temporary, it is hoped.
    #[error("this node's clock has no known bound: {0}")]
    NoClock(String),
}

fn hint(leader: Option<NodeId>) -> String {
    leader.map(|leader| format!("; node {} does", leader.0)).unwrap_or_default()
}
