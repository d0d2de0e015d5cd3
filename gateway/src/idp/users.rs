//! The users' file, and checking passwords without giving anything away.
//!
//! ```toml
//! [[user]]
//! name = "alice"
//! password = "$argon2id$v=19$m=19456,t=2,p=1$…"
//! display_name = "Alice Liddell"
//! groups = ["customers"]
//! ```

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher as _, PasswordVerifier as _};
use ring::rand::SecureRandom;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::Semaphore;

/// Largest users' file read.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Password checks at once: each takes a core and about 19 MiB for tens of milliseconds.
const CONCURRENT_CHECKS: usize = 2;
/// Checks that may wait for one of those; more are refused rather than queued for seconds.
const WAITING_CHECKS: usize = 32;
/// Longest password looked at: argon2 hashes any length, and a long one costs only the sender.
const MAX_PASSWORD_BYTES: usize = 1024;
/// Bounds on the parameters in the file: a hash of gigabytes would stop the server at its first login.
const MAX_MEMORY_KIB: u32 = 256 * 1024;
const MAX_PASSES: u32 = 16;
const SALT_BYTES: usize = 16;

/// One user, as the file has it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// The name typed at login, and `sub` in tokens.
    pub name: String,
    /// An argon2id hash in PHC form, see [`hash_password`].
    pub password: String,
    /// `name` in ID tokens.
    #[serde(default)]
    pub display_name: String,
    /// `groups` in tokens.
    #[serde(default)]
    pub groups: Vec<String>,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User").field("name", &self.name).field("groups", &self.groups).finish_non_exhaustive()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    user: Vec<User>,
}

/// Why a users' file cannot be used.
#[derive(Debug, Error)]
pub enum UsersError {
    /// Not readable.
    #[error("cannot read the users' file {path}: {cause}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        cause: std::io::Error,
    },
    /// Not TOML of the right shape.
    #[error("the users' file {path} is not understood: {cause}")]
    Toml {
        /// Which.
        path: String,
        /// Where and why.
        cause: Box<toml::de::Error>,
    },
    /// No user in it, or too large.
    #[error("the users' file {0} holds no user, or is larger than {MAX_FILE_BYTES} bytes")]
    Size(String),
    /// A user's entry is wrong.
    #[error("the user {name:?} in the users' file: {flaw}")]
    User {
        /// Whose.
        name: String,
        /// What is wrong.
        flaw: &'static str,
    },
}

/// A password cannot be hashed: no randomness.
#[derive(Debug, Clone, Copy, Error)]
#[error("the password cannot be hashed")]
pub struct HashError;

/// Hashes a password for the users' file: argon2id, 19 MiB, two passes (the OWASP minimum).
pub fn hash_password(password: &SecretString, random: &dyn SecureRandom) -> Result<String, HashError> {
    let mut salt = [0; SALT_BYTES];
    random.fill(&mut salt).map_err(|_| HashError)?;
    let hash = Argon2::default()
        .hash_password_with_salt(password.expose_secret().as_bytes(), &salt)
        .map_err(|_| HashError)?;
    Ok(hash.to_string())
}

/// The text of a users' file.
pub fn to_toml(users: Vec<User>) -> Result<String, toml::ser::Error> {
    toml::to_string(&File { user: users })
}

/// All users, checked.
#[derive(Debug)]
pub struct Users(HashMap<String, (Arc<User>, PasswordHash)>);

impl Users {
    /// Reads and checks a users' file.
    pub fn read(path: &Path) -> Result<Self, UsersError> {
        let name = path.display().to_string();
        let read = |cause| UsersError::Read { path: name.clone(), cause };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE_BYTES {
            return Err(UsersError::Size(name));
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, &name)
    }

    fn parse(text: &str, path: &str) -> Result<Self, UsersError> {
        let file: File = toml::from_str(text)
            .map_err(|cause| UsersError::Toml { path: path.to_owned(), cause: Box::new(cause) })?;
        if file.user.is_empty() {
            return Err(UsersError::Size(path.to_owned()));
        }
        let mut users = HashMap::with_capacity(file.user.len());
        for user in file.user {
            let flaw = |flaw| UsersError::User { name: user.name.clone(), flaw };
            let named = !user.name.is_empty() && user.name.bytes().all(|byte| matches!(byte, 0x21..=0x7e));
            if !named || user.name.len() > 128 {
                return Err(flaw("a name is 1 to 128 printable ASCII characters without spaces"));
            }
            let hash =
                PasswordHash::new(&user.password).map_err(|_| flaw("the password is not a PHC hash"))?;
            check_parameters(&hash).map_err(flaw)?;
            let name = user.name.clone();
            if users.insert(name.clone(), (Arc::new(user), hash)).is_some() {
                return Err(UsersError::User { name, flaw: "there twice" });
            }
        }
        Ok(Self(users))
    }
}

fn check_parameters(hash: &PasswordHash) -> Result<(), &'static str> {
    if Algorithm::try_from(hash.algorithm.as_str()) != Ok(Algorithm::Argon2id) {
        return Err("the password's hash is not argon2id");
    }
    let parameters = Params::try_from(hash).map_err(|_| "the hash's parameters are wrong")?;
    let bounded = parameters.m_cost() <= MAX_MEMORY_KIB && parameters.t_cost() <= MAX_PASSES;
    if bounded { Ok(()) } else { Err("the hash would take too much memory or time") }
}

/// The outcome of a password check.
#[derive(Debug)]
pub(super) enum Checked {
    /// The name and password fit.
    User(Arc<User>),
    /// They do not; nobody learns which of the two.
    Wrong,
    /// Too many checks wait already.
    Busy,
}

/// Checks passwords, a few at a time.
#[derive(Debug)]
pub(super) struct Passwords {
    users: Arc<Users>,
    running: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Passwords {
    pub(super) fn new(users: Users) -> Self {
        Self {
            users: Arc::new(users),
            running: Arc::new(Semaphore::new(CONCURRENT_CHECKS)),
            waiting: Arc::new(Semaphore::new(CONCURRENT_CHECKS + WAITING_CHECKS)),
        }
    }

    /// What is said about a user that a token or session names.
    pub(super) fn user(&self, name: &str) -> Option<&Arc<User>> {
        self.users.0.get(name).map(|(user, _)| user)
    }

    /// Checks a password. An unknown name costs the same work as a known one.
    pub(super) async fn check(&self, name: &str, password: &str) -> Checked {
        let Ok(_place) = Arc::clone(&self.waiting).try_acquire_owned() else { return Checked::Busy };
        let Ok(turn) = Arc::clone(&self.running).acquire_owned().await else { return Checked::Busy };
        let users = Arc::clone(&self.users);
        let (name, password) = (name.to_owned(), SecretString::from(password.to_owned()));
        let checked = tokio::task::spawn_blocking(move || {
            // The turn ends when the work does, even if the one who asked is gone by then.
            let _turn = turn;
            users.check(&name, &password)
        });
        checked.await.ok().flatten().map_or(Checked::Wrong, Checked::User)
    }
}

impl Users {
    fn check(&self, name: &str, password: &SecretString) -> Option<Arc<User>> {
        let known = self.0.get(name);
        // Somebody's hash stands in for the missing one, so that both answers take as long.
        let (_, hash) = known.or_else(|| self.0.values().next())?;
        let password = password.expose_secret().as_bytes();
        let fits = Argon2::default().verify_password(password, hash).is_ok();
        let plausible = !password.is_empty() && password.len() <= MAX_PASSWORD_BYTES;
        known.filter(|_| fits && plausible).map(|(user, _)| Arc::clone(user))
    }
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;

    use super::*;

    fn file(password: &str) -> String {
        let user = |name: &str| User {
            name: name.into(),
            password: hash_password(&password.to_owned().into(), &SystemRandom::new()).unwrap(),
            display_name: "A".into(),
            groups: vec!["customers".into()],
        };
        to_toml(vec![user("alice"), user("bob")]).unwrap()
    }

    #[tokio::test]
    async fn only_the_right_password_of_a_known_user_passes() {
        let passwords = Passwords::new(Users::parse(&file("correct horse"), "f").unwrap());
        assert!(
            matches!(passwords.check("alice", "correct horse").await, Checked::User(user) if user.name == "alice")
        );
        for (name, password) in [
            ("alice", "wrong"),
            ("alice", ""),
            ("carol", "correct horse"),
            ("", ""),
            ("Alice", "correct horse"),
        ] {
            assert!(matches!(passwords.check(name, password).await, Checked::Wrong), "{name} {password}");
        }
    }

    #[tokio::test]
    async fn checks_that_would_wait_too_long_are_refused() {
        let passwords = Passwords::new(Users::parse(&file("x"), "f").unwrap());
        let all = u32::try_from(CONCURRENT_CHECKS + WAITING_CHECKS).unwrap();
        let held = passwords.waiting.try_acquire_many(all).unwrap();
        assert!(matches!(passwords.check("alice", "x").await, Checked::Busy));
        drop(held);
        assert!(matches!(passwords.check("alice", "x").await, Checked::User(_)));
    }

    #[test]
    fn a_malformed_file_is_an_error_that_names_the_flaw() {
        let good = file("x");
        assert!(Users::parse(&good, "f").is_ok());
        assert!(matches!(
            Users::parse(&good.replace("display_name", "dispaly_name"), "f"),
            Err(UsersError::Toml { .. })
        ));
        assert!(matches!(Users::parse("user = []", "f"), Err(UsersError::Size(_))));
        assert!(matches!(
            Users::parse(&good.replace("\"bob\"", "\"alice\""), "f"),
            Err(UsersError::User { .. })
        ));
        for (from, to) in
            [("$argon2id$", "$argon2d$"), ("m=19456", "m=4000000"), ("t=2", "t=99"), ("$argon2id$", "plain")]
        {
            assert!(
                matches!(Users::parse(&good.replace(from, to), "f"), Err(UsersError::User { .. })),
                "{to}"
            );
        }
    }
}
