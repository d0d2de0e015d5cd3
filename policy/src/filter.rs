//! Answers that list objects: what the caller may not see is taken out, and out of what is said about the whole.

use identity::json;
use serde_json::{Map as JsonMap, Value as Json};

use crate::body::MAX_JUDGED_BODY_BYTES;
use crate::decide::ServicePolicy;
use crate::judge::Asked;
use crate::map::List;
use crate::object::{AttributeValue, Attributes, ObjectRef, exact_integer};
use crate::record::Mode;
use crate::request::{Mapped, Refusal};
use crate::template::is_plain_id;
use crate::verdict::{Caller, Occasion, Verdict};

/// Most objects of one answer.
const MAX_ITEMS: usize = 10_000;

/// An answer without what the caller may not see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filtered {
    /// Its body, JSON.
    pub body: Vec<u8>,
    /// How many objects are left in it.
    pub kept: usize,
    /// How many were taken out.
    pub withheld: usize,
}

impl Mapped {
    /// Whether the answer lists objects, each of which is to be judged before it is passed on.
    pub fn lists(&self) -> bool {
        self.route.list.is_some()
    }
}

impl ServicePolicy {
    /// Takes out of an answer what the caller may not see: each object of the list is decided about on its own, counts
    /// become the number of those that are left, a cursor is withheld (null) where anything was, since it may tell of it,
    /// and what the map does not name is left out.
    ///
    /// # Errors
    /// An answer that is no such list: nothing of it is passed on.
    pub fn filter(
        &self,
        caller: &Caller,
        mapped: &Mapped,
        body: &[u8],
        occasion: &Occasion<'_>,
    ) -> Result<Filtered, Refusal> {
        let wrong =
            |why: String| Refusal::denied("list.answer", format!("the app's answer {why}")).on(&mapped.route);
        let Some(list) = &mapped.route.list else { return Err(wrong("is not mapped as a list".to_owned())) };
        if body.len() > MAX_JUDGED_BODY_BYTES {
            return Err(wrong(format!("is longer than {MAX_JUDGED_BODY_BYTES} bytes")));
        }
        let document =
            json::parse(body).map_err(|error| wrong(format!("is not JSON with one meaning: {error}")))?;
        let (items, members) = match (&list.items, document) {
            (None, Json::Array(items)) => (items, None),
            (Some(name), Json::Object(mut members)) => match members.remove(name) {
                Some(Json::Array(items)) => (items, Some(members)),
                _ => return Err(wrong(format!("has no list {name:?}"))),
            },
            (None, _) => return Err(wrong("is no list".to_owned())),
            (Some(_), _) => return Err(wrong("is no object".to_owned())),
        };
        if items.len() > MAX_ITEMS {
            return Err(wrong(format!("lists more than {MAX_ITEMS} objects")));
        }
        let all = items.len();
        let mut kept = Vec::with_capacity(all);
        let mut denied = false;
        for item in items {
            let seen = self.may_see(caller, list, &item, occasion, &mut denied);
            if seen.map_err(|why| wrong(why.to_owned()))? {
                kept.push(item);
            }
        }
        let (left, withheld) = (kept.len(), all - kept.len());
        let answer = match (members, &list.items) {
            (Some(members), Some(name)) => Json::Object(about(list, members, name, kept, withheld)),
            _ => Json::Array(kept),
        };
        Ok(Filtered { body: answer.to_string().into_bytes(), kept: left, withheld })
    }

    fn may_see(
        &self,
        caller: &Caller,
        list: &List,
        item: &Json,
        occasion: &Occasion<'_>,
        denied: &mut bool,
    ) -> Result<bool, &'static str> {
        let id = match item.pointer(&list.id) {
            Some(Json::String(text)) if is_plain_id(text) => text.clone(),
            Some(number) => exact_integer(number).ok_or("lists something without an id")?.to_string(),
            None => return Err("lists something without an id"),
        };
        let object = ObjectRef::shared(list.kind.clone(), id.into());
        let mut attributes = Attributes::none();
        for (name, (pointer, kind)) in &list.attributes {
            // One that is not there is not known, and what needs it denies.
            if let Some(value) = item.pointer(pointer).and_then(|value| kind.read(value)) {
                attributes.insert(object.clone(), name.clone(), value);
            }
        }
        // The first denial of an answer is held against Cedar's; ten thousand of them would take a second.
        let objects = std::slice::from_ref(&object);
        let asked = Asked { caller, action: &list.action, objects, attributes: &attributes, mapped: None };
        if *denied && self.denies_swiftly(&asked, occasion.now) {
            return Ok(self.mode(occasion.now) == Mode::Audit);
        }
        Ok(match self.decide_object(caller, &list.action, &object, &attributes, occasion) {
            Verdict::Permit(_) => true,
            Verdict::Deny(denial) => {
                *denied = true;
                denial.audited().is_ok()
            }
        })
    }
}

/// What is said beside the items.
fn about(
    list: &List,
    mut members: JsonMap<String, Json>,
    name: &str,
    kept: Vec<Json>,
    withheld: usize,
) -> JsonMap<String, Json> {
    let mut answer = JsonMap::new();
    for count in &list.counts {
        if members.contains_key(count) {
            answer.insert(count.clone(), kept.len().into());
        }
    }
    for cursor in &list.cursors {
        if let Some(value) = members.remove(cursor) {
            answer.insert(cursor.clone(), if withheld == 0 { value } else { Json::Null });
        }
    }
    for member in &list.keeps {
        if let Some(value) = members.remove(member) {
            answer.insert(member.clone(), value);
        }
    }
    answer.insert(name.to_owned(), Json::Array(kept));
    answer
}

/// Lists in a body that name objects: every value is an object of its own.
pub(crate) fn each(value: &AttributeValue) -> &[AttributeValue] {
    match value {
        AttributeValue::Set(values) => values,
        one => std::slice::from_ref(one),
    }
}
