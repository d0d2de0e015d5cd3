//! The agent's Unix socket: the SPIFFE Workload API and the mesh service, each for attested callers.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::Stream;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use identity::clock::SharedClock;
use identity::served::Served;
use identity::workload_api::SECURITY_HEADER;
use identity::workload_api::proto;
use identity::workload_api::proto::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use identity::{Scope, SpiffeId, TrustDomain, X509Svid, socket};

use super::Redactor;
use super::attest::{AttestError, Attestor, Process, Unattested};
use super::authority_header::AnyAuthority;
use super::decisions::Queue;
use super::endpoints::Endpoints;
use super::policies::Policies;
use super::refusal::{RefusalReason, Refusals};
use super::relations::Relations;
use super::rotation::Svids;
use super::upstream::HostView;
use crate::control;
use crate::endpoint;
use crate::pb::mesh as pb;
use crate::pb::mesh::mesh_server::{Mesh, MeshServer};
use crate::transport::ACCEPT_PAUSE;

/// Connections at once: a host's workloads, each with a few.
const MAX_CONNECTIONS: usize = 4_096;
/// Connections at once of one user, so that one cannot shut out the others.
const MAX_CONNECTIONS_PER_UID: usize = 1_024;
/// Executables looked at at once: hashing is disk and CPU.
const MAX_INSPECTIONS: usize = 4;
/// Connections that wait for tonic to take them.
const ACCEPT_QUEUE: usize = 64;
/// Streams at once on a connection: a workload needs a handful.
const MAX_STREAMS: u32 = 32;
/// Longest request headers.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Largest request: a full batch of decisions.
const MAX_REQUEST_BYTES: usize = 1024 * 1024;
/// How long a first answer waits for an SVID that is being signed, before it says `Unavailable`.
const FIRST_SVID_PATIENCE: Duration = Duration::from_secs(5);

/// What the socket serves from.
#[derive(Debug, Clone)]
pub(super) struct Local {
    pub(super) trust_domain: TrustDomain,
    pub(super) view: watch::Receiver<Option<Arc<HostView>>>,
    pub(super) svids: watch::Receiver<Arc<Svids>>,
    pub(super) queue: Arc<Queue>,
    pub(super) endpoints: Endpoints,
    pub(super) policies: Policies,
    pub(super) relations: Relations,
    pub(super) redactor: Option<Arc<dyn Redactor>>,
    pub(super) refusals: Arc<Refusals>,
    pub(super) clock: SharedClock,
    pub(super) scope: Scope,
}

/// What attestation made of a connection's peer.
type Attested = Arc<Result<Process, Unattested>>;

/// A connection whose peer has been looked at.
type LocalConnection = Served<AnyAuthority<UnixStream>, Attested>;

/// What each user has open.
#[derive(Debug, Default, Clone)]
struct Users(Arc<Mutex<HashMap<u32, User>>>);

#[derive(Debug, Default)]
struct User {
    connections: usize,
    /// One executable of a user is looked at at a time: a user with many large ones waits for itself,
    /// and what many processes share is hashed once.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// One connection of a user, counted while it lives.
struct UserSlot {
    users: Users,
    uid: u32,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Users {
    fn enter(&self, uid: u32) -> Option<UserSlot> {
        let mut users = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let user = users.entry(uid).or_default();
        if user.connections >= MAX_CONNECTIONS_PER_UID {
            return None;
        }
        user.connections += 1;
        Some(UserSlot { users: self.clone(), uid, turn: Arc::clone(&user.turn) })
    }
}

impl Drop for UserSlot {
    fn drop(&mut self) {
        let mut users = self.users.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(user) = users.get_mut(&self.uid) {
            user.connections = user.connections.saturating_sub(1);
            if user.connections == 0 {
                users.remove(&self.uid);
            }
        }
    }
}

/// Accepts connections until the scope drains and attests each one's peer before it may speak.
pub(super) fn accept(
    listener: UnixListener,
    attestor: Attestor,
    clock: SharedClock,
    scope: &Scope,
) -> mpsc::Receiver<io::Result<LocalConnection>> {
    let (sender, receiver) = mpsc::channel(ACCEPT_QUEUE);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let inspections = Arc::new(Semaphore::new(MAX_INSPECTIONS));
    let users = Users::default();
    let tasks = scope.clone();
    scope.spawn_critical("workload accept loop", async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = tasks.draining() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    clock.sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let credentials = attestor.credentials(&stream);
            let peer = stream.peer_cred().ok();
            let uid = peer.map_or(u32::MAX, |peer| peer.uid());
            let (Ok(slot), Some(user)) = (Arc::clone(&slots).try_acquire_owned(), users.enter(uid)) else {
                tracing::warn!(uid, "too many connections; refused");
                continue;
            };
            let (attestor, sender, inspections) =
                (attestor.clone(), sender.clone(), Arc::clone(&inspections));
            tasks.spawn("attestation of a workload", async move {
                let own_turn = Arc::clone(&user.turn).lock_owned().await;
                let Ok(turn) = inspections.acquire_owned().await else { return };
                let outcome = match credentials {
                    Ok(peer) => tokio::task::spawn_blocking(move || attestor.inspect(peer))
                        .await
                        .unwrap_or(Err(AttestError::Proc)),
                    Err(error) => Err(error),
                };
                let attested = Arc::new(outcome.map_err(|error| Unattested {
                    error,
                    pid: peer.and_then(|peer| peer.pid()),
                    uid: peer.map(|peer| peer.uid()),
                    gid: peer.map(|peer| peer.gid()),
                }));
                let connection = Served::new(AnyAuthority::new(stream), attested, (slot, user));
                drop((turn, own_turn));
                // A closed queue means that the server is stopping.
                let _stopping = sender.send(Ok(connection)).await.is_err();
            });
        }
    });
    receiver
}

/// Serves until the scope drains, then removes the socket.
pub(super) async fn serve(
    local: Local,
    connections: mpsc::Receiver<io::Result<LocalConnection>>,
    path: PathBuf,
) {
    let scope = local.scope.clone();
    let (_, health) = tonic_health::server::health_reporter();
    let outcome = tonic::transport::Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .add_service(
            SpiffeWorkloadApiServer::new(WorkloadService(local.clone()))
                .max_decoding_message_size(MAX_REQUEST_BYTES),
        )
        .add_service(MeshServer::new(MeshService(local)).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(health)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), async move { scope.draining().await })
        .await;
    if let Err(error) = outcome {
        tracing::error!(%error, "the workload API failed");
    }
    socket::remove(&path);
}

/// The standard's guard against a browser or proxy that was talked into calling (WE §6): the metadata
/// exactly once and exactly `true`.
fn check_header<T>(request: &Request<T>) -> Result<(), Status> {
    let mut values = request.metadata().get_all(SECURITY_HEADER).iter();
    match (values.next(), values.next()) {
        (Some(value), None) if value.as_bytes() == b"true" => Ok(()),
        _ => Err(Status::invalid_argument("the metadata \"workload.spiffe.io: true\" is needed, once")),
    }
}

/// What attestation made of the peer.
fn attested<T>(request: &Request<T>) -> Result<Attested, Status> {
    let attested = request.extensions().get::<Attested>().cloned();
    attested.ok_or_else(|| Status::internal("no connection information"))
}

impl Local {
    /// The peer's process, alive. One that could not be attested, or is gone, has no identity: a socket can
    /// outlive the process that opened it, in a child; an identity cannot.
    fn process<'a>(&self, method: &'static str, attested: &'a Attested) -> Result<&'a Process, Status> {
        let now = self.refusals.now();
        match attested.as_ref() {
            Ok(process) if process.is_alive() => Ok(process),
            Ok(process) => {
                let gone =
                    RefusalReason::NotAttested("the process that opened the socket is gone".to_owned());
                Err(self.refusals.refuse(&process.refused(method, gone, Vec::new(), now)))
            }
            Err(unattested) => Err(self.refusals.refuse(&unattested.refused(method, now))),
        }
    }

    /// Decisions without the people in them, where that is wanted; those that cannot be read are left out.
    fn redacted(&self, decisions: Vec<pb::Decision>) -> Result<Vec<pb::Decision>, Status> {
        let Some(redactor) = &self.redactor else { return Ok(decisions) };
        let view = self.view.borrow().clone();
        let key = view.as_ref().map(|view| view.pseudonym_key.as_slice()).filter(|key| !key.is_empty());
        // They wait in the workload until there is one.
        let key = key.ok_or_else(|| Status::unavailable("control has not given a key for pseudonyms"))?;
        let redact = |decision: pb::Decision| {
            let json = redactor.redact(key, &decision.json)?;
            Some(pb::Decision { json, ..decision })
        };
        Ok(decisions.into_iter().filter_map(redact).collect())
    }

    /// The status for a process that no entry matches.
    fn no_entry(&self, method: &'static str, process: &Process, view: &HostView) -> Status {
        let near = process.near_misses(view);
        let now = self.refusals.now();
        self.refusals.refuse(&process.refused(method, RefusalReason::NoMatchingEntry, near, now))
    }
}

/// The SPIFFE Workload API.
#[derive(Debug)]
struct WorkloadService(Local);

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl WorkloadService {
    fn stream<T, M>(
        &self,
        request: &Request<T>,
        make: M,
    ) -> Result<Response<ResponseStream<M::Message>>, Status>
    where
        M: Make + Send + 'static,
        M::Message: Send + 'static,
    {
        check_header(request)?;
        let attested = attested(request)?;
        self.0.process(M::METHOD, &attested)?;
        let feed = Feed { local: self.0.clone(), attested, make, last: None, logged: false, over: false };
        Ok(Response::new(Box::pin(futures::stream::unfold(feed, Feed::next))))
    }

    fn no_jwt<T, A>(request: &Request<T>) -> Result<Response<A>, Status> {
        check_header(request)?;
        Err(Status::unimplemented("this agent gives X.509-SVIDs only: use FetchX509SVID"))
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadService {
    type FetchX509SVIDStream = ResponseStream<proto::X509svidResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<proto::X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.stream(&request, MakeSvids)
    }

    type FetchX509BundlesStream = ResponseStream<proto::X509BundlesResponse>;

    async fn fetch_x509_bundles(
        &self,
        request: Request<proto::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.stream(&request, MakeBundles)
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<proto::JwtsvidRequest>,
    ) -> Result<Response<proto::JwtsvidResponse>, Status> {
        Self::no_jwt(&request)
    }

    type FetchJWTBundlesStream = ResponseStream<proto::JwtBundlesResponse>;

    async fn fetch_jwt_bundles(
        &self,
        request: Request<proto::JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        Self::no_jwt(&request)
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<proto::ValidateJwtsvidRequest>,
    ) -> Result<Response<proto::ValidateJwtsvidResponse>, Status> {
        Self::no_jwt(&request)
    }
}

/// Makes one kind of message from what a caller may have.
trait Make {
    /// The call that it answers, for the records of refusals.
    const METHOD: &'static str;
    type Message;
    /// `None` if there is nothing to say yet. The text tells one message from the next, without keys.
    fn make(
        &self,
        domain: &TrustDomain,
        view: &HostView,
        svids: &[Arc<X509Svid>],
    ) -> Option<(String, Self::Message)>;
}

struct MakeSvids;

impl Make for MakeSvids {
    const METHOD: &'static str = "FetchX509SVID";
    type Message = proto::X509svidResponse;

    fn make(
        &self,
        _: &TrustDomain,
        view: &HostView,
        svids: &[Arc<X509Svid>],
    ) -> Option<(String, Self::Message)> {
        if svids.is_empty() {
            return None;
        }
        let bundle = view.bundle.concatenated();
        let mut text = crate::hex::sha256(&bundle);
        for svid in svids {
            text.push('/');
            text.push_str(svid.serial());
        }
        let svids = svids
            .iter()
            .map(|svid| proto::X509svid {
                spiffe_id: svid.id().to_string(),
                x509_svid: svid.chain().iter().flat_map(|der| der.iter().copied()).collect(),
                x509_svid_key: svid.key_pkcs8().to_vec(),
                bundle: bundle.clone(),
                hint: String::new(),
            })
            .collect();
        Some((text, proto::X509svidResponse { svids, ..Default::default() }))
    }
}

struct MakeBundles;

impl Make for MakeBundles {
    const METHOD: &'static str = "FetchX509Bundles";
    type Message = proto::X509BundlesResponse;

    fn make(
        &self,
        domain: &TrustDomain,
        view: &HostView,
        _: &[Arc<X509Svid>],
    ) -> Option<(String, Self::Message)> {
        let bundle = view.bundle.concatenated();
        let text = crate::hex::sha256(&bundle);
        let bundles = [(domain.id_string(), bundle)].into();
        Some((text, proto::X509BundlesResponse { bundles, ..Default::default() }))
    }
}

/// One open stream to a workload.
struct Feed<M> {
    local: Local,
    attested: Attested,
    make: M,
    last: Option<String>,
    logged: bool,
    over: bool,
}

impl<M: Make> Feed<M> {
    /// The next message: at once the first time, then at every change that concerns the caller. The
    /// stream ends with an error when the caller's entry goes away, or the agent does.
    async fn next(mut self) -> Option<(Result<M::Message, Status>, Self)> {
        if self.over {
            return None;
        }
        let outcome = self.wait().await;
        self.over = outcome.is_err();
        Some((outcome, self))
    }

    async fn wait(&mut self) -> Result<M::Message, Status> {
        let attested = Arc::clone(&self.attested);
        let patience = self.local.clock.sleep(FIRST_SVID_PATIENCE);
        tokio::pin!(patience);
        loop {
            let process = self.local.process(M::METHOD, &attested)?;
            let view = self.local.view.borrow_and_update().clone();
            let view = view.ok_or_else(|| Status::unavailable("the agent is starting"))?;
            let svids = self.local.svids.borrow_and_update().clone();
            let matching = process.matching(&view);
            if matching.is_empty() {
                return Err(self.local.no_entry(M::METHOD, process, &view));
            }
            self.log(process, &matching);
            let now = self.local.clock.now();
            let svids: Vec<_> = matching
                .iter()
                .filter_map(|entry| svids.get(&entry.entry_id))
                .filter(|svid| now < svid.not_after())
                .cloned()
                .collect();
            if let Some((text, message)) = self.make.make(&self.local.trust_domain, &view, &svids)
                && self.last.as_ref() != Some(&text)
            {
                self.last = Some(text);
                return Ok(message);
            }
            // The watches' writers live as long as the agent's tasks.
            let stopping = |_| Status::unavailable("the agent is stopping");
            tokio::select! {
                changed = self.local.view.changed() => changed.map_err(stopping)?,
                changed = self.local.svids.changed() => changed.map_err(stopping)?,
                () = self.local.scope.draining() => return Err(Status::unavailable("the agent is stopping")),
                () = &mut patience, if self.last.is_none() => {
                    return Err(Status::unavailable("no identity could be signed yet"));
                }
            }
        }
    }

    fn log(&mut self, process: &Process, matching: &[&super::upstream::LocalEntry]) {
        if std::mem::replace(&mut self.logged, true) {
            return;
        }
        for entry in matching {
            let by = entry.selectors.describe();
            tracing::info!(id = %entry.id, pid = process.pid, uid = process.uid, by, "workload attested");
        }
    }
}

/// The mesh service's calls, for the records of refusals.
const REPORT: &str = "Mesh.Report";
const ANNOUNCE: &str = "Mesh.Announce";
const ENDPOINTS: &str = "Mesh.Endpoints";
const POLICIES: &str = "Mesh.Policies";
const WRITE_RELATIONS: &str = "Mesh.WriteRelations";
const RELATIONS: &str = "Mesh.Relations";

/// The mesh service.
#[derive(Debug)]
struct MeshService(Local);

impl MeshService {
    /// Who calls.
    fn caller<T>(&self, method: &'static str, request: &Request<T>) -> Result<SpiffeId, Status> {
        check_header(request)?;
        let attested = attested(request)?;
        let process = self.0.process(method, &attested)?;
        let view =
            self.0.view.borrow().clone().ok_or_else(|| Status::unavailable("the agent is starting"))?;
        let matching = process.matching(&view);
        match matching.first() {
            Some(entry) => Ok(entry.id.clone()),
            None => Err(self.0.no_entry(method, process, &view)),
        }
    }

    /// The status for a workload that control does not let write, with a receipt where there is a record.
    fn may_not_write(&self, id: &SpiffeId, service: String, attested: &Attested, said: Status) -> Status {
        let Ok(process) = attested.as_ref() else { return said };
        let reason = RefusalReason::NotAWriter { id: id.to_string(), service };
        let refused = process.refused(WRITE_RELATIONS, reason, Vec::new(), self.0.refusals.now());
        match self.0.refusals.record(&refused) {
            Some(receipt) => Status::permission_denied(format!("{} (receipt {receipt})", said.message())),
            None => said,
        }
    }
}

#[tonic::async_trait]
impl Mesh for MeshService {
    async fn report(
        &self,
        request: Request<pb::ReportRequest>,
    ) -> Result<Response<pb::ReportResponse>, Status> {
        let reporter = self.caller(REPORT, &request)?;
        let pb::ReportRequest { decisions, dropped } = request.into_inner();
        if decisions.len() > control::MAX_REPORT_BATCH {
            return Err(Status::invalid_argument("too many decisions in one batch"));
        }
        let sent = decisions.len();
        let decisions = self.0.redacted(decisions)?;
        let dropped = dropped + (sent - decisions.len()) as u64;
        let accepted = self.0.queue.push(decisions, &reporter, dropped);
        Ok(Response::new(pb::ReportResponse { accepted }))
    }

    async fn announce(
        &self,
        request: Request<Streaming<pb::AnnounceRequest>>,
    ) -> Result<Response<pb::AnnounceResponse>, Status> {
        let id = self.caller(ANNOUNCE, &request)?;
        let mut stream = request.into_inner();
        let place = self.0.endpoints.announce(id);
        loop {
            let said = tokio::select! {
                said = stream.message() => said?,
                () = self.0.scope.draining() => return Err(Status::unavailable("the agent is stopping")),
            };
            let Some(pb::AnnounceRequest { address, serving }) = said else {
                return Ok(Response::new(pb::AnnounceResponse {}));
            };
            let address = endpoint::address(&address)
                .ok_or_else(|| Status::invalid_argument("not an address to connect to"))?;
            place.say(address, serving)?;
        }
    }

    type EndpointsStream = ResponseStream<pb::EndpointsResponse>;

    async fn endpoints(
        &self,
        request: Request<pb::EndpointsRequest>,
    ) -> Result<Response<Self::EndpointsStream>, Status> {
        self.caller(ENDPOINTS, &request)?;
        let wanted = request.into_inner().spiffe_ids;
        if wanted.len() > endpoint::MAX_PER_HOST {
            return Err(Status::invalid_argument("too many SPIFFE IDs"));
        }
        let wanted: Result<BTreeSet<SpiffeId>, _> = wanted.iter().map(|id| SpiffeId::new(id)).collect();
        let wanted = wanted.map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(Box::pin(self.0.endpoints.of(wanted, self.0.scope.clone()))))
    }

    type PoliciesStream = ResponseStream<pb::PoliciesResponse>;

    async fn policies(
        &self,
        request: Request<Streaming<pb::PoliciesRequest>>,
    ) -> Result<Response<Self::PoliciesStream>, Status> {
        let id = self.caller(POLICIES, &request)?;
        let held = self.0.policies.hold(id, request.into_inner(), self.0.scope.clone())?;
        Ok(Response::new(Box::pin(held)))
    }

    async fn write_relations(
        &self,
        request: Request<pb::WriteRelationsRequest>,
    ) -> Result<Response<pb::WriteRelationsResponse>, Status> {
        let id = self.caller(WRITE_RELATIONS, &request)?;
        let attested = attested(&request)?;
        let request = request.into_inner();
        let service = request.service.clone();
        let outcome = self.0.relations.write(id.to_string(), request).await;
        outcome.map(Response::new).map_err(|status| match status.code() {
            tonic::Code::PermissionDenied => self.may_not_write(&id, service, &attested, status),
            _ => status,
        })
    }

    type RelationsStream = ResponseStream<pb::RelationsResponse>;

    async fn relations(
        &self,
        request: Request<Streaming<pb::RelationsRequest>>,
    ) -> Result<Response<Self::RelationsStream>, Status> {
        let id = self.caller(RELATIONS, &request)?;
        let told = self.0.relations.stream(id.to_string(), request.into_inner(), &self.0.scope).await?;
        Ok(Response::new(Box::pin(told)))
    }
}

#[cfg(test)]
#[path = "workload_tests.rs"]
mod tests;
