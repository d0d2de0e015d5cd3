//! The bank as a mesh: which processes there are, and the mesh.toml that describes them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use super::layout::Layout;
use super::{people, policies};

/// The demo's root of trust.
pub(crate) const TRUST_DOMAIN: &str = "bank.example";
/// The bank's services.
pub(crate) const SERVICES: [&str; 3] = ["web", "accounts", "payments"];
/// Who calls whom: service, callee.
pub(crate) const CALLS: [(&str, &str); 5] = [
    ("web", "accounts"),
    ("web", "payments"),
    ("accounts", "payments"),
    ("accounts", "vault"),
    ("payments", "accounts"),
];
/// The workload whose SVID lives seconds, so that an expired one can be shown.
pub(crate) const PROBE: &str = "probe";
/// How long it lives.
const PROBE_TTL: Duration = Duration::from_secs(10);

/// The names of all addresses that the demo needs, each a port on 127.0.0.1.
pub(crate) fn addresses() -> Vec<String> {
    let fixed = ["control", "console", "gateway", "idp", "vault", "vault.operator"];
    let mut names: Vec<String> = fixed.map(str::to_owned).to_vec();
    for service in SERVICES {
        for part in ["app", "inbound", "admin"] {
            names.push(format!("{service}.{part}"));
        }
    }
    names.extend(CALLS.map(|(service, callee)| format!("{service}.calls.{callee}")));
    names
}

/// The mesh.toml of the demo; `addresses` has one for each of [`addresses`].
pub(crate) fn mesh_toml(
    layout: &Layout,
    addresses: &BTreeMap<String, SocketAddr>,
    svid_ttl: Duration,
    rotate_after: Duration,
) -> String {
    // INVARIANT: `addresses` has every name of `addresses()`; one left out would show as port 0.
    let at =
        |name: &str| addresses.get(name).copied().unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
    let path = |path: std::path::PathBuf| toml::Value::String(path.display().to_string()).to_string();
    let program = |role: &str| path(layout.program(role));
    let data = |role: &str| path(layout.data(role));
    let mut text = format!(
        "# Written by `palisade demo` at each start; change the policies beside it, not this file.\n\n\
         [mesh]\ntrust_domain = \"{TRUST_DOMAIN}\"\npolicies = {policies}\n\n\
         [control]\nlisten = \"{control}\"\nconsole = \"{console}\"\nadmin_socket = {admin}\nstate = {control_state}\n\
         svid_ttl = \"{ttl}s\"\nrotate_after = \"{rotate}s\"\n\n\
         [agent]\nhost = \"local\"\nsocket = {socket}\nstate = {agent_state}\n\n\
         [gateway]\nlisten = \"{gateway}\"\nissuer = \"https://{idp}\"\nclient_id = \"bank-web\"\nscopes = [\"{scope}\"]\n\
         routes = {{ \"/\" = \"web\" }}\nstate = {gateway_state}\nattest = {{ path = {gateway_program} }}\n\n\
         [idp]\nlisten = \"{idp}\"\nissuer = \"https://{idp}\"\nusers = {users}\nclients = {{ {other} = \"{other_audience}\" }}\nstate = {idp_state}\nattest = {{ path = {idp_program} }}\n\n\
         [vault]\nlisten = \"{vault}\"\noperator = \"{operator}\"\nstate = {vault_state}\nattest = {{ path = {vault_program} }}\n\n",
        policies = path(layout.policies()),
        control = at("control"),
        console = at("console"),
        admin = path(layout.admin_socket()),
        control_state = data("control"),
        ttl = svid_ttl.as_secs(),
        rotate = rotate_after.as_secs(),
        socket = path(layout.agent_socket()),
        agent_state = data("agent"),
        gateway = at("gateway"),
        idp = at("idp"),
        scope = people::BANK_SCOPE,
        other = people::OTHER_CLIENT,
        other_audience = people::OTHER_AUDIENCE,
        gateway_state = data("gateway"),
        gateway_program = program("gateway"),
        users = path(layout.users()),
        idp_state = data("idp"),
        idp_program = program("idp"),
        vault = at("vault"),
        operator = at("vault.operator"),
        vault_state = data("vault"),
        vault_program = program("vault"),
    );
    for service in SERVICES {
        // Writing to a String cannot fail.
        let _infallible = writeln!(
            text,
            "[service.{service}]\napp = \"{app}\"\ninbound = \"{inbound}\"\nadmin = \"{admin}\"\n\
             endpoints = [\"control\"]\nattest = {{ path = {program} }}\ncalls = {{ {calls} }}\nsecrets = [{secrets}]\n",
            app = at(&format!("{service}.app")),
            inbound = at(&format!("{service}.inbound")),
            admin = at(&format!("{service}.admin")),
            program = program(&format!("{service}-sidecar")),
            calls = calls(service, &at),
            secrets = if service == "accounts" { "\"accounts/db-key\"" } else { "" },
        );
    }
    if policies::is_repository(&layout.policies()) {
        let repository = path(layout.policies());
        let _infallible = writeln!(text, "[policy]\nrepository = {repository}\ndirectory = \".\"\n");
    }
    let _infallible = writeln!(
        text,
        "# Fetches its own identity and has no sidecar: the attack run shows with it what an expired SVID is worth.\n\
         [workload.{PROBE}]\nattest = {{ path = {program} }}\nttl = \"{ttl}s\"",
        program = program(PROBE),
        ttl = PROBE_TTL.as_secs(),
    );
    text
}

fn calls(service: &str, at: &dyn Fn(&str) -> SocketAddr) -> String {
    let mine = CALLS.iter().filter(|(caller, _)| *caller == service);
    let entries: Vec<String> = mine
        .map(|(_, callee)| format!("{callee} = \"{}\"", at(&format!("{service}.calls.{callee}"))))
        .collect();
    entries.join(", ")
}
