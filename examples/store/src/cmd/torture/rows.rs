//! The rows that the clients work on, and their names in the history.
//!
//! Keys sort the same as rows of the store and as text of the history, because a scan's bounds are compared as text
//! there: numbers in them all have three digits.

use bytes::Bytes;
use store::keys::{Key, Part, encode_row};

/// Accounts, whose sum no transfer changes.
pub(crate) const ACCOUNTS: u64 = 16;
/// What each begins with: so much that balances hardly ever repeat, and all together still exact as a double.
pub(crate) const BALANCE: i64 = 1 << 48;
/// What all of them hold together, at all times.
pub(crate) const TOTAL: i64 = 16 * BALANCE;
/// Lists that are appended to at a time.
pub(crate) const LANES: u64 = 8;
/// After so many elements a lane goes on with a new list: every read carries the whole list.
pub(crate) const LIST_LENGTH: u64 = 40;
/// Pairs of rows of which a transaction reads both and writes one.
pub(crate) const PAIRS: u64 = 12;
/// Rows that come and go.
pub(crate) const ITEMS: u64 = 120;
/// How many of them a scan covers.
pub(crate) const ITEMS_SCANNED: u64 = 15;
/// Rows that are written without being read.
pub(crate) const REGISTERS: u64 = 40;

/// The first number of three digits.
const FIRST: u64 = 100;

/// A table and what its keys are made of: true for a number, false for text.
pub(crate) const TABLES: [(&str, &[bool]); 6] = [
    ("acct", &[true]),
    ("list", &[true, true]),
    ("pair", &[true, false]),
    ("item", &[true]),
    ("mark", &[true]),
    ("reg", &[true]),
];

/// An account.
pub(crate) fn account(number: u64) -> String {
    numbered("acct", number % ACCOUNTS)
}

/// All accounts.
pub(crate) fn accounts() -> Vec<String> {
    (0..ACCOUNTS).map(account).collect()
}

/// A lane's list.
pub(crate) fn list(lane: u64, generation: u64) -> String {
    format!("list/{}/{generation}", FIRST + lane % LANES)
}

/// One side of a pair.
pub(crate) fn pair(number: u64, side: char) -> String {
    format!("pair/{}/{side}", FIRST + number % PAIRS)
}

/// A row that comes and goes.
pub(crate) fn item(number: u64) -> String {
    numbered("item", number % ITEMS)
}

/// Who wrote or deleted an item last. A deleted row does not say by whom it was, and a deletion that nobody knows the
/// end of would look like a row that was lost.
pub(crate) fn mark(item: &str) -> String {
    item.replace("item/", "mark/")
}

/// A row that is only written.
pub(crate) fn register(number: u64) -> String {
    numbered("reg", number % REGISTERS)
}

/// Whether a row's value is a list.
pub(crate) fn is_list(name: &str) -> bool {
    name.starts_with("list/")
}

fn numbered(table: &str, number: u64) -> String {
    format!("{table}/{}", FIRST + number)
}

/// A name's table and key.
pub(crate) fn table_and_key(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or((name, ""))
}

/// Where a row is among all rows: as the store sorts them.
pub(crate) fn sorted(name: &str) -> Bytes {
    let (table, key) = table_and_key(name);
    let parts: Vec<_> = key
        .split('/')
        .map(|part| part.parse().map_or_else(|_| Part::Text(part.to_owned()), Part::Int))
        .collect();
    // None of the names here are over a limit.
    Key::new(table, &encode_row(&parts)).map(|key| key.as_bytes().clone()).unwrap_or_default()
}

/// Neighbouring rows of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// The table.
    pub(crate) table: &'static str,
    /// The first key, or empty for the table's first.
    pub(crate) from: String,
    /// The key after the last, or empty for the table's end.
    pub(crate) to: String,
}

impl Span {
    /// All rows of a table.
    pub(crate) fn table(table: &'static str) -> Self {
        Self { table, from: String::new(), to: String::new() }
    }

    /// Some items, from this one on.
    pub(crate) fn items(first: u64) -> Self {
        let first = first % (ITEMS - ITEMS_SCANNED);
        let key = |number: u64| (FIRST + number).to_string();
        Self { table: "item", from: key(first), to: key(first + ITEMS_SCANNED) }
    }

    /// Where it begins, in the history's text.
    pub(crate) fn low(&self) -> String {
        format!("{}/{}", self.table, self.from)
    }

    /// Where it ends, in the history's text.
    pub(crate) fn high(&self) -> String {
        // `0` comes right after `/`: past every row of the table.
        if self.to.is_empty() { format!("{}0", self.table) } else { format!("{}/{}", self.table, self.to) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_holds_its_rows_as_text() {
        let span = Span::items(7);
        let held = (0..ITEMS).map(item).filter(|row| *row >= span.low() && *row < span.high());
        assert_eq!(held.collect::<Vec<_>>(), (7..7 + ITEMS_SCANNED).map(item).collect::<Vec<_>>());
        let all = Span::table("acct");
        assert!(accounts().iter().all(|row| *row >= all.low() && *row < all.high()));
        assert!(!(0..ITEMS).map(item).any(|row| row >= all.low() && row < all.high()));
    }

    #[test]
    fn names_sort_as_rows_do() {
        let names: Vec<_> = (0..ITEMS).map(item).chain((0..PAIRS).map(|n| pair(n, 'b'))).collect();
        let sorted: Vec<_> = names.iter().map(|name| sorted(name)).collect();
        assert!(sorted.is_sorted() && names.is_sorted());
        assert!(!sorted.contains(&Bytes::new()));
    }

    #[test]
    fn the_total_is_exact_as_a_double() {
        const { assert!(TOTAL < 1 << 53) };
        assert_eq!(TOTAL, i64::try_from(ACCOUNTS).unwrap() * BALANCE);
    }
}
