//! Spans as OTLP writes them, named by the semantic conventions for HTTP
//! (<https://opentelemetry.io/docs/specs/semconv/http/http-spans/>).

use std::time::Duration;

use bytes::Bytes;
use http::Method;
use prost::Message as _;

use super::Span;
use crate::metrics::Direction;

/// Types generated from `proto/`.
#[expect(unreachable_pub, reason = "generated code")]
mod generated {
    tonic::include_proto!("opentelemetry.proto");
}

#[cfg(test)]
pub(super) use generated::ExportTracePartialSuccess;
pub(super) use generated::ExportTraceServiceResponse;
use generated::any_value::Value;
use generated::span::SpanKind;
use generated::status::StatusCode;
use generated::{
    AnyValue, ExportTraceServiceRequest, InstrumentationScope, KeyValue, Resource, ResourceSpans, ScopeSpans,
    Status,
};

/// The parent is known to be in another process.
const PARENT_IS_REMOTE: u32 = 0x300;
/// It is known that there is none.
const NO_REMOTE_PARENT: u32 = 0x100;

/// A request to the collector: these spans of `service`.
pub(super) fn encode(spans: &[Span], service: &str) -> Bytes {
    let scope = InstrumentationScope { name: "palisade".into(), version: env!("CARGO_PKG_VERSION").into() };
    let spans = ScopeSpans { scope: Some(scope), spans: spans.iter().map(span).collect() };
    let resource = Resource { attributes: vec![text("service.name", service)] };
    let resource_spans = ResourceSpans { resource: Some(resource), scope_spans: vec![spans] };
    ExportTraceServiceRequest { resource_spans: vec![resource_spans] }.encode_to_vec().into()
}

fn span(span: &Span) -> generated::Span {
    let kind = match span.direction {
        Direction::Inbound => SpanKind::Server,
        Direction::Outbound => SpanKind::Client,
        // The request itself is served by the proxy that asks.
        Direction::ExtAuthz => SpanKind::Internal,
    };
    let method = known(&span.method);
    // `HTTP` where the method could be anything, so that names stay few.
    let shown = method.unwrap_or("HTTP");
    let name = route(span).map_or_else(|| shown.to_owned(), |route| format!("{shown} {route}"));
    generated::Span {
        trace_id: span.context.trace_id.to_be_bytes().to_vec(),
        span_id: span.context.span_id.to_be_bytes().to_vec(),
        parent_span_id: span.parent.map(|parent| parent.span_id.to_be_bytes().to_vec()).unwrap_or_default(),
        name,
        kind: kind.into(),
        start_time_unix_nano: nanos(span.began),
        end_time_unix_nano: nanos(span.ended),
        attributes: attributes(span, kind, method),
        status: Some(status(span, kind)),
        flags: u32::from(span.context.flags)
            | if span.parent.is_some() { PARENT_IS_REMOTE } else { NO_REMOTE_PARENT },
    }
}

fn attributes(span: &Span, kind: SpanKind, method: Option<&str>) -> Vec<KeyValue> {
    let mut attributes = vec![text("http.request.method", method.unwrap_or("_OTHER"))];
    if method.is_none() {
        attributes.push(text("http.request.method_original", span.method.as_str()));
    }
    if kind == SpanKind::Client {
        // Between sidecars everything is TLS, and a service is called by its name. No query: it may hold secrets.
        attributes.push(text("server.address", &span.service));
        attributes.push(number("server.port", 443));
        attributes.push(text("url.full", &format!("https://{}{}", span.service, span.path)));
    } else {
        attributes.push(text("url.scheme", "https"));
        attributes.push(text("url.path", &span.path));
    }
    // Outbound, `error` says that there was no answer but our own.
    if !(kind == SpanKind::Client && &*span.verdict == "error") {
        attributes.push(number("http.response.status_code", span.status.as_u16().into()));
    }
    if is_error(span, kind) {
        attributes.push(text("error.type", span.status.as_str()));
    }
    if let Some(route) = route(span) {
        attributes.push(text("http.route", route));
    }
    for (key, value) in [
        ("palisade.peer", &span.peer),
        ("palisade.verdict", &span.verdict),
        ("palisade.rule", &span.rule),
        ("palisade.receipt", &span.receipt),
    ] {
        if !value.is_empty() {
            attributes.push(text(key, value));
        }
    }
    attributes
}

fn status(span: &Span, kind: SpanKind) -> Status {
    if is_error(span, kind) {
        Status { message: span.note.to_string(), code: StatusCode::Error.into() }
    } else {
        Status { message: String::new(), code: StatusCode::Unset.into() }
    }
}

/// A refusal is the caller's error, not the server's.
fn is_error(span: &Span, kind: SpanKind) -> bool {
    span.status.is_server_error() || (kind == SpanKind::Client && span.status.is_client_error())
}

/// The route's path template; ours begin with the method.
fn route(span: &Span) -> Option<&str> {
    span.route.split_once(' ').map(|(_, path)| path)
}

/// The methods that the conventions know.
fn known(method: &Method) -> Option<&str> {
    let known = [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::CONNECT,
        Method::OPTIONS,
        Method::TRACE,
        Method::PATCH,
    ];
    known.contains(method).then(|| method.as_str())
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, Value::StringValue(value.to_owned()))
}

fn number(key: &str, value: i64) -> KeyValue {
    attribute(key, Value::IntValue(value))
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Finished;
    use crate::headers::TraceParent;

    fn written(seen: &Finished<'_>) -> generated::Span {
        let context = TraceParent { trace_id: 1, span_id: 2, flags: 1 };
        span(&Span::of(seen, context, Duration::from_secs(1)))
    }

    fn value<'a>(span: &'a generated::Span, key: &str) -> Option<&'a Value> {
        let found = span.attributes.iter().find(|attribute| attribute.key == key)?;
        found.value.as_ref()?.value.as_ref()
    }

    fn said(text: &str) -> Value {
        Value::StringValue(text.to_owned())
    }

    #[test]
    fn a_decision_for_an_envoy_is_internal_and_an_unknown_method_is_in_no_name() {
        let method = Method::from_bytes(b"PURGE").unwrap();
        let span = written(&Finished {
            direction: Direction::ExtAuthz,
            method: &method,
            route: "PURGE /cache/{id:int}",
            ..Finished::default()
        });
        assert_eq!((span.kind(), span.name.as_str()), (SpanKind::Internal, "HTTP /cache/{id:int}"));
        assert_eq!(value(&span, "http.request.method"), Some(&said("_OTHER")));
        assert_eq!(value(&span, "http.request.method_original"), Some(&said("PURGE")));
        assert_eq!((span.parent_span_id.len(), span.flags), (0, 0x101));
    }

    #[test]
    fn a_call_without_an_answer_has_no_status_but_an_error() {
        let span = written(&Finished {
            direction: Direction::Outbound,
            service: "stock",
            verdict: "error",
            status: http::StatusCode::SERVICE_UNAVAILABLE,
            note: &"no endpoint could be reached",
            ..Finished::default()
        });
        assert_eq!(value(&span, "http.response.status_code"), None);
        assert_eq!(value(&span, "error.type"), Some(&said("503")));
        let status = span.status.unwrap();
        assert_eq!(
            (status.code(), status.message.as_str()),
            (StatusCode::Error, "no endpoint could be reached")
        );
    }
}
