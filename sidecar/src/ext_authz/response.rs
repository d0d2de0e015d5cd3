//! What Envoy is told: let it pass, dressed so; or refuse, with this answer.

use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName};
use http::{HeaderValue, StatusCode};
use policy::{Denial, Permit};
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::Code;

use super::pb;
use crate::headers;

/// What Envoy puts on the request, and what it takes off.
pub(super) struct Dress {
    proved: Vec<(HeaderName, HeaderValue)>,
    claimed: Vec<String>,
}

impl Dress {
    /// `proved` goes on. Every identity header among `claimed`, as Envoy will forward them, comes off; and
    /// the ones that our own apps read in any case.
    pub(super) fn new(proved: Vec<(HeaderName, HeaderValue)>, claimed: &HeaderMap) -> Self {
        // Envoy takes off after it has put on: what is put on, in place of all there was, must not be named.
        let put_on = |name: &str| proved.iter().any(|(proved, _)| proved == name);
        let ours = [&headers::FORWARDED_USER, &headers::FORWARDED_CLIENT_CERT, &headers::TXN_TOKEN];
        let mut names: Vec<String> = claimed
            .keys()
            .filter(|name| headers::is_identity(name))
            .chain(ours)
            .map(HeaderName::as_str)
            .filter(|name| !put_on(name))
            .map(str::to_owned)
            .collect();
        names.sort_unstable();
        names.dedup();
        Self { proved, claimed: names }
    }
}

/// Lets a permitted request pass.
pub(super) fn passed(permit: &Permit, dress: Dress) -> pb::CheckResponse {
    let response = pb::OkHttpResponse {
        headers: dress.proved.into_iter().map(|(name, value)| overwriting(&name, &value)).collect(),
        headers_to_remove: dress.claimed,
    };
    pb::CheckResponse {
        status: Some(status(Code::Ok)),
        http_response: Some(pb::check_response::HttpResponse::OkResponse(response)),
        dynamic_metadata: Some(metadata(permit.receipt().as_str(), permit.rule().name(), "allow")),
    }
}

/// Refuses with the receipt and nothing else.
pub(super) fn denied(denial: &Denial) -> pb::CheckResponse {
    let code = if denial.status() == 400 { Code::InvalidArgument } else { Code::PermissionDenied };
    let metadata = metadata(denial.receipt().as_str(), denial.rule().name(), "deny");
    refused(code, denial.status(), denial.response_body(), metadata)
}

/// Refuses because nothing could be decided. An answer, not an error of the call: those Envoy can be
/// configured to take for consent.
pub(super) fn failed(status: StatusCode, body: String, receipt: &str) -> pb::CheckResponse {
    refused(Code::Unavailable, status.as_u16(), body, metadata(receipt, "", "error"))
}

fn refused(code: Code, http: u16, body: String, metadata: Struct) -> pb::CheckResponse {
    let headers = [
        overwriting(&CONTENT_TYPE, &HeaderValue::from_static("application/json")),
        overwriting(&CACHE_CONTROL, &HeaderValue::from_static("no-store")),
    ];
    let response = pb::DeniedHttpResponse {
        status: Some(pb::HttpStatus { code: http.into() }),
        headers: headers.into(),
        body,
    };
    pb::CheckResponse {
        status: Some(status(code)),
        http_response: Some(pb::check_response::HttpResponse::DeniedResponse(response)),
        dynamic_metadata: Some(metadata),
    }
}

fn status(code: Code) -> pb::Status {
    pb::Status { code: code.into(), message: String::new() }
}

fn overwriting(name: &HeaderName, value: &HeaderValue) -> pb::HeaderValueOption {
    let value = value.to_str().unwrap_or_default().to_owned();
    pb::HeaderValueOption {
        header: Some(pb::HeaderValue { key: name.as_str().to_owned(), value, raw_value: Vec::new() }),
        append_action: pb::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
    }
}

fn metadata(receipt: &str, rule: &str, verdict: &str) -> Struct {
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let fields = [("receipt", receipt), ("rule", rule), ("verdict", verdict)];
    Struct { fields: fields.map(|(name, value)| (name.to_owned(), text(value))).into() }
}
