//! Tests of policies, kept beside them: `services/NAME/tests/*.toml`. Each asks what a sidecar would be asked, and says
//! what must be decided and by which policy; who is trusted to allow the right thing for a wrong reason is not tested.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use identity::SpiffeId;
use identity::hex;
use identity::txn::User;
use serde::Deserialize;
use serde_json::Value as Json;
use toml::Spanned;

use crate::decide::ServicePolicy;
use crate::kafka::{KafkaAction, KafkaObject};
use crate::load::{Policies, SERVICES, TESTS};
use crate::object::ObjectRef;
use crate::problem::{Problem, Problems};
use crate::question::{AskedBody, Question};
use crate::record::{DecisionRecord, Mode, Outcome};

/// Largest file of tests.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// The moment at which tests take place, if they name none: 2026-01-01T00:00:00Z.
const NOW_SECONDS: u64 = 1_767_225_600;

/// A file of tests.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CasesFile {
    #[serde(default)]
    test: Vec<Spanned<Section>>,
}

/// One `[[test]]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    name: String,
    /// A service of the mesh, or a SPIFFE ID.
    #[serde(rename = "as")]
    caller: Spanned<String>,
    user: Option<UserSection>,
    /// `METHOD /target`; of a service that serves Kafka, `kafka` instead.
    request: Option<Spanned<String>>,
    kafka: Option<Spanned<KafkaSection>>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    body: Option<String>,
    /// A body of bytes, such as a gRPC message, in hexadecimal digits.
    body_hex: Option<Spanned<String>>,
    /// A gRPC message by its fields, as the JSON form of protobuf has them.
    message: Option<BTreeMap<String, Json>>,
    /// What the app tells of every object of the request.
    #[serde(default)]
    attributes: BTreeMap<String, Json>,
    /// … and of single ones, by id.
    #[serde(default)]
    objects: BTreeMap<String, BTreeMap<String, Json>>,
    /// The ids of objects that are left out of a batch.
    #[serde(default)]
    left_out: Vec<String>,
    /// Seconds since the Unix epoch.
    now: Option<u64>,
    decision: Decision,
    /// The policy, or the built-in rule; `none` where no policy allows it.
    policy: Spanned<String>,
}

/// One action on one object of Kafka's.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct KafkaSection {
    action: String,
    topic: Option<String>,
    group: Option<String>,
    transactional_id: Option<String>,
    #[serde(default)]
    cluster: bool,
}

impl KafkaSection {
    fn object(&self) -> Option<KafkaObject<'_>> {
        let cluster = self.cluster.then_some(KafkaObject::Cluster);
        let named = [
            self.topic.as_deref().map(KafkaObject::Topic),
            self.group.as_deref().map(KafkaObject::Group),
            self.transactional_id.as_deref().map(KafkaObject::TransactionalId),
            cluster,
        ];
        match named.into_iter().flatten().collect::<Vec<_>>()[..] {
            [one] => Some(one),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum UserSection {
    Id(String),
    Whole(UserTable),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct UserTable {
    id: String,
    #[serde(default = "any_issuer")]
    issuer: String,
    #[serde(default = "any_client")]
    client: String,
    #[serde(default)]
    scopes: Vec<String>,
    #[serde(default)]
    groups: Vec<String>,
    #[serde(default)]
    auth_time: u64,
    tenant: Option<String>,
    #[serde(default)]
    mfa: bool,
}

fn any_issuer() -> String {
    "https://id.example".to_owned()
}

fn any_client() -> String {
    "test".to_owned()
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// It is let through.
    Allow,
    /// It is understood, and not allowed: 403.
    Deny,
    /// It is not understood: 400.
    Refuse,
}

/// One test.
#[derive(Debug, Clone)]
pub struct Case {
    /// The service that is asked.
    pub service: String,
    /// What it is about.
    pub name: String,
    /// Where it stands, below the policies directory.
    pub file: String,
    /// Its first line, from 1.
    pub line: usize,
    path: PathBuf,
    text: Arc<str>,
    span: Range<usize>,
    caller: SpiffeId,
    section: Section,
}

impl Case {
    /// All tests of a policies directory, by service and file. `workload` knows the callers that are named and not
    /// written as a SPIFFE ID.
    ///
    /// # Errors
    /// All files that are not tests, with what is wrong in them.
    pub fn load(
        dir: &Path,
        policies: &Policies,
        workload: impl Fn(&str) -> Option<SpiffeId>,
    ) -> Result<Vec<Self>, Problems> {
        let (mut cases, mut problems) = (Vec::new(), Problems::default());
        for service in policies.services() {
            let folder = dir.join(SERVICES).join(service.name()).join(TESTS);
            for path in files(&folder, &mut problems) {
                read(&path, dir, service.name(), &workload, &mut cases, &mut problems);
            }
        }
        if problems.0.is_empty() { Ok(cases) } else { Err(problems) }
    }

    /// Asks. The error says what was decided instead, and why.
    pub fn run(&self, policies: &Policies) -> Result<(), String> {
        let Some(policy) = policies.service(&self.service) else {
            return Err(format!("there is no policy of {}", self.service));
        };
        let record = self.question(&policy)?.ask(&policy.with_mode(Mode::Enforce))?;
        let decision = match (record.verdict, record.status) {
            (Outcome::Permit, _) => Decision::Allow,
            (Outcome::Deny, Some(400)) => Decision::Refuse,
            (Outcome::Deny, _) => Decision::Deny,
        };
        let rule = record.rule.name();
        let (wanted, by) = (self.section.decision, self.section.policy.get_ref());
        if decision == wanted && rule == *by {
            return self.left_out(&record);
        }
        let why = (decision != Decision::Allow).then_some(&record.reason);
        let shown = |decision: Decision| match decision {
            Decision::Allow => "allowed",
            Decision::Deny => "denied",
            Decision::Refuse => "refused",
        };
        Err(format!(
            "expected {} by `{by}`, {} by `{rule}`{}",
            shown(wanted),
            shown(decision),
            why.map_or(String::new(), |why| format!(": {why}"))
        ))
    }

    /// A problem at this test, for whoever shows it.
    pub fn problem(&self, message: &str) -> Problem {
        let head = self.span.start..(self.span.start + "[[test]]".len()).min(self.text.len());
        Problem::at(&self.path, &self.text, head, format!("{}: {message}", self.name))
    }

    /// Whether a batch goes on without what it should, and with all else.
    fn left_out(&self, record: &DecisionRecord) -> Result<(), String> {
        let left_out = record.objects.iter().filter(|object| object.left_out_by.is_some());
        let left_out: Vec<_> = left_out.filter_map(|object| ObjectRef::written(&object.object)).collect();
        let ids: BTreeSet<&str> = left_out.iter().map(ObjectRef::id).collect();
        let wanted: BTreeSet<&str> = self.section.left_out.iter().map(String::as_str).collect();
        if ids == wanted {
            return Ok(());
        }
        Err(format!("expected {wanted:?} to be left out, left out are {ids:?}"))
    }

    /// Method and target, or the action and the object of Kafka's.
    fn asked(&self) -> (String, String) {
        let section = &self.section;
        if let Some(kafka) = section.kafka.as_ref().map(Spanned::get_ref) {
            let object = kafka.object().map(|object| object.to_string());
            return (kafka.action.clone(), object.unwrap_or_default());
        }
        let request = section.request.as_ref().map(|request| request.get_ref().as_str());
        let (method, target) = request.and_then(|request| request.split_once(' ')).unwrap_or_default();
        (method.to_owned(), target.to_owned())
    }

    /// What the test asks.
    fn question(&self, policy: &ServicePolicy) -> Result<Question, String> {
        let section = &self.section;
        let (method, target) = self.asked();
        let user = section.user.clone().map(|user| {
            let table = match user {
                UserSection::Whole(table) => table,
                UserSection::Id(id) => {
                    let (issuer, client) = (any_issuer(), any_client());
                    UserTable {
                        id,
                        issuer,
                        client,
                        scopes: Vec::new(),
                        groups: Vec::new(),
                        auth_time: 0,
                        tenant: None,
                        mfa: false,
                    }
                }
            };
            let UserTable { id, issuer, client, scopes, groups, auth_time, tenant, mfa } = table;
            User { id, issuer, client, scopes, groups, auth_time, tenant, mfa }
        });
        let body = match (&section.body, &section.body_hex, &section.message) {
            (Some(text), None, None) => Some(AskedBody::Text(text.clone())),
            (None, Some(digits), None) => match hex::decode(digits.get_ref()) {
                Some(bytes) => Some(AskedBody::Message(bytes.to_vec())),
                None => return Err("`body_hex` is not hexadecimal digits, two a byte".to_owned()),
            },
            (None, None, Some(fields)) => {
                let fields = Json::Object(fields.clone().into_iter().collect());
                Some(AskedBody::Message(policy.message(&target, fields)?))
            }
            (None, None, None) => None,
            _ => return Err("`body`, `body_hex` and `message` are one body each".to_owned()),
        };
        Ok(Question {
            caller: self.caller.clone(),
            user,
            method,
            target,
            headers: section.headers.clone(),
            body,
            attributes: section.attributes.clone(),
            objects: section.objects.clone(),
            now: Duration::from_secs(section.now.unwrap_or(NOW_SECONDS)),
        })
    }
}

/// What is wrong with what a test asks, and where: it is one request, or one action on one object.
fn unasked(section: &Section, whole: &Range<usize>) -> Option<(Range<usize>, &'static str, &'static str)> {
    const REQUEST: &str = "request = \"GET /accounts/17\"";
    const KAFKA: &str =
        "kafka = { action = \"Produce\", topic = \"payments\" }: or group, transactional_id, cluster = true";
    match (&section.request, &section.kafka) {
        (Some(request), None) => {
            let is_one = request.get_ref().split_once(' ').is_some_and(|(_, target)| target.starts_with('/'));
            (!is_one).then(|| (request.span(), "a request is a method and a path", REQUEST))
        }
        (None, Some(kafka)) => {
            let asked = kafka.get_ref();
            let is_one = KafkaAction::named(&asked.action).is_some() && asked.object().is_some();
            (!is_one).then(|| (kafka.span(), "this is no action of Kafka's on one object", KAFKA))
        }
        (None, None) => Some((whole.clone(), "a test has a `request`, or `kafka`", REQUEST)),
        (Some(_), Some(kafka)) => Some((kafka.span(), "a test has a `request`, or `kafka`, not both", KAFKA)),
    }
}

/// The tests of one folder, by name; none if there is no folder.
fn files(folder: &Path, problems: &mut Problems) -> Vec<PathBuf> {
    let Ok(listing) = fs::read_dir(folder) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in listing.filter_map(Result::ok) {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            // Such as tests/bad: the same, sorted by what they are for.
            found.extend(files(&path, problems));
        } else if name.ends_with(".toml") {
            found.push(path);
        } else if !(name.starts_with('.') || name.to_ascii_lowercase().ends_with(".md")) {
            problems.push(Problem::file(&path, "is no file of tests").hint("tests are *.toml"));
        }
    }
    found.sort();
    found
}

fn read(
    path: &Path,
    dir: &Path,
    service: &str,
    workload: impl Fn(&str) -> Option<SpiffeId>,
    cases: &mut Vec<Case>,
    problems: &mut Problems,
) {
    let text = match fs::metadata(path) {
        Ok(data) if data.len() > MAX_FILE_BYTES => Err(format!("larger than {MAX_FILE_BYTES} bytes")),
        _ => fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}")),
    };
    let text = match text {
        Ok(text) => text,
        Err(message) => return problems.push(Problem::file(path, message)),
    };
    let file: CasesFile = match toml::from_str(&text) {
        Ok(file) => file,
        Err(error) => return problems.push(Problem::toml(path, &text, &error)),
    };
    if file.test.is_empty() {
        return problems.push(Problem::file(path, "holds no [[test]]"));
    }
    let whole: Arc<str> = text.as_str().into();
    for section in file.test {
        let span = section.span();
        let line = text.get(..span.start).unwrap_or_default().matches('\n').count() + 1;
        let section = section.into_inner();
        let named = section.caller.get_ref();
        let caller = match SpiffeId::new(named) {
            Ok(id) => Some(id),
            Err(_) => workload(named),
        };
        if let Some((at, message, hint)) = unasked(&section, &span) {
            problems.push(Problem::at(path, &text, at, message).hint(hint));
        }
        let Some(caller) = caller else {
            let message = format!("`{named}` is no service of the mesh and no SPIFFE ID");
            problems.push(Problem::at(path, &text, section.caller.span(), message));
            continue;
        };
        let shown = path.strip_prefix(dir).unwrap_or(path);
        cases.push(Case {
            service: service.to_owned(),
            name: section.name.clone(),
            file: shown.display().to_string(),
            line,
            path: path.to_owned(),
            text: Arc::clone(&whole),
            span,
            caller,
            section,
        });
    }
}

#[cfg(test)]
mod tests {
    use identity::TrustDomain;

    use super::*;
    use crate::load::tests::load;

    const TESTS: &str = r#"
[[test]]
name = "x reads its own"
as = "web"
request = "GET /orders/17"
attributes = { owner = "x", tags = [] }
decision = "allow"
policy = "read"

[[test]]
name = "y's is not x's"
as = "spiffe://bank.example/service/web"
user = "alice"
request = "GET /orders/17"
objects = { "17" = { owner = "y", tags = ["a"] } }
decision = "deny"
policy = "none"

[[test]]
name = "one spelling"
as = "web"
request = "GET /orders/017"
decision = "deny"
policy = "route.unmapped"

[[test]]
name = "dots"
as = "web"
request = "GET /orders/../17"
decision = "refuse"
policy = "request.path"
"#;

    fn cases(text: &str) -> Result<(Vec<Case>, Arc<Policies>), String> {
        let (policies, dir) = load(&[("services/shop/tests/reads.toml", Some(text))]);
        let policies = policies.unwrap_or_else(|problems| panic!("{problems}"));
        let domain = TrustDomain::new("bank.example").unwrap();
        let workload = |name: &str| (name == "web").then(|| domain.workload("/service/web").unwrap());
        let cases = Case::load(dir.path(), &policies, workload);
        cases.map(|cases| (cases, policies)).map_err(|problems| problems.to_string())
    }

    fn outcome(text: &str) -> String {
        let (cases, policies) = cases(text).unwrap();
        cases[0].run(&policies).unwrap_err()
    }

    #[test]
    fn tests_say_what_is_decided_and_by_what() {
        let (cases, policies) = cases(TESTS).unwrap();
        assert_eq!(cases.len(), 4);
        for case in &cases {
            assert_eq!(case.run(&policies), Ok(()), "{}", case.name);
        }
        assert_eq!((cases[1].file.as_str(), cases[1].line), ("services/shop/tests/reads.toml", 10));
    }

    #[test]
    fn what_is_decided_otherwise_fails_with_the_reason() {
        let told = outcome(&TESTS.replace("decision = \"allow\"", "decision = \"deny\""));
        assert_eq!(told, "expected denied by `read`, allowed by `read`");
        let told = outcome(&TESTS.replacen("policy = \"read\"", "policy = \"write\"", 1));
        assert_eq!(told, "expected allowed by `write`, allowed by `read`");
        let told = outcome(&TESTS.replacen("owner = \"x\"", "owner = \"z\"", 1));
        assert!(told.starts_with("expected allowed by `read`, denied by `none`: "), "{told}");
        let told = outcome(&TESTS.replacen("owner = \"x\"", "owner = 3", 1));
        assert_eq!(told, "the attribute `owner` is a String");
        let told = outcome(&TESTS.replacen("owner = \"x\"", "colour = \"x\"", 1));
        assert_eq!(told, "nothing tells the attribute `colour`");
        let told = outcome(&TESTS.replacen("attributes =", "objects = { \"18\" = {} }\nattributes =", 1));
        assert_eq!(told, "`objects` tells of \"18\", and the request is about Shop::Order::\"17\"");
    }

    #[test]
    fn policy_33_a_test_of_a_filtered_batch_names_what_is_left_out() {
        let map = "[[route]]\nmatch = \"POST /orders/get\"\naction = \"Read\"\nobject = 'Order::\"{body:/ids}\"'\n\
                   body = { ids = \"[id]\" }\nattributes = { owner = \"entities\", tags = \"entities\" }\nbatch = \"filter\"\n";
        let run = |left_out: &str| {
            let text = format!(
                "[[test]]\nname = \"t\"\nas = \"web\"\nrequest = \"POST /orders/get\"\n\
                 body = '{{\"ids\":[\"17\",\"42\",\"99\"]}}'\n{left_out}\ndecision = \"allow\"\npolicy = \"read\"\n\
                 objects = {{ \"17\" = {{ owner = \"x\", tags = [] }}, \"42\" = {{ owner = \"y\", tags = [] }} }}\n"
            );
            let (policies, dir) = load(&[
                ("services/shop/map.toml", Some(map)),
                ("services/shop/tests/reads.toml", Some(&text)),
            ]);
            let policies = policies.unwrap_or_else(|problems| panic!("{problems}"));
            let web = SpiffeId::new("spiffe://bank.example/service/web").ok();
            Case::load(dir.path(), &policies, |_| web.clone()).unwrap()[0].run(&policies)
        };
        assert_eq!(run("left_out = [\"99\", \"42\"]"), Ok(()));
        let told = "expected {} to be left out, left out are {\"42\", \"99\"}";
        assert_eq!(run(""), Err(told.to_owned()));
    }

    #[test]
    fn files_that_are_no_tests_say_where() {
        for (text, why) in [
            ("", "holds no [[test]]"),
            (&TESTS.replacen("decision", "decison", 1)[..], "reads.toml:7:1: unknown field `decison`"),
            (
                &TESTS.replacen("as = \"web\"", "as = \"wed\"", 1),
                "reads.toml:4:6: `wed` is no service of the mesh",
            ),
            (&TESTS.replacen("GET /orders/17", "/orders/17", 1), "a request is a method and a path"),
        ] {
            let told = cases(text).unwrap_err();
            assert!(told.contains(why), "{told}");
        }
    }

    #[test]
    fn a_grpc_message_is_written_by_its_fields() {
        let proto = "syntax = \"proto3\";\npackage shop;\nservice Orders { rpc Read(ReadRequest) returns (ReadRequest); }\n\
                     message ReadRequest { Order order = 1; bool full = 2; }\nmessage Order { string id = 1; }\n";
        let map = "[[route]]\nmatch = \"POST /shop.Orders/Read\"\naction = \"Read\"\nobject = 'Order::\"{body:/order.id}\"'\n\
                   body_type = \"grpc\"\nbody = { \"order.id\" = \"id\" }\nattributes = { owner = \"entities\", tags = \"entities\" }\n";
        let test = |body: &str, decision: &str, policy: &str| {
            let text = format!(
                "[[test]]\nname = \"t\"\nas = \"web\"\nrequest = \"POST /shop.Orders/Read\"\n{body}\n\
                 objects = {{ \"17\" = {{ owner = \"x\", tags = [] }} }}\ndecision = \"{decision}\"\npolicy = \"{policy}\"\n"
            );
            let (policies, dir) = load(&[
                ("services/shop/shop.proto", Some(proto)),
                ("services/shop/map.toml", Some(map)),
                ("services/shop/tests/reads.toml", Some(&text)),
            ]);
            let policies = policies.unwrap_or_else(|problems| panic!("{problems}"));
            let web = SpiffeId::new("spiffe://bank.example/service/web").ok();
            let cases = Case::load(dir.path(), &policies, |_| web.clone()).unwrap();
            cases[0].run(&policies)
        };
        assert_eq!(test("message = { order = { id = \"17\" }, full = true }", "allow", "read"), Ok(()));
        assert_eq!(test("message = { order = { id = \"..\" } }", "refuse", "request.body"), Ok(()));
        let unknown = test("message = { ordre = { id = \"17\" } }", "allow", "read").unwrap_err();
        assert!(unknown.contains("is no shop.ReadRequest") && unknown.contains("ordre"), "{unknown}");
        let two = test("message = { }\nbody = \"{}\"", "allow", "read").unwrap_err();
        assert!(two.contains("one body each"), "{two}");
    }

    #[test]
    fn the_user_has_a_tenant_and_a_second_factor_where_the_mesh_declares_them() {
        let mesh = include_str!("../../examples/bank/policies/mesh.cedarschema");
        let declared = mesh.replace("auth_time: Long,", "auth_time: Long, tenant?: String, mfa?: Bool,");
        let policy = "@id(\"read\")\npermit (principal is Mesh::Workload, action in Shop::Action::\"Group\", resource)\n\
                      when { context has user && context.user has tenant && context.user.tenant == \"bank\" &&\n\
                      context.user has mfa && context.user.mfa };\n";
        let outcome = |mesh: &str, user: &str| {
            let text = format!(
                "[[test]]\nname = \"t\"\nas = \"web\"\nuser = {user}\nrequest = \"GET /orders/17\"\n\
                 attributes = {{ owner = \"x\", tags = [] }}\ndecision = \"allow\"\npolicy = \"read\"\n"
            );
            let files = [
                ("mesh.cedarschema", Some(mesh)),
                ("services/shop/shop.cedar", Some(policy)),
                ("services/shop/tests/reads.toml", Some(&text[..])),
            ];
            let (policies, dir) = load(&files);
            let policies = policies.map_err(|problems| problems.to_string())?;
            let web = SpiffeId::new("spiffe://bank.example/service/web").ok();
            Case::load(dir.path(), &policies, |_| web.clone()).unwrap()[0].run(&policies)
        };
        assert_eq!(outcome(&declared, "{ id = \"alice\", tenant = \"bank\", mfa = true }"), Ok(()));
        for user in [
            "{ id = \"alice\", tenant = \"bank\" }",
            "{ id = \"alice\", tenant = \"shop\", mfa = true }",
            "{ id = \"alice\", mfa = true }",
            "\"alice\"",
        ] {
            assert!(outcome(&declared, user).unwrap_err().contains("denied by `none`"), "{user}");
        }
        // Where the mesh does not declare them, no policy can ask for them; a mesh that demands them of everybody is refused.
        assert!(outcome(mesh, "\"alice\"").unwrap_err().contains("services/shop/shop.cedar:"));
        let demanded = mesh.replace("auth_time: Long,", "auth_time: Long, tenant: String,");
        assert!(outcome(&demanded, "\"alice\"").unwrap_err().contains("is not what requests carry"));
    }
}
