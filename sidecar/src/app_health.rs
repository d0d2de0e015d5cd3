//! Whether the app is well, by asking it: for `/ready` and `/metrics`. Requests go to it all the same, and their callers
//! see what it answers.

use std::net::SocketAddr;
use std::sync::Arc;

use futures::future::BoxFuture;
use http::HeaderValue;
use http::header::HOST;
use identity::Scope;
use identity::clock::SharedClock;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::app::{App, AppProtocol};
use crate::traffic::config::{Check, HealthCheck};
use crate::traffic::health::{self, Prober};
use crate::traffic::probe;
use crate::traffic::random::Dice;
use crate::{BoxError, dial};

/// What is known of the app.
#[derive(Debug, Default)]
pub(crate) struct AppHealth {
    well: watch::Sender<bool>,
}

impl AppHealth {
    /// Asks the app at `address` until `scope` drains. It counts as ill until it first answers well.
    pub(crate) fn watch(
        address: SocketAddr,
        protocol: AppProtocol,
        check: HealthCheck,
        registry: &mut Registry,
        clock: SharedClock,
        dice: Dice,
        scope: &Scope,
    ) -> Result<Arc<Self>, http::uri::InvalidUri> {
        let app = Arc::new(App::new(address, protocol, check.timeout, clock.clone(), scope)?);
        let asker = Arc::new(Asker { app, check: check.check.clone() });
        let (known, healthy) = (Arc::new(Self::default()), <Gauge>::default());
        registry.register("app_healthy", "Whether the app answers well, as last asked", healthy.clone());
        let (told, draining) = (Arc::clone(&known), scope.clone());
        scope.spawn("app health", async move {
            let changed = |well| {
                told.well.send_replace(well);
                healthy.set(well.into());
            };
            tokio::select! {
                () = health::watch_app(address, check, asker, clock, dice, changed) => {}
                () = draining.draining() => {}
            }
        });
        Ok(known)
    }

    pub(crate) fn is_well(&self) -> bool {
        *self.well.borrow()
    }

    /// The same, now and at every change.
    pub(crate) fn follow(&self) -> watch::Receiver<bool> {
        self.well.subscribe()
    }
}

struct Asker {
    app: Arc<App>,
    check: Check,
}

impl Prober for Asker {
    fn probe(&self, address: SocketAddr) -> BoxFuture<'static, Result<(), BoxError>> {
        let (app, check) = (Arc::clone(&self.app), self.check.clone());
        Box::pin(async move {
            let Some(mut question) = probe::question(&check)? else {
                return Ok(dial::connect(address).await.map(drop)?);
            };
            question.headers_mut().insert(HOST, HeaderValue::try_from(address.to_string())?);
            probe::judge(&check, app.send(question).await?).await
        })
    }
}
