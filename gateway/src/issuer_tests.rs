use futures::future::join_all;
use http::StatusCode;
use identity::clock::ManualClock;
use serde_json::json;

use super::*;
use crate::testing::{ISSUER, Network, TestKey, config, jwks, now};

struct Bench {
    clock: Arc<ManualClock>,
    network: Network,
    client: Arc<IssuerClient>,
}

fn bench(keys: &[&TestKey]) -> Bench {
    let clock = ManualClock::at(now());
    let network = Network::with_issuer(ISSUER, keys);
    let client = network.issuer(&config(ISSUER), &clock);
    Bench { clock, network, client }
}

/// Documents a fetch reads: discovery and keys.
const FETCH: usize = 2;

/// A token that is good at this moment of the bench's clock.
fn token(key: &TestKey, clock: &Arc<ManualClock>) -> String {
    use identity::Clock as _;
    let at = clock.now_seconds();
    key.access(|_, claims| {
        claims["iat"] = json!(at);
        claims["exp"] = json!(at + 300);
    })
}

async fn verify(client: &Arc<IssuerClient>, token: &str) -> Result<AccessToken, JwtError> {
    client.access_token(&Compact::parse(token).unwrap()).await
}

#[tokio::test]
async fn gateway_7_ten_thousand_unknown_kids_cost_one_fetch_each_thirty_seconds() {
    let key = TestKey::new("k1");
    let Bench { clock, network, client } = bench(&[&key]);
    assert!(verify(&client, &token(&key, &clock)).await.is_ok());
    assert_eq!(network.requests(), FETCH);
    let unknown = |n: usize| key.access(|header, _| header["kid"] = json!(format!("kid-{n}")));
    let many = (0..10_000).map(|n| {
        let client = Arc::clone(&client);
        async move { verify(&client, &unknown(n)).await.is_err() }
    });
    assert!(join_all(many).await.into_iter().all(|refused| refused));
    assert_eq!(network.requests(), 2 * FETCH);
    clock.advance(UNKNOWN_KID_SPACING - Duration::from_secs(1));
    assert!(verify(&client, &unknown(0)).await.is_err());
    assert_eq!(network.requests(), 2 * FETCH);
    clock.advance(Duration::from_secs(1));
    assert!(verify(&client, &unknown(0)).await.is_err());
    assert_eq!(network.requests(), 3 * FETCH);
}

#[tokio::test]
async fn gateway_7_a_client_that_hangs_up_does_not_cancel_the_fetch_of_others() {
    let key = TestKey::new("k1");
    let Bench { clock, network, client } = bench(&[&key]);
    let good = token(&key, &clock);
    let mut impatient = Box::pin(verify(&client, &good));
    assert!(futures::poll!(&mut impatient).is_pending());
    drop(impatient);
    assert!(verify(&client, &good).await.is_ok());
    assert_eq!(network.requests(), FETCH);
}

#[tokio::test]
async fn gateway_8_rotation_is_not_noticed_and_a_removed_key_ends_within_max_age() {
    let (old, new) = (TestKey::new("old"), TestKey::new("new"));
    let Bench { clock, network, client } = bench(&[&old]);
    assert!(verify(&client, &token(&old, &clock)).await.is_ok());
    // The new key signs a moment after it is published, long before anything is due.
    clock.advance(Duration::from_secs(1));
    network.page(&format!("{ISSUER}/jwks.json"), &jwks(&[&old, &new]));
    assert!(verify(&client, &token(&new, &clock)).await.is_ok());
    assert!(verify(&client, &token(&old, &clock)).await.is_ok());
    network.page(&format!("{ISSUER}/jwks.json"), &jwks(&[&new]));
    clock.advance(DEFAULT_MAX_AGE);
    assert!(matches!(verify(&client, &token(&old, &clock)).await, Err(JwtError::Key)));
    assert!(verify(&client, &token(&new, &clock)).await.is_ok());
}

#[tokio::test]
async fn gateway_9_with_the_issuer_down_the_last_keys_serve_a_day() {
    let key = TestKey::new("k1");
    let Bench { clock, network, client } = bench(&[&key]);
    assert!(verify(&client, &token(&key, &clock)).await.is_ok());
    network.serve(&format!("{ISSUER}/jwks.json"), |_| Err(HttpsError::Timeout));
    clock.advance(MAX_STALE - Duration::from_secs(1));
    assert!(verify(&client, &token(&key, &clock)).await.is_ok());
    clock.advance(Duration::from_secs(1));
    assert!(matches!(verify(&client, &token(&key, &clock)).await, Err(JwtError::KeysUnavailable)));
    network.page(&format!("{ISSUER}/jwks.json"), &jwks(&[&key]));
    clock.advance(RETRY_SPACING);
    assert!(verify(&client, &token(&key, &clock)).await.is_ok());
}

#[tokio::test]
async fn gateway_9_security_45_documents_come_from_the_issuers_own_origin_and_are_not_redirected() {
    let key = TestKey::new("k1");
    let discovery = format!("{ISSUER}/.well-known/openid-configuration");
    let document = |change: &dyn Fn(&mut Value)| {
        let mut document = json!({
            "issuer": ISSUER, "authorization_endpoint": format!("{ISSUER}/a"), "token_endpoint": format!("{ISSUER}/t"),
            "jwks_uri": format!("{ISSUER}/jwks.json"),
        });
        change(&mut document);
        document.to_string()
    };
    type Change = Box<dyn Fn(&mut Value)>;
    let cases: Vec<Change> = vec![
        Box::new(|document| document["issuer"] = json!("https://evil.example")),
        Box::new(|document| document["issuer"] = json!(format!("{ISSUER}/"))),
        Box::new(|document| document["jwks_uri"] = json!("https://evil.example/jwks.json")),
        Box::new(|document| document["jwks_uri"] = json!("http://issuer.example/jwks.json")),
        Box::new(|document| document["jwks_uri"] = json!("https://issuer.example:8443/jwks.json")),
        Box::new(|document| document["jwks_uri"] = json!("http://169.254.169.254/latest")),
        Box::new(|document| document["token_endpoint"] = json!("https://evil.example/token")),
        Box::new(|document| document["end_session_endpoint"] = json!("https://evil.example/")),
        Box::new(|document| document["authorization_endpoint"] = json!(null)),
    ];
    for change in cases {
        let Bench { network, client, .. } = bench(&[&key]);
        network.page("https://evil.example/jwks.json", &jwks(&[&key]));
        network.page(&discovery, &document(&*change));
        assert!(client.metadata().await.is_err(), "{}", document(&*change));
    }
    let Bench { network, client, .. } = bench(&[&key]);
    network.serve(&discovery, |_| Ok((StatusCode::FOUND, String::new())));
    assert!(client.metadata().await.is_err());
    let Bench { network, client, .. } = bench(&[&key]);
    network.page(&discovery, &document(&|_| {}));
    assert!(client.metadata().await.is_ok());
    assert_eq!(network.requests(), FETCH);
}

#[tokio::test]
async fn gateway_10_keys_never_cross_issuers() {
    let (ours, theirs) = (TestKey::new("k"), TestKey::new("k"));
    let clock = ManualClock::at(now());
    let other = "https://other.example";
    let network = Network::with_issuer(ISSUER, &[&ours]);
    let second = Network::with_issuer(other, &[&theirs]);
    let issuers =
        Issuers::new(vec![network.issuer(&config(ISSUER), &clock), second.issuer(&config(other), &clock)])
            .unwrap();
    assert!(issuers.bearer(&ours.access(|_, _| {})).await.is_ok());
    assert!(matches!(issuers.bearer(&theirs.access(|_, _| {})).await, Err(JwtError::Signature)));
    let as_other = |key: &TestKey| key.access(|_, claims| claims["iss"] = json!(other));
    assert_eq!(issuers.bearer(&as_other(&theirs)).await.unwrap().0.as_str(), other);
    assert!(matches!(issuers.bearer(&as_other(&ours)).await, Err(JwtError::Signature)));
    let nobody = ours.access(|_, claims| claims["iss"] = json!("https://nobody.example"));
    assert!(matches!(issuers.bearer(&nobody).await, Err(JwtError::Issuer)));
    let listed = ours.access(|_, claims| claims["iss"] = json!([ISSUER]));
    assert!(matches!(issuers.bearer(&listed).await, Err(JwtError::Claim("iss"))));
}

#[tokio::test]
async fn what_needs_no_key_causes_no_fetch() {
    let key = TestKey::new("k1");
    let Bench { network, client, .. } = bench(&[&key]);
    let none = key.access(|header, _| header["alg"] = json!("none"));
    let id = key.access(|header, _| header["typ"] = json!("JWT"));
    assert!(matches!(verify(&client, &none).await, Err(JwtError::Algorithm)));
    assert!(matches!(verify(&client, &id).await, Err(JwtError::Type)));
    assert_eq!(network.requests(), 0);
}

#[tokio::test]
async fn gateway_8_kids_made_up_by_strangers_do_not_hide_the_key_that_the_issuer_signs_with() {
    let (old, new) = (TestKey::new("old"), TestKey::new("new"));
    let Bench { clock, network, client } = bench(&[&old]);
    assert!(verify(&client, &token(&old, &clock)).await.is_ok());
    let made_up = old.access(|header, _| header["kid"] = json!("made-up"));
    assert!(verify(&client, &made_up).await.is_err());
    network.page(&format!("{ISSUER}/jwks.json"), &jwks(&[&new]));
    let id_token = new.access(|header, claims| {
        header["typ"] = json!("JWT");
        claims["aud"] = json!("gateway");
        claims["nonce"] = json!("n");
    });
    let answer = json!({ "token_type": "Bearer", "access_token": "a", "id_token": id_token });
    network.page(&format!("{ISSUER}/token"), &answer.to_string());
    let tokens = client.exchange_code("code", "https://gateway.example/", "verifier", "n").await;
    assert_eq!(tokens.unwrap().id.unwrap().subject, "alice");
}
