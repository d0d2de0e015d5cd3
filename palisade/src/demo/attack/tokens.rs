//! Attacks with tokens and headers: claiming to act for somebody.

use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use identity::jws;
use ring::hmac;
use serde_json::Value;

use super::Outcome;
use super::calls::{Answer, Call};
use super::stage::{Attempt, Stage};

pub(super) async fn run(stage: &Stage) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes = transaction_tokens(stage).await?;
    outcomes.extend(forged_headers(stage).await?);
    outcomes.extend(access_tokens(stage).await?);
    Ok(outcomes)
}

const READ: &str = "/accounts/17";

/// Forged, stolen and expired `Txn-Token`s, at accounts' own sidecar.
async fn transaction_tokens(stage: &Stage) -> anyhow::Result<Vec<Outcome>> {
    let accounts = stage.id("accounts")?;
    let call = Call::get(READ);
    let twin = stage.as_web_for_alice("accounts", call.clone()).await?.ok();
    let beside = "web presents the token that the gateway gave it".to_owned();

    // web signs a token for itself, as if it were the gateway.
    let forged = stage.web.mint(&stage.alice.user, &accounts, call.binding(), stage.now())?;
    let answer = stage.as_workload(&stage.web, "accounts", &call.clone().txn(&forged)).await?;
    let forged = Attempt {
        name: "forged-transaction-token",
        tried: "web mints a transaction token for alice itself, signed with its own key".into(),
        answer,
        twin: beside.clone(),
        twin_ok: twin,
    };

    // payments presents what web was given to hold.
    let stolen = stage.chain_at("accounts", &call, stage.now())?;
    let answer = stage.as_workload(&stage.payments, "accounts", &call.clone().txn(&stolen)).await?;
    let stolen = Attempt {
        name: "stolen-transaction-token",
        tried: "payments replays a token of alice's that it saw web use".into(),
        answer,
        twin: beside.clone(),
        twin_ok: twin,
    };

    // A token of the right shape, a minute old.
    let old = stage.chain_at("accounts", &call, stage.now().saturating_sub(Duration::from_secs(60)));
    // The chain itself cannot be made any more by our own code; the bare token can.
    let old = match old {
        Ok(chain) => chain,
        Err(_) => {
            let issued = stage.now().saturating_sub(Duration::from_secs(60));
            stage.gateway.mint(&stage.alice.user, &accounts, call.binding(), issued)?
        }
    };
    let answer = stage.as_workload(&stage.gateway, "accounts", &call.clone().txn(&old)).await?;
    let expired = Attempt {
        name: "expired-transaction-token",
        tried: "a token of alice's, rightly minted, a minute after".into(),
        answer,
        twin: beside.clone(),
        twin_ok: twin,
    };

    let mut outcomes = Vec::new();
    for attempt in [forged, stolen, expired] {
        outcomes.push(stage.judge(attempt).await?);
    }
    Ok(outcomes)
}

/// Identity headers that some backend somewhere would believe.
async fn forged_headers(stage: &Stage) -> anyhow::Result<Vec<Outcome>> {
    let by = stage.id("web")?;
    let cases = [
        (
            "forged-x-forwarded-client-cert",
            "x-forwarded-client-cert",
            format!("By={by};URI={}", stage.id("accounts")?),
        ),
        ("forged-x-forwarded-user", "x-forwarded-user", "alice".to_owned()),
        ("forged-x_forwarded_user", "x_forwarded_user", "alice".to_owned()),
    ];
    let mut outcomes = Vec::new();
    for (name, header, value) in cases {
        // Through the front door, as bob, claiming to be alice …
        let front = Call::get("/api/accounts/17").bearer(&stage.bob.access_token).with(header, value.clone());
        let answer = stage.https.call(&front).await?;
        // … and at the sidecar, as web, with no token at all.
        let direct =
            stage.as_workload(&stage.web, "accounts", &Call::get(READ).with(header, value.clone())).await?;
        let mine = Call::get("/api/accounts/42").bearer(&stage.bob.access_token).with(header, value);
        let twin = stage.https.call(&mine).await?;
        let stopped_there_too = direct.refused();
        let mut outcome = stage
            .judge(Attempt {
                name,
                tried: format!("bob, and then web without a user, send {header} claiming to be another"),
                answer,
                twin: "bob reads his own account; the header is dropped, not believed".into(),
                twin_ok: twin.ok(),
            })
            .await?;
        outcome.stopped &= stopped_there_too;
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// JWTs that are not what they claim, at the gateway.
async fn access_tokens(stage: &Stage) -> anyhow::Result<Vec<Outcome>> {
    let call = |token: &str| Call::get("/api/accounts/17").bearer(token);
    let twin = stage.https.call(&call(&stage.alice.access_token)).await?.ok();
    let jwks: Value = serde_json::from_slice(&stage.idp.call(&Call::get(stage.jwks_path())).await?.body)?;
    let cases: Vec<(&str, &str, String)> = vec![
        (
            "jwt-alg-none",
            "alice's access token with alg none and no signature",
            unsigned(&stage.alice.access_token)?,
        ),
        (
            "jwt-hs256-with-public-key",
            "alice's access token signed with HS256, the issuer's public key as the secret",
            hmac_with_public_key(&stage.alice.access_token, &jwks)?,
        ),
        (
            "jwt-wrong-audience",
            "a genuine access token of alice's, issued for another API",
            stage.alice.other_audience_token.clone(),
        ),
        (
            "jwt-id-token-as-access-token",
            "alice's genuine ID token in place of an access token",
            stage.alice.id_token.clone(),
        ),
    ];
    let mut outcomes = Vec::new();
    for (name, tried, token) in cases {
        let answer: Answer = stage.https.call(&call(&token)).await?;
        outcomes.push(
            stage
                .judge(Attempt {
                    name,
                    tried: tried.to_owned(),
                    answer,
                    twin: "alice's access token as it was issued".into(),
                    twin_ok: twin,
                })
                .await?,
        );
    }
    Ok(outcomes)
}

fn parts(token: &str) -> anyhow::Result<(Value, &str)> {
    let mut parts = token.split('.');
    let (Some(header), Some(claims)) = (parts.next(), parts.next()) else { anyhow::bail!("not a JWT") };
    Ok((serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header)?)?, claims))
}

fn set_algorithm(header: &mut Value, algorithm: &str) {
    if let Some(header) = header.as_object_mut() {
        header.insert("alg".to_owned(), algorithm.into());
    }
}

fn unsigned(token: &str) -> anyhow::Result<String> {
    let (mut header, claims) = parts(token)?;
    set_algorithm(&mut header, "none");
    Ok(format!("{}.{claims}.", jws::encode(header.to_string())))
}

/// The classic confusion: a verifier that takes the algorithm from the token and the key from the JWKS.
fn hmac_with_public_key(token: &str, jwks: &Value) -> anyhow::Result<String> {
    let (mut header, claims) = parts(token)?;
    set_algorithm(&mut header, "HS256");
    let key = jwks.pointer("/keys/0").context("the JWKS is empty")?;
    let field = |name: &str| -> anyhow::Result<Vec<u8>> {
        Ok(URL_SAFE_NO_PAD
            .decode(key.get(name).and_then(Value::as_str).context("the first key is not an EC key")?)?)
    };
    // SubjectPublicKeyInfo of an uncompressed P-256 point, in PEM: what an EC key file holds.
    let prefix: &[u8] = &[
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
        0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
    ];
    let der = [prefix, &field("x")?, &field("y")?].concat();
    let pem = format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(der));
    let input = format!("{}.{claims}", jws::encode(header.to_string()));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, pem.as_bytes()), input.as_bytes());
    Ok(format!("{input}.{}", jws::encode(tag)))
}
