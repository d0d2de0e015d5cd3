//! Programs of others, found and ended.

use std::{
    path::{Path, PathBuf},
    process::Child,
};

use rustix::process::{Pid, Signal, kill_process};

/// A process that ends with this.
#[derive(Debug)]
pub(crate) struct Guarded {
    child: Child,
    by: Signal,
}

impl Guarded {
    /// Ended by being killed.
    pub(crate) fn new(child: Child) -> Self {
        Self { child, by: Signal::KILL }
    }

    /// Ended by a signal that it takes itself.
    pub(crate) fn ended_by(child: Child, by: Signal) -> Self {
        Self { child, by }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        // It may have ended already, and then there is nobody to signal.
        let signalled = pid.map(|pid| kill_process(pid, self.by));
        if let (Some(Ok(())), Err(error)) = (signalled, self.child.wait()) {
            eprintln!("a process does not end: {error}");
        }
    }
}

/// Where a program is, of the path or of these directories.
pub(crate) fn find(program: &str, also: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<_> = std::env::split_paths(&path).collect();
    directories.extend(also.iter().map(PathBuf::from));
    directories.into_iter().map(|directory| directory.join(program)).find(|path| Path::is_file(path))
}
