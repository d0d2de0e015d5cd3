//! The node on a thread of its own: takes what has queued up, lets the node do it in one turn, and so has many commits
//! share one write of the log. Nothing else touches the node, and the node touches nothing else.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::watched::LONG;
use crate::{
    engine::Engine,
    group::NodeError,
    lease::NodeId,
    node::{Answer, Config, Node, Outlet, Refused, Request, TICK},
    truetime::{ClockError, Interval, TrueTime},
    wal::Disk,
};

/// Requests that were taken and not answered yet. Many wait for locks; above it a node only falls behind.
const UNANSWERED_MAX: usize = 16_384;
/// Of requests and parcels together, so that a flood of requests leaves room for what other nodes say.
const EVENTS_QUEUED_MAX: usize = UNANSWERED_MAX + 4096;
/// A request takes the room of one for so many bytes that it brings: 1 GiB in all.
const UNANSWERED_BYTES: usize = 64 << 10;
/// Taken into one turn: a turn's commits wait for each other.
const EVENTS_A_TURN_MAX: usize = 4096;
/// No more is taken into a turn that has this many bytes to write.
const TURN_BYTES: usize = 16 << 20;
/// While the clock has no bound: how often it is asked for one.
const CLOCK_PAUSE: Duration = Duration::from_millis(100);
/// How much faster or slower than a second a second of this machine can be, in parts of a million: what the kernel
/// itself assumes.
const DRIFT_PPM: u64 = 500;

/// What goes to other nodes. What cannot be sent is lost, and said again if it matters.
pub trait Post: Send {
    /// A message for another node.
    fn post(&mut self, to: NodeId, message: Bytes);
}

/// Why a request has no answer of the node's.
#[derive(Debug)]
pub enum Failed {
    /// The node says no.
    Refused(Refused),
    /// The node stops and has not taken the request.
    Stopping,
    /// The node has stopped and may or may not have done it.
    Lost,
}

enum Event {
    Request(Request, Waiter),
    Messages(NodeId, Vec<Bytes>),
    Meet(NodeId),
}

impl Event {
    /// What it may have the node write.
    fn bytes(&self) -> usize {
        match self {
            Self::Request(request, _) => request.bytes(),
            Self::Messages(_, messages) => messages.iter().map(Bytes::len).sum(),
            Self::Meet(_) => 0,
        }
    }
}

/// Whoever waits for an answer, and the room that it takes.
struct Waiter {
    answer: oneshot::Sender<Result<Answer, Refused>>,
    _room: OwnedSemaphorePermit,
}

/// What others hold of the thread.
#[derive(Clone)]
pub struct Handle {
    events: SyncSender<Event>,
    room: Arc<Semaphore>,
}

impl Handle {
    /// Asks the node.
    ///
    /// # Errors
    ///
    /// When it says no, or says nothing any more.
    pub async fn ask(&self, request: Request) -> Result<Answer, Failed> {
        let busy = Failed::Refused(Refused::Busy("too many requests are waiting"));
        let takes = u32::try_from(1 + request.bytes() / UNANSWERED_BYTES).unwrap_or(u32::MAX);
        let Ok(room) = Arc::clone(&self.room).try_acquire_many_owned(takes) else {
            return Err(busy);
        };
        let (answer, answered) = oneshot::channel();
        match self.events.try_send(Event::Request(request, Waiter { answer, _room: room })) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(busy),
            Err(TrySendError::Disconnected(_)) => return Err(Failed::Stopping),
        }
        answered.await.map_err(|_| Failed::Lost)?.map_err(Failed::Refused)
    }

    /// Tells the node what another one says. Lost where too much is waiting.
    pub fn hear(&self, from: NodeId, messages: Vec<Bytes>) {
        if let Err(TrySendError::Full(_)) = self.events.try_send(Event::Messages(from, messages)) {
            tracing::debug!(from = from.0, "too much is waiting: what another node says is lost");
        }
    }

    /// Tells the node that there is another one.
    pub fn meet(&self, other: NodeId) {
        // Too much is waiting: whoever speaks is known without it.
        let _full = self.events.try_send(Event::Meet(other));
    }
}

/// The thread.
pub struct Core {
    /// For whoever asks the node.
    pub handle: Handle,
    ended: oneshot::Receiver<Result<(), NodeError>>,
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Core {
    /// Starts the thread and opens the node on it. `opened` is told when the node is there.
    ///
    /// # Errors
    ///
    /// When there can be no thread.
    pub fn start<D: Disk + Send + 'static>(
        config: Config,
        disk: D,
        engine: Arc<dyn Engine>,
        clock: Arc<dyn TrueTime>,
        post: impl Post + 'static,
        opened: oneshot::Sender<()>,
    ) -> io::Result<Self> {
        let (events, queue) = sync_channel(EVENTS_QUEUED_MAX);
        let (end, ended) = oneshot::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::Builder::new().name("node".to_owned()).spawn(move || {
            let node = Node::open(config, disk, engine);
            let result = node.and_then(|node| {
                // Whoever waited for it may have gone.
                let _gone = opened.send(());
                let out = Out { post, waiting: HashMap::new() };
                Loop { node, queue, out, clock: Clock::new(clock), stop: told, next_token: 0 }.run()
            });
            let _gone = end.send(result);
        })?;
        let handle = Handle { events, room: Arc::new(Semaphore::new(UNANSWERED_MAX)) };
        Ok(Self { handle, ended, thread, stop })
    }

    /// When the thread ends, and why.
    ///
    /// # Errors
    ///
    /// When the node must not go on.
    pub async fn ended(&mut self) -> Result<(), Crash> {
        match (&mut self.ended).await {
            Ok(result) => result.map_err(Crash::Node),
            Err(_) => Err(Crash::Panic),
        }
    }

    /// Ends the thread: what was not answered by now never is.
    pub fn stop(self) {
        self.stop.store(true, Ordering::Release);
        let _panicked = self.thread.join();
    }
}

/// Why a node must stop.
#[derive(Debug, thiserror::Error)]
pub enum Crash {
    /// Its disk is in doubt.
    #[error("the node stops: what is on its disk is in doubt, and it will be read again at the next start")]
    Node(#[source] NodeError),
    /// It is wrong.
    #[error("the node stops: its thread panicked")]
    Panic,
}

/// What the node says, on its way to whom it is for.
struct Out<P> {
    post: P,
    waiting: HashMap<u64, Waiter>,
}

impl<P: Post> Outlet for Out<P> {
    fn send(&mut self, to: NodeId, message: Vec<u8>) {
        self.post.post(to, message.into());
    }

    fn answer(&mut self, token: u64, answer: Result<Answer, Refused>) {
        if let Some(waiter) = self.waiting.remove(&token) {
            // Whoever asked may have gone.
            let _gone = waiter.answer.send(answer);
        }
    }
}

struct Loop<D, P> {
    node: Node<D>,
    queue: Receiver<Event>,
    out: Out<P>,
    clock: Clock,
    stop: Arc<AtomicBool>,
    next_token: u64,
}

impl<D: Disk, P: Post> Loop<D, P> {
    fn run(mut self) -> Result<(), NodeError> {
        let mut tick = Instant::now();
        let mut events = Vec::new();
        // It is looked for at every tick at least.
        while !self.stop.load(Ordering::Acquire) {
            match self.queue.recv_timeout(self.idle_until(tick)) {
                Ok(event) => events.push(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            let mut bytes: usize = events.iter().map(Event::bytes).sum();
            while bytes < TURN_BYTES && events.len() < EVENTS_A_TURN_MAX {
                let Ok(event) = self.queue.try_recv() else { break };
                bytes += event.bytes();
                events.push(event);
            }
            let (began, taken) = (Instant::now(), events.len());
            // INVARIANT: the clock is read after everything was taken that is done by this reading: a commit's
            // timestamp must be at or after its arrival.
            let now = match self.clock.read() {
                Ok(now) => now,
                Err(why) => {
                    without_clock(&mut events, &why);
                    continue;
                }
            };
            for event in events.drain(..) {
                self.take(event, now);
            }
            if tick <= Instant::now() {
                self.node.tick(now);
                // Ticks that a slow disk swallowed are not made up for: others would take them for silence.
                tick = Instant::now() + TICK;
            }
            let clock = &self.clock;
            self.node.turn(&|| clock.read_or_guess(), &mut self.out)?;
            let took = began.elapsed();
            if took > LONG {
                tracing::warn!(?took, taken, "a turn took long: nobody was answered meanwhile");
            }
        }
        Ok(())
    }

    /// How long nothing is to be done unless somebody asks.
    fn idle_until(&self, tick: Instant) -> Duration {
        let idle = tick.saturating_duration_since(Instant::now());
        let Some(wake) = self.node.wake() else {
            return idle;
        };
        match self.clock.read() {
            Ok(now) => idle.min(Duration::from_nanos(wake.next().0.saturating_sub(now.earliest.0))),
            Err(_) => idle,
        }
    }

    fn take(&mut self, event: Event, now: Interval) {
        match event {
            Event::Request(request, waiter) => {
                let token = self.next_token;
                self.next_token += 1;
                self.out.waiting.insert(token, waiter);
                self.node.request(token, request, now);
            }
            Event::Messages(from, messages) => {
                for message in messages {
                    self.node.message(from, &message, now);
                }
            }
            Event::Meet(other) => self.node.meet(other),
        }
    }
}

/// A node that does not know what time it is does nothing at all, as if it were not there: whatever it did, it could do
/// under a lease that has ended.
fn without_clock(events: &mut Vec<Event>, why: &ClockError) {
    for event in events.drain(..) {
        if let Event::Request(_, waiter) = event {
            let _gone = waiter.answer.send(Err(Refused::NoClock(why.to_string())));
        }
    }
    thread::sleep(CLOCK_PAUSE);
}

/// The clock, and what it said last.
struct Clock {
    clock: Arc<dyn TrueTime>,
    last: std::cell::Cell<Option<(Interval, Instant)>>,
    failing: std::cell::Cell<bool>,
}

impl Clock {
    fn new(clock: Arc<dyn TrueTime>) -> Self {
        Self { clock, last: Default::default(), failing: Default::default() }
    }

    fn read(&self) -> Result<Interval, ClockError> {
        let result = self.clock.now();
        match &result {
            Ok(now) => {
                self.last.set(Some((*now, Instant::now())));
                if self.failing.replace(false) {
                    tracing::info!("the clock has a bound again");
                }
            }
            Err(error) => {
                if !self.failing.replace(true) {
                    tracing::error!(%error, "the clock has no bound: this node does nothing until it has");
                }
            }
        }
        result
    }

    /// Within a turn that a reading began: if the clock loses its bound now, the bound of that reading has grown by what
    /// the machine can have drifted since.
    fn read_or_guess(&self) -> Interval {
        if let Ok(now) = self.clock.now() {
            return now;
        }
        let (last, at) = self.last.get().unwrap_or_else(|| (NO_TIME, Instant::now()));
        let passed = at.elapsed();
        let drift = Duration::from_nanos(
            u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX).saturating_mul(DRIFT_PPM) / 1_000_000 + 1,
        );
        Interval {
            earliest: last.earliest.plus(passed.saturating_sub(drift)),
            latest: last.latest.plus(passed + drift),
        }
    }
}

/// Nothing is known: nothing has passed, and everything may have.
const NO_TIME: Interval =
    Interval { earliest: crate::truetime::Timestamp::ZERO, latest: crate::truetime::Timestamp::MAX };

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::truetime::{Fixed, Timestamp};

    /// A clock that can lose its bound.
    struct Broken(Mutex<bool>);

    impl TrueTime for Broken {
        fn now(&self) -> Result<Interval, ClockError> {
            if *self.0.lock().unwrap() {
                return Err(ClockError::Unsynchronised);
            }
            Fixed::new(Duration::from_millis(1)).now()
        }
    }

    #[test]
    fn a_bound_lost_within_a_turn_grows_from_the_last_one() {
        let broken = Arc::new(Broken(Mutex::new(false)));
        let clock = Clock::new(Arc::clone(&broken) as Arc<dyn TrueTime>);
        let before = clock.read().unwrap();
        *broken.0.lock().unwrap() = true;
        thread::sleep(Duration::from_millis(5));
        let guess = clock.read_or_guess();
        assert!(
            guess.earliest > before.earliest && guess.latest > before.latest.plus(Duration::from_millis(5))
        );
        let width = |interval: Interval| interval.latest.0 - interval.earliest.0;
        assert!(width(guess) > width(before));
        assert!(clock.read().is_err());
    }

    #[test]
    fn without_any_reading_everything_is_possible() {
        let clock = Clock::new(Arc::new(Broken(Mutex::new(true))));
        let guess = clock.read_or_guess();
        assert_eq!(guess.latest, Timestamp::MAX);
        assert!(guess.earliest < Timestamp(1_000_000_000));
    }
}
