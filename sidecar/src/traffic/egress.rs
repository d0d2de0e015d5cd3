//! Which hosts outside the mesh an app may call, and how: a list, and nothing beside it.
//!
//! Names are judged as they were said, and dialled by us under the same name: a client that says one name
//! and means another address gets the name's own address.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use rustls::server::Acceptor;
use thiserror::Error;

/// A ClientHello with post-quantum key shares has about 2 KiB; RFC 8446 allows far more than anybody sends.
pub const MAX_HELLO_BYTES: usize = 16 * 1024;
/// RFC 1035 §2.3.4.
const MAX_NAME_BYTES: usize = 253;
const MAX_LABEL_BYTES: usize = 63;
/// Where HTTP is when its URL names no port.
const HTTP_PORT: u16 = 80;
/// The same of HTTPS.
pub const HTTPS_PORT: u16 = 443;

/// What passes between the app and the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Speech {
    /// The app speaks HTTP to its sidecar, which makes it HTTPS.
    Https,
    /// The app's own TLS, passed through; the name is that of its ClientHello.
    Tls,
    /// HTTP in clear text.
    Http,
    /// Bytes.
    Tcp,
}

impl Speech {
    fn parse(scheme: &str) -> Option<(Self, Option<u16>)> {
        Some(match scheme {
            "https" => (Self::Https, Some(HTTPS_PORT)),
            "tls" => (Self::Tls, Some(HTTPS_PORT)),
            "http" => (Self::Http, Some(HTTP_PORT)),
            "tcp" => (Self::Tcp, None),
            _ => return None,
        })
    }
}

/// One line of the list: `https://api.example.org`, `tls://*.example.org:8443`, `tcp://10.0.0.7:5432`.
///
/// `*.` stands for one label or more, never for none; what follows has at least two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    text: Arc<str>,
    speech: Speech,
    host: Host,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Host {
    Address(IpAddr),
    Name(Box<str>),
    /// All names that end with a dot and this.
    Under(Box<str>),
}

/// Why a text is no [`Rule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("is not SCHEME://HOST[:PORT] with https, tls, http or tcp, and HOST a name, *.NAME or an address")]
pub struct RuleError;

impl FromStr for Rule {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (scheme, rest) = text.split_once("://").ok_or(RuleError)?;
        let (speech, default_port) = Speech::parse(scheme).ok_or(RuleError)?;
        let (host, port) = split_port(rest).ok_or(RuleError)?;
        let port = port.or(default_port).ok_or(RuleError)?;
        let host = match host.strip_prefix("*.") {
            Some(suffix) if suffix.contains('.') && is_name(suffix) => Host::Under(suffix.into()),
            Some(_) => return Err(RuleError),
            None => Host::said(host).ok_or(RuleError)?,
        };
        // As it is compared: a rule in capitals would match nothing.
        if rest.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(RuleError);
        }
        Ok(Self { text: text.into(), speech, host, port })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Host {
    /// A host as a client says it. Letters may be of either case (RFC 9110 §4.2.3), all else must be
    /// canonical: no trailing dot, no percent, no second spelling of an address.
    fn said(text: &str) -> Option<Self> {
        if let Some(address) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let address: std::net::Ipv6Addr = address.parse().ok()?;
            return Some(Self::Address(IpAddr::V6(address).to_canonical()));
        }
        if let Ok(address) = text.parse::<std::net::Ipv4Addr>() {
            return Some(Self::Address(address.into()));
        }
        let name = text.to_ascii_lowercase();
        // Resolvers read a name whose last label is a number as an address in another notation.
        let number = name
            .rsplit('.')
            .next()
            .is_some_and(|label| label.starts_with("0x") || label.bytes().all(|byte| byte.is_ascii_digit()));
        (is_name(&name) && !number).then(|| Self::Name(name.into()))
    }
}

fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=MAX_LABEL_BYTES).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    text.len() <= MAX_NAME_BYTES && text.split('.').all(label)
}

/// `HOST`, `HOST:PORT`, `[V6]`, `[V6]:PORT`.
fn split_port(text: &str) -> Option<(&str, Option<u16>)> {
    let after_host = text.rfind(']').map_or(0, |bracket| bracket + 1);
    match text.get(after_host..)?.find(':') {
        None => Some((text, None)),
        Some(colon) => {
            let (host, port) = text.split_at_checked(after_host + colon)?;
            let digits = port.get(1..)?;
            let canonical = !digits.starts_with(['0', '+']);
            Some((host, Some(digits.parse().ok().filter(|_| canonical)?)))
        }
    }
}

/// Why a call does not leave.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// What is said is not a host.
    #[error("the host is not a name or an address in canonical form")]
    Form,
    /// No rule allows it.
    #[error("no egress rule allows this host, port and protocol")]
    NotListed,
    /// The name is allowed, and leads where names may not lead.
    #[error("the name leads to {0}, which a name may not")]
    Address(IpAddr),
}

/// The list, looked up at the same cost however long it is.
#[derive(Debug, Default)]
pub struct AllowList {
    rules: HashMap<(Host, u16, Speech), Arc<str>>,
    named_ports: HashSet<u16>,
    makes_tls: bool,
}

/// A call that a rule allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// The rule.
    pub rule: Arc<str>,
    /// Whether it names the address itself, which then may be any.
    by_address: bool,
}

impl AllowList {
    /// A list of these rules.
    pub fn new(rules: impl IntoIterator<Item = Rule>) -> Self {
        let mut list = Self::default();
        for Rule { text, speech, host, port } in rules {
            if speech != Speech::Tcp {
                list.named_ports.insert(port);
            }
            if (speech, port) == (Speech::Https, HTTPS_PORT) {
                list.named_ports.insert(HTTP_PORT);
            }
            list.makes_tls |= speech == Speech::Https;
            list.rules.insert((host, port, speech), text);
        }
        list
    }

    /// Whether a client could say a name at this port, in a ClientHello or in a request, that is allowed.
    pub fn may_be_named(&self, port: u16) -> bool {
        self.named_ports.contains(&port)
    }

    /// Whether a rule has the sidecar make TLS of what the app says.
    pub fn makes_tls(&self) -> bool {
        self.makes_tls
    }

    /// How a request in clear text that was dialled at `port` goes on, and to which port: over TLS where a rule says
    /// so, from the port of HTTP to that of HTTPS.
    pub fn decide_request(&self, host: &str, port: u16) -> Result<(Speech, u16), Refusal> {
        let secured = if port == HTTP_PORT { HTTPS_PORT } else { port };
        let ways = [(Speech::Https, port), (Speech::Https, secured), (Speech::Http, port)];
        let mut refusal = Refusal::NotListed;
        for (speech, port) in ways {
            match self.decide(speech, host, port) {
                Ok(_) => return Ok((speech, port)),
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    /// Whether the app may speak so to this host, which is as its request or ClientHello says it, without
    /// a port.
    pub fn decide(&self, speech: Speech, host: &str, port: u16) -> Result<Allowed, Refusal> {
        let host = Host::said(host).ok_or(Refusal::Form)?;
        let rule = |host| self.rules.get(&(host, port, speech)).cloned();
        let by_address = matches!(host, Host::Address(_));
        let parents: Vec<Box<str>> = match &host {
            Host::Name(name) => {
                name.match_indices('.').filter_map(|(dot, _)| name.get(dot + 1..)).map(Box::from).collect()
            }
            Host::Address(_) | Host::Under(_) => Vec::new(),
        };
        // The nearest rule, should several allow it.
        let rule = rule(host).or_else(|| parents.into_iter().find_map(|parent| rule(Host::Under(parent))));
        rule.map(|rule| Allowed { rule, by_address }).ok_or(Refusal::NotListed)
    }
}

impl Allowed {
    /// Whether this address may be dialled for it, as the name was resolved. A name in the hands of others
    /// must not open this machine, or the metadata service of its cloud, to the app (DNS rebinding).
    pub fn leads_to(&self, address: IpAddr) -> Result<(), Refusal> {
        let never = match address.to_canonical() {
            IpAddr::V4(ip) => {
                ip.is_loopback()
                    || ip.is_link_local()
                    || ip.is_unspecified()
                    || ip.is_multicast()
                    || ip.is_broadcast()
            }
            IpAddr::V6(ip) => {
                ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified() || ip.is_multicast()
            }
        };
        if never && !self.by_address { Err(Refusal::Address(address)) } else { Ok(()) }
    }
}

/// Reads the name out of a ClientHello, piece by piece, without answering it.
///
/// The parser is rustls's own, so what is read here is what a rustls server would read. With encrypted
/// ClientHello (ECH) it is the outer name: the one that is dialled, too.
#[derive(Default)]
pub struct HelloReader {
    acceptor: Acceptor,
    bytes: usize,
}

/// Why there is no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HelloError {
    /// It is not TLS, or not a correct ClientHello.
    #[error("not a ClientHello")]
    Malformed,
    /// It is longer than [`MAX_HELLO_BYTES`].
    #[error("the ClientHello is too long")]
    TooLong,
    /// It names no server.
    #[error("the ClientHello names no server")]
    Nameless,
}

impl HelloReader {
    /// Takes what came next. `None`: more is needed. After a name or an error it is done.
    pub fn read(&mut self, mut piece: &[u8]) -> Result<Option<String>, HelloError> {
        while !piece.is_empty() {
            let before = piece.len();
            let read = self.acceptor.read_tls(&mut piece).map_err(|_| HelloError::Malformed)?;
            self.bytes += before - piece.len();
            if read == 0 {
                return Err(HelloError::Malformed);
            }
            match self.acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(str::to_ascii_lowercase);
                    return name.map(Some).ok_or(HelloError::Nameless);
                }
                Ok(None) if self.bytes > MAX_HELLO_BYTES => return Err(HelloError::TooLong),
                Ok(None) => {}
                Err(_) => return Err(HelloError::Malformed),
            }
        }
        Ok(None)
    }
}

impl fmt::Debug for HelloReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HelloReader").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    fn list(rules: &[&str]) -> AllowList {
        AllowList::new(rules.iter().map(|rule| rule.parse().unwrap()))
    }

    #[test]
    fn exactly_what_is_listed_and_how() {
        let list = list(&[
            "https://api.example.org",
            "tls://*.example.org:8443",
            "tcp://10.0.0.7:5432",
            "tcp://[2001:db8::1]:22",
            "http://127.0.0.1:9000",
        ]);
        let allows = |speech, host: &str, port| list.decide(speech, host, port).is_ok();
        assert!(allows(Speech::Https, "api.example.org", 443));
        assert!(allows(Speech::Https, "API.Example.org", 443));
        assert!(!allows(Speech::Https, "api.example.org", 8443));
        assert!(!allows(Speech::Http, "api.example.org", 443), "not in clear text");
        assert!(!allows(Speech::Https, "xapi.example.org", 443));
        assert!(allows(Speech::Tls, "a.example.org", 8443) && allows(Speech::Tls, "a.b.example.org", 8443));
        assert!(!allows(Speech::Tls, "example.org", 8443), "not the domain itself");
        assert!(!allows(Speech::Tls, "evilexample.org", 8443));
        assert!(!allows(Speech::Tls, "example.org.evil.net", 8443));
        assert!(allows(Speech::Tcp, "10.0.0.7", 5432) && allows(Speech::Tcp, "[2001:db8:0::1]", 22));
        assert!(allows(Speech::Tcp, "[::ffff:10.0.0.7]", 5432), "the same address");
    }

    #[test]
    fn requests_go_over_tls_where_a_rule_says_so() {
        let rules = list(&[
            "https://api.example.org",
            "http://api.example.org",
            "https://*.example.org:8443",
            "http://plain.example.org",
        ]);
        assert!(rules.makes_tls() && [80, 443, 8443].map(|port| rules.may_be_named(port)) == [true; 3]);
        let way = |host, port| rules.decide_request(host, port);
        assert_eq!(way("api.example.org", 80), Ok((Speech::Https, 443)), "TLS before clear text");
        assert_eq!(way("api.example.org", 443), Ok((Speech::Https, 443)));
        assert_eq!(way("a.example.org", 8443), Ok((Speech::Https, 8443)));
        assert_eq!(way("plain.example.org", 80), Ok((Speech::Http, 80)));
        assert_eq!(way("plain.example.org", 443), Err(Refusal::NotListed));
        assert_eq!(way("a.example.org", 80), Err(Refusal::NotListed));
        assert_eq!(way("api.example.org.", 80), Err(Refusal::Form));
        assert!(list(&["https://api.example.org"]).may_be_named(80));
        assert!(!list(&["tls://api.example.org"]).makes_tls());
    }

    #[test]
    fn second_spellings_are_refused_not_guessed() {
        let list = list(&["https://api.example.org", "tcp://127.0.0.1:80"]);
        for host in [
            "",
            ".",
            "api.example.org.",
            "api..example.org",
            ".example.org",
            "-a.example.org",
            "api.example.org:443",
            "api%2eexample.org",
            "user@api.example.org",
            "api.example.org/",
            "127.1",
            "0x7f.0.0.1",
            "2130706433",
            "0177.0.0.1x.1",
            "::1",
            "[::1",
            "[fe80::1%25eth0]",
            "café.example.org",
            "a b.example.org",
            "api.example.org\0",
        ] {
            assert_eq!(list.decide(Speech::Https, host, 443), Err(Refusal::Form), "{host:?}");
        }
        let long = format!("{}.example.org", "a.".repeat(130));
        assert_eq!(list.decide(Speech::Https, &long, 443), Err(Refusal::Form));
    }

    #[test]
    fn what_is_no_rule() {
        for text in [
            "api.example.org",
            "ftp://a.b",
            "https://",
            "https://*",
            "https://*.org",
            "https://*.*.org",
            "https://a*.b.c",
            "https://API.example.org",
            "https://a.b/",
            "https://a.b:0",
            "https://a.b:065",
            "https://a.b:65536",
            "https://a.b:+1",
            "tcp://a.b",
            "https://[::1",
            "https://::1",
            "https://a.b.",
            "https://u@a.b",
            "tcp://*.0.0.1:22 ",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
        assert_eq!("tls://a.b:8443".parse::<Rule>().unwrap().to_string(), "tls://a.b:8443");
    }

    #[test]
    fn a_name_does_not_lead_home() {
        let list = list(&["https://*.example.org", "http://127.0.0.1:9000"]);
        let allowed = list.decide(Speech::Https, "rebound.example.org", 443).unwrap();
        assert_eq!(&*allowed.rule, "https://*.example.org");
        for address in
            ["127.0.0.1", "169.254.169.254", "::1", "fe80::1", "::ffff:127.0.0.1", "0.0.0.0", "224.0.0.1"]
        {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(allowed.leads_to(address), Err(Refusal::Address(address)));
        }
        assert_eq!(allowed.leads_to("10.0.0.1".parse().unwrap()), Ok(()));
        let literal = list.decide(Speech::Http, "127.0.0.1", 9000).unwrap();
        assert_eq!(literal.leads_to("127.0.0.1".parse().unwrap()), Ok(()));
    }

    /// What rustls's client sends first.
    fn hello(name: ServerName<'static>) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn without_a_name_and_without_tls() {
        let nameless = hello(ServerName::from(IpAddr::from([192, 0, 2, 1])));
        assert_eq!(HelloReader::default().read(&nameless), Err(HelloError::Nameless));
        assert_eq!(
            HelloReader::default().read(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
            Err(HelloError::Malformed)
        );
        assert_eq!(HelloReader::default().read(b"SSH-2.0-OpenSSH_9.9\r\n"), Err(HelloError::Malformed));
        // A handshake message of 60,000 bytes, spread over records.
        let mut endless = HelloReader::default();
        let mut first = vec![22, 3, 1, 0x3f, 0xff, 1, 0, 0xea, 0x60];
        first.extend([0; 0x3fff - 4]);
        let outcome = endless.read(&first).and_then(|_| endless.read(&first));
        assert!(matches!(outcome, Err(HelloError::TooLong | HelloError::Malformed)), "{outcome:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_name_is_read_however_the_bytes_come(
            name in "[a-z][a-z0-9]{0,20}(\\.[a-z][a-z0-9-]{0,10}[a-z]){1,3}",
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let bytes = hello(ServerName::try_from(name.clone()).unwrap());
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let mut reader = HelloReader::default();
            let mut read = None;
            for piece in cuts.windows(2) {
                prop_assert_eq!(read.clone(), None);
                read = reader.read(&bytes[piece[0]..piece[1]]).unwrap();
            }
            prop_assert_eq!(read, Some(name));
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _any = HelloReader::default().read(&bytes).is_ok();
            let mut framed = vec![22, 3, 1, (bytes.len() >> 8) as u8, bytes.len() as u8];
            framed.extend(&bytes);
            let _any = HelloReader::default().read(&framed).is_ok();
        }

        #[test]
        fn a_flipped_byte_never_panics(at: prop::sample::Index, to: u8) {
            let mut bytes = hello(ServerName::try_from("api.example.org").unwrap());
            let at = at.index(bytes.len());
            bytes[at] = to;
            let _any = HelloReader::default().read(&bytes).is_ok();
        }

        #[test]
        fn a_wildcard_is_names_below_and_nothing_else(host in "[a-z.-]{0,12}(example)?\\.?(org)?") {
            let list = list(&["tls://*.example.org"]);
            let below = is_name(&host) && host.ends_with(".example.org");
            prop_assert_eq!(list.decide(Speech::Tls, &host, 443).is_ok(), below);
        }
    }
}
