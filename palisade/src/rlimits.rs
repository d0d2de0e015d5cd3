//! What the kernel lets this process use: as many descriptors as it may have, and no core dumps.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::failure::Failure;

/// The soft limits that this process was started with, for a command that it starts in its turn:
/// a program that uses `select` cannot bear more descriptors, and its core dumps are its own affair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Original {
    /// Descriptors; `None` is no limit.
    pub(crate) descriptors: Option<u64>,
    /// Bytes of a core dump; `None` is no limit.
    pub(crate) core: Option<u64>,
}

/// Takes all descriptors that this process may have, and gives up core dumps, which would hold keys.
/// Both soft limits only: a command that is started later can have the original ones back.
pub(crate) fn adjust() -> Result<Original, Failure> {
    let (descriptors, core) = (getrlimit(Resource::Nofile), getrlimit(Resource::Core));
    setrlimit(Resource::Core, Rlimit { current: Some(0), ..core })
        .map_err(|error| Failure::new("cannot turn off core dumps").because(&error))?;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: descriptors.maximum, ..descriptors }) {
        tracing::warn!(%error, "as many descriptors as before have to do");
    }
    Ok(Original { descriptors: descriptors.current, core: core.current })
}

/// How many descriptors this process may have, once it has [`adjust`]ed.
pub(crate) fn most_descriptors() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

impl Original {
    /// Puts both back.
    pub(crate) fn restore(self) -> std::io::Result<()> {
        for (resource, current) in [(Resource::Nofile, self.descriptors), (Resource::Core, self.core)] {
            setrlimit(resource, Rlimit { current, ..getrlimit(resource) })?;
        }
        Ok(())
    }
}
