//! rustls configurations that always speak with the identity of the moment.
//!
//! One configuration lives as long as its listener; certificate, key and bundles are looked up at each
//! handshake, so a rotation needs no reload. TLS 1.3 only. No resumption: a resumed session would skip
//! the checks of a bundle or policy that has changed since.

use std::sync::Arc;

use rustls::client::{ResolvesClientCert, Resumption, WantsClientCert};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName};

use crate::bundle::BundleSet;
use crate::clock::{SharedClock, TlsTime};
use crate::id::SpiffeId;
use crate::source::IdentitySource;
use crate::verify::{AnyWorkload, ExpectServer};

/// ALPN of HTTP/2.
pub const ALPN_H2: &[u8] = b"h2";
/// ALPN of HTTP/1.1.
pub const ALPN_HTTP11: &[u8] = b"http/1.1";

/// Whether a listener insists on a client certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// Every client proves an identity: the rule inside the mesh.
    Required,
    /// A client may come without: a node that joins with a token has no identity yet.
    Optional,
    /// Clients are not asked: a front door for browsers.
    None,
}

/// The configuration of a listener that presents the current SVID.
pub fn server_config(
    source: &IdentitySource,
    client_auth: ClientAuth,
    alpn: &[&[u8]],
    clock: &SharedClock,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let builder = ServerConfig::builder_with_details(provider(), time(clock))
        .with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = match client_auth {
        ClientAuth::Required => builder.with_client_cert_verifier(AnyWorkload::required(source.clone())),
        ClientAuth::Optional => builder.with_client_cert_verifier(AnyWorkload::optional(source.clone())),
        ClientAuth::None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(CurrentSvid(source.clone())));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The configuration of a client that presents the current SVID and accepts only `expected`.
pub fn client_config(
    source: &IdentitySource,
    expected: SpiffeId,
    alpn: &[&[u8]],
    clock: &SharedClock,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let config = verified_by(ExpectServer::new(source.clone(), expected), clock)?
        .with_client_cert_resolver(Arc::new(CurrentSvid(source.clone())));
    Ok(finished(config, alpn))
}

/// The configuration of a client that has no identity yet: it presents nothing, and accepts only
/// `expected` by the bundles that it was given beforehand.
pub fn joining_client_config(
    bundles: BundleSet,
    expected: SpiffeId,
    alpn: &[&[u8]],
    clock: &SharedClock,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let config = verified_by(ExpectServer::pinned(bundles, expected), clock)?.with_no_client_auth();
    Ok(finished(config, alpn))
}

/// The configuration of a client for servers outside the mesh: it presents nothing, and accepts whoever has a
/// certificate of one of `authorities` for the name that is asked for. A certificate that cannot serve as an
/// authority is passed over: a system's file may hold the odd one.
pub fn public_client_config(
    authorities: impl IntoIterator<Item = CertificateDer<'static>>,
    alpn: &[&[u8]],
    clock: &SharedClock,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    let (_added, ignored) = roots.add_parsable_certificates(authorities);
    if ignored > 0 {
        tracing::debug!(ignored, "certificates that cannot serve as authorities");
    }
    let mut config = ClientConfig::builder_with_details(provider(), time(clock))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn verified_by(
    verifier: Arc<ExpectServer>,
    clock: &SharedClock,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, rustls::Error> {
    Ok(ClientConfig::builder_with_details(provider(), time(clock))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

fn finished(mut config: ClientConfig, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Arc::new(config)
}

/// The name that a client hands rustls: identity is the SPIFFE ID, so it stands for nothing and is not sent.
pub fn unnamed_server() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into())
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn time(clock: &SharedClock) -> Arc<TlsTime> {
    Arc::new(TlsTime(Arc::clone(clock)))
}

/// Presents whatever SVID is current at the moment of the handshake.
#[derive(Debug)]
struct CurrentSvid(IdentitySource);

impl CurrentSvid {
    fn certified(&self) -> Option<Arc<CertifiedKey>> {
        self.0.current().map(|identity| Arc::clone(identity.svid.certified_key()))
    }
}

impl ResolvesServerCert for CurrentSvid {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }
}

impl ResolvesClientCert for CurrentSvid {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }

    fn has_certs(&self) -> bool {
        self.0.current().is_some()
    }
}
