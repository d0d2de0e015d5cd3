//! Where a row stands in the one sorted space that splits cut: its table, then its key, as bytes that sort as the
//! values in it do.

use std::borrow::Borrow;

use bytes::Bytes;

/// A table's name is short enough to be printed in every refusal.
pub const TABLE_BYTES_MAX: usize = 64;
/// A row's key is compared at every step of a lookup, so it stays well under a page.
pub const ROW_KEY_BYTES_MAX: usize = 1024;

/// Ends a table's name. Names hold no byte this small, so tables never interleave.
const TABLE_END: u8 = 0x00;
/// The byte after [`TABLE_END`]: where the rows of a table end.
const TABLE_PAST: u8 = 0x01;

const TAG_INT: u8 = 0x10;
const TAG_TEXT: u8 = 0x20;
/// Ends text. A zero byte within it is written `ZERO ESCAPED`, which sorts after the end.
const ZERO: u8 = 0x00;
const ESCAPED: u8 = 0xff;

/// Why something is no key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyError {
    /// A table's name that is empty, too long or has characters of no name.
    #[error("table names are 1 to {TABLE_BYTES_MAX} of a-z, 0-9 and _, and begin with a letter")]
    Table,
    /// A row without a key.
    #[error("a row's key is empty")]
    EmptyRow,
    /// A row's key that is too long.
    #[error("a row's key of {0} bytes is over the limit of {ROW_KEY_BYTES_MAX}")]
    RowTooLong(usize),
    /// A range that ends before it begins.
    #[error("the range ends before it begins")]
    Backwards,
}

/// A table and a row in it, as sorted bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Bytes);

impl Key {
    /// The place of `row` in `table`.
    ///
    /// # Errors
    ///
    /// When either is over its limit or no name.
    pub fn new(table: &str, row: &[u8]) -> Result<Self, KeyError> {
        if row.is_empty() {
            return Err(KeyError::EmptyRow);
        }
        Self::bound(table, row)
    }

    /// A place to begin or end a range at, which an empty `row` may be: the table's beginning.
    fn bound(table: &str, row: &[u8]) -> Result<Self, KeyError> {
        check_table(table)?;
        if row.len() > ROW_KEY_BYTES_MAX {
            return Err(KeyError::RowTooLong(row.len()));
        }
        let mut bytes = Vec::with_capacity(table.len() + 1 + row.len());
        bytes.extend_from_slice(table.as_bytes());
        bytes.push(TABLE_END);
        bytes.extend_from_slice(row);
        Ok(Self(bytes.into()))
    }

    /// Bytes that were a key's, from a log or a message.
    ///
    /// # Errors
    ///
    /// When no table and row could have made them.
    pub fn decode(bytes: Bytes) -> Result<Self, KeyError> {
        let table = bytes.split(|byte| *byte == TABLE_END).next().unwrap_or_default();
        check_table(std::str::from_utf8(table).map_err(|_| KeyError::Table)?)?;
        match bytes.len().checked_sub(table.len() + 1) {
            None | Some(0) => Err(KeyError::EmptyRow),
            Some(row) if row > ROW_KEY_BYTES_MAX => Err(KeyError::RowTooLong(row)),
            Some(_) => Ok(Self(bytes)),
        }
    }

    /// The bytes that sort.
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }

    /// The table's name.
    pub fn table(&self) -> &str {
        let name = self.0.split(|byte| *byte == TABLE_END).next().unwrap_or_default();
        std::str::from_utf8(name).unwrap_or_default()
    }

    /// The row's key.
    pub fn row(&self) -> &[u8] {
        self.0.get(self.table().len() + 1..).unwrap_or_default()
    }

    /// The next key there can be.
    fn successor(&self) -> Bytes {
        let mut bytes = Vec::with_capacity(self.0.len() + 1);
        bytes.extend_from_slice(&self.0);
        bytes.push(ZERO);
        bytes.into()
    }
}

/// A map by key is looked into by the bytes of a range's bounds, which need not be keys.
impl Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// Keys from `start` up to and without `end`; no end is the end of everything.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    start: Bytes,
    end: Option<Bytes>,
}

impl Range {
    /// Every key there is.
    pub fn all() -> Self {
        Self { start: Bytes::new(), end: None }
    }

    /// Exactly one key.
    pub fn point(key: &Key) -> Self {
        Self { start: key.0.clone(), end: Some(key.successor()) }
    }

    /// Every row of a table.
    ///
    /// # Errors
    ///
    /// When `table` is no name.
    pub fn table(table: &str) -> Result<Self, KeyError> {
        let start = Key::bound(table, &[])?.0;
        let mut end = table.as_bytes().to_vec();
        end.push(TABLE_PAST);
        Ok(Self { start, end: Some(end.into()) })
    }

    /// Rows of one table from `from` up to and without `to`; an empty `to` is the table's end.
    ///
    /// # Errors
    ///
    /// When `table` is no name, a bound is over the limit or `to` is before `from`.
    pub fn rows(table: &str, from: &[u8], to: &[u8]) -> Result<Self, KeyError> {
        let whole = Self::table(table)?;
        let start = Key::bound(table, from)?.0;
        let end = if to.is_empty() { whole.end } else { Some(Key::bound(table, to)?.0) };
        Self::between(start, end)
    }

    /// Bounds that were a range's, from a log or a message.
    ///
    /// # Errors
    ///
    /// When it ends before it begins.
    pub fn between(start: Bytes, end: Option<Bytes>) -> Result<Self, KeyError> {
        if end.as_ref().is_some_and(|end| *end < start) {
            return Err(KeyError::Backwards);
        }
        Ok(Self { start, end })
    }

    /// Where it begins.
    pub fn start(&self) -> &Bytes {
        &self.start
    }

    /// Where it ends, itself not in it.
    pub fn end(&self) -> Option<&Bytes> {
        self.end.as_ref()
    }

    /// The least of all ranges with this beginning: where to look in a map by range.
    pub(crate) fn least_from(&self) -> Self {
        Self { start: self.start.clone(), end: None }
    }

    /// Whether no key can be in it.
    pub fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }

    /// Whether `key` is in it.
    pub fn contains(&self, key: &Key) -> bool {
        self.start <= key.0 && self.end.as_ref().is_none_or(|end| key.0 < *end)
    }

    /// Whether all of `other` is in it.
    pub fn covers(&self, other: &Self) -> bool {
        let ends = match (&self.end, &other.end) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(mine), Some(its)) => its <= mine,
        };
        other.is_empty() || (self.start <= other.start && ends)
    }

    /// Whether some key can be in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let begins = |a: &Self, b: &Self| b.end.as_ref().is_none_or(|end| a.start < *end);
        !self.is_empty() && !other.is_empty() && begins(self, other) && begins(other, self)
    }

    /// What is in both.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        if !self.overlaps(other) {
            return None;
        }
        let end = match (&self.end, &other.end) {
            (None, end) | (end, None) => end.clone(),
            (Some(mine), Some(its)) => Some(mine.min(its).clone()),
        };
        Some(Self { start: self.start.clone().max(other.start.clone()), end })
    }
}

/// One part of a row's key. Keys of parts sort as the tuples do: part by part, numbers by value, text by its bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A number, negative ones first.
    Int(i64),
    /// Text, of which a prefix comes first.
    Text(String),
}

/// The row key of `parts`.
pub fn encode_row(parts: &[Part]) -> Vec<u8> {
    let mut row = Vec::new();
    for part in parts {
        match part {
            Part::Int(value) => {
                row.push(TAG_INT);
                // With the sign turned over, two's complement sorts as unsigned bytes do.
                row.extend_from_slice(&(value.cast_unsigned() ^ (1 << 63)).to_be_bytes());
            }
            Part::Text(text) => {
                row.push(TAG_TEXT);
                for byte in text.bytes() {
                    row.push(byte);
                    if byte == ZERO {
                        row.push(ESCAPED);
                    }
                }
                row.push(ZERO);
            }
        }
    }
    row
}

/// The parts that [`encode_row`] made `row` of, or nothing if it did not.
pub fn decode_row(mut row: &[u8]) -> Option<Vec<Part>> {
    let mut parts = Vec::new();
    while let Some((tag, rest)) = row.split_first() {
        row = match *tag {
            TAG_INT => {
                let (bytes, rest) = rest.split_first_chunk::<8>()?;
                parts.push(Part::Int((u64::from_be_bytes(*bytes) ^ (1 << 63)).cast_signed()));
                rest
            }
            TAG_TEXT => {
                let (text, rest) = decode_text(rest)?;
                parts.push(Part::Text(text));
                rest
            }
            _ => return None,
        };
    }
    Some(parts)
}

fn decode_text(mut rest: &[u8]) -> Option<(String, &[u8])> {
    let mut text = Vec::new();
    loop {
        let (byte, after) = rest.split_first()?;
        rest = after;
        if *byte == ZERO {
            match rest.split_first() {
                Some((&ESCAPED, after)) => rest = after,
                _ => return Some((String::from_utf8(text).ok()?, rest)),
            }
        }
        text.push(*byte);
    }
}

fn check_table(table: &str) -> Result<(), KeyError> {
    let named = table.len() <= TABLE_BYTES_MAX
        && table.starts_with(|first: char| first.is_ascii_lowercase())
        && table.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    if named { Ok(()) } else { Err(KeyError::Table) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts() -> impl Strategy<Value = Vec<Part>> {
        let text =
            prop::collection::vec(prop_oneof![Just('\0'), Just('\u{1}'), Just('a'), any::<char>()], 0..6);
        let part = prop_oneof![
            any::<i64>().prop_map(Part::Int),
            (-2i64..2).prop_map(Part::Int),
            text.prop_map(|chars| Part::Text(chars.into_iter().collect())),
        ];
        prop::collection::vec(part, 0..4)
    }

    fn range() -> impl Strategy<Value = Range> {
        ("[a-d]{0,2}", "[a-d]{0,2}")
            .prop_filter_map("backwards", |(from, to)| Range::rows("t", from.as_bytes(), to.as_bytes()).ok())
    }

    proptest! {
        #[test]
        fn rows_sort_as_their_parts_do(a in parts(), b in parts()) {
            prop_assert_eq!(encode_row(&a).cmp(&encode_row(&b)), a.cmp(&b));
            prop_assert_eq!(decode_row(&encode_row(&a)), Some(a));
        }

        #[test]
        fn no_bytes_panic_and_what_decodes_was_encoded(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some(parts) = decode_row(&bytes) {
                prop_assert_eq!(encode_row(&parts), bytes.clone());
            }
            if let Ok(key) = Key::decode(bytes.clone().into()) {
                prop_assert_eq!(Key::new(key.table(), key.row()), Ok(key));
            }
        }

        #[test]
        fn ranges_agree_with_the_keys_in_them(a in range(), b in range(), row in "[a-d]{1,3}") {
            let key = Key::new("t", row.as_bytes()).unwrap();
            let both = a.contains(&key) && b.contains(&key);
            prop_assert_eq!(a.intersection(&b).is_some_and(|common| common.contains(&key)), both);
            prop_assert!(!both || a.overlaps(&b));
            prop_assert!(!a.covers(&b) || !b.contains(&key) || a.contains(&key));
            prop_assert_eq!(a.overlaps(&Range::point(&key)), a.contains(&key));
        }

        #[test]
        fn tables_never_interleave(a in "[a-b]{1,3}", b in "[a-b]{1,3}", row in prop::collection::vec(any::<u8>(), 1..5)) {
            let key = Key::new(&a, &row).unwrap();
            prop_assert_eq!(Range::table(&b).unwrap().contains(&key), a == b);
            prop_assert_eq!((key.table(), key.row()), (a.as_str(), row.as_slice()));
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        assert_eq!(Key::new("Accounts", b"1"), Err(KeyError::Table));
        assert_eq!(Key::new("", b"1"), Err(KeyError::Table));
        assert_eq!(Key::new(&"t".repeat(65), b"1"), Err(KeyError::Table));
        assert_eq!(Key::new("t", b""), Err(KeyError::EmptyRow));
        assert_eq!(Key::new("t", &[7; 1025]), Err(KeyError::RowTooLong(1025)));
        assert_eq!(Range::rows("t", b"b", b"a"), Err(KeyError::Backwards));
        assert!(Range::rows("t", b"a", b"a").unwrap().is_empty());
    }
}
