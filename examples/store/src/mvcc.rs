//! Every version of every row by the timestamp of the transaction that wrote it, in an engine that splits share. A
//! snapshot is a timestamp: what it shows never changes, so reading one takes no lock.
//!
//! A version's key in the engine is `r`, the number of its [`Home`], the row's key escaped and ended, and its timestamp
//! turned over, so that a walk meets the newest version of a row first. Its value is a tag and what was written.

use std::{fmt, ops::ControlFlow, sync::Arc};

use bytes::Bytes;

use crate::{
    engine::{Batch, Engine, EngineError},
    keys::{Key, Range},
    truetime::Timestamp,
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

/// Where in a node's engine rows are: those of a replica and of all that were cut off from it, so that a cut moves no row.
/// Whose a row is, their ranges say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Home(pub u64);

/// A place between two versions, in the order of rows, a row's newest version first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Before all versions of this row,
    pub row: Key,
    /// or behind the one of this timestamp.
    pub behind: Option<Timestamp>,
}

/// The versions between two places; without one, from where the split begins, or to where it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    /// From here,
    pub from: Option<Place>,
    /// to here.
    pub to: Option<Place>,
}

/// What [`Mvcc::look`] saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Where it stopped; nothing where the range ends.
    pub to: Option<Place>,
    /// Whether some version may be forgotten.
    pub collectable: bool,
}

/// Reads the key of a row that is looked at: of most of them nobody wants to know.
pub type LookedAt<'a> = &'a dyn Fn() -> Result<Key, EngineError>;

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

/// The rows in one home. Clones see the same rows.
///
/// What changes rows goes into a batch, which the caller writes with what else has to become true with it.
#[derive(Clone)]
pub struct Mvcc {
    engine: Arc<dyn Engine>,
    home: Home,
    kept_since: Timestamp,
}

impl fmt::Debug for Mvcc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mvcc")
            .field("home", &self.home)
            .field("kept_since", &self.kept_since)
            .finish_non_exhaustive()
    }
}

impl Mvcc {
    /// What `engine` has in `home`, of which everything before `kept_since` may be gone.
    pub fn new(engine: Arc<dyn Engine>, home: Home, kept_since: Timestamp) -> Self {
        Self { engine, home, kept_since }
    }

    /// Where the rows are.
    pub fn home(&self) -> Home {
        self.home
    }

    /// The engine's keys from the first up to and without the second are the rows in `home`, and nothing else is.
    fn span(home: Home) -> (Vec<u8>, Vec<u8>) {
        let past = home.0.checked_add(1).map_or_else(|| vec![ROWS_PAST], |next| head(Home(next)));
        (head(home), past)
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

    /// Forgets what no snapshot at or after `horizon` shows, of the versions of `range` in `stretch`, by deletions that it
    /// adds to `batch`.
    ///
    /// # Errors
    ///
    /// When the engine fails; then nothing is forgotten.
    pub fn collect(
        &mut self,
        batch: &mut Batch,
        range: &Range,
        horizon: Timestamp,
        stretch: &Stretch,
    ) -> Result<(), MvccError> {
        let mut gone = Vec::new();
        // The row that `horizon` shows a version of, newer than those that come now.
        let mut shown = self.row_at(stretch.from.as_ref().filter(|place| place.is_behind(horizon)));
        // A deletion that it shows. With nothing under it, it shows what nothing would, whatever was written since; what
        // was written since must not matter, since a replay of the log finds it there already. It goes when its row ends,
        // together with what is under it: if it went first, that would be shown again.
        let mut deletion = None;
        self.walk_stretch(range, stretch, |whole, row, at, value| {
            if at > horizon {
                return Ok(ControlFlow::Continue(()));
            }
            if shown == row {
                gone.push(Bytes::copy_from_slice(whole));
                return Ok(ControlFlow::Continue(()));
            }
            shown.clear();
            shown.extend_from_slice(row);
            gone.extend(deletion.take());
            deletion = value.is_none().then(|| Bytes::copy_from_slice(whole));
            Ok(ControlFlow::Continue(()))
        })?;
        let goes_on = stretch.to.as_ref().is_some_and(|to| to.behind.is_some());
        if !goes_on || self.row_at(stretch.to.as_ref()) != shown {
            gone.extend(deletion);
        }
        for key in gone {
            batch.delete(key);
        }
        // One that is earlier than what is kept forgets less and never shows more. A replay of the log meets such, and must
        // do them again: it has written again what they forgot.
        self.kept_since = self.kept_since.max(horizon);
        Ok(())
    }

    /// Looks at about `limit` versions of `range` from a place on, and gives `each` row that exists now with the bytes that
    /// its key and value take. Where it can, it stops between two rows.
    ///
    /// # Errors
    ///
    /// When the engine fails.
    pub fn look(
        &self,
        range: &Range,
        from: Option<&Place>,
        horizon: Timestamp,
        limit: usize,
        each: &mut dyn FnMut(LookedAt<'_>, u64),
    ) -> Result<Seen, MvccError> {
        let mut seen = Seen::default();
        let mut looked = 0;
        let mut last = self.row_at(from.filter(|place| place.behind.is_some()));
        let mut last_at = Timestamp::MAX;
        let mut shown = from.is_some_and(|place| place.is_behind(horizon));
        let stretch = Stretch { from: from.cloned(), to: None };
        self.walk_stretch(range, &stretch, |_, row, at, value| {
            let begins = last != row;
            if looked >= limit && (begins || looked >= 2 * limit) {
                let behind = (!begins).then_some(last_at);
                seen.to = Some(Place { row: decode_row(row)?, behind });
                return Ok(ControlFlow::Break(()));
            }
            looked += 1;
            if begins {
                last.clear();
                last.extend_from_slice(row);
                shown = false;
                if let Some(value) = value {
                    each(&|| decode_row(row), (row.len() + value.len()) as u64);
                }
            }
            last_at = at;
            if at <= horizon {
                seen.collectable |= shown || value.is_none();
                shown = true;
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(seen)
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

    fn check_kept(&self, at: Timestamp) -> Result<(), MvccError> {
        if at < self.kept_since {
            return Err(MvccError::Collected { asked: at, kept_since: self.kept_since });
        }
        Ok(())
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
        visit: impl FnMut(&[u8], &[u8], Timestamp, Option<&[u8]>) -> Result<ControlFlow<()>, EngineError>,
    ) -> Result<(), EngineError> {
        self.walk_stretch(range, &Stretch::default(), visit)
    }

    /// What [`Mvcc::walk`] is, of the versions in `stretch`.
    fn walk_stretch(
        &self,
        range: &Range,
        stretch: &Stretch,
        mut visit: impl FnMut(&[u8], &[u8], Timestamp, Option<&[u8]>) -> Result<ControlFlow<()>, EngineError>,
    ) -> Result<(), EngineError> {
        let place = |place: &Place| match place.behind {
            None => self.row(place.row.as_bytes()),
            Some(at) => [&self.version_key(&place.row, at)[..], &[0]].concat(),
        };
        let from = self.row(range.start()).max(stretch.from.as_ref().map(place).unwrap_or_default());
        let end = range.end().map_or_else(|| Self::span(self.home).1, |end| self.row(end));
        let to = stretch.to.as_ref().map(place).map_or(end.clone(), |to| to.min(end));
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
        let mut bytes = head(self.home);
        escape(row, &mut bytes);
        bytes
    }

    /// The row of a place, as a walk gives it; no row is empty there.
    fn row_at(&self, place: Option<&Place>) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some(place) = place {
            escape(place.row.as_bytes(), &mut bytes);
        }
        bytes
    }
}

impl Place {
    /// Whether the version that `horizon` shows of its row is before it.
    fn is_behind(&self, horizon: Timestamp) -> bool {
        self.behind.is_some_and(|at| at <= horizon)
    }
}

fn head(home: Home) -> Vec<u8> {
    let mut bytes = vec![ROWS];
    bytes.extend_from_slice(&home.0.to_be_bytes());
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

    const HOME: Home = Home(7);

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
        Mvcc::new(Arc::new(Memory::default()), HOME, Timestamp::ZERO)
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
        collect_stretch(mvcc, horizon, &Stretch::default());
    }

    fn collect_stretch(mvcc: &mut Mvcc, horizon: u64, stretch: &Stretch) {
        let mut batch = Batch::default();
        mvcc.collect(&mut batch, &Range::all(), Timestamp(horizon), stretch).unwrap();
        mvcc.engine.write(batch).unwrap();
    }

    /// A pass over everything in steps of `limit` versions, each collected before the next is looked at; gives what is
    /// shown at `horizon` after each.
    fn collect_in_steps(mvcc: &mut Mvcc, horizon: u64, limit: usize) -> Vec<BTreeMap<Key, (u64, u8)>> {
        let mut shown = Vec::new();
        let mut from = None;
        loop {
            let seen =
                mvcc.look(&Range::all(), from.as_ref(), Timestamp(horizon), limit, &mut |_, _| {}).unwrap();
            let stretch = Stretch { from, to: seen.to.clone() };
            let before = versions(mvcc);
            collect_stretch(mvcc, horizon, &stretch);
            assert!(seen.collectable || versions(mvcc) == before);
            shown.push(rows_at(mvcc, horizon).unwrap());
            from = seen.to;
            if from.is_none() {
                return shown;
            }
        }
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
        fn a_collection_in_steps_is_one_and_shows_nothing_else_meanwhile(
            commits in commits(), horizon in 1u64..45, limit in 1usize..6,
        ) {
            let mut mvcc = filled(&commits);
            for shown in collect_in_steps(&mut mvcc, horizon, limit) {
                prop_assert_eq!(shown, model(&commits, horizon));
            }
            // A deletion that was looked at without all that is under it stays until the next pass.
            collect_in_steps(&mut mvcc, horizon, 100);
            let mut whole = filled(&commits);
            collect(&mut whole, horizon);
            prop_assert_eq!(versions(&mvcc), versions(&whole));
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
            let mut again = Mvcc::new(Arc::clone(&mvcc.engine), HOME, Timestamp::ZERO);
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
        fn versions_sort_by_home_then_row_then_newest_first(
            a in (0u64..3, bytes(), 0u64..3), b in (0u64..3, bytes(), 0u64..3),
        ) {
            let engine: Arc<dyn Engine> = Arc::new(Memory::default());
            let version_key = |(home, row, at): &(u64, Vec<u8>, u64)| {
                let mut key = Mvcc::new(Arc::clone(&engine), Home(*home), Timestamp::ZERO).row(row);
                key.extend_from_slice(&(!at).to_be_bytes());
                key
            };
            let order = (a.0, &a.1, !a.2).cmp(&(b.0, &b.1, !b.2));
            prop_assert_eq!(version_key(&a).cmp(&version_key(&b)), order);
            let (from, to) = Mvcc::span(Home(a.0));
            prop_assert_eq!((from..to).contains(&version_key(&b)), a.0 == b.0);
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
    fn homes_do_not_see_each_other() {
        let engine: Arc<dyn Engine> = Arc::new(Memory::default());
        let homes = [0, 1, 0x0100, u64::MAX].map(Home);
        let views = homes.map(|home| Mvcc::new(Arc::clone(&engine), home, Timestamp::ZERO));
        for (index, view) in views.iter().enumerate() {
            commit(view, 1, Some(index as u8), 1);
        }
        for (index, view) in views.iter().enumerate() {
            assert_eq!(rows_at(view, 1).unwrap(), BTreeMap::from([(key(1), (1, index as u8))]));
            let (from, to) = Mvcc::span(view.home);
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

    /// After a crash the engine may have collected more than the log has by then.
    #[test]
    fn a_collection_is_done_again_where_a_later_one_was_done_already() {
        let commits = [(0, Some(1)), (0, Some(2)), (4, Some(3)), (4, Some(4))];
        let between = Place { row: key(2), behind: None };
        let left = Stretch { from: None, to: Some(between.clone()) };
        let right = Stretch { from: Some(between), to: None };
        let mut mvcc = filled(&commits);
        collect_stretch(&mut mvcc, 2, &left);
        collect_stretch(&mut mvcc, 4, &right);
        let before = versions(&mvcc);
        assert_eq!(before.len(), 2);
        let mut again = Mvcc::new(Arc::clone(&mvcc.engine), HOME, mvcc.kept_since());
        fill(&again, &commits);
        collect_stretch(&mut again, 2, &left);
        collect_stretch(&mut again, 4, &right);
        assert_eq!((versions(&again), again.kept_since()), (before, Timestamp(4)));
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
    fn what_was_never_written_so_is_refused() {
        let mvcc = filled(&[(0, Some(1))]);
        let (from, _) = Mvcc::span(HOME);
        let mut batch = Batch::default();
        batch.put([&from[..], b"x"].concat(), "");
        mvcc.engine.write(batch).unwrap();
        assert!(matches!(mvcc.scan(&Range::all(), Timestamp::MAX, 10), Err(MvccError::Engine(_))));
    }
}
