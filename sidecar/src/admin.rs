//! The admin port: `/ready`, `/live`, `/metrics`, `/debug`. Loopback only.

use std::sync::Arc;

use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use identity::clock::SharedClock;
use identity::{IdentitySource, Scope, SpiffeId};

use crate::app_health::AppHealth;
use crate::debug::{self, Debug};
use crate::metrics::Metrics;
use crate::server::{Connection, Handler};
use crate::{Body, answer, full};

/// What the admin port answers from.
pub struct Admin {
    pub(crate) id: SpiffeId,
    pub(crate) source: IdentitySource,
    pub(crate) app_health: Option<Arc<AppHealth>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: SharedClock,
    pub(crate) scope: Scope,
    pub(crate) debug: Debug,
}

impl Handler for Admin {
    async fn handle(self: Arc<Self>, connection: Arc<Connection>, request: Request<Body>) -> Response<Body> {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/live") => answer::json(StatusCode::OK, r#"{"live":true}"#),
            (&Method::GET, "/ready") => self.ready(),
            (&Method::GET, "/metrics") => self.metrics(),
            (&Method::GET, path) if debug::is_page(path) => self.debug.answer(connection.remote, &request),
            _ => answer::json(StatusCode::NOT_FOUND, r#"{"error":"not_found"}"#),
        }
    }
}

impl Admin {
    /// Ready: the identity that was configured has arrived and is valid, the app is well as far as it is asked, and no
    /// drain has begun.
    fn ready(&self) -> Response<Body> {
        let why = if self.scope.is_draining() {
            Some("draining".to_owned())
        } else {
            match self.source.valid_at(self.clock.now()) {
                None => Some("no valid identity from the agent yet".to_owned()),
                Some(identity) if *identity.svid.id() != self.id => {
                    Some(format!("the agent gave {}, expected {}", identity.svid.id(), self.id))
                }
                Some(_) if self.app_health.as_ref().is_some_and(|app| !app.is_well()) => {
                    Some("the app is not well".to_owned())
                }
                Some(_) => None,
            }
        };
        let status = if why.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let body = serde_json::json!({ "ready": why.is_none(), "spiffe_id": self.id, "why": why });
        answer::json(status, body.to_string())
    }

    fn metrics(&self) -> Response<Body> {
        let mut response = Response::new(full(self.metrics.render()));
        let openmetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(openmetrics));
        response
    }
}
