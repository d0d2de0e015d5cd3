//! An OpenID provider for people who have none: users from a file, a login page, tokens.
//!
//! Authorization code with PKCE only; access tokens by RFC 9068, refresh tokens rotated with reuse
//! detection. What it leaves out (registration, consent, other grants) belongs in a real provider, and the
//! gateway speaks to those just the same.
//!
//! | file | what it holds |
//! |---|---|
//! | `mod.rs` | configuration, start, which path is which endpoint |
//! | `authorize.rs` | the login page: `/authorize`, `/login`, `/logout` |
//! | `token.rs` | `/token`, `/revoke`, `/userinfo` |
//! | `grants.rs` | authorization codes, browser sessions, refresh-token families |
//! | `keys.rs` | the signing key and the server's own secret, on disk |
//! | [`users`] | the users' file and password checks |

mod authorize;
mod grants;
mod keys;
mod token;
pub mod users;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use identity::clock::SharedClock;
use identity::tls::{ALPN_H2, ALPN_HTTP11, ClientAuth};
use identity::{IdentitySource, Scope};
use ring::digest::{SHA256, digest};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use sidecar::Body;
use sidecar::headers as hygiene;
use sidecar::server::{Connection, Handler, Limits};
use sidecar::traffic::ratelimit::Limiter;
use thiserror::Error;
use url::{Host, Url};

use crate::config::{Issuer, Rate};
use crate::seal::{SealError, Sealer};
use crate::store::StoreError;
use crate::{SharedRandom, answer};

use grants::{Codes, Families, Logins};
use keys::Keys;
use users::{Passwords, Users, UsersError};

/// Largest form read: a code request with a sealed login state fits several times.
const MAX_FORM_BYTES: usize = 32 * 1024;
/// Most parameters of a query or form; no request has half as many. Each is compared with all before it, and
/// thousands in one form would hold a thread for as long as that takes.
const MAX_PARAMETERS: usize = 32;
/// How long clients may keep discovery and keys: short enough that a new key is known before it signs.
const DOCUMENT_MAX_AGE_SECONDS: u64 = 300;
/// What any client may ask for; a client may have more of its own.
const STANDARD_SCOPES: &[&str] = &["openid", "profile", "groups", "offline_access"];

/// Everything the provider needs to start.
#[derive(Debug)]
pub struct IdpConfig {
    /// Its listener, already bound.
    pub listen: TcpListener,
    /// Its identifier: an https origin without a path.
    pub issuer: Issuer,
    /// The users' file, see [`users`].
    pub users: PathBuf,
    /// Who may send users here.
    pub clients: Vec<Client>,
    /// A directory of our own: signing key, server secret, refresh-token families.
    pub state: PathBuf,
    /// How long an access token lives; 5 minutes is usual.
    pub access_token_ttl: Duration,
    /// Login attempts for one name, and from one address.
    pub logins: Rate,
}

/// An OAuth client.
#[derive(Debug, Clone)]
pub struct Client {
    /// Its id.
    pub id: String,
    /// How it proves to be itself.
    pub authentication: ClientAuthentication,
    /// Where users may be sent back to. For a public client, a loopback address stands for every port of
    /// it (RFC 8252 §7.3).
    pub redirect_uris: Vec<Url>,
    /// Where users may be sent after a logout.
    pub post_logout_redirect_uris: Vec<Url>,
    /// `aud` of its access tokens.
    pub audience: String,
    /// Scopes it may ask for beside `openid profile groups offline_access`.
    pub scopes: Vec<String>,
}

/// How a client proves to be itself at the token endpoint.
#[derive(Debug, Clone)]
pub enum ClientAuthentication {
    /// Not at all: a program on a person's machine cannot keep a secret. PKCE protects its codes.
    Public,
    /// By a secret, of which the SHA-256 is kept. A client's secret is random, not a password.
    Secret([u8; 32]),
}

impl Client {
    /// A client with a random secret.
    pub fn confidential(id: &str, secret: &SecretString, redirect_uri: Url, audience: &str) -> Self {
        let authentication = ClientAuthentication::Secret(sha256(secret.expose_secret().as_bytes()));
        Self::new(id, authentication, redirect_uri, audience)
    }

    /// A client without a secret.
    pub fn public(id: &str, redirect_uri: Url, audience: &str) -> Self {
        Self::new(id, ClientAuthentication::Public, redirect_uri, audience)
    }

    fn new(id: &str, authentication: ClientAuthentication, redirect_uri: Url, audience: &str) -> Self {
        Self {
            id: id.to_owned(),
            authentication,
            redirect_uris: vec![redirect_uri],
            post_logout_redirect_uris: Vec::new(),
            audience: audience.to_owned(),
            scopes: Vec::new(),
        }
    }

    /// Whether users may be sent to `uri`: character by character, but for the port of a loopback address.
    fn may_redirect_to(&self, uri: &str) -> bool {
        if self.redirect_uris.iter().any(|allowed| allowed.as_str() == uri) {
            return true;
        }
        let Ok(mut asked) = Url::parse(uri) else { return false };
        let loopback = match asked.host() {
            Some(Host::Ipv4(address)) => address.is_loopback(),
            Some(Host::Ipv6(address)) => address.is_loopback(),
            _ => false,
        };
        let public = matches!(self.authentication, ClientAuthentication::Public);
        if !public || !loopback || asked.scheme() != "http" || asked.as_str() != uri {
            return false;
        }
        self.redirect_uris.iter().any(|allowed| asked.set_port(allowed.port()).is_ok() && asked == *allowed)
    }
}

/// Why the provider does not start.
#[derive(Debug, Error)]
pub enum IdpError {
    /// The listener cannot be used.
    #[error("the identity provider's listener cannot be used: {0}")]
    Listen(#[source] io::Error),
    /// TLS cannot be configured.
    #[error("the identity provider's TLS cannot be configured: {0}")]
    Tls(#[from] rustls::Error),
    /// The issuer has a path.
    #[error("the embedded identity provider's issuer has no path: {0}")]
    Issuer(Issuer),
    /// Two clients share an id.
    #[error("two clients are named {0:?}")]
    Client(String),
    /// The users' file cannot be used.
    #[error("{0}")]
    Users(#[from] UsersError),
    /// The state directory cannot be used.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// A key cannot be made, read or used.
    #[error("{0}")]
    Keys(#[from] keys::KeysError),
    /// The server's secret cannot seal.
    #[error("the identity provider's secret cannot be used")]
    Seal(#[from] SealError),
}

/// A running provider. It ends with the scope that it was started in.
#[derive(Debug)]
pub struct Idp {
    address: SocketAddr,
}

impl Idp {
    /// Starts the provider: returns once it accepts.
    pub async fn start(
        config: IdpConfig,
        source: IdentitySource,
        clock: SharedClock,
        random: SharedRandom,
        scope: &Scope,
    ) -> Result<Self, IdpError> {
        if config.issuer.url().path() != "/" {
            return Err(IdpError::Issuer(config.issuer));
        }
        for (at, client) in config.clients.iter().enumerate() {
            if config.clients.iter().take(at).any(|other| other.id == client.id) {
                return Err(IdpError::Client(client.id.clone()));
            }
        }
        let users = Users::read(&config.users)?;
        crate::store::private_directory(&config.state)?;
        let keys = Keys::open(&config.state, random.as_ref())?;
        let families =
            Families::open(&config.state, keys.refresh_key(), Arc::clone(&clock), Arc::clone(&random))?;
        let tls = identity::tls::server_config(&source, ClientAuth::None, &[ALPN_H2, ALPN_HTTP11], &clock)?;
        config.listen.set_nonblocking(true).map_err(IdpError::Listen)?;
        let listener = tokio::net::TcpListener::from_std(config.listen).map_err(IdpError::Listen)?;
        let address = listener.local_addr().map_err(IdpError::Listen)?;
        let provider = Arc::new(Provider {
            origin: config.issuer.url().origin().ascii_serialization(),
            issuer: config.issuer,
            clients: config.clients,
            access_token_ttl: config.access_token_ttl,
            passwords: Passwords::new(users),
            flow_sealer: Sealer::from_bytes(keys.seal_key())?,
            keys,
            codes: Codes::new(Arc::clone(&clock), Arc::clone(&random)),
            logins: Logins::new(Arc::clone(&clock), Arc::clone(&random)),
            families,
            attempts_by_name: Limiter::new(config.logins, Arc::clone(&clock)),
            attempts_by_address: Limiter::new(config.logins, Arc::clone(&clock)),
            clock: Arc::clone(&clock),
            random,
        });
        scope.spawn_critical("refresh family sweep", Arc::clone(&provider).sweep(scope.clone()));
        sidecar::server::serve(
            "idp",
            listener,
            Some(tls),
            Limits::default(),
            scope,
            clock,
            Arc::new(Door(provider)),
        );
        tracing::info!(%address, "the identity provider listens");
        Ok(Self { address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// What every request needs.
struct Provider {
    issuer: Issuer,
    origin: String,
    clients: Vec<Client>,
    access_token_ttl: Duration,
    passwords: Passwords,
    keys: Keys,
    flow_sealer: Sealer,
    codes: Codes,
    logins: Logins,
    families: Families,
    attempts_by_name: Limiter,
    attempts_by_address: Limiter,
    clock: SharedClock,
    random: SharedRandom,
}

struct Door(Arc<Provider>);

impl Handler for Door {
    async fn handle(self: Arc<Self>, connection: Arc<Connection>, request: Request<Body>) -> Response<Body> {
        self.0.handle(connection.remote, request).await
    }
}

impl Provider {
    async fn handle(&self, remote: SocketAddr, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let response = match hygiene::check_framing(&parts) {
            Ok(()) => self.endpoint(remote, &parts, body).await,
            Err(rule) => {
                tracing::info!(rule, "refused");
                let mut response =
                    answer::json(StatusCode::BAD_REQUEST, &json!({ "error": "malformed_request" }));
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                response
            }
        };
        tracing::info!(
            issuer = self.issuer.as_str(), method = parts.method.as_str(), path = parts.uri.path(),
            status = response.status().as_u16(), %remote, "request"
        );
        response
    }

    async fn endpoint(&self, remote: SocketAddr, parts: &Parts, body: Body) -> Response<Body> {
        let get = matches!(parts.method, Method::GET | Method::HEAD);
        let post = parts.method == Method::POST;
        let query = parts.uri.query().unwrap_or_default();
        match parts.uri.path() {
            "/.well-known/openid-configuration" | "/.well-known/oauth-authorization-server" if get => {
                cacheable(answer::json(StatusCode::OK, &self.discovery()))
            }
            "/jwks.json" if get => cacheable(answer::json(StatusCode::OK, &self.keys.jwks())),
            "/authorize" if get => authorize::authorize(self, parts, query),
            "/authorize" if post => match form(body).await {
                Ok(form) => authorize::authorize(self, parts, &form),
                Err(response) => response,
            },
            "/login" if post => match form(body).await {
                Ok(form) => authorize::login(self, remote, parts, &form).await,
                Err(response) => response,
            },
            "/logout" if get => authorize::logout(self, parts, query),
            "/logout" if post => match form(body).await {
                Ok(form) => authorize::logout(self, parts, &form),
                Err(response) => response,
            },
            "/token" if post => match form(body).await {
                Ok(form) => token::token(self, remote, parts, &form).await,
                Err(response) => response,
            },
            "/revoke" if post => match form(body).await {
                Ok(form) => token::revoke(self, remote, parts, &form).await,
                Err(response) => response,
            },
            "/userinfo" if get || post => token::userinfo(self, parts),
            "/health" if get => answer::json(StatusCode::OK, &json!({ "status": "ok" })),
            _ => answer::refusal(
                answer::is_navigation(&parts.headers),
                StatusCode::NOT_FOUND,
                "not_found",
                None,
            ),
        }
    }

    fn client(&self, id: &str) -> Option<&Client> {
        self.clients.iter().find(|client| client.id == id)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.origin)
    }

    fn discovery(&self) -> serde_json::Value {
        let mut scopes: Vec<&str> = STANDARD_SCOPES.to_vec();
        scopes.extend(self.clients.iter().flat_map(|client| client.scopes.iter().map(String::as_str)));
        scopes.sort_unstable();
        scopes.dedup();
        json!({
            "issuer": self.issuer.as_str(),
            "authorization_endpoint": self.url("/authorize"),
            "token_endpoint": self.url("/token"),
            "userinfo_endpoint": self.url("/userinfo"),
            "jwks_uri": self.url("/jwks.json"),
            "end_session_endpoint": self.url("/logout"),
            "revocation_endpoint": self.url("/revoke"),
            "scopes_supported": scopes,
            "response_types_supported": ["code"],
            "response_modes_supported": ["query"],
            "grant_types_supported": ["authorization_code", "refresh_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
            "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post", "none"],
            "revocation_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post", "none"],
            "code_challenge_methods_supported": ["S256"],
            "authorization_response_iss_parameter_supported": true,
            "claims_supported": ["sub", "iss", "aud", "exp", "iat", "auth_time", "nonce", "at_hash", "name", "groups"],
            "request_parameter_supported": false,
            "request_uri_parameter_supported": false,
        })
    }

    async fn sweep(self: Arc<Self>, scope: Scope) {
        loop {
            tokio::select! {
                () = self.clock.sleep(grants::SWEEP_INTERVAL) => {}
                () = scope.draining() => return,
            }
            if let Err(error) = self.families.sweep().await {
                tracing::error!(%error, "ended refresh families cannot be swept");
            }
        }
    }
}

fn cacheable(mut response: Response<Body>) -> Response<Body> {
    let value = format!("public, max-age={DOCUMENT_MAX_AGE_SECONDS}");
    if let Ok(value) = HeaderValue::try_from(value) {
        response.headers_mut().insert(header::CACHE_CONTROL, value);
    }
    response
}

async fn form(body: Body) -> Result<zeroize::Zeroizing<String>, Response<Body>> {
    let bad = |status| answer::json(status, &json!({ "error": "invalid_request" }));
    let bytes = match Limited::new(body, MAX_FORM_BYTES).collect().await {
        Ok(collected) => collected.to_bytes(),
        Err(_) => return Err(bad(StatusCode::PAYLOAD_TOO_LARGE)),
    };
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(zeroize::Zeroizing::new(text.to_owned())),
        Err(_) => Err(bad(StatusCode::BAD_REQUEST)),
    }
}

/// The parameters of a query or form, each at most once (RFC 6749 §3.1), and at most [`MAX_PARAMETERS`].
struct Parameters(Vec<(String, zeroize::Zeroizing<String>)>);

impl Parameters {
    fn parse(text: &str) -> Option<Self> {
        let mut seen: Vec<(String, zeroize::Zeroizing<String>)> = Vec::new();
        for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
            if seen.len() >= MAX_PARAMETERS || seen.iter().any(|(other, _)| *other == name) {
                return None;
            }
            seen.push((name.into_owned(), zeroize::Zeroizing::new(value.into_owned())));
        }
        Some(Self(seen))
    }

    /// A parameter that is there and not empty.
    fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(found, _)| found == name)
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_go_to_registered_addresses_and_a_public_client_to_any_loopback_port() {
        let cli = Client::public("cli", "http://127.0.0.1/callback".parse().unwrap(), "bank");
        assert!(cli.may_redirect_to("http://127.0.0.1:4711/callback"));
        assert!(cli.may_redirect_to("http://127.0.0.1/callback"));
        for bad in [
            "http://127.0.0.1:4711/callback/",
            "http://127.0.0.1:4711/callback?x=y",
            "http://localhost:1/callback",
            "https://127.0.0.1:1/callback",
            "http://127.0.0.1.evil.example/callback",
            "http://user@127.0.0.1:1/callback",
            "http://127.0.0.2:1/callback",
            "http://127.0.0.1:1/x/../callback",
            "",
        ] {
            assert!(!cli.may_redirect_to(bad), "{bad}");
        }
        let web = Client::confidential(
            "web",
            &"s".repeat(43).into(),
            "https://127.0.0.1:1/cb".parse().unwrap(),
            "bank",
        );
        assert!(web.may_redirect_to("https://127.0.0.1:1/cb"));
        assert!(!web.may_redirect_to("https://127.0.0.1:2/cb"));
    }

    #[test]
    fn a_flood_of_parameters_is_refused_before_each_is_compared_with_all() {
        let names = |count: usize| (0..count).map(|n| format!("{n:x}&")).collect::<String>();
        assert!(Parameters::parse(&names(MAX_PARAMETERS)).is_some());
        assert!(Parameters::parse(&names(MAX_PARAMETERS + 1)).is_none());
        assert!(Parameters::parse(&names(6000)).is_none());
    }

    #[test]
    fn a_parameter_may_come_once() {
        assert!(Parameters::parse("a=1&a=2").is_none());
        let parameters = Parameters::parse("a=1&b=").unwrap();
        assert_eq!((parameters.get("a"), parameters.get("b"), parameters.get("c")), (Some("1"), None, None));
    }
}
