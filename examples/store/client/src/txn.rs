//! One attempt of a transaction.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use bytes::Bytes;
use futures::future::join_all;
use tokio::time::Instant;

use crate::{
    Client, Error, Found, Range, Row, Table, Told,
    client::{Failed, Group, Pace, Store, Target, in_order},
    proto,
    schema::place,
};

/// For so long after its attempt began a commit is sent again: well below the minute for which nodes remember how an
/// attempt ended, whatever clocks and the network do.
const COMMIT_WITHIN: Duration = Duration::from_secs(40);
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
    /// A place that was read.
    read_at: Option<Vec<u8>>,
    began: Instant,
    end_by: Option<Instant>,
    /// Who was asked for which splits, and so may hold locks for it. Locks end with the leader that gave them.
    asked: BTreeMap<String, BTreeSet<u64>>,
    aborted: bool,
    over: bool,
    /// All its locks went with what it was told: nobody is to be told of its end.
    let_go: bool,
}

impl Txn {
    pub(crate) fn new(client: Client, transaction: proto::Transaction) -> Self {
        Self {
            client,
            transaction,
            writes: BTreeMap::new(),
            read_at: None,
            began: Instant::now(),
            end_by: None,
            asked: BTreeMap::new(),
            aborted: false,
            over: false,
            let_go: false,
        }
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

    /// Whether a node has said that it has ended, aborted or not.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Rows under shared locks, in the order asked for. What was written here before is seen.
    ///
    /// # Errors
    ///
    /// [`Error::Aborted`] when it has lost its locks, and whatever is wrong with the rows.
    pub async fn read(&mut self, rows: &[Row]) -> Result<Vec<Found>, Error> {
        let mut found: Vec<Option<Found>> = Vec::new();
        let mut missing = Vec::new();
        let mut places = self.client.places();
        for (index, row) in rows.iter().enumerate() {
            let own = self.writes.get(row).map(|value| own(row, value));
            if own.is_none() {
                missing.push((index, places.of(row).await?, row));
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
                self.pause(&mut pace, failed, false).await?;
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
        missing: &[(usize, Vec<u8>, &Row)],
        pace: &Pace,
    ) -> (Vec<(usize, Found)>, Option<Failed>) {
        let mut failed = None;
        let mut groups: BTreeMap<String, Group<'_>> = BTreeMap::new();
        let (routes, turn) = (self.client.routes(), self.client.turn());
        for (index, place, row) in missing {
            self.read_at.get_or_insert_with(|| place.clone());
            match self.client.leader_by(&routes, turn, place, pace).await {
                Ok(Target { splits, address }) => {
                    let group = groups.entry(address).or_default();
                    group.splits.extend(splits);
                    group.rows.push((*index, row));
                }
                Err(why) => failed = Some(why),
            }
        }
        for (address, group) in &groups {
            self.asks(address, &group.splits);
        }
        let asked = groups.into_iter().map(|(address, mut group)| {
            group.splits.dedup();
            let request = proto::ReadRequest {
                transaction: Some(self.transaction.clone()),
                rows: group.rows.iter().map(|(_, row)| (*row).clone().into()).collect(),
            };
            let (client, pace) = (&self.client, pace.patient());
            async move {
                let send = |mut node: Store, request| async move { node.read(request).await };
                let answer = client.ask(&pace, &address, request, send).await;
                let read = answer.and_then(|answer| Ok((answer.transaction, group.found(answer.rows)?)));
                read.map_err(|fault| (fault, Some(Target { splits: group.splits, address })))
            }
        });
        let mut read = Vec::new();
        for answer in join_all(asked).await {
            match answer {
                Ok((transaction, rows)) => {
                    self.holds(transaction);
                    read.extend(rows);
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
            own.push((table.sorted_first(&row.key)?, row.clone(), value.clone()));
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
                    self.pause(&mut pace, failed, false).await?;
                    continue;
                }
            };
            pace = self.pace();
            self.holds(page.transaction);
            let next = page.next.as_deref().map(|next| next_page(&table, &start, next)).transpose()?;
            let until = next.or_else(|| end.clone());
            let here = |place: &Vec<u8>| start <= *place && until.as_ref().is_none_or(|until| place < until);
            let mut merged: BTreeMap<Vec<u8>, Found> = BTreeMap::new();
            for found in page.rows {
                let found = Found::from(found);
                merged.insert(table.sorted_first(&found.row.key)?, found);
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
        &mut self,
        place: &[u8],
        range: &Range,
        limit: usize,
        pace: &Pace,
    ) -> Result<proto::ScanResponse, Failed> {
        let target = self.client.leader_at(place, pace).await?;
        self.asks(&target.address, &target.splits);
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
            (None, Some(place)) if !self.transaction.held.is_empty() => place.clone(),
            (None, _) => return Ok(self.transaction.started),
        };
        // Of an attempt that is older than what nodes remember they say that it was aborted, whatever became of it.
        let end = self.began + COMMIT_WITHIN;
        let mut pace = self.pace().until(end);
        let mut lost = false;
        loop {
            let failed = match self.commit_once(&place, &pace).await {
                Ok(committed) => return Ok(committed.commit_timestamp),
                Err(failed) => failed,
            };
            lost |= failed.0.lost;
            self.pause(&mut pace, failed, lost).await?;
            if lost && Instant::now() >= end {
                let message = "no answer came as long as nodes remember for certain how it ended".to_owned();
                return Err(Error::Unknown(Told { message, reason: None }));
            }
        }
    }

    async fn commit_once(&mut self, place: &[u8], pace: &Pace) -> Result<proto::CommitResponse, Failed> {
        let target = self.coordinator(place, pace).await?;
        self.asks(&target.address, &target.splits);
        let mutation = |(row, value): (&Row, &Option<Bytes>)| proto::Mutation {
            row: Some(row.clone().into()),
            value: value.clone(),
        };
        let request = proto::CommitRequest {
            transaction: Some(self.transaction.clone()),
            mutations: self.writes.iter().map(mutation).collect(),
        };
        let send = |mut node: Store, request| async move { node.commit(request).await };
        self.client.ask(pace, &target.address, request, send).await.map_err(|fault| (fault, Some(target)))
    }

    /// Whom to ask to commit: the leader of the first row that is written, at `place`, and of what was only read the leader
    /// of the split that was read first.
    async fn coordinator(&self, place: &[u8], pace: &Pace) -> Result<Target, Failed> {
        if self.writes.is_empty()
            && let Some(held) = self.transaction.held.first()
            && let Ok(target) = self.client.leader_of(held.split, pace).await
        {
            return Ok(target);
        }
        self.client.leader_at(place, pace).await
    }

    /// Ends it without a trace: its locks go now. Asked once; whoever does not hear it finds it idle later.
    pub async fn rollback(&mut self) {
        self.writes.clear();
        self.let_go().await;
    }

    /// Tells whoever may hold locks for it that it is over.
    pub(crate) fn let_go(&self) -> impl Future<Output = ()> + Send + use<> {
        let addresses: Vec<_> = if self.let_go { Vec::new() } else { self.asked.keys().cloned().collect() };
        let client = self.client.clone();
        let request = proto::RollbackRequest { transaction: Some(self.transaction.clone()) };
        async move {
            let pace = client.pace().quick();
            let asked = addresses.iter().map(|address| {
                let send = |mut node: Store, request| async move { node.rollback(request).await };
                client.ask(&pace, address, request.clone(), send)
            });
            join_all(asked).await;
        }
    }

    fn asks(&mut self, address: &str, splits: &[u64]) {
        self.let_go = false;
        match self.asked.get_mut(address) {
            Some(asked) => asked.extend(splits),
            None => drop(self.asked.insert(address.to_owned(), splits.iter().copied().collect())),
        }
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

    /// After a try that failed: an error if no other can help. `lost` is a commit of which a try may have come through.
    async fn pause(&mut self, pace: &mut Pace, failed: Failed, lost: bool) -> Result<(), Error> {
        let by = failed.1.as_ref().map(|target| target.address.clone());
        let Err(error) = self.client.pause(pace, failed).await else { return Ok(()) };
        let error = match error {
            // Locks of which one is lost are lost for every copy of the request. Without any, a copy that is still on its
            // way could find nobody in the way any more.
            Error::Aborted(told) if lost && self.transaction.held.is_empty() => Error::Unknown(told),
            error if lost => error.unknown(),
            error => error,
        };
        self.aborted |= matches!(error, Error::Aborted(_));
        self.over |= matches!(error, Error::Aborted(_) | Error::Ended(_));
        if self.aborted
            && let [(asked, splits)] = self.asked.iter().collect::<Vec<_>>().as_slice()
        {
            self.let_go = splits.len() == 1 && by.as_ref() == Some(*asked);
        }
        Err(error)
    }
}

/// Where the next page of a scan begins, of which one began at `start`.
pub(crate) fn next_page(table: &Table, start: &[u8], next: &str) -> Result<Vec<u8>, Error> {
    let place = table.sorted_first(next)?;
    if place.as_slice() > start {
        return Ok(place);
    }
    let message = format!("a node goes on at {next:?}, which is not after where it began");
    Err(Error::Other(Told { message, reason: None }))
}

pub(crate) fn page_limit(limit: usize) -> u32 {
    u32::try_from(limit.clamp(1, PAGE_ROWS)).unwrap_or(0)
}

fn own(row: &Row, value: &Option<Bytes>) -> Found {
    Found { row: row.clone(), value: value.clone(), version: 0 }
}
