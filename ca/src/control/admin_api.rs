//! The admin socket: HTTP/1.1 and JSON for the command line, for whoever may enter its directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Path as Segment, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::StreamExt as _;
use identity::socket;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

use super::relations::MAX_PAGE;
use super::{ControlError, ControlHandle, Entry, JoinTokenError, OfferError, RelationsError, StoreError};
use crate::model::DecisionQuery;
use crate::relations::{Change, Object};
use crate::state;

/// Permissions of the socket: the owner alone.
const SOCKET_MODE: u32 = 0o600;
/// Largest request: a hundred thousand entries of a few hundred bytes.
const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;

/// What is asked for with [`crate::admin::AdminClient::create_join_token`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JoinTokenRequest {
    pub(crate) host: String,
    pub(crate) ttl_seconds: u64,
}

/// What is asked for with [`crate::admin::AdminClient::roll_back_policies`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RollBackRequest {
    pub(crate) commit: Option<String>,
}

/// What is asked for with [`crate::admin::AdminClient::write_relations`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WriteRelations {
    pub(crate) changes: Vec<Change>,
}

/// Which page of relations is asked for.
#[derive(Debug, Deserialize)]
struct PageQuery {
    /// The object before it.
    after: Option<String>,
    limit: Option<usize>,
}

/// Which object is asked for, as `Type::"id"`.
#[derive(Debug, Deserialize)]
struct ObjectQuery {
    of: String,
}

/// Whose pseudonym is asked for.
#[derive(Debug, Deserialize)]
struct PseudonymQuery {
    of: String,
}

/// Its answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RolledBack {
    pub(crate) epoch: u64,
}

/// Every error's body.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ErrorBody {
    pub(crate) error: String,
}

/// Binds the socket in its directory, which is checked to be ours alone first.
pub(super) fn bind(path: &Path) -> Result<UnixListener, ControlError> {
    let directory = path
        .parent()
        .filter(|directory| !directory.as_os_str().is_empty())
        .ok_or_else(|| ControlError::SocketPath(path.to_owned()))?;
    state::private_directory(directory)?;
    Ok(socket::bind(path, SOCKET_MODE)?)
}

/// Serves until the scope drains, then removes the socket.
pub(super) async fn serve(control: ControlHandle, listener: UnixListener, path: PathBuf) {
    let scope = control.0.scope.clone();
    let router = Router::new()
        .route("/v1/join-tokens", post(create_join_token))
        .route("/v1/status", get(status))
        .route("/v1/decisions", get(decisions))
        .route("/v1/decisions/{receipt}", get(decision))
        .route("/v1/bundle", get(bundle))
        .route("/v1/entries", post(replace_entries))
        .route("/v1/pseudonym", get(pseudonym))
        .route("/v1/policies/roll-back", post(roll_back))
        .route("/v1/relations/{service}", get(read_relations).post(write_relations))
        .route("/v1/relations/{service}/object", get(relation))
        .route("/v1/relations/{service}/watch", get(watch_relations))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(control);
    let outcome =
        axum::serve(listener, router).with_graceful_shutdown(async move { scope.draining().await }).await;
    if let Err(error) = outcome {
        tracing::error!(%error, "the admin socket failed");
    }
    socket::remove(&path);
}

async fn create_join_token(State(control): State<ControlHandle>, body: axum::body::Bytes) -> Response {
    let request: JoinTokenRequest = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error),
    };
    match control.create_join_token(&request.host, Duration::from_secs(request.ttl_seconds)).await {
        Ok(token) => axum::Json(token).into_response(),
        Err(error @ (JoinTokenError::Host(_) | JoinTokenError::Ttl)) => {
            refuse(StatusCode::BAD_REQUEST, &error)
        }
        Err(error @ JoinTokenError::Store(StoreError::TooManyTokens)) => refuse(StatusCode::CONFLICT, &error),
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &error),
    }
}

async fn status(State(control): State<ControlHandle>) -> Response {
    answer(control.status().await)
}

async fn decisions(State(control): State<ControlHandle>, Query(query): Query<DecisionQuery>) -> Response {
    answer(control.decisions(query).await)
}

async fn decision(State(control): State<ControlHandle>, Segment(receipt): Segment<String>) -> Response {
    match control.decision(&receipt).await {
        Ok(None) => {
            let body = ErrorBody { error: format!("no decision has the receipt {receipt:?}") };
            (StatusCode::NOT_FOUND, axum::Json(body)).into_response()
        }
        found => answer(found),
    }
}

async fn bundle(State(control): State<ControlHandle>) -> Response {
    ([(http::header::CONTENT_TYPE, "application/x-pem-file")], control.bundle().pem()).into_response()
}

async fn replace_entries(State(control): State<ControlHandle>, body: axum::body::Bytes) -> Response {
    let entries: Vec<Entry> = match serde_json::from_slice(&body) {
        Ok(entries) => entries,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error),
    };
    match control.replace_entries(entries) {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => refuse(StatusCode::BAD_REQUEST, &error),
    }
}

async fn pseudonym(State(control): State<ControlHandle>, Query(query): Query<PseudonymQuery>) -> Response {
    axum::Json(control.pseudonym(&query.of)).into_response()
}

async fn roll_back(State(control): State<ControlHandle>, body: axum::body::Bytes) -> Response {
    let request: RollBackRequest = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error),
    };
    match control.roll_back_policies(request.commit.as_deref()).await {
        Ok(epoch) => axum::Json(RolledBack { epoch }).into_response(),
        Err(error @ OfferError::Store(_)) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &error),
        Err(error) => refuse(StatusCode::CONFLICT, &error),
    }
}

async fn write_relations(
    State(control): State<ControlHandle>,
    Segment(service): Segment<String>,
    body: axum::body::Bytes,
) -> Response {
    // What names a member twice has two meanings.
    let request = identity::json::parse(&body).map_err(|error| error.to_string());
    let request: WriteRelations =
        match request.and_then(|json| serde_json::from_value(json).map_err(|error| error.to_string())) {
            Ok(request) => request,
            Err(error) => return (StatusCode::BAD_REQUEST, axum::Json(ErrorBody { error })).into_response(),
        };
    match control.write_relations(&service, request.changes).await {
        Ok(written) => axum::Json(written).into_response(),
        Err(error) => refuse_relations(&error),
    }
}

async fn read_relations(
    State(control): State<ControlHandle>,
    Segment(service): Segment<String>,
    Query(query): Query<PageQuery>,
) -> Response {
    let after = match query.after.as_deref().map(Object::written).transpose() {
        Ok(after) => after,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error),
    };
    match control.read_relations(&service, after, query.limit.unwrap_or(MAX_PAGE)).await {
        Ok(page) => axum::Json(page).into_response(),
        Err(error) => refuse_relations(&error),
    }
}

async fn relation(
    State(control): State<ControlHandle>,
    Segment(service): Segment<String>,
    Query(query): Query<ObjectQuery>,
) -> Response {
    let object = match Object::written(&query.of) {
        Ok(object) => object,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error),
    };
    match control.relation(&service, object).await {
        Ok(relation) => axum::Json(relation).into_response(),
        Err(error) => refuse_relations(&error),
    }
}

/// Every batch as a line of JSON, for as long as somebody listens.
async fn watch_relations(
    State(control): State<ControlHandle>,
    Segment(service): Segment<String>,
) -> Response {
    let batches = match control.watch_relations(&service) {
        Ok(batches) => batches,
        Err(error) => return refuse_relations(&error),
    };
    let lines = batches.map(|page| serde_json::to_string(&page).map(|line| line + "\n"));
    ([(http::header::CONTENT_TYPE, "application/jsonl")], axum::body::Body::from_stream(lines))
        .into_response()
}

fn refuse_relations(error: &RelationsError) -> Response {
    let status = match error {
        RelationsError::UnknownService(_) => StatusCode::NOT_FOUND,
        RelationsError::NotAWriter { .. } => StatusCode::FORBIDDEN,
        RelationsError::Malformed(_) => StatusCode::BAD_REQUEST,
        RelationsError::Precondition(_) => StatusCode::CONFLICT,
        RelationsError::Full(_) => StatusCode::INSUFFICIENT_STORAGE,
        RelationsError::Store(_) | RelationsError::Random(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    refuse(status, error)
}

fn answer<T: Serialize>(outcome: Result<T, StoreError>) -> Response {
    match outcome {
        Ok(value) => axum::Json(value).into_response(),
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &error),
    }
}

fn refuse(status: StatusCode, error: &(dyn std::error::Error + 'static)) -> Response {
    if status.is_server_error() {
        tracing::error!(error, "an admin request failed");
    }
    (status, axum::Json(ErrorBody { error: error.to_string() })).into_response()
}
