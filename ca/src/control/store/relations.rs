//! The tables of relations: what is true of services' objects, written by API.

use redb::{ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Store, StoreError, decode, encode};
use crate::pb::mesh as pb;
use crate::relations::{
    Attributes, Change, KeptRelation, MAX_BATCH, MAX_BATCH_BYTES, MAX_OBJECTS, MAX_STORE_BYTES, Malformed,
    Object,
};

/// Service → JSON of [`Head`].
const STORES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("relation_stores");
/// (service, type, id) → JSON of [`Row`].
const RELATIONS: TableDefinition<'_, (&str, &str, &str), &[u8]> = TableDefinition::new("relations");

/// What holds for one service's store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    /// Names it: another one of the same service has another name.
    pub(crate) epoch: String,
    /// Rises with every batch.
    pub(crate) revision: u64,
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
}

/// An object as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Row {
    revision: u64,
    by: String,
    attributes: Attributes,
}

/// A batch that was written.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) head: Head,
    /// The revision before.
    pub(crate) after: u64,
    pub(crate) by: String,
    pub(crate) changed: Vec<pb::Relation>,
}

/// Why a batch is not written; nothing of it is.
#[derive(Debug, Error)]
pub(crate) enum NotWritten {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("{object} {is}, and the change says that it {must}")]
    Precondition { object: Object, is: String, must: String },
    #[error("{0}")]
    Full(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

macro_rules! from_redb {
    ($($error:ty),*) => {
        $(impl From<$error> for NotWritten {
            fn from(error: $error) -> Self {
                Self::Store(error.into())
            }
        })*
    };
}

from_redb!(redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);

/// So that readers find the tables.
pub(super) fn open(write: &WriteTransaction) -> Result<(), StoreError> {
    write.open_table(STORES)?;
    write.open_table(RELATIONS)?;
    Ok(())
}

/// The objects of a batch, each once.
///
/// # Errors
/// What is wrong with it, or which limit it passes.
pub(crate) fn check(changes: &[Change]) -> Result<Vec<Object>, Malformed> {
    if changes.is_empty() {
        return Err(Malformed("the batch has no change".to_owned()));
    }
    if changes.len() > MAX_BATCH {
        return Err(Malformed(format!(
            "the batch has {} changes; at most {MAX_BATCH} are taken at once",
            changes.len()
        )));
    }
    let objects = changes.iter().map(Change::object).collect::<Result<Vec<_>, _>>()?;
    let mut sorted: Vec<&Object> = objects.iter().collect();
    sorted.sort_unstable();
    if let Some([twice, _]) = sorted.windows(2).find(|pair| matches!(pair, [one, other] if one == other)) {
        return Err(Malformed(format!("the batch changes {twice} twice")));
    }
    let bytes: usize = changes
        .iter()
        .map(|change| {
            change.kind.len() + change.id.len() + change.attributes.as_ref().map_or(0, |a| a.text().len())
        })
        .sum();
    if bytes > MAX_BATCH_BYTES {
        return Err(Malformed(format!(
            "the batch takes {bytes} bytes; at most {MAX_BATCH_BYTES} are taken at once"
        )));
    }
    Ok(objects)
}

impl Store {
    /// The store of a service, made as `fresh` if there is none.
    pub(crate) fn relations_head(&self, service: &str, fresh: &str) -> Result<Head, StoreError> {
        if let Some(head) = self.0.begin_read()?.open_table(STORES)?.get(service)? {
            return decode(head.value());
        }
        let write = self.0.begin_write()?;
        let head = head_of(&write, service, fresh)?;
        write.open_table(STORES)?.insert(service, encode(&head)?.as_slice())?;
        write.commit()?;
        Ok(head)
    }

    /// Writes a batch, all or none, on disk when this returns. Its revision is at least the time: no restored backup gives
    /// one out again.
    pub(crate) fn write_relations(
        &self,
        service: &str,
        changes: &[Change],
        by: &str,
        now_ms: u64,
        fresh: &str,
    ) -> Result<Batch, NotWritten> {
        let objects = check(changes)?;
        let write = self.0.begin_write()?;
        let batch = {
            let mut head = head_of(&write, service, fresh)?;
            let after = head.revision;
            head.revision = after.saturating_add(1).max(now_ms);
            let mut rows = write.open_table(RELATIONS)?;
            let mut changed = Vec::with_capacity(changes.len());
            for (change, object) in changes.iter().zip(objects) {
                let key = (service, object.kind(), object.id());
                let before = match rows.get(key)? {
                    Some(bytes) => Some((decode::<Row>(bytes.value())?, bytes.value().len())),
                    None => None,
                };
                check_before(change, &object, before.as_ref().map(|(row, _)| row.revision))?;
                let length = |row: usize| (row + object.kind().len() + object.id().len()) as u64;
                if let Some((_, row)) = before {
                    head.objects = head.objects.saturating_sub(1);
                    head.bytes = head.bytes.saturating_sub(length(row));
                }
                match &change.attributes {
                    Some(attributes) => {
                        let row = Row {
                            revision: head.revision,
                            by: by.to_owned(),
                            attributes: attributes.clone(),
                        };
                        let row = encode(&row)?;
                        rows.insert(key, row.as_slice())?;
                        head.objects += 1;
                        head.bytes += length(row.len());
                    }
                    None => drop(rows.remove(key)?),
                }
                changed.push(pb::Relation {
                    kind: object.kind().to_owned(),
                    id: object.id().to_owned(),
                    revision: head.revision,
                    attributes: change.attributes.as_ref().map(Attributes::text),
                });
            }
            if head.objects > MAX_OBJECTS {
                return Err(NotWritten::Full(format!(
                    "the service has {MAX_OBJECTS} objects with relations, and no more are taken"
                )));
            }
            if head.bytes > MAX_STORE_BYTES {
                return Err(NotWritten::Full(format!(
                    "the service's relations take {MAX_STORE_BYTES} bytes, and no more are taken"
                )));
            }
            write.open_table(STORES)?.insert(service, encode(&head)?.as_slice())?;
            Batch { head, after, by: by.to_owned(), changed }
        };
        write.commit()?;
        Ok(batch)
    }

    /// Up to `limit` objects behind `after`, in their order, of one moment; and whether there are more.
    pub(crate) fn read_relations(
        &self,
        service: &str,
        after: Option<&Object>,
        limit: usize,
    ) -> Result<(Option<Head>, Vec<KeptRelation>, bool), StoreError> {
        let read = self.0.begin_read()?;
        let head = match read.open_table(STORES)?.get(service)? {
            Some(head) => Some(decode(head.value())?),
            None => None,
        };
        let table = read.open_table(RELATIONS)?;
        let from = after.map_or((service, "", ""), |after| (service, after.kind(), after.id()));
        let mut found = Vec::new();
        for row in table.range(from..)? {
            let (key, bytes) = row?;
            let (of, kind, id) = key.value();
            if of != service {
                break;
            }
            if after.is_some_and(|after| (after.kind(), after.id()) == (kind, id)) {
                continue;
            }
            if found.len() >= limit {
                return Ok((head, found, true));
            }
            found.push(kept(kind, id, decode(bytes.value())?));
        }
        Ok((head, found, false))
    }

    /// What is known of one object.
    pub(crate) fn relation(
        &self,
        service: &str,
        object: &Object,
    ) -> Result<Option<KeptRelation>, StoreError> {
        let read = self.0.begin_read()?;
        let table = read.open_table(RELATIONS)?;
        let row = table.get((service, object.kind(), object.id()))?;
        row.map(|bytes| Ok(kept(object.kind(), object.id(), decode(bytes.value())?))).transpose()
    }

    /// All stores, by service.
    pub(crate) fn relation_heads(&self) -> Result<Vec<(String, Head)>, StoreError> {
        let read = self.0.begin_read()?;
        let table = read.open_table(STORES)?;
        let head = |row: Result<(redb::AccessGuard<'_, &str>, redb::AccessGuard<'_, &[u8]>), _>| {
            let (service, head) = row?;
            Ok((service.value().to_owned(), decode(head.value())?))
        };
        table.iter()?.map(head).collect()
    }
}

fn kept(kind: &str, id: &str, row: Row) -> KeptRelation {
    let Row { revision, by, attributes } = row;
    KeptRelation { kind: kind.to_owned(), id: id.to_owned(), revision, by, attributes: Some(attributes) }
}

fn head_of(write: &WriteTransaction, service: &str, fresh: &str) -> Result<Head, StoreError> {
    match write.open_table(STORES)?.get(service)? {
        Some(head) => decode(head.value()),
        None => Ok(Head { epoch: fresh.to_owned(), revision: 0, objects: 0, bytes: 0 }),
    }
}

/// Whether the object is what the change says that it must be.
fn check_before(change: &Change, object: &Object, revision: Option<u64>) -> Result<(), NotWritten> {
    let must = match (change.must_be, change.must_exist) {
        (Some(0), _) if revision.is_some() => "is not there".to_owned(),
        (Some(must), _) if revision.unwrap_or(0) != must => format!("has the revision {must}"),
        (None, true) if revision.is_none() => "is there".to_owned(),
        _ => return Ok(()),
    };
    let is = match revision {
        Some(revision) => format!("has the revision {revision}"),
        None => "is not there".to_owned(),
    };
    Err(NotWritten::Precondition { object: object.clone(), is, must })
}

#[cfg(test)]
#[path = "relations_tests.rs"]
mod tests;
