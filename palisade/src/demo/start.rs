//! Brings the demo up: secrets, mesh.toml, processes in the order of their needs, then the ready file.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ca::admin::AdminClient;
use gateway::https::Trust;
use identity::TrustDomain;
use identity::clock::{SharedClock, SystemClock};
use ring::rand::{SecureRandom, SystemRandom};
use secrecy::{ExposeSecret as _, SecretString};
use secrets::path::SecretPath;
use serde_json::json;

use super::layout::Layout;
use super::plan::{self, SERVICES};
use super::ready::{self, Ready, ReadyService, ReadyUser, ReadyVault};
use super::run::{Pids, supervise};
use super::state::StateDir;
use super::supervisor::{ChildSpec, Probe, Supervisor};
use super::{StartArgs, people, policies, ports, private, roles};
use crate::credentials::Credential;
use crate::failure::{Exit, Failure};
use crate::printer::{self, Printer};

/// A gate: the agent's join token is there.
const JOIN_TOKEN: &str = "join token";
/// A gate: the vault is unsealed and holds what the bank needs.
const VAULT_FILLED: &str = "vault filled";
/// How long any one process may take to get ready on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How long any one may take to end.
const STOP_WITHIN: Duration = Duration::from_secs(15);
/// Life of the agent's join token: it is used at once.
const JOIN_TOKEN_TTL: Duration = Duration::from_secs(300);
/// The agent's name for this host.
const HOST: &str = "local";
/// The share of its life after which an SVID is replaced: early, so that rotation is seen.
const ROTATIONS_A_LIFE: u32 = 6;

/// Runs the demo until it is asked to end.
pub(super) fn run(args: &StartArgs, printer: &Printer) -> Result<Exit, Failure> {
    // One thread: the kernel ties the children's lives to the thread that started them.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    let (path, temporary) = match &args.state {
        Some(path) => (path.clone(), false),
        None => (super::default_state(), true),
    };
    let state = StateDir::open(&path)?;
    let layout = Layout::new(state.path());
    let outcome = runtime.block_on(demo(args, &state, &layout, printer));
    // Whatever happened: no socket and no state that nobody asked to keep is left behind.
    let mut leftovers = vec![layout.sockets()];
    if temporary && outcome.is_ok() {
        leftovers.push(state.path().to_owned());
    }
    for path in leftovers {
        if let Err(error) = std::fs::remove_dir_all(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            printer.warning(&format!("{} is left behind: {error}", path.display()));
        }
    }
    outcome
}

async fn demo(
    args: &StartArgs,
    state: &StateDir,
    layout: &Layout,
    printer: &Printer,
) -> Result<Exit, Failure> {
    let clock = SystemClock::shared();
    let random = SystemRandom::new();
    let prepared = prepare(args, state, layout, &random, &clock, printer).await?;
    let logs = state.directory("logs")?;
    let started = clock.now();
    let ready_file = args.ready.clone().unwrap_or_else(|| layout.ready());
    let root_token = OnceCell::new();
    let outcome = supervise(
        prepared.children(layout),
        &[JOIN_TOKEN, VAULT_FILLED],
        &logs,
        clock.clone(),
        printer,
        async |supervisor| {
            let opened = bring_up(supervisor, &prepared, layout, &random, &clock).await?;
            root_token.get_or_init(|| opened);
            Ok(())
        },
        |pids, first| {
            let ready = prepared.ready(layout, root_token.get(), pids)?;
            ready::write_json(&ready_file, &ready)
                .map_err(|error| Failure::new("the ready file cannot be written").because(&error))?;
            let took = clock.now().saturating_sub(started);
            if first { show(&ready, &ready_file, took, printer) } else { Ok(()) }
        },
    )
    .await;
    // A ready file without a demo would be a lie.
    let _never_written = std::fs::remove_file(&ready_file).is_err();
    outcome
}

/// What is known before anything runs.
struct Prepared {
    addresses: BTreeMap<String, SocketAddr>,
    passwords: BTreeMap<String, SecretString>,
    console_token: SecretString,
}

async fn prepare(
    args: &StartArgs,
    state: &StateDir,
    layout: &Layout,
    random: &dyn SecureRandom,
    clock: &SharedClock,
    printer: &Printer,
) -> Result<Prepared, Failure> {
    let bin = state.directory("bin")?;
    let left = state.await_leftovers(&bin, clock).await?;
    if left > 0 {
        printer.progress(&format!("waited for {left} processes of an earlier demo to end"));
    }
    for role in roles_with_programs() {
        roles::executable(&bin, &role)
            .map_err(|error| Failure::new("cannot make a role's program").because(&error))?;
    }
    let names = plan::addresses();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let chosen = ports::choose(&layout.state().join("ports.json"), &names, u64::from(std::process::id()))
        .map_err(|error| Failure::new("no ports for the demo").because(&error))?;
    for (name, port) in &chosen.moved {
        printer.warning(&format!("port {port}, which {name} had last time, is taken; it has another now"));
    }
    let address = |port: &u16| SocketAddr::from(([127, 0, 0, 1], *port));
    let addresses: BTreeMap<String, SocketAddr> =
        chosen.ports.iter().map(|(name, port)| (name.clone(), address(port))).collect();
    drop(chosen);
    make_sockets(layout)?;
    policies::install(&layout.policies(), printer)?;
    let mesh = plan::mesh_toml(layout, &addresses, args.svid_ttl, args.svid_ttl / ROTATIONS_A_LIFE);
    private::write(&layout.mesh_toml(), mesh.as_bytes())?;
    let kept = |role: &str, credential: Credential| {
        private::keep(&layout.credentials(role).join(credential.file_name()), || private::key(random))
    };
    kept("control", Credential::CaPassphrase)?;
    kept("gateway", Credential::GatewaySessionKey)?;
    let client_secret = kept("gateway", Credential::OidcClientSecret)?;
    let copy = layout.credentials("idp").join(Credential::OidcClientSecret.file_name());
    private::write(&copy, client_secret.expose_secret().as_bytes())?;
    Ok(Prepared {
        passwords: people::passwords(layout, random)?,
        console_token: kept("control", Credential::ConsoleToken)?,
        addresses,
    })
}

/// The sockets' directory may be entered by other users, as services of theirs would; it must be ours.
fn make_sockets(layout: &Layout) -> Result<(), Failure> {
    let path = layout.sockets();
    let make = || -> std::io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o711).create(&path)?;
        let meta = std::fs::symlink_metadata(&path)?;
        if !meta.is_dir() || meta.uid() != rustix::process::geteuid().as_raw() {
            return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, "somebody else made it"));
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o711))
    };
    make().map_err(|error| {
        Failure::new(format!("{} cannot be used for sockets", path.display())).because(&error)
    })
}

/// Roles whose processes the agent must tell apart, and those that it need not.
fn roles_with_programs() -> Vec<String> {
    let mut roles = ["control", "agent", "vault", "idp", "gateway", plan::PROBE].map(str::to_owned).to_vec();
    for service in SERVICES {
        roles.push(service.to_owned());
        roles.push(format!("{service}-sidecar"));
    }
    roles
}

impl Prepared {
    fn at(&self, name: &str) -> SocketAddr {
        // INVARIANT: every name used here is one of `plan::addresses`, all of which were chosen.
        self.addresses.get(name).copied().unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// Every process of the demo.
    fn children(&self, layout: &Layout) -> Vec<ChildSpec> {
        let child = |role: &str, verb: &[&str], after: &[&str], ready: Probe| {
            let mut args = vec!["--config".into(), layout.mesh_toml().into_os_string()];
            args.extend(["--credentials".into(), layout.credentials(role).into_os_string()]);
            args.extend(verb.iter().map(Into::into));
            ChildSpec {
                role: role.to_owned(),
                program: layout.program(role),
                args,
                env: Vec::new(),
                after: after.iter().map(|name| (*name).to_owned()).collect(),
                ready,
                ready_within: READY_WITHIN,
                stop_within: STOP_WITHIN,
                palisade: true,
            }
        };
        let mut children = vec![
            child("control", &["control"], &[], Probe::Unix(layout.admin_socket())),
            child("agent", &["agent"], &[JOIN_TOKEN], Probe::Unix(layout.agent_socket())),
            child("vault", &["vault"], &["agent"], Probe::Tcp(self.at("vault.operator"))),
            child("idp", &["idp"], &["agent"], Probe::Tcp(self.at("idp"))),
            child("gateway", &["gateway"], &["idp"], Probe::Tcp(self.at("gateway"))),
        ];
        for service in SERVICES {
            let sidecar = format!("{service}-sidecar");
            let ready =
                Probe::Http { address: self.at(&format!("{service}.admin")), path: "/ready".to_owned() };
            children.push(child(&sidecar, &["sidecar", "--service", service], &["agent"], ready));
            let ready =
                Probe::Http { address: self.at(&format!("{service}.app")), path: "/healthz".to_owned() };
            let data = layout.data(service).display().to_string();
            let verb = ["demo", "app", service, "--data", &data];
            children.push(child(service, &verb, &[&sidecar, VAULT_FILLED], ready));
        }
        children
    }

    /// Where everything is.
    fn ready(
        &self,
        layout: &Layout,
        root_token: Option<&SecretString>,
        pids: &Pids,
    ) -> Result<Ready, Failure> {
        let invalid =
            |error: identity::id::IdError| Failure::new("the demo's names are wrong").because(&error);
        let trust_domain = TrustDomain::new(plan::TRUST_DOMAIN).map_err(invalid)?;
        let mut services = BTreeMap::new();
        for service in SERVICES {
            let at = |part: &str| self.at(&format!("{service}.{part}"));
            let calls = plan::CALLS.iter().filter(|(caller, _)| *caller == service);
            services.insert(
                service.to_owned(),
                ReadyService {
                    spiffe_id: trust_domain.workload(&format!("/service/{service}")).map_err(invalid)?,
                    inbound: at("inbound"),
                    app: at("app"),
                    admin: at("admin"),
                    calls: calls.map(|(_, to)| ((*to).to_owned(), at(&format!("calls.{to}")))).collect(),
                },
            );
        }
        let users = self.passwords.iter().map(|(name, password)| {
            (name.clone(), ReadyUser { password: password.expose_secret().to_owned() })
        });
        Ok(Ready {
            version: ready::READY_VERSION,
            trust_domain,
            gateway: format!("https://{}", self.at("gateway")),
            console: format!("http://{}/?token={}", self.at("console"), self.console_token.expose_secret()),
            idp: format!("https://{}", self.at("idp")),
            control: self.at("control"),
            agent_socket: layout.agent_socket(),
            vault: ReadyVault {
                addr: self.at("vault.operator"),
                tls_addr: self.at("vault"),
                root_token: root_token.map(|token| token.expose_secret().to_owned()).unwrap_or_default(),
            },
            services,
            users: users.collect(),
            pids: pids.clone(),
            state: layout.state().to_owned(),
            ca_bundle: layout.ca_bundle(),
        })
    }
}

/// What has to be done between the starts of processes, in order.
async fn bring_up(
    supervisor: &Supervisor,
    prepared: &Prepared,
    layout: &Layout,
    random: &dyn SecureRandom,
    clock: &SharedClock,
) -> Result<SecretString, Failure> {
    supervisor.ready("control").await?;
    let admin = AdminClient::new(layout.admin_socket(), clock.clone());
    let control =
        |error: ca::admin::AdminError| Failure::new("control does not do as it is asked").because(&error);
    let bundle = admin.bundle().await.map_err(control)?;
    private::write(&layout.ca_bundle(), bundle.as_bytes())?;
    let agent = layout.credentials("agent");
    private::write(&agent.join(Credential::TrustBundle.file_name()), bundle.as_bytes())?;
    let token = admin.create_join_token(HOST, JOIN_TOKEN_TTL).await.map_err(control)?;
    private::write(&agent.join(Credential::JoinToken.file_name()), token.token.as_bytes())?;
    supervisor.open(JOIN_TOKEN);

    supervisor.ready("vault").await?;
    let root_token = fill_vault(prepared.at("vault.operator"), layout, random).await?;
    supervisor.open(VAULT_FILLED);

    supervisor.all_ready().await?;
    first_request(prepared, layout, clock).await?;
    Ok(root_token)
}

/// Makes or unseals the vault, and puts in what the bank needs.
async fn fill_vault(
    operator: SocketAddr,
    layout: &Layout,
    random: &dyn SecureRandom,
) -> Result<SecretString, Failure> {
    let failed =
        |error: secrets::client::ClientError| Failure::new("the vault cannot be opened").because(&error);
    let share_file = layout.credentials("vault").join(Credential::VaultUnsealKey.file_name());
    let root_file = layout.credentials("vault-operator").join("root-token");
    let client = secrets::client::Client::new(operator).map_err(failed)?;
    let mut status = client.seal_status().await.map_err(failed)?;
    if !status.initialized {
        let keys = client.init(1, 1).await.map_err(failed)?;
        let share = keys.shares.first().ok_or_else(|| Failure::new("the vault gave no unseal key"))?;
        private::write(&share_file, share.expose_secret().as_bytes())?;
        private::write(&root_file, keys.root_token.expose_secret().as_bytes())?;
        status = client.seal_status().await.map_err(failed)?;
    }
    let missing = || {
        Err(Failure::new("the vault's keys are not where they were kept").hint("start with a fresh --state"))
    };
    if status.sealed {
        client.unseal(&private::keep(&share_file, missing)?).await.map_err(failed)?;
    }
    let root_token = private::keep(&root_file, missing)?;
    let client = client.with_token(root_token.clone());
    let wrong = |error: secrets::path::PathError| Failure::new("a secret's path is wrong").because(&error);
    let path = SecretPath::new("accounts/db-key").map_err(wrong)?;
    if client.kv_get(&path).await.map_err(failed)?.is_none() {
        let mut key = zeroize::Zeroizing::new([0; 32]);
        random.fill(&mut *key).map_err(|_| Failure::new("the machine gives no randomness"))?;
        let key = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, *key);
        client.kv_put(&path, &json!({ "key": key }), Some(0)).await.map_err(failed)?;
    }
    Ok(root_token)
}

/// Healthy means: a user can log in and read an account through every hop.
async fn first_request(prepared: &Prepared, layout: &Layout, clock: &SharedClock) -> Result<(), Failure> {
    let trust = trust(&layout.ca_bundle())?;
    let issuer = format!("https://{}", prepared.at("idp"));
    let Some((user, password)) = prepared.passwords.first_key_value() else { return Ok(()) };
    let bundle = super::attack::bundle(&layout.ca_bundle())?;
    let front = super::attack::calls::Https::new(prepared.at("gateway"), &bundle)
        .map_err(|error| Failure::new(format!("no client for the gateway: {error}")))?;
    let until = clock.now() + READY_WITHIN;
    loop {
        let tokens = people::tokens(&issuer, people::CLI_CLIENT, user, password, trust.clone(), clock).await;
        let why = match tokens {
            Err(failure) => failure,
            Ok(tokens) => {
                let call = super::attack::calls::Call::get("/api/accounts").bearer(people::exposed(&tokens));
                match front.call(&call).await {
                    Ok(answer) if answer.ok() => return Ok(()),
                    Ok(answer) => Failure::new(format!(
                        "the first request was answered with {}: {}",
                        answer.status,
                        String::from_utf8_lossy(&answer.body)
                    )),
                    Err(error) => Failure::new(format!("the first request failed: {error:#}")),
                }
            }
        };
        if clock.now() > until {
            return Err(why.hint(format!("the logs are in {}", layout.state().join("logs").display())));
        }
        clock.sleep(Duration::from_millis(50)).await;
    }
}

/// The mesh's authorities, as its clients trust them.
pub(super) fn trust(ca_bundle: &Path) -> Result<Trust, Failure> {
    Trust::pem_file(ca_bundle)
        .map_err(|error| Failure::new("the mesh's authorities cannot be read").because(&error))
}

/// What a person sees once all is up.
fn show(ready: &Ready, file: &Path, took: Duration, printer: &Printer) -> Result<(), Failure> {
    let row = |role: &str, what: String| {
        let pid = ready.pids.get(role).map(ToString::to_string).unwrap_or_default();
        vec![role.to_owned(), pid, what]
    };
    let mut rows = vec![
        row("control", format!("CA and registrations, for agents at {}", ready.control)),
        row("agent", format!("identities for this host, at {}", ready.agent_socket.display())),
        row("vault", format!("secrets; VAULT_ADDR=http://{}", ready.vault.addr)),
        row("idp", ready.idp.clone()),
        row("gateway", ready.gateway.clone()),
    ];
    for (name, service) in &ready.services {
        rows.push(row(name, format!("http://{}, for its sidecar only", service.app)));
        rows.push(row(&format!("{name}-sidecar"), format!("{}, as {}", service.inbound, service.spiffe_id)));
    }
    let people: Vec<String> =
        ready.users.iter().map(|(name, user)| format!("  log in   {name} / {}\n", user.password)).collect();
    let me = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("palisade"));
    // The other verbs look there by themselves.
    let known = *file == super::ready_file(None);
    let at = if known { String::new() } else { format!(" --ready {}", file.display()) };
    let (me, file, state) = (me.display(), file.display(), ready.state.display());
    printer.data(&format!(
        "\n{}\n\
         All healthy {:.1} s after the first process started: alice has logged in and read her accounts.\n\n\
         Gateway   {gateway}\n{}\
         Console   {}\n\
         CA        {ca} (the mesh's own: tell your browser, or accept its warning)\n\
         Vault     VAULT_ADDR=http://{}, its token is vault.root_token in {file}\n\n\
         Try:\n  \
         {me} demo attack{at}\n  \
         curl --cacert {ca} {gateway}/api/accounts/42 \\\n    \
         -H \"Authorization: Bearer $({me} demo token alice{at})\"\n  \
         {me} --config {state}/mesh.toml explain RECEIPT\n\n\
         Logs are in {state}/logs. Ctrl-C ends everything.\n",
        printer::table(&["process", "pid", "where"], &rows),
        took.as_secs_f64(),
        people.concat(),
        ready.console,
        ready.vault.addr,
        gateway = ready.gateway,
        ca = ready.ca_bundle.display(),
    ))
}
