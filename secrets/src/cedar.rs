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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use identity::{SpiffeId, TrustDomain};
    use policy::{MemoryRecorder, Policies};

    use super::*;
    use crate::authorize::{Action, Target};
    use crate::path::SecretPath;

    /// What the vault asks is what `mapping = "vault"` brings: an action that the schema does not have would deny.
    #[test]
    fn every_action_of_the_vault_is_one_that_policies_can_be_about() {
        let text = |text: &str| text.as_bytes().to_vec();
        let permit =
            "@id(\"all\")\npermit (principal is Mesh::Workload, action, resource is Vault::Secret);\n";
        let files = BTreeMap::from([
            ("mesh.cedarschema".to_owned(), text(include_str!("../tests/policies/mesh.cedarschema"))),
            ("services/vault/map.toml".to_owned(), text("mapping = \"vault\"")),
            ("services/vault/vault.cedar".to_owned(), text(permit)),
        ]);
        let trust_domain = TrustDomain::new("bank.example").unwrap();
        let policies = Policies::from_files(&files, Path::new("policies"), None, &trust_domain).unwrap();
        let recorder = Arc::new(MemoryRecorder::default());
        let random = Arc::new(ring::rand::SystemRandom::new());
        let judge = CedarAuthorizer::new(policies.service("vault").unwrap().into(), recorder, random);
        let caller = SpiffeId::new("spiffe://bank.example/service/accounts").unwrap();
        for action in [Action::Read, Action::Write, Action::Delete, Action::List] {
            let target = match action {
                Action::List => Target::Folder(None),
                _ => Target::Secret(SecretPath::new("accounts/db-key").unwrap()),
            };
            let asked = AccessRequest {
                caller: &caller,
                address: "127.0.0.1:1".parse().unwrap(),
                action,
                target: &target,
                method: "GET",
                uri: "/v1/secret/data/accounts/db-key",
                now: std::time::Duration::from_secs(1_795_305_600),
                trace_id: None,
            };
            assert!(judge.may(&asked).is_ok_and(|grant| grant.rule.contains("all")), "{}", action.name());
        }
    }
}
