//! Bodies that name objects: a closed list of typed top-level members, as JSON or as a form. Those of gRPC are
//! [`crate::proto`]'s.

use std::collections::BTreeMap;

use identity::json;
use serde_json::Value as Json;

use crate::object::{AttributeValue, MAX_EXACT_INTEGER, exact_integer};
use crate::template::{is_key, is_plain_id};

/// Largest body that is read whole to be judged.
pub const MAX_JUDGED_BODY_BYTES: usize = 1 << 20;
/// Limit of a body that a route does not set one for.
pub(crate) const DEFAULT_BODY_BYTES: usize = 64 * 1024;
/// Largest body passed on unread that a map may allow.
pub(crate) const MAX_OPAQUE_BODY_BYTES: usize = 1 << 30;
/// Objects that one list names: each is decided about.
pub(crate) const MAX_LIST: usize = 256;
/// Longest text member: a memo, not a document.
const MAX_TEXT_BYTES: usize = 4096;

/// What a route expects as body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyRule {
    /// No body at all.
    None,
    /// Any body of at most so many bytes; policy does not look at it.
    Opaque {
        /// The limit.
        max_bytes: usize,
    },
    /// A JSON object of the route's members; read it whole and call [`crate::Mapped::with_body`].
    Json {
        /// The limit; a longer body is refused, never cut.
        max_bytes: usize,
    },
    /// gRPC messages with the route's members among their fields: call [`crate::Mapped::with_body`] with each.
    Grpc {
        /// The limit of one message; a longer one is refused, never cut.
        max_bytes: usize,
        /// The client may send more than one.
        streams: bool,
    },
    /// A form (`application/x-www-form-urlencoded`) of the route's members; likewise.
    Form {
        /// The limit; a longer body is refused, never cut.
        max_bytes: usize,
    },
}

/// The type of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemberType {
    /// A text that may name an object: `[A-Za-z0-9._-]+`.
    Id,
    /// Ids joined by `/`, which may name an object too: a row of a store.
    Key,
    /// An integer of at most 53 bits.
    Int,
    /// Any text without NUL.
    Text,
    /// `true` or `false`.
    Bool,
}

/// One member of a route's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) kind: MemberType,
    pub(crate) optional: bool,
    /// A list of them, of one and more.
    pub(crate) many: bool,
}

impl Member {
    pub(crate) const NAMES: [&'static str; 8] =
        ["id", "key", "int", "text", "bool", "[id]", "[key]", "[int]"];

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (name, optional) = match text.strip_suffix('?') {
            Some(name) => (name, true),
            None => (text, false),
        };
        let (name, many) = match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
            Some(name @ ("id" | "key" | "int")) => (name, true),
            Some(_) => return None,
            None => (name, false),
        };
        let kind = match name {
            "id" => MemberType::Id,
            "key" => MemberType::Key,
            "int" => MemberType::Int,
            "text" => MemberType::Text,
            "bool" => MemberType::Bool,
            _ => return None,
        };
        Some(Self { kind, optional, many })
    }
}

impl MemberType {
    /// As maps write it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Id => "id",
            Self::Key => "key",
            Self::Int => "int",
            Self::Text => "text",
            Self::Bool => "bool",
        }
    }
}

pub(crate) type Members = BTreeMap<String, Member>;
pub(crate) type Values = BTreeMap<String, AttributeValue>;

/// Reads a JSON body. The error is for the operator.
pub(crate) fn read_json(members: &Members, body: &[u8]) -> Result<Values, String> {
    let object = json::parse_object(body)
        .map_err(|error| format!("the body is not JSON with one meaning: {error}"))?;
    let mut values = Values::new();
    for (name, value) in &object {
        let member = members.get(name).ok_or_else(|| unlisted(name))?;
        let read = if member.many { json_list(member.kind, value) } else { json_value(member.kind, value) };
        let value = read.ok_or_else(|| match member.many {
            true => wrong_list(name, MAX_LIST),
            false => wrong_type(name, member.kind),
        })?;
        values.insert(name.clone(), value);
    }
    complete(members, values)
}

/// A JSON body that was read, without the items of its list that are not to be kept, by their place.
pub(crate) fn keep_items(
    members: &Members,
    body: &[u8],
    is_kept: impl Fn(usize) -> bool,
) -> Result<Vec<u8>, String> {
    let mut object = json::parse_object(body)
        .map_err(|error| format!("the body is not JSON with one meaning: {error}"))?;
    for (name, value) in &mut object {
        if let (Some(Member { many: true, .. }), Json::Array(items)) = (members.get(name), value) {
            let mut places = 0..;
            items.retain(|_| places.next().is_some_and(&is_kept));
        }
    }
    Ok(Json::Object(object).to_string().into_bytes())
}

/// A list without lists in it; one that names nothing asks for nothing, which no policy can be asked about.
fn json_list(kind: MemberType, json: &Json) -> Option<AttributeValue> {
    let items = json.as_array().filter(|items| (1..=MAX_LIST).contains(&items.len()))?;
    items.iter().map(|item| json_value(kind, item)).collect::<Option<_>>().map(AttributeValue::Set)
}

fn json_value(kind: MemberType, json: &Json) -> Option<AttributeValue> {
    match (kind, json) {
        (MemberType::Id | MemberType::Key | MemberType::Text, Json::String(text)) => text_value(kind, text),
        (MemberType::Int, json) => exact_integer(json).map(AttributeValue::Long),
        (MemberType::Bool, Json::Bool(value)) => Some(AttributeValue::Bool(*value)),
        _ => None,
    }
}

/// Reads a form body (WHATWG URL §5.1, refusing what a lenient reader would repair).
pub(crate) fn read_form(members: &Members, body: &[u8]) -> Result<Values, String> {
    let body = std::str::from_utf8(body).map_err(|_| "the form is not ASCII".to_owned())?;
    let mut values = Values::new();
    for pair in body.split('&').filter(|_| !body.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or("a form field has no `=`")?;
        let name = decode(name).ok_or("a form field's name is not properly encoded")?;
        let member = members.get(&name).ok_or_else(|| unlisted(&name))?;
        let text = decode(value).ok_or_else(|| format!("the field {name:?} is not properly encoded"))?;
        let value = form_value(member.kind, &text).ok_or_else(|| wrong_type(&name, member.kind))?;
        if values.insert(name.clone(), value).is_some() {
            return Err(format!("the field {name:?} appears twice"));
        }
    }
    complete(members, values)
}

fn form_value(kind: MemberType, text: &str) -> Option<AttributeValue> {
    match kind {
        MemberType::Id | MemberType::Key | MemberType::Text => text_value(kind, text),
        MemberType::Int => canonical_integer(text).map(AttributeValue::Long),
        MemberType::Bool => match text {
            "true" => Some(AttributeValue::Bool(true)),
            "false" => Some(AttributeValue::Bool(false)),
            _ => None,
        },
    }
}

fn canonical_integer(text: &str) -> Option<i64> {
    let number: i64 = text.parse().ok()?;
    let exact = (-MAX_EXACT_INTEGER..=MAX_EXACT_INTEGER).contains(&number);
    // `+5`, `05` and `-0` parse too, but print otherwise.
    (exact && number.to_string() == text).then_some(number)
}

pub(crate) fn text_value(kind: MemberType, text: &str) -> Option<AttributeValue> {
    let good = match kind {
        MemberType::Id => is_plain_id(text),
        MemberType::Key => is_key(text),
        _ => text.len() <= MAX_TEXT_BYTES && !text.contains('\0'),
    };
    good.then(|| AttributeValue::Text(text.into()))
}

fn complete(members: &Members, values: Values) -> Result<Values, String> {
    match members.iter().find(|(name, member)| !member.optional && !values.contains_key(*name)) {
        Some((name, _)) => Err(missing(name)),
        None => Ok(values),
    }
}

pub(crate) fn missing(name: &str) -> String {
    format!("the member {name:?} is missing")
}

fn unlisted(name: &str) -> String {
    format!("the member {:?} is not one of this route's", crate::record::cut(name))
}

pub(crate) fn wrong_list(name: &str, most: usize) -> String {
    format!("the member {name:?} is not a list of 1 to {most} ids, keys or integers")
}

pub(crate) fn wrong_type(name: &str, kind: MemberType) -> String {
    let wanted = match kind {
        MemberType::Id => "an id (A-Z a-z 0-9 . _ -)",
        MemberType::Key => "a key (1 to 16 ids with `/` between them)",
        MemberType::Int => "an integer in its one spelling, of at most 53 bits",
        MemberType::Text => "a text",
        MemberType::Bool => "true or false",
    };
    format!("the member {name:?} is not {wanted}")
}

/// Percent-decoding with `+` for a space; `None` for a stray `%`, raw non-ASCII, or what is not UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => {
                let high = char::from(bytes.next()?).to_digit(16)?;
                let low = char::from(bytes.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            0x21..=0x7e => byte,
            _ => return None,
        });
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn members() -> Members {
        [("from", "id"), ("to", "id"), ("amount_cents", "int"), ("memo", "text?"), ("urgent", "bool?")]
            .into_iter()
            .map(|(name, kind)| (name.to_owned(), Member::parse(kind).unwrap()))
            .collect()
    }

    #[test]
    fn json_and_form_read_alike() {
        let json =
            read_json(&members(), br#"{"from":"17","to":"42","amount_cents":500,"memo":"so long"}"#).unwrap();
        let form = read_form(&members(), b"from=17&to=42&amount_cents=500&memo=so+long").unwrap();
        assert_eq!(json, form);
        assert_eq!(json.get("amount_cents"), Some(&AttributeValue::Long(500)));
    }

    #[test]
    fn policy_16_17_18_json_bodies_have_one_meaning() {
        let base = r#""to":"42","amount_cents":500"#;
        for bad in [
            format!(r#"{{"from":"17","from":"42",{base}}}"#),
            format!(r#"{{"from":"17","\u0066rom":"42",{base}}}"#),
            format!(r#"{{"From":"17",{base}}}"#),
            format!(r#"{{"from":"17","FROM":"42",{base}}}"#),
            format!(r#"{{"from":17,{base}}}"#),
            format!(r#"{{"from":["17"],{base}}}"#),
            format!(r#"{{"from":{{"id":"17"}},{base}}}"#),
            format!(r#"{{"from":null,{base}}}"#),
            format!(r#"{{"from":"17 ",{base}}}"#),
            format!(r#"{{"from":"..",{base}}}"#),
            format!(r#"{{"from":"1\u00377\u0000",{base}}}"#),
            format!(r#"{{{base}}}"#),
            r#"{"from":"17","to":"42","amount_cents":9007199254740993}"#.into(),
            r#"{"from":"17","to":"42","amount_cents":1e400}"#.into(),
            r#"{"from":"17","to":"42","amount_cents":5e2}"#.into(),
            r#"{"from":"17","to":"42","amount_cents":500.0}"#.into(),
            r#"{"from":"17","to":"42","amount_cents":-0}"#.into(),
            r#"{"from":"17","to":"42","amount_cents":"500"}"#.into(),
            format!(r#"{{"from":"17",{base}}} {{}}"#),
            format!("\u{feff}{{\"from\":\"17\",{base}}}"),
            r#"["17"]"#.into(),
            String::new(),
        ] {
            assert!(read_json(&members(), bad.as_bytes()).is_err(), "{bad}");
        }
        // An escaped key is the same key, for us as for the app.
        assert!(read_json(&members(), format!(r#"{{"\u0066rom":"17",{base}}}"#).as_bytes()).is_ok());
    }

    #[test]
    fn policy_12_14_form_fields_are_listed_and_appear_once() {
        for bad in [
            "from=17&from=42&to=42&amount_cents=1",
            "from=17&%66rom=42&to=42&amount_cents=1",
            "from=17&to=42&amount_cents=1&_method=DELETE",
            "from=17&to=42&amount_cents=01",
            "from=17&to=42&amount_cents=+1",
            "from=17&to=42&amount_cents=%2B1",
            "from=17&to=42&amount_cents=-0",
            "from=17&to=42&amount_cents=9007199254740993",
            "from=17&to=42&amount_cents=1&memo=%ff",
            "from=17&to=42&amount_cents=1&memo=%4",
            "from=17&to=42&amount_cents=1&memo=%00",
            "from=17&to=42&amount_cents=1&memo=é",
            "from=17&to=42&amount_cents=1&",
            "from=17;to=42&amount_cents=1",
            "from=17&to=42",
            "from[]=17&to=42&amount_cents=1",
            "",
        ] {
            assert!(read_form(&members(), bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(read_form(&members(), b"from=1%37&to=42&amount_cents=-5&memo=caf%C3%A9&urgent=true").is_ok());
    }

    #[test]
    fn keys_are_read_in_every_kind_of_body() {
        let members: Members = [("row", "key"), ("prefix", "key?"), ("rows", "[key]?")]
            .into_iter()
            .map(|(name, kind)| (name.to_owned(), Member::parse(kind).unwrap()))
            .collect();
        let json = read_json(&members, br#"{"row":"alice/17","rows":["a","b/c"]}"#).unwrap();
        assert_eq!(json["row"], AttributeValue::Text("alice/17".into()));
        assert_eq!(json["rows"].to_string(), r#"["a", "b/c"]"#);
        assert!(!json.contains_key("prefix"));
        let form = read_form(&members, b"row=alice%2F17&prefix=a").unwrap();
        assert_eq!(form["row"], json["row"]);
        for bad in [
            r#"{"row":"alice//17"}"#,
            r#"{"row":"alice/17/"}"#,
            r#"{"row":"alice%2F17"}"#,
            r#"{"row":"a","prefix":""}"#,
            r#"{"row":"a","rows":[]}"#,
            r#"{"row":"a","rows":["b",""]}"#,
            r#"{"row":["a"]}"#,
        ] {
            assert!(read_json(&members, bad.as_bytes()).is_err(), "{bad}");
        }
        for other in ["[key", "[[key]]", "[key?]", "keys", "[text]", "[bool]"] {
            assert_eq!(Member::parse(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn reading_a_body_never_panics(body in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _unused = read_json(&members(), &body);
            let _unused = read_form(&members(), &body);
        }

        #[test]
        fn what_is_encoded_is_read_back(memo in "\\PC{0,20}") {
            let encoded: String = memo.bytes().map(|b| format!("%{b:02X}")).collect();
            let values = read_form(&members(), format!("from=1&to=2&amount_cents=3&memo={encoded}").as_bytes()).unwrap();
            prop_assert_eq!(values.get("memo"), Some(&AttributeValue::Text(memo.into())));
        }
    }
}
