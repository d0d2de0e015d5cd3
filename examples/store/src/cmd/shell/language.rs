//! What people type: one command a line.

use std::time::Duration;

use store_client::{Kind, Range, Row};

/// Another name at most this far away is meant.
const TYPOS_MAX: usize = 2;

/// A command.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Command {
    Create { table: String, key: Vec<(String, Kind)> },
    Put { row: Row, value: Vec<u8> },
    Delete { row: Row },
    Get { rows: Vec<Row>, at: Option<At> },
    Scan { range: Range, limit: Option<usize>, at: Option<At> },
    Begin,
    Commit,
    Rollback,
    Splits,
    Split { split: u64, at: Option<Row> },
    Merge { split: u64 },
    Move { split: u64, from: u64, to: u64 },
    Lead { split: u64, node: u64 },
    Status,
    Help,
    Quit,
}

/// A moment, as people say it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum At {
    Ago(Duration),
    Timestamp(u64),
}

/// What is wrong with a line, and what would be right.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub(super) struct Misread {
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

/// Names, what follows them, and what they are for.
pub(super) const COMMANDS: &[(&str, &str, &str)] = &[
    ("create", "TABLE PART KIND, …", "declares a table: create accounts owner text, number int"),
    ("put", "TABLE KEY VALUE", "writes a row: put accounts alice/17 100"),
    ("del", "TABLE KEY", "deletes a row"),
    ("get", "TABLE KEY …", "shows rows"),
    ("scan", "TABLE [PREFIX] [from KEY] [to KEY] [limit N]", "shows a range: scan accounts alice limit 10"),
    ("at", "-5s|TIMESTAMP get|scan …", "shows them as they were then"),
    ("begin", "", "begins a transaction, for all that follows"),
    ("commit", "", "ends it"),
    ("rollback", "", "ends it without a trace"),
    ("splits", "", "shows where rows are"),
    ("split", "ID [TABLE/KEY]", "cuts a split in two, there or in its middle"),
    ("merge", "ID", "takes the next split into this one"),
    ("move", "ID FROM TO", "moves a replica of a split from one node to another"),
    ("lead", "ID NODE", "hands a split's leadership to a node"),
    ("status", "", "shows how the nodes are"),
    ("help", "", "shows this"),
    ("quit", "", "ends the shell"),
];

/// A line's command; nothing in an empty line or after a `#`.
pub(super) fn parse(line: &str) -> Result<Option<Command>, Misread> {
    let words = words(line)?;
    let Some((name, rest)) = words.split_first() else {
        return Ok(None);
    };
    let name = plain(name)?;
    command(name, rest).map(Some)
}

fn command(name: &str, rest: &[Vec<u8>]) -> Result<Command, Misread> {
    let name = if name == "exit" { "quit" } else { name };
    let texts = |expected: usize| -> Result<Vec<&str>, Misread> {
        let texts: Vec<_> = rest.iter().map(|word| plain(word)).collect::<Result<_, _>>()?;
        if texts.len() == expected { Ok(texts) } else { Err(usage(name)) }
    };
    match name {
        "create" => create(rest),
        "put" => match rest {
            [table, key, value] => {
                Ok(Command::Put { row: Row::new(plain(table)?, plain(key)?), value: value.clone() })
            }
            [_, _, _, ..] => Err(hinted("a value is one word", "put quotes around it: \"two words\"")),
            _ => Err(usage(name)),
        },
        "del" => match texts(2)?.as_slice() {
            [table, key] => Ok(Command::Delete { row: Row::new(*table, *key) }),
            _ => Err(usage(name)),
        },
        "get" => get(rest, None),
        "scan" => scan(rest, None),
        "at" => at(rest),
        "split" => match rest {
            [split] => Ok(Command::Split { split: number("split", plain(split)?)?, at: None }),
            [split, row] => {
                let (table, key) = plain(row)?
                    .split_once('/')
                    .ok_or_else(|| hinted("a row is TABLE/KEY here", "split 1 accounts/m/0"))?;
                let at = Some(Row::new(table, key));
                Ok(Command::Split { split: number("split", plain(split)?)?, at })
            }
            _ => Err(usage(name)),
        },
        "merge" => match texts(1)?.as_slice() {
            [split] => Ok(Command::Merge { split: number("split", split)? }),
            _ => Err(usage(name)),
        },
        "move" => match texts(3)?.as_slice() {
            [split, from, to] => Ok(Command::Move {
                split: number("split", split)?,
                from: number("node", from)?,
                to: number("node", to)?,
            }),
            _ => Err(usage(name)),
        },
        "lead" => match texts(2)?.as_slice() {
            [split, node] => {
                Ok(Command::Lead { split: number("split", split)?, node: number("node", node)? })
            }
            _ => Err(usage(name)),
        },
        "begin" => texts(0).map(|_| Command::Begin),
        "commit" => texts(0).map(|_| Command::Commit),
        "rollback" => texts(0).map(|_| Command::Rollback),
        "splits" => texts(0).map(|_| Command::Splits),
        "status" => texts(0).map(|_| Command::Status),
        "help" => Ok(Command::Help),
        "quit" => texts(0).map(|_| Command::Quit),
        _ => Err(unknown(name)),
    }
}

fn create(rest: &[Vec<u8>]) -> Result<Command, Misread> {
    let texts: Vec<_> = rest.iter().map(|word| plain(word)).collect::<Result<_, _>>()?;
    let Some((table, parts)) = texts.split_first() else {
        return Err(usage("create"));
    };
    let declared = parts.join(" ");
    let mut key = Vec::new();
    for part in declared.split(',') {
        let (part, kind) = match part.split_whitespace().collect::<Vec<_>>().as_slice() {
            [part, kind] => ((*part).to_owned(), (*kind).to_owned()),
            _ => return Err(usage("create")),
        };
        let kind = match kind.as_str() {
            "text" => Kind::Text,
            "int" => Kind::Int,
            _ => return Err(hinted(format!("{kind:?} is no kind of a part"), "text or int")),
        };
        key.push((part, kind));
    }
    Ok(Command::Create { table: (*table).to_owned(), key })
}

fn get(rest: &[Vec<u8>], at: Option<At>) -> Result<Command, Misread> {
    match rest.split_first() {
        Some((table, keys)) if !keys.is_empty() => {
            let table = plain(table)?;
            let rows = keys.iter().map(|key| Ok(Row::new(table, plain(key)?))).collect::<Result<_, _>>()?;
            Ok(Command::Get { rows, at })
        }
        _ => Err(usage("get")),
    }
}

fn scan(rest: &[Vec<u8>], at: Option<At>) -> Result<Command, Misread> {
    let texts: Vec<_> = rest.iter().map(|word| plain(word)).collect::<Result<_, _>>()?;
    let Some((table, mut words)) = texts.split_first() else {
        return Err(usage("scan"));
    };
    let mut range = Range::table(*table);
    let mut limit = None;
    let mut first = true;
    while let Some((word, after)) = words.split_first() {
        words = match (*word, after.split_first()) {
            ("from", Some((from, after))) => {
                range.from = (*from).to_owned();
                after
            }
            ("to", Some((to, after))) => {
                range.to = (*to).to_owned();
                after
            }
            ("limit", Some((count, after))) => {
                limit = Some(usize::try_from(number("limit", count)?).unwrap_or(usize::MAX));
                after
            }
            (prefix, _) if first => {
                range.prefix = prefix.to_owned();
                after
            }
            _ => return Err(usage("scan")),
        };
        first = false;
    }
    Ok(Command::Scan { range, limit, at })
}

fn at(rest: &[Vec<u8>]) -> Result<Command, Misread> {
    let Some((when, rest)) = rest.split_first() else {
        return Err(usage("at"));
    };
    let when = plain(when)?;
    let at = match when.strip_prefix('-') {
        Some(ago) => humantime::parse_duration(ago).ok().map(At::Ago),
        None => when.parse().ok().map(At::Timestamp),
    };
    let at = at.ok_or_else(|| {
        hinted(format!("{when:?} is no moment"), "-5s for five seconds ago, or nanoseconds since 1970")
    })?;
    match rest.split_first().map(|(name, rest)| (name.as_slice(), rest)) {
        Some((b"get", rest)) => get(rest, Some(at)),
        Some((b"scan", rest)) => scan(rest, Some(at)),
        _ => Err(usage("at")),
    }
}

fn number(what: &str, text: &str) -> Result<u64, Misread> {
    text.parse().map_err(|_| hinted(format!("{text:?} is no number"), format!("{what} is one")))
}

/// Words of a line. One in double quotes may have spaces, and `\n`, `\t`, `\"`, `\\` and bytes as `\x00`.
fn words(line: &str) -> Result<Vec<Vec<u8>>, Misread> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while !rest.is_empty() && !rest.starts_with('#') {
        let (word, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted_word(quoted)?,
            None => {
                let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                let (word, after) = rest.split_at(end);
                (word.as_bytes().to_vec(), after)
            }
        };
        words.push(word);
        rest = after.trim_start();
    }
    Ok(words)
}

fn quoted_word(quoted: &str) -> Result<(Vec<u8>, &str), Misread> {
    let mut word = Vec::new();
    let mut chars = quoted.chars();
    while let Some(char) = chars.next() {
        match char {
            '"' => return Ok((word, chars.as_str())),
            '\\' => match chars.next() {
                Some('n') => word.push(b'\n'),
                Some('t') => word.push(b'\t'),
                Some('x') => {
                    let hex = chars.as_str().get(..2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
                    word.push(hex.ok_or_else(|| hinted("\\x has two digits of hex after it", "\\x00"))?);
                    chars = chars.as_str().get(2..).unwrap_or_default().chars();
                }
                Some(plain @ ('"' | '\\')) => word.push(if plain == '"' { b'"' } else { b'\\' }),
                _ => return Err(hinted("only n, t, x, \" and \\ follow a \\", "\\\\ is one \\")),
            },
            char => word.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Err(hinted("a quote is not closed", "\"two words\""))
}

fn plain(word: &[u8]) -> Result<&str, Misread> {
    std::str::from_utf8(word)
        .map_err(|_| Misread { message: "only values may be other than UTF-8".to_owned(), hint: None })
}

fn usage(name: &str) -> Misread {
    let found = COMMANDS.iter().find(|(command, ..)| *command == name);
    let (arguments, what) = found.map(|(_, arguments, what)| (*arguments, *what)).unwrap_or_default();
    hinted(format!("it is: {}", format!("{name} {arguments}").trim_end()), what)
}

fn unknown(name: &str) -> Misread {
    // Of two as near, the one is meant that begins the same.
    let near = COMMANDS.iter().map(|(command, ..)| {
        let begins_otherwise = command.chars().next() != name.chars().next();
        (strsim::damerau_levenshtein(name, command), begins_otherwise, *command)
    });
    let hint = match near.min() {
        Some((distance, _, command)) if distance <= TYPOS_MAX => format!("did you mean {command}?"),
        _ => "help shows all there are".to_owned(),
    };
    hinted(format!("there is no command {name:?}"), hint)
}

fn hinted(message: impl Into<String>, hint: impl Into<String>) -> Misread {
    Misread { message: message.into(), hint: Some(hint.into()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn right(line: &str) -> Command {
        parse(line).unwrap().unwrap()
    }

    fn wrong(line: &str) -> (String, String) {
        let misread = parse(line).unwrap_err();
        (misread.message, misread.hint.unwrap_or_default())
    }

    #[test]
    fn commands_are_read_as_they_are_written() {
        let key = vec![("owner".to_owned(), Kind::Text), ("number".to_owned(), Kind::Int)];
        assert_eq!(
            right("create accounts owner text, number int"),
            Command::Create { table: "accounts".to_owned(), key: key.clone() }
        );
        assert_eq!(
            right("create accounts owner text ,number int"),
            Command::Create { table: "accounts".to_owned(), key }
        );
        assert_eq!(
            right(r#"put accounts alice/17 "a b\x00\"""#),
            Command::Put { row: Row::new("accounts", "alice/17"), value: b"a b\0\"".to_vec() }
        );
        assert_eq!(
            right("scan accounts alice from alice/3 to alice/9 limit 10 # all of hers"),
            Command::Scan {
                range: Range::prefix("accounts", "alice").from("alice/3").to("alice/9"),
                limit: Some(10),
                at: None
            }
        );
        assert_eq!(
            right("at -5s get accounts alice/17"),
            Command::Get {
                rows: vec![Row::new("accounts", "alice/17")],
                at: Some(At::Ago(Duration::from_secs(5)))
            }
        );
        assert_eq!(
            right("split 7 accounts/m/0"),
            Command::Split { split: 7, at: Some(Row::new("accounts", "m/0")) }
        );
        assert_eq!(right("move 1 2 65539"), Command::Move { split: 1, from: 2, to: 65539 });
        assert_eq!(parse("   "), Ok(None));
        assert_eq!(parse("# nothing"), Ok(None));
    }

    #[test]
    fn what_is_wrong_comes_with_what_is_right() {
        assert_eq!(wrong("scna accounts").1, "did you mean scan?");
        assert_eq!(wrong("pt accounts a/1 5").1, "did you mean put?");
        assert_eq!(wrong("frobnicate").1, "help shows all there are");
        assert_eq!(wrong("put accounts alice/17 two words").1, "put quotes around it: \"two words\"");
        assert_eq!(wrong("create accounts owner words").1, "text or int");
        assert_eq!(wrong("at noon get accounts a/1").0, "\"noon\" is no moment");
        assert_eq!(wrong("get accounts").0, "it is: get TABLE KEY …");
        assert_eq!(wrong("put a b \"c").0, "a quote is not closed");
        assert_eq!(wrong("exit now"), ("it is: quit".to_owned(), "ends the shell".to_owned()));
        assert_eq!(wrong("merge one").0, "\"one\" is no number");
    }

    proptest! {
        #[test]
        fn no_line_panics(line in "(put|scan|at|create|split)? ?\\PC{0,30}") {
            let _read = parse(&line);
        }
    }
}
