//! The key-value engine, version 2 of Vault's: versions, check-and-set, deletion that can be undone and
//! destruction that cannot.
//!
//! A secret's data is kept as the JSON text that came in and goes out as the same text, so that no number
//! is ever rounded (OpenBao keeps integers above 2^53 wrongly).
//!
//! Records: `kv/secret/meta/PATH` holds what is known about the versions, `kv/secret/data/VERSION/PATH` the
//! data of one. A write stores both in one transaction.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::authorize::{Action, Permit};
use crate::barrier::{Barrier, BarrierError, Change};
use crate::path::SecretPath;
use crate::stamp::Stamp;

/// Versions kept where `max_versions` is 0, as in Vault.
pub const DEFAULT_MAX_VERSIONS: u32 = 10;
/// Most versions kept: they are listed in one record.
pub const MAX_MAX_VERSIONS: u32 = 1000;
/// Most writes to one path: each uses its path's key once more, and the bound of random nonces is 2^32.
pub const MAX_VERSION: u64 = 1 << 31;
/// Most versions named in one request.
pub const MAX_VERSIONS_IN_REQUEST: usize = 1000;
/// Most custom metadata keys, as in Vault.
pub const MAX_CUSTOM_KEYS: usize = 64;
/// Longest custom metadata key, as in Vault.
pub const MAX_CUSTOM_KEY_BYTES: usize = 128;
/// Longest custom metadata value, as in Vault.
pub const MAX_CUSTOM_VALUE_BYTES: usize = 512;

const META: &str = "kv/secret/meta/";
const DATA: &str = "kv/secret/data/";
/// Writers of different secrets rarely meet in one of these.
const LOCKS: usize = 64;

/// Why the engine refuses.
#[derive(Debug, Error)]
pub enum KvError {
    /// No such secret or version.
    #[error("there is no such secret")]
    NotFound,
    /// `options.cas` is not the current version.
    #[error("check-and-set parameter did not match the current version")]
    CasMismatch,
    /// The secret asks for `options.cas`.
    #[error("check-and-set parameter required for this call")]
    CasRequired,
    /// A field out of range.
    #[error("{0}")]
    Invalid(&'static str),
    /// The permit is for something else: a fault in this program.
    #[error("the permit does not cover the operation")]
    NotPermitted,
    /// A record cannot be read.
    #[error("a stored secret is damaged")]
    Damaged,
    /// Sealed, or the store failed.
    #[error(transparent)]
    Barrier(#[from] BarrierError),
}

/// What is known about one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Version {
    /// When it was written.
    pub created: Stamp,
    /// When it was deleted, if it was.
    pub deleted: Option<Stamp>,
    /// Whether its data is gone for good.
    pub destroyed: bool,
}

/// What is known about a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The newest version; 0 before the first write.
    pub current: u64,
    /// The oldest version still known; 0 before the first was dropped.
    pub oldest: u64,
    /// When the secret was first written.
    pub created: Stamp,
    /// When it last changed.
    pub updated: Stamp,
    /// Versions kept; 0 stands for [`DEFAULT_MAX_VERSIONS`].
    pub max_versions: u32,
    /// Whether every write must bring `options.cas`.
    pub cas_required: bool,
    /// What people attach to it.
    pub custom: Option<BTreeMap<String, String>>,
    /// The versions, oldest first.
    pub versions: BTreeMap<u64, Version>,
}

impl Metadata {
    fn new(now: Stamp) -> Self {
        Self {
            current: 0,
            oldest: 0,
            created: now,
            updated: now,
            max_versions: 0,
            cas_required: false,
            custom: None,
            versions: BTreeMap::new(),
        }
    }
}

/// One version as read.
#[derive(Debug)]
pub struct Read {
    /// Its number.
    pub number: u64,
    /// What is known about it.
    pub version: Version,
    /// What people attached to the secret.
    pub custom: Option<BTreeMap<String, String>>,
    /// Its data, unless it is deleted or destroyed.
    pub data: Option<Box<RawValue>>,
}

/// A change of a secret's settings; `None` leaves one as it is.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Versions kept.
    pub max_versions: Option<u32>,
    /// Whether every write must bring `options.cas`.
    pub cas_required: Option<bool>,
    /// What people attach to it.
    pub custom: Option<BTreeMap<String, String>>,
}

/// Which versions a request names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Hide the data; it can be brought back.
    Delete,
    /// Bring it back.
    Undelete,
    /// Remove the data for good.
    Destroy,
}

impl Fate {
    /// What a caller needs to be permitted.
    pub fn action(self) -> Action {
        match self {
            Self::Delete | Self::Destroy => Action::Delete,
            Self::Undelete => Action::Write,
        }
    }
}

/// The engine at `secret/`.
#[derive(Debug)]
pub struct Kv {
    barrier: Arc<Barrier>,
    locks: [tokio::sync::Mutex<()>; LOCKS],
}

impl Kv {
    /// An engine that stores behind `barrier`.
    pub fn new(barrier: Arc<Barrier>) -> Self {
        Self { barrier, locks: std::array::from_fn(|_| tokio::sync::Mutex::new(())) }
    }

    /// Reads one version, the current one if `number` is `None` or 0.
    ///
    /// # Errors
    /// [`KvError::NotFound`] for a secret or version that is not known. A deleted or destroyed version is
    /// known and comes without data.
    pub async fn read(&self, permit: &Permit, number: Option<u64>) -> Result<Read, KvError> {
        let path = permit.secret(Action::Read).ok_or(KvError::NotPermitted)?;
        let metadata = self.metadata(path).await?.ok_or(KvError::NotFound)?;
        let number = number.filter(|number| *number != 0).unwrap_or(metadata.current);
        let version = *metadata.versions.get(&number).ok_or(KvError::NotFound)?;
        let mut data = None;
        if version.deleted.is_none() && !version.destroyed {
            let stored = self.barrier.get(&data_path(path, number)).await?;
            // A write or a destruction of this very version finished in between: it is as if we came later.
            let stored = stored.ok_or(KvError::NotFound)?;
            data = Some(serde_json::from_slice(&stored).map_err(|_| KvError::Damaged)?);
        }
        Ok(Read { number, version, custom: metadata.custom, data })
    }

    /// Writes a version. `data` is a JSON object; `cas`, if given, must be the current version (0 if there
    /// is none yet).
    pub async fn write(
        &self,
        permit: &Permit,
        data: &RawValue,
        cas: Option<u64>,
        now: Duration,
    ) -> Result<(u64, Version, Option<BTreeMap<String, String>>), KvError> {
        let path = permit.secret(Action::Write).ok_or(KvError::NotPermitted)?;
        let _turn = self.lock(path).await;
        let now = Stamp::new(now);
        let mut metadata = self.metadata(path).await?.unwrap_or_else(|| Metadata::new(now));
        match cas {
            Some(cas) if cas != metadata.current => return Err(KvError::CasMismatch),
            None if metadata.cas_required => return Err(KvError::CasRequired),
            _ => {}
        }
        let number = metadata.current + 1;
        if number > MAX_VERSION {
            return Err(KvError::Invalid("the secret has been written too often"));
        }
        let version = Version { created: now, deleted: None, destroyed: false };
        metadata.versions.insert(number, version);
        metadata.current = number;
        metadata.updated = now;
        let mut changes = drop_old_versions(&mut metadata, path);
        let plaintext = Zeroizing::new(data.get().as_bytes().to_vec());
        changes.push(Change::Put { path: data_path(path, number), plaintext });
        changes.push(metadata_change(path, &metadata)?);
        self.barrier.transaction(changes).await?;
        Ok((number, version, metadata.custom))
    }

    /// Deletes the current version; nothing there is no error.
    pub async fn delete_latest(&self, permit: &Permit, now: Duration) -> Result<(), KvError> {
        let path = permit.secret(Action::Delete).ok_or(KvError::NotPermitted)?;
        let _turn = self.lock(path).await;
        let Some(metadata) = self.metadata(path).await? else { return Ok(()) };
        let current = metadata.current;
        self.change_versions(path, metadata, Fate::Delete, &[current], now).await
    }

    /// Deletes, brings back or destroys the versions named; unknown ones are passed over, as in Vault.
    pub async fn change(
        &self,
        permit: &Permit,
        fate: Fate,
        numbers: &[u64],
        now: Duration,
    ) -> Result<(), KvError> {
        let path = permit.secret(fate.action()).ok_or(KvError::NotPermitted)?;
        if numbers.is_empty() {
            return Err(KvError::Invalid("No version number provided"));
        }
        if numbers.len() > MAX_VERSIONS_IN_REQUEST {
            return Err(KvError::Invalid("too many version numbers"));
        }
        let _turn = self.lock(path).await;
        let Some(metadata) = self.metadata(path).await? else { return Ok(()) };
        self.change_versions(path, metadata, fate, numbers, now).await
    }

    /// What is known about a secret.
    pub async fn read_metadata(&self, permit: &Permit) -> Result<Metadata, KvError> {
        let path = permit.secret(Action::Read).ok_or(KvError::NotPermitted)?;
        self.metadata(path).await?.ok_or(KvError::NotFound)
    }

    /// Changes a secret's settings; makes the secret, without a version, if it is not there.
    pub async fn write_metadata(
        &self,
        permit: &Permit,
        settings: Settings,
        now: Duration,
    ) -> Result<(), KvError> {
        let path = permit.secret(Action::Write).ok_or(KvError::NotPermitted)?;
        check_settings(&settings)?;
        let _turn = self.lock(path).await;
        let now = Stamp::new(now);
        let mut metadata = self.metadata(path).await?.unwrap_or_else(|| Metadata::new(now));
        metadata.max_versions = settings.max_versions.unwrap_or(metadata.max_versions);
        metadata.cas_required = settings.cas_required.unwrap_or(metadata.cas_required);
        metadata.custom = settings.custom.or(metadata.custom);
        metadata.updated = now;
        Ok(self.barrier.transaction(vec![metadata_change(path, &metadata)?]).await?)
    }

    /// Removes a secret with all its versions.
    pub async fn delete_metadata(&self, permit: &Permit) -> Result<(), KvError> {
        let path = permit.secret(Action::Delete).ok_or(KvError::NotPermitted)?;
        let _turn = self.lock(path).await;
        let Some(metadata) = self.metadata(path).await? else { return Ok(()) };
        let mut changes = vec![Change::Delete { path: format!("{META}{path}") }];
        changes.extend(metadata.versions.keys().map(|n| Change::Delete { path: data_path(path, *n) }));
        Ok(self.barrier.transaction(changes).await?)
    }

    /// The names directly in a folder, folders with a slash at their end.
    pub async fn list(&self, permit: &Permit) -> Result<Vec<String>, KvError> {
        let prefix = match permit.folder().ok_or(KvError::NotPermitted)? {
            Some(folder) => format!("{META}{folder}/"),
            None => META.to_owned(),
        };
        let names = self.barrier.list(&prefix).await?;
        if names.is_empty() { Err(KvError::NotFound) } else { Ok(names) }
    }

    async fn lock(&self, path: &SecretPath) -> tokio::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        path.hash(&mut hasher);
        let at = usize::try_from(hasher.finish() % LOCKS as u64).unwrap_or(0);
        let [first, ..] = &self.locks;
        // INVARIANT: `at` is below LOCKS; the first lock would still be a correct one.
        self.locks.get(at).unwrap_or(first).lock().await
    }

    async fn metadata(&self, path: &SecretPath) -> Result<Option<Metadata>, KvError> {
        let stored = self.barrier.get(&format!("{META}{path}")).await?;
        stored.map(|bytes| serde_json::from_slice(&bytes).map_err(|_| KvError::Damaged)).transpose()
    }

    /// The caller holds the path's lock.
    async fn change_versions(
        &self,
        path: &SecretPath,
        mut metadata: Metadata,
        fate: Fate,
        numbers: &[u64],
        now: Duration,
    ) -> Result<(), KvError> {
        let now = Stamp::new(now);
        let mut changes = Vec::new();
        for number in numbers {
            let Some(version) = metadata.versions.get_mut(number).filter(|version| !version.destroyed) else {
                continue;
            };
            match fate {
                Fate::Delete => version.deleted = version.deleted.or(Some(now)),
                Fate::Undelete => version.deleted = None,
                Fate::Destroy => {
                    version.destroyed = true;
                    changes.push(Change::Delete { path: data_path(path, *number) });
                }
            }
        }
        metadata.updated = now;
        changes.push(metadata_change(path, &metadata)?);
        Ok(self.barrier.transaction(changes).await?)
    }
}

fn data_path(path: &SecretPath, number: u64) -> String {
    format!("{DATA}{number}/{path}")
}

fn metadata_change(path: &SecretPath, metadata: &Metadata) -> Result<Change, KvError> {
    let plaintext = Zeroizing::new(serde_json::to_vec(metadata).map_err(|_| KvError::Damaged)?);
    Ok(Change::Put { path: format!("{META}{path}"), plaintext })
}

fn drop_old_versions(metadata: &mut Metadata, path: &SecretPath) -> Vec<Change> {
    let kept = match metadata.max_versions {
        0 => DEFAULT_MAX_VERSIONS,
        kept => kept,
    };
    let mut changes = Vec::new();
    while metadata.versions.len() > usize::try_from(kept).unwrap_or(usize::MAX) {
        let Some((number, _)) = metadata.versions.pop_first() else { break };
        changes.push(Change::Delete { path: data_path(path, number) });
    }
    if !changes.is_empty() {
        metadata.oldest = metadata.versions.keys().next().copied().unwrap_or(0);
    }
    changes
}

fn check_settings(settings: &Settings) -> Result<(), KvError> {
    if settings.max_versions.is_some_and(|most| most > MAX_MAX_VERSIONS) {
        return Err(KvError::Invalid("max_versions must be at most 1000"));
    }
    let Some(custom) = &settings.custom else { return Ok(()) };
    if custom.len() > MAX_CUSTOM_KEYS {
        return Err(KvError::Invalid("custom_metadata must have at most 64 keys"));
    }
    let fits = |(key, value): (&String, &String)| {
        (1..=MAX_CUSTOM_KEY_BYTES).contains(&key.len()) && value.len() <= MAX_CUSTOM_VALUE_BYTES
    };
    if custom.iter().all(fits) {
        Ok(())
    } else {
        Err(KvError::Invalid("custom_metadata keys have 1 to 128 bytes, values at most 512"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorize::tests::permit;
    use crate::barrier::tests::unsealed;

    const NOW: Duration = Duration::from_secs(1_000_000);

    async fn engine() -> (tempfile::TempDir, Kv) {
        let (directory, barrier, _) = unsealed().await;
        (directory, Kv::new(Arc::new(barrier)))
    }

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).unwrap()
    }

    async fn put(kv: &Kv, path: &str, text: &str, cas: Option<u64>) -> Result<u64, KvError> {
        Ok(kv.write(&permit(Action::Write, path), &raw(text), cas, NOW).await?.0)
    }

    async fn get(kv: &Kv, path: &str, number: Option<u64>) -> Result<Option<String>, KvError> {
        let read = kv.read(&permit(Action::Read, path), number).await?;
        Ok(read.data.map(|data| data.get().to_owned()))
    }

    #[tokio::test]
    async fn what_is_written_is_read_to_the_letter() {
        let (_directory, kv) = engine().await;
        let text = r#"{"n":9007199254740993,"big":123456789012345678901234567890,"f":0.10,"e":1e2}"#;
        assert_eq!(put(&kv, "a/b", text, None).await.unwrap(), 1);
        assert_eq!(get(&kv, "a/b", None).await.unwrap().unwrap(), text);
        assert!(matches!(get(&kv, "a", None).await, Err(KvError::NotFound)));
        assert!(matches!(get(&kv, "a/b", Some(2)).await, Err(KvError::NotFound)));
    }

    #[tokio::test]
    async fn a_path_with_a_number_is_not_a_version_of_another() {
        let (_directory, kv) = engine().await;
        put(&kv, "a", r#"{"of":"a"}"#, None).await.unwrap();
        put(&kv, "1/a", r#"{"of":"1/a"}"#, None).await.unwrap();
        assert_eq!(get(&kv, "a", None).await.unwrap().unwrap(), r#"{"of":"a"}"#);
        assert_eq!(get(&kv, "1/a", None).await.unwrap().unwrap(), r#"{"of":"1/a"}"#);
    }

    #[tokio::test]
    async fn check_and_set_lets_one_writer_win() {
        let (_directory, kv) = engine().await;
        assert!(matches!(put(&kv, "a", "{}", Some(1)).await, Err(KvError::CasMismatch)));
        assert_eq!(put(&kv, "a", "{}", Some(0)).await.unwrap(), 1);
        assert!(matches!(put(&kv, "a", "{}", Some(0)).await, Err(KvError::CasMismatch)));
        let settings = Settings { cas_required: Some(true), ..Settings::default() };
        kv.write_metadata(&permit(Action::Write, "a"), settings, NOW).await.unwrap();
        assert!(matches!(put(&kv, "a", "{}", None).await, Err(KvError::CasRequired)));
        assert_eq!(put(&kv, "a", "{}", Some(1)).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn vault_19_of_racing_check_and_sets_exactly_one_wins_a_version() {
        let (_directory, kv) = engine().await;
        for round in 0..5u64 {
            let texts: Vec<String> = (0..100).map(|n| format!(r#"{{"writer":{n}}}"#)).collect();
            let racers = texts.iter().map(|text| put(&kv, "raced", text, Some(round)));
            let outcomes = futures::future::join_all(racers).await;
            let won: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
            assert_eq!(won, [&(round + 1)]);
            let lost = outcomes.iter().filter(|o| matches!(o, Err(KvError::CasMismatch))).count();
            assert_eq!(lost, 99);
        }
    }

    #[tokio::test]
    async fn deletion_can_be_undone_destruction_cannot() {
        let (_directory, kv) = engine().await;
        put(&kv, "a", r#"{"v":1}"#, None).await.unwrap();
        put(&kv, "a", r#"{"v":2}"#, None).await.unwrap();
        kv.delete_latest(&permit(Action::Delete, "a"), NOW).await.unwrap();
        assert_eq!(get(&kv, "a", None).await.unwrap(), None);
        assert_eq!(get(&kv, "a", Some(1)).await.unwrap().unwrap(), r#"{"v":1}"#);
        kv.change(&permit(Action::Write, "a"), Fate::Undelete, &[2, 77], NOW).await.unwrap();
        assert_eq!(get(&kv, "a", None).await.unwrap().unwrap(), r#"{"v":2}"#);
        kv.change(&permit(Action::Delete, "a"), Fate::Destroy, &[2], NOW).await.unwrap();
        kv.change(&permit(Action::Write, "a"), Fate::Undelete, &[2], NOW).await.unwrap();
        let read = kv.read(&permit(Action::Read, "a"), Some(2)).await.unwrap();
        assert!(read.version.destroyed && read.data.is_none());
        let path = SecretPath::new("a").unwrap();
        assert!(kv.barrier.storage().get(&data_path(&path, 2)).await.unwrap().is_none());
        let none = kv.change(&permit(Action::Delete, "a"), Fate::Destroy, &[], NOW).await;
        assert!(matches!(none, Err(KvError::Invalid(_))));
    }

    #[tokio::test]
    async fn old_versions_are_dropped_beyond_max_versions() {
        let (_directory, kv) = engine().await;
        let settings = Settings { max_versions: Some(3), ..Settings::default() };
        kv.write_metadata(&permit(Action::Write, "a"), settings, NOW).await.unwrap();
        for n in 1..=5u64 {
            assert_eq!(put(&kv, "a", &format!(r#"{{"v":{n}}}"#), None).await.unwrap(), n);
        }
        let metadata = kv.read_metadata(&permit(Action::Read, "a")).await.unwrap();
        assert_eq!((metadata.current, metadata.oldest), (5, 3));
        assert_eq!(metadata.versions.keys().copied().collect::<Vec<_>>(), [3, 4, 5]);
        assert!(matches!(get(&kv, "a", Some(2)).await, Err(KvError::NotFound)));
        for n in 1..=12u64 {
            put(&kv, "by-default", &format!(r#"{{"v":{n}}}"#), None).await.unwrap();
        }
        let metadata = kv.read_metadata(&permit(Action::Read, "by-default")).await.unwrap();
        assert_eq!(metadata.versions.len(), 10);
    }

    #[tokio::test]
    async fn listing_shows_folders_and_secrets_and_removal_leaves_nothing() {
        let (_directory, kv) = engine().await;
        for path in ["accounts/db-key", "accounts/deep/er", "web"] {
            put(&kv, path, "{}", None).await.unwrap();
        }
        assert_eq!(kv.list(&permit(Action::List, "")).await.unwrap(), ["accounts/", "web"]);
        assert_eq!(kv.list(&permit(Action::List, "accounts")).await.unwrap(), ["db-key", "deep/"]);
        assert!(matches!(kv.list(&permit(Action::List, "nowhere")).await, Err(KvError::NotFound)));
        kv.delete_metadata(&permit(Action::Delete, "web")).await.unwrap();
        assert!(matches!(get(&kv, "web", None).await, Err(KvError::NotFound)));
        assert!(
            kv.barrier.storage().list("kv/secret/data/1/").await.unwrap().iter().all(|name| name != "web")
        );
        // A secret made again starts at version 1.
        assert_eq!(put(&kv, "web", "{}", Some(0)).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn a_permit_for_reading_does_not_write() {
        let (_directory, kv) = engine().await;
        let outcome = kv.write(&permit(Action::Read, "a"), &raw("{}"), None, NOW).await;
        assert!(matches!(outcome, Err(KvError::NotPermitted)));
        assert!(matches!(kv.list(&permit(Action::Read, "a")).await, Err(KvError::NotPermitted)));
    }

    #[tokio::test]
    async fn settings_out_of_range_are_refused() {
        let (_directory, kv) = engine().await;
        let custom = |key: String, value: String| Settings {
            custom: Some(BTreeMap::from([(key, value)])),
            ..Settings::default()
        };
        let many = Settings {
            custom: Some((0..65).map(|n| (n.to_string(), String::new())).collect()),
            ..Settings::default()
        };
        for bad in [
            Settings { max_versions: Some(1001), ..Settings::default() },
            custom("k".repeat(129), String::new()),
            custom(String::new(), String::new()),
            custom("k".into(), "v".repeat(513)),
            many,
        ] {
            let outcome = kv.write_metadata(&permit(Action::Write, "a"), bad, NOW).await;
            assert!(matches!(outcome, Err(KvError::Invalid(_))));
        }
    }
}
