//! `palisade gateway`: the front door for browsers and API clients.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use gateway::config::{
    Algorithm, Issuer, IssuerConfig, Rate, Route, SESSION_COOKIE, SealKey, Service, SessionLimits,
};
use gateway::gateway::SERVICE;
use gateway::{Gateway, GatewayConfig, Trust};
use identity::IdentitySource;
use policy::InForce;
use sidecar::traffic::config::Traffic;

use crate::Global;
use crate::credentials::Credential;
use crate::decisions;
use crate::discovery::Discovery;
use crate::failure::{Exit, Failure};
use crate::listen;
use crate::mesh::{self, Mesh, Own};
use crate::policies;
use crate::serve::{self, Started};
use crate::workload::{Workload, not_started};

/// How long requests under way may go on once the gateway is asked to end: as long as a service's own.
const DRAIN: Duration = Duration::from_secs(10);

/// Requests of one principal: what a person with an impatient browser does, and far below what hurts.
const REQUESTS: Rate = Rate { per_second: 500.0, burst: 1000 };
/// Failed authentications of one address: guessing is hopeless, a script with an old token recovers.
const FAILED_AUTHENTICATIONS: Rate = Rate { per_second: 5.0, burst: 50 };

/// What is asked for at login beside what mesh.toml names: who the person is, and to stay logged in.
const SCOPES: [&str; 3] = ["profile", "groups", "offline_access"];

/// Signatures of an external provider that are taken: those that providers use, all asymmetric.
const ALGORITHMS: [Algorithm; 6] = [
    Algorithm::Es256,
    Algorithm::EdDsa,
    Algorithm::Rs256,
    Algorithm::Ps256,
    Algorithm::Es384,
    Algorithm::Rs384,
];

pub(crate) fn run(global: &Global) -> Result<Exit, Failure> {
    let workload = Workload::begin(global)?;
    let gateway = workload.mesh.gateway.as_ref().ok_or_else(|| workload.no_section("gateway"))?;
    let at_start = policies::at_start(&workload, SERVICE)?;
    let listen = listen::tcp("the gateway", "[gateway] listen", gateway.listen)?;
    let client_secret = workload.credentials.text(Credential::OidcClientSecret)?;
    let seal_key =
        SealKey::new(workload.credentials.text(Credential::GatewaySessionKey)?).map_err(|error| {
            Failure::invalid("the credential gateway-session-key is not usable")
                .because(&error)
                .hint("head -c 32 /dev/urandom | base64 makes one")
        })?;
    let issuer = Issuer::try_from(gateway.issuer.clone())
        .map_err(|error| Failure::invalid("[gateway] issuer is not usable").because(&error))?;
    let mut discovery = Discovery::default();
    let services = services(gateway, &workload.mesh, &mut discovery);
    serve::run("gateway", DRAIN, async |scope| {
        let source = workload.identity(&scope);
        let issuer = IssuerConfig {
            issuer,
            client_id: gateway.client_id.clone(),
            client_secret,
            audience: gateway.audience.clone(),
            algorithms: ALGORITHMS.to_vec(),
            require_at_jwt_typ: true,
            scopes: SCOPES.iter().map(ToString::to_string).chain(gateway.scopes.iter().cloned()).collect(),
            // Our own provider repeats the successor of a refresh token whose answer was lost.
            refresh_retry_safe: is_own_provider(gateway, &workload.mesh),
            trust: trust(gateway, &workload.mesh, &source)?,
        };
        let config = GatewayConfig {
            listen,
            proxies: gateway.proxies.clone(),
            public_url: gateway.public_url.clone(),
            issuers: vec![issuer],
            routes: routes(gateway),
            services,
            sessions: SessionLimits::default(),
            requests: REQUESTS,
            failed_authentications: FAILED_AUTHENTICATIONS,
            state: gateway.state.clone(),
            seal_keys: vec![seal_key],
            cookie: SESSION_COOKIE.to_owned(),
            traces: workload.mesh.traces.clone(),
        };
        discovery.follow(&workload, &scope);
        let recorder = decisions::recorder(&workload, &scope);
        let (clock, random) = (Arc::clone(&workload.clock), Arc::clone(&workload.random));
        let in_force = InForce::from(Arc::clone(&at_start));
        let followed = policies::follow(&workload, SERVICE, &source, at_start, None, &scope);
        let id = workload.mesh.own_id(Own::Gateway);
        let ready = workload.identified(source.clone(), id, policies::awaited(&followed));
        let gateway = Gateway::start(config, source, in_force.clone(), recorder, clock, random, &scope)
            .await
            .map_err(|error| not_started("the gateway", &error))?;
        let (replaced, mesh) = (in_force.clone(), workload.mesh.clone());
        policies::apply(followed, move |policy| replaced.replace(policy), |_stale| {}, &scope);
        let reload = move || policies::reload(&mesh, SERVICE, |policy| in_force.replace(policy));
        Ok(Started::new(gateway).ready_when(ready).reloaded_by(reload))
    })
}

fn is_own_provider(gateway: &mesh::Gateway, mesh: &Mesh) -> bool {
    mesh.idp.as_ref().is_some_and(|idp| idp.issuer == gateway.issuer)
}

/// Our own provider proves its SPIFFE ID; others have a certificate of the public authorities.
fn trust(gateway: &mesh::Gateway, mesh: &Mesh, source: &IdentitySource) -> Result<Trust, Failure> {
    if is_own_provider(gateway, mesh) {
        return Ok(Trust::Mesh { source: source.clone(), expected: mesh.own_id(Own::Idp) });
    }
    Trust::pem_file(&gateway.issuer_ca).map_err(|error| {
        Failure::invalid("the authorities for the provider's certificate cannot be used")
            .because(&error)
            .hint("name a PEM file with [gateway] issuer_ca")
    })
}

fn routes(gateway: &mesh::Gateway) -> Vec<Route> {
    let route = |(prefix, name): (&String, &mesh::ServiceName)| Route {
        prefix: prefix.clone(),
        service: name.to_string(),
    };
    gateway.routes.iter().map(route).collect()
}

/// Those that its routes lead to, and those that their traffic names.
fn services(gateway: &mesh::Gateway, mesh: &Mesh, discovery: &mut Discovery) -> Vec<Service> {
    let routed: BTreeSet<&mesh::ServiceName> = gateway.routes.values().collect();
    let traffic = routed.iter().filter_map(|name| mesh.traffic.get(*name));
    let named: BTreeSet<&str> = traffic.flat_map(Traffic::named).collect();
    let called =
        mesh.service.iter().filter(|(name, _)| routed.contains(name) || named.contains(name.as_str()));
    let service = |(name, service): (&mesh::ServiceName, &mesh::Service)| Service {
        name: name.to_string(),
        id: service.id.clone(),
        endpoints: discovery.source(service),
        traffic: mesh.traffic.get(name).cloned().unwrap_or_default(),
    };
    called.map(service).collect()
}
