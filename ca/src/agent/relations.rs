//! Relations on their way between workloads and control. The agent says who a workload is, and keeps nothing: how old a
//! copy is, control and the sidecar that has it settle between them.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use identity::Scope;
use identity::clock::SharedClock;

use super::upstream::{Upstream, within};
use crate::pb::control as control_pb;
use crate::pb::mesh as pb;

/// Longest wait for control's answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages that wait for a workload.
const QUEUE: usize = 4;
/// How long a workload may leave them waiting. They would wait in the one connection that all streams of this host share.
const PATIENCE: Duration = Duration::from_secs(10);
/// Streams of a host: control takes some more on a connection.
const MAX_OF_A_HOST: usize = 900;

/// The way to control's relations, once there is one. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Relations {
    upstream: Arc<OnceLock<Arc<Upstream>>>,
    slots: Arc<Semaphore>,
    clock: SharedClock,
}

impl Relations {
    pub(super) fn new(clock: SharedClock) -> Self {
        Self { upstream: Arc::default(), slots: Arc::new(Semaphore::new(MAX_OF_A_HOST)), clock }
    }

    /// Control is reached so from now on.
    pub(super) fn reach(&self, upstream: Arc<Upstream>) {
        // The agent starts once.
        let _known = self.upstream.set(upstream).is_err();
    }

    fn upstream(&self) -> Result<&Arc<Upstream>, Status> {
        self.upstream.get().ok_or_else(|| Status::unavailable("the agent is starting"))
    }

    /// Writes for the workload of this ID.
    pub(super) async fn write(
        &self,
        spiffe_id: String,
        request: pb::WriteRelationsRequest,
    ) -> Result<pb::WriteRelationsResponse, Status> {
        let mut client = self.upstream()?.client();
        let request = control_pb::WriteRelationsRequest { spiffe_id, request: Some(request) };
        let answer = within(&self.clock, CALL_TIMEOUT, client.write_relations(request)).await;
        answer.map(tonic::Response::into_inner).map_err(|status| of_control(&status))
    }

    /// What control says to the workload of this ID.
    pub(super) async fn stream(
        &self,
        spiffe_id: String,
        said: Streaming<pb::RelationsRequest>,
        scope: &Scope,
    ) -> Result<impl Stream<Item = Result<pb::RelationsResponse, Status>> + Send + use<>, Status> {
        let slot = Arc::clone(&self.slots).try_acquire_owned();
        let slot = slot.map_err(|_| Status::resource_exhausted("too many streams of relations"))?;
        let mut client = self.upstream()?.client();
        // An error is a stream's last word.
        let said = said.filter_map(move |request| {
            let spiffe_id = spiffe_id.clone();
            let named = request
                .ok()
                .map(|request| control_pb::RelationsRequest { spiffe_id, request: Some(request) });
            futures::future::ready(named)
        });
        let mut told = within(&self.clock, CALL_TIMEOUT, client.relations(said))
            .await
            .map_err(|status| of_control(&status))?
            .into_inner();
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (clock, draining) = (Arc::clone(&self.clock), scope.clone());
        scope.spawn("relations of a workload", async move {
            let _slot = slot;
            loop {
                let message = tokio::select! {
                    message = told.message() => message.map_err(|status| of_control(&status)),
                    () = sender.closed() => return,
                    () = draining.draining() => Err(Status::unavailable("the agent is stopping")),
                };
                let Some(message) = message.transpose() else { return };
                let over = message.is_err();
                tokio::select! {
                    sent = sender.send(message) => if sent.is_err() || over { return },
                    () = clock.sleep(PATIENCE) => {
                        tracing::warn!("a workload does not take its relations: its stream is ended");
                        return;
                    }
                }
            }
        });
        Ok(ReceiverStream::new(receiver))
    }
}

/// Control's words, without what tonic adds of the connection between.
fn of_control(status: &Status) -> Status {
    Status::new(status.code(), status.message())
}
