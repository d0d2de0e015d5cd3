//! The coarse question: may this client, for this user, use this route at all? What happens to which
//! object behind it is the service's own sidecar's question.

use std::net::SocketAddr;
use std::sync::Arc;

use http::StatusCode;
use http::request::Parts;
use identity::clock::SharedClock;
use identity::txn::User;
use policy::{
    Attributes, Caller, InForce, Layer, ObjectRef, Occasion, Permit, Principal, Receipt, Recorder, Verdict,
};
use sidecar::headers::TraceParent;

use crate::SharedRandom;
use crate::refusal::Refusal;

const ACTION: &str = "UseRoute";
const OBJECT: &str = "Gateway::Route";

/// The gateway's policy, and what a decision needs besides it.
pub(crate) struct Coarse {
    pub policy: InForce,
    pub recorder: Arc<dyn Recorder>,
    pub random: SharedRandom,
    pub clock: SharedClock,
}

impl Coarse {
    /// Decides and records; a denial is a 403 with the decision's receipt.
    pub(crate) fn permit(
        &self,
        user: &User,
        service: &str,
        remote: SocketAddr,
        parts: &Parts,
        trace: &TraceParent,
    ) -> Result<Permit, Refusal> {
        let receipt = Receipt::generate(self.random.as_ref())
            .map_err(|_| Refusal::unavailable("policy.random", "no randomness"))?;
        let caller = Caller {
            principal: Principal::Client(user.client.clone()),
            user: Some(Arc::new(user.clone())),
            chain: Arc::from([]),
            address: Some(remote),
        };
        let occasion = Occasion {
            receipt,
            now: self.clock.now(),
            layer: Layer::Gateway,
            method: parts.method.as_str(),
            target: parts.uri.path_and_query().map_or("", |target| target.as_str()),
            transaction: None,
            trace_id: Some(trace.trace_id),
        };
        let object = ObjectRef::new(OBJECT, service);
        let attributes = Attributes::none();
        let verdict = self.policy.current().decide_object(&caller, ACTION, &object, &attributes, &occasion);
        match verdict {
            Verdict::Permit(permit) => {
                let record = permit.record_object(&caller, ACTION, &object, &attributes, &occasion);
                self.recorder.record(record);
                Ok(permit)
            }
            Verdict::Deny(denial) => {
                self.recorder.record(denial.record().clone());
                // In audit mode the denial is recorded and the request goes on.
                denial.audited().map_err(|denial| {
                    let status = StatusCode::from_u16(denial.status()).unwrap_or(StatusCode::FORBIDDEN);
                    let rule = denial.rule().name().to_owned();
                    let mut refusal = Refusal::new(status, "denied", rule, denial.reason());
                    refusal.recorded = Some(*denial.receipt());
                    refusal
                })
            }
        }
    }
}
