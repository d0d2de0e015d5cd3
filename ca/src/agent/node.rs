//! The host's own identity: got once with a join token, kept on disk, renewed in time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use identity::clock::SharedClock;
use identity::source::IdentityPublisher;
use identity::{BundleSet, IdentitySource, Scope, SpiffeId, TrustBundle, TrustDomain, X509Svid};

use super::upstream::{self, Upstream};
use super::{AgentConfig, AgentError, Bootstrap, MAX_NAP};
use crate::backoff::Backoff;
use crate::csr::PendingKey;
use crate::pb::control as pb;
use crate::pb::control::control_client::ControlClient;
use crate::random::SharedRandom;
use crate::{state, transport};

/// Name of the file in the state directory.
const FILE_NAME: &str = "node.json";
/// How long joining is tried while control cannot be reached: both may be starting at the same time.
const JOIN_PATIENCE: Duration = Duration::from_secs(30);
/// An identity that ends sooner than this is not worth starting with.
const MIN_REST: Duration = Duration::from_secs(10);
/// Longest wait for one answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// The node identity in force.
#[derive(Debug)]
pub(super) struct Node {
    path: PathBuf,
    trust_domain: TrustDomain,
    source: IdentitySource,
    publisher: IdentityPublisher,
    clock: SharedClock,
    /// One writer of the file at a time.
    writing: Mutex<()>,
}

/// The file. A key in the clear, so the file is 0600 in a 0700 directory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    chain: String,
    key: Zeroizing<String>,
    bundle: String,
}

const VERSION: u32 = 1;

impl Node {
    /// The stored identity if it is good, else a new one by join token.
    pub(super) async fn open(
        config: &AgentConfig,
        id: &SpiffeId,
        control: &SpiffeId,
        clock: &SharedClock,
        random: &SharedRandom,
        scope: &Scope,
    ) -> Result<Self, AgentError> {
        let path = config.state.join(FILE_NAME);
        let pinned =
            config.bootstrap.as_ref().map(|bootstrap| pinned_bundle(config, bootstrap)).transpose()?;
        let (svid, bundle, fresh) = match usable(&path, config, id, pinned.as_ref(), clock.now()) {
            Ok((svid, bundle)) => (svid, bundle, false),
            Err(why) => {
                let (Some(bootstrap), Some(pinned)) = (&config.bootstrap, pinned) else { return Err(why) };
                tracing::info!(%id, %why, "joining with a token");
                let joining = Joining { config, bootstrap, pinned, id, control, clock, random, scope };
                let (svid, bundle) = joining.run().await?;
                (svid, bundle, true)
            }
        };
        tracing::info!(%id, serial = svid.serial(), fresh, "node identity");
        let (publisher, source) = IdentitySource::channel();
        let (trust_domain, clock) = (config.trust_domain.clone(), Arc::clone(clock));
        let node = Self { path, trust_domain, source, publisher, clock, writing: Mutex::new(()) };
        if fresh {
            node.adopt(svid, bundle).await?;
        } else {
            node.publisher.publish(svid, Arc::new(BundleSet::new([bundle])));
        }
        Ok(node)
    }

    pub(super) fn source(&self) -> IdentitySource {
        self.source.clone()
    }

    /// Stores the identity that a join token bought, then uses it. The token is spent: an identity that
    /// would be gone after a restart is an error now rather than then.
    async fn adopt(&self, svid: X509Svid, bundle: TrustBundle) -> Result<(), AgentError> {
        let _writing = self.writing.lock().await;
        self.write(&svid, &bundle).await?;
        self.publisher.publish(svid, Arc::new(BundleSet::new([bundle])));
        Ok(())
    }

    /// Takes over a new bundle, if it is one.
    pub(super) async fn adopt_bundle(&self, bundle: &TrustBundle) {
        let _writing = self.writing.lock().await;
        let Some(identity) = self.source.current() else { return };
        if identity
            .bundles
            .get(&self.trust_domain)
            .is_some_and(|old| old.authorities() == bundle.authorities())
        {
            return;
        }
        if let Err(error) = self.write(&identity.svid, bundle).await {
            tracing::error!(%error, "the new bundle could not be stored; it is used all the same");
        }
        self.publisher.publish(identity.svid.clone(), Arc::new(BundleSet::new([bundle.clone()])));
    }

    async fn write(&self, svid: &X509Svid, bundle: &TrustBundle) -> Result<(), AgentError> {
        let chain: Vec<u8> = svid.chain().iter().flat_map(|der| der.iter().copied()).collect();
        let stored = Stored {
            version: VERSION,
            chain: STANDARD.encode(chain),
            key: Zeroizing::new(STANDARD.encode(svid.key_pkcs8())),
            bundle: STANDARD.encode(bundle.concatenated()),
        };
        let path = self.path.clone();
        let written = tokio::task::spawn_blocking(move || {
            // Plain strings: serialisation cannot fail, and an empty file would be refused at the start.
            let text = Zeroizing::new(serde_json::to_vec(&stored).unwrap_or_default());
            state::write_private(&path, &text)
        });
        Ok(written.await.map_err(|_| AgentError::Stopping)??)
    }
}

/// Reads the stored identity and says why it cannot be used.
fn usable(
    path: &std::path::Path,
    config: &AgentConfig,
    id: &SpiffeId,
    pinned: Option<&TrustBundle>,
    now: Duration,
) -> Result<(X509Svid, TrustBundle), AgentError> {
    let damaged = || AgentError::Damaged(path.to_owned());
    let text = state::read_private(path)?.ok_or_else(|| AgentError::NotJoined(path.to_owned()))?;
    let stored: Stored = serde_json::from_slice(&text).map_err(|_| damaged())?;
    let decode = |text: &str| STANDARD.decode(text).map_err(|_| damaged());
    let key = Zeroizing::new(decode(&stored.key)?);
    let svid = X509Svid::from_concatenated(&decode(&stored.chain)?, key).map_err(|_| damaged())?;
    let bundle = TrustBundle::from_concatenated(config.trust_domain.clone(), &decode(&stored.bundle)?)
        .map_err(|_| damaged())?;
    if stored.version != VERSION || bundle.authorities().is_empty() {
        return Err(damaged());
    }
    if svid.id() != id {
        let (path, found, wanted) = (path.to_owned(), svid.id().clone(), id.clone());
        return Err(AgentError::OtherIdentity { path, found, wanted });
    }
    if now + MIN_REST >= svid.not_after() {
        return Err(AgentError::Expired(path.to_owned()));
    }
    // The trust domain was begun anew: control would not know us by what we have.
    let shared = |pinned: &TrustBundle| {
        pinned.authorities().iter().any(|authority| bundle.authorities().contains(authority))
    };
    if pinned.is_some_and(|pinned| !shared(pinned)) {
        return Err(AgentError::NotJoined(path.to_owned()));
    }
    Ok((svid, bundle))
}

fn pinned_bundle(config: &AgentConfig, bootstrap: &Bootstrap) -> Result<TrustBundle, AgentError> {
    let authorities = CertificateDer::pem_slice_iter(bootstrap.bundle_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| AgentError::BootstrapBundle(None))?;
    if authorities.is_empty() {
        return Err(AgentError::BootstrapBundle(None));
    }
    TrustBundle::new(config.trust_domain.clone(), authorities)
        .map_err(|error| AgentError::BootstrapBundle(Some(error)))
}

/// One host joining.
struct Joining<'a> {
    config: &'a AgentConfig,
    bootstrap: &'a Bootstrap,
    pinned: TrustBundle,
    id: &'a SpiffeId,
    control: &'a SpiffeId,
    clock: &'a SharedClock,
    random: &'a SharedRandom,
    scope: &'a Scope,
}

impl Joining<'_> {
    async fn run(self) -> Result<(X509Svid, TrustBundle), AgentError> {
        let address = self.config.control;
        let give_up = self.clock.now() + JOIN_PATIENCE;
        let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
        loop {
            let bundles = BundleSet::new([self.pinned.clone()]);
            let channel = transport::joining_channel(address, bundles, self.control.clone(), self.clock)
                .map_err(AgentError::Tls)?;
            // A new key for every attempt: one that was sent and got no answer is not used again.
            let key = PendingKey::generate().map_err(AgentError::Key)?;
            let request = pb::AttestRequest {
                host: self.config.host.clone(),
                join_token: self.bootstrap.join_token.expose_secret().to_owned(),
                csr: key.request().map_err(AgentError::Key)?,
            };
            let mut client = ControlClient::new(channel);
            let reason = match upstream::within(self.clock, CALL_TIMEOUT, client.attest(request)).await {
                Ok(answer) => return self.accept(key, &answer.into_inner()),
                Err(status) if is_passing(&status) => upstream::describe(&status),
                Err(status) => return Err(AgentError::Refused(status.message().to_owned())),
            };
            if self.clock.now() >= give_up {
                return Err(AgentError::Unreachable { address, reason });
            }
            let wait = backoff.wait(&**self.random);
            tracing::warn!(%address, reason, retry_in = ?wait, "control cannot be reached yet");
            tokio::select! {
                () = self.clock.sleep(wait) => {}
                () = self.scope.draining() => return Err(AgentError::Stopping),
            }
        }
    }

    fn accept(
        &self,
        key: PendingKey,
        answer: &pb::AttestResponse,
    ) -> Result<(X509Svid, TrustBundle), AgentError> {
        let svid = key.with_chain(&answer.svid)?;
        if svid.id() != self.id {
            return Err(AgentError::Refused(format!("it gave the identity {}", svid.id())));
        }
        let bundle = TrustBundle::from_concatenated(self.config.trust_domain.clone(), &answer.bundle)
            .map_err(|error| AgentError::BootstrapBundle(Some(error)))?;
        if bundle.authorities().is_empty() {
            return Err(AgentError::BootstrapBundle(None));
        }
        Ok((svid, bundle))
    }
}

/// Whether another attempt may go better.
fn is_passing(status: &tonic::Status) -> bool {
    use tonic::Code::{Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable, Unknown};
    matches!(status.code(), Unavailable | Unknown | DeadlineExceeded | Cancelled | ResourceExhausted)
}

/// Renews the node identity at half of its life, for as long as the scope lives.
pub(super) async fn keep(node: Arc<Node>, upstream: Arc<Upstream>, random: SharedRandom, scope: Scope) {
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let mut not_before = Duration::ZERO;
    loop {
        let Some(identity) = node.source.current() else { return };
        let (start, end) = (identity.svid.not_before(), identity.svid.not_after());
        let now = node.clock.now();
        let due = (start + end.saturating_sub(start) / 2).max(not_before);
        let wait = due.saturating_sub(now).min(MAX_NAP);
        if !wait.is_zero() {
            tokio::select! {
                () = node.clock.sleep(wait) => continue,
                () = scope.draining() => return,
            }
        }
        let outcome = tokio::select! {
            outcome = renew(&node, &upstream) => outcome,
            () = scope.draining() => return,
        };
        match outcome {
            Ok(()) => {
                backoff.reset();
                not_before = Duration::ZERO;
                upstream.reconnect();
            }
            Err(error) => {
                let wait = backoff.wait(&*random);
                not_before = node.clock.now() + wait;
                let expired = node.clock.now() >= end;
                tracing::warn!(%error, expired, retry_in = ?wait, "the node identity could not be renewed");
            }
        }
    }
}

async fn renew(node: &Node, upstream: &Upstream) -> Result<(), AgentError> {
    let key = PendingKey::generate().map_err(AgentError::Key)?;
    let request = pb::RenewRequest { csr: key.request().map_err(AgentError::Key)? };
    let answer = upstream::within(&node.clock, CALL_TIMEOUT, upstream.client().renew(request))
        .await
        .map_err(|status| AgentError::Refused(upstream::describe(&status)))?
        .into_inner();
    let svid = key.with_chain(&answer.svid)?;
    if node.source.current().is_none_or(|identity| identity.svid.id() != svid.id()) {
        return Err(AgentError::Refused(format!("it gave the identity {}", svid.id())));
    }
    let bundle = TrustBundle::from_concatenated(node.trust_domain.clone(), &answer.bundle)
        .map_err(|error| AgentError::BootstrapBundle(Some(error)))?;
    if bundle.authorities().is_empty() {
        return Err(AgentError::BootstrapBundle(None));
    }
    tracing::info!(serial = svid.serial(), "node identity renewed");
    let _writing = node.writing.lock().await;
    if let Err(error) = node.write(&svid, &bundle).await {
        // The old one is still on disk; a full disk must not take the host out of the mesh.
        tracing::error!(%error, "the renewed node identity could not be stored; it is used all the same");
    }
    node.publisher.publish(svid, Arc::new(BundleSet::new([bundle])));
    Ok(())
}

#[cfg(test)]
mod tests {
    use identity::clock::ManualClock;
    use secrecy::SecretString;

    use super::*;
    use crate::authority::{Authority, DEFAULT_ROOT_TTL, LeafRequest};
    use crate::random::SystemRandom;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn authority() -> Authority {
        let domain = TrustDomain::new("bank.example").unwrap();
        Authority::generate(domain, DEFAULT_ROOT_TTL, &*SystemRandom::shared(), NOW).unwrap()
    }

    fn svid(authority: &Authority, id: &SpiffeId, ttl: u64) -> X509Svid {
        let key = PendingKey::generate().unwrap();
        let public_key = key.public().unwrap();
        let ttl = Duration::from_secs(ttl);
        let request = LeafRequest { public_key: &public_key, id, dns: &[], ips: &[], ttl };
        let issued = authority.issue(&request, &*SystemRandom::shared(), NOW).unwrap();
        key.with_certificates(vec![issued.certificate]).unwrap()
    }

    fn config(state: &std::path::Path) -> AgentConfig {
        AgentConfig {
            redactor: None,
            host: "host-1".into(),
            trust_domain: TrustDomain::new("bank.example").unwrap(),
            socket: state.join("agent.sock"),
            socket_mode: 0o666,
            state: state.to_owned(),
            control: "127.0.0.1:1".parse().unwrap(),
            bootstrap: None,
            refusals: None,
        }
    }

    #[tokio::test]
    async fn a_stored_identity_is_used_until_it_ends_and_only_for_its_own_host() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let (authority, path) = (authority(), directory.path().join(FILE_NAME));
        let id = SpiffeId::new("spiffe://bank.example/palisade/agent/host-1").unwrap();
        assert!(matches!(usable(&path, &config, &id, None, NOW), Err(AgentError::NotJoined(_))));

        let (publisher, source) = IdentitySource::channel();
        let node = Node {
            path: path.clone(),
            trust_domain: config.trust_domain.clone(),
            source,
            publisher,
            clock: ManualClock::at(NOW),
            writing: Mutex::new(()),
        };
        node.adopt(svid(&authority, &id, 100), authority.bundle().clone()).await.unwrap();
        assert!(usable(&path, &config, &id, None, NOW).is_ok());
        assert!(usable(&path, &config, &id, Some(authority.bundle()), NOW).is_ok());

        let late = NOW + Duration::from_secs(95);
        assert!(matches!(usable(&path, &config, &id, None, late), Err(AgentError::Expired(_))));
        let other = SpiffeId::new("spiffe://bank.example/palisade/agent/host-2").unwrap();
        assert!(matches!(usable(&path, &config, &other, None, NOW), Err(AgentError::OtherIdentity { .. })));
        let anew = self::authority();
        let reset = usable(&path, &config, &id, Some(anew.bundle()), NOW);
        assert!(matches!(reset, Err(AgentError::NotJoined(_))), "a trust domain begun anew");
        state::write_private(&path, b"{\"version\":1,").unwrap();
        assert!(matches!(usable(&path, &config, &id, None, NOW), Err(AgentError::Damaged(_))));
    }

    #[test]
    fn a_bundle_for_joining_must_hold_an_authority() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let bootstrap = |bundle_pem: &str| Bootstrap {
            join_token: SecretString::from("t"),
            bundle_pem: bundle_pem.to_owned(),
        };
        assert!(pinned_bundle(&config, &bootstrap(&authority().bundle().pem())).is_ok());
        for bad in ["", "nothing", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert!(matches!(pinned_bundle(&config, &bootstrap(bad)), Err(AgentError::BootstrapBundle(_))));
        }
    }
}
