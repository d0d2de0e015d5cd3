//! A made-up mesh for the tests and the preview.

use std::sync::{Mutex, PoisonError};

use console::{
    DecisionDetail, DecisionRow, HolderRow, IdentityRow, NodeRow, Overview, PoliciesRow, ReadModel, Verdict,
};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::broadcast;

/// A model that holds what it is told.
pub(crate) struct FakeModel {
    pub(crate) overview: Mutex<Overview>,
    pub(crate) decisions: Mutex<Vec<DecisionRow>>,
    changes: broadcast::Sender<u64>,
}

impl FakeModel {
    pub(crate) fn new(overview: Overview, decisions: Vec<DecisionRow>) -> Self {
        let changes = broadcast::Sender::new(16);
        Self { overview: Mutex::new(overview), decisions: Mutex::new(decisions), changes }
    }

    /// Tells open pages to look again.
    pub(crate) fn changed(&self) {
        // Nobody may be looking; that is fine.
        drop(self.changes.send(1));
    }
}

impl ReadModel for FakeModel {
    fn overview(&self) -> BoxFuture<'_, Overview> {
        async { self.overview.lock().unwrap_or_else(PoisonError::into_inner).clone() }.boxed()
    }

    fn decisions(&self, limit: usize) -> BoxFuture<'_, Vec<DecisionRow>> {
        async move {
            self.decisions
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .take(limit)
                .cloned()
                .collect()
        }
        .boxed()
    }

    fn decision(&self, receipt: &str) -> BoxFuture<'_, Option<DecisionDetail>> {
        let row = self
            .decisions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .find(|row| row.receipt == receipt)
            .cloned();
        async { row.map(|row| DecisionDetail { text: explanation(&row), row }) }.boxed()
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        async { "# EOF\n".to_owned() }.boxed()
    }

    fn changes(&self) -> broadcast::Receiver<u64> {
        self.changes.subscribe()
    }
}

fn explanation(row: &DecisionRow) -> String {
    format!(
        "receipt   {}\nrequest   GET /accounts/42 → {} on {}\nprincipal {}\n\nconsidered\n  accounts.cedar:12 \
         read-own-account   did not match\n    when {{ resource.owner == context.user.id }}\n         \
         \"bob\" == \"alice\" is false\n\nnearest rule that would allow\n  accounts.cedar:12 read-own-account, \
         for Account::\"17\"\n",
        row.receipt,
        row.action,
        row.objects.join(", "),
        row.principal
    )
}

/// A mesh like the demo's, as of `now`.
/// What is in force.
pub(crate) const COMMIT: &str = "3fb2a90c11d4e0a7c1b2d3e4f5061728394a5b6c";

pub(crate) fn holder(service: &str, commit: Option<&str>) -> HolderRow {
    HolderRow {
        service: service.to_owned(),
        host: "demo".to_owned(),
        name: format!("service/{service}#1"),
        commit: commit.map(str::to_owned),
        has_some: commit.is_some(),
        as_wanted: commit.is_some(),
        refused: None,
    }
}

pub(crate) fn overview(now: u64) -> Overview {
    let identity = |path: &str, left: u64, why: &str| IdentityRow {
        spiffe_id: format!("spiffe://bank.example/{path}"),
        serial: format!("7f3a91c2{left:08x}d4e5"),
        expires: now + left,
        why: why.to_owned(),
    };
    Overview {
        trust_domain: "bank.example".to_owned(),
        authority_expires: now + 90 * 86_400,
        identities: vec![
            identity("service/web", 96, "uid 1000, path /srv/bank/bin/web, sha256 5d41402abc4b2a76"),
            identity(
                "service/accounts",
                101,
                "uid 1000, path /srv/bank/bin/accounts, sha256 7d793037a0760186",
            ),
            identity(
                "service/payments",
                88,
                "uid 1000, path /srv/bank/bin/payments, sha256 9e107d9d372bb682",
            ),
            identity("palisade/gateway", 110, "uid 1000, path /srv/bank/bin/gateway"),
            identity("palisade/vault", 75, "uid 1000, path /srv/bank/bin/vault"),
        ],
        nodes: vec![NodeRow {
            host: "demo".to_owned(),
            spiffe_id: "spiffe://bank.example/palisade/agent/demo".to_owned(),
            last_seen: now,
        }],
        allowed: 12_408,
        denied: 0,
        policies: Some(PoliciesRow {
            in_force: Some((COMMIT.to_owned(), now - 86_400)),
            holders: ["web", "accounts", "gateway"].map(|service| holder(service, Some(COMMIT))).into(),
            ..PoliciesRow::default()
        }),
    }
}

/// alice reads account `id` by way of `web`, `age_s` ago.
pub(crate) fn read(receipt: &str, id: &str, now: u64, age_s: u64) -> DecisionRow {
    let own = id == "17" || id == "18";
    DecisionRow {
        receipt: receipt.to_owned(),
        time_ms: (now - age_s) * 1_000,
        service: "accounts".to_owned(),
        verdict: if own { Verdict::Allowed } else { Verdict::Denied },
        principal: "spiffe://bank.example/service/web".to_owned(),
        user: Some("alice".to_owned()),
        action: "ReadAccount".to_owned(),
        objects: vec![format!("Account::\"{id}\"")],
        rule: own.then(|| "read-own-account accounts.cedar:12".to_owned()),
        reason: if own {
            "alice owns it".to_owned()
        } else {
            "alice does not own Account::\"42\"".to_owned()
        },
    }
}
