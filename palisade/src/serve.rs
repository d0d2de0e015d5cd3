//! The life of a long-running verb: start, serve until asked to end, drain.

use std::future::Future;
use std::io;
use std::num::NonZeroUsize;
use std::time::Duration;

use identity::Scope;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::{Exit, Failure};

/// Runs `start` on a runtime of its own and serves what it has put into the scope until SIGTERM,
/// SIGINT, or the failure of something critical; then drains for at most `bound`.
pub(crate) fn run<F, T>(verb: &'static str, bound: Duration, start: F) -> Result<Exit, Failure>
where
    F: AsyncFnOnce(Scope) -> Result<T, Failure>,
{
    run_on(None, verb, bound, start)
}

/// [`run`] with so many threads that carry requests; none for one a processor.
pub(crate) fn run_on<F, T>(
    workers: Option<NonZeroUsize>,
    verb: &'static str,
    bound: Duration,
    start: F,
) -> Result<Exit, Failure>
where
    F: AsyncFnOnce(Scope) -> Result<T, Failure>,
{
    // Secrets in memory must not be written to a file when the process crashes.
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(rustix::process::Resource::Core, none)
        .map_err(|error| Failure::new("cannot turn off core dumps").because(&error))?;
    let runtime =
        runtime(workers).map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    runtime.block_on(async {
        let scope = Scope::new();
        let stop = stop_signal()?;
        tokio::pin!(stop);
        // Starting may take as long as an agent takes to appear; a signal ends it at once.
        let _alive = tokio::select! {
            started = start(scope.clone()) => started?,
            () = &mut stop => return Ok(Exit::Ok),
        };
        tokio::select! {
            () = &mut stop => tracing::info!(verb, "asked to end; draining"),
            () = scope.draining() => {}
        }
        scope.drain();
        scope
            .finished(bound)
            .await
            .map_err(|reason| Failure::new(format!("{verb} ended because {reason}")))?;
        tracing::info!(verb, "ended");
        Ok(Exit::Ok)
    })
}

/// One worker is this thread itself: no task ever wakes another thread.
fn runtime(workers: Option<NonZeroUsize>) -> io::Result<Runtime> {
    let mut builder = match workers.map(NonZeroUsize::get) {
        Some(1) => Builder::new_current_thread(),
        Some(workers) => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(workers);
            builder
        }
        None => Builder::new_multi_thread(),
    };
    builder.enable_all().build()
}

/// Completes when the process is asked to end.
pub(crate) fn stop_signal() -> Result<impl Future<Output = ()>, Failure> {
    let listen =
        |kind| signal(kind).map_err(|error| Failure::new("cannot listen for signals").because(&error));
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
