//! Reading one value of a file each: addresses, URLs, durations, selectors, paths. What is wrong is
//! reported with its place, and reading goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::Duration;

use policy::Problem;
use serde_json::Value as Json;
use sidecar::Carries;
use sidecar::capture::Destination;
use sidecar::otlp::{Endpoint, TracesConfig};
use sidecar::proxy_protocol::{Network, NetworkError, Networks};
use sidecar::trace::Share;
use sidecar::traffic::config::{Prefer, Traffic};
use sidecar::traffic::egress::Rule;
use sidecar::traffic::resolve::Source;
use toml::Spanned;
use url::Url;

use super::check::ANY_HOST;
use super::file::{AttestSection, CaptureSection, Text, TracesSection};
use super::load::MAX_PROBLEMS;
use super::{Attest, Capture, Hbone, HostPort, Memory, ServiceName, Zone};

/// Smallest memory budget: a sidecar without traffic takes about as much.
const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// The public authorities, as Debian and most others have them.
pub(crate) const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Which share of new traces is recorded where nothing is said: of a busy service, some every second.
const TRACED_SHARE: f64 = 0.01;

/// An address that something binds, for finding two that want the same.
pub(crate) struct Bound {
    pub(crate) host: String,
    pub(crate) address: SocketAddr,
    pub(crate) what: String,
}

pub(crate) struct Check<'a> {
    pub(crate) file: &'a Path,
    pub(crate) text: &'a str,
    /// The directory that paths are relative to.
    pub(crate) base: PathBuf,
    pub(crate) declared: BTreeSet<String>,
    pub(crate) problems: Vec<Problem>,
    pub(crate) bound: Vec<Bound>,
    /// The file as data, for what is shown as it was written.
    written: Json,
}

/// How far an address may reach.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// This host only.
    Loopback,
    /// Other processes dial it as it is written, so it names one interface.
    Dialled,
    /// Whatever the machine has.
    Any,
}

impl<'a> Check<'a> {
    /// A check of `text`, which came from `file`; paths in it are relative to that.
    pub(crate) fn new(
        file: &'a Path,
        text: &'a str,
        declared: BTreeSet<String>,
        problems: Vec<Problem>,
    ) -> Self {
        let base = std::path::absolute(file).ok().and_then(|file| file.parent().map(Path::to_owned));
        // What is no TOML has been said by now.
        let written = toml::from_str(text).unwrap_or_default();
        Self { file, text, base: base.unwrap_or_default(), declared, problems, bound: Vec::new(), written }
    }

    /// What was read, if nothing was wrong with it.
    pub(crate) fn outcome<T>(mut self, read: Option<T>) -> Result<T, Vec<Problem>> {
        self.problems.sort_by_key(|problem| (problem.line, problem.column));
        self.problems.truncate(MAX_PROBLEMS);
        match read {
            Some(read) if self.problems.is_empty() => Ok(read),
            // What is not whole has said why; this keeps it an error should that ever be untrue.
            None if self.problems.is_empty() => Err(vec![Problem::file(self.file, "is incomplete")]),
            _ => Err(self.problems),
        }
    }
}

/// Values.
impl Check<'_> {
    /// A value as it was written.
    pub(crate) fn written(&self, section: &str, name: &str, key: Option<&str>) -> Option<Json> {
        let section = self.written.get(section)?.get(name)?;
        key.map_or(Some(section), |key| section.get(key)).cloned()
    }

    pub(crate) fn bind(
        &mut self,
        text: Option<&Text>,
        default: &str,
        what: &str,
        reach: Reach,
    ) -> Option<SocketAddr> {
        self.bind_on(ANY_HOST, text, default, what, reach)
    }

    pub(crate) fn bind_on(
        &mut self,
        host: &str,
        text: Option<&Text>,
        default: &str,
        what: &str,
        reach: Reach,
    ) -> Option<SocketAddr> {
        let written = text.map_or(default, |text| text.get_ref());
        let mut complain = |message: String, hint: String| match text {
            Some(text) => self.report(text, message, Some(hint)),
            None => self.problems.push(Problem::file(self.file, message).hint(hint)),
        };
        let Ok(address) = written.parse::<SocketAddr>() else {
            let hint = "write an IP address and a port, such as 127.0.0.1:8080";
            complain(format!("{what}: `{written}` is not an address to listen on"), hint.into());
            return None;
        };
        if address.port() == 0 {
            complain(format!("{what}: port 0 is nobody's to find"), "choose a port".into());
            return None;
        }
        if reach == Reach::Loopback && !address.ip().is_loopback() {
            let hint = format!(
                "use 127.0.0.1:{}; what leaves the host goes through a sidecar's mTLS",
                address.port()
            );
            complain(format!("{what} must be on loopback, and {} is not", address.ip()), hint);
            return None;
        }
        if reach == Reach::Dialled && address.ip().is_unspecified() {
            let hint = "name the one address that other hosts dial";
            complain(format!("{what}: {} cannot be dialled", address.ip()), hint.into());
            return None;
        }
        // The same app may be named where it is served and where it is asked.
        let clash =
            |bound: &&Bound| bound.host == host && overlap(bound.address, address) && bound.what != what;
        if let Some(other) = self.bound.iter().find(clash).map(|bound| bound.what.clone()) {
            let message = format!("{address} is used twice: {other} and {what}");
            let hint = "give each its own port".to_owned();
            match text {
                Some(text) => self.report(text, message, Some(hint)),
                None => self.problems.push(Problem::file(self.file, message).hint(hint)),
            }
        }
        self.bound.push(Bound { host: host.to_owned(), address, what: what.to_owned() });
        Some(address)
    }

    pub(crate) fn same_place(&mut self, listen: SocketAddr) -> Option<HostPort> {
        if listen.ip().is_unspecified() {
            let problem =
                Problem::file(self.file, "agents cannot tell where control is: it listens on every address");
            self.problems.push(problem.hint("add control = \"HOST:PORT\" to [agent]"));
            return None;
        }
        Some(HostPort { host: listen.ip().to_string(), port: listen.port() })
    }

    pub(crate) fn host_port(&mut self, text: &Text) -> Option<HostPort> {
        // The URL parser knows names, IPv4 and bracketed IPv6, and refuses what is none of them.
        let parsed = Url::parse(&format!("palisade://{}", text.get_ref())).ok().and_then(|url| {
            let plain = url.path().is_empty() && url.username().is_empty() && url.query().is_none();
            let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
            plain.then_some(HostPort { host, port: url.port()? })
        });
        if parsed.is_none() {
            let message = format!("`{}` is not host:port", text.get_ref());
            self.report(text, message, Some("for example control.internal:4810".into()));
        }
        parsed
    }

    pub(crate) fn url(&mut self, text: &Text) -> Option<Url> {
        let wrong = match Url::parse(text.get_ref()) {
            Ok(url) if url.scheme() != "https" => "does not start with https://".to_owned(),
            Ok(url) if url.host().is_none() => "names no host".to_owned(),
            Ok(url)
                if !url.username().is_empty()
                    || url.password().is_some()
                    || url.query().is_some()
                    || url.fragment().is_some() =>
            {
                "holds more than scheme, host, port and path".to_owned()
            }
            Ok(url) => return Some(url),
            Err(error) => format!("is not a URL: {error}"),
        };
        let hint = "for example https://id.example.org";
        self.report(text, format!("`{}` {wrong}", text.get_ref()), Some(hint.into()));
        None
    }

    pub(crate) fn own_url(&mut self, listen: SocketAddr, at: &Text, key: &str) -> Option<Url> {
        if listen.ip().is_unspecified() {
            let hint = format!("add {key} = \"https://HOST:{}\"", listen.port());
            self.report(at, "nobody can tell its URL from an address that stands for all".into(), Some(hint));
            return None;
        }
        Url::parse(&format!("https://{listen}")).ok()
    }

    pub(crate) fn duration(
        &mut self,
        text: Option<&Text>,
        default: Duration,
        range: std::ops::RangeInclusive<Duration>,
    ) -> Option<Duration> {
        let Some(text) = text else { return Some(default) };
        let duration = match humantime::parse_duration(text.get_ref()) {
            Ok(duration) => duration,
            Err(error) => {
                let message = format!("`{}` is not a duration: {error}", text.get_ref());
                self.report(text, message, Some("write it like 90s, 2m or 1h30m".into()));
                return None;
            }
        };
        if !range.contains(&duration) {
            let shown = humantime::format_duration;
            let message = format!(
                "{} is not between {} and {}",
                shown(duration),
                shown(*range.start()),
                shown(*range.end())
            );
            self.report(text, message, None);
            return None;
        }
        Some(duration)
    }

    /// A size, such as 256MiB, or none.
    pub(crate) fn memory(&mut self, text: Option<&Text>) -> Option<Memory> {
        let Some(text) = text else { return Some(Memory::ShareOfGroup) };
        if text.get_ref() == "none" {
            return Some(Memory::Unbounded);
        }
        let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
        let bytes = units.into_iter().find_map(|(unit, shift)| {
            let number = text.get_ref().strip_suffix(unit)?.trim_end().parse::<u64>().ok()?;
            number.checked_mul(1 << shift).filter(|bytes| *bytes >= MIN_MEMORY_BYTES)
        });
        if bytes.is_none() {
            let message = format!("`{}` is not a size of at least 16MiB", text.get_ref());
            self.report(text, message, Some("write it like 256MiB or 1GiB, or none".into()));
        }
        bytes.map(Memory::Bytes)
    }

    pub(crate) fn attest(&mut self, section: &Spanned<AttestSection>) -> Option<Attest> {
        let span = section.span();
        let section = section.get_ref();
        if section.uid.is_none()
            && section.gid.is_none()
            && section.path.is_none()
            && section.sha256.is_none()
        {
            let problem = Problem::at(
                self.file,
                self.text,
                span,
                "attest is empty: every process would get this identity",
            );
            self.problems.push(problem.hint("give at least one of uid, gid, path, sha256"));
            return None;
        }
        let path = section.path.as_ref().map(|text| {
            // Relative to mesh.toml like every path, so that a mesh can live in a directory.
            self.path(text)
        });
        let sha256 = match &section.sha256 {
            None => None,
            Some(text) => match digest(text.get_ref()) {
                Some(digest) => Some(digest),
                None => {
                    let hint = "sha256sum FILE prints it";
                    self.report(text, "sha256 is 64 hex digits".into(), Some(hint.into()));
                    return None;
                }
            },
        };
        Some(Attest { uid: section.uid, gid: section.gid, path, sha256 })
    }

    /// What is captured, and where it may go.
    pub(crate) fn capture(&mut self, section: &CaptureSection) -> Option<Capture> {
        let mut port = |written: &Option<Spanned<u16>>| {
            let written = written.as_ref()?;
            let port = NonZeroU16::new(*written.get_ref());
            if port.is_none() {
                let hint =
                    "write the port that `palisade sidecar capture on` has in its rules, such as 15001";
                self.report(written, "0 is no port to be brought to".into(), Some(hint.into()));
            }
            port
        };
        let (outbound_port, inbound_port) = (port(&section.outbound_port), port(&section.inbound_port));
        if let (Some(written), true) = (&section.inbound_port, outbound_port == inbound_port) {
            let hint = "what the app dials and what others dial come in apart";
            self.report(written, "outbound_port and inbound_port are the same".into(), Some(hint.into()));
        }
        let (mut egress, mut egress_names) = (Vec::new(), Vec::new());
        for text in &section.egress {
            let written = text.get_ref();
            let read = if written.contains("://") {
                written.parse::<Rule>().map(|rule| egress_names.push(rule)).map_err(|error| error.to_string())
            } else {
                let read = written.parse::<Destination>();
                read.map(|destination| egress.push(destination)).map_err(|error| error.to_string())
            };
            if let Err(problem) = read {
                let hint = "write 10.0.0.0/8:5432, tls://*.example.org or https://api.example.org";
                self.report(text, format!("`{written}`: {problem}"), Some(hint.into()));
            }
        }
        let egress_ca = self.path_or(section.egress_ca.as_ref(), SYSTEM_AUTHORITIES);
        Some(Capture { outbound_port, inbound_port, egress, egress_names, egress_ca })
    }

    /// The zones and their networks.
    pub(crate) fn zones(&mut self, sections: &BTreeMap<Text, Vec<Text>>) -> Vec<Zone> {
        let mut zones = Vec::with_capacity(sections.len());
        for (name, networks) in sections {
            if networks.is_empty() {
                let hint = "write the networks that it is made of, such as [\"10.1.0.0/16\"]";
                self.report(name, format!("the zone {} is nowhere", name.get_ref()), Some(hint.into()));
            }
            let networks = networks.iter().filter_map(|text| self.network(text)).collect();
            zones.push(Zone { name: name.get_ref().clone(), networks });
        }
        zones
    }

    /// How calls to services go. `carries` says of a name what its calls are, or why there are none.
    pub(crate) fn traffic(
        &mut self,
        sections: BTreeMap<Spanned<String>, Traffic>,
        carries: impl Fn(&str) -> Result<Carries, String>,
    ) -> BTreeMap<ServiceName, Traffic> {
        let mut traffic = BTreeMap::new();
        for (written, section) in sections {
            let name = written.get_ref();
            let held = match carries(name) {
                Ok(Carries::Requests) => Ok(()),
                Ok(Carries::Connections) => {
                    section.of_connections().map_err(|problem| format!("`{name}` {problem}"))
                }
                Err(message) => Err(message),
            };
            let named = section.named().filter(|other| *other != name).map(|other| match carries(other)? {
                Carries::Requests => Ok(()),
                Carries::Connections => Err(format!("`{other}` takes connections, not requests")),
            });
            let wrong: Vec<String> = std::iter::once(held).chain(named).filter_map(Result::err).collect();
            for message in wrong {
                let hint = "[traffic.NAME], the keys of its split and mirror.to are services that are called; the \
                            latter two take requests";
                self.report(&written, message, Some(hint.into()));
            }
            if !self.declared.contains("zones") && section.prefer == Prefer::Zone {
                let hint = "add [zones], with the networks of each";
                self.report(&written, "there are no zones to prefer".to_owned(), Some(hint.into()));
            }
            if let Ok(name) = ServiceName::new(name) {
                traffic.insert(name, section);
            }
        }
        traffic
    }

    /// Where spans go, and of which requests there are some.
    pub(crate) fn traces(&mut self, section: &TracesSection) -> Option<TracesConfig> {
        let endpoint = section.endpoint.get_ref().parse::<Endpoint>();
        if let Err(error) = &endpoint {
            let hint = "for example http://127.0.0.1:4318/v1/traces; for a collector elsewhere, where this host's \
                        sidecar takes calls to it";
            let message = format!("`{}` is no collector's address: {error}", section.endpoint.get_ref());
            self.report(&section.endpoint, message, Some(hint.into()));
        }
        let sample = Share::new(section.sample.as_ref().map_or(TRACED_SHARE, |sample| *sample.get_ref()));
        if let (Err(error), Some(sample)) = (&sample, &section.sample) {
            self.report(
                sample,
                error.to_string(),
                Some("write 0.01 to record one trace of a hundred".into()),
            );
        }
        Some(TracesConfig { endpoint: endpoint.ok()?, sample: sample.ok()? })
    }

    /// Where a service is found: addresses, or one name with a port.
    pub(crate) fn endpoints(&mut self, texts: &[Text]) -> Option<Source> {
        match texts {
            [name] if name.get_ref().parse::<SocketAddr>().is_err() => {
                let HostPort { host, port } = self.host_port(name)?;
                Some(Source::Dns { name: host.into(), port })
            }
            texts => {
                let found: Vec<SocketAddr> = texts.iter().filter_map(|text| self.dialled(text)).collect();
                (!found.is_empty()).then(|| found.into())
            }
        }
    }

    /// The proxies that say where connections come from.
    pub(crate) fn proxies(&mut self, texts: &[Text]) -> Networks {
        texts.iter().filter_map(|text| self.network(text)).collect()
    }

    fn network(&mut self, text: &Text) -> Option<Network> {
        match text.get_ref().parse() {
            Ok(network) => Some(network),
            Err(error) => {
                let error: NetworkError = error;
                self.report(text, error.to_string(), None);
                None
            }
        }
    }

    /// The second way in to `app`, which other meshes know as `destinations`.
    pub(crate) fn hbone(
        &mut self,
        host: &str,
        what: &str,
        listen: Option<&Text>,
        destinations: &[Text],
        app: Option<SocketAddr>,
    ) -> Option<Hbone> {
        let Some(text) = listen else {
            if let Some(first) = destinations.first() {
                self.report(first, "there is no `hbone` to come in by".to_owned(), None);
            }
            return None;
        };
        let listen = self.bind_on(host, Some(text), "", what, Reach::Any);
        let mut named: Vec<SocketAddr> = destinations.iter().filter_map(|text| self.dialled(text)).collect();
        let listen = listen?;
        if destinations.is_empty() {
            if listen.ip().is_unspecified() {
                let hint = "add hbone_destinations = [\"ADDRESS:PORT\"]";
                self.report(text, "which address do others know the app by?".to_owned(), Some(hint.into()));
            }
            named.push(SocketAddr::new(listen.ip(), app?.port()));
        }
        Some(Hbone { listen, destinations: named })
    }

    /// An address that others connect to.
    pub(crate) fn dialled(&mut self, text: &Text) -> Option<SocketAddr> {
        let address: Option<SocketAddr> = text.get_ref().parse().ok();
        let address = address.filter(|address| address.port() != 0 && !address.ip().is_unspecified());
        if address.is_none() {
            let message = format!("`{}` is not an address to connect to", text.get_ref());
            let hint = "write an IP address and a port, such as 10.0.0.7:15606";
            self.report(text, message, Some(hint.into()));
        }
        address
    }

    pub(crate) fn path(&self, text: &Text) -> PathBuf {
        self.base.join(text.get_ref())
    }

    pub(crate) fn path_or(&self, text: Option<&Text>, default: &str) -> PathBuf {
        text.map_or_else(|| PathBuf::from(default), |text| self.path(text))
    }

    pub(crate) fn report<T>(&mut self, at: &Spanned<T>, message: String, hint: Option<String>) {
        self.problems.push(Problem::at(self.file, self.text, at.span(), message).maybe_hint(hint));
    }
}

fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let same_ip = one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() == other.port() && same_ip
}

fn digest(text: &str) -> Option<[u8; 32]> {
    identity::hex::decode(text)?.as_slice().try_into().ok()
}
