//! The task that sends spans: OTLP over HTTP, protobuf
//! (<https://opentelemetry.io/docs/specs/otlp/#otlphttp>).

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use identity::Scope;
use identity::clock::SharedClock;
use prost::Message as _;
use tokio::sync::mpsc;

use super::endpoint::Endpoint;
use super::message::{self, ExportTraceServiceResponse};
use super::{Counts, Span};
use crate::app::{App, AppError, AppProtocol};
use crate::headers::{TRACEPARENT, TraceParent};
use crate::{Body, body, full};

/// Spans sent in one request, as OpenTelemetry's batch processor has it.
const MAX_BATCH_SPANS: usize = 512;
/// How long a span waits for others to be sent with it.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long the collector may take: OTLP exporters' default.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a batch is sent before it is given up.
const MAX_TRIES: u32 = 4;
/// The pause after the first failure; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause, whatever the collector asks for.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// How long the end of the process waits for the last spans.
const LAST_EXPORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Largest answer that is read: it says how many spans were refused, and why.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

const PROTOBUF: HeaderValue = HeaderValue::from_static("application/x-protobuf");
const AGENT: HeaderValue = HeaderValue::from_static(concat!("palisade/", env!("CARGO_PKG_VERSION")));
/// Should the collector be reached through a sidecar, what is told to it is not told to it again.
const NOT_RECORDED: TraceParent = TraceParent { trace_id: 1, span_id: 1, flags: 0 };

/// Sends batches to one collector.
pub(super) struct Exporter {
    collector: App,
    host: HeaderValue,
    target: http::Uri,
    service: String,
    clock: SharedClock,
    counts: Counts,
    scope: Scope,
    /// Whether the last batch was lost, so that a collector which is down is told of once.
    failing: bool,
}

/// What the collector says to a batch.
enum Answer {
    Taken { refused: u64, why: String },
    Failed(Failure),
}

struct Failure {
    cause: String,
    /// Whether the same batch may be taken later, and when the collector says so.
    again: Option<Option<Duration>>,
}

impl Exporter {
    pub(super) fn new(
        endpoint: &Endpoint,
        service: &str,
        clock: SharedClock,
        counts: Counts,
        scope: &Scope,
    ) -> Result<Self, http::uri::InvalidUri> {
        let Endpoint { address, host, target, .. } = endpoint;
        let collector = App::new(*address, AppProtocol::Http1, EXPORT_TIMEOUT, clock.clone(), scope)?;
        Ok(Self {
            collector,
            host: host.clone(),
            target: target.clone().into(),
            service: service.to_owned(),
            clock,
            counts,
            scope: scope.clone(),
            failing: false,
        })
    }

    /// Sends what comes, until the scope drains; then what is left. Neither what is on its way nor what is left holds
    /// the end up for longer than [`LAST_EXPORT_TIMEOUT`].
    pub(super) async fn run(mut self, mut waiting: mpsc::Receiver<Span>) {
        let (scope, clock) = (self.scope.clone(), self.clock.clone());
        let mut batch = Vec::new();
        while !scope.is_draining() {
            self.gather(&mut waiting, &mut batch).await;
            if scope.is_draining() {
                break;
            }
            let too_late = async {
                scope.draining().await;
                clock.sleep(LAST_EXPORT_TIMEOUT).await;
            };
            tokio::select! {
                () = self.send(&batch) => {}
                () = too_late => {
                    self.counts.lost.inc_by(batch.len() as u64);
                }
            }
            batch.clear();
        }
        waiting.close();
        while let Ok(span) = waiting.try_recv() {
            batch.push(span);
        }
        let mut left = batch.len() as u64;
        let last = async {
            for batch in batch.chunks(MAX_BATCH_SPANS) {
                self.send(batch).await;
                left -= batch.len() as u64;
            }
        };
        tokio::select! {
            () = last => {}
            () = clock.sleep(LAST_EXPORT_TIMEOUT) => {}
        }
        self.counts.lost.inc_by(left);
    }

    /// Waits for a first span, and then [`INTERVAL`] for others, or until the scope drains.
    async fn gather(&self, waiting: &mut mpsc::Receiver<Span>, batch: &mut Vec<Span>) {
        let mut due = None;
        while batch.len() < MAX_BATCH_SPANS {
            let elapsed = async {
                match &mut due {
                    Some(due) => due.await,
                    None => std::future::pending().await,
                }
            };
            let room = MAX_BATCH_SPANS - batch.len();
            tokio::select! {
                biased;
                () = self.scope.draining() => return,
                () = elapsed => return,
                received = waiting.recv_many(batch, room) => if received == 0 {
                    // Nobody is left who could have something to say.
                    return self.scope.draining().await;
                },
            }
            due.get_or_insert_with(|| self.clock.sleep(INTERVAL));
        }
    }

    /// Sends one batch, again if the collector may take it later; while the scope drains, once.
    async fn send(&mut self, batch: &[Span]) {
        let body = message::encode(batch, &self.service);
        let mut pause = FIRST_PAUSE;
        for tries_left in (0..MAX_TRIES).rev() {
            let Failure { cause, again } = match self.post(body.clone()).await {
                Answer::Taken { refused, why } => return self.taken(batch.len() as u64, refused, &why),
                Answer::Failed(failure) => failure,
            };
            match again {
                Some(wanted) if tries_left > 0 && !self.scope.is_draining() => {
                    tracing::debug!(cause, "the collector takes no spans; trying again");
                    tokio::select! {
                        () = self.clock.sleep(wanted.unwrap_or(pause).min(MAX_PAUSE)) => {}
                        () = self.scope.draining() => {}
                    }
                    pause *= 2;
                }
                _ => return self.gave_up(batch.len() as u64, &cause),
            }
        }
    }

    fn taken(&mut self, spans: u64, refused: u64, why: &str) {
        if std::mem::take(&mut self.failing) {
            tracing::info!("the collector takes spans again");
        }
        let refused = refused.min(spans);
        if refused > 0 {
            tracing::debug!(refused, why, "the collector refused spans");
        }
        self.counts.exported.inc_by(spans - refused);
        self.counts.lost.inc_by(refused);
    }

    fn gave_up(&mut self, spans: u64, cause: &str) {
        self.counts.lost.inc_by(spans);
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(cause, "the collector takes no spans; they are lost");
        }
    }

    async fn post(&self, spans: Bytes) -> Answer {
        let mut request = Request::new(full(spans));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.target.clone();
        let headers = request.headers_mut();
        headers.insert(HOST, self.host.clone());
        headers.insert(CONTENT_TYPE, PROTOBUF);
        headers.insert(USER_AGENT, AGENT);
        headers.insert(&TRACEPARENT, NOT_RECORDED.header_value());
        match self.collector.send(request).await {
            Ok(response) => self.read(response).await,
            Err(error @ AppError::Target) => {
                Answer::Failed(Failure { cause: error.to_string(), again: None })
            }
            Err(error) => Answer::Failed(Failure { cause: error.to_string(), again: Some(None) }),
        }
    }

    async fn read(&self, response: Response<Body>) -> Answer {
        let (head, body) = response.into_parts();
        // Read to its end, so that the connection can be used again.
        let said = body::whole(body, MAX_ANSWER_BYTES, &self.clock).await;
        if head.status.is_success() {
            let said = said.and_then(|said| ExportTraceServiceResponse::decode(said.to_bytes()).ok());
            let partial = said.and_then(|said| said.partial_success).unwrap_or_default();
            let refused = u64::try_from(partial.rejected_spans).unwrap_or(0);
            return Answer::Taken { refused, why: partial.error_message };
        }
        let again = is_passing(head.status).then(|| retry_after(&head.headers));
        Answer::Failed(Failure { cause: format!("it answers {}", head.status), again })
    }
}

/// What the specification lets an exporter send again after (OTLP/HTTP, "Retryable Response Codes").
fn is_passing(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    )
}

/// `Retry-After` in seconds; as a date it is left aside.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").field("service", &self.service).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http_body_util::{BodyExt as _, Full};
    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use identity::clock::{ManualClock, SystemClock};
    use prost::Message as _;

    use super::*;
    use crate::access::Finished;

    fn spans(count: usize) -> Vec<Span> {
        let context = TraceParent { trace_id: 1, span_id: 2, flags: 1 };
        (0..count).map(|_| Span::of(&Finished::default(), context, Duration::from_secs(1))).collect()
    }

    /// What the collector answers, first answer first: a status and a body.
    type Answers = Vec<(u16, Vec<u8>)>;

    /// A collector with these answers and an exporter to it; what is left of the answers.
    async fn exporter(answers: Answers, scope: &Scope) -> (Exporter, Arc<Mutex<Answers>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}/v1/traces", listener.local_addr().unwrap()).parse().unwrap();
        let answers = Arc::new(Mutex::new(answers));
        let (left, connections) = (Arc::clone(&answers), scope.clone());
        scope.spawn("collector", async move {
            while let Ok((stream, _)) = listener.accept().await {
                let left = Arc::clone(&left);
                let answer = service_fn(move |request: Request<Incoming>| {
                    let left = Arc::clone(&left);
                    async move {
                        let _spans = request.into_body().collect().await;
                        let (status, body) = left.lock().unwrap().remove(0);
                        let answer = Response::builder().status(status).header(RETRY_AFTER, "0");
                        Ok::<_, hyper::Error>(answer.body(Full::<Bytes>::from(body)).unwrap())
                    }
                });
                connections.spawn("collector", async move {
                    let server = hyper::server::conn::http1::Builder::new();
                    let _ended = server.serve_connection(TokioIo::new(stream), answer).await;
                });
            }
        });
        let exporter =
            Exporter::new(&endpoint, "stock", SystemClock::shared(), Counts::default(), scope).unwrap();
        (exporter, answers)
    }

    fn counted(exporter: &Exporter) -> (u64, u64) {
        (exporter.counts.exported.get(), exporter.counts.lost.get())
    }

    #[tokio::test]
    async fn what_the_collector_cannot_take_now_is_sent_again() {
        let partial = ExportTraceServiceResponse {
            partial_success: Some(message::ExportTracePartialSuccess {
                rejected_spans: 2,
                error_message: "too old".into(),
            }),
        };
        let scope = Scope::new();
        let answers = vec![(503, Vec::new()), (429, Vec::new()), (200, partial.encode_to_vec())];
        let (mut exporter, left) = exporter(answers, &scope).await;
        exporter.send(&spans(5)).await;
        assert_eq!(counted(&exporter), (3, 2));
        assert!(left.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_it_will_never_take_or_refuses_too_often_is_lost() {
        let scope = Scope::new();
        let busy = (0..MAX_TRIES).map(|_| (503, Vec::new()));
        let answers = [(400, Vec::new())].into_iter().chain(busy).chain([(200, Vec::new())]).collect();
        let (mut exporter, left) = exporter(answers, &scope).await;
        exporter.send(&spans(1)).await;
        assert_eq!((counted(&exporter), exporter.failing), ((0, 1), true));
        exporter.send(&spans(1)).await;
        assert_eq!((counted(&exporter), exporter.failing), ((0, 2), true));
        exporter.send(&spans(1)).await;
        assert_eq!((counted(&exporter), exporter.failing), ((1, 2), false));
        assert!(left.lock().unwrap().is_empty());
    }

    /// Connections are accepted and nothing is answered.
    fn hanging(scope: &Scope) -> (std::net::TcpListener, Arc<ManualClock>, Exporter) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let clock = ManualClock::at(Duration::from_secs(1));
        let shared = Arc::clone(&clock) as SharedClock;
        let exporter = Exporter::new(&endpoint, "stock", shared, Counts::default(), scope).unwrap();
        (listener, clock, exporter)
    }

    #[tokio::test]
    async fn spans_wait_for_others_but_not_for_long() {
        let scope = Scope::new();
        let (_listener, clock, exporter) = hanging(&scope);
        let (queue, mut waiting) = mpsc::channel(MAX_BATCH_SPANS + 1);
        let mut batch = Vec::new();
        for span in spans(MAX_BATCH_SPANS + 1) {
            queue.try_send(span).unwrap();
        }
        exporter.gather(&mut waiting, &mut batch).await;
        assert_eq!(batch.len(), MAX_BATCH_SPANS);
        batch.clear();
        tokio::join!(exporter.gather(&mut waiting, &mut batch), async {
            tokio::task::yield_now().await;
            clock.advance(INTERVAL);
        });
        assert_eq!(batch.len(), 1);
    }

    /// Lets `task` go on while less time passes than a collector may take; whether it ended.
    async fn ends_soon(task: impl Future<Output = ()>, clock: &ManualClock) -> bool {
        let time_passes = async {
            for _ in 0..EXPORT_TIMEOUT.as_secs() / 2 - 1 {
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                clock.advance(Duration::from_secs(1));
            }
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            () = task => true,
            () = time_passes => false,
        }
    }

    #[tokio::test]
    async fn the_end_waits_for_no_collector_and_counts_what_it_did_not_take() {
        let scope = Scope::new();
        let (_listener, clock, exporter) = hanging(&scope);
        let lost = exporter.counts.lost.clone();
        let (queue, waiting) = mpsc::channel(1000);
        for span in spans(600) {
            queue.try_send(span).unwrap();
        }
        scope.drain();
        assert!(ends_soon(exporter.run(waiting), &clock).await);
        assert_eq!(lost.get(), 600);
    }

    #[tokio::test]
    async fn a_batch_on_its_way_is_not_waited_for_either() {
        let scope = Scope::new();
        let (_listener, clock, exporter) = hanging(&scope);
        let lost = exporter.counts.lost.clone();
        let (queue, waiting) = mpsc::channel(1000);
        for span in spans(MAX_BATCH_SPANS) {
            queue.try_send(span).unwrap();
        }
        let mut running = Box::pin(exporter.run(waiting));
        assert!(!ends_soon(&mut running, &clock).await, "it waits for the collector");
        scope.drain();
        assert!(ends_soon(running, &clock).await);
        assert_eq!(lost.get(), MAX_BATCH_SPANS as u64);
    }
}
