//! Control follows the repository of policies, and offers what is committed there.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use ca::control::{
    ControlHandle, PoliciesConfig, PolicyOffer, Replayed, Replayer, Ring, Rings, Schema, Schemas,
};
use ca::model::StoredDecision;
use ca::policies::Files;
use ca::relations::{Attributes, Object};
use identity::clock::SharedClock;
use identity::{Scope, TrustDomain};
use policy::{DecisionRecord, Outcome, Policies, ServicePolicy};

use crate::mesh::{Mesh, Own, PolicySource};
use crate::repository::Repository;

/// Whose policies control hands out, where it does.
pub(super) fn config(mesh: &Mesh) -> Option<PoliciesConfig> {
    mesh.policy.as_ref()?;
    let mut services: HashMap<_, _> =
        mesh.service.values().map(|service| (service.id.clone(), service.policies.to_string())).collect();
    let own = [(Own::Gateway, gateway::gateway::SERVICE), (Own::Vault, secrets::POLICY_SERVICE)];
    services.extend(own.into_iter().filter_map(|(own, name)| Some((mesh.own_id(own)?, name.to_owned()))));
    let trust_domain = mesh.mesh.trust_domain.clone();
    let reader = Arc::new(Reader { trust_domain });
    Some(PoliciesConfig { services, replayer: Some(Arc::clone(&reader) as _), schemas: Some(reader) })
}

/// Offers every new commit, until `scope` drains.
pub(super) fn follow(
    source: PolicySource,
    state: &Path,
    trust_domain: TrustDomain,
    control: ControlHandle,
    clock: SharedClock,
    scope: &Scope,
) {
    let every = source.every;
    let repository = Repository::new(source, state, Arc::clone(&clock));
    let draining = scope.clone();
    scope.spawn_critical("repository of policies", async move {
        let mut follower = Follower { repository, trust_domain, control, unreadable: None, problem: None };
        loop {
            tokio::select! {
                () = follower.look() => {}
                () = draining.draining() => return,
            }
            tokio::select! {
                () = clock.sleep(every) => {}
                () = draining.draining() => return,
            }
        }
    });
}

struct Follower {
    repository: Repository,
    trust_domain: TrustDomain,
    control: ControlHandle,
    /// The last commit that cannot be read, and why: that stays so.
    unreadable: Option<(String, String)>,
    /// What was wrong when this was looked at last, so that it is logged once.
    problem: Option<String>,
}

/// Why a commit is not offered.
enum NotOffered {
    /// It will never be.
    Unreadable(String),
    /// It is tried again: what stands in its way may go.
    Now(String),
}

impl Follower {
    async fn look(&mut self) {
        let problem = match self.repository.head().await {
            Ok(head) => self.take(head).await.err(),
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = problem.as_ref().filter(|_| problem != self.problem) {
            tracing::error!(why, "policies are not put out; the ones before stay in force");
        }
        self.problem.clone_from(&problem);
        self.control.policy_source(problem);
    }

    /// Offers a commit, if it is a new one.
    async fn take(&mut self, head: String) -> Result<(), String> {
        let offered = self.control.policy_head().await.map_err(|error| error.to_string())?;
        if offered.as_ref() == Some(&head) {
            return Ok(());
        }
        if let Some((_, why)) = self.unreadable.as_ref().filter(|(commit, _)| *commit == head) {
            return Err(why.clone());
        }
        match self.offer(head.clone()).await {
            Ok(()) => Ok(()),
            Err(NotOffered::Now(why)) => Err(why),
            Err(NotOffered::Unreadable(why)) => {
                self.unreadable = Some((head, why.clone()));
                Err(why)
            }
        }
    }

    async fn offer(&self, commit: String) -> Result<(), NotOffered> {
        let now = |error: &dyn std::error::Error| NotOffered::Now(error.to_string());
        self.repository.check_signature(&commit).await.map_err(|error| now(&error))?;
        let files = self.repository.files(&commit).await.map_err(|error| now(&error))?;
        let (of, trust_domain) = (commit.clone(), self.trust_domain.clone());
        // Ten thousand policies take seconds.
        let read = tokio::task::spawn_blocking(move || {
            let short: String = of.chars().take(12).collect();
            let policies = Policies::from_files(&files, Path::new(&short), Some(&of), &trust_domain);
            policies.map(|policies| (rings(policies.rings()), files)).map_err(|problems| said(&problems.0))
        });
        let read = read.await.map_err(|_| NotOffered::Now("reading it failed".to_owned()))?;
        let (rings, files) = read.map_err(NotOffered::Unreadable)?;
        let offer = PolicyOffer { commit, services: policy::slices(&files), rings };
        self.control.offer_policies(offer).await.map(|_epoch| ()).map_err(|error| now(&error))
    }
}

/// The first problems, a line each without its hint: `policy check` says all of it.
fn said(problems: &[policy::Problem]) -> String {
    const SHOWN: usize = 3;
    let lines = problems.iter().take(SHOWN).map(ToString::to_string);
    let lines = lines.map(|problem| problem.lines().next().unwrap_or_default().to_owned());
    let more = problems.len().saturating_sub(SHOWN);
    let more = (more > 0).then(|| format!("and {more} more problems"));
    lines.chain(more).collect::<Vec<_>>().join("; ")
}

fn rings(written: &policy::Rings) -> Rings {
    let ring = |ring: &policy::Ring| match ring {
        policy::Ring::Shadow => Ring::Shadow,
        policy::Ring::Share(share) => Ring::Share(*share),
    };
    Rings {
        rings: written.rings.iter().map(ring).collect(),
        hold: written.hold,
        max_denied: written.max_denied,
    }
}

/// Reads policies for control: to decide recorded requests again, for a ring in the shadow, and to hold relations against
/// the schema.
#[derive(Debug)]
struct Reader {
    trust_domain: TrustDomain,
}

impl Reader {
    fn policies(&self, services: &BTreeMap<String, Files>) -> Result<Arc<Policies>, String> {
        let all: Files =
            services.values().flatten().map(|(name, file)| (name.clone(), file.clone())).collect();
        self.read(&all)
    }

    fn read(&self, files: &Files) -> Result<Arc<Policies>, String> {
        let read = Policies::from_files(files, Path::new("policies"), None, &self.trust_domain);
        read.map_err(|problems| said(&problems.0))
    }
}

impl Schemas for Reader {
    fn read(&self, service: &str, files: &Files) -> Result<Arc<dyn Schema>, String> {
        let policies = self.read(files)?;
        let policy = policies.service(service).ok_or("there are none for this service")?;
        Ok(Arc::new(OfPolicy(policy)))
    }
}

struct OfPolicy(Arc<ServicePolicy>);

impl fmt::Debug for OfPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the schema of {}", self.0.version())
    }
}

impl Schema for OfPolicy {
    fn check(&self, object: &Object, attributes: &Attributes) -> Result<(), String> {
        self.0.check_relation(object.kind(), attributes.as_map())
    }
}

impl Replayer for Reader {
    fn replay(
        &self,
        decisions: &[StoredDecision],
        before: &BTreeMap<String, Files>,
        after: &BTreeMap<String, Files>,
    ) -> Result<BTreeMap<String, Replayed>, String> {
        let (before, after) = (self.policies(before)?, self.policies(after)?);
        let mut services: BTreeMap<String, Replayed> = BTreeMap::new();
        for decision in decisions {
            // What another version has recorded, and this one cannot read, is left out.
            let Ok(record) = serde_json::from_value::<DecisionRecord>(decision.json.clone()) else {
                continue;
            };
            let by = |policies: &Policies| policies.service(&record.service)?.replay(&record);
            let (Some(then), Some(now)) = (by(&before), by(&after)) else { continue };
            let replayed = services.entry(record.service.to_string()).or_default();
            replayed.decided += 1;
            if (then.outcome, now.outcome) != (Outcome::Permit, Outcome::Deny) {
                continue;
            }
            replayed.newly_denied += 1;
            if replayed.example.is_none() {
                let text = |part: &Option<String>| part.clone().unwrap_or_default();
                let (caller, action) = (text(&record.principal), text(&record.action));
                replayed.example = Some(format!(
                    "{caller} may no longer {action} at {} (receipt {})",
                    record.service, record.receipt
                ));
            }
        }
        Ok(services)
    }
}
