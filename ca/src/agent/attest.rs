//! Who is at the other end of a Unix socket, as the kernel and /proc tell it.
//!
//! The socket's peer credentials name a process; a pidfd of that process holds on to it. /proc is read
//! by number, so after reading, the pidfd must still be alive: then the number has meant the same
//! process all along, and what was read is about the peer. Where the kernel cannot give the pidfd of the
//! very peer (before 6.5) it is opened by number, and a process that started after the connection was
//! accepted is refused.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use thiserror::Error;
use tokio::net::UnixStream;

use super::refusal::{RefusalReason, RefusedCaller};
use super::upstream::{HostView, LocalEntry};
use crate::entry::Attributes;
use crate::hex;

/// Units of start times in /proc: USER_HZ, 100 on every Linux architecture that Rust's tier 1 and 2 name.
const TICKS_PER_SECOND: u64 = 100;
/// Largest executable that is hashed: more than any real one, less than a disk.
const MAX_EXECUTABLE_BYTES: u64 = 4 * 1024 * 1024 * 1024;
/// Digests remembered: one an executable on the host; when full, all are forgotten and made again.
const MAX_DIGESTS: usize = 1_024;
/// How much of an executable is read at once.
const CHUNK_BYTES: usize = 128 * 1024;

/// Why a caller could not be attested at all.
#[derive(Debug, Error)]
pub(super) enum AttestError {
    #[error("the kernel gave no credentials of the peer")]
    Credentials(#[source] io::Error),
    #[error("the peer's process is not visible from here (another PID namespace?)")]
    Invisible,
    #[error("the peer's process is gone")]
    Gone,
    #[error("the process started after the connection was made: its number was reused")]
    Reused,
    #[error("what /proc says of the process cannot be understood")]
    Proc,
}

/// A caller that could not be attested, and what its socket says of it.
#[derive(Debug)]
pub(super) struct Unattested {
    pub(super) error: AttestError,
    pub(super) pid: Option<i32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

impl Unattested {
    /// What is known of it, for the record of its refusal. The executable is not: what was read of it may
    /// be of another process.
    pub(super) fn refused(&self, method: &'static str, now: Duration) -> RefusedCaller {
        RefusedCaller {
            pid: self.pid,
            uid: self.uid,
            gid: self.gid,
            path: None,
            sha256: None,
            method,
            reason: RefusalReason::NotAttested(self.error.to_string()),
            near_misses: Vec::new(),
            now,
        }
    }
}

/// Holds on to a process: alive or gone, never another one.
pub(super) trait Lifeline: Send + Sync + fmt::Debug {
    fn is_alive(&self) -> bool;
}

/// An executable as the kernel identifies it. A change of contents changes at least the change time,
/// which nobody can set back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FileKey {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) bytes: u64,
    pub(super) modified: (i64, i64),
    pub(super) changed: (i64, i64),
}

impl FileKey {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The part of /proc that attestation reads; a test brings its own.
pub(super) trait Processes: Send + Sync + fmt::Debug {
    /// Contents of `/proc/PID/stat`.
    fn stat(&self, pid: i32) -> io::Result<String>;
    /// Target of `/proc/PID/exe`.
    fn exe_path(&self, pid: i32) -> io::Result<PathBuf>;
    /// What `/proc/PID/exe` leads to, open for reading.
    fn open_exe(&self, pid: i32) -> io::Result<(FileKey, Box<dyn Read + Send>)>;
    /// Device and inode of a path as the agent sees it.
    fn identify(&self, path: &Path) -> io::Result<(u64, u64)>;
    /// Contents of `/proc/uptime`.
    fn uptime(&self) -> io::Result<String>;
}

/// The machine's /proc.
#[derive(Debug)]
pub(super) struct LinuxProcesses;

impl Processes for LinuxProcesses {
    fn stat(&self, pid: i32) -> io::Result<String> {
        // The name in it is the process's own choice of bytes.
        std::fs::read(format!("/proc/{pid}/stat")).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    fn exe_path(&self, pid: i32) -> io::Result<PathBuf> {
        std::fs::read_link(format!("/proc/{pid}/exe"))
    }

    fn open_exe(&self, pid: i32) -> io::Result<(FileKey, Box<dyn Read + Send>)> {
        let file = std::fs::File::open(format!("/proc/{pid}/exe"))?;
        let key = FileKey::of(&file.metadata()?);
        Ok((key, Box::new(file)))
    }

    fn identify(&self, path: &Path) -> io::Result<(u64, u64)> {
        std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
    }

    fn uptime(&self) -> io::Result<String> {
        std::fs::read_to_string("/proc/uptime")
    }
}

#[derive(Debug)]
struct Pidfd(OwnedFd);

impl Lifeline for Pidfd {
    fn is_alive(&self) -> bool {
        let mut poll = [PollFd::new(&self.0, PollFlags::IN)];
        // Readable means ended. An error proves nothing, so it counts as ended.
        matches!(rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }
}

/// What is known of a connection at the moment it is accepted.
#[derive(Debug)]
pub(super) struct PeerCredentials {
    pub(super) pid: i32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) lifeline: Arc<dyn Lifeline>,
    /// Upper bound of the time at which the peer connected, in ticks since boot.
    pub(super) accepted: u64,
}

/// A caller that has been looked at.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    path: Option<PathBuf>,
    sha256: Option<String>,
    lifeline: Arc<dyn Lifeline>,
}

impl Process {
    pub(super) fn is_alive(&self) -> bool {
        self.lifeline.is_alive()
    }

    fn attributes(&self) -> Attributes<'_> {
        Attributes {
            uid: self.uid,
            gid: self.gid,
            path: self.path.as_deref(),
            sha256: self.sha256.as_deref(),
        }
    }

    /// The entries that match, the most particular first, one an identity.
    pub(super) fn matching<'v>(&self, view: &'v HostView) -> Vec<&'v LocalEntry> {
        let mut matching: Vec<_> = view
            .entries
            .iter()
            .filter(|entry| entry.selectors.mismatches(self.attributes()).is_empty())
            .collect();
        matching.sort_by(|one, other| {
            (other.selectors.count(), &one.id, &one.entry_id).cmp(&(
                one.selectors.count(),
                &other.id,
                &other.entry_id,
            ))
        });
        let mut seen = std::collections::HashSet::new();
        matching.retain(|entry| seen.insert(entry.id.clone()));
        matching
    }

    /// What it has, for the record of its refusal.
    pub(super) fn refused(
        &self,
        method: &'static str,
        reason: RefusalReason,
        near_misses: Vec<String>,
        now: Duration,
    ) -> RefusedCaller {
        RefusedCaller {
            pid: Some(self.pid),
            uid: Some(self.uid),
            gid: Some(self.gid),
            path: self.path.clone(),
            sha256: self.sha256.clone(),
            method,
            reason,
            near_misses,
            now,
        }
    }

    /// Why the entries that come near do not match: those of the same path or user.
    pub(super) fn near_misses(&self, view: &HostView) -> Vec<String> {
        let near = |entry: &&LocalEntry| {
            (entry.selectors.path.is_some() && entry.selectors.path == self.path)
                || entry.selectors.uid == Some(self.uid)
        };
        let explain = |entry: &LocalEntry| {
            let fails = entry.selectors.mismatches(self.attributes()).join(", ");
            format!("{} wants {}, differs in {fails}", entry.id, entry.selectors.describe())
        };
        view.entries.iter().filter(near).take(8).map(explain).collect()
    }
}

/// Holds on to the peer by what the kernel gave for it.
fn hold(given: nix::Result<OwnedFd>, pid: i32) -> Result<Arc<dyn Lifeline>, AttestError> {
    match given {
        Ok(pidfd) => Ok(Arc::new(Pidfd(pidfd))),
        // A kernel before 6.5: by number, then. Never where the kernel could have told: a peer that is gone
        // may have left its number to a process that started before the accept, while a child of the peer
        // holds the connection.
        Err(nix::errno::Errno::ENOPROTOOPT) => {
            let number = rustix::process::Pid::from_raw(pid).ok_or(AttestError::Invisible)?;
            let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty())
                .map_err(|_| AttestError::Gone)?;
            Ok(Arc::new(Pidfd(pidfd)))
        }
        Err(_) => Err(AttestError::Gone),
    }
}

/// Finds out about callers.
#[derive(Debug, Clone)]
pub(super) struct Attestor {
    processes: Arc<dyn Processes>,
    digests: Arc<Mutex<HashMap<FileKey, String>>>,
}

impl Attestor {
    pub(super) fn new(processes: Arc<dyn Processes>) -> Self {
        Self { processes, digests: Arc::default() }
    }

    /// Takes hold of the process at the other end. To be called right after the accept.
    pub(super) fn credentials(&self, stream: &UnixStream) -> Result<PeerCredentials, AttestError> {
        let credentials = stream.peer_cred().map_err(AttestError::Credentials)?;
        let pid = credentials.pid().filter(|pid| *pid > 0).ok_or(AttestError::Invisible)?;
        let lifeline = hold(nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::PeerPidfd), pid)?;
        let accepted =
            self.processes.uptime().ok().and_then(|text| uptime_ticks(&text)).ok_or(AttestError::Proc)?;
        Ok(PeerCredentials { pid, uid: credentials.uid(), gid: credentials.gid(), lifeline, accepted })
    }

    /// Reads what /proc says, then makes sure that it said it of the peer. Blocks: the first look at an
    /// executable reads all of it.
    pub(super) fn inspect(&self, peer: PeerCredentials) -> Result<Process, AttestError> {
        let gone_or = |error: AttestError| if peer.lifeline.is_alive() { error } else { AttestError::Gone };
        let stat = self.processes.stat(peer.pid).map_err(|_| gone_or(AttestError::Proc))?;
        let started = start_ticks(&stat).ok_or_else(|| gone_or(AttestError::Proc))?;
        if started > peer.accepted {
            return Err(AttestError::Reused);
        }
        // A process of another user hides its executable from an agent that is not root. Its user and
        // group are known all the same; selectors on the rest do not match.
        let (path, sha256) = match self.processes.open_exe(peer.pid) {
            Ok((key, file)) => (self.path(peer.pid, key), self.digest(key, file)),
            Err(error) => {
                tracing::debug!(pid = peer.pid, %error, "the executable cannot be read");
                (None, None)
            }
        };
        if !peer.lifeline.is_alive() {
            return Err(AttestError::Gone);
        }
        let PeerCredentials { pid, uid, gid, lifeline, .. } = peer;
        Ok(Process { pid, uid, gid, path, sha256, lifeline })
    }

    /// The executable's path, if in the agent's own view that path is the very same file: a process can
    /// mount whatever it likes over a path in a mount namespace of its own.
    fn path(&self, pid: i32, key: FileKey) -> Option<PathBuf> {
        let path = self.processes.exe_path(pid).ok()?;
        match self.processes.identify(&path) {
            Ok(found) if found == (key.device, key.inode) => Some(path),
            _ => {
                tracing::info!(pid, path = %path.display(), "the executable is not what is at its path here");
                None
            }
        }
    }

    fn digest(&self, key: FileKey, mut file: Box<dyn Read + Send>) -> Option<String> {
        if let Some(known) = self.digests.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Some(known.clone());
        }
        if key.bytes > MAX_EXECUTABLE_BYTES {
            return None;
        }
        let mut context = ring::digest::Context::new(&ring::digest::SHA256);
        let mut buffer = vec![0u8; CHUNK_BYTES];
        loop {
            let count = match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return None,
            };
            context.update(buffer.get(..count)?);
        }
        let digest = hex::encode(context.finish().as_ref());
        let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        if digests.len() >= MAX_DIGESTS {
            digests.clear();
        }
        digests.insert(key, digest.clone());
        Some(digest)
    }
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)): ticks from boot to the process's start. The second
/// field is its name in parentheses, which may itself hold spaces and parentheses.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// First field of `/proc/uptime` (proc_uptime(5)), seconds with two decimals, in ticks.
fn uptime_ticks(uptime: &str) -> Option<u64> {
    let (seconds, hundredths) = uptime.split_ascii_whitespace().next()?.split_once('.')?;
    if hundredths.len() != 2 {
        return None;
    }
    let whole = seconds.parse::<u64>().ok()?.checked_mul(TICKS_PER_SECOND)?;
    whole.checked_add(hundredths.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use identity::{SpiffeId, TrustBundle, TrustDomain};
    use proptest::prelude::*;

    use super::*;
    use crate::entry::Selectors;

    #[derive(Debug)]
    struct Line(AtomicBool);

    impl Lifeline for Line {
        fn is_alive(&self) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    /// One process, as a test describes it.
    #[derive(Debug)]
    struct Fake {
        started: u64,
        path: &'static str,
        at_path: (u64, u64),
        contents: &'static [u8],
        readable: bool,
        reads: AtomicUsize,
        /// Dies while its executable is being looked at.
        dies: Option<Arc<Line>>,
    }

    impl Default for Fake {
        fn default() -> Self {
            Self {
                started: 500,
                path: "/bin/web",
                at_path: (1, 2),
                contents: b"program",
                readable: true,
                reads: AtomicUsize::new(0),
                dies: None,
            }
        }
    }

    impl Processes for Fake {
        fn stat(&self, pid: i32) -> io::Result<String> {
            let fields = "S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0";
            Ok(format!("{pid} (a (b) c) {fields} {} 0 0", self.started))
        }
        fn exe_path(&self, _pid: i32) -> io::Result<PathBuf> {
            Ok(self.path.into())
        }
        fn open_exe(&self, _pid: i32) -> io::Result<(FileKey, Box<dyn Read + Send>)> {
            if let Some(line) = &self.dies {
                line.0.store(false, Ordering::SeqCst);
            }
            if !self.readable {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            self.reads.fetch_add(1, Ordering::SeqCst);
            let key = FileKey { device: 1, inode: 2, bytes: 7, modified: (0, 0), changed: (0, 0) };
            Ok((key, Box::new(self.contents)))
        }
        fn identify(&self, _path: &Path) -> io::Result<(u64, u64)> {
            Ok(self.at_path)
        }
        fn uptime(&self) -> io::Result<String> {
            Ok("10.00 1.00".into())
        }
    }

    fn peer(line: &Arc<Line>) -> PeerCredentials {
        PeerCredentials { pid: 7, uid: 1000, gid: 100, lifeline: Arc::clone(line) as _, accepted: 1000 }
    }

    fn line() -> Arc<Line> {
        Arc::new(Line(AtomicBool::new(true)))
    }

    fn inspect(fake: Fake, line: &Arc<Line>) -> Result<Process, AttestError> {
        Attestor::new(Arc::new(fake)).inspect(peer(line))
    }

    fn view(selectors: Vec<(&str, Selectors)>) -> HostView {
        let domain = TrustDomain::new("bank.example").unwrap();
        HostView {
            pseudonym_key: Default::default(),
            bundle: TrustBundle::new(domain.clone(), vec![]).unwrap(),
            entries: selectors
                .into_iter()
                .enumerate()
                .map(|(n, (name, selectors))| LocalEntry {
                    entry_id: format!("e{n}"),
                    id: SpiffeId::new(&format!("spiffe://bank.example/service/{name}")).unwrap(),
                    selectors,
                })
                .collect(),
            rotate_after: Duration::from_secs(20),
        }
    }

    #[test]
    fn identity_40_and_security_13_a_reused_pid_is_refused() {
        let line = line();
        assert!(inspect(Fake::default(), &line).is_ok());
        let later = Fake { started: 1001, ..Fake::default() };
        assert!(matches!(inspect(later, &line), Err(AttestError::Reused)));
        let dying = Fake { dies: Some(Arc::clone(&line)), ..Fake::default() };
        assert!(
            matches!(inspect(dying, &line), Err(AttestError::Gone)),
            "what was read may be of another process"
        );
    }

    #[test]
    fn what_a_process_mounts_over_a_path_is_not_what_is_at_that_path() {
        let process = inspect(Fake { at_path: (1, 99), ..Fake::default() }, &line()).unwrap();
        let by_path = Selectors { path: Some("/bin/web".into()), ..Selectors::default() };
        assert!(process.matching(&view(vec![("web", by_path)])).is_empty());
        let by_digest = Selectors { sha256: Some(hex::sha256(b"program")), ..Selectors::default() };
        assert_eq!(process.matching(&view(vec![("web", by_digest)])).len(), 1);
    }

    #[test]
    fn a_hidden_executable_matches_by_user_only() {
        let process = inspect(Fake { readable: false, ..Fake::default() }, &line()).unwrap();
        let by_user = Selectors { uid: Some(1000), ..Selectors::default() };
        let by_both = Selectors { path: Some("/bin/web".into()), ..by_user.clone() };
        let view = view(vec![("plain", by_user), ("web", by_both)]);
        let matching = process.matching(&view);
        assert_eq!(matching.len(), 1);
        assert_eq!(matching[0].id.path(), "/service/plain");
    }

    #[test]
    fn the_most_particular_entry_is_the_default_and_each_identity_comes_once() {
        let process = inspect(Fake::default(), &line()).unwrap();
        let by_user = Selectors { uid: Some(1000), ..Selectors::default() };
        let by_both = Selectors { path: Some("/bin/web".into()), ..by_user.clone() };
        let other = Selectors { uid: Some(0), ..Selectors::default() };
        let view = view(vec![("a", by_user.clone()), ("web", by_both), ("web", by_user), ("other", other)]);
        let ids: Vec<_> = process.matching(&view).iter().map(|entry| entry.id.path().to_owned()).collect();
        assert_eq!(ids, ["/service/web", "/service/a"]);
    }

    #[test]
    fn identity_39_a_refusal_says_why_the_near_entries_do_not_match() {
        let process = inspect(Fake::default(), &line()).unwrap();
        let near = Selectors { path: Some("/bin/web".into()), gid: Some(5), ..Selectors::default() };
        let far = Selectors { path: Some("/bin/other".into()), ..Selectors::default() };
        let view = view(vec![("web", near), ("other", far)]);
        assert_eq!(
            process.near_misses(&view),
            ["spiffe://bank.example/service/web wants gid=5 path=/bin/web, differs in gid"]
        );
    }

    #[test]
    fn an_executable_is_hashed_once() {
        let attestor = Attestor::new(Arc::new(Fake::default()));
        let digests: Vec<_> = (0..2).map(|_| attestor.inspect(peer(&line())).unwrap().sha256).collect();
        assert_eq!(digests[0], Some(hex::sha256(b"program")));
        assert_eq!(digests[0], digests[1]);
        assert_eq!(attestor.digests.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn this_very_process_is_recognised_by_the_kernel() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let attestor = Attestor::new(Arc::new(LinuxProcesses));
        let process = attestor.inspect(attestor.credentials(&ours).unwrap()).unwrap();
        assert_eq!(process.pid, i32::try_from(std::process::id()).unwrap());
        assert_eq!(process.path.as_deref(), Some(std::env::current_exe().unwrap().as_path()));
        assert!(process.is_alive());
    }

    /// The number of a peer that is gone may be another's by now, one that started before the accept.
    #[tokio::test]
    async fn identity_40_a_peer_that_is_gone_is_not_looked_for_by_its_number() {
        let own = i32::try_from(std::process::id()).unwrap();
        for error in [nix::errno::Errno::ESRCH, nix::errno::Errno::EINVAL, nix::errno::Errno::ENODATA] {
            assert!(matches!(hold(Err(error), own), Err(AttestError::Gone)), "{error}");
        }
        let old_kernel = hold(Err(nix::errno::Errno::ENOPROTOOPT), own).unwrap();
        assert!(old_kernel.is_alive());
    }

    #[tokio::test]
    async fn a_process_that_has_ended_is_noticed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let pidfd = Pidfd(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap());
        assert!(pidfd.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!pidfd.is_alive());
    }

    #[test]
    fn proc_files_are_parsed_whatever_a_process_calls_itself() {
        let tail = "S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0";
        for name in ["web", "a b", "a) S 1 1 (", ")"] {
            assert_eq!(start_ticks(&format!("7 ({name}) {tail}")), Some(4242), "{name}");
        }
        assert_eq!(start_ticks("7 (web) S 1"), None);
        assert_eq!(uptime_ticks("12.34 5.67\n"), Some(1234));
        assert_eq!(uptime_ticks("12"), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(text in ".{0,80}") {
            let _outcomes = (start_ticks(&text), uptime_ticks(&text));
        }
    }
}
