use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const NOW: u64 = 1_000;

fn change(id: &str, attributes: Option<&str>) -> Change {
    Change {
        kind: "Account".into(),
        id: id.into(),
        attributes: attributes.map(|text| Attributes::parse(text).unwrap()),
        delete: attributes.is_none(),
        must_be: None,
        must_exist: false,
    }
}

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    (directory, store)
}

fn write(store: &Store, changes: &[Change]) -> Result<Batch, NotWritten> {
    store.write_relations("accounts", changes, "operator", NOW, "e1")
}

fn owner(name: &str) -> String {
    format!("{{\"owner\":\"{name}\"}}")
}

#[test]
fn a_batch_is_one_revision_that_rises_over_restarts_and_is_at_least_the_time() {
    let (directory, store) = store();
    let first = write(&store, &[change("17", Some(&owner("alice"))), change("18", Some("{}"))]).unwrap();
    assert_eq!((first.after, first.head.revision, first.head.objects), (0, NOW, 2));
    let second = write(&store, &[change("17", Some(&owner("bob")))]).unwrap();
    assert_eq!((second.after, second.head.revision), (NOW, NOW + 1), "the clock stands still");
    drop(store);
    let store = Store::open(directory.path()).unwrap();
    let third = store.write_relations("accounts", &[change("18", None)], "spiffe://x", 5, "e2").unwrap();
    assert_eq!((third.head.epoch.as_str(), third.head.revision), ("e1", NOW + 2), "the clock was set back");
    assert_eq!(third.changed[0].attributes, None);
    let (head, all, more) = store.read_relations("accounts", None, 10).unwrap();
    assert_eq!((head.unwrap(), more), (third.head, false));
    assert_eq!(all.len(), 1);
    assert_eq!((all[0].id.as_str(), all[0].revision, all[0].by.as_str()), ("17", NOW + 1, "operator"));
}

#[test]
fn nothing_of_a_batch_is_written_if_a_precondition_of_one_change_does_not_hold() {
    let (_directory, store) = store();
    write(&store, &[change("17", Some(&owner("alice")))]).unwrap();
    let refused = |must_be, must_exist, id: &str| {
        let conditional = Change { must_be, must_exist, ..change(id, Some(&owner("eve"))) };
        match write(&store, &[change("1", Some("{}")), conditional]) {
            Err(NotWritten::Precondition { .. }) => {}
            other => panic!("{other:?}"),
        }
        assert!(store.relation("accounts", &Object::new("Account", "1").unwrap()).unwrap().is_none());
    };
    refused(Some(0), false, "17");
    refused(Some(NOW - 1), false, "17");
    refused(Some(NOW), true, "18");
    refused(None, true, "18");
    let conditional = Change { must_be: Some(NOW), must_exist: true, ..change("17", Some(&owner("bob"))) };
    write(&store, &[conditional.clone(), Change { must_be: Some(0), ..change("18", Some("{}")) }]).unwrap();
    // Of two who read the same revision the second does not undo the first.
    let error = write(&store, &[conditional]).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "Account::\"17\" has the revision {}, and the change says that it has the revision {NOW}",
            NOW + 1
        )
    );
}

#[test]
fn what_is_no_batch_says_what_it_is() {
    let many: Vec<Change> = (0..=MAX_BATCH).map(|n| change(&n.to_string(), None)).collect();
    let heavy = (0..15).map(|n| format!("\"a{n}\":\"{}\"", "y".repeat(1_000))).collect::<Vec<_>>().join(",");
    let heavy: Vec<Change> = (0..40).map(|n| change(&n.to_string(), Some(&format!("{{{heavy}}}")))).collect();
    let both = Change { delete: true, ..change("1", Some("{}")) };
    let neither = Change { delete: false, ..change("1", None) };
    for (changes, words) in [
        (vec![], "has no change"),
        (many, "at most 256 are taken"),
        (heavy, "at most 524288 are taken"),
        (vec![change("1", None), change("1", Some("{}"))], "changes Account::\"1\" twice"),
        (vec![both], "one of the two"),
        (vec![neither], "one of the two"),
        (vec![Change { must_be: Some(0), must_exist: true, ..change("1", None) }], "cannot both"),
        (vec![change("a b", None)], "no id of an object"),
        (vec![Change { kind: "A::B".into(), ..change("1", None) }], "no name of a type"),
    ] {
        let error = check(&changes).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn services_do_not_see_each_other_and_pages_follow_on() {
    let (_directory, store) = store();
    for n in 0..5 {
        write(&store, &[change(&n.to_string(), Some("{}"))]).unwrap();
    }
    store.write_relations("accountsx", &[change("9", Some("{}"))], "operator", NOW, "e9").unwrap();
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let (_, page, more) = store.read_relations("accounts", after.as_ref(), 2).unwrap();
        seen.extend(page.iter().map(|relation| relation.id.clone()));
        after = page.last().map(|last| Object::new(&last.kind, &last.id).unwrap());
        if !more {
            break;
        }
    }
    assert_eq!(seen, ["0", "1", "2", "3", "4"]);
    assert_eq!(store.read_relations("other", None, 9).unwrap(), (None, vec![], false));
}

proptest! {
    // Each write is synced to the disk.
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever is written in whatever order: the count, the bytes and the objects are those that a map has.
    #[test]
    fn the_totals_are_those_of_what_is_there(steps in prop::collection::vec((0..6u8, prop::option::of("[a-z]{0,20}")), 1..20)) {
        let (_directory, store) = store();
        let mut model = BTreeMap::new();
        let mut last = 0;
        for (id, name) in steps {
            let id = id.to_string();
            let text = name.map(|name| owner(&name));
            let batch = write(&store, &[change(&id, text.as_deref())]).unwrap();
            prop_assert!(batch.head.revision > last);
            prop_assert_eq!(batch.after, last);
            last = batch.head.revision;
            match text {
                Some(text) => drop(model.insert(id, text)),
                None => drop(model.remove(&id)),
            }
            let (head, all, _) = store.read_relations("accounts", None, 100).unwrap();
            let head = head.unwrap();
            prop_assert_eq!(head.objects, model.len() as u64);
            prop_assert_eq!(head.bytes == 0, model.is_empty());
            let all: Vec<_> = all.into_iter().map(|r| (r.id, r.attributes.unwrap().text())).collect();
            prop_assert_eq!(all, model.clone().into_iter().collect::<Vec<_>>());
        }
    }

}

proptest! {
    /// What is stored is read back as it was, and nothing that is no attributes is.
    #[test]
    fn attributes_are_read_as_they_were_written(text in "\\PC{0,200}") {
        if let Ok(attributes) = Attributes::parse(&text) {
            prop_assert_eq!(Attributes::parse(&attributes.text()).unwrap(), attributes.clone());
            let row = Row { revision: 1, by: "operator".into(), attributes };
            prop_assert_eq!(decode::<Row>(&encode(&row).unwrap()).unwrap(), row);
        }
    }
}

#[test]
fn attributes_that_no_schema_could_have_are_refused() {
    let long = "x".repeat(1_025);
    let many = format!("[{}]", vec!["1"; 257].join(","));
    let names = (0..65).map(|n| format!("\"a{n}\":1")).collect::<Vec<_>>().join(",");
    let heavy = (0..17).map(|n| format!("\"a{n}\":\"{}\"", "y".repeat(1_000))).collect::<Vec<_>>().join(",");
    for (text, words) in [
        ("[]", "no JSON object"),
        ("{", "no JSON object"),
        (r#"{"a":1,"\u0061":2}"#, "no JSON object"),
        (r#"{"a":null}"#, "is no truth value"),
        (r#"{"a":{}}"#, "is no truth value"),
        (r#"{"a":1.5}"#, "53 bits"),
        (r#"{"a":9007199254740992}"#, "53 bits"),
        (r#"{"a":["x",1]}"#, "a list of other"),
        (r#"{"a":[["x"]]}"#, "a list of other"),
        (r#"{"a b":1}"#, "no name of an attribute"),
        (&format!("{{\"a\":\"{long}\"}}"), "longer than 1024"),
        (&format!("{{\"a\":{many}}}"), "more than 256"),
        (&format!("{{{names}}}"), "more than 64 attributes"),
        (&format!("{{{heavy}}}"), "more than 16384 bytes"),
    ] {
        let error = Attributes::parse(text).unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    Attributes::parse(r#"{"owner":"alice","open":true,"limit":-5,"members":["a"],"none":[]}"#).unwrap();
}
