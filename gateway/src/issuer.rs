//! One OpenID provider as seen from here: its metadata and keys, kept fresh; its token endpoint.
//!
//! Keys are refetched before their max-age ends, so a scheduled rotation is never noticed; an unknown
//! `kid` causes one fetch for all who wait, and no second one for [`UNKNOWN_KID_SPACING`]. A fetch is a
//! task of its own: a client that hangs up neither cancels it nor spends the one attempt.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use identity::clock::SharedClock;
use identity::jws::Compact;
use identity::{Scope, json};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value};
use thiserror::Error;
use tokio::sync::watch;
use url::{Url, form_urlencoded};

use crate::config::{Issuer, IssuerConfig};
use crate::https::{HttpClient, HttpsError};
use crate::jwk::{JwksError, KeySet};
use crate::jwt::{self, AccessToken, IdToken, JwtError, Pins};

/// After a fetch for an unknown `kid`, the next one waits this long: ten thousand made-up kids cost one.
pub const UNKNOWN_KID_SPACING: Duration = Duration::from_secs(30);
/// After a failed fetch, the next one waits this long.
const RETRY_SPACING: Duration = Duration::from_secs(5);
/// The same while there is nothing yet: nobody can log in meanwhile, and an issuer that starts beside the
/// gateway is there within a second.
const FIRST_FETCH_SPACING: Duration = Duration::from_millis(200);
/// A key taken out of the set verifies nothing after at most this; what the issuer's `Cache-Control`
/// says is followed within these bounds.
const MAX_AGE: std::ops::RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(3600);
/// If the issuer says nothing.
const DEFAULT_MAX_AGE: Duration = Duration::from_secs(300);
/// With the issuer out of reach, its last good keys serve this long and no longer.
const MAX_STALE: Duration = Duration::from_secs(24 * 3600);
/// Longest life believed of an access token, whatever `expires_in` says.
const MAX_TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);

/// Why an issuer's documents could not be had or used.
#[derive(Debug, Error)]
pub enum IssuerError {
    /// No answer.
    #[error("{0}")]
    Https(#[from] HttpsError),
    /// Another status than 200.
    #[error("{what} answered {status}")]
    Status {
        /// Which document.
        what: &'static str,
        /// The status.
        status: StatusCode,
    },
    /// The discovery document is wrong.
    #[error("the discovery document's {0} is missing or not the issuer's")]
    Metadata(&'static str),
    /// Not strict JSON.
    #[error("the answer is not strict JSON: {0}")]
    Json(#[from] json::JsonError),
    /// The key set is unusable.
    #[error("the key set cannot be used: {0}")]
    Jwks(#[from] JwksError),
    /// Nothing has been fetched yet, or what was is older than [`MAX_STALE`].
    #[error("the issuer's documents are not available")]
    Unavailable,
}

/// Why the token endpoint gave no usable tokens.
#[derive(Debug, Error)]
pub enum TokenError {
    /// `invalid_grant`: the code or refresh token is spent, revoked or unknown (RFC 6749 §5.2).
    #[error("the grant is no longer valid")]
    InvalidGrant,
    /// No answer after the request may have been sent: the grant may be spent.
    #[error("no answer from the token endpoint: {0}")]
    Lost(#[source] HttpsError),
    /// Nothing was sent, or the issuer refused for a reason that may pass.
    #[error("the token endpoint is not available: {0}")]
    Unavailable(#[source] IssuerError),
    /// The answer cannot be used.
    #[error("the token endpoint's answer has no usable {0}")]
    Answer(&'static str),
    /// The tokens do not verify.
    #[error("the issuer's token is not believed: {0}")]
    Token(#[from] JwtError),
}

/// What the discovery document says (OpenID Connect Discovery §3). Every endpoint is the issuer's own origin.
#[derive(Debug, Clone)]
pub struct Metadata {
    /// Where browsers are sent.
    pub authorization_endpoint: Url,
    /// Where codes and refresh tokens are exchanged.
    pub token_endpoint: Url,
    /// The key set.
    pub jwks_uri: Url,
    /// Where a logout ends the issuer's own session, if it can.
    pub end_session_endpoint: Option<Url>,
    /// Where a refresh token is revoked, if it can be.
    pub revocation_endpoint: Option<Url>,
    /// Whether authorization answers carry `iss` (RFC 9207).
    pub iss_parameter: bool,
}

/// Tokens as the issuer gave them, the ID token verified.
#[derive(Debug)]
pub struct Tokens {
    /// What the ID token says; `None` after a refresh that brought none.
    pub id: Option<IdToken>,
    /// The ID token itself, as hint for a logout.
    pub id_token: Option<SecretString>,
    /// The next refresh token.
    pub refresh_token: Option<SecretString>,
    /// Scopes granted, if the answer names them.
    pub scopes: Option<Vec<String>>,
    /// How long the access token lives.
    pub expires_in: Duration,
}

#[derive(Debug)]
struct Fetched {
    metadata: Metadata,
    keys: KeySet,
    at: Duration,
    max_age: Duration,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Arc<Fetched>>,
    /// Open while a fetch runs; whoever wants its outcome waits for it to close.
    running: Option<watch::Receiver<()>>,
    /// When each kind of fetch last began.
    last_scheduled: Option<Duration>,
    last_unknown_kid: Option<Duration>,
    last_issued_kid: Option<Duration>,
}

/// Why documents are fetched; each reason has its own spacing, so that made-up kids cannot delay the
/// schedule, nor a scheduled fetch a moment ago hide a key that was published since, nor strangers' kids the
/// key of a token that the issuer has just given us: logins would fail and sessions end for it.
#[derive(Debug, Clone, Copy)]
enum Reason {
    Schedule,
    /// In a token that somebody brought.
    UnknownKid,
    /// In a token from the issuer's own token endpoint.
    IssuedKid,
}

/// An issuer and what is known of it.
#[derive(Debug)]
pub struct IssuerClient {
    pins: Pins,
    client_secret: SecretString,
    scopes: Vec<String>,
    retry_safe: bool,
    http: Arc<dyn HttpClient>,
    clock: SharedClock,
    scope: Scope,
    state: Mutex<State>,
}

impl IssuerClient {
    /// A client that has fetched nothing yet.
    pub fn new(
        config: &IssuerConfig,
        http: Arc<dyn HttpClient>,
        clock: SharedClock,
        scope: Scope,
    ) -> Arc<Self> {
        Arc::new(Self {
            pins: Pins {
                issuer: config.issuer.clone(),
                audience: config.audience.clone(),
                client_id: config.client_id.clone(),
                algorithms: config.algorithms.clone(),
                require_at_jwt_typ: config.require_at_jwt_typ,
            },
            client_secret: config.client_secret.clone(),
            scopes: config.scopes.clone(),
            retry_safe: config.refresh_retry_safe,
            http,
            clock,
            scope,
            state: Mutex::default(),
        })
    }

    /// Its identifier.
    pub fn issuer(&self) -> &Issuer {
        &self.pins.issuer
    }

    /// Our client id there.
    pub fn client_id(&self) -> &str {
        &self.pins.client_id
    }

    /// Scopes asked for at login, `openid` first.
    pub fn login_scope(&self) -> String {
        let mut scope = String::from("openid");
        for name in self.scopes.iter().filter(|name| *name != "openid") {
            scope.push(' ');
            scope.push_str(name);
        }
        scope
    }

    /// Whether a refresh whose answer was lost may be repeated.
    pub fn retry_safe(&self) -> bool {
        self.retry_safe
    }

    /// Keeps documents fresh until the scope drains: fetches early, and again before max-age ends.
    pub async fn keep_fresh(self: Arc<Self>) {
        loop {
            self.fetch_anew(Reason::Schedule).await;
            let wait = match self.current() {
                // A quarter of the age is left for a fetch that fails and is tried again.
                Some(fetched) => {
                    let due = fetched.at + fetched.max_age.mul_f64(0.75);
                    due.saturating_sub(self.clock.now()).max(RETRY_SPACING)
                }
                None => FIRST_FETCH_SPACING,
            };
            tokio::select! {
                () = self.clock.sleep(wait) => {}
                () = self.scope.draining() => return,
            }
        }
    }

    /// The metadata, fetched now if there is none yet.
    pub async fn metadata(self: &Arc<Self>) -> Result<Metadata, IssuerError> {
        Ok(self.fetched().await?.metadata.clone())
    }

    /// Verifies an access token that claims to be this issuer's.
    pub async fn access_token(self: &Arc<Self>, token: &Compact<'_>) -> Result<AccessToken, JwtError> {
        // What can be refused without a key is refused without a fetch.
        self.pins.check_access_type(token)?;
        self.pins.algorithm(token)?;
        let fetched = self.keys_for(token, Reason::UnknownKid).await?;
        self.pins.access_token(token, &fetched.keys, self.clock.now())
    }

    /// Exchanges an authorization code (RFC 6749 §4.1.3, RFC 7636 §4.5).
    pub async fn exchange_code(
        self: &Arc<Self>,
        code: &str,
        redirect_uri: &str,
        verifier: &str,
        nonce: &str,
    ) -> Result<Tokens, TokenError> {
        let form = [
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", redirect_uri),
            ("code_verifier", verifier),
        ];
        let answer = self.token_request(&form).await?;
        let tokens = self.read_tokens(&answer, Some(nonce)).await?;
        if tokens.id.is_none() { Err(TokenError::Answer("id_token")) } else { Ok(tokens) }
    }

    /// Exchanges a refresh token (RFC 6749 §6).
    pub async fn refresh(self: &Arc<Self>, token: &SecretString) -> Result<Tokens, TokenError> {
        let form = [("grant_type", "refresh_token"), ("refresh_token", token.expose_secret())];
        let answer = self.token_request(&form).await?;
        self.read_tokens(&answer, None).await
    }

    /// Revokes a refresh token (RFC 7009), if the issuer can. Best effort: the session is gone either way.
    pub async fn revoke(self: &Arc<Self>, token: &SecretString) {
        let Ok(metadata) = self.metadata().await else { return };
        let Some(endpoint) = metadata.revocation_endpoint else { return };
        let form = [("token", token.expose_secret()), ("token_type_hint", "refresh_token")];
        let outcome = match self.form_request(&endpoint, &form) {
            Ok(request) => self.http.send(request).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(answer) if answer.status().is_success() => {}
            Ok(answer) => {
                tracing::warn!(issuer = %self.pins.issuer, status = %answer.status(), "not revoked")
            }
            Err(error) => tracing::warn!(issuer = %self.pins.issuer, %error, "not revoked"),
        }
    }

    async fn token_request(
        self: &Arc<Self>,
        form: &[(&str, &str)],
    ) -> Result<Map<String, Value>, TokenError> {
        let metadata = self.metadata().await.map_err(TokenError::Unavailable)?;
        let unavailable = |error: HttpsError| TokenError::Unavailable(error.into());
        let request = self.form_request(&metadata.token_endpoint, form).map_err(unavailable)?;
        let answer = self.http.send(request).await.map_err(|error| match error {
            HttpsError::Target | HttpsError::Connect(_) => TokenError::Unavailable(error.into()),
            HttpsError::Broken(_) | HttpsError::TooLarge | HttpsError::Timeout => TokenError::Lost(error),
        })?;
        let status = answer.status();
        let body = json::parse_object(answer.body());
        if status == StatusCode::OK {
            return body.map_err(|_| TokenError::Answer("JSON"));
        }
        let code = body.ok().and_then(|body| body.get("error").and_then(Value::as_str).map(str::to_owned));
        if status == StatusCode::BAD_REQUEST && code.as_deref() == Some("invalid_grant") {
            return Err(TokenError::InvalidGrant);
        }
        Err(TokenError::Unavailable(IssuerError::Status { what: "the token endpoint", status }))
    }

    /// A form with our client's credentials (RFC 6749 §2.3.1: both parts form-encoded, then Basic).
    fn form_request(&self, endpoint: &Url, form: &[(&str, &str)]) -> Result<Request<Bytes>, HttpsError> {
        let encode = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
        let credentials =
            format!("{}:{}", encode(&self.pins.client_id), encode(self.client_secret.expose_secret()));
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        Request::builder()
            .method(Method::POST)
            .uri(endpoint.as_str())
            .header(header::AUTHORIZATION, format!("Basic {}", STANDARD.encode(credentials)))
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_LENGTH, body.len())
            .body(body.into())
            .map_err(|_| HttpsError::Target)
    }

    async fn read_tokens(
        self: &Arc<Self>,
        answer: &Map<String, Value>,
        nonce: Option<&str>,
    ) -> Result<Tokens, TokenError> {
        let text = |name: &str| answer.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        if !text("token_type").is_some_and(|kind| kind.eq_ignore_ascii_case("bearer")) {
            return Err(TokenError::Answer("token_type"));
        }
        let access_token = text("access_token").ok_or(TokenError::Answer("access_token"))?;
        let id = match text("id_token") {
            None => None,
            Some(id_token) => {
                let token = Compact::parse(id_token).map_err(JwtError::Form)?;
                self.pins.algorithm(&token)?;
                let fetched = self.keys_for(&token, Reason::IssuedKid).await?;
                Some(self.pins.id_token(&token, &fetched.keys, self.clock.now(), nonce, access_token)?)
            }
        };
        let expires_in = match answer.get("expires_in") {
            None => id.as_ref().map_or(DEFAULT_MAX_AGE, |id| id.expires.saturating_sub(self.clock.now())),
            Some(value) => Duration::from_secs(value.as_u64().ok_or(TokenError::Answer("expires_in"))?),
        };
        Ok(Tokens {
            id,
            id_token: text("id_token").map(|token| token.to_owned().into()),
            refresh_token: text("refresh_token").map(|token| token.to_owned().into()),
            scopes: text("scope").map(|scope| scope.split_ascii_whitespace().map(str::to_owned).collect()),
            expires_in: expires_in.min(MAX_TOKEN_LIFE),
        })
    }

    /// The documents to verify `token` with: fetched anew if they do not hold its key.
    async fn keys_for(
        self: &Arc<Self>,
        token: &Compact<'_>,
        unknown: Reason,
    ) -> Result<Arc<Fetched>, JwtError> {
        let kid = jwt::key_name(token)?;
        let fetched = self.fetched().await.map_err(|_| JwtError::KeysUnavailable)?;
        if fetched.keys.find(kid).is_some() || kid.is_none() {
            return Ok(fetched);
        }
        self.fetch_anew(unknown).await;
        self.current().ok_or(JwtError::KeysUnavailable)
    }

    /// Documents within their max-age, or stale ones for a bounded time if the issuer cannot be reached.
    async fn fetched(self: &Arc<Self>) -> Result<Arc<Fetched>, IssuerError> {
        let fresh = |fetched: &Arc<Fetched>| self.clock.now() < fetched.at.saturating_add(fetched.max_age);
        if let Some(fetched) = self.current().filter(fresh) {
            return Ok(fetched);
        }
        self.fetch_anew(Reason::Schedule).await;
        let fetched = self.current().ok_or(IssuerError::Unavailable)?;
        let age = self.clock.now().saturating_sub(fetched.at);
        if age >= MAX_STALE {
            return Err(IssuerError::Unavailable);
        }
        Ok(fetched)
    }

    fn current(&self) -> Option<Arc<Fetched>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).current.clone()
    }

    /// Joins the running fetch, or starts one if the last for this reason is long enough ago; returns when
    /// it has ended, however it ended.
    async fn fetch_anew(self: &Arc<Self>, reason: Reason) {
        let mut running = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            match &state.running {
                Some(running) => running.clone(),
                None => {
                    let now = self.clock.now();
                    let scheduled = if state.current.is_some() { RETRY_SPACING } else { FIRST_FETCH_SPACING };
                    let (last, spacing) = match reason {
                        Reason::Schedule => (&mut state.last_scheduled, scheduled),
                        Reason::UnknownKid => (&mut state.last_unknown_kid, UNKNOWN_KID_SPACING),
                        Reason::IssuedKid => (&mut state.last_issued_kid, UNKNOWN_KID_SPACING),
                    };
                    if last.is_some_and(|last| now < last.saturating_add(spacing)) {
                        return;
                    }
                    *last = Some(now);
                    let (done, running) = watch::channel(());
                    state.running = Some(running.clone());
                    let client = Arc::clone(self);
                    self.scope.spawn("issuer fetch", async move {
                        let _finish = Finish { client: &client, _done: done };
                        client.fetch_and_keep().await;
                    });
                    running
                }
            }
        };
        // The sender says nothing; it is dropped when the fetch has ended.
        let _closed = running.changed().await.is_err();
    }

    async fn fetch_and_keep(&self) {
        match self.fetch().await {
            Ok(fetched) => {
                self.state.lock().unwrap_or_else(PoisonError::into_inner).current = Some(Arc::new(fetched));
            }
            Err(error) => {
                let stale =
                    self.current().map(|fetched| self.clock.now().saturating_sub(fetched.at).as_secs());
                tracing::error!(issuer = %self.pins.issuer, %error, keys_age_seconds = stale,
                    "the issuer's documents cannot be fetched; the last good ones serve up to 24 h");
            }
        }
    }

    async fn fetch(&self) -> Result<Fetched, IssuerError> {
        let discovery = self.get(&self.pins.issuer.discovery(), "the discovery document").await?;
        let metadata = read_metadata(&self.pins.issuer, &json::parse_object(discovery.body())?)?;
        let jwks = self.get(metadata.jwks_uri.as_str(), "the key set").await?;
        let keys = KeySet::parse(jwks.body())?;
        let max_age = max_age(&jwks).unwrap_or(DEFAULT_MAX_AGE).clamp(*MAX_AGE.start(), *MAX_AGE.end());
        Ok(Fetched { metadata, keys, at: self.clock.now(), max_age })
    }

    async fn get(&self, uri: &str, what: &'static str) -> Result<Response<Bytes>, IssuerError> {
        let request = Request::get(uri)
            .header(header::ACCEPT, "application/json")
            .body(Bytes::new())
            .map_err(|_| HttpsError::Target)?;
        let answer = self.http.send(request).await?;
        match answer.status() {
            StatusCode::OK => Ok(answer),
            status => Err(IssuerError::Status { what, status }),
        }
    }
}

/// Ends a fetch in the books even if its task panics: nobody waits for ever.
struct Finish<'a> {
    client: &'a IssuerClient,
    _done: watch::Sender<()>,
}

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.client.state.lock().unwrap_or_else(PoisonError::into_inner).running = None;
    }
}

fn read_metadata(issuer: &Issuer, document: &Map<String, Value>) -> Result<Metadata, IssuerError> {
    if document.get("issuer").and_then(Value::as_str) != Some(issuer.as_str()) {
        return Err(IssuerError::Metadata("issuer"));
    }
    // Only the issuer's own origin: a document cannot point us at another host, or into our network.
    let endpoint = |name: &'static str| -> Result<Option<Url>, IssuerError> {
        let Some(value) = document.get(name) else { return Ok(None) };
        let url = value.as_str().and_then(|text| Url::parse(text).ok()).filter(|url| issuer.same_origin(url));
        url.map(Some).ok_or(IssuerError::Metadata(name))
    };
    let needed = |name| endpoint(name)?.ok_or(IssuerError::Metadata(name));
    Ok(Metadata {
        authorization_endpoint: needed("authorization_endpoint")?,
        token_endpoint: needed("token_endpoint")?,
        jwks_uri: needed("jwks_uri")?,
        end_session_endpoint: endpoint("end_session_endpoint")?,
        revocation_endpoint: endpoint("revocation_endpoint")?,
        iss_parameter: document.get("authorization_response_iss_parameter_supported")
            == Some(&Value::Bool(true)),
    })
}

fn max_age(answer: &Response<Bytes>) -> Option<Duration> {
    let value = answer.headers().get(header::CACHE_CONTROL)?.to_str().ok()?;
    let seconds = value.split(',').find_map(|part| part.trim().strip_prefix("max-age="))?;
    seconds.parse().ok().map(Duration::from_secs)
}

/// All issuers, by identifier.
#[derive(Debug)]
pub struct Issuers {
    by_name: HashMap<String, Arc<IssuerClient>>,
    first: Arc<IssuerClient>,
}

impl Issuers {
    /// Of these clients; `None` if there are none or two share a name.
    pub fn new(clients: Vec<Arc<IssuerClient>>) -> Option<Self> {
        let first = Arc::clone(clients.first()?);
        let count = clients.len();
        let by_name: HashMap<_, _> =
            clients.into_iter().map(|client| (client.issuer().as_str().to_owned(), client)).collect();
        (by_name.len() == count).then_some(Self { by_name, first })
    }

    /// Where browsers are sent.
    pub fn for_login(&self) -> &Arc<IssuerClient> {
        &self.first
    }

    /// By identifier, compared exactly.
    pub fn get(&self, issuer: &str) -> Option<&Arc<IssuerClient>> {
        self.by_name.get(issuer)
    }

    /// Identifiers, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.by_name.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Verifies a bearer token: the issuer it claims decides whose pins and keys apply, and no others.
    pub async fn bearer(&self, token: &str) -> Result<(Issuer, AccessToken), JwtError> {
        let token = Compact::parse(token)?;
        let issuer = self.get(jwt::claimed_issuer(&token)?).ok_or(JwtError::Issuer)?;
        Ok((issuer.issuer().clone(), issuer.access_token(&token).await?))
    }
}

#[cfg(test)]
#[path = "issuer_tests.rs"]
mod tests;
