//! The back channel: codes and refresh tokens become tokens, tokens are revoked, users described.

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Response, StatusCode};
use identity::jws;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use sidecar::Body;
use sidecar::traffic::ratelimit::address_key;
use url::form_urlencoded;
use zeroize::Zeroizing;

use super::grants::{Grant, Login, Redeemed, Refreshed};
use super::{Client, ClientAuthentication, Parameters, Provider, sha256};
use crate::answer;
use crate::config::Algorithm;
use crate::jwt::half_hash;

/// How long an ID token may be shown to its client as proof of a login.
const ID_TOKEN_LIFETIME_SECONDS: u64 = 300;
/// RFC 7636 §4.1.
const VERIFIER_BYTES: std::ops::RangeInclusive<usize> = 43..=128;

/// An OAuth error answer (RFC 6749 §5.2).
type Refused = (StatusCode, &'static str);

const INVALID_REQUEST: Refused = (StatusCode::BAD_REQUEST, "invalid_request");
const INVALID_GRANT: Refused = (StatusCode::BAD_REQUEST, "invalid_grant");
const INVALID_CLIENT: Refused = (StatusCode::UNAUTHORIZED, "invalid_client");
const UNAVAILABLE: Refused = (StatusCode::SERVICE_UNAVAILABLE, "temporarily_unavailable");

/// `POST /token`.
pub(super) async fn token(
    provider: &Provider,
    remote: SocketAddr,
    parts: &Parts,
    body: &str,
) -> Response<Body> {
    match exchange(provider, remote, &parts.headers, body).await {
        Ok(tokens) => answer::json(StatusCode::OK, &tokens),
        Err(refused) => refuse(refused),
    }
}

/// `POST /revoke` (RFC 7009): 200 whether or not there was anything to revoke.
pub(super) async fn revoke(
    provider: &Provider,
    remote: SocketAddr,
    parts: &Parts,
    body: &str,
) -> Response<Body> {
    let Some(parameters) = Parameters::parse(body) else { return refuse(INVALID_REQUEST) };
    let client = match authenticate(provider, remote, &parts.headers, &parameters) {
        Ok(client) => client,
        Err(refused) => return refuse(refused),
    };
    let Some(token) = parameters.get("token") else { return refuse(INVALID_REQUEST) };
    // Access tokens end by themselves within minutes, and say so to nobody here.
    match provider.families.revoke_by_token(token, &client.id).await {
        Ok(()) => answer::empty(StatusCode::OK),
        Err(error) => {
            tracing::error!(%error, "a refresh token cannot be revoked");
            refuse(UNAVAILABLE)
        }
    }
}

/// `/userinfo` (OpenID Connect Core §5.3).
pub(super) fn userinfo(provider: &Provider, parts: &Parts) -> Response<Body> {
    match described(provider, &parts.headers) {
        Some(claims) => answer::json(StatusCode::OK, &claims),
        None => {
            let mut response = answer::json(StatusCode::UNAUTHORIZED, &json!({ "error": "invalid_token" }));
            let challenge = HeaderValue::from_static("Bearer error=\"invalid_token\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            response
        }
    }
}

fn described(provider: &Provider, headers: &HeaderMap) -> Option<Value> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (value, second) = (values.next()?.to_str().ok()?, values.next());
    let (scheme, token) = value.split_once(' ')?;
    if second.is_some() || !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let token = provider.keys.verify("at+jwt", token)?;
    let text = |name: &str| token.claims.get(name).and_then(Value::as_str);
    let live = token.claims.get("exp").and_then(Value::as_u64)? > provider.clock.now_seconds();
    let scopes: Vec<&str> = text("scope")?.split(' ').collect();
    if !live || text("iss")? != provider.issuer.as_str() || !scopes.contains(&"openid") {
        return None;
    }
    let user = provider.passwords.user(text("sub")?)?;
    let mut claims = json!({ "sub": user.name });
    if scopes.contains(&"profile") {
        set(&mut claims, "name", user.display_name.as_str());
    }
    if scopes.contains(&"groups") {
        set(&mut claims, "groups", user.groups.clone());
    }
    Some(claims)
}

async fn exchange(
    provider: &Provider,
    remote: SocketAddr,
    headers: &HeaderMap,
    body: &str,
) -> Result<Value, Refused> {
    let parameters = Parameters::parse(body).ok_or(INVALID_REQUEST)?;
    let client = authenticate(provider, remote, headers, &parameters)?;
    match parameters.get("grant_type") {
        Some("authorization_code") => by_code(provider, client, &parameters).await,
        Some("refresh_token") => by_refresh_token(provider, client, &parameters).await,
        Some(_) => Err((StatusCode::BAD_REQUEST, "unsupported_grant_type")),
        None => Err(INVALID_REQUEST),
    }
}

async fn by_code(provider: &Provider, client: &Client, parameters: &Parameters) -> Result<Value, Refused> {
    let code = parameters.get("code").ok_or(INVALID_REQUEST)?;
    let grant = match provider.codes.redeem(code) {
        Redeemed::Grant(grant) => grant,
        Redeemed::Unknown => return Err(INVALID_GRANT),
        Redeemed::Again(family) => {
            tracing::warn!(client = client.id, "an authorization code came twice; what it began ends");
            if let Some(family) = family {
                provider.families.revoke(family).await.map_err(|_| UNAVAILABLE)?;
            }
            return Err(INVALID_GRANT);
        }
    };
    // The code is spent, whatever comes now: a wrong guess does not leave a second one.
    let verifier = parameters.get("code_verifier").ok_or(INVALID_GRANT)?;
    let fits = grant.client == client.id
        && parameters.get("redirect_uri") == Some(grant.redirect_uri.as_str())
        && VERIFIER_BYTES.contains(&verifier.len())
        && jws::encode(digest(&SHA256, verifier.as_bytes())) == grant.challenge;
    if !fits {
        return Err(INVALID_GRANT);
    }
    let mut refresh_token = None;
    if grant.scopes.iter().any(|scope| scope == "offline_access") {
        let begun =
            provider.families.begin(grant.login.clone(), grant.client.clone(), grant.scopes.clone()).await;
        let (family, token) = begun.map_err(|error| {
            tracing::error!(%error, "a refresh token cannot be issued");
            UNAVAILABLE
        })?;
        provider.codes.began(code, family);
        refresh_token = Some(token);
    }
    let Grant { login, scopes, nonce, .. } = grant;
    tokens(provider, client, &login, &scopes, nonce.as_deref(), refresh_token)
}

async fn by_refresh_token(
    provider: &Provider,
    client: &Client,
    parameters: &Parameters,
) -> Result<Value, Refused> {
    let token = parameters.get("refresh_token").ok_or(INVALID_REQUEST)?;
    let outcome = provider.families.rotate(token, &client.id).await.map_err(|error| {
        tracing::error!(%error, "a refresh token cannot be rotated");
        UNAVAILABLE
    })?;
    let (family, successor) = match outcome {
        Refreshed::Family(family, successor) => (family, successor),
        Refreshed::Invalid => return Err(INVALID_GRANT),
        Refreshed::Reused => {
            tracing::warn!(client = client.id, "a spent refresh token came again; its family is revoked");
            return Err(INVALID_GRANT);
        }
    };
    // RFC 6749 §6: fewer scopes may be asked for, never more.
    let scopes = match parameters.get("scope") {
        None => family.scopes.clone(),
        Some(asked) => {
            let asked: Vec<String> =
                asked.split(' ').filter(|scope| !scope.is_empty()).map(str::to_owned).collect();
            if asked.iter().any(|scope| !family.scopes.contains(scope)) {
                return Err((StatusCode::BAD_REQUEST, "invalid_scope"));
            }
            asked
        }
    };
    tokens(provider, client, &family.login, &scopes, None, Some(successor))
}

/// The token answer (RFC 6749 §5.1): an access token by RFC 9068, an ID token if `openid` was granted.
fn tokens(
    provider: &Provider,
    client: &Client,
    login: &Login,
    scopes: &[String],
    nonce: Option<&str>,
    refresh_token: Option<Zeroizing<String>>,
) -> Result<Value, Refused> {
    // A user taken out of the file since gets nothing more.
    let user = provider.passwords.user(&login.user).ok_or(INVALID_GRANT)?;
    let now = provider.clock.now_seconds();
    let lifetime = provider.access_token_ttl.as_secs();
    let mut id = [0; 16];
    provider.random.fill(&mut id).map_err(|_| UNAVAILABLE)?;
    let granted = |scope: &str| scopes.iter().any(|own| own == scope);
    let access = provider
        .keys
        .sign(
            "at+jwt",
            &json!({
                "iss": provider.issuer.as_str(),
                "sub": user.name,
                "aud": client.audience,
                "client_id": client.id,
                "scope": scopes.join(" "),
                "groups": user.groups,
                "auth_time": login.auth_time,
                "iat": now,
                "exp": now.saturating_add(lifetime),
                "jti": jws::encode(id),
            }),
        )
        .map_err(|_| UNAVAILABLE)?;
    let mut answer = json!({ "token_type": "Bearer", "expires_in": lifetime, "scope": scopes.join(" ") });
    if granted("openid") {
        let mut claims = json!({
            "iss": provider.issuer.as_str(),
            "sub": user.name,
            "aud": client.id,
            "auth_time": login.auth_time,
            "at_hash": half_hash(Algorithm::Es256, &access),
            "iat": now,
            "exp": now.saturating_add(ID_TOKEN_LIFETIME_SECONDS),
        });
        if let Some(nonce) = nonce {
            set(&mut claims, "nonce", nonce);
        }
        if granted("profile") {
            set(&mut claims, "name", user.display_name.as_str());
        }
        if granted("groups") {
            set(&mut claims, "groups", user.groups.clone());
        }
        set(&mut answer, "id_token", provider.keys.sign("JWT", &claims).map_err(|_| UNAVAILABLE)?);
    }
    if let Some(token) = refresh_token {
        set(&mut answer, "refresh_token", token.as_str());
    }
    set(&mut answer, "access_token", access);
    Ok(answer)
}

fn set(object: &mut Value, name: &str, value: impl Into<Value>) {
    if let Some(object) = object.as_object_mut() {
        object.insert(name.to_owned(), value.into());
    }
}

/// Which client is speaking (RFC 6749 §2.3): by Basic, or by form, never by both.
fn authenticate<'a>(
    provider: &'a Provider,
    remote: SocketAddr,
    headers: &HeaderMap,
    parameters: &Parameters,
) -> Result<&'a Client, Refused> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (basic, second) = (values.next(), values.next());
    let by_form = parameters.get("client_secret");
    if second.is_some() || (basic.is_some() && by_form.is_some()) {
        return Err(INVALID_REQUEST);
    }
    let (id, secret) = match basic {
        Some(value) => {
            let (id, secret) = read_basic(value).ok_or(INVALID_CLIENT)?;
            if parameters.get("client_id").is_some_and(|named| named != id) {
                return Err(INVALID_REQUEST);
            }
            (id, Some(secret))
        }
        None => {
            let id = parameters.get("client_id").ok_or(INVALID_CLIENT)?;
            (id.to_owned(), by_form.map(|secret| Zeroizing::new(secret.to_owned())))
        }
    };
    let client = provider.client(&id);
    let proven = client.is_some_and(|client| match (&client.authentication, &secret) {
        (ClientAuthentication::Public, None) => true,
        // Hashes are compared, so the time that it takes tells nothing of the secret.
        (ClientAuthentication::Secret(hash), Some(secret)) => sha256(secret.as_bytes()) == *hash,
        _ => false,
    });
    match client {
        Some(client) if proven => Ok(client),
        _ => {
            let allowed = provider.attempts_by_address.take(&address_key(remote.ip())).allowed;
            tracing::warn!(%remote, "a client did not prove itself");
            Err(if allowed { INVALID_CLIENT } else { (StatusCode::TOO_MANY_REQUESTS, "slow_down") })
        }
    }
}

fn read_basic(value: &HeaderValue) -> Option<(String, Zeroizing<String>)> {
    let (scheme, encoded) = value.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = Zeroizing::new(String::from_utf8(STANDARD.decode(encoded).ok()?).ok()?);
    let (id, secret) = text.split_once(':')?;
    Some((form_decode(id)?, Zeroizing::new(form_decode(secret)?)))
}

/// RFC 6749 §2.3.1: both halves are form-encoded before they are joined.
fn form_decode(text: &str) -> Option<String> {
    let mut pairs = form_urlencoded::parse(text.as_bytes());
    let (name, value) = pairs.next()?;
    let single = pairs.next().is_none() && value.is_empty() && !text.contains(['=', '&']);
    single.then(|| name.into_owned())
}

fn refuse((status, error): Refused) -> Response<Body> {
    let mut response = answer::json(status, &json!({ "error": error }));
    if status == StatusCode::UNAUTHORIZED {
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"token\""));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_credentials_are_form_decoded_after_splitting() {
        let read = |text: &str| {
            let value = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(text))).unwrap();
            read_basic(&value).map(|(id, secret)| (id, secret.to_string()))
        };
        assert_eq!(read("a%3Ab:c+d%25"), Some(("a:b".into(), "c d%".into())));
        assert_eq!(read("a"), None);
        assert_eq!(read("a=b:c"), None);
        assert_eq!(read("a&b:c"), None);
        assert!(read_basic(&HeaderValue::from_static("Basic !!")).is_none());
    }
}
