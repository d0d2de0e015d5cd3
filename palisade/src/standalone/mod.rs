//! `sidecar.toml`: one sidecar by itself, parsed once into types that cannot be wrong.
//!
//! The form is checked as that of `mesh.toml` is ([`crate::mesh::load`]); [`check`] is what turns the
//! sections of [`file`] into [`Standalone`].

mod check;
pub(crate) mod file;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use identity::SpiffeId;
use identity::pem::IdentityFiles;
use policy::Problem;
use sidecar::Carries;
use sidecar::access::AccessTarget;
use sidecar::ext_authz::{Door, EntitiesConfig};
use sidecar::otlp::TracesConfig;
use sidecar::proxy_protocol::Networks;
use sidecar::traffic::config::{HealthCheck, RateLimit, Traffic};
use sidecar::traffic::resolve::Source;

use crate::mesh::load;
use crate::mesh::{AppProtocol, Capture, Hbone, Memory, ServiceName, Zone};
use file::SidecarFile;

/// One sidecar, as `sidecar.toml` describes it: defaults filled in, paths absolute.
#[derive(Debug, Clone)]
pub(crate) struct Standalone {
    /// The file it was read from.
    pub(crate) file: PathBuf,
    pub(crate) identity: IdentityFiles,
    pub(crate) inbound: Option<Inbound>,
    /// INVARIANT: decides by the same as `inbound`, where there is one.
    pub(crate) ext_authz: Option<ExtAuthz>,
    pub(crate) outbound: BTreeMap<ServiceName, Outbound>,
    /// How calls to services go, where something is said of it.
    pub(crate) traffic: BTreeMap<ServiceName, Traffic>,
    pub(crate) zones: Vec<Zone>,
    pub(crate) capture: Option<Capture>,
    pub(crate) admin: Option<SocketAddr>,
    /// None for no access log.
    pub(crate) access_log: Option<AccessTarget>,
    pub(crate) traces: Option<TracesConfig>,
    pub(crate) log: String,
    pub(crate) drain_timeout: Duration,
    pub(crate) memory: Memory,
    /// None for one a processor.
    pub(crate) workers: Option<NonZeroUsize>,
}

/// `[inbound]`
#[derive(Debug, Clone)]
pub(crate) struct Inbound {
    pub(crate) listen: SocketAddr,
    pub(crate) app: SocketAddr,
    pub(crate) app_protocol: AppProtocol,
    pub(crate) decided: Decided,
    pub(crate) request_timeout: Duration,
    pub(crate) rate_limit: Option<RateLimit>,
    pub(crate) health: Option<HealthCheck>,
    pub(crate) proxies: Networks,
    pub(crate) hbone: Option<Hbone>,
}

/// `[ext_authz]`
#[derive(Debug, Clone)]
pub(crate) struct ExtAuthz {
    pub(crate) door: Door,
    pub(crate) decided: Decided,
    pub(crate) entities: Option<EntitiesConfig>,
}

/// What is decided by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decided {
    pub(crate) service: ServiceName,
    pub(crate) policies: PathBuf,
    pub(crate) gateways: Vec<SpiffeId>,
}

/// `[outbound.NAME]`
#[derive(Debug, Clone)]
pub(crate) struct Outbound {
    pub(crate) listen: SocketAddr,
    pub(crate) id: SpiffeId,
    pub(crate) carries: Carries,
    /// INVARIANT: at least one, or a name.
    pub(crate) endpoints: Source,
    /// Where apps that know of no sidecar dial it.
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) request_timeout: Duration,
}

impl Standalone {
    /// What it decides by, if it decides.
    pub(crate) fn decided(&self) -> Option<&Decided> {
        let inbound = self.inbound.as_ref().map(|inbound| &inbound.decided);
        inbound.or(self.ext_authz.as_ref().map(|asked| &asked.decided))
    }

    /// Reads and checks `file`.
    pub(crate) fn load(file: &Path) -> Result<Self, Vec<Problem>> {
        let text = load::read::<SidecarFile>(file).map_err(|problem| vec![problem])?;
        Self::parse(&text, file)
    }

    /// Checks `text`, which came from `file`; paths in it are relative to that.
    pub(crate) fn parse(text: &str, file: &Path) -> Result<Self, Vec<Problem>> {
        check::standalone(load::sections(text, file), text, file)
    }
}

/// What it does, in one line.
impl fmt::Display for Standalone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inbound =
            self.inbound.iter().map(|inbound| format!("{} at {}", inbound.decided.service, inbound.listen));
        let asked = self.ext_authz.iter().map(|asked| format!("Envoys before {}", asked.decided.service));
        let calls = self.outbound.iter().map(|(name, call)| format!("calls to {name} at {}", call.listen));
        f.write_str(&inbound.chain(asked).chain(calls).collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use identity::TrustDomain;

    use super::*;
    use crate::mesh::schema;

    /// Lays out `directory` so that what the sample and the shipped files name is there.
    fn lay_out(directory: &Path) {
        for path in ["certs", ".peers/certs", "bench/ours", "policies", "bench/ours/policies"] {
            fs::create_dir_all(directory.join(path)).unwrap();
        }
        for name in ["server.crt", "server.key", "client.crt", "client.key", "ca.crt", "partner.crt"] {
            fs::write(directory.join("certs").join(name), "").unwrap();
            fs::write(directory.join(".peers/certs").join(name), "").unwrap();
        }
    }

    #[track_caller]
    fn good(text: &str, file: &Path) -> Standalone {
        Standalone::parse(text, file).unwrap_or_else(|problems| {
            panic!("{}", problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
        })
    }

    /// Run with `UPDATE_EXPECTED=1` to write the file anew.
    #[test]
    fn the_sample_file_is_the_reference() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("sidecar.example.toml");
        let sample = schema::sample::<SidecarFile>();
        if std::env::var_os("UPDATE_EXPECTED").is_some() {
            fs::write(&path, &sample).unwrap();
        }
        assert!(
            fs::read_to_string(&path).unwrap_or_default() == sample,
            "sidecar.example.toml and the doc comments of standalone/file.rs differ; run \
             `UPDATE_EXPECTED=1 cargo test -p palisade the_sample_file` and look at the diff"
        );
    }

    #[test]
    fn the_sample_loads_as_written_and_with_every_key_in_use() {
        let directory = tempfile::tempdir().unwrap();
        lay_out(directory.path());
        let sample = schema::sample::<SidecarFile>();
        let all: String = sample
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(key) if !key.starts_with(' ') => format!("{key}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        assert!(all.contains("\nworkers = ") && all.contains("\n\"partner.example\" = "), "{all}");
        // Those whom the traffic section names.
        let other = |name: &str, port: u16| {
            format!(
                "\n[outbound.{name}]\nlisten = \"127.0.0.1:{port}\"\nid = \"spiffe://mesh.test/{name}\"\nendpoints = [\"127.0.0.1:1{port}\"]\n"
            )
        };
        let all = all + &other("accounts", 6000) + &other("accounts-next", 6010);
        let file = directory.path().join("sidecar.toml");
        good(&sample, &file);
        let all = good(&all, &file);
        assert_eq!(all.identity.trust.len(), 1);
        assert!(
            all.to_string()
                .starts_with("backend at 127.0.0.1:15606, Envoys before backend, calls to accounts")
        );
        let traffic = &all.traffic[&ServiceName::new("backend").unwrap()];
        assert_eq!(traffic.named().collect::<Vec<_>>(), ["accounts", "accounts-next", "accounts-next"]);
        assert!(all.inbound.unwrap().rate_limit.is_some());
        assert_eq!(all.workers, NonZeroUsize::new(2));
    }

    #[test]
    fn every_key_has_a_description_and_an_example() {
        let schema = schema::json_schema::<SidecarFile>();
        for (name, section) in schema["properties"].as_object().unwrap() {
            let section =
                schema::free_values(section).filter(|v| schema::known_keys(v).is_some()).unwrap_or(section);
            for (key, schema) in schema::known_keys(section).into_iter().flatten() {
                assert!(schema.get("description").is_some(), "{name}.{key}");
                assert!(schema::example(schema).is_some(), "{name}.{key} has no example");
            }
        }
        assert!(!schema.to_string().contains("null"), "{schema:#}");
    }

    #[test]
    fn the_shipped_files_stay_valid() {
        let directory = tempfile::tempdir().unwrap();
        lay_out(directory.path());
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/ours");
        let load = |name: &str| {
            let text = fs::read_to_string(shipped.join(name)).unwrap();
            good(&text, &directory.path().join("bench/ours").join(name))
        };
        let (client, server) = (load("client.toml"), load("server.toml"));
        let door = server.inbound.unwrap();
        assert!(client.outbound.values().any(|call| call.endpoints.to_string() == door.listen.to_string()));
        let policies =
            policy::Policies::load(&shipped.join("policies"), &TrustDomain::new("mesh.test").unwrap());
        let policies = policies.unwrap_or_else(|problems| panic!("{problems}"));
        assert!(policies.service(door.decided.service.as_str()).is_some());
    }

    #[test]
    fn traces_go_to_a_collector_on_this_machine() {
        let directory = tempfile::tempdir().unwrap();
        lay_out(directory.path());
        let file = directory.path().join("sidecar.toml");
        let sample = schema::sample::<SidecarFile>();
        let (head, rest) = sample.split_once("[traces]\n").unwrap();
        let (_, rest) = rest.split_once("\n\n").unwrap();
        let with = |section: &str| Standalone::parse(&format!("{head}{section}\n{rest}"), &file);
        assert!(with("").unwrap().traces.is_none());
        let endpoint = "endpoint = \"http://127.0.0.1:4318/v1/traces\"\n";
        let traces = with(&format!("[traces]\n{endpoint}")).unwrap().traces.unwrap();
        assert_eq!(serde_json::to_value(&traces).unwrap()["sample"], 0.01);
        let all = with(&format!("[traces]\n{endpoint}sample = 1\n")).unwrap().traces.unwrap();
        assert_eq!(all.sample, sidecar::trace::Share::ALL);
        for (wrong, why) in [
            (format!("{endpoint}sample = 1.5\n"), "1.5 is not from 0 to 1"),
            (format!("{endpoint}sample = nan\n"), "is not from 0 to 1"),
            ("endpoint = \"https://127.0.0.1/\"\n".to_owned(), "does not start with http://"),
            ("endpoint = \"http://10.0.0.7:4318/\"\n".to_owned(), "not on this machine"),
            ("sample = 0.1\n".to_owned(), "endpoint"),
        ] {
            let problems = with(&format!("[traces]\n{wrong}")).unwrap_err();
            let told = problems.iter().map(ToString::to_string).collect::<String>();
            assert!(told.contains(why) && problems[0].line > 0, "{told}");
        }
    }

    #[test]
    fn traffic_goes_to_services_that_are_called_with_requests() {
        let directory = tempfile::tempdir().unwrap();
        lay_out(directory.path());
        let file = directory.path().join("sidecar.toml");
        let call = |name: &str, port: u16, protocol: &str| {
            format!(
                "[outbound.{name}]\nlisten = \"127.0.0.1:{port}\"\nid = \"spiffe://mesh.test/{name}\"\n\
                 endpoints = [\"127.0.0.1:9\"]\nprotocol = \"{protocol}\"\n"
            )
        };
        let identity = "[identity]\ncertificate = \"certs/server.crt\"\nkey = \"certs/server.key\"\nbundle = \"certs/ca.crt\"\n";
        let parse = |traffic: &str| {
            let calls = call("web", 1, "http") + &call("next", 2, "http") + &call("db", 3, "tcp");
            Standalone::parse(&format!("{identity}{calls}{traffic}"), &file)
        };
        let read = parse("[traffic.web]\nsplit = { web = 9, next = 1 }\n").unwrap();
        assert_eq!(read.traffic.len(), 1);
        let near = "[zones]\nnorth = [\"10.1.0.0/16\"]\n[traffic.db]\nprefer = \"zone\"\nlimits = { requests = 9 }\n";
        assert_eq!(parse(near).unwrap().traffic.len(), 1);
        for (wrong, why) in [
            ("[traffic.wed]\nbalance = \"random\"\n", "there is no [outbound.wed]"),
            ("[traffic.web]\nsplit = { web = 9, nxt = 1 }\n", "there is no [outbound.nxt]"),
            ("[traffic.web]\nmirror = { to = \"db\" }\n", "`db` takes connections, not requests"),
            ("[traffic.db]\nretries = { max = 3 }\n", "`db` takes connections: only balance,"),
            ("[traffic.db]\nbalance = \"hash:source\"\n", "which have no key to balance by"),
            ("[traffic.web]\nprefer = \"zone\"\n", "there are no zones to prefer"),
            ("[zones]\nnorth = [\"10.1.0.1/16\"]\n", "`10.1.0.1/16` is not a network"),
            ("[zones]\nnorth = []\n", "the zone north is nowhere"),
            (
                "[capture]\noutbound_port = 15001\negress = [\"https://api.example.org/v1\"]\n",
                "is not SCHEME://HOST[:PORT]",
            ),
            ("[traffic.web]\nbalanse = \"random\"\n", "unknown key `balanse`"),
            ("[traffic.web]\nretries = { maximum = 3 }\n", "unknown key `maximum` in [traffic.web.retries]"),
            ("[traffic.web]\nretries = { budget = \"101%\" }\n", "`101%` is not a share"),
            ("[traffic.web]\nmirror = { share = \"5%\" }\n", "lacks `to`"),
        ] {
            let problems = parse(wrong).unwrap_err();
            let told = problems.iter().map(ToString::to_string).collect::<String>();
            assert!(told.contains(why) && problems[0].line > 18, "{told}");
        }
    }

    #[test]
    fn a_file_that_serves_nothing_or_the_same_twice_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        lay_out(directory.path());
        let file = directory.path().join("sidecar.toml");
        let identity = "[identity]\ncertificate = \"certs/server.crt\"\nkey = \"certs/server.key\"\nbundle = \"certs/ca.crt\"\n";
        let refused = |rest: &str| -> String {
            let problems = Standalone::parse(&format!("{identity}{rest}"), &file).unwrap_err();
            problems.iter().map(|problem| format!("{}: {problem}\n", problem.line)).collect()
        };
        assert!(refused("").contains("neither [inbound], [ext_authz] nor [outbound.NAME]"));
        let decided = "policies = \"policies\"\nservice = \"backend\"\n";
        let asked = |listen: &str| refused(&format!("[ext_authz]\nlisten = \"{listen}\"\n{decided}"));
        assert!(asked("0.0.0.0:9").contains("name the SPIFFE IDs that may ask"));
        assert!(asked("unix:relative").contains("neither unix:/PATH"));
        let door = format!("[inbound]\nlisten = \"127.0.0.1:1\"\napp = \"127.0.0.1:2\"\n{decided}");
        let other = decided.replace("backend", "frontend");
        let both = refused(&format!("{door}[ext_authz]\nlisten = \"127.0.0.1:3\"\n{other}"));
        assert!(both.starts_with("13: ") && both.contains("decide for one service"), "{both}");
        let call =
            "[outbound.backend]\nlisten = \"127.0.0.1:1\"\nid = \"spiffe://mesh.test/a\"\nendpoints = [";
        assert!(refused(&format!("{call}]\n")).contains("nowhere"));
        let mixed = refused(&format!("{call}\"127.0.0.1:5\", \"localhost:5\"]\n"));
        assert!(mixed.contains("`localhost:5` is not an address"), "{mixed}");
        assert!(refused(&format!("{call}\"localhost\"]\n")).contains("`localhost` is not host:port"));
        let both = format!("{call}\"127.0.0.1:2\"]\n[admin]\nlisten = \"127.0.0.1:1\"\n");
        assert!(refused(&both).contains("127.0.0.1:1 is used twice"));
        let misspelt = refused(&format!("{call}\"127.0.0.1:2\"]\n[telemetry]\nacces_log = \"off\"\n"));
        assert!(
            misspelt.contains("unknown key `acces_log`") && misspelt.contains("did you mean"),
            "{misspelt}"
        );
        assert!(refused(&format!("{call}\"127.0.0.1:2\"]\n[limits]\nworkers = 0\n")).starts_with("10: "));
        fs::remove_file(directory.path().join("certs/server.key")).unwrap();
        let missing = refused(&format!("{call}\"127.0.0.1:2\"]\n"));
        assert!(missing.starts_with("3: ") && missing.contains("there is no file"), "{missing}");
    }
}
