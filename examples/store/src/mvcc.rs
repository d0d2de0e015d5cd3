//! Every version of every row by the timestamp of the transaction that wrote it, in an engine that splits share. A
//! snapshot is a timestamp: what it shows never changes, so reading one takes no lock.
//!
//! A version's key in the engine is `r`, the split's number, the row's key escaped and ended, and its timestamp turned
//! over, so that a walk meets the newest version of a row first. Its value is a tag and what was written.

use std::{fmt, ops::ControlFlow, sync::Arc};

use bytes::Bytes;

use crate::{
    engine::{Batch, Engine, EngineError},
    keys::{Key, Range},
    truetime::Timestamp,
    txn::SplitId,
};

/// A scan ends after so many bytes of values, for its answer has to fit into memory and into a message.
pub const SCAN_BYTES_MAX: usize = 4 << 20;

/// What rows are kept under, and what comes after it.
const ROWS: u8 = b'r';
const ROWS_PAST: u8 = b's';
/// Before the row in a version's key.
const HEAD_BYTES: usize = 1 + size_of::<u64>();
/// Begins an escape. A zero byte of a row is `ZERO ESCAPED`; `ZERO END` sorts before it, so that a row comes before
/// those it is a prefix of, all its versions together.
const ZERO: u8 = 0x00;
const ESCAPED: u8 = 0xff;
const END: u8 = 0x01;
/// The byte after [`END`].
const PAST: u8 = 0x02;

const DELETED: u8 = 0;
const VALUE: u8 = 1;

/// One row written, or deleted where there is no value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutation {
    /// The row.
    pub key: Key,
    /// What it holds from now on.
    pub value: Option<Bytes>,
}

/// What a row held at a timestamp.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// When it was committed.
    pub at: Timestamp,
    /// What was written; nothing where it was deleted.
    pub value: Option<Bytes>,
}

/// Why a snapshot is not shown.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MvccError {
    /// Its versions were collected.
    #[error("the snapshot at {asked} is gone: versions are kept since {kept_since}")]
    Collected {
        /// The snapshot asked for.
        asked: Timestamp,
        /// The earliest that is whole.
        kept_since: Timestamp,
    },
    /// The engine fails, or holds what was never written here. The node must stop.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// What a scan found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Rows that exist, in order.
    pub rows: Vec<(Key, Version)>,
    /// Where to go on, when the limit or [`SCAN_BYTES_MAX`] ended it.
    pub more_from: Option<Key>,
    /// The newest version looked at, deletions included: nothing may be told before this has passed.
    pub newest: Timestamp,
}

/// The rows of one split. Clones see the same rows.
///
/// What changes rows goes into a batch, which the caller writes with what else has to become true with it.
#[derive(Clone)]
pub struct Mvcc {
    engine: Arc<dyn Engine>,
    split: SplitId,
    kept_since: Timestamp,
}

impl fmt::Debug for Mvcc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mvcc")
            .field("split", &self.split)
            .field("kept_since", &self.kept_since)
            .finish_non_exhaustive()
    }
}

impl Mvcc {
    /// What `engine` has of `split`, of which everything before `kept_since` may be gone.
    pub fn new(engine: Arc<dyn Engine>, split: SplitId, kept_since: Timestamp) -> Self {
        Self { engine, split, kept_since }
    }

    /// The engine's keys from the first up to and without the second are the rows of `split`, and nothing else is.
    pub fn span(split: SplitId) -> (Bytes, Bytes) {
        let past = match split.0.checked_add(1) {
            Some(next) => head(SplitId(next)),
            None => vec![ROWS_PAST],
        };
        (head(split).into(), past.into())
    }

    /// Adds `mutations` at `at` to `batch`; of two for one row the last counts. To do so again, after later commits
    /// even, changes nothing.
    pub fn apply(&self, batch: &mut Batch, mutations: &[Mutation], at: Timestamp) {
        for Mutation { key, value } in mutations {
            batch.put(self.version_key(key, at), encode_value(value.as_ref()));
        }
    }

    /// Adds a version as [`Mvcc::versions`] gave it to `batch`.
    pub fn put_version(&self, batch: &mut Batch, key: &Key, version: &Version) {
        batch.put(self.version_key(key, version.at), encode_value(version.value.as_ref()));
    }

    /// The version of `key` that `at` shows.
    ///
    /// # Errors
    ///
    /// When `at` is before what is kept, or the engine fails.
    pub fn get(&self, key: &Key, at: Timestamp) -> Result<Option<Version>, MvccError> {
        self.check_kept(at)?;
        let mut to = self.row(key.as_bytes());
        if let Some(end) = to.last_mut() {
            *end = PAST;
        }
        let Some((found, value)) = self.engine.first(&self.version_key(key, at), &to)? else {
            return Ok(None);
        };
        let (_, at) = split_key(&found)?;
        Ok(Some(Version { at, value: decode_value(&value)?.map(|written| value.slice_ref(written)) }))
    }

    /// The newest version of `key`, of a deletion too.
    ///
    /// # Errors
    ///
    /// When the engine fails.
    pub fn newest(&self, key: &Key) -> Result<Option<Version>, MvccError> {
        self.get(key, Timestamp::MAX)
    }

    /// Up to `limit` rows in `range` as `at` shows them, and no more than [`SCAN_BYTES_MAX`] of them, or one.
    ///
    /// # Errors
    ///
    /// When `at` is before what is kept, or the engine fails.
    pub fn scan(&self, range: &Range, at: Timestamp, limit: usize) -> Result<Scanned, MvccError> {
        self.check_kept(at)?;
        let mut found = Scanned::default();
        let mut room = SCAN_BYTES_MAX;
        self.walk_shown(range, at, |row, at, value| {
            let Some(value) = value else {
                found.newest = found.newest.max(at);
                return Ok(ControlFlow::Continue(()));
            };
            let key = decode_row(row)?;
            let over = value.len() > room && !found.rows.is_empty();
            if over || found.rows.len() >= limit {
                found.more_from = Some(key);
                return Ok(ControlFlow::Break(()));
            }
            room = room.saturating_sub(value.len());
            found.newest = found.newest.max(at);
            found.rows.push((key, Version { at, value: Some(Bytes::copy_from_slice(value)) }));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// Forgets what no snapshot at or after `horizon` shows, by deletions that it adds to `batch`.
    ///
    /// # Errors
    ///
    /// When the engine fails; then nothing is forgotten.
    pub fn collect(&mut self, batch: &mut Batch, horizon: Timestamp) -> Result<(), MvccError> {
        if horizon <= self.kept_since {
            return Ok(());
        }
        let mut gone = Vec::new();
        let mut row_shown = Vec::new();
        self.walk(&Range::all(), |whole, row, at, value| {
            if at > horizon {
                return Ok(ControlFlow::Continue(()));
            }
            let shown = row_shown != row;
            if shown {
                row_shown.clear();
                row_shown.extend_from_slice(row);
            }
            // A deletion with nothing under it shows what nothing would, whatever was written since. What was written
            // since must not matter: a replay of the log finds it there already.
            if !shown || value.is_none() {
                gone.push(Bytes::copy_from_slice(whole));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        for key in gone {
            batch.delete(key);
        }
        self.kept_since = horizon;
        Ok(())
    }

    /// Rows of another split were put into this one, of which nothing before `horizon` is whole.
    pub fn keep_since(&mut self, horizon: Timestamp) {
        self.kept_since = self.kept_since.max(horizon);
    }

    /// The earliest snapshot that is whole.
    pub fn kept_since(&self) -> Timestamp {
        self.kept_since
    }

    /// Gives `each` every version in `range` with its row, in the order of rows, a row's newest first.
    ///
    /// # Errors
    ///
    /// When the engine fails.
    pub fn versions(&self, range: &Range, each: &mut dyn FnMut(Key, Version)) -> Result<(), MvccError> {
        self.walk(range, |_, row, at, value| {
            each(decode_row(row)?, Version { at, value: value.map(Bytes::copy_from_slice) });
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(())
    }

    /// Adds deletions of every version in `range` to `batch`.
    ///
    /// # Errors
    ///
    /// When the engine fails.
    pub fn clear(&self, batch: &mut Batch, range: &Range) -> Result<(), MvccError> {
        self.walk(range, |whole, _, _, _| {
            batch.delete(Bytes::copy_from_slice(whole));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(())
    }

    /// How many rows exist in `range` now, and the bytes that their keys and values take; older versions do not count. It
    /// reads every version there is.
    ///
    /// # Errors
    ///
    /// When the engine fails.
    pub fn size(&self, range: &Range) -> Result<(u64, u64), MvccError> {
        let (mut rows, mut bytes) = (0, 0);
        self.walk_rows(range, |_, size| {
            rows += 1;
            bytes += size;
            Ok(())
        })?;
        Ok((rows, bytes))
    }

    /// The row of `range` that cuts it best into halves of as many bytes, by [`Mvcc::size`]: rows before it, and it with
    /// those after it. None where there are no two rows.
    ///
    /// # Errors
    ///
    /// When the engine fails.
    pub fn middle(&self, range: &Range) -> Result<Option<Key>, MvccError> {
        let (_, total) = self.size(range)?;
        let mut before = 0;
        let mut smaller_half = 0;
        let mut middle = None;
        self.walk_rows(range, |row, size| {
            let smaller = before.min(total.saturating_sub(before));
            if smaller > smaller_half {
                smaller_half = smaller;
                middle = Some(decode_row(row)?);
            }
            before += size;
            Ok(())
        })?;
        Ok(middle)
    }

    fn check_kept(&self, at: Timestamp) -> Result<(), MvccError> {
        if at < self.kept_since {
            return Err(MvccError::Collected { asked: at, kept_since: self.kept_since });
        }
        Ok(())
    }

    /// Every row of `range` that exists now, with the bytes of its key and value.
    fn walk_rows(
        &self,
        range: &Range,
        mut visit: impl FnMut(&[u8], u64) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        self.walk_shown(range, Timestamp::MAX, |row, _, value| {
            if let Some(value) = value {
                visit(row, (row.len() + value.len()) as u64)?;
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    /// Every row of `range` that has a version at or before `at`, with the newest of those.
    fn walk_shown(
        &self,
        range: &Range,
        at: Timestamp,
        mut visit: impl FnMut(&[u8], Timestamp, Option<&[u8]>) -> Result<ControlFlow<()>, EngineError>,
    ) -> Result<(), EngineError> {
        let mut last = Vec::new();
        self.walk(range, |_, row, version_at, value| {
            if version_at > at || last == row {
                return Ok(ControlFlow::Continue(()));
            }
            last.clear();
            last.extend_from_slice(row);
            visit(row, version_at, value)
        })
    }

    /// Every version of `range`: its whole key, the row as it is in there, its timestamp and its value.
    fn walk(
        &self,
        range: &Range,
        mut visit: impl FnMut(&[u8], &[u8], Timestamp, Option<&[u8]>) -> Result<ControlFlow<()>, EngineError>,
    ) -> Result<(), EngineError> {
        let from = self.row(range.start());
        let to = range.end().map_or_else(|| Self::span(self.split).1, |end| self.row(end).into());
        let mut failed = None;
        self.engine.walk(&from, &to, &mut |key, value| {
            let visited = split_key(key)
                .and_then(|(row, at)| decode_value(value).and_then(|value| visit(key, row, at, value)));
            visited.unwrap_or_else(|error| {
                failed = Some(error);
                ControlFlow::Break(())
            })
        })?;
        failed.map_or(Ok(()), Err)
    }

    fn version_key(&self, key: &Key, at: Timestamp) -> Vec<u8> {
        let mut bytes = self.row(key.as_bytes());
        bytes.extend_from_slice(&(!at.0).to_be_bytes());
        bytes
    }

    /// What the keys of all versions of `row` begin with, and where those of rows from `row` on begin.
    fn row(&self, row: &[u8]) -> Vec<u8> {
        let mut bytes = head(self.split);
        escape(row, &mut bytes);
        bytes
    }
}

fn head(split: SplitId) -> Vec<u8> {
    let mut bytes = vec![ROWS];
    bytes.extend_from_slice(&split.0.to_be_bytes());
    bytes
}

/// The row, escaped, and the timestamp in a version's key.
fn split_key(key: &[u8]) -> Result<(&[u8], Timestamp), EngineError> {
    let (rest, at) = key.split_last_chunk::<8>().ok_or_else(broken)?;
    let row = rest.get(HEAD_BYTES..).ok_or_else(broken)?;
    Ok((row, Timestamp(!u64::from_be_bytes(*at))))
}

/// Adds `row` to `to` so that its end is seen and order stays.
fn escape(row: &[u8], to: &mut Vec<u8>) {
    to.reserve(row.len() + 2 + size_of::<u64>());
    for byte in row {
        to.push(*byte);
        if *byte == ZERO {
            to.push(ESCAPED);
        }
    }
    to.extend_from_slice(&[ZERO, END]);
}

/// What [`escape`] was given.
fn unescape(escaped: &[u8]) -> Option<Vec<u8>> {
    let mut rest = escaped.strip_suffix(&[ZERO, END])?;
    let mut row = Vec::with_capacity(rest.len());
    while let Some((byte, after)) = rest.split_first() {
        row.push(*byte);
        rest = if *byte == ZERO { after.strip_prefix(&[ESCAPED])? } else { after };
    }
    Some(row)
}

fn decode_row(escaped: &[u8]) -> Result<Key, EngineError> {
    let row = unescape(escaped).ok_or_else(broken)?;
    Key::decode(row.into()).map_err(|_| broken())
}

fn encode_value(value: Option<&Bytes>) -> Vec<u8> {
    let Some(value) = value else { return vec![DELETED] };
    let mut bytes = Vec::with_capacity(1 + value.len());
    bytes.push(VALUE);
    bytes.extend_from_slice(value);
    bytes
}

fn decode_value(bytes: &[u8]) -> Result<Option<&[u8]>, EngineError> {
    match bytes.split_first() {
        Some((&VALUE, value)) => Ok(Some(value)),
        Some((&DELETED, [])) => Ok(None),
        _ => Err(broken()),
    }
}

fn broken() -> EngineError {
    EngineError("it holds a row that was never written so".into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::Memory;

    type Commits = Vec<(u8, Option<u8>)>;

    const SPLIT: SplitId = SplitId(7);

    fn key(row: u8) -> Key {
        Key::new("t", &[row]).unwrap()
    }

    /// What the store does with commits, done the slow way.
    fn model(commits: &[(u8, Option<u8>)], at: u64) -> BTreeMap<Key, (u64, u8)> {
        let mut rows = BTreeMap::new();
        for (index, (row, value)) in commits.iter().enumerate().take(at as usize) {
            match value {
                Some(value) => rows.insert(key(*row), (index as u64 + 1, *value)),
                None => rows.remove(&key(*row)),
            };
        }
        rows
    }

    fn empty() -> Mvcc {
        Mvcc::new(Arc::new(Memory::default()), SPLIT, Timestamp::ZERO)
    }

    fn commit(mvcc: &Mvcc, row: u8, value: Option<u8>, at: u64) {
        let value = value.map(|value| Bytes::copy_from_slice(&[value]));
        put(mvcc, Mutation { key: key(row), value }, at);
    }

    fn put(mvcc: &Mvcc, mutation: Mutation, at: u64) {
        let mut batch = Batch::default();
        mvcc.apply(&mut batch, &[mutation], Timestamp(at));
        mvcc.engine.write(batch).unwrap();
    }

    fn fill(mvcc: &Mvcc, commits: &[(u8, Option<u8>)]) {
        for (index, (row, value)) in commits.iter().enumerate() {
            commit(mvcc, *row, *value, index as u64 + 1);
        }
    }

    fn filled(commits: &[(u8, Option<u8>)]) -> Mvcc {
        let mvcc = empty();
        fill(&mvcc, commits);
        mvcc
    }

    fn collect(mvcc: &mut Mvcc, horizon: u64) {
        let mut batch = Batch::default();
        mvcc.collect(&mut batch, Timestamp(horizon)).unwrap();
        mvcc.engine.write(batch).unwrap();
    }

    fn versions(mvcc: &Mvcc) -> Vec<(Key, Version)> {
        let mut versions = Vec::new();
        mvcc.versions(&Range::all(), &mut |key, version| versions.push((key, version))).unwrap();
        versions
    }

    fn rows_at(mvcc: &Mvcc, at: u64) -> Result<BTreeMap<Key, (u64, u8)>, MvccError> {
        let found = mvcc.scan(&Range::all(), Timestamp(at), usize::MAX)?;
        let row = |(key, version): (Key, Version)| (key, (version.at.0, version.value.unwrap()[0]));
        Ok(found.rows.into_iter().map(row).collect())
    }

    fn commits() -> impl Strategy<Value = Commits> {
        prop::collection::vec((0u8..5, prop::option::of(any::<u8>())), 1..40)
    }

    /// Mostly of the bytes that escapes are made of.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![Just(ZERO), Just(END), Just(PAST), Just(ESCAPED), any::<u8>()];
        prop::collection::vec(byte, 0..6)
    }

    proptest! {
        #[test]
        fn snapshots_never_change(commits in commits(), horizon in 0u64..45) {
            let mut mvcc = filled(&commits);
            for at in 0..=commits.len() as u64 + 1 {
                prop_assert_eq!(rows_at(&mvcc, at).unwrap(), model(&commits, at));
            }
            collect(&mut mvcc, horizon);
            for at in 0..=commits.len() as u64 + 1 {
                if at < horizon {
                    prop_assert!(rows_at(&mvcc, at).is_err());
                    prop_assert!(mvcc.get(&key(0), Timestamp(at)).is_err());
                    continue;
                }
                let rows = model(&commits, at);
                for row in 0..5 {
                    let got = mvcc.get(&key(row), Timestamp(at)).unwrap();
                    let got = got.and_then(|version| Some((version.at.0, version.value?[0])));
                    prop_assert_eq!(got, rows.get(&key(row)).copied());
                }
                prop_assert_eq!(rows_at(&mvcc, at).unwrap(), rows);
            }
        }

        #[test]
        fn a_collection_keeps_what_is_shown_and_no_more(commits in commits(), horizon in 1u64..45) {
            let mut mvcc = filled(&commits);
            collect(&mut mvcc, horizon);
            let shown = model(&commits, horizon);
            let kept = versions(&mvcc);
            let (old, new): (Vec<_>, Vec<_>) = kept.into_iter().partition(|(_, version)| version.at.0 <= horizon);
            prop_assert_eq!(new.len(), commits.len().saturating_sub(horizon as usize));
            let old = old.into_iter().map(|(key, version)| (key, (version.at.0, version.value.unwrap()[0])));
            prop_assert_eq!(old.collect::<Vec<_>>(), shown.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn a_replay_over_what_came_later_changes_nothing(
            commits in commits(), from in any::<prop::sample::Index>(), horizon in prop::option::of(0u64..40),
        ) {
            let mut mvcc = filled(&commits);
            let from = from.index(commits.len());
            // A collection forgets nothing that a commit logged after it would write.
            let horizon = horizon.map(|horizon| horizon.min(from as u64));
            horizon.into_iter().for_each(|horizon| collect(&mut mvcc, horizon));
            let before = versions(&mvcc);
            for (index, (row, value)) in commits.iter().enumerate().skip(from) {
                commit(&mvcc, *row, *value, index as u64 + 1);
                prop_assert_eq!(&versions(&mvcc), &before);
            }
            // From before the collection, which is then done again by a replica that does not know of it.
            let mut again = Mvcc::new(Arc::clone(&mvcc.engine), SPLIT, Timestamp::ZERO);
            fill(&again, &commits);
            horizon.into_iter().for_each(|horizon| collect(&mut again, horizon));
            prop_assert_eq!(versions(&again), before);
        }

        #[test]
        fn a_scan_by_pages_is_the_scan(commits in commits(), page in 1usize..4) {
            let mvcc = filled(&commits);
            let mut range = Range::all();
            let mut rows = Vec::new();
            loop {
                let found = mvcc.scan(&range, Timestamp::MAX, page).unwrap();
                prop_assert!(found.rows.len() <= page);
                rows.extend(found.rows);
                let Some(from) = found.more_from else { break };
                range = Range::between(from.as_bytes().clone(), None).unwrap();
            }
            prop_assert_eq!(rows, mvcc.scan(&Range::all(), Timestamp::MAX, usize::MAX).unwrap().rows);
        }

        #[test]
        fn what_is_restored_is_what_was_there(commits in commits(), from in 0u8..6, to in 0u8..6) {
            let mvcc = filled(&commits);
            let restored = empty();
            let mut batch = Batch::default();
            for (key, version) in versions(&mvcc) {
                restored.put_version(&mut batch, &key, &version);
            }
            restored.engine.write(batch).unwrap();
            prop_assert_eq!(versions(&restored), versions(&mvcc));

            let cleared = Range::rows("t", &[from.min(to)], &[from.max(to)]).unwrap();
            let mut batch = Batch::default();
            restored.clear(&mut batch, &cleared).unwrap();
            restored.engine.write(batch).unwrap();
            let mut left = versions(&mvcc);
            left.retain(|(key, _)| !cleared.contains(key));
            prop_assert_eq!(versions(&restored), left);
        }

        #[test]
        fn the_middle_cuts_as_evenly_as_rows_allow(commits in commits()) {
            let mvcc = filled(&commits);
            let keys: Vec<_> = model(&commits, u64::MAX).into_keys().collect();
            let middle = mvcc.middle(&Range::all()).unwrap();
            // All rows are of one size here.
            let halves = keys.len() / 2..=keys.len().div_ceil(2);
            let at = middle.map(|middle| keys.iter().position(|key| *key == middle).unwrap());
            prop_assert_eq!(at.is_some(), keys.len() >= 2);
            prop_assert!(at.is_none_or(|at| halves.contains(&at)));
            prop_assert_eq!(mvcc.size(&Range::all()).unwrap().0, keys.len() as u64);
        }

        #[test]
        fn versions_sort_by_split_then_row_then_newest_first(
            a in (0u64..3, bytes(), 0u64..3), b in (0u64..3, bytes(), 0u64..3),
        ) {
            let engine: Arc<dyn Engine> = Arc::new(Memory::default());
            let version_key = |(split, row, at): &(u64, Vec<u8>, u64)| {
                let mut key = Mvcc::new(Arc::clone(&engine), SplitId(*split), Timestamp::ZERO).row(row);
                key.extend_from_slice(&(!at).to_be_bytes());
                key
            };
            let order = (a.0, &a.1, !a.2).cmp(&(b.0, &b.1, !b.2));
            prop_assert_eq!(version_key(&a).cmp(&version_key(&b)), order);
            let (from, to) = Mvcc::span(SplitId(a.0));
            prop_assert_eq!((from..to).contains(&Bytes::from(version_key(&b))), a.0 == b.0);
            let whole = version_key(&a);
            let (row, at) = split_key(&whole).unwrap();
            prop_assert_eq!((unescape(row), at.0), (Some(a.1), a.2));
        }

        #[test]
        fn rows_of_any_bytes_are_got_and_scanned(
            rows in prop::collection::btree_set(bytes().prop_filter("empty", |row| !row.is_empty()), 1..8),
            from in bytes(), to in bytes(),
        ) {
            let mvcc = empty();
            for (index, row) in rows.iter().enumerate() {
                for at in [1, 2] {
                    let value = Some(Bytes::copy_from_slice(&[index as u8]));
                    put(&mvcc, Mutation { key: Key::new("t", row).unwrap(), value }, at);
                }
            }
            for (index, row) in rows.iter().enumerate() {
                let got = mvcc.newest(&Key::new("t", row).unwrap()).unwrap().unwrap();
                prop_assert_eq!((got.at.0, got.value.unwrap()[0]), (2, index as u8));
            }
            if let Ok(range) = Range::rows("t", &from, &to) {
                let found = mvcc.scan(&range, Timestamp(1), usize::MAX).unwrap().rows;
                let found: Vec<_> = found.into_iter().map(|(key, _)| key).collect();
                let all = rows.iter().map(|row| Key::new("t", row).unwrap());
                prop_assert_eq!(found, all.filter(|key| range.contains(key)).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn splits_do_not_see_each_other() {
        let engine: Arc<dyn Engine> = Arc::new(Memory::default());
        let splits = [0, 1, 0x0100, u64::MAX].map(SplitId);
        let views = splits.map(|split| Mvcc::new(Arc::clone(&engine), split, Timestamp::ZERO));
        for (index, view) in views.iter().enumerate() {
            commit(view, 1, Some(index as u8), 1);
        }
        for (index, view) in views.iter().enumerate() {
            assert_eq!(rows_at(view, 1).unwrap(), BTreeMap::from([(key(1), (1, index as u8))]));
            let (from, to) = Mvcc::span(view.split);
            assert!(engine.first(&from, &to).unwrap().is_some());
        }
    }

    #[test]
    fn of_two_mutations_for_one_row_the_last_counts() {
        let mvcc = empty();
        let mutation = |value| Mutation { key: key(1), value };
        let mut batch = Batch::default();
        mvcc.apply(&mut batch, &[mutation(Some(Bytes::from("a"))), mutation(None)], Timestamp(1));
        mvcc.engine.write(batch).unwrap();
        assert_eq!(mvcc.newest(&key(1)).unwrap(), Some(Version { at: Timestamp(1), value: None }));
    }

    #[test]
    fn a_collection_never_goes_back() {
        let mut mvcc = filled(&[(0, Some(1)), (0, Some(2)), (0, Some(3))]);
        collect(&mut mvcc, 2);
        collect(&mut mvcc, 1);
        assert_eq!((mvcc.kept_since(), versions(&mvcc).len()), (Timestamp(2), 2));
        assert_eq!(
            mvcc.get(&key(0), Timestamp(1)),
            Err(MvccError::Collected { asked: Timestamp(1), kept_since: Timestamp(2) })
        );
    }

    #[test]
    fn a_deletion_counts_as_the_newest_thing_seen() {
        let mvcc = filled(&[(0, Some(1)), (1, Some(2)), (1, None)]);
        let found = mvcc.scan(&Range::all(), Timestamp::MAX, 10).unwrap();
        assert_eq!((found.rows.len(), found.newest), (1, Timestamp(3)));
        assert!(
            mvcc.scan(&Range::rows("t", b"b", b"b").unwrap(), Timestamp::MAX, 10).unwrap().rows.is_empty()
        );
    }

    #[test]
    fn a_scan_ends_by_bytes_and_has_one_row_at_least() {
        let mvcc = empty();
        let sizes = [SCAN_BYTES_MAX / 2, SCAN_BYTES_MAX / 2, 1, SCAN_BYTES_MAX + 1, 1];
        for (row, size) in sizes.into_iter().enumerate() {
            put(&mvcc, Mutation { key: key(row as u8), value: Some(vec![0; size].into()) }, row as u64 + 1);
        }
        let page = |from: u8| {
            let range = Range::rows("t", &[from], b"").unwrap();
            let found = mvcc.scan(&range, Timestamp::MAX, 10).unwrap();
            (found.rows.len(), found.more_from, found.newest.0)
        };
        assert_eq!(page(0), (2, Some(key(2)), 2));
        assert_eq!(page(2), (1, Some(key(3)), 3));
        assert_eq!(page(3), (1, Some(key(4)), 4));
        assert_eq!(page(4), (1, None, 5));
    }

    #[test]
    fn the_middle_is_by_bytes_and_not_by_rows() {
        let mvcc = empty();
        assert_eq!(mvcc.middle(&Range::all()), Ok(None));
        for (row, size) in [1000, 1, 1, 1].into_iter().enumerate() {
            put(&mvcc, Mutation { key: key(row as u8), value: Some(vec![0; size].into()) }, 1);
        }
        assert_eq!(mvcc.middle(&Range::all()), Ok(Some(key(1))));
        put(&mvcc, Mutation { key: key(9), value: Some(vec![0; 5000].into()) }, 2);
        assert_eq!(mvcc.middle(&Range::all()), Ok(Some(key(9))));
    }

    #[test]
    fn what_was_never_written_so_is_refused() {
        let mvcc = filled(&[(0, Some(1))]);
        let (from, _) = Mvcc::span(SPLIT);
        let mut batch = Batch::default();
        batch.put([&from[..], b"x"].concat(), "");
        mvcc.engine.write(batch).unwrap();
        assert!(matches!(mvcc.scan(&Range::all(), Timestamp::MAX, 10), Err(MvccError::Engine(_))));
    }
}
