//! Decisions on their way to control, where `palisade explain` finds them.

use std::sync::Arc;

use ca::mesh::{DecisionReporter, ReportedDecision};
use identity::Scope;
use policy::{DecisionRecord, Outcome, Recorder};

use crate::workload::Workload;

/// The word for a permit in control's store.
pub(crate) const ALLOWED: &str = "allow";
/// The word for a denial.
pub(crate) const DENIED: &str = "deny";

/// Hands every decision to the agent, which hands it to control; never in a request's way.
struct ToControl(DecisionReporter);

impl Recorder for ToControl {
    fn record(&self, record: DecisionRecord) {
        let json = match serde_json::to_string(&record) {
            Ok(json) => json,
            Err(error) => {
                tracing::error!(receipt = %record.receipt, %error, "a decision cannot be written down");
                return;
            }
        };
        self.0.report(ReportedDecision {
            receipt: record.receipt.to_string(),
            time_ms: record.time,
            service: record.service,
            verdict: match record.verdict {
                Outcome::Permit => ALLOWED,
                Outcome::Deny => DENIED,
            }
            .to_owned(),
            address: format!("{} {}", record.method, record.target),
            json,
        });
    }
}

/// Where a workload's decisions go, for as long as `scope` lives.
pub(crate) fn recorder(workload: &Workload, scope: &Scope) -> Arc<dyn Recorder> {
    let socket = workload.mesh.agent.socket.clone();
    Arc::new(ToControl(DecisionReporter::start(socket, Arc::clone(&workload.clock), scope)))
}
