//! A small HTTPS client for talking to issuers: bounded, no redirects, no connection kept.
//!
//! Discovery, JWKS and token requests are rare (the answers are cached), so every request has its own
//! connection: nothing to pool, nothing stale after a rotation of trust.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, Either, select};
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use identity::clock::{SharedClock, TlsTime};
use identity::pem::PemError;
use identity::{IdentitySource, SpiffeId};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::BoxError;

/// Largest answer read. Discovery documents and key sets are a few KiB.
pub const MAX_ANSWER_BYTES: usize = 256 * 1024;
/// From the first packet to the last byte of the answer.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// By which authorities a server's certificate is verified. Its host name must fit in any case.
#[derive(Debug, Clone)]
pub enum Trust {
    /// The mesh's own authorities, as they rotate.
    Mesh {
        /// Where the bundle of the moment comes from.
        source: IdentitySource,
        /// If given, the server must also prove this SPIFFE ID: a stolen certificate of another
        /// workload for the same host name is then not enough.
        expected: Option<SpiffeId>,
    },
    /// Fixed authorities.
    Roots(Arc<[CertificateDer<'static>]>),
}

impl Trust {
    /// Authorities from a PEM file, such as the system's `/etc/ssl/certs/ca-certificates.crt`.
    pub fn pem_file(path: &Path) -> Result<Self, PemError> {
        identity::pem::certificates(path).map(|roots| Self::Roots(roots.into()))
    }

    fn roots(&self, now: UnixTime) -> Result<RootCertStore, rustls::Error> {
        let mut store = RootCertStore::empty();
        match self {
            Self::Roots(roots) => {
                // A system file may hold the odd certificate that webpki cannot use: the rest still serve.
                let (_added, ignored) = store.add_parsable_certificates(roots.iter().cloned());
                if ignored > 0 {
                    tracing::debug!(ignored, "certificates that cannot serve as authorities");
                }
            }
            Self::Mesh { source, .. } => {
                let identity = source.current().ok_or_else(|| general("no trust bundle has arrived yet"))?;
                // Only our own trust domain: another one's authorities vouch for its workloads, not for
                // host names of ours.
                let domain = identity.svid.id().trust_domain();
                let bundle = identity.bundles.get(domain).ok_or_else(|| general("no bundle of our own"))?;
                let since_epoch = Duration::from_secs(now.as_secs());
                for authority in bundle.authorities() {
                    if identity::leaf::check_authority(authority, domain, since_epoch).is_ok() {
                        store.add(authority.clone())?;
                    }
                }
            }
        }
        Ok(store)
    }
}

fn general(text: &str) -> rustls::Error {
    rustls::Error::General(text.to_owned())
}

/// Why a request got no usable answer.
#[derive(Debug, Error)]
pub enum HttpsError {
    /// Not an https URL with a host.
    #[error("not an https URL")]
    Target,
    /// TCP or TLS failed: nothing was sent.
    #[error("cannot connect: {0}")]
    Connect(#[source] BoxError),
    /// The connection broke after the request may have been sent.
    #[error("the connection broke: {0}")]
    Broken(#[source] BoxError),
    /// Over [`MAX_ANSWER_BYTES`].
    #[error("the answer is larger than {MAX_ANSWER_BYTES} bytes")]
    TooLarge,
    /// Over [`TIMEOUT`].
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    Timeout,
}

/// Sends requests to issuers. A trait, so that a test or simulation can stand in for the network.
pub trait HttpClient: Send + Sync + std::fmt::Debug {
    /// One request with an absolute https URI. Redirects are answers like any other: never followed.
    fn send(&self, request: Request<Bytes>) -> BoxFuture<'_, Result<Response<Bytes>, HttpsError>>;
}

/// The real client.
pub struct HttpsClient {
    tls: TlsConnector,
    clock: SharedClock,
}

impl std::fmt::Debug for HttpsClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HttpsClient")
    }
}

impl HttpsClient {
    /// A client that trusts `trust`; TLS 1.3 only.
    pub fn new(trust: Trust, clock: &SharedClock) -> Result<Arc<Self>, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = Arc::new(Following { trust, provider: Arc::clone(&provider) });
        let mut config = ClientConfig::builder_with_details(provider, Arc::new(TlsTime(Arc::clone(clock))))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        config.alpn_protocols = vec![identity::tls::ALPN_HTTP11.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(Self { tls: TlsConnector::from(Arc::new(config)), clock: Arc::clone(clock) }))
    }

    async fn exchange(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpsError> {
        let uri = request.uri().clone();
        let authority = uri.authority().ok_or(HttpsError::Target)?;
        if uri.scheme() != Some(&http::uri::Scheme::HTTPS) {
            return Err(HttpsError::Target);
        }
        // `host()` of an IPv6 literal keeps its brackets; name and address parsers want them off.
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|_| HttpsError::Target)?;
        let connect = |error: std::io::Error| HttpsError::Connect(error.into());
        let stream =
            TcpStream::connect((host, authority.port_u16().unwrap_or(443))).await.map_err(connect)?;
        let stream = self.tls.connect(name, stream).await.map_err(connect)?;

        let host_value = HeaderValue::try_from(authority.as_str()).map_err(|_| HttpsError::Target)?;
        request.headers_mut().insert(header::HOST, host_value);
        *request.uri_mut() = uri
            .path_and_query()
            .and_then(|target| http::Uri::try_from(target.as_str()).ok())
            .ok_or(HttpsError::Target)?;
        let broken = |error: hyper::Error| HttpsError::Broken(error.into());
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| HttpsError::Connect(error.into()))?;
        let answer = async move {
            let response = sender.send_request(request.map(Full::new)).await.map_err(broken)?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() { HttpsError::TooLarge } else { HttpsError::Broken(error) }
            })?;
            Ok(Response::from_parts(parts, body.to_bytes()))
        };
        // The connection is driven by the same future: it can neither outlive the request nor leak.
        match select(pin!(answer), pin!(connection)).await {
            Either::Left((answer, _connection)) => answer,
            Either::Right((_ended, answer)) => answer.await,
        }
    }
}

impl HttpClient for HttpsClient {
    fn send(&self, request: Request<Bytes>) -> BoxFuture<'_, Result<Response<Bytes>, HttpsError>> {
        Box::pin(async move {
            tokio::select! {
                answer = self.exchange(request) => answer,
                () = self.clock.sleep(TIMEOUT) => Err(HttpsError::Timeout),
            }
        })
    }
}

/// Ordinary server verification (path, validity, host name) against the authorities of the moment.
#[derive(Debug)]
struct Following {
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Following {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let roots = Arc::new(self.trust.roots(now)?);
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&self.provider))
            .build()
            .map_err(|error| general(&error.to_string()))?;
        let verified =
            verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        if let Trust::Mesh { expected: Some(expected), .. } = &self.trust {
            let found = identity::leaf::parse(end_entity).map(|leaf| leaf.id);
            if found.as_ref() != Ok(expected) {
                return Err(CertificateError::ApplicationVerificationFailure.into());
            }
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        identity::verify::refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        identity::verify::verify_tls13(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        identity::verify::signature_schemes()
    }
}
