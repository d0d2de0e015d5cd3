//! `palisade vault`: secrets for services, which log in with their identity.

use std::sync::Arc;
use std::time::Duration;

use secrets::{Vault, VaultConfig};

use crate::Global;
use crate::credentials::Credential;
use crate::decisions;
use crate::failure::{Exit, Failure};
use crate::listen;
use crate::serve;
use crate::workload::{Workload, not_started};

/// How long requests under way may go on once the vault is asked to end: reads and writes are short.
const DRAIN: Duration = Duration::from_secs(10);

pub(crate) fn run(global: &Global) -> Result<Exit, Failure> {
    let workload = Workload::begin(global)?;
    let vault = workload.mesh.vault.as_ref().ok_or_else(|| workload.no_section("vault"))?;
    let policies = workload.policies()?;
    let config = VaultConfig {
        state: vault.state.clone(),
        listen: listen::tcp("the vault", "[vault] listen", vault.listen)?,
        operator: Some(listen::tcp("the vault's operator API", "[vault] operator", vault.operator)?),
        audit: vault.audit.clone(),
        unseal_key: workload.credentials.optional_text(Credential::VaultUnsealKey)?,
    };
    serve::run("vault", DRAIN, async |scope| {
        let source = workload.identity(&scope);
        let recorder = decisions::recorder(&workload, &scope);
        let (clock, random) = (Arc::clone(&workload.clock), Arc::clone(&workload.random));
        Vault::start(config, source, policies, recorder, clock, random, &scope)
            .await
            .map_err(|error| not_started("the vault", &error))
    })
}
