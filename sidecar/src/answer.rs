//! Answers that the sidecar gives itself: terse to the peer, full in the log.

use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};

use crate::{Body, full, grpc};

/// A JSON answer that no cache keeps.
pub(crate) fn json(status: StatusCode, body: impl Into<bytes::Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A refusal of what may be tried again in a moment.
pub(crate) fn unavailable(error: &'static str) -> Response<Body> {
    let mut response =
        json(StatusCode::SERVICE_UNAVAILABLE, serde_json::json!({ "error": error }).to_string());
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// A denial: the peer hears the receipt and nothing else.
pub(crate) fn denied(denial: &policy::Denial) -> Response<Body> {
    json(status_of(denial), denial.response_body())
}

/// A denial's status.
pub(crate) fn status_of(denial: &policy::Denial) -> StatusCode {
    StatusCode::from_u16(denial.status()).unwrap_or(StatusCode::FORBIDDEN)
}

/// What the caller of a gRPC call hears of a denial.
pub(crate) fn denied_words(denial: &policy::Denial) -> String {
    format!("denied, receipt {}", denial.receipt())
}

/// A failure on the way to `service`. The cause stays in the log, except where the caller is the app
/// beside us and can do something about it.
pub(crate) fn failed(status: StatusCode, service: &str, cause: &dyn std::fmt::Display) -> Response<Body> {
    tracing::info!(service, %cause, status = status.as_u16(), "request failed");
    let mut response = json(status, failure(status, service));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// What the caller hears of a failure.
pub(crate) fn failure(status: StatusCode, service: &str) -> String {
    serde_json::json!({ "error": word(status), "service": service }).to_string()
}

/// A denial of a gRPC call.
pub(crate) fn denied_call(denial: &policy::Denial) -> Response<Body> {
    grpc::failed(status_of(denial), &denied_words(denial))
}

/// A gRPC call's failure on the way to `service`.
pub(crate) fn failed_call(status: StatusCode, service: &str) -> Response<Body> {
    grpc::failed(status, &format!("{}: {service}", word(status)))
}

fn word(status: StatusCode) -> &'static str {
    match status {
        StatusCode::FORBIDDEN => "denied",
        StatusCode::BAD_REQUEST => "bad_request",
        StatusCode::GATEWAY_TIMEOUT => "timeout",
        StatusCode::BAD_GATEWAY => "bad_gateway",
        StatusCode::PAYLOAD_TOO_LARGE => "too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limited",
        _ => "unavailable",
    }
}
