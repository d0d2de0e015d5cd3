//! Attacks by spelling: bob's account, written so that a rule and a backend might read it differently.

use super::Outcome;
use super::calls::Call;
use super::stage::{Attempt, Stage};

/// Name, and the spelling of `/accounts/42`.
const SPELLINGS: &[(&str, &str)] = &[
    ("path-double-slash", "//accounts/42"),
    ("path-inner-double-slash", "/accounts//42"),
    ("path-dot-segment", "/./accounts/42"),
    ("path-parent-segment", "/accounts/17/../42"),
    ("path-encoded-dots", "/accounts/17/%2e%2e/42"),
    ("path-encoded-slash", "/accounts%2f42"),
    ("path-double-encoding", "/accounts/%2534%2532"),
    ("path-encoded-digits", "/accounts/%34%32"),
    ("path-parameter", "/accounts/42;x=y"),
    ("path-trailing-dot", "/accounts/42."),
    ("path-trailing-slash", "/accounts/42/"),
    ("path-case", "/Accounts/42"),
    ("path-repeated-query", "/accounts/17?id=17&id=42"),
];

pub(super) async fn run(stage: &Stage) -> anyhow::Result<Vec<Outcome>> {
    let twin = stage.as_web_for_alice("accounts", Call::get("/accounts/17")).await?.ok();
    let mut outcomes = Vec::new();
    for (name, spelling) in SPELLINGS {
        // Straight at accounts' sidecar …
        let answer = stage.as_web_for_alice("accounts", Call::get(*spelling)).await?;
        // … and through the front door.
        let front = Call::get(format!("/api{spelling}")).bearer(&stage.alice.access_token);
        let front = stage.https.call(&front).await?;
        let mut outcome = stage
            .judge(Attempt {
                name,
                tried: format!(
                    "alice asks for {spelling}, at accounts' sidecar and under /api at the gateway"
                ),
                answer,
                twin: "alice asks for /accounts/17".into(),
                twin_ok: twin,
            })
            .await?;
        outcome.stopped &= front.refused();
        outcomes.push(outcome);
    }
    Ok(outcomes)
}
