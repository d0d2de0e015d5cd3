//! What control remembers over a restart: hosts, join tokens (hashed), the issuance log, decisions,
//! policies, relations.
//!
//! One redb file. Every change is one transaction; a crash leaves the last committed one. The methods
//! block on the disk: [`Store::run`] takes them off the async threads.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use redb::{
    Database, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _, Table, TableDefinition,
    WriteTransaction,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub(crate) mod relations;

use super::rollout::Epoch;
use crate::model::{DecisionQuery, IssuedSvid, StoredDecision};
use crate::release::Manifest;

/// Name of the file in the state directory.
pub(crate) const FILE_NAME: &str = "control.redb";

/// Lines the issuance log keeps: more than a month of a mesh with a hundred workloads and hourly SVIDs,
/// and at 300 bytes a line still a small file. The oldest are dropped.
pub(crate) const MAX_ISSUANCES: u64 = 500_000;

/// Most join tokens that can be open at once.
pub(crate) const MAX_JOIN_TOKENS: u64 = 10_000;

const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
const COUNTS: TableDefinition<'_, &str, u64> = TableDefinition::new("counts");
/// SHA-256 of the token → JSON of [`TokenRecord`].
const TOKENS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("join_tokens");
/// Host → JSON of [`NodeRecord`].
const NODES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("nodes");
/// Running number → JSON of [`IssuedSvid`].
const ISSUANCES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("issuances");
/// Running number → JSON of [`StoredDecision`].
const DECISIONS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("decisions");
/// (receipt, reporter) → running number.
const RECEIPTS: TableDefinition<'_, (&str, &str), u64> = TableDefinition::new("receipts");

/// Number → JSON of [`Epoch`].
const EPOCHS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("policy_epochs");
/// SHA-256 → the files of policies, and their manifests.
const CONTENTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("policy_contents");

/// Epochs of policies kept, to be gone back to.
const MAX_EPOCHS: u64 = 100;

const PSEUDONYM_KEY: &str = "pseudonym_key";
const POLICY_HEAD: &str = "policy_head";
const ROOT_FINGERPRINT: &str = "root_sha256";
const NEXT_ISSUANCE: &str = "next_issuance";
const NEXT_DECISION: &str = "next_decision";
const DECISIONS_EXPIRED: &str = "decisions_expired";
const DECISIONS_LOST: &str = "decisions_lost";

/// Why the store failed.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The database cannot be opened.
    #[error("the database cannot be opened")]
    Open(#[source] Box<redb::DatabaseError>),
    /// Reading or writing failed.
    #[error("the database failed")]
    Database(#[source] Box<redb::Error>),
    /// A record is not what was written.
    #[error("a record in the database is damaged")]
    Record(#[source] serde_json::Error),
    /// Contents are not what their digest says.
    #[error("a file of policies in the database is damaged")]
    Damaged,
    /// [`MAX_JOIN_TOKENS`] are open.
    #[error("{MAX_JOIN_TOKENS} join tokens are open already")]
    TooManyTokens,
    /// The task was cut off: the process is stopping.
    #[error("the process is stopping")]
    Stopping,
}

macro_rules! from_redb {
    ($($error:ty),*) => {
        $(impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self::Database(Box::new(error.into()))
            }
        })*
    };
}

from_redb!(redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);

/// A join token as stored: never the token itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TokenRecord {
    pub(crate) host: String,
    /// Seconds since the Unix epoch.
    pub(crate) expires: u64,
}

/// A host that joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeRecord {
    pub(crate) joined: u64,
    pub(crate) serial: String,
    pub(crate) not_after: u64,
}

/// What became of a join token that was presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Redeemed {
    /// It was good, and is gone now.
    Yes,
    /// Unknown, used, expired, or for another host.
    No,
}

/// What storing a batch of decisions did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) stored: u64,
}

/// Totals kept in the store.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StoreCounts {
    pub(crate) issued: u64,
    pub(crate) tokens_open: u64,
    pub(crate) decisions: u64,
    pub(crate) decisions_expired: u64,
    pub(crate) decisions_lost: u64,
}

/// The open database.
#[derive(Debug, Clone)]
pub(crate) struct Store(Arc<Database>);

impl Store {
    /// Opens the file in `directory`, or makes it.
    pub(crate) fn open(directory: &Path) -> Result<Self, StoreError> {
        let database =
            Database::create(directory.join(FILE_NAME)).map_err(|error| StoreError::Open(Box::new(error)))?;
        let store = Self(Arc::new(database));
        let write = store.0.begin_write()?;
        // Opened once so that readers find every table.
        write.open_table(META)?;
        write.open_table(COUNTS)?;
        write.open_table(TOKENS)?;
        write.open_table(NODES)?;
        write.open_table(ISSUANCES)?;
        write.open_table(DECISIONS)?;
        write.open_table(RECEIPTS)?;
        write.open_table(EPOCHS)?;
        write.open_table(CONTENTS)?;
        relations::open(&write)?;
        write.commit()?;
        Ok(store)
    }

    /// Runs `work` on a thread that may block.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store)).await.unwrap_or(Err(StoreError::Stopping))
    }

    /// SHA-256 of the root certificate that this database belongs to.
    pub(crate) fn root_fingerprint(&self) -> Result<Option<String>, StoreError> {
        let read = self.0.begin_read()?;
        Ok(read.open_table(META)?.get(ROOT_FINGERPRINT)?.map(|text| text.value().to_owned()))
    }

    /// Ties the database to a root.
    pub(crate) fn set_root_fingerprint(&self, fingerprint: &str) -> Result<(), StoreError> {
        let write = self.0.begin_write()?;
        write.open_table(META)?.insert(ROOT_FINGERPRINT, fingerprint)?;
        Ok(write.commit()?)
    }

    /// Stores a join token by its hash and forgets those that have expired.
    pub(crate) fn add_token(&self, hash: &str, record: &TokenRecord, now: u64) -> Result<(), StoreError> {
        let write = self.0.begin_write()?;
        {
            let mut tokens = write.open_table(TOKENS)?;
            tokens.retain(|_, bytes| {
                serde_json::from_slice::<TokenRecord>(bytes).is_ok_and(|record| record.expires > now)
            })?;
            if tokens.len()? >= MAX_JOIN_TOKENS {
                return Err(StoreError::TooManyTokens);
            }
            tokens.insert(hash, encode(record)?.as_slice())?;
        }
        Ok(write.commit()?)
    }

    /// Whether a token could be redeemed now. Cheap, and decides nothing: [`Store::redeem`] does.
    pub(crate) fn token_is_open(&self, hash: &str, host: &str, now: u64) -> Result<bool, StoreError> {
        let read = self.0.begin_read()?;
        match read.open_table(TOKENS)?.get(hash)? {
            Some(bytes) => fits(bytes.value(), host, now),
            None => Ok(false),
        }
    }

    /// Redeems a token and records what was issued for it, in one transaction: of two that come at
    /// once, redb lets one write at a time, and the second no longer finds the token.
    pub(crate) fn redeem(
        &self,
        hash: &str,
        host: &str,
        now: u64,
        node: &NodeRecord,
        issued: &IssuedSvid,
    ) -> Result<Redeemed, StoreError> {
        let write = self.0.begin_write()?;
        {
            let mut tokens = write.open_table(TOKENS)?;
            let open = match tokens.get(hash)? {
                Some(bytes) => fits(bytes.value(), host, now)?,
                None => false,
            };
            if !open {
                return Ok(Redeemed::No);
            }
            tokens.remove(hash)?;
            write.open_table(NODES)?.insert(host, encode(node)?.as_slice())?;
            append_issuances(&write, std::slice::from_ref(issued))?;
        }
        write.commit()?;
        Ok(Redeemed::Yes)
    }

    /// All hosts that have joined.
    pub(crate) fn nodes(&self) -> Result<Vec<(String, NodeRecord)>, StoreError> {
        let read = self.0.begin_read()?;
        let table = read.open_table(NODES)?;
        table
            .iter()?
            .map(|row| {
                let (host, bytes) = row?;
                Ok((host.value().to_owned(), decode(bytes.value())?))
            })
            .collect()
    }

    /// Records a node's renewed identity.
    pub(crate) fn renew_node(
        &self,
        host: &str,
        node: &NodeRecord,
        issued: &IssuedSvid,
    ) -> Result<(), StoreError> {
        let write = self.0.begin_write()?;
        write.open_table(NODES)?.insert(host, encode(node)?.as_slice())?;
        append_issuances(&write, std::slice::from_ref(issued))?;
        Ok(write.commit()?)
    }

    /// Adds to the issuance log.
    pub(crate) fn log_issuances(&self, issued: &[IssuedSvid]) -> Result<(), StoreError> {
        let write = self.0.begin_write()?;
        append_issuances(&write, issued)?;
        Ok(write.commit()?)
    }

    /// Every logged SVID that has not expired at `now`.
    pub(crate) fn active_issuances(&self, now: u64) -> Result<Vec<IssuedSvid>, StoreError> {
        let read = self.0.begin_read()?;
        let table = read.open_table(ISSUANCES)?;
        let mut active = Vec::new();
        for row in table.iter()? {
            let issued: IssuedSvid = decode(row?.1.value())?;
            if issued.not_after > now {
                active.push(issued);
            }
        }
        Ok(active)
    }

    /// Stores decisions, drops the oldest above `kept`, and adds `lost` to the count of those that never
    /// arrived. A decision that the same workload has handed in before is not stored twice.
    pub(crate) fn record_decisions(
        &self,
        decisions: &[StoredDecision],
        kept: u64,
        lost: u64,
    ) -> Result<Recorded, StoreError> {
        let write = self.0.begin_write()?;
        let mut recorded = Recorded::default();
        {
            let mut counts = write.open_table(COUNTS)?;
            let mut rows = write.open_table(DECISIONS)?;
            let mut receipts = write.open_table(RECEIPTS)?;
            let mut next = count(&counts, NEXT_DECISION)?;
            for decision in decisions {
                let key = (decision.receipt.as_str(), decision.reporter.as_str());
                if receipts.get(key)?.is_some() {
                    continue;
                }
                rows.insert(next, encode(decision)?.as_slice())?;
                receipts.insert(key, next)?;
                next += 1;
                recorded.stored += 1;
            }
            counts.insert(NEXT_DECISION, next)?;
            let mut expired = 0;
            while rows.len()? > kept {
                let Some(oldest) =
                    rows.pop_first()?.map(|(_, bytes)| decode::<StoredDecision>(bytes.value()))
                else {
                    break;
                };
                let oldest = oldest?;
                receipts.remove((oldest.receipt.as_str(), oldest.reporter.as_str()))?;
                expired += 1;
            }
            add(&mut counts, DECISIONS_EXPIRED, expired)?;
            add(&mut counts, DECISIONS_LOST, lost)?;
        }
        write.commit()?;
        Ok(recorded)
    }

    /// Decisions that match, newest first.
    pub(crate) fn decisions(&self, query: &DecisionQuery) -> Result<Vec<StoredDecision>, StoreError> {
        let read = self.0.begin_read()?;
        let table = read.open_table(DECISIONS)?;
        let mut found = Vec::new();
        for row in table.iter()?.rev() {
            if found.len() >= query.effective_limit() {
                break;
            }
            let decision: StoredDecision = decode(row?.1.value())?;
            if query.wants(&decision) {
                found.push(decision);
            }
        }
        Ok(found)
    }

    /// The decision of this receipt: the first one stored, should several workloads claim it.
    pub(crate) fn decision(&self, receipt: &str) -> Result<Option<StoredDecision>, StoreError> {
        let read = self.0.begin_read()?;
        let receipts = read.open_table(RECEIPTS)?;
        let mut first: Option<u64> = None;
        for row in receipts.range((receipt, "")..)? {
            let (key, number) = row?;
            if key.value().0 != receipt {
                break;
            }
            let number = number.value();
            first = Some(first.map_or(number, |earlier| earlier.min(number)));
        }
        let Some(number) = first else { return Ok(None) };
        let found = read.open_table(DECISIONS)?.get(number)?;
        found.map(|bytes| decode(bytes.value())).transpose()
    }

    /// All epochs of policies that are kept, in ascending order.
    pub(crate) fn epochs(&self) -> Result<Vec<Epoch>, StoreError> {
        let read = self.0.begin_read()?;
        read.open_table(EPOCHS)?.iter()?.map(|row| decode(row?.1.value())).collect()
    }

    /// Writes epochs, new and changed ones, with contents that they name. What no epoch names any more is forgotten.
    pub(crate) fn put_epochs(
        &self,
        epochs: &[Epoch],
        contents: &[(String, Vec<u8>)],
        head: Option<&str>,
    ) -> Result<(), StoreError> {
        let write = self.0.begin_write()?;
        {
            let mut rows = write.open_table(EPOCHS)?;
            let mut stored = write.open_table(CONTENTS)?;
            for epoch in epochs {
                rows.insert(epoch.epoch, encode(epoch)?.as_slice())?;
            }
            for (digest, bytes) in contents {
                stored.insert(digest.as_str(), bytes.as_slice())?;
            }
            let full = rows.len()? > MAX_EPOCHS;
            while rows.len()? > MAX_EPOCHS {
                rows.pop_first()?;
            }
            if full {
                let mut named = HashSet::new();
                for row in rows.iter()? {
                    for manifest in decode::<Epoch>(row?.1.value())?.services.into_values() {
                        if let Some(text) = stored.get(manifest.as_str())? {
                            let manifest = Manifest::parse(text.value()).map_err(|_| StoreError::Damaged)?;
                            named.extend(manifest.files().map(|(_, digest)| digest.to_owned()));
                        }
                        named.insert(manifest);
                    }
                }
                stored.retain(|digest, _| named.contains(digest))?;
            }
            if let Some(head) = head {
                write.open_table(META)?.insert(POLICY_HEAD, head)?;
            }
        }
        Ok(write.commit()?)
    }

    /// The key of pseudonyms in decisions, hexadecimal; `fresh` if there was none.
    pub(crate) fn pseudonym_key(&self, fresh: &str) -> Result<String, StoreError> {
        let write = self.0.begin_write()?;
        let key = {
            let mut meta = write.open_table(META)?;
            let known = meta.get(PSEUDONYM_KEY)?.map(|key| key.value().to_owned());
            match known {
                Some(key) => key,
                None => {
                    meta.insert(PSEUDONYM_KEY, fresh)?;
                    fresh.to_owned()
                }
            }
        };
        write.commit()?;
        Ok(key)
    }

    /// The commit that was offered last.
    pub(crate) fn policy_head(&self) -> Result<Option<String>, StoreError> {
        let read = self.0.begin_read()?;
        Ok(read.open_table(META)?.get(POLICY_HEAD)?.map(|text| text.value().to_owned()))
    }

    /// The contents with these digests; those that are not there are left out.
    pub(crate) fn contents(&self, digests: &[String]) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let read = self.0.begin_read()?;
        let table = read.open_table(CONTENTS)?;
        let mut found = Vec::with_capacity(digests.len());
        for digest in digests {
            if let Some(bytes) = table.get(digest.as_str())? {
                found.push((digest.clone(), bytes.value().to_vec()));
            }
        }
        Ok(found)
    }

    /// Totals.
    pub(crate) fn counts(&self, now: u64) -> Result<StoreCounts, StoreError> {
        let read = self.0.begin_read()?;
        let counts = read.open_table(COUNTS)?;
        let tokens = read.open_table(TOKENS)?;
        let mut tokens_open = 0;
        for row in tokens.iter()? {
            if decode::<TokenRecord>(row?.1.value())?.expires > now {
                tokens_open += 1;
            }
        }
        Ok(StoreCounts {
            issued: count(&counts, NEXT_ISSUANCE)?,
            tokens_open,
            decisions: read.open_table(DECISIONS)?.len()?,
            decisions_expired: count(&counts, DECISIONS_EXPIRED)?,
            decisions_lost: count(&counts, DECISIONS_LOST)?,
        })
    }
}

fn fits(record: &[u8], host: &str, now: u64) -> Result<bool, StoreError> {
    let record: TokenRecord = decode(record)?;
    Ok(record.host == host && record.expires > now)
}

fn append_issuances(write: &WriteTransaction, issued: &[IssuedSvid]) -> Result<(), StoreError> {
    let mut counts = write.open_table(COUNTS)?;
    let mut rows = write.open_table(ISSUANCES)?;
    let mut next = count(&counts, NEXT_ISSUANCE)?;
    for line in issued {
        rows.insert(next, encode(line)?.as_slice())?;
        next += 1;
    }
    counts.insert(NEXT_ISSUANCE, next)?;
    while rows.len()? > MAX_ISSUANCES {
        rows.pop_first()?;
    }
    Ok(())
}

fn count(
    counts: &impl redb::ReadableTable<&'static str, u64>,
    name: &'static str,
) -> Result<u64, StoreError> {
    Ok(counts.get(name)?.map_or(0, |number| number.value()))
}

fn add(counts: &mut Table<'_, &'static str, u64>, name: &'static str, more: u64) -> Result<(), StoreError> {
    let sum = count(counts, name)?.saturating_add(more);
    counts.insert(name, sum)?;
    Ok(())
}

fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(StoreError::Record)
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(StoreError::Record)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn issued(serial: &str, not_after: u64) -> IssuedSvid {
        IssuedSvid {
            serial: serial.into(),
            spiffe_id: "spiffe://bank.example/service/web".into(),
            host: "host-1".into(),
            why: "uid=1".into(),
            entry_id: "e".into(),
            issued: 1,
            not_after,
        }
    }

    fn node() -> NodeRecord {
        NodeRecord { joined: 1, serial: "01".into(), not_after: 9 }
    }

    fn decision(receipt: &str, time_ms: u64, verdict: &str, reporter: &str) -> StoredDecision {
        StoredDecision {
            receipt: receipt.into(),
            time_ms,
            service: "accounts".into(),
            verdict: verdict.into(),
            address: "127.0.0.1:40100".into(),
            json: serde_json::json!({"n": receipt}),
            reporter: reporter.into(),
            host: "host-1".into(),
            stored_ms: time_ms,
        }
    }

    #[test]
    fn identity_35_and_security_12_of_two_uses_at_once_one_wins() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        for round in 0..8 {
            let hash = format!("hash{round}");
            store.add_token(&hash, &TokenRecord { host: "host-1".into(), expires: 100 }, 0).unwrap();
            let barrier = Barrier::new(4);
            let won = std::thread::scope(|scope| {
                let uses: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            store.redeem(&hash, "host-1", 10, &node(), &issued("01", 9)).unwrap()
                        })
                    })
                    .collect();
                uses.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            assert_eq!(won.iter().filter(|outcome| **outcome == Redeemed::Yes).count(), 1);
        }
        assert_eq!(store.counts(10).unwrap().issued, 8, "a use that lost leaves no trace in the log");
    }

    #[test]
    fn a_token_is_for_one_host_and_ends() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.add_token("h", &TokenRecord { host: "host-1".into(), expires: 100 }, 0).unwrap();
        assert!(store.token_is_open("h", "host-1", 99).unwrap());
        for (host, now) in [("host-2", 10), ("host-1", 100)] {
            assert!(!store.token_is_open("h", host, now).unwrap());
            let outcome = store.redeem("h", host, now, &node(), &issued("01", 9)).unwrap();
            assert_eq!(outcome, Redeemed::No);
        }
        assert_eq!(store.redeem("h", "host-1", 99, &node(), &issued("01", 9)).unwrap(), Redeemed::Yes);
        assert_eq!(store.nodes().unwrap(), [("host-1".to_owned(), node())]);
    }

    #[test]
    fn decisions_are_bounded_found_by_receipt_and_stored_once_a_reporter() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let all: Vec<_> = (0..5)
            .map(|n| decision(&format!("r{n}"), n, if n % 2 == 0 { "deny" } else { "allow" }, "a"))
            .collect();
        assert_eq!(store.record_decisions(&all, 3, 7).unwrap().stored, 5);
        assert_eq!(
            store.record_decisions(&all[4..], 3, 0).unwrap().stored,
            0,
            "a retry stores nothing twice"
        );
        let counts = store.counts(0).unwrap();
        assert_eq!((counts.decisions, counts.decisions_expired, counts.decisions_lost), (3, 2, 7));
        assert!(store.decision("r0").unwrap().is_none(), "the oldest went");
        assert_eq!(store.decision("r4").unwrap().unwrap(), all[4]);

        let receipts = |query: DecisionQuery| -> Vec<String> {
            store.decisions(&query).unwrap().into_iter().map(|decision| decision.receipt).collect()
        };
        assert_eq!(receipts(DecisionQuery::default()), ["r4", "r3", "r2"]);
        assert_eq!(receipts(DecisionQuery { limit: Some(1), ..Default::default() }), ["r4"]);
        assert_eq!(receipts(DecisionQuery { verdict: Some("allow".into()), ..Default::default() }), ["r3"]);
        assert_eq!(receipts(DecisionQuery { since: Some(3), ..Default::default() }), ["r4", "r3"]);
        assert!(receipts(DecisionQuery { address: Some("other".into()), ..Default::default() }).is_empty());

        // Another workload that claims a receipt later does not shadow the first record.
        store.record_decisions(&[decision("r4", 9, "allow", "A-liar")], 10, 0).unwrap();
        assert_eq!(store.decision("r4").unwrap().unwrap().reporter, "a");
    }

    #[test]
    fn the_log_survives_a_restart_and_knows_what_is_active() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.log_issuances(&[issued("01", 50), issued("02", 150)]).unwrap();
        drop(store);
        let store = Store::open(directory.path()).unwrap();
        let active: Vec<_> =
            store.active_issuances(100).unwrap().into_iter().map(|line| line.serial).collect();
        assert_eq!(active, ["02"]);
        assert_eq!(store.counts(100).unwrap().issued, 2);
    }
}
