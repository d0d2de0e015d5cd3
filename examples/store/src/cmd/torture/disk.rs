//! A small disk of its own for a node, which can be full.

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;
use rustix::fs::{FallocateFlags, fallocate, statvfs};

use super::network::run;

/// Holds the log of some minutes. The file behind it is sparse.
const SIZE_BYTES: u64 = 1 << 30;
/// What is written at last to leave nothing, a page at a time.
const PAGE: [u8; 4096] = [0; 4096];
/// What fills it.
const BALLAST: &str = "ballast";

/// A filesystem in a file, mounted while this lives.
#[derive(Debug)]
pub(crate) struct SmallDisk {
    mounted: PathBuf,
}

impl SmallDisk {
    /// One at `mounted`, in a file beside it.
    ///
    /// # Errors
    ///
    /// When it cannot be made or mounted, as by somebody who is not root.
    pub(crate) fn create(mounted: &Path) -> anyhow::Result<Self> {
        let image = mounted.with_extension("img");
        let file = File::create(&image).with_context(|| format!("{} cannot be made", image.display()))?;
        file.set_len(SIZE_BYTES).context("no room for a small disk")?;
        std::fs::create_dir_all(mounted).with_context(|| format!("{} cannot be made", mounted.display()))?;
        // Nothing is kept for root, who would otherwise never find it full.
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0", "-E", "lazy_itable_init=1"]).arg(&image))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(mounted))?;
        Ok(Self { mounted: mounted.to_owned() })
    }

    /// Leaves no room on it.
    ///
    /// # Errors
    ///
    /// When it cannot be filled for another reason than being full.
    pub(crate) fn fill(&self) -> anyhow::Result<()> {
        let mut ballast = File::create(self.mounted.join(BALLAST)).context("the ballast cannot be made")?;
        let room = statvfs(&self.mounted).context("how much room there is")?;
        let bytes = room.f_bavail.saturating_mul(room.f_frsize);
        // Most of it at once. What is left, or taken meanwhile, by the page.
        let most = bytes.saturating_sub(1 << 20);
        let taken = if fallocate(&ballast, FallocateFlags::empty(), 0, most).is_ok() { most } else { 0 };
        ballast.seek(SeekFrom::Start(taken)).context("the ballast cannot be written")?;
        while ballast.write_all(&PAGE).is_ok() {}
        Ok(())
    }

    /// Makes room again.
    ///
    /// # Errors
    ///
    /// When what fills it cannot be removed.
    pub(crate) fn free(&self) -> anyhow::Result<()> {
        let ballast = self.mounted.join(BALLAST);
        if ballast.exists() {
            std::fs::remove_file(ballast).context("the ballast cannot be removed")
        } else {
            Ok(())
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a node that is ending at this moment may still hold a file there.
        if let Err(error) = run(Command::new("umount").arg("--lazy").arg(&self.mounted)) {
            eprintln!("{error:#}");
        }
    }
}
