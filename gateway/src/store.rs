//! Where session records rest: opaque rows under the hash of their id, compared and swapped by version.
//!
//! A trait, because several gateways will share one store; here an embedded redb file.

use std::fs::OpenOptions;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use futures::future::BoxFuture;
use redb::{
    Database, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _, TableDefinition,
};
use thiserror::Error;

use crate::BoxError;

/// Most sessions kept; beyond it a login is refused rather than somebody logged out.
pub const MAX_SESSIONS: u64 = 1_000_000;

const SESSIONS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("sessions");
const HEAD_BYTES: usize = 16;

/// SHA-256 of a session id: what is stored, and what appears in logs.
pub type SessionHash = [u8; 32];

/// One sealed record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Counts up by one a change.
    pub version: u64,
    /// When the session ends at the latest, seconds since the Unix epoch: what the sweep goes by.
    pub ends: u64,
    /// The sealed record.
    pub sealed: Vec<u8>,
}

/// The store failed, or its directory cannot be used.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Reading or writing failed.
    #[error("the session store failed: {0}")]
    Database(#[source] BoxError),
    /// The directory cannot be made or read.
    #[error("the state directory {path} cannot be used: {cause}")]
    Directory {
        /// Which.
        path: String,
        /// Why.
        cause: std::io::Error,
    },
    /// Others may write into it.
    #[error("the state directory {0} can be written by others; make it mode 0700")]
    OpenDirectory(String),
    /// A row is not one of ours.
    #[error("a session record is malformed")]
    Malformed,
    /// Over [`MAX_SESSIONS`].
    #[error("there are {MAX_SESSIONS} sessions already")]
    Full,
}

/// Keeps rows.
pub trait SessionStore: Send + Sync + std::fmt::Debug {
    /// The row of a session.
    fn get<'a>(&'a self, id: &'a SessionHash) -> BoxFuture<'a, Result<Option<Row>, StoreError>>;

    /// Writes a row if the stored version is `expected` (`None`: if there is no row). Durable when it
    /// returns true; false if somebody else was faster.
    fn put<'a>(
        &'a self,
        id: &'a SessionHash,
        expected: Option<u64>,
        row: Row,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;

    /// Removes a row; true if there was one. Durable when it returns.
    fn delete<'a>(&'a self, id: &'a SessionHash) -> BoxFuture<'a, Result<bool, StoreError>>;

    /// Removes rows that ended before `now`, and says how many.
    fn sweep(&self, now: u64) -> BoxFuture<'_, Result<usize, StoreError>>;
}

/// Sessions in a redb file.
#[derive(Debug, Clone)]
pub struct RedbStore(Arc<Database>);

fn database(error: impl Into<BoxError>) -> StoreError {
    StoreError::Database(error.into())
}

/// Makes a private directory, or checks that an existing one is.
pub(crate) fn private_directory(path: &Path) -> Result<(), StoreError> {
    let failed = |cause| StoreError::Directory { path: path.display().to_string(), cause };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    let mode = std::fs::metadata(path).map_err(failed)?.mode();
    if mode & 0o022 == 0 { Ok(()) } else { Err(StoreError::OpenDirectory(path.display().to_string())) }
}

/// Opens or makes a redb file that only its owner can read.
pub(crate) fn private_database(path: &Path) -> Result<Database, StoreError> {
    let failed = |cause| StoreError::Directory { path: path.display().to_string(), cause };
    // Made by us first: redb would make it readable by whoever the umask allows.
    drop(OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map_err(failed)?);
    Database::create(path).map_err(database)
}

impl RedbStore {
    /// Opens `directory/sessions.redb`.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        private_directory(directory)?;
        let store = Self(Arc::new(private_database(&directory.join("sessions.redb"))?));
        // Reads may come before the first write: the table must be there.
        store.write(|_| Ok(Some(())))?;
        Ok(store)
    }

    /// Changes the table in one transaction; an outcome of `None` changed nothing and waits for no disk.
    fn write<T>(
        &self,
        change: impl FnOnce(
            &mut redb::Table<'_, &'static [u8; 32], &'static [u8]>,
        ) -> Result<Option<T>, StoreError>,
    ) -> Result<Option<T>, StoreError> {
        let transaction = self.0.begin_write().map_err(database)?;
        let outcome = {
            let mut table = transaction.open_table(SESSIONS).map_err(database)?;
            change(&mut table)?
        };
        match outcome {
            Some(outcome) => transaction.commit().map(|()| Some(outcome)).map_err(database),
            None => transaction.abort().map(|()| None).map_err(database),
        }
    }

    fn read(&self, id: &SessionHash) -> Result<Option<Row>, StoreError> {
        let transaction = self.0.begin_read().map_err(database)?;
        let table = transaction.open_table(SESSIONS).map_err(database)?;
        table.get(id).map_err(database)?.map(|row| decode(row.value())).transpose()
    }

    /// Writes wait for the disk, so they leave the async threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(database)?
    }
}

fn encode(row: &Row) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + row.sealed.len());
    bytes.extend_from_slice(&row.version.to_be_bytes());
    bytes.extend_from_slice(&row.ends.to_be_bytes());
    bytes.extend_from_slice(&row.sealed);
    bytes
}

fn decode(bytes: &[u8]) -> Result<Row, StoreError> {
    let (version, rest) = bytes.split_first_chunk().ok_or(StoreError::Malformed)?;
    let (ends, sealed) = rest.split_first_chunk().ok_or(StoreError::Malformed)?;
    Ok(Row {
        version: u64::from_be_bytes(*version),
        ends: u64::from_be_bytes(*ends),
        sealed: sealed.to_vec(),
    })
}

impl SessionStore for RedbStore {
    fn get<'a>(&'a self, id: &'a SessionHash) -> BoxFuture<'a, Result<Option<Row>, StoreError>> {
        // A read comes from redb's cache or the page cache and waits for no writer.
        Box::pin(async move { self.read(id) })
    }

    fn put<'a>(
        &'a self,
        id: &'a SessionHash,
        expected: Option<u64>,
        row: Row,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        let id = *id;
        Box::pin(self.blocking(move |store| {
            store
                .write(|table| {
                    let found = match table.get(&id).map_err(database)? {
                        Some(row) => Some(decode(row.value())?.version),
                        None => None,
                    };
                    if found != expected {
                        return Ok(None);
                    }
                    if expected.is_none() && table.len().map_err(database)? >= MAX_SESSIONS {
                        return Err(StoreError::Full);
                    }
                    table.insert(&id, encode(&row).as_slice()).map_err(database)?;
                    Ok(Some(()))
                })
                .map(|written| written.is_some())
        }))
    }

    fn delete<'a>(&'a self, id: &'a SessionHash) -> BoxFuture<'a, Result<bool, StoreError>> {
        let id = *id;
        Box::pin(self.blocking(move |store| {
            let removed = store.write(|table| Ok(table.remove(&id).map_err(database)?.map(|_| ())))?;
            Ok(removed.is_some())
        }))
    }

    fn sweep(&self, now: u64) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(self.blocking(move |store| {
            let swept = store.write(|table| {
                let before = table.len().map_err(database)?;
                table.retain(|_, row| decode(row).is_ok_and(|row| row.ends > now)).map_err(database)?;
                let after = table.len().map_err(database)?;
                Ok(usize::try_from(before.saturating_sub(after)).ok().filter(|count| *count > 0))
            })?;
            Ok(swept.unwrap_or(0))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(version: u64, ends: u64) -> Row {
        Row { version, ends, sealed: vec![1, 2, 3] }
    }

    #[tokio::test]
    async fn a_row_changes_only_from_the_version_it_was_read_at() {
        let directory = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&directory.path().join("state")).unwrap();
        let id = [7; 32];
        assert_eq!(store.get(&id).await.unwrap(), None);
        assert!(store.put(&id, None, row(1, 100)).await.unwrap());
        assert!(!store.put(&id, None, row(1, 100)).await.unwrap());
        assert!(!store.put(&id, Some(2), row(3, 100)).await.unwrap());
        assert!(store.put(&id, Some(1), row(2, 100)).await.unwrap());
        assert_eq!(store.get(&id).await.unwrap(), Some(row(2, 100)));
        assert_eq!(store.sweep(99).await.unwrap(), 0);
        assert_eq!(store.sweep(100).await.unwrap(), 1);
        assert!(!store.put(&id, Some(2), row(3, 100)).await.unwrap(), "a deleted session does not come back");
        assert!(!store.delete(&id).await.unwrap());
    }

    #[tokio::test]
    async fn the_file_is_private_and_an_open_directory_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        drop(RedbStore::open(&state).unwrap());
        assert_eq!(std::fs::metadata(state.join("sessions.redb")).unwrap().mode() & 0o777, 0o600);
        std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(RedbStore::open(&state), Err(StoreError::OpenDirectory(_))));
    }
}
