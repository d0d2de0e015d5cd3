//! The policy that decides now, and what stands in its place while there is none.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use identity::TrustDomain;

use crate::decide::ServicePolicy;
use crate::load::Policies;
use crate::problem::Problems;

static DECIDED: AtomicU64 = AtomicU64::new(0);
static DENIED: AtomicU64 = AtomicU64::new(0);

/// How many decisions this process has made by policies since it started, and how many of them were denials, in audit
/// mode too.
pub fn decision_counts() -> (u64, u64) {
    (DECIDED.load(Ordering::Relaxed), DENIED.load(Ordering::Relaxed))
}

pub(crate) fn decided(denied: bool) {
    DECIDED.fetch_add(1, Ordering::Relaxed);
    if denied {
        DENIED.fetch_add(1, Ordering::Relaxed);
    }
}

/// The policy of one service that is in force, and can be replaced while it decides. Cheap to clone.
#[derive(Debug, Clone)]
pub struct InForce(Arc<ArcSwap<ServicePolicy>>);

impl From<Arc<ServicePolicy>> for InForce {
    fn from(policy: Arc<ServicePolicy>) -> Self {
        Self(Arc::new(ArcSwap::new(policy)))
    }
}

impl InForce {
    /// The one of now: a request is judged by one, from its beginning to its end.
    pub fn current(&self) -> Arc<ServicePolicy> {
        self.0.load_full()
    }

    /// Puts another one in force.
    pub fn replace(&self, policy: Arc<ServicePolicy>) {
        self.0.store(policy);
    }
}

/// Why nothing is allowed, whatever policies would say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withheld {
    /// No policies have come yet.
    NotReceived,
    /// They have been in force for longer than they may be (`max_age`).
    Expired,
}

impl Withheld {
    /// The built-in rule that denies.
    pub fn rule(self) -> &'static str {
        match self {
            Self::NotReceived => "policy.not_received",
            Self::Expired => "policy.expired",
        }
    }

    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::NotReceived => "no policies have been received yet",
            Self::Expired => "the policies have not been signed anew for longer than their max_age",
        }
    }
}

/// What an empty policy is read from. It decides nothing: it is withheld.
const EMPTY: [(&str, &str); 2] = [
    (
        "mesh.cedarschema",
        "namespace Mesh {
  entity Workload = { service: String, trust_domain: String };
  entity Client;
  type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };
  type Context = { user?: User, chain: Set<String>, now: Long };
}
",
    ),
    ("map.toml", "mapping = \"none\"\n"),
];

impl ServicePolicy {
    /// Stands in the place of a service's policy until that has come, and denies everything.
    ///
    /// # Errors
    /// Never, but for a defect of Palisade's.
    pub fn not_received(service: &str, trust_domain: &TrustDomain) -> Result<Arc<Self>, Problems> {
        let [mesh, map] = EMPTY.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()));
        let schema = "namespace Unknown {\n  entity Thing;\n  action Act appliesTo { principal: [Mesh::Workload], resource: [Thing], context: Mesh::Context };\n}\n";
        let policies = "@id(\"nothing\")\nforbid (principal is Mesh::Workload, action, resource);\n";
        let of = |name: &str, text: &str| (format!("services/{service}/{name}"), text.as_bytes().to_vec());
        let files = BTreeMap::from([
            mesh,
            (format!("services/{service}/{}", map.0), map.1),
            of("unknown.cedarschema", schema),
            of("unknown.cedar", policies),
        ]);
        let read = Policies::from_files(&files, Path::new("nothing"), None, trust_domain)?;
        let policy = read.service(service).ok_or_else(Problems::default)?;
        Ok(Arc::new(policy.withhold(Withheld::NotReceived)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_not_come_denies() {
        let domain = TrustDomain::new("bank.example").unwrap();
        let policy = ServicePolicy::not_received("web", &domain).unwrap();
        let (parts, ()) = http::Request::get("/accounts/17").body(()).unwrap().into_parts();
        assert_eq!(policy.map(&parts).unwrap_err().rule(), "policy.not_received");
    }
}
