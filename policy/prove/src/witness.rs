//! A request that shows something, in words.

use std::collections::BTreeMap;
use std::fmt;

use cedar_policy::{Authorizer, Decision, PolicySet};
use cedar_policy_symcc::Env;
use serde::Serialize;
use serde_json::Value as Json;

use crate::ProofError;

/// A request that some policies allow, and what of it matters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Witness {
    /// Who, as Cedar writes it.
    pub principal: String,
    /// Whether that is a workload of the mesh, as it is (or no workload at all).
    pub is_known: bool,
    /// On whose behalf; `None`: nobody's.
    pub user: Option<Json>,
    /// What.
    pub action: String,
    /// To which object.
    pub object: String,
    /// What is known of that.
    pub attributes: BTreeMap<String, Json>,
    /// The policies that allow it.
    pub allowed_by: Vec<String>,
    /// Where the others deny it: those that forbid it. None: no policy allows it.
    pub forbidden_by: Vec<String>,
}

impl Witness {
    /// What the solver found, decided again: `allows` allows it, `other` does not.
    pub(crate) fn of(
        found: &Env,
        allows: &PolicySet,
        other: &PolicySet,
        is_known: bool,
    ) -> Result<Self, ProofError> {
        let unknown = || ProofError::Failed("the request that was found is not whole".to_owned());
        let request = &found.request;
        let decided = |set| Authorizer::new().is_authorized(request, set, &found.entities);
        let (allowed, denied) = (decided(allows), decided(other));
        if allowed.decision() != Decision::Allow || denied.decision() != Decision::Deny {
            return Err(ProofError::Failed("the solver and Cedar disagree about a request".to_owned()));
        }
        let object = request.resource().ok_or_else(unknown)?;
        let entities =
            found.entities.to_json_value().map_err(|error| ProofError::Failed(error.to_string()))?;
        let kind = object.type_name().to_string();
        let of_object = entities.as_array().into_iter().flatten().find(|entity| {
            let part = |pointer: &str| entity.pointer(pointer).and_then(Json::as_str);
            part("/uid/type") == Some(kind.as_str()) && part("/uid/id") == Some(object.id().unescaped())
        });
        let attributes =
            of_object.and_then(|entity| entity.get("attrs")?.as_object()).cloned().unwrap_or_default();
        let failed = |error: &dyn fmt::Display| ProofError::Failed(error.to_string());
        let context =
            request.context().map(|context| context.to_json_value().map_err(|error| failed(&error)));
        let context = context.transpose()?;
        let ids = |response: &cedar_policy::Response| {
            let mut ids: Vec<String> = response.diagnostics().reason().map(ToString::to_string).collect();
            ids.sort_unstable();
            ids
        };
        Ok(Self {
            principal: request.principal().ok_or_else(unknown)?.id().unescaped().to_owned(),
            is_known,
            user: context.as_ref().and_then(|context| context.get("user")).cloned(),
            action: request.action().ok_or_else(unknown)?.id().unescaped().to_owned(),
            object: object.to_string(),
            attributes: attributes.into_iter().collect(),
            allowed_by: ids(&allowed),
            forbidden_by: ids(&denied),
        })
    }
}

impl Witness {
    /// Where the others deny it: why.
    pub fn denied_by(&self) -> String {
        match self.forbidden_by.as_slice() {
            [] => "no policy allows it".to_owned(),
            forbids => format!("forbidden by {}", forbids.join(", ")),
        }
    }
}

/// The request, in one line.
impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.principal)?;
        if !self.is_known {
            f.write_str(" (no workload of this mesh)")?;
        }
        if let Some(user) = &self.user {
            write!(f, ", for the user {}", user.get("id").unwrap_or(&Json::Null))?;
        }
        write!(f, ": {} {}", self.action, self.object)?;
        if !self.attributes.is_empty() {
            let attributes: Vec<String> =
                self.attributes.iter().map(|(name, value)| format!("{name} = {value}")).collect();
            write!(f, " {{ {} }}", attributes.join(", "))?;
        }
        Ok(())
    }
}
