//! The last decisions of this host in two files of bounded size, a line each: what is known here while control is away.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::json;
use tokio::sync::mpsc;

use identity::Scope;

use crate::pb::control::Decision;

/// The newer file; the older has `.1` behind its name.
const FILE_NAME: &str = "decisions.jsonl";
/// Bytes at which a file becomes the older one: with both, a day of a host that is tried at.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// Lines that wait for the disk. More are in control's queue, and not here.
const MAX_WAITING: usize = 4_096;
/// Lines written at once.
const MAX_BATCH: usize = 512;

/// Takes decisions to be written. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct DecisionLog(mpsc::Sender<String>);

impl DecisionLog {
    /// Writes below the directory `state`, until `scope` drains.
    pub(super) fn start(state: &Path, scope: &Scope) -> Self {
        let (sender, mut receiver) = mpsc::channel::<String>(MAX_WAITING);
        let (path, draining) = (state.join(FILE_NAME), scope.clone());
        scope.spawn_critical("decision log", async move {
            let mut failing = false;
            loop {
                let mut lines = Vec::new();
                tokio::select! {
                    count = receiver.recv_many(&mut lines, MAX_BATCH) => if count == 0 { draining.draining().await },
                    () = draining.draining() => {}
                }
                let last = draining.is_draining();
                if last {
                    receiver.close();
                    while let Ok(line) = receiver.try_recv() {
                        lines.push(line);
                    }
                }
                let to = path.clone();
                let written = tokio::task::spawn_blocking(move || append(&to, &lines, MAX_FILE_BYTES)).await;
                match written.unwrap_or_else(|_| Err(io::Error::other("the agent is stopping"))) {
                    Ok(()) => failing = false,
                    Err(error) if !failing => {
                        tracing::error!(path = %path.display(), %error, "decisions are not written down on this host");
                        failing = true;
                    }
                    Err(_) => {}
                }
                if last {
                    return;
                }
            }
        });
        Self(sender)
    }

    /// Writes a decision down, in the background; without room it is left out.
    pub(super) fn write(&self, decision: &Decision) {
        let record = serde_json::from_str::<serde_json::Value>(&decision.json).unwrap_or_default();
        let line = json!({
            "receipt": decision.receipt,
            "time_ms": decision.time_ms,
            "service": decision.service,
            "verdict": decision.verdict,
            "reporter": decision.reporter,
            "record": record,
        });
        let _no_room = self.0.try_send(format!("{line}\n")).is_err();
    }
}

fn append(path: &Path, lines: &[String], max_bytes: u64) -> io::Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut file = open(path)?;
    if file.metadata()?.len() >= max_bytes {
        std::fs::rename(path, older(path))?;
        file = open(path)?;
    }
    file.write_all(lines.concat().as_bytes())
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn two_files_of_bounded_size_hold_the_newest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        for number in 0..100 {
            append(&path, &[format!("{number:09}\n")], 95).unwrap();
        }
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        assert_eq!((read(&path).len(), read(&older(&path)).len()), (100, 100));
        assert!(read(&path).ends_with("000000099\n") && read(&older(&path)).starts_with("000000080\n"));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn what_was_taken_is_on_the_disk_when_the_agent_has_ended() {
        let (directory, scope) = (tempfile::tempdir().unwrap(), Scope::new());
        let log = DecisionLog::start(directory.path(), &scope);
        for number in 0..1_000 {
            log.write(&Decision {
                receipt: number.to_string(),
                json: "{\"a\":1}".into(),
                ..Decision::default()
            });
        }
        scope.drain();
        assert_eq!(scope.finished(std::time::Duration::from_secs(10)).await, Ok(()));
        let text = std::fs::read_to_string(directory.path().join(FILE_NAME)).unwrap();
        assert_eq!(text.lines().count(), 1_000);
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!((&last["receipt"], &last["record"]["a"]), (&json!("999"), &json!(1)));
    }
}
