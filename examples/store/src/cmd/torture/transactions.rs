//! What the clients do, each chosen for a way in which a store can be wrong.

use serde_json::Value;

use super::{
    history::Kind,
    random::Random,
    rows::{self, Span},
    session::{Moment, Stop, Tx},
    workload::Shared,
};

/// A transaction, with everything that chance decides about it: attempts of one are about the same rows.
#[derive(Clone, Debug)]
pub(crate) enum Plan {
    /// Moves money: sums that change, and halves of commits across splits.
    Transfer {
        /// Away from.
        from: String,
        /// To.
        to: String,
        /// Both rows in one request.
        together: bool,
    },
    /// Appends to lists: lost updates, and orders that readers disagree about.
    Append {
        /// To which.
        lanes: Vec<u64>,
    },
    /// Reads both of a pair and writes one: write skew.
    Skew {
        /// Which pair.
        pair: u64,
        /// The side to write.
        side: char,
    },
    /// Scans a range, then makes or deletes a row in it: phantoms.
    Phantom {
        /// Of items.
        first: u64,
    },
    /// Writes without reading.
    Blind {
        /// Which registers.
        registers: Vec<u64>,
    },
    /// Sums up all accounts under locks.
    LockedAudit,
    /// Takes locks and is never heard of again.
    Vanish {
        /// On this account.
        account: u64,
    },
    /// Reads rows as they were at one moment.
    Snapshot {
        /// Which moment.
        moment: Moment,
        /// Which rows.
        names: Vec<String>,
    },
    /// Reads a range as it was at one moment.
    SnapshotScan {
        /// Which moment.
        moment: Moment,
        /// Which range.
        span: Span,
    },
}

impl Plan {
    /// One that chance decides.
    pub(crate) fn draw(random: &mut Random, shared: &Shared) -> Self {
        match random.below(1000) {
            0..270 => Self::transfer(random),
            270..460 => Self::Append { lanes: (0..=random.below(2)).map(|_| random.next()).collect() },
            460..560 => Self::Skew { pair: random.next(), side: if random.chance(50) { 'a' } else { 'b' } },
            560..660 => Self::Phantom { first: random.next() },
            660..720 => Self::Blind { registers: (0..=random.below(3)).map(|_| random.next()).collect() },
            720..750 => Self::LockedAudit,
            // Rare: everybody younger waits until the store finds it idle.
            750..751 => Self::Vanish { account: random.next() },
            751..870 => {
                Self::Snapshot { moment: Moment::draw(random, shared), names: some_rows(random, shared) }
            }
            _ => Self::SnapshotScan { moment: Moment::draw(random, shared), span: some_span(random) },
        }
    }

    fn transfer(random: &mut Random) -> Self {
        let from = random.below(rows::ACCOUNTS);
        let to = from + 1 + random.below(rows::ACCOUNTS - 1);
        Self::Transfer { from: rows::account(from), to: rows::account(to), together: random.chance(50) }
    }

    /// What it is called in the history and its summary.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Transfer { .. } => "transfer",
            Self::Append { .. } => "append",
            Self::Skew { .. } => "skew",
            Self::Phantom { .. } => "phantom",
            Self::Blind { .. } => "blind",
            Self::LockedAudit => "locked audit",
            Self::Vanish { .. } => "vanish",
            Self::Snapshot { .. } => "snapshot",
            Self::SnapshotScan { .. } => "snapshot scan",
        }
    }

    /// What it promises.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Snapshot { moment, .. } | Self::SnapshotScan { moment, .. } => moment.kind(),
            _ => Kind::ReadWrite,
        }
    }

    /// Does it once, up to the commit.
    pub(crate) async fn attempt(&self, tx: &mut Tx<'_>, shared: &Shared) -> Result<(), Stop> {
        match self {
            Self::Transfer { from, to, together } => transfer(tx, shared, from, to, *together).await,
            Self::Append { lanes } => append(tx, shared, lanes).await,
            Self::Skew { pair, side } => skew(tx, shared, *pair, *side).await,
            Self::Phantom { first } => phantom(tx, shared, *first).await,
            Self::Blind { registers } => {
                for register in registers {
                    tx.write(&rows::register(*register), Some(shared.unique()));
                }
                Ok(())
            }
            Self::LockedAudit => tx.read(&rows::accounts()).await.map(drop),
            Self::Vanish { account } => {
                tx.read(&[rows::account(*account)]).await?;
                Err(Stop::Vanish)
            }
            Self::Snapshot { .. } | Self::SnapshotScan { .. } => Ok(()),
        }
    }
}

fn some_rows(random: &mut Random, shared: &Shared) -> Vec<String> {
    match random.below(3) {
        0 => rows::accounts(),
        1 => {
            let lanes = (0..rows::LANES).map(|lane| shared.lists.current(lane));
            lanes.chain((0..rows::PAIRS).map(|pair| rows::pair(pair, 'a'))).collect()
        }
        _ => {
            let pair = random.next();
            vec![rows::pair(pair, 'a'), rows::pair(pair, 'b'), rows::register(pair), rows::account(pair)]
        }
    }
}

fn some_span(random: &mut Random) -> Span {
    match random.below(4) {
        0 => Span::table("acct"),
        1 => Span::table("pair"),
        2 => Span::table("item"),
        _ => Span::items(random.next()),
    }
}

async fn transfer(
    tx: &mut Tx<'_>,
    shared: &Shared,
    from: &str,
    to: &str,
    together: bool,
) -> Result<(), Stop> {
    let both = [from.to_owned(), to.to_owned()];
    let found = if together {
        tx.read(&both).await?
    } else {
        let mut found = Vec::new();
        for name in both {
            found.extend(tx.read(&[name]).await?);
        }
        found
    };
    let [Some(has), Some(gets)] = [number(found.first()), number(found.get(1))] else {
        return Err(Stop::Wrong(format!("{from} or {to} has no balance: {found:?}")));
    };
    let (less, more) = shared.move_money(tx.random(), (from, has), (to, gets));
    tx.write(from, Some(less));
    tx.write(to, Some(more));
    Ok(())
}

async fn append(tx: &mut Tx<'_>, shared: &Shared, lanes: &[u64]) -> Result<(), Stop> {
    let mut names: Vec<_> = lanes.iter().map(|lane| shared.lists.next(*lane)).collect();
    names.sort();
    names.dedup();
    let found = tx.read(&names).await?;
    for (name, before) in names.iter().zip(found) {
        let mut elements = list(&before);
        let element = shared.unique();
        elements.push(element);
        tx.append(name, element, &elements);
    }
    Ok(())
}

/// A side is on while its value is positive, and one of the two is always to be on. The checker does not care for the
/// meaning: it sees that two transactions read both and wrote one each.
async fn skew(tx: &mut Tx<'_>, shared: &Shared, pair: u64, side: char) -> Result<(), Stop> {
    let found = tx.read(&[rows::pair(pair, 'a'), rows::pair(pair, 'b')]).await?;
    let both_on = found.iter().all(|value| number(Some(value)).is_none_or(|value| value > 0));
    let unique = shared.unique();
    tx.write(&rows::pair(pair, side), Some(if both_on { -unique } else { unique }));
    Ok(())
}

async fn phantom(tx: &mut Tx<'_>, shared: &Shared, first: u64) -> Result<(), Stop> {
    let span = Span::items(first);
    let found = tx.scan(&span).await?;
    let first = first % (rows::ITEMS - rows::ITEMS_SCANNED);
    let row = rows::item(first + tx.random().below(rows::ITEMS_SCANNED));
    let mark = rows::mark(&row);
    tx.read(std::slice::from_ref(&mark)).await?;
    // About half of the rows are there at a time, whatever the chances were so far.
    let value = if found.contains_key(&row) { None } else { Some(shared.unique()) };
    tx.write(&row, value);
    tx.write(&mark, Some(shared.unique()));
    Ok(())
}

fn number(value: Option<&Value>) -> Option<i64> {
    value.and_then(Value::as_i64)
}

/// The elements of a list's value, none of which is no list.
pub(crate) fn list(value: &Value) -> Vec<i64> {
    value.as_array().map(|elements| elements.iter().filter_map(Value::as_i64).collect()).unwrap_or_default()
}
