//! Decisions about what a request names, and the records of them.

use std::sync::Arc;

use arc_swap::ArcSwap;
use identity::clock::SharedClock;
use kafka_protocol::ResponseError;
use policy::{
    Attributes, Caller, Denial, KafkaAction, KafkaObject, Layer, ObjectRef, Occasion, Permit, Receipt,
    Recorder, Refusal, ServicePolicy,
};

use super::stats::KafkaStats;
use crate::sample::Sampler;
use crate::trace::SharedRandom;

/// Objects that one request may name: each is decided about.
const MAX_OBJECTS: usize = 10_000;

/// Who decides about the requests of one connection.
pub(super) struct Guard {
    pub(super) caller: Caller,
    pub(super) policy: Arc<ArcSwap<ServicePolicy>>,
    pub(super) recorder: Arc<dyn Recorder>,
    pub(super) sampler: Arc<Sampler>,
    pub(super) stats: KafkaStats,
    pub(super) clock: SharedClock,
    pub(super) random: SharedRandom,
    pub(super) access_log: bool,
}

/// Why an object is not to be touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// No policy allows it.
    Denied,
    /// Nothing can have this name.
    Unnameable,
}

impl Refused {
    /// What brokers answer for a topic.
    pub(super) fn of_topic(self) -> i16 {
        match self {
            Self::Denied => ResponseError::TopicAuthorizationFailed.code(),
            Self::Unnameable => ResponseError::InvalidTopicException.code(),
        }
    }

    /// … and for a group.
    pub(super) fn of_group(self) -> i16 {
        match self {
            Self::Denied => ResponseError::GroupAuthorizationFailed.code(),
            Self::Unnameable => ResponseError::InvalidGroupId.code(),
        }
    }
}

/// Leave to pass on what names an object.
pub(super) type Leave = Result<Permit, Refused>;

/// Why nothing is answered to a request.
#[derive(Debug, thiserror::Error)]
pub enum Unjudged {
    /// Nothing could be recorded so that it is found again.
    #[error("no randomness for a receipt")]
    NoRandomness,
    /// It would take too long to judge.
    #[error("a request names more than {MAX_OBJECTS} objects")]
    TooMany,
}

/// One request, judged by the policy that was in force when it came.
pub(super) struct Judging<'a> {
    pub(super) guard: &'a Guard,
    pub(super) policy: Arc<ServicePolicy>,
    /// The request's name.
    pub(super) api: &'static str,
}

impl Guard {
    /// A request that is to be judged by the policy in force.
    pub(super) fn judging(&self, api: &'static str) -> Judging<'_> {
        Judging { guard: self, policy: self.policy.load_full(), api }
    }
}

impl Judging<'_> {
    fn occasion<'t>(&self, target: &'t str) -> Result<Occasion<'t>, Unjudged>
    where
        Self: 't,
    {
        Ok(Occasion {
            receipt: Receipt::generate(&*self.guard.random).map_err(|_| Unjudged::NoRandomness)?,
            now: self.guard.clock.now(),
            layer: Layer::Sidecar,
            method: self.api,
            target,
            transaction: None,
            trace_id: None,
        })
    }

    /// Decides about one action on each of these.
    pub(super) fn each(
        &self,
        action: KafkaAction,
        named: &[KafkaObject<'_>],
    ) -> Result<Vec<Leave>, Unjudged> {
        self.each_known(action, named).map(|(leaves, _)| leaves)
    }

    /// … and says what the permitted ones are, so that they can be judged again.
    pub(super) fn each_known(
        &self,
        action: KafkaAction,
        named: &[KafkaObject<'_>],
    ) -> Result<(Vec<Leave>, Vec<ObjectRef>), Unjudged> {
        if named.len() > MAX_OBJECTS {
            return Err(Unjudged::TooMany);
        }
        let target = named.first().map(ToString::to_string).unwrap_or_default();
        let occasion = self.occasion(&target)?;
        let mut flaw: Option<Refusal> = None;
        let objects: Vec<Option<ObjectRef>> = named
            .iter()
            .map(|named| match named.object() {
                Ok(object) => Some(object),
                Err(refusal) => {
                    flaw.get_or_insert(refusal);
                    None
                }
            })
            .collect();
        if let Some(refusal) = flaw {
            let occasion = self.occasion(&target)?;
            self.denied(&self.policy.refuse(Some(&self.guard.caller), refusal, &occasion));
        }
        let known: Vec<ObjectRef> = objects.iter().flatten().cloned().collect();
        let judged = self.policy.decide_kafka_each(&self.guard.caller, action, &known, &occasion);
        let mut permitted = Vec::with_capacity(known.len());
        for (permit, object) in judged.permits.iter().zip(known) {
            if let Some(permit) = permit {
                self.permitted(permit, action, &object, &occasion);
                permitted.push(object);
            }
        }
        if let Some(denial) = &judged.denial {
            self.denied(denial);
        }
        let mut permits = judged.permits.into_iter();
        let leaves = objects.into_iter().map(|object| match object {
            Some(_) => permits.next().flatten().ok_or(Refused::Denied),
            None => Err(Refused::Unnameable),
        });
        Ok((leaves.collect(), permitted))
    }

    /// Decides about one action on one object.
    pub(super) fn one(&self, action: KafkaAction, named: KafkaObject<'_>) -> Result<Leave, Unjudged> {
        Ok(self.each(action, &[named])?.pop().unwrap_or(Err(Refused::Denied)))
    }

    /// Whether what a list has may be seen. Nothing is recorded: nobody has asked for it by its name.
    pub(super) fn shows(&self, named: KafkaObject<'_>) -> Result<bool, Unjudged> {
        self.allows(KafkaAction::Describe, named)
    }

    /// Whether an action would be permitted, without a record.
    pub(super) fn allows(&self, action: KafkaAction, named: KafkaObject<'_>) -> Result<bool, Unjudged> {
        let Ok(object) = named.object() else { return Ok(false) };
        let occasion = self.occasion("")?;
        Ok(!self.policy.hides_kafka(&self.guard.caller, action, &object, &occasion))
    }

    /// What may be done with an object, as clients of Kafka ask for it: a bit for each ACL operation (KIP-430).
    pub(super) fn operations(&self, named: KafkaObject<'_>) -> Result<i32, Unjudged> {
        use KafkaAction as A;
        let known: &[(A, u8)] = match named {
            KafkaObject::Topic(_) => &[
                (A::Consume, 3),
                (A::Produce, 4),
                (A::Create, 5),
                (A::Delete, 6),
                (A::Alter, 7),
                (A::Describe, 8),
                (A::DescribeConfigs, 10),
                (A::AlterConfigs, 11),
            ],
            KafkaObject::Group(_) => &[(A::Join, 3), (A::Delete, 6), (A::Describe, 8)],
            KafkaObject::Cluster => {
                &[(A::Describe, 8), (A::DescribeConfigs, 10), (A::AlterConfigs, 11), (A::IdempotentWrite, 12)]
            }
            KafkaObject::TransactionalId(_) => &[(A::Transact, 4), (A::Describe, 8)],
        };
        let mut operations = 0;
        for (action, bit) in known {
            if self.allows(*action, named)? {
                operations |= 1 << bit;
            }
        }
        Ok(operations)
    }

    /// Judges again what another policy permitted.
    pub(super) fn still(&self, action: KafkaAction, objects: &[ObjectRef]) -> Result<bool, Unjudged> {
        let target = objects.first().map(ToString::to_string).unwrap_or_default();
        let occasion = self.occasion(&target)?;
        let judged = self.policy.decide_kafka_each(&self.guard.caller, action, objects, &occasion);
        if let Some(denial) = &judged.denial {
            self.denied(denial);
        }
        Ok(judged.denial.is_none())
    }

    /// Refuses what is not understood.
    pub(super) fn refuse(&self, rule: &'static str, reason: String, target: &str) -> Result<(), Unjudged> {
        let occasion = self.occasion(target)?;
        let refusal = Refusal::malformed(rule, reason);
        self.denied(&self.policy.refuse(Some(&self.guard.caller), refusal, &occasion));
        Ok(())
    }

    fn permitted(&self, permit: &Permit, action: KafkaAction, object: &ObjectRef, occasion: &Occasion<'_>) {
        let guard = self.guard;
        if permit.is_audited() || guard.sampler.take(guard.clock.now()) {
            let record =
                permit.record_object(&guard.caller, action.name(), object, &Attributes::none(), occasion);
            guard.recorder.record(record);
        }
    }

    fn denied(&self, denial: &Denial) {
        let guard = self.guard;
        guard.stats.denied(denial.rule().name());
        let record = denial.record();
        if guard.access_log {
            let object = record.objects.first().map(|object| object.object.as_str());
            tracing::info!(
                target: "access", direction = "inbound", kind = "kafka", peer = %guard.caller.principal,
                api = self.api, action = record.action, object, objects = record.objects.len(), verdict = "deny",
                rule = %denial.rule(), receipt = %denial.receipt(),
            );
        }
        guard.recorder.record(record.clone());
    }
}
