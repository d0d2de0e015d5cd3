//! The timer that compares our transfers with what `payments` has journalled, on nobody's behalf.

use std::sync::Arc;
use std::time::Duration;

use super::ledger::{Ledger, Totals};
use crate::call::{Sidecar, Trace};
use crate::wire::JournalTotals;

/// What the comparison says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    /// The same count and sum.
    Same,
    /// Apart by no more than what `payments` says it does not know the outcome of.
    Explained,
    /// Apart by more: somebody moved money past the journal, or the journal lost or made up a transfer.
    Apart,
}

/// Compares every `interval`, for ever, and logs what it finds.
pub(super) async fn run(ledger: &Arc<Ledger>, payments: &Sidecar, interval: Duration) {
    let mut ticks = tokio::time::interval(interval.max(SHORTEST_INTERVAL));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first tick is at once; the others may still be starting.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        once(ledger, payments).await;
    }
}

/// tokio refuses an interval of zero, and a comparison is a call.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

async fn once(ledger: &Arc<Ledger>, payments: &Sidecar) {
    let Some(before) = own_totals(ledger).await else { return };
    let Some(theirs) = journal_totals(payments).await else { return };
    let Some(after) = own_totals(ledger).await else { return };

    let (ours_count, theirs_count) = (after.count, theirs.count);
    let open = theirs.open();
    match compare(before, theirs, after) {
        Comparison::Same => tracing::info!(ours_count, theirs_count, "reconciliation: the journal matches"),
        Comparison::Explained => tracing::info!(
            ours_count,
            theirs_count,
            open,
            "reconciliation: the journal matches but for transfers under way or of unknown outcome"
        ),
        Comparison::Apart => tracing::error!(
            ours_count,
            theirs_count,
            ours_cents = after.total_cents,
            theirs_cents = theirs.total_cents,
            open,
            "reconciliation: the journal does NOT match"
        ),
    }
}

async fn own_totals(ledger: &Arc<Ledger>) -> Option<Totals> {
    let ledger = Arc::clone(ledger);
    match tokio::task::spawn_blocking(move || ledger.totals()).await {
        Ok(Ok(totals)) => return Some(totals),
        Ok(Err(error)) => tracing::error!(%error, "reconciliation: our own totals cannot be read"),
        Err(error) => tracing::error!(%error, "reconciliation: reading our own totals panicked"),
    }
    None
}

async fn journal_totals(payments: &Sidecar) -> Option<JournalTotals> {
    match payments.get("/journal/totals", &Trace::none()).await {
        Ok(answer) if answer.status.is_success() => match answer.json() {
            Ok(totals) => return Some(totals),
            Err(error) => tracing::warn!(%error, "reconciliation: payments' totals cannot be read"),
        },
        Ok(answer) => tracing::warn!(status = %answer.status, "reconciliation: payments refused its totals"),
        Err(error) => tracing::warn!(%error, "reconciliation: payments cannot be asked"),
    }
    None
}

/// Compares our totals from just before and just after asking with the journal's.
///
/// Transfers go on meanwhile, so equality is not owed; this is. What the journal calls made was made by
/// the time we read `after`. What we had made at `before` is either made or open in the journal.
fn compare(before: Totals, theirs: JournalTotals, after: Totals) -> Comparison {
    if after.count == theirs.count && after.total_cents == theirs.total_cents {
        return Comparison::Same;
    }
    let claims_too_much = theirs.count > after.count || theirs.total_cents > after.total_cents;
    let knows_too_little = before.count > theirs.count.saturating_add(theirs.open());
    // As many made and none open, but not the same sum.
    let differs =
        theirs.open() == 0 && before.count == theirs.count && before.total_cents != theirs.total_cents;
    if claims_too_much || knows_too_little || differs { Comparison::Apart } else { Comparison::Explained }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(count: u64, total_cents: u64) -> Totals {
        Totals { count, total_cents }
    }

    fn theirs(count: u64, total_cents: u64, unresolved: u64) -> JournalTotals {
        JournalTotals { count, total_cents, unresolved, ..JournalTotals::default() }
    }

    fn at_rest(ours: Totals, theirs: JournalTotals) -> Comparison {
        compare(ours, theirs, ours)
    }

    #[test]
    fn only_transfers_of_unknown_outcome_explain_a_difference() {
        assert_eq!(at_rest(ours(3, 30), theirs(3, 30, 0)), Comparison::Same);
        assert_eq!(at_rest(ours(3, 30), theirs(3, 30, 2)), Comparison::Same);
        assert_eq!(at_rest(ours(3, 30), theirs(2, 20, 1)), Comparison::Explained);
        assert_eq!(at_rest(ours(3, 30), theirs(2, 20, 0)), Comparison::Apart);
        assert_eq!(at_rest(ours(4, 40), theirs(2, 20, 1)), Comparison::Apart);
        // The journal claims what never happened.
        assert_eq!(at_rest(ours(2, 20), theirs(3, 30, 1)), Comparison::Apart);
        // As many, but not the same.
        assert_eq!(at_rest(ours(3, 31), theirs(3, 30, 0)), Comparison::Apart);
    }

    #[test]
    fn transfers_made_while_asking_are_no_alarm() {
        let (before, after) = (ours(3, 30), ours(5, 50));
        assert_eq!(compare(before, theirs(4, 40, 0), after), Comparison::Explained);
        assert_eq!(compare(before, theirs(3, 30, 0), after), Comparison::Explained);
        assert_eq!(compare(before, theirs(2, 20, 0), after), Comparison::Apart);
        assert_eq!(compare(before, theirs(6, 60, 0), after), Comparison::Apart);
    }
}
