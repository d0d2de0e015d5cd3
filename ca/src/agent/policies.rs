//! The policies of this host's workloads, from control, and what became of them, to control.
//!
//! What control signs is verified here and again by the workload, so an agent can withhold policies, not make them.
//! The last ones that were in force are kept on disk: a host that starts while control is away starts with them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{Stream, StreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tonic::{Status, Streaming};

use identity::{IdentitySource, Scope, SpiffeId, TrustDomain};

use super::upstream::{Upstream, describe, within};
use crate::backoff::Backoff;
use crate::hex;
use crate::pb::control as control_pb;
use crate::pb::mesh as pb;
use crate::random::{Random, SharedRandom};
use crate::release::{Files, MAX_BYTES, Manifest, Release, ReleaseError};
use crate::state;

/// Waits between attempts to open the stream.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// After so long without control what is in force may be old, and somebody should know.
const STALE_AFTER: Duration = Duration::from_secs(60);
/// The pause between two messages to control: a host's workloads that start together are one change.
const COALESCE: Duration = Duration::from_millis(20);
/// Longest wait for contents.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Workloads of one identity on a host, and of all: control takes a thousand.
const MAX_OF_ONE: usize = 100;
const MAX_OF_A_HOST: usize = 1_000;
/// The directory of what is kept, below the agent's state.
const DIRECTORY: &str = "policies";
/// Largest file of it that is read: base64 and its JSON around the largest release.
const MAX_KEPT_BYTES: u64 = 2 * MAX_BYTES as u64;

/// What both sides know. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Policies {
    /// What workloads of this host say, by their names.
    here: Arc<watch::Sender<BTreeMap<String, Said>>>,
    wanted: Arc<watch::Sender<Arc<Wanted>>>,
}

/// One workload that decides by policies.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Said {
    id: SpiffeId,
    state: pb::PoliciesRequest,
}

/// What control wants, and what was in force before it said so.
#[derive(Debug, Default)]
struct Wanted {
    orders: HashMap<String, Order>,
    kept: HashMap<SpiffeId, Arc<Held>>,
    /// Epochs of services that do not verify, or cannot be had.
    refused: HashMap<(String, u64), String>,
    stale: bool,
}

#[derive(Debug, Default)]
struct Order {
    service: String,
    epoch: u64,
    prepare: u64,
    in_force: Option<Arc<Held>>,
    prepared: Option<Arc<Held>>,
}

/// A release that verified, with all its files.
#[derive(Debug)]
struct Held {
    release: Release,
    text: String,
    files: Files,
}

impl Held {
    fn message(&self, with_files: bool) -> pb::SignedPolicies {
        let file = |(name, content): (&String, &Vec<u8>)| pb::PolicyFile {
            name: name.clone(),
            content: content.clone(),
        };
        let files = if with_files { self.files.iter().map(file).collect() } else { Vec::new() };
        pb::SignedPolicies { release: self.text.clone(), files }
    }
}

impl Policies {
    /// A workload's stream: what it says is withdrawn with it.
    ///
    /// # Errors
    /// More of one identity than a host has sidecars: control would hear none of this host's.
    pub(super) fn hold(
        &self,
        id: SpiffeId,
        said: Streaming<pb::PoliciesRequest>,
        scope: Scope,
    ) -> Result<impl Stream<Item = Result<pb::PoliciesResponse, Status>> + Send + use<>, Status> {
        let mut name = None;
        self.here.send_if_modified(|here| {
            // Names are told to control: the same for whoever takes the place of one that is gone.
            let mut names =
                (1..=MAX_OF_ONE).map(|number| format!("{}#{number}", id.path().trim_start_matches('/')));
            name = names.find(|name| !here.contains_key(name)).filter(|_| here.len() < MAX_OF_A_HOST);
            if let Some(name) = &name {
                here.insert(name.clone(), Said { id: id.clone(), state: pb::PoliciesRequest::default() });
            }
            name.is_some()
        });
        let name = name.ok_or_else(|| Status::resource_exhausted("too many streams of policies"))?;
        let mut wanted = self.wanted.subscribe();
        wanted.mark_changed();
        let place = Place { policies: self.clone(), name };
        let feed = Feed { place, id, said, wanted, scope, sent: Vec::new(), last: None };
        Ok(futures::stream::unfold(Some(feed), |feed| async {
            let mut feed = feed?;
            match feed.next().await {
                Ok(Some(message)) => Some((Ok(message), Some(feed))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        }))
    }

    /// What control is told.
    fn request(&self) -> control_pb::PoliciesRequest {
        let (here, wanted) = (self.here.borrow(), self.wanted.borrow());
        let holders = here.iter().map(|(name, Said { id, state })| {
            let order = wanted.orders.get(name);
            let ours = order.into_iter().flat_map(|order| {
                let refused = |epoch| Some((epoch, wanted.refused.get(&(order.service.clone(), epoch))?));
                [order.epoch, order.prepare].into_iter().find_map(refused)
            });
            let (refused, refusal) = match ours.into_iter().next() {
                Some((epoch, why)) => (epoch, why.clone()),
                None => (state.refused, state.refusal.clone()),
            };
            control_pb::PolicyHolder {
                name: name.clone(),
                spiffe_id: id.to_string(),
                epoch: state.epoch,
                prepared: state.prepared,
                refused,
                refusal,
                decided: state.decided,
                denied: state.denied,
            }
        });
        control_pb::PoliciesRequest { holders: holders.collect() }
    }
}

/// One workload's place among those that hold policies.
struct Place {
    policies: Policies,
    name: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.policies.here.send_modify(|here| drop(here.remove(&self.name)));
    }
}

/// One workload's stream.
struct Feed {
    place: Place,
    id: SpiffeId,
    said: Streaming<pb::PoliciesRequest>,
    wanted: watch::Receiver<Arc<Wanted>>,
    scope: Scope,
    /// The manifests whose files it has been sent.
    sent: Vec<String>,
    last: Option<Told>,
}

/// What was said last, without the files.
type Told = (Option<String>, Option<String>, bool);

impl Feed {
    async fn next(&mut self) -> Result<Option<pb::PoliciesResponse>, Status> {
        loop {
            tokio::select! {
                said = self.said.message() => match said? {
                    Some(said) => self.heard(said),
                    None => return Ok(None),
                },
                changed = self.wanted.changed() => if changed.is_err() { return Ok(None) },
                () = self.scope.draining() => return Err(Status::unavailable("the agent is stopping")),
            }
            let wanted = self.wanted.borrow_and_update().clone();
            let (in_force, prepare) = match wanted.orders.get(&self.place.name) {
                Some(order) => (order.in_force.clone(), order.prepared.clone()),
                None => (wanted.kept.get(&self.id).cloned(), None),
            };
            let text = |held: &Option<Arc<Held>>| held.as_ref().map(|held| held.text.clone());
            let told = (text(&in_force), text(&prepare), wanted.stale);
            let nothing = told.0.is_none() && told.1.is_none();
            if self.last.as_ref() == Some(&told) || nothing {
                continue;
            }
            self.last = Some(told);
            let in_force = in_force.map(|held| self.message(&held));
            let prepare = prepare.map(|held| self.message(&held));
            return Ok(Some(pb::PoliciesResponse { in_force, prepare, stale: wanted.stale }));
        }
    }

    fn heard(&self, state: pb::PoliciesRequest) {
        self.place.policies.here.send_if_modified(|here| {
            let Some(said) = here.get_mut(&self.place.name) else { return false };
            let news = said.state != state;
            said.state = state;
            news
        });
    }

    fn message(&mut self, held: &Held) -> pb::SignedPolicies {
        let known = self.sent.contains(&held.release.manifest);
        if !known {
            // What is in force, what is prepared, and the ones before: more than that nobody keeps.
            self.sent.truncate(3);
            self.sent.insert(0, held.release.manifest.clone());
        }
        held.message(!known)
    }
}

/// What the exchange with control works with.
pub(super) struct Exchange {
    pub(super) policies: Policies,
    pub(super) upstream: Arc<Upstream>,
    pub(super) source: IdentitySource,
    pub(super) trust_domain: TrustDomain,
    /// The agent's state directory.
    pub(super) state: PathBuf,
    pub(super) random: SharedRandom,
    pub(super) scope: Scope,
}

/// Keeps the stream with control open while any workload decides by policies, for as long as the scope lives.
pub(super) async fn exchange(exchange: Exchange) {
    let Exchange { policies, upstream, source, trust_domain, state, random, scope } = exchange;
    let mut taker = Taker {
        policies: policies.clone(),
        upstream: Arc::clone(&upstream),
        source,
        trust_domain,
        directory: state.join(DIRECTORY),
        floors: HashMap::new(),
        written: HashMap::new(),
    };
    taker.restore().await;
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let mut renewed = upstream.renewals();
    let mut here = policies.here.subscribe();
    let mut heard = upstream.clock().now();
    loop {
        tokio::select! {
            somebody = here.wait_for(|here| !here.is_empty()) => if somebody.is_err() { return },
            () = scope.draining() => return,
        }
        let ended = tokio::select! {
            ended = taker.listen(&mut backoff, &*random, &mut heard) => ended,
            changed = renewed.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
            () = scope.draining() => return,
        };
        let silent = upstream.clock().now().saturating_sub(heard);
        let stale = silent >= STALE_AFTER;
        if stale && taker.set_stale(true) {
            tracing::warn!(?silent, "control is not heard: the policies in force may be old");
        }
        let wait = backoff.wait(&*random);
        tracing::debug!(control = %upstream.address(), reason = ended, retry_in = ?wait, "no policies from control");
        tokio::select! {
            () = upstream.clock().sleep(wait) => {}
            () = scope.draining() => return,
        }
    }
}

/// Why a release is not taken. Control hears of a refusal, and takes the release back everywhere: what another attempt
/// may mend is none.
enum NotTaken {
    /// It could not be had.
    Later(String),
    /// It cannot be used.
    Refused(String),
}

/// Takes what control says, once it has been verified and is complete.
struct Taker {
    policies: Policies,
    upstream: Arc<Upstream>,
    source: IdentitySource,
    trust_domain: TrustDomain,
    directory: PathBuf,
    /// Of each service, below which nothing is taken.
    floors: HashMap<String, u64>,
    /// The releases on disk, by whose they are.
    written: HashMap<SpiffeId, String>,
}

impl Taker {
    /// One stream, to its end; returns why it ended.
    async fn listen(&mut self, backoff: &mut Backoff, random: &dyn Random, heard: &mut Duration) -> String {
        let policies = self.policies.clone();
        let (mut here, mut wanted) = (policies.here.subscribe(), policies.wanted.subscribe());
        here.mark_changed();
        let clock = Arc::clone(self.upstream.clock());
        let said = async_said(policies, here, wanted.clone(), clock);
        wanted.mark_unchanged();
        let mut stream = match self.upstream.client().policies(said).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => return describe(&status),
        };
        // What could not be had when it was said, and when it is asked for again unless something newer is said.
        let mut unfinished = None;
        loop {
            let clock = Arc::clone(self.upstream.clock());
            let again = async {
                match unfinished.take() {
                    Some((message, wait)) => {
                        clock.sleep(wait).await;
                        message
                    }
                    None => std::future::pending().await,
                }
            };
            let message = tokio::select! {
                message = stream.next() => match message {
                    Some(Ok(message)) => message,
                    Some(Err(status)) => return describe(&status),
                    None => break,
                },
                message = again => message,
            };
            *heard = clock.now();
            if self.take(&message).await {
                backoff.reset();
            } else {
                unfinished = Some((message, backoff.wait(random)));
            }
            // The stream itself says that control is there, up to its end.
            self.set_stale(false);
        }
        *heard = self.upstream.clock().now();
        "control closed the stream".to_owned()
    }

    fn set_stale(&self, stale: bool) -> bool {
        self.policies.wanted.send_if_modified(|wanted| {
            let news = wanted.stale != stale;
            if news {
                let Wanted { orders, kept, refused, .. } = &**wanted;
                let orders = orders.iter().map(|(name, order)| (name.clone(), order.again())).collect();
                *wanted = Arc::new(Wanted { orders, kept: kept.clone(), refused: refused.clone(), stale });
            }
            news
        })
    }

    /// Takes what control says; `false` if something of it could not be had and is worth another attempt.
    async fn take(&mut self, message: &control_pb::PoliciesResponse) -> bool {
        let now = self.upstream.clock().now();
        let before = self.policies.wanted.borrow().clone();
        let (mut refused, mut later) = (HashMap::new(), HashSet::new());
        let mut held: HashMap<(String, u64), Arc<Held>> = before
            .orders
            .values()
            .flat_map(|order| order.in_force.iter().chain(&order.prepared))
            .chain(before.kept.values())
            .map(|held| ((held.release.service.clone(), held.release.epoch), Arc::clone(held)))
            .collect();
        let Some(identity) = self.source.current() else { return false };
        for text in &message.releases {
            let release = match Release::verify(text, &self.trust_domain, &identity.bundles, now) {
                Ok(release) => release,
                Err(error) => {
                    tracing::error!(%error, "control sent policies that are not taken");
                    continue;
                }
            };
            let key = (release.service.clone(), release.epoch);
            if held.get(&key).is_some_and(|held| &held.text == text) {
                continue;
            }
            match self.complete(release, text.clone(), &held).await {
                Ok(one) => drop(held.insert(key, Arc::new(one))),
                Err(NotTaken::Later(why)) => {
                    tracing::warn!(service = key.0, epoch = key.1, why, "policies could not be had yet");
                    later.insert(key);
                }
                Err(NotTaken::Refused(why)) => {
                    tracing::error!(service = key.0, epoch = key.1, why, "policies are not taken");
                    refused.insert(key, why);
                }
            }
        }
        let orders: HashMap<String, Order> = message
            .orders
            .iter()
            .cloned()
            .map(|control_pb::PolicyOrder { name, service, epoch, prepare }| {
                let of = |epoch| held.get(&(service.clone(), epoch)).cloned();
                for epoch in [epoch, prepare] {
                    let key = (service.clone(), epoch);
                    if epoch > 0 && of(epoch).is_none() && !later.contains(&key) {
                        let why = "its release did not come, or does not verify";
                        refused.entry(key).or_insert_with(|| why.to_owned());
                    }
                }
                // What is in force stays so where its successor is not to be had.
                let in_force = of(epoch).or_else(|| before.orders.get(&name)?.in_force.clone());
                let prepared = of(prepare);
                (name, Order { service, epoch, prepare, in_force, prepared })
            })
            .collect();
        let mut kept = before.kept.clone();
        for (name, order) in &orders {
            let id = self.policies.here.borrow().get(name).map(|said| said.id.clone());
            if let (Some(id), Some(held)) = (id, &order.in_force) {
                kept.insert(id, Arc::clone(held));
            }
        }
        self.keep(&kept).await;
        self.policies.wanted.send_replace(Arc::new(Wanted { orders, kept, refused, stale: before.stale }));
        later.is_empty()
    }

    /// A release that may be used, with its files: those that are here already, and the others from control.
    async fn complete(
        &mut self,
        release: Release,
        text: String,
        held: &HashMap<(String, u64), Arc<Held>>,
    ) -> Result<Held, NotTaken> {
        let refused = |error: ReleaseError| NotTaken::Refused(error.to_string());
        let floor = self.floors.entry(release.service.clone()).or_default();
        release.may_serve(&release.service, *floor).map_err(refused)?;
        *floor = (*floor).max(release.floor);
        let same = held.values().find(|held| held.release.manifest == release.manifest);
        if let Some(same) = same {
            return Ok(Held { release, text, files: same.files.clone() });
        }
        let manifest = self.fetch(vec![release.manifest.clone()]).await?.remove(&release.manifest);
        let manifest = manifest
            .ok_or_else(|| NotTaken::Refused("control does not have its list of files".to_owned()))?;
        let manifest = Manifest::parse(&manifest).map_err(refused)?;
        let mut contents: HashMap<String, Vec<u8>> = HashMap::new();
        for known in held.values().filter(|held| held.release.service == release.service) {
            for (name, digest) in Manifest::of(&known.files).files() {
                if let Some(content) = known.files.get(name) {
                    contents.insert(digest.to_owned(), content.clone());
                }
            }
        }
        let lacking =
            manifest.files().map(|(_, digest)| digest).filter(|digest| !contents.contains_key(*digest));
        let lacking: Vec<String> = lacking.map(str::to_owned).collect();
        if !lacking.is_empty() {
            contents.extend(self.fetch(lacking).await?);
        }
        let file = |(name, digest): (&str, &str)| {
            let content = contents.get(digest);
            let lacks = || NotTaken::Refused(format!("control does not have its file {name:?}"));
            Ok::<_, NotTaken>((name.to_owned(), content.ok_or_else(lacks)?.clone()))
        };
        let files = manifest.files().map(file).collect::<Result<Files, _>>()?;
        release.check(&files).map_err(refused)?;
        Ok(Held { release, text, files })
    }

    /// Contents by their digests, as many of them as control has.
    async fn fetch(&self, digests: Vec<String>) -> Result<HashMap<String, Vec<u8>>, NotTaken> {
        let later = |status: Status| NotTaken::Later(describe(&status));
        let mut client = self.upstream.client();
        let asked = client.contents(control_pb::ContentsRequest { digests });
        let stream = within(self.upstream.clock(), FETCH_TIMEOUT, asked).await;
        let mut stream = stream.map_err(later)?.into_inner();
        let (mut found, mut bytes) = (HashMap::new(), 0);
        loop {
            let message = tokio::select! {
                message = stream.message() => message.map_err(later)?,
                () = self.upstream.clock().sleep(FETCH_TIMEOUT) => {
                    return Err(NotTaken::Later("no contents in time".to_owned()));
                }
            };
            let Some(control_pb::ContentsResponse { digest, content }) = message else { return Ok(found) };
            bytes += content.len();
            if bytes > MAX_BYTES || hex::sha256(&content) != digest {
                let why = "control sent contents that are too large, or not what was asked for";
                return Err(NotTaken::Refused(why.to_owned()));
            }
            found.insert(digest, content);
        }
    }

    /// Writes to the disk what has changed.
    async fn keep(&mut self, kept: &HashMap<SpiffeId, Arc<Held>>) {
        for (id, held) in kept {
            if self.written.get(id) == Some(&held.text) {
                continue;
            }
            let (path, id, held) = (self.directory.join(file_name(id)), id.clone(), Arc::clone(held));
            let floor = self.floors.get(&held.release.service).copied().unwrap_or(0);
            let (of, text) = (id.clone(), held.text.clone());
            let written = tokio::task::spawn_blocking(move || write(&path, &id, &held, floor)).await;
            match written.unwrap_or_else(|_| Err("the agent is stopping".to_owned())) {
                Ok(()) => drop(self.written.insert(of, text)),
                Err(error) => tracing::error!(%of, error, "policies are in force and could not be kept"),
            }
        }
    }

    /// Reads what was kept, as far as it still verifies.
    async fn restore(&mut self) {
        let directory = self.directory.clone();
        let read = tokio::task::spawn_blocking(move || read_all(&directory)).await.unwrap_or_default();
        let (now, mut kept) = (self.upstream.clock().now(), HashMap::new());
        let Some(identity) = self.source.current() else { return };
        for (path, read) in read {
            let checked = read.and_then(|Kept { spiffe_id, floor, release: text, files }| {
                let id = SpiffeId::new(&spiffe_id).map_err(|error| error.to_string())?;
                let release = Release::verify(&text, &self.trust_domain, &identity.bundles, now)
                    .and_then(|release| release.may_serve(&release.service, floor).map(|()| release))
                    .map_err(|error| error.to_string())?;
                let files = files.into_iter().map(|(name, content)| {
                    STANDARD.decode(content).map(|content| (name, content)).map_err(|error| error.to_string())
                });
                let files = files.collect::<Result<Files, _>>()?;
                release.check(&files).map_err(|error| error.to_string())?;
                let lowest = self.floors.entry(release.service.clone()).or_default();
                *lowest = (*lowest).max(floor);
                Ok((id, Held { release, text, files }))
            });
            match checked {
                Ok((id, held)) => {
                    tracing::info!(%id, epoch = held.release.epoch, commit = held.release.commit, "policies from before");
                    self.written.insert(id.clone(), held.text.clone());
                    kept.insert(id, Arc::new(held));
                }
                Err(why) => {
                    tracing::error!(path = %path.display(), why, "policies from before are not used");
                }
            }
        }
        self.policies.wanted.send_replace(Arc::new(Wanted { kept, ..Wanted::default() }));
    }
}

impl Order {
    fn again(&self) -> Self {
        let Self { service, epoch, prepare, in_force, prepared } = self;
        let (in_force, prepared) = (in_force.clone(), prepared.clone());
        Self { service: service.clone(), epoch: *epoch, prepare: *prepare, in_force, prepared }
    }
}

/// What is said to control: all of it, at once and at every change.
fn async_said(
    policies: Policies,
    here: watch::Receiver<BTreeMap<String, Said>>,
    wanted: watch::Receiver<Arc<Wanted>>,
    clock: identity::clock::SharedClock,
) -> impl Stream<Item = control_pb::PoliciesRequest> + Send {
    let start = (policies, here, wanted, clock, None::<control_pb::PoliciesRequest>);
    futures::stream::unfold(start, |(policies, mut here, mut wanted, clock, last)| async move {
        loop {
            tokio::select! {
                changed = here.changed() => changed.ok()?,
                changed = wanted.changed() => changed.ok()?,
            }
            clock.sleep(COALESCE).await;
            here.mark_unchanged();
            wanted.mark_unchanged();
            let request = policies.request();
            if last.as_ref() != Some(&request) {
                return Some((request.clone(), (policies, here, wanted, clock, Some(request))));
            }
        }
    })
}

/// What is kept of one workload's policies.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    spiffe_id: String,
    floor: u64,
    release: String,
    /// Base64.
    files: BTreeMap<String, String>,
}

fn file_name(id: &SpiffeId) -> String {
    format!("{}.json", hex::sha256(id.as_str().as_bytes()))
}

fn write(path: &Path, id: &SpiffeId, held: &Held, floor: u64) -> Result<(), String> {
    let files = held.files.iter().map(|(name, content)| (name.clone(), STANDARD.encode(content))).collect();
    let kept = Kept { spiffe_id: id.to_string(), floor, release: held.text.clone(), files };
    let text = serde_json::to_vec(&kept).map_err(|error| error.to_string())?;
    let directory = path.parent().unwrap_or(path);
    state::private_directory(directory).map_err(|error| error.to_string())?;
    state::write_private(path, &text).map_err(|error| error.to_string())
}

/// Every file of the directory, read or not.
fn read_all(directory: &Path) -> Vec<(PathBuf, Result<Kept, String>)> {
    let Ok(listing) = fs::read_dir(directory) else { return Vec::new() };
    let paths = listing.filter_map(|entry| Some(entry.ok()?.path()));
    let json = paths.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let read = |path: PathBuf| {
        let size = fs::metadata(&path).map(|data| data.len());
        let text = match size {
            Ok(size) if size > MAX_KEPT_BYTES => Err("it is too large".to_owned()),
            _ => fs::read(&path).map_err(|error| error.to_string()),
        };
        let kept = text.and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()));
        (path, kept)
    };
    json.map(read).collect()
}

#[cfg(test)]
mod tests {
    use identity::SystemClock;
    use identity::testing::TestAuthority;

    use super::*;

    #[tokio::test]
    async fn what_could_not_be_had_is_asked_for_again_and_is_no_refusal() {
        let authority = TestAuthority::new("bank.example");
        let trust_domain = TrustDomain::new("bank.example").unwrap();
        let (source, clock) = (authority.source("/palisade/agent/h1"), SystemClock::shared());
        // Nobody is there to give contents.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let control = trust_domain.workload("/palisade/control").unwrap();
        let upstream = Upstream::new(address, source.clone(), control, Arc::clone(&clock)).unwrap();
        let (policies, folder) = (Policies::default(), tempfile::tempdir().unwrap());
        let id = trust_domain.workload("/service/web").unwrap();
        let said = Said { id, state: pb::PoliciesRequest::default() };
        policies.here.send_modify(|here| drop(here.insert("service/web#1".into(), said)));
        let mut taker = Taker {
            policies: policies.clone(),
            upstream: Arc::new(upstream),
            source,
            trust_domain: trust_domain.clone(),
            directory: folder.path().to_owned(),
            floors: HashMap::new(),
            written: HashMap::new(),
        };
        let files = Files::from([("web.cedar".to_owned(), b"permit".to_vec())]);
        let signer = authority.issue("/palisade/policy");
        let release = Release {
            service: "web".into(),
            epoch: 7,
            floor: 0,
            commit: "c".repeat(40),
            signed: Duration::from_secs(clock.now_seconds()),
            manifest: Manifest::of(&files).digest(),
        };
        let order = control_pb::PolicyOrder {
            name: "service/web#1".into(),
            service: "web".into(),
            epoch: 7,
            prepare: 0,
        };
        let message = control_pb::PoliciesResponse {
            orders: vec![order],
            releases: vec![release.sign(&signer).unwrap()],
        };
        assert!(!taker.take(&message).await, "worth another attempt");
        assert_eq!(policies.request().holders[0].refused, 0);

        // It is here in another way: nothing needs to be fetched.
        let held = Held { release: release.clone(), text: String::new(), files };
        policies.wanted.send_modify(|wanted| {
            let kept = HashMap::from([(trust_domain.workload("/service/other").unwrap(), Arc::new(held))]);
            *wanted = Arc::new(Wanted { kept, ..Wanted::default() });
        });
        assert!(taker.take(&message).await);
        assert!(policies.wanted.borrow().orders["service/web#1"].in_force.is_some());

        // A release that does not come, or that nobody may have any more, stays a refusal.
        let without = control_pb::PoliciesResponse { releases: Vec::new(), ..message.clone() };
        policies.wanted.send_replace(Arc::default());
        assert!(taker.take(&without).await);
        assert_eq!(policies.request().holders[0].refused, 7);
        taker.floors.insert("web".into(), 8);
        assert!(taker.take(&message).await);
        assert!(policies.request().holders[0].refusal.contains("none below 8"));
    }
}
