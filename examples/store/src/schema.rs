//! What is between the names that requests use and the keys that sort: a table's rows by text, canonical in both
//! directions. How keys are written is the contract's and so the client crate's; here it meets [`keys`].

use store_client as client;
use store_client::{NameError, Table};

use crate::keys::{self, Key, KeyError, Part, ROW_KEY_BYTES_MAX, Range};

/// A row's key is shorter than the longest by as much as it takes to write where the next row could be.
pub const KEY_BYTES_MAX: usize = ROW_KEY_BYTES_MAX - 2;

/// Ends a table's name in a key.
const TABLE_END: u8 = 0;

/// Why a name is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SchemaError {
    /// It is not written as it is to be.
    #[error(transparent)]
    Name(#[from] NameError),
    /// It cannot be sorted.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// It is over the limit.
    #[error("a key of {0} bytes, as sorted, is over the limit of {KEY_BYTES_MAX}")]
    TooLong(usize),
}

/// The key of the row of `table` that is written `text`.
///
/// # Errors
///
/// When it is not the one way to write a row of this table.
pub fn key_of(table: &Table, text: &str) -> Result<Key, SchemaError> {
    let place = table.place(text)?;
    let row = place.len().saturating_sub(table.name().len() + 1);
    if row > KEY_BYTES_MAX {
        return Err(SchemaError::TooLong(row));
    }
    Ok(Key::decode(place.into())?)
}

/// The keys in a range of `table`.
///
/// # Errors
///
/// When a bound is not written as it is to be, or no row can be in it.
pub fn range_of(table: &Table, range: &client::Range) -> Result<Range, SchemaError> {
    let (from, to) = table.bounds(range)?;
    Ok(Range::rows(table.name(), &from, &to.unwrap_or_default())?)
}

/// How a row's key is written. Nothing where no row of parts has it.
pub fn text_of(key: &Key) -> Option<String> {
    text_of_row(key.row())
}

fn text_of_row(row: &[u8]) -> Option<String> {
    Some(client::key(&named(keys::decode_row(row)?)))
}

fn named(parts: Vec<Part>) -> Vec<client::Part> {
    parts
        .into_iter()
        .map(|part| match part {
            Part::Int(value) => client::Part::Int(value),
            Part::Text(text) => client::Part::Text(text),
        })
        .collect()
}

/// How to write where the rest of a range begins, as `from` of a request: a row, the first parts of some, or what is
/// between a row and all after it. Empty at the beginning of a table; nothing where no row can come any more.
///
/// # Errors
///
/// When it begins where no range of rows can.
pub fn from_of(rest: &Range) -> Result<Option<String>, NoPlace> {
    let row = rest.start().splitn(2, |byte| *byte == TABLE_END).nth(1).ok_or(NoPlace)?;
    if let Some(text) = text_of_row(row) {
        return Ok(Some(text));
    }
    // Not a row: the place right after one.
    let (last, before) = row.split_last().ok_or(NoPlace)?;
    let parts = keys::decode_row(before).filter(|_| *last == 0).ok_or(NoPlace)?;
    Ok(after(parts).map(|parts| client::key(&named(parts))))
}

/// A range begins in the middle of a row's key.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the rest of the range begins where no row can")]
pub struct NoPlace;

/// The least parts that are after all rows with these, of tables whose rows have as many.
fn after(mut parts: Vec<Part>) -> Option<Vec<Part>> {
    match parts.pop()? {
        Part::Int(i64::MAX) => after(parts),
        Part::Int(value) => {
            parts.push(Part::Int(value + 1));
            Some(parts)
        }
        Part::Text(text) => {
            parts.push(Part::Text(text + "\0"));
            Some(parts)
        }
    }
}

/// A split's bound for people, as `table/key`; where it is between rows, its bytes.
pub fn bound_of(bound: &[u8]) -> String {
    if bound.is_empty() {
        return String::new();
    }
    let mut halves = bound.splitn(2, |byte| *byte == TABLE_END);
    let table = halves.next().and_then(|table| std::str::from_utf8(table).ok());
    match (table, halves.next().map(text_of_row)) {
        (Some(table), Some(Some(text))) => format!("{table}/{text}"),
        _ => bound.escape_ascii().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use client::Kind;
    use proptest::prelude::*;

    use super::*;

    fn accounts() -> Table {
        Table::new("accounts", &[("owner", Kind::Text), ("number", Kind::Int)]).unwrap()
    }

    fn notes() -> Table {
        Table::new("notes", &[("day", Kind::Int), ("title", Kind::Text)]).unwrap()
    }

    fn text() -> impl Strategy<Value = String> {
        let some = prop_oneof![Just('%'), Just('/'), Just('\0'), Just('\u{1}'), Just('a'), any::<char>()];
        prop::collection::vec(some, 1..5).prop_map(|chars| chars.into_iter().collect())
    }

    fn number() -> impl Strategy<Value = i64> {
        prop_oneof![any::<i64>(), -2i64..2, Just(i64::MAX), Just(i64::MIN)]
    }

    fn account() -> impl Strategy<Value = Vec<client::Part>> {
        (text(), number()).prop_map(|(owner, number)| vec![owner.into(), number.into()])
    }

    fn note() -> impl Strategy<Value = Vec<client::Part>> {
        (number(), text()).prop_map(|(day, title)| vec![day.into(), title.into()])
    }

    /// The place right after a key, where nodes say that a range goes on.
    fn successor(key: &Key) -> Range {
        let start = [key.as_bytes().as_ref(), &[0]].concat();
        Range::between(start.into(), None).unwrap()
    }

    proptest! {
        #[test]
        fn text_is_a_key_and_the_same_text_again(parts in account()) {
            let text = client::key(&parts);
            let key = key_of(&accounts(), &text).unwrap();
            prop_assert_eq!(text_of(&key), Some(text));
        }

        #[test]
        fn keys_sort_as_the_parts_do_and_as_the_client_sorts_them(a in account(), b in account()) {
            let table = accounts();
            let (key_a, key_b) = (key_of(&table, &client::key(&a)).unwrap(), key_of(&table, &client::key(&b)).unwrap());
            prop_assert_eq!(key_a.cmp(&key_b), a.cmp(&b));
            let own: Vec<_> = a.iter().cloned().map(|part| match part {
                client::Part::Int(value) => Part::Int(value),
                client::Part::Text(text) => Part::Text(text),
            }).collect();
            prop_assert_eq!(client::sorted(&a), keys::encode_row(&own));
        }

        #[test]
        fn any_text_is_refused_or_written_back_as_it_was(
            text in prop_oneof![any::<String>(), "[a%2Ff/0-9+-]{0,8}", "[ab%\\PC]{1,4}/[+-]?[0-9]{1,20}"]
        ) {
            for table in [accounts(), notes()] {
                if let Ok(key) = key_of(&table, &text) {
                    prop_assert_eq!(text_of(&key), Some(text.clone()));
                }
                let all = client::Range { prefix: text.clone(), from: text.clone(), ..client::Range::table(table.name()) };
                if let Ok(range) = range_of(&table, &all) {
                    prop_assert_eq!(from_of(&range), Ok(Some(text.clone())));
                }
            }
        }

        #[test]
        fn a_range_goes_on_with_the_next_row_whatever_it_is(a in account(), b in account()) {
            let (table, a, b) = (accounts(), client::key(&a), client::key(&b));
            let (key_a, key_b) = (key_of(&table, &a).unwrap(), key_of(&table, &b).unwrap());
            let next = from_of(&successor(&key_a)).unwrap().unwrap();
            let rest = range_of(&table, &client::Range::table("accounts").from(next)).unwrap();
            prop_assert!(!rest.contains(&key_a));
            prop_assert_eq!(rest.contains(&key_b), key_b > key_a);
        }

        #[test]
        fn so_it_does_where_text_is_last(a in note(), b in note()) {
            let (table, a, b) = (notes(), client::key(&a), client::key(&b));
            let (key_a, key_b) = (key_of(&table, &a).unwrap(), key_of(&table, &b).unwrap());
            let next = from_of(&successor(&key_a)).unwrap().unwrap();
            let rest = range_of(&table, &client::Range::table("notes").from(next)).unwrap();
            prop_assert!(!rest.contains(&key_a));
            prop_assert_eq!(rest.contains(&key_b), key_b > key_a);
        }

        #[test]
        fn no_bytes_of_a_bound_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _text = bound_of(&bytes);
            let _from = from_of(&Range::between(bytes.into(), None).unwrap());
        }
    }

    #[test]
    fn nothing_is_after_the_last_row() {
        let table = Table::new("numbers", &[("number", Kind::Int)]).unwrap();
        let last = key_of(&table, &i64::MAX.to_string()).unwrap();
        assert_eq!(from_of(&successor(&last)), Ok(None));
    }

    #[test]
    fn bounds_are_shown_as_people_write_them() {
        let key = key_of(&accounts(), "a%2Fb/-5").unwrap();
        assert_eq!(bound_of(key.as_bytes()), "accounts/a%2Fb/-5");
        assert_eq!(bound_of(Range::table("accounts").unwrap().start()), "accounts/");
        assert_eq!(bound_of(b""), "");
        assert_eq!(bound_of(b"accounts\x00\x07"), "accounts\\x00\\x07");
    }

    #[test]
    fn the_longest_key_leaves_room_for_the_place_after_it() {
        let table = Table::new("texts", &[("text", Kind::Text)]).unwrap();
        let key = key_of(&table, &"x".repeat(KEY_BYTES_MAX - 2)).unwrap();
        let next = from_of(&successor(&key)).unwrap().unwrap();
        assert!(range_of(&table, &client::Range::table("texts").from(next)).is_ok());
        assert_eq!(
            key_of(&table, &"x".repeat(KEY_BYTES_MAX - 1)),
            Err(SchemaError::TooLong(KEY_BYTES_MAX + 1))
        );
    }
}
