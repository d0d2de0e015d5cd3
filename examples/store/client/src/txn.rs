//! One attempt of a transaction.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use futures::future::join_all;
use tokio::time::Instant;

use crate::{
    Client, Error, Found, Range, Row,
    client::{Failed, Group, Pace, Store, Target, in_order},
    proto,
    schema::{place, sorted},
};

/// Rows of one scan request.
const PAGE_ROWS: usize = 1000;

/// An attempt's name, which a commit can be asked about by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TxnId {
    /// When the attempt began, nanoseconds since the Unix epoch.
    pub started: u64,
    /// Tells attempts apart that began together.
    pub random: u64,
}

impl fmt::Display for TxnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.started, self.random)
    }
}

/// One attempt of a transaction: what is read is locked until it ends, and what is written is kept here until it
/// commits. Dropped without an end it holds its locks until the nodes find it idle, some seconds later.
///
/// Nothing here begins again by itself: [`Client::transact`] does.
#[derive(Debug)]
pub struct Txn {
    client: Client,
    transaction: proto::Transaction,
    writes: BTreeMap<Row, Option<Bytes>>,
    /// A place that was read: a transaction that only read is committed there.
    read_at: Option<Vec<u8>>,
    aborted: bool,
    end_by: Option<Instant>,
}

impl Txn {
    pub(crate) fn new(client: Client, transaction: proto::Transaction) -> Self {
        Self { client, transaction, writes: BTreeMap::new(), read_at: None, aborted: false, end_by: None }
    }

    pub(crate) fn end_by(&mut self, deadline: Instant) {
        self.end_by = Some(deadline);
    }

    /// Its name.
    pub fn id(&self) -> TxnId {
        TxnId { started: self.transaction.started, random: self.transaction.random }
    }

    /// As it goes over the wire.
    pub fn to_proto(&self) -> &proto::Transaction {
        &self.transaction
    }

    /// Whether a node has said that it is aborted.
    pub fn is_aborted(&self) -> bool {
        self.aborted
    }

    /// Rows under shared locks, in the order asked for. What was written here before is seen.
    ///
    /// # Errors
    ///
    /// [`Error::Aborted`] when it has lost its locks, and whatever is wrong with the rows.
    pub async fn read(&mut self, rows: &[Row]) -> Result<Vec<Found>, Error> {
        let mut found: Vec<Option<Found>> = Vec::new();
        let mut missing = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            let own = self.writes.get(row).map(|value| own(row, value));
            if own.is_none() {
                missing.push((index, self.client.place(row).await?, row.clone()));
            }
            found.push(own);
        }
        let mut pace = self.pace();
        while !missing.is_empty() {
            let (read, failed) = self.read_once(&missing, &pace).await;
            for (index, row) in read {
                if let Some(place) = found.get_mut(index) {
                    *place = Some(row);
                }
            }
            missing.retain(|(index, ..)| found.get(*index).is_some_and(Option::is_none));
            if let Some(failed) = failed {
                let paused = self.client.pause(&mut pace, failed).await;
                self.note(paused)?;
            }
        }
        in_order(found)
    }

    /// One row's value.
    ///
    /// # Errors
    ///
    /// As [`Txn::read`].
    pub async fn get(&mut self, row: &Row) -> Result<Option<Bytes>, Error> {
        Ok(self.read(std::slice::from_ref(row)).await?.into_iter().next().and_then(|found| found.value))
    }

    /// Asks each leader for its rows, once. What one of them failed with comes beside what the others read.
    async fn read_once(
        &mut self,
        missing: &[(usize, Vec<u8>, Row)],
        pace: &Pace,
    ) -> (Vec<(usize, Found)>, Option<Failed>) {
        let mut failed = None;
        let mut groups: BTreeMap<String, Group> = BTreeMap::new();
        for (index, place, row) in missing {
            self.read_at.get_or_insert_with(|| place.clone());
            match self.client.leader_at(place, pace).await {
                Ok(Target { splits, address }) => {
                    let group = groups.entry(address).or_default();
                    group.splits.extend(splits);
                    group.rows.push((*index, row.clone()));
                }
                Err(why) => failed = Some(why),
            }
        }
        let asked = groups.into_iter().map(|(address, Group { mut splits, rows })| {
            splits.dedup();
            let request = proto::ReadRequest {
                transaction: Some(self.transaction.clone()),
                rows: rows.iter().map(|(_, row)| row.clone().into()).collect(),
            };
            let (client, pace) = (&self.client, pace.patient());
            async move {
                let send = |mut node: Store, request| async move { node.read(request).await };
                let answer = client.ask(&pace, &address, request, send).await;
                answer.map(|answer| (rows, answer)).map_err(|fault| (fault, Some(Target { splits, address })))
            }
        });
        let mut read = Vec::new();
        for answer in join_all(asked).await {
            match answer {
                Ok((rows, answer)) => {
                    self.holds(answer.transaction);
                    read.extend(
                        rows.into_iter()
                            .zip(answer.rows)
                            .map(|((index, row), found)| (index, Found { row, ..found.into() })),
                    );
                }
                // What cannot be helped is told before what can.
                Err(why) if failed.as_ref().is_none_or(|(fault, _): &Failed| fault.again) => {
                    failed = Some(why);
                }
                Err(_) => {}
            }
        }
        (read, failed)
    }

    /// The first `limit` rows of a range that exist, under a shared lock on as much of the range as they take. What was
    /// written here before is seen.
    ///
    /// # Errors
    ///
    /// As [`Txn::read`].
    pub async fn scan(&mut self, range: Range, limit: usize) -> Result<Vec<Found>, Error> {
        let table = self.client.table(&range.table).await?;
        let (mut start, end) = table.bounds(&range)?;
        let mut own = Vec::new();
        for (row, value) in self.writes.iter().filter(|(row, _)| row.table == range.table) {
            own.push((sorted(&table.parse(&row.key)?), row.clone(), value.clone()));
        }
        own.sort();
        let mut range = range;
        let mut rows = Vec::new();
        let mut pace = self.pace();
        while rows.len() < limit {
            let place = place(table.name(), &start);
            self.read_at.get_or_insert_with(|| place.clone());
            let page = match self.scan_once(&place, &range, limit - rows.len(), &pace).await {
                Ok(page) => page,
                Err(failed) => {
                    let paused = self.client.pause(&mut pace, failed).await;
                    self.note(paused)?;
                    continue;
                }
            };
            pace = self.pace();
            self.holds(page.transaction);
            let next = page.next.as_deref().map(|next| table.parse_first(next)).transpose()?;
            let until = next.map(|next| sorted(&next)).or_else(|| end.clone());
            let here = |place: &Vec<u8>| start <= *place && until.as_ref().is_none_or(|until| place < until);
            let mut merged: BTreeMap<Vec<u8>, Found> = BTreeMap::new();
            for found in page.rows {
                let found = Found::from(found);
                merged.insert(sorted(&table.parse(&found.row.key)?), found);
            }
            for (place, row, value) in own.iter().filter(|(place, ..)| here(place)) {
                match value {
                    Some(_) => merged.insert(place.clone(), self::own(row, value)),
                    None => merged.remove(place),
                };
            }
            rows.extend(merged.into_values());
            match (page.next, until) {
                (Some(next), Some(until)) => (range.from, start) = (next, until),
                _ => break,
            }
        }
        rows.truncate(limit);
        Ok(rows)
    }

    async fn scan_once(
        &self,
        place: &[u8],
        range: &Range,
        limit: usize,
        pace: &Pace,
    ) -> Result<proto::ScanResponse, Failed> {
        let target = self.client.leader_at(place, pace).await?;
        let request = proto::ScanRequest {
            transaction: Some(self.transaction.clone()),
            range: Some(range.clone().into()),
            limit: page_limit(limit),
        };
        let send = |mut node: Store, request| async move { node.scan(request).await };
        self.client
            .ask(&pace.patient(), &target.address, request, send)
            .await
            .map_err(|fault| (fault, Some(target)))
    }

    /// Writes a row when the transaction commits.
    pub fn put(&mut self, row: Row, value: Bytes) {
        self.writes.insert(row, Some(value));
    }

    /// Deletes a row when the transaction commits.
    pub fn delete(&mut self, row: Row) {
        self.writes.insert(row, None);
    }

    /// Writes all or nothing. Sent again until there is an answer. A transaction that only read is committed too: what
    /// was read was so at one time, the timestamp that comes back.
    ///
    /// # Errors
    ///
    /// [`Error::Unknown`] when it may have been written for all that is known; nothing was for certain otherwise.
    pub async fn commit(&mut self) -> Result<u64, Error> {
        let place = match (self.writes.keys().next(), &self.read_at) {
            (Some(row), _) => self.client.place(row).await?,
            (None, Some(place)) => place.clone(),
            (None, None) => return Ok(self.transaction.started),
        };
        let mutation = |(row, value): (&Row, &Option<Bytes>)| proto::Mutation {
            row: Some(row.clone().into()),
            value: value.clone(),
        };
        let request = proto::CommitRequest {
            transaction: Some(self.transaction.clone()),
            mutations: self.writes.iter().map(mutation).collect(),
        };
        let mut pace = self.pace();
        let mut lost = false;
        loop {
            let failed = match self.commit_once(&place, request.clone(), &pace).await {
                Ok(committed) => return Ok(committed.commit_timestamp),
                Err(failed) => failed,
            };
            lost |= failed.0.lost;
            let paused = self.client.pause(&mut pace, failed).await;
            self.note(paused.map_err(|error| match error {
                // Locks of which one is lost are lost for every copy of the request. Without any, a copy that is still
                // on its way could find nobody in the way any more.
                Error::Aborted(told) if lost && self.transaction.held.is_empty() => Error::Unknown(told),
                error if lost => error.unknown(),
                error => error,
            }))?;
        }
    }

    async fn commit_once(
        &self,
        place: &[u8],
        request: proto::CommitRequest,
        pace: &Pace,
    ) -> Result<proto::CommitResponse, Failed> {
        let target = self.client.leader_at(place, pace).await?;
        let send = |mut node: Store, request| async move { node.commit(request).await };
        self.client.ask(pace, &target.address, request, send).await.map_err(|fault| (fault, Some(target)))
    }

    /// Ends it without a trace: its locks go now. Asked once; whoever does not hear it finds it idle later.
    pub async fn rollback(&mut self) {
        self.writes.clear();
        let mut addresses = Vec::new();
        let pace = self.pace();
        for held in &self.transaction.held {
            if let Ok(target) = self.client.leader_of(held.split, &pace).await
                && !addresses.contains(&target.address)
            {
                addresses.push(target.address);
            }
        }
        let asked = addresses.iter().map(|address| {
            let request = proto::RollbackRequest { transaction: Some(self.transaction.clone()) };
            let send = |mut node: Store, request| async move { node.rollback(request).await };
            self.client.ask(&pace, address, request, send)
        });
        join_all(asked).await;
    }

    /// The locks that it has by now: each split's leader adds its own to those it was told of.
    fn holds(&mut self, transaction: Option<proto::Transaction>) {
        for held in transaction.unwrap_or_default().held {
            if !self.transaction.held.contains(&held) {
                self.transaction.held.push(held);
            }
        }
    }

    fn pace(&self) -> Pace {
        match self.end_by {
            Some(deadline) => self.client.pace_until(deadline),
            None => self.client.pace(),
        }
    }

    fn note(&mut self, result: Result<(), Error>) -> Result<(), Error> {
        self.aborted |= matches!(result, Err(Error::Aborted(_)));
        result
    }
}

pub(crate) fn page_limit(limit: usize) -> u32 {
    u32::try_from(limit.clamp(1, PAGE_ROWS)).unwrap_or(0)
}

fn own(row: &Row, value: &Option<Bytes>) -> Found {
    Found { row: row.clone(), value: value.clone(), version: 0 }
}
