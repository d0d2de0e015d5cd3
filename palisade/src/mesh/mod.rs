//! `mesh.toml`, parsed once into types that cannot be wrong.
//!
//! | module | what it holds |
//! |---|---|
//! | [`file`] | the file as it is written: sections, keys, their reference |
//! | [`load`] | mistakes of form: syntax, unknown keys, wrong types, missing keys |
//! | [`check`] | mistakes of meaning, and the way from text to [`Mesh`] |
//! | `read` | one value each: addresses, URLs, durations, selectors |
//! | [`schema`] | JSON Schema and sample file, made from the reference |

pub(crate) mod check;
pub(crate) mod file;
pub(crate) mod load;
pub(crate) mod read;
pub(crate) mod schema;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::Duration;

use identity::{SpiffeId, TrustDomain};
use serde::{Serialize, Serializer};
use serde_json::Value as Json;
use sidecar::capture::Destination;
use sidecar::otlp::TracesConfig;
use sidecar::proxy_protocol::Networks;
use sidecar::traffic::config::{HealthCheck, RateLimit, Traffic};
use sidecar::traffic::egress::Rule;
use sidecar::traffic::resolve::Source;
use url::Url;

pub(crate) use file::{AppProtocol, Mode};
use policy::Problem;

/// One mesh, as `mesh.toml` describes it: defaults filled in, paths absolute, references resolved.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Mesh {
    /// The file it was read from.
    #[serde(skip)]
    pub(crate) file: PathBuf,
    pub(crate) mesh: Whole,
    pub(crate) control: Control,
    pub(crate) agent: Agent,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gateway: Option<Gateway>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) idp: Option<Idp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vault: Option<Vault>,
    pub(crate) service: BTreeMap<ServiceName, Service>,
    /// How calls to services go, where something is said of it.
    #[serde(skip)]
    pub(crate) traffic: BTreeMap<ServiceName, Traffic>,
    /// The same as it was written: what it leaves out is the reference's to say.
    #[serde(rename = "traffic", skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) traffic_written: BTreeMap<ServiceName, Json>,
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "by_zone")]
    pub(crate) zones: Vec<Zone>,
    pub(crate) workload: BTreeMap<String, Workload>,
    pub(crate) limits: Limits,
    pub(crate) telemetry: Telemetry,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) traces: Option<TracesConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) policy: Option<PolicySource>,
}

/// `[mesh]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Whole {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) policies: PathBuf,
    pub(crate) mode: Mode,
}

/// `[policy]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PolicySource {
    pub(crate) repository: String,
    pub(crate) branch: String,
    pub(crate) directory: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) allowed_signers: Option<PathBuf>,
    #[serde(serialize_with = "humane")]
    pub(crate) every: Duration,
}

/// `[control]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Control {
    pub(crate) listen: SocketAddr,
    pub(crate) admin_socket: PathBuf,
    pub(crate) console: SocketAddr,
    pub(crate) state: PathBuf,
    #[serde(serialize_with = "humane")]
    pub(crate) svid_ttl: Duration,
    #[serde(serialize_with = "humane")]
    pub(crate) rotate_after: Duration,
}

/// `[agent]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Agent {
    pub(crate) socket: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) control: HostPort,
    pub(crate) host: String,
}

/// `[gateway]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Gateway {
    pub(crate) listen: SocketAddr,
    #[serde(serialize_with = "shown")]
    pub(crate) public_url: Url,
    #[serde(serialize_with = "shown")]
    pub(crate) issuer: Url,
    pub(crate) issuer_ca: PathBuf,
    pub(crate) scopes: Vec<String>,
    pub(crate) client_id: String,
    pub(crate) audience: String,
    /// Path prefix to service.
    pub(crate) routes: BTreeMap<String, ServiceName>,
    #[serde(
        rename = "proxy_protocol_from",
        skip_serializing_if = "Networks::is_empty",
        serialize_with = "networks"
    )]
    pub(crate) proxies: Networks,
    pub(crate) state: PathBuf,
    pub(crate) attest: Attest,
}

/// `[idp]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Idp {
    pub(crate) listen: SocketAddr,
    #[serde(serialize_with = "shown")]
    pub(crate) issuer: Url,
    pub(crate) users: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) attest: Attest,
    /// Public clients beside the gateway's and the command line's: name to audience.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) clients: BTreeMap<String, String>,
}

/// `[vault]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Vault {
    pub(crate) listen: SocketAddr,
    pub(crate) operator: SocketAddr,
    pub(crate) state: PathBuf,
    pub(crate) audit: PathBuf,
    pub(crate) attest: Attest,
}

/// `[service.NAME]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Service {
    pub(crate) id: SpiffeId,
    /// Whose policies decide about it.
    pub(crate) policies: ServiceName,
    pub(crate) host: String,
    pub(crate) app: SocketAddr,
    pub(crate) inbound: SocketAddr,
    #[serde(
        rename = "proxy_protocol_from",
        skip_serializing_if = "Networks::is_empty",
        serialize_with = "networks"
    )]
    pub(crate) proxies: Networks,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hbone: Option<Hbone>,
    pub(crate) endpoints: Found,
    pub(crate) admin: SocketAddr,
    pub(crate) attest: Attest,
    pub(crate) calls: BTreeMap<Callee, SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) capture: Option<Capture>,
    /// Where apps that know of no sidecar dial it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) secrets: Vec<String>,
    /// Who may write its relations, by the names of services and workloads.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) relations_writers: Vec<String>,
    pub(crate) app_protocol: AppProtocol,
    #[serde(serialize_with = "humane")]
    pub(crate) request_timeout: Duration,
    #[serde(skip)]
    pub(crate) rate_limit: Option<RateLimit>,
    #[serde(rename = "rate_limit", skip_serializing_if = "Option::is_none")]
    pub(crate) rate_limit_written: Option<Json>,
    #[serde(skip)]
    pub(crate) health: Option<HealthCheck>,
    #[serde(rename = "health", skip_serializing_if = "Option::is_none")]
    pub(crate) health_written: Option<Json>,
    #[serde(serialize_with = "humane")]
    pub(crate) drain_timeout: Duration,
}

impl Service {
    /// Where apps dial it that know of no sidecar.
    pub(crate) fn dialled_at(&self) -> impl Iterator<Item = SocketAddr> {
        let found = match &self.endpoints {
            Found::At(Source::Static(list)) => list.iter().map(|endpoint| endpoint.address).collect(),
            Found::At(_) | Found::ByControl => vec![self.inbound],
        };
        found.into_iter().chain(self.addresses.iter().copied())
    }
}

/// Where a service is found by those who call it.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    /// There.
    At(Source),
    /// Where its sidecars say that they are: control tells.
    ByControl,
}

/// What `endpoints` says for that.
pub(crate) const BY_CONTROL: &str = "control";

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(source) => source.fmt(f),
            Self::ByControl => f.write_str(BY_CONTROL),
        }
    }
}

/// As it is written.
impl Serialize for Found {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.to_string().split(", "))
    }
}

/// `[capture]`, `[service.NAME] capture`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Capture {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) outbound_port: Option<NonZeroU16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) inbound_port: Option<NonZeroU16>,
    /// What may be dialled outside the mesh, by address.
    #[serde(serialize_with = "all_shown")]
    pub(crate) egress: Vec<Destination>,
    /// The same, by name.
    #[serde(serialize_with = "all_shown")]
    pub(crate) egress_names: Vec<Rule>,
    /// The authorities of hosts that TLS is made for.
    pub(crate) egress_ca: PathBuf,
}

/// `[service.NAME] hbone`, and its destinations.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Hbone {
    pub(crate) listen: SocketAddr,
    /// INVARIANT: at least one.
    pub(crate) destinations: Vec<SocketAddr>,
}

/// One of `[zones]`.
#[derive(Debug, Clone)]
pub(crate) struct Zone {
    pub(crate) name: String,
    pub(crate) networks: Networks,
}

/// `[workload.NAME]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Workload {
    pub(crate) id: SpiffeId,
    pub(crate) host: String,
    pub(crate) attest: Attest,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "humane_if_given")]
    pub(crate) ttl: Option<Duration>,
}

/// Who a service may have a `calls` entry for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Callee {
    Service(ServiceName),
    Vault,
}

/// `[limits]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Limits {
    // What the file does not say is the default, and stays unsaid.
    #[serde(skip_serializing_if = "Memory::is_default")]
    pub(crate) memory: Memory,
}

/// What a sidecar's memory budget is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// [`SHARE_PERCENT`] of its control group's limit, if that has one.
    ShareOfGroup,
    Bytes(u64),
    Unbounded,
}

/// The rest is room for what comes between two looks at the memory.
const SHARE_PERCENT: u64 = 80;

impl Memory {
    fn is_default(&self) -> bool {
        *self == Self::ShareOfGroup
    }

    /// The budget of this process, in bytes.
    pub(crate) fn budget_bytes(self) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Unbounded => None,
            Self::ShareOfGroup => {
                sidecar::overload::memory_limit_bytes(Path::new("/")).map(|limit| limit / 100 * SHARE_PERCENT)
            }
        }
    }
}

impl Serialize for Memory {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::ShareOfGroup => serializer.serialize_none(),
            Self::Bytes(bytes) => serializer.collect_str(&format_args!("{}KiB", bytes / 1024)),
            Self::Unbounded => serializer.serialize_str("none"),
        }
    }
}

/// `[telemetry]`
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Telemetry {
    pub(crate) access_log: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) personal: Option<Vec<String>>,
    pub(crate) log: String,
}

/// What a process must be to get an identity.
///
/// INVARIANT: at least one selector; the path, if any, is absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Attest {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "hex")]
    pub(crate) sha256: Option<[u8; 32]>,
}

/// The name of a service in `mesh.toml`, in policies and in its SPIFFE ID.
///
/// INVARIANT: a DNS label of 1 to 63 bytes of `[a-z0-9-]`, starting with a letter; none of
/// [`RESERVED_NAMES`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub(crate) struct ServiceName(String);

/// Names of the mesh's own processes, which policies and `calls` use beside services'.
pub(crate) const RESERVED_NAMES: [&str; 6] = ["agent", "control", "gateway", "idp", "local", "vault"];

/// Longest service name: a DNS label, so that it can become a host name.
const MAX_NAME_BYTES: usize = 63;

impl ServiceName {
    /// Parses a name; the error says what a name is.
    pub(crate) fn new(name: &str) -> Result<Self, String> {
        if RESERVED_NAMES.contains(&name) {
            return Err(format!("`{name}` is the name of one of the mesh's own parts"));
        }
        let label = name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        let starts = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        if !label || !starts || name.ends_with('-') || name.len() > MAX_NAME_BYTES {
            return Err(format!(
                "`{name}` is no service name: 1 to {MAX_NAME_BYTES} of a-z, 0-9 and '-', starting with a letter"
            ));
        }
        Ok(Self(name.to_owned()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Callee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => name.fmt(f),
            Self::Vault => f.write_str("vault"),
        }
    }
}

impl Serialize for Callee {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A host, by name or address, and a port: what is dialled rather than bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostPort {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Serialize for HostPort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn shown<S: Serializer>(url: &Url, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&check::origin(url))
}

fn networks<S: Serializer>(networks: &Networks, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(networks.iter().map(ToString::to_string))
}

fn by_zone<S: Serializer>(zones: &[Zone], serializer: S) -> Result<S::Ok, S::Error> {
    let networks = |zone: &Zone| zone.networks.iter().map(ToString::to_string).collect::<Vec<_>>();
    serializer.collect_map(zones.iter().map(|zone| (&zone.name, networks(zone))))
}

fn all_shown<S: Serializer>(values: &[impl fmt::Display], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(ToString::to_string))
}

fn humane<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*duration))
}

#[expect(clippy::ref_option, reason = "the shape that serde's serialize_with calls")]
fn humane_if_given<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => humane(duration, serializer),
        None => serializer.serialize_none(),
    }
}

#[expect(clippy::ref_option, reason = "the shape that serde's serialize_with calls")]
fn hex<S: Serializer>(digest: &Option<[u8; 32]>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&identity::hex::encode(digest.as_ref().map_or(&[], |digest| digest.as_slice())))
}

/// The identity of one of the mesh's own processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    Gateway,
    Idp,
    Vault,
}

/// One process that gets an identity: who, and how the agent knows it.
#[derive(Debug, Clone)]
pub(crate) struct Registration {
    pub(crate) name: String,
    pub(crate) id: SpiffeId,
    /// The host it runs on, or `local` for any.
    pub(crate) host: String,
    /// The host, name or address, as which browsers know it; none for what only the mesh talks to.
    pub(crate) public_host: Option<url::Host>,
    pub(crate) attest: Attest,
    /// How long its SVIDs live; none for the mesh's own choice.
    pub(crate) ttl: Option<Duration>,
}

impl Mesh {
    /// Whose policies decide about what `name` is: a service, or what policies call it itself.
    pub(crate) fn policies_of<'a>(&'a self, name: &'a str) -> &'a str {
        let service = self.service.iter().find(|(known, _)| known.as_str() == name);
        service.map_or(name, |(_, service)| service.policies.as_str())
    }

    /// The identity of the service, or else the workload, of this name.
    pub(crate) fn id_of(&self, name: &str) -> Option<&SpiffeId> {
        let service = self.service.iter().find(|(known, _)| known.as_str() == name);
        let service = service.map(|(_, service)| &service.id);
        service.or_else(|| self.workload.get(name).map(|workload| &workload.id))
    }

    /// Reads and checks `file`. `hostname` is what `[agent] host` defaults to.
    pub(crate) fn load(file: &Path, hostname: &str) -> Result<Self, Vec<Problem>> {
        let text = load::read::<file::MeshFile>(file).map_err(|problem| vec![problem])?;
        Self::parse(&text, file, hostname)
    }

    /// Checks `text`, which came from `file`; paths in it are relative to that.
    pub(crate) fn parse(text: &str, file: &Path, hostname: &str) -> Result<Self, Vec<Problem>> {
        let sections = load::sections(text, file);
        check::mesh(sections, text, file, hostname, None)
    }

    /// [`Mesh::load`] with `policies` in place of the directory that the file names, which need not be there.
    pub(crate) fn load_with(file: &Path, hostname: &str, policies: &Path) -> Result<Self, Vec<Problem>> {
        let text = load::read::<file::MeshFile>(file).map_err(|problem| vec![problem])?;
        check::mesh(load::sections(&text, file), &text, file, hostname, Some(policies))
    }

    /// A mesh of which nothing is known but its trust domain and its policies.
    pub(crate) fn unknown(trust_domain: &TrustDomain, policies: &Path) -> Result<Self, Vec<Problem>> {
        let text = format!("[mesh]\ntrust_domain = \"{trust_domain}\"\npolicies = \"policies\"\n");
        let file = Path::new("mesh.toml");
        check::mesh(load::sections(&text, file), &text, file, "localhost", Some(policies))
    }

    /// The SPIFFE ID of one of the mesh's own processes.
    pub(crate) fn own_id(&self, own: Own) -> Option<SpiffeId> {
        check::own_id(&self.mesh.trust_domain, own)
    }

    /// Everything that an agent hands an identity to.
    pub(crate) fn registrations(&self) -> Vec<Registration> {
        let services = self.service.iter().map(|(name, service)| Registration {
            name: name.to_string(),
            id: service.id.clone(),
            host: service.host.clone(),
            public_host: None,
            attest: service.attest.clone(),
            ttl: None,
        });
        let workloads = self.workload.iter().map(|(name, workload)| Registration {
            name: name.clone(),
            id: workload.id.clone(),
            host: workload.host.clone(),
            public_host: None,
            attest: workload.attest.clone(),
            ttl: workload.ttl,
        });
        let host = |url: &Url| url.host().map(|host| host.to_owned());
        let own = [
            self.gateway.as_ref().map(|own| (Own::Gateway, "gateway", host(&own.public_url), &own.attest)),
            self.idp.as_ref().map(|own| (Own::Idp, "idp", host(&own.issuer), &own.attest)),
            self.vault.as_ref().map(|own| (Own::Vault, "vault", None, &own.attest)),
        ];
        let own = own.into_iter().flatten().filter_map(|(own, name, public_host, attest)| {
            Some(Registration {
                name: name.to_owned(),
                id: self.own_id(own)?,
                host: check::ANY_HOST.to_owned(),
                public_host,
                attest: attest.clone(),
                ttl: None,
            })
        });
        services.chain(workloads).chain(own).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(accounts: &str, more: &str) -> Result<Mesh, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("policies/services/ledger")).unwrap();
        let text = format!(
            "[mesh]\ntrust_domain = \"bank.example\"\npolicies = \"policies\"\n\
             [service.accounts]\napp = \"127.0.0.1:5000\"\nadmin = \"127.0.0.1:5002\"\nattest = {{ uid = 2 }}\n{accounts}\n\
             [service.web]\napp = \"127.0.0.1:5010\"\ninbound = \"127.0.0.1:5011\"\n\
             admin = \"127.0.0.1:5012\"\nattest = {{ uid = 3 }}\ncalls = {{ accounts = \"127.0.0.1:5013\" }}\n{more}\n"
        );
        let parsed = Mesh::parse(&text, &folder.path().join("mesh.toml"), "host-1");
        parsed.map_err(|problems| {
            problems.iter().map(|problem| format!("{}: {problem}\n", problem.line)).collect()
        })
    }

    #[test]
    fn a_service_is_found_at_its_inbound_address_at_several_or_by_name() {
        let found = |accounts: &str| {
            let mesh = parse(accounts, "").unwrap();
            let service = &mesh.service[&ServiceName::new("accounts").unwrap()];
            let dialled: Vec<String> = service.dialled_at().map(|address| address.to_string()).collect();
            (service.endpoints.to_string(), dialled)
        };
        let (endpoints, dialled) = found("inbound = \"127.0.0.1:5001\"");
        assert_eq!(
            (&endpoints[..], &dialled[..]),
            ("127.0.0.1:5001", &["127.0.0.1:5001".to_owned(), "127.0.0.1:5000".into()][..])
        );
        let two = "inbound = \"0.0.0.0:5001\"\nendpoints = [\"10.0.0.2:5001\", \"10.0.0.3:5001\"]";
        let (endpoints, dialled) = found(two);
        assert_eq!(endpoints, "10.0.0.2:5001, 10.0.0.3:5001");
        assert_eq!(dialled, ["10.0.0.2:5001", "10.0.0.3:5001", "10.0.0.2:5000", "10.0.0.3:5000"]);
        let (endpoints, _) = found("inbound = \"0.0.0.0:5001\"\nendpoints = [\"accounts.internal:5001\"]");
        assert_eq!(endpoints, "accounts.internal:5001");
        let (endpoints, dialled) = found("inbound = \"0.0.0.0:5001\"\nendpoints = [\"control\"]");
        assert_eq!((&endpoints[..], &dialled[..]), ("control", &["0.0.0.0:5001".to_owned()][..]));
        let wrong = parse("inbound = \"0.0.0.0:5001\"", "").unwrap_err();
        assert!(wrong.contains("0.0.0.0 cannot be dialled"), "{wrong}");
        let wrong =
            parse("inbound = \"0.0.0.0:5001\"\nendpoints = [\"10.0.0.2:5001\", \"x:1\"]", "").unwrap_err();
        assert!(wrong.contains("`x:1` is not an address to connect to"), "{wrong}");
    }

    #[test]
    fn services_that_are_the_same_to_their_callers_share_policies() {
        let inbound = "inbound = \"127.0.0.1:5001\"";
        let mesh = parse(&format!("{inbound}\npolicies = \"ledger\""), "").unwrap();
        assert_eq!(mesh.policies_of("accounts"), "ledger");
        assert_eq!((mesh.policies_of("web"), mesh.policies_of("vault")), ("web", "vault"));
        for (wrong, why) in [
            ("ledgr", "there are no policies of `ledgr`"),
            ("../ledger", "`../ledger` is no service name"),
            ("vault", "`vault` is the name of one of the mesh's own parts"),
        ] {
            let told = parse(&format!("{inbound}\npolicies = \"{wrong}\""), "").unwrap_err();
            assert!(told.contains(why) && told.starts_with("9: "), "{told}");
        }
        let told = parse(&format!("{inbound}\npolicies = \"ledgr\""), "").unwrap_err();
        assert!(told.contains("ledger"), "the hint is what there is: {told}");
        let by_control = "[policy]\nrepository = \"policies.git\"";
        assert!(
            parse(&format!("{inbound}\npolicies = \"ledgr\""), by_control).is_ok(),
            "they are in a repository"
        );
    }

    #[test]
    fn traffic_names_services_that_take_requests() {
        let inbound = "inbound = \"127.0.0.1:5001\"";
        let mesh = parse(inbound, "[traffic.accounts]\nmirror = { to = \"web\" }").unwrap();
        assert_eq!(mesh.traffic.len(), 1);
        for (wrong, why) in [
            ("[traffic.acounts]\nbalance = \"random\"", "unknown service `acounts`"),
            ("[traffic.accounts]\nsplit = { accounts = 1, next = 1 }", "unknown service `next`"),
        ] {
            let told = parse(inbound, wrong).unwrap_err();
            assert!(told.contains(why) && told.starts_with("15: "), "{told}");
        }
        let tcp = format!("{inbound}\napp_protocol = \"tcp\"");
        assert_eq!(parse(&tcp, "[traffic.accounts]\nbalance = \"random\"").unwrap().traffic.len(), 1);
        let told = parse(&tcp, "[traffic.accounts]\nretries = { max = 1 }").unwrap_err();
        assert!(told.contains("takes connections: only balance,"), "{told}");
    }
}
