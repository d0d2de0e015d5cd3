//! `palisade demo attack`: tries what attackers try against the running demo, and beside each attack the
//! same call done rightly, so that "stopped" cannot mean "broken".
//!
//! | file | what it holds |
//! |---|---|
//! | `stage.rs` | the cast: real identities of real workloads, real tokens of real users |
//! | `calls.rs` | how they call: over mTLS as a workload, over HTTPS as a browser or script |
//! | `objects.rs`, `identities.rs`, `tokens.rs`, `paths.rs` | the attacks |

pub(super) mod calls;
mod identities;
mod objects;
mod paths;
mod stage;
mod tokens;

use std::path::Path;

use identity::{BundleSet, TrustBundle, TrustDomain};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde::Serialize;

use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use stage::Stage;

/// What an attack was met with.
#[derive(Debug, Clone, Serialize)]
struct Outcome {
    /// Short name.
    name: &'static str,
    /// What was tried, in a sentence.
    tried: String,
    /// Whether it was refused, and for the right reason.
    stopped: bool,
    /// Who refused it: `gateway`, `sidecar of accounts`, `vault`, `agent`.
    layer: String,
    /// The rule that refused it.
    rule: String,
    /// The receipt of the refusal.
    receipt: String,
    /// Whether the same call, done rightly, succeeded.
    twin_ok: bool,
    /// What the twin did.
    twin: String,
}

#[derive(Serialize)]
struct Report {
    version: u32,
    attacks: Vec<Outcome>,
}

/// Runs every attack against the demo that wrote `ready`. [`Exit::Ok`] only if each was stopped and each
/// twin succeeded.
pub(super) fn run(ready: &Path, json: bool, printer: &Printer) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    runtime.block_on(async {
        let attacks = attack(ready, json, printer).await;
        let attacks = attacks
            .map_err(|error| Failure::new("the attacks could not be tried").because(error.as_ref()))?;
        let all = attacks.iter().all(|attack| attack.stopped && attack.twin_ok);
        if json {
            let report = serde_json::to_string(&Report { version: 1, attacks })
                .map_err(|error| Failure::new("the report cannot be written").because(&error))?;
            printer.data(&format!("{report}\n"))?;
        } else {
            printer.data(&sum(&attacks))?;
        }
        Ok(if all { Exit::Ok } else { Exit::Failed })
    })
}

async fn attack(ready: &Path, json: bool, printer: &Printer) -> anyhow::Result<Vec<Outcome>> {
    let stage = Stage::set(ready).await?;
    let mut attacks = Vec::new();
    let show = |outcomes: &[Outcome]| -> anyhow::Result<()> {
        for outcome in outcomes.iter().filter(|_| !json) {
            printer.data(&one(outcome)).map_err(|failure| anyhow::anyhow!(failure.message))?;
        }
        Ok(())
    };
    for outcomes in [
        objects::run(&stage).await?,
        identities::run(&stage).await?,
        tokens::run(&stage).await?,
        paths::run(&stage).await?,
    ] {
        show(&outcomes)?;
        attacks.extend(outcomes);
    }
    Ok(attacks)
}

/// The mesh's authorities from a PEM file.
pub(super) fn bundle(ca_bundle: &Path) -> Result<BundleSet, Failure> {
    let unreadable =
        |error: &dyn std::error::Error| Failure::new("the mesh's authorities cannot be read").because(error);
    let authorities: Vec<_> = CertificateDer::pem_file_iter(ca_bundle)
        .and_then(Iterator::collect)
        .map_err(|error| unreadable(&error))?;
    let trust_domain = TrustDomain::new(super::plan::TRUST_DOMAIN).map_err(|error| unreadable(&error))?;
    let bundle = TrustBundle::new(trust_domain, authorities).map_err(|error| unreadable(&error))?;
    Ok(BundleSet::new([bundle]))
}

fn one(outcome: &Outcome) -> String {
    let verdict = match (outcome.stopped, outcome.twin_ok) {
        (true, true) => "stopped",
        (true, false) => "stopped, BUT THE RIGHTFUL CALL FAILED TOO",
        (false, _) => "NOT STOPPED",
    };
    let twin = if outcome.twin_ok { "succeeded" } else { "FAILED" };
    format!(
        "{:<34} {verdict}\n    tried    {}\n    by       {}: {}\n    receipt  {}\n    beside   {}: {twin}\n",
        outcome.name, outcome.tried, outcome.layer, outcome.rule, outcome.receipt, outcome.twin,
    )
}

fn sum(attacks: &[Outcome]) -> String {
    let all = attacks.len();
    let stopped = attacks.iter().filter(|attack| attack.stopped).count();
    let twins = attacks.iter().filter(|attack| attack.twin_ok).count();
    format!("\n{stopped} of {all} attacks stopped, {twins} of {all} rightful calls succeeded.\n")
}
