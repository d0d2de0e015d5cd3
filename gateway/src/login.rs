//! A login without a browser: fills in a login form as a person would, for command lines and tests.
//!
//! It knows pages with one form, hidden fields, and fields named `username` and `password`: the embedded
//! provider's. It is a stand-in for a person, not a parser of other people's pages.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response};
use identity::clock::SharedClock;
use identity::{json, jws};
use ring::digest::{SHA256, digest};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::Value;
use thiserror::Error;
use url::{Url, form_urlencoded};

use crate::SharedRandom;
use crate::config::{Issuer, SESSION_COOKIE};
use crate::https::{HttpClient, HttpsClient, HttpsError, Trust};

/// Redirects followed in one login: out to the issuer and back are four.
const MAX_REDIRECTS: usize = 10;

/// Why a login did not work.
#[derive(Debug, Error)]
pub enum LoginError {
    /// No answer.
    #[error("{0}")]
    Https(#[from] HttpsError),
    /// TLS cannot be configured.
    #[error("TLS cannot be configured: {0}")]
    Tls(#[from] rustls::Error),
    /// Something other than a login form came back.
    #[error("expected a login form from {url}, got status {status}")]
    NoForm {
        /// From where.
        url: String,
        /// The status.
        status: u16,
    },
    /// The name and password were not accepted.
    #[error("the login was refused with status {0}")]
    Refused(u16),
    /// An answer is not what the protocol says.
    #[error("{0}")]
    Protocol(&'static str),
    /// No randomness.
    #[error("no randomness")]
    Random,
}

/// Tokens of a login.
#[derive(Debug)]
pub struct Tokens {
    /// For `Authorization: Bearer`.
    pub access_token: SecretString,
    /// For the client itself.
    pub id_token: Option<SecretString>,
    /// If `offline_access` was granted.
    pub refresh_token: Option<SecretString>,
    /// Life of the access token, seconds.
    pub expires_in: u64,
}

/// Who logs in.
#[derive(Debug, Clone, Copy)]
pub struct Person<'a> {
    /// The name typed.
    pub name: &'a str,
    /// The password typed.
    pub password: &'a SecretString,
}

/// Gets tokens as a public client (authorization code with PKCE, RFC 8252 without the browser).
///
/// `redirect_uri` is one that the issuer lets `client_id` use; nothing needs to listen there.
#[expect(clippy::too_many_arguments, reason = "each is a different part of an authorization request")]
pub async fn access_token(
    issuer: &Issuer,
    client_id: &str,
    redirect_uri: &Url,
    scope: &str,
    person: Person<'_>,
    trust: Trust,
    clock: &SharedClock,
    random: &SharedRandom,
) -> Result<Tokens, LoginError> {
    let mut agent = Agent::new(HttpsClient::new(trust, clock)?);
    let endpoints = agent.get(&parse(&issuer.discovery())?).await?;
    let endpoints =
        json::parse_object(endpoints.body()).map_err(|_| LoginError::Protocol("discovery is not JSON"))?;
    let endpoint = |name: &str| {
        let url = endpoints.get(name).and_then(Value::as_str).and_then(|text| Url::parse(text).ok());
        url.filter(|url| issuer.same_origin(url)).ok_or(LoginError::Protocol("discovery lacks an endpoint"))
    };
    let (state, verifier) = (random_text(random)?, random_text(random)?);
    let mut start = endpoint("authorization_endpoint")?;
    start
        .query_pairs_mut()
        .append_pair("response_type", "code")
        .append_pair("client_id", client_id)
        .append_pair("redirect_uri", redirect_uri.as_str())
        .append_pair("scope", scope)
        .append_pair("state", &state)
        .append_pair("code_challenge", &jws::encode(digest(&SHA256, verifier.as_bytes())))
        .append_pair("code_challenge_method", "S256");
    let back = agent.log_in(start, person, |url| url.as_str().starts_with(redirect_uri.as_str())).await?;
    let parameters: HashMap<_, _> = back.query_pairs().into_owned().collect();
    if parameters.get("state") != Some(&state)
        || parameters.get("iss").is_some_and(|iss| iss != issuer.as_str())
    {
        return Err(LoginError::Protocol("the answer does not belong to this login"));
    }
    let code = parameters.get("code").ok_or(LoginError::Protocol("the issuer gave no code"))?;
    let form = [
        ("grant_type", "authorization_code"),
        ("client_id", client_id),
        ("redirect_uri", redirect_uri.as_str()),
        ("code", code),
        ("code_verifier", &verifier),
    ];
    let answer = agent.post(&endpoint("token_endpoint")?, &form).await?;
    if !answer.status().is_success() {
        return Err(LoginError::Refused(answer.status().as_u16()));
    }
    let answer = json::parse_object(answer.body())
        .map_err(|_| LoginError::Protocol("the token answer is not JSON"))?;
    let secret = |name: &str| answer.get(name).and_then(Value::as_str).map(|text| text.to_owned().into());
    Ok(Tokens {
        access_token: secret("access_token")
            .ok_or(LoginError::Protocol("the token answer has no access token"))?,
        id_token: secret("id_token"),
        refresh_token: secret("refresh_token"),
        expires_in: answer.get("expires_in").and_then(Value::as_u64).unwrap_or_default(),
    })
}

/// Logs in at a gateway and returns what a browser would then send as `Cookie`: `__Host-palisade=…`.
pub async fn browser_session(
    gateway: &Url,
    person: Person<'_>,
    trust: Trust,
    clock: &SharedClock,
) -> Result<SecretString, LoginError> {
    let mut agent = Agent::new(HttpsClient::new(trust, clock)?);
    let start =
        gateway.join("/.palisade/login").map_err(|_| LoginError::Protocol("the gateway's URL is wrong"))?;
    let origin = gateway.origin();
    agent
        .log_in(start, person, |url| url.origin() == origin && !url.path().starts_with(crate::OWN_PREFIX))
        .await?;
    agent.cookie(gateway, SESSION_COOKIE).ok_or(LoginError::Protocol("the gateway gave no session"))
}

/// A browser reduced to cookies, redirects and one form.
struct Agent {
    http: Arc<dyn HttpClient>,
    /// By host, as browsers keep them: ports do not separate cookies.
    cookies: HashMap<String, HashMap<String, String>>,
}

struct Form {
    action: Url,
    hidden: Vec<(String, String)>,
}

impl Agent {
    fn new(http: Arc<dyn HttpClient>) -> Self {
        Self { http, cookies: HashMap::new() }
    }

    /// Follows `start` to a login form, fills it in, and follows on until `done` with a location.
    async fn log_in(
        &mut self,
        start: Url,
        person: Person<'_>,
        done: impl Fn(&Url) -> bool,
    ) -> Result<Url, LoginError> {
        let (url, page) = match self.follow(Method::GET, start, None, &done).await? {
            Reached::Done(url) => return Ok(url),
            Reached::Page(url, page) => (url, page),
        };
        let text = String::from_utf8_lossy(page.body());
        let no_form = || LoginError::NoForm { url: without_query(&url), status: page.status().as_u16() };
        let form = Form::find(&text, &url).ok_or_else(no_form)?;
        let body = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(&form.hidden)
            .append_pair("username", person.name)
            .append_pair("password", person.password.expose_secret())
            .finish();
        match self.follow(Method::POST, form.action, Some(body), &done).await? {
            Reached::Done(url) => Ok(url),
            Reached::Page(_, page) => Err(LoginError::Refused(page.status().as_u16())),
        }
    }

    async fn follow(
        &mut self,
        method: Method,
        url: Url,
        body: Option<String>,
        done: &impl Fn(&Url) -> bool,
    ) -> Result<Reached, LoginError> {
        let (mut method, mut url, mut body) = (method, url, body);
        for _ in 0..MAX_REDIRECTS {
            let answer = self.send(method, &url, body.take(), "text/html").await?;
            let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let Some(location) = location.filter(|_| answer.status().is_redirection()) else {
                return Ok(Reached::Page(url, answer));
            };
            url = url.join(location).map_err(|_| LoginError::Protocol("a redirect leads nowhere"))?;
            if done(&url) {
                return Ok(Reached::Done(url));
            }
            method = Method::GET;
        }
        Err(LoginError::Protocol("too many redirects"))
    }

    async fn get(&mut self, url: &Url) -> Result<Response<Bytes>, LoginError> {
        self.send(Method::GET, url, None, "application/json").await
    }

    async fn post(&mut self, url: &Url, form: &[(&str, &str)]) -> Result<Response<Bytes>, LoginError> {
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        self.send(Method::POST, url, Some(body), "application/json").await
    }

    async fn send(
        &mut self,
        method: Method,
        url: &Url,
        body: Option<String>,
        accept: &'static str,
    ) -> Result<Response<Bytes>, LoginError> {
        let mut request = Request::builder().method(method).uri(url.as_str()).header(header::ACCEPT, accept);
        if let Some(body) = &body {
            request = request
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .header(header::CONTENT_LENGTH, body.len())
                .header(header::ORIGIN, url.origin().ascii_serialization());
        }
        let host = url.host_str().unwrap_or_default().to_owned();
        if let Some(jar) = self.cookies.get(&host).filter(|jar| !jar.is_empty()) {
            let pairs: Vec<_> = jar.iter().map(|(name, value)| format!("{name}={value}")).collect();
            request = request.header(header::COOKIE, pairs.join("; "));
        }
        let request = request.body(Bytes::from(body.unwrap_or_default())).map_err(|_| HttpsError::Target)?;
        let answer = self.http.send(request).await?;
        let jar = self.cookies.entry(host).or_default();
        for value in answer.headers().get_all(header::SET_COOKIE) {
            keep(jar, value);
        }
        Ok(answer)
    }

    fn cookie(&self, url: &Url, name: &str) -> Option<SecretString> {
        let value = self.cookies.get(url.host_str()?)?.get(name)?;
        Some(format!("{name}={value}").into())
    }
}

enum Reached {
    /// A location that the caller was waiting for; not visited.
    Done(Url),
    /// A page that leads nowhere further.
    Page(Url, Response<Bytes>),
}

fn keep(jar: &mut HashMap<String, String>, set: &HeaderValue) {
    let Some((name, rest)) = set.to_str().ok().and_then(|text| text.split_once('=')) else { return };
    let mut attributes = rest.split(';').map(str::trim);
    let value = attributes.next().unwrap_or_default();
    if attributes.any(|attribute| attribute.eq_ignore_ascii_case("max-age=0")) {
        jar.remove(name.trim());
    } else {
        jar.insert(name.trim().to_owned(), value.to_owned());
    }
}

impl Form {
    fn find(page: &str, base: &Url) -> Option<Self> {
        let (_, form) = page.split_once("<form")?;
        let (tag, form) = form.split_once('>')?;
        let (inside, _) = form.split_once("</form>")?;
        let action = base.join(&attribute(tag, "action")?).ok()?;
        let inputs = inside.split("<input").skip(1).filter_map(|input| input.split('>').next());
        let mut password = false;
        let mut hidden = Vec::new();
        for input in inputs {
            match attribute(input, "type").as_deref() {
                Some("hidden") => {
                    hidden.push((attribute(input, "name")?, attribute(input, "value").unwrap_or_default()))
                }
                Some("password") => password = true,
                _ => {}
            }
        }
        password.then_some(Self { action, hidden })
    }
}

fn attribute(tag: &str, name: &str) -> Option<String> {
    let (_, rest) = tag.split_once(&format!(" {name}=\""))?;
    let (value, _) = rest.split_once('"')?;
    Some(value.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&"))
}

fn parse(text: &str) -> Result<Url, LoginError> {
    Url::parse(text).map_err(|_| LoginError::Protocol("a URL is wrong"))
}

fn without_query(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.into()
}

fn random_text(random: &SharedRandom) -> Result<String, LoginError> {
    let mut bytes = [0; 32];
    random.fill(&mut bytes).map_err(|_| LoginError::Random)?;
    Ok(jws::encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_found_with_its_hidden_fields() {
        let page = r#"<h1>x</h1><form method="post" action="/login"><input type="hidden" name="request" value="a&amp;b">
            <input id="u" name="username" type="text"><input name="password" type="password"></form>"#;
        let form = Form::find(page, &"https://idp.example/authorize?x=y".parse().unwrap()).unwrap();
        assert_eq!(form.action.as_str(), "https://idp.example/login");
        assert_eq!(form.hidden, [("request".to_owned(), "a&b".to_owned())]);
        assert!(Form::find("<p>no form</p>", &"https://idp.example/".parse().unwrap()).is_none());
        let other = r#"<form action="/search"><input type="text" name="q"></form>"#;
        assert!(Form::find(other, &"https://idp.example/".parse().unwrap()).is_none());
    }
}
