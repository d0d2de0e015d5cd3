//! Who is asking.
//!
//! On the mesh listener the SVID is the login: a request is authenticated by the connection it came over,
//! with no token and nothing stored. A client that insists on a token logs in at `auth/cert/login` and gets
//! one that is bound to its SVID: it ends no later and is refused from anybody else. On the operator's
//! listener a token is all there is.

use std::time::Duration;

use identity::Peer;
use secrecy::SecretString;

use crate::authorize::token_belongs_to;
use crate::core::Core;
use crate::token::{Issued, LOGIN_TTL, NewToken, Policy, Token, TokenError};

/// Who sent a request, proved.
#[derive(Debug)]
pub(crate) enum Caller {
    /// A workload by its SVID, perhaps with a token of its own.
    Workload { peer: Peer, token: Option<Presented> },
    /// A person or tool by its token.
    Operator(Presented),
    /// Nobody in particular: on the operator's listener, without a token.
    Nobody,
}

/// A token that is good, and its text, which the maker of another must show again.
#[derive(Debug)]
pub(crate) struct Presented {
    pub(crate) token: Token,
    pub(crate) secret: SecretString,
}

impl Caller {
    /// The token, if there is one.
    pub(crate) fn token(&self) -> Option<&Token> {
        match self {
            Self::Workload { token, .. } => token.as_ref().map(|presented| &presented.token),
            Self::Operator(presented) => Some(&presented.token),
            Self::Nobody => None,
        }
    }
}

/// Establishes who sent a request. `peer` is whom the connection's handshake proved.
///
/// # Errors
/// [`TokenError::Invalid`] for a token that is unknown, has expired, or belongs to somebody else, and for an
/// SVID that has expired since the handshake: the four are one to the caller.
pub(crate) async fn identify(
    core: &Core,
    peer: Option<&Peer>,
    token: Option<SecretString>,
) -> Result<Caller, TokenError> {
    if peer.is_some_and(|peer| core.now() > peer.not_after()) {
        return Err(TokenError::Invalid);
    }
    let presented = match token {
        Some(secret) => {
            let token = core.token(&secret).await?;
            if !token_belongs_to(&token, peer) {
                return Err(TokenError::Invalid);
            }
            Some(Presented { token, secret })
        }
        None => None,
    };
    Ok(match (peer, presented) {
        (Some(peer), token) => Caller::Workload { peer: peer.clone(), token },
        (None, Some(presented)) => Caller::Operator(presented),
        (None, None) => Caller::Nobody,
    })
}

/// Logs a workload in: a token that is worth what its SVID is worth, for as long.
pub(crate) async fn login(core: &Core, peer: &Peer) -> Result<Issued, TokenError> {
    let left = peer.not_after().saturating_sub(core.now());
    if left == Duration::ZERO {
        return Err(TokenError::Invalid);
    }
    // A display name is for people and has its limit; the whole ID is in `bound_to`.
    let display_name = peer.id().path().chars().take(64).collect::<String>();
    let new = NewToken {
        policy: Policy::Default,
        display_name: format!("cert{}", display_name.replace('/', "-")),
        path: "auth/cert/login",
        ttl: Some(left.min(LOGIN_TTL)),
        parent: None,
        bound_to: Some(peer.id().clone()),
    };
    core.issue(new, None).await
}

#[cfg(test)]
mod tests {
    use identity::clock::{Clock as _, ManualClock, SystemClock};
    use identity::testing::TestAuthority;

    use super::*;
    use crate::barrier::tests::random;

    #[tokio::test]
    async fn an_svid_that_ended_since_the_handshake_is_nobodys() {
        let directory = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(SystemClock.now());
        let (state, audit) = (directory.path().join("state"), directory.path().join("audit.jsonl"));
        let core = Core::open(&state, &audit, clock.clone(), random()).await.unwrap();
        let svid = TestAuthority::new("bank.example").issue("/service/accounts");
        let peer = Peer::from_handshake(Some(svid.chain())).unwrap().unwrap();
        assert!(matches!(identify(&core, Some(&peer), None).await, Ok(Caller::Workload { .. })));
        assert!(matches!(identify(&core, None, None).await, Ok(Caller::Nobody)));
        clock.set(peer.not_after() + Duration::from_nanos(1));
        assert!(matches!(identify(&core, Some(&peer), None).await, Err(TokenError::Invalid)));
        assert!(matches!(login(&core, &peer).await, Err(TokenError::Invalid)));
    }
}
