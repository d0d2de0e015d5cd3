//! What needs a solver: it is started where there is one, and where there is none that is said with a way out.

use std::path::Path;

use policy::{Policies, Problem};
use prove::{ProofError, Prover, SOLVER_VARIABLE};

use crate::failure::Failure;
use crate::mesh::Mesh;

/// Runs `question` with a solver that knows the mesh's workloads; the inner error is why there is none.
pub(super) fn with_solver<T>(
    mesh: &Mesh,
    question: impl AsyncFnOnce(&mut Prover) -> Result<T, ProofError>,
) -> Result<Result<T, String>, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new("cannot start the runtime").because(&error))?;
    let answer = runtime.block_on(async {
        let mut prover = Prover::start(&workloads(mesh))?;
        question(&mut prover).await
    });
    match answer {
        Ok(answer) => Ok(Ok(answer)),
        Err(error @ ProofError::NoSolver(_)) => Ok(Err(format!(
            "{error}; install cvc5 (Debian: apt-get install cvc5), or name it by the environment variable {SOLVER_VARIABLE}"
        ))),
        Err(error) => Err(Failure::new("the policies could not be proved").because(&error)),
    }
}

/// Every workload that can be a caller, by the name that policies see and by its identity.
fn workloads(mesh: &Mesh) -> Vec<(String, identity::SpiffeId)> {
    let seen = |id: &identity::SpiffeId| {
        let path = id.path().trim_start_matches('/');
        path.strip_prefix("service/").unwrap_or(path).to_owned()
    };
    mesh.registrations().into_iter().map(|known| (seen(&known.id), known.id)).collect()
}

/// Proves that no policies allow what an invariant forbids. One that cannot be proved for want of a solver fails too:
/// nobody is to believe that it holds.
pub(super) fn invariants(mesh: &Mesh, policies: &Policies) -> Result<usize, Failure> {
    let invariants = policies.invariants();
    if invariants.is_empty() {
        return Ok(0);
    }
    let directory = &mesh.mesh.policies;
    let broken = with_solver(mesh, async |prover: &mut Prover| {
        let mut broken = Vec::new();
        for invariant in invariants {
            let message = match prover.never(invariant, policies.services()).await {
                Ok(None) => continue,
                Ok(Some((service, witness))) => {
                    let by = witness.allowed_by.join(", ");
                    format!(
                        "the invariant `{}` does not hold: {service} allows {witness}, by {by}",
                        invariant.id
                    )
                }
                Err(error @ ProofError::AboutNothing(_)) => error.to_string(),
                Err(error) => return Err(error),
            };
            broken.push(at(&directory.join(&*invariant.file), invariant.line, message));
        }
        Ok(broken)
    })?;
    match broken {
        Ok(broken) if broken.is_empty() => Ok(invariants.len()),
        Ok(broken) => Err(Failure { problems: broken, ..Failure::new("not every invariant holds") }),
        Err(missing) => Err(Failure::new(format!("the invariants are not proved: {missing}"))),
    }
}

/// A problem with the policy that begins on `line` of `file`.
fn at(file: &Path, line: usize, message: String) -> Problem {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let end = text.get(start..).and_then(|rest| rest.find(';')).map_or(start, |end| start + end + 1);
    Problem::at(file, &text, start..end, message)
}
