//! The JSON Schema of a file, the sample file made from it, and the keys a section knows.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::file::MeshFile;

/// A file whose reference is its structs' doc comments.
pub(crate) trait Reference: JsonSchema + DeserializeOwned {
    /// What the file is called.
    const NAME: &'static str;
    /// The command that prints a whole one.
    const SAMPLE: &'static str;
    /// Its sections as the structs are written, which is the order to read them in (JSON objects are
    /// sorted), each with the name that stands for a free one in the sample.
    const SECTIONS: &'static [(&'static str, &'static str)];
}

impl Reference for MeshFile {
    const NAME: &'static str = "mesh.toml";
    const SAMPLE: &'static str = "palisade config example";
    const SECTIONS: &'static [(&'static str, &'static str)] = &[
        ("mesh", ""),
        ("control", ""),
        ("agent", ""),
        ("gateway", ""),
        ("idp", ""),
        ("vault", ""),
        ("service", "web"),
        ("traffic", "web"),
        ("zones", ""),
        ("workload", "nightly"),
        ("limits", ""),
        ("telemetry", ""),
        ("traces", ""),
    ];
}

/// The JSON Schema (draft 2020-12) of the whole file, without references.
pub(crate) fn json_schema<F: Reference>() -> Value {
    let settings = schemars::generate::SchemaSettings::draft2020_12().with(|s| s.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<F>().to_value();
    without_null(&mut schema);
    schema
}

/// TOML has no null: an optional key is left out, so `null` in the schema would only mislead editors.
fn without_null(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            object.values_mut().for_each(without_null);
            object.retain(|key, value| !(key == "default" && value.is_null()));
            if let Some(Value::Array(types)) = object.get_mut("type") {
                types.retain(|t| t != "null");
                if let [only] = types.as_slice() {
                    let only = only.clone();
                    object.insert("type".into(), only);
                }
            }
            if let Some(Value::Array(choices)) = object.get_mut("enum") {
                choices.retain(|choice| !choice.is_null());
            }
            if let Some(Value::Array(choices)) = object.get("anyOf") {
                let real: Vec<&Value> = choices.iter().filter(|c| *c != &null_type()).collect();
                if let [Value::Object(only)] = real.as_slice() {
                    let only = only.clone();
                    object.remove("anyOf");
                    for (key, value) in only {
                        // The field's own description says more than its type's.
                        object.entry(key).or_insert(value);
                    }
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(without_null),
        _ => {}
    }
}

fn null_type() -> Value {
    serde_json::json!({"type": "null"})
}

/// The keys of a section that has a fixed set of them, with their schemas.
pub(crate) fn known_keys(section: &Value) -> Option<&Map<String, Value>> {
    let closed = section.get("additionalProperties") == Some(&Value::Bool(false));
    section.get("properties").and_then(Value::as_object).filter(|_| closed)
}

/// The schema of the values in a section whose keys are free, such as `[service.NAME]`.
pub(crate) fn free_values(section: &Value) -> Option<&Value> {
    section.get("additionalProperties").filter(|schema| schema.is_object())
}

/// The value that the reference gives as an example, as TOML.
pub(crate) fn example(schema: &Value) -> Option<String> {
    schema.get("examples").and_then(|examples| examples.get(0)).map(toml_value)
}

/// A sample file: every section and key, each under its own description; optional keys are commented out.
pub(crate) fn sample<F: Reference>() -> String {
    let schema = json_schema::<F>();
    let mut out = String::new();
    comment(&mut out, &schema);
    let required = |schema: &Value, key: &str| {
        schema.get("required").and_then(Value::as_array).is_some_and(|keys| keys.iter().any(|k| k == key))
    };
    for (name, free) in F::SECTIONS {
        let Some(section) = schema.get("properties").and_then(|sections| sections.get(name)) else {
            continue;
        };
        let whole = free_values(section).filter(|values| known_keys(values).is_some());
        let (header, section) = match whole {
            Some(section) => (format!("[{name}.{free}]"), section),
            None => (format!("[{name}]"), section),
        };
        out.push('\n');
        comment(&mut out, section);
        out.push_str(&header);
        out.push('\n');
        let Some(keys) = known_keys(section) else {
            // Keys of the reader's own choice: those of the example show the form.
            let pairs =
                section.get("examples").and_then(|examples| examples.get(0)).and_then(Value::as_object);
            for (key, value) in pairs.into_iter().flatten() {
                out.push_str(&format!("#{} = {}\n", toml_key(key), toml_value(value)));
            }
            continue;
        };
        let (needed, optional): (Vec<_>, Vec<_>) = keys.iter().partition(|(key, _)| required(section, key));
        for (key, schema) in needed.iter().chain(&optional) {
            comment(&mut out, schema);
            for (inner, schema) in known_keys(schema).into_iter().flatten() {
                inner_comment(&mut out, inner, schema);
            }
            let mark = if required(section, key) { "" } else { "#" };
            out.push_str(&format!("{mark}{key} = {}\n", example(schema).unwrap_or_default()));
        }
    }
    out
}

fn comment(out: &mut String, schema: &Value) {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    for line in text.lines() {
        out.push_str(&format!("# {line}\n"));
    }
}

/// A key of a table that is written in one line.
fn inner_comment(out: &mut String, key: &str, schema: &Value) {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    let mut mark = format!("{key}: ");
    for line in text.lines() {
        out.push_str(&format!("#   {mark}{line}\n"));
        mark = "  ".to_owned();
    }
}

pub(crate) fn toml_value(value: &Value) -> String {
    match value {
        Value::Object(object) => {
            let pairs: Vec<String> = object
                .iter()
                .map(|(key, value)| format!("{} = {}", toml_key(key), toml_value(value)))
                .collect();
            format!("{{ {} }}", pairs.join(", "))
        }
        Value::Array(values) => {
            format!("[{}]", values.iter().map(toml_value).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

fn toml_key(key: &str) -> String {
    let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if bare { key.to_owned() } else { format!("{key:?}") }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Run with `UPDATE_EXPECTED=1` to write the file anew.
    #[test]
    fn the_sample_file_is_the_reference() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("mesh.example.toml");
        if std::env::var_os("UPDATE_EXPECTED").is_some() {
            std::fs::write(&path, sample::<MeshFile>()).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == sample::<MeshFile>(),
            "mesh.example.toml and the doc comments of mesh/file.rs differ; run \
             `UPDATE_EXPECTED=1 cargo test -p palisade the_sample_file` and look at the diff"
        );
    }

    #[test]
    fn the_sample_loads_as_written_and_with_every_key_in_use() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("policies")).unwrap();
        let all: String = sample::<MeshFile>()
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(key) if !key.starts_with(' ') => format!("{key}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        assert!(all.contains("\nsvid_ttl = "), "{all}");
        // Those whom the traffic section names.
        let other = |name: &str, port: u16| {
            let [app, inbound, admin] = [0, 1, 2].map(|nth| format!("127.0.0.1:{}", port + nth));
            format!(
                "\n[service.{name}]\napp = \"{app}\"\ninbound = \"{inbound}\"\nadmin = \"{admin}\"\nattest = {{ uid = {port} }}\n"
            )
        };
        let all = all + &other("accounts", 6000) + &other("accounts-next", 6010);
        for text in [sample::<MeshFile>(), all] {
            let problems = super::super::Mesh::parse(&text, &dir.path().join("mesh.toml"), "host-1").err();
            assert!(
                problems.is_none(),
                "{}",
                problems.unwrap().iter().map(ToString::to_string).collect::<String>()
            );
        }
    }

    #[test]
    fn every_key_has_a_description_and_an_example() {
        let schema = json_schema::<MeshFile>();
        for (name, section) in schema["properties"].as_object().unwrap() {
            let keys = known_keys(free_values(section).unwrap_or(section));
            // A section of free keys and plain values shows both by one example.
            assert!(keys.is_some() || example(section).is_some(), "{name}: {section}");
            for (key, schema) in keys.into_iter().flatten() {
                assert!(schema.get("description").is_some(), "{name}.{key}");
                assert!(example(schema).is_some(), "{name}.{key} has no example");
            }
        }
        assert!(!schema.to_string().contains("null"), "{schema:#}");
    }
}
