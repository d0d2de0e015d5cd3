//! Request bodies, parsed once into what they ask for.
//!
//! Every body goes through the strict parser first (one meaning, bounded depth), then into its type; what a
//! type does not know is refused, except where clients of Vault send fields for what does not exist here
//! with values that ask for nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use secrecy::SecretString;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use super::reply::ApiError;
use super::route::{KvOperation, Route};
use crate::kv::{Fate, Settings};
use crate::token::{self, Policy};

/// What a request brings with it.
pub(crate) enum Input {
    None,
    Init { shares: u8, threshold: u8 },
    Unseal { share: SecretString },
    ResetUnseal,
    Write { data: Box<RawValue>, cas: Option<u64> },
    Versions(Vec<u64>),
    Settings(Settings),
    NewToken { policy: Policy, display_name: String, ttl: Option<Duration> },
}

/// Parses the body that `route` takes; `document` is the same body for the audit file.
pub(crate) fn parse(route: &Route, body: &[u8]) -> Result<(Input, Option<Value>), ApiError> {
    let strict = || identity::json::parse_object(body).map_err(malformed);
    let (input, document) = match route {
        Route::Init => (init(typed(body, strict()?)?), None),
        Route::Unseal => (unseal(typed(body, strict()?)?), None),
        Route::CreateToken => {
            let document = if body.is_empty() { serde_json::Map::new() } else { strict()? };
            let body = if body.is_empty() { b"{}" } else { body };
            (new_token(typed(body, document.clone())?), Some(Value::Object(document)))
        }
        Route::Kv(kv) => match kv.operation {
            KvOperation::Write => {
                let document = strict()?;
                (write(typed(body, document.clone())?), Some(Value::Object(document)))
            }
            KvOperation::Change(fate) => {
                let document = strict()?;
                (versions(fate, typed(body, document.clone())?), Some(Value::Object(document)))
            }
            KvOperation::WriteMetadata => {
                let document = strict()?;
                (settings(typed(body, document.clone())?), Some(Value::Object(document)))
            }
            _ => (Ok(Input::None), None),
        },
        // Clients send `{}` or role names where a body has no meaning.
        _ => (Ok(Input::None), None),
    };
    Ok((input?, document))
}

/// The body as its type. That it is one strict object is known already: `_strict` is the proof.
fn typed<T: DeserializeOwned>(body: &[u8], _strict: serde_json::Map<String, Value>) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| malformed(Shape(error)))
}

struct Shape(serde_json::Error);

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // serde_json quotes the offending value, which may be the secret: only the place is told.
        write!(
            f,
            "a field is missing, unknown or of the wrong type (line {} column {})",
            self.0.line(),
            self.0.column()
        )
    }
}

fn malformed(error: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("failed to parse JSON input: {error}"))
}

#[derive(Deserialize)]
struct InitBody {
    secret_shares: u64,
    secret_threshold: u64,
    #[serde(default)]
    pgp_keys: Option<Vec<String>>,
    #[serde(default)]
    root_token_pgp_key: Option<String>,
    #[serde(default)]
    stored_shares: Option<u64>,
    #[serde(default)]
    recovery_shares: Option<u64>,
    #[serde(default)]
    recovery_threshold: Option<u64>,
    #[serde(default)]
    recovery_pgp_keys: Option<Vec<String>>,
}

fn init(body: InitBody) -> Result<Input, ApiError> {
    let asks_for_pgp = body.pgp_keys.is_some_and(|keys| !keys.is_empty())
        || body.recovery_pgp_keys.is_some_and(|keys| !keys.is_empty())
        || body.root_token_pgp_key.is_some_and(|key| !key.is_empty());
    // To ignore it would be to answer in the clear what was asked for encrypted.
    if asks_for_pgp {
        return Err(ApiError::bad_request("PGP encryption of shares is not supported"));
    }
    let asks_for_auto = [body.stored_shares, body.recovery_shares, body.recovery_threshold];
    if asks_for_auto.into_iter().flatten().any(|number| number > 0) {
        return Err(ApiError::bad_request("stored and recovery shares are not supported"));
    }
    let number = |number: u64| u8::try_from(number).map_err(|_| ApiError::bad_request("at most 255 shares"));
    Ok(Input::Init { shares: number(body.secret_shares)?, threshold: number(body.secret_threshold)? })
}

#[derive(Deserialize)]
struct UnsealBody {
    #[serde(default)]
    key: Option<SecretString>,
    #[serde(default)]
    reset: bool,
    #[serde(default)]
    migrate: bool,
}

fn unseal(body: UnsealBody) -> Result<Input, ApiError> {
    match (body.key, body.reset, body.migrate) {
        (_, _, true) => Err(ApiError::bad_request("seal migration is not supported")),
        (_, true, false) => Ok(Input::ResetUnseal),
        (Some(share), false, false) => Ok(Input::Unseal { share }),
        (None, false, false) => Err(ApiError::bad_request(
            "'key' must be specified in request body as JSON, or 'reset' set to true",
        )),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WriteBody {
    #[serde(default)]
    data: Option<Box<RawValue>>,
    #[serde(default)]
    options: Option<WriteOptions>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WriteOptions {
    #[serde(default)]
    cas: Option<u64>,
}

fn write(body: WriteBody) -> Result<Input, ApiError> {
    let data = body.data.ok_or_else(|| ApiError::bad_request("no data provided"))?;
    if !data.get().starts_with('{') {
        return Err(ApiError::bad_request("data must be a JSON object"));
    }
    Ok(Input::Write { data, cas: body.options.and_then(|options| options.cas) })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VersionsBody {
    versions: Vec<u64>,
}

fn versions(_fate: Fate, body: VersionsBody) -> Result<Input, ApiError> {
    Ok(Input::Versions(body.versions))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SettingsBody {
    #[serde(default)]
    max_versions: Option<u32>,
    #[serde(default)]
    cas_required: Option<bool>,
    #[serde(default)]
    delete_version_after: Option<Value>,
    #[serde(default)]
    custom_metadata: Option<BTreeMap<String, String>>,
}

fn settings(body: SettingsBody) -> Result<Input, ApiError> {
    // A secret that was to vanish and does not would be worse than a refusal.
    let never = match &body.delete_version_after {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => matches!(text.as_str(), "" | "0" | "0s"),
        Some(Value::Number(number)) => number.as_u64() == Some(0),
        Some(_) => false,
    };
    if !never {
        return Err(ApiError::bad_request("delete_version_after is not supported"));
    }
    Ok(Input::Settings(Settings {
        max_versions: body.max_versions,
        cas_required: body.cas_required,
        custom: body.custom_metadata,
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewTokenBody {
    #[serde(default)]
    policies: Option<Vec<String>>,
    #[serde(default)]
    ttl: Option<Value>,
    #[serde(default)]
    display_name: Option<String>,
    #[serde(default)]
    renewable: Option<bool>,
    #[serde(default)]
    no_parent: Option<bool>,
    #[serde(default)]
    no_default_policy: Option<bool>,
    #[serde(default)]
    num_uses: Option<u64>,
    #[serde(default, rename = "type")]
    kind: Option<String>,
}

fn new_token(body: NewTokenBody) -> Result<Input, ApiError> {
    if body.no_parent == Some(true) || body.num_uses.is_some_and(|uses| uses > 0) {
        return Err(ApiError::bad_request("orphan and counted tokens are not supported"));
    }
    if !matches!(body.kind.as_deref(), None | Some("" | "service" | "default-service")) {
        return Err(ApiError::bad_request("only service tokens are supported"));
    }
    // Passed over, and the answer says what was made: clients ask for renewable tokens by default, and a
    // root token needs no default policy.
    let _passed_over = (body.renewable, body.no_default_policy);
    let policy = match body.policies {
        Some(names) => Policy::parse(&names).map_err(ApiError::from)?,
        // As in Vault, a token without policies of its own has its maker's, and only root makes tokens.
        None => Policy::Root,
    };
    let ttl = body.ttl.as_ref().map(duration).transpose()?.flatten();
    let display_name = body.display_name.unwrap_or_default();
    Ok(Input::NewToken { policy, display_name, ttl: Some(ttl.unwrap_or(token::MAX_TTL)) })
}

/// A duration as Vault takes it: seconds as a number, or `90`, `90s`, `15m`, `2h`, `1d`. Zero is none.
fn duration(value: &Value) -> Result<Option<Duration>, ApiError> {
    let seconds = match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => {
            let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
            let factor = match text.get(digits.len()..) {
                Some("" | "s") => Some(1),
                Some("m") => Some(60),
                Some("h") => Some(3600),
                Some("d") => Some(24 * 3600),
                _ => None,
            };
            digits.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor))
        }
        _ => None,
    };
    let seconds =
        seconds.ok_or_else(|| ApiError::bad_request("ttl is not a duration such as 3600 or \"1h\""))?;
    Ok((seconds > 0).then(|| Duration::from_secs(seconds)))
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::super::Front;
    use super::*;

    fn parse_at(method: &str, path: &str, body: &str) -> Result<(Input, Option<Value>), ApiError> {
        let method: Method = method.parse().unwrap();
        let route = Route::parse(Front::Operator, &method, &path.parse().unwrap()).unwrap();
        parse(&route, body.as_bytes())
    }

    fn put(body: &str) -> Result<(Input, Option<Value>), ApiError> {
        parse_at("PUT", "/v1/secret/data/a", body)
    }

    #[test]
    fn data_is_kept_to_the_letter() {
        let (input, _) = put(r#"{"data": {"n": 9007199254740993, "x":1.10} , "options":{"cas":0}}"#).unwrap();
        let Input::Write { data, cas } = input else { panic!("not a write") };
        assert_eq!((data.get(), cas), (r#"{"n": 9007199254740993, "x":1.10}"#, Some(0)));
    }

    #[test]
    fn vault_5_security_36_hostile_bodies_are_refused() {
        let deep = format!(r#"{{"data":{{"x":{}1{}}}}}"#, "[".repeat(5000), "]".repeat(5000));
        for bad in [
            deep.as_str(),
            r#"{"data":{"a":1,"a":2}}"#,
            r#"{"data":{},"data":{}}"#,
            r#"{"data":{"a":1,"\u0061":2}}"#,
            r#"{"data":{}} {}"#,
            r#"{"data":{"x":1e999}}"#,
            r#"{"data":[]}"#,
            r#"{"data":"text"}"#,
            r#"{"data":null}"#,
            r#"{}"#,
            r#"[]"#,
            r#"{"data":{},"cas":1}"#,
            r#"{"data":{},"options":{"cas":-1}}"#,
            r#"{"data":{},"options":{"cas":1.5}}"#,
            r#"{"data":{},"options":{"csa":1}}"#,
            "",
            "\u{feff}{}",
        ] {
            assert_eq!(
                put(bad).err().map(|error| error.status.as_u16()),
                Some(400),
                "{}",
                &bad[..bad.len().min(60)]
            );
        }
    }

    #[test]
    fn a_body_with_more_than_a_thousand_strings_is_no_trouble() {
        let many: Vec<String> = (0..5000).map(|n| format!(r#""k{n}":"v{n}""#)).collect();
        assert!(put(&format!(r#"{{"data":{{{}}}}}"#, many.join(","))).is_ok());
    }

    #[test]
    fn vault_6_an_error_does_not_repeat_the_body() {
        for bad in [
            r#"{"data":{"password":"hunter2"},"options":"hunter2"}"#,
            r#"{"data":{"password":"hunter2"},"hunter2":1}"#,
            r#"{"data":{"password":"hunter2"} hunter2"#,
        ] {
            let error = put(bad).err().unwrap();
            assert!(!error.errors.join(" ").contains("hunter2"), "{:?}", error.errors);
        }
    }

    #[test]
    fn what_would_be_ignored_is_refused() {
        for (method, path, body) in [
            ("PUT", "/v1/sys/init", r#"{"secret_shares":1,"secret_threshold":1,"pgp_keys":["x"]}"#),
            ("PUT", "/v1/sys/init", r#"{"secret_shares":256,"secret_threshold":1}"#),
            ("PUT", "/v1/sys/init", r#"{"secret_shares":1,"secret_threshold":1,"recovery_shares":1}"#),
            ("PUT", "/v1/sys/unseal", r#"{"key":"00","migrate":true}"#),
            ("PUT", "/v1/sys/unseal", r#"{}"#),
            ("POST", "/v1/secret/metadata/a", r#"{"delete_version_after":"1h"}"#),
            ("POST", "/v1/secret/metadata/a", r#"{"custom_metadata":{"a":1}}"#),
            ("POST", "/v1/auth/token/create", r#"{"num_uses":1}"#),
            ("POST", "/v1/auth/token/create", r#"{"policies":["admin"]}"#),
            ("POST", "/v1/auth/token/create", r#"{"ttl":"1 hour"}"#),
            ("POST", "/v1/auth/token/create", r#"{"ttl":-1}"#),
        ] {
            assert!(parse_at(method, path, body).is_err(), "{path} {body}");
        }
        assert!(
            parse_at("POST", "/v1/secret/metadata/a", r#"{"delete_version_after":"0s","max_versions":3}"#)
                .is_ok()
        );
    }

    #[test]
    fn durations_are_read_as_vault_reads_them() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("15m", 900), ("2h", 7200), ("1d", 86_400)] {
            assert_eq!(duration(&Value::from(text)).unwrap(), Some(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(duration(&Value::from(0)).unwrap(), None);
        for bad in ["", "h", "1w", "-1s", "1h30m", "99999999999999999999"] {
            assert!(duration(&Value::from(bad)).is_err(), "{bad}");
        }
    }
}
