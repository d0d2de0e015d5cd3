//! The login page: `/authorize` shows it, `/login` takes its form, `/logout` ends the login.

use std::net::SocketAddr;

use http::header::{self, HeaderMap};
use http::request::Parts;
use http::{Method, Response, StatusCode};
use identity::jws;
use maud::{Markup, html};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sidecar::Body;
use sidecar::traffic::ratelimit::{Limiter, address_key};
use url::Url;

use super::grants::{Grant, Login};
use super::users::Checked;
use super::{Client, ClientAuthentication, Parameters, Provider, STANDARD_SCOPES};
use crate::browser::is_same_origin;
use crate::flow::Flows;
use crate::{answer, cookie};

/// The provider's own login cookie.
const LOGIN_COOKIE: &str = "__Host-palisade-idp";
const FORM_COOKIE: &str = "__Host-palisade-idp-form-";
/// Longest `state` or `nonce` carried for a client.
const MAX_OPAQUE_BYTES: usize = 4096;
/// A PKCE challenge by S256 is the base64url of 32 bytes (RFC 7636 §4.2).
const CHALLENGE_BYTES: usize = 32;

/// A request that may be shown a login page: client and redirect are known to belong together.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Authorization {
    client: String,
    redirect_uri: String,
    state: Option<String>,
    nonce: Option<String>,
    scopes: Vec<String>,
    challenge: String,
}

fn flows(provider: &Provider) -> Flows<'_> {
    Flows {
        sealer: &provider.flow_sealer,
        random: provider.random.as_ref(),
        clock: provider.clock.as_ref(),
        cookie_prefix: FORM_COOKIE,
        purpose: "idp login form",
    }
}

/// `/authorize` (RFC 6749 §4.1.1, OpenID Connect Core §3.1.2).
pub(super) fn authorize(provider: &Provider, parts: &Parts, parameters: &str) -> Response<Body> {
    let Some(parameters) = Parameters::parse(parameters) else {
        return broken("A parameter came twice, or there are too many.");
    };
    // Until client and redirect are known to belong together, nobody is sent anywhere.
    let Some(client) = parameters.get("client_id").and_then(|id| provider.client(id)) else {
        return broken("The application that sent you here is not known.");
    };
    let Some(redirect_uri) = parameters.get("redirect_uri").filter(|uri| client.may_redirect_to(uri)) else {
        return broken("The application that sent you here may not be answered there.");
    };
    let state = parameters.get("state");
    if state.is_some_and(|state| state.len() > MAX_OPAQUE_BYTES) {
        return broken("The application sent a state that is too long.");
    }
    let authorization = match read(client, redirect_uri, state, &parameters) {
        Ok(authorization) => authorization,
        Err(error) => return send_back(provider, redirect_uri, state, &[("error", error)]),
    };
    let login =
        cookie::single(&parts.headers, LOGIN_COOKIE).ok().flatten().and_then(|id| provider.logins.get(id));
    let now = provider.clock.now_seconds();
    let prompt = parameters.get("prompt").unwrap_or_default();
    let max_age = parameters.get("max_age").map(|age| age.parse::<u64>().unwrap_or(0));
    let fresh = |login: &Login| {
        // Whoever listens on a loopback port may say that it is a public client, so its person must take part
        // each time (RFC 8252 §8.6).
        matches!(client.authentication, ClientAuthentication::Secret(_))
            && !prompt.split(' ').any(|word| matches!(word, "login" | "select_account"))
            && max_age.is_none_or(|age| now.saturating_sub(login.auth_time) < age)
            && provider.passwords.user(&login.user).is_some()
    };
    if let Some(login) = login.filter(fresh) {
        return grant(provider, authorization, login);
    }
    if prompt == "none" {
        return send_back(provider, redirect_uri, state, &[("error", "login_required")]);
    }
    form(provider, &parts.headers, &authorization, StatusCode::OK, None)
}

fn read(
    client: &Client,
    redirect_uri: &str,
    state: Option<&str>,
    parameters: &Parameters,
) -> Result<Authorization, &'static str> {
    if parameters.get("request").is_some() {
        return Err("request_not_supported");
    }
    if parameters.get("request_uri").is_some() {
        return Err("request_uri_not_supported");
    }
    if parameters.get("response_type") != Some("code") {
        return Err("unsupported_response_type");
    }
    if parameters.get("response_mode").is_some_and(|mode| mode != "query") {
        return Err("invalid_request");
    }
    let challenge = parameters.get("code_challenge").unwrap_or_default();
    let hash = jws::decode(challenge).map_err(|_| "invalid_request")?;
    if parameters.get("code_challenge_method") != Some("S256") || hash.len() != CHALLENGE_BYTES {
        return Err("invalid_request");
    }
    let nonce = parameters.get("nonce");
    if nonce.is_some_and(|nonce| nonce.len() > MAX_OPAQUE_BYTES) {
        return Err("invalid_request");
    }
    let asked = parameters.get("scope").unwrap_or_default().split(' ').filter(|scope| !scope.is_empty());
    let mut scopes: Vec<String> = Vec::new();
    for scope in asked {
        let allowed = STANDARD_SCOPES.contains(&scope) || client.scopes.iter().any(|own| own == scope);
        // RFC 6749 §3.3: what is not granted is left out, and the token answer says what was.
        if allowed && !scopes.iter().any(|seen| seen == scope) {
            scopes.push(scope.to_owned());
        }
    }
    Ok(Authorization {
        client: client.id.clone(),
        redirect_uri: redirect_uri.to_owned(),
        state: state.map(str::to_owned),
        nonce: nonce.map(str::to_owned),
        scopes,
        challenge: challenge.to_owned(),
    })
}

/// `POST /login`: the form comes back.
pub(super) async fn login(
    provider: &Provider,
    remote: SocketAddr,
    parts: &Parts,
    body: &str,
) -> Response<Body> {
    if !is_same_origin(&parts.headers, &provider.origin) {
        return broken("The form was not sent from this page.");
    }
    let Some(parameters) = Parameters::parse(body) else {
        return broken("A parameter came twice, or there are too many.");
    };
    let sealed = parameters.get("request").unwrap_or_default();
    let Ok((authorization, clear)) = flows(provider).finish::<Authorization>(&parts.headers, sealed) else {
        return broken("This login page is too old, or was opened in another browser.");
    };
    let name = parameters.get("username").unwrap_or_default().trim();
    let password = parameters.get("password").unwrap_or_default();
    let checked = if may_try(&provider.attempts_by_address, &provider.attempts_by_name, remote, name) {
        provider.passwords.check(name, password).await
    } else {
        tracing::warn!(%remote, "too many login attempts");
        Checked::Busy
    };
    let user = match checked {
        Checked::User(user) => user,
        Checked::Wrong => {
            // The name is not logged: people type passwords into the wrong field.
            tracing::warn!(%remote, client = authorization.client, "login failed");
            let text = "That name and password do not fit.";
            return form(provider, &parts.headers, &authorization, StatusCode::UNAUTHORIZED, Some(text));
        }
        Checked::Busy => {
            let text = "Too many attempts just now. Please wait a moment and try again.";
            return form(provider, &parts.headers, &authorization, StatusCode::TOO_MANY_REQUESTS, Some(text));
        }
    };
    tracing::info!(user = user.name, client = authorization.client, %remote, "logged in");
    // A new id at every login; the one from before is not good any more.
    if let Ok(Some(old)) = cookie::single(&parts.headers, LOGIN_COOKIE) {
        provider.logins.end(old);
    }
    let login = Login { user: user.name.clone(), auth_time: provider.clock.now_seconds() };
    let begun = provider.logins.begin(login.clone()).ok().and_then(|id| cookie::set(LOGIN_COOKIE, &id, None));
    let mut response = grant(provider, authorization, login);
    for cookie in begun.into_iter().chain([clear]) {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    response
}

/// Whether one more password may be tried. What the address may not do costs the name nothing: else one address
/// could use up everybody's attempts at once, and lock them all out.
fn may_try(by_address: &Limiter, by_name: &Limiter, remote: SocketAddr, name: &str) -> bool {
    by_address.take(&address_key(remote.ip())).allowed && by_name.take(name).allowed
}

/// `/logout` (OpenID Connect RP-Initiated Logout): at once with a hint that fits, else after a question.
pub(super) fn logout(provider: &Provider, parts: &Parts, parameters: &str) -> Response<Body> {
    let Some(parameters) = Parameters::parse(parameters) else {
        return broken("A parameter came twice, or there are too many.");
    };
    let cookie_value = cookie::single(&parts.headers, LOGIN_COOKIE).ok().flatten();
    let login = cookie_value.and_then(|id| provider.logins.get(id));
    // An expired hint still says whose login is meant.
    let hint = parameters.get("id_token_hint").and_then(|token| provider.keys.verify("JWT", token));
    let claim = |name: &str| hint.as_ref().and_then(|token| token.claims.get(name)).and_then(Value::as_str);
    let confirmed = parts.method == Method::POST
        && parameters.get("confirm").is_some()
        && is_same_origin(&parts.headers, &provider.origin);
    let hinted = claim("sub").is_some() && claim("sub") == login.as_ref().map(|login| login.user.as_str());
    if login.is_some() && !confirmed && !hinted {
        return answer::page(
            StatusCode::OK,
            "Log out?",
            "'self'",
            html! {
                h1 { "Log out?" }
                p { "You are logged in here. Shall that end?" }
                form method="post" action="/logout" {
                    input type="hidden" name="confirm" value="yes";
                    button type="submit" { "Log out" }
                }
            },
        );
    }
    if let Some(id) = cookie_value {
        provider.logins.end(id);
    }
    // Only to an address that the client of the hint has registered.
    let client = claim("aud").and_then(|id| provider.client(id));
    let next = parameters.get("post_logout_redirect_uri").filter(|uri| {
        client
            .is_some_and(|client| client.post_logout_redirect_uris.iter().any(|known| known.as_str() == *uri))
    });
    let mut response = match next.and_then(|uri| Url::parse(uri).ok()) {
        Some(mut uri) => {
            if let Some(state) = parameters.get("state") {
                uri.query_pairs_mut().append_pair("state", state);
            }
            answer::redirect(StatusCode::SEE_OTHER, uri.as_str())
        }
        None => answer::page(
            StatusCode::OK,
            "Logged out",
            "'none'",
            html! {
                h1 { "Logged out" }
                p { "You can close this page." }
            },
        ),
    };
    if let Some(clear) = cookie::clear(LOGIN_COOKIE) {
        response.headers_mut().append(header::SET_COOKIE, clear);
    }
    response
}

/// Sends the browser back with a code.
fn grant(provider: &Provider, authorization: Authorization, login: Login) -> Response<Body> {
    let Authorization { client, redirect_uri, state, nonce, scopes, challenge } = authorization;
    let grant = Grant { login, client, redirect_uri: redirect_uri.clone(), challenge, scopes, nonce };
    match provider.codes.issue(grant) {
        Ok(code) => send_back(provider, &redirect_uri, state.as_deref(), &[("code", &code)]),
        Err(_) => {
            send_back(provider, &redirect_uri, state.as_deref(), &[("error", "temporarily_unavailable")])
        }
    }
}

/// Back to the client, with `state` and `iss` (RFC 9207). 303: a form's body goes no further.
fn send_back(
    provider: &Provider,
    redirect_uri: &str,
    state: Option<&str>,
    pairs: &[(&str, &str)],
) -> Response<Body> {
    let Ok(mut uri) = Url::parse(redirect_uri) else { return broken("The application cannot be answered.") };
    uri.query_pairs_mut().extend_pairs(pairs).append_pair("iss", provider.issuer.as_str());
    if let Some(state) = state {
        uri.query_pairs_mut().append_pair("state", state);
    }
    answer::redirect(StatusCode::SEE_OTHER, uri.as_str())
}

fn form(
    provider: &Provider,
    headers: &HeaderMap,
    authorization: &Authorization,
    status: StatusCode,
    error: Option<&str>,
) -> Response<Body> {
    let Ok(begun) = flows(provider).begin(headers, authorization) else {
        return answer::json(StatusCode::SERVICE_UNAVAILABLE, &serde_json::json!({ "error": "unavailable" }));
    };
    // Browsers hold the redirect after the form against form-action too, so the client's origin is in it.
    let client_origin = Url::parse(&authorization.redirect_uri).map(|uri| uri.origin().ascii_serialization());
    let form_action = format!("'self' {}", client_origin.unwrap_or_default());
    let content: Markup = html! {
        h1 { "Log in" }
        p { "to continue to " strong { (authorization.client) } }
        @if let Some(error) = error { p.error role="alert" { (error) } }
        form method="post" action="/login" {
            input type="hidden" name="request" value=(begun.token);
            label for="username" { "Name" }
            input id="username" name="username" type="text" autocomplete="username" autocapitalize="none" spellcheck="false" required autofocus;
            label for="password" { "Password" }
            input id="password" name="password" type="password" autocomplete="current-password" required;
            button type="submit" { "Log in" }
        }
    };
    let mut response = answer::page(status, "Log in", &form_action, content);
    for cookie in begun.cookies {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    response
}

/// A page for what cannot be answered anywhere else. Its texts are fixed.
fn broken(text: &'static str) -> Response<Body> {
    answer::page(
        StatusCode::BAD_REQUEST,
        "This login cannot go on",
        "'none'",
        html! {
            h1 { "This login cannot go on" }
            p { (text) " Please start again from the application." }
        },
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use identity::clock::ManualClock;

    use super::*;
    use crate::config::Rate;

    #[test]
    fn an_address_that_has_used_up_its_attempts_locks_nobody_else_out() {
        let clock = ManualClock::at(Duration::from_secs(1000));
        let limiter = || Limiter::new(Rate { per_second: 0.5, burst: 20 }, clock.clone());
        let (by_address, by_name) = (limiter(), limiter());
        let address = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let attacker = |name: &str| may_try(&by_address, &by_name, address("192.0.2.1:1"), name);
        assert_eq!((0..30).filter(|_| attacker("bob")).count(), 20);
        assert_eq!((0..30).filter(|_| attacker("alice")).count(), 0);
        assert!(may_try(&by_address, &by_name, address("192.0.2.2:1"), "alice"), "alice, from her own place");
    }
}
