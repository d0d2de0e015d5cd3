//! On whose behalf a request comes: the transaction token in its headers, verified.

use std::time::Duration;

use http::request::Parts;
use identity::txn::{Arrival, Chain, RequestBinding, TxnError, Verifier};
use identity::{Identity, SpiffeId};

use crate::headers;

/// The transaction token, verified and bound to this peer and this request. None is fine: policy says
/// which calls may come without a user.
pub(crate) fn verify(
    verifier: &Verifier,
    parts: &Parts,
    presenter: &SpiffeId,
    identity: &Identity,
    now: Duration,
) -> Result<Option<Chain>, TxnError> {
    let mut tokens = parts.headers.get_all(&headers::TXN_TOKEN).iter();
    let Some(token) = tokens.next() else { return Ok(None) };
    let token = token.to_str().map_err(|_| TxnError::Form)?;
    if tokens.next().is_some() {
        return Err(TxnError::Form);
    }
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
    let arrival = Arrival {
        me: identity.svid.id(),
        presenter,
        bundles: &identity.bundles,
        generation: identity.generation,
        binding: RequestBinding::new(parts.method.as_str(), target),
        now,
    };
    verifier.verify(token, arrival).map(Some)
}

/// The rule that refused a transaction token.
pub(crate) fn rule(error: &TxnError) -> &'static str {
    match error {
        TxnError::Form | TxnError::Jws(identity::jws::JwsError::Form) => "txn.malformed",
        TxnError::Jws(identity::jws::JwsError::Signature) => "txn.bad_signature",
        TxnError::Jws(_) | TxnError::Member(_) => "txn.malformed",
        TxnError::Signer(_) => "txn.unknown_signer",
        TxnError::NotFromGateway => "txn.not_from_gateway",
        TxnError::BrokenChain => "txn.broken_chain",
        TxnError::WrongPresenter => "txn.wrong_presenter",
        TxnError::WrongAudience => "txn.wrong_audience",
        TxnError::Expired => "txn.expired",
        TxnError::NotYetValid => "txn.not_yet_valid",
        TxnError::WrongRequest => "txn.wrong_request",
        TxnError::Replayed => "txn.replayed",
        TxnError::ReplayMemoryFull => "txn.replay_memory_full",
    }
}
