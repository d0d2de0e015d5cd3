//! Who may do what with a secret: the one place that makes a [`Permit`].
//!
//! The KV engine takes a permit and nothing else, and the permit names the secret: what was judged is
//! what is touched, by type.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use identity::{Peer, SpiffeId};
use thiserror::Error;

use crate::path::SecretPath;
use crate::token::Token;

/// What a request does to a secret, as policies name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Read data or metadata.
    Read,
    /// Write a version or metadata, or bring a version back.
    Write,
    /// Delete or destroy versions, or all of it.
    Delete,
    /// See the names in a folder.
    List,
}

impl Action {
    /// The Cedar action.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "ReadSecret",
            Self::Write => "WriteSecret",
            Self::Delete => "DeleteSecret",
            Self::List => "ListSecrets",
        }
    }
}

/// What a request is about: one secret, or a folder of them (`None` is the whole mount).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// One secret.
    Secret(SecretPath),
    /// A folder; `None` is the mount itself.
    Folder(Option<SecretPath>),
}

impl Target {
    /// The id of the `Vault::Secret` object: `accounts/db-key`; a folder ends in a slash, so that it is
    /// never taken for the secret of the same name. The mount itself is `/`.
    pub fn object_id(&self) -> String {
        match self {
            Self::Secret(path) => path.as_str().to_owned(),
            Self::Folder(Some(path)) => format!("{path}/"),
            Self::Folder(None) => "/".to_owned(),
        }
    }
}

/// A workload's request, ready to be judged.
#[derive(Debug, Clone)]
pub struct AccessRequest<'a> {
    /// Who asks, as its handshake proved.
    pub caller: &'a SpiffeId,
    /// From where.
    pub address: SocketAddr,
    /// To do what.
    pub action: Action,
    /// To what.
    pub target: &'a Target,
    /// The request's method.
    pub method: &'a str,
    /// The request's target, as it arrived.
    pub uri: &'a str,
    /// When, since the Unix epoch.
    pub now: Duration,
    /// The W3C trace id, if the request came with one.
    pub trace_id: Option<&'a str>,
}

/// A policy's yes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The rule that allowed it.
    pub rule: String,
    /// The decision's id.
    pub receipt: String,
}

/// A policy's no. The caller is told the receipt and nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("denied")]
pub struct Denial {
    /// The decision's id; `None` if not even that could be made.
    pub receipt: Option<String>,
}

/// Decides about workloads. Every decision is recorded by whoever implements this.
pub trait Authorizer: Send + Sync {
    /// Judges one request. Must not block.
    fn may(&self, request: &AccessRequest<'_>) -> Result<Grant, Denial>;
}

/// Why a caller gets no permit.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Policy says no.
    #[error(transparent)]
    Denied(#[from] Denial),
    /// A token without the right.
    #[error("the token does not allow it")]
    Token,
}

/// The right to do one thing to one secret or folder.
///
/// INVARIANT: made only by [`workload`] and [`operator`] below.
pub struct Permit {
    action: Action,
    target: Target,
    rule: String,
    receipt: Option<String>,
}

impl Permit {
    /// The secret, if this permits `action` on one.
    pub(crate) fn secret(&self, action: Action) -> Option<&SecretPath> {
        match &self.target {
            Target::Secret(path) if self.action == action => Some(path),
            _ => None,
        }
    }

    /// The folder (`Some(None)` is the mount itself), if this permits to list one.
    pub(crate) fn folder(&self) -> Option<Option<&SecretPath>> {
        match &self.target {
            Target::Folder(path) if self.action == Action::List => Some(path.as_ref()),
            _ => None,
        }
    }

    /// The rule that allowed.
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// The decision's id, when policy decided.
    pub fn receipt(&self) -> Option<&str> {
        self.receipt.as_deref()
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permit({} {} by {})", self.action.name(), self.target.object_id(), self.rule)
    }
}

/// A workload asks: policy decides, whatever token it carries.
pub(crate) fn workload(authorizer: &dyn Authorizer, request: &AccessRequest<'_>) -> Result<Permit, Refusal> {
    let Grant { rule, receipt } = authorizer.may(request)?;
    Ok(Permit { action: request.action, target: request.target.clone(), rule, receipt: Some(receipt) })
}

/// An operator asks with a token: only a root token reaches secrets.
pub(crate) fn operator(token: &Token, action: Action, target: &Target) -> Result<Permit, Refusal> {
    if !token.is_root() {
        return Err(Refusal::Token);
    }
    Ok(Permit { action, target: target.clone(), rule: "token policy root".to_owned(), receipt: None })
}

/// Whether a token may be used by this caller: a token made at a login belongs to the SVID that logged in,
/// any other to nobody on the mesh.
pub(crate) fn token_belongs_to(token: &Token, peer: Option<&Peer>) -> bool {
    match (token.bound_to(), peer) {
        (Some(owner), Some(peer)) => owner == peer.id(),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A permit without a judge, for tests of what lies behind it.
    pub(crate) fn permit(action: Action, path: &str) -> Permit {
        let target = match (action, path) {
            (Action::List, "") => Target::Folder(None),
            (Action::List, path) => Target::Folder(Some(SecretPath::new(path).unwrap())),
            (_, path) => Target::Secret(SecretPath::new(path).unwrap()),
        };
        Permit { action, target, rule: "test".into(), receipt: None }
    }

    #[test]
    fn vault_2_security_33_a_folder_is_another_object_than_a_secret_of_its_name() {
        let path = SecretPath::new("accounts/db-key").unwrap();
        assert_eq!(Target::Secret(path.clone()).object_id(), "accounts/db-key");
        assert_eq!(Target::Folder(Some(path)).object_id(), "accounts/db-key/");
        assert_eq!(Target::Folder(None).object_id(), "/");
    }

    #[test]
    fn a_permit_serves_its_own_action_only() {
        assert!(permit(Action::Read, "a").secret(Action::Read).is_some());
        assert!(permit(Action::Read, "a").secret(Action::Write).is_none());
        assert!(permit(Action::Read, "a").folder().is_none());
        assert!(permit(Action::List, "a").secret(Action::List).is_none());
        assert_eq!(permit(Action::List, "").folder(), Some(None));
    }
}
