//! The decision about a question: by the engine where it can, by Cedar where it cannot or where it denies, by both
//! now and then.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::decide::{ServicePolicy, TRUST_DOMAIN};
use crate::engine::expr::{Scalar, Value};
use crate::engine::{Heard, Ruling, Values};
use crate::explain;
use crate::in_force;
use crate::map::{Claim, Source};
use crate::object::{AttributeType, AttributeValue, Attributes, ObjectRef, Relations};
use crate::plan::Told;
use crate::record::{Outcome, RecordedObject, Rule, cut};
use crate::relations;
use crate::request::Mapped;
use crate::schema::{Action, AttributeSpec, ObjectType};
use crate::shadow;
use crate::verdict::{Caller, Occasion, Permit, Understood, Verdict};

/// The engine and Cedar differ: a defect of Palisade's, which nobody gets through on.
pub(crate) const DISAGREEMENT: &str = "policy.disagreement";

/// An attribute that must be known is not.
pub(crate) const MISSING: &str = "attributes.missing";

/// A question in full: what [`ServicePolicy::decide`] and [`ServicePolicy::decide_object`] were asked.
pub(crate) struct Asked<'a> {
    pub(crate) caller: &'a Caller,
    pub(crate) action: &'a str,
    pub(crate) objects: &'a [ObjectRef],
    pub(crate) attributes: &'a Attributes,
    pub(crate) mapped: Option<&'a Mapped>,
}

impl<'a> Asked<'a> {
    pub(crate) fn understood(&self, objects: Vec<RecordedObject>) -> Understood<'_> {
        Understood { route: self.mapped.map(Mapped::route), action: self.action, objects }
    }

    /// The attributes of the `at`-th object in the order of its type, borrowed. `None` if one is not as the type wants
    /// it: what is wrong is for [`gather`] to say.
    fn values(&self, at: usize, object: &ObjectRef, kind: &ObjectType) -> Option<Values<'a>> {
        let told = self.attributes.of(object);
        let plan = self.mapped.map(|mapped| (mapped, mapped.route.plan.attributes.as_slice()));
        let mut values = Values::new();
        for (place, (name, spec)) in kind.attributes.iter().enumerate() {
            let (mapped, source) = match plan {
                Some((mapped, sources)) => (Some(mapped), *sources.get(place)?),
                None => (None, Told::App),
            };
            let value = match source {
                Told::App | Told::Stored => {
                    told.and_then(|told| told.get(name)).map(|value| admitted(*spec, value))
                }
                Told::Request(place) => mapped
                    .and_then(|mapped| mapped.told(place, spec.kind, at))
                    .map(|value| read(*spec, value)),
                Told::User(claim) => self.caller.user.as_deref().map(|user| {
                    let claim = match claim {
                        Claim::Subject => &user.id,
                        Claim::Issuer => &user.issuer,
                        Claim::Client => &user.client,
                    };
                    (spec.kind == AttributeType::Text).then_some(Value::Scalar(Scalar::Text(claim)))
                }),
                Told::Relations => {
                    let told = mapped.and_then(|mapped| mapped.route.relations.get(object, name));
                    told.map(|value| admitted(*spec, value))
                }
                Told::Nobody => None,
            };
            match value {
                Some(value) => values.push(Some(value?)),
                None if spec.required => return None,
                None => values.push(None),
            }
        }
        Some(values)
    }

    /// One attribute of one object, from where the route takes it.
    fn known(&self, at: usize, object: &ObjectRef, name: &str) -> Option<AttributeValue> {
        let Some(mapped) = self.mapped else { return self.attributes.get(object, name).cloned() };
        match mapped.route.attributes.get(name)? {
            (Source::Entities | Source::Response(_) | Source::Stored, _) => {
                self.attributes.get(object, name).cloned()
            }
            (Source::Relations, _) => mapped.route.relations.get(object, name).cloned(),
            (source, kind) => mapped.known_attribute(at, source, *kind, self.caller.user.as_deref()),
        }
    }

    /// Who told each of these attributes, by the route.
    pub(crate) fn told_by(&self, attributes: &BTreeMap<String, AttributeValue>) -> BTreeMap<String, String> {
        let Some(mapped) = self.mapped else { return BTreeMap::new() };
        let source = |name: &String| {
            let (source, _) = mapped.route.attributes.get(name)?;
            Some(match (source, &self.attributes.relations) {
                (Source::Stored, Relations::Told(Some(revision))) => {
                    (name.clone(), format!("{source} at revision {revision}"))
                }
                _ => (name.clone(), source.to_string()),
            })
        };
        attributes.keys().filter_map(source).collect()
    }

    /// At what the pushed relations were when they were asked, for whoever asks why they said nothing.
    fn as_of(&self) -> String {
        match self.attributes.relations {
            Relations::Told(Some(revision)) => format!(" (relations at revision {revision})"),
            _ => String::new(),
        }
    }

    /// Why the pushed relations cannot be decided by, if the route asks them: the rule, and in words. An object that they
    /// do not have is denied, also where nothing of it would have to be known.
    pub(crate) fn unusable(&self) -> Option<(&'static str, String)> {
        self.mapped.filter(|mapped| mapped.route.asks_relations())?;
        match &self.attributes.relations {
            Relations::Unusable(rule, reason) => Some((*rule, reason.clone())),
            Relations::Lacking { revision, objects } => {
                let flaw = objects.first().map(|object| relations::not_there(object, *revision));
                Some((MISSING, flaw.unwrap_or_default()))
            }
            Relations::NotAsked => Some((MISSING, "the relations were not asked".to_owned())),
            Relations::Told(_) => None,
        }
    }

    /// The attributes that the type declares, for the record, and what is wrong with them.
    pub(crate) fn gather(
        &self,
        at: usize,
        object: &ObjectRef,
        kind: &ObjectType,
    ) -> (BTreeMap<String, AttributeValue>, Option<String>) {
        let (mut attributes, mut flaw) = (BTreeMap::new(), None);
        for (name, spec) in &kind.attributes {
            match self.known(at, object, name) {
                Some(value) if spec.kind.admits(&value) => drop(attributes.insert(name.clone(), value)),
                Some(_) => {
                    flaw = Some(format!("the attribute `{name}` of {object} is not a {}", spec.kind));
                }
                None if spec.required => {
                    flaw = Some(format!("the attribute `{name}` of {object} is not known{}", self.as_of()));
                }
                None => {}
            }
        }
        (attributes, flaw)
    }
}

fn admitted(spec: AttributeSpec, value: &AttributeValue) -> Option<Value<'_>> {
    spec.kind.admits(value).then(|| Value::of(value))
}

/// A value of the request: a path's integer is text and number.
fn read(spec: AttributeSpec, value: &AttributeValue) -> Option<Value<'_>> {
    match (spec.kind, value) {
        (AttributeType::Long, AttributeValue::Text(text)) => {
            text.parse().ok().map(|number| Value::Scalar(Scalar::Long(number)))
        }
        _ => admitted(spec, value),
    }
}

impl ServicePolicy {
    pub(crate) fn judge(&self, asked: &Asked<'_>, occasion: &Occasion<'_>) -> Verdict {
        let verdict = match self.permits(asked, occasion.now) {
            Some(_) if self.shared().shadow.is_due(occasion.now) => self.weigh(asked, occasion, true),
            Some(entry) => Verdict::Permit(Permit::granted(self, entry, occasion.receipt)),
            None => self.weigh(asked, occasion, false),
        };
        in_force::decided(matches!(verdict, Verdict::Deny(_)));
        verdict
    }

    /// Whether one object is denied, if the engine can say so by itself and without a word about why: of a list of many,
    /// nobody reads that, and Cedar's words take a hundred times as long.
    pub(crate) fn denies_swiftly(&self, asked: &Asked<'_>, now: Duration) -> bool {
        let ([object], true, None) =
            (asked.objects, self.check_trust_domain(asked.caller).is_ok(), self.withheld())
        else {
            return false;
        };
        let types = &self.shared().schema;
        let (Some(action), Some(kind)) = (types.actions.get(asked.action), types.types.get(object.kind()))
        else {
            return false;
        };
        let ruling = self.rule_swiftly(asked, action, (0, object), kind, now);
        let denied = matches!(ruling, Some(Ruling::Forbidden(_) | Ruling::Unpermitted));
        if denied {
            in_force::decided(true);
        }
        denied
    }

    /// The policy that permits the first object, if the engine can say that every object is permitted. Allocates
    /// nothing.
    fn permits(&self, asked: &Asked<'_>, now: Duration) -> Option<usize> {
        self.check_trust_domain(asked.caller).ok()?;
        let action = self.shared().schema.actions.get(asked.action)?;
        let mut permitted_by = None;
        for object in asked.objects.iter().enumerate() {
            let kind = self.shared().schema.types.get(object.1.kind())?;
            match self.rule_swiftly(asked, action, object, kind, now)? {
                Ruling::Permitted(entry) => permitted_by = permitted_by.or(Some(entry)),
                Ruling::Forbidden(_) | Ruling::Failed(_) | Ruling::Unpermitted => return None,
            }
        }
        permitted_by
    }

    /// What the engine says without Cedar, if it can.
    pub(crate) fn rule_swiftly(
        &self,
        asked: &Asked<'_>,
        action: &Action,
        object: (usize, &ObjectRef),
        kind: &ObjectType,
        now: Duration,
    ) -> Option<Ruling> {
        self.hear(asked, action, object, kind, now)?.settled()
    }

    pub(crate) fn hear(
        &self,
        asked: &Asked<'_>,
        action: &Action,
        (at, object): (usize, &ObjectRef),
        kind: &ObjectType,
        now: Duration,
    ) -> Option<Heard> {
        let values = asked.values(at, object, kind)?;
        let now = i64::try_from(now.as_secs()).ok()?;
        self.shared().engine.hear(asked.caller, action, object, kind, &values, now)
    }

    /// The decision with everything that is to be said about it. What the engine says is held against Cedar's
    /// answer over the policies whose scope fits: of a denial, or of every object with others that have their turn.
    pub(crate) fn weigh(&self, asked: &Asked<'_>, occasion: &Occasion<'_>, compare: bool) -> Verdict {
        let (shared, caller) = (self.shared(), asked.caller);
        let mut beside = compare.then(|| shared.panel_in_turn());
        let mut recorded: Vec<RecordedObject> = asked.objects.iter().map(bare_object).collect();
        let builtin = |rule: &'static str, reason: String, objects| {
            let rule = Rule::Builtin(rule.into());
            Verdict::Deny(self.denial(Some(caller), occasion, asked.understood(objects), rule, reason))
        };
        if let Err(reason) = self.check_trust_domain(caller) {
            return builtin(TRUST_DOMAIN, reason, recorded);
        }
        let Some(action) = shared.schema.actions.get(asked.action) else {
            let reason = format!("the schema has no action `{}`", cut(asked.action));
            return builtin("request.unknown", reason, recorded);
        };
        let mut permitted_by = None;
        for (object, seen) in asked.objects.iter().zip(0..) {
            let Some(kind) = shared.schema.types.get(object.kind()) else {
                let reason = format!("the schema has no type `{}`", object.kind());
                return builtin("request.unknown", reason, recorded);
            };
            let (attributes, missing) = asked.gather(seen, object, kind);
            let told_by = asked.told_by(&attributes);
            let mut entry = RecordedObject { attributes, told_by, ..bare_object(object) };
            if let Some(flaw) = missing {
                replace(&mut recorded, seen, entry);
                return builtin(MISSING, flaw, recorded);
            }
            let heard = self.hear(asked, action, (seen, object), kind, occasion.now);
            let swift = heard.as_ref().and_then(Heard::settled);
            // Nobody asks why an object is permitted, and a list of many would cost as many evaluations: Cedar is asked
            // about the one that is denied.
            if let Some(Ruling::Permitted(rule)) = swift.filter(|_| beside.is_none()) {
                entry.outcome = Some(Outcome::Permit);
                replace(&mut recorded, seen, entry);
                permitted_by = permitted_by.or(Some(rule));
                continue;
            }
            let question =
                shared.question(caller, &action.uid, object, kind, &entry.attributes, occasion.now);
            let question = match question {
                Ok(question) => question,
                Err(flaw) => {
                    replace(&mut recorded, seen, entry);
                    return builtin("request.invalid", flaw, recorded);
                }
            };
            // Of policies that were not all compiled, those that were need no form of Cedar's for a permit.
            let swift = swift.or_else(|| {
                let heard = heard?;
                let unheard = shared.panel(heard.unheard.iter().copied());
                heard.with(shared.ask(&question, &unheard).ruling)
            });
            if let Some(Ruling::Permitted(rule)) = swift.filter(|_| beside.is_none()) {
                if !shared.shadow.is_due(occasion.now) {
                    entry.outcome = Some(Outcome::Permit);
                    replace(&mut recorded, seen, entry);
                    permitted_by = permitted_by.or(Some(rule));
                    continue;
                }
                beside = Some(shared.panel_in_turn());
            }
            let subject = shared.engine.subject(caller, action, kind, Some(object));
            let mut panel = shared.panel(shared.engine.candidates(subject));
            if let Some(beside) = &beside {
                panel = panel.and(beside);
            }
            let answer = shared.ask(&question, &panel);
            if let Some(swift) = swift {
                shadow::compared(swift == answer.ruling);
                if swift != answer.ruling {
                    tracing::error!(
                        receipt = %occasion.receipt, service = self.name(), action = asked.action, %object,
                        engine = ?swift, cedar = ?answer.ruling, version = %self.version(),
                        "denied: the policy engine and Cedar differ",
                    );
                    replace(&mut recorded, seen, entry);
                    let reason = "the policy engine and Cedar differ about this request".to_owned();
                    return builtin(DISAGREEMENT, reason, recorded);
                }
            }
            if let Ruling::Permitted(rule) = answer.ruling {
                entry.outcome = Some(Outcome::Permit);
                replace(&mut recorded, seen, entry);
                permitted_by = permitted_by.or(Some(rule));
                continue;
            }
            entry.outcome = Some(Outcome::Deny);
            replace(&mut recorded, seen, entry);
            let rule = self.rule_of(answer.ruling).clone();
            let mut denial =
                self.denial(Some(caller), occasion, asked.understood(recorded), rule, answer.reason());
            let mut explanation = explain::question(shared, &question, kind, subject);
            explanation.object = (asked.objects.len() > 1).then(|| object.to_string());
            denial.0.explanation = Some(explanation);
            return Verdict::Deny(denial);
        }
        match permitted_by {
            Some(entry) => Verdict::Permit(Permit::granted(self, entry, occasion.receipt)),
            None => builtin(
                "request.no_object",
                "the request names no object (is its body unread?)".into(),
                recorded,
            ),
        }
    }

    pub(crate) fn rule_of(&self, ruling: Ruling) -> &Rule {
        match ruling {
            Ruling::Permitted(entry) | Ruling::Forbidden(entry) | Ruling::Failed(entry) => self.rule(entry),
            Ruling::Unpermitted => self.rule(usize::MAX),
        }
    }
}

/// An object of which nothing is known yet, for the record.
pub(crate) fn bare_object(object: &ObjectRef) -> RecordedObject {
    RecordedObject {
        object: cut(&object.to_string()),
        attributes: BTreeMap::new(),
        told_by: BTreeMap::new(),
        outcome: None,
        left_out_by: None,
    }
}

fn replace(recorded: &mut [RecordedObject], index: usize, entry: RecordedObject) {
    if let Some(slot) = recorded.get_mut(index) {
        *slot = entry;
    }
}
