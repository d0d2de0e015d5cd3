//! Objects that requests touch, and the attributes that policies look at.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use cedar_policy::RestrictedExpression;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use smol_str::SmolStr;

/// Largest integer that every JSON reader keeps exact: 2^53 - 1 (RFC 8259 §6).
///
/// A larger one could be judged as one number here and read as another by the app.
pub(crate) const MAX_EXACT_INTEGER: i64 = (1 << 53) - 1;
/// Most elements of a set attribute; a group list, not a database.
pub(crate) const MAX_SET_ELEMENTS: usize = 256;
/// Longest text attribute.
pub(crate) const MAX_TEXT_BYTES: usize = 1024;

/// One object: its Cedar entity type with namespace, and its id.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectRef {
    kind: Arc<str>,
    id: SmolStr,
}

impl ObjectRef {
    /// The object `id` of type `kind`, such as `Vault::Secret` and `accounts/db-key`.
    ///
    /// Whether the type exists is checked where the object is judged: an unknown one is denied.
    pub fn new(kind: &str, id: &str) -> Self {
        Self::shared(kind.into(), id.into())
    }

    /// The same of a type's name that is shared: no allocation for an id of up to 23 bytes.
    pub(crate) fn shared(kind: Arc<str>, id: SmolStr) -> Self {
        Self { kind, id }
    }

    /// As [`fmt::Display`] writes it, and Cedar too; `None` if it is not.
    pub fn written(text: &str) -> Option<Self> {
        let uid: cedar_policy::EntityUid = text.parse().ok()?;
        Some(Self::new(&uid.type_name().to_string(), uid.id().unescaped()))
    }

    /// The entity type with its namespace.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The entity type without its namespace.
    pub fn base_kind(&self) -> &str {
        self.kind.rsplit("::").next().unwrap_or_default()
    }

    /// The id.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::\"{}\"", self.kind, self.id.escape_debug())
    }
}

/// The value of one attribute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AttributeValue {
    /// Cedar `Bool`.
    Bool(bool),
    /// Cedar `Long`.
    Long(i64),
    /// Cedar `String`.
    Text(SmolStr),
    /// Cedar `Set` of the above.
    Set(Vec<AttributeValue>),
}

impl fmt::Display for AttributeValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Long(value) => write!(f, "{value}"),
            Self::Text(value) => write!(f, "\"{}\"", value.escape_debug()),
            Self::Set(values) => {
                f.write_str("[")?;
                for (i, value) in values.iter().enumerate() {
                    write!(f, "{}{value}", if i > 0 { ", " } else { "" })?;
                }
                f.write_str("]")
            }
        }
    }
}

impl AttributeValue {
    pub(crate) fn expression(&self) -> RestrictedExpression {
        match self {
            Self::Bool(value) => RestrictedExpression::new_bool(*value),
            Self::Long(value) => RestrictedExpression::new_long(*value),
            Self::Text(value) => RestrictedExpression::new_string(value.to_string()),
            Self::Set(values) => RestrictedExpression::new_set(values.iter().map(Self::expression)),
        }
    }
}

/// The types an attribute of an object may have: depth 1, so that it can be taken from a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AttributeType {
    Bool,
    Long,
    Text,
    SetOfText,
    SetOfLong,
}

impl AttributeType {
    /// From the name Cedar prints for a resolved type.
    pub(crate) fn from_cedar(name: &str) -> Option<Self> {
        match name {
            "Bool" => Some(Self::Bool),
            "Long" => Some(Self::Long),
            "String" => Some(Self::Text),
            "Set<String>" => Some(Self::SetOfText),
            "Set<Long>" => Some(Self::SetOfLong),
            _ => None,
        }
    }

    pub(crate) fn admits(self, value: &AttributeValue) -> bool {
        match (self, value) {
            (Self::Bool, AttributeValue::Bool(_))
            | (Self::Long, AttributeValue::Long(_))
            | (Self::Text, AttributeValue::Text(_)) => true,
            (Self::SetOfText, AttributeValue::Set(values)) => {
                values.iter().all(|v| matches!(v, AttributeValue::Text(_)))
            }
            (Self::SetOfLong, AttributeValue::Set(values)) => {
                values.iter().all(|v| matches!(v, AttributeValue::Long(_)))
            }
            _ => false,
        }
    }

    /// The JSON value as this type, or `None`: nothing is converted, so `17` is not `"17"`.
    pub(crate) fn read(self, json: &Json) -> Option<AttributeValue> {
        match (self, json) {
            (Self::Bool, Json::Bool(value)) => Some(AttributeValue::Bool(*value)),
            (Self::Long, json) => exact_integer(json).map(AttributeValue::Long),
            (Self::Text, Json::String(text)) if text.len() <= MAX_TEXT_BYTES => {
                Some(AttributeValue::Text(text.into()))
            }
            (Self::SetOfText | Self::SetOfLong, Json::Array(items)) if items.len() <= MAX_SET_ELEMENTS => {
                let element = if self == Self::SetOfText { Self::Text } else { Self::Long };
                items.iter().map(|item| element.read(item)).collect::<Option<_>>().map(AttributeValue::Set)
            }
            _ => None,
        }
    }
}

impl fmt::Display for AttributeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bool => "Bool",
            Self::Long => "Long",
            Self::Text => "String",
            Self::SetOfText => "Set<String>",
            Self::SetOfLong => "Set<Long>",
        })
    }
}

/// A JSON integer that no reader rounds.
pub(crate) fn exact_integer(json: &Json) -> Option<i64> {
    json.as_i64().filter(|n| (-MAX_EXACT_INTEGER..=MAX_EXACT_INTEGER).contains(n))
}

/// Attributes by object, as learnt from the app (entities endpoint or response) or from a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    told: HashMap<ObjectRef, BTreeMap<String, AttributeValue>>,
    pub(crate) relations: Relations,
}

/// What the pushed relations had to say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Relations {
    /// Nobody asked them.
    #[default]
    NotAsked,
    /// What they told is among the attributes, as it was at the revision; a test's is of none.
    Told(Option<u64>),
    /// Likewise, but of these objects, which they do not have: who asks about one of them is denied.
    Lacking { revision: Option<u64>, objects: Vec<ObjectRef> },
    /// What they would tell must not be decided by.
    Unusable(&'static str, String),
}

impl Relations {
    /// What they told, but of these.
    pub(crate) fn told(revision: Option<u64>, absent: Vec<ObjectRef>) -> Self {
        if absent.is_empty() { Self::Told(revision) } else { Self::Lacking { revision, objects: absent } }
    }
}

impl Attributes {
    /// No attributes: for objects whose type has none, or whose attributes the request itself tells.
    pub fn none() -> Self {
        Self::default()
    }

    /// Attributes of a request that needs the pushed relations, which cannot be decided by: it is denied by this rule.
    pub fn unusable_relations(rule: &'static str, reason: impl Into<String>) -> Self {
        Self { told: HashMap::new(), relations: Relations::Unusable(rule, reason.into()) }
    }

    /// Adds one; a second value for the same attribute replaces the first.
    pub fn insert(&mut self, object: ObjectRef, name: impl Into<String>, value: AttributeValue) {
        self.told.entry(object).or_default().insert(name.into(), value);
    }

    /// Adds what others have told, of other attributes.
    pub fn extend(&mut self, others: Self) {
        for (object, told) in others.told {
            self.told.entry(object).or_default().extend(told);
        }
        if self.relations == Relations::NotAsked {
            self.relations = others.relations;
        }
    }

    /// Whether anything is known of the object.
    pub fn knows(&self, object: &ObjectRef) -> bool {
        self.told.contains_key(object)
    }

    /// Everything known of one object.
    pub(crate) fn of(&self, object: &ObjectRef) -> Option<&BTreeMap<String, AttributeValue>> {
        // Most requests tell all there is: no hash is computed then.
        if self.told.is_empty() { None } else { self.told.get(object) }
    }

    /// One attribute of one object.
    pub fn get(&self, object: &ObjectRef, name: &str) -> Option<&AttributeValue> {
        self.of(object)?.get(name)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn policy_18_integers_beyond_2_to_53_are_not_read() {
        assert_eq!(exact_integer(&json!(9_007_199_254_740_991_i64)), Some(MAX_EXACT_INTEGER));
        for bad in [
            json!(9_007_199_254_740_993_i64),
            json!(1.0),
            json!(1e3),
            json!(-0.0),
            json!("1"),
            json!(u64::MAX),
        ] {
            assert_eq!(exact_integer(&bad), None, "{bad}");
        }
    }

    #[test]
    fn nothing_is_converted_between_types() {
        assert_eq!(AttributeType::Text.read(&json!(17)), None);
        assert_eq!(AttributeType::Long.read(&json!("17")), None);
        assert_eq!(AttributeType::Bool.read(&json!(1)), None);
        assert_eq!(AttributeType::SetOfText.read(&json!(["a", 1])), None);
        assert_eq!(AttributeType::SetOfText.read(&json!([["a"]])), None);
        assert_eq!(AttributeType::Text.read(&json!(null)), None);
        assert_eq!(
            AttributeType::SetOfText.read(&json!(["a"])),
            Some(AttributeValue::Set(vec![AttributeValue::Text("a".into())]))
        );
    }

    #[test]
    fn an_object_prints_as_cedar_writes_it() {
        let object = ObjectRef::new("Vault::Secret", "a\"b\n");
        assert_eq!(object.to_string(), "Vault::Secret::\"a\\\"b\\n\"");
        assert_eq!(object.base_kind(), "Secret");
    }
}
