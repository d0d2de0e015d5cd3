//! Batches of which a caller may not have all: where a route says `batch = "filter"`, what is denied is taken out of the
//! request, and the rest goes on.
//!
//! Only a request that was denied comes here: one that is permitted as a whole costs nothing more.

use std::collections::HashSet;

use crate::body::{self, BodyRule};
use crate::decide::ServicePolicy;
use crate::engine::Ruling;
use crate::judge::{Asked, MISSING};
use crate::object::{Attributes, ObjectRef, Relations};
use crate::record::{Mode, Outcome, Rule};
use crate::request::{Mapped, Refusal};
use crate::verdict::{Caller, Denial, Occasion, Permit, Verdict};

/// What is left of a batch.
#[derive(Debug)]
pub struct Kept {
    /// Leave to pass it on. It is to be recorded always: it says what was left out.
    pub permit: Permit,
    /// The request as it is now.
    pub mapped: Mapped,
    /// Its body, or its message without the five bytes before it: of the list without what was denied, all else as it was.
    pub body: Vec<u8>,
}

impl ServicePolicy {
    /// What is left of a batch that was denied, if it is one of which the denied objects are to be left out. `body` named
    /// its objects. What is left is decided about as a request of its own: what was judged is what is passed on.
    ///
    /// # Errors
    /// The denial, if the route does not say so, in audit mode, if it is no object that is denied, and if none is left.
    pub fn keep(
        &self,
        denial: Denial,
        body: &[u8],
        caller: &Caller,
        mapped: &Mapped,
        attributes: &Attributes,
        occasion: &Occasion<'_>,
    ) -> Result<Kept, Denial> {
        let is_enforced = denial.status() == 403 && denial.0.mode == Mode::Enforce;
        if !(mapped.route.filters && is_enforced && is_about_objects(denial.rule())) {
            return Err(denial);
        }
        let (attributes, absent) = known(attributes);
        let asked = Asked {
            caller,
            action: mapped.action(),
            objects: mapped.objects(),
            attributes: &attributes,
            mapped: Some(mapped),
        };
        let mut denied_by = Vec::with_capacity(mapped.objects().len());
        for (at, object) in mapped.objects().iter().enumerate() {
            denied_by.push(match absent.contains(object) {
                true => Some(Rule::Builtin(MISSING.into())),
                false => self.denied_by(&asked, (at, object), occasion)?,
            });
        }
        if denied_by.iter().all(Option::is_some) {
            return Err(denial);
        }
        let objects = mapped.objects().iter().zip(&denied_by);
        let denied = objects.filter(|(_, rule)| rule.is_some()).map(|(object, _)| object.id()).collect();
        let (mapped_anew, body) = match mapped.without(&denied, body) {
            Ok(kept) => kept,
            Err(refusal) => return Err(self.refuse(Some(caller), refusal, occasion)),
        };
        let permit = match self.decide(caller, &mapped_anew, &attributes, occasion) {
            Verdict::Permit(permit) => permit,
            Verdict::Deny(denial) => return Err(denial),
        };
        let mut record = permit.record(caller, mapped, &attributes, occasion);
        record.reason = format!("permitted, but for {} of {} objects", denied.len(), denied_by.len());
        record.explanation = denial.0.explanation;
        for (object, rule) in record.objects.iter_mut().zip(denied_by) {
            if rule.is_some() {
                (object.outcome, object.left_out_by) = (Some(Outcome::Deny), rule);
            }
        }
        Ok(Kept { permit: Permit::filtered(record), mapped: mapped_anew, body })
    }

    /// What denies one object of a batch, if something does.
    ///
    /// # Errors
    /// What denies the request whatever its objects are.
    fn denied_by(
        &self,
        asked: &Asked<'_>,
        (at, object): (usize, &ObjectRef),
        occasion: &Occasion<'_>,
    ) -> Result<Option<Rule>, Denial> {
        let schema = &self.shared().schema;
        if let (Some(action), Some(kind)) =
            (schema.actions.get(asked.action), schema.types.get(object.kind()))
            && let Some(ruling) = self.rule_swiftly(asked, action, (at, object), kind, occasion.now)
        {
            return Ok(match ruling {
                Ruling::Permitted(_) => None,
                denied => Some(self.rule_of(denied).clone()),
            });
        }
        let one = asked.mapped.map(|mapped| mapped.only(at));
        let objects = std::slice::from_ref(object);
        match self.weigh(&Asked { objects, mapped: one.as_ref(), ..*asked }, occasion, false) {
            Verdict::Permit(_) => Ok(None),
            Verdict::Deny(denial) if is_about_objects(denial.rule()) => Ok(Some(denial.0.rule)),
            Verdict::Deny(denial) => Err(denial),
        }
    }
}

/// Whether a rule denies objects, and not the request as such.
fn is_about_objects(rule: &Rule) -> bool {
    match rule {
        Rule::Policy { .. } | Rule::Absent => true,
        Rule::Builtin(name) => name == MISSING,
    }
}

/// What there is to decide by, and the objects that the pushed relations do not have.
fn known(attributes: &Attributes) -> (Attributes, HashSet<ObjectRef>) {
    let mut known = attributes.clone();
    let absent = match &attributes.relations {
        Relations::Lacking { revision, objects } => {
            known.relations = Relations::Told(*revision);
            objects.iter().cloned().collect()
        }
        _ => HashSet::new(),
    };
    (known, absent)
}

impl Mapped {
    /// The request, and its body, without the elements of its list that name these.
    fn without(&self, denied: &HashSet<&str>, body: &[u8]) -> Result<(Self, Vec<u8>), Refusal> {
        let kept: Vec<bool> =
            self.listed().map(|id| id.is_some_and(|id| !denied.contains(id.as_str()))).collect();
        let is_kept = |at: usize| kept.get(at).copied().unwrap_or_default();
        let shorter = match (self.route.body, &self.route.message) {
            (BodyRule::Json { .. }, _) => body::keep_items(&self.route.members, body, is_kept),
            (BodyRule::Grpc { .. }, Some(message)) => message.keep_elements(body, is_kept),
            _ => Err("the body has no list".to_owned()),
        };
        let shorter = shorter.map_err(|reason| Refusal::malformed("request.body", reason).on(&self.route))?;
        Ok((self.clone().with_body(&shorter)?, shorter))
    }
}

#[cfg(test)]
mod tests;
