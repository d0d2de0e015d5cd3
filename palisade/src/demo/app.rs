//! `palisade demo app NAME`: one of the bank's apps, as a process of its own.
//!
//! It is the `bank` crate and nothing else: no identity, no token, no policy. What it is told of the mesh is
//! where its sidecar listens.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bank::accounts::AccountsConfig;
use bank::payments::PaymentsConfig;
use bank::web::WebConfig;

use crate::failure::{Exit, Failure};
use crate::listen;
use crate::mesh::{Callee, Mesh, Service};
use crate::serve::stop_signal;

/// How often accounts compares its books with payments'.
const RECONCILE_EVERY: Duration = Duration::from_secs(10);

/// Runs an app until it is asked to end.
pub(super) fn run(mesh: &Mesh, name: &str, data: &Path) -> Result<Exit, Failure> {
    let unknown = || Failure::usage(format!("`{name}` is no app of the demo: web, accounts or payments"));
    let service = mesh.service.iter().find(|(service, _)| service.as_str() == name);
    let (_, service) = service.ok_or_else(unknown)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    runtime.block_on(async {
        let listener = listen::tcp(name, &format!("[service.{name}] app"), service.app)?;
        let stop = stop_signal()?;
        let ended = match name {
            "web" => {
                let config = WebConfig {
                    listener,
                    accounts: call(service, "accounts")?,
                    payments: call(service, "payments")?,
                };
                bank::web::run(config, stop).await
            }
            "accounts" => {
                let config = AccountsConfig {
                    listener,
                    state: data.to_owned(),
                    vault: call(service, "vault")?,
                    payments: call(service, "payments")?,
                    reconcile_every: RECONCILE_EVERY,
                };
                bank::accounts::run(config, stop).await
            }
            "payments" => {
                let config =
                    PaymentsConfig { listener, state: data.to_owned(), accounts: call(service, "accounts")? };
                bank::payments::run(config, stop).await
            }
            _ => return Err(unknown()),
        };
        ended.map(|()| Exit::Ok).map_err(|error| Failure::new(format!("{name} cannot work")).because(&error))
    })
}

/// Where the sidecar takes the app's calls to `to`.
fn call(service: &Service, to: &str) -> Result<SocketAddr, Failure> {
    let found = service.calls.iter().find(|(callee, _)| match callee {
        Callee::Service(name) => name.as_str() == to,
        Callee::Vault => to == "vault",
    });
    let (_, address) =
        found.ok_or_else(|| Failure::invalid(format!("mesh.toml lets this app make no calls to {to}")))?;
    Ok(*address)
}
