//! `mesh.toml` as it is written: one struct a section.
//!
//! The doc comments here are the reference: the JSON Schema (`palisade config schema`) and
//! `mesh.example.toml` are made from them. Values stay text with their place in the file, so that
//! [`super::check`] can point at what is wrong; it is also what turns them into [`super::Mesh`].

use std::collections::BTreeMap;

use policy::Mapping;
use schemars::JsonSchema;
use serde::Deserialize;
use sidecar::traffic::config::{HealthCheck, RateLimit, Traffic};
use toml::Spanned;

/// Text that remembers where it stands in the file.
pub(crate) type Text = Spanned<String>;

/// One mesh, the same file on every host. Paths are relative to this file. Durations are written
/// like 90s, 2m or 1h30m. Nothing in here is secret: keys and passphrases are files in
/// $CREDENTIALS_DIRECTORY, or in the directory that --credentials names.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "mesh.toml")]
pub(crate) struct MeshFile {
    pub(crate) mesh: MeshSection,
    #[serde(default)]
    pub(crate) control: ControlSection,
    #[serde(default)]
    pub(crate) agent: AgentSection,
    pub(crate) gateway: Option<GatewaySection>,
    pub(crate) idp: Option<IdpSection>,
    pub(crate) vault: Option<VaultSection>,
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, ServiceSection>")]
    pub(crate) service: BTreeMap<Spanned<String>, ServiceSection>,
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, Traffic>")]
    pub(crate) traffic: BTreeMap<Spanned<String>, Traffic>,
    /// The zones that hosts are in, such as data centres, each by its networks: what `prefer` goes by. A host is in the
    /// zone that its own addresses are in. Leave the section out where nothing is far.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, Vec<String>>", example = serde_json::json!({"north": ["10.1.0.0/16"], "south": ["10.2.0.0/16"]}))]
    pub(crate) zones: BTreeMap<Text, Vec<Text>>,
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, WorkloadSection>")]
    pub(crate) workload: BTreeMap<Spanned<String>, WorkloadSection>,
    #[serde(default)]
    pub(crate) limits: LimitsSection,
    #[serde(default)]
    pub(crate) telemetry: TelemetrySection,
    pub(crate) traces: Option<TracesSection>,
    pub(crate) policy: Option<PolicySection>,
}

/// What holds for the whole mesh.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MeshSection {
    /// The root of trust: every identity of this mesh is spiffe://TRUST_DOMAIN/…
    #[schemars(with = "String", example = "bank.example")]
    pub(crate) trust_domain: Text,
    /// The directory of policies, usually in git beside this file. With a [policy] section it is what `palisade policy`
    /// looks at, and nobody else: it need not be on every host.
    #[schemars(with = "String", example = &"policies")]
    pub(crate) policies: Text,
    /// enforce: what no policy allows is refused. audit: it is let through and reported as
    /// "would deny", by the services' sidecars; the gateway and the vault enforce in either mode, and
    /// identity (mTLS) is demanded in both. Default: enforce.
    #[schemars(with = "Option<Mode>", example = &"enforce")]
    pub(crate) mode: Option<Spanned<Mode>>,
}

/// What happens to a request that no policy allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, serde::Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(crate) enum Mode {
    /// It is refused.
    Enforce,
    /// It is let through and reported.
    Audit,
}

/// The control process: certificate authority, registrations, decisions, console.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ControlSection {
    /// Where agents connect, mTLS. Default: 127.0.0.1:4810.
    #[schemars(with = "Option<String>", example = "127.0.0.1:4810")]
    pub(crate) listen: Option<Text>,
    /// The Unix socket for `palisade token`, `explain` and `status`; whoever may open it
    /// administers the mesh. Default: /run/palisade/control.sock.
    #[schemars(with = "Option<String>", example = "/run/palisade/control.sock")]
    pub(crate) admin_socket: Option<Text>,
    /// The console's pages, loopback only. Default: 127.0.0.1:4811.
    #[schemars(with = "Option<String>", example = "127.0.0.1:4811")]
    pub(crate) console: Option<Text>,
    /// Where the authority's encrypted key, registrations and decisions are kept.
    /// Default: /var/lib/palisade/control.
    #[schemars(with = "Option<String>", example = "/var/lib/palisade/control")]
    pub(crate) state: Option<Text>,
    /// How long an identity (SVID) is valid, 10s to 24h. Default: 1h.
    #[schemars(with = "Option<String>", example = &"1h")]
    pub(crate) svid_ttl: Option<Text>,
    /// How old an SVID gets before its successor is made. Default: half of svid_ttl.
    #[schemars(with = "Option<String>", example = &"30m")]
    pub(crate) rotate_after: Option<Text>,
}

/// The agent, one a host: tells by attestation which process is which service.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AgentSection {
    /// The Unix socket of the SPIFFE Workload API. Default: /run/palisade/agent.sock.
    #[schemars(with = "Option<String>", example = "/run/palisade/agent.sock")]
    pub(crate) socket: Option<Text>,
    /// Where the host's own identity is kept. Default: /var/lib/palisade/agent.
    #[schemars(with = "Option<String>", example = "/var/lib/palisade/agent")]
    pub(crate) state: Option<Text>,
    /// Where control is reached, host:port. Default: control's listen address.
    #[schemars(with = "Option<String>", example = "127.0.0.1:4810")]
    pub(crate) control: Option<Text>,
    /// The name of this host in its identity, …/palisade/agent/HOST. Default: the machine's hostname.
    #[schemars(with = "Option<String>", example = "host-1")]
    pub(crate) host: Option<Text>,
}

/// The front door for browsers and API clients. Leave the section out where there is none.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct GatewaySection {
    /// Where browsers and API clients connect, TLS.
    #[schemars(with = "String", example = "127.0.0.1:8443")]
    pub(crate) listen: Text,
    /// The gateway's own address as browsers write it; login returns there.
    /// Default: https:// and the listen address.
    #[schemars(with = "Option<String>", example = "https://127.0.0.1:8443")]
    pub(crate) public_url: Option<Text>,
    /// The OpenID Connect provider that people log in with. Default: the issuer of [idp].
    #[schemars(with = "Option<String>", example = "https://127.0.0.1:4820")]
    pub(crate) issuer: Option<Text>,
    /// The authorities that vouch for the provider's certificate, PEM. Not read for [idp], whose
    /// certificate is the mesh's own. Default: /etc/ssl/certs/ca-certificates.crt.
    #[schemars(with = "Option<String>", example = "/etc/ssl/certs/ca-certificates.crt")]
    pub(crate) issuer_ca: Option<Text>,
    /// The gateway's client id at that provider. Default: palisade-gateway.
    #[schemars(with = "Option<String>", example = "palisade-gateway")]
    pub(crate) client_id: Option<Text>,
    /// What an API client's access token must name as its audience. Default: public_url.
    #[schemars(with = "Option<String>", example = "https://127.0.0.1:8443")]
    pub(crate) audience: Option<Text>,
    /// What people are asked to grant at login, beside openid, profile, groups and offline_access.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["bank"])]
    pub(crate) scopes: Vec<Text>,
    /// Which path prefix goes to which service; the longest prefix wins.
    #[schemars(with = "BTreeMap<String, String>", example = serde_json::json!({"/": "web"}))]
    pub(crate) routes: BTreeMap<Text, Text>,
    /// Where sessions and the listener's certificate are kept. Default: /var/lib/palisade/gateway.
    #[schemars(with = "Option<String>", example = "/var/lib/palisade/gateway")]
    pub(crate) state: Option<Text>,
    /// The load balancers in front of `listen`, which must begin each connection with a PROXY protocol header,
    /// version 1 or 2; nobody else may. Default: none.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["10.1.0.0/16"])]
    pub(crate) proxy_protocol_from: Vec<Text>,
    /// How the agent knows the gateway's process.
    #[schemars(with = "AttestSection", example = serde_json::json!({"path": "/usr/bin/palisade-gateway"}))]
    pub(crate) attest: Spanned<AttestSection>,
}

/// The embedded OpenID Connect provider, for those who have none. Leave the section out to use yours.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct IdpSection {
    /// Where browsers and the gateway reach it, TLS.
    #[schemars(with = "String", example = "127.0.0.1:4820")]
    pub(crate) listen: Text,
    /// Its name in the tokens it issues. Default: https:// and the listen address.
    #[schemars(with = "Option<String>", example = "https://127.0.0.1:4820")]
    pub(crate) issuer: Option<Text>,
    /// The file of users and password hashes.
    #[schemars(with = "String", example = "users.toml")]
    pub(crate) users: Text,
    /// Where its signing keys are kept. Default: /var/lib/palisade/idp.
    #[schemars(with = "Option<String>", example = "/var/lib/palisade/idp")]
    pub(crate) state: Option<Text>,
    /// Other programs that people log in with: public clients (RFC 8252) by name, each with the audience
    /// of its tokens.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, String>", example = serde_json::json!({"reports": "https://reports.bank.example"}))]
    pub(crate) clients: BTreeMap<Text, Text>,
    /// How the agent knows the provider's process.
    #[schemars(with = "AttestSection", example = serde_json::json!({"path": "/usr/bin/palisade-idp"}))]
    pub(crate) attest: Spanned<AttestSection>,
}

/// The vault: secrets for services, which log in with their identity. Leave the section out where
/// there is none.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct VaultSection {
    /// Where services' sidecars connect, mTLS.
    #[schemars(with = "String", example = "127.0.0.1:8200")]
    pub(crate) listen: Text,
    /// The operator's HTTP API (unseal, policies, tokens), loopback only. Default: 127.0.0.1:8201.
    #[schemars(with = "Option<String>", example = "127.0.0.1:8201")]
    pub(crate) operator: Option<Text>,
    /// Where secrets are kept, encrypted. Default: /var/lib/palisade/vault.
    #[schemars(with = "Option<String>", example = "/var/lib/palisade/vault")]
    pub(crate) state: Option<Text>,
    /// The audit file; what cannot be audited is not answered. Default: audit.log in the state directory.
    #[schemars(with = "Option<String>", example = "/var/log/palisade/vault-audit.log")]
    pub(crate) audit: Option<Text>,
    /// How the agent knows the vault's process.
    #[schemars(with = "AttestSection", example = serde_json::json!({"path": "/usr/bin/palisade-vault"}))]
    pub(crate) attest: Spanned<AttestSection>,
}

/// One service and the sidecar before it.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ServiceSection {
    /// Its identity. Default: spiffe://TRUST_DOMAIN/service/NAME.
    #[schemars(with = "Option<String>", example = "spiffe://bank.example/service/web")]
    pub(crate) id: Option<Text>,
    /// Whose policies decide about it: services/THAT in the directory of policies. For services that are the same to
    /// those who call them, such as the nodes of a store, each with its own identity. Default: its own name.
    #[schemars(with = "Option<String>", example = &"web")]
    pub(crate) policies: Option<Text>,
    /// The host it runs on, as that host's agent calls itself. Default: local, any host.
    #[schemars(with = "Option<String>", example = &"local")]
    pub(crate) host: Option<Text>,
    /// Where the app itself listens, loopback only, plain HTTP: only its sidecar talks to it.
    #[schemars(with = "String", example = "127.0.0.1:5000")]
    pub(crate) app: Text,
    /// Where other services' sidecars reach this one, mTLS.
    #[schemars(with = "String", example = "127.0.0.1:5001")]
    pub(crate) inbound: Text,
    /// The load balancers in front of `inbound`, which must begin each connection with a PROXY protocol header,
    /// version 1 or 2; nobody else may. Default: none.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["10.1.0.0/16"])]
    pub(crate) proxy_protocol_from: Vec<Text>,
    /// A second way in, for the proxies of an Istio ambient mesh: HBONE, port 15008 by custom. Default: none.
    #[schemars(with = "Option<String>", example = "127.0.0.1:15008")]
    pub(crate) hbone: Option<Text>,
    /// The app's addresses as that mesh knows them. Default: hbone's address with the app's port.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["10.0.0.2:80"])]
    pub(crate) hbone_destinations: Vec<Text>,
    /// Where those who call it find its sidecars, if not at inbound alone: the addresses of all its instances; one
    /// name and port, whose addresses are looked up every five seconds; or control, which tells where its sidecars
    /// say that they are (at inbound's address, or if that stands for all, at the one by which control is reached).
    /// Default: inbound.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["10.0.0.2:5001", "10.0.0.3:5001"])]
    pub(crate) endpoints: Vec<Text>,
    /// /ready, /live and /metrics of the sidecar, loopback only.
    #[schemars(with = "String", example = "127.0.0.1:5002")]
    pub(crate) admin: Text,
    /// How the agent knows the sidecar's process; all that is given must match.
    #[schemars(with = "AttestSection", example = serde_json::json!({"uid": 1001, "path": "/usr/bin/palisade"}))]
    pub(crate) attest: Spanned<AttestSection>,
    /// Whom the app calls, and the loopback address on which its sidecar takes those calls.
    /// The name is another service's, or vault.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, String>", example = serde_json::json!({"vault": "127.0.0.1:5003"}))]
    pub(crate) calls: BTreeMap<Text, Text>,
    /// What the kernel brings to the sidecar, for an app that knows of none.
    #[schemars(with = "Option<CaptureSection>", example = serde_json::json!({"outbound_port": 15001, "inbound_port": 15006}))]
    pub(crate) capture: Option<CaptureSection>,
    /// Where apps dial this service that know of no sidecar, for their capture. Default: inbound's address
    /// with the app's port.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["10.0.0.2:80"])]
    pub(crate) addresses: Vec<Text>,
    /// The vault's secrets that this service reads, as mount-relative paths. This grants nothing: the
    /// vault's policy decides, and `palisade policy check` fails where it would withhold one.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["web/cookie-key"])]
    pub(crate) secrets: Vec<Text>,
    /// Who may write the relations of this service's objects, by their names in this file, beside the service itself and
    /// operators: other services, or workloads. Default: nobody.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["nightly"])]
    pub(crate) relations_writers: Vec<Text>,
    /// What the app speaks: http1, h2c (HTTP/2 without TLS), kafka, whose requests its map judges by mapping = "kafka",
    /// or tcp: a protocol of its own, whose connections it judges by mapping = "tcp". Default: http1.
    #[schemars(example = &"http1")]
    pub(crate) app_protocol: Option<AppProtocol>,
    /// The longest from a request to the head of its answer, for calls of this service and for calls to it. A gRPC call
    /// has its own deadline instead. Default: 30s.
    #[schemars(with = "Option<String>", example = &"30s")]
    pub(crate) request_timeout: Option<Text>,
    /// How many requests its sidecar lets through; more are answered 429. Default: all.
    #[schemars(example = serde_json::json!({"requests": 100, "per": "1s", "by": "peer"}))]
    pub(crate) rate_limit: Option<RateLimit>,
    /// How its sidecar asks the app whether it is well, for /ready and /metrics. Default: not at all.
    #[schemars(example = serde_json::json!({"check": "http:/healthz"}))]
    pub(crate) health: Option<HealthCheck>,
    /// How long requests under way may go on when the sidecar is asked to end. Default: 10s.
    #[schemars(with = "Option<String>", example = &"10s")]
    pub(crate) drain_timeout: Option<Text>,
}

/// A process that fetches its own identity from the Workload API and has no sidecar: a job, a tool, a
/// program that speaks mTLS itself.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorkloadSection {
    /// Its identity. Default: spiffe://TRUST_DOMAIN/workload/NAME.
    #[schemars(with = "Option<String>", example = "spiffe://bank.example/workload/nightly")]
    pub(crate) id: Option<Text>,
    /// The host it runs on, as that host's agent calls itself. Default: local, any host.
    #[schemars(with = "Option<String>", example = &"local")]
    pub(crate) host: Option<Text>,
    /// How the agent knows it; all that is given must match.
    #[schemars(with = "AttestSection", example = serde_json::json!({"uid": 1002, "path": "/usr/bin/nightly"}))]
    pub(crate) attest: Spanned<AttestSection>,
    /// How long its identity is valid. Default: [control] svid_ttl.
    #[schemars(with = "Option<String>", example = &"10m")]
    pub(crate) ttl: Option<Text>,
}

/// What a process must be to get an identity. At least one; all that are given must match.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AttestSection {
    /// The user id it runs as.
    pub(crate) uid: Option<u32>,
    /// The group id it runs as.
    pub(crate) gid: Option<u32>,
    /// The path of its executable; a relative one is relative to this file.
    #[schemars(with = "Option<String>")]
    pub(crate) path: Option<Text>,
    /// The SHA-256 of its executable, 64 hex digits.
    #[schemars(with = "Option<String>")]
    pub(crate) sha256: Option<Text>,
}

/// Connections that the kernel brings to the sidecar although they were meant for others, by the rules of
/// `palisade sidecar capture on`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CaptureSection {
    /// The sidecar's loopback port for what the app dials: the rules' --outbound-port. What is no service
    /// that the app calls is refused, unless egress allows it.
    #[schemars(with = "Option<u16>", example = 15001)]
    pub(crate) outbound_port: Option<Spanned<u16>>,
    /// The sidecar's loopback port for what other hosts dial at the app's port: the rules' --inbound-port.
    /// It is served as what comes to the mTLS port is.
    #[schemars(with = "Option<u16>", example = 15006)]
    pub(crate) inbound_port: Option<Spanned<u16>>,
    /// What the app may dial outside the mesh. By address: 10.0.0.0/8:5432, [2001:db8::/32]:*,
    /// tcp://10.0.0.7:5432. By the name that it says in its ClientHello or its requests, which is looked up
    /// anew: tls://*.example.org:443, http://api.example.org. Requests to https://api.example.org come in clear
    /// text, at that port or at 80 for 443, and their TLS is made by the sidecar. Default: nothing.
    #[serde(default)]
    #[schemars(with = "Vec<String>", example = ["tls://*.example.org", "https://api.example.org"])]
    pub(crate) egress: Vec<Text>,
    /// A PEM file of the authorities that hosts of https:// are known by, read at start. Default:
    /// /etc/ssl/certs/ca-certificates.crt.
    #[schemars(with = "Option<String>", example = "/etc/ssl/certs/ca-certificates.crt")]
    pub(crate) egress_ca: Option<Text>,
}

/// What the protocols of app and sidecar are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, serde::Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(crate) enum AppProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge, without TLS.
    H2c,
    /// A protocol that the sidecar does not read.
    Tcp,
    /// Kafka's, whose requests the sidecar before the brokers reads.
    Kafka,
}

impl AppProtocol {
    /// What calls to such an app are.
    pub(crate) fn carries(self) -> sidecar::Carries {
        match self {
            Self::Http1 | Self::H2c => sidecar::Carries::Requests,
            Self::Tcp | Self::Kafka => sidecar::Carries::Connections,
        }
    }

    /// What the map of its service says.
    pub(crate) fn fits(self, mapping: Mapping) -> bool {
        match mapping {
            Mapping::Routes | Mapping::None => matches!(self, Self::Http1 | Self::H2c),
            Mapping::Tcp => self == Self::Tcp,
            Mapping::Kafka => self == Self::Kafka,
        }
    }

    /// As files write it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::H2c => "h2c",
            Self::Tcp => "tcp",
            Self::Kafka => "kafka",
        }
    }
}

/// What a sidecar may use of its machine.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LimitsSection {
    /// Resident memory past which new requests are answered 503, as a number with KiB, MiB or GiB; or
    /// none. Default: 80 % of the memory limit of the process's control group, if there is one.
    #[schemars(with = "Option<String>", example = &"256MiB")]
    pub(crate) memory: Option<Text>,
}

impl From<AppProtocol> for sidecar::app::AppProtocol {
    fn from(written: AppProtocol) -> Self {
        match written {
            // A map without routes lets no request through to an app that takes connections.
            AppProtocol::Http1 | AppProtocol::Tcp | AppProtocol::Kafka => Self::Http1,
            AppProtocol::H2c => Self::H2c,
        }
    }
}

/// Logs and metrics.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TelemetrySection {
    /// One JSON line a request on standard error, without bodies or secrets. Default: true.
    #[schemars(example = true)]
    pub(crate) access_log: Option<bool>,
    /// Which log lines are written, in the manner of RUST_LOG. Default: info.
    #[schemars(with = "Option<String>", example = &"info")]
    pub(crate) log: Option<Text>,
    /// Keep people out of recorded decisions: users' ids, and the values of these attributes of objects, are
    /// replaced by pseudonyms before a record leaves its host; who is equal stays equal. An empty list is users alone.
    /// `palisade id pseudonym alice` says which is hers. Default: records have them as they are.
    #[schemars(with = "Option<Vec<String>>", example = ["owner"])]
    pub(crate) personal: Option<Vec<String>>,
}

/// Control hands policies out: it follows a git repository, signs what is committed there and pushes it to every
/// sidecar, the gateway and the vault (by the rings in rings.toml). Leave the section out, and each process reads
/// [mesh] policies at its start and at SIGHUP.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PolicySection {
    /// What control follows: a repository's directory on its host, or a URL as git has them.
    #[schemars(with = "String", example = &"/srv/git/policies.git")]
    pub(crate) repository: Text,
    /// The branch that is in force. Default: main.
    #[schemars(with = "Option<String>", example = &"main")]
    pub(crate) branch: Option<Text>,
    /// Where in the repository the policies are, . for all of it. Default: policies.
    #[schemars(with = "Option<String>", example = &"policies")]
    pub(crate) directory: Option<Text>,
    /// Take commits only that are signed with SSH by one of these: a file as ssh-keygen(1) has it under ALLOWED
    /// SIGNERS. Default: any commit is taken.
    #[schemars(with = "Option<String>", example = &"/etc/palisade/allowed_signers")]
    pub(crate) allowed_signers: Option<Text>,
    /// How often control looks for a new commit, 1s to 1h. Default: 1s for a directory, 15s for a URL.
    #[schemars(with = "Option<String>", example = &"1s")]
    pub(crate) every: Option<Text>,
}

/// A span a request, to an OpenTelemetry collector on each host. Leave the section out to have none.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TracesSection {
    /// Where they are posted to, OTLP over HTTP with protobuf, loopback only: for a collector elsewhere,
    /// where this host takes calls to it.
    #[schemars(with = "String", example = &"http://127.0.0.1:4318/v1/traces")]
    pub(crate) endpoint: Text,
    /// Which share of the traces that begin here is recorded, 0 to 1. A request that comes with a
    /// traceparent is recorded if that says so. Default: 0.01.
    #[schemars(with = "Option<f64>", example = 0.01)]
    pub(crate) sample: Option<Spanned<f64>>,
}
