//! How rows, splits and nodes are shown.

use std::fmt::Write as _;

use prost::Message as _;
use store_client::{Found, TABLES, Table, proto};

/// Rows of cells, each column as wide as it must be; those of numbers to the right.
pub(super) fn table(head: &[&str], numbers: &[usize], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let mut widths = vec![0; head.len()];
    for row in std::iter::once(&head).chain(rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut shown = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let blank = " ".repeat(width.saturating_sub(cell.chars().count()));
            let _infallible = match numbers.contains(&column) {
                true => write!(line, "{gap}{blank}{cell}"),
                false => write!(line, "{gap}{cell}{blank}"),
            };
        }
        shown.push_str(line.trim_end());
        shown.push('\n');
    }
    shown
}

/// Rows that were asked for or found.
pub(super) fn found(rows: &[Found]) -> String {
    let cells = |found: &Found| {
        let value = match &found.value {
            None => "(none)".to_owned(),
            Some(bytes) if found.row.table == TABLES => declaration(bytes),
            Some(bytes) => value(bytes),
        };
        let version = if found.version == 0 { String::new() } else { found.version.to_string() };
        vec![found.row.to_string(), value, version]
    };
    let rows: Vec<_> = rows.iter().map(cells).collect();
    table(&["row", "value", "written"], &[], &rows)
}

/// What a row of the table of tables says: a table's key, as `create` takes it.
fn declaration(bytes: &[u8]) -> String {
    let table = proto::CreateTableRequest::decode(bytes).ok().and_then(|table| Table::from_proto(table).ok());
    let Some(table) = table else { return value(bytes) };
    let parts: Vec<_> =
        table.key().iter().map(|part| format!("{} {}", part.name, part.kind.name())).collect();
    parts.join(", ")
}

/// Text as it is, but for what would move the cursor; everything else as hex.
pub(super) fn value(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.is_empty() => {
            let mut shown = String::new();
            for char in text.chars() {
                if char.is_control() {
                    shown.extend(char.escape_default());
                } else {
                    shown.push(char);
                }
            }
            shown
        }
        Ok(_) => "(empty)".to_owned(),
        Err(_) => {
            let mut shown = "0x".to_owned();
            for byte in bytes {
                let _infallible = write!(shown, "{byte:02x}");
            }
            shown
        }
    }
}

/// Splits, in order.
pub(super) fn splits(splits: &[proto::SplitInfo]) -> String {
    let nodes =
        |split: &proto::SplitInfo| split.nodes.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let bound = |text: &str| if text.is_empty() { "…".to_owned() } else { text.to_owned() };
    let cells = |split: &proto::SplitInfo| {
        let leader = if split.leader == 0 { "?".to_owned() } else { split.leader.to_string() };
        vec![
            split.id.to_string(),
            bound(&split.start_text),
            bound(&split.end_text),
            leader,
            nodes(split),
            split.rows.to_string(),
            split.bytes.to_string(),
            format!("{:.0}", split.load),
        ]
    };
    let rows: Vec<_> = splits.iter().map(cells).collect();
    table(&["split", "from", "to", "leader", "nodes", "rows", "bytes", "requests/s"], &[0, 5, 6, 7], &rows)
}

/// Nodes, each with what it says of itself or why it says nothing.
pub(super) fn nodes(nodes: &[(String, Result<proto::StatusResponse, store_client::Error>)]) -> String {
    let cells =
        |(address, status): &(String, Result<proto::StatusResponse, store_client::Error>)| match status {
            Ok(status) => vec![
                address.clone(),
                status.node.to_string(),
                format!("{:?}", std::time::Duration::from_nanos(status.epsilon)),
                format!("{}/{}", status.leads, status.splits),
                status.commits.to_string(),
                status.commits_across.to_string(),
                status.wounded.to_string(),
                status.in_doubt.to_string(),
                status.snapshot_reads.to_string(),
                status.log_bytes.to_string(),
            ],
            Err(error) => vec![address.clone(), "?".to_owned(), error.to_string()],
        };
    let rows: Vec<_> = nodes.iter().map(cells).collect();
    let head = [
        "address",
        "node",
        "clock",
        "leads",
        "commits",
        "across",
        "wounded",
        "in doubt",
        "snapshots",
        "log bytes",
    ];
    table(&head, &[1, 4, 5, 6, 7, 8, 9], &rows)
}

#[cfg(test)]
mod tests {
    use store_client::Row;

    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [
            Found { row: Row::new("accounts", "alice/17"), value: Some("100".into()), version: 5 },
            Found { row: Row::new("accounts", "b/1"), value: None, version: 0 },
        ];
        assert_eq!(
            found(&rows),
            "row                value   written\naccounts/alice/17  100     5\naccounts/b/1       (none)\n"
        );
        assert_eq!(table(&["a", "number"], &[1], &[vec!["x".into(), "7".into()]]), "a  number\nx       7\n");
    }

    #[test]
    fn values_are_text_where_they_are() {
        assert_eq!(value("größe\n".as_bytes()), "größe\\n");
        assert_eq!(value(&[0xff, 0]), "0xff00");
        assert_eq!(value(b""), "(empty)");
    }
}
