//! The service for agents, called as tonic would call it.

use std::net::SocketAddr;

use futures::StreamExt as _;
use identity::clock::{Clock as _, ManualClock};
use identity::{Scope, TrustDomain, X509Svid, leaf};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SanType};
use rustls_pki_types::CertificateDer;
use secrecy::SecretString;
use tonic::Code;

use super::super::{Control, ControlConfig, MAX_JOIN_TOKEN_TTL, SIGN_LIMIT, listen};
use super::*;
use crate::csr::{MAX_CSR_BYTES, PendingKey};
use crate::entry::Selectors;
use crate::random::SystemRandom;

const NOW: Duration = Duration::from_secs(1_800_000_000);

struct Rig {
    service: ControlService,
    control: Control,
    clock: Arc<ManualClock>,
    scope: Scope,
    _directory: tempfile::TempDir,
}

fn entry(name: &str, hosts: Option<Vec<String>>) -> Entry {
    Entry {
        id: SpiffeId::new(&format!("spiffe://bank.example/service/{name}")).unwrap(),
        selectors: Selectors { uid: Some(1), ..Selectors::default() },
        dns: vec!["registered.example".into()],
        ips: vec![],
        ttl: None,
        hosts,
    }
}

impl Rig {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(NOW);
        let scope = Scope::new();
        let config = ControlConfig {
            policies: None,
            relations: Default::default(),
            trust_domain: TrustDomain::new("bank.example").unwrap(),
            listener: listen("127.0.0.1:0".parse().unwrap()).unwrap(),
            admin_socket: directory.path().join("admin/admin.sock"),
            state: directory.path().join("state"),
            svid_ttl: Duration::from_secs(120),
            rotate_after: Duration::from_secs(20),
            root_ttl: Duration::from_secs(3600 * 48),
            entries: vec![
                entry("web", None),
                entry("here", Some(vec!["host-1".into()])),
                entry("there", Some(vec!["host-2".into()])),
            ],
            passphrase: SecretString::from("test"),
            decisions_kept: 100,
        };
        let control =
            Control::start(config, Arc::clone(&clock) as _, SystemRandom::shared(), &scope).await.unwrap();
        let service = ControlService(Arc::clone(&control.handle.0));
        Self { service, control, clock, scope, _directory: directory }
    }

    async fn token(&self, host: &str) -> String {
        self.control.handle().create_join_token(host, Duration::from_secs(60)).await.unwrap().token
    }

    async fn attest(&self, host: &str, token: &str, csr: Vec<u8>) -> Result<pb::AttestResponse, Code> {
        let message = pb::AttestRequest { host: host.into(), join_token: token.into(), csr };
        let answer = self.service.attest(anonymous(message)).await;
        answer.map(Response::into_inner).map_err(|status| status.code())
    }

    /// A host that has joined.
    async fn join(&self, host: &str) -> X509Svid {
        let key = PendingKey::generate().unwrap();
        let token = self.token(host).await;
        let answer = self.attest(host, &token, key.request().unwrap()).await.unwrap();
        key.with_chain(&answer.svid).unwrap()
    }

    fn entry_id(&self, name: &str) -> String {
        let set = self.service.0.entries.borrow().clone();
        let found = set.by_id.iter().find(|(_, entry)| entry.id.path() == format!("/service/{name}"));
        found.unwrap().0.clone()
    }

    async fn sign(&self, node: &X509Svid, entry_id: &str, csr: Vec<u8>) -> Result<Vec<u8>, String> {
        let items = vec![pb::SignItem { entry_id: entry_id.into(), csr }];
        let answer =
            self.service.sign(from(node, pb::SignRequest { items })).await.map_err(|s| s.to_string())?;
        match answer.into_inner().items.remove(0).outcome.unwrap() {
            pb::signed_item::Outcome::Svid(svid) => Ok(svid),
            pb::signed_item::Outcome::Refused(why) => Err(why),
        }
    }

    /// Any SVID of the trust domain, as its root could have signed it.
    fn svid(&self, path: &str) -> X509Svid {
        let key = PendingKey::generate().unwrap();
        let (public_key, id) = (key.public().unwrap(), self.service.0.trust_domain.workload(path).unwrap());
        let ttl = Duration::from_secs(60);
        let request = LeafRequest { public_key: &public_key, id: &id, dns: &[], ips: &[], ttl };
        let issued =
            self.service.0.authority.issue(&request, &*SystemRandom::shared(), self.clock.now()).unwrap();
        key.with_certificates(vec![issued.certificate]).unwrap()
    }

    async fn stop(self) {
        drop(self.service);
        self.scope.drain();
        assert_eq!(self.scope.finished(Duration::from_secs(10)).await, Ok(()));
    }
}

fn address() -> SocketAddr {
    "127.0.0.1:9".parse().unwrap()
}

fn anonymous<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(Caller { peer: None, address: address() });
    request
}

fn from<T>(svid: &X509Svid, message: T) -> Request<T> {
    let peer = Peer::from_handshake(Some(svid.chain())).unwrap().unwrap();
    let mut request = Request::new(message);
    request.extensions_mut().insert(Caller { peer: Some(peer), address: address() });
    request
}

fn csr() -> Vec<u8> {
    PendingKey::generate().unwrap().request().unwrap()
}

#[tokio::test]
async fn identity_35_a_join_token_buys_one_identity_for_its_own_host_only() {
    let rig = Rig::start().await;
    let token = rig.token("host-1").await;
    assert_eq!(rig.attest("host-2", &token, csr()).await.unwrap_err(), Code::PermissionDenied);
    assert_eq!(rig.attest("host-1", "guessed", csr()).await.unwrap_err(), Code::PermissionDenied);
    assert_eq!(rig.attest("host-1", &"x".repeat(200), csr()).await.unwrap_err(), Code::PermissionDenied);
    assert_eq!(rig.attest("a/b", &token, csr()).await.unwrap_err(), Code::InvalidArgument);
    // A bad request does not spend the token.
    assert_eq!(rig.attest("host-1", &token, vec![1, 2]).await.unwrap_err(), Code::InvalidArgument);
    let (one, two) = tokio::join!(rig.attest("host-1", &token, csr()), rig.attest("host-1", &token, csr()));
    assert_eq!([&one, &two].iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(rig.attest("host-1", &token, csr()).await.unwrap_err(), Code::PermissionDenied);

    let late = rig.token("host-1").await;
    rig.clock.advance(Duration::from_secs(60));
    assert_eq!(rig.attest("host-1", &late, csr()).await.unwrap_err(), Code::PermissionDenied);
    assert_eq!(rig.control.handle().status().await.unwrap().counts.join_tokens_open, 0);
    rig.stop().await;
}

#[tokio::test]
async fn join_tokens_are_for_host_names_and_short_lived() {
    let rig = Rig::start().await;
    let handle = rig.control.handle();
    for (host, ttl) in [
        ("", 60),
        ("a/b", 60),
        ("a b", 60),
        ("..", 60),
        ("host", 0),
        ("host", MAX_JOIN_TOKEN_TTL.as_secs() + 1),
    ] {
        assert!(handle.create_join_token(host, Duration::from_secs(ttl)).await.is_err(), "{host:?} {ttl}");
    }
    let token = handle.create_join_token("host", Duration::from_secs(60)).await.unwrap();
    assert!(!format!("{token:?}").contains(&token.token), "a token is never printed");
    rig.stop().await;
}

#[tokio::test]
async fn identity_41_and_security_15_names_and_extensions_of_a_request_are_ignored() {
    let rig = Rig::start().await;
    let node = rig.join("host-1").await;
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut wishes = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    wishes.subject_alt_names.push(SanType::URI("spiffe://bank.example/service/payments".try_into().unwrap()));
    wishes.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    wishes.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let csr = wishes.serialize_request(&pair).unwrap().der().to_vec();
    let chain = rig.sign(&node, &rig.entry_id("web"), csr).await.unwrap();
    let certificate = CertificateDer::from(chain.clone());
    // The parser refuses a certificate authority, so this also says that it is none.
    let leaf = leaf::parse(&certificate).unwrap();
    assert_eq!(leaf.id.as_str(), "spiffe://bank.example/service/web");
    assert_eq!(leaf.public_key, pair.public_key_raw());
    assert_eq!(leaf.not_after, NOW + Duration::from_secs(120));
    let contains = |text: &str| chain.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(contains("registered.example"));
    assert!(!contains("evil.example") && !contains("payments"));
    rig.stop().await;
}

#[tokio::test]
async fn identity_41_malformed_requests_are_refused_one_by_one() {
    let rig = Rig::start().await;
    let node = rig.join("host-1").await;
    let web = rig.entry_id("web");
    let mut forged = csr();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let p384 = CertificateParams::default().serialize_request(&p384).unwrap().der().to_vec();
    let bad = [forged, p384, vec![0; MAX_CSR_BYTES + 1], Vec::new()];
    let mut items: Vec<_> = bad.into_iter().map(|csr| pb::SignItem { entry_id: web.clone(), csr }).collect();
    items.push(pb::SignItem { entry_id: web.clone(), csr: csr() });
    let answer = rig.service.sign(from(&node, pb::SignRequest { items })).await.unwrap().into_inner();
    let signed: Vec<_> = answer
        .items
        .iter()
        .map(|item| matches!(item.outcome, Some(pb::signed_item::Outcome::Svid(_))))
        .collect();
    assert_eq!(signed, [false, false, false, false, true], "one bad key does not hurt the others");
    rig.stop().await;
}

#[tokio::test]
async fn an_agent_gets_svids_for_entries_of_its_own_host_only() {
    let rig = Rig::start().await;
    let node = rig.join("host-1").await;
    assert!(rig.sign(&node, &rig.entry_id("web"), csr()).await.is_ok());
    assert!(rig.sign(&node, &rig.entry_id("here"), csr()).await.is_ok());
    for refused in [rig.entry_id("there"), "unknown".into(), String::new()] {
        assert_eq!(rig.sign(&node, &refused, csr()).await.unwrap_err(), "no such entry for this host");
    }
    let status = rig.control.handle().status().await.unwrap();
    let issued = status.svids.iter().find(|issued| issued.spiffe_id.ends_with("/here")).unwrap();
    assert_eq!((issued.host.as_str(), issued.why.as_str()), ("host-1", "uid=1"));
    assert_eq!(issued.entry_id, rig.entry_id("here"));
    // Control's own, the node's, and two workloads'.
    assert_eq!((status.counts.svids_issued, status.counts.svids_active), (4, 4));
    rig.stop().await;
}

#[tokio::test]
async fn only_agents_that_have_joined_may_call() {
    let rig = Rig::start().await;
    let empty = || pb::SignRequest { items: Vec::new() };
    let code =
        |outcome: Result<Response<pb::SignResponse>, Status>| outcome.map(|_| ()).map_err(|s| s.code());
    assert_eq!(code(rig.service.sign(anonymous(empty())).await), Err(Code::Unauthenticated));
    let renew = rig.service.renew(anonymous(pb::RenewRequest { csr: csr() })).await;
    assert_eq!(renew.unwrap_err().code(), Code::Unauthenticated);
    let report = rig.service.report(anonymous(pb::ReportRequest::default())).await;
    assert_eq!(report.unwrap_err().code(), Code::Unauthenticated);
    let subscribe = rig.service.subscribe(anonymous(pb::SubscribeRequest {})).await;
    assert_eq!(subscribe.err().unwrap().code(), Code::Unauthenticated);
    for path in ["/service/web", "/palisade/control", "/palisade/agent/never-joined", "/palisade/agent/a/b"] {
        let outcome = code(rig.service.sign(from(&rig.svid(path), empty())).await);
        assert_eq!(outcome, Err(Code::PermissionDenied), "{path}");
    }
    let node = rig.join("host-1").await;
    assert_eq!(code(rig.service.sign(from(&node, empty())).await), Ok(()));
    rig.clock.set(node.not_after());
    assert_eq!(code(rig.service.sign(from(&node, empty())).await), Err(Code::Unauthenticated));
    rig.stop().await;
}

#[tokio::test]
async fn a_renewal_keeps_the_identity_and_the_old_certificate_works_on() {
    let rig = Rig::start().await;
    let node = rig.join("host-1").await;
    let key = PendingKey::generate().unwrap();
    let request = from(&node, pb::RenewRequest { csr: key.request().unwrap() });
    let renewed = key.with_chain(&rig.service.renew(request).await.unwrap().into_inner().svid).unwrap();
    assert_eq!(renewed.id(), node.id());
    assert_ne!(renewed.serial(), node.serial());
    // identity 42: the agent may have died before it stored the new one.
    for svid in [&node, &renewed] {
        assert!(rig.sign(svid, &rig.entry_id("web"), csr()).await.is_ok());
    }
    let status = rig.control.handle().status().await.unwrap();
    assert_eq!(status.nodes.len(), 1);
    assert_eq!(status.nodes[0].serial, renewed.serial());
    rig.stop().await;
}

#[tokio::test]
async fn identity_7_the_stream_says_everything_at_once_and_again_when_it_changes() {
    let rig = Rig::start().await;
    let node = rig.join("host-1").await;
    let mut stream = rig.service.subscribe(from(&node, pb::SubscribeRequest {})).await.unwrap().into_inner();
    let first = stream.next().await.unwrap().unwrap();
    assert_eq!((first.entries.len(), first.rotate_after_ms), (2, 20_000));
    assert!(rig.control.handle().status().await.unwrap().nodes[0].connected);

    // A change of another host's entries is not this host's business; the next one is.
    let handle = rig.control.handle();
    handle.replace_entries(vec![entry("web", None), entry("here", Some(vec!["host-1".into()]))]).unwrap();
    handle.replace_entries(vec![entry("web", None)]).unwrap();
    let second = stream.next().await.unwrap().unwrap();
    assert_eq!(second.entries.len(), 1);
    assert!(second.sequence > first.sequence);
    let bad = vec![entry("x", None), Entry { selectors: Selectors::default(), ..entry("y", None) }];
    assert!(handle.replace_entries(bad).is_err());
    assert_eq!(rig.service.0.entries.borrow().by_id.len(), 1, "nothing changed");

    rig.scope.drain();
    assert_eq!(stream.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert!(stream.next().await.is_none());
    drop(stream);
    assert!(!rig.control.handle().status().await.unwrap().nodes[0].connected);
    rig.stop().await;
}

#[tokio::test]
async fn decisions_are_stored_with_their_proven_origin_and_malformed_ones_refused() {
    let rig = Rig::start().await;
    let node = rig.join("host-1").await;
    let good = pb::Decision {
        receipt: "r-1".into(),
        time_ms: 5,
        service: "accounts".into(),
        verdict: "deny".into(),
        address: "127.0.0.1:40100".into(),
        json: r#"{"rule":null}"#.into(),
        reporter: "spiffe://bank.example/service/accounts".into(),
    };
    let decisions = vec![
        good.clone(),
        good.clone(),
        pb::Decision { receipt: String::new(), ..good.clone() },
        pb::Decision { json: r#"{"a":1,"a":2}"#.into(), ..good.clone() },
        pb::Decision { json: "x".repeat(MAX_DECISION_JSON_BYTES + 1), ..good.clone() },
        pb::Decision { reporter: "not an id".into(), ..good.clone() },
        pb::Decision { address: "x".repeat(MAX_DECISION_FIELD_BYTES + 1), ..good.clone() },
    ];
    let request = from(&node, pb::ReportRequest { decisions, dropped: 3 });
    let answer = rig.service.report(request).await.unwrap().into_inner();
    assert_eq!((answer.stored, answer.refused), (1, 5));
    let stored = rig.control.handle().decision("r-1").await.unwrap().unwrap();
    assert_eq!((stored.host.as_str(), stored.reporter.as_str()), ("host-1", good.reporter.as_str()));
    assert_eq!(stored.json, serde_json::json!({"rule": null}));
    let counts = rig.control.handle().status().await.unwrap().counts;
    assert_eq!((counts.decisions_stored, counts.decisions_lost), (1, 3));
    let many = vec![good; MAX_REPORT_BATCH + 1];
    let request = from(&node, pb::ReportRequest { decisions: many, dropped: 0 });
    assert_eq!(rig.service.report(request).await.unwrap_err().code(), Code::InvalidArgument);
    rig.stop().await;
}

/// serde_json reads a map with this only key as the JSON inside its text, if the build has `raw_value`, as
/// the binary's has. Such a record could be written and never read again, and all others with it.
#[tokio::test]
async fn a_record_that_reads_back_as_something_else_does_not_take_the_others_along() {
    let rig = Rig::start().await;
    let node = rig.join("host-1").await;
    let decision = |receipt: &str, json: &str| pb::Decision {
        receipt: receipt.into(),
        json: json.into(),
        reporter: "spiffe://bank.example/service/web".into(),
        ..Default::default()
    };
    let token = "$serde_json::private::RawValue";
    let bad = [
        decision("r-bad", &format!(r#"{{"{token}":"no JSON"}}"#)),
        decision("r-other", &format!(r#"{{"deep":[{{"{token}":"{{\"verdict\":\"allow\"}}"}}]}}"#)),
    ];
    let all = bad.into_iter().chain([decision("r-good", "{}")]).collect();
    rig.service.report(from(&node, pb::ReportRequest { decisions: all, dropped: 0 })).await.unwrap();
    let found = rig.control.handle().decisions(Default::default()).await.expect("one record spoils the list");
    assert!(found.iter().any(|decision| decision.receipt == "r-good"));
    for record in found {
        assert!(!record.json.to_string().contains("verdict"), "the record is another one than was judged");
    }
    // A full store reads the oldest to drop it.
    let many = |round: usize| {
        let decisions = (0..60).map(|n| decision(&format!("r-{round}-{n}"), "{}")).collect();
        from(&node, pb::ReportRequest { decisions, dropped: 0 })
    };
    for round in 0..2 {
        rig.service.report(many(round)).await.expect("nothing can be stored any more");
    }
    rig.stop().await;
}

#[tokio::test]
async fn security_20_an_agent_that_asks_too_much_is_stopped_alone() {
    let rig = Rig::start().await;
    let (wild, calm) = (rig.join("host-1").await, rig.join("host-2").await);
    let item = pb::SignItem { entry_id: "none".into(), csr: Vec::new() };
    let batch = |count| pb::SignRequest { items: vec![item.clone(); count] };
    let too_many = rig.service.sign(from(&wild, batch(MAX_SIGN_BATCH + 1))).await;
    assert_eq!(too_many.unwrap_err().code(), Code::InvalidArgument);
    let mut taken = 0;
    while taken + MAX_SIGN_BATCH <= SIGN_LIMIT.0 as usize {
        rig.service.sign(from(&wild, batch(MAX_SIGN_BATCH))).await.unwrap();
        taken += MAX_SIGN_BATCH;
    }
    let over = rig.service.sign(from(&wild, batch(MAX_SIGN_BATCH))).await;
    assert_eq!(over.unwrap_err().code(), Code::ResourceExhausted);
    assert!(rig.service.sign(from(&calm, batch(MAX_SIGN_BATCH))).await.is_ok());
    rig.stop().await;
}
