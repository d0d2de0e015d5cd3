//! `palisade tap`: requests of one sidecar as they end.

use std::net::SocketAddr;
use std::path::Path;

use bytes::Bytes;
use clap::ValueEnum;
use http::header::HOST;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use owo_colors::OwoColorize as _;
use serde::Deserialize;
use tokio::net::TcpStream;
use url::form_urlencoded;

use crate::Global;
use crate::cmd::config;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

/// A record is far shorter: what has no end of line by then is no record.
const MAX_LINE_BYTES: usize = 64 * 1024;
/// Cells grow with what is in them, up to here.
const MAX_CELL_CHARS: usize = 48;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The sidecar's admin port. Default: that of --service in mesh.toml, or of the sidecar.toml that
    /// --config names.
    #[arg(long, value_name = "ADDRESS:PORT")]
    admin: Option<SocketAddr>,
    /// The service in mesh.toml whose sidecar is looked at.
    #[arg(long, value_name = "NAME", conflicts_with = "admin")]
    service: Option<String>,
    /// Only requests from or to this SPIFFE ID. In this and the next four, * stands for anything.
    #[arg(long, value_name = "ID")]
    peer: Option<String>,
    /// Only requests of this user.
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Only requests for this action.
    #[arg(long, value_name = "ACTION")]
    action: Option<String>,
    /// Only requests on this object, such as 'Account::"17"'.
    #[arg(long, value_name = "OBJECT")]
    object: Option<String>,
    /// Only requests for this path.
    #[arg(long, value_name = "GLOB")]
    path: Option<String>,
    /// Only requests that were decided so; calls to others have no verdict here.
    #[arg(long)]
    verdict: Option<Verdict>,
    /// Print each record as a line of JSON.
    #[arg(long)]
    json: bool,
    /// End after so many requests.
    #[arg(short = 'n', value_name = "COUNT")]
    count: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Verdict {
    Allow,
    Deny,
    Error,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Error => "error",
        }
    }
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let admin = address(args, global)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    runtime.block_on(follow(args, admin, printer))
}

fn address(args: &Args, global: &Global) -> Result<SocketAddr, Failure> {
    if let Some(admin) = args.admin {
        return Ok(admin);
    }
    let missing = |what: String| {
        let hint = "name the sidecar's admin port with --admin ADDRESS:PORT";
        Failure::usage(what).hint(hint)
    };
    if let Some(name) = &args.service {
        let mesh = config::load(&global.config)?;
        let mut services = mesh.service.iter();
        let found = services.find(|(service, _)| service.as_str() == name).map(|(_, service)| service.admin);
        return found.ok_or_else(|| missing(format!("mesh.toml has no service `{name}`")));
    }
    if global.config == Path::new("mesh.toml") {
        return Err(missing("the sidecar of which service?".to_owned()).hint(
            "name it with --service NAME, with --config FILE the sidecar.toml of one that runs alone, or its \
             admin port with --admin ADDRESS:PORT",
        ));
    }
    let standalone = config::load_standalone(&global.config)?;
    standalone.admin.ok_or_else(|| missing(format!("{} has no [admin]", global.config.display())))
}

async fn follow(args: &Args, admin: SocketAddr, printer: &Printer) -> Result<Exit, Failure> {
    let response = open(args, admin).await?;
    if response.status() != StatusCode::OK {
        return Err(refused(admin, response).await);
    }
    let mut body = response.into_body();
    let mut shown = Shown { printer, json: args.json, left: args.count, rows: Rows::default() };
    shown.begin()?;
    let mut unread = Vec::new();
    while shown.left != Some(0) {
        let Some(frame) = body.frame().await else {
            return Err(Failure::new(format!("the sidecar at {admin} has ended the tap")).hint(
                "it ends when the sidecar drains, and when what it says is not read for half a minute",
            ));
        };
        let frame = frame.map_err(|error| Failure::new("the tap broke").because(&error))?;
        unread.extend_from_slice(&frame.into_data().unwrap_or_default());
        let whole = unread.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let rest = unread.split_off(whole);
        shown.lines(&unread)?;
        unread = rest;
        if unread.len() > MAX_LINE_BYTES {
            return Err(Failure::new(format!("what {admin} says is not a sidecar's tap")));
        }
    }
    Ok(Exit::Ok)
}

async fn open(args: &Args, admin: SocketAddr) -> Result<Response<Incoming>, Failure> {
    let failed = |error: &dyn std::error::Error| {
        Failure::new(format!("no sidecar answers at {admin}"))
            .because(error)
            .hint("it is the admin port that is asked, and only on the sidecar's own machine")
    };
    let stream = TcpStream::connect(admin).await.map_err(|error| failed(&error))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
    let request = Request::get(format!("/debug/tap?{}", query(args))).header(HOST, admin.to_string());
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| failed(&error))?;
    let response = sender.send_request(request);
    // The connection is driven by whoever reads from it; its own error comes with the body's.
    #[expect(clippy::disallowed_methods, reason = "it ends with this command's runtime")]
    tokio::spawn(connection);
    response.await.map_err(|error| failed(&error))
}

fn query(args: &Args) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    let verdict = args.verdict.map(|verdict| verdict.name().to_owned());
    let filters = [
        ("peer", &args.peer),
        ("user", &args.user),
        ("action", &args.action),
        ("object", &args.object),
        ("path", &args.path),
        ("verdict", &verdict),
    ];
    for (name, pattern) in filters {
        query.extend_pairs(pattern.iter().map(|pattern| (name, pattern)));
    }
    query.finish()
}

async fn refused(admin: SocketAddr, response: Response<Incoming>) -> Failure {
    let status = response.status();
    let body = http_body_util::Limited::new(response.into_body(), MAX_LINE_BYTES).collect().await;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    let why = serde_json::from_slice::<serde_json::Value>(&body).unwrap_or_default();
    let why = why.get("error").and_then(|why| why.as_str()).unwrap_or("it gives no reason");
    let failure = Failure::new(format!("the sidecar at {admin} does not let anybody tap: {status}, {why}"));
    if status == StatusCode::NOT_FOUND {
        return failure.hint("it may be older than this command");
    }
    failure
}

/// What is printed, as it comes.
struct Shown<'a> {
    printer: &'a Printer,
    json: bool,
    /// Requests that are still wanted; none for all.
    left: Option<u64>,
    rows: Rows,
}

impl Shown<'_> {
    fn begin(&mut self) -> Result<(), Failure> {
        if self.json { Ok(()) } else { self.printer.data(&self.rows.heading()) }
    }

    fn lines(&mut self, lines: &[u8]) -> Result<(), Failure> {
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            if self.left == Some(0) {
                return Ok(());
            }
            let line = String::from_utf8_lossy(line);
            let Ok(record) = serde_json::from_str::<Record>(&line) else {
                self.printer.warning(&format!("not a record: {}", printable(&line)));
                continue;
            };
            if let Some(lost) = record.lost {
                self.printer
                    .warning(&format!("{lost} requests are not shown: they came faster than they were read"));
                continue;
            }
            let text = if self.json {
                format!("{line}\n")
            } else {
                self.rows.row(&record, self.printer.colours_data())
            };
            self.printer.data(&text)?;
            self.left = self.left.map(|left| left - 1);
        }
        Ok(())
    }
}

/// A line of the tap: a request, or how many are missing.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Record {
    lost: Option<u64>,
    time: String,
    direction: String,
    peer: String,
    user: String,
    method: String,
    path: String,
    action: String,
    objects: String,
    verdict: String,
    rule: String,
    receipt: String,
    status: u16,
    took_us: u64,
    note: String,
}

const COLUMNS: usize = 9;
const HEADINGS: [&str; COLUMNS] =
    ["time", "way", "verdict", "status", "took", "peer", "user", "request", "action and object, rule"];

/// Rows in columns that widen as they need to, since what will come is not known.
struct Rows {
    widths: [usize; COLUMNS],
}

impl Default for Rows {
    fn default() -> Self {
        Self { widths: HEADINGS.map(str::len) }
    }
}

impl Rows {
    fn heading(&mut self) -> String {
        // As wide as what is always there.
        for (width, usual) in self.widths.iter_mut().zip([12, 8, 7, 6, 8, 32, 8, 24]) {
            *width = usual.max(*width);
        }
        self.line(&HEADINGS.map(str::to_owned), None)
    }

    fn row(&mut self, record: &Record, colour: bool) -> String {
        // Of `2026-11-25T19:01:14.123Z` what changes.
        let time = record.time.get(11..23).unwrap_or(&record.time);
        let peer = record.peer.strip_prefix("spiffe://").unwrap_or(&record.peer);
        let spaced = |parts: &[&str]| {
            let parts: Vec<&str> = parts.iter().copied().filter(|part| !part.is_empty()).collect();
            printable(&parts.join("  "))
        };
        let receipt = if record.verdict == "deny" { record.receipt.as_str() } else { "" };
        let cells = [
            printable(time),
            printable(&record.direction),
            printable(&record.verdict),
            record.status.to_string(),
            took(record.took_us),
            printable(peer),
            printable(&record.user),
            printable(&format!("{} {}", record.method, record.path)),
            spaced(&[&record.action, &record.objects, &record.rule, receipt, &record.note]),
        ];
        self.line(&cells, colour.then_some(record.verdict.as_str()))
    }

    /// With the verdict in its colour, if there is to be colour.
    fn line(&mut self, cells: &[String; COLUMNS], verdict: Option<&str>) -> String {
        let mut line = String::new();
        for (column, (cell, width)) in cells.iter().zip(&mut self.widths).enumerate() {
            *width = (*width).max(cell.chars().count().min(MAX_CELL_CHARS));
            let padded = format!("{cell:<width$}", width = *width);
            let padded = match verdict {
                Some("allow") if column == 2 => padded.green().to_string(),
                Some("deny") if column == 2 => padded.red().bold().to_string(),
                Some("error") if column == 2 => padded.yellow().to_string(),
                _ => padded,
            };
            line.push_str(if column + 1 == COLUMNS { padded.trim_end() } else { &padded });
            if column + 1 < COLUMNS {
                line.push_str("  ");
            }
        }
        let mut line = line.trim_end().to_owned();
        line.push('\n');
        line
    }
}

fn took(microseconds: u64) -> String {
    match microseconds {
        0..1_000 => format!("{microseconds}us"),
        1_000..1_000_000 => format!("{}.{}ms", microseconds / 1_000, microseconds % 1_000 / 100),
        _ => format!("{}.{}s", microseconds / 1_000_000, microseconds % 1_000_000 / 100_000),
    }
}

/// Text from strangers, as a terminal may have it: what would move its cursor is shown, not done.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(json: serde_json::Value) -> Record {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn rows_stand_in_columns() {
        let mut rows = Rows::default();
        let denied = record(serde_json::json!({
            "time": "2026-11-25T19:01:14.123Z", "direction": "inbound", "peer": "spiffe://bank.example/service/web",
            "user": "alice", "method": "GET", "path": "/accounts/42", "action": "ReadAccount",
            "objects": "Account::\"42\"", "verdict": "deny", "rule": "policy.no_permit", "receipt": "r-1",
            "status": 403, "took_us": 1234,
        }));
        let passed = record(serde_json::json!({
            "time": "2026-11-25T19:01:15.000Z", "direction": "outbound", "peer": "spiffe://bank.example/service/payments",
            "method": "POST", "path": "/transfers", "status": 201, "took_us": 999, "receipt": "r-2",
        }));
        let text = rows.heading() + &rows.row(&denied, false) + &rows.row(&passed, false);
        let expected = "\
time          way       verdict  status  took      peer                              user      request                   action and object, rule
19:01:14.123  inbound   deny     403     1.2ms     bank.example/service/web          alice     GET /accounts/42          ReadAccount  Account::\"42\"  policy.no_permit  r-1
19:01:15.000  outbound           201     999us     bank.example/service/payments               POST /transfers
";
        assert_eq!(text, expected);
        assert!(rows.row(&denied, true).contains("\u{1b}["));
    }

    #[test]
    fn what_would_move_the_cursor_is_shown_and_not_done() {
        let nasty = record(serde_json::json!({"path": "/\u{1b}[2J", "user": "a\rb", "took_us": 2_500_000}));
        let row = Rows::default().row(&nasty, false);
        assert!(row.contains("/\\u{1b}[2J") && row.contains("a\\rb") && row.contains("2.5s"), "{row}");
        assert!(!row.trim_end().chars().any(char::is_control));
    }
}
