//! Who may answer for a split without asking the others: the holder of a lease that the log grants, an interval of
//! TrueTime and not of ticks.
//!
//! A holder serves only while `TT.latest < end`; the next one begins only when `TT.after(end)`. As long as every clock
//! keeps its bound, no moment of true time has two, however long a node was paused or however its clock jumped.

use std::time::Duration;

use crate::truetime::{Interval, Timestamp};

/// How long a lease is granted for: how long a split is without a leader at most after its leader died.
pub const LEASE: Duration = Duration::from_secs(2);
/// A holder renews when less than this is left, which is time for some lost rounds of consensus.
pub const RENEW_WHEN_LEFT: Duration = Duration::from_secs(1);

/// A node of the universe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

/// A node's number is in the lower bits of its id; above it is how often its disk was replaced.
pub(crate) const NUMBER_MASK: u64 = 0xffff;

/// A node in one term that it leads. A node that leads again has forgotten what it assigned and showed before, so
/// to a lease it is another holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenure {
    /// The node.
    pub node: NodeId,
    /// The term.
    pub term: u64,
}

/// What the log is asked to grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Who will serve.
    pub holder: Tenure,
    /// Since when at the earliest.
    pub start: Timestamp,
    /// Until when, itself not in it.
    pub end: Timestamp,
}

/// Why the log does not grant a lease. Every replica comes to the same answer.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum LeaseError {
    /// Another holder's lease may not be over.
    #[error("the lease before it ends at {end}, which is not before {start}")]
    Overlaps {
        /// When the other lease ends.
        end: Timestamp,
        /// When the asked one was to begin.
        start: Timestamp,
    },
    /// A renewal that would end sooner, or a lease of no length.
    #[error("the lease would end at {0}, no later than it does")]
    Shrinks(Timestamp),
}

/// The lease of one split. Part of its replicated state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    granted: Option<Grant>,
}

impl Lease {
    /// What a leader would ask the log for now, or nothing if it must not or need not.
    pub fn wanted(&self, me: Tenure, now: Interval) -> Option<Grant> {
        let end = now.earliest.plus(LEASE);
        match self.granted {
            Some(held) if held.holder == me && !now.is_after(held.end) => {
                let soon = held.end.minus(RENEW_WHEN_LEFT) <= now.latest;
                (soon && end > held.end).then_some(Grant { holder: me, start: held.start, end })
            }
            Some(held) if !now.is_after(held.end) => None,
            _ => Some(Grant { holder: me, start: now.earliest, end }),
        }
    }

    /// Takes a grant out of the log.
    ///
    /// # Errors
    ///
    /// When it must not be: then nothing changes.
    pub fn grant(&mut self, grant: Grant) -> Result<(), LeaseError> {
        if let Some(held) = self.granted {
            let renewal = held.holder == grant.holder && held.start == grant.start;
            if renewal && grant.end <= held.end {
                return Err(LeaseError::Shrinks(grant.end));
            }
            if !renewal && grant.start <= held.end {
                return Err(LeaseError::Overlaps { end: held.end, start: grant.start });
            }
        }
        if grant.end <= grant.start {
            return Err(LeaseError::Shrinks(grant.end));
        }
        self.granted = Some(grant);
        Ok(())
    }

    /// The holder lets go as of `at`: it has assigned and shown nothing later, and will not serve again.
    pub fn yield_at(&mut self, at: Timestamp) {
        if let Some(held) = &mut self.granted {
            held.end = held.end.min(at.next().max(held.start.next()));
        }
    }

    /// The lease of a split that was cut off from one with this lease: of the same node in the first term that it can
    /// lead there, if it has it here.
    pub fn inherited(self, leader: Tenure, term: u64) -> Self {
        let granted = self.granted.map(|held| match held.holder == leader {
            true => Grant { holder: Tenure { node: leader.node, term }, ..held },
            false => held,
        });
        Self { granted }
    }

    /// A lease from a checkpoint.
    pub fn restore(granted: Option<Grant>) -> Self {
        Self { granted }
    }

    /// Whether `me` may answer now.
    pub fn serves(&self, me: Tenure, now: Interval) -> bool {
        self.granted
            .is_some_and(|held| held.holder == me && held.start <= now.earliest && now.is_before(held.end))
    }

    /// Whether `at` lies in `me`'s lease, so that no other holder ever assigns it.
    pub fn covers(&self, me: Tenure, at: Timestamp) -> bool {
        self.granted.is_some_and(|held| held.holder == me && held.start <= at && at < held.end)
    }

    /// Who has it and until when.
    pub fn granted(&self) -> Option<Grant> {
        self.granted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EPSILON: Duration = Duration::from_millis(5);
    const MS: u64 = 1_000_000;

    fn at(millis: u64) -> Interval {
        Interval::around(Timestamp(millis * MS), EPSILON)
    }

    fn holder(node: u64, term: u64) -> Tenure {
        Tenure { node: NodeId(node), term }
    }

    #[test]
    fn a_node_that_leads_again_waits_for_its_own_lease_too() {
        let mut lease = Lease::default();
        lease.grant(lease.wanted(holder(1, 1), at(1_000)).unwrap()).unwrap();
        let again = holder(1, 3);
        assert!(!lease.serves(again, at(1_100)) && !lease.covers(again, at(1_100).latest));
        assert_eq!(lease.wanted(again, at(2_900)), None);
        assert!(lease.wanted(again, at(3_001)).is_some());
    }

    #[test]
    fn a_paused_holder_stops_before_the_next_begins() {
        let (old, new) = (holder(1, 1), holder(2, 2));
        let mut lease = Lease::default();
        lease.grant(lease.wanted(old, at(1_000)).unwrap()).unwrap();
        assert!(lease.serves(old, at(1_010)) && lease.serves(old, at(2_989)));
        assert!(!lease.serves(old, at(2_990)) && !lease.serves(new, at(1_010)));
        assert_eq!(lease.wanted(new, at(3_000)), None);
        let next = lease.wanted(new, at(3_001)).unwrap();
        lease.grant(next).unwrap();
        assert!(!lease.serves(old, at(3_100)) && lease.serves(new, at(3_100)));
    }

    #[test]
    fn it_is_renewed_in_time_and_never_made_shorter() {
        let me = holder(1, 1);
        let mut lease = Lease::default();
        let first = lease.wanted(me, at(1_000)).unwrap();
        lease.grant(first).unwrap();
        assert_eq!(lease.wanted(me, at(1_500)), None);
        let renewed = lease.wanted(me, at(2_200)).unwrap();
        lease.grant(renewed).unwrap();
        assert_eq!(lease.grant(first), Err(LeaseError::Shrinks(first.end)));
        assert_eq!(lease.granted(), Some(renewed));
        let other = Grant { holder: holder(2, 2), start: renewed.end, end: renewed.end.plus(LEASE) };
        assert!(matches!(lease.grant(other), Err(LeaseError::Overlaps { .. })));
    }

    proptest! {
        /// True time goes on; each node reads it with an error within the bound; leases are granted late or not at all.
        #[test]
        fn no_two_serve_at_once(
            steps in prop::collection::vec((0u64..900, 0u64..6, -5i64..=5, any::<bool>()), 1..60),
        ) {
            let mut lease = Lease::default();
            let mut history = Vec::new();
            let mut truth = 10_000u64;
            let mut last: Option<(u64, Tenure)> = None;
            for (passed, node, error, arrives) in steps {
                truth += passed;
                let (me, now) = (holder(node % 3, node / 3), at(truth.saturating_add_signed(error)));
                if let Some(grant) = lease.wanted(me, now).filter(|_| arrives) {
                    lease.grant(grant).unwrap();
                    history.push(lease);
                }
                // A node may go by any lease that it has ever seen granted, not only by the newest.
                if history.iter().any(|seen| seen.serves(me, now)) {
                    let newest = lease.granted().unwrap();
                    prop_assert_eq!(newest.holder, me, "an older lease still serves");
                    if let Some((when, other)) = last {
                        prop_assert!(other == me || when < truth);
                    }
                    last = Some((truth, me));
                }
            }
        }
    }
}
