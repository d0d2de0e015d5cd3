//! From a request's method and target to what it asks for: parsed once, into a value that cannot mean two
//! things. Whatever is not in this table does not exist.

use http::{Method, Uri};
use thiserror::Error;

use super::Front;
use crate::authorize::{Action, Target};
use crate::kv::Fate;
use crate::path::{PathError, SecretPath};

/// Longest query looked at.
pub(crate) const MAX_QUERY_BYTES: usize = 1024;
/// Where the KV engine is mounted.
pub(crate) const KV_MOUNT: &str = "secret";

const MOUNT_INFO: &str = "sys/internal/ui/mounts/";
/// Names under which tools have sent credentials in a query, where every log on the way keeps them.
const CREDENTIAL_PARAMETERS: [&str; 5] =
    ["token", "x-vault-token", "vault_token", "access_token", "client_token"];

/// Why a request asks for nothing that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum RouteError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("no handler for this route")]
    Unknown,
    #[error("unsupported operation")]
    Method(&'static str),
    #[error("a token is not accepted in a query")]
    CredentialInQuery,
    #[error("a query parameter is malformed or appears twice")]
    Query,
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    Health(HealthCodes),
    SealStatus,
    InitStatus,
    Init,
    Unseal,
    Seal,
    Mounts,
    /// What is mounted at a path: the `vault` program asks before every KV command.
    MountInfo,
    Kv(KvRoute),
    CertLogin,
    CreateToken,
    LookupSelf,
    RevokeSelf,
}

/// An operation on a secret or a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KvRoute {
    pub(crate) target: Target,
    pub(crate) operation: KvOperation,
}

/// What to do with a secret or a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KvOperation {
    Read { version: Option<u64> },
    Write,
    DeleteLatest,
    Change(Fate),
    ReadMetadata,
    WriteMetadata,
    DeleteMetadata,
    List,
}

impl KvOperation {
    /// What a policy is asked.
    pub(crate) fn action(self) -> Action {
        match self {
            Self::Read { .. } | Self::ReadMetadata => Action::Read,
            Self::Write | Self::WriteMetadata => Action::Write,
            Self::DeleteLatest | Self::DeleteMetadata => Action::Delete,
            Self::Change(fate) => fate.action(),
            Self::List => Action::List,
        }
    }
}

/// Status codes that a health check asks for in place of the usual ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct HealthCodes {
    pub(crate) active: Option<u16>,
    pub(crate) sealed: Option<u16>,
    pub(crate) uninitialised: Option<u16>,
}

#[derive(Default)]
struct Query {
    version: Option<u64>,
    list: bool,
    health: HealthCodes,
}

impl Route {
    /// Parses method and target as they arrived at `front`.
    pub(crate) fn parse(front: Front, method: &Method, uri: &Uri) -> Result<Self, RouteError> {
        let query = Query::parse(uri.query().unwrap_or_default())?;
        let path = uri.path().strip_prefix("/v1/").ok_or(RouteError::Unknown)?;
        let (path, folder) = match path.strip_suffix('/') {
            Some(folder) => (folder, true),
            None => (path, false),
        };
        // The whole path keeps the rules of a secret's path, so nothing in it has a second spelling.
        SecretPath::new(path)?;
        match path.split_once('/') {
            Some((KV_MOUNT, rest)) => kv(method, rest, folder, &query),
            // The `vault` program asks about `secret/` with its slash.
            _ if folder && !path.starts_with(MOUNT_INFO) => Err(RouteError::Unknown),
            _ => system(front, method, path, &query),
        }
    }

    /// Whether it works on a sealed vault.
    pub(crate) fn works_sealed(&self) -> bool {
        matches!(self, Self::Health(_) | Self::SealStatus | Self::InitStatus | Self::Init | Self::Unseal)
    }

    /// Whether it answers about the vault's state only: anybody may ask, nothing is written down.
    pub(crate) fn is_status(&self) -> bool {
        matches!(self, Self::Health(_) | Self::SealStatus | Self::InitStatus)
    }

    /// Whether its body or answer holds keys or tokens, which not even their HMAC should outlive.
    pub(crate) fn is_ceremony(&self) -> bool {
        matches!(self, Self::Init | Self::Unseal)
    }
}

fn system(front: Front, method: &Method, path: &str, query: &Query) -> Result<Route, RouteError> {
    let (route, allowed): (Route, &'static str) = match path {
        "sys/health" => (Route::Health(query.health), "GET, HEAD"),
        "sys/seal-status" => (Route::SealStatus, "GET"),
        "auth/token/lookup-self" => (Route::LookupSelf, "GET"),
        "auth/token/revoke-self" => (Route::RevokeSelf, "POST, PUT"),
        _ if path.starts_with(MOUNT_INFO) => {
            let mount = path.strip_prefix(MOUNT_INFO).and_then(|rest| rest.split('/').next());
            if mount != Some(KV_MOUNT) {
                return Err(RouteError::Unknown);
            }
            (Route::MountInfo, "GET")
        }
        "auth/cert/login" => (Route::CertLogin, "POST, PUT"),
        // What follows is for people and their tools: the mesh listener does not have it.
        _ if front == Front::Mesh => return Err(RouteError::Unknown),
        "sys/init" if matches!(*method, Method::GET) => (Route::InitStatus, "GET, POST, PUT"),
        "sys/init" => (Route::Init, "POST, PUT"),
        "sys/unseal" => (Route::Unseal, "POST, PUT"),
        "sys/seal" => (Route::Seal, "POST, PUT"),
        "sys/mounts" => (Route::Mounts, "GET"),
        "auth/token/create" => (Route::CreateToken, "POST, PUT"),
        _ => return Err(RouteError::Unknown),
    };
    if allowed.split(", ").any(|name| name == method.as_str()) {
        Ok(route)
    } else {
        Err(RouteError::Method(allowed))
    }
}

fn kv(method: &Method, rest: &str, folder: bool, query: &Query) -> Result<Route, RouteError> {
    let (area, path) = match rest.split_once('/') {
        Some((area, path)) => (area, Some(path)),
        None => (rest, None),
    };
    let listing = method.as_str() == "LIST" || (query.list && *method == Method::GET);
    if area == "metadata" && listing {
        let target = Target::Folder(path.map(SecretPath::new).transpose()?);
        return Ok(Route::Kv(KvRoute { target, operation: KvOperation::List }));
    }
    let write = matches!(*method, Method::POST | Method::PUT);
    let operation = match (area, method) {
        ("data", _) if listing => return Err(RouteError::Method("GET, POST, PUT, DELETE")),
        ("data", &Method::GET) => KvOperation::Read { version: query.version },
        ("data", _) if write => KvOperation::Write,
        ("data", &Method::DELETE) => KvOperation::DeleteLatest,
        ("data", _) => return Err(RouteError::Method("GET, POST, PUT, DELETE")),
        ("metadata", &Method::GET) => KvOperation::ReadMetadata,
        ("metadata", _) if write => KvOperation::WriteMetadata,
        ("metadata", &Method::DELETE) => KvOperation::DeleteMetadata,
        ("metadata", _) => return Err(RouteError::Method("GET, LIST, POST, PUT, DELETE")),
        ("delete", _) if write => KvOperation::Change(Fate::Delete),
        ("undelete", _) if write => KvOperation::Change(Fate::Undelete),
        ("destroy", _) if write => KvOperation::Change(Fate::Destroy),
        ("delete" | "undelete" | "destroy", _) => return Err(RouteError::Method("POST, PUT")),
        _ => return Err(RouteError::Unknown),
    };
    // A secret's path never ends in a slash; a folder is listed, nothing else.
    let path = path.filter(|_| !folder).ok_or(PathError::EmptySegment)?;
    Ok(Route::Kv(KvRoute { target: Target::Secret(SecretPath::new(path)?), operation }))
}

impl Query {
    fn parse(text: &str) -> Result<Self, RouteError> {
        if text.len() > MAX_QUERY_BYTES {
            return Err(RouteError::Query);
        }
        let mut query = Self::default();
        let mut seen = Vec::new();
        for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
            if CREDENTIAL_PARAMETERS.contains(&name.to_ascii_lowercase().as_str()) {
                return Err(RouteError::CredentialInQuery);
            }
            let number = || value.parse::<u16>().ok().filter(|code| (100..600).contains(code));
            match name.as_ref() {
                "version" => query.version = Some(value.parse().map_err(|_| RouteError::Query)?),
                "list" => query.list = value.parse().map_err(|_| RouteError::Query)?,
                "activecode" => query.health.active = Some(number().ok_or(RouteError::Query)?),
                "sealedcode" => query.health.sealed = Some(number().ok_or(RouteError::Query)?),
                "uninitcode" => query.health.uninitialised = Some(number().ok_or(RouteError::Query)?),
                // Others mean nothing here, as in Vault.
                _ => {}
            }
            if seen.contains(&name) {
                return Err(RouteError::Query);
            }
            seen.push(name);
        }
        Ok(query)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn operator(method: &str, target: &str) -> Result<Route, RouteError> {
        Route::parse(Front::Operator, &method.parse().unwrap(), &target.parse().unwrap())
    }

    fn kv_of(route: Route) -> (String, KvOperation) {
        match route {
            Route::Kv(KvRoute { target, operation }) => (target.object_id(), operation),
            other => panic!("not a KV route: {other:?}"),
        }
    }

    #[test]
    fn each_kv_route_means_one_action_on_one_object() {
        for (method, target, object, action) in [
            ("GET", "/v1/secret/data/accounts/db-key", "accounts/db-key", Action::Read),
            ("GET", "/v1/secret/data/a?version=3", "a", Action::Read),
            ("PUT", "/v1/secret/data/a", "a", Action::Write),
            ("POST", "/v1/secret/data/a", "a", Action::Write),
            ("DELETE", "/v1/secret/data/a", "a", Action::Delete),
            ("POST", "/v1/secret/delete/a", "a", Action::Delete),
            ("POST", "/v1/secret/undelete/a", "a", Action::Write),
            ("PUT", "/v1/secret/destroy/a", "a", Action::Delete),
            ("GET", "/v1/secret/metadata/a", "a", Action::Read),
            ("POST", "/v1/secret/metadata/a", "a", Action::Write),
            ("DELETE", "/v1/secret/metadata/a", "a", Action::Delete),
            ("LIST", "/v1/secret/metadata/a", "a/", Action::List),
            ("LIST", "/v1/secret/metadata/a/", "a/", Action::List),
            ("GET", "/v1/secret/metadata/a/?list=true", "a/", Action::List),
            ("LIST", "/v1/secret/metadata", "/", Action::List),
            ("LIST", "/v1/secret/metadata/", "/", Action::List),
        ] {
            let (id, operation) = kv_of(operator(method, target).unwrap());
            assert_eq!((id.as_str(), operation.action()), (object, action), "{method} {target}");
        }
    }

    #[test]
    fn vault_1_security_31_tricks_in_targets_are_refused() {
        for bad in [
            "/v1/secret/data/a//b",
            "/v1//secret/data/a",
            "/v1/secret/data/./a",
            "/v1/secret/data/../data/a",
            "/v1/secret/data/a/..",
            "/v1/secret/data/%2e%2e/a",
            "/v1/secret/data/a%2fb",
            "/v1/%73ecret/data/a",
            "/v1/secret/data/a%00",
            "/v1/secret/data/a;x=y",
            "/v1/secret/data/a+b",
            "/v1/secret/data/a*",
            "/v1/secret/data/a/",
            "/v1/secret/data/",
            "/v1/secret/data",
        ] {
            assert!(matches!(operator("GET", bad), Err(RouteError::Path(_))), "{bad}");
        }
        for unknown in [
            "/v1",
            "/secret/data/a",
            "/V1/secret/data/a",
            "/v1/Secret/data/a",
            "/v1/secret/Data/a",
            "/v1/other/data/a",
            "/v1/sys/health/",
            "/v1/sys/raw/core/keyring",
            "/v1/secret/config",
        ] {
            assert_eq!(operator("GET", unknown), Err(RouteError::Unknown), "{unknown}");
        }
    }

    #[test]
    fn vault_8_17_security_35_37_nothing_rekeys_makes_root_tokens_or_sets_audit_paths() {
        for path in [
            "sys/rekey/init",
            "sys/rekey/update",
            "sys/generate-root/attempt",
            "sys/generate-root/update",
            "sys/rekey-recovery-key/init",
            "sys/raw/core/seal",
            "sys/audit/file",
            "sys/config/auditing/request-headers",
        ] {
            for method in ["GET", "PUT", "POST", "DELETE"] {
                assert_eq!(
                    operator(method, &format!("/v1/{path}")),
                    Err(RouteError::Unknown),
                    "{method} {path}"
                );
            }
        }
    }

    #[test]
    fn the_mesh_listener_has_no_ceremonies() {
        for (method, path) in [
            ("GET", "sys/init"),
            ("PUT", "sys/init"),
            ("PUT", "sys/unseal"),
            ("PUT", "sys/seal"),
            ("GET", "sys/mounts"),
            ("POST", "auth/token/create"),
        ] {
            let target = format!("/v1/{path}");
            assert!(operator(method, &target).is_ok(), "{path}");
            let mesh = Route::parse(Front::Mesh, &method.parse().unwrap(), &target.parse().unwrap());
            assert_eq!(mesh, Err(RouteError::Unknown), "{path}");
        }
    }

    #[test]
    fn a_token_in_a_query_is_refused_and_parameters_appear_once() {
        for bad in ["token=x", "Token=x", "X-Vault-Token=x", "%74oken=x", "version=1&token=x"] {
            let target = format!("/v1/secret/data/a?{bad}");
            assert_eq!(operator("GET", &target), Err(RouteError::CredentialInQuery), "{bad}");
        }
        for bad in ["version=1&version=2", "version=-1", "version=x", "list=maybe"] {
            assert_eq!(operator("GET", &format!("/v1/secret/data/a?{bad}")), Err(RouteError::Query), "{bad}");
        }
        assert_eq!(operator("GET", "/v1/sys/health?sealedcode=99"), Err(RouteError::Query));
    }

    #[test]
    fn methods_that_a_path_does_not_have_are_named_as_such() {
        for (method, target) in [
            ("PATCH", "/v1/secret/data/a"),
            ("LIST", "/v1/secret/data/a"),
            ("GET", "/v1/secret/destroy/a"),
            ("DELETE", "/v1/sys/health"),
            ("GET", "/v1/sys/unseal"),
            ("get", "/v1/secret/data/a"),
        ] {
            assert!(matches!(operator(method, target), Err(RouteError::Method(_))), "{method} {target}");
        }
    }

    proptest! {
        #[test]
        fn a_route_names_the_path_that_was_sent(tail in "[a-z./%+;-]{0,24}") {
            if let Ok(uri) = format!("/v1/secret/data/{tail}").parse::<Uri>()
                && let Ok(route) = Route::parse(Front::Mesh, &Method::GET, &uri)
            {
                prop_assert_eq!(kv_of(route).0, tail);
            }
        }
    }
}
