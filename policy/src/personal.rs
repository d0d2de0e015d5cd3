//! Records of decisions without the people in them.

use std::collections::BTreeSet;

use identity::pseudonym;
use serde_json::Value as Json;

/// The members of a record in which a person may be named. What is about workloads, policies and the mesh stays.
const ABOUT_PEOPLE: [&str; 5] = ["user", "target", "reason", "objects", "explanation"];

/// What of a record names people.
#[derive(Debug, Clone, Default)]
pub struct Personal {
    attributes: BTreeSet<String>,
}

impl Personal {
    /// Users' ids, and the values of these attributes of objects.
    pub fn new(attributes: impl IntoIterator<Item = String>) -> Self {
        Self { attributes: attributes.into_iter().collect() }
    }

    /// The record with a pseudonym in the place of each such value, wherever it stands by itself: whoever is equal stays
    /// equal, so that it can be decided again. `None` for what is no record.
    pub fn hide(&self, key: &[u8], record: &str) -> Option<String> {
        let mut record: Json = serde_json::from_str(record).ok()?;
        let mut people = BTreeSet::new();
        if let Some(id) = record.pointer("/user/id").and_then(Json::as_str) {
            people.insert(id.to_owned());
        }
        for object in record.get("objects").and_then(Json::as_array).into_iter().flatten() {
            let told = object.get("attributes").and_then(Json::as_object).into_iter().flatten();
            for (_, value) in told.filter(|(name, _)| self.attributes.contains(*name)) {
                texts(value, &mut people);
            }
        }
        // The longest first: one may be a part of another.
        let mut names: Vec<(String, String)> = people
            .into_iter()
            .filter(|name| !name.is_empty())
            .map(|name| {
                let stand_in = pseudonym::of(key, &name);
                (name, stand_in)
            })
            .collect();
        names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        let members = record.as_object_mut()?;
        for name in ABOUT_PEOPLE {
            if let Some(member) = members.get_mut(name) {
                rewrite(member, &names);
            }
        }
        serde_json::to_string(&record).ok()
    }
}

/// Every text in a value.
fn texts(value: &Json, into: &mut BTreeSet<String>) {
    match value {
        Json::String(text) => drop(into.insert(text.clone())),
        Json::Array(items) => items.iter().for_each(|item| texts(item, into)),
        Json::Object(members) => members.values().for_each(|member| texts(member, into)),
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
}

fn rewrite(value: &mut Json, names: &[(String, String)]) {
    match value {
        Json::String(text) => {
            for (name, stand_in) in names {
                *text = replaced(text, name, stand_in);
            }
        }
        Json::Array(items) => items.iter_mut().for_each(|item| rewrite(item, names)),
        Json::Object(members) => members.values_mut().for_each(|member| rewrite(member, names)),
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
}

/// `text` with `name` replaced where it is no part of a longer word.
fn replaced(text: &str, name: &str, stand_in: &str) -> String {
    let word = |char: Option<char>| char.is_some_and(|char| char.is_alphanumeric() || char == '_');
    let (mut out, mut rest, mut before) = (String::with_capacity(text.len()), text, None);
    while let Some(at) = rest.find(name) {
        let (head, tail) = rest.split_at(at);
        let after = tail.strip_prefix(name).unwrap_or_default();
        let left = head.chars().next_back().or(before);
        let within = (word(left) && word(name.chars().next()))
            || (word(after.chars().next()) && word(name.chars().next_back()));
        out.push_str(head);
        out.push_str(if within { name } else { stand_in });
        before = name.chars().next_back();
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const KEY: [u8; 32] = [7; 32];

    fn hidden(record: &Json) -> Json {
        let personal = Personal::new(["owner".to_owned(), "members".to_owned()]);
        serde_json::from_str(&personal.hide(&KEY, &record.to_string()).unwrap()).unwrap()
    }

    #[test]
    fn people_are_gone_and_who_is_equal_stays_equal() {
        let record = json!({
            "receipt": "r-alice", "service": "alice", "principal": "spiffe://bank.example/service/alice",
            "user": {"id": "alice", "issuer": "https://id.example", "client": "web", "scopes": [], "groups": ["alice"]},
            "target": "/owners/alice/accounts/alicex?of=bob",
            "reason": "resource.owner is \"bob\", and context.user.id is \"alice\"",
            "objects": [{"object": "Account::\"17\"", "attributes": {"owner": "bob", "status": "open", "members": ["alice", "carol"]}}],
            "explanation": {"considered": [{"policy": "bob", "outcome": {"failed": {"text": "\"alice\" == \"bob\""}}}]},
        });
        let told = hidden(&record);
        let [alice, bob, carol] = ["alice", "bob", "carol"].map(|name| pseudonym::of(&KEY, name));
        assert_eq!(
            (&told["user"]["id"], &told["objects"][0]["attributes"]["owner"]),
            (&json!(alice), &json!(bob))
        );
        assert_eq!(told["objects"][0]["attributes"]["members"], json!([alice, carol]));
        assert_eq!(told["objects"][0]["attributes"]["status"], "open");
        assert_eq!(told["target"], format!("/owners/{alice}/accounts/alicex?of={bob}"));
        assert_eq!(
            told["explanation"]["considered"][0]["outcome"]["failed"]["text"],
            format!("\"{alice}\" == \"{bob}\"")
        );
        // What names workloads and receipts is not about people, whatever it looks like.
        assert_eq!(
            (&told["receipt"], &told["service"], &told["principal"]),
            (&record["receipt"], &record["service"], &record["principal"])
        );
        assert_eq!(Personal::default().hide(&KEY, "no record"), None);
        assert_eq!(Personal::default().hide(&KEY, "[]"), None);
    }

    proptest! {
        #[test]
        fn a_name_by_itself_never_stays(name in "[a-zé|.@-]{1,8}", around in "[ \"/,(]{0,3}") {
            let record = json!({"user": {"id": name}, "reason": format!("{around}{name}{around}")});
            let told = hidden(&record);
            let stand_in = pseudonym::of(&KEY, &name);
            prop_assert_eq!(told["reason"].as_str().unwrap(), format!("{around}{stand_in}{around}"));
        }
    }
}
