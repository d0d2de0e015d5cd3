//! Browser sessions: an opaque id in a cookie, a sealed record here, tokens that no browser sees.
//!
//! The access token itself is not kept: nothing behind the gateway takes it. What is kept is who the user
//! is, the refresh token that lets us ask the issuer whether they still are, and when to ask.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use identity::clock::SharedClock;
use identity::txn::User;
use identity::{Scope, jws};
use ring::digest::{SHA256, digest};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::SharedRandom;
use crate::config::SessionLimits;
use crate::issuer::{IssuerClient, Issuers, TokenError, Tokens};
use crate::seal::{SealError, Sealer};
use crate::store::{Row, SessionHash, SessionStore, StoreError};

/// Bytes of a session id: 256 bits, beyond guessing.
const ID_BYTES: usize = 32;
/// A request updates `last_seen` at most this often: one write a session and half minute, not one a request.
const TOUCH_INTERVAL_SECONDS: u64 = 30;
/// After an attempt to refresh that failed for a passing reason.
const REFRESH_BACKOFF_SECONDS: u64 = 5;
/// A session replaced by a new login of the same user ends after this: its requests in flight finish.
const REPLACED_GRACE_SECONDS: u64 = 30;
/// How often ended sessions are swept out of the store.
const SWEEP_INTERVAL: Duration = Duration::from_secs(600);
/// How often a compare-and-swap is tried before giving up; each failure means that somebody else got on.
const MAX_SWAPS: usize = 16;
/// Longest cookie value looked at; ours are 43 characters.
const MAX_COOKIE_BYTES: usize = 64;

/// Why a session cannot be used or made.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The store failed.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// A record cannot be sealed.
    #[error("a session record cannot be sealed")]
    Seal(#[from] SealError),
    /// The random source failed.
    #[error("no randomness")]
    Random,
    /// The access token has ended and the issuer cannot be asked for another just now.
    #[error("the session cannot be renewed just now")]
    IssuerUnavailable,
    /// The record was changed too often under our hands.
    #[error("the session changed too often to be written")]
    Contention,
}

/// What is sealed.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    user: User,
    created: u64,
    last_seen: u64,
    access_ends: u64,
    refresh_at: u64,
    refresh_token: Option<Secret>,
    id_token: Option<Secret>,
}

/// A token inside a record.
#[derive(Clone)]
struct Secret(SecretString);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.expose_secret())
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(text.into()))
    }
}

/// A record as it was read.
#[derive(Debug, Clone)]
struct Loaded {
    record: Record,
    version: u64,
    ends: u64,
}

/// What a logout leaves to do at the issuer.
#[derive(Debug)]
pub struct Ended {
    /// Whose session it was.
    pub user: User,
    /// Hint for the issuer's end-session endpoint.
    pub id_token: Option<SecretString>,
    /// To be revoked.
    pub refresh_token: Option<SecretString>,
}

/// All sessions of this gateway.
pub struct Sessions {
    store: Arc<dyn SessionStore>,
    sealer: Sealer,
    limits: SessionLimits,
    issuers: Arc<Issuers>,
    clock: SharedClock,
    random: SharedRandom,
    scope: Scope,
    /// Sessions being refreshed; whoever needs the outcome waits for the channel to close.
    refreshing: Mutex<HashMap<SessionHash, watch::Receiver<()>>>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Sessions {
    /// Sessions in `store`, sealed by `sealer`.
    pub fn new(
        store: Arc<dyn SessionStore>,
        sealer: Sealer,
        limits: SessionLimits,
        issuers: Arc<Issuers>,
        clock: SharedClock,
        random: SharedRandom,
        scope: Scope,
    ) -> Arc<Self> {
        Arc::new(Self { store, sealer, limits, issuers, clock, random, scope, refreshing: Mutex::default() })
    }

    /// Makes a session for a user who has just logged in and returns the cookie's value.
    ///
    /// `replaces` is the cookie value the browser came with: that session ends, so that no id from
    /// before the login is good after it.
    pub async fn create(
        &self,
        user: User,
        tokens: Tokens,
        replaces: Option<&str>,
    ) -> Result<Zeroizing<String>, SessionError> {
        if let Some(id) = replaces.and_then(hash_of) {
            self.replace(&id, &user).await?;
        }
        let mut id = Zeroizing::new([0; ID_BYTES]);
        self.random.fill(id.as_mut()).map_err(|_| SessionError::Random)?;
        let cookie = Zeroizing::new(jws::encode(id.as_ref()));
        let hash = hash_of(&cookie).ok_or(SessionError::Random)?;
        let now = self.clock.now_seconds();
        let mut record = Record {
            user,
            created: now,
            last_seen: now,
            access_ends: 0,
            refresh_at: 0,
            refresh_token: tokens.refresh_token.clone().map(Secret),
            id_token: tokens.id_token.clone().map(Secret),
        };
        self.schedule(&mut record, tokens.expires_in)?;
        let ends = now.saturating_add(self.limits.absolute.as_secs());
        let sealed = self.seal(&hash, 1, ends, &record)?;
        if !self.store.put(&hash, None, Row { version: 1, ends, sealed }).await? {
            return Err(SessionError::Random);
        }
        Ok(cookie)
    }

    /// The user of a session, if the cookie names a live one. Starts a refresh when one is due, and waits
    /// for it only if the access token has already ended.
    pub async fn authenticate(
        self: &Arc<Self>,
        cookie: &str,
    ) -> Result<Option<(User, SessionHash)>, SessionError> {
        let Some(id) = hash_of(cookie) else { return Ok(None) };
        let Some(mut loaded) = self.live(&id).await? else { return Ok(None) };
        let now = self.clock.now_seconds();
        let record = &loaded.record;
        if record.refresh_token.is_some() && now >= record.refresh_at {
            let running = self.refresh(id);
            if now >= record.access_ends {
                wait_for(running).await;
                match self.live(&id).await? {
                    Some(renewed) => loaded = renewed,
                    None => return Ok(None),
                }
            }
        }
        if loaded.record.refresh_token.is_some() && now >= loaded.record.access_ends {
            return Err(SessionError::IssuerUnavailable);
        }
        if now >= loaded.record.last_seen.saturating_add(TOUCH_INTERVAL_SECONDS) {
            self.touch(&id, loaded.clone(), now).await;
        }
        Ok(Some((loaded.record.user, id)))
    }

    /// Ends a session at once.
    pub async fn end(&self, cookie: &str) -> Result<Option<Ended>, SessionError> {
        let Some(id) = hash_of(cookie) else { return Ok(None) };
        let loaded = self.load(&id).await;
        // It ends even if its record cannot be read.
        self.store.delete(&id).await?;
        Ok(loaded.ok().flatten().map(|Loaded { record, .. }| Ended {
            user: record.user,
            id_token: record.id_token.map(|secret| secret.0),
            refresh_token: record.refresh_token.map(|secret| secret.0),
        }))
    }

    /// Sweeps ended sessions out of the store until the scope drains.
    pub async fn sweep(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.clock.sleep(SWEEP_INTERVAL) => {}
                () = self.scope.draining() => return,
            }
            match self.store.sweep(self.clock.now_seconds()).await {
                Ok(0) => {}
                Ok(count) => tracing::debug!(count, "ended sessions swept"),
                Err(error) => tracing::error!(%error, "ended sessions cannot be swept"),
            }
        }
    }

    /// The record, unless it is absent, does not open, or has idled or lived out.
    async fn live(&self, id: &SessionHash) -> Result<Option<Loaded>, SessionError> {
        let Some(loaded) = self.load(id).await? else { return Ok(None) };
        let now = self.clock.now_seconds();
        let idle_end = loaded.record.last_seen.saturating_add(self.limits.idle.as_secs());
        if now < loaded.ends && now < idle_end {
            return Ok(Some(loaded));
        }
        self.store.delete(id).await?;
        Ok(None)
    }

    async fn load(&self, id: &SessionHash) -> Result<Option<Loaded>, SessionError> {
        let Some(row) = self.store.get(id).await? else { return Ok(None) };
        let bound = bound(row.version, row.ends);
        let Ok(plain) = self.sealer.open(id, &bound, &row.sealed) else {
            tracing::warn!(session = short(id), "a session record does not open; its user must log in again");
            return Ok(None);
        };
        match serde_json::from_slice(&plain) {
            Ok(record) => Ok(Some(Loaded { record, version: row.version, ends: row.ends })),
            Err(_) => Err(StoreError::Malformed.into()),
        }
    }

    fn seal(
        &self,
        id: &SessionHash,
        version: u64,
        ends: u64,
        record: &Record,
    ) -> Result<Vec<u8>, SessionError> {
        let plain = Zeroizing::new(serde_json::to_vec(record).map_err(|_| SealError)?);
        Ok(self.sealer.seal(self.random.as_ref(), id, &bound(version, ends), &plain)?)
    }

    /// Writes a changed record; false if it was changed or deleted since it was loaded.
    async fn store(&self, id: &SessionHash, changed: &Loaded) -> Result<bool, SessionError> {
        let version = changed.version + 1;
        let sealed = self.seal(id, version, changed.ends, &changed.record)?;
        Ok(self.store.put(id, Some(changed.version), Row { version, ends: changed.ends, sealed }).await?)
    }

    async fn touch(&self, id: &SessionHash, mut loaded: Loaded, now: u64) {
        loaded.record.last_seen = now;
        match self.store(id, &loaded).await {
            // Losing this race means that a parallel request touched it, or a refresh or logout came
            // between: all of which leave the record as it should be, for the next request to touch.
            Ok(_) => {}
            // Not written is the safe side: the session idles out sooner.
            Err(error) => {
                tracing::error!(session = short(id), %error, "the last use of a session is not written")
            }
        }
    }

    async fn replace(&self, id: &SessionHash, user: &User) -> Result<(), SessionError> {
        for _ in 0..MAX_SWAPS {
            let Some(mut loaded) = self.load(id).await? else { return Ok(()) };
            let same = loaded.record.user.id == user.id && loaded.record.user.issuer == user.issuer;
            if !same {
                self.store.delete(id).await?;
                return Ok(());
            }
            loaded.ends = loaded.ends.min(self.clock.now_seconds().saturating_add(REPLACED_GRACE_SECONDS));
            if self.store(id, &loaded).await? {
                return Ok(());
            }
        }
        Err(SessionError::Contention)
    }

    /// The one refresh of this session: joined if it runs, else started as a task that no client's
    /// disconnect can cancel.
    fn refresh(self: &Arc<Self>, id: SessionHash) -> watch::Receiver<()> {
        let mut refreshing = self.refreshing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = refreshing.get(&id) {
            return running.clone();
        }
        let (done, running) = watch::channel(());
        refreshing.insert(id, running.clone());
        let sessions = Arc::clone(self);
        self.scope.spawn("session refresh", async move {
            let _finish = Finish { sessions: &sessions, id, _done: done };
            if let Err(error) = sessions.refresh_once(&id).await {
                tracing::warn!(session = short(&id), %error, "a session could not be refreshed");
            }
        });
        running
    }

    async fn refresh_once(&self, id: &SessionHash) -> Result<(), SessionError> {
        let Some(loaded) = self.live(id).await? else { return Ok(()) };
        // Whoever asked may have looked before the refresh that has just ended.
        if self.clock.now_seconds() < loaded.record.refresh_at {
            return Ok(());
        }
        let Some(Secret(token)) = loaded.record.refresh_token.clone() else { return Ok(()) };
        let Some(issuer) = self.issuers.get(&loaded.record.user.issuer) else {
            tracing::warn!(session = short(id), "its issuer is no longer configured; the session ends");
            self.store.delete(id).await?;
            return Ok(());
        };
        match exchange(issuer, &token).await {
            Ok(tokens) => self.keep_renewed(id, &token, &tokens).await,
            Err(TokenError::InvalidGrant | TokenError::Token(_) | TokenError::Answer(_)) => {
                self.end_refused(id, &token).await
            }
            Err(error @ (TokenError::Lost(_) | TokenError::Unavailable(_))) => {
                tracing::warn!(session = short(id), issuer = %issuer.issuer(), %error, "refresh failed");
                self.back_off(id, &token).await
            }
        }
    }

    async fn keep_renewed(
        &self,
        id: &SessionHash,
        used: &SecretString,
        tokens: &Tokens,
    ) -> Result<(), SessionError> {
        for _ in 0..MAX_SWAPS {
            // Gone means logged out meanwhile: what the issuer gave is not kept.
            let Some(mut loaded) = self.load(id).await? else { return Ok(()) };
            let record = &mut loaded.record;
            if !holds(record, used) {
                return Ok(());
            }
            if let Some(renewed) = &tokens.id {
                if renewed.subject != record.user.id {
                    tracing::error!(
                        session = short(id),
                        "the issuer renewed another subject; the session ends"
                    );
                    self.store.delete(id).await?;
                    return Ok(());
                }
                record.user.groups.clone_from(&renewed.groups);
            }
            if let Some(scopes) = &tokens.scopes {
                record.user.scopes.clone_from(scopes);
            }
            // An issuer that does not rotate repeats nothing: the old one stays good (RFC 6749 §6).
            if let Some(next) = &tokens.refresh_token {
                record.refresh_token = Some(Secret(next.clone()));
            }
            if let Some(id_token) = &tokens.id_token {
                record.id_token = Some(Secret(id_token.clone()));
            }
            self.schedule(record, tokens.expires_in)?;
            if self.store(id, &loaded).await? {
                return Ok(());
            }
        }
        Err(SessionError::Contention)
    }

    /// The issuer no longer takes the token: unless somebody has replaced it meanwhile, the session ends.
    async fn end_refused(&self, id: &SessionHash, used: &SecretString) -> Result<(), SessionError> {
        if let Some(loaded) = self.load(id).await?
            && holds(&loaded.record, used)
        {
            let user = &loaded.record.user;
            tracing::warn!(
                session = short(id),
                user = user.id,
                issuer = user.issuer,
                "the issuer refused to renew the session; it ends"
            );
            self.store.delete(id).await?;
        }
        Ok(())
    }

    async fn back_off(&self, id: &SessionHash, used: &SecretString) -> Result<(), SessionError> {
        for _ in 0..MAX_SWAPS {
            let Some(mut loaded) = self.load(id).await? else { return Ok(()) };
            if !holds(&loaded.record, used) {
                return Ok(());
            }
            loaded.record.refresh_at = self.clock.now_seconds().saturating_add(REFRESH_BACKOFF_SECONDS);
            if self.store(id, &loaded).await? {
                return Ok(());
            }
        }
        Err(SessionError::Contention)
    }

    /// A refresh is due at 70–80 % of the access token's life: early enough to be done before it ends,
    /// spread so that sessions that began together do not refresh together.
    fn schedule(&self, record: &mut Record, expires_in: Duration) -> Result<(), SessionError> {
        let mut jitter = [0; 1];
        self.random.fill(&mut jitter).map_err(|_| SessionError::Random)?;
        let share = 0.70 + 0.10 * f64::from(u8::from_ne_bytes(jitter)) / 255.0;
        let now = self.clock.now_seconds();
        record.access_ends = now.saturating_add(expires_in.as_secs());
        record.refresh_at = now.saturating_add(expires_in.mul_f64(share).as_secs());
        Ok(())
    }
}

/// Ends a refresh in the books even if its task panics.
struct Finish<'a> {
    sessions: &'a Sessions,
    id: SessionHash,
    _done: watch::Sender<()>,
}

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.sessions.refreshing.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

async fn wait_for(mut running: watch::Receiver<()>) {
    // The sender says nothing; it is dropped when the refresh has ended.
    let _closed = running.changed().await.is_err();
}

/// One exchange, and a second one only if the answer to the first was lost and the issuer repeats itself.
async fn exchange(issuer: &Arc<IssuerClient>, token: &SecretString) -> Result<Tokens, TokenError> {
    match issuer.refresh(token).await {
        Err(TokenError::Lost(_)) if issuer.retry_safe() => issuer.refresh(token).await,
        outcome => outcome,
    }
}

fn holds(record: &Record, token: &SecretString) -> bool {
    record.refresh_token.as_ref().is_some_and(|held| held.0.expose_secret() == token.expose_secret())
}

/// The hash of a cookie value, if it could be one of ours.
fn hash_of(cookie: &str) -> Option<SessionHash> {
    if cookie.len() > MAX_COOKIE_BYTES {
        return None;
    }
    let id = Zeroizing::new(jws::decode(cookie).ok()?);
    if id.len() != ID_BYTES {
        return None;
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, &id).as_ref());
    Some(hash)
}

fn bound(version: u64, ends: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    let both = version.to_be_bytes().into_iter().chain(ends.to_be_bytes());
    bytes.iter_mut().zip(both).for_each(|(to, from)| *to = from);
    bytes
}

/// A session's name in logs: of no use as a cookie.
fn short(id: &SessionHash) -> String {
    jws::encode(id.get(..9).unwrap_or_default())
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
