//! Answers in Vault's shapes: the envelope around data, the list of errors, the status codes.

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use serde::Serialize;
use serde_json::{Value, json};

use super::route::RouteError;
use crate::audit::AuditError;
use crate::authorize::Refusal;
use crate::barrier::BarrierError;
use crate::core::CoreError;
use crate::kv::KvError;
use crate::seal::SealError;
use crate::token::TokenError;

/// A successful answer.
#[derive(Debug)]
pub(crate) enum Reply {
    /// 204.
    Empty,
    /// A body with a status of its own.
    Json { status: StatusCode, body: Vec<u8> },
}

impl Reply {
    /// 200 and a body that is not wrapped: the `sys` paths that work on a sealed vault.
    pub(crate) fn plain(body: &impl Serialize) -> Result<Self, ApiError> {
        Self::json(StatusCode::OK, body)
    }

    /// `body` with a status.
    pub(crate) fn json(status: StatusCode, body: &impl Serialize) -> Result<Self, ApiError> {
        let body =
            serde_json::to_vec(body).map_err(|_| ApiError::internal("an answer could not be written"))?;
        Ok(Self::Json { status, body })
    }

    /// `data` in Vault's envelope.
    pub(crate) fn data(request_id: &str, data: impl Serialize) -> Result<Self, ApiError> {
        Self::data_with(StatusCode::OK, request_id, data)
    }

    /// `data` in Vault's envelope, with a status: a deleted version is a 404 that tells of the deletion.
    pub(crate) fn data_with(
        status: StatusCode,
        request_id: &str,
        data: impl Serialize,
    ) -> Result<Self, ApiError> {
        Self::json(status, &Envelope::new(request_id, Some(data), None::<()>))
    }

    /// A login or token in Vault's envelope.
    pub(crate) fn auth(request_id: &str, auth: impl Serialize) -> Result<Self, ApiError> {
        Self::json(StatusCode::OK, &Envelope::new(request_id, None::<()>, Some(auth)))
    }

    /// Its status.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Empty => StatusCode::NO_CONTENT,
            Self::Json { status, .. } => *status,
        }
    }

    /// `data` and `auth` of the envelope, for the audit file.
    pub(crate) fn audited(&self) -> Option<Value> {
        let Self::Json { body, .. } = self else { return None };
        // Not by serde_json's own reading, which takes some maps for the JSON inside their text: the line
        // would then be about another answer, or none.
        let Ok(mut envelope) = identity::json::parse_object(body) else {
            // Nested deeper in its envelope than the parser goes: hashed in one piece.
            return Some(Value::String(String::from_utf8_lossy(body).into_owned()));
        };
        envelope.retain(|name, value| (name == "data" || name == "auth") && !value.is_null());
        Some(Value::Object(envelope))
    }

    pub(crate) fn into_response(self) -> Response<Full<Bytes>> {
        let status = self.status();
        match self {
            Self::Empty => respond(status, Vec::new()),
            Self::Json { body, .. } => respond(status, body),
        }
    }
}

#[derive(Serialize)]
struct Envelope<'a, D, A> {
    request_id: &'a str,
    lease_id: &'static str,
    renewable: bool,
    lease_duration: u64,
    data: Option<D>,
    wrap_info: Option<()>,
    warnings: Option<Vec<String>>,
    auth: Option<A>,
}

impl<'a, D, A> Envelope<'a, D, A> {
    fn new(request_id: &'a str, data: Option<D>, auth: Option<A>) -> Self {
        Self {
            request_id,
            lease_id: "",
            renewable: false,
            lease_duration: 0,
            data,
            wrap_info: None,
            warnings: None,
            auth,
        }
    }
}

/// A refusal: what the caller is told. What the operator is told went to the log when it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// Vault's list; empty for what is not there.
    pub(crate) errors: Vec<String>,
    /// The decision's id, when policy refused.
    pub(crate) receipt: Option<String>,
    allow: Option<&'static str>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, errors: vec![error.into()], receipt: None, allow: None }
    }

    pub(crate) fn bad_request(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    pub(crate) fn permission_denied() -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission denied")
    }

    pub(crate) fn not_found() -> Self {
        Self { errors: Vec::new(), ..Self::new(StatusCode::NOT_FOUND, "") }
    }

    pub(crate) fn sealed() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "Vault is sealed")
    }

    /// Something that is not the caller's fault and not the caller's business.
    pub(crate) fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
    }

    pub(crate) fn into_response(self) -> Response<Full<Bytes>> {
        let mut body = json!({ "errors": self.errors });
        if let (Value::Object(map), Some(receipt)) = (&mut body, self.receipt) {
            map.insert("error".to_owned(), json!("denied"));
            map.insert("receipt".to_owned(), json!(receipt));
        }
        let mut response = respond(self.status, body.to_string().into_bytes());
        if let Some(allow) = self.allow {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

fn respond(status: StatusCode, body: Vec<u8>) -> Response<Full<Bytes>> {
    let has_body = !body.is_empty();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if has_body {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    response
}

impl From<RouteError> for ApiError {
    fn from(error: RouteError) -> Self {
        let text = error.to_string();
        match error {
            RouteError::Path(_) | RouteError::CredentialInQuery | RouteError::Query => {
                Self::bad_request(text)
            }
            RouteError::Unknown => Self::new(StatusCode::NOT_FOUND, text),
            RouteError::Method(allow) => {
                Self { allow: Some(allow), ..Self::new(StatusCode::METHOD_NOT_ALLOWED, text) }
            }
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Denied(denial) => Self { receipt: denial.receipt, ..Self::permission_denied() },
            Refusal::Token => Self::permission_denied(),
        }
    }
}

impl From<BarrierError> for ApiError {
    fn from(error: BarrierError) -> Self {
        match error {
            BarrierError::Sealed => Self::sealed(),
            BarrierError::TooLarge => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "the secret is too large"),
            error => Self::internal(chain(&error)),
        }
    }
}

impl From<KvError> for ApiError {
    fn from(error: KvError) -> Self {
        match error {
            KvError::NotFound => Self::not_found(),
            KvError::CasMismatch | KvError::CasRequired | KvError::Invalid(_) => {
                Self::bad_request(error.to_string())
            }
            KvError::Barrier(error) => error.into(),
            KvError::NotPermitted | KvError::Damaged => Self::internal(error),
        }
    }
}

impl From<TokenError> for ApiError {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::Invalid => Self::permission_denied(),
            TokenError::Ttl | TokenError::Policy | TokenError::DisplayName => {
                Self::bad_request(error.to_string())
            }
            TokenError::Barrier(error) => error.into(),
            TokenError::Damaged | TokenError::Random(_) => Self::internal(error),
        }
    }
}

impl From<SealError> for ApiError {
    fn from(error: SealError) -> Self {
        match error {
            SealError::Parameters(_) | SealError::Encoding | SealError::WrongKey => {
                Self::bad_request(error.to_string())
            }
            SealError::Barrier(error) => error.into(),
            SealError::Config | SealError::Random(_) => Self::internal(error),
        }
    }
}

impl From<AuditError> for ApiError {
    fn from(error: AuditError) -> Self {
        tracing::error!(cause = chain(&error), "a request is refused because it cannot be audited");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the audit device failed; the request is refused")
    }
}

impl From<CoreError> for ApiError {
    fn from(error: CoreError) -> Self {
        match error {
            CoreError::AlreadyInitialized | CoreError::NotInitialized => Self::bad_request(error.to_string()),
            CoreError::Seal(error) => error.into(),
            CoreError::Barrier(error) => error.into(),
            CoreError::Token(error) => error.into(),
            CoreError::Audit(error) => error.into(),
            CoreError::Storage(error) => Self::internal(chain(&error)),
            CoreError::Random(error) => Self::internal(error),
        }
    }
}

/// An error and its causes in one line, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::Redactor;
    use crate::barrier::Keyring;

    /// serde_json reads a map with this only key as the JSON inside its text.
    #[test]
    fn security_40_the_audited_answer_is_the_one_that_was_given() {
        let redactor = Redactor::new(&Keyring::generate(&identity::random::system()).unwrap());
        let audited = |data: &str| {
            let data = serde_json::value::RawValue::from_string(data.to_owned()).unwrap();
            redactor.document(&Reply::data("id", data).unwrap().audited().unwrap())
        };
        let plain = audited(r#"{"a":"harmless"}"#);
        assert_eq!(plain["data"]["a"], redactor.text("harmless"));
        let posing = audited(r#"{"$serde_json::private::RawValue":"{\"a\":\"harmless\"}"}"#);
        assert_ne!(posing, plain, "another value than the one given out");
        assert!(posing["data"].as_object().is_some_and(|data| data.keys().any(|key| key.starts_with('$'))));
        let broken = audited(r#"{"$serde_json::private::RawValue":"no JSON"}"#);
        assert!(broken.is_object(), "nothing of an answer that was given");
        // As deep as a body may be, and one deeper in its envelope.
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(30), "]".repeat(30));
        assert!(identity::json::parse(format!("{{\"data\":{deep}}}").as_bytes()).is_ok());
        let data = serde_json::value::RawValue::from_string(deep).unwrap();
        #[derive(Serialize)]
        struct Body {
            data: Box<serde_json::value::RawValue>,
        }
        assert!(Reply::data("id", Body { data }).unwrap().audited().is_some(), "a deep answer unaudited");
    }
}
