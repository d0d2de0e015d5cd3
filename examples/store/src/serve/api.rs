//! The contract's services over the node: each call is checked and made a request, the node answers it, and the answer
//! goes back by the names that it was asked with.

use std::{cmp::Reverse, collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use store_client::{Reason, TABLES, Table, proto};
use tonic::{Request, Response, Status};

use super::{
    Running, Shared,
    core::Failed,
    identity::number,
    peers,
    status::{failed, misnamed, reason_of, refusal},
};
use crate::{
    keys::{Key, Range},
    lease::NodeId,
    locks::Age,
    mvcc::Mutation,
    node::{Answer, Found, Held, Moment, Refused, Request as Ask, SplitView},
    schema::{bound_of, from_of, key_of, range_of, text_of},
    truetime::{ClockError, Timestamp},
    txn::{Attempt, SplitId, TxnId},
};

/// Rows of one request.
const ROWS_MAX: usize = 5000;
/// What one row holds.
const VALUE_BYTES_MAX: usize = 1 << 20;
/// What one commit writes, keys as they are written included: it goes into a log as one record.
const COMMIT_BYTES_MAX: usize = 8 << 20;
/// Rows of one page of a scan.
const SCAN_ROWS_MAX: usize = 1000;
/// A split's leader is one; locks at more splits than this are no client's of ours.
const HELD_MAX: usize = 4096;
/// A transaction cannot have begun later than now, but for what two clocks are apart.
const CLOCKS_APART_MAX: Duration = Duration::from_secs(10);
/// A declaration that others are in the way of is tried again so often.
const DECLARE_ATTEMPTS: u32 = 20;

/// [`proto::store_server::Store`] and [`proto::admin_server::Admin`] over the node.
#[derive(Clone)]
pub(super) struct Api {
    pub(super) shared: Arc<Shared>,
}

#[tonic::async_trait]
impl proto::store_server::Store for Api {
    async fn begin(
        &self,
        request: Request<proto::BeginRequest>,
    ) -> Result<Response<proto::BeginResponse>, Status> {
        let before = request.into_inner().retry_of;
        let (txn, now) = self.new_txn()?;
        if let Some(before) = &before {
            check_times(before, now)?;
        }
        let transaction = match before {
            Some(before) => proto::Transaction {
                // The first attempt may have begun by a clock that is a little ahead of this node's.
                started: txn.started.0.max(before.first),
                random: txn.random,
                first: before.first,
                client: before.client,
                attempt: before.attempt.saturating_add(1),
                held: Vec::new(),
            },
            None => proto::Transaction {
                started: txn.started.0,
                random: txn.random,
                first: txn.started.0,
                client: txn.random,
                attempt: 0,
                held: Vec::new(),
            },
        };
        Ok(Response::new(proto::BeginResponse { transaction: Some(transaction) }))
    }

    async fn read(
        &self,
        request: Request<proto::ReadRequest>,
    ) -> Result<Response<proto::ReadResponse>, Status> {
        let proto::ReadRequest { transaction, rows } = request.into_inner();
        let (transaction, attempt, held) = self.attempt(transaction)?;
        let keys = self.keys(&rows).await?;
        let answer = self.ask(Ask::Read { attempt, held, keys }).await?;
        let Answer::Rows { rows: found, held, .. } = answer else { return Err(mismatch()) };
        let rows = unnamed(&rows, found)?;
        Ok(Response::new(proto::ReadResponse { transaction: Some(holding(transaction, &held)), rows }))
    }

    async fn scan(
        &self,
        request: Request<proto::ScanRequest>,
    ) -> Result<Response<proto::ScanResponse>, Status> {
        let proto::ScanRequest { transaction, range, limit } = request.into_inner();
        let (transaction, attempt, held) = self.attempt(transaction)?;
        let limit = scan_limit(limit)?;
        let (table, named, range) = self.range(range).await?;
        let answer = self.ask(Ask::Scan { attempt, held, range, limit }).await?;
        let Answer::Scanned { rows, held, rest, .. } = answer else { return Err(mismatch()) };
        let (rows, next) = page(&table, &named, rows, rest)?;
        Ok(Response::new(proto::ScanResponse { transaction: Some(holding(transaction, &held)), rows, next }))
    }

    async fn commit(
        &self,
        request: Request<proto::CommitRequest>,
    ) -> Result<Response<proto::CommitResponse>, Status> {
        let arrived = self.shared.clock.now().map_err(|error| self.no_clock(&error))?.latest;
        let proto::CommitRequest { transaction, mutations } = request.into_inner();
        let (_, attempt, held) = self.attempt(transaction)?;
        if mutations.is_empty() && held.is_empty() {
            return Err(refusal(Reason::Malformed, "the transaction neither reads nor writes"));
        }
        let writes = self.writes(mutations).await?;
        let answer = self.ask(Ask::Commit { attempt, held, writes, arrived }).await?;
        let Answer::Committed { at } = answer else { return Err(mismatch()) };
        Ok(Response::new(proto::CommitResponse { commit_timestamp: at.0 }))
    }

    async fn rollback(
        &self,
        request: Request<proto::RollbackRequest>,
    ) -> Result<Response<proto::RollbackResponse>, Status> {
        let (_, attempt, _) = self.attempt(request.into_inner().transaction)?;
        self.ask(Ask::Rollback { txn: attempt.txn }).await?;
        Ok(Response::new(proto::RollbackResponse {}))
    }

    async fn snapshot_read(
        &self,
        request: Request<proto::SnapshotReadRequest>,
    ) -> Result<Response<proto::SnapshotReadResponse>, Status> {
        let proto::SnapshotReadRequest { rows, moment } = request.into_inner();
        let keys = self.keys(&rows).await?;
        let answer = self.ask(Ask::SnapshotRead { keys, moment: moment_of(moment) }).await?;
        let Answer::Rows { rows: found, at, .. } = answer else { return Err(mismatch()) };
        let rows = unnamed(&rows, found)?;
        Ok(Response::new(proto::SnapshotReadResponse { rows, read_timestamp: at.0 }))
    }

    async fn snapshot_scan(
        &self,
        request: Request<proto::SnapshotScanRequest>,
    ) -> Result<Response<proto::SnapshotScanResponse>, Status> {
        let proto::SnapshotScanRequest { range, moment, limit } = request.into_inner();
        let limit = scan_limit(limit)?;
        let (table, named, range) = self.range(range).await?;
        let answer = self.ask(Ask::SnapshotScan { range, moment: moment_of(moment), limit }).await?;
        let Answer::Scanned { rows, at, rest, .. } = answer else { return Err(mismatch()) };
        let (rows, next) = page(&table, &named, rows, rest)?;
        Ok(Response::new(proto::SnapshotScanResponse { rows, read_timestamp: at.0, next }))
    }

    async fn create_table(
        &self,
        request: Request<proto::CreateTableRequest>,
    ) -> Result<Response<proto::CreateTableResponse>, Status> {
        let table = Table::from_proto(request.into_inner()).map_err(|error| misnamed(&error.into()))?;
        self.declare(&table).await?;
        Ok(Response::new(proto::CreateTableResponse {}))
    }

    async fn list_splits(
        &self,
        _request: Request<proto::ListSplitsRequest>,
    ) -> Result<Response<proto::ListSplitsResponse>, Status> {
        let Answer::Splits(splits) = self.ask(Ask::Splits).await? else { return Err(mismatch()) };
        let mentioned = splits.iter().flat_map(|split| split.nodes.iter().copied());
        let nodes = peers::nodes(&self.shared, mentioned);
        let splits = splits.into_iter().map(|split| self.split_info(split)).collect();
        Ok(Response::new(proto::ListSplitsResponse { splits, nodes }))
    }

    async fn status(
        &self,
        _request: Request<proto::StatusRequest>,
    ) -> Result<Response<proto::StatusResponse>, Status> {
        let node = self.running()?.id;
        let Answer::Status(status) = self.ask(Ask::Status).await? else { return Err(mismatch()) };
        Ok(Response::new(proto::StatusResponse {
            node: node.0,
            epsilon: nanos(status.epsilon),
            splits: count(status.splits),
            leads: count(status.leads),
            commits: status.commits,
            commits_across: status.commits_across,
            wounded: status.wounded,
            commit_wait: nanos(status.commit_wait),
            commit_wait_hidden: nanos(status.commit_wait_hidden),
            in_doubt: count(status.in_doubt),
            snapshot_reads: status.snapshot_reads,
            log_syncs: status.log_syncs,
            log_bytes: status.log_bytes,
        }))
    }
}

#[tonic::async_trait]
impl proto::admin_server::Admin for Api {
    async fn split(
        &self,
        request: Request<proto::SplitRequest>,
    ) -> Result<Response<proto::SplitResponse>, Status> {
        let proto::SplitRequest { split, at } = request.into_inner();
        let at = match at {
            Some(at) => self.keys(&[at]).await?.pop(),
            None => None,
        };
        let answer = self.ask(Ask::Split { split: SplitId(split), at }).await?;
        let Answer::Split { right } = answer else { return Err(mismatch()) };
        Ok(Response::new(proto::SplitResponse { right: right.0 }))
    }

    async fn merge(
        &self,
        request: Request<proto::MergeRequest>,
    ) -> Result<Response<proto::MergeResponse>, Status> {
        self.ask(Ask::Merge { split: SplitId(request.into_inner().split) }).await?;
        Ok(Response::new(proto::MergeResponse {}))
    }

    async fn r#move(
        &self,
        request: Request<proto::MoveRequest>,
    ) -> Result<Response<proto::MoveResponse>, Status> {
        let proto::MoveRequest { split, from, to } = request.into_inner();
        let to = self.known_node(to)?;
        self.ask(Ask::Move { split: SplitId(split), from: NodeId(from), to }).await?;
        Ok(Response::new(proto::MoveResponse {}))
    }

    async fn lead(
        &self,
        request: Request<proto::LeadRequest>,
    ) -> Result<Response<proto::LeadResponse>, Status> {
        let proto::LeadRequest { split, node } = request.into_inner();
        let node = self.known_node(node)?;
        self.ask(Ask::Lead { split: SplitId(split), node }).await?;
        Ok(Response::new(proto::LeadResponse {}))
    }
}

/// What the calls are made of.
impl Api {
    fn running(&self) -> Result<&Running, Status> {
        self.shared.running().ok_or_else(|| refusal(Reason::Stopping, "this node has not started yet"))
    }

    async fn ask(&self, request: Ask) -> Result<Answer, Status> {
        let answer = self.running()?.handle.ask(request).await;
        answer.map_err(|why| failed(&why, &self.shared.addresses))
    }

    /// A new attempt's name, and what time it is at most.
    fn new_txn(&self) -> Result<(TxnId, Timestamp), Status> {
        let now = self.shared.clock.now().map_err(|error| self.no_clock(&error))?;
        Ok((TxnId { started: now.latest, random: self.shared.random() }, now.latest))
    }

    fn no_clock(&self, error: &ClockError) -> Status {
        failed(&Failed::Refused(Refused::NoClock(error.to_string())), &self.shared.addresses)
    }

    /// The attempt that a transaction is, and its locks.
    fn attempt(
        &self,
        transaction: Option<proto::Transaction>,
    ) -> Result<(proto::Transaction, Attempt, Vec<Held>), Status> {
        let Some(transaction) = transaction.filter(|transaction| transaction.started != 0) else {
            return Err(refusal(Reason::Malformed, "there is no transaction; Begin makes one"));
        };
        check_times(&transaction, self.shared.about_now().map_err(|error| self.no_clock(&error))?)?;
        if transaction.held.len() > HELD_MAX {
            let message =
                format!("locks at {} splits are over the limit of {HELD_MAX}", transaction.held.len());
            return Err(refusal(Reason::TooMuch, message));
        }
        let held = transaction.held.iter();
        let held = held.map(|held| Held { split: SplitId(held.split), term: held.term }).collect();
        let attempt = Attempt {
            txn: TxnId { started: Timestamp(transaction.started), random: transaction.random },
            age: Age {
                first: Timestamp(transaction.first),
                client: transaction.client,
                attempt: Reverse(transaction.attempt),
            },
        };
        Ok((transaction, attempt, held))
    }

    async fn keys(&self, rows: &[proto::Row]) -> Result<Vec<Key>, Status> {
        check_rows(rows.len())?;
        let mut keys = Vec::with_capacity(rows.len());
        let mut tables = self.shared.tables.reader();
        for row in rows {
            let table = tables.get(&row.table).await?;
            keys.push(key_of(table, &row.key).map_err(|error| misnamed(&error))?);
        }
        Ok(keys)
    }

    async fn range(
        &self,
        range: Option<proto::Range>,
    ) -> Result<(Arc<Table>, store_client::Range, Range), Status> {
        let named: store_client::Range =
            range.ok_or_else(|| refusal(Reason::Malformed, "there is no range"))?.into();
        let table = self.shared.tables.get(&named.table).await?;
        let range = range_of(&table, &named).map_err(|error| misnamed(&error))?;
        Ok((table, named, range))
    }

    /// What a commit writes: once a row, in the order in which rows come first.
    async fn writes(&self, mutations: Vec<proto::Mutation>) -> Result<Vec<Mutation>, Status> {
        if !mutations.is_empty() {
            check_rows(mutations.len())?;
        }
        let mut bytes = 0;
        let mut tables = self.shared.tables.reader();
        let mut places = HashMap::new();
        let mut writes: Vec<Mutation> = Vec::with_capacity(mutations.len());
        for mutation in mutations {
            let row = mutation.row.unwrap_or_default();
            if row.table == TABLES {
                let message = format!("{TABLES:?} is written by CreateTable alone");
                return Err(refusal(Reason::ReservedTable, message));
            }
            let table = tables.get(&row.table).await?;
            let key = key_of(table, &row.key).map_err(|error| misnamed(&error))?;
            let value_bytes = mutation.value.as_ref().map_or(0, Bytes::len);
            if value_bytes > VALUE_BYTES_MAX {
                let message = format!(
                    "what {}/{} is to hold, {value_bytes} bytes, is over the limit of {VALUE_BYTES_MAX}",
                    row.table, row.key
                );
                return Err(refusal(Reason::TooMuch, message));
            }
            bytes += value_bytes + row.key.len();
            let next = writes.len();
            let place = *places.entry(key.clone()).or_insert(next);
            match writes.get_mut(place) {
                Some(write) => write.value = mutation.value,
                None => writes.push(Mutation { key, value: mutation.value }),
            }
        }
        if bytes > COMMIT_BYTES_MAX {
            let message = format!("the commit's {bytes} bytes are over the limit of {COMMIT_BYTES_MAX}");
            return Err(refusal(Reason::TooMuch, message));
        }
        Ok(writes)
    }

    /// Writes a declaration unless it is there.
    async fn declare(&self, table: &Table) -> Result<(), Status> {
        let row = store_client::key(&[table.name().into()]);
        let key = key_of(&Table::of_tables(), &row).map_err(|error| misnamed(&error))?;
        let (first, _) = self.new_txn()?;
        let mut tries = 0;
        loop {
            let (txn, _) = self.new_txn()?;
            // With the age of the first try, so that in the end nobody in the way is older.
            let age = Age { first: first.started, client: first.random, attempt: Reverse(tries) };
            tries += 1;
            let declared = self.declare_once(table, &key, Attempt { txn, age }).await;
            let Err(status) = declared else { return Ok(()) };
            if status.code() == tonic::Code::Unknown {
                return Err(status);
            }
            // What it has locked is in the way of the next try, which may be made elsewhere.
            let _gone = self.ask(Ask::Rollback { txn }).await;
            let again = matches!(reason_of(&status), Some(Reason::Aborted | Reason::Busy));
            if !again || tries >= DECLARE_ATTEMPTS {
                return Err(status);
            }
        }
    }

    async fn declare_once(&self, table: &Table, key: &Key, attempt: Attempt) -> Result<(), Status> {
        let read = Ask::Read { attempt, held: Vec::new(), keys: vec![key.clone()] };
        let Answer::Rows { rows, held, .. } = self.ask(read).await? else { return Err(mismatch()) };
        let new = table.to_proto();
        let Some(declared) = rows.into_iter().next().and_then(|row| row.value) else {
            let write = Mutation { key: key.clone(), value: Some(new.encode_to_vec().into()) };
            let commit = Ask::Commit { attempt, held, writes: vec![write], arrived: Timestamp::MAX };
            return self.ask(commit).await.map(drop);
        };
        if proto::CreateTableRequest::decode(declared).is_ok_and(|declared| declared == new) {
            return self.ask(Ask::Rollback { txn: attempt.txn }).await.map(drop);
        }
        let message = format!("there is a table {:?} already, with other keys", table.name());
        Err(refusal(Reason::TableExists, message))
    }

    /// A node that can be given something to do: its number is configured, and it has been heard of.
    fn known_node(&self, node: u64) -> Result<NodeId, Status> {
        let id = NodeId(node);
        let newest = self.shared.identity.newest();
        match newest.get(&number(id)) {
            Some(newest) if *newest == id => Ok(id),
            Some(newest) => {
                let message =
                    format!("node {} has another disk by now: its number is {}", number(id), newest.0);
                Err(refusal(Reason::Invalid, message))
            }
            None => Err(refusal(Reason::Invalid, format!("this node has never heard of a node {node}"))),
        }
    }

    fn split_info(&self, split: SplitView) -> proto::SplitInfo {
        let leader = split.leader.and_then(|leader| self.shared.addresses.of(leader));
        let (rows, bytes) = split.size.unwrap_or_default();
        proto::SplitInfo {
            id: split.id.0,
            start: split.range.start().clone(),
            end: split.range.end().cloned(),
            generation: split.generation,
            nodes: split.nodes.iter().map(|node| node.0).collect(),
            leader: split.leader.map_or(0, |leader| leader.0),
            leader_address: leader.unwrap_or_default().to_owned(),
            start_text: bound_of(split.range.start()),
            end_text: split.range.end().map(|end| bound_of(end)).unwrap_or_default(),
            rows,
            bytes,
            load: split.load.map_or(0.0, |load| load as f64),
        }
    }
}

/// Nobody begins a transaction in the future, or again before the first time.
fn check_times(transaction: &proto::Transaction, latest: Timestamp) -> Result<(), Status> {
    if Timestamp(transaction.started) > latest.plus(CLOCKS_APART_MAX) {
        return Err(refusal(Reason::Malformed, "the transaction begins in the future"));
    }
    if transaction.first > transaction.started {
        return Err(refusal(Reason::Malformed, "the transaction begins before its first attempt"));
    }
    Ok(())
}

fn check_rows(count: usize) -> Result<(), Status> {
    match count {
        0 => Err(refusal(Reason::Malformed, "there are no rows")),
        1..=ROWS_MAX => Ok(()),
        _ => Err(refusal(Reason::TooMuch, format!("{count} rows are over the limit of {ROWS_MAX}"))),
    }
}

fn scan_limit(limit: u32) -> Result<usize, Status> {
    match usize::try_from(limit) {
        Ok(0) => Ok(SCAN_ROWS_MAX),
        Ok(limit) if limit <= SCAN_ROWS_MAX => Ok(limit),
        _ => Err(refusal(
            Reason::TooMuch,
            format!("a limit of {limit} rows is over the limit of {SCAN_ROWS_MAX}"),
        )),
    }
}

fn moment_of(moment: Option<proto::Moment>) -> Moment {
    match moment.and_then(|moment| moment.moment) {
        None => Moment::Now,
        Some(proto::moment::Moment::Timestamp(at)) => Moment::Exactly(Timestamp(at)),
        Some(proto::moment::Moment::MaxStaleness(nanos)) => Moment::Within(Duration::from_nanos(nanos)),
    }
}

fn holding(transaction: proto::Transaction, held: &[Held]) -> proto::Transaction {
    let held = held.iter().map(|held| proto::Held { split: held.split.0, term: held.term }).collect();
    proto::Transaction { held, ..transaction }
}

/// What was found of rows that whoever asked has the names of: one for each, in their order.
fn unnamed(rows: &[proto::Row], found: Vec<Found>) -> Result<Vec<proto::Found>, Status> {
    if rows.len() != found.len() {
        return Err(mismatch());
    }
    let unnamed = |found: Found| proto::Found { row: None, value: found.value, version: found.version.0 };
    Ok(found.into_iter().map(unnamed).collect())
}

/// One page of a scan, and where the next begins.
fn page(
    table: &Table,
    asked: &store_client::Range,
    found: Vec<Found>,
    rest: Option<Range>,
) -> Result<(Vec<proto::Found>, Option<String>), Status> {
    let mut rows = Vec::with_capacity(found.len());
    for Found { key, value, version } in found {
        let text = text_of(&key).ok_or_else(mismatch)?;
        let row = proto::Row { table: table.name().to_owned(), key: text };
        rows.push(proto::Found { row: Some(row), value, version: version.0 });
    }
    let Some(rest) = rest else { return Ok((rows, None)) };
    let next = from_of(&rest).map_err(|error| refusal(Reason::Internal, error.to_string()))?;
    // Where only the place right after the last row is left, no row is.
    let next = next.filter(|next| range_of(table, &asked.clone().from(next)).is_ok());
    Ok((rows, next))
}

fn mismatch() -> Status {
    refusal(Reason::Internal, "the node's answer is none to what was asked")
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
