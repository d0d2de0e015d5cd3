//! A sidecar's copy of its service's relations, from control by its agent.

use std::sync::Arc;
use std::time::Duration;

use ca::relations::{Replica, Update};
use identity::Scope;
use sidecar::Sidecar;
use sidecar::relations::Relations;

use crate::workload::Workload;

/// Keeps what the sidecar decides by up to date, while its policy asks for relations, until `scope` drains.
pub(crate) fn follow(workload: &Workload, sidecar: &Sidecar, scope: &Scope) {
    let relations = sidecar.relations();
    let wanted = relations.wanted();
    let (socket, clock) = (workload.mesh.agent.socket.clone(), Arc::clone(&workload.clock));
    ca::relations::follow(socket, Kept(relations), wanted, clock, scope);
}

struct Kept(Arc<Relations>);

impl Replica for Kept {
    fn take(&self, update: Update) -> Result<(), String> {
        let Update { epoch, revision, after, changed } = update;
        let changed = changed.into_iter().map(|changed| (changed.kind, changed.id, changed.attributes));
        self.0.take(&epoch, revision, after, changed)
    }

    fn as_of(&self, time: Duration) {
        self.0.as_of(time);
    }
}
