//! Directories and files that hold secrets: ours alone, written whole or not at all.
//!
//! Everything here waits for the disk: not for an async thread once a process serves.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use thiserror::Error;
use zeroize::Zeroizing;

/// Largest secret file read: far above any identity with its bundle, and no danger to the memory.
pub const MAX_PRIVATE_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// Why a state directory or a secret file cannot be used. Each says what mends it.
#[derive(Debug, Error)]
pub enum StateError {
    /// The directory cannot be made or looked at.
    #[error("cannot use {}", path.display())]
    Io {
        /// Which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something else stands in its place.
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// Somebody else's.
    #[error("{path} belongs to uid {owner}, not to uid {own}: `chown {own} {path}`", path = path.display())]
    Owner {
        /// Which directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Us.
        own: u32,
    },
    /// Open to others.
    #[error("{path} has mode {mode:04o} and holds secrets: `chmod 700 {path}`", path = path.display())]
    Mode {
        /// Which directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A secret file that others can read.
    #[error("{path} has mode {mode:04o} and holds a secret: `chmod 600 {path}`", path = path.display())]
    FileMode {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// No secret file of ours is that large.
    #[error("{} is larger than {MAX_PRIVATE_FILE_BYTES} bytes", .0.display())]
    TooLarge(PathBuf),
    /// A directory for a socket in which others could replace it.
    #[error("others may write to {path} (mode {mode:04o}) and replace the socket: `chmod go-w {path}`", path = path.display())]
    Replaceable {
        /// Which directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { path, source }
}

/// Makes sure that `path` is a directory of ours that nobody else can enter; makes it (0700) if it is
/// absent.
///
/// # Errors
/// Another's, open to group or others, a link or a file, or what the system says.
pub fn private_directory(path: &Path) -> Result<(), StateError> {
    let metadata = directory(path, 0o700)?;
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own {
        return Err(StateError::Owner { path: path.to_owned(), owner: metadata.uid(), own });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(StateError::Mode { path: path.to_owned(), mode });
    }
    Ok(())
}

/// Makes sure that `path` is a directory in which only its owner can replace a file; makes it (0755) if
/// it is absent. A sticky directory such as /tmp is fine.
///
/// # Errors
/// Writable by group or others, a link or a file, or what the system says.
pub fn public_directory(path: &Path) -> Result<(), StateError> {
    let metadata = directory(path, 0o755)?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o022 != 0 && mode & 0o1000 == 0 {
        return Err(StateError::Replaceable { path: path.to_owned(), mode });
    }
    Ok(())
}

fn directory(path: &Path, mode: u32) -> Result<fs::Metadata, StateError> {
    match fs::DirBuilder::new().recursive(true).mode(mode).create(path) {
        Ok(()) => {}
        // A file in its place: said below, in words.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io_error(path)(error)),
    }
    let metadata = fs::symlink_metadata(path).map_err(io_error(path))?;
    if metadata.is_dir() { Ok(metadata) } else { Err(StateError::NotADirectory(path.to_owned())) }
}

/// Writes a secret file (0600) so that after a crash either the old or the new contents are there. What
/// it writes first stands beside it, with the extension `new`.
///
/// # Errors
/// Whatever the system says; the old contents are then still there.
pub fn write_private(path: &Path, contents: &[u8]) -> Result<(), StateError> {
    let temporary = path.with_extension("new");
    // A leftover of a crash may have any mode; the mode below only applies to a new file.
    match fs::remove_file(&temporary) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error(&temporary)(error)),
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(io_error(&temporary))?;
    file.write_all(contents).and_then(|()| file.sync_all()).map_err(io_error(&temporary))?;
    fs::rename(&temporary, path).map_err(io_error(path))?;
    // The rename itself is in the directory: without this it may be lost in a crash.
    if let Some(parent) = path.parent() {
        File::open(parent).and_then(|directory| directory.sync_all()).map_err(io_error(parent))?;
    }
    Ok(())
}

/// Reads a secret file; `None` if there is none.
///
/// # Errors
/// A file that others can read, one over [`MAX_PRIVATE_FILE_BYTES`], or what the system says.
pub fn read_private(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, StateError> {
    // What is checked is what is read: the open file, not its name.
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(path)(error)),
    };
    let metadata = file.metadata().map_err(io_error(path))?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(StateError::FileMode { path: path.to_owned(), mode });
    }
    if metadata.len() > MAX_PRIVATE_FILE_BYTES {
        return Err(StateError::TooLarge(path.to_owned()));
    }
    // Room for all of it at once: a vector that grows leaves copies behind that nobody wipes.
    let room = usize::try_from(metadata.len()).unwrap_or_default().saturating_add(1);
    let mut contents = Zeroizing::new(Vec::with_capacity(room));
    file.take(MAX_PRIVATE_FILE_BYTES).read_to_end(&mut contents).map_err(io_error(path))?;
    Ok(Some(contents))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_new_directory_is_ours_alone_and_an_open_one_is_refused_with_the_remedy() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/state");
        private_directory(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
        let error = private_directory(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("chmod 700 {}", path.display())), "{error}");
        fs::write(root.path().join("file"), "").unwrap();
        assert!(matches!(private_directory(&root.path().join("file")), Err(StateError::NotADirectory(_))));
    }

    #[test]
    fn security_14_a_directory_where_others_could_replace_the_socket_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("run");
        public_directory(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(public_directory(&path), Err(StateError::Replaceable { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o1777)).unwrap();
        public_directory(&path).unwrap();
    }

    #[test]
    fn security_19_secret_files_are_0600_and_an_open_one_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("key");
        assert!(read_private(&path).unwrap().is_none());
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(read_private(&path).unwrap().unwrap().as_slice(), b"two");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(read_private(&path), Err(StateError::FileMode { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        // Sparse: the length is what is looked at.
        OpenOptions::new().write(true).open(&path).unwrap().set_len(MAX_PRIVATE_FILE_BYTES + 1).unwrap();
        assert!(matches!(read_private(&path), Err(StateError::TooLarge(_))));
    }

    #[test]
    fn a_write_replaces_what_a_crash_left_behind() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("key.json");
        let left = root.path().join("key.new");
        fs::write(&left, "half").unwrap();
        fs::set_permissions(&left, fs::Permissions::from_mode(0o644)).unwrap();
        write_private(&path, b"whole").unwrap();
        assert_eq!(read_private(&path).unwrap().unwrap().as_slice(), b"whole");
        assert!(!left.exists());
    }
}
