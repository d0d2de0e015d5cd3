//! Attacks on identity itself: none, a foreign one, one that has ended, one that is not yours to fetch.

use std::fs::Permissions;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use identity::tls::ALPN_HTTP11;
use identity::{BundleSet, IdentitySource, TrustBundle, TrustDomain, X509Svid};
use rustls_pki_types::UnixTime;
use zeroize::Zeroizing;

use super::Outcome;
use super::calls::{self, Call};
use super::stage::{Connection, Stage};

pub(super) async fn run(stage: &Stage) -> anyhow::Result<Vec<Outcome>> {
    let accounts = stage.inbound("accounts")?;
    let twin = stage.as_web_for_alice("accounts", Call::get("/accounts/17")).await?.ok();
    Ok(vec![
        plain_text(stage, accounts, twin).await?,
        no_identity(stage, accounts, twin).await?,
        foreign_trust_domain(stage, accounts, twin).await?,
        expired_svid(stage, accounts, twin).await?,
        another_uid(stage).await?,
    ])
}

const BESIDE: &str = "web connects with its own SVID and reads alice's account for her";

async fn plain_text(stage: &Stage, accounts: SocketAddr, twin: bool) -> anyhow::Result<Outcome> {
    let (local, answer) = calls::plain_text(accounts).await?;
    let outcome = if answer.is_empty() { Err("closed without an answer".to_owned()) } else { Ok(()) };
    stage
        .judge_connection(Connection {
            name: "plain-text",
            tried: "plain HTTP to accounts' sidecar".into(),
            local,
            outcome,
            expected_rule: "tls.plain_text",
            twin: BESIDE,
            twin_ok: twin,
        })
        .await
}

async fn no_identity(stage: &Stage, accounts: SocketAddr, twin: bool) -> anyhow::Result<Outcome> {
    let (local, outcome) = calls::handshake(accounts, anonymous()?).await?;
    stage
        .judge_connection(Connection {
            name: "no-identity",
            tried: "a process without an SVID connects to accounts' sidecar over TLS".into(),
            local,
            outcome,
            expected_rule: "tls.no_client_certificate",
            twin: BESIDE,
            twin_ok: twin,
        })
        .await
}

async fn foreign_trust_domain(stage: &Stage, accounts: SocketAddr, twin: bool) -> anyhow::Result<Outcome> {
    let svid = foreign_svid("evil.example", "/service/web", stage.clock.unix_time())?;
    let config = as_client(stage, svid)?;
    let (local, outcome) = calls::handshake(accounts, config).await?;
    stage
        .judge_connection(Connection {
            name: "foreign-trust-domain",
            tried: "an SVID for spiffe://evil.example/service/web, signed by evil.example's own authority"
                .into(),
            local,
            outcome,
            expected_rule: "tls.unknown_trust_domain",
            twin: BESIDE,
            twin_ok: twin,
        })
        .await
}

/// The demo registers a workload whose SVID lives seconds: this waits for one to end, then presents it.
async fn expired_svid(stage: &Stage, accounts: SocketAddr, twin: bool) -> anyhow::Result<Outcome> {
    let ends = stage.short_lived.svid.not_after() + Duration::from_secs(1);
    stage.clock.sleep(ends.saturating_sub(stage.now())).await;
    let config = as_client(stage, stage.short_lived.svid.clone())?;
    let (local, outcome) = calls::handshake(accounts, config).await?;
    stage
        .judge_connection(Connection {
            name: "expired-svid",
            tried: format!("a genuine SVID of {}, a second after its end", stage.short_lived.svid.id()),
            local,
            outcome,
            expected_rule: "tls.expired_svid",
            twin: BESIDE,
            twin_ok: twin,
        })
        .await
}

/// Knowing where the agent's socket is gives nobody an identity.
async fn another_uid(stage: &Stage) -> anyhow::Result<Outcome> {
    let folder = tempfile::Builder::new().prefix("palisade-attack").tempdir()?;
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    let copy = folder.path().join("web-sidecar");
    std::fs::copy("/proc/self/exe", &copy)?;
    std::fs::set_permissions(&copy, Permissions::from_mode(0o755))?;
    // Becoming another user takes root; without it the copied program is stranger enough.
    const NOBODY: u32 = 65534;
    let root = rustix::process::geteuid().is_root();
    let tried = if root {
        format!("a copy of web's sidecar, run by uid {NOBODY}, asks at web's own agent socket for web's SVID")
    } else {
        "a copy of web's sidecar in another folder asks at web's own agent socket for web's SVID (becoming \
         another uid as well takes root)"
            .to_owned()
    };
    let attack = fetch(&copy, &stage.agent_socket, root.then_some(NOBODY))?;
    let twin = fetch(&stage.program("web-sidecar"), &stage.agent_socket, None)?;
    stage.judge_fetch("socket-path-from-another-uid", tried, attack, twin).await
}

/// Runs `PROGRAM id fetch` and returns what it said.
fn fetch(program: &Path, socket: &Path, uid: Option<u32>) -> anyhow::Result<std::process::Output> {
    let mut command = Command::new(program);
    command.args(["id", "fetch", "--socket"]).arg(socket).current_dir("/").env_clear();
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    command.output().with_context(|| format!("cannot run {}", program.display()))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A client that verifies nobody and presents nothing: what `openssl s_client` is.
fn anonymous() -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(danger::VerifiesNobody))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_HTTP11.to_vec()];
    Ok(Arc::new(config))
}

/// A client that presents `svid` to accounts and would trust the mesh's answer.
fn as_client(stage: &Stage, svid: X509Svid) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let source = IdentitySource::fixed(svid, stage.web.bundles.clone());
    Ok(identity::tls::client_config(&source, stage.id("accounts")?, &[ALPN_HTTP11], &stage.clock)?)
}

/// An SVID that keeps every rule of the standard, under an authority nobody here knows.
fn foreign_svid(trust_domain: &str, path: &str, now: UnixTime) -> anyhow::Result<X509Svid> {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, ExtendedKeyUsagePurpose,
        IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
    };
    let named = |uri: String, name: &str| -> anyhow::Result<CertificateParams> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        Ok(params)
    };
    let mut authority = named(format!("spiffe://{trust_domain}"), "evil authority")?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)?;
    let mut leaf = named(format!("spiffe://{trust_domain}{path}"), "evil workload")?;
    leaf.is_ca = IsCa::ExplicitNoCa;
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = leaf.signed_by(&key, &authority)?;
    // It would verify at home: what is wrong with it is only whom it names.
    let bundle = TrustBundle::new(TrustDomain::new(trust_domain)?, vec![authority.der().clone()])?;
    identity::verify::verify_chain(certificate.der(), &[], &BundleSet::new([bundle]), now)?;
    Ok(X509Svid::new(vec![certificate.der().clone()], Zeroizing::new(key.serialize_der()))?)
}

mod danger {
    //! An attacker's client has no reason to verify its victim.

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};
    use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

    #[derive(Debug)]
    pub(super) struct VerifiesNobody;

    impl ServerCertVerifier for VerifiesNobody {
        fn verify_server_cert(
            &self,
            _end_entity: &CertificateDer<'_>,
            _intermediates: &[CertificateDer<'_>],
            _server_name: &ServerName<'_>,
            _ocsp_response: &[u8],
            _now: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![
                SignatureScheme::ECDSA_NISTP256_SHA256,
                SignatureScheme::ED25519,
                SignatureScheme::RSA_PSS_SHA256,
            ]
        }
    }
}
