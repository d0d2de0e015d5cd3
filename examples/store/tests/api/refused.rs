//! What is not as it is to be is refused, each by a status and a reason of its own, and nothing is lost by it.

use std::future::Future;

use bytes::Bytes;
use store_client::{
    Error, Kind, LEADER_TRAILER, Moment, REASON_TRAILER, Reason, Row, Txn,
    proto::{self, store_client::StoreClient},
};
use tonic::{Code, Response, Status, transport::Channel};

use crate::cluster::Cluster;

async fn refused<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
    code: Code,
    reason: &str,
) -> Status {
    let Err(status) = call.await else { panic!("{reason} was expected") };
    let found = status.metadata().get(REASON_TRAILER).map(|reason| reason.to_str().unwrap().to_owned());
    assert_eq!((status.code(), found.as_deref()), (code, Some(reason)), "{status:?}");
    assert!(!status.message().is_empty());
    status
}

fn row(key: &str) -> proto::Row {
    proto::Row { table: "accounts".to_owned(), key: key.to_owned() }
}

fn put(row: proto::Row, value: impl Into<Bytes>) -> proto::Mutation {
    proto::Mutation { row: Some(row), value: Some(value.into()) }
}

fn at(moment: proto::moment::Moment) -> Option<proto::Moment> {
    Some(proto::Moment { moment: Some(moment) })
}

struct Asked {
    node: StoreClient<Channel>,
}

impl Asked {
    async fn begin(&self) -> proto::Transaction {
        let begun = self.node.clone().begin(proto::BeginRequest { retry_of: None }).await.unwrap();
        begun.into_inner().transaction.unwrap()
    }

    async fn commit(
        &self,
        transaction: &proto::Transaction,
        mutations: Vec<proto::Mutation>,
    ) -> Result<Response<proto::CommitResponse>, Status> {
        let request = proto::CommitRequest { transaction: Some(transaction.clone()), mutations };
        self.node.clone().commit(request).await
    }

    async fn read(
        &self,
        transaction: &proto::Transaction,
        rows: Vec<proto::Row>,
    ) -> Result<Response<proto::ReadResponse>, Status> {
        let request = proto::ReadRequest { transaction: Some(transaction.clone()), rows };
        self.node.clone().read(request).await
    }

    async fn shown(
        &self,
        rows: Vec<proto::Row>,
        moment: Option<proto::Moment>,
    ) -> Result<Response<proto::SnapshotReadResponse>, Status> {
        self.node.clone().snapshot_read(proto::SnapshotReadRequest { rows, moment }).await
    }

    async fn scan(
        &self,
        range: proto::Range,
        limit: u32,
    ) -> Result<Response<proto::SnapshotScanResponse>, Status> {
        let request = proto::SnapshotScanRequest { range: Some(range), moment: None, limit };
        self.node.clone().snapshot_scan(request).await
    }

    async fn create(
        &self,
        table: &str,
        key: &[(&str, proto::key_part::Kind)],
    ) -> Result<Response<proto::CreateTableResponse>, Status> {
        let part = |(name, kind): &(&str, proto::key_part::Kind)| proto::KeyPart {
            name: (*name).to_owned(),
            kind: (*kind).into(),
        };
        let key = key.iter().map(part).collect();
        self.node.clone().create_table(proto::CreateTableRequest { table: table.to_owned(), key }).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moment_whose_versions_are_forgotten_is_refused() {
    let cluster = Cluster::start(1).await;
    let client = cluster.client();
    client.create_table("accounts", &[("owner", Kind::Text), ("number", Kind::Int)]).await.unwrap();
    let error = cluster
        .until(async |client| {
            client.snapshot_read(&[Row::new("accounts", "alice/1")], Moment::At(1)).await.err()
        })
        .await;
    assert!(matches!(error, Error::OutOfRange(_)), "{error}");
    assert_eq!(error.reason(), Some(Reason::Collected));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_answer_and_no_request_can_hold_is_refused() {
    let cluster = Cluster::start(1).await;
    let client = cluster.client();
    client.create_table("accounts", &[("owner", Kind::Text), ("number", Kind::Int)]).await.unwrap();
    let value = Bytes::from(vec![7; 1 << 20]);
    let full = Row::new("accounts", "full/1");
    let fill = async |txn: &mut Txn| {
        txn.put(full.clone(), value.clone());
        Ok(())
    };
    client.transact(fill).await.unwrap();

    let often = vec![full.clone(); 5000];
    let shown = client.snapshot_read(&often, Moment::Now).await.unwrap_err();
    assert_eq!(shown.reason(), Some(Reason::TooMuch), "{shown}");
    let mut reader = client.begin().await.unwrap();
    let read = reader.read(&often).await.unwrap_err();
    assert_eq!(read.reason(), Some(Reason::TooMuch), "{read}");
    reader.rollback().await;

    // The transport itself refuses it, and the node never sees it.
    let mut large = client.begin().await.unwrap();
    for number in 0..33 {
        large.put(Row::new("accounts", format!("bulk/{number}")), value.clone());
    }
    let error = large.commit().await.unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)), "{error:?}");
    // Nothing of all that is in the way of anybody.
    client.transact(fill).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_input_has_its_status_and_loses_nothing() {
    use proto::key_part::Kind::{Int, Text, Unspecified};

    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.create_table("accounts", &[("owner", Kind::Text), ("number", Kind::Int)]).await.unwrap();
    let mark = async |txn: &mut Txn| {
        txn.put(Row::new("accounts", "alice/1"), "kept".into());
        Ok(())
    };
    let ((), marked) = client.transact(mark).await.unwrap();
    let leader = cluster.led().await[0].leader_address.clone();
    let channel = Channel::from_shared(format!("http://{leader}")).unwrap().connect().await.unwrap();
    let asked = Asked { node: StoreClient::new(channel).max_encoding_message_size(64 << 20) };
    let txn = asked.begin().await;

    // Tables.
    let nothing = proto::Row { table: "nothing".to_owned(), key: "1".to_owned() };
    refused(asked.read(&txn, vec![nothing.clone()]), Code::NotFound, "UNKNOWN_TABLE").await;
    refused(asked.commit(&txn, vec![put(nothing.clone(), "x")]), Code::NotFound, "UNKNOWN_TABLE").await;
    refused(asked.shown(vec![nothing], None), Code::NotFound, "UNKNOWN_TABLE").await;
    let unnamed = proto::Row { table: "No Table".to_owned(), key: "1".to_owned() };
    refused(asked.read(&txn, vec![unnamed]), Code::InvalidArgument, "BAD_TABLE").await;
    let reserved = proto::Row { table: "tables".to_owned(), key: "accounts".to_owned() };
    let said = refused(
        asked.commit(&txn, vec![put(row("alice/1"), "lost"), put(reserved.clone(), "x")]),
        Code::PermissionDenied,
        "RESERVED_TABLE",
    );
    assert!(said.await.message().contains("CreateTable"));
    assert!(asked.shown(vec![reserved], None).await.unwrap().into_inner().rows[0].value.is_some());
    refused(asked.create("tables", &[("a", Int)]), Code::InvalidArgument, "BAD_TABLE").await;
    refused(asked.create("Accounts", &[("a", Int)]), Code::InvalidArgument, "BAD_TABLE").await;
    refused(asked.create("t", &[]), Code::InvalidArgument, "BAD_TABLE").await;
    refused(asked.create("t", &[("a", Unspecified)]), Code::InvalidArgument, "BAD_TABLE").await;
    refused(asked.create("accounts", &[("owner", Text)]), Code::AlreadyExists, "TABLE_EXISTS").await;

    // Keys.
    for key in [
        "alice",
        "alice/1/2",
        "alice/",
        "/1",
        "",
        "alice/01",
        "alice/+1",
        "alice/-0",
        "alice/x",
        "alice/ 1",
        "a%2fb/1",
        "a%41/1",
        "a%/1",
        "alice/9223372036854775808",
    ] {
        refused(asked.read(&txn, vec![row(key)]), Code::InvalidArgument, "BAD_KEY").await;
        let write = vec![put(row("alice/1"), "lost"), put(row(key), "x")];
        refused(asked.commit(&txn, write), Code::InvalidArgument, "BAD_KEY").await;
    }
    let long = format!("{}/1", "x".repeat(1020));
    refused(asked.read(&txn, vec![row(&long)]), Code::InvalidArgument, "TOO_MUCH").await;
    refused(asked.commit(&txn, vec![put(row(&long), "x")]), Code::InvalidArgument, "TOO_MUCH").await;

    // Ranges.
    let range = |prefix: &str, from: &str, to: &str| proto::Range {
        table: "accounts".to_owned(),
        prefix: prefix.to_owned(),
        from: from.to_owned(),
        to: to.to_owned(),
    };
    refused(asked.scan(range("", "b", "a"), 0), Code::InvalidArgument, "BAD_RANGE").await;
    refused(asked.scan(range("alice", "bob", ""), 0), Code::InvalidArgument, "BAD_RANGE").await;
    refused(asked.scan(range("alice/01", "", ""), 0), Code::InvalidArgument, "BAD_KEY").await;
    refused(asked.scan(range("", "", ""), 1001), Code::InvalidArgument, "TOO_MUCH").await;

    // Sizes.
    let rows: Vec<_> = (0..5001).map(|number| row(&format!("bulk/{number}"))).collect();
    let writes: Vec<_> = rows.iter().map(|row| put(row.clone(), "x")).collect();
    refused(asked.read(&txn, rows.clone()), Code::InvalidArgument, "TOO_MUCH").await;
    refused(asked.shown(rows, None), Code::InvalidArgument, "TOO_MUCH").await;
    refused(asked.commit(&txn, writes), Code::InvalidArgument, "TOO_MUCH").await;
    let large = vec![7; (1 << 20) + 1];
    let said = refused(asked.commit(&txn, vec![put(row("a/1"), large)]), Code::InvalidArgument, "TOO_MUCH");
    assert!(said.await.message().contains("accounts/a/1"));
    let many = (0..9).map(|number| put(row(&format!("bulk/{number}")), vec![7; 1 << 20])).collect();
    refused(asked.commit(&txn, many), Code::InvalidArgument, "TOO_MUCH").await;

    // Moments.
    let future = proto::moment::Moment::Timestamp(marked + 3_600_000_000_000);
    refused(asked.shown(vec![row("alice/1")], at(future)), Code::OutOfRange, "FUTURE").await;

    // Requests that say nothing.
    let without = proto::ReadRequest { transaction: None, rows: vec![row("alice/1")] };
    refused(asked.node.clone().read(without), Code::InvalidArgument, "MALFORMED").await;
    refused(asked.read(&txn, vec![]), Code::InvalidArgument, "MALFORMED").await;
    refused(asked.commit(&txn, vec![]), Code::InvalidArgument, "MALFORMED").await;
    let early = proto::Transaction { started: marked + 3_600_000_000_000, ..txn.clone() };
    refused(asked.read(&early, vec![row("alice/1")]), Code::InvalidArgument, "MALFORMED").await;

    // Another attempt of what began by a clock that is ahead.
    let ahead = marked + 5_000_000_000;
    let first = proto::Transaction { started: ahead, first: ahead, ..asked.begin().await };
    let again = proto::BeginRequest { retry_of: Some(first) };
    let again = asked.node.clone().begin(again).await.unwrap().into_inner().transaction.unwrap();
    assert!(again.started >= again.first && again.first == ahead);
    asked.read(&again, vec![row("alice/1")]).await.unwrap();
    let rollback = proto::RollbackRequest { transaction: Some(again) };
    asked.node.clone().rollback(rollback).await.unwrap();

    // A transaction that is over.
    let read = asked.read(&txn, vec![row("alice/1")]).await.unwrap().into_inner();
    let txn = read.transaction.unwrap();
    let older = asked.begin().await;
    let older = proto::Transaction { first: 1, ..older };
    asked.commit(&older, vec![put(row("alice/1"), "kept")]).await.unwrap();
    refused(asked.commit(&txn, vec![put(row("alice/1"), "lost")]), Code::Aborted, "ABORTED").await;
    refused(asked.commit(&txn, vec![put(row("alice/1"), "lost")]), Code::Aborted, "ABORTED").await;
    let lost = proto::Transaction { held: vec![proto::Held { split: 1, term: 0 }], ..asked.begin().await };
    refused(asked.commit(&lost, vec![put(row("alice/1"), "lost")]), Code::Aborted, "ABORTED").await;
    let over = asked.begin().await;
    let rollback = proto::RollbackRequest { transaction: Some(over.clone()) };
    asked.node.clone().rollback(rollback).await.unwrap();
    refused(asked.commit(&over, vec![put(row("alice/1"), "lost")]), Code::FailedPrecondition, "ENDED").await;

    // A node that is not the leader says who is.
    let other = (1..=3).find(|number| cluster.address(*number) != leader).unwrap();
    let address = format!("http://{}", cluster.address(other));
    let follower = StoreClient::new(Channel::from_shared(address).unwrap().connect().await.unwrap());
    let request = proto::ReadRequest { transaction: Some(asked.begin().await), rows: vec![row("alice/1")] };
    let said = refused(follower.clone().read(request), Code::Unavailable, "NOT_LEADER").await;
    assert_eq!(said.metadata().get(LEADER_TRAILER).unwrap().to_str().unwrap(), leader);

    let kept = client.snapshot_read(&[Row::new("accounts", "alice/1")], Moment::Now).await.unwrap();
    assert_eq!(kept.rows[0].value.as_deref(), Some(b"kept".as_slice()));
    let all = client.snapshot_scan(store_client::Range::table("accounts"), Moment::Now, 100).await.unwrap();
    assert_eq!(all.rows.len(), 1, "what was refused left something behind");
}
