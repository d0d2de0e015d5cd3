//! Cedar itself: what a decision means. [`Shared::ask`] is the specification of every other way to decide.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use cedar_policy::{
    AuthorizationError, Authorizer, Decision, Entities, Entity, EntityUid, PolicySet, Request,
};

use crate::decide::Shared;
use crate::engine::Ruling;
use crate::object::{AttributeValue, ObjectRef};
use crate::record::cut;
use crate::schema::{self, ObjectType};
use crate::verdict::{Caller, Principal};

/// What Cedar is asked about one object.
pub(crate) struct Question {
    pub(crate) request: Request,
    pub(crate) entities: Entities,
}

/// Which policies Cedar is asked about.
pub(crate) enum Panel {
    All,
    /// By their place in the order of the files, in that order. A policy whose scope does not fit neither decides
    /// nor fails, so those whose scope fits answer for all.
    Some(Vec<usize>),
}

/// What Cedar answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) ruling: Ruling,
    /// What it says of a failure.
    failure: Option<String>,
}

impl Answer {
    /// For the operator.
    pub(crate) fn reason(&self) -> String {
        match (&self.failure, self.ruling) {
            (Some(failure), _) => cut(&format!("evaluating a policy failed: {failure}")),
            (None, Ruling::Forbidden(_)) => "a policy forbids it".into(),
            (None, _) => "no policy permits it".into(),
        }
    }
}

impl Shared {
    pub(crate) fn question(
        &self,
        caller: &Caller,
        action: &EntityUid,
        object: &ObjectRef,
        kind: &ObjectType,
        attributes: &BTreeMap<String, AttributeValue>,
        now: Duration,
    ) -> Result<Question, String> {
        let types = &self.schema.principals;
        let principal = match &caller.principal {
            Principal::Workload(id) => {
                schema::workload_entity(types, id).ok_or("the caller cannot be described")?
            }
            Principal::Client(id) => schema::client_entity(types, id),
        };
        let values = attributes.iter().map(|(name, value)| (name.clone(), value.expression())).collect();
        let resource = Entity::new(schema::uid(&kind.name, object.id()), values, HashSet::new())
            .map_err(|error| error.to_string())?;
        let user = match &caller.user {
            Some(user) => {
                Some(schema::user_record(user, self.schema.user).ok_or("the user cannot be described")?)
            }
            None => None,
        };
        let now = i64::try_from(now.as_secs()).map_err(|error| error.to_string())?;
        let context = schema::context(user, caller.chain.iter().map(ToString::to_string), now)?;
        let schema = Some(&self.schema.schema);
        let request = Request::new(principal.uid(), action.clone(), resource.uid(), context, schema)
            .map_err(|error| error.to_string())?;
        let actions = self.schema.action_entities.clone();
        let entities =
            actions.add_entities([principal, resource], None).map_err(|error| error.to_string())?;
        Ok(Question { request, entities })
    }

    pub(crate) fn ask(&self, question: &Question, panel: &Panel) -> Answer {
        let Question { request, entities } = question;
        let response = match panel {
            Panel::All => Authorizer::new().is_authorized(request, &self.set, entities),
            Panel::Some(entries) => {
                let policies = entries.iter().filter_map(|entry| self.entries.get(*entry));
                match PolicySet::from_policies(policies.map(|entry| entry.policy.clone())) {
                    Ok(set) => Authorizer::new().is_authorized(request, &set, entities),
                    Err(_) => Authorizer::new().is_authorized(request, &self.set, entities),
                }
            }
        };
        let diagnostics = response.diagnostics();
        let place = |id| self.by_id.get(id).copied();
        // Cedar skips a policy whose evaluation fails. Skipping a forbid would allow, so any failure denies.
        // A set keeps its order, so of several failures the first in the files is named.
        if let Some(error) = diagnostics.errors().next() {
            let AuthorizationError::PolicyEvaluationError(failed) = error;
            let ruling = Ruling::Failed(place(failed.policy_id()).unwrap_or(usize::MAX));
            return Answer { ruling, failure: Some(error.to_string()) };
        }
        // Several may agree: the first in the files is named.
        let first = diagnostics.reason().filter_map(place).min();
        let ruling = match (response.decision(), first) {
            (Decision::Allow, Some(entry)) => Ruling::Permitted(entry),
            (Decision::Deny, Some(entry)) => Ruling::Forbidden(entry),
            (_, None) => Ruling::Unpermitted,
        };
        Answer { ruling, failure: None }
    }
}
