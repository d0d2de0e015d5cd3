//! What can stop one of the bank's services.

use std::path::PathBuf;

/// Why a service could not start, or had to stop.
///
/// What goes wrong with a single request is answered to that request and never ends the service.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BankError {
    /// The listener handed in cannot be used.
    #[error("the listener cannot be used")]
    Listener(#[source] std::io::Error),
    /// The state directory cannot be made or written.
    #[error("the state directory {path} cannot be used: it must be writable by this user", path = path.display())]
    StateDirectory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The database file cannot be opened; another process may have it open.
    #[error("the database {path} cannot be opened; is another process using it?", path = path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// What the database said.
        #[source]
        source: Box<redb::Error>,
    },
    /// The database opened but cannot be read or written.
    #[error("the database cannot be read or written")]
    Store(#[source] Box<redb::Error>),
    /// A row of the database is not what this service wrote.
    #[error("the database holds a row that this service did not write: {0}")]
    Corrupt(String),
    /// The machine has no randomness to give.
    #[error("no randomness from the operating system")]
    Randomness,
}
