//! Cedar itself: what a decision means. [`Shared::ask`] is the specification of every other way to decide.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use cedar_policy::{
    AuthorizationError, Authorizer, Decision, Entities, Entity, EntityUid, PolicyId, PolicySet, Request,
};

use crate::decide::Shared;
use crate::engine::Ruling;
use crate::forms::Form;
use crate::object::{AttributeValue, ObjectRef};
use crate::record::cut;
use crate::schema::{self, ObjectType};
use crate::verdict::{Caller, Principal};

/// Said of a policy that there is not.
const UNKNOWN: &str = "there is no such policy";

/// What Cedar is asked about one object.
pub(crate) struct Question {
    pub(crate) request: Request,
    pub(crate) entities: Entities,
}

/// The policies that Cedar is asked about, by their place in the order of the files. One whose scope does not fit
/// neither decides nor fails: those whose scope fits answer for all, and so do they with any others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Panel(BTreeMap<usize, Result<Arc<Form>, String>>);

impl FromIterator<(usize, Result<Arc<Form>, String>)> for Panel {
    fn from_iter<T: IntoIterator<Item = (usize, Result<Arc<Form>, String>)>>(forms: T) -> Self {
        Self(forms.into_iter().collect())
    }
}

impl Panel {
    /// With those of another one.
    pub(crate) fn and(mut self, other: &Self) -> Self {
        self.0.extend(other.0.iter().map(|(at, form)| (*at, form.clone())));
        self
    }
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

    /// These policies.
    pub(crate) fn panel(&self, places: impl IntoIterator<Item = usize>) -> Panel {
        places.into_iter().map(|at| (at, self.form(at))).collect()
    }

    /// All policies, or some that have their turn.
    pub(crate) fn panel_in_turn(&self) -> Panel {
        let glance = |at: usize| self.forms.glance(at, self.entries.get(at).ok_or(UNKNOWN)?);
        self.shadow.beside(self.entries.len()).map(|at| (at, glance(at))).collect()
    }

    /// A policy as Cedar has it.
    pub(crate) fn form(&self, at: usize) -> Result<Arc<Form>, String> {
        self.forms.get(at, self.entries.get(at).ok_or(UNKNOWN)?)
    }

    pub(crate) fn ask(&self, question: &Question, panel: &Panel) -> Answer {
        let Question { request, entities } = question;
        let mut set = PolicySet::new();
        for (at, form) in &panel.0 {
            let added = form
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|form| set.add(form.policy.clone()).map_err(|error| error.to_string()));
            // None that was read when it was loaded; a forbid that is not there would allow.
            if let Err(failure) = added {
                return Answer { ruling: Ruling::Failed(*at), failure: Some(failure) };
            }
        }
        let response = Authorizer::new().is_authorized(request, &set, entities);
        let diagnostics = response.diagnostics();
        let place = |id: &PolicyId| {
            let is =
                |form: &Result<Arc<Form>, String>| form.as_ref().is_ok_and(|form| form.policy.id() == id);
            panel.0.iter().find(|(_, form)| is(form)).map(|(at, _)| *at)
        };
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
