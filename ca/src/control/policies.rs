//! Handing out policies: which release each workload is to have, signed, and what became of it.
//!
//! Whoever follows a repository offers its commits ([`ControlHandle::offer_policies`]); [`Rollout`] says who is to have
//! which; agents hear the epochs and digests, fetch what they lack, and say what is in force.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tonic::{Status, Streaming};

use identity::id::IdError;
use identity::{SpiffeId, X509Svid};

use super::rollout::{
    Counts, Epoch, EpochState, Instance, MIN_DECISIONS, Order, Replay, Rings, Rollout, Step,
};
use super::store::Store;
use super::{ControlHandle, Inner, MAX_NAP, NODE_SVID_TTL, OwnIdentityError, StoreError};
use crate::hex;
use crate::model::{
    DecisionQuery, EpochStatus, HolderStatus, MAX_DECISIONS, PoliciesStatus, RollingStatus, StoppedStatus,
    StoredDecision,
};
use crate::pb::control as pb;
use crate::relations::{Attributes, Object};
use crate::release::{self, Files, Manifest, Release};

/// The pause between two messages to the agents: a thousand acknowledgements are one change.
const COALESCE: Duration = Duration::from_millis(20);
/// How often everything is signed anew, so that releases are fresh and their signer's certificate is not near its end.
const SIGN_EVERY: Duration = Duration::from_secs(3_600);
/// Workloads of one host that decide by policies.
const MAX_HOLDERS: usize = 1_000;
/// Longest of a holder's texts.
const MAX_TEXT_BYTES: usize = 1_000;
/// Contents in one request.
const MAX_DIGESTS: usize = 2_000;

/// What control needs to hand out policies.
#[derive(Debug, Default)]
pub struct PoliciesConfig {
    /// Which service's policies a workload decides by.
    pub services: HashMap<SpiffeId, String>,
    /// Decides recorded requests again, for a ring in the shadow. Without, such a ring asks for acknowledgements only.
    pub replayer: Option<Arc<dyn Replayer>>,
    /// Reads services' schemas, which relations are held against when they are written. Without, they are not.
    pub schemas: Option<Arc<dyn Schemas>>,
}

/// Reads services' schemas.
pub trait Schemas: fmt::Debug + Send + Sync {
    /// The schema of `service` among its policies. Blocks.
    ///
    /// # Errors
    /// Policies that cannot be read, in words.
    fn read(&self, service: &str, files: &Files) -> Result<Arc<dyn Schema>, String>;
}

/// What may be true of a service's objects.
pub trait Schema: fmt::Debug + Send + Sync {
    /// Whether it has the object's type, and these attributes.
    ///
    /// # Errors
    /// What it does not have, in one clause.
    fn check(&self, object: &Object, attributes: &Attributes) -> Result<(), String>;
}

/// A service's schemas by the digests of the manifests that they were read from.
type SchemasOf = Vec<(String, Arc<dyn Schema>)>;

/// Decides recorded requests again.
pub trait Replayer: fmt::Debug + Send + Sync {
    /// What becomes of the requests of `decisions` by the policies `after` that were put out after `before`, by the
    /// services that were asked. Blocks.
    ///
    /// # Errors
    /// Policies that cannot be read, in words.
    fn replay(
        &self,
        decisions: &[StoredDecision],
        before: &BTreeMap<String, Files>,
        after: &BTreeMap<String, Files>,
    ) -> Result<BTreeMap<String, Replayed>, String>;
}

/// What became of recorded requests to one service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replayed {
    /// How many were decided again.
    pub decided: u64,
    /// How many were allowed before and are denied now.
    pub newly_denied: u64,
    /// One of them, in words.
    pub example: Option<String>,
}

impl Replayed {
    fn and(self, other: Self) -> Self {
        Self {
            decided: self.decided.saturating_add(other.decided),
            newly_denied: self.newly_denied.saturating_add(other.newly_denied),
            example: self.example.or(other.example),
        }
    }
}

/// Policies to be put out.
#[derive(Debug)]
pub struct PolicyOffer {
    /// The commit that they are from.
    pub commit: String,
    /// The files of each service.
    pub services: BTreeMap<String, Files>,
    /// How they reach everybody.
    pub rings: Rings,
}

/// Why policies are not put out.
#[derive(Debug, Error)]
pub enum OfferError {
    /// Control was started without.
    #[error("this control hands out no policies: its mesh.toml has no [policy]")]
    Off,
    /// A service's files cannot be a release.
    #[error("the policies of {0} are too many, too large, or named in a way that no release has")]
    Files(String),
    /// The last ring is not everybody.
    #[error("the last ring is not everybody")]
    Rings,
    /// Nothing to go back to.
    #[error("no policies of {0} were ever in force and are kept")]
    Unknown(String),
    /// Not stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is known, and who is told.
#[derive(Debug)]
pub(super) struct Policies {
    services: HashMap<SpiffeId, String>,
    replayer: Option<Arc<dyn Replayer>>,
    schemas: Option<Arc<dyn Schemas>>,
    /// Those in force and on their way, by service, as far as anybody has asked.
    read: Mutex<HashMap<String, SchemasOf>>,
    rollout: Mutex<Rollout>,
    /// Held by whoever changes epochs and writes them down: no two take the same number, and none writes what another
    /// one has overtaken.
    writing: tokio::sync::Mutex<()>,
    /// The newest stream of each host.
    streams: Mutex<HashMap<String, u64>>,
    news: Notify,
    told: watch::Sender<Arc<Told>>,
    /// What the repository's follower says is wrong.
    source_problem: Mutex<Option<String>>,
}

/// What agents are told, of all hosts.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    floor: u64,
    orders: BTreeMap<super::rollout::Key, Order>,
    /// By service and epoch.
    releases: HashMap<(String, u64), String>,
}

impl Policies {
    pub(super) fn new(config: PoliciesConfig, epochs: Vec<Epoch>, now: Duration) -> Self {
        Self {
            services: config.services,
            replayer: config.replayer,
            schemas: config.schemas,
            read: Mutex::default(),
            rollout: Mutex::new(Rollout::restored(epochs, now)),
            writing: tokio::sync::Mutex::default(),
            streams: Mutex::default(),
            news: Notify::new(),
            told: watch::Sender::default(),
            source_problem: Mutex::default(),
        }
    }

    fn rollout(&self) -> MutexGuard<'_, Rollout> {
        self.rollout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What may be true of a service's objects by the policies that somebody decides by, or is to: those in force first.
    /// None where control hands out none for it. Blocks.
    pub(super) fn schemas_of(&self, store: &Store, service: &str) -> Result<SchemasOf, StoreError> {
        let Some(reader) = &self.schemas else { return Ok(Vec::new()) };
        let digests: Vec<String> =
            self.rollout().current().filter_map(|epoch| epoch.services.get(service)).cloned().collect();
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let before = read.remove(service).unwrap_or_default();
        let mut schemas = SchemasOf::new();
        for digest in digests {
            if schemas.iter().any(|(known, _)| *known == digest) {
                continue;
            }
            if let Some((_, known)) = before.iter().find(|(known, _)| *known == digest) {
                schemas.push((digest, Arc::clone(known)));
                continue;
            }
            match reader.read(service, &files_of_one(store, &digest)?) {
                Ok(schema) => schemas.push((digest, schema)),
                // Not for whoever writes relations to hear: sidecars refuse such policies.
                Err(error) => tracing::error!(
                    service,
                    error,
                    "the schema of policies that were handed out cannot be read"
                ),
            }
        }
        read.insert(service.to_owned(), schemas.clone());
        Ok(schemas)
    }

    /// For people.
    pub(super) fn status(&self) -> PoliciesStatus {
        let rollout = self.rollout();
        let orders = rollout.orders();
        let commits: HashMap<u64, &str> =
            rollout.current().map(|epoch| (epoch.epoch, epoch.commit.as_str())).collect();
        let epoch = |epoch: &Epoch| EpochStatus {
            epoch: epoch.epoch,
            commit: epoch.commit.clone(),
            offered: epoch.offered,
        };
        PoliciesStatus {
            in_force: rollout.in_force().map(epoch),
            rolling: rollout.rolling().map(|(rolling, ring, since)| RollingStatus {
                epoch: epoch(rolling),
                ring: ring.to_string(),
                rings: rolling.rings.rings.iter().map(ToString::to_string).collect(),
                since: since.as_secs(),
            }),
            stopped: rollout.stopped().map(|stopped| StoppedStatus {
                epoch: epoch(stopped),
                reason: match &stopped.state {
                    EpochState::Stopped(reason) => reason.clone(),
                    _ => String::new(),
                },
            }),
            source_problem: self.source_problem.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            holders: rollout
                .instances()
                .iter()
                .map(|(key, instance)| HolderStatus {
                    host: key.0.clone(),
                    name: key.1.clone(),
                    spiffe_id: instance.spiffe_id.clone(),
                    service: instance.service.clone(),
                    epoch: instance.epoch,
                    commit: commits.get(&instance.epoch).map(|&commit| commit.to_owned()),
                    wanted: orders.get(key).map_or(0, |order| order.epoch),
                    refused: instance.refused.as_ref().map(|(epoch, why)| format!("epoch {epoch}: {why}")),
                })
                .collect(),
        }
    }
}

impl ControlHandle {
    fn policies(&self) -> Result<&Policies, OfferError> {
        self.0.policies.as_ref().ok_or(OfferError::Off)
    }

    /// The commit that is in force, and whether another one is on its way; `None` before the first.
    pub fn policies_in_force(&self) -> Option<(String, bool)> {
        let rollout = self.0.policies.as_ref()?.rollout();
        Some((rollout.in_force()?.commit.clone(), rollout.rolling().is_some()))
    }

    /// The commit that was offered last, whatever became of it.
    pub async fn policy_head(&self) -> Result<Option<String>, StoreError> {
        self.0.store.run(|store| store.policy_head()).await
    }

    /// Puts policies out, through their rings. Returns their epoch.
    pub async fn offer_policies(&self, offer: PolicyOffer) -> Result<u64, OfferError> {
        let policies = self.policies()?;
        if !matches!(offer.rings.rings.last(), Some(super::Ring::Share(share)) if *share >= 1.0) {
            return Err(OfferError::Rings);
        }
        let mut contents = HashMap::new();
        let mut services = BTreeMap::new();
        for (service, files) in offer.services {
            let manifest = Manifest::of(&files);
            let text = manifest.text();
            let size: usize = files.values().map(Vec::len).sum();
            if size > release::MAX_BYTES || Manifest::parse(text.as_bytes()).is_err() {
                return Err(OfferError::Files(service));
            }
            contents.extend(files.into_values().map(|bytes| (hex::sha256(&bytes), bytes)));
            contents.insert(manifest.digest(), text.into_bytes());
            services.insert(service, manifest.digest());
        }
        let _one = policies.writing.lock().await;
        let epoch = self.epoch(offer.commit, services, offer.rings).await?;
        *policies.source_problem.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let head = epoch.commit.clone();
        self.set_out(policies, epoch, contents.into_iter().collect(), Some(head), false).await
    }

    /// Puts the policies of an earlier commit out again, as a new epoch, to everybody at once; without a commit, those
    /// that were in force before the ones of now. Nothing newer comes until the repository has another commit.
    pub async fn roll_back_policies(&self, commit: Option<&str>) -> Result<u64, OfferError> {
        let policies = self.policies()?;
        let _one = policies.writing.lock().await;
        let epochs = self.0.store.run(|store| store.epochs()).await?;
        let now = {
            let rollout = policies.rollout();
            let epoch = rollout.rolling().map(|(epoch, ..)| epoch).or(rollout.in_force());
            epoch.map(|epoch| epoch.services.clone())
        };
        let wanted = |epoch: &&Epoch| match commit {
            Some(commit) => epoch.commit.starts_with(commit),
            None => {
                matches!(epoch.state, EpochState::InForce | EpochState::Over)
                    && Some(&epoch.services) != now.as_ref()
            }
        };
        let back = epochs.iter().rev().find(wanted);
        let back = back.ok_or_else(|| OfferError::Unknown(commit.unwrap_or("another commit").to_owned()))?;
        let epoch = self.epoch(back.commit.clone(), back.services.clone(), Rings::default()).await?;
        tracing::warn!(commit = epoch.commit, epoch = epoch.epoch, "policies are rolled back");
        self.set_out(policies, epoch, Vec::new(), None, true).await
    }

    /// What is wrong with the repository, for `status`; `None` when it is well again.
    pub fn policy_source(&self, problem: Option<String>) {
        if let Ok(policies) = self.policies() {
            let mut known = policies.source_problem.lock().unwrap_or_else(PoisonError::into_inner);
            let news = *known != problem;
            *known = problem;
            drop(known);
            if news {
                self.0.changed();
            }
        }
    }

    /// A new epoch: later than all before, and also where the database has forgotten some, being older than its agents
    /// (a backup).
    async fn epoch(
        &self,
        commit: String,
        services: BTreeMap<String, String>,
        rings: Rings,
    ) -> Result<Epoch, StoreError> {
        let last = self.0.store.run(|store| store.epochs()).await?.last().map_or(0, |epoch| epoch.epoch);
        let offered = self.0.clock.now_seconds();
        let state = EpochState::Rolling(0);
        Ok(Epoch { epoch: offered.max(last + 1), commit, offered, services, rings, state })
    }

    async fn set_out(
        &self,
        policies: &Policies,
        epoch: Epoch,
        contents: Vec<(String, Vec<u8>)>,
        head: Option<String>,
        withdraws: bool,
    ) -> Result<u64, OfferError> {
        let number = epoch.epoch;
        // Stored first: what is told to anybody is there after a crash.
        let stored = epoch.clone();
        self.0.store.run(move |store| store.put_epochs(&[stored], &contents, head.as_deref())).await?;
        tracing::info!(commit = epoch.commit, epoch = number, "policies are put out");
        let given_up = policies.rollout().offer(epoch, withdraws, self.0.clock.now());
        if let Some(over) = given_up {
            self.0.store.run(move |store| store.put_epochs(&[over], &[], None)).await?;
        }
        policies.news.notify_one();
        self.0.changed();
        Ok(number)
    }
}

/// Signs, tells and goes on from ring to ring, for as long as the scope lives.
pub(super) async fn keep(inner: Arc<Inner>) {
    let Some(policies) = &inner.policies else { return };
    let mut signer: Option<(X509Svid, Duration)> = None;
    loop {
        let now = inner.clock.now();
        if let Err(error) = advance(&inner, policies, now).await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "how far policies have come is not stored"
            );
        }
        let mut signed_anew = false;
        if signer.as_ref().is_none_or(|(_, due)| now >= *due) {
            match inner.policy_signer().await {
                Ok(svid) => {
                    signer = Some((svid, now + SIGN_EVERY));
                    signed_anew = true;
                }
                Err(error) => tracing::error!(%error, "no identity to sign policies with"),
            }
        }
        if let Some((svid, _)) = &signer {
            tell(policies, svid, signed_anew, now);
        }
        let due = policies.rollout().next_look().filter(|due| *due > now);
        let nap = due.map_or(MAX_NAP, |due| (due - now).min(MAX_NAP));
        tokio::select! {
            () = policies.news.notified() => inner.clock.sleep(COALESCE).await,
            () = inner.clock.sleep(nap) => {}
            () = inner.scope.draining() => return,
        }
    }
}

/// Takes the steps that are due, and writes them down.
async fn advance(inner: &Inner, policies: &Policies, now: Duration) -> Result<(), OfferError> {
    let _one = policies.writing.lock().await;
    let wanted = policies.rollout().wants_replay().map(|(before, after)| (before.clone(), after.clone()));
    if let Some((before, after)) = wanted {
        let outcome = replay(inner, policies, &before, &after).await?;
        policies.rollout().replayed(after.epoch, outcome);
    }
    loop {
        // Also where control ended between the two.
        if policies.rollout().to_withdraw().is_some() {
            withdraw(inner, policies, now).await?;
        }
        let (step, changed) = {
            let mut rollout = policies.rollout();
            let before: Vec<Epoch> = rollout.current().cloned().collect();
            let Some(step) = rollout.step(now) else { return Ok(()) };
            let in_force = rollout.in_force().map(|epoch| epoch.epoch);
            let over = before
                .into_iter()
                .filter(|epoch| epoch.state == EpochState::InForce && Some(epoch.epoch) != in_force);
            let over = over.map(|epoch| Epoch { state: EpochState::Over, ..epoch });
            let stopped = rollout.stopped().cloned();
            (step, over.chain(rollout.current().cloned()).chain(stopped).collect::<Vec<_>>())
        };
        inner.store.run(move |store| store.put_epochs(&changed, &[], None)).await?;
        inner.changed();
        let rolling = policies.rollout().rolling().map(|(epoch, ring, _)| (epoch.epoch, ring));
        match step {
            Step::Ring => tracing::info!(?rolling, "policies reach their next ring"),
            Step::Done => {
                let epoch = policies.rollout().floor();
                tracing::info!(epoch, "policies are in force");
            }
            Step::Stop(reason) => {
                tracing::error!(reason, "policies are taken back");
            }
        }
    }
}

/// What is in force comes out again above what was stopped.
async fn withdraw(inner: &Inner, policies: &Policies, now: Duration) -> Result<(), OfferError> {
    let wanted = policies.rollout().to_withdraw();
    let Some((good, stopped)) = wanted else { return Ok(()) };
    let epoch = Epoch {
        epoch: inner.clock.now_seconds().max(stopped + 1),
        offered: inner.clock.now_seconds(),
        rings: Rings::default(),
        state: EpochState::Rolling(0),
        ..good
    };
    let stored = epoch.clone();
    inner.store.run(move |store| store.put_epochs(&[stored], &[], None)).await?;
    policies.rollout().offer(epoch, true, now);
    Ok(())
}

/// Decides recorded requests again.
async fn replay(
    inner: &Inner,
    policies: &Policies,
    before: &Epoch,
    after: &Epoch,
) -> Result<Replay, OfferError> {
    let Some(replayer) = policies.replayer.clone() else { return Ok(Replay::Passed) };
    let (before, after) = (before.clone(), after.clone());
    let max_denied = after.rings.max_denied;
    let replayed = inner
        .store
        .run(move |store| {
            let query = DecisionQuery { limit: Some(MAX_DECISIONS), ..DecisionQuery::default() };
            let decisions = store.decisions(&query)?;
            let (before, after) = (files_of(store, &before)?, files_of(store, &after)?);
            Ok(replayer.replay(&decisions, &before, &after))
        })
        .await?;
    let replayed = match replayed {
        Ok(replayed) => replayed,
        Err(why) => return Ok(Replay::Failed(why)),
    };
    let all = replayed.values().cloned().reduce(Replayed::and).unwrap_or_default();
    // A few requests to one service say little of it; all that were recorded are what there is to go by.
    let enough = replayed.iter().filter(|(_, replayed)| replayed.decided >= MIN_DECISIONS);
    let of_each = enough.map(|(service, replayed)| (format!(" to {service}"), replayed));
    for (to, replayed) in of_each.chain([(String::new(), &all)]) {
        let Replayed { decided, newly_denied, example } = replayed;
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        if *newly_denied as f64 > max_denied * *decided as f64 {
            let example = example.as_ref().map(|example| format!(": {example}")).unwrap_or_default();
            return Ok(Replay::Failed(format!(
                "of {decided} recorded requests{to} {newly_denied} would be newly denied{example}"
            )));
        }
    }
    tracing::info!(all.decided, all.newly_denied, "recorded requests were decided again");
    Ok(Replay::Passed)
}

/// The files of all services of an epoch.
fn files_of(store: &Store, epoch: &Epoch) -> Result<BTreeMap<String, Files>, StoreError> {
    let one = |(service, digest): (&String, &String)| Ok((service.clone(), files_of_one(store, digest)?));
    epoch.services.iter().map(one).collect()
}

/// The files of one service, by the digest of their manifest.
fn files_of_one(store: &Store, manifest: &str) -> Result<Files, StoreError> {
    let one = |digest: &str| {
        let found = store.contents(&[digest.to_owned()])?.pop().map(|(_, bytes)| bytes);
        found.filter(|bytes| hex::sha256(bytes) == digest).ok_or(StoreError::Damaged)
    };
    let manifest = Manifest::parse(&one(manifest)?).map_err(|_| StoreError::Damaged)?;
    manifest.files().map(|(name, digest)| Ok((name.to_owned(), one(digest)?))).collect()
}

/// Signs what is not signed yet, or everything `anew`, and tells agents what has changed.
fn tell(policies: &Policies, signer: &X509Svid, anew: bool, now: Duration) {
    let rollout = policies.rollout();
    let (floor, orders, before) = (rollout.floor(), rollout.orders(), policies.told.borrow().clone());
    // A release says the floor: one that says an older one is not to be found any more.
    let reusable = |key: &(String, u64)| before.releases.get(key).filter(|_| !anew && before.floor == floor);
    let mut releases = HashMap::new();
    for epoch in rollout.current() {
        for (service, manifest) in &epoch.services {
            let key = (service.clone(), epoch.epoch);
            if let Some(known) = reusable(&key) {
                releases.insert(key, known.clone());
                continue;
            }
            let release = Release {
                service: service.clone(),
                epoch: epoch.epoch,
                floor,
                commit: epoch.commit.clone(),
                signed: now,
                manifest: manifest.clone(),
            };
            match release.sign(signer) {
                Ok(text) => drop(releases.insert(key, text)),
                Err(error) => tracing::error!(%error, service, "policies could not be signed"),
            }
        }
    }
    drop(rollout);
    let told = Told { floor, orders, releases };
    policies.told.send_if_modified(|before| {
        let news = **before != told;
        if news {
            *before = Arc::new(told);
        }
        news
    });
}

impl Inner {
    /// The identity that signs releases, which nobody but control has.
    async fn policy_signer(&self) -> Result<X509Svid, OwnIdentityError> {
        let id = release::signer_id(&self.trust_domain).ok_or(IdError::TooLong)?;
        self.issue_own(&id, NODE_SVID_TTL, "policies").await
    }
}

/// One agent's open stream.
pub(super) struct Holding {
    inner: Arc<Inner>,
    host: String,
    stream: u64,
    said: Streaming<pb::PoliciesRequest>,
    told: watch::Receiver<Arc<Told>>,
    last: Option<pb::PoliciesResponse>,
}

impl Holding {
    /// Hears from the agent of `host`, and tells it.
    pub(super) fn open(
        inner: Arc<Inner>,
        host: String,
        said: Streaming<pb::PoliciesRequest>,
    ) -> Result<impl Stream<Item = Result<pb::PoliciesResponse, Status>> + Send, Status> {
        let policies = inner.policies.as_ref();
        let policies = policies.ok_or_else(|| Status::failed_precondition(OfferError::Off.to_string()))?;
        let told = policies.told.subscribe();
        let stream = {
            let mut streams = policies.streams.lock().unwrap_or_else(PoisonError::into_inner);
            let stream = streams.entry(host.clone()).or_default();
            *stream += 1;
            *stream
        };
        let holding = Self { inner, host, stream, said, told, last: None };
        Ok(futures::stream::unfold(Some(holding), |holding| async {
            let mut holding = holding?;
            match holding.next().await {
                Ok(Some(message)) => Some((Ok(message), Some(holding))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        }))
    }

    async fn next(&mut self) -> Result<Option<pb::PoliciesResponse>, Status> {
        loop {
            tokio::select! {
                said = self.said.message() => match said? {
                    Some(said) => self.heard(said)?,
                    None => return Ok(None),
                },
                changed = self.told.changed() => if changed.is_err() { return Ok(None) },
                () = self.inner.scope.draining() => return Err(Status::unavailable("control is stopping")),
            }
            let told = self.told.borrow_and_update().clone();
            let message = told.message(&self.host, self.inner.policies.as_ref());
            // Nothing is said before the agent has.
            if self.last.as_ref() != Some(&message) && !message.orders.is_empty() {
                self.last = Some(message.clone());
                return Ok(Some(message));
            }
        }
    }

    /// What the agent says counts if its stream is the newest of its host, for workloads that are registered there and
    /// have policies.
    fn heard(&self, said: pb::PoliciesRequest) -> Result<(), Status> {
        let Some(policies) = &self.inner.policies else { return Ok(()) };
        if said.holders.len() > MAX_HOLDERS {
            return Err(Status::resource_exhausted("too many workloads that decide by policies on one host"));
        }
        let entries = self.inner.entries.borrow().clone();
        let mut instances = BTreeMap::new();
        for holder in said.holders {
            let Ok(id) = SpiffeId::new(&holder.spiffe_id) else {
                return Err(Status::invalid_argument("a holder without a SPIFFE ID"));
            };
            if holder.name.len().max(holder.refusal.len()) > MAX_TEXT_BYTES {
                return Err(Status::invalid_argument("a holder whose texts are too long"));
            }
            let registered =
                entries.by_id.values().any(|entry| entry.id == id && entry.applies_to(&self.host));
            let (Some(service), true) = (policies.services.get(&id), registered) else { continue };
            let instance = Instance {
                service: service.clone(),
                spiffe_id: holder.spiffe_id,
                epoch: holder.epoch,
                prepared: holder.prepared,
                refused: (holder.refused > 0).then_some((holder.refused, holder.refusal)),
                counts: Counts { decided: holder.decided, denied: holder.denied },
            };
            instances.insert(holder.name, instance);
        }
        if self.is_newest(policies) {
            policies.rollout().heard(&self.host, instances);
            policies.news.notify_one();
            self.inner.changed();
        }
        Ok(())
    }

    fn is_newest(&self, policies: &Policies) -> bool {
        let streams = policies.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.get(&self.host) == Some(&self.stream)
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        if let Some(policies) = &self.inner.policies
            && self.is_newest(policies)
        {
            policies.rollout().gone(&self.host);
            policies.news.notify_one();
            self.inner.changed();
        }
    }
}

impl Told {
    /// What concerns one host.
    fn message(&self, host: &str, policies: Option<&Policies>) -> pb::PoliciesResponse {
        let Some(policies) = policies else { return pb::PoliciesResponse::default() };
        let rollout = policies.rollout();
        let mut message = pb::PoliciesResponse::default();
        let from = (host.to_owned(), String::new());
        for (key, order) in self.orders.range(from..).take_while(|((of, _), _)| of == host) {
            let Some(service) = rollout.instances().get(key).map(|instance| instance.service.clone()) else {
                continue;
            };
            for epoch in [order.epoch, order.prepare] {
                if let Some(release) = self.releases.get(&(service.clone(), epoch))
                    && !message.releases.contains(release)
                {
                    message.releases.push(release.clone());
                }
            }
            let (name, Order { epoch, prepare }) = (key.1.clone(), *order);
            message.orders.push(pb::PolicyOrder { name, service, epoch, prepare });
        }
        message
    }
}

/// The contents that an agent asks for.
pub(super) async fn contents(
    inner: &Inner,
    digests: Vec<String>,
) -> Result<impl Stream<Item = Result<pb::ContentsResponse, Status>> + Send + use<>, Status> {
    if digests.len() > MAX_DIGESTS || !digests.iter().all(|digest| release::is_digest(digest)) {
        return Err(Status::invalid_argument("too many digests, or something else among them"));
    }
    let found =
        inner.store.run(move |store| store.contents(&digests)).await.map_err(super::service::not_stored)?;
    let message = |(digest, content)| Ok(pb::ContentsResponse { digest, content });
    Ok(futures::stream::iter(found).map(message))
}
