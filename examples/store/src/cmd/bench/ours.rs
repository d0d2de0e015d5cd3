//! This store: three nodes, its rows in two splits that two nodes lead.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use store_client::{Client, Error, Kind, Moment, Row, Txn, proto::SplitInfo};
use tokio::{sync::watch, task::JoinSet, time::sleep};

use super::load::{CLIENTS_A_CONNECTION, ROWS, System, Work, value};
use crate::cmd::{
    free_addresses,
    torture::{
        cluster::{Cluster, Place},
        random::Random,
        rows::sorted,
    },
};

/// How long nodes have to start, and a split to have a leader again.
const START: Duration = Duration::from_secs(30);
/// Rows that are written in one transaction at first.
const LOAD_ROWS: u64 = 500;
/// An attempt that was ended by another is followed by so many more.
const ATTEMPTS_MAX: u32 = 100;
/// How old a stale read may be.
const STALE: Duration = Duration::from_secs(10);
/// What a dead node answered may still come in for so long.
const LAST_WORDS: Duration = Duration::from_millis(20);
/// Between two deaths, for the node to catch up with what it missed.
const CATCH_UP: Duration = Duration::from_secs(4);

/// Three nodes of the bench's own, on loopback.
#[derive(Debug)]
pub(crate) struct Ours {
    cluster: Cluster,
    pub(crate) rows: Arc<Rows>,
}

/// Rows in a store, and those who ask for them.
#[derive(Debug)]
pub(crate) struct Rows(Vec<Client>);

/// How long commits waited for their timestamps to pass.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waited {
    all: u64,
    hidden: u64,
}

impl Waited {
    /// What came on top of `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self { all: self.all.saturating_sub(before.all), hidden: self.hidden.saturating_sub(before.hidden) }
    }

    /// How much of it nobody noticed, because the log replicated meanwhile.
    pub(crate) fn hidden_percent(self) -> Option<u64> {
        self.hidden.saturating_mul(100).checked_div(self.all)
    }

    /// Both together.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self { all: self.all + other.all, hidden: self.hidden + other.hidden }
    }
}

impl Ours {
    /// Starts three nodes in `directory`, fills them with rows, and cuts those in two.
    ///
    /// # Errors
    ///
    /// When they do not serve.
    pub(crate) async fn start(
        directory: &Path,
        epsilon: Duration,
        most_clients: usize,
    ) -> anyhow::Result<Self> {
        let place = |(id, address)| Place {
            id,
            address,
            namespace: None,
            state: directory.join(format!("node-{id}")),
            environment: Vec::new(),
            first: true,
        };
        let cluster = Cluster::new((1..).zip(free_addresses(3)?).map(place).collect(), epsilon)?;
        cluster.start_first()?;
        let rows = Rows::make(&cluster.addresses(), most_clients).await;
        if let (Err(_), Some(death)) = (&rows, cluster.deaths().first()) {
            bail!("node {} died at once: {}", death.node, death.why);
        }
        Ok(Self { cluster, rows: Arc::new(rows?) })
    }

    /// How long commits waited so far, on all nodes.
    ///
    /// # Errors
    ///
    /// When a node does not say.
    pub(crate) async fn waited(&self) -> anyhow::Result<Waited> {
        let mut waited = Waited::default();
        for address in self.cluster.addresses() {
            let status = self.rows.client(0)?.status(&address).await?;
            waited = waited.plus(Waited { all: status.commit_wait, hidden: status.commit_wait_hidden });
        }
        Ok(waited)
    }

    /// Copies what the nodes said into `directory`, made if it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub(crate) fn leave_logs(&self, directory: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("{} cannot be made", directory.display()))?;
        for log in self.cluster.logs() {
            let to = directory.join(log.file_name().unwrap_or_default());
            std::fs::copy(&log, &to).with_context(|| format!("{} cannot be written", to.display()))?;
        }
        Ok(())
    }

    /// Kills the leader of a split that is written to, and gives how long it was until a commit was acknowledged.
    ///
    /// # Errors
    ///
    /// When none is within half a minute.
    pub(crate) async fn recover(&self) -> anyhow::Result<Duration> {
        let (tell, mut told) = watch::channel((Instant::now(), Instant::now()));
        let client = Client::connect(self.cluster.addresses())?;
        let mut writer = JoinSet::new();
        writer.spawn(async move {
            let mut random = Random::new(2, 2);
            loop {
                let began = Instant::now();
                if write(&client, 0, &mut random).await.is_ok() && tell.send((began, Instant::now())).is_err()
                {
                    return;
                }
            }
        });
        sleep(Duration::from_millis(500)).await;
        let leader = self.leader().await?;
        let died = Instant::now();
        self.cluster.kill(leader)?;
        let counts = |(began, ended): &(Instant, Instant)| *began >= died || *ended >= died + LAST_WORDS;
        let first = tokio::time::timeout(START, told.wait_for(counts)).await;
        let (_, acknowledged) =
            *first.context("no commit was acknowledged any more")?.context("no client")?;
        writer.shutdown().await;
        self.cluster.start(leader)?;
        sleep(CATCH_UP).await;
        Ok(acknowledged.duration_since(died))
    }

    /// Who leads the split of the first row.
    async fn leader(&self) -> anyhow::Result<u64> {
        let place = sorted("rows/0");
        let splits = self.rows.client(0)?.splits().await?.splits;
        let has =
            |split: &SplitInfo| split.start <= place && split.end.as_ref().is_none_or(|end| place < *end);
        let split = splits.iter().find(|split| has(split) && split.leader != 0);
        split.map(|split| split.leader).context("nobody leads the split of the first row")
    }
}

impl Rows {
    /// Fills a store that answers at these addresses with rows, and cuts those in two.
    ///
    /// # Errors
    ///
    /// When it does not answer, or has such rows already.
    pub(crate) async fn make(addresses: &[String], most_clients: usize) -> anyhow::Result<Self> {
        let connect = |_| Client::connect(addresses.to_vec());
        let clients = (0..most_clients.div_ceil(CLIENTS_A_CONNECTION).max(1)).map(connect);
        let rows = Self(clients.collect::<Result<_, _>>()?);
        rows.declare().await?;
        rows.load().await?;
        rows.cut().await?;
        Ok(rows)
    }

    async fn declare(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        while let Err(error) = self.client(0)?.create_table("rows", &[("id", Kind::Int)]).await {
            if began.elapsed() > START || matches!(error, Error::Denied(_)) {
                return Err(error).context("the store does not start");
            }
            sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    async fn load(&self) -> anyhow::Result<()> {
        let mut random = Random::new(0, 0);
        for first in (0..ROWS).step_by(usize::try_from(LOAD_ROWS).unwrap_or(1)) {
            let mut txn = self.client(0)?.begin().await?;
            for id in first..first + LOAD_ROWS {
                txn.put(row(id), value(&mut random).into());
            }
            txn.commit().await.context("rows cannot be written")?;
        }
        Ok(())
    }

    /// Cuts the rows in two, and has another node lead the right half: what goes across splits goes across nodes.
    async fn cut(&self) -> anyhow::Result<()> {
        let client = self.client(0)?;
        let last = client.splits().await?.splits.into_iter().last().context("there is no split")?;
        let middle = row(ROWS / 2);
        let right = client.split(last.id, Some(middle)).await.context("the rows cannot be cut in two")?;
        let other = last.nodes.iter().find(|node| **node != last.leader).context("one node only")?;
        client.lead(right, *other).await.context("leadership cannot be handed over")
    }

    fn client(&self, task: usize) -> anyhow::Result<&Client> {
        let index = (task / CLIENTS_A_CONNECTION).min(self.0.len().saturating_sub(1));
        self.0.get(index).context("no client")
    }
}

impl System for Rows {
    async fn once(&self, work: Work, client: usize, random: &mut Random) -> anyhow::Result<()> {
        let client = self.client(client)?;
        let id = random.below(ROWS);
        match work {
            Work::BlindWrite => write(client, id, random).await,
            Work::ReadModifyWrite => transact(client, &[row(id)], true, random).await,
            Work::Transfer => transact(client, &[row(id), row(id + ROWS / 2)], true, random).await,
            Work::StrongRead | Work::Mix => read(client, id, Moment::Now).await,
            Work::StaleRead => read(client, id, Moment::Within(STALE)).await,
        }
    }
}

async fn write(client: &Client, id: u64, random: &mut Random) -> anyhow::Result<()> {
    transact(client, &[row(id)], false, random).await
}

/// Writes rows, read before or not, with the age kept from attempt to attempt.
async fn transact(client: &Client, rows: &[Row], read: bool, random: &mut Random) -> anyhow::Result<()> {
    let value = Bytes::from(value(random));
    let mut txn = client.begin().await?;
    for _ in 1..ATTEMPTS_MAX {
        match attempt(&mut txn, rows, read, &value).await {
            Err(Error::Aborted(_)) => {}
            done => return Ok(done?),
        }
        txn.rollback().await;
        txn = client.begin_again(&txn).await?;
    }
    Ok(attempt(&mut txn, rows, read, &value).await?)
}

async fn attempt(txn: &mut Txn, rows: &[Row], read: bool, value: &Bytes) -> Result<(), Error> {
    if read && txn.read(rows).await?.iter().any(|found| found.value.is_none()) {
        return Err(Error::give_up("a row is missing"));
    }
    for row in rows {
        txn.put(row.clone(), value.clone());
    }
    txn.commit().await.map(drop)
}

async fn read(client: &Client, id: u64, moment: Moment) -> anyhow::Result<()> {
    let shown = client.snapshot_read(&[row(id)], moment).await?;
    let there = shown.rows.first().is_some_and(|found| found.value.is_some());
    if there { Ok(()) } else { Err(anyhow!("a row is missing")) }
}

fn row(id: u64) -> Row {
    Row::new("rows", (id % ROWS).to_string())
}
