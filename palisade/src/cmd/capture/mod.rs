//! `palisade sidecar capture`: the kernel brings an app's connections to its sidecar, the app's wish or not.
//!
//! Rules outlive the sidecar on purpose: while it is down, what they catch is refused, not passed. They go by
//! `off` alone: whoever calls [`off`] knows that the app has ended too.

mod host;
mod inspect;
mod probe;
mod routing;
mod ruleset;
mod settings;

use crate::failure::{Exit, Failure};
use crate::printer::Printer;

use host::Host;
use inspect::{Found, InForce};
use settings::Plan;

pub(crate) use settings::Wanted;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Put the rules in force, or bring what is in force in line with these options.
    On {
        #[command(flatten)]
        wanted: Box<Wanted>,
        #[command(flatten)]
        place: Place,
    },
    /// Remove all that `on` put in force, and nothing else.
    Off {
        #[command(flatten)]
        place: Place,
    },
    /// Show what is in force. Exits with 1 where it is not what `on` would write.
    Show {
        /// With any of these: compare with what `on` would write now, instead of with what it wrote.
        #[command(flatten)]
        wanted: Box<Wanted>,
        #[command(flatten)]
        place: Place,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Where the rules are.
#[derive(Debug, clap::Args)]
struct Place {
    /// The network namespace: a name of `ip netns`, or a path such as /proc/PID/ns/net. Default: this one.
    #[arg(long, value_name = "NAME|PATH")]
    netns: Option<String>,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<Exit, Failure> {
    match &args.what {
        What::On { wanted, place } => {
            let said = match on(wanted, place.netns.as_deref())? {
                Done::Changed => "capture is on",
                Done::AlreadySo => "capture is on already, as wanted",
            };
            printer.progress(said);
            Ok(Exit::Ok)
        }
        What::Off { place } => {
            match off(place.netns.as_deref())? {
                Done::Changed => printer.progress("capture is off"),
                Done::AlreadySo => printer.progress("capture is off already"),
            }
            Ok(Exit::Ok)
        }
        What::Show { wanted, place, json } => show(wanted, place, *json, printer),
    }
}

/// Whether there was anything to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// It was done.
    Changed,
    /// It had been done before.
    AlreadySo,
}

/// Puts the rules in force. Nothing is captured halfway at any moment: routing is there first, the rules come
/// in one transaction.
pub(crate) fn on(wanted: &Wanted, netns: Option<&str>) -> Result<Done, Failure> {
    let plan = Plan::new(wanted)?;
    let host = Host::open(netns)?;
    match inspect::inspect(&host, Some(&plan))? {
        Found::Foreign => return Err(foreign()),
        Found::Ours(in_force) if in_force.differences.is_empty() => return Ok(Done::AlreadySo),
        Found::Ours(_) | Found::Nothing => {}
    }
    let rules = ruleset::render(&plan);
    if let Err(refused) = host.nft(&["-c", "-f", "-"], &rules)? {
        return Err(probe::explain(&host, &plan, &refused));
    }
    if plan.inbound_port.is_some() {
        routing::put(&host)?;
    }
    host.nft(&["-f", "-"], &rules)?.map_err(|refused| probe::explain(&host, &plan, &refused))?;
    if plan.inbound_port.is_none() {
        routing::remove(&host)?;
    }
    Ok(Done::Changed)
}

/// Removes what `on` put there: the rules first, so that nothing is marked for routing that is gone.
pub(crate) fn off(netns: Option<&str>) -> Result<Done, Failure> {
    let host = Host::open(netns)?;
    let found = inspect::owner(&host)?;
    if found == inspect::Owner::Ours {
        let delete = format!("delete table inet {}\n", ruleset::TABLE);
        host.nft(&["-f", "-"], &delete)?
            .map_err(|refused| refused.failure("cannot remove the capture rules"))?;
    }
    let routed = routing::remove(&host)?;
    Ok(if routed || found == inspect::Owner::Ours { Done::Changed } else { Done::AlreadySo })
}

fn foreign() -> Failure {
    Failure::new(format!("table inet {} is there and is not ours: it is left as it is", ruleset::TABLE))
        .hint("whoever made it can rename it; see what it holds:")
        .next(format!("nft list table inet {}", ruleset::TABLE))
}

fn show(wanted: &Wanted, place: &Place, json: bool, printer: &Printer) -> Result<Exit, Failure> {
    let plan = if *wanted == Wanted::default() { None } else { Some(Plan::new(wanted)?) };
    let host = Host::open(place.netns.as_deref())?;
    let found = inspect::inspect(&host, plan.as_ref())?;
    let exit = match &found {
        Found::Ours(in_force) if in_force.differences.is_empty() => Exit::Ok,
        Found::Nothing if plan.is_none() => Exit::Ok,
        Found::Ours(_) | Found::Nothing | Found::Foreign => Exit::Failed,
    };
    printer.data(&if json { format!("{:#}\n", as_json(&found)) } else { as_text(&found) })?;
    Ok(exit)
}

fn as_json(found: &Found) -> serde_json::Value {
    let (state, in_force) = match found {
        Found::Nothing => ("off", None),
        Found::Foreign => ("foreign", None),
        Found::Ours(in_force) if in_force.differences.is_empty() => ("on", Some(in_force)),
        Found::Ours(in_force) => ("differs", Some(in_force)),
    };
    serde_json::json!({
        "version": 1,
        "state": state,
        "options": in_force.map(|in_force| &in_force.words),
        "differences": in_force.map(|in_force| &in_force.differences),
        "connections": in_force.map(|in_force| &in_force.connections),
    })
}

fn as_text(found: &Found) -> String {
    let InForce { words, differences, connections } = match found {
        Found::Nothing => return "capture is off\n".to_owned(),
        Found::Foreign => return format!("{}\n", foreign().message),
        Found::Ours(in_force) => in_force,
    };
    let mut text = String::from("capture is on, with\n");
    for word in words {
        text.push_str(&format!("  {word}\n"));
    }
    text.push_str("\nconnections since then\n");
    let rows: Vec<Vec<String>> =
        connections.iter().map(|(what, count)| vec![what.clone(), count.to_string()]).collect();
    text.push_str(&crate::printer::table(&["rule", "count"], &rows));
    if !differences.is_empty() {
        text.push_str(
            "\nit differs from what `on` writes (+ is there and should not be, - should be there)\n",
        );
        for difference in differences {
            text.push_str(&format!("  {difference}\n"));
        }
    }
    text
}
