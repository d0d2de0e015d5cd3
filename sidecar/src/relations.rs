//! What is true of the service's objects, where its map says `relations = "store"`: a copy that control keeps up to date,
//! and that is believed only as long as it is known to be young.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use http::{HeaderMap, HeaderName};
use identity::clock::SharedClock;
use policy::{Attributes, Mapped, Refusal, RelationsCopy, RelationsToken};
use tokio::sync::watch;

/// What whoever has written, or has heard of a write, says with a request: nothing older is to be decided by. It is passed
/// on to the app, which may pass it on.
pub(crate) static TOKEN: HeaderName = HeaderName::from_static("palisade-relations-token");

/// The copy is older than it may be, or there is none.
const STALE: &str = "relations.stale";
/// The copy has not come to a token's revision in time.
const BEHIND: &str = "relations.behind";
/// A token is none, or of another store.
const WRONG_TOKEN: &str = "relations.token";

/// Longest wait for a token's revision. A change takes milliseconds; who waits longer waits for what does not come.
const MAX_WAIT: Duration = Duration::from_secs(1);

/// A service's relations, as far as they are known here.
#[derive(Debug)]
pub struct Relations {
    state: RwLock<State>,
    /// Changes with every update.
    changed: watch::Sender<()>,
    wanted: watch::Sender<bool>,
    clock: SharedClock,
}

#[derive(Debug, Default)]
struct State {
    copy: RelationsCopy,
    /// Everything that was acknowledged to writers before this is in the copy.
    as_of: Option<Duration>,
}

/// A copy as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) objects: usize,
    pub(crate) revision: u64,
    /// `None` where it is not known.
    pub(crate) age: Option<Duration>,
}

/// Where a copy is beside a token.
enum Place {
    Reached,
    Behind,
    /// It is of this other store.
    Elsewhere(String),
}

impl Relations {
    pub(crate) fn new(clock: SharedClock) -> Self {
        Self {
            state: RwLock::default(),
            changed: watch::Sender::new(()),
            wanted: watch::Sender::new(false),
            clock,
        }
    }

    /// Whether the policy in force asks for them, now and at every change.
    pub fn wanted(&self) -> watch::Receiver<bool> {
        self.wanted.subscribe()
    }

    /// The policy in force asks for them, or no longer.
    pub(crate) fn want(&self, wanted: bool) {
        let news = self.wanted.send_replace(wanted) != wanted;
        if news && !wanted {
            *self.state.write().unwrap_or_else(PoisonError::into_inner) = State::default();
        }
    }

    /// Takes changes, as [`RelationsCopy::take`] does.
    ///
    /// # Errors
    /// Why not; nothing has changed then.
    pub fn take(
        &self,
        epoch: &str,
        revision: u64,
        after: Option<u64>,
        changed: impl IntoIterator<Item = (String, String, Option<String>)>,
    ) -> Result<(), String> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.copy.take(epoch, revision, after, changed)?;
        drop(state);
        self.changed.send_replace(());
        Ok(())
    }

    /// What is here is all that was acknowledged to writers before this time.
    pub fn as_of(&self, time: Duration) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).as_of = Some(time);
    }

    /// What is true of the request's objects: no older than `max_age`, and than the token that came with the request.
    ///
    /// # Errors
    /// A token that is none, or of another store.
    pub(crate) async fn tell(
        &self,
        max_age: Duration,
        mapped: &Mapped,
        headers: &HeaderMap,
    ) -> Result<Attributes, Refusal> {
        if let Some(token) = token(headers)?
            && let Some(behind) = self.reach(&token).await?
        {
            return Ok(Attributes::unusable_relations(BEHIND, behind));
        }
        Ok(self.tell_now(max_age, mapped))
    }

    /// What is true of these objects, no older than `max_age`.
    pub(crate) fn tell_now(&self, max_age: Duration, mapped: &Mapped) -> Attributes {
        let state = self.read();
        let age = self.age_of(&state);
        if age.is_none_or(|age| age > max_age) {
            let known = match age {
                Some(age) => format!("are {:.1} s old", age.as_secs_f64()),
                None => "are of no known age".to_owned(),
            };
            let reason = format!(
                "control has not been heard, and the relations {known}; relations_max_age is {}",
                humantime::format_duration(max_age)
            );
            return Attributes::unusable_relations(STALE, reason);
        }
        state.copy.tell(mapped)
    }

    /// What was last heard of these objects, however long ago: that control is away ends nothing that has begun.
    pub(crate) fn last_heard(&self, mapped: &Mapped) -> Attributes {
        self.read().copy.tell(mapped)
    }

    /// Changes with every update.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What metrics say of the copy; nothing before it has come.
    pub(crate) fn reading(&self) -> Option<Reading> {
        let state = self.read();
        let (_, revision) = state.copy.known()?;
        Some(Reading { objects: state.copy.len(), revision, age: self.age_of(&state) })
    }

    /// A clock that was set back tells no age: until the next answer the copy is too old.
    fn age_of(&self, state: &State) -> Option<Duration> {
        state.as_of.and_then(|as_of| self.clock.now().checked_sub(as_of))
    }

    /// Waits until the copy has come to the token's revision; says where it is if it does not.
    async fn reach(&self, token: &RelationsToken) -> Result<Option<String>, Refusal> {
        let mut changed = self.changed.subscribe();
        let mut enough = self.clock.sleep(MAX_WAIT);
        loop {
            match self.place(token) {
                Place::Reached => return Ok(None),
                Place::Elsewhere(epoch) => {
                    let reason =
                        format!("the token is of the store {}, and this one is {epoch}", token.epoch());
                    return Err(Refusal::denied(WRONG_TOKEN, reason));
                }
                Place::Behind => {}
            }
            tokio::select! {
                // The sender is this very copy's.
                changed = changed.changed() => if changed.is_err() { break },
                () = &mut enough => break,
            }
        }
        let at = self
            .read()
            .copy
            .known()
            .map_or_else(|| "have not come".to_owned(), |(_, at)| format!("are at {at}"));
        Ok(Some(format!("the relations {at}, and the request needs those of revision {}", token.revision())))
    }

    fn place(&self, token: &RelationsToken) -> Place {
        match self.read().copy.known() {
            Some((epoch, _)) if epoch != token.epoch() => Place::Elsewhere(epoch.to_owned()),
            Some((_, revision)) if revision >= token.revision() => Place::Reached,
            _ => Place::Behind,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The token of a request, if it has one.
fn token(headers: &HeaderMap) -> Result<Option<RelationsToken>, Refusal> {
    let mut values = headers.get_all(&TOKEN).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Refusal::malformed(WRONG_TOKEN, "there are two tokens of relations"));
    }
    let token = value.to_str().ok().and_then(|text| text.parse().ok());
    let refusal = || Refusal::malformed(WRONG_TOKEN, policy::TokenError.to_string());
    token.map(Some).ok_or_else(refusal)
}

#[cfg(test)]
#[path = "relations_tests.rs"]
mod tests;
