//! The journal: every transfer attempt, written before `accounts` is asked and again when it answered.

use redb::{Database, Durability, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::wire::{JournalTotals, TransferId, TransferOrder};

/// `id → JSON`. Attempts are kept for ever: a bank keeps its books.
const ATTEMPTS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("attempts");
/// The ids whose outcome is not known yet, so that a start need not read every attempt ever made.
const OPEN: TableDefinition<'static, &str, ()> = TableDefinition::new("open");
const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
const META_TOTALS: &str = "totals";

/// Where an attempt stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// Written down; `accounts` is being asked by this process.
    InFlight,
    /// `accounts` made it.
    Made,
    /// `accounts` (or a sidecar on the way) refused it: nothing moved.
    Refused,
    /// No answer came, or this process ended before one did.
    Unresolved,
}

#[derive(Debug, Serialize, Deserialize)]
struct Attempt {
    order: TransferOrder,
    outcome: Outcome,
    /// Seconds since the Unix epoch, when it was first written.
    time_s: u64,
}

/// Why the journal did not take an entry.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    #[error("a different transfer was ordered under this key")]
    KeyInUse,
    #[error("this transfer is being made right now")]
    InFlight,
    #[error("there is no attempt {0}")]
    Unknown(TransferId),
    #[error("a row of the journal cannot be read or written")]
    Row(#[source] serde_json::Error),
    #[error("the database failed")]
    Store(#[source] Box<redb::Error>),
}

impl<E: Into<redb::Error>> From<E> for JournalError {
    fn from(error: E) -> Self {
        Self::Store(Box::new(error.into()))
    }
}

/// What to do with an order that is now written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begun {
    /// Ask `accounts`.
    Ask,
    /// It was made before: say so.
    MadeBefore,
}

/// The open journal. Its calls block on the disk: run them off the async threads.
#[derive(Debug)]
pub(crate) struct Journal {
    database: Database,
}

impl Journal {
    /// Opens the journal. Attempts that an earlier process left in flight become unresolved; their
    /// number is in [`Journal::totals`].
    ///
    /// They are not driven again from here: a transfer is made for a person, and after a restart there
    /// is no request of that person's to make it for, hence no right to make it. Each was made once or
    /// not at all, because `accounts` moves money once for each id; the person (or their browser)
    /// repeating the order under the same key settles it, and until then `accounts`' reconciliation
    /// counts it as of unknown outcome.
    pub(crate) fn open(database: Database) -> Result<Self, JournalError> {
        let journal = Self { database };
        let write = journal.write()?;
        {
            let open = write.open_table(OPEN)?;
            let mut attempts = write.open_table(ATTEMPTS)?;
            let mut meta = write.open_table(META)?;
            let mut totals = read_totals(&meta)?;
            for row in open.iter()? {
                let id = row?.0.value().to_owned();
                let Some(mut attempt) = read_attempt(&attempts, &id)? else { continue };
                if attempt.outcome == Outcome::InFlight {
                    count(&mut totals, &attempt, -1);
                    attempt.outcome = Outcome::Unresolved;
                    count(&mut totals, &attempt, 1);
                    attempts.insert(id.as_str(), encode(&attempt)?.as_slice())?;
                }
            }
            meta.insert(META_TOTALS, encode(&totals)?.as_slice())?;
        }
        write.commit()?;
        Ok(journal)
    }

    /// Writes down that `accounts` is about to be asked. On disk when this returns.
    pub(crate) fn begin(
        &self,
        id: &TransferId,
        order: &TransferOrder,
        now_s: u64,
    ) -> Result<Begun, JournalError> {
        let write = self.write()?;
        {
            let mut attempts = write.open_table(ATTEMPTS)?;
            let mut meta = write.open_table(META)?;
            let mut totals = read_totals(&meta)?;
            let attempt = match read_attempt(&attempts, id.as_str())? {
                None => Attempt { order: order.clone(), outcome: Outcome::InFlight, time_s: now_s },
                Some(known) if known.order != *order => return Err(JournalError::KeyInUse),
                Some(Attempt { outcome: Outcome::Made, .. }) => return Ok(Begun::MadeBefore),
                Some(Attempt { outcome: Outcome::InFlight, .. }) => return Err(JournalError::InFlight),
                Some(mut known) => {
                    count(&mut totals, &known, -1);
                    known.outcome = Outcome::InFlight;
                    known
                }
            };
            count(&mut totals, &attempt, 1);
            attempts.insert(id.as_str(), encode(&attempt)?.as_slice())?;
            meta.insert(META_TOTALS, encode(&totals)?.as_slice())?;
            write.open_table(OPEN)?.insert(id.as_str(), ())?;
        }
        write.commit()?;
        Ok(Begun::Ask)
    }

    /// Writes down how it ended.
    pub(crate) fn end(&self, id: &TransferId, outcome: Outcome) -> Result<(), JournalError> {
        let write = self.write()?;
        {
            let mut attempts = write.open_table(ATTEMPTS)?;
            let mut meta = write.open_table(META)?;
            let mut totals = read_totals(&meta)?;
            let Some(mut attempt) = read_attempt(&attempts, id.as_str())? else {
                return Err(JournalError::Unknown(id.clone()));
            };
            count(&mut totals, &attempt, -1);
            attempt.outcome = outcome;
            count(&mut totals, &attempt, 1);
            attempts.insert(id.as_str(), encode(&attempt)?.as_slice())?;
            meta.insert(META_TOTALS, encode(&totals)?.as_slice())?;
            if matches!(outcome, Outcome::Made | Outcome::Refused) {
                write.open_table(OPEN)?.remove(id.as_str())?;
            }
        }
        write.commit()?;
        Ok(())
    }

    /// How many attempts ended how.
    pub(crate) fn totals(&self) -> Result<JournalTotals, JournalError> {
        read_totals(&self.database.begin_read()?.open_table(META)?)
    }

    fn write(&self) -> Result<redb::WriteTransaction, JournalError> {
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        Ok(write)
    }
}

fn encode(row: &impl Serialize) -> Result<Vec<u8>, JournalError> {
    serde_json::to_vec(row).map_err(JournalError::Row)
}

fn read_attempt(
    table: &impl redb::ReadableTable<&'static str, &'static [u8]>,
    id: &str,
) -> Result<Option<Attempt>, JournalError> {
    match table.get(id)? {
        Some(row) => serde_json::from_slice(row.value()).map(Some).map_err(JournalError::Row),
        None => Ok(None),
    }
}

fn read_totals(
    table: &impl redb::ReadableTable<&'static str, &'static [u8]>,
) -> Result<JournalTotals, JournalError> {
    match table.get(META_TOTALS)? {
        Some(row) => serde_json::from_slice(row.value()).map_err(JournalError::Row),
        None => Ok(JournalTotals::default()),
    }
}

/// Adds an attempt to the totals under its outcome, or takes it out.
fn count(totals: &mut JournalTotals, attempt: &Attempt, by: i64) {
    let counter = match attempt.outcome {
        Outcome::InFlight => &mut totals.in_flight,
        Outcome::Made => &mut totals.count,
        Outcome::Refused => &mut totals.refused,
        Outcome::Unresolved => &mut totals.unresolved,
    };
    *counter = counter.saturating_add_signed(by);
    if attempt.outcome == Outcome::Made {
        let cents = attempt.order.amount_cents.cents();
        totals.total_cents = totals.total_cents.saturating_add_signed(cents.saturating_mul(by));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(cents: i64) -> TransferOrder {
        serde_json::from_value(serde_json::json!({"from": "17", "to": "42", "amount_cents": cents})).unwrap()
    }

    fn id(name: &str) -> TransferId {
        TransferId::try_from(name.to_owned()).unwrap()
    }

    fn at(directory: &std::path::Path) -> Journal {
        Journal::open(crate::state::open(directory, "payments.redb").unwrap()).unwrap()
    }

    #[test]
    fn every_attempt_is_counted_under_its_outcome() {
        let directory = tempfile::tempdir().unwrap();
        let journal = at(directory.path());
        for (name, outcome) in
            [("a", Outcome::Made), ("b", Outcome::Refused), ("c", Outcome::Unresolved), ("d", Outcome::Made)]
        {
            assert_eq!(journal.begin(&id(name), &order(500), 7).unwrap(), Begun::Ask);
            assert_eq!(journal.totals().unwrap().in_flight, 1);
            journal.end(&id(name), outcome).unwrap();
        }
        let want = JournalTotals { count: 2, total_cents: 1000, refused: 1, in_flight: 0, unresolved: 1 };
        assert_eq!(journal.totals().unwrap(), want);
    }

    #[test]
    fn what_a_dead_process_left_in_flight_is_unresolved_and_can_be_settled() {
        let directory = tempfile::tempdir().unwrap();
        at(directory.path()).begin(&id("a"), &order(500), 7).unwrap();
        let journal = at(directory.path());
        assert_eq!(journal.totals().unwrap(), JournalTotals { unresolved: 1, ..JournalTotals::default() });
        // The same order under the same key goes through again, and settles.
        assert_eq!(journal.begin(&id("a"), &order(500), 9).unwrap(), Begun::Ask);
        journal.end(&id("a"), Outcome::Made).unwrap();
        drop(journal);
        let want = JournalTotals { count: 1, total_cents: 500, ..JournalTotals::default() };
        assert_eq!(at(directory.path()).totals().unwrap(), want);
    }

    #[test]
    fn a_key_stands_for_one_order_and_one_attempt_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let journal = at(directory.path());
        journal.begin(&id("a"), &order(500), 7).unwrap();
        assert!(matches!(journal.begin(&id("a"), &order(500), 7), Err(JournalError::InFlight)));
        assert!(matches!(journal.begin(&id("a"), &order(501), 7), Err(JournalError::KeyInUse)));
        journal.end(&id("a"), Outcome::Made).unwrap();
        assert_eq!(journal.begin(&id("a"), &order(500), 7).unwrap(), Begun::MadeBefore);
        assert!(matches!(journal.end(&id("b"), Outcome::Made), Err(JournalError::Unknown(_))));
        assert_eq!(journal.totals().unwrap().count, 1);
    }
}
