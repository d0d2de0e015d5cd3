//! What happens when a timestamp has passed: nobody hears of a commit before that.

use super::{Answer, Node, Refused};
use crate::{
    truetime::{Interval, Timestamp},
    txn::{SplitId, TxnId},
    wal::Disk,
};

/// What waits for a timestamp to pass.
pub(super) enum Due {
    /// A commit that this node coordinates.
    Commit(SplitId, TxnId),
    /// Locks of a transaction that has ended.
    Release(SplitId, TxnId),
    /// An answer that shows what was committed then.
    Answer(u64, Result<Answer, Refused>),
}

impl<D: Disk> Node<D> {
    /// Does `due` as soon as `at` has passed for certain.
    pub(super) fn after(&mut self, at: Timestamp, due: Due) {
        self.dues += 1;
        self.due.insert((at, self.dues), due);
    }

    /// Does everything whose time has passed.
    pub(super) fn pass(&mut self, now: Interval) {
        while let Some(first) = self.due.first_entry() {
            if !now.is_after(first.key().0) {
                return;
            }
            match first.remove() {
                Due::Commit(split, txn) => self.tell(split, txn),
                Due::Release(split, txn) => self.release(split, txn),
                Due::Answer(token, answer) => self.answer(token, answer),
            }
        }
    }

    /// Lets go of the locks of a transaction that has ended.
    pub(super) fn release(&mut self, split: SplitId, txn: TxnId) {
        let changes = self.led(split).map(|(leader, _)| leader.release(txn));
        self.absorb(split, changes.unwrap_or_default());
    }
}
