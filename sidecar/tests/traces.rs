//! Spans of both sides of a call, as an independent collector (Python's opentelemetry-proto) reads them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

#[allow(dead_code, reason = "shared with other tests")]
mod pair;

use std::path::Path;
use std::process::Stdio;

use pair::Pair;
use serde_json::{Value, json};
use sidecar::SidecarConfig;
use sidecar::otlp::TracesConfig;
use sidecar::trace::Share;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// An app whose tracing says whether this trace is recorded.
fn traceparent(recorded: bool) -> String {
    format!("00-{TRACE}-{CALLER}-0{}", u8::from(recorded))
}

fn traces(port: u16, sample: f64) -> impl Fn(SidecarConfig) -> SidecarConfig {
    let endpoint = format!("http://127.0.0.1:{port}/v1/traces").parse().unwrap();
    let traces = TracesConfig { endpoint, sample: Share::new(sample).unwrap() };
    move |config| SidecarConfig { traces: Some(traces.clone()), ..config }
}

struct Collector {
    port: u16,
    spans: Lines<BufReader<ChildStdout>>,
    /// Ends it when dropped.
    input: ChildStdin,
    process: Child,
}

impl Collector {
    async fn start() -> Option<Self> {
        let probe = "import opentelemetry.proto.collector.trace.v1.trace_service_pb2";
        let probed = Command::new("python3").args(["-c", probe]).stderr(Stdio::null()).status().await;
        if !probed.is_ok_and(|status| status.success()) {
            identity::testing::skip(
                "python3 cannot import opentelemetry.proto (pip install opentelemetry-proto)",
            );
            return None;
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/otlp_collector.py");
        let mut process = Command::new("python3")
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (input, output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let mut spans = BufReader::new(output).lines();
        let port = spans.next_line().await.unwrap().expect("the collector says its port").parse().unwrap();
        Some(Self { port, spans, input, process })
    }

    /// What arrived: `SPAN_KIND_SERVER` before `SPAN_KIND_CLIENT`, in the order of their beginnings.
    async fn end(mut self) -> Vec<Value> {
        drop(self.input);
        let mut spans = Vec::new();
        while let Some(line) = self.spans.next_line().await.unwrap() {
            let span: Value = serde_json::from_str(&line).unwrap();
            spans.push(span);
        }
        assert!(self.process.wait().await.unwrap().success());
        spans.sort_by_key(|span| (span["kind"] == "SPAN_KIND_CLIENT", span["start"].as_u64()));
        spans
    }
}

#[tokio::test]
async fn a_recorded_call_is_one_span_on_either_side_and_the_trace_goes_on_under_the_last() {
    let Some(collector) = Collector::start().await else { return };
    let pair = Pair::changed(traces(collector.port, 0.0)).await;
    let (status, app_saw) = pair.call("/items/17", &[("traceparent", &traceparent(true))]).await;
    assert_eq!(status, 200);
    pair.end().await;

    let spans = collector.end().await;
    let [server, client] = spans.as_slice() else { panic!("{spans:#?}") };
    // Who is whose child; what the app got has our span as its parent.
    assert_eq!((&client["trace_id"], &server["trace_id"]), (&json!(TRACE), &json!(TRACE)));
    assert_eq!(client["parent_span_id"], CALLER);
    assert_eq!(server["parent_span_id"], client["span_id"]);
    assert_eq!(app_saw, format!("00-{TRACE}-{}-01", server["span_id"].as_str().unwrap()));
    assert_eq!((&client["flags"], &server["flags"]), (&json!(0x301), &json!(0x301)));
    assert!(client["start"].as_u64() <= server["start"].as_u64());
    assert!(server["start"].as_u64() < server["end"].as_u64());

    assert_eq!(
        (&server["kind"], &server["name"]),
        (&json!("SPAN_KIND_SERVER"), &json!("GET /items/{id:slug}"))
    );
    assert_eq!(
        (&server["scope"], &server["resource"]),
        (&json!("palisade"), &json!({"service.name": "stock"}))
    );
    let receipt = &server["attributes"]["palisade.receipt"];
    assert!(receipt.as_str().unwrap().starts_with("r-"), "{receipt}");
    let attributes = json!({
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "http.route": "/items/{id:slug}",
        "palisade.peer": "spiffe://shop.example/service/web",
        "palisade.receipt": receipt,
        "palisade.rule": server["attributes"]["palisade.rule"],
        "palisade.verdict": "allow",
        "url.path": "/items/17",
        "url.scheme": "https",
    });
    assert_eq!(server["attributes"], attributes);
    assert!(server["attributes"]["palisade.rule"].as_str().unwrap().contains("web-reads"), "{server:#}");
    assert_eq!(server["status"], "STATUS_CODE_UNSET");

    assert_eq!((&client["kind"], &client["name"]), (&json!("SPAN_KIND_CLIENT"), &json!("GET")));
    assert_eq!(client["resource"], json!({"service.name": "web"}));
    let attributes = json!({
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "palisade.peer": "spiffe://shop.example/service/stock",
        "server.address": "stock",
        "server.port": 443,
        "url.full": "https://stock/items/17",
    });
    assert_eq!(client["attributes"], attributes);
    let posted = &client["posted"];
    assert_eq!((&posted["path"], &posted["type"]), (&json!("/v1/traces"), &json!("application/x-protobuf")));
    assert!(posted["traceparent"].as_str().unwrap().ends_with("-00"), "what is told is not told again");
}

#[tokio::test]
async fn refusals_and_failures_have_spans_too() {
    let Some(collector) = Collector::start().await else { return };
    let pair = Pair::changed(traces(collector.port, 1.0)).await;
    // Nobody says anything of a trace here: both begin and are recorded.
    assert_eq!(pair.call("/items/secret", &[]).await.0, 403);
    assert_eq!(pair.call("/items/17?token=secret", &[]).await.0, 400);
    pair.end().await;

    let spans = collector.end().await;
    let [denied, malformed, client, second] = spans.as_slice() else { panic!("{spans:#?}") };
    let attributes = &denied["attributes"];
    assert_eq!(
        (&attributes["palisade.verdict"], &attributes["http.response.status_code"]),
        (&json!("deny"), &json!(403)),
        "{denied:#}"
    );
    assert!(attributes["palisade.rule"].is_string() && attributes["palisade.receipt"].is_string());
    // The caller's error and not the server's.
    assert_eq!((&denied["status"], &attributes["error.type"]), (&json!("STATUS_CODE_UNSET"), &Value::Null));
    assert_eq!(
        (&client["status"], &client["attributes"]["error.type"]),
        (&json!("STATUS_CODE_ERROR"), &json!("403"))
    );
    assert_eq!((&client["parent_span_id"], &client["flags"]), (&json!(""), &json!(0x101)));
    assert_eq!(denied["parent_span_id"], client["span_id"]);
    // Queries may hold what no collector should have.
    assert_eq!((&malformed["name"], &malformed["attributes"]["http.route"]), (&json!("GET"), &Value::Null));
    assert_eq!(malformed["attributes"]["url.path"], "/items/17");
    assert_eq!(second["attributes"]["url.full"], "https://stock/items/17");
}

#[tokio::test]
async fn what_the_caller_does_not_record_leaves_no_span() {
    let Some(collector) = Collector::start().await else { return };
    let pair = Pair::changed(traces(collector.port, 1.0)).await;
    let (status, app_saw) = pair.call("/items/17", &[("traceparent", &traceparent(false))]).await;
    assert_eq!(status, 200);
    assert!(app_saw.starts_with(&format!("00-{TRACE}-")) && app_saw.ends_with("-00"), "{app_saw}");
    assert_eq!(pair.call("/items/secret", &[("traceparent", &traceparent(false))]).await.0, 403);
    pair.end().await;
    assert_eq!(collector.end().await, Vec::<Value>::new());
}

/// It accepts connections and says nothing, ever.
#[tokio::test]
async fn a_collector_that_hangs_touches_no_request_and_no_drain() {
    let hanging = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = Pair::changed(traces(hanging.local_addr().unwrap().port(), 1.0)).await;
    for _ in 0..50 {
        assert_eq!(pair.call("/items/17", &[]).await.0, 200);
    }
    assert!(pair.get(pair.stock_admin, "/metrics", &[]).await.1.contains("palisade_lost_spans_total 0"));
    pair.end().await;
}
