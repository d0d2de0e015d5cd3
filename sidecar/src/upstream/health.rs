//! Asking endpoints whether they are well, over the connections that requests use.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use futures::future::BoxFuture;
use http::header::HOST;

use super::{Failure, Pool, Sent, Unlinked, Upstream};
use crate::BoxError;
use crate::traffic::config::{Check, HealthCheck};
use crate::traffic::endpoint::Member;
use crate::traffic::health::{self, Prober};
use crate::traffic::probe;

struct Asker {
    upstream: Weak<Upstream>,
    check: Check,
}

impl Prober for Asker {
    fn probe(&self, address: SocketAddr) -> BoxFuture<'static, Result<(), BoxError>> {
        let (upstream, check) = (self.upstream.clone(), self.check.clone());
        Box::pin(async move {
            // Gone, with everything that could be asked.
            let Some(upstream) = upstream.upgrade() else { return Ok(()) };
            let member = upstream
                .steering
                .endpoints
                .now()
                .iter()
                .find_map(|(_, member)| (member.address == address).then(|| Arc::clone(member)));
            match member {
                Some(member) => upstream.ask(&member, &check).await,
                None => Ok(()),
            }
        })
    }
}

impl Upstream {
    /// Asks its endpoints for as long as its scope goes on.
    pub(super) fn watch_health(self: &Arc<Self>, check: HealthCheck) {
        let asker = Arc::new(Asker { upstream: Arc::downgrade(self), check: check.check.clone() });
        let (endpoints, dice) = (Arc::clone(&self.steering.endpoints), self.steering.dice.another());
        let (clock, scope) = (self.clock.clone(), self.scope.clone());
        self.scope.spawn("health checks", async move {
            tokio::select! {
                () = health::watch(endpoints, check, asker, clock, dice) => {}
                () = scope.draining() => {}
            }
        });
    }

    async fn ask(&self, member: &Member<Pool>, check: &Check) -> Result<(), BoxError> {
        let identity = self.source.valid_at(self.clock.now()).ok_or("no valid identity of our own yet")?;
        let link = self.link(member, identity.generation).await.map_err(|unlinked| match unlinked {
            Unlinked::Overload(overload) => overload.to_string().into(),
            Unlinked::Dial(cause) => cause,
        })?;
        let Some(question) = probe::question(check)? else { return Ok(()) };
        let (mut head, body) = question.into_parts();
        head.headers.insert(HOST, self.host.clone());
        match self.over(link, &head, body).await {
            Ok(Sent::Answered(response)) => probe::judge(check, response).await,
            Ok(Sent::NotSent(_)) => Err("its connection was closing".into()),
            Err(Failure { error, .. }) => Err(error.into()),
        }
    }
}
