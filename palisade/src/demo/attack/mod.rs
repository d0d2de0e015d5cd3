//! `palisade demo attack`: tries what attackers try against the running demo, and beside each attack the
//! same call done rightly, so that "stopped" cannot mean "broken".
//!
//! | file | what it holds |
//! |---|---|
//! | `stage.rs` | the cast: real identities of real workloads, real tokens of real users |
//! | `calls.rs` | how they call: over mTLS as a workload, over HTTPS as a browser or script |
//! | `objects.rs`, `identities.rs`, `tokens.rs`, `paths.rs` | the attacks |

mod calls;
mod identities;
mod objects;
mod paths;
mod stage;
mod tokens;

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use stage::Stage;

/// What an attack was met with.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Short name.
    pub name: &'static str,
    /// What was tried, in a sentence.
    pub tried: String,
    /// Whether it was refused, and for the right reason.
    pub stopped: bool,
    /// Who refused it: `gateway`, `sidecar of accounts`, `vault`, `agent`.
    pub layer: String,
    /// The rule that refused it.
    pub rule: String,
    /// The receipt of the refusal.
    pub receipt: String,
    /// Whether the same call, done rightly, succeeded.
    pub twin_ok: bool,
    /// What the twin did.
    pub twin: String,
}

#[derive(Serialize)]
struct Report {
    version: u32,
    attacks: Vec<Outcome>,
}

/// Runs every attack against the demo that wrote `ready`. Exit code 0 only if each was stopped and each
/// twin succeeded.
pub async fn run(ready: PathBuf, json: bool) -> anyhow::Result<ExitCode> {
    let stage = Stage::set(&ready).await?;
    let mut attacks = Vec::new();
    for attack in [objects::run(&stage).await, identities::run(&stage).await, tokens::run(&stage).await, paths::run(&stage).await] {
        for outcome in attack? {
            if !json {
                print_one(&outcome);
            }
            attacks.push(outcome);
        }
    }
    let all = attacks.iter().all(|attack| attack.stopped && attack.twin_ok);
    if json {
        println!("{}", serde_json::to_string(&Report { version: 1, attacks })?);
    } else {
        print_sum(&attacks);
    }
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_one(outcome: &Outcome) {
    let verdict = match (outcome.stopped, outcome.twin_ok) {
        (true, true) => "stopped",
        (true, false) => "stopped, BUT THE RIGHTFUL CALL FAILED TOO",
        (false, _) => "NOT STOPPED",
    };
    println!("{:<34} {verdict}", outcome.name);
    println!("    tried    {}", outcome.tried);
    println!("    by       {} — {}", outcome.layer, outcome.rule);
    println!("    receipt  {}", outcome.receipt);
    println!("    beside   {} — {}", outcome.twin, if outcome.twin_ok { "succeeded" } else { "FAILED" });
}

fn print_sum(attacks: &[Outcome]) {
    let stopped = attacks.iter().filter(|attack| attack.stopped).count();
    let twins = attacks.iter().filter(|attack| attack.twin_ok).count();
    println!();
    println!("{stopped} of {} attacks stopped, {twins} of {} rightful calls succeeded.", attacks.len(), attacks.len());
    if let Some(first) = attacks.iter().find(|attack| !attack.receipt.is_empty()) {
        println!("Why was one refused?  palisade explain {}", first.receipt);
    }
}
