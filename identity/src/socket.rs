//! Unix sockets: taken over from a process that is gone, never from one that lives.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use thiserror::Error;
use tokio::net::UnixListener;

/// Longest path that a socket's address holds, less the closing zero (`sun_path`, unix(7)).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Why a socket could not be bound.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Over 107 bytes, the longest path of a Unix socket.
    #[error("{} is longer than {MAX_SOCKET_PATH_BYTES} bytes, the longest path of a Unix socket", .0.display())]
    TooLong(PathBuf),
    /// A process listens there.
    #[error("another process listens on {}; stop it first, or configure another path", .0.display())]
    Taken(PathBuf),
    /// A file that is no socket stands in its place, and is left alone.
    #[error("{} exists and is not a socket; remove it, or configure another path", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {}", path.display())]
    Io {
        /// Which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Binds `path` with the permissions `mode`. A socket that a dead process left behind is removed.
///
/// # Errors
/// A path that is too long, in use, or not a socket; whatever else the system says.
pub fn bind(path: &Path, mode: u32) -> Result<UnixListener, SocketError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        return Err(SocketError::TooLong(path.to_owned()));
    }
    let fail = |source| SocketError::Io { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(SocketError::Taken(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(fail)?;
            }
            Err(error) => return Err(fail(error)),
        },
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(fail)?;
    Ok(listener)
}

/// Removes a socket of ours at the end; that it is gone already is fine.
pub fn remove(path: &Path) {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(path = %path.display(), %error, "cannot remove the socket"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_socket_is_taken_over_a_live_one_and_a_file_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let live = bind(&path, 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path, 0o600), Err(SocketError::Taken(_))));
        drop(live);
        drop(bind(&path, 0o666).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666);
        remove(&path);
        remove(&path);
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path, 0o600), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        let long = directory.path().join("x".repeat(120));
        assert!(matches!(bind(&long, 0o600), Err(SocketError::TooLong(_))));
    }
}
