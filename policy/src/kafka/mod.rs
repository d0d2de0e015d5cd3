//! Kafka's objects and the decisions about them, for services whose map says `mapping = "kafka"`.
//!
//! Such a service writes no schema ([`crate::shipped`]). What bytes name which object is the sidecar's to know; what a name may be, and who may do what with it, is
//! said here.

use std::fmt;
use std::sync::{Arc, LazyLock};

use cedar_policy::ResourceConstraint;

use crate::decide::{PolicyEntry, ServicePolicy};
use crate::judge::{Asked, bare_object};
use crate::map::{CONNECT_ACTION, Mapping};
use crate::object::{Attributes, ObjectRef};
use crate::record::{Outcome, PolicyEffect, RecordedObject, Rule};
use crate::request::Refusal;
use crate::schema;
use crate::verdict::{Caller, Denial, Occasion, Permit, Principal, Understood, Verdict};

/// The names of types, shared by all objects of theirs.
static TOPIC: LazyLock<Arc<str>> = LazyLock::new(|| "Kafka::Topic".into());
static INTERNAL_TOPIC: LazyLock<Arc<str>> = LazyLock::new(|| "Kafka::InternalTopic".into());
static GROUP: LazyLock<Arc<str>> = LazyLock::new(|| "Kafka::Group".into());
static TRANSACTIONAL_ID: LazyLock<Arc<str>> = LazyLock::new(|| "Kafka::TransactionalId".into());
static CLUSTER: LazyLock<Arc<str>> = LazyLock::new(|| "Kafka::Cluster".into());
/// The one object of its type, by the name that Kafka's ACLs have for it.
const CLUSTER_ID: &str = "kafka-cluster";

/// Longest name of a topic (Kafka: `Topic.MAX_NAME_LENGTH`).
const MAX_TOPIC_BYTES: usize = 249;
/// Longest group and transactional id here; Kafka itself has no limit but that of its strings.
const MAX_ID_BYTES: usize = 1024;
/// Denied objects that one record lists.
const MAX_LISTED: usize = 256;

/// What can be done with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KafkaAction {
    /// To know that it is there.
    Describe,
    /// To read records of a topic.
    Consume,
    /// To write records to a topic.
    Produce,
    /// To make a topic.
    Create,
    /// To take away a topic, records of it, or a group.
    Delete,
    /// To give a topic more partitions.
    Alter,
    /// To read the configuration of a topic or a broker.
    DescribeConfigs,
    /// To change it.
    AlterConfigs,
    /// To be a member of a group.
    Join,
    /// To store what a group has read.
    Commit,
    /// To write in transactions of an id.
    Transact,
    /// To get a producer id without transactions.
    IdempotentWrite,
}

impl KafkaAction {
    /// All there are.
    pub const ALL: [Self; 12] = [
        Self::Describe,
        Self::Consume,
        Self::Produce,
        Self::Create,
        Self::Delete,
        Self::Alter,
        Self::DescribeConfigs,
        Self::AlterConfigs,
        Self::Join,
        Self::Commit,
        Self::Transact,
        Self::IdempotentWrite,
    ];

    /// Its name in the schema.
    pub fn name(self) -> &'static str {
        match self {
            Self::Describe => "Describe",
            Self::Consume => "Consume",
            Self::Produce => "Produce",
            Self::Create => "Create",
            Self::Delete => "Delete",
            Self::Alter => "Alter",
            Self::DescribeConfigs => "DescribeConfigs",
            Self::AlterConfigs => "AlterConfigs",
            Self::Join => "Join",
            Self::Commit => "Commit",
            Self::Transact => "Transact",
            Self::IdempotentWrite => "IdempotentWrite",
        }
    }

    /// The action of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.name() == name)
    }
}

/// An object as a request names it. Its `Display` is the target of records and of questions: `topic:payments`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KafkaObject<'a> {
    /// A topic, of whatever name.
    Topic(&'a str),
    /// A consumer group.
    Group(&'a str),
    /// What a transactional producer calls itself.
    TransactionalId(&'a str),
    /// The brokers together.
    Cluster,
}

impl<'a> KafkaObject<'a> {
    /// As `Display` writes it.
    pub fn written(text: &'a str) -> Option<Self> {
        match text.split_once(':') {
            Some(("topic", name)) => Some(Self::Topic(name)),
            Some(("group", name)) => Some(Self::Group(name)),
            Some(("transactional-id", name)) => Some(Self::TransactionalId(name)),
            None if text == "cluster" => Some(Self::Cluster),
            _ => None,
        }
    }

    /// The object that policies are about.
    ///
    /// # Errors
    /// A name that no topic, group or transactional id can have.
    pub fn object(&self) -> Result<ObjectRef, Refusal> {
        let object = |kind: &Arc<str>, id: &str| ObjectRef::shared(Arc::clone(kind), id.into());
        let id = |kind: &Arc<str>, id: &str, what: &str| {
            if id.is_empty() || id.len() > MAX_ID_BYTES || id.chars().any(char::is_control) {
                let reason =
                    format!("a {what} is 1 to {MAX_ID_BYTES} bytes without control characters, not {id:?}");
                return Err(Refusal::malformed("kafka.id", reason));
            }
            Ok(object(kind, id))
        };
        match *self {
            Self::Topic(name) if !is_topic_name(name) => {
                let reason =
                    format!("{name:?} is no name of a topic: 1 to {MAX_TOPIC_BYTES} of a-z A-Z 0-9 . _ -");
                Err(Refusal::malformed("kafka.topic_name", reason))
            }
            Self::Topic(name) if is_internal_name(name) => Ok(object(&INTERNAL_TOPIC, name)),
            Self::Topic(name) => Ok(object(&TOPIC, name)),
            Self::Group(name) => id(&GROUP, name, "group id"),
            Self::TransactionalId(name) => id(&TRANSACTIONAL_ID, name, "transactional id"),
            Self::Cluster => Ok(object(&CLUSTER, CLUSTER_ID)),
        }
    }
}

impl fmt::Display for KafkaObject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Topic(name) => write!(f, "topic:{name}"),
            Self::Group(name) => write!(f, "group:{name}"),
            Self::TransactionalId(name) => write!(f, "transactional-id:{name}"),
            Self::Cluster => f.write_str("cluster"),
        }
    }
}

/// Kafka's own rule (`Topic.validate`).
fn is_topic_name(name: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !matches!(name, "" | "." | "..") && name.len() <= MAX_TOPIC_BYTES && name.bytes().all(legal)
}

/// Names like `__consumer_offsets`. Metrics write `.` as `_`, so that to them `._consumer.offsets` is the same.
fn is_internal_name(name: &str) -> bool {
    name.bytes().take(2).filter(|byte| matches!(byte, b'_' | b'.')).count() == 2
}

/// What was decided about the objects of one request that one action is asked for.
#[derive(Debug)]
#[must_use]
pub struct KafkaJudged {
    /// For each object, leave to pass on what names it.
    pub permits: Vec<Option<Permit>>,
    /// About the first that is denied; the others stand in its record.
    pub denial: Option<Denial>,
}

impl ServicePolicy {
    /// Decides whether a workload may connect at all: some permit must be about it. What it may do is decided request by
    /// request.
    ///
    /// Only a service whose map says `mapping = "kafka"` takes such connections, in every mode.
    pub fn decide_kafka_connection(&self, caller: &Caller, occasion: &Occasion<'_>) -> Verdict {
        if let Err(refusal) = self.check_kafka() {
            return Verdict::Deny(self.refuse(Some(caller), refusal, occasion));
        }
        let shared = self.shared();
        let nothing = Understood { route: None, action: CONNECT_ACTION, objects: Vec::new() };
        if let Err(reason) = self.check_trust_domain(caller) {
            let rule = Rule::Builtin(crate::decide::TRUST_DOMAIN.into());
            return Verdict::Deny(self.denial(Some(caller), occasion, nothing, rule, reason));
        }
        let Principal::Workload(id) = &caller.principal else {
            let reason = "only workloads speak Kafka".to_owned();
            return Verdict::Deny(self.denial(Some(caller), occasion, nothing, Rule::Absent, reason));
        };
        let principal = schema::uid(&shared.schema.principals.workload, id.as_str());
        for action in shared.schema.actions.values() {
            for kind in &action.objects {
                let Some(of_kind) = shared.schema.types.get(kind) else { continue };
                if !shared.engine.in_reach(shared.engine.subject(caller, action, of_kind, None), false) {
                    continue;
                }
                let permits = |entry: &PolicyEntry| {
                    entry.effect == PolicyEffect::Permit
                        && entry.scope.reaches(shared, &principal, &action.uid, kind)
                };
                if let Some(entry) = shared.entries.iter().position(permits) {
                    return Verdict::Permit(Permit::granted(self, entry, occasion.receipt));
                }
            }
        }
        let reason = "no policy permits this caller anything".to_owned();
        Verdict::Deny(self.denial(Some(caller), occasion, nothing, Rule::Absent, reason))
    }

    /// Decides about one action on one object.
    pub fn decide_kafka(
        &self,
        caller: &Caller,
        action: KafkaAction,
        object: &ObjectRef,
        occasion: &Occasion<'_>,
    ) -> Verdict {
        match self.check_kafka() {
            Ok(()) => self.decide_object(caller, action.name(), object, &Attributes::none(), occasion),
            Err(refusal) => Verdict::Deny(self.refuse(Some(caller), refusal, occasion)),
        }
    }

    /// Decides about one action on each of several objects, which are permitted or denied one by one. Only the first
    /// denial is explained: a request may name thousands.
    pub fn decide_kafka_each(
        &self,
        caller: &Caller,
        action: KafkaAction,
        objects: &[ObjectRef],
        occasion: &Occasion<'_>,
    ) -> KafkaJudged {
        let mut judged = KafkaJudged { permits: Vec::with_capacity(objects.len()), denial: None };
        let attributes = Attributes::none();
        for object in objects {
            if let Some(denial) = &mut judged.denial {
                let objects = std::slice::from_ref(object);
                let asked =
                    Asked { caller, action: action.name(), objects, attributes: &attributes, mapped: None };
                if self.denies_swiftly(&asked, occasion.now) {
                    denial.list(object);
                    judged.permits.push(None);
                    continue;
                }
            }
            let permit = match self.decide_kafka(caller, action, object, occasion) {
                Verdict::Permit(permit) => Ok(permit),
                Verdict::Deny(denial) => denial.audited(),
            };
            judged.permits.push(match (permit, &mut judged.denial) {
                (Ok(permit), _) => Some(permit),
                (Err(_), Some(first)) => {
                    first.list(object);
                    None
                }
                (Err(denial), none) => {
                    *none = Some(denial);
                    None
                }
            });
        }
        judged
    }

    /// Whether one action on one object is denied, for what is left out without a word: nothing is recorded of it.
    pub fn hides_kafka(
        &self,
        caller: &Caller,
        action: KafkaAction,
        object: &ObjectRef,
        occasion: &Occasion<'_>,
    ) -> bool {
        let (objects, attributes) = (std::slice::from_ref(object), Attributes::none());
        let asked = Asked { caller, action: action.name(), objects, attributes: &attributes, mapped: None };
        if self.check_kafka().is_err() {
            return true;
        }
        if self.mode(occasion.now) == crate::Mode::Enforce && self.denies_swiftly(&asked, occasion.now) {
            return true;
        }
        match self.decide_kafka(caller, action, object, occasion) {
            Verdict::Permit(_) => false,
            Verdict::Deny(denial) => denial.audited().is_err(),
        }
    }

    fn check_kafka(&self) -> Result<(), Refusal> {
        self.check_withheld()?;
        if self.mapping() == Mapping::Kafka {
            return Ok(());
        }
        Err(Refusal::denied("kafka.not_allowed_by_map", "the service's map does not say mapping = \"kafka\""))
    }
}

impl Denial {
    /// Notes another object that was denied with the first.
    fn list(&mut self, object: &ObjectRef) {
        if self.0.objects.len() < MAX_LISTED {
            let denied = RecordedObject { outcome: Some(Outcome::Deny), ..bare_object(object) };
            self.0.objects.push(denied);
        }
    }
}

/// Why a permit is none that a Kafka service may have, and what to write instead: one for topics in general must not be
/// one for the brokers' own.
pub(crate) fn flaw(policy: &cedar_policy::Policy) -> Option<(&'static str, &'static str)> {
    if policy.effect() != cedar_policy::Effect::Permit {
        return None;
    }
    match policy.resource_constraint() {
        ResourceConstraint::Any => Some((
            "a permit for any resource would open the brokers' own topics too",
            "resource is Kafka::Topic, or resource == Kafka::Topic::\"NAME\"",
        )),
        ResourceConstraint::Is(kind) if kind.to_string() == **INTERNAL_TOPIC => Some((
            "a permit for the brokers' own topics, and those named like them, names each",
            "resource == Kafka::InternalTopic::\"__consumer_offsets\"",
        )),
        ResourceConstraint::Is(_)
        | ResourceConstraint::Eq(_)
        | ResourceConstraint::In(_)
        | ResourceConstraint::IsIn(..) => None,
    }
}

/// A caller without a user, as every caller of Kafka's is.
pub(crate) fn caller(id: &identity::SpiffeId) -> Caller {
    Caller { principal: Principal::Workload(id.clone()), user: None, chain: Arc::new([]), address: None }
}

#[cfg(test)]
mod tests;
