//! What can be seen of a running sidecar: `/debug`, and requests as they end.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod pair;

use http_body_util::BodyExt as _;
use pair::{Pair, id};

#[tokio::test]
async fn debug_shows_connections_endpoints_certificates_and_the_config_in_force() {
    let pair = Pair::new().await;
    for _ in 0..3 {
        assert_eq!(pair.call("/items/17", &[]).await.0, 200);
    }

    let index = pair.page(pair.stock_admin, "/debug/").await;
    let pages: Vec<&str> =
        index["pages"].as_array().unwrap().iter().map(|page| page.as_str().unwrap()).collect();
    let (tap, pages) = pages.split_last().unwrap();
    assert_eq!(*tap, "/debug/tap");
    assert_eq!(pages, ["/debug/certificates", "/debug/config", "/debug/connections", "/debug/endpoints"]);
    for page in pages {
        pair.page(pair.web_admin, page).await;
    }

    let open = pair.page(pair.stock_admin, "/debug/connections").await;
    let inbound = &open["inbound"]["shown"][0];
    assert_eq!(inbound["peer"], "spiffe://shop.example/service/web");
    assert_eq!((&inbound["protocol"], &inbound["requests"]), (&"mux".into(), &3.into()), "{open:#}");
    let open = pair.page(pair.web_admin, "/debug/connections").await;
    let outbound = &open["outbound"]["shown"][0];
    assert_eq!(outbound["peer"], "spiffe://shop.example/service/stock");
    assert_eq!((&outbound["remote"], &outbound["protocol"]), (&pair.stock.to_string().into(), &"mux".into()));

    let endpoints = pair.page(pair.web_admin, "/debug/endpoints").await;
    let stock = &endpoints["services"]["shown"][0];
    assert_eq!((&stock["service"], &stock["breaker"]["connections"]["taken"]), (&"stock".into(), &1.into()));
    let endpoint = &stock["endpoints"]["shown"][0];
    assert_eq!((&endpoint["available"], &endpoint["in_flight"]), (&true.into(), &0.into()), "{endpoint:#}");
    assert!(endpoint["average_seconds"].as_f64().unwrap() > 0.0 && endpoint["ejected_until"].is_null());

    let certificates = pair.page(pair.stock_admin, "/debug/certificates").await;
    assert_eq!(certificates["svid"]["spiffe_id"], "spiffe://shop.example/service/stock");
    let trusted = &certificates["trust_domains"]["shown"][0];
    assert_eq!(trusted["trust_domain"], "shop.example");
    assert_eq!(trusted["roots"]["shown"][0]["subject"], certificates["svid"]["issuer"]);

    let config = pair.page(pair.stock_admin, "/debug/config").await;
    assert_eq!(config["policy"]["policies"]["shown"][0]["id"], "web-reads");
    assert_eq!(config["policy"]["version"].as_str().unwrap().len(), 12);
    assert_eq!(config["sidecar"]["inbound"]["listen"], pair.stock.to_string());
    pair.end().await;
}

#[tokio::test]
async fn debug_forgets_connections_that_have_ended() {
    let pair = Pair::new().await;
    let source = pair.authority.source("/service/web");
    let tls = identity::tls::client_config(
        &source,
        id("/service/stock"),
        &[identity::tls::ALPN_HTTP11],
        &identity::SystemClock::shared(),
    );
    let stream = tokio::net::TcpStream::connect(pair.stock).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(tls.unwrap());
    let stream = connector.connect(identity::tls::unnamed_server(), stream).await.unwrap();
    let shown = async || {
        let open = pair.page(pair.stock_admin, "/debug/connections").await;
        open["inbound"]["shown"].as_array().unwrap().clone()
    };
    // The server's half of the handshake may end after the client's.
    let open = loop {
        let open = shown().await;
        if !open.is_empty() {
            break open;
        }
    };
    assert_eq!((&open[0]["protocol"], &open[0]["requests"]), (&"http/1.1".into(), &0.into()));
    drop(stream);
    while !shown().await.is_empty() {}
    pair.end().await;
}

/// A page in a browser on this machine whose name was made to lead here.
#[tokio::test]
async fn debug_is_closed_to_foreign_hosts() {
    let pair = Pair::new().await;
    for target in ["/debug", "/debug/config", "/debug/connections"] {
        let (status, body) = pair.get(pair.stock_admin, target, &[("host", "rebound.example")]).await;
        assert_eq!(status, 403, "{target}: {body}");
        assert!(!body.contains("spiffe://"), "{body}");
    }
    assert_eq!(pair.get(pair.stock_admin, "/debug/other", &[]).await.0, 404);
    assert_eq!(pair.get(pair.stock_admin, "/debugger", &[]).await.0, 404);
    pair.end().await;
}

#[tokio::test]
async fn a_tap_shows_requests_of_both_sides_as_they_end() {
    let pair = Pair::new().await;
    let mut stock = pair.open(pair.stock_admin, "/debug/tap?verdict=deny", &[]).await.into_body();
    let mut web = pair.open(pair.web_admin, "/debug/tap", &[]).await.into_body();
    assert_eq!(next_record(&mut stock, "\n").await, "\n");
    assert_eq!(pair.call("/items/17", &[]).await.0, 200);
    assert_eq!(pair.call("/items/secret", &[]).await.0, 403);

    let record: serde_json::Value = serde_json::from_str(&next_record(&mut stock, "{").await).unwrap();
    assert_eq!((&record["path"], &record["verdict"]), (&"/items/secret".into(), &"deny".into()), "{record}");
    assert_eq!(
        (&record["action"], &record["direction"]),
        (&"ReadItem".into(), &"inbound".into()),
        "{record}"
    );
    let record: serde_json::Value = serde_json::from_str(&next_record(&mut web, "{").await).unwrap();
    assert_eq!((&record["path"], &record["status"]), (&"/items/17".into(), &200.into()), "{record}");

    assert_eq!(pair.get(pair.web_admin, "/debug/tap?pear=x", &[]).await.0, 400);
    assert_eq!(pair.get(pair.web_admin, "/debug/tap", &[("host", "rebound.example")]).await.0, 403);
    let mut more = Vec::new();
    for _ in 0..3 {
        more.push(pair.open(pair.web_admin, "/debug/tap", &[]).await);
    }
    assert_eq!(pair.get(pair.web_admin, "/debug/tap", &[]).await.0, 503);
    drop((more, stock));
    // Who still looks on does not hold the drain up, and hears of the end.
    let looks_on = async { while web.frame().await.is_some_and(|frame| frame.is_ok()) {} };
    tokio::join!(pair.end(), looks_on);
}

/// What begins with `start` next.
async fn next_record(body: &mut hyper::body::Incoming, start: &str) -> String {
    loop {
        let frame = body.frame().await.expect("the tap goes on").unwrap();
        let text = String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap();
        if text.starts_with(start) {
            return text;
        }
    }
}
