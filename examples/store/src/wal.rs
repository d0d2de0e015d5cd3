//! One log for everything that a node must not forget, whichever split it belongs to: records are gathered, written
//! and synced together, so that many commits share one `fsync`.
//!
//! A batch is what was synced together: where it stands in its segment, its length, the CRC-32 of all that, and its
//! records, each behind its length. A batch that a crash tore at the end of the last segment was never acknowledged, and
//! is cut off. With a whole batch behind it, which was written only when it was synced, or in any other segment, a broken
//! one means a broken disk, and is an error. A batch is looked for by the place it says it has, since behind a broken
//! one nobody knows where the next begins.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

/// A segment is closed when it is larger than this: what can be dropped is dropped by segments.
pub const SEGMENT_BYTES: u64 = 16 << 20;
/// More than the largest record that a split makes, less than what a length torn by a crash could ask us to allocate.
pub const RECORD_BYTES_MAX: usize = 64 << 20;

const HEAD_BYTES: usize = 20;

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// The disk says no.
    #[error("write-ahead log, segment {segment}")]
    Io {
        /// Which segment.
        segment: u64,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// What was synced is not what is read.
    #[error(
        "write-ahead log, segment {segment}: what was synced at byte {offset} is broken; empty the data directory, so \
         that this node comes back as a new one, restored from the others"
    )]
    Broken {
        /// Which segment.
        segment: u64,
        /// Where in it.
        offset: usize,
    },
    /// A record over [`RECORD_BYTES_MAX`].
    #[error("a record of {0} bytes is over the limit of {RECORD_BYTES_MAX}")]
    TooLarge(usize),
    /// A write or sync failed before: what is on the disk is not known, and a sync that works later proves nothing.
    #[error("an earlier write to the log failed; restart the node")]
    Failed,
}

/// Where segments are kept.
pub trait Disk {
    /// The segments there are, in order.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn segments(&self) -> io::Result<Vec<u64>>;
    /// A segment's bytes.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn read(&self, segment: u64) -> io::Result<Vec<u8>>;
    /// Cuts a segment off at `length`, durably.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn truncate(&mut self, segment: u64, length: u64) -> io::Result<()>;
    /// Removes a segment that nobody needs any more.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn remove(&mut self, segment: u64) -> io::Result<()>;
    /// Opens a segment to write at its end, making it, durably, if it is not there.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn open(&mut self, segment: u64) -> io::Result<()>;
    /// Writes at the end of the open segment. Not durable before [`Disk::sync`].
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes all that was appended durable.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    fn sync(&mut self) -> io::Result<()>;
}

/// The log of one node.
#[derive(Debug)]
pub struct Wal<D> {
    disk: D,
    segment: u64,
    length: u64,
    segment_bytes: u64,
    gathered: Vec<u8>,
    /// The batch that was written last: memory that is used again.
    written: Vec<u8>,
    failed: bool,
    /// Closed segments with their lengths, oldest first.
    closed: VecDeque<(u64, u64)>,
}

/// A record, and the segment that it is in.
pub type Kept = (u64, Vec<u8>);

impl<D: Disk> Wal<D> {
    /// Opens the log and gives every record in it, in order.
    ///
    /// # Errors
    ///
    /// When the disk fails, or holds what was not written so.
    pub fn open(disk: D) -> Result<(Self, Vec<Kept>), WalError> {
        Self::open_with(disk, SEGMENT_BYTES)
    }

    fn open_with(mut disk: D, segment_bytes: u64) -> Result<(Self, Vec<Kept>), WalError> {
        let segments = disk.segments().map_err(|source| WalError::Io { segment: 0, source })?;
        let last = segments.last().copied().unwrap_or(0);
        let mut records = Vec::new();
        let mut length = 0;
        let mut closed = VecDeque::new();
        for segment in segments {
            let on = |source| WalError::Io { segment, source };
            let bytes = disk.read(segment).map_err(on)?;
            let mut whole = 0;
            while let Some(batch) = read_batch(&bytes, whole) {
                whole += HEAD_BYTES + batch.len();
                let broken = WalError::Broken { segment, offset: whole };
                let found = read_records(batch).ok_or(broken)?;
                records.extend(found.into_iter().map(|record| (segment, record)));
            }
            if whole < bytes.len() {
                let synced =
                    segment != last || (whole + 1..bytes.len()).any(|at| read_batch(&bytes, at).is_some());
                if synced {
                    return Err(WalError::Broken { segment, offset: whole });
                }
                disk.truncate(segment, whole as u64).map_err(on)?;
            }
            length = whole as u64;
            closed.push_back((segment, length));
        }
        closed.pop_back();
        disk.open(last).map_err(|source| WalError::Io { segment: last, source })?;
        let wal = Self {
            disk,
            segment: last,
            length,
            segment_bytes,
            gathered: Vec::new(),
            written: Vec::new(),
            failed: false,
            closed,
        };
        Ok((wal, records))
    }

    /// Gathers a record for the next [`Wal::commit`].
    ///
    /// # Errors
    ///
    /// When it is too large; then it is not gathered.
    pub fn gather(&mut self, record: &[u8]) -> Result<(), WalError> {
        let length = u32::try_from(record.len()).ok().filter(|length| *length as usize <= RECORD_BYTES_MAX);
        let length = length.ok_or(WalError::TooLarge(record.len()))?;
        self.gathered.extend_from_slice(&length.to_le_bytes());
        self.gathered.extend_from_slice(record);
        Ok(())
    }

    /// Makes all gathered records durable with one write and one sync. Nothing gathered, nothing written: false.
    ///
    /// # Errors
    ///
    /// When the disk fails; and ever after, since what it holds then is not known.
    pub fn commit(&mut self) -> Result<bool, WalError> {
        if self.failed {
            return Err(WalError::Failed);
        }
        if self.gathered.is_empty() {
            return Ok(false);
        }
        let written = self.write();
        self.failed = written.is_err();
        written.map(|()| true).map_err(|source| WalError::Io { segment: self.segment, source })
    }

    /// Whether something waits for the next [`Wal::commit`].
    pub fn has_gathered(&self) -> bool {
        !self.gathered.is_empty()
    }

    /// The segment that the next commit writes into.
    pub fn next_segment(&self) -> u64 {
        if self.begins_segment() { self.segment + 1 } else { self.segment }
    }

    /// Whether the next commit begins a segment: what must never be dropped has to be said again there.
    pub fn begins_segment(&self) -> bool {
        self.length >= self.segment_bytes
    }

    /// Drops closed segments, oldest first, as long as nobody needs them.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    pub fn drop_segments(&mut self, mut needed: impl FnMut(u64) -> bool) -> Result<(), WalError> {
        while let Some((segment, _)) = self.closed.front().copied().filter(|(segment, _)| !needed(*segment)) {
            self.disk.remove(segment).map_err(|source| WalError::Io { segment, source })?;
            self.closed.pop_front();
        }
        Ok(())
    }

    /// Bytes that are kept.
    pub fn bytes(&self) -> u64 {
        self.length + self.closed.iter().map(|(_, length)| length).sum::<u64>()
    }

    /// The disk, to be opened again.
    pub fn into_disk(self) -> D {
        self.disk
    }

    fn write(&mut self) -> io::Result<()> {
        if self.begins_segment() {
            self.closed.push_back((self.segment, self.length));
            self.segment += 1;
            self.length = 0;
            self.disk.open(self.segment)?;
        }
        self.written.clear();
        self.written.extend_from_slice(&head(self.length, &self.gathered));
        self.written.append(&mut self.gathered);
        self.disk.append(&self.written)?;
        self.disk.sync()?;
        self.length += self.written.len() as u64;
        Ok(())
    }
}

/// The whole batch at `place` of a segment, if there is one, without its head.
fn read_batch(segment: &[u8], place: usize) -> Option<&[u8]> {
    let head = segment.get(place..)?.first_chunk::<HEAD_BYTES>()?;
    let (says, rest) = head.split_first_chunk::<8>()?;
    if u64::from_le_bytes(*says) != place as u64 {
        return None;
    }
    let length = usize::try_from(u64::from_le_bytes(*rest.first_chunk::<8>()?)).ok()?;
    let batch = segment.get(place + HEAD_BYTES..)?.get(..length)?;
    (*head == self::head(place as u64, batch)).then_some(batch)
}

fn head(place: u64, batch: &[u8]) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    let (told, crc) = head.split_at_mut(HEAD_BYTES - 4);
    let (says, length) = told.split_at_mut(8);
    says.copy_from_slice(&place.to_le_bytes());
    length.copy_from_slice(&(batch.len() as u64).to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(says);
    hasher.update(length);
    // Of the head too: zeros, which some file systems leave at a torn end, would be a whole batch of no bytes.
    hasher.update(batch);
    crc.copy_from_slice(&hasher.finalize().to_le_bytes());
    head
}

/// The records of a batch, unless it is none.
fn read_records(mut batch: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut records = Vec::new();
    while !batch.is_empty() {
        let (length, rest) = batch.split_first_chunk::<4>()?;
        let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        records.push(record.to_vec());
        batch = rest;
    }
    Some(records)
}

/// Segments as files of one directory.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    open: Option<File>,
}

impl Directory {
    /// The directory `path`, made if it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn new(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self { path: path.to_owned(), open: None })
    }

    fn file(&self, segment: u64) -> PathBuf {
        self.path.join(format!("{segment:016x}.wal"))
    }
}

impl Disk for Directory {
    fn segments(&self) -> io::Result<Vec<u64>> {
        let mut segments = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".wal"));
            segments.extend(number.and_then(|number| u64::from_str_radix(number, 16).ok()));
        }
        segments.sort_unstable();
        Ok(segments)
    }

    fn read(&self, segment: u64) -> io::Result<Vec<u8>> {
        fs::read(self.file(segment))
    }

    fn truncate(&mut self, segment: u64, length: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.file(segment))?;
        file.set_len(length)?;
        file.sync_all()
    }

    fn remove(&mut self, segment: u64) -> io::Result<()> {
        fs::remove_file(self.file(segment))
    }

    fn open(&mut self, segment: u64) -> io::Result<()> {
        self.open = Some(OpenOptions::new().append(true).create(true).open(self.file(segment))?);
        // A file whose name is not durable is lost with all that was synced into it.
        File::open(&self.path)?.sync_all()
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.opened()?.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.opened()?.sync_data()
    }
}

impl Directory {
    fn opened(&mut self) -> io::Result<&mut File> {
        self.open.as_mut().ok_or_else(|| io::Error::other("no segment is open"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(path: &Path, batches: &[Vec<Vec<u8>>]) {
        let (mut wal, _) = Wal::open_with(Directory::new(path).unwrap(), 64).unwrap();
        for batch in batches {
            for record in batch {
                wal.gather(record).unwrap();
            }
            wal.commit().unwrap();
        }
    }

    fn records(path: &Path) -> Result<Vec<Vec<u8>>, WalError> {
        Wal::open_with(Directory::new(path).unwrap(), 64)
            .map(|(_, records)| records.into_iter().map(|(_, record)| record).collect())
    }

    /// How many there are at the beginning, and how many bytes they take.
    fn whole_batches(segment: &[u8]) -> (usize, usize) {
        let (mut count, mut place) = (0, 0);
        while let Some(batch) = read_batch(segment, place) {
            (count, place) = (count + 1, place + HEAD_BYTES + batch.len());
        }
        (count, place)
    }

    fn batches() -> impl Strategy<Value = Vec<Vec<Vec<u8>>>> {
        prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..4), 1..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn what_was_committed_is_read_back_over_segments(batches in batches()) {
            let home = tempfile::tempdir().unwrap();
            let (first, second) = batches.split_at(batches.len() / 2);
            written(home.path(), first);
            written(home.path(), second);
            prop_assert_eq!(records(home.path()).unwrap(), batches.concat());
        }

        /// In whichever byte, with whatever of the segment's end torn: a batch that was synced is missed.
        #[test]
        fn what_was_synced_is_never_cut_off_behind_a_whole_batch(
            batches in batches(), broken in any::<prop::sample::Index>(), flip in 1u8.., torn in 0..HEAD_BYTES,
        ) {
            let home = tempfile::tempdir().unwrap();
            let path = home.path();
            let (mut wal, _) = Wal::open(Directory::new(path).unwrap()).unwrap();
            let mut ends = Vec::new();
            for batch in batches.iter().chain([&vec![b"last".to_vec()]]) {
                batch.iter().for_each(|record| wal.gather(record).unwrap());
                wal.commit().unwrap();
                ends.push(wal.bytes() as usize);
            }
            let file = Directory::new(path).unwrap().file(0);
            let mut bytes = fs::read(&file).unwrap();
            let at = broken.index(ends[ends.len() - 2]);
            bytes[at] ^= flip;
            bytes.extend(vec![0; torn]);
            fs::write(&file, &bytes).unwrap();
            let begins = ends.iter().copied().filter(|end| *end <= at).max().unwrap_or(0);
            match Wal::open(Directory::new(path).unwrap()) {
                Err(WalError::Broken { segment: 0, offset }) => prop_assert_eq!(offset, begins),
                other => prop_assert!(false, "{:?}", other.map(|(_, records)| records)),
            }
            prop_assert_eq!(fs::read(&file).unwrap(), bytes, "nothing was cut off");
        }

        #[test]
        fn a_torn_end_loses_only_what_was_torn(
            batches in batches(), cut in any::<prop::sample::Index>(), noise in prop::collection::vec(any::<u8>(), 0..12),
        ) {
            let home = tempfile::tempdir().unwrap();
            written(home.path(), &batches);
            let disk = Directory::new(home.path()).unwrap();
            let last = disk.file(*disk.segments().unwrap().last().unwrap());
            let mut bytes = fs::read(&last).unwrap();
            let (were, _) = whole_batches(&bytes);
            bytes.truncate(cut.index(bytes.len() + 1));
            let (are, whole) = whole_batches(&bytes);
            // Zeros or anything else after it, as a file system may leave them.
            if whole < bytes.len() {
                let at = bytes.len();
                bytes.extend_from_slice(&noise);
                bytes[at - 1] ^= 1;
            }
            fs::write(&last, &bytes).unwrap();
            let read = records(home.path()).unwrap();
            prop_assert_eq!(&read, &batches[..batches.len() - (were - are)].concat());
            // And what is written after it is not lost behind what was torn.
            written(home.path(), &[vec![b"after".to_vec()]]);
            prop_assert_eq!(records(home.path()).unwrap(), [read, vec![b"after".to_vec()]].concat());
        }
    }

    #[test]
    fn a_broken_record_before_the_end_is_an_error_that_says_where() {
        let home = tempfile::tempdir().unwrap();
        written(home.path(), &vec![vec![vec![7; 100]]; 3]);
        let first = home.path().join("0000000000000000.wal");
        let mut bytes = fs::read(&first).unwrap();
        bytes[50] ^= 1;
        fs::write(&first, bytes).unwrap();
        assert!(matches!(records(home.path()), Err(WalError::Broken { segment: 0, offset: 0 })));
    }

    #[test]
    fn what_nobody_needs_is_dropped_from_the_front() {
        let home = tempfile::tempdir().unwrap();
        written(home.path(), &vec![vec![vec![7; 100]]; 4]);
        let (mut wal, kept) = Wal::open_with(Directory::new(home.path()).unwrap(), 64).unwrap();
        assert_eq!(kept.iter().map(|(segment, _)| *segment).collect::<Vec<_>>(), [0, 1, 2, 3]);
        let before = wal.bytes();
        wal.drop_segments(|segment| segment == 2).unwrap();
        assert_eq!(wal.bytes(), before / 2);
        wal.drop_segments(|_| false).unwrap();
        assert_eq!(records(home.path()).unwrap().len(), 1, "the open one stays");
    }

    #[test]
    fn zeros_at_the_end_are_no_records() {
        let home = tempfile::tempdir().unwrap();
        written(home.path(), &[vec![b"one".to_vec()]]);
        let file = home.path().join("0000000000000000.wal");
        let mut bytes = fs::read(&file).unwrap();
        bytes.extend([0; 64]);
        fs::write(&file, bytes).unwrap();
        assert_eq!(records(home.path()).unwrap(), [b"one".to_vec()]);
    }

    /// A disk that is full.
    struct Full;

    impl Disk for Full {
        fn segments(&self) -> io::Result<Vec<u64>> {
            Ok(vec![])
        }
        fn read(&self, _: u64) -> io::Result<Vec<u8>> {
            Ok(vec![])
        }
        fn truncate(&mut self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn remove(&mut self, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn open(&mut self, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn append(&mut self, _: &[u8]) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn after_a_failed_write_nothing_is_acknowledged_any_more() {
        let (mut wal, _) = Wal::open(Full).unwrap();
        wal.gather(b"one").unwrap();
        assert!(matches!(wal.commit(), Err(WalError::Io { .. })));
        assert!(matches!(wal.commit(), Err(WalError::Failed)));
        assert!(matches!(wal.gather(&vec![0; RECORD_BYTES_MAX + 1]), Err(WalError::TooLarge(_))));
    }
}
