//! What is wrong, worst first.

use crate::model::{DecisionRow, Overview, PoliciesRow, Verdict};
use crate::when;

/// An SVID rotates at about half its lifetime; the shortest life in use is two minutes. One this close
/// to its end has missed its rotation.
const IDENTITY_WARN_S: u64 = 30;
/// Time to plan: the authority's end is the end of every identity under it.
const AUTHORITY_WARN_S: u64 = 7 * 86_400;
/// A connected agent counts as seen now; this long without one is an agent that is gone.
const NODE_SILENT_S: u64 = 120;
/// Older denials are history, to be found in the list.
const DENIAL_RECENT_S: u64 = 600;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Severity {
    /// Calls fail now.
    Broken,
    /// Calls will fail, or somebody is being refused.
    Attention,
}

/// One thing that is wrong, with where to look next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) severity: Severity,
    pub(crate) what: String,
    pub(crate) next: String,
    /// A page with more, if there is one.
    pub(crate) link: Option<String>,
}

/// Everything that is wrong: what is broken first, then what will break, then who is being refused.
pub(crate) fn findings(overview: &Overview, recent: &[DecisionRow], now: u64) -> Vec<Finding> {
    let mut found = Vec::new();
    authority(overview, now, &mut found);
    let mut identities: Vec<_> = overview.identities.iter().collect();
    identities.sort_by(|a, b| (a.expires, &a.spiffe_id).cmp(&(b.expires, &b.spiffe_id)));
    for identity in identities {
        let id = short(&identity.spiffe_id, &overview.trust_domain);
        if identity.expires <= now {
            found.push(Finding {
                severity: Severity::Broken,
                what: format!("The identity of {id} expired {} ago", when::span(now - identity.expires)),
                next: "Its calls are refused; is its agent running and connected to control?".to_owned(),
                link: None,
            });
        } else if identity.expires - now < IDENTITY_WARN_S {
            found.push(Finding {
                severity: Severity::Attention,
                what: format!(
                    "The identity of {id} ends in {} and has not been renewed",
                    when::span(identity.expires - now)
                ),
                // Whoever asks once and ends, as `palisade id fetch` does, looks the same from here.
                next:
                    "Its process has ended, or its agent should have renewed it by now: see the agent's log"
                        .to_owned(),
                link: None,
            });
        }
    }
    for node in &overview.nodes {
        if now.saturating_sub(node.last_seen) > NODE_SILENT_S {
            found.push(Finding {
                severity: Severity::Attention,
                what: format!(
                    "Nothing heard from the agent on {} for {}",
                    node.host,
                    when::span(now - node.last_seen)
                ),
                next: "Identities on that host live on until they expire; start its agent".to_owned(),
                link: None,
            });
        }
    }
    if let Some(policies) = &overview.policies {
        policies_of(policies, &mut found);
    }
    denials(recent, &overview.trust_domain, now, &mut found);
    // Stable: within a severity the order above holds.
    found.sort_by_key(|finding| finding.severity);
    found
}

fn authority(overview: &Overview, now: u64, found: &mut Vec<Finding>) {
    let ends = overview.authority_expires;
    if ends <= now {
        found.push(Finding {
            severity: Severity::Broken,
            what: format!(
                "The authority of {} expired {} ago",
                overview.trust_domain,
                when::span(now - ends)
            ),
            next: "No identity under it is valid; rotate the authority".to_owned(),
            link: None,
        });
    } else if ends - now < AUTHORITY_WARN_S {
        found.push(Finding {
            severity: Severity::Attention,
            what: format!("The authority of {} ends in {}", overview.trust_domain, when::span(ends - now)),
            next: "Rotate it before then: no identity outlives it".to_owned(),
            link: None,
        });
    }
}

fn policies_of(policies: &PoliciesRow, found: &mut Vec<Finding>) {
    let mut say = |severity, what: String, next: &str| {
        found.push(Finding { severity, what, next: next.to_owned(), link: None });
    };
    let short = |hash: &str| hash.chars().take(12).collect::<String>();
    if let Some(problem) = &policies.problem {
        let next = "The policies before stay in force; mend it in the repository";
        say(Severity::Attention, format!("The newest commit of policies is not taken: {problem}"), next);
    }
    if let Some((commit, reason)) = &policies.stopped {
        let next = "The ones before are in force again; the next commit sets out anew";
        say(
            Severity::Attention,
            format!("The policies of {} were taken back: {reason}", short(commit)),
            next,
        );
    }
    for holder in &policies.holders {
        let (who, host) = (&holder.service, &holder.host);
        if let Some(refused) = &holder.refused {
            let next = "What was in force there stays so; is it another version of Palisade?";
            say(Severity::Attention, format!("{who} on {host} does not take policies: {refused}"), next);
        } else if !holder.has_some {
            let next = "Everything is denied there until they come; see its log and its agent's";
            say(Severity::Broken, format!("{who} on {host} has no policies"), next);
        }
    }
}

/// Denials of one caller for one action are one finding, however many there were.
fn denials(recent: &[DecisionRow], trust_domain: &str, now: u64, found: &mut Vec<Finding>) {
    let mut groups: Vec<(&DecisionRow, u64)> = Vec::new();
    for row in recent.iter().filter(|row| row.verdict == Verdict::Denied) {
        if now.saturating_sub(row.time_ms / 1_000) > DENIAL_RECENT_S {
            continue;
        }
        let same = |other: &DecisionRow| {
            (&other.service, &other.principal, &other.user, &other.action)
                == (&row.service, &row.principal, &row.user, &row.action)
        };
        match groups.iter_mut().find(|(first, _)| same(first)) {
            Some((_, count)) => *count += 1,
            None => groups.push((row, 1)),
        }
    }
    for (row, count) in groups {
        let principal = short(&row.principal, trust_domain);
        let times = if count == 1 { String::new() } else { format!(", {count} times") };
        let user = row.user.as_deref().map(|user| format!(" for {user}")).unwrap_or_default();
        found.push(Finding {
            severity: Severity::Attention,
            what: format!("{} denied {} to {principal}{user}{times}", capital(&row.service), row.action),
            next: row.reason.clone(),
            link: Some(format!("/decisions/{}", row.receipt)),
        });
    }
}

/// A SPIFFE ID of the own trust domain by its path; any other in full.
fn short<'a>(id: &'a str, trust_domain: &str) -> &'a str {
    id.strip_prefix("spiffe://")
        .and_then(|rest| rest.strip_prefix(trust_domain))
        .and_then(|rest| rest.strip_prefix('/'))
        .unwrap_or(id)
}

/// Findings are sentences.
fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{IdentityRow, NodeRow};

    const NOW: u64 = 1_000_000;

    fn overview() -> Overview {
        Overview {
            trust_domain: "bank.example".to_owned(),
            authority_expires: NOW + 100 * 86_400,
            identities: vec![IdentityRow {
                spiffe_id: "spiffe://bank.example/service/web".to_owned(),
                serial: "0a".to_owned(),
                expires: NOW + 60,
                why: String::new(),
            }],
            nodes: vec![NodeRow {
                host: "one".to_owned(),
                spiffe_id: "spiffe://bank.example/palisade/agent/one".to_owned(),
                last_seen: NOW,
            }],
            allowed: 1,
            denied: 0,
            policies: None,
        }
    }

    fn denial(receipt: &str, age_s: u64) -> DecisionRow {
        DecisionRow {
            receipt: receipt.to_owned(),
            time_ms: (NOW - age_s) * 1_000,
            service: "accounts".to_owned(),
            verdict: Verdict::Denied,
            principal: "spiffe://bank.example/service/web".to_owned(),
            user: Some("alice".to_owned()),
            action: "ReadAccount".to_owned(),
            objects: vec!["Account::\"42\"".to_owned()],
            rule: None,
            reason: "alice does not own it".to_owned(),
        }
    }

    #[test]
    fn a_healthy_mesh_has_no_findings() {
        assert_eq!(findings(&overview(), &[], NOW), []);
    }

    #[test]
    fn what_is_broken_comes_before_what_will_break() {
        let mut wrong = overview();
        wrong.authority_expires = NOW + 86_400;
        wrong.identities[0].expires = NOW - 5;
        wrong.nodes[0].last_seen = NOW - NODE_SILENT_S - 1;
        let found = findings(&wrong, &[denial("r1", 5)], NOW);
        let shown: Vec<_> = found.iter().map(|f| (f.severity, f.what.as_str())).collect();
        assert_eq!(
            shown,
            [
                (Severity::Broken, "The identity of service/web expired 5 s ago"),
                (Severity::Attention, "The authority of bank.example ends in 1 d 0 h"),
                (Severity::Attention, "Nothing heard from the agent on one for 2 min 1 s"),
                (Severity::Attention, "Accounts denied ReadAccount to service/web for alice"),
            ]
        );
    }

    #[test]
    fn an_identity_at_its_very_end_counts_as_expired() {
        let mut wrong = overview();
        wrong.identities[0].expires = NOW;
        assert_eq!(findings(&wrong, &[], NOW)[0].severity, Severity::Broken);
        wrong.identities[0].expires = NOW + IDENTITY_WARN_S - 1;
        assert_eq!(findings(&wrong, &[], NOW)[0].severity, Severity::Attention);
        wrong.identities[0].expires = NOW + IDENTITY_WARN_S;
        assert_eq!(findings(&wrong, &[], NOW), []);
    }

    #[test]
    fn an_identity_of_another_trust_domain_is_named_in_full() {
        assert_eq!(short("spiffe://bank.example/service/web", "bank.example"), "service/web");
        for other in ["spiffe://bank.example.evil/service/web", "spiffe://other/service/web", "bank-cli"] {
            assert_eq!(short(other, "bank.example"), other);
        }
    }

    #[test]
    fn repeated_denials_are_one_finding_and_old_ones_none() {
        let rows = [denial("r3", 1), denial("r2", 2), denial("r1", DENIAL_RECENT_S + 1)];
        let found = findings(&overview(), &rows, NOW);
        assert_eq!(found.len(), 1);
        assert!(found[0].what.ends_with(", 2 times"));
        assert_eq!(found[0].link.as_deref(), Some("/decisions/r3"));
    }

    #[test]
    fn policies_that_are_not_taken_or_not_there_are_said() {
        let holder = |service: &str, has_some, refused: Option<&str>| crate::model::HolderRow {
            service: service.to_owned(),
            host: "one".to_owned(),
            name: format!("{service}#1"),
            commit: None,
            has_some,
            as_wanted: has_some,
            refused: refused.map(str::to_owned),
        };
        let policies = PoliciesRow {
            stopped: Some(("c".repeat(40), "too many were denied".to_owned())),
            problem: Some("web.cedar:3: unexpected end".to_owned()),
            holders: vec![
                holder("web", true, None),
                holder("accounts", false, None),
                holder("vault", true, Some("epoch 7: unknown key")),
            ],
            ..PoliciesRow::default()
        };
        let found = findings(&Overview { policies: Some(policies), ..overview() }, &[], NOW);
        let told: Vec<&str> = found.iter().map(|finding| finding.what.as_str()).collect();
        assert_eq!(
            told,
            [
                "accounts on one has no policies",
                "The newest commit of policies is not taken: web.cedar:3: unexpected end",
                "The policies of cccccccccccc were taken back: too many were denied",
                "vault on one does not take policies: epoch 7: unknown key",
            ]
        );
    }
}
