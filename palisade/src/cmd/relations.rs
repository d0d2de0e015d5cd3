//! `palisade relations`: what is true of a service's objects, where its map says relations = "store".

use std::io::Read as _;
use std::path::PathBuf;

use ca::admin::AdminError;
use ca::relations::{Attributes, Change, KeptRelation, Object, RelationsPage, WriteError, Writer, Written};
use clap::Subcommand;
use http::StatusCode;
use identity::{SystemClock, json};
use serde_json::{Map, Value as Json, json};

use crate::Global;
use crate::cmd::{admin, config};
use crate::failure::{Exit, Failure};
use crate::printer::{Printer, table};

/// Largest file of changes.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Say all that is true of an object from now on; prints the token of the revision.
    Write {
        /// The service, by the name of its policies.
        service: String,
        /// The object, such as 'Account::"17"'. With --file there is none.
        #[arg(required_unless_present = "file", conflicts_with = "file")]
        object: Option<String>,
        /// NAME=VALUE: true, false, an integer, a list in JSON, or text; quoted ("17") it is text in any case.
        #[arg(conflicts_with = "file")]
        attributes: Vec<String>,
        /// A batch, all or none: a JSON list of {"type", "id", "attributes" or "delete", "must_be", "must_exist"}; - reads
        /// standard input.
        #[arg(long, value_name = "FILE", conflicts_with_all = ["must_be", "must_exist"])]
        file: Option<PathBuf>,
        #[command(flatten)]
        how: How,
    },
    /// Say that nothing is true of an object any more: whatever needs to know something of it is denied.
    Delete {
        /// The service, by the name of its policies.
        service: String,
        /// The object, such as 'Account::"17"'.
        object: String,
        #[command(flatten)]
        how: How,
    },
    /// Show one object, or all. Exit code 1 if the object has none.
    Read {
        /// The service, by the name of its policies.
        service: String,
        /// The object, such as 'Account::"17"'.
        object: Option<String>,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show every change as it is written, until control ends.
    Watch {
        /// The service, by the name of its policies.
        service: String,
        /// Print each batch as a line of JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct How {
    /// Write nothing unless the object has this revision; 0: unless it is not there.
    #[arg(long, value_name = "REVISION")]
    must_be: Option<u64>,
    /// Write nothing unless the object is there.
    #[arg(long)]
    must_exist: bool,
    /// Write by this process's own identity, through the agent, as a service does; otherwise by control's admin socket.
    #[arg(long)]
    by_agent: bool,
    /// Print revision and token as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    match &args.what {
        What::Write { service, object, attributes, file, how } => {
            let changes = match (file, object) {
                (Some(file), _) => batch(file)?,
                (None, Some(object)) => vec![change(object, Some(self::attributes(attributes)?), how)?],
                (None, None) => return Err(Failure::usage("there is nothing to write")),
            };
            write(service, changes, how, global, printer)
        }
        What::Delete { service, object, how } => {
            write(service, vec![change(object, None, how)?], how, global, printer)
        }
        What::Read { service, object: Some(object), json } => {
            let object = self::object(object)?;
            let (name, of) = (service.clone(), object.clone());
            let found = ask(global, async move |client| client.relation(&name, &of).await)?;
            if *json {
                printer.data(&format!("{:#}\n", json!({ "version": 1, "relation": found })))?;
            }
            match found {
                Some(found) if !json => printer.data(&shown(&[found]))?,
                Some(_) => {}
                None => return Err(Failure::new(format!("nothing is written of {object}"))),
            }
            Ok(Exit::Ok)
        }
        What::Read { service, object: None, json } => read_all(service, *json, global, printer),
        What::Watch { service, json } => watch(service, *json, global, printer),
    }
}

fn object(text: &str) -> Result<Object, Failure> {
    Object::written(text)
        .map_err(|error| Failure::usage(error.to_string()).hint("quote it: 'Account::\"17\"'"))
}

fn change(object: &str, attributes: Option<Attributes>, how: &How) -> Result<Change, Failure> {
    let object = self::object(object)?;
    Ok(Change {
        kind: object.kind().to_owned(),
        id: object.id().to_owned(),
        delete: attributes.is_none(),
        attributes,
        must_be: how.must_be,
        must_exist: how.must_exist,
    })
}

fn attributes(written: &[String]) -> Result<Attributes, Failure> {
    let mut map = Map::new();
    for text in written {
        let (name, value) = text.split_once('=').ok_or_else(|| {
            Failure::usage(format!("`{text}` is no attribute")).hint("write NAME=VALUE, such as owner=alice")
        })?;
        if map.insert(name.to_owned(), value_of(value)).is_some() {
            return Err(Failure::usage(format!("the attribute `{name}` is there twice")));
        }
    }
    Attributes::new(map).map_err(|error| Failure::usage(error.to_string()))
}

/// What JSON takes for a truth value, an integer, a list or a text is that; all else is text.
fn value_of(text: &str) -> Json {
    json::parse(text.as_bytes()).unwrap_or_else(|_| Json::String(text.to_owned()))
}

fn batch(file: &PathBuf) -> Result<Vec<Change>, Failure> {
    let shown = file.display();
    let unread = |error: std::io::Error| Failure::new(format!("{shown} cannot be read")).because(&error);
    let mut text = Vec::new();
    let read = if file.as_os_str() == "-" {
        std::io::stdin().take(MAX_FILE_BYTES + 1).read_to_end(&mut text)
    } else {
        std::fs::File::open(file).map_err(unread)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut text)
    };
    read.map_err(unread)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(Failure::invalid(format!("{shown} is longer than {MAX_FILE_BYTES} bytes")));
    }
    let parsed = json::parse(&text).map_err(|error| error.to_string());
    let changes = parsed.and_then(|json| serde_json::from_value(json).map_err(|error| error.to_string()));
    changes.map_err(|error| {
        Failure::invalid(format!("{shown} is no list of changes: {error}"))
            .hint(r#"such as [{"type": "Account", "id": "17", "attributes": {"owner": "alice"}}]"#)
    })
}

fn write(
    service: &str,
    changes: Vec<Change>,
    how: &How,
    global: &Global,
    printer: &Printer,
) -> Result<Exit, Failure> {
    for change in &changes {
        change.object().map_err(|error| Failure::invalid(error.to_string()))?;
    }
    let written = if how.by_agent {
        by_agent(service, &changes, global)?
    } else {
        let name = service.to_owned();
        ask(global, async move |client| client.write_relations(&name, changes).await)?
    };
    let Written { revision, token } = written;
    if how.json {
        let said = json!({ "version": 1, "revision": revision, "token": token });
        printer.data(&format!("{said:#}\n"))?;
    } else {
        printer.data(&format!("{token}\n"))?;
    }
    Ok(Exit::Ok)
}

fn by_agent(service: &str, changes: &[Change], global: &Global) -> Result<Written, Failure> {
    let socket = config::load(&global.config)?.agent.socket;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    let written = runtime.block_on(async {
        let writer = Writer::new(&socket, SystemClock::shared());
        writer.write(service, changes).await
    });
    written.map_err(|error| {
        let failure = Failure::new("nothing was written").because(&error);
        match error {
            WriteError::Denied(_) => Failure { exit: Exit::Denied, ..failure }
                .hint("the service itself may, and those in its relations_writers in mesh.toml"),
            WriteError::Malformed(_) => Failure { exit: Exit::Invalid, ..failure },
            WriteError::Precondition(_) => failure.hint("read it again: somebody else has written it"),
            WriteError::Unavailable(_) => {
                Failure { message: "it is not known whether it was written".to_owned(), ..failure }
            }
        }
    })
}

/// Asks control; what it finds wrong with the question is said as such.
fn ask<T>(
    global: &Global,
    question: impl AsyncFnOnce(ca::admin::AdminClient) -> Result<T, AdminError>,
) -> Result<T, Failure> {
    let mut refused = None;
    let answer = admin::ask(global, async |client| match question(client).await {
        Err(AdminError::Refused { status, message }) => {
            refused = Some((status, message.clone()));
            Err(AdminError::Refused { status, message })
        }
        other => other,
    });
    match refused {
        Some((StatusCode::NOT_FOUND, why)) => {
            Err(Failure::usage(why)
                .hint("its name is that of its policies, as `palisade config show` has it"))
        }
        Some((StatusCode::BAD_REQUEST, why)) => Err(Failure::invalid(why)),
        Some((StatusCode::CONFLICT, why)) => {
            Err(Failure::new(why).hint("read it again: somebody else has written it"))
        }
        Some((StatusCode::INSUFFICIENT_STORAGE, why)) => Err(Failure::new(why)),
        _ => answer,
    }
}

fn read_all(service: &str, as_json: bool, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let name = service.to_owned();
    let (head, relations) = ask(global, async move |client| {
        let mut relations: Vec<KeptRelation> = Vec::new();
        let mut after: Option<Object> = None;
        loop {
            let mut page = client.read_relations(&name, after.as_ref(), None).await?;
            let more = std::mem::take(&mut page.more);
            relations.append(&mut page.relations);
            after = relations.last().and_then(|last| Object::new(&last.kind, &last.id).ok());
            if !more || after.is_none() {
                return Ok((page, relations));
            }
        }
    })?;
    let RelationsPage { epoch, revision, token, .. } = head;
    if as_json {
        let said = json!({ "version": 1, "epoch": epoch, "revision": revision, "token": token, "relations": relations });
        printer.data(&format!("{said:#}\n"))?;
    } else {
        printer.data(&format!("{}revision {revision}, token {token}\n", shown(&relations)))?;
    }
    Ok(Exit::Ok)
}

fn watch(service: &str, as_json: bool, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let name = service.to_owned();
    let said = ask(global, async move |client| {
        client
            .watch_relations(&name, |page| {
                if as_json {
                    return printer.data(&format!("{}\n", json!({ "version": 1, "batch": page })));
                }
                printer.data(&page.relations.iter().map(line).collect::<String>())
            })
            .await
    })?;
    said?;
    Err(Failure::new("control ended, or wrote faster than this could be shown")
        .hint("`palisade relations read` shows what there is"))
}

/// A change as a line.
fn line(relation: &KeptRelation) -> String {
    let KeptRelation { kind, id, revision, by, attributes } = relation;
    let what = attributes.as_ref().map_or_else(|| "deleted".to_owned(), Attributes::text);
    format!("{revision} {kind}::\"{id}\" {what} by {by}\n")
}

fn shown(relations: &[KeptRelation]) -> String {
    let row = |relation: &KeptRelation| {
        vec![
            format!("{}::\"{}\"", relation.kind, relation.id),
            relation.attributes.as_ref().map(Attributes::text).unwrap_or_default(),
            relation.revision.to_string(),
            relation.by.clone(),
        ]
    };
    table(&["object", "attributes", "revision", "by"], &relations.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_what_json_takes_them_for_and_text_otherwise() {
        let written = ["owner=alice", "limit=17", "id=\"17\"", "open=true", r#"members=["bob","carol"]"#];
        let read = attributes(&written.map(str::to_owned)).unwrap();
        assert_eq!(
            Json::Object(read.as_map().clone()),
            json!({"owner": "alice", "limit": 17, "id": "17", "open": true, "members": ["bob", "carol"]})
        );
        for wrong in [&["owner"][..], &["owner=a", "owner=b"], &["in={\"a\":1}"], &["half=1.5"], &["9=a"]] {
            let wrong: Vec<String> = wrong.iter().map(|text| (*text).to_owned()).collect();
            assert_eq!(attributes(&wrong).unwrap_err().exit, Exit::Usage, "{wrong:?}");
        }
    }
}
