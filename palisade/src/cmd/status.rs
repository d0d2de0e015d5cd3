//! `palisade status`: what control knows of authority, hosts and identities.

use std::time::Duration;

use ca::model::ControlStatus;
use identity::{Clock as _, SystemClock};

use crate::Global;
use crate::cmd::admin;
use crate::failure::{Exit, Failure};
use crate::printer::{Printer, table};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let status = admin::ask(global, async |client| client.status().await)?;
    if args.json {
        printer.data(&format!("{:#}\n", serde_json::json!({"version": 1, "status": status})))?;
    } else {
        printer.data(&text(&status, SystemClock.now_seconds()))?;
    }
    Ok(Exit::Ok)
}

fn text(status: &ControlStatus, now: u64) -> String {
    let hosts: Vec<Vec<String>> = status
        .nodes
        .iter()
        .map(|node| {
            let seen = match (node.connected, node.last_seen) {
                (true, _) => "connected".to_owned(),
                (false, Some(seen)) => format!("gone for {}", span(now.saturating_sub(seen))),
                (false, None) => "not seen since control started".to_owned(),
            };
            vec![node.host.clone(), seen, until(node.not_after, now)]
        })
        .collect();
    let identities: Vec<Vec<String>> = status
        .svids
        .iter()
        .map(|svid| vec![svid.spiffe_id.clone(), svid.host.clone(), until(svid.not_after, now)])
        .collect();
    let counts = &status.counts;
    format!(
        "trust domain {}, control at {}\nauthority {} ends in {}\n\nhosts\n{}\nidentities\n{}\n\
         {} identities issued, {} in force; {} decisions kept, {} dropped for age, {} lost on the way\n",
        status.trust_domain,
        status.listen,
        status.authority.serial,
        until(status.authority.not_after, now),
        table(&["host", "agent", "identity ends in"], &hosts),
        table(&["identity", "host", "ends in"], &identities),
        counts.svids_issued,
        counts.svids_active,
        counts.decisions_stored,
        counts.decisions_expired,
        counts.decisions_lost,
    )
}

fn until(end: u64, now: u64) -> String {
    if end <= now { "ended".to_owned() } else { span(end - now) }
}

/// A span in its two largest units: nobody plans by the second of a year.
fn span(seconds: u64) -> String {
    let whole = humantime::format_duration(Duration::from_secs(seconds)).to_string();
    whole.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_short_and_what_has_ended_says_so() {
        assert_eq!(span(90), "1m 30s");
        assert_eq!(span(90_061), "1day 1h");
        assert_eq!(until(5, 10), "ended");
        assert_eq!(until(15, 10), "5s");
    }
}
