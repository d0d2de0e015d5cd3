//! Logging people in and out: authorization code with PKCE, and a session at the end of it.

use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Response, StatusCode};
use identity::jws;
use identity::txn::User;
use maud::html;
use ring::digest::{SHA256, digest};
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use sidecar::Body;
use url::{Url, form_urlencoded};

use crate::flow::Flows;
use crate::gateway::Shared;
use crate::issuer::TokenError;
use crate::refusal::Refusal;
use crate::{OWN_PREFIX, answer, cookie, target};

/// Where the issuer sends browsers back to.
pub const CALLBACK: &str = "/.palisade/callback";
/// Where a logout ends, and where the issuer sends browsers back to after one.
pub const LOGGED_OUT: &str = "/.palisade/logged-out";
/// Longest place that a login comes back to; a longer one becomes the front page. It travels in `state`, of
/// which issuers take a few KiB (ours 4), and a login that an issuer refuses is worse than a forgotten link.
const MAX_RETURN_BYTES: usize = 2048;
/// Longest code or `iss` looked at.
const MAX_PARAMETER_BYTES: usize = 4096;

/// What a login must remember between leaving and coming back.
#[derive(Serialize, Deserialize)]
struct Login {
    issuer: String,
    nonce: String,
    verifier: String,
    return_to: String,
}

fn flows(gateway: &Shared) -> Flows<'_> {
    Flows {
        sealer: &gateway.flow_sealer,
        random: gateway.random.as_ref(),
        clock: gateway.clock.as_ref(),
        cookie_prefix: &gateway.flow_cookie,
        purpose: "login",
    }
}

/// `GET /.palisade/login?return_to=/…`
pub(crate) async fn login(gateway: &Shared, parts: &Parts) -> Result<Response<Body>, Refusal> {
    let query = parts.uri.query().unwrap_or_default();
    let return_to = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "return_to");
    let return_to = return_to.map_or_else(|| "/".to_owned(), |(_, value)| target::local(&value).to_owned());
    begin(gateway, parts, &return_to).await
}

/// Sends a browser to the issuer; it will come back to `return_to`.
pub(crate) async fn begin(
    gateway: &Shared,
    parts: &Parts,
    return_to: &str,
) -> Result<Response<Body>, Refusal> {
    let return_to = if return_to.len() > MAX_RETURN_BYTES { "/" } else { target::local(return_to) };
    // Cookies belong to one host: begun under another name of ours, the login could not be finished.
    if host_of(parts) != Some(gateway.public_authority.as_str()) {
        let mut here = gateway.url(&format!("{OWN_PREFIX}login"));
        here.query_pairs_mut().append_pair("return_to", return_to);
        return Ok(answer::redirect(StatusCode::FOUND, here.as_str()));
    }
    let issuer = gateway.issuers.for_login();
    let metadata =
        issuer.metadata().await.map_err(|error| Refusal::unavailable("login.issuer_unavailable", error))?;
    let random = |bytes: usize| -> Result<String, Refusal> {
        let mut buffer = vec![0; bytes];
        let filled = gateway.random.fill(&mut buffer);
        filled
            .map(|()| jws::encode(buffer))
            .map_err(|_| Refusal::unavailable("login.random", "no randomness"))
    };
    let (nonce, verifier) = (random(16)?, random(32)?);
    let challenge = jws::encode(digest(&SHA256, verifier.as_bytes()));
    let payload = Login {
        issuer: issuer.issuer().as_str().to_owned(),
        nonce: nonce.clone(),
        verifier,
        return_to: return_to.to_owned(),
    };
    let begun = flows(gateway)
        .begin(&parts.headers, payload)
        .map_err(|error| Refusal::unavailable("login.begin", error))?;
    let mut location = metadata.authorization_endpoint;
    location
        .query_pairs_mut()
        .append_pair("response_type", "code")
        .append_pair("client_id", issuer.client_id())
        .append_pair("redirect_uri", gateway.url(CALLBACK).as_str())
        .append_pair("scope", &issuer.login_scope())
        .append_pair("state", &begun.token)
        .append_pair("nonce", &nonce)
        .append_pair("code_challenge", &challenge)
        .append_pair("code_challenge_method", "S256");
    let mut response = answer::redirect(StatusCode::FOUND, location.as_str());
    append_cookies(response.headers_mut(), begun.cookies);
    Ok(response)
}

/// What came back: every parameter at most once, and short.
#[derive(Default)]
struct Callback {
    code: Option<String>,
    state: Option<String>,
    iss: Option<String>,
    failed: bool,
}

impl Callback {
    fn parse(query: &str) -> Option<Self> {
        let mut callback = Self::default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let slot = match name.as_ref() {
                "code" => &mut callback.code,
                "state" => &mut callback.state,
                "iss" => &mut callback.iss,
                "error" => {
                    // What the error says came through the browser: it is shown to nobody.
                    callback.failed = true;
                    continue;
                }
                _ => continue,
            };
            if name != "state" && value.len() > MAX_PARAMETER_BYTES {
                return None;
            }
            if slot.replace(value.into_owned()).is_some() {
                return None;
            }
        }
        Some(callback)
    }
}

/// `GET /.palisade/callback`: the login comes back from the issuer (RFC 6749 §4.1.2, RFC 9207).
pub(crate) async fn callback(gateway: &Shared, parts: &Parts) -> Result<Response<Body>, Refusal> {
    let bad = |rule: &'static str, reason: String| {
        Refusal::new(StatusCode::BAD_REQUEST, "login_failed", rule, reason)
    };
    let callback = Callback::parse(parts.uri.query().unwrap_or_default())
        .ok_or_else(|| bad("login.callback", "a parameter came twice or is too long".into()))?;
    let state = callback.state.ok_or_else(|| bad("login.state", "there is no state".into()))?;
    let (login, clear) = flows(gateway)
        .finish::<Login>(&parts.headers, &state)
        .map_err(|error| bad("login.state", error.to_string()))?;
    let issuer = gateway
        .issuers
        .get(&login.issuer)
        .ok_or_else(|| bad("login.issuer", "its issuer is no longer configured".into()))?;
    let metadata =
        issuer.metadata().await.map_err(|error| Refusal::unavailable("login.issuer_unavailable", error))?;
    match callback.iss.as_deref() {
        Some(iss) if iss == login.issuer => {}
        None if !metadata.iss_parameter => {}
        _ => return Err(bad("login.issuer", "the answer is not from the issuer that was asked".into())),
    }
    if callback.failed {
        return Err(bad("login.refused", "the issuer refused the login".into()));
    }
    let code = callback.code.ok_or_else(|| bad("login.code", "there is no code".into()))?;
    let redirect_uri = gateway.url(CALLBACK);
    let exchanged = issuer.exchange_code(&code, redirect_uri.as_str(), &login.verifier, &login.nonce).await;
    let tokens = exchanged.map_err(|error| match error {
        TokenError::Unavailable(_) | TokenError::Lost(_) => {
            Refusal::unavailable("login.issuer_unavailable", error)
        }
        error => bad("login.code", error.to_string()),
    })?;
    let id = tokens.id.as_ref().ok_or_else(|| bad("login.id_token", "there is no ID token".into()))?;
    let asked = || issuer.login_scope().split(' ').map(str::to_owned).collect();
    let user = User {
        id: id.subject.clone(),
        issuer: login.issuer.clone(),
        client: issuer.client_id().to_owned(),
        // RFC 6749 §5.1: an answer without scope grants what was asked.
        scopes: tokens.scopes.clone().unwrap_or_else(asked),
        groups: id.groups.clone(),
        auth_time: id.auth_time,
        tenant: id.tenant.clone(),
        mfa: id.mfa,
    };
    tracing::info!(user = user.id, issuer = user.issuer, "logged in");
    let replaces = cookie::single(&parts.headers, &gateway.cookie).ok().flatten();
    let session = gateway
        .sessions
        .create(user, tokens, replaces)
        .await
        .map_err(|error| Refusal::unavailable("session.store", error))?;
    let mut response = answer::redirect(StatusCode::SEE_OTHER, target::local(&login.return_to));
    let session = cookie::set(&gateway.cookie, &session, None)
        .ok_or_else(|| Refusal::unavailable("session.cookie", "the cookie cannot be written"))?;
    append_cookies(response.headers_mut(), vec![session, clear]);
    Ok(response)
}

/// `POST /.palisade/logout`: ends the session here, revokes its refresh token, and leads the browser to
/// the issuer's end-session endpoint (OpenID Connect RP-Initiated Logout §2), which leads it back.
pub(crate) async fn logout(gateway: &Shared, parts: &Parts) -> Result<Response<Body>, Refusal> {
    if parts.method != Method::POST {
        return Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            "logout.method",
            "logout is a POST",
        )
        .with(header::ALLOW, HeaderValue::from_static("POST")));
    }
    check_origin(gateway, &parts.headers)?;
    let session = cookie::single(&parts.headers, &gateway.cookie)
        .map_err(|_| Refusal::malformed("request.cookie_twice"))?
        .unwrap_or_default();
    let ended =
        gateway.sessions.end(session).await.map_err(|error| Refusal::unavailable("session.store", error))?;
    let mut location = None;
    if let Some(ended) = ended {
        tracing::info!(user = ended.user.id, issuer = ended.user.issuer, "logged out");
        if let Some(issuer) = gateway.issuers.get(&ended.user.issuer) {
            if let Some(token) = ended.refresh_token {
                let issuer = std::sync::Arc::clone(issuer);
                gateway.scope.spawn("token revocation", async move { issuer.revoke(&token).await });
            }
            let endpoint = issuer.metadata().await.ok().and_then(|metadata| metadata.end_session_endpoint);
            location = endpoint.map(|mut url: Url| {
                let mut query = url.query_pairs_mut();
                if let Some(hint) = &ended.id_token {
                    query.append_pair("id_token_hint", hint.expose_secret());
                }
                query
                    .append_pair("client_id", issuer.client_id())
                    .append_pair("post_logout_redirect_uri", gateway.url(LOGGED_OUT).as_str());
                drop(query);
                url
            });
        }
    }
    let mut response = match location {
        _ if !answer::is_navigation(&parts.headers) => answer::empty(StatusCode::NO_CONTENT),
        Some(issuer) => leave_for(&issuer),
        None => answer::redirect(StatusCode::SEE_OTHER, gateway.url(LOGGED_OUT).as_str()),
    };
    append_cookies(response.headers_mut(), cookie::clear(&gateway.cookie).into_iter().collect());
    // Pages of the session may still be in the browser's cache.
    response.headers_mut().insert("clear-site-data", HeaderValue::from_static("\"cache\""));
    Ok(response)
}

/// A page that moves on to the issuer by itself.
///
/// Not a redirect: browsers hold where a form's redirects lead against `form-action` of the page with the
/// form. That page is the service's, and a strict one names no issuer, so the logout there would be blocked.
fn leave_for(issuer: &Url) -> Response<Body> {
    let mut response = answer::page(
        StatusCode::OK,
        "Logging out",
        "'none'",
        html! {
            h1 { "Logging out" }
            p { "The session here has ended. The one at the login page is next." }
            p { a href=(issuer) { "Go on" } }
        },
    );
    // A URL serialized holds no control characters; were it refused, the link is still there.
    if let Ok(refresh) = HeaderValue::try_from(format!("0;url={issuer}")) {
        response.headers_mut().insert(header::REFRESH, refresh);
    }
    response
}

/// `GET /.palisade/logged-out`: where a logout ends. Not `/`, which would lead to a login at once.
pub(crate) fn logged_out() -> Response<Body> {
    answer::page(
        StatusCode::OK,
        "Logged out",
        "'none'",
        html! {
            h1 { "Logged out" }
            p { "You can close this page, or " a href="/" { "log in again" } "." }
        },
    )
}

/// Refuses what another site made the browser send: cookies come along by themselves, intent does not.
///
/// `Sec-Fetch-Site` where the browser sends it, `Origin` otherwise; with neither there is no telling, so
/// it is refused. Sites that only share a registrable domain, or another port, are other sites here.
pub(crate) fn check_origin(gateway: &Shared, headers: &HeaderMap) -> Result<(), Refusal> {
    if is_same_origin(headers, &gateway.public_origin) {
        return Ok(());
    }
    Err(Refusal::new(
        StatusCode::FORBIDDEN,
        "cross_site_request",
        "request.cross_site",
        "an unsafe request with a session cookie that does not say it comes from this site",
    ))
}

/// Whether the browser says that a page of `origin` made it send this.
pub(crate) fn is_same_origin(headers: &HeaderMap, origin: &str) -> bool {
    let mut values = headers.get_all(header::ORIGIN).iter();
    let (sent, second) = (values.next(), values.next());
    let fits = sent.map(|sent| sent.as_bytes() == origin.as_bytes());
    let from_here = match headers.get("sec-fetch-site").map(HeaderValue::as_bytes) {
        // A page without referrers sends the origin `null`, also to its own site.
        Some(site) => {
            site == b"same-origin" && (fits != Some(false) || sent.is_some_and(|sent| sent == "null"))
        }
        None => fits == Some(true),
    };
    from_here && second.is_none()
}

fn append_cookies(headers: &mut HeaderMap, cookies: Vec<HeaderValue>) {
    for cookie in cookies {
        headers.append(header::SET_COOKIE, cookie);
    }
}

fn host_of(parts: &Parts) -> Option<&str> {
    match parts.uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => parts.headers.get(header::HOST)?.to_str().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_28_an_unsafe_request_must_say_that_it_comes_from_this_site() {
        let fits = |pairs: &[(&'static str, &'static str)]| {
            let headers: HeaderMap = pairs
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
                .collect();
            is_same_origin(&headers, "https://bank.example:8443")
        };
        assert!(fits(&[("sec-fetch-site", "same-origin")]));
        assert!(fits(&[("origin", "https://bank.example:8443")]));
        assert!(fits(&[("sec-fetch-site", "same-origin"), ("origin", "https://bank.example:8443")]));
        assert!(fits(&[("sec-fetch-site", "same-origin"), ("origin", "null")]));
        for bad in [
            &[][..],
            &[("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "same-site")],
            &[("sec-fetch-site", "none")],
            &[("origin", "null")],
            &[("origin", "https://bank.example")],
            &[("origin", "http://bank.example:8443")],
            &[("origin", "https://bank.example:8443.evil.example")],
            &[("sec-fetch-site", "same-origin"), ("origin", "https://evil.example")],
            &[("sec-fetch-site", "cross-site"), ("origin", "https://bank.example:8443")],
        ] {
            assert!(!fits(bad), "{bad:?}");
        }
    }

    #[test]
    fn security_42_a_callback_with_missing_or_doubled_parameters_is_refused_and_does_not_crash() {
        assert!(Callback::parse("").is_some_and(|callback| callback.state.is_none()));
        assert!(Callback::parse("state=a&state=b").is_none());
        assert!(Callback::parse("code=a&code=b&state=c").is_none());
        assert!(Callback::parse(&format!("code={}", "a".repeat(MAX_PARAMETER_BYTES + 1))).is_none());
        let callback = Callback::parse("error=%3Cscript%3E&error_description=x&state=s").unwrap();
        assert!(callback.failed && callback.code.is_none());
    }
}
