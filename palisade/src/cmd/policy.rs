//! `palisade policy`: what is wrong with the policies directory, what its tests say, and who may do what by it.

mod diff;
mod proofs;
mod rollout;
mod subject;
mod suggest;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use identity::{Clock as _, SpiffeId, SystemClock};
use policy::{
    Attributes, Caller, Case, Layer, Mode, ObjectRef, Occasion, Policies, Principal, Problem, Reach, Receipt,
    ServicePolicy, UnmappedOperation, Verdict,
};

use subject::Subject;

use crate::Global;
use crate::cmd::config;
use crate::failure::{Exit, Failure};
use crate::mesh::Mesh;
use crate::printer::{Printer, table};
use crate::workload;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Say everything that is wrong with the policies, and prove their invariants (guard/invariants/*.cedar). Exit code
    /// 4 if something is wrong, 1 if an invariant does not hold or cannot be proved.
    Check {
        /// The policies' directory; else the one that mesh.toml names.
        dir: Option<PathBuf>,
        /// What was found good as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Check the policies, and run the tests beside them: services/NAME/tests/*.toml. Exit code 1 if one fails.
    Test {
        /// The policies' directory; else the one that mesh.toml names.
        dir: Option<PathBuf>,
        /// Only the tests of this service's policies.
        #[arg(long, value_name = "NAME")]
        service: Option<String>,
        /// Each test and its outcome as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write *.cedar files in the one form that reviews need not talk about.
    Fmt {
        /// The policies' directory; else the one that mesh.toml names.
        dir: Option<PathBuf>,
        /// Change nothing; exit code 1 if a file is not in that form.
        #[arg(long)]
        check: bool,
        /// The files as one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Say what changed against a commit: what was touched; which recorded decisions would have been others; and proved
    /// for every request there can be, what is opened and closed.
    Diff(diff::Args),
    /// Print the least policies that would allow what audit mode let through, and tests of them; both are tried first.
    Suggest(suggest::Args),
    /// Wait until a commit is in force everywhere, where control hands policies out. Exit code 1 if it is refused, taken
    /// back, or too slow.
    Wait(rollout::WaitArgs),
    /// Put the policies of an earlier commit in force again, everywhere and at once, where control hands policies out.
    RollBack(rollout::RollBackArgs),
    /// Print who may do what to which kind of object, and by which policies: a table to commit, so that a review sees
    /// what a change opens.
    Matrix {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let find = |dir: &Option<PathBuf>| Subject::find(dir.as_deref(), global, printer);
    match &args.what {
        What::Check { dir, json } => check(&find(dir)?, *json, printer),
        What::Diff(args) => diff::run(args, &find(&args.dir)?, global, printer),
        What::Suggest(args) => suggest::run(args, &config::load(&global.config)?, global, printer),
        What::Wait(args) => rollout::wait(args, global, printer),
        What::RollBack(args) => rollout::roll_back(args, global, printer),
        What::Test { dir, service, json } => test(&find(dir)?, service.as_deref(), *json, printer),
        What::Fmt { dir, check, json } => fmt(&find(dir)?, *check, *json, printer),
        What::Matrix { json } => matrix(&config::load(&global.config)?, *json, printer),
    }
}

fn test(subject: &Subject, service: Option<&str>, json: bool, printer: &Printer) -> Result<Exit, Failure> {
    let policies = subject.policies()?;
    let (mesh, directory) = (&subject.mesh, subject.directory());
    let registered = mesh.registrations();
    let named = Cell::new(false);
    let known = |name: &str| {
        named.set(true);
        registered.iter().find(|known| known.name == name).map(|known| known.id.clone())
    };
    let cases = Case::load(directory, &policies, known).map_err(|problems| {
        let failure = Failure::problems(&directory.display().to_string(), problems.0);
        if subject.has_mesh || !named.get() {
            return failure;
        }
        failure.hint("who is called so stands in mesh.toml: name it with --config FILE, or write SPIFFE IDs")
    })?;
    let service = service.map(|name| mesh.policies_of(name));
    if let Some(name) = service.filter(|name| policies.service(name).is_none()) {
        return Err(workload::no_policy(directory, name));
    }
    let cases = cases.iter().filter(|case| service.is_none_or(|name| case.service == name));
    let outcomes: Vec<(&Case, Result<(), String>)> = cases.map(|case| (case, case.run(&policies))).collect();
    if json {
        let lines = outcomes.iter().map(|(case, outcome)| {
            serde_json::json!({
                "service": case.service,
                "test": case.name,
                "file": case.file,
                "line": case.line,
                "passed": outcome.is_ok(),
                "why": outcome.as_ref().err(),
            })
        });
        printer.data(&lines.map(|line| format!("{line}\n")).collect::<String>())?;
    } else {
        let lines = outcomes.iter().map(|(case, outcome)| {
            let word = if outcome.is_ok() { "ok  " } else { "FAIL" };
            format!("{word}  {}: {}\n", case.service, case.name)
        });
        printer.data(&lines.collect::<String>())?;
    }
    let failed = outcomes.iter().filter_map(|(case, outcome)| Some(case.problem(outcome.as_ref().err()?)));
    let failed: Vec<Problem> = failed.collect();
    let count = outcomes.len();
    if !failed.is_empty() {
        let message = format!("{} of {count} tests of the policies failed", failed.len());
        return Err(Failure { problems: failed, ..Failure::new(message) });
    }
    if count == 0 {
        printer.warning("there are no tests: write services/NAME/tests/*.toml, see the policies' README");
    } else if !json {
        printer.data(&format!("{count} tests, version {}\n", policies.version()))?;
    }
    Ok(Exit::Ok)
}

/// Longest line of a formatted policy, and what a level is moved in by.
const LINE_WIDTH: usize = 110;
const INDENT_WIDTH: isize = 2;

fn fmt(subject: &Subject, check: bool, json: bool, printer: &Printer) -> Result<Exit, Failure> {
    // What cannot be read cannot be written anew: mistakes are said first.
    let _good = subject.policies()?;
    let mut changed = Vec::new();
    for path in cedar_files(subject.directory())? {
        let failed = |what: &str, cause: String| {
            let cause = std::io::Error::other(cause);
            Failure::new(format!("{} cannot be {what}", path.display())).because(&cause)
        };
        let before = std::fs::read_to_string(&path).map_err(|error| failed("read", error.to_string()))?;
        let after = pretty(&before).map_err(|error| failed("formatted", error))?;
        if before == after {
            continue;
        }
        if !check {
            std::fs::write(&path, after).map_err(|error| failed("written", error.to_string()))?;
        }
        changed.push(path.display().to_string());
    }
    if json {
        printer.data(&format!("{}\n", serde_json::json!({ "changed": changed, "written": !check })))?;
    } else {
        printer.data(&changed.iter().map(|path| format!("{path}\n")).collect::<String>())?;
    }
    if check && !changed.is_empty() {
        let message = match changed.len() {
            1 => "a file is not in the one form".to_owned(),
            count => format!("{count} files are not in the one form"),
        };
        return Err(Failure::new(message).hint("the same without --check writes them"));
    }
    Ok(Exit::Ok)
}

/// Policies in the one form.
fn pretty(policies: &str) -> Result<String, String> {
    let form = cedar_policy_formatter::Config { line_width: LINE_WIDTH, indent_width: INDENT_WIDTH };
    cedar_policy_formatter::policies_str_to_pretty(policies, &form).map_err(|error| error.to_string())
}

/// Every *.cedar file below the directory, in order.
fn cedar_files(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let (mut found, mut folders) = (Vec::new(), vec![directory.to_owned()]);
    while let Some(folder) = folders.pop() {
        let unreadable = |error: &std::io::Error| {
            Failure::new(format!("{} cannot be read", folder.display())).because(error)
        };
        for entry in std::fs::read_dir(&folder).map_err(|error| unreadable(&error))? {
            let path = entry.map_err(|error| unreadable(&error))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "cedar") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn matrix(mesh: &Mesh, json: bool, printer: &Printer) -> Result<Exit, Failure> {
    let policies = workload::policies(mesh)?;
    let mut callers: Vec<(String, SpiffeId)> =
        mesh.registrations().into_iter().map(|known| (known.name, known.id)).collect();
    callers.sort();
    let mut rows = Vec::new();
    for service in policies.services() {
        for (name, id) in &callers {
            for Reach { action, object, permits, forbids } in service.reach(id) {
                rows.push([name.clone(), service.name().to_owned(), action, object, permits, forbids]);
            }
        }
    }
    if json {
        let lines = rows.iter().map(|[caller, service, action, object, permits, forbids]| {
            let row = serde_json::json!({
                "caller": caller, "service": service, "action": action, "object": object, "permits": permits,
                "forbids": forbids,
            });
            format!("{row}\n")
        });
        printer.data(&lines.collect::<String>())?;
    } else {
        let rows: Vec<Vec<String>> = rows.into_iter().map(Vec::from).collect();
        let header = ["caller", "service", "action", "object", "permitted by", "unless forbidden by"];
        printer.data(&table(&header, &rows))?;
    }
    Ok(Exit::Ok)
}

fn check(subject: &Subject, json: bool, printer: &Printer) -> Result<Exit, Failure> {
    let (mesh, policies) = (&subject.mesh, subject.policies()?);
    let own = [("gateway", mesh.gateway.is_some()), ("vault", mesh.vault.is_some())];
    let own = own.into_iter().filter(|(_, there)| *there).map(|(name, _)| name);
    let needed = mesh.service.values().map(|service| service.policies.as_str()).chain(own);
    for service in needed {
        if policies.service(service).is_none() {
            return Err(workload::no_policy(&mesh.mesh.policies, service));
        }
    }
    let withheld = withheld_secrets(mesh, &policies)?;
    if !withheld.is_empty() {
        return Err(Failure::invalid(withheld.join("; ")).hint(
            "permit it in services/vault/vault.cedar (action ReadSecret), or take it out of the service's secrets",
        ));
    }
    let proved = proofs::invariants(mesh, &policies)?;
    let rows: Vec<Vec<String>> = policies
        .services()
        .map(|service| vec![service.name().to_owned(), mode(service, SystemClock.now())])
        .collect();
    if json {
        let services: Vec<_> = policies
            .services()
            .map(|service| {
                serde_json::json!({
                    "service": service.name(),
                    "mode": service.mode(SystemClock.now()),
                    "audit_until": service.audit_until().map(|end| end.as_secs()),
                    "policies": service.policies().count(),
                    "unmapped_methods": service.unmapped_methods(),
                    "unmapped_operations": service.unmapped_operations(),
                    "undescribed_routes": service.undescribed_routes(),
                    "shipped_as": service.shipped_as(),
                })
            })
            .collect();
        let good = serde_json::json!({
            "version": policies.version().as_str(), "invariants_proved": proved, "services": services,
        });
        printer.data(&format!("{good:#}\n"))?;
        return Ok(Exit::Ok);
    }
    let directory = mesh.mesh.policies.display();
    let proved = match proved {
        0 => String::new(),
        1 => "an invariant proved\n".to_owned(),
        count => format!("{count} invariants proved\n"),
    };
    let text = format!(
        "{directory} is good, version {}\n{proved}{}",
        policies.version(),
        table(&["service", "mode"], &rows)
    );
    printer.data(&text)?;
    for service in policies.services() {
        unmapped(service, printer);
        if let Some(mapping) = service.shipped_as() {
            printer.warning(&format!(
                "{}: its schema comes with palisade: once every host runs this version, write mapping = \"{mapping}\" in map.toml and \
                 remove the copy",
                service.name()
            ));
        }
    }
    Ok(Exit::Ok)
}

/// What a service's descriptions and its map do not have in common.
fn unmapped(service: &ServicePolicy, printer: &Printer) {
    let name = service.name();
    for path in service.unmapped_methods() {
        printer.warning(&format!("{name}: {path} is not in map.toml, so it is denied to everybody"));
    }
    for UnmappedOperation { operation, file, line, taken_by } in service.unmapped_operations() {
        let so = match taken_by {
            None => "so it is denied to everybody".to_owned(),
            Some(route) => format!("and `{route}` takes it"),
        };
        printer.warning(&format!("{name}: {operation} ({file}:{line}) is not in map.toml, {so}"));
    }
    for route in service.undescribed_routes() {
        printer.warning(&format!("{name}: {route} is in map.toml and not in the OpenAPI description"));
    }
}

/// A service's mode, and until when.
pub(crate) fn mode(service: &ServicePolicy, now: Duration) -> String {
    match (service.mode(now), service.audit_until()) {
        (Mode::Enforce, _) => "enforce".to_owned(),
        (Mode::Audit, None) => "audit".to_owned(),
        (Mode::Audit, Some(end)) => {
            let left = end.saturating_sub(now);
            let date = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + end).to_string();
            let day = date.split('T').next().unwrap_or_default();
            format!("audit until {day}, {} days left", left.as_secs() / (24 * 60 * 60))
        }
    }
}

/// The secrets that mesh.toml says a service reads, and that the vault's policy would not give it: found
/// here rather than by an app that never starts.
fn withheld_secrets(mesh: &Mesh, policies: &Policies) -> Result<Vec<String>, Failure> {
    let mut withheld = Vec::new();
    let Some(vault) = policies.service("vault") else { return Ok(withheld) };
    for (name, service) in &mesh.service {
        for secret in &service.secrets {
            let caller = Caller {
                principal: Principal::Workload(service.id.clone()),
                user: None,
                chain: [].into(),
                address: None,
            };
            let occasion = Occasion {
                receipt: Receipt::generate(&ring::rand::SystemRandom::new())
                    .map_err(|_| Failure::new("the system's random generator failed"))?,
                now: SystemClock.now(),
                layer: Layer::Vault,
                method: "GET",
                target: secret,
                transaction: None,
                trace_id: None,
            };
            let object = ObjectRef::new("Vault::Secret", secret);
            let verdict = vault.decide_object(&caller, "ReadSecret", &object, &Attributes::none(), &occasion);
            if matches!(verdict, Verdict::Deny(_)) {
                withheld.push(format!(
                    "the vault's policy does not let {name} read {secret}, which mesh.toml says it reads"
                ));
            }
        }
    }
    Ok(withheld)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(reader: &str) -> Result<Exit, Failure> {
        let (_folder, mesh) = bank(reader);
        check(&Subject::of(mesh), false, &Printer::plain())
    }

    /// The bank's policies, and a mesh of which one service reads a secret.
    pub(super) fn bank(reader: &str) -> (tempfile::TempDir, Mesh) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in bank::POLICIES {
            let path = folder.path().join("policies").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let secrets = r#"secrets = ["accounts/db-key"]"#;
        let text = format!(
            "[mesh]\ntrust_domain = \"bank.example\"\npolicies = \"policies\"\n\
             [vault]\nlisten = \"127.0.0.1:8200\"\nattest = {{ uid = 1 }}\n\
             [service.accounts]\napp = \"127.0.0.1:5000\"\ninbound = \"127.0.0.1:5001\"\n\
             admin = \"127.0.0.1:5002\"\nattest = {{ uid = 2 }}\n{}\n\
             [service.web]\napp = \"127.0.0.1:5010\"\ninbound = \"127.0.0.1:5011\"\n\
             admin = \"127.0.0.1:5012\"\nattest = {{ uid = 3 }}\n{}\n\
             [service.payments]\napp = \"127.0.0.1:5020\"\ninbound = \"127.0.0.1:5021\"\n\
             admin = \"127.0.0.1:5022\"\nattest = {{ uid = 4 }}\n",
            if reader == "accounts" { secrets } else { "" },
            if reader == "web" { secrets } else { "" },
        );
        let mesh = Mesh::parse(&text, &folder.path().join("mesh.toml"), "host-1").unwrap();
        (folder, mesh)
    }

    #[test]
    fn the_bank_s_tests_pass_and_a_changed_policy_fails_them() {
        let (folder, mesh) = bank("accounts");
        let subject = Subject::of(mesh);
        assert_eq!(test(&subject, None, false, &Printer::plain()).unwrap(), Exit::Ok);
        assert_eq!(test(&subject, Some("web"), true, &Printer::plain()).unwrap(), Exit::Ok);
        assert!(test(&subject, Some("wed"), false, &Printer::plain()).is_err());
        let path = folder.path().join("policies/services/accounts/accounts.cedar");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("context has user && resource.owner == context.user.id", "true"))
            .unwrap();
        let failure = test(&subject, None, false, &Printer::plain()).unwrap_err();
        assert_eq!(failure.exit, Exit::Failed);
        let told = failure.problems.iter().map(ToString::to_string).collect::<String>();
        assert!(told.contains("expected denied by `none`, allowed by `web-reads-own-accounts`"), "{told}");
        assert!(failure.problems.iter().all(|problem| problem.line > 0));
    }

    #[test]
    fn formatted_files_stay_so_and_mean_the_same() {
        let (folder, mesh) = bank("accounts");
        let subject = Subject::of(mesh);
        let path = folder.path().join("policies/services/accounts/accounts.cedar");
        let text = std::fs::read_to_string(&path).unwrap();
        // As it is committed.
        assert_eq!(fmt(&subject, true, false, &Printer::plain()).unwrap(), Exit::Ok);
        std::fs::write(&path, text.replace("permit (\n  principal", "permit(principal")).unwrap();
        let failure = fmt(&subject, true, false, &Printer::plain()).unwrap_err();
        assert_eq!(failure.exit, Exit::Failed);
        assert_eq!(fmt(&subject, false, false, &Printer::plain()).unwrap(), Exit::Ok);
        assert_eq!(fmt(&subject, true, false, &Printer::plain()).unwrap(), Exit::Ok);
        assert!(std::fs::read_to_string(&path).unwrap().contains("// payments looks up whose account"));
        assert_eq!(test(&subject, None, false, &Printer::plain()).unwrap(), Exit::Ok);
    }

    #[test]
    fn a_mode_says_until_when() {
        let (folder, mesh) = bank("accounts");
        let map = folder.path().join("policies/services/accounts/map.toml");
        let text = std::fs::read_to_string(&map).unwrap();
        let shown = |top: &str| {
            std::fs::write(&map, format!("{top}\n{text}")).unwrap();
            let policies = workload::policies(&mesh).unwrap();
            // 2027-01-28T12:00:00Z
            mode(&policies.service("accounts").unwrap(), Duration::from_secs(1_801_137_600))
        };
        assert_eq!(shown(""), "enforce");
        assert_eq!(shown("mode = \"audit\""), "audit");
        assert_eq!(
            shown("mode = \"audit\"\naudit_until = 2027-01-31"),
            "audit until 2027-01-31, 2 days left"
        );
        assert_eq!(shown("mode = \"audit\"\naudit_until = 2027-01-28"), "enforce");
    }

    #[test]
    fn the_matrix_says_who_may_do_what() {
        let (_folder, mesh) = bank("accounts");
        let policies = workload::policies(&mesh).unwrap();
        let accounts = policies.service("accounts").unwrap();
        let id = |name: &str| SpiffeId::new(&format!("spiffe://bank.example/service/{name}")).unwrap();
        let reach = accounts.reach(&id("web"));
        let lines: Vec<_> =
            reach.iter().map(|r| (r.action.as_str(), r.permits.as_str(), r.forbids.as_str())).collect();
        assert_eq!(
            lines,
            [
                ("ListAccounts", "web-lists-own-accounts?", ""),
                ("ReadAccount", "web-reads-own-accounts?", ""),
                ("ReadHistory", "web-reads-own-accounts?", "")
            ]
        );
        let transfer = accounts.reach(&id("payments")).into_iter().find(|r| r.action == "Transfer").unwrap();
        assert_eq!(transfer.forbids, "only-payments-moves-money?");
        assert!(accounts.reach(&id("stranger")).is_empty());
        assert_eq!(matrix(&mesh, true, &Printer::plain()).unwrap(), Exit::Ok);
    }

    #[test]
    fn a_secret_that_the_vault_would_withhold_is_found_before_anything_runs() {
        assert!(checked("accounts").is_ok());
        let failure = checked("web").unwrap_err();
        assert_eq!(failure.exit, Exit::Invalid);
        assert!(failure.message.contains("does not let web read accounts/db-key"), "{}", failure.message);
    }
}
