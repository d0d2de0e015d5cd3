//! `palisade control`: the certificate authority, registrations, decisions, and the console.

mod following;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ca::KeyFileError;
use ca::control::{Control, ControlConfig, ControlError, Entry, RelationsConfig, Selectors};
use ca::random::SystemRandom;
use identity::{Scope, files, hex};
use secrecy::{ExposeSecret as _, SecretString};

use crate::Global;
use crate::cmd::console::Model;
use crate::credentials::Credential;
use crate::failure::{Exit, Failure};
use crate::listen;
use crate::mesh::{Mesh, Registration, check};
use crate::serve::{self, Started};
use crate::workload::{SharedRandom, Workload, not_started};

/// How long streams may go on once control is asked to end: agents open them again by themselves.
const DRAIN: Duration = Duration::from_secs(2);
/// Life of a new root. Its successor is made by hand in this version, so it is not short.
const ROOT_TTL: Duration = Duration::from_secs(5 * 365 * 24 * 60 * 60);
/// Decisions kept, a few KiB each: days of denials, and a bound on the disk.
const DECISIONS_KEPT: usize = 100_000;
/// Random bytes of a console token.
const CONSOLE_TOKEN_BYTES: usize = 24;
/// The file in control's state directory that holds the console's token, if no credential gives one.
pub(crate) const CONSOLE_TOKEN_FILE: &str = "console-token";

pub(crate) fn run(global: &Global) -> Result<Exit, Failure> {
    let workload = Workload::begin(global)?;
    let mesh = &workload.mesh;
    let passphrase = workload.credentials.text(Credential::CaPassphrase)?;
    let console_credential = workload.credentials.optional_text(Credential::ConsoleToken)?;
    let console_listener = listen::tcp("the console", "[control] console", mesh.control.console)?;
    let config = ControlConfig {
        trust_domain: mesh.mesh.trust_domain.clone(),
        listener: listen::tcp("control", "[control] listen", mesh.control.listen)?,
        admin_socket: mesh.control.admin_socket.clone(),
        state: mesh.control.state.clone(),
        svid_ttl: mesh.control.svid_ttl,
        rotate_after: mesh.control.rotate_after,
        root_ttl: ROOT_TTL,
        entries: entries(mesh),
        passphrase,
        decisions_kept: DECISIONS_KEPT,
        policies: following::config(mesh),
        relations: relations(mesh),
    };
    serve::run("control", DRAIN, async |scope| {
        let control = Control::start(config, Arc::clone(&workload.clock), SystemRandom::shared(), &scope)
            .await
            .map_err(|error| refused(&error))?;
        let token = match console_credential {
            Some(token) => token,
            None => console_token(&mesh.control.state, &workload.random)?,
        };
        if let Some(source) = &mesh.policy {
            let (handle, clock) = (control.handle(), Arc::clone(&workload.clock));
            let trust_domain = mesh.mesh.trust_domain.clone();
            following::follow(source.clone(), &mesh.control.state, trust_domain, handle, clock, &scope);
        }
        let model = Arc::new(Model::new(control.handle()));
        let router = console::router_with_clock(model, token, Arc::clone(&workload.clock));
        serve_console(console_listener, router, &scope)?;
        Ok(Started::new(control))
    })
}

fn refused(error: &ControlError) -> Failure {
    let failure = not_started("control", error);
    match error {
        ControlError::KeyFile(KeyFileError::Passphrase(_)) => Failure { exit: Exit::Invalid, ..failure }
            .hint(format!(
                "the credential {} is not the one that this authority was made with",
                Credential::CaPassphrase.file_name()
            )),
        _ => failure,
    }
}

/// The registrations of mesh.toml as control takes them.
pub(crate) fn entries(mesh: &Mesh) -> Vec<Entry> {
    mesh.registrations().into_iter().map(entry).collect()
}

/// Whose relations control keeps, by the name of their policies: services that share those share them.
fn relations(mesh: &Mesh) -> RelationsConfig {
    let mut config = RelationsConfig::default();
    for service in mesh.service.values() {
        let of = config.services.entry(service.policies.to_string()).or_default();
        of.readers.insert(service.id.clone());
        of.writers.insert(service.id.clone());
        of.writers.extend(service.relations_writers.iter().filter_map(|name| mesh.id_of(name)).cloned());
    }
    config
}

fn entry(registration: Registration) -> Entry {
    let (mut dns, mut ips) = (Vec::new(), Vec::new());
    match registration.public_host {
        Some(url::Host::Domain(name)) => dns.push(name),
        Some(url::Host::Ipv4(ip)) => ips.push(ip.into()),
        Some(url::Host::Ipv6(ip)) => ips.push(ip.into()),
        None => {}
    }
    let attest = registration.attest;
    Entry {
        id: registration.id,
        selectors: Selectors {
            uid: attest.uid,
            gid: attest.gid,
            path: attest.path,
            sha256: attest.sha256.map(|digest| hex::encode(&digest)),
        },
        dns,
        ips,
        ttl: registration.ttl,
        hosts: (registration.host != check::ANY_HOST).then(|| vec![registration.host]),
    }
}

fn serve_console(listener: TcpListener, router: axum::Router, scope: &Scope) -> Result<(), Failure> {
    let refused = |error: &std::io::Error| not_started("the console", error);
    listener.set_nonblocking(true).map_err(|error| refused(&error))?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(|error| refused(&error))?;
    let draining = scope.clone();
    scope.spawn_critical("console", async move {
        let stop = async move { draining.draining().await };
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stop).await {
            tracing::error!(%error, "the console cannot be served");
        }
    });
    Ok(())
}

/// The token in the state directory, made at the first start.
fn console_token(state: &Path, random: &SharedRandom) -> Result<SecretString, Failure> {
    let path = state.join(CONSOLE_TOKEN_FILE);
    let failed = |error: &dyn std::error::Error| {
        Failure::new(format!("the console's token in {} cannot be used", path.display())).because(error)
    };
    match fs::read_to_string(&path) {
        Ok(token) if !token.trim().is_empty() => return Ok(SecretString::from(token.trim())),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(&error)),
    }
    let mut bytes = zeroize::Zeroizing::new([0; CONSOLE_TOKEN_BYTES]);
    random.fill(bytes.as_mut()).map_err(|_| Failure::new("the system's random generator failed"))?;
    let token = SecretString::from(hex::encode(bytes.as_ref()));
    files::private_directory(state)
        .and_then(|()| files::write_private(&path, token.expose_secret().as_bytes()))
        .map_err(|error| failed(&error))?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::mesh::file::MeshFile;
    use crate::mesh::schema;

    #[test]
    fn what_browsers_connect_to_is_certified_for_its_host_and_services_are_not() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("policies")).unwrap();
        let text = schema::sample::<MeshFile>()
            .replace("#public_url = \"https://127.0.0.1:8443\"", "public_url = \"https://bank.test\"");
        let mesh = Mesh::parse(&text, &directory.path().join("mesh.toml"), "host-1").unwrap();
        let entries = entries(&mesh);
        let of = |path: &str| entries.iter().find(|entry| entry.id.path() == path).unwrap();
        assert_eq!(of("/palisade/gateway").dns, ["bank.test"]);
        assert_eq!(of("/palisade/idp").ips, [std::net::IpAddr::from([127, 0, 0, 1])]);
        let web = of("/service/web");
        assert!(web.dns.is_empty() && web.ips.is_empty() && web.hosts.is_none());
        assert_eq!(web.selectors.uid, Some(1001));
    }

    #[test]
    fn the_consoles_token_is_made_once_and_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let random = identity::random::system();
        let first = console_token(&state, &random).unwrap();
        let second = console_token(&state, &random).unwrap();
        assert_eq!(first.expose_secret(), second.expose_secret());
        assert_eq!(first.expose_secret().len(), 2 * CONSOLE_TOKEN_BYTES);
        let mode = fs::metadata(state.join(CONSOLE_TOKEN_FILE)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
