//! Policies as Cedar has them. That form takes many times what their text does, and only a denial, a comparison
//! or a policy that was not compiled needs it: of many policies a few are kept in it, and the others are read again.

use std::sync::{Arc, OnceLock};

use cedar_policy::{Policy, PolicyId};
use foldhash::HashMap;
use quick_cache::sync::Cache;

use crate::decide::PolicyEntry;
use crate::explain::{self, Conjunct};

/// Most forms that are in memory of a service's policies, besides those that are always needed: 1.5 MB, and as much again
/// once they have been explained. A service of no more policies keeps all.
pub(crate) const MAX_FORMS: usize = 256;

/// The text of one policy, in that of its file.
#[derive(Debug, Clone)]
pub(crate) struct PolicyText {
    file: Arc<str>,
    start: usize,
    end: usize,
}

impl PolicyText {
    /// As it was read. `None` for a policy that was not.
    pub(crate) fn of(policy: &Policy) -> Option<Self> {
        let place = policy.as_ref().loc()?;
        let text = Self { file: Arc::clone(&place.src), start: place.start(), end: place.end() };
        (!text.as_str().is_empty()).then_some(text)
    }

    pub(crate) fn as_str(&self) -> &str {
        self.file.get(self.start..self.end).unwrap_or_default()
    }
}

/// A policy as Cedar evaluates it.
#[derive(Debug)]
pub(crate) struct Form {
    pub(crate) policy: Policy,
    /// Its conditions as an explanation needs them, from the first on.
    clauses: OnceLock<Result<Vec<Conjunct>, String>>,
}

impl Form {
    pub(crate) fn new(policy: Policy) -> Self {
        Self { policy, clauses: OnceLock::new() }
    }

    /// Reads its text again.
    pub(crate) fn read(entry: &PolicyEntry) -> Result<Self, String> {
        let id = PolicyId::new(&entry.id);
        Policy::parse(Some(id), entry.text.as_str()).map(Self::new).map_err(|error| error.to_string())
    }

    pub(crate) fn clauses(&self) -> Result<&[Conjunct], &str> {
        let clauses = self.clauses.get_or_init(|| explain::clauses(&self.policy));
        clauses.as_deref().map_err(String::as_str)
    }
}

/// The forms of a service's policies, by their place in the order of the files.
#[derive(Debug)]
pub(crate) struct Forms {
    kept: HashMap<usize, Arc<Form>>,
    recent: Cache<usize, Arc<Form>>,
}

impl Forms {
    /// `policies` are in the order of the files. Where they are few all are kept, and those that are `always` needed.
    pub(crate) fn new(policies: Vec<Policy>, always: impl Fn(usize) -> bool) -> Self {
        let few = policies.len() <= MAX_FORMS;
        let kept = policies.into_iter().enumerate().filter(|(at, _)| few || always(*at));
        let kept = kept.map(|(at, policy)| (at, Arc::new(Form::new(policy)))).collect();
        Self { kept, recent: Cache::new(MAX_FORMS) }
    }

    /// The form of the policy that stands `at` this place: one that is kept, or made now and kept for a while.
    pub(crate) fn get(&self, at: usize, entry: &PolicyEntry) -> Result<Arc<Form>, String> {
        match self.kept.get(&at) {
            Some(form) => Ok(Arc::clone(form)),
            None => self.recent.get_or_insert_with(&at, || Form::read(entry).map(Arc::new)),
        }
    }

    /// The same for one that nobody asked about: it takes no other's place.
    pub(crate) fn glance(&self, at: usize, entry: &PolicyEntry) -> Result<Arc<Form>, String> {
        match self.kept.get(&at).cloned().or_else(|| self.recent.peek(&at)) {
            Some(form) => Ok(form),
            None => Form::read(entry).map(Arc::new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::tests::unvalidated;

    const SCHEMA: &str = "namespace Shop {
        entity Order = { owner: String };
        entity Colour enum [\"red\"];
        action Read appliesTo { principal: [Mesh::Workload], resource: [Order, Colour], context: Mesh::Context };
    }";

    fn policies(number: usize) -> String {
        let policy = |n| {
            let condition = match n {
                300 => " when { ip(\"127.0.0.1\").isLoopback() }",
                301 => " unless { resource.owner == \"é\" }",
                _ => "",
            };
            let kind = if n == 302 { "" } else { " is Shop::Order" };
            format!(
                "// 😀\n@id(\"p{n}\")\npermit (principal is Mesh::Workload, action, resource{kind}){condition};\n"
            )
        };
        (0..number).map(policy).collect()
    }

    #[test]
    fn few_of_many_policies_are_kept_in_cedar_s_form() {
        let shared = unvalidated(SCHEMA, &policies(2000));
        // The first is evaluated by Cedar always; of the second, requests for colours are.
        let mut kept: Vec<_> = shared.forms.kept.keys().copied().collect();
        kept.sort_unstable();
        assert_eq!(kept, [300, 302]);
        for at in 0..2000 {
            let form = shared.form(at).unwrap();
            assert_eq!(form.policy.id().to_string(), format!("p{at}"));
            assert_eq!(form.policy.to_string(), shared.entries[at].text.as_str());
        }
        assert!(shared.forms.recent.len() <= MAX_FORMS, "{}", shared.forms.recent.len());
        assert!(shared.form(2000).is_err());
    }

    #[test]
    fn a_form_is_what_was_read_first() {
        let shared = unvalidated(SCHEMA, &policies(400));
        for at in [0, 300, 301, 302, 399] {
            let again = Form::read(&shared.entries[at]).unwrap().policy;
            assert_eq!(again, shared.form(at).unwrap().policy);
            assert_eq!(again.to_json().unwrap(), shared.form(at).unwrap().policy.to_json().unwrap());
        }
    }
}
