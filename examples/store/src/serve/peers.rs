//! What nodes say to each other: one stream of parcels to each other node, and those that come in. Nothing here is
//! certain to arrive; consensus says again what matters.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use store_client::{
    Reason,
    proto::{
        self, HelloRequest, HelloResponse, Parcel, TalkResponse, peers_client::PeersClient,
        peers_server::Peers,
    },
};
use tokio::{sync::Notify, time::Instant};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint},
};

use super::{
    Shared,
    core::Post,
    identity::{Addresses, Standing, number},
    status::refusal,
};
use crate::lease::NodeId;

/// Of messages in a parcel, and of a part of one that is larger: parcels go one behind another, heartbeats among them.
const PARCEL_BYTES: usize = 1 << 20;
/// Of messages, of a part, and of what is around them.
pub(super) const PARCEL_BYTES_MAX: usize = 4 * PARCEL_BYTES;
/// The largest message is a snapshot of a split: all of its versions.
const MESSAGE_BYTES_MAX: usize = 512 << 20;
/// What waits for a peer that takes nothing. The oldest goes first: it is said again.
const QUEUED_BYTES_MAX: usize = 128 << 20;
const QUEUED_MESSAGES_MAX: usize = 16_384;
/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(1);
/// Between two tries to connect, at first and at most: a peer that comes back is to be heard within an election.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// A connection over which nothing comes is asked whether it is alive so often, and given up after as long.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// To one Hello.
const HELLO: Duration = Duration::from_secs(1);

/// What waits to be said to one peer.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    some: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    messages: VecDeque<(NodeId, Bytes)>,
    bytes: usize,
    /// Messages that go in parts, what is left of each.
    large: VecDeque<(NodeId, Bytes)>,
    large_bytes: usize,
}

impl Queue {
    fn push(&self, to: NodeId, message: Bytes) {
        let mut waiting = self.waiting();
        if message.len() > PARCEL_BYTES {
            // A later one would wait behind what is said again by the time that it goes.
            if waiting.large_bytes + message.len() <= MESSAGE_BYTES_MAX {
                waiting.large_bytes += message.len();
                waiting.large.push_back((to, message));
                self.some.notify_one();
            }
            return;
        }
        waiting.bytes += message.len();
        waiting.messages.push_back((to, message));
        while waiting.bytes > QUEUED_BYTES_MAX || waiting.messages.len() > QUEUED_MESSAGES_MAX {
            let Some((_, oldest)) = waiting.messages.pop_front() else { break };
            waiting.bytes -= oldest.len();
        }
        drop(waiting);
        self.some.notify_one();
    }

    /// As many messages as make a parcel, and a part of a large one, all for one node.
    async fn parcel(&self, from: NodeId) -> Parcel {
        loop {
            let some = self.some.notified();
            if let Some(parcel) = self.waiting().parcel(from) {
                return parcel;
            }
            some.await;
        }
    }

    fn clear(&self) {
        *self.waiting() = Waiting::default();
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn parcel(&mut self, from: NodeId) -> Option<Parcel> {
        let (to, _) = *self.messages.front().or(self.large.front())?;
        let mut bytes = 0;
        let mut messages = Vec::new();
        while let Some((_, next)) = self.messages.front().filter(|(other, _)| *other == to)
            && bytes + next.len() <= PARCEL_BYTES
        {
            bytes += next.len();
            messages.extend(self.messages.pop_front().map(|(_, message)| message));
        }
        self.bytes -= bytes;
        let (part, last) = self.part(to).map_or((None, false), |(part, last)| (Some(part), last));
        Some(Parcel { from: from.0, to: to.0, messages, part, last })
    }

    /// The next part of a large message for `to`, and whether it is the last.
    fn part(&mut self, to: NodeId) -> Option<(Bytes, bool)> {
        let (_, left) = self.large.front_mut().filter(|(other, _)| *other == to)?;
        let part = left.split_to(left.len().min(PARCEL_BYTES));
        let last = left.is_empty();
        if last {
            self.large.pop_front();
        }
        self.large_bytes -= part.len();
        Some((part, last))
    }
}

/// Where the node puts what it says to others.
pub(super) struct Outgoing {
    queues: BTreeMap<u64, Arc<Queue>>,
}

impl Post for Outgoing {
    fn post(&mut self, to: NodeId, message: Bytes) {
        match self.queues.get(&number(to)) {
            Some(queue) if message.len() <= MESSAGE_BYTES_MAX => queue.push(to, message),
            Some(_) => tracing::error!(to = to.0, bytes = message.len(), "a message is too large to be sent"),
            None => tracing::debug!(to = to.0, "a message is for a node that is not configured"),
        }
    }
}

/// The streams to all other nodes, to be run until the node stops.
pub(super) fn outgoing(
    me: NodeId,
    addresses: &Addresses,
) -> (Outgoing, Vec<impl Future<Output = ()> + Send + use<>>) {
    let mut queues = BTreeMap::new();
    let mut streams = Vec::new();
    for (number, address) in addresses.iter().filter(|(other, _)| *other != number(me)) {
        let queue = Arc::new(Queue::default());
        streams.push(keep_talking(me, address.to_owned(), Arc::clone(&queue)));
        queues.insert(number, queue);
    }
    (Outgoing { queues }, streams)
}

async fn keep_talking(me: NodeId, address: String, queue: Arc<Queue>) {
    let mut pause = PAUSE_MIN;
    let mut said = None;
    loop {
        let began = Instant::now();
        match talk(me, &address, &queue).await {
            Ok(()) => {}
            Err(error) => {
                let error = chain(error.as_ref());
                // Each thing that goes wrong is said once, not with every try.
                if said.as_ref() != Some(&error) {
                    tracing::info!(%address, %error, "another node cannot be talked to");
                }
                said = Some(error);
            }
        }
        // A connection says nothing of whether the node is there, or hears this one: it may be a sidecar's.
        if began.elapsed() > PAUSE_MAX {
            pause = PAUSE_MIN;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
        // By now it is old, and is said again.
        queue.clear();
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// One stream, until it breaks.
async fn talk(me: NodeId, address: &str, queue: &Arc<Queue>) -> Result<(), BoxError> {
    let mut peer = client(connect(address).await?);
    tracing::debug!(%address, "talks to another node");
    let queue = Arc::clone(queue);
    let parcels = futures::stream::unfold(queue, move |queue| async move {
        let parcel = queue.parcel(me).await;
        Some((parcel, queue))
    });
    peer.talk(parcels).await?;
    Ok(())
}

async fn connect(address: &str) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(super::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(super::CONNECTION_WINDOW_BYTES)
        .connect()
        .await
}

fn client(channel: Channel) -> PeersClient<Channel> {
    PeersClient::new(channel)
        .max_encoding_message_size(PARCEL_BYTES_MAX)
        .max_decoding_message_size(PARCEL_BYTES_MAX)
}

/// Who the node at `address` says to be.
pub(super) async fn hello(address: &str, me: Option<NodeId>) -> Result<HelloResponse, BoxError> {
    let request = HelloRequest { node: me.map_or(0, |me| me.0) };
    let asked = async { Ok(client(connect(address).await?).hello(request).await?.into_inner()) };
    tokio::time::timeout(HELLO, asked).await.unwrap_or_else(|_| Err("no answer in time".into()))
}

pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words: Vec<String> = Vec::new();
    for error in std::iter::successors(Some(error), |error| error.source()) {
        let next = match error.downcast_ref::<Status>() {
            Some(status) => status.message().to_owned(),
            None => error.to_string(),
        };
        if words.last().is_none_or(|last| !last.contains(&next)) {
            words.push(next);
        }
    }
    words.join(": ")
}

/// What other nodes ask of this one.
pub(super) struct Incoming {
    pub(super) shared: Arc<Shared>,
}

#[tonic::async_trait]
impl Peers for Incoming {
    async fn talk(&self, request: Request<Streaming<Parcel>>) -> Result<Response<TalkResponse>, Status> {
        let mut parcels = request.into_inner();
        let mut parts = Parts::default();
        let stopping = self.shared.stopping.clone();
        loop {
            let parcel = tokio::select! {
                biased;
                () = stopping.cancelled() => break,
                parcel = parcels.message() => parcel?,
            };
            match parcel {
                Some(parcel) => self.hear(parcel, &mut parts)?,
                None => break,
            }
        }
        Ok(Response::new(TalkResponse {}))
    }

    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        let node = request.into_inner().node;
        if node != 0 {
            check_current(&self.shared, NodeId(node))?;
        }
        Ok(Response::new(self.shared.identity.hello()))
    }
}

/// The parts of a large message that have come.
#[derive(Default)]
struct Parts(BytesMut);

impl Parts {
    /// The message, when this is its last part.
    fn add(&mut self, part: &[u8], last: bool) -> Result<Option<Bytes>, Status> {
        if self.0.len() + part.len() > MESSAGE_BYTES_MAX {
            return Err(refusal(Reason::TooMuch, format!("a message is over {MESSAGE_BYTES_MAX} bytes")));
        }
        self.0.extend_from_slice(part);
        Ok(last.then(|| std::mem::take(&mut self.0).freeze()))
    }
}

impl Incoming {
    fn hear(&self, mut parcel: Parcel, parts: &mut Parts) -> Result<(), Status> {
        let (from, to) = (NodeId(parcel.from), NodeId(parcel.to));
        let own = &self.shared.number;
        if number(to) != *own {
            let message = format!("this is node {own}, and not {}: see where it is to be asked", number(to));
            return Err(refusal(Reason::Malformed, message));
        }
        check_current(&self.shared, from)?;
        if let Some(part) = &parcel.part {
            parcel.messages.extend(parts.add(part, parcel.last)?);
        }
        // What is for another disk of this node's is for nobody: consensus goes on without it until it is replaced.
        if let Some(running) = self.shared.running()
            && running.id == to
        {
            running.handle.hear(from, parcel.messages);
        }
        Ok(())
    }
}

fn check_current(shared: &Shared, node: NodeId) -> Result<(), Status> {
    if shared.addresses.of(node).is_none() || number(node) == shared.number {
        let message = format!("node {} is none of the others that are configured here", number(node));
        return Err(refusal(Reason::Malformed, message));
    }
    match shared.standing(node) {
        Ok(Standing::Known | Standing::New) => Ok(()),
        Ok(Standing::Implausible) => {
            let message = format!("node {} cannot have had as many disks as {node:?} says", number(node));
            Err(refusal(Reason::Malformed, message))
        }
        Ok(Standing::Replaced) => {
            let message = format!(
                "node {} has lost the disk that it had as {node:?}, and is another one now",
                number(node)
            );
            Err(refusal(Reason::Malformed, message))
        }
        Err(error) => {
            tracing::error!(%error, "who is heard of cannot be kept");
            Err(refusal(Reason::Internal, "this node's disk fails"))
        }
    }
}

/// All numbers that this node knows, for [`proto::ListSplitsResponse`].
pub(super) fn nodes(shared: &Shared, mentioned: impl Iterator<Item = NodeId>) -> Vec<proto::NodeInfo> {
    let newest = shared.identity.newest().into_values();
    let mut ids: Vec<_> = mentioned.chain(newest).collect();
    ids.sort();
    ids.dedup();
    let info = |id: NodeId| {
        let address = shared.addresses.of(id)?.to_owned();
        Some(proto::NodeInfo { id: id.0, address })
    };
    ids.into_iter().filter_map(info).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(parcel: &Parcel) -> Vec<usize> {
        parcel.messages.iter().map(Bytes::len).collect()
    }

    #[tokio::test]
    async fn parcels_have_what_waits_for_one_node_and_large_messages_go_in_parts() {
        let queue = Queue::default();
        let large = Bytes::from_iter((0..PARCEL_BYTES * 2 + 7).map(|place| place as u8));
        queue.push(NodeId(2), large.clone());
        for (to, size) in [(2, 10), (2, 20), (65538, 30), (65538, 40)] {
            queue.push(NodeId(to), vec![0; size].into());
        }
        let mut parcels = Vec::new();
        for _ in 0..4 {
            parcels.push(queue.parcel(NodeId(1)).await);
        }
        assert_eq!(parcels.iter().map(|parcel| parcel.to).collect::<Vec<_>>(), [2, 65538, 2, 2]);
        assert_eq!(
            parcels.iter().map(sizes).collect::<Vec<_>>(),
            [vec![10, 20], vec![30, 40], vec![], vec![]]
        );
        let left = std::mem::take(&mut *queue.waiting());
        assert_eq!((left.bytes, left.large_bytes), (0, 0));
        let mut parts = Parts::default();
        let mut whole = Vec::new();
        for parcel in &parcels {
            assert!(parcel.part.as_ref().map_or(0, Bytes::len) <= PARCEL_BYTES);
            whole.extend(parcel.part.iter().filter_map(|part| parts.add(part, parcel.last).unwrap()));
        }
        assert_eq!(whole, [large]);
    }

    #[test]
    fn parts_without_an_end_are_refused() {
        let mut parts = Parts::default();
        let part = vec![0; 64 << 20];
        assert!((0..8).all(|_| parts.add(&part, false).is_ok()));
        assert!(parts.add(&part, false).is_err());
    }

    #[tokio::test]
    async fn the_oldest_goes_when_too_much_waits() {
        let queue = Queue::default();
        for size in 0..=QUEUED_MESSAGES_MAX {
            queue.push(NodeId(2), vec![0; size % 2].into());
        }
        assert_eq!(queue.waiting().messages.len(), QUEUED_MESSAGES_MAX);
        assert_eq!(queue.waiting().messages.front().unwrap().1.len(), 1);
        for _ in 0..4 {
            queue.push(NodeId(2), vec![0; MESSAGE_BYTES_MAX / 2].into());
        }
        assert!(queue.waiting().large_bytes <= MESSAGE_BYTES_MAX);
        assert!(queue.waiting().bytes <= QUEUED_BYTES_MAX);
    }

    #[tokio::test]
    async fn whoever_waits_for_a_parcel_hears_of_it() {
        let queue = Arc::new(Queue::default());
        let waits = queue.parcel(NodeId(1));
        let says = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            queue.push(NodeId(2), Bytes::from_static(b"x"));
        };
        let (parcel, ()) = tokio::join!(waits, says);
        assert_eq!(parcel.messages, [Bytes::from_static(b"x")]);
    }
}
