//! What the provider has granted: codes (in memory, a minute), browser logins (in memory, hours), and
//! refresh-token families (on disk).
//!
//! A refresh token names its family and generation and carries an HMAC over both, so tokens are not
//! stored at all, and the successor of a generation is always the same text. A family is one row: which
//! generation is current, and since when.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use identity::clock::SharedClock;
use identity::jws;
use redb::{Database, ReadableTable as _, TableDefinition};
use ring::hmac;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::sha256;
use crate::store::{StoreError, private_database};
use crate::{BoxError, SharedRandom};

/// RFC 6749 §4.1.2 recommends at most ten minutes; a browser needs seconds.
const CODE_LIFETIME: Duration = Duration::from_secs(60);
/// Most codes at once; a flood of logins must not fill memory.
const MAX_CODES: usize = 10_000;
/// How long a browser stays logged in at the provider itself.
const LOGIN_LIFETIME: Duration = Duration::from_secs(8 * 3600);
/// Most browsers logged in at once.
const MAX_LOGINS: usize = 100_000;
/// A family ends this long after its login, however often it was refreshed: as long as a gateway's session.
const FAMILY_LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// A client whose answer got lost may ask again within this and gets the same successor.
const REPEAT_WINDOW: Duration = Duration::from_secs(10);
/// How often ended families are removed.
pub(super) const SWEEP_INTERVAL: Duration = Duration::from_secs(600);

const FAMILIES: TableDefinition<'_, &[u8; 16], &[u8]> = TableDefinition::new("families");
const SECRET_BYTES: usize = 32;

/// No randomness, or too many grants at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unavailable;

/// Who logged in, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Login {
    pub user: String,
    pub auth_time: u64,
}

/// What an authorization code stands for.
#[derive(Debug, Clone)]
pub(super) struct Grant {
    pub login: Login,
    pub client: String,
    pub redirect_uri: String,
    pub challenge: String,
    pub scopes: Vec<String>,
    pub nonce: Option<String>,
}

enum Code {
    Fresh(Grant),
    /// Kept until it would have expired, to notice a second use; with the family that the first one began.
    Used(Option<FamilyId>),
}

/// What a code was good for.
pub(super) enum Redeemed {
    Grant(Grant),
    /// Unknown or too old.
    Unknown,
    /// Used before: somebody has copied it (RFC 6749 §4.1.2), so what it began must end.
    Again(Option<FamilyId>),
}

/// Authorization codes.
pub(super) struct Codes(Expiring<Code>);

impl Codes {
    pub(super) fn new(clock: SharedClock, random: SharedRandom) -> Self {
        Self(Expiring::new(clock, random, MAX_CODES))
    }

    pub(super) fn issue(&self, grant: Grant) -> Result<Zeroizing<String>, Unavailable> {
        self.0.insert(Code::Fresh(grant), CODE_LIFETIME)
    }

    /// Takes a code: the first call gets the grant, every later one does not.
    pub(super) fn redeem(&self, code: &str) -> Redeemed {
        self.0
            .with(code, |code| match std::mem::replace(code, Code::Used(None)) {
                Code::Fresh(grant) => Redeemed::Grant(grant),
                Code::Used(family) => {
                    *code = Code::Used(family);
                    Redeemed::Again(family)
                }
            })
            .unwrap_or(Redeemed::Unknown)
    }

    /// Notes which family a used code began.
    pub(super) fn began(&self, code: &str, family: FamilyId) {
        let _known = self.0.with(code, |code| *code = Code::Used(Some(family)));
    }
}

/// Browsers logged in at the provider.
pub(super) struct Logins(Expiring<Login>);

impl Logins {
    pub(super) fn new(clock: SharedClock, random: SharedRandom) -> Self {
        Self(Expiring::new(clock, random, MAX_LOGINS))
    }

    pub(super) fn begin(&self, login: Login) -> Result<Zeroizing<String>, Unavailable> {
        self.0.insert(login, LOGIN_LIFETIME)
    }

    pub(super) fn get(&self, cookie: &str) -> Option<Login> {
        self.0.with(cookie, |login| login.clone())
    }

    pub(super) fn end(&self, cookie: &str) {
        self.0.remove(cookie);
    }
}

/// Values under the hash of a random name, each for a while.
struct Expiring<T> {
    clock: SharedClock,
    random: SharedRandom,
    max: usize,
    entries: Mutex<HashMap<[u8; 32], (T, Duration)>>,
}

impl<T> Expiring<T> {
    fn new(clock: SharedClock, random: SharedRandom, max: usize) -> Self {
        Self { clock, random, max, entries: Mutex::default() }
    }

    fn insert(&self, value: T, lifetime: Duration) -> Result<Zeroizing<String>, Unavailable> {
        let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
        self.random.fill(bytes.as_mut()).map_err(|_| Unavailable)?;
        let name = Zeroizing::new(jws::encode(bytes.as_ref()));
        let now = self.clock.now();
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= self.max {
            entries.retain(|_, (_, expires)| *expires > now);
            if entries.len() >= self.max {
                return Err(Unavailable);
            }
        }
        entries.insert(sha256(name.as_bytes()), (value, now.saturating_add(lifetime)));
        Ok(name)
    }

    fn with<R>(&self, name: &str, look: impl FnOnce(&mut T) -> R) -> Option<R> {
        let now = self.clock.now();
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (value, expires) = entries.get_mut(&sha256(name.as_bytes()))?;
        (now < *expires).then(|| look(value))
    }

    fn remove(&self, name: &str) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).remove(&sha256(name.as_bytes()));
    }
}

/// A family's random id.
pub(super) type FamilyId = [u8; 16];

/// All refresh tokens that descend from one login.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Family {
    pub login: Login,
    pub client: String,
    pub scopes: Vec<String>,
    generation: u32,
    /// When the current generation was issued, milliseconds since the Unix epoch.
    issued: u64,
    ends: u64,
}

/// What a refresh token was good for.
#[derive(Debug)]
pub(super) enum Refreshed {
    /// Go on, with this successor.
    Family(Box<Family>, Zeroizing<String>),
    /// Unknown, ended, or another client's.
    Invalid,
    /// Used before: the family has been revoked.
    Reused,
}

/// Refresh-token families on disk.
pub(super) struct Families {
    database: Arc<Database>,
    key: hmac::Key,
    clock: SharedClock,
    random: SharedRandom,
}

impl Families {
    pub(super) fn open(
        directory: &Path,
        key: &[u8],
        clock: SharedClock,
        random: SharedRandom,
    ) -> Result<Self, StoreError> {
        let database = Arc::new(private_database(&directory.join("refresh.redb"))?);
        Ok(Self { database, key: hmac::Key::new(hmac::HMAC_SHA256, key), clock, random })
    }

    /// Begins a family and returns its first token.
    pub(super) async fn begin(
        &self,
        login: Login,
        client: String,
        scopes: Vec<String>,
    ) -> Result<(FamilyId, Zeroizing<String>), StoreError> {
        let mut id = FamilyId::default();
        self.random.fill(&mut id).map_err(|_| failed("no randomness"))?;
        let now = self.clock.now();
        let ends = now.saturating_add(FAMILY_LIFETIME).as_secs();
        let family = Family { login, client, scopes, generation: 0, issued: millis(now), ends };
        self.write(move |table| save(table, &id, &family)).await?;
        Ok((id, self.token(&id, 0)))
    }

    /// Takes a refresh token of `client`: the current one is rotated, the one before repeats its successor
    /// for a moment, any other ends the family. Decided and written in one transaction.
    pub(super) async fn rotate(&self, token: &str, client: &str) -> Result<Refreshed, StoreError> {
        let Some((id, generation)) = self.read_token(token) else { return Ok(Refreshed::Invalid) };
        let (now, client) = (self.clock.now(), client.to_owned());
        let outcome = self.write(move |table| rotate(table, &id, generation, &client, now)).await?;
        Ok(match outcome {
            Rotated::Current(family) => {
                let successor = self.token(&id, family.generation);
                Refreshed::Family(family, successor)
            }
            Rotated::Invalid => Refreshed::Invalid,
            Rotated::Reused => Refreshed::Reused,
        })
    }

    /// Ends a family.
    pub(super) async fn revoke(&self, id: FamilyId) -> Result<(), StoreError> {
        self.write(move |table| table.remove(&id).map(|_| ()).map_err(failed)).await
    }

    /// The family of a token, whatever its generation, if the token is `client`'s to speak of: for
    /// revocation.
    pub(super) async fn revoke_by_token(&self, token: &str, client: &str) -> Result<(), StoreError> {
        let Some((id, _)) = self.read_token(token) else { return Ok(()) };
        let client = client.to_owned();
        self.write(move |table| {
            if load(table, &id)?.is_some_and(|family| family.client == client) {
                table.remove(&id).map_err(failed)?;
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn sweep(&self) -> Result<(), StoreError> {
        let now = self.clock.now_seconds();
        self.write(move |table| {
            let live =
                |row: &[u8]| serde_json::from_slice::<Family>(row).is_ok_and(|family| family.ends > now);
            table.retain(|_, row| live(row)).map_err(failed)
        })
        .await
    }

    fn token(&self, id: &FamilyId, generation: u32) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(message(id, generation));
        let tag = hmac::sign(&self.key, &bytes);
        bytes.extend_from_slice(tag.as_ref());
        Zeroizing::new(jws::encode(bytes.as_slice()))
    }

    fn read_token(&self, token: &str) -> Option<(FamilyId, u32)> {
        // 16 + 4 + 32 bytes in base64url.
        if token.len() != 70 {
            return None;
        }
        let bytes = Zeroizing::new(jws::decode(token).ok()?);
        let (id, rest) = bytes.split_first_chunk::<16>()?;
        let (generation, tag) = rest.split_first_chunk::<4>()?;
        let generation = u32::from_be_bytes(*generation);
        hmac::verify(&self.key, &message(id, generation), tag).ok()?;
        Some((*id, generation))
    }

    async fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Table<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let database = Arc::clone(&self.database);
        let work = move || {
            let transaction = database.begin_write().map_err(failed)?;
            let outcome = change(&mut transaction.open_table(FAMILIES).map_err(failed)?)?;
            transaction.commit().map_err(failed)?;
            Ok(outcome)
        };
        tokio::task::spawn_blocking(work).await.map_err(failed)?
    }
}

type Table<'t> = redb::Table<'t, &'static [u8; 16], &'static [u8]>;

enum Rotated {
    Current(Box<Family>),
    Invalid,
    Reused,
}

fn rotate(
    table: &mut Table<'_>,
    id: &FamilyId,
    presented: u32,
    client: &str,
    now: Duration,
) -> Result<Rotated, StoreError> {
    let Some(mut family) = load(table, id)? else { return Ok(Rotated::Invalid) };
    if now.as_secs() >= family.ends {
        table.remove(id).map_err(failed)?;
        return Ok(Rotated::Invalid);
    }
    if family.client != client {
        // Somebody else's token in this client's hands: it has leaked.
        table.remove(id).map_err(failed)?;
        return Ok(Rotated::Reused);
    }
    if presented == family.generation {
        let Some(next) = family.generation.checked_add(1) else { return Ok(Rotated::Invalid) };
        family.generation = next;
        family.issued = millis(now);
        save(table, id, &family)?;
        return Ok(Rotated::Current(Box::new(family)));
    }
    let age = millis(now).saturating_sub(family.issued);
    if presented.checked_add(1) == Some(family.generation) && u128::from(age) < REPEAT_WINDOW.as_millis() {
        return Ok(Rotated::Current(Box::new(family)));
    }
    table.remove(id).map_err(failed)?;
    Ok(Rotated::Reused)
}

fn load(table: &Table<'_>, id: &FamilyId) -> Result<Option<Family>, StoreError> {
    match table.get(id).map_err(failed)? {
        Some(row) => serde_json::from_slice(row.value()).map(Some).map_err(|_| StoreError::Malformed),
        None => Ok(None),
    }
}

fn save(table: &mut Table<'_>, id: &FamilyId, family: &Family) -> Result<(), StoreError> {
    let row = serde_json::to_vec(family).map_err(failed)?;
    table.insert(id, row.as_slice()).map(|_| ()).map_err(failed)
}

fn message(id: &FamilyId, generation: u32) -> Vec<u8> {
    let mut message = id.to_vec();
    message.extend_from_slice(&generation.to_be_bytes());
    message
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn failed(error: impl Into<BoxError>) -> StoreError {
    StoreError::Database(error.into())
}

#[cfg(test)]
mod tests {
    use identity::clock::ManualClock;
    use ring::rand::SystemRandom;

    use super::*;

    fn login() -> Login {
        Login { user: "alice".into(), auth_time: 1000 }
    }

    struct Bench {
        clock: Arc<ManualClock>,
        families: Families,
        _directory: tempfile::TempDir,
    }

    fn bench() -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(Duration::from_secs(1000));
        let families =
            Families::open(directory.path(), &[7; 32], clock.clone(), Arc::new(SystemRandom::new())).unwrap();
        Bench { clock, families, _directory: directory }
    }

    async fn next(families: &Families, token: &str) -> Option<String> {
        match families.rotate(token, "web").await.unwrap() {
            Refreshed::Family(_, successor) => Some(successor.to_string()),
            Refreshed::Invalid | Refreshed::Reused => None,
        }
    }

    #[tokio::test]
    async fn gateway_25_a_rotated_token_repeats_its_successor_for_ten_seconds_and_then_ends_the_family() {
        let Bench { clock, families, .. } = bench();
        let (_, first) = families.begin(login(), "web".into(), vec!["openid".into()]).await.unwrap();
        let second = next(&families, &first).await.unwrap();
        assert_ne!(*first, second);
        clock.advance(REPEAT_WINDOW - Duration::from_millis(1));
        assert_eq!(next(&families, &first).await.unwrap(), second, "the identical successor");
        clock.advance(Duration::from_millis(1));
        assert!(matches!(families.rotate(&first, "web").await.unwrap(), Refreshed::Reused));
        assert_eq!(next(&families, &second).await, None, "the successor has died with its family");
    }

    #[tokio::test]
    async fn security_44_a_token_two_generations_old_ends_the_family_at_once() {
        let Bench { families, .. } = bench();
        let (_, first) = families.begin(login(), "web".into(), vec![]).await.unwrap();
        let second = next(&families, &first).await.unwrap();
        let third = next(&families, &second).await.unwrap();
        assert!(matches!(families.rotate(&first, "web").await.unwrap(), Refreshed::Reused));
        assert_eq!(next(&families, &third).await, None);
    }

    #[tokio::test]
    async fn a_token_serves_its_own_client_until_its_family_ends() {
        let Bench { clock, families, .. } = bench();
        let (_, token) = families.begin(login(), "web".into(), vec![]).await.unwrap();
        let mut forged = token.to_string();
        forged.replace_range(0..1, if token.starts_with('A') { "B" } else { "A" });
        assert!(matches!(families.rotate(&forged, "web").await.unwrap(), Refreshed::Invalid));
        assert!(matches!(families.rotate("x", "web").await.unwrap(), Refreshed::Invalid));
        families.revoke_by_token(&token, "other").await.unwrap();
        let token = next(&families, &token).await.unwrap();
        clock.advance(FAMILY_LIFETIME);
        assert_eq!(next(&families, &token).await, None);
        let (_, token) = families.begin(login(), "web".into(), vec![]).await.unwrap();
        assert!(matches!(families.rotate(&token, "other").await.unwrap(), Refreshed::Reused));
        let (_, token) = families.begin(login(), "web".into(), vec![]).await.unwrap();
        families.revoke_by_token(&token, "web").await.unwrap();
        assert_eq!(next(&families, &token).await, None);
    }

    #[test]
    fn a_code_is_good_once_and_for_a_minute() {
        let clock = ManualClock::at(Duration::from_secs(1000));
        let codes = Codes::new(clock.clone(), Arc::new(SystemRandom::new()));
        let grant = Grant {
            login: login(),
            client: "web".into(),
            redirect_uri: String::new(),
            challenge: String::new(),
            scopes: vec![],
            nonce: None,
        };
        let code = codes.issue(grant.clone()).unwrap();
        assert!(matches!(codes.redeem(&code), Redeemed::Grant(_)));
        codes.began(&code, [1; 16]);
        assert!(matches!(codes.redeem(&code), Redeemed::Again(Some(family)) if family == [1; 16]));
        assert!(matches!(codes.redeem("x"), Redeemed::Unknown));
        let late = codes.issue(grant.clone()).unwrap();
        clock.advance(CODE_LIFETIME);
        assert!(matches!(codes.redeem(&late), Redeemed::Unknown));
        for _ in 0..MAX_CODES {
            codes.issue(grant.clone()).unwrap();
        }
        assert!(codes.issue(grant.clone()).is_err());
        clock.advance(CODE_LIFETIME);
        assert!(codes.issue(grant).is_ok());
    }
}
