//! A sidecar's copy of the relations that are written by API.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use identity::json;
use serde_json::Value as Json;
use smol_str::SmolStr;

use crate::judge::MISSING;
use crate::object::{AttributeType, AttributeValue, Attributes, ObjectRef, Relations};
use crate::request::Mapped;

/// What is true of a service's objects at one revision.
#[derive(Debug, Default)]
pub struct RelationsCopy {
    /// The store and the revision; `None` before anything has come.
    known: Option<(String, u64)>,
    /// By type, without its namespace, and id.
    objects: HashMap<Box<str>, HashMap<SmolStr, Box<[Attribute]>>>,
    /// Each name once: a hundred thousand objects have the same few.
    names: HashSet<Arc<str>>,
}

type Attribute = (Arc<str>, AttributeValue);

/// One object that changed.
#[derive(Debug)]
struct Change {
    kind: String,
    id: String,
    /// `None` where nothing is true of it any more.
    attributes: Option<Box<[Attribute]>>,
}

impl RelationsCopy {
    /// The store and the revision, once something has come.
    pub fn known(&self) -> Option<(&str, u64)> {
        self.known.as_ref().map(|(epoch, revision)| (epoch.as_str(), *revision))
    }

    /// How many objects it has.
    pub fn len(&self) -> usize {
        self.objects.values().map(HashMap::len).sum()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes changes (type, id, and a JSON object or nothing) that lead to `revision`: from the revision `after`, or all
    /// there is without one. Whole, or not at all.
    ///
    /// # Errors
    /// They do not follow on what is here, or are none.
    pub fn take(
        &mut self,
        epoch: &str,
        revision: u64,
        after: Option<u64>,
        changed: impl IntoIterator<Item = (String, String, Option<String>)>,
    ) -> Result<(), String> {
        if let Some(after) = after
            && self.known.as_ref().is_none_or(|(known, at)| known != epoch || *at != after)
        {
            return Err(format!("the relations of revision {revision} follow on {after}, which is not here"));
        }
        let mut changes = Vec::new();
        for (kind, id, text) in changed {
            let attributes = match text {
                Some(text) => Some(self.read(&text).ok_or_else(|| format!("{kind}::\"{id}\" is malformed"))?),
                None => None,
            };
            changes.push(Change { kind, id, attributes });
        }
        if after.is_none() {
            self.objects.clear();
        }
        for Change { kind, id, attributes } in changes {
            match attributes {
                Some(attributes) => {
                    let of_kind = self.objects.entry(kind.into_boxed_str()).or_default();
                    of_kind.insert(id.into(), attributes);
                }
                None => {
                    if let Some(of_kind) = self.objects.get_mut(kind.as_str()) {
                        of_kind.remove(id.as_str());
                    }
                }
            }
        }
        self.known = Some((epoch.to_owned(), revision));
        Ok(())
    }

    fn read(&mut self, text: &str) -> Option<Box<[Attribute]>> {
        let map = json::parse_object(text.as_bytes()).ok()?;
        map.into_iter().map(|(name, value)| Some((self.name(&name), value_of(&value)?))).collect()
    }

    fn name(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return Arc::clone(known);
        }
        let name: Arc<str> = name.into();
        self.names.insert(Arc::clone(&name));
        name
    }

    /// What is true of the request's objects. One that is not here is denied, whatever would have to be known of it.
    pub fn tell(&self, mapped: &Mapped) -> Attributes {
        let Some((_, revision)) = self.known else {
            return Attributes::unusable_relations(MISSING, "no relations have come yet");
        };
        let (mut attributes, mut absent) = (Attributes::none(), Vec::new());
        for object in mapped.objects() {
            let told = self.objects.get(object.base_kind()).and_then(|of_kind| of_kind.get(object.id()));
            let Some(told) = told else {
                absent.push(object.clone());
                continue;
            };
            for (name, value) in told {
                attributes.insert(object.clone(), &**name, value.clone());
            }
        }
        attributes.relations = Relations::told(Some(revision), absent);
        attributes
    }
}

/// What is said of an object of which the relations know nothing.
pub(crate) fn not_there(object: &ObjectRef, revision: Option<u64>) -> String {
    let at = revision.map(|revision| format!(" at revision {revision}")).unwrap_or_default();
    format!("{object} is not among the relations{at}")
}

/// A value of one of the types that a schema's attributes have.
fn value_of(json: &Json) -> Option<AttributeValue> {
    let kind = match json {
        Json::Bool(_) => AttributeType::Bool,
        Json::Number(_) => AttributeType::Long,
        Json::String(_) => AttributeType::Text,
        Json::Array(items) if items.first().is_some_and(Json::is_number) => AttributeType::SetOfLong,
        Json::Array(_) => AttributeType::SetOfText,
        Json::Null | Json::Object(_) => return None,
    };
    kind.read(json)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn change(id: &str, text: Option<&str>) -> (String, String, Option<String>) {
        ("Account".into(), id.into(), text.map(str::to_owned))
    }

    #[test]
    fn an_update_follows_on_what_is_here_or_is_not_taken() {
        let mut copy = RelationsCopy::default();
        assert!(copy.take("e1", 5, Some(4), []).is_err(), "nothing is here");
        copy.take("e1", 5, None, [change("17", Some("{\"owner\":\"alice\"}")), change("18", Some("{}"))])
            .unwrap();
        assert_eq!((copy.known(), copy.len()), (Some(("e1", 5)), 2));
        for (epoch, after) in [("e1", 4), ("e1", 6), ("e2", 5)] {
            assert!(copy.take(epoch, 9, Some(after), [change("17", None)]).is_err());
        }
        // One malformed change takes the others with it.
        assert!(
            copy.take("e1", 6, Some(5), [change("17", None), change("19", Some("{\"a\":null}"))]).is_err()
        );
        assert_eq!((copy.known(), copy.len()), (Some(("e1", 5)), 2));
        copy.take("e1", 6, Some(5), [change("17", None), change("404", None)]).unwrap();
        assert_eq!((copy.known(), copy.len()), (Some(("e1", 6)), 1));
        // A restored backup is all there is, also where it is older.
        copy.take("e1", 3, None, []).unwrap();
        assert_eq!((copy.known(), copy.is_empty()), (Some(("e1", 3)), true));
    }

    proptest! {
        #[test]
        fn nothing_that_comes_is_more_than_malformed(text in "\\PC{0,60}|\\{\"[a-z]{1,3}\":(true|[0-9]{1,20}|\"\\PC{0,9}\"|\\[(1|\"a\")(,1|,\"a\")?\\])\\}") {
            let mut copy = RelationsCopy::default();
            let taken = copy.take("e", 1, None, [change("17", Some(&text))]);
            prop_assert_eq!(taken.is_ok(), copy.known().is_some());
            prop_assert_eq!(taken.is_ok(), copy.len() == 1);
        }
    }
}
