//! Log lines of the long-running verbs: JSON, one object a line.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{Format, Json, JsonFields};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::failure::Failure;

/// The target of the lines that tell of requests.
const ACCESS: &str = "access";

/// Starts logging to standard error with `filter`, which is written like `info,sidecar=debug`.
pub(crate) fn start(filter: &str) -> Result<(), Failure> {
    begin(tracing_subscriber::registry().with(json(io::stderr).with_filter(parse(filter)?)))
}

/// Starts logging with `filter` to standard error, but for the lines that tell of requests, which all go
/// to `access`.
pub(crate) fn start_apart(filter: &str, access: BoxMakeWriter) -> Result<(), Failure> {
    let elsewhere = format!("{ACCESS}=off").parse().map_err(|_| Failure::new("no log filter"))?;
    let rest = json(io::stderr).with_filter(parse(filter)?.add_directive(elsewhere));
    let only = Targets::new().with_target(ACCESS, LevelFilter::INFO);
    begin(tracing_subscriber::registry().with(rest).with(json(access).with_filter(only)))
}

fn begin(subscriber: impl SubscriberInitExt) -> Result<(), Failure> {
    subscriber.try_init().map_err(|error| Failure::new("logging was started twice").because(&error))
}

/// One object a line, the event's own fields beside its level and time.
fn json<S, W>(writer: W) -> fmt::Layer<S, JsonFields, Format<Json>, W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    let layer = fmt::layer().json().flatten_event(true).with_current_span(false).with_span_list(false);
    // A reader that went away must not bring down a process that is draining.
    layer.with_writer(writer).log_internal_errors(false)
}

fn parse(filter: &str) -> Result<EnvFilter, Failure> {
    EnvFilter::try_new(filter).map_err(|error| {
        Failure::usage(format!("`{filter}` is no log filter"))
            .because(&error)
            .hint("write it like info, or warn,sidecar=debug")
    })
}

/// A file that lines are appended to, and that can be opened anew after it was moved away.
#[derive(Debug, Clone)]
pub(crate) struct Appended {
    path: PathBuf,
    file: Arc<Mutex<Arc<File>>>,
}

impl Appended {
    /// Opens `path`, and makes it if it is absent.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: Arc::new(Mutex::new(Arc::new(append(path)?))) })
    }

    /// Goes on in whatever is at the path now.
    pub(crate) fn reopen(&self) -> io::Result<()> {
        let file = Arc::new(append(&self.path)?);
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = file;
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Appended {
    type Writer = Arc<File>;

    fn make_writer(&'a self) -> Arc<File> {
        Arc::clone(&self.file.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Each line is one write at the end: several processes may share a file, and one that is cut short by
/// a log rotation goes on at its new end.
fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_that_was_moved_away_is_opened_anew_when_asked() {
        let directory = tempfile::tempdir().unwrap();
        let (path, moved) = (directory.path().join("access.log"), directory.path().join("access.log.1"));
        let log = Appended::open(&path).unwrap();
        log.make_writer().write_all(b"one\n").unwrap();
        fs::rename(&path, &moved).unwrap();
        log.make_writer().write_all(b"two\n").unwrap();
        log.reopen().unwrap();
        log.make_writer().write_all(b"three\n").unwrap();
        assert_eq!(fs::read_to_string(&moved).unwrap(), "one\ntwo\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "three\n");
    }
}
