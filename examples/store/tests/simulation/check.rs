//! Strict serializability, by the timestamps that the store gave: replaying them shows what everybody saw, and their
//! order is the order of real time.

use std::collections::BTreeMap;

use serde_json::json;
use store::{
    keys::Key,
    truetime::Timestamp,
    txn::{Outcome, TxnId},
};

use crate::{
    clients::{Record, Seen, Shown, all_keys},
    world::Counts,
};

pub(crate) struct Run {
    pub(crate) records: Vec<Record>,
    pub(crate) shown: Vec<Shown>,
    pub(crate) outcomes: BTreeMap<TxnId, Outcome>,
    /// What is there in the end.
    pub(crate) rows: BTreeMap<Key, Seen>,
    pub(crate) counts: Counts,
}

type Versions = BTreeMap<(Key, Timestamp), Option<String>>;

impl Run {
    pub(crate) fn check(&self) -> Result<(), String> {
        let versions = self.versions()?;
        for record in &self.records {
            let Some(Outcome::Committed(at)) = self.outcomes.get(&record.txn) else { continue };
            for seen in &record.reads {
                let there = shown(&versions, &seen.key, at.before());
                if !same(&there, seen) {
                    return Err(format!("{record:?} read {seen:?}; before {at} it was {there:?}"));
                }
            }
        }
        self.check_snapshots(&versions)?;
        self.check_real_time()?;
        for key in all_keys() {
            let there = shown(&versions, &key, Timestamp::MAX);
            let found = self.rows.get(&key).map(|seen| (seen.at, seen.value.clone()));
            if there.as_ref().filter(|(_, value)| value.is_some()) != found.as_ref() {
                return Err(format!("in the end {key:?} is {found:?} and should be {there:?}"));
            }
        }
        Ok(())
    }

    /// Everything that was ever written, by what clients wrote and what the store says became of it.
    fn versions(&self) -> Result<Versions, String> {
        let mut versions = Versions::new();
        for record in &self.records {
            let outcome = self.outcomes.get(&record.txn);
            if let Some(at) = record.committed
                && outcome.is_some_and(|outcome| *outcome != Outcome::Committed(at))
            {
                return Err(format!("{record:?} was acknowledged and ended as {outcome:?}"));
            }
            let at = match (record.committed, outcome) {
                (Some(at), _) | (None, Some(&Outcome::Committed(at))) => at,
                _ => continue,
            };
            for (key, value) in &record.writes {
                if versions.insert((key.clone(), at), value.clone()).is_some() {
                    return Err(format!("{key:?} was written twice at {at}"));
                }
            }
        }
        Ok(versions)
    }

    fn check_snapshots(&self, versions: &Versions) -> Result<(), String> {
        for snapshot in &self.shown {
            let total: i64 = snapshot.rows.values().map(Seen::amount).sum();
            if total != 0 {
                return Err(format!("{snapshot:?} shows money made or lost"));
            }
            for key in all_keys() {
                let there = shown(versions, &key, snapshot.at).filter(|(_, value)| value.is_some());
                let found = snapshot.rows.get(&key).map(|seen| (seen.at, seen.value.clone()));
                if there != found {
                    return Err(format!("{snapshot:?} shows {key:?} as {found:?}, it was {there:?}"));
                }
            }
        }
        Ok(())
    }

    fn check_real_time(&self) -> Result<(), String> {
        let committed: Vec<_> = self
            .records
            .iter()
            .filter_map(|record| record.committed.map(|at| (record.start, record.end, at)))
            .collect();
        for (_, end, at) in &committed {
            for (start, _, later) in &committed {
                if end < start && at >= later {
                    return Err(format!("over at {end} with {at}, begun at {start} with {later}"));
                }
            }
            let missed = self.shown.iter().find(|shown| shown.fresh && *end < shown.start && shown.at < *at);
            if let Some(shown) = missed {
                return Err(format!("{shown:?} does not show what was over with {at} at {end}"));
            }
        }
        for shown in &self.shown {
            if committed.iter().any(|(start, _, at)| shown.end < *start && *at <= shown.at) {
                return Err(format!("{shown:?} was changed afterwards"));
            }
        }
        Ok(())
    }

    /// The history as JSON lines, one attempt each, for a checker that knows nothing of this store.
    pub(crate) fn history(&self) -> String {
        let name = |key: &Key| format!("{}/{}", key.table(), String::from_utf8_lossy(key.row()));
        let mut lines = String::new();
        for record in &self.records {
            let reads = record.reads.iter().map(|seen| match &seen.value {
                Some(value) => json!(["r", name(&seen.key), value, seen.at.0]),
                None => json!(["r", name(&seen.key), null]),
            });
            let writes = record.writes.iter().map(|(key, value)| json!(["w", name(key), value]));
            let line = json!({
                "id": record.txn.random.to_string(),
                "process": record.client,
                "start": record.start,
                "end": record.end,
                "outcome": if record.committed.is_some() { "ok" } else { "unknown" },
                "kind": "rw",
                "commit_ts": record.committed.map(|at| at.0),
                "ops": reads.chain(writes).collect::<Vec<_>>(),
            });
            lines.push_str(&format!("{line}\n"));
        }
        for (number, shown) in self.shown.iter().enumerate() {
            let read = |key: Key| {
                let value = shown.rows.get(&key).and_then(|seen| seen.value.clone());
                json!(["r", name(&key), value])
            };
            let line = json!({
                "id": format!("snapshot-{number}"),
                "process": shown.client,
                "start": shown.start,
                "end": shown.end,
                "outcome": "ok",
                "kind": if shown.fresh { "ro" } else { "stale" },
                "read_ts": shown.at.0,
                "ops": all_keys().map(read).collect::<Vec<_>>(),
            });
            lines.push_str(&format!("{line}\n"));
        }
        lines
    }
}

fn shown(versions: &Versions, key: &Key, at: Timestamp) -> Option<(Timestamp, Option<String>)> {
    let ((_, when), value) =
        versions.range((key.clone(), Timestamp::ZERO)..=(key.clone(), at)).next_back()?;
    Some((*when, value.clone()))
}

/// A scan says of a row that is not there nothing but that.
fn same(there: &Option<(Timestamp, Option<String>)>, seen: &Seen) -> bool {
    match there {
        Some((at, value)) if seen.at != Timestamp::ZERO => *at == seen.at && *value == seen.value,
        Some((_, value)) => value.is_none() && seen.value.is_none(),
        None => seen.value.is_none(),
    }
}
