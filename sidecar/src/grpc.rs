//! gRPC calls: what marks one, and how one is refused so that its caller understands.
//!
//! A client library takes any answer but 200 for trouble with a proxy and guesses a status from the number
//! ("HTTP to gRPC Status Code Mapping"); a refusal is therefore what a server would send, a head with
//! `grpc-status` and nothing behind it (gRPC over HTTP/2, "Responses": Trailers-Only).

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use crate::Body;

const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// All but printable ASCII is encoded, and what begins an encoded byte (gRPC over HTTP/2, "Responses").
const ENCODED: &AsciiSet = &CONTROLS.add(b'%');

/// DEADLINE_EXCEEDED.
pub(crate) const DEADLINE_EXCEEDED: u8 = 4;
/// UNAVAILABLE.
pub(crate) const UNAVAILABLE: u8 = 14;

/// Whether a request is a gRPC call, by its content type.
pub fn is_call(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    kind.strip_prefix(b"application/grpc")
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// The answer to a call that fails here, for a reason that is `status` over plain HTTP.
pub(crate) fn failed(status: StatusCode, message: &str) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response.headers_mut().extend(trailers(code(status), message));
    response
}

/// What a call ends with.
pub(crate) fn trailers(code: u8, message: &str) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(2);
    trailers.insert(STATUS, HeaderValue::from(u16::from(code)));
    let message = utf8_percent_encode(message, ENCODED).to_string();
    if let Ok(message) = HeaderValue::try_from(message) {
        trailers.insert(MESSAGE, message);
    }
    trailers
}

/// The status of an answer: of one that is a refusal of a call and nothing else, what it would be over plain HTTP.
pub(crate) fn status(response: &Response<Body>) -> StatusCode {
    let refusal = response.headers().get(STATUS).filter(|_| response.status() == StatusCode::OK);
    match refusal.map(HeaderValue::as_bytes) {
        None | Some(b"0") => response.status(),
        Some(b"1") => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Some(b"3" | b"9" | b"11") => StatusCode::BAD_REQUEST,
        Some(b"4") => StatusCode::GATEWAY_TIMEOUT,
        Some(b"5") => StatusCode::NOT_FOUND,
        Some(b"6" | b"10") => StatusCode::CONFLICT,
        Some(b"7") => StatusCode::FORBIDDEN,
        Some(b"8") => StatusCode::TOO_MANY_REQUESTS,
        Some(b"12") => StatusCode::NOT_IMPLEMENTED,
        Some(b"14") => StatusCode::SERVICE_UNAVAILABLE,
        Some(b"16") => StatusCode::UNAUTHORIZED,
        Some(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The status of a call that fails for a reason that is `status` over plain HTTP.
pub(crate) fn code(status: StatusCode) -> u8 {
    match status.as_u16() {
        400 => 3,
        401 => 16,
        403 => 7,
        404 | 405 | 501 => 12,
        413 | 429 => 8,
        502 | 503 => UNAVAILABLE,
        408 | 504 => DEADLINE_EXCEEDED,
        500 => 13,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_by_their_type() {
        let is_call = |kind: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            is_call(&headers)
        };
        assert!(
            is_call("application/grpc") && is_call("application/grpc+proto") && is_call("application/grpc;x")
        );
        assert!(!is_call("application/grpc-web") && !is_call("application/json"));
        assert!(!super::is_call(&HeaderMap::new()));
    }

    #[test]
    fn refusals_have_a_status_that_leads_back() {
        for (status, code, back) in [
            (StatusCode::FORBIDDEN, "7", StatusCode::FORBIDDEN),
            (StatusCode::UNAUTHORIZED, "16", StatusCode::UNAUTHORIZED),
            (StatusCode::BAD_REQUEST, "3", StatusCode::BAD_REQUEST),
            (StatusCode::NOT_FOUND, "12", StatusCode::NOT_IMPLEMENTED),
            (StatusCode::PAYLOAD_TOO_LARGE, "8", StatusCode::TOO_MANY_REQUESTS),
            (StatusCode::BAD_GATEWAY, "14", StatusCode::SERVICE_UNAVAILABLE),
            (StatusCode::GATEWAY_TIMEOUT, "4", StatusCode::GATEWAY_TIMEOUT),
        ] {
            let response = failed(status, "größer, 100 %\n");
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.headers()[STATUS], code);
            assert_eq!(response.headers()[MESSAGE], "gr%C3%B6%C3%9Fer, 100 %25%0A");
            assert_eq!(super::status(&response), back);
        }
        assert_eq!(super::status(&Response::new(Body::empty())), StatusCode::OK);
    }
}
