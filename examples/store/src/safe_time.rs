//! Up to which timestamp a replica can show snapshots: everything that will ever be committed at or before it is
//! already there (Spanner, OSDI 2012, section 4.1.3).
//!
//! `t_safe = min(closed, min(prepared) − 1)`: the leader closes timestamps in the log itself, so a closed timestamp holds
//! at the log position that carries it and at no earlier one, and a transaction that is prepared may still commit at
//! its prepare timestamp or later.

use std::collections::BTreeMap;

use crate::{keys::Range, truetime::Timestamp, txn::TxnId};

/// What bounds the snapshots of one replica. Part of its replicated state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SafeTime {
    closed: Timestamp,
    prepared: BTreeMap<TxnId, (Timestamp, Vec<Range>)>,
}

impl SafeTime {
    /// The log says that no transaction prepared after this position commits at or before `at`.
    pub fn close(&mut self, at: Timestamp) {
        self.closed = self.closed.max(at);
    }

    /// A transaction will write in `spans` at `at` or later, or not at all.
    pub fn prepare(&mut self, txn: TxnId, at: Timestamp, spans: Vec<Range>) {
        self.prepared.insert(txn, (at, spans));
    }

    /// What it wrote is there, or will never be.
    pub fn resolve(&mut self, txn: TxnId) {
        self.prepared.remove(&txn);
    }

    /// What the log has closed so far.
    pub fn closed(&self) -> Timestamp {
        self.closed
    }

    /// The latest snapshot that is whole everywhere.
    pub fn safe(&self) -> Timestamp {
        self.bound(|_| true)
    }

    /// The latest snapshot that is whole within `range`: a prepared transaction holds up only what it writes.
    pub fn safe_within(&self, range: &Range) -> Timestamp {
        self.bound(|spans| spans.iter().any(|span| span.overlaps(range)))
    }

    fn bound(&self, counts: impl Fn(&[Range]) -> bool) -> Timestamp {
        let prepared = self.prepared.values().filter(|(_, spans)| counts(spans)).map(|(at, _)| at.before());
        prepared.min().map_or(self.closed, |first| first.min(self.closed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Key;

    fn txn(number: u64) -> TxnId {
        TxnId { started: Timestamp(number), random: number }
    }

    #[test]
    fn a_prepared_transaction_holds_up_what_it_writes() {
        let row = |row: &[u8]| Range::point(&Key::new("t", row).unwrap());
        let mut safe = SafeTime::default();
        safe.close(Timestamp(10));
        safe.prepare(txn(1), Timestamp(11), vec![row(b"a")]);
        safe.prepare(txn(2), Timestamp(15), vec![row(b"b")]);
        safe.close(Timestamp(20));
        assert_eq!(safe.safe(), Timestamp(10));
        assert_eq!(safe.safe_within(&row(b"b")), Timestamp(14));
        assert_eq!(safe.safe_within(&row(b"c")), Timestamp(20));
        safe.resolve(txn(1));
        assert_eq!(safe.safe(), Timestamp(14));
        safe.resolve(txn(2));
        safe.close(Timestamp(5));
        assert_eq!(safe.safe(), Timestamp(20));
    }
}
