//! Answers that the gateway gives itself. None repeats anything of the request.

use http::header::{self, HeaderMap, HeaderValue};
use http::{Response, StatusCode};
use maud::{DOCTYPE, Markup, html};
use ring::digest::{SHA256, digest};
use serde_json::json;
use sidecar::Body;

/// The one style sheet of the gateway's and the identity provider's pages.
pub(crate) const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c2430;--dim:#5a6675;--line:#ccd3db;--paper:#fff;--back:#eef1f4;--key:#1f5f8b}\
@media(prefers-color-scheme:dark){:root{--ink:#e6eaef;--dim:#9aa6b4;--line:#3a4450;--paper:#1b222b;--back:#12171d;--key:#6fb3e0}}\
*{box-sizing:border-box}\
body{margin:0;min-height:100vh;display:grid;place-items:center;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}\
main{width:min(26rem,calc(100vw - 2rem));padding:2rem;background:var(--paper);border:1px solid var(--line);border-radius:.6rem}\
h1{margin:0 0 .25rem;font-size:1.35rem}p{margin:.25rem 0 1rem;color:var(--dim)}\
label{display:block;margin:.9rem 0 .25rem;font-weight:600}\
input{width:100%;padding:.55rem .7rem;font:inherit;color:inherit;background:var(--back);border:1px solid var(--line);border-radius:.35rem}\
button{width:100%;margin-top:1.4rem;padding:.6rem;font:inherit;font-weight:600;color:var(--paper);background:var(--key);border:0;border-radius:.35rem;cursor:pointer}\
:focus-visible{outline:2px solid var(--key);outline-offset:2px}\
.error{padding:.5rem .7rem;color:var(--ink);border-left:.25rem solid #c0392b;background:var(--back)}\
code{font-size:.9em}a{color:var(--key)}";

/// A page. `form_action` is where its forms may lead, redirects included (CSP `form-action`).
pub(crate) fn page(status: StatusCode, title: &str, form_action: &str, content: Markup) -> Response<Body> {
    use base64::Engine as _;
    let style_hash = base64::engine::general_purpose::STANDARD.encode(digest(&SHA256, STYLE.as_bytes()));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{style_hash}'; img-src data:; form-action {form_action}; frame-ancestors 'none'; base-uri 'none'"
    );
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                // Else browsers ask for /favicon.ico, which may be nobody's: a denial for every page.
                link rel="icon" href="data:,";
                style { (maud::PreEscaped(STYLE)) }
            }
            body { main { (content) } }
        }
    };
    let mut response = text(status, "text/html; charset=utf-8", markup.into_string());
    // The origins in `form_action` were parsed as URLs, so they hold nothing that a header could not.
    let policy =
        HeaderValue::try_from(policy).unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'"));
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}

/// A JSON document.
pub(crate) fn json(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    text(status, "application/json", value.to_string())
}

/// A redirect. 303 after a form, 302 for a navigation.
pub(crate) fn redirect(status: StatusCode, location: &str) -> Response<Body> {
    let mut response = empty(status);
    match HeaderValue::try_from(location) {
        Ok(location) => {
            response.headers_mut().insert(header::LOCATION, location);
        }
        Err(_) => *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR,
    }
    response
}

/// An answer without a body.
pub(crate) fn empty(status: StatusCode) -> Response<Body> {
    text(status, "", String::new())
}

fn text(status: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(sidecar::full(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if !content_type.is_empty() {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    // What we answer ourselves is about this user at this moment.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // Not `no-referrer`: under it browsers send `Origin: null` with forms, which says nothing.
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    response
}

/// Whether the caller is a browser that shows pages: a navigation, not `fetch` or an API client.
pub(crate) fn is_navigation(headers: &HeaderMap) -> bool {
    let field = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if field("sec-fetch-mode").is_some_and(|mode| mode != "navigate")
        || headers.contains_key("x-requested-with")
    {
        return false;
    }
    field("accept").is_some_and(|accept| {
        accept.split(',').any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim() == "text/html"))
    })
}

/// A refusal: JSON for programs, a small page for people. Both say what kind, and the receipt.
pub(crate) fn refusal(
    for_people: bool,
    status: StatusCode,
    error: &'static str,
    receipt: Option<&str>,
) -> Response<Body> {
    if !for_people {
        let body = match receipt {
            Some(receipt) => json!({ "error": error, "receipt": receipt }),
            None => json!({ "error": error }),
        };
        return json(status, &body);
    }
    let (title, text) = explain(status);
    page(
        status,
        title,
        "'none'",
        html! {
            h1 { (title) }
            p { (text) }
            @if let Some(receipt) = receipt { p { "Receipt: " code { (receipt) } } }
            p { a href="/" { "Back to the start" } }
        },
    )
}

fn explain(status: StatusCode) -> (&'static str, &'static str) {
    match status {
        StatusCode::BAD_REQUEST => (
            "That request is not accepted",
            "It could be read in more than one way, or has expired. Please start again.",
        ),
        StatusCode::UNAUTHORIZED => ("Please log in", "This page needs a login."),
        StatusCode::FORBIDDEN => (
            "You may not do that",
            "No rule allows this request. If it should be allowed, give the receipt to whoever runs this site.",
        ),
        StatusCode::NOT_FOUND => ("Nothing here", "There is no such page."),
        StatusCode::TOO_MANY_REQUESTS => ("Too many requests", "Please wait a moment and try again."),
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => (
            "Not available just now",
            "Something behind this page does not answer. Please try again in a moment.",
        ),
        _ => ("Something went wrong", "Please try again."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_21_only_a_navigation_is_ever_redirected() {
        let headers = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            pairs
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
                .collect()
        };
        assert!(is_navigation(&headers(&[("accept", "text/html,application/xhtml+xml;q=0.9")])));
        assert!(is_navigation(&headers(&[("accept", "text/html"), ("sec-fetch-mode", "navigate")])));
        for other in [
            headers(&[]),
            headers(&[("accept", "*/*")]),
            headers(&[("accept", "application/json")]),
            headers(&[("accept", "text/html"), ("sec-fetch-mode", "cors")]),
            headers(&[("accept", "text/html"), ("x-requested-with", "XMLHttpRequest")]),
        ] {
            assert!(!is_navigation(&other), "{other:?}");
        }
    }
}
