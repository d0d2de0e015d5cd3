//! The gRPC side: bounds, deadlines, health.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use identity::Scope;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tonic_health::server::HealthReporter;

use super::ExtAuthz;
use super::listen::Connection;
use super::pb::authorization_server::{Authorization, AuthorizationServer};
use super::pb::{CheckRequest, CheckResponse};

/// Largest question: a mapped body of at most 1 MiB, a head of 64 KiB, a certificate, and room for what
/// Envoy adds.
const MAX_QUESTION_BYTES: usize = 4 * 1024 * 1024;
/// Questions at once over all connections; more are answered 503 at once, so that those under way end in time.
const MAX_QUESTIONS: usize = 1024;
/// Questions at once on one connection, an Envoy's worker.
const MAX_STREAMS: u32 = 256;
/// A call's own metadata: Envoy sends a handful.
const MAX_METADATA_BYTES: u32 = 16 * 1024;
/// A peer that does not answer a ping within as long again is gone.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// Longest that a decision is worked on where Envoy names no deadline. It names one unless told not to.
const MAX_DECISION_TIME: Duration = Duration::from_secs(30);
/// How often readiness and policy are looked at besides when the identity changes: it may also expire.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

struct Service {
    ext_authz: Arc<ExtAuthz>,
    slots: Semaphore,
}

#[tonic::async_trait]
impl Authorization for Service {
    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let Ok(_slot) = self.slots.try_acquire() else {
            let response = self.ext_authz.failed(StatusCode::SERVICE_UNAVAILABLE, "too many questions", "");
            return Ok(Response::new(response));
        };
        Ok(Response::new(self.ext_authz.check(request.into_inner()).await))
    }
}

/// Serves until the scope drains. tonic drops a call whose deadline (`grpc-timeout`) is over: a decision
/// that would come too late is not made.
pub(super) fn serve(
    ext_authz: Arc<ExtAuthz>,
    connections: mpsc::Receiver<io::Result<Connection>>,
    scope: &Scope,
) {
    let (reporter, health) = tonic_health::server::health_reporter();
    scope.spawn_critical("ext_authz health", report(Arc::clone(&ext_authz), reporter, scope.clone()));
    let service = Service { ext_authz, slots: Semaphore::new(MAX_QUESTIONS) };
    let (draining, failing) = (scope.clone(), scope.clone());
    scope.spawn_critical("ext_authz", async move {
        let outcome = tonic::transport::Server::builder()
            .timeout(MAX_DECISION_TIME)
            .max_concurrent_streams(MAX_STREAMS)
            .http2_max_header_list_size(MAX_METADATA_BYTES)
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_INTERVAL))
            .add_service(AuthorizationServer::new(service).max_decoding_message_size(MAX_QUESTION_BYTES))
            .add_service(health)
            .serve_with_incoming_shutdown(ReceiverStream::new(connections), async move {
                draining.draining().await;
            })
            .await;
        if let Err(error) = outcome {
            failing.fail(format!("ext_authz: {error}"));
        }
    });
}

/// Keeps the health service's answer true, serving only while questions can be decided, and says of each
/// policy that comes into force what of it cannot be.
async fn report(ext_authz: Arc<ExtAuthz>, reporter: HealthReporter, scope: Scope) {
    let mut source = ext_authz.shared.source.clone();
    let (mut changes, mut version) = (true, None);
    loop {
        if ext_authz.is_ready() {
            reporter.set_serving::<AuthorizationServer<Service>>().await;
        } else {
            reporter.set_not_serving::<AuthorizationServer<Service>>().await;
        }
        let policy = ext_authz.shared.policy.load_full();
        if version.as_ref() != Some(policy.version()) {
            for problem in super::undecidable(&policy, ext_authz.app.is_some()) {
                tracing::warn!(service = ext_authz.service, "{problem}");
            }
            version = Some(policy.version().clone());
        }
        tokio::select! {
            live = source.changed(), if changes => changes = live,
            () = ext_authz.shared.clock.sleep(LOOK_INTERVAL) => {}
            () = scope.draining() => break,
        }
    }
    reporter.set_not_serving::<AuthorizationServer<Service>>().await;
}
