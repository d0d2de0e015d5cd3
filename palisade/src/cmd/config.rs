//! `palisade config`: check, show and describe mesh.toml, and sidecar.toml of a sidecar that runs alone.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use policy::Problem;
use serde_json::{Value, json};

use crate::Global;
use crate::failure::{Exit, Failure};
use crate::mesh::file::MeshFile;
use crate::mesh::{Mesh, schema};
use crate::printer::Printer;
use crate::standalone::Standalone;
use crate::standalone::file::SidecarFile;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Say everything that is wrong with the file. Exit code 4 if something is.
    Check {
        /// The file; else that of --config.
        file: Option<PathBuf>,
        /// Print the problems as JSON.
        #[arg(long)]
        json: bool,
        /// The file is the sidecar.toml of a sidecar that runs alone.
        #[arg(long)]
        sidecar: bool,
    },
    /// Print the file as it is understood: defaults filled in, paths absolute.
    Show {
        /// The file; else that of --config.
        file: Option<PathBuf>,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON Schema of the file, for editors.
    Schema {
        /// That of sidecar.toml.
        #[arg(long)]
        sidecar: bool,
    },
    /// Print a whole sample file with a comment on every key.
    Example {
        /// A sidecar.toml.
        #[arg(long)]
        sidecar: bool,
    },
}

pub(crate) fn run(args: &Args, global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    match &args.what {
        What::Check { file, json, sidecar } => {
            check(file.as_deref().unwrap_or(&global.config), *json, *sidecar, printer)
        }
        What::Show { file, json } => show(file.as_deref().unwrap_or(&global.config), *json, printer),
        What::Schema { sidecar } => {
            let schema = if *sidecar {
                schema::json_schema::<SidecarFile>()
            } else {
                schema::json_schema::<MeshFile>()
            };
            printer.data(&format!("{schema:#}\n"))?;
            Ok(Exit::Ok)
        }
        What::Example { sidecar } => {
            printer.data(&if *sidecar {
                schema::sample::<SidecarFile>()
            } else {
                schema::sample::<MeshFile>()
            })?;
            Ok(Exit::Ok)
        }
    }
}

/// Reads mesh.toml for a verb that needs it.
pub(crate) fn load(file: &Path) -> Result<Mesh, Failure> {
    Mesh::load(file, &hostname()).map_err(|problems| unusable(file, problems))
}

/// The same, for policies other than those that it names.
pub(crate) fn load_with(file: &Path, policies: &Path) -> Result<Mesh, Failure> {
    Mesh::load_with(file, &hostname(), policies).map_err(|problems| unusable(file, problems))
}

fn unusable(file: &Path, problems: Vec<Problem>) -> Failure {
    Failure::problems(&file.display().to_string(), problems)
        .next(format!("mend it, then run `palisade config check {}`", file.display()))
}

/// Reads sidecar.toml for a sidecar that runs alone.
pub(crate) fn load_standalone(file: &Path) -> Result<Standalone, Failure> {
    Standalone::load(file).map_err(|problems| {
        Failure::problems(&file.display().to_string(), problems)
            .next(format!("mend it, then run `palisade config check --sidecar {}`", file.display()))
    })
}

/// The machine's own name.
fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn check(file: &Path, json: bool, sidecar: bool, printer: &Printer) -> Result<Exit, Failure> {
    if json {
        let problems = if sidecar {
            Standalone::load(file).err().unwrap_or_default()
        } else {
            Mesh::load(file, &hostname()).err().unwrap_or_default()
        };
        let listed: Vec<Value> = problems
            .iter()
            .map(|problem| {
                json!({
                    "file": problem.file, "line": problem.line, "column": problem.column,
                    "message": problem.message, "hint": problem.hint,
                })
            })
            .collect();
        printer.data(&format!("{:#}\n", json!({"version": 1, "problems": listed})))?;
        return Ok(if problems.is_empty() { Exit::Ok } else { Exit::Invalid });
    }
    if sidecar {
        let told = load_standalone(file)?.to_string();
        printer.data(&format!("{} is good: {told}\n", file.display()))?;
        return Ok(Exit::Ok);
    }
    let mesh = load(file)?;
    let services = mesh.service.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let line =
        format!("{} is good: trust domain {}, services {services}\n", file.display(), mesh.mesh.trust_domain);
    printer.data(&line)?;
    Ok(Exit::Ok)
}

fn show(file: &Path, json: bool, printer: &Printer) -> Result<Exit, Failure> {
    let mesh = load(file)?;
    let value =
        serde_json::to_value(&mesh).map_err(|error| Failure::new("cannot show the mesh").because(&error))?;
    let text = if json { format!("{value:#}\n") } else { as_toml(&value) };
    printer.data(&text)?;
    Ok(Exit::Ok)
}

/// The sections of a resolved mesh as TOML, two levels deep.
fn as_toml(mesh: &Value) -> String {
    let mut sections = Vec::new();
    for (name, section) in mesh.as_object().into_iter().flatten() {
        if name == "service" {
            for (service, section) in section.as_object().into_iter().flatten() {
                sections.push((format!("service.{service}"), section));
            }
        } else {
            sections.push((name.clone(), section));
        }
    }
    let written = sections.iter().map(|(name, section)| {
        let keys: String = section
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, value)| format!("{key} = {}\n", schema::toml_value(value)))
            .collect();
        format!("[{name}]\n{keys}")
    });
    written.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_a_mesh_toml_that_means_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("mesh.toml");
        std::fs::create_dir(directory.path().join("policies")).unwrap();
        let more = "[traffic.web]\nhedge = { after = \"99%\" }\nretries = { on = [\"503\"] }\n";
        let sample = schema::sample::<MeshFile>().replace("[traffic.web]\n", more);
        let limited = sample.replace("[service.web]\n", "[service.web]\nrate_limit = { requests = 5 }\n");
        let mesh = Mesh::parse(&limited, &file, "host-1").unwrap();
        let shown = serde_json::to_value(&mesh).unwrap();
        let again = Mesh::parse(&as_toml(&shown), &file, "another-host").unwrap();
        assert_eq!(serde_json::to_value(&again).unwrap(), shown);
        assert_eq!(shown["traffic"]["web"]["hedge"]["after"], "99%");
        assert_eq!(again.traffic, mesh.traffic);
        assert!(again.service.values().any(|service| service.rate_limit.is_some()));
    }
}
