//! `palisade vault`: secrets for services, which log in with their identity.

use std::sync::Arc;
use std::time::Duration;

use policy::InForce;
use secrets::{POLICY_SERVICE, Vault, VaultConfig, VaultError};

use crate::Global;
use crate::credentials::Credential;
use crate::decisions;
use crate::failure::{Exit, Failure};
use crate::listen;
use crate::mesh::Own;
use crate::policies;
use crate::serve::{self, Started};
use crate::workload::{Workload, not_started};

/// How long requests under way may go on once the vault is asked to end: reads and writes are short.
const DRAIN: Duration = Duration::from_secs(10);

pub(crate) fn run(global: &Global) -> Result<Exit, Failure> {
    let workload = Workload::begin(global)?;
    let vault = workload.mesh.vault.as_ref().ok_or_else(|| workload.no_section("vault"))?;
    let at_start = policies::at_start(&workload, POLICY_SERVICE)?;
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
        let in_force = InForce::from(Arc::clone(&at_start));
        let followed = policies::follow(&workload, POLICY_SERVICE, &source, at_start, None, &scope);
        let id = workload.mesh.own_id(Own::Vault);
        let ready = workload.identified(source.clone(), id, policies::awaited(&followed));
        let vault = Vault::start(config, source, in_force.clone(), recorder, clock, random, &scope)
            .await
            .map_err(|error| refused(&error))?;
        let (replaced, mesh) = (in_force.clone(), workload.mesh.clone());
        policies::apply(followed, move |policy| replaced.replace(policy), |_stale| {}, &scope);
        let reload = move || policies::reload(&mesh, POLICY_SERVICE, |policy| in_force.replace(policy));
        Ok(Started::new(vault).ready_when(ready).reloaded_by(reload))
    })
}

fn refused(error: &VaultError) -> Failure {
    let failure = not_started("the vault", error);
    let credential = Credential::VaultUnsealKey.file_name();
    match error {
        // Starting it again would read the same key.
        VaultError::Unseal(_) => Failure { exit: Exit::Invalid, ..failure }.hint(format!(
            "put the key that this vault was initialized with into the credential {credential}, or take it away \
             and unseal by hand"
        )),
        VaultError::UnsealShares { .. } => Failure { exit: Exit::Invalid, ..failure }
            .hint(format!("take the credential {credential} away and unseal by hand")),
        _ => failure,
    }
}
