//! One client's connection: requests to the broker, answers back, both at once and each in its order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::{Buf, Bytes, BytesMut};
use identity::clock::SharedClock;
use kafka_protocol::messages::ApiKey;
use policy::{Caller, KafkaAction, Permit, Recorder, ServicePolicy};
use thiserror::Error;
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, ReadHalf,
    WriteHalf, split,
};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::apis::{self, Api};
use super::judge::{Guard, Unjudged};
use super::records::SPLICED_HEAD_BYTES;
use super::stats::{KafkaStats, Outcome};
use super::step::{self, Answer, Asked, Step, Stop};
use super::wire::{HEAD_BYTES, Head, LENGTH_BYTES, MAX_DECODED_ANSWER_BYTES, Malformed};
use crate::live::Traffic;
use crate::sample::Sampler;
use crate::tcp::copy::{IDLE_TIMEOUT, STALL_LEAST_BYTES, STALL_WINDOW};
use crate::trace::SharedRandom;

/// Requests of one connection that wait for their answers; a client that sends more waits.
const MAX_PENDING: usize = 128;
/// The time that a frame may take to come, and its first [`FIRST_BYTES`] by themselves: what clients give a whole request
/// by default.
const FRAME_TIMEOUT: Duration = Duration::from_secs(30);
/// Of a frame, room is made for so much before any of it has come.
const FIRST_BYTES: usize = 64 * 1024;
/// All connections' frames together, but for the first [`FIRST_BYTES`] of each; more wait.
const MAX_FRAMES_BYTES: usize = 64 << 20;
/// Read from a client at once where it is a head that is waited for; what is larger is read into its place.
const HEADS_BYTES: usize = 4 * 1024;
/// Read from a broker at once.
const RELAYED_BYTES: usize = 16 * 1024;

/// What all connections to one app share.
pub struct KafkaInbound {
    policy: Arc<ArcSwap<ServicePolicy>>,
    recorder: Arc<dyn Recorder>,
    sampler: Arc<Sampler>,
    stats: KafkaStats,
    clock: SharedClock,
    random: SharedRandom,
    access_log: bool,
    /// Room for large frames, in pieces of [`FIRST_BYTES`].
    room: Semaphore,
}

/// Why a connection ended before its client closed it.
#[derive(Debug, Error)]
pub enum KafkaError {
    /// One side failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What the client sent.
    #[error("the client sent {0}")]
    Request(#[source] Malformed),
    /// What the broker sent.
    #[error("the broker sent {0}")]
    Answer(#[source] Malformed),
    /// A request could not be judged.
    #[error("{0}")]
    Unjudged(#[from] Unjudged),
    /// A request without an answer was denied, which brokers tell so.
    #[error("a request that is not answered was denied")]
    Denied,
    /// What was to be read may not be read any more.
    #[error("a policy that came meanwhile denies what was asked for")]
    Overtaken,
    /// The broker closed it.
    #[error("the broker closed the connection")]
    Closed,
    /// Nothing moved, or a frame did not arrive whole.
    #[error("nothing was sent for too long")]
    TimedOut,
    /// The client takes its answers too slowly.
    #[error("the reader takes less than 1 KiB a second")]
    Stalled,
}

/// A request whose answer is due.
struct Pending {
    head: Head,
    api: &'static str,
    since: Duration,
    /// Whoever judged it.
    policy: Arc<ServicePolicy>,
    due: Due,
}

enum Due {
    /// Made here.
    Made(Bytes),
    /// From the broker.
    Broker(Answer),
}

/// The two ends of a connection.
#[derive(Debug)]
pub struct Ends<M, A> {
    /// Where requests come from.
    pub client: M,
    /// Where they go.
    pub broker: A,
}

impl KafkaInbound {
    /// Connections that are judged by the policy in force, whichever it is when a request comes.
    pub fn new(
        policy: Arc<ArcSwap<ServicePolicy>>,
        recorder: Arc<dyn Recorder>,
        stats: KafkaStats,
        clock: SharedClock,
        random: SharedRandom,
        access_log: bool,
    ) -> Self {
        let (sampler, room) = (Arc::default(), Semaphore::new(MAX_FRAMES_BYTES / FIRST_BYTES));
        Self { policy, recorder, sampler, stats, clock, random, access_log, room }
    }

    /// Serves one connection until its client closes it.
    ///
    /// # Errors
    /// Anything else that ends it.
    pub async fn serve<M, A>(
        &self,
        ends: Ends<M, A>,
        caller: Caller,
        connected: &Permit,
        traffic: &Traffic,
    ) -> Result<(), KafkaError>
    where
        M: AsyncRead + AsyncWrite + Unpin,
        A: AsyncRead + AsyncWrite + Unpin,
    {
        let guard = Guard {
            caller,
            policy: Arc::clone(&self.policy),
            recorder: Arc::clone(&self.recorder),
            sampler: Arc::clone(&self.sampler),
            stats: self.stats.clone(),
            clock: self.clock.clone(),
            random: Arc::clone(&self.random),
            access_log: self.access_log,
        };
        let (from_client, to_client) = split(ends.client);
        let (from_broker, to_broker) = split(ends.broker);
        let (sender, receiver) = channel(MAX_PENDING);
        let requests = self.requests(from_client, to_broker, sender, &guard, connected, traffic);
        let answers = self.answers(from_broker, to_client, receiver, &guard, traffic);
        tokio::try_join!(Box::pin(requests), Box::pin(answers)).map(drop)
    }

    /// Requests, one after the other, until the client has no more.
    async fn requests<M: AsyncRead, A: AsyncWrite>(
        &self,
        from_client: ReadHalf<M>,
        mut to_broker: WriteHalf<A>,
        pending: Sender<Pending>,
        guard: &Guard,
        connected: &Permit,
        traffic: &Traffic,
    ) -> Result<(), KafkaError> {
        let mut from_client = BufReader::with_capacity(HEADS_BYTES, from_client);
        loop {
            // Nothing is read that would have to wait here for its place.
            let place = pending.reserve().await.map_err(|_| KafkaError::Closed)?;
            let next = self.next_request(&mut from_client, guard).await?;
            let Some((api, frame, room)) = next else { return Ok(()) };
            traffic.forward_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
            let judging = guard.judging(api.name);
            let (since, policy) = (self.clock.now(), Arc::clone(&judging.policy));
            let waits = |head, due| place.send(Pending { head, api: api.name, since, policy, due });
            let message = frame.slice(LENGTH_BYTES..);
            let (_, version, correlation) = Head::peek(&message).map_err(KafkaError::Request)?;
            if !api.takes(version) {
                // The one request that a client makes before it knows what is understood.
                let made = apis::unsupported(correlation).map_err(KafkaError::Request)?;
                waits(Head::of(api.key, 0, correlation), Due::Made(made));
                continue;
            }
            let understood = Head::decode(api.key, version, &message).map_err(Stop::from);
            let step = understood.and_then(|(head, message)| {
                let asked =
                    Asked { judging: &judging, head: &head, frame: &frame, message: &message, connected };
                step::judged(&asked).map(|step| (head, step))
            });
            match step {
                Ok((head, Step::Forward { by, frame, answer })) => {
                    self.stats.request(api.name, Outcome::Forwarded);
                    if !matches!(answer, Answer::Nothing) {
                        waits(head, Due::Broker(answer));
                    }
                    self.forward(&by, &mut to_broker, &frame).await?;
                }
                Ok((head, Step::Answered(made))) => {
                    self.stats.request(api.name, Outcome::Denied);
                    waits(head, Due::Made(made));
                }
                Ok((_, Step::Close)) => {
                    self.stats.request(api.name, Outcome::Denied);
                    return Err(KafkaError::Denied);
                }
                Err(Stop::Malformed(malformed)) => {
                    return Err(self.refused(guard, api.name, "kafka.request", malformed)?);
                }
                Err(Stop::Unjudged(unjudged)) => return Err(unjudged.into()),
            }
            drop(room);
        }
    }

    /// Passes a request on, by leave.
    async fn forward<A: AsyncWrite>(
        &self,
        _permit: &Permit,
        to_broker: &mut WriteHalf<A>,
        frame: &Bytes,
    ) -> Result<(), KafkaError> {
        self.write(to_broker, frame).await?;
        self.in_time(STALL_WINDOW, KafkaError::Stalled, to_broker.flush()).await
    }

    /// The next frame, with its length, if it is one of a request that is understood.
    async fn next_request<R: AsyncRead + Unpin>(
        &self,
        from: &mut BufReader<R>,
        guard: &Guard,
    ) -> Result<Option<(&'static Api, Bytes, Option<SemaphorePermit<'_>>)>, KafkaError> {
        let next = async { from.fill_buf().await.map(<[u8]>::is_empty) };
        if self.in_time(IDLE_TIMEOUT, KafkaError::TimedOut, next).await? {
            return Ok(None);
        }
        let mut head = [0; LENGTH_BYTES + HEAD_BYTES];
        self.in_time(FRAME_TIMEOUT, KafkaError::TimedOut, from.read_exact(&mut head)).await?;
        let length = (&mut head.as_slice()).get_i32();
        let peeked = Head::peek(head.get(LENGTH_BYTES..).unwrap_or_default());
        let (key, version, _) = peeked.map_err(KafkaError::Request)?;
        let Some(api) = Api::of(key) else {
            return Err(self.refused(guard, "unknown", "kafka.api", Malformed::Api(key))?);
        };
        let fits = usize::try_from(length).ok();
        let fits = fits.filter(|length| (HEAD_BYTES..=api.max_bytes()).contains(length));
        let Some(length) = fits else {
            return Err(self.refused(guard, api.name, "kafka.length", Malformed::Length(length))?);
        };
        if !api.takes(version) && api.key != ApiKey::ApiVersions {
            let malformed = Malformed::Version { api: api.key, version };
            return Err(self.refused(guard, api.name, "kafka.version", malformed)?);
        }
        let whole = LENGTH_BYTES + length;
        let first = whole.min(FIRST_BYTES);
        let mut frame = BytesMut::with_capacity(first);
        frame.extend_from_slice(&head);
        self.fill(from, &mut frame, first).await?;
        if first == whole {
            return Ok(Some((api, frame.freeze(), None)));
        }
        let pieces = u32::try_from((whole - first).div_ceil(FIRST_BYTES)).unwrap_or(u32::MAX);
        // Never closed, and no frame is larger than all of it.
        let room = self.room.acquire_many(pieces).await.map_err(io::Error::other)?;
        frame.reserve(whole - first);
        self.fill(from, &mut frame, whole).await?;
        Ok(Some((api, frame.freeze(), Some(room))))
    }

    /// Reads until there are so many bytes.
    async fn fill<R: AsyncRead + Unpin>(
        &self,
        from: &mut BufReader<R>,
        frame: &mut BytesMut,
        length: usize,
    ) -> Result<(), KafkaError> {
        self.in_time(FRAME_TIMEOUT, KafkaError::TimedOut, async {
            while frame.len() < length {
                let left = (length - frame.len()) as u64;
                if (&mut *from).take(left).read_buf(frame).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Ok(())
        })
        .await
    }

    /// Notes that a request is not understood.
    fn refused(
        &self,
        guard: &Guard,
        api: &'static str,
        rule: &'static str,
        malformed: Malformed,
    ) -> Result<KafkaError, KafkaError> {
        self.stats.request(api, Outcome::Refused);
        guard.judging(api).refuse(rule, malformed.to_string(), "")?;
        Ok(KafkaError::Request(malformed))
    }

    /// Answers in the order of their requests, until there are no more of those.
    async fn answers<A: AsyncRead, M: AsyncWrite>(
        &self,
        from_broker: ReadHalf<A>,
        mut to_client: WriteHalf<M>,
        mut pending: Receiver<Pending>,
        guard: &Guard,
        traffic: &Traffic,
    ) -> Result<(), KafkaError> {
        let mut from_broker = BufReader::with_capacity(RELAYED_BYTES, from_broker);
        loop {
            let next = tokio::select! {
                biased;
                next = pending.recv() => next,
                early = from_broker.fill_buf() => {
                    let nothing = early?.is_empty();
                    // An answer may be here before what waits for it is: it was put in order before it was passed on.
                    match pending.try_recv() {
                        Ok(next) => Some(next),
                        Err(_) if nothing => return Err(KafkaError::Closed),
                        Err(_) => return Err(KafkaError::Answer(Malformed::message("answer", "to no request"))),
                    }
                }
            };
            let Some(request) = next else { break };
            let (api, since) = (request.api, request.since);
            let sent = match request.due {
                Due::Made(answer) => {
                    self.write(&mut to_client, &answer).await?;
                    answer.len() as u64
                }
                Due::Broker(answer) => {
                    let asked = Waited { head: request.head, policy: request.policy, api };
                    self.answer(&mut from_broker, &mut to_client, asked, answer, guard).await?
                }
            };
            traffic.back_bytes.fetch_add(sent, Ordering::Relaxed);
            self.stats.answered(api, self.clock.now().saturating_sub(since));
            if pending.is_empty() {
                self.in_time(STALL_WINDOW, KafkaError::Stalled, to_client.flush()).await?;
            }
        }
        self.in_time(STALL_WINDOW, KafkaError::Stalled, to_client.shutdown()).await
    }

    /// One answer of the broker's, and how many bytes of it went to the client.
    async fn answer<A: AsyncRead + Unpin, M: AsyncWrite>(
        &self,
        from: &mut BufReader<A>,
        to: &mut WriteHalf<M>,
        asked: Waited,
        answer: Answer,
        guard: &Guard,
    ) -> Result<u64, KafkaError> {
        let mut length = [0; LENGTH_BYTES];
        let arrived = async { from.read_exact(&mut length).await.map(drop) };
        self.in_time(IDLE_TIMEOUT, KafkaError::TimedOut, arrived).await?;
        let announced = i32::from_be_bytes(length);
        let length = usize::try_from(announced).ok().filter(|length| *length >= 4);
        let length = length.ok_or(KafkaError::Answer(Malformed::Length(announced)))?;
        let splice = match answer {
            Answer::Changed(change) => {
                if length > MAX_DECODED_ANSWER_BYTES {
                    return Err(KafkaError::Answer(Malformed::Length(announced)));
                }
                let frame = self.read(from, length).await?;
                let changed = change(&guard.judging(asked.api), &frame).map_err(|stop| match stop {
                    Stop::Malformed(malformed) => KafkaError::Answer(malformed),
                    Stop::Unjudged(unjudged) => KafkaError::Unjudged(unjudged),
                })?;
                self.write(to, &changed).await?;
                return Ok(changed.len() as u64);
            }
            Answer::Records { read, splice } => {
                // A client may have waited long for these.
                let judging = guard.judging(asked.api);
                let overtaken = !Arc::ptr_eq(&judging.policy, &asked.policy);
                if overtaken && !judging.still(KafkaAction::Consume, &read)? {
                    return Err(KafkaError::Overtaken);
                }
                splice
            }
            Answer::Spliced(splice) => Some(splice),
            Answer::AsItIs | Answer::Nothing => None,
        };
        let start = self.read(from, length.min(SPLICED_HEAD_BYTES)).await?;
        let found = (&start[..]).try_get_i32().unwrap_or_default();
        if found != asked.head.correlation {
            let wanted = asked.head.correlation;
            return Err(KafkaError::Answer(Malformed::Correlation { wanted, found }));
        }
        let mut sent = 0;
        let rest = match splice {
            Some(splice) => {
                let (head, read) = splice.head(length, &start).map_err(KafkaError::Answer)?;
                self.write(to, &head).await?;
                sent += head.len();
                start.slice(read..)
            }
            None => {
                self.write(to, &announced.to_be_bytes()).await?;
                sent += LENGTH_BYTES;
                start.clone()
            }
        };
        self.write(to, &rest).await?;
        self.relay(from, to, length - start.len()).await?;
        Ok((sent + rest.len() + length - start.len()) as u64)
    }

    async fn read<R: AsyncRead + Unpin>(
        &self,
        from: &mut BufReader<R>,
        length: usize,
    ) -> Result<Bytes, KafkaError> {
        let mut frame = BytesMut::with_capacity(length.min(FIRST_BYTES));
        self.fill(from, &mut frame, length).await?;
        Ok(frame.freeze())
    }

    /// Bytes that nobody looks at.
    async fn relay<R: AsyncRead + Unpin, W: AsyncWrite>(
        &self,
        from: &mut BufReader<R>,
        to: &mut WriteHalf<W>,
        length: usize,
    ) -> Result<(), KafkaError> {
        let mut left = length;
        while left > 0 {
            let chunk = self.in_time(FRAME_TIMEOUT, KafkaError::TimedOut, from.fill_buf()).await?;
            let chunk = chunk.get(..chunk.len().min(left)).unwrap_or_default();
            if chunk.is_empty() {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let count = chunk.len();
            self.write(to, chunk).await?;
            from.consume(count);
            left -= count;
        }
        Ok(())
    }

    /// Writes, to a reader that takes at least [`STALL_LEAST_BYTES`] in [`STALL_WINDOW`].
    async fn write<W: AsyncWrite>(&self, to: &mut WriteHalf<W>, bytes: &[u8]) -> Result<(), KafkaError> {
        for piece in bytes.chunks(STALL_LEAST_BYTES as usize) {
            self.in_time(STALL_WINDOW, KafkaError::Stalled, to.write_all(piece)).await?;
        }
        Ok(())
    }

    async fn in_time<T>(
        &self,
        time: Duration,
        late: KafkaError,
        work: impl Future<Output = io::Result<T>>,
    ) -> Result<T, KafkaError> {
        tokio::select! {
            biased;
            done = work => Ok(done?),
            // Begun only where there is something to wait for.
            () = async { self.clock.sleep(time).await } => Err(late),
        }
    }
}

/// What is known of a request whose answer comes from the broker.
struct Waited {
    head: Head,
    policy: Arc<ServicePolicy>,
    api: &'static str,
}
