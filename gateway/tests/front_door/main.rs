//! The front door as a whole: a real gateway, a real provider, and a service behind mTLS that says what it
//! was sent. Nothing between them is faked; time is set by hand.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod bench;
mod provider;

use std::io::BufRead as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use futures::future::join_all;
use gateway::{Rate, SESSION_COOKIE, SessionLimits};
use http::header::{AUTHORIZATION, LOCATION, ORIGIN, RETRY_AFTER, SET_COOKIE, WWW_AUTHENTICATE};
use http::{Method, Request, StatusCode};
use identity::jws;
use policy::Outcome;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use sidecar::otlp::TracesConfig;
use sidecar::trace::Share;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::bench::{ACCESS_LIFE, Bench, HTML, Jar, PASSWORD, Site, bench, log};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_logs_in_through_the_form_and_the_service_sees_who_it_is() {
    let bench = bench().await;
    let jar = Jar::default();
    let start = bench.get("/accounts?sort=date", &[("accept", HTML)]).await;
    assert_eq!(start.status, StatusCode::FOUND);
    jar.keep(&start);
    let form = jar.visit(&bench, start.location().as_str()).await;
    assert_eq!(form.status, StatusCode::OK);
    assert!(form.header("content-security-policy").contains("default-src 'none'"));
    let back = jar.submit(&bench, &form, "alice", PASSWORD).await;
    assert_eq!(back.status, StatusCode::SEE_OTHER);
    let done = jar.visit(&bench, back.location().as_str()).await;
    assert_eq!((done.status, done.header(LOCATION)), (StatusCode::SEE_OTHER, "/accounts?sort=date"));
    let set = done.headers.get_all(SET_COOKIE).iter().map(|value| value.to_str().unwrap());
    let session: Vec<&str> = set.filter(|value| value.starts_with("__Host-palisade=")).collect();
    assert_eq!(session.len(), 1);
    for attribute in ["Secure", "HttpOnly", "SameSite=Lax", "Path=/"] {
        assert!(session[0].split("; ").any(|part| part == attribute), "{attribute} in {}", session[0]);
    }
    assert!(!session[0].contains("Domain"));
    let page = jar.visit(&bench, bench.gateway.join("/accounts?sort=date").unwrap().as_str()).await;
    assert_eq!(page.status, StatusCode::OK);
    let told = page.json();
    assert_eq!(told["target"], "/accounts?sort=date");
    assert_eq!(told["peer"], "spiffe://bank.example/palisade/gateway");
    let user = &told["user"]["Ok"];
    assert_eq!(
        (&user["id"], &user["client"], &user["issuer"]),
        (&json!("alice"), &json!("gateway"), &json!(bench.issuer.as_str()))
    );
    assert_eq!(user["groups"], json!(["customers"]));
    assert!(user["scopes"].as_array().unwrap().contains(&json!("bank")));
    assert!(user["auth_time"].as_u64().unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_29_the_service_sees_nothing_that_the_caller_claims_about_itself() {
    let bench = bench().await;
    let cookie = format!("theme=dark; {}; __Host-palisade-login-x=y", bench.cookie("alice").await);
    let forged = [
        ("cookie", cookie.as_str()),
        ("x-forwarded-user", "bob"),
        ("x_forwarded_user", "bob"),
        ("x-forwarded-client-cert", "URI=spiffe://bank.example/service/payments"),
        ("x_forwarded-client_cert", "x"),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-host", "evil.example"),
        ("forwarded", "for=192.0.2.1"),
        ("txn-token", "forged"),
        ("txn_token", "forged"),
        ("x-palisade-user", "bob"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "a=b"),
        ("x-secret", "hop"),
        ("x-kept", "yes"),
        ("connection", "x-secret, txn-token, x-forwarded-proto"),
    ];
    let answer = bench.get("/", &forged).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    let authority = bench.gateway.as_str().trim_start_matches("https://").trim_end_matches('/');
    assert_eq!(answer.json()["user"]["Ok"]["id"], "alice");
    assert_eq!(answer.sent("cookie"), ["theme=dark"]);
    assert_eq!(answer.sent("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(answer.sent("x-forwarded-proto"), ["https"]);
    assert_eq!(answer.sent("x-forwarded-host"), [authority]);
    assert_eq!(answer.sent("txn-token").len(), 1);
    assert_eq!(answer.sent("x-kept"), ["yes"]);
    assert_eq!(answer.sent("traceparent").len(), 1);
    assert!(!answer.sent("traceparent")[0].contains("0af7651916cd43dd8448eb211c80319c"));
    for gone in [
        "x-forwarded-user",
        "x_forwarded_user",
        "x-forwarded-client-cert",
        "x_forwarded-client_cert",
        "forwarded",
        "txn_token",
        "x-palisade-user",
        "tracestate",
        "x-secret",
        "connection",
        "authorization",
    ] {
        assert_eq!(answer.sent(gone), Vec::<String>::new(), "{gone}");
    }
    let set: Vec<_> = answer.headers.get_all(SET_COOKIE).iter().collect();
    assert_eq!(set, ["basket=1"], "a service cannot plant a session");
    assert!(!answer.headers.contains_key("txn-token"));
    let bearer = bench.bearer().await;
    let answer = bench.get("/", &[("authorization", &bearer)]).await;
    assert_eq!(answer.sent("authorization"), Vec::<String>::new(), "the access token goes no further");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_1_to_19_forged_and_misused_tokens_are_refused_and_the_good_one_works() {
    let bench = bench().await;
    let tokens = bench.tokens("palisade-cli", "alice", PASSWORD).await.unwrap();
    let good = tokens.access_token.expose_secret().to_owned();
    let (input, signature) = good.rsplit_once('.').unwrap();
    let (header, claims) = input.split_once('.').unwrap();
    let decode = |text: &str| -> Value { serde_json::from_slice(&jws::decode(text).unwrap()).unwrap() };
    let forge = |change: &dyn Fn(&mut Value, &mut Value)| {
        let (mut header, mut claims) = (decode(header), decode(claims));
        change(&mut header, &mut claims);
        format!("{}.{}", jws::encode(header.to_string()), jws::encode(claims.to_string()))
    };
    let jwks = bench.request(Method::GET, &bench.idp("/jwks.json"), &[], "").await.json();
    let none = forge(&|header, _| header["alg"] = json!("none"));
    let hs = forge(&|header, _| header["alg"] = json!("HS256"));
    let hs_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, jwks["keys"][0].to_string().as_bytes());
    let bob = forge(&|_, claims| claims["sub"] = json!("bob"));
    let other_audience = bench.tokens("other-cli", "alice", PASSWORD).await.unwrap();
    let attacks = [
        ("jwt.algorithm", format!("{none}.")),
        ("jwt.algorithm", format!("{none}.{signature}")),
        ("jwt.algorithm", format!("{hs}.{}", jws::encode(ring::hmac::sign(&hs_key, hs.as_bytes())))),
        ("jwt.signature", format!("{bob}.{signature}")),
        ("jwt.audience", other_audience.access_token.expose_secret().to_owned()),
        ("jwt.type", tokens.id_token.unwrap().expose_secret().to_owned()),
        ("jwt.form", tokens.refresh_token.unwrap().expose_secret().to_owned()),
        ("jwt.form", "a.b".into()),
    ];
    let ok = bench.get("/", &[("authorization", &format!("Bearer {good}"))]).await;
    assert_eq!((ok.status, &ok.json()["user"]["Ok"]["id"]), (StatusCode::OK, &json!("alice")));
    for (rule, token) in attacks {
        let answer = bench.get("/", &[("authorization", &format!("Bearer {token}"))]).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{rule}");
        let challenge = answer.header(WWW_AUTHENTICATE);
        assert!(
            challenge.starts_with("Bearer ") && challenge.contains("error=\"invalid_token\""),
            "{challenge}"
        );
        assert!(challenge.contains("resource_metadata=\""), "{challenge}");
        let receipt = answer.json()["receipt"].as_str().unwrap().to_owned();
        assert_eq!(answer.json(), json!({"error": "invalid_token", "receipt": receipt}), "no oracle");
        let records = bench.recorder.records();
        let record = records.iter().find(|record| record.receipt.as_str() == receipt).unwrap();
        assert_eq!(record.rule.name(), rule);
    }
    let bearer = format!("Bearer {good}");
    let cookie = bench.cookie("alice").await;
    for (path, headers) in [
        ("/?access_token=x", vec![("authorization", bearer.as_str())]),
        ("/", vec![("authorization", bearer.as_str()), ("cookie", cookie.as_str())]),
        ("/", vec![("authorization", bearer.as_str()), ("authorization", bearer.as_str())]),
    ] {
        assert_eq!(bench.get(path, &headers).await.status, StatusCode::BAD_REQUEST, "{path} {headers:?}");
    }
    bench.site.clock.advance(ACCESS_LIFE);
    assert_eq!(
        bench.get("/", &[("authorization", &bearer)]).await.status,
        StatusCode::UNAUTHORIZED,
        "expired"
    );
    let log = log();
    let log = log.0.lock().unwrap();
    for secret in [signature, PASSWORD, cookie.split_once('=').unwrap().1] {
        assert!(!log.contains(secret), "a secret was logged");
    }
    assert!(log.contains("jwt.signature"), "and the log was looked at");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_19_21_strangers_are_challenged_and_only_navigations_are_sent_to_log_in() {
    let bench = bench().await;
    let page = bench.get("/x", &[("accept", HTML), ("sec-fetch-mode", "navigate")]).await;
    assert_eq!(page.status, StatusCode::FOUND);
    assert!(page.location().as_str().starts_with(&bench.idp("/authorize?")));
    for headers in [
        vec![],
        vec![("accept", "*/*")],
        vec![("accept", "application/json")],
        vec![("accept", HTML), ("sec-fetch-mode", "cors")],
        vec![("accept", HTML), ("x-requested-with", "XMLHttpRequest")],
    ] {
        let answer = bench.get("/x", &headers).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{headers:?}");
        assert_eq!(answer.json()["error"], "unauthenticated");
        assert!(answer.header(WWW_AUTHENTICATE).starts_with("Bearer resource_metadata="));
    }
    let posted = bench.post("/x", &[("accept", HTML)]).await;
    assert_eq!(posted.status, StatusCode::UNAUTHORIZED, "a lost form is not turned into a login");
    let metadata = bench.get("/.well-known/oauth-protected-resource", &[]).await.json();
    assert_eq!(metadata["authorization_servers"], json!([bench.issuer.as_str()]));
    let dead = format!("{SESSION_COOKIE}={}", "A".repeat(43));
    assert_eq!(
        bench.get("/x", &[("cookie", &dead)]).await.status,
        StatusCode::UNAUTHORIZED,
        "a cookie alone proves nothing"
    );
    let twice = format!("{dead}; {dead}");
    assert_eq!(bench.get("/x", &[("cookie", &twice)]).await.status, StatusCode::BAD_REQUEST);
    assert_eq!(bench.get("/.palisade/unknown", &[]).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_28_unsafe_requests_of_a_session_must_come_from_this_site() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    let origin = bench.gateway.origin().ascii_serialization();
    let with = |pairs: &[(&'static str, &'static str)]| {
        let mut headers: Vec<(&str, &str)> = pairs.to_vec();
        headers.push(("cookie", &cookie));
        headers
    };
    let mut good = with(&[]);
    good.push((ORIGIN.as_str(), &origin));
    let ok = bench.post("/transfers", &good).await;
    assert_eq!((ok.status, &ok.json()["user"]["Ok"]["id"]), (StatusCode::OK, &json!("alice")));
    for bad in [
        with(&[]),
        with(&[("origin", "https://evil.example")]),
        with(&[("origin", "null")]),
        with(&[("sec-fetch-site", "cross-site")]),
        with(&[("sec-fetch-site", "same-site")]),
    ] {
        let answer = bench.post("/transfers", &bad).await;
        assert_eq!(
            (answer.status, &answer.json()["error"]),
            (StatusCode::FORBIDDEN, &json!("cross_site_request")),
            "{bad:?}"
        );
        assert_eq!(bench.post("/.palisade/logout", &bad).await.status, StatusCode::FORBIDDEN, "{bad:?}");
    }
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::OK, "still logged in");
    let bearer = bench.bearer().await;
    let api = bench.post("/transfers", &[("authorization", &bearer)]).await;
    assert_eq!(api.status, StatusCode::OK, "a token is not sent by a browser on its own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_28_security_46_a_login_leads_nowhere_else_and_repeats_nothing() {
    let bench = bench().await;
    for target in [
        "//evil.example",
        "https://evil.example/",
        "/\\evil.example",
        "%2F%2Fevil.example",
        "/.palisade/login",
    ] {
        let jar = Jar::default();
        let start = bench.get(&format!("/.palisade/login?return_to={target}"), &[("accept", HTML)]).await;
        jar.keep(&start);
        let form = jar.visit(&bench, start.location().as_str()).await;
        let back = jar.submit(&bench, &form, "alice", PASSWORD).await;
        let done = jar.visit(&bench, back.location().as_str()).await;
        assert_eq!(done.header(LOCATION), "/", "{target}");
    }
    for query in [
        "",
        "?state=x",
        "?code=a&state=b",
        "?error=%3Cscript%3E&error_description=%3Cscript%3E&state=x",
        "?state=a&state=b",
    ] {
        let answer = bench.get(&format!("/.palisade/callback{query}"), &[("accept", HTML)]).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}");
        assert!(!String::from_utf8_lossy(&answer.body).contains("script"), "{query}");
    }
    for query in [
        "client_id=nobody&redirect_uri=https://evil.example",
        "client_id=gateway&redirect_uri=https://evil.example",
        "client_id=gateway&redirect_uri=javascript:alert(1)",
        "client_id=%3Cscript%3E",
    ] {
        let answer = bench
            .request(Method::GET, &bench.idp(&format!("/authorize?{query}")), &[("accept", HTML)], "")
            .await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}");
        assert!(!String::from_utf8_lossy(&answer.body).contains("script"), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_27_a_logout_ends_the_session_here_and_at_the_issuer() {
    let bench = bench().await;
    let jar = Jar::default();
    let start = bench.get("/", &[("accept", HTML)]).await;
    jar.keep(&start);
    let authorize = start.location();
    let form = jar.visit(&bench, authorize.as_str()).await;
    let back = jar.submit(&bench, &form, "alice", PASSWORD).await;
    jar.visit(&bench, back.location().as_str()).await;
    let old = jar.header();
    assert_eq!(bench.get("/", &[("cookie", &old)]).await.status, StatusCode::OK);
    let again = jar.visit(&bench, authorize.as_str()).await;
    assert_eq!(again.status, StatusCode::SEE_OTHER, "the issuer knows the browser");

    let origin = bench.gateway.origin().ascii_serialization();
    assert_eq!(
        bench.get("/.palisade/logout", &[("cookie", &old)]).await.status,
        StatusCode::METHOD_NOT_ALLOWED
    );
    let out =
        bench.post("/.palisade/logout", &[("cookie", &old), ("origin", &origin), ("accept", HTML)]).await;
    // Not a redirect: `form-action 'self'` of the service's page would have the browser block it.
    assert_eq!((out.status, out.headers.get("location")), (StatusCode::OK, None));
    let refresh = out.headers["refresh"].to_str().unwrap();
    let onward = refresh.strip_prefix("0;url=").unwrap().to_owned();
    assert!(onward.starts_with(&bench.idp("/logout?")), "{onward}");
    jar.keep(&out);
    assert!(!jar.header().contains("__Host-palisade="));
    assert_eq!(
        bench.get("/", &[("cookie", &old)]).await.status,
        StatusCode::UNAUTHORIZED,
        "the old cookie is dead"
    );
    let end = jar.visit(&bench, &onward).await;
    let logged_out = bench.gateway.join("/.palisade/logged-out").unwrap();
    assert_eq!((end.status, end.location()), (StatusCode::SEE_OTHER, logged_out.clone()));
    assert_eq!(bench.get(logged_out.path(), &[("accept", HTML)]).await.status, StatusCode::OK);
    let form = jar.visit(&bench, authorize.as_str()).await;
    assert_eq!(form.status, StatusCode::OK, "a password is asked for again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_of_the_sidecar_behind_are_pages_for_people_and_json_for_programs() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    for (path, status, words) in [
        ("/refused", StatusCode::FORBIDDEN, "r-0123456789abcdef"),
        ("/down", StatusCode::BAD_GATEWAY, "Not available"),
    ] {
        let page = bench.get(path, &[("cookie", &cookie), ("accept", HTML)]).await;
        assert_eq!(
            (page.status, page.header("content-type")),
            (status, "text/html; charset=utf-8"),
            "{path}"
        );
        assert!(String::from_utf8_lossy(&page.body).contains(words), "{path}: {:?}", page.body);
        let json = bench.get(path, &[("cookie", &cookie), ("accept", "application/json")]).await;
        assert_eq!((json.status, json.header("content-type")), (status, "application/json"), "{path}");
        assert!(json.json()["error"].is_string());
    }
    let own = bench.get("/own-error", &[("cookie", &cookie), ("accept", HTML)]).await;
    assert_eq!(own.json()["why"], "the service says so", "a service's own answers are left alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn browsers_speak_http2_and_may_send_their_cookies_in_pieces() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    let ask = |path: &str| Request::get(bench.gateway.join(path).unwrap().as_str());
    let start = bench.h2(ask("/x").header("accept", HTML).body(()).unwrap()).await;
    assert_eq!(start.status, StatusCode::FOUND);
    assert!(start.location().as_str().starts_with(&bench.idp("/authorize?")));
    let pieces =
        ask("/x?y=z").header("cookie", "a=1").header("cookie", cookie.as_str()).header("cookie", "b=2");
    let page = bench.h2(pieces.body(()).unwrap()).await;
    assert_eq!((page.status, &page.json()["user"]["Ok"]["id"]), (StatusCode::OK, &json!("alice")));
    assert_eq!(page.sent("cookie"), ["a=1; b=2"]);
    let twice = ask("/x").header("cookie", cookie.as_str()).header("cookie", cookie.as_str());
    assert_eq!(bench.h2(twice.body(()).unwrap()).await.status, StatusCode::BAD_REQUEST);
    let origin = bench.gateway.origin().ascii_serialization();
    let post = |origin: &str| {
        let url = bench.gateway.join("/transfers").unwrap();
        Request::post(url.as_str())
            .header("cookie", cookie.as_str())
            .header("origin", origin)
            .body(())
            .unwrap()
    };
    assert_eq!(bench.h2(post(&origin)).await.status, StatusCode::OK);
    assert_eq!(bench.h2(post("https://evil.example")).await.status, StatusCode::FORBIDDEN);
    // Another name of ours: the login begins where its cookies will be looked for.
    let url = format!("https://localhost:{}/x", bench.gateway.port().unwrap());
    let other = bench.h2(Request::get(url).header("accept", HTML).body(()).unwrap()).await;
    assert_eq!(other.location(), bench.gateway.join("/.palisade/login?return_to=%2Fx").unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_21_twenty_tabs_log_in_at_once() {
    let bench = bench().await;
    let jar = Jar::default();
    let starts = join_all((0..20).map(|n| {
        let (bench, jar) = (&bench, &jar);
        async move {
            let start = bench.get(&format!("/tab/{n}"), &[("accept", HTML)]).await;
            jar.keep(&start);
            start.location()
        }
    }))
    .await;
    let forms = join_all(starts.iter().map(|url| jar.visit(&bench, url.as_str()))).await;
    let backs = join_all(forms.iter().map(|form| jar.submit(&bench, form, "alice", PASSWORD))).await;
    let done = join_all(backs.iter().map(|back| async {
        let url = back.location();
        jar.visit(&bench, url.as_str()).await
    }))
    .await;
    for (n, answer) in done.iter().enumerate() {
        assert_eq!(
            (answer.status, answer.header(LOCATION)),
            (StatusCode::SEE_OTHER, format!("/tab/{n}").as_str())
        );
    }
    let pages = join_all(done.iter().map(|answer| {
        let cookie = answer.headers.get_all(SET_COOKIE).iter().find_map(|value| {
            value
                .to_str()
                .unwrap()
                .strip_prefix("__Host-palisade=")
                .map(|rest| rest.split(';').next().unwrap())
        });
        let cookie = format!("{SESSION_COOKIE}={}", cookie.unwrap());
        let bench = &bench;
        async move { bench.get("/", &[("cookie", &cookie)]).await.status }
    }))
    .await;
    assert!(pages.iter().all(|status| *status == StatusCode::OK), "{pages:?}");
}

/// How often the provider's token endpoint was asked, in this process.
fn token_requests(address: &str) -> usize {
    let log = log();
    let log = log.0.lock().unwrap();
    let from = |line: &&str| line.contains("path=\"/token\"") && line.starts_with("gateway::idp");
    log.lines().filter(from).filter(|line| line.contains(address)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_23_two_hundred_parallel_requests_refresh_once_and_nobody_is_logged_out() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    let issuer = format!("issuer={:?}", bench.issuer.as_str());
    let before = token_requests(&issuer);
    assert_eq!(before, 1, "the code");
    for round in 1..=3 {
        bench.site.clock.advance(ACCESS_LIFE);
        let headers = [("cookie", cookie.as_str())];
        let all = join_all((0..200).map(|_| bench.get("/", &headers))).await;
        let bad: Vec<_> =
            all.iter().filter(|answer| answer.status != StatusCode::OK).map(|a| a.status).collect();
        assert!(bad.is_empty(), "{bad:?}");
        assert_eq!(token_requests(&issuer), before + round);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_26_an_idle_session_ends_and_asks_for_a_login() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    bench.site.clock.advance(SessionLimits::default().idle - Duration::from_secs(1));
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::OK);
    bench.site.clock.advance(SessionLimits::default().idle);
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::UNAUTHORIZED);
    let page = bench.get("/", &[("cookie", &cookie), ("accept", HTML)]).await;
    assert_eq!(page.status, StatusCode::FOUND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_policy_is_asked_and_ambiguous_paths_never_reach_it() {
    let bench = bench().await;
    let bearer = bench.bearer().await;
    let auth = [("authorization", bearer.as_str())];
    let denied = bench.get("/pay/1", &auth).await;
    assert_eq!((denied.status, &denied.json()["error"]), (StatusCode::FORBIDDEN, &json!("denied")));
    let receipt = denied.json()["receipt"].as_str().unwrap().to_owned();
    let records = bench.recorder.records();
    let record = records.iter().find(|record| record.receipt.as_str() == receipt).unwrap();
    assert_eq!((record.verdict, record.user.as_ref().unwrap().id.as_str()), (Outcome::Deny, "alice"));
    assert_eq!(bench.get("/payments", &auth).await.status, StatusCode::OK, "/pay is a whole segment");
    for path in ["//pay/1", "/./pay/1", "/x/../pay/1", "/%70ay/1", "/pay%2f1", "/pay;x=y/1", "/x%2e%2e/pay"] {
        let answer = bench.get(path, &auth).await;
        assert_eq!(
            (answer.status, &answer.json()["error"]),
            (StatusCode::BAD_REQUEST, &json!("malformed_request")),
            "{path}"
        );
        assert!(answer.json()["receipt"].is_string());
    }
    let page = bench.get("/pay/1", &[("authorization", &bearer), ("accept", HTML)]).await;
    assert!(String::from_utf8_lossy(&page.body).contains("Receipt: <code>r-"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_principal_and_a_guesser_are_slowed_down_each_for_itself() {
    let bench = Site::new().start((0, 0), Rate { per_second: 1.0, burst: 3 }).await;
    let bearer = bench.bearer().await;
    for left in ["2", "1", "0"] {
        let answer = bench.get("/", &[("authorization", &bearer)]).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(answer.header("ratelimit").contains(&format!("r={left};")), "{}", answer.header("ratelimit"));
        assert_eq!(answer.header("ratelimit-policy"), "\"principal\";q=3;w=3");
    }
    let limited = bench.get("/", &[("authorization", &bearer)]).await;
    assert_eq!((limited.status, limited.header(RETRY_AFTER)), (StatusCode::TOO_MANY_REQUESTS, "1"));
    let bob = bench.tokens("palisade-cli", "bob", PASSWORD).await.unwrap();
    let bob = format!("Bearer {}", bob.access_token.expose_secret());
    assert_eq!(bench.get("/", &[("authorization", &bob)]).await.status, StatusCode::OK, "bob has his own");
    let mut last = StatusCode::OK;
    for _ in 0..21 {
        last = bench.get("/", &[(AUTHORIZATION.as_str(), "Bearer a.b.c")]).await.status;
    }
    assert_eq!(last, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(
        bench.get("/", &[("authorization", &bob)]).await.status,
        StatusCode::OK,
        "the address still serves"
    );
    bench.site.clock.advance(Duration::from_secs(1));
    assert_eq!(bench.get("/", &[("authorization", &bearer)]).await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_and_tokens_survive_a_restart_of_both() {
    let fast = Rate { per_second: 100.0, burst: 1000 };
    let bench = bench().await;
    let (cookie, bearer) = (bench.cookie("alice").await, bench.bearer().await);
    let ports = (bench.gateway.port().unwrap(), bench.issuer.url().port().unwrap());
    let site = bench.stop().await;
    let bench = site.start(ports, fast).await;
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::OK);
    assert_eq!(bench.get("/", &[("authorization", &bearer)]).await.status, StatusCode::OK);
    bench.site.clock.advance(ACCESS_LIFE);
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::OK, "the refresh token too");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_a_person_is_kept_by_no_cache_unless_the_service_says_otherwise() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    let answer = bench.get("/", &[("cookie", &cookie)]).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.headers.get("cache-control").map(|value| value.to_str().unwrap()), Some("no-store"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_link_does_not_make_the_login_impossible() {
    let bench = bench().await;
    for (length, place) in [(6000, Some("/")), (2049, Some("/")), (2048, None)] {
        let jar = Jar::default();
        let target = format!("/x?q={}", "a".repeat(length - "/x?q=".len()));
        let start = bench.get(&target, &[("accept", HTML)]).await;
        jar.keep(&start);
        let form = jar.visit(&bench, start.location().as_str()).await;
        assert_eq!(form.status, StatusCode::OK, "{length}");
        let back = jar.submit(&bench, &form, "alice", PASSWORD).await;
        let done = jar.visit(&bench, back.location().as_str()).await;
        assert_eq!(done.header(LOCATION), place.unwrap_or(&target));
    }
}

/// Asks for a WebSocket and returns what came back, and the connection if it was switched.
async fn socket(
    bench: &Bench,
    headers: &[(&str, &str)],
) -> (String, tokio_rustls::client::TlsStream<tokio::net::TcpStream>) {
    let mut stream = bench.connection().await;
    let authority = format!("127.0.0.1:{}", bench.gateway.port().unwrap());
    let mut request = format!(
        "GET /socket HTTP/1.1\r\nhost: {authority}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    );
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    (String::from_utf8(head).unwrap(), stream)
}

#[tokio::test]
async fn a_proxy_that_is_known_says_where_a_connection_comes_from() {
    let mut site = Site::new();
    site.proxies = ["127.0.0.1".parse().unwrap()].into_iter().collect();
    let bench = site.start((0, 0), Rate { per_second: 100.0, burst: 1000 }).await;
    let bearer = bench.bearer().await;
    for before in ["PROXY TCP4 192.0.2.7 203.0.113.1 4000 443\r\n", "PROXY UNKNOWN\r\n"] {
        let mut stream = bench.connection_after(before).await.unwrap();
        let authority = format!("127.0.0.1:{}", bench.gateway.port().unwrap());
        let request = format!(
            "GET / HTTP/1.1\r\nhost: {authority}\r\nauthorization: {bearer}\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // The end may come without TLS's own.
        let _ended = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        let from = if before.contains("192.0.2.7") { "192.0.2.7" } else { "127.0.0.1" };
        assert!(answer.contains(&format!("[\"x-forwarded-for\",\"{from}\"]")), "{before:?}: {answer}");
    }
    assert!(bench.connection_after("").await.is_err(), "every connection of a proxy begins with a header");
}

#[tokio::test]
async fn calls_are_shared_copied_and_failed_on_purpose_as_traffic_says() {
    let mut site = Site::new();
    // Nobody answers as payments: those who go there reach nobody.
    site.traffic = serde_json::from_value(json!({
        "split": {"web": 1, "payments": 1},
        "split_by": "header:x-tenant",
        // The clock stands still: nothing would wait for a second try.
        "retries": {"on": []},
        "mirror": {"to": "web", "share": "100%"},
        "faults": {"abort": 418, "abort_share": "100%", "only_with": "x-fault"},
    }))
    .unwrap();
    let bench = site.start((0, 0), Rate { per_second: 100.0, burst: 1000 }).await;
    let bearer = bench.bearer().await;
    let answer = bench.get("/pay", &[("authorization", &bearer)]).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN, "the policy is asked for the service of the route");
    let mut tenants = [0, 0];
    for tenant in 0..16 {
        let tenant = tenant.to_string();
        let answer = bench.get("/x", &[("authorization", &bearer), ("x-tenant", &tenant)]).await;
        match answer.status {
            StatusCode::OK => tenants[0] += 1,
            StatusCode::SERVICE_UNAVAILABLE => tenants[1] += 1,
            other => panic!("{other}"),
        }
        let again = bench.get("/x", &[("authorization", &bearer), ("x-tenant", &tenant)]).await;
        assert_eq!(again.status, answer.status, "a tenant stays where it is");
    }
    assert!(tenants.iter().all(|count| *count > 1), "{tenants:?}");
    let mut copy = bench.copies.lock().await;
    let copied = tokio::time::timeout(Duration::from_secs(20), copy.recv()).await.unwrap().unwrap();
    assert_eq!((&copied["target"], &copied["user"]["Ok"]["id"]), (&json!("/x"), &json!("alice")));
    let answer = bench.get("/x", &[("authorization", &bearer), ("x-fault", "please")]).await;
    assert_eq!(answer.status, StatusCode::IM_A_TEAPOT);
    let rules: Vec<String> = bench.recorder.records().iter().map(|record| format!("{record:?}")).collect();
    assert!(rules.iter().any(|rule| rule.contains("traffic.faults")), "{rules:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_is_the_first_span_of_its_trace() {
    let probe = "import opentelemetry.proto.collector.trace.v1.trace_service_pb2";
    let probed = Command::new("python3").args(["-c", probe]).output();
    if !probed.is_ok_and(|probed| probed.status.success()) {
        identity::testing::skip(
            "python3 cannot import opentelemetry.proto (pip install opentelemetry-proto)",
        );
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../sidecar/tests/otlp_collector.py");
    let mut collector =
        Command::new("python3").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = std::io::BufReader::new(collector.stdout.take().unwrap()).lines();
    let port = said.next().unwrap().unwrap();
    let mut site = Site::new();
    let endpoint = format!("http://127.0.0.1:{port}/v1/traces").parse().unwrap();
    site.traces = Some(TracesConfig { endpoint, sample: Share::ALL });
    let bench = site.start((0, 0), Rate { per_second: 100.0, burst: 1000 }).await;
    let bearer = bench.bearer().await;
    let answer = bench.get("/accounts", &[("authorization", &bearer)]).await;
    let parent = answer.sent("traceparent")[0].clone();
    assert_eq!(bench.get("/pay", &[("authorization", &bearer)]).await.status, StatusCode::FORBIDDEN);
    // What waits is sent at the end.
    bench.stop().await;
    drop(collector.stdin.take());
    let spans: Vec<Value> = said.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert!(collector.wait().unwrap().success());
    let [allowed, denied] = spans.as_slice() else { panic!("{spans:#?}") };
    let id = |key: &str| allowed[key].as_str().unwrap();
    assert_eq!(parent, format!("00-{}-{}-01", id("trace_id"), id("span_id")), "the sidecar's is its child");
    assert_eq!((id("parent_span_id"), id("kind")), ("", "SPAN_KIND_SERVER"));
    assert_eq!(allowed["resource"], json!({"service.name": "gateway"}));
    assert_eq!(denied["attributes"]["http.response.status_code"], 403);
    assert_ne!(denied["trace_id"], allowed["trace_id"]);
}

#[tokio::test]
async fn a_websocket_passes_for_a_page_of_this_site_and_for_no_other() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    let origin = bench.gateway.as_str().trim_end_matches('/').to_owned();
    let (head, mut stream) = socket(&bench, &[("cookie", &cookie), ("origin", &origin)]).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.to_ascii_lowercase().contains("\r\nupgrade: websocket\r\n"), "{head}");
    for word in ["one", "two", "three"] {
        stream.write_all(word.as_bytes()).await.unwrap();
        let mut heard = vec![0; word.len()];
        stream.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, word.as_bytes());
    }
    // Another site's page has the cookie too, and one without an origin cannot be told from it.
    for headers in [
        &[("cookie", &cookie[..]), ("origin", "https://evil.example")][..],
        &[("cookie", &cookie[..])],
        &[("cookie", &cookie[..]), ("origin", &origin[..]), ("sec-fetch-site", "cross-site")],
    ] {
        let (head, _) = socket(&bench, headers).await;
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    }
    let (head, _) = socket(&bench, &[("origin", &origin)]).await;
    assert!(!head.starts_with("HTTP/1.1 101 "), "{head}");
    // Its time ends, whoever still speaks.
    bench.site.clock.advance(Duration::from_secs(3500));
    stream.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    bench.site.clock.advance(Duration::from_secs(101));
    assert!(stream.read_u8().await.is_err(), "the connection is closed");
}
