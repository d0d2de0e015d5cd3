//! etcd beside it: three members on loopback, asked over its own gRPC.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use tokio::time::sleep;
use tonic::{
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::{
    load::{CLIENTS_A_CONNECTION, ROWS, System, Work, value},
    peer::{Guarded, find},
};
use crate::cmd::{free_addresses, torture::random::Random};

/// How long its members have to find a leader.
const START: Duration = Duration::from_secs(30);
/// An attempt of a transaction that lost against another is tried again so often.
const ATTEMPTS_MAX: usize = 1000;
/// Rows that are written in one transaction at first: it allows 128 operations.
const LOAD_ROWS: u64 = 100;
/// No answer by then is none. A dead leader's connection may never say so.
const ANSWER: Duration = Duration::from_secs(5);

/// The part of etcd's `rpc.proto` that is needed here, with its numbers of fields.
mod wire {
    /// Reads a key.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RangeRequest {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) key: Vec<u8>,
        /// From this member as it is, instead of as of now.
        #[prost(bool, tag = "7")]
        pub(super) serializable: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct KeyValue {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) key: Vec<u8>,
        #[prost(int64, tag = "3")]
        pub(super) mod_revision: i64,
        #[prost(bytes = "vec", tag = "5")]
        pub(super) value: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RangeResponse {
        #[prost(message, repeated, tag = "2")]
        pub(super) kvs: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PutRequest {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) key: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) value: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PutResponse {}

    /// `result` is left at EQUAL, which is zero.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Compare {
        /// MOD is 2.
        #[prost(int32, tag = "2")]
        pub(super) target: i32,
        #[prost(bytes = "vec", tag = "3")]
        pub(super) key: Vec<u8>,
        #[prost(int64, tag = "6")]
        pub(super) mod_revision: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RequestOp {
        #[prost(message, optional, tag = "1")]
        pub(super) range: Option<RangeRequest>,
        #[prost(message, optional, tag = "2")]
        pub(super) put: Option<PutRequest>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct TxnRequest {
        #[prost(message, repeated, tag = "1")]
        pub(super) compare: Vec<Compare>,
        #[prost(message, repeated, tag = "2")]
        pub(super) success: Vec<RequestOp>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ResponseOp {
        #[prost(message, optional, tag = "1")]
        pub(super) range: Option<RangeResponse>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct TxnResponse {
        #[prost(bool, tag = "2")]
        pub(super) succeeded: bool,
        #[prost(message, repeated, tag = "3")]
        pub(super) responses: Vec<ResponseOp>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct StatusRequest {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ResponseHeader {
        #[prost(uint64, tag = "2")]
        pub(super) member_id: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct StatusResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) header: Option<ResponseHeader>,
        #[prost(string, tag = "2")]
        pub(super) version: String,
        #[prost(uint64, tag = "4")]
        pub(super) leader: u64,
    }
}

use wire::{
    Compare, PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp, ResponseOp, StatusRequest,
    StatusResponse, TxnRequest, TxnResponse,
};

/// `MOD` of etcd's `CompareTarget`.
const COMPARE_MOD: i32 = 2;

/// Three members.
#[derive(Debug)]
pub(crate) struct Etcd {
    members: Vec<Member>,
    /// Connections to the leader.
    leader: Mutex<Vec<Channel>>,
    /// What it says that it is.
    pub(crate) version: String,
}

#[derive(Debug)]
struct Member {
    arguments: Vec<String>,
    client: String,
    process: Mutex<Option<Guarded>>,
}

impl Etcd {
    /// Starts three members in `directory`, fills them with rows, and waits for a leader.
    ///
    /// # Errors
    ///
    /// When it is not installed or does not start.
    pub(crate) async fn start(directory: &Path, most_clients: usize) -> anyhow::Result<Self> {
        let program =
            find("etcd", &[]).ok_or_else(|| anyhow!("etcd is not installed; apt-get install etcd-server"))?;
        let addresses = free_addresses(6)?;
        let (clients, peers) = addresses.split_at(3);
        let all: Vec<_> = (1..).zip(peers).map(|(id, peer)| format!("m{id}=http://{peer}")).collect();
        let mut members = Vec::new();
        for (id, (client, peer)) in (1..).zip(clients.iter().zip(peers)) {
            let data = directory.join(format!("etcd-{id}"));
            let client = format!("http://{client}");
            let flags = [
                ("name", format!("m{id}")),
                ("data-dir", data.to_string_lossy().into_owned()),
                ("listen-client-urls", client.clone()),
                ("advertise-client-urls", client.clone()),
                ("listen-peer-urls", format!("http://{peer}")),
                ("initial-advertise-peer-urls", format!("http://{peer}")),
                ("initial-cluster", all.join(",")),
                ("log-level", "error".into()),
            ];
            let arguments = flags.iter().map(|(name, value)| format!("--{name}={value}")).collect();
            let member = Member { arguments, client, process: Mutex::new(None) };
            member.start(&program)?;
            members.push(member);
        }
        let (leader, _, version) = find_leader(&members, START).await?;
        let channels = (0..most_clients.div_ceil(CLIENTS_A_CONNECTION).max(1)).map(|_| leader.channel());
        let channels = channels.collect::<Result<_, _>>()?;
        let etcd = Self { leader: Mutex::new(channels), version, members };
        etcd.load().await?;
        Ok(etcd)
    }

    async fn load(&self) -> anyhow::Result<()> {
        let mut random = Random::new(0, 0);
        for first in (0..ROWS).step_by(usize::try_from(LOAD_ROWS).unwrap_or(1)) {
            let success = (first..first + LOAD_ROWS).map(|row| put(key(row), &mut random)).collect();
            self.txn(0, TxnRequest { compare: Vec::new(), success }).await?;
        }
        Ok(())
    }

    /// Kills the leader, and gives how long it was until a write was acknowledged again.
    ///
    /// # Errors
    ///
    /// When that does not happen within half a minute.
    pub(crate) async fn recover(&self) -> anyhow::Result<Duration> {
        let program = find("etcd", &[]).ok_or_else(|| anyhow!("etcd is gone"))?;
        let leader = self.leading_member().await?;
        let died = Instant::now();
        leader.stop();
        let mut random = Random::new(1, 1);
        loop {
            if died.elapsed() > START {
                bail!("no write was acknowledged for {} s", START.as_secs());
            }
            if let Ok((_, channel, _)) = find_leader(&self.members, Duration::from_millis(50)).await {
                self.lead_by(&channel);
                if self.once(Work::BlindWrite, 0, &mut random).await.is_ok() {
                    break;
                }
            }
        }
        let took = died.elapsed();
        leader.start(&program)?;
        sleep(Duration::from_secs(2)).await;
        Ok(took)
    }

    async fn leading_member(&self) -> anyhow::Result<&Member> {
        for member in &self.members {
            let Ok(channel) = member.channel() else { continue };
            if matches!(status(channel).await, Ok(status) if leads(&status)) {
                return Ok(member);
            }
        }
        bail!("no member leads")
    }

    fn channel(&self, client: usize) -> anyhow::Result<Channel> {
        let channels = self.leader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let index = (client / CLIENTS_A_CONNECTION).min(channels.len().saturating_sub(1));
        channels.get(index).cloned().context("no connection")
    }

    /// Once leaders have been killed there are no figures for many clients any more: one connection is enough.
    fn lead_by(&self, channel: &Channel) {
        *self.leader.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = vec![channel.clone()];
    }

    async fn range(&self, client: usize, key: Vec<u8>, serializable: bool) -> anyhow::Result<RangeResponse> {
        call(self.channel(client)?, "/etcdserverpb.KV/Range", RangeRequest { key, serializable }).await
    }

    async fn txn(&self, client: usize, request: TxnRequest) -> anyhow::Result<TxnResponse> {
        call(self.channel(client)?, "/etcdserverpb.KV/Txn", request).await
    }

    /// Reads rows and writes them if none of them changed meanwhile, until that is so.
    async fn read_and_write(
        &self,
        client: usize,
        keys: &[Vec<u8>],
        random: &mut Random,
    ) -> anyhow::Result<()> {
        for _ in 0..ATTEMPTS_MAX {
            let read = |key: &Vec<u8>| RequestOp {
                range: Some(RangeRequest { key: key.clone(), serializable: false }),
                put: None,
            };
            let success = keys.iter().map(read).collect();
            let found = self.txn(client, TxnRequest { compare: Vec::new(), success }).await?;
            let compare =
                keys.iter().zip(&found.responses).map(|(key, found)| unchanged(key, found)).collect();
            let success = keys.iter().map(|key| put(key.clone(), random)).collect();
            if self.txn(client, TxnRequest { compare, success }).await?.succeeded {
                return Ok(());
            }
        }
        bail!("lost against others {ATTEMPTS_MAX} times")
    }
}

impl System for Etcd {
    async fn once(&self, work: Work, client: usize, random: &mut Random) -> anyhow::Result<()> {
        let row = random.below(ROWS);
        match work {
            Work::BlindWrite => {
                let request = PutRequest { key: key(row), value: value(random) };
                call::<_, PutResponse>(self.channel(client)?, "/etcdserverpb.KV/Put", request).await.map(drop)
            }
            Work::ReadModifyWrite => self.read_and_write(client, &[key(row)], random).await,
            Work::Transfer => self.read_and_write(client, &[key(row), key(row + ROWS / 2)], random).await,
            Work::StrongRead | Work::Mix => found(&self.range(client, key(row), false).await?),
            Work::StaleRead => found(&self.range(client, key(row), true).await?),
        }
    }
}

impl Member {
    fn start(&self, program: &Path) -> anyhow::Result<()> {
        let mut command = Command::new(program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child: Child = command.spawn().context("etcd cannot be started")?;
        *self.slot() = Some(Guarded::new(child));
        Ok(())
    }

    fn stop(&self) {
        *self.slot() = None;
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Guarded>> {
        self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn channel(&self) -> anyhow::Result<Channel> {
        let endpoint = Endpoint::from_shared(self.client.clone()).context("an address of etcd")?;
        Ok(endpoint.connect_timeout(Duration::from_millis(200)).timeout(ANSWER).connect_lazy())
    }
}

async fn find_leader(members: &[Member], within: Duration) -> anyhow::Result<(&Member, Channel, String)> {
    let began = Instant::now();
    loop {
        for member in members {
            let channel = member.channel()?;
            if let Ok(Ok(status)) =
                tokio::time::timeout(Duration::from_millis(200), status(channel.clone())).await
                && leads(&status)
            {
                return Ok((member, channel, status.version));
            }
        }
        if began.elapsed() > within {
            bail!("etcd has no leader after {} s", within.as_secs_f64());
        }
        sleep(Duration::from_millis(10)).await;
    }
}

fn leads(status: &StatusResponse) -> bool {
    status.leader != 0 && status.header.as_ref().is_some_and(|header| header.member_id == status.leader)
}

async fn status(channel: Channel) -> anyhow::Result<StatusResponse> {
    call(channel, "/etcdserverpb.Maintenance/Status", StatusRequest {}).await
}

async fn call<Q, A>(channel: Channel, method: &'static str, request: Q) -> anyhow::Result<A>
where
    Q: prost::Message + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.context("etcd cannot be reached")?;
    let path = PathAndQuery::from_static(method);
    let answer = grpc.unary(tonic::Request::new(request), path, ProstCodec::<Q, A>::default()).await;
    Ok(answer.context("etcd refused")?.into_inner())
}

fn put(key: Vec<u8>, random: &mut Random) -> RequestOp {
    RequestOp { range: None, put: Some(PutRequest { key, value: value(random) }) }
}

fn unchanged(key: &[u8], found: &ResponseOp) -> Compare {
    let row = found.range.as_ref().and_then(|range| range.kvs.first());
    Compare { target: COMPARE_MOD, key: key.to_vec(), mod_revision: row.map_or(0, |row| row.mod_revision) }
}

fn found(response: &RangeResponse) -> anyhow::Result<()> {
    if response.kvs.is_empty() { Err(anyhow!("a row is missing")) } else { Ok(()) }
}

fn key(row: u64) -> Vec<u8> {
    format!("rows/{:08}", row % ROWS).into_bytes()
}
