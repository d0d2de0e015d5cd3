//! How a table's keys are written as text, each in one way only, and how they sort.

use std::{borrow::Cow, fmt::Write as _};

use crate::{Range, Reason, TABLES, proto};

/// A declaration has at most so many parts: a refusal names them all.
const KEY_PARTS_MAX: usize = 8;
/// A part's name is short enough for a message.
const PART_NAME_BYTES_MAX: usize = 64;
/// Three bytes of text for one of a key at most, and room for what is refused in whole.
const KEY_TEXT_BYTES_MAX: usize = 4096;
/// A table's name is short enough to be printed in every refusal.
const TABLE_BYTES_MAX: usize = 64;

/// What a part of a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// UTF-8 of at least one character, sorted by its bytes.
    Text,
    /// A 64-bit signed number, sorted by value.
    Int,
}

impl Kind {
    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Int => "int",
        }
    }
}

/// A part of a table's keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Column {
    /// Its name, for people.
    pub name: String,
    /// What it holds.
    pub kind: Kind,
}

/// One part of a row's key. Parts sort as keys of them do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// A number.
    Int(i64),
    /// Text.
    Text(String),
}

/// A part as it is read from text.
enum Read<'t> {
    Int(i64),
    Text(Cow<'t, str>),
}

impl From<i64> for Part {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<&str> for Part {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Part {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// Why something is no table, row or range. Each says what is right.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    /// A table's name that is none.
    #[error("{0:?} is no name of a table: 1 to {TABLE_BYTES_MAX} of a-z, 0-9 and _, beginning with a letter")]
    Table(String),
    /// `tables` is declared by nobody.
    #[error("{TABLES:?} is the table of declarations; choose another name")]
    Reserved,
    /// No parts, or too many.
    #[error("a key has 1 to {KEY_PARTS_MAX} parts, not {0}")]
    PartCount(usize),
    /// A part's name that is none.
    #[error(
        "{0:?} is no name of a part: 1 to {PART_NAME_BYTES_MAX} of a-z, 0-9 and _, beginning with a letter"
    )]
    PartName(String),
    /// Two parts of one name.
    #[error("two parts are called {0:?}")]
    PartTwice(String),
    /// A part of no kind.
    #[error("part {0:?} is neither TEXT nor INT")]
    PartKind(String),
    /// A key with too few or too many parts.
    #[error("key {text:?} has {found} parts, and keys of {table} are {shape}")]
    Parts {
        /// The key.
        text: String,
        /// How many it has.
        found: usize,
        /// The table.
        table: String,
        /// What its keys are made of.
        shape: String,
    },
    /// A part without a character.
    #[error("part {part} of {text:?} is empty, and keys of {table} are {shape}")]
    Empty {
        /// The part's name.
        part: String,
        /// The key.
        text: String,
        /// The table.
        table: String,
        /// What its keys are made of.
        shape: String,
    },
    /// Text that is escaped otherwise than it is to be.
    #[error("part {part} {text:?}: % is written %25 and / is written %2F, and nothing else is escaped")]
    Escape {
        /// The part's name.
        part: String,
        /// The part.
        text: String,
    },
    /// What is no number.
    #[error("part {part} is a number from -9223372036854775808 to 9223372036854775807, and {text:?} is none")]
    Number {
        /// The part's name.
        part: String,
        /// The part.
        text: String,
    },
    /// A number written otherwise than it is to be.
    #[error("part {part} {text:?} is written {right}: no leading zeros, no +, no -0")]
    NumberForm {
        /// The part's name.
        part: String,
        /// The part.
        text: String,
        /// How it is written.
        right: i64,
    },
    /// A key over the limit.
    #[error("a key of {0} bytes of text is over the limit of {KEY_TEXT_BYTES_MAX}")]
    TooLong(usize),
    /// A range in which no row can be.
    #[error("no row can be in the range: {0}")]
    EmptyRange(&'static str),
}

impl NameError {
    /// For programs.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Table(_)
            | Self::Reserved
            | Self::PartCount(_)
            | Self::PartName(_)
            | Self::PartTwice(_)
            | Self::PartKind(_) => Reason::BadTable,
            Self::EmptyRange(_) => Reason::BadRange,
            _ => Reason::BadKey,
        }
    }
}

/// A table as it was declared.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Table {
    name: String,
    key: Vec<Column>,
}

impl Table {
    /// A declaration.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn new(name: &str, key: &[(&str, Kind)]) -> Result<Self, NameError> {
        let key = key.iter().map(|(name, kind)| Column { name: (*name).to_owned(), kind: *kind }).collect();
        Self::checked(Self { name: name.to_owned(), key })
    }

    /// The table that holds the declarations.
    pub fn of_tables() -> Self {
        Self { name: TABLES.to_owned(), key: vec![Column { name: "table".to_owned(), kind: Kind::Text }] }
    }

    /// A declaration as it comes over the wire.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn from_proto(request: proto::CreateTableRequest) -> Result<Self, NameError> {
        use proto::key_part::Kind as Wire;
        let columns = request.key.into_iter().map(|part| {
            let kind = match part.kind() {
                Wire::Text => Kind::Text,
                Wire::Int => Kind::Int,
                Wire::Unspecified => return Err(NameError::PartKind(shortened(&part.name))),
            };
            Ok(Column { name: part.name, kind })
        });
        Self::checked(Self { name: request.table, key: columns.collect::<Result<_, _>>()? })
    }

    /// As it goes over the wire, and into the row that declares it.
    pub fn to_proto(&self) -> proto::CreateTableRequest {
        use proto::key_part::Kind as Wire;
        let part = |column: &Column| proto::KeyPart {
            name: column.name.clone(),
            kind: match column.kind {
                Kind::Text => Wire::Text.into(),
                Kind::Int => Wire::Int.into(),
            },
        };
        proto::CreateTableRequest { table: self.name.clone(), key: self.key.iter().map(part).collect() }
    }

    /// Whether a table can be called so.
    ///
    /// # Errors
    ///
    /// When it cannot.
    pub fn check_name(name: &str) -> Result<(), NameError> {
        if is_name(name, TABLE_BYTES_MAX) { Ok(()) } else { Err(NameError::Table(shortened(name))) }
    }

    fn checked(self) -> Result<Self, NameError> {
        Self::check_name(&self.name)?;
        if self.name == TABLES {
            return Err(NameError::Reserved);
        }
        if self.key.is_empty() || self.key.len() > KEY_PARTS_MAX {
            return Err(NameError::PartCount(self.key.len()));
        }
        for (index, column) in self.key.iter().enumerate() {
            if !is_name(&column.name, PART_NAME_BYTES_MAX) {
                return Err(NameError::PartName(shortened(&column.name)));
            }
            if self.key.iter().take(index).any(|before| before.name == column.name) {
                return Err(NameError::PartTwice(column.name.clone()));
            }
        }
        Ok(self)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its keys are made of.
    pub fn key(&self) -> &[Column] {
        &self.key
    }

    /// The parts of a whole key.
    ///
    /// # Errors
    ///
    /// When `text` is not the one way to write a key of this table.
    pub fn parse(&self, text: &str) -> Result<Vec<Part>, NameError> {
        let parts = self.parse_first(text)?;
        self.check_whole(text, parts.len())?;
        Ok(parts)
    }

    /// The parts that a key begins with: none in empty text, all in a whole key.
    ///
    /// # Errors
    ///
    /// When `text` is not the one way to write the first parts of a key of this table.
    pub fn parse_first(&self, text: &str) -> Result<Vec<Part>, NameError> {
        let mut parts = Vec::new();
        self.read(text, |part| {
            parts.push(match part {
                Read::Int(value) => Part::Int(value),
                Read::Text(text) => Part::Text(text.into_owned()),
            });
        })?;
        Ok(parts)
    }

    /// The place of a row among all rows of all tables, as the nodes sort them.
    ///
    /// # Errors
    ///
    /// When `text` is not the one way to write a key of this table.
    pub fn place(&self, text: &str) -> Result<Vec<u8>, NameError> {
        // A number of one digit takes nine bytes.
        let most = self.name.len() + 1 + text.len() + self.key.len() * INT_BYTES;
        let mut place = Vec::with_capacity(most);
        place.extend_from_slice(self.name.as_bytes());
        place.push(TABLE_END);
        let parts = self.sort_into(text, &mut place)?;
        self.check_whole(text, parts)?;
        Ok(place)
    }

    /// The parts that a key begins with, as the nodes sort them.
    ///
    /// # Errors
    ///
    /// As [`Table::parse_first`].
    pub(crate) fn sorted_first(&self, text: &str) -> Result<Vec<u8>, NameError> {
        let mut row = Vec::new();
        self.sort_into(text, &mut row)?;
        Ok(row)
    }

    /// Appends parts as the nodes sort them. Gives how many there are.
    fn sort_into(&self, text: &str, row: &mut Vec<u8>) -> Result<usize, NameError> {
        self.read(text, |part| match part {
            Read::Int(value) => sort_int(value, row),
            Read::Text(text) => sort_text(&text, row),
        })
    }

    /// Reads part by part what a key begins with. Gives how many there are.
    fn read<'t>(&self, text: &'t str, mut each: impl FnMut(Read<'t>)) -> Result<usize, NameError> {
        if text.is_empty() {
            return Ok(0);
        }
        if text.len() > KEY_TEXT_BYTES_MAX {
            return Err(NameError::TooLong(text.len()));
        }
        let found = text.split('/').count();
        if found > self.key.len() {
            return Err(self.wrong_count(text, found));
        }
        for (part, column) in text.split('/').zip(&self.key) {
            each(match (part.is_empty(), column.kind) {
                (true, _) => {
                    return Err(NameError::Empty {
                        part: column.name.clone(),
                        text: shortened(text),
                        table: self.name.clone(),
                        shape: self.shape(),
                    });
                }
                (false, Kind::Text) => Read::Text(unescape(&column.name, part)?),
                (false, Kind::Int) => Read::Int(parse_int(&column.name, part)?),
            });
        }
        Ok(found)
    }

    fn check_whole(&self, text: &str, parts: usize) -> Result<(), NameError> {
        if parts == self.key.len() { Ok(()) } else { Err(self.wrong_count(text, parts)) }
    }

    fn wrong_count(&self, text: &str, found: usize) -> NameError {
        NameError::Parts { text: shortened(text), found, table: self.name.clone(), shape: self.shape() }
    }

    /// Where a range begins and ends among this table's rows, as sorted bytes; no end is the table's.
    ///
    /// # Errors
    ///
    /// When a bound is not written as it is to be, or no row can be in it.
    pub fn bounds(&self, range: &Range) -> Result<(Vec<u8>, Option<Vec<u8>>), NameError> {
        let prefix = self.sorted_first(&range.prefix)?;
        let from = self.sorted_first(&range.from)?;
        let to = self.sorted_first(&range.to)?;
        let past = (!prefix.is_empty()).then(|| [prefix.as_slice(), &[PAST_PARTS]].concat());
        let start = prefix.max(from);
        let end = match (past, (!to.is_empty()).then_some(to)) {
            (Some(past), Some(to)) => Some(past.min(to)),
            (past, to) => past.or(to),
        };
        match &end {
            Some(end) if *end <= start && range.prefix.is_empty() => {
                Err(NameError::EmptyRange("`to` is not after `from`"))
            }
            Some(end) if *end <= start => {
                Err(NameError::EmptyRange("what begins with `prefix` is not between `from` and `to`"))
            }
            _ => Ok((start, end)),
        }
    }

    fn shape(&self) -> String {
        let mut shape = String::new();
        for (index, column) in self.key.iter().enumerate() {
            let slash = if index == 0 { "" } else { "/" };
            let _infallible = write!(shape, "{slash}{} ({})", column.name, column.kind.name());
        }
        shape
    }
}

/// The text of a key of `parts`, escaped.
pub fn key(parts: &[Part]) -> String {
    let mut text = String::new();
    for (index, part) in parts.iter().enumerate() {
        if index > 0 {
            text.push('/');
        }
        match part {
            Part::Int(value) => {
                let _infallible = write!(text, "{value}");
            }
            Part::Text(part) => text.push_str(&escape(part)),
        }
    }
    text
}

/// The place of a row, or of the first with these parts, among all rows of all tables, as the nodes sort them.
pub(crate) fn place(table: &str, row: &[u8]) -> Vec<u8> {
    [table.as_bytes(), &[TABLE_END], row].concat()
}

const TABLE_END: u8 = 0x00;
const TAG_INT: u8 = 0x10;
const TAG_TEXT: u8 = 0x20;
/// What a number takes: its tag and 64 bits. Text takes two bytes more than it has.
const INT_BYTES: usize = 9;
const ZERO: u8 = 0x00;
const ESCAPED: u8 = 0xff;
/// No part begins with it: what goes on after the same parts is before it.
const PAST_PARTS: u8 = 0xff;

/// The row key of `parts`, as the nodes sort it: a test of theirs holds this to what they do.
pub fn sorted(parts: &[Part]) -> Vec<u8> {
    let mut row = Vec::new();
    for part in parts {
        match part {
            Part::Int(value) => sort_int(*value, &mut row),
            Part::Text(text) => sort_text(text, &mut row),
        }
    }
    row
}

fn sort_int(value: i64, row: &mut Vec<u8>) {
    row.push(TAG_INT);
    // With the sign turned over, two's complement sorts as unsigned bytes do.
    row.extend_from_slice(&(value.cast_unsigned() ^ (1 << 63)).to_be_bytes());
}

fn sort_text(text: &str, row: &mut Vec<u8>) {
    row.push(TAG_TEXT);
    for byte in text.bytes() {
        row.push(byte);
        if byte == ZERO {
            row.push(ESCAPED);
        }
    }
    row.push(ZERO);
}

fn escape(text: &str) -> Cow<'_, str> {
    if text.contains(['%', '/']) {
        Cow::Owned(text.replace('%', "%25").replace('/', "%2F"))
    } else {
        Cow::Borrowed(text)
    }
}

fn unescape<'t>(part: &str, text: &'t str) -> Result<Cow<'t, str>, NameError> {
    if !text.contains('%') {
        return Ok(Cow::Borrowed(text));
    }
    let mut pieces = text.split('%');
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (meant, rest) = match (piece.strip_prefix("25"), piece.strip_prefix("2F")) {
            (Some(rest), _) => ('%', rest),
            (_, Some(rest)) => ('/', rest),
            _ => return Err(NameError::Escape { part: part.to_owned(), text: shortened(text) }),
        };
        plain.push(meant);
        plain.push_str(rest);
    }
    Ok(Cow::Owned(plain))
}

fn parse_int(part: &str, text: &str) -> Result<i64, NameError> {
    let right: i64 =
        text.parse().map_err(|_| NameError::Number { part: part.to_owned(), text: shortened(text) })?;
    let digits = text.strip_prefix('-').unwrap_or(text);
    let canonical = match digits.as_bytes() {
        [b'0'] => text == digits,
        [first, ..] => matches!(first, b'1'..=b'9'),
        [] => false,
    };
    if canonical {
        return Ok(right);
    }
    Err(NameError::NumberForm { part: part.to_owned(), text: shortened(text), right })
}

fn is_name(name: &str, bytes_max: usize) -> bool {
    name.len() <= bytes_max
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

/// What is refused may be as long as it likes, and a message may not.
fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    let mut short: String = text.chars().take(CHARS_MAX).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn accounts() -> Table {
        Table::new("accounts", &[("owner", Kind::Text), ("number", Kind::Int)]).unwrap()
    }

    fn text() -> impl Strategy<Value = String> {
        let some = prop_oneof![Just('%'), Just('/'), Just('\0'), Just('2'), Just('F'), any::<char>()];
        prop::collection::vec(some, 1..6).prop_map(|chars| chars.into_iter().collect())
    }

    fn row() -> impl Strategy<Value = Vec<Part>> {
        (text(), prop_oneof![any::<i64>(), -2i64..2])
            .prop_map(|(text, number)| vec![Part::Text(text), Part::Int(number)])
    }

    proptest! {
        #[test]
        fn text_of_parts_is_parsed_to_the_same_parts(parts in row()) {
            let text = key(&parts);
            prop_assert_eq!(accounts().place(&text), Ok(place("accounts", &sorted(&parts))));
            prop_assert_eq!(accounts().parse(&text), Ok(parts));
        }

        #[test]
        fn any_text_is_refused_or_the_only_way_to_write_it(
            any in prop_oneof![any::<String>(), "[a%2Ff/0-9+-]{0,8}", "a/[+-]?[0-9]{1,20}"]
        ) {
            let parsed = accounts().parse(&any);
            prop_assert_eq!(accounts().place(&any).err(), parsed.as_ref().err().cloned());
            if let Ok(parts) = parsed {
                prop_assert_eq!(key(&parts), any);
            }
        }

        #[test]
        fn a_range_holds_the_rows_that_it_names(
            row in row(), prefix in any::<bool>(), from in row(), to in row(), open in any::<bool>()
        ) {
            let table = accounts();
            let to_text = if open { String::new() } else { key(&to) };
            let mut range = Range::table("accounts").from(key(&from)).to(to_text);
            if prefix {
                range.prefix = key(&row[..1]);
            }
            if let Ok((start, end)) = table.bounds(&range) {
                let place = sorted(&row);
                let within = start <= place && end.is_none_or(|end| place < end);
                prop_assert_eq!(within, from <= row && (open || row < to));
            }
        }
    }

    #[test]
    fn refusals_say_what_is_right() {
        let table = accounts();
        let said = |text: &str| table.parse(text).unwrap_err().to_string();
        assert_eq!(
            said("alice"),
            "key \"alice\" has 1 parts, and keys of accounts are owner (text)/number (int)"
        );
        assert_eq!(said("alice/017"), "part number \"017\" is written 17: no leading zeros, no +, no -0");
        assert_eq!(said("alice/+17"), "part number \"+17\" is written 17: no leading zeros, no +, no -0");
        assert_eq!(said("alice/-0"), "part number \"-0\" is written 0: no leading zeros, no +, no -0");
        assert!(said("alice/x").contains("is a number from"));
        assert!(said("a%2fb/1").contains("/ is written %2F"));
        assert!(said("a%/1").contains("% is written %25"));
        assert!(said("/1").contains("part owner of \"/1\" is empty"));
        assert!(said("alice/1/2").contains("has 3 parts"));
        assert!(said(&"x".repeat(5000)).contains("over the limit"));
    }

    #[test]
    fn a_prefix_holds_what_begins_with_its_parts_and_not_with_its_letters() {
        let table = accounts();
        let (start, end) = table.bounds(&Range::prefix("accounts", "al")).unwrap();
        let within = |key: &str| {
            let place = sorted(&table.parse(key).unwrap());
            start <= place && end.as_ref().is_none_or(|end| place < *end)
        };
        assert!(within("al/-5") && within("al/7"));
        assert!(!within("alice/7") && !within("al\0/7") && !within("ak/7"));
    }

    #[test]
    fn what_is_no_declaration_is_refused() {
        let refused = |name: &str, key: &[(&str, Kind)]| Table::new(name, key).unwrap_err();
        assert_eq!(refused("tables", &[("a", Kind::Int)]), NameError::Reserved);
        assert_eq!(refused("Accounts", &[("a", Kind::Int)]), NameError::Table("Accounts".to_owned()));
        assert_eq!(refused("t", &[]), NameError::PartCount(0));
        assert_eq!(
            refused("t", &[("a", Kind::Int), ("a", Kind::Text)]),
            NameError::PartTwice("a".to_owned())
        );
        assert_eq!(refused("t", &[("", Kind::Int)]), NameError::PartName(String::new()));
    }
}
