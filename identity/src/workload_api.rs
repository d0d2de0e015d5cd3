//! The SPIFFE Workload API: generated types, and the client that keeps an [`IdentitySource`] current.
//!
//! The standard's contract is followed on both ends: the metadata `workload.spiffe.io: true` on every
//! call, a Unix socket without TLS, and streams whose every message is the full state.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::UnixStream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use zeroize::Zeroizing;

use crate::bundle::{BundleError, BundleSet, TrustBundle};
use crate::clock::SharedClock;
use crate::id::{IdError, SpiffeId, TrustDomain};
use crate::scope::Scope;
use crate::source::{IdentityPublisher, IdentitySource};
use crate::svid::{SvidError, X509Svid};

/// Types generated from `proto/workload.proto`.
#[expect(missing_docs, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("_");
}

/// The metadata key that keeps a browser or a confused proxy from calling the socket (WE §6).
pub const SECURITY_HEADER: &str = "workload.spiffe.io";

/// What the agent answers a caller for whom nothing is registered (WE §6).
pub const PERMISSION_DENIED: tonic::Code = tonic::Code::PermissionDenied;

/// First and longest wait between two attempts to reach the agent.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Why an endpoint could not be used, or its answer not be believed.
#[derive(Debug, Error)]
pub enum WorkloadApiError {
    /// The address is not one that the standard allows.
    #[error("not a Workload API address (unix:///absolute/path): {0}")]
    Address(String),
    /// The agent answered with an error, or could not be reached.
    #[error("the agent refused or could not be reached: {0}")]
    Status(#[from] Box<tonic::Status>),
    /// The response holds no identity.
    #[error("the agent gave no identity")]
    NoIdentity,
    /// The agent closed the stream.
    #[error("the agent closed the stream")]
    Closed,
    /// An identity in the response is malformed.
    #[error("the agent gave a malformed identity: {0}")]
    Svid(#[from] SvidError),
    /// A bundle in the response is malformed.
    #[error("the agent gave a malformed bundle: {0}")]
    Bundle(#[from] BundleError),
    /// An ID in the response is malformed.
    #[error("the agent gave a malformed SPIFFE ID: {0}")]
    Id(#[from] IdError),
}

/// Parses `unix:///absolute/path`, the form of `SPIFFE_ENDPOINT_SOCKET` (WE §4); a bare absolute path is
/// taken too.
pub fn parse_address(address: &str) -> Result<PathBuf, WorkloadApiError> {
    let refuse = || WorkloadApiError::Address(address.to_owned());
    let path = match address.strip_prefix("unix:") {
        // An authority on a unix address is refused: exactly `unix:///…` or `unix:/…`.
        Some(rest) => rest.strip_prefix("//").unwrap_or(rest),
        None => address,
    };
    if path.starts_with('/') && !path.contains(['?', '#']) { Ok(PathBuf::from(path)) } else { Err(refuse()) }
}

/// A gRPC channel to the agent's Unix socket; connects at the first call and again after a loss.
pub fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    // The URI is required by the API and never used: the connector below decides.
    Endpoint::from_static("http://agent.invalid")
        .connect_timeout(Duration::from_secs(5))
        .connect_with_connector_lazy(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
}

/// A request that carries the security header.
pub fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert(SECURITY_HEADER, MetadataValue::from_static("true"));
    request
}

/// Keeps a source fed from the agent at `socket` for as long as `scope` lives.
///
/// The agent may be absent at the start or go away: the last identity stays in force until it expires,
/// and the stream is opened again with a growing wait. When the agent says that the workload has no
/// identity any more (`PermissionDenied`), it is withdrawn at once.
pub fn watch(socket: PathBuf, clock: SharedClock, scope: &Scope) -> IdentitySource {
    let (publisher, source) = IdentitySource::channel();
    let draining = scope.clone();
    scope.spawn_critical("identity watch", async move {
        let mut wait = BACKOFF.0;
        while !draining.is_draining() {
            let started = clock.now();
            let outcome = tokio::select! {
                outcome = follow(&socket, &publisher) => outcome,
                () = draining.draining() => return,
            };
            let error = outcome.err().unwrap_or(WorkloadApiError::Closed);
            if matches!(&error, WorkloadApiError::Status(status) if status.code() == tonic::Code::PermissionDenied) {
                publisher.withdraw();
            }
            tracing::warn!(%error, retry_in = ?wait, "no stream from the agent");
            tokio::select! {
                () = clock.sleep(wait) => {}
                () = draining.draining() => return,
            }
            let lived = clock.now().saturating_sub(started) > BACKOFF.1 * 2;
            wait = if lived { BACKOFF.0 } else { (wait * 2).min(BACKOFF.1) };
        }
    });
    source
}

async fn follow(socket: &Path, publisher: &IdentityPublisher) -> Result<(), WorkloadApiError> {
    let mut client = proto::spiffe_workload_api_client::SpiffeWorkloadApiClient::new(channel(socket));
    let mut stream =
        client.fetch_x509svid(request(proto::X509svidRequest {})).await.map_err(Box::new)?.into_inner();
    while let Some(message) = stream.next().await {
        let (svid, bundles) = parse(message.map_err(Box::new)?)?;
        tracing::info!(id = %svid.id(), serial = svid.serial(), "identity received");
        publisher.publish(svid, Arc::new(bundles));
    }
    Ok(())
}

/// Asks for the identity once: for short-lived commands.
pub async fn fetch_once(socket: &Path) -> Result<(X509Svid, BundleSet), WorkloadApiError> {
    let mut client = proto::spiffe_workload_api_client::SpiffeWorkloadApiClient::new(channel(socket));
    let mut stream =
        client.fetch_x509svid(request(proto::X509svidRequest {})).await.map_err(Box::new)?.into_inner();
    let message = stream.next().await.ok_or(WorkloadApiError::Closed)?.map_err(Box::new)?;
    parse(message)
}

/// Takes a response apart; the first identity is the default one (WA §5.3).
fn parse(message: proto::X509svidResponse) -> Result<(X509Svid, BundleSet), WorkloadApiError> {
    let first = message.svids.into_iter().next().ok_or(WorkloadApiError::NoIdentity)?;
    let named = SpiffeId::new(&first.spiffe_id)?;
    let svid = X509Svid::from_concatenated(&first.x509_svid, Zeroizing::new(first.x509_svid_key))?;
    if *svid.id() != named {
        return Err(WorkloadApiError::NoIdentity);
    }
    let own = TrustBundle::from_concatenated(named.trust_domain().clone(), &first.bundle)?;
    let federated = message
        .federated_bundles
        .into_iter()
        .map(|(id, der)| {
            let name = id.strip_prefix("spiffe://").unwrap_or(&id);
            Ok(TrustBundle::from_concatenated(TrustDomain::new(name)?, &der)?)
        })
        .collect::<Result<Vec<_>, WorkloadApiError>>()?;
    // The own bundle goes last: a federated entry can never replace it.
    Ok((svid, BundleSet::new(federated.into_iter().chain([own]))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_4_only_unix_addresses_without_authority_are_taken() {
        assert_eq!(parse_address("unix:///run/a.sock").unwrap(), PathBuf::from("/run/a.sock"));
        assert_eq!(parse_address("unix:/run/a.sock").unwrap(), PathBuf::from("/run/a.sock"));
        assert_eq!(parse_address("/run/a.sock").unwrap(), PathBuf::from("/run/a.sock"));
        for bad in ["unix://host/run/a.sock", "unix:a.sock", "tcp://127.0.0.1:1", "", "unix:///a?b"] {
            assert!(parse_address(bad).is_err(), "{bad}");
        }
    }
}
