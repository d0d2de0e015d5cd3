//! Attacks on objects and operations: somebody real, asking for what is not theirs.

use super::Outcome;
use super::calls::Call;
use super::stage::{Attempt, Stage};

/// alice's own account and bob's.
const HERS: &str = "17";
const HER_SAVINGS: &str = "18";
const HIS: &str = "42";

pub(super) async fn run(stage: &Stage) -> anyhow::Result<Vec<Outcome>> {
    Ok(vec![
        through_the_gateway(stage).await?,
        from_a_compromised_web(stage).await?,
        transfer_from_his_account(stage).await?,
        backend_only_operation(stage).await?,
        duplicate_keys(stage).await?,
        another_services_secret(stage).await?,
    ])
}

async fn through_the_gateway(stage: &Stage) -> anyhow::Result<Outcome> {
    let read = |id: &str| Call::get(format!("/api/accounts/{id}")).bearer(&stage.alice.access_token);
    let attack = stage.https.call(&read(HIS)).await?;
    let twin = stage.https.call(&read(HERS)).await?;
    stage
        .judge(Attempt {
            name: "object-through-gateway",
            tried: format!("alice, logged in, reads bob's account {HIS} by changing the id"),
            answer: attack,
            twin: format!("alice reads her account {HERS}"),
            twin_ok: twin.ok(),
        })
        .await
}

async fn from_a_compromised_web(stage: &Stage) -> anyhow::Result<Outcome> {
    let read = |id: &str| Call::get(format!("/accounts/{id}"));
    let attack = stage.as_web_for_alice("accounts", read(HIS)).await?;
    let twin = stage.as_web_for_alice("accounts", read(HERS)).await?;
    stage
        .judge(Attempt {
            name: "object-from-compromised-web",
            tried: format!(
                "web's own identity and alice's live token, straight to accounts' sidecar: account {HIS}"
            ),
            answer: attack,
            twin: format!("the same for account {HERS}"),
            twin_ok: twin.ok(),
        })
        .await
}

async fn transfer_from_his_account(stage: &Stage) -> anyhow::Result<Outcome> {
    let transfer = |from: &str, to: &str| {
        let body = format!(r#"{{"from":"{from}","to":"{to}","amount_cents":1,"memo":"rehearsal"}}"#);
        Call::post("/transfers", body)
    };
    let attack = stage.as_web_for_alice("payments", transfer(HIS, HERS)).await?;
    let twin = stage.as_web_for_alice("payments", transfer(HERS, HER_SAVINGS)).await?;
    stage
        .judge(Attempt {
            name: "transfer-from-anothers-account",
            tried: format!("alice moves money out of bob's account {HIS}"),
            answer: attack,
            twin: format!("alice moves a cent from {HERS} to {HER_SAVINGS}"),
            twin_ok: twin.ok(),
        })
        .await
}

async fn backend_only_operation(stage: &Stage) -> anyhow::Result<Outcome> {
    let totals = Call::get("/journal/totals");
    let attack = stage.as_workload(&stage.web, "payments", &totals).await?;
    let twin = stage.as_workload(&stage.accounts, "payments", &totals).await?;
    stage
        .judge(Attempt {
            name: "backend-only-operation",
            tried: "web calls payments' GET /journal/totals, which is for accounts alone".into(),
            answer: attack,
            twin: "accounts calls it".into(),
            twin_ok: twin.ok(),
        })
        .await
}

async fn duplicate_keys(stage: &Stage) -> anyhow::Result<Outcome> {
    let post = |body: &str| Call::post("/transfers", body);
    let twice = format!(r#"{{"from":"{HERS}","to":"{HER_SAVINGS}","amount_cents":1,"from":"{HIS}"}}"#);
    let once = format!(r#"{{"from":"{HERS}","to":"{HER_SAVINGS}","amount_cents":1}}"#);
    let attack = stage.as_web_for_alice("payments", post(&twice)).await?;
    let twin = stage.as_web_for_alice("payments", post(&once)).await?;
    stage
        .judge(Attempt {
            name: "duplicate-json-keys",
            tried: r#"a transfer whose JSON names "from" twice, hers and bob's"#.into(),
            answer: attack,
            twin: r#"the same with one "from""#.into(),
            twin_ok: twin.ok(),
        })
        .await
}

async fn another_services_secret(stage: &Stage) -> anyhow::Result<Outcome> {
    let read = Call::get("/v1/secret/data/accounts/db-key");
    let attack = stage.at_vault(&stage.web, &read).await?;
    let twin = stage.at_vault(&stage.accounts, &read).await?;
    stage
        .judge(Attempt {
            name: "secret-of-another-service",
            tried: "web's identity reads accounts' database key from the vault".into(),
            answer: attack,
            twin: "accounts reads it".into(),
            twin_ok: twin.ok(),
        })
        .await
}
