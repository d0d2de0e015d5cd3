//! The access log: a line of JSON a request, written where it cannot hold a request up.
//!
//! A request's line is formatted into a buffer in memory; full buffers, and every [`FLUSH_INTERVAL`] whatever
//! there is, go to a thread that writes them. Should that thread not keep up (a full disk, a pipe that nobody
//! reads), lines are dropped and counted, and requests go on.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use identity::Scope;
use identity::clock::SharedClock;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use time::OffsetDateTime;

use crate::metrics::Direction;
use crate::trace::Place;

/// Lines gathered before they are handed over: a few hundred.
const BUFFER_BYTES: usize = 64 * 1024;
/// Buffers on their way to the file; beyond them lines are dropped.
const MAX_WAITING_BUFFERS: usize = 16;
/// How long a line may wait in memory.
const FLUSH_INTERVAL: Duration = Duration::from_millis(250);
/// How long the end of the process waits for the last lines.
const LAST_WRITE_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest text of one member; a target may be of any length.
const MAX_TEXT_BYTES: usize = 2048;

/// One request that has been answered, as whoever watches hears of it.
///
/// Texts are empty where there is nothing to say.
#[derive(Clone, Copy)]
pub struct Finished<'a> {
    /// Which way.
    pub direction: Direction,
    /// Where it stands in its trace.
    pub trace: Place,
    /// The other end's SPIFFE ID.
    pub peer: &'a str,
    /// Outbound, the called service's name.
    pub service: &'a str,
    /// The verified user's id.
    pub user: &'a str,
    /// The request's method.
    pub method: &'a Method,
    /// Its path, without the query.
    pub path: &'a str,
    /// The route's template, of a bounded set.
    pub route: &'a str,
    /// What it was understood as.
    pub action: &'a str,
    /// On what, joined by commas.
    pub objects: &'a dyn fmt::Display,
    /// `allow`, `deny` or `error`; empty outbound, where the callee decides.
    pub verdict: &'a str,
    /// The rule that decided.
    pub rule: &'a dyn fmt::Display,
    /// The decision's id.
    pub receipt: &'a str,
    /// What was answered.
    pub status: StatusCode,
    /// From the request's head to the answer's.
    pub took: Duration,
    /// For the operator: why not.
    pub note: &'a dyn fmt::Display,
}

impl Default for Finished<'_> {
    fn default() -> Self {
        Self {
            direction: Direction::Inbound,
            trace: Place::default(),
            peer: "",
            service: "",
            user: "",
            method: &Method::GET,
            path: "",
            route: "",
            action: "",
            objects: &"",
            verdict: "",
            rule: &"",
            receipt: "",
            status: StatusCode::OK,
            took: Duration::ZERO,
            note: &"",
        }
    }
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessTarget {
    /// Standard output.
    Stdout,
    /// Standard error, beside the process's own log.
    Stderr,
    /// Appended to a file, which [`AccessLog::reopen`] opens again after it was moved away.
    File(PathBuf),
}

impl fmt::Display for AccessTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("standard output"),
            Self::Stderr => f.write_str("standard error"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// The log of one process. Dropping the last handle writes what is left.
#[derive(Debug)]
pub struct AccessLog {
    buffer: Mutex<Buffer>,
    writer: Option<SyncSender<Job>>,
    /// Completes when the writer has ended; behind a lock because the log is shared.
    ended: Mutex<Receiver<()>>,
    lost: Counter,
}

#[derive(Debug, Default)]
struct Buffer {
    lines: Vec<u8>,
    /// The second that `date` is the text of.
    second: u64,
    date: String,
}

#[derive(Debug)]
enum Job {
    Write(Vec<u8>),
    Reopen,
}

impl AccessLog {
    /// Opens the target and begins to write.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or no thread can be started.
    pub fn open(target: AccessTarget, clock: SharedClock, scope: &Scope) -> io::Result<Arc<Self>> {
        let (writer, jobs) = sync_channel(MAX_WAITING_BUFFERS);
        let (done, ended) = sync_channel(1);
        let lost = Counter::default();
        let mut output = Output::open(target)?;
        let dropped = lost.clone();
        std::thread::Builder::new().name("access log".into()).spawn(move || {
            output.write_all_of(&jobs, &dropped);
            if done.send(()).is_err() {
                tracing::debug!("nobody waited for the access log's end");
            }
        })?;
        let log =
            Arc::new(Self { buffer: Mutex::default(), writer: Some(writer), ended: Mutex::new(ended), lost });
        let (flushed, draining) = (Arc::downgrade(&log), scope.clone());
        scope.spawn_critical("access log", async move {
            loop {
                tokio::select! {
                    () = clock.sleep(FLUSH_INTERVAL) => {}
                    () = draining.draining() => return,
                }
                let Some(log) = flushed.upgrade() else { return draining.draining().await };
                log.flush();
            }
        });
        Ok(log)
    }

    /// Writes the line of a request that ended at `now`.
    pub fn write(&self, seen: &Finished<'_>, now: Duration) {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.line(seen, now);
        if buffer.lines.len() >= BUFFER_BYTES {
            self.hand_over(&mut buffer);
        }
    }

    /// Hands what there is to the writer.
    pub fn flush(&self) {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        if !buffer.lines.is_empty() {
            self.hand_over(&mut buffer);
        }
    }

    /// Opens a file target again, as `logrotate` expects after it has moved the old one away.
    pub fn reopen(&self) {
        self.flush();
        if let Some(writer) = &self.writer
            && writer.try_send(Job::Reopen).is_err()
        {
            tracing::warn!("the access log is behind; it was not opened again");
        }
    }

    /// Lines that were dropped since the start.
    pub fn lost(&self) -> u64 {
        self.lost.get()
    }

    /// Adds what is known here to the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("lost_access_log_lines", "Lines that the access log dropped", self.lost.clone());
    }

    fn hand_over(&self, buffer: &mut Buffer) {
        let Some(writer) = &self.writer else { return };
        let lines = std::mem::replace(&mut buffer.lines, Vec::with_capacity(BUFFER_BYTES + 4096));
        if let Err(TrySendError::Full(Job::Write(lines)) | TrySendError::Disconnected(Job::Write(lines))) =
            writer.try_send(Job::Write(lines))
        {
            self.lost.inc_by(count(&lines));
            buffer.lines = lines;
            buffer.lines.clear();
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.flush();
        self.writer = None;
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        if ended.recv_timeout(LAST_WRITE_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the access log could not be written to its end");
        }
    }
}

fn count(lines: &[u8]) -> u64 {
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// What the thread writes to.
#[derive(Debug)]
enum Output {
    Stdout,
    Stderr,
    File { path: PathBuf, file: File },
}

impl Output {
    fn open(target: AccessTarget) -> io::Result<Self> {
        Ok(match target {
            AccessTarget::Stdout => Self::Stdout,
            AccessTarget::Stderr => Self::Stderr,
            AccessTarget::File(path) => Self::File { file: append(&path)?, path },
        })
    }

    fn write_all_of(&mut self, jobs: &Receiver<Job>, lost: &Counter) {
        let mut failing = false;
        while let Ok(job) = jobs.recv() {
            let (outcome, lines) = match &job {
                Job::Write(lines) => (self.write(lines), count(lines)),
                Job::Reopen => (self.reopen(), 0),
            };
            match outcome {
                Ok(()) => failing = false,
                Err(error) => {
                    lost.inc_by(lines);
                    // Once, not once a buffer: the disk is full already.
                    if !failing {
                        tracing::error!(%error, "the access log cannot be written; lines are dropped");
                    }
                    failing = true;
                }
            }
        }
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().lock().write_all(lines).and_then(|()| io::stdout().flush()),
            Self::Stderr => io::stderr().lock().write_all(lines),
            Self::File { file, .. } => file.write_all(lines),
        }
    }

    fn reopen(&mut self) -> io::Result<()> {
        if let Self::File { path, file } = self {
            *file = append(path)?;
        }
        Ok(())
    }
}

fn append(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

impl Buffer {
    fn line(&mut self, seen: &Finished<'_>, now: Duration) {
        if self.date.is_empty() || self.second != now.as_secs() {
            self.second = now.as_secs();
            self.date = date(self.second);
        }
        put_line(&mut self.lines, &self.date, seen, now);
    }
}

/// The line of one request by itself.
pub(crate) fn record(seen: &Finished<'_>, now: Duration) -> Bytes {
    let mut line = Vec::new();
    put_line(&mut line, &date(now.as_secs()), seen, now);
    line.into()
}

fn put_line(lines: &mut Vec<u8>, date: &str, seen: &Finished<'_>, now: Duration) {
    lines.extend_from_slice(b"{\"time\":\"");
    lines.extend_from_slice(date.as_bytes());
    put_digits(lines, now.subsec_millis(), 3);
    lines.extend_from_slice(b"Z\",\"direction\":\"");
    lines.extend_from_slice(seen.direction.name().as_bytes());
    lines.push(b'"');
    text(lines, "peer", seen.peer);
    text(lines, "user", seen.user);
    text(lines, "method", seen.method.as_str());
    text(lines, "path", seen.path);
    text(lines, "route", seen.route);
    text(lines, "action", seen.action);
    member(lines, "objects", seen.objects);
    text(lines, "verdict", seen.verdict);
    member(lines, "rule", seen.rule);
    text(lines, "receipt", seen.receipt);
    lines.extend_from_slice(b",\"status\":");
    lines.extend_from_slice(seen.status.as_str().as_bytes());
    lines.extend_from_slice(b",\"took_us\":");
    put_number(lines, seen.took.as_micros());
    member(lines, "note", seen.note);
    lines.extend_from_slice(b"}\n");
}

/// `2026-11-25T19:01:14.`, to which milliseconds are added.
fn date(second: u64) -> String {
    let at = i64::try_from(second).ok().and_then(|second| OffsetDateTime::from_unix_timestamp(second).ok());
    let at = at.unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (date, time) = (at.date(), at.time());
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

fn put_number(lines: &mut Vec<u8>, number: u128) {
    if write!(lines, "{number}").is_err() {
        lines.push(b'0');
    }
}

fn put_digits(lines: &mut Vec<u8>, number: u32, digits: u32) {
    for place in (0..digits).rev() {
        lines.push(b'0' + (number / 10_u32.pow(place) % 10) as u8);
    }
}

/// [`member`] for what is text already.
fn text(lines: &mut Vec<u8>, name: &str, value: &str) {
    if is_plain(value) && value.len() <= MAX_TEXT_BYTES {
        if !value.is_empty() {
            for part in [",\"", name, "\":\"", value, "\""] {
                lines.extend_from_slice(part.as_bytes());
            }
        }
        return;
    }
    member(lines, name, &value);
}

/// Whether a JSON string holds it as it is. Looks at every byte whatever they are: eight or more at once that way.
fn is_plain(text: &str) -> bool {
    text.bytes().fold(true, |plain, byte| plain & (byte >= 0x20) & (byte != b'"') & (byte != b'\\'))
}

/// `,"name":"value"`, escaped as RFC 8259 §7 wants it; nothing for an empty value.
fn member(lines: &mut Vec<u8>, name: &str, value: &dyn fmt::Display) {
    let before = lines.len();
    lines.extend_from_slice(b",\"");
    lines.extend_from_slice(name.as_bytes());
    lines.extend_from_slice(b"\":\"");
    let begin = lines.len();
    let mut text = Escaped { lines: &mut *lines, end: begin + MAX_TEXT_BYTES };
    let cut = fmt::Write::write_fmt(&mut text, format_args!("{value}")).is_err();
    if lines.len() == begin {
        return lines.truncate(before);
    }
    if cut {
        lines.extend_from_slice("…".as_bytes());
    }
    lines.push(b'"');
}

/// Text inside a JSON string; an error means that no more of it fits.
struct Escaped<'a> {
    lines: &'a mut Vec<u8>,
    end: usize,
}

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if is_plain(text) && self.lines.len() + text.len() <= self.end {
            self.lines.extend_from_slice(text.as_bytes());
            return Ok(());
        }
        for character in text.chars() {
            if self.lines.len() >= self.end {
                return Err(fmt::Error);
            }
            match character {
                '"' => self.lines.extend_from_slice(b"\\\""),
                '\\' => self.lines.extend_from_slice(b"\\\\"),
                control if (control as u32) < 0x20 => {
                    self.lines.extend_from_slice(b"\\u00");
                    for digit in [control as u32 / 16, control as u32 % 16] {
                        self.lines.push(b"0123456789abcdef".get(digit as usize).copied().unwrap_or(b'0'));
                    }
                }
                character => {
                    self.lines.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use identity::clock::ManualClock;
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn finished<'a>(path: &'a str, note: &'a str) -> Finished<'a> {
        Finished {
            direction: Direction::Inbound,
            peer: "spiffe://bank.example/service/web",
            user: "alice",
            method: &Method::GET,
            path,
            route: "GET /accounts/{id:int}",
            action: "ReadAccount",
            objects: &"Accounts::Account::\"17\"",
            verdict: "allow",
            rule: &"web-reads-own-accounts",
            receipt: "r-7k2m0q9xw4e8t5hz",
            status: StatusCode::OK,
            took: Duration::from_micros(431),
            note: Box::leak(Box::new(note)),
            ..Finished::default()
        }
    }

    fn line(seen: &Finished<'_>) -> Value {
        let mut buffer = Buffer::default();
        buffer.line(seen, Duration::from_millis(1_795_633_274_042));
        assert_eq!(count(&buffer.lines), 1);
        serde_json::from_slice(&buffer.lines).unwrap()
    }

    #[test]
    fn a_line_says_who_what_and_why() {
        let line = line(&finished("/accounts/17", ""));
        assert_eq!(line["time"], "2026-11-25T19:01:14.042Z");
        assert_eq!(line["objects"], "Accounts::Account::\"17\"");
        assert_eq!((line["status"].as_u64(), line["took_us"].as_u64()), (Some(200), Some(431)));
        assert!(line.get("note").is_none());
    }

    proptest! {
        #[test]
        fn any_text_stays_inside_its_string(path in "\\PC{0,40}", note in any::<String>()) {
            let line = line(&finished(&path, &note));
            prop_assert_eq!(line.get("path").and_then(Value::as_str).unwrap_or_default(), &path);
            prop_assert_eq!(line.get("note").and_then(Value::as_str).unwrap_or_default(), &note);
        }
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let line = line(&finished(&"ü".repeat(4000), ""));
        let path = line["path"].as_str().unwrap();
        assert!(path.ends_with("ü…") && path.len() <= MAX_TEXT_BYTES + 4, "{}", path.len());
    }

    #[tokio::test]
    async fn lines_reach_the_file_and_a_moved_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, moved) = (folder.path().join("access.log"), folder.path().join("access.log.1"));
        let scope = Scope::new();
        let clock: SharedClock = ManualClock::at(Duration::from_secs(1));
        let log = AccessLog::open(AccessTarget::File(path.clone()), clock, &scope).unwrap();
        log.write(&finished("/before", ""), Duration::from_secs(1));
        log.flush();
        std::fs::rename(&path, &moved).unwrap();
        log.reopen();
        log.write(&finished("/after", ""), Duration::from_secs(1));
        drop(log);
        assert!(std::fs::read_to_string(&moved).unwrap().contains("/before"));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("/after") && !text.contains("/before"));
        scope.drain();
        scope.finished(Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn a_full_disk_drops_lines_and_counts_them() {
        let scope = Scope::new();
        let clock: SharedClock = ManualClock::at(Duration::from_secs(1));
        let log = AccessLog::open(AccessTarget::File("/dev/full".into()), clock, &scope).unwrap();
        log.write(&finished("/", ""), Duration::from_secs(1));
        log.write(&finished("/", ""), Duration::from_secs(1));
        log.flush();
        while log.lost() < 2 {
            tokio::task::yield_now().await;
        }
        let (mut registry, mut text) = (Registry::default(), String::new());
        log.register(&mut registry);
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("\nlost_access_log_lines_total 2\n"), "{text}");
        drop(log);
        scope.drain();
        scope.finished(Duration::from_secs(5)).await.unwrap();
    }
}
