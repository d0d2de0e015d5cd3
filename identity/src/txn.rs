//! Transaction tokens: on whose behalf a request travels, and through whose hands it came.
//!
//! The gateway mints a `Txn-Token` for a verified user (draft-ietf-oauth-transaction-tokens): a JWT of
//! type `txntoken+jwt` signed with the gateway's own SVID key, naming its next holder in `dst`. Each
//! holder that calls on appends a link, a JWT of type `txnlink+jwt` signed with *its* SVID key:
//!
//! ```text
//! Txn-Token: <token by gateway, dst = web>~<link by web, dst = accounts>~<link by accounts, dst = …>
//! ```
//!
//! A callee accepts a chain only if it begins at a gateway of its own trust domain, every link is signed
//! by the holder that the part before it named, the last part names the callee itself, and the last
//! signer is the mTLS peer. So a token stolen from one workload is useless to every other, and who passed
//! it on shows in [`Chain::hops`].
//!
//! Signing with the SVID key needs no second key to distribute or rotate: `x5c` carries the signer's
//! leaf, and the trust bundle that verifies mTLS peers verifies it too.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use rustls_pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::bundle::BundleSet;
use crate::id::SpiffeId;
use crate::jws::{self, Compact, JwsError};
use crate::svid::X509Svid;
use crate::verify::{self, VerifyError};

/// The header that carries a chain.
pub const HEADER: &str = "txn-token";
/// Longest life of a token and of everything appended to it.
pub const MAX_LIFETIME: Duration = Duration::from_secs(30);
/// Most parts a chain may have: the token and seven links.
pub const MAX_PARTS: usize = 8;
/// Longest header value looked at.
pub const MAX_CHAIN_BYTES: usize = 24 * 1024;
/// How far another host's clock may be ahead of ours.
pub const CLOCK_SKEW: Duration = Duration::from_secs(5);

const TOKEN_TYPE: &str = "txntoken+jwt";
const LINK_TYPE: &str = "txnlink+jwt";
const SEPARATOR: char = '~';

/// The person (or API client) on whose behalf a request travels, as the gateway verified it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Subject at the issuer: `alice`.
    pub id: String,
    /// The OIDC issuer that vouched.
    pub issuer: String,
    /// The OAuth client that the user came with.
    pub client: String,
    /// Granted OAuth scopes.
    #[serde(default)]
    pub scopes: Vec<String>,
    /// Groups claimed by the issuer.
    #[serde(default)]
    pub groups: Vec<String>,
    /// When the user authenticated, seconds since the Unix epoch; 0 if unknown.
    #[serde(default)]
    pub auth_time: u64,
    /// The organisation that the issuer says the user belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Whether the user proved themselves by more than one factor (RFC 8176, `mfa`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mfa: bool,
}

/// What an unsafe request is bound to, so that its token serves that request alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestBinding {
    hash: [u8; 32],
    once: bool,
}

impl RequestBinding {
    /// Binds to method and request target. Safe methods (RFC 9110 §9.2.1) are not bound and may repeat.
    pub fn new(method: &str, target: &str) -> Self {
        let once = !matches!(method, "GET" | "HEAD" | "OPTIONS" | "TRACE");
        let text = format!("{method} {target}");
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
        Self { hash, once }
    }

    fn claim(&self) -> Option<String> {
        self.once.then(|| jws::encode(self.hash))
    }
}

/// Why a chain is not accepted. `Display` names the rule; nothing of the token is repeated.
#[derive(Debug, Error)]
pub enum TxnError {
    /// Not a `~`-separated list of at most [`MAX_PARTS`] tokens.
    #[error("not a chain of at most {MAX_PARTS} tokens")]
    Form,
    /// A part is not a strict compact JWS.
    #[error("a part is not a strict compact JWS: {0}")]
    Jws(#[from] JwsError),
    /// `typ`, `alg`, `x5c`, or a claim is missing or of the wrong type.
    #[error("the member {0} is missing or wrong")]
    Member(&'static str),
    /// The signer's certificate does not verify.
    #[error("a signer's certificate does not verify: {0}")]
    Signer(#[from] VerifyError),
    /// The first signer is not a gateway of this trust domain.
    #[error("the chain does not begin at a gateway of this trust domain")]
    NotFromGateway,
    /// A part was signed by someone the part before did not name.
    #[error("a part is not signed by the holder that the part before it named")]
    BrokenChain,
    /// The last signer is not the mTLS peer.
    #[error("the presenter is not the last holder of the token")]
    WrongPresenter,
    /// The last part names another callee.
    #[error("the token is meant for another workload")]
    WrongAudience,
    /// Past `exp`, or `exp` too far ahead.
    #[error("the token has expired or lives too long")]
    Expired,
    /// `iat` in the future.
    #[error("the token comes from the future")]
    NotYetValid,
    /// An unsafe request whose token is bound to another one, or to none.
    #[error("the token is bound to another request")]
    WrongRequest,
    /// An unsafe request's token presented again.
    #[error("the token was already used")]
    Replayed,
    /// Replay memory is full: refuse rather than forget.
    #[error("too many unsafe requests in flight to remember their tokens")]
    ReplayMemoryFull,
}

/// A verified chain.
#[derive(Clone)]
pub struct Chain {
    raw: Arc<str>,
    user: Arc<User>,
    transaction: Arc<str>,
    hops: Arc<[SpiffeId]>,
    expires: Duration,
}

impl Chain {
    /// On whose behalf.
    pub fn user(&self) -> &Arc<User> {
        &self.user
    }

    /// The transaction's id, the same at every hop.
    pub fn transaction(&self) -> &Arc<str> {
        &self.transaction
    }

    /// Everybody who held it: the gateway first, the presenter last.
    pub fn hops(&self) -> &Arc<[SpiffeId]> {
        &self.hops
    }

    /// When it ends, since the Unix epoch.
    pub fn expires(&self) -> Duration {
        self.expires
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the raw token: it is a credential until it expires.
        f.debug_struct("Chain")
            .field("transaction", &self.transaction)
            .field("hops", &self.hops)
            .finish_non_exhaustive()
    }
}

/// Mints a token for `user` as the gateway that owns `svid`, to be held next by `to`.
///
/// `lifetime` is capped at [`MAX_LIFETIME`].
pub fn mint(
    svid: &X509Svid,
    user: &User,
    to: &SpiffeId,
    binding: RequestBinding,
    lifetime: Duration,
    now: Duration,
) -> Result<String, TxnError> {
    let mut claims = common_claims(svid, to, binding, now, now + lifetime.min(MAX_LIFETIME))?;
    claims.insert("aud".into(), svid.id().trust_domain().as_str().into());
    claims.insert("txn".into(), random_id()?.into());
    claims.insert("sub".into(), user.id.as_str().into());
    claims.insert("scope".into(), user.scopes.join(" ").into());
    claims.insert("req_wl".into(), user.client.as_str().into());
    let context = json!({ "iss": user.issuer, "groups": user.groups, "auth_time": user.auth_time });
    let Value::Object(mut context) = context else { return Err(TxnError::Member("tctx")) };
    context.extend(user.tenant.iter().map(|tenant| ("tenant".to_owned(), tenant.as_str().into())));
    context.extend(user.mfa.then(|| ("mfa".to_owned(), true.into())));
    claims.insert("tctx".into(), Value::Object(context));
    sign(svid, TOKEN_TYPE, claims)
}

/// Appends the link of the workload that owns `svid`, to be held next by `to`.
pub fn extend(
    chain: &Chain,
    svid: &X509Svid,
    to: &SpiffeId,
    binding: RequestBinding,
    now: Duration,
) -> Result<String, TxnError> {
    let mut claims = common_claims(svid, to, binding, now, chain.expires)?;
    claims.insert("prv".into(), hash_text(&chain.raw).into());
    let link = sign(svid, LINK_TYPE, claims)?;
    Ok(format!("{}{SEPARATOR}{link}", chain.raw))
}

fn common_claims(
    svid: &X509Svid,
    to: &SpiffeId,
    binding: RequestBinding,
    now: Duration,
    expires: Duration,
) -> Result<Map<String, Value>, TxnError> {
    let mut claims = Map::new();
    claims.insert("iss".into(), svid.id().as_str().into());
    claims.insert("dst".into(), to.as_str().into());
    claims.insert("iat".into(), now.as_secs().into());
    claims.insert("exp".into(), expires.as_secs().into());
    if let Some(request) = binding.claim() {
        claims.insert("req".into(), request.into());
        claims.insert("jti".into(), random_id()?.into());
    }
    Ok(claims)
}

fn sign(svid: &X509Svid, kind: &str, claims: Map<String, Value>) -> Result<String, TxnError> {
    let x5c: Vec<String> = svid.chain().iter().map(|der| STANDARD.encode(der)).collect();
    let header = json!({ "typ": kind, "alg": "ES256", "x5c": x5c });
    Ok(jws::sign_es256(&header, &Value::Object(claims), svid.key_pkcs8())?)
}

/// Verifies chains that arrive at one workload.
#[derive(Debug)]
pub struct Verifier {
    gateways: Vec<SpiffeId>,
    signers: Mutex<HashMap<[u8; 32], Signer>>,
    used: Mutex<Used>,
}

/// Tokens of unsafe requests that were accepted and have not expired, by hash.
#[derive(Debug, Default)]
struct Used {
    expires: HashMap<[u8; 32], Duration>,
    /// Expired ones are dropped when there are so many: twice what was left the last time, so that the
    /// cost a request stays constant and memory follows the traffic of a token's lifetime.
    prune_at: usize,
    /// No token expires before this: until then looking for expired ones is in vain.
    earliest: Duration,
}

impl Used {
    fn insert(&mut self, token: [u8; 32], expires: Duration, now: Duration) -> Result<(), TxnError> {
        if self.expires.len() >= self.prune_at && now >= self.earliest {
            self.expires.retain(|_, expires| *expires > now);
            // Never beyond the limit: a full memory would not be looked through again, and refuse for ever.
            self.prune_at = (self.expires.len() * 2).clamp(MIN_PRUNE_AT, MAX_USED);
            self.earliest = self.expires.values().min().copied().unwrap_or(Duration::MAX);
        }
        if self.expires.len() >= MAX_USED {
            return Err(TxnError::ReplayMemoryFull);
        }
        self.earliest = self.earliest.min(expires);
        match self.expires.insert(token, expires) {
            Some(_) => Err(TxnError::Replayed),
            None => Ok(()),
        }
    }
}

/// A signer's certificate that verified under the bundle of one identity generation.
#[derive(Debug, Clone)]
struct Signer {
    id: SpiffeId,
    public_key: Arc<[u8]>,
    not_after: Duration,
    generation: u64,
}

/// What the callee knows of its own situation when a chain arrives.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'a> {
    /// The callee itself.
    pub me: &'a SpiffeId,
    /// The mTLS peer that presented the chain.
    pub presenter: &'a SpiffeId,
    /// The bundles of the moment, and the identity generation they belong to.
    pub bundles: &'a BundleSet,
    /// See [`crate::Identity::generation`].
    pub generation: u64,
    /// The request as it arrived.
    pub binding: RequestBinding,
    /// Time since the Unix epoch.
    pub now: Duration,
}

/// Most signers remembered; the mesh's gateways and services, with room for rotation.
const MAX_SIGNERS: usize = 4096;
/// Most unsafe requests remembered within a token's lifetime.
const MAX_USED: usize = 1 << 20;
/// Below so many, looking for expired ones is not worth it.
const MIN_PRUNE_AT: usize = 1024;

impl Verifier {
    /// A verifier that lets chains begin at these gateways only.
    pub fn new(gateways: Vec<SpiffeId>) -> Self {
        Self { gateways, signers: Mutex::default(), used: Mutex::default() }
    }

    /// Verifies a header value.
    pub fn verify(&self, raw: &str, arrival: Arrival<'_>) -> Result<Chain, TxnError> {
        if raw.len() > MAX_CHAIN_BYTES {
            return Err(TxnError::Form);
        }
        let parts: Vec<&str> = raw.split(SEPARATOR).collect();
        if parts.len() > MAX_PARTS {
            return Err(TxnError::Form);
        }
        let mut parts = parts.into_iter();
        let first = parts.next().ok_or(TxnError::Form)?;
        let mut progress = self.first_part(first, &arrival)?;
        // Bytes of `raw` before the current separator: what a link's `prv` hashes.
        let mut end_of_previous = first.len();
        for part in parts {
            let previous = raw.get(..end_of_previous).ok_or(TxnError::Form)?;
            progress = self.link(part, previous, progress, &arrival)?;
            end_of_previous += SEPARATOR.len_utf8() + part.len();
        }
        self.finish(raw, progress, &arrival)
    }

    fn first_part(&self, part: &str, arrival: &Arrival<'_>) -> Result<Progress, TxnError> {
        let token = Compact::parse_with_certificate(part)?;
        let signer = self.signer(&token, TOKEN_TYPE, arrival)?;
        if !self.gateways.contains(&signer.id) || signer.id.trust_domain() != arrival.me.trust_domain() {
            return Err(TxnError::NotFromGateway);
        }
        if claim_str(&token, "aud")? != arrival.me.trust_domain().as_str() {
            return Err(TxnError::WrongAudience);
        }
        let expires = check_times(&token, arrival.now)?;
        Ok(Progress {
            user: Arc::new(user_of(&token)?),
            transaction: claim_str(&token, "txn")?.into(),
            hops: vec![signer.id],
            next: claim_id(&token, "dst")?,
            expires,
            request: token.claims.get("req").and_then(Value::as_str).map(str::to_owned),
        })
    }

    fn link(
        &self,
        part: &str,
        previous: &str,
        before: Progress,
        arrival: &Arrival<'_>,
    ) -> Result<Progress, TxnError> {
        let link = Compact::parse_with_certificate(part)?;
        let signer = self.signer(&link, LINK_TYPE, arrival)?;
        if signer.id != before.next || claim_str(&link, "prv")? != hash_text(previous) {
            return Err(TxnError::BrokenChain);
        }
        let expires = check_times(&link, arrival.now)?.min(before.expires);
        let mut hops = before.hops;
        hops.push(signer.id);
        Ok(Progress {
            hops,
            next: claim_id(&link, "dst")?,
            expires,
            request: link.claims.get("req").and_then(Value::as_str).map(str::to_owned),
            ..before
        })
    }

    /// The last part decides who may present it, to whom, and for which request.
    fn finish(&self, raw: &str, progress: Progress, arrival: &Arrival<'_>) -> Result<Chain, TxnError> {
        if progress.hops.last() != Some(arrival.presenter) {
            return Err(TxnError::WrongPresenter);
        }
        if progress.next != *arrival.me {
            return Err(TxnError::WrongAudience);
        }
        if let Some(expected) = arrival.binding.claim() {
            if progress.request.as_deref() != Some(expected.as_str()) {
                return Err(TxnError::WrongRequest);
            }
            self.use_once(raw, progress.expires, arrival.now)?;
        }
        Ok(Chain {
            raw: raw.into(),
            user: progress.user,
            transaction: progress.transaction,
            hops: progress.hops.into(),
            expires: progress.expires,
        })
    }

    fn use_once(&self, raw: &str, expires: Duration, now: Duration) -> Result<(), TxnError> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.insert(sha256(raw.as_bytes()), expires, now)
    }

    /// Who signed a part: its type, its algorithm, its certificate and its signature, in that order.
    fn signer(&self, token: &Compact<'_>, kind: &str, arrival: &Arrival<'_>) -> Result<Signer, TxnError> {
        if token.header_str("typ") != Some(kind) {
            return Err(TxnError::Member("typ"));
        }
        if token.algorithm != "ES256" {
            return Err(TxnError::Member("alg"));
        }
        let x5c = token.header.get("x5c").and_then(Value::as_array).ok_or(TxnError::Member("x5c"))?;
        let chain = x5c
            .iter()
            .map(|der| der.as_str().and_then(|der| STANDARD.decode(der).ok()).map(CertificateDer::from))
            .collect::<Option<Vec<_>>>()
            .ok_or(TxnError::Member("x5c"))?;
        let signer = self.verified_signer(&chain, arrival)?;
        token.verify_es256(&signer.public_key)?;
        if claim_str(token, "iss")? != signer.id.as_str() {
            return Err(TxnError::Member("iss"));
        }
        Ok(signer)
    }

    fn verified_signer(
        &self,
        chain: &[CertificateDer<'_>],
        arrival: &Arrival<'_>,
    ) -> Result<Signer, TxnError> {
        let (leaf_der, intermediates) = chain.split_first().ok_or(TxnError::Member("x5c"))?;
        let key = sha256(leaf_der);
        let known = self.signers.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(signer) = known
            && signer.generation == arrival.generation
            && arrival.now < signer.not_after
        {
            return Ok(signer);
        }
        let at = UnixTime::since_unix_epoch(arrival.now);
        let leaf = verify::verify_chain(leaf_der, intermediates, arrival.bundles, at)?;
        let signer = Signer {
            id: leaf.id,
            public_key: leaf.public_key.into(),
            not_after: leaf.not_after,
            generation: arrival.generation,
        };
        let mut signers = self.signers.lock().unwrap_or_else(PoisonError::into_inner);
        if signers.len() >= MAX_SIGNERS {
            signers.clear();
        }
        signers.insert(key, signer.clone());
        Ok(signer)
    }
}

/// A chain verified up to some part.
struct Progress {
    user: Arc<User>,
    transaction: Arc<str>,
    hops: Vec<SpiffeId>,
    next: SpiffeId,
    expires: Duration,
    request: Option<String>,
}

fn user_of(token: &Compact<'_>) -> Result<User, TxnError> {
    let context = token.claims.get("tctx").and_then(Value::as_object).ok_or(TxnError::Member("tctx"))?;
    let groups = context.get("groups").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    Ok(User {
        id: claim_str(token, "sub")?.to_owned(),
        issuer: context.get("iss").and_then(Value::as_str).ok_or(TxnError::Member("tctx"))?.to_owned(),
        client: claim_str(token, "req_wl")?.to_owned(),
        scopes: claim_str(token, "scope")?.split_ascii_whitespace().map(str::to_owned).collect(),
        groups: groups.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        auth_time: context.get("auth_time").and_then(Value::as_u64).unwrap_or(0),
        tenant: context.get("tenant").and_then(Value::as_str).map(str::to_owned),
        mfa: context.get("mfa").and_then(Value::as_bool).unwrap_or(false),
    })
}

fn check_times(token: &Compact<'_>, now: Duration) -> Result<Duration, TxnError> {
    let seconds = |name: &'static str| {
        token.claims.get(name).and_then(Value::as_u64).map(Duration::from_secs).ok_or(TxnError::Member(name))
    };
    let (issued, expires) = (seconds("iat")?, seconds("exp")?);
    if issued > now.saturating_add(CLOCK_SKEW) {
        return Err(TxnError::NotYetValid);
    }
    if expires <= now || expires > issued.saturating_add(MAX_LIFETIME) {
        return Err(TxnError::Expired);
    }
    Ok(expires)
}

fn claim_str<'a>(token: &'a Compact<'_>, name: &'static str) -> Result<&'a str, TxnError> {
    token.claims.get(name).and_then(Value::as_str).ok_or(TxnError::Member(name))
}

fn claim_id(token: &Compact<'_>, name: &'static str) -> Result<SpiffeId, TxnError> {
    SpiffeId::new(claim_str(token, name)?).map_err(|_| TxnError::Member(name))
}

fn random_id() -> Result<String, TxnError> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| TxnError::Jws(JwsError::Key))?;
    Ok(jws::encode(bytes))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

fn hash_text(text: &str) -> String {
    jws::encode(sha256(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TrustDomain;
    use crate::testing::TestAuthority;

    struct Mesh {
        authority: TestAuthority,
        gateway: X509Svid,
        web: X509Svid,
        accounts: X509Svid,
        payments: X509Svid,
        bundles: BundleSet,
    }

    const GET: &str = "/accounts/17";

    fn mesh() -> Mesh {
        let authority = TestAuthority::new("bank.example");
        Mesh {
            gateway: authority.issue("/palisade/gateway"),
            web: authority.issue("/service/web"),
            accounts: authority.issue("/service/accounts"),
            payments: authority.issue("/service/payments"),
            bundles: BundleSet::new([authority.bundle()]),
            authority,
        }
    }

    fn now() -> Duration {
        crate::testing::ago(0)
    }

    fn alice() -> User {
        User {
            id: "alice".into(),
            issuer: "https://idp.example".into(),
            client: "bank-web".into(),
            scopes: vec!["openid".into(), "bank".into()],
            groups: vec!["customers".into()],
            auth_time: 1,
            tenant: Some("bank".into()),
            mfa: true,
        }
    }

    impl Mesh {
        fn verifier(&self) -> Verifier {
            Verifier::new(vec![self.gateway.id().clone()])
        }

        fn arrival<'a>(
            &'a self,
            me: &'a X509Svid,
            presenter: &'a X509Svid,
            method: &str,
            target: &str,
        ) -> Arrival<'a> {
            Arrival {
                me: me.id(),
                presenter: presenter.id(),
                bundles: &self.bundles,
                generation: 1,
                binding: RequestBinding::new(method, target),
                now: now(),
            }
        }

        fn get(&self) -> RequestBinding {
            RequestBinding::new("GET", GET)
        }

        fn at_web(&self) -> String {
            mint(&self.gateway, &alice(), self.web.id(), self.get(), MAX_LIFETIME, now()).unwrap()
        }

        /// alice's chain gateway → web → accounts.
        fn at_accounts(&self) -> String {
            let chain = self
                .verifier()
                .verify(&self.at_web(), self.arrival(&self.web, &self.gateway, "GET", GET))
                .unwrap();
            extend(&chain, &self.web, self.accounts.id(), self.get(), now()).unwrap()
        }
    }

    #[test]
    fn a_chain_carries_the_user_and_every_hand_it_passed() {
        let mesh = mesh();
        let chain = mesh
            .verifier()
            .verify(&mesh.at_accounts(), mesh.arrival(&mesh.accounts, &mesh.web, "GET", GET))
            .unwrap();
        assert_eq!(**chain.user(), alice());
        assert_eq!(**chain.hops(), [mesh.gateway.id().clone(), mesh.web.id().clone()]);
        let further = extend(&chain, &mesh.accounts, mesh.payments.id(), mesh.get(), now()).unwrap();
        let chain = mesh
            .verifier()
            .verify(&further, mesh.arrival(&mesh.payments, &mesh.accounts, "GET", GET))
            .unwrap();
        assert_eq!(chain.hops().len(), 3);
    }

    #[test]
    fn a_stolen_token_is_useless_to_another_workload() {
        let mesh = mesh();
        // payments saw web's token pass and presents it to accounts.
        let stolen = mesh.at_accounts();
        let outcome =
            mesh.verifier().verify(&stolen, mesh.arrival(&mesh.accounts, &mesh.payments, "GET", GET));
        assert!(matches!(outcome, Err(TxnError::WrongPresenter)), "{outcome:?}");
        // accounts presents to payments what was meant for itself.
        let outcome = mesh.verifier().verify(&stolen, mesh.arrival(&mesh.payments, &mesh.web, "GET", GET));
        assert!(matches!(outcome, Err(TxnError::WrongAudience)), "{outcome:?}");
        // payments extends a token that names web as its holder.
        let held_by_web = mesh
            .verifier()
            .verify(&mesh.at_web(), mesh.arrival(&mesh.web, &mesh.gateway, "GET", GET))
            .unwrap();
        let forged = extend(&held_by_web, &mesh.payments, mesh.accounts.id(), mesh.get(), now()).unwrap();
        let outcome =
            mesh.verifier().verify(&forged, mesh.arrival(&mesh.accounts, &mesh.payments, "GET", GET));
        assert!(matches!(outcome, Err(TxnError::BrokenChain)), "{outcome:?}");
    }

    #[test]
    fn only_a_gateway_of_this_trust_domain_begins_a_chain() {
        let mesh = mesh();
        let by_web = mint(&mesh.web, &alice(), mesh.accounts.id(), mesh.get(), MAX_LIFETIME, now()).unwrap();
        let outcome = mesh.verifier().verify(&by_web, mesh.arrival(&mesh.accounts, &mesh.web, "GET", GET));
        assert!(matches!(outcome, Err(TxnError::NotFromGateway)), "{outcome:?}");

        let foreign = TestAuthority::new("evil.example");
        let gateway = foreign.issue("/palisade/gateway");
        let token = mint(&gateway, &alice(), mesh.web.id(), mesh.get(), MAX_LIFETIME, now()).unwrap();
        let outcome = mesh.verifier().verify(&token, mesh.arrival(&mesh.web, &mesh.gateway, "GET", GET));
        assert!(matches!(outcome, Err(TxnError::Signer(VerifyError::UnknownTrustDomain(_)))), "{outcome:?}");

        // The same name under the same domain, but vouched for by an authority we do not know.
        let impostor = TestAuthority::new("bank.example").issue("/palisade/gateway");
        let token = mint(&impostor, &alice(), mesh.web.id(), mesh.get(), MAX_LIFETIME, now()).unwrap();
        let outcome = mesh.verifier().verify(&token, mesh.arrival(&mesh.web, &mesh.gateway, "GET", GET));
        assert!(matches!(outcome, Err(TxnError::Signer(_))), "{outcome:?}");
    }

    #[test]
    fn a_link_cannot_be_dropped_swapped_or_changed() {
        let mesh = mesh();
        let verifier = mesh.verifier();
        let good = mesh.at_accounts();
        let (token, link) = good.split_once('~').unwrap();
        let other = mesh.at_accounts();
        let (other_token, _) = other.split_once('~').unwrap();
        let arrival = mesh.arrival(&mesh.accounts, &mesh.web, "GET", GET);
        for (bad, why) in [
            (token.to_owned(), "dropped link"),
            (link.to_owned(), "link alone"),
            (format!("{other_token}~{link}"), "link of another token"),
            (format!("{good}~{link}"), "link twice"),
            (format!("{good}~"), "empty part"),
            (format!("~{good}"), "empty start"),
            (format!("{link}~{token}"), "turned round"),
        ] {
            assert!(verifier.verify(&bad, arrival).is_err(), "{why}");
        }
        assert!(verifier.verify(&good, arrival).is_ok());
        let mut flipped = good.clone().into_bytes();
        for at in (0..flipped.len()).step_by(7) {
            let was = flipped[at];
            flipped[at] = if was == b'A' { b'B' } else { b'A' };
            let text = String::from_utf8(flipped.clone()).unwrap();
            assert!(text == good || verifier.verify(&text, arrival).is_err(), "byte {at}");
            flipped[at] = was;
        }
    }

    #[test]
    fn expired_future_and_overlong_tokens_are_refused() {
        let mesh = mesh();
        let verifier = mesh.verifier();
        let token_at = |issued: Duration| {
            mint(&mesh.gateway, &alice(), mesh.web.id(), mesh.get(), MAX_LIFETIME, issued).unwrap()
        };
        let arrival = mesh.arrival(&mesh.web, &mesh.gateway, "GET", GET);
        let outcome = verifier.verify(&token_at(arrival.now - Duration::from_secs(31)), arrival);
        assert!(matches!(outcome, Err(TxnError::Expired)), "{outcome:?}");
        let outcome = verifier.verify(&token_at(arrival.now + Duration::from_secs(20)), arrival);
        assert!(matches!(outcome, Err(TxnError::NotYetValid)), "{outcome:?}");
        // Exactly at `exp` it is over.
        let token = token_at(Duration::from_secs(arrival.now.as_secs()));
        let at_end = Arrival { now: Duration::from_secs(arrival.now.as_secs()) + MAX_LIFETIME, ..arrival };
        assert!(matches!(verifier.verify(&token, at_end), Err(TxnError::Expired)));
    }

    #[test]
    fn an_unsafe_request_spends_its_token_and_no_other_request_may() {
        let mesh = mesh();
        let verifier = mesh.verifier();
        let post = RequestBinding::new("POST", "/transfers");
        let token = mint(&mesh.gateway, &alice(), mesh.web.id(), post, MAX_LIFETIME, now()).unwrap();
        let elsewhere = verifier.verify(&token, mesh.arrival(&mesh.web, &mesh.gateway, "POST", "/loans"));
        assert!(matches!(elsewhere, Err(TxnError::WrongRequest)), "{elsewhere:?}");
        let arrival = mesh.arrival(&mesh.web, &mesh.gateway, "POST", "/transfers");
        assert!(verifier.verify(&token, arrival).is_ok());
        assert!(matches!(verifier.verify(&token, arrival), Err(TxnError::Replayed)));
        let unbound = mesh.at_web();
        assert!(matches!(verifier.verify(&unbound, arrival), Err(TxnError::WrongRequest)));
    }

    #[test]
    fn spent_tokens_are_remembered_until_they_expire_and_no_longer() {
        let (mut used, second) = (Used::default(), Duration::from_secs(1));
        let token = |n: u64| sha256(&n.to_be_bytes());
        for n in 0..10 * MIN_PRUNE_AT as u64 {
            // Each lives 30 s, one a second comes: some thirty are alive at any moment.
            let now = second * u32::try_from(n).unwrap();
            used.insert(token(n), now + MAX_LIFETIME, now).unwrap();
            assert!(matches!(used.insert(token(n), now + MAX_LIFETIME, now), Err(TxnError::Replayed)));
            assert!(used.expires.len() <= MIN_PRUNE_AT);
        }
    }

    #[test]
    fn replay_memory_that_filled_up_serves_again_when_its_tokens_have_expired() {
        let (mut used, second) = (Used::default(), Duration::from_secs(1));
        let token = |n: u64| sha256(&n.to_be_bytes());
        for n in 0..MAX_USED as u64 {
            used.insert(token(n), MAX_LIFETIME, second).unwrap();
        }
        let one_more = |used: &mut Used, now| used.insert(token(u64::MAX), now + MAX_LIFETIME, now);
        assert!(matches!(one_more(&mut used, second), Err(TxnError::ReplayMemoryFull)));
        assert!(one_more(&mut used, MAX_LIFETIME).is_ok());
        assert_eq!(used.expires.len(), 1);
    }

    #[test]
    fn a_signer_is_checked_again_when_the_bundle_changes_or_its_certificate_ends() {
        let mesh = mesh();
        let verifier = mesh.verifier();
        let token = mesh.at_web();
        let arrival = mesh.arrival(&mesh.web, &mesh.gateway, "GET", GET);
        assert!(verifier.verify(&token, arrival).is_ok());
        let nobody =
            BundleSet::new([
                crate::TrustBundle::new(TrustDomain::new("bank.example").unwrap(), vec![]).unwrap()
            ]);
        let withdrawn = Arrival { bundles: &nobody, generation: 2, ..arrival };
        assert!(matches!(verifier.verify(&token, withdrawn), Err(TxnError::Signer(_))));
        assert_eq!(mesh.authority.bundle().authorities().len(), 1);
    }

    #[test]
    fn a_chain_that_is_printed_shows_no_token() {
        let mesh = mesh();
        let raw = mesh.at_web();
        let chain = mesh.verifier().verify(&raw, mesh.arrival(&mesh.web, &mesh.gateway, "GET", GET)).unwrap();
        assert!(!format!("{chain:?}").contains(&raw[..40]));
    }
}
