//! Every label in `/metrics` is bounded: no path, method, host, user or trace is one, and of peers no more than 256
//! are told apart (linkerd2 #5746, istio #7912: memory that grows with what strangers ask for).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

#[allow(dead_code, reason = "shared with other tests")]
mod pair;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use identity::clock::{Clock as _, SystemClock};
use identity::txn::{self, RequestBinding, User};
use identity::{BundleSet, IdentitySource, X509Svid};
use pair::{Pair, id};
use sidecar::SidecarConfig;
use sidecar::upstream::{Upstream, UpstreamConfig};

/// In everything that a caller chooses freely here, and in nothing else.
const MARK: &str = "zq7";
/// Peers told apart, as the README says.
const MAX_PEERS: usize = 256;
/// Far more than this pair needs for its one route, two peers and few statuses.
const MAX_SERIES: usize = 150;

/// stock takes the gateway's word for who the user is.
fn with_users(mut config: SidecarConfig) -> SidecarConfig {
    if let Some(inbound) = &mut config.inbound {
        inbound.gateways.push(id("/palisade/gateway"));
    }
    config
}

/// The names and labels of all series, without their values.
async fn series(pair: &Pair, admin: SocketAddr) -> BTreeSet<String> {
    let (status, text) = pair.get(admin, "/metrics", &[]).await;
    assert_eq!(status, 200);
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
}

/// A request to stock as `svid`.
async fn ask(pair: &Pair, svid: &X509Svid, request: Request<sidecar::Body>) -> StatusCode {
    let source = IdentitySource::fixed(svid.clone(), BundleSet::new([pair.authority.bundle()]));
    let config = UpstreamConfig {
        service: "stock".into(),
        id: id("/service/stock"),
        endpoints: vec![pair.stock].into(),
        response_timeout: Duration::from_secs(10),
    };
    let upstream = Upstream::new(config, source, SystemClock::shared(), &pair.scope).unwrap();
    let response = upstream.send(request).await.unwrap();
    let status = response.status();
    response.into_body().collect().await.unwrap();
    status
}

/// A token with which the gateway speaks for `user`.
fn token(gateway: &X509Svid, user: &str, method: &str, target: &str) -> String {
    let user = User {
        id: user.into(),
        issuer: format!("https://{user}.example"),
        client: user.into(),
        scopes: vec![user.into()],
        groups: vec![user.into()],
        auth_time: 0,
        tenant: None,
        mfa: false,
    };
    let (stock, now) = (id("/service/stock"), SystemClock.now());
    txn::mint(gateway, &user, &stock, RequestBinding::new(method, target), txn::MAX_LIFETIME, now).unwrap()
}

/// Everything that callers choose, never twice the same.
async fn ask_all_kinds(pair: &Pair, gateway: &X509Svid, turn: usize) {
    let word = format!("{MARK}x{turn}");
    let trace = format!("00-{:032x}-{:016x}-01", turn + 1, turn + 1);
    let web = pair.authority.issue("/service/web");
    let targets = [
        format!("/items/{word}"),
        "/items/secret".to_owned(),
        format!("/{word}"),
        format!("/items/{word}?{word}=1"),
    ];
    for target in &targets {
        // Through both sidecars, as an app calls; under any name.
        pair.call(target, &[("host", &format!("{word}.example")), ("traceparent", &trace)]).await;
        for method in ["GET", "POST", &word] {
            let request = || Request::builder().method(method).uri(target).header("user-agent", &word);
            ask(pair, &web, request().body(sidecar::empty()).unwrap()).await;
            let token = token(gateway, &word, method, target);
            ask(pair, gateway, request().header(txn::HEADER, token).body(sidecar::empty()).unwrap()).await;
        }
        let forged = Request::get(target).header(txn::HEADER, &word).body(sidecar::empty()).unwrap();
        ask(pair, &web, forged).await;
    }
}

#[tokio::test]
async fn what_callers_choose_makes_no_series() {
    let pair = Pair::changed(with_users).await;
    let gateway = pair.authority.issue("/palisade/gateway");
    ask_all_kinds(&pair, &gateway, 0).await;
    let first = (series(&pair, pair.stock_admin).await, series(&pair, pair.web_admin).await);
    for turn in 1..8 {
        ask_all_kinds(&pair, &gateway, turn).await;
    }
    let last = (series(&pair, pair.stock_admin).await, series(&pair, pair.web_admin).await);
    assert_eq!(first, last);
    for series in [&last.0, &last.1] {
        assert!(series.len() <= MAX_SERIES, "{series:#?}");
        assert!(!series.iter().any(|series| series.contains(MARK)), "{series:#?}");
    }
    // What was asked did count.
    for counted in ["palisade_requests_total{", "palisade_denials_total{", "status=\"200\"", "route=\"\""] {
        assert!(last.0.iter().any(|series| series.contains(counted)), "{counted}: {:#?}", last.0);
    }
    pair.end().await;
}

#[tokio::test]
async fn peers_beyond_the_bound_are_counted_together() {
    let pair = Pair::new().await;
    for peer in 0..MAX_PEERS + 20 {
        let svid = pair.authority.issue(&format!("/service/{MARK}{peer}"));
        let request = Request::get("/items/17").body(sidecar::empty()).unwrap();
        assert_eq!(ask(&pair, &svid, request).await, 403);
    }
    let series = series(&pair, pair.stock_admin).await;
    let peers = series.iter().filter(|series| series.contains(&format!("/service/{MARK}"))).count();
    assert_eq!(peers, MAX_PEERS);
    assert!(series.iter().any(|series| series.contains("peer=\"other\"")), "{series:#?}");
    assert!(series.len() <= MAX_PEERS + MAX_SERIES, "{}", series.len());
    pair.end().await;
}
