//! The sample store behind real sidecars: its nodes know each other, and who may touch which row is decided before them.
//! One mesh serves all the checks, one after another, because each start costs seconds on a small machine.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test")]
#![allow(clippy::disallowed_methods, reason = "what the test starts ends with it")]

mod nodes;
mod small;

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nodes::{Stage, account};
use small::DEADLINE;
use store_client::proto::{
    HelloRequest, Parcel, SnapshotReadRequest, peers_client::PeersClient, store_client::StoreClient,
};
use store_client::{Client, Error, Moment, Range};
use tonic::Code;
use tonic::transport::Channel;

#[tokio::test(flavor = "multi_thread")]
async fn nodes_and_clients_behind_sidecars() {
    let mut stage = Stage::start();
    the_policies_are_good(&stage);
    stage.serve_apps().await;
    operators_operate_and_nobody_else(&stage).await;
    only_nodes_are_nodes(&stage).await;
    accounts_does_what_it_may_by_itself(&stage).await;
    people_keep_to_their_own_rows(&stage).await;
    a_node_that_is_one_no_longer_is_heard_no_longer(&stage).await;
    let transfers = Transfers::begin(stage.client("accounts"));
    every_identity_rotates(&stage, &transfers).await;
    a_leader_hangs(&stage, &transfers).await;
    a_leader_dies_and_comes_back(&mut stage, &transfers).await;
    a_node_that_lost_its_disk_is_given_its_replicas(&mut stage, &transfers).await;
    transfers.end().await;
}

fn the_policies_are_good(stage: &Stage) {
    for (args, expected) in [
        (&["config", "check"][..], "is good"),
        (&["policy", "check"], "is good"),
        (&["policy", "test"], "one of bob's rows among alice's denies all of them"),
        (&["policy", "test", "--service", "store-2"], "one of bob's rows among alice's denies all of them"),
        (&["policy", "matrix"], "nodes-talk-to-nodes"),
        (&["explain", "reports", "store-1", "POST", "/palisade.store.v1.Peers/Talk"], "no policy allows it"),
    ] {
        let (good, said) = stage.palisade(args);
        assert!(good && said.contains(expected), "{args:?}: {said}");
    }
}

async fn operators_operate_and_nobody_else(stage: &Stage) {
    let (alice, olga) = (stage.person("alice").await, stage.person("olga").await);
    // Nobody behind it, through ops or not.
    for service in ["ops", "accounts", "reports"] {
        let refused = stage.client(service).create_table("accounts", &nodes::KEY).await.unwrap_err();
        assert!(matches!(refused, Error::Denied(_)), "{service}: {refused:?}");
    }
    let (status, said) = stage.asks(&alice, "ops", "create accounts").await;
    assert_eq!(status, 403, "{said}");
    assert!(stage.explained(&said).contains("alice"), "{said}");
    let (status, said) = stage.asks(&olga, "accounts", "create accounts").await;
    assert_eq!(status, 403, "an operator who comes by accounts: {said}");
    let (status, said) = stage.asks(&olga, "ops", "create accounts").await;
    assert_eq!(status, 200, "{said}");
    // Cut between alice and bob, led by two nodes, so that what concerns both crosses sidecars.
    let client = stage.client("accounts");
    let splits = client.splits().await.unwrap().splits;
    let last = splits.last().unwrap().id;
    let (status, right) = stage.asks(&olga, "ops", &format!("cut {last} b/0")).await;
    assert_eq!(status, 200, "{right}");
    let splits = client.splits().await.unwrap().splits;
    let split = |id: u64| splits.iter().find(|split| split.id == id).unwrap();
    let left = split(last);
    let other = left.nodes.iter().find(|node| **node != left.leader).unwrap();
    let (status, said) = stage.asks(&olga, "ops", &format!("lead {right} {other}")).await;
    assert_eq!(status, 200, "{said}");
    // All three nodes have it already; what is refused now is refused by the store, and not before it.
    let (status, said) = stage.asks(&olga, "ops", &format!("move {right} 1 2")).await;
    assert!(status == 500 && said.contains("Invalid"), "{said}");
    let (status, said) = stage.asks(&alice, "ops", &format!("move {right} 1 2")).await;
    assert_eq!(status, 403, "{said}");
    let (status, said) = stage.asks(&olga, "ops", "show alice/17").await;
    assert_eq!(status, 403, "operators touch no row: {said}");
}

async fn only_nodes_are_nodes(stage: &Stage) {
    for service in ["accounts", "ops", "reports"] {
        for address in stage.called_by(service).values() {
            let mut peers = PeersClient::new(channel(*address));
            let hello = peers.hello(HelloRequest { node: 0 }).await.unwrap_err();
            let parcels = futures::stream::repeat(Parcel { from: 1, to: 2, ..Parcel::default() });
            let talk = peers.talk(parcels).await.unwrap_err();
            for refused in [hello, talk] {
                assert_eq!(refused.code(), Code::PermissionDenied, "{service}: {refused:?}");
                assert!(refused.message().contains("receipt r-"), "{refused:?}");
            }
        }
    }
    // Nor is a node an application.
    let other = stage.called_by("store-1")[&2];
    let mut node = StoreClient::new(channel(other));
    let request = SnapshotReadRequest { rows: vec![account("alice/17").into()], moment: None };
    let refused = node.snapshot_read(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    let told = stage.explained(refused.message());
    assert!(told.contains("service/store-1") && told.contains("accounts/alice/17"), "{told}");
}

fn channel(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy()
}

async fn accounts_does_what_it_may_by_itself(stage: &Stage) {
    let (accounts, reports) = (stage.client("accounts"), stage.client("reports"));
    let rows = [account("alice/17"), account("bob/42")];
    let put = accounts.transact(async |txn| {
        rows.iter().for_each(|row| txn.put(row.clone(), "100".into()));
        Ok(())
    });
    put.await.unwrap();
    let shown = accounts.snapshot_read(&rows, Moment::Now).await.unwrap();
    assert!(shown.rows.iter().all(|found| found.value.as_deref() == Some(b"100")), "{shown:?}");
    let all = accounts.snapshot_scan(Range::table("accounts"), Moment::Now, 10).await.unwrap();
    assert_eq!(all.rows.len(), 2);
    // Another table is not its own, and one such row spoils a request.
    for denied in [
        accounts.snapshot_scan(Range::table("tables"), Moment::Now, 10).await.map(drop),
        reports.snapshot_read(&rows, Moment::Now).await.map(drop),
        reports.snapshot_scan(Range::table("accounts"), Moment::Now, 10).await.map(drop),
        reports.begin().await.map(drop),
        reports.splits().await.map(drop),
    ] {
        let told = denied.unwrap_err();
        assert!(matches!(told, Error::Denied(_)) && told.reason().is_none(), "{told:?}");
        assert!(told.to_string().contains("receipt r-"), "{told}");
    }
}

async fn people_keep_to_their_own_rows(stage: &Stage) {
    let (alice, bob) = (stage.person("alice").await, stage.person("bob").await);
    for (who, words, expected) in [
        (&alice, "read alice/17", "100"),
        (&alice, "show alice/17", "100"),
        (&alice, "scan alice", "100"),
        (&alice, "put 7 alice/18", ""),
        (&alice, "read alice/17 alice/18", "100 7"),
        (&bob, "show bob/42", "100"),
    ] {
        assert_eq!(stage.asks(who, "accounts", words).await, (200, expected.to_owned()), "{words}");
    }
    for (who, words, object) in [
        (&alice, "read bob/42", "accounts/bob/42"),
        (&alice, "show bob/42", "accounts/bob/42"),
        (&bob, "show alice/17", "accounts/alice/17"),
        // Whole: nothing of hers is read or written either. These two are of one split.
        (&alice, "read alice/17 alice2/1", "accounts/alice2/1"),
        (&alice, "put 8 alice/18 alice2/1", "accounts/alice2/1"),
        // And these of two, on two nodes.
        (&alice, "put 8 alice/18 bob/42", "accounts/bob/42"),
        (&alice, "scan bob", "accounts/bob"),
        (&alice, "scan", "accounts/"),
    ] {
        let (status, said) = stage.asks(who, "accounts", words).await;
        assert_eq!(status, 403, "{words}: {said}");
        let told = stage.explained(&said);
        assert!(told.contains(object) && told.contains("people-"), "{words}: {told}");
        assert!(told.contains("alice") || told.contains("bob"), "{words}: {told}");
    }
    assert_eq!(stage.asks(&alice, "accounts", "read alice/17 alice/18").await, (200, "100 7".to_owned()));
}

/// What one node says to another is a single call without end: a new policy ends it, and not only the next one.
async fn a_node_that_is_one_no_longer_is_heard_no_longer(stage: &Stage) {
    let rules = stage.home.path("policies/services/store/store.cedar");
    let before = fs::read_to_string(&rules).unwrap();
    let sidecar = stage.sidecar("store-1");
    fs::write(&rules, before.replace("service/store-3", "service/store-4")).unwrap();
    sidecar.signal("HUP");
    let ended = sidecar.until_logged(&["a stream was ended", "Peers/Talk"]);
    assert!(ended.contains("service/store-3"), "{ended}");
    fs::write(&rules, before).unwrap();
    sidecar.signal("HUP");
}

/// Money that moves between alice and bob, over two nodes, all the time.
struct Transfers {
    client: Client,
    done: Arc<AtomicU64>,
    ends: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Transfers {
    fn begin(client: Client) -> Self {
        let (done, ends) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (moves, counted, ended) = (client.clone(), Arc::clone(&done), Arc::clone(&ends));
        let task = tokio::spawn(async move {
            while !ended.load(Ordering::Relaxed) {
                match transfer(moves.clone()).await {
                    Ok(()) => counted.fetch_add(1, Ordering::Relaxed),
                    // A leader died, and its answer with it.
                    Err(Error::Unknown(_) | Error::Unavailable(_) | Error::Aborted(_)) => continue,
                    Err(error) => panic!("{error:?}"),
                };
            }
        });
        Self { client, done, ends, task }
    }

    /// Waits until another so many were done.
    async fn more(&self, count: u64) {
        let before = self.done.load(Ordering::Relaxed);
        eventually("money moves", async || {
            assert!(!self.task.is_finished(), "transfers have ended");
            self.done.load(Ordering::Relaxed) >= before + count
        })
        .await;
    }

    async fn end(self) {
        self.ends.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        let rows = [account("alice/17"), account("bob/42")];
        let shown = self.client.snapshot_read(&rows, Moment::Now).await.unwrap();
        let sum: i64 = shown.rows.iter().map(|found| amount(found.value.as_deref())).sum();
        assert_eq!(sum, 200);
    }
}

fn amount(value: Option<&[u8]>) -> i64 {
    std::str::from_utf8(value.unwrap()).unwrap().parse().unwrap()
}

async fn transfer(client: Client) -> Result<(), Error> {
    let (from, to) = (account("alice/17"), account("bob/42"));
    let moved = client.transact(async move |txn| {
        let found = txn.read(&[from.clone(), to.clone()]).await?;
        let [a, b] = [0, 1].map(|at| amount(found[at].value.as_deref()));
        txn.put(from.clone(), (a - 1).to_string().into());
        txn.put(to.clone(), (b + 1).to_string().into());
        Ok(())
    });
    moved.await.map(drop)
}

/// What nodes say to each other goes on although the connections that carry it end with their certificates.
async fn every_identity_rotates(stage: &Stage, transfers: &Transfers) {
    let services = ["store-1", "store-2", "store-3", "accounts"];
    let mut before = Vec::new();
    for service in services {
        before.push(stage.rotations(service).await);
    }
    eventually("every identity has rotated past the end of what was there", async || {
        assert!(!transfers.task.is_finished(), "transfers have ended");
        for (service, before) in services.iter().zip(&before) {
            if stage.rotations(service).await < before + 5 {
                return false;
            }
        }
        true
    })
    .await;
    transfers.more(20).await;
}

/// Its sidecar answers pings all the while.
async fn a_leader_hangs(stage: &Stage, transfers: &Transfers) {
    let splits = transfers.client.splits().await.unwrap().splits;
    let leader = stage.node(splits.last().unwrap().leader);
    leader.signal("STOP");
    transfers.more(20).await;
    leader.signal("CONT");
    transfers.more(20).await;
}

async fn a_leader_dies_and_comes_back(stage: &mut Stage, transfers: &Transfers) {
    let splits = transfers.client.splits().await.unwrap().splits;
    let leader = splits.last().unwrap().leader;
    assert_ne!(leader, 0);
    stage.kill_node(leader);
    transfers.more(20).await;
    stage.restart_node(leader);
    transfers.more(20).await;
    // It is there again for the others: what they say reaches it through both sidecars.
    eventually("the node that came back knows who leads", async || {
        let address = stage.called_by("accounts")[&leader];
        let client = Client::connect([format!("{leader}={address}")]).unwrap();
        let known = client.splits().await;
        known.is_ok_and(|known| known.splits.iter().all(|split| split.leader != 0))
    })
    .await;
    assert!(stage.sidecar("accounts").alive());
}

/// It is another node from then on. Its replicas move to it, rows and all, through both sidecars.
async fn a_node_that_lost_its_disk_is_given_its_replicas(stage: &mut Stage, transfers: &Transfers) {
    let splits = transfers.client.splits().await.unwrap().splits;
    let lost = (1..=3).find(|node| splits.iter().all(|split| split.leader != *node)).unwrap_or(1);
    stage.kill_node(lost);
    stage.empty_disk(lost);
    stage.restart_node(lost);
    let again = 1 << 16 | lost;
    eventually("its replicas have moved to what it is now", async || {
        assert!(!transfers.task.is_finished(), "transfers have ended");
        let known = transfers.client.splits().await;
        known.is_ok_and(|known| {
            known.splits.iter().all(|split| split.nodes.contains(&again) && !split.nodes.contains(&lost))
        })
    })
    .await;
    transfers.more(20).await;
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
