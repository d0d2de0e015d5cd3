//! Rows as they were at one time, without locks.

use std::{collections::BTreeMap, time::Duration};

use futures::future::join_all;

use crate::{
    Client, Error, Found, Moment, Range, Reason, Row,
    client::{Failed, Group, Pace, Store, Target, in_order},
    proto,
    routes::Routes,
    schema::place,
    txn::{next_page, page_limit},
};

/// A node's clock may be behind the one whose moment is asked for by the bounds of both.
const CLOCKS_APART: Duration = Duration::from_millis(2);

/// Rows at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The rows: for a read one for each asked for, in that order; for a scan those that existed, in theirs.
    pub rows: Vec<Found>,
    /// The moment shown, nanoseconds since the Unix epoch.
    pub at: u64,
}

impl Client {
    /// Rows as they all were at one moment, whichever splits they are of.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] for a moment that has not come or is forgotten.
    pub async fn snapshot_read(&self, rows: &[Row], moment: Moment) -> Result<Snapshot, Error> {
        let mut missing = Vec::new();
        let mut places = self.places();
        for (index, row) in rows.iter().enumerate() {
            missing.push((index, places.of(row).await?, row));
        }
        let mut shown = Shown { moment, at: None, to_leader: moment == Moment::Now };
        let mut found: Vec<Option<Found>> = rows.iter().map(|_| None).collect();
        let mut pace = self.pace();
        while !missing.is_empty() {
            let (read, failed) = self.snapshot_read_once(&missing, &mut shown, &pace).await;
            for (index, row) in read {
                if let Some(place) = found.get_mut(index) {
                    *place = Some(row);
                }
            }
            missing.retain(|(index, ..)| found.get(*index).is_some_and(Option::is_none));
            if let Some(failed) = failed {
                self.snapshot_pause(&mut pace, &mut shown, failed).await?;
            }
        }
        Ok(Snapshot { rows: in_order(found)?, at: shown.at.unwrap_or_default() })
    }

    /// Asks one node, and all others together once it is known which moment to ask them for.
    async fn snapshot_read_once(
        &self,
        missing: &[(usize, Vec<u8>, &Row)],
        shown: &mut Shown,
        pace: &Pace,
    ) -> (Vec<(usize, Found)>, Option<Failed>) {
        let mut groups: BTreeMap<String, Group<'_>> = BTreeMap::new();
        let (routes, turn) = (self.routes(), self.turn());
        for (index, place, row) in missing {
            match self.snapshot_target(place, shown, &routes, turn, pace).await {
                Ok(Target { splits, address }) => {
                    let group = groups.entry(address).or_default();
                    group.splits.extend(splits);
                    group.rows.push((*index, row));
                }
                Err(why) => return (Vec::new(), Some(why)),
            }
        }
        if shown.at.is_none() {
            while groups.len() > 1 {
                groups.pop_last();
            }
        }
        let moment = shown.moment();
        let asked = groups.into_iter().map(|(address, mut group)| {
            group.splits.dedup();
            let request = proto::SnapshotReadRequest {
                rows: group.rows.iter().map(|(_, row)| (*row).clone().into()).collect(),
                moment: Some(moment.into()),
            };
            async move {
                let send = |mut node: Store, request| async move { node.snapshot_read(request).await };
                let answer = self.ask(pace, &address, request, send).await;
                let read = answer.and_then(|answer| Ok((answer.read_timestamp, group.found(answer.rows)?)));
                read.map_err(|fault| (fault, Some(Target { splits: group.splits, address })))
            }
        });
        let mut read = Vec::new();
        let mut failed = None;
        for answer in join_all(asked).await {
            match answer {
                Ok((at, rows)) => {
                    shown.at.get_or_insert(at);
                    read.extend(rows);
                }
                Err(why) => failed = Some(why),
            }
        }
        (read, failed)
    }

    /// The first `limit` rows of a range that existed at one moment.
    ///
    /// # Errors
    ///
    /// As [`Client::snapshot_read`].
    pub async fn snapshot_scan(&self, range: Range, moment: Moment, limit: usize) -> Result<Snapshot, Error> {
        let table = self.table(&range.table).await?;
        let (mut start, _) = table.bounds(&range)?;
        let mut range = range;
        let mut shown = Shown { moment, at: None, to_leader: moment == Moment::Now };
        let mut rows: Vec<Found> = Vec::new();
        let mut pace = self.pace();
        loop {
            let place = place(table.name(), &start);
            let left = limit.saturating_sub(rows.len());
            let page = match self.snapshot_scan_once(&place, &range, left, &shown, &pace).await {
                Ok(page) => page,
                Err(failed) => {
                    self.snapshot_pause(&mut pace, &mut shown, failed).await?;
                    continue;
                }
            };
            pace = self.pace();
            shown.at.get_or_insert(page.read_timestamp);
            rows.extend(page.rows.into_iter().take(left).map(Found::from));
            match page.next {
                Some(next) if rows.len() < limit => {
                    start = next_page(&table, &start, &next)?;
                    range.from = next;
                }
                _ => return Ok(Snapshot { rows, at: shown.at.unwrap_or_default() }),
            }
        }
    }

    async fn snapshot_scan_once(
        &self,
        place: &[u8],
        range: &Range,
        limit: usize,
        shown: &Shown,
        pace: &Pace,
    ) -> Result<proto::SnapshotScanResponse, Failed> {
        let target = self.snapshot_target(place, shown, &self.routes(), self.turn(), pace).await?;
        let request = proto::SnapshotScanRequest {
            range: Some(range.clone().into()),
            moment: Some(shown.moment().into()),
            limit: page_limit(limit),
        };
        let send = |mut node: Store, request| async move { node.snapshot_scan(request).await };
        self.ask(pace, &target.address, request, send).await.map_err(|fault| (fault, Some(target)))
    }

    /// Any replica can show what is past; what was committed up to now only the leader knows.
    async fn snapshot_target(
        &self,
        place: &[u8],
        shown: &Shown,
        routes: &Routes,
        turn: usize,
        pace: &Pace,
    ) -> Result<Target, Failed> {
        if !shown.to_leader
            && let Some(route) = routes.at(place)
            && let Some(address) = routes.replicas(route, turn).find(|address| !self.is_suspect(address))
        {
            return Ok(Target { splits: vec![route.split], address: address.to_owned() });
        }
        self.leader_by(routes, turn, place, pace).await
    }

    async fn snapshot_pause(
        &self,
        pace: &mut Pace,
        shown: &mut Shown,
        (mut fault, target): Failed,
    ) -> Result<(), Error> {
        // A moment that one node has shown is near for all others.
        if fault.error.reason() == Some(Reason::Future) && shown.at.is_some() {
            tokio::time::sleep(CLOCKS_APART).await;
            fault.again = true;
            return self.pause(pace, (fault, target)).await;
        }
        if fault.again && !shown.to_leader {
            shown.to_leader = true;
            return Ok(());
        }
        self.pause(pace, (fault, target)).await
    }
}

/// Which moment was asked for, and which came.
#[derive(Clone, Copy, Debug)]
struct Shown {
    moment: Moment,
    at: Option<u64>,
    /// A replica could not show it.
    to_leader: bool,
}

impl Shown {
    fn moment(&self) -> Moment {
        self.at.map_or(self.moment, Moment::At)
    }
}
