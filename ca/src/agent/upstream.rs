//! The agent's connection to control: one channel for its calls, one stream that tells it what its host
//! needs to know.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Response, Status};
use zeroize::Zeroizing;

use identity::clock::SharedClock;
use identity::{IdentitySource, Scope, SpiffeId, TrustBundle, TrustDomain};

use super::node::Node;
use super::rotation::{Answers, Keys, SignError, Signer};
use crate::backoff::Backoff;
use crate::entry::Selectors;
use crate::pb::control as pb;
use crate::pb::control::control_client::ControlClient;
use crate::random::SharedRandom;
use crate::transport;

/// Longest wait for one answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Waits between attempts to open the stream.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Largest message on the stream: all entries of one host.
const MAX_STATE_BYTES: usize = 64 * 1024 * 1024;

/// What this host needs to know, whole.
#[derive(Debug)]
pub(super) struct HostView {
    pub(super) bundle: TrustBundle,
    pub(super) entries: Vec<LocalEntry>,
    pub(super) rotate_after: Duration,
    /// Empty if control has none.
    pub(super) pseudonym_key: Zeroizing<Vec<u8>>,
}

/// An entry as an agent sees it.
#[derive(Debug, Clone)]
pub(super) struct LocalEntry {
    pub(super) entry_id: String,
    pub(super) id: SpiffeId,
    pub(super) selectors: Selectors,
}

/// The way to control.
#[derive(Debug)]
pub(super) struct Upstream {
    address: SocketAddr,
    source: IdentitySource,
    control: SpiffeId,
    clock: SharedClock,
    channel: ArcSwap<Channel>,
    renewed: watch::Sender<()>,
}

impl Upstream {
    pub(super) fn new(
        address: SocketAddr,
        source: IdentitySource,
        control: SpiffeId,
        clock: SharedClock,
    ) -> Result<Self, rustls::Error> {
        let channel = transport::mutual_channel(address, &source, control.clone(), &clock)?;
        let channel = ArcSwap::from_pointee(channel);
        Ok(Self { address, source, control, clock, channel, renewed: watch::Sender::new(()) })
    }

    /// A client on the channel of the moment.
    pub(super) fn client(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel.load().as_ref().clone()).max_decoding_message_size(MAX_STATE_BYTES)
    }

    /// Hears when streams are to be opened anew: the ones of now belong to an older node identity.
    pub(super) fn renewals(&self) -> watch::Receiver<()> {
        self.renewed.subscribe()
    }

    /// What waits and timeouts go by.
    pub(super) fn clock(&self) -> &SharedClock {
        &self.clock
    }

    /// Where control is.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Leaves the connections that were made with an older node identity.
    pub(super) fn reconnect(&self) {
        match transport::mutual_channel(self.address, &self.source, self.control.clone(), &self.clock) {
            Ok(channel) => {
                self.channel.store(Arc::new(channel));
                self.renewed.send_replace(());
            }
            Err(error) => tracing::error!(%error, "TLS could not be configured; the old connection is kept"),
        }
    }
}

impl Signer for Upstream {
    fn sign(&self, keys: Keys) -> BoxFuture<'_, Result<Answers, SignError>> {
        async move {
            let items: Vec<_> =
                keys.into_iter().map(|(entry_id, csr)| pb::SignItem { entry_id, csr }).collect();
            let asked = items.len();
            let answer = within(&self.clock, CALL_TIMEOUT, self.client().sign(pb::SignRequest { items }))
                .await
                .map_err(|status| SignError(describe(&status)))?
                .into_inner();
            if answer.items.len() != asked {
                return Err(SignError(format!("{} answers to {asked} keys", answer.items.len())));
            }
            let outcome = |item: pb::SignedItem| match item.outcome {
                Some(pb::signed_item::Outcome::Svid(svid)) => Ok(svid),
                Some(pb::signed_item::Outcome::Refused(why)) => Err(why),
                None => Err("an empty answer".to_owned()),
            };
            Ok(answer.items.into_iter().map(outcome).collect())
        }
        .boxed()
    }
}

/// Waits for an answer, but not for ever.
pub(super) async fn within<T>(
    clock: &SharedClock,
    limit: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Response<T>, Status> {
    tokio::select! {
        outcome = call => outcome,
        () = clock.sleep(limit) => Err(Status::deadline_exceeded("no answer in time")),
    }
}

/// A status with its causes: tonic's own message says little of a failed connection.
pub(super) fn describe(status: &Status) -> String {
    let mut text = format!("{}: {}", status.code(), status.message());
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

/// Follows control's stream for as long as the scope lives. What was last heard stays in force while
/// control is away.
pub(super) async fn follow(
    upstream: Arc<Upstream>,
    node: Arc<Node>,
    view: watch::Sender<Option<Arc<HostView>>>,
    trust_domain: TrustDomain,
    random: SharedRandom,
    scope: Scope,
) {
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let mut renewed = upstream.renewals();
    while !scope.is_draining() {
        let ended = tokio::select! {
            ended = listen(&upstream, &node, &view, &trust_domain, &mut backoff) => ended,
            changed = renewed.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
            () = scope.draining() => return,
        };
        let wait = backoff.wait(&*random);
        tracing::warn!(control = %upstream.address, reason = ended, retry_in = ?wait, "no stream from control");
        tokio::select! {
            () = upstream.clock.sleep(wait) => {}
            () = scope.draining() => return,
        }
    }
}

/// One stream, from its opening to its end; returns why it ended.
async fn listen(
    upstream: &Upstream,
    node: &Node,
    view: &watch::Sender<Option<Arc<HostView>>>,
    trust_domain: &TrustDomain,
    backoff: &mut Backoff,
) -> String {
    let mut client = upstream.client();
    let opened = within(&upstream.clock, CALL_TIMEOUT, client.subscribe(pb::SubscribeRequest {})).await;
    let mut stream = match opened {
        Ok(stream) => stream.into_inner(),
        Err(status) => return describe(&status),
    };
    while let Some(message) = stream.next().await {
        let state = match message {
            Ok(state) => state,
            Err(status) => return describe(&status),
        };
        let sequence = state.sequence;
        match parse(state, trust_domain) {
            Ok(parsed) => {
                tracing::info!(sequence, entries = parsed.entries.len(), "told by control");
                backoff.reset();
                node.adopt_bundle(&parsed.bundle).await;
                view.send_replace(Some(Arc::new(parsed)));
            }
            Err(why) => return format!("control sent {why}"),
        }
    }
    "control closed the stream".to_owned()
}

/// Checks a message. One that is wrong in any part is refused whole: what was known before stays.
fn parse(state: pb::State, trust_domain: &TrustDomain) -> Result<HostView, String> {
    let bundle = TrustBundle::from_concatenated(trust_domain.clone(), &state.bundle)
        .map_err(|error| format!("a malformed bundle ({error})"))?;
    if bundle.authorities().is_empty() {
        return Err("an empty bundle".to_owned());
    }
    let rotate_after = Duration::from_millis(state.rotate_after_ms);
    if rotate_after < Duration::from_secs(1) {
        return Err("a rotation of less than a second".to_owned());
    }
    let entries = state
        .entries
        .into_iter()
        .map(|entry| {
            let id = SpiffeId::new(&entry.spiffe_id)
                .ok()
                .filter(|id| id.trust_domain() == trust_domain)
                .ok_or_else(|| format!("an entry for the foreign or malformed ID {:?}", entry.spiffe_id))?;
            let selectors = Selectors {
                uid: entry.uid,
                gid: entry.gid,
                path: entry.path.map(PathBuf::from),
                sha256: entry.sha256,
            };
            if selectors == Selectors::default() {
                return Err(format!("an entry without selectors for {id}"));
            }
            Ok(LocalEntry { entry_id: entry.entry_id, id, selectors })
        })
        .collect::<Result<_, String>>()?;
    Ok(HostView { bundle, entries, rotate_after, pseudonym_key: Zeroizing::new(state.pseudonym_key) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::{Authority, DEFAULT_ROOT_TTL};
    use crate::random::SystemRandom;

    fn state(spiffe_id: &str, uid: Option<u32>) -> pb::State {
        let domain = TrustDomain::new("bank.example").unwrap();
        let now = Duration::from_secs(1_800_000_000);
        let authority = Authority::generate(domain, DEFAULT_ROOT_TTL, &*SystemRandom::shared(), now).unwrap();
        pb::State {
            sequence: 1,
            bundle: authority.bundle().concatenated(),
            entries: vec![pb::Entry {
                entry_id: "e".into(),
                spiffe_id: spiffe_id.into(),
                uid,
                ..Default::default()
            }],
            rotate_after_ms: 20_000,
            pseudonym_key: vec![7; 32],
        }
    }

    #[test]
    fn a_message_with_a_foreign_or_boundless_entry_or_no_bundle_is_refused_whole() {
        let domain = TrustDomain::new("bank.example").unwrap();
        let good = state("spiffe://bank.example/service/web", Some(1));
        assert_eq!(parse(good.clone(), &domain).unwrap().entries.len(), 1);
        for bad in [
            state("spiffe://bank.example.evil/service/web", Some(1)),
            state("spiffe://bank.example/service/web", None),
            pb::State { bundle: Vec::new(), ..good.clone() },
            pb::State { bundle: vec![1, 2, 3], ..good.clone() },
            pb::State { rotate_after_ms: 0, ..good },
        ] {
            assert!(parse(bad, &domain).is_err());
        }
    }
}
