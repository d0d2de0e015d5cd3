//! Services that Palisade itself knows: what their objects are, and what their requests mean, comes with it, and whoever
//! runs one writes policies only. `mapping = "NAME"` in its map.toml brings it.
//!
//! A namespace is the same before every service of its kind, so that a rule means the same everywhere.

use cedar_policy::Policy;
use toml::de::DeTable;

use crate::kafka;
use crate::map::Mapping;

/// A service that Palisade knows.
#[derive(Debug)]
pub(crate) struct Shipped {
    /// As maps write it.
    pub(crate) mapping: &'static str,
    /// What its callers speak.
    pub(crate) speaks: Mapping,
    pub(crate) namespace: &'static str,
    /// Whether a service may declare the namespace itself, as long as none is of this kind: policies did before it was
    /// shipped, and an upgrade has to find them good.
    pub(crate) may_be_declared: bool,
    pub(crate) schema: File,
    /// What its requests mean; a service without routes names its objects itself.
    pub(crate) routes: Option<Routes>,
    /// Why a policy is none that it may have, and what to write instead.
    pub(crate) flaw: fn(&Policy) -> Option<(&'static str, &'static str)>,
}

/// A file as services write it for themselves elsewhere.
#[derive(Debug)]
pub(crate) struct File {
    /// What problems name as the file; there is none to open.
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

/// The map of a gRPC API.
#[derive(Debug)]
pub(crate) struct Routes {
    pub(crate) map: File,
    pub(crate) proto: File,
}

static ALL: [Shipped; 3] = [
    Shipped {
        mapping: "kafka",
        speaks: Mapping::Kafka,
        namespace: "Kafka",
        may_be_declared: false,
        schema: File {
            name: "kafka.cedarschema (part of palisade)",
            text: include_str!("kafka.cedarschema"),
        },
        routes: None,
        flaw: kafka::flaw,
    },
    Shipped {
        mapping: "store",
        speaks: Mapping::Routes,
        namespace: "Store",
        may_be_declared: true,
        schema: File {
            name: "store.cedarschema (part of palisade)",
            text: include_str!("store.cedarschema"),
        },
        routes: Some(Routes {
            map: File { name: "store.toml (part of palisade)", text: include_str!("store.toml") },
            proto: File { name: "store.proto (part of palisade)", text: include_str!("store.proto") },
        }),
        flaw: |_| None,
    },
    Shipped {
        mapping: "vault",
        speaks: Mapping::None,
        namespace: "Vault",
        may_be_declared: true,
        schema: File {
            name: "vault.cedarschema (part of palisade)",
            text: include_str!("vault.cedarschema"),
        },
        routes: None,
        flaw: |_| None,
    },
];

impl Shipped {
    /// What a map names by `mapping`.
    pub(crate) fn named(mapping: &str) -> Option<&'static Self> {
        ALL.iter().find(|shipped| shipped.mapping == mapping)
    }

    /// What has a namespace.
    pub(crate) fn of_namespace(namespace: &str) -> Option<&'static Self> {
        ALL.iter().find(|shipped| shipped.namespace == namespace)
    }

    /// How to have it.
    pub(crate) fn hint(&self) -> String {
        format!("mapping = \"{}\" in map.toml brings it, without a schema", self.mapping)
    }
}

/// The `mapping` of a map, whatever else is in it.
pub(crate) fn mapping_of(map: &str) -> Option<String> {
    let document = DeTable::parse(map).ok()?;
    Some(document.get_ref().get("mapping")?.get_ref().as_str()?.to_owned())
}

#[cfg(test)]
mod tests;
