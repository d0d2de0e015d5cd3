//! Clients that each run one transaction after another, and what they share.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::bail;
use tokio::task::JoinSet;

use super::{
    clock::ClientClock,
    history::{History, Kind, Outcome},
    random::Random,
    rows::{self, Span},
    session::{Moment, Retry, Session},
    transactions::Plan,
};

/// A transaction that was ended so often is given up: the others go on.
const ATTEMPTS_MAX: u32 = 20;
/// The most that a transfer moves, so that balances stay far from where a sum is not exact.
const AMOUNT_MAX: u64 = 1 << 40;
/// How long the final reads are asked for before the store is called stuck.
const FINAL: Duration = Duration::from_secs(60);

/// What all clients of a run share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// What they write down.
    pub(crate) history: History,
    /// What they go by.
    pub(crate) clock: ClientClock,
    /// The lists that are appended to.
    pub(crate) lists: Lists,
    first_commit: AtomicU64,
    unique: AtomicI64,
    balances: Mutex<HashSet<(String, i64)>>,
    stop: AtomicBool,
}

impl Shared {
    /// Before anything happened.
    pub(crate) fn new(history: History, clock: ClientClock) -> Self {
        Self {
            history,
            clock,
            lists: Lists::default(),
            first_commit: AtomicU64::new(0),
            unique: AtomicI64::new(1),
            balances: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    /// When the first rows were written: before it no snapshot shows the total.
    pub(crate) fn first_commit(&self) -> u64 {
        self.first_commit.load(Ordering::Relaxed)
    }

    /// How many attempts were acknowledged so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.history.counts().values().map(|counts| counts.ok).sum()
    }

    /// A number that no other write has, so that a read says whose value it saw.
    pub(crate) fn unique(&self) -> i64 {
        self.unique.fetch_add(1, Ordering::Relaxed)
    }

    /// New balances after some amount moved, which neither account ever had before.
    pub(crate) fn move_money(
        &self,
        random: &mut Random,
        (from, has): (&str, i64),
        (to, gets): (&str, i64),
    ) -> (i64, i64) {
        let mut used = self.balances.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let amount = i64::try_from(1 + random.below(AMOUNT_MAX)).unwrap_or(1);
            let (less, more) = (has.saturating_sub(amount), gets.saturating_add(amount));
            let (less_name, more_name) = ((from.to_owned(), less), (to.to_owned(), more));
            if !used.contains(&less_name) && !used.contains(&more_name) {
                used.insert(less_name);
                used.insert(more_name);
                return (less, more);
            }
        }
    }

    /// Clients are to stop after the transaction that they are in.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Which list each lane is at.
#[derive(Debug, Default)]
pub(crate) struct Lists {
    appended: [AtomicU64; rows::LANES as usize],
}

impl Lists {
    /// The list to append to next. A lane goes on with a new one when enough was asked for.
    pub(crate) fn next(&self, lane: u64) -> String {
        self.name(lane, |count| count.fetch_add(1, Ordering::Relaxed))
    }

    /// The list that is appended to now.
    pub(crate) fn current(&self, lane: u64) -> String {
        self.name(lane, |count| count.load(Ordering::Relaxed))
    }

    /// Every list that there may be.
    pub(crate) fn all(&self) -> Vec<String> {
        let lanes = (0..rows::LANES).zip(&self.appended);
        let lists = lanes.flat_map(|(lane, count)| {
            let last = count.load(Ordering::Relaxed) / rows::LIST_LENGTH;
            (0..=last).map(move |generation| rows::list(lane, generation))
        });
        lists.collect()
    }

    fn name(&self, lane: u64, count: impl FnOnce(&AtomicU64) -> u64) -> String {
        let lane = lane % rows::LANES;
        let cell = usize::try_from(lane).ok().and_then(|index| self.appended.get(index));
        rows::list(lane, cell.map_or(0, count) / rows::LIST_LENGTH)
    }
}

/// Writes the first rows, in one transaction that is part of the history.
///
/// # Errors
///
/// When it is not acknowledged: nothing is broken yet, so then nothing works.
pub(crate) async fn set_up(session: &Session, shared: &Shared) -> anyhow::Result<()> {
    let mut last = String::new();
    for _ in 0..ATTEMPTS_MAX {
        let attempt = shared.history.begin(0, "set up", Kind::ReadWrite);
        let mut random = Random::new(0, 0);
        let mut tx = session.begin(attempt, &mut random, None).await;
        for account in rows::accounts() {
            tx.write(&account, Some(rows::BALANCE));
        }
        let (attempt, outcome, _) = tx.end(Ok(())).await;
        shared.history.end(attempt, &outcome);
        match outcome {
            Outcome::Ok(at) => {
                shared.first_commit.store(at, Ordering::Relaxed);
                return Ok(());
            }
            Outcome::Fail(reason) => last = reason,
            Outcome::Unknown(reason) => bail!("nobody knows whether the first rows were written: {reason}"),
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    bail!("the first rows were not written: {last}")
}

/// Runs clients until they are told to stop.
///
/// # Errors
///
/// When an address is none.
pub(crate) fn run(
    addresses: &[String],
    shared: &Arc<Shared>,
    clients: u64,
    seed: u64,
) -> anyhow::Result<JoinSet<()>> {
    let mut tasks = JoinSet::new();
    for process in 1..=clients {
        let mut random = Random::new(seed, 1000 + process);
        let session = Session::connect(addresses, random.next())?;
        let shared = Arc::clone(shared);
        tasks.spawn(async move { client(process, &session, &shared, random).await });
    }
    Ok(tasks)
}

async fn client(process: u64, session: &Session, shared: &Shared, mut random: Random) {
    while !shared.stopped() {
        let plan = Plan::draw(&mut random, shared);
        let acknowledged = match &plan {
            Plan::Snapshot { .. } | Plan::SnapshotScan { .. } => {
                snapshot(process, session, shared, &plan).await
            }
            _ => transaction(process, session, shared, &plan, &mut random).await,
        };
        if !acknowledged {
            // A store that refuses everything at once must not make a history of refusals only.
            tokio::time::sleep(random.duration(Duration::from_millis(5), Duration::from_millis(50))).await;
        }
    }
}

async fn transaction(
    process: u64,
    session: &Session,
    shared: &Shared,
    plan: &Plan,
    random: &mut Random,
) -> bool {
    let mut retry = None;
    for _ in 0..ATTEMPTS_MAX {
        let attempt = shared.history.begin(process, plan.name(), plan.kind());
        let mut tx = session.begin(attempt, random, retry.take()).await;
        let done = plan.attempt(&mut tx, shared).await;
        let (attempt, outcome, next) = tx.end(done).await;
        shared.history.end(attempt, &outcome);
        match (outcome, next) {
            (Outcome::Ok(_), _) => return true,
            (Outcome::Unknown(_), _) | (_, Retry::Never) => return false,
            (_, Retry::WithAge(age)) if !shared.stopped() => retry = age,
            _ => return false,
        }
        tokio::time::sleep(random.duration(Duration::ZERO, Duration::from_millis(10))).await;
    }
    false
}

async fn snapshot(process: u64, session: &Session, shared: &Shared, plan: &Plan) -> bool {
    let attempt = shared.history.begin(process, plan.name(), plan.kind());
    let (attempt, outcome) = match plan {
        Plan::Snapshot { moment, names } => session.snapshot(attempt, names, *moment).await,
        Plan::SnapshotScan { moment, span } => session.snapshot_scan(attempt, span, *moment).await,
        _ => return false,
    };
    shared.history.end(attempt, &outcome);
    matches!(outcome, Outcome::Ok(_))
}

/// Reads everything, once all is healed: what was acknowledged must be there.
///
/// # Errors
///
/// When that does not work for a minute.
pub(crate) async fn read_everything(session: &Session, shared: &Shared) -> anyhow::Result<()> {
    let mut names = rows::accounts();
    names.extend(shared.lists.all());
    names.extend((0..rows::PAIRS).flat_map(|pair| ['a', 'b'].map(|side| rows::pair(pair, side))));
    names.extend((0..rows::ITEMS).map(rows::item).flat_map(|item| [rows::mark(&item), item]));
    names.extend((0..rows::REGISTERS).map(rows::register));
    let everything = Plan::Snapshot { moment: Moment::Now, names };
    let items = Plan::SnapshotScan { moment: Moment::Now, span: Span::table("item") };
    let began = Instant::now();
    for plan in [everything, items] {
        while !snapshot(0, session, shared, &plan).await {
            if began.elapsed() > FINAL {
                bail!("{} s after all was healed no snapshot of all rows can be read", FINAL.as_secs());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_go_on_with_new_lists() {
        let lists = Lists::default();
        let names: HashSet<_> = (0..rows::LIST_LENGTH * 2 + 1).map(|_| lists.next(3)).collect();
        assert_eq!(names.len(), 3);
        assert!(names.iter().all(|name| lists.all().contains(name)));
        assert!(names.contains(&lists.current(3 + rows::LANES)));
    }

    #[test]
    fn money_that_moves_is_neither_made_nor_lost_and_no_balance_repeats() {
        let directory = tempfile::tempdir().unwrap();
        let clock = ClientClock::start();
        let shared = Shared::new(History::create(&directory.path().join("h"), clock).unwrap(), clock);
        let mut random = Random::new(1, 1);
        let mut seen = HashSet::new();
        for _ in 0..1000 {
            let (less, more) = shared.move_money(&mut random, ("a", 1000), ("b", 10));
            assert_eq!(less + more, 1010);
            assert!(seen.insert(less));
        }
    }
}
