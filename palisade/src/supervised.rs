//! A process that ends when the one that started it ends, however that ends.

use std::io;

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// Has the kernel send this process `signal` when the thread that started it ends.
///
/// The supervisor starts its children from its main thread, so that is when the supervisor ends. An
/// error means that `parent` was gone before the kernel knew of the wish.
pub(crate) fn end_with(parent: u32, signal: Signal) -> io::Result<()> {
    set_parent_process_death_signal(Some(signal))?;
    // A parent that died before the line above sends no signal any more.
    let now = getppid().map(Pid::as_raw_nonzero).map(|pid| pid.get().unsigned_abs());
    if now == Some(parent) {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::NotFound, "the parent is gone"))
    }
}
