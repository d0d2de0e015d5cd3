//! The ledger: accounts, transfers and histories in redb, every value sealed.
//!
//! Row keys (account numbers, owners' names, transfer ids) are plain; what they point to is not.

use std::sync::Arc;

use redb::{Database, Durability, ReadableDatabase as _, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::seal::{DatabaseKey, SealError, Sealer};
use crate::wire::{
    Account, AccountId, AccountList, Amount, Direction, Entry, History, Memo, Owner, Transfer,
};

/// As much history as one page shows.
const HISTORY_ENTRIES_MAX: usize = 100;
const CURRENCY: &str = "EUR";
const FORMAT_VERSION: u32 = 1;

/// Rows of `key → sealed JSON`.
type Rows = TableDefinition<'static, &'static str, &'static [u8]>;
const ACCOUNTS: Rows = TableDefinition::new("accounts");
const OWNERS: Rows = TableDefinition::new("owners");
const TRANSFERS: Rows = TableDefinition::new("transfers");
/// Keyed `ACCOUNT/SEQUENCE`, the sequence in twenty digits so that text order is number order.
const HISTORY: Rows = TableDefinition::new("history");
const META: Rows = TableDefinition::new("meta");
const META_FORMAT: &str = "format";
const META_TOTALS: &str = "totals";

/// Number, owner, name and opening balance in cents of the accounts a new bank starts with.
const SEED: [(&str, &str, &str, i64); 4] = [
    ("17", "alice", "Everyday", 250_000),
    ("18", "alice", "Savings", 1_000_000),
    ("42", "bob", "Everyday", 180_000),
    ("43", "bob", "Savings", 500_000),
];

/// Why the ledger did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerError {
    #[error("there is no account {0}")]
    UnknownAccount(AccountId),
    #[error("both sides of the transfer are the same account")]
    SameAccount,
    #[error("the account does not hold that much")]
    InsufficientFunds,
    #[error("the receiving account cannot hold that much")]
    BalanceTooLarge,
    #[error("a different transfer was made under this id")]
    IdInUse,
    #[error("the database is sealed under another key")]
    WrongKey,
    #[error("the database was written in a format that this version does not know")]
    UnknownFormat,
    #[error("row {row} of table {table} cannot be read")]
    Row {
        table: String,
        row: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("a row cannot be written")]
    Write(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the database failed")]
    Store(#[source] Box<redb::Error>),
}

impl<E: Into<redb::Error>> From<E> for LedgerError {
    fn from(error: E) -> Self {
        Self::Store(Box::new(error.into()))
    }
}

/// Whether a transfer moved money now or had done so before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moved {
    Now,
    Before,
}

/// How many transfers were made, and their sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Totals {
    pub(crate) count: u64,
    pub(crate) total_cents: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct AccountRow {
    owner: Owner,
    name: String,
    balance_cents: i64,
    /// How many history entries it has; the next one's sequence number.
    entries: u64,
}

impl AccountRow {
    fn public(self, id: AccountId) -> Account {
        let Self { owner, name, balance_cents, .. } = self;
        Account { id, owner, name, balance_cents, currency: CURRENCY.to_owned() }
    }
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TransferRow {
    from: AccountId,
    to: AccountId,
    amount_cents: Amount,
    memo: Memo,
}

/// The open ledger. Its calls block on the disk: run them off the async threads.
#[derive(Debug)]
pub(crate) struct Ledger {
    database: Arc<Database>,
    sealer: Sealer,
}

impl Ledger {
    /// Opens the ledger under `key`; a new database is seeded.
    pub(super) fn open(database: Arc<Database>, key: &DatabaseKey) -> Result<Self, LedgerError> {
        let ledger = Self { database, sealer: Sealer::new(key) };
        let mut write = ledger.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        let fresh = {
            let mut meta = write.open_table(META)?;
            // A row that every ledger has and that only its key opens.
            match ledger.read_row::<u32>(META, &meta, META_FORMAT) {
                Ok(Some(FORMAT_VERSION)) => false,
                Ok(Some(_)) => return Err(LedgerError::UnknownFormat),
                Ok(None) => {
                    ledger.write_row(META, &mut meta, META_FORMAT, &FORMAT_VERSION)?;
                    ledger.write_row(META, &mut meta, META_TOTALS, &Totals::default())?;
                    true
                }
                Err(LedgerError::Row { source, .. }) if source.is::<SealError>() => {
                    return Err(LedgerError::WrongKey);
                }
                Err(error) => return Err(error),
            }
        };
        {
            // Opening creates, so that later reads find every table.
            let mut accounts = write.open_table(ACCOUNTS)?;
            let mut owners = write.open_table(OWNERS)?;
            write.open_table(TRANSFERS)?;
            write.open_table(HISTORY)?;
            if fresh {
                ledger.seed(&mut accounts, &mut owners)?;
            }
        }
        write.commit()?;
        Ok(ledger)
    }

    fn seed(
        &self,
        accounts: &mut redb::Table<'_, &'static str, &'static [u8]>,
        owners: &mut redb::Table<'_, &'static str, &'static [u8]>,
    ) -> Result<(), LedgerError> {
        for (id, owner, name, balance_cents) in SEED {
            let row = AccountRow {
                owner: Owner::try_from(owner.to_owned()).map_err(|error| LedgerError::Write(error.into()))?,
                name: name.to_owned(),
                balance_cents,
                entries: 0,
            };
            self.write_row(ACCOUNTS, accounts, id, &row)?;
            let mut ids: Vec<String> = self.read_row(OWNERS, owners, owner)?.unwrap_or_default();
            ids.push(id.to_owned());
            self.write_row(OWNERS, owners, owner, &ids)?;
        }
        Ok(())
    }

    /// The accounts of `owner`, in the order they were opened; none for a stranger.
    pub(crate) fn accounts_of(&self, owner: &Owner) -> Result<AccountList, LedgerError> {
        let read = self.database.begin_read()?;
        let ids: Vec<AccountId> =
            self.read_row(OWNERS, &read.open_table(OWNERS)?, owner.as_str())?.unwrap_or_default();
        let table = read.open_table(ACCOUNTS)?;
        let accounts =
            ids.into_iter().map(|id| self.read_account(&table, id)).collect::<Result<Vec<_>, _>>()?;
        Ok(AccountList { owner: owner.clone(), accounts })
    }

    /// One account.
    pub(crate) fn account(&self, id: &AccountId) -> Result<Account, LedgerError> {
        let read = self.database.begin_read()?;
        self.read_account(&read.open_table(ACCOUNTS)?, id.clone())
    }

    /// The newest entries of an account's history, newest first.
    pub(crate) fn history(&self, id: &AccountId) -> Result<History, LedgerError> {
        let read = self.database.begin_read()?;
        let account = self.read_account(&read.open_table(ACCOUNTS)?, id.clone())?;
        let table = read.open_table(HISTORY)?;
        let mut entries = Vec::new();
        for row in table.range(history_key(id, 0).as_str()..=history_key(id, u64::MAX).as_str())?.rev() {
            if entries.len() == HISTORY_ENTRIES_MAX {
                break;
            }
            let (key, value) = row?;
            entries.push(self.open_row::<Entry>(HISTORY, key.value(), value.value())?);
        }
        Ok(History { id: account.id, owner: account.owner, entries })
    }

    /// How many transfers were made, and their sum.
    pub(crate) fn totals(&self) -> Result<Totals, LedgerError> {
        let read = self.database.begin_read()?;
        Ok(self.read_row(META, &read.open_table(META)?, META_TOTALS)?.unwrap_or_default())
    }

    /// Moves money, once for each id: all of it is on disk when this returns, or nothing happened.
    pub(crate) fn transfer(&self, transfer: &Transfer, now_s: u64) -> Result<Moved, LedgerError> {
        let Transfer { id, from, to, amount_cents, memo } = transfer;
        if from == to {
            return Err(LedgerError::SameAccount);
        }
        let row = TransferRow {
            from: from.clone(),
            to: to.clone(),
            amount_cents: *amount_cents,
            memo: memo.clone(),
        };
        // redb has one writer at a time: what is read below stays true until the commit.
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        {
            let mut transfers = write.open_table(TRANSFERS)?;
            match self.read_row::<TransferRow>(TRANSFERS, &transfers, id.as_str())? {
                Some(made) if made == row => return Ok(Moved::Before),
                Some(_) => return Err(LedgerError::IdInUse),
                None => self.write_row(TRANSFERS, &mut transfers, id.as_str(), &row)?,
            }

            let mut accounts = write.open_table(ACCOUNTS)?;
            let mut history = write.open_table(HISTORY)?;
            for (this, other, direction) in [(from, to, Direction::Out), (to, from, Direction::In)] {
                let mut account: AccountRow = self
                    .read_row(ACCOUNTS, &accounts, this.as_str())?
                    .ok_or_else(|| LedgerError::UnknownAccount(this.clone()))?;
                account.balance_cents = after(account.balance_cents, direction, *amount_cents)?;
                let entry = Entry {
                    transfer: id.clone(),
                    direction,
                    other: other.clone(),
                    amount_cents: amount_cents.cents(),
                    balance_cents: account.balance_cents,
                    memo: memo.clone(),
                    time_s: now_s,
                };
                self.write_row(HISTORY, &mut history, &history_key(this, account.entries), &entry)?;
                account.entries += 1;
                self.write_row(ACCOUNTS, &mut accounts, this.as_str(), &account)?;
            }

            let mut meta = write.open_table(META)?;
            let mut totals: Totals = self.read_row(META, &meta, META_TOTALS)?.unwrap_or_default();
            totals.count += 1;
            // A sum over all time, for comparison only: it sticks at its end rather than fail a transfer.
            totals.total_cents = totals.total_cents.saturating_add(amount_cents.cents().unsigned_abs());
            self.write_row(META, &mut meta, META_TOTALS, &totals)?;
        }
        // Leaving early above dropped the transaction, which undoes it.
        write.commit()?;
        Ok(Moved::Now)
    }

    fn read_account(
        &self,
        table: &impl ReadableTable<&'static str, &'static [u8]>,
        id: AccountId,
    ) -> Result<Account, LedgerError> {
        let row: Option<AccountRow> = self.read_row(ACCOUNTS, table, id.as_str())?;
        match row {
            Some(row) => Ok(row.public(id)),
            None => Err(LedgerError::UnknownAccount(id)),
        }
    }

    fn read_row<T: DeserializeOwned>(
        &self,
        rows: Rows,
        table: &impl ReadableTable<&'static str, &'static [u8]>,
        key: &str,
    ) -> Result<Option<T>, LedgerError> {
        match table.get(key)? {
            Some(value) => self.open_row(rows, key, value.value()).map(Some),
            None => Ok(None),
        }
    }

    fn open_row<T: DeserializeOwned>(&self, rows: Rows, key: &str, sealed: &[u8]) -> Result<T, LedgerError> {
        let table = redb::TableHandle::name(&rows);
        let unreadable = |source| LedgerError::Row { table: table.to_owned(), row: key.to_owned(), source };
        let json = self.sealer.open(table, key, sealed).map_err(|error| unreadable(error.into()))?;
        serde_json::from_slice(&json).map_err(|error| unreadable(error.into()))
    }

    fn write_row<T: Serialize>(
        &self,
        rows: Rows,
        table: &mut redb::Table<'_, &'static str, &'static [u8]>,
        key: &str,
        value: &T,
    ) -> Result<(), LedgerError> {
        let json = serde_json::to_vec(value).map_err(|error| LedgerError::Write(error.into()))?;
        let sealed = self
            .sealer
            .seal(redb::TableHandle::name(&rows), key, &json)
            .map_err(|error| LedgerError::Write(error.into()))?;
        table.insert(key, sealed.as_slice())?;
        Ok(())
    }
}

fn history_key(account: &AccountId, sequence: u64) -> String {
    format!("{account}/{sequence:020}")
}

/// INVARIANT: a balance is never negative and never wraps.
fn after(balance_cents: i64, direction: Direction, amount: Amount) -> Result<i64, LedgerError> {
    match direction {
        Direction::Out => balance_cents
            .checked_sub(amount.cents())
            .filter(|left| *left >= 0)
            .ok_or(LedgerError::InsufficientFunds),
        Direction::In => balance_cents.checked_add(amount.cents()).ok_or(LedgerError::BalanceTooLarge),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zeroize::Zeroizing;

    use super::*;

    fn key(byte: u8) -> DatabaseKey {
        Zeroizing::new([byte; 32])
    }

    fn memory() -> Ledger {
        let database =
            Database::builder().create_with_backend(redb::backends::InMemoryBackend::new()).unwrap();
        Ledger::open(Arc::new(database), &key(1)).unwrap()
    }

    fn account(id: &str) -> AccountId {
        AccountId::try_from(id.to_owned()).unwrap()
    }

    fn transfer(id: &str, from: &str, to: &str, cents: i64) -> Transfer {
        serde_json::from_value(serde_json::json!({
            "id": id, "from": from, "to": to, "amount_cents": cents, "memo": "rent"
        }))
        .unwrap()
    }

    fn balance(ledger: &Ledger, id: &str) -> i64 {
        ledger.account(&account(id)).unwrap().balance_cents
    }

    fn sum(ledger: &Ledger) -> i64 {
        ["17", "18", "42", "43"].into_iter().map(|id| balance(ledger, id)).sum()
    }

    #[test]
    fn a_new_ledger_has_the_four_accounts() {
        let ledger = memory();
        let list = ledger.accounts_of(&Owner::try_from("alice".to_owned()).unwrap()).unwrap();
        let shown: Vec<_> = list.accounts.iter().map(|a| (a.id.as_str(), a.name.as_str())).collect();
        assert_eq!(shown, [("17", "Everyday"), ("18", "Savings")]);
        let stranger = ledger.accounts_of(&Owner::try_from("mallory".to_owned()).unwrap()).unwrap();
        assert!(stranger.accounts.is_empty());
    }

    #[test]
    fn a_transfer_shows_on_both_sides() {
        let ledger = memory();
        assert_eq!(ledger.transfer(&transfer("t1", "17", "42", 500), 7).unwrap(), Moved::Now);
        assert_eq!((balance(&ledger, "17"), balance(&ledger, "42")), (249_500, 180_500));
        let out = ledger.history(&account("17")).unwrap().entries.remove(0);
        assert_eq!((out.direction, out.other.as_str(), out.balance_cents), (Direction::Out, "42", 249_500));
        let into = ledger.history(&account("42")).unwrap().entries.remove(0);
        assert_eq!((into.direction, into.other.as_str(), into.time_s), (Direction::In, "17", 7));
        assert_eq!(ledger.totals().unwrap(), Totals { count: 1, total_cents: 500 });
    }

    #[test]
    fn the_same_id_moves_money_once_and_a_different_transfer_under_it_is_refused() {
        let ledger = memory();
        ledger.transfer(&transfer("t1", "17", "42", 500), 7).unwrap();
        assert_eq!(ledger.transfer(&transfer("t1", "17", "42", 500), 8).unwrap(), Moved::Before);
        let other = ledger.transfer(&transfer("t1", "17", "42", 501), 8);
        assert!(matches!(other, Err(LedgerError::IdInUse)), "{other:?}");
        assert_eq!(balance(&ledger, "42"), 180_500);
        assert_eq!(ledger.totals().unwrap().count, 1);
    }

    #[test]
    fn a_refused_transfer_leaves_no_trace() {
        let ledger = memory();
        for (bad, want) in [
            (transfer("a", "17", "99", 1), "there is no account 99"),
            (transfer("b", "99", "17", 1), "there is no account 99"),
            (transfer("c", "17", "17", 1), "both sides of the transfer are the same account"),
            (transfer("d", "17", "42", 250_001), "the account does not hold that much"),
            (transfer("e", "17", "42", i64::MAX), "the account does not hold that much"),
        ] {
            assert_eq!(ledger.transfer(&bad, 7).unwrap_err().to_string(), want);
        }
        assert_eq!(sum(&ledger), 1_930_000);
        assert!(ledger.history(&account("17")).unwrap().entries.is_empty());
        assert_eq!(ledger.totals().unwrap(), Totals::default());
        // The id of a refused transfer is free again.
        assert_eq!(ledger.transfer(&transfer("d", "17", "42", 1), 7).unwrap(), Moved::Now);
    }

    #[test]
    fn balances_end_at_their_bounds() {
        let amount = |cents| Amount::try_from(cents).unwrap();
        assert_eq!(after(5, Direction::Out, amount(5)).unwrap(), 0);
        assert!(matches!(after(5, Direction::Out, amount(6)), Err(LedgerError::InsufficientFunds)));
        assert!(matches!(after(1, Direction::In, amount(i64::MAX)), Err(LedgerError::BalanceTooLarge)));
    }

    #[test]
    fn history_is_newest_first_bounded_and_keeps_to_its_account() {
        let ledger = memory();
        for n in 0..u64::try_from(HISTORY_ENTRIES_MAX).unwrap() + 5 {
            ledger.transfer(&transfer(&format!("t{n}"), "17", "18", 1), n).unwrap();
        }
        let entries = ledger.history(&account("17")).unwrap().entries;
        assert_eq!(entries.len(), HISTORY_ENTRIES_MAX);
        assert_eq!(entries[0].time_s, 104);
        assert!(entries.windows(2).all(|pair| pair[0].time_s > pair[1].time_s));
        assert!(ledger.history(&account("42")).unwrap().entries.is_empty());
        assert!(matches!(ledger.history(&account("1")), Err(LedgerError::UnknownAccount(_))));
    }

    #[test]
    fn a_reopened_ledger_has_every_acknowledged_transfer_and_needs_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let open = |byte| {
            let database = Arc::new(crate::state::open(directory.path(), "accounts.redb").unwrap());
            Ledger::open(database, &key(byte))
        };
        open(1).unwrap().transfer(&transfer("t1", "17", "42", 500), 7).unwrap();
        assert!(matches!(open(2), Err(LedgerError::WrongKey)));
        let again = open(1).unwrap();
        assert_eq!((balance(&again, "17"), sum(&again)), (249_500, 1_930_000));
        assert_eq!(again.transfer(&transfer("t1", "17", "42", 500), 9).unwrap(), Moved::Before);
    }

    #[test]
    fn nothing_a_person_would_mind_is_readable_in_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let database = Arc::new(crate::state::open(directory.path(), "accounts.redb").unwrap());
        let ledger = Ledger::open(database, &key(1)).unwrap();
        ledger.transfer(&transfer("t1", "17", "42", 500), 7).unwrap();
        drop(ledger);
        let bytes = std::fs::read(directory.path().join("accounts.redb")).unwrap();
        let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(!holds("rent") && !holds("balance_cents") && !holds("Everyday"));
        assert!(holds("alice"), "row keys are plain: the test reads the right file");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn money_is_neither_made_nor_lost(
            moves in proptest::collection::vec((0..5_usize, 0..5_usize, 1..300_000_i64), 1..12)
        ) {
            let ids = ["17", "18", "42", "43", "99"];
            let ledger = memory();
            let mut made = 0;
            for (n, (from, to, cents)) in moves.into_iter().enumerate() {
                let outcome = ledger.transfer(&transfer(&format!("t{n}"), ids[from], ids[to], cents), 7);
                made += u64::from(outcome.is_ok());
                prop_assert_eq!(sum(&ledger), 1_930_000);
                prop_assert!(ids[..4].iter().all(|id| balance(&ledger, id) >= 0));
            }
            prop_assert_eq!(ledger.totals().unwrap().count, made);
        }
    }
}
