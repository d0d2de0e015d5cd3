//! The one database file of a service, and the clock its rows are stamped with.

use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::SystemTime;

use redb::Database;
use redb::backends::FileBackend;

use crate::BankError;

/// Opens `DIR/FILE`, making both if they are missing, readable by this user alone.
pub(crate) fn open(directory: &Path, file: &str) -> Result<Database, BankError> {
    let unusable = |source| BankError::StateDirectory { path: directory.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(unusable)?;
    let path = directory.join(file);
    let handle = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(unusable)?;
    let database = FileBackend::new(handle)
        .and_then(|backend| Database::builder().create_with_backend(backend))
        .map_err(|source| BankError::Database { path, source: Box::new(source.into()) })?;
    // A new file is lost in a power cut until its directory entry is on disk too.
    std::fs::File::open(directory).and_then(|dir| dir.sync_all()).map_err(unusable)?;
    Ok(database)
}

/// Seconds since the Unix epoch, to stamp a transfer with; nothing is decided by it.
#[expect(
    clippy::disallowed_methods,
    reason = "the bank uses none of the mesh's crates; it stamps rows, no more"
)]
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
