//! How the cast calls: a workload over mTLS with whatever headers it likes, a script over HTTPS.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderValue, Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use identity::clock::SharedClock;
use identity::txn::{self, RequestBinding, User};
use identity::{BundleSet, IdentitySource, Scope, SpiffeId, X509Svid};
use rustls_pki_types::ServerName;
use sidecar::upstream::{Upstream, UpstreamConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Nothing in the demo takes longer than this to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What came back.
#[derive(Debug)]
pub(in crate::demo) struct Answer {
    /// HTTP status; 0 if the connection was refused before HTTP.
    pub(in crate::demo) status: u16,
    /// The body.
    pub(in crate::demo) body: Bytes,
}

impl Answer {
    /// The receipt in a refusal's body.
    pub(in crate::demo) fn receipt(&self) -> Option<String> {
        let value: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        Some(value.get("receipt")?.as_str()?.to_owned())
    }

    /// Whether it was refused: a client error with a receipt.
    pub(in crate::demo) fn refused(&self) -> bool {
        matches!(self.status, 400 | 401 | 403) && self.receipt().is_some()
    }

    /// Whether it succeeded.
    pub(in crate::demo) fn ok(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// One request, as an attacker would write it.
#[derive(Debug, Clone)]
pub(in crate::demo) struct Call {
    /// Method.
    pub(in crate::demo) method: Method,
    /// Path and query, sent as they stand.
    pub(in crate::demo) target: String,
    /// Headers.
    pub(in crate::demo) headers: Vec<(&'static str, String)>,
    /// Body.
    pub(in crate::demo) body: String,
}

impl Call {
    /// GET `target`.
    pub(in crate::demo) fn get(target: impl Into<String>) -> Self {
        Self { method: Method::GET, target: target.into(), headers: Vec::new(), body: String::new() }
    }

    /// POST JSON to `target`.
    pub(in crate::demo) fn post(target: impl Into<String>, body: impl Into<String>) -> Self {
        let headers = vec![("content-type", "application/json".to_owned())];
        Self { method: Method::POST, target: target.into(), headers, body: body.into() }
    }

    /// With a header more.
    pub(in crate::demo) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// With a bearer token.
    pub(in crate::demo) fn bearer(self, token: &str) -> Self {
        self.with("authorization", format!("Bearer {token}"))
    }

    /// With a transaction token.
    pub(in crate::demo) fn txn(self, token: &str) -> Self {
        self.with(txn::HEADER, token)
    }

    /// What a transaction token for this call is bound to.
    pub(in crate::demo) fn binding(&self) -> RequestBinding {
        RequestBinding::new(self.method.as_str(), &self.target)
    }

    fn request<B>(&self, body: B) -> anyhow::Result<Request<B>> {
        let mut request = Request::builder().method(&self.method).uri(&self.target).body(body)?;
        for (name, value) in &self.headers {
            request.headers_mut().append(*name, HeaderValue::from_str(value)?);
        }
        Ok(request)
    }
}

/// A workload whose identity the attacker (or its rightful owner) holds.
#[derive(Debug, Clone)]
pub(in crate::demo) struct Workload {
    /// Its certificate and key.
    pub(in crate::demo) svid: X509Svid,
    /// Whom it can verify.
    pub(in crate::demo) bundles: BundleSet,
}

impl Workload {
    /// Calls `to` at `address` over mTLS as this workload.
    pub(in crate::demo) async fn call(
        &self,
        to: &SpiffeId,
        address: SocketAddr,
        call: &Call,
        clock: &SharedClock,
    ) -> anyhow::Result<Answer> {
        let scope = Scope::new();
        let source = IdentitySource::fixed(self.svid.clone(), self.bundles.clone());
        let name = to.path().rsplit('/').next().unwrap_or("service").to_owned();
        let config = UpstreamConfig {
            service: name,
            id: to.clone(),
            endpoints: vec![address].into(),
            response_timeout: ANSWER_TIMEOUT,
        };
        let upstream = Upstream::new(config, source, clock.clone(), &scope)?;
        let body = if call.body.is_empty() { sidecar::empty() } else { sidecar::full(call.body.clone()) };
        let response = upstream.send(call.request(body)?).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.map_err(anyhow::Error::from_boxed)?.to_bytes();
        drop(upstream);
        scope.drain();
        Ok(Answer { status, body })
    }

    /// A transaction token minted as this workload, for `user`, to be held by `to`.
    pub(in crate::demo) fn mint(
        &self,
        user: &User,
        to: &SpiffeId,
        binding: RequestBinding,
        at: Duration,
    ) -> anyhow::Result<String> {
        Ok(txn::mint(&self.svid, user, to, binding, txn::MAX_LIFETIME, at)?)
    }
}

/// Opens a TCP connection, tries a TLS handshake with `config`, and says from which local address.
/// `Err` is the handshake's failure, which is what the caller hopes for.
pub(in crate::demo) async fn handshake(
    address: SocketAddr,
    config: Arc<rustls::ClientConfig>,
) -> anyhow::Result<(SocketAddr, Result<(), String>)> {
    let stream = TcpStream::connect(address).await?;
    let local = stream.local_addr()?;
    let connector = tokio_rustls::TlsConnector::from(config);
    let outcome = async {
        let mut stream = connector.connect(identity::tls::unnamed_server(), stream).await?;
        // In TLS 1.3 the client is done before the server has judged its certificate: only an answer tells.
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
        let mut first = [0; 1];
        match stream.read(&mut first).await? {
            0 => Err(std::io::Error::other("closed without an answer")),
            _ => Ok(()),
        }
    };
    let outcome = tokio::time::timeout(ANSWER_TIMEOUT, outcome).await.context("no answer to a handshake")?;
    Ok((local, outcome.map_err(|error| error.to_string())))
}

/// Speaks plain HTTP to a port, and says from which local address and what came back.
pub(in crate::demo) async fn plain_text(address: SocketAddr) -> anyhow::Result<(SocketAddr, Vec<u8>)> {
    let mut stream = TcpStream::connect(address).await?;
    let local = stream.local_addr()?;
    let exchange = async {
        stream
            .write_all(b"GET /accounts/17 HTTP/1.1\r\nhost: accounts\r\nx-forwarded-user: alice\r\n\r\n")
            .await?;
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer).await {
            // A reset is a refusal too.
            Ok(_) | Err(_) => Ok::<_, std::io::Error>(answer),
        }
    };
    let answer =
        tokio::time::timeout(ANSWER_TIMEOUT, exchange).await.context("no answer to plain text")??;
    Ok((local, answer))
}

/// An HTTPS client that trusts the mesh's authorities, as a browser with the CA installed would.
#[derive(Debug, Clone)]
pub(in crate::demo) struct Https {
    config: Arc<rustls::ClientConfig>,
    address: SocketAddr,
}

impl Https {
    /// A client of the server at `address`, verified by its IP name against `bundles`.
    pub(in crate::demo) fn new(address: SocketAddr, bundles: &BundleSet) -> anyhow::Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        for bundle in bundles.iter() {
            for der in bundle.authorities() {
                roots.add(der.clone())?;
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![identity::tls::ALPN_HTTP11.to_vec()];
        Ok(Self { config: Arc::new(config), address })
    }

    /// Sends one request, its target exactly as written.
    pub(in crate::demo) async fn call(&self, call: &Call) -> anyhow::Result<Answer> {
        let exchange = async {
            let stream = TcpStream::connect(self.address).await?;
            let name = ServerName::from(self.address.ip());
            let stream =
                tokio_rustls::TlsConnector::from(Arc::clone(&self.config)).connect(name, stream).await?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            let mut request = call.request(Full::new(Bytes::from(call.body.clone())))?;
            request.headers_mut().insert("host", HeaderValue::from_str(&self.address.to_string())?);
            let exchange = async {
                let response = sender.send_request(request).await?;
                let status = response.status().as_u16();
                let body = response.into_body().collect().await?.to_bytes();
                Ok::<_, anyhow::Error>(Answer { status, body })
            };
            tokio::pin!(exchange);
            tokio::select! {
                answer = &mut exchange => answer,
                // A connection may end with its answer: that answer is still to be read.
                _ended = connection => exchange.await,
            }
        };
        tokio::time::timeout(ANSWER_TIMEOUT, exchange).await.context("no answer over HTTPS")?
    }
}
