//! Registrations: which process gets which SPIFFE ID.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use identity::{SpiffeId, TrustDomain};

use crate::authority::{MAX_NAMES, is_dns_name};
use crate::hex;
use crate::pb;

/// Most entries control holds: what one message to an agent can carry with room to spare.
pub const MAX_ENTRIES: usize = 100_000;

/// Shortest lifetime of an SVID: below it, rotation would be the mesh's main occupation.
pub const MIN_SVID_TTL: Duration = Duration::from_secs(5);

/// Path under which the mesh's own processes live whose IDs control gives by other means than entries.
const AGENT_PREFIX: &str = "/palisade/agent/";
const CONTROL_PATH: &str = "/palisade/control";
/// Who signs policies: control, by an identity that nobody else is issued.
pub(crate) const POLICY_PATH: &str = "/palisade/policy";

/// One registration. All its selectors must match (AND); several entries may name one ID.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The identity given.
    pub id: SpiffeId,
    /// What the process must be.
    pub selectors: Selectors,
    /// DNS names in its certificates, lower case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
    /// Addresses in its certificates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<IpAddr>,
    /// Lifetime of its SVIDs; absent, control's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
    /// The hosts it applies to; absent, every host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<String>>,
}

/// What a process must be to match. At least one is set; those that are set must all hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selectors {
    /// User id of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Group id of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Absolute path of its executable, as `/proc/PID/exe` resolves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// SHA-256 of its executable's contents, 64 lower-case hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// What is wrong with an entry.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EntryError {
    /// Not of this trust domain.
    #[error("the entry for {0} is outside the trust domain")]
    TrustDomain(SpiffeId),
    /// An ID that no entry may give.
    #[error("the entry for {0} names control or an agent, whose identities do not come from entries")]
    Reserved(SpiffeId),
    /// It would match every process.
    #[error("the entry for {0} has no selector and would match every process")]
    NoSelector(SpiffeId),
    /// A selector that can never match.
    #[error("the entry for {id} has a malformed selector: {what}")]
    Selector {
        /// Whose entry.
        id: SpiffeId,
        /// What about it.
        what: &'static str,
    },
    /// A DNS name that is not one, or too many names.
    #[error("the entry for {0} has a malformed DNS name or more than {MAX_NAMES} names")]
    Names(SpiffeId),
    /// A lifetime below [`MIN_SVID_TTL`].
    #[error("the entry for {0} has a lifetime under {least} s", least = MIN_SVID_TTL.as_secs())]
    Ttl(SpiffeId),
    /// An empty or malformed list of hosts.
    #[error("the entry for {0} names no host or a malformed one")]
    Hosts(SpiffeId),
    /// Over [`MAX_ENTRIES`].
    #[error("more than {MAX_ENTRIES} entries")]
    TooMany,
}

impl Entry {
    fn check(&self, trust_domain: &TrustDomain) -> Result<(), EntryError> {
        let id = || self.id.clone();
        if self.id.trust_domain() != trust_domain {
            return Err(EntryError::TrustDomain(id()));
        }
        if [CONTROL_PATH, POLICY_PATH].contains(&self.id.path()) || self.id.path().starts_with(AGENT_PREFIX) {
            return Err(EntryError::Reserved(id()));
        }
        if self.selectors == Selectors::default() {
            return Err(EntryError::NoSelector(id()));
        }
        self.selectors.check().map_err(|what| EntryError::Selector { id: id(), what })?;
        if self.dns.len() + self.ips.len() > MAX_NAMES || !self.dns.iter().all(|name| is_dns_name(name)) {
            return Err(EntryError::Names(id()));
        }
        if self.ttl.is_some_and(|ttl| ttl < MIN_SVID_TTL) {
            return Err(EntryError::Ttl(id()));
        }
        let hosts = self.hosts.as_deref();
        if hosts
            .is_some_and(|hosts| hosts.is_empty() || !hosts.iter().all(|host| is_host(trust_domain, host)))
        {
            return Err(EntryError::Hosts(id()));
        }
        Ok(())
    }

    /// Whether the entry is for this host.
    pub(crate) fn applies_to(&self, host: &str) -> bool {
        self.hosts.as_ref().is_none_or(|hosts| hosts.iter().any(|name| name == host))
    }

    /// A name for the entry in this very form.
    fn entry_id(&self) -> String {
        // Serialisation of a struct of plain fields cannot fail; were it to, all such entries would
        // share one name and the set would hold one of them: fewer identities, never a wrong one.
        let text = serde_json::to_vec(self).unwrap_or_default();
        hex::sha256(&text).chars().take(32).collect()
    }
}

impl Selectors {
    fn check(&self) -> Result<(), &'static str> {
        if self.path.as_deref().is_some_and(|path| !path.is_absolute() || path.to_str().is_none()) {
            return Err("the path must be absolute and UTF-8");
        }
        let digest =
            |text: &str| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if self.sha256.as_deref().is_some_and(|text| !digest(text)) {
            return Err("the SHA-256 must be 64 lower-case hexadecimal digits");
        }
        Ok(())
    }

    /// Which selectors the attributes fail, by name; empty when all that are set hold.
    pub(crate) fn mismatches(&self, found: Attributes<'_>) -> Vec<&'static str> {
        let fails = |name, fails: bool| fails.then_some(name);
        [
            fails("uid", self.uid.is_some_and(|uid| uid != found.uid)),
            fails("gid", self.gid.is_some_and(|gid| gid != found.gid)),
            fails("path", self.path.as_deref().is_some_and(|path| Some(path) != found.path)),
            fails("sha256", self.sha256.as_deref().is_some_and(|digest| Some(digest) != found.sha256)),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// How many are set: the more, the more particular.
    pub(crate) fn count(&self) -> usize {
        [self.uid.is_some(), self.gid.is_some(), self.path.is_some(), self.sha256.is_some()]
            .into_iter()
            .filter(|set| *set)
            .count()
    }

    /// The selectors that are set, for logs.
    pub(crate) fn describe(&self) -> String {
        let mut parts = Vec::new();
        if let Some(uid) = self.uid {
            parts.push(format!("uid={uid}"));
        }
        if let Some(gid) = self.gid {
            parts.push(format!("gid={gid}"));
        }
        if let Some(path) = &self.path {
            parts.push(format!("path={}", path.display()));
        }
        if let Some(digest) = &self.sha256 {
            parts.push(format!("sha256={digest}"));
        }
        parts.join(" ")
    }
}

/// What attestation found out about a process. What could not be found out matches no selector.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes<'a> {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) path: Option<&'a Path>,
    pub(crate) sha256: Option<&'a str>,
}

/// Whether `host` can be the last segment of an agent's ID.
pub(crate) fn is_host(trust_domain: &TrustDomain, host: &str) -> bool {
    !host.contains('/') && agent_id(trust_domain, host).is_some()
}

/// `spiffe://TD/palisade/agent/HOST`.
pub(crate) fn agent_id(trust_domain: &TrustDomain, host: &str) -> Option<SpiffeId> {
    trust_domain.workload(&format!("{AGENT_PREFIX}{host}")).ok()
}

/// `spiffe://TD/palisade/control`.
pub(crate) fn control_id(trust_domain: &TrustDomain) -> Option<SpiffeId> {
    trust_domain.workload(CONTROL_PATH).ok()
}

/// The host that an agent's ID names. `None` for anything that is not an agent of this trust domain.
pub(crate) fn host_of<'a>(trust_domain: &TrustDomain, id: &'a SpiffeId) -> Option<&'a str> {
    if id.trust_domain() != trust_domain {
        return None;
    }
    id.path().strip_prefix(AGENT_PREFIX).filter(|host| !host.contains('/'))
}

/// All entries, checked, by their own name. Replaced whole.
#[derive(Debug, Default)]
pub(crate) struct EntrySet {
    /// Rises at every replacement.
    pub(crate) sequence: u64,
    pub(crate) by_id: BTreeMap<String, Arc<Entry>>,
}

impl EntrySet {
    /// Checks every entry; one bad entry refuses the whole set, so that nothing is half changed.
    pub(crate) fn new(
        sequence: u64,
        trust_domain: &TrustDomain,
        entries: Vec<Entry>,
    ) -> Result<Self, EntryError> {
        if entries.len() > MAX_ENTRIES {
            return Err(EntryError::TooMany);
        }
        let mut by_id = BTreeMap::new();
        for entry in entries {
            entry.check(trust_domain)?;
            by_id.insert(entry.entry_id(), Arc::new(entry));
        }
        Ok(Self { sequence, by_id })
    }

    /// The entry of this name, if it is for this host.
    pub(crate) fn for_host(&self, host: &str, entry_id: &str) -> Option<&Arc<Entry>> {
        self.by_id.get(entry_id).filter(|entry| entry.applies_to(host))
    }

    /// What an agent on `host` is told.
    pub(crate) fn view(&self, host: &str) -> Vec<pb::control::Entry> {
        self.by_id
            .iter()
            .filter(|(_, entry)| entry.applies_to(host))
            .map(|(entry_id, entry)| pb::control::Entry {
                entry_id: entry_id.clone(),
                spiffe_id: entry.id.to_string(),
                uid: entry.selectors.uid,
                gid: entry.selectors.gid,
                path: entry.selectors.path.as_deref().and_then(Path::to_str).map(str::to_owned),
                sha256: entry.selectors.sha256.clone(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> TrustDomain {
        TrustDomain::new("bank.example").unwrap()
    }

    fn entry(id: &str) -> Entry {
        Entry {
            id: SpiffeId::new(id).unwrap(),
            selectors: Selectors { uid: Some(7), ..Selectors::default() },
            dns: vec![],
            ips: vec![],
            ttl: None,
            hosts: None,
        }
    }

    fn refused(entry: Entry) -> EntryError {
        EntrySet::new(1, &domain(), vec![entry]).unwrap_err()
    }

    #[test]
    fn entries_outside_the_trust_domain_or_for_the_authority_itself_are_refused() {
        let foreign = "spiffe://bank.example.evil/service/web";
        assert!(matches!(refused(entry(foreign)), EntryError::TrustDomain(_)));
        for reserved in
            ["spiffe://bank.example/palisade/control", "spiffe://bank.example/palisade/agent/host-1"]
        {
            assert!(matches!(refused(entry(reserved)), EntryError::Reserved(_)));
        }
    }

    #[test]
    fn an_entry_that_matches_everything_or_nothing_is_refused() {
        let web = "spiffe://bank.example/service/web";
        let none = Entry { selectors: Selectors::default(), ..entry(web) };
        assert!(matches!(refused(none), EntryError::NoSelector(_)));
        for selectors in [
            Selectors { path: Some("bin/web".into()), ..Selectors::default() },
            Selectors { sha256: Some("AB".repeat(32)), ..Selectors::default() },
            Selectors { sha256: Some("ab".into()), ..Selectors::default() },
        ] {
            assert!(matches!(refused(Entry { selectors, ..entry(web) }), EntryError::Selector { .. }));
        }
        assert!(matches!(refused(Entry { hosts: Some(vec![]), ..entry(web) }), EntryError::Hosts(_)));
        assert!(matches!(
            refused(Entry { hosts: Some(vec!["a/b".into()]), ..entry(web) }),
            EntryError::Hosts(_)
        ));
        assert!(matches!(
            refused(Entry { ttl: Some(Duration::from_secs(1)), ..entry(web) }),
            EntryError::Ttl(_)
        ));
        assert!(matches!(refused(Entry { dns: vec!["Web".into()], ..entry(web) }), EntryError::Names(_)));
    }

    #[test]
    fn a_host_sees_its_own_entries_only() {
        let mut here = entry("spiffe://bank.example/service/web");
        here.hosts = Some(vec!["here".into()]);
        let everywhere = entry("spiffe://bank.example/service/accounts");
        let set = EntrySet::new(1, &domain(), vec![here, everywhere]).unwrap();
        assert_eq!(set.view("here").len(), 2);
        let elsewhere = set.view("elsewhere");
        assert_eq!(elsewhere.len(), 1);
        assert_eq!(elsewhere[0].spiffe_id, "spiffe://bank.example/service/accounts");
        let hidden = set.view("here").into_iter().find(|entry| entry.spiffe_id.ends_with("web")).unwrap();
        assert!(set.for_host("here", &hidden.entry_id).is_some());
        assert!(set.for_host("elsewhere", &hidden.entry_id).is_none());
    }

    #[test]
    fn every_selector_that_is_set_must_hold() {
        let digest = "a".repeat(64);
        let found = Attributes { uid: 7, gid: 8, path: Some(Path::new("/bin/web")), sha256: Some(&digest) };
        let all = Selectors {
            uid: Some(7),
            gid: Some(8),
            path: Some("/bin/web".into()),
            sha256: Some("a".repeat(64)),
        };
        assert!(all.mismatches(found).is_empty());
        assert_eq!(Selectors { uid: Some(0), ..all.clone() }.mismatches(found), ["uid"]);
        assert_eq!(Selectors { gid: Some(0), ..all.clone() }.mismatches(found), ["gid"]);
        assert_eq!(Selectors { path: Some("/bin/web2".into()), ..all.clone() }.mismatches(found), ["path"]);
        assert_eq!(Selectors { sha256: Some("b".repeat(64)), ..all.clone() }.mismatches(found), ["sha256"]);
        let unknown = Attributes { path: None, sha256: None, ..found };
        assert_eq!(all.mismatches(unknown), ["path", "sha256"], "what is not known does not match");
    }

    #[test]
    fn an_agents_id_names_one_host() {
        let domain = domain();
        let id = agent_id(&domain, "host-1").unwrap();
        assert_eq!(host_of(&domain, &id), Some("host-1"));
        for other in ["spiffe://bank.example/palisade/agent/a/b", "spiffe://bank.example/service/web"] {
            assert_eq!(host_of(&domain, &SpiffeId::new(other).unwrap()), None);
        }
        assert_eq!(host_of(&domain, &SpiffeId::new("spiffe://x/palisade/agent/a").unwrap()), None);
    }
}
