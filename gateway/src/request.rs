//! The path of one request through the front door. Read [`handle`], then `admit`, top to bottom.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Body as _;
use identity::txn::{self, RequestBinding, User};
use policy::{Permit, Receipt};
use serde::Deserialize;
use serde_json::json;
use sidecar::Body;
use sidecar::access::Finished;
use sidecar::bounded;
use sidecar::headers::{self as hygiene, TraceParent};
use sidecar::server::Connection;
use sidecar::trace::Place;
use sidecar::traffic::ratelimit::{Quota, address_key};
use sidecar::traffic::timeouts::{Bounds, Deadline};
use sidecar::upstream::Upstream;

use crate::gateway::{Destination, Shared};
use crate::jwt::JwtError;
use crate::refusal::{self, Refusal, Situation};
use crate::session::SessionError;
use crate::{OWN_PREFIX, answer, browser, cookie, target};

/// Largest request body passed on. Services that take more are not behind this gateway yet.
pub const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;
/// Longest refusal of a sidecar: a word and a receipt. What is longer is a service's own answer.
const MAX_REFUSAL_BYTES: u64 = 512;
/// How long the token of one request lives; it is minted anew for each.
const TOKEN_LIFETIME: Duration = Duration::from_secs(30);
/// How long an upgraded connection may go on. Who logs out, or is let go, keeps it for so long at most.
const UPGRADED_LIFETIME: Duration = Duration::from_secs(3600);
/// RFC 9728 §3.
const RESOURCE_METADATA: &str = "/.well-known/oauth-protected-resource";

/// A caller who proved who they are.
struct Caller {
    user: User,
    /// By a cookie, which browsers attach by themselves, so that intent must be shown as well.
    by_cookie: bool,
}

/// Answers one request.
pub(crate) async fn handle(
    gateway: Arc<Shared>,
    connection: Arc<Connection>,
    request: Request<Body>,
) -> Response<Body> {
    let began = gateway.clock.now();
    let (parts, body) = request.into_parts();
    let trace = match fresh_trace(&gateway) {
        Some(trace) => trace,
        None => return answer::empty(StatusCode::SERVICE_UNAVAILABLE),
    };
    // Kept for the record: `admit` consumes the request.
    let (method, asked) = (parts.method.clone(), parts.uri.clone());
    let navigation = answer::is_navigation(&parts.headers);
    let mut user = None;
    let outcome = admit(&gateway, connection.remote, trace, parts, body, &mut user).await;
    let (trace_id, user) = (trace.trace_id_text(), user.as_ref());
    let (mut verdict, mut rule, mut reason) = ("allow", String::new(), String::new());
    let response = outcome.unwrap_or_else(|refusal| {
        verdict = if refusal.status.is_server_error() { "error" } else { "deny" };
        (rule, reason) = (refusal.rule.to_string(), refusal.reason.clone());
        let situation = Situation {
            method: method.as_str(),
            target: recorded_target(&asked),
            remote: connection.remote,
            user,
            trace_id: &trace_id,
            navigation,
        };
        tracing::info!(status = refusal.status.as_u16(), rule = %refusal.rule, reason = refusal.reason, trace_id, "refused");
        refusal::answer(refusal, &situation, gateway.recorder.as_ref(), gateway.random.as_ref(), gateway.clock.as_ref())
    });
    tracing::info!(
        method = method.as_str(), path = asked.path(), status = response.status().as_u16(),
        user = user.map(|user| user.id.as_str()), remote = %connection.remote, trace_id, "request"
    );
    if let Some(traces) = &gateway.traces {
        let now = gateway.clock.now();
        let seen = Finished {
            trace: Place { parent: None, span: Some(trace) },
            user: user.map_or("", |user| &user.id),
            method: &method,
            path: asked.path(),
            verdict,
            rule: &rule,
            status: response.status(),
            took: now.saturating_sub(began),
            note: &reason,
            ..Finished::default()
        };
        traces.show(&seen, now);
    }
    protect(&gateway, response)
}

/// What is written down of a target: not the query where it may hold a code, a state or a token.
fn recorded_target(uri: &Uri) -> &str {
    if uri.path().starts_with(OWN_PREFIX) || target::has_token(uri) {
        return uri.path();
    }
    uri.path_and_query().map_or("", |target| target.as_str())
}

/// One step after the other; the first that objects ends it. `seen` learns the user for the record.
async fn admit(
    gateway: &Shared,
    remote: SocketAddr,
    trace: TraceParent,
    parts: Parts,
    body: Body,
    seen: &mut Option<User>,
) -> Result<Response<Body>, Refusal> {
    // Has the request one meaning?
    let upgrade = hygiene::check_framing_of_upgrade(&parts).map_err(Refusal::malformed)?;
    target::check(&parts.uri).map_err(Refusal::malformed)?;
    if target::has_token(&parts.uri) {
        return Err(Refusal::malformed("request.token_in_query"));
    }
    // Is it for the gateway itself?
    if let Some(answer) = own(gateway, &parts).await {
        return answer;
    }
    // Who is it?
    let Some(caller) = authenticate(gateway, remote, &parts).await? else {
        return unauthenticated(gateway, &parts).await;
    };
    let Caller { user, by_cookie } = caller;
    let user = &*seen.insert(user);
    // Did they mean to send it? What another site's page opens would speak in the user's name for as long as it stays.
    if by_cookie && (upgrade.is_some() || !is_safe(&parts.method)) {
        browser::check_origin(gateway, &parts.headers)?;
    }
    // Not too often?
    let quota = gateway.requests.take(&(&user.issuer, &user.id, &user.client));
    if !quota.allowed {
        return Err(too_many(gateway, quota));
    }
    // Where to, and may they?
    let destination = gateway.route(parts.uri.path()).ok_or_else(|| {
        Refusal::new(StatusCode::NOT_FOUND, "not_found", "route.unmapped", "no route has this prefix")
    })?;
    let permit = gateway.policy.permit(user, &destination.service, remote, &parts, &trace)?;
    // Pass it on, in the user's name.
    let navigation = answer::is_navigation(&parts.headers);
    let head = outgoing(gateway, permit, remote, trace, parts, upgrade.as_ref())?;
    let response = call(gateway, destination, user, remote, head, body, upgrade.is_some()).await?;
    let mut response = if navigation { for_people(response).await? } else { response };
    incoming(gateway, &mut response, quota, upgrade.as_ref());
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let whole = Deadline::within(UPGRADED_LIFETIME, gateway.clock.now());
        let bounds = Bounds { head: Deadline::NEVER, whole, idle: None };
        response = response.map(|body| bounded::body(body, &bounds, false, &gateway.clock));
    }
    Ok(response)
}

/// Endpoints of the gateway's own; `None` if the request is for a service.
async fn own(gateway: &Shared, parts: &Parts) -> Option<Result<Response<Body>, Refusal>> {
    let path = parts.uri.path();
    if !path.starts_with(OWN_PREFIX) && path != RESOURCE_METADATA {
        return None;
    }
    let get = matches!(parts.method, Method::GET | Method::HEAD);
    Some(match path {
        "/.palisade/login" if get => browser::login(gateway, parts).await,
        browser::CALLBACK if get => browser::callback(gateway, parts).await,
        "/.palisade/logout" => browser::logout(gateway, parts).await,
        browser::LOGGED_OUT if get => Ok(browser::logged_out()),
        "/.palisade/health" if get => Ok(answer::json(StatusCode::OK, &json!({ "status": "ok" }))),
        RESOURCE_METADATA if get => Ok(answer::json(
            StatusCode::OK,
            &json!({
                "resource": gateway.public_origin,
                "authorization_servers": gateway.issuers.names(),
                "bearer_methods_supported": ["header"],
            }),
        )),
        _ => Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "not_found",
            "route.unmapped",
            "no such endpoint of the gateway",
        )),
    })
}

/// The caller by bearer token or by session cookie; `None` if they brought neither, or a session that is over.
async fn authenticate(
    gateway: &Shared,
    remote: SocketAddr,
    parts: &Parts,
) -> Result<Option<Caller>, Refusal> {
    let mut values = parts.headers.get_all(header::AUTHORIZATION).iter();
    let (authorization, second) = (values.next(), values.next());
    let session = cookie::single(&parts.headers, &gateway.cookie)
        .map_err(|_| Refusal::malformed("request.cookie_twice"))?;
    if second.is_some() || (authorization.is_some() && session.is_some()) {
        return Err(Refusal::malformed("request.two_credentials"));
    }
    if let Some(authorization) = authorization {
        let token = bearer(authorization)
            .ok_or_else(|| invalid_token(gateway, remote, "authorization.scheme", "not a Bearer token"))?;
        let (issuer, token) = gateway.issuers.bearer(token).await.map_err(|error| match error {
            JwtError::KeysUnavailable => Refusal::unavailable("jwt.keys_unavailable", error),
            error => invalid_token(gateway, remote, jwt_rule(&error), &error.to_string()),
        })?;
        let user = User {
            id: token.subject,
            issuer: issuer.as_str().to_owned(),
            client: token.client,
            scopes: token.scopes,
            groups: token.groups,
            auth_time: token.auth_time,
            tenant: token.tenant,
            mfa: token.mfa,
        };
        return Ok(Some(Caller { user, by_cookie: false }));
    }
    let Some(session) = session else { return Ok(None) };
    match gateway.sessions.authenticate(session).await {
        Ok(found) => Ok(found.map(|(user, _)| Caller { user, by_cookie: true })),
        Err(error @ SessionError::IssuerUnavailable) => {
            Err(Refusal::unavailable("session.issuer_unavailable", error))
        }
        Err(error) => Err(Refusal::unavailable("session.store", error)),
    }
}

/// RFC 6750 §2.1: the scheme in any case, one space, one token.
fn bearer(value: &HeaderValue) -> Option<&str> {
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.bytes().all(plain)).then_some(token)
}

/// 401, or 429 once an address has failed too often. The caller learns nothing of what was wrong.
fn invalid_token(gateway: &Shared, remote: SocketAddr, rule: &'static str, reason: &str) -> Refusal {
    let quota = gateway.failures.take(&address_key(remote.ip()));
    if !quota.allowed {
        return retry_later(
            Refusal::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too_many_failures",
                "limit.failed_authentication",
                reason,
            ),
            quota,
        );
    }
    let refusal = Refusal::new(StatusCode::UNAUTHORIZED, "invalid_token", rule, reason);
    match challenge(gateway, Some("invalid_token")) {
        Some(value) => refusal.with(header::WWW_AUTHENTICATE, value),
        None => refusal,
    }
}

/// Browsers are sent to log in, everybody else is told how to (never redirected).
async fn unauthenticated(gateway: &Shared, parts: &Parts) -> Result<Response<Body>, Refusal> {
    if answer::is_navigation(&parts.headers) && matches!(parts.method, Method::GET | Method::HEAD) {
        let here = parts.uri.path_and_query().map_or("/", |target| target.as_str());
        return browser::begin(gateway, parts, here).await;
    }
    let refusal = Refusal::new(
        StatusCode::UNAUTHORIZED,
        "unauthenticated",
        "authentication.missing",
        "no credential, or a session that is over",
    );
    Err(match challenge(gateway, None) {
        Some(value) => refusal.with(header::WWW_AUTHENTICATE, value),
        None => refusal,
    })
}

/// RFC 6750 §3, RFC 9728 §5.1.
fn challenge(gateway: &Shared, error: Option<&str>) -> Option<HeaderValue> {
    let metadata = format!("{}{RESOURCE_METADATA}", gateway.public_origin);
    let text = match error {
        Some(error) => format!("Bearer error=\"{error}\", resource_metadata=\"{metadata}\""),
        None => format!("Bearer resource_metadata=\"{metadata}\""),
    };
    HeaderValue::try_from(text).ok()
}

fn too_many(gateway: &Shared, quota: Quota) -> Refusal {
    let mut refusal = Refusal::new(
        StatusCode::TOO_MANY_REQUESTS,
        "too_many_requests",
        "limit.principal",
        "the principal has used up its rate",
    );
    for (name, value) in rate_headers(gateway, quota) {
        refusal = refusal.with(name, value);
    }
    retry_later(refusal, quota)
}

fn retry_later(refusal: Refusal, quota: Quota) -> Refusal {
    let (name, value) = quota.retry_after();
    refusal.with(name, value)
}

fn rate_headers(gateway: &Shared, quota: Quota) -> [(HeaderName, HeaderValue); 2] {
    gateway.requests.rate().headers("principal", quota)
}

/// The head as it leaves, but for the token: nothing of what the caller claims about itself, everything that we
/// verified.
///
/// Takes the policy's leave: there is no other way to make a request that leaves.
fn outgoing(
    gateway: &Shared,
    _permit: Permit,
    remote: SocketAddr,
    trace: TraceParent,
    mut parts: Parts,
    upgrade: Option<&HeaderValue>,
) -> Result<Outgoing, Refusal> {
    if let Some(length) = parts.headers.get(header::CONTENT_LENGTH) {
        let length: Option<usize> = length.to_str().ok().and_then(|text| text.parse().ok());
        if length.is_none_or(|length| length > MAX_BODY_BYTES) {
            return Err(Refusal::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "too_large",
                "request.body_size",
                "the body is too large",
            ));
        }
    }
    let headers = &mut parts.headers;
    // First what `Connection` names, so that it cannot name what is set below.
    hygiene::strip_hop_by_hop(headers);
    hygiene::strip_identity(headers);
    for name in ["traceparent", "tracestate", "baggage"] {
        headers.remove(name);
    }
    headers.remove(header::AUTHORIZATION);
    headers.remove(header::HOST);
    cookie::remove(headers, &gateway.cookie);
    headers.insert(&hygiene::TRACEPARENT, trace.header_value());
    let values = [
        ("x-forwarded-for", remote.ip().to_canonical().to_string()),
        ("x-forwarded-proto", "https".to_owned()),
        ("x-forwarded-host", gateway.public_authority.clone()),
    ];
    for (name, value) in values {
        let value =
            HeaderValue::try_from(value).map_err(|error| Refusal::unavailable("request.headers", error))?;
        headers.insert(HeaderName::from_static(name), value);
    }
    let target = parts.uri.path_and_query().cloned().ok_or_else(|| Refusal::malformed("target.form"))?;
    parts.uri = target.clone().into();
    hygiene::ask_upgrade(&mut parts.headers, upgrade);
    Ok(Outgoing { head: parts, target })
}

/// A request that may leave, and its target in the form that tokens are bound to.
struct Outgoing {
    head: Parts,
    target: PathAndQuery,
}

/// Sends it to whoever gets it, and a copy to whoever gets one, each with a token of its own.
async fn call(
    gateway: &Shared,
    destination: &Destination,
    user: &User,
    remote: SocketAddr,
    Outgoing { mut head, target }: Outgoing,
    body: Body,
    upgrades: bool,
) -> Result<Response<Body>, Refusal> {
    let callee = &destination.callee;
    let upstream = callee.choose(&head.headers, remote.ip(), Some(&user.id));
    let key = upstream.key(&head.headers, remote.ip(), Some(&user.id));
    if !upgrades && let Some(mut copy) = callee.copy(&head, &body) {
        vouch(gateway, user, &mut copy.head, &target, copy.upstream)?;
        copy.send(&gateway.scope);
    }
    vouch(gateway, user, &mut head, &target, upstream)?;
    let (delay, abort) = callee.fault(&head.headers);
    if let Some(delay) = delay {
        gateway.clock.sleep(delay).await;
    }
    if let Some(status) = abort {
        return Err(Refusal::new(status, "fault", "traffic.faults", "a fault made on purpose"));
    }
    // What is said in the other protocol is no body.
    let body = if upgrades { body } else { Body::new(Limited::new(body, MAX_BODY_BYTES)) };
    upstream.send_keyed(Request::from_parts(head, body), key).await.map_err(|error| {
        let mut refusal = Refusal::unavailable("upstream", &error);
        refusal.status = error.status();
        refusal
    })
}

/// Says to this one, and to nobody else, for whom the request is.
fn vouch(
    gateway: &Shared,
    user: &User,
    head: &mut Parts,
    target: &PathAndQuery,
    to: &Upstream,
) -> Result<(), Refusal> {
    let now = gateway.clock.now();
    let identity = gateway
        .source
        .valid_at(now)
        .ok_or_else(|| Refusal::unavailable("gateway.no_identity", "the gateway has no valid SVID"))?;
    let binding = RequestBinding::new(head.method.as_str(), target.as_str());
    let token = txn::mint(&identity.svid, user, to.id(), binding, TOKEN_LIFETIME, now)
        .map_err(|error| Refusal::unavailable("gateway.mint", error))?;
    let mut token =
        HeaderValue::try_from(token).map_err(|error| Refusal::unavailable("gateway.mint", error))?;
    token.set_sensitive(true);
    head.headers.insert(HeaderName::from_static(txn::HEADER), token);
    Ok(())
}

/// The answer as it leaves: nothing of the mesh's inside, no cookie under a name of ours.
fn incoming(gateway: &Shared, response: &mut Response<Body>, quota: Quota, upgrade: Option<&HeaderValue>) {
    hygiene::strip_answer(response, upgrade);
    let headers = response.headers_mut();
    hygiene::strip_identity(headers);
    headers.remove(&hygiene::TRACEPARENT);
    cookie::remove_set(headers, &gateway.cookie);
    // The service knows of no login, so it cannot know that its answer is one person's: caches keep answers to
    // requests with a cookie unless told otherwise (RFC 9111 §3.5 protects only `Authorization`).
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    for (name, value) in rate_headers(gateway, quota) {
        headers.insert(name, value);
    }
}

/// What a sidecar says when it refuses or fails ([`MAX_REFUSAL_BYTES`]).
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SidecarRefusal {
    #[serde(rename = "error")]
    _error: String,
    receipt: Option<Receipt>,
    service: Option<String>,
}

/// The refusal of the sidecar behind us as a page: it speaks JSON, and here a person looks. Every other
/// answer is the service's, and stays as it is.
async fn for_people(response: Response<Body>) -> Result<Response<Body>, Refusal> {
    let status = response.status();
    let json = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    let short = response.body().size_hint().upper().is_some_and(|bytes| bytes <= MAX_REFUSAL_BYTES);
    if !(status.is_client_error() || status.is_server_error()) || !json || !short {
        return Ok(response);
    }
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.map_err(|error| Refusal::unavailable("upstream", error))?.to_bytes();
    match serde_json::from_slice::<SidecarRefusal>(&bytes) {
        Ok(said) if said.receipt.is_some() || said.service.is_some() => {
            let receipt = said.receipt.as_ref().map(Receipt::as_str);
            let mut page = answer::refusal(true, status, "", receipt);
            if let Some(when) = parts.headers.get(header::RETRY_AFTER) {
                page.headers_mut().insert(header::RETRY_AFTER, when.clone());
            }
            Ok(page)
        }
        _ => Ok(Response::from_parts(parts, sidecar::full(bytes))),
    }
}

/// Headers that every answer carries, unless the service chose its own.
fn protect(gateway: &Shared, mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    let mut default = |name: HeaderName, value: &'static str| {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    };
    default(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    default(header::REFERRER_POLICY, "strict-origin-when-cross-origin");
    if gateway.strict_transport {
        default(header::STRICT_TRANSPORT_SECURITY, "max-age=31536000");
    }
    response
}

/// A trace of our own: what a stranger sends could join their request to somebody else's trace.
fn fresh_trace(gateway: &Shared) -> Option<TraceParent> {
    let (mut trace, mut span) = ([0; 16], [0; 8]);
    gateway.random.fill(&mut trace).ok()?;
    gateway.random.fill(&mut span).ok()?;
    // Zero is not a valid id (W3C Trace Context §3.2.2.3).
    let trace_id = u128::from_be_bytes(trace).max(1);
    let span_id = u64::from_be_bytes(span).max(1);
    Some(TraceParent { trace_id, span_id, flags: gateway.traced.flags(trace_id) })
}

/// RFC 9110 §9.2.1.
fn is_safe(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// The rule that refused a token, as the decision log names it.
fn jwt_rule(error: &JwtError) -> &'static str {
    match error {
        JwtError::Form(_) => "jwt.form",
        JwtError::Type => "jwt.type",
        JwtError::Issuer => "jwt.issuer",
        JwtError::Algorithm => "jwt.algorithm",
        JwtError::Key => "jwt.key",
        JwtError::KeysUnavailable => "jwt.keys_unavailable",
        JwtError::Signature => "jwt.signature",
        JwtError::Claim("aud") => "jwt.audience",
        JwtError::Claim(_) => "jwt.claim",
        JwtError::Expired => "jwt.expired",
        JwtError::NotYetValid => "jwt.not_yet_valid",
        JwtError::SenderConstrained => "jwt.sender_constrained",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_16_only_one_bearer_token_in_its_plain_form_is_read() {
        let read = |text: &'static str| bearer(&HeaderValue::from_static(text)).map(str::to_owned);
        assert_eq!(read("Bearer a.b-c_d"), Some("a.b-c_d".into()));
        assert_eq!(read("bearer a"), Some("a".into()));
        for bad in [
            "Bearer",
            "Bearer ",
            "Bearer  a",
            "Bearer a, Bearer b",
            "Bearer a b",
            "Basic YTpi",
            "DPoP a",
            "a",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
