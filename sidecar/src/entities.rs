//! Asking the app what its objects' attributes are, before a request on them is decided.

use http::header::{CONTENT_TYPE, HOST};
use http::{Method, Request};
use identity::clock::SharedClock;
use policy::{Attributes, ENTITIES_PATH, Mapped, Refusal};

use crate::app::{App, AppError};
use crate::headers::{self, TraceParent};
use crate::{body, full};

/// Largest answer of an entities endpoint.
const MAX_ENTITIES_BYTES: usize = 64 * 1024;

/// Why nothing was learnt.
pub(crate) enum Unanswered {
    /// The app gave no answer.
    App(AppError),
    /// It answered something else than success, or too much, or too slowly.
    Unusable,
}

/// The attributes of the request's objects as the app tells them; a refusal if what it tells is wrong.
pub(crate) async fn ask(
    app: &App,
    service: &str,
    mapped: &Mapped,
    span: TraceParent,
    clock: &SharedClock,
) -> Result<Result<Attributes, Refusal>, Unanswered> {
    let request = Request::builder()
        .method(Method::POST)
        .uri(ENTITIES_PATH)
        .header(HOST, service)
        .header(CONTENT_TYPE, "application/json")
        .header(&headers::TRACEPARENT, span.header_value())
        .body(full(mapped.entities_request()))
        .map_err(|_| Unanswered::App(AppError::Target))?;
    let response = app.send(request).await.map_err(Unanswered::App)?;
    if !response.status().is_success() {
        return Err(Unanswered::Unusable);
    }
    match body::whole(response.into_body(), MAX_ENTITIES_BYTES, clock).await {
        Some(body) => Ok(mapped.attributes_from_entities(&body.to_bytes())),
        None => Err(Unanswered::Unusable),
    }
}
