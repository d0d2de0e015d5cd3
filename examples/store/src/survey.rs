//! A look at every version of a split, a few at a time, while it serves: how large the split is, where its middle is, and
//! which versions may be forgotten. All of them at once are millions after some minutes of writes, and nobody is answered
//! meanwhile.

use crate::{
    keys::{Key, Range},
    mvcc::{Mvcc, MvccError, Place, Stretch},
    truetime::Timestamp,
};

/// So many rows are remembered at most, for one of them to be the middle: within a hundredth of it.
const MARKS_MAX: usize = 128;

/// One look at a split.
#[derive(Debug)]
pub struct Survey {
    horizon: Timestamp,
    at: Option<Place>,
    rows: u64,
    bytes: u64,
    /// Rows, each with the bytes before it.
    marks: Vec<(u64, Key)>,
    /// So many bytes lie between two of them.
    apart: u64,
}

/// What one step came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    /// The versions that were looked at, where some may be forgotten; and those of the first step anyway, so that what is
    /// kept is no longer kept whether there is something to forget or not.
    pub collectable: Option<Stretch>,
    /// Whether those were the last.
    pub done: bool,
}

impl Survey {
    /// A look for versions that no snapshot at or after `horizon` shows.
    pub fn new(horizon: Timestamp) -> Self {
        Self { horizon, at: None, rows: 0, bytes: 0, marks: Vec::new(), apart: 1 }
    }

    /// Looks at about `limit` versions more.
    ///
    /// # Errors
    ///
    /// When the engine fails.
    pub fn step(&mut self, versions: &Mvcc, range: &Range, limit: usize) -> Result<Step, MvccError> {
        let from = self.at.take();
        let mut failed = None;
        let seen = versions.look(range, from.as_ref(), self.horizon, limit, &mut |key, bytes| {
            let last = self.marks.last().map_or(0, |(before, _)| *before);
            if self.bytes >= last + self.apart {
                match key() {
                    Ok(key) => self.marks.push((self.bytes, key)),
                    Err(error) => failed = Some(error),
                }
            }
            if self.marks.len() > MARKS_MAX {
                let mut stays = false;
                self.marks.retain(|_| {
                    stays = !stays;
                    !stays
                });
                self.apart *= 2;
            }
            self.rows += 1;
            self.bytes += bytes;
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        self.at.clone_from(&seen.to);
        let done = seen.to.is_none();
        let collectable = seen.collectable || from.is_none();
        Ok(Step { collectable: collectable.then_some(Stretch { from, to: seen.to }), done })
    }

    /// Up to when versions may be forgotten.
    pub fn horizon(&self) -> Timestamp {
        self.horizon
    }

    /// Rows that exist, and the bytes that their keys and values take; older versions do not count.
    pub fn size(&self) -> (u64, u64) {
        (self.rows, self.bytes)
    }

    /// The row that cuts the split best into halves of as many bytes: rows before it, and it with those after it. None
    /// where there are no two rows.
    pub fn middle(&self) -> Option<&Key> {
        let smaller_half = |(before, _): &&(u64, Key)| *before.min(&self.bytes.saturating_sub(*before));
        // Of two that are as good the first.
        self.marks.iter().rev().max_by_key(smaller_half).map(|(_, key)| key)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        engine::{Batch, Engine, Memory},
        mvcc::{Home, Mutation},
    };

    fn key(row: usize) -> Key {
        Key::new("t", format!("{row:05}").as_bytes()).unwrap()
    }

    /// Rows of so many bytes each; without a number, one that was deleted. All were written before, too.
    fn surveyed(sizes: &[Option<usize>], limit: usize) -> Survey {
        let engine: Arc<dyn Engine> = Arc::new(Memory::default());
        let mvcc = Mvcc::new(Arc::clone(&engine), Home(1), Timestamp::ZERO);
        let mut batch = Batch::default();
        for (row, size) in sizes.iter().enumerate() {
            let write = |size: Option<usize>| Mutation {
                key: key(row),
                value: size.map(|size| Bytes::from(vec![0; size])),
            };
            mvcc.apply(&mut batch, &[write(Some(7))], Timestamp(1));
            mvcc.apply(&mut batch, &[write(*size)], Timestamp(2));
        }
        engine.write(batch).unwrap();
        let mut survey = Survey::new(Timestamp(1));
        while !survey.step(&mvcc, &Range::all(), limit).unwrap().done {}
        survey
    }

    #[test]
    fn the_middle_is_by_bytes_and_not_by_rows() {
        assert_eq!(surveyed(&[], 1).middle(), None);
        assert_eq!(surveyed(&[Some(5)], 1).middle(), None);
        assert_eq!(surveyed(&[Some(1000), Some(1), Some(1), Some(1)], 2).middle(), Some(&key(1)));
        assert_eq!(surveyed(&[Some(1000), Some(1), Some(1), Some(5000)], 3).middle(), Some(&key(3)));
    }

    proptest! {
        #[test]
        fn rows_that_exist_are_counted_once_whatever_the_steps(
            sizes in prop::collection::vec(prop::option::of(0usize..9), 0..40), limit in 1usize..9,
        ) {
            let survey = surveyed(&sizes, limit);
            let rows = sizes.iter().flatten();
            prop_assert_eq!(survey.size().0, rows.clone().count() as u64);
            let overhead = survey.size().1 - rows.sum::<usize>() as u64;
            prop_assert_eq!(overhead % survey.size().0.max(1), 0);
        }

        #[test]
        fn the_middle_of_many_rows_is_within_a_hundredth(
            sizes in prop::collection::vec(0usize..300, 200..2_000), limit in 1usize..900,
        ) {
            let sizes: Vec<_> = sizes.into_iter().map(Some).collect();
            let survey = surveyed(&sizes, limit);
            let overhead = (survey.size().1 - sizes.iter().flatten().sum::<usize>() as u64) / sizes.len() as u64;
            let middle = survey.middle().unwrap();
            let before = sizes.iter().enumerate().take_while(|(row, _)| key(*row) != *middle);
            let before: u64 = before.map(|(_, size)| size.unwrap() as u64 + overhead).sum();
            let half = survey.size().1 / 2;
            prop_assert!(before.abs_diff(half) <= survey.size().1 / 50 + 400, "{before} of twice {half}");
        }
    }
}
