//! The store as its users have it: processes on loopback, the client crate, an independent client, the shell.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "what a test does not expect is a failure of it"
)]

mod cluster;
mod refused;

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use cluster::{Cluster, PROGRAM, await_file, piped, skip};
use rustix::process::{Pid, Signal, kill_process};
use store_client::{Error, Kind, Moment, Range, Reason, Row, Txn};

const ACCOUNTS: &[(&str, Kind)] = &[("owner", Kind::Text), ("number", Kind::Int)];

fn account(owner: &str, number: i64) -> Row {
    Row::new("accounts", format!("{owner}/{number}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_and_snapshots_go_over_splits() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.create_table("accounts", ACCOUNTS).await.unwrap();
    let rows: Vec<_> = (0..40).map(|number| account(["alice", "bob"][number % 2], number as i64)).collect();
    let fill = async |txn: &mut Txn| {
        for row in &rows {
            txn.put(row.clone(), "10".into());
        }
        Ok(())
    };
    let ((), filled) = client.transact(fill).await.unwrap();
    let first = cluster.led().await[0].id;
    let right = client.split(first, Some(Row::new("accounts", "bob/0"))).await.unwrap();
    cluster
        .until(async |client| {
            let splits = client.splits().await.ok()?.splits;
            splits.iter().any(|split| split.id == right && split.leader != 0).then_some(())
        })
        .await;

    // One transaction reads, scans and writes in both splits, and sees its own writes.
    let transfer = async |txn: &mut Txn| {
        let read = txn.read(&[account("alice", 0), account("bob", 1), account("bob", 99)]).await?;
        assert_eq!(read[0].value.as_deref(), Some(b"10".as_slice()));
        assert_eq!((read[0].version, read[2].version), (filled, 0));
        txn.put(account("alice", 0), "5".into());
        txn.put(account("bob", 1), "15".into());
        txn.delete(account("bob", 3));
        let seen = txn.scan(Range::table("accounts"), 1000).await?;
        assert_eq!(seen.len(), 39);
        assert_eq!(seen[0].value.as_deref(), Some(b"5".as_slice()));
        assert!(seen.iter().all(|found| found.row != account("bob", 3)));
        Ok(seen.len())
    };
    let (seen, at) = client.transact(transfer).await.unwrap();
    assert_eq!(seen, 39);

    // A snapshot shows both splits at one moment, now and then, to whoever can show it.
    let both = [account("bob", 1), account("alice", 0)];
    let now = client.snapshot_read(&both, Moment::Now).await.unwrap();
    assert!(now.at >= at);
    assert_eq!(now.rows.iter().map(|found| found.version).collect::<Vec<_>>(), [at, at]);
    let then = client.snapshot_read(&both, Moment::At(at - 1)).await.unwrap();
    assert_eq!(then.rows.iter().map(|found| found.version).collect::<Vec<_>>(), [filled, filled]);
    let stale = client.snapshot_read(&both, Moment::Within(Duration::from_secs(60))).await.unwrap();
    assert_eq!(stale.rows[0].version, stale.rows[1].version, "{stale:?}");
    let page =
        client.snapshot_scan(Range::table("accounts").from("alice/30"), Moment::At(at), 8).await.unwrap();
    let keys: Vec<_> = page.rows.iter().map(|found| found.row.key.as_str()).collect();
    assert_eq!(keys, ["alice/30", "alice/32", "alice/34", "alice/36", "alice/38", "bob/1", "bob/5", "bob/7"]);
    let bobs =
        client.snapshot_scan(Range::prefix("accounts", "bob"), Moment::At(filled), 1000).await.unwrap();
    assert_eq!((bobs.rows.len(), bobs.at), (20, filled));

    client.merge(first).await.unwrap();
    let merged = client.snapshot_scan(Range::table("accounts"), Moment::Now, 1000).await.unwrap();
    assert_eq!(merged.rows.len(), 39);
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_declared_once_and_known_everywhere() {
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.create_table("accounts", ACCOUNTS).await.unwrap();
    client.create_table("accounts", ACCOUNTS).await.unwrap();
    let other = client.create_table("accounts", &[("owner", Kind::Text)]).await.unwrap_err();
    assert!(matches!(other, Error::AlreadyExists(_)) && other.reason() == Some(Reason::TableExists));
    for number in 1..=3 {
        let one = store_client::Client::connect([cluster.address(number).to_owned()]).unwrap();
        assert_eq!(one.table("accounts").await.unwrap().key().len(), 2);
    }
    let missing = client.table("nothing").await.unwrap_err();
    assert!(matches!(missing, Error::NotFound(_)) && missing.reason() == Some(Reason::UnknownTable));
}

/// Whoever begins again with its age comes through, however many others are in the way.
#[tokio::test(flavor = "multi_thread")]
async fn all_increments_of_one_row_come_through() {
    const CLIENTS: usize = 8;
    const EACH: usize = 5;
    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.create_table("accounts", ACCOUNTS).await.unwrap();
    let row = account("shared", 1);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let (client, row) = (client.clone(), row.clone());
        tasks.spawn(async move {
            for _ in 0..EACH {
                let row = row.clone();
                let increment = async move |txn: &mut Txn| {
                    let was = txn.get(&row).await?;
                    let was: u64 = was.map_or(0, |was| std::str::from_utf8(&was).unwrap().parse().unwrap());
                    txn.put(row.clone(), (was + 1).to_string().into());
                    Ok(())
                };
                client.transact(increment).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let total = client.snapshot_read(&[row], Moment::Now).await.unwrap();
    assert_eq!(total.rows[0].value.as_deref(), Some((CLIENTS * EACH).to_string().as_bytes()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closure_that_gives_up_leaves_nothing_behind() {
    let cluster = Cluster::start(1).await;
    let client = cluster.client();
    client.create_table("accounts", ACCOUNTS).await.unwrap();
    let give_up = async |txn: &mut Txn| {
        txn.get(&account("alice", 1)).await?;
        txn.put(account("alice", 1), "1".into());
        Err::<(), _>(Error::give_up("there is not enough"))
    };
    let error = client.transact(give_up).await.unwrap_err();
    assert!(matches!(&error, Error::GivenUp(why) if why.to_string() == "there is not enough"));
    let write = async |txn: &mut Txn| {
        assert_eq!(txn.get(&account("alice", 1)).await?, None);
        txn.put(account("alice", 1), "2".into());
        Ok(())
    };
    client.transact(write).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_committed_outlives_the_nodes() {
    let mut cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.create_table("accounts", ACCOUNTS).await.unwrap();
    let put = async |txn: &mut Txn| {
        txn.put(account("alice", 1), "kept".into());
        Ok(())
    };
    client.transact(put).await.unwrap();
    cluster.kill(1);
    cluster.kill(2);
    assert!(cluster.stop(3).success(), "{}", cluster.said(3));
    for number in 1..=3 {
        cluster.start_node(number);
    }
    let kept = client.snapshot_read(&[account("alice", 1)], Moment::Now).await.unwrap();
    assert_eq!(kept.rows[0].value.as_deref(), Some(b"kept".as_slice()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_dies_is_followed_by_another() {
    let mut cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.create_table("accounts", ACCOUNTS).await.unwrap();
    let put = async |txn: &mut Txn| {
        let was = txn.get(&account("alice", 1)).await?;
        txn.put(account("alice", 1), "x".into());
        Ok(was)
    };
    client.transact(put).await.unwrap();
    let leader = cluster.led().await[0].leader;
    cluster.kill(usize::try_from(leader).unwrap());
    let (was, _) = client.transact(put).await.unwrap();
    assert!(was.is_some());
}

/// A node without its disk is another node: it takes nothing of what it had, and is given replicas anew, those too that
/// have more versions of their rows than a message holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lost_its_disk_joins_as_another() {
    let mut cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.create_table("accounts", ACCOUNTS).await.unwrap();
    let put = async |txn: &mut Txn| {
        txn.put(account("alice", 1), vec![b'x'; 1 << 20].into());
        Ok(())
    };
    for _ in 0..80 {
        client.transact(put).await.unwrap();
    }
    let split = cluster.led().await[0].clone();
    let lost = (1..=3).find(|number| *number != split.leader).unwrap();
    let number = usize::try_from(lost).unwrap();
    cluster.kill(number);
    fs::remove_dir_all(cluster.state(number)).unwrap();
    cluster.start_node(number);
    let joined = 1 << 16 | lost;
    cluster
        .until(async |client| {
            let status = client.status(cluster.address(number)).await.ok()?;
            assert_eq!(status.node, joined);
            let splits = client.splits().await.ok()?;
            splits.nodes.iter().any(|node| node.id == joined).then_some(())
        })
        .await;

    // It may have been given a replica by now without anybody's asking.
    let moved = client.move_replica(split.id, lost, joined).await;
    cluster
        .until(async |client| {
            let splits = client.splits().await.ok()?.splits;
            (splits[0].nodes.contains(&joined) && !splits[0].nodes.contains(&lost)).then_some(())
        })
        .await;
    if let Err(error) = moved {
        assert_eq!(error.reason(), Some(Reason::Invalid), "{error}");
    }
    let left = (1..=3).find(|number| *number != split.leader && *number != lost).unwrap();
    cluster.kill(usize::try_from(left).unwrap());
    client.transact(put).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_log_is_gone_does_not_start() {
    let mut cluster = Cluster::start(3).await;
    cluster.kill(2);
    fs::remove_dir_all(cluster.state(2).join("log")).unwrap();
    cluster.start_node(2);
    assert_eq!(cluster.ends(2).code(), Some(1));
    assert!(cluster.said(2).contains("empty the data directory"), "{}", cluster.said(2));
}

/// A node that cannot trust its disk ends, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_log_is_broken_does_not_start() {
    let mut cluster = Cluster::start(3).await;
    let client = cluster.client();
    client.create_table("accounts", ACCOUNTS).await.unwrap();
    for number in 0..20 {
        let put = async |txn: &mut Txn| {
            txn.put(account("alice", number), "x".into());
            Ok(())
        };
        client.transact(put).await.unwrap();
    }
    cluster.kill(2);
    let log = cluster.state(2).join("log");
    let segment = fs::read_dir(&log).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&segment).unwrap();
    // The end may be torn. Not so what has something whole behind it.
    bytes[20] ^= 1;
    fs::write(&segment, bytes).unwrap();
    cluster.start_node(2);
    assert_eq!(cluster.ends(2).code(), Some(1));
    let said = cluster.said(2);
    assert!(said.contains("in doubt") && said.contains("what was synced at byte 0 is broken"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_wait_for_each_other_before_they_make_a_universe() {
    let mut cluster = Cluster::stopped(3, true);
    cluster.start_node(1);
    cluster.start_node(2);
    cluster.until(async |_| cluster.said(1).contains("must hear from all others").then_some(())).await;
    let client = cluster.client();
    let early = client.status(cluster.address(1)).await.unwrap_err();
    assert_eq!(early.reason(), Some(Reason::Stopping));
    cluster.start_node(3);
    assert_eq!(cluster.led().await[0].nodes, [1, 2, 3]);
}

/// Where the kernel's clock is disciplined it serves, and where it is not it says why it does not.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_bound_of_the_clocks_error_nothing_begins() {
    let mut cluster = Cluster::stopped(1, false);
    cluster.start_node(1);
    let begun = cluster
        .until(async |client| match client.begin().await {
            Err(error) if error.reason() != Some(Reason::NoClock) => None,
            begun => Some(begun),
        })
        .await;
    if begun.is_err() {
        assert!(cluster.said(1).contains("does nothing until it has"), "{}", cluster.said(1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shell_does_what_it_is_told_until_something_is_wrong() {
    let cluster = Cluster::start(3).await;
    let ran = cluster.shell(
        "create accounts owner text, number int\n\
         put accounts alice/17 100\n\
         put accounts bob/1 \"two words\"\n\
         begin\n\
         get accounts alice/17\n\
         put accounts alice/17 \"\\xff\"\n\
         commit\n\
         scan accounts\n\
         scan tables\n\
         splits\n\
         status\n",
    );
    let said = String::from_utf8(ran.stdout).unwrap();
    assert!(ran.status.success(), "{said}\n{}", String::from_utf8_lossy(&ran.stderr));
    assert!(said.contains("accounts/alice/17  0xff"), "{said}");
    assert!(said.contains("accounts/bob/1     two words"), "{said}");
    assert!(said.contains("owner text, number int"), "{said}");

    let ran = cluster.shell("get accounts alice/17\nscna accounts\nget accounts bob/1\n");
    assert_eq!(ran.status.code(), Some(1));
    assert!(!String::from_utf8(ran.stdout).unwrap().contains("bob"));
    let complained = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(
        complained,
        "line 2: scna accounts\nerror: there is no command \"scna\"\nhint: did you mean scan?\n"
    );
    let ran = cluster.shell("get accounts alice/017\n");
    assert!(String::from_utf8(ran.stderr).unwrap().contains("is written 17"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_starts_nodes_and_takes_them_along() {
    let home = tempfile::tempdir().unwrap();
    let ready = home.path().join("ready.json");
    let demo = |state: &str| {
        let mut command = Command::new(PROGRAM);
        command
            .args(["demo", "--nodes", "3", "--state"])
            .arg(home.path().join(state))
            .arg("--ready")
            .arg(&ready);
        command
    };
    let ran = piped(&mut demo("a"), "create accounts owner text, number int\nput accounts alice/17 100\n");
    let said = String::from_utf8(ran.stdout).unwrap();
    assert!(ran.status.success(), "{said}\n{}", String::from_utf8_lossy(&ran.stderr));
    assert!(said.contains("wrong by at most 1ms"), "{said}");

    // What it kept is there again, and without commands it stays until it is told to end.
    fs::remove_file(&ready).unwrap();
    let mut child = demo("a").stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let told: serde_json::Value = serde_json::from_str(&await_file(&ready)).unwrap();
    assert_eq!(told["epsilon_ns"], 1_000_000);
    let nodes = told["nodes"].as_array().unwrap();
    let addresses = nodes.iter().map(|node| node["addr"].as_str().unwrap().to_owned());
    let client = store_client::Client::connect(addresses).unwrap();
    let kept = client.snapshot_read(&[account("alice", 17)], Moment::Now).await.unwrap();
    assert_eq!(kept.rows[0].value.as_deref(), Some(b"100".as_slice()));
    let pids: Vec<_> = nodes.iter().map(|node| node["pid"].as_i64().unwrap()).collect();
    let demo_pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(demo_pid, Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    for pid in &pids {
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap(), "node {pid} outlives the demo");
    }

    // What fails is said once, as the shell says it.
    let ran = piped(&mut demo("a"), "scna accounts\n");
    assert_eq!(ran.status.code(), Some(1));
    let complained = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(
        complained,
        "line 1: scna accounts\nerror: there is no command \"scna\"\nhint: did you mean scan?\n"
    );

    // Nor do they outlive one that is killed.
    fs::remove_file(&ready).unwrap();
    let mut child = demo("a").stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let told: serde_json::Value = serde_json::from_str(&await_file(&ready)).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    for node in told["nodes"].as_array().unwrap() {
        let process = format!("/proc/{}/cmdline", node["pid"]);
        for _ in 0..500 {
            // One that nobody has waited for yet has no command line any more.
            if fs::read(&process).is_ok_and(|line| !line.is_empty()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        assert!(!fs::read(&process).is_ok_and(|line| !line.is_empty()), "a node outlives the demo");
    }
}

/// The contract as somebody else reads it: grpcio, with stubs that grpcio-tools makes of it.
#[tokio::test(flavor = "multi_thread")]
async fn an_independent_client_does_the_same() {
    let needs = "grpc, grpc_tools.protoc, google.protobuf";
    let found = Command::new("python3").args(["-c", &format!("import {needs}")]).output();
    if !found.is_ok_and(|found| found.status.success()) {
        return skip(&format!("python3 cannot import {needs} (pip install -r .ci/requirements.txt)"));
    }
    let cluster = Cluster::start(3).await;
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let stubs = tempfile::tempdir().unwrap();
    let made = Command::new("python3")
        .args(["-m", "grpc_tools.protoc", "store.proto", "-I"])
        .arg(root.join("client/proto"))
        .arg(format!("--python_out={}", stubs.path().display()))
        .arg(format!("--grpc_python_out={}", stubs.path().display()))
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let leader = cluster.led().await[0].leader_address.clone();
    let ran = Command::new("python3")
        .arg(root.join("tests/api/client.py"))
        .arg(leader)
        .env("PYTHONPATH", stubs.path())
        .output()
        .unwrap();
    assert!(
        ran.status.success(),
        "{}{}",
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr)
    );
    assert_eq!(String::from_utf8(ran.stdout).unwrap(), "everything as the contract has it\n");
}
