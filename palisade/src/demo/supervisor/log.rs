//! What a supervised process writes: kept in a bounded file, its last lines at hand.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use identity::Scope;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

/// Largest log of one role before it becomes `ROLE.log.1`; two of them are kept.
const MAX_LOG_BYTES: u64 = 8 * 1024 * 1024;
/// How much of the end is kept at hand.
const MAX_TAIL_BYTES: usize = 8 * 1024;
/// How many lines of it are shown.
const TAIL_LINES: usize = 12;
/// How much is read at once.
const READ_BYTES: usize = 16 * 1024;
/// How long a dead process's output may be held open by what it started in turn.
const REST_WITHIN: Duration = Duration::from_millis(500);

/// The log of one role.
#[derive(Debug)]
pub(super) struct RoleLog {
    path: PathBuf,
    file: Result<File, String>,
    bytes: u64,
    limit_bytes: u64,
    tail: VecDeque<u8>,
}

impl RoleLog {
    /// Opens it to append. A log that cannot be written stops nobody: see [`RoleLog::trouble`].
    pub(super) fn open(path: PathBuf, pid: Option<u32>) -> Self {
        let (file, bytes) = match open(&path) {
            Ok((file, bytes)) => (Ok(file), bytes),
            Err(error) => (Err(error.to_string()), 0),
        };
        let mut log = Self { path, file, bytes, limit_bytes: MAX_LOG_BYTES, tail: VecDeque::new() };
        if let Some(pid) = pid {
            log.write_file(format!("-- process {pid} started\n").as_bytes());
        }
        log
    }

    /// Why nothing is being written, if so.
    pub(super) fn trouble(&self) -> Option<String> {
        self.file.as_ref().err().map(|why| format!("{}: {why}", self.path.display()))
    }

    fn append(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        let over = self.tail.len().saturating_sub(MAX_TAIL_BYTES);
        self.tail.drain(..over);
        self.write_file(bytes);
    }

    fn write_file(&mut self, bytes: &[u8]) {
        if self.bytes >= self.limit_bytes {
            self.rotate();
        }
        let Ok(file) = &mut self.file else { return };
        match file.write_all(bytes) {
            Ok(()) => self.bytes += bytes.len() as u64,
            Err(error) => self.file = Err(error.to_string()),
        }
    }

    fn rotate(&mut self) {
        let mut older = self.path.clone().into_os_string();
        older.push(".1");
        let fresh = fs::rename(&self.path, older).and_then(|()| open(&self.path));
        match fresh {
            Ok((file, bytes)) => (self.file, self.bytes) = (Ok(file), bytes),
            Err(error) => self.file = Err(error.to_string()),
        }
    }

    /// The last lines, safe to be shown: what a process prints does not steer a terminal.
    fn last_lines(&self) -> String {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        let shown = lines.get(from..).unwrap_or_default().iter();
        let clean = shown.map(|line| {
            line.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect::<String>()
        });
        clean.collect::<Vec<_>>().join("\n")
    }
}

fn open(path: &PathBuf) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

/// The copying of one run's output into the log.
#[derive(Debug)]
pub(super) struct Capture {
    log: Arc<Mutex<RoleLog>>,
    done: oneshot::Receiver<()>,
    /// Dropped to end the copying.
    _more: oneshot::Sender<()>,
}

impl Capture {
    /// Copies from `output`, the reading end of a pipe, until it is closed.
    pub(super) fn start(output: OwnedFd, log: RoleLog, scope: &Scope) -> Self {
        let log = Arc::new(Mutex::new(log));
        let (done_tell, done) = oneshot::channel();
        let (more, enough) = oneshot::channel();
        let to = Arc::clone(&log);
        scope.spawn("output of a process", async move {
            tokio::select! {
                () = copy(output, &to) => {}
                _ = enough => {}
            }
            // Nobody waits any more if the supervisor was dropped.
            let _nobody = done_tell.send(()).is_err();
        });
        Self { log, done, _more: more }
    }

    /// The last lines so far.
    pub(super) fn tail(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).last_lines()
    }

    /// Waits for the rest of a dead process's output, within reason, and gives the last lines.
    pub(super) async fn finish(mut self) -> String {
        let _held_open = tokio::time::timeout(REST_WITHIN, &mut self.done).await.is_err();
        self.tail()
    }
}

async fn copy(output: OwnedFd, log: &Mutex<RoleLog>) {
    let Ok(mut reader) = pipe::Receiver::from_owned_fd(output) else { return };
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match reader.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                log.append(buffer.get(..n).unwrap_or_default());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_its_end_stays_at_hand() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.log");
        let mut log = RoleLog::open(path.clone(), Some(7));
        log.limit_bytes = 100;
        for line in 0..100 {
            log.append(format!("line {line}\x1b[2J\n").as_bytes());
        }
        let size = |name: &str| fs::metadata(directory.path().join(name)).unwrap().len();
        assert!(size("web.log") <= 120 && size("web.log.1") <= 120);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        let tail = log.last_lines();
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.ends_with("line 99\u{fffd}[2J"), "{tail:?}");
    }

    #[test]
    fn a_log_that_cannot_be_written_is_told_and_still_has_a_tail() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = RoleLog::open(directory.path().join("no/web.log"), Some(7));
        assert!(log.trouble().unwrap().contains("no/web.log: "));
        log.append(b"last words\n");
        assert_eq!(log.last_lines(), "last words");
    }
}
