//! Decisions on their way from workloads to control: stamped, queued, sent in batches, kept while
//! control is away.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use identity::clock::SharedClock;
use identity::{Scope, SpiffeId};

use super::log::DecisionLog;
use super::upstream::{self, Upstream};
use crate::backoff::Backoff;
use crate::control::{MAX_DECISION_FIELD_BYTES, MAX_DECISION_JSON_BYTES, MAX_REPORT_BATCH};
use crate::pb;
use crate::random::SharedRandom;

/// Most memory that waiting decisions may take: some minutes of a busy host's denials. Above, the oldest
/// are dropped and counted.
const MAX_QUEUE_BYTES: usize = 16 * 1024 * 1024;
/// Most bytes in one batch to control, below the size of a request that it takes.
const MAX_BATCH_BYTES: usize = 512 * 1024;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Decisions that wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    news: Notify,
    log: Option<DecisionLog>,
}

#[derive(Debug, Default)]
struct Waiting {
    decisions: VecDeque<pb::control::Decision>,
    bytes: usize,
    dropped: u64,
}

impl Waiting {
    fn trim(&mut self) {
        while self.bytes > MAX_QUEUE_BYTES {
            let Some(oldest) = self.decisions.pop_front() else { break };
            self.bytes -= size(&oldest);
            self.dropped += 1;
        }
    }
}

impl Queue {
    /// One whose decisions are written down on this host, too.
    pub(super) fn new(log: Option<DecisionLog>) -> Self {
        Self { log, ..Self::default() }
    }

    /// Takes decisions of the workload `reporter` in, and how many it had to drop itself. Malformed ones
    /// are counted as dropped: control would refuse them. Returns how many were taken.
    pub(super) fn push(&self, decisions: Vec<pb::mesh::Decision>, reporter: &SpiffeId, dropped: u64) -> u64 {
        let mut accepted = 0;
        let mut waiting = self.lock();
        waiting.dropped = waiting.dropped.saturating_add(dropped);
        for decision in decisions {
            let fields = [&decision.receipt, &decision.service, &decision.verdict, &decision.address];
            let fits = fields.iter().all(|field| field.len() <= MAX_DECISION_FIELD_BYTES)
                && decision.json.len() <= MAX_DECISION_JSON_BYTES;
            if !fits {
                waiting.dropped += 1;
                continue;
            }
            let stamped = pb::control::Decision {
                receipt: decision.receipt,
                time_ms: decision.time_ms,
                service: decision.service,
                verdict: decision.verdict,
                address: decision.address,
                json: decision.json,
                reporter: reporter.to_string(),
            };
            if let Some(log) = &self.log {
                log.write(&stamped);
            }
            waiting.bytes += size(&stamped);
            waiting.decisions.push_back(stamped);
            accepted += 1;
        }
        waiting.trim();
        drop(waiting);
        self.news.notify_one();
        accepted
    }

    /// The next batch and the count of those dropped; `None` if there is neither.
    pub(super) fn take(&self) -> Option<(Vec<pb::control::Decision>, u64)> {
        let mut waiting = self.lock();
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < MAX_REPORT_BATCH && bytes < MAX_BATCH_BYTES {
            let Some(decision) = waiting.decisions.pop_front() else { break };
            bytes += size(&decision);
            batch.push(decision);
        }
        waiting.bytes -= bytes;
        let dropped = std::mem::take(&mut waiting.dropped);
        (!batch.is_empty() || dropped > 0).then_some((batch, dropped))
    }

    /// Gives a batch back that could not be sent.
    fn put_back(&self, batch: Vec<pb::control::Decision>, dropped: u64) {
        let mut waiting = self.lock();
        waiting.dropped = waiting.dropped.saturating_add(dropped);
        for decision in batch.into_iter().rev() {
            waiting.bytes += size(&decision);
            waiting.decisions.push_front(decision);
        }
        waiting.trim();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a decision takes, near enough.
fn size(decision: &pb::control::Decision) -> usize {
    const OVERHEAD_BYTES: usize = 256;
    OVERHEAD_BYTES
        + decision.receipt.len()
        + decision.service.len()
        + decision.verdict.len()
        + decision.address.len()
        + decision.json.len()
        + decision.reporter.len()
}

/// Sends what is queued to control for as long as the scope lives.
pub(super) async fn forward(
    queue: Arc<Queue>,
    upstream: Arc<Upstream>,
    clock: SharedClock,
    random: SharedRandom,
    scope: Scope,
) {
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    loop {
        let Some((decisions, dropped)) = queue.take() else {
            tokio::select! {
                () = queue.news.notified() => continue,
                () = scope.draining() => return,
            }
        };
        let request = pb::control::ReportRequest { decisions: decisions.clone(), dropped };
        let mut client = upstream.client();
        let outcome = tokio::select! {
            outcome = upstream::within(&clock, CALL_TIMEOUT, client.report(request)) => outcome,
            () = scope.draining() => return,
        };
        match outcome {
            Ok(answer) => {
                backoff.reset();
                let refused = answer.into_inner().refused;
                if refused > 0 {
                    tracing::warn!(refused, "control refused malformed decisions");
                }
            }
            // No retry mends a request that control cannot read.
            Err(status) if status.code() == tonic::Code::InvalidArgument => {
                tracing::error!(error = upstream::describe(&status), "control refused a batch of decisions");
                queue.put_back(Vec::new(), dropped + decisions.len() as u64);
            }
            Err(status) => {
                queue.put_back(decisions, dropped);
                let wait = backoff.wait(&*random);
                tracing::debug!(error = upstream::describe(&status), retry_in = ?wait, "decisions are kept");
                tokio::select! {
                    () = clock.sleep(wait) => {}
                    () = scope.draining() => return,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(receipt: &str, json: String) -> pb::mesh::Decision {
        pb::mesh::Decision { receipt: receipt.into(), json, ..Default::default() }
    }

    fn web() -> SpiffeId {
        SpiffeId::new("spiffe://bank.example/service/web").unwrap()
    }

    #[test]
    fn the_reporter_is_stamped_and_the_order_kept_over_a_failed_attempt() {
        let queue = Queue::default();
        assert!(queue.take().is_none());
        let all = (0..300).map(|n| decision(&n.to_string(), "{}".into())).collect();
        assert_eq!(queue.push(all, &web(), 2), 300);
        let (batch, dropped) = queue.take().unwrap();
        assert_eq!((batch.len(), dropped), (MAX_REPORT_BATCH, 2));
        assert!(batch.iter().all(|decision| decision.reporter == "spiffe://bank.example/service/web"));
        queue.put_back(batch, dropped);
        let (again, dropped) = queue.take().unwrap();
        assert_eq!((again[0].receipt.as_str(), dropped), ("0", 2));
        assert_eq!(queue.take().unwrap().0[0].receipt, "256");
        assert!(queue.take().is_none());
        assert_eq!(queue.lock().bytes, 0);
    }

    #[test]
    fn a_full_queue_drops_the_oldest_and_counts_them() {
        let queue = Queue::default();
        for n in 0..1200 {
            queue.push(vec![decision(&n.to_string(), "x".repeat(MAX_DECISION_JSON_BYTES))], &web(), 0);
        }
        assert!(queue.lock().bytes <= MAX_QUEUE_BYTES);
        let (batch, dropped) = queue.take().unwrap();
        assert!(dropped > 0);
        assert_eq!(batch[0].receipt, dropped.to_string());
    }

    #[test]
    fn oversized_decisions_are_not_taken() {
        let queue = Queue::default();
        let big = decision("r", "x".repeat(MAX_DECISION_JSON_BYTES + 1));
        let long = decision(&"r".repeat(MAX_DECISION_FIELD_BYTES + 1), "{}".into());
        assert_eq!(queue.push(vec![big, long, decision("r", "{}".into())], &web(), 0), 1);
        assert_eq!(queue.take().unwrap().1, 2);
    }
}
