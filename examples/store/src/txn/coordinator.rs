use std::collections::BTreeSet;

use super::SplitId;
use crate::truetime::Timestamp;

/// What the coordinator does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not all participants have answered.
    Pending,
    /// All have prepared: log the commit at this timestamp or later.
    Commit(Timestamp),
    /// One will not: log the abort.
    Abort,
}

/// The votes of one two-phase commit. Lost with its leader: what counts is in the logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coordinator {
    missing: BTreeSet<SplitId>,
    floor: Timestamp,
    refused: bool,
}

impl Coordinator {
    /// Waits for `participants`, the coordinator's own split not among them, in a commit that arrived at `arrival`.
    /// `arrival` is `TT.latest` of then: no transaction that was over by then can have a later timestamp.
    pub fn new(participants: impl IntoIterator<Item = SplitId>, arrival: Timestamp) -> Self {
        Self { missing: participants.into_iter().collect(), floor: arrival, refused: false }
    }

    /// `split` has logged its promise at `at`.
    pub fn prepared(&mut self, split: SplitId, at: Timestamp) -> Verdict {
        if self.missing.remove(&split) {
            self.floor = self.floor.max(at);
        }
        self.verdict()
    }

    /// A participant holds no locks for this transaction, or knows it as aborted.
    pub fn refused(&mut self) -> Verdict {
        self.refused = true;
        self.verdict()
    }

    /// What follows from the votes so far.
    pub fn verdict(&self) -> Verdict {
        if self.refused {
            Verdict::Abort
        } else if self.missing.is_empty() {
            Verdict::Commit(self.floor)
        } else {
            Verdict::Pending
        }
    }

    /// Who has not answered, to be asked again.
    pub fn missing(&self) -> impl Iterator<Item = SplitId> {
        self.missing.iter().copied()
    }
}
