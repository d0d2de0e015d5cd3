//! What programs call things: rows, ranges, moments.

use std::time::Duration;

use bytes::Bytes;

use crate::proto;

/// A row by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Row {
    /// The table, as it was declared.
    pub table: String,
    /// The row's key: its parts with `/` between them, such as `alice/17`. See [`crate::key`], which escapes.
    pub key: String,
}

impl Row {
    /// The row of `table` at `key`.
    pub fn new(table: impl Into<String>, key: impl Into<String>) -> Self {
        Self { table: table.into(), key: key.into() }
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.table, self.key)
    }
}

impl From<Row> for proto::Row {
    fn from(Row { table, key }: Row) -> Self {
        Self { table, key }
    }
}

impl From<proto::Row> for Row {
    fn from(proto::Row { table, key }: proto::Row) -> Self {
        Self { table, key }
    }
}

/// Rows of one table that begin with the same parts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    /// The table.
    pub table: String,
    /// The parts that all rows begin with; empty for the whole table.
    pub prefix: String,
    /// Rows from here on, written like a whole key or its first parts. Empty: from the first.
    pub from: String,
    /// Rows before this one. Empty: to the last.
    pub to: String,
}

impl Range {
    /// Every row of `table`.
    pub fn table(table: impl Into<String>) -> Self {
        Self { table: table.into(), prefix: String::new(), from: String::new(), to: String::new() }
    }

    /// The rows of `table` that begin with the parts in `prefix`.
    pub fn prefix(table: impl Into<String>, prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), ..Self::table(table) }
    }

    /// Those from `from` on.
    #[must_use]
    pub fn from(self, from: impl Into<String>) -> Self {
        Self { from: from.into(), ..self }
    }

    /// Those before `to`.
    #[must_use]
    pub fn to(self, to: impl Into<String>) -> Self {
        Self { to: to.into(), ..self }
    }
}

impl From<Range> for proto::Range {
    fn from(Range { table, prefix, from, to }: Range) -> Self {
        Self { table, prefix, from, to }
    }
}

impl From<proto::Range> for Range {
    fn from(proto::Range { table, prefix, from, to }: proto::Range) -> Self {
        Self { table, prefix, from, to }
    }
}

/// A row that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which.
    pub row: Row,
    /// What is in it. Absent where there is no such row.
    pub value: Option<Bytes>,
    /// When it was written, in nanoseconds since the Unix epoch; 0 where nobody ever has, and for a transaction's own
    /// writes before they are committed.
    pub version: u64,
}

impl From<proto::Found> for Found {
    fn from(found: proto::Found) -> Self {
        Self { row: found.row.unwrap_or_default().into(), value: found.value, version: found.version }
    }
}

/// Which moment a snapshot shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Everything that was committed before the request.
    Now,
    /// Exactly this one, nanoseconds since the Unix epoch.
    At(u64),
    /// The newest that a replica nearby has, if it is no older than that.
    Within(Duration),
}

impl From<Moment> for proto::Moment {
    fn from(moment: Moment) -> Self {
        use proto::moment::Moment as Wire;
        let moment = match moment {
            Moment::Now => None,
            Moment::At(at) => Some(Wire::Timestamp(at)),
            Moment::Within(within) => {
                Some(Wire::MaxStaleness(u64::try_from(within.as_nanos()).unwrap_or(u64::MAX)))
            }
        };
        Self { moment }
    }
}
