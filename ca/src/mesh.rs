//! The client with which a workload hands its decisions to the agent, and so to control.
//!
//! Reporting never blocks and never fails a request: what finds no room is counted and dropped.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;

use identity::Scope;
use identity::clock::SharedClock;
use identity::workload_api;

use crate::backoff::Backoff;
use crate::control::{MAX_DECISION_FIELD_BYTES, MAX_DECISION_JSON_BYTES, MAX_REPORT_BATCH};
use crate::pb::mesh as pb;
use crate::pb::mesh::mesh_client::MeshClient;
use crate::random::SystemRandom;

pub use crate::model::ReportedDecision;

/// Decisions that may wait in a workload, at most a few KiB each: seconds of a flood of denials.
pub const MAX_WAITING: usize = 4_096;
/// Most bytes in one batch, below the size of a request that the agent takes.
const MAX_BATCH_BYTES: usize = 512 * 1024;
/// Longest wait for the agent's answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Hands decisions to the agent, in the background. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DecisionReporter {
    sender: mpsc::Sender<ReportedDecision>,
    dropped: Arc<AtomicU64>,
    total_dropped: Arc<AtomicU64>,
}

impl DecisionReporter {
    /// Starts reporting to the agent at `socket` (a file system path), for as long as `scope` lives.
    pub fn start(socket: PathBuf, clock: SharedClock, scope: &Scope) -> Self {
        let (sender, receiver) = mpsc::channel(MAX_WAITING);
        let dropped = Arc::new(AtomicU64::new(0));
        scope.spawn_critical(
            "decision reporter",
            forward(socket, receiver, Arc::clone(&dropped), clock, scope.clone()),
        );
        Self { sender, dropped, total_dropped: Arc::default() }
    }

    /// Queues a decision. Never blocks; without room, or if the decision is over the limits, it is
    /// dropped and counted.
    pub fn report(&self, decision: ReportedDecision) {
        if !fits(&decision) || self.sender.try_send(decision).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            self.total_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many were dropped here since the start.
    pub fn dropped(&self) -> u64 {
        self.total_dropped.load(Ordering::Relaxed)
    }
}

fn fits(decision: &ReportedDecision) -> bool {
    [&decision.receipt, &decision.service, &decision.verdict, &decision.address]
        .iter()
        .all(|field| field.len() <= MAX_DECISION_FIELD_BYTES)
        && decision.json.len() <= MAX_DECISION_JSON_BYTES
}

async fn forward(
    socket: PathBuf,
    mut receiver: mpsc::Receiver<ReportedDecision>,
    dropped: Arc<AtomicU64>,
    clock: SharedClock,
    scope: Scope,
) {
    let random = SystemRandom::shared();
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let mut client = MeshClient::new(workload_api::channel(&socket));
    let mut carried: Option<ReportedDecision> = None;
    loop {
        let first = match carried.take() {
            Some(decision) => decision,
            None => tokio::select! {
                // Every reporter dropped: nothing will come any more, but a critical task stays.
                decision = receiver.recv() => match decision {
                    Some(decision) => decision,
                    None => { scope.draining().await; return }
                },
                () = scope.draining() => return,
            },
        };
        let mut bytes = first.json.len();
        let mut batch = vec![wire(first)];
        while batch.len() < MAX_REPORT_BATCH {
            let Ok(next) = receiver.try_recv() else { break };
            bytes += next.json.len() + next.address.len() + next.receipt.len() + next.service.len();
            if bytes > MAX_BATCH_BYTES {
                carried = Some(next);
                break;
            }
            batch.push(wire(next));
        }
        // One batch until it is through: what comes meanwhile waits in the channel, or is dropped.
        loop {
            let lost = dropped.swap(0, Ordering::Relaxed);
            let request = pb::ReportRequest { decisions: batch.clone(), dropped: lost };
            let outcome = tokio::select! {
                outcome = client.report(workload_api::request(request)) => outcome,
                () = clock.sleep(CALL_TIMEOUT) => Err(tonic::Status::deadline_exceeded("no answer in time")),
                () = scope.draining() => return,
            };
            let Err(status) = outcome else {
                backoff.reset();
                break;
            };
            dropped.fetch_add(lost, Ordering::Relaxed);
            if status.code() == tonic::Code::InvalidArgument {
                tracing::error!(error = status.message(), "the agent refused a batch of decisions");
                dropped.fetch_add(batch.len() as u64, Ordering::Relaxed);
                break;
            }
            let wait = backoff.wait(&*random);
            tracing::debug!(error = status.message(), retry_in = ?wait, "decisions wait for the agent");
            tokio::select! {
                () = clock.sleep(wait) => {}
                () = scope.draining() => return,
            }
        }
    }
}

/// A decision as it travels to the agent.
pub(crate) fn wire(decision: ReportedDecision) -> pb::Decision {
    pb::Decision {
        receipt: decision.receipt,
        time_ms: decision.time_ms,
        service: decision.service,
        verdict: decision.verdict,
        address: decision.address,
        json: decision.json,
    }
}

#[cfg(test)]
mod tests {
    use identity::SystemClock;

    use super::*;

    #[tokio::test]
    async fn a_flood_without_an_agent_neither_blocks_nor_grows() {
        let scope = Scope::new();
        let directory = tempfile::tempdir().unwrap();
        let reporter =
            DecisionReporter::start(directory.path().join("none.sock"), SystemClock::shared(), &scope);
        let decision = ReportedDecision {
            receipt: "r".into(),
            time_ms: 1,
            service: "web".into(),
            verdict: "deny".into(),
            address: "127.0.0.1:40100".into(),
            json: "{}".into(),
        };
        for _ in 0..MAX_WAITING + 100 {
            reporter.report(decision.clone());
        }
        assert!(reporter.dropped() >= 100);
        reporter.report(ReportedDecision { json: "x".repeat(MAX_DECISION_JSON_BYTES + 1), ..decision });
        scope.drain();
        assert_eq!(scope.finished(Duration::from_secs(5)).await, Ok(()));
    }
}
