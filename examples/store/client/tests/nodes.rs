//! What the client makes of nodes that say what no node should, or say nothing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "what a test does not expect is a failure of it"
)]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use store_client::{
    Client, Error, Kind, Moment, Options, REASON_TRAILER, Range, Reason, Row, TABLES, Txn,
    proto::{
        self,
        store_server::{Store, StoreServer},
    },
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet};
use tonic::{Code, Request, Response, Status, transport::server::TcpIncoming};

type Answer<A> = Result<A, Status>;
type Said<Q, A> = Box<dyn Fn(Q) -> Answer<A> + Send + Sync>;

/// A bound for what never ends when it is wrong.
const HANG: Duration = Duration::from_secs(60);

/// What a node says. Everybody knows the table `accounts`, and which splits there are.
struct Says {
    read: Said<proto::ReadRequest, proto::ReadResponse>,
    scan: Said<proto::ScanRequest, proto::ScanResponse>,
    commit: Said<proto::CommitRequest, proto::CommitResponse>,
    snapshot_read: Said<proto::SnapshotReadRequest, proto::SnapshotReadResponse>,
    snapshot_scan: Said<proto::SnapshotScanRequest, proto::SnapshotScanResponse>,
    create: Said<proto::CreateTableRequest, proto::CreateTableResponse>,
}

impl Default for Says {
    fn default() -> Self {
        Self {
            read: Box::new(|_| Err(Status::unimplemented("read"))),
            scan: Box::new(|_| Err(Status::unimplemented("scan"))),
            commit: Box::new(|_| Err(Status::unimplemented("commit"))),
            snapshot_read: Box::new(|_| Err(Status::unimplemented("snapshot"))),
            snapshot_scan: Box::new(|_| Err(Status::unimplemented("snapshot"))),
            create: Box::new(|_| Err(Status::unimplemented("create"))),
        }
    }
}

/// Nodes, each of which leads one split: the first what is before `middle`.
struct Nodes {
    addresses: Vec<String>,
    /// Which node was asked to roll back.
    rolled_back: mpsc::UnboundedReceiver<usize>,
    /// They end with it.
    _tasks: JoinSet<()>,
}

struct Node {
    index: usize,
    says: Says,
    splits: proto::ListSplitsResponse,
    began: Arc<AtomicUsize>,
    rolled_back: mpsc::UnboundedSender<usize>,
}

fn accounts() -> store_client::Table {
    store_client::Table::new("accounts", &[("owner", Kind::Text), ("number", Kind::Int)]).unwrap()
}

fn account(owner: &str) -> Row {
    Row::new("accounts", format!("{owner}/1"))
}

/// What a node says to have found: as many rows as were asked for, nothing in any.
fn found(rows: &[proto::Row]) -> Vec<proto::Found> {
    rows.iter().map(|_| proto::Found { row: None, value: None, version: 0 }).collect()
}

fn held(split: u64, transaction: Option<proto::Transaction>) -> Option<proto::Transaction> {
    let held = vec![proto::Held { split, term: 1 }];
    transaction.map(|transaction| proto::Transaction { held, ..transaction })
}

fn refusal(code: Code, reason: Reason) -> Status {
    let mut status = Status::new(code, reason.name());
    status.metadata_mut().insert(REASON_TRAILER, reason.name().parse().unwrap());
    status
}

impl Nodes {
    /// One that leads everything.
    async fn one(says: Says) -> Self {
        Self::start(vec![says], |addresses| {
            vec![proto::SplitInfo {
                id: 1,
                leader: 1,
                leader_address: addresses[0].clone(),
                ..Default::default()
            }]
        })
        .await
    }

    /// Two, of which the first is asked first by address. It leads what is before `m`, as split 1, unless it is `crossed`.
    async fn two(first: Says, second: Says, crossed: bool) -> Self {
        Self::start(vec![first, second], |addresses| {
            let middle = accounts().place("m/0").unwrap();
            let leaders = if crossed { [1, 0] } else { [0, 1] };
            let split = |id: u64, leader: usize| proto::SplitInfo {
                id,
                nodes: vec![1, 2],
                leader: leader as u64 + 1,
                leader_address: addresses[leader].clone(),
                ..Default::default()
            };
            let left = proto::SplitInfo { end: Some(middle.clone().into()), ..split(1, leaders[0]) };
            vec![left, proto::SplitInfo { start: middle.into(), ..split(2, leaders[1]) }]
        })
        .await
    }

    async fn start(says: Vec<Says>, splits: impl Fn(&[String]) -> Vec<proto::SplitInfo>) -> Self {
        let mut listeners = Vec::new();
        for _ in &says {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        listeners.sort_by_key(|listener| listener.local_addr().unwrap().to_string());
        let addresses: Vec<_> =
            listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
        let nodes = (1..).zip(&addresses);
        let splits = proto::ListSplitsResponse {
            splits: splits(&addresses),
            nodes: nodes.map(|(id, address)| proto::NodeInfo { id, address: address.clone() }).collect(),
        };
        let (tell, rolled_back) = mpsc::unbounded_channel();
        let began = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for (index, (listener, says)) in listeners.into_iter().zip(says).enumerate() {
            let node = Node {
                index,
                says,
                splits: splits.clone(),
                began: Arc::clone(&began),
                rolled_back: tell.clone(),
            };
            let server = tonic::transport::Server::builder()
                .add_service(StoreServer::new(node))
                .serve_with_incoming(TcpIncoming::from(listener));
            tasks.spawn(async move { server.await.unwrap() });
        }
        Self { addresses, rolled_back, _tasks: tasks }
    }

    fn client(&self) -> Client {
        let options = Options { deadline: Duration::from_millis(300), ..Options::default() };
        Client::with(self.addresses.iter().cloned(), options).unwrap()
    }
}

fn answer<A>(answer: Answer<A>) -> Result<Response<A>, Status> {
    answer.map(Response::new)
}

#[tonic::async_trait]
impl Store for Node {
    async fn begin(
        &self,
        request: Request<proto::BeginRequest>,
    ) -> Result<Response<proto::BeginResponse>, Status> {
        let now = self.began.fetch_add(1, Ordering::Relaxed) as u64 + 1;
        let first = request.into_inner().retry_of.map_or(now, |before| before.first);
        let transaction = proto::Transaction { started: now, random: now, first, ..Default::default() };
        answer(Ok(proto::BeginResponse { transaction: Some(transaction) }))
    }

    async fn read(
        &self,
        request: Request<proto::ReadRequest>,
    ) -> Result<Response<proto::ReadResponse>, Status> {
        answer((self.says.read)(request.into_inner()))
    }

    async fn scan(
        &self,
        request: Request<proto::ScanRequest>,
    ) -> Result<Response<proto::ScanResponse>, Status> {
        answer((self.says.scan)(request.into_inner()))
    }

    async fn commit(
        &self,
        request: Request<proto::CommitRequest>,
    ) -> Result<Response<proto::CommitResponse>, Status> {
        answer((self.says.commit)(request.into_inner()))
    }

    async fn rollback(
        &self,
        _request: Request<proto::RollbackRequest>,
    ) -> Result<Response<proto::RollbackResponse>, Status> {
        self.rolled_back.send(self.index).ok();
        answer(Ok(proto::RollbackResponse {}))
    }

    async fn snapshot_read(
        &self,
        request: Request<proto::SnapshotReadRequest>,
    ) -> Result<Response<proto::SnapshotReadResponse>, Status> {
        use prost::Message as _;

        let request = request.into_inner();
        if request.rows[0].table != TABLES {
            return answer((self.says.snapshot_read)(request));
        }
        // Whoever leads it is away: any replica is as good.
        if request.moment.and_then(|moment| moment.moment).is_none() {
            return Err(refusal(Code::Unavailable, Reason::NotLeader));
        }
        let value = Some(accounts().to_proto().encode_to_vec().into());
        let rows = vec![proto::Found { row: None, value, version: 1 }];
        answer(Ok(proto::SnapshotReadResponse { rows, read_timestamp: 1 }))
    }

    async fn snapshot_scan(
        &self,
        request: Request<proto::SnapshotScanRequest>,
    ) -> Result<Response<proto::SnapshotScanResponse>, Status> {
        answer((self.says.snapshot_scan)(request.into_inner()))
    }

    async fn create_table(
        &self,
        request: Request<proto::CreateTableRequest>,
    ) -> Result<Response<proto::CreateTableResponse>, Status> {
        answer((self.says.create)(request.into_inner()))
    }

    async fn list_splits(
        &self,
        _request: Request<proto::ListSplitsRequest>,
    ) -> Result<Response<proto::ListSplitsResponse>, Status> {
        answer(Ok(self.splits.clone()))
    }

    async fn status(
        &self,
        _request: Request<proto::StatusRequest>,
    ) -> Result<Response<proto::StatusResponse>, Status> {
        answer(Ok(proto::StatusResponse::default()))
    }
}

async fn ends<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANG, work).await.unwrap()
}

#[tokio::test]
async fn fewer_rows_than_were_asked_for_are_no_answer() {
    let says = Says {
        read: Box::new(|request| {
            Ok(proto::ReadResponse { transaction: request.transaction, rows: Vec::new() })
        }),
        snapshot_read: Box::new(|_| Ok(proto::SnapshotReadResponse { rows: Vec::new(), read_timestamp: 1 })),
        ..Says::default()
    };
    let nodes = Nodes::one(says).await;
    let client = nodes.client();
    let mut txn = client.begin().await.unwrap();
    let read = ends(txn.read(&[account("alice")])).await.unwrap_err();
    assert!(matches!(&read, Error::Other(told) if told.message.contains("0 came")), "{read:?}");
    let shown = ends(client.snapshot_read(&[account("alice")], Moment::Now)).await.unwrap_err();
    assert!(matches!(shown, Error::Other(_)), "{shown:?}");
}

#[tokio::test]
async fn a_scan_that_does_not_move_ends() {
    let next = || Some("alice/1".to_owned());
    let says = Says {
        scan: Box::new(move |request| {
            Ok(proto::ScanResponse { transaction: request.transaction, rows: Vec::new(), next: next() })
        }),
        snapshot_scan: Box::new(move |_| {
            Ok(proto::SnapshotScanResponse { rows: Vec::new(), read_timestamp: 1, next: next() })
        }),
        ..Says::default()
    };
    let nodes = Nodes::one(says).await;
    let client = nodes.client();
    let range = || Range::table("accounts").from("alice/1");
    let mut txn = client.begin().await.unwrap();
    let scanned = ends(txn.scan(range(), 10)).await.unwrap_err();
    assert!(matches!(&scanned, Error::Other(told) if told.message.contains("alice/1")), "{scanned:?}");
    let shown = ends(client.snapshot_scan(range(), Moment::Now, 10)).await.unwrap_err();
    assert!(matches!(shown, Error::Other(_)), "{shown:?}");
}

#[tokio::test]
async fn a_declaration_whose_answer_was_lost_may_have_been_written() {
    let asked = AtomicUsize::new(0);
    let create = move |_| match asked.fetch_add(1, Ordering::Relaxed) {
        0 => Err(Status::unavailable("the connection broke")),
        _ => Err(refusal(Code::Unavailable, Reason::Busy)),
    };
    let nodes = Nodes::one(Says { create: Box::new(create), ..Says::default() }).await;
    let error = nodes.client().create_table("notes", &[("day", Kind::Int)]).await.unwrap_err();
    assert!(matches!(error, Error::Unknown(_)), "{error:?}");
}

#[tokio::test]
async fn a_read_that_is_lost_has_written_nothing_and_is_rolled_back() {
    let read = |_| Err(refusal(Code::Unknown, Reason::Unknown));
    let mut nodes = Nodes::one(Says { read: Box::new(read), ..Says::default() }).await;
    let work = async |txn: &mut Txn| txn.get(&account("alice")).await;
    let error = nodes.client().transact(work).await.unwrap_err();
    assert!(error.nothing_written(), "{error:?}");
    assert_eq!(nodes.rolled_back.recv().await, Some(0));
}

/// Locks at a node that has said nothing of an abort at another one are in everybody's way.
#[tokio::test]
async fn what_another_node_aborted_is_let_go_where_it_is_held() {
    let reads = |split| {
        move |request: proto::ReadRequest| {
            let rows = found(&request.rows);
            Ok(proto::ReadResponse { transaction: held(split, request.transaction), rows })
        }
    };
    let asked = AtomicUsize::new(0);
    let aborts = move |request: proto::ReadRequest| match asked.fetch_add(1, Ordering::Relaxed) {
        0 => Err(refusal(Code::Aborted, Reason::Aborted)),
        _ => reads(2)(request),
    };
    let commits = |_| Ok(proto::CommitResponse { commit_timestamp: 7 });
    let first = Says { read: Box::new(reads(1)), commit: Box::new(commits), ..Says::default() };
    let second = Says { read: Box::new(aborts), ..Says::default() };
    let mut nodes = Nodes::two(first, second, false).await;
    let work = async |txn: &mut Txn| {
        txn.get(&account("alice")).await?;
        txn.get(&account("zoe")).await
    };
    let (_, at) = nodes.client().transact(work).await.unwrap();
    assert_eq!(at, 7);
    let both = [nodes.rolled_back.recv().await, nodes.rolled_back.recv().await];
    assert!(both.contains(&Some(0)), "{both:?}");
}

/// The node coordinates at the split that was read first, so that its leader is whom to ask.
#[tokio::test]
async fn what_only_read_is_committed_where_it_read_first() {
    let committed = Arc::new(Mutex::new(Vec::new()));
    let says = |index: usize, split: u64| {
        let committed = Arc::clone(&committed);
        Says {
            read: Box::new(move |request| {
                let rows = found(&request.rows);
                Ok(proto::ReadResponse { transaction: held(split, request.transaction), rows })
            }),
            commit: Box::new(move |request| {
                committed.lock().unwrap().push((index, request.transaction.unwrap().held[0].split));
                Ok(proto::CommitResponse { commit_timestamp: 7 })
            }),
            ..Says::default()
        }
    };
    // The first node by address leads the second split.
    let nodes = Nodes::two(says(0, 2), says(1, 1), true).await;
    let client = nodes.client();
    let work = async |txn: &mut Txn| txn.read(&[account("alice"), account("zoe")]).await;
    client.transact(work).await.unwrap();
    assert_eq!(*committed.lock().unwrap(), [(0, 2)]);
}
