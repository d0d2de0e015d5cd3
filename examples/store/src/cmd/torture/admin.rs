//! Changes of splits while clients work.

use std::time::Duration;

use anyhow::Context;
use store_client::{Client, Row, proto::SplitInfo};
use tokio::time::{Instant, sleep, timeout};

use super::{nemesis::Fault, random::Random, rows};

/// A change that is not done by then is left to itself: the next one comes.
const CHANGE: Duration = Duration::from_secs(15);
/// Before the same is asked for again.
const AGAIN: Duration = Duration::from_millis(200);
/// With more splits than this, one that was to be cut is let be.
const SPLITS_MAX: usize = 14;

/// Who asks for changes.
#[derive(Clone, Debug)]
pub(crate) struct Admin {
    client: Client,
}

impl Admin {
    /// One that asks by `client`.
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Makes a change that chance decides, and says which; nothing if there is none to make.
    ///
    /// # Errors
    ///
    /// When the store refuses it, or does not do it in time.
    pub(crate) async fn change(&self, fault: Fault, random: &mut Random) -> anyhow::Result<Option<String>> {
        let change = async {
            let known = self.client.splits().await?;
            let nodes: Vec<_> = known.nodes.iter().map(|node| node.id).collect();
            match fault {
                Fault::Lead => self.lead(&known.splits, random).await,
                Fault::Split => self.split(&known.splits, random).await,
                Fault::Merge => self.merge(&known.splits, random).await,
                Fault::Move => self.r#move(&known.splits, &nodes, random).await,
                _ => Ok(None),
            }
        };
        timeout(CHANGE, change).await.context("not done in time")?
    }

    async fn lead(&self, splits: &[SplitInfo], random: &mut Random) -> anyhow::Result<Option<String>> {
        let Some(split) = random.pick(splits) else { return Ok(None) };
        let others: Vec<_> = split.nodes.iter().filter(|node| **node != split.leader).collect();
        let Some(node) = random.pick(&others) else { return Ok(None) };
        self.client.lead(split.id, **node).await?;
        Ok(Some(format!("split {} is led by node {node}", split.id)))
    }

    async fn split(&self, splits: &[SplitInfo], random: &mut Random) -> anyhow::Result<Option<String>> {
        if splits.len() >= SPLITS_MAX {
            return Ok(None);
        }
        let row = some_row(random);
        self.split_at(splits, &row).await
    }

    /// Cuts where this row is.
    async fn split_at(&self, splits: &[SplitInfo], name: &str) -> anyhow::Result<Option<String>> {
        let place = rows::sorted(name);
        let has =
            |split: &&SplitInfo| split.start <= place && split.end.as_ref().is_none_or(|end| place < *end);
        let Some(split) = splits.iter().find(has).filter(|split| split.start != place) else {
            return Ok(None);
        };
        let (table, key) = rows::table_and_key(name);
        let right = self.client.split(split.id, Some(Row::new(table, key))).await?;
        Ok(Some(format!("split {} is cut at {name}: split {right}", split.id)))
    }

    /// Cuts at each of these rows, so that transactions go across splits from the start.
    ///
    /// # Errors
    ///
    /// When the store does not do it.
    pub(crate) async fn cut_at(&self, names: &[String]) -> anyhow::Result<()> {
        for name in names {
            let began = Instant::now();
            loop {
                // Whoever is asked may not have heard of the cut before this one.
                let known = self.client.splits().await?;
                match self.split_at(&known.splits, name).await {
                    Ok(_) => break,
                    Err(error) if began.elapsed() > CHANGE => {
                        return Err(error).with_context(|| format!("a split cannot be cut at {name}"));
                    }
                    Err(_) => sleep(AGAIN).await,
                }
            }
        }
        Ok(())
    }

    async fn merge(&self, splits: &[SplitInfo], random: &mut Random) -> anyhow::Result<Option<String>> {
        let lefts = splits.len().checked_sub(1).and_then(|count| splits.get(..count)).unwrap_or_default();
        let Some(left) = random.pick(lefts) else { return Ok(None) };
        self.client.merge(left.id).await?;
        Ok(Some(format!("split {} takes in its neighbour", left.id)))
    }

    async fn r#move(
        &self,
        splits: &[SplitInfo],
        nodes: &[u64],
        random: &mut Random,
    ) -> anyhow::Result<Option<String>> {
        let Some(split) = random.pick(splits) else { return Ok(None) };
        let free: Vec<_> = nodes.iter().filter(|node| !split.nodes.contains(node)).collect();
        let (Some(from), Some(to)) = (random.pick(&split.nodes), random.pick(&free)) else { return Ok(None) };
        self.client.move_replica(split.id, *from, **to).await?;
        Ok(Some(format!("split {} moves from node {from} to node {to}", split.id)))
    }
}

fn some_row(random: &mut Random) -> String {
    match random.below(5) {
        0 => rows::account(random.next()),
        1 => rows::list(random.next(), 0),
        2 => rows::pair(random.next(), 'b'),
        3 => rows::item(random.next()),
        _ => rows::register(random.next()),
    }
}
