//! Directories and files that hold secrets: ours alone, written whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why a state directory or file cannot be used. Each says what mends it.
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

/// Makes sure that `path` is a directory of ours that nobody else can enter; makes it if it is absent.
pub(crate) fn private_directory(path: &Path) -> Result<(), StateError> {
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
pub(crate) fn public_directory(path: &Path) -> Result<(), StateError> {
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

/// Writes a secret file (0600) so that after a crash either the old or the new contents are there.
pub(crate) fn write_private(path: &Path, contents: &[u8]) -> Result<(), StateError> {
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

/// Reads a secret file; `None` if there is none. One that others can read is refused.
pub(crate) fn read_private(path: &Path) -> Result<Option<zeroize::Zeroizing<Vec<u8>>>, StateError> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(path)(error)),
    };
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(StateError::FileMode { path: path.to_owned(), mode });
    }
    fs::read(path).map(|bytes| Some(zeroize::Zeroizing::new(bytes))).map_err(io_error(path))
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
    }
}
