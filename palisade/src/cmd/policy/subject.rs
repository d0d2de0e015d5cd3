//! Which policies a verb is about: those of mesh.toml, or those of a directory on the command line.

use std::path::Path;
use std::sync::Arc;

use identity::TrustDomain;
use policy::Policies;

use crate::cmd::config;
use crate::failure::Failure;
use crate::mesh::Mesh;
use crate::printer::Printer;
use crate::{Global, MESH_TOML};

/// What policies that name no workload are taken to be for: nothing of theirs depends on it.
const ANY_TRUST_DOMAIN: &str = "mesh.example";

/// Policies, and the mesh that they are for.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) mesh: Mesh,
    /// Whether there is a mesh.toml; if not, nothing is known of services and who they are.
    pub(super) has_mesh: bool,
    /// The command that checks these policies.
    check: String,
}

impl Subject {
    /// The policies of mesh.toml.
    pub(super) fn of(mesh: Mesh) -> Self {
        let check = format!("palisade --config {} policy check", mesh.file.display());
        Self { mesh, has_mesh: true, check }
    }

    /// Those in `dir` if it is given. A repository of policies may have no mesh.toml beside it, which only matters where
    /// none was asked for by name.
    pub(super) fn find(dir: Option<&Path>, global: &Global, printer: &Printer) -> Result<Self, Failure> {
        let Some(dir) = dir else { return config::load(&global.config).map(Self::of) };
        let shown = dir.display();
        if !dir.is_dir() {
            return Err(Failure::invalid(format!("there is no directory {shown}")));
        }
        if !dir.join("mesh.cedarschema").exists() && !dir.join("services").exists() {
            return Err(Failure::invalid(format!("{shown} holds no policies"))
                .hint("a directory of policies has mesh.cedarschema and services/NAME/ in it"));
        }
        if global.config != Path::new(MESH_TOML) || global.config.exists() {
            let mesh = config::load_with(&global.config, dir)?;
            let check = format!("palisade --config {} policy check {shown}", global.config.display());
            return Ok(Self { mesh, has_mesh: true, check });
        }
        let named = Policies::trust_domain_of(dir);
        let taken = named
            .as_ref()
            .map_or_else(String::new, |named| format!("the trust domain is {named}, as they have it, and "));
        printer.progress(&format!(
            "there is no {MESH_TOML} beside the policies: {taken}what it would say of services and secrets is not looked at"
        ));
        let trust_domain = match named {
            Some(named) => named,
            None => TrustDomain::new(ANY_TRUST_DOMAIN)
                .map_err(|error| Failure::new("there is no trust domain").because(&error))?,
        };
        let mesh = Mesh::unknown(&trust_domain, dir)
            .map_err(|problems| Failure::problems(&trust_domain.to_string(), problems))?;
        Ok(Self { mesh, has_mesh: false, check: format!("palisade policy check {shown}") })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.mesh.mesh.policies
    }

    /// The policies themselves.
    pub(super) fn policies(&self) -> Result<Arc<Policies>, Failure> {
        Policies::load(self.directory(), &self.mesh.mesh.trust_domain).map_err(|problems| {
            Failure::problems(&self.directory().display().to_string(), problems.0)
                .next(format!("mend it, then run `{}`", self.check))
        })
    }
}
