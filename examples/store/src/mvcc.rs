//! Every version of every row by the timestamp of the transaction that wrote it. A snapshot is a timestamp: what it
//! shows never changes, so reading one takes no lock.

use std::{collections::BTreeMap, ops::Bound};

use bytes::Bytes;

use crate::{
    keys::{Key, Range},
    truetime::Timestamp,
};

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

/// Why a snapshot is not shown or a version not kept.
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
    /// A version that would change a snapshot that was shown.
    #[error("a version at {new} would be written under one at {newest}")]
    OutOfOrder {
        /// The version's own timestamp.
        new: Timestamp,
        /// The newest of that row.
        newest: Timestamp,
    },
}

/// What a scan found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Rows that exist, in order.
    pub rows: Vec<(Key, Version)>,
    /// Where to go on, when the limit ended it.
    pub more_from: Option<Key>,
    /// The newest version looked at, deletions included: nothing may be told before this has passed.
    pub newest: Timestamp,
}

/// Rows of one split.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mvcc {
    /// Versions oldest first, never none.
    rows: BTreeMap<Key, Vec<Version>>,
    kept_since: Timestamp,
}

impl Mvcc {
    /// Writes `mutations` at `at`.
    ///
    /// # Errors
    ///
    /// When one of the rows has a version at or after `at`; then nothing is written.
    pub fn apply(&mut self, mutations: &[Mutation], at: Timestamp) -> Result<(), MvccError> {
        for mutation in mutations {
            let newest = self.rows.get(&mutation.key).and_then(|versions| versions.last());
            if let Some(newest) = newest.filter(|newest| newest.at >= at) {
                return Err(MvccError::OutOfOrder { new: at, newest: newest.at });
            }
        }
        for mutation in mutations {
            let versions = self.rows.entry(mutation.key.clone()).or_default();
            // A transaction that writes a row twice has the last of its values.
            versions.pop_if(|newest| newest.at == at);
            versions.push(Version { at, value: mutation.value.clone() });
        }
        Ok(())
    }

    /// The version of `key` that `at` shows.
    ///
    /// # Errors
    ///
    /// When `at` is before what is kept.
    pub fn get(&self, key: &Key, at: Timestamp) -> Result<Option<&Version>, MvccError> {
        self.check_kept(at)?;
        Ok(self.rows.get(key).and_then(|versions| shown(versions, at)))
    }

    /// The newest version of `key`, of a deletion too.
    pub fn newest(&self, key: &Key) -> Option<&Version> {
        self.rows.get(key).and_then(|versions| versions.last())
    }

    /// Up to `limit` rows in `range` as `at` shows them.
    ///
    /// # Errors
    ///
    /// When `at` is before what is kept.
    pub fn scan(&self, range: &Range, at: Timestamp, limit: usize) -> Result<Scanned, MvccError> {
        self.check_kept(at)?;
        let mut found = Scanned::default();
        for (key, versions) in self.rows_in(range) {
            let Some(version) = shown(versions, at) else { continue };
            if version.value.is_some() && found.rows.len() == limit {
                found.more_from = Some(key.clone());
                break;
            }
            found.newest = found.newest.max(version.at);
            if version.value.is_some() {
                found.rows.push((key.clone(), version.clone()));
            }
        }
        Ok(found)
    }

    /// Forgets what no snapshot at or after `horizon` shows.
    pub fn collect(&mut self, horizon: Timestamp) {
        if horizon <= self.kept_since {
            return;
        }
        self.kept_since = horizon;
        self.rows.retain(|_, versions| {
            let older = versions.partition_point(|version| version.at <= horizon);
            versions.drain(..older.saturating_sub(1));
            // A deletion that is all there is shows nothing to anybody.
            !matches!(versions.as_slice(), [only] if only.at <= horizon && only.value.is_none())
        });
    }

    /// The earliest snapshot that is whole.
    pub fn kept_since(&self) -> Timestamp {
        self.kept_since
    }

    /// Rows, deleted ones included as long as they are kept.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no row is kept.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Every version with its row, in order: what a snapshot for another node holds.
    pub fn versions(&self) -> impl Iterator<Item = (&Key, &Version)> {
        self.rows.iter().flat_map(|(key, versions)| versions.iter().map(move |version| (key, version)))
    }

    /// What [`Mvcc::versions`] gave, as rows again.
    ///
    /// # Errors
    ///
    /// When versions of a row are not in order.
    pub fn restore(
        versions: impl IntoIterator<Item = (Key, Version)>,
        kept_since: Timestamp,
    ) -> Result<Self, MvccError> {
        let mut mvcc = Self { rows: BTreeMap::new(), kept_since };
        for (key, version) in versions {
            mvcc.apply(&[Mutation { key, value: version.value }], version.at)?;
        }
        Ok(mvcc)
    }

    fn rows_in(&self, range: &Range) -> impl Iterator<Item = (&Key, &Vec<Version>)> {
        let bounds = if range.is_empty() {
            // The map's own `range` panics on bounds the wrong way round.
            (Bound::Included(&[] as &[u8]), Bound::Excluded(&[] as &[u8]))
        } else {
            (
                Bound::Included(&range.start()[..]),
                range.end().map_or(Bound::Unbounded, |end| Bound::Excluded(&end[..])),
            )
        };
        self.rows.range::<[u8], _>(bounds)
    }

    fn check_kept(&self, at: Timestamp) -> Result<(), MvccError> {
        if at < self.kept_since {
            return Err(MvccError::Collected { asked: at, kept_since: self.kept_since });
        }
        Ok(())
    }
}

fn shown(versions: &[Version], at: Timestamp) -> Option<&Version> {
    versions.partition_point(|version| version.at <= at).checked_sub(1).and_then(|index| versions.get(index))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(row: u8) -> Key {
        Key::new("t", &[b'a' + row]).unwrap()
    }

    /// What the store does with commits and collections, done the slow way.
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

    fn filled(commits: &[(u8, Option<u8>)]) -> Mvcc {
        let mut mvcc = Mvcc::default();
        for (index, (row, value)) in commits.iter().enumerate() {
            let value = value.map(|value| Bytes::copy_from_slice(&[value]));
            mvcc.apply(&[Mutation { key: key(*row), value }], Timestamp(index as u64 + 1)).unwrap();
        }
        mvcc
    }

    fn rows_of(found: Scanned) -> BTreeMap<Key, (u64, u8)> {
        found
            .rows
            .into_iter()
            .map(|(key, version)| (key, (version.at.0, version.value.unwrap()[0])))
            .collect()
    }

    proptest! {
        #[test]
        fn snapshots_never_change(
            commits in prop::collection::vec((0u8..5, prop::option::of(any::<u8>())), 1..40),
            horizon in 0u64..45,
        ) {
            let whole = filled(&commits);
            let mut collected = whole.clone();
            collected.collect(Timestamp(horizon));
            for at in 0..=commits.len() as u64 + 1 {
                let rows = rows_of(whole.scan(&Range::all(), Timestamp(at), usize::MAX).unwrap());
                prop_assert_eq!(&rows, &model(&commits, at));
                let found = collected.scan(&Range::all(), Timestamp(at), usize::MAX);
                if at < horizon {
                    prop_assert!(found.is_err());
                } else {
                    prop_assert_eq!(rows_of(found.unwrap()), model(&commits, at));
                }
            }
            let copied = collected.versions().map(|(key, version)| (key.clone(), version.clone()));
            prop_assert_eq!(Mvcc::restore(copied, collected.kept_since()).unwrap(), collected);
        }

        #[test]
        fn a_scan_by_pages_is_the_scan(
            commits in prop::collection::vec((0u8..8, prop::option::of(any::<u8>())), 0..40),
            page in 1usize..4,
        ) {
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
    }

    #[test]
    fn nothing_is_written_into_the_past() {
        let mut mvcc = filled(&[(0, Some(1)), (1, Some(2))]);
        let before = mvcc.clone();
        let both = [Mutation { key: key(5), value: None }, Mutation { key: key(1), value: None }];
        assert_eq!(
            mvcc.apply(&both, Timestamp(2)),
            Err(MvccError::OutOfOrder { new: Timestamp(2), newest: Timestamp(2) })
        );
        assert_eq!(mvcc, before);
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
}
