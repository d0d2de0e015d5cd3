//! From records to policies that allow just them.

use super::super::diff::tests::read_account;
use super::super::tests::bank;
use super::*;

/// The bank without the policy by which web reads accounts, in audit mode.
fn without() -> (TempDir, Mesh) {
    let (folder, mesh) = bank("accounts");
    let path = folder.path().join("policies/services/accounts/accounts.cedar");
    let text = fs::read_to_string(&path).unwrap();
    let lists = text.find("@id(\"web-lists-own-accounts\")").unwrap();
    fs::write(&path, &text[lists..]).unwrap();
    // Of the policy that is gone.
    fs::remove_dir_all(folder.path().join("policies/services/accounts/tests")).unwrap();
    (folder, mesh)
}

fn audited(user: &str, id: u32) -> DecisionRecord {
    let mut record = read_account(user, Outcome::Deny);
    record.mode = Mode::Audit;
    record.target = format!("/accounts/{id}");
    record.objects[0].object = format!("Accounts::Account::\"{id}\"");
    record.objects[0].attributes.insert("owner".into(), AttributeValue::Text(user.into()));
    record
}

fn suggested(records: &[DecisionRecord], mesh: &Mesh) -> (BTreeMap<String, String>, (usize, usize)) {
    let policies = workload::policies(mesh).unwrap();
    let records: Vec<&DecisionRecord> = records.iter().collect();
    let suggestions = suggestions(&records, &policies);
    let files = written(&suggestions, &policies, mesh);
    let tried = tried(&files, mesh).unwrap_or_else(|failure| panic!("{failure:?} {files:#?}"));
    (files, replayed(&suggestions, &tried))
}

#[test]
fn what_people_asked_of_their_own_is_allowed_of_their_own_and_tested() {
    let (_folder, mesh) = without();
    let history = DecisionRecord {
        action: Some("ReadHistory".into()),
        target: "/accounts/17/history".into(),
        route: Some("GET /accounts/{id:int}/history".into()),
        ..audited("alice", 17)
    };
    let (files, replayed) = suggested(&[audited("alice", 17), audited("bob", 42), history], &mesh);
    assert_eq!(replayed, (3, 3));
    assert_eq!(
        files["services/accounts/suggested.cedar"],
        "// 3 recorded requests.\n\
         @id(\"web-read-account-read-history\")\n\
         permit (\n\
         \u{20} principal == Mesh::Workload::\"spiffe://bank.example/service/web\",\n\
         \u{20} action in [Accounts::Action::\"ReadAccount\", Accounts::Action::\"ReadHistory\"],\n\
         \u{20} resource is Accounts::Account\n\
         )\n\
         when { context has user && resource.owner == context.user.id };\n"
    );
    let tests = &files["services/accounts/tests/suggested.toml"];
    assert_eq!(tests.matches("[[test]]").count(), 4, "{tests}");
    assert!(tests.contains("name = \"web may not ReadAccount of somebody else\""), "{tests}");
}

#[test]
fn what_has_nothing_to_do_with_the_user_is_allowed_of_those_objects_or_said_to_be_wide() {
    let (_folder, mesh) = without();
    let of_others = |ids: std::ops::Range<u32>| -> Vec<DecisionRecord> {
        let other = |id| {
            let mut record = audited("alice", id);
            record.objects[0].attributes.insert("owner".into(), AttributeValue::Text("bob".into()));
            record
        };
        ids.map(other).collect()
    };
    let (files, replayed) = suggested(&of_others(1..3), &mesh);
    assert_eq!(replayed, (2, 2));
    let cedar = &files["services/accounts/suggested.cedar"];
    let listed =
        "when { context has user && resource in [Accounts::Account::\"1\", Accounts::Account::\"2\"] };";
    assert!(cedar.contains(listed), "{cedar}");
    let (files, replayed) = suggested(&of_others(1..9), &mesh);
    assert_eq!(replayed, (8, 8));
    let cedar = &files["services/accounts/suggested.cedar"];
    assert!(cedar.contains("about 8 objects") && cedar.contains("Narrow it."), "{cedar}");
    let (files, _) = suggested(&of_others(7..8), &mesh);
    assert!(files["services/accounts/suggested.cedar"].contains("resource == Accounts::Account::\"7\"\n"));
}

#[test]
fn what_a_workload_reports_is_never_taken_for_policy() {
    let (_folder, mesh) = without();
    let policies = workload::policies(&mesh).unwrap();
    let open = "\"1\" }; @id(\"x\") permit (principal is Mesh::Workload, action, resource); //";
    let mut object = audited("alice", 17);
    object.objects[0].object = format!("Accounts::Account::{open}");
    let mut principal = audited("alice", 17);
    principal.principal = Some(format!("spiffe://bank.example/service/web{open}"));
    let action = DecisionRecord { action: Some(format!("ReadAccount{open}")), ..audited("alice", 17) };
    let unknown = DecisionRecord { action: Some("BurnDown".into()), ..audited("alice", 17) };
    for record in [object, principal, action, unknown] {
        assert!(suggestions(&[&record], &policies).is_empty(), "{record:?}");
    }
    let mut attribute = audited("alice", 17);
    attribute.objects[0].attributes.insert(format!("owner{open}"), AttributeValue::Text("alice".into()));
    let strange = audited("al\u{1b}[2J\u{7f}ice\"\n", 42);
    let (files, replayed) = suggested(&[attribute, strange], &mesh);
    assert_eq!(replayed, (2, 2));
    let all = files.values().cloned().collect::<String>();
    assert!(!all.contains("permit (principal is") && !all.contains('\u{1b}'), "{all}");
}

#[test]
fn ids_that_are_taken_are_not_taken_again_and_files_not_written_over() {
    let (folder, mesh) = without();
    let path = folder.path().join("policies/services/web/more.cedar");
    fs::write(
        &path,
        "@id(\"web-read-account\")\nforbid (principal, action, resource) when { context.now < 0 };",
    )
    .unwrap();
    let (files, _) = suggested(&[audited("alice", 17)], &mesh);
    assert!(files["services/accounts/suggested.cedar"].contains("@id(\"web-read-account-2\")"), "{files:?}");
    let file = folder.path().join("a/b.cedar");
    write_new(&file, "one").unwrap();
    assert!(write_new(&file, "two").is_err());
    assert_eq!(fs::read_to_string(&file).unwrap(), "one");
}

/// The bank with brokers that nobody but the auditors may ask.
fn with_kafka() -> (TempDir, Mesh) {
    let (folder, mesh) = bank("accounts");
    let events = folder.path().join("policies/services/events");
    fs::create_dir_all(&events).unwrap();
    fs::write(events.join("map.toml"), "mapping = \"kafka\"\nmode = \"audit\"\n").unwrap();
    let policy = "@id(\"audit-reads\")\npermit (\n  principal == Mesh::Workload::\"spiffe://bank.example/service/audit\",\n  \
                  action in Kafka::Action::\"Read\",\n  resource is Kafka::Topic\n);\n";
    fs::write(events.join("events.cedar"), policy).unwrap();
    (folder, mesh)
}

/// payments asked the brokers for these objects in one request.
fn asked_kafka(action: &str, objects: &[&str]) -> DecisionRecord {
    let mut record = read_account("alice", Outcome::Deny);
    (record.mode, record.user, record.route) = (Mode::Audit, None, None);
    (record.service, record.method, record.target) = ("events".into(), "Fetch".into(), String::new());
    record.principal = Some("spiffe://bank.example/service/payments".into());
    record.action = Some(action.into());
    let first = record.objects[0].clone();
    let object = |object: &&str| policy::RecordedObject {
        object: (*object).to_owned(),
        attributes: BTreeMap::new(),
        ..first.clone()
    };
    record.objects = objects.iter().map(object).collect();
    record
}

#[test]
fn topics_of_the_brokers_own_are_named_one_by_one_and_never_any_of_them() {
    let (_folder, mesh) = with_kafka();
    let internal: Vec<String> = (0..7).map(|n| format!("Kafka::InternalTopic::\"__own_{n}\"")).collect();
    let internal: Vec<&str> = internal.iter().map(String::as_str).collect();
    let records = [
        asked_kafka("Consume", &internal[..2]),
        // Of both kinds at once.
        asked_kafka("Describe", &[internal[2], "Kafka::Topic::\"orders\"", internal[0]]),
        asked_kafka("Consume", &internal[2..]),
    ];
    let (files, replayed) = suggested(&records, &mesh);
    assert_eq!(replayed, (3, 3));
    let cedar = &files["services/events/suggested.cedar"];
    for topic in internal {
        assert_eq!(cedar.matches(&format!("resource == {topic}\n")).count(), 1, "{topic} in {cedar}");
    }
    assert!(!cedar.contains("is Kafka::InternalTopic") && !cedar.contains("resource in"), "{cedar}");
    // Both actions where both were asked, and no more than that.
    let both = "action in [Kafka::Action::\"Consume\", Kafka::Action::\"Describe\"],\n  resource ==";
    assert_eq!((cedar.matches("@id(").count(), cedar.matches(both).count()), (8, 2), "{cedar}");
}

#[test]
fn what_kafka_was_asked_is_suggested_per_set_of_objects_and_tested() {
    let (_folder, mesh) = with_kafka();
    let many: Vec<String> = (0..9).map(|n| format!("Kafka::Topic::\"t{n}\"")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let records = [
        asked_kafka("Consume", &["Kafka::Topic::\"orders\""]),
        asked_kafka("Produce", &["Kafka::Topic::\"payments\""]),
        asked_kafka("Join", &["Kafka::Group::\"payments\""]),
        asked_kafka("Commit", &["Kafka::Group::\"payments\""]),
        asked_kafka("IdempotentWrite", &["Kafka::Cluster::\"kafka-cluster\""]),
        asked_kafka("Transact", &["Kafka::TransactionalId::\"pay \\\"1\\\"\""]),
        asked_kafka("Describe", &many),
    ];
    let (files, replayed) = suggested(&records, &mesh);
    assert_eq!(replayed, (7, 7));
    let (cedar, tests) =
        (&files["services/events/suggested.cedar"], &files["services/events/tests/suggested.toml"]);
    // What is read may not be written, nor the other way round.
    for part in [
        "action == Kafka::Action::\"Consume\",\n  resource == Kafka::Topic::\"orders\"\n);",
        "action == Kafka::Action::\"Produce\",\n  resource == Kafka::Topic::\"payments\"\n);",
        "action in [Kafka::Action::\"Commit\", Kafka::Action::\"Join\"],\n  resource == Kafka::Group::\"payments\"\n);",
        "about 9 objects: any is allowed here. Narrow it.",
    ] {
        assert!(cedar.contains(part), "{part} in {cedar}");
    }
    for test in [
        "name = \"payments may Consume topic orders\"\nas = \"payments\"\n\
         kafka = { action = \"Consume\", topic = \"orders\" }\ndecision = \"allow\"\npolicy = \"payments-consume\"\n",
        "kafka = { action = \"Consume\", topic = \"orders-other\" }\ndecision = \"deny\"\npolicy = \"none\"\n",
        "kafka = { action = \"Join\", group = \"payments\" }\ndecision = \"allow\"",
        "kafka = { action = \"IdempotentWrite\", cluster = true }\ndecision = \"allow\"",
        "kafka = { action = \"Transact\", transactional_id = \"pay \\\"1\\\"\" }\ndecision = \"allow\"",
        "kafka = { action = \"Describe\", topic = \"__consumer_offsets\" }\ndecision = \"deny\"\npolicy = \"none\"",
    ] {
        assert!(tests.contains(test), "{test} in {tests}");
    }
    assert_eq!(tests.matches("decision = \"allow\"").count(), 7, "{tests}");
    assert_eq!(tests.matches("decision = \"deny\"").count(), 6, "{tests}");
}
