//! `palisade policy suggest`: the least that would allow what audit mode let through, and tests that hold it there.
//!
//! What is suggested is tried before it is shown: put beside the policies that there are, it must load, allow every
//! request that it was made from, and pass its own tests.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use policy::{
    AttributeSource, AttributeValue, Case, DecisionRecord, KafkaObject, Layer, Mapping, Mode, ObjectRef,
    Outcome, Policies, Question, Rule, ServicePolicy,
};
use tempfile::TempDir;

use super::diff::{asked, recorded};
use crate::Global;
use crate::failure::{Exit, Failure};
use crate::mesh::Mesh;
use crate::printer::Printer;
use crate::workload;

/// Objects that a policy names one by one; with more it takes any of their kind, and says so.
const MAX_LISTED: usize = 5;
/// Topics of this kind are the brokers' own, or are named like them: policies name each (`policy/README.md`, "Kafka").
const INTERNAL_TOPIC: &str = "Kafka::InternalTopic";
/// What a suggestion's files are called, below services/NAME/ and its tests/.
const FILE: &str = "suggested";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Recorded decisions, a JSON document each; without it, the newest that control has.
    #[arg(long, value_name = "FILE")]
    decisions: Option<PathBuf>,
    /// Only for this service.
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// What was refused because no policy allows it too, not only what audit mode let through.
    #[arg(long)]
    denied: bool,
    /// Write services/NAME/suggested.cedar and services/NAME/tests/suggested.toml, to be read before they are
    /// committed.
    #[arg(long)]
    write: bool,
}

/// Requests that one policy is to allow.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone)]
struct Kind {
    service: String,
    principal: String,
    object: String,
    condition: Condition,
    /// The only objects that it is about; any of their kind where there are none.
    listed: BTreeSet<String>,
}

/// What all of them have in common.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone)]
enum Condition {
    /// These attributes of the object are the user's id.
    Own(BTreeSet<String>),
    /// There was a user.
    User,
    /// Nothing.
    None,
}

/// One policy, and what it was made from.
#[derive(Debug)]
struct Suggestion<'a> {
    id: String,
    kind: Kind,
    actions: BTreeSet<String>,
    records: Vec<&'a DecisionRecord>,
}

pub(super) fn run(args: &Args, mesh: &Mesh, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let policies = workload::policies(mesh)?;
    let service = args.service.as_deref().map(|name| mesh.policies_of(name));
    if let Some(name) = service.filter(|name| policies.service(name).is_none()) {
        return Err(workload::no_policy(&mesh.mesh.policies, name));
    }
    let records = recorded(args.decisions.as_deref(), || asked(global))?;
    let wanted = |record: &&DecisionRecord| {
        record.verdict == Outcome::Deny
            && record.rule == Rule::Absent
            && (args.denied || record.mode == Mode::Audit)
            && service.is_none_or(|name| name == record.service)
    };
    let records: Vec<&DecisionRecord> = records.iter().filter(wanted).collect();
    let suggestions = suggestions(&records, &policies);
    if suggestions.is_empty() {
        printer.progress("nothing to suggest: there is no recorded request that audit mode let through although no policy allows it");
        return Ok(Exit::Ok);
    }
    let written = written(&suggestions, &policies, mesh);
    let tried = tried(&written, mesh)?;
    let (allowed, all) = replayed(&suggestions, &tried);
    for (name, text) in &written {
        if args.write {
            let path = mesh.mesh.policies.join(name);
            write_new(&path, text)?;
            printer.data(&format!("{}\n", path.display()))?;
        } else {
            let comment = if name.ends_with(".toml") { "#" } else { "//" };
            printer.data(&format!("{comment} {name}\n{text}\n"))?;
        }
    }
    printer.progress(&format!("{allowed} of {all} recorded requests would be allowed; the tests pass"));
    if !args.write {
        printer.progress(
            "--write puts them there; read them first: what was asked is not always what should be allowed",
        );
    }
    Ok(Exit::Ok)
}

fn suggestions<'a>(records: &[&'a DecisionRecord], policies: &Policies) -> Vec<Suggestion<'a>> {
    // By what is asked first, for a condition that holds of all of it.
    let mut asked: BTreeMap<(String, String, String, String), Vec<&DecisionRecord>> = BTreeMap::new();
    for record in records {
        let (Some(principal), Some(action)) = (&record.principal, &record.action) else { continue };
        let kinds: BTreeSet<&str> =
            record.objects.iter().filter_map(|object| kind_of(&object.object)).collect();
        // What it is made of becomes text of a policy, and a workload has reported it: only what can be read back as a
        // principal, an action and objects of this very service, and decided, is taken.
        let Some(service) = policies.service(&record.service) else { continue };
        // One request of Kafka's may ask for topics of two kinds; another is about objects of one.
        let is_one = kinds.len() == 1 || is_kafka(&service);
        if !(is_one
            && principal.starts_with("spiffe://")
            && is_name(action)
            && service.replay(record).is_some())
        {
            continue;
        }
        for kind in kinds {
            let key = (record.service.clone(), principal.clone(), kind.to_owned(), action.clone());
            asked.entry(key).or_default().push(record);
        }
    }
    let mut grouped: BTreeMap<Kind, Suggestion<'a>> = BTreeMap::new();
    for ((service, principal, object, action), records) in asked {
        let condition = condition(&records);
        for listed in listed(&object, &condition, &records) {
            let kind = Kind {
                service: service.clone(),
                principal: principal.clone(),
                object: object.clone(),
                condition: condition.clone(),
                listed,
            };
            let suggestion = grouped.entry(kind.clone()).or_insert_with(|| Suggestion {
                id: String::new(),
                kind,
                actions: BTreeSet::new(),
                records: Vec::new(),
            });
            let about = |record: &&DecisionRecord| {
                let is_about = |object: &&str| suggestion.kind.is_about(object);
                record.objects.iter().map(|object| object.object.as_str()).any(|object| is_about(&object))
            };
            let about: Vec<_> = records.iter().copied().filter(about).collect();
            suggestion.actions.insert(action.clone());
            suggestion.records.extend(about);
        }
    }
    let mut taken: BTreeSet<String> = policies
        .services()
        .flat_map(|service| service.policies().map(|(id, ..)| id.to_owned()).collect::<Vec<_>>())
        .collect();
    let mut suggestions: Vec<Suggestion<'a>> = grouped.into_values().collect();
    for suggestion in &mut suggestions {
        let who = suggestion.kind.principal.rsplit('/').next().unwrap_or_default();
        let does: Vec<String> = suggestion.actions.iter().map(|action| kebab(action)).collect();
        let base: String = format!("{who}-{}", does.join("-")).chars().take(90).collect();
        let free = (1..).map(|n| if n == 1 { base.clone() } else { format!("{base}-{n}") });
        suggestion.id = free.into_iter().find(|id| taken.insert(id.clone())).unwrap_or(base);
    }
    suggestions
}

impl Kind {
    fn is_about(&self, object: &str) -> bool {
        kind_of(object) == Some(&self.object) && (self.listed.is_empty() || self.listed.contains(object))
    }
}

fn is_kafka(service: &ServicePolicy) -> bool {
    service.mapping() == Mapping::Kafka
}

/// The objects that policies are to name, a policy each: none where one policy is about any of their kind.
fn listed(kind: &str, condition: &Condition, records: &[&DecisionRecord]) -> Vec<BTreeSet<String>> {
    let objects = records.iter().flat_map(|record| &record.objects).map(|object| object.object.clone());
    let objects: BTreeSet<String> = objects.filter(|object| kind_of(object) == Some(kind)).collect();
    if kind == INTERNAL_TOPIC {
        return objects.into_iter().map(|object| BTreeSet::from([object])).collect();
    }
    let any = matches!(condition, Condition::Own(_)) || objects.len() > MAX_LISTED;
    vec![if any { BTreeSet::new() } else { objects }]
}

/// The type of an object as it is written, `Accounts::Account::"17"`.
fn kind_of(object: &str) -> Option<&str> {
    object.split_once("::\"").map(|(kind, _)| kind)
}

/// Whether it is one word of Cedar's.
fn is_name(text: &str) -> bool {
    let starts = text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
    starts && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Text as JSON and TOML both have it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// `ReadAccount` is `read-account`.
fn kebab(name: &str) -> String {
    let mut kebab = String::new();
    for character in name.chars() {
        if character.is_ascii_uppercase() && !kebab.is_empty() {
            kebab.push('-');
        }
        kebab.push(character.to_ascii_lowercase());
    }
    kebab
}

fn condition(records: &[&DecisionRecord]) -> Condition {
    let own = |record: &&DecisionRecord| {
        let user = record.user.as_ref()?;
        let of = |attributes: &BTreeMap<String, AttributeValue>| -> BTreeSet<String> {
            let is_user =
                |value: &AttributeValue| matches!(value, AttributeValue::Text(text) if *text == user.id);
            attributes
                .iter()
                .filter(|(name, value)| is_name(name) && is_user(value))
                .map(|(name, _)| name.clone())
                .collect()
        };
        let sets = record.objects.iter().map(|object| of(&object.attributes));
        sets.reduce(|one, other| one.intersection(&other).cloned().collect())
    };
    let sets: Option<Vec<BTreeSet<String>>> = records.iter().map(own).collect();
    let Some(sets) = sets else { return Condition::None };
    let common = sets.into_iter().reduce(|one, other| one.intersection(&other).cloned().collect());
    match common {
        Some(common) if !common.is_empty() => Condition::Own(common),
        _ => Condition::User,
    }
}

/// The files, below the policies directory.
fn written(suggestions: &[Suggestion<'_>], policies: &Policies, mesh: &Mesh) -> BTreeMap<String, String> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for suggestion in suggestions {
        let service = &suggestion.kind.service;
        let cedar = files.entry(format!("services/{service}/{FILE}.cedar")).or_default();
        if !cedar.is_empty() {
            cedar.push('\n');
        }
        cedar.push_str(&cedar_of(suggestion));
        let tests = tests_of(suggestion, policies, mesh);
        if !tests.is_empty() {
            let file = files.entry(format!("services/{service}/tests/{FILE}.toml")).or_default();
            if !file.is_empty() {
                file.push('\n');
            }
            file.push_str(&tests);
        }
    }
    for (name, text) in &mut files {
        if name.ends_with(".cedar")
            && let Ok(pretty) = super::pretty(text)
        {
            *text = pretty;
        }
    }
    files
}

fn cedar_of(Suggestion { id, kind, actions, records }: &Suggestion<'_>) -> String {
    let namespace = kind.object.rsplit_once("::").map_or("", |(namespace, _)| namespace);
    let actions: Vec<String> =
        actions.iter().map(|action| format!("{namespace}::Action::\"{action}\"")).collect();
    let action = match actions.as_slice() {
        [one] => format!("action == {one}"),
        several => format!("action in [{}]", several.join(", ")),
    };
    let mut text = format!("// {} recorded requests.\n", records.len());
    let listed: Vec<&str> = kind.listed.iter().map(String::as_str).collect();
    let resource = match listed.as_slice() {
        [one] => format!("resource == {one}"),
        _ => format!("resource is {}", kind.object),
    };
    let mut conditions = Vec::new();
    match &kind.condition {
        Condition::Own(names) => {
            conditions.push("context has user".to_owned());
            conditions.extend(names.iter().map(|name| format!("resource.{name} == context.user.id")));
        }
        Condition::User => conditions.push("context has user".to_owned()),
        Condition::None => {}
    }
    if listed.len() > 1 {
        conditions.push(format!("resource in [{}]", listed.join(", ")));
    } else if listed.is_empty() && !matches!(kind.condition, Condition::Own(_)) {
        let objects = records.iter().flat_map(|record| &record.objects).map(|object| &object.object);
        let objects: BTreeSet<_> = objects.filter(|object| kind.is_about(object)).collect();
        let common = match kind.condition {
            Condition::User => ", which have nothing in common with the user",
            Condition::Own(_) | Condition::None => "",
        };
        // Writing to a String cannot fail.
        let _infallible = writeln!(
            text,
            "// They were about {} objects{common}: any is allowed here. Narrow it.",
            objects.len()
        );
    }
    let when = if conditions.is_empty() {
        ";\n".to_owned()
    } else {
        format!("\nwhen {{ {} }};\n", conditions.join(" && "))
    };
    let _infallible = write!(
        text,
        "@id(\"{id}\")\npermit (\n  principal == Mesh::Workload::\"{}\",\n  {action},\n  {resource}\n){when}",
        kind.principal
    );
    text
}

/// A test an action that one of its requests passes, and one that somebody else's object does not.
fn tests_of(suggestion: &Suggestion<'_>, policies: &Policies, mesh: &Mesh) -> String {
    let Suggestion { id, kind, actions, records } = suggestion;
    let caller = mesh.registrations().into_iter().find(|known| known.id.as_str() == kind.principal);
    let caller = caller.map_or_else(|| kind.principal.clone(), |known| known.name);
    let kafka = policies.service(&kind.service).filter(|service| is_kafka(service));
    if let Some(policy) = kafka {
        return tests_of_kafka(suggestion, &caller, &policy);
    }
    let routes = policies.service(&kind.service).map(|service| service.routes()).unwrap_or_default();
    let by_app = |record: &DecisionRecord| {
        let of = |(template, source): &(String, AttributeSource)| {
            Some(template) == record.route.as_ref() && *source != AttributeSource::Known
        };
        routes.iter().any(of)
    };
    let mut text = String::new();
    for action in actions {
        // A body is not recorded, so requests with one cannot be asked again; nor what other layers decide.
        let record = records.iter().find(|record| {
            record.action.as_ref() == Some(action)
                && record.layer == Layer::Sidecar
                && matches!(record.method.as_str(), "GET" | "HEAD" | "DELETE")
        });
        let Some(record) = record else { continue };
        let user = record.user.as_ref().map(|user| user.id.clone());
        let attributes = record.objects.first().map(|object| object.attributes.clone()).unwrap_or_default();
        let told = |attributes: &BTreeMap<String, AttributeValue>| {
            let pairs: Vec<String> = attributes
                .iter()
                .filter(|(name, _)| is_name(name))
                .map(|(name, value)| format!("{name} = {}", serde_json::to_string(value).unwrap_or_default()))
                .collect();
            if pairs.is_empty() || !by_app(record) {
                String::new()
            } else {
                format!("attributes = {{ {} }}\n", pairs.join(", "))
            }
        };
        let mut test = |name: String,
                        attributes: &BTreeMap<String, AttributeValue>,
                        decision: &str,
                        by: &str| {
            let user = user.as_ref().map_or(String::new(), |user| format!("user = {}\n", quoted(user)));
            let gap = if text.is_empty() { "" } else { "\n" };
            let _infallible = write!(
                text,
                "{gap}[[test]]\nname = {}\nas = {}\n{user}request = {}\n{}decision = \"{decision}\"\npolicy = \"{by}\"\n",
                quoted(&name),
                quoted(&caller),
                quoted(&format!("{} {}", record.method, record.target)),
                told(attributes)
            );
        };
        test(format!("{caller} may {action}"), &attributes, "allow", id);
        if let (Condition::Own(names), true) = (&kind.condition, by_app(record)) {
            let mut others = attributes.clone();
            for name in names {
                others.insert(name.clone(), AttributeValue::Text("somebody else".into()));
            }
            test(format!("{caller} may not {action} of somebody else"), &others, "deny", "none");
        }
    }
    text
}

/// The same of a service that serves Kafka: of each action one object that it is for, and one that it is not.
fn tests_of_kafka(suggestion: &Suggestion<'_>, caller: &str, policy: &ServicePolicy) -> String {
    let Suggestion { id, kind, actions, records } = suggestion;
    let mut text = String::new();
    for action in actions {
        let asked = records.iter().filter(|record| record.action.as_ref() == Some(action));
        let objects = asked.flat_map(|record| &record.objects).map(|object| object.object.as_str());
        let named = objects.into_iter().find(|object| kind.is_about(object)).and_then(ObjectRef::written);
        let Some(object) = named else { continue };
        let Some((key, value)) = kafka_key(&object) else { continue };
        let mut test = |may: &str, value: &str, decision: &str, by: &str| {
            let gap = if text.is_empty() { "" } else { "\n" };
            let name = format!("{caller} {may} {action} {key} {value}");
            let value = if key == "cluster" { "true".to_owned() } else { quoted(value) };
            let _infallible = write!(
                text,
                "{gap}[[test]]\nname = {}\nas = {}\nkafka = {{ action = \"{action}\", {key} = {value} }}\n\
                 decision = \"{decision}\"\npolicy = \"{by}\"\n",
                quoted(name.trim_end()),
                quoted(caller),
            );
        };
        test("may", value, "allow", id);
        let other = match key {
            "cluster" => continue,
            // Any topic, which the brokers' own are none of.
            "topic" if kind.listed.is_empty() => "__consumer_offsets".to_owned(),
            _ if kind.listed.is_empty() => continue,
            _ => format!("{value}-other"),
        };
        if denies_now(policy, &kind.principal, action, key, &other) && !is_asked(records, &other) {
            test("may not", &other, "deny", "none");
        }
    }
    text
}

/// How a test names an object of Kafka's.
fn kafka_key(object: &ObjectRef) -> Option<(&'static str, &str)> {
    Some(match object.base_kind() {
        "Topic" | "InternalTopic" => ("topic", object.id()),
        "Group" => ("group", object.id()),
        "TransactionalId" => ("transactional_id", object.id()),
        "Cluster" => ("cluster", ""),
        _ => return None,
    })
}

/// Whether nothing that there is says anything of that object: what is suggested does not either.
fn denies_now(policy: &ServicePolicy, principal: &str, action: &str, key: &str, id: &str) -> bool {
    let object = match key {
        "topic" => KafkaObject::Topic(id),
        "group" => KafkaObject::Group(id),
        _ => KafkaObject::TransactionalId(id),
    };
    let Ok(caller) = identity::SpiffeId::new(principal) else { return false };
    let question = Question {
        caller,
        user: None,
        method: action.to_owned(),
        target: object.to_string(),
        headers: BTreeMap::new(),
        body: None,
        attributes: BTreeMap::new(),
        objects: BTreeMap::new(),
        now: std::time::Duration::ZERO,
    };
    question.ask(policy).is_ok_and(|record| record.rule == Rule::Absent)
}

/// Whether an object of that id was asked for, and is allowed by what is suggested.
fn is_asked(records: &[&DecisionRecord], id: &str) -> bool {
    let mut objects = records.iter().flat_map(|record| &record.objects);
    objects.any(|object| ObjectRef::written(&object.object).is_some_and(|object| object.id() == id))
}

/// The policies with these files beside them, in force and tested.
fn tried(written: &BTreeMap<String, String>, mesh: &Mesh) -> Result<std::sync::Arc<Policies>, Failure> {
    let unusable =
        |error: &dyn std::error::Error| Failure::new("what is suggested cannot be tried").because(error);
    let copy: TempDir = tempfile::tempdir().map_err(|error| unusable(&error))?;
    copied(&mesh.mesh.policies, copy.path()).map_err(|error| unusable(&error))?;
    for (name, text) in written {
        let path = copy.path().join(name);
        let made = path.parent().map_or(Ok(()), fs::create_dir_all);
        made.and_then(|()| fs::write(path, text)).map_err(|error| unusable(&error))?;
    }
    let shown = |problems: policy::Problems| {
        Failure::problems("what is suggested", problems.0)
            .hint("a request that was recorded under other policies may not fit these; --service narrows it")
    };
    let policies = Policies::load(copy.path(), &mesh.mesh.trust_domain).map_err(shown)?;
    let registered = mesh.registrations();
    let known = |name: &str| registered.iter().find(|known| known.name == name).map(|known| known.id.clone());
    let cases = Case::load(copy.path(), &policies, known).map_err(shown)?;
    let of_ours = cases.iter().filter(|case| case.file.ends_with(&format!("/tests/{FILE}.toml")));
    let failed = of_ours.filter_map(|case| Some(case.problem(case.run(&policies).err()?.as_str())));
    let failed: Vec<_> = failed.collect();
    if failed.is_empty() {
        return Ok(policies);
    }
    Err(Failure { problems: failed, ..Failure::new("what would be suggested does not pass its own tests") })
}

fn copied(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() { copied(&path, &target)? } else { fs::copy(&path, target).map(drop)? }
    }
    Ok(())
}

/// How many of the requests would be allowed, and of how many.
fn replayed(suggestions: &[Suggestion<'_>], policies: &Policies) -> (usize, usize) {
    // One request may be what several suggestions were made from.
    let records = suggestions.iter().flat_map(|suggestion| &suggestion.records);
    let records: BTreeMap<*const DecisionRecord, &DecisionRecord> =
        records.map(|record| (std::ptr::from_ref(*record), *record)).collect();
    let allows = |record: &&&DecisionRecord| {
        let replayed = policies.service(&record.service).and_then(|service| service.replay(record));
        replayed.is_some_and(|replayed| replayed.outcome == Outcome::Permit)
    };
    (records.values().filter(allows).count(), records.len())
}

/// Writes a file that must not be there yet: what somebody wrote is not written over.
fn write_new(path: &Path, text: &str) -> Result<(), Failure> {
    let failed = |error: &std::io::Error| {
        Failure::new(format!("{} cannot be written", path.display()))
            .because(error)
            .hint("move away what was suggested before")
    };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| failed(&error))?;
    }
    let mut file = fs::File::create_new(path).map_err(|error| failed(&error))?;
    std::io::Write::write_all(&mut file, text.as_bytes()).map_err(|error| failed(&error))
}

#[cfg(test)]
#[path = "suggest_tests.rs"]
mod tests;
