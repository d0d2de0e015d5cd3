//! The state directory of a demo: its permissions, its lock, and leftovers of an earlier run.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use identity::clock::SharedClock;
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

/// How long processes of an earlier run may take to end by themselves: longer than any role drains.
const LEFTOVERS_END_WITHIN: Duration = Duration::from_secs(15);
/// How often a leftover is looked for.
const LEFTOVER_LOOK_EVERY: Duration = Duration::from_millis(50);

/// Why a directory cannot hold the state of a demo.
#[derive(Debug, Error)]
pub(crate) enum StateError {
    #[error("{} cannot be {what}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    #[error("{} can be entered by others (mode {mode:04o})", path.display())]
    Permissions { path: PathBuf, mode: u32 },
    #[error("{} cannot be used by its owner (mode {mode:04o})", path.display())]
    Unusable { path: PathBuf, mode: u32 },
    #[error("{} belongs to user {owner}, and this is user {user}", path.display())]
    Owner { path: PathBuf, owner: u32, user: u32 },
    #[error("a demo is running in {}{}", path.display(), by(*.pid))]
    Locked { path: PathBuf, pid: Option<u32> },
    #[error("process {pid} of an earlier demo in {} does not end", path.display())]
    Leftover { path: PathBuf, pid: u32 },
}

fn by(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(", process {pid}"))
}

impl StateError {
    /// What mends it.
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Io { path, .. } => {
                format!("{} must be on a disk with room, where you may write", path.display())
            }
            Self::NotADirectory(path) => format!("name a directory, or remove {}", path.display()),
            Self::Permissions { path, .. } | Self::Unusable { path, .. } => {
                format!("chmod 0700 {}", path.display())
            }
            Self::Owner { path, user, .. } => {
                format!("chown -R {user} {}, or choose another directory", path.display())
            }
            Self::Locked { pid: Some(pid), .. } => {
                format!("end it with `kill {pid}`, or give this one another --state")
            }
            Self::Locked { .. } => "end it, or give this one another --state".to_owned(),
            Self::Leftover { pid, .. } => format!("look at it with `ps -p {pid}`, then `kill -9 {pid}`"),
        }
    }
}

impl From<StateError> for crate::failure::Failure {
    fn from(error: StateError) -> Self {
        Self::new("the state directory cannot be used").because(&error).hint(error.hint())
    }
}

/// A state directory that this process alone uses, until it is dropped.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Makes the directory (mode 0700) or checks the one there is, and locks it.
    pub(crate) fn open(path: &Path) -> Result<Self, StateError> {
        let io = |what| move |source| StateError::Io { what, path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => StateError::NotADirectory(path.to_owned()),
            _ => io("made")(source),
        })?;
        // Before the name is followed: in a directory for everybody, such as /tmp, another user can have made
        // it a link to a directory of ours, which the demo would fill, and remove at its end. What is ours
        // (or root's) there, nobody else can exchange.
        let name = fs::symlink_metadata(path).map_err(io("looked at"))?;
        let user = rustix::process::geteuid().as_raw();
        if name.uid() != user && name.uid() != 0 {
            return Err(StateError::Owner { path: path.to_owned(), owner: name.uid(), user });
        }
        // Absolute, because the processes started from it are known by this path.
        let path = fs::canonicalize(path).map_err(io("found"))?;
        check(&path)?;
        let lock = lock(&path)?;
        Ok(Self { path, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A directory within, made with mode 0700.
    pub(crate) fn directory(&self, name: &str) -> Result<PathBuf, StateError> {
        let path = self.path.join(name);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(|source| StateError::Io { what: "made", path: path.clone(), source })?;
        Ok(path)
    }

    /// Waits until no process that was started from `bin` is left, and kills what stays too long.
    ///
    /// The lock is ours, so such a process belongs to a demo that was killed; it is ending by
    /// itself, and until it has, it holds ports and databases that the next one wants.
    pub(crate) async fn await_leftovers(&self, bin: &Path, clock: &SharedClock) -> Result<usize, StateError> {
        let found = running_from(bin).len();
        let kill_at = clock.now() + LEFTOVERS_END_WITHIN;
        let give_up_at = kill_at + LEFTOVERS_END_WITHIN;
        loop {
            let left = running_from(bin);
            let Some(first) = left.first() else { return Ok(found) };
            if clock.now() >= give_up_at {
                return Err(StateError::Leftover {
                    path: self.path.clone(),
                    pid: first.as_raw_nonzero().get().unsigned_abs(),
                });
            }
            if clock.now() >= kill_at {
                // One that ended in between is what was wanted.
                let _gone = left.into_iter().filter(|pid| kill_process(*pid, Signal::KILL).is_err()).count();
            }
            clock.sleep(LEFTOVER_LOOK_EVERY).await;
        }
    }
}

fn check(path: &Path) -> Result<(), StateError> {
    let meta = fs::metadata(path).map_err(|source| StateError::Io {
        what: "looked at",
        path: path.to_owned(),
        source,
    })?;
    if !meta.is_dir() {
        return Err(StateError::NotADirectory(path.to_owned()));
    }
    let user = rustix::process::geteuid().as_raw();
    if meta.uid() != user {
        return Err(StateError::Owner { path: path.to_owned(), owner: meta.uid(), user });
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(StateError::Permissions { path: path.to_owned(), mode });
    }
    if mode & 0o700 != 0o700 {
        return Err(StateError::Unusable { path: path.to_owned(), mode });
    }
    Ok(())
}

fn lock(path: &Path) -> Result<File, StateError> {
    let file = path.join("lock");
    let io = |what| {
        let path = file.clone();
        move |source| StateError::Io { what, path, source }
    };
    let mut lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&file)
        .map_err(io("opened"))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Without its number the message is poorer, and as right.
            let _unread = lock.read_to_string(&mut holder).is_err();
            return Err(StateError::Locked { path: path.to_owned(), pid: holder.trim().parse().ok() });
        }
        Err(TryLockError::Error(source)) => return Err(io("locked")(source)),
    }
    lock.set_len(0).and_then(|()| lock.rewind()).map_err(io("written"))?;
    writeln!(lock, "{}", std::process::id()).map_err(io("written"))?;
    Ok(lock)
}

/// The processes whose executable lies in `bin`, this one left out.
fn running_from(bin: &Path) -> Vec<Pid> {
    let own = std::process::id();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let exe = fs::read_link(entry.path().join("exe")).ok()?;
            (pid != own && exe.starts_with(bin)).then(|| Pid::from_raw(pid.cast_signed()))?
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_new_directory_is_for_its_owner_alone() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::open(&parent.path().join("a/b")).unwrap();
        let inner = state.directory("logs").unwrap();
        for path in [state.path(), &inner] {
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, 0o700, "{}", path.display());
        }
    }

    #[test]
    fn wrong_permissions_are_an_error_with_the_command_that_mends_it() {
        let parent = tempfile::tempdir().unwrap();
        for (mode, word) in
            [(0o755, "can be entered by others (mode 0755)"), (0o500, "cannot be used by its owner")]
        {
            let path = parent.path().join(format!("{mode:o}"));
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = StateDir::open(&path).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
            assert_eq!(error.hint(), format!("chmod 0700 {}", path.display()));
        }
        let file = parent.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(StateDir::open(&file), Err(StateError::NotADirectory(_))));
    }

    #[test]
    fn somebody_elses_directory_is_an_error_with_the_command_that_mends_it() {
        if !rustix::process::geteuid().is_root() {
            identity::testing::skip("giving a directory away needs root");
            return;
        }
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("theirs");
        DirBuilder::new().mode(0o700).create(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(4242), None).unwrap();
        let error = StateDir::open(&path).unwrap_err();
        assert!(error.to_string().ends_with("belongs to user 4242, and this is user 0"), "{error}");
        assert!(error.hint().starts_with("chown -R 0 "), "{}", error.hint());
    }

    /// The default lies in a directory where anybody may make names, and is removed at the end.
    #[test]
    fn a_link_that_somebody_else_made_to_a_directory_of_ours_is_an_error() {
        if !rustix::process::geteuid().is_root() {
            identity::testing::skip("giving a link away needs root");
            return;
        }
        let parent = tempfile::tempdir().unwrap();
        let (home, link) = (parent.path().join("home"), parent.path().join("state"));
        DirBuilder::new().mode(0o700).create(&home).unwrap();
        std::os::unix::fs::symlink(&home, &link).unwrap();
        StateDir::open(&link).expect("a link of our own");
        std::os::unix::fs::lchown(&link, Some(4242), None).unwrap();
        let error = StateDir::open(&link).unwrap_err();
        assert!(
            matches!(error, StateError::Owner { owner: 4242, .. } | StateError::NotADirectory(_)),
            "{error}"
        );
    }

    #[test]
    fn a_second_demo_in_the_same_directory_is_told_who_has_it() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("s");
        let first = StateDir::open(&path).unwrap();
        let error = StateDir::open(&path).unwrap_err();
        assert!(error.to_string().ends_with(&format!(", process {}", std::process::id())), "{error}");
        drop(first);
        assert!(StateDir::open(&path).is_ok());
    }

    #[tokio::test]
    async fn the_next_demo_waits_for_what_an_earlier_one_left() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::open(&parent.path().join("s")).unwrap();
        let bin = state.directory("bin").unwrap();
        let clock = identity::SystemClock::shared();
        assert_eq!(state.await_leftovers(&bin, &clock).await.unwrap(), 0);
        fs::copy("/bin/sleep", bin.join("web")).unwrap();
        let mut child = tokio::process::Command::new(bin.join("web")).arg("0.3").spawn().unwrap();
        while running_from(&bin).is_empty() {
            tokio::task::yield_now().await;
        }
        let reaped = tokio::join!(state.await_leftovers(&bin, &clock), child.wait());
        assert_eq!(reaped.0.unwrap(), 1);
        assert!(reaped.1.unwrap().success());
    }
}
