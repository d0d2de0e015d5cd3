//! The console's paths.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue,
    REFERRER_POLICY, SET_COOKIE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use futures::FutureExt as _;
use identity::clock::{SharedClock, SystemClock};
use maud::Markup;
use secrecy::SecretString;
use serde::Deserialize;

use crate::access::{Access, host_is_loopback};
use crate::live::{self, Render, Streams};
use crate::model::ReadModel;
use crate::pages::{self, Filter};

/// How many decisions are searched and shown; beyond that, the command line.
const DECISIONS_SHOWN_MAX: usize = 200;
/// A receipt id is far shorter; longer ones are not looked up.
const RECEIPT_BYTES_MAX: usize = 128;
/// Longer search words match nothing anyway.
const SEARCH_BYTES_MAX: usize = 128;

/// Everything from our own origin, and nothing else; no inline script or style.
const CONTENT_SECURITY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
    img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

const STYLE: &str = include_str!("../assets/console.css");
const SCRIPT: &str = include_str!("../assets/console.js");
const ICON: &str = include_str!("../assets/icon.svg");

/// The console, to be served on a loopback address: `http://ADDRESS/?token=TOKEN` opens it.
///
/// Without the token or the cookie that it is exchanged for, every page answers 401; addressed by
/// another than a loopback name, 421. A token of fewer than 22 bytes opens nothing. `/metrics` takes
/// the token as `Authorization: Bearer`, as who collects metrics sends it.
pub fn router(model: Arc<dyn ReadModel>, token: SecretString) -> Router {
    router_with_clock(model, token, SystemClock::shared())
}

/// [`router`], telling time by `clock`.
pub fn router_with_clock(model: Arc<dyn ReadModel>, token: SecretString, clock: SharedClock) -> Router {
    let console = Console { model, clock, access: Arc::new(Access::new(token)), streams: Streams::default() };
    Router::new()
        .route("/", get(overview))
        .route("/decisions", get(decisions))
        .route("/decisions/{receipt}", get(decision))
        .route("/metrics", get(metrics))
        .route("/live/overview", get(live_overview))
        .route("/live/decisions", get(live_decisions))
        .fallback(|| async { problem(StatusCode::NOT_FOUND, "There is no such page", "") })
        .layer(middleware::from_fn_with_state(console.clone(), only_with_the_link))
        .route("/assets/console.css", get(|| async { asset("text/css; charset=utf-8", STYLE) }))
        .route("/assets/console.js", get(|| async { asset("text/javascript; charset=utf-8", SCRIPT) }))
        .route("/assets/icon.svg", get(|| async { asset("image/svg+xml", ICON) }))
        .layer(middleware::from_fn(guard))
        .with_state(console)
}

#[derive(Clone)]
struct Console {
    model: Arc<dyn ReadModel>,
    clock: SharedClock,
    access: Arc<Access>,
    streams: Streams,
}

impl Console {
    async fn overview(&self) -> Markup {
        let (overview, recent) =
            futures::join!(self.model.overview(), self.model.decisions(DECISIONS_SHOWN_MAX));
        pages::overview_fragment(&overview, &recent, self.clock.now_seconds())
    }

    async fn decisions(&self, filter: &Filter) -> Markup {
        let rows = self.model.decisions(DECISIONS_SHOWN_MAX).await;
        pages::decisions_fragment(&rows, filter, self.clock.now_seconds())
    }

    fn live(&self, render: Render) -> Response {
        match self.streams.take() {
            Some(place) => live::stream(self.model.changes(), render, place).into_response(),
            None => (StatusCode::SERVICE_UNAVAILABLE, "too many open pages\n").into_response(),
        }
    }
}

/// What holds for every answer: whom we answer at all, and what a browser may do with it.
async fn guard(request: Request, next: Next) -> Response {
    let mut response = if !host_is_loopback(request.headers(), request.uri()) {
        problem(
            StatusCode::MISDIRECTED_REQUEST,
            "Not reachable under this name",
            "The console answers to 127.0.0.1, [::1] and localhost only.",
        )
    } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
        problem(StatusCode::METHOD_NOT_ALLOWED, "The console is for reading only", "")
    } else {
        next.run(request).await
    };
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, CONTENT_SECURITY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response.headers_mut().entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

#[derive(Debug, Deserialize)]
struct Link {
    token: Option<String>,
}

/// Lets through who has the cookie, and gives it to who comes by the link.
async fn only_with_the_link(State(console): State<Console>, request: Request, next: Next) -> Response {
    let link = Query::<Link>::try_from_uri(request.uri()).ok().and_then(|Query(link)| link.token);
    if request.uri().path() == "/"
        && let Some(token) = link
    {
        // The redirect takes the token out of the address bar and the history.
        return match HeaderValue::from_str(&console.access.set_cookie()) {
            Ok(cookie) if console.access.is_token(&token) => {
                let mut response = Redirect::to("/").into_response();
                response.headers_mut().insert(SET_COOKIE, cookie);
                response
            }
            _ => no_link(),
        };
    }
    let collects = request.uri().path() == "/metrics"
        && bearer(request.headers()).is_some_and(|token| console.access.is_token(token));
    if collects || console.access.has_cookie(request.headers()) { next.run(request).await } else { no_link() }
}

/// The token of a request that is no browser's (RFC 6750 §2.1).
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

async fn metrics(State(console): State<Console>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], console.model.metrics().await).into_response()
}

fn no_link() -> Response {
    (StatusCode::UNAUTHORIZED, pages::no_link()).into_response()
}

fn problem(status: StatusCode, what: &str, more: &str) -> Response {
    (status, pages::problem(what, more)).into_response()
}

async fn overview(State(console): State<Console>) -> Markup {
    pages::overview(&console.overview().await)
}

async fn live_overview(State(console): State<Console>) -> Response {
    let model = console.clone();
    console.live(Arc::new(move || {
        let console = model.clone();
        async move { console.overview().await }.boxed()
    }))
}

#[derive(Debug, Deserialize)]
struct FilterQuery {
    #[serde(default)]
    verdict: String,
    #[serde(default)]
    q: String,
}

impl From<FilterQuery> for Filter {
    fn from(query: FilterQuery) -> Self {
        let mut words = query.q.trim().to_owned();
        while words.len() > SEARCH_BYTES_MAX {
            words.pop();
        }
        Self::new(&query.verdict, words)
    }
}

async fn decisions(State(console): State<Console>, Query(query): Query<FilterQuery>) -> Markup {
    let filter = Filter::from(query);
    pages::decisions(&console.decisions(&filter).await, &filter)
}

async fn live_decisions(State(console): State<Console>, Query(query): Query<FilterQuery>) -> Response {
    let filter = Arc::new(Filter::from(query));
    let model = console.clone();
    console.live(Arc::new(move || {
        let (console, filter) = (model.clone(), Arc::clone(&filter));
        async move { console.decisions(&filter).await }.boxed()
    }))
}

async fn decision(State(console): State<Console>, Path(receipt): Path<String>) -> Response {
    let detail =
        if receipt.len() <= RECEIPT_BYTES_MAX { console.model.decision(&receipt).await } else { None };
    match detail {
        Some(detail) => pages::decision(&detail).into_response(),
        None => problem(
            StatusCode::NOT_FOUND,
            "No decision with this receipt",
            "Receipts are kept for a while only; an older one may be in the service's access log.",
        ),
    }
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    // Revalidated by asking again: it is small, loopback is near, and an upgrade shows at once.
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-cache")], text).into_response()
}
