//! What a run came to, for people and for programs.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde_json::json;
use store_client::{
    Client,
    proto::{ListSplitsRequest, SplitInfo, store_client::StoreClient},
};
use tokio::time::timeout;
use tonic::transport::Endpoint;

use super::{
    Args,
    cluster::Cluster,
    history::Counts,
    nemesis::{Deeds, Nemesis},
    rows,
    workload::Shared,
};

/// A commit's timestamp lies between its request and its answer in true time, whatever the nodes' clocks say within
/// their bound. The clients' own clock does not follow the machine's when that is set right meanwhile: so much of that.
const CLOCK_BOUND_NANOS: u64 = 100_000;
/// A node that has not said by then what splits it knows does not say it.
const ANSWER: Duration = Duration::from_secs(2);
/// So many reasons are enough to see what is going on.
const REASONS_SHOWN: usize = 12;

/// What a run came to.
#[derive(Debug)]
pub(crate) struct Summary {
    seed: u64,
    seconds: u64,
    history: PathBuf,
    counts: BTreeMap<&'static str, Counts>,
    reasons: Vec<(String, u64)>,
    deeds: Deeds,
    nodes: Vec<String>,
    /// The splits as each node knows them.
    splits: Vec<String>,
    /// Nodes that died by themselves.
    pub(crate) deaths: Vec<String>,
}

impl Summary {
    /// Asks everybody.
    pub(crate) async fn gather(
        args: &Args,
        shared: &Shared,
        nemesis: &Nemesis,
        client: &Client,
        cluster: &Cluster,
    ) -> Self {
        let mut nodes = Vec::new();
        for address in cluster.addresses() {
            nodes.push(match client.status(&address).await {
                Ok(status) => format!(
                    "node {}: leads {} of {} splits, {} commits ({} across splits), {} wounded, {} in doubt, {} MB of log",
                    status.node,
                    status.leads,
                    status.splits,
                    status.commits,
                    status.commits_across,
                    status.wounded,
                    status.in_doubt,
                    status.log_bytes / 1_000_000,
                ),
                Err(error) => format!("{address}: {error}"),
            });
        }
        let mut splits = Vec::new();
        for address in cluster.present() {
            splits.push(format!("as {address} knows them:\n{}", known_splits(&address).await));
        }
        let deeds = nemesis.deeds();
        Self {
            seed: args.seed,
            seconds: args.seconds,
            history: args.history.clone(),
            counts: shared.history.counts(),
            reasons: shared.history.reasons(),
            deaths: deeds.deaths.clone(),
            deeds,
            nodes,
            splits,
        }
    }

    /// What nodes say of their splits, for whoever looks for what went wrong.
    pub(crate) fn print_splits(&self) {
        for splits in &self.splits {
            eprintln!("splits {splits}");
        }
    }

    /// Acknowledged transactions.
    pub(crate) fn ok(&self) -> u64 {
        self.counts.values().map(|counts| counts.ok).sum()
    }

    /// What a checker of the history has to know.
    fn to_check(&self) -> String {
        format!(
            "to be checked: {}, by commit timestamps with clocks {CLOCK_BOUND_NANOS} ns apart at most, and in every \
             state the rows of acct/ are {} in all",
            self.history.display(),
            rows::TOTAL
        )
    }

    /// Prints it.
    pub(crate) fn print(&self, as_json: bool) {
        if as_json {
            println!("{:#}", self.to_json());
            return;
        }
        println!("seed {}, {} s\n", self.seed, self.seconds);
        println!("{:<16}{:>9}{:>9}{:>9}", "attempts", "ok", "fail", "unknown");
        for (what, Counts { ok, fail, unknown }) in &self.counts {
            println!("{what:<16}{ok:>9}{fail:>9}{unknown:>9}");
        }
        println!("{:<16}{:>9}\n", "all", self.ok());
        for (reason, count) in self.reasons.iter().take(REASONS_SHOWN) {
            println!("{count:>9} × {reason}");
        }
        println!("\nwhat went wrong: {}", listed(&self.deeds.done));
        for (what, count) in &self.deeds.refused {
            println!("{count:>9} × refused: {what}");
        }
        if self.deeds.full > 0 {
            println!("{:>9} × a node ended with its disk full", self.deeds.full);
        }
        println!("\n{}\n\n{}", self.nodes.join("\n"), self.to_check());
    }

    fn to_json(&self) -> serde_json::Value {
        let counts: BTreeMap<_, _> = self
            .counts
            .iter()
            .map(|(what, Counts { ok, fail, unknown })| {
                (what, json!({"ok": ok, "fail": fail, "unknown": unknown}))
            })
            .collect();
        let reasons: BTreeMap<_, _> = self.reasons.iter().cloned().collect();
        json!({
            "seed": self.seed,
            "seconds": self.seconds,
            "history": self.history,
            "ok": self.ok(),
            "attempts": counts,
            "reasons": reasons,
            "faults": self.deeds.done,
            "refused": self.deeds.refused,
            "ended_with_disk_full": self.deeds.full,
            "died": self.deaths,
            "nodes": self.nodes,
            "clock_bound_ns": CLOCK_BOUND_NANOS,
            "sum": format!("acct/={}", rows::TOTAL),
        })
    }
}

/// Asks one node and no other: they may not agree.
async fn known_splits(address: &str) -> String {
    let asked = async {
        let mut node = StoreClient::new(Endpoint::from_shared(format!("http://{address}"))?.connect().await?);
        anyhow::Ok(node.list_splits(ListSplitsRequest {}).await?.into_inner().splits)
    };
    match timeout(ANSWER, asked).await {
        Ok(Ok(splits)) => {
            let line = |split: &SplitInfo| {
                let SplitInfo { id, generation, nodes, leader, rows, start_text, end_text, .. } = split;
                format!(
                    "  {id}: {start_text} to {end_text}, generation {generation}, nodes {nodes:?}, leader {leader}, {rows} rows"
                )
            };
            splits.iter().map(line).collect::<Vec<_>>().join("\n")
        }
        Ok(Err(error)) => format!("  {error:#}"),
        Err(_) => "  no answer".to_owned(),
    }
}

fn listed(counts: &BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "nothing".to_owned();
    }
    counts.iter().map(|(what, count)| format!("{what} {count}")).collect::<Vec<_>>().join(", ")
}
