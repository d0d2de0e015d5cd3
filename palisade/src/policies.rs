//! The policies that a process decides by: from its disk, or from control by its agent.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ca::policies::{Files, Following, Holder};
use ca::release::Release;
use identity::{IdentitySource, Scope, TrustDomain};
use policy::{Mapping, Mode, Policies, ServicePolicy, Withheld, decision_counts};
use tokio::sync::watch;

use crate::failure::Failure;
use crate::mesh::{self, AppProtocol};
use crate::workload::{self, Workload};

/// One service's policy as it is now, and every later one.
pub(crate) type Current = watch::Receiver<Arc<ServicePolicy>>;

/// What is heard of a service's policies.
#[derive(Debug, Clone)]
pub(crate) struct Followed {
    pub(crate) current: Current,
    /// Whether control has not been heard for long.
    pub(crate) stale: watch::Receiver<bool>,
}

/// The policy of a service before anything has been heard of control: that on disk, where control hands none out.
///
/// # Errors
/// What is wrong with those on disk.
pub(crate) fn at_start(workload: &Workload, service: &str) -> Result<Arc<ServicePolicy>, Failure> {
    if workload.mesh.policy.is_none() {
        return workload.policy(service);
    }
    let nothing = ServicePolicy::not_received(service, &workload.mesh.mesh.trust_domain);
    nothing.map_err(|problems| Failure::problems("the policy of the time before policies", problems.0))
}

/// Follows the policy of `service`, where control hands policies out: what comes is told, and `None` else. A sidecar
/// before an `app` takes no policy for another protocol than the app's; who names its objects itself takes any.
pub(crate) fn follow(
    workload: &Workload,
    service: &str,
    source: &IdentitySource,
    now: Arc<ServicePolicy>,
    app: Option<AppProtocol>,
    scope: &Scope,
) -> Option<Followed> {
    workload.mesh.policy.as_ref()?;
    let ((sender, current), (stale_sender, stale)) = (watch::channel(now), watch::channel(false));
    let trust_domain = workload.mesh.mesh.trust_domain.clone();
    let following = Following {
        socket: workload.mesh.agent.socket.clone(),
        service: service.to_owned(),
        trust_domain: trust_domain.clone(),
        source: source.clone(),
    };
    let is_service = workload.mesh.service.values().any(|known| known.policies.as_str() == service);
    let audits = is_service && workload.mesh.mesh.mode == mesh::Mode::Audit;
    let decider = Decider {
        service: service.to_owned(),
        trust_domain,
        audits,
        app,
        current: sender,
        stale: stale_sender,
    };
    ca::policies::follow(following, decider, Arc::clone(&workload.clock), scope);
    Some(Followed { current, stale })
}

/// What a process waits for before it is ready.
pub(crate) fn awaited(followed: &Option<Followed>) -> Option<Current> {
    followed.as_ref().map(|followed| followed.current.clone())
}

/// Calls `put` with every policy that comes, and `stale` when they may be old and when no longer, until `scope` drains.
pub(crate) fn apply(
    followed: Option<Followed>,
    put: impl Fn(Arc<ServicePolicy>) + Send + 'static,
    stale: impl Fn(bool) + Send + 'static,
    scope: &Scope,
) {
    let Some(Followed { mut current, stale: mut may_be_old }) = followed else { return };
    let draining = scope.clone();
    scope.spawn("policies in force", async move {
        current.mark_changed();
        loop {
            tokio::select! {
                changed = current.changed() => if changed.is_err() { return },
                changed = may_be_old.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    stale(*may_be_old.borrow_and_update());
                    continue;
                }
                () = draining.draining() => return,
            }
            let policy = current.borrow_and_update().clone();
            put(policy);
        }
    });
}

struct Decider {
    service: String,
    trust_domain: TrustDomain,
    /// Whether the mesh as a whole enforces nothing.
    audits: bool,
    app: Option<AppProtocol>,
    current: watch::Sender<Arc<ServicePolicy>>,
    stale: watch::Sender<bool>,
}

impl Holder for Decider {
    type Read = Arc<ServicePolicy>;

    fn read(&self, release: &Release, files: &Files) -> Result<Self::Read, String> {
        let name = Path::new(&self.service);
        let read = Policies::from_files(files, name, Some(&release.commit), &self.trust_domain);
        let policies = read.map_err(|problems| {
            let told = problems.0.iter().map(ToString::to_string);
            told.collect::<Vec<_>>().join("; ")
        })?;
        let policy = policies.service(&self.service).ok_or("there is none for this service")?;
        self.app.map_or(Ok(()), |app| fitting(app, policy.mapping()))?;
        Ok(if self.audits { Arc::new(policy.with_mode(Mode::Audit)) } else { policy })
    }

    fn put_in_force(&self, _release: &Release, read: Self::Read) -> Duration {
        let lifetime = read.max_age();
        self.current.send_replace(read);
        lifetime
    }

    fn expired(&self) {
        self.current.send_modify(|policy| *policy = Arc::new(policy.withhold(Withheld::Expired)));
    }

    fn decisions(&self) -> (u64, u64) {
        decision_counts()
    }

    fn stale(&self, stale: bool) {
        if self.stale.send_replace(stale) == stale {
            return;
        }
        if stale {
            tracing::warn!("the agent has not heard control for a minute: policies may be old");
        } else {
            tracing::info!("the agent hears control again");
        }
    }
}

/// What a sidecar takes before an app that speaks this.
fn fitting(app: AppProtocol, mapping: Mapping) -> Result<(), &'static str> {
    if app.fits(mapping) {
        return Ok(());
    }
    Err(match mapping {
        Mapping::Routes | Mapping::None => "its map maps requests, and the service's app_protocol is another",
        Mapping::Tcp => "its map says mapping = \"tcp\", and the service's app_protocol does not",
        Mapping::Kafka => "its map says mapping = \"kafka\", and the service's app_protocol does not",
    })
}

/// What a process on SIGHUP has to say where policies come by themselves.
pub(crate) const BY_CONTROL: &str = "serves; policies come from control";

/// Reads the policy of `service` from disk again and puts it in force; says how that went.
pub(crate) fn reload(mesh: &mesh::Mesh, service: &str, put: impl FnOnce(Arc<ServicePolicy>)) -> String {
    if mesh.policy.is_some() {
        return BY_CONTROL.to_owned();
    }
    replace(workload::policy(mesh, service), put)
}

/// Puts a policy in force, and says how that went. One that is wrong changes nothing: what was in force stays so, and
/// the log says what is wrong.
pub(crate) fn replace(
    read: Result<Arc<ServicePolicy>, Failure>,
    put: impl FnOnce(Arc<ServicePolicy>),
) -> String {
    match read {
        Ok(policy) => {
            tracing::info!(version = %policy.version(), "policies reloaded");
            put(policy);
            "serves; policies reloaded".to_owned()
        }
        Err(failure) => {
            tracing::error!(
                reason = failure.message,
                problems = ?failure.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "policies not reloaded; the ones before stay in force"
            );
            format!("serves; policies not reloaded: {}", failure.message)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use identity::clock::SystemClock;
    use identity::testing::TestAuthority;

    use super::*;
    use crate::readiness::{Awaited, Readiness};

    const POLICY: &str = "@id(\"read\")\npermit (principal is Mesh::Workload, action, resource);\n";
    const SCHEMA: &str = "namespace Shop {\n  entity Order;\n  action Read appliesTo { principal: [Mesh::Workload], \
        resource: [Order], context: Mesh::Context };\n}\n";
    const MAP: &str =
        "[[route]]\nmatch = \"GET /orders/{id:int}\"\naction = \"Read\"\nobject = 'Order::\"{id}\"'\n";

    fn domain() -> TrustDomain {
        TrustDomain::new("bank.example").unwrap()
    }

    fn release() -> Release {
        let (service, commit, manifest) = ("shop".to_owned(), "c1".to_owned(), String::new());
        Release { service, epoch: 1, floor: 0, commit, signed: Duration::ZERO, manifest }
    }

    fn files(more: &[(&str, &str)]) -> Files {
        let mesh = include_str!("../../examples/bank/policies/mesh.cedarschema");
        let of_shop =
            [("shop.cedarschema", SCHEMA), ("map.toml", MAP), ("shop.cedar", POLICY)].iter().chain(more);
        let named = of_shop.map(|(name, text)| (format!("services/shop/{name}"), text.as_bytes().to_vec()));
        let mut files: BTreeMap<_, _> = named.collect();
        files.insert("mesh.cedarschema".to_owned(), mesh.as_bytes().to_vec());
        files
    }

    fn decider() -> (Decider, Current) {
        let nothing = ServicePolicy::not_received("shop", &domain()).unwrap();
        let ((current, follower), (stale, _)) = (watch::channel(nothing), watch::channel(false));
        let (service, app) = ("shop".to_owned(), None);
        (Decider { service, trust_domain: domain(), audits: false, app, current, stale }, follower)
    }

    #[test]
    fn policy_36_38_a_release_with_a_part_that_is_not_known_is_refused_and_says_which() {
        let (decider, current) = decider();
        let good = decider.read(&release(), &files(&[])).unwrap();
        decider.put_in_force(&release(), good);
        let version = current.borrow().version().to_string();
        let key = format!("{MAP}upgrade_to_come = \"quic\"\n");
        let template = "@id(\"t\")\npermit (principal == ?principal, action, resource in ?resource);\n";
        for (part, why) in [
            (("map.toml", &key[..]), "unknown key `upgrade_to_come`"),
            (("map.toml", "mapping = \"quic\"\n"), "services/shop/map.toml:1:"),
            (("quotas.toml", "[quota]\n"), "services/shop/quotas.toml"),
            (
                ("more.cedar", "@id(\"x\")\nallow (principal, action, resource);\n"),
                "services/shop/more.cedar:2:",
            ),
            (("more.cedar", template), "a template"),
        ] {
            let refused = decider.read(&release(), &files(&[part])).unwrap_err();
            assert!(refused.contains(why), "wanted {why}: {refused}");
        }
        assert_eq!(current.borrow().version().to_string(), version);
    }

    #[tokio::test]
    async fn policy_39_without_policies_a_process_is_not_ready_and_says_so() {
        let authority = TestAuthority::new("bank.example");
        let (decider, current) = decider();
        let readiness = Readiness::Identity(Awaited {
            source: authority.source("/service/shop"),
            id: None,
            giver: "the agent".to_owned(),
            clock: SystemClock::shared(),
            policies: Some(current.clone()),
        });
        assert_eq!(readiness.missing().as_deref(), Some("no policies have come from the agent"));
        let read = decider.read(&release(), &files(&[])).unwrap();
        decider.put_in_force(&release(), read);
        assert_eq!(readiness.missing(), None);
        // Too old: it denies by that, and has been ready.
        decider.expired();
        assert_eq!((readiness.missing(), current.borrow().withheld()), (None, Some(Withheld::Expired)));
    }
}
