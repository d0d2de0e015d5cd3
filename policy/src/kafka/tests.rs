//! Decisions about Kafka's objects, and what is said about policies of them that are wrong.

use std::sync::Arc;
use std::time::Duration;

use identity::SpiffeId;

use super::*;
use crate::cases::Case;
use crate::load::Policies;
use crate::load::tests::load;
use crate::record::{DecisionRecord, Layer};
use crate::{Question, Receipt};

const MAP: &str = "mapping = \"kafka\"";
const POLICY: &str = r#"
@id("billing-writes-payments")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/billing",
  action in Kafka::Action::"Write",
  resource == Kafka::Topic::"payments"
);
@id("audit-reads-topics")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/audit",
  action in Kafka::Action::"Read",
  resource is Kafka::Topic
) when { resource != Kafka::Topic::"salaries" };
@id("audit-has-its-group")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/audit",
  action in Kafka::Action::"Read",
  resource == Kafka::Group::"audit"
);
@id("audit-reads-offsets")
permit (
  principal == Mesh::Workload::"spiffe://bank.example/service/audit",
  action in Kafka::Action::"Read",
  resource == Kafka::InternalTopic::"__consumer_offsets"
);
"#;

/// The service `events`, which serves Kafka, beside a shop.
fn loaded(policy: &str) -> Result<Arc<Policies>, String> {
    let files = [("services/events/map.toml", Some(MAP)), ("services/events/events.cedar", Some(policy))];
    load(&files).0.map_err(|problems| problems.to_string())
}

fn events() -> Arc<ServicePolicy> {
    loaded(POLICY).unwrap().service("events").unwrap()
}

fn by(service: &str) -> Caller {
    caller(&SpiffeId::new(&format!("spiffe://bank.example/service/{service}")).unwrap())
}

fn occasion(target: &str) -> Occasion<'_> {
    Occasion {
        receipt: Receipt::generate(&ring::rand::SystemRandom::new()).unwrap(),
        now: Duration::from_secs(1),
        layer: Layer::Sidecar,
        method: "Produce",
        target,
        transaction: None,
        trace_id: None,
    }
}

fn rule(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Permit(permit) => permit.rule().name().to_owned(),
        Verdict::Deny(denial) => format!("not by {}", denial.rule().name()),
    }
}

/// What is decided, asked as `palisade explain` asks.
fn asked(service: &str, action: &str, object: &str) -> Result<DecisionRecord, String> {
    let question = Question {
        caller: SpiffeId::new(&format!("spiffe://bank.example/service/{service}")).unwrap(),
        user: None,
        method: action.to_owned(),
        target: object.to_owned(),
        headers: Default::default(),
        body: None,
        attributes: Default::default(),
        objects: Default::default(),
        now: Duration::from_secs(1),
    };
    question.ask(&events())
}

fn decided(service: &str, action: &str, object: &str) -> String {
    let record = asked(service, action, object).unwrap();
    let permitted = record.verdict == Outcome::Permit;
    format!("{}{}", if permitted { "" } else { "not by " }, record.rule.name())
}

#[test]
fn an_action_on_an_object_is_decided_by_the_policy_that_names_it() {
    for (service, action, object, by) in [
        ("billing", "Produce", "topic:payments", "billing-writes-payments"),
        ("billing", "Describe", "topic:payments", "billing-writes-payments"),
        ("billing", "Consume", "topic:payments", "not by none"),
        ("billing", "Produce", "topic:payments2", "not by none"),
        ("audit", "Consume", "topic:payments", "audit-reads-topics"),
        ("audit", "Consume", "topic:salaries", "not by none"),
        ("audit", "Produce", "topic:payments", "not by none"),
        ("audit", "Join", "group:audit", "audit-has-its-group"),
        ("audit", "Commit", "group:audit", "audit-has-its-group"),
        ("audit", "Join", "group:audit2", "not by none"),
        ("audit", "Delete", "group:audit", "not by none"),
        ("billing", "Transact", "transactional-id:billing-1", "not by none"),
        ("billing", "IdempotentWrite", "cluster", "not by none"),
        ("nobody", "Describe", "topic:payments", "not by none"),
    ] {
        assert_eq!(decided(service, action, object), by, "{service} {action} {object}");
    }
    let why = asked("billing", "Produce", "payments").unwrap_err();
    assert!(why.contains("Produce topic:payments"), "{why}");
    assert!(asked("billing", "Write", "topic:payments").unwrap_err().contains("no action there"));
}

/// Acceptance list policy, line 34: a topic named like an internal one.
#[test]
fn policy_34_a_permit_for_topics_is_none_for_internal_ones_nor_for_their_look_alikes() {
    assert_eq!(decided("audit", "Consume", "topic:__consumer_offsets"), "audit-reads-offsets");
    for name in [
        "__transaction_state",
        "__consumer_offsets2",
        "__Consumer_offsets",
        "_.consumer_offsets",
        "._consumer.offsets",
        "..consumer_offsets",
        "__",
    ] {
        let record = asked("audit", "Consume", &format!("topic:{name}")).unwrap();
        assert_eq!(record.rule, Rule::Absent, "{name}");
        assert_eq!(record.objects[0].object, format!("Kafka::InternalTopic::\"{name}\""));
    }
    // One underscore, or none, is anybody's.
    assert_eq!(decided("audit", "Consume", "topic:_schemas"), "audit-reads-topics");
    assert_eq!(decided("audit", "Consume", "topic:a__b"), "audit-reads-topics");
}

#[test]
fn what_no_topic_or_group_can_be_called_is_refused() {
    let long = "a".repeat(250);
    for object in [
        "topic:",
        "topic:.",
        "topic:..",
        "topic:pay ments",
        "topic:payments\u{200b}",
        "topic:p\u{e4}yments",
        "topic:a/b",
        &format!("topic:{long}"),
    ] {
        let record = asked("audit", "Consume", object).unwrap();
        assert_eq!((record.rule.name(), record.status), ("kafka.topic_name", Some(400)), "{object}");
    }
    for object in ["group:", "group:a\nb", "transactional-id:\0", &format!("group:{}", long.repeat(5))] {
        assert_eq!(asked("audit", "Join", object).unwrap().rule.name(), "kafka.id", "{object}");
    }
}

#[test]
fn a_permit_that_would_open_internal_topics_without_naming_them_is_a_problem() {
    let said = |resource: &str| {
        let policy = format!(
            "@id(\"all\")\npermit (principal == Mesh::Workload::\"spiffe://bank.example/service/a\", action, {resource});"
        );
        loaded(&policy).map(drop).unwrap_err()
    };
    assert!(said("resource").contains("events.cedar:1:1: a permit for any resource"), "{}", said("resource"));
    assert!(said("resource is Kafka::InternalTopic").contains("names each"));
    let forbid = "@id(\"none\")\nforbid (principal, action, resource);";
    assert!(loaded(&format!("{POLICY}{forbid}")).is_ok());
}

#[test]
fn the_schema_is_the_products_and_nobody_elses() {
    let own = |map: &str| {
        let files = [
            ("services/events/map.toml", Some(map)),
            ("services/events/events.cedarschema", Some(include_str!("../shipped/kafka.cedarschema"))),
            ("services/events/events.cedar", Some(POLICY)),
        ];
        load(&files).0.map(drop).unwrap_err().to_string()
    };
    assert!(own(MAP).contains("has no schema of its own"), "{}", own(MAP));
    assert!(own("mapping = \"none\"").contains("cannot declare the namespace Kafka"));
    let routes = format!("{MAP}\n[[route]]\nmatch = \"GET /a\"\naction = \"A\"\nobject = 'B::\"c\"'\n");
    let files =
        [("services/events/map.toml", Some(routes.as_str())), ("services/events/events.cedar", Some(POLICY))];
    assert!(load(&files).0.map(drop).unwrap_err().to_string().contains("routes or is \"kafka\""));
    // Two clusters have one schema, and rules of their own.
    let files = [
        ("services/events/map.toml", Some(MAP)),
        ("services/events/events.cedar", Some(POLICY)),
        ("services/logs/map.toml", Some(MAP)),
        ("services/logs/logs.cedar", Some("@id(\"none\")\nforbid (principal, action, resource);")),
    ];
    let policies = load(&files).0.unwrap();
    let object = KafkaObject::Topic("payments").object().unwrap();
    let decide = |service: &str| {
        let policy = policies.service(service).unwrap();
        rule(&policy.decide_kafka(&by("billing"), KafkaAction::Produce, &object, &occasion("")))
    };
    assert_eq!(decide("events"), "billing-writes-payments");
    assert_eq!(decide("logs"), "not by none");
}

#[test]
fn whoever_no_permit_is_about_may_not_even_connect() {
    let connect = |service| rule(&events().decide_kafka_connection(&by(service), &occasion("")));
    assert_eq!(connect("billing"), "billing-writes-payments");
    assert_eq!(connect("stranger"), "not by none");
    let elsewhere = caller(&SpiffeId::new("spiffe://other.example/service/billing").unwrap());
    let verdict = events().decide_kafka_connection(&elsewhere, &occasion(""));
    assert_eq!(rule(&verdict), "not by principal.trust_domain");
    let shop = loaded(POLICY).unwrap().service("shop").unwrap();
    assert_eq!(
        rule(&shop.decide_kafka_connection(&by("billing"), &occasion(""))),
        "not by kafka.not_allowed_by_map"
    );
    let object = KafkaObject::Topic("payments").object().unwrap();
    let verdict = shop.decide_kafka(&by("billing"), KafkaAction::Produce, &object, &occasion(""));
    assert_eq!(rule(&verdict), "not by kafka.not_allowed_by_map");
    let plain = events().decide_connect(&by("billing"), "main", &occasion(""));
    assert_eq!(rule(&plain), "not by tcp.not_allowed_by_map");
}

#[test]
fn of_many_objects_each_is_decided_and_the_denied_ones_are_in_one_record() {
    let names = ["payments", "salaries", "orders", "__consumer_offsets", "__transaction_state"];
    let objects: Vec<ObjectRef> =
        names.iter().map(|name| KafkaObject::Topic(name).object().unwrap()).collect();
    let judged =
        events().decide_kafka_each(&by("audit"), KafkaAction::Consume, &objects, &occasion("topic:payments"));
    let allowed: Vec<bool> = judged.permits.iter().map(Option::is_some).collect();
    assert_eq!(allowed, [true, false, true, true, false]);
    let denial = judged.denial.unwrap();
    let listed: Vec<&str> = denial.record().objects.iter().map(|object| object.object.as_str()).collect();
    assert_eq!(listed, ["Kafka::Topic::\"salaries\"", "Kafka::InternalTopic::\"__transaction_state\""]);
    assert!(denial.record().explanation.is_some());
    let hidden =
        |object: &ObjectRef| events().hides_kafka(&by("audit"), KafkaAction::Describe, object, &occasion(""));
    assert_eq!(objects.iter().map(hidden).collect::<Vec<_>>(), [false, true, false, false, true]);
}

#[test]
fn audit_mode_lets_through_what_it_records_as_denied() {
    let audit = events().with_mode(crate::Mode::Audit);
    let object = KafkaObject::Topic("payments").object().unwrap();
    let objects = [object.clone()];
    let judged =
        audit.decide_kafka_each(&by("stranger"), KafkaAction::Produce, &objects, &occasion("topic:payments"));
    assert!(judged.denial.is_none());
    assert!(judged.permits[0].as_ref().is_some_and(Permit::is_audited));
    assert!(!audit.hides_kafka(&by("stranger"), KafkaAction::Produce, &object, &occasion("")));
}

#[test]
fn tests_beside_the_policies_ask_about_objects() {
    let text = r#"
[[test]]
name = "billing writes payments"
as = "spiffe://bank.example/service/billing"
kafka = { action = "Produce", topic = "payments" }
decision = "allow"
policy = "billing-writes-payments"

[[test]]
name = "nobody writes to the brokers' topics"
as = "spiffe://bank.example/service/billing"
kafka = { action = "Produce", topic = "__consumer_offsets" }
decision = "deny"
policy = "none"

[[test]]
name = "a name is a name"
as = "spiffe://bank.example/service/billing"
kafka = { action = "Produce", topic = "pay/ments" }
decision = "refuse"
policy = "kafka.topic_name"

[[test]]
name = "audit is in its group"
as = "spiffe://bank.example/service/audit"
kafka = { action = "Join", group = "audit" }
decision = "allow"
policy = "audit-has-its-group"

[[test]]
name = "and transacts nothing"
as = "spiffe://bank.example/service/audit"
kafka = { action = "Transact", transactional_id = "audit-1" }
decision = "deny"
policy = "none"

[[test]]
name = "nor is the cluster its own"
as = "spiffe://bank.example/service/audit"
kafka = { action = "AlterConfigs", cluster = true }
decision = "deny"
policy = "none"
"#;
    let cases = |text: &str| {
        let files = [
            ("services/events/map.toml", Some(MAP)),
            ("services/events/events.cedar", Some(POLICY)),
            ("services/events/tests/all.toml", Some(text)),
        ];
        let (policies, dir) = load(&files);
        let policies = policies.unwrap();
        let cases = Case::load(dir.path(), &policies, |_| None);
        cases.map(|cases| (cases, policies)).map_err(|problems| problems.to_string())
    };
    let (all, policies) = cases(text).unwrap();
    assert_eq!(all.len(), 6);
    for case in &all {
        assert_eq!(case.run(&policies), Ok(()), "{}", case.name);
    }
    let with_user = text.replacen("kafka = {", "user = \"alice\"\nkafka = {", 1);
    let (all, policies) = cases(&with_user).unwrap();
    assert!(all[0].run(&policies).unwrap_err().contains("has no user"));
    for (from, to, why) in [
        ("\"Produce\"", "\"Write\"", "all.toml:5:9: this is no action of Kafka's on one object"),
        ("topic = \"payments\"", "topic = \"a\", group = \"b\"", "no action of Kafka's on one object"),
        (
            "kafka = { action = \"Produce\", topic = \"payments\" }\n",
            "",
            "all.toml:2:1: a test has a `request`, or `kafka`",
        ),
        ("kafka = { action", "request = \"GET /\"\nkafka = { action", "not both"),
    ] {
        let told = cases(&text.replacen(from, to, 1)).map(drop).unwrap_err();
        assert!(told.contains(why), "{told}");
    }
}

#[test]
fn names_are_read_as_they_are_written() {
    for object in [
        KafkaObject::Topic("a"),
        KafkaObject::Group("b:c"),
        KafkaObject::TransactionalId("d"),
        KafkaObject::Cluster,
    ] {
        assert_eq!(KafkaObject::written(&object.to_string()), Some(object));
    }
    assert_eq!(KafkaObject::written("cluster:a"), None);
    for action in KafkaAction::ALL {
        assert_eq!(KafkaAction::named(action.name()), Some(action));
        assert!(events().shared().schema.actions.contains_key(action.name()), "{action:?}");
    }
}
