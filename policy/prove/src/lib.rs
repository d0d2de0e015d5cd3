//! What a change of policies opens or closes, and what no policy may ever allow: proved for all requests that there can
//! be, by Cedar's symbolic compiler and an SMT solver.
//!
//! | question | answer |
//! |---|---|
//! | [`Prover::compare`] | per action: the same as before, narrower, wider, with a request that shows it |
//! | [`Prover::never`] | whether an invariant holds, or a request that breaks it |
//!
//! A request that shows something is made of workloads of the mesh where one of them can; it is decided again by
//! Cedar's own authorizer before it is believed.

mod witness;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use cedar_policy::{Effect, Policy, PolicyId, PolicySet, RequestEnv, Schema};
use cedar_policy_symcc::err::Error as SymccError;
use cedar_policy_symcc::solver::{LocalSolver, SolverError};
use cedar_policy_symcc::{CedarSymCompiler, CompiledPolicySet};
use identity::SpiffeId;
use policy::{Invariant, ServicePolicy};
use serde::Serialize;
use thiserror::Error;
use tokio::process::Command;

pub use witness::Witness;

/// The environment variable that names the solver; without it `cvc5` is looked for on the path.
pub const SOLVER_VARIABLE: &str = "CVC5";
/// Longest that one question may take the solver, in milliseconds.
const QUESTION_MILLIS: u32 = 60_000;
/// Workloads that a shown request may be made of; with more, any will do.
const MAX_WORKLOADS: usize = 256;
const WORKLOAD: &str = "Mesh::Workload";

/// Why nothing was proved.
#[derive(Debug, Error)]
pub enum ProofError {
    /// There is no solver.
    #[error("no solver: {0} cannot be started")]
    NoSolver(String),
    /// The solver, or the way there.
    #[error("the proof failed: {0}")]
    Failed(String),
    /// The invariant is about nothing that any service has.
    #[error("the invariant {0} fits no action of any service: its entities or actions do not exist")]
    AboutNothing(Arc<str>),
}

impl From<SymccError> for ProofError {
    fn from(error: SymccError) -> Self {
        let (mut text, mut cause) = (error.to_string(), std::error::Error::source(&error));
        while let Some(error) = cause {
            // Writing to a String cannot fail.
            let _infallible = write!(text, ": {error}");
            cause = error.source();
        }
        Self::Failed(text)
    }
}

impl From<SolverError> for ProofError {
    fn from(error: SolverError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// How an action's policies changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// Every request is decided as before.
    Equivalent,
    /// Some requests are denied that were allowed, none the other way.
    Narrower,
    /// Some requests are allowed that were denied, none the other way.
    Widened,
    /// Both.
    Changed,
}

impl Verdict {
    /// In capitals, as reviews have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Equivalent => "EQUIVALENT",
            Self::Narrower => "NARROWER",
            Self::Widened => "WIDENED",
            Self::Changed => "CHANGED",
        }
    }
}

/// One action on one kind of object, before and after.
#[derive(Debug, Clone, Serialize)]
pub struct Change {
    /// The service.
    pub service: String,
    /// The action, without its namespace.
    pub action: String,
    /// The kind of callers.
    pub principal: String,
    /// The kind of object.
    pub object: String,
    /// What became of it.
    pub verdict: Verdict,
    /// A request that is allowed now and was not.
    pub opened: Option<Witness>,
    /// A request that is denied now and was not.
    pub closed: Option<Witness>,
    /// The policies before do not fit the schema of now, so that they were taken for none; why.
    pub incomparable: Option<String>,
}

/// Asks the solver. One at a time.
#[derive(Debug)]
pub struct Prover {
    compiler: CedarSymCompiler<LocalSolver>,
    /// What a shown request is to be like, the most telling first.
    wishes: Vec<Policy>,
}

impl Prover {
    /// Starts the solver. `workloads` are those that there are, by service name and SPIFFE ID.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(workloads: &[(String, SpiffeId)]) -> Result<Self, ProofError> {
        let program = std::env::var(SOLVER_VARIABLE).unwrap_or_else(|_| "cvc5".to_owned());
        Self::with_program(&program, workloads)
    }

    fn with_program(program: &str, workloads: &[(String, SpiffeId)]) -> Result<Self, ProofError> {
        let mut command = Command::new(program);
        command.args(["--lang", "smt", &format!("--tlimit-per={QUESTION_MILLIS}")]).kill_on_drop(true);
        let solver =
            LocalSolver::from_command(&mut command).map_err(|_| ProofError::NoSolver(program.to_owned()))?;
        let compiler = CedarSymCompiler::new(solver)?;
        Ok(Self { compiler, wishes: wishes(workloads) })
    }

    /// How decisions differ between two policies of one service, for every action that there is now.
    pub async fn compare(
        &mut self,
        before: Option<&ServicePolicy>,
        after: &ServicePolicy,
    ) -> Result<Vec<Change>, ProofError> {
        let (schema, now) = after.cedar().map_err(ProofError::Failed)?;
        let none = PolicySet::new();
        let before = before.map(ServicePolicy::cedar).transpose().map_err(ProofError::Failed)?;
        let then = before.as_ref().map_or(&none, |(_, then)| then);
        let mut changes = Vec::new();
        for env in ordered(schema) {
            let compiled = CompiledPolicySet::compile(&now, &env, schema)?;
            let (then, earlier, incomparable) = match CompiledPolicySet::compile(then, &env, schema) {
                Ok(compiled) => (then, compiled, None),
                // Said of policies that name what is no more.
                Err(error) => {
                    let why = ProofError::from(error).to_string();
                    (&none, CompiledPolicySet::compile(&none, &env, schema)?, Some(why))
                }
            };
            let opened = self.only((&now, &compiled), (then, &earlier), &env, schema).await?;
            let closed = self.only((then, &earlier), (&now, &compiled), &env, schema).await?;
            let verdict = match (&opened, &closed) {
                (None, None) => Verdict::Equivalent,
                (None, Some(_)) => Verdict::Narrower,
                (Some(_), None) => Verdict::Widened,
                (Some(_), Some(_)) => Verdict::Changed,
            };
            changes.push(Change {
                service: after.name().to_owned(),
                action: env.action().id().unescaped().to_owned(),
                principal: env.principal().to_string(),
                object: env.resource().to_string(),
                verdict,
                opened,
                closed,
                incomparable,
            });
        }
        Ok(changes)
    }

    /// A request that the first allows and the second does not.
    async fn only(
        &mut self,
        (set, compiled): (&PolicySet, &CompiledPolicySet),
        (other, without): (&PolicySet, &CompiledPolicySet),
        env: &RequestEnv,
        schema: &Schema,
    ) -> Result<Option<Witness>, ProofError> {
        let found = self.compiler.check_implies_with_counterexample_opt(compiled, without).await?;
        let Some(found) = found else { return Ok(None) };
        for restricted in self.restricted(set, env, schema) {
            let among = self.compiler.check_implies_with_counterexample_opt(&restricted, without).await?;
            if let Some(among) = among {
                return Witness::of(&among, set, other, true).map(Some);
            }
        }
        Witness::of(&found, set, other, env.principal().to_string() != WORKLOAD).map(Some)
    }

    /// Whether no policy of `services` allows what `invariant` forbids; if one does, a request that shows it, and of
    /// which service.
    pub async fn never<'a>(
        &mut self,
        invariant: &Invariant,
        services: impl IntoIterator<Item = &'a Arc<ServicePolicy>>,
    ) -> Result<Option<(String, Witness)>, ProofError> {
        let permit = turned(&invariant.policy)?;
        let mut forbidden = PolicySet::new();
        forbidden.add(permit).map_err(|error| ProofError::Failed(error.to_string()))?;
        let mut asked = false;
        for service in services {
            let (schema, set) = service.cedar().map_err(ProofError::Failed)?;
            let set = &set;
            for env in ordered(schema) {
                // It speaks of another service's actions or objects.
                let Ok(never) = CompiledPolicySet::compile(&forbidden, &env, schema) else { continue };
                asked = true;
                let compiled = CompiledPolicySet::compile(set, &env, schema)?;
                let broken = self.compiler.check_disjoint_with_counterexample_opt(&compiled, &never).await?;
                let Some(broken) = broken else { continue };
                let none = PolicySet::new();
                for restricted in self.restricted(set, &env, schema) {
                    let among =
                        self.compiler.check_disjoint_with_counterexample_opt(&restricted, &never).await?;
                    if let Some(among) = among {
                        let witness = Witness::of(&among, set, &none, true)?;
                        return Ok(Some((service.name().to_owned(), witness)));
                    }
                }
                let real = env.principal().to_string() != WORKLOAD;
                return Ok(Some((service.name().to_owned(), Witness::of(&broken, set, &none, real)?)));
            }
        }
        if asked { Ok(None) } else { Err(ProofError::AboutNothing(Arc::clone(&invariant.id))) }
    }

    /// The set with all that forbidden which is not as it is wished; wishes that do not fit this kind of request are
    /// none.
    fn restricted(&self, set: &PolicySet, env: &RequestEnv, schema: &Schema) -> Vec<CompiledPolicySet> {
        let each = |wish: &Policy| {
            let mut restricted = set.clone();
            restricted.add(wish.clone()).ok()?;
            CompiledPolicySet::compile(&restricted, env, schema).ok()
        };
        let of_workloads = env.principal().to_string() == WORKLOAD;
        self.wishes.iter().filter(|_| of_workloads).filter_map(each).collect()
    }
}

/// Every kind of request, in an order that stays.
fn ordered(schema: &Schema) -> Vec<RequestEnv> {
    let mut envs: Vec<RequestEnv> = schema.request_envs().collect();
    let key = |env: &RequestEnv| {
        (env.action().to_string(), env.principal().to_string(), env.resource().to_string())
    };
    envs.sort_by_cached_key(key);
    let mut seen = BTreeSet::new();
    envs.retain(|env| seen.insert(key(env)));
    envs
}

/// Forbids everybody but these workloads, as they are; first for a user whom everybody knows, then for any.
fn wishes(workloads: &[(String, SpiffeId)]) -> Vec<Policy> {
    if workloads.is_empty() || workloads.len() > MAX_WORKLOADS {
        return Vec::new();
    }
    let each = |(service, id): &(String, SpiffeId)| {
        format!(
            "(principal == {WORKLOAD}::{:?} && principal.service == {service:?} && principal.trust_domain == {:?})",
            id.as_str(),
            id.trust_domain().as_str()
        )
    };
    let them: Vec<String> = workloads.iter().map(each).collect();
    let them = them.join(" || ");
    let alice = "if context has user then context.user.id == \"alice\" else true";
    [format!("({them}) && ({alice})"), them]
        .iter()
        .filter_map(|wish| {
            let text = format!("forbid (principal, action, resource) unless {{ {wish} }};");
            Policy::parse(Some(PolicyId::new("(as it is wished)")), text).ok()
        })
        .collect()
}

/// The permit of what a policy forbids.
fn turned(policy: &Policy) -> Result<Policy, ProofError> {
    let failed = |error: &dyn std::fmt::Display| ProofError::Failed(error.to_string());
    if policy.effect() == Effect::Permit {
        return Ok(policy.clone());
    }
    let mut json = policy.to_json().map_err(|error| failed(&error))?;
    if let Some(effect) = json.get_mut("effect") {
        *effect = "permit".into();
    }
    Policy::from_json(Some(policy.id().clone()), json).map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests;
