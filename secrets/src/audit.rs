//! The audit file: one JSON object a line, one line before a request is carried out and one before it is
//! answered. If a line cannot be written, the request is refused.
//!
//! Each line carries `seq` and `prev`, the SHA-256 of the line before it, so an edit, a missing line or a
//! changed order shows ([`verify`]). Lines missing at the *end* show only against a head that was noted
//! elsewhere: the vault notes one behind its barrier whenever it is sealed and every
//! [`CHECKPOINT_INTERVAL_ENTRIES`] lines.
//!
//! No secret stands in it: tokens and every value of a body are replaced by their HMAC-SHA256 under a key
//! behind the barrier, so that "was it this value?" can be answered and "what was the value?" cannot.
//! While the vault is sealed there is no such key, and values are left out.
//!
//! A line is in the kernel's hands when its write returns: it survives a `kill -9`, not a loss of power.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use identity::hex;
use ring::digest::{SHA256, digest};
use ring::hmac;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::barrier::{Keyring, Purpose};

/// How many lines may be cut off unnoticed: every so many the head is noted behind the barrier.
pub const CHECKPOINT_INTERVAL_ENTRIES: u64 = 1024;
/// Longest line written or verified: a body of 1 MiB of one-byte values, each an HMAC of 64 digits, is cut
/// to one HMAC long before this.
pub const MAX_LINE_BYTES: usize = 4 * 1024 * 1024;
/// Most values of one body that are hashed one by one; a body with more is hashed as a whole.
pub const MAX_HASHED_VALUES: usize = 4096;

const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Why an audit file cannot be used or written.
#[derive(Debug, Error)]
pub enum AuditError {
    /// The file cannot be opened.
    #[error("the audit file {path} cannot be opened")]
    Open {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Others than the owner may read or write the file.
    #[error("the audit file {path} is open to others (mode {mode:o}); make it 0600")]
    Permissions {
        /// Which file.
        path: PathBuf,
        /// Its mode bits.
        mode: u32,
    },
    /// The file's last line is not an audit line, so the chain cannot go on.
    #[error("the audit file {path} does not end in an audit line; move it away to start a new one")]
    Foreign {
        /// Which file.
        path: PathBuf,
    },
    /// A line could not be written.
    #[error("the audit file cannot be written")]
    Write(#[source] std::io::Error),
    /// A line could not be made.
    #[error("an audit line could not be made")]
    Line,
}

/// The end of a chain: how many lines there are and the hash of the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Number of the last line, from 1; 0 for an empty file.
    pub seq: u64,
    /// SHA-256 of the last line, hexadecimal.
    pub hash: String,
}

impl Head {
    /// The head of an empty chain.
    pub fn genesis() -> Self {
        Self { seq: 0, hash: GENESIS.to_owned() }
    }
}

/// What is wrong with an audit file.
#[derive(Debug, Error)]
pub enum Fault {
    /// The file cannot be read.
    #[error("cannot be read")]
    Read(#[source] std::io::Error),
    /// A line is not an audit line.
    #[error("line {line} is not an audit line")]
    Form {
        /// Which line, from 1.
        line: u64,
    },
    /// A line does not follow the one before it: an edit, a gap, or a changed order.
    #[error("line {line} does not follow the line before it: edited, missing or reordered")]
    Chain {
        /// Which line, from 1.
        line: u64,
    },
    /// The head that was noted elsewhere is not in the file.
    #[error("the file lacks entry {seq}, which was noted elsewhere: cut off or replaced")]
    Truncated {
        /// The entry noted.
        seq: u64,
    },
}

/// Replaces values by their HMAC.
#[derive(Clone)]
pub struct Redactor(hmac::Key);

impl Redactor {
    /// The redactor of an unsealed vault.
    pub fn new(keyring: &Keyring) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, keyring.derive(Purpose::AuditHmac).as_slice()))
    }

    /// `hmac-sha256:…` of a text.
    pub fn text(&self, text: &str) -> String {
        format!("hmac-sha256:{}", hex::encode(hmac::sign(&self.0, text.as_bytes()).as_ref()))
    }

    /// A document with every value replaced; keys stay, as in Vault. Numbers and booleans are values too:
    /// a PIN is a secret.
    pub fn document(&self, document: &Value) -> Value {
        if count(document) > MAX_HASHED_VALUES {
            return Value::String(self.text(&document.to_string()));
        }
        self.walk(document)
    }

    fn walk(&self, value: &Value) -> Value {
        match value {
            Value::Null => Value::Null,
            Value::Bool(_) | Value::Number(_) => Value::String(self.text(&value.to_string())),
            Value::String(text) => Value::String(self.text(text)),
            Value::Array(items) => Value::Array(items.iter().map(|item| self.walk(item)).collect()),
            Value::Object(map) => {
                Value::Object(map.iter().map(|(key, item)| (key.clone(), self.walk(item))).collect())
            }
        }
    }
}

fn count(value: &Value) -> usize {
    match value {
        Value::Array(items) => items.iter().map(count).sum::<usize>() + 1,
        Value::Object(map) => map.values().map(count).sum::<usize>() + 1,
        _ => 1,
    }
}

/// The file that lines go to. Its path comes from configuration and from nowhere else.
pub struct Audit {
    file: Mutex<Chain>,
    failing: AtomicBool,
    redactor: RwLock<Option<Arc<Redactor>>>,
}

struct Chain {
    file: File,
    bytes: u64,
    head: Head,
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Audit").field("failing", &self.is_failing()).finish_non_exhaustive()
    }
}

impl Audit {
    /// Opens the file (made 0600 if missing) and goes on from its last line. What a crash left of a line
    /// that was never acknowledged is cut off.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
        let failed = |source| AuditError::Open { path: path.to_owned(), source };
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).mode(0o600).open(path).map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        let mode = about.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(AuditError::Permissions { path: path.to_owned(), mode });
        }
        let (bytes, head) = find_end(&mut file, about.len())
            .map_err(failed)?
            .ok_or_else(|| AuditError::Foreign { path: path.to_owned() })?;
        if bytes < about.len() {
            tracing::warn!(bytes = about.len() - bytes, "cutting an unfinished line off the audit file");
            file.set_len(bytes).map_err(failed)?;
        }
        Ok(Self {
            file: Mutex::new(Chain { file, bytes, head }),
            failing: AtomicBool::new(false),
            redactor: RwLock::new(None),
        })
    }

    /// Takes the key for values from an unsealed vault, or forgets it.
    pub fn set_redactor(&self, redactor: Option<Redactor>) {
        *self.redactor.write().unwrap_or_else(PoisonError::into_inner) = redactor.map(Arc::new);
    }

    /// The redactor, while the vault is unsealed.
    pub fn redactor(&self) -> Option<Arc<Redactor>> {
        self.redactor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the last write failed.
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// The chain's head.
    pub fn head(&self) -> Head {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).head.clone()
    }

    /// Appends one entry. `seq` and `prev` are added in front of its members.
    ///
    /// # Errors
    /// The line was not written, or not whole; what was written of it is taken back. The next call tries
    /// again, so the vault heals as soon as the file can be written.
    pub fn write(&self, entry: &Map<String, Value>) -> Result<Head, AuditError> {
        let outcome = self.append(entry);
        // A line that could not be made says nothing about the device.
        let failing = matches!(outcome, Err(AuditError::Write(_)));
        if self.failing.swap(failing, Ordering::Relaxed) != failing {
            tracing::error!(failing, "the audit file changed state; while it fails every request is refused");
        }
        outcome
    }

    /// Puts another file in the place of the one that is written.
    #[cfg(test)]
    pub(crate) fn swap_file(&self, file: File) -> File {
        std::mem::replace(&mut self.file.lock().unwrap().file, file)
    }

    fn append(&self, entry: &Map<String, Value>) -> Result<Head, AuditError> {
        let mut chain = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = chain.head.seq + 1;
        let mut line =
            serde_json::to_vec(&Line { seq, prev: &chain.head.hash, entry }).map_err(|_| AuditError::Line)?;
        if line.len() > MAX_LINE_BYTES {
            return Err(AuditError::Line);
        }
        let hash = hex::encode(digest(&SHA256, &line).as_ref());
        line.push(b'\n');
        if let Err(error) = chain.file.write_all(&line) {
            let whole = chain.bytes;
            if let Err(error) = chain.file.set_len(whole) {
                tracing::error!(%error, "an unfinished audit line could not be taken back");
            }
            return Err(AuditError::Write(error));
        }
        chain.bytes += u64::try_from(line.len()).unwrap_or(0);
        chain.head = Head { seq, hash };
        Ok(chain.head.clone())
    }
}

#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    prev: &'a str,
    #[serde(flatten)]
    entry: &'a Map<String, Value>,
}

#[derive(Deserialize)]
struct Link {
    seq: u64,
    prev: String,
}

/// Length of the whole lines in the file, and the head of the last. `None` if that is no audit line.
fn find_end(file: &mut File, length: u64) -> std::io::Result<Option<(u64, Head)>> {
    let window = u64::try_from(2 * MAX_LINE_BYTES).unwrap_or(u64::MAX);
    let start = length.saturating_sub(window);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(window).read_to_end(&mut tail)?;
    let Some(end) = tail.iter().rposition(|byte| *byte == b'\n') else {
        // Nothing, or the first line was never finished.
        return Ok((start == 0).then(|| (0, Head::genesis())));
    };
    let whole = tail.get(..end).unwrap_or_default();
    let last = whole.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    let Ok(link) = serde_json::from_slice::<Link>(last) else { return Ok(None) };
    let bytes = start + u64::try_from(end).unwrap_or(0) + 1;
    Ok(Some((bytes, Head { seq: link.seq, hash: hex::encode(digest(&SHA256, last).as_ref()) })))
}

/// Follows the chain from the first line to the last and returns its head.
///
/// `noted` is a head that was kept elsewhere: the file must contain it, which shows what was cut off its
/// end or replaced as a whole.
pub fn verify(input: impl std::io::Read, noted: Option<&Head>) -> Result<Head, Fault> {
    let mut input = BufReader::new(input);
    let mut head = Head::genesis();
    let mut seen = noted.is_none_or(|noted| *noted == head);
    let limit = u64::try_from(MAX_LINE_BYTES).unwrap_or(u64::MAX) + 1;
    loop {
        let mut line = Vec::new();
        (&mut input).take(limit).read_until(b'\n', &mut line).map_err(Fault::Read)?;
        if line.is_empty() {
            break;
        }
        let number = head.seq + 1;
        // A last line without its end was never acknowledged, but it is no line either.
        if line.pop() != Some(b'\n') {
            return Err(Fault::Form { line: number });
        }
        let link: Link = serde_json::from_slice(&line).map_err(|_| Fault::Form { line: number })?;
        if link.seq != number || link.prev != head.hash {
            return Err(Fault::Chain { line: number });
        }
        head = Head { seq: number, hash: hex::encode(digest(&SHA256, &line).as_ref()) };
        seen |= noted == Some(&head);
    }
    match noted {
        Some(noted) if !seen => Err(Fault::Truncated { seq: noted.seq }),
        _ => Ok(head),
    }
}

/// [`verify`] on a file.
pub fn verify_file(path: &Path, noted: Option<&Head>) -> Result<Head, Fault> {
    verify(File::open(path).map_err(Fault::Read)?, noted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use serde_json::json;

    use super::*;
    use crate::barrier::tests::random;

    fn entry(text: &str) -> Map<String, Value> {
        Map::from_iter([("type".to_owned(), json!("request")), ("what".to_owned(), json!(text))])
    }

    fn written(lines: usize) -> (tempfile::TempDir, PathBuf, Head) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let audit = Audit::open(&path).unwrap();
        for n in 0..lines {
            audit.write(&entry(&format!("entry {n}"))).unwrap();
        }
        let head = audit.head();
        (directory, path, head)
    }

    fn lines(path: &Path) -> Vec<String> {
        std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    fn check(lines: &[String], noted: Option<&Head>) -> Result<Head, Fault> {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        verify(text.as_bytes(), noted)
    }

    #[test]
    fn an_edit_a_drop_a_new_order_and_a_cut_are_found() {
        let (_directory, path, head) = written(6);
        assert_eq!(verify_file(&path, Some(&head)).unwrap(), head);
        let good = lines(&path);
        for at in 0..6 {
            let mut edited = good.clone();
            edited[at] = edited[at].replace("entry", "entrx");
            assert!(check(&edited, Some(&head)).is_err(), "edit of {at}");
            let mut dropped = good.clone();
            dropped.remove(at);
            assert!(check(&dropped, Some(&head)).is_err(), "drop of {at}");
            let mut doubled = good.clone();
            doubled.insert(at, good[at].clone());
            assert!(check(&doubled, Some(&head)).is_err(), "double of {at}");
            assert!(
                matches!(check(&good[..at], Some(&head)), Err(Fault::Truncated { seq: 6 })),
                "cut at {at}"
            );
        }
        let mut swapped = good.clone();
        swapped.swap(2, 3);
        assert!(matches!(check(&swapped, Some(&head)), Err(Fault::Chain { line: 3 })));
        // A whole new chain is consistent in itself; the noted head tells.
        let (_other, forged, _) = written(6);
        let mut forged = lines(&forged);
        forged[5] = forged[5].replace("entry 5", "entry 9");
        assert!(check(&forged, None).is_ok());
        assert!(matches!(check(&forged, Some(&head)), Err(Fault::Truncated { .. })));
    }

    #[test]
    fn the_chain_goes_on_after_a_restart_and_an_unfinished_line_is_cut() {
        let (_directory, path, _) = written(3);
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(br#"{"seq":4,"prev":"unfin"#).unwrap();
        assert!(matches!(verify_file(&path, None), Err(Fault::Form { line: 4 })));
        let audit = Audit::open(&path).unwrap();
        assert_eq!(audit.write(&entry("after")).unwrap().seq, 4);
        assert_eq!(verify_file(&path, None).unwrap(), audit.head());
    }

    #[test]
    fn a_file_that_is_not_ours_or_open_to_others_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        std::fs::write(&path, "root:x:0:0\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(Audit::open(&path), Err(AuditError::Foreign { .. })));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Audit::open(&path), Err(AuditError::Permissions { mode: 0o640, .. })));
        assert!(matches!(Audit::open(directory.path()), Err(AuditError::Open { .. })));
    }

    #[test]
    fn vault_9_a_line_cannot_be_forged_from_within() {
        let (_directory, path, _) = written(0);
        let audit = Audit::open(&path).unwrap();
        audit.write(&entry("x\n{\"seq\":2,\"prev\":\"0\"}\r\n\u{2028}")).unwrap();
        assert_eq!(lines(&path).len(), 1);
        assert_eq!(verify_file(&path, None).unwrap().seq, 1);
        // Members of an entry cannot take the place of the chain's own.
        let sneaky = Map::from_iter([("seq".to_owned(), json!(9))]);
        audit.write(&sneaky).unwrap();
        assert!(verify_file(&path, None).is_err(), "two seq members make a line that does not verify");
    }

    #[test]
    fn vault_7_values_are_hashed_whatever_their_type() {
        let redactor = Redactor::new(&Keyring::generate(&random()).unwrap());
        let document = json!({"password": "hunter2", "pin": 40_913_377_120_956_u64, "on": true, "list": ["deep", {"x": null}]});
        let text = redactor.document(&document).to_string();
        for secret in ["hunter2", "40913377120956", "true", "deep"] {
            assert!(!text.contains(secret), "{text}");
        }
        assert!(text.contains("password") && text.contains("\"x\":null"));
        assert_eq!(redactor.text("hunter2"), redactor.text("hunter2"));
        let other = Redactor::new(&Keyring::generate(&random()).unwrap());
        assert_ne!(redactor.text("hunter2"), other.text("hunter2"));
        let many = Value::Array(vec![json!(1); MAX_HASHED_VALUES]);
        assert!(redactor.document(&many).is_string());
    }

    #[test]
    fn security_37_a_device_that_cannot_be_written_refuses_and_heals() {
        // A full device, as the kernel makes one.
        let file = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (_directory, path, _) = written(1);
        let audit = Audit::open(&path).unwrap();
        let good = audit.swap_file(file);
        assert!(matches!(audit.write(&entry("lost")), Err(AuditError::Write(_))));
        assert!(audit.is_failing());
        audit.swap_file(good);
        assert_eq!(audit.write(&entry("kept")).unwrap().seq, 2);
        assert!(!audit.is_failing());
        assert_eq!(verify_file(&path, None).unwrap().seq, 2);
    }
}
