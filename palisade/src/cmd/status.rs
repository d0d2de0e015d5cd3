//! `palisade status`: what control knows of authority, hosts and identities.

use std::collections::BTreeMap;
use std::time::Duration;

use ca::model::{
    ControlStatus, EndpointStatus, HolderStatus, IssuedSvid, PoliciesStatus, RelationsStatus, RollingStatus,
    StoppedStatus,
};
use identity::{Clock as _, SystemClock};
use policy::Mode;

use crate::Global;
use crate::cmd::{admin, config, policy as policy_verb};
use crate::failure::{Exit, Failure};
use crate::printer::{Printer, table};
use crate::workload;

/// A sidecar asks every second whether its relations are the newest, and by default believes them for five.
const SILENT_SECONDS: u64 = 5;

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
        printer.data(&audited(global)?)?;
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
    let identities: Vec<Vec<String>> = newest(&status.svids)
        .into_iter()
        .map(|svid| vec![svid.spiffe_id.clone(), svid.host.clone(), until(svid.not_after, now)])
        .collect();
    let counts = &status.counts;
    format!(
        "trust domain {}, control at {}\nauthority {} ends in {}\n\nhosts\n{}\nidentities\n{}\n{}{}{}\
         {} identities issued, {} in force; {} decisions kept, {} dropped for age, {} lost on the way\n",
        status.trust_domain,
        status.listen,
        status.authority.serial,
        until(status.authority.not_after, now),
        table(&["host", "agent", "identity ends in"], &hosts),
        table(&["identity", "host", "ends in"], &identities),
        endpoints(status),
        policies(status.policies.as_ref(), now),
        relations(&status.relations, now),
        counts.svids_issued,
        counts.svids_active,
        counts.decisions_stored,
        counts.decisions_expired,
        counts.decisions_lost,
    )
}

/// The services that the policies on disk have in audit mode, and until when. Policies that are wrong are `policy
/// check`'s to say.
fn audited(global: &Global) -> Result<String, Failure> {
    let mesh = config::load(&global.config)?;
    let Ok(policies) = workload::policies(&mesh) else { return Ok(String::new()) };
    let now = SystemClock.now();
    let mesh_audits = mesh.mesh.mode == crate::mesh::Mode::Audit;
    let rows: Vec<Vec<String>> = policies
        .services()
        .filter(|service| service.mode(now) == Mode::Audit)
        .map(|service| vec![service.name().to_owned(), policy_verb::mode(service, now)])
        .collect();
    let whole = if mesh_audits { "\naudit mode: every service, by [mesh] mode\n" } else { "" };
    if rows.is_empty() {
        return Ok(whole.to_owned());
    }
    Ok(format!("{whole}\nnot enforced\n{}", table(&["service", "mode"], &rows)))
}

/// Where workloads say that they serve, if any do.
fn endpoints(status: &ControlStatus) -> String {
    if status.endpoints.is_empty() {
        return String::new();
    }
    let row = |endpoint: &EndpointStatus| {
        let serving = if endpoint.serving { "serving" } else { "not serving" };
        vec![endpoint.spiffe_id.clone(), endpoint.address.clone(), serving.to_owned()]
    };
    let rows: Vec<Vec<String>> = status.endpoints.iter().map(row).collect();
    format!("endpoints\n{}\n", table(&["identity", "address", "is"], &rows))
}

/// What services' relations are at, and who has which, if any service has some.
fn relations(stores: &[RelationsStatus], now: u64) -> String {
    let used = |store: &&RelationsStatus| store.revision > 0 || !store.readers.is_empty();
    let stores: Vec<&RelationsStatus> = stores.iter().filter(used).collect();
    if stores.is_empty() {
        return String::new();
    }
    let rows = stores.iter().map(|store| {
        vec![
            store.service.clone(),
            store.revision.to_string(),
            store.objects.to_string(),
            store.bytes.to_string(),
        ]
    });
    let readers = stores.iter().flat_map(|store| store.readers.iter().map(move |reader| (store, reader)));
    let readers = readers.map(|(store, reader)| {
        let silent = now.saturating_sub(reader.heard);
        let has = match reader.revision == store.revision {
            _ if silent > SILENT_SECONDS => {
                format!("not heard for {}: denies by relations.stale", span(silent))
            }
            true => "as it should be".to_owned(),
            false => format!("at revision {}", reader.revision),
        };
        vec![reader.spiffe_id.clone(), reader.host.clone(), has]
    });
    format!(
        "relations\n{}\n{}\n",
        table(&["service", "revision", "objects", "bytes"], &rows.collect::<Vec<_>>()),
        table(&["read by", "host", "has"], &readers.collect::<Vec<_>>())
    )
}

/// Which policies are in force where, if control hands them out.
fn policies(policies: Option<&PoliciesStatus>, now: u64) -> String {
    let Some(policies) = policies else { return String::new() };
    let short = |commit: &str| commit.chars().take(12).collect::<String>();
    let mut text = String::from("policies\n");
    match &policies.in_force {
        Some(epoch) => {
            let age = span(now.saturating_sub(epoch.offered));
            text.push_str(&format!("in force: {}, put out {age} ago\n", short(&epoch.commit)));
        }
        None => text.push_str("in force: none yet\n"),
    }
    if let Some(RollingStatus { epoch, ring, rings, since }) = &policies.rolling {
        let (commit, age) = (short(&epoch.commit), span(now.saturating_sub(*since)));
        text.push_str(&format!("on its way: {commit}, ring {ring} of {} for {age}\n", rings.join(", ")));
    }
    if let Some(StoppedStatus { epoch, reason }) = &policies.stopped {
        text.push_str(&format!("taken back: {}: {}\n", short(&epoch.commit), printable(reason)));
    }
    if let Some(problem) = &policies.source_problem {
        text.push_str(&format!("not taken from the repository: {}\n", printable(problem)));
    }
    let row = |holder: &HolderStatus| {
        let has = match (&holder.commit, holder.epoch) {
            (Some(commit), _) => short(commit),
            (None, 0) => "none: everything is denied".to_owned(),
            (None, epoch) => format!("epoch {epoch}"),
        };
        let is = match &holder.refused {
            Some(refused) => format!("refuses {}", printable(refused)),
            None if holder.epoch == holder.wanted => "as it should be".to_owned(),
            None => format!("waits for the epoch {}", holder.wanted),
        };
        vec![holder.service.clone(), holder.host.clone(), holder.name.clone(), has, is]
    };
    let rows: Vec<Vec<String>> = policies.holders.iter().map(row).collect();
    text + &table(&["service", "host", "who", "has", "is"], &rows) + "\n"
}

/// What came from elsewhere, without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

/// The last SVID of each identity on each host: those before it run out by themselves.
fn newest(svids: &[IssuedSvid]) -> Vec<&IssuedSvid> {
    let mut last: BTreeMap<(&str, &str), &IssuedSvid> = BTreeMap::new();
    for svid in svids {
        let kept = last.entry((&svid.spiffe_id, &svid.host)).or_insert(svid);
        if kept.not_after < svid.not_after {
            *kept = svid;
        }
    }
    last.into_values().collect()
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
    fn of_each_identity_on_each_host_the_last_svid_is_listed() {
        let svid = |id: &str, host: &str, not_after| IssuedSvid {
            serial: String::new(),
            spiffe_id: id.into(),
            host: host.into(),
            why: String::new(),
            entry_id: String::new(),
            issued: 0,
            not_after,
        };
        let all =
            [svid("b", "h", 5), svid("a", "h", 1), svid("a", "h", 3), svid("a", "g", 2), svid("a", "h", 2)];
        let listed: Vec<_> = newest(&all)
            .into_iter()
            .map(|svid| (svid.spiffe_id.as_str(), svid.host.as_str(), svid.not_after))
            .collect();
        assert_eq!(listed, [("a", "g", 2), ("a", "h", 3), ("b", "h", 5)]);
    }

    #[test]
    fn spans_are_short_and_what_has_ended_says_so() {
        assert_eq!(span(90), "1m 30s");
        assert_eq!(span(90_061), "1day 1h");
        assert_eq!(until(5, 10), "ended");
        assert_eq!(until(15, 10), "5s");
    }
}
