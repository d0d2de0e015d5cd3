//! The cast of an attack run: real identities of real workloads, real tokens of real users.
//!
//! Whoever can start a workload's program can be that workload: that is what a compromise is. The demo's
//! owner can start them all, so the run becomes web, accounts, payments and the gateway in turn.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use ca::admin::AdminClient;
use ca::model::DecisionQuery;
use gateway::https::Trust;
use identity::clock::{SharedClock, SystemClock};
use identity::txn::{self, Arrival, User, Verifier};
use identity::{SpiffeId, TrustDomain};
use policy::DecisionRecord;
use secrecy::{ExposeSecret as _, SecretString};

use super::Outcome;
use super::calls::{Answer, Call, Https, Workload};
use crate::cmd::id;
use crate::demo::layout::Layout;
use crate::demo::people;
use crate::demo::ready::Ready;
use crate::failure::Failure;

/// How long a refusal may take from a sidecar through its agent to control.
const RECORD_DEADLINE: Duration = Duration::from_secs(10);
/// Newest decisions looked through: far more than come in between.
const RECENT: usize = 500;
/// Between two looks for it.
const RECORD_INTERVAL: Duration = Duration::from_millis(50);

/// Everything the attacks need.
pub(super) struct Stage {
    ready: Ready,
    trust_domain: TrustDomain,
    admin: AdminClient,
    /// The agent's socket.
    pub(in crate::demo) agent_socket: PathBuf,
    /// The clock of the run.
    pub(in crate::demo) clock: SharedClock,
    /// The gateway, as its clients see it.
    pub(in crate::demo) https: Https,
    /// The OIDC provider, as its clients see it.
    pub(in crate::demo) idp: Https,
    /// web's identity, and so on.
    pub(in crate::demo) web: Workload,
    /// accounts' identity.
    pub(in crate::demo) accounts: Workload,
    /// payments' identity.
    pub(in crate::demo) payments: Workload,
    /// The gateway's identity.
    pub(in crate::demo) gateway: Workload,
    /// An identity that lives seconds.
    pub(in crate::demo) short_lived: Workload,
    /// alice, logged in.
    pub(in crate::demo) alice: Person,
    /// bob, logged in.
    pub(in crate::demo) bob: Person,
}

/// A logged-in user.
pub(super) struct Person {
    /// As a transaction token names them.
    pub(in crate::demo) user: User,
    /// For the gateway.
    pub(in crate::demo) access_token: String,
    /// For the client alone.
    pub(in crate::demo) id_token: String,
    /// A genuine access token for another API.
    pub(in crate::demo) other_audience_token: String,
}

/// An attack whose answer came over HTTP.
pub(super) struct Attempt {
    pub(in crate::demo) name: &'static str,
    pub(in crate::demo) tried: String,
    pub(in crate::demo) answer: Answer,
    pub(in crate::demo) twin: String,
    pub(in crate::demo) twin_ok: bool,
}

/// An attack that should not get past the handshake.
pub(super) struct Connection {
    pub(in crate::demo) name: &'static str,
    pub(in crate::demo) tried: String,
    pub(in crate::demo) local: SocketAddr,
    pub(in crate::demo) outcome: Result<(), String>,
    pub(in crate::demo) expected_rule: &'static str,
    pub(in crate::demo) twin: &'static str,
    pub(in crate::demo) twin_ok: bool,
}

impl Stage {
    /// Reads the ready file, becomes every workload and logs both users in.
    pub(in crate::demo) async fn set(ready: &Path) -> anyhow::Result<Self> {
        let ready = Ready::read(ready).map_err(plain)?;
        let clock = SystemClock::shared();
        let socket = ready.agent_socket.clone();
        let layout = Layout::new(&ready.state);
        let become_role = |role: &str| {
            let (svid, bundles) = id::fetch_as(&layout.program(role), &socket)?;
            Ok::<_, anyhow::Error>(Workload { svid, bundles })
        };
        let web = become_role("web-sidecar")?;
        let alice = person(&ready, "alice", &clock).await?;
        let bob = person(&ready, "bob", &clock).await?;
        Ok(Self {
            trust_domain: ready.trust_domain.clone(),
            admin: AdminClient::new(Layout::new(&ready.state).admin_socket(), clock.clone()),
            https: Https::new(address_of(&ready.gateway)?, &web.bundles)?,
            idp: Https::new(address_of(&ready.idp)?, &web.bundles)?,
            accounts: become_role("accounts-sidecar")?,
            payments: become_role("payments-sidecar")?,
            gateway: become_role("gateway")?,
            short_lived: become_role("probe")?,
            agent_socket: socket,
            clock,
            web,
            alice,
            bob,
            ready,
        })
    }

    /// Time since the Unix epoch.
    pub(in crate::demo) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// A service's SPIFFE ID.
    pub(in crate::demo) fn id(&self, service: &str) -> anyhow::Result<SpiffeId> {
        Ok(self.trust_domain.workload(&format!("/service/{service}"))?)
    }

    /// A service's mTLS listener.
    pub(in crate::demo) fn inbound(&self, service: &str) -> anyhow::Result<SocketAddr> {
        let service = self
            .ready
            .services
            .get(service)
            .with_context(|| format!("no service {service} in the ready file"))?;
        Ok(service.inbound)
    }

    /// A role's program.
    pub(in crate::demo) fn program(&self, role: &str) -> PathBuf {
        Layout::new(&self.ready.state).program(role)
    }

    /// The path of the provider's JWKS.
    pub(in crate::demo) fn jwks_path(&self) -> &'static str {
        "/jwks.json"
    }

    /// Calls a service's sidecar as `workload`.
    pub(in crate::demo) async fn as_workload(
        &self,
        workload: &Workload,
        service: &str,
        call: &Call,
    ) -> anyhow::Result<Answer> {
        workload.call(&self.id(service)?, self.inbound(service)?, call, &self.clock).await
    }

    /// Calls a service's sidecar as web, with a live token of alice's that web rightly holds.
    pub(in crate::demo) async fn as_web_for_alice(
        &self,
        service: &str,
        call: Call,
    ) -> anyhow::Result<Answer> {
        let token = self.chain_at(service, &call, self.now())?;
        self.as_workload(&self.web, service, &call.txn(&token)).await
    }

    /// alice's chain gateway → web → `service` for `call`, as the gateway and web make it.
    pub(in crate::demo) fn chain_at(
        &self,
        service: &str,
        call: &Call,
        at: Duration,
    ) -> anyhow::Result<String> {
        let web = self.web.svid.id();
        let token = self.gateway.mint(&self.alice.user, web, call.binding(), at)?;
        let arrival = Arrival {
            me: web,
            presenter: self.gateway.svid.id(),
            bundles: &self.web.bundles,
            generation: 1,
            binding: call.binding(),
            now: at,
        };
        let chain = Verifier::new(vec![self.gateway.svid.id().clone()]).verify(&token, arrival)?;
        Ok(txn::extend(&chain, &self.web.svid, &self.id(service)?, call.binding(), at)?)
    }

    /// Calls the vault as `workload`.
    pub(in crate::demo) async fn at_vault(&self, workload: &Workload, call: &Call) -> anyhow::Result<Answer> {
        let vault = self.trust_domain.workload("/palisade/vault")?;
        workload.call(&vault, self.ready.vault.tls_addr, call, &self.clock).await
    }

    /// Judges an attack that came back with an HTTP answer, by the receipt in it.
    pub(in crate::demo) async fn judge(&self, attempt: Attempt) -> anyhow::Result<Outcome> {
        let Attempt { name, tried, answer, twin, twin_ok } = attempt;
        let receipt = answer.receipt().unwrap_or_default();
        let record = if receipt.is_empty() {
            None
        } else {
            self.record(|record| record.receipt.to_string() == receipt).await?
        };
        let (layer, rule) = named(record.as_ref());
        Ok(Outcome {
            name,
            tried,
            stopped: answer.refused() && record.is_some(),
            layer,
            rule,
            receipt,
            twin_ok,
            twin,
        })
    }

    /// Judges an attack that should not have got past the handshake, by the record of its address.
    pub(in crate::demo) async fn judge_connection(&self, connection: Connection) -> anyhow::Result<Outcome> {
        let local = Some(connection.local.to_string());
        // The kernel gives a port out again: a request permitted earlier may have come from the same one.
        let refused = |record: &DecisionRecord| record.verdict == policy::Outcome::Deny;
        let record = self.record(|record| record.peer_address == local && refused(record)).await?;
        let (layer, rule) = named(record.as_ref());
        let stopped = connection.outcome.is_err() && rule == connection.expected_rule;
        Ok(Outcome {
            name: connection.name,
            tried: connection.tried,
            stopped,
            layer,
            rule,
            receipt: record.map(|record| record.receipt.to_string()).unwrap_or_default(),
            twin_ok: connection.twin_ok,
            twin: connection.twin.to_owned(),
        })
    }

    /// Judges an attempt to fetch an SVID from the agent.
    pub(in crate::demo) async fn judge_fetch(
        &self,
        name: &'static str,
        tried: String,
        attack: Output,
        twin: Output,
    ) -> anyhow::Result<Outcome> {
        let said = String::from_utf8_lossy(&attack.stderr);
        // The agent's refusal names its receipt, as every refusal does.
        let receipt = said
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
            .find(|word| word.starts_with("r-"));
        let receipt = receipt.unwrap_or_default().to_owned();
        let record = if receipt.is_empty() {
            None
        } else {
            self.record(|record| record.receipt.to_string() == receipt).await?
        };
        let (layer, rule) = named(record.as_ref());
        Ok(Outcome {
            name,
            tried,
            stopped: !attack.status.success() && attack.stdout.is_empty() && record.is_some(),
            layer,
            rule,
            receipt,
            twin_ok: twin.status.success() && !twin.stdout.is_empty(),
            twin: "web's sidecar, where it belongs, asks".into(),
        })
    }

    /// Waits until control has the record of a refusal that happened just now.
    async fn record(
        &self,
        wanted: impl Fn(&DecisionRecord) -> bool,
    ) -> anyhow::Result<Option<DecisionRecord>> {
        let until = self.now() + RECORD_DEADLINE;
        loop {
            let stored = self
                .admin
                .decisions(&DecisionQuery { limit: Some(RECENT), ..DecisionQuery::default() })
                .await?;
            let records = stored.into_iter().filter_map(|stored| serde_json::from_value(stored.json).ok());
            let found = records.into_iter().find(|record| wanted(record));
            if found.is_some() || self.now() > until {
                return Ok(found);
            }
            self.clock.sleep(RECORD_INTERVAL).await;
        }
    }
}

fn named(record: Option<&DecisionRecord>) -> (String, String) {
    match record {
        Some(record) => (record.decided_by(), record.rule.name().to_owned()),
        None => ("nobody recorded it".to_owned(), String::new()),
    }
}

/// The socket address in an `https://IP:PORT` URL.
fn address_of(url: &str) -> anyhow::Result<SocketAddr> {
    let rest = url.strip_prefix("https://").with_context(|| format!("{url} is not an https URL"))?;
    let authority = rest.split('/').next().unwrap_or(rest);
    Ok(authority.parse()?)
}

/// A failure as a plain error.
fn plain(failure: Failure) -> anyhow::Error {
    anyhow!("{}: {}", failure.message, failure.causes.join(": "))
}

async fn person(ready: &Ready, name: &str, clock: &SharedClock) -> anyhow::Result<Person> {
    let Some(user) = ready.users.get(name) else { bail!("no user {name} in the ready file") };
    let trust = Trust::pem_file(&ready.ca_bundle)?;
    let password = SecretString::from(user.password.clone());
    let login = async |client: &str| {
        let tokens = people::tokens(&ready.idp, client, name, &password, trust.clone(), clock).await;
        tokens.map_err(plain)
    };
    let tokens = login(people::CLI_CLIENT).await?;
    let elsewhere = login(people::OTHER_CLIENT).await?;
    let id_token = tokens.id_token.as_ref().context("the provider gave no ID token")?;
    Ok(Person {
        user: User {
            id: name.to_owned(),
            issuer: ready.idp.clone(),
            client: people::CLI_CLIENT.to_owned(),
            scopes: vec!["openid".into(), people::BANK_SCOPE.into()],
            groups: Vec::new(),
            auth_time: 0,
            tenant: None,
            mfa: false,
        },
        id_token: id_token.expose_secret().to_owned(),
        access_token: tokens.access_token.expose_secret().to_owned(),
        other_audience_token: elsewhere.access_token.expose_secret().to_owned(),
    })
}
