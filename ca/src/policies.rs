//! The client with which a workload gets its policies: by its agent, and so from control.
//!
//! Each release is verified here once more, by the bundle that verifies mTLS peers: neither the agent nor whoever
//! answers in its place can make policies. What is in force stays so while nobody says anything else, for as long as
//! the policies themselves allow ([`Holder::put_in_force`]).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tonic::Streaming;

use identity::clock::SharedClock;
use identity::workload_api;
use identity::{IdentitySource, Scope, TrustDomain};

use crate::backoff::Backoff;
use crate::pb::mesh as pb;
use crate::pb::mesh::mesh_client::MeshClient;
use crate::random::SystemRandom;
use crate::release::{MAX_BYTES, Release, ReleaseError};

pub use crate::release::Files;

const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How often the numbers of decisions are said.
const COUNT_EVERY: Duration = Duration::from_secs(5);
/// Largest message: two releases with all their files.
const MAX_MESSAGE_BYTES: usize = 2 * MAX_BYTES + 1024 * 1024;
/// Longest reason that is said.
const MAX_REASON_CHARS: usize = 500;

/// Who decides by policies.
pub trait Holder: Send + Sync + 'static {
    /// Policies that have been read and can be put in force at any time.
    type Read: Clone + Send + 'static;

    /// Reads policies. Blocks.
    ///
    /// # Errors
    /// Why they are not taken, in words: control hears it, and takes them back everywhere.
    fn read(&self, release: &Release, files: &Files) -> Result<Self::Read, String>;

    /// Puts policies in force; says for how long they may be, from when they were signed.
    fn put_in_force(&self, release: &Release, read: Self::Read) -> Duration;

    /// They have been in force for longer than they may be: nothing is to be allowed by them any more.
    fn expired(&self);

    /// Decisions since the start, and how many of them said no.
    fn decisions(&self) -> (u64, u64);

    /// Whether control has not been heard for long.
    fn stale(&self, stale: bool);
}

/// What [`follow`] needs to know.
#[derive(Debug)]
pub struct Following {
    /// The agent's socket.
    pub socket: PathBuf,
    /// Whose policies are wanted.
    pub service: String,
    /// The mesh that they must be signed for.
    pub trust_domain: TrustDomain,
    /// Its bundles say who signs.
    pub source: IdentitySource,
}

/// Gets policies, and every later version of them, until `scope` drains.
pub fn follow<H: Holder>(following: Following, holder: H, clock: SharedClock, scope: &Scope) {
    let draining = scope.clone();
    let socket = following.socket.clone();
    let mut follower = Follower {
        following,
        holder: Arc::new(holder),
        clock,
        in_force: None,
        prepared: None,
        lifetime: Duration::MAX,
        lapsed: false,
        decided_before: (0, 0),
        floor: 0,
        said: watch::Sender::new(pb::PoliciesRequest::default()),
    };
    scope.spawn_critical("policies", async move {
        let random = SystemRandom::shared();
        let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
        let mut client =
            MeshClient::new(workload_api::channel(&socket)).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let clock = Arc::clone(&follower.clock);
        loop {
            let ended = tokio::select! {
                ended = follower.listen(&mut client, &mut backoff) => ended,
                () = draining.draining() => return,
            };
            let wait = backoff.wait(&*random);
            tracing::debug!(reason = ended, retry_in = ?wait, "no policies from the agent");
            tokio::select! {
                () = clock.sleep(wait) => {}
                () = follower.expiry() => follower.expire(),
                () = draining.draining() => return,
            }
        }
    });
}

/// A release and what was read of it.
struct Held<R> {
    release: Release,
    read: R,
}

struct Follower<H: Holder> {
    following: Following,
    holder: Arc<H>,
    clock: SharedClock,
    in_force: Option<Held<H::Read>>,
    prepared: Option<Held<H::Read>>,
    /// For how long that may be, from when it was signed.
    lifetime: Duration,
    /// Whether it was, and is in force no more.
    lapsed: bool,
    /// What had been decided when it came into force.
    decided_before: (u64, u64),
    floor: u64,
    said: watch::Sender<pb::PoliciesRequest>,
}

/// Why policies are not taken.
#[derive(Debug, Error)]
enum NotTaken {
    /// They are not to be taken by anybody, and nobody is told whose epoch it is.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// They cannot be had now.
    #[error("{0}")]
    Later(&'static str),
    /// They cannot be used here.
    #[error("{1}")]
    Refused(u64, String),
}

impl<H: Holder> Follower<H> {
    /// One stream, to its end; returns why it ended.
    async fn listen(
        &mut self,
        client: &mut MeshClient<tonic::transport::Channel>,
        backoff: &mut Backoff,
    ) -> String {
        if self.following.source.current().is_none() {
            return "there is no identity yet".to_owned();
        }
        let mut said = self.said.subscribe();
        said.mark_changed();
        let said = futures::stream::unfold(said, |mut said| async {
            said.changed().await.ok()?;
            let now = said.borrow_and_update().clone();
            Some((now, said))
        });
        let mut stream: Streaming<pb::PoliciesResponse> =
            match client.policies(workload_api::request(said)).await {
                Ok(stream) => stream.into_inner(),
                Err(status) => return status.message().to_owned(),
            };
        let clock = Arc::clone(&self.clock);
        loop {
            let message = tokio::select! {
                message = stream.message() => message,
                () = clock.sleep(COUNT_EVERY) => {
                    self.count();
                    continue;
                }
                () = self.expiry() => {
                    self.expire();
                    continue;
                }
            };
            match message {
                Ok(Some(message)) => match self.take(message).await {
                    Ok(()) => backoff.reset(),
                    Err(error) => return error.to_string(),
                },
                Ok(None) => return "the agent closed the stream".to_owned(),
                Err(status) => return status.message().to_owned(),
            }
        }
    }

    async fn take(&mut self, message: pb::PoliciesResponse) -> Result<(), NotTaken> {
        self.holder.stale(message.stale);
        let mut refused = None;
        if let Some(signed) = message.prepare {
            match self.read(signed).await {
                Ok(held) => self.prepared = Some(held),
                Err(NotTaken::Refused(epoch, why)) => refused = Some((epoch, why)),
                Err(error) => return Err(error),
            }
        }
        if let Some(signed) = message.in_force {
            match self.read(signed).await {
                Ok(held) => self.put_in_force(held),
                Err(NotTaken::Refused(epoch, why)) => refused = Some((epoch, why)),
                Err(error) => return Err(error),
            }
        }
        let epoch = |held: &Option<Held<H::Read>>| held.as_ref().map_or(0, |held| held.release.epoch);
        let (in_force, prepared) = (epoch(&self.in_force), epoch(&self.prepared));
        let (decided, denied) = self.decided();
        self.said.send_if_modified(|said| {
            let (refused, refusal) = refused.unwrap_or_default();
            let now = pb::PoliciesRequest { epoch: in_force, prepared, refused, refusal, decided, denied };
            let news = *said != now;
            *said = now;
            news
        });
        Ok(())
    }

    /// Verifies a release and reads its files, if that has not been done.
    async fn read(&mut self, signed: pb::SignedPolicies) -> Result<Held<H::Read>, NotTaken> {
        let Following { service, trust_domain, source, .. } = &self.following;
        let identity = source.current().ok_or(NotTaken::Later("there is no identity yet"))?;
        let release = Release::verify(&signed.release, trust_domain, &identity.bundles, self.clock.now())?;
        release.may_serve(service, self.floor)?;
        self.floor = self.floor.max(release.floor);
        let known = self.in_force.iter().chain(&self.prepared);
        let same = known.into_iter().find(|held| held.release.manifest == release.manifest);
        if let Some(same) = same {
            return Ok(Held { read: same.read.clone(), release });
        }
        let files: Files = signed.files.into_iter().map(|file| (file.name, file.content)).collect();
        if files.is_empty() {
            // It has come before, and was not kept: the agent sends it again to who asks anew.
            return Err(NotTaken::Later("the agent left out files that are not here"));
        }
        release.check(&files)?;
        let (holder, of) = (Arc::clone(&self.holder), release.clone());
        let read = tokio::task::spawn_blocking(move || holder.read(&of, &files)).await;
        match read.unwrap_or_else(|_| Err("reading them failed".to_owned())) {
            Ok(read) => Ok(Held { release, read }),
            Err(why) => {
                tracing::error!(
                    epoch = release.epoch,
                    commit = release.commit,
                    why,
                    "policies are not taken"
                );
                let why = why.chars().take(MAX_REASON_CHARS).collect();
                Err(NotTaken::Refused(release.epoch, why))
            }
        }
    }

    fn put_in_force(&mut self, held: Held<H::Read>) {
        let Release { epoch, commit, .. } = &held.release;
        let before = self.in_force.as_ref().map(|held| held.release.epoch);
        if before.is_some_and(|before| before > *epoch) {
            tracing::error!(epoch, before, "policies of an earlier epoch are not put in force");
            return;
        }
        if before != Some(*epoch) {
            tracing::info!(epoch, commit, "policies in force");
            self.decided_before = self.holder.decisions();
        }
        // What was only signed anew, or committed again, is in force already: nothing that is open needs to be judged
        // again.
        let same = |before: &Release| before.manifest == held.release.manifest;
        if self.lapsed || !self.in_force.as_ref().is_some_and(|before| same(&before.release)) {
            self.lifetime = self.holder.put_in_force(&held.release, held.read.clone());
            self.lapsed = false;
        }
        self.in_force = Some(held);
    }

    /// When what is in force expires.
    fn expiry(&self) -> impl Future<Output = ()> + Send + 'static {
        let clock = Arc::clone(&self.clock);
        let expires = self.expires().filter(|_| !self.lapsed);
        async move {
            match expires {
                Some(expires) => clock.sleep(expires.saturating_sub(clock.now())).await,
                None => std::future::pending().await,
            }
        }
    }

    fn expires(&self) -> Option<Duration> {
        self.in_force.as_ref().map(|held| held.release.signed.saturating_add(self.lifetime))
    }

    fn expire(&mut self) {
        if self.expires().is_some_and(|expires| self.clock.now() >= expires) {
            tracing::error!("the policies in force have expired: nothing is allowed by them any more");
            self.holder.expired();
            self.lapsed = true;
        }
    }

    fn decided(&self) -> (u64, u64) {
        let (decided, denied) = self.holder.decisions();
        (decided.saturating_sub(self.decided_before.0), denied.saturating_sub(self.decided_before.1))
    }

    fn count(&self) {
        let (decided, denied) = self.decided();
        self.said.send_if_modified(|said| {
            let news = (said.decided, said.denied) != (decided, denied);
            (said.decided, said.denied) = (decided, denied);
            news
        });
    }
}
