//! `palisade idp`: the embedded OpenID Connect provider, for those who have none.

use std::sync::Arc;
use std::time::Duration;

use gateway::config::{Issuer, Rate};
use gateway::idp::{Client, Idp, IdpConfig, IdpError};
use url::Url;

use crate::Global;
use crate::credentials::Credential;
use crate::failure::{Exit, Failure};
use crate::listen;
use crate::mesh::{self, Mesh, Own};
use crate::serve::{self, Started};
use crate::workload::{Workload, not_started};

/// How long requests under way may go on once the provider is asked to end.
const DRAIN: Duration = Duration::from_secs(5);
/// Life of an access token: what one that leaked is worth at most.
const ACCESS_TOKEN_TTL: Duration = Duration::from_secs(5 * 60);
/// Login attempts for one name and from one address: typing errors pass, guessing does not.
const LOGINS: Rate = Rate { per_second: 0.5, burst: 20 };

/// The client id of programs on a person's own machine, such as `palisade demo token`.
pub(crate) const COMMAND_LINE_CLIENT: &str = "palisade-cli";
/// Where such a program hears of the login; any port of it (RFC 8252 §7.3).
pub(crate) const COMMAND_LINE_REDIRECT: &str = "http://127.0.0.1/callback";

pub(crate) fn run(global: &Global) -> Result<Exit, Failure> {
    let workload = Workload::begin(global)?;
    let idp = workload.mesh.idp.as_ref().ok_or_else(|| workload.no_section("idp"))?;
    let config = IdpConfig {
        listen: listen::tcp("the provider", "[idp] listen", idp.listen)?,
        issuer: Issuer::try_from(idp.issuer.clone())
            .map_err(|error| Failure::invalid("[idp] issuer is not usable").because(&error))?,
        users: idp.users.clone(),
        clients: clients(&workload.mesh, &workload)?,
        state: idp.state.clone(),
        access_token_ttl: ACCESS_TOKEN_TTL,
        logins: LOGINS,
    };
    serve::run("idp", DRAIN, async |scope| {
        let source = workload.identity(&scope);
        let (clock, random) = (Arc::clone(&workload.clock), Arc::clone(&workload.random));
        let ready = workload.identified(source.clone(), workload.mesh.own_id(Own::Idp), None);
        let idp = Idp::start(config, source, clock, random, &scope).await.map_err(|error| {
            let failure = not_started("the provider", &error);
            match error {
                // Starting it again would read the same file.
                IdpError::Users(_) => Failure { exit: Exit::Invalid, ..failure }
                    .hint("[idp] users in mesh.toml names the file of people and password hashes"),
                _ => failure,
            }
        })?;
        Ok(Started::new(idp).ready_when(ready))
    })
}

/// The gateway, with a secret; programs of people, and what else mesh.toml names, without.
fn clients(mesh: &Mesh, workload: &Workload) -> Result<Vec<Client>, Failure> {
    let Some(gateway) = &mesh.gateway else { return Ok(Vec::new()) };
    let secret = workload.credentials.text(Credential::OidcClientSecret)?;
    let url = |text: &str| Url::parse(text).map_err(|error| Failure::new("a client's URL").because(&error));
    let join = |path: &str| {
        gateway.public_url.join(path).map_err(|error| Failure::new("the gateway's URL").because(&error))
    };
    let mut browser =
        Client::confidential(&gateway.client_id, &secret, join(gateway::CALLBACK)?, &gateway.audience);
    browser.post_logout_redirect_uris = vec![join(gateway::LOGGED_OUT)?];
    let command_line = Client::public(COMMAND_LINE_CLIENT, url(COMMAND_LINE_REDIRECT)?, &gateway.audience);
    let with_scopes =
        |client: Client, gateway: &mesh::Gateway| Client { scopes: gateway.scopes.clone(), ..client };
    let mut clients = vec![with_scopes(browser, gateway), with_scopes(command_line, gateway)];
    for (name, audience) in mesh.idp.iter().flat_map(|idp| &idp.clients) {
        clients.push(with_scopes(Client::public(name, url(COMMAND_LINE_REDIRECT)?, audience), gateway));
    }
    Ok(clients)
}
