//! Clients with certificates that prove nothing, at the mTLS port: each is refused before its first request, for its
//! own reason, and the app never hears of any.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod certificate;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use certificate::*;
use identity::clock::SystemClock;
use identity::testing::{ago, ahead};
use identity::tls::{ALPN_HTTP11, unnamed_server};
use identity::verify::ExpectServer;
use identity::{BundleSet, IdentitySource, Scope, SpiffeId, TrustBundle, TrustDomain, X509Svid};
use policy::{DecisionRecord, Outcome, Policies, Recorder};
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sidecar::app::AppProtocol;
use sidecar::capture::CaptureConfig;
use sidecar::{InboundConfig, Sidecar, SidecarConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

/// Bounds a hang.
const DEADLINE: Duration = Duration::from_secs(60);
const CLIENT: &str = "spiffe://mesh.test/ns/default/sa/client";
const BACKEND: &str = "spiffe://mesh.test/ns/default/sa/backend";

type Chain = Vec<CertificateDer<'static>>;

/// Everybody who has a key.
struct Cast {
    root: Holder,
    /// In the bundle too, and over.
    old_root: Holder,
    /// Of the root's name, with another key.
    impostor: Holder,
    stranger: Holder,
    /// Authorities below the root, one below the other.
    below: Vec<Holder>,
    client: Holder,
}

impl Cast {
    fn new() -> Self {
        Self {
            root: Holder::new("root"),
            old_root: Holder::new("old root"),
            impostor: Holder::new("root"),
            stranger: Holder::new("stranger"),
            below: (0..5).map(|nth| Holder::new(&format!("authority {nth}"))).collect(),
            client: Holder::new("client"),
        }
    }

    fn bundle(&self) -> TrustBundle {
        let over = self
            .old_root
            .sign(&Draft { not_after: moment(ago(10)), ..authority(&self.old_root, &self.old_root) });
        let authorities = vec![self.root.sign(&authority(&self.root, &self.root)), over];
        TrustBundle::new(TrustDomain::new("mesh.test").unwrap(), authorities).unwrap()
    }

    /// A leaf that is good, but for the change.
    fn leaf(&self, change: impl FnOnce(&mut Draft)) -> Chain {
        vec![self.leaf_by(&self.root, change)]
    }

    fn leaf_by(&self, issuer: &Holder, change: impl FnOnce(&mut Draft)) -> CertificateDer<'static> {
        let mut draft = leaf(&self.client, issuer, CLIENT);
        change(&mut draft);
        issuer.sign(&draft)
    }

    fn named(&self, names: &[Vec<u8>]) -> Chain {
        self.leaf(|draft| draft.names(names))
    }

    fn id(&self, id: impl AsRef<[u8]>) -> Chain {
        self.named(&[uri(id)])
    }

    fn keyed(&self, key: Vec<u8>) -> Chain {
        self.leaf(|draft| draft.key = key)
    }

    /// A good leaf below an authority that is good, but for the change.
    fn through(&self, change: impl FnOnce(&mut Draft)) -> Chain {
        let mut draft = authority(&self.below[0], &self.root);
        change(&mut draft);
        vec![self.leaf_by(&self.below[0], |_| {}), self.root.sign(&draft)]
    }

    /// A good leaf below so many authorities, the uppermost of which allows `depth` more below it.
    fn deep(&self, authorities: usize, depth: Option<u8>) -> Chain {
        let mut chain = Vec::new();
        let mut issuer = &self.root;
        for (nth, holder) in self.below.iter().take(authorities).enumerate() {
            let mut draft = authority(holder, issuer);
            draft.extension(BASIC_CONSTRAINTS).value = constraints(true, depth.filter(|_| nth == 0));
            chain.insert(0, issuer.sign(&draft));
            issuer = holder;
        }
        chain.insert(0, self.leaf_by(issuer, |_| {}));
        chain
    }

    /// The bytes of a good leaf, changed after it was signed.
    fn bytes(&self, change: impl FnOnce(&mut Vec<u8>)) -> Chain {
        let mut bytes = self.leaf(|_| {})[0].to_vec();
        change(&mut bytes);
        vec![bytes.into()]
    }
}

fn authority(holder: &Holder, issuer: &Holder) -> Draft {
    Draft {
        version: Some(2),
        serial: vec![1],
        algorithm: ecdsa_sha256(),
        issuer: issuer.name.clone(),
        not_before: moment(ago(3600)),
        not_after: moment(ahead(3600)),
        subject: holder.name.clone(),
        key: holder.public_key(),
        extensions: vec![
            Extension { oid: BASIC_CONSTRAINTS, critical: true, value: constraints(true, None) },
            Extension { oid: KEY_USAGE, critical: true, value: usage(KEY_CERT_SIGN | CRL_SIGN) },
            Extension {
                oid: SUBJECT_ALT_NAME,
                critical: false,
                value: sequence(&[&uri("spiffe://mesh.test")]),
            },
        ],
    }
}

fn leaf(holder: &Holder, issuer: &Holder, id: &str) -> Draft {
    Draft {
        not_before: moment(ago(60)),
        not_after: moment(ahead(1800)),
        extensions: vec![
            Extension { oid: BASIC_CONSTRAINTS, critical: true, value: constraints(false, None) },
            Extension { oid: KEY_USAGE, critical: true, value: usage(DIGITAL_SIGNATURE) },
            Extension {
                oid: EXTENDED_KEY_USAGE,
                critical: false,
                value: purposes(&[SERVER_AUTH, CLIENT_AUTH]),
            },
            Extension { oid: SUBJECT_ALT_NAME, critical: false, value: sequence(&[&uri(id)]) },
        ],
        ..authority(holder, issuer)
    }
}

/// What each of them is, the rule that refuses it and what the operator reads.
fn malformed(cast: &Cast) -> Vec<(&'static str, Chain, &'static str, &'static str)> {
    const INVALID: &str = "tls.invalid_svid";
    const STRANGER: &str = "tls.unknown_trust_domain";
    const UNKNOWN: &str = "tls.unknown_authority";
    const EXPIRED: &str = "tls.expired_svid";
    let ext = |oid: &'static [u8], value: Vec<u8>| cast.leaf(|draft| draft.extension(oid).value = value);
    let long = |bytes: usize| format!("{CLIENT}/{}", "a".repeat(bytes - CLIENT.len() - 1));
    let none = "0 URI names where exactly one is needed";
    let two = "2 URI names where exactly one is needed";
    let unreadable = "an extension appears twice or cannot be parsed";
    let domain = "a trust domain holds only";
    let path = "a path segment holds only";
    let empty = "a path segment is empty";
    let usages = "a leaf needs a critical KeyUsage";
    let purpose = "ExtendedKeyUsage needs both serverAuth and clientAuth";
    let basic = "a leaf needs BasicConstraints with cA = false";
    let weak = "unsupported or weak public key";
    let der = "not a DER certificate";
    let root = cast.root.sign(&authority(&cast.root, &cast.root));
    vec![
        // security 1: exactly one URI name.
        ("no names", cast.leaf(|draft| draft.without(SUBJECT_ALT_NAME)), INVALID, none),
        ("an empty list of names", cast.named(&[]), INVALID, none),
        ("a host name only", cast.named(&[dns("client.mesh.test")]), INVALID, none),
        ("a host name like an ID", cast.named(&[dns(CLIENT)]), INVALID, none),
        ("a mail address like an ID", cast.named(&[email(CLIENT)]), INVALID, none),
        ("another kind of name like an ID", cast.named(&[principal_name(CLIENT)]), INVALID, none),
        (
            "an ID as the subject only",
            cast.leaf(|draft| {
                draft.subject = name(CLIENT);
                draft.names(&[dns("client")]);
            }),
            INVALID,
            none,
        ),
        ("two IDs", cast.named(&[uri(CLIENT), uri(BACKEND)]), INVALID, two),
        ("one ID twice", cast.named(&[uri(CLIENT), uri(CLIENT)]), INVALID, two),
        ("an ID and another URI", cast.named(&[uri("https://mesh.test/x"), uri(CLIENT)]), INVALID, two),
        ("names twice", cast.leaf(|draft| draft.twice(SUBJECT_ALT_NAME)), INVALID, unreadable),
        ("names that are no list", ext(SUBJECT_ALT_NAME, b"names".to_vec()), INVALID, unreadable),
        (
            "bytes behind the names",
            ext(SUBJECT_ALT_NAME, [sequence(&[&uri(CLIENT)]), vec![5, 0]].concat()),
            INVALID,
            "BadDer",
        ),
        (
            "no subject, names not critical",
            cast.leaf(|draft| draft.subject = name("")),
            INVALID,
            "the alternative name is not critical",
        ),
        // security 2: trust domains compared whole.
        (
            "a domain that ends like ours",
            cast.id("spiffe://evilmesh.test/ns/default/sa/client"),
            STRANGER,
            "evilmesh.test",
        ),
        (
            "a domain below ours",
            cast.id("spiffe://a.mesh.test/ns/default/sa/client"),
            STRANGER,
            "a.mesh.test",
        ),
        (
            "a domain that begins like ours",
            cast.id("spiffe://mesh.test.evil.test/ns/default/sa/client"),
            STRANGER,
            "mesh.test.evil.test",
        ),
        ("a shorter domain", cast.id("spiffe://mesh.tes/ns/default/sa/client"), STRANGER, "mesh.tes"),
        (
            "our domain with a dot behind it",
            cast.id("spiffe://mesh.test./ns/default/sa/client"),
            STRANGER,
            "mesh.test.",
        ),
        ("no domain", cast.id("spiffe:///ns/default/sa/client"), INVALID, "the trust domain is empty"),
        ("our domain in capitals", cast.id("spiffe://MESH.test/ns/default/sa/client"), INVALID, domain),
        (
            "a domain that is too long",
            cast.id(format!("spiffe://{}/client", "a".repeat(256))),
            INVALID,
            "longer than",
        ),
        // security 3: what a SPIFFE ID is not made of.
        (
            "another scheme",
            cast.id("https://mesh.test/ns/default/sa/client"),
            INVALID,
            "starts with spiffe://",
        ),
        (
            "the scheme in capitals",
            cast.id("SPIFFE://mesh.test/ns/default/sa/client"),
            INVALID,
            "starts with spiffe://",
        ),
        ("an empty name", cast.id(""), INVALID, "starts with spiffe://"),
        ("a space before it", cast.id(format!(" {CLIENT}")), INVALID, "starts with spiffe://"),
        ("a port", cast.id("spiffe://mesh.test:443/ns/default/sa/client"), INVALID, domain),
        ("user information", cast.id("spiffe://root@mesh.test/ns/default/sa/client"), INVALID, domain),
        (
            "NUL in the domain",
            cast.id("spiffe://mesh.test\0.evil.test/ns/default/sa/client"),
            INVALID,
            domain,
        ),
        ("an encoded domain", cast.id("spiffe://mesh%2etest/ns/default/sa/client"), INVALID, domain),
        ("no path", cast.id("spiffe://mesh.test"), INVALID, "has a path"),
        ("a root path", cast.id("spiffe://mesh.test/"), INVALID, empty),
        ("a slash behind it", cast.id(format!("{CLIENT}/")), INVALID, empty),
        ("a double slash", cast.id("spiffe://mesh.test/ns//default/sa/client"), INVALID, empty),
        ("a dot", cast.id("spiffe://mesh.test/ns/./default/sa/client"), INVALID, "'.' or '..'"),
        ("two dots", cast.id("spiffe://mesh.test/ns/default/sa/x/../client"), INVALID, "'.' or '..'"),
        ("NUL", cast.id(format!("{CLIENT}\0.evil")), INVALID, path),
        ("a line break", cast.id(format!("{CLIENT}\n")), INVALID, path),
        ("a control character", cast.id(format!("{CLIENT}\x1b[2J")), INVALID, path),
        ("percent encoding", cast.id("spiffe://mesh.test/ns/default%2fsa/client"), INVALID, path),
        ("a query", cast.id(format!("{CLIENT}?x=1")), INVALID, path),
        ("a fragment", cast.id(format!("{CLIENT}#x")), INVALID, path),
        ("a backslash", cast.id("spiffe://mesh.test/ns/default/sa\\client"), INVALID, path),
        ("a comma, as lists have them", cast.id(format!("{CLIENT},{BACKEND}")), INVALID, path),
        ("bytes of UTF-8", cast.id("spiffe://mesh.test/ns/default/sa/clïent"), INVALID, path),
        ("bytes of nothing", cast.id(b"spiffe://mesh.test/ns/\xff/sa/client"), INVALID, none),
        ("2,049 bytes", cast.id(long(2049)), INVALID, "longer than"),
        // security 4: what the key is for.
        ("no basic constraints", cast.leaf(|draft| draft.without(BASIC_CONSTRAINTS)), INVALID, basic),
        ("an authority's", ext(BASIC_CONSTRAINTS, constraints(true, None)), INVALID, basic),
        ("basic constraints twice", cast.leaf(|draft| draft.twice(BASIC_CONSTRAINTS)), INVALID, unreadable),
        ("no key usage", cast.leaf(|draft| draft.without(KEY_USAGE)), INVALID, usages),
        (
            "a key usage to be ignored",
            cast.leaf(|draft| draft.extension(KEY_USAGE).critical = false),
            INVALID,
            usages,
        ),
        ("a key that signs nothing", ext(KEY_USAGE, usage(KEY_ENCIPHERMENT)), INVALID, usages),
        ("a key for nothing", ext(KEY_USAGE, usage(0)), INVALID, usages),
        (
            "a key that signs certificates",
            ext(KEY_USAGE, usage(DIGITAL_SIGNATURE | KEY_CERT_SIGN)),
            INVALID,
            usages,
        ),
        (
            "a key that signs revocations",
            ext(KEY_USAGE, usage(DIGITAL_SIGNATURE | CRL_SIGN)),
            INVALID,
            usages,
        ),
        ("a key usage that is none", ext(KEY_USAGE, b"sign".to_vec()), INVALID, unreadable),
        ("a server's only", ext(EXTENDED_KEY_USAGE, purposes(&[SERVER_AUTH])), INVALID, purpose),
        ("a client's only", ext(EXTENDED_KEY_USAGE, purposes(&[CLIENT_AUTH])), INVALID, purpose),
        ("for signing code", ext(EXTENDED_KEY_USAGE, purposes(&[CODE_SIGNING])), INVALID, purpose),
        ("for any purpose", ext(EXTENDED_KEY_USAGE, purposes(&[ANY_PURPOSE])), INVALID, purpose),
        ("for no purpose", ext(EXTENDED_KEY_USAGE, purposes(&[])), INVALID, purpose),
        (
            "what nobody knows, and critical",
            cast.leaf(|draft| {
                draft.extensions.push(Extension {
                    oid: &[0x2a, 0x03, 0x04],
                    critical: true,
                    value: vec![5, 0],
                });
            }),
            INVALID,
            "UnsupportedCriticalExtension",
        ),
        // security 4, chains: who signed it.
        (
            "signed by itself",
            vec![cast.leaf_by(&cast.client, |_| {})],
            UNKNOWN,
            "no authority of its trust domain vouches for it",
        ),
        (
            "signed by a stranger",
            vec![cast.leaf_by(&cast.stranger, |_| {})],
            UNKNOWN,
            "no authority of its trust domain vouches for it",
        ),
        (
            "signed in our root's name",
            vec![cast.leaf_by(&cast.impostor, |_| {})],
            INVALID,
            "InvalidSignature",
        ),
        (
            "signed by another leaf",
            vec![
                cast.leaf_by(&cast.below[0], |_| {}),
                cast.root.sign(&leaf(&cast.below[0], &cast.root, BACKEND)),
            ],
            INVALID,
            "an authority needs BasicConstraints with cA = true",
        ),
        ("the root itself", vec![root.clone()], INVALID, "has a path"),
        (
            "an authority of no authority",
            cast.through(|draft| draft.extension(BASIC_CONSTRAINTS).value = constraints(false, None)),
            INVALID,
            "an authority needs BasicConstraints",
        ),
        (
            "an authority that may not sign",
            cast.through(|draft| draft.extension(KEY_USAGE).value = usage(CRL_SIGN)),
            INVALID,
            "an authority needs a critical KeyUsage",
        ),
        (
            "an authority of another domain",
            cast.through(|draft| draft.names(&[uri("spiffe://evil.test")])),
            INVALID,
            "must be its trust domain's ID",
        ),
        (
            "an authority with a leaf's name",
            cast.through(|draft| draft.names(&[uri(CLIENT)])),
            INVALID,
            "must be its trust domain's ID",
        ),
        // security 5: when.
        ("expired", cast.leaf(|draft| draft.not_after = moment(ago(5))), EXPIRED, "outside its validity"),
        (
            "not yet valid",
            cast.leaf(|draft| draft.not_before = moment(ahead(60))),
            INVALID,
            "it is not valid yet",
        ),
        (
            "over before it begins",
            cast.leaf(|draft| {
                draft.not_before = moment(ago(5));
                draft.not_after = moment(ago(10));
            }),
            INVALID,
            "InvalidCertValidity",
        ),
        (
            "a month that is none",
            cast.leaf(|draft| draft.not_after = utc_time("991301000000Z")),
            INVALID,
            der,
        ),
        ("a time that is no time", cast.leaf(|draft| draft.not_before = utc_time("yesterday")), INVALID, der),
        (
            "of a root that is over",
            vec![cast.leaf_by(&cast.old_root, |_| {})],
            UNKNOWN,
            "no authority of its trust domain vouches for it",
        ),
        (
            "of an authority that is over",
            cast.through(|draft| draft.not_after = moment(ago(5))),
            EXPIRED,
            "outside its validity",
        ),
        (
            "of an authority not yet valid",
            cast.through(|draft| draft.not_before = moment(ahead(60))),
            EXPIRED,
            "outside its validity",
        ),
        // security 6: how long, how large, how weak.
        ("five authorities between", cast.deep(5, None), INVALID, "more than 4 intermediates"),
        (
            "sixty certificates",
            [cast.leaf(|_| {}), vec![root; 59]].concat(),
            INVALID,
            "more than 4 intermediates",
        ),
        ("deeper than allowed", cast.deep(3, Some(1)), INVALID, "PathLenConstraintViolated"),
        (
            "90 kB of it",
            [cast.leaf(|draft| {
                draft.extensions.push(Extension {
                    oid: &[0x2a, 0x03, 0x04],
                    critical: false,
                    value: vec![0; 17_000],
                });
            })]
            .concat(),
            INVALID,
            "larger than 16384 bytes",
        ),
        ("RSA of 1,024 bits", cast.keyed(rsa_key(1024)), INVALID, weak),
        ("RSA of 8,192 bits", cast.keyed(rsa_key(8192)), INVALID, weak),
        ("Ed25519", cast.keyed(ed25519_key()), INVALID, weak),
        ("P-521", cast.keyed(p521_key()), INVALID, weak),
        ("a kind of key that nobody knows", cast.keyed(unknown_key()), INVALID, weak),
        ("a point that is none", cast.keyed(p256_key(&[4, 1, 2, 3])), INVALID, weak),
        // security 7: what its authority may name.
        (
            "outside its authority's names",
            cast.through(|draft| {
                draft.extensions.push(Extension {
                    oid: NAME_CONSTRAINTS,
                    critical: true,
                    value: only_uris_of(".other.test"),
                });
            }),
            INVALID,
            "NameConstraint",
        ),
        // What is no certificate.
        (
            "version 1",
            cast.leaf(|draft| {
                draft.version = None;
                draft.extensions.clear();
            }),
            INVALID,
            none,
        ),
        (
            "another algorithm inside than outside",
            cast.leaf(|draft| draft.algorithm = ecdsa_sha384()),
            INVALID,
            "SignatureAlgorithmMismatch",
        ),
        (
            "a signature with a bit flipped",
            cast.bytes(|bytes| *bytes.last_mut().unwrap() ^= 1),
            INVALID,
            "InvalidSignature",
        ),
        (
            "another name than was signed",
            cast.bytes(|bytes| {
                let at = bytes.windows(6).position(|window| window == b"client".as_slice()).unwrap();
                bytes[at] = b'C';
            }),
            INVALID,
            "InvalidSignature",
        ),
        ("a byte behind it", cast.bytes(|bytes| bytes.push(0)), INVALID, der),
        ("cut short", cast.bytes(|bytes| bytes.truncate(200)), INVALID, der),
        (
            "a length without end",
            cast.bytes(|bytes| {
                bytes.splice(1..4, [0x80]);
                bytes.extend([0, 0]);
            }),
            INVALID,
            der,
        ),
        ("no DER", vec![b"-----BEGIN CERTIFICATE-----".to_vec().into()], INVALID, der),
        ("nothing", vec![Vec::new().into()], INVALID, der),
    ]
}

/// Hands what is recorded to the test.
struct Records(mpsc::UnboundedSender<DecisionRecord>);

impl Recorder for Records {
    fn record(&self, record: DecisionRecord) {
        // After the test nobody reads.
        let _read = self.0.send(record).is_ok();
    }
}

/// A sidecar before an app that counts its requests.
struct World {
    cast: Cast,
    inbound: SocketAddr,
    records: mpsc::UnboundedReceiver<DecisionRecord>,
    asked: Arc<AtomicUsize>,
    scope: Scope,
}

impl World {
    async fn new() -> Self {
        let (cast, scope) = (Cast::new(), Scope::new());
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app_address = app.local_addr().unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        scope.spawn("app", count(app, Arc::clone(&asked), scope.clone()));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let inbound = listener.local_addr().unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/ours/policies");
        let policies = Policies::load(&folder, &TrustDomain::new("mesh.test").unwrap()).unwrap();
        let config = SidecarConfig {
            id: SpiffeId::new(BACKEND).unwrap(),
            inbound: Some(InboundConfig {
                service: "backend".into(),
                listener,
                app: app_address,
                app_protocol: AppProtocol::Http1,
                policy: policies.service("backend").unwrap(),
                gateways: Vec::new(),
                request_timeout: DEADLINE,
                hbone: None,
                proxies: Default::default(),
                rate_limit: None,
                health: None,
            }),
            ext_authz: None,
            calls: Vec::new(),
            capture: CaptureConfig::default(),
            admin: None,
            access_log: None,
            traces: None,
            others: Vec::new(),
            budget: sidecar::overload::Budget::default(),
        };
        let server = Holder::new("backend");
        let der = cast.root.sign(&leaf(&server, &cast.root, BACKEND));
        let svid = X509Svid::new(vec![der], Zeroizing::new(server.pkcs8.clone())).unwrap();
        let source = IdentitySource::fixed(svid, BundleSet::new([cast.bundle()]));
        let (sender, records) = mpsc::unbounded_channel();
        let recorder = Arc::new(Records(sender));
        Sidecar::start(config, source, recorder, SystemClock::shared(), identity::random::system(), &scope)
            .unwrap();
        Self { cast, inbound, records, asked, scope }
    }

    /// What a client with this chain hears that asks for `/`, by whatever key the chain says.
    async fn ask(&self, chain: Chain) -> String {
        let pkcs8 = PrivatePkcs8KeyDer::from(self.cast.client.pkcs8.clone());
        self.ask_with(chain, pkcs8).await
    }

    async fn ask_with(&self, chain: Chain, key: PrivatePkcs8KeyDer<'static>) -> String {
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&PrivateKeyDer::Pkcs8(key)).unwrap();
        let expected =
            ExpectServer::pinned(BundleSet::new([self.cast.bundle()]), SpiffeId::new(BACKEND).unwrap());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(expected)
            .with_client_cert_resolver(Arc::new(Presents(Arc::new(CertifiedKey::new(chain, key)))));
        config.alpn_protocols = vec![ALPN_HTTP11.to_vec()];
        let talk = async {
            let stream = TcpStream::connect(self.inbound).await.unwrap();
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            let mut heard = Vec::new();
            if let Ok(mut stream) = connector.connect(unnamed_server(), stream).await {
                // The server may have hung up already.
                let request = b"GET / HTTP/1.1\r\nhost: backend\r\nconnection: close\r\n\r\n";
                let _sent = stream.write_all(request).await.is_ok();
                let _end = stream.read_to_end(&mut heard).await.is_ok();
            }
            String::from_utf8(heard).unwrap()
        };
        tokio::time::timeout(DEADLINE, talk).await.expect("it hears nothing and is not hung up on")
    }

    /// The next denial.
    async fn denial(&mut self) -> DecisionRecord {
        loop {
            let record =
                tokio::time::timeout(DEADLINE, self.records.recv()).await.expect("nothing is recorded");
            match record.unwrap() {
                record if record.verdict == Outcome::Deny => return record,
                _permit => {}
            }
        }
    }
}

/// Presents one chain, whatever the server asks for.
#[derive(Debug)]
struct Presents(Arc<CertifiedKey>);

impl ResolvesClientCert for Presents {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

async fn count(app: TcpListener, asked: Arc<AtomicUsize>, scope: Scope) {
    loop {
        let mut stream = tokio::select! {
            accepted = app.accept() => accepted.unwrap().0,
            () = scope.draining() => return,
        };
        let asked = Arc::clone(&asked);
        scope.spawn("app's connection", async move {
            let mut head = [0; 4096];
            if matches!(stream.read(&mut head).await, Ok(1..)) {
                asked.fetch_add(1, Ordering::SeqCst);
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
                    .await
                    .unwrap();
            }
        });
    }
}

#[tokio::test]
async fn security_1_to_7_malformed_client_identities_are_refused_each_for_its_reason() {
    let mut world = World::new().await;
    let cases = malformed(&world.cast);
    assert!(cases.len() >= 68, "{}", cases.len());
    let mut wrong = Vec::new();
    for (name, chain, rule, reason) in cases {
        let heard = world.ask(chain).await;
        let denial = world.denial().await;
        if !heard.is_empty() || denial.rule.name() != rule || !denial.reason.contains(reason) {
            wrong.push(format!("{name}: {heard}{} {}", denial.rule.name(), denial.reason));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // A genuine certificate, and a key that is not its own.
    let foreign = PrivatePkcs8KeyDer::from(world.cast.stranger.pkcs8.clone());
    assert_eq!(world.ask_with(world.cast.leaf(|_| {}), foreign).await, "");
    let denial = world.denial().await;
    assert!(denial.reason.contains("BadSignature"), "{}", denial.reason);
    assert_eq!(world.asked.load(Ordering::SeqCst), 0);

    // What only looks odd is as good as any, after all of them too.
    let good = [
        world.cast.leaf(|_| {}),
        world.cast.named(&[dns("client.mesh.test"), uri(CLIENT)]),
        world.cast.leaf(|draft| draft.without(EXTENDED_KEY_USAGE)),
        world.cast.leaf(|draft| {
            draft.subject = name("");
            draft.extension(SUBJECT_ALT_NAME).critical = true;
        }),
        world.cast.leaf(|draft| {
            draft.extensions.push(Extension { oid: &[0x2a, 0x03, 0x04], critical: false, value: vec![5, 0] });
        }),
        world.cast.deep(4, Some(3)),
    ];
    let count = good.len();
    for (nth, chain) in good.into_iter().enumerate() {
        let heard = world.ask(chain).await;
        assert!(heard.starts_with("HTTP/1.1 200 "), "{nth}: {heard}");
    }
    assert_eq!(world.asked.load(Ordering::SeqCst), count);
    world.scope.drain();
    world.scope.finished(DEADLINE).await.unwrap();
}
