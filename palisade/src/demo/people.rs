//! The demo's two users: made once for a state directory, and how they log in without a browser.

use std::collections::BTreeMap;
use std::sync::Arc;

use gateway::config::Issuer;
use gateway::https::Trust;
use gateway::idp::users::{self, User};
use gateway::login::{self, Person, Tokens};
use identity::clock::SharedClock;
use ring::rand::SecureRandom;
use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use super::layout::Layout;
use super::private;
use crate::failure::Failure;

/// Who there is: name, and what pages call them.
pub(crate) const PEOPLE: [(&str, &str); 2] = [("alice", "Alice"), ("bob", "Bob")];
/// The public client of command lines (RFC 8252); its tokens are for the gateway.
pub(crate) const CLI_CLIENT: &str = "palisade-cli";
/// A client of another API: its tokens are genuine, and none of the gateway's business.
pub(crate) const OTHER_CLIENT: &str = "reports";
/// That API.
pub(crate) const OTHER_AUDIENCE: &str = "https://reports.bank.example";
/// Where public clients are sent back to; nothing listens there.
pub(crate) const LOOPBACK_REDIRECT: &str = "http://127.0.0.1/callback";
/// What a user of the bank may be asked to grant.
pub(crate) const BANK_SCOPE: &str = "bank";

/// The users' passwords: read, or made at random with the file of their hashes.
pub(crate) fn passwords(
    layout: &Layout,
    random: &dyn SecureRandom,
) -> Result<BTreeMap<String, SecretString>, Failure> {
    let mut passwords = BTreeMap::new();
    let mut hashed = Vec::new();
    for (name, display_name) in PEOPLE {
        let password = private::keep(&layout.credentials("people").join(name), || private::password(random))?;
        let hash = users::hash_password(&password, random)
            .map_err(|error| Failure::new("cannot hash a password").because(&error))?;
        hashed.push(User {
            name: name.to_owned(),
            password: hash,
            display_name: display_name.to_owned(),
            groups: vec!["customers".to_owned()],
        });
        passwords.insert(name.to_owned(), password);
    }
    let text = users::to_toml(hashed)
        .map_err(|error| Failure::new("cannot write the users' file").because(&error))?;
    private::write(&layout.users(), text.as_bytes())?;
    Ok(passwords)
}

/// Logs a user in with a public client and returns the tokens.
pub(crate) async fn tokens(
    issuer: &str,
    client: &str,
    user: &str,
    password: &SecretString,
    trust: Trust,
    clock: &SharedClock,
) -> Result<Tokens, Failure> {
    let wrong = |what: &str| Failure::new(format!("{what} in the ready file is no URL"));
    let issuer: Issuer = issuer.parse().map_err(|_| wrong("the OpenID Connect provider"))?;
    let redirect = Url::parse(LOOPBACK_REDIRECT).map_err(|_| wrong("the redirect"))?;
    let person = Person { name: user, password };
    let random: gateway::SharedRandom = Arc::new(ring::rand::SystemRandom::new());
    let scope = format!("openid {BANK_SCOPE}");
    login::access_token(&issuer, client, &redirect, &scope, person, trust, clock, &random)
        .await
        .map_err(|error| Failure::new(format!("{user} cannot log in")).because(&error))
}

/// The text of an access token, for a person to paste.
pub(crate) fn exposed(tokens: &Tokens) -> &str {
    tokens.access_token.expose_secret()
}
