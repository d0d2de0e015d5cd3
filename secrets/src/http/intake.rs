//! The parts of a request that are read before anything is decided: headers that may appear once, headers
//! that ask for what does not exist here, and the body.

use bytes::Bytes;
use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderName, ORIGIN};
use http::{StatusCode, request::Parts};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use secrecy::SecretString;

use super::reply::ApiError;
use super::{BODY_TIMEOUT, Front, MAX_BODY_BYTES, MAX_HEADERS};

const TOKEN: HeaderName = HeaderName::from_static("x-vault-token");
const NAMESPACE: HeaderName = HeaderName::from_static("x-vault-namespace");
const WRAP_TTL: HeaderName = HeaderName::from_static("x-vault-wrap-ttl");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const BEARER: &str = "Bearer ";

/// What the headers say.
pub(crate) struct Intake {
    /// The token, from whichever of its two headers is there.
    pub(crate) token: Option<SecretString>,
    /// The W3C trace id.
    pub(crate) trace_id: Option<String>,
}

/// Reads the headers. A forwarded client certificate is not among those that mean anything.
pub(crate) fn headers(front: Front, parts: &Parts) -> Result<Intake, ApiError> {
    let headers = &parts.headers;
    if headers.len() > MAX_HEADERS {
        return Err(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "too many headers"));
    }
    if front == Front::Operator {
        refuse_browsers(headers)?;
    }
    // To ignore these would be to answer from another namespace, or in the clear, than was asked for.
    if headers
        .get_all(NAMESPACE)
        .iter()
        .any(|name| !matches!(name.as_bytes(), b"" | b"/" | b"root" | b"root/"))
    {
        return Err(ApiError::bad_request("namespaces are not supported"));
    }
    if headers.contains_key(WRAP_TTL) {
        return Err(ApiError::bad_request("response wrapping is not supported"));
    }
    Ok(Intake { token: token(headers)?, trace_id: trace_id(headers) })
}

/// A page in a browser on the same host can send requests here, under its own name or, after rebinding
/// one, under ours: neither is a tool with a token.
fn refuse_browsers(headers: &HeaderMap) -> Result<(), ApiError> {
    let host = headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    };
    if headers.contains_key(ORIGIN) || !matches!(name, "127.0.0.1" | "localhost" | "[::1]" | "") {
        return Err(ApiError::new(StatusCode::FORBIDDEN, "requests from web pages are refused"));
    }
    Ok(())
}

fn token(headers: &HeaderMap) -> Result<Option<SecretString>, ApiError> {
    let mut tokens = Vec::new();
    for value in headers.get_all(TOKEN) {
        tokens.push(value.to_str().map_err(|_| ApiError::bad_request("malformed X-Vault-Token"))?);
    }
    for value in headers.get_all(AUTHORIZATION) {
        let text = value.to_str().ok().and_then(|text| text.strip_prefix(BEARER));
        tokens.push(text.ok_or_else(|| ApiError::bad_request("Authorization must be a Bearer token"))?);
    }
    match tokens.as_slice() {
        [] | [""] => Ok(None),
        [token] => Ok(Some(SecretString::from((*token).to_owned()))),
        // Two readers could obey different ones.
        _ => Err(ApiError::bad_request("more than one token")),
    }
}

fn trace_id(headers: &HeaderMap) -> Option<String> {
    let mut parts = headers.get(TRACEPARENT)?.to_str().ok()?.split('-');
    let id = parts.nth(1)?;
    (id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| id.to_owned())
}

/// Reads the whole body within its limits of size and time.
pub(crate) async fn body(body: Incoming) -> Result<Bytes, ApiError> {
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY_BYTES).collect()).await;
    match collected {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request body too large"))
        }
        Ok(Err(_)) => Err(ApiError::bad_request("the request body broke off")),
        Err(_) => Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "the request body took too long")),
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use secrecy::ExposeSecret as _;

    use super::*;

    fn read(front: Front, headers: &[(&str, &str)]) -> Result<Intake, ApiError> {
        let mut request = Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        super::headers(front, &request.body(()).unwrap().into_parts().0)
    }

    fn status(front: Front, headers: &[(&str, &str)]) -> u16 {
        read(front, headers).err().map_or(200, |error| error.status.as_u16())
    }

    #[test]
    fn vault_21_two_tokens_are_refused_however_they_come() {
        let token = read(Front::Mesh, &[("X-Vault-Token", "a")]).unwrap().token.unwrap();
        assert_eq!(token.expose_secret(), "a");
        let token = read(Front::Mesh, &[("Authorization", "Bearer b")]).unwrap().token.unwrap();
        assert_eq!(token.expose_secret(), "b");
        assert_eq!(status(Front::Mesh, &[("X-Vault-Token", "a"), ("X-Vault-Token", "a")]), 400);
        assert_eq!(status(Front::Mesh, &[("X-Vault-Token", "a"), ("Authorization", "Bearer a")]), 400);
        assert_eq!(status(Front::Mesh, &[("X-Vault-Token", "a"), ("X-Vault-Token", "")]), 400);
        assert_eq!(status(Front::Mesh, &[("Authorization", "Basic YTpi")]), 400);
        assert!(read(Front::Mesh, &[("X-Vault-Token", "")]).unwrap().token.is_none());
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_and_not_passed_over() {
        assert_eq!(status(Front::Mesh, &[("X-Vault-Namespace", "team-a")]), 400);
        assert_eq!(status(Front::Mesh, &[("X-Vault-Namespace", "")]), 200);
        assert_eq!(status(Front::Mesh, &[("X-Vault-Wrap-TTL", "60")]), 400);
    }

    #[test]
    fn web_pages_are_kept_from_the_operators_listener() {
        assert_eq!(status(Front::Operator, &[("Host", "127.0.0.1:8200")]), 200);
        assert_eq!(status(Front::Operator, &[("Host", "localhost:8200")]), 200);
        assert_eq!(status(Front::Operator, &[("Host", "[::1]:8200")]), 200);
        assert_eq!(status(Front::Operator, &[("Host", "evil.example:8200")]), 403);
        assert_eq!(status(Front::Operator, &[("Host", "127.0.0.1.evil.example")]), 403);
        assert_eq!(
            status(Front::Operator, &[("Host", "127.0.0.1"), ("Origin", "https://evil.example")]),
            403
        );
    }

    #[test]
    fn only_a_well_formed_trace_id_is_taken() {
        let of = |value: &str| read(Front::Mesh, &[("traceparent", value)]).unwrap().trace_id;
        let id = "0af7651916cd43dd8448eb211c80319c";
        assert_eq!(of(&format!("00-{id}-b7ad6b7169203331-01")).as_deref(), Some(id));
        assert_eq!(of("00-short-b7ad6b7169203331-01"), None);
    }
}
