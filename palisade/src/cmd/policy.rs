//! `palisade policy check`: every mistake in the policies directory, or what it holds.

use clap::Subcommand;
use identity::{Clock as _, SystemClock};
use policy::{Attributes, Caller, Layer, ObjectRef, Occasion, Policies, Principal, Receipt, Verdict};

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
    /// Say everything that is wrong with the policies. Exit code 4 if something is.
    Check,
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    match args.what {
        What::Check => check(&config::load(&global.config)?, printer),
    }
}

fn check(mesh: &Mesh, printer: &Printer) -> Result<Exit, Failure> {
    let policies = workload::policies(mesh)?;
    let own = [("gateway", mesh.gateway.is_some()), ("vault", mesh.vault.is_some())];
    let own = own.into_iter().filter(|(_, there)| *there).map(|(name, _)| name);
    let needed = mesh.service.keys().map(crate::mesh::ServiceName::as_str).chain(own);
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
    let rows: Vec<Vec<String>> = policies
        .services()
        .map(|service| vec![service.name().to_owned(), format!("{:?}", service.mode()).to_lowercase()])
        .collect();
    let directory = mesh.mesh.policies.display();
    let text = format!(
        "{directory} is good, version {}\n{}",
        policies.version(),
        table(&["service", "mode"], &rows)
    );
    printer.data(&text)?;
    Ok(Exit::Ok)
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
             admin = \"127.0.0.1:5012\"\nattest = {{ uid = 3 }}\n{}\n",
            if reader == "accounts" { secrets } else { "" },
            if reader == "web" { secrets } else { "" },
        );
        let mesh = Mesh::parse(&text, &folder.path().join("mesh.toml"), "host-1").unwrap();
        check(&mesh, &Printer::plain())
    }

    #[test]
    fn a_secret_that_the_vault_would_withhold_is_found_before_anything_runs() {
        assert!(checked("accounts").is_ok());
        let failure = checked("web").unwrap_err();
        assert_eq!(failure.exit, Exit::Invalid);
        assert!(failure.message.contains("does not let web read accounts/db-key"), "{}", failure.message);
    }
}
