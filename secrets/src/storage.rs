//! Where sealed records live: a flat map from path to bytes, written all-or-nothing and durably.
//!
//! The store sees ciphertext and the paths of records, nothing else. Everything that it holds is sealed
//! by [`crate::barrier`], except the seal configuration, which holds no secret in the clear.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::BoxFuture;
use identity::files::{self, StateError};
use redb::{Database, ReadableDatabase as _, TableDefinition};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

/// Most children one listing returns; a folder larger than this wants to be split, and an answer larger
/// than this would be a way to fill memory.
pub const MAX_LIST_KEYS: usize = 65_536;
/// Most transactions that share one fsync. Bounds how long the first of them waits.
const MAX_GROUP_TRANSACTIONS: usize = 128;
/// Transactions waiting for the writer; beyond it writers wait their turn to queue.
const WRITE_QUEUE_TRANSACTIONS: usize = 256;
/// redb's page cache: secrets are small, and the goal for the whole process is 30 MiB.
const CACHE_BYTES: usize = 8 * 1024 * 1024;

const FILE_NAME: &str = "vault.redb";
const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("records");

/// Why a record could not be read or written. None of it names a record's content.
#[derive(Debug, Error)]
pub enum StorageError {
    /// The state directory is not ours alone, or cannot be made.
    #[error(transparent)]
    State(#[from] StateError),
    /// The database's file cannot be made, or no thread for it.
    #[error("the database {path} cannot be made")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Another process has the database open.
    #[error("the database {path} is open in another process")]
    InUse {
        /// Which file.
        path: PathBuf,
    },
    /// The database cannot be opened.
    #[error("the database {path} cannot be opened")]
    Open {
        /// Which file.
        path: PathBuf,
        /// What redb says.
        source: Box<redb::Error>,
    },
    /// A read or write failed.
    #[error("the database failed")]
    Engine(#[source] Box<redb::Error>),
    /// A group commit failed; every transaction in it is undone.
    #[error("the write was not committed: {0}")]
    Commit(String),
    /// The writer is gone: the process is stopping.
    #[error("the database is closed")]
    Closed,
    /// More than [`MAX_LIST_KEYS`] children.
    #[error("more than {MAX_LIST_KEYS} keys in one folder")]
    TooMany,
}

/// One change of a transaction.
#[derive(Clone)]
pub enum Op {
    /// Writes or replaces a record.
    Put {
        /// The record's path.
        path: String,
        /// The sealed record.
        record: Vec<u8>,
    },
    /// Removes a record; removing what is not there is no error.
    Delete {
        /// The record's path.
        path: String,
    },
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put { path, record } => write!(f, "Put({path}, {} bytes)", record.len()),
            Self::Delete { path } => write!(f, "Delete({path})"),
        }
    }
}

/// A store of records.
pub trait Storage: Send + Sync + fmt::Debug {
    /// The record at `path`.
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Option<Vec<u8>>, StorageError>>;

    /// What stands directly below `prefix` (empty, or ending in `/`), in order: `key` for a record,
    /// `folder/` for anything deeper.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StorageError>>;

    /// Makes all the changes or none. Once it returns `Ok` they survive a crash of the machine.
    fn transaction(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<(), StorageError>>;

    /// Writes one record.
    fn put(&self, path: String, record: Vec<u8>) -> BoxFuture<'_, Result<(), StorageError>> {
        self.transaction(vec![Op::Put { path, record }])
    }

    /// Removes one record.
    fn delete(&self, path: String) -> BoxFuture<'_, Result<(), StorageError>> {
        self.transaction(vec![Op::Delete { path }])
    }
}

struct Write {
    ops: Vec<Op>,
    done: oneshot::Sender<Result<(), StorageError>>,
}

/// Records in one redb file. One thread writes; transactions that arrive while it syncs share the next
/// sync. A file torn by a crash is rolled back by redb to the last commit when it is opened.
pub struct RedbStorage {
    database: Arc<Database>,
    writes: Option<mpsc::Sender<Write>>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl fmt::Debug for RedbStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RedbStorage")
    }
}

impl RedbStorage {
    /// Opens `vault.redb` in `directory`, making both (0700, 0600) where they are missing.
    ///
    /// # Errors
    /// A directory that others may enter, a file in use by another process, a file that is not redb's.
    pub fn open(directory: &Path) -> Result<Self, StorageError> {
        files::private_directory(directory)?;
        let path = directory.join(FILE_NAME);
        let database = open_database(&path)?;
        // The table exists from the start, so that no reader has to treat its absence as a case.
        let setup = || -> Result<(), redb::Error> {
            let transaction = database.begin_write()?;
            transaction.open_table(RECORDS)?;
            Ok(transaction.commit()?)
        };
        setup().map_err(|source| StorageError::Open { path: path.clone(), source: Box::new(source) })?;
        let database = Arc::new(database);
        let (writes, queue) = mpsc::channel(WRITE_QUEUE_TRANSACTIONS);
        let for_writer = Arc::clone(&database);
        let writer = std::thread::Builder::new()
            .name("vault-writer".into())
            .spawn(move || write_loop(&for_writer, queue))
            .map_err(|source| StorageError::File { path, source })?;
        Ok(Self { database, writes: Some(writes), writer: Some(writer) })
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, redb::Error> {
        let transaction = self.database.begin_read()?;
        let table = transaction.open_table(RECORDS)?;
        Ok(table.get(path)?.map(|record| record.value().to_vec()))
    }
}

impl Drop for RedbStorage {
    fn drop(&mut self) {
        self.writes = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the vault's writer thread panicked");
        }
    }
}

impl Storage for RedbStorage {
    fn get<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Option<Vec<u8>>, StorageError>> {
        // A few microseconds from redb's cache: a hop to a blocking thread would cost more than the read.
        Box::pin(async move { self.read(path).map_err(engine) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StorageError>> {
        let database = Arc::clone(&self.database);
        let prefix = prefix.to_owned();
        Box::pin(async move {
            tokio::task::spawn_blocking(move || list_children(&database, &prefix))
                .await
                .map_err(|_| StorageError::Closed)?
        })
    }

    fn transaction(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            let (done, committed) = oneshot::channel();
            let writes = self.writes.as_ref().ok_or(StorageError::Closed)?;
            writes.send(Write { ops, done }).await.map_err(|_| StorageError::Closed)?;
            committed.await.map_err(|_| StorageError::Closed)?
        })
    }
}

fn open_database(path: &Path) -> Result<Database, StorageError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let failed = |source: redb::Error| StorageError::Open { path: path.to_owned(), source: Box::new(source) };
    // Made with its mode, never made and then narrowed.
    let made = std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    made.map_err(|source| StorageError::File { path: path.to_owned(), source })?;
    match Database::builder().set_cache_size(CACHE_BYTES).create(path) {
        Ok(database) => Ok(database),
        Err(redb::DatabaseError::DatabaseAlreadyOpen) => Err(StorageError::InUse { path: path.to_owned() }),
        Err(error) => Err(failed(error.into())),
    }
}

fn engine(error: redb::Error) -> StorageError {
    StorageError::Engine(Box::new(error))
}

/// Commits group by group until every sender is gone.
fn write_loop(database: &Database, mut queue: mpsc::Receiver<Write>) {
    while let Some(first) = queue.blocking_recv() {
        let mut group = vec![first];
        while group.len() < MAX_GROUP_TRANSACTIONS
            && let Ok(next) = queue.try_recv()
        {
            group.push(next);
        }
        let outcome = commit(database, &group).map_err(|error| error.to_string());
        if let Err(error) = &outcome {
            tracing::error!(error, "the vault's database did not commit");
        }
        for write in group {
            // A caller that no longer waits has been cut off by its own time limit.
            let _gone = write.done.send(outcome.clone().map_err(StorageError::Commit)).is_err();
        }
    }
}

fn commit(database: &Database, group: &[Write]) -> Result<(), redb::Error> {
    // Durability::Immediate is redb's default: commit returns after fsync.
    let transaction = database.begin_write()?;
    {
        let mut table = transaction.open_table(RECORDS)?;
        for op in group.iter().flat_map(|write| &write.ops) {
            match op {
                Op::Put { path, record } => drop(table.insert(path.as_str(), record.as_slice())?),
                Op::Delete { path } => drop(table.remove(path.as_str())?),
            }
        }
    }
    Ok(transaction.commit()?)
}

fn list_children(database: &Database, prefix: &str) -> Result<Vec<String>, StorageError> {
    let read = || -> Result<Option<Vec<String>>, redb::Error> {
        let transaction = database.begin_read()?;
        let table = transaction.open_table(RECORDS)?;
        let mut children = Vec::new();
        let mut from = prefix.to_owned();
        while let Some(entry) = table.range(from.as_str()..)?.next() {
            let (key, _) = entry?;
            let Some(rest) = key.value().strip_prefix(prefix) else { break };
            if children.len() >= MAX_LIST_KEYS {
                return Ok(None);
            }
            if let Some((folder, _)) = rest.split_once('/') {
                // '0' is the byte after '/': the first key behind everything in this folder.
                from = format!("{prefix}{folder}0");
                children.push(format!("{folder}/"));
            } else {
                from = format!("{prefix}{rest}\0");
                if !rest.is_empty() {
                    children.push(rest.to_owned());
                }
            }
        }
        Ok(Some(children))
    };
    read().map_err(engine)?.ok_or(StorageError::TooMany)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A store in a directory of its own, which goes with the guard.
    pub(crate) fn scratch() -> (tempfile::TempDir, Arc<dyn Storage>) {
        let directory = tempfile::tempdir().unwrap();
        let storage = RedbStorage::open(&directory.path().join("state")).unwrap();
        (directory, Arc::new(storage))
    }

    #[tokio::test]
    async fn what_was_acknowledged_is_there_after_the_handle_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        for round in 0..5u8 {
            let storage = RedbStorage::open(&state).unwrap();
            for earlier in 0..round {
                assert_eq!(storage.get(&format!("r/{earlier}")).await.unwrap(), Some(vec![earlier]));
            }
            storage.put(format!("r/{round}"), vec![round]).await.unwrap();
            drop(storage);
        }
    }

    #[tokio::test]
    async fn listing_shows_direct_children_once() {
        let (_directory, storage) = scratch();
        for path in ["a/b", "a/b/c", "a/b/d", "a/b-e", "a/f", "ab", "a0"] {
            storage.put(path.into(), vec![1]).await.unwrap();
        }
        assert_eq!(storage.list("a/").await.unwrap(), ["b", "b-e", "b/", "f"]);
        assert_eq!(storage.list("").await.unwrap(), ["a/", "a0", "ab"]);
        assert!(storage.list("x/").await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_transaction_is_all_or_nothing_and_concurrent_ones_share_commits() {
        let (_directory, storage) = scratch();
        let writes = (0..200u32).map(|n| {
            let path = |part| format!("t/{n}/{part}");
            storage.transaction(vec![
                Op::Put { path: path("x"), record: n.to_be_bytes().to_vec() },
                Op::Put { path: path("y"), record: n.to_be_bytes().to_vec() },
                Op::Delete { path: path("x") },
            ])
        });
        for outcome in futures::future::join_all(writes).await {
            outcome.unwrap();
        }
        for n in 0..200u32 {
            assert_eq!(storage.get(&format!("t/{n}/x")).await.unwrap(), None);
            assert_eq!(storage.get(&format!("t/{n}/y")).await.unwrap(), Some(n.to_be_bytes().to_vec()));
        }
    }

    #[test]
    fn a_second_process_and_a_directory_open_to_others_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let first = RedbStorage::open(&state).unwrap();
        assert!(matches!(RedbStorage::open(&state), Err(StorageError::InUse { .. })));
        drop(first);
        let file = std::fs::metadata(state.join(FILE_NAME)).unwrap();
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(RedbStorage::open(&state), Err(StorageError::State(StateError::Mode { .. }))));
    }

    #[test]
    fn a_file_that_is_no_database_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        drop(RedbStorage::open(&state).unwrap());
        std::fs::write(state.join(FILE_NAME), b"not a database at all").unwrap();
        let error = RedbStorage::open(&state).unwrap_err();
        assert!(error.to_string().contains("vault.redb"), "{error}");
    }
}
