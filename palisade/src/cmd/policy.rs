//! `palisade policy check`: every mistake in the policies directory, or what it holds.

use clap::Subcommand;

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
