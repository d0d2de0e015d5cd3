//! web
use std::future::Future;
use std::net::SocketAddr;
use crate::BankError;
/// What `web` is given.
#[derive(Debug)]
pub struct WebConfig {
    /// Where it serves; only its sidecar should reach it.
    pub listener: std::net::TcpListener,
    /// The outbound port of its sidecar for `accounts`.
    pub accounts: SocketAddr,
    /// The outbound port of its sidecar for `payments`.
    pub payments: SocketAddr,
}
/// Serves until `shutdown` completes.
pub async fn run(config: WebConfig, shutdown: impl Future<Output = ()>) -> Result<(), BankError> {
    crate::serve::run(config.listener, axum::Router::new(), shutdown).await
}
