//! Cedar itself: what a decision means. [`Shared::ask`] is the specification of every other way to decide.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use cedar_policy::{AuthorizationError, Authorizer, Decision, Entities, Entity, EntityUid, Request};

use crate::decide::Shared;
use crate::object::{AttributeValue, ObjectRef};
use crate::record::cut;
use crate::schema::{self, ObjectType};
use crate::verdict::{Caller, Principal};

/// What Cedar is asked about one object.
pub(crate) struct Question {
    pub(crate) request: Request,
    pub(crate) entities: Entities,
}

/// What Cedar answered; policies by their place in the order of the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Permitted(usize),
    Denied { rule: Option<usize>, reason: String },
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
            Some(user) => Some(schema::user_record(user).ok_or("the user cannot be described")?),
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

    pub(crate) fn ask(&self, question: &Question) -> Answer {
        let response = Authorizer::new().is_authorized(&question.request, &self.set, &question.entities);
        let diagnostics = response.diagnostics();
        // Cedar skips a policy whose evaluation fails. Skipping a forbid would allow, so any failure denies.
        // The set keeps the order of the files, so of several failures the first in them is named.
        if let Some(error) = diagnostics.errors().next() {
            let AuthorizationError::PolicyEvaluationError(failed) = error;
            let rule = self.by_id.get(failed.policy_id()).copied();
            return Answer::Denied { rule, reason: cut(&format!("evaluating a policy failed: {error}")) };
        }
        // Several may agree: the first in the files is named.
        let first = diagnostics.reason().filter_map(|id| self.by_id.get(id)).min().copied();
        match (response.decision(), first) {
            (Decision::Allow, Some(rule)) => Answer::Permitted(rule),
            (Decision::Deny, Some(rule)) => {
                Answer::Denied { rule: Some(rule), reason: "a policy forbids it".into() }
            }
            (_, None) => Answer::Denied { rule: None, reason: "no policy permits it".into() },
        }
    }
}
