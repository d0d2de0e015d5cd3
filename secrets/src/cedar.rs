//! Cedar policies as the judge of workloads.

use std::sync::Arc;

use policy::{
    Attributes, Caller, InForce, Layer, ObjectRef, Occasion, Principal, Receipt, Recorder, Verdict,
};

use crate::authorize::{AccessRequest, Authorizer, Denial, Grant};
use crate::random::SharedRandom;

/// The Cedar type of a secret or folder.
const OBJECT_TYPE: &str = "Vault::Secret";

/// Asks the vault's [`ServicePolicy`] and hands every decision to a [`Recorder`].
pub(crate) struct CedarAuthorizer {
    policy: InForce,
    recorder: Arc<dyn Recorder>,
    random: SharedRandom,
}

impl CedarAuthorizer {
    pub(crate) fn new(policy: InForce, recorder: Arc<dyn Recorder>, random: SharedRandom) -> Self {
        Self { policy, recorder, random }
    }
}

impl Authorizer for CedarAuthorizer {
    /// Denials are enforced whatever the policy's mode: audit mode is for finding out what a service's
    /// policy lacks, and a secret that was given out cannot be taken back.
    fn may(&self, request: &AccessRequest<'_>) -> Result<Grant, Denial> {
        let Ok(receipt) = Receipt::generate(self.random.as_ref()) else {
            tracing::error!("denied: the system's random generator failed");
            return Err(Denial { receipt: None });
        };
        let caller = Caller {
            principal: Principal::Workload(request.caller.clone()),
            user: None,
            chain: Arc::from([]),
            address: Some(request.address),
        };
        let occasion = Occasion {
            receipt,
            now: request.now,
            layer: Layer::Vault,
            method: request.method,
            target: request.uri,
            transaction: None,
            trace_id: request.trace_id.and_then(|id| u128::from_str_radix(id, 16).ok()),
        };
        let object = ObjectRef::new(OBJECT_TYPE, &request.target.object_id());
        let action = request.action.name();
        let attributes = Attributes::none();
        match self.policy.current().decide_object(&caller, action, &object, &attributes, &occasion) {
            Verdict::Permit(permit) => {
                let record = permit.record_object(&caller, action, &object, &attributes, &occasion);
                self.recorder.record(record);
                Ok(Grant { rule: permit.rule().to_string(), receipt: permit.receipt().to_string() })
            }
            Verdict::Deny(denial) => {
                self.recorder.record(denial.record().clone());
                Err(Denial { receipt: Some(denial.receipt().to_string()) })
            }
        }
    }
}
