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
        if let Some(decision) = reported(record) {
            self.0.report(decision);
        }
    }
}

/// A decision in the form that control keeps; `None`, and an error in the log, if it cannot be written.
pub(crate) fn reported(record: DecisionRecord) -> Option<ReportedDecision> {
    let json = match serde_json::to_string(&record) {
        Ok(json) => json,
        Err(error) => {
            tracing::error!(receipt = %record.receipt, %error, "a decision cannot be written down");
            return None;
        }
    };
    Some(ReportedDecision {
        receipt: record.receipt.to_string(),
        time_ms: record.time,
        service: record.service,
        verdict: match record.verdict {
            Outcome::Permit => ALLOWED,
            Outcome::Deny => DENIED,
        }
        .to_owned(),
        address: record.peer_address.unwrap_or_default(),
        json,
    })
}

/// Where a workload's decisions go, for as long as `scope` lives.
pub(crate) fn recorder(workload: &Workload, scope: &Scope) -> Arc<dyn Recorder> {
    let socket = workload.mesh.agent.socket.clone();
    Arc::new(ToControl(DecisionReporter::start(socket, Arc::clone(&workload.clock), scope)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use policy::{Layer, Occasion, refuse_connection};

    use super::*;

    #[test]
    fn a_decision_is_kept_under_the_address_of_its_caller() {
        let of = |address: Option<&str>| {
            let occasion = Occasion {
                receipt: "r-7k2m0q9xw4e8t5hz".parse().unwrap(),
                now: Duration::from_secs(1),
                layer: Layer::Sidecar,
                method: "GET",
                target: "/accounts/17",
                transaction: None,
                trace_id: None,
            };
            let address = address.map(|address| address.parse().unwrap());
            let denial = refuse_connection("accounts", "tls.x", "why".to_owned(), address, &occasion);
            reported(denial.record().clone()).unwrap().address
        };
        assert_eq!(of(Some("127.0.0.1:40100")), "127.0.0.1:40100");
        assert_eq!(of(None), "");
    }
}
