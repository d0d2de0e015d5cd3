//! The gRPC service for agents. Each method is the same story: who is it, may it, within its limits,
//! do it, write it down, answer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use identity::{Peer, SpiffeId};

use super::endpoints::Announcing;
use super::policies::{self, Holding};
use super::store::{NodeRecord, Redeemed, StoreError};
use super::{Inner, NODE_SVID_TTL, Node};
use crate::authority::{IssueError, Issued, LeafRequest};
use crate::csr::P256PublicKey;
use crate::entry::{self, Entry, EntrySet};
use crate::hex;
use crate::model::{IssuedSvid, StoredDecision};
use crate::pb::control as pb;
use crate::pb::control::control_server::{Control as Service, ControlServer};
use crate::pb::mesh as mesh_pb;
use crate::transport::{Caller, TlsConnection};

/// Largest request taken: a full batch of requests or decisions and its framing.
const MAX_REQUEST_BYTES: usize = 1024 * 1024;
/// Most keys in one [`Service::sign`].
pub(crate) const MAX_SIGN_BATCH: usize = 256;
/// Most decisions in one [`Service::report`].
pub(crate) const MAX_REPORT_BATCH: usize = 256;
/// Largest JSON of one decision.
pub(crate) const MAX_DECISION_JSON_BYTES: usize = 16 * 1024;
/// Longest of a decision's other fields, in bytes; a SPIFFE ID fits.
pub(crate) const MAX_DECISION_FIELD_BYTES: usize = 2_048;
/// Longest join token looked at; ours have 43 characters.
const MAX_JOIN_TOKEN_BYTES: usize = 128;
/// Streams at once on a connection: an agent needs a handful, and one for each sidecar that decides by relations.
const MAX_STREAMS: u32 = 1_024;
/// Longest request headers; ours have a few hundred bytes.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// How often an idle agent is probed, and how long its answer may take, so that one that vanished does
/// not count as connected for long.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));

/// Serves until the scope drains.
pub(super) async fn serve(inner: Arc<Inner>, connections: mpsc::Receiver<io::Result<TlsConnection>>) {
    let scope = inner.scope.clone();
    let service = ControlServer::new(ControlService(inner)).max_decoding_message_size(MAX_REQUEST_BYTES);
    let outcome = tonic::transport::Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_keepalive_interval(Some(KEEP_ALIVE.0))
        .http2_keepalive_timeout(Some(KEEP_ALIVE.1))
        .add_service(service)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), async move { scope.draining().await })
        .await;
    if let Err(error) = outcome {
        tracing::error!(%error, "the service for agents failed");
    }
}

#[derive(Debug, Clone)]
struct ControlService(Arc<Inner>);

/// An agent whose certificate, ID and registration have been checked.
struct Agent {
    host: String,
    id: SpiffeId,
}

impl ControlService {
    /// Who calls: an agent of this trust domain whose host has joined, with a certificate that is valid
    /// now (the connection may be older than that).
    fn agent<T>(&self, request: &Request<T>) -> Result<Agent, Status> {
        let peer =
            caller(request)?.peer.ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        self.check_valid(&peer)?;
        let host = entry::host_of(&self.0.trust_domain, peer.id())
            .ok_or_else(|| Status::permission_denied("only agents may call this"))?
            .to_owned();
        match self.0.nodes().get_mut(&host) {
            Some(node) => node.last_seen = Some(self.0.clock.now_seconds()),
            None => return Err(Status::permission_denied("this host has not joined")),
        }
        Ok(Agent { host, id: peer.id().clone() })
    }

    fn check_valid(&self, peer: &Peer) -> Result<(), Status> {
        if self.0.clock.now() < peer.not_after() {
            return Ok(());
        }
        Err(Status::unauthenticated("the client certificate has expired"))
    }

    fn issue_node(
        &self,
        host: &str,
        id: &SpiffeId,
        csr: &[u8],
        why: &str,
    ) -> Result<(Issued, IssuedSvid), Status> {
        let public_key =
            P256PublicKey::from_csr(csr).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let now = self.0.clock.now();
        let request = LeafRequest { public_key: &public_key, id, dns: &[], ips: &[], ttl: NODE_SVID_TTL };
        let issued = self.0.authority.issue(&request, &*self.0.random, now).map_err(not_issued)?;
        let line = log_line(&issued, id, host, why, "", now);
        Ok((issued, line))
    }
}

#[tonic::async_trait]
impl Service for ControlService {
    async fn attest(
        &self,
        request: Request<pb::AttestRequest>,
    ) -> Result<Response<pb::AttestResponse>, Status> {
        let address = caller(&request)?.address;
        let now = self.0.clock.now();
        if !self.0.join_limit.take(address.ip(), 1, now) {
            return Err(Status::resource_exhausted("too many attempts to join from this address"));
        }
        let pb::AttestRequest { host, join_token, csr } = request.into_inner();
        let join_token = zeroize::Zeroizing::new(join_token);
        let id = entry::agent_id(&self.0.trust_domain, &host)
            .filter(|_| entry::is_host(&self.0.trust_domain, &host))
            .ok_or_else(|| Status::invalid_argument("not a host name"))?;
        // One answer for every bad token: which of the reasons it is helps only a guesser.
        let refuse = || {
            tracing::warn!(%address, host, "join refused: token unknown, used, expired or for another host");
            Status::permission_denied("the join token is unknown, used, expired or for another host")
        };
        if join_token.len() > MAX_JOIN_TOKEN_BYTES {
            return Err(refuse());
        }
        let hash = hex::sha256(join_token.as_bytes());
        // Cheap question first: without an open token nobody makes us verify or sign anything.
        let asked = (hash.clone(), host.clone());
        let open =
            self.0.store.run(move |store| store.token_is_open(&asked.0, &asked.1, now.as_secs())).await;
        if !open.map_err(not_stored)? {
            return Err(refuse());
        }
        let (issued, line) = self.issue_node(&host, &id, &csr, "join token")?;
        let record = NodeRecord {
            joined: now.as_secs(),
            serial: issued.serial.clone(),
            not_after: issued.not_after.as_secs(),
        };
        let stored = (host.clone(), record.clone(), line.clone());
        let redeemed = self
            .0
            .store
            .run(move |store| store.redeem(&hash, &stored.0, now.as_secs(), &stored.1, &stored.2))
            .await
            .map_err(not_stored)?;
        if redeemed == Redeemed::No {
            return Err(refuse());
        }
        tracing::info!(%address, host, serial = issued.serial, "host joined");
        self.0.nodes().entry(host).and_modify(|node| node.record = record.clone()).or_insert(Node {
            record,
            last_seen: Some(now.as_secs()),
            streams: 0,
        });
        self.0.remember([line]);
        Ok(Response::new(pb::AttestResponse {
            svid: issued.certificate.to_vec(),
            bundle: self.0.authority.bundle().concatenated(),
        }))
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewResponse>, Status> {
        let agent = self.agent(&request)?;
        let now = self.0.clock.now();
        if !self.0.sign_limit.take(agent.id.clone(), 1, now) {
            return Err(Status::resource_exhausted("too many certificates for this agent"));
        }
        let (issued, line) = self.issue_node(&agent.host, &agent.id, &request.into_inner().csr, "renewal")?;
        let record = match self.0.nodes().get(&agent.host) {
            Some(node) => NodeRecord {
                joined: node.record.joined,
                serial: issued.serial.clone(),
                not_after: issued.not_after.as_secs(),
            },
            None => return Err(Status::permission_denied("this host has not joined")),
        };
        let stored = (agent.host.clone(), record.clone(), line.clone());
        self.0
            .store
            .run(move |store| store.renew_node(&stored.0, &stored.1, &stored.2))
            .await
            .map_err(not_stored)?;
        if let Some(node) = self.0.nodes().get_mut(&agent.host) {
            node.record = record;
        }
        tracing::info!(host = agent.host, serial = issued.serial, "node identity renewed");
        self.0.remember([line]);
        Ok(Response::new(pb::RenewResponse {
            svid: issued.certificate.to_vec(),
            bundle: self.0.authority.bundle().concatenated(),
        }))
    }

    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<pb::State, Status>> + Send>>;

    async fn subscribe(
        &self,
        request: Request<pb::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let agent = self.agent(&request)?;
        tracing::info!(host = agent.host, "agent connected");
        let subscriber = Subscriber {
            entries: self.0.entries.subscribe(),
            last: None,
            over: false,
            presence: Presence::new(Arc::clone(&self.0), agent.host),
        };
        Ok(Response::new(Box::pin(futures::stream::unfold(subscriber, Subscriber::next))))
    }

    async fn sign(&self, request: Request<pb::SignRequest>) -> Result<Response<pb::SignResponse>, Status> {
        let agent = self.agent(&request)?;
        let items = request.into_inner().items;
        let amount = match u32::try_from(items.len()) {
            Ok(amount) if items.len() <= MAX_SIGN_BATCH => amount,
            _ => return Err(Status::invalid_argument("too many keys in one batch")),
        };
        if !self.0.sign_limit.take(agent.id.clone(), amount, self.0.clock.now()) {
            return Err(Status::resource_exhausted("too many certificates for this agent"));
        }
        let inner = Arc::clone(&self.0);
        // Signatures cost CPU and the log costs a disk write: both on a thread that may block. Nothing
        // is handed out that is not in the log.
        let (answers, lines) = self
            .0
            .store
            .run(move |store| {
                let entries = inner.entries.borrow().clone();
                let mut lines = Vec::new();
                let answers =
                    items.iter().map(|item| sign_one(&inner, &entries, &agent, item, &mut lines)).collect();
                store.log_issuances(&lines)?;
                Ok::<(Vec<_>, _), StoreError>((answers, lines))
            })
            .await
            .map_err(not_stored)?;
        self.0.remember(lines);
        Ok(Response::new(pb::SignResponse { items: answers }))
    }

    async fn report(
        &self,
        request: Request<pb::ReportRequest>,
    ) -> Result<Response<pb::ReportResponse>, Status> {
        let agent = self.agent(&request)?;
        let pb::ReportRequest { decisions, dropped } = request.into_inner();
        let amount = match u32::try_from(decisions.len()) {
            Ok(amount) if decisions.len() <= MAX_REPORT_BATCH => amount,
            _ => return Err(Status::invalid_argument("too many decisions in one batch")),
        };
        let now = self.0.clock.now();
        if !self.0.report_limit.take(agent.id, amount, now) {
            return Err(Status::resource_exhausted("too many decisions from this agent"));
        }
        let stored_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let kept = self.0.decisions_kept;
        let (recorded, refused) = self
            .0
            .store
            .run(move |store| {
                let all = decisions.len();
                let good: Vec<_> = decisions
                    .into_iter()
                    .filter_map(|one| accept_decision(one, &agent.host, stored_ms))
                    .collect();
                Ok((store.record_decisions(&good, kept, dropped)?, all - good.len()))
            })
            .await
            .map_err(not_stored)?;
        self.0.changed();
        Ok(Response::new(pb::ReportResponse { stored: recorded.stored, refused: refused as u64 }))
    }

    async fn announce(
        &self,
        request: Request<Streaming<pb::AnnounceRequest>>,
    ) -> Result<Response<pb::AnnounceResponse>, Status> {
        let agent = self.agent(&request)?;
        let mut stream = request.into_inner();
        let announcing = Announcing::open(Arc::clone(&self.0), agent.host);
        loop {
            let said = tokio::select! {
                said = stream.message() => said?,
                () = self.0.scope.draining() => return Err(Status::unavailable("control is stopping")),
            };
            let Some(pb::AnnounceRequest { endpoints }) = said else {
                return Ok(Response::new(pb::AnnounceResponse {}));
            };
            announcing.say(endpoints)?;
        }
    }

    type EndpointsStream = Pin<Box<dyn Stream<Item = Result<pb::EndpointsResponse, Status>> + Send>>;

    async fn endpoints(
        &self,
        request: Request<pb::EndpointsRequest>,
    ) -> Result<Response<Self::EndpointsStream>, Status> {
        self.agent(&request)?;
        let told = (Arc::clone(&self.0), self.0.endpoints.subscribe());
        let stream = futures::stream::unfold(Some(told), |told| async {
            let (inner, mut view) = told?;
            tokio::select! {
                changed = view.changed() => changed.ok()?,
                () = inner.scope.draining() => {
                    return Some((Err(Status::unavailable("control is stopping")), None));
                }
            }
            let message = view.borrow_and_update().message();
            Some((Ok(message), Some((inner, view))))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    type PoliciesStream = Pin<Box<dyn Stream<Item = Result<pb::PoliciesResponse, Status>> + Send>>;

    async fn policies(
        &self,
        request: Request<Streaming<pb::PoliciesRequest>>,
    ) -> Result<Response<Self::PoliciesStream>, Status> {
        let agent = self.agent(&request)?;
        let stream = Holding::open(Arc::clone(&self.0), agent.host, request.into_inner())?;
        Ok(Response::new(Box::pin(stream)))
    }

    type ContentsStream = Pin<Box<dyn Stream<Item = Result<pb::ContentsResponse, Status>> + Send>>;

    async fn contents(
        &self,
        request: Request<pb::ContentsRequest>,
    ) -> Result<Response<Self::ContentsStream>, Status> {
        self.agent(&request)?;
        let digests = request.into_inner().digests;
        Ok(Response::new(Box::pin(policies::contents(&self.0, digests).await?)))
    }

    async fn write_relations(
        &self,
        request: Request<pb::WriteRelationsRequest>,
    ) -> Result<Response<mesh_pb::WriteRelationsResponse>, Status> {
        let agent = self.agent(&request)?;
        if !self.0.relations_limit.take(agent.id, 1, self.0.clock.now()) {
            return Err(Status::resource_exhausted("too many writes of relations from this agent"));
        }
        Ok(Response::new(self.0.write_relations_for(&agent.host, request.into_inner()).await?))
    }

    type RelationsStream = Pin<Box<dyn Stream<Item = Result<mesh_pb::RelationsResponse, Status>> + Send>>;

    async fn relations(
        &self,
        request: Request<Streaming<pb::RelationsRequest>>,
    ) -> Result<Response<Self::RelationsStream>, Status> {
        let agent = self.agent(&request)?;
        Ok(Response::new(Box::pin(self.0.stream_relations(agent.host, request.into_inner()).await?)))
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    // Absent only if the service were served over something else than our own TLS connections.
    request.extensions().get::<Caller>().cloned().ok_or_else(|| Status::internal("no connection information"))
}

fn sign_one(
    inner: &Inner,
    entries: &EntrySet,
    agent: &Agent,
    item: &pb::SignItem,
    lines: &mut Vec<IssuedSvid>,
) -> pb::SignedItem {
    let outcome = match try_sign(inner, entries, agent, item) {
        Ok((issued, line)) => {
            tracing::info!(
                id = line.spiffe_id,
                host = line.host,
                serial = line.serial,
                why = line.why,
                not_after = line.not_after,
                "SVID issued"
            );
            lines.push(line);
            pb::signed_item::Outcome::Svid(issued.certificate.to_vec())
        }
        Err(refused) => {
            tracing::warn!(host = agent.host, entry = item.entry_id, refused, "SVID refused");
            pb::signed_item::Outcome::Refused(refused)
        }
    };
    pb::SignedItem { outcome: Some(outcome) }
}

fn try_sign(
    inner: &Inner,
    entries: &EntrySet,
    agent: &Agent,
    item: &pb::SignItem,
) -> Result<(Issued, IssuedSvid), String> {
    let entry: &Entry = entries
        .for_host(&agent.host, &item.entry_id)
        .ok_or_else(|| "no such entry for this host".to_owned())?;
    let public_key = P256PublicKey::from_csr(&item.csr).map_err(|error| error.to_string())?;
    let now = inner.clock.now();
    let request = LeafRequest {
        public_key: &public_key,
        id: &entry.id,
        dns: &entry.dns,
        ips: &entry.ips,
        ttl: entry.ttl.unwrap_or(inner.svid_ttl),
    };
    let issued = inner.authority.issue(&request, &*inner.random, now).map_err(|error| error.to_string())?;
    let line = log_line(&issued, &entry.id, &agent.host, &entry.selectors.describe(), &item.entry_id, now);
    Ok((issued, line))
}

fn log_line(
    issued: &Issued,
    id: &SpiffeId,
    host: &str,
    why: &str,
    entry_id: &str,
    now: Duration,
) -> IssuedSvid {
    IssuedSvid {
        serial: issued.serial.clone(),
        spiffe_id: id.to_string(),
        host: host.to_owned(),
        why: why.to_owned(),
        entry_id: entry_id.to_owned(),
        issued: now.as_secs(),
        not_after: issued.not_after.as_secs(),
    }
}

/// A decision as it is stored, or `None` if it is malformed, which no retry mends.
fn accept_decision(decision: pb::Decision, host: &str, stored_ms: u64) -> Option<StoredDecision> {
    let fields =
        [&decision.receipt, &decision.service, &decision.verdict, &decision.address, &decision.reporter];
    let fits = fields.iter().all(|field| field.len() <= MAX_DECISION_FIELD_BYTES)
        && !decision.receipt.is_empty()
        && decision.json.len() <= MAX_DECISION_JSON_BYTES;
    if !fits {
        return None;
    }
    let reporter = SpiffeId::new(&decision.reporter).ok()?;
    // What is stored is read back by serde_json, which takes some maps for the JSON inside their text
    // (`raw_value`): a record that it reads otherwise is refused, or the list of all would not be read again.
    let json = identity::json::parse(decision.json.as_bytes()).ok().filter(|json| {
        serde_json::from_str(&decision.json).is_ok_and(|read: serde_json::Value| read == *json)
    })?;
    Some(StoredDecision {
        receipt: decision.receipt,
        time_ms: decision.time_ms,
        service: decision.service,
        verdict: decision.verdict,
        address: decision.address,
        json,
        reporter: reporter.to_string(),
        host: host.to_owned(),
        stored_ms,
    })
}

fn not_issued(error: IssueError) -> Status {
    tracing::error!(%error, "a node identity could not be issued");
    match error {
        IssueError::AuthorityNotValid => Status::failed_precondition(error.to_string()),
        _ => Status::internal("the certificate could not be issued"),
    }
}

pub(super) fn not_stored(error: StoreError) -> Status {
    tracing::error!(error = &error as &dyn std::error::Error, "the database failed");
    Status::unavailable("control's database failed")
}

/// One agent's open stream.
struct Subscriber {
    entries: watch::Receiver<Arc<EntrySet>>,
    last: Option<Vec<pb::Entry>>,
    over: bool,
    presence: Presence,
}

impl Subscriber {
    /// The next message: at once the first time, then whenever this host's entries change.
    async fn next(mut self) -> Option<(Result<pb::State, Status>, Self)> {
        if self.over {
            return None;
        }
        let inner = Arc::clone(&self.presence.inner);
        loop {
            let set = self.entries.borrow_and_update().clone();
            let view = set.view(&self.presence.host);
            if self.last.as_ref() != Some(&view) {
                self.last = Some(view.clone());
                let state = pb::State {
                    sequence: set.sequence,
                    bundle: inner.authority.bundle().concatenated(),
                    entries: view,
                    rotate_after_ms: u64::try_from(inner.rotate_after.as_millis()).unwrap_or(u64::MAX),
                    pseudonym_key: inner.pseudonym_key.to_vec(),
                };
                return Some((Ok(state), self));
            }
            tokio::select! {
                changed = self.entries.changed() => changed.ok()?,
                () = inner.scope.draining() => {
                    self.over = true;
                    return Some((Err(Status::unavailable("control is stopping")), self));
                }
            }
        }
    }
}

/// Counts a stream for as long as it lives.
struct Presence {
    inner: Arc<Inner>,
    host: String,
}

impl Presence {
    fn new(inner: Arc<Inner>, host: String) -> Self {
        if let Some(node) = inner.nodes().get_mut(&host) {
            node.streams += 1;
        }
        inner.changed();
        Self { inner, host }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        if let Some(node) = self.inner.nodes().get_mut(&self.host) {
            node.streams = node.streams.saturating_sub(1);
            node.last_seen = Some(self.inner.clock.now_seconds());
        }
        tracing::info!(host = self.host, "agent's stream ended");
        self.inner.changed();
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
