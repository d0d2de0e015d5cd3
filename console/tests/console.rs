//! The console as a browser meets it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test's helpers fail as its tests do"
)]

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use console::{ReadModel, Verdict};
use fake::FakeModel;
use http_body_util::BodyExt as _;
use identity::clock::ManualClock;
use secrecy::SecretString;
use tower::ServiceExt as _;

mod fake;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const NOW: u64 = 1_772_355_600;

struct Console {
    model: Arc<FakeModel>,
    router: Router,
}

struct Page {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Page {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Console {
    fn new() -> Self {
        let decisions = vec![fake::read("r-2", "42", NOW, 5), fake::read("r-1", "17", NOW, 9)];
        let model = Arc::new(FakeModel::new(fake::overview(NOW), decisions));
        let clock = ManualClock::at(Duration::from_secs(NOW));
        let router = console::router_with_clock(
            Arc::clone(&model) as Arc<dyn ReadModel>,
            SecretString::from(TOKEN),
            clock,
        );
        Self { model, router }
    }

    async fn ask(&self, method: &str, host: Option<&str>, path: &str, cookie: &str) -> Page {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(host) = host {
            request = request.header("host", host);
        }
        if !cookie.is_empty() {
            request = request.header("cookie", cookie);
        }
        let response = self.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Page { status: parts.status, headers: parts.headers, text: String::from_utf8(body.to_vec()).unwrap() }
    }

    /// Opens the link as a browser would and returns the cookie.
    async fn cookie(&self) -> String {
        let page = self.ask("GET", Some("127.0.0.1:1"), &format!("/?token={TOKEN}"), "").await;
        page.header("set-cookie").split(';').next().unwrap().to_owned()
    }

    async fn get(&self, path: &str) -> Page {
        let cookie = self.cookie().await;
        self.ask("GET", Some("127.0.0.1:1"), path, &cookie).await
    }
}

#[tokio::test]
async fn the_link_gives_a_cookie_once_and_leaves_the_address_bar() {
    let console = Console::new();
    let page = console.ask("GET", Some("127.0.0.1:1"), &format!("/?token={TOKEN}"), "").await;
    assert_eq!((page.status, page.header("location")), (StatusCode::SEE_OTHER, "/"));
    let cookie = page.header("set-cookie");
    assert!(cookie.ends_with("; Path=/; HttpOnly; SameSite=Strict"), "{cookie}");
    assert!(!cookie.contains(TOKEN));
    assert_eq!(console.get("/").await.status, StatusCode::OK);
}

#[tokio::test]
async fn without_the_link_nothing_of_the_mesh_is_shown() {
    let console = Console::new();
    let wrong = TOKEN.replace('0', "1");
    for (path, cookie) in [
        ("/".to_owned(), String::new()),
        ("/".to_owned(), format!("palisade_console={TOKEN}")),
        ("/".to_owned(), "palisade_console=".to_owned()),
        (format!("/?token={wrong}"), String::new()),
        ("/?token=".to_owned(), String::new()),
        (format!("/decisions?token={TOKEN}"), String::new()),
        ("/decisions".to_owned(), String::new()),
        ("/decisions/r-2".to_owned(), String::new()),
        ("/metrics".to_owned(), String::new()),
        (format!("/metrics?token={TOKEN}"), String::new()),
        ("/live/overview".to_owned(), String::new()),
        ("/live/decisions".to_owned(), String::new()),
        ("/nowhere".to_owned(), String::new()),
    ] {
        let page = console.ask("GET", Some("127.0.0.1:1"), &path, &cookie).await;
        assert_eq!(page.status, StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(page.header("set-cookie"), "", "{path}");
        assert!(page.text.contains("palisade demo"), "says where to find the link");
        assert!(!page.text.contains("bank.example") && !page.text.contains("alice"), "{path}");
    }
}

#[tokio::test]
async fn who_collects_metrics_shows_the_token_and_gets_nothing_else_by_it() {
    let console = Console::new();
    let ask = async |path: &str, authorization: &str| {
        let request = Request::get(path).header("host", "127.0.0.1:1").header("authorization", authorization);
        let response = console.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let kind = response.headers().get("content-type").map(|kind| kind.to_str().unwrap().to_owned());
        (response.status(), kind.unwrap_or_default())
    };
    let (status, kind) = ask("/metrics", &format!("Bearer {TOKEN}")).await;
    assert_eq!((status, kind.split(';').next()), (StatusCode::OK, Some("application/openmetrics-text")));
    assert_eq!(ask("/", &format!("Bearer {TOKEN}")).await.0, StatusCode::UNAUTHORIZED);
    for wrong in
        [TOKEN.to_owned(), format!("Basic {TOKEN}"), "Bearer ".to_owned(), format!("Bearer {TOKEN}x")]
    {
        assert_eq!(ask("/metrics", &wrong).await.0, StatusCode::UNAUTHORIZED, "{wrong}");
    }
}

#[tokio::test]
async fn another_name_for_this_address_gets_nothing_even_with_the_cookie() {
    let console = Console::new();
    let cookie = console.cookie().await;
    for host in [Some("evil.example"), Some("evil.example:1"), Some("10.0.0.1:1"), None] {
        let page = console.ask("GET", host, "/", &cookie).await;
        assert_eq!(page.status, StatusCode::MISDIRECTED_REQUEST, "{host:?}");
        assert!(!page.text.contains("bank.example"));
        let page = console.ask("GET", host, &format!("/?token={TOKEN}"), "").await;
        assert_eq!((page.status, page.header("set-cookie")), (StatusCode::MISDIRECTED_REQUEST, ""));
    }
    let page = console.ask("GET", Some("127.0.0.1:1"), "http://evil.example/", &cookie).await;
    assert_eq!(page.status, StatusCode::MISDIRECTED_REQUEST);
}

#[tokio::test]
async fn every_answer_has_the_strict_headers_and_nothing_inline() {
    let console = Console::new();
    let cookie = console.cookie().await;
    for (path, cookie) in
        [("/", &*cookie), ("/decisions", &cookie), ("/decisions/r-2", &cookie), ("/x", &cookie), ("/", "")]
    {
        let page = console.ask("GET", Some("localhost"), path, cookie).await;
        let policy = page.header("content-security-policy");
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(page.header("x-content-type-options"), "nosniff");
        assert_eq!(page.header("referrer-policy"), "no-referrer");
        assert_eq!(page.header("cache-control"), "no-store");
        for inline in [" style=", "<style", " onclick=", "javascript:"] {
            assert!(!page.text.contains(inline), "{path} holds {inline}");
        }
        // Script and style come from our own paths only.
        assert_eq!(page.text.matches("<script").count(), 1);
        assert!(page.text.contains(r#"<script src="/assets/console.js" defer></script>"#));
    }
    for (path, kind) in [
        ("/assets/console.css", "text/css; charset=utf-8"),
        ("/assets/console.js", "text/javascript; charset=utf-8"),
        ("/assets/icon.svg", "image/svg+xml"),
    ] {
        let asset = console.ask("GET", Some("[::1]:8"), path, "").await;
        assert_eq!((asset.status, asset.header("content-type")), (StatusCode::OK, kind));
    }
}

#[tokio::test]
async fn the_console_changes_nothing() {
    let console = Console::new();
    let cookie = console.cookie().await;
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
        let page = console.ask(method, Some("127.0.0.1"), "/", &cookie).await;
        assert_eq!(page.status, StatusCode::METHOD_NOT_ALLOWED, "{method}");
    }
}

#[tokio::test]
async fn the_overview_says_what_is_wrong_first() {
    let console = Console::new();
    let page = console.get("/").await.text;
    assert!(page.contains("1 thing to look at"), "the denial: {page}");
    console.model.overview.lock().unwrap().identities[2].expires = NOW - 4;
    let page = console.get("/").await.text;
    let at = |text: &str| page.find(text).unwrap_or_else(|| panic!("{text} is not in {page}"));
    assert!(at("2 things to look at") < at("The identity of service/payments expired 4 s ago"));
    assert!(at("expired 4 s ago") < at("Accounts denied ReadAccount"));
    assert!(at("Accounts denied ReadAccount") < at("<dt>Identities</dt>"));
    console.model.overview.lock().unwrap().identities.remove(2);
    console.model.decisions.lock().unwrap().clear();
    assert!(console.get("/").await.text.contains("Nothing is wrong"));
}

#[tokio::test]
async fn the_overview_says_which_policies_are_in_force_where() {
    let console = Console::new();
    let page = console.get("/").await.text;
    assert!(page.contains("In force: ") && page.contains(&fake::COMMIT[..12]), "{page}");
    assert_eq!(page.matches("as it should be").count(), 3);
    {
        let mut overview = console.model.overview.lock().unwrap();
        let policies = overview.policies.as_mut().unwrap();
        policies.rolling = Some(("b".repeat(40), "25%".to_owned()));
        policies.holders.push(fake::holder("vault", None));
        policies.holders[0].refused = Some("epoch 7: <b>no</b>".to_owned());
    }
    let page = console.get("/").await.text;
    assert!(page.contains("on its way: ") && page.contains("ring 25%"), "{page}");
    assert!(page.contains("refuses epoch 7: &lt;b&gt;no&lt;/b&gt;") && page.contains("everything is denied"));
    assert!(page.contains("vault on demo has no policies"));
    console.model.overview.lock().unwrap().policies = None;
    assert!(!console.get("/").await.text.contains("Policies"));
}

#[tokio::test]
async fn a_denial_leads_to_its_explanation_and_command() {
    let console = Console::new();
    assert!(console.get("/decisions").await.text.contains(r#"href="/decisions/r-2""#));
    let page = console.get("/decisions/r-2").await;
    assert_eq!(page.status, StatusCode::OK);
    assert!(page.text.contains("nearest rule that would allow"));
    assert!(page.text.contains(r#"data-copy="palisade explain r-2""#));
    for unknown in ["/decisions/r-9", &format!("/decisions/{}", "r".repeat(500))] {
        assert_eq!(console.get(unknown).await.status, StatusCode::NOT_FOUND);
    }
}

#[tokio::test]
async fn decisions_are_filtered_by_verdict_and_words() {
    let console = Console::new();
    for (path, shown, hidden) in [
        ("/decisions?verdict=denied", "decisions/r-2\"", "decisions/r-1\""),
        ("/decisions?verdict=allowed", "decisions/r-1\"", "decisions/r-2\""),
        ("/decisions?q=ALICE+%2242%22", "decisions/r-2\"", "decisions/r-1\""),
        ("/decisions?q=nothing", "matches", "decisions/r-"),
    ] {
        let page = console.get(path).await.text;
        assert!(page.contains(shown) && !page.contains(hidden), "{path}");
    }
    // The live stream keeps the page's filter.
    let page = console.get("/decisions?verdict=denied&q=a%26b").await.text;
    assert!(page.contains(r#"data-live="/live/decisions?verdict=denied&amp;q=a%26b""#), "{page}");
    // A search longer than any text, with letters of more than one byte, is cut between letters.
    let long = format!("/decisions?q={}", "%C3%A4".repeat(300));
    assert_eq!(console.get(&long).await.status, StatusCode::OK);
}

#[tokio::test]
async fn what_the_mesh_says_is_text_never_markup() {
    let console = Console::new();
    {
        let mut decisions = console.model.decisions.lock().unwrap();
        decisions[0].user = Some("<script>alert(1)</script>".to_owned());
        decisions[0].objects = vec!["Account::\"<img src=x>\"".to_owned()];
        decisions[0].receipt = "r-2\"><b>".to_owned();
    }
    for path in ["/", "/decisions", "/decisions/r-2%22%3E%3Cb%3E"] {
        let page = console.get(path).await;
        assert_eq!(page.status, StatusCode::OK, "{path}");
        for markup in ["<script>", "<img", "<b>"] {
            assert!(!page.text.contains(markup), "{path} holds {markup}");
        }
    }
}

/// Reads the next event's data from a live stream.
async fn next_event(body: &mut Body) -> String {
    let mut text = String::new();
    while !text.contains("\n\n") {
        let frame = body.frame().await.expect("the stream goes on").unwrap();
        text.push_str(std::str::from_utf8(&frame.into_data().unwrap()).unwrap());
    }
    assert!(text.starts_with("event: fragment\ndata: "), "{text}");
    text
}

#[tokio::test(start_paused = true)]
async fn a_live_page_shows_each_change_without_asking() {
    let console = Console::new();
    let cookie = console.cookie().await;
    let request = Request::builder()
        .uri("/live/decisions?verdict=denied")
        .header("host", "127.0.0.1:1")
        .header("cookie", cookie)
        .body(Body::empty())
        .unwrap();
    let response = console.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut body = response.into_body();
    let first = next_event(&mut body).await;
    assert!(first.contains("r-2") && !first.contains("r-3"));

    let mut decision = fake::read("r-3", "42", NOW, 1);
    assert_eq!(decision.verdict, Verdict::Denied);
    decision.user = Some("two\nlines".to_owned());
    console.model.decisions.lock().unwrap().insert(0, decision);
    console.model.changed();
    let second = next_event(&mut body).await;
    assert!(second.contains("r-3"), "{second}");
    // A line break in the content is a second data line, not the end of the event.
    assert!(second.contains("two\ndata: lines"), "{second}");
}

#[tokio::test]
async fn live_streams_are_bounded_and_given_back() {
    let console = Console::new();
    let cookie = console.cookie().await;
    let open = || {
        let request = Request::builder()
            .uri("/live/overview")
            .header("host", "127.0.0.1:1")
            .header("cookie", &cookie)
            .body(Body::empty())
            .unwrap();
        console.router.clone().oneshot(request)
    };
    let mut held = Vec::new();
    loop {
        let response = open().await.unwrap();
        if response.status() == StatusCode::SERVICE_UNAVAILABLE {
            break;
        }
        held.push(response);
        assert!(held.len() < 1000, "there is no bound");
    }
    held.pop();
    assert_eq!(open().await.unwrap().status(), StatusCode::OK);
}
