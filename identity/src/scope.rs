//! Task lifetimes: every task belongs to a [`Scope`], which is drained and joined.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use std::panic::AssertUnwindSafe;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A set of tasks that start together with their owner and end before it does.
///
/// Two kinds of task: a *connection*, whose panic ends that connection alone, and a *critical* task
/// (an accept loop, the identity watch), whose end before the drain stops the whole scope: a process
/// that lost one of those must fall over and be restarted rather than live on half dead.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Connections, and what belongs to one.
    tracker: TaskTracker,
    critical: TaskTracker,
    /// The trackers of connections of this scope and of all its parts.
    all: Arc<Mutex<Vec<TaskTracker>>>,
    draining: CancellationToken,
    failure: Arc<std::sync::OnceLock<String>>,
    panics: Arc<AtomicU64>,
}

impl Default for Scope {
    fn default() -> Self {
        Self::new()
    }
}

impl Scope {
    /// An empty scope.
    pub fn new() -> Self {
        let tracker = TaskTracker::new();
        Self {
            all: Arc::new(Mutex::new(vec![tracker.clone()])),
            tracker,
            critical: TaskTracker::new(),
            draining: CancellationToken::new(),
            failure: Arc::default(),
            panics: Arc::default(),
        }
    }

    /// A scope of its own that drains when it is told to, not with this one; whoever makes it drains it.
    /// What fails or panics in it is told by both.
    pub fn part(&self) -> Self {
        let tracker = TaskTracker::new();
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|tracker| !(tracker.is_closed() && tracker.is_empty()));
        all.push(tracker.clone());
        drop(all);
        Self { tracker, critical: TaskTracker::new(), draining: CancellationToken::new(), ..self.clone() }
    }

    /// Runs a task whose end concerns nobody else.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let panics = Arc::clone(&self.panics);
        // Not an async block, which would hold room for the task twice: as what it captured and as what it
        // awaits. Tasks are made for every request.
        self.tracker.spawn(AssertUnwindSafe(task).catch_unwind().map(move |outcome| {
            if outcome.is_err() {
                panics.fetch_add(1, Ordering::Relaxed);
                tracing::error!(task = name, "task panicked; its connection is closed, the process lives on");
            }
        }));
    }

    /// Runs a task without which the process is not whole: if it ends or panics before the drain,
    /// the scope drains and [`Scope::finished`] reports it.
    pub fn spawn_critical(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let scope = self.clone();
        self.critical.spawn(async move {
            let outcome = AssertUnwindSafe(task).catch_unwind().await;
            if !scope.draining.is_cancelled() {
                let how = if outcome.is_err() { "panicked" } else { "ended early" };
                tracing::error!(task = name, how, "a critical task is gone; stopping the process");
                scope.fail(format!("{name} {how}"));
            }
        });
    }

    /// Stops the scope because of `reason`; the first reason is the one reported.
    pub fn fail(&self, reason: String) {
        // Losing the race is fine: the first failure is the cause, later ones are its consequences.
        if self.failure.set(reason).is_err() {
            tracing::debug!("scope had already failed");
        }
        self.draining.cancel();
    }

    /// Asks every task to finish: listeners stop accepting, connections end after their requests.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Whether the scope has been asked to finish.
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Completes when the scope has been asked to finish.
    pub async fn draining(&self) {
        self.draining.cancelled().await;
    }

    /// How many tasks have panicked since the start.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    /// How many tasks that are not critical, those of its parts included, have not ended: the connections
    /// that are cut if the process ends now.
    pub fn unfinished(&self) -> usize {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(TaskTracker::len).sum()
    }

    /// Waits until the scope is asked to finish, then for its tasks, at most `bound`.
    ///
    /// Returns the reason if the scope ended because something critical failed.
    pub async fn finished(&self, bound: Duration) -> Result<(), String> {
        self.draining.cancelled().await;
        self.tracker.close();
        self.critical.close();
        // Critical tasks first: an accept loop may still spawn a connection, not the other way round.
        let ended = async {
            self.critical.wait().await;
            self.tracker.wait().await;
        };
        if tokio::time::timeout(bound, ended).await.is_err() {
            tracing::warn!(left = self.unfinished(), "drain bound reached; closing what is left");
        }
        match self.failure.get() {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_panics_ends_alone() {
        let scope = Scope::new();
        scope.spawn("connection", async { panic!("on purpose") });
        while scope.panics() == 0 {
            tokio::task::yield_now().await;
        }
        assert!(!scope.is_draining());
        scope.drain();
        assert_eq!(scope.finished(Duration::from_secs(5)).await, Ok(()));
    }

    #[tokio::test]
    async fn what_a_drain_cuts_is_counted_with_its_parts_and_without_critical_tasks() {
        let scope = Scope::new();
        let part = scope.part();
        part.spawn("connection", std::future::pending());
        scope.spawn("connection", async {});
        scope.spawn_critical("accept loop", std::future::pending());
        scope.drain();
        assert_eq!(scope.finished(Duration::from_millis(20)).await, Ok(()));
        assert_eq!(scope.unfinished(), 1);
    }

    #[tokio::test]
    async fn a_critical_task_that_panics_stops_the_scope_and_is_named() {
        let scope = Scope::new();
        scope.spawn_critical("accept loop", async { panic!("on purpose") });
        assert_eq!(scope.finished(Duration::from_secs(5)).await, Err("accept loop panicked".into()));
    }
}
