//! `palisade policy wait` and `roll-back`: where a commit is, and back to another one.

use std::time::Duration;

use ca::model::{HolderStatus, PoliciesStatus};
use identity::SystemClock;

use crate::Global;
use crate::cmd::admin;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

/// How often control is asked.
const EVERY: Duration = Duration::from_millis(100);
/// The shortest name of a commit that is taken: what git shows.
const MIN_COMMIT_DIGITS: usize = 7;

#[derive(Debug, clap::Args)]
pub(super) struct WaitArgs {
    /// The commit, in seven digits or more.
    commit: String,
    /// How long to wait, such as 30s or 10m.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Print where it is as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct RollBackArgs {
    /// The commit whose policies are to be in force again; by default the one before.
    commit: Option<String>,
    /// Print the new epoch as JSON.
    #[arg(long)]
    json: bool,
}

/// Control names a commit that it does not take by so many digits.
const DIGITS_NAMED: usize = 12;

/// Where a commit is.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// Everybody has it.
    Everywhere(usize),
    /// It is on its way.
    Coming(String),
    /// It does not come.
    Refused(String),
}

pub(super) fn wait(args: &WaitArgs, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    check(&args.commit)?;
    let clock = SystemClock::shared();
    let end = clock.now() + args.timeout;
    let place = loop {
        match place(&status(global)?, &args.commit) {
            Place::Coming(_) if clock.now() < end => std::thread::sleep(EVERY),
            place => break place,
        }
    };
    if args.json {
        printer.data(&format!("{:#}\n", place.json(&args.commit)))?;
    }
    match place {
        Place::Everywhere(holders) => {
            if !args.json {
                printer.data(&format!("{} is in force in {holders} of {holders}\n", args.commit))?;
            }
            Ok(Exit::Ok)
        }
        Place::Refused(why) => Err(Failure::new(format!("{} is not in force: {why}", args.commit))),
        Place::Coming(how) => {
            let waited = humantime::format_duration(args.timeout);
            let failure =
                Failure::new(format!("{} is not in force everywhere after {waited}: {how}", args.commit));
            Err(failure.hint("`palisade status` says who has which"))
        }
    }
}

impl Place {
    fn json(&self, commit: &str) -> serde_json::Value {
        let (state, holders, reason) = match self {
            Self::Everywhere(holders) => ("in_force", Some(*holders), None),
            Self::Coming(how) => ("coming", None, Some(how)),
            Self::Refused(why) => ("refused", None, Some(why)),
        };
        serde_json::json!({ "version": 1, "commit": commit, "state": state, "holders": holders, "reason": reason })
    }
}

pub(super) fn roll_back(args: &RollBackArgs, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    if let Some(commit) = &args.commit {
        check(commit)?;
    }
    let commit = args.commit.clone();
    let epoch = admin::ask(global, async move |client| client.roll_back_policies(commit.as_deref()).await)?;
    if args.json {
        printer.data(&format!("{:#}\n", serde_json::json!({ "version": 1, "epoch": epoch })))?;
    } else {
        printer.data(&format!("rolled back, by the epoch {epoch}\n"))?;
    }
    printer
        .warning("the repository's newest commit stays out until there is a newer one: revert it there, too");
    Ok(Exit::Ok)
}

fn check(commit: &str) -> Result<(), Failure> {
    let good = commit.len() >= MIN_COMMIT_DIGITS && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    if good {
        return Ok(());
    }
    Err(Failure::usage(format!("`{commit}` is no commit"))
        .hint("write its hash: `git rev-parse HEAD` says it"))
}

fn status(global: &Global) -> Result<PoliciesStatus, Failure> {
    let status = admin::ask(global, async |client| client.status().await)?;
    status.policies.ok_or_else(|| {
        Failure::new("this control hands out no policies").hint("its mesh.toml has no [policy] section")
    })
}

/// What `status` says of a commit.
fn place(status: &PoliciesStatus, commit: &str) -> Place {
    let named = commit.get(..DIGITS_NAMED).unwrap_or(commit);
    if let Some(problem) = status.source_problem.as_ref().filter(|problem| problem.contains(named)) {
        return Place::Refused(problem.clone());
    }
    if let Some(stopped) = status.stopped.as_ref().filter(|stopped| stopped.epoch.commit.starts_with(commit))
    {
        return Place::Refused(stopped.reason.clone());
    }
    let all = status.holders.len();
    let has = |holder: &&HolderStatus| holder.commit.as_ref().is_some_and(|has| has.starts_with(commit));
    let having = status.holders.iter().filter(has).count();
    if let Some(rolling) = status.rolling.as_ref().filter(|rolling| rolling.epoch.commit.starts_with(commit))
    {
        return Place::Coming(format!("{having} of {all} have it, ring {}", rolling.ring));
    }
    if status.in_force.as_ref().is_none_or(|epoch| !epoch.commit.starts_with(commit)) {
        let problem = status.source_problem.as_ref().map(|problem| format!("; {problem}"));
        return Place::Coming(format!("control has not offered it{}", problem.unwrap_or_default()));
    }
    if having == all { Place::Everywhere(all) } else { Place::Coming(format!("{having} of {all} have it")) }
}

#[cfg(test)]
mod tests {
    use ca::model::{EpochStatus, RollingStatus, StoppedStatus};

    use super::*;

    fn epoch(commit: &str) -> EpochStatus {
        EpochStatus { epoch: 1, commit: commit.repeat(10), offered: 0 }
    }

    fn holder(commit: &str) -> HolderStatus {
        HolderStatus {
            host: "h".into(),
            name: "n".into(),
            spiffe_id: String::new(),
            service: "web".into(),
            epoch: 1,
            commit: Some(commit.repeat(10)),
            wanted: 1,
            refused: None,
        }
    }

    #[test]
    fn a_commit_is_everywhere_coming_or_refused() {
        let mut status = PoliciesStatus { in_force: Some(epoch("aaaa")), ..PoliciesStatus::default() };
        status.holders = vec![holder("aaaa"), holder("aaaa")];
        assert_eq!(place(&status, "aaaaaaa"), Place::Everywhere(2));
        assert_eq!(place(&status, "bbbbbbb"), Place::Coming("control has not offered it".into()));
        let rolling = RollingStatus { epoch: epoch("bbbb"), ring: "25%".into(), rings: vec![], since: 0 };
        status.rolling = Some(rolling);
        status.holders[0] = holder("bbbb");
        assert_eq!(place(&status, "bbbbbbb"), Place::Coming("1 of 2 have it, ring 25%".into()));
        assert_eq!(place(&status, "aaaaaaa"), Place::Coming("1 of 2 have it".into()));
        status.rolling = None;
        status.stopped = Some(StoppedStatus { epoch: epoch("bbbb"), reason: "web says no".into() });
        assert_eq!(place(&status, "bbbbbbb"), Place::Refused("web says no".into()));
        status.source_problem = Some("the commit ccccccccc is not signed".into());
        assert!(matches!(place(&status, "ccccccc"), Place::Refused(why) if why.contains("not signed")));
        let whole = "cccccccccccccccccccccccccccccccccccccccc";
        status.source_problem = Some(format!("{}/mesh.cedarschema:1:1: unexpected token", &whole[..12]));
        assert!(matches!(place(&status, whole), Place::Refused(why) if why.contains("unexpected")));
        let told = Place::Coming("1 of 2 have it".into()).json("aaaaaaa");
        assert_eq!((&told["state"], &told["reason"]), (&"coming".into(), &"1 of 2 have it".into()));
        assert!(check("main").is_err() && check("abc123").is_err() && check("abc1234").is_ok());
    }
}
