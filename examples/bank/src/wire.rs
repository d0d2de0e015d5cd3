//! What the three services say to each other: parsed once, here, into types that cannot be invalid.

use std::fmt;

use axum::extract::{FromRequest, Request};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Who the sidecar says is asking: used as data (whose accounts to list), never to decide anything.
pub(crate) const USER: HeaderName = HeaderName::from_static("x-forwarded-user");
/// The same order under the same key is made once (draft-ietf-httpapi-idempotency-key-header).
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Ids are ours and short; the bound keeps keys and logs small.
const ID_BYTES_MAX: usize = 64;
/// Long enough for an e-mail address as a user's name.
const OWNER_BYTES_MAX: usize = 128;
/// As much as a SEPA transfer carries.
const MEMO_CHARS_MAX: usize = 140;
/// A sidecar asks for the objects of one request: two accounts, today.
const ENTITIES_MAX: usize = 16;

/// Why a value is not one of the bank's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("an id is 1 to {ID_BYTES_MAX} letters, digits, '-' or '_'")]
    Id,
    #[error("an owner is 1 to {OWNER_BYTES_MAX} letters, digits, '.', '-', '_' or '@'")]
    Owner,
    #[error("an amount is a whole number of cents, at least 1")]
    Amount,
    #[error("a memo is at most {MEMO_CHARS_MAX} characters on one line")]
    Memo,
    #[error("at most {ENTITIES_MAX} objects at a time")]
    TooManyEntities,
}

/// A string type with one rule, checked wherever a value comes in.
macro_rules! checked_string {
    ($(#[$doc:meta])* $name:ident, $error:expr, $valid:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub(crate) struct $name(String);

        impl $name {
            pub(crate) fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = WireError;

            fn try_from(value: String) -> Result<Self, WireError> {
                let valid: fn(&str) -> bool = $valid;
                if valid(&value) { Ok(Self(value)) } else { Err($error) }
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

checked_string!(
    /// An account's number: a slug, so that it is one path segment wherever it goes.
    AccountId, WireError::Id, is_slug
);
checked_string!(
    /// A transfer's id, made by `payments`; `accounts` moves money at most once for each.
    TransferId, WireError::Id, is_slug
);
checked_string!(
    /// A person who owns accounts; safe as one path segment.
    Owner, WireError::Owner, is_owner
);
checked_string!(
    /// What a transfer is for, in the sender's words.
    #[derive(Default)]
    Memo, WireError::Memo, is_memo
);

fn is_slug(value: &str) -> bool {
    (1..=ID_BYTES_MAX).contains(&value.len())
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn is_owner(value: &str) -> bool {
    (1..=OWNER_BYTES_MAX).contains(&value.len())
        // "." and ".." would be path navigation.
        && value.bytes().any(|b| b != b'.')
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'@'))
}

fn is_memo(value: &str) -> bool {
    value.chars().count() <= MEMO_CHARS_MAX && !value.chars().any(char::is_control)
}

/// An amount to move, in cents: at least 1, at most `i64::MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub(crate) struct Amount(i64);

impl Amount {
    pub(crate) fn cents(self) -> i64 {
        self.0
    }
}

impl TryFrom<i64> for Amount {
    type Error = WireError;

    fn try_from(cents: i64) -> Result<Self, WireError> {
        if cents >= 1 { Ok(Self(cents)) } else { Err(WireError::Amount) }
    }
}

impl From<Amount> for i64 {
    fn from(amount: Amount) -> Self {
        amount.0
    }
}

/// `POST /transfers` of `payments`, and `POST /api/transfers` of `web`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TransferOrder {
    pub(crate) from: AccountId,
    pub(crate) to: AccountId,
    pub(crate) amount_cents: Amount,
    #[serde(default)]
    pub(crate) memo: Memo,
}

/// `POST /transfers` of `accounts`: an order that has its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Transfer {
    pub(crate) id: TransferId,
    pub(crate) from: AccountId,
    pub(crate) to: AccountId,
    pub(crate) amount_cents: Amount,
    #[serde(default)]
    pub(crate) memo: Memo,
}

/// The answer to a transfer that was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TransferMade {
    pub(crate) id: TransferId,
}

/// One account, as `GET /accounts/{id}` answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) id: AccountId,
    pub(crate) owner: Owner,
    pub(crate) name: String,
    pub(crate) balance_cents: i64,
    pub(crate) currency: String,
}

/// `GET /owners/{owner}/accounts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AccountList {
    pub(crate) owner: Owner,
    pub(crate) accounts: Vec<Account>,
}

/// Which way money went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Direction {
    /// Into this account.
    In,
    /// Out of this account.
    Out,
}

/// One line of an account's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) transfer: TransferId,
    pub(crate) direction: Direction,
    /// The account on the other side.
    pub(crate) other: AccountId,
    pub(crate) amount_cents: i64,
    /// This account's balance after the transfer.
    pub(crate) balance_cents: i64,
    pub(crate) memo: Memo,
    /// Seconds since the Unix epoch.
    pub(crate) time_s: u64,
}

/// `GET /accounts/{id}/history`, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct History {
    pub(crate) id: AccountId,
    pub(crate) owner: Owner,
    pub(crate) entries: Vec<Entry>,
}

/// `GET /journal/totals` of `payments`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JournalTotals {
    /// Transfers that `accounts` confirmed.
    pub(crate) count: u64,
    /// Their sum, in cents.
    pub(crate) total_cents: u64,
    /// Transfers that were refused.
    pub(crate) refused: u64,
    /// Transfers being made right now.
    pub(crate) in_flight: u64,
    /// Transfers whose outcome this side does not know: each was made once or not at all.
    pub(crate) unresolved: u64,
}

impl JournalTotals {
    /// Transfers that may or may not have been made.
    pub(crate) fn open(&self) -> u64 {
        self.in_flight.saturating_add(self.unresolved)
    }
}

/// `POST /.well-known/palisade/entities`: what is asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EntitiesQuestion {
    objects: Vec<EntityName>,
}

impl EntitiesQuestion {
    /// The accounts asked for, once each; other types and impossible ids have no attributes here.
    pub(crate) fn accounts(self) -> Result<Vec<AccountId>, WireError> {
        if self.objects.len() > ENTITIES_MAX {
            return Err(WireError::TooManyEntities);
        }
        let mut accounts: Vec<AccountId> = self
            .objects
            .into_iter()
            .filter(|object| object.kind == ACCOUNT)
            .filter_map(|object| AccountId::try_from(object.id).ok())
            .collect();
        accounts.sort();
        accounts.dedup();
        Ok(accounts)
    }
}

const ACCOUNT: &str = "Account";

#[derive(Debug, Serialize, Deserialize)]
struct EntityName {
    #[serde(rename = "type")]
    kind: String,
    id: String,
}

/// `POST /.well-known/palisade/entities`: the answer; what is unknown is left out.
#[derive(Debug, Default, Serialize)]
pub(crate) struct EntitiesAnswer {
    objects: Vec<Entity>,
}

#[derive(Debug, Serialize)]
struct Entity {
    #[serde(flatten)]
    name: EntityName,
    attributes: AccountAttributes,
}

#[derive(Debug, Serialize)]
struct AccountAttributes {
    owner: Owner,
}

impl FromIterator<(AccountId, Owner)> for EntitiesAnswer {
    fn from_iter<I: IntoIterator<Item = (AccountId, Owner)>>(accounts: I) -> Self {
        let objects = accounts
            .into_iter()
            .map(|(id, owner)| Entity {
                name: EntityName { kind: ACCOUNT.to_owned(), id: id.into() },
                attributes: AccountAttributes { owner },
            })
            .collect();
        Self { objects }
    }
}

/// A request that is answered with an error: `{"error":CODE,"detail":WORDS}`.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) code: &'static str,
    pub(crate) detail: String,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self { status, code, detail: detail.into() }
    }

    pub(crate) fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", detail)
    }

    /// A fault of ours: the caller hears that much, the log hears the rest.
    pub(crate) fn internal(error: &dyn std::error::Error) -> Self {
        let mut causes = error.to_string();
        let mut next = error.source();
        while let Some(cause) = next {
            causes.push_str(": ");
            causes.push_str(&cause.to_string());
            next = cause.source();
        }
        tracing::error!(error = causes, "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the service could not do this")
    }
}

impl From<WireError> for Refusal {
    fn from(error: WireError) -> Self {
        Self::malformed(error.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        #[derive(Serialize)]
        struct Body {
            error: &'static str,
            detail: String,
        }
        (self.status, axum::Json(Body { error: self.code, detail: self.detail })).into_response()
    }
}

/// A JSON request body, read strictly: one value, no duplicate or unknown field, the right type.
#[derive(Debug)]
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let kind = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if !kind.is_some_and(is_json) {
            return Err(Refusal::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "not_json",
                "the body must be application/json",
            ));
        }
        let body = Bytes::from_request(request, state).await.map_err(|rejection| {
            Refusal::new(rejection.status(), "body", "the body is too long or was broken off")
        })?;
        serde_json::from_slice(&body).map(Self).map_err(|error| Refusal::malformed(error.to_string()))
    }
}

fn is_json(content_type: &str) -> bool {
    content_type.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(json: &str) -> Result<TransferOrder, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn a_plain_order_is_read_and_the_memo_may_be_left_out() {
        let read = order(r#"{"from":"17","to":"42","amount_cents":500}"#).unwrap();
        assert_eq!(read.amount_cents.cents(), 500);
        assert_eq!(read.memo.as_str(), "");
    }

    #[test]
    fn orders_that_are_not_orders_are_refused() {
        let long = "x".repeat(MEMO_CHARS_MAX + 1);
        for json in [
            r#"{"from":"17","to":"42","amount_cents":0}"#.to_owned(),
            r#"{"from":"17","to":"42","amount_cents":-1}"#.to_owned(),
            r#"{"from":"17","to":"42","amount_cents":1.5}"#.to_owned(),
            r#"{"from":"17","to":"42","amount_cents":"5"}"#.to_owned(),
            r#"{"from":"17","to":"42","amount_cents":9223372036854775808}"#.to_owned(),
            r#"{"from":"17","to":"42","amount_cents":1,"amount_cents":2}"#.to_owned(),
            r#"{"from":"17","to":"42","amount_cents":1,"as":"bob"}"#.to_owned(),
            r#"{"from":"../x","to":"42","amount_cents":1}"#.to_owned(),
            r#"{"from":"","to":"42","amount_cents":1}"#.to_owned(),
            r#"{"from":17,"to":"42","amount_cents":1}"#.to_owned(),
            r#"{"from":"17","to":"42"}"#.to_owned(),
            r#"{"from":"17","to":"42","amount_cents":1} {}"#.to_owned(),
            r#"{"from":"17","to":"42","amount_cents":1,"memo":"a\nb"}"#.to_owned(),
            format!(r#"{{"from":"17","to":"42","amount_cents":1,"memo":"{long}"}}"#),
        ] {
            assert!(order(&json).is_err(), "{json}");
        }
    }

    #[test]
    fn an_owner_is_never_path_navigation() {
        for owner in [".", "..", "...", "a/b", "a%2fb", "", "a b", "a?b"] {
            assert_eq!(Owner::try_from(owner.to_owned()), Err(WireError::Owner), "{owner}");
        }
        assert!(Owner::try_from("alice@bank.example".to_owned()).is_ok());
    }

    #[test]
    fn entities_keep_known_types_once_and_are_bounded() {
        let ask = |json: &str| serde_json::from_str::<EntitiesQuestion>(json).unwrap().accounts();
        let asked = ask(r#"{"objects":[{"type":"Account","id":"42"},{"type":"Account","id":"17"},
                {"type":"Account","id":"42"},{"type":"Safe","id":"1"},{"type":"Account","id":"a/b"}]}"#);
        let names: Vec<String> = asked.unwrap().into_iter().map(String::from).collect();
        assert_eq!(names, ["17", "42"]);
        let many = vec![r#"{"type":"Account","id":"1"}"#; ENTITIES_MAX + 1].join(",");
        assert_eq!(ask(&format!(r#"{{"objects":[{many}]}}"#)), Err(WireError::TooManyEntities));
    }

    #[test]
    fn an_entity_answers_in_the_sidecars_shape() {
        let answer: EntitiesAnswer =
            [(AccountId("17".to_owned()), Owner("alice".to_owned()))].into_iter().collect();
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"objects":[{"type":"Account","id":"17","attributes":{"owner":"alice"}}]}"#
        );
    }

    proptest! {
        /// Whatever passes as an id or an owner can stand in a path unescaped, as one segment.
        #[test]
        fn ids_and_owners_are_single_path_segments(text in "\\PC{0,80}") {
            for accepted in [
                AccountId::try_from(text.clone()).ok().map(String::from),
                Owner::try_from(text.clone()).ok().map(String::from),
            ].into_iter().flatten() {
                prop_assert!(accepted != "." && accepted != "..");
                prop_assert!(!accepted.contains(['/', '\\', '%', '?', '#', ';', ' ']));
                let uri: hyper::Uri = format!("http://h/a/{accepted}/b").parse().unwrap();
                prop_assert_eq!(uri.path(), format!("/a/{accepted}/b"));
            }
        }

        #[test]
        fn reading_an_order_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(order) = serde_json::from_slice::<TransferOrder>(&bytes) {
                prop_assert!(order.amount_cents.cents() >= 1);
            }
        }
    }
}
