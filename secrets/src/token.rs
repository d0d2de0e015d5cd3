//! Tokens: what a person or a tool shows instead of an SVID.
//!
//! Two kinds exist. *Root* tokens (policy `root`) may do everything on the operator's listener. *Default*
//! tokens (policy `default`) may look themselves up and revoke themselves and nothing more; what a workload
//! gets at `auth/cert/login` is one of these, bound to its SVID: policy decides what its bearer may do.
//!
//! A token is stored as HMAC-SHA256 of itself under a key behind the barrier, so neither the store nor a
//! record of it gives a usable token, and a look-up is by that hash: nothing compares tokens byte by byte.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use identity::{SpiffeId, hex};
use ring::hmac;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::barrier::{Barrier, BarrierError, Change, Keyring, Purpose};
use crate::random::{self, RandomError, SharedRandom};
use crate::stamp::Stamp;

/// Vault's prefix of a service token: scanners for leaked secrets know it.
pub const PREFIX: &str = "hvs.";
/// Longest text looked up; ours have 47 bytes.
pub const MAX_TOKEN_BYTES: usize = 256;
/// Longest life of a token with an end, Vault's own default of 32 days.
pub const MAX_TTL: Duration = Duration::from_secs(32 * 24 * 3600);
/// Longest life of a token made at a login; the SVID's end comes first as a rule.
pub const LOGIN_TTL: Duration = Duration::from_secs(3600);
/// Longest display name.
pub const MAX_DISPLAY_NAME_BYTES: usize = 128;
/// The policy that allows everything on the operator's listener.
pub const ROOT_POLICY: &str = "root";
/// The policy that allows a token to look after itself.
pub const DEFAULT_POLICY: &str = "default";

const TOKEN_RANDOM_BYTES: usize = 32;
const ACCESSOR_RANDOM_BYTES: usize = 16;
const FOLDER: &str = "token/id/";

/// Why a token operation fails.
#[derive(Debug, Error)]
pub enum TokenError {
    /// Unknown, revoked or expired: the three are one to the bearer.
    #[error("the token is unknown or has expired")]
    Invalid,
    /// A record of a token cannot be read.
    #[error("a stored token is damaged")]
    Damaged,
    /// A `ttl` over [`MAX_TTL`].
    #[error("ttl must be at most {} seconds", MAX_TTL.as_secs())]
    Ttl,
    /// A policy that does not exist here.
    #[error("the policies of a token are \"root\" or \"default\"")]
    Policy,
    /// Longer than [`MAX_DISPLAY_NAME_BYTES`].
    #[error("display_name must be at most {MAX_DISPLAY_NAME_BYTES} bytes")]
    DisplayName,
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// Sealed, or the store failed.
    #[error(transparent)]
    Barrier(#[from] BarrierError),
}

/// What is stored about a token. The token itself is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    accessor: String,
    policy: Policy,
    display_name: String,
    path: String,
    created: Stamp,
    /// `None` never expires: only root tokens.
    expires: Option<Stamp>,
    parent: Option<String>,
    bound_to: Option<SpiffeId>,
}

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Everything on the operator's listener.
    Root,
    /// Looking after itself.
    Default,
}

impl Policy {
    /// From the names in a request, of which there is exactly one: names are compared as they stand.
    pub fn parse(names: &[String]) -> Result<Self, TokenError> {
        match names {
            [name] if name == ROOT_POLICY => Ok(Self::Root),
            [name] if name == DEFAULT_POLICY => Ok(Self::Default),
            _ => Err(TokenError::Policy),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Root => ROOT_POLICY,
            Self::Default => DEFAULT_POLICY,
        }
    }
}

/// A token that was looked up and is good at this moment.
#[derive(Debug, Clone)]
pub struct Token {
    hash: String,
    record: Record,
}

impl Token {
    /// Whether it has the root policy.
    pub fn is_root(&self) -> bool {
        self.record.policy == Policy::Root
    }

    /// Its policy.
    pub fn policy(&self) -> Policy {
        self.record.policy
    }

    /// The SVID that it was given to, if it was made at a login.
    pub fn bound_to(&self) -> Option<&SpiffeId> {
        self.record.bound_to.as_ref()
    }

    /// The public handle on the token.
    pub fn accessor(&self) -> &str {
        &self.record.accessor
    }

    /// What people call it.
    pub fn display_name(&self) -> &str {
        &self.record.display_name
    }

    /// The API path that made it.
    pub fn path(&self) -> &str {
        &self.record.path
    }

    /// Whether no token made it.
    pub fn is_orphan(&self) -> bool {
        self.record.parent.is_none()
    }

    /// When it was made.
    pub fn created(&self) -> Stamp {
        self.record.created
    }

    /// When it ends.
    pub fn expires(&self) -> Option<Stamp> {
        self.record.expires
    }

    /// What is left of its life; `None` has no end.
    pub fn ttl(&self, now: Duration) -> Option<Duration> {
        self.record.expires.map(|expires| expires.since_epoch().saturating_sub(now))
    }
}

/// What a new token shall be.
#[derive(Debug, Clone)]
pub struct NewToken<'a> {
    /// What it allows.
    pub policy: Policy,
    /// What people call it.
    pub display_name: String,
    /// The API path that makes it.
    pub path: &'static str,
    /// How long it lives; `None` has no end.
    pub ttl: Option<Duration>,
    /// The token that makes it; it is revoked with its maker.
    pub parent: Option<&'a Token>,
    /// The SVID that it is given to.
    pub bound_to: Option<SpiffeId>,
}

impl NewToken<'_> {
    /// The token that `init` gives out.
    pub fn first_root() -> Self {
        let display_name = ROOT_POLICY.to_owned();
        let path = "auth/token/root";
        Self { policy: Policy::Root, display_name, path, ttl: None, parent: None, bound_to: None }
    }
}

/// A token just made: the only time that its text exists.
pub struct Issued {
    /// What the bearer shows.
    pub secret: SecretString,
    /// What is known about it.
    pub token: Token,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("accessor", &self.token.accessor()).finish_non_exhaustive()
    }
}

/// Makes a token and the change that stores it.
pub fn issue(
    keyring: &Keyring,
    new: NewToken<'_>,
    now: Duration,
    random: &SharedRandom,
) -> Result<(Issued, Change), TokenError> {
    if new.ttl.is_some_and(|ttl| ttl > MAX_TTL) {
        return Err(TokenError::Ttl);
    }
    if new.display_name.len() > MAX_DISPLAY_NAME_BYTES {
        return Err(TokenError::DisplayName);
    }
    let bytes = random::secret::<TOKEN_RANDOM_BYTES>(random.as_ref())?;
    let mut text = String::with_capacity(PREFIX.len() + 4 * TOKEN_RANDOM_BYTES.div_ceil(3));
    text.push_str(PREFIX);
    URL_SAFE_NO_PAD.encode_string(bytes.as_slice(), &mut text);
    let secret = SecretString::from(text);
    let accessor = URL_SAFE_NO_PAD.encode(random::public::<ACCESSOR_RANDOM_BYTES>(random.as_ref())?);
    let record = Record {
        accessor,
        policy: new.policy,
        display_name: new.display_name,
        path: new.path.to_owned(),
        created: Stamp::new(now),
        expires: new.ttl.map(|ttl| Stamp::new(now + ttl)),
        parent: new.parent.map(|parent| parent.hash.clone()),
        bound_to: new.bound_to,
    };
    let hash = hash(keyring, secret.expose_secret());
    let plaintext = Zeroizing::new(serde_json::to_vec(&record).map_err(|_| TokenError::Damaged)?);
    let change = Change::Put { path: format!("{FOLDER}{hash}"), plaintext };
    Ok((Issued { secret, token: Token { hash, record } }, change))
}

/// Looks a token up; what has expired is unknown.
pub async fn lookup(barrier: &Barrier, secret: &SecretString, now: Duration) -> Result<Token, TokenError> {
    let text = secret.expose_secret();
    if text.is_empty() || text.len() > MAX_TOKEN_BYTES {
        return Err(TokenError::Invalid);
    }
    let hash = hash(barrier.keyring()?.as_ref(), text);
    let token = read(barrier, hash).await?.ok_or(TokenError::Invalid)?;
    if expired(&token.record, now) { Err(TokenError::Invalid) } else { Ok(token) }
}

/// Revokes a token and every token that it made, and those that they made.
pub async fn revoke(barrier: &Barrier, token: &Token) -> Result<(), TokenError> {
    let all = read_all(barrier).await?;
    let mut gone = BTreeSet::from([token.hash.as_str()]);
    loop {
        let before = gone.len();
        let made_by_gone =
            |other: &&Token| other.record.parent.as_deref().is_some_and(|parent| gone.contains(parent));
        let children: Vec<&str> = all.iter().filter(made_by_gone).map(|other| other.hash.as_str()).collect();
        gone.extend(children);
        if gone.len() == before {
            break;
        }
    }
    Ok(barrier.transaction(gone.into_iter().map(deletion).collect()).await?)
}

/// Removes what has expired; returns how many.
pub async fn sweep(barrier: &Barrier, now: Duration) -> Result<usize, TokenError> {
    let all = read_all(barrier).await?;
    let gone: Vec<Change> =
        all.iter().filter(|token| expired(&token.record, now)).map(|token| deletion(&token.hash)).collect();
    let count = gone.len();
    if count > 0 {
        barrier.transaction(gone).await?;
    }
    Ok(count)
}

fn expired(record: &Record, now: Duration) -> bool {
    record.expires.is_some_and(|expires| now >= expires.since_epoch())
}

fn deletion(hash: &str) -> Change {
    Change::Delete { path: format!("{FOLDER}{hash}") }
}

async fn read(barrier: &Barrier, hash: String) -> Result<Option<Token>, TokenError> {
    let Some(bytes) = barrier.get(&format!("{FOLDER}{hash}")).await? else { return Ok(None) };
    let record = serde_json::from_slice(&bytes).map_err(|_| TokenError::Damaged)?;
    Ok(Some(Token { hash, record }))
}

async fn read_all(barrier: &Barrier) -> Result<Vec<Token>, TokenError> {
    let mut tokens = Vec::new();
    for hash in barrier.list(FOLDER).await? {
        // One that another request has just revoked is no error.
        tokens.extend(read(barrier, hash).await?);
    }
    Ok(tokens)
}

fn hash(keyring: &Keyring, text: &str) -> String {
    let key = keyring.derive(Purpose::TokenHmac);
    hex::encode(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()), text.as_bytes()).as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::barrier::tests::{random, unsealed};

    const NOW: Duration = Duration::from_secs(1_000_000);

    async fn make(barrier: &Barrier, new: NewToken<'_>) -> Issued {
        let (issued, change) = issue(&barrier.keyring().unwrap(), new, NOW, &random()).unwrap();
        barrier.transaction(vec![change]).await.unwrap();
        issued
    }

    fn child<'a>(parent: &'a Token, ttl: Duration) -> NewToken<'a> {
        NewToken { parent: Some(parent), ttl: Some(ttl), ..NewToken::first_root() }
    }

    #[tokio::test]
    async fn a_token_is_found_by_its_text_and_stored_as_its_hmac_only() {
        let (_directory, barrier, _) = unsealed().await;
        let issued = make(&barrier, NewToken::first_root()).await;
        let text = issued.secret.expose_secret();
        assert!(text.starts_with(PREFIX) && text.len() == 47, "{}", text.len());
        let found = lookup(&barrier, &issued.secret, NOW).await.unwrap();
        assert!(found.is_root() && found.accessor() == issued.token.accessor());
        for path in barrier.list(FOLDER).await.unwrap() {
            assert!(!path.contains(&text[4..]));
            let record = barrier.get(&format!("{FOLDER}{path}")).await.unwrap().unwrap();
            assert!(!String::from_utf8_lossy(&record).contains(&text[4..]));
        }
        let upper = SecretString::from(text.to_uppercase());
        for bad in [upper, "".to_owned().into(), "x".repeat(300).into(), text[..46].to_owned().into()] {
            assert!(matches!(lookup(&barrier, &bad, NOW).await, Err(TokenError::Invalid)));
        }
        assert!(!format!("{issued:?}").contains(&text[4..]));
    }

    #[tokio::test]
    async fn vault_22_an_expired_token_is_dead_also_after_a_restart() {
        let (_directory, barrier, root_key) = unsealed().await;
        let root = make(&barrier, NewToken::first_root()).await;
        let short = make(&barrier, child(&root.token, Duration::from_secs(60))).await;
        let end = NOW + Duration::from_secs(60);
        assert!(lookup(&barrier, &short.secret, end - Duration::from_nanos(1)).await.is_ok());
        barrier.seal();
        barrier.unseal(&root_key).await.unwrap();
        assert!(matches!(lookup(&barrier, &short.secret, end).await, Err(TokenError::Invalid)));
        assert_eq!(sweep(&barrier, end).await.unwrap(), 1);
        assert!(lookup(&barrier, &short.secret, NOW).await.is_err());
        assert!(lookup(&barrier, &root.secret, end).await.is_ok());
    }

    #[tokio::test]
    async fn security_34_revoking_a_token_takes_its_descendants_and_no_others() {
        let (_directory, barrier, _) = unsealed().await;
        let root = make(&barrier, NewToken::first_root()).await;
        let hour = Duration::from_secs(3600);
        let parent = make(&barrier, child(&root.token, hour)).await;
        let kid = make(&barrier, child(&parent.token, hour)).await;
        let grandkid = make(&barrier, child(&kid.token, hour)).await;
        let sibling = make(&barrier, child(&root.token, hour)).await;
        revoke(&barrier, &parent.token).await.unwrap();
        for dead in [&parent, &kid, &grandkid] {
            assert!(lookup(&barrier, &dead.secret, NOW).await.is_err());
        }
        for alive in [&root, &sibling] {
            assert!(lookup(&barrier, &alive.secret, NOW).await.is_ok());
        }
    }

    #[test]
    fn vault_3_security_32_policy_names_are_compared_as_they_stand() {
        let parse =
            |names: &[&str]| Policy::parse(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert!(matches!(parse(&["root"]), Ok(Policy::Root)));
        assert!(matches!(parse(&["default"]), Ok(Policy::Default)));
        for bad in [&["Root"][..], &["root "], &["ro\u{200b}ot"], &[], &["root", "default"], &["admin"]] {
            assert!(matches!(parse(bad), Err(TokenError::Policy)), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_life_beyond_the_longest_is_refused() {
        let (_directory, barrier, _) = unsealed().await;
        let new = NewToken { ttl: Some(MAX_TTL + Duration::from_secs(1)), ..NewToken::first_root() };
        let outcome = issue(&barrier.keyring().unwrap(), new, NOW, &random());
        assert!(matches!(outcome, Err(TokenError::Ttl)));
    }
}
