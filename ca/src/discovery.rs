//! The client with which a workload says where it serves, and hears where others do: by its agent, and so by control.
//!
//! A mesh whose services come and go, or move, needs no list of addresses with it: `announce` is its sidecars', `follow`
//! that of those who call them. Both outlive restarts of agent and control; what was heard last holds meanwhile.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::watch;

use identity::clock::SharedClock;
use identity::workload_api;
use identity::{Scope, SpiffeId};

use crate::backoff::Backoff;
use crate::endpoint::Endpoint;
use crate::pb::mesh as pb;
use crate::pb::mesh::mesh_client::MeshClient;
use crate::random::SystemRandom;

const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// One place where a workload serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub address: SocketAddr,
    /// False if it asks for no more requests, or its host has not been heard of for a while.
    pub serving: bool,
}

/// Whose places are wanted, and who is told all of them, at once and at every change.
pub struct Wanted {
    /// Whose.
    pub id: SpiffeId,
    /// Who is told.
    pub tell: Box<dyn Fn(Vec<Found>) + Send + Sync>,
}

impl fmt::Debug for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wanted").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Says by the agent at `socket` that this workload serves at `address` and whether it takes requests, until `scope`
/// drains: then it is withdrawn, before listeners close.
pub fn announce(
    socket: PathBuf,
    address: SocketAddr,
    serving: watch::Receiver<bool>,
    clock: SharedClock,
    scope: &Scope,
) {
    let draining = scope.clone();
    scope.spawn_critical("announcement", async move {
        let random = SystemRandom::shared();
        let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
        let mut client = MeshClient::new(workload_api::channel(&socket));
        loop {
            let began = clock.now();
            let mut serving = serving.clone();
            serving.mark_changed();
            let said = futures::stream::unfold(serving, move |mut serving| async move {
                // Once nobody can change it any more it stays as it is.
                if serving.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
                let takes = *serving.borrow_and_update();
                Some((pb::AnnounceRequest { address: address.to_string(), serving: takes }, serving))
            });
            let ended = tokio::select! {
                ended = client.announce(workload_api::request(said)) => ended,
                () = draining.draining() => return,
            };
            if clock.now().saturating_sub(began) > BACKOFF.1 {
                backoff.reset();
            }
            let wait = backoff.wait(&*random);
            let error = ended.err().map(|status| status.message().to_owned());
            tracing::debug!(error, retry_in = ?wait, "where this workload serves is announced anew");
            tokio::select! {
                () = clock.sleep(wait) => {}
                () = draining.draining() => return,
            }
        }
    });
}

/// Hears from the agent at `socket` where those that are `wanted` serve, until `scope` drains.
pub fn follow(socket: PathBuf, wanted: Vec<Wanted>, clock: SharedClock, scope: &Scope) {
    let draining = scope.clone();
    scope.spawn_critical("discovery", async move {
        let random = SystemRandom::shared();
        let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
        let mut client = MeshClient::new(workload_api::channel(&socket));
        loop {
            let error = tokio::select! {
                error = listen(&mut client, &wanted, &mut backoff) => error,
                () = draining.draining() => return,
            };
            let wait = backoff.wait(&*random);
            tracing::debug!(error, retry_in = ?wait, "the agent does not say where others serve");
            tokio::select! {
                () = clock.sleep(wait) => {}
                () = draining.draining() => return,
            }
        }
    });
}

/// One stream, to its end; returns why it ended.
async fn listen(
    client: &mut MeshClient<tonic::transport::Channel>,
    wanted: &[Wanted],
    backoff: &mut Backoff,
) -> String {
    let spiffe_ids = wanted.iter().map(|wanted| wanted.id.to_string()).collect();
    let request = workload_api::request(pb::EndpointsRequest { spiffe_ids });
    let mut stream = match client.endpoints(request).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return status.message().to_owned(),
    };
    while let Some(message) = stream.next().await {
        let endpoints = match message {
            Ok(message) => message.endpoints,
            Err(status) => return status.message().to_owned(),
        };
        let mut found: HashMap<SpiffeId, Vec<Found>> = HashMap::new();
        for endpoint in &endpoints {
            let Some(Endpoint { id, address, serving }) = Endpoint::of_mesh(endpoint) else {
                return "the agent sent a malformed endpoint".to_owned();
            };
            found.entry(id).or_default().push(Found { address, serving });
        }
        backoff.reset();
        for Wanted { id, tell } in wanted {
            tell(found.get(id).cloned().unwrap_or_default());
        }
    }
    "the agent closed the stream".to_owned()
}
