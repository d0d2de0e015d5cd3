//! Declarations of tables, as this node has read them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use store_client::{Client, Error, Options, Reason, TABLES, Table};
use tonic::Status;

use super::{identity::Addresses, status::refusal};

/// To read a declaration wherever it is. Whoever asks tries again.
const DEADLINE: Duration = Duration::from_secs(2);

/// Tables are never dropped and never change, so what was read once is right for ever.
pub(super) struct Tables {
    known: Mutex<HashMap<String, Arc<Table>>>,
    /// Declarations are rows like all others, and this node may have none of them: they are read as anybody reads.
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
        let client = Client::with(nodes, options)?;
        let known = Mutex::new(HashMap::from([(TABLES.to_owned(), Arc::new(Table::of_tables()))]));
        Ok(Self { known, client })
    }

    /// A table's declaration.
    pub(super) async fn get(&self, name: &str) -> Result<Arc<Table>, Status> {
        if let Some(table) = self.known().get(name) {
            return Ok(Arc::clone(table));
        }
        let table = self.client.table(name).await.map_err(|error| {
            let reason = match error.reason() {
                Some(reason @ (Reason::UnknownTable | Reason::BadTable)) => reason,
                _ => Reason::Busy,
            };
            let message = match reason {
                Reason::Busy => format!("the declaration of {name:?} cannot be read now: {error}"),
                _ => error.to_string(),
            };
            refusal(reason, message)
        })?;
        self.known().insert(name.to_owned(), Arc::clone(&table));
        Ok(table)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Table>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
