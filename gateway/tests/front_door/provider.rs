//! The embedded provider by itself, and how a client tells it from a stranger.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use gateway::https::{HttpClient as _, HttpsClient};
use gateway::{Trust, login};
use http::{Method, Request, StatusCode};
use identity::testing::{TestAuthority, ago, ahead};
use identity::{BundleSet, IdentitySource, SpiffeId, jws};
use serde_json::json;
use url::Url;

use crate::bench::{Answer, HTML, Jar, PASSWORD, bench, svid};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_issuer_with_another_certificate_is_not_believed() {
    let bench = bench().await;
    let other = TestAuthority::valid_between("bank.example", ago(3600), ahead(48 * 3600));
    let stranger = IdentitySource::fixed(svid(&other, "/x"), BundleSet::new([other.bundle()]));
    let mesh = IdentitySource::fixed(
        svid(&bench.site.authority, "/x"),
        BundleSet::new([bench.site.authority.bundle()]),
    );
    let expecting = |path: &str| Some(SpiffeId::new(&format!("spiffe://bank.example{path}")).unwrap());
    let discovery = bench.issuer.discovery();
    let clock = bench.clock();
    let works = |trust: Trust, url: String| {
        let client = HttpsClient::new(trust, &clock).unwrap();
        async move { client.send(Request::get(url).body(Bytes::new()).unwrap()).await.is_ok() }
    };
    let mesh = |expected| Trust::Mesh { source: mesh.clone(), expected };
    assert!(works(mesh(None), discovery.clone()).await);
    assert!(works(mesh(expecting("/palisade/idp")), discovery.clone()).await);
    assert!(
        !works(mesh(expecting("/service/web")), discovery.clone()).await,
        "another workload at that address"
    );
    assert!(!works(Trust::Mesh { source: stranger, expected: None }, discovery.clone()).await);
    assert!(!works(mesh(None), discovery.replace("127.0.0.1", "127.0.0.2")).await, "another name");
    assert!(!works(mesh(None), discovery.replace("https", "http")).await);
    let pem = bench.site.directory.path().join("ca.pem");
    std::fs::write(&pem, bench.site.authority.bundle().pem()).unwrap();
    assert!(works(Trust::pem_file(&pem).unwrap(), discovery).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_provider_gives_codes_and_tokens_only_to_whom_they_belong() {
    let bench = bench().await;
    for (name, password) in [("alice", "wrong"), ("carol", PASSWORD), ("alice", "")] {
        let outcome = bench.tokens("palisade-cli", name, password).await;
        assert!(matches!(outcome, Err(login::LoginError::Refused(401))), "{outcome:?}");
    }
    let verifier = "v".repeat(43);
    let challenge = jws::encode(ring::digest::digest(&ring::digest::SHA256, verifier.as_bytes()));
    let redirect = "http://127.0.0.1:1/callback";
    let start = |change: &[(&str, &str)]| {
        let mut pairs: Vec<(&str, &str)> = vec![
            ("response_type", "code"),
            ("client_id", "palisade-cli"),
            ("redirect_uri", redirect),
            ("state", "s"),
            ("scope", "openid offline_access unknown"),
            ("code_challenge", &challenge),
            ("code_challenge_method", "S256"),
        ];
        for (name, value) in change {
            pairs.retain(|(other, _)| other != name);
            pairs.push((name, value));
        }
        Url::parse_with_params(&bench.idp("/authorize"), pairs).unwrap()
    };
    let jar = Jar::default();
    for (change, error) in [
        (("code_challenge_method", "plain"), "invalid_request"),
        (("code_challenge", ""), "invalid_request"),
        (("response_type", "token"), "unsupported_response_type"),
        (("request", "x"), "request_not_supported"),
        (("prompt", "none"), "login_required"),
    ] {
        let back = jar.visit(&bench, start(&[change]).as_str()).await.location();
        let found: HashMap<_, _> = back.query_pairs().into_owned().collect();
        assert_eq!((found["error"].as_str(), found["state"].as_str()), (error, "s"));
        assert_eq!(found["iss"], bench.issuer.as_str());
    }
    let form = jar.visit(&bench, start(&[]).as_str()).await;
    let stranger = Jar::default().submit(&bench, &form, "alice", PASSWORD).await;
    assert_eq!(stranger.status, StatusCode::BAD_REQUEST, "the form belongs to another browser");
    let mut code = code_of(&jar.submit(&bench, &form, "alice", PASSWORD).await);
    let exchange = |code: &str, change: &[(&str, &str)]| {
        let mut form: HashMap<&str, &str> = [
            ("grant_type", "authorization_code"),
            ("client_id", "palisade-cli"),
            ("redirect_uri", redirect),
            ("code", code),
            ("code_verifier", &verifier),
        ]
        .into();
        form.extend(change.iter().copied());
        let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        let bench = &bench;
        async move { bench.request(Method::POST, &bench.idp("/token"), &[], &body).await }
    };
    for change in [
        ("code_verifier", "w".repeat(43)),
        ("redirect_uri", "http://127.0.0.1:2/callback".into()),
        ("client_id", "other-cli".into()),
        ("code", "x".into()),
    ] {
        let answer = exchange(&code, &[(change.0, &change.1)]).await;
        assert_eq!(
            (answer.status, answer.json()["error"].clone()),
            (StatusCode::BAD_REQUEST, json!("invalid_grant")),
            "{change:?}"
        );
        let form = jar.visit(&bench, start(&[]).as_str()).await;
        code = code_of(&jar.submit(&bench, &form, "alice", PASSWORD).await);
    }
    let as_gateway = exchange(&code, &[("client_id", "gateway")]).await;
    assert_eq!(as_gateway.status, StatusCode::UNAUTHORIZED, "a confidential client without its secret");
    let tokens = exchange(&code, &[]).await;
    assert_eq!(
        (tokens.status, tokens.json()["scope"].clone()),
        (StatusCode::OK, json!("openid offline_access"))
    );
    let again = exchange(&code, &[]).await;
    assert_eq!(again.json()["error"], "invalid_grant");
    let refresh = tokens.json()["refresh_token"].as_str().unwrap().to_owned();
    let refreshed = exchange("", &[("grant_type", "refresh_token"), ("refresh_token", &refresh)]).await;
    assert_eq!(refreshed.json()["error"], "invalid_grant", "the copied code has ended what it began");

    let bearer = bench.bearer().await;
    let info =
        bench.request(Method::GET, &bench.idp("/userinfo"), &[("authorization", &bearer)], "").await.json();
    assert_eq!(info, json!({"sub": "alice", "name": "ALICE", "groups": ["customers"]}));
    let none =
        bench.request(Method::GET, &bench.idp("/userinfo"), &[("authorization", "Bearer a.b.c")], "").await;
    assert_eq!(none.status, StatusCode::UNAUTHORIZED);
}

fn code_of(answer: &Answer) -> String {
    let location = answer.location();
    let code = location.query_pairs().find(|(name, _)| name == "code").map(|(_, value)| value.into_owned());
    code.unwrap_or_else(|| panic!("no code in {location}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guessing_passwords_is_slowed_down() {
    let bench = bench().await;
    let jar = Jar::default();
    let start = bench.get("/", &[("accept", HTML)]).await;
    jar.keep(&start);
    let mut page = jar.visit(&bench, start.location().as_str()).await;
    let mut statuses = Vec::new();
    for _ in 0..61 {
        page = jar.submit(&bench, &page, "alice", "wrong").await;
        statuses.push(page.status);
    }
    assert!(statuses[..60].iter().all(|status| *status == StatusCode::UNAUTHORIZED));
    assert_eq!(statuses[60], StatusCode::TOO_MANY_REQUESTS);
    let right = jar.submit(&bench, &page, "alice", PASSWORD).await;
    assert_eq!(right.status, StatusCode::TOO_MANY_REQUESTS, "not even the right one, for a moment");
    bench.site.clock.advance(Duration::from_secs(2));
    let right = jar.submit(&bench, &right, "alice", PASSWORD).await;
    assert_eq!(right.status, StatusCode::SEE_OTHER);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_proves_nothing_gets_no_code_behind_a_persons_back() {
    let bench = bench().await;
    let jar = Jar::default();
    let start = bench.get("/", &[("accept", HTML)]).await;
    jar.keep(&start);
    let form = jar.visit(&bench, start.location().as_str()).await;
    assert_eq!(jar.submit(&bench, &form, "alice", PASSWORD).await.status, StatusCode::SEE_OTHER);
    let again = jar.visit(&bench, start.location().as_str()).await;
    assert_eq!(again.status, StatusCode::SEE_OTHER, "the gateway has a secret: no second form");
    let challenge = jws::encode([7; 32]);
    let ask = |prompt: &str| {
        let pairs = [
            ("response_type", "code"),
            ("client_id", "palisade-cli"),
            ("redirect_uri", "http://127.0.0.1:6666/callback"),
            ("scope", "openid offline_access bank"),
            ("code_challenge", &challenge),
            ("code_challenge_method", "S256"),
            ("prompt", prompt),
        ];
        Url::parse_with_params(&bench.idp("/authorize"), pairs).unwrap()
    };
    let page = jar.visit(&bench, ask("").as_str()).await;
    assert_eq!(page.status, StatusCode::OK, "whoever listens on that port must not get a code silently");
    let silent = jar.visit(&bench, ask("none").as_str()).await.location();
    assert!(silent.query_pairs().any(|(name, value)| name == "error" && value == "login_required"));
}
