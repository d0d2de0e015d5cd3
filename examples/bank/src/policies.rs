//! The bank's policies, as text, for whoever starts the bank without a checkout at hand.

/// Path below the policies directory, and content.
pub const POLICIES: &[(&str, &str)] = &[
    ("mesh.cedarschema", include_str!("../policies/mesh.cedarschema")),
    ("services/accounts/accounts.cedar", include_str!("../policies/services/accounts/accounts.cedar")),
    (
        "services/accounts/accounts.cedarschema",
        include_str!("../policies/services/accounts/accounts.cedarschema"),
    ),
    (
        "services/accounts/tests/accounts.toml",
        include_str!("../policies/services/accounts/tests/accounts.toml"),
    ),
    (
        "services/accounts/tests/bad/requests.toml",
        include_str!("../policies/services/accounts/tests/bad/requests.toml"),
    ),
    ("services/accounts/openapi.yaml", include_str!("../policies/services/accounts/openapi.yaml")),
    ("services/accounts/map.toml", include_str!("../policies/services/accounts/map.toml")),
    ("services/gateway/gateway.cedar", include_str!("../policies/services/gateway/gateway.cedar")),
    (
        "services/gateway/gateway.cedarschema",
        include_str!("../policies/services/gateway/gateway.cedarschema"),
    ),
    ("services/gateway/map.toml", include_str!("../policies/services/gateway/map.toml")),
    ("services/payments/map.toml", include_str!("../policies/services/payments/map.toml")),
    ("services/payments/payments.cedar", include_str!("../policies/services/payments/payments.cedar")),
    (
        "services/payments/payments.cedarschema",
        include_str!("../policies/services/payments/payments.cedarschema"),
    ),
    ("services/vault/map.toml", include_str!("../policies/services/vault/map.toml")),
    ("services/vault/vault.cedar", include_str!("../policies/services/vault/vault.cedar")),
    ("services/web/map.toml", include_str!("../policies/services/web/map.toml")),
    ("services/web/web.cedar", include_str!("../policies/services/web/web.cedar")),
    ("services/web/web.cedarschema", include_str!("../policies/services/web/web.cedarschema")),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::POLICIES;

    /// A file that is added to the directory and not to the list would be missing from every demo.
    #[test]
    fn every_file_of_the_directory_is_listed() {
        fn count(directory: &Path) -> usize {
            let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
            entries.map(|path| if path.is_dir() { count(&path) } else { 1 }).sum()
        }
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
        assert_eq!(count(&directory), POLICIES.len());
    }
}
