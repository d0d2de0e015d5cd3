//! Where this host's workloads serve, for control, and where all others do, from control.
//!
//! A workload's place is its open stream: it is gone with the process. What control said last stays while control is
//! away.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tokio::sync::watch;
use tonic::Status;

use identity::{Scope, SpiffeId};

use super::upstream::{Upstream, describe};
use crate::backoff::Backoff;
use crate::endpoint::{Endpoint, MAX_PER_HOST};
use crate::pb;
use crate::random::SharedRandom;

/// Waits between attempts to open the streams.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What both sides know. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Endpoints {
    /// What workloads of this host say, by the number of their stream.
    here: Arc<watch::Sender<Places>>,
    /// What control said last; `None` until it has said something, which is no reason to forget anybody.
    everywhere: Arc<watch::Sender<Option<Arc<[Endpoint]>>>>,
}

#[derive(Debug, Default)]
struct Places {
    said: BTreeMap<u64, Endpoint>,
    streams: u64,
}

/// One workload's stream; what it said is withdrawn when this is dropped.
pub(super) struct Place {
    here: Arc<watch::Sender<Places>>,
    id: SpiffeId,
    stream: u64,
}

impl Place {
    /// The workload serves there, or asks for no more requests.
    pub(super) fn say(&self, address: SocketAddr, serving: bool) -> Result<(), Status> {
        let endpoint = Endpoint { id: self.id.clone(), address, serving };
        let mut fits = true;
        self.here.send_if_modified(|places| {
            fits = places.said.len() < MAX_PER_HOST || places.said.contains_key(&self.stream);
            fits && places.said.insert(self.stream, endpoint.clone()).as_ref() != Some(&endpoint)
        });
        if fits { Ok(()) } else { Err(Status::resource_exhausted("too many endpoints of one host")) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.here.send_if_modified(|places| places.said.remove(&self.stream).is_some());
    }
}

impl Endpoints {
    /// A workload will say where it serves.
    pub(super) fn announce(&self, id: SpiffeId) -> Place {
        let mut stream = 0;
        self.here.send_if_modified(|places| {
            places.streams += 1;
            stream = places.streams;
            false
        });
        Place { here: Arc::clone(&self.here), id, stream }
    }

    /// Where those with these IDs serve, once control has said, and then at every change, until `scope` drains.
    pub(super) fn of(
        &self,
        wanted: BTreeSet<SpiffeId>,
        scope: Scope,
    ) -> impl Stream<Item = Result<pb::mesh::EndpointsResponse, Status>> + Send + use<> {
        let mut known = self.everywhere.subscribe();
        known.mark_changed();
        let feed = Feed { wanted, known, told: None, scope };
        futures::stream::unfold(Some(feed), |feed| async {
            let mut feed = feed?;
            let outcome = feed.next().await?;
            let feed = outcome.is_ok().then_some(feed);
            Some((outcome, feed))
        })
    }
}

/// One workload that listens.
struct Feed {
    wanted: BTreeSet<SpiffeId>,
    known: watch::Receiver<Option<Arc<[Endpoint]>>>,
    told: Option<Vec<pb::mesh::Endpoint>>,
    scope: Scope,
}

impl Feed {
    async fn next(&mut self) -> Option<Result<pb::mesh::EndpointsResponse, Status>> {
        loop {
            tokio::select! {
                changed = self.known.changed() => changed.ok()?,
                () = self.scope.draining() => return Some(Err(Status::unavailable("the agent is stopping"))),
            }
            let Some(all) = self.known.borrow_and_update().clone() else { continue };
            let wanted = all.iter().filter(|endpoint| self.wanted.contains(&endpoint.id));
            let endpoints: Vec<_> = wanted.map(Endpoint::to_mesh).collect();
            if self.told.as_ref() != Some(&endpoints) {
                self.told = Some(endpoints.clone());
                return Some(Ok(pb::mesh::EndpointsResponse { endpoints }));
            }
        }
    }
}

/// Keeps both streams with control open for as long as the scope lives.
pub(super) async fn exchange(
    endpoints: Endpoints,
    upstream: Arc<Upstream>,
    random: SharedRandom,
    scope: Scope,
) {
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let mut renewed = upstream.renewals();
    loop {
        let ended = tokio::select! {
            ended = tell(&endpoints, &upstream) => ended,
            ended = listen(&endpoints, &upstream, &mut backoff) => ended,
            changed = renewed.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
            () = scope.draining() => return,
        };
        let wait = backoff.wait(&*random);
        let control = upstream.address();
        tracing::debug!(%control, reason = ended, retry_in = ?wait, "no endpoints to and from control");
        tokio::select! {
            () = upstream.clock().sleep(wait) => {}
            () = scope.draining() => return,
        }
    }
}

/// Says to control where this host's workloads serve, at once and at every change; returns why that ended.
async fn tell(endpoints: &Endpoints, upstream: &Upstream) -> String {
    let mut here = endpoints.here.subscribe();
    here.mark_changed();
    let said = futures::stream::unfold(here, |mut here| async {
        here.changed().await.ok()?;
        let endpoints = here.borrow_and_update().said.values().map(Endpoint::to_control).collect();
        Some((pb::control::AnnounceRequest { endpoints }, here))
    });
    match upstream.client().announce(said).await {
        Ok(_) => "control closed the stream".to_owned(),
        Err(status) => describe(&status),
    }
}

/// Hears from control where all serve; returns why that ended.
async fn listen(endpoints: &Endpoints, upstream: &Upstream, backoff: &mut Backoff) -> String {
    let mut stream = match upstream.client().endpoints(pb::control::EndpointsRequest {}).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return describe(&status),
    };
    let before = endpoints.everywhere.borrow().clone();
    while let Some(message) = stream.next().await {
        let pb::control::EndpointsResponse { endpoints: told, complete } = match message {
            Ok(message) => message,
            Err(status) => return describe(&status),
        };
        let told: Option<Vec<Endpoint>> = told.iter().map(Endpoint::of_control).collect();
        let Some(told) = told else { return "control sent a malformed endpoint".to_owned() };
        backoff.reset();
        endpoints.everywhere.send_replace(Some(merged(before.as_deref(), told, complete)));
    }
    "control closed the stream".to_owned()
}

/// What is known after control's message: its own words, and where it has just started what was known before this
/// stream of places that it does not name.
fn merged(before: Option<&[Endpoint]>, mut told: Vec<Endpoint>, complete: bool) -> Arc<[Endpoint]> {
    if let (false, Some(before)) = (complete, before) {
        let named: BTreeSet<(SpiffeId, SocketAddr)> =
            told.iter().map(|endpoint| (endpoint.id.clone(), endpoint.address)).collect();
        let kept = before.iter().filter(|known| !named.contains(&(known.id.clone(), known.address)));
        told.extend(kept.cloned());
    }
    told.sort_unstable();
    told.into()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn id(service: &str) -> SpiffeId {
        SpiffeId::new(&format!("spiffe://bank.example/service/{service}")).unwrap()
    }

    fn endpoint(service: &str, port: u16, serving: bool) -> Endpoint {
        Endpoint { id: id(service), address: SocketAddr::from(([10, 0, 0, 1], port)), serving }
    }

    #[test]
    fn a_control_that_has_just_started_takes_nothing_away() {
        let before = [endpoint("web", 1, true), endpoint("web", 2, true)];
        let told = || vec![endpoint("web", 2, false), endpoint("web", 3, true)];
        let all = [endpoint("web", 1, true), endpoint("web", 2, false), endpoint("web", 3, true)];
        assert_eq!(*merged(Some(&before), told(), false), all);
        assert_eq!(*merged(Some(&before), told(), true), all[1..]);
        assert_eq!(*merged(None, told(), false), all[1..]);
    }

    #[test]
    fn a_place_is_gone_with_its_stream() {
        let endpoints = Endpoints::default();
        let (one, two) = (endpoints.announce(id("web")), endpoints.announce(id("web")));
        one.say("10.0.0.1:1".parse().unwrap(), true).unwrap();
        two.say("10.0.0.1:2".parse().unwrap(), true).unwrap();
        two.say("10.0.0.1:2".parse().unwrap(), false).unwrap();
        let said = || endpoints.here.borrow().said.values().cloned().collect::<Vec<_>>();
        assert_eq!(said(), [endpoint("web", 1, true), endpoint("web", 2, false)]);
        drop(one);
        assert_eq!(said(), [endpoint("web", 2, false)]);
    }

    #[tokio::test]
    async fn a_listener_hears_of_those_it_asked_for_and_of_changes_only() {
        let endpoints = Endpoints::default();
        let mut heard = Box::pin(endpoints.of([id("web")].into(), Scope::new()));
        let mut next =
            || heard.next().now_or_never().map(|message| message.unwrap().unwrap().endpoints.len());
        assert_eq!(next(), None, "nothing until control has said something");
        let say = |all: Vec<Endpoint>| endpoints.everywhere.send_replace(Some(all.into()));
        say(vec![endpoint("accounts", 1, true)]);
        assert_eq!(next(), Some(0));
        say(vec![endpoint("accounts", 2, true)]);
        assert_eq!(next(), None);
        say(vec![endpoint("accounts", 2, true), endpoint("web", 3, true)]);
        assert_eq!(next(), Some(1));
    }
}
