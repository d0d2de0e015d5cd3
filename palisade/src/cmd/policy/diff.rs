//! `palisade policy diff`: what was touched, what it would have meant for what really happened, and what it means for
//! all requests there can be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ca::model::{DecisionQuery, MAX_DECISIONS, StoredDecision};
use policy::{DecisionRecord, Outcome, Policies, Rule};
use prove::{Change, Prover, Verdict};
use serde::Serialize;
use tempfile::TempDir;

use super::proofs;
use super::subject::Subject;
use crate::Global;
use crate::cmd::admin;
use crate::failure::{Exit, Failure};
use crate::mesh::Mesh;
use crate::printer::Printer;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The policies' directory; else the one that mesh.toml names.
    pub(super) dir: Option<PathBuf>,
    /// The git revision to compare with, such as main or HEAD~1.
    #[arg(long, value_name = "REV")]
    against: String,
    /// Recorded decisions to replay, a JSON document each; without it, the newest that control has.
    #[arg(long, value_name = "FILE")]
    decisions: Option<PathBuf>,
    /// As one JSON document.
    #[arg(long)]
    json: bool,
}

/// Everything that is said.
#[derive(Debug, Serialize)]
struct Report {
    against: String,
    version_before: String,
    version_after: String,
    touched: Vec<Touched>,
    replay: Part<Replay>,
    proof: Part<Vec<Change>>,
}

/// A part that may not have been possible.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Part<T> {
    Done(T),
    Missing(String),
}

/// A file, or a policy in one.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Touched {
    file: String,
    policy: Option<String>,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum How {
    Added,
    Removed,
    Changed,
}

impl How {
    fn of<T: PartialEq>(before: Option<&T>, after: Option<&T>) -> Option<Self> {
        match (before, after) {
            (None, Some(_)) => Some(Self::Added),
            (Some(_), None) => Some(Self::Removed),
            (Some(before), Some(after)) if before != after => Some(Self::Changed),
            _ => None,
        }
    }

    fn mark(self) -> char {
        match self {
            Self::Added => '+',
            Self::Removed => '-',
            Self::Changed => '~',
        }
    }
}

/// Recorded decisions, made again.
#[derive(Debug, Default, Serialize)]
struct Replay {
    /// Decided by policies, then and now.
    replayed: usize,
    /// Not: refused before any policy was asked, or of what these policies do not know.
    left_out: usize,
    newly_allowed: Vec<Turned>,
    newly_denied: Vec<Turned>,
}

/// Decisions that turned, of one kind.
#[derive(Debug, Serialize)]
struct Turned {
    service: String,
    caller: String,
    action: String,
    before: String,
    after: String,
    count: usize,
    /// One of them.
    object: String,
    user: Option<String>,
    receipt: String,
}

pub(super) fn run(
    args: &Args,
    subject: &Subject,
    global: &Global,
    printer: &Printer,
) -> Result<Exit, Failure> {
    let (mesh, directory) = (&subject.mesh, subject.directory());
    let checkout = at_revision(directory, &args.against)?;
    let after = subject.policies()?;
    let before = Policies::load(checkout.path(), &mesh.mesh.trust_domain).map_err(|problems| {
        Failure::problems(&format!("{} at {}", directory.display(), args.against), problems.0)
    })?;
    let report = Report {
        against: args.against.clone(),
        version_before: before.version().to_string(),
        version_after: after.version().to_string(),
        touched: touched((&before, checkout.path()), (&after, directory))?,
        replay: match recorded(args.decisions.as_deref(), || asked(global)) {
            Ok(records) => Part::Done(replay(&records, &before, &after)),
            Err(failure) if args.decisions.is_none() => Part::Missing(format!(
                "{}; --decisions FILE takes recorded decisions from a file",
                failure.causes.first().unwrap_or(&failure.message)
            )),
            Err(failure) => return Err(failure),
        },
        proof: proof(mesh, &before, &after)?,
    };
    if args.json {
        let text = serde_json::to_string_pretty(&report);
        let text = text.map_err(|error| Failure::new("the report cannot be written").because(&error))?;
        printer.data(&format!("{text}\n"))?;
    } else {
        printer.data(&text(&report))?;
    }
    Ok(Exit::Ok)
}

/// The directory as it was, unpacked.
fn at_revision(directory: &Path, revision: &str) -> Result<TempDir, Failure> {
    let failed = |what: &str, why: String| {
        Failure::new(format!("{} at {revision} cannot be read: {what}", directory.display()))
            .because(&std::io::Error::other(why))
            .hint("policy diff compares with a commit of the git repository that the policies are in")
    };
    if revision.starts_with('-') {
        return Err(Failure::usage(format!("`{revision}` is no revision")));
    }
    let git =
        Command::new("git").arg("-C").arg(directory).args(["archive", "--format=tar", revision]).output();
    let archive = git.map_err(|error| failed("git cannot be started", error.to_string()))?;
    if !archive.status.success() {
        let said = String::from_utf8_lossy(&archive.stderr).trim().to_owned();
        return Err(failed("git says no", said));
    }
    let unpacked = tempfile::tempdir().map_err(|error| failed("no place to unpack it", error.to_string()))?;
    let tar = Command::new("tar").args(["-x", "-C"]).arg(unpacked.path()).stdin(Stdio::piped()).spawn();
    let mut tar = tar.map_err(|error| failed("tar cannot be started", error.to_string()))?;
    let written = tar.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(&archive.stdout));
    let ended = written
        .and_then(|()| tar.wait())
        .map_err(|error| failed("it cannot be unpacked", error.to_string()))?;
    if !ended.success() {
        return Err(failed("it cannot be unpacked", ended.to_string()));
    }
    Ok(unpacked)
}

/// Policies by file and id, with their text, and all other files with theirs.
fn contents(policies: &Policies, directory: &Path) -> Result<Contents, Failure> {
    let mut contents = Contents::default();
    for service in policies.services() {
        for (id, file, text) in service.texts() {
            contents.policies.insert((file.to_owned(), id.to_owned()), text.to_owned());
        }
    }
    for invariant in policies.invariants() {
        let key = (invariant.file.to_string(), invariant.id.to_string());
        contents.policies.insert(key, invariant.policy.to_string());
    }
    let mut folders = vec![directory.to_owned()];
    let unreadable = |path: &Path, error: &std::io::Error| {
        Failure::new(format!("{} cannot be read", path.display())).because(error)
    };
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(|error| unreadable(&folder, &error))? {
            let path = entry.map_err(|error| unreadable(&folder, &error))?.path();
            // As the loader does: the repository itself may be in there.
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_none_or(|extension| extension != "cedar") {
                let text = fs::read(&path).map_err(|error| unreadable(&path, &error))?;
                let name = path.strip_prefix(directory).unwrap_or(&path).display().to_string();
                contents.files.insert(name, text);
            }
        }
    }
    Ok(contents)
}

#[derive(Debug, Default)]
struct Contents {
    policies: BTreeMap<(String, String), String>,
    files: BTreeMap<String, Vec<u8>>,
}

fn touched(before: (&Policies, &Path), after: (&Policies, &Path)) -> Result<Vec<Touched>, Failure> {
    let (before, after) = (contents(before.0, before.1)?, contents(after.0, after.1)?);
    let mut touched = Vec::new();
    let keys: BTreeSet<_> = before.policies.keys().chain(after.policies.keys()).collect();
    for key in keys {
        if let Some(how) = How::of(before.policies.get(key), after.policies.get(key)) {
            touched.push(Touched { file: key.0.clone(), policy: Some(key.1.clone()), how });
        }
    }
    let names: BTreeSet<_> = before.files.keys().chain(after.files.keys()).collect();
    for name in names {
        if let Some(how) = How::of(before.files.get(name), after.files.get(name)) {
            touched.push(Touched { file: name.clone(), policy: None, how });
        }
    }
    touched.sort();
    Ok(touched)
}

/// The newest decisions that control has.
pub(super) fn asked(global: &Global) -> Result<Vec<DecisionRecord>, Failure> {
    let query = DecisionQuery { limit: Some(MAX_DECISIONS), ..DecisionQuery::default() };
    let stored: Vec<StoredDecision> = admin::ask(global, async |client| client.decisions(&query).await)?;
    // What another version has recorded, and this one cannot read, is left out.
    Ok(stored.into_iter().filter_map(|stored| serde_json::from_value(stored.json).ok()).collect())
}

/// What was decided: from a file, or as control has it.
pub(super) fn recorded(
    file: Option<&Path>,
    ask: impl FnOnce() -> Result<Vec<DecisionRecord>, Failure>,
) -> Result<Vec<DecisionRecord>, Failure> {
    let Some(file) = file else { return ask() };
    let unreadable = |error: &dyn std::error::Error| {
        Failure::invalid(format!("{} holds no recorded decisions", file.display()))
            .because(error)
            .hint("a JSON document each, as `palisade explain --json` has it under decision.json")
    };
    let text = fs::read_to_string(file).map_err(|error| unreadable(&error))?;
    let records = serde_json::Deserializer::from_str(&text).into_iter::<DecisionRecord>();
    records.collect::<Result<_, _>>().map_err(|error| unreadable(&error))
}

fn replay(records: &[DecisionRecord], before: &Policies, after: &Policies) -> Replay {
    let mut replay = Replay::default();
    // By whether it is allowed now, and by kind.
    let mut turned: BTreeMap<(bool, [String; 5]), Turned> = BTreeMap::new();
    for record in records {
        let by = |policies: &Policies| policies.service(&record.service)?.replay(record);
        let (Some(then), Some(now)) = (by(before), by(after)) else {
            replay.left_out += 1;
            continue;
        };
        replay.replayed += 1;
        if then.outcome == now.outcome {
            continue;
        }
        let caller = record.principal.clone().unwrap_or_default();
        let action = record.action.clone().unwrap_or_default();
        let kind = [record.service.clone(), caller, action, name(&then.rule), name(&now.rule)];
        let [service, caller, action, rule_before, rule_after] = kind.clone();
        let allowed = now.outcome == Outcome::Permit;
        turned
            .entry((allowed, kind))
            .or_insert_with(|| Turned {
                service,
                caller,
                action,
                before: rule_before,
                after: rule_after,
                count: 0,
                object: record.objects.first().map(|object| object.object.clone()).unwrap_or_default(),
                user: record.user.as_ref().map(|user| user.id.clone()),
                receipt: record.receipt.to_string(),
            })
            .count += 1;
    }
    for ((allowed, _), turned) in turned {
        if allowed { replay.newly_allowed.push(turned) } else { replay.newly_denied.push(turned) }
    }
    replay
}

fn name(rule: &Rule) -> String {
    match rule {
        Rule::Absent => "no policy".to_owned(),
        rule => rule.name().to_owned(),
    }
}

fn proof(mesh: &Mesh, before: &Policies, after: &Policies) -> Result<Part<Vec<Change>>, Failure> {
    proofs::with_solver(mesh, async |prover: &mut Prover| {
        let mut changes = Vec::new();
        for service in after.services() {
            let earlier = before.service(service.name());
            changes.extend(prover.compare(earlier.as_deref(), service).await?);
        }
        Ok(changes)
    })
    .map(|proved| match proved {
        Ok(changes) => Part::Done(changes),
        Err(missing) => Part::Missing(missing),
    })
}

fn text(report: &Report) -> String {
    let mut lines =
        vec![format!("{} → {}, against {}", report.version_before, report.version_after, report.against)];
    lines.push("\ntouched".into());
    if report.touched.is_empty() {
        lines.push("  nothing".into());
    }
    for Touched { file, policy, how } in &report.touched {
        let policy = policy.as_ref().map_or(String::new(), |policy| format!("  {policy}"));
        lines.push(format!("  {} {file}{policy}", how.mark()));
    }
    lines.push("\nreplay of recorded decisions".into());
    match &report.replay {
        Part::Missing(why) => lines.push(format!("  not done: {why}")),
        Part::Done(replay) => {
            let count = |turned: &[Turned]| turned.iter().map(|turned| turned.count).sum::<usize>();
            let (allowed, denied) = (count(&replay.newly_allowed), count(&replay.newly_denied));
            lines.push(format!(
                "  {} replayed: {allowed} newly allowed, {denied} newly denied ({} left out, which no policy decides)",
                replay.replayed, replay.left_out
            ));
            for (word, turned) in replay
                .newly_allowed
                .iter()
                .map(|turned| ("allowed", turned))
                .chain(replay.newly_denied.iter().map(|turned| ("denied ", turned)))
            {
                let Turned { service, caller, action, before, after, count, object, user, receipt } = turned;
                let user = user.as_ref().map_or(String::new(), |user| format!(" for {user}"));
                lines.push(format!(
                    "  now {word} {count:>5} ×  {caller}{user} → {service}: {action} {object}\n\
                     \u{20}                     by {after}, before by {before}; {receipt}"
                ));
            }
        }
    }
    lines.push("\nproof, of every request there can be".into());
    match &report.proof {
        Part::Missing(why) => lines.push(format!("  not done: {why}")),
        Part::Done(changes) => {
            let same = changes.iter().filter(|change| change.verdict == Verdict::Equivalent).count();
            for change in changes.iter().filter(|change| change.verdict != Verdict::Equivalent) {
                let Change { service, action, object, verdict, opened, closed, incomparable, .. } = change;
                lines.push(format!("  {:<10}  {service}: {action} on {object}", verdict.as_str()));
                if let Some(why) = incomparable {
                    lines.push(format!("      taken as if there had been no policy: {why}"));
                }
                if let Some(witness) = opened {
                    let by = witness.allowed_by.join(", ");
                    lines.push(format!("      opens   {witness}"));
                    lines.push(format!("              now allowed by {by}; before: {}", witness.denied_by()));
                }
                if let Some(witness) = closed {
                    let by = witness.allowed_by.join(", ");
                    lines.push(format!("      closes  {witness}"));
                    lines.push(format!("              before allowed by {by}; now: {}", witness.denied_by()));
                }
            }
            lines.push(format!(
                "  {:<10}  {same} of {} actions",
                Verdict::Equivalent.as_str(),
                changes.len()
            ));
        }
    }
    printable(&lines.join("\n")) + "\n"
}

/// What callers had a say in, such as a user's id, must not speak to the terminal.
fn printable(text: &str) -> String {
    let shown =
        |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

#[cfg(test)]
#[path = "diff_tests.rs"]
pub(super) mod tests;
