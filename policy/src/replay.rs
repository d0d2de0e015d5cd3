//! A recorded decision, made again by other policies: what a change would have meant for what really happened.

use std::sync::Arc;
use std::time::Duration;

use identity::SpiffeId;
use identity::txn::User;

use crate::decide::ServicePolicy;
use crate::judge::Asked;
use crate::object::{Attributes, ObjectRef};
use crate::record::{DecisionRecord, Outcome, Rule};
use crate::verdict::{Caller, Occasion, Principal, Verdict};

/// What these policies make of a recorded request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// Allowed or not.
    pub outcome: Outcome,
    /// By what.
    pub rule: Rule,
}

impl ServicePolicy {
    /// Decides about the request of a record by what the record says of it: principal, user, action, objects and
    /// their attributes. `None` for one that no policy decides, here or when it was recorded (a refusal; attributes that
    /// nobody asked for, since no policy could have allowed it then), or that cannot be read back. What a record does
    /// not keep (`auth_time`, `tenant`, `mfa`) is not there.
    pub fn replay(&self, record: &DecisionRecord) -> Option<Replayed> {
        if matches!(record.rule, Rule::Builtin(_)) || record.objects.is_empty() {
            return None;
        }
        let action = record.action.as_deref()?;
        let written = record.principal.as_deref()?;
        let principal = match written.strip_prefix("client ") {
            Some(client) => Principal::Client(client.to_owned()),
            None => Principal::Workload(SpiffeId::new(written).ok()?),
        };
        let user = record.user.as_ref().map(|user| {
            Arc::new(User {
                id: user.id.clone(),
                issuer: user.issuer.clone(),
                client: user.client.clone(),
                scopes: user.scopes.clone(),
                groups: user.groups.clone(),
                auth_time: 0,
                tenant: None,
                mfa: false,
            })
        });
        let chain: Option<Vec<SpiffeId>> = record.chain.iter().map(|id| SpiffeId::new(id).ok()).collect();
        let caller = Caller { principal, user, chain: chain?.into(), address: None };
        let mut attributes = Attributes::none();
        let mut objects = Vec::with_capacity(record.objects.len());
        // What was left out of a batch was denied, and the rest was permitted without it.
        for recorded in record.objects.iter().filter(|recorded| recorded.left_out_by.is_none()) {
            let object = ObjectRef::written(&recorded.object)?;
            for (name, value) in &recorded.attributes {
                attributes.insert(object.clone(), name, value.clone());
            }
            objects.push(object);
        }
        let occasion = Occasion {
            receipt: record.receipt,
            now: Duration::from_millis(record.time),
            layer: record.layer,
            method: &record.method,
            target: &record.target,
            transaction: None,
            trace_id: None,
        };
        let asked =
            Asked { caller: &caller, action, objects: &objects, attributes: &attributes, mapped: None };
        let replayed = match self.judge(&asked, &occasion) {
            Verdict::Permit(permit) => Replayed { outcome: Outcome::Permit, rule: permit.rule().clone() },
            Verdict::Deny(denial) => Replayed { outcome: Outcome::Deny, rule: denial.rule().clone() },
        };
        (!matches!(replayed.rule, Rule::Builtin(_))).then_some(replayed)
    }
}
