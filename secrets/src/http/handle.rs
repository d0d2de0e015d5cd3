//! The path of a request: read it, who is it, write it down, may they, do it, write the outcome down, answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use identity::hex;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;

use super::body::{self, Input};
use super::intake;
use super::reply::{ApiError, Reply};
use super::route::{HealthCodes, KvOperation, KvRoute, Route};
use super::{Connection, Front, REQUEST_TIMEOUT, Service};
use crate::auth::{self, Caller, Presented};
use crate::authorize::{self, AccessRequest, Permit};
use crate::core::{Core, SealStatus};
use crate::kv::{Metadata, Version};
use crate::random;
use crate::stamp::Stamp;
use crate::token::{Issued, NewToken, Token};

/// A request that has been read and is understood.
struct Task {
    id: String,
    method: Method,
    uri: Uri,
    route: Route,
    input: Input,
    document: Option<Value>,
    token: Option<SecretString>,
    trace_id: Option<String>,
}

/// Answers one request, whatever it is.
pub(crate) async fn answer(
    service: Arc<Service>,
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let answered = match read(&service, &connection, request).await {
        Ok(Read::Status(route)) => status(&service.core, &route).await,
        Ok(Read::Task(task)) => in_own_task(service, connection, task).await,
        Err(error) => {
            tracing::info!(
                address = %connection.address,
                status = error.status.as_u16(),
                errors = ?error.errors,
                "a request to the vault was refused unread"
            );
            Err(error)
        }
    };
    match answered {
        Ok(reply) => reply.into_response(),
        Err(error) => error.into_response(),
    }
}

enum Read {
    /// About the vault's state: needs nothing, leaves nothing.
    Status(Route),
    /// Everything else.
    Task(Box<Task>),
}

async fn read(
    service: &Service,
    connection: &Connection,
    request: Request<Incoming>,
) -> Result<Read, ApiError> {
    let (parts, incoming) = request.into_parts();
    let front = connection.front();
    let headers = intake::headers(front, &parts)?;
    let route = Route::parse(front, &parts.method, &parts.uri)?;
    if route.is_status() {
        return Ok(Read::Status(route));
    }
    if service.core.is_sealed() && !route.works_sealed() {
        return Err(ApiError::sealed());
    }
    let bytes = intake::body(incoming).await?;
    let (input, document) = body::parse(&route, &bytes)?;
    Ok(Read::Task(Box::new(Task {
        id: random::uuid(service.core.random.as_ref()).map_err(ApiError::internal)?,
        method: parts.method,
        uri: parts.uri,
        route,
        input,
        document,
        token: headers.token,
        trace_id: headers.trace_id,
    })))
}

/// A caller that hangs up, or waits no longer, does not stop a write between its parts.
async fn in_own_task(
    service: Arc<Service>,
    connection: Arc<Connection>,
    task: Box<Task>,
) -> Result<Reply, ApiError> {
    let (done, answered) = oneshot::channel();
    let scope = service.scope.clone();
    scope.spawn("vault request", async move {
        // The receiver is gone if the caller is: the outcome stands in the audit file.
        let _gone = done.send(audited(&service, &connection, *task).await).is_err();
    });
    match tokio::time::timeout(REQUEST_TIMEOUT, answered).await {
        Ok(Ok(answered)) => answered,
        Ok(Err(_)) => Err(ApiError::internal("a request's task ended without an answer")),
        Err(_) => Err(ApiError::new(StatusCode::GATEWAY_TIMEOUT, "the request took too long")),
    }
}

/// The hot path: who is it, write it down, may they and do it, write the outcome down.
async fn audited(service: &Service, connection: &Connection, mut task: Task) -> Result<Reply, ApiError> {
    let core = &service.core;
    let token = task.token.take();
    let presented = token.as_ref().map(|token| token.expose_secret().to_owned()).map(SecretString::from);
    let caller = if task.route.is_ceremony() {
        // Sealed, there are no tokens to look up; the shares are the authority.
        Ok(Caller::Nobody)
    } else {
        auth::identify(core, connection.peer.as_ref(), token).await.map_err(ApiError::from)
    };

    let mut entry = describe(core, connection, &task, caller.as_ref().ok(), presented.as_ref());
    core.audit(&entry).await?;

    let mut decision = Map::new();
    let outcome = match caller {
        Ok(caller) => carry_out(service, connection, task, &caller, &mut decision).await,
        Err(error) => Err(error),
    };

    conclude(core, &mut entry, decision, &outcome);
    core.audit(&entry).await?;
    outcome
}

async fn carry_out(
    service: &Service,
    connection: &Connection,
    task: Task,
    caller: &Caller,
    decision: &mut Map<String, Value>,
) -> Result<Reply, ApiError> {
    let core = &service.core;
    let Task { id, method, uri, route, input, trace_id, .. } = task;
    match (route, input) {
        (Route::Kv(kv), input) => {
            let uri = uri.to_string();
            let request = AccessRequest {
                caller: match caller {
                    Caller::Workload { peer, .. } => peer.id(),
                    Caller::Operator(presented) => {
                        let permit =
                            authorize::operator(&presented.token, kv.operation.action(), &kv.target)?;
                        return secret(core, &id, &kv, permit, input, decision).await;
                    }
                    Caller::Nobody => return Err(ApiError::permission_denied()),
                },
                address: connection.address,
                action: kv.operation.action(),
                target: &kv.target,
                method: method.as_str(),
                uri: &uri,
                now: core.now(),
                trace_id: trace_id.as_deref(),
            };
            let judged = authorize::workload(service.authorizer.as_ref(), &request);
            if let Err(authorize::Refusal::Denied(denial)) = &judged {
                decision.insert("receipt".to_owned(), json!(denial.receipt));
                decision.insert("permitted".to_owned(), json!(false));
            }
            secret(core, &id, &kv, judged?, input, decision).await
        }
        (Route::Init, Input::Init { shares, threshold }) => init(core, shares, threshold).await,
        (Route::Unseal, Input::Unseal { share }) => Reply::plain(&seal_status(&core.unseal(&share).await?)),
        (Route::Unseal, Input::ResetUnseal) => Reply::plain(&seal_status(&core.reset_unseal().await?)),
        (Route::Seal, _) => {
            root(caller)?;
            core.seal().await;
            Ok(Reply::Empty)
        }
        (Route::Mounts, _) => {
            root(caller)?;
            Reply::data(&id, mounts())
        }
        (Route::MountInfo, _) => match caller {
            Caller::Nobody => Err(ApiError::permission_denied()),
            Caller::Workload { .. } | Caller::Operator(_) => Reply::data(&id, kv_mount()),
        },
        (Route::CertLogin, _) => match caller {
            Caller::Workload { peer, .. } => Reply::auth(&id, issued(&auth::login(core, peer).await?)),
            Caller::Operator(_) | Caller::Nobody => {
                Err(ApiError::bad_request("a login by certificate needs mutual TLS; this listener has none"))
            }
        },
        (Route::CreateToken, Input::NewToken { policy, display_name, ttl }) => {
            let maker = root(caller)?;
            let display_name =
                if display_name.is_empty() { "token".to_owned() } else { format!("token-{display_name}") };
            let path = "auth/token/create";
            let parent = Some(&maker.token);
            let new = NewToken { policy, display_name, path, ttl, parent, bound_to: None };
            Reply::auth(&id, issued(&core.issue(new, Some(&maker.secret)).await?))
        }
        (Route::LookupSelf, _) => {
            let presented = own_token(caller)?;
            Reply::data(&id, lookup(presented, core.now()))
        }
        (Route::RevokeSelf, _) => {
            core.revoke(&own_token(caller)?.token).await?;
            Ok(Reply::Empty)
        }
        // Status routes never come here, and each route's input is made beside it in `body::parse`.
        _ => Err(ApiError::internal("a request without its input")),
    }
}

/// Carries out what `permit` allows.
async fn secret(
    core: &Core,
    id: &str,
    route: &KvRoute,
    permit: Permit,
    input: Input,
    decision: &mut Map<String, Value>,
) -> Result<Reply, ApiError> {
    decision.insert("permitted".to_owned(), json!(true));
    decision.insert("rule".to_owned(), json!(permit.rule()));
    if let Some(receipt) = permit.receipt() {
        decision.insert("receipt".to_owned(), json!(receipt));
    }
    let (kv, now) = (&core.kv, core.now());
    match (route.operation, input) {
        (KvOperation::Read { version }, _) => {
            let read = kv.read(&permit, version).await?;
            let status = if read.data.is_some() { StatusCode::OK } else { StatusCode::NOT_FOUND };
            let metadata = version_metadata(read.number, read.version, read.custom.as_ref());
            Reply::data_with(status, id, ReadBody { data: read.data.as_deref(), metadata })
        }
        (KvOperation::Write, Input::Write { data, cas }) => {
            let (number, version, custom) = kv.write(&permit, &data, cas, now).await?;
            Reply::data(id, version_metadata(number, version, custom.as_ref()))
        }
        (KvOperation::DeleteLatest, _) => {
            kv.delete_latest(&permit, now).await.map(|()| Reply::Empty).map_err(Into::into)
        }
        (KvOperation::Change(fate), Input::Versions(numbers)) => {
            kv.change(&permit, fate, &numbers, now).await?;
            Ok(Reply::Empty)
        }
        (KvOperation::ReadMetadata, _) => Reply::data(id, metadata(&kv.read_metadata(&permit).await?)),
        (KvOperation::WriteMetadata, Input::Settings(settings)) => {
            kv.write_metadata(&permit, settings, now).await?;
            Ok(Reply::Empty)
        }
        (KvOperation::DeleteMetadata, _) => {
            kv.delete_metadata(&permit).await?;
            Ok(Reply::Empty)
        }
        (KvOperation::List, _) => Reply::data(id, json!({ "keys": kv.list(&permit).await? })),
        _ => Err(ApiError::internal("a request without its input")),
    }
}

#[derive(serde::Serialize)]
struct ReadBody<'a> {
    data: Option<&'a serde_json::value::RawValue>,
    metadata: Value,
}

fn root(caller: &Caller) -> Result<&Presented, ApiError> {
    match caller {
        Caller::Operator(presented) if presented.token.is_root() => Ok(presented),
        _ => Err(ApiError::permission_denied()),
    }
}

fn own_token(caller: &Caller) -> Result<&Presented, ApiError> {
    match caller {
        Caller::Operator(presented) | Caller::Workload { token: Some(presented), .. } => Ok(presented),
        Caller::Workload { token: None, .. } | Caller::Nobody => Err(ApiError::permission_denied()),
    }
}

async fn init(core: &Core, shares: u8, threshold: u8) -> Result<Reply, ApiError> {
    use base64::Engine as _;
    let init = core.init(shares, threshold).await?;
    let in_hex: Vec<String> = init.shares.iter().map(|share| hex::encode(share)).collect();
    let base64: Vec<String> =
        init.shares.iter().map(|share| base64::engine::general_purpose::STANDARD.encode(share)).collect();
    Reply::plain(&json!({
        "keys": in_hex,
        "keys_base64": base64,
        "root_token": init.root_token.expose_secret(),
    }))
}

async fn status(core: &Core, route: &Route) -> Result<Reply, ApiError> {
    match route {
        Route::Health(codes) => health(core, *codes),
        Route::InitStatus => Reply::plain(&json!({ "initialized": core.is_initialized() })),
        _ => Reply::plain(&seal_status(&core.seal_status().await)),
    }
}

fn health(core: &Core, codes: HealthCodes) -> Result<Reply, ApiError> {
    let (initialized, sealed) = (core.is_initialized(), core.is_sealed());
    // Red while nothing can be audited; asking is what finds out that it can be again.
    if core.audit.is_failing() {
        let time = ("time".to_owned(), json!(Stamp::new(core.now()).text()));
        let probe = Map::from_iter([time, ("type".to_owned(), json!("probe"))]);
        if core.audit.write(&probe).is_err() {
            return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the audit device failed"));
        }
    }
    let status = match (initialized, sealed) {
        (false, _) => codes.uninitialised.unwrap_or(501),
        (true, true) => codes.sealed.unwrap_or(503),
        (true, false) => codes.active.unwrap_or(200),
    };
    let status = StatusCode::from_u16(status).map_err(|_| ApiError::bad_request("not a status code"))?;
    Reply::json(
        status,
        &json!({
            "initialized": initialized,
            "sealed": sealed,
            "standby": false,
            "performance_standby": false,
            "replication_performance_mode": "disabled",
            "replication_dr_mode": "disabled",
            "server_time_utc": core.now().as_secs(),
            "version": env!("CARGO_PKG_VERSION"),
        }),
    )
}

fn seal_status(status: &SealStatus) -> Value {
    json!({
        "type": "shamir",
        "initialized": status.initialized,
        "sealed": status.sealed,
        "t": status.threshold,
        "n": status.shares,
        "progress": status.progress,
        "nonce": status.nonce,
        "version": env!("CARGO_PKG_VERSION"),
        "build_date": "",
        "migration": false,
        "cluster_name": status.cluster_id.as_ref().map(|_| "palisade"),
        "cluster_id": status.cluster_id,
        "recovery_seal": false,
        "storage_type": "redb",
    })
}

fn kv_mount() -> Value {
    json!({
        "accessor": "kv_secret",
        "config": { "default_lease_ttl": 0, "force_no_cache": false, "max_lease_ttl": 0 },
        "description": "key/value secrets, version 2",
        "external_entropy_access": false,
        "local": false,
        "options": { "version": "2" },
        "path": "secret/",
        "seal_wrap": false,
        "type": "kv",
        "uuid": "",
    })
}

fn mounts() -> Value {
    json!({ "secret/": kv_mount() })
}

fn version_metadata(
    number: u64,
    version: Version,
    custom: Option<&std::collections::BTreeMap<String, String>>,
) -> Value {
    let Value::Object(mut fields) = version_times(version) else { return Value::Null };
    fields.insert("custom_metadata".to_owned(), json!(custom));
    fields.insert("version".to_owned(), json!(number));
    Value::Object(fields)
}

fn version_times(version: Version) -> Value {
    json!({
        "created_time": version.created.text(),
        "deletion_time": version.deleted.map(Stamp::text).unwrap_or_default(),
        "destroyed": version.destroyed,
    })
}

fn metadata(metadata: &Metadata) -> Value {
    let versions: Map<String, Value> = metadata
        .versions
        .iter()
        .map(|(number, version)| (number.to_string(), version_times(*version)))
        .collect();
    json!({
        "cas_required": metadata.cas_required,
        "created_time": metadata.created.text(),
        "current_version": metadata.current,
        "custom_metadata": metadata.custom,
        "delete_version_after": "0s",
        "max_versions": metadata.max_versions,
        "oldest_version": metadata.oldest,
        "updated_time": metadata.updated.text(),
        "versions": versions,
    })
}

fn issued(issued: &Issued) -> Value {
    let token = &issued.token;
    json!({
        "client_token": issued.secret.expose_secret(),
        "accessor": token.accessor(),
        "policies": [token.policy().name()],
        "token_policies": [token.policy().name()],
        "metadata": token.bound_to().map(|id| json!({ "spiffe_id": id })),
        "lease_duration": token.ttl(token.created().since_epoch()).map_or(0, |ttl| ttl.as_secs()),
        "renewable": false,
        "entity_id": "",
        "token_type": "service",
        "orphan": token.is_orphan(),
        "mfa_requirement": null,
        "num_uses": 0,
    })
}

fn lookup(presented: &Presented, now: Duration) -> Value {
    let token = &presented.token;
    let created = token.created().since_epoch();
    let creation_ttl = token.expires().map_or(0, |end| end.since_epoch().saturating_sub(created).as_secs());
    json!({
        "id": presented.secret.expose_secret(),
        "accessor": token.accessor(),
        "creation_time": created.as_secs(),
        "creation_ttl": creation_ttl,
        "display_name": token.display_name(),
        "entity_id": "",
        "expire_time": token.expires().map(Stamp::text),
        "explicit_max_ttl": 0,
        "issue_time": token.created().text(),
        "meta": token.bound_to().map(|id| json!({ "spiffe_id": id })),
        "num_uses": 0,
        "orphan": token.is_orphan(),
        "path": token.path(),
        "policies": [token.policy().name()],
        "renewable": false,
        "ttl": token.ttl(now).map_or(0, |ttl| ttl.as_secs()),
        "type": "service",
    })
}

/// The audit entry of a request.
fn describe(
    core: &Core,
    connection: &Connection,
    task: &Task,
    caller: Option<&Caller>,
    presented: Option<&SecretString>,
) -> Map<String, Value> {
    let redactor = core.audit.redactor();
    let hashed = |text: &str| redactor.as_ref().map(|redactor| redactor.text(text));
    let token = caller.and_then(Caller::token);
    let body = redactor.as_ref().zip(task.document.as_ref()).map(|(redactor, body)| redactor.document(body));
    let listener = match connection.front() {
        Front::Mesh => "mesh",
        Front::Operator => "operator",
    };
    Map::from_iter([
        ("time".to_owned(), json!(Stamp::new(core.now()).text())),
        ("type".to_owned(), json!("request")),
        (
            "auth".to_owned(),
            json!({
                "accepted": caller.is_some(),
                "spiffe_id": connection.peer.as_ref().map(identity::Peer::id),
                "svid_serial": connection.peer.as_ref().map(identity::Peer::serial),
                "client_token": presented.and_then(|token| hashed(token.expose_secret())),
                "accessor": token.and_then(|token| hashed(token.accessor())),
                "display_name": token.map(Token::display_name),
                "policies": token.map(|token| [token.policy().name()]),
            }),
        ),
        (
            "request".to_owned(),
            json!({
                "id": task.id,
                "method": task.method.as_str(),
                "path": task.uri.path(),
                "query": task.uri.query(),
                "listener": listener,
                "remote_address": connection.address,
                "trace_id": task.trace_id,
                "body": body,
            }),
        ),
    ])
}

/// Makes the entry of a request into the entry of its answer.
fn conclude(
    core: &Core,
    entry: &mut Map<String, Value>,
    decision: Map<String, Value>,
    outcome: &Result<Reply, ApiError>,
) {
    entry.insert("time".to_owned(), json!(Stamp::new(core.now()).text()));
    entry.insert("type".to_owned(), json!("response"));
    if let Some(Value::Object(request)) = entry.get_mut("request") {
        request.remove("body");
    }
    if !decision.is_empty() {
        entry.insert("decision".to_owned(), Value::Object(decision));
    }
    let redactor = core.audit.redactor();
    let response = match outcome {
        Ok(reply) => {
            let body = redactor.zip(reply.audited()).map(|(redactor, body)| redactor.document(&body));
            json!({ "status": reply.status().as_u16(), "body": body })
        }
        // None of our error texts holds a value from a body.
        Err(error) => json!({ "status": error.status.as_u16(), "errors": error.errors }),
    };
    entry.insert("response".to_owned(), response);
}
