//! `/debug/tap`: requests as they end, for whoever looks on.
//!
//! A stream of lines, one a request, as the access log has them. The queue to a reader is bounded: one who is
//! slow loses records, and hears how many by `{"lost":N}`; a request waits for nobody. An empty line every
//! [`HEARTBEAT`] says that there is nothing to say, and finds out whether anybody is still there.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use futures::stream;
use http_body::Frame;
use http_body_util::StreamBody;
use identity::Scope;
use identity::clock::SharedClock;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use thiserror::Error;
use tokio::sync::mpsc;
use url::form_urlencoded;

use crate::access::{self, Finished};
use crate::{Body, BoxError};

/// Readers at once: each costs every request a look at its filter.
const MAX_READERS: usize = 4;
/// Records waiting for one reader: a tenth of a second of a busy sidecar, at most 10 MiB.
const MAX_WAITING_RECORDS: usize = 1024;
/// Records sent in one piece.
const RECORDS_A_PIECE: usize = 64;
/// Longest pattern; the longest SPIFFE ID is 2048 bytes (SPIFFE-ID standard §2.3).
const MAX_PATTERN_BYTES: usize = 2048;
/// How long a reader hears nothing.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Shows requests to those who look on.
#[derive(Debug, Default)]
pub struct Tap {
    open: AtomicUsize,
    readers: ArcSwap<Vec<Arc<Reader>>>,
    /// Held by whoever changes `readers`.
    changing: Mutex<()>,
    lost: Counter,
}

#[derive(Debug)]
struct Reader {
    filter: Filter,
    records: mpsc::Sender<Bytes>,
    lost: AtomicU64,
}

/// Why nobody may look on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TapError {
    /// [`MAX_READERS`] do already.
    #[error("{MAX_READERS} taps are open already; close one")]
    TooMany,
    /// The query names a filter that there is not, or one twice, or a pattern that is too long.
    #[error(
        "`{0}` is not usable: each of peer, user, action, object, verdict and path may be given once, \
         with at most {MAX_PATTERN_BYTES} bytes"
    )]
    Filter(String),
}

impl Tap {
    /// Whether anybody looks on: all that a request pays if not.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed) != 0
    }

    /// Shows a request that ended at `now` to those whom it concerns.
    pub(crate) fn show(&self, seen: &Finished<'_>, now: Duration) {
        let mut record = None;
        for reader in self.readers.load().iter().filter(|reader| reader.filter.admits(seen)) {
            let record: &Bytes = record.get_or_insert_with(|| access::record(seen, now));
            if reader.records.try_send(record.clone()).is_err() {
                reader.lost.fetch_add(1, Ordering::Relaxed);
                self.lost.inc();
            }
        }
    }

    /// A stream of what `query` asks for, until `scope` drains or the reader has gone.
    pub(crate) fn open(
        self: &Arc<Self>,
        query: &str,
        clock: SharedClock,
        scope: Scope,
    ) -> Result<Body, TapError> {
        let (records, waiting) = mpsc::channel(MAX_WAITING_RECORDS);
        let reader = Arc::new(Reader { filter: Filter::parse(query)?, records, lost: AtomicU64::new(0) });
        self.change(|readers| {
            if readers.len() >= MAX_READERS {
                return Err(TapError::TooMany);
            }
            readers.push(Arc::clone(&reader));
            Ok(())
        })?;
        let reading = Reading { tap: Arc::clone(self), reader, waiting, clock, scope, begun: false };
        let pieces = stream::unfold(reading, async |mut reading| {
            let piece = reading.next().await?;
            Some((Ok::<_, BoxError>(Frame::data(piece)), reading))
        });
        Ok(Body::new(StreamBody::new(pieces)))
    }

    /// Adds what is known here to the metrics.
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "lost_tap_records",
            "Requests that a reader of /debug/tap missed",
            self.lost.clone(),
        );
    }

    fn change<T>(&self, change: impl FnOnce(&mut Vec<Arc<Reader>>) -> T) -> T {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut readers = self.readers.load().to_vec();
        let outcome = change(&mut readers);
        self.open.store(readers.len(), Ordering::Relaxed);
        self.readers.store(Arc::new(readers));
        outcome
    }
}

/// One reader's end.
struct Reading {
    tap: Arc<Tap>,
    reader: Arc<Reader>,
    waiting: mpsc::Receiver<Bytes>,
    clock: SharedClock,
    scope: Scope,
    begun: bool,
}

impl Reading {
    async fn next(&mut self) -> Option<Bytes> {
        if !std::mem::replace(&mut self.begun, true) {
            // So that the reader sees at once that there is a tap.
            return Some(Bytes::from_static(b"\n"));
        }
        let mut records = Vec::new();
        tokio::select! {
            biased;
            () = self.scope.draining() => return None,
            _some = self.waiting.recv_many(&mut records, RECORDS_A_PIECE) => {}
            () = self.clock.sleep(HEARTBEAT) => return Some(Bytes::from_static(b"\n")),
        }
        let lost = self.reader.lost.swap(0, Ordering::Relaxed);
        if lost == 0
            && let [one] = records.as_slice()
        {
            return Some(one.clone());
        }
        let mut piece = BytesMut::new();
        for record in records {
            piece.extend_from_slice(&record);
        }
        if lost > 0 {
            piece.extend_from_slice(format!("{{\"lost\":{lost}}}\n").as_bytes());
        }
        Some(piece.freeze())
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.tap.change(|readers| readers.retain(|reader| !Arc::ptr_eq(reader, &self.reader)));
    }
}

/// Which requests a reader wants to see: those that every pattern fits.
#[derive(Debug, Default)]
struct Filter {
    peer: Option<Pattern>,
    user: Option<Pattern>,
    action: Option<Pattern>,
    object: Option<Pattern>,
    verdict: Option<Pattern>,
    path: Option<Pattern>,
}

impl Filter {
    /// Reads a query such as `peer=spiffe://bank.example/*&verdict=deny`.
    fn parse(query: &str) -> Result<Self, TapError> {
        let mut filter = Self::default();
        for (name, pattern) in form_urlencoded::parse(query.as_bytes()) {
            let place = match &*name {
                "peer" => &mut filter.peer,
                "user" => &mut filter.user,
                "action" => &mut filter.action,
                "object" => &mut filter.object,
                "verdict" => &mut filter.verdict,
                "path" => &mut filter.path,
                _ => return Err(TapError::Filter(name.into_owned())),
            };
            if pattern.len() > MAX_PATTERN_BYTES || place.replace(Pattern(pattern.into())).is_some() {
                return Err(TapError::Filter(name.into_owned()));
            }
        }
        Ok(filter)
    }

    fn admits(&self, seen: &Finished<'_>) -> bool {
        let fits =
            |pattern: &Option<Pattern>, text: &str| pattern.as_ref().is_none_or(|pattern| pattern.fits(text));
        fits(&self.verdict, seen.verdict)
            && fits(&self.peer, seen.peer)
            && fits(&self.user, seen.user)
            && fits(&self.action, seen.action)
            && fits(&self.path, seen.path)
            && self.object.as_ref().is_none_or(|pattern| pattern.fits_one_of(seen.objects))
    }
}

/// Text in which `*` stands for anything, nothing included.
#[derive(Debug)]
struct Pattern(Box<str>);

impl Pattern {
    fn fits(&self, text: &str) -> bool {
        let mut parts = self.0.split('*');
        let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        for part in parts {
            // The first place where a part fits leaves the most to those behind it.
            let Some((_, behind)) = rest.split_once(part) else { return false };
            rest = behind;
        }
        rest.ends_with(last)
    }

    /// Whether it fits all that is listed, or one item between commas.
    fn fits_one_of(&self, listed: &dyn Display) -> bool {
        let listed = listed.to_string();
        self.fits(&listed) || listed.split(',').any(|item| self.fits(item))
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use identity::clock::ManualClock;
    use proptest::prelude::*;

    use super::*;

    fn seen<'a>(path: &'a str, verdict: &'a str) -> Finished<'a> {
        Finished { peer: "spiffe://bank.example/service/web", path, verdict, ..Finished::default() }
    }

    struct Rig {
        tap: Arc<Tap>,
        clock: Arc<ManualClock>,
        scope: Scope,
    }

    impl Rig {
        fn new() -> Self {
            let clock = ManualClock::at(Duration::from_secs(1));
            Self { tap: Arc::default(), clock, scope: Scope::new() }
        }

        fn open(&self, query: &str) -> Result<Body, TapError> {
            self.tap.open(query, Arc::clone(&self.clock) as SharedClock, self.scope.clone())
        }

        fn show(&self, path: &str, verdict: &str) {
            self.tap.show(&seen(path, verdict), Duration::from_secs(1));
        }
    }

    async fn piece(body: &mut Body) -> Option<String> {
        let frame = body.frame().await?.unwrap();
        Some(String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_reader_sees_what_it_asked_for_until_the_drain() {
        let rig = Rig::new();
        assert!(!rig.tap.is_open());
        let mut body = rig.open("verdict=deny&path=/accounts/*").unwrap();
        assert!(rig.tap.is_open());
        assert_eq!(piece(&mut body).await.unwrap(), "\n");
        rig.show("/accounts/17", "allow");
        rig.show("/other", "deny");
        rig.show("/accounts/42", "deny");
        let record = piece(&mut body).await.unwrap();
        assert!(record.ends_with("}\n") && record.contains(r#""path":"/accounts/42""#), "{record}");
        assert!(record.contains(r#""peer":"spiffe://bank.example/service/web""#), "{record}");
        let (silence, ()) = tokio::join!(piece(&mut body), async {
            tokio::task::yield_now().await;
            rig.clock.advance(HEARTBEAT);
        });
        assert_eq!(silence.unwrap(), "\n");
        rig.scope.drain();
        assert_eq!(piece(&mut body).await, None);
        drop(body);
        assert!(!rig.tap.is_open());
    }

    #[tokio::test]
    async fn a_slow_reader_loses_records_and_hears_how_many() {
        let rig = Rig::new();
        let (mut slow, mut brisk) = (rig.open("").unwrap(), rig.open("").unwrap());
        piece(&mut slow).await.unwrap();
        piece(&mut brisk).await.unwrap();
        for number in 0..MAX_WAITING_RECORDS + 10 {
            rig.show(&format!("/{number}"), "allow");
            assert!(piece(&mut brisk).await.unwrap().contains(&format!(r#""path":"/{number}""#)));
        }
        let mut lines = Vec::new();
        while lines.len() <= MAX_WAITING_RECORDS {
            lines.extend(piece(&mut slow).await.unwrap().lines().map(str::to_owned));
        }
        let (told, records): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.contains("lost"));
        assert_eq!(told, [r#"{"lost":10}"#]);
        assert_eq!(records.len(), MAX_WAITING_RECORDS);
        let mut metrics = Registry::default();
        rig.tap.register(&mut metrics);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &metrics).unwrap();
        assert!(text.contains("lost_tap_records_total 10"), "{text}");
    }

    #[tokio::test]
    async fn there_are_few_readers_and_one_that_goes_makes_room() {
        let rig = Rig::new();
        let mut open: Vec<_> = (0..MAX_READERS).map(|_| rig.open("").unwrap()).collect();
        assert_eq!(rig.open("").unwrap_err(), TapError::TooMany);
        open.pop();
        assert!(rig.open("user=alice").is_ok());
    }

    #[test]
    fn filters_that_are_not_understood_are_refused() {
        for query in ["pear=x", "user=a&user=b", "=x", &format!("path={}", "a".repeat(MAX_PATTERN_BYTES + 1))]
        {
            assert!(matches!(Filter::parse(query), Err(TapError::Filter(_))), "{query}");
        }
    }

    #[test]
    fn an_object_is_found_among_others() {
        let filter = Filter::parse("object=Account%3A%3A%2217%22").unwrap();
        let admits = |objects: &str| filter.admits(&Finished { objects: &objects, ..Finished::default() });
        assert!(admits(r#"Account::"17""#) && admits(r#"Account::"3",Account::"17""#));
        assert!(!admits("") && !admits(r#"Account::"170""#));
    }

    /// The slow way: every way to share the text among the stars.
    fn fits_slowly(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => (0..=text.len()).any(|skipped| fits_slowly(rest, &text[skipped..])),
            Some((byte, rest)) => text.first() == Some(byte) && fits_slowly(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn patterns_fit_what_they_say(pattern in "[ab*]{0,8}", text in "[ab]{0,10}") {
            let fits = Pattern(pattern.as_str().into()).fits(&text);
            prop_assert_eq!(fits, fits_slowly(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
