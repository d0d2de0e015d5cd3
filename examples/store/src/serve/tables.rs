//! Declarations of tables, as this node has read them.

use std::{sync::Arc, time::Duration};

use store_client::{Client, Error, Options, Reason, Table};
use tonic::Status;

use super::{identity::Addresses, status::refusal};

/// To read a declaration wherever it is. Whoever asks tries again.
const DEADLINE: Duration = Duration::from_secs(2);

/// Declarations are rows like all others, and this node may have none of them: they are read as anybody reads, by a client
/// that remembers those it has read.
pub(super) struct Tables {
    client: Client,
}

impl Tables {
    /// Those that the nodes at `addresses` know of.
    ///
    /// # Errors
    ///
    /// When an address is none.
    pub(super) fn new(addresses: &Addresses, seed: u64) -> Result<Self, Error> {
        let options = Options { deadline: DEADLINE, seed, ..Options::default() };
        // By number: where other nodes say that they are is where those ask them.
        let nodes = addresses.iter().map(|(number, address)| format!("{number}={address}"));
        Ok(Self { client: Client::with(nodes, options)? })
    }

    /// A table's declaration.
    pub(super) async fn get(&self, name: &str) -> Result<Arc<Table>, Status> {
        self.client.table(name).await.map_err(|error| unread(name, &error))
    }

    /// The tables of one request.
    pub(super) fn reader(&self) -> Reader<'_> {
        Reader { tables: self, last: None }
    }
}

/// Reads the tables of one request: its rows are mostly of one.
pub(super) struct Reader<'a> {
    tables: &'a Tables,
    last: Option<Arc<Table>>,
}

impl Reader<'_> {
    /// A table's declaration.
    pub(super) async fn get(&mut self, name: &str) -> Result<&Table, Status> {
        let table = match self.last.take().filter(|last| last.name() == name) {
            Some(last) => last,
            None => self.tables.get(name).await?,
        };
        Ok(self.last.insert(table))
    }
}

fn unread(name: &str, error: &Error) -> Status {
    let message = format!("the declaration of {name:?} cannot be read now: {error}");
    match (error, error.reason()) {
        (_, Some(reason @ (Reason::UnknownTable | Reason::BadTable))) => refusal(reason, error.to_string()),
        // Said by what stands before another node: to ask again does not help, and an operator must hear of it.
        (Error::Denied(_), _) => {
            tracing::error!(table = name, %error, "this node may not read what tables there are");
            Status::permission_denied(message)
        }
        _ => refusal(Reason::Busy, message),
    }
}
