//! The life of a long-running verb: start, be ready, serve until asked to end, drain.
//!
//! | signal | meaning |
//! |---|---|
//! | SIGTERM, SIGINT | drain; a second one ends at once |
//! | SIGHUP | reload, where the verb can |

use std::future::Future;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use identity::Scope;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};

use crate::failure::{Exit, Failure};
use crate::notify::Notifier;
use crate::readiness::Readiness;
use crate::rlimits;

/// What a verb has started, alive until the process has drained.
pub(crate) struct Started<T> {
    _alive: T,
    readiness: Readiness,
    pub(crate) reload: Option<Reload>,
}

/// Puts in force what has changed on disk and says in a few words how that went.
pub(crate) type Reload = Box<dyn FnMut() -> String + Send>;

impl<T> Started<T> {
    /// Something that serves.
    pub(crate) fn new(alive: T) -> Self {
        Self { _alive: alive, readiness: Readiness::Started, reload: None }
    }

    /// Ready only when `readiness` is reached.
    pub(crate) fn ready_when(self, readiness: Readiness) -> Self {
        Self { readiness, ..self }
    }

    /// What it still waits for, in words.
    pub(crate) fn missing(&self) -> Option<String> {
        self.readiness.missing()
    }

    /// SIGHUP calls `reload`.
    pub(crate) fn reloaded_by(self, reload: impl FnMut() -> String + Send + 'static) -> Self {
        Self { reload: Some(Box::new(reload)), ..self }
    }
}

/// Runs `start` on a runtime of its own and serves what it has put into the scope until SIGTERM,
/// SIGINT, or the failure of something critical; then drains for at most `bound`.
pub(crate) fn run<F, T>(verb: &'static str, bound: Duration, start: F) -> Result<Exit, Failure>
where
    F: AsyncFnOnce(Scope) -> Result<Started<T>, Failure>,
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
    F: AsyncFnOnce(Scope) -> Result<Started<T>, Failure>,
{
    rlimits::adjust()?;
    on_runtime(workers, async {
        let mut life = Life::begin(verb, bound)?;
        let Met::Yes(mut started) = life.start(start).await? else { return Ok(Ending::before_it_began()) };
        if let Met::Yes(()) = life.ready(&mut started).await {
            life.announce("serves");
            life.until(&mut started.reload, std::future::pending::<()>()).await;
        }
        let ended = life.end().await?;
        Ok(Ending { exit: if ended == Ended::Clean { Exit::Ok } else { Exit::Cut }, ended })
    })
}

/// How a process comes to its end.
pub(crate) struct Ending {
    pub(crate) exit: Exit,
    pub(crate) ended: Ended,
}

impl Ending {
    fn before_it_began() -> Self {
        Self { exit: Exit::Ok, ended: Ended::Clean }
    }
}

/// How a drain went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Every connection came to its own end.
    Clean,
    /// Some were cut: the bound was reached, or a second signal came.
    Cut,
}

/// Whether what was waited for has come.
#[derive(Debug)]
pub(crate) enum Met<T> {
    Yes(T),
    /// No: a signal asked the process to end.
    Asked(rustix::process::Signal),
    /// No: something critical is gone, or a successor has taken over.
    Broken,
}

/// Runs a life on a runtime of its own. Its future is polled by the calling thread, which is the
/// process's main one.
pub(crate) fn on_runtime(
    workers: Option<NonZeroUsize>,
    life: impl Future<Output = Result<Ending, Failure>>,
) -> Result<Exit, Failure> {
    let runtime =
        runtime(workers).map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    let ending = runtime.block_on(life);
    // What was cut is not waited for: its blocking calls neither.
    if !matches!(&ending, Ok(Ending { ended: Ended::Clean, .. })) {
        runtime.shutdown_background();
    }
    ending.map(|ending| ending.exit)
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

/// One process between its start and its end.
pub(crate) struct Life {
    verb: &'static str,
    bound: Duration,
    scope: Scope,
    notifier: Arc<Notifier>,
    stops: Stops,
    /// Listened to from the moment on at which there is something to reload.
    hangups: Option<Signal>,
    announced: bool,
}

impl Life {
    pub(crate) fn begin(verb: &'static str, bound: Duration) -> Result<Self, Failure> {
        let (scope, notifier) = (Scope::new(), Arc::new(Notifier::from_env()));
        notifier.status("starting");
        feed_watchdog(&notifier, &scope);
        Ok(Self { verb, bound, scope, notifier, stops: Stops::listen()?, hangups: None, announced: false })
    }

    /// Starts. That may take as long as an agent takes to appear: a signal ends it at once.
    pub(crate) async fn start<F, T>(&mut self, start: F) -> Result<Met<Started<T>>, Failure>
    where
        F: AsyncFnOnce(Scope) -> Result<Started<T>, Failure>,
    {
        let started = tokio::select! {
            started = start(self.scope.clone()) => started?,
            signal = self.stops.next() => return Ok(Met::Asked(signal)),
        };
        if started.reload.is_some() {
            self.hangups = Some(listen(SignalKind::hangup())?);
        }
        Ok(Met::Yes(started))
    }

    /// Waits until it is ready.
    pub(crate) async fn ready<T>(&mut self, started: &mut Started<T>) -> Met<()> {
        if let Some(missing) = started.readiness.missing() {
            tracing::info!(verb = self.verb, missing, "waiting");
            self.notifier.status(&missing);
        }
        self.until(&mut started.reload, started.readiness.reached()).await
    }

    /// Tells the service manager that all is there.
    pub(crate) fn announce(&mut self, status: &str) {
        self.announced = true;
        tracing::info!(verb = self.verb, status, "ready");
        self.notifier.ready(status);
    }

    /// Serves, and reloads at SIGHUP, until `event`.
    pub(crate) async fn until<T>(
        &mut self,
        reload: &mut Option<Reload>,
        event: impl Future<Output = T>,
    ) -> Met<T> {
        tokio::pin!(event);
        loop {
            tokio::select! {
                event = &mut event => return Met::Yes(event),
                signal = self.stops.next() => return Met::Asked(signal),
                () = self.scope.draining() => return Met::Broken,
                () = next(&mut self.hangups) => self.reload(reload),
            }
        }
    }

    /// By this thread: with more than one worker no request waits for it.
    fn reload(&self, reload: &mut Option<Reload>) {
        let Some(reload) = reload else { return };
        if self.announced {
            self.notifier.reloading();
        }
        let outcome = reload();
        if self.announced {
            self.notifier.ready(&outcome);
        }
    }

    /// Drains within the bound, or until a second signal.
    pub(crate) async fn end(&mut self) -> Result<Ended, Failure> {
        let verb = self.verb;
        tracing::info!(verb, "draining");
        self.notifier.stopping("draining");
        self.scope.drain();
        let finished = tokio::select! {
            finished = self.scope.finished(self.bound) => finished,
            _ = self.stops.next() => {
                tracing::warn!(verb, "asked again to end: at once");
                self.scope.finished(Duration::ZERO).await
            }
        };
        let cut = self.scope.unfinished();
        finished.map_err(|reason| Failure::new(format!("{verb} ended because {reason}")))?;
        if cut == 0 {
            tracing::info!(verb, "ended");
            return Ok(Ended::Clean);
        }
        tracing::warn!(verb, cut, "ended; connections were cut");
        Ok(Ended::Cut)
    }
}

/// Shows the service manager that the runtime which serves requests still runs its tasks.
fn feed_watchdog(notifier: &Arc<Notifier>, scope: &Scope) {
    let Some(pause) = notifier.watchdog_pause() else { return };
    let (notifier, draining) = (Arc::clone(notifier), scope.clone());
    scope.spawn_critical("watchdog", async move {
        let mut due = interval(pause);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = due.tick() => notifier.alive(),
                () = draining.draining() => return,
            }
        }
    });
}

/// The signals that ask a process to end.
pub(crate) struct Stops {
    terminate: Signal,
    interrupt: Signal,
}

impl Stops {
    pub(crate) fn listen() -> Result<Self, Failure> {
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// Completes when the process is asked to end, each time it is, and says by which signal.
    pub(crate) async fn next(&mut self) -> rustix::process::Signal {
        tokio::select! {
            _ = self.terminate.recv() => rustix::process::Signal::TERM,
            _ = self.interrupt.recv() => rustix::process::Signal::INT,
        }
    }
}

/// The next signal, if it is listened to.
async fn next(signal: &mut Option<Signal>) {
    let came = match signal {
        Some(signal) => signal.recv().await,
        None => None,
    };
    if came.is_none() {
        std::future::pending().await
    }
}

/// Listens for a signal; what it would do to the process otherwise, it does no more.
pub(crate) fn listen(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::new("cannot listen for signals").because(&error))
}

/// Completes when the process is asked to end.
pub(crate) fn stop_signal() -> Result<impl Future<Output = ()>, Failure> {
    let mut stops = Stops::listen()?;
    Ok(async move {
        stops.next().await;
    })
}
