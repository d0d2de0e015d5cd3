//! `STATE/bin/ROLE`: the running binary under a name for each role.
//!
//! The agent knows a process by the path of its executable among other things; with one user and one
//! binary, the path is what tells the roles of a demo apart. A hard link costs nothing; where the
//! state lies on another file system it is a copy.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, linkat};
use thiserror::Error;

/// The running binary, which stays the same file even when its name is given to a newer one.
const SELF: &str = "/proc/self/exe";

/// The binary could not be put under its role's name.
#[derive(Debug, Error)]
#[error("{} cannot be made", path.display())]
pub(crate) struct RoleError {
    path: PathBuf,
    source: io::Error,
}

/// Puts the running binary at `bin/role`, unless it is there already, and gives the path.
pub(crate) fn executable(bin: &Path, role: &str) -> Result<PathBuf, RoleError> {
    install(Path::new(SELF), bin, role)
}

fn install(source: &Path, bin: &Path, role: &str) -> Result<PathBuf, RoleError> {
    let path = bin.join(role);
    let made =
        is_current(source, &path).and_then(|current| if current { Ok(()) } else { replace(source, &path) });
    match made {
        Ok(()) => Ok(path),
        Err(source) => Err(RoleError { path, source }),
    }
}

/// Whether `path` is `source` itself, or the copy that was made of it: same length and same time.
fn is_current(source: &Path, path: &Path) -> io::Result<bool> {
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let wanted = fs::metadata(source)?;
    let same_file = (there.dev(), there.ino()) == (wanted.dev(), wanted.ino());
    let same_copy =
        there.is_file() && there.len() == wanted.len() && there.modified()? == wanted.modified()?;
    Ok(same_file || same_copy)
}

fn replace(source: &Path, path: &Path) -> io::Result<()> {
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Refused across file systems, for a file of somebody else, and for a binary that has no name any more.
    if linkat(CWD, source, CWD, &fresh, AtFlags::SYMLINK_FOLLOW).is_err() {
        copy(source, &fresh)?;
    }
    fs::rename(&fresh, path)?;
    // Renaming one link of a file over another does nothing; then the temporary name is left.
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn copy(source: &Path, to: &Path) -> io::Result<()> {
    let mut from = File::open(source)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o700).open(to)?;
    io::copy(&mut from, &mut file)?;
    file.set_modified(from.metadata()?.modified()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_the_same_file_as_the_running_binary() {
        let directory = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let path = executable(directory.path(), "web").unwrap();
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        assert_eq!(inode(&path), inode(Path::new(SELF)));
        assert_eq!(executable(directory.path(), "web").unwrap(), path);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_role_follows_a_binary_that_was_built_anew() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("palisade");
        fs::write(&source, "one").unwrap();
        let path = install(&source, directory.path(), "web").unwrap();
        fs::remove_file(&source).unwrap();
        fs::write(&source, "two!").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one");
        install(&source, directory.path(), "web").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two!");
    }

    #[test]
    fn a_copy_is_known_again_and_replaced_when_it_is_old() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("palisade");
        let path = directory.path().join("web");
        fs::write(&source, "one").unwrap();
        copy(&source, &path).unwrap();
        assert!(is_current(&source, &path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        fs::write(&source, "two").unwrap();
        File::open(&source).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert!(!is_current(&source, &path).unwrap());
    }
}
