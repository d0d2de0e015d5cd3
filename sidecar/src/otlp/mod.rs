//! Traces: a span a recorded request, to an OpenTelemetry collector on this machine.
//!
//! A request whose trace is recorded leaves a [`Span`] in a bounded queue as it ends, and waits for nobody: a full
//! queue drops it and counts it. A task of its own ([`export`]) gathers batches and posts them, OTLP over HTTP with
//! protobuf. The span ends with the head of the answer, as everywhere here.

mod endpoint;
mod export;
mod message;

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use identity::Scope;
use identity::clock::SharedClock;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::access::Finished;
use crate::headers::TraceParent;
use crate::metrics::Direction;
use crate::trace::{Share, Spans};

pub use endpoint::{Endpoint, EndpointError};
use export::Exporter;

/// Spans waiting to be sent, as OpenTelemetry's batch processor has it: at most 20 MiB.
const MAX_WAITING_SPANS: usize = 2048;
/// Longest text of one attribute; a target may be of any length.
const MAX_TEXT_BYTES: usize = 2048;

/// Where spans go, and of which requests there are some.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TracesConfig {
    /// The collector.
    pub endpoint: Endpoint,
    /// Which share of the traces that begin here is recorded; the others are recorded if their caller's are.
    pub sample: Share,
}

/// What requests tell of themselves.
#[derive(Debug)]
pub struct Traces {
    spans: Arc<Spans>,
    queue: mpsc::Sender<Span>,
    counts: Counts,
}

/// What became of spans.
#[derive(Debug, Clone, Default)]
struct Counts {
    exported: Counter,
    lost: Counter,
}

impl Traces {
    /// Begins to send what [`Traces::show`] is shown, in the name of `service`. The task is one of `scope`, and sends
    /// what is left when that drains: drain it last.
    ///
    /// # Errors
    /// The collector's address is none that requests can be sent to.
    pub fn start(
        config: &TracesConfig,
        service: &str,
        spans: Arc<Spans>,
        clock: SharedClock,
        registry: &mut Registry,
        scope: &Scope,
    ) -> Result<Self, http::uri::InvalidUri> {
        let counts = Counts::default();
        registry.register("exported_spans", "Spans that the collector took", counts.exported.clone());
        registry.register("lost_spans", "Spans that the collector never took", counts.lost.clone());
        let (queue, waiting) = mpsc::channel(MAX_WAITING_SPANS);
        let exporter = Exporter::new(&config.endpoint, service, clock, counts.clone(), scope)?;
        scope.spawn_critical("traces", exporter.run(waiting));
        Ok(Self { spans, queue, counts })
    }

    /// Keeps the span of a request that ended at `now`, if its trace is recorded.
    pub fn show(&self, seen: &Finished<'_>, now: Duration) {
        // A request that ended early has no span yet.
        let context = seen.trace.span.unwrap_or_else(|| self.spans.child(seen.trace.parent));
        if context.is_sampled() && self.queue.try_send(Span::of(seen, context, now)).is_err() {
            self.counts.lost.inc();
        }
    }
}

/// One request, as it waits to be sent.
#[derive(Debug)]
struct Span {
    context: TraceParent,
    parent: Option<TraceParent>,
    direction: Direction,
    /// In time since the Unix epoch.
    began: Duration,
    ended: Duration,
    method: Method,
    path: Box<str>,
    route: Box<str>,
    peer: Box<str>,
    service: Box<str>,
    verdict: Box<str>,
    rule: Box<str>,
    receipt: Box<str>,
    status: StatusCode,
    note: Box<str>,
}

impl Span {
    fn of(seen: &Finished<'_>, context: TraceParent, now: Duration) -> Self {
        Self {
            context,
            parent: seen.trace.parent,
            direction: seen.direction,
            began: now.saturating_sub(seen.took),
            ended: now,
            method: seen.method.clone(),
            path: bounded(seen.path),
            route: bounded(seen.route),
            peer: bounded(seen.peer),
            service: bounded(seen.service),
            verdict: bounded(seen.verdict),
            rule: shown(seen.rule),
            receipt: bounded(seen.receipt),
            status: seen.status,
            note: shown(seen.note),
        }
    }
}

fn shown(text: &dyn Display) -> Box<str> {
    bounded(&text.to_string())
}

fn bounded(text: &str) -> Box<str> {
    let end = (0..=text.len().min(MAX_TEXT_BYTES)).rev().find(|end| text.is_char_boundary(*end));
    text.get(..end.unwrap_or(0)).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Place;

    fn traces() -> (Traces, mpsc::Receiver<Span>) {
        let (queue, waiting) = mpsc::channel(MAX_WAITING_SPANS);
        let spans = Arc::new(Spans::new(identity::random::system(), Share::new(0.0).unwrap()));
        (Traces { spans, queue, counts: Counts::default() }, waiting)
    }

    fn finished(flags: Option<u8>) -> Finished<'static> {
        let parent = flags.map(|flags| TraceParent { trace_id: 7, span_id: 8, flags });
        Finished { trace: Place { parent, span: None }, ..Finished::default() }
    }

    #[test]
    fn only_recorded_requests_leave_a_span() {
        let (traces, mut waiting) = traces();
        for flags in [None, Some(0), Some(1)] {
            traces.show(&finished(flags), Duration::from_secs(1));
        }
        let span = waiting.try_recv().unwrap();
        assert_eq!((span.context.trace_id, span.parent.unwrap().span_id), (7, 8));
        assert_ne!(span.context.span_id, 8);
        assert!(waiting.try_recv().is_err());
    }

    #[test]
    fn a_full_queue_loses_spans_and_counts_them() {
        let (traces, mut waiting) = traces();
        for _ in 0..MAX_WAITING_SPANS + 3 {
            traces.show(&finished(Some(1)), Duration::from_secs(1));
        }
        assert_eq!(traces.counts.lost.get(), 3);
        let kept = std::iter::from_fn(|| waiting.try_recv().ok()).count();
        assert_eq!(kept, MAX_WAITING_SPANS);
    }

    #[test]
    fn texts_are_bounded_between_characters() {
        let long = "é".repeat(MAX_TEXT_BYTES);
        assert_eq!(bounded(&format!("/{long}")).len(), MAX_TEXT_BYTES - 1);
        assert_eq!(&*bounded("/a"), "/a");
    }
}
