//! From the text of a file to its sections: every mistake of form is collected, none stops the
//! search for the next.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::path::Path;

use policy::{Problem, suggest};
use serde_json::Value;
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue, ValueDeserializer};

use super::schema::{self, Reference};

/// Largest file read: 10,000 services fit; a file mistaken for one does not fill memory.
pub(crate) const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// Most mistakes listed at once: past that a reader mends the first and runs the check again.
pub(crate) const MAX_PROBLEMS: usize = 50;

/// What the form of the file gave.
pub(crate) struct Sections<F> {
    /// The sections that are whole; those with a mistake of form are left out.
    pub(crate) file: Option<F>,
    /// Every `section` and `service.NAME` that the file holds, whole or not, so that a reference to a
    /// broken one is not reported as a second mistake.
    pub(crate) declared: BTreeSet<String>,
    pub(crate) problems: Vec<Problem>,
}

/// Reads the sections of `text`, which came from `file`.
pub(crate) fn sections<F: Reference>(text: &str, file: &Path) -> Sections<F> {
    let (tree, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        // What was recovered from broken syntax may not be what was meant: no second guesses.
        let problems = errors.iter().take(MAX_PROBLEMS).map(|error| syntax(file, text, error)).collect();
        return Sections { file: None, declared: BTreeSet::new(), problems };
    }
    let declared = declared(tree.get_ref());
    let mut whole = Spanned::new(0..0, DeValue::Table(tree.into_inner()));
    let mut finder = Finder { file, text, sample: F::SAMPLE, problems: Vec::new() };
    if !finder.check(&mut whole, &schema::json_schema::<F>(), "") {
        return Sections { file: None, declared, problems: finder.problems };
    }
    let file = match F::deserialize(ValueDeserializer::from(whole)) {
        Ok(file) => Some(file),
        Err(error) => {
            let span = error.span().unwrap_or(0..0);
            finder.report(span, error.message().to_owned(), None);
            None
        }
    };
    Sections { file, declared, problems: finder.problems }
}

/// Reads the text of `file`, which is to be an `F`.
pub(crate) fn read<F: Reference>(file: &Path) -> Result<String, Problem> {
    let explain = |error: &io::Error| {
        let problem = Problem::file(file, format!("cannot be read: {error}"));
        match error.kind() {
            io::ErrorKind::NotFound => problem.hint(format!(
                "name it with --config FILE; `{} > {}` writes one to start from",
                F::SAMPLE,
                F::NAME
            )),
            io::ErrorKind::PermissionDenied => problem.hint("it must be readable for the user you run as"),
            _ => problem,
        }
    };
    let mut text = String::new();
    let opened = File::open(file).map_err(|error| explain(&error))?;
    opened.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| explain(&error))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(Problem::file(file, format!("is larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

fn syntax(file: &Path, text: &str, error: &toml::de::Error) -> Problem {
    let span = error.span().unwrap_or(0..0);
    Problem::at(file, text, span, format!("not TOML: {}", error.message().replace('\n', ", ")))
}

fn declared(tree: &DeTable<'_>) -> BTreeSet<String> {
    let services = tree.iter().filter(|(key, _)| key.get_ref() == "service").flat_map(|(_, services)| {
        let names = services.get_ref().as_table().into_iter().flat_map(|table| table.keys());
        names.map(|name| format!("service.{}", name.get_ref()))
    });
    tree.keys().map(|key| key.get_ref().to_string()).chain(services).collect()
}

struct Finder<'a> {
    file: &'a Path,
    text: &'a str,
    /// The command that prints a whole file.
    sample: &'static str,
    problems: Vec<Problem>,
}

impl Finder<'_> {
    /// Reports what does not keep to `schema`, and takes it out. False if what is left of `value`
    /// cannot be used, which the caller then takes out in turn.
    fn check(&mut self, value: &mut Spanned<DeValue<'_>>, schema: &Value, place: &str) -> bool {
        let span = value.span();
        if let Some(words) = words(schema) {
            return self.check_word(value, &words, place);
        }
        let expected = schema.get("type").and_then(Value::as_str).unwrap_or("object");
        match (expected, value.get_mut()) {
            ("object", DeValue::Table(table)) => self.check_table(table, span, schema, place),
            ("array", DeValue::Array(items)) => {
                if let Some(schema) = schema.get("items") {
                    for item in items.iter_mut() {
                        if !self.check(item, schema, place) {
                            return false;
                        }
                    }
                }
                true
            }
            ("string", DeValue::String(_))
            | ("boolean", DeValue::Boolean(_))
            | ("number", DeValue::Integer(_) | DeValue::Float(_)) => true,
            ("integer", DeValue::Integer(number)) => {
                // Every whole number of the file is an id of the operating system or smaller than one.
                let fits = u32::from_str_radix(number.as_str(), number.radix()).is_ok();
                if !fits {
                    self.report(span, format!("`{place}` is a number from 0 to {}", u32::MAX), None);
                }
                fits
            }
            (expected, found) => {
                let expected = match expected {
                    "object" => "a table",
                    "array" => "an array",
                    "integer" | "number" => "a number",
                    "boolean" => "true or false",
                    _ => "text in quotes",
                };
                let found = match found.type_str() {
                    "string" => "text",
                    "integer" | "float" => "a number",
                    "boolean" => "true or false",
                    "array" => "an array",
                    "table" => "a table",
                    _ => "a date",
                };
                let message = match place {
                    "" => format!("expected {expected}, found {found}"),
                    place => format!("`{place}` is {expected}, not {found}"),
                };
                self.report(
                    span,
                    message,
                    schema::example(schema).map(|example| format!("for example {example}")),
                );
                false
            }
        }
    }

    fn check_table(
        &mut self,
        table: &mut DeTable<'_>,
        span: Range<usize>,
        schema: &Value,
        place: &str,
    ) -> bool {
        let within = |key: &str| if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") };
        let Some(known) = schema::known_keys(schema) else {
            let Some(values) = schema::free_values(schema) else { return true };
            keep(table, |key, value| self.check(value, values, &within(key.get_ref())));
            return true;
        };
        let mut broken = BTreeSet::new();
        keep(table, |key, value| match known.get(&**key.get_ref()) {
            Some(schema) => {
                let usable = self.check(value, schema, &within(key.get_ref()));
                if !usable {
                    broken.insert(key.get_ref().to_string());
                }
                usable
            }
            None => {
                self.unknown(key, known.keys().map(String::as_str), place);
                false
            }
        });
        let mut whole = true;
        for key in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
            let Some(key) = key.as_str() else { continue };
            let Some(schema) = known.get(key) else { continue };
            if table.keys().any(|present| present.get_ref() == key) {
                continue;
            }
            whole = false;
            if !broken.contains(key) {
                self.missing(span.clone(), key, schema, place);
            }
        }
        whole
    }

    fn unknown<'k>(
        &mut self,
        key: &Spanned<impl AsRef<str>>,
        known: impl Iterator<Item = &'k str> + Clone,
        place: &str,
    ) {
        let word = key.get_ref().as_ref();
        let what = if place.is_empty() { "section" } else { "key" };
        let of = if place.is_empty() { String::new() } else { format!(" in [{place}]") };
        let all = known.clone().collect::<Vec<_>>().join(", ");
        let hint = suggest(word, known).unwrap_or_else(|| format!("known here: {all}"));
        self.report(key.span(), format!("unknown {what} `{word}`{of}"), Some(hint));
    }

    fn missing(&mut self, span: Range<usize>, key: &str, schema: &Value, place: &str) {
        if place.is_empty() {
            let hint = format!("add a [{key}] section; `{}` prints a whole file", self.sample);
            self.problems
                .push(Problem::file(self.file, format!("the section [{key}] is missing")).hint(hint));
            return;
        }
        let example = schema::example(schema).unwrap_or_default();
        self.report(span, format!("[{place}] lacks `{key}`"), Some(format!("add {key} = {example}")));
    }

    fn check_word(&mut self, value: &Spanned<DeValue<'_>>, words: &[&str], place: &str) -> bool {
        let found = value.get_ref().as_str();
        if found.is_some_and(|found| words.contains(&found)) {
            return true;
        }
        let list = words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(" or ");
        let hint = found.and_then(|found| suggest(found, words.iter().copied()));
        self.report(value.span(), format!("`{place}` is {list}"), hint);
        false
    }

    fn report(&mut self, span: Range<usize>, message: String, hint: Option<String>) {
        self.problems.push(Problem::at(self.file, self.text, span, message).maybe_hint(hint));
    }
}

/// Takes out the entries that `wanted` refuses; the map's own `retain` does not take such keys.
fn keep<'i>(
    table: &mut DeTable<'i>,
    mut wanted: impl FnMut(&Spanned<DeString<'i>>, &mut Spanned<DeValue<'i>>) -> bool,
) {
    for (key, mut value) in std::mem::replace(table, DeTable::new()) {
        if wanted(&key, &mut value) {
            table.insert(key, value);
        }
    }
}

/// The words of an enumeration.
fn words(schema: &Value) -> Option<Vec<&str>> {
    if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        return Some(words.iter().filter_map(Value::as_str).collect());
    }
    let choices = schema.get("oneOf")?.as_array()?;
    choices.iter().map(|choice| choice.get("const").and_then(Value::as_str)).collect()
}
