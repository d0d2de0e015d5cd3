//! `[route.list]`: what an answer that lists objects says of each, so that it can be judged object by object.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use toml::Spanned;
use toml::de::DeValue;

use super::{At, Draft, Reader, is_pointer};
use crate::object::AttributeType;
use crate::problem::suggest;
use crate::request::AttributeSource;
use crate::schema::ServiceSchema;

/// Where the objects of an answer stand, and what else of it is passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct List {
    /// The member that holds them; `None`: the answer itself is the list.
    pub(crate) items: Option<String>,
    /// What seeing one of them is.
    pub(crate) action: String,
    /// Full name of their type.
    pub(crate) kind: Arc<str>,
    /// Where in an item its id stands (JSON pointer).
    pub(crate) id: String,
    /// Where in an item each attribute stands.
    pub(crate) attributes: BTreeMap<String, (String, AttributeType)>,
    /// Members that say how many there are.
    pub(crate) counts: Vec<String>,
    /// Members that say where the next page begins.
    pub(crate) cursors: Vec<String>,
    /// Members that say nothing of any object.
    pub(crate) keeps: Vec<String>,
}

/// A list as it is written.
#[derive(Debug, Default)]
pub(super) struct DraftList {
    span: Range<usize>,
    items: Option<At<String>>,
    action: Option<At<String>>,
    object: Option<At<String>>,
    attributes: Vec<(At<String>, At<String>)>,
    counts: Vec<At<String>>,
    cursors: Vec<At<String>>,
    keeps: Vec<At<String>>,
}

impl Reader<'_> {
    pub(super) fn draft_list(&mut self, value: &Spanned<DeValue<'_>>) -> Option<DraftList> {
        const KNOWN: [&str; 7] = ["items", "action", "object", "attributes", "counts", "cursors", "keeps"];
        let Some(table) = value.get_ref().as_table() else {
            self.say(value.span(), "`list` is a table").hint("write [route.list] below the [[route]]");
            return None;
        };
        let mut draft = DraftList { span: value.span(), ..DraftList::default() };
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "items" => draft.items = self.string(value),
                "action" => draft.action = self.string(value),
                "object" => draft.object = self.string(value),
                "attributes" => draft.attributes = self.string_table(value),
                "counts" => draft.counts = self.list(value),
                "cursors" => draft.cursors = self.list(value),
                "keeps" => draft.keeps = self.list(value),
                other => self.unknown_key(other, key.span(), &KNOWN),
            }
        }
        Some(draft)
    }

    /// Resolves the list of a route whose own objects' attributes come from `source`.
    pub(super) fn list_of(
        &mut self,
        route: &Draft,
        method: &str,
        schema: &ServiceSchema,
        source: AttributeSource,
    ) -> Option<List> {
        let draft = route.list.as_ref()?;
        let span = || draft.span.clone();
        // A HEAD's answer has no list, and says how long the whole one is.
        if method != "GET" {
            self.say(span(), format!("the answer of a {method} is not filtered; only that of a GET is"));
        }
        if source == AttributeSource::Response {
            self.say(span(), "the route's own object takes no attributes from an answer that is filtered")
                .hint("take them from the path or from \"entities\"");
        }
        if let Some(upgrade) = &route.upgrade {
            self.say(upgrade.span.clone(), "an answer that upgrades lists nothing");
        }
        let (Some(action), Some(object)) = (&draft.action, &draft.object) else {
            self.say(span(), "a list has `action` and `object`")
                .hint("action = \"ReadAccount\", object = 'Account::\"{/id}\"'");
            return None;
        };
        let Some((kind, id)) = item_template(&object.value) else {
            self.say(object.span.clone(), "the object of an item is 'Type::\"{/pointer}\"'")
                .hint("the pointer leads from the item to its id, such as {/id}");
            return None;
        };
        let kind = schema.full_kind(kind);
        let Some(known) = schema.actions.get(&action.value) else {
            let names = schema.actions.keys().map(String::as_str);
            let hint = suggest(&action.value, names);
            self.say(action.span.clone(), format!("the schema has no action `{}`", action.value))
                .maybe_hint(hint);
            return None;
        };
        if !known.objects.contains(&kind) {
            let message = format!("the action `{}` does not apply to {kind}", action.value);
            self.say(object.span.clone(), message);
            return None;
        }
        let object_type = schema.types.get(&kind)?;
        let mut attributes = BTreeMap::new();
        for (name, pointer) in &draft.attributes {
            let Some(spec) = object_type.attributes.get(&name.value) else {
                let message = format!("{kind} has no attribute `{}`", name.value);
                self.say(name.span.clone(), message);
                continue;
            };
            if is_pointer(&pointer.value) {
                attributes.insert(name.value.clone(), (pointer.value.clone(), spec.kind));
            } else {
                self.say(pointer.span.clone(), "an item's attribute stands at a pointer, such as /owner");
            }
        }
        let untold = object_type.attributes.iter().find(|(name, spec)| {
            spec.required && !draft.attributes.iter().any(|(stated, _)| stated.value == **name)
        });
        if let Some((name, _)) = untold {
            self.say(span(), format!("nothing tells the attribute `{name}` of {kind}"))
                .hint(format!("attributes = {{ {name} = \"/…\" }}: where it stands in an item"));
        }
        let items = draft.items.as_ref().filter(|items| !items.value.is_empty());
        let named = draft.counts.iter().chain(&draft.cursors).chain(&draft.keeps);
        let mut members: Vec<&At<String>> = items.into_iter().collect();
        for member in named {
            if items.is_none() {
                self.say(member.span.clone(), "an answer that is itself the list has no members")
                    .hint("items = \"NAME\" names the member that holds it");
            } else if members.iter().any(|known| known.value == member.value) {
                self.say(member.span.clone(), format!("the member `{}` is named twice", member.value));
            }
            members.push(member);
        }
        let texts = |list: &[At<String>]| list.iter().map(|at| at.value.clone()).collect();
        Some(List {
            items: items.map(|items| items.value.clone()),
            action: action.value.clone(),
            kind: kind.into(),
            id: id.to_owned(),
            attributes,
            counts: texts(&draft.counts),
            cursors: texts(&draft.cursors),
            keeps: texts(&draft.keeps),
        })
    }
}

/// `Type::"{/pointer}"`.
fn item_template(text: &str) -> Option<(&str, &str)> {
    let (kind, id) = text.split_once("::\"{")?;
    let pointer = id.strip_suffix("}\"")?;
    let plain = !kind.is_empty() && kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    (plain && is_pointer(pointer) && !pointer.contains(['{', '}', '"'])).then_some((kind, pointer))
}
