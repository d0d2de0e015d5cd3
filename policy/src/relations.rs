//! `relations.toml`: what is true of a service's objects, kept beside its policies; and the copy of what is written by
//! API instead ([`copy`]), with the tokens of its revisions ([`token`]).

mod copy;
mod token;

use std::path::Path;

use serde_json::{Map, Value as Json};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::decide::ServicePolicy;
use crate::object::{AttributeValue, Attributes, MAX_EXACT_INTEGER, ObjectRef};
use crate::problem::{Problem, Problems, suggest};
use crate::schema::ServiceSchema;
use crate::template::is_plain_id;

pub use copy::RelationsCopy;
pub(crate) use copy::not_there;
pub use token::{RelationsToken, TokenError};

/// Reads `[Type."id"]` tables, each with attributes of the type. Every mistake is a problem.
pub(crate) fn parse(
    file: &Path,
    text: &str,
    schema: &ServiceSchema,
    problems: &mut Problems,
) -> Option<Attributes> {
    let before = problems.0.len();
    let document = match DeTable::parse(text) {
        Ok(document) => document,
        Err(error) => {
            problems.push(Problem::toml(file, text, &error));
            return None;
        }
    };
    let mut reader = Reader { file, text, schema, problems };
    let mut attributes = Attributes::none();
    for (kind, objects) in document.get_ref() {
        reader.kind(kind, objects, &mut attributes);
    }
    (problems.0.len() == before).then_some(attributes)
}

impl ServicePolicy {
    /// Holds what is to be true of an object of `kind`, which is written without its namespace, against the service's
    /// schema. That something is missing is no matter of this: it may come from elsewhere.
    ///
    /// # Errors
    /// What the schema does not have, in one clause.
    pub fn check_relation(&self, kind: &str, attributes: &Map<String, Json>) -> Result<(), String> {
        let schema = &self.shared().schema;
        let hinted = |message: String, hint: Option<String>| match hint {
            Some(hint) => format!("{message}; {hint}"),
            None => message,
        };
        let Some(of_kind) = schema.types.get(&schema.full_kind(kind)) else {
            let prefix = format!("{}::", schema.namespace);
            let known = schema.types.keys().filter_map(|known| known.strip_prefix(&prefix));
            return Err(hinted(format!("the schema has no type `{kind}`"), suggest(kind, known)));
        };
        for (name, value) in attributes {
            let Some(spec) = of_kind.attributes.get(name) else {
                let known = of_kind.attributes.keys().map(String::as_str);
                return Err(hinted(format!("{kind} has no attribute `{name}`"), suggest(name, known)));
            };
            if spec.kind.read(value).is_none() {
                return Err(format!(
                    "the attribute `{name}` is a {}, which {} is none of",
                    spec.kind,
                    shown(value)
                ));
            }
        }
        Ok(())
    }
}

/// As much of a value as an error should hold.
fn shown(value: &Json) -> String {
    const MAX_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

struct Reader<'a> {
    file: &'a Path,
    text: &'a str,
    schema: &'a ServiceSchema,
    problems: &'a mut Problems,
}

type Key<'a> = Spanned<std::borrow::Cow<'a, str>>;

impl Reader<'_> {
    fn say(&mut self, span: std::ops::Range<usize>, message: String, hint: Option<String>) {
        self.problems.push(Problem::at(self.file, self.text, span, message).maybe_hint(hint));
    }

    fn kind(&mut self, name: &Key<'_>, objects: &Spanned<DeValue<'_>>, into: &mut Attributes) {
        let full = self.schema.full_kind(name.get_ref());
        let Some(kind) = self.schema.types.get(&full) else {
            let prefix = format!("{}::", self.schema.namespace);
            let known = self.schema.types.keys().filter_map(|known| known.strip_prefix(&prefix));
            let hint = suggest(name.get_ref(), known);
            self.say(name.span(), format!("the schema has no type `{}`", name.get_ref()), hint);
            return;
        };
        let Some(objects) = objects.get_ref().as_table() else {
            let hint = format!("[{}.\"ID\"]", name.get_ref());
            self.say(objects.span(), "expected a table of objects".into(), Some(hint));
            return;
        };
        for (id, told) in objects {
            if !is_plain_id(id.get_ref()) {
                let message = format!("`{}` is no id of an object", id.get_ref());
                self.say(id.span(), message, Some("A-Z a-z 0-9 . _ -".into()));
                continue;
            }
            let Some(told) = told.get_ref().as_table() else {
                self.say(told.span(), "expected a table of attributes".into(), None);
                continue;
            };
            let object = ObjectRef::new(&full, id.get_ref());
            for (attribute, value) in told {
                let Some(spec) = kind.attributes.get(attribute.get_ref().as_ref()) else {
                    let hint = suggest(attribute.get_ref(), kind.attributes.keys().map(String::as_str));
                    self.say(
                        attribute.span(),
                        format!("{full} has no attribute `{}`", attribute.get_ref()),
                        hint,
                    );
                    continue;
                };
                match read(value.get_ref()).filter(|value| spec.kind.admits(value)) {
                    Some(value) => into.insert(object.clone(), attribute.get_ref().as_ref(), value),
                    None => {
                        let message = format!("the attribute `{}` is a {}", attribute.get_ref(), spec.kind);
                        self.say(value.span(), message, None);
                    }
                }
            }
        }
    }
}

fn read(value: &DeValue<'_>) -> Option<AttributeValue> {
    if let Some(items) = value.as_array() {
        let values: Option<Vec<_>> = items.iter().map(|item| read(item.get_ref())).collect();
        // Lists in lists are no attribute that a schema could declare.
        return values
            .filter(|values| !values.iter().any(|value| matches!(value, AttributeValue::Set(_))))
            .map(AttributeValue::Set);
    }
    if let Some(number) = value.as_integer() {
        let number: i64 = number.as_str().replace('_', "").parse().ok().filter(|_| number.radix() == 10)?;
        let exact = (-MAX_EXACT_INTEGER..=MAX_EXACT_INTEGER).contains(&number);
        return exact.then_some(AttributeValue::Long(number));
    }
    let text = value.as_str().map(|text| AttributeValue::Text(text.into()));
    text.or_else(|| value.as_bool().map(AttributeValue::Bool))
}
