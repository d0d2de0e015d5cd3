//! What the console shows, read from control.

use std::fmt::Write as _;

use ca::control::ControlHandle;
use ca::model::{DecisionQuery, IssuedSvid, PoliciesStatus, RelationsStatus, StoredDecision};
use console::{
    DecisionDetail, DecisionRow, HolderRow, IdentityRow, NodeRow, Overview, PoliciesRow, ReadModel, Verdict,
};
use futures::future::BoxFuture;
use policy::{DecisionRecord, Outcome, Rule};
use tokio::sync::broadcast;

use crate::cmd::explain;

/// Decisions that the console's totals are counted from: what control answers at most at once.
const COUNTED: usize = 1000;

/// Control, as the console sees it.
pub(crate) struct Model {
    control: ControlHandle,
}

impl Model {
    pub(crate) fn new(control: ControlHandle) -> Self {
        Self { control }
    }

    async fn stored(&self, limit: usize) -> Vec<StoredDecision> {
        let query = DecisionQuery { limit: Some(limit), ..DecisionQuery::default() };
        match self.control.decisions(query).await {
            Ok(decisions) => decisions,
            Err(error) => {
                tracing::error!(%error, "the console cannot read decisions");
                Vec::new()
            }
        }
    }
}

impl ReadModel for Model {
    fn overview(&self) -> BoxFuture<'_, Overview> {
        Box::pin(async move {
            let status = match self.control.status().await {
                Ok(status) => status,
                Err(error) => {
                    tracing::error!(%error, "the console cannot read control's status");
                    return Overview::default();
                }
            };
            let recent = self.stored(COUNTED).await;
            let denied =
                recent.iter().filter(|decision| decision.verdict == crate::decisions::DENIED).count();
            Overview {
                trust_domain: status.trust_domain,
                authority_expires: status.authority.not_after,
                identities: newest(status.svids),
                nodes: status
                    .nodes
                    .into_iter()
                    .map(|node| NodeRow {
                        host: node.host,
                        spiffe_id: node.spiffe_id,
                        last_seen: node.last_seen.unwrap_or(node.joined),
                    })
                    .collect(),
                allowed: (recent.len() - denied) as u64,
                denied: denied as u64,
                policies: status.policies.map(policies),
            }
        })
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        Box::pin(async move {
            match self.control.status().await {
                Ok(status) => metrics(&status.relations),
                Err(error) => {
                    tracing::error!(%error, "the console cannot read control's status");
                    metrics(&[])
                }
            }
        })
    }

    fn decisions(&self, limit: usize) -> BoxFuture<'_, Vec<DecisionRow>> {
        Box::pin(async move { self.stored(limit).await.iter().filter_map(row).collect() })
    }

    fn decision(&self, receipt: &str) -> BoxFuture<'_, Option<DecisionDetail>> {
        let receipt = receipt.to_owned();
        Box::pin(async move {
            let stored = self.control.decision(&receipt).await.ok().flatten()?;
            Some(DecisionDetail {
                row: row(&stored)?,
                text: explain::text(&stored, policy::Style::Plain).ok()?,
            })
        })
    }

    fn changes(&self) -> broadcast::Receiver<u64> {
        self.control.subscribe()
    }
}

fn policies(status: PoliciesStatus) -> PoliciesRow {
    PoliciesRow {
        in_force: status.in_force.map(|epoch| (epoch.commit, epoch.offered)),
        rolling: status.rolling.map(|rolling| (rolling.epoch.commit, rolling.ring)),
        stopped: status.stopped.map(|stopped| (stopped.epoch.commit, stopped.reason)),
        problem: status.source_problem,
        holders: status
            .holders
            .into_iter()
            .map(|holder| HolderRow {
                has_some: holder.epoch > 0,
                as_wanted: holder.epoch == holder.wanted,
                service: holder.service,
                host: holder.host,
                name: holder.name,
                commit: holder.commit,
                refused: holder.refused,
            })
            .collect(),
    }
}

/// The last SVID of each identity on each host.
fn newest(mut svids: Vec<IssuedSvid>) -> Vec<IdentityRow> {
    svids.sort_by(|a, b| (&a.spiffe_id, &a.host, b.not_after).cmp(&(&b.spiffe_id, &b.host, a.not_after)));
    svids.dedup_by(|later, first| later.spiffe_id == first.spiffe_id && later.host == first.host);
    let rows = svids.into_iter().map(|svid| IdentityRow {
        spiffe_id: svid.spiffe_id,
        serial: svid.serial,
        expires: svid.not_after,
        why: svid.why,
    });
    rows.collect()
}

fn row(stored: &StoredDecision) -> Option<DecisionRow> {
    let record: DecisionRecord = serde_json::from_value(stored.json.clone()).ok()?;
    Some(DecisionRow {
        receipt: stored.receipt.clone(),
        time_ms: stored.time_ms,
        service: stored.service.clone(),
        verdict: match record.verdict {
            Outcome::Permit => Verdict::Allowed,
            Outcome::Deny => Verdict::Denied,
        },
        principal: record.principal.unwrap_or_else(|| "nobody".to_owned()),
        user: record.user.map(|user| user.id),
        action: record
            .action
            .unwrap_or_else(|| format!("{} {}", record.method, record.target).trim().to_owned()),
        objects: record.objects.into_iter().map(|object| object.object).collect(),
        rule: match &record.rule {
            Rule::Absent => None,
            rule => Some(rule.to_string()),
        },
        reason: record.reason,
    })
}

/// What control counts of relations. Services' names are words of mesh.toml and need no escapes.
fn metrics(relations: &[RelationsStatus]) -> String {
    type Reading = fn(&RelationsStatus) -> Option<u64>;
    let gauges: [(&str, &str, Reading); 5] = [
        ("objects", "Objects with relations", |store| Some(store.objects)),
        ("stored_bytes", "Bytes that they take", |store| Some(store.bytes)),
        ("revision", "Revision that was written last", |store| Some(store.revision)),
        ("readers", "Copies that are kept up to date", |store| Some(store.readers.len() as u64)),
        (
            "readers_oldest_timestamp_seconds",
            "When the copy that has been silent the longest was heard of",
            |store| store.readers.iter().map(|reader| reader.heard).min(),
        ),
    ];
    let mut text = String::new();
    for (name, help, reading) in gauges {
        // Writing to a String cannot fail.
        let _infallible = write!(
            text,
            "# HELP palisade_relations_{name} {help}.\n# TYPE palisade_relations_{name} gauge\n"
        );
        for store in relations {
            if let Some(value) = reading(store) {
                let service = &store.service;
                let _infallible =
                    writeln!(text, "palisade_relations_{name}{{service=\"{service}\"}} {value}");
            }
        }
    }
    text.push_str("# EOF\n");
    text
}

#[cfg(test)]
mod tests {
    use ca::model::RelationsReader;

    use super::*;

    #[test]
    fn of_each_identity_on_each_host_the_last_svid_is_shown() {
        let svid = |id: &str, host: &str, not_after| IssuedSvid {
            serial: format!("{id}{not_after}"),
            spiffe_id: id.into(),
            host: host.into(),
            why: String::new(),
            entry_id: String::new(),
            issued: 0,
            not_after,
        };
        let all = vec![
            svid("a", "h", 1),
            svid("b", "h", 5),
            svid("a", "h", 3),
            svid("a", "g", 2),
            svid("a", "h", 2),
        ];
        let shown: Vec<_> = newest(all).into_iter().map(|row| row.serial).collect();
        assert_eq!(shown, ["a2", "a3", "b5"]);
    }

    #[test]
    fn metrics_have_a_line_for_each_service() {
        let reader = |heard| RelationsReader {
            service: "accounts".into(),
            spiffe_id: "spiffe://bank.example/service/accounts".into(),
            host: "host-1".into(),
            revision: 7,
            heard,
        };
        let store = |service: &str, readers| RelationsStatus {
            service: service.into(),
            epoch: "e1".into(),
            revision: 7,
            objects: 2,
            bytes: 90,
            readers,
        };
        let text = metrics(&[
            store("accounts", vec![reader(1_800_000_005), reader(1_800_000_001)]),
            store("web", vec![]),
        ]);
        for line in [
            "# TYPE palisade_relations_objects gauge",
            "palisade_relations_objects{service=\"accounts\"} 2",
            "palisade_relations_stored_bytes{service=\"web\"} 90",
            "palisade_relations_revision{service=\"accounts\"} 7",
            "palisade_relations_readers{service=\"accounts\"} 2",
            "palisade_relations_readers_oldest_timestamp_seconds{service=\"accounts\"} 1800000001",
        ] {
            assert_eq!(text.lines().filter(|known| *known == line).count(), 1, "{line} in {text}");
        }
        assert!(!text.contains("oldest_timestamp_seconds{service=\"web\"}"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
